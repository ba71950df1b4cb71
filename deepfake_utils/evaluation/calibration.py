"""From scores to log-likelihood ratios, and from those to decisions for a stated use.

A log-likelihood ratio (LLR, natural logarithm) says how much more probable a recording is as bona fide
speech than as spoof: 0 says nothing, log 10 says ten times. Unlike a raw score it means the same for every
countermeasure, and a threshold on it follows from costs and prior alone. Fit on dev, apply to eval.

The logistic fit is prior-weighted (N. Brummer, "Measuring, refining and calibrating speaker and language
information extracted from speech", PhD thesis, Stellenbosch 2010, chapter 8), with the smoothed targets of
J. Platt, "Probabilistic outputs for support vector machines", 1999, so that classes that separate
perfectly still give finite LLRs, of a size that their number of trials supports.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from deepfake_utils.conventions import ConfigError, ScoreError
from deepfake_utils.evaluation import intervals, metrics

METHODS = ("logistic", "isotonic")


@dataclass(frozen=True)
class Use:
    """What a detector is for: how common spoofs are, and what its two kinds of error cost (any common
    unit)."""

    p_spoof: float  # prior probability that a recording is spoofed, in (0, 1)
    cost_miss: float  # of rejecting a bona fide recording
    cost_fa: float  # of accepting a spoofed one
    reasoning: str = ""

    def __post_init__(self):
        if not 0 < self.p_spoof < 1 or self.cost_miss <= 0 or self.cost_fa <= 0:
            raise ConfigError(
                "p_spoof must lie between 0 and 1 and both costs above 0, got "
                f"p_spoof={self.p_spoof}, cost_miss={self.cost_miss}, cost_fa={self.cost_fa}"
            )


PRESETS = {
    "asvspoof5": Use(0.05, 1, 10, "The cost model of ASVspoof 5, track 1: for comparing systems."),
    "call-centre screening": Use(
        0.001,
        1,
        100,
        "About one call in a thousand is synthetic. Flagging an honest caller costs a minute of further "
        "questions; letting a synthetic voice through risks an account, though other checks still stand "
        "behind.",
    ),
    "content moderation": Use(
        0.05,
        10,
        10,
        "A few uploads in a hundred are synthetic. Labelling somebody's real voice as fake harms that "
        "person as much as an unlabelled fake harms its audience, and the fake can still be reported "
        "later.",
    ),
    "forensic triage": Use(
        0.5,
        1,
        20,
        "A recording is examined because its authenticity is disputed, so both are as likely. What is "
        "flagged goes to an expert and costs hours; what is passed is looked at by nobody again.",
    ),
}


@dataclass(frozen=True)
class Calibration:
    """A fitted map from scores to LLRs; `fitted_on` names the corpus it holds for.

    logistic: llr = sum over systems of slope * score, + intercept. isotonic: linear between (knot_scores,
    knot_llrs), constant beyond them.
    """

    method: str
    prior: float
    fitted_on: str
    n_bonafide: int
    n_spoof: int
    slopes: tuple[float, ...] = ()
    intercept: float = 0.0
    knot_scores: tuple[float, ...] = ()
    knot_llrs: tuple[float, ...] = ()

    def llr(self, scores: ArrayLike, corpus: str | None = None) -> np.ndarray:
        """Return LLRs (n,) of scores (n,), or (n, n_systems) for a fusion.

        corpus: where the scores come from; if it is another than the calibration's own, a warning says so.
        """
        if corpus is not None and corpus != self.fitted_on:
            warnings.warn(
                f"this calibration was fitted on {self.fitted_on or 'an unnamed corpus'} and is used on "
                f"{corpus}: its log-likelihood ratios and thresholds may not hold there; compare act_dcf "
                "with min_dcf",
                UserWarning,
                stacklevel=2,
            )
        scores = np.asarray(scores, dtype=np.float64)
        if self.method == "isotonic":
            return np.interp(scores, self.knot_scores, self.knot_llrs)
        n_systems = 1 if scores.ndim == 1 else scores.shape[1]
        if n_systems != len(self.slopes):
            raise ScoreError(f"fitted on {len(self.slopes)} systems' scores, applied to {n_systems}")
        return scores.reshape(len(scores), n_systems) @ np.array(self.slopes) + self.intercept

    def to_dict(self) -> dict:
        """Return plain numbers and lists, for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> Calibration:
        """Return what to_dict was called on."""
        try:
            fitted = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        except TypeError as error:
            raise ConfigError(f"not a stored calibration: {error}") from None
        if fitted.method not in METHODS:
            raise ConfigError(f"unknown calibration method {fitted.method!r}; known: {', '.join(METHODS)}")
        return fitted


def fit_calibration(
    scores: ArrayLike,
    labels: ArrayLike,
    method: str = "logistic",
    *,
    prior: float = 0.5,
    fitted_on: str = "",
    weights: ArrayLike | None = None,
) -> Calibration:
    """Fit the map from scores to LLRs on labelled trials (dev; never the trials it will be judged on).

    scores: (n,), or (n, n_systems) to fuse several systems (logistic only).
    labels: (n,) 1 = bona fide, 0 = spoof.
    prior: probability of bona fide at which the fit is best, in (0, 1); trials are weighted so that the
    classes have it, whatever their numbers.
    fitted_on: name of the corpus, kept with the result and compared when it is used.
    weights: (n,) what each trial counts beside the others of its class, > 0; None: all alike.
    Raises ScoreError on bad trials, ConfigError on bad settings; warns of scores that point the wrong way.

    Two unit Gaussians at 0 and 2 have llr = 2 s - 2:

    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat([0, 1], 20_000)
    >>> fitted = fit_calibration(rng.normal(2.0 * labels), labels)
    >>> [round(float(x)) for x in fitted.llr([0.0, 1.0, 2.0])]
    [-2, 0, 2]
    """
    if method not in METHODS:
        raise ConfigError(f"unknown calibration method {method!r}; known: {', '.join(METHODS)}")
    if not 0 < prior < 1:
        raise ConfigError(f"prior is the probability of bona fide, between 0 and 1, got {prior}")
    columns = np.asarray(scores, dtype=np.float64)
    columns = columns.reshape(len(columns), -1)
    for column in columns.T:
        _, labels = metrics.check_trials(column, labels)
        if metrics.auc(column, labels) < 0.5:
            warnings.warn(
                "higher scores are rather spoof in these trials (AUC below 0.5); if that is how the system "
                "writes them, read them with higher_is='spoof'",
                UserWarning,
                stacklevel=2,
            )
    n_bonafide, n_spoof = int(labels.sum()), int((1 - labels).sum())
    targets = np.where(labels == 1, (n_bonafide + 1) / (n_bonafide + 2), 1 / (n_spoof + 2))  # Platt 1999
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    of_class = np.bincount(labels, weights)
    weights = weights * np.where(labels == 1, prior / of_class[1], (1 - prior) / of_class[0])
    about = {"method": method, "prior": prior, "fitted_on": fitted_on}
    about |= {"n_bonafide": n_bonafide, "n_spoof": n_spoof}
    if method == "logistic":
        slopes, intercept = _fit_logistic(columns, targets, weights)
        return Calibration(**about, slopes=slopes, intercept=intercept - float(logit(prior)))
    if columns.shape[1] != 1:
        raise ConfigError("isotonic calibration takes one system's scores; fuse with method='logistic' first")
    fitted = IsotonicRegression(y_min=0, y_max=1).fit(columns[:, 0], targets, sample_weight=weights)
    llrs = logit(fitted.y_thresholds_) - logit(prior)
    return Calibration(**about, knot_scores=tuple(fitted.X_thresholds_.tolist()), knot_llrs=tuple(llrs.tolist()))


def _fit_logistic(columns: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[tuple[float, ...], float]:
    """Slopes and intercept of the weighted logistic regression on fractional targets.

    A trial with target t is one bona fide trial of weight t and one spoof trial of weight 1 - t.
    """
    centre, scale = columns.mean(axis=0), columns.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    standard = (columns - centre) / scale
    regression = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    regression.fit(
        np.r_[standard, standard],
        np.r_[np.ones(len(targets)), np.zeros(len(targets))],
        sample_weight=np.r_[weights * targets, weights * (1 - targets)] * len(targets),
    )
    slopes = regression.coef_[0] / scale
    return tuple(slopes.tolist()), float(regression.intercept_[0] - slopes @ centre)


def threshold_for(use: str | Use) -> float:
    """Return the LLR at and above which a recording should be accepted as bona fide in this use.

    use: a name in PRESETS, or your own Use(p_spoof, cost_miss, cost_fa).

    >>> round(threshold_for("forensic triage"), 3), round(threshold_for(Use(0.5, 1, 1)), 3)
    (2.996, 0.0)
    """
    use = _use(use)
    return metrics.bayes_threshold(use.p_spoof, use.cost_miss, use.cost_fa)


def _use(use: str | Use) -> Use:
    if isinstance(use, Use):
        return use
    if use not in PRESETS:
        names = ", ".join(PRESETS)
        raise ConfigError(f"unknown use {use!r}; known: {names}; or give Use(p_spoof, cost_miss, cost_fa)")
    return PRESETS[use]


def operating_point(
    llrs: ArrayLike,
    labels: ArrayLike,
    use: str | Use,
    clusters: ArrayLike | None = None,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict:
    """Return what deciding at the use's threshold comes to on these trials, with intervals.

    llrs: (n,) calibrated elsewhere (on dev); labels (n,); clusters (n,) speakers for the bootstrap, see
    intervals. Returns llr_threshold, p_miss, p_fa, dcf (expected cost / that of the better blind decision:
    above 1 is worse than not listening), min_dcf (the cost that a threshold chosen on these very trials
    would have), and each one's *_ci.
    """
    use = _use(use)
    threshold = threshold_for(use)
    costs = asdict(use)
    costs.pop("reasoning")

    def rates(llrs: np.ndarray, labels: np.ndarray) -> list[float]:
        return [
            *metrics.error_rates(llrs, labels, threshold),
            metrics.act_dcf(llrs, labels, **costs),
            metrics.min_dcf(llrs, labels, **costs),
        ]

    names = ("p_miss", "p_fa", "dcf", "min_dcf")
    result = {"llr_threshold": threshold, **dict.fromkeys(f"{name}_ci" for name in names)}
    result |= dict(zip(names, rates(*metrics.check_trials(llrs, labels)), strict=True))
    found = intervals.interval_or_none(rates, llrs, labels, clusters, n_bootstrap, seed, confidence=confidence)
    if found is not None:
        result |= {f"{name}_ci": [float(a), float(b)] for name, a, b in zip(names, *found[1:], strict=True)}
    return result


def reliability(llrs: ArrayLike, labels: ArrayLike, *, prior: float = 0.5, n_bins: int = 15) -> pd.DataFrame:
    """Return the data of a reliability diagram: what was predicted against what was found, in bins of
    equal mass.

    prior: probability of bona fide; the classes are weighted to it, both in prediction and in what is found.
    Columns predicted (mean posterior probability of bona fide), observed (weighted share of bona fide),
    n_bonafide, n_spoof. Calibrated LLRs lie on predicted = observed.
    """
    llrs, labels = metrics.check_trials(llrs, labels)
    weights = np.where(labels == 1, prior / labels.sum(), (1 - prior) / (1 - labels).sum())
    order = np.argsort(llrs, kind="stable")
    edges = np.searchsorted(np.cumsum(weights[order]), np.linspace(0, 1, n_bins + 1)[1:-1])
    posterior = expit(llrs + logit(prior))
    rows = []
    for chosen in np.split(order, np.unique(edges)):
        if chosen.size:
            weight, bonafide = weights[chosen], labels[chosen]
            rows.append(
                {
                    "predicted": float(np.average(posterior[chosen], weights=weight)),
                    "observed": float(np.average(bonafide, weights=weight)),
                    "n_bonafide": int(bonafide.sum()),
                    "n_spoof": int((1 - bonafide).sum()),
                }
            )
    return pd.DataFrame(rows)
