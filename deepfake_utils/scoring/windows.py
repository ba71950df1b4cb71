"""Cut a recording into overlapping windows that hold speech, as its samples arrive.

    samples   0                                        n
    windows   |------ 64,600 ------|                          a new one every 32,300 samples (2.02 s)
                         |------ 64,600 ------|
                                  |------ 64,600 ------|      and one that ends with the recording

A window is judged where it holds at least a second of speech; the others cost nothing but the search for speech.
Memory does not grow with the recording: the last window's samples are kept, and where in them speech was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ
from deepfake_utils.scoring.speech import FRAME_SAMPLES, SpeechFinder
from deepfake_utils.waveforms.decode import fit_length

HOP_SAMPLES = CROP_SAMPLES // 2
MIN_SPEECH_S = 1.0  # of speech in a window, to judge it
MIN_TAIL_S = 0.25  # a shorter rest after the last whole window gets none of its own
BLOCK_SAMPLES = 2**18  # searched for speech at a time: 16 s, a few MB


class Window(NamedTuple):
    """A stretch of a recording to be judged; `waveform` is (64600,), a shorter stretch repeated."""

    start_s: float
    end_s: float
    speech_s: float | None  # None where speech was not looked for
    waveform: np.ndarray


class WindowCutter:
    """Gives the windows to be judged in a recording that arrives in chunks of any size.

    Attributes:
        n_samples: samples that have arrived.
        speech_s: speech found in them, in seconds.
        judged_s: how much of the recording the windows given so far cover, in seconds.
    """

    def __init__(self):
        self._finder = SpeechFinder()
        self._kept = np.zeros(0, np.float32)  # the last samples, at most a window and a block
        self._speech_ends = np.zeros(0, np.int64)  # of each frame of speech in them, the sample after its last
        self._n_frames, self._n_speech, self._next_start, self._judged_until = 0, 0, 0, 0
        self.n_samples, self.speech_s, self.judged_s = 0, 0.0, 0.0

    def push(self, samples: np.ndarray) -> Iterator[Window]:
        """16 kHz float32 samples (n,) -> the windows they complete."""
        for start in range(0, len(samples), BLOCK_SAMPLES):
            block = samples[start : start + BLOCK_SAMPLES]
            self._kept = np.concatenate([self._kept[-CROP_SAMPLES:], block])
            self.n_samples += len(block)
            self._count(self._finder.push(block))
            while self._next_start + CROP_SAMPLES <= self.n_samples:
                yield from self._window(self._next_start, self._next_start + CROP_SAMPLES)
                self._next_start += HOP_SAMPLES

    def finish(self) -> Iterator[Window]:
        """The window that ends with the recording, where the others leave some of it out."""
        self._count(self._finder.finish())
        covered = self._next_start - HOP_SAMPLES + CROP_SAMPLES if self._next_start else 0
        if self.n_samples - covered >= (MIN_TAIL_S * SAMPLE_RATE_HZ if covered else 1):
            yield from self._window(max(0, self.n_samples - CROP_SAMPLES), self.n_samples)

    def _count(self, flags: np.ndarray) -> None:
        ends = np.minimum((self._n_frames + 1 + np.flatnonzero(flags)) * FRAME_SAMPLES, self.n_samples)
        self._n_frames += len(flags)
        self._n_speech += len(ends)
        self.speech_s = self._n_speech * FRAME_SAMPLES / SAMPLE_RATE_HZ  # whatever the chunks, to the last bit
        kept_from = self.n_samples - len(self._kept)
        self._speech_ends = np.concatenate([self._speech_ends[self._speech_ends > kept_from], ends])

    def _window(self, start: int, stop: int) -> Iterator[Window]:
        n_frames = np.count_nonzero((self._speech_ends > start) & (self._speech_ends <= stop))
        speech_s = n_frames * FRAME_SAMPLES / SAMPLE_RATE_HZ
        if speech_s < MIN_SPEECH_S:
            return
        kept_from = self.n_samples - len(self._kept)
        samples = self._kept[start - kept_from : stop - kept_from]
        self.judged_s += (stop - max(start, self._judged_until)) / SAMPLE_RATE_HZ
        self._judged_until = stop
        yield Window(start / SAMPLE_RATE_HZ, stop / SAMPLE_RATE_HZ, speech_s, fit_length(samples, CROP_SAMPLES))


class FirstWindow:
    """Gives the first 64,600 samples, whatever they hold, as the corpora's protocols ask; used as `WindowCutter` is."""

    speech_s = None  # not looked for

    def __init__(self):
        self._kept = np.zeros(0, np.float32)
        self.n_samples, self.judged_s = 0, 0.0

    def push(self, samples: np.ndarray) -> Iterator[Window]:
        """16 kHz float32 samples (n,) -> the window, when they complete it."""
        self._kept = np.concatenate([self._kept, samples[: CROP_SAMPLES - len(self._kept)]])
        self.n_samples += len(samples)
        if len(self._kept) == CROP_SAMPLES and not self.judged_s:
            yield from self._window()

    def finish(self) -> Iterator[Window]:
        """The window of a shorter recording."""
        if len(self._kept) and not self.judged_s:
            yield from self._window()

    def _window(self) -> Iterator[Window]:
        self.judged_s = len(self._kept) / SAMPLE_RATE_HZ
        yield Window(0.0, self.judged_s, None, fit_length(self._kept, CROP_SAMPLES))
