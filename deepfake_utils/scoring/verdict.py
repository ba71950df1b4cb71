"""What a detector says of a recording: the verdict, its windows, and the same as a row of a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from deepfake_utils.conventions import AudioError

ROW_COLUMNS = (
    "path", "verdict", "reason", "score", "log_odds", "probability_fake", "prior_fake", "use", "speech_s", "duration_s",
    "looked_at", "n_windows", "logit_spoof", "logit_bonafide", "warnings",
)  # fmt: skip


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
        score: what `score_meaning` says, pooled over the windows; None without a verdict for want of speech.
        log_odds: the same where it is calibrated, else None.
        probability_fake: that the recording is fake, where a share of `prior_fake` of such recordings is; None where
            the score is not calibrated.
        use: what the verdict is for; it sets the prior, and the threshold (log-odds) from which on a recording
            passes as real.
        speech_s: speech found, in seconds; None where it was not looked for.
        duration_s: the length of the recording, in seconds.
        looked_at: share of the recording that lies in judged windows.
        windows: the judged windows in order; `timeline` is the same as a table.
        fake_stretches: (start_s, end_s) of the parts that sound fake, whatever the whole sounds like.
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
    fake_stretches: tuple[tuple[float, float], ...] = ()

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


def verdict_row(path: Path, verdict: Verdict | AudioError) -> dict:
    """One row of `Detector.score`, also for a recording that cannot be read."""
    if isinstance(verdict, Verdict):
        return verdict.row
    return {"path": str(path), "verdict": "unreadable", "reason": str(verdict), "warnings": ""}
