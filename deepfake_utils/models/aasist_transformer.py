"""AASIST's encoder under a small transformer over time, where AASIST has graphs.

The encoder is that of arXiv 2110.01200; the layers above are those of Vaswani et al., "Attention Is All You Need",
arXiv 1706.03762, normalised before each step (Xiong et al., arXiv 2002.04745). No weights are published for it.

Shape walk for 64,600 samples (4.04 s):

    waveform                                            (B, 64600)
    AASIST's encoder                                    (B, 64, 23, 29)      channel x band x frame
    each frame's bands and channels as one token        (B, 29, 128)
    a summary token in front, positions added           (B, 30, 128)
    2 layers of attention among all tokens              (B, 30, 128)
    the summary token                                   (B, 128)             the embedding
    linear                                              (B, 2)               spoof, bona fide

Any length from `min_samples` up works: positions are sines and cosines, not a learned table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models.encoder import Encoder, EncoderConfig
from deepfake_utils.models.layers import CMOutput, check_waveform


@dataclass(frozen=True)
class AASISTTransformerConfig(EncoderConfig):
    """Everything that shapes an AASISTTransformer."""

    dim: int = 128  # of a token
    heads: int = 4
    layers: int = 2
    feedforward: int = 256
    dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.dim % (2 * self.heads):
            raise ConfigError(f"tokens of {self.dim} for {self.heads} heads: expected a multiple of twice the heads")


def positions(n_tokens: Tensor | int, dim: int, like: Tensor) -> Tensor:
    """(n_tokens, dim) sines and cosines of each token's place, slow to fast (arXiv 1706.03762, section 3.5)."""
    place = torch.arange(n_tokens, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-math.log(10_000) / dim))
    return torch.cat([(place * rate).sin(), (place * rate).cos()], dim=1)


class Layer(nn.Module):
    """Attention among all tokens, then a two-layer network on each; both added to what they read."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attended = nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, feedforward), nn.GELU(), nn.Dropout(dropout), nn.Linear(feedforward, dim)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        split = self.query_key_value(self.attention_norm(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, heads, N, dim / heads)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.drop(self.attended(attended))
        return tokens + self.drop(self.feedforward(tokens))


class AASISTTransformer(nn.Module):
    """A countermeasure whose tokens are the frames of AASIST's encoder; shapes are in the module's docstring."""

    def __init__(self, config: AASISTTransformerConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.token = nn.Linear(config.channels[-1] * self.encoder.n_bands, config.dim)
        self.summary = nn.Parameter(torch.randn(1, 1, config.dim))
        self.layers = nn.Sequential(
            *[Layer(config.dim, config.heads, config.feedforward, config.dropout) for _ in range(config.layers)]
        )
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, 2)

    @property
    def min_samples(self) -> int:
        """Fewest samples of a waveform: those that leave two frames."""
        return self.encoder.min_samples

    def forward(self, waveform: Tensor, band_mask: Tensor | None = None) -> CMOutput:
        """Score waveforms.

        Args:
            waveform: (B, T) float in [-1, 1] at 16 kHz, T at least `min_samples`.
            band_mask: 0/1 for every sinc filter, (sinc_filters,) or (B, sinc_filters); see `augment.draw_band_mask`.

        Returns:
            logits (B, 2), spoof and bona fide, and the embedding (B, dim) they are read from.

        Raises:
            AudioError: the waveforms are not (B, T) or shorter than `min_samples`.
        """
        check_waveform(waveform, self.min_samples)
        maps = self.encoder(waveform, band_mask)
        tokens = self.token(maps.flatten(1, 2).transpose(1, 2))
        tokens = torch.cat([self.summary.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = self.layers(tokens + positions(tokens.shape[1], tokens.shape[2], tokens))
        embedding = self.norm(tokens[:, 0])
        return CMOutput(self.output(embedding), embedding)
