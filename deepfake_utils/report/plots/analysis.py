"""Pictures for error analysis: where a countermeasure fails, and whether its number can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import norm

from deepfake_utils.conventions import BONAFIDE, NO_ATTACK, SAMPLE_RATE_HZ, SPOOF
from deepfake_utils.report.plots.basic import (
    BLACK,
    BLUE,
    CLASS_COLOUR,
    CURVE_COLOURS,
    DET_TICKS,
    GREEN,
    MARKERS,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    det_curves,
    draw_spectrogram,
    new_figure,
    score_bins,
    slant_long_names,
)

CLASS_NAME = {BONAFIDE: "bona fide", SPOOF: "spoof"}


def score_panels(panels: Mapping[str, tuple[np.ndarray, np.ndarray, Mapping[str, float]]]) -> Figure:
    """Densities of both classes' scores, one panel for each scale, with named thresholds.

    Args:
        panels: label of the score axis -> (scores (n,), labels (n,), {threshold's name: value}).
    """
    figure, axes = new_figure(1, len(panels), size=(4.8 * len(panels), 3.6), squeeze=False)
    for axis, (scale, (scores, labels, thresholds)) in zip(axes[0], panels.items(), strict=True):
        edges = score_bins(scores)
        for label, name in CLASS_NAME.items():
            chosen = scores[labels == label]
            axis.hist(
                chosen, edges, density=True, alpha=0.55, color=CLASS_COLOUR[label],
                label=f"{name} (n = {len(chosen):,})",
                hatch="//" if label == SPOOF else None, edgecolor="white", linewidth=0.3,
            )  # fmt: skip
        for (name, value), style in zip(thresholds.items(), ("--", ":", "-.", "-"), strict=False):
            axis.axvline(value, color=BLACK, linestyle=style, linewidth=1.3, label=f"{name}: {value:.3g}")
        axis.set(xlabel=scale, ylabel="density")
        axis.locator_params(axis="x", nbins=6)
        axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    return figure


def reliability_diagram(before: pd.DataFrame, after: pd.DataFrame) -> Figure:
    """Predicted against found probability of bona fide, before and after calibration.

    Args:
        before, after: as `calibration.reliability` returns them.
    """
    figure, axes = new_figure(1, 2, size=(8.6, 4.0), sharey=True)
    for axis, table, title in zip(axes, (before, after), ("raw score", "calibrated on dev"), strict=True):
        n = table["n_bonafide"] + table["n_spoof"]
        axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="what is promised is found")
        axis.scatter(table["predicted"], table["observed"], s=12 + 160 * n / n.max(), color=BLUE, edgecolors="white",
                     label=f"bins of equal weight, area: trials (n = {n.sum():,})")  # fmt: skip
        axis.set(xlabel="predicted probability of bona fide", title=title, xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
        axis.set_aspect("equal")
    axes[0].set_ylabel("share of bona fide found")
    axes[0].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    return figure


def tandem_cost(
    costs: Mapping[str, tuple[np.ndarray, np.ndarray]], *, operating_point: float | None = None, title: str = ""
) -> Figure:
    """Normalised tandem detection cost over the countermeasure's threshold, the minimum marked.

    Args:
        costs: form ("2019", "2021") -> (cost (n,), thresholds (n,)), as `metrics.tandem_curve` gives them: what is
            accepted from a score on is accepted from anywhere between it and the score below, so steps lead up to it.
        operating_point: threshold that was chosen beforehand on dev, drawn; the legend says what it costs.
    """
    figure, axis = new_figure(size=(7.4, 3.8))
    paid = []
    for (form, (cost, thresholds)), colour, style in zip(costs.items(), CURVE_COLOURS, ("-", "--"), strict=False):
        if operating_point is not None:
            paid.append(f"{cost[thresholds >= operating_point][0]:.4f} ({form})")
        finite = np.isfinite(thresholds)
        cost, thresholds = cost[finite], thresholds[finite]
        best = int(np.argmin(cost))
        axis.step(thresholds, cost, where="pre", color=colour, linestyle=style, linewidth=1.4,
                  label=f"{form} form: minimum {cost[best]:.4f} at {thresholds[best]:.3g}")  # fmt: skip
        axis.plot(thresholds[best], cost[best], "o", color=colour, markersize=7, markeredgecolor="white")
    axis.axhline(1, color="0.6", linewidth=0.8, linestyle=":", label="a constant decision")
    if operating_point is not None:
        axis.axvline(operating_point, color=BLACK, linestyle="-.", linewidth=1,
                     label=f"threshold chosen on dev: costs {', '.join(paid)}")  # fmt: skip
    top = max(1.25, min(3.0, max(float(cost.max()) for cost, _ in costs.values())))
    axis.set(
        xlabel="threshold on the score (accept as bona fide above)",
        ylabel="normalised t-DCF",
        ylim=(0, top),
        title=title,
    )
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.18), ncols=1)
    return figure


def rejections_by_speaker(table: pd.DataFrame) -> Figure:
    """Share of each speaker's bona fide trials that is rejected, for the first 30 speakers of the table.

    Args:
        table: as `compare.rejections` returns it: speaker, n_bonafide, p_miss, low and high (fractions).
    """
    table = table.head(30)
    figure, axis = new_figure(size=(max(5.0, 0.42 * len(table) + 2), 3.6))
    position, share = np.arange(len(table)), 100 * table["p_miss"]
    spread = 100 * np.clip([table["p_miss"] - table["low"], table["high"] - table["p_miss"]], 0, None)
    axis.bar(position, share, color=BLUE, width=0.7)
    axis.errorbar(position, share, yerr=spread, fmt="none", ecolor=BLACK, capsize=2.5, linewidth=0.9)
    axis.set_xticks(position, [f"{s}\nn = {n}" for s, n in zip(table["speaker"], table["n_bonafide"], strict=True)],
                    rotation=90 if len(table) > 8 else 0, fontsize="x-small")  # fmt: skip
    axis.set(ylabel="real rejected (%)", ylim=(0, 104))
    return figure


def gap_parts(parts: pd.DataFrame) -> Figure:
    """From the dev error to the eval error, step by step: what each kind of trial adds at one threshold.

    Args:
        parts: as `compare.gap_parts` returns it: columns what, part (fractions), n; `.attrs` dev and eval errors.
    """
    dev, total = parts.attrs["dev_error"], parts.attrs["eval_error"]
    figure, axis = new_figure(size=(max(5.6, 0.75 * len(parts) + 3), 3.9))
    starts = dev + np.concatenate(([0], np.cumsum(parts["part"])[:-1]))
    axis.bar(0, 100 * dev, color="0.55", width=0.7)
    colours = [BLUE if what == "bona fide" else VERMILION for what in parts["what"]]
    hatches = ["" if part >= 0 else "//" for part in parts["part"]]
    position = np.arange(1, len(parts) + 1)
    axis.bar(
        position, 100 * parts["part"], bottom=100 * starts, color=colours, hatch=hatches, edgecolor="white", width=0.7
    )
    axis.bar(len(parts) + 1, 100 * total, color="0.25", width=0.7)
    for x, start, part in zip(position, starts, parts["part"], strict=True):
        axis.annotate(
            f"{100 * part:+.1f}", (x, 100 * max(start, start + part)), ha="center", va="bottom", fontsize="small"
        )
        axis.plot([x - 1.35, x + 0.35], 2 * [100 * start], color="0.5", linewidth=0.7)
    for x, value in ((0, dev), (len(parts) + 1, total)):
        axis.annotate(f"{100 * value:.1f}", (x, 100 * value), ha="center", va="bottom", fontsize="small")
    names = [f"{what}\nn = {n:,}" for what, n in zip(parts["what"], parts["n"], strict=True)]
    axis.set_xticks(range(len(parts) + 2), ["dev", *names, "eval"], fontsize="small")
    slant_long_names(axis, parts["what"])
    axis.set(ylabel="mean of real rejected and fake accepted (%)", ylim=(0, 1.12 * axis.get_ylim()[1]))
    return figure


def eer_bars(table: pd.DataFrame, *, title: str = "") -> Figure:
    """One horizontal bar for each decision rule, against what a coin gives.

    Args:
        table: columns rule, eer, low and high (fractions; NaN for no interval).
    """
    figure, axis = new_figure(size=(7.2, 0.42 * len(table) + 1.3))
    position = np.arange(len(table))[::-1]
    axis.barh(position, 100 * table["eer"], color=SKY, edgecolor=BLUE, height=0.65)
    spread = 100 * np.clip([table["eer"] - table["low"], table["high"] - table["eer"]], 0, None)
    axis.errorbar(100 * table["eer"], position, xerr=spread, fmt="none", ecolor=BLACK, capsize=3, linewidth=1)
    for y, eer in zip(position, table["eer"], strict=True):  # beside the axes, where no bar and no whisker ends
        axis.annotate(f"{100 * eer:.2f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize="small")
    axis.axvline(50, color=BLACK, linestyle=":", linewidth=1.2, label="a coin")
    axis.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1))
    axis.set_yticks(position, table["rule"], fontsize="small")
    axis.set(xlabel="EER on eval (%)", xlim=(0, 100))
    axis.set_title(title, loc="left", fontsize="medium")
    return figure


def trimming(scores: np.ndarray, trimmed: np.ndarray, labels: np.ndarray, cut_s: np.ndarray) -> Figure:
    """How scores move when the silence at both ends is cut off.

    Args:
        scores, trimmed: (n,) of the same clips, whole and trimmed; labels (n,); cut_s (n,): seconds cut off.
    """
    figure, (axis, moved) = new_figure(1, 2, size=(9.6, 4.0))
    low, high = min(scores.min(), trimmed.min()), max(scores.max(), trimmed.max())
    axis.plot([low, high], [low, high], color="0.6", linestyle=":")
    for label, marker in ((BONAFIDE, "o"), (SPOOF, "^")):
        of = labels == label
        name = f"{CLASS_NAME[label]} (n = {of.sum()})"
        style = {
            "color": CLASS_COLOUR[label],
            "marker": marker,
            "s": 26,
            "alpha": 0.75,
            "edgecolors": "white",
            "linewidths": 0.4,
        }
        axis.scatter(scores[of], trimmed[of], label=name, **style)
        moved.scatter(cut_s[of], (trimmed - scores)[of], **style)
    axis.set(xlabel="score, whole clip", ylabel="score, silence trimmed")
    axis.locator_params(nbins=5)
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    moved.axhline(0, color="0.6", linestyle=":")
    moved.set(xlabel="silence cut off (s)", ylabel="change of the score")
    return figure


def embedding_map(maps: Mapping[str, np.ndarray], attacks: Sequence[str], *, seen: Sequence[str] = ()) -> Figure:
    """Embeddings in two dimensions, coloured by attack; unfilled markers are attacks that were in training, said so.

    Args:
        maps: title -> coordinates (n, 2).
        attacks: (n,), "-" for bona fide.
        seen: attacks that were in training.
    """
    attacks = np.asarray(attacks)
    figure, axes = new_figure(1, len(maps), size=(4.1 * len(maps) + 1.4, 4.0), squeeze=False)
    colours = [c for c in PALETTE if c not in (BLUE, YELLOW)]
    names = sorted(set(attacks) - {NO_ATTACK})
    for axis, (title, points) in zip(axes[0], maps.items(), strict=True):
        for number, name in enumerate(names):
            of, colour = attacks == name, colours[number % len(colours)]
            axis.scatter(*points[of].T, marker=MARKERS[1 + number % (len(MARKERS) - 1)], s=34,
                         label=f"{name}{', in training' if name in seen else ''} (n = {of.sum()})",
                         facecolors="none" if name in seen else colour, edgecolors=colour if name in seen else "white",
                         linewidths=1.2 if name in seen else 0.4)  # fmt: skip
        of = attacks == NO_ATTACK
        axis.scatter(*points[of].T, color=BLUE, marker="o", s=34, edgecolors="white", linewidths=0.4,
                     label=f"bona fide (n = {of.sum()})")  # fmt: skip
        axis.set(title=title, xticks=[], yticks=[], xlabel="first dimension", ylabel="second dimension")
    axes[0, -1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def clip_under_the_lens(
    waveform: np.ndarray, windows: pd.DataFrame, relevance: np.ndarray, *, whole: float, threshold: float, title: str
) -> Figure:
    """One clip: waveform, spectrogram, the score of stretches of it, and what in time-frequency moved the score.

    Args:
        waveform: samples (n,) at 16 kHz.
        windows: columns start_s, stop_s, score, as `probing.model.window_scores` returns them.
        relevance: (bands, frames), as `probing.model.relevance` returns it: change of the score per cell.
        whole: score of the whole clip; threshold: accepted as bona fide from here on.
    """
    duration_s = len(waveform) / SAMPLE_RATE_HZ
    figure, axes = new_figure(4, 1, size=(8.6, 8.6), sharex=True, height_ratios=(0.7, 1.6, 1.0, 1.6))
    time_s = np.arange(len(waveform)) / SAMPLE_RATE_HZ
    axes[0].plot(time_s, waveform, color=BLACK, linewidth=0.35)
    peak = 1.05 * max(float(np.abs(waveform).max()), 1e-3)
    axes[0].set(ylabel="amplitude", title=title, ylim=(-peak, peak))
    draw_spectrogram(axes[1], waveform)
    axes[1].set_xlabel("")
    axes[2].hlines(
        windows["score"], windows["start_s"], windows["stop_s"], color=GREEN, linewidth=2.4, label="this stretch alone"
    )
    axes[2].axhline(whole, color=PURPLE, linewidth=1.3, label=f"whole clip: {whole:.4g}")
    axes[2].axhline(threshold, color=BLACK, linestyle="--", linewidth=1, label=f"dev's threshold: {threshold:.4g}")
    axes[2].set(ylabel="score")
    axes[2].ticklabel_format(axis="y", useOffset=False)  # an offset would stand where the legend does
    axes[2].legend(frameon=False, fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 0.98), ncols=3)
    limit = float(np.quantile(np.abs(relevance), 0.995)) or 1.0  # a few cells outshine all others
    image = axes[3].imshow(
        relevance, origin="lower", aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest",
        extent=(0, duration_s, 0, SAMPLE_RATE_HZ / 2000),
    )  # fmt: skip
    axes[3].set(ylabel="frequency (kHz)", xlabel="time (s)", xlim=(0, duration_s))
    figure.colorbar(image, ax=axes[3], label="change of the score\nspoof < 0 < bona fide", extend="both", pad=0.01)
    return figure


def agreement(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, *, names: tuple[str, str], threshold: float
) -> Figure:
    """Log-likelihood ratios of two systems on the same trials, cut into four by one threshold.

    Args:
        first, second: (n,) calibrated log-likelihood ratios; labels (n,); names of the two systems.
        threshold: on either, accept as bona fide from here on.
    """
    figure, axis = new_figure(size=(5.6, 5.0))
    for label, marker in ((SPOOF, "^"), (BONAFIDE, "o")):
        of = labels == label
        axis.scatter(first[of], second[of], color=CLASS_COLOUR[label], marker=marker, s=24 if of.sum() < 2000 else 4,
                     alpha=0.65, edgecolors="white", linewidths=0.3,
                     label=f"{CLASS_NAME[label]} (n = {of.sum():,})")  # fmt: skip
    axis.axvline(threshold, color=BLACK, linestyle="--", linewidth=1)
    axis.axhline(threshold, color=BLACK, linestyle="--", linewidth=1)
    axis.set_title(f"upper left: only {names[1]} accepts; lower right: only {names[0]}", fontsize="small", loc="left")
    axis.set(xlabel=f"log-likelihood ratio, {names[0]}", ylabel=f"log-likelihood ratio, {names[1]}")
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.13), ncols=2)
    return figure


def det_with_points(
    systems: Mapping[str, tuple[np.ndarray, np.ndarray]], points: Mapping[str, tuple[float, float]], *, title: str = ""
) -> Figure:
    """DET curves (see `det_curves`) with operating points that were chosen beforehand.

    Args:
        systems: name -> (scores (n,), labels (n,)).
        points: name -> (p_fa, p_miss), fractions, of the last system.
    """
    figure = det_curves(systems, title=title)
    axis, labels = figure.axes[0], np.asarray(list(systems.values())[-1][1])
    lowest = np.maximum(0.5 / np.array([(labels == SPOOF).sum(), (labels == BONAFIDE).sum()]), DET_TICKS[0])
    for (name, (p_fa, p_miss)), marker, colour in zip(
        points.items(), "X*Pv", (ORANGE, GREEN, PURPLE, BLACK), strict=False
    ):
        at = norm.ppf(np.clip((p_fa, p_miss), lowest, DET_TICKS[-1]))
        label = f"{name}: {100 * p_miss:.2f} % real rejected, {100 * p_fa:.2f} % fake accepted"
        axis.plot(*at, marker, color=colour, markersize=11, markeredgecolor=BLACK, linestyle="", label=label)
    axis.legend(frameon=False, fontsize="x-small", loc="upper left", bbox_to_anchor=(0, -0.12))
    return figure
