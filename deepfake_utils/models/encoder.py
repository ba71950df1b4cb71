"""The encoder of AASIST: a sinc bank and residual blocks over bands and frames.

The first block's maps are large (24 bands x 21,490 frames x 32 channels, 66 MB for 4 seconds) and a plain run
spends its time moving them through memory. `models.fast` computes the same in tiles, where it applies;
`ResidualBlock.plain` is the definition, which the tests compare with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models import fast
from deepfake_utils.models.fast.blocks import run_block
from deepfake_utils.models.sinc import SincFilters


@dataclass(frozen=True)
class EncoderConfig:
    """Everything that shapes the encoder; the defaults are the published AASIST's."""

    sinc_filters: int = 70
    sinc_taps: int = 129
    sinc_spacing: str = "mel"
    sinc_learnable: bool = False
    channels: tuple[int, ...] = (32, 32, 64, 64, 64, 64)  # of each block
    recompute: bool = False  # train in less memory, more time; see `Encoder`

    def __post_init__(self):
        if self.sinc_filters < 3 or not self.channels or min(self.channels) < 2:
            raise ConfigError(
                f"encoder of {self.sinc_filters} filters, channels {self.channels}: expected 3 filters or more "
                "(they are pooled by threes) and one block or more, each of 2 channels or more"
            )


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
        hidden = self.norm(self.conv1(x))
        hidden = F.selu(hidden, inplace=not fast.hooked(self.norm))  # a hook may keep what the norm gave
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

    The largest of every three bands of the bank is one band of the maps. With `config.recompute`, training keeps only
    the input of each block and computes the rest again for the gradient: about a quarter more time for a fraction of
    the memory.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.sinc = SincFilters(config.sinc_filters, config.sinc_taps, config.sinc_spacing, config.sinc_learnable)
        self.norm = nn.BatchNorm2d(1)
        channels = config.channels
        self.blocks = nn.ModuleList(ResidualBlock(*pair) for pair in zip((1, *channels[:-1]), channels, strict=True))
        self.recompute = config.recompute
        self.n_bands = self.sinc.n_filters // 3
        self.min_samples = 2 * 3 ** (len(channels) + 1) + self.sinc.kernel_size - 1  # two frames come out

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
