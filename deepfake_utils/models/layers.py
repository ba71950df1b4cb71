"""Pieces shared by the models: their output type, and layers more than one of them uses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError


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


class AttentiveStatistics(nn.Module):
    """Mean and standard deviation over time, frames weighted by a learned direction: (B, C, T) -> (B, 2 C).

    Frame t weighs softmax_t(tanh(v . x_t)). Okabe, Koshinaka and Shinoda, "Attentive Statistics Pooling for Deep
    Speaker Embedding", arXiv 1803.10963, with the one-vector attention that LFCC-ResNet18 and LFCC-LCNN use.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(channels) / channels**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()  # a variance under half precision may come out negative
        weight = torch.tanh((x * self.direction[:, None]).sum(1, keepdim=True)).softmax(-1)  # (B, 1, T)
        mean = (weight * x).sum(-1, keepdim=True)
        variance = (weight * (x - mean).square()).sum(-1)
        # The floor keeps the gradient of the root finite where a channel is constant.
        return torch.cat([mean.squeeze(-1), variance.clamp(min=1e-5).sqrt()], dim=1)
