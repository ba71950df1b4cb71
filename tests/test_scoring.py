"""Scoring: order, lengths, contracts, and recordings that cannot be read."""

import time
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch import nn

from deepfake_utils import load_model, score_files, score_protocol
from deepfake_utils.conventions import AudioError, ScoreError
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.scoring.score import made_ahead
from deepfake_utils.waveforms import open_source


class MeanLevel(nn.Module):
    """A countermeasure whose logits can be worked out by hand: minus and plus the mean of the samples."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.seen = []

    def forward(self, waveform):
        self.seen.append(tuple(waveform.shape))
        mean = waveform.mean(dim=1) * self.scale
        return CMOutput(torch.stack([-mean, mean], dim=1), mean[:, None])


@pytest.fixture
def recordings(tmp_path):
    """Constant levels 0.1 ... 0.5, lengths 0.25 s to 5 s, as 16-bit FLAC."""
    paths = []
    for n, length_s in enumerate((0.25, 1, 4.0375, 4.04, 5), start=1):
        path = tmp_path / f"r{n}.flac"
        soundfile.write(path, np.full(round(length_s * 16000), n / 10), 16000)
        paths.append(path)
    return paths


def test_files_are_scored_in_order_at_the_evaluation_length(recordings):
    model = MeanLevel().train()
    scores = score_files(recordings, model, batch_size=2, device="cpu", progress=None)
    assert scores["path"].tolist() == [str(p) for p in recordings]
    assert scores["score"].to_numpy() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=1e-4)
    assert scores["logit_spoof"].to_numpy() == pytest.approx(-scores["logit_bonafide"].to_numpy())
    assert scores["duration_s"].tolist() == pytest.approx([0.25, 1, 4.0375, 4.04, 5])
    assert {shape[1] for shape in model.seen} == {64_600}


def test_an_unreadable_recording_is_reported_and_the_others_are_scored(recordings, tmp_path):
    broken = tmp_path / "r0_broken.flac"
    broken.write_bytes(b"fLaC but no more")
    scores = score_files(tmp_path, MeanLevel(), device="cpu", progress=None)
    assert len(scores) == 5 and list(scores.attrs["unreadable"]) == [str(broken)]
    assert "r0_broken.flac" in scores.attrs["unreadable"][str(broken)]


def test_nothing_readable_gives_an_empty_table_not_a_crash(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    scores = score_files(tmp_path, MeanLevel(), device="cpu", progress=None)
    assert len(scores) == 0 and list(scores.columns)[:2] == ["path", "score"]


def test_missing_paths_and_folders_without_audio_are_errors(tmp_path):
    with pytest.raises(AudioError, match="nowhere.wav does not exist"):
        score_files(tmp_path / "nowhere.wav", MeanLevel())
    with pytest.raises(AudioError, match="no audio file in"):
        score_files(tmp_path, MeanLevel())


def test_files_and_protocols_hear_the_same_numbers(tmp_path):
    """A quiet 24-bit recording at 48 kHz: rounding it to 16 bits would move the score."""
    rng, paths = np.random.default_rng(0), []
    for n in range(3):
        paths.append(tmp_path / f"q{n}.wav")
        soundfile.write(paths[-1], rng.normal(3e-5, 1e-5, 96_000), 48_000, subtype="PCM_24")
    model = MeanLevel()
    files = score_files(paths, model, device="cpu", progress=None)["score"]
    protocol = score_protocol(model, protocol_of(paths), device="cpu", progress=None)["score"]
    assert files.tolist() == protocol.tolist() and files.between(2.9e-5, 3.1e-5).all()


def test_files_protocols_opened_waveforms_detector_and_stream_give_the_same_numbers(recordings):
    model, protocol = MeanLevel(), protocol_of(recordings)
    found = {
        "files": score_files(recordings, model, device="cpu", progress=None)["score"],
        "protocol": score_protocol(model, protocol, device="cpu", progress=None)["score"],
        "opened": score_protocol(model, protocol, source=open_source(protocol, "cache"), device="cpu", progress=None)[
            "score"
        ],
    }
    facts = {"score": "logit of bona fide"}
    detector = Detector(model, facts, use=None, device=torch.device("cpu"), engine="by hand", whole=False)
    found["detector"] = detector.score(recordings, progress=None)["logit_bonafide"]
    found["stream"] = [detector(soundfile.read(path)[0], 16_000).windows[0].logit_bonafide for path in recordings]
    for way, scores in found.items():
        assert list(scores) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=1e-4), way
        assert list(scores) == pytest.approx(list(found["files"]), abs=1e-6), way


def test_a_long_recording_takes_no_more_memory_than_its_beginning(tmp_path):
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 16_000, 1, "PCM_16") as sound:
        for _ in range(15):
            sound.write(np.full(60 * 16_000, 0.25))
    tracemalloc.start()
    try:
        table = score_files(path, MeanLevel(), device="cpu", progress=None)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert table["duration_s"].tolist() == [900] and table["score"].tolist() == [0.25]
    assert peak_bytes < 20 * 2**20, "the whole would be 58 MB"


def test_an_unreadable_trial_is_named(recordings, tmp_path):
    recordings[2].write_bytes(b"not audio")
    with pytest.raises(AudioError, match="utterance r3: .*r3.flac"):
        score_protocol(MeanLevel(), protocol_of(recordings), device="cpu", progress=None)


def test_weights_that_were_never_trained_are_warned_of(recordings, monkeypatch):
    model = load_model("lfcc-lcnn")
    with pytest.warns(UserWarning, match="untrained weights: its scores mean nothing"):
        score_files(recordings[:1], model, device="cpu", progress=None)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_protocol(model, protocol_of(recordings)[:1], device="cpu", progress=None)


def test_scoring_draws_no_random_numbers(recordings):
    before = torch.get_rng_state()
    score_files(recordings, MeanLevel(), device="cpu", progress=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_items_are_made_ahead_in_order_and_an_error_is_raised_at_its_place():
    made = []

    def items():
        for n in range(10):
            made.append(n)
            yield n
        raise AudioError("the eleventh")

    ahead = made_ahead(items(), depth=4)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert made == [0, 1, 2, 3, 4], "the next four are there, and no more"
    assert [next(ahead) for _ in range(9)] == list(range(1, 10))
    with pytest.raises(AudioError, match="eleventh"):
        next(ahead)


def protocol_of(recordings):
    names = {"utterance": [p.stem for p in recordings], "path": [str(p) for p in recordings]}
    return pd.DataFrame(
        names
        | {
            "label": [n % 2 for n in range(len(recordings))],
            "attack": "-",
            "speaker": "s",
            "split": "eval",
            "corpus": "levels",
        }
    )


def test_protocol_and_files_give_the_same_scores_and_the_mode_is_restored(recordings):
    model = MeanLevel().train()
    protocol = protocol_of(recordings)
    scores = score_protocol(model, protocol, batch_size=3, device="cpu", progress=None)
    assert model.training
    assert scores["utterance"].tolist() == protocol["utterance"].tolist()
    files = score_files(recordings, model, device="cpu", progress=None)
    assert model.training
    assert scores["score"].to_numpy() == pytest.approx(files["score"].to_numpy(), abs=1e-6)


def test_a_non_finite_score_is_refused_with_the_utterance(recordings):
    model = MeanLevel()
    model.scale.data.fill_(float("nan"))
    with pytest.raises(ScoreError, match="5 of 5 scores are not finite, first r1"):
        score_protocol(model, protocol_of(recordings), device="cpu", progress=None)
