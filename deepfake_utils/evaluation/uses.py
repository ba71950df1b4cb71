"""Thresholds for a use: fitted on dev for the least expected cost, judged on a test split with an interval.

A calibrated log-odds has a threshold that follows from prior and costs alone (`calibration.threshold_for`), as long as
the calibration holds far out in the tails, which a few hundred recordings cannot promise. Here the threshold is the one
that cost least on dev, with error rates smoothed by a normal kernel, and the *uncertain band* is where it falls when
dev's sources are drawn again: a recording in it would be judged otherwise by a detector fitted on other sources.

Sources, not recordings, are what differs in the world, so they are what counts: a source weighs as many recordings as
it has, but no more than ten.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import norm

from deepfake_utils.conventions import BONAFIDE, SPOOF
from deepfake_utils.evaluation.calibration import Use
from deepfake_utils.evaluation.metrics import check_trials

MOST_OF_A_SOURCE = 10  # recordings that a source counts for at most
BAND = (0.1, 0.9)  # quantiles of the thresholds of other draws of dev's sources
N_GRID = 400  # thresholds tried


class FittedThreshold(NamedTuple):
    """Log-odds from which on a recording passes as real, and the band around it where that is uncertain."""

    threshold: float
    low: float
    high: float


def balanced_weights(labels: ArrayLike, sources: ArrayLike, most: int = MOST_OF_A_SOURCE) -> np.ndarray:
    """Weights (n,) of trials that add up to 1 for each label; a source counts for `most` of its trials at most.

    >>> balanced_weights([1, 1, 1, 0], ["a", "a", "b", "a"], most=1).tolist()
    [0.25, 0.25, 0.5, 1.0]
    """
    table = pd.DataFrame({"label": np.asarray(labels), "source": np.asarray(sources, dtype=str)})
    n = table.groupby(["label", "source"])["label"].transform("size").to_numpy()
    weights = np.minimum(n, most) / n
    return weights / pd.Series(weights).groupby(table["label"]).transform("sum").to_numpy()


def balanced_eer(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The equal error rate of weighted trials, as a fraction; without weights each counts alike.

    >>> balanced_eer([0.0, 1.0, 2.0, 3.0], [0, 1, 0, 1]), balanced_eer([0.0, 1.0], [0, 1])
    (0.5, 0.0)
    """
    return balanced_eer_threshold(scores, labels, weights)[0]


def balanced_eer_threshold(
    scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> tuple[float, float]:
    """The same with the threshold where the two errors are nearest to each other."""
    scores, labels = check_trials(scores, labels)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(scores, kind="stable")
    below = {
        label: np.r_[0.0, np.cumsum(np.where(labels[order] == label, weights[order], 0.0))]
        for label in (BONAFIDE, SPOOF)
    }
    ends = np.r_[True, np.diff(scores[order]) > 0, True]  # equal scores are decided together
    thresholds = np.r_[scores[order], np.inf][ends]
    miss = (below[BONAFIDE] / below[BONAFIDE][-1])[ends]
    fa = (1 - below[SPOOF] / below[SPOOF][-1])[ends]
    nearest = np.abs(miss - fa).argmin()
    return float((miss[nearest] + fa[nearest]) / 2), float(thresholds[nearest])


def fit_threshold(
    log_odds: ArrayLike, labels: ArrayLike, sources: ArrayLike, use: Use,
    *, shares: ArrayLike | None = None, n_bootstrap: int = 500, seed: int = 0,
) -> FittedThreshold:  # fmt: skip
    """The threshold of the least expected cost on these trials (dev), and its uncertain band.

    Args:
        log_odds, labels, sources: (n,) of recordings; labels 1 = bona fide, 0 = spoof.
        use: how common fakes are and what the errors cost.
        shares: (n,) of a recording that a row stands for, where some are there several times; default 1.
        n_bootstrap: draws of the sources that the band is made from.

    Raises:
        ScoreError: bad trials, or one label only.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat([0, 1], 2000)
    >>> fitted = fit_threshold(rng.normal(4.0 * labels - 2, 2), labels, np.arange(4000) % 50, Use(0.5, 1, 1))
    >>> abs(fitted.threshold) < 0.2 and fitted.low < fitted.threshold < fitted.high
    True
    """
    log_odds, labels = check_trials(log_odds, labels)
    width = min(np.subtract(*np.quantile(log_odds[labels == label], [0.75, 0.25])) for label in (BONAFIDE, SPOOF))
    rows = np.ones(len(labels)) if shares is None else np.asarray(shares, dtype=np.float64)
    width = max(0.5 * width / min(np.bincount(labels, rows)) ** 0.2, 1e-6)  # near Silverman's rule
    grid = np.linspace(log_odds.min() - 4 * width, log_odds.max() + 4 * width, N_GRID)
    below = norm.cdf((grid[None] - log_odds[:, None]) / width)
    sums = _by_source(below, labels, sources, rows)

    def best(counts: np.ndarray) -> float:
        cost = _cost(*_rates(sums, counts), use)
        return float(grid[np.flatnonzero(cost <= cost.min() * (1 + 1e-9))].mean())

    n_sources = len(sums[0])
    draws = [best(counts) for counts in _draws(sums, n_bootstrap, seed)]
    threshold = best(np.ones(n_sources))
    low, high = np.quantile(draws, BAND) if draws else (threshold, threshold)
    return FittedThreshold(threshold, float(min(low, threshold)), float(max(high, threshold)))


def judge_threshold(
    log_odds: ArrayLike, labels: ArrayLike, sources: ArrayLike, use: Use, fitted: FittedThreshold,
    *, n_bootstrap: int = 1000, seed: int = 0, confidence: float = 0.95,
) -> dict:  # fmt: skip
    """What deciding at a threshold costs on these trials (the test split, never those it was fitted on).

    Returns:
        real_rejected, fake_accepted: fractions, sources weighed as in `balanced_weights`; cost: expected, a recording,
        in the use's own units; cost_ci: its bootstrap interval over sources, None where there are too few; blind: the
        cost of the better of accepting all and rejecting all; least: that of the best threshold for these very trials;
        undecided: share of the recordings in the uncertain band, at the use's prior.
    """
    log_odds, labels = check_trials(log_odds, labels)
    marks = np.array([fitted.threshold, fitted.low, fitted.high])
    grid = np.r_[marks, np.unique(log_odds), np.inf]
    sums = _by_source((log_odds[:, None] < grid[None]).astype(float), labels, sources)
    miss, fa = _rates(sums, np.ones(len(sums[0])))
    cost = _cost(miss, fa, use)
    drawn = [float(_cost(*_rates(sums, counts), use)[0]) for counts in _draws(sums, n_bootstrap, seed)]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    undecided = (1 - use.p_spoof) * (miss[2] - miss[1]) + use.p_spoof * (fa[1] - fa[2])
    return {
        "threshold": fitted.threshold,
        "uncertain": [fitted.low, fitted.high],
        "real_rejected": float(miss[0]),
        "fake_accepted": float(fa[0]),
        "cost": float(cost[0]),
        "cost_ci": np.quantile(drawn, tails).tolist() if drawn else None,
        "blind": min(use.p_spoof * use.cost_fa, (1 - use.p_spoof) * use.cost_miss),
        "least": float(cost[3:].min()),
        "undecided": float(undecided),
    }


def cost_curve(log_odds: ArrayLike, labels: ArrayLike, sources: ArrayLike, use: Use) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds (k,) at and between all log-odds, and the expected cost (k,) of deciding at each."""
    log_odds, labels = check_trials(log_odds, labels)
    values = np.unique(log_odds)
    grid = np.r_[values, np.nextafter(values[-1], np.inf)]
    sums = _by_source((log_odds[:, None] < grid[None]).astype(float), labels, sources)
    return grid, _cost(*_rates(sums, np.ones(len(sums[0]))), use)


def _cost(miss: np.ndarray, fa: np.ndarray, use: Use) -> np.ndarray:
    return (1 - use.p_spoof) * use.cost_miss * miss + use.p_spoof * use.cost_fa * fa


def _by_source(
    below: np.ndarray, labels: np.ndarray, sources: ArrayLike, rows: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Of each source and label, its weight (S, 2) and its weighted shares below each threshold (S, 2, n_grid)."""
    codes, names = pd.factorize(np.asarray(sources, dtype=str))
    n = np.zeros((len(names), 2))
    np.add.at(n, (codes, labels), rows)
    weight = np.minimum(n, MOST_OF_A_SOURCE)
    shares = np.zeros((len(names), 2, below.shape[1]))
    np.add.at(shares, (codes, labels), below * np.reshape(rows, (-1, 1)))
    return weight, shares * (weight / np.where(n > 0, n, 1))[:, :, None]


def _rates(sums: tuple[np.ndarray, np.ndarray], counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of real below and of fake at or above each threshold, every source as often as counted."""
    weight, shares = sums
    below = np.einsum("s,slg->lg", counts, shares) / (counts @ weight)[:, None]
    return below[BONAFIDE], 1 - below[SPOOF]


def _draws(sums: tuple[np.ndarray, np.ndarray], n: int, seed: int):
    """How often each source is drawn, n times; draws that lose one label are left out."""
    rng, has = np.random.default_rng(seed), sums[0] > 0
    n_sources = len(has)
    if (has.sum(axis=0) < 2).any():
        return
    for _ in range(n):
        counts = np.bincount(rng.integers(n_sources, size=n_sources), minlength=n_sources)
        if (counts @ has > 0).all():
            yield counts.astype(float)
