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
from deepfake_utils.waveforms.trimmed import FRAME_SAMPLES, speech_span

BANDWIDTH_DB = 60.0  # below the strongest frequency: the band ends where nothing is stronger than that
NUMBER_NAMES = {
    "duration_s": "duration",
    "leading_silence_s": "leading silence",
    "trailing_silence_s": "trailing silence",
    "level_db": "level",
    "bandwidth_hz": "bandwidth",
    "tilt_db_per_octave": "spectral tilt",
    "top_band_db": "what is above 7 kHz",
    "noise_floor_db": "noise floor",
    "dc_db": "constant offset",
}
TILT_HZ = (125.0, 6000.0)  # between these the tilt is fitted
TOP_BAND_HZ = 7000.0  # a lower sampling rate, once passed through, leaves little above
_SPECTRUM_SAMPLES = 1024
_SMALLEST_POWER = 1e-20


def recording_numbers(clip: np.ndarray) -> dict[str, float]:
    """Return what can be said about an int16 clip (n,) without listening to what is spoken.

    duration_s, leading_silence_s and trailing_silence_s (see speech_span), level_db (mean power in dB below full
    scale), bandwidth_hz (the highest frequency within 60 dB of the strongest, in the mean spectrum), tilt_db_per_octave
    (slope of that spectrum from 125 Hz to 6 kHz), top_band_db (power above 7 kHz, below the whole), noise_floor_db (the
    quietest tenth of the 10 ms frames, below full scale), dc_db (the mean sample, below full scale).

    >>> tone = (8000 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)).astype(np.int16)
    >>> numbers = recording_numbers(np.concatenate([np.zeros(8000, np.int16), tone]))
    >>> numbers["duration_s"], numbers["leading_silence_s"], round(numbers["level_db"])
    (1.5, 0.5, -17)
    """
    waveform = from_int16(clip).astype(np.float64)
    start, stop = speech_span(waveform)
    frequency_hz, power = mean_spectrum(waveform)
    frames = waveform[: len(waveform) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    quiet = np.quantile(np.square(frames).mean(axis=1), 0.1) if len(frames) else np.square(waveform).mean()
    return {
        "duration_s": len(waveform) / SAMPLE_RATE_HZ,
        "leading_silence_s": start / SAMPLE_RATE_HZ,
        "trailing_silence_s": (len(waveform) - stop) / SAMPLE_RATE_HZ,
        "level_db": decibels(np.square(waveform).mean()),
        "bandwidth_hz": bandwidth_hz(frequency_hz, power),
        "tilt_db_per_octave": _tilt(frequency_hz, power),
        "top_band_db": decibels(power[frequency_hz > TOP_BAND_HZ].sum()) - decibels(power.sum()),
        "noise_floor_db": decibels(quiet),
        "dc_db": decibels(waveform.mean() ** 2),
    }


def decibels(power: float) -> float:
    """A power in decibels below that of full scale; -200 for none at all."""
    return float(10 * np.log10(power + _SMALLEST_POWER))


def mean_spectrum(waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in Hz and the mean power there, of a waveform (n,) at 16 kHz."""
    padded = np.pad(waveform, (0, max(0, _SPECTRUM_SAMPLES - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _SPECTRUM_SAMPLES)[:: _SPECTRUM_SAMPLES // 2]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(_SPECTRUM_SAMPLES)))).mean(axis=0)
    return np.fft.rfftfreq(_SPECTRUM_SAMPLES, 1 / SAMPLE_RATE_HZ), power


def bandwidth_hz(frequency_hz: np.ndarray, power: np.ndarray) -> float:
    """The highest frequency within 60 dB of the strongest; 0 of silence."""
    within = np.flatnonzero(power > power.max() * 10 ** (-BANDWIDTH_DB / 10))
    return float(frequency_hz[within[-1]]) if within.size else 0.0


def _tilt(frequency_hz: np.ndarray, power: np.ndarray) -> float:
    between = (frequency_hz >= TILT_HZ[0]) & (frequency_hz <= TILT_HZ[1])
    decibels = 10 * np.log10(power[between] + _SMALLEST_POWER)
    return float(np.polyfit(np.log2(frequency_hz[between]), decibels, 1)[0])


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
    scores["all together"] = ("", regression.decision_function(numbers[names].to_numpy()))
    rows = []
    for name, (side, values) in scores.items():
        interval = intervals.interval_or_none(intervals.eer_metric, values, labels, clusters, n_bootstrap, seed)
        eer = metrics.compute_eer(values, labels).eer
        low, high = (interval.low, interval.high) if interval else (np.nan, np.nan)
        rows.append({"rule": name, "bona_fide_if": side, "eer": eer, "low": low, "high": high})
    return pd.DataFrame(rows)
