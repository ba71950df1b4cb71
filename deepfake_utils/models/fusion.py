"""Score fusion: countermeasures with different front ends hear the same waveform, and what they say is averaged.

Countermeasures err on different recordings where they look at different things, so their mean errs less often than
either; that it helps most where the front ends differ is a lesson of every ASVspoof challenge (A. Nautsch et al.,
"ASVspoof 2019", arXiv 2102.05889). As one network the members train, export and deploy like any other.

    waveform                                   (B, T)
    members' embeddings side by side           (B, sum of D) the embedding
    mean of the members' odds or log-odds      (B, 2)        spoof, bona fide

The mean of log-odds asks for agreement. The mean of the odds of fake is near the largest of them: it suits members that
each know some fakes and are silent on the others, and is what one of them cannot outvote.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepfake_utils.conventions import BONAFIDE, SPOOF, ConfigError
from deepfake_utils.models.layers import CMOutput


@dataclass(frozen=True)
class FusionConfig:
    """Which countermeasures are averaged, and whether their "log-odds" or their "odds" of fake are.

    A member is a name in `models.MODELS` and settings beside that one's own.
    """

    members: tuple[tuple[str, dict], ...] = (
        ("spectrogram-resnet", {"hop_samples": 256}),
        ("lfcc-lcnn", {"front_end": "lfcc-levelled"}),
    )
    mean: str = "log-odds"


class ScoreFusion(nn.Module):
    """The mean of countermeasures; shapes are in the module's docstring.

    Args:
        config: says what they are.
        members: the countermeasures themselves.

    Raises:
        ConfigError: there are none, or the mean is of something else.
    """

    def __init__(self, config: FusionConfig, members: Iterable[nn.Module]):
        super().__init__()
        if not config.members:
            raise ConfigError("score fusion has no members: expected pairs of a model's name and its settings")
        if config.mean not in ("log-odds", "odds"):
            raise ConfigError(f"mean {config.mean!r} is not known to score fusion: expected 'log-odds' or 'odds'")
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
        logits = self._mean([output.logits for output in outputs])
        return CMOutput(logits, torch.cat([output.embedding for output in outputs], dim=1))

    def output(self, embedding: Tensor) -> Tensor:
        """The logits (B, 2) that the members' last layers read from an embedding (B, sum of D)."""
        parts = embedding.split([member.output.in_features for member in self.members], dim=1)
        return self._mean([member.output(part) for member, part in zip(self.members, parts, strict=True)])

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        each = torch.stack(tuple(logits))
        if self.config.mean == "log-odds":
            return each.mean(0)
        fake = torch.logsumexp(each[..., SPOOF] - each[..., BONAFIDE], 0) - math.log(len(each))
        return torch.stack([fake, -fake], 1) / 2
