"""Cepstral and spectral front ends: LFCC as ASVspoof defines them, and the log power spectrogram.

LFCC here are those of the ASVspoof 2019 baseline (Sahidullah, Kinnunen and Hanilci, "A comparison of features
for synthetic speech detection", Interspeech 2015), which LFCC-LCNN (arXiv 2103.11326) and LFCC-ResNet18
(arXiv 2010.13995) use:

    waveform -> pre-emphasis y[n] = x[n] - 0.97 x[n-1], y[0] = x[0]
             -> frames of 20 ms every 10 ms, without padding, times a periodic Hamming window
             -> power spectrum of a 512-point FFT
             -> 20 triangular filters spaced linearly over 0 .. 8 kHz
             -> log10(. + 1.19e-7)
             -> orthonormal DCT-II, coefficients 0 .. 19
             -> delta[t] = c[t+1] - c[t-1] and, by the same formula, delta-delta; ends repeated

Published systems differ in two choices, made here as follows: the floor inside the logarithm is that of
single precision (the MATLAB baseline has 2.2e-16, which makes an outlier of digital silence and so gives away
processed files), and coefficient 0 is kept (one LCNN recipe replaces it by the log energy). The window is the
periodic Hamming one, torch's default, where MATLAB has the symmetric one. `torchaudio.transforms.LFCC` is
something else: its decibel floor depends on the loudest frame of the clip, and it has no pre-emphasis and no
deltas.

`lfcc-levelled` is for recordings of many origins: 32 ms Hann windows every 16 ms, the band that recordings of 16 and of
24 kHz both have, power relative to the clip's mean, and every coefficient minus its own mean over the clip, so that
level, tilt and bandwidth, which say how speech was recorded and not who made it, are gone (cepstral mean subtraction,
B. S. Atal, J. Acoust. Soc. Am. 55, 1974).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError, ConfigError
from deepfake_utils.models.layers import at_least_single

LOG_FLOOR = torch.finfo(torch.float32).eps
LOWEST_HZ, HIGHEST_HZ = 62.5, 7562.5  # between these, which recordings of 16 and of 24 kHz both have
RELATIVE_FLOOR = 1e-7  # of a power over the utterance's mean


@dataclass(frozen=True)
class LfccConfig:
    """Settings of the LFCC front end; the defaults are ASVspoof 2019's."""

    window_samples: int = 320  # 20 ms
    hop_samples: int = 160  # 10 ms
    n_fft: int = 512
    n_filters: int = 20  # triangles over 0 .. 8 kHz
    n_coefficients: int = 20  # kept of the DCT; the features are three times as many
    pre_emphasis: float = 0.97  # 0 is none
    band_hz: tuple[float, float] = (0.0, SAMPLE_RATE_HZ / 2)  # of the filters
    levelled: bool = False  # power relative to the clip's mean, coefficients minus their mean over time


# ASVspoof 2021's baseline: finer in frequency, coarser in time, no pre-emphasis, 70 filters.
# (It keeps 19 coefficients and, for the telephone track, 0 .. 4 kHz; here 20 over the whole band.)
LFCC_HIGH_RESOLUTION = LfccConfig(480, 240, 1024, n_filters=70, pre_emphasis=0.0)
LFCC_LEVELLED = LfccConfig(512, 256, pre_emphasis=0.0, band_hz=(LOWEST_HZ, HIGHEST_HZ), levelled=True)


class PowerSpectrum(nn.Module):
    """Short-time power spectrum, frames without padding, in single precision whatever the autocast.

    Powers of speech span ten orders of magnitude, so half precision would lose the quiet bands.

    Args:
        config: its window, hop, FFT points and pre-emphasis are used.
        window: gives a window of so many samples; default the periodic Hamming one.

    Raises:
        ConfigError: settings out of range.
    """

    def __init__(self, config: LfccConfig, window: Callable[[int], Tensor] = torch.hamming_window):
        super().__init__()
        self.window_samples, self.hop_samples = config.window_samples, config.hop_samples
        self.n_fft, self.pre_emphasis = config.n_fft, config.pre_emphasis
        if not 1 <= self.hop_samples <= self.window_samples <= self.n_fft or not 0 <= self.pre_emphasis <= 1:
            raise ConfigError(
                "spectral front end: expected 1 <= hop <= window <= n_fft and pre-emphasis in 0 .. 1, got "
                f"hop {self.hop_samples}, window {self.window_samples}, n_fft {self.n_fft}, pre-emphasis "
                f"{self.pre_emphasis}"
            )
        self.n_bins = self.n_fft // 2 + 1
        self.register_buffer("window", window(self.window_samples), persistent=False)

    def n_frames(self, n_samples: int) -> int:
        """Frames in a clip of `n_samples`; 0 when it is shorter than one window."""
        return max(0, 1 + (n_samples - self.window_samples) // self.hop_samples)

    def n_samples(self, n_frames: int) -> int:
        """The fewest samples that give `n_frames` frames."""
        return self.window_samples + (n_frames - 1) * self.hop_samples

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, T) waveforms to (B, frames, n_fft // 2 + 1) powers, float32; AudioError below one window."""
        if waveform.shape[-1] < self.window_samples:
            raise AudioError(
                f"a waveform of {waveform.shape[-1]} samples is shorter than one analysis window of "
                f"{self.window_samples}: repeat or pad it first"
            )
        waveform = at_least_single(waveform)
        if self.pre_emphasis:
            waveform = waveform - self.pre_emphasis * F.pad(waveform[:, :-1], (1, 0))
        return self.powers(waveform)

    def powers(self, waveform: Tensor) -> Tensor:
        """`forward` of a waveform that is pre-emphasised already."""
        frames = waveform.unfold(-1, self.window_samples, self.hop_samples) * self.window
        spectrum = torch.fft.rfft(frames, n=self.n_fft)
        return spectrum.real.square() + spectrum.imag.square()  # a sum over pairs takes five times as long on CPUs


class Lfcc(nn.Module):
    """Linear-frequency cepstral coefficients with deltas and delta-deltas, as the module's docstring says.

    Args:
        config: settings; default ASVspoof 2019's 60 features.
        window: gives the analysis window; default the periodic Hamming one.

    >>> Lfcc()(torch.zeros(2, 64_600)).shape
    torch.Size([2, 60, 402])
    """

    def __init__(
        self,
        config: LfccConfig = LfccConfig(),  # noqa: B008 - frozen
        window: Callable[[int], Tensor] = torch.hamming_window,
    ):
        super().__init__()
        if not 1 <= config.n_coefficients <= config.n_filters:
            raise ConfigError(
                f"LFCC: {config.n_coefficients} coefficients cannot come from {config.n_filters} filters: "
                f"expected 1 .. {config.n_filters}"
            )
        from torchaudio.functional import create_dct, linear_fbanks  # not on import: it may not load

        self.config = config
        self.power = PowerSpectrum(config, window)
        self.n_features = 3 * config.n_coefficients
        filters = linear_fbanks(self.power.n_bins, *config.band_hz, config.n_filters, SAMPLE_RATE_HZ)
        self.register_buffer("filters", filters, persistent=False)  # (bins, filters)
        dct = create_dct(config.n_coefficients, config.n_filters, norm="ortho")
        self.register_buffer("dct", dct, persistent=False)  # (filters, coefficients)

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, T) waveforms to (B, 3 * n_coefficients, frames): static, delta, delta-delta; float32."""
        with torch.autocast(waveform.device.type, enabled=False):
            power = self.power(waveform) @ self.filters
            static = torch.log10(relative(power) if self.config.levelled else power + LOG_FLOOR) @ self.dct
            if self.config.levelled:
                static = static - static.mean(1, keepdim=True)
            static = static.transpose(1, 2)
            delta = _delta(static)
            return torch.cat([static, delta, _delta(delta)], dim=1)


class LogSpectrogram(nn.Module):
    """Log power spectrogram: the same frames and floor as LFCC, no filter bank, no cepstrum.

    Args:
        config: its window, hop, FFT points and pre-emphasis are used; default none of the latter.

    >>> LogSpectrogram()(torch.zeros(2, 64_600)).shape
    torch.Size([2, 257, 402])
    """

    def __init__(self, config: LfccConfig = LfccConfig(pre_emphasis=0.0)):  # noqa: B008 - frozen
        super().__init__()
        self.config = config
        self.power = PowerSpectrum(config)
        self.n_features = self.power.n_bins

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, T) waveforms to (B, n_fft // 2 + 1, frames), log10 of power; float32."""
        with torch.autocast(waveform.device.type, enabled=False):
            return torch.log10(self.power(waveform) + LOG_FLOOR).transpose(1, 2)


def relative(power: Tensor) -> Tensor:
    """Powers (B, ., .) over the mean of their clip, and a floor for the logarithm: what level they had is gone."""
    return power / (power.mean((1, 2), keepdim=True) + 1e-9) + RELATIVE_FLOOR


def _delta(features: Tensor) -> Tensor:
    """Difference of the next and the previous frame of (B, features, frames), the end frames repeated."""
    padded = F.pad(features, (1, 1), mode="replicate")
    return padded[..., 2:] - padded[..., :-2]


FRONT_ENDS = {
    "lfcc": lambda: Lfcc(),
    "lfcc-high-resolution": lambda: Lfcc(LFCC_HIGH_RESOLUTION),
    "lfcc-levelled": lambda: Lfcc(LFCC_LEVELLED, torch.hann_window),
    "log-spectrogram": lambda: LogSpectrogram(),
}


def build_front_end(name: str) -> Lfcc | LogSpectrogram:
    """The front end called `name`, one of `FRONT_ENDS`; ConfigError for another name.

    >>> build_front_end("log-spectrogram").n_features
    257
    """
    if name not in FRONT_ENDS:
        raise ConfigError(f"unknown front end {name!r}: expected one of {', '.join(FRONT_ENDS)}")
    return FRONT_ENDS[name]()
