"""The command line as a script meets it: real processes, exit codes, what is printed where.

Refusals that differ only in the input call `main` in this process, since loading torch takes seconds.
"""

import csv
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from deepfake_utils import load_model, score_files
from deepfake_utils.__main__ import main
from deepfake_utils.commands import bar_of_seconds
from deepfake_utils.conventions import ConfigError
from deepfake_utils.evaluation.scorefile import read_scores
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.scoring.targets import build
from deepfake_utils.scoring.weights import save_weights

REPOSITORY = Path(__file__).resolve().parents[1]


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "deepfake_utils", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """The tester's own settings must not reach the process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DEEPFAKE_")}
    return kept | {"PYTHONPATH": str(REPOSITORY), "DEEPFAKE_CACHE": os.environ["DEEPFAKE_CACHE"]} | changes


def run(*arguments, cwd=None, **changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def run_here(capsys):
    """`run` without a process of its own, which would load torch again."""

    def call(*arguments) -> subprocess.CompletedProcess:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(capsys):
    """Checks that arguments end in exit code 2, nothing on standard output, and a text naming what is wrong."""

    def check(*arguments, said: str):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, error = capsys.readouterr()
        assert out == "" and said in error, error

    return check


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An untrained LCNN, saved the way training saves it, with a calibration."""
    facts = {"calibration": {"slope": 2.0, "offset": 0.5}}
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    return save_weights(path, load_model("lfcc-lcnn"), name="lfcc-lcnn", facts=facts)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with two bona fide recordings and one spoof."""
    root = tmp_path_factory.mktemp("alone") / "corpus"
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 8000))
    for name, samples in zip(("bonafide/a.wav", "bonafide/b.flac", "spoof/c.wav"), noise, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, samples, 16000)
    return root


@pytest.fixture
def score_case(tmp_path) -> tuple[Path, Path]:
    """Scores and keys of six trials worked by hand: one of three on each side is wrong, so EER is 1/3."""
    scores, keys = tmp_path / "scores.txt", tmp_path / "keys.csv"
    values = dict(zip("abcdef", (0.1, 0.2, 0.6, 0.5, 0.8, 0.9), strict=True))
    scores.write_text("".join(f"{name} {value}\n" for name, value in values.items()))
    rows = "".join(f"{n},{'spoof' if n < 'd' else 'bonafide'},{'A1' if n < 'd' else '-'}\n" for n in values)
    keys.write_text("utterance,label,attack\n" + rows)
    return scores, keys


def test_help_names_every_command_and_option():
    assert all(word in run("--help").stdout for word in ("find", "score", "evaluate"))
    assert all(
        o in run("score", "--help").stdout for o in ("--weights", "--model", "--out", "--onnx", "--use", "--csv")
    )
    options = ("--protocol", "--asv-scores", "--json", "--by", "--higher-is", "--phase", "--html")
    assert all(option in run("evaluate", "--help").stdout for option in options)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "score | evaluate"),
        (("trian",), "trian"),
        (("score", "x.wav", "--use", "court"), "forensic"),
        (("score", "x.wav", "--weights", "w", "--onnx", "o"), "not allowed with"),
        (("evaluate", "s.txt"), "--protocol"),
        (("evaluate", "s.txt", "--protocol", "p", "--higher-is", "fake"), "fake"),
        (("evaluate", "s.txt", "--protocol", "p", "--n-bootstrap", "many"), "many"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_one_line(arguments, said):
    done = run(*arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert said in done.stderr


def test_bad_input_ends_the_process_without_a_traceback(tmp_path):
    done = run("evaluate", tmp_path / "absent.txt", "--protocol", tmp_path / "absent.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("deepfake_utils: ") and "absent.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_find_counts_trials(corpus):
    done = run("find", corpus)
    assert done.returncode == 0, done.stderr
    assert str(corpus) in done.stdout
    assert "2 bonafide" in done.stdout and "1 spoof" in done.stdout


def test_find_looks_in_the_usual_places(corpus, tmp_path):
    assert "2 bonafide" in run("find", cwd=tmp_path, DEEPFAKE_DATA=str(corpus)).stdout
    assert "2 bonafide" in run("find", cwd=tmp_path, DEEPFAKE_KAGGLE_INPUT=str(corpus.parent)).stdout


def test_find_counts_what_it_passes_over_in_one_line(tmp_path, run_here):
    for name in ("real/a.wav", "fake/b.mp4", "fake/notes.txt", "fake/._b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    done = run_here("find", tmp_path)
    assert "1 bonafide" in done.stdout and "1 spoof" in done.stdout
    assert done.stderr.startswith("note: ") and "passed over 1 file" in done.stderr and done.stderr.count("\n") == 1


def test_find_says_where_it_looked(tmp_path, refused):
    refused("find", tmp_path, said=str(tmp_path))
    refused("find", tmp_path / "absent", said="absent")


def test_find_names_missing_audio(corpus, reference_data, tmp_path):
    protocols = "LA/ASVspoof2019_LA_cm_protocols"
    source = reference_data / "asvspoof2019_subset"
    (tmp_path / protocols).mkdir(parents=True)
    (tmp_path / "LA/ASVspoof2019_LA_dev/flac").mkdir(parents=True)
    name = "ASVspoof2019.LA.cm.dev.trl.txt"
    lines = (source / protocols / name).read_text().splitlines()[:3]
    (tmp_path / protocols / name).write_text("\n".join(lines) + "\n")
    utterance = lines[0].split()[1]
    recording = f"LA/ASVspoof2019_LA_dev/flac/{utterance}.flac"
    (tmp_path / recording).write_bytes((source / recording).read_bytes())
    assert "audio missing: 2" in run("find", tmp_path).stdout


def test_the_first_windows_scores_are_the_models_logits(corpus, weights, run_here):
    done = run_here(
        "score", corpus / "bonafide", corpus / "spoof" / "c.wav", "--weights", weights, "--first-window", "--out", "-"
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert list(rows[0]) == ["path", "score", "logit_spoof", "logit_bonafide", "duration_s"]
    assert [Path(row["path"]).name for row in rows] == ["a.wav", "b.flac", "c.wav"]
    assert all(float(row["duration_s"]) == 0.5 for row in rows)
    expected = score_files(corpus / "spoof", load_model(weights=weights), progress=None).iloc[0]
    assert float(rows[2]["logit_spoof"]) == pytest.approx(expected["logit_spoof"], abs=1e-3)
    assert float(rows[2]["logit_bonafide"]) == pytest.approx(expected["logit_bonafide"], abs=1e-3)
    log_odds = 2 * (expected["logit_bonafide"] - expected["logit_spoof"]) + 0.5
    assert float(rows[2]["score"]) == pytest.approx(log_odds, abs=1e-2)


def test_a_stranger_reads_verdict_probability_and_what_they_assume(weights, reference_data, tmp_path):
    speech = next((reference_data / "open_speech/bonafide/ljspeech").glob("*.flac"))
    soundfile.write(tmp_path / "silence.wav", np.zeros(80_000), 16_000)
    done = run("score", speech, tmp_path / "silence.wav", "--weights", weights, "--use", "call-centre")
    assert done.returncode == 0, done.stderr
    header, first, second, why = done.stdout.splitlines()
    assert header.split()[:4] == ["verdict", "probability", "of", "fake"]
    assert first.split()[0] in ("real", "fake") and "% (if 0.1 % are fake)" in first and first.endswith(speech.name)
    assert second.startswith("no verdict") and "no speech was found" in why
    assert "0.1 % of the recordings are fake" in done.stderr
    assert "a fake accepted as real costs as much as 100 real ones rejected as fake" in done.stderr


def test_every_output_holds_every_recording(weights, reference_data, tmp_path, run_here):
    paths = sorted((reference_data / "open_speech/bonafide/ljspeech").glob("*.flac"))[:2]
    (tmp_path / "in").mkdir()
    for name, path in zip(("a.flac", 'line\nbreak {x}, "q".flac'), paths, strict=True):
        (tmp_path / "in" / name).symlink_to(path)
    odd = os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.flac")
    os.symlink(paths[0], odd)
    (tmp_path / "in" / "zz.wav").write_bytes(b"RIFF, but no wave")
    targets = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "timeline", "out")}
    options = [part for kind, path in targets.items() for part in (f"--{kind}", path)]
    done = run_here("score", tmp_path / "in", "--weights", weights, *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    names = [str(tmp_path / "in" / "a.flac"), odd, str(tmp_path / "in" / "line\nbreak {x}, \"q\".flac"),
             str(tmp_path / "in" / "zz.wav")]  # fmt: skip
    with targets["csv"].open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["path"] for row in rows] == names and rows[-1]["verdict"] == "unreadable"
    objects = json.loads(targets["json"].read_text())
    assert [row["path"] for row in objects] == names
    assert [len(row["windows"]) for row in objects] == [int(row["n_windows"] or 0) for row in rows]
    with targets["timeline"].open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        windows = list(csv.DictReader(lines))
    assert len(windows) == sum(len(row["windows"]) for row in objects) >= 3
    scores = read_scores(targets["out"])
    assert len(scores.frame) == 3 and "log-odds" in scores.meta["score"] and scores.meta["n_trials"] == 3
    assert r"caf\xe9.flac" in done.stdout and r"line\nbreak" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.out.json", *(p.name for p in targets.values())}


def test_json_on_standard_output_is_one_array(corpus, weights, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but no wave")
    done = run("score", corpus, tmp_path, "--weights", weights, "--first-window", "--json", "-")
    assert [row["verdict"] == "unreadable" for row in json.loads(done.stdout)] == [False, False, False, True]


def test_a_recording_is_drawn_over_time(weights, reference_data, tmp_path, run_here):
    path = next((reference_data / "open_speech/bonafide/ljspeech").glob("*.flac"))
    done = run_here("score", path, "--pictures", tmp_path / "pictures")
    assert done.returncode == 0, done.stderr
    [picture] = (tmp_path / "pictures").iterdir()
    assert picture.name == f"{path.stem}.png" and picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_passed_over_in_a_folder_is_counted_aloud(corpus, weights, tmp_path, run_here):
    for name in ("a.wav", "b.MP4", ".hidden.wav", "c.txt", "d.pdf", "__MACOSX/e.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((corpus / "bonafide" / "a.wav").read_bytes())
    (tmp_path / "gone.wav").symlink_to("nowhere")
    done = run_here("score", tmp_path, "--weights", weights, "--first-window", "--csv", "-")
    assert [Path(row["path"]).name for row in csv.DictReader(io.StringIO(done.stdout))] == ["a.wav", "b.MP4"]
    assert "passed over 3 files" in done.stderr and ".pdf" in done.stderr and "2 of 2 recordings" in done.stderr


def test_names_with_dashes_broken_links_and_standard_input(corpus, weights, tmp_path):
    content = (corpus / "bonafide" / "a.wav").read_bytes()
    (tmp_path / "-dash.wav").write_bytes(content)
    (tmp_path / "gone.wav").symlink_to("nowhere")
    line = command("score", "-dash.wav", "gone.wav", "-", "--weights", weights, "--first-window", "--csv", "-")
    done = subprocess.run(line, cwd=tmp_path, env=environment(), input=content, capture_output=True, timeout=300)
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    assert done.returncode == 1 and [row["verdict"] == "unreadable" for row in rows] == [False, True, False]
    assert "broken link" in rows[1]["reason"] and rows[0]["score"] == rows[2]["score"]


def test_an_unreadable_recording_does_not_stop_the_others(corpus, weights, tmp_path, run_here):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF, but no wave")
    out = tmp_path / "scores.csv"
    done = run_here("score", broken, corpus, "--weights", weights, "--out", out, "--first-window")
    assert done.returncode == 1
    assert "broken.wav" in done.stdout and "1 unreadable" in done.stderr and "Traceback" not in done.stderr
    with out.open() as lines:
        assert [Path(row["path"]).name for row in csv.DictReader(lines)] == ["a.wav", "b.flac", "c.wav"]


def test_scoring_nothing_but_unreadable_recordings_writes_no_file(weights, tmp_path, run_here):
    (tmp_path / "broken.wav").write_bytes(b"")
    done = run_here("score", tmp_path / "broken.wav", "--weights", weights, "--out", tmp_path / "scores.csv")
    assert done.returncode == 1 and "broken.wav" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["broken.wav"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_found_before_anything_is_computed(corpus, tmp_path, refused):
    refused("score", corpus, "--weights", tmp_path / "absent", "--csv", "/dev/full", said="No space left on device")


def test_a_disk_that_fills_up_keeps_what_was_written(weights, corpus, tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.wav").symlink_to(corpus / "bonafide" / "a.wav")
    limit = 3_000  # bytes of a file: beyond it, writing fails as on a full disk

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "results"
    line = command(
        "score", tmp_path, "--weights", weights, "--first-window", "--csv", out / "a.csv", "--json", out / "a.json"
    )
    Detector.load(weights)  # exports the model, which is larger
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300, preexec_fn=limited)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    with (out / "a.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert 3 < len(rows) < 40 and all(row["warnings"] is not None for row in rows), "whole rows only"
    objects = json.loads((out / "a.json").read_text())
    assert 1 < len(objects) < len(rows) and f"the {len(objects)} written before are kept" in done.stderr
    assert len(done.stdout.splitlines()) >= len(objects) + 1, "and all that was computed is on the screen"
    assert sorted(path.name for path in out.iterdir()) == ["a.csv", "a.json"]


def test_score_refuses_what_it_cannot_do(corpus, weights, tmp_path, refused):
    refused("score", tmp_path / "absent.wav", "--weights", weights, said="absent.wav")
    refused("score", corpus, "--weights", tmp_path / "none.safetensors", said="none.safetensors")
    refused("score", corpus, "--weights", weights, "--model", "rawnet2", said="rawnet2")
    refused("score", "https://example.org/a.wav", "--weights", weights, said="https://example.org/a.wav is an address")
    refused("score", corpus, "--weights", weights, "--csv", tmp_path, said="is a folder")
    same = ("--csv", tmp_path / "x", "--json", tmp_path / "x")
    refused("score", corpus, "--weights", weights, *same, said="two outputs go to the same place")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"not weights")
    refused("score", corpus, "--weights", damaged, "--model", "aasist", said="damaged.pth")
    (tmp_path / "file").write_text("")
    refused("score", corpus / "spoof", "--weights", weights, "--out", tmp_path / "file" / "scores.csv", said="file")


def test_score_with_published_weights(reference_data, run_here):
    folder = reference_data / "asvspoof2019_subset/LA/ASVspoof2019_LA_eval/flac"
    with (reference_data / "published_weights/golden_logits.csv").open() as lines:
        golden = next(row for row in csv.DictReader(lines) if (folder / f"{row['utterance']}.flac").is_file())
    recording = folder / f"{golden['utterance']}.flac"
    done = run_here(
        "score", recording, "--weights", reference_data / "published_weights/AASIST-L.pth", "--model", "aasist-l",
        "--first-window", "--csv", "-",
    )  # fmt: skip
    row = next(csv.DictReader(io.StringIO(done.stdout)))
    column = next(name for name in golden if "aasist-l" in name.lower() and "bonafide" in name.lower())
    assert float(row["score"]) == pytest.approx(float(golden[column]), abs=1e-4)


def test_evaluate_writes_the_hand_worked_figures(score_case, tmp_path):
    scores, keys = score_case
    done = run("evaluate", scores, "--protocol", keys, "--json", tmp_path / "out.json", "--by", "attack")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["eer"] == pytest.approx(1 / 3)
    assert (result["n_bonafide"], result["n_spoof"], result["min_tdcf"]) == (3, 3, None)
    assert result["per_attack"]["A1"]["eer"] == pytest.approx(1 / 3)
    assert re.search(r"EER +33.33 ", done.stdout) and "A1" in done.stdout
    assert "note:" in done.stderr  # speakers are unknown, so the intervals are by trial


def test_evaluate_takes_scores_that_point_the_other_way(score_case, tmp_path):
    scores, keys = score_case
    flipped = tmp_path / "flipped.txt"
    pairs = (line.split() for line in scores.read_text().splitlines())
    flipped.write_text("".join(f"{name} {-float(value)}\n" for name, value in pairs))
    wrong = run("evaluate", flipped, "--protocol", keys, "--n-bootstrap", 0)
    assert wrong.stderr.startswith("note: EER is") and "--higher-is spoof" in wrong.stderr
    assert "--one-is spoof" in wrong.stderr and "attack" not in wrong.stdout  # a line of EER, no pages of nonsense
    right = run("evaluate", flipped, "--protocol", keys, "--n-bootstrap", 0, "--higher-is", "spoof")
    assert re.search(r"EER +33.33 ", right.stdout) and "note:" not in right.stderr


def test_evaluate_refuses_scores_that_do_not_fit(score_case, tmp_path, refused):
    scores, keys = score_case
    short = tmp_path / "short.txt"
    short.write_text("\n".join(scores.read_text().splitlines()[:-1]) + "\n")
    refused("evaluate", short, "--protocol", keys, "--json", tmp_path / "out.json", said="f")
    assert not (tmp_path / "out.json").exists()
    refused("evaluate", scores, "--protocol", tmp_path / "absent.txt", said="absent.txt")
    refused("evaluate", scores, "--protocol", keys, "--by", "codec", said="codec")
    refused("evaluate", scores, "--protocol", keys, "--phase", "hidden", said="hidden")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(bytes(range(256)))
    refused("evaluate", binary, "--protocol", keys, said="binary.txt")


def test_evaluate_reproduces_published_figures(reference_data, tmp_path):
    published = reference_data / "published_scores"
    asv = next((reference_data / "asvspoof2019_subset").rglob("*asv.eval*"))
    done = run(
        "evaluate", published / "rawgat_st_mul.LA.eval.txt",
        "--protocol", published / "ASVspoof2019.LA.cm.eval.trl.txt",
        "--asv-scores", asv, "--n-bootstrap", 0, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert math.isclose(result["eer"], 0.0106, abs_tol=5e-5)
    assert math.isclose(result["min_tdcf"], 0.0335, abs_tol=5e-5)
    assert re.search(rf"EER +1.06 .*\n(.*\n)*tandem EER +{100 * result['tandem_eer']:.2f} ", done.stdout)
    assert "as log-likelihood ratios" in done.stdout  # what Cllr and the actual DCF take the scores for


def test_evaluate_writes_a_self_contained_page(score_case, tmp_path):
    scores, keys = score_case
    page = tmp_path / "report.html"
    done = run("evaluate", scores, "--protocol", keys, "--n-bootstrap", 0, "--html", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "33.33" in text and "data:image" in text
    assert not any(link in text for link in ('src="http', 'href="http', "<script src"))


def test_a_reader_that_stops_early_is_no_error(score_case):
    scores, keys = score_case
    line = " ".join(f"'{part}'" for part in command("evaluate", scores, "--protocol", keys, "--n-bootstrap", 0))
    shell = ["bash", "-c", f"set -o pipefail; {line} | true"]
    done = subprocess.run(shell, env=environment(), capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_interrupting_ends_without_a_traceback(weights, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    many = [tmp_path / "a.wav"]
    for i in range(400):
        (tmp_path / f"{i}.wav").symlink_to(many[0])
    line = command("score", tmp_path, "--weights", weights, "--first-window", "--csv", tmp_path / "out" / "scores.csv")
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in iter(process.stdout.readline, ""):
        if "a.wav" in line or "0.wav" in line:  # the first result
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted" in rest and "Traceback" not in rest and "of 401 recordings" in rest
    with (tmp_path / "out" / "scores.csv").open() as lines:
        assert 1 <= len(list(csv.DictReader(lines))) < 401
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_an_exported_model_scores_as_its_weights_do(corpus, weights, tmp_path, run_here):
    file = tmp_path / "model.onnx"
    done = run_here("export", file, "--weights", weights)
    assert done.returncode == 0, done.stderr
    assert "difference" in done.stdout
    onnx = run_here("score", corpus, "--onnx", file, "--first-window", "--csv", "-")
    torch = run_here("score", corpus, "--weights", weights, "--first-window", "--csv", "-")
    logits = [[float(row["logit_bonafide"]) for row in csv.DictReader(io.StringIO(d.stdout))] for d in (onnx, torch)]
    assert logits[0] == pytest.approx(logits[1], abs=1e-3) and len(logits[0]) == 3
    assert run_here("score", corpus, "--onnx", tmp_path / "absent.onnx").returncode == 2


@pytest.mark.parametrize(
    ("names", "at_a_terminal", "expected"),
    [(["a.wav"], True, (False, 3)), (["-"], True, (False, None)), (["no sound.wav"], True, (False, None)),
     (["a.wav"], False, (True, None)), (["a.wav", "a.wav"], True, (True, None))],
)  # fmt: skip
def test_a_single_recording_has_a_bar_over_its_seconds_on_a_terminal(
    names, at_a_terminal, expected, tmp_path, monkeypatch
):
    soundfile.write(tmp_path / "a.wav", np.zeros(50_000), 16_000)
    (tmp_path / "no sound.wav").write_bytes(b"nothing")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: at_a_terminal, raising=False)
    bar = bar_of_seconds([Path(name) if name == "-" else tmp_path / name for name in names])
    assert (bar.disable, bar.total) == expected
    bar.close()


# --- what is written never costs what is there


def test_an_output_in_the_place_of_a_recording_is_refused(weights, tmp_path, refused):
    noise = np.random.default_rng(0).normal(0, 0.1, 8000)
    for name in ("a.flac", "b.flac"):
        soundfile.write(tmp_path / name, noise, 16000)
    shutil.copy(tmp_path / "a.flac", tmp_path / "voice")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for option in ("--csv", "--json", "--timeline", "--out"):  # as `--csv *.flac` gives it
        said = f"{tmp_path / 'a.flac'} is a recording by its name"
        refused("score", "--weights", weights, option, tmp_path / "a.flac", tmp_path / "b.flac", said=said)
    refused("score", tmp_path / "voice", "--csv", tmp_path / "voice", said="would be written over")
    refused("evaluate", tmp_path / "voice", "--protocol", weights, "--json", tmp_path / "voice", said="written over")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_export_leaves_the_weights_and_their_json_alone(weights, tmp_path, refused):
    here = shutil.copytree(weights.parent, tmp_path / "weights")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    source = here / weights.name
    refused("export", source, "--weights", source, said="expected a name that ends in .onnx")
    refused("export", here / "model.onnx", "--weights", weights, said="belongs to")
    with pytest.raises(ConfigError, match="belongs to"):
        build("phone", weights, {}, here / "model.onnx")
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_an_exported_file_keeps_calibration_and_caution(weights, tmp_path, run_here):
    assert run_here("export", tmp_path / "other.onnx", "--weights", weights).returncode == 0
    assert json.loads((tmp_path / "other.json").read_text())["calibration"] == {"slope": 2.0, "offset": 0.5}
    clip = np.random.default_rng(1).normal(0, 0.1, 64_600).astype(np.float32)
    verdicts = [Detector.load(path, whole=False)(clip, 16000) for path in (weights, tmp_path / "other.onnx")]
    assert verdicts[0].log_odds == pytest.approx(verdicts[1].log_odds, abs=1e-4)
    bare = save_weights(tmp_path / "bare.safetensors", load_model("lfcc-lcnn"), name="lfcc-lcnn")
    assert run_here("export", tmp_path / "other.onnx", "--weights", bare).returncode == 0
    assert "calibration" not in json.loads((tmp_path / "other.json").read_text()), (
        "an earlier export's is not this one's"
    )


def test_weights_of_the_package_are_not_calibrated_by_their_name(corpus, refused, monkeypatch):
    found = SimpleNamespace(protocol=lambda split: None)
    monkeypatch.setattr("deepfake_utils.corpora.find_corpora", lambda *names, **settings: [found])
    for command in ("calibrate", "reference"):
        refused(command, "phone", "--data", corpus, said="its JSON serves all: copy both to a folder of yours")
    refused("calibrate", "w.onnx", "--data", corpus, "--most", 0, said="expected at least 1 recording")
    refused("calibrate", "w.onnx", "--data", corpus, "--hosts", -1, said="and 0 hosts")


def test_head_cuts_the_table_and_not_the_files(weights, corpus, score_case, tmp_path):
    scores, keys = score_case
    for number in range(40):
        shutil.copy(corpus / "bonafide" / "a.wav", tmp_path / f"{number}.wav")
    python = f"{sys.executable} -m deepfake_utils"
    for arguments, file, n_lines in (
        (f"score {tmp_path} --weights {weights} --first-window --csv {tmp_path / 'all.csv'}", "all.csv", 41),
        (f"evaluate {scores} --protocol {keys} --higher-is bonafide --html {tmp_path / 'e.html'}", "e.html", 10),
    ):
        subprocess.run(["bash", "-c", f"{python} {arguments} | true"], check=True, env=environment(), timeout=300)
        assert len((tmp_path / file).read_text().splitlines()) >= n_lines, arguments


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_waits_for_a_pipe_can_be_ended_and_keeps_what_it_has(weights, corpus, tmp_path, number):
    for n in range(100, 164):
        shutil.copy(corpus / "bonafide" / "a.wav", tmp_path / f"{n}.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    child = subprocess.Popen(
        command("score", *names, "--weights", weights, "--first-window", "--csv", tmp_path / "out.csv"),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(),
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    )  # fmt: skip
    for _ in range(20):  # of the table: recordings have been scored
        assert child.stdout.readline()
    child.send_signal(number)
    child.communicate(timeout=120)
    assert child.returncode == 130
    assert len((tmp_path / "out.csv").read_text().splitlines()) > 15
    assert not list(tmp_path.glob(".*.part"))


def test_a_file_in_the_place_of_a_folder_is_told_in_words(weights, corpus, tmp_path, refused):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        for arguments in (("score", corpus, "--weights", weights, "--pictures", folder), ("collect", folder)):
            refused(*arguments, said="is a file, expected a folder")
