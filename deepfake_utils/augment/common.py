"""What the effects share: drawing from a range, levels, and FIR filtering of a batch."""

from __future__ import annotations

import math

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from deepfake_utils.conventions import SAMPLE_RATE_HZ, ConfigError

NYQUIST_HZ = SAMPLE_RATE_HZ / 2
SMALLEST_POWER = 1e-20  # mean squares are held above this, so that silence divides nothing by zero


def draw_uniform(bounds: tuple[float, float], size: tuple[int, ...], generator: torch.Generator, what: str) -> Tensor:
    """Draw float32 numbers uniformly from [low, high] on the generator's device.

    Raises:
        ConfigError: `bounds` is not a pair of finite numbers in order; the text names the setting `what`.
    """
    check_bounds(bounds, what)
    low, high = bounds
    return low + (high - low) * torch.rand(size, generator=generator, device=generator.device)


def check_bounds(bounds: tuple[float, float], what: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse a (low, high) setting that is out of order or outside the effect's range."""
    numbers = isinstance(bounds, (tuple, list)) and all(isinstance(b, (int, float)) for b in bounds)
    if not (numbers and len(bounds) == 2 and low <= bounds[0] <= bounds[1] <= high and math.isfinite(sum(bounds))):
        raise ConfigError(f"{what} {bounds!r}: expected a pair (low, high) in order, within [{low}, {high}]")


def on_device(waveform: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters, moved to the waveform's device: a CPU generator may serve a CUDA batch."""
    return tuple(parameter.to(waveform.device) for parameter in parameters)


def mean_power(waveform: Tensor) -> Tensor:
    """Mean square over the last axis, kept as an axis of 1 and held above zero."""
    return waveform.square().mean(dim=-1, keepdim=True).clamp_min(SMALLEST_POWER)


def limit_peak(waveform: Tensor) -> Tensor:
    """Scale down the utterances whose peak exceeds 1 so that it is 1; leave the others as they are.

    Scaling, unlike clipping, adds no harmonics that a countermeasure could take for a spoofing artefact.

    >>> limit_peak(torch.tensor([[0.5, -2.0], [0.5, -0.25]])).tolist()
    [[0.25, -1.0], [0.5, -0.25]]
    """
    return waveform / waveform.abs().amax(dim=-1, keepdim=True).clamp_min(1.0)


def add_at_snr(waveform: Tensor, noise: Tensor, snr_db: Tensor) -> Tensor:
    """Add noise, scaled so that signal over noise power is `snr_db` (B,) over the whole utterance."""
    gain = (mean_power(waveform) / mean_power(noise)).sqrt() * 10 ** (-snr_db[:, None] / 20)
    return waveform + gain * noise


def fir_filter(channels: Tensor, taps: Tensor, delay: int | None = None) -> Tensor:
    """Filter the channels of each utterance, each by its own FIR, and sum them (overlap-save, by FFT).

    Args:
        channels: (B, C, T); samples beyond either end count as zero.
        taps: (B, C, K).
        delay: samples of the full convolution to drop at the start; (K - 1) / 2, the default, keeps what a
            symmetric filter passes in place, 0 is causal.

    Returns:
        (B, T): the first T samples after the delay.
    """
    n_samples, n_taps = channels.shape[-1], taps.shape[-1]
    delay = (n_taps - 1) // 2 if delay is None else delay
    # Short filters run in blocks of about eight filter lengths, which stay in the processor's cache.
    n_fft = min(next_fast_len(n_samples + n_taps - 1, real=True), 1 << (8 * n_taps - 1).bit_length())
    hop = n_fft - n_taps + 1
    n_blocks = -(-n_samples // hop)
    left = n_taps - 1 - delay
    right = n_blocks * hop + n_taps - 1 - left - n_samples
    blocks = torch.nn.functional.pad(channels, (left, right)).unfold(-1, n_fft, hop)
    spectrum = torch.fft.rfft(blocks) * torch.fft.rfft(taps, n_fft)[:, :, None]
    filtered = torch.fft.irfft(spectrum.sum(dim=1), n_fft)[..., n_taps - 1 :]
    return filtered.flatten(1)[:, :n_samples]
