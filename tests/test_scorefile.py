"""Score files: every dialect read, what is written comes back, and every fault named with its place."""

import gzip
import json
import os

import numpy as np
import pandas as pd
import pytest

from deepfake_utils.conventions import DeepfakeUtilsError, ScoreError
from deepfake_utils.evaluation import scorefile
from deepfake_utils.protocols import read_keys

NAMES = ["LA_E_1", "LA_E_2", "LA_E_3"]
SCORES = [1.5, -2.25, 1e-05]
DIALECTS = {
    "utt score": "LA_E_1 1.5\nLA_E_2 -2.25\nLA_E_3 1e-05\n",
    "utt key score": "LA_E_1 bonafide 1.5\nLA_E_2 spoof -2.25\nLA_E_3 spoof 1e-05\n",
    "utt attack key score": "LA_E_1 - bonafide 1.5\nLA_E_2 A07 spoof -2.25\nLA_E_3 A08 spoof 1e-05\n",
    "aligned with spaces": "LA_E_1      1.5\n  LA_E_2   -2.25\nLA_E_3 1e-05",
    "csv, no header": "LA_E_1,1.5\nLA_E_2,-2.25\nLA_E_3,1e-05\n",
    "csv, no header, four columns": "LA_E_1,-,bonafide,1.5\nLA_E_2,A07,spoof,-2.25\nLA_E_3,A08,spoof,1e-05\n",
    "csv, header": "utterance,score\nLA_E_1,1.5\nLA_E_2,-2.25\nLA_E_3,1e-05\n",
    "csv, header, other order": "Score,label,Filename\n1.5,real,LA_E_1\n-2.25,Fake,LA_E_2\n1e-05,fake,LA_E_3\n",
    "csv, quoted": '"utterance","score"\n"LA_E_1","1.5"\n"LA_E_2","-2.25"\n"LA_E_3","1e-05"\n',
    "asvspoof 5": "filename\tcm-score\nLA_E_1\t1.5\nLA_E_2\t-2.25\nLA_E_3\t1e-05\n",
    "asvspoof 5, track 2": (
        "spk\tfilename\tcm-score\tasv-score\nE_1\tLA_E_1\t1.5\t0\nE_1\tLA_E_2\t-2.25\t0\nE_2\tLA_E_3\t1e-05\t0\n"
    ),
    "tab, no header": "LA_E_1\t1.5\nLA_E_2\t-2.25\nLA_E_3\t1e-05\n",
    "paths": (
        "path,score,logit_spoof\n/data/my clips/LA_E_1.flac,1.5,0.5\nLA_E_2.wav,-2.25,0.5\nC:\\x\\LA_E_3.mp3,1e-05,1\n"
    ),
    "utt score key": "LA_E_1 1.5 bonafide\nLA_E_2 -2.25 spoof\nLA_E_3 1e-05 spoof\n",
    "csv, no header, key last": "LA_E_1,1.5,Real\nLA_E_2,-2.25,fake\nLA_E_3,1e-05,fake\n",
    "semicolons": "utterance;score\nLA_E_1;1.5\nLA_E_2;-2.25\nLA_E_3;1e-05\n",
    "semicolons and decimal commas": "Datei;Score;utt\nx;1,5;LA_E_1\nx;-2,25;LA_E_2\nx;1e-05;LA_E_3\n",
    "semicolons and decimal commas, no header": "LA_E_1;1,5\nLA_E_2;-2,25\nLA_E_3;0,00001\n",
    "spaces and decimal commas": "LA_E_1 1,5\nLA_E_2 -2,25\nLA_E_3 0,00001\n",
    "a file column with paths": "file,score\nwavs/a/LA_E_1.wav,1.5\nwavs/b/LA_E_2.wav,-2.25\nwavs/LA_E_3.wav,1e-05\n",
    "old Mac line ends": "LA_E_1 1.5\rLA_E_2 -2.25\rLA_E_3 1e-05\r",
    "windows, byte order mark, blank lines, comments": (
        "\ufeff# by us\r\n\r\nLA_E_1 1.5\r\nLA_E_2 -2.25\r\n \r\nLA_E_3 1e-05\r\n"
    ),
}


@pytest.fixture
def protocol():
    return pd.DataFrame(
        {"utterance": NAMES, "label": [1, 0, 0], "attack": ["-", "A07", "A08"], "speaker": ["a", "b", "a"]}
    )


def write(folder, text, name="scores.txt"):
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


class TestDialects:
    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_read(self, tmp_path, dialect):
        found = scorefile.read_scores(write(tmp_path, DIALECTS[dialect]))
        assert found.frame["utterance"].tolist() == NAMES
        assert found.frame["score"].tolist() == SCORES
        if "key" in found.frame:
            assert found.frame["key"].tolist() == ["bonafide", "spoof", "spoof"]
        if "attack" in found.frame:
            assert found.frame["attack"].tolist() == ["-", "A07", "A08"]

    @pytest.mark.parametrize("packed", ["utf-8-sig", "utf-16", "gzip", "gzip of utf-16"])
    @pytest.mark.parametrize("dialect", ["utt key score", "csv, header", "tab, no header"])
    def test_text_however_it_is_packed(self, tmp_path, dialect, packed):
        content = DIALECTS[dialect].encode(packed.split()[-1] if packed != "gzip" else "utf-8")
        path = tmp_path / "scores"
        path.write_bytes(gzip.compress(content) if "gzip" in packed else content)
        assert scorefile.read_scores(path).frame["score"].tolist() == SCORES

    @pytest.mark.parametrize("text", ["LA_E_1 1 1.5\nLA_E_2 0 2\n", "LA_E_1 1.5 1\nLA_E_2 2.5 0\n"])
    def test_a_number_as_key_is_refused_or_said(self, tmp_path, text):
        with pytest.raises(ScoreError, match="line 1: the label '1' is ambiguous.*--one-is"):
            scorefile.read_scores(write(tmp_path, text))
        found = scorefile.read_scores(write(tmp_path, text), one_is="spoof")
        assert found.frame["key"].tolist() == ["spoof", "bonafide"]
        with pytest.raises(ScoreError, match="one_is must be"):
            scorefile.read_scores(write(tmp_path, text), one_is="fake")

    @pytest.mark.parametrize(("bonafide", "one_is"), [("1", "bonafide"), ("0", "spoof")])
    def test_attacks_tell_what_a_number_means(self, tmp_path, bonafide, one_is):
        spoof = "10"[int(bonafide)]
        text = f"LA_E_1 - {bonafide} 1.5\nLA_E_2 A07 {spoof} 2\nLA_E_3 A08 {spoof} 2.5\n"
        assert scorefile.read_scores(write(tmp_path, text)).frame["key"].tolist() == ["bonafide", "spoof", "spoof"]

    def test_repeated_lines(self, tmp_path):
        found = scorefile.read_scores(write(tmp_path, "a spoof 1\nb bonafide 2\na spoof 1.0\n"))
        assert found.frame["utterance"].tolist() == ["a", "b"] and "line 3" in found.notes[0]
        for other in ("a spoof 1.5", "a bonafide 1"):
            with pytest.raises(ScoreError, match="line 3: 'a' has another score already"):
                scorefile.read_scores(write(tmp_path, f"a spoof 1\nb bonafide 2\n{other}\n"))

    @pytest.mark.parametrize(
        ("dialect", "described"),
        [
            ("utt attack key score", "whitespace, no header: utterance attack key score"),
            ("csv, header", "comma, header: utterance score"),
            ("asvspoof 5", "tab, header: path score"),
            ("paths", "comma, header: path score logit_spoof"),
        ],
    )
    def test_dialect_is_told(self, tmp_path, dialect, described):
        assert scorefile.read_scores(write(tmp_path, DIALECTS[dialect])).dialect == described

    def test_other_columns_come_along_as_numbers(self, tmp_path):
        frame = scorefile.read_scores(write(tmp_path, DIALECTS["paths"])).frame
        assert frame["logit_spoof"].tolist() == [0.5, 0.5, 1.0]
        assert frame["path"].iloc[0] == "/data/my clips/LA_E_1.flac"

    def test_high_is_spoof_negates(self, tmp_path):
        path = write(tmp_path, DIALECTS["utt score"])
        found = scorefile.read_scores(path, higher_is="spoof")
        assert found.frame["score"].tolist() == [-s for s in SCORES]
        assert found.higher_is == "spoof"

    def test_companion_says_which_way_unless_the_caller_does(self, tmp_path):
        path = write(tmp_path, DIALECTS["utt score"])
        scorefile.companion_path(path).write_text('{"higher_is": "spoof", "model": "x"}')
        found = scorefile.read_scores(path)
        assert found.frame["score"].tolist() == [-s for s in SCORES]
        assert found.meta["model"] == "x"
        assert scorefile.read_scores(path, "bonafide").frame["score"].tolist() == SCORES

    @pytest.mark.parametrize(
        ("name", "higher_is"),
        [
            ("rawgat_st_mul.LA.eval.txt", "bonafide"),
            ("lcnn_fusion.LA.eval.csv", "bonafide"),
            ("air_ocsoftmax.LA.eval.txt", "spoof"),
        ],
    )
    def test_published_files_join_their_protocol(self, reference_data, name, higher_is):
        folder = reference_data / "published_scores"
        keys = read_keys(folder / "ASVspoof2019.LA.cm.eval.trl.txt")
        trials = scorefile.join_scores(keys, scorefile.read_scores(folder / name, higher_is))
        assert len(trials) == 71_237
        assert (trials["label"] == 1).sum() == 7_355
        assert trials["speaker"].nunique() == 67
        assert sorted(set(trials["attack"])) == ["-", *(f"A{i:02d}" for i in range(7, 20))]


class TestWriting:
    def test_what_is_written_comes_back(self, tmp_path):
        rng = np.random.default_rng(0)
        frame = pd.DataFrame(
            {
                "utterance": [f"clip, number {i}" for i in range(50)],
                "score": rng.normal(size=50).astype(np.float32).astype(np.float64) * 1e-7,
                "logit_spoof": rng.normal(size=50),
                "duration_s": rng.uniform(1, 9, 50),
                "note": ["a b"] * 50,
            }
        )
        path = scorefile.write_scores(tmp_path / "deep" / "scores.csv", frame, {"score": "logit of bona fide"})
        found = scorefile.read_scores(path)
        pd.testing.assert_frame_equal(found.frame, frame, check_dtype=False, check_exact=True)
        assert found.meta == {
            "score": "logit of bona fide",
            "higher_is": "bonafide",
            "columns": list(frame.columns),
            "n_trials": 50,
        }
        assert sorted(p.name for p in path.parent.iterdir()) == ["scores.csv", "scores.csv.json"]

    def test_gaps_in_a_column_of_numbers_stay_gaps(self, tmp_path):
        path = write(tmp_path, "utterance,score,n,size,note\na,1,3,2.5,x\nb,2,4,,7\n")
        frame = scorefile.read_scores(path).frame
        assert frame["n"].tolist() == [3, 4] and frame["n"].dtype == np.int64
        assert frame["size"].iloc[0] == 2.5 and np.isnan(frame["size"].iloc[1])
        assert frame["note"].tolist() == ["x", "7"]

    def test_the_same_name_in_two_folders(self, tmp_path):
        """What this package writes it reads, and joins to protocols that know more or less of the path."""
        paths = ["/d/a/x.wav", "/d/b/x.wav", "/d/b/y.mp3", "/d/b/y.wav"]
        frame = pd.DataFrame({"path": paths, "score": [1.0, 2.0, 3.0, 4.0]})
        found = scorefile.read_scores(scorefile.write_scores(tmp_path / "s.csv", frame))
        assert found.frame["utterance"].tolist() == ["a/x.wav", "b/x.wav", "b/y.mp3", "b/y.wav"]
        for names in (
            ["b/y.wav", "b/x.wav", "a/x.wav", "b/y.mp3"],
            ["/e\\d\\b\\y.wav", "d/b/x.wav", "d/a/x.wav", "b/y.mp3"],
        ):
            protocol = pd.DataFrame({"utterance": names, "label": [1, 0, 0, 1]})
            assert scorefile.join_scores(protocol, found)["score"].tolist() == [4.0, 2.0, 1.0, 3.0]

    def test_names_are_bytes(self, tmp_path):
        names = [
            "a{b}.wav",
            'say "x".wav',
            "two\nlines.wav",
            "carriage\rreturn",
            "#1.wav",
            "c,d;e\tf",
            os.fsdecode(b"\xff.wav"),
        ]
        frame = pd.DataFrame({"utterance": names, "score": np.arange(7.0)})
        path = scorefile.write_scores(tmp_path / "s.csv", frame)
        assert b"\xff.wav" in path.read_bytes()
        assert scorefile.read_scores(path).frame["utterance"].tolist() == names

    def test_paths_alone_give_utterances(self, tmp_path):
        frame = pd.DataFrame({"path": ["/a/x.flac", "/b/y.wav"], "score": [1.0, 2.0]})
        found = scorefile.read_scores(scorefile.write_scores(tmp_path / "s.csv", frame))
        assert found.frame["utterance"].tolist() == ["x", "y"]

    @pytest.mark.parametrize(
        ("frame", "text"),
        [
            ({"utterance": ["a", "b"], "score": [1.0, np.nan]}, "1 scores are not finite, first 'b'"),
            ({"utterance": ["a", "a"], "score": [1.0, 2.0]}, "'a' has more than one score"),
            ({"utterance": ["a"]}, "needs `score`"),
            ({"name": ["a"], "score": [1.0]}, "needs `score` and `utterance` or `path`"),
        ],
    )
    def test_refused_and_the_old_file_kept(self, tmp_path, frame, text):
        path = write(tmp_path, "old")
        with pytest.raises(ScoreError, match=text):
            scorefile.write_scores(path, pd.DataFrame(frame))
        assert path.read_text() == "old"

    def test_meta_that_is_no_json_leaves_nothing_behind(self, tmp_path):
        with pytest.raises(TypeError):
            scorefile.write_scores(
                tmp_path / "s.csv", pd.DataFrame({"utterance": ["a"], "score": [1.0]}), {"model": object()}
            )
        assert list(tmp_path.iterdir()) == []


class TestUnreadable:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "is empty"),
            ("# only this\n\n", "is empty"),
            ("LA_E_1 1.5\nLA_E_2\n", r"line 2: 1 columns, expected 2"),
            ("LA_E_1 1.5\n\nLA_E_2 spoof 2\n", r"line 3: 3 columns, expected 2 .*'LA_E_2 spoof 2'"),
            ("LA_E_1 1.5\nLA_E_2 high\n", r"line 2: score 'high' is not a finite number \(1 such"),
            ("LA_E_1 nan\nLA_E_2 inf\n", r"line 1: score 'nan' is not a finite number \(2 such"),
            ("LA_E_1 1.5\n# x\nLA_E_1 2.5\n", r"line 3: 'LA_E_1' has another score already"),
            ("LA_E_1 maybe 1.5\n", r"line 1: unknown label 'maybe'"),
            ("a b c d 1.5\n", r"line 1: 5 columns; without a header"),
            ("1.5\n", r"line 1: 1 columns"),
            ("utterance,score\nLA_E_1,1,5\n", r"line 2: 3 columns, expected 2.*decimal commas"),
            ("LA_E_1;1.250,5\nLA_E_2;2,5\n", r"line 1: score '1.250,5'.*a point or a comma, not both"),
            ("LA_E_1;1.250\nLA_E_2;2,5\n", r"line 1: score '1.250'.*a point or a comma, not both"),
            ("LA_E_1 1_000\nLA_E_2 2\n", r"line 1: score '1_000' is not a finite number"),
            ("my clip.wav 1.5\nour clip.wav 2\n", r"line 1: unknown label 'clip.wav'.*tabs or commas"),
            ("utterance,score\n", "header and no trials"),
            ("speaker,score\na,1\n", "names neither utterance nor path"),
            ("utt,id,score\na,b,1\n", "mean the same"),
        ],
    )
    def test_place_is_named(self, tmp_path, text, expected):
        path = write(tmp_path, text)
        with pytest.raises(ScoreError, match=expected) as caught:
            scorefile.read_scores(path)
        assert str(path) in str(caught.value)

    def test_missing_binary_and_bad_companion(self, tmp_path):
        with pytest.raises(ScoreError, match="cannot be read: No such file"):
            scorefile.read_scores(tmp_path / "none.txt")
        (tmp_path / "binary").write_bytes(b"\x7fELF\x00\x01" * 9)
        with pytest.raises(ScoreError, match="line 1: not text"):
            scorefile.read_scores(tmp_path / "binary")
        path = write(tmp_path, DIALECTS["utt score"])
        for text, expected in (("{", "is not the JSON"), ("[1]", "one JSON object, found list")):
            scorefile.companion_path(path).write_text(text)
            with pytest.raises(ScoreError, match=expected):
                scorefile.read_scores(path)

    def test_unknown_direction(self, tmp_path):
        with pytest.raises(ScoreError, match="higher_is must be .* got 'better'"):
            scorefile.read_scores(write(tmp_path, DIALECTS["utt score"]), "better")


class TestJoining:
    def scores(self, names=NAMES, **columns):
        return pd.DataFrame({"utterance": names, "score": np.arange(len(names), dtype=float), **columns})

    def test_in_the_protocols_order(self, protocol):
        joined = scorefile.join_scores(protocol, self.scores(NAMES[::-1], duration_s=[3.0, 2.0, 1.0]))
        assert joined["utterance"].tolist() == NAMES
        assert joined["score"].tolist() == [2.0, 1.0, 0.0]
        assert joined["duration_s"].tolist() == [1.0, 2.0, 3.0]
        assert "score" not in protocol

    @pytest.mark.parametrize(
        ("names", "text"),
        [
            (NAMES[:2], r"1 of the protocol's 3 trials have no score: LA_E_3;"),
            ([*NAMES, "x", "y"], r"2 of 5 scores belong to no trial of the protocol: x, y;"),
            (["LA_E_1", "LA_E_2", "z"], r"no score: LA_E_3; .*no trial of the protocol: z"),
            (["a", "b", "c"], r"no trial in common.*'LA_E_1'.*'a'.*different corpora or splits"),
            (["LA_E_1", "LA_E_1", "LA_E_2"], r"LA_E_1 occur more than once in the scores"),
        ],
    )
    def test_not_one_to_one(self, protocol, names, text):
        with pytest.raises(ScoreError, match=text):
            scorefile.join_scores(protocol, self.scores(names))

    def test_long_lists_are_cut(self, protocol):
        many = pd.concat([protocol.assign(utterance=[f"u{i}_{j}" for j in range(3)]) for i in range(4)])
        with pytest.raises(ScoreError, match=r"u0_0, u0_1, u0_2, \.\.\. \(11 in all\)"):
            scorefile.join_scores(many, self.scores(["u3_2"]))

    def test_duplicate_in_the_protocol(self, protocol):
        with pytest.raises(ScoreError, match="LA_E_1 occur more than once in the protocol"):
            scorefile.join_scores(pd.concat([protocol, protocol[:1]]), self.scores())

    @pytest.mark.parametrize(
        "names",
        [
            ["x/LA_E_1.flac", "x/LA_E_2.wav", "y/LA_E_3"],
            ["C:\\clips\\LA_E_1.wav", "clips\\LA_E_2.wav", "LA_E_3.WAV"],
            ["LA_E_1.flac", "LA_E_2.flac", "LA_E_3.flac"],
        ],
    )
    def test_names_with_paths_and_suffixes(self, protocol, names):
        assert scorefile.join_scores(protocol, self.scores(names))["score"].tolist() == [0.0, 1.0, 2.0]

    def test_a_difference_of_case_is_named(self, protocol):
        with pytest.raises(ScoreError, match="no trial in common.*upper and lower case"):
            scorefile.join_scores(protocol, self.scores([name.lower() for name in NAMES]))

    def test_a_score_column_of_the_protocol_is_replaced(self, protocol):
        joined = scorefile.join_scores(protocol.assign(score=9.0), self.scores())
        assert joined["score"].tolist() == [0.0, 1.0, 2.0]

    def test_contradiction_of_key_or_attack(self, protocol):
        with pytest.raises(
            ScoreError, match="key of 1 trials differs .*LA_E_2: bonafide in the scores, spoof in the pro"
        ):
            scorefile.join_scores(protocol, self.scores(key=["bonafide", "bonafide", "spoof"]))
        with pytest.raises(ScoreError, match="the attack of 1 trials differs .*LA_E_3: A09"):
            scorefile.join_scores(protocol, self.scores(attack=["-", "A07", "A09"]))
        with pytest.raises(ScoreError, match="key of 3 trials differs.*0 in the scores.*is a 1 a spoof there"):
            scorefile.join_scores(protocol, self.scores(key=[0, 1, 1]))
        scorefile.join_scores(
            protocol, self.scores(attack=["bonafide", "A07", "-"])
        )  # says nothing, contradicts nothing


class TestAsvScores:
    LINES_2019 = "bonafide target 7.5\nbonafide nontarget -3\nA07 spoof 1.25\n"

    def test_2019(self, tmp_path):
        found = scorefile.read_asv_scores(write(tmp_path, self.LINES_2019))
        assert found.to_dict("list") == {
            "attack": ["-", "-", "A07"],
            "key": ["target", "nontarget", "spoof"],
            "score": [7.5, -3.0, 1.25],
        }

    @pytest.mark.parametrize("folder", ["ASV", "ASV/ASVTorch_Kaldi"])
    def test_2021_with_its_keys(self, tmp_path, folder):
        (tmp_path / folder).mkdir(parents=True)
        write(
            tmp_path / "ASV",
            "LA_0007 LA_E_5 alaw ita_tx bonafide nontarget notrim eval\n"
            "LA_0007 LA_E_6 none loc_tx bonafide target notrim progress\n"
            "LA_0009 LA_E_5 alaw ita_tx A07 spoof notrim eval\n",
            "trial_metadata.txt",
        )
        path = write(tmp_path / folder, "LA_0009 LA_E_5 3\nLA_0007 LA_E_6 2\nLA_0007 LA_E_5 1\n", "score.txt")
        found = scorefile.read_asv_scores(path).set_index("key")
        assert found["score"].to_dict() == {"nontarget": 1.0, "target": 2.0, "spoof": 3.0}
        assert found["attack"].to_dict() == {"nontarget": "-", "target": "-", "spoof": "A07"}
        assert found.loc["target", "phase"] == "progress"
        write(tmp_path / folder, "LA_0009 LA_E_5 3\nLA_0007 LA_E_6 2\n", "score.txt")
        with pytest.raises(ScoreError, match="do not pair off .*LA_0007, utterance LA_E_5"):
            scorefile.read_asv_scores(path)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("LA_0001 LA_E_1 2.5\n", "line 1: 'LA_E_1' is not target, nontarget or spoof.*trial_metadata"),
            ("bonafide target 7\nA07 spoof\n", "line 2: 2 columns, expected 3"),
            ("bonafide target x\n", "line 1: score 'x'"),
        ],
    )
    def test_refused(self, tmp_path, text, expected):
        with pytest.raises(ScoreError, match=expected):
            scorefile.read_asv_scores(write(tmp_path, text))

    def test_official_files(self, reference_data):
        folder = reference_data / "asvspoof2019_subset/LA/ASVspoof2019_LA_asv_scores"
        dev = scorefile.read_asv_scores(folder / "ASVspoof2019.LA.asv.dev.gi.trl.scores.txt")
        assert dev["key"].value_counts().to_dict() == {"spoof": 22_296, "nontarget": 5_768, "target": 1_484}
        assert sorted(set(dev["attack"])) == ["-", *(f"A0{i}" for i in range(1, 7))]


class TestKeys:
    @pytest.mark.parametrize("one_is", ["bonafide", "spoof"])
    def test_numbers_mean_what_is_said(self, tmp_path, one_is):
        path = write(tmp_path, "path;label\na/1.wav;1\nb/1.wav;0\n")
        with pytest.raises(DeepfakeUtilsError, match="line 2: the label '1' is ambiguous.*one_is="):
            read_keys(path)
        keys = read_keys(path, one_is=one_is)
        assert keys["label"].tolist() == ([1, 0] if one_is == "bonafide" else [0, 1])
        assert keys["utterance"].tolist() == ["a/1", "b/1"]

    def test_2021_key_file(self, tmp_path):
        path = write(
            tmp_path,
            "LA_0009 LA_E_9332881 alaw ita_tx A07 spoof notrim eval\n"
            "LA_0010 LA_E_9332882 none loc_tx bonafide bonafide notrim progress\n",
        )
        keys = read_keys(path)
        assert keys["label"].tolist() == [0, 1]
        assert keys["attack"].tolist() == ["A07", "-"]
        assert keys["codec"].tolist() == ["alaw", "none"]
        assert keys["phase"].tolist() == ["eval", "progress"]

    @pytest.mark.parametrize(
        "text",
        [
            "filename\tcm-label\nE_1\tbonafide\nE_2\tspoof\n",
            "path,label\n/x/E_1.flac,real\n/x/E_2.flac,fake\n",
            "key,utterance,attack\nbona-fide,E_1,-\nfake,E_2,A1\n",
        ],
    )
    def test_tables_with_a_header(self, tmp_path, text):
        keys = read_keys(write(tmp_path, text))
        assert keys["utterance"].tolist() == ["E_1", "E_2"]
        assert keys["label"].tolist() == [1, 0]
        assert keys["speaker"].tolist() == ["-", "-"]

    def test_a_protocol_of_ours_written_as_csv(self, tmp_path, protocol):
        path = tmp_path / "protocol.csv"
        protocol.assign(duration_s=[1.5, 2.0, 3.0]).to_csv(path, index=False)
        keys = read_keys(path)
        pd.testing.assert_frame_equal(keys[list(protocol)], protocol, check_dtype=False)
        assert keys["duration_s"].tolist() == [1.5, 2.0, 3.0]

    @pytest.mark.parametrize("text", ["utterance,label\na,perhaps\n", "what is this\n", "label,score\n1,2\n"])
    def test_refused(self, tmp_path, text):
        path = write(tmp_path, text)
        with pytest.raises(DeepfakeUtilsError, match=str(path)):
            read_keys(path)


def test_companion_is_readable_json(tmp_path):
    path = scorefile.write_scores(tmp_path / "s.csv", pd.DataFrame({"utterance": ["a"], "score": [1.0]}))
    assert json.loads(scorefile.companion_path(path).read_text())["higher_is"] == "bonafide"
