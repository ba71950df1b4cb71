"""The encoder of AASIST: a sinc bank and residual blocks, arranged so that a processor's cache holds the work.

The first block's maps are large (24 bands x 21,490 frames x 32 channels, 66 MB for 4 seconds) and a plain run
spends its time moving them through memory. On a CPU, three things avoid that and change no result beyond rounding:

- blocks run over tiles of a few hundred frames, whose intermediate results stay in cache (`tiling`, `fused`);
- the batch norm after a convolution is folded into it: in evaluation always, and in training in the first
  block, where the statistics of the convolution's output follow from those of its six inputs;
- what the backward pass needs is mostly computed again, tile by tile, and not kept.

`ResidualBlock.plain` is the definition; the tests compare everything else with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepfake_utils.models.fast.fused import FirstBlockTiles, LaterBlockTiles, PatchMoments, run_block
from deepfake_utils.models.fast.tiling import run_tiles
from deepfake_utils.models.sinc import SincFilters

# Of an exported graph: 48 take 0.84 to 0.89 of the time of one, for 1 to 16 clips of 4 s; for 16 clips 24 gain nothing.
PIECES = 48
BLOCKS_IN_PIECES = 2  # a third makes it slower again: the frames computed twice weigh more, its maps are small


def count_batch(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, n_values: int) -> None:
    """Move the running statistics of `norm` towards a batch's, as nn.BatchNorm2d does in training."""
    if not norm.track_running_stats:
        return
    with torch.no_grad():
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(var * (n_values / (n_values - 1)), momentum)


def n_values(x: Tensor) -> int:
    """Values in a channel of conv1's output, which has one band more than its input x (B, channels, frames, bands)."""
    return len(x) * x.shape[2] * (x.shape[3] + 1)


def frames_first(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution for maps (B, channels, frames, bands), as in `tiling`."""
    return conv.weight.transpose(2, 3), conv.bias


def fold_shortcut(conv: nn.Conv2d, shortcut: nn.Conv2d | None) -> tuple[Tensor, ...]:
    """`frames_first` of conv and of the shortcut, with one bias for both."""
    weight, bias = frames_first(conv)
    if shortcut is None:
        return weight, bias
    shortcut_weight, shortcut_bias = frames_first(shortcut)
    return weight, bias + shortcut_bias, shortcut_weight


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """`frames_first` of the one convolution that equals `conv` followed by `norm` with these statistics."""
    weight, bias = frames_first(conv)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return weight * scale[:, None, None, None], norm.bias + (bias - mean) * scale


class ResidualBlock(nn.Module):
    """conv, batch norm, SELU, conv, plus the input; then the largest of every 3 frames."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        if in_channels > 1:
            self.unused_norm = nn.BatchNorm2d(in_channels)  # see "Differences from the paper" of AASIST
        self.conv1 = nn.Conv2d(in_channels, out_channels, (2, 3), padding=(1, 1))
        self.norm = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, (2, 3), padding=(0, 1))
        self.widens = in_channels != out_channels
        self.shortcut = nn.Identity()
        if self.widens:
            self.shortcut = nn.Conv2d(in_channels, out_channels, (1, 3), padding=(0, 1))

    def plain(self, x: Tensor) -> Tensor:
        """The block as defined, on whole maps: what an exported graph holds, and GPUs run after the first block."""
        hidden = F.selu(self.norm(self.conv1(x)), inplace=True)
        return F.max_pool2d(self.conv2(hidden) + self.shortcut(x), (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, bands, frames) -> (B, out_channels, bands, frames // 3)."""
        if not x.is_cpu or torch.jit.is_tracing() or (torch.is_grad_enabled() and not self.training):
            return self.plain(x)
        x = x.transpose(2, 3).contiguous(memory_format=torch.channels_last)
        convs = fold_shortcut(self.conv2, self.shortcut if self.widens else None)
        if self.training:
            norm = self.norm.weight, self.norm.bias, self.norm.eps
            out, mean, var = LaterBlockTiles.apply(x, *frames_first(self.conv1), *norm, *convs)
            count_batch(self.norm, mean, var, n_values(x))
            return out.transpose(2, 3)
        weight, bias = fold_norm(self.conv1, self.norm, self.norm.running_mean, self.norm.running_var)
        return run_tiles(run_block, x, weight, bias, *convs).largest.transpose(2, 3)


class FirstBlock(ResidualBlock):
    """The residual block on the single channel of the sinc map, by matrix products of its patches."""

    def __init__(self, out_channels: int):
        super().__init__(1, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, bands, frames) -> (B, out_channels, bands, frames // 3), channels last in memory."""
        over_processes = self.training and isinstance(self.norm, nn.SyncBatchNorm)
        if torch.jit.is_tracing() or over_processes:
            return self.plain(x)
        x = x.transpose(2, 3).contiguous()
        weight, bias = fold_norm(self.conv1, self.norm, *self._statistics(x))
        if not x.is_cpu:
            return self._whole(x, weight, bias)
        parameters = weight, bias, *fold_shortcut(self.conv2, self.shortcut)
        if not torch.is_grad_enabled():
            return run_tiles(FirstBlockTiles.run, x, *parameters).largest.transpose(2, 3)
        return FirstBlockTiles.apply(x, *parameters).transpose(2, 3)

    def _whole(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The block on x (B, 1, frames, bands) without tiles: a GPU wants whole maps, channels last."""
        hidden = F.selu(F.conv2d(x, weight, bias, padding=(1, 1)), inplace=True).transpose(2, 3)
        out = self.conv2(hidden.contiguous(memory_format=torch.channels_last))
        return F.max_pool2d(out + self.shortcut(x.transpose(2, 3)), (1, 3))

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of conv1(x) in every channel: the batch's in training, else the running ones."""
        norm = self.norm
        if not self.training:
            return norm.running_mean, norm.running_var
        with torch.autocast(x.device.type, enabled=False):
            patch_mean, patch_cov = PatchMoments.apply(x)
            taps = frames_first(self.conv1)[0].flatten(1).double()
            mean = (taps @ patch_mean).to(x.dtype) + self.conv1.bias
            var = ((taps @ patch_cov) * taps).sum(1).to(x.dtype)
        count_batch(norm, mean, var, n_values(x))
        return mean, var


@contextmanager
def _statistics_frozen(norm: nn.BatchNorm2d) -> Iterator[None]:
    """Let a recomputation use the batch's statistics without counting the batch twice."""
    norm.track_running_stats = False
    try:
        yield
    finally:
        norm.track_running_stats = True


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
        blocks = [ResidualBlock(*pair) for pair in zip(channels[:-1], channels[1:], strict=True)]
        self.blocks = nn.ModuleList([FirstBlock(channels[0]), *blocks])
        self.recompute = recompute
        self.n_bands = sinc.n_filters // 3
        self.min_samples = 2 * 3 ** (len(channels) + 1) + sinc.kernel_size - 1  # two frames come out

    def forward(self, waveform: Tensor, band_mask: Tensor | None = None) -> Tensor:
        """Encode (B, T) waveforms; `band_mask` as in `SincFilters`."""
        x = F.selu(self.norm(self.sinc.pooled(waveform, band_mask, bands=3)[:, None]))
        if torch.jit.is_tracing():
            x, later = self._start_in_pieces(x), self.blocks[BLOCKS_IN_PIECES:]
        else:
            x, later = self.blocks[0](x), self.blocks[1:]
        for block in later:
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(
                    block,
                    x,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=lambda block=block: (nullcontext(), _statistics_frozen(block.norm)),
                )
            else:
                x = block(x)
        return x

    def _start_in_pieces(self, x: Tensor) -> Tensor:
        """The first blocks in an exported graph, whose runtime knows nothing of tiles.

        A frame depends on `step` frames of x and on fewer on either side of them. So a piece is computed with one
        frame more on either side; these two, which padding spoils, are cut again.
        """
        blocks = self.blocks[:BLOCKS_IN_PIECES]
        step = 3 ** len(blocks)
        n_frames = x.shape[3] // step
        n_pieces = min(PIECES, 2 * 3 ** (len(self.blocks) - len(blocks)))  # the frames of the shortest waveform
        edges = [n_frames * i // n_pieces for i in range(1, n_pieces)]
        starts = [None, *[(edge - 1) * step for edge in edges]]
        stops = [*[(edge + 1) * step for edge in edges], None]
        pieces = [x[..., start:stop] for start, stop in zip(starts, stops, strict=True)]
        for block in blocks:
            pieces = [block(piece) for piece in pieces]
        return torch.cat([pieces[0][..., :-1], *[piece[..., 1:-1] for piece in pieces[1:-1]], pieces[-1][..., 1:]], 3)
