"""LFCC-LCNN and LFCC-ResNet18: shape walks of their docstrings, their activation and poolings by formula."""

import numpy as np
import pytest
import torch
from torch import nn

from deepfake_utils.conventions import AudioError, ConfigError
from deepfake_utils.models import build_model
from deepfake_utils.models.layers import AttentiveStatistics
from deepfake_utils.models.lcnn import LSTMSum, MaxFeatureMap
from deepfake_utils.models.resnet import PreActivationBlock

FAMILIES = ("lfcc-lcnn", "lfcc-lcnn-lstm", "lfcc-resnet18")
FRONT_ENDS = ("lfcc-high-resolution", "lfcc-levelled", "log-spectrogram")


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shapes_seen(model, layers, waveform):
    """What goes out of each layer, in the order of a forward pass, without the batch."""
    seen = []
    handles = [layer.register_forward_hook(lambda _, i, out: seen.append(tuple(out.shape[1:]))) for layer in layers]
    model.eval()(waveform)
    for handle in handles:
        handle.remove()
    return seen


def test_lcnn_shapes_are_those_of_its_docstring():
    model = build_model("lfcc-lcnn-lstm")
    pools = [layer for layer in model.convolutions if isinstance(layer, nn.MaxPool2d)]
    layers = [model.front_end, *pools, model.pooling, model.embed, model.output]
    assert shapes_seen(model, layers, noise(1, 64_600)) == [
        (60, 402), (32, 30, 201), (48, 15, 100), (64, 7, 50), (32, 3, 25), (96,), (64,), (2,),
    ]  # fmt: skip


def test_resnet_shapes_are_those_of_its_docstring():
    model = build_model("lfcc-resnet18")
    layers = [model.front_end, model.conv, *model.blocks[1::2], model.join, model.pooling, model.embed, model.output]
    assert shapes_seen(model, layers, noise(1, 64_600)) == [
        (60, 402), (16, 18, 402), (64, 18, 402), (128, 9, 201), (256, 5, 101), (512, 3, 51), (256, 1, 51),
        (512,), (256,), (2,),
    ]  # fmt: skip


def test_max_feature_map_is_the_larger_half_and_sends_each_gradient_to_the_winner():
    x = noise(2, 6, 4, 5).requires_grad_()
    result = MaxFeatureMap(3)(x)
    torch.testing.assert_close(result, torch.maximum(x[:, :3], x[:, 3:]))
    upstream = noise(2, 3, 4, 5, seed=2)
    result.backward(upstream)
    first_wins = x[:, :3] > x[:, 3:]
    torch.testing.assert_close(x.grad[:, :3], upstream * first_wins)
    torch.testing.assert_close(x.grad[:, 3:], upstream * ~first_wins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_max_feature_map_is_exact_in_half_precision(dtype):
    x = torch.tensor([[0.001, 40000.0, -100.0, -40000.0]], dtype=dtype)[..., None, None]
    assert torch.equal(MaxFeatureMap(2)(x), x[:, :2])


def test_attentive_statistics_are_the_weighted_moments():
    pooling = AttentiveStatistics(5)
    x = noise(3, 5, 7)
    rows = x.double().numpy()
    expected = []
    for row in rows:
        raw = np.exp(np.tanh(pooling.direction.detach().double().numpy() @ row))
        weight = raw / raw.sum()
        mean = row @ weight
        expected.append(np.concatenate([mean, np.sqrt((row - mean[:, None]) ** 2 @ weight)]))
    np.testing.assert_allclose(pooling(x).detach().numpy(), expected, atol=1e-5)


def test_attentive_statistics_survive_constants_and_half_precision():
    pooling = AttentiveStatistics(4)
    x = torch.full((2, 4, 9), 3.0, requires_grad=True)
    pooling(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    offset = 100 + noise(1, 4, 50)  # where the mean of squares minus the square of the mean would round away
    with torch.autocast("cpu", dtype=torch.bfloat16):
        deviation = pooling(offset)[:, 4:]
    torch.testing.assert_close(deviation, offset.std(-1, correction=0), rtol=0.35, atol=0)


def test_lstm_sum_is_the_sum_over_time_of_both_directions_and_the_skip():
    pooling = LSTMSum(6)
    x = noise(2, 6, 5)
    steps, _ = pooling.lstm(x.transpose(1, 2))
    expected = sum(steps[:, t] + x[:, :, t] for t in range(5))
    torch.testing.assert_close(pooling(x), expected)
    assert pooling.lstm.bidirectional and pooling.lstm.num_layers == 2
    reached = x.clone().requires_grad_()  # the first frame hears the last: both directions are there
    pooling.lstm(reached.transpose(1, 2))[0][:, 0].sum().backward()
    assert reached.grad[:, :, -1].abs().max() > 0


def test_a_residual_block_is_its_formula():
    block = PreActivationBlock(4, 6, 2).eval()
    x = noise(2, 4, 9, 8)
    active = torch.relu(block.norm1(x))
    expected = block.conv2(torch.relu(block.norm2(block.conv1(active)))) + block.shortcut(active)
    torch.testing.assert_close(block(x), expected)
    assert block(x).shape == (2, 6, 5, 4)
    assert PreActivationBlock(4, 4, 1).shortcut is None


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_front_end_fits_every_network(name, front_end):
    model = build_model(name, front_end=front_end).eval()
    for n_samples in (model.min_samples, 20_000):
        output = model(noise(2, n_samples))
        assert output.logits.shape == (2, 2) and torch.isfinite(output.logits).all()
    with pytest.raises(AudioError):
        model(noise(2, model.min_samples - 1))


def test_unknown_choices_are_refused_in_words():
    with pytest.raises(ConfigError, match="lstm-sum"):
        build_model("lfcc-lcnn", pooling="mean")
    with pytest.raises(ConfigError, match="log-spectrogram"):
        build_model("lfcc-resnet18", front_end="cqt")
