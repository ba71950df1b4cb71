"""AASIST: graph attention over the spectrum and over time, from the raw waveform.

Jung et al., "AASIST: Audio Anti-Spoofing using Integrated Spectro-Temporal Graph Attention Networks",
ICASSP 2022, arXiv 2110.01200.

Shape walk for 64,600 samples (4.04 s), AASIST's own configuration:

    waveform                                                (B, 64600)
    |sinc bank|, largest of 3 bands x 3 samples             (B, 1, 23, 21490)    band x frame
    six residual blocks, each keeping 1 frame in 3          (B, 64, 23, 29)      channel x band x frame
    spectral graph: largest |.| over frames, + position     (B, 23, 64) -> attention, pooling -> (B, 11, 64)
    temporal graph: largest |.| over bands                  (B, 29, 64) -> attention, pooling -> (B, 20, 64)
    two branches, each: both graphs and a master node       (B, 5, 32), (B, 10, 32), (B, 1, 32)
    larger of the two branches, read out                    (B, 160)             the embedding
    linear                                                  (B, 2)               spoof, bona fide

Any length from `min_samples` up works: only the number of frames, hence of temporal nodes, changes.

Differences from the paper, all kept because the published weights were trained with them:
    - The encoder blocks after the first own a batch norm (`unused_norm`) whose output never reached the next
      layer. Its parameters are counted in the 297,866 and stay in the state dict; it is not computed.
    - The configuration names four pool ratios and four temperatures; only three of each are used.
    - Attention is normalised over the nodes attended to, with temperature 2 for the homogeneous and 100 for
      the heterogeneous graphs.
    - The 70 filters are pooled by threes into 23 bands; the 70th is never heard.
    - The filter bank is fixed, not learned, and absent from the state dict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models.encoder import Encoder, EncoderConfig
from deepfake_utils.models.layers import CMOutput, check_waveform, renaming


@dataclass(frozen=True)
class AASISTConfig(EncoderConfig):
    """Everything that shapes an AASIST; the defaults are the published AASIST."""

    graph_dim: int = 64  # of a node in the spectral and temporal graphs
    branch_dim: int = 32  # of a node in the heterogeneous graphs
    spectral_keep: float = 0.5  # share of nodes that pooling keeps
    temporal_keep: float = 0.7
    branch_keep: float = 0.5
    graph_temperature: float = 2.0
    branch_temperature: float = 100.0

    def __post_init__(self):
        super().__post_init__()
        for share in (self.spectral_keep, self.temporal_keep, self.branch_keep):
            if not 0 < share <= 1:
                raise ConfigError(f"graph pooling keeps {share} of the nodes: expected a share above 0, up to 1")
        if min(self.graph_temperature, self.branch_temperature) <= 0:
            raise ConfigError(f"temperatures {self.graph_temperature}, {self.branch_temperature}: expected above 0")


def _attention_vector(dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(dim, 1)))


def _norm_nodes(norm: nn.BatchNorm1d, nodes: Tensor) -> Tensor:
    """Batch norm of (B, N, dim) over all nodes of all graphs."""
    return norm(nodes.flatten(0, 1)).view_as(nodes)


class NodePooling(nn.Module):
    """Keep the nodes that a learned gate rates highest (Gao and Ji, "Graph U-Nets", arXiv 1905.05178)."""

    def __init__(self, dim: int, share: float):
        super().__init__()
        self.share = share
        self.drop = nn.Dropout(0.3)
        self.gate = nn.Linear(dim, 1)

    def n_kept(self, n_nodes: int) -> int:
        """How many of n_nodes are kept, at least one."""
        return max(int(n_nodes * self.share), 1)

    def rated(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Ratings of (B, N, dim) nodes in 0 .. 1, (B, N, 1), and indices of those to keep, best first (B, kept, 1)."""
        ratings = self.gate(self.drop(nodes)).sigmoid()
        return ratings, ratings.topk(self.n_kept(nodes.shape[1]), dim=1).indices

    def forward(self, nodes: Tensor) -> Tensor:
        """(B, N, dim) -> (B, n_kept(N), dim): the nodes kept, each times its rating."""
        ratings, kept = self.rated(nodes)
        return (nodes * ratings).gather(1, kept.expand(-1, -1, nodes.shape[2]))


class PairAttention(nn.Module):
    """Attention among the nodes of one graph: how much i attends to j is a small network of x_i * x_j."""

    def __init__(self, in_dim: int, out_dim: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.drop = nn.Dropout(0.2)
        self.pair = nn.Linear(in_dim, out_dim)
        self.pair_weight = _attention_vector(out_dim)
        self.attended = nn.Linear(in_dim, out_dim)
        self.own = nn.Linear(in_dim, out_dim)
        self.norm = nn.BatchNorm1d(out_dim)

    def attention(self, nodes: Tensor) -> Tensor:
        """(B, N, N): row i is how node i of (B, N, in_dim) spreads its attention, summing to 1."""
        pairs = torch.tanh(self.pair(nodes[:, :, None] * nodes[:, None]))  # (B, N, N, out_dim)
        return ((pairs @ self.pair_weight).squeeze(-1) / self.temperature).softmax(-1)

    def forward(self, nodes: Tensor) -> Tensor:
        """(B, N, in_dim) -> (B, N, out_dim)."""
        nodes = self.drop(nodes)
        nodes = self.attended(self.attention(nodes) @ nodes) + self.own(nodes)
        return F.selu(_norm_nodes(self.norm, nodes))


class HeterogeneousAttention(nn.Module):
    """Attention across the temporal and the spectral graph, and a master node that attends to both."""

    def __init__(self, in_dim: int, out_dim: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.temporal = nn.Linear(in_dim, in_dim)
        self.spectral = nn.Linear(in_dim, in_dim)
        self.drop = nn.Dropout(0.2)
        self.pair = nn.Linear(in_dim, out_dim)
        self.temporal_weight = _attention_vector(out_dim)  # of pairs within the temporal graph,
        self.spectral_weight = _attention_vector(out_dim)  # within the spectral graph,
        self.cross_weight = _attention_vector(out_dim)  # and of one node from each
        self.attended = nn.Linear(in_dim, out_dim)
        self.own = nn.Linear(in_dim, out_dim)
        self.norm = nn.BatchNorm1d(out_dim)
        self.master_pair = nn.Linear(in_dim, out_dim)
        self.master_weight = _attention_vector(out_dim)
        self.master_attended = nn.Linear(in_dim, out_dim)
        self.master_own = nn.Linear(in_dim, out_dim)

    def forward(self, temporal: Tensor, spectral: Tensor, master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N_t, in_dim), (B, N_s, in_dim), (B or 1, 1, in_dim) -> the same three with out_dim."""
        n_temporal = temporal.shape[1]
        nodes = self.drop(torch.cat([self.temporal(temporal), self.spectral(spectral)], dim=1))

        pairs = torch.tanh(self.pair(nodes[:, :, None] * nodes[:, None]))  # (B, N, N, out_dim)
        weights = torch.cat([self.temporal_weight, self.cross_weight, self.spectral_weight], dim=1)
        within_t, cross, within_s = (pairs @ weights).unbind(-1)
        from_t = torch.cat([within_t[:, :n_temporal, :n_temporal], cross[:, :n_temporal, n_temporal:]], dim=2)
        from_s = torch.cat([cross[:, n_temporal:, :n_temporal], within_s[:, n_temporal:, n_temporal:]], dim=2)
        attention = (torch.cat([from_t, from_s], dim=1) / self.temperature).softmax(-1)

        to_master = torch.tanh(self.master_pair(nodes * master)) @ self.master_weight  # (B, N, 1)
        to_master = (to_master / self.temperature).softmax(1).transpose(1, 2)
        master = self.master_attended(to_master @ nodes) + self.master_own(master)

        nodes = self.attended(attention @ nodes) + self.own(nodes)
        nodes = F.selu(_norm_nodes(self.norm, nodes))
        return nodes[:, :n_temporal], nodes[:, n_temporal:], master


class Branch(nn.Module):
    """Two rounds of heterogeneous attention with pooling between; two of these run side by side."""

    def __init__(self, config: AASISTConfig):
        super().__init__()
        self.master = nn.Parameter(torch.randn(1, 1, config.graph_dim))
        self.first = HeterogeneousAttention(config.graph_dim, config.branch_dim, config.branch_temperature)
        self.temporal_pool = NodePooling(config.branch_dim, config.branch_keep)
        self.spectral_pool = NodePooling(config.branch_dim, config.branch_keep)
        self.second = HeterogeneousAttention(config.branch_dim, config.branch_dim, config.branch_temperature)
        self.drop = nn.Dropout(0.2)

    def forward(self, temporal: Tensor, spectral: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The graphs and the master after the second round, each added to what the round started from."""
        temporal, spectral, master = self.first(temporal, spectral, self.master)
        nodes = self.temporal_pool(temporal), self.spectral_pool(spectral), master
        updates = self.second(*nodes)
        return tuple(self.drop(node + update) for node, update in zip(nodes, updates, strict=True))


class AASIST(nn.Module):
    """The countermeasure of arXiv 2110.01200; shapes and quirks are in the module's docstring.

    Raises:
        ConfigError: a configuration no network can be built from.
    """

    def __init__(self, config: AASISTConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        channels, dim = config.channels[-1], config.graph_dim
        self.spectral_position = nn.Parameter(torch.randn(1, self.encoder.n_bands, channels))
        self.spectral_attention = PairAttention(channels, dim, config.graph_temperature)
        self.temporal_attention = PairAttention(channels, dim, config.graph_temperature)
        self.spectral_pool = NodePooling(dim, config.spectral_keep)
        self.temporal_pool = NodePooling(dim, config.temporal_keep)
        self.branch1, self.branch2 = Branch(config), Branch(config)
        self.drop = nn.Dropout(0.5)
        self.output = nn.Linear(5 * config.branch_dim, 2)

    @property
    def min_samples(self) -> int:
        """Fewest samples of a waveform: two temporal nodes, as one alone has no variance to normalise by."""
        return self.encoder.min_samples

    def forward(self, waveform: Tensor, band_mask: Tensor | None = None) -> CMOutput:
        """Score waveforms.

        Args:
            waveform: (B, T) float in [-1, 1] at 16 kHz, T at least `min_samples`.
            band_mask: 0/1 for every sinc filter, (sinc_filters,) or (B, sinc_filters); see `augment.draw_band_mask`.

        Returns:
            logits (B, 2), spoof and bona fide, and the embedding (B, 5 * branch_dim) they are read from.

        Raises:
            AudioError: the waveforms are not (B, T) or shorter than `min_samples`.
        """
        spectral, temporal = self._nodes(waveform, band_mask)
        spectral = self.spectral_pool(self.spectral_attention(spectral))
        temporal = self.temporal_pool(self.temporal_attention(temporal))
        branches = self.branch1(temporal, spectral), self.branch2(temporal, spectral)
        temporal, spectral, master = (torch.maximum(*pair) for pair in zip(*branches, strict=True))
        embedding = torch.cat(
            [
                temporal.abs().amax(1),
                temporal.mean(1),
                spectral.abs().amax(1),
                spectral.mean(1),
                master[:, 0],
            ],
            dim=1,
        )
        embedding = self.drop(embedding)
        return CMOutput(self.output(embedding), embedding)

    def attention_over_time(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """How each frame attends to the others, (B, N, N), and the indices of those pooling keeps, (B, kept, 1)."""
        _, temporal = self._nodes(waveform)
        layer = self.temporal_attention
        return layer.attention(temporal), self.temporal_pool.rated(layer(temporal))[1]

    def _nodes(self, waveform: Tensor, band_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nodes of both graphs: a band's largest values over time, (B, bands, channels), and a frame's."""
        check_waveform(waveform, self.min_samples)
        maps = self.encoder(waveform, band_mask).abs()  # (B, channels, bands, frames)
        return maps.amax(3).transpose(1, 2) + self.spectral_position, maps.amax(2).transpose(1, 2)


# What the published checkpoints call each part, rewritten in this order.
PUBLISHED_NAMES = (
    (r"^encoder\.(\d)\.0\.", r"encoder.blocks.\1."),
    (r"^first_bn\.", "encoder.norm."),
    (r"^pos_S$", "spectral_position"),
    (r"^GAT_layer_S\.", "spectral_attention."),
    (r"^GAT_layer_T\.", "temporal_attention."),
    (r"^pool_S\.", "spectral_pool."),
    (r"^pool_T\.", "temporal_pool."),
    (r"^master(\d)$", r"branch\1.master"),
    (r"^HtrgGAT_layer_ST(\d)1\.", r"branch\1.first."),
    (r"^HtrgGAT_layer_ST(\d)2\.", r"branch\1.second."),
    (r"^pool_hS(\d)\.", r"branch\1.spectral_pool."),
    (r"^pool_hT(\d)\.", r"branch\1.temporal_pool."),
    (r"^out_layer\.", "output."),
    (r"\.bn1\.", ".unused_norm."),
    (r"\.bn2?\.", ".norm."),
    (r"\.conv_downsample\.", ".shortcut."),
    (r"_pool\.proj\.", "_pool.gate."),
    (r"\.proj_type1\.", ".temporal."),
    (r"\.proj_type2\.", ".spectral."),
    (r"\.att_projM\.", ".master_pair."),
    (r"\.att_proj\.", ".pair."),
    (r"\.att_weightM$", ".master_weight"),
    (r"\.att_weight11$", ".temporal_weight"),
    (r"\.att_weight22$", ".spectral_weight"),
    (r"\.att_weight12$", ".cross_weight"),
    (r"\.att_weight$", ".pair_weight"),
    (r"\.proj_with_attM\.", ".master_attended."),
    (r"\.proj_without_attM\.", ".master_own."),
    (r"\.proj_with_att\.", ".attended."),
    (r"\.proj_without_att\.", ".own."),
)

published_state_dict = renaming("AASIST", PUBLISHED_NAMES, ("pos_S", "out_layer.weight"))
