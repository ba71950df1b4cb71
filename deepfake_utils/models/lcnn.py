"""LFCC-LCNN: a light convolutional network with max-feature-map activations over cepstra.

Wang and Yamagishi, "A Comparative Study on Recent Neural Spoofing Countermeasures for Synthetic Speech Detection",
Interspeech 2021, arXiv 2103.11326; max-feature-map is from Wu et al., arXiv 1511.02683. Two ways to turn frames
into one vector: attentive statistics, or the paper's best, two bi-directional LSTM layers with a skip connection,
summed over time.

Shape walk for 64,600 samples (4.04 s), lstm-sum pooling:

    waveform                                          (B, 64600)
    LFCC                                              (B, 1, 60, 402)    coefficient x frame
    5 x 5 convolution, max-feature-map, pool          (B, 32, 30, 201)
    1 x 1 and 3 x 3 convolutions, pool                (B, 48, 15, 100)
    the same, pool                                    (B, 64, 7, 50)
    the same twice, pool, dropout 0.7                 (B, 32, 3, 25)
    channels and coefficients side by side            (B, 25, 96)
    2 bi-LSTM layers + skip, summed over frames       (B, 96)
    linear                                            (B, 64)            the embedding
    linear                                            (B, 2)             spoof, bona fide

Any length from `min_samples` up works. Under lstm-sum the embedding grows with the clip; the angle that P2SGrad and
one-class softmax score hardly does.

Differences from the paper: the published system reads whole recordings, here they are cut or repeated to 4.04 s as
for the other models; the front end keeps cepstral coefficient 0 (see `frontends.lfcc`); and there is a plain output
layer for cross-entropy beside the embedding that P2SGrad reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models.layers import AttentiveStatistics, CMOutput, check_waveform
from deepfake_utils.models.lfcc import build_front_end

POOLINGS = ("attention", "lstm-sum")


@dataclass(frozen=True)
class LCNNConfig:
    """Everything that shapes an LCNN."""

    front_end: str = "lfcc"  # one of frontends.lfcc.FRONT_ENDS
    pooling: str = "attention"  # or lstm-sum
    embedding_dim: int = 64
    dropout: float = 0.7


class MaxFeatureMap(nn.Module):
    """The larger of two halves of the channels: (B, 2 C, ...) -> (B, C, ...)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels  # of the result; as a constant, because the ONNX exporter must know it

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, : self.channels], x[:, self.channels :]
        if x.dtype in (torch.bfloat16, torch.float16):
            return torch.maximum(first, second)
        # The same to single precision, where torch.maximum's backward pass is a third of a training step on a CPU.
        return second + (first - second).relu_()


def _conv(in_channels: int, out_channels: int, size: int) -> list[nn.Module]:
    """A convolution that keeps the map's size, and max-feature-map; `out_channels` are left after it."""
    return [nn.Conv2d(in_channels, 2 * out_channels, size, padding=size // 2), MaxFeatureMap(out_channels)]


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, affine=False)


class LSTMSum(nn.Module):
    """Two bi-directional LSTM layers beside a skip connection, summed over time: (B, C, T) -> (B, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels // 2, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2)
        return (self.lstm(frames)[0] + frames).sum(1)


class LCNN(nn.Module):
    """The countermeasure of arXiv 2103.11326; shapes are in the module's docstring.

    Raises:
        ConfigError: unknown front end or pooling.
    """

    def __init__(self, config: LCNNConfig):
        super().__init__()
        if config.pooling not in POOLINGS:
            raise ConfigError(f"unknown pooling {config.pooling!r}: expected one of {', '.join(POOLINGS)}")
        self.config = config
        self.front_end = build_front_end(config.front_end)
        self.convolutions = nn.Sequential(
            *_conv(1, 32, 5),
            nn.MaxPool2d(2),
            *_conv(32, 32, 1),
            _norm(32),
            *_conv(32, 48, 3),
            nn.MaxPool2d(2),
            _norm(48),
            *_conv(48, 48, 1),
            _norm(48),
            *_conv(48, 64, 3),
            nn.MaxPool2d(2),
            *_conv(64, 64, 1),
            _norm(64),
            *_conv(64, 32, 3),
            _norm(32),
            *_conv(32, 32, 1),
            _norm(32),
            *_conv(32, 32, 3),
            nn.MaxPool2d(2),
            nn.Dropout(config.dropout),
        )
        channels = 32 * (self.front_end.n_features // 16)
        if config.pooling == "attention":
            self.pooling, pooled = AttentiveStatistics(channels), 2 * channels
        else:
            self.pooling, pooled = LSTMSum(channels), channels
        self.embed = nn.Linear(pooled, config.embedding_dim)
        self.output = nn.Linear(config.embedding_dim, 2)

    @property
    def min_samples(self) -> int:
        """Fewest samples of a waveform: four poolings by two need 16 frames."""
        return self.front_end.power.n_samples(n_frames=16)

    def forward(self, waveform: Tensor) -> CMOutput:
        """Score waveforms.

        Args:
            waveform: (B, T) float in [-1, 1] at 16 kHz, T at least `min_samples`.

        Returns:
            logits (B, 2), spoof and bona fide, and the embedding (B, embedding_dim) they are read from.

        Raises:
            AudioError: the waveforms are not (B, T) or shorter than `min_samples`.
        """
        check_waveform(waveform, self.min_samples)
        maps = self.convolutions(self.front_end(waveform)[:, None])  # (B, 32, coefficients, frames)
        embedding = self.embed(self.pooling(maps.flatten(1, 2)))
        return CMOutput(self.output(embedding), embedding)
