"""The detector: everything a decision about a recording needs, behind one call.

    detector = Detector.load("aasist")       weights, engine, calibration, thresholds, where they were trained
    verdict = detector("call.m4a")           the whole recording, in words and numbers
    table = detector.score(["calls/"])       one row a recording
    stream = detector.stream(8000)           live audio, the same numbers

A recording is looked at in windows of 4.04 s, a new one every 2.02 s, wherever they hold speech (see `windows`); its
score is pooled over its windows, and the stretches of it that sound fake are marked (see `pooling`). Without speech
there is no verdict: a number would be a wrong answer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from tqdm.auto import tqdm

from deepfake_utils.conventions import BONAFIDE, SAMPLE_RATE_HZ, SPOOF, AudioError, CheckpointError, ConfigError
from deepfake_utils.evaluation.calibration import PRESETS, Use, threshold_for
from deepfake_utils.scoring.engine import pick_engine
from deepfake_utils.scoring.pooling import MEAN, pool, stretches
from deepfake_utils.scoring.published import PUBLISHED, recognise
from deepfake_utils.scoring.score import SCORING_BATCH, find_audio, score_crops
from deepfake_utils.scoring.speech import FALLBACK, is_by_loudness
from deepfake_utils.scoring.stream import Stream
from deepfake_utils.scoring.verdict import Judged, Verdict, verdict_row
from deepfake_utils.scoring.weights import ASSETS, read_companion, weights_file
from deepfake_utils.scoring.windows import MIN_SPEECH_S, FirstWindow, Window, WindowCutter
from deepfake_utils.waveforms.decode import iter_audio

SHIPPED = ASSETS / "open.safetensors"
LOG_ODDS = "log-odds of real speech (natural logarithm, at even odds), higher is more real"

UNCALIBRATED = "these weights are not calibrated: their scores have no threshold and no probability, only an order"

HARDLY_BETTER = 0.95  # of the cost of deciding without listening: from here on it is said

# What a detector is used for, by the word given to --use -> how common fakes are there, and what errors cost.
USES = {
    "call-centre": PRESETS["call-centre screening"],
    "moderation": PRESETS["content moderation"],
    "forensic": PRESETS["forensic triage"],
}
NO_USE = Use(0.5, 1, 1, "No use was named: fake and real are taken as equally likely, both errors as equally bad.")


class Detector:
    """Decides whether recordings are real or machine-made speech; made by `Detector.load`.

    Attributes:
        model: maps (B, 64600) waveforms to a `CMOutput`.
        facts: what is known of the weights: model, calibration, thresholds, where they were trained.
        use, costs: what verdicts are for, one of `USES`, or "no particular use"; and the prior and costs it assumes.
        engine: what computes, and why it was chosen; it may change with the first batch, see `CheckedOnnx`.
        warnings: what speaks against believing any verdict of these weights.
        whole: whether recordings are looked at as a whole.
        threshold, uncertain: log-odds from which on a recording passes as real, and (low, high) between which the
            verdict is "uncertain".
    """

    def __init__(
        self, model: Callable, facts: dict, *, use: str | Use | None, device: torch.device, engine: str,
        whole: bool = True,
    ):  # fmt: skip
        self.model, self.facts, self.device, self.whole, self._engine = model, facts, device, whole, engine
        self.use, self.costs = _named_use(use)
        self._calibration = facts.get("calibration")
        self.threshold = float(facts.get("thresholds", {}).get(self.use, threshold_for(self.costs)))
        bands = facts.get("uncertain", {})  # of each use; the one without is spelt out
        band = facts.get("uncertain_log_odds") if use is None else bands.get(self.use)
        self.uncertain = tuple(band or (self.threshold, self.threshold))
        self._pooling, self._marks = facts.get("pooling", MEAN), {"below": self.uncertain[0]} | facts.get("marks", {})
        self.score_meaning = LOG_ODDS if self._calibration else facts["score"]
        self.warnings = _warnings(facts, whole, self.use)

    @property
    def engine(self) -> str:
        """What computes; of an engine that gave way to another, the one at work."""
        return getattr(self.model, "engine", self._engine)

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike | None = None,
        *,
        model: str | None = None,
        use: str | Use | None = None,
        device: str = "auto",
        whole: bool = True,
    ) -> Detector:
        """Load weights with all that a verdict needs.

        Args:
            weights: None for those shipped with the package, "laptop", "phone" or "tiny" for the same made smaller;
                "aasist" or "aasist-l" for published ones, downloaded once; or a file: .safetensors, .pth, or a model
                exported as .onnx.
            model: the architecture, where neither a JSON beside the weights nor the tensors themselves tell.
            use: "call-centre", "moderation", "forensic", or a `Use` of your own: how common fakes are and what the
                errors cost. None takes fake and real as equally likely and both errors as equally bad.
            device: "auto", "cpu", "cuda" or "cuda:N".
            whole: look at the whole of every recording. False takes its first 64,600 samples (4.04 s), silence
                included, which is what the corpora's protocols ask for and published error rates are of.

        Raises:
            CheckpointError: the weights cannot be had or read.
            ConfigError: unknown use or device.

        >>> detector = Detector.load("aasist", use="forensic")  # doctest: +SKIP
        >>> print(detector("call.m4a"))  # doctest: +SKIP
        """
        _named_use(use)  # before anything that takes long
        if weights is None and not SHIPPED.is_file():
            raise CheckpointError(
                f"no weights are shipped with this version: name some (--weights on the command line), published "
                f"ones ({', '.join(PUBLISHED)}) or a file (.safetensors, .pth, .onnx)"
            )
        path = weights_file(SHIPPED if weights is None else weights)
        facts = {"weights": "shipped" if weights is None else str(weights), **read_companion(path)}
        facts["weights_bytes"] = path.stat().st_size
        if published := recognise(path):
            facts |= {"trained_on": published.trained_on, "caution": published.caution}
        computes, torch_device, engine, described = pick_engine(path, model, device)
        return cls(computes, described | facts, use=use, device=torch_device, engine=engine, whole=whole)

    @property
    def is_calibrated(self) -> bool:
        """Whether scores are log-odds, with a probability and a verdict."""
        return self._calibration is not None

    def __call__(self, recording: str | os.PathLike | np.ndarray, sample_rate_hz: int | None = None) -> Verdict:
        """Look at the whole of one recording.

        Args:
            recording: a file of any format, or a waveform: (n,) or (n, channels), float in [-1, 1] or int16.
            sample_rate_hz: of a waveform.

        Raises:
            AudioError: the recording cannot be read, or is no waveform.
        """
        if isinstance(recording, (str, os.PathLike)):
            [verdict] = self.verdicts([Path(recording)])
            if isinstance(verdict, AudioError):
                raise verdict
            return verdict
        is_list = isinstance(recording, list | tuple)
        names = is_list and any(isinstance(item, (str, os.PathLike)) for item in recording)
        if names or not (is_list or hasattr(recording, "__array__")):
            raise AudioError(
                f"{type(recording).__name__} is no recording: expected a path or a waveform; several paths go to "
                "detector.score([...])"
            )
        if sample_rate_hz is None:
            raise AudioError("a waveform needs its sample_rate_hz, such as detector(waveform, 16000)")
        stream = self.stream(sample_rate_hz)
        stream.push(recording)
        stream.finish()
        return stream.verdict

    def score(
        self, paths: str | os.PathLike | Iterable[str | os.PathLike], progress: str | None = "scoring"
    ) -> pd.DataFrame:
        """Look at recordings of any format and number; one row each, in the order found, whatever becomes of it.

        Args:
            paths: audio files and folders (searched through for audio files).
            progress: label of the progress bar, None for no bar.

        Returns:
            path, verdict, reason, score, log_odds, probability_fake, prior_fake, use, speech_s, duration_s, looked_at,
            n_windows, logit_spoof, logit_bonafide, warnings. Of an unreadable recording the verdict is "unreadable"
            and the reason what is wrong with it.

        Raises:
            AudioError: a path does not exist, or no audio file is found at all.
        """
        files = find_audio(paths)
        with closing(self.verdicts(files)) as verdicts:
            bar = tqdm(verdicts, progress, len(files), unit="file", disable=progress is None, leave=False)
            rows = [verdict_row(path, verdict) for path, verdict in zip(files, bar, strict=True)]
        return pd.DataFrame(rows)

    def verdicts(
        self, recordings: Iterable[Path | np.ndarray], heard: Callable[[float], None] = lambda until_s: None
    ) -> Iterator[Verdict | AudioError]:
        """The verdict on each recording, or what keeps it from being read, in order and as soon as it is known.

        Args:
            recordings: files, or waveforms (n,) float32 at 16 kHz in [-1, 1]; made ahead of the model by a thread.
            heard: is told after each window, in seconds of its recording, up to where it was judged.
        """
        judged: list[Judged] = []

        def pieces() -> Iterator[tuple[object, np.ndarray | None]]:
            for recording in recordings:
                cutter, notes = self.cutter(), []
                path = None if isinstance(recording, np.ndarray) else str(recording)
                try:
                    for block in [recording] if path is None else iter_audio(recording, notes=notes):
                        yield from ((window, window.waveform) for window in cutter.push(block))
                    yield from ((window, window.waveform) for window in cutter.finish())
                except AudioError as error:
                    yield error, None
                else:
                    yield (path, cutter, notes), None

        with closing(score_crops(self.model, pieces(), batch_size=SCORING_BATCH, device=self.device)) as scored:
            for thing, logits in scored:
                if logits is not None:
                    judged.append(self.judge(thing, logits))
                    heard(thing.end_s)
                    continue
                windows, judged = judged, []
                if isinstance(thing, AudioError):
                    yield thing
                    continue
                path, cutter, notes = thing
                yield self.sum_up(windows, cutter, path, notes)

    def stream(self, sample_rate_hz: int) -> Stream:
        """Live audio: push chunks of any size, get the windows they complete; see `Stream`.

        >>> stream = detector.stream(8000)  # doctest: +SKIP
        >>> for window in stream.push(chunk): print(window.end_s, window.log_odds)  # doctest: +SKIP
        """
        return Stream(self, sample_rate_hz)

    def cutter(self) -> WindowCutter | FirstWindow:
        """What cuts the next recording into the windows to be judged."""
        return WindowCutter() if self.whole else FirstWindow()

    def judge(self, window: Window, logits: np.ndarray) -> Judged:
        """One window with its logits (2,)."""
        spoof, bonafide = float(logits[SPOOF]), float(logits[BONAFIDE])
        scale = self._calibration
        log_odds = scale["slope"] * (bonafide - spoof) + scale["offset"] if scale else None
        return Judged(window.start_s, window.end_s, window.speech_s, spoof, bonafide, log_odds)

    def sum_up(
        self,
        windows: list[Judged],
        cutter: WindowCutter | FirstWindow,
        path: str | None,
        notes: Iterable[str] = (),
    ) -> Verdict:
        """The verdict on a recording from its judged windows; notes are what its decoder had to say."""
        duration_s = cutter.n_samples / SAMPLE_RATE_HZ
        verdict = Verdict(
            path, "no verdict", "", None, self.score_meaning, None, None, self.costs.p_spoof, self.use,
            self.threshold, cutter.speech_s, duration_s, min(1.0, cutter.judged_s / duration_s) if duration_s else 0.0,
            tuple(windows), (*notes, *self.warnings), self.engine,
        )  # fmt: skip
        if not windows:
            return replace(verdict, reason=_no_speech(cutter.speech_s, duration_s))
        if not all(math.isfinite(w.logit_spoof) and math.isfinite(w.logit_bonafide) for w in windows):
            return replace(verdict, reason="the weights give a score that is not a finite number: check them")
        if not self._calibration:
            score = pool([w.logit_bonafide for w in windows])
            return replace(verdict, score=score, reason=f"score {score:+.2f} ({self.score_meaning}); {UNCALIBRATED}")
        scale = {"slope": 1.0, "offset": 0.0} | self._pooling
        pooled = pool([w.log_odds for w in windows], self._pooling)
        return self._decide(verdict, scale["slope"] * pooled + scale["offset"])

    def _decide(self, verdict: Verdict, log_odds: float) -> Verdict:
        low, high = self.uncertain
        word = "uncertain" if low <= log_odds < high else "real" if log_odds >= high else "fake"
        probability = float(expit(-(log_odds + math.log(1 / self.costs.p_spoof - 1))))
        odds = f"log-odds {log_odds:+.1f}"
        if word == "uncertain":
            reason = f"{odds}, between {low:+.1f} and {high:+.1f}, where errors are frequent"
        else:
            side = "at or above" if word == "real" else "below"
            edge = "the edge of the uncertain band" if low < high else "the threshold"
            reason = f"{odds}, {side} {high if word == 'real' else low:+.1f}, {edge} for {self.use}"
        verdict = replace(
            verdict, verdict=word, score=log_odds, log_odds=log_odds, probability_fake=probability, reason=reason
        )
        fakes = tuple(stretches(verdict.windows, **self._marks))
        verdict = replace(verdict, fake_stretches=fakes)
        if word != "fake" and fakes:
            where = ", ".join(f"{start:.1f} to {end:.1f} s" for start, end in fakes[:5])
            more = f" and {len(fakes) - 5} more" if len(fakes) > 5 else ""
            note = f"parts of it sound fake: {where}{more}"
            verdict = replace(verdict, warnings=(note, *verdict.warnings))
        return verdict


def _warnings(facts: dict, whole: bool, use: str) -> tuple[str, ...]:
    notes = [facts["caution"]] if "caution" in facts else []
    if "calibration" not in facts:
        notes.append(UNCALIBRATED)
    origin = facts.get("trained_on")
    if isinstance(origin, dict) and origin.get("synthetic_demo"):
        notes.append("these weights were trained on the synthetic demo corpus: they know nothing of real voices")
    judged = facts.get("decisions", {}).get("uses", {}).get("eval", {}).get(use)
    if judged and judged["cost"] > HARDLY_BETTER * judged["blind"]:
        notes.append(
            f"for {use} these weights are hardly better than deciding unheard: expected cost {judged['cost']:.3g} a "
            f"recording on unseen sources, {judged['blind']:.3g} without listening"
        )
    if whole and is_by_loudness():
        notes.append(FALLBACK)
    return tuple(notes)


def _named_use(use: str | Use | None) -> tuple[str, Use]:
    if use is None:
        return "no particular use", NO_USE
    if isinstance(use, Use):
        return "a use of your own", use
    if use not in USES:
        raise ConfigError(f"unknown use {use!r}: expected one of {', '.join(USES)}, or a Use of your own")
    return use, USES[use]


def _no_speech(speech_s: float, duration_s: float) -> str:
    if duration_s < MIN_SPEECH_S:
        return f"the recording lasts {duration_s:.2f} s; a verdict needs {MIN_SPEECH_S:g} s of speech"
    if speech_s == 0:
        return "no speech was found in it: silence, noise, or music without voices"
    return f"{speech_s:.1f} s of speech were found, nowhere {MIN_SPEECH_S:g} s of it within 4 s, which a verdict needs"
