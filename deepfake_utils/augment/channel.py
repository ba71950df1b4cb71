"""What recording chains do to a waveform besides noise, rooms and codecs: colour, clipped peaks, gaps in time and band.

Two halves each, as in `effects`: `draw_x` takes all the chance, `apply_x` is pure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepfake_utils.augment.common import NYQUIST_HZ, check_bounds, draw_uniform, mean_power, on_device

KNOTS_HZ = (0.0, 125.0, 250.0, 500.0, 1000.0, 2000.0, 3000.0, 4000.0, 5500.0, 8000.0)  # of the equaliser


class BandParams(NamedTuple):
    """The band to take out of each utterance, in Hz; each (B,)."""

    low_hz: Tensor
    high_hz: Tensor


class GapParams(NamedTuple):
    """Where each utterance falls silent, as fractions of its length; each (B,)."""

    start: Tensor
    stop: Tensor


def draw_equaliser(
    shape: tuple[int, int],
    generator: torch.Generator,
    *,
    tilt_db_per_octave: tuple[float, float] = (-3.0, 3.0),
    bumps_db: tuple[float, float] = (-6.0, 6.0),
) -> Tensor:
    """Draw each utterance's gain in dB at KNOTS_HZ, (B, 10): a tilt around 1 kHz, and a bump at every knot."""
    tilt = draw_uniform(tilt_db_per_octave, (shape[0], 1), generator, "tilt_db_per_octave")
    bumps = draw_uniform(bumps_db, (shape[0], len(KNOTS_HZ)), generator, "bumps_db")
    octaves = (torch.tensor(KNOTS_HZ, device=generator.device).clamp_min(62.5) / 1000).log2()
    return tilt * octaves + bumps


def apply_equaliser(waveform: Tensor, gain_db: Tensor) -> Tensor:
    """Weigh the spectrum by the gains, linear in dB between the knots, at the input's power."""
    (gain_db,) = on_device(waveform, gain_db)
    spectrum = torch.fft.rfft(waveform)
    knots = torch.tensor(KNOTS_HZ, device=waveform.device)
    frequency = torch.linspace(0, NYQUIST_HZ, spectrum.shape[-1], device=waveform.device)
    after = torch.bucketize(frequency, knots).clamp(1, len(KNOTS_HZ) - 1)
    share = (frequency - knots[after - 1]) / (knots[after] - knots[after - 1])
    curve = gain_db[:, after - 1] * (1 - share) + gain_db[:, after] * share
    coloured = torch.fft.irfft(spectrum * 10 ** (curve / 20), waveform.shape[-1])
    return coloured * (mean_power(waveform) / mean_power(coloured)).sqrt()


def draw_bandstop(
    shape: tuple[int, int], generator: torch.Generator, *, width_hz: tuple[float, float] = (200.0, 1500.0)
) -> BandParams:
    """Draw the band each utterance loses, placed evenly over the spectrum."""
    check_bounds(width_hz, "width_hz", 0.0, NYQUIST_HZ)
    width = draw_uniform(width_hz, shape[:1], generator, "width_hz")
    low = torch.rand(shape[:1], generator=generator, device=generator.device) * (NYQUIST_HZ - width)
    return BandParams(low, low + width)


def apply_bandstop(waveform: Tensor, params: BandParams) -> Tensor:
    """Take the band out, as SpecAugment's frequency mask does to a spectrogram (D. Park et al., arXiv 1904.08779).

    >>> tone = torch.sin(2 * torch.pi * 1000 * torch.arange(1600) / 16000)[None]
    >>> bool(apply_bandstop(tone, BandParams(torch.tensor([900.0]), torch.tensor([1100.0]))).abs().max() < 1e-3)
    True
    """
    low, high = on_device(waveform, *params)
    spectrum = torch.fft.rfft(waveform)
    frequency = torch.linspace(0, NYQUIST_HZ, spectrum.shape[-1], device=waveform.device)
    kept = (frequency < low[:, None]) | (frequency > high[:, None])
    return torch.fft.irfft(spectrum * kept, waveform.shape[-1])


def draw_gap(
    shape: tuple[int, int], generator: torch.Generator, *, share: tuple[float, float] = (0.05, 0.3)
) -> GapParams:
    """Draw how large a share of each utterance falls silent, and where."""
    check_bounds(share, "share", 0.0, 1.0)
    length = draw_uniform(share, shape[:1], generator, "share")
    start = torch.rand(shape[:1], generator=generator, device=generator.device) * (1 - length)
    return GapParams(start, start + length)


def apply_gap(waveform: Tensor, params: GapParams) -> Tensor:
    """Silence the gap, as SpecAugment's time mask.

    >>> apply_gap(torch.ones(1, 4), GapParams(torch.tensor([0.25]), torch.tensor([0.5]))).tolist()
    [[1.0, 0.0, 1.0, 1.0]]
    """
    start, stop = on_device(waveform, *params)
    place = torch.arange(waveform.shape[-1], device=waveform.device) / waveform.shape[-1]
    return waveform * ((place < start[:, None]) | (place >= stop[:, None]))


def draw_clipping(
    shape: tuple[int, int], generator: torch.Generator, *, over_db: tuple[float, float] = (0.0, 12.0)
) -> Tensor:
    """Draw by how many dB each utterance's peak exceeds what the chain can carry, (B,)."""
    check_bounds(over_db, "over_db", 0.0, 60.0)
    return draw_uniform(over_db, shape[:1], generator, "over_db")


def apply_clipping(waveform: Tensor, over_db: Tensor) -> Tensor:
    """Cut the peaks off.

    >>> apply_clipping(torch.tensor([[0.5, -1.0, 0.05]]), torch.tensor([20.0])).round(decimals=3)
    tensor([[ 0.1000, -0.1000,  0.0500]])
    """
    (over_db,) = on_device(waveform, over_db)
    ceiling = waveform.abs().amax(1, keepdim=True) * 10 ** (-over_db[:, None] / 20)
    return torch.minimum(torch.maximum(waveform, -ceiling), ceiling)
