"""The encoder of AASIST: a sinc bank and residual blocks over bands and frames.

The first block's maps are large (24 bands x 21,490 frames x 32 channels, 66 MB for 4 seconds) and a plain run
spends its time moving them through memory. `models.fast` computes the same in tiles, where it applies;
`ResidualBlock.plain` is the definition, which the tests compare with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepfake_utils.models import fast
from deepfake_utils.models.fast.blocks import run_block
from deepfake_utils.models.sinc import SincFilters


class ResidualBlock(nn.Module):
    """conv, batch norm, SELU, conv, plus the input; then the largest of every 3 frames."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        if in_channels > 1:
            self.unused_norm = nn.BatchNorm2d(in_channels)  # see "Differences from the paper" of AASIST
        self.conv1 = nn.Conv2d(in_channels, out_channels, (2, 3), padding=(1, 1))
        self.norm = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, (2, 3), padding=(0, 1))
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, bands, frames) -> (B, out_channels, bands, frames // 3)."""
        return run_block(self, x) if fast.applies(self, x) else self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """The block as defined, on whole maps."""
        hidden = F.selu(self.norm(self.conv1(x)), inplace=True)
        return F.max_pool2d(self.conv2(hidden) + self.shortcut(x), (1, 3))


@contextmanager
def _statistics_kept(norm: nn.BatchNorm2d) -> Iterator[None]:
    """Let a recomputation use the batch's statistics without counting the batch twice."""
    tracked = norm.track_running_stats
    norm.track_running_stats = False
    try:
        yield
    finally:
        norm.track_running_stats = tracked


class Encoder(nn.Module):
    """The sinc bank and the residual blocks: (B, T) waveforms -> (B, channels, bands, frames).

    Args:
        sinc: the filter bank; every three of its bands become one.
        channels: output channels of each block.
        recompute: in training, keep only the input of each block and compute the rest again for the gradient:
            about a quarter more time for a fraction of the memory.
    """

    def __init__(self, sinc: SincFilters, channels: tuple[int, ...], recompute: bool = False):
        super().__init__()
        self.sinc = sinc
        self.norm = nn.BatchNorm2d(1)
        self.blocks = nn.ModuleList(ResidualBlock(*pair) for pair in zip((1, *channels[:-1]), channels, strict=True))
        self.recompute = recompute
        self.n_bands = sinc.n_filters // 3
        self.min_samples = 2 * 3 ** (len(channels) + 1) + sinc.kernel_size - 1  # two frames come out

    def forward(self, waveform: Tensor, band_mask: Tensor | None = None) -> Tensor:
        """Encode (B, T) waveforms; `band_mask` as in `SincFilters`."""
        x = F.selu(self.norm(self.sinc.pooled(waveform, band_mask, bands=3)[:, None]))
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            x = self._recomputed(block, x) if recompute and i > 0 else block(x)
        return x

    @staticmethod
    def _recomputed(block: ResidualBlock, x: Tensor) -> Tensor:
        """block(x), of which the backward pass keeps x alone. (The first block's kernel does so by itself.)"""

        def contexts():
            return nullcontext(), _statistics_kept(block.norm)

        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
