"""Files: what is listed, what text is understood, and which names mean the same recording."""

import gzip
import os

import pytest

from deepfake_utils import files
from deepfake_utils.conventions import AUDIO_SUFFIXES, AudioError, ConfigError, CorpusError, ScoreError
from deepfake_utils.evaluation.scorefile import read_scores
from deepfake_utils.protocols import read_keys
from deepfake_utils.waveforms.decode import read_audio

LISTED = ("a.wav", "b/c.FLAC", "b/d.mp4", "b/{e} f.opus", "z.mka")


def test_videos_and_rare_formats_are_on_the_one_list():
    assert {".mp4", ".mov", ".3gp", ".caf", ".mka", ".mkv", ".amr", ".au", ".w64", ".wv"} <= set(AUDIO_SUFFIXES)
    assert AUDIO_SUFFIXES[:2] == (".flac", ".wav") and len(set(AUDIO_SUFFIXES)) == len(AUDIO_SUFFIXES)


def test_recordings_are_listed_once_in_order_and_the_rest_is_counted(tmp_path):
    for name in (*LISTED, ".hidden.wav", "b/._c.flac", "__MACOSX/a.wav", ".git/x.wav", "notes.txt", "b/README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.wav")
    found, passed_over = files.list_audio(tmp_path)
    assert sorted(os.path.relpath(path, tmp_path) for path in found) == sorted(LISTED)
    assert passed_over == {".txt": 1, "no suffix": 1, "broken link": 1, "pipe or device": 1}
    assert "passed over 4 files" in files.describe_passed_over(passed_over)
    assert files.describe_passed_over(files.list_audio(tmp_path / "nowhere")[1]) == ""


def test_what_is_written_replaces_files_and_nothing_else(tmp_path):
    (tmp_path / "kept.txt").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "kept.txt")
    with files.atomic_write(tmp_path / "link") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "kept.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "is a device or a pipe"), ("", "is a folder: name a file in it")):
        with pytest.raises(ConfigError, match=said), files.atomic_write(tmp_path / name):
            raise AssertionError("the block was entered")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.txt", "link", "pipe"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@pytest.mark.parametrize("content, said", [(POINTER, "is a Git LFS pointer.*git lfs pull"), (PAGE, "is a web page")])
def test_what_lies_there_instead_of_a_file_is_called_by_its_name(tmp_path, content, said):
    """Weights have it in test_checkpoint."""
    for name in ("a.flac", "b.wav", "c.mp3"):
        (tmp_path / name).write_bytes(content)
        for source in (tmp_path / name, content):
            with pytest.raises(AudioError, match=said):
                read_audio(source)
    (tmp_path / "scores.csv").write_bytes(content)
    with pytest.raises(ScoreError, match=said):
        read_scores(tmp_path / "scores.csv")
    with pytest.raises(CorpusError, match=said):
        read_keys(tmp_path / "scores.csv")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/d/x.wav", "/d/y.flac"], ["x", "y"]),
        (["a/x.wav", "b/x.wav", "b/y.wav"], ["a/x", "b/x", "b/y"]),
        (["a/x.wav", "a/x.mp3"], ["x.wav", "x.mp3"]),
        (["C:\\a\\x.wav", "C:\\b\\x.wav"], ["a/x", "b/x"]),
        (["LA_E_1", "x.y"], ["LA_E_1", "x.y"]),
        ([], []),
    ],
)
def test_short_names(paths, names):
    assert files.short_names(paths) == names


@pytest.mark.parametrize(
    ("wanted", "given", "matched"),
    [
        (["x", "y"], ["/d/y.wav", "/d/x.wav"], ["y", "x"]),
        (["real/1.wav", "fake/1.wav"], ["/mnt/fake/1.flac", "/mnt/real/1.flac"], ["fake/1.wav", "real/1.wav"]),
        (["a/x.wav", "a/x.mp3"], ["x.mp3", "x.wav"], ["a/x.mp3", "a/x.wav"]),
        (["a/x", "b/x"], ["x"], ["x"]),  # which of the two is not known
        (["x", "y"], ["x", "z"], ["x", "z"]),
        (["x"], ["X"], ["X"]),
    ],
)
def test_match_names(wanted, given, matched):
    assert files.match_names(wanted, given) == matched


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_text_is_read_however_it_was_saved(tmp_path, encoding, packed):
    content = "utterance,score\nä,1\n".encode(encoding)
    (tmp_path / "t").write_bytes(gzip.compress(content) if packed else content)
    assert files.read_text(tmp_path / "t", CorpusError) == "utterance,score\nä,1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a b\nc \xff\n", "line 2: not text in UTF-8"),
        ("a b\n".encode("utf-16-le"), "line 1: not text in UTF-8 .binary zero"),
        (gzip.compress(b"a b\n" * 99)[:-9], "gzip file that is damaged or cut off"),
        (b" \n", "is empty"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, message):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        files.read_text(tmp_path / "t", CorpusError)


def test_text_does_not_depend_on_the_locale(tmp_path):
    import subprocess
    import sys

    (tmp_path / "t").write_bytes("ä 1\n".encode())
    code = (
        "from deepfake_utils import files; from deepfake_utils.conventions import CorpusError;"
        f"assert files.read_rows({str(tmp_path / 't')!r}, CorpusError).fields == [['\\xe4', '1']]"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_rows_know_their_lines_and_quoted_fields_hold_anything(tmp_path):
    (tmp_path / "t.csv").write_text(
        '# said\n\nname,n\n"a\nb",1\n"c ""d"", {e}",2\n#1.wav,3\n# no name,4\n', encoding="utf-8"
    )
    rows = files.read_rows(tmp_path / "t.csv", CorpusError)
    assert rows.fields == [["name", "n"], ["a\nb", "1"], ['c "d", {e}', "2"], ["#1.wav", "3"]]
    assert rows.numbers == [3, 4, 6, 7] and rows.separator == "comma"


@pytest.mark.parametrize(
    ("line", "separator"),
    [("a 1.5", "whitespace"), ("a 1,5", "whitespace"), ("a,1.5", "comma"), ("a;1,5", "semicolon"), ("a;b,1.5", "comma"),
     ("a\t1,5", "tab"), ("my clip,1.5", "comma")],
)  # fmt: skip
def test_separators(tmp_path, line, separator):
    (tmp_path / "t").write_text(line + "\n")
    rows = files.read_rows(tmp_path / "t", CorpusError)
    assert rows.separator == separator and len(rows.fields[0]) == 2
