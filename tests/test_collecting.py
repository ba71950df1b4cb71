"""Collecting open speech: git repositories made here, and everything that can be wrong with them."""

import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile

from deepfake_utils.collecting import collect, read_sources, synthesise
from deepfake_utils.collecting.collect import KEPT
from deepfake_utils.collecting.sources import small_part
from deepfake_utils.collecting.speech import speech_seconds
from deepfake_utils.conventions import CorpusError
from deepfake_utils.corpora import find_corpora
from deepfake_utils.waveforms.decode import read_audio

COMMIT_AS = ("git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main")


def voice(seconds: float, seed: int) -> np.ndarray:
    """Something with a moving pitch, int16 at 16 kHz."""
    t = np.arange(int(16000 * seconds)) / 16000
    phase = 2 * np.pi * np.cumsum(120 + 10 * seed + 30 * np.sin(5 * t)) / 16000
    return (6000 * sum(np.sin(k * phase) / k for k in range(1, 12))).astype(np.int16)


@pytest.fixture
def mirrors(tmp_path):
    """A folder with two repositories, and the list of what is in them."""
    rows = []
    noise = (3000 * np.random.default_rng(0).standard_normal(16000)).astype(np.int16)
    files = {
        "a/one": {"r1.wav": voice(1, 1), "r2.wav": voice(1, 2), "again.flac": voice(1, 1), "noise.wav": noise},
        "b/two": {"f1.wav": voice(1, 3), "f2.wav": voice(1, 4)},
    }
    for source, clips in files.items():
        folder = tmp_path / "mirrors" / f"{source}.git"
        folder.mkdir(parents=True)
        for name, samples in clips.items():
            soundfile.write(folder / name, samples, 16000)
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
            subprocess.run([*COMMIT_AS, *command], cwd=folder, check=True)
        subprocess.run(["git", "config", "uploadpack.allowAnySHA1InWant", "true"], cwd=folder, check=True)
        subprocess.run(["git", "config", "uploadpack.allowFilter", "true"], cwd=folder, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
        for name in clips:
            data = (folder / name).read_bytes()
            label = "bonafide" if source == "a/one" else "spoof"
            rows.append({
                "source": source, "commit": commit.stdout.strip(), "path": name,
                "hash": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()[:16], "bytes": len(data),
                "seconds": 1.0, "label": label, "family": source, "speaker": "", "licence": "MIT", "note": "",
                "split": "train",
            })  # fmt: skip
    return tmp_path / "mirrors", pd.DataFrame(rows)


def test_duplicates_and_noise_are_left_out_and_the_corpus_is_found(mirrors, tmp_path):
    folder, sources = mirrors
    said = []
    manifest = collect(tmp_path / "out", mirrors=folder, sources=sources, say=said.append)
    assert len(manifest) == 4 and set(manifest["label"]) == {"bonafide", "spoof"}
    assert any("same samples" in line for line in said) and any("of speech" in line for line in said)
    protocol = find_corpora(tmp_path / "out")[0].protocol()
    assert len(protocol) == 4 and soundfile.info(protocol["path"][0]).samplerate == 16000


def test_fetched_files_are_those_of_a_mirror(mirrors, tmp_path):
    folder, sources = mirrors
    near = collect(tmp_path / "near", mirrors=folder, sources=sources, say=str)
    far = collect(tmp_path / "far", origin=f"file://{folder}", sources=sources, say=str)
    assert near.equals(far) and not any((tmp_path / "far" / ".repositories").iterdir())


def test_a_gone_source_and_a_changed_file_are_named_and_the_rest_goes_on(mirrors, tmp_path):
    folder, sources = mirrors
    sources.loc[0, "hash"] = "0" * 16
    sources.loc[sources["source"] == "b/two", "source"] = "b/gone"
    said = []
    manifest = collect(tmp_path / "out", origin=f"file://{folder}", sources=sources, say=said.append)
    assert len(manifest) == 2
    assert any("b/gone" in line for line in said) and any("changed since" in line for line in said)


def test_a_run_killed_within_a_line_goes_on(mirrors, tmp_path):
    folder, sources = mirrors
    whole = collect(tmp_path / "out", mirrors=folder, sources=sources, say=str)
    journal = tmp_path / "out" / "collected.csv"
    text = journal.read_bytes()
    journal.write_bytes(text[: text.index(KEPT.encode()) + 6])
    again = collect(tmp_path / "out", mirrors=folder, sources=sources, say=str)
    assert again.equals(whole)


def test_nothing_at_all_is_an_error(mirrors, tmp_path):
    _, sources = mirrors
    with pytest.raises(CorpusError, match="no recording"):
        collect(tmp_path / "out", origin=f"file://{tmp_path}/nowhere", sources=sources, say=str)


def test_copies_lie_beside_their_originals_and_differ_in_nothing_but_the_vocoder(mirrors, tmp_path, monkeypatch):
    room = sys.modules[synthesise.__module__]

    def halved(waveform, rng):
        return 0.5 * waveform, 16_000

    folder, sources = mirrors
    before = collect(tmp_path / "out", mirrors=folder, sources=sources, say=str)
    monkeypatch.setattr(room, "ENGINES", {"halved": room.Engine(halved, lambda: True, speaks=False, copy_s=0.6)})
    rows = synthesise(tmp_path / "out", 2, say=str)
    assert list(rows["label"]) == ["bonafide", "spoof"] * 2 and list(rows["family"]) == ["-", "halved"] * 2
    assert set(rows["source"]) == {"synthesised/halved"} and set(rows["split"]) == {"train"}
    clips = [read_audio(tmp_path / "out" / path) for path in rows["path"]]
    for original, copy in zip(clips[::2], clips[1::2], strict=True):
        assert len(original) == 9_600 and np.abs(original).max() > 0.01
        np.testing.assert_allclose(copy, original / 2, rtol=0, atol=1 / 32768)
    assert rows["path"].iloc[0] != rows["path"].iloc[2] and not np.array_equal(clips[0], clips[2])
    after = collect(tmp_path / "out", mirrors=folder, sources=sources, say=str)
    assert len(after) == len(before) + 4
    # Originals are not copied again, so that a second call finds everything made, and reads no recording.
    monkeypatch.setattr(room, "read_audio", None)
    assert synthesise(tmp_path / "out", 2, say=str).equals(rows)
    assert collect(tmp_path / "out", mirrors=folder, sources=sources, say=str).equals(after)


def test_engines_are_chosen_by_name_and_clips_of_earlier_calls_stay(mirrors, tmp_path, monkeypatch):
    room = sys.modules[synthesise.__module__]

    def attenuated(waveform, rng):
        return 0.5 * waveform, 16_000

    folder, sources = mirrors
    collect(tmp_path / "out", mirrors=folder, sources=sources, say=str)
    engines = {name: room.Engine(attenuated, lambda: True, speaks=False) for name in ("one", "two")}
    engines["absent"] = room.Engine(attenuated, lambda: False, speaks=False)
    monkeypatch.setattr(room, "ENGINES", engines)
    for name in ("one", "two"):
        assert set(synthesise(tmp_path / "out", 2, engines=[name], say=str)["source"]) == {f"synthesised/{name}"}
    made = pd.read_csv(tmp_path / "out" / "synthesised.csv")
    assert sorted(made["family"]) == ["-"] * 4 + ["one"] * 2 + ["two"] * 2 and made["path"].is_unique
    with pytest.raises(CorpusError, match="no engine absent here: expected some of one, two"):
        synthesise(tmp_path / "out", 2, engines=["one", "absent"], say=str)


def test_an_engine_s_files_come_out_of_a_repository_or_are_missed_by_name(mirrors, tmp_path):
    room = sys.modules[synthesise.__module__]
    folder, sources = mirrors
    row = sources.iloc[0]
    content = room.Files(row["source"], row["commit"], (row["path"],)).read(folder)[row["path"]]
    assert content.startswith(b"RIFF") or content.startswith(b"fLaC")
    with pytest.raises(CorpusError, match="without models/none.tflite"):
        room.Files(row["source"], row["commit"], ("models/none.tflite",)).read(folder)


def test_collecting_killed_by_the_system_goes_on_and_makes_the_same_corpus(mirrors, tmp_path):
    folder, sources = mirrors
    whole = collect(tmp_path / "whole", mirrors=folder, sources=sources, say=str)
    sources.to_csv(tmp_path / "sources.csv", index=False)
    code = (
        "import os, signal, sys, pandas as pd; from deepfake_utils.collecting import collect as c\n"
        "room = sys.modules[c.__module__]\n"
        "write, left = room.write_flac, [2]\n"
        "def dying(path, samples):\n"
        "    write(path, samples); left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "room.write_flac = dying\n"
        f"c({os.fspath(tmp_path / 'out')!r}, mirrors={os.fspath(folder)!r}, "
        f"sources=pd.read_csv({os.fspath(tmp_path / 'sources.csv')!r}, keep_default_na=False), say=str)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.csv").exists()
    assert collect(tmp_path / "out", mirrors=folder, sources=sources, say=str).equals(whole)


def test_the_list_keeps_families_and_speakers_in_one_split():
    sources = read_sources()
    speech = sources[sources["label"].isin(("bonafide", "spoof"))]
    assert speech.groupby("source")["split"].nunique().max() == 1
    assert speech[speech["label"] == "spoof"].groupby("family")["split"].nunique().max() == 1
    assert speech[speech["speaker"] != ""].groupby("speaker")["split"].nunique().max() == 1
    assert speech[speech["label"] == "spoof"]["family"].nunique() >= 100
    assert (read_sources("stated")["licence"] != "none stated").all()


def test_tones_and_silence_are_no_speech():
    tone = (8000 * np.sin(2 * np.pi * 200 * np.arange(16000) / 16000)).astype(np.int16)
    assert speech_seconds(tone) == 0 and speech_seconds(np.zeros(16000, np.int16)) == 0
    assert speech_seconds(voice(1, 1)) > 0.5


def test_a_small_part_has_both_labels_in_every_split():
    part = small_part(read_sources("stated"), 20_000_000)
    counts = part.groupby(["split", "label"]).size()
    assert len(counts) == 6 and counts.min() >= 15 and part["bytes"].sum() <= 20_000_000
