"""RawNet2 for anti-spoofing: sinc filters, residual blocks with filter-wise scaling, a GRU.

Tak et al., "End-to-End anti-spoofing with RawNet2", ICASSP 2021, arXiv 2011.01108; filter-wise feature scaling is
from Jung et al., "Improved RawNet with Feature Map Scaling", arXiv 2004.00526. The default configuration is the
RawNet2 baseline in the AASIST repository, 17,621,410 parameters, 16.1 million of them in the GRU.

Shape walk for 64,600 samples (4.04 s):

    waveform                                        (B, 64600)
    |sinc bank|, largest of 3 samples               (B, 20, 21192)     filter x frame
    batch norm, SELU
    2 residual blocks, each keeping 1 frame in 3    (B, 20, 2354)
    4 residual blocks, each keeping 1 frame in 3    (B, 128, 29)
    batch norm, SELU, 3-layer GRU, last frame       (B, 1024)
    linear                                          (B, 1024)          the embedding
    linear                                          (B, 2)             spoof, bona fide

Any length from `min_samples` up works: the GRU sees one frame per 2,187 samples.

Differences from the paper, all kept because published weights were trained with them:
    - Every block after the first owns a batch norm (`unused_norm`) whose output, with its leaky ReLU, never
      reached the next layer: the convolution reads the block's untouched input. Its parameters are counted and
      stay in the state dict; it is not computed, and no gradient reaches it.
    - The fixed filter bank is absent from the state dict.
    - The published code returns log-softmax; here the logits are returned, which differ by one number a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils.models import fast
from deepfake_utils.models.fast.gru import run_gru
from deepfake_utils.models.layers import CMOutput, check_waveform, renaming
from deepfake_utils.models.sinc import SincFilters


@dataclass(frozen=True)
class RawNet2Config:
    """Everything that shapes a RawNet2; the defaults are the AASIST repository's baseline."""

    sinc_filters: int = 20
    sinc_taps: int = 1025
    sinc_spacing: str = "mel"  # or inverse-mel, linear: the paper's S2 and S3
    sinc_learnable: bool = False
    channels: tuple[int, ...] = (20, 20, 128, 128, 128, 128)  # of each residual block
    gru_dim: int = 1024
    gru_layers: int = 3
    embedding_dim: int = 1024


class ResidualBlock(nn.Module):
    """conv, batch norm, leaky ReLU, conv, plus the input; the largest of every 3 frames; filter-wise scaling.

    The scaling, x * s + s with s = sigmoid(linear(mean of x over time)), lets each filter be emphasised or
    silenced for the whole utterance (arXiv 2004.00526, section 2.2).
    """

    def __init__(self, in_channels: int, out_channels: int, first: bool):
        super().__init__()
        if not first:
            self.unused_norm = nn.BatchNorm1d(in_channels)  # see "Differences from the paper"
        self.conv1 = nn.Conv1d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm1d(out_channels)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv1d(in_channels, out_channels, 1)
        self.scale = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, frames) -> (B, out_channels, frames // 3)."""
        hidden = F.leaky_relu(self.norm(self.conv1(x)), 0.3)
        x = F.max_pool1d(self.conv2(hidden) + self.shortcut(x), 3)
        scale = self.scale(x.mean(-1)).sigmoid()[..., None]
        return torch.addcmul(scale, x, scale)


class RawNet2(nn.Module):
    """The countermeasure of arXiv 2011.01108; shapes and quirks are in the module's docstring.

    Raises:
        ConfigError: a configuration no network can be built from.
    """

    def __init__(self, config: RawNet2Config):
        super().__init__()
        self.config = config
        self.sinc = SincFilters(config.sinc_filters, config.sinc_taps, config.sinc_spacing, config.sinc_learnable)
        self.norm = nn.BatchNorm1d(config.sinc_filters)
        channels = (config.sinc_filters, *config.channels)
        self.blocks = nn.ModuleList(
            ResidualBlock(channels[i], channels[i + 1], first=i == 0) for i in range(len(config.channels))
        )
        self.gru_norm = nn.BatchNorm1d(channels[-1])
        self.gru = nn.GRU(channels[-1], config.gru_dim, config.gru_layers, batch_first=True)
        self.embed = nn.Linear(config.gru_dim, config.embedding_dim)
        self.output = nn.Linear(config.embedding_dim, 2)

    @property
    def min_samples(self) -> int:
        """Fewest samples of a waveform: those that leave one frame for the GRU."""
        return 3 ** (len(self.config.channels) + 1) + self.config.sinc_taps - 1

    def forward(self, waveform: Tensor, band_mask: Tensor | None = None) -> CMOutput:
        """Score waveforms.

        Args:
            waveform: (B, T) float in [-1, 1] at 16 kHz, T at least `min_samples`.
            band_mask: 0/1 for every sinc filter, (sinc_filters,) or (B, sinc_filters); see `augment.draw_band_mask`.

        Returns:
            logits (B, 2), spoof and bona fide, and the embedding (B, embedding_dim) they are read from.

        Raises:
            AudioError: the waveforms are not (B, T) or shorter than `min_samples`.
        """
        check_waveform(waveform, self.min_samples)
        x = F.selu(self.norm(self.sinc.pooled(waveform, band_mask)))
        for block in self.blocks:
            x = block(x)
        frames = F.selu(self.gru_norm(x)).transpose(1, 2)
        embedding = self.embed(self._last_state(frames))
        return CMOutput(self.output(embedding), embedding)

    def _last_state(self, frames: Tensor) -> Tensor:
        """The GRU's last output of (B, frames, channels): (B, gru_dim)."""
        return run_gru(self.gru, frames) if fast.applies(self.gru, frames) else self.gru(frames)[1][-1]


# What the published code calls each part, rewritten in this order.
PUBLISHED_NAMES = (
    (r"^first_bn\.", "norm."),
    (r"^block(\d)\.0\.", r"blocks.\1."),
    (r"^fc_attention(\d)\.0\.", r"blocks.\1.scale."),
    (r"^bn_before_gru\.", "gru_norm."),
    (r"^fc1_gru\.", "embed."),
    (r"^fc2_gru\.", "output."),
    (r"\.bn1\.", ".unused_norm."),
    (r"\.bn2\.", ".norm."),
    (r"\.conv_downsample\.", ".shortcut."),
)

published_state_dict = renaming("RawNet2", PUBLISHED_NAMES, ("first_bn.weight", "fc1_gru.weight"))
