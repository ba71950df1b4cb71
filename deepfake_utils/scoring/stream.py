"""Live audio through a detector."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch

from deepfake_utils.conventions import AudioError
from deepfake_utils.scoring.score import forward
from deepfake_utils.waveforms.decode import MAX_RATE_HZ, MIN_RATE_HZ, from_int16
from deepfake_utils.waveforms.resample import Resampler


class Stream:
    """Takes chunks of any size, gives each window of speech as it completes; made by `Detector.stream`.

    The windows and numbers are those of the same recording read from a file. Memory does not grow but by what is kept
    of each judged window (48 bytes every 2 s); the first answer comes when 4.04 s have arrived and hold speech.

    Attributes:
        windows: those judged so far.
    """

    def __init__(self, detector, sample_rate_hz: int):
        self.windows = []
        self._detector, self._cutter = detector, detector.cutter()
        self._resampler = Resampler(_checked_rate(sample_rate_hz))

    def push(self, samples: np.ndarray) -> list:
        """Samples (n,) or (n, channels), float in [-1, 1] or int16 -> the windows they complete, judged."""
        return self._take(self._resampler.push(_mono(samples)))

    def finish(self) -> list:
        """The end: the window that ends with the recording, where the others leave some of it out."""
        return self._take(self._resampler.finish()) + self._judged(self._cutter.finish())

    @property
    def verdict(self):
        """The verdict on what has arrived so far."""
        return self._detector.sum_up(self.windows, self._cutter, None)

    def _take(self, samples: np.ndarray) -> list:
        return self._judged(self._cutter.push(np.clip(samples, -1.0, 1.0).astype(np.float32)))

    def _judged(self, windows) -> list:
        found = []
        for window in windows:
            output = forward(self._detector.model, torch.from_numpy(window.waveform)[None], self._detector.device)
            found.append(self._detector.judge(window, output.logits[0].double().numpy()))
        self.windows += found
        return found


class Timed(NamedTuple):
    """What live audio took: seconds of each push, of sound until the first judged window (None: none), over all."""

    push_s: np.ndarray
    first_s: float | None
    real_time_factor: float
    windows: list


def time_stream(detector, samples: np.ndarray, sample_rate_hz: int, chunk_s: float = 0.02) -> Timed:
    """Push a recording through a fresh stream in chunks, as fast as they are taken, and time each.

    Args:
        samples: (n,), as `Stream.push` takes them.
        chunk_s: length of a chunk; 20 ms is what telephony sends.
    """
    stream, size, push_s, first_s = detector.stream(sample_rate_hz), round(chunk_s * sample_rate_hz), [], None
    for start in range(0, len(samples), size):
        begun = time.perf_counter()
        judged = stream.push(samples[start : start + size])
        push_s.append(time.perf_counter() - begun)
        if judged and first_s is None:
            first_s = (start + size) / sample_rate_hz
    stream.finish()
    return Timed(np.array(push_s), first_s, sum(push_s) / max(len(samples) / sample_rate_hz, 1e-9), stream.windows)


def _checked_rate(rate_hz: int) -> int:
    if rate_hz != int(rate_hz) or not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(f"sample_rate_hz is {rate_hz}: expected a whole number from {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    return int(rate_hz)


def _mono(samples) -> np.ndarray:
    samples = np.asarray(samples)
    if samples.dtype == np.int16:
        samples = from_int16(samples)
    if not np.issubdtype(samples.dtype, np.floating) or samples.ndim not in (1, 2):
        raise AudioError(
            f"samples of type {samples.dtype} and shape {samples.shape}: expected float in [-1, 1] or int16, "
            "(n,) or (n, channels)"
        )
    if not np.isfinite(samples).all():
        raise AudioError("the samples hold NaN or infinite values")
    return samples if samples.ndim == 1 else samples.mean(axis=1)
