"""Whether somebody speaks in a recording: enough for a corpus, not for a verdict on one recording."""

from __future__ import annotations

import numpy as np

from deepfake_utils.conventions import SAMPLE_RATE_HZ
from deepfake_utils.waveforms.decode import from_int16

MIN_SPEECH_S = 0.15  # a recording with less of it is left out; one short word has about so much
_FRAME, _HOP = 512, 256
_LOWEST_HZ, _HIGHEST_HZ = 70, 400  # of voices
_PERIODIC = 0.5  # share of a voiced frame's energy that comes again a period later
_BELOW_LOUDEST_DB = 35.0
_QUIETEST = 2e-4  # root mean square of a frame


def speech_seconds(samples: np.ndarray) -> float:
    """Seconds of voiced sound whose pitch moves: 0 for silence, noise and steady tones.

    A frame of 32 ms is voiced where its autocorrelation has a peak of 0.5 or more at a period of 70 to 400 Hz; held
    tones, whose period does not change from frame to frame, do not count.

    Args:
        samples: int16 (n,) at 16 kHz.

    >>> rng = np.random.default_rng(0)
    >>> speech_seconds((1000 * rng.standard_normal(16000)).astype(np.int16))
    0.0
    """
    waveform = from_int16(samples)
    if len(waveform) < _FRAME:
        return 0.0
    frames = np.lib.stride_tricks.sliding_window_view(waveform, _FRAME)[::_HOP]
    frames = frames - frames.mean(axis=1, keepdims=True)
    energy = np.sqrt(np.mean(frames * frames, axis=1))
    loud = energy > max(_QUIETEST, float(energy.max()) * 10 ** (-_BELOW_LOUDEST_DB / 20))
    spectrum = np.fft.rfft(frames[loud], 2 * _FRAME)
    correlation = np.fft.irfft(np.square(np.abs(spectrum)))[:, :_FRAME]
    correlation /= correlation[:, :1] * (1 - np.arange(_FRAME) / _FRAME) + 1e-9  # of the samples that overlap
    shortest, longest = SAMPLE_RATE_HZ // _HIGHEST_HZ, SAMPLE_RATE_HZ // _LOWEST_HZ
    lags = correlation[:, shortest:longest]
    highest = lags.max(axis=1, keepdims=True)  # the first lag near it: multiples of a period are as high
    period = np.zeros(len(frames), dtype=int)
    period[loud] = (
        np.where(highest[:, 0] > _PERIODIC, (lags >= 0.9 * highest).argmax(axis=1) + shortest, 0) if loud.any() else 0
    )
    voiced = period > 0
    if voiced.any() and np.ptp(np.percentile(period[voiced], (5, 95))) <= 2:
        return 0.0
    return float(voiced.sum() * _HOP / SAMPLE_RATE_HZ)
