"""Thresholds for a use: closed forms, sources that count alike, and bands that say how sure a threshold is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfake_utils.conventions import ScoreError
from deepfake_utils.evaluation.calibration import Use, threshold_for
from deepfake_utils.evaluation.metrics import compute_eer, error_rates
from deepfake_utils.evaluation.uses import (
    FittedThreshold,
    balanced_eer,
    balanced_weights,
    fit_threshold,
    judge_threshold,
)

EVEN = Use(0.5, 1, 1)


def gaussian_log_odds(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated log-odds: normal with variance 8 around 4 (real) and -4 (fake), for which llr = log-odds."""
    labels = np.repeat([0, 1], n)
    return np.random.default_rng(seed).normal(8.0 * labels - 4, np.sqrt(8)), labels


@settings(max_examples=50, deadline=None)
@given(trials=st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abcd")), min_size=1, max_size=60))
def test_weights_add_up_to_one_a_label_and_a_source_counts_for_ten_at_most(trials):
    labels, sources = map(np.array, zip(*trials, strict=True))
    weights = balanced_weights(labels, sources)
    for label in set(labels.tolist()):
        of_label = labels == label
        assert weights[of_label].sum() == pytest.approx(1)
        sizes = {s: int((of_label & (sources == s)).sum()) for s in set(sources[of_label].tolist())}
        counted = {s: min(n, 10) for s, n in sizes.items()}
        for source in sizes:
            share = weights[of_label & (sources == source)].sum()
            assert share == pytest.approx(counted[source] / sum(counted.values()))


@pytest.mark.parametrize("use", [EVEN, Use(0.05, 10, 10), Use(0.5, 1, 20)])
def test_on_calibrated_log_odds_the_fitted_threshold_is_the_theoretical_one(use):
    log_odds, labels = gaussian_log_odds(20_000)
    fitted = fit_threshold(log_odds, labels, np.arange(len(labels)) % 100, use, n_bootstrap=50)
    assert fitted.threshold == pytest.approx(threshold_for(use), abs=0.35)
    assert fitted.low <= fitted.threshold <= fitted.high and fitted.high - fitted.low < 1.5


def test_a_scale_that_is_wrong_is_no_matter_to_a_fitted_threshold():
    log_odds, labels = gaussian_log_odds(5_000)
    use, sources = Use(0.5, 1, 20), np.arange(10_000) % 50
    fitted = fit_threshold(log_odds / 4 + 3, labels, sources, use, n_bootstrap=10)
    assert 4 * (fitted.threshold - 3) == pytest.approx(threshold_for(use), abs=0.5)


def test_a_recording_that_is_there_twice_counts_once():
    log_odds, labels = gaussian_log_odds(60)
    log_odds[60:65] -= 6  # all that one of the two sources of real speech has: with ten it would weigh as the other
    sources = np.r_[np.arange(60) % 3, np.repeat([3, 4], [5, 55])]
    once = fit_threshold(log_odds, labels, sources, EVEN)
    doubled = [np.repeat(part, 2) for part in (log_odds, labels, sources)]
    again = fit_threshold(*doubled, EVEN, shares=np.full(240, 0.5))
    assert again == pytest.approx(once, abs=1e-9)
    assert abs(fit_threshold(*doubled, EVEN).threshold - once.threshold) > 0.1


def test_fewer_sources_make_a_wider_band():
    log_odds, labels = gaussian_log_odds(2_000)
    shift = np.random.default_rng(1).normal(0, 2, 200)
    bands = []
    for n_sources in (4, 200):
        sources = np.random.default_rng(2).integers(n_sources, size=len(labels))
        fitted = fit_threshold(log_odds + shift[sources], labels, sources, EVEN, n_bootstrap=100)
        bands.append(fitted.high - fitted.low)
    assert bands[0] > bands[1]


def test_costs_are_those_counted_by_hand():
    log_odds, labels, sources = [-2.0, 1.0, 3.0, -3.0, -1.0, 2.0], [1, 1, 1, 0, 0, 0], list("aabaab")
    use = Use(0.2, 5, 10)
    judged = judge_threshold(log_odds, labels, sources, use, FittedThreshold(0.0, -1.5, 1.5), n_bootstrap=20)
    assert judged["real_rejected"] == pytest.approx(1 / 3) and judged["fake_accepted"] == pytest.approx(1 / 3)
    assert judged["cost"] == pytest.approx(0.8 * 5 / 3 + 0.2 * 10 / 3) and judged["blind"] == 2.0
    assert judged["undecided"] == pytest.approx(0.8 / 3 + 0.2 / 3)
    assert judged["least"] <= judged["cost"] and judged["cost_ci"][0] <= judged["cost"] <= judged["cost_ci"][1]
    alone = judge_threshold(log_odds, labels, ["one"] * 6, use, FittedThreshold(0.0, 0.0, 0.0))
    assert alone["cost_ci"] is None and alone["undecided"] == 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), threshold=st.floats(-3, 3))
def test_with_one_recording_a_source_the_rates_are_the_ordinary_ones(seed, threshold):
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(2, size=20)]
    scores = rng.normal(labels)
    sources = np.arange(len(labels))
    judged = judge_threshold(
        scores, labels, sources, EVEN, FittedThreshold(threshold, threshold, threshold), n_bootstrap=0
    )
    assert (judged["real_rejected"], judged["fake_accepted"]) == pytest.approx(error_rates(scores, labels, threshold))
    n_least = min(np.bincount(labels))
    assert balanced_eer(scores, labels) == pytest.approx(compute_eer(scores, labels).eer, abs=1 / n_least)


def test_one_label_alone_is_refused():
    with pytest.raises(ScoreError, match="both classes"):
        fit_threshold([0.0, 1.0], [1, 1], ["a", "b"], EVEN)
