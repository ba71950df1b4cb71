"""Pictures: each function takes data and returns a Matplotlib figure with axes, units and counts.

Bona fide is always blue and spoof always vermilion (Okabe and Ito's colour-blind-safe palette), and curves of anything
else have other colours; nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.signal import stft
from scipy.stats import norm

from deepfake_utils.conventions import BONAFIDE, NO_ATTACK, SAMPLE_RATE_HZ, SPOOF
from deepfake_utils.evaluation.metrics import compute_eer, det_points

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
CLASS_COLOUR = {BONAFIDE: BLUE, SPOOF: VERMILION}
SPLIT_COLOUR = {"dev": GREEN, "eval": PURPLE}
CURVE_COLOURS = (GREEN, PURPLE, BLACK, ORANGE, SKY, YELLOW)  # of systems, splits and forms: none is that of a class
MARKERS = "osD^vP*X<>hdp8H"
DYNAMIC_RANGE_DB = 80.0  # of spectrograms: what is further below the maximum is drawn as silence
DET_TICKS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)


def new_figure(n_rows: int = 1, n_columns: int = 1, size: tuple[float, float] = (7.0, 4.0), **options):
    """A figure outside pyplot's global list, so that notebooks show it once and nothing accumulates."""
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    axes = figure.subplots(n_rows, n_columns, **options)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def slant_long_names(axis: Axes, names: Sequence[str]) -> None:
    """Turn the labels under the bars where names are too long to stand side by side."""
    if max(map(len, names), default=0) > 9:
        axis.tick_params(axis="x", rotation=90)
        axis.figure.set_figheight(axis.figure.get_figheight() + 1.4)  # their room


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
    figure, axes = new_figure(2, n, size=(4.8 * n, 5.0), squeeze=False, height_ratios=(1, 2), sharex="col")
    peak = 1.05 * max(1e-3, *(float(np.abs(waveform).max()) for waveform in waveforms.values()))  # one scale for all
    for column, (title, waveform) in enumerate(waveforms.items()):
        time_s = np.arange(len(waveform)) / SAMPLE_RATE_HZ
        axes[0, column].plot(time_s, waveform, color=BLUE if "bona" in title.lower() else VERMILION, linewidth=0.4)
        axes[0, column].set(title=title, ylim=(-peak, peak), ylabel="amplitude" if column == 0 else "")
        draw_spectrogram(axes[1, column], waveform)
    return figure


def spectrogram_grid(waveforms: Mapping[str, np.ndarray], *, n_columns: int = 4) -> Figure:
    """Small spectrograms side by side, on one scale of dB below each clip's maximum.

    Args:
        waveforms: title -> samples (n,) at 16 kHz.
    """
    n_rows = -(-len(waveforms) // n_columns)
    figure, axes = new_figure(n_rows, n_columns, size=(2.4 * n_columns, 2.1 * n_rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(waveforms) :]:
        axis.set_visible(False)
    for axis, (title, waveform) in zip(axes.flat, waveforms.items(), strict=False):
        draw_spectrogram(axis, waveform, colour_bar=False)
        axis.set_title(title, fontsize="small")
        axis.label_outer()
    return figure


def training_curves(history: pd.DataFrame) -> Figure:
    """Training loss, dev EER and learning rate over the epochs; the epoch whose weights were kept is marked.

    Args:
        history: as `fit` returns it, one row an epoch. Its `best_dev_eer` is of the EER that selects, which may be
            that of all trials or the mean over sources.
    """
    figure, (loss, eer, rate) = new_figure(1, 3, size=(9.6, 3.0))
    epochs = history["epoch"]
    loss.plot(epochs, history["train_loss"], color=BLACK, marker="o", markersize=3)
    loss.set(title="Training loss", xlabel="epoch", ylabel="weighted loss (nats)", ylim=(0, None))
    for name, style, label in (("dev_eer", "-", "all trials"), ("dev_macro_eer", "--", "mean over sources")):
        if name in history:
            eer.plot(epochs, 100 * history[name], color=SPLIT_COLOUR["dev"], linestyle=style, marker="o", markersize=3,
                     label=label)  # fmt: skip
    kept = history["best_dev_eer"].idxmin()
    kept_eer = 100 * history["best_dev_eer"][kept]
    eer.scatter([epochs[kept]], [kept_eer], s=90, facecolors="none", edgecolors=BLACK,
                linewidths=2, label=f"kept: epoch {epochs[kept]}, {kept_eer:.2f} %")  # fmt: skip
    eer.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.2))
    eer.set(title="Dev equal error rate", xlabel="epoch", ylabel="EER (%)", ylim=(0, None))
    rate.plot(epochs, history["learning_rate"], color="0.4", marker="o", markersize=3)
    rate.set(title="Learning rate at the epoch's end", xlabel="epoch", ylabel="learning rate", yscale="log")
    for axis in (loss, eer, rate):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)  # whole epochs, also where there is one alone
    return figure


def score_bins(scores: np.ndarray) -> np.ndarray:
    """Edges of 12 to 60 bins, fewer where there are few scores: a comb of single trials shows no distribution."""
    return np.histogram_bin_edges(scores, bins=min(60, max(12, int(2 * np.sqrt(len(scores))))))


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
    edges = score_bins(scores)
    for label, name in ((BONAFIDE, "bona fide"), (SPOOF, "spoof")):
        chosen = scores[labels == label]
        axis.hist(
            chosen, edges, density=True, alpha=0.55, color=CLASS_COLOUR[label], label=f"{name} (n = {len(chosen):,})",
            hatch="//" if label == SPOOF else None, edgecolor="white", linewidth=0.3,
        )  # fmt: skip
    if threshold is not None:
        axis.axvline(threshold, color=BLACK, linestyle="--", label=f"threshold {threshold:.3g}")
    axis.set(xlabel="score (higher: more bona fide)", ylabel="density", title=title)
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.18), ncols=3)
    return figure


def det_curves(systems: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "") -> Figure:
    """Detection error trade-off on normal-deviate axes, the EER of each system marked.

    These axes have no place for a rate of zero: it is drawn as half an error, and the legend says so.

    Args:
        systems: name -> (scores (n,), labels (n,)).

    Source: Martin et al., "The DET curve in assessment of detection task performance", Eurospeech 1997.
    """
    figure, axis = new_figure(size=(5.4, 5.2))
    half_an_error = []
    for (name, (scores, labels)), colour in zip(systems.items(), cycle(CURVE_COLOURS), strict=False):
        points, eer = det_points(scores, labels), compute_eer(scores, labels).eer
        low_fa, low_miss = 0.5 / points.n_spoof, 0.5 / points.n_bonafide
        half_an_error += [low_fa, low_miss]
        p_fa, p_miss = np.clip(points.p_fa, low_fa, 1 - low_fa), np.clip(points.p_miss, low_miss, 1 - low_miss)
        axis.plot(norm.ppf(p_fa), norm.ppf(p_miss), color=colour, drawstyle="steps-post",
                  label=f"{name}: EER {100 * eer:.2f} % (n = {points.n_bonafide:,} + {points.n_spoof:,})")  # fmt: skip
        at = norm.ppf(np.clip(eer, (low_fa, low_miss), DET_TICKS[-1]))
        axis.plot(*at, "o", color=colour, markersize=6)
    limits = norm.ppf((DET_TICKS[0] * 0.7, DET_TICKS[-1]))
    axis.plot(limits, limits, color="0.7", linewidth=0.8, linestyle=":")
    ticks, names = norm.ppf(DET_TICKS), [f"{100 * tick:g}" for tick in DET_TICKS]
    axis.set(xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names, xlim=limits, ylim=limits, aspect="equal")
    axis.set(xlabel="fake accepted (%)", ylabel="real rejected (%)", title=title)
    axis.grid(color="0.92")
    if max(half_an_error) > DET_TICKS[0]:
        axis.plot([], [], linestyle="", label="no error at all is drawn as half an error")
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.12))
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
    slant_long_names(axis, table["attack"])
    axis.set(ylabel="EER against all bona fide (%)", ylim=(0, max(1.0, axis.get_ylim()[1])))
    if overall is not None:
        axis.axhline(100 * overall, color=BLACK, linestyle="--", linewidth=1, label=f"pooled {100 * overall:.2f} %")
        axis.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1))
    if len(seen):
        axis.set_title("hatched: not in training", fontsize="small", loc="left")
    return figure


def corpus_overview(protocol: pd.DataFrame) -> Figure:
    """Trials of each split by label and attack.

    Args:
        protocol: the columns of `conventions.PROTOCOL_COLUMNS`.
    """
    counts = protocol.groupby(["split", "attack"]).size().rename("trials").reset_index()
    splits = [s for s in ("train", "dev", "eval") if (counts["split"] == s).any()]
    figure, axes = new_figure(1, len(splits), size=(3.2 * len(splits), 3.0), squeeze=False)
    for axis, split in zip(axes[0], splits, strict=True):
        part = counts[counts["split"] == split].sort_values("attack")
        colours = [BLUE if attack == NO_ATTACK else VERMILION for attack in part["attack"]]
        axis.barh(part["attack"].replace(NO_ATTACK, "bona fide"), part["trials"], color=colours)
        axis.set(title=f"{split} (n = {part['trials'].sum():,})", xlabel="trials")
        axis.invert_yaxis()
    return figure
