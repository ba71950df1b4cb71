"""Reading protocols: every format as the organisers publish it, every defect with its file and line, and splits."""

import copy
import os
import warnings

import numpy as np
import pandas as pd
import pytest

from deepfake_utils.conventions import PROTOCOL_COLUMNS, ConfigError, CorpusError
from deepfake_utils.corpora import (
    UNKNOWN_ATTACK,
    UNKNOWN_SPEAKER,
    Corpus,
    assign_splits,
    divide,
    find_corpora,
    fingerprint,
    read_keys,
)
from deepfake_utils.corpora.folder import read_folders

LINES_2019 = [
    "LA_0001 LA_E_1000000 - - bonafide",
    "LA_0002 LA_E_1000001 - A17 spoof",
    "LA_0001 LA_E_1000002 - A07 spoof",
]


@pytest.fixture
def la(tmp_path):
    """A function that writes an eval protocol and empty recordings, and gives the corpus."""

    def make(lines=LINES_2019, audio=("LA_E_1000000", "LA_E_1000001", "LA_E_1000002"), text=None):
        (tmp_path / "eval").mkdir(exist_ok=True)
        for name in audio:
            (tmp_path / "eval" / f"{name}.flac").touch()
        protocol = tmp_path / "ASVspoof2019.LA.cm.eval.trl.txt"
        if text is None:
            protocol.write_text("".join(f"{line}\n" for line in lines))
        else:
            protocol.write_bytes(text)
        return Corpus("la", "asvspoof2019_la", tmp_path, {"eval": protocol}, {"eval": (tmp_path / "eval",)})

    return make


# What a protocol looks like


def test_columns_types_and_values(la, tmp_path):
    protocol = la().protocol("eval")
    assert list(protocol.columns) == list(PROTOCOL_COLUMNS)
    assert protocol["label"].dtype == np.int64 and list(protocol["label"]) == [1, 0, 0]
    assert list(protocol["attack"]) == ["-", "A17", "A07"]
    assert list(protocol["speaker"]) == ["LA_0001", "LA_0002", "LA_0001"]
    assert list(protocol["path"]) == [str(tmp_path / "eval" / f"LA_E_100000{i}.flac") for i in range(3)]
    assert set(protocol["split"]) == {"eval"} and set(protocol["corpus"]) == {"la"}
    assert protocol.attrs["dropped"] == ()


FORMATS = {
    "2019 LA": ("LA_0039 LA_E_2834763 - A11 spoof", ("LA_0039", 0, "A11"), {}),
    "2019 PA": ("PA_0095 PA_T_0005731 aaa AA spoof", ("PA_0095", 0, "AA"), {"environment": "aaa"}),
    "2021 LA": (
        "LA_0009 LA_E_9332881 alaw ita_tx A07 spoof notrim eval",
        ("LA_0009", 0, "A07"),
        {"codec": "alaw", "transmission": "ita_tx", "trim": "notrim", "phase": "eval"},
    ),
    "2021 LA, bona fide": (
        "LA_0009 LA_E_1000001 none loc_tx bonafide bonafide trim hidden",
        ("LA_0009", 1, "-"),
        {"codec": "none", "transmission": "loc_tx", "trim": "trim", "phase": "hidden"},
    ),
    "2021 DF": (
        "TEF2 DF_E_2000013 low_m4a vcc2020 Task1-team20 spoof notrim progress traditional_vocoder Task1 team20 FF E",
        ("TEF2", 0, "Task1-team20"),
        {
            "codec": "low_m4a",
            "source_corpus": "vcc2020",
            "trim": "notrim",
            "phase": "progress",
            "vocoder": "traditional_vocoder",
        },
    ),
    "5": (
        "D_4461 D_0000000169 F C05 2 - AC1 A14 spoof -",
        ("D_4461", 0, "A14"),
        {"gender": "F", "codec": "C05", "codec_quality": "2", "attack_tag": "AC1"},
    ),
    "5, bona fide": (
        "D_0461 D_0000000190 M - - - - bonafide bonafide -",
        ("D_0461", 1, "-"),
        {"gender": "M", "codec": "-", "codec_quality": "-", "attack_tag": "-"},
    ),
    "5, phase 1": ("T_4850 T_0000000000 F - A05 spoof", ("T_4850", 0, "A05"), {"gender": "F", "codec": "-"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_published_line_formats(tmp_path, name):
    line, (speaker, label, attack), extras = FORMATS[name]
    (tmp_path / "list.txt").write_text(line + "\n")
    protocol = read_keys(tmp_path / "list.txt")
    row = protocol.iloc[0]
    assert (row["speaker"], row["label"], row["attack"], row["split"]) == (speaker, label, attack, "eval")
    assert row["utterance"] == line.split()[1]
    assert {column: row[column] for column in protocol.columns if column not in PROTOCOL_COLUMNS} == extras


def test_windows_line_ends_blank_lines_a_byte_order_mark_and_tabs_are_no_defects(la):
    text = b"\xef\xbb\xbf\r\n" + "\r\n\r\n".join(LINES_2019).replace(" ", "\t").encode()
    assert list(la(text=text).protocol()["label"]) == [1, 0, 0]


def test_the_published_eval_protocol_has_its_published_counts(reference_data):
    protocol = read_keys(reference_data / "published_scores" / "ASVspoof2019.LA.cm.eval.trl.txt")
    assert len(protocol) == 71_237
    assert protocol["label"].sum() == 7_355
    assert set(protocol["attack"]) == {"-"} | {f"A{i:02d}" for i in range(7, 20)}
    assert set(protocol.groupby("attack").size()) == {7_355, 4_914}


# Defects


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*LINES_2019, "LA_0001 LA_E_1000000 - A07 spoof"], "line 4: utterance LA_E_1000000 already stands on line 1"),
        ([*LINES_2019[:2], "LA_0001 LA_E_1000002 - A07 genuine"], "line 3: unknown label 'genuine'"),
        ([*LINES_2019[:2], "LA_0001 LA_E_1000002 - A07 spo"], "line 3: unknown label 'spo'"),
        ([*LINES_2019[:2], "LA_0001 LA_E_10"], "line 3: 2 columns, expected 5.*truncated"),
        (["LA_0001 LA_E_1000000 - - - bonafide"], "line 1: 6 columns, expected"),
        ([LINES_2019[0], "", "", "x y"], "line 4: 2 columns"),
    ],
)
def test_bad_lines_are_named(la, lines, message):
    with pytest.raises(CorpusError, match=f"ASVspoof2019.LA.cm.eval.trl.txt {message}"):
        la(lines).protocol()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\x1f\x8b\x08\x00" + bytes(100), "line 1: not text .*gzip file that is damaged"),
        (LINES_2019[0].encode() + b"\nLA_0001 LA_E_\xff\xfe - - spoof", "line 2: not text"),
        ("\n".join(LINES_2019).encode("utf-16-le"), "line 1: not text"),
    ],
)
def test_files_that_are_no_text_are_refused(la, text, message):
    with pytest.raises(CorpusError, match=f"ASVspoof2019.LA.cm.eval.trl.txt {message}"):
        la(text=text).protocol()


def test_a_protocol_that_vanished(la, tmp_path):
    corpus = la()
    corpus.protocols["eval"].unlink()
    with pytest.raises(CorpusError, match="cannot be read: No such file"):
        corpus.protocol()


def test_missing_recordings_raise_with_line_and_counts_or_are_dropped_by_name(la, tmp_path):
    corpus = la(audio=["LA_E_1000001"])
    with pytest.raises(CorpusError) as caught:
        corpus.protocol()
    for expected in (
        "ASVspoof2019.LA.cm.eval.trl.txt line 1: no recording of LA_E_1000000",
        "1 of 3 recordings present",
        "missing 2 (LA_E_1000000, LA_E_1000002)",
        str(tmp_path / "eval"),
        "allow_missing=True",
    ):
        assert expected in str(caught.value)
    with pytest.warns(UserWarning, match="missing 2 .LA_E_1000000, LA_E_1000002."):
        protocol = corpus.protocol(allow_missing=True)
    assert list(protocol["utterance"]) == ["LA_E_1000001"] and list(protocol.index) == [0]
    assert protocol.attrs["dropped"] == ("LA_E_1000000", "LA_E_1000002")


def test_dropped_names_survive_table_operations_without_being_copied(la):
    with pytest.warns(UserWarning):
        protocol = la(audio=["LA_E_1000001"]).protocol(allow_missing=True)
    dropped = protocol.attrs["dropped"]
    assert protocol.assign(x=1).query("label == 0").attrs["dropped"] is dropped
    assert copy.deepcopy(dropped) is dropped


def test_a_split_without_any_recording_says_so(la, tmp_path):
    corpus = la(audio=[])
    with pytest.raises(CorpusError, match="eval: none of 3 recordings present.*attach the audio"):
        corpus.protocol(allow_missing=True)
    train = tmp_path / "train.txt"
    train.write_text("LA_0079 LA_T_1000000 - - bonafide\n")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "LA_T_1000000.flac").touch()
    both = Corpus(
        "la", "asvspoof2019_la", tmp_path, {**corpus.protocols, "train": train}, {"train": (tmp_path / "train",)}
    )
    with pytest.warns(UserWarning, match="train: all 1 recordings present; eval: none of 3.*no folder with such"):
        assert set(both.protocol(allow_missing=True)["split"]) == {"train"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(both.protocol("train")) == 1  # the other split's absence is no concern of this one


def test_an_unknown_split_lists_those_there_are(la):
    with pytest.raises(CorpusError, match="no split 'test'; it has eval"):
        la().protocol("test")


def test_flac_goes_before_wav_and_other_files_are_ignored(la, tmp_path):
    corpus = la()
    (tmp_path / "eval" / "LA_E_1000000.wav").touch()
    (tmp_path / "eval" / "LA_E_1000000.txt").touch()
    assert corpus.protocol()["path"].str.endswith(".flac").all()


# Counts and fingerprints


def test_counts_by_split_label_and_attack_with_missing_audio(la):
    counts = la(audio=["LA_E_1000000", "LA_E_1000002"]).counts()
    expected = [("eval", "bonafide", "-", 1, 0), ("eval", "spoof", "A07", 1, 0), ("eval", "spoof", "A17", 1, 1)]
    assert list(counts.itertuples(index=False, name=None)) == expected
    assert list(counts.columns) == ["split", "label", "attack", "trials", "missing"]


def test_fingerprint_follows_trials_not_their_place_or_order(la, tmp_path):
    corpus = la()
    protocol = corpus.protocol()
    assert corpus.fingerprint() == fingerprint(protocol)
    moved = protocol.assign(path="/elsewhere", corpus="x").iloc[::-1]
    assert fingerprint(moved) == fingerprint(protocol)
    for column, value in [("label", 1), ("attack", "A01"), ("split", "dev"), ("speaker", "s"), ("utterance", "u")]:
        assert fingerprint(protocol.assign(**{column: value})) != fingerprint(protocol)
    (tmp_path / "eval" / "LA_E_1000002.flac").unlink()
    assert corpus.fingerprint() == fingerprint(protocol.iloc[:2])


def test_the_real_subset_reads_as_its_manifest_says(reference_data):
    (corpus,) = find_corpora(reference_data / "asvspoof2019_subset")
    protocol = corpus.protocol()
    assert protocol.groupby("split").size().to_dict() == {"train": 100, "dev": 100, "eval": 30}
    assert protocol.groupby("split")["label"].mean().eq(0.5).all()
    assert set(corpus.counts().query("split == 'eval' and label == 'spoof'")["attack"]) == {
        "A07", "A08", "A09", "A10", "A12", "A13", "A17", "A18", "A19",
    }  # fmt: skip


# Tables: In-the-Wild, manifests, our own


def test_in_the_wild_rows_and_defects(tmp_path):
    for name in ("0.wav", "1.wav"):
        (tmp_path / name).touch()
    meta = tmp_path / "meta.csv"
    meta.write_text('file,speaker,label\n0.wav,"Obama, Barack",bona-fide\n1.wav,Bob,spoof\n')
    (corpus,) = find_corpora(tmp_path)
    protocol = corpus.protocol()
    assert list(protocol["utterance"]) == ["0", "1"]
    assert list(protocol["speaker"]) == ["Obama, Barack", "Bob"]
    assert list(protocol["attack"]) == ["-", UNKNOWN_ATTACK]
    for rows, message in [
        ("0.wav,Bob,real?!\n1.wav,Bob,maybe\n", "line 3: unknown label 'maybe'"),
        ("0.wav,Bob,spoof\n0.wav,Bob,spoof\n", "line 3: 0.wav already stands on line 2"),
        ("0.wav,Bob\n", "line 2: . columns, expected 3"),
        ("0.wav,Bob,spoof,extra\n", "line 2: . columns, expected 3"),
        ('0.wav,"Bob,spoof\n', "line 2: "),
        ("0.wav,Bob,spoof\n7.wav,Bob,spoof\n", "line 3: no recording of 7"),
    ]:
        meta.write_text("file,speaker,label\n" + rows)
        with pytest.raises(CorpusError, match=f"meta.csv {message}"):
            corpus.protocol()


def test_a_real_manifest_gives_speakers_families_and_extras(reference_data):
    (corpus,) = find_corpora(reference_data / "open_speech")
    protocol = corpus.protocol()
    assert (corpus.kind, corpus.splits, len(protocol)) == ("folder", ("eval",), 1_157)
    assert protocol["label"].value_counts().to_dict() == {0: 714, 1: 443}
    assert protocol.loc[protocol["label"] == 0, "attack"].nunique() == 17
    assert (protocol.loc[protocol["label"] == 1, "attack"] == "-").all()
    assert "1688" in set(protocol["speaker"]) and "licence" in protocol.columns


def test_manifest_splits_missing_files_and_defects(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("1.wav", "2.wav"):
        (tmp_path / "a" / name).touch()
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,label,split,attack\na/1.wav,genuine,train,\na/2.wav,Fake,test,vits\n")
    (corpus,) = find_corpora(tmp_path)
    assert corpus.splits == ("train", "eval")
    row = corpus.protocol("eval").iloc[0]
    assert (row["utterance"], row["path"], row["attack"]) == ("a/2.wav", str(tmp_path / "a/2.wav"), "vits")
    assert row["speaker"] == UNKNOWN_SPEAKER
    for rows, message in [
        ("a/3.wav,fake,train,x\n", "line 2: no recording of a/3.wav"),
        ("a/1.wav,1,train,x\n", "line 2: the label '1' is ambiguous"),
        ("a/1.wav,fake,later,x\n", "line 2: unknown split 'later'"),
        ("a/1.wav,fake,train,x\na/1.wav,real,train,\n", "line 3: a/1.wav already stands on line 2"),
        (",fake,train,x\n", "line 2: neither path nor utterance"),
    ]:
        manifest.write_text("path,label,split,attack\n" + rows)
        with pytest.raises(CorpusError, match=f"manifest.csv {message}"):
            corpus.protocol()


def test_a_table_of_ours_written_as_csv_reads_back_the_same(la, tmp_path):
    protocol = la().protocol().assign(codec=["x", "y", "z"])
    protocol.to_csv(tmp_path / "mine.csv", index=False)
    again = read_keys(tmp_path / "mine.csv")
    columns = ["utterance", "path", "label", "attack", "speaker", "split", "codec"]
    pd.testing.assert_frame_equal(again[columns], protocol[columns], check_dtype=False)


def test_a_file_that_is_no_protocol(tmp_path):
    (tmp_path / "scores.txt").write_text("LA_E_2834763 -8.75\n")
    with pytest.raises(CorpusError, match="scores.txt line 1: 'LA_E_2834763 -8.75' is no line of a known protocol"):
        read_keys(tmp_path / "scores.txt")


@pytest.mark.parametrize(
    "link, target",
    [
        ("train/bonafide/all", "train"),  # the fakes would be real, too
        ("dev/spoof", "train/spoof"),  # fakes to learn from would select the weights
        ("dev/bonafide/b.wav", "train/bonafide/a.wav"),
    ],
)
def test_a_recording_that_links_bring_to_two_places_is_refused(tmp_path, link, target):
    for name in ("train/bonafide/a.wav", "train/spoof/b.wav", "dev/bonafide/c.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"RIFF")
    read_folders(tmp_path)
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(CorpusError, match="are one file by links"):
        read_folders(tmp_path)


def test_plain_folders_list_everything_below_once_even_through_links(tmp_path):
    for name in ("bonafide/a.wav", "bonafide/deep/er/b.flac", "spoof/vits/c.mp3", "spoof/d.wav", "spoof/notes.txt"):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).touch()
    (tmp_path / "c" / "spoof" / "again").symlink_to(tmp_path / "c" / "spoof")
    (corpus,) = find_corpora(tmp_path)
    protocol = corpus.protocol().set_index("utterance")
    assert protocol["attack"].to_dict() == {
        "bonafide/a.wav": "-",
        "bonafide/deep/er/b.flac": "-",
        "spoof/d.wav": UNKNOWN_ATTACK,
        "spoof/vits/c.mp3": "vits",
    }


# Splits of one's own


def many(n_speakers=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {"utterance": f"{speaker}-{i}", "speaker": f"s{speaker}", "label": int(rng.random() < 0.4), "split": "eval"}
        for speaker in range(n_speakers)
        for i in range(rng.integers(5, 30))
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("fractions", [(0.6, 0.2, 0.2), (0.8, 0.2, 0.0), (1 / 3, 1 / 3, 1 / 3)])
def test_splits_keep_speakers_apart_and_come_near_their_shares_of_both_classes(fractions):
    protocol = many()
    before = protocol.copy()
    dealt = assign_splits(protocol, fractions, seed=1)
    pd.testing.assert_frame_equal(protocol, before)
    assert dealt.groupby("speaker")["split"].nunique().eq(1).all()
    for label in (0, 1):
        shares = dealt[dealt["label"] == label]["split"].value_counts(normalize=True)
        for split, fraction in zip(("train", "dev", "eval"), fractions, strict=True):
            assert shares.get(split, 0.0) == pytest.approx(fraction, abs=0.05)
            assert fraction > 0 or split not in shares


def test_splits_depend_on_the_seed_and_not_on_the_order_of_rows():
    protocol = many()
    dealt = assign_splits(protocol, (0.6, 0.2, 0.2), seed=1)
    shuffled = assign_splits(protocol.sample(frac=1, random_state=0), (0.6, 0.2, 0.2), seed=1).sort_index()
    pd.testing.assert_frame_equal(shuffled, dealt)
    assert not assign_splits(protocol, (0.6, 0.2, 0.2), seed=2)["split"].equals(dealt["split"])


def test_trials_of_unknown_speakers_are_dealt_one_by_one():
    protocol = many().assign(speaker=UNKNOWN_SPEAKER)
    shares = assign_splits(protocol, (0.5, 0.25, 0.25), seed=0)["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.5, abs=0.02) and shares["dev"] == pytest.approx(0.25, abs=0.02)


def test_splits_by_another_column_hold_whole_families_out():
    protocol = many().assign(attack=lambda t: np.where(t["label"] == 1, "-", "f" + (t.index % 7).astype(str)))
    dealt = assign_splits(protocol[protocol["label"] == 0], (0.5, 0.25, 0.25), seed=0, by="attack")
    assert dealt.groupby("attack")["split"].nunique().eq(1).all() and dealt["split"].nunique() == 3


def test_bad_shares_and_columns_are_refused():
    for fractions in [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.5)]:
        with pytest.raises(ConfigError, match="add up to 1"):
            assign_splits(many(), fractions, seed=0)
    with pytest.raises(ConfigError, match="by='room' is not a column"):
        assign_splits(many(), (0.5, 0.25, 0.25), seed=0, by="room")


def manifest_corpus(folder, *, speakers: bool, split: str = "") -> Corpus:
    """40 recordings of 10 speakers, half of them spoofed, listed in a manifest."""
    folder.mkdir(exist_ok=True)
    lines = ["path,label,speaker,attack,split"]
    for n in range(40):
        (folder / f"{n}.flac").touch()
        label, attack = ("spoof", "A1") if n % 2 else ("bonafide", "")
        lines.append(f"{n}.flac,{label},{f's{n // 4}' if speakers else ''},{attack},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return find_corpora(folder)[0]


def test_a_folder_without_splits_is_divided_by_speaker_and_says_so(tmp_path):
    tables, said = divide(manifest_corpus(tmp_path, speakers=True), seed=0)
    speakers = [set(table["speaker"]) for table in tables]
    assert sum(map(len, tables)) == 40 and all(table["label"].nunique() == 2 for table in tables)
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 10
    assert [set(table["split"]) for table in tables] == [{"train"}, {"dev"}, {"eval"}]
    assert "splits were drawn (seed 0): 60 % train" in said and "no speaker is in two" in said


def test_a_folder_of_unknown_speakers_is_divided_and_warns(tmp_path):
    tables, said = divide(manifest_corpus(tmp_path, speakers=False), seed=0)
    assert [len(table) for table in tables] == [24, 8, 8]
    assert "speaker of 40 of 40 trials is not known" in said


def test_splits_that_are_named_are_kept_and_test_sets_are_not_divided(tmp_path, la):
    with pytest.raises(CorpusError, match=r"(?s)is a test set: it has eval and no train.*notebook 03"):
        divide(la(LINES_2019), seed=0)
    with pytest.raises(CorpusError, match="has no split 'dev'; it has train"):
        divide(manifest_corpus(tmp_path / "named", speakers=True, split="train"), seed=0)


def test_an_open_corpus_with_its_families_sources_and_test_split(tmp_path):
    """What collecting open speech writes: families are attacks, test is eval, source and licence come along."""
    rows = ["path,label,family,speaker,source,split,licence"]
    for i, split in enumerate(["train", "train", "dev", "dev", "test", "test"]):
        (tmp_path / f"{i}.flac").touch()
        label, family = ("spoof", "piper") if i % 2 else ("bonafide", "")
        rows.append(f"{i}.flac,{label},{family},s{i},repo/{i},{split},CC0-1.0")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    (corpus,) = find_corpora(tmp_path)
    assert (corpus.splits, corpus.names_splits) == (("train", "dev", "eval"), True)
    protocol = corpus.protocol()
    assert list(protocol["attack"]) == ["-", "piper"] * 3 and list(protocol["split"])[-1] == "eval"
    assert list(protocol["source"])[:2] == ["repo/0", "repo/1"] and set(protocol["licence"]) == {"CC0-1.0"}
    (tables, said) = divide(corpus, seed=0)
    assert [len(table) for table in tables] == [2, 2, 2] and "come with the corpus" in said


@pytest.mark.parametrize("manifest", [False, True])
def test_trials_of_a_named_test_split_are_never_drawn_for_training(tmp_path, manifest):
    """A folder with dev/ and test/ names its splits: it has no train, and none is made of its test set."""
    rows = ["path,label,split"]
    for split in ("dev", "test"):
        for label in ("real", "fake"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(6):
                (tmp_path / split / label / f"{i}.wav").touch()
                rows.append(f"{split}/{label}/{i}.wav,{label},{split}")
    if manifest:
        (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    (corpus,) = find_corpora(tmp_path)
    assert corpus.splits == ("dev", "eval")
    with pytest.raises(CorpusError, match="is a test set: it has dev, eval and no train"):
        divide(corpus, seed=0)


def test_a_manifest_that_names_some_splits_must_name_all(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.wav").touch()
    (tmp_path / "manifest.csv").write_text("path,label,split\na.wav,real,train\nb.wav,fake,\n")
    with pytest.raises(CorpusError, match="manifest.csv line 3: no split is given, but other lines name theirs"):
        find_corpora(tmp_path)[0].protocol()


def test_a_manifest_may_name_recordings_of_any_suffix(tmp_path):
    for name in ("a.ts", "b"):
        (tmp_path / name).touch()
    (tmp_path / "manifest.csv").write_text("path,label\na.ts,real\nb,fake\n")
    assert len(find_corpora(tmp_path)[0].protocol()) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_tables_as_spreadsheets_write_them(tmp_path, sign, encoding):
    (tmp_path / "clips").mkdir()
    for name in ("ä 1.wav", "two.wav"):
        (tmp_path / "clips" / name).touch()
    rows = [("Path", "Label", "Speaker"), ("clips\\ä 1.wav", "Real", "Zoë"), ("clips/two.wav", "fake", "Bob")]
    (tmp_path / "manifest.csv").write_bytes("\r\n".join(map(sign.join, rows)).encode(encoding))
    protocol = find_corpora(tmp_path)[0].protocol()
    assert list(protocol["path"]) == [str(tmp_path / "clips" / name) for name in ("ä 1.wav", "two.wav")]
    assert list(protocol["speaker"]) == ["Zoë", "Bob"] and list(protocol["label"]) == [1, 0]


@pytest.mark.parametrize(("listed", "there"), [("clips/A.WAV", "clips/a.wav"), ("Clips/a.wav", "clips/a.flac")])
def test_a_recording_that_differs_in_case_or_suffix_is_named(tmp_path, listed, there):
    (tmp_path / there).parent.mkdir()
    (tmp_path / there).touch()
    (tmp_path / "manifest.csv").write_text(f"path,label\n{listed},real\n")
    with pytest.raises(CorpusError, match=f"no recording of {listed}, but {tmp_path / there} is there"):
        find_corpora(tmp_path)[0].protocol()


def test_a_lower_case_copy_of_an_official_corpus_is_named(la, tmp_path):
    corpus = la(audio=["LA_E_1000000", "LA_E_1000001", "la_e_1000002"])
    with pytest.raises(CorpusError, match="no recording of LA_E_1000002, but .*la_e_1000002.flac is there"):
        corpus.protocol()


def test_hidden_files_are_never_listed_and_what_is_passed_over_is_counted(tmp_path):
    for name in ("real/a.wav", "real/._a.wav", "real/.hidden/b.wav", "fake/__MACOSX/c.wav", "fake/d.mp4", "fake/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "fake" / "gone.wav").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="passed over 2 files .* 1 .txt.*1 broken link|1 broken link, 1 .txt"):
        protocol = find_corpora(tmp_path)[0].protocol()
    assert sorted(protocol["utterance"]) == ["fake/d.mp4", "real/a.wav"]


def test_names_that_are_no_text_survive(tmp_path):
    names = [b"\xff{1}.wav", b'"two"\nlines.wav']
    for folder, name in zip(("real", "fake"), names, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / os.fsdecode(name)).touch()
    protocol = find_corpora(tmp_path)[0].protocol()
    assert {os.fsencode(os.path.basename(path)) for path in protocol["path"]} == set(names)
    assert len(fingerprint(protocol)) == 12
    protocol.to_csv(tmp_path / "mine.csv", index=False, errors="surrogateescape")
    assert list(read_keys(tmp_path / "mine.csv")["path"]) == list(protocol["path"])


def test_splits_are_looked_up_once(tmp_path, monkeypatch):
    corpus = manifest_corpus(tmp_path, speakers=True)
    assert corpus.splits == ("eval",) and not corpus.names_splits
    monkeypatch.setattr("deepfake_utils.corpora.folder.read_manifest", lambda path: pytest.fail("read again"))
    assert corpus.splits == ("eval",)


@pytest.mark.parametrize(
    ("attacks", "labels"), [(("", "vits"), [1, 0]), (("vits", "-"), [0, 1]), (("x", "y"), None), (("", "-"), None)]
)
def test_numbers_as_labels_are_read_only_where_the_attacks_tell(tmp_path, attacks, labels):
    for name in "ab":
        (tmp_path / f"{name}.wav").touch()
    (tmp_path / "manifest.csv").write_text(f"path,label,attack\na.wav,1,{attacks[0]}\nb.wav,0,{attacks[1]}\n")
    (corpus,) = find_corpora(tmp_path)
    if labels is None:
        with pytest.raises(CorpusError, match="line 2: the label '1' is ambiguous.*write bonafide and spoof$"):
            corpus.protocol()
    else:
        assert list(corpus.protocol()["label"]) == labels
