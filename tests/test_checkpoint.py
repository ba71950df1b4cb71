"""Weights on disk: published files, our own, damaged ones, and what must never happen when loading."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from deepfake_utils import load_model
from deepfake_utils.conventions import CheckpointError
from deepfake_utils.models import build_model
from deepfake_utils.models.losses import build_loss
from deepfake_utils.scoring.weights import save_weights, scoring_model
from deepfake_utils.training.resume import load_training_state, save_training_state
from deepfake_utils.waveforms import decode as audio

TINY = {"sinc_filters": 12, "channels": (4, 4), "graph_dim": 4, "branch_dim": 4}


@pytest.mark.parametrize(("name", "file"), [("aasist", "AASIST"), ("aasist-l", "AASIST-L")])
def test_published_weights_give_the_published_logits_with_and_without_their_name(reference_data, name, file):
    golden = pd.read_csv(reference_data / "published_weights" / "golden_logits.csv")
    row = golden.iloc[0]
    path = reference_data / "asvspoof2019_subset" / "LA" / "ASVspoof2019_LA_train" / "flac" / f"{row.utterance}.flac"
    waveform = torch.from_numpy(audio.fit_length(audio.read_audio(path), 64_600))[None]
    expected = [row[f"{file}_logit_spoof"], row[f"{file}_logit_bonafide"]]
    weights = reference_data / "published_weights" / f"{file}.pth"
    for model in (load_model(name, weights=weights), load_model(weights=weights)):
        with torch.no_grad():
            assert model(waveform).logits[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_saved_weights_come_back_with_their_configuration(tmp_path):
    model = build_model("aasist-l", generator=torch.Generator().manual_seed(1), **TINY).eval()
    path = save_weights(tmp_path / "w.safetensors", model, name="aasist-l", facts={"dev_eer": 0.1})
    loaded = load_model(weights=path)
    waveform = 0.1 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(waveform).logits, model(waveform).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.json", "w.safetensors"], "no temporary file stays"


@pytest.mark.parametrize("loss", ["oc_softmax", "p2sgrad"])
def test_a_loss_with_its_own_directions_travels_with_the_weights(tmp_path, loss):
    generator = torch.Generator().manual_seed(1)
    model = build_model("aasist-l", generator=generator, **TINY).eval()
    scorer = scoring_model(model, build_loss(loss, 20, generator=generator))
    waveform = 0.1 * torch.randn(2, 4000, generator=generator)
    path = save_weights(tmp_path / "w.safetensors", scorer, name="aasist-l", loss=loss)
    assert torch.equal(load_model(weights=path)(waveform).logits, scorer(waveform).logits)


def test_wrong_files_are_refused_in_words(tmp_path):
    with pytest.raises(CheckpointError, match="do not exist"):
        load_model("aasist", weights=tmp_path / "none.pth")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(CheckpointError, match="damaged.pth cannot be read as weights.* audio and weights") as caught:
        load_model("aasist", weights=damaged)
    assert "weights_only" not in str(caught.value)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(3)}, other)
    with pytest.raises(CheckpointError, match="other.safetensors"):
        load_model("aasist", weights=other)
    with pytest.raises(CheckpointError, match="fits none of aasist"):
        load_model(weights=other)
    tiny = save_weights(tmp_path / "t.safetensors", build_model("aasist-l", **TINY), name="aasist-l")
    with pytest.raises(CheckpointError, match="weights of 'aasist-l', not of 'aasist'"):
        load_model("aasist", weights=tiny)
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(weights=tiny)


def test_a_truncated_file_is_refused(tmp_path):
    whole = save_weights(tmp_path / "w.safetensors", build_model("aasist-l", **TINY), name="aasist-l")
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(weights=whole)


class Payload:
    """What a malicious checkpoint would run."""

    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD_FOLDER"],)


@pytest.mark.parametrize("load", [lambda path: load_model("aasist", weights=path), load_training_state])
def test_loading_never_runs_code(tmp_path, monkeypatch, load):
    monkeypatch.setenv("PAYLOAD_FOLDER", str(tmp_path / "ran"))
    evil = tmp_path / "evil.pth"
    torch.save({"weight": Payload()}, evil)
    with pytest.raises(CheckpointError):
        load(evil)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError):
        load(plain)
    assert not (tmp_path / "ran").exists()


def test_training_state_round_trip(tmp_path):
    state = {"tensor": torch.arange(3), "nested": {"list": [1, 2.5, "a", None]}}
    save_training_state(tmp_path / "s.pt", state)
    loaded = load_training_state(tmp_path / "s.pt")
    assert torch.equal(loaded["tensor"], state["tensor"]) and loaded["nested"] == state["nested"]
    assert np.isfinite(loaded["tensor"].numpy()).all()
