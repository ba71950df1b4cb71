"""Where a countermeasure fails, in numbers: hardest trials, the generalisation gap, agreement of two systems.

Scores are (n,), higher = more bona fide; labels 1 = bona fide, 0 = spoof; rates are fractions. A trial is accepted
as bona fide from the threshold on; thresholds, directions and fits come from dev, and eval only judges them.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import binomtest, spearmanr

from deepfake_utils.conventions import BONAFIDE, SPOOF, ScoreError
from deepfake_utils.evaluation import intervals, metrics
from deepfake_utils.evaluation.calibration import Calibration, fit_calibration
from deepfake_utils.evaluation.evaluate import known_speakers


def rejections(by_speaker: dict, confidence: float = 0.95) -> pd.DataFrame:
    """Return how many of each speaker's bona fide trials are rejected, the most often rejected speaker first.

    by_speaker: what `evaluate(..., by="speaker")` gives in ["by"]["speaker"].
    Columns speaker, n_bonafide, n_rejected, p_miss, and Wilson's interval low, high: with few trials it is wide.
    """
    rows = []
    for speaker, row in by_speaker.items():
        if n := row["n_bonafide"]:
            rejected = round(row["p_miss"] * n)
            interval = binomtest(rejected, n).proportion_ci(confidence, method="wilson")
            rows.append((speaker, n, rejected, row["p_miss"], interval.low, interval.high))
    table = pd.DataFrame(rows, columns=["speaker", "n_bonafide", "n_rejected", "p_miss", "low", "high"])
    return table.sort_values(["n_rejected", "p_miss"], ascending=False, ignore_index=True)


def hardest(trials: pd.DataFrame, threshold: float, n: int) -> pd.DataFrame:
    """Return the n spoofs that score highest and the n bona fide trials that score lowest.

    trials: protocol with a column score. Added columns: kind ("fake accepted", "real rejected", or "nearest
    fake" and "nearest real" where the threshold still decides rightly), margin (how far on the wrong side, negative:
    not).
    """
    spoof = trials[trials["label"] == SPOOF].nlargest(n, "score")
    bonafide = trials[trials["label"] == BONAFIDE].nsmallest(n, "score")
    spoof = spoof.assign(margin=spoof["score"] - threshold)
    bonafide = bonafide.assign(margin=threshold - bonafide["score"])
    spoof["kind"] = np.where(spoof["score"] >= threshold, "fake accepted", "nearest fake")
    bonafide["kind"] = np.where(bonafide["score"] < threshold, "real rejected", "nearest real")
    return pd.concat([spoof, bonafide], ignore_index=True)


def gap_parts(dev: pd.DataFrame, evaluation: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return what each kind of eval trial adds to the error between dev and eval, at one threshold.

    The error is the mean of miss and false alarm rate, (p_miss + p_fa) / 2: at the dev EER threshold it is the dev
    EER on dev, and on eval what somebody meets who brings that threshold along. It differs by

        (p_miss_eval - p_miss_dev) / 2  +  sum over attacks of share_a (p_fa_a - p_fa_dev) / 2,

    share_a being the attack's share of the eval spoofs: the parts add up to the whole difference.

    Args:
        dev, evaluation: protocols with columns label, attack and score.
        threshold: from dev.

    Returns:
        what ("bona fide" or the attack), n, error (its own miss or false alarm rate), part; bona fide first, then
        attacks from the largest part down. `.attrs` holds dev_error and eval_error.
    """
    miss_dev, fa_dev = metrics.error_rates(dev["score"], dev["label"], threshold)
    miss_eval, fa_eval = metrics.error_rates(evaluation["score"], evaluation["label"], threshold)
    spoof = evaluation[evaluation["label"] == SPOOF]
    rows = []
    for attack, of_attack in spoof.groupby("attack"):
        p_fa, n = float((of_attack["score"] >= threshold).mean()), len(of_attack)
        rows.append({"what": attack, "n": n, "error": p_fa, "part": n / len(spoof) * (p_fa - fa_dev) / 2})
    rows.sort(key=lambda row: -row["part"])
    n_bonafide = len(evaluation) - len(spoof)
    first = {"what": "bona fide", "n": n_bonafide, "error": miss_eval, "part": (miss_eval - miss_dev) / 2}
    table = pd.DataFrame([first, *rows])
    table.attrs = {"dev_error": (miss_dev + fa_dev) / 2, "eval_error": (miss_eval + fa_eval) / 2}
    return table


def agreement(first: ArrayLike, second: ArrayLike, labels: ArrayLike, threshold: float) -> pd.DataFrame:
    """Return how two systems agree: per class, trials that both, one or none decide rightly, and rank correlation.

    first, second: (n,) calibrated log-likelihood ratios, decided at one threshold; labels (n,).
    Index bona fide, spoof; columns n, both_right, only_first_right, only_second_right, both_wrong, and
    rank_correlation (Spearman's within the class: near 0, errors are independent and a fusion can gain most).
    """
    first, second, labels = map(np.asarray, (first, second, labels))
    rows = {}
    for label, name in ((BONAFIDE, "bona fide"), (SPOOF, "spoof")):
        a, b = first[labels == label], second[labels == label]
        right_a, right_b = (a >= threshold) == (label == BONAFIDE), (b >= threshold) == (label == BONAFIDE)
        varied = len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
        rows[name] = {
            "n": len(a),
            "both_right": int((right_a & right_b).sum()),
            "only_first_right": int((right_a & ~right_b).sum()),
            "only_second_right": int((~right_a & right_b).sum()),
            "both_wrong": int((~right_a & ~right_b).sum()),
            "rank_correlation": float(spearmanr(a, b).statistic) if varied else np.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def fuse(
    dev_scores: ArrayLike, dev_labels: ArrayLike, scores: ArrayLike, *, fitted_on: str = ""
) -> tuple[dict[str, np.ndarray], Calibration]:
    """Return {"mean": llrs, "logistic": llrs} of eval trials for several systems, and the logistic fusion.

    mean: of the systems' calibrated log-likelihood ratios, so that none counts more for its scale. logistic: one
    weighted sum. Both are fitted on dev.

    Args:
        dev_scores, scores: (n, n_systems) of dev and eval trials; dev_labels (n,).
    """
    dev_scores, scores = np.asarray(dev_scores, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    with warnings.catch_warnings():  # a system that is worse than a coin is found out by whoever looks at it alone
        warnings.simplefilter("ignore", UserWarning)
        each = [fit_calibration(column, dev_labels, fitted_on=fitted_on) for column in dev_scores.T]
        logistic = fit_calibration(dev_scores, dev_labels, fitted_on=fitted_on)
    llrs = np.stack([one.llr(column) for one, column in zip(each, scores.T, strict=True)], axis=1)
    return {"mean": llrs.mean(axis=1), "logistic": logistic.llr(scores)}, logistic


def compare(
    systems: dict[str, np.ndarray],
    labels: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return each system's EER and its paired difference from the first one.

    systems: name -> scores (n,), all of the same trials in the same order. Index the name; columns eer, difference
    (eer - that of the first; negative is better), low, high (paired interval), and unit ("speaker" or "trial").
    """
    (reference, first), *others = systems.items()
    rows = {reference: {"eer": metrics.compute_eer(first, labels).eer}}
    for name, scores in others:
        row = {"eer": metrics.compute_eer(scores, labels).eer}
        for unit, groups in (("speaker", clusters), ("trial", None)):
            if not n_bootstrap or (unit == "speaker" and clusters is None):
                continue
            try:
                interval = intervals.paired_difference(
                    intervals.eer_metric, scores, first, labels, groups, n=n_bootstrap, seed=seed
                )
            except ScoreError:  # a class with a single speaker
                continue
            row |= {"difference": float(interval.value), "low": interval.low, "high": interval.high, "unit": unit}
            break
        rows[name] = row
    columns = ["eer", "difference", "low", "high", "unit"]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)


def speakers_of(trials: pd.DataFrame) -> np.ndarray | None:
    """Return each trial's speaker as text for a clustered bootstrap, or None where any is unknown."""
    speakers = known_speakers(trials)
    return None if speakers is None or speakers.isna().any() else speakers.to_numpy(dtype=str)
