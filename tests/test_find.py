"""Discovery in trees as they occur: official, doubled, misspelt, spread, linked, incomplete, and no corpus at all."""

import os
import sys
import types
from pathlib import Path

import pytest

from deepfake_utils.conventions import CorpusError
from deepfake_utils.corpora import find, find_corpora, survey
from deepfake_utils.demo import build_demo

ENDS = {"train": ("T", "trn"), "dev": ("D", "trl"), "eval": ("E", "trl")}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No environment variable, no Kaggle, no ./data: only what a test makes."""
    monkeypatch.delenv("DEEPFAKE_DATA", raising=False)
    monkeypatch.setenv("DEEPFAKE_KAGGLE_INPUT", str(tmp_path / "kaggle" / "input"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def touch(folder: Path, names, suffix=".flac"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}{suffix}").touch()


def write(path: Path, *lines: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def asvspoof2019(root, track="LA", suffix=".flac", audio="ASVspoof2019_{track}_{split}/flac", n=4, protocols=None):
    """The official layout: n trials a split, every second one a spoof."""
    protocols = protocols or root / f"ASVspoof2019_{track}_cm_protocols"
    for split, (letter, end) in ENDS.items():
        names = [f"{track}_{letter}_{1000000 + i}" for i in range(n)]
        touch(root / audio.format(track=track, split=split), names, suffix)
        rows = [f"{track}_0001 {name} - {'A01 spoof' if i % 2 else '- bonafide'}" for i, name in enumerate(names)]
        write(protocols / f"ASVspoof2019.{track}.cm.{split}.{end}.txt", *rows)
    return root


def keys2021(folder, track, names):
    extra = " traditional_vocoder - - - -" if track == "DF" else ""
    rows = [f"LA_0009 {name} alaw ita_tx A07 spoof notrim eval{extra}" for name in names]
    write(folder / track / "CM" / "trial_metadata.txt", *rows)


def only(*folders, **options):
    (corpus,) = find_corpora(*folders, **options)
    return corpus


def test_the_official_2019_layout_with_asv_scores(tmp_path):
    asvspoof2019(tmp_path / "LA")
    scores = tmp_path / "LA/ASVspoof2019_LA_asv_scores/ASVspoof2019.LA.asv.eval.gi.trl.scores.txt"
    write(scores, "bonafide target 7.98")
    corpus = only(tmp_path)
    assert (corpus.kind, corpus.name, corpus.root) == ("asvspoof2019_la", "asvspoof2019_la", tmp_path / "LA")
    assert corpus.splits == ("train", "dev", "eval")
    assert corpus.asv_scores("eval") == scores and corpus.asv_scores("train") is None
    assert len(corpus.protocol()) == 12


@pytest.mark.parametrize("mount", ["asvpoof-2019-dataset", "datasets/awsaf49/asvpoof-2019-dataset"])
def test_both_kaggle_mounts_with_their_doubled_folders(mount):
    root = find.kaggle_input() / mount
    asvspoof2019(root / "LA" / "LA")
    asvspoof2019(root / "PA" / "PA", track="PA")
    corpora = find_corpora()
    assert [corpus.kind for corpus in corpora] == ["asvspoof2019_la", "asvspoof2019_pa"]
    assert all(corpus.protocol()["path"].map(os.path.isfile).all() for corpus in corpora)
    assert only(name="asvspoof2019_PA").root == root / "PA" / "PA"


def test_misspelt_lower_case_folders_wav_and_capital_suffixes(tmp_path):
    root = asvspoof2019(tmp_path / "asvspoff-19", suffix=".WAV", audio="{split}ing_set/Audio", n=2)
    for path in list((root / "ASVspoof2019_LA_cm_protocols").iterdir()):
        path.rename(path.parent / path.name.lower())
    corpus = only(tmp_path)
    assert corpus.kind == "asvspoof2019_la"
    assert corpus.protocol("dev")["path"].str.endswith("deving_set/Audio/LA_D_1000000.WAV").iloc[0]


def test_protocols_in_a_sibling_folder_found_from_any_of_the_two(tmp_path):
    audio = asvspoof2019(tmp_path / "audio_only", protocols=tmp_path / "protocols")
    for places in [(tmp_path,), (audio, tmp_path / "protocols"), (audio,), (tmp_path / "protocols",)]:
        assert len(only(*places).protocol()) == 12
    (tmp_path / "unrelated").mkdir()
    with pytest.raises(CorpusError):
        find_corpora(tmp_path / "unrelated")


def test_one_split_given_finds_the_corpus_around_it(tmp_path):
    root = asvspoof2019(tmp_path / "LA")
    assert only(root / "ASVspoof2019_LA_eval").root == root


def test_2021_keys_elsewhere_and_df_spread_over_parts_of_which_one_is_missing(tmp_path):
    la = [f"LA_E_{9000000 + i}" for i in range(4)]
    df = [f"DF_E_{2000000 + i}" for i in range(8)]
    root = tmp_path / "avsspoof-2021"
    touch(root / "ASVspoof2021_LA_eval/ASVspoof2021_LA_eval/flac", la)
    for part in range(3):
        touch(root / f"ASVspoof2021_DF_eval_part0{part}/ASVspoof2021_DF_eval/flac", df[2 * part : 2 * part + 2])
    keys2021(tmp_path / "keys-mount/LA-keys-full/keys", "LA", la)
    keys2021(tmp_path / "keys-mount/DF-keys-full/keys", "DF", df)
    asv = tmp_path / "keys-mount/LA-keys-full/keys/LA/ASV"
    write(asv / "trial_metadata.txt", "LA_0009 LA_E_9000000 alaw ita_tx A07 target notrim eval")
    write(asv / "ASVTorch_Kaldi/score.txt", "LA_0009 LA_E_9000000 3.5")
    la_corpus, df_corpus = find_corpora(tmp_path)
    assert (la_corpus.kind, df_corpus.kind) == ("asvspoof2021_la", "asvspoof2021_df")
    assert len(la_corpus.protocol()) == 4
    assert la_corpus.asv_scores("eval") == asv / "ASVTorch_Kaldi/score.txt"
    with pytest.raises(CorpusError, match="6 of 8 recordings present"):
        df_corpus.protocol()
    with pytest.warns(UserWarning, match="DF_E_2000006, DF_E_2000007"):
        assert len(df_corpus.protocol(allow_missing=True)) == 6


def test_2019_and_2021_share_names_but_not_recordings(tmp_path):
    """LA_E_1000002 exists in both years; each corpus must get its own file, whatever the folders are called."""
    a, b = tmp_path / "a", tmp_path / "b"
    names = [f"LA_E_{1000000 + i}" for i in range(0, 60, 2)]
    other = [f"LA_E_{1000001 + i}" for i in range(0, 58, 2)] + ["LA_E_1000002"]
    touch(a / "x", names)
    touch(b / "y", other)
    rows = [f"LA_0001 {name} - - bonafide" for name in [*names, "LA_E_1000057"]]
    write(tmp_path / "lists19/ASVspoof2019.LA.cm.eval.trl.txt", *rows)
    keys2021(tmp_path / "lists21", "LA", other)
    old, new = find_corpora(tmp_path)
    with pytest.warns(UserWarning, match="LA_E_1000057"):  # it lies in b/y, but is 2021's
        assert set(old.protocol(allow_missing=True)["path"].map(os.path.dirname)) == {str(a / "x")}
    assert set(new.protocol()["path"].map(os.path.dirname)) == {str(b / "y")}


def test_a_year_in_the_folder_name_goes_before_nearness(tmp_path):
    """2021's recordings lie beside 2019's protocols, their keys on another mount."""
    asvspoof2019(tmp_path / "all" / "LA")
    names = [f"LA_E_{9000000 + i}" for i in range(4)]
    touch(tmp_path / "all" / "LA" / "ASVspoof2021_LA_eval" / "flac", names)
    keys2021(tmp_path / "keys", "LA", names)
    old, new = find_corpora(tmp_path)
    assert (old.kind, new.kind) == ("asvspoof2019_la", "asvspoof2021_la")
    assert len(old.protocol()) == 12 and len(new.protocol()) == 4


def test_asvspoof5(tmp_path):
    for split, letter, folder in [("train", "T", "flac_T"), ("dev.track_1", "D", "flac_D"), ("eval.track_1", "E", "e")]:
        names = [f"{letter}_{i:010d}" for i in range(3)]
        touch(tmp_path / folder, names)
        rows = [f"{letter}_4461 {name} F - - - AC1 A14 spoof -" for name in names]
        write(tmp_path / f"ASVspoof5_protocols/ASVspoof5.{split}.tsv", *rows)
    corpus = only(tmp_path)
    assert corpus.kind == "asvspoof5" and corpus.splits == ("train", "dev", "eval")
    assert len(corpus.protocol()) == 9


@pytest.mark.parametrize("subfolders", [False, True])
def test_in_the_wild_with_its_recordings_beside_or_sorted_by_label(tmp_path, subfolders):
    root = tmp_path / "in-the-wild-audio-deepfake" / "release_in_the_wild"
    touch(root / "real" if subfolders else root, ["0", "1"], ".wav")
    touch(root / "fake" if subfolders else root, ["2"], ".wav")
    write(root / "meta.csv", "file,speaker,label", "0.wav,Ada,bona-fide", "1.wav,Ada,bona-fide", "2.wav,Bob,spoof")
    corpus = only(tmp_path)
    assert (corpus.kind, corpus.name, corpus.splits) == ("in_the_wild", "in_the_wild", ("eval",))
    assert list(corpus.protocol()["label"]) == [1, 1, 0]


@pytest.mark.parametrize(("bonafide", "spoof"), [("bonafide", "spoof"), ("bona-fide", "Spoofed"), ("REAL", "fake")])
def test_plain_folders_however_they_are_labelled(tmp_path, bonafide, spoof):
    touch(tmp_path / "mine" / bonafide, ["a"], ".wav")
    touch(tmp_path / "mine" / spoof / "vits", ["b"], ".mp3")
    touch(tmp_path / "mine" / "generated", ["spectrogram"], ".png")
    corpus = only(tmp_path)
    assert (corpus.kind, corpus.name, corpus.splits) == ("folder", "mine", ("eval",))
    assert list(corpus.protocol()["attack"]) in (["-", "vits"], ["vits", "-"])


def test_plain_folders_with_splits_make_one_corpus(tmp_path):
    for split in ("training", "validation", "Test"):
        touch(tmp_path / "for-2sec" / split / "real", ["a", "b"], ".wav")
        touch(tmp_path / "for-2sec" / split / "fake", ["c"], ".wav")
    corpus = only(tmp_path)
    assert (corpus.root, corpus.splits) == (tmp_path / "for-2sec", ("train", "dev", "eval"))
    assert len(corpus.protocol("dev")) == 3
    assert only(tmp_path / "for-2sec" / "training").splits == ("train",)


def test_labelled_pictures_are_no_corpus(tmp_path):
    touch(tmp_path / "faces" / "real", ["a"], ".jpg")
    touch(tmp_path / "faces" / "fake", ["b"], ".jpg")
    with pytest.raises(CorpusError, match="no corpus found"):
        find_corpora(tmp_path)


def test_the_demo_is_told_from_the_real_thing(tmp_path):
    asvspoof2019(tmp_path / "real" / "LA")
    build_demo(tmp_path / "demo", scale=0.02)
    demo, real = find_corpora(tmp_path)
    assert (real.name, demo.name, demo.kind) == ("asvspoof2019_la", "demo", "asvspoof2019_la")
    protocol = demo.protocol()
    assert protocol["path"].str.startswith(str(tmp_path / "demo")).all()
    assert set(protocol["attack"]) <= {"-"} | {f"D0{i}" for i in range(1, 9)}
    assert demo.asv_scores("eval") is not None


def test_two_copies_get_two_names_and_their_own_recordings(tmp_path):
    asvspoof2019(tmp_path / "a" / "LA")
    asvspoof2019(tmp_path / "b" / "LA", suffix=".wav")
    first, second = find_corpora(tmp_path)
    assert (first.name, second.name) == ("asvspoof2019_la", "asvspoof2019_la-2")
    assert first.protocol()["path"].str.startswith(str(tmp_path / "a")).all()
    assert second.protocol()["path"].str.startswith(str(tmp_path / "b")).all()
    assert first.fingerprint() == second.fingerprint()
    assert only(tmp_path, name="asvspoof2019_la-2") == second


def test_a_protocol_without_recordings_is_not_listed_beside_one_with(tmp_path):
    asvspoof2019(tmp_path / "subset" / "LA")
    rows = [f"LA_0001 LA_E_{5000000 + i} - - bonafide" for i in range(50)]
    write(tmp_path / "published" / "ASVspoof2019.LA.cm.eval.trl.txt", *rows)
    assert only(tmp_path).root == tmp_path / "subset" / "LA"


def test_links_are_followed_once_and_cycles_end(tmp_path):
    real = asvspoof2019(tmp_path / "store" / "LA")
    place = tmp_path / "place"
    place.mkdir()
    (place / "first").symlink_to(real)
    (place / "second").symlink_to(real)
    (place / "loop").symlink_to(place)
    (place / "self").symlink_to(place / "self")
    (place / "gone").symlink_to(tmp_path / "nowhere")
    (real / "back").symlink_to(tmp_path)
    corpus = only(place)
    assert len(corpus.protocol()) == 12
    assert corpus.protocol()["path"].str.startswith(str(place)).all()


def test_linked_recordings_count_and_broken_links_are_missing(tmp_path):
    root = asvspoof2019(tmp_path / "LA")
    flac = root / "ASVspoof2019_LA_eval/flac"
    (flac / "LA_E_1000000.flac").rename(tmp_path / "moved.flac")
    (flac / "LA_E_1000000.flac").symlink_to(tmp_path / "moved.flac")
    assert len(only(root).protocol("eval")) == 4
    (tmp_path / "moved.flac").unlink()
    with pytest.raises(CorpusError, match="line 1: no recording of LA_E_1000000"):
        only(root).protocol("eval")


def test_a_read_only_tree_is_enough_and_nothing_is_written(tmp_path):
    root = asvspoof2019(tmp_path / "LA")
    before = sorted(tmp_path.rglob("*"))
    folders = [path for path in [tmp_path, *before] if path.is_dir()]
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert len(only(root).protocol()) == 12
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        for path in folders:
            path.chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_named_and_passed_over(tmp_path, monkeypatch):
    """Permissions do not stop the root user, so the refusal is played."""
    locked = tmp_path / "locked"
    locked.mkdir()
    asvspoof2019(tmp_path / "open" / "LA")
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(only(tmp_path).protocol()) == 12
    with pytest.raises(CorpusError, match="locked .Permission denied."):
        find_corpora(locked)


# Where it looks


def test_order_of_the_usual_places(tmp_path, monkeypatch):
    def kind():
        return find_corpora()[0].root.relative_to(tmp_path).parts[0]

    asvspoof2019(tmp_path / "work/data/LA")
    assert kind() == "work"
    asvspoof2019(find.kaggle_input() / "x/LA")
    assert kind() == "kaggle"
    asvspoof2019(tmp_path / "named/LA")
    monkeypatch.setenv("DEEPFAKE_DATA", os.pathsep.join([str(tmp_path / "absent"), str(tmp_path / "named")]))
    assert kind() == "named"
    asvspoof2019(tmp_path / "given/LA")
    assert only(tmp_path / "given").root == tmp_path / "given/LA"
    with pytest.raises(CorpusError):
        find_corpora(tmp_path / "absent")
    monkeypatch.setenv("DEEPFAKE_DATA", str(tmp_path / "absent"))
    with pytest.warns(UserWarning, match="DEEPFAKE_DATA=.*absent holds no such corpus"):
        assert kind() == "kaggle"


def test_nothing_found_lists_every_place_what_was_there_and_what_to_attach(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPFAKE_DATA", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    write(
        find.kaggle_input() / "keys/LA/CM/trial_metadata.txt", "LA_0009 LA_E_9332881 alaw ita_tx A07 spoof notrim eval"
    )
    touch(Path("data/somewhere"), ["x"], ".wav")
    with pytest.warns(UserWarning), pytest.raises(CorpusError) as caught:
        find_corpora()
    text = str(caught.value)
    for expected in [
        f"{tmp_path / 'empty'}: 1 folder(s), 0 with audio",
        "at the top: empty",
        str(find.kaggle_input()),
        "keys/",
        "trial_metadata.txt, but no recordings",
        f"{tmp_path / 'work' / 'data'}",
        "but no protocol for them",
        "pass the folder above, the one that also holds the protocols",
        "awsaf49/asvpoof-2019-dataset",
        "DEEPFAKE_DATA",
    ]:
        assert expected in text
    with pytest.raises(CorpusError, match="nowhere: does not exist"):
        find_corpora(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="a file, not a folder"):
        find_corpora(Path("data/somewhere/x.wav"))


def test_an_unknown_name_says_what_there_is(tmp_path):
    asvspoof2019(tmp_path / "LA")
    with pytest.raises(CorpusError, match="(?s)no corpus 'wavefake' found.*seen: asvspoof2019_la in"):
        find_corpora(tmp_path, name="wavefake")


# Bounds


def test_a_folder_of_audio_is_left_early_but_its_marker_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "FILES_ENOUGH", 20)
    touch(tmp_path / "wild", range(3_000), ".wav")
    rows = [f"{i}.wav,Someone,{'spoof' if i % 2 else 'bona-fide'}" for i in range(3_000)]
    write(tmp_path / "wild" / "meta.csv", "file,speaker,label", *rows)
    read = []
    scandir = os.scandir

    class Counted:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.entries.close()

        def __iter__(self):
            for entry in self.entries:
                read.append(entry.name)
                yield entry

    monkeypatch.setattr(os, "scandir", Counted)
    corpus = only(tmp_path / "wild")
    assert len(read) <= 21
    read.clear()
    assert len(corpus.protocol()) == 3_000
    assert len(read) <= 3_001  # one listing for all trials


def test_no_call_per_trial_to_see_whether_recordings_exist(tmp_path, monkeypatch):
    corpus = only(asvspoof2019(tmp_path / "LA", n=200))

    def forbidden(path, *args, **kwargs):
        raise AssertionError(f"asked for {path}")

    monkeypatch.setattr(os.path, "exists", forbidden)
    monkeypatch.setattr(os.path, "isfile", forbidden)
    monkeypatch.setattr(Path, "exists", forbidden)
    monkeypatch.setattr(Path, "is_file", forbidden)
    assert len(corpus.protocol()) == 600


def test_too_many_folders_stop_the_walk_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "MAX_FOLDERS", 10)
    for i in range(30):
        (tmp_path / f"{i:02d}").mkdir()
    with pytest.raises(CorpusError, match="stopped after 10 folders"):
        find_corpora(tmp_path)


# Kaggle


def install_kagglehub(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=download))


def test_a_kaggle_dataset_is_fetched_only_by_its_full_name(tmp_path, monkeypatch):
    asked = []

    def download(handle):
        asked.append(handle)
        return str(asvspoof2019(tmp_path / "cache" / "LA").parent)

    install_kagglehub(monkeypatch, download)
    with pytest.raises(CorpusError):
        find_corpora(name="asvspoof2019_la")
    assert asked == []
    assert only(name="awsaf49/asvpoof-2019-dataset").root == tmp_path / "cache" / "LA"
    assert asked == ["awsaf49/asvpoof-2019-dataset"]


@pytest.mark.parametrize("mount", ["asvpoof-2019-dataset", "datasets/awsaf49/asvpoof-2019-dataset"])
def test_an_attached_kaggle_dataset_is_not_downloaded(monkeypatch, mount):
    install_kagglehub(monkeypatch, lambda handle: pytest.fail("downloaded"))
    asvspoof2019(find.kaggle_input() / mount / "LA" / "LA")
    asvspoof2019(find.kaggle_input() / "another" / "LA")
    assert only(name="awsaf49/asvpoof-2019-dataset").root == find.kaggle_input() / mount / "LA" / "LA"


def test_kagglehub_absent_or_offline_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(CorpusError, match="pip install kagglehub"):
        find_corpora(name="owner/slug")

    def offline(handle):
        raise ConnectionError("Temporary failure in name resolution")

    install_kagglehub(monkeypatch, offline)
    with pytest.raises(CorpusError, match="owner/slug could not be fetched.*name resolution.*check the network"):
        find_corpora(name="owner/slug")


# Real data


def test_the_real_subset_and_everything_beside_it(reference_data):
    corpora = {corpus.kind: corpus for corpus in find_corpora(reference_data)}
    assert set(corpora) == {"asvspoof2019_la", "folder"}
    assert corpora["asvspoof2019_la"].asv_scores("dev").name == "ASVspoof2019.LA.asv.dev.gi.trl.scores.txt"
    assert len(corpora["asvspoof2019_la"].protocol()) == 230
    assert len(corpora["folder"].protocol()) == 1_157
