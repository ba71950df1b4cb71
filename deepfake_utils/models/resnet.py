"""LFCC-ResNet18: a pre-activation residual network over cepstra with attentive statistics pooling.

Zhang, Jiang and Duan, "One-class Learning Towards Synthetic Voice Spoofing Detection", IEEE SPL 2021, arXiv
2010.13995, whose network is that of Monteiro, Alam and Falk, Computer Speech & Language 2020; pre-activation blocks
are from He et al., arXiv 1603.05027. The paper trains it with one-class softmax on its embedding.

Shape walk for 64,600 samples (4.04 s):

    waveform                                          (B, 64600)
    LFCC                                              (B, 1, 60, 402)      coefficient x frame
    9 x 3 convolution, 1 coefficient in 3             (B, 16, 18, 402)
    stage 1, two residual blocks                      (B, 64, 18, 402)
    stage 2, halving                                  (B, 128, 9, 201)
    stage 3, halving                                  (B, 256, 5, 101)
    stage 4, halving                                  (B, 512, 3, 51)
    convolution over all coefficients left            (B, 256, 51)
    attentive mean and standard deviation             (B, 512)
    linear                                            (B, 256)             the embedding
    linear                                            (B, 2)               spoof, bona fide

Any length from `min_samples` (one analysis window) up works, where the paper cuts or repeats to 750 frames.

Differences from the paper's code: the standard deviation is the attention-weighted one of arXiv 1803.10963, not that
of the weighted frames, and no noise is added to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils.models.layers import AttentiveStatistics, CMOutput, check_waveform
from deepfake_utils.models.lfcc import build_front_end


@dataclass(frozen=True)
class ResNetConfig:
    """Everything that shapes a ResNet18."""

    front_end: str = "lfcc"  # one of frontends.lfcc.FRONT_ENDS
    channels: tuple[int, ...] = (64, 128, 256, 512)  # of each stage of two blocks
    pooled_channels: int = 256
    embedding_dim: int = 256


class PreActivationBlock(nn.Module):
    """Two 3 x 3 convolutions, each after batch norm and ReLU, plus the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        active = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + skip


class ResNet18(nn.Module):
    """The countermeasure of arXiv 2010.13995; shapes are in the module's docstring.

    Raises:
        ConfigError: unknown front end.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        self.front_end = build_front_end(config.front_end)
        self.conv = nn.Conv2d(1, 16, (9, 3), stride=(3, 1), padding=(1, 1), bias=False)
        self.norm = nn.BatchNorm2d(16)
        height = (self.front_end.n_features + 2 - 9) // 3 + 1  # coefficients left by the first convolution
        blocks, in_channels = [], 16
        for stage, channels in enumerate(config.channels):
            stride = 1 if stage == 0 else 2
            height = -(-height // stride)
            blocks += [PreActivationBlock(in_channels, channels, stride), PreActivationBlock(channels, channels, 1)]
            in_channels = channels
        self.blocks = nn.Sequential(*blocks)
        self.join = nn.Conv2d(in_channels, config.pooled_channels, (height, 3), padding=(0, 1), bias=False)
        self.join_norm = nn.BatchNorm2d(config.pooled_channels)
        self.pooling = AttentiveStatistics(config.pooled_channels)
        self.embed = nn.Linear(2 * config.pooled_channels, config.embedding_dim)
        self.output = nn.Linear(config.embedding_dim, 2)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    @property
    def min_samples(self) -> int:
        """Fewest samples of a waveform: one analysis window; every layer after it pads."""
        return self.front_end.power.window_samples

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
        x = F.relu(self.norm(self.conv(self.front_end(waveform)[:, None])))
        x = F.relu(self.join_norm(self.join(self.blocks(x))))[:, :, 0]  # (B, pooled_channels, frames)
        embedding = self.embed(self.pooling(x))
        return CMOutput(self.output(embedding), embedding)
