"""The detector: everything a decision about a recording needs, behind one call.

    detector = Detector.load("aasist")       weights, engine, calibration, thresholds, where they were trained
    verdict = detector("call.m4a")           the whole recording, in words and numbers
    table = detector.score(["calls/"])       one row a recording
    stream = detector.stream(8000)           live audio, the same numbers

A recording is looked at in windows of 4.04 s, a new one every 2.02 s, wherever they hold speech (see `windows`); its
score is the mean over its windows. Without speech there is no verdict: a number would be a wrong answer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from tqdm.auto import tqdm

from deepfake_utils.conventions import BONAFIDE, SAMPLE_RATE_HZ, SPOOF, AudioError, CheckpointError, ConfigError
from deepfake_utils.evaluation.calibration import PRESETS, Use, threshold_for
from deepfake_utils.scoring.engine import pick_engine
from deepfake_utils.scoring.published import PUBLISHED, recognise
from deepfake_utils.scoring.score import SCORING_BATCH, find_audio, score_crops
from deepfake_utils.scoring.speech import FALLBACK, is_by_loudness
from deepfake_utils.scoring.stream import Stream
from deepfake_utils.scoring.weights import read_companion, weights_file
from deepfake_utils.scoring.windows import MIN_SPEECH_S, FirstWindow, Window, WindowCutter
from deepfake_utils.waveforms.decode import iter_audio

SHIPPED = Path(__file__).parents[1] / "assets" / "open.safetensors"
LOG_ODDS = "log-odds of real speech (natural logarithm, at even odds), higher is more real"

ROW_COLUMNS = (
    "path", "verdict", "reason", "score", "log_odds", "probability_fake", "prior_fake", "use", "speech_s", "duration_s",
    "looked_at", "n_windows", "logit_spoof", "logit_bonafide", "warnings",
)  # fmt: skip
UNCALIBRATED = "these weights are not calibrated: their scores have no threshold and no probability, only an order"

# What a detector is used for, by the word given to --use -> how common fakes are there, and what errors cost.
USES = {
    "call-centre": PRESETS["call-centre screening"],
    "moderation": PRESETS["content moderation"],
    "forensic": PRESETS["forensic triage"],
}
NO_USE = Use(0.5, 1, 1, "No use was named: fake and real are taken as equally likely, both errors as equally bad.")


@dataclass(frozen=True)
class Judged:
    """One window of a recording. `log_odds` is None where the weights are not calibrated."""

    start_s: float
    end_s: float
    speech_s: float | None
    logit_spoof: float
    logit_bonafide: float
    log_odds: float | None


@dataclass(frozen=True)
class Verdict:
    """What a detector says of one recording.

    Attributes:
        path: the recording, or None for a waveform or stream.
        verdict: "real", "fake", "uncertain", or "no verdict"; `reason` says why in a sentence.
        score: the mean over the windows of what `score_meaning` says; None without a verdict for want of speech.
        log_odds: the same where it is calibrated, else None.
        probability_fake: that the recording is fake, where a share of `prior_fake` of such recordings is; None where
            the score is not calibrated.
        use: what the verdict is for; it sets the prior, and the threshold (log-odds) from which on a recording
            passes as real.
        speech_s: speech found, in seconds; None where it was not looked for.
        duration_s: the length of the recording, in seconds.
        looked_at: share of the recording that lies in judged windows.
        windows: the judged windows in order; `timeline` is the same as a table.
        warnings: what speaks against believing the verdict.
        engine: what computed it.
    """

    path: str | None
    verdict: str
    reason: str
    score: float | None
    score_meaning: str
    log_odds: float | None
    probability_fake: float | None
    prior_fake: float
    use: str
    threshold: float
    speech_s: float | None
    duration_s: float
    looked_at: float
    windows: tuple[Judged, ...]
    warnings: tuple[str, ...]
    engine: str

    @property
    def timeline(self) -> pd.DataFrame:
        """One row a judged window: start_s, end_s, speech_s, logit_spoof, logit_bonafide, log_odds."""
        return pd.DataFrame([vars(window) for window in self.windows], columns=list(Judged.__dataclass_fields__))

    @property
    def row(self) -> dict:
        """The verdict as one row of `Detector.score`."""
        logits = np.array([(w.logit_spoof, w.logit_bonafide) for w in self.windows]).reshape(-1, 2)
        spoof, bonafide = logits.mean(axis=0).tolist() if len(logits) else (None, None)
        computed = {"n_windows": len(self.windows), "logit_spoof": spoof, "logit_bonafide": bonafide}
        computed["warnings"] = "; ".join(self.warnings)
        return {name: computed[name] if name in computed else getattr(self, name) for name in ROW_COLUMNS}

    def __str__(self) -> str:
        odds = "" if self.probability_fake is None else f", probability of fake {describe_probability(self)}"
        return f"{self.path or 'recording'}: {self.verdict}{odds}. {self.reason}"


def describe_probability(verdict: Verdict) -> str:
    """A probability with the prior it assumes, as in `97 % (if 50 % are fake)`."""
    return f"{_percent(verdict.probability_fake)} (if {_percent(verdict.prior_fake)} are fake)"


def _percent(share: float) -> str:
    """A share in percent, with as many digits as its distance from 0 and 100 needs.

    >>> _percent(0.5), _percent(0.001), _percent(0.99996), _percent(1e-9)
    ('50 %', '0.1 %', '> 99.9 %', '< 0.1 %')
    """
    if share < 0.001:
        return "< 0.1 %"
    if share > 0.999:
        return "> 99.9 %"
    return f"{100 * share:.{0 if 0.0995 < share < 0.9 else 1}f} %"


class Detector:
    """Decides whether recordings are real or machine-made speech; made by `Detector.load`.

    Attributes:
        model: maps (B, 64600) waveforms to a `CMOutput`.
        facts: what is known of the weights: model, calibration, thresholds, where they were trained.
        use, costs: what verdicts are for, one of `USES`, or "no particular use"; and the prior and costs it assumes.
        engine: what computes, and why it was chosen.
        warnings: what speaks against believing any verdict of these weights.
        whole: whether recordings are looked at as a whole.
    """

    def __init__(
        self, model: Callable, facts: dict, *, use: str | Use | None, device: torch.device, engine: str,
        whole: bool = True,
    ):  # fmt: skip
        self.model, self.facts, self.device, self.engine, self.whole = model, facts, device, engine, whole
        self.use, self.costs = _named_use(use)
        self._calibration = facts.get("calibration")
        self.threshold = float(facts.get("thresholds", {}).get(self.use, threshold_for(self.costs)))
        band = facts.get("uncertain_log_odds") if use is None else None
        self._uncertain = band or (self.threshold, self.threshold)
        self.score_meaning = LOG_ODDS if self._calibration else facts["score"]
        self.warnings = _warnings(facts, whole)

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
            weights: None for those shipped with the package; "aasist" or "aasist-l" for published ones, downloaded
                once; or a file: .safetensors, .pth, or a model exported as .onnx.
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

    def verdicts(self, paths: Iterable[Path]) -> Iterator[Verdict | AudioError]:
        """The verdict on each recording, or what keeps it from being read, in order and as soon as it is known."""
        judged: list[Judged] = []

        def pieces() -> Iterator[tuple[object, np.ndarray | None]]:
            for path in paths:
                cutter, notes = self.cutter(), []
                try:
                    for block in iter_audio(path, notes=notes):
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
                    continue
                windows, judged = judged, []
                if isinstance(thing, AudioError):
                    yield thing
                    continue
                path, cutter, notes = thing
                yield self.sum_up(windows, cutter, str(path), notes)

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
            self.threshold, cutter.speech_s, duration_s, cutter.judged_s / duration_s if duration_s else 0.0,
            tuple(windows), (*notes, *self.warnings), self.engine,
        )  # fmt: skip
        if not windows:
            return replace(verdict, reason=_no_speech(cutter.speech_s, duration_s))
        if not all(math.isfinite(w.logit_spoof) and math.isfinite(w.logit_bonafide) for w in windows):
            return replace(verdict, reason="the weights give a score that is not a finite number: check them")
        if not self._calibration:
            score = float(np.mean([w.logit_bonafide for w in windows]))
            return replace(verdict, score=score, reason=f"score {score:+.2f} ({self.score_meaning}); {UNCALIBRATED}")
        return self._decide(verdict, float(np.mean([w.log_odds for w in windows])))

    def _decide(self, verdict: Verdict, log_odds: float) -> Verdict:
        low, high = self._uncertain
        word = "uncertain" if low <= log_odds < high else "real" if log_odds >= high else "fake"
        probability = float(expit(-(log_odds + math.log(1 / self.costs.p_spoof - 1))))
        odds = f"log-odds {log_odds:+.1f}"
        if word == "uncertain":
            reason = f"{odds}, between {low:+.1f} and {high:+.1f}, where errors are frequent"
        else:
            side = "at or above" if word == "real" else "below"
            reason = f"{odds}, {side} {high if word == 'real' else low:+.1f}, the threshold for {self.use}"
        verdict = replace(
            verdict, verdict=word, score=log_odds, log_odds=log_odds, probability_fake=probability, reason=reason
        )
        fakes = stretches(verdict.windows, low)
        if word != "fake" and fakes:
            where = ", ".join(f"{start:.1f} to {end:.1f} s" for start, end in fakes[:5])
            more = f" and {len(fakes) - 5} more" if len(fakes) > 5 else ""
            note = f"parts of it sound fake: {where}{more}"
            verdict = replace(verdict, warnings=(note, *verdict.warnings))
        return verdict


def stretches(windows: Iterable[Judged], below: float) -> list[tuple[float, float]]:
    """(start_s, end_s) of parts of a recording whose windows have log-odds below a bound, joined where they touch."""
    found: list[tuple[float, float]] = []
    for window in windows:
        if window.log_odds is None or window.log_odds >= below:
            continue
        if found and window.start_s <= found[-1][1]:
            found[-1] = (found[-1][0], window.end_s)
        else:
            found.append((window.start_s, window.end_s))
    return found


def verdict_row(path: Path, verdict: Verdict | AudioError) -> dict:
    """One row of `Detector.score`, also for a recording that cannot be read."""
    if isinstance(verdict, Verdict):
        return verdict.row
    return {"path": str(path), "verdict": "unreadable", "reason": str(verdict), "warnings": ""}


def _warnings(facts: dict, whole: bool) -> tuple[str, ...]:
    notes = [facts["caution"]] if "caution" in facts else []
    if "calibration" not in facts:
        notes.append(UNCALIBRATED)
    origin = facts.get("trained_on")
    if isinstance(origin, dict) and origin.get("synthetic_demo"):
        notes.append("these weights were trained on the synthetic demo corpus: they know nothing of real voices")
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
