"""Calibrating weights on a corpus: what is fitted, that nothing of eval takes part, and that a detector takes it."""

import json
import sys
from dataclasses import replace
from itertools import cycle

import numpy as np
import pandas as pd
import pytest
import soundfile

from deepfake_utils.augment import codecs
from deepfake_utils.conventions import BONAFIDE, SPOOF, CheckpointError
from deepfake_utils.scoring import calibrate as calibration
from deepfake_utils.scoring.detector import USES, Detector
from deepfake_utils.scoring.pooling import TRIED, describe
from tests.test_detector import CALIBRATED, detector, loud_is_speech  # noqa: F401  a fixture
from tests.test_splices import protocol  # noqa: F401  a fixture

SMALL = {"n_hosts": 2, "host_s": 10.0, "inserts_s": (4.0,)}


@pytest.fixture
def decided(loud_is_speech, protocol):  # noqa: F811
    return calibration.decide(detector(), protocol, protocol, **SMALL)


def test_all_that_a_detector_needs_is_fitted_and_finds_what_can_be_told_apart(decided):
    facts, judged, spliced = decided
    assert set(facts["thresholds"]) == set(facts["uncertain"]) == set(USES)
    assert describe(facts["pooling"]) in map(describe, TRIED) and facts["calibration"]["slope"] > 0
    fitted = detector(CALIBRATED | facts)
    assert fitted(np.full(64_600, 0.1), 16_000).log_odds > 0 > fitted(np.full(64_600, -0.1), 16_000).log_odds
    for use, row in facts["decisions"]["uses"]["eval"].items():
        assert (row["real_rejected"], row["fake_accepted"], row["cost"]) == (0, 0, 0), use
    rows = facts["decisions"]["splices"]["eval"]
    assert rows[-1]["insert_s"] == "all" and rows[-1]["eer"] == 0 and rows[-1]["fake_found"] > 0.5
    assert rows[-1]["real_marked"] <= calibration.REAL_MARKED
    assert facts["marks"]["below"] <= facts["uncertain_log_odds"][0]
    assert calibration.fit_marks(spliced["dev"], -1000.0)["below"] == -1000
    assert len(judged["dev"]) == 12 and len(spliced["dev"]) == 6
    assert facts["decisions"]["verdicts"]["eval"]["real"]["called_fake"] == 0
    assert "call-centre" in calibration.summary(facts) and "eval no use: real" in calibration.summary(facts)


def test_verdicts_without_a_use_are_counted_by_label_and_source(loud_is_speech, protocol):  # noqa: F811
    judged = calibration.judge_protocol(detector(), protocol)
    levels = {BONAFIDE: [2.0, 0.5, -2.0], SPOOF: [-2.0]}  # called real, uncertain, called fake
    given = {label: cycle(values) for label, values in levels.items()}
    rows = [
        (row | {"source": "one"}, (replace(windows[0], log_odds=next(given[row["label"]])),)) for row, windows in judged
    ]
    facts = {"pooling": {"name": "mean", "slope": 1.0, "offset": 0.0}, "uncertain_log_odds": [0.0, 1.0]}
    found = calibration.judge_verdicts(rows, facts)
    assert found["real"] == pytest.approx(
        dict.fromkeys(("called_real", "uncertain", "called_fake", "worst_source"), 1 / 3)
    )
    assert found["fake"] == pytest.approx({"called_real": 0, "uncertain": 0, "called_fake": 1, "worst_source": 0})
    few = [(row | {"source": str(number)}, windows) for number, (row, windows) in enumerate(rows)]
    assert calibration.judge_verdicts(few, facts)["real"]["worst_source"] is None


def test_real_recordings_lie_above_the_band_on_the_channel_that_lowers_them_most(loud_is_speech, protocol):  # noqa: F811
    judged = calibration.judge_protocol(detector(), protocol)
    judged = [
        (row, (replace(windows[0], log_odds=level + 4 * (row["label"] == BONAFIDE)),))
        for (row, windows), level in zip(judged, cycle([-3.0, 0.0, 1.0]), strict=False)
    ]
    real = [(row, windows) for row, windows in judged if row["label"] == BONAFIDE]
    moved = {by: [(row, (replace(w[0], log_odds=w[0].log_odds + by),)) for row, w in real] for by in (-1, -2, 1)}
    alone = calibration.fit_recordings(judged, {"name": "mean"})
    fitted = calibration.fit_recordings(judged, {"name": "mean"}, moved.values())
    slope = fitted["pooling"]["slope"]
    assert fitted["uncertain_log_odds"][0] == pytest.approx(alone["uncertain_log_odds"][0] - 2 * slope)
    assert fitted["uncertain_log_odds"][1] == alone["uncertain_log_odds"][1]
    assert fitted["pooling"] == alone["pooling"]
    assert fitted["thresholds"]["call-centre"] < alone["thresholds"]["call-centre"]  # real speech lies lower


def test_real_recordings_are_heard_by_messenger_where_it_can_be_encoded(loud_is_speech, monkeypatch, tmp_path):  # noqa: F811
    rng, labels = np.random.default_rng(0), [BONAFIDE, SPOOF, BONAFIDE]
    paths = [tmp_path / f"{number}.flac" for number in range(len(labels))]
    for path in paths:
        soundfile.write(path, 0.1 * rng.standard_normal(64_600), 16_000)
    heard = pd.DataFrame({"utterance": ["a", "b", "c"], "path": [*map(str, paths)], "label": labels, "source": "one"})
    shipped, scale = Detector.load(), {"slope": 1.0, "offset": 0.0}
    received = calibration.judge_received(shipped, heard[heard["label"] == BONAFIDE], scale)[calibration.BY_MESSENGER]
    as_they_are = [(row, w) for row, w in calibration.judge_protocol(shipped, heard) if row["label"] == BONAFIDE]
    assert [row["utterance"] for row, _ in received] == [row["utterance"] for row, _ in as_they_are] == ["a", "c"]
    for (_, (window, *_)), (_, (before, *_)) in zip(received, as_they_are, strict=True):
        assert abs(window.logit_bonafide - before.logit_bonafide) > 1e-4
        assert window.log_odds == window.logit_bonafide - window.logit_spoof
    monkeypatch.setitem(codecs.CODECS, "opus", codecs.CODECS["opus"]._replace(encoder="not-built-in"))
    assert calibration.judge_received(shipped, heard, scale) == {}
    monkeypatch.setitem(sys.modules, "av", None)
    assert calibration.judge_received(shipped, heard, scale) == {}


def test_eval_takes_no_part_in_what_is_fitted(loud_is_speech, protocol):  # noqa: F811
    turned = protocol.assign(label=1 - protocol["label"], attack=np.where(protocol["label"], "A09", "-"))
    fitted = [calibration.decide(detector(), protocol, other, **SMALL)[0] for other in (protocol, turned, None)]
    for name in ("calibration", "pooling", "thresholds", "uncertain", "uncertain_log_odds", "marks"):
        assert fitted[0][name] == fitted[1][name] == fitted[2][name], name


def test_a_source_gives_no_more_than_was_asked_for_and_changes_are_made(loud_is_speech, protocol):  # noqa: F811
    judged = calibration.judge_protocol(detector(), protocol, most=1, change=lambda samples, number: -samples)
    assert pd.DataFrame([row for row, _ in judged])["source"].value_counts().max() == 1
    assert all((windows[0].logit_bonafide > 0) == (row["label"] == 0) for row, windows in judged)


def test_the_json_beside_weights_keeps_what_it_held(loud_is_speech, protocol, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(CheckpointError, match="w.json"):
        calibration.calibrate(tmp_path / "w.safetensors", protocol)
    (tmp_path / "w.json").write_text(json.dumps({"model": "level", "trained_on": "by hand", "thresholds": {"x": 1}}))
    monkeypatch.setattr(Detector, "load", lambda path: detector())
    said = []
    facts = calibration.calibrate(tmp_path / "w.safetensors", protocol, n_hosts=0, say=said.append)
    written = json.loads((tmp_path / "w.json").read_text())
    assert written["trained_on"] == "by hand" and written["thresholds"] == facts["thresholds"] and said
    assert "marks" not in written and written["pooling"]["name"] == "mean"


def test_weights_that_are_no_use_for_a_use_say_so():
    poor = {"decisions": {"uses": {"eval": {"forensic": {"cost": 0.5, "blind": 0.5}}}}}
    assert any("hardly better than deciding unheard" in w for w in detector(CALIBRATED | poor, "forensic").warnings)
    assert not any("hardly better" in w for w in detector(CALIBRATED | poor, "moderation").warnings)
