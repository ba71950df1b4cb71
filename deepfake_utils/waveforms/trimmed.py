"""Clips without the silence at their ends."""

from __future__ import annotations

import numpy as np

from deepfake_utils.conventions import SAMPLE_RATE_HZ

FRAME_SAMPLES = SAMPLE_RATE_HZ // 100  # 10 ms, the resolution of silence
SILENCE_DB = 40.0  # below the clip's loudest frame: quieter frames at its ends are silence


def speech_span(waveform: np.ndarray, silence_db: float = SILENCE_DB) -> tuple[int, int]:
    """Return (start, stop) in samples of what lies between the silences at both ends, in whole 10 ms frames.

    Silence is a run of frames at either end that are `silence_db` or more below the loudest frame; a clip without
    any sound is all speech. (N. Müller et al., "Speech is silver, silence is golden", ASVspoof 2021 workshop,
    showed what these silences give away.)

    >>> clip = np.concatenate([np.zeros(1600), np.ones(3200), np.zeros(800)])
    >>> speech_span(clip)
    (1600, 4800)
    """
    waveform = np.asarray(waveform, dtype=np.float64)
    n_frames = -(-len(waveform) // FRAME_SAMPLES)
    padded = np.zeros(n_frames * FRAME_SAMPLES)
    padded[: len(waveform)] = waveform
    power = np.square(padded).reshape(n_frames, FRAME_SAMPLES).mean(axis=1)
    loud = np.flatnonzero(power > power.max(initial=0.0) * 10 ** (-silence_db / 10))
    if not loud.size:
        return 0, len(waveform)
    return int(loud[0]) * FRAME_SAMPLES, min(len(waveform), (int(loud[-1]) + 1) * FRAME_SAMPLES)


class TrimmedSource:
    """A source of waveforms with the silence at both ends of every clip cut off.

    Args:
        source: anything with len, `utterances` and `clip(i)` -> int16 (n,), as `waveforms.open_source` gives it.
    """

    def __init__(self, source):
        self.source, self.utterances = source, source.utterances

    def __len__(self) -> int:
        return len(self.source)

    def clip(self, index: int) -> np.ndarray:
        """int16 samples (n,) of one clip, without its outer silences."""
        clip = self.source.clip(index)
        start, stop = speech_span(clip)
        return clip[start:stop]

    def n_samples(self, index: int) -> int:
        """Its length after trimming."""
        return len(self.clip(index))

    def describe(self) -> str:
        """One line for the notebook."""
        return f"{self.source.describe()}; silence trimmed at both ends"
