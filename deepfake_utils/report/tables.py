"""Tables of an evaluation for people: percent, plain words, nothing computed.

The two errors have the same two names everywhere: *real rejected* is the share of bona fide recordings that are called
spoofed (the field's miss), *fake accepted* the share of spoofs that are called bona fide (its false alarm).
"""

from __future__ import annotations

import pandas as pd

from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ
from deepfake_utils.evaluation.calibration import PRESETS

HEADLINES = {  # name in the result -> (title, factor, digits, what it is)
    "eer": ("EER", 100, 2, "% wrong at the threshold where as many real are rejected as fake accepted; a coin has 50"),
    "min_tdcf": ("min t-DCF, 2019", 1, 4, "cost in tandem with speaker verification; 1 is useless"),
    "min_tdcf_revised": ("min t-DCF, 2021 form", 1, 4, "the same with the cost of the verification itself"),
    "tandem_eer": ("tandem EER", 100, 2, "% where target, nontarget and spoof trials fare alike"),
    "min_dcf": ("min DCF", 1, 4, "ASVspoof 5 cost at the best threshold for these trials"),
    "act_dcf": ("actual DCF", 1, 4, "the same at the threshold that calibrated scores would have"),
    "cllr": ("Cllr", 1, 4, "bits; scores taken at their word as log-likelihood ratios"),
    "min_cllr": ("min Cllr", 1, 4, "bits; what is left after the best recalibration"),
    "auc": ("AUC", 1, 4, "probability that a bona fide trial outscores a spoof"),
    "accuracy": ("accuracy", 100, 2, "% right at the stated threshold; depends on how many spoofs there are"),
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


def interval_name(result: dict) -> str:
    """Heading of a column of intervals.

    >>> interval_name({"confidence": 0.95}), interval_name({"confidence": None})
    ('95 % interval', 'interval')
    """
    return f"{100 * result['confidence']:g} % interval" if result["confidence"] else "interval"


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
    return pd.DataFrame(rows, columns=["figure", "value", interval_name(result), "meaning"])


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
            interval_name(result): percent_interval(row["eer_ci"]),
            "min t-DCF, 2019": "-" if row["min_tdcf"] is None else f"{row['min_tdcf']:.4f}",
            "fake accepted %": percent(row["p_fa"]),
            "share of all errors %": percent(row["share_of_errors"], 1),
        }
        for attack, row in sorted(result["per_attack"].items(), key=lambda item: -item[1]["eer"])
    ]
    if rows and result.get("bonafide_share_of_errors") is not None:
        dashes = dict.fromkeys(("EER %", interval_name(result), "min t-DCF, 2019", "fake accepted %"), "-")
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

    What all rows share is no column of its own: against which trials the EER is goes into its heading, and a column of
    intervals stands only where there is one.

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
            interval_name(result): percent_interval(row["eer_ci"]),
            "against": row["against"],
            "real rejected %": percent(row["p_miss"]),
            "fake accepted %": percent(row["p_fa"]),
        }
        for value, row in groups
    ]
    table = pd.DataFrame(rows)
    if rows and (table[interval_name(result)] == "-").all():
        table = table.drop(columns=interval_name(result))
    if rows and table["against"].nunique() == 1:
        table = table.rename(columns={"EER %": f"EER % against {rows[0]['against']}"}).drop(columns="against")
    return table


def threshold_table(points: dict[str, dict]) -> pd.DataFrame:
    """One row for each use: its threshold, and what it comes to on eval.

    Args:
        points: name in calibration.PRESETS -> what `calibration.operating_point` returned.
    """
    rows = [
        {
            "use": name,
            "LLR threshold": f"{point['llr_threshold']:.2f}",
            "real rejected %": percent(point["p_miss"]),
            "95 % interval": percent_interval(point["p_miss_ci"]),
            "fake accepted %": percent(point["p_fa"]),
            "its 95 % interval": percent_interval(point["p_fa_ci"]),
            "cost": f"{point['dcf']:.3f}",
            "least possible": f"{point['min_dcf']:.3f}",
        }
        for name, point in points.items()
    ]
    return pd.DataFrame(rows)


def use_table() -> pd.DataFrame:
    """One row for each use of calibration.PRESETS: how many fakes it expects, what each error costs it, and why."""
    rows = [
        {
            "use": name,
            "fakes expected %": f"{100 * use.p_spoof:g}",
            "cost of a real rejected": f"{use.cost_miss:g}",
            "cost of a fake accepted": f"{use.cost_fa:g}",
            "why": use.reasoning,
        }
        for name, use in PRESETS.items()
    ]
    return pd.DataFrame(rows)


SETTINGS = {  # name in TrainingConfig -> words, and what a number is divided by
    "batch_size": ("utterances a step", 1),
    "crop_samples": ("training clip (s)", SAMPLE_RATE_HZ),
    "eval_samples": ("dev clip while training (s)", SAMPLE_RATE_HZ),
    "learning_rate": ("highest learning rate", 1),
    "learning_rate_min": ("lowest learning rate", 1),
    "class_weights": ("weights of spoof, bona fide", 1),
    "clip_norm": ("highest gradient norm (0: any)", 1),
    "time_budget_s": ("time limit (s; 0: none)", 1),
}


def settings_table(here: dict, published: dict) -> pd.DataFrame:
    """Where a training departs from the published recipe: one row a setting, in words.

    Args:
        here, published: what `TrainingConfig.to_dict` gives.
    """
    rows = []
    for name, value in here.items():
        words, unit = SETTINGS.get(name, (name.replace("_", " "), 1))
        both = [f"{v / unit:.4g}" if isinstance(v, int | float) else _in_words(v) for v in (value, published[name])]
        if value != published[name]:
            rows.append({"setting": words, "here": both[0], "published recipe": both[1]})
    return pd.DataFrame(rows, columns=["setting", "here", "published recipe"])


def _in_words(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | dict) else str(value).replace("_", " ")


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


def condition_table(conditions: pd.DataFrame) -> pd.DataFrame:
    """Errors of the same clips under codecs, noise, rooms and speed, from `robustness`; percent."""
    shown = {
        "condition": conditions["condition"],
        "EER %": conditions["eer"].map(percent),
        "real rejected %": conditions["real_rejected"].map(percent),
        "fake accepted %": conditions["fake_accepted"].map(percent),
    }
    return pd.DataFrame(shown)


def shortcut_table(alone: pd.DataFrame) -> pd.DataFrame:
    """One row a decision rule: which side it calls bona fide, and its EER on eval with interval.

    Args:
        alone: what `probing.shortcuts.shortcut_errors` returned.
    """
    bounds = [None if pd.isna(low) else [low, high] for low, high in zip(alone["low"], alone["high"], strict=True)]
    return pd.DataFrame(
        {
            "rule": alone["rule"],
            "bona fide if": alone["bona_fide_if"].replace("", "-"),
            "EER %": alone["eer"].map(percent),
            "95 % interval": list(map(percent_interval, bounds)),
        }
    )


def agreement_table(agreement: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """One row a class: how many trials both systems, one or none of them decide rightly.

    Args:
        agreement: what `compare.agreement` returned; first, second: names of the systems.
    """
    names = {
        "n": "trials", "both_right": "both right", "only_first_right": f"only {first} right",
        "only_second_right": f"only {second} right", "both_wrong": "both wrong", "rank_correlation": "rank correlation",
    }  # fmt: skip
    return agreement.rename(columns=names).reset_index(names="class")


def cost_table(uses: dict, judged: dict[str, dict]) -> pd.DataFrame:
    """What the thresholds of uses cost: a row a use.

    Args:
        uses: name -> `calibration.Use`; judged: name -> what `evaluation.uses.judge_threshold` returned.
    """
    rows = []
    for name, row in judged.items():
        interval = "" if row["cost_ci"] is None else " ({:.3g} to {:.3g})".format(*row["cost_ci"])
        rows.append({
            "use": name,
            "% fake": f"{100 * uses[name].p_spoof:g}",
            "fake accepted : real rejected costs": f"{uses[name].cost_fa:g} : {uses[name].cost_miss:g}",
            "threshold (uncertain)": "{:+.2f} ({:+.2f} to {:+.2f})".format(row["threshold"], *row["uncertain"]),
            "% real rejected": percent(row["real_rejected"], 1),
            "% fake accepted": percent(row["fake_accepted"], 1),
            "% uncertain": percent(row["undecided"], 1),
            "cost (95 % interval)": f"{row['cost']:.3g}{interval}",
            "without listening": f"{row['blind']:.3g}",
            "least possible": f"{row['least']:.3g}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def drift_table(report: pd.DataFrame) -> pd.DataFrame:
    """What drifted, in words and units: a row a test.

    Args:
        report: what `serving.drift.find_drift` returned; shares become percent.
    """
    units = {what: (what, 1) for what in report["what"]} | {
        "score": ("score (log-odds)", 1), "level": ("level (dB re full scale)", 1),
        "bandwidth": ("bandwidth (Hz)", 1), "duration": ("duration (s)", 1),
        "no verdict": ("without a verdict (%)", 100),
    }  # fmt: skip
    rows = [
        {
            "median or share": units[row["what"]][0],
            **{
                f"in the {when}": "-" if pd.isna(row[name]) else f"{units[row['what']][1] * row[name]:.4g}"
                for when, name in (("reference", "before"), ("service", "now"))
            },
            "recordings": f"{row['n_reference']:,} and {row['n']:,}",
            "distance": "-" if pd.isna(row["distance"]) else f"{row['distance']:.2f}",
            "p": "-" if pd.isna(row["p"]) else "under 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}",
            "drift": "yes" if row["drifted"] else "no",
        }
        for _, row in report.iterrows()
    ]
    return pd.DataFrame(rows)


def artefact_table(artefacts: pd.DataFrame) -> pd.DataFrame:
    """One row an artefact: size, time, EER with interval, what its numbers cost against float32.

    Args:
        artefacts: index the name; columns numbers, bytes, ms, eer, low, high, lost (fractions; lost may be NaN).
    """
    rows = [
        {
            "artefact": name,
            "numbers": row["numbers"],
            "MB": f"{row['bytes'] / 1e6:.3f}",
            "ms a window": f"{row['ms']:.1f}",
            "x real time": f"{1000 * CROP_SAMPLES / SAMPLE_RATE_HZ / row['ms']:,.0f}",
            "EER %": percent(row["eer"]),
            "95 % interval": percent_interval([row["low"], row["high"]]),
            "points lost": "-" if pd.isna(row["lost"]) else f"{100 * row['lost']:+.2f}",
        }
        for name, row in artefacts.iterrows()
    ]
    return pd.DataFrame(rows)
