"""Scoring on a Ray cluster: real nodes, real kills, and every recording exactly once."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import soundfile

ray = pytest.importorskip("ray", reason="the extra fleet is not installed")
fleet = pytest.importorskip("deepfake_utils.serving.fleet", reason="the extra fleet is not installed")

from deepfake_utils import Detector  # noqa: E402
from deepfake_utils.__main__ import main  # noqa: E402
from deepfake_utils.conventions import AudioError, ConfigError  # noqa: E402
from deepfake_utils.scoring.verdict import ROW_COLUMNS  # noqa: E402
from tests.ray_cluster import two_nodes  # noqa: E402
from tests.service import babble  # noqa: E402

N_COPIES = 24


@pytest.fixture(scope="module")
def cluster():
    with two_nodes() as environment:
        yield environment


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Speech in many copies, and what cannot be read."""
    folder = tmp_path_factory.mktemp("recordings")
    for seed in range(5):
        first = folder / f"{seed}-0.flac"
        soundfile.write(first, babble(3 + seed, seed), 16_000)
        for copy in range(1, N_COPIES):
            shutil.copy(first, folder / f"{seed}-{copy}.flac")
    soundfile.write(folder / "silence.wav", np.zeros(32_000, np.int16), 16_000)
    (folder / "empty.flac").touch()
    (folder / "no-audio.wav").write_text("<html>")
    (folder / "cut-off.flac").write_bytes((folder / "0-0.flac").read_bytes()[:40])
    return folder


def test_a_cluster_that_does_not_answer_is_named_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(fleet.FleetError, match=f"RAY_ADDRESS={address} .*refused"):
        fleet.connect()


class Driver:
    """The command in a process of its own."""

    def __init__(self, *words, environment):
        command = [sys.executable, "-m", "deepfake_utils", "score", *map(str, words)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out.decode(), err.decode()


def parts(folder: Path) -> dict[Path, int]:
    """Every part that is there, with the time it was written."""
    return {path: path.stat().st_mtime_ns for path in (folder / "verdicts").glob("*.parquet")}


def wait_for_parts(n: int, folder: Path, driver: Driver) -> None:
    end = time.monotonic() + 200
    while len(parts(folder)) < n:
        assert driver.process.poll() is None and time.monotonic() < end, driver.end() if driver.process.poll() else n
        time.sleep(0.02)


def workers() -> list[psutil.Process]:
    """Those that look at recordings, on all nodes."""
    return [p for p in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(p.info["cmdline"] or ())]


def test_killed_worker_and_killed_driver_lose_nothing_and_nothing_comes_twice(cluster, recordings, tmp_path, capsys):
    out = tmp_path / "out"
    first = Driver(recordings, "--fleet", out, environment=cluster)
    wait_for_parts(4, out, first)
    killed = workers()[0]
    killed.kill()
    wait_for_parts(len(parts(out)) + 8, out, first)
    first.process.kill()
    first.end()
    before = parts(out)
    assert not (out / "unreadable.csv").exists()

    code, said, errors = Driver(recordings, "--fleet", out, environment=cluster).end()
    assert code == 1, errors  # done, but for some that are unreadable
    assert before.items() <= parts(out).items(), "what was done before is not done again"
    found = pd.read_parquet(out / "verdicts")
    expected = Detector.load().score(recordings, progress=None)
    assert list(found) == list(ROW_COLUMNS)
    assert found["path"].tolist() == expected["path"].tolist(), "each once, in order"
    assert found["verdict"].tolist() == expected["verdict"].tolist()
    for name in ("log_odds", "probability_fake", "speech_s", "duration_s", "logit_spoof"):
        np.testing.assert_allclose(found[name].astype(float), expected[name].astype(float), atol=1e-4)
    counts = Counter(expected["verdict"])
    assert counts["unreadable"] == 3 and all(f"{n} {word}" in said for word, n in counts.items())
    unreadable = pd.read_csv(out / "unreadable.csv")
    assert [Path(path).name for path in unreadable["path"]] == ["cut-off.flac", "empty.flac", "no-audio.wav"]
    assert unreadable["reason"].str.len().min() > 10
    assert sorted(path.name for path in (out / "verdicts").iterdir()) == sorted(path.name for path in parts(out))

    whole = parts(out)
    assert main(["score", str(recordings), "--fleet", str(out)]) == 1  # nothing is left to do
    assert capsys.readouterr().out == said and parts(out) == whole
    assert main(["score", str(recordings), "--use", "forensic", "--fleet", str(out)]) == 2
    assert "other use" in capsys.readouterr().err


class Deadly:
    """In place of a detector: one recording ends the process that reads it."""

    def verdicts(self, paths):
        for path in paths:
            if path.name == "c.flac":
                os._exit(9)
            yield AudioError(f"{path.name} was looked at")


def test_a_recording_that_ends_every_worker_is_left_out_and_named(tmp_path):
    paths = [str(tmp_path / f"{letter}.flac") for letter in "abcdef"]
    target, ends = tmp_path / "part-000000.parquet", []
    for _ in range(4):
        if not (worker := os.fork()):
            fleet.judge_part(Deadly(), target, paths)
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
    assert ends == [9, 9, 9, 0]
    found = pd.read_parquet(target)
    assert found["path"].tolist() == paths
    assert found["reason"].str.endswith("was looked at").tolist() == [True, True, False, True, True, True]
    assert "died" in found["reason"][2] and list(tmp_path.iterdir()) == [target]


def test_a_list_names_each_recording_once_and_need_not_be_right(tmp_path):
    names = tmp_path / "all.txt"
    names.write_bytes("b.wav\r\nsub/a b.flac\n\n/elsewhere/c\u2028.wav\nb.wav\n".encode() + b"caf\xe9.wav\n")
    found = fleet.listed([names])
    here = [str(tmp_path / name) for name in ("b.wav", "sub/a b.flac", "caf\udce9.wav")]
    assert found == [*here[:2], "/elsewhere/c\u2028.wav", here[2]]
    with pytest.raises(AudioError, match="standard input"):
        fleet.listed(["-"])


def test_columns_have_one_type_whatever_is_missing(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    table = fleet.as_table([{"path": name, "verdict": "unreadable", "reason": f"{name} is empty", "warnings": ""}])
    table.to_parquet(tmp_path / "one.parquet")
    read = pd.read_parquet(tmp_path / "one.parquet")
    assert read["path"][0] == "caf\\xe9.wav" and read["score"].dtype == float and read["n_windows"].isna().all()


def test_two_runs_do_not_share_a_folder(tmp_path, recordings):
    (tmp_path / "verdicts").mkdir()
    with fleet.alone_in(tmp_path, "taken"), pytest.raises(ConfigError, match="another run"):
        fleet.score_fleet([recordings], tmp_path)
