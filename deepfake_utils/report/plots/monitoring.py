"""Pictures of a service's records: what it hears against what its weights were made for, and its days."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from deepfake_utils.report.plots.basic import BLACK, BLUE, ORANGE, PURPLE, VERMILION, new_figure

VERDICT_COLOUR = {"real": BLUE, "uncertain": ORANGE, "fake": VERMILION, "no verdict": BLACK}


def drift_panels(reference: pd.DataFrame, stream: pd.DataFrame, axes: Mapping[str, str]) -> Figure:
    """Cumulative distributions of several numbers, before and now: their largest distance is what is tested.

    Args:
        reference, stream: one row a recording.
        axes: column -> label of its axis, with the unit.
    """
    figure, panels = new_figure(1, len(axes), size=(3.2 * len(axes), 3.4), squeeze=False, sharey=True)
    for axis, (column, label) in zip(panels[0], axes.items(), strict=True):
        for table, style in ((reference, {"color": BLACK, "linestyle": "--"}), (stream, {"color": PURPLE})):
            values = table[column].dropna()
            if len(values):
                name = "reference" if table is reference else "now"
                axis.ecdf(values, label=f"{name}, n = {len(values):,}", linewidth=1.6, **style)
        axis.set(xlabel=label)
        axis.locator_params(axis="x", nbins=4)
        axis.legend(fontsize=7, loc="lower right", frameon=False)
    panels[0, 0].set(ylabel="share of recordings at or below")
    return figure


def verdicts_over_time(verdicts: pd.DataFrame, every: str = "1D") -> Figure:
    """How many recordings were judged in each stretch of time and how, and where their scores lay.

    Args:
        verdicts: with the columns at (UTC), verdict and score (log-odds).
        every: the stretch of time, as pandas writes it: "1D", "1h".
    """
    figure, (above, below) = new_figure(2, 1, size=(8.0, 5.0), sharex=True)
    stretch = verdicts["at"].dt.floor(every)
    counts = pd.crosstab(stretch, verdicts["verdict"])
    width, bottom = 0.8 * pd.Timedelta(every), np.zeros(len(counts))
    for word in (word for word in VERDICT_COLOUR if word in counts):
        hatch = {"fake": "//", "no verdict": ".."}.get(word)
        above.bar(counts.index, counts[word], width, bottom=bottom, label=word, color=VERDICT_COLOUR[word],
                  hatch=hatch, edgecolor="white")  # fmt: skip
        bottom += counts[word].to_numpy()
    above.set(ylabel="recordings")
    above.set_title(f"n = {len(verdicts):,} recordings, days and hours of UTC", loc="left", fontsize="medium")
    above.legend(fontsize="small", ncols=4, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    quartiles = verdicts.dropna(subset="score").groupby(stretch)["score"].quantile([0.25, 0.5, 0.75]).unstack()
    if len(quartiles):
        errors = [quartiles[0.5] - quartiles[0.25], quartiles[0.75] - quartiles[0.5]]
        below.errorbar(quartiles.index, quartiles[0.5], errors, fmt="o", color=PURPLE, capsize=3)
    below.axhline(0, color=BLACK, linewidth=0.8, linestyle=":")
    below.set(ylabel="log-odds of real speech:\nmedian and quartiles")
    locator = AutoDateLocator()
    below.xaxis.set_major_locator(locator)
    below.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    return figure
