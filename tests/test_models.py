"""Every countermeasure by name: shapes, lengths, gradients, repeatability, saving, and whether it can learn."""

import math

import pytest
import torch

from deepfake_utils.conventions import DeepfakeUtilsError
from deepfake_utils.models import MODELS, build_model
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.models.losses import WeightedCrossEntropy

# Trainable parameters of each model as configured. Published: AASIST, AASIST-L and RawNet2 in the AASIST repository;
# LFCC-ResNet18 equals the count of its authors' code; LFCC-LCNN-LSTM is 275,840 in the code of its authors, to which
# the output layer for cross-entropy adds 130.
PARAMETERS = {
    "aasist": 297_866,
    "aasist-l": 85_306,
    "aasist-xl": 1_177_354,
    "aasist-transformer": 665_220,
    "rawnet2": 17_621_410,
    "rawnet2-learnable": 17_621_450,
    "lfcc-lcnn": 170_082,
    "lfcc-lcnn-lstm": 275_970,
    "lfcc-resnet18": 12_450_290,
    "spectrogram-resnet": 244_658,
    "score-fusion": 244_658 + 170_082,  # the two above
}

# Parameters that no gradient reaches, by how their names end, and why they are kept.
WITHOUT_GRADIENT = (
    "unused_norm.weight",  # AASIST, RawNet2: its output never reached the next layer in the published code, and
    "unused_norm.bias",  # its parameters are in the published checkpoints and counts
    "conv1.bias",  # AASIST, RawNet2: the batch norm after it subtracts it again, so its gradient is rounding
)

NAMES = sorted(MODELS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(batch, n_samples, seed=1):
    return 0.1 * torch.randn(batch, n_samples, generator=seeded(seed))


@pytest.fixture(scope="module")
def built():
    """Each model once, for tests that only read it."""
    return {name: build_model(name, generator=seeded()).eval() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count(built, name):
    assert name in PARAMETERS, f"add {name} to the table"
    assert sum(parameter.numel() for parameter in built[name].parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_a_batch_and_of_one_at_two_lengths(built, name):
    model = built[name]
    for n_samples in (model.min_samples, model.min_samples + 2345):
        waveform = noise(3, n_samples)
        with torch.no_grad():
            output = model(waveform)
            alone = model(waveform[1:2])
        assert isinstance(output, CMOutput)
        assert output.logits.shape == (3, 2) and output.embedding.ndim == 2 and len(output.embedding) == 3
        assert output.logits.dtype == torch.float32
        assert torch.isfinite(output.logits).all() and torch.isfinite(output.embedding).all()
        torch.testing.assert_close(alone.logits[0], output.logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_silence_and_full_scale_give_finite_scores(built, name):
    n_samples = built[name].min_samples + 1000
    square = torch.ones(n_samples)
    square[::2] = -1
    with torch.no_grad():
        logits = built[name](torch.stack([torch.zeros(n_samples), torch.ones(n_samples), square])).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_embedding_is_what_the_last_layer_reads(built, name):
    model = built[name]
    output = model(noise(2, model.min_samples))
    torch.testing.assert_close(model.output(output.embedding), output.logits)


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_below_the_minimum_is_refused_in_words(built, name):
    minimum = built[name].min_samples
    with pytest.raises(DeepfakeUtilsError, match=str(minimum)):
        built[name](noise(1, minimum - 1))
    with pytest.raises(DeepfakeUtilsError, match="batch, samples"):
        built[name](torch.zeros(minimum))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_receives_a_gradient(name):
    model = build_model(name, generator=seeded())
    torch.manual_seed(0)  # dropout
    logits = model(noise(4, 9000)).logits
    WeightedCrossEntropy()(logits, logits, torch.tensor([0.0, 1, 1, 0])).backward()
    missing = [
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    unexplained = [parameter for parameter in missing if not parameter.endswith(WITHOUT_GRADIENT)]
    assert not unexplained
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_the_generator_alone_and_a_build_disturbs_nothing(built, name):
    torch.manual_seed(7)
    expected_draw = torch.rand(3)
    torch.manual_seed(7)
    again = build_model(name, generator=seeded())
    assert torch.equal(torch.rand(3), expected_draw)
    ours, theirs = built[name].state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if name != "rawnet2-learnable":  # 17 million more weights would show nothing new
        other = build_model(name, generator=seeded(1)).state_dict()
        assert any(not torch.equal(ours[key], other[key]) for key in ours)


@pytest.mark.parametrize("name", NAMES)
def test_saved_weights_give_the_same_scores(built, name, tmp_path):
    from safetensors.torch import load_file, save_file

    model = built[name]
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = build_model(name, generator=seeded(1)).eval()
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    waveform = noise(1, model.min_samples)
    with torch.no_grad():
        assert torch.equal(other(waveform).logits, model(waveform).logits)


def tones_and_noise(n_samples, n_each=4):
    """A task any countermeasure must be able to learn: a hum (bona fide, 1) against a hiss (spoof, 0)."""
    generator = seeded(3)
    time_s = torch.arange(n_samples) / 16_000
    pitch_hz = 150 + 100 * torch.rand(n_each, 1, generator=generator)
    hum = sum(torch.sin(2 * math.pi * h * pitch_hz * time_s) / h for h in range(1, 6))
    hiss = torch.randn(n_each, n_samples, generator=generator)
    waveform = torch.cat([hum + 0.05 * hiss.flip(0), hiss])
    return 0.1 * waveform / waveform.std(1, keepdim=True), torch.arange(2 * n_each) < n_each


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_separate_a_tiny_set(name):
    model = build_model(name, generator=seeded())
    waveform, is_hum = tones_and_noise(4600)
    target = is_hum.float()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    torch.manual_seed(0)  # dropout
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        output = model(waveform)
        loss = WeightedCrossEntropy((0.5, 0.5))(output.logits, output.embedding, target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    with torch.no_grad():
        for layer in model.modules():  # statistics of the last weights alone, not of the whole way there
            if hasattr(layer, "reset_running_stats"):
                layer.reset_running_stats()
                layer.momentum = None
        model(waveform)
        logits = model.eval()(waveform).logits
    score = logits[:, 1] - logits[:, 0]
    assert losses[-1] < losses[0]
    assert score[is_hum].min() > score[~is_hum].max()
