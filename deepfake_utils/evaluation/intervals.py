"""Bootstrap confidence intervals, resampling speakers rather than trials.

The trials of one speaker rise and fall together, so a hundred trials of one speaker say less than a
hundred speakers. Resampling trials ignores that and gives intervals that are too narrow; resampling whole
clusters (speakers) does not (A. Davison and D. Hinkley, "Bootstrap methods and their application", 1997,
section 3.8; for speech scores L. Ferrer and P. Riera, "Confidence intervals for evaluation in machine
learning", 2023). In ASVspoof a spoofed trial's speaker is the one it imitates: that is its cluster.

Intervals are percentile intervals whose levels are widened for few clusters as T. Hesterberg, "What
teachers should know about the bootstrap", The American Statistician 69, 2015, section 5.3 proposes: with k
clusters the plain ones are too narrow by about sqrt(k / (k - 1)) and ignore Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from tqdm.auto import tqdm

from deepfake_utils.conventions import ConfigError, ScoreError
from deepfake_utils.evaluation.metrics import check_trials, compute_eer

Metric = Callable[[np.ndarray, np.ndarray], float | Sequence[float]]
_MAX_REDRAWS = 1000  # per replicate that happens to lose one whole class


class Interval(NamedTuple):
    """A value and its confidence interval; arrays of one length where the metric returns several values."""

    value: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray


class SeedSummary(NamedTuple):
    """Mean and sample standard deviation over seeds (NaN for one seed), and each value."""

    mean: float
    sd: float
    values: tuple[float, ...]


def eer_metric(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the EER alone, the usual metric of the functions below."""
    return compute_eer(scores, labels).eer


def bootstrap(
    metric: Metric,
    scores: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    n: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = True,
) -> Interval:
    """Return the metric on all trials and its bootstrap confidence interval.

    metric: any function of (scores, labels) giving one number or a sequence of them. It is called on
    trials sorted by score, once on all and once on each of n replicates; a replicate repeats trials, and
    being sorted already makes the metrics of this package several times faster on it.
    scores, labels: (n_trials,). clusters: (n_trials,) speaker of each trial; None makes every trial its
    own cluster. confidence: coverage aimed at, in (0, 1). progress: show a bar when it takes longer than a
    second. A replicate without trials of both classes is drawn again. The same seed gives the same interval.
    Raises ScoreError on bad trials or fewer than two clusters for either class; ConfigError on bad settings.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat([0, 1], 500)
    >>> result = bootstrap(eer_metric, rng.normal(2.0 * labels), labels, np.arange(1000) % 50, n=200)
    >>> bool(result.low < result.value < result.high)
    True
    """
    trials = _Trials(scores, labels, clusters)
    value = metric(trials.scores, trials.labels)
    replicates = [metric(*trials.replicate(counts)) for counts in _draws([trials], n, seed, progress)]
    low, high = _percentiles(np.asarray(replicates, dtype=np.float64), trials.n_clusters, confidence)
    return Interval(value if np.ndim(value) == 0 else np.asarray(value), low, high)


def interval_or_none(
    metric: Metric, scores: ArrayLike, labels: ArrayLike, clusters: ArrayLike | None, n: int, seed: int, **settings
) -> Interval | None:
    """Return the bootstrap interval, by trial where the speakers cannot carry it; None where nothing can, or n is 0."""
    for groups in (clusters, None) if clusters is not None else (None,):
        try:
            return bootstrap(metric, scores, labels, groups, n=n, seed=seed, **settings) if n else None
        except ScoreError:  # a class with a single speaker, or a single trial
            continue
    return None


def paired_difference(
    metric: Metric,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    n: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = True,
) -> Interval:
    """Return metric(a) - metric(b) and its interval, both systems resampled alike.

    scores_a, scores_b, labels, clusters: (n_trials,), the same trials in the same order. What makes a draw
    of speakers hard or easy acts on both systems and cancels, so this interval is narrower than two
    separate ones suggest. The difference is significant at 1 - confidence if the interval leaves out 0.
    Other arguments as in bootstrap.
    """
    a, b = _Trials(scores_a, labels, clusters), _Trials(scores_b, labels, clusters)

    def difference(counts: np.ndarray) -> np.ndarray:
        return np.subtract(metric(*a.replicate(counts)), metric(*b.replicate(counts)))

    value = np.subtract(metric(a.scores, a.labels), metric(b.scores, b.labels))
    replicates = [difference(counts) for counts in _draws([a, b], n, seed, progress)]
    low, high = _percentiles(np.asarray(replicates), a.n_clusters, confidence)
    return Interval(float(value) if value.ndim == 0 else value, low, high)


def several_seeds(values: Sequence[float]) -> SeedSummary:
    """Return mean, sample standard deviation and each value of one metric over training seeds.

    >>> several_seeds([0.012, 0.018, 0.015])
    SeedSummary(mean=0.015, sd=0.003, values=(0.012, 0.018, 0.015))
    """
    values = tuple(float(value) for value in values)
    if not values or not np.all(np.isfinite(values)):
        raise ScoreError(f"one finite value per seed is needed, got {values}")
    sd = float(np.std(values, ddof=1).round(15)) if len(values) > 1 else float("nan")
    return SeedSummary(float(np.mean(values).round(15)), sd, values)


class _Trials:
    """Trials sorted by score, and the cluster each belongs to, numbered from 0."""

    def __init__(self, scores: ArrayLike, labels: ArrayLike, clusters: ArrayLike | None):
        scores, labels = check_trials(scores, labels)
        if clusters is None:
            codes, self.n_clusters = np.arange(scores.size), scores.size
        else:
            names, codes = np.unique(np.asarray(clusters), return_inverse=True)
            self.n_clusters = names.size
        if codes.shape != scores.shape:
            raise ScoreError(f"{scores.size} trials but {codes.size} clusters; give the speaker of each trial")
        self.of_class = [np.bincount(codes[labels == label], minlength=self.n_clusters) for label in (0, 1)]
        for of_class, name in zip(self.of_class, ("spoof", "bona fide"), strict=True):
            if np.count_nonzero(of_class) < 2:
                raise ScoreError(
                    f"there is a single {name} trial, which cannot be resampled"
                    if clusters is None
                    else f"all {name} trials belong to one speaker, so nothing can be said about another"
                )
        order = np.argsort(scores, kind="stable")
        self.scores, self.labels, self.codes = scores[order], labels[order], codes[order]

    def replicate(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and labels with every trial repeated as often as its cluster was drawn; still sorted."""
        times = counts[self.codes]
        return np.repeat(self.scores, times), np.repeat(self.labels, times)

    def has_both(self, counts: np.ndarray) -> bool:
        return all(counts @ of_class > 0 for of_class in self.of_class)


def _draws(systems: list[_Trials], n: int, seed: int, progress: bool) -> Iterator[np.ndarray]:
    """How often each cluster is drawn, n times; a progress bar appears after a second."""
    if n < 2:
        raise ConfigError(f"n must be at least 2 bootstrap replicates, got {n}")
    rng = np.random.default_rng(seed)
    k = systems[0].n_clusters
    for _ in tqdm(range(n), desc="bootstrap", unit="replicate", delay=1.0, leave=False, disable=not progress):
        for _ in range(_MAX_REDRAWS):
            counts = np.bincount(rng.integers(k, size=k), minlength=k)
            if systems[0].has_both(counts):
                break
        else:
            raise ScoreError(f"{_MAX_REDRAWS} draws of {k} clusters in a row held one class only")
        yield counts


def _percentiles(replicates: np.ndarray, n_clusters: int, confidence: float) -> tuple:
    """Both ends of the widened percentile interval (module docstring)."""
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is a fraction between 0 and 1, got {confidence}")
    quantile = stats.t.ppf((1 - confidence) / 2, n_clusters - 1) * np.sqrt(n_clusters / (n_clusters - 1))
    tail = stats.norm.cdf(quantile)
    low, high = np.quantile(replicates, [tail, 1 - tail], axis=0)
    return (float(low), float(high)) if replicates.ndim == 1 else (low, high)
