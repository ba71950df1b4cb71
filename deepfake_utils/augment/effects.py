"""Waveform effects on batches (B, T), in two halves: `draw_x` takes all the chance, `apply_x` is pure.

`draw_x(shape, generator, **ranges)` draws parameters for a batch of `shape` = (B, T) on the generator's
device; `apply_x(waveform, params)` moves them to the waveform's and never changes its input. What is drawn
differs from one utterance of the batch to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.special import betaincinv
from torch import Tensor

from deepfake_utils.augment.common import (
    NYQUIST_HZ,
    add_at_snr,
    check_bounds,
    draw_uniform,
    fir_filter,
    mean_power,
    on_device,
)
from deepfake_utils.conventions import SAMPLE_RATE_HZ, ConfigError
from deepfake_utils.waveforms.trimmed import FRAME_SAMPLES, SILENCE_DB

MU = 255  # of G.711
LOWPASS_TAPS = 257
SPEED_STEPS = 100  # speeds are whole hundredths, so that blocks of 100 output samples start on input samples
SINC_ZEROS = 32  # zero crossings of the speed change's interpolator, each side


class NoiseParams(NamedTuple):
    """Noise to add; `noise` is (B, T), the others (B,)."""

    noise: Tensor
    slope_db_per_octave: Tensor
    snr_db: Tensor


class ReverbParams(NamedTuple):
    """Impulse responses (B, L), the direct path at sample 0."""

    impulse_response: Tensor


class SilenceParams(NamedTuple):
    """How much of the silence at either end stays, as a fraction, and what counts as silence; each (B,)."""

    keep_leading: Tensor
    keep_trailing: Tensor
    threshold_db: Tensor


class MixupParams(NamedTuple):
    """weight * own + (1 - weight) * partner's; each (B,)."""

    weight: Tensor
    partner: Tensor


def draw_excerpts(recordings: Sequence[Tensor], shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Cut random excerpts (B, T) out of randomly chosen recordings; shorter ones repeat end to end."""
    which = torch.randint(len(recordings), shape[:1], generator=generator, device=generator.device).tolist()
    where = torch.rand(shape[:1], generator=generator, device=generator.device, dtype=torch.float64).tolist()
    excerpts = []
    for index, place in zip(which, where, strict=True):
        recording = recordings[index]
        starts = max(len(recording) - shape[1] + 1, 1) if len(recording) >= shape[1] else len(recording)
        samples = int(place * starts) + torch.arange(shape[1])
        excerpts.append(recording[samples % len(recording)])
    return torch.stack(excerpts)


def draw_noise(
    shape: tuple[int, int],
    generator: torch.Generator,
    *,
    snr_db: tuple[float, float] = (5.0, 30.0),
    slope_db_per_octave: tuple[float, float] = (-6.0, 0.0),
    recordings: Sequence[Tensor] = (),
) -> NoiseParams:
    """Draw additive noise: excerpts of `recordings` where some are given, else coloured Gaussian noise.

    Args:
        shape: (B, T) of the batch.
        snr_db: range of the signal-to-noise ratio over the whole utterance.
        slope_db_per_octave: range of the power spectrum's slope; 0 is white, -3 pink, -6 brown. Recordings
            keep their own.
        recordings: mono waveforms at 16 kHz, each (n,).
    """
    snr = draw_uniform(snr_db, shape[:1], generator, "snr_db")
    if recordings:
        return NoiseParams(draw_excerpts(recordings, shape, generator), torch.zeros_like(snr), snr)
    slope = draw_uniform(slope_db_per_octave, shape[:1], generator, "slope_db_per_octave")
    return NoiseParams(torch.randn(shape, generator=generator, device=generator.device), slope, snr)


def apply_noise(waveform: Tensor, params: NoiseParams) -> Tensor:
    """Tilt the noise by its slope and add it at its signal-to-noise ratio."""
    noise, slope, snr_db = on_device(waveform, *params)
    spectrum = torch.fft.rfft(noise)
    # Relative to the first bin; the mean (bin 0) is left out of the tilt.
    octaves = torch.arange(spectrum.shape[-1], device=noise.device).clamp_min(1).log2()
    tilt = 10 ** (slope[:, None] * octaves / 20)
    return add_at_snr(waveform, torch.fft.irfft(spectrum * tilt, noise.shape[-1]), snr_db)


def draw_shift(
    shape: tuple[int, int], generator: torch.Generator, *, shift_s: tuple[float, float] = (-0.5, 0.5)
) -> Tensor:
    """Draw by how many samples each utterance moves to the right, int64 (B,)."""
    shift = draw_uniform(shift_s, shape[:1], generator, "shift_s")
    return (shift * SAMPLE_RATE_HZ).round().long()


def apply_shift(waveform: Tensor, shift_samples: Tensor) -> Tensor:
    """Rotate each utterance: what leaves at one end enters at the other, so no digital silence appears.

    >>> apply_shift(torch.arange(4.0).repeat(2, 1), torch.tensor([1, -1])).tolist()
    [[3.0, 0.0, 1.0, 2.0], [1.0, 2.0, 3.0, 0.0]]
    """
    (shift,) = on_device(waveform, shift_samples)
    n_samples = waveform.shape[-1]
    return waveform.gather(1, (torch.arange(n_samples, device=waveform.device) - shift[:, None]) % n_samples)


def draw_speed(
    shape: tuple[int, int], generator: torch.Generator, *, speed: tuple[float, float] = (0.9, 1.1)
) -> Tensor:
    """Draw each utterance's speed as a percentage, int64 (B,): 110 is a tenth faster and higher."""
    check_bounds(speed, "speed", 0.5, 2.0)
    return (draw_uniform(speed, shape[:1], generator, "speed") * SPEED_STEPS).round().long()


def apply_speed(waveform: Tensor, speed_percent: Tensor) -> Tensor:
    """Play each utterance faster or slower, pitch and all; slower ones lose their end, faster ones repeat.

    Band-limited interpolation by a Hann-windowed sinc (J. O. Smith, "Digital audio resampling"), with the
    cut-off lowered for speeds above 100 so that nothing folds. Output sample n lies at input position
    n * speed / 100; blocks of 100 outputs begin at whole input samples, so the batch is one matrix product.
    """
    fastest = int(speed_percent.max())
    (hop,) = on_device(waveform, speed_percent)
    n_samples, device = waveform.shape[-1], waveform.device
    reach = math.ceil(SINC_ZEROS * max(1.0, fastest / SPEED_STEPS))
    taps = torch.arange(-reach, fastest + reach, device=device)
    within_block = torch.arange(SPEED_STEPS, device=device) * hop[:, None] / SPEED_STEPS
    cutoff = (SPEED_STEPS / hop).clamp_max(1.0)[:, None, None]
    distance = cutoff * (taps[:, None] - within_block[:, None, :])  # (B, taps, 100), in zero crossings
    window = torch.cos(torch.pi / 2 * (distance / SINC_ZEROS).clamp(-1, 1)).square()
    kernel = cutoff * torch.sinc(distance) * window
    block_starts = torch.arange(-(-n_samples // SPEED_STEPS), device=device) * hop[:, None]
    samples = (block_starts[..., None] + taps) % n_samples
    blocks = waveform.gather(1, samples.flatten(1)).view(samples.shape)
    return torch.bmm(blocks, kernel).flatten(1)[:, :n_samples]


def draw_gain(
    shape: tuple[int, int], generator: torch.Generator, *, gain_db: tuple[float, float] = (-12.0, 6.0)
) -> Tensor:
    """Draw each utterance's gain in dB, (B,)."""
    return draw_uniform(gain_db, shape[:1], generator, "gain_db")


def apply_gain(waveform: Tensor, gain_db: Tensor) -> Tensor:
    """Multiply each utterance by its gain; the peak may leave [-1, 1]."""
    (gain,) = on_device(waveform, gain_db)
    return waveform * 10 ** (gain[:, None] / 20)


def draw_reverb(
    shape: tuple[int, int],
    generator: torch.Generator,
    *,
    rt60_s: tuple[float, float] = (0.1, 0.8),
    direct_to_reverberant_db: tuple[float, float] = (0.0, 15.0),
    impulse_responses: Sequence[Tensor] = (),
) -> ReverbParams:
    """Draw a room for each utterance: one of `impulse_responses` if there are any, else a simulated one.

    The simulated room is Polack's: the direct path, then Gaussian noise that falls by 60 dB in RT60.

    Args:
        shape: (B, T) of the batch.
        rt60_s: range of the reverberation time.
        direct_to_reverberant_db: range of the direct path's energy over the tail's.
        impulse_responses: measured ones at 16 kHz, each (n,); what precedes the strongest sample is dropped.
    """
    check_bounds(rt60_s, "rt60_s", 1e-3, 10.0)
    if impulse_responses:
        which = torch.randint(len(impulse_responses), shape[:1], generator=generator, device=generator.device)
        chosen = [impulse_responses[index] for index in which.tolist()]
        from_direct = [response[response.abs().argmax() :] for response in chosen]
        return ReverbParams(torch.nn.utils.rnn.pad_sequence(from_direct, batch_first=True))
    n_taps = int(rt60_s[1] * SAMPLE_RATE_HZ) + 1
    rt60 = draw_uniform(rt60_s, (shape[0], 1), generator, "rt60_s")
    ratio_db = draw_uniform(direct_to_reverberant_db, (shape[0], 1), generator, "direct_to_reverberant_db")
    tail = torch.randn((shape[0], n_taps), generator=generator, device=generator.device)
    tail = tail * 10 ** (-3 * torch.arange(n_taps, device=generator.device) / (rt60 * SAMPLE_RATE_HZ))
    tail[:, 0] = 0
    tail *= 10 ** (-ratio_db / 20) / tail.square().sum(dim=1, keepdim=True).sqrt()
    tail[:, 0] = 1
    return ReverbParams(tail)


def apply_reverb(waveform: Tensor, params: ReverbParams) -> Tensor:
    """Convolve with the impulse response, cut to T samples, at the input's power."""
    (impulse_response,) = on_device(waveform, params.impulse_response)
    wet = fir_filter(waveform[:, None], impulse_response[:, None], delay=0)
    return wet * (mean_power(waveform) / mean_power(wet)).sqrt()


def draw_lowpass(
    shape: tuple[int, int], generator: torch.Generator, *, cutoff_hz: tuple[float, float] = (3000.0, 7500.0)
) -> Tensor:
    """Draw each utterance's bandwidth in Hz, (B,), uniform in octaves; 8 kHz telephony leaves 4000."""
    check_bounds(cutoff_hz, "cutoff_hz", 20.0, NYQUIST_HZ)
    low, high = (math.log2(f) for f in cutoff_hz)
    return 2 ** draw_uniform((low, high), shape[:1], generator, "cutoff_hz")


def apply_lowpass(waveform: Tensor, cutoff_hz: Tensor) -> Tensor:
    """Remove what lies above the cut-off, in place in time: 6 dB at the cut-off, 70 dB from 350 Hz above it.

    This is what resampling down and up again does to a recording, without the detour.
    """
    (cutoff,) = on_device(waveform, cutoff_hz)
    m = torch.arange(LOWPASS_TAPS, device=waveform.device) - LOWPASS_TAPS // 2
    window = torch.blackman_window(LOWPASS_TAPS, periodic=False, device=waveform.device)
    taps = torch.sinc(cutoff[:, None] / NYQUIST_HZ * m) * window
    return fir_filter(waveform[:, None], (taps / taps.sum(dim=1, keepdim=True))[:, None])


def draw_bits(shape: tuple[int, int], generator: torch.Generator, *, bits: tuple[int, int] = (6, 10)) -> Tensor:
    """Draw each utterance's resolution in bits, int64 (B,), both ends included."""
    check_bounds(bits, "bits", 2, 16)
    return torch.randint(bits[0], bits[1] + 1, shape[:1], generator=generator, device=generator.device)


def apply_companding(waveform: Tensor, bits: Tensor) -> Tensor:
    """Compress by the mu-law (G.711, mu = 255), round to 2^bits levels, expand again."""
    (bits,) = on_device(waveform, bits)
    steps = 2.0 ** bits[:, None] - 1
    x = waveform.clamp(-1, 1)
    compressed = x.sign() * torch.log1p(MU * x.abs()) / math.log1p(MU)
    rounded = ((compressed + 1) / 2 * steps).round() / steps * 2 - 1
    return rounded.sign() * torch.expm1(rounded.abs() * math.log1p(MU)) / MU


def apply_quantisation(waveform: Tensor, bits: Tensor) -> Tensor:
    """Round to the 2^bits levels of signed linear PCM.

    >>> apply_quantisation(torch.tensor([[0.3, -0.3, 1.0]]), torch.tensor([2])).tolist()
    [[0.5, -0.5, 0.5]]
    """
    (bits,) = on_device(waveform, bits)
    levels = 2.0 ** (bits[:, None] - 1)
    return torch.minimum(torch.maximum((waveform * levels).round(), -levels), levels - 1) / levels


def draw_silence(
    shape: tuple[int, int],
    generator: torch.Generator,
    *,
    keep: tuple[float, float] = (0.0, 1.0),
    threshold_db: float = -SILENCE_DB,
) -> SilenceParams:
    """Draw which share of the leading and of the trailing silence stays; `keep` = (0, 0) trims all of it.

    Args:
        shape: (B, T) of the batch.
        keep: range of the share.
        threshold_db: 10 ms frames that do not exceed this, relative to the loudest, are silent.
    """
    check_bounds(keep, "keep", 0.0, 1.0)
    leading, trailing = draw_uniform(keep, (2, shape[0]), generator, "keep")
    return SilenceParams(leading, trailing, torch.full_like(leading, threshold_db))


def find_speech(waveform: Tensor, threshold_db: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first frame above the threshold (B,) begins and the last ends, in samples, int64 (B,).

    `waveforms.trimmed.speech_span` for a batch on its device. An utterance of zeros is all speech, so that nothing is
    cut from it.
    """
    n_samples = waveform.shape[-1]
    padded = torch.nn.functional.pad(waveform, (0, -n_samples % FRAME_SAMPLES))
    energy = padded.unflatten(-1, (-1, FRAME_SAMPLES)).square().sum(dim=-1)
    floor = energy.amax(dim=-1, keepdim=True) * 10 ** (threshold_db[:, None] / 10)
    loud = (energy > floor).to(torch.uint8)
    start = loud.argmax(dim=-1) * FRAME_SAMPLES
    stop = (loud.shape[-1] - loud.flip(-1).argmax(dim=-1)) * FRAME_SAMPLES
    return start, stop.clamp_max(n_samples)


def apply_silence(waveform: Tensor, params: SilenceParams) -> Tensor:
    """Cut the silences at both ends to the drawn share; repeat the rest end to end up to T samples."""
    keep_leading, keep_trailing, threshold_db = on_device(waveform, *params)
    n_samples = waveform.shape[-1]
    start, stop = find_speech(waveform, threshold_db)
    stop = stop + ((n_samples - stop) * keep_trailing).round().long()
    start = start - (start * keep_leading).round().long()
    samples = torch.arange(n_samples, device=waveform.device)
    return waveform.gather(1, start[:, None] + samples % (stop - start)[:, None])


def draw_band_mask(n_bands: int, generator: torch.Generator, max_width: int = 20) -> Tensor:
    """Draw a 0/1 mask (n_bands,) with one block of 0 to `max_width` - 1 neighbouring bands off.

    The frequency masking of AASIST's training recipe (J. Jung et al., arXiv:2110.01200): the width is the
    whole part of a uniform draw from [0, max_width), the place uniform among those where the block fits.

    Raises:
        ConfigError: `max_width` is not between 1 and `n_bands`.
    """
    if not 1 <= max_width <= n_bands:
        raise ConfigError(f"max_width {max_width}: expected 1 to n_bands = {n_bands}")
    width = torch.randint(max_width, (1,), generator=generator, device=generator.device)
    place = torch.rand(1, generator=generator, device=generator.device)
    first = (place * (n_bands - width + 1)).long()
    band = torch.arange(n_bands, device=generator.device)
    return ((band < first) | (band >= first + width)).float()


def draw_mixup(
    shape: tuple[int, int], generator: torch.Generator, *, alpha: float = 0.2, probability: float = 1.0
) -> MixupParams:
    """Draw weights from Beta(alpha, alpha), partners by permutation (H. Zhang et al., arXiv:1710.09412).

    Args:
        shape: (B, T) of the batch.
        alpha: the smaller, the closer to the unmixed ends.
        probability: share of utterances that are mixed at all.
    """
    if not alpha > 0:
        raise ConfigError(f"mixup alpha {alpha!r}: expected a positive number")
    check_bounds((probability, 1.0), "probability", 0.0, 1.0)
    quantile = torch.rand(shape[:1], generator=generator, device=generator.device, dtype=torch.float64)
    weight = torch.from_numpy(betaincinv(alpha, alpha, quantile.cpu().numpy())).float().to(quantile.device)
    mixed = torch.rand(shape[:1], generator=generator, device=generator.device) < probability
    partner = torch.randperm(shape[0], generator=generator, device=generator.device)
    return MixupParams(torch.where(mixed, weight, 1.0), partner)


def apply_mixup(waveform: Tensor, target: Tensor, params: MixupParams) -> tuple[Tensor, Tensor]:
    """Mix waveforms and targets by the same weights.

    >>> params = MixupParams(weight=torch.tensor([0.75, 1.0]), partner=torch.tensor([1, 0]))
    >>> waveform, target = apply_mixup(torch.tensor([[4.0], [8.0]]), torch.tensor([1.0, 0.0]), params)
    >>> waveform.tolist(), target.tolist()
    ([[5.0], [8.0]], [0.75, 0.0])
    """
    weight, partner = on_device(waveform, *params)
    mixed = weight[:, None] * waveform + (1 - weight[:, None]) * waveform[partner]
    return mixed, weight * target + (1 - weight) * target[partner]
