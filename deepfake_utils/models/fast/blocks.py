"""A residual block of `models.encoder` by its kernels: batch norms folded into convolutions, then tiles.

A batch norm after a convolution is one convolution with it: in scoring always, and in training in the first block,
where the statistics of the convolution's output follow from those of its six inputs: w . p + b has mean
w . mean(p) + b and variance w' cov(p) w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils.models.fast.fused import FirstBlockTiles, LaterBlockTiles, PatchMoments, run_later
from deepfake_utils.models.fast.tiling import pool_tiles


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """What `block.plain(x)` gives, where `fast.applies(block, x)`.

    (B, in_channels, bands, frames) -> (B, out_channels, bands, frames // 3), channels last in memory.
    """
    run = first_block if block.conv1.in_channels == 1 else later_block
    return run(block, x.transpose(2, 3)).transpose(2, 3)


def first_block(block: nn.Module, x: Tensor) -> Tensor:
    """On the single channel of the sinc map, (B, 1, frames, bands), by matrix products of its patches."""
    x = x.contiguous()
    weight, bias = fold_norm(block.conv1, block.norm, *_statistics(block, x))
    if not x.is_cpu:
        return whole_first_block(block, x, weight, bias)
    parameters = weight, bias, *second_half_of(block)
    if torch.is_grad_enabled():
        return FirstBlockTiles.apply(x, *parameters)
    return pool_tiles(FirstBlockTiles.run, x, *parameters).largest


def whole_first_block(block: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The first block without tiles, its norm folded in: a GPU wants whole maps, channels last."""
    hidden = F.selu(F.conv2d(x, weight, bias, padding=(1, 1)), inplace=True).transpose(2, 3)
    out = block.conv2(hidden.contiguous(memory_format=torch.channels_last))
    return F.max_pool2d(out + block.shortcut(x.transpose(2, 3)), (1, 3)).transpose(2, 3)


def later_block(block: nn.Module, x: Tensor) -> Tensor:
    """On a map of several channels, (B, channels, frames, bands)."""
    x = x.contiguous(memory_format=torch.channels_last)
    norm = block.norm
    if not block.training:
        folded = fold_norm(block.conv1, norm, norm.running_mean, norm.running_var)
        return pool_tiles(run_later, x, *folded, *second_half_of(block)).largest
    parameters = *kernel_of(block.conv1), norm.weight, norm.bias, norm.eps, *second_half_of(block)
    out, mean, var = LaterBlockTiles.apply(x, *parameters)
    move_running_statistics(norm, mean, var, values_per_channel(x))
    return out


def kernel_of(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight, for maps (B, channels, frames, bands), and bias of a convolution."""
    return conv.weight.transpose(2, 3), conv.bias


def second_half_of(block: nn.Module) -> tuple[Tensor, ...]:
    """`kernel_of` conv2 and, where the shortcut is a convolution, its weight; one bias for both."""
    weight, bias = kernel_of(block.conv2)
    if isinstance(block.shortcut, nn.Identity):
        return weight, bias
    shortcut_weight, shortcut_bias = kernel_of(block.shortcut)
    return weight, bias + shortcut_bias, shortcut_weight


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """`kernel_of` the one convolution that equals `conv` followed by `norm` with these statistics."""
    weight, bias = kernel_of(conv)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return weight * scale[:, None, None, None], norm.bias + (bias - mean) * scale


def _statistics(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of conv1(x) in every channel: the batch's in training, else the running ones."""
    norm = block.norm
    if not block.training:
        return norm.running_mean, norm.running_var
    with torch.autocast(x.device.type, enabled=False):
        patch_mean, patch_cov = PatchMoments.apply(x)
        weight, bias = kernel_of(block.conv1)
        taps = weight.flatten(1).double()
        mean = (taps @ patch_mean).to(x.dtype) + bias
        var = ((taps @ patch_cov) * taps).sum(1).to(x.dtype)
    move_running_statistics(norm, mean, var, values_per_channel(x))
    return mean, var


def move_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, n_values: int) -> None:
    """Move the running statistics of `norm` towards a batch's, as nn.BatchNorm2d does in training."""
    if not norm.track_running_stats:
        return
    with torch.no_grad():
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(var * (n_values / (n_values - 1)), momentum)


def values_per_channel(x: Tensor) -> int:
    """Values in a channel of conv1's output, which has one band more than its input x (B, channels, frames, bands)."""
    return len(x) * x.shape[2] * (x.shape[3] + 1)
