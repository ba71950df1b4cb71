"""The encoder of AASIST: a sinc bank and residual blocks, arranged so that a processor's cache holds the work.

The first block's maps are large (24 bands x 21,490 frames x 32 channels, 66 MB for 4 seconds) and a plain run
spends its time moving them through memory. Three things avoid that, and change no result beyond rounding:

- blocks run over tiles of a few hundred frames where every intermediate result stays in cache;
- the batch norm after a convolution is folded into it: in evaluation always, and in training in the first
  block, where the statistics of the convolution's output follow from those of its six inputs;
- the first block keeps nothing for the backward pass but its input, and recomputes tile by tile.

`ResidualBlock.plain` is the definition; the tests compare everything else with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepfake_utils.frontends.sinc import SincFilters

TILE_FRAMES = 768  # of one utterance with 24 bands and 32 channels: 2.4 MB
TILE_ROWS = 24 * TILE_FRAMES
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # arXiv 1706.02515, equation 14


class Tile(NamedTuple):
    """Some output frames of a block for some utterances of a batch."""

    utterances: slice
    start: int
    stop: int
    n_frames: int  # of the block's input

    def cut(self, x: Tensor) -> Tensor:
        """The input frames these output frames depend on: two more on either side, where there are any."""
        return x[self.utterances, :, :, max(3 * self.start - 2, 0) : 3 * self.stop + 2]

    def pad(self, part: Tensor) -> Tensor:
        """`cut`, with zeros for the frames that lie outside of the map."""
        before, after = max(2 - 3 * self.start, 0), max(3 * self.stop + 2 - self.n_frames, 0)
        return F.pad(part, (before, after)) if before or after else part

    def clear_outside(self, hidden: Tensor) -> Tensor:
        """Set to zero, in place, those of the frames [3 start - 1, 3 stop + 1) that lie outside of the map."""
        if self.start == 0:
            hidden[..., :1] = 0
        if 3 * self.stop == self.n_frames:
            hidden[..., -1:] = 0
        return hidden


def tiles_of(x: Tensor) -> Iterator[Tile]:
    """Cut the work of a block on x (B, channels, bands, frames) into tiles of about TILE_FRAMES input frames."""
    n_frames = x.shape[3]
    n_out, length = n_frames // 3, TILE_FRAMES // 3
    at_once = max(TILE_FRAMES // n_frames, 1)
    for first in range(0, len(x), at_once):
        for start in range(0, n_out, length):
            yield Tile(slice(first, first + at_once), start, min(start + length, n_out), n_frames)


def run_tiles(run: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """Put together what `run(tile.cut(x), tile, *parameters)` returns for every tile of x, without gradient."""
    whole = None
    with torch.no_grad():
        for tile in tiles_of(x):
            part = run(tile.cut(x), tile, *parameters)
            if whole is None:
                shape = (len(x), *part.shape[1:3], x.shape[3] // 3)
                whole = torch.empty(shape, dtype=part.dtype, memory_format=torch.channels_last)
            whole[tile.utterances, :, :, tile.start : tile.stop] = part
    return whole


class RecomputedTiles(torch.autograd.Function):
    """`run_tiles` that keeps only its inputs; the backward pass runs each tile again for its gradient."""

    @staticmethod
    def forward(ctx, run, x, *parameters):
        ctx.run = run
        ctx.autocast_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        ctx.save_for_backward(x, *parameters)
        return run_tiles(run, x, *parameters)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *parameters = (tensor.detach() for tensor in ctx.saved_tensors)
        parameters = [parameter.requires_grad_() for parameter in parameters]
        x_grad = torch.zeros_like(x)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        autocast = torch.autocast("cpu", dtype=ctx.autocast_dtype, enabled=ctx.autocast_dtype is not None)
        with torch.enable_grad(), autocast:
            for tile in tiles_of(x):
                part = tile.cut(x).detach().requires_grad_()
                out = ctx.run(part, tile, *parameters)
                out_grad = grad[tile.utterances, :, :, tile.start : tile.stop]
                part_grad, *grads = torch.autograd.grad(out, [part, *parameters], out_grad)
                tile.cut(x_grad).add_(part_grad)
                for total, value in zip(sums, grads, strict=True):
                    total.add_(value)
        return None, x_grad, *sums


class NormSELU(torch.autograd.Function):
    """Batch norm with the batch's own statistics, then SELU, on channels-last maps; also the mean and variance.

    PyTorch's batch norm adds up channels-last maps one value after another on a CPU: in single precision the
    mean of 330,000 values is off in the fourth digit, and the logits with it. This adds in blocks, and does
    each pass block by block so that a block is read from memory once.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        blocks = rows.split(TILE_ROWS)
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean = torch.stack([block.sum(0, dtype=dtype) for block in blocks]).sum(0) / len(rows)
        var = torch.stack([(block - mean).square_().sum(0) for block in blocks]).sum(0) / len(rows)
        scale = weight * (var + eps).rsqrt()
        shift = bias - mean * scale
        out = torch.empty_like(rows)
        for block, out_block in zip(blocks, out.split(TILE_ROWS), strict=True):
            out_block.copy_(F.selu(torch.addcmul(shift, block.to(dtype), scale), inplace=True))
        out = out.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        ctx.save_for_backward(x, out, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean_grad, _var_grad):
        x, out, weight, mean, inverse_deviation = ctx.saved_tensors
        rows, out, grad = (t.permute(0, 2, 3, 1).flatten(0, 2).split(TILE_ROWS) for t in (x, out, grad))
        bias_grad, weight_grad = torch.zeros_like(mean), torch.zeros_like(mean)
        x_grad = torch.empty_like(x, memory_format=torch.channels_last)
        inner = x_grad.permute(0, 2, 3, 1).flatten(0, 2).split(TILE_ROWS)
        for row, out_row, grad_row, inner_row in zip(rows, out, grad, inner, strict=True):
            slope = torch.where(out_row > 0, SELU_SCALE, out_row + SELU_SCALE * SELU_ALPHA)
            torch.mul(grad_row, slope, out=inner_row)
            bias_grad += inner_row.sum(0)
            weight_grad += ((row - mean) * inner_row).sum(0)
        weight_grad *= inverse_deviation
        scale, n = weight * inverse_deviation, sum(map(len, rows))
        slope = -scale * inverse_deviation * weight_grad / n
        constant = -scale * bias_grad / n - slope * mean
        for row, inner_row in zip(rows, inner, strict=True):
            inner_row.mul_(scale).addcmul_(row, slope).add_(constant)
        return x_grad, weight_grad, bias_grad, None


def count_batch(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, n_values: int) -> None:
    """Move the running statistics of `norm` towards a batch's, as nn.BatchNorm2d does in training."""
    if not norm.track_running_stats:
        return
    with torch.no_grad():
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(var * (n_values / (n_values - 1)), momentum)


def largest_of_three(x: Tensor) -> Tensor:
    """The largest of every 3 frames, the last one or two left over not counting."""
    if torch.is_grad_enabled():
        return F.max_pool2d(x, (1, 3))
    stop = x.shape[3] // 3 * 3  # without a gradient no index is needed, and slices are several times faster
    largest = torch.maximum(x[..., 0:stop:3], x[..., 1:stop:3])
    return torch.maximum(largest, x[..., 2:stop:3], out=largest)


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals `conv` followed by `norm` with these statistics."""
    scale = norm.weight * (var + norm.eps).rsqrt()
    return conv.weight * scale[:, None, None, None], norm.bias + (conv.bias - mean) * scale


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

    def plain(self, x: Tensor) -> Tensor:
        """The block as defined, on whole maps: what an exported graph holds and what GPUs run."""
        hidden = F.selu(self.norm(self.conv1(x)), inplace=True)
        return F.max_pool2d(self.conv2(hidden) + self.shortcut(x), (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, bands, frames) -> (B, out_channels, bands, frames // 3)."""
        if not x.is_cpu or torch.jit.is_tracing():
            return self.plain(x)
        if self.training:
            hidden = self.conv1(x)
            hidden, mean, var = NormSELU.apply(hidden, self.norm.weight, self.norm.bias, self.norm.eps)
            count_batch(self.norm, mean, var, hidden[:, 0].numel())
            return F.max_pool2d(self.conv2(hidden).add_(self.shortcut(x)), (1, 3))
        if torch.is_grad_enabled():
            return self.plain(x)
        folded = fold_norm(self.conv1, self.norm, self.norm.running_mean, self.norm.running_var)
        return run_tiles(self._tile, x, *folded)

    def _tile(self, part: Tensor, tile: Tile, weight: Tensor, bias: Tensor) -> Tensor:
        part = tile.pad(part)
        hidden = F.conv2d(part, weight, bias, padding=(1, 0))
        hidden = F.selu(tile.clear_outside(hidden), inplace=True)
        out = F.conv2d(hidden, self.conv2.weight, self.conv2.bias)
        if isinstance(self.shortcut, nn.Identity):
            return largest_of_three(out.add_(part[..., 2:-2]))
        return largest_of_three(out.add_(F.conv2d(part[..., 1:-1], self.shortcut.weight, self.shortcut.bias)))


class FirstBlock(ResidualBlock):
    """The residual block on the single channel of the sinc map, by matrix products of its 2 x 3 patches."""

    def __init__(self, out_channels: int):
        super().__init__(1, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, bands, frames) -> (B, out_channels, bands, frames // 3), channels last in memory."""
        if torch.jit.is_tracing():
            return self.plain(x)
        weight, bias = fold_norm(self.conv1, self.norm, *self._statistics(x))
        parameters = weight, bias, self.conv2.weight, self.conv2.bias, self.shortcut.weight, self.shortcut.bias
        if not x.is_cpu:
            return self._tile(x, Tile(slice(None), 0, x.shape[3] // 3, x.shape[3]), *parameters)
        run = RecomputedTiles.apply if torch.is_grad_enabled() else run_tiles
        return run(self._tile, x, *parameters)

    def _tile(self, part, tile, weight, bias, weight2, bias2, shortcut_weight, shortcut_bias) -> Tensor:
        x = F.pad(tile.pad(part)[:, 0], (0, 0, 1, 1))
        n_rows, n_frames = x.shape[1] - 1, x.shape[2] - 2
        patches = torch.stack([x[:, i : i + n_rows, j : j + n_frames] for i in (0, 1) for j in (0, 1, 2)])
        hidden = torch.addmm(bias, patches.flatten(1).T, weight.flatten(1).T)
        hidden = hidden.view(len(x), n_rows, n_frames, -1).permute(0, 3, 1, 2)
        hidden = F.selu(tile.clear_outside(hidden), inplace=True)
        out = F.conv2d(hidden, weight2, bias2).permute(0, 2, 3, 1)
        rows = patches[3:, :, :-1, 1:-1].flatten(1).T  # a patch's lower row is the row its output row adds
        out = out.add_(torch.addmm(shortcut_bias, rows, shortcut_weight.flatten(1).T).view_as(out))
        return largest_of_three(out.permute(0, 3, 1, 2)[..., : 3 * (tile.stop - tile.start)])

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of conv1(x) in every channel: the batch's in training, else the running ones."""
        norm = self.norm
        if not self.training:
            return norm.running_mean, norm.running_var
        with torch.autocast(x.device.type, enabled=False):
            patch_mean, patch_cov = checkpoint(patch_moments, x, use_reentrant=False, preserve_rng_state=False)
            taps = self.conv1.weight.flatten(1).double()
            mean = (taps @ patch_mean).float() + self.conv1.bias
            var = ((taps @ patch_cov) * taps).sum(1).float()
        count_batch(norm, mean, var, x.numel() // x.shape[2] * (x.shape[2] + 1))
        return mean, var


def patch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (6,) and covariance (6, 6) of the 2 x 3 patches of x (B, 1, bands, frames), zeros around it.

    In double precision: neighbouring frames are alike, and a filter that takes their difference has a variance
    far below those it is computed from.
    """
    rows = F.pad(x[:, 0].double(), (1, 1)).unfold(2, 3, 1)  # (B, bands, frames, 3)
    n_patches = x.numel() // x.shape[2] * (x.shape[2] + 1)
    within = torch.einsum("brti,brtj->ij", rows, rows)
    across = torch.einsum("brti,brtj->ij", rows[:, :-1], rows[:, 1:])
    second = torch.cat([torch.cat([within, across], 1), torch.cat([across.T, within], 1)]) / n_patches
    mean = rows.sum((0, 1, 2)).repeat(2) / n_patches
    return mean, second - torch.outer(mean, mean)


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
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
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
