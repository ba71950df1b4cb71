"""Live audio through a detector."""

from __future__ import annotations

import numpy as np
import torch

from deepfake_utils.conventions import AudioError
from deepfake_utils.scoring.score import forward
from deepfake_utils.scoring.windows import WindowCutter
from deepfake_utils.waveforms import decode as audio


class Stream:
    """Takes chunks of any size, gives each window of speech as it completes; made by `Detector.stream`.

    The windows and numbers are those of the same recording read from a file. Memory does not grow but by what is kept
    of each judged window (48 bytes every 2 s); the first answer comes when 4.04 s have arrived and hold speech.

    Attributes:
        windows: those judged so far.
    """

    def __init__(self, detector, sample_rate_hz: int):
        self.windows = []
        self._detector, self._rate_hz = detector, sample_rate_hz
        self._cutter = WindowCutter()

    def push(self, samples: np.ndarray) -> list:
        """Samples (n,) or (n, channels), float in [-1, 1] or int16 -> the windows they complete, judged."""
        return self._judged(self._cutter.push(audio.resample(_mono(samples), self._rate_hz).astype(np.float32)))

    def finish(self) -> list:
        """The end: the window that ends with the recording, where the others leave some of it out."""
        return self._judged(self._cutter.finish())

    @property
    def verdict(self):
        """The verdict on what has arrived so far."""
        return self._detector.sum_up(self.windows, self._cutter, None)

    def _judged(self, windows) -> list:
        found = []
        for window in windows:
            output = forward(self._detector.model, torch.from_numpy(window.waveform)[None], self._detector.device)
            found.append(self._detector.judge(window, output.logits[0].double().numpy()))
        self.windows += found
        return found


def _mono(samples) -> np.ndarray:
    samples = np.asarray(samples)
    if samples.dtype == np.int16:
        samples = audio.from_int16(samples)
    if not np.issubdtype(samples.dtype, np.floating) or samples.ndim not in (1, 2):
        raise AudioError(
            f"samples of type {samples.dtype} and shape {samples.shape}: expected float in [-1, 1] or int16, "
            "(n,) or (n, channels)"
        )
    if not np.isfinite(samples).all():
        raise AudioError("the samples hold NaN or infinite values")
    return samples if samples.ndim == 1 else samples.mean(axis=1)
