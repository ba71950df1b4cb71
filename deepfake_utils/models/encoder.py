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

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepfake_utils.frontends.sinc import SincFilters
from deepfake_utils.models import tiling
from deepfake_utils.models.tiling import Tile, run_tiles, side_by_side, tiles_of

TILE_ROWS = 24 * tiling.TILE_FRAMES
PLACES = tuple((i, j) for i in (0, 1) for j in (0, 1, 2))  # of the values of a 2 x 3 patch
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # arXiv 1706.02515, equation 14


def selu_(x: Tensor) -> Tensor:
    """F.selu in place: on a CPU F.selu spends most of its time in expm1, and exp is six times faster."""
    if not x.is_cpu:
        return F.selu(x, inplace=True)
    below = x.clamp(max=0).exp_().sub_(1)
    return x.clamp_(min=0).add_(below, alpha=SELU_ALPHA).mul_(SELU_SCALE)


def selu_backward(grad: Tensor, result: Tensor) -> Tensor:
    """The gradient of SELU's argument from that of its result."""
    return torch.ops.aten.elu_backward(grad, SELU_ALPHA, SELU_SCALE, 1, True, result)


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
            out_block.copy_(selu_(torch.addcmul(shift, block.to(dtype), scale)))
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
            inner_row.copy_(selu_backward(grad_row, out_row))
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
    """F.max_pool2d(x, (1, 3)), several times faster as it need not say which of the three it was."""
    stop = x.shape[3] // 3 * 3
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
        if any(tile.padding):
            part = F.pad(part, tile.padding)
        hidden = F.conv2d(part, weight, bias, padding=(1, 0))
        hidden = selu_(tile.clear_outside(hidden))
        out = F.conv2d(hidden, self.conv2.weight, self.conv2.bias)
        if isinstance(self.shortcut, nn.Identity):
            return largest_of_three(out.add_(part[..., 2:-2]))
        return largest_of_three(out.add_(F.conv2d(part[..., 1:-1], self.shortcut.weight, self.shortcut.bias)))


def patches_of(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """(6, B, bands + 1, frames): the six values under a 2 x 3 kernel at every place, each a map of its own.

    Args:
        x: (B, 1, bands, frames); a row of zeros is added on either side.
        padding: frames of zeros to add before and after.
    """
    x = F.pad(x[:, 0], (*padding, 1, 1))
    n_rows, n_frames = x.shape[1] - 1, x.shape[2] - 2
    return torch.stack([x[:, i : i + n_rows, j : j + n_frames] for i, j in PLACES])


def fold_patches(grad: Tensor, padding: tuple[int, int]) -> Tensor:
    """The gradient of `patches_of`'s argument from that of its result."""
    _, batch, n_rows, n_frames = grad.shape
    padded = grad.new_zeros(batch, n_rows + 1, n_frames + 2)
    for (i, j), values in zip(PLACES, grad, strict=True):
        padded[:, i : i + n_rows, j : j + n_frames] += values
    before, after = padding
    return padded[:, None, 1:-1, before : padded.shape[2] - after]


class FirstBlockTiles(torch.autograd.Function):
    """The first block with its norm folded in: keeps only its inputs, and runs each tile again for its gradient.

    Kept whole, its three maps are half of the memory a training step takes, and writing and reading them takes
    longer than computing them twice.
    """

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(x, *parameters)
        return run_tiles(FirstBlockTiles.run, x, *parameters)

    @staticmethod
    def hidden(patches: Tensor, tile: Tile, weight: Tensor, bias: Tensor) -> Tensor:
        """SELU of conv1, (B, channels, bands + 1, frames)."""
        hidden = torch.addmm(bias, patches.flatten(1).T, weight.flatten(1).T)
        hidden = hidden.view(*patches.shape[1:], -1).permute(0, 3, 1, 2)
        return selu_(tile.clear_outside(hidden))

    @staticmethod
    def output(patches, hidden, weight2, bias2, shortcut_weight, shortcut_bias) -> Tensor:
        """conv2 plus the shortcut, before pooling: a patch's lower row is the row that its output row adds."""
        out = F.conv2d(hidden, weight2, bias2 + shortcut_bias).permute(0, 2, 3, 1).contiguous()
        rows = patches[3:, :, :-1, 1:-1].flatten(1).T
        out.view(-1, out.shape[3]).addmm_(rows, shortcut_weight.flatten(1).T)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def run(part, tile, weight, bias, *rest) -> Tensor:
        """The tile's output."""
        patches = patches_of(part, tile.padding)
        hidden = FirstBlockTiles.hidden(patches, tile, weight, bias)
        return largest_of_three(FirstBlockTiles.output(patches, hidden, *rest))

    @staticmethod
    def run_backward(part, tile, grad, weight, bias, *rest) -> tuple[Tensor, ...]:
        """Gradients of the part and of every parameter, from that of the tile's output."""
        patches = patches_of(part, tile.padding)
        hidden = FirstBlockTiles.hidden(patches, tile, weight, bias)
        out = FirstBlockTiles.output(patches, hidden, *rest)
        weight2, bias2, shortcut_weight, _ = rest

        _, index = F.max_pool2d(out, (1, 3), return_indices=True)
        grad = grad.contiguous(memory_format=torch.channels_last)
        out_grad = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, out, (1, 3), (1, 3), (0, 0), (1, 1), False, index
        )
        hidden_grad, weight2_grad, bias2_grad = torch.ops.aten.convolution_backward(
            out_grad, hidden, weight2, bias2.shape, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, True, True)
        )
        hidden_grad = hidden_grad.contiguous(memory_format=torch.channels_last)
        conv1_rows = _rows(tile.clear_outside(selu_backward(hidden_grad, hidden))).flatten(0, 2)
        shortcut_rows = _rows(out_grad).flatten(0, 2)

        patch_grad = (conv1_rows @ weight.flatten(1)).T.reshape(patches.shape)
        shortcut_grad = (shortcut_rows @ shortcut_weight.flatten(1)).T
        patch_grad[3:, :, :-1, 1:-1] += shortcut_grad.reshape(patches[3:, :, :-1, 1:-1].shape)
        part_grad = fold_patches(patch_grad, tile.padding)

        weight_grad = (patches.flatten(1) @ conv1_rows).T.reshape(weight.shape)
        lower = patches[3:, :, :-1, 1:-1].flatten(1)
        shortcut_weight_grad = (lower @ shortcut_rows).T.reshape(shortcut_weight.shape)
        bias_grad = conv1_rows.sum(0)
        return part_grad, weight_grad, bias_grad, weight2_grad, bias2_grad, shortcut_weight_grad, bias2_grad

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        tiles = tiles_of(x)

        def run(tile: Tile):
            tile_grad = grad[tile.utterances, :, :, tile.start : tile.stop]
            return FirstBlockTiles.run_backward(tile.cut(x), tile, tile_grad, *parameters)

        x_grad = torch.zeros_like(x)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for tile, (part_grad, *grads) in zip(tiles, side_by_side(run, tiles), strict=True):
            tile.cut(x_grad).add_(part_grad)
            for total, value in zip(sums, grads, strict=True):
                total.add_(value)
        return x_grad, *sums


def _rows(x: Tensor) -> Tensor:
    """A channels-last map as (B, bands, frames, channels)."""
    return x.permute(0, 2, 3, 1)


class FirstBlock(ResidualBlock):
    """The residual block on the single channel of the sinc map, by matrix products of its 2 x 3 patches."""

    def __init__(self, out_channels: int):
        super().__init__(1, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, bands, frames) -> (B, out_channels, bands, frames // 3), channels last in memory."""
        if torch.jit.is_tracing():
            return self.plain(x)
        weight, bias = fold_norm(self.conv1, self.norm, *self._statistics(x))
        if x.is_cpu:
            return FirstBlockTiles.apply(
                x, weight, bias, self.conv2.weight, self.conv2.bias, self.shortcut.weight, self.shortcut.bias
            )
        hidden = F.selu(F.conv2d(x, weight, bias, padding=(1, 1)), inplace=True)
        return F.max_pool2d(self.conv2(hidden).add_(self.shortcut(x)), (1, 3))

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of conv1(x) in every channel: the batch's in training, else the running ones."""
        norm = self.norm
        if not self.training:
            return norm.running_mean, norm.running_var
        with torch.autocast(x.device.type, enabled=False):
            patch_mean, patch_cov = PatchMoments.apply(x)
            taps = self.conv1.weight.flatten(1).double()
            mean = (taps @ patch_mean).to(x.dtype) + self.conv1.bias
            var = ((taps @ patch_cov) * taps).sum(1).to(x.dtype)
        count_batch(norm, mean, var, x.numel() // x.shape[2] * (x.shape[2] + 1))
        return mean, var


class PatchMoments(torch.autograd.Function):
    """Mean (6,) and covariance (6, 6) of the 2 x 3 patches of x (B, 1, bands, frames), zeros around it.

    In double precision: neighbouring frames are alike, and a filter that takes their difference has a variance
    far below those it is computed from.
    """

    @staticmethod
    def forward(ctx, x):
        rows = F.pad(x[:, 0].double(), (1, 1)).unfold(2, 3, 1)  # (B, bands, frames, 3)
        n_patches = x.numel() // x.shape[2] * (x.shape[2] + 1)
        within = torch.einsum("brti,brtj->ij", rows, rows)
        across = torch.einsum("brti,brtj->ij", rows[:, :-1], rows[:, 1:])
        second = torch.cat([torch.cat([within, across], 1), torch.cat([across.T, within], 1)]) / n_patches
        mean = rows.sum((0, 1, 2)).repeat(2) / n_patches
        ctx.save_for_backward(x, mean)
        return mean, second - torch.outer(mean, mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, mean_grad, cov_grad):
        x, mean = ctx.saved_tensors
        n_patches = x.numel() // x.shape[2] * (x.shape[2] + 1)
        slope = cov_grad + cov_grad.T
        constant = ((mean_grad - slope @ mean) / n_patches).to(x.dtype)
        slope = (slope / n_patches).to(x.dtype)
        grads = []
        for part in x.split(1 if x.is_cpu else len(x)):
            patches = patches_of(part, (1, 1))
            grad = torch.addmm(constant[:, None], slope, patches.flatten(1)).view_as(patches)
            grads.append(fold_patches(grad, (1, 1)))
        return torch.cat(grads)


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
