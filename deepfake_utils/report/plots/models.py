"""Pictures of the models: what they see, where they look, what they cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from deepfake_utils.conventions import SAMPLE_RATE_HZ
from deepfake_utils.report.plots.basic import (
    BLACK,
    CURVE_COLOURS,
    MARKERS,
    PALETTE,
    SKY,
    YELLOW,
    draw_spectrogram,
    new_figure,
)


def filter_responses(banks: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Frequency response of every filter of each bank, side by side.

    Args:
        banks: title -> (frequencies (P,) in Hz, magnitudes (n_filters, P)), as
            `SincFilters.frequency_response` gives them.
    """
    figure, axes = new_figure(1, len(banks), size=(max(5.0, 3.3 * len(banks)), 3.0), squeeze=False, sharey=True)
    for axis, (title, (frequencies_hz, magnitudes)) in zip(axes[0], banks.items(), strict=True):
        for index, magnitude in enumerate(magnitudes):
            colour = CURVE_COLOURS[index % 2]
            axis.fill_between(frequencies_hz / 1000, magnitude, color=colour, alpha=0.3, linewidth=0)
            axis.plot(frequencies_hz / 1000, magnitude, color=colour, linewidth=0.8)
        axis.set(title=f"{title} (n = {len(magnitudes)})", xlabel="frequency (kHz)", xlim=(0, SAMPLE_RATE_HZ / 2000))
    axes[0, 0].set(ylabel="gain (1: unchanged)", ylim=(0, 1.1))
    return figure


def cutoff_moves(before_hz: np.ndarray, after_hz: np.ndarray) -> Figure:
    """How far training moved the cut-offs of a filter bank.

    Args:
        before_hz, after_hz: (2, n_filters), lower and upper cut-off of each filter.
    """
    figure, axis = new_figure(size=(7, 3.0))
    for name, colour, marker, start, end in zip(
        ("lower cut-off", "upper cut-off"), CURVE_COLOURS, "v^", before_hz, after_hz, strict=False
    ):
        axis.plot(start / 1000, end - start, marker, color=colour, label=name)
        axis.vlines(start / 1000, 0, end - start, color=colour, linewidth=0.8)
    axis.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
    axis.set(xlabel="cut-off before training (kHz)", ylabel="moved by (Hz)", xlim=(-0.1, SAMPLE_RATE_HZ / 2000 + 0.1))
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    return figure


def cepstra(features: Mapping[str, np.ndarray], *, hop_s: float = 0.01) -> Figure:
    """LFCC of clips one above the other, each coefficient in standard deviations from its mean over all of them.

    Args:
        features: title -> (3 n, frames): n static coefficients, their deltas and delta-deltas.
        hop_s: time between frames, seconds.
    """
    together = np.concatenate(list(features.values()), axis=1)
    mean, deviation = together.mean(1, keepdims=True), together.std(1, keepdims=True) + 1e-12
    figure, axes = new_figure(len(features), 1, size=(8.5, 2.6 * len(features)), squeeze=False, sharex=True)
    for axis, (title, values) in zip(axes[:, 0], features.items(), strict=True):
        n = len(values) // 3
        image = axis.imshow(
            (values - mean) / deviation, origin="lower", aspect="auto", cmap="cividis", vmin=-2.5, vmax=2.5,
            extent=(0, values.shape[1] * hop_s, 0, len(values)), interpolation="nearest",
        )  # fmt: skip
        for edge in (n, 2 * n):
            axis.axhline(edge, color="white", linewidth=1)
        axis.set_yticks([n / 2, 3 * n / 2, 5 * n / 2], [f"static\n0-{n - 1}", "delta", "delta-\ndelta"])
        axis.set(title=title, ylabel="coefficient")
    axes[-1, 0].set_xlabel("time (s)")
    figure.colorbar(image, ax=axes, label="standard deviations", pad=0.01)
    return figure


def graph_attention(waveform: np.ndarray, attention: np.ndarray, kept: np.ndarray, *, title: str = "") -> Figure:
    """Where the nodes of a temporal graph look: on the clip's spectrogram, and node by node.

    Args:
        waveform: samples (n,) at 16 kHz, cut into as many equal spans as there are nodes.
        attention: (N, N), row i is how node i spreads its attention over all nodes; rows sum to 1.
        kept: (N,) bool, the nodes that graph pooling keeps.
    """
    figure, (clip, matrix) = new_figure(1, 2, size=(9.8, 3.6), width_ratios=(1.6, 1))
    draw_spectrogram(clip, waveform, colour_bar=False)  # its label would lie on that of the second scale
    n_nodes = len(attention)
    edges_s = np.linspace(0, len(waveform) / SAMPLE_RATE_HZ, n_nodes + 1)
    received = clip.twinx()
    shares = n_nodes * attention.mean(0)
    received.stairs(shares, edges_s, baseline=None, color=BLACK, linewidth=3)
    received.stairs(shares, edges_s, baseline=None, color=SKY, linewidth=1.6)
    received.set(ylabel="attention received\n(1: an even share)", ylim=(0, 1.35 * shares.max()))
    centres_s = (edges_s[:-1] + edges_s[1:]) / 2
    clip.plot(centres_s[kept], np.full(kept.sum(), 7.8), "v", color="white", markeredgecolor=BLACK, markersize=6)
    clip.set_title(f"{title}\ntriangles: the {kept.sum()} nodes kept of {n_nodes}", fontsize="medium")
    image = matrix.imshow(n_nodes * attention, cmap="cividis", origin="lower", interpolation="nearest")
    matrix.set(xlabel="attended node", ylabel="attending node", title="attention\ntimes an even share")
    figure.colorbar(image, ax=matrix, pad=0.01)
    return figure


def model_comparison(table: pd.DataFrame) -> Figure:
    """Error against cost: one point a model, with the interval of its error.

    Args:
        table: index the model; columns eer, low, high (fractions), score_s (seconds per utterance) and parameters.
    """
    figure, axis = new_figure(size=(8.5, 4.2))
    colours = [colour for colour in PALETTE if colour != YELLOW] * 2
    for (name, row), colour, marker in zip(table.iterrows(), colours, MARKERS, strict=False):
        spread = 100 * np.array([[row["eer"] - row["low"]], [row["high"] - row["eer"]]]).clip(0)
        axis.errorbar(
            1000 * row["score_s"], 100 * row["eer"], yerr=spread, color=colour, marker=marker, markersize=8,
            capsize=3, linestyle="", label=f"{name}, {row['parameters'] / 1e6:.2g} M",
        )  # fmt: skip
    axis.axhline(50, color="0.6", linewidth=0.8, linestyle=":", label="a coin")
    axis.set(xscale="log", ylim=(0, None), xlabel="scoring time (ms a clip)", ylabel="EER here (%), 95 % interval")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(
        frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), title="model, parameters"
    )
    return figure


def artefact_costs(artefacts: pd.DataFrame) -> Figure:
    """Error against time and against size, side by side: one point an artefact, with the interval of its error.

    Args:
        artefacts: as for `tables.artefact_table`; rows with one `family` share a colour, numbers set the marker.
    """
    figure, axes = new_figure(1, 2, size=(10.5, 4.4), sharey=True)
    families, kinds = list(dict.fromkeys(artefacts["family"])), list(dict.fromkeys(artefacts["numbers"]))
    colours = [colour for colour in PALETTE if colour != YELLOW]
    for axis, column, unit in ((axes[0], "ms", 1.0), (axes[1], "bytes", 1e-6)):
        for name, row in artefacts.iterrows():
            spread = 100 * np.array([[row["eer"] - row["low"]], [row["high"] - row["eer"]]]).clip(0)
            axis.errorbar(
                unit * row[column], 100 * row["eer"], yerr=spread, label=name, capsize=2, linestyle="", markersize=7,
                elinewidth=0.8, color=colours[families.index(row["family"]) % len(colours)],
                marker=MARKERS[kinds.index(row["numbers"])],
            )  # fmt: skip
        axis.set(xscale="log", ylim=(0, None))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.axhline(50, color="0.6", linewidth=0.8, linestyle=":")
    axes[0].set(xlabel="ms a window of 4 s, one core", ylabel="EER (%), 95 % interval; dotted: a coin")
    axes[1].set(xlabel="size (MB)")
    axes[1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
