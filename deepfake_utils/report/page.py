"""Tables of an evaluation for a notebook, and all of it on one self-contained HTML page.

Nothing is computed here: `evaluation.evaluate` and `analysis` do that, `plots` draws, this module sets in type.
"""

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
from deepfake_utils.evaluation.calibration import PRESETS
from deepfake_utils.evaluation.scorefile import Scores, read_asv_scores
from deepfake_utils.files import atomic_write
from deepfake_utils.report import plots

MAX_ROWS = 60  # of one table on the page; what is left out is said
HEADLINES = {  # name in the result -> (title, factor, digits, what it is)
    "eer": ("EER", 100, 2, "% of either class wrong where both fare alike; a coin has 50"),
    "min_tdcf": (
        "min t-DCF, 2019",
        1,
        4,
        "cost in tandem with speaker verification; 1 is no countermeasure worth having",
    ),
    "min_tdcf_revised": ("min t-DCF, 2021 form", 1, 4, "the same with the cost of the verification itself"),
    "tandem_eer": ("tandem EER", 100, 2, "% where target, nontarget and spoof trials fare alike"),
    "min_dcf": ("min DCF", 1, 4, "ASVspoof 5 cost at the best threshold for these trials"),
    "act_dcf": ("actual DCF", 1, 4, "the same at the threshold that calibrated scores would have"),
    "cllr": ("Cllr", 1, 4, "bits; scores taken at their word as log-likelihood ratios"),
    "min_cllr": ("min Cllr", 1, 4, "bits; what is left after the best recalibration"),
    "auc": ("AUC", 1, 4, "probability that a bona fide trial outscores a spoof"),
    "accuracy": ("accuracy", 100, 2, "% at the threshold below; depends on how many spoofs there are"),
}


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction in percent, or a dash where there is none.

    >>> percent(0.0106), percent(None)
    ('1.06', '-')
    """
    return "-" if fraction is None or pd.isna(fraction) else f"{100 * fraction:.{digits}f}"


def percent_interval(bounds: list[float] | None) -> str:
    """Bounds in percent, or a dash. Without any error there is none to resample: 0 to 0 would promise too much.

    >>> percent_interval([0.01, 0.025]), percent_interval([0.0, 0.0])
    ('1.00 to 2.50', 'no error seen')
    """
    if bounds is not None and bounds[0] == bounds[1] == 0:
        return "no error seen"
    return "-" if bounds is None else f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}"


def headline_table(result: dict) -> pd.DataFrame:
    """The figures of the whole evaluation: figure, value, interval, meaning.

    Args:
        result: what `evaluation.evaluate` returned; figures it could not compute are left out.
    """
    rows = []
    for name, (title, factor, digits, meaning) in HEADLINES.items():
        if result.get(name) is not None:
            bounds = result.get(f"{name}_ci")
            interval = f"{factor * bounds[0]:.{digits}f} to {factor * bounds[1]:.{digits}f}" if bounds else "-"
            if bounds and result["eer"] == 0 and bounds[0] == bounds[1]:
                interval = "no error seen"  # there is none to resample: an interval would promise too much
            rows.append((title, f"{factor * result[name]:.{digits}f}", interval, meaning))
    return pd.DataFrame(rows, columns=["figure", "value", "interval", "meaning"])


def attack_table(result: dict) -> pd.DataFrame:
    """One row an attack, the hardest first: trials, EER against all bona fide with interval, min t-DCF where there were
    ASV scores, its share of all errors.

    Args:
        result: what `evaluation.evaluate` returned.
    """
    rows = [
        {
            "attack": attack,
            "trials": f"{row['n']:,}",
            "EER %": percent(row["eer"]),
            "interval": percent_interval(row["eer_ci"]),
            "min t-DCF, 2019": "-" if row["min_tdcf"] is None else f"{row['min_tdcf']:.4f}",
            "accepted %": percent(row["p_fa"]),
            "share of all errors %": percent(row["share_of_errors"], 1),
        }
        for attack, row in sorted(result["per_attack"].items(), key=lambda item: -item[1]["eer"])
    ]
    if rows and result.get("bonafide_share_of_errors") is not None:
        dashes = dict.fromkeys(("EER %", "interval", "min t-DCF, 2019", "accepted %"), "-")
        share = percent(result["bonafide_share_of_errors"], 1)
        trials = f"{result['n_bonafide']:,}"
        rows.append({"attack": "bona fide", "trials": trials, **dashes, "share of all errors %": share})
    table = pd.DataFrame(rows)
    return table.drop(columns="min t-DCF, 2019") if result["min_tdcf"] is None and rows else table


def attack_rows(result: dict) -> pd.DataFrame:
    """What `plots.attack_bars` draws: attack, eer, n, and low and high where there is an interval.

    Args:
        result: what `evaluation.evaluate` returned.
    """
    rows = [
        {
            "attack": attack,
            "eer": row["eer"],
            "n": row["n"],
            **dict(zip(("low", "high"), row["eer_ci"] or (), strict=False)),
        }
        for attack, row in result["per_attack"].items()
    ]
    return pd.DataFrame(rows)


def breakdown_table(result: dict, column: str, *, worst: int | None = None) -> pd.DataFrame:
    """One row for each value of a column: trials of both classes, EER with interval, against what, error rates.

    Args:
        result: what `evaluation.evaluate(..., by=column)` returned.
        worst: only so many values, those with the highest EER first; None: all, as they come.
    """
    groups = list(result["by"][column].items())
    if worst is not None:
        groups = sorted(groups, key=lambda item: -item[1]["eer"])[:worst]
    rows = [
        {
            column: value,
            "bona fide": f"{row['n_bonafide']:,}",
            "spoof": f"{row['n_spoof']:,}",
            "EER %": percent(row["eer"]),
            "interval": percent_interval(row["eer_ci"]),
            "against": row["against"],
            "bona fide rejected %": percent(row["p_miss"]),
            "spoof accepted %": percent(row["p_fa"]),
        }
        for value, row in groups
    ]
    return pd.DataFrame(rows)


def threshold_table(points: dict[str, dict]) -> pd.DataFrame:
    """One row for each use: the prior and costs it stands for, its threshold, and what it comes to on eval.

    Args:
        points: name in calibration.PRESETS -> what `calibration.operating_point` returned.
    """
    rows = []
    for name, point in points.items():
        use = PRESETS[name]
        rows.append(
            {
                "use": name,
                "spoofs expected %": f"{100 * use.p_spoof:g}",
                "cost miss : false alarm": f"{use.cost_miss:g} : {use.cost_fa:g}",
                "LLR threshold": f"{point['llr_threshold']:.2f}",
                "bona fide rejected %": f"{percent(point['p_miss'])} ({percent_interval(point['p_miss_ci'])})",
                "spoof accepted %": f"{percent(point['p_fa'])} ({percent_interval(point['p_fa_ci'])})",
                "cost": f"{point['dcf']:.3f}",
                "least possible": f"{point['min_dcf']:.3f}",
            }
        )
    return pd.DataFrame(rows)


def comparison_table(compared: pd.DataFrame) -> pd.DataFrame:
    """One row a system: EER, and its paired difference from the first one with interval.

    Args:
        compared: what `compare.compare` returned.
    """
    rows = []
    for number, (name, row) in enumerate(compared.iterrows()):
        has_interval = pd.notna(row["low"])
        interval = f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}, by {row['unit']}" if has_interval else "-"
        difference = f"{100 * row['difference']:+.2f}" if pd.notna(row["difference"]) else "-"
        rows.append(
            {
                "system": name,
                "EER %": percent(row["eer"]),
                "difference (points)": "reference" if number == 0 else difference,
                "95 % interval, paired": interval,
            }
        )
    return pd.DataFrame(rows)


def write_html(
    path: str | os.PathLike,
    result: dict,
    scores: Scores | pd.DataFrame,
    protocol: pd.DataFrame,
    asv_scores: str | os.PathLike | pd.DataFrame | None = None,
    *,
    title: str = "Countermeasure evaluation",
    notice: str = "",
) -> Path:
    """Write the tables and pictures of an evaluation as one HTML page that needs no other file and no network.

    Args:
        path: of the page; written whole or not at all.
        result: what `evaluation.evaluate` returned for these scores.
        scores, protocol, asv_scores: what it was given; of an evaluation of one phase, the whole of them may be given.
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
        f"{result['score_dialect']}; in it a high score is {result['higher_is']}. A trial is accepted as bona fide "
        f"from {result['threshold']:.6g} on ({result['threshold_source']}): {percent(result['p_miss'])} % of bona "
        f"fide trials are rejected, {percent(result['p_fa'])} % of spoofs accepted."
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
    return table.head(MAX_ROWS).to_html(index=False, border=0, escape=True, na_rep="-") + more


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
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; }
img { max-width: 100%; vertical-align: top; } .note, .notice { border-left: 4px solid #D55E00; padding-left: .8rem; }
.big { font-size: 1.35rem; }
"""


def _page(title: str, notice: str, result: dict, parts: list[str]) -> str:
    interval = f" ({percent_interval(result['eer_ci'])} %)" if result["eer_ci"] else ""
    lead = f"<p class=big>EER {percent(result['eer'])} %{interval}</p>"
    warning = f"<p class=notice>{html.escape(notice)}</p>" if notice else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{warning}{lead}{''.join(parts)}"
        f"<footer><p>{date.today():%Y-%m-%d}</p></footer></body></html>\n"
    )
