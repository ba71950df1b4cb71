"""Live audio through a detector."""

from __future__ import annotations

import numbers
import time
from typing import NamedTuple

import numpy as np
import torch

from deepfake_utils.conventions import AudioError
from deepfake_utils.scoring.score import forward
from deepfake_utils.waveforms.decode import MAX_RATE_HZ, MIN_RATE_HZ, from_int16
from deepfake_utils.waveforms.mixing import Mixer
from deepfake_utils.waveforms.resample import Resampler

MAX_CHANNELS = 64  # more are samples: (channels, n)


class Stream:
    """Takes chunks of any size, gives each window of speech as it completes; made by `Detector.stream`.

    The windows and numbers are those of the same recording read from a file. Memory does not grow but by what is kept
    of each judged window (48 bytes every 2 s). The first answer comes when 4.04 s have arrived and hold speech; of
    several channels when 5 s have, because whether they cancel each other is decided second by second.

    Attributes:
        windows: those judged so far.
        embedding: (D,), what the model's last layer sees of them on average; None without a window, or where a model
            does not tell.
    """

    def __init__(self, detector, sample_rate_hz: int):
        self.windows, self.embedding = [], None
        self._detector, self._cutter = detector, detector.cutter()
        self._rate_hz = _checked_rate(sample_rate_hz)
        self._notes: list[str] = []
        self._mixer = Mixer("the waveform", self._notes.append)
        self._resampler = Resampler(self._rate_hz)
        self._has_ended = False

    def push(self, samples: np.ndarray) -> list:
        """Samples (n,) or (n, channels), float in [-1, 1] or int16 -> the windows they complete, judged."""
        if self._has_ended:
            raise AudioError(
                "the stream has ended (finish): more sound needs a stream of its own, detector.stream(...)"
            )
        return self._take(self._mixer.push(_checked(samples), self._rate_hz))

    def finish(self) -> list:
        """The end, once: the window that ends with the recording, where the others leave some of it out."""
        if self._has_ended:
            return []
        self._has_ended = True
        found = self._take(self._mixer.finish())
        return found + self._cut(self._resampler.finish()) + self._judged(self._cutter.finish())

    @property
    def verdict(self):
        """The verdict on what has arrived so far."""
        return self._detector.sum_up(self.windows, self._cutter, None, self._notes)

    def _take(self, mixed) -> list:
        return [window for mono, _ in mixed for window in self._cut(self._resampler.push(mono))]

    def _cut(self, samples: np.ndarray) -> list:
        return self._judged(self._cutter.push(np.clip(samples, -1.0, 1.0).astype(np.float32)))

    def _judged(self, windows) -> list:
        found = []
        for window in windows:
            output = forward(self._detector.model, torch.from_numpy(window.waveform)[None], self._detector.device)
            found.append(self._detector.judge(window, output.logits[0].double().numpy()))
            self.windows.append(found[-1])
            self._average(output.embedding[0].double().numpy())
        return found

    def _average(self, embedding: np.ndarray) -> None:
        if embedding.size:
            before = 0.0 if self.embedding is None else self.embedding
            self.embedding = before + (embedding - before) / len(self.windows)


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
    is_number = isinstance(rate_hz, numbers.Real)
    if not is_number or not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ or rate_hz != int(rate_hz):
        raise AudioError(f"sample_rate_hz is {rate_hz!r}: expected a whole number from {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    return int(rate_hz)


def _checked(samples) -> np.ndarray:
    """Samples (n, channels) float."""
    samples = np.asarray(samples)
    if samples.dtype == np.int16:
        samples = from_int16(samples)
    if not np.issubdtype(samples.dtype, np.floating) or samples.ndim not in (1, 2):
        raise AudioError(
            f"samples of type {samples.dtype} and shape {samples.shape}: expected float in [-1, 1] or int16, "
            "(n,) or (n, channels)"
        )
    if samples.ndim == 2 and not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise AudioError(
            f"samples of shape {samples.shape} would be {samples.shape[1]} channels: expected (n, channels), 1 to "
            f"{MAX_CHANNELS} of them; transpose samples that are (channels, n)"
        )
    return samples[:, None] if samples.ndim == 1 else samples
