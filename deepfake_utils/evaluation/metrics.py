"""Error rates and detection costs of a countermeasure, all on one tie-aware curve.

Conventions: higher score = more bona fide; a trial is accepted as bona fide when ``score >= threshold``;
labels are 1 = bona fide, 0 = spoof; every rate is a fraction. A *miss* rejects a bona fide trial, a *false
alarm* accepts a spoof.

Where the numbers come from
    EER, t-DCF    ASVspoof 2019 evaluation plan; T. Kinnunen et al., "t-DCF", Odyssey 2018.
    revised form  T. Kinnunen et al., "Tandem assessment of spoofing countermeasures and automatic speaker
                  verification: fundamentals", IEEE/ACM TASLP 28, 2020, eqs. (10)-(11); ASVspoof 2021
                  evaluation plan, appendix.
    DCF, Cllr     ASVspoof 5 evaluation plan (2024), track 1; N. Brummer and J. du Preez,
                  "Application-independent evaluation of speaker detection", Computer Speech and Language 20,
                  2006 (Cllr, and its minimum by pool adjacent violators).
    tandem EER    T. Kinnunen et al., "t-EER", IEEE TPAMI 2023.

Ties. The organisers' scripts make one operating point per trial, in the order the sort happens to leave
equal scores in. Here one threshold is one operating point: equal scores are accepted or rejected together.
Wherever no bona fide trial shares its score with a spoof trial, the EER equals theirs. Where the tie block
that crosses the diagonal holds both classes, the EER here is the crossing of the straight line through that
block (its trials decided by a coin); theirs rejects the bona fide trials of the block first and is higher,
by at most the smaller of the block's two shares of its class, to within half a trial. Constant scores give
50 % here and 100 % there. Minima of DCF and t-DCF are the same in both, ties or not: no point inside a block
costs less than both of its ends.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.isotonic import isotonic_regression

from deepfake_utils.conventions import ScoreError

# ASVspoof 2019 and 2021 cost model (evaluation plans, table "t-DCF cost function parameters").
P_SPOOF = 0.05
P_TARGET = (1 - P_SPOOF) * 0.99
P_NONTARGET = (1 - P_SPOOF) * 0.01
COST_MISS, COST_FALSE_ALARM = 1.0, 10.0  # also those of ASVspoof 5, track 1; the same for nontarget and spoof


class Eer(NamedTuple):
    """Equal error rate (fraction) and the threshold whose operating point lies nearest to it."""

    eer: float
    threshold: float


class DetPoints(NamedTuple):
    """Operating points in rising threshold order, the last one at +inf (everything rejected).

    p_miss and p_fa (n_points,) are fractions; thresholds (n_points,) are the distinct scores and +inf.
    """

    p_miss: np.ndarray
    p_fa: np.ndarray
    thresholds: np.ndarray
    n_bonafide: int
    n_spoof: int


class AsvRates(NamedTuple):
    """Error rates of the speaker verification system behind the countermeasure, at its own EER threshold."""

    p_miss: float
    p_fa: float
    p_fa_spoof: float


class TandemCurve(NamedTuple):
    """Normalised tandem cost (n_points,) at every countermeasure threshold (n_points,)."""

    cost: np.ndarray
    thresholds: np.ndarray


def check_trials(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, labels) as float64 and int64 vectors, or raise ScoreError saying what is wrong."""
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ScoreError(f"scores {scores.shape} and labels {labels.shape} must be two vectors of one length")
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ScoreError(
            f"{bad.size} of {scores.size} scores are not finite (first: {scores[bad[0]]} at position "
            f"{bad[0]}); half precision that overflows writes such scores: score again in fp32"
        )
    is_bonafide, is_spoof = labels == 1, labels == 0
    if not np.all(is_bonafide | is_spoof):
        other = labels[~(is_bonafide | is_spoof)][0]
        raise ScoreError(f"labels must be 1 (bona fide) or 0 (spoof), found {other}")
    if not is_bonafide.any() or not is_spoof.any():
        raise ScoreError(
            f"both classes are needed, found {is_bonafide.sum()} bona fide and {is_spoof.sum()} spoof trials"
        )
    return scores, is_bonafide.astype(np.int64)


def det_points(scores: ArrayLike, labels: ArrayLike) -> DetPoints:
    """Return miss and false alarm rate at every distinct score and at +inf.

    scores: (n,) finite, higher = more bona fide; labels: (n,) 1 = bona fide, 0 = spoof.
    Raises ScoreError on non-finite scores, other labels, or one class only.

    >>> points = det_points([0.0, 1.0, 1.0, 2.0], [0, 0, 1, 1])
    >>> points.thresholds.tolist(), points.p_miss.tolist(), points.p_fa.tolist()
    ([0.0, 1.0, 2.0, inf], [0.0, 0.0, 0.5, 1.0], [1.0, 0.5, 0.0, 0.0])
    """
    scores, labels = check_trials(scores, labels)
    order = np.argsort(scores, kind="stable")
    scores, labels = scores[order], labels[order]
    last = np.flatnonzero(scores[1:] != scores[:-1])  # of every tie block but the final one
    bonafide = np.cumsum(labels)
    bonafide_below = np.concatenate(([0], bonafide[last], bonafide[-1:]))
    spoof_below = np.concatenate(([0], last + 1, [scores.size])) - bonafide_below
    n_bonafide, n_spoof = int(bonafide_below[-1]), int(spoof_below[-1])
    return DetPoints(
        p_miss=bonafide_below / n_bonafide,
        p_fa=(n_spoof - spoof_below) / n_spoof,
        thresholds=np.concatenate((scores[:1], scores[last + 1], [np.inf])),
        n_bonafide=n_bonafide,
        n_spoof=n_spoof,
    )


def eer_of(points: DetPoints) -> Eer:
    """Return the EER of a curve that has been computed already; see compute_eer."""
    above = int(np.searchsorted(points.p_miss - points.p_fa, 0.0))  # first point with p_miss >= p_fa
    miss_1, fa_1 = float(points.p_miss[above]), float(points.p_fa[above])
    if miss_1 == fa_1:
        return Eer(miss_1, float(points.thresholds[above]))
    miss_0, fa_0 = float(points.p_miss[above - 1]), float(points.p_fa[above - 1])
    nearer = above - 1 if fa_0 - miss_0 <= miss_1 - fa_1 else above
    threshold = float(points.thresholds[nearer])
    if miss_0 < miss_1 and fa_1 < fa_0:  # both classes tied: the chord's crossing with the diagonal
        share = (fa_0 - miss_0) / ((miss_1 - miss_0) + (fa_0 - fa_1))
        return Eer(miss_0 + share * (miss_1 - miss_0), threshold)
    # One class moves, trial by trial, past the other's fixed rate: the mean of the two at the nearest trial.
    if fa_0 == fa_1:
        fixed, low, n = fa_0, round(miss_0 * points.n_bonafide), points.n_bonafide
        steps = np.arange(low, round(miss_1 * n) + 1) / n
        moving = steps[np.argmin(np.abs(steps - fixed))]
    else:
        fixed, high, n = miss_0, round(fa_0 * points.n_spoof), points.n_spoof
        steps = np.arange(high, round(fa_1 * n) - 1, -1) / n
        moving = steps[np.argmin(np.abs(fixed - steps))]
    return Eer(float(np.mean((moving, fixed))), threshold)


def compute_eer(scores: ArrayLike, labels: ArrayLike) -> Eer:
    """Return the equal error rate and its threshold.

    The mean of miss and false alarm rate at the operating point where they are nearest (the first such
    point), as the ASVspoof organisers define it; across a tie block of both classes, the crossing of its
    chord (module docstring). Exchanging the classes changes nothing unless two operating points are equally
    near, and then at most by half a trial of the class that moves.

    >>> compute_eer([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    Eer(eer=0.5, threshold=0.4)
    >>> compute_eer([7.0] * 5, [0, 0, 0, 1, 1]).eer
    0.5
    """
    return eer_of(det_points(scores, labels))


def asv_error_rates(asv_scores: ArrayLike, keys: ArrayLike) -> AsvRates:
    """Return the ASV system's error rates at its EER threshold (target against nontarget).

    asv_scores: (n,) higher = more the target speaker; keys: (n,) of "target", "nontarget", "spoof".
    The threshold is, as in the organisers' scripts, the highest score that the EER point rejects, and is
    itself accepted.
    Raises ScoreError where one of the three kinds of trial is missing.
    """
    asv_scores, keys = np.asarray(asv_scores, dtype=np.float64), np.asarray(keys)
    missing = [kind for kind in ("target", "nontarget", "spoof") if not np.any(keys == kind)]
    if missing:
        raise ScoreError(f"the ASV scores hold no {' and no '.join(missing)} trials; all three kinds are needed")
    target, nontarget, spoof = (asv_scores[keys == kind] for kind in ("target", "nontarget", "spoof"))
    points = det_points(np.r_[target, nontarget], np.r_[np.ones(target.size), np.zeros(nontarget.size)])
    position = int(np.searchsorted(points.thresholds, eer_of(points).threshold))
    threshold = points.thresholds[max(position - 1, 0)]
    return AsvRates(
        p_miss=float(np.mean(target < threshold)),
        p_fa=float(np.mean(nontarget >= threshold)),
        p_fa_spoof=float(np.mean(spoof >= threshold)),
    )


def tandem_curve(points: DetPoints, asv_rates: AsvRates, *, revised: bool = False) -> TandemCurve:
    """Return the normalised t-DCF at every countermeasure threshold, for a fixed ASV system.

    legacy (2019)   (C1 p_miss + C2 p_fa) / min(C1, C2)
    revised (2021)  (C0 + C1 p_miss + C2 p_fa) / (C0 + min(C1, C2))
    with C0 = P_target C_miss asv_miss + P_nontarget C_fa asv_fa, C1 = P_target C_miss - C0,
    C2 = P_spoof C_fa asv_fa_spoof; P_spoof 0.05, P_target 0.9405, P_nontarget 0.0095, C_miss 1, C_fa 10 in
    both plans (that of 2019 names the costs of ASV and countermeasure apart and gives them these values).
    Raises ScoreError if the ASV system is too poor for the metric (C1 <= 0) or accepts no spoof (C2 = 0).
    """
    c0 = P_TARGET * COST_MISS * asv_rates.p_miss + P_NONTARGET * COST_FALSE_ALARM * asv_rates.p_fa
    c1 = P_TARGET * COST_MISS - c0
    c2 = P_SPOOF * COST_FALSE_ALARM * asv_rates.p_fa_spoof
    if c1 <= 0 or c2 <= 0:
        raise ScoreError(
            f"t-DCF is undefined for this ASV system (C1 = {c1:.4g}, C2 = {c2:.4g}; both must be positive): "
            f"it misses {asv_rates.p_miss:.2%}, accepts {asv_rates.p_fa:.2%} of nontargets and "
            f"{asv_rates.p_fa_spoof:.2%} of spoofs; check the ASV score file"
        )
    constant = c0 if revised else 0.0
    cost = (constant + c1 * points.p_miss + c2 * points.p_fa) / (constant + min(c1, c2))
    return TandemCurve(cost, points.thresholds)


def min_tdcf_2019(scores: ArrayLike, labels: ArrayLike, asv_rates: AsvRates) -> float:
    """Return the minimum normalised t-DCF in the legacy form of ASVspoof 2019; see tandem_curve."""
    return float(tandem_curve(det_points(scores, labels), asv_rates).cost.min())


def min_tdcf_2021(scores: ArrayLike, labels: ArrayLike, asv_rates: AsvRates) -> float:
    """Return the minimum normalised t-DCF in the revised form of ASVspoof 2021; see tandem_curve.

    Pooled over conditions: one ASV operating point for all trials, as the organisers pool.
    """
    return float(tandem_curve(det_points(scores, labels), asv_rates, revised=True).cost.min())


def tandem_eer(points: DetPoints, asv_scores: ArrayLike, keys: ArrayLike) -> float:
    """Return the concurrent t-EER: the error rate where target, nontarget and spoof trials fare alike.

    Kinnunen et al. 2023. For every ASV threshold, bisection finds the countermeasure threshold with equal
    tandem miss and (equal-prior) false alarm rate; of these pairs the one that accepts nontarget and spoof
    trials most nearly alike is taken and its spoof acceptance rate returned, as the ASVspoof 5 evaluation
    package does. NaN if no pair qualifies.
    """
    asv_scores, keys = np.asarray(asv_scores, dtype=np.float64), np.asarray(keys)
    grid = np.r_[np.unique(asv_scores), np.inf]

    def rejected(kind: str) -> np.ndarray:
        of_kind = np.sort(asv_scores[keys == kind])
        return np.searchsorted(of_kind, grid) / of_kind.size

    miss, fa_non, fa_spoof = rejected("target"), 1 - rejected("nontarget"), 1 - rejected("spoof")
    useful = (miss < (fa_non + fa_spoof) / 2) & (fa_spoof > 0)
    if not useful.any():
        return float("nan")
    miss, fa_non, fa_spoof = miss[useful], fa_non[useful], fa_spoof[useful]

    def excess(index: np.ndarray) -> np.ndarray:
        """Tandem miss rate minus tandem false alarm rate; rises with the countermeasure threshold."""
        cm_accepts = 1 - points.p_miss[index]
        return 1 - cm_accepts * (1 - miss) - (cm_accepts * fa_non + points.p_fa[index] * fa_spoof) / 2

    low, high = np.zeros(miss.size, dtype=np.int64), np.full(miss.size, points.thresholds.size - 1)
    while np.any(low < high):
        middle = (low + high) // 2
        passed = excess(middle) >= 0
        low, high = np.where(passed, low, np.minimum(middle + 1, high)), np.where(passed, middle, high)
    before = np.maximum(low - 1, 0)
    index = np.where(np.abs(excess(before)) <= np.abs(excess(low)), before, low)
    accepted = index < points.thresholds.size - 1  # at +inf nothing is accepted and the ratio below is 0 / 0
    index, fa_non, fa_spoof = index[accepted], fa_non[accepted], fa_spoof[accepted]
    if not index.size:
        return float("nan")
    imbalance = np.abs(fa_non / fa_spoof - points.p_fa[index] / (1 - points.p_miss[index]))
    best = int(np.argmin(imbalance))
    return float(fa_spoof[best] * points.p_fa[index[best]])


def min_dcf_of(
    points: DetPoints,
    *,
    p_spoof: float = P_SPOOF,
    cost_miss: float = COST_MISS,
    cost_fa: float = COST_FALSE_ALARM,
) -> tuple[float, float]:
    """Return (minimum normalised detection cost, its threshold) of a curve computed already."""
    weight_miss, weight_fa = cost_miss * (1 - p_spoof), cost_fa * p_spoof
    cost = (weight_miss * points.p_miss + weight_fa * points.p_fa) / min(weight_miss, weight_fa)
    best = int(np.argmin(cost))
    return float(cost[best]), float(points.thresholds[best])


def min_dcf(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    p_spoof: float = P_SPOOF,
    cost_miss: float = COST_MISS,
    cost_fa: float = COST_FALSE_ALARM,
) -> float:
    """Return the minimum normalised detection cost; the defaults (0.05, 1, 10) are ASVspoof 5 track 1.

    The minimum over thresholds of (a p_miss + b p_fa) / min(a, b), a = C_miss (1 - P_spoof), b = C_fa
    P_spoof.

    >>> min_dcf([-1.0, 0.0, 1.0, 2.0], [0, 0, 1, 1])
    0.0
    """
    return min_dcf_of(det_points(scores, labels), p_spoof=p_spoof, cost_miss=cost_miss, cost_fa=cost_fa)[0]


def bayes_threshold(p_spoof: float = P_SPOOF, cost_miss: float = COST_MISS, cost_fa: float = COST_FALSE_ALARM) -> float:
    """Return the log-likelihood ratio from which on accepting is the cheaper decision.

    log(C_fa P_spoof / (C_miss (1 - P_spoof))), natural logarithm.
    """
    return float(np.log(cost_fa * p_spoof) - np.log(cost_miss * (1 - p_spoof)))


def act_dcf(
    llrs: ArrayLike,
    labels: ArrayLike,
    *,
    p_spoof: float = P_SPOOF,
    cost_miss: float = COST_MISS,
    cost_fa: float = COST_FALSE_ALARM,
) -> float:
    """Return the normalised detection cost of scores taken at their word as natural-log likelihood ratios.

    Decisions fall at bayes_threshold (ASVspoof 5 evaluation plan, eq. 3): poor calibration is paid for here.
    """
    llrs, labels = check_trials(llrs, labels)
    threshold = bayes_threshold(p_spoof, cost_miss, cost_fa)
    p_miss, p_fa = error_rates(llrs, labels, threshold)
    weight_miss, weight_fa = cost_miss * (1 - p_spoof), cost_fa * p_spoof
    return float((weight_miss * p_miss + weight_fa * p_fa) / min(weight_miss, weight_fa))


def cllr(llrs: ArrayLike, labels: ArrayLike) -> float:
    """Return the cost of the log-likelihood ratios in bits: 0 is perfect, a score that is always 0 pays 1.

    >>> cllr([0.0, 0.0], [0, 1])
    1.0
    """
    llrs, labels = check_trials(llrs, labels)
    bonafide, spoof = llrs[labels == 1], llrs[labels == 0]
    return float((np.logaddexp(0, -bonafide).mean() + np.logaddexp(0, spoof).mean()) / (2 * np.log(2)))


def min_cllr(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the Cllr that is left after the best monotone recalibration (PAV), in bits, 0 to 1.

    Without Laplace smoothing: what separates perfectly costs nothing.
    """
    points = det_points(scores, labels)
    bonafide = np.diff(np.round(points.p_miss * points.n_bonafide))
    spoof = -np.diff(np.round(points.p_fa * points.n_spoof))
    posterior = isotonic_regression(bonafide / (bonafide + spoof), sample_weight=bonafide + spoof, y_min=0, y_max=1)
    # Likelihood ratio = posterior odds / prior odds; its losses are written so that 0 and 1 stay finite.
    weight_bonafide = posterior * points.n_spoof
    weight_spoof = (1 - posterior) * points.n_bonafide
    total = weight_bonafide + weight_spoof
    paid_bonafide = -np.log2((weight_bonafide / total)[bonafide > 0]) @ bonafide[bonafide > 0]
    paid_spoof = -np.log2((weight_spoof / total)[spoof > 0]) @ spoof[spoof > 0]
    return float(abs(paid_bonafide / points.n_bonafide + paid_spoof / points.n_spoof) / 2)


def auc_of(points: DetPoints) -> float:
    """Return the area under the ROC of a curve computed already; see auc."""
    return float(np.trapezoid(1 - points.p_fa, points.p_miss))


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the probability that a bona fide trial outscores a spoof trial, ties counting half.

    >>> auc([0.0, 1.0, 1.0, 2.0], [0, 0, 1, 1])
    0.875
    """
    return auc_of(det_points(scores, labels))


def error_rates(scores: ArrayLike, labels: ArrayLike, threshold: float) -> tuple[float, float]:
    """Return (miss rate, false alarm rate) when score >= threshold is accepted as bona fide."""
    scores, labels = check_trials(scores, labels)
    accepted = scores >= threshold
    return float(np.mean(~accepted[labels == 1])), float(np.mean(accepted[labels == 0]))


def accuracy(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """Return the fraction of trials decided rightly when score >= threshold is accepted as bona fide.

    On ASVspoof 2019 LA eval, where nine trials in ten are spoof, rejecting everything already gives 0.897.

    >>> accuracy([-1.0, 0.5, 2.0, 0.5], [0, 0, 1, 1], threshold=1.0)
    0.75
    """
    scores, labels = check_trials(scores, labels)
    return float(np.mean((scores >= threshold) == (labels == 1)))
