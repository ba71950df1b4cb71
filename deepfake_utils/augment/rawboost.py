"""RawBoost: convolutive, impulsive and stationary noise, made from nothing but the speech and chance.

H. Tak, M. Kamble, J. Patino, M. Todisco, N. Evans, "RawBoost: a raw data boosting and augmentation method
applied to automatic speaker verification anti-spoofing", ICASSP 2022, arXiv:2111.04433. Defaults are the
published ones. Algorithms: 1 linear and non-linear convolutive noise, 2 impulsive signal-dependent noise,
3 stationary signal-independent noise, 4 = 1, 2, 3 in series, 5 = 1, 2 in series. The authors chose 5 for
logical access (telephony) and 3 for deepfakes.

Differences from the authors' program, none of which the method depends on: filters are centred exactly
(theirs advances the signal by one sample a filtering); impulses fall on each sample independently (theirs
fixes their number by shuffling positions, ours is binomial); we see the crop, theirs the whole utterance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepfake_utils.augment.common import add_at_snr, check_bounds, draw_uniform, fir_filter, limit_peak, on_device
from deepfake_utils.conventions import SAMPLE_RATE_HZ, ConfigError

ALGORITHMS = {1: "c", 2: "i", 3: "s", 4: "cis", 5: "ci"}  # which noises, in series

N_NOTCHES = 5
CENTRE_HZ = (20.0, 8000.0)
WIDTH_HZ = (100.0, 1000.0)
N_TAPS = (10, 100)
N_FFT = 1024  # more than a cascade of five notches of 101 taps is long
NYQUIST_HZ = SAMPLE_RATE_HZ / 2


class NotchParams(NamedTuple):
    """A cascade of N_NOTCHES band-stop filters; every field has the shape (..., N_NOTCHES)."""

    centre_hz: Tensor
    width_hz: Tensor
    n_taps: Tensor  # odd


class ConvolutiveParams(NamedTuple):
    """One cascade for each power of the signal."""

    notches: NotchParams  # (B, orders, N_NOTCHES)
    gain_db: Tensor  # (B, orders): the cascade's highest gain


class ImpulsiveParams(NamedTuple):
    """What each sample is changed by, relative to itself; zero for most."""

    relative: Tensor  # (B, T)


class StationaryParams(NamedTuple):
    """White noise and what colours and scales it."""

    noise: Tensor  # (B, T)
    notches: NotchParams  # (B, N_NOTCHES)
    snr_db: Tensor  # (B,)


class RawBoostParams(NamedTuple):
    """The noises of one algorithm, applied in this order; None where the algorithm has not that one."""

    convolutive: ConvolutiveParams | None
    impulsive: ImpulsiveParams | None
    stationary: StationaryParams | None


def draw_notches(size: tuple[int, ...], generator: torch.Generator) -> NotchParams:
    """Draw cascades of notches: centre 20-8000 Hz, width 100-1000 Hz, 11-99 taps each, all uniform."""
    size = (*size, N_NOTCHES)
    centre_hz = draw_uniform(CENTRE_HZ, size, generator, "centre_hz")
    width_hz = draw_uniform(WIDTH_HZ, size, generator, "width_hz")
    n_taps = torch.randint(*N_TAPS, size, generator=generator, device=generator.device)
    # An even symmetric filter has a zero at the Nyquist frequency, so a band-stop must be odd.
    return NotchParams(centre_hz, width_hz, n_taps + (n_taps % 2 == 0))


def notch_taps(params: NotchParams) -> Tensor:
    """The cascades as one symmetric FIR each, (..., K) with K odd, highest gain 1.

    Each notch is the window method's: an ideal band-stop times a Hamming window of its own length.
    """
    centre, width, n_taps = params.centre_hz[..., None], params.width_hz[..., None], params.n_taps[..., None]
    longest = N_TAPS[1] - 1 + N_TAPS[1] % 2
    m = torch.arange(-(longest // 2), longest // 2 + 1, device=centre.device)
    low = ((centre - width / 2) / NYQUIST_HZ).clamp_min(0)
    high = ((centre + width / 2) / NYQUIST_HZ).clamp_max(1)
    ideal = (m == 0).float() - high * torch.sinc(high * m) + low * torch.sinc(low * m)
    window = 0.54 + 0.46 * torch.cos(2 * torch.pi * m / (n_taps - 1))
    notches = torch.where(2 * m.abs() < n_taps, ideal * window, 0.0)
    # The method scales a filter to gain 1 at 0 Hz. The cascade's own scaling undoes that but for its sign, which
    # a notch that reaches 0 Hz may turn, and with it the sign of one power of the signal against the others.
    polarity = torch.where(notches.sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    response = torch.fft.rfft(notches * polarity, N_FFT).prod(dim=-2)
    response = response / response.abs().amax(dim=-1, keepdim=True)
    return torch.fft.irfft(response, N_FFT)[..., : (longest - 1) * N_NOTCHES + 1]


def draw_convolutive(
    shape: tuple[int, int],
    generator: torch.Generator,
    *,
    orders: int = 5,
    gain_db: tuple[float, float] = (0.0, 0.0),
    nonlinear_gain_db: tuple[float, float] = (-20.0, -5.0),
) -> ConvolutiveParams:
    """Draw one notch cascade for each power 1..orders of each utterance (paper, section 2.1).

    Args:
        shape: (B, T) of the batch.
        orders: the highest power of the signal.
        gain_db: range of the gain of power 1; `nonlinear_gain_db` that of the others.
    """
    linear = draw_uniform(gain_db, (shape[0], 1), generator, "gain_db")
    others = draw_uniform(nonlinear_gain_db, (shape[0], orders - 1), generator, "nonlinear_gain_db")
    return ConvolutiveParams(draw_notches((shape[0], orders), generator), torch.cat([linear, others], dim=1))


def apply_convolutive(waveform: Tensor, params: ConvolutiveParams) -> Tensor:
    """Sum the filtered powers of the signal, remove the mean, scale down where the peak exceeds 1."""
    (gain_db,) = on_device(waveform, params.gain_db)
    taps = notch_taps(NotchParams(*on_device(waveform, *params.notches))) * 10 ** (gain_db[..., None] / 20)
    powers = waveform[:, None].expand(-1, gain_db.shape[1], -1).cumprod(dim=1)
    mixture = fir_filter(powers, taps)
    return limit_peak(mixture - mixture.mean(dim=-1, keepdim=True))


def draw_impulsive(
    shape: tuple[int, int],
    generator: torch.Generator,
    *,
    share: tuple[float, float] = (0.0, 0.1),
    gain: float = 2.0,
) -> ImpulsiveParams:
    """Draw which samples are disturbed and by how much of themselves (paper, section 2.2).

    Args:
        shape: (B, T) of the batch.
        share: range of the disturbed share of an utterance's samples.
        gain: g_sd; a disturbed sample x becomes x + gain * x * u1 * u2, with u1 and u2 uniform in [-1, 1].
    """
    check_bounds(share, "share", 0.0, 1.0)
    wanted = draw_uniform(share, (shape[0], 1), generator, "share")
    hit = torch.rand(shape, generator=generator, device=generator.device) < wanted
    first, second = (draw_uniform((-1.0, 1.0), shape, generator, "u") for _ in range(2))
    return ImpulsiveParams(gain * first * second * hit)


def apply_impulsive(waveform: Tensor, params: ImpulsiveParams) -> Tensor:
    """Disturb the drawn samples in proportion to themselves, scale down where the peak exceeds 1."""
    (relative,) = on_device(waveform, params.relative)
    return limit_peak(waveform + waveform * relative)


def draw_stationary(
    shape: tuple[int, int], generator: torch.Generator, *, snr_db: tuple[float, float] = (10.0, 40.0)
) -> StationaryParams:
    """Draw white noise, a notch cascade to colour it and its signal-to-noise ratio (paper, section 2.3)."""
    snr = draw_uniform(snr_db, shape[:1], generator, "snr_db")
    noise = torch.randn(shape, generator=generator, device=generator.device)
    return StationaryParams(noise, draw_notches(shape[:1], generator), snr)


def apply_stationary(waveform: Tensor, params: StationaryParams) -> Tensor:
    """Add the coloured noise at its signal-to-noise ratio."""
    noise, snr_db = on_device(waveform, params.noise, params.snr_db)
    taps = notch_taps(NotchParams(*on_device(waveform, *params.notches)))
    return add_at_snr(waveform, fir_filter(noise[:, None], taps[:, None]), snr_db)


def draw_rawboost(shape: tuple[int, int], generator: torch.Generator, *, algorithm: int = 5) -> RawBoostParams:
    """Draw the published noises of one algorithm.

    Args:
        shape: (B, T) of the batch.
        algorithm: 1 to 5, see the module.

    Raises:
        ConfigError: there is no such algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"RawBoost algorithm {algorithm!r} is unknown: expected one of {list(ALGORITHMS)}")
    noises = ALGORITHMS[algorithm]
    return RawBoostParams(
        draw_convolutive(shape, generator) if "c" in noises else None,
        draw_impulsive(shape, generator) if "i" in noises else None,
        draw_stationary(shape, generator) if "s" in noises else None,
    )


def apply_rawboost(waveform: Tensor, params: RawBoostParams) -> Tensor:
    """Apply the drawn noises in series; within [-1, 1], by scaling."""
    if params.convolutive is not None:
        waveform = apply_convolutive(waveform, params.convolutive)
    if params.impulsive is not None:
        waveform = apply_impulsive(waveform, params.impulsive)
    if params.stationary is not None:
        waveform = apply_stationary(waveform, params.stationary)
    return limit_peak(waveform)
