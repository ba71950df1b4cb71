"""Shortcuts: numbers that a detector could use instead of listening to speech."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from deepfake_utils.conventions import SAMPLE_RATE_HZ
from deepfake_utils.evaluation import intervals, metrics
from deepfake_utils.waveforms.decode import from_int16
from deepfake_utils.waveforms.trimmed import speech_span

BANDWIDTH_DB = 60.0  # below the strongest frequency: the band ends where nothing is stronger than that
NUMBER_NAMES = {
    "duration_s": "duration",
    "leading_silence_s": "leading silence",
    "trailing_silence_s": "trailing silence",
    "level_db": "level",
    "bandwidth_hz": "bandwidth",
}
_SPECTRUM_SAMPLES = 1024
_SMALLEST_POWER = 1e-20


def recording_numbers(clip: np.ndarray) -> dict[str, float]:
    """Return what can be said about an int16 clip (n,) without listening to what is spoken.

    duration_s, leading_silence_s and trailing_silence_s (see speech_span), level_db (mean power in dB below full
    scale), bandwidth_hz (the highest frequency within 60 dB of the strongest, in the mean spectrum).

    >>> tone = (8000 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)).astype(np.int16)
    >>> numbers = recording_numbers(np.concatenate([np.zeros(8000, np.int16), tone]))
    >>> numbers["duration_s"], numbers["leading_silence_s"], round(numbers["level_db"])
    (1.5, 0.5, -17)
    """
    waveform = from_int16(clip).astype(np.float64)
    start, stop = speech_span(waveform)
    return {
        "duration_s": len(waveform) / SAMPLE_RATE_HZ,
        "leading_silence_s": start / SAMPLE_RATE_HZ,
        "trailing_silence_s": (len(waveform) - stop) / SAMPLE_RATE_HZ,
        "level_db": float(10 * np.log10(np.square(waveform).mean() + _SMALLEST_POWER)),
        "bandwidth_hz": _bandwidth_hz(waveform),
    }


def _bandwidth_hz(waveform: np.ndarray) -> float:
    padded = np.pad(waveform, (0, max(0, _SPECTRUM_SAMPLES - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _SPECTRUM_SAMPLES)[:: _SPECTRUM_SAMPLES // 2]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(_SPECTRUM_SAMPLES)))).mean(axis=0)
    within = np.flatnonzero(power > power.max() * 10 ** (-BANDWIDTH_DB / 10))
    return float(within[-1] * SAMPLE_RATE_HZ / _SPECTRUM_SAMPLES) if within.size else 0.0


def measure(source) -> pd.DataFrame:
    """Return recording_numbers of every clip of a source, one row each, with the column utterance."""
    clips = tqdm(range(len(source)), desc="measuring", unit="utt", delay=1.0, leave=False)
    rows = [recording_numbers(source.clip(i)) for i in clips]
    table = pd.DataFrame(rows)
    table.insert(0, "utterance", np.asarray(source.utterances, dtype=str))
    return table


def shortcut_errors(
    dev: pd.DataFrame,
    dev_labels: ArrayLike,
    numbers: pd.DataFrame,
    labels: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the EER of each number alone, and of all together by logistic regression.

    What a high value stands for, and the regression, are learned on dev; an EER above 50 % says that the shortcut
    points the other way in eval.

    Args:
        dev, numbers: columns as of `measure` (dev and eval trials); dev_labels, labels: (n,) of their rows.
        clusters: (n,) speakers of the eval trials for the bootstrap.

    Returns:
        rule, bona_fide_if ("high" or "low" on dev; "" for the regression), eer, low, high.
    """
    dev_labels, labels = np.asarray(dev_labels), np.asarray(labels)
    names = list(NUMBER_NAMES)
    scores = {}
    for name in names:
        sign = 1.0 if metrics.auc(dev[name], dev_labels) >= 0.5 else -1.0
        scores[NUMBER_NAMES[name]] = ("high" if sign > 0 else "low", sign * numbers[name].to_numpy())
    regression = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    regression.fit(dev[names].to_numpy(), dev_labels)
    scores["all five together"] = ("", regression.decision_function(numbers[names].to_numpy()))
    rows = []
    for name, (side, values) in scores.items():
        interval = intervals.interval_or_none(intervals.eer_metric, values, labels, clusters, n_bootstrap, seed)
        eer = metrics.compute_eer(values, labels).eer
        low, high = (interval.low, interval.high) if interval else (np.nan, np.nan)
        rows.append({"rule": name, "bona_fide_if": side, "eer": eer, "low": low, "high": high})
    return pd.DataFrame(rows)
