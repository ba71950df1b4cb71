"""evaluate: from files to stable names; breakdowns add up; every doubtful input is refused or said."""

import json
import sys
import warnings

import numpy as np
import pandas as pd
import pytest

from deepfake_utils.conventions import ConfigError, CorpusError, ScoreError
from deepfake_utils.evaluation import metrics
from deepfake_utils.evaluation.evaluate import evaluate

STABLE_NAMES = set(
    """
    eer eer_ci eer_threshold min_tdcf min_tdcf_ci min_tdcf_revised min_tdcf_revised_ci tandem_eer min_dcf min_dcf_ci
    act_dcf cllr min_cllr auc accuracy threshold threshold_source p_miss p_fa n_bonafide n_spoof n_speakers
    per_attack bonafide_share_of_errors by phase higher_is score_dialect confidence n_bootstrap seed bootstrap_unit
    score_kind warnings
    """.split()  # noqa: SIM905, one name a line would hide the list
)


@pytest.fixture
def trials():
    """600 trials of 10 speakers: attack A07 hard, A08 easy; two codecs; two phases; scores not tied."""
    rng = np.random.default_rng(0)
    attack = np.repeat(["-", "A07", "A08"], 200)
    frame = pd.DataFrame(
        {
            "utterance": [f"LA_E_{i:04d}" for i in range(600)],
            "label": (attack == "-").astype(np.int64),
            "attack": attack,
            "speaker": [f"LA_{i % 10:04d}" for i in range(600)],
            "codec": np.where(np.arange(600) % 3, "none", "alaw"),
            "phase": np.where(np.arange(600) % 4, "eval", "progress"),
            "duration_s": rng.uniform(1, 8, 600),
        }
    )
    return frame.assign(score=rng.normal(np.repeat([3.0, 1.5, -1.0], 200)))


@pytest.fixture
def protocol(trials):
    return trials.drop(columns=["score", "phase"])


@pytest.fixture
def scores(trials):
    return trials[["utterance", "score"]].sample(frac=1, random_state=0)


@pytest.fixture
def asv():
    rng = np.random.default_rng(1)
    key = np.repeat(["target", "nontarget", "spoof"], [300, 300, 400])
    attack = np.r_[np.full(600, "-"), np.repeat(["A07", "A08"], 200)]
    score = rng.normal(np.repeat([4.0, 0.0, 3.0], [300, 300, 400]))
    return pd.DataFrame({"attack": attack, "key": key, "score": score})


def test_every_stable_name_and_nothing_that_json_cannot_hold(scores, protocol, asv):
    full = evaluate(scores, protocol, asv, by=["codec", "speaker"], n_bootstrap=50)
    assert set(full) == STABLE_NAMES
    assert (
        set(evaluate(scores[["utterance", "score"]], protocol[["utterance", "label"]], n_bootstrap=0)) == STABLE_NAMES
    )
    assert json.loads(json.dumps(full.to_dict(), allow_nan=False)) == full
    assert full["warnings"] == []


def test_figures_are_those_of_the_metrics(trials, scores, protocol, asv):
    score, label = trials["score"].to_numpy(), trials["label"].to_numpy()
    found = evaluate(scores, protocol, asv, n_bootstrap=0)
    rates = metrics.asv_error_rates(asv["score"], asv["key"])
    assert (found["eer"], found["eer_threshold"]) == metrics.compute_eer(score, label)
    assert found["min_tdcf"] == metrics.min_tdcf_2019(score, label, rates)
    assert found["min_tdcf_revised"] == metrics.min_tdcf_2021(score, label, rates)
    for name in ("min_dcf", "act_dcf", "cllr", "min_cllr", "auc"):
        assert found[name] == getattr(metrics, name)(score, label)
    assert found["accuracy"] == metrics.accuracy(score, label, found["threshold"])
    assert found["threshold"] == found["eer_threshold"]
    assert (found["n_bonafide"], found["n_spoof"], found["n_speakers"]) == (200, 400, 10)
    assert found["tandem_eer"] > found["eer"] / 2


def test_as_many_speakers_as_asvspoof5_make_one_table():
    n = 2 * 737
    keys = pd.DataFrame({"utterance": [f"E_{i:010d}" for i in range(n)], "label": np.arange(n) % 2})
    keys["speaker"] = [f"E_{i // 2:04d}" for i in range(n)]
    scores = keys[["utterance"]].assign(score=np.random.default_rng(0).normal(keys["label"]))
    assert len(evaluate(scores, keys, by="speaker", n_bootstrap=0)["by"]["speaker"]) == 737


def test_published_scores_from_their_files(reference_data):
    """The whole of it on RawGAT-ST: 1.06 % and 0.0335, and who commits the errors."""
    folder = reference_data / "published_scores"
    asv = (
        reference_data / "asvspoof2019_subset/LA/ASVspoof2019_LA_asv_scores/ASVspoof2019.LA.asv.eval.gi.trl.scores.txt"
    )
    found = evaluate(
        folder / "rawgat_st_mul.LA.eval.txt", folder / "ASVspoof2019.LA.cm.eval.trl.txt", asv, n_bootstrap=40
    )
    assert round(100 * found["eer"], 2) == 1.06
    assert round(found["min_tdcf"], 4) == 0.0335
    assert (found["n_bonafide"], found["n_spoof"], found["n_speakers"]) == (7_355, 63_882, 67)
    assert list(found["per_attack"]) == [f"A{i:02d}" for i in range(7, 20)]
    assert {row["n"] for row in found["per_attack"].values()} == {4_914}
    worst = max(found["per_attack"], key=lambda a: found["per_attack"][a]["share_of_errors"])
    assert worst == "A18"
    assert found["eer_ci"][0] < found["eer"] < found["eer_ci"][1]
    assert found["bootstrap_unit"] == "speaker"
    assert found["warnings"] == []


class TestIntervals:
    def test_clustered_by_speaker_and_reproducible(self, scores, protocol, asv):
        first = evaluate(scores, protocol, asv, n_bootstrap=60, seed=1)
        assert first == evaluate(scores, protocol, asv, n_bootstrap=60, seed=1)
        assert first["eer_ci"] != evaluate(scores, protocol, asv, n_bootstrap=60, seed=2)["eer_ci"]
        assert first["bootstrap_unit"] == "speaker"
        for name in ("eer", "min_dcf", "min_tdcf", "min_tdcf_revised"):
            low, high = first[f"{name}_ci"]
            assert low < first[name] < high

    @pytest.mark.parametrize("unknown", ["-", "", None, np.nan])
    def test_unknown_speakers_fall_back_to_trials_and_say_so(self, scores, protocol, unknown):
        protocol["speaker"] = protocol["speaker"].astype(object)
        protocol.loc[:4, "speaker"] = unknown
        with pytest.warns(UserWarning, match="speaker of 5 of 600 trials is not known.*too narrow"):
            found = evaluate(scores, protocol, n_bootstrap=20)
        assert found["bootstrap_unit"] == "trial"
        assert len(found["warnings"]) == 1

    def test_no_speaker_column_or_one_speaker(self, scores, protocol):
        with pytest.warns(UserWarning, match="600 of 600"):
            assert evaluate(scores, protocol.drop(columns="speaker"), n_bootstrap=20)["n_speakers"] is None
        with pytest.warns(UserWarning, match="a single speaker"):
            evaluate(scores, protocol.assign(speaker="LJ"), n_bootstrap=20)

    def test_none_asked_for(self, scores, protocol):
        found = evaluate(scores, protocol.drop(columns="speaker"), n_bootstrap=0)
        assert found["eer_ci"] is found["min_tdcf_ci"] is found["bootstrap_unit"] is None
        assert found["warnings"] == []


class TestBreakdowns:
    def test_tdcf_of_an_attack_is_that_of_a_corpus_with_this_attack_only(self, trials, protocol, asv):
        found = evaluate(trials[["utterance", "score"]], protocol, asv, n_bootstrap=0)
        alone = trials[trials["attack"] != "A08"]
        met = asv[asv["attack"] != "A08"]
        scores = alone[["utterance", "score"]]
        expected = evaluate(scores, alone.drop(columns="score"), met, n_bootstrap=0)["min_tdcf"]
        assert found["per_attack"]["A07"]["min_tdcf"] == expected != found["min_tdcf"]
        without = evaluate(trials[["utterance", "score"]], protocol, n_bootstrap=0)
        assert without["per_attack"]["A07"]["min_tdcf"] is None

    def test_per_attack(self, trials, scores, protocol):
        found = evaluate(scores, protocol, n_bootstrap=30, attack_intervals=True)
        for attack, row in found["per_attack"].items():
            chosen = trials[trials["attack"].isin(["-", attack])]
            assert row["n"] == 200
            assert row["eer"] == metrics.compute_eer(chosen["score"], chosen["label"]).eer
            assert row["eer_ci"][0] <= row["eer"] <= row["eer_ci"][1]
        assert found["per_attack"]["A07"]["eer"] > found["per_attack"]["A08"]["eer"]
        shares = [row["share_of_errors"] for row in found["per_attack"].values()]
        assert sum(shares) + found["bonafide_share_of_errors"] == pytest.approx(1)

    def test_shares_at_a_given_threshold(self, trials, scores, protocol):
        found = evaluate(scores, protocol, threshold=-100.0, n_bootstrap=0)  # accepts everything
        assert found["threshold_source"] == "given"
        assert (found["p_miss"], found["p_fa"], found["bonafide_share_of_errors"]) == (0.0, 1.0, 0.0)
        assert {row["share_of_errors"] for row in found["per_attack"].values()} == {0.5}
        assert found["accuracy"] == pytest.approx(1 / 3)

    def test_no_errors_no_shares(self, protocol):
        perfect = protocol[["utterance"]].assign(score=protocol["label"] + np.linspace(0, 0.5, 600))
        found = evaluate(perfect, protocol, n_bootstrap=0)
        assert found["eer"] == 0.0
        assert found["bonafide_share_of_errors"] is None

    def test_by_a_column_with_both_classes(self, trials, scores, protocol):
        rows = evaluate(scores, protocol, by="codec", n_bootstrap=0)["by"]["codec"]
        for codec, row in rows.items():
            chosen = trials[trials["codec"] == codec]
            assert row["against"] == "its own trials"
            assert row["eer"] == metrics.compute_eer(chosen["score"], chosen["label"]).eer
        assert sum(row["n_bonafide"] + row["n_spoof"] for row in rows.values()) == 600

    def test_by_a_column_with_one_class(self, scores, protocol):
        found = evaluate(scores, protocol, by="attack", n_bootstrap=0)
        rows = found["by"]["attack"]
        assert rows["A07"]["against"] == "all bona fide"
        assert rows["A07"]["eer"] == found["per_attack"]["A07"]["eer"]
        assert (rows["-"]["against"], rows["-"]["eer"]) == ("all spoof", found["eer"])
        assert (rows["-"]["p_fa"], rows["A07"]["p_miss"]) == (None, None)

    def test_by_a_measured_quantity_goes_by_quartiles(self, scores, protocol):
        rows = evaluate(scores, protocol, by="duration_s", n_bootstrap=0)["by"]["duration_s"]
        assert [row["n_bonafide"] + row["n_spoof"] for row in rows.values()] == [150] * 4
        assert list(rows)[0].startswith("(1.0")

    def test_by_a_column_with_gaps_loses_no_trial(self, scores, protocol):
        protocol["codec"] = protocol["codec"].mask(np.arange(600) % 7 == 0)
        rows = evaluate(scores, protocol, by="codec", n_bootstrap=0)["by"]["codec"]
        assert list(rows) == ["alaw", "none", "missing"]
        assert sum(row["n_bonafide"] + row["n_spoof"] for row in rows.values()) == 600

    def test_by_what_is_not_there_or_too_much(self, scores, protocol, monkeypatch):
        monkeypatch.setattr(sys.modules[evaluate.__module__], "MAX_GROUPS", 500)
        with pytest.raises(ConfigError, match="by='codek' is no column .*codec"):
            evaluate(scores, protocol, by="codek", n_bootstrap=0)
        with pytest.raises(ConfigError, match="600 values"):
            evaluate(scores, protocol, by="utterance", n_bootstrap=0)

    def test_phase(self, trials, scores):
        protocol = trials.drop(columns="score")
        of_phase = trials[trials["phase"] == "progress"]
        found = evaluate(scores, protocol, phase="progress", n_bootstrap=0)
        assert found["n_bonafide"] + found["n_spoof"] == len(of_phase)
        assert found["eer"] == metrics.compute_eer(of_phase["score"], of_phase["label"]).eer
        alone = scores[scores["utterance"].isin(of_phase["utterance"])]  # scored that phase only
        assert evaluate(alone, protocol, phase="progress", n_bootstrap=0)["eer"] == found["eer"]
        with pytest.raises(ScoreError, match="have no score"):
            evaluate(alone, protocol, n_bootstrap=0)
        with pytest.raises(ConfigError, match="no trial of phase 'hidden'.*eval, progress"):
            evaluate(scores, protocol, phase="hidden", n_bootstrap=0)
        with pytest.raises(ConfigError, match="needs a `phase` column"):
            evaluate(scores, protocol.drop(columns="phase"), phase="eval", n_bootstrap=0)


class TestDoubtfulInput:
    def test_wrong_direction_names_the_flag(self, scores, protocol):
        with pytest.warns(UserWarning, match=r"above 50 %.*--higher-is spoof .*higher_is='spoof'"):
            found = evaluate(scores.assign(score=-scores["score"]), protocol, n_bootstrap=0)
        assert found["eer"] > 0.5
        assert "labels are exchanged" in found.warnings[0] and "--one-is spoof" in found.warnings[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            turned = evaluate(scores.assign(score=-scores["score"]), protocol, higher_is="spoof", n_bootstrap=0)
        assert turned["eer"] == pytest.approx(1 - found["eer"], abs=5e-3)
        assert turned["higher_is"] == "spoof"

    def test_the_result_knows_the_direction_of_what_was_evaluated(self, trials, scores, protocol):
        turned = evaluate(scores.assign(score=-scores["score"]), protocol, higher_is="spoof", n_bootstrap=0)
        again = metrics.compute_eer(turned.trials["score"], turned.trials["label"])
        assert (again.eer, again.threshold) == (turned.eer, turned.eer_threshold)
        assert turned.trials["utterance"].tolist() == protocol["utterance"].tolist()

    def test_a_score_column_in_the_protocol_plays_no_part(self, trials, scores, protocol):
        stale = protocol.assign(score=-trials["score"])
        assert evaluate(scores, stale, n_bootstrap=0)["eer"] == evaluate(scores, protocol, n_bootstrap=0)["eer"]

    def test_pooled_phases_are_said(self, trials, scores):
        with pytest.warns(UserWarning, match=r"phases are pooled here \(150 progress, 450 eval\).*--phase eval"):
            evaluate(scores, trials.drop(columns="score"), n_bootstrap=0)

    @pytest.mark.parametrize(("label", "name"), [(1, "bona fide"), (0, "spoof")])
    def test_one_trial_of_a_class_gives_figures_without_intervals(self, trials, scores, label, name):
        few = pd.concat([trials[trials["label"] == label][:1], trials[trials["label"] != label][:8]])
        with pytest.warns(UserWarning, match=f"no intervals: there is a single {name} trial"):
            found = evaluate(few[["utterance", "score"]], few[["utterance", "label", "attack"]], attack_intervals=True)
        assert found["eer"] is not None and len(found.warnings) == 1
        assert found["eer_ci"] is found["bootstrap_unit"] is found["min_dcf_ci"] is None
        assert all(row["eer_ci"] is None for row in found["per_attack"].values())

    def test_a_file_of_exchanged_labels_is_refused_or_said(self, tmp_path, trials, scores):
        keys = tmp_path / "keys.csv"
        trials.assign(label=1 - trials["label"])[["utterance", "label"]].to_csv(keys, index=False)
        with pytest.raises(CorpusError, match="line 2: the label '0' is ambiguous.*--one-is bonafide or spoof"):
            evaluate(scores, keys)
        expected = metrics.compute_eer(trials["score"], trials["label"]).eer
        found = evaluate(scores, keys, one_is="spoof", n_bootstrap=0)
        assert (found["eer"], found["n_bonafide"]) == (expected, 200)
        with pytest.raises(ConfigError, match="one_is must be"):
            evaluate(scores, keys, one_is="fake")

    def test_repeated_lines_are_counted_once_and_said(self, tmp_path, trials, protocol):
        file = tmp_path / "scores.csv"
        pd.concat([trials, trials[:3]])[["utterance", "score"]].to_csv(file, index=False)
        with pytest.warns(UserWarning, match="3 lines repeat a trial with the same score, the first on line 602"):
            found = evaluate(file, protocol, n_bootstrap=0)
        assert found["n_bonafide"] + found["n_spoof"] == 600

    def test_wrongly_flipped_names_the_other_flag(self, scores, protocol):
        with pytest.warns(UserWarning, match="--higher-is bonafide"):
            evaluate(scores, protocol, higher_is="spoof", n_bootstrap=0)

    def test_hard_decisions(self, scores, protocol):
        with pytest.raises(ScoreError, match="take two values only, 0 and 1: these are decisions"):
            evaluate(scores.assign(score=(scores["score"] > 1).astype(float)), protocol, n_bootstrap=0)

    def test_frame_with_paths(self, scores, protocol):
        paths = scores.assign(path="/x/" + scores["utterance"] + ".flac").drop(columns="utterance")
        assert evaluate(paths, protocol, n_bootstrap=0)["eer"] == evaluate(scores, protocol, n_bootstrap=0)["eer"]

    def test_constant_scores_are_half_wrong(self, scores, protocol):
        assert evaluate(scores.assign(score=0.0), protocol, n_bootstrap=0)["eer"] == 0.5

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_not_finite(self, scores, protocol, bad):
        scores.iloc[3, 1] = bad
        with pytest.raises(ScoreError, match="1 of 600 scores are not finite"):
            evaluate(scores, protocol, n_bootstrap=0)

    def test_one_class(self, scores, protocol):
        with pytest.raises(ScoreError, match="200 bona fide and 0 spoof"):
            evaluate(scores[scores["utterance"] < "LA_E_0200"], protocol[:200], n_bootstrap=0)

    def test_missing_and_extra_trials(self, scores, protocol):
        with pytest.raises(ScoreError, match="have no score"):
            evaluate(scores[1:], protocol, n_bootstrap=0)
        with pytest.raises(ScoreError, match="belong to no trial"):
            evaluate(scores, protocol[1:], n_bootstrap=0)

    def test_asv_scores_of_another_split(self, scores, protocol, asv):
        dev = asv.assign(attack=asv["attack"].replace({"A07": "A01", "A08": "A02"}))
        with pytest.raises(ScoreError, match="another split or corpus: .*A07, A08, .*A01, A02"):
            evaluate(scores, protocol, dev, n_bootstrap=0)

    def test_asv_scores_of_a_smaller_corpus(self, scores, protocol, asv):
        with pytest.warns(UserWarning, match="A08 has 200 trials in the protocol but only 150"):
            evaluate(scores, protocol, asv[:-50], n_bootstrap=0)

    def test_asv_scores_that_cannot_be_told(self, scores, protocol, asv):
        with pytest.warns(UserWarning, match="names no attacks"):
            evaluate(scores, protocol.assign(attack="-"), asv, n_bootstrap=0)

    def test_a_subset_of_the_protocol_is_no_other_split(self, scores, protocol, asv):
        few = protocol[protocol["attack"] != "A08"]
        found = evaluate(scores[scores["utterance"].isin(few["utterance"])], few, asv, n_bootstrap=0)
        assert found["min_tdcf"] is not None and found["warnings"] == []

    def test_direction_asked_twice_differently(self, tmp_path, scores, protocol):
        from deepfake_utils.evaluation.scorefile import read_scores, write_scores

        read = read_scores(write_scores(tmp_path / "s.csv", scores))
        assert evaluate(read, protocol, n_bootstrap=0)["score_dialect"] == "comma, header: utterance score"
        with pytest.raises(ConfigError, match="read with higher_is='bonafide', now 'spoof'"):
            evaluate(read, protocol, higher_is="spoof", n_bootstrap=0)
        with pytest.raises(ConfigError, match="got 'better'"):
            evaluate(scores, protocol, higher_is="better", n_bootstrap=0)

    def test_arguments_are_left_alone(self, scores, protocol, asv):
        before = [frame.copy() for frame in (scores, protocol, asv)]
        evaluate(scores, protocol, asv, by="codec", higher_is="bonafide", n_bootstrap=10)
        for frame, was in zip((scores, protocol, asv), before, strict=True):
            pd.testing.assert_frame_equal(frame, was)
