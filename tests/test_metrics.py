"""Metrics against closed forms, hand-worked ties, published score files, definitions and properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from deepfake_utils.conventions import ScoreError
from deepfake_utils.evaluation import metrics
from deepfake_utils.evaluation.scorefile import join_scores, read_asv_scores, read_scores
from deepfake_utils.protocols import read_keys

ASV_2019_EVAL = "asvspoof2019_subset/LA/ASVspoof2019_LA_asv_scores/ASVspoof2019.LA.asv.eval.gi.trl.scores.txt"
GOOD_ASV = metrics.AsvRates(p_miss=0.02, p_fa=0.02, p_fa_spoof=0.7)


def eer_per_trial(scores, labels):
    """The organisers' definition, from its description: one operating point a trial, bona fide first in
    ties."""
    order = np.lexsort((1 - labels, scores))
    labels = labels[order]
    miss = np.r_[0, np.cumsum(labels)] / labels.sum()
    n_spoof = (1 - labels).sum()
    false_alarm = (n_spoof - np.r_[0, np.cumsum(1 - labels)]) / n_spoof
    nearest = np.argmin(np.abs(miss - false_alarm))
    return (miss[nearest] + false_alarm[nearest]) / 2


@pytest.fixture(scope="module")
def keys(reference_data):
    return read_keys(reference_data / "published_scores" / "ASVspoof2019.LA.cm.eval.trl.txt")


@pytest.fixture(scope="module")
def asv_rates(reference_data):
    asv = read_asv_scores(reference_data / ASV_2019_EVAL)
    return metrics.asv_error_rates(asv["score"], asv["key"])


def two_gaussians(distance, n, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], n)
    return rng.normal(distance * labels), labels


@st.composite
def trials(draw, values):
    """Scores and labels with both classes; `values` decides how many ties there are."""
    n = draw(st.integers(2, 40))
    scores = np.array(draw(st.lists(values, min_size=n, max_size=n)), dtype=np.float64)
    labels = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    labels[:2] = [0, 1]
    return scores, labels


tied = trials(st.integers(-4, 4))
unhurried = settings(deadline=None, max_examples=60)
any_trials = st.one_of(tied, trials(st.floats(-50, 50, allow_subnormal=False)))


class TestClosedForms:
    @pytest.mark.parametrize("distance", [0.0, 1.0, 2.0, 4.0])
    def test_two_unit_gaussians(self, distance):
        scores, labels = two_gaussians(distance, 200_000)
        assert metrics.compute_eer(scores, labels).eer == pytest.approx(norm.cdf(-distance / 2), abs=2e-3)
        assert metrics.auc(scores, labels) == pytest.approx(norm.cdf(distance / np.sqrt(2)), abs=2e-3)
        miss, false_alarm = metrics.error_rates(scores, labels, 0.7)
        assert miss == pytest.approx(norm.cdf(0.7 - distance), abs=4e-3)
        assert false_alarm == pytest.approx(norm.sf(0.7), abs=4e-3)

    def test_gaussian_log_likelihood_ratios_are_calibrated(self):
        scores, labels = two_gaussians(2.0, 100_000)
        llrs = 2 * scores - 2
        grid = np.linspace(-12, 12, 20_001)
        expected = np.trapezoid(np.logaddexp(0, -grid) * norm.pdf(grid, 2, 2), grid) / np.log(2)
        assert metrics.cllr(llrs, labels) == pytest.approx(expected, abs=5e-3)
        assert metrics.min_cllr(scores, labels) == pytest.approx(expected, abs=5e-3)
        assert metrics.act_dcf(llrs, labels) == pytest.approx(metrics.min_dcf(llrs, labels), abs=5e-3)
        assert metrics.act_dcf(llrs + 2, labels) > metrics.min_dcf(llrs, labels) + 0.05

    def test_separable(self):
        scores, labels = np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 0, 1, 1])
        eer = metrics.compute_eer(scores, labels)
        assert eer.eer == 0.0
        assert metrics.accuracy(scores, labels, eer.threshold) == 1.0
        assert metrics.auc(scores, labels) == 1.0
        assert metrics.min_cllr(scores, labels) == 0.0
        assert metrics.min_dcf(scores, labels) == 0.0
        assert metrics.min_tdcf_2019(scores, labels, GOOD_ASV) == 0.0
        assert metrics.compute_eer(-scores, labels).eer == 1.0

    def test_constant_scores_know_nothing(self):
        labels = np.array([1, 0, 0, 0, 1, 0])
        scores = np.full(6, 3.0)
        assert metrics.compute_eer(scores, labels) == (0.5, 3.0)
        assert metrics.auc(scores, labels) == 0.5
        assert metrics.min_cllr(scores, labels) == pytest.approx(1.0)
        assert metrics.cllr(np.zeros(6), labels) == pytest.approx(1.0)
        assert metrics.min_dcf(scores, labels) == 1.0
        assert metrics.min_tdcf_2019(scores, labels, GOOD_ASV) == 1.0
        assert metrics.min_tdcf_2021(scores, labels, GOOD_ASV) == 1.0


class TestTies:
    @pytest.mark.parametrize(
        ("spoof", "bonafide", "eer"),
        [
            # miss/false alarm at the thresholds, and where they meet
            ([0, 1], [1, 2], 1 / 4),  # (0,1) (0,.5) (.5,0) (1,0): chord from (0,.5) to (.5,0)
            ([0, 1, 1], [1, 2], 2 / 7),  # (0,2/3) to (1/2,0): 2/3 - 4/3 m = m
            ([1, 1, 1, 0], [1, 2, 2, 2], 3 / 16),  # (0,3/4) to (1/4,0): 3/4 - 3 m = m
            ([0, 1], [0, 1], 1 / 2),
            ([0, 0, 2, 2], [1, 1, 1, 1], 1 / 2),  # a block of one class: passes the fixed rate 1/2
            ([0, 0, 2, 2], [1, 1, 1, 1, 1], 9 / 20),  # nearest to 1/2 of 0, 1/5, ... 1: (2/5 + 1/2) / 2
            ([0, 0, 0, 2], [1] * 8, 1 / 4),
            ([0, 3], [1, 2], 1 / 2),
        ],
    )
    def test_by_hand(self, spoof, bonafide, eer):
        labels = np.r_[np.zeros(len(spoof)), np.ones(len(bonafide))]
        assert metrics.compute_eer(np.r_[spoof, bonafide], labels).eer == pytest.approx(eer, abs=1e-12)

    def test_rounding_scores_moves_the_eer_little(self):
        scores, labels = two_gaussians(2.4, 5_000)
        exact, rounded = (metrics.compute_eer(s, labels).eer for s in (scores, np.round(scores, 1)))
        assert rounded == pytest.approx(exact, abs=1e-3)
        assert eer_per_trial(np.round(scores, 1), labels) > exact + 5e-3  # what this definition avoids

    @unhurried
    @given(any_trials)
    def test_one_operating_point_a_distinct_score(self, data):
        scores, labels = data
        points = metrics.det_points(scores, labels)
        assert points.thresholds.tolist() == [*np.unique(scores), np.inf]
        for i, threshold in enumerate(points.thresholds):
            assert (points.p_miss[i], points.p_fa[i]) == metrics.error_rates(scores, labels, threshold)

    @unhurried
    @given(any_trials)
    def test_equals_the_organisers_where_classes_share_no_score(self, data):
        scores, labels = data
        if not set(scores[labels == 1]) & set(scores[labels == 0]):
            assert metrics.compute_eer(scores, labels).eer == eer_per_trial(scores, labels)

    def test_equals_the_organisers_without_ties(self):
        for seed in range(50):
            scores, labels = two_gaussians(1.5, 200, seed)
            scores, labels = scores[seed:], labels[seed:]  # classes of unequal size
            assert metrics.compute_eer(scores, labels).eer == eer_per_trial(scores, labels)

    @unhurried
    @given(tied)
    def test_stated_bound_on_the_difference(self, data):
        scores, labels = data
        n = np.array([(labels == 0).sum(), (labels == 1).sum()])
        shares = [min(np.sum((scores == s) & (labels == c)) / n[c] for c in (0, 1)) for s in np.unique(scores)]
        excess = eer_per_trial(scores, labels) - metrics.compute_eer(scores, labels).eer
        half_trial = 0.5 / n.min()
        assert -half_trial - 1e-12 <= excess <= max(shares) + half_trial + 1e-12


class TestProperties:
    @unhurried
    @given(any_trials, st.sampled_from([np.cbrt, lambda s: 3 * s - 7, lambda s: np.arctan(s / 20), np.exp]))
    def test_monotone_maps_change_nothing(self, data, rise):
        scores, labels = data
        moved = rise(np.unique(scores))
        if np.unique(moved).size != moved.size:  # rounding merged scores: not strictly monotone any more
            return
        moved = rise(scores)
        for metric in (
            lambda s: metrics.compute_eer(s, labels).eer,
            lambda s: metrics.min_tdcf_2019(s, labels, GOOD_ASV),
            lambda s: metrics.min_tdcf_2021(s, labels, GOOD_ASV),
            lambda s: metrics.min_dcf(s, labels),
            lambda s: metrics.min_cllr(s, labels),
            lambda s: metrics.auc(s, labels),
        ):
            assert metric(moved) == metric(scores)

    @unhurried
    @given(any_trials)
    def test_exchanging_the_classes(self, data):
        scores, labels = data
        there, back = metrics.compute_eer(scores, labels).eer, metrics.compute_eer(-scores, 1 - labels).eer
        assert there == pytest.approx(back, abs=0.5 / min(labels.sum(), (1 - labels).sum()) + 1e-12)
        assert metrics.auc(-scores, 1 - labels) == pytest.approx(metrics.auc(scores, labels))
        minimum = metrics.min_cllr(scores, labels)
        assert metrics.min_cllr(-scores, 1 - labels) == pytest.approx(minimum, abs=1e-9)
        assert metrics.cllr(-scores, 1 - labels) == pytest.approx(metrics.cllr(scores, labels))

    def test_exchanging_the_classes_is_exact_where_one_point_is_nearest(self):
        scores, labels = two_gaussians(1.0, 301)
        assert metrics.compute_eer(-scores, 1 - labels).eer == metrics.compute_eer(scores, labels).eer

    @unhurried
    @given(any_trials, st.floats(0, 10))
    def test_more_separation_is_never_worse(self, data, shift):
        scores, labels = data
        further = scores + shift * labels
        # organisers' mean at the nearest point is not quite monotone: by half a trial
        half_trial = 0.5 / min(labels.sum(), (1 - labels).sum())
        before = metrics.compute_eer(scores, labels).eer
        assert metrics.compute_eer(further, labels).eer <= before + half_trial
        for metric in (metrics.min_cllr, metrics.min_dcf):
            assert metric(further, labels) <= metric(scores, labels) + 1e-9
        assert metrics.auc(further, labels) >= metrics.auc(scores, labels) - 1e-12
        for tdcf in (metrics.min_tdcf_2019, metrics.min_tdcf_2021):
            assert tdcf(further, labels, GOOD_ASV) <= tdcf(scores, labels, GOOD_ASV) + 1e-12

    @unhurried
    @given(any_trials)
    def test_ranges_and_order(self, data):
        scores, labels = data
        assert 0 <= metrics.compute_eer(scores, labels).eer <= 1
        assert 0 <= metrics.min_cllr(scores, labels) <= min(1, metrics.cllr(scores, labels)) + 1e-9
        assert 0 <= metrics.min_dcf(scores, labels) <= min(1, metrics.act_dcf(scores, labels)) + 1e-12
        assert metrics.auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))

    @unhurried
    @given(any_trials, st.integers(2, 4))
    def test_repeating_every_trial_changes_nothing(self, data, times):
        scores, labels = data
        again = np.repeat(scores, times), np.repeat(labels, times)
        assert metrics.min_cllr(*again) == pytest.approx(metrics.min_cllr(scores, labels), abs=1e-9)
        assert metrics.auc(*again) == pytest.approx(metrics.auc(scores, labels))
        assert metrics.min_dcf(*again) == pytest.approx(metrics.min_dcf(scores, labels))


class TestTandem:
    def test_by_hand(self):
        # C0 = .9405*.02 + .0095*10*.02 = .02071, C1 = .9405 - C0 = .91979, C2 = .05*10*.7 = .35
        scores, labels = np.array([0.0, 2.0, 1.0, 3.0]), np.array([0, 0, 1, 1])
        # points (0,1) (0,.5) (.5,.5) (.5,0) (1,0): the cheapest is (0,.5) at .175
        assert metrics.min_tdcf_2019(scores, labels, GOOD_ASV) == pytest.approx(0.175 / 0.35)
        assert metrics.min_tdcf_2021(scores, labels, GOOD_ASV) == pytest.approx(0.19571 / 0.37071)

    def test_asv_rates_by_hand(self):
        scores = [0.0, 1.0, 2.0, 5.0, 3.0, 6.0, 7.0, 8.0, 4.5, 9.0]
        keys = ["nontarget"] * 4 + ["target"] * 4 + ["spoof"] * 2
        # target 3 below nontarget 5: EER 1/4 between them; highest rejected score 3, itself accepted
        assert metrics.asv_error_rates(scores, keys) == (0.0, 0.25, 1.0)

    def test_tandem_eer_matches_exhaustive_search(self):
        rng = np.random.default_rng(3)
        scores, labels = two_gaussians(2.0, 150)
        kinds = np.repeat(["target", "nontarget", "spoof"], 60)
        asv = rng.normal(np.repeat([4.0, 0.0, 3.0], 60))
        points = metrics.det_points(scores, labels)
        best = (np.inf, None)
        for threshold in np.unique(asv):
            accepted = [np.mean(asv[kinds == k] >= threshold) for k in ("target", "nontarget", "spoof")]
            miss, non, spoof = 1 - accepted[0], *accepted[1:]
            if not miss < (non + spoof) / 2 or spoof == 0:
                continue
            accept = 1 - points.p_miss
            gap = np.abs(1 - accept * (1 - miss) - (accept * non + points.p_fa * spoof) / 2)
            i = int(np.argmin(gap))
            if accept[i] > 0:
                imbalance = abs(non / spoof - points.p_fa[i] / accept[i])
                best = min(best, (imbalance, spoof * points.p_fa[i]))
        assert metrics.tandem_eer(points, asv, kinds) == pytest.approx(best[1])

    def test_tandem_eer_of_a_perfect_tandem_is_zero(self):
        scores, labels = np.array([0.0, 1.0, 10.0, 11.0]), np.array([0, 0, 1, 1])
        asv, keys = np.array([5.0, 6.0, 0.0, 1.0, 5.5, 6.5]), np.repeat(["target", "nontarget", "spoof"], 2)
        assert metrics.tandem_eer(metrics.det_points(scores, labels), asv, keys) == 0.0

    def test_useless_asv_is_refused(self):
        labels = np.array([0, 1, 0, 1])
        with pytest.raises(ScoreError, match="undefined for this ASV"):
            metrics.min_tdcf_2019([0.0, 1.0, 2.0, 3.0], labels, metrics.AsvRates(0.02, 0.02, 0.0))

    def test_missing_kind_of_asv_trial(self):
        with pytest.raises(ScoreError, match="no nontarget and no spoof"):
            metrics.asv_error_rates([1.0, 2.0], ["target", "target"])


class TestPublishedFiles:
    """All 71,237 LA eval trials; the numbers are those that the systems' authors print."""

    @pytest.mark.parametrize(
        ("name", "higher_is", "eer_percent", "digits", "min_tdcf"),
        [
            ("rawgat_st_mul.LA.eval.txt", "bonafide", 1.06, 2, 0.0335),
            ("lcnn_fusion.LA.eval.csv", "bonafide", 3.0704, 4, None),
            ("air_ocsoftmax.LA.eval.txt", "spoof", 2.178, 3, 0.0558),
        ],
    )
    def test_published(self, reference_data, keys, asv_rates, name, higher_is, eer_percent, digits, min_tdcf):
        scores = read_scores(reference_data / "published_scores" / name, higher_is)
        trials = join_scores(keys, scores)
        score, label = trials["score"].to_numpy(), trials["label"].to_numpy()
        assert round(100 * metrics.compute_eer(score, label).eer, digits) == eer_percent
        assert metrics.compute_eer(score, label).eer == pytest.approx(eer_per_trial(score, label), abs=1e-5)
        if min_tdcf:
            assert round(metrics.min_tdcf_2019(score, label, asv_rates), 4) == min_tdcf

    def test_asv_operating_point(self, asv_rates):
        # printed by the organisers' script from this file: EER 2.4593 %, 23.93 % of spoofs rejected
        assert asv_rates == pytest.approx((0.024581, 0.024605, 0.760652), abs=1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        ("scores", "labels", "text"),
        [
            ([0.0, np.nan, 1.0], [0, 1, 1], "1 of 3 scores are not finite .*position 1.*fp32"),
            ([0.0, 1.0, np.inf], [0, 1, 1], "not finite"),
            ([0.0, 1.0], [1, 1], "2 bona fide and 0 spoof"),
            ([0.0, 1.0], [0, 0], "0 bona fide and 2 spoof"),
            ([0.0, 1.0], [0, 2], "found .*2"),
            ([0.0, 1.0, 2.0], [0, 1], "one length"),
            ([[0.0], [1.0]], [[0], [1]], "two vectors"),
            ([], [], "both classes"),
        ],
    )
    @pytest.mark.parametrize(
        "metric", [metrics.compute_eer, metrics.auc, metrics.cllr, metrics.min_cllr, metrics.min_dcf, metrics.act_dcf]
    )
    def test_refused(self, metric, scores, labels, text):
        with pytest.raises(ScoreError, match=text):
            metric(np.array(scores), np.array(labels))

    @unhurried
    @given(any_trials)
    def test_arguments_are_left_alone(self, data):
        scores, labels = data
        before = scores.copy(), labels.copy()
        metrics.compute_eer(scores, labels)
        metrics.min_cllr(scores, labels)
        assert np.array_equal(scores, before[0]) and np.array_equal(labels, before[1])

    def test_extreme_log_likelihood_ratios_do_not_overflow(self):
        assert metrics.cllr([-1e4, 1e4], [0, 1]) == 0.0
        assert metrics.cllr([1e4, -1e4], [0, 1]) == pytest.approx(1e4 / np.log(2))
