"""Pruning: what no channel depends on may go, and nothing changes."""

import dataclasses
import json

import pytest
import torch

from deepfake_utils.conventions import ConfigError, TrainingError
from deepfake_utils.models import build_model
from deepfake_utils.models.prune import narrowed
from deepfake_utils.scoring.weights import load_model, save_weights
from deepfake_utils.training.loop import fit
from tests.test_training import tiny_config, write_corpus

WIDE = {"channels": (6, 8, 10), "stem_channels": 5, "pooled_channels": 12, "embedding_dim": 9}
NARROW = {"channels": (4, 5, 6), "stem_channels": 3, "pooled_channels": 7, "embedding_dim": 4}


@pytest.fixture
def model():
    """A network whose batch norms differ from channel to channel."""
    generator = torch.Generator().manual_seed(0)
    model = build_model("spectrogram-resnet", generator=generator, **WIDE).eval()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_var"):
                for value in (module.weight, module.running_var):
                    value.uniform_(0.5, 1.5, generator=generator)
                for value in (module.bias, module.running_mean):
                    value.normal_(0, 0.3, generator=generator)
    return model


def silence(norm, generator, n):
    """Make some channels of a norm write nothing, whichever."""
    dead = torch.randperm(len(norm.weight), generator=generator)[:n]
    norm.weight[dead] = 0
    norm.bias[dead] = 0
    return dead


@torch.no_grad()
def test_channels_that_are_always_zero_go_without_a_trace(model):
    generator = torch.Generator().manual_seed(1)
    silence(model.stem_norm, generator, 2)
    for stage, (wide, narrow) in enumerate(zip(WIDE["channels"], NARROW["channels"], strict=True)):
        first, second = model.blocks[2 * stage : 2 * stage + 2]
        dead = silence(first.norm2, generator, wide - narrow)
        for norm in (first.shortcut[-1], second.norm2):
            norm.weight[dead] = norm.bias[dead] = 0
        for block in (first, second):
            silence(block.norm1, generator, wide - narrow)
    silence(model.join_norm, generator, 5)
    dead = torch.randperm(9, generator=generator)[:5]
    model.embed.weight[dead] = model.embed.bias[dead] = 0
    waveform = 0.1 * torch.randn(2, 9000, generator=generator)
    # a pooled channel that is always zero still has the floor of its deviation: take that part out of the embedding
    model.embed.weight[:, 12:][:, model.join_norm.weight == 0] = 0
    small = narrowed(model, **NARROW)
    assert dataclasses.asdict(small.config) | NARROW == dataclasses.asdict(small.config)
    torch.testing.assert_close(small(waveform).logits, model(waveform).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_changes_where_nothing_goes_and_the_wide_network_never_does(model):
    waveform = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    before = model(waveform).logits
    torch.testing.assert_close(narrowed(model)(waveform).logits, before, atol=0, rtol=0)
    narrowed(model, **NARROW)
    torch.testing.assert_close(model(waveform).logits, before, atol=0, rtol=0)


def test_the_result_is_saved_and_loaded_as_any_other(model, tmp_path):
    small = narrowed(model, **NARROW)
    path = save_weights(tmp_path / "small.safetensors", small, name="spectrogram-resnet")
    loaded = load_model(weights=path)
    assert loaded.config == small.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("widths", [{"channels": (6, 8)}, {"channels": (6, 9, 10)}, {"stem_channels": 6}])
def test_wider_or_other_stages_are_refused(model, widths):
    with pytest.raises(ConfigError, match=next(iter(widths))):
        narrowed(model, **widths)


def test_a_run_may_start_from_a_wider_network_and_is_resumed_without_starting_again(model, tmp_path):
    train, dev = write_corpus(tmp_path, n_train=16)
    wide = tmp_path / "wide.safetensors"
    save_weights(wide, model, name="spectrogram-resnet")
    options = json.loads(json.dumps(NARROW))  # lists, as the command line gives them
    config = tiny_config(model="spectrogram-resnet", model_options=options, start=str(wide), learning_rate=0.0,
                         learning_rate_min=0.0, epochs=2)  # fmt: skip
    said = []

    def stop(history):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(train, dev, tmp_path / "run", config, device="cpu", on_epoch=stop, say=said.append)
    assert any("narrowed from" in line for line in said)
    fit(train, dev, tmp_path / "run", config, device="cpu", say=said.append)
    assert any(line.startswith("resuming:  epoch 2") for line in said)
    kept = load_model(weights=tmp_path / "run" / "best.safetensors")
    expected = narrowed(model, **NARROW)
    for (name, value), other in zip(kept.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other), name  # a rate of 0 learns nothing
    about = json.loads((tmp_path / "run" / "best.json").read_text())["trained_on"]
    assert about["fine_tuned"] and about["started_from"]["file"] == "wide.safetensors"

    save_weights(wide, build_model("spectrogram-resnet", **WIDE), name="spectrogram-resnet")
    with pytest.raises(TrainingError, match="the weights to start from are others"):
        fit(train, dev, tmp_path / "run", config, device="cpu", say=said.append)
    with pytest.raises(ConfigError, match="give one of them"):
        fit(train, dev, tmp_path / "other", config, model=model, device="cpu", say=said.append)
    with pytest.raises(ConfigError, match="a file or a name of weights"):
        tiny_config(start=3)


def test_a_run_starts_from_the_member_of_a_fusion_that_it_is_to_train(model, tmp_path):
    members = (("lfcc-lcnn", {}), ("spectrogram-resnet", dataclasses.asdict(model.config)))
    fused = build_model("score-fusion", members=members)
    fused.members[1].load_state_dict(model.state_dict())
    start = save_weights(tmp_path / "fused.safetensors", fused, name="score-fusion")
    train, dev = write_corpus(tmp_path, n_train=16)
    config = tiny_config(model="spectrogram-resnet", model_options=NARROW, start=str(start), learning_rate=0.0,
                         learning_rate_min=0.0, epochs=1)  # fmt: skip
    fit(train, dev, tmp_path / "run", config, device="cpu", say=lambda line: None)
    kept = load_model(weights=tmp_path / "run" / "best.safetensors")
    for value, other in zip(kept.parameters(), narrowed(model, **NARROW).parameters(), strict=True):
        assert torch.equal(value, other)
