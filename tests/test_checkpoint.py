"""Weights on disk: published files, our own, damaged ones, and what must never happen when loading."""

import hashlib
import json
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
from deepfake_utils.scoring import published
from deepfake_utils.scoring.weights import is_untrained, save_weights, scoring_model
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


@torch.no_grad()
def logits(model, waveform):
    return model(waveform).logits


@pytest.fixture(scope="module")
def tiny():
    """A small model, and the waveforms and logits to know it by."""
    model = build_model("aasist-l", generator=torch.Generator().manual_seed(1), **TINY).eval()
    waveform = 0.1 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    return model, waveform, logits(model, waveform)


WRAPPED = {
    "plain": lambda state: state,
    "data parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled, then parallel": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "parallel, then compiled": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    "lightning": lambda state: {"epoch": 3, "state_dict": {f"model.{k}": v for k, v in state.items()}},
    "with its optimizer": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"lr": 1e-4}},
    "under model": lambda state: {"model": state, "epoch": 1},
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_tensors_are_found_in_the_usual_wrappers(tmp_path, tiny, wrap):
    model, waveform, expected = tiny
    content = wrap(model.state_dict())
    torch.save(content, tmp_path / "w.pth")
    assert torch.equal(logits(load_model("aasist-l", weights=tmp_path / "w.pth", **TINY), waveform), expected)
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        safetensors.torch.save_file(content, tmp_path / "w.safetensors")
        loaded = load_model("aasist-l", weights=tmp_path / "w.safetensors", **TINY)
        assert torch.equal(logits(loaded, waveform), expected)


def test_weights_of_a_loss_survive_data_parallel_names(tmp_path, tiny):
    model, waveform, _ = tiny
    scorer = scoring_model(model, build_loss("p2sgrad", 20, generator=torch.Generator().manual_seed(2)))
    path = save_weights(tmp_path / "w.safetensors", scorer, name="aasist-l", loss="p2sgrad")
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({f"module.{k}": v for k, v in state.items()}, path)
    assert torch.equal(logits(load_model(weights=path), waveform), logits(scorer, waveform))
    assert "cosine" in json.loads(path.with_suffix(".json").read_text())["score"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_precision_files_score_as_float32_does(reference_data, tmp_path, dtype):
    state = torch.load(reference_data / "published_weights" / "AASIST-L.pth", "cpu", weights_only=True)
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.pth")
    rounded = {k: v.to(dtype).float() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(rounded, tmp_path / "rounded.pth")
    waveform = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(logits(load_model(weights=tmp_path / f"{name}.pth"), waveform) for name in ("w", "rounded")))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "web page"),
    ],
)
def test_what_is_plainly_no_weights_file_is_called_what_it_is(tmp_path, suffix, content, said):
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        load_model("aasist", weights=tmp_path / f"w{suffix}")


def test_an_intact_file_with_other_things_in_it_is_not_called_damaged(tmp_path):
    torch.save({"epoch": 3, "scores": [1.0, 2.0]}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="readable but holds no model's tensors, only a dictionary.*'epoch'"):
        load_model("aasist", weights=tmp_path / "other.pth")
    torch.save(build_model("aasist-l", **TINY), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"pickled \S*AASIST.*model.state_dict\(\)"):
        load_model("aasist-l", weights=tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="are a folder"):
        load_model("aasist-l", weights=tmp_path)


def test_loading_weights_leaves_the_random_numbers_alone(tmp_path, tiny):
    scorer = scoring_model(tiny[0], build_loss("oc_softmax", 20, generator=torch.Generator().manual_seed(2)))
    named = save_weights(tmp_path / "w.safetensors", scorer, name="aasist-l", loss="oc_softmax")
    torch.save(build_model("lfcc-lcnn", generator=torch.Generator().manual_seed(0)).state_dict(), tmp_path / "w.pth")
    before = torch.get_rng_state()
    load_model(weights=named)
    load_model(weights=tmp_path / "w.pth")
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_weights_are_known_until_they_are_trained():
    model = load_model("aasist-l", **TINY)
    assert is_untrained(model)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    assert not is_untrained(model)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, no datasets attached, and no network."""

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("DEEPFAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DEEPFAKE_KAGGLE_INPUT", str(tmp_path / "input"))
    monkeypatch.setattr(published.urllib.request, "urlopen", refuse)
    return tmp_path


def test_published_weights_are_taken_from_the_cache_or_an_attached_dataset_if_they_are_the_right_ones(
    cache, reference_data
):
    source = (reference_data / "published_weights" / "AASIST-L.pth").read_bytes()
    attached = cache / "input" / "datasets" / "someone" / "aasist" / "AASIST-L.pth"
    attached.parent.mkdir(parents=True)
    attached.write_bytes(source[:-1] + b"?")
    with pytest.raises(CheckpointError, match="unreachable.*raw.githubusercontent.*AASIST-L.pth.*SHA-256 814331d0"):
        load_model(weights="aasist-l")
    attached.write_bytes(source)
    assert published.published_file("aasist-l") == attached
    kept = cache / "cache" / "AASIST-L.pth"
    kept.parent.mkdir()
    kept.write_bytes(source)
    assert published.published_file("aasist-l") == kept
    assert sum(p.numel() for p in load_model(weights="aasist-l").parameters()) == 85306


def test_downloads_are_checked_and_kept(cache, monkeypatch):
    content, fetched = b"weights", []

    def answer(address, timeout):
        import io

        fetched.append(address)
        return io.BytesIO(content)

    monkeypatch.setattr(published.urllib.request, "urlopen", answer)
    with pytest.raises(CheckpointError, match=f"gave another file.*{hashlib.sha256(content).hexdigest()}"):
        published.published_file("aasist")
    expected = published.PUBLISHED["aasist"]._replace(sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(published.PUBLISHED, "aasist", expected)
    for _ in range(2):
        assert published.published_file("aasist").read_bytes() == content
    assert len(fetched) == 2, "once refused, once fetched, then kept"


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
