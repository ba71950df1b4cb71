"""Whether a candidate may take the place of the weights in service: differences with intervals, and rules for them.

Both systems decide the same trials, and sources (speakers; of feedback, clients) are resampled for both alike, see
`evaluation.intervals`. Scores are calibrated log-odds; a verdict is wrong where their sign is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from deepfake_utils.conventions import BONAFIDE, SPOOF, ScoreError
from deepfake_utils.evaluation import intervals, metrics
from deepfake_utils.evaluation.compare import speakers_of

MEASURES = ("EER", "wrong verdicts")


def errors(log_odds: np.ndarray, labels: np.ndarray) -> list[float]:
    """The EER, and the mean of the shares of real and fake recordings on the wrong side of log-odds 0.

    >>> errors(np.array([-2.0, 1.0, -1.0, 3.0]), np.array([0, 0, 1, 1]))
    [0.5, 0.5]
    """
    return [metrics.compute_eer(log_odds, labels).eer, float(np.mean(metrics.error_rates(log_odds, labels, 0.0)))]


def compare(
    name: str, trials: pd.DataFrame, candidate: np.ndarray, current: np.ndarray, rules: Mapping, *, frozen: bool
) -> pd.DataFrame:
    """Compare two systems on one set of trials, and on each of its attacks that has enough of them.

    Args:
        name: of the set.
        trials: protocol (n rows).
        candidate, current: (n,) log-odds of bona fide.
        rules: the table `promotion` of the rules.
        frozen: whether this is a test set that stays as it is; attacks are looked at only there.

    Returns:
        set, attack ("" for all together), frozen, measure, n_bonafide, n_spoof, n, current, candidate, difference
        (candidate - current; negative is better), low, high, unit ("speaker" or "trial"); no rates where the set lacks
        a class.
    """
    labels, attacks = trials["label"].to_numpy(), trials["attack"].to_numpy()
    counts = pd.Series(attacks[labels == SPOOF]).value_counts().sort_index()
    named = [attack for attack, n in counts.items() if frozen and n >= rules["fewest_of_attack"]]
    rows = []
    for attack in ["", *(named if len(counts) > 1 else [])]:
        chosen = (labels == BONAFIDE) | (attacks == attack) if attack else np.ones(len(trials), bool)
        part = trials[chosen].reset_index(drop=True)
        confidence = 1 - (1 - rules["confidence"]) / (len(named) if attack else 1)  # of all attacks together
        found = _differences(part, candidate[chosen], current[chosen], rules, confidence)
        rows += [{"set": name, "attack": attack, "frozen": frozen, **row} for row in found]
    return pd.DataFrame(rows)


def _differences(trials: pd.DataFrame, candidate, current, rules: Mapping, confidence: float) -> list[dict]:
    labels = trials["label"].to_numpy()
    counts = {"n_bonafide": int((labels == BONAFIDE).sum()), "n_spoof": int((labels == SPOOF).sum())}
    counts["n"] = len(labels)
    nothing = dict.fromkeys(("current", "candidate", "difference", "low", "high"), np.nan) | {"unit": ""}
    if not counts["n_bonafide"] or not counts["n_spoof"]:
        return [{"measure": measure, **counts, **nothing} for measure in MEASURES]
    rates = zip(errors(current, labels), errors(candidate, labels), strict=True)
    rows = [
        {"measure": measure, **counts, **nothing, "current": before, "candidate": now, "difference": now - before}
        for measure, (before, now) in zip(MEASURES, rates, strict=True)
    ]
    for unit, clusters in (("speaker", speakers_of(trials)), ("trial", None)):
        if unit == "speaker" and clusters is None:
            continue
        try:
            interval = intervals.paired_difference(
                errors, candidate, current, labels, clusters, n=int(rules["n_bootstrap"]), confidence=confidence,
                progress=False,
            )  # fmt: skip
        except ScoreError:  # a class with a single speaker, or a single trial
            continue
        for row, low, high in zip(rows, interval.low, interval.high, strict=True):
            row |= {"low": float(low), "high": float(high), "unit": unit}
        break
    return rows


def refusals(table: pd.DataFrame, rules: Mapping) -> list[str]:
    """Why a candidate may not take over, one reason a line; none where every rule holds.

    table: rows of `compare` for all sets; rules: the table `promotion` of the rules.
    """
    named = table.assign(attack=table["attack"].astype(object).fillna(""))  # read from a file, "" is missing
    return [reason for row in named.itertuples() if (reason := _refusal(row, rules))]


def _refusal(row, rules: Mapping) -> str:
    what = f"{row.set}{', attack ' + row.attack if row.attack else ''}: {row.measure}"
    moved = f"{100 * row.current:.1f} -> {100 * row.candidate:.1f} % [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
    if not row.frozen:
        if min(row.n_bonafide, row.n_spoof) < rules["fewest_held_out"]:
            return (
                f"{what}: {row.n_bonafide} bona fide and {row.n_spoof} spoofed recordings cannot tell, "
                f"{rules['fewest_held_out']} of each are needed"
            )
        return f"{what} got worse: {moved}" if row.difference > rules["largest_loss_held_out"] else ""
    if row.attack:
        if row.low > 0:
            return f"{what} surely got worse: {moved}"
        most = rules["largest_loss_of_attack"]
        return f"{what} got worse by more than {100 * most:g} points: {moved}" if row.difference > most else ""
    if not row.high <= rules["largest_loss"]:  # also where there is no interval
        return f"{what}: a loss of more than {100 * rules['largest_loss']:g} points is not excluded: {moved}"
    return ""
