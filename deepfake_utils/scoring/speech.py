"""Where there is speech: one flag for every 32 ms of a recording, as its samples arrive.

Silero VAD decides (github snakers4/silero-vad; its package brings the network as an ONNX file, which is run here by
itself: importing the package would set the number of PyTorch's threads). Where it or ONNX Runtime is missing,
loudness decides, which cannot tell speech from music or noise, and `FALLBACK` is what to tell the user.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import numpy as np

from deepfake_utils.scoring.silero import open_silero, silero_file

FRAME_SAMPLES = 512  # 32 ms at 16 kHz, the network's step
SPEECH_PROBABILITY = 0.5  # of a frame, from which on it counts as speech: the network's own default
FALLBACK = (
    "speech was looked for by loudness alone, which music and noise pass too: "
    "pip install onnxruntime 'silero-vad>=6.2.3' for a detector of speech"
)
_AUDIBLE_DB = -70.0  # below full scale: what is quieter is no speech, and the network is not asked
_CONTEXT_SAMPLES = 64  # of the frame before, which the network sees again
_MAX_FRAMES = 512  # a call: 16 s, some 10 MB
_LOUD_DB = -50.0  # below full scale, the fallback's idea of speech


class SpeechFinder:
    """Flags frames of speech in a recording that arrives in chunks of any size."""

    def __init__(self):
        self._network = _load_silero()
        self._memory = np.zeros((2, 1, 1, 128), np.float32)  # hidden and cell state
        self._context = np.zeros(_CONTEXT_SAMPLES, np.float32)
        self._rest = np.zeros(0, np.float32)  # samples of the frame that is not yet whole

    def push(self, samples: np.ndarray) -> np.ndarray:
        """16 kHz float32 samples (n,) -> a flag (k,) for every frame they complete."""
        samples = np.concatenate([self._rest, samples])
        n_frames = len(samples) // FRAME_SAMPLES
        self._rest = samples[n_frames * FRAME_SAMPLES :]
        frames = samples[: n_frames * FRAME_SAMPLES].reshape(n_frames, FRAME_SAMPLES)
        parts = [self._flags(frames[i : i + _MAX_FRAMES]) for i in range(0, n_frames, _MAX_FRAMES)]
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def finish(self) -> np.ndarray:
        """The flag of what is left at the end, filled up with silence: (1,), or (0,) where nothing is left."""
        missing = -len(self._rest) % FRAME_SAMPLES
        return self.push(np.zeros(missing, np.float32))

    def _flags(self, frames: np.ndarray) -> np.ndarray:
        power = np.square(frames, dtype=np.float64).mean(axis=1)
        if self._network is None:
            return power > 10 ** (_LOUD_DB / 10)
        before = np.concatenate([self._context[None], frames[:-1, -_CONTEXT_SAMPLES:]])
        self._context = frames[-1, -_CONTEXT_SAMPLES:].copy()
        flags = power > 10 ** (_AUDIBLE_DB / 10)
        if flags.any():
            asked = np.concatenate([before, frames], axis=1)[flags]
            probability, self._memory = self._network(asked, self._memory)
            flags[flags] = probability >= SPEECH_PROBABILITY
        return flags


def is_by_loudness() -> bool:
    """Whether loudness decides, because Silero VAD cannot be had."""
    return _load_silero() is None


@lru_cache(maxsize=1)
def _load_silero():
    """Silero VAD, as `open_silero` gives it, or None where there is none."""
    network = silero_file()
    return None if network is None or find_spec("onnxruntime") is None else open_silero(network)
