"""RawNet2: its parts against formulas written here, and the published quirks that parity needs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfake_utils.conventions import AudioError, CheckpointError, ConfigError
from deepfake_utils.models import build_model
from deepfake_utils.models.fast.gru import GRULayer
from deepfake_utils.models.rawnet2 import RawNet2Config, published_state_dict
from deepfake_utils.models.sinc import FFT_POINTS, SincFilters, pooled_by_fft

SMALL = {"sinc_filters": 6, "sinc_taps": 65, "channels": (6, 8), "gru_dim": 12, "gru_layers": 2, "embedding_dim": 10}


def small(seed=0, **overrides):
    return build_model("rawnet2", generator=torch.Generator().manual_seed(seed), **{**SMALL, **overrides})


def noise(batch, n_samples, seed=1):
    return 0.1 * torch.randn(batch, n_samples, generator=torch.Generator().manual_seed(seed))


def pooled_directly(waveform, filters):
    return F.max_pool1d(F.conv1d(waveform.double()[:, None], filters.double()[:, None]).abs(), 3)


@given(st.integers(1, 6), st.integers(2, 3 * FFT_POINTS), st.sampled_from([3, 129, 1025]))
@settings(max_examples=25, deadline=None)
def test_filtering_by_fft_is_the_direct_correlation(batch, extra, n_taps):
    filters = SincFilters(5, n_taps).filters()
    waveform = noise(batch, n_taps + extra)
    expected = pooled_directly(waveform, filters)
    torch.testing.assert_close(pooled_by_fft(waveform, filters).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_out", [n_blocks * (FFT_POINTS - 64) + k for n_blocks in (1, 2) for k in range(-4, 5)])
def test_filtering_by_fft_at_the_edges_of_a_block(n_out):
    filters = SincFilters(2, 65).filters()
    waveform = noise(1, n_out + 64)
    expected = pooled_directly(waveform, filters).float()
    torch.testing.assert_close(pooled_by_fft(waveform, filters), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_gru_is_that_of_torch_with_its_gradients(batch):
    gru = small(gru_layers=3).gru
    frames = noise(batch, 7 * 8).view(batch, 7, 8).requires_grad_()
    upstream = noise(batch, 12, seed=2)
    states = frames.transpose(0, 1)
    for weights in gru.all_weights:
        states = GRULayer.apply(states, *weights)
    expected = gru(frames)[0].transpose(0, 1)
    torch.testing.assert_close(states, expected)
    inputs = [frames, *gru.parameters()]
    ours = torch.autograd.grad((states[-1] * upstream).sum() + states.square().sum(), inputs)
    theirs = torch.autograd.grad((expected[-1] * upstream).sum() + expected.square().sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_training_and_scoring_take_the_same_path_through_the_gru_to_rounding():
    model = lively(small())  # evaluation mode: only whether gradients are recorded differs
    waveform = noise(2, 900)
    recorded = model(waveform).logits
    with torch.no_grad():
        torch.testing.assert_close(recorded.detach(), model(waveform).logits, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(waveform).logits.float(), recorded, atol=0.1, rtol=0.1)


def test_hooks_on_the_gru_fire_in_training():
    model, seen = small(), []
    model.gru.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape))
    model(noise(2, 900)).logits.sum().backward()
    assert len(seen) == 1


def rawnet2_by_definition(state, waveform):
    """Evaluation-mode logits in double-precision NumPy, from the published parameter names (batch of one)."""
    p = {name: value.double().numpy() for name, value in state.items()}

    def norm(x, name):
        mean, variance = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        scale = p[f"{name}.weight"] / np.sqrt(variance + 1e-5)
        return (x - mean[:, None]) * scale[:, None] + p[f"{name}.bias"][:, None]

    def conv(x, name, padding):
        weight = p[f"{name}.weight"]
        x = np.pad(x, ((0, 0), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2], axis=1)
        return np.einsum("itk,oik->ot", windows, weight) + p[f"{name}.bias"][:, None]

    def pool(x):
        return x[:, : x.shape[1] // 3 * 3].reshape(len(x), -1, 3).max(-1)

    def selu(x):
        return 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0)))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    mel = np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 7)
    edges = 700 * (10 ** (mel / 2595) - 1) / 16_000  # cycles a sample
    n = np.arange(-32, 33)
    low_pass = [2 * f * np.sinc(2 * f * n) for f in edges]
    filters = np.hamming(65) * np.diff(low_pass, axis=0)
    bands = np.stack([np.correlate(waveform, taps, "valid") for taps in filters])
    x = selu(norm(pool(np.abs(bands)), "first_bn"))
    for block in range(2):
        name = f"block{block}.0"
        hidden = norm(conv(x, f"{name}.conv1", 1), f"{name}.bn2")  # of x itself: bn1 reaches nothing
        hidden = conv(np.where(hidden > 0, hidden, 0.3 * hidden), f"{name}.conv2", 1)
        skip = conv(x, f"{name}.conv_downsample", 0) if f"{name}.conv_downsample.weight" in p else x
        x = pool(hidden + skip)
        fc = f"fc_attention{block}.0"
        scale = sigmoid(p[f"{fc}.weight"] @ x.mean(1) + p[f"{fc}.bias"])[:, None]
        x = x * scale + scale
    frames = selu(norm(x, "bn_before_gru")).T
    for layer in range(2):
        w_in, w_state = p[f"gru.weight_ih_l{layer}"], p[f"gru.weight_hh_l{layer}"]
        b_in, b_state = p[f"gru.bias_ih_l{layer}"], p[f"gru.bias_hh_l{layer}"]
        state_now, outputs = np.zeros(12), []
        for frame in frames:
            r_in, z_in, n_in = np.split(w_in @ frame + b_in, 3)
            r_state, z_state, n_state = np.split(w_state @ state_now + b_state, 3)
            reset, update = sigmoid(r_in + r_state), sigmoid(z_in + z_state)
            candidate = np.tanh(n_in + reset * n_state)
            state_now = (1 - update) * candidate + update * state_now
            outputs.append(state_now)
        frames = np.stack(outputs)
    embedding = p["fc1_gru.weight"] @ frames[-1] + p["fc1_gru.bias"]
    return p["fc2_gru.weight"] @ embedding + p["fc2_gru.bias"], embedding


def published_names_of(model):
    """The state dict under the names of the published code: the inverse of what is tested, written by hand."""
    names = {}
    for name in model.state_dict():
        parts = name.split(".")
        if parts[0] == "blocks":
            rest = {"unused_norm": "bn1", "norm": "bn2", "shortcut": "conv_downsample"}.get(parts[2], parts[2])
            owner = f"fc_attention{parts[1]}.0" if rest == "scale" else f"block{parts[1]}.0.{rest}"
            names[name] = f"{owner}.{parts[3]}"
        else:
            head = {"norm": "first_bn", "gru_norm": "bn_before_gru", "embed": "fc1_gru", "output": "fc2_gru"}
            names[name] = f"{head.get(parts[0], parts[0])}.{parts[1]}"
    return {names[name]: value for name, value in model.state_dict().items()}


def lively(model, seed=5):
    """Random statistics and larger weights, so that no part of the network is near the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 2.0, generator=generator)
            elif "running_mean" in name or name.endswith("bias"):
                value.normal_(0.0, 0.3, generator=generator)
            elif value.ndim >= 2:
                value.mul_(2.0)
    return model.eval()


def test_published_parameters_give_the_outputs_of_the_definition():
    published = published_names_of(lively(small()))
    model = small(seed=9).eval()
    model.load_state_dict(published_state_dict(published))
    waveform = noise(1, 900)
    logits, embedding = rawnet2_by_definition(published, waveform[0].double().numpy())
    output = model(waveform)
    np.testing.assert_allclose(output.logits[0].detach().numpy(), logits, atol=1e-4)
    np.testing.assert_allclose(output.embedding[0].detach().numpy(), embedding, atol=1e-4)
    assert np.abs(embedding).max() > 0.1  # otherwise 1e-4 would mean nothing


# What the published code (RawNet2Spoof.py of the AASIST repository, its RawNet2_baseline configuration) gives for
# `chirp()` after `fill_by_cosine`: its log-probabilities, the embedding's first four numbers and its length.
PUBLISHED_CODE = {
    "log_probabilities": [-0.02381948, -3.74913883],
    "embedding": [-0.98313487, -0.86634982, 1.81840050, -1.08434129],
    "norm": 45.52019119,
}


def fill_by_cosine(state):
    """Deterministic values for every tensor, the same on any machine and torch version."""
    for index, name in enumerate(sorted(state)):
        value = state[name]
        if value.dtype.is_floating_point:
            n = value.numel()
            wave = torch.cos(torch.arange(n, dtype=torch.float64) * (1.0 + math.sqrt(index + 2)) + index)
            fan_in = max(n // len(value), 1)
            wave = 1.0 + 0.5 * wave if "running_var" in name else wave * 2.0 / math.sqrt(fan_in)
            value.copy_(wave.view(value.shape))


def chirp(n_samples=16_000):
    t = torch.arange(n_samples, dtype=torch.float64) / 16_000
    return (0.3 * torch.sin(2 * math.pi * (100 + 1500 * t) * t)).float()[None]


def test_outputs_of_the_published_code_are_reproduced():
    model = build_model("rawnet2").eval()
    published = published_names_of(model)
    fill_by_cosine(published)  # fills the model's own tensors: the dictionary shares them
    with torch.no_grad():
        logits, embedding = model(chirp())
    log_probabilities = logits.log_softmax(1)[0]
    assert log_probabilities.tolist() == pytest.approx(PUBLISHED_CODE["log_probabilities"], abs=1e-4)
    assert embedding[0, :4].tolist() == pytest.approx(PUBLISHED_CODE["embedding"], abs=1e-4)
    assert embedding.norm().item() == pytest.approx(PUBLISHED_CODE["norm"], rel=1e-4)


def test_the_unused_norm_is_kept_but_reaches_nothing():
    model = lively(small())
    before = model(noise(2, 700)).logits
    with torch.no_grad():
        model.blocks[1].unused_norm.weight.add_(100.0)
    assert torch.equal(model(noise(2, 700)).logits, before)
    assert not hasattr(model.blocks[0], "unused_norm")


def test_min_samples_is_exactly_where_one_frame_is_left():
    model = build_model("rawnet2")
    frames = []
    model.gru.register_forward_pre_hook(lambda _, inputs: frames.append(inputs[0].shape[1]))
    with torch.no_grad():
        model.eval()(noise(1, model.min_samples))
    assert frames == [1]
    assert model.min_samples - (1025 - 1) == 3**7
    with pytest.raises(AudioError, match=f"needs at least {model.min_samples}"):
        model(noise(1, model.min_samples - 1))
    with torch.no_grad():
        model(noise(1, 64_600))
    assert frames == [1, 29]  # the shape walk of the docstring


def test_band_mask_removes_bands_for_the_batch_or_for_each_waveform():
    model = lively(small())
    waveform = noise(2, 900)
    keep_all, drop_some = torch.ones(6), torch.tensor([1.0, 0, 0, 1, 1, 1])
    plain, masked = model(waveform).logits, model(waveform, band_mask=drop_some).logits
    torch.testing.assert_close(model(waveform, band_mask=keep_all).logits, plain)
    assert (plain - masked).abs().min() > 1e-4
    mixed = model(waveform, band_mask=torch.stack([keep_all, drop_some])).logits
    torch.testing.assert_close(mixed, torch.stack([plain[0], masked[1]]))


@pytest.mark.parametrize("spacing", ["mel", "inverse-mel", "linear"])
def test_a_learnable_bank_starts_as_the_fixed_one_and_learns(spacing):
    fixed, learnable = (small(sinc_spacing=spacing, sinc_learnable=flag) for flag in (False, True))
    learnable.load_state_dict(fixed.state_dict(), strict=False)
    waveform = noise(2, 900)
    torch.testing.assert_close(fixed.eval()(waveform).logits, learnable.eval()(waveform).logits, atol=1e-5, rtol=0)
    learnable(waveform).logits.square().sum().backward()
    gradients = [p.grad for name, p in learnable.named_parameters() if name.startswith("sinc.")]
    assert len(gradients) == 2 and all(g.abs().max() > 0 and torch.isfinite(g).all() for g in gradients)


def test_a_foreign_checkpoint_and_a_bad_spacing_are_refused_in_words():
    with pytest.raises(CheckpointError, match="fc1_gru.weight"):
        published_state_dict({"pos_S": torch.zeros(1)})
    with pytest.raises(ConfigError, match="inverse-mel"):
        small(sinc_spacing="bark")


def test_the_configuration_is_not_changed_by_building():
    config = RawNet2Config()
    before = dataclasses.asdict(config)
    build_model("rawnet2")
    assert dataclasses.asdict(config) == before
