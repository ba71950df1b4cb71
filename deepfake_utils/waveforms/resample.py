"""Conversion to 16 kHz, of a whole waveform or of one that comes in blocks."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from deepfake_utils.conventions import SAMPLE_RATE_HZ

# The anti-alias filter: flat to 94 % of the lower Nyquist frequency, 80 dB down from that frequency on.
PASSBAND_FRACTION = 0.94
STOPBAND_DB = 80.0

CHUNK_SAMPLES = 1_600  # computed at a time, about
MATRIX_SAMPLES = 32  # a matrix gives: more would multiply more zeros, fewer do not fill the processor's vectors
MATRICES_SIZE = 2**21  # elements, at most
SMALL_PRODUCT = 2**18  # multiplications up to which OpenBLAS starts no team of threads, which a busy machine stops


def resample(waveform: np.ndarray, rate_hz: int) -> np.ndarray:
    """Convert a mono waveform to 16 kHz with a linear-phase filter.

    A Kaiser-window low-pass applied by polyphase filtering: flat within 0.01 dB up to 94 % of the lower of the two
    Nyquist frequencies, and at least 80 dB down from that frequency on, so nothing audible folds back. (SciPy's default
    filter is only 6 dB down there: a 8.2 kHz tone in a 48 kHz file would return as a 7.8 kHz one.)

    Args:
        waveform: shape (n,), any float type.
        rate_hz: its sampling rate, in Hz.

    Returns:
        Waveform at 16 kHz, shape (ceil(n * 16000 / rate_hz),); the argument itself if `rate_hz` is 16000.

    >>> resample(np.zeros(441), 44_100).shape
    (160,)
    """
    if rate_hz == SAMPLE_RATE_HZ:
        return waveform
    resampler = Resampler(rate_hz)
    return np.concatenate([resampler.push(waveform), resampler.finish()])


class Resampler:
    """`resample` for a waveform that comes in blocks: the output does not depend, to the bit, on their sizes.

    The output is computed in chunks of about a tenth of a second, each from its stretch of the input and what the
    filter reaches on either side. Output sample m of a chunk is the sum over k of x[k] taps[m down + half - k up];
    where a few matrices hold these taps for all outputs of a row, as for all usual rates, these are matrix products,
    three times as fast as SciPy's `upfirdn`, which does the others.

    Args:
        rate_hz: sampling rate of what comes in, in Hz.

    >>> resampler = Resampler(48_000)
    >>> len(resampler.push(np.zeros(48_000))) + len(resampler.finish())
    16000
    """

    def __init__(self, rate_hz: int):
        self.rate_hz = rate_hz
        if rate_hz == SAMPLE_RATE_HZ:
            return
        divisor = math.gcd(SAMPLE_RATE_HZ, rate_hz)
        self._up, self._down = SAMPLE_RATE_HZ // divisor, rate_hz // divisor
        self._reach, self._hop, self._matrices = _filter_matrices(self._up, self._down)
        n_rows = max(1, CHUNK_SAMPLES * self._down // (self._up * self._hop))
        largest = max((matrix.size for _, matrix in self._matrices), default=1)
        self._n_rows = max(1, min(n_rows, SMALL_PRODUCT // largest))  # of one product
        self._n_products = -(-n_rows // self._n_rows)  # of a chunk with one matrix
        self._chunk = self._hop * self._n_rows * self._n_products  # input samples
        self._waiting = np.zeros(self._reach)
        self._n_in = self._n_out = 0

    def push(self, block: np.ndarray) -> np.ndarray:
        """Take samples (n,), n >= 0, and return what can be computed from all so far, (m,), m >= 0."""
        if self.rate_hz == SAMPLE_RATE_HZ:
            return block
        self._n_in += len(block)
        waiting, converted, start = np.concatenate([self._waiting, block]), [], 0
        n_needed = self._chunk + 2 * self._reach
        while len(waiting) - start >= n_needed:
            converted.append(self._convert(waiting[start : start + n_needed]))
            start += self._chunk
        self._waiting = waiting[start:].copy()
        self._n_out += sum(map(len, converted))
        return np.concatenate(converted) if converted else np.zeros(0)

    def finish(self) -> np.ndarray:
        """Return the rest, as if silence followed."""
        if self.rate_hz == SAMPLE_RATE_HZ:
            return np.zeros(0, np.float32)
        n_missing = -(-self._n_in * self._up // self._down) - self._n_out
        n_chunks = -(-n_missing * self._down // (self._up * self._chunk))
        silence = n_chunks * self._chunk + 2 * self._reach - len(self._waiting)
        return self.push(np.zeros(max(0, silence)))[:n_missing]

    def _convert(self, stretch: np.ndarray) -> np.ndarray:
        """The outputs of one chunk from its inputs and `reach` more on either side."""
        if self._matrices:
            size = stretch.itemsize  # `sliding_window_view` gives the same, and takes as long as the products
            shape = self._n_products, self._n_rows, self._hop + 2 * self._reach
            strides = self._n_rows * self._hop * size, self._hop * size, size
            rows = np.ndarray(shape, stretch.dtype, stretch, strides=strides)
            parts = [rows[..., start : start + len(matrix)].copy() @ matrix for start, matrix in self._matrices]
            return np.concatenate(parts, axis=2).ravel()
        from scipy.signal import upfirdn

        first, taps = _padded_taps(self._up, self._down, self._reach)
        return upfirdn(taps, stretch, self._up, self._down)[first : first + self._chunk * self._up // self._down]


@lru_cache(maxsize=2)
def _padded_taps(up: int, down: int, reach: int) -> tuple[int, np.ndarray]:
    """Which output of `upfirdn` is that of input sample `reach`, and taps padded so that one is."""
    taps = _low_pass(up, down) * up
    first = len(taps) // 2 + reach * up
    padding = -first % down
    return (first + padding) // down, np.concatenate([np.zeros(padding), taps])


@lru_cache(maxsize=16)
def _filter_matrices(up: int, down: int) -> tuple[int, int, list[tuple[int, np.ndarray]]]:
    """How far the filter reaches, how far a row advances, both in input samples, and the taps as matrices.

    Each matrix (n, m) takes n input samples, counted from `reach` before the row's and its own start on, to m outputs
    of the row, one matrix after the other. None, where they would be too large.
    """
    taps = _low_pass(up, down) * up
    half = len(taps) // 2
    reach = half // up + 1
    repeats = max(1, round(MATRIX_SAMPLES / up))
    hop, n_outputs = down * repeats, up * repeats
    if n_outputs * (2 * reach + MATRIX_SAMPLES * down // up) > MATRICES_SIZE:
        return reach, hop, []
    matrices = []
    for first in range(0, n_outputs, MATRIX_SAMPLES):
        outputs = np.arange(first, min(first + MATRIX_SAMPLES, n_outputs))
        start, stop = first * down // up, int(outputs[-1]) * down // up + 2 * reach + 1
        which = outputs * down + half - (np.arange(start, stop)[:, None] - reach) * up
        matrix = np.where((which >= 0) & (which < len(taps)), taps[which.clip(0, len(taps) - 1)], 0.0)
        matrix.setflags(write=False)
        matrices.append((start, matrix))
    return reach, hop, matrices


@lru_cache(maxsize=16)
def _low_pass(up: int, down: int) -> np.ndarray:
    """Taps at `up` times the input rate: flat below PASSBAND_FRACTION of the lower Nyquist frequency, then stop."""
    from scipy.signal import firwin, kaiser_beta

    nyquist = 1.0 / max(up, down)  # of the lower rate, where 1 is the Nyquist frequency of the filter's own rate
    width = (1.0 - PASSBAND_FRACTION) * nyquist
    half = math.ceil((STOPBAND_DB - 7.95) / (2.285 * math.pi * width) / 2)  # Kaiser's length formula
    taps = firwin(2 * half + 1, nyquist - width / 2, window=("kaiser", kaiser_beta(STOPBAND_DB)), scale=True)
    taps.setflags(write=False)
    return taps
