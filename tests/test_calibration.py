"""Calibration against closed forms, decisions against their definition, and what is said on misuse."""

import json
import warnings

import numpy as np
import pytest

from deepfake_utils.conventions import ConfigError, ScoreError
from deepfake_utils.evaluation import calibration, metrics
from deepfake_utils.evaluation.calibration import PRESETS, Calibration, Use, fit_calibration, threshold_for


def two_gaussians(distance, n, seed=0, scale=1.0):
    """n spoof scores at 0 and n bona fide at `distance`, and the log-likelihood ratio of each."""
    labels = np.repeat([0, 1], n)
    scores = np.random.default_rng(seed).normal(distance * labels)
    return scale * scores, labels, distance * scores - distance**2 / 2


class TestLogistic:
    @pytest.mark.parametrize("prior", [0.05, 0.5, 0.9])
    @pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0])
    def test_recovers_the_true_ratio_whatever_prior_and_scale(self, prior, scale):
        scores, labels, truth = two_gaussians(2.0, 40_000, scale=scale)
        fitted = fit_calibration(scores, labels, prior=prior)
        assert fitted.slopes[0] * scale == pytest.approx(2.0, rel=0.05)
        assert fitted.intercept == pytest.approx(-2.0, abs=0.1)
        assert fitted.llr(scores) == pytest.approx(truth, abs=0.5)

    def test_numbers_of_each_class_do_not_matter(self):
        scores, labels, _ = two_gaussians(2.0, 20_000)
        few_spoofs = (labels == 1) | (np.arange(labels.size) % 10 == 0)
        fitted = fit_calibration(scores[few_spoofs], labels[few_spoofs])
        assert (fitted.n_bonafide, fitted.n_spoof) == (20_000, 2_000)
        assert fitted.llr([1.0])[0] == pytest.approx(0.0, abs=0.1)

    def test_fitted_on_dev_it_mends_eval(self):
        dev, dev_labels, _ = two_gaussians(2.5, 5_000, seed=1, scale=0.1)
        scores, labels, _ = two_gaussians(2.5, 5_000, seed=2, scale=0.1)
        llrs = fit_calibration(dev, dev_labels).llr(scores)
        assert metrics.cllr(scores, labels) > 0.85
        assert metrics.cllr(llrs, labels) < metrics.min_cllr(scores, labels) + 0.01
        assert metrics.act_dcf(llrs, labels) < metrics.min_dcf(scores, labels) + 0.02
        assert metrics.compute_eer(llrs, labels).eer == metrics.compute_eer(scores, labels).eer

    def test_separable_classes_give_finite_ratios_that_grow_with_the_evidence(self):
        def largest(n):
            fitted = fit_calibration(np.r_[np.linspace(-2, -1, n), np.linspace(1, 2, n)], np.repeat([0, 1], n))
            return fitted.llr([2.0])[0]

        assert 0 < largest(3) < largest(30) < largest(300) < 20

    def test_constant_scores_say_nothing(self):
        fitted = fit_calibration(np.full(20, 5.0), np.repeat([0, 1], [12, 8]))
        assert fitted.llr([5.0, 9.0]) == pytest.approx([0.0, 0.0], abs=0.1)

    def test_fusion_of_two_systems_beats_either(self):
        rng = np.random.default_rng(4)
        labels = np.repeat([0, 1], 5_000)
        systems = rng.normal(size=(labels.size, 2)) + np.c_[1.5 * labels, 2.0 * labels]
        fitted = fit_calibration(systems, labels)
        # independent unit Gaussians: the true slopes are the distances
        assert fitted.slopes == pytest.approx((1.5, 2.0), abs=0.15)
        fused = metrics.compute_eer(fitted.llr(systems), labels).eer
        assert fused < min(metrics.compute_eer(column, labels).eer for column in systems.T) - 0.03
        with pytest.raises(ScoreError, match="fitted on 2 systems' scores, applied to 1"):
            fitted.llr(systems[:, 0])


class TestIsotonic:
    def test_calibrates_what_no_straight_line_can(self):
        dev, labels, truth = two_gaussians(2.0, 20_000, seed=3)
        bent = np.sign(dev - 1) * np.abs(dev - 1) ** 3
        fitted = {m: fit_calibration(bent, labels, m) for m in ("logistic", "isotonic")}
        cost = {m: metrics.cllr(f.llr(bent), labels) for m, f in fitted.items()}
        assert cost["isotonic"] < metrics.cllr(truth, labels) + 0.01 < cost["logistic"]

    def test_monotone_finite_and_at_least_the_minimum_on_its_own_trials(self):
        scores, labels, _ = two_gaussians(1.5, 300, seed=5)
        fitted = fit_calibration(scores, labels, "isotonic")
        llrs = fitted.llr(np.linspace(-9, 9, 500))
        assert np.all(np.diff(llrs) >= 0) and np.all(np.isfinite(llrs))
        minimum = metrics.min_cllr(scores, labels)
        assert minimum <= metrics.cllr(fitted.llr(scores), labels) <= minimum + 0.02

    def test_prior_does_not_shift_it(self):
        scores, labels, _ = two_gaussians(1.5, 5_000, seed=6)
        a, b = (fit_calibration(scores, labels, "isotonic", prior=p).llr([0.5, 1.0]) for p in (0.2, 0.8))
        assert a == pytest.approx(b, abs=0.02)


class TestStoring:
    @pytest.mark.parametrize("method", calibration.METHODS)
    def test_through_json(self, method):
        scores, labels, _ = two_gaussians(1.0, 50)
        fitted = fit_calibration(scores, labels, method, fitted_on="asvspoof2019_la")
        again = Calibration.from_dict(json.loads(json.dumps(fitted.to_dict())))
        assert again == fitted
        assert np.array_equal(again.llr(scores), fitted.llr(scores))

    @pytest.mark.parametrize("stored", [{"method": "logistic"}, {"x": 1}])
    def test_damaged(self, stored):
        with pytest.raises(ConfigError, match="not a stored calibration"):
            Calibration.from_dict(stored)

    def test_unknown_method(self):
        stored = fit_calibration(*two_gaussians(1.0, 99)[:2]).to_dict() | {"method": "magic"}
        with pytest.raises(ConfigError, match="'magic'; known: logistic, isotonic"):
            Calibration.from_dict(stored)

    def test_use_on_another_corpus_says_so(self):
        fitted = fit_calibration(*two_gaussians(1.0, 99)[:2], fitted_on="asvspoof2019_la")
        with pytest.warns(UserWarning, match="fitted on asvspoof2019_la and is used on in_the_wild"):
            fitted.llr([0.0], corpus="in_the_wild")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted.llr([0.0], corpus="asvspoof2019_la")


class TestDecisions:
    @pytest.mark.parametrize("use", [*PRESETS, Use(0.3, 2, 5)])
    def test_threshold_is_where_both_decisions_cost_the_same(self, use):
        threshold = threshold_for(use)
        use = PRESETS[use] if isinstance(use, str) else use
        odds = np.exp(threshold) * (1 - use.p_spoof) / use.p_spoof  # of bona fide, posterior
        p_bonafide = odds / (1 + odds)
        assert p_bonafide * use.cost_miss == pytest.approx((1 - p_bonafide) * use.cost_fa)

    def test_presets_give_their_reasons_and_differ(self):
        assert all(len(use.reasoning) > 40 for use in PRESETS.values())
        assert threshold_for("content moderation") < threshold_for("call-centre screening") < 0
        assert threshold_for("forensic triage") > 0

    def test_operating_point_on_true_ratios(self):
        _, labels, llrs = two_gaussians(2.0, 4_000, seed=8)
        found = calibration.operating_point(
            llrs, labels, "forensic triage", np.arange(labels.size) % 60, n_bootstrap=100
        )
        assert found["llr_threshold"] == pytest.approx(np.log(20))
        assert (found["p_miss"], found["p_fa"]) == metrics.error_rates(llrs, labels, np.log(20))
        assert found["dcf"] == pytest.approx(found["min_dcf"], abs=0.05)
        assert found["dcf"] >= found["min_dcf"]
        for name in ("p_miss", "p_fa", "dcf", "min_dcf"):
            assert found[f"{name}_ci"][0] < found[name] < found[f"{name}_ci"][1]
        json.dumps(found, allow_nan=False)

    def test_operating_point_without_bootstrap(self):
        _, labels, llrs = two_gaussians(2.0, 50)
        assert calibration.operating_point(llrs, labels, Use(0.5, 1, 1), n_bootstrap=0)["dcf_ci"] is None

    @pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 1, 1), (0.5, 0, 1), (0.5, 1, -1)])
    def test_impossible_use(self, wrong):
        with pytest.raises(ConfigError, match="p_spoof must lie between 0 and 1"):
            Use(*wrong)

    def test_unknown_use(self):
        with pytest.raises(ConfigError, match="'karaoke'; known: asvspoof5, call-centre"):
            threshold_for("karaoke")


class TestReliability:
    @pytest.mark.parametrize("prior", [0.2, 0.5])
    def test_true_ratios_lie_on_the_diagonal(self, prior):
        _, labels, llrs = two_gaussians(1.5, 30_000, seed=9)
        table = calibration.reliability(llrs, labels, prior=prior, n_bins=10)
        assert len(table) == 10
        assert table["n_bonafide"].sum() == table["n_spoof"].sum() == 30_000
        assert np.all(np.diff(table["predicted"]) > 0)
        assert table["observed"].to_numpy() == pytest.approx(table["predicted"].to_numpy(), abs=0.03)

    def test_overconfidence_shows(self):
        _, labels, llrs = two_gaussians(1.5, 5_000, seed=10)
        table = calibration.reliability(3 * llrs, labels)
        lowest, highest = table.iloc[0], table.iloc[-1]
        assert lowest["predicted"] < lowest["observed"] and highest["predicted"] > highest["observed"]

    def test_few_trials_and_ties(self):
        table = calibration.reliability([0.0, 0.0, 0.0, 1.0], [0, 1, 0, 1], n_bins=15)
        assert table[["n_bonafide", "n_spoof"]].to_numpy().sum() == 4


class TestRefusals:
    scores, labels, _ = two_gaussians(1.0, 20)

    def test_scores_that_point_the_wrong_way(self):
        scores, labels, _ = two_gaussians(1.0, 100)
        for method in calibration.METHODS:
            with pytest.warns(UserWarning, match="higher scores are rather spoof.*higher_is='spoof'"):
                fit_calibration(-scores, labels, method)

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"method": "platt"}, ConfigError, "'platt'; known: logistic, isotonic"),
            ({"prior": 0.0}, ConfigError, "between 0 and 1, got 0.0"),
            ({"prior": 5}, ConfigError, "between 0 and 1, got 5"),
            ({"labels": np.ones(40, int)}, ScoreError, "both classes"),
            ({"scores": np.full(40, np.nan)}, ScoreError, "not finite"),
            ({"scores": np.zeros((40, 2)), "method": "isotonic"}, ConfigError, "one system"),
        ],
    )
    def test_bad_input(self, change, error, text):
        with pytest.raises(error, match=text):
            fit_calibration(**{"scores": self.scores, "labels": self.labels} | change)
