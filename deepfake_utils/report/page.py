"""An evaluation on one self-contained HTML page: its tables, its pictures, what they rest on."""

from __future__ import annotations

import base64
import html
import io
import os
from datetime import date
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from deepfake_utils.evaluation import metrics
from deepfake_utils.evaluation.evaluate import Evaluation
from deepfake_utils.evaluation.scorefile import read_asv_scores
from deepfake_utils.files import atomic_write
from deepfake_utils.report import plots
from deepfake_utils.report.tables import (
    attack_rows,
    attack_table,
    breakdown_table,
    headline_table,
    interval_name,
    percent,
    percent_interval,
)

MAX_ROWS = 60  # of one table on the page; what is left out is said


def write_html(
    path: str | os.PathLike,
    result: Evaluation,
    asv_scores: str | os.PathLike | pd.DataFrame | None = None,
    *,
    title: str = "Countermeasure evaluation",
    notice: str = "",
) -> Path:
    """Write the tables and pictures of an evaluation as one HTML page that needs no other file and no network.

    Args:
        path: of the page; written whole or not at all.
        result: what `evaluation.evaluate` returned.
        asv_scores: what it was given.
        notice: said at the top, for example that the corpus is a demo.

    Returns:
        The path.
    """
    trials = result.trials  # as they were evaluated: the same phase, and higher = more bona fide
    score, label = trials["score"].to_numpy(), trials["label"].to_numpy()
    threshold = result["threshold"]
    parts = [_section("Figures of the whole", _table(headline_table(result)), _how(result))]
    histogram = plots.score_histogram(score, label, threshold=threshold)
    det = plots.det_with_points({"scores": (score, label)}, {"threshold": (result["p_fa"], result["p_miss"])})
    parts.append(_section("Scores and trade-off", _picture(histogram, "score histogram") + _picture(det, "DET curve")))
    if result["per_attack"]:
        parts.append(
            _section(
                "Attacks",
                _picture(plots.attack_bars(attack_rows(result), overall=result["eer"]), "EER by attack"),
                _table(attack_table(result)),
            )
        )
    for column in result["by"]:
        parts.append(_section(f"By {column}", _table(breakdown_table(result, column))))
    if asv_scores is not None:
        parts.append(_section("Tandem cost", _picture(_tandem_figure(score, label, asv_scores, result), "tandem cost")))
    with atomic_write(path) as part:
        part.write_text(_page(title, notice, result, parts), encoding="utf-8")
    return Path(path)


def _tandem_figure(score, label, asv_scores, result: dict) -> Figure:
    asv = asv_scores if isinstance(asv_scores, pd.DataFrame) else read_asv_scores(asv_scores)
    if result["phase"] is not None and "phase" in asv:
        asv = asv[asv["phase"] == result["phase"]]
    rates = metrics.asv_error_rates(asv["score"], asv["key"])
    points = metrics.det_points(score, label)
    costs = {form: metrics.tandem_curve(points, rates, revised=form == "2021") for form in ("2019", "2021")}
    return plots.tandem_cost(costs)


def _how(result: dict) -> str:
    """What the figures rest on, in a paragraph, and the warnings."""
    speakers = f" of {result['n_speakers']:,} speakers" if result["n_speakers"] else ""
    text = (
        f"{result['n_bonafide']:,} bona fide and {result['n_spoof']:,} spoofed trials{speakers}. Score file: "
        f"{result['score_dialect']}; in it a high score says "
        f"{result['higher_is'].replace('bonafide', 'bona fide')}. A trial is accepted as bona fide "
        f"from {result['threshold']:.6g} on ({result['threshold_source']}): {percent(result['p_miss'])} % of the real "
        f"recordings are rejected, {percent(result['p_fa'])} % of the fake ones accepted."
    )
    if result["n_bootstrap"]:
        text += (
            f" Intervals: {100 * result['confidence']:g} %, {result['n_bootstrap']:,} bootstrap replicates resampled "
            f"by {result['bootstrap_unit']}, seed {result['seed']}."
        )
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in result["warnings"])
    return f"<p>{html.escape(text)}</p>{notes}"


def _section(heading: str, *content: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{''.join(content)}</section>"


def _table(table: pd.DataFrame) -> str:
    """A table as HTML, cut off with a word about it where it is long."""
    left_out = len(table) - MAX_ROWS
    more = f"<p>{left_out:,} more rows are not shown.</p>" if left_out > 0 else ""
    kind = "meaning" if table.columns[-1] == "meaning" else "figures"  # sentences begin at one edge, figures end at one
    return table.head(MAX_ROWS).to_html(index=False, border=0, escape=True, na_rep="-", classes=kind) + more


def _picture(figure: Figure, alternative: str) -> str:
    """A figure as an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; border-bottom: 1px solid #ccc; padding-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .meaning td:last-child, .meaning th:last-child { text-align: left; }
td:not(:last-child) { white-space: nowrap; }
img { max-width: 100%; vertical-align: top; } .note, .notice { border-left: 4px solid #D55E00; padding-left: .8rem; }
.big { font-size: 1.35rem; }
"""


def _page(title: str, notice: str, result: dict, parts: list[str]) -> str:
    interval = f" ({interval_name(result)} {percent_interval(result['eer_ci'])})" if result["eer_ci"] else ""
    lead = f"<p class=big>EER {percent(result['eer'])} %{interval}</p>"
    warning = f"<p class=notice>{html.escape(notice)}</p>" if notice else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{warning}{lead}{''.join(parts)}"
        f"<footer><p>{date.today():%Y-%m-%d}</p></footer></body></html>\n"
    )
