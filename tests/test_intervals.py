"""Bootstrap intervals: coverage on simulated speakers, what is resampled, reproducibility, refusals."""

import numpy as np
import pytest
from scipy.stats import norm

from deepfake_utils.conventions import ConfigError, ScoreError
from deepfake_utils.evaluation import intervals, metrics


def simulated_speakers(rng, n_speakers, n_trials, *, distance=2.5, spread=0.7):
    """Scores of n_trials of each class per speaker, every speaker's voice easy or hard in both; true EER known."""
    speakers = np.tile(np.repeat(np.arange(n_speakers), n_trials), 2)
    labels = np.repeat([1, 0], n_speakers * n_trials)
    offsets = rng.normal(0, spread, (2, n_speakers))
    scores = distance * labels + offsets[labels, speakers] + rng.normal(size=speakers.size)
    return scores, labels, speakers, norm.cdf(-distance / 2 / np.sqrt(1 + spread**2))


def quiet_bootstrap(*args, **settings):
    return intervals.bootstrap(intervals.eer_metric, *args, progress=False, **settings)


def test_coverage_is_right_by_speaker_and_wrong_by_trial():
    rng = np.random.default_rng(1)
    n, by_speaker, by_trial = 200, 0, 0
    for i in range(n):
        scores, labels, speakers, truth = simulated_speakers(rng, 48, 8)
        found = quiet_bootstrap(scores, labels, speakers, n=150, seed=i)
        by_speaker += found.low <= truth <= found.high
        if i % 5 == 0:
            found = quiet_bootstrap(scores, labels, None, n=150, seed=i)
            by_trial += found.low <= truth <= found.high
    assert 0.93 <= by_speaker / n <= 0.97
    assert by_trial / (n / 5) < 0.90


def test_interval_of_the_mean_is_the_textbook_one():
    """For a mean over clusters of one size, Student's interval is known: the widened percentiles come to it."""
    rng = np.random.default_rng(0)
    effects = rng.normal(size=12)
    scores = np.concatenate([effects, np.zeros(12)])
    labels, speakers = np.repeat([1, 0], 12), np.tile(np.arange(12), 2)

    def mean_bonafide(scores, labels):
        return scores[labels == 1].mean()

    found = intervals.bootstrap(mean_bonafide, scores, labels, speakers, n=20_000, progress=False)
    half_width = 2.201 * effects.std(ddof=1) / np.sqrt(12)  # Student's t, 11 degrees of freedom, 97.5 %
    assert found.value == pytest.approx(effects.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half_width, rel=0.05)


def test_a_replicate_repeats_whole_speakers():
    scores, labels, speakers, _ = simulated_speakers(np.random.default_rng(2), 6, 5)
    seen = []

    def spy(scores, labels):
        seen.append((scores, labels))
        return metrics.compute_eer(scores, labels).eer

    found = intervals.bootstrap(spy, scores, labels, speakers, n=50, progress=False)
    assert found.value == metrics.compute_eer(scores, labels).eer
    multiplicities = set()
    for drawn_scores, drawn_labels in seen[1:]:
        assert np.all(np.diff(drawn_scores) >= 0)
        times = np.array(
            [np.sum((drawn_scores == s) & (drawn_labels == c)) for s, c in zip(scores, labels, strict=True)]
        )
        of_speaker = [set(times[speakers == k]) for k in range(6)]
        assert all(len(counts) == 1 for counts in of_speaker)  # all trials of a speaker alike
        assert sum(counts.pop() for counts in of_speaker) == 6
        multiplicities.add(tuple(times))
    assert len(multiplicities) > 40


def test_same_seed_same_interval_and_another_seed_another():
    scores, labels, speakers, _ = simulated_speakers(np.random.default_rng(3), 10, 10)
    first, again, other = (quiet_bootstrap(scores, labels, speakers, n=50, seed=s) for s in (5, 5, 6))
    assert first == again
    assert first != other
    names = np.array([f"LA_{s:04d}" for s in speakers])
    assert quiet_bootstrap(scores, labels, names, n=50, seed=5) == first


def test_order_of_trials_does_not_matter():
    scores, labels, speakers, _ = simulated_speakers(np.random.default_rng(4), 10, 10)
    shuffled = np.random.default_rng(0).permutation(scores.size)
    assert quiet_bootstrap(scores[shuffled], labels[shuffled], speakers[shuffled], n=50) == quiet_bootstrap(
        scores, labels, speakers, n=50
    )


def test_wider_with_more_confidence_and_with_fewer_speakers():
    scores, labels, speakers, _ = simulated_speakers(np.random.default_rng(5), 40, 10)

    def width(found):
        return found.high - found.low

    usual = quiet_bootstrap(scores, labels, speakers, n=400)
    assert width(quiet_bootstrap(scores, labels, speakers, n=400, confidence=0.99)) > width(usual)
    assert width(quiet_bootstrap(scores, labels, speakers // 8, n=400)) > width(usual)


def test_several_metrics_share_their_replicates():
    scores, labels, speakers, _ = simulated_speakers(np.random.default_rng(6), 12, 10)

    def both(scores, labels):
        return [metrics.compute_eer(scores, labels).eer, metrics.auc(scores, labels)]

    found = intervals.bootstrap(both, scores, labels, speakers, n=60, progress=False)
    alone = quiet_bootstrap(scores, labels, speakers, n=60)
    assert (found.value[0], found.low[0], found.high[0]) == alone
    assert found.low[1] < found.value[1] < found.high[1]


class TestPairedDifference:
    def test_common_difficulty_cancels(self):
        rng = np.random.default_rng(7)
        scores, labels, speakers, _ = simulated_speakers(rng, 40, 10, spread=1.5)
        better = scores + 0.4 * labels
        found = intervals.paired_difference(
            intervals.eer_metric, scores, better, labels, speakers, n=300, progress=False
        )
        single = quiet_bootstrap(scores, labels, speakers, n=300)
        assert 0 < found.low < found.value < found.high
        assert found.high - found.low < 0.5 * (single.high - single.low)
        assert found.value == pytest.approx(
            metrics.compute_eer(scores, labels).eer - metrics.compute_eer(better, labels).eer
        )

    def test_equal_systems_differ_by_nothing(self):
        scores, labels, speakers, _ = simulated_speakers(np.random.default_rng(8), 10, 10)
        found = intervals.paired_difference(
            intervals.eer_metric, scores, np.exp(scores), labels, speakers, n=30, progress=False
        )
        assert found == (0.0, 0.0, 0.0)

    def test_turning_the_systems_round_turns_the_interval_round(self):
        rng = np.random.default_rng(9)
        scores, labels, speakers, _ = simulated_speakers(rng, 10, 10)
        other = scores + rng.normal(size=scores.size)
        there, back = (
            intervals.paired_difference(intervals.eer_metric, a, b, labels, speakers, n=99, progress=False)
            for a, b in ((scores, other), (other, scores))
        )
        assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_rare_class_is_drawn_again_until_it_is_there():
    scores = np.r_[np.zeros(30), [1.0, 1.0]] + np.arange(32) / 100
    labels = np.r_[np.zeros(30, int), [1, 1]]
    found = quiet_bootstrap(scores, labels, np.arange(32), n=200)  # about one draw in eight holds no bona fide
    assert found == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "mean", "sd"), [([0.02, 0.04], 0.03, 0.02 / np.sqrt(2)), ([1.0, 2.0, 3.0], 2.0, 1.0)]
)
def test_several_seeds(values, mean, sd):
    summary = intervals.several_seeds(values)
    assert summary.mean == pytest.approx(mean) and summary.sd == pytest.approx(sd)
    assert summary.values == tuple(values)


def test_one_seed_has_no_spread():
    assert np.isnan(intervals.several_seeds([0.5]).sd)


class TestRefusals:
    scores, labels = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 1, 0, 1])

    @pytest.mark.parametrize(
        ("clusters", "settings", "error", "text"),
        [
            (["a", "a", "a", "a"], {}, ScoreError, "belong to one speaker"),
            (["a", "b", "c", "b"], {}, ScoreError, "all bona fide trials belong to one speaker"),
            (["a", "b", "a", "c"], {}, ScoreError, "all spoof trials belong to one speaker"),
            (["a", "b"], {}, ScoreError, "4 trials but 2 clusters"),
            (None, {"n": 1}, ConfigError, "at least 2"),
            (None, {"confidence": 95}, ConfigError, "fraction between 0 and 1, got 95"),
        ],
    )
    def test_bootstrap(self, clusters, settings, error, text):
        with pytest.raises(error, match=text):
            quiet_bootstrap(self.scores, self.labels, clusters, **{"n": 20} | settings)

    def test_no_seeds(self):
        with pytest.raises(ScoreError, match="one finite value per seed"):
            intervals.several_seeds([])
        with pytest.raises(ScoreError, match="nan"):
            intervals.several_seeds([0.1, float("nan")])
