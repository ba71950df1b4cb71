"""The detector: what it looks at, when it says nothing, and that live audio and files give the same numbers."""

import contextlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfake_utils.conventions import AudioError, CheckpointError, ConfigError
from deepfake_utils.evaluation.calibration import Use
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.scoring import speech
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.scoring.pooling import stretches
from deepfake_utils.scoring.stream import time_stream
from deepfake_utils.scoring.windows import HOP_SAMPLES, WindowCutter

CALIBRATED = {
    "score": "logit",
    "calibration": {"slope": 100.0, "offset": 1.0},
    "uncertain_log_odds": [-2.0, 2.0],
    "thresholds": {"moderation": -3.0},
}


def level_model(waveform: torch.Tensor) -> CMOutput:
    """Logits that can be worked out by hand: 0, and the mean of the samples."""
    mean = waveform.mean(dim=1)
    return CMOutput(torch.stack([torch.zeros_like(mean), mean], dim=1), mean[:, None])


def detector(facts=CALIBRATED, use=None) -> Detector:
    return Detector(level_model, facts, use=use, device=torch.device("cpu"), engine="by hand")


@pytest.fixture
def loud_is_speech(monkeypatch):
    """Speech is what is loud, so that tests can place it to the sample."""
    monkeypatch.setattr(speech, "_load_silero", lambda: None)


def level(seconds: float, value: float = 0.1) -> np.ndarray:
    return np.full(round(seconds * 16_000), value, np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * 16_000), np.float32)


@pytest.mark.parametrize(
    "n_samples, expected",
    [
        (20_000, [(0, 20_000)]),
        (64_600, [(0, 64_600)]),
        (64_600 + 3_999, [(0, 64_600)]),  # a rest under a quarter of a second gets no window of its own
        (64_600 + 4_000, [(0, 64_600), (4_000, 68_600)]),
        (64_600 + HOP_SAMPLES, [(0, 64_600), (HOP_SAMPLES, 64_600 + HOP_SAMPLES)]),
        (200_000, [(0, 64_600), (32_300, 96_900), (64_600, 129_200), (96_900, 161_500), (129_200, 193_800),
                   (135_400, 200_000)]),
    ],
)  # fmt: skip
def test_windows_cover_the_whole_recording(loud_is_speech, n_samples, expected):
    cutter = WindowCutter()
    ramp = np.linspace(0.1, 0.2, n_samples, dtype=np.float32)
    windows = [*cutter.push(ramp), *cutter.finish()]
    assert [(round(w.start_s * 16_000), round(w.end_s * 16_000)) for w in windows] == expected
    for window, (start, stop) in zip(windows, expected, strict=True):
        assert np.array_equal(window.waveform, np.resize(ramp[start:stop], 64_600))
    assert cutter.judged_s == pytest.approx(expected[-1][1] / 16_000)
    assert cutter.speech_s == pytest.approx(n_samples / 16_000, abs=0.033)


def test_only_windows_with_a_second_of_speech_are_judged(loud_is_speech):
    recording = np.concatenate([silence(8), level(1.5), silence(8), level(0.5), silence(4)])
    verdict = detector()(recording, 16_000)
    assert all(window.start_s <= 8.5 and window.end_s >= 9 for window in verdict.windows)
    assert verdict.speech_s == pytest.approx(2.0, abs=0.1)
    assert verdict.looked_at == pytest.approx(
        (verdict.windows[-1].end_s - verdict.windows[0].start_s) / verdict.duration_s
    )


@pytest.mark.parametrize(
    "recording, said",
    [
        (silence(10), "no speech was found"),
        (level(0.3), "lasts 0.30 s"),
        (np.concatenate([silence(5), level(0.6), silence(5)]), "0.6 s of speech were found"),
        (np.concatenate([*[level(0.5), silence(5)] * 4]), "nowhere 1 s of it within 4 s"),
    ],
)
def test_without_speech_there_is_no_verdict_and_no_number(loud_is_speech, recording, said):
    verdict = detector()(recording, 16_000)
    assert (verdict.verdict, verdict.score, verdict.log_odds, verdict.probability_fake) == ("no verdict", *[None] * 3)
    assert said in verdict.reason and said in str(verdict)


def test_the_score_is_the_mean_of_calibrated_log_odds_and_the_probability_follows_from_the_prior(loud_is_speech):
    recording = np.concatenate([level(4.0375, 0.05), level(4.0375, 0.01)])  # log-odds 6 and 2, between them 4
    verdict = detector()(recording, 16_000)
    assert [w.log_odds for w in verdict.windows] == pytest.approx([6, 4, 2], abs=1e-4)
    assert verdict.score == verdict.log_odds == pytest.approx(4, abs=1e-4)
    assert verdict.probability_fake == pytest.approx(1 / (1 + math.exp(4)), abs=1e-5)
    rare = detector(use=Use(0.01, 1, 1))(recording, 16_000)
    assert rare.probability_fake == pytest.approx(1 / (1 + 99 * math.exp(4)), abs=1e-6)
    assert rare.prior_fake == 0.01 and "a use of your own" in rare.reason
    assert verdict.timeline.columns.tolist()[:3] == ["start_s", "end_s", "speech_s"] and len(verdict.timeline) == 3


@pytest.mark.parametrize(
    "log_odds, use, word",
    [
        (2.5, None, "real"), (1.5, None, "uncertain"), (-1.5, None, "uncertain"), (-2.5, None, "fake"),
        (-2.5, "moderation", "real"), (-3.5, "moderation", "fake"),  # the threshold that the weights bring
        (2.9, "forensic", "fake"), (3.1, "forensic", "real"),  # log 20, from the use's prior and costs
        (-2.2, "call-centre", "real"), (-2.4, "call-centre", "fake"),  # log(0.1 / 0.999)
    ],
)  # fmt: skip
def test_verdicts_follow_the_threshold_of_their_use(loud_is_speech, log_odds, use, word):
    verdict = detector(use=use)(level(2, (log_odds - 1) / 100), 16_000)
    assert verdict.log_odds == pytest.approx(log_odds, abs=1e-4)
    assert verdict.verdict == word and (use or "no particular use") in (verdict.use, verdict.reason)


def test_what_is_judged_is_told_as_it_is_heard(loud_is_speech):
    heard = []
    verdicts = detector().verdicts([level(10.0), silence(10.0), level(5.0)], heard.append)
    ends = [[window.end_s for window in verdict.windows] for verdict in verdicts]
    assert ends[1] == [] and heard == ends[0] + ends[2] and heard[-1] == 5.0


def test_a_fake_stretch_in_a_real_recording_is_named(loud_is_speech):
    recording = np.concatenate([level(40, 0.05), level(8, -0.05), level(40, 0.05)])
    verdict = detector()(recording, 16_000)
    assert verdict.verdict == "real"
    [(start, end)] = stretches(verdict.windows, -2.0)
    assert 38 < start < 42 and 46 < end < 50
    assert f"parts of it sound fake: {start:.1f} to {end:.1f} s" in verdict.warnings[0]


def test_the_weights_say_how_windows_are_pooled_and_what_is_marked(loud_is_speech):
    recording = np.concatenate([level(4.0375, 0.05), level(4.0375, 0.01)])  # log-odds 6, 4 and 2
    facts = CALIBRATED | {"pooling": {"name": "quantile", "share": 0.5, "slope": 2.0, "offset": -1.0}}
    facts |= {"marks": {"below": 5.0, "rule": "all"}}
    verdict = detector(facts)(recording, 16_000)
    assert verdict.log_odds == pytest.approx(7.0, abs=1e-4)
    [(start, end)] = verdict.fake_stretches
    assert (start, end) == pytest.approx((4.0375, 8.075), abs=0.01)  # what only windows below 5 cover
    assert "parts of it sound fake" in verdict.warnings[0]


def test_uncalibrated_weights_give_a_logit_and_neither_probability_nor_verdict(loud_is_speech):
    verdict = detector({"score": "logit of bona fide"})(level(3), 16_000)
    assert verdict.score == pytest.approx(0.1)
    assert (verdict.verdict, verdict.log_odds, verdict.probability_fake) == ("no verdict", None, None)
    assert "not calibrated" in verdict.reason and verdict.score_meaning == "logit of bona fide"


def test_weights_that_give_no_number_give_no_verdict(loud_is_speech):
    broken = detector()
    broken.model = lambda waveform: CMOutput(*(value * math.nan for value in level_model(waveform)))
    verdict = broken(level(3), 16_000)
    assert verdict.verdict == "no verdict" and verdict.score is None and "finite" in verdict.reason


def test_loudness_instead_of_speech_is_said(loud_is_speech):
    assert any("loudness alone" in warning for warning in detector()(level(3), 16_000).warnings)


def test_weights_from_the_demo_are_warned_of(loud_is_speech):
    facts = CALIBRATED | {"trained_on": {"corpora": ["demo"], "synthetic_demo": True}}
    assert any("synthetic demo" in warning for warning in detector(facts)(level(3), 16_000).warnings)
    assert not any("synthetic demo" in warning for warning in detector()(level(3), 16_000).warnings)


def test_recordings_come_back_one_row_each_in_order_whatever_becomes_of_them(loud_is_speech, tmp_path):
    for name, samples in {"a.wav": level(9), "c.wav": silence(2), "d.wav": level(2)}.items():
        soundfile.write(tmp_path / name, samples, 16_000)
    (tmp_path / "b.wav").write_bytes(b"not audio")
    table = detector().score(tmp_path, progress=None)
    assert [path[-5:] for path in table["path"]] == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert table["verdict"].tolist() == ["real", "unreadable", "no verdict", "real"]
    assert "b.wav" in table["reason"][1]
    assert table["log_odds"].isna().tolist() == [False, True, True, False]
    alone = detector()(tmp_path / "a.wav")
    assert alone.log_odds == pytest.approx(table["log_odds"][0], abs=1e-9) and alone.path == str(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="b.wav"):
        detector()(tmp_path / "b.wav")


RECORDING = np.concatenate([
    silence(1.3), level(3, 0.05), silence(5), level(2.7, -0.02), silence(0.4), level(4, 0.3), silence(2)
])  # fmt: skip


def mu_law(samples: np.ndarray) -> np.ndarray:
    """int16 after 8-bit companding (ITU-T G.711's curve), as telephones pass it."""
    steps = np.round(np.sign(samples) * np.log1p(255 * np.abs(samples)) / np.log(256) * 127) / 127
    return np.round(np.sign(steps) * (256 ** np.abs(steps) - 1) / 255 * 32767).astype(np.int16)


def test_a_stream_is_timed_and_gives_what_it_gives(loud_is_speech):
    timed = time_stream(detector(), RECORDING.astype(np.float32), 16_000)
    whole = detector()(RECORDING.astype(np.float32), 16_000)
    assert [w.log_odds for w in timed.windows] == pytest.approx([w.log_odds for w in whole.windows], abs=1e-4)
    assert len(timed.push_s) == math.ceil(len(RECORDING) / 320) and timed.first_s == pytest.approx(4.04, abs=0.02)
    assert time_stream(detector(), silence(5), 16_000).first_s is None


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60_000), min_size=1, max_size=12),
    rate_hz=st.sampled_from([8_000, 16_000, 44_100, 48_000]),
    kind=st.sampled_from(["float64", "float32", "telephone"]),
)
def test_live_audio_in_chunks_of_any_size_gives_the_windows_of_the_whole(sizes, rate_hz, kind):
    patch = pytest.MonkeyPatch()
    patch.setattr(speech, "_load_silero", lambda: None)
    try:
        n_samples = len(RECORDING) * rate_hz // 16_000
        recording = np.interp(np.arange(n_samples) / rate_hz, np.arange(len(RECORDING)) / 16_000, RECORDING)
        recording = mu_law(recording) if kind == "telephone" else recording.astype(kind)
        whole = detector()(recording, rate_hz)
        stream, found, start = detector().stream(rate_hz), [], 0
        while start < n_samples:
            size = sizes[len(found) % len(sizes)] if len(sizes) > 1 else max(sizes[0], 500)
            found += stream.push(recording[start : start + max(size, 200)])
            start += max(size, 200)
        found += stream.finish()
    finally:
        patch.undo()
    assert [(w.start_s, w.end_s, w.speech_s) for w in found] == [
        (w.start_s, w.end_s, w.speech_s) for w in whole.windows
    ]
    assert [w.log_odds for w in found] == pytest.approx([w.log_odds for w in whole.windows], abs=1e-4)
    assert stream.verdict.log_odds == pytest.approx(whole.log_odds, abs=1e-4)


@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_channels_that_cancel_are_told_in_a_stream_as_in_a_file(loud_is_speech, tmp_path, rate_hz):
    """Like channels for 1.5 s, then of opposite polarity, in chunks of 70 ms."""
    left = np.full(int(9.3 * rate_hz), 0.2)
    right = np.where(np.arange(len(left)) < 1.5 * rate_hz, left, -1.1 * left)
    soundfile.write(tmp_path / "both.wav", np.stack([left, right], axis=1), rate_hz, subtype="FLOAT")
    file, stream, windows = detector()(tmp_path / "both.wav"), detector().stream(rate_hz), []
    recording = np.stack([left, right], axis=1).astype(np.float32)
    for start in range(0, len(recording), int(0.07 * rate_hz)):
        windows += stream.push(recording[start : start + int(0.07 * rate_hz)])
    windows += stream.finish()
    assert [(w.start_s, w.end_s, w.speech_s) for w in windows] == [
        (w.start_s, w.end_s, w.speech_s) for w in file.windows
    ]
    assert len(windows) == 4  # their means in float32, of one or of several windows at a time
    assert [w.logit_bonafide for w in windows] == pytest.approx([w.logit_bonafide for w in file.windows], abs=1e-6)
    assert any("cancel each other (opposite polarity): from 2 s on channel 2" in note for note in file.warnings)
    assert stream.verdict.warnings == file.warnings


def test_a_stream_ends_once(loud_is_speech):
    stream = detector().stream(8_000)
    stream.push(RECORDING[: 11 * 8_000])
    n_found, verdict = len(stream.finish()), stream.verdict
    assert n_found > 0 and stream.finish() == [] and stream.verdict == verdict
    with pytest.raises(AudioError, match="has ended"):
        stream.push(RECORDING[:8_000])


@pytest.mark.parametrize("n_samples", [64_599, 64_601, 2**18, 2**18 + 1, 2**18 + 64_600])
def test_speech_found_does_not_depend_on_the_chunks_to_the_last_bit(loud_is_speech, n_samples):
    rng, recording = np.random.default_rng(n_samples), np.resize(RECORDING, n_samples).astype(np.float32)
    whole, stream = detector()(recording, 16_000), detector().stream(16_000)
    while len(recording):
        n = int(rng.choice([0, 1, 511, 512, 513, 32_300, 99_999]))
        stream.push(recording[:n])
        recording = recording[n:]
    stream.finish()
    found = stream.verdict
    assert (found.speech_s, found.looked_at, found.duration_s) == (whole.speech_s, whole.looked_at, whole.duration_s)
    assert [w.speech_s for w in found.windows] == [w.speech_s for w in whole.windows]


def test_a_stream_keeps_a_window_and_no_more(loud_is_speech):
    stream = detector().stream(16_000)
    for _ in range(100):
        stream.push(level(1))
    kept = stream._cutter._kept.nbytes + 8 * len(stream._cutter._speech_ends)
    assert kept < 4 * (64_600 + HOP_SAMPLES) + 8 * 200


def test_chunks_in_int16_and_stereo_are_taken_and_others_refused(loud_is_speech):
    floats = detector()(level(3, 0.25), 16_000)
    whole = detector()(np.full(48_000, 8_192, np.int16), 16_000)
    stereo = detector()(np.stack([level(3, 0.2), level(3, 0.3)], axis=1), 16_000)
    assert whole.log_odds == floats.log_odds and stereo.log_odds == pytest.approx(floats.log_odds, abs=1e-4)
    for bad in (np.zeros(5, np.int64), np.zeros((2, 2, 2)), np.array([np.nan]), np.zeros((2, 48_000)), np.zeros((9, 0)),
                np.full(5, 12_000.0)):  # fmt: skip
        with pytest.raises(AudioError):
            detector().stream(16_000).push(bad)
    with pytest.raises(AudioError, match="sample_rate_hz"):
        detector()(level(1))
    with pytest.raises(AudioError, match="sample_rate_hz is 100"):
        detector().stream(100)


def test_real_speech_is_found_and_scored_as_the_published_code_scores_it(reference_data, model_cache):
    golden = pd.read_csv(reference_data / "published_weights" / "golden_logits.csv").set_index("utterance")
    folder = reference_data / "asvspoof2019_subset" / "LA" / "ASVspoof2019_LA_train" / "flac"
    short = [path for path in sorted(folder.glob("*.flac")) if path.stem in golden.index]
    short = [path for path in short if soundfile.info(path).frames <= 64_600][:3]
    loaded = Detector.load(reference_data / "published_weights" / "AASIST-L.pth")
    assert "ONNX Runtime" in loaded.engine
    exported = set(model_cache.glob("*.onnx"))
    table = loaded.score(short, progress=None)
    expected = [golden.loc[path.stem, "AASIST-L_logit_bonafide"] for path in short]
    assert table["score"].tolist() == pytest.approx(expected, abs=1e-3)
    assert (table["speech_s"] > 0.5).all()
    again = Detector.load(reference_data / "published_weights" / "AASIST-L.pth")
    assert again.engine == loaded.engine and set(model_cache.glob("*.onnx")) == exported, "exported once"


def test_loading_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("deepfake_utils.scoring.detector.SHIPPED", tmp_path / "open.safetensors")
    with pytest.raises(CheckpointError, match="no weights are shipped.*aasist"):
        Detector.load()
    with pytest.raises(ConfigError, match="unknown use 'court': expected one of call-centre"):
        Detector.load("aasist", use="court")
    with pytest.raises(CheckpointError, match="nowhere.pth do not exist"):
        Detector.load(tmp_path / "nowhere.pth")


def test_an_engine_with_other_numbers_is_replaced_by_pytorch():
    from deepfake_utils.scoring.engine import CheckedOnnx

    def wrong(waveform):
        return CMOutput(*(value + 1 for value in level_model(waveform)))

    checked = CheckedOnnx(wrong, level_model)
    waveform = torch.full((2, 100), 0.5)
    with pytest.warns(UserWarning, match="PyTorch scores"):
        assert torch.equal(checked(waveform).logits, level_model(waveform).logits)
    assert torch.equal(checked(waveform).logits, level_model(waveform).logits)
    assert checked.engine.startswith("PyTorch on the CPU")


def test_two_threads_may_bring_the_first_batch():
    from deepfake_utils.scoring.engine import CheckedOnnx

    both = threading.Barrier(2)

    def wrong(waveform):
        return CMOutput(*(value + 1 for value in level_model(waveform)))

    def slow(waveform):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # so that the second call comes while the first is compared
        return level_model(waveform)

    checked, waveform = CheckedOnnx(wrong, slow), torch.full((2, 100), 0.5)
    with pytest.warns(UserWarning, match="PyTorch scores"), ThreadPoolExecutor(2) as pool:
        for output in pool.map(checked, [waveform, waveform]):
            assert torch.equal(output.logits, level_model(waveform).logits)


def test_calibration_beside_weights_is_used(tmp_path):
    from deepfake_utils import load_model
    from deepfake_utils.scoring.weights import save_weights

    facts = {key: CALIBRATED[key] for key in ("calibration", "uncertain_log_odds")}
    path = save_weights(tmp_path / "w.safetensors", load_model("lfcc-lcnn"), name="lfcc-lcnn", facts=facts)
    loaded = Detector.load(path)
    assert "log-odds" in loaded.score_meaning and json.loads(path.with_suffix(".json").read_text())["calibration"]


@pytest.mark.parametrize("thing", [["a.wav", "b.wav"], b"RIFF", None, 3, {}])
def test_what_is_no_recording_is_told_so(thing):
    with pytest.raises(AudioError, match=r"is no recording: expected a path or a waveform; .*detector.score"):
        detector()(thing)
    with pytest.raises(AudioError, match="sample_rate_hz is '16000': expected a whole number"):
        detector()(np.zeros(8000), "16000")
