"""Score fusion: countermeasures with different front ends hear the same waveform, and their log-odds are averaged.

Countermeasures err on different recordings where they look at different things, so their mean errs less often than
either; that it helps most where the front ends differ is a lesson of every ASVspoof challenge (A. Nautsch et al.,
"ASVspoof 2019", arXiv 2102.05889). As one network the members train, export and deploy like any other.

    waveform                                   (B, T)
    members' embeddings side by side           (B, sum of D) the embedding
    mean of the members' logits                (B, 2)        spoof, bona fide
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models.layers import CMOutput


@dataclass(frozen=True)
class FusionConfig:
    """Which countermeasures are averaged: their names in `models.MODELS` and settings beside each one's own."""

    members: tuple[tuple[str, dict], ...] = (
        ("spectrogram-resnet", {"hop_samples": 256}),
        ("lfcc-lcnn", {"front_end": "lfcc-levelled"}),
    )


class ScoreFusion(nn.Module):
    """The mean of countermeasures; shapes are in the module's docstring.

    Args:
        config: says what they are.
        members: the countermeasures themselves.

    Raises:
        ConfigError: there are none.
    """

    def __init__(self, config: FusionConfig, members: Iterable[nn.Module]):
        super().__init__()
        if not config.members:
            raise ConfigError("score fusion has no members: expected pairs of a model's name and its settings")
        self.config = config
        self.members = nn.ModuleList(members)

    @property
    def min_samples(self) -> int:
        """Fewest samples of a waveform: those of the member that needs most."""
        return max(member.min_samples for member in self.members)

    def forward(self, waveform: Tensor) -> CMOutput:
        """Score waveforms.

        Args:
            waveform: (B, T) float in [-1, 1] at 16 kHz, T at least `min_samples`.

        Returns:
            logits (B, 2), spoof and bona fide, and all embeddings side by side.

        Raises:
            AudioError: the waveforms are not (B, T) or shorter than `min_samples`.
        """
        outputs = [member(waveform) for member in self.members]
        logits = torch.stack([output.logits for output in outputs]).mean(0)
        return CMOutput(logits, torch.cat([output.embedding for output in outputs], dim=1))

    def output(self, embedding: Tensor) -> Tensor:
        """The logits (B, 2) that the members' last layers read from an embedding (B, sum of D)."""
        parts = embedding.split([member.output.in_features for member in self.members], dim=1)
        return torch.stack([member.output(part) for member, part in zip(self.members, parts, strict=True)]).mean(0)
