"""A small residual network on log spectrograms: the model whose weights are shipped with the package.

Shape walk for 64,600 samples (4.04 s):

    waveform                                          (B, 64600)
    log power, 512-point Hann windows every 10 ms     (B, 240, 401)        bins of 62 Hz to 7.53 kHz
    minus each bin's mean over time                   (B, 240, 401)
    5 x 3 convolution, halving both                   (B, 16, 120, 201)
    three stages of two residual blocks, halving      (B, 64, 15, 26)
    linear over all bins and channels of a frame      (B, 64, 26)
    mean and standard deviation over time             (B, 128)
    linear                                            (B, 64)              the embedding
    linear                                            (B, 2)               spoof, bona fide

Level, tilt and bandwidth above 7.5 kHz, which say how speech was recorded and not who made it, are taken out before
the first convolution. Residual blocks are those of He et al., arXiv 1512.03385.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils.conventions import SAMPLE_RATE_HZ
from deepfake_utils.models.layers import CMOutput, check_waveform
from deepfake_utils.models.lfcc import HIGHEST_HZ, LOWEST_HZ, LfccConfig, PowerSpectrum, relative

SCALE = 0.4  # brings the log power, natural, to a standard deviation of about 1


@dataclass(frozen=True)
class SpectrogramConfig:
    """Everything that shapes the network."""

    window_samples: int = 512  # 32 ms part the harmonics of a voice; 8 ms its pulses
    hop_samples: int = 160
    channels: tuple[int, ...] = (16, 32, 64)  # of each stage of two blocks
    stem_channels: int = 16
    pooled_channels: int = 64
    embedding_dim: int = 64
    dropout: float = 0.2


class Shortcut(nn.Sequential):
    """The mean of `stride` x `stride` points, a 1 x 1 convolution and batch norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        pool = nn.AvgPool2d(stride, ceil_mode=True)
        super().__init__(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, plus the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = Shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SpectrogramResNet(nn.Module):
    """The countermeasure of the module's docstring."""

    def __init__(self, config: SpectrogramConfig):
        super().__init__()
        self.config = config
        window = config.window_samples
        frames = LfccConfig(window_samples=window, hop_samples=config.hop_samples, n_fft=window, pre_emphasis=0.0)
        self.power = PowerSpectrum(frames, torch.hann_window)
        self.bins = slice(*(math.ceil(hz * window / SAMPLE_RATE_HZ) for hz in (LOWEST_HZ, HIGHEST_HZ)))
        self.stem = nn.Conv2d(1, config.stem_channels, (5, 3), stride=2, padding=(2, 1), bias=False)
        self.stem_norm = nn.BatchNorm2d(config.stem_channels)
        blocks, channels, bins = [], config.stem_channels, -(-(self.bins.stop - self.bins.start) // 2)
        for wider in config.channels:
            blocks += [Block(channels, wider, stride=2), Block(wider, wider)]
            channels, bins = wider, -(-bins // 2)
        self.blocks = nn.Sequential(*blocks)
        self.join = nn.Conv1d(channels * bins, config.pooled_channels, 1, bias=False)
        self.join_norm = nn.BatchNorm1d(config.pooled_channels)
        self.embed = nn.Linear(2 * config.pooled_channels, config.embedding_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.embedding_dim, 2)

    @property
    def min_samples(self) -> int:
        """Fewest samples of a waveform: one analysis window."""
        return self.config.window_samples

    def spectrogram(self, waveform: Tensor) -> Tensor:
        """Log power without level and long-term spectrum: (B, T) -> (B, bins, frames)."""
        power = self.power(waveform)[:, :, self.bins].transpose(1, 2)
        log_power = relative(power).log()
        return SCALE * (log_power - log_power.mean(2, keepdim=True))

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
        x = F.relu(self.stem_norm(self.stem(self.spectrogram(waveform)[:, None])))
        x = x.contiguous(memory_format=torch.channels_last)  # quicker on CPUs
        x = F.relu(self.join_norm(self.join(self.blocks(x).flatten(1, 2))))  # (B, pooled_channels, frames)
        mean = x.mean(2)
        deviation = ((x - mean[:, :, None]).square().mean(2) + 1e-4).sqrt()
        embedding = F.relu(self.embed(torch.cat([mean, deviation], dim=1)))
        return CMOutput(self.output(self.dropout(embedding)), embedding)
