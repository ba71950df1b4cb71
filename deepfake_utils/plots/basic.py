"""Pictures: each function takes data and returns a Matplotlib figure with axes, units and counts.

Bona fide is always blue and spoof always vermilion (Okabe and Ito's colour-blind-safe palette); nothing is told
by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.signal import stft
from scipy.stats import norm

from deepfake_utils.conventions import BONAFIDE, SAMPLE_RATE_HZ, SPOOF
from deepfake_utils.metrics import compute_eer, det_points

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
CLASS_COLOUR = {BONAFIDE: BLUE, SPOOF: VERMILION}
DYNAMIC_RANGE_DB = 80.0  # of spectrograms: what is further below the maximum is drawn as silence
DET_TICKS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)


def new_figure(n_rows: int = 1, n_columns: int = 1, size: tuple[float, float] = (7.0, 4.0), **options):
    """A figure outside pyplot's global list, so that notebooks show it once and nothing accumulates."""
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    axes = figure.subplots(n_rows, n_columns, **options)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_spectrogram(
    axis: Axes, waveform: np.ndarray, *, window_s: float = 0.02, hop_s: float = 0.005, colour_bar: bool = True
) -> None:
    """Draw a log-power spectrogram in dB below the clip's own maximum."""
    window, hop = int(window_s * SAMPLE_RATE_HZ), int(hop_s * SAMPLE_RATE_HZ)
    frequency, time, spectrum = stft(waveform, SAMPLE_RATE_HZ, nperseg=window, noverlap=window - hop, nfft=512)
    power_db = 20 * np.log10(np.abs(spectrum) + 1e-10)
    power_db -= power_db.max()
    image = axis.pcolormesh(
        time, frequency / 1000, power_db, vmin=-DYNAMIC_RANGE_DB, vmax=0, cmap="magma", shading="auto", rasterized=True
    )
    axis.set(ylabel="frequency (kHz)", xlabel="time (s)", ylim=(0, SAMPLE_RATE_HZ / 2000))
    if colour_bar:
        axis.figure.colorbar(image, ax=axis, label="dB below maximum", pad=0.01)


def clips(waveforms: Mapping[str, np.ndarray]) -> Figure:
    """Waveform above spectrogram for each clip, side by side.

    Args:
        waveforms: title -> samples (n,) at 16 kHz in [-1, 1].
    """
    n = len(waveforms)
    figure, axes = new_figure(2, n, size=(5.2 * n, 5.2), squeeze=False, height_ratios=(1, 2), sharex="col")
    for column, (title, waveform) in enumerate(waveforms.items()):
        time_s = np.arange(len(waveform)) / SAMPLE_RATE_HZ
        axes[0, column].plot(time_s, waveform, color=BLUE if "bona" in title.lower() else VERMILION, linewidth=0.4)
        axes[0, column].set(title=title, ylim=(-1, 1), ylabel="amplitude" if column == 0 else "")
        draw_spectrogram(axes[1, column], waveform)
    return figure


def spectrogram_grid(waveforms: Mapping[str, np.ndarray], *, n_columns: int = 4) -> Figure:
    """Small spectrograms side by side, on one scale of dB below each clip's maximum.

    Args:
        waveforms: title -> samples (n,) at 16 kHz.
    """
    n_rows = -(-len(waveforms) // n_columns)
    figure, axes = new_figure(n_rows, n_columns, size=(3.1 * n_columns, 2.2 * n_rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(waveforms) :]:
        axis.set_visible(False)
    for axis, (title, waveform) in zip(axes.flat, waveforms.items(), strict=False):
        draw_spectrogram(axis, waveform, colour_bar=False)
        axis.set_title(title, fontsize="small")
        axis.label_outer()
    return figure


def training_curves(history: pd.DataFrame) -> Figure:
    """Training loss, dev EER and learning rate over the epochs; the kept epoch is marked.

    Args:
        history: as `fit` returns it, one row an epoch.
    """
    figure, (loss, eer, rate) = new_figure(1, 3, size=(11, 3.2))
    epochs = history["epoch"]
    loss.plot(epochs, history["train_loss"], color=BLACK, marker="o", markersize=3)
    loss.set(title="Training loss", xlabel="epoch", ylabel="weighted loss (nats)", ylim=(0, None))
    eer.plot(epochs, 100 * history["dev_eer"], color=BLUE, marker="o", markersize=3)
    best = history["dev_eer"].idxmin()
    eer.scatter(
        [epochs[best]], [100 * history["dev_eer"][best]], s=90, facecolors="none", edgecolors=VERMILION, linewidths=2
    )
    eer.annotate(
        f"kept: {100 * history['dev_eer'][best]:.2f} %", (epochs[best], 100 * history["dev_eer"][best]),
        xytext=(0, 12), textcoords="offset points", color=VERMILION, ha="center",
    )  # fmt: skip
    eer.set(title="Dev equal error rate", xlabel="epoch", ylabel="EER (%)", ylim=(0, None))
    rate.plot(epochs, history["learning_rate"], color=GREEN, marker="o", markersize=3)
    rate.set(title="Learning rate at the epoch's end", xlabel="epoch", ylabel="learning rate", yscale="log")
    for axis in (loss, eer, rate):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def score_histogram(
    scores: np.ndarray, labels: np.ndarray, *, threshold: float | None = None, title: str = ""
) -> Figure:
    """Densities of bona fide and spoof scores; each class integrates to one.

    Args:
        scores: (n,), higher is more bona fide.
        labels: (n,), 1 bona fide, 0 spoof.
        threshold: drawn as a line where given.
    """
    figure, axis = new_figure(size=(7, 3.4))
    edges = np.histogram_bin_edges(scores, bins=60)
    for label, name in ((BONAFIDE, "bona fide"), (SPOOF, "spoof")):
        chosen = scores[labels == label]
        axis.hist(
            chosen, edges, density=True, alpha=0.55, color=CLASS_COLOUR[label], label=f"{name} (n = {len(chosen):,})",
            hatch="//" if label == SPOOF else None, edgecolor="white", linewidth=0.3,
        )  # fmt: skip
    if threshold is not None:
        axis.axvline(threshold, color=BLACK, linestyle="--", label=f"threshold {threshold:.3g}")
    axis.set(xlabel="score (higher: more bona fide)", ylabel="density", title=title)
    axis.legend(frameon=False)
    return figure


def det_curves(systems: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "") -> Figure:
    """Detection error trade-off on normal-deviate axes, the EER of each system marked.

    Args:
        systems: name -> (scores (n,), labels (n,)).

    Source: Martin et al., "The DET curve in assessment of detection task performance", Eurospeech 1997.
    """
    figure, axis = new_figure(size=(5.4, 5.2))
    for (name, (scores, labels)), colour in zip(systems.items(), PALETTE[:2] + PALETTE[2:], strict=False):
        points, eer = det_points(scores, labels), compute_eer(scores, labels).eer
        low_fa, low_miss = 0.5 / points.n_spoof, 0.5 / points.n_bonafide  # half a trial: zero has no place on the axis
        p_fa, p_miss = np.clip(points.p_fa, low_fa, 1 - low_fa), np.clip(points.p_miss, low_miss, 1 - low_miss)
        axis.plot(norm.ppf(p_fa), norm.ppf(p_miss), color=colour, drawstyle="steps-post",
                  label=f"{name}: EER {100 * eer:.2f} % (n = {points.n_bonafide:,} + {points.n_spoof:,})")  # fmt: skip
        at = norm.ppf(np.clip(eer, min(low_fa, low_miss), 0.5))
        axis.plot(at, at, "o", color=colour, markersize=6)
    limits = norm.ppf((DET_TICKS[0] * 0.7, DET_TICKS[-1]))
    axis.plot(limits, limits, color="0.7", linewidth=0.8, linestyle=":")
    ticks, names = norm.ppf(DET_TICKS), [f"{100 * tick:g}" for tick in DET_TICKS]
    axis.set(xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names, xlim=limits, ylim=limits, aspect="equal")
    axis.set(xlabel="spoof accepted (%)", ylabel="bona fide rejected (%)", title=title)
    axis.grid(color="0.92")
    axis.legend(frameon=False, fontsize="small", loc="upper right")
    return figure


def attack_bars(per_attack: pd.DataFrame, *, overall: float | None = None, seen: Sequence[str] = ()) -> Figure:
    """EER of each attack against all bona fide trials, with its interval where there is one.

    Args:
        per_attack: columns attack, eer (fraction), n; optionally low and high (fractions).
        overall: the pooled EER, drawn as a line.
        seen: attacks that were in training; the others are hatched.
    """
    table = per_attack.sort_values("eer", ascending=False)
    figure, axis = new_figure(size=(max(5.0, 0.62 * len(table) + 2), 3.6))
    position = np.arange(len(table))
    novel = ~table["attack"].isin(list(seen)).to_numpy()
    bars = axis.bar(position, 100 * table["eer"], color=np.where(novel, VERMILION, ORANGE), width=0.7)
    for bar, is_novel in zip(bars, novel, strict=True):
        bar.set_hatch("//" if is_novel and len(seen) else "")
        bar.set_edgecolor("white")
    if {"low", "high"} <= set(table):
        below, above = table["eer"] - table["low"], table["high"] - table["eer"]
        spread = 100 * np.clip([below, above], 0, None)
        axis.errorbar(position, 100 * table["eer"], yerr=spread, fmt="none", ecolor=BLACK, capsize=3, linewidth=1)
    labels = [f"{attack}\nn = {n:,}" for attack, n in zip(table["attack"], table["n"], strict=True)]
    axis.set_xticks(position, labels, fontsize="small")
    axis.set(ylabel="EER against all bona fide (%)", ylim=(0, max(1.0, axis.get_ylim()[1])))
    if overall is not None:
        axis.axhline(100 * overall, color=BLACK, linestyle="--", linewidth=1)
        axis.annotate(f"pooled {100 * overall:.2f} %", (1, 100 * overall), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", fontsize="small")  # fmt: skip
    if len(seen):
        axis.set_title("hatched: not in training", fontsize="small")
    return figure


def corpus_overview(protocol: pd.DataFrame) -> Figure:
    """Trials of each split by label and attack.

    Args:
        protocol: the columns of `conventions.PROTOCOL_COLUMNS`.
    """
    counts = protocol.groupby(["split", "attack"]).size().rename("trials").reset_index()
    splits = [s for s in ("train", "dev", "eval") if (counts["split"] == s).any()]
    figure, axes = new_figure(1, len(splits), size=(3.8 * len(splits), 3.2), squeeze=False, sharey=True)
    for axis, split in zip(axes[0], splits, strict=True):
        part = counts[counts["split"] == split].sort_values("attack")
        names = part["attack"].replace("-", "bona fide")
        colours = [BLUE if attack == "-" else VERMILION for attack in part["attack"]]
        sns.barplot(x=part["trials"].to_numpy(), y=names.to_numpy(), hue=names.to_numpy(), palette=colours,
                    legend=False, ax=axis)  # fmt: skip
        axis.set(title=f"{split} (n = {part['trials'].sum():,})", xlabel="trials", ylabel="")
        axis.tick_params(labelleft=True)
    return figure


# What the models see (notebook 01).


def filter_responses(banks: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Frequency response of every filter of each bank, side by side.

    Args:
        banks: title -> (frequencies (P,) in Hz, magnitudes (n_filters, P)), as
            `SincFilters.frequency_response` gives them.
    """
    figure, axes = new_figure(1, len(banks), size=(4.4 * len(banks), 3.2), squeeze=False, sharey=True)
    for axis, (title, (frequencies_hz, magnitudes)) in zip(axes[0], banks.items(), strict=True):
        for index, magnitude in enumerate(magnitudes):
            style = ("-", "--", ":")[index % 3]  # neighbours differ by line style as well as by colour
            axis.plot(frequencies_hz / 1000, magnitude, color=PALETTE[index % 3], linestyle=style, linewidth=0.9)
        axis.set(title=f"{title} (n = {len(magnitudes)})", xlabel="frequency (kHz)", xlim=(0, SAMPLE_RATE_HZ / 2000))
    axes[0, 0].set(ylabel="gain (1: unchanged)", ylim=(0, None))
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
    figure, (clip, matrix) = new_figure(1, 2, size=(12.5, 3.8), width_ratios=(1.75, 1))
    draw_spectrogram(clip, waveform)
    n_nodes = len(attention)
    edges_s = np.linspace(0, len(waveform) / SAMPLE_RATE_HZ, n_nodes + 1)
    received = clip.twinx()
    received.stairs(n_nodes * attention.mean(0), edges_s, color="white", linewidth=2.6)
    received.stairs(n_nodes * attention.mean(0), edges_s, color=SKY, linewidth=1.4)
    received.set(ylabel="attention received (1: an even share)", ylim=(0, None))
    centres_s = (edges_s[:-1] + edges_s[1:]) / 2
    clip.plot(centres_s[kept], np.full(kept.sum(), 7.8), "v", color="white", markeredgecolor=BLACK, markersize=6)
    clip.set_title(f"{title}; triangles: the {kept.sum()} nodes kept of {n_nodes}", fontsize="medium")
    image = matrix.imshow(n_nodes * attention, cmap="cividis", origin="lower", interpolation="nearest")
    matrix.set(xlabel="attended node", ylabel="attending node", title="attention, times an even share")
    figure.colorbar(image, ax=matrix, pad=0.01)
    return figure


def model_comparison(table: pd.DataFrame) -> Figure:
    """Error against cost: one point a model, with the interval of its error.

    Args:
        table: index the model; columns eer, low, high (fractions), score_s (seconds per utterance) and parameters.
    """
    figure, axis = new_figure(size=(7.5, 4.4))
    for (name, row), colour, marker in zip(
        table.iterrows(), [c for c in PALETTE if c != YELLOW] * 2, "osD^vP*Xp<>hd8H.", strict=False
    ):
        spread = 100 * np.array([[row["eer"] - row["low"]], [row["high"] - row["eer"]]]).clip(0)
        axis.errorbar(
            1000 * row["score_s"], 100 * row["eer"], yerr=spread, color=colour, marker=marker, markersize=8,
            capsize=3, linestyle="", label=f"{name} ({row['parameters'] / 1e6:.2g} M)",
        )  # fmt: skip
    axis.set(
        xscale="log", xlabel="scoring time (ms an utterance)", ylabel="EER here (%), 95 % interval", ylim=(0, None)
    )
    axis.axhline(50, color="0.6", linewidth=0.8, linestyle=":")
    axis.annotate("a coin", (1, 50), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize="small")
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
