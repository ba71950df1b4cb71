"""Pieces shared by the models: their output type, and layers more than one of them uses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError, CheckpointError


class CMOutput(NamedTuple):
    """What every countermeasure returns for a batch of B waveforms."""

    logits: Tensor  # (B, 2): spoof, bona fide
    embedding: Tensor  # (B, D): the vector the last layer sees


def check_waveform(waveform: Tensor, min_samples: int) -> None:
    """Refuse, with an AudioError, what is not a (B, T) batch of at least `min_samples` samples."""
    if waveform.ndim != 2:
        raise AudioError(f"waveform of shape {tuple(waveform.shape)}: expected (batch, samples)")
    if waveform.shape[1] < min_samples:
        raise AudioError(
            f"waveforms of {waveform.shape[1]} samples ({waveform.shape[1] / SAMPLE_RATE_HZ:.3f} s): this model "
            f"needs at least {min_samples}; repeat them end to end with audio.fit_length"
        )


def at_least_single(x: Tensor) -> Tensor:
    """x in single precision where it is in half; a model turned to double (`model.double()`) stays in double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def renaming(
    model: str, names: tuple[tuple[str, str], ...], needed: tuple[str, str]
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A function that turns the state of a published checkpoint into one under the names used here.

    Weight decay has shrunk many published weights to around 1e-41. Processors are a hundred times slower on such
    subnormal numbers than on zero, and no output can tell them apart, so zero is what is returned.

    Args:
        model: what the checkpoint is called in its error.
        names: patterns of published names and their replacements, applied in this order.
        needed: published names that a checkpoint of this model has.
    """

    def our_name(name: str) -> str:
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        return name

    def without_subnormal(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.masked_fill(value.abs() < torch.finfo(value.dtype).tiny, 0)

    def published_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a published checkpoint; a CheckpointError if it is another model's."""
        if any(name not in state for name in needed):
            raise CheckpointError(
                f"not a published {model} checkpoint: it holds {', '.join(list(state)[:5])}..., "
                f"where {' and '.join(needed)} were expected"
            )
        return {our_name(name): without_subnormal(value) for name, value in state.items()}

    return published_state_dict


class AttentiveStatistics(nn.Module):
    """Mean and standard deviation over time, frames weighted by a learned direction: (B, C, T) -> (B, 2 C).

    Frame t weighs softmax_t(tanh(v . x_t)). Okabe, Koshinaka and Shinoda, "Attentive Statistics Pooling for Deep
    Speaker Embedding", arXiv 1803.10963, with the one-vector attention that LFCC-ResNet18 and LFCC-LCNN use.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(channels) / channels**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_single(x)  # a variance under half precision may come out negative
        weight = torch.tanh((x * self.direction[:, None]).sum(1, keepdim=True)).softmax(-1)  # (B, 1, T)
        mean = (weight * x).sum(-1, keepdim=True)
        variance = (weight * (x - mean).square()).sum(-1)
        # The floor keeps the gradient of the root finite where a channel is constant.
        return torch.cat([mean.squeeze(-1), variance.clamp(min=1e-5).sqrt()], dim=1)
