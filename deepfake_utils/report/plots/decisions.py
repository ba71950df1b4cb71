"""Pictures of decisions: a recording's timeline, and what a threshold costs in its use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deepfake_utils.conventions import SAMPLE_RATE_HZ
from deepfake_utils.files import atomic_write
from deepfake_utils.report.plots.basic import BLACK, BLUE, ORANGE, SPLIT_COLOUR, VERMILION, new_figure
from deepfake_utils.waveforms.decode import iter_audio

BAND = "0.85"  # grey, of what is uncertain
ENVELOPE_S = 0.05  # of sound whose extremes are drawn as one line
MOST_COLUMNS = 2000  # of an envelope that are drawn; a screen has no more


def envelope(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """The smallest and largest sample of every 50 ms of a recording that comes in blocks: (n, 2).

    Args:
        blocks: samples (m,) at 16 kHz, as `iter_audio` gives them; a two-hour recording takes 1.2 MB.
    """
    step, rest, found = int(ENVELOPE_S * SAMPLE_RATE_HZ), np.zeros(0, np.float32), []
    for block in blocks:
        rest = np.concatenate([rest, block])
        whole = rest[: len(rest) // step * step].reshape(-1, step)
        found.append(np.stack([whole.min(axis=1), whole.max(axis=1)], axis=1))
        rest = rest[whole.size :]
    if len(rest):
        found.append(np.array([[rest.min(), rest.max()]]))
    return np.concatenate(found) if found else np.zeros((0, 2))


def timeline(
    windows: pd.DataFrame,
    extremes: np.ndarray,
    uncertain: tuple[float, float],
    *,
    fake_stretches: Iterable[tuple[float, float]] = (),
    truth: Iterable[tuple[float, float]] | None = None,
    title: str = "",
) -> Figure:
    """A recording over time: its waveform, and the log-odds of its windows with the band where they are uncertain.

    Args:
        windows: `Verdict.timeline`, of calibrated weights.
        extremes: (n, 2), as `envelope` gives them.
        uncertain: low and high bound of the band; equal where there is none.
        fake_stretches: (start_s, end_s) that are marked; truth: those that are fake, where that is known.
    """
    figure, (above, below) = new_figure(2, 1, size=(9.0, 4.6), sharex=True, height_ratios=(1, 1.6))
    n_joined = -(-len(extremes) // MOST_COLUMNS) or 1
    ends = np.arange(0, len(extremes), n_joined)
    low, high = np.minimum.reduceat(extremes[:, 0], ends), np.maximum.reduceat(extremes[:, 1], ends)
    above.fill_between(ends * ENVELOPE_S, low, high, color=BLACK, linewidth=0.2)
    for number, (start, end) in enumerate(fake_stretches):
        label = "sounds fake" if number == 0 else None
        above.axvspan(start, end, color=VERMILION, alpha=0.35, linewidth=0, label=label)
    for number, (start, end) in enumerate(truth or ()):
        above.hlines(low.min() * 1.15, start, end, color=ORANGE, linewidth=4, label=None if number else "is fake")
    above.set(ylabel="amplitude")
    above.set_title(title, loc="left", fontsize="medium")
    if above.get_legend_handles_labels()[0]:
        above.legend(frameon=False, fontsize="x-small", loc="upper right", bbox_to_anchor=(1, 1.18), ncols=2)
    below.axhspan(*uncertain, color=BAND, linewidth=0)
    below.axhline(uncertain[1], color=BLACK, linestyle="--", linewidth=1)
    values = windows["log_odds"].to_numpy(float)
    kinds = {"fake": values < uncertain[0], "real": values >= uncertain[1]}
    kinds["uncertain"] = ~(kinds["fake"] | kinds["real"])
    for name, colour, width in (("real", BLUE, 2.0), ("uncertain", "0.35", 2.0), ("fake", VERMILION, 3.2)):
        rows = windows[kinds[name]]
        if len(rows):
            label = f"{name} (n = {len(rows):,})"
            below.hlines(rows["log_odds"], rows["start_s"], rows["end_s"], color=colour, linewidth=width, label=label)
    below.set(xlabel="time (s)", ylabel="log-odds of real speech", xlim=(0, max(len(extremes) * ENVELOPE_S, 1e-3)))
    below.legend(frameon=False, fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 0.98), ncols=3, title=None)
    return figure


def timeline_pictures(folder: Path, n_recordings: int) -> Callable:
    """What draws (path, verdict, band) as `timeline` into a folder, where a recording has log-odds to be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, digits = count(1), len(str(n_recordings))

    def draw(path: Path, verdict, uncertain: tuple[float, float]) -> None:
        number = next(numbers)
        if getattr(verdict, "log_odds", None) is None or str(path) == "-":  # what was read from a pipe is gone
            return
        figure = timeline(
            verdict.timeline, envelope(iter_audio(path, notes=[])), uncertain, fake_stretches=verdict.fake_stretches,
            title=f"{path.name}: {verdict.verdict}",
        )  # fmt: skip
        name = f"{number:0{digits}d}_" if n_recordings > 1 else ""
        with atomic_write(folder / f"{name}{path.stem}.png") as part:
            figure.savefig(part, format="png")

    return draw


def costs_of_uses(
    curves: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], marks: Mapping[str, dict]
) -> Figure:
    """Expected cost against the threshold, one panel a use: where dev's least lies, and what it costs on eval.

    Args:
        curves: use -> split -> (thresholds (n,), expected cost (n,)), as `uses.cost_curve` gives them.
        marks: use -> what `uses.judge_threshold` says of its threshold.
    """
    n_columns = min(2, len(curves))
    n_rows = -(-len(curves) // n_columns)
    figure, axes = new_figure(n_rows, n_columns, size=(4.6 * n_columns, 3.0 * n_rows + 0.4), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, (use, of_splits) in zip(axes.flat, curves.items(), strict=False):
        mark = marks[use]
        drawn = np.r_[mark["threshold"], mark["uncertain"], *(thresholds for thresholds, _ in of_splits.values())]
        margin = 0.05 * np.ptp(drawn) or 1.0
        low, high = drawn.min() - margin, drawn.max() + margin
        axis.axvspan(*mark["uncertain"], color=BAND, linewidth=0, label="uncertain")
        for split, (thresholds, cost) in of_splits.items():
            # Constant up to each log-odds, and beyond the ends, where everything is accepted or rejected.
            axis.plot(np.r_[low, thresholds, high], np.r_[cost[0], cost, cost[-1]], drawstyle="steps-pre",
                      color=SPLIT_COLOUR.get(split, ORANGE), linewidth=1.6, label=split)  # fmt: skip
        axis.axvline(mark["threshold"], color=BLACK, linestyle="--", linewidth=1, label="threshold, from dev")
        axis.axhline(mark["blind"], color=VERMILION, linestyle=":", linewidth=1.4, label="without listening")
        axis.set(xlabel="threshold (log-odds)", ylabel="expected cost", xlim=(low, high), ylim=(0, 1.6 * mark["blind"]))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_title(use, fontsize="medium")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), frameon=False, fontsize="small", ncols=5,
                  loc="outside upper center")  # fmt: skip
    return figure


def push_times(push_s: np.ndarray, chunk_s: float = 0.02) -> Figure:
    """How long a live stream took for every chunk, over the time of the sound.

    Args:
        push_s: (n,) seconds of each chunk; chunk_s: its length in sound, beyond which it would fall behind.
    """
    figure, axis = new_figure(size=(8.0, 3.0))
    axis.plot(np.arange(len(push_s)) * chunk_s, 1000 * push_s, ".", color=BLUE, markersize=3)
    axis.axhline(1000 * chunk_s, color=BLACK, linestyle="--", linewidth=1, label="length of a chunk")
    axis.set(xlabel="time of the sound (s)", ylabel="ms to take a chunk", yscale="log")
    axis.set_title(f"n = {len(push_s):,} chunks of {1000 * chunk_s:g} ms", fontsize="medium", loc="left")
    axis.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure
