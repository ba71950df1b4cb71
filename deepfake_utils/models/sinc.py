"""A bank of band-pass filters applied to the waveform: fixed, or with cut-offs that training moves.

Sources: Ravanelli and Bengio, "Speaker Recognition from Raw Waveform with SincNet", arXiv 1808.00158 (the
cut-off parametrisation); Tak et al., "End-to-End anti-spoofing with RawNet2", arXiv 2011.01108 (fixed banks
with mel, inverse-mel or linear spacing).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils.conventions import SAMPLE_RATE_HZ, ConfigError
from deepfake_utils.models import fast
from deepfake_utils.models.layers import at_least_single

HOP = 12  # samples between the windows of `SincFilters.pooled`: 6 to 48 are alike in speed
WINDOWS_AT_ONCE = 512  # keeps its intermediate results in the processor's cache
LONG_TAPS = 257  # filters from here on are quicker in the frequency domain
FFT_POINTS = 4096
BLOCKS_AT_ONCE = 4  # of FFT_POINTS, on a processor: their bands, 1 MB, stay in its cache

SPACINGS = ("mel", "inverse-mel", "linear")


def band_edges_hz(n_filters: int, spacing: str) -> Tensor:
    """The n_filters + 1 edges of adjoining bands from 0 Hz to half the sample rate, in double precision.

    >>> band_edges_hz(4, "linear").tolist()
    [0.0, 2000.0, 4000.0, 6000.0, 8000.0]
    """
    nyquist_hz = SAMPLE_RATE_HZ / 2
    steps = torch.linspace(0, 1, n_filters + 1, dtype=torch.float64)
    if spacing == "linear":
        return nyquist_hz * steps
    if spacing not in SPACINGS:
        raise ConfigError(f"unknown filter spacing {spacing!r}: expected one of {', '.join(SPACINGS)}")
    mel = 2595 * math.log10(1 + nyquist_hz / 700) * steps
    edges = 700 * (10 ** (mel / 2595) - 1)
    return edges if spacing == "mel" else (nyquist_hz - edges).flip(0)


def band_pass_filters(low_hz: Tensor, high_hz: Tensor, kernel_size: int) -> Tensor:
    """Impulse responses of ideal band-pass filters under a Hamming window.

    h[n] = (2 f_high sinc(2 f_high n) - 2 f_low sinc(2 f_low n)) w[n], with f in cycles a sample and n centred
    on 0 (arXiv 1808.00158, equations 4 to 6).

    Args:
        low_hz: (n_filters,) lower cut-offs.
        high_hz: (n_filters,) upper cut-offs.
        kernel_size: taps of a filter, odd.

    Returns:
        (n_filters, kernel_size) filters in the precision of the cut-offs.
    """
    like = {"dtype": low_hz.dtype, "device": low_hz.device}
    n = torch.arange(-(kernel_size // 2), kernel_size // 2 + 1, **like)
    window = torch.hamming_window(kernel_size, periodic=False, **like)

    def low_pass(cutoff_hz: Tensor) -> Tensor:
        twice_hz = 2 * cutoff_hz[:, None]
        return twice_hz / SAMPLE_RATE_HZ * torch.sinc(twice_hz * n / SAMPLE_RATE_HZ)

    return (low_pass(high_hz) - low_pass(low_hz)) * window


class SincFilters(nn.Module):
    """A bank of adjoining band-pass filters that covers 0 Hz to half the sample rate.

    A fixed bank has no parameters and stays out of the state dict, as in the published checkpoints. A
    learnable one starts as the same filters; its parameters are each band's lower cut-off and width in kHz,
    so that a step of Adam at 1e-4 moves a cut-off by a tenth of a hertz.

    Args:
        n_filters: bands.
        kernel_size: taps of a filter, odd so that it is symmetric about a sample.
        spacing: mel (narrow bands at low frequencies), inverse-mel (narrow at high ones), or linear.
        learnable: whether training moves the cut-offs.
    """

    def __init__(self, n_filters: int, kernel_size: int, spacing: str = "mel", learnable: bool = False):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 3:
            raise ConfigError(f"sinc kernel of {kernel_size} taps: expected an odd number from 3 up")
        self.n_filters, self.kernel_size = n_filters, kernel_size
        self.spacing, self.learnable = spacing, learnable
        edges = band_edges_hz(n_filters, spacing)
        low_hz, high_hz = edges[:-1], edges[1:]
        if learnable:
            self.low_khz = nn.Parameter((low_hz / 1000).float())
            self.width_khz = nn.Parameter(((high_hz - low_hz) / 1000).float())
        else:
            # In single precision, as the published weights heard them: double moves logits by 4e-5.
            fixed = band_pass_filters(low_hz.float(), high_hz.float(), kernel_size)
            self.register_buffer("fixed_filters", fixed, persistent=False)

    def cutoffs_hz(self) -> tuple[Tensor, Tensor]:
        """Lower and upper cut-off of every band, each (n_filters,), between 0 and half the sample rate."""
        nyquist_hz = SAMPLE_RATE_HZ / 2
        if not self.learnable:
            edges = band_edges_hz(self.n_filters, self.spacing)
            return edges[:-1], edges[1:]
        low_hz = (1000 * self.low_khz.abs()).clamp(max=nyquist_hz)
        return low_hz, (low_hz + 1000 * self.width_khz.abs()).clamp(max=nyquist_hz)

    def filters(self) -> Tensor:
        """The impulse responses as they stand, (n_filters, kernel_size) in float32."""
        if not self.learnable:
            return self.fixed_filters
        with torch.autocast(self.low_khz.device.type, enabled=False):
            return band_pass_filters(*self.cutoffs_hz(), self.kernel_size)

    def fix_(self) -> None:
        """Make the filters as they stand constant: an exported graph need not compute them from cut-offs."""
        self.register_buffer("fixed_filters", self.filters().detach(), persistent=False)
        self.learnable = False

    def frequency_response(self, n_points: int = 512) -> tuple[Tensor, Tensor]:
        """Magnitude of every filter on a grid of frequencies, for drawing.

        Returns:
            frequencies (n_points,) in Hz up to half the sample rate, and magnitudes (n_filters, n_points);
            1 is unchanged.
        """
        frequencies_hz = torch.linspace(0, SAMPLE_RATE_HZ / 2, n_points, dtype=torch.float64)
        taps = self.filters().detach().double().cpu()
        n = torch.arange(self.kernel_size, dtype=torch.float64)
        waves = torch.exp(-2j * math.pi * frequencies_hz[:, None] * n / SAMPLE_RATE_HZ)
        return frequencies_hz.float(), (taps.to(waves.dtype) @ waves.T).abs().float()

    def forward(self, waveform: Tensor, band_mask: Tensor | None = None) -> Tensor:
        """Filter (B, T) waveforms into (B, n_filters, T - kernel_size + 1) bands, in float32.

        `band_mask` multiplies the bands: (n_filters,) for the whole batch, or (B, n_filters).
        """
        with torch.autocast(waveform.device.type, enabled=False):  # the bands of quiet speech are small
            waveform = at_least_single(waveform)
            bands = F.conv1d(waveform[:, None], self.filters().to(waveform)[:, None])
        return bands if band_mask is None else bands * band_mask.to(bands)[..., None]

    def pooled(self, waveform: Tensor, band_mask: Tensor | None = None, *, bands: int = 1) -> Tensor:
        """The largest |band| among `bands` neighbours and 3 samples: max-pooling of |forward(waveform)|.

        Without its B x n_filters x T map, where `fast.enabled()`: by matrix products, in a quarter of the time; with
        long filters in the frequency domain, in an eighth.

        Returns:
            (B, n_filters // bands, (T - kernel_size + 1) // 3), float32 or, of a double waveform, double.
        """
        if not fast.enabled():
            return F.max_pool2d(self(waveform, band_mask).abs()[:, None], (bands, 3))[:, 0]
        waveform = at_least_single(waveform)
        with torch.autocast(waveform.device.type, enabled=False):
            if LONG_TAPS <= self.kernel_size <= FFT_POINTS // 2:
                pooled = pooled_by_fft(waveform, self.filters().to(waveform))
                pooled = pooled if band_mask is None else pooled * band_mask.to(pooled)[..., None]
                return pooled if bands == 1 else F.max_pool2d(pooled[:, None], (bands, 1))[:, 0]
            return self._pooled_by_windows(waveform, band_mask, bands)

    def _pooled_by_windows(self, waveform: Tensor, band_mask: Tensor | None, bands: int) -> Tensor:
        """In matrix products of windows of the waveform and the filters at every shift of HOP samples."""
        n_groups, n_frames = self.n_filters // bands, (waveform.shape[1] - self.kernel_size + 1) // 3
        filters = self.filters().to(waveform)[: n_groups * bands]
        window = self.kernel_size + HOP - 1
        # Row p is every filter shifted by p samples: repeating rows of window + 1 and cutting at window does it.
        shifted = F.pad(filters, (0, HOP)).repeat(1, HOP)[:, : HOP * window]
        shifted = shifted.view(n_groups, bands, HOP // 3, 3, window)
        shifted = shifted.permute(4, 3, 1, 2, 0).reshape(window, -1)  # columns: sample, band | frame, group
        n_windows = -(-3 * n_frames // HOP)
        padding = (n_windows - 1) * HOP + window - waveform.shape[1]
        windows = F.pad(waveform, (0, max(padding, 0))).unfold(1, window, HOP)[:, :n_windows]
        mask = None
        if band_mask is not None:
            mask = band_mask.to(filters)[..., : n_groups * bands].unflatten(-1, (n_groups, bands)).mT
            mask = mask.expand(len(waveform), bands, n_groups)[:, None, None, :, None]
        frames = [self._pooled_windows(part, shifted, mask, bands) for part in windows.split(WINDOWS_AT_ONCE, 1)]
        return torch.cat(frames, 1)[:, :n_frames].transpose(1, 2)

    @staticmethod
    def _pooled_windows(windows: Tensor, shifted: Tensor, mask: Tensor | None, bands: int) -> Tensor:
        """(B, M, window) -> (B, M * HOP // 3, groups)."""
        responses = (windows @ shifted).view(*windows.shape[:2], 3, bands, HOP // 3, -1)
        if mask is not None:
            responses = responses * mask
        return responses.abs().flatten(2, 3).amax(2).flatten(1, 2)

    def extra_repr(self) -> str:
        kind = "learnable" if self.learnable else "fixed"
        return f"{self.n_filters}, {self.kernel_size} taps, {self.spacing}, {kind}"


def pooled_by_fft(waveform: Tensor, filters: Tensor) -> Tensor:
    """Correlate waveforms with long filters; keep the largest magnitude of every 3 samples.

    In the frequency domain, block by block (overlap-save). The same numbers, to rounding, as a convolution, which
    with 1,025 taps is half of RawNet2's time on a CPU; and float32 also on GPUs whose convolutions are not.

    Args:
        waveform: (B, T), in single or double precision.
        filters: of that precision, (C, K) with K at most half of `FFT_POINTS` and at most T.

    Returns:
        (B, C, (T - K + 1) // 3).
    """
    n_taps = filters.shape[1]
    n_frames = (waveform.shape[1] - n_taps + 1) // 3
    n_kept = (FFT_POINTS - n_taps + 1) // 3 * 3  # samples of a block that its circular edge leaves untouched
    n_blocks = -(-3 * n_frames // n_kept)
    n_missing = (n_blocks - 1) * n_kept + FFT_POINTS - waveform.shape[1]
    blocks = F.pad(waveform, (0, max(n_missing, 0))).unfold(1, FFT_POINTS, n_kept)[:, :n_blocks]
    spectra = torch.fft.rfft(blocks).flatten(0, 1)[:, None]  # (B * blocks, 1, bins)
    response = torch.fft.rfft(filters, n=FFT_POINTS).conj()
    parts = [
        F.max_pool1d(torch.fft.irfft(part * response, n=FFT_POINTS)[..., :n_kept].abs(), 3)
        for part in spectra.split(BLOCKS_AT_ONCE if waveform.is_cpu else len(spectra))
    ]
    frames = torch.cat(parts).unflatten(0, (len(waveform), n_blocks))
    return frames.transpose(1, 2).flatten(2)[..., :n_frames]
