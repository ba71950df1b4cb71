"""Feedback that teaches, versions that take over and go back, and what may not get through."""

import json
import subprocess
import sys

import pytest

from deepfake_utils.conventions import CheckpointError, ConfigError
from deepfake_utils.serving.versions import LOG, POINTER, Versions


def pointer(versions: Versions) -> str:
    return json.loads((versions.folder / POINTER).read_text())["version"]


# Which weights are in service.


def test_versions_take_over_and_go_back_in_turn(tmp_path):
    versions = Versions(tmp_path / "models")
    for event, name in (("installed", "a"), ("promoted", "b"), ("promoted", "c")):
        versions.take_over(event, f"{name}.safetensors", name, reasons=["better"])
        assert pointer(versions) == name
    assert versions.roll_back()["version"] == pointer(versions) == "b"
    versions.take_over("promoted", "d.safetensors", "d")
    assert [versions.roll_back()["version"] for _ in range(2)] == ["b", "a"]
    with pytest.raises(CheckpointError, match="no version to go back to"):
        versions.roll_back()
    assert pointer(versions) == "a"
    events = [(line["event"], line["version"]) for line in versions.history()]
    assert events[-3:] == [("promoted", "d"), ("rolled back", "b"), ("rolled back", "a")] and len(events) == 7


def test_a_torn_line_is_no_decision_and_is_replaced_by_the_next(tmp_path):
    versions = Versions(tmp_path)
    versions.take_over("installed", "a.safetensors", "a")
    with (tmp_path / LOG).open("a") as log:
        log.write('{"at": "2026", "event": "promoted", "weights": "b.safetensors", "vers')
    assert versions.current["version"] == "a"
    versions.take_over("promoted", "c.safetensors", "c")
    assert [line["version"] for line in versions.history()] == ["a", "c"]


def test_a_pointer_left_behind_catches_up_with_the_log(tmp_path):
    versions = Versions(tmp_path)
    versions.take_over("installed", "a.safetensors", "a")
    versions.note("promoted", weights="b.safetensors", version="b")  # and here the process died
    assert pointer(versions) == "a"
    with Versions(tmp_path).locked():
        assert pointer(versions) == "b"


def test_one_process_at_a_time(tmp_path):
    with (
        Versions(tmp_path).locked(),
        pytest.raises(ConfigError, match="in use by another"),
        Versions(tmp_path).locked(),
    ):
        pass


KILLED_AT = """
import os, signal, sys
from deepfake_utils.serving import versions
calls = [0]
def dying(real):
    def call(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    return call
for name in ("fsync", "replace"):
    setattr(os, name, dying(getattr(os, name)))
versions.Path.replace = dying(versions.Path.replace)
with versions.Versions(sys.argv[1]).locked() as folder:
    folder.take_over("promoted", "b.safetensors", "b")
"""


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_promotion_killed_at_any_write_is_whole_or_absent(tmp_path, call):
    versions = Versions(tmp_path)
    versions.take_over("installed", "a.safetensors", "a")
    done = subprocess.run([sys.executable, "-c", KILLED_AT, str(tmp_path), str(call)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert pointer(versions) in ("a", "b")
    with Versions(tmp_path).locked():
        assert pointer(versions) == versions.current["version"]
    versions.take_over("promoted", "c.safetensors", "c")
    assert pointer(versions) == "c"
