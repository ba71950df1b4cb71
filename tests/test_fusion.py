"""Score fusion: what it answers is the mean of its members, also after it was saved, exported and trained."""

import json

import pytest
import torch

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models import build_model
from deepfake_utils.scoring.weights import load_model, save_weights

MEMBERS = (("lfcc-lcnn", {"front_end": "lfcc-levelled"}), ("spectrogram-resnet", {"channels": (8, 16)}))


@pytest.fixture(scope="module")
def fused():
    return build_model("score-fusion", generator=torch.Generator().manual_seed(0), members=MEMBERS).eval()


def test_the_log_odds_are_the_mean_of_the_members_own(fused):
    waveform = 0.1 * torch.randn(3, 20_000, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parts = [member(waveform) for member in fused.members]
        whole = fused(waveform)
    assert not torch.equal(parts[0].logits, parts[1].logits)
    expected = sum(part.logits[:, 1].double() - part.logits[:, 0].double() for part in parts) / 2
    torch.testing.assert_close((whole.logits[:, 1] - whole.logits[:, 0]).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole.embedding, torch.cat([part.embedding for part in parts], 1))


def test_members_and_their_settings_survive_saving(fused, tmp_path):
    path = save_weights(tmp_path / "fused.safetensors", fused, name="score-fusion")
    assert json.loads(path.with_suffix(".json").read_text())["model_options"]["members"][1][1] == {"channels": [8, 16]}
    again, waveform = load_model(weights=path), 0.1 * torch.ones(2, 20_000)
    assert again.config == fused.config  # or training would not go on with them
    with torch.no_grad():
        assert torch.equal(again(waveform).logits, fused(waveform).logits)


def test_without_members_or_with_unknown_ones_it_is_refused():
    with pytest.raises(ConfigError, match="no members"):
        build_model("score-fusion", members=())
    with pytest.raises(ConfigError, match="unknown model 'lcnn'"):
        build_model("score-fusion", members=(("lcnn", {}),))
