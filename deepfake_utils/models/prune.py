"""A narrower spectrogram network out of a wide one: whole channels go, the most important ones keep their weights.

A channel's importance is the scale that batch norm gives it (Liu et al., "Learning efficient convolutional networks
through network slimming", arXiv 1708.06519), summed over all norms that write it: the blocks of a stage add to the same
channels, so these go or stay together. What comes out is the same network in another configuration, with some of
the weights it needs; it is to be trained further, best on what the wide one says (distillation).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models.spectrogram import SpectrogramResNet

WIDTHS = ("channels", "stem_channels", "pooled_channels", "embedding_dim")  # of `SpectrogramConfig`


@torch.no_grad()
def narrowed(model: SpectrogramResNet, **widths) -> SpectrogramResNet:
    """A network of the given widths with the most important channels of `model`, which is left as it is.

    Args:
        model: a trained network.
        **widths: `WIDTHS`, none larger than the model's; what is not named stays. Other options may change, too.

    Returns:
        The narrower network, in evaluation mode.

    Raises:
        ConfigError: a width exceeds the model's, or the number of stages differs.
    """
    config = dataclasses.replace(model.config, **widths)
    _check_narrower(config, model.config)
    narrow = SpectrogramResNet(config).eval()
    kept = _most_important(config.stem_channels, model.stem_norm.weight)
    _copy(narrow.stem, model.stem, narrow.stem_norm, model.stem_norm, kept)
    for stage, width in enumerate(config.channels):
        blocks = model.blocks[2 * stage : 2 * stage + 2]
        norms = [block.norm2 for block in blocks] + [block.shortcut[-1] for block in blocks[:1]]
        written = _most_important(width, *[norm.weight for norm in norms])
        for block, target in zip(blocks, narrow.blocks[2 * stage : 2 * stage + 2], strict=True):
            inner = _most_important(width, block.norm1.weight)
            _copy(target.conv1, block.conv1, target.norm1, block.norm1, inner, kept)
            _copy(target.conv2, block.conv2, target.norm2, block.norm2, written, inner)
            if not isinstance(block.shortcut, nn.Identity):
                _, convolution, norm = target.shortcut
                _copy(convolution, block.shortcut[1], norm, block.shortcut[2], written, kept)
            kept = written
    pooled = _most_important(config.pooled_channels, model.join_norm.weight)
    n_bins = model.join.in_channels // model.config.channels[-1]
    _copy(narrow.join, model.join, narrow.join_norm, model.join_norm, pooled, _spread(kept, n_bins))
    both = torch.cat([pooled, model.config.pooled_channels + pooled])  # their means, then their deviations
    embedded = _most_important(config.embedding_dim, model.embed.weight.norm(dim=1) * model.output.weight.norm(dim=0))
    narrow.embed.weight.copy_(model.embed.weight[embedded][:, both])
    narrow.embed.bias.copy_(model.embed.bias[embedded])
    narrow.output.weight.copy_(model.output.weight[:, embedded])
    narrow.output.bias.copy_(model.output.bias)
    return narrow


def _check_narrower(config, wide) -> None:
    for name, value in dataclasses.asdict(config).items():
        limit = getattr(wide, name)
        pairs = zip(value, limit, strict=False) if isinstance(value, tuple) else [(value, limit)]
        other_stages = isinstance(value, tuple) and len(value) != len(limit)
        if other_stages or any(not 0 <= ours <= theirs for ours, theirs in pairs):
            raise ConfigError(f"pruning to {name} {value}: expected as many stages and no more channels than {limit}")


def _most_important(n: int, *scales: Tensor) -> Tensor:
    """Indices of the n channels with the largest sum of absolute scales, in order."""
    return sum(scale.abs() for scale in scales).topk(n).indices.sort().values


def _spread(channels: Tensor, n_bins: int) -> Tensor:
    """Where the bins of these channels lie once channels and bins are one dimension."""
    return (channels[:, None] * n_bins + torch.arange(n_bins)).flatten()


def _copy(target, source, target_norm, source_norm, written: Tensor, read: Tensor | None = None) -> None:
    """Weights of a convolution from the channels read to those written, and of its norm."""
    weight = source.weight[written]
    target.weight.copy_(weight if read is None else weight[:, read])
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(target_norm, name).copy_(getattr(source_norm, name)[written])
