"""The arithmetic of AASIST's residual blocks on a processor, tile by tile, with gradients written out.

Maps are (B, channels, frames, bands), channels last in memory, and kernels (channels, channels, 3 frames, 2 bands);
see `tiling`. What a block is, `models.encoder` says in PyTorch's own operations, and the tests compare both. The gain:
a tile's intermediate results stay in cache, no core waits for another inside a block, and little is kept for the
backward pass. With x = conv1's output, n values a channel, s = sqrt(variance + eps) and hats for the norm's result:

    moments, merged of parts i     n = sum n_i,  mean = sum n_i mean_i / n,
                                   squares = sum squares_i + sum n_i (mean_i - mean)^2  (Chan et al., 1979)
    norm                           y = gamma (x - mean) / s + beta = scale x + shift
    norm, backward                 dbeta = sum dy,  dgamma = sum dy (x - mean) / s,
                                   dx = scale (dy - dbeta / n - (x - mean) / s dgamma / n)
                                      = scale dy + slope x + constant
    pooling                        see `tiling.Pooled`
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepfake_utils.models.fast.tiling import Pooled, Span, empty_map, map_in_threads, pool_tiles, spans_of

PLACES = tuple((i, j) for i in (0, 1, 2) for j in (0, 1))  # of the values of a patch of 3 frames x 2 bands
PLACES_AT_ONCE = 2048  # of a map, in one matrix product: what it reads is still in cache for the next
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # arXiv 1706.02515, equation 14


def selu_backward(grad: Tensor, result: Tensor) -> Tensor:
    """The gradient of SELU's argument from that of its result."""
    return torch.ops.aten.elu_backward(grad, SELU_ALPHA, SELU_SCALE, 1, True, result)


def _rows(x: Tensor) -> Tensor:
    """A channels-last map as (B, frames, bands, channels)."""
    return x.permute(0, 2, 3, 1)


def conv_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and of the bias of a convolution; those not wanted are None."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, weight.shape[:1], (1, 1), padding, (1, 1), False, (0, 0), 1, wanted
    )


def gradient_of_input(grad: Tensor, x: Tensor, weight: Tensor, bands_padding: int) -> Tensor:
    """Gradient of the frames x (n of them) from that of the n + 2 output frames of width-3 kernels they reach."""
    return conv_gradient(grad, x, weight, (2, bands_padding), (True, False, False))[0]


def gradient_of_weight(grad: Tensor, x: Tensor, weight: Tensor, bands_padding: int) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from that of n output frames and the n + 2 input frames they see."""
    if "AVX512" in torch.backends.cpu.get_cpu_capability():  # without it this one takes three times as long
        return conv_gradient(grad, x, weight, (0, bands_padding), (False, True, True))[1:]
    return weight_gradient_by_products(grad, x, weight, bands_padding)


def weight_gradient_by_products(grad: Tensor, x: Tensor, weight: Tensor, bands_padding: int) -> tuple[Tensor, Tensor]:
    """The same by matrix products: a weight's gradient is that of the outputs times the input some places further on.

    Both are laid on one grid of places, with zeros wherever a kernel would reach over an edge into the next row.
    """
    n_out, n_in, height, width = weight.shape
    x, grad = _rows(x), _rows(grad)
    if bands_padding:
        x = F.pad(x, (0, 0, 1, 0))
    n_frames, n_bands = x.shape[1:3]
    grad = F.pad(grad, (0, 0, 0, n_bands - grad.shape[2], 0, n_frames - grad.shape[1])).view(-1, n_out)
    x = x.reshape(-1, n_in)
    steps = [i * n_bands + j for i in range(height) for j in range(width)]
    sums = grad.new_zeros(len(steps), n_out, n_in)
    for part, start in zip(grad.split(PLACES_AT_ONCE), range(0, len(grad), PLACES_AT_ONCE), strict=True):
        for total, step in zip(sums, steps, strict=True):
            seen = x[start + step :][: len(part)]  # fewer at the end, where only zeros are left of `part`
            total.addmm_(part[: len(seen)].T, seen)
    return sums.view(height, width, n_out, n_in).permute(2, 3, 0, 1), grad.sum(0)


def patches_of(x: Tensor) -> Tensor:
    """(6, B, frames, bands + 1): the six values under a 3 x 2 kernel at every place, each a map of its own.

    x: (B, 1, frames + 2, bands); a band of zeros is added on either side.
    """
    x = F.pad(x[:, 0], (1, 1))
    n_frames, n_bands = x.shape[1] - 2, x.shape[2] - 1
    return torch.stack([x[:, i : i + n_frames, j : j + n_bands] for i, j in PLACES])


def fold_patches(grad: Tensor) -> Tensor:
    """The gradient of `patches_of`'s argument from that of its result."""
    _, batch, n_frames, n_bands = grad.shape
    padded = grad.new_zeros(batch, n_frames + 2, n_bands + 1)
    for (i, j), values in zip(PLACES, grad, strict=True):
        padded[:, i : i + n_frames, j : j + n_bands] += values
    return padded[:, None, :, 1:-1]


class FirstBlockTiles(torch.autograd.Function):
    """The first block with its norm folded in: keeps its input and who won the pooling, and computes the rest again.

    Kept whole, its three maps are half of the memory a training step takes, and writing and reading them takes
    longer than computing them twice.
    """

    @staticmethod
    def forward(ctx, x, *parameters):
        pooled = pool_tiles(FirstBlockTiles.run, x, *parameters, with_winners=True)
        ctx.save_for_backward(x, pooled.first, pooled.second, *parameters)
        return pooled.largest

    @staticmethod
    def hidden(patches: Tensor, span: Span, weight: Tensor, bias: Tensor) -> Tensor:
        """SELU of conv1, (B, channels, frames + 2, bands + 1)."""
        hidden = torch.selu_(torch.addmm(bias, patches.flatten(1).T, weight.flatten(1).T))
        return span.clear_outside(hidden.view(*patches.shape[1:], -1).permute(0, 3, 1, 2))

    @staticmethod
    def shortcut_patches(patches: Tensor) -> Tensor:
        """(3, places): what the shortcut's 3 x 1 kernel sees; its band is the upper one of a patch."""
        return patches[1::2, :, 1:-1, :-1].flatten(1)

    @staticmethod
    def run(span, x, weight, bias, weight2, bias2, shortcut_weight) -> Tensor:
        """The span's output, before pooling."""
        patches = patches_of(span.around(x, 2))
        hidden = FirstBlockTiles.hidden(patches, span, weight, bias)
        out = _rows(F.conv2d(hidden, weight2, bias2)).contiguous()
        seen = FirstBlockTiles.shortcut_patches(patches)
        out.view(-1, out.shape[3]).addmm_(seen.T, shortcut_weight.flatten(1).T)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def run_backward(span, x, out_grad, weight, bias, weight2, bias2, shortcut_weight) -> tuple[Tensor, ...]:
        """Gradients of `span.around(x, 2)` and of every parameter, from that of the output before pooling."""
        patches = patches_of(span.around(x, 2))
        hidden = FirstBlockTiles.hidden(patches, span, weight, bias)
        hidden_grad = conv_gradient(out_grad, hidden, weight2, (0, 0), (True, False, False))[0]
        weight2_grad, bias2_grad = gradient_of_weight(out_grad, hidden, weight2, 0)
        rows = _rows(span.clear_outside(selu_backward(hidden_grad, hidden))).flatten(0, 2)
        out_rows = _rows(out_grad).flatten(0, 2)

        patch_grad = (rows @ weight.flatten(1)).T.reshape(patches.shape)
        shortcut_grad = (out_rows @ shortcut_weight.flatten(1)).T
        inner = patch_grad[1::2, :, 1:-1, :-1]
        inner += shortcut_grad.reshape(inner.shape)

        weight_grad = (patches.flatten(1) @ rows).T.reshape(weight.shape)
        seen = FirstBlockTiles.shortcut_patches(patches)
        shortcut_weight_grad = (seen @ out_rows).T.reshape(shortcut_weight.shape)
        return fold_patches(patch_grad), weight_grad, rows.sum(0), weight2_grad, bias2_grad, shortcut_weight_grad

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, first, second, *parameters = ctx.saved_tensors
        pooled, spans = Pooled(grad.contiguous(memory_format=torch.channels_last), first, second), spans_of(x)

        def run(span: Span):
            return FirstBlockTiles.run_backward(span, x, pooled.gradient_around(span, 0), *parameters)

        x_grad = torch.zeros_like(x)
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for span, (part_grad, *grads) in zip(spans, map_in_threads(run, spans), strict=True):
            span.add_around(x_grad, part_grad, 2)
            for total, value in zip(sums, grads, strict=True):
                total.add_(value)
        return x_grad, *sums


class PatchMoments(torch.autograd.Function):
    """Mean (6,) and covariance (6, 6) of the 3 x 2 patches of x (B, 1, frames, bands), zeros around it.

    In double precision: neighbouring frames are alike, and a filter that takes their difference has a variance
    far below those it is computed from.
    """

    @staticmethod
    def forward(ctx, x):
        n_frames, n_bands = x.shape[2:]
        n_patches = len(x) * n_frames * (n_bands + 1)
        padded = F.pad(x[:, 0].double(), (0, 0, 1, 1))
        shifts = torch.stack([padded[:, i : i + n_frames] for i in (0, 1, 2)]).flatten(1, 2)
        # In groups of frames, as matrix products of 3 rows with millions of columns keep one core of a GPU busy.
        groups = F.pad(shifts, (0, 0, 0, -shifts.shape[1] % 512)).unflatten(1, (-1, 512)).transpose(0, 1)
        same = _products(groups, groups)
        next_band = _products(groups[..., :-1], groups[..., 1:])
        second = torch.stack([torch.stack([same, next_band]), torch.stack([next_band.T, same])])
        second = second.permute(2, 0, 3, 1).reshape(6, 6) / n_patches  # from (j, j', i, i') to (i, j), (i', j')
        mean = shifts.sum((1, 2)).repeat_interleave(2) / n_patches
        ctx.save_for_backward(x, mean)
        return mean, second - torch.outer(mean, mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, mean_grad, cov_grad):
        x, mean = ctx.saved_tensors
        n_patches = len(x) * x.shape[2] * (x.shape[3] + 1)
        slope = cov_grad + cov_grad.T
        constant = ((mean_grad - slope @ mean) / n_patches).to(x.dtype)
        slope = (slope / n_patches).to(x.dtype)
        grads = []
        for part in x.split(1 if x.is_cpu else len(x)):
            patches = patches_of(F.pad(part, (0, 0, 1, 1)))
            grad = torch.addmm(constant[:, None], slope, patches.flatten(1)).view_as(patches)
            grads.append(fold_patches(grad)[:, :, 1:-1])
        return torch.cat(grads)


def run_later(span: Span, x: Tensor, weight1, bias1, weight2, bias2, *shortcut) -> Tensor:
    """The span's output, before pooling, of a later block whose norm is folded into the first convolution."""
    part = span.around(x, 2)
    hidden = span.clear_outside(torch.selu_(F.conv2d(part, weight1, bias1, padding=(0, 1))))
    out = F.conv2d(hidden, weight2, bias2)
    return out.add_(F.conv2d(part[:, :, 1:-1], *shortcut) if shortcut else part[:, :, 2:-2])


class LaterBlockTiles(torch.autograd.Function):
    """A residual block in training: also the batch's mean and variance of what it normalises.

    Kept for the backward pass are the input, the first convolution's output, and who won the pooling; SELU of the
    norm is computed again. Means and variances are merged over spans, not added up value by value as PyTorch does on
    channels-last maps, where the mean of 330,000 values is wrong in the fourth digit and the logits too.
    """

    @staticmethod
    def forward(ctx, x, weight1, bias1, gamma, beta, eps, weight2, bias2, *shortcut):
        spans = spans_of(x)
        pre = empty_map(x, len(bias1), x.shape[3] + 1)
        pooled = Pooled.empty(x, len(bias2), x.shape[3], True)

        def first_half(span: Span):
            part = F.conv2d(span.around(x, 1), weight1, bias1, padding=(0, 1))
            span.of(pre).copy_(part)
            rows = _rows(part).flatten(0, 2)
            mean = rows.mean(0)
            return len(rows), mean, (rows - mean).square_().sum(0)

        count, mean, squares = merge_moments(map_in_threads(first_half, spans))
        var = squares / count
        inverse_deviation = (var + eps).rsqrt()
        scale = gamma * inverse_deviation
        shift = beta - mean * scale

        def second_half(span: Span):
            part = F.conv2d(activate(span, pre, scale, shift), weight2, bias2)
            part.add_(F.conv2d(span.around(x, 1), *shortcut) if shortcut else span.of(x))
            pooled.of(span.utterances, span.pooled).fill(part)

        list(map_in_threads(second_half, spans))
        ctx.count = count
        statistics = mean, inverse_deviation, scale, shift
        ctx.save_for_backward(x, pre, pooled.first, pooled.second, *statistics, weight1, weight2, *shortcut)
        ctx.mark_non_differentiable(mean, var)
        return pooled.largest, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean_grad, _var_grad):
        x, pre, first, second, mean, inverse_deviation, scale, shift, weight1, weight2, *shortcut = ctx.saved_tensors
        spans = spans_of(x)
        norm_grad = torch.empty_like(pre)  # of the norm's result
        x_grad = empty_map(x, x.shape[1], x.shape[3])
        pooled = Pooled(grad.contiguous(memory_format=torch.channels_last), first, second)

        def second_half(span: Span):
            grad, hidden = pooled.gradient_around(span, 1), activate(span, pre, scale, shift)
            inner, inner_grad = hidden[:, :, 1:-1], grad[:, :, 1:-1]
            part = selu_backward(gradient_of_input(grad, inner, weight2, 0), inner)
            span.of(norm_grad).copy_(part)
            rows = _rows(part)
            sums = [rows.sum((0, 1, 2)), (rows * (_rows(span.of(pre)) - mean)).sum((0, 1, 2))]
            sums += gradient_of_weight(inner_grad, hidden, weight2, 0)
            if shortcut:
                span.of(x_grad).copy_(gradient_of_input(grad, span.of(x), shortcut[0], 0))
                sums.append(gradient_of_weight(inner_grad, span.around(x, 1), shortcut[0], 0)[0])
            else:
                span.of(x_grad).copy_(inner_grad)
            return sums

        beta_grad, gamma_grad, *upper = add_up(map_in_threads(second_half, spans))
        gamma_grad *= inverse_deviation
        slope = -scale * inverse_deviation * gamma_grad / ctx.count
        constant = -scale * beta_grad / ctx.count - slope * mean

        def first_half(span: Span):
            rows = torch.addcmul(constant, _rows(span.around(norm_grad, 1)), scale)
            grad = rows.addcmul_(_rows(span.around(pre, 1)), slope).permute(0, 3, 1, 2)
            span.clear_outside(grad)
            span.of(x_grad).add_(gradient_of_input(grad, span.of(x), weight1, 1))
            return gradient_of_weight(grad[:, :, 1:-1], span.around(x, 1), weight1, 1)

        lower = add_up(map_in_threads(first_half, spans))
        return x_grad, *lower, gamma_grad, beta_grad, None, *upper


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(3, 3) sums of products of two (groups, 3, frames, bands) maps."""
    if left.is_cuda:  # a bmm pads its 3 x 3 results to far larger tiles, and few GPUs are quick in double precision
        return torch.stack([(left * right[:, i : i + 1]).sum((0, 2, 3)) for i in range(3)], dim=1)
    return torch.bmm(left.flatten(2), right.flatten(2).transpose(1, 2)).sum(0)


def activate(span: Span, pre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SELU(scale * pre + shift) of the span and a frame on either side, zero outside of the map."""
    hidden = torch.selu_(torch.addcmul(shift, _rows(span.around(pre, 1)), scale)).permute(0, 3, 1, 2)
    return span.clear_outside(hidden)


def merge_moments(parts) -> tuple[int, Tensor, Tensor]:
    """Number, mean and summed squared deviation of all values, from those of every part."""
    counts, means, squares = zip(*parts, strict=True)
    counts, means = torch.tensor(counts, dtype=means[0].dtype)[:, None], torch.stack(means)
    total = counts.sum()
    mean = (means * (counts / total)).sum(0)
    return int(total), mean, torch.stack(squares).sum(0) + (counts * (means - mean).square()).sum(0)


def add_up(parts) -> list[Tensor]:
    """Sums over parts, each a sequence of tensors."""
    return [torch.stack(values).sum(0) for values in zip(*parts, strict=True)]
