"""Whole retrainings with real processes: killed and gone on, promoted, rolled back."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

import deepfake_utils.serving
from deepfake_utils import Detector, find_corpora
from deepfake_utils.__main__ import main
from deepfake_utils.conventions import SPLITS
from deepfake_utils.demo import build_demo
from deepfake_utils.serving import drift
from deepfake_utils.serving.feedback import (
    ACCEPTED,
)
from deepfake_utils.serving.records import Records
from deepfake_utils.serving.retraining import Retraining
from deepfake_utils.serving.versions import POINTER, Versions
from tests.conftest import REPOSITORY
from tests.small_retraining import EASY_RULES, give_feedback, train_base, write_notebooks, write_rules

RULES = tomllib.loads((Path(deepfake_utils.serving.__file__).parent / "rules.toml").read_text())


def pointer(versions: Versions) -> str:
    return json.loads((versions.folder / POINTER).read_text())["version"]


# A whole retraining: real processes, a small corpus, notebooks of a few lines.

DEATHS = ("believe", "train", "compare")  # after deciding what to learn, having learned it, and just before a decision
DIES_AFTER = """
import os, signal, sys
from deepfake_utils.__main__ import main
from deepfake_utils.serving.retraining import Retraining
step = sys.argv[1]
real = getattr(Retraining, step, None)
def last(self):
    real(self)
    os.kill(os.getpid(), signal.SIGKILL)
if real:
    setattr(Retraining, step, last)
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base that hardly learned anything, and feedback of two honest clients and of one who turns labels round."""
    folder = tmp_path_factory.mktemp("service")
    base = build_demo(folder / "demo", scale=0.2)
    train_base(folder / "base", base, epochs=1, learning_rate=1e-5)
    write_notebooks(folder / "notebooks")
    write_rules(folder / "rules.toml", RULES, largest_share=0.5, **EASY_RULES)
    heard = pd.concat(build_demo(folder / "heard", seed=1, scale=0.2).protocol(split) for split in ("dev", "eval"))
    records = Records(f"sqlite:///{folder}/records.sqlite")
    give_feedback(records, folder / "kept", heard[::2], "ann")
    give_feedback(records, folder / "kept", heard[1::2], "bob")
    give_feedback(records, folder / "kept", heard[:12], "eve", flipped=True)
    return folder


def command(place: Path, models: str = "models") -> list[str]:
    return [
        "retrain", "--feedback", f"sqlite:///{place}/records.sqlite", "--base", str(place / "base"), "--models",
        str(place / models), "--notebooks", str(place / "notebooks"), "--rules", str(place / "rules.toml"),
        "-p", "epochs", "4",
    ]  # fmt: skip


def test_a_retraining_killed_again_and_again_ends_as_one_that_ran_through(place):
    changed = {}
    for step in (*DEATHS, "none"):
        process = [sys.executable, "-c", DIES_AFTER, step, *command(place)]
        done = subprocess.run(process, capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == (0 if step == "none" else -9), done.stderr
        written = {path: path.stat().st_mtime_ns for path in place.glob("models/retrainings/1/*.*")}
        assert changed.items() <= written.items()  # nothing is done twice
        changed = written
    versions = Versions(place / "models")
    assert [line["event"] for line in versions.history()] == ["installed", "promoted"]
    assert pointer(versions) == versions.current["version"] and pointer(versions).startswith("0001-")
    assert "takes over from base-" in done.stdout and "held-out feedback: EER" in done.stdout
    found = pd.read_csv(place / "models" / "retrainings" / "1" / "feedback.csv")
    assert set(found.loc[found["outcome"] == ACCEPTED, "client"]) == {"ann", "bob"}
    detector = Detector.load(versions.current["weights"])
    assert detector.is_calibrated and len(drift.read_reference(versions.current["weights"])) > 0


def test_a_rollback_of_nothing_leaves_nothing_behind(tmp_path, capsys):
    assert main(["rollback", "--models", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_rollback_is_one_command_and_a_finished_retraining_does_not_come_back(place, capsys):
    versions = Versions(place / "models")
    assert main(["rollback", "--models", str(place / "models")]) == 0
    assert "base-" in capsys.readouterr().out and pointer(versions).startswith("base-")
    assert versions.history()[-1]["event"] == "rolled back"
    assert main(command(place)) == 0 and "no confirmed feedback since retraining 1" in capsys.readouterr().out
    assert pointer(versions).startswith("base-") and not (place / "models" / "retrainings" / "2").exists()
    assert main(["rollback", "--models", str(place / "models")]) == 2
    assert "no version to go back to" in capsys.readouterr().err


def test_a_retraining_goes_on_only_as_it_began(place, capsys):
    models = place / "other"
    (models / "retrainings" / "1").mkdir(parents=True)
    settings = json.loads((place / "models" / "retrainings" / "1" / "settings.json").read_text())
    (models / "retrainings" / "1" / "settings.json").write_text(json.dumps(settings | {"parameters": {"epochs": "9"}}))
    assert main(command(place, "other")) == 2
    assert "began with other settings (parameters)" in capsys.readouterr().err


def test_test_sets_that_changed_are_refused(place, capsys):
    versions = Versions(place / "changed")
    name = find_corpora(place / "demo")[0].name
    versions.take_over("installed", "w.safetensors", "base", frozen={f"eval of {name}": "another"})
    code = main(command(place, "changed"))
    said = capsys.readouterr().err
    assert code == 2 and "is not what it was" in said, said


def test_labels_turned_round_by_one_client_do_not_pass_the_gate(tmp_path, capsys, monkeypatch):
    """All that stands before the gate is switched off: a good base, and one client whose every label is a lie."""
    base = build_demo(tmp_path / "demo", scale=0.3)
    train_base(tmp_path / "base", base, epochs=8)

    def train(retraining) -> None:  # as the notebooks do, without their kernels
        train_base(retraining.folder / "run", find_corpora(retraining.folder / "corpus")[0], epochs=4)

    monkeypatch.setattr(Retraining, "train", train)
    unguarded = {"contradiction_log_odds": 1e9, "largest_share": 9, "held_out_share": 0}
    rules = write_rules(tmp_path / "rules.toml", RULES, **EASY_RULES | unguarded | {"largest_loss": 0.25})
    heard = pd.concat(build_demo(tmp_path / "heard", seed=1, scale=0.2).protocol(split) for split in SPLITS)
    url, models = f"sqlite:///{tmp_path}/records.sqlite", tmp_path / "models"
    give_feedback(Records(url), tmp_path / "kept", heard, "mallory", flipped=True)
    code = main([
        "retrain", "--feedback", url, "--base", str(tmp_path / "base"), "--models", str(models), "--rules", str(rules),
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    found = pd.read_csv(models / "retrainings" / "1" / "feedback.csv")
    assert (found["outcome"] == ACCEPTED).all() and len(found) == len(heard)
    first = pd.read_csv(models / "retrainings" / "1" / "comparison.csv").iloc[0]
    assert first["set"] == "eval of demo" and first["measure"] == "EER"
    assert first["difference"] > 0.1, "what it learned from the lies shows on the frozen test set"
    last = Versions(models).history()[-1]
    assert last["event"] == "refused" and "a loss of more than 25 points is not excluded" in last["reasons"][0]
    assert pointer(Versions(models)).startswith("base-")
