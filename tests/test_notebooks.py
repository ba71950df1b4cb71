"""The notebooks: pairs that agree, a form that stays readable, and a whole headless run on a small demo corpus."""

import ast
import difflib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from papermill import inspect_notebook

from deepfake_utils import find_corpora, load_model, notebook
from deepfake_utils.conventions import CheckpointError, CorpusError, ScoreError
from tests.conftest import DEMO_SCALE

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
RUNNER = NOTEBOOKS / "run.py"
PAIRS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))
QUICK = {  # small enough for two cores
    "models": "aasist-l,lfcc-lcnn",
    "train_s": 1,
    "n_eval": 8,
    "preset": "short",
    "epochs": 1,
    "crop_s": 1,
    "n_rescored": 8,
    "n_hardest": 1,
    "n_bootstrap": 50,
}
CELL_LINES = 20  # statements and their continuation lines; the style asks for about 15

spec = importlib.util.spec_from_file_location("notebook_runner", RUNNER)
runner = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = runner  # dataclasses look their module up
spec.loader.exec_module(runner)

each_pair = pytest.mark.parametrize("script", PAIRS, ids=lambda path: path.stem)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag: str) -> list[int]:
    return [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]


def as_text(notebook) -> list[str]:
    """What a pair must share: type, tags and source of every cell, one line each."""
    lines = []
    for cell in notebook.cells:
        lines.append(f"%% {cell.cell_type} {sorted(cell.metadata.get('tags', []))}")
        lines += cell.source.splitlines()
    return lines


def test_there_are_four_notebooks():
    assert [path.stem for path in PAIRS] == ["01_model_research", "02_train", "03_error_analysis", "04_deploy"]


@each_pair
def test_pair_agrees(script):
    text, notebook = jupytext.read(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    difference = difflib.unified_diff(
        as_text(text), as_text(notebook), script.name, f"{script.stem}.ipynb", lineterm=""
    )
    difference = "\n".join(difference)
    assert not difference, f"run `make sync`:\n{difference}"
    assert text.metadata["kernelspec"] == notebook.metadata["kernelspec"]
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    nbformat.validate(notebook)


@each_pair
def test_pair_holds_no_outputs(script):
    for cell in code_cells(nbformat.read(script.with_suffix(".ipynb"), as_version=4)):
        assert cell.outputs == [] and cell.execution_count is None


@each_pair
def test_form_of_the_cells(script):
    notebook = jupytext.read(script)
    (bootstrap,), (parameters,) = tagged(notebook, "bootstrap"), tagged(notebook, "parameters")
    assert bootstrap < parameters
    assert notebook.cells[0].cell_type == "markdown"
    for cell in code_cells(notebook):
        tree = ast.parse(cell.source)
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(lines) <= CELL_LINES, f"{len(lines)} lines:\n{cell.source}"
        nodes = list(ast.walk(tree))
        assert not any(isinstance(node, ast.ClassDef) for node in nodes), cell.source
        loops = [ast.unparse(node.target) for node in nodes if isinstance(node, ast.For | ast.comprehension)]
        assert not any("epoch" in target for target in loops), cell.source
    assert "result.json" in code_cells(notebook)[-1].source


@each_pair
def test_the_two_errors_are_defined_before_they_are_counted_and_headings_ask(script):
    prose = [cell.source for cell in jupytext.read(script).cells if cell.cell_type == "markdown"]
    before, _, after = "\n".join(prose).partition("eal rejected**")  # bold where it is defined
    assert "EER" not in before and "ake\naccepted**" in after or "ake accepted**" in after
    assert after.count("*false alarm*") == after.count("*miss*") == 1  # the field's words, once; then ours
    headings = [line for cell in prose for line in cell.splitlines() if line.startswith("## ")]
    assert headings and [line for line in headings if not line.endswith("?")] == []


def test_bootstrap_is_the_same_everywhere():
    sources = {notebook.cells[tagged(notebook, "bootstrap")[0]].source for notebook in map(jupytext.read, PAIRS)}
    assert len(sources) == 1


@each_pair
def test_parameters_are_those_papermill_sees(script):
    notebook = script.with_suffix(".ipynb")
    parameters = runner.read_parameters(notebook)
    assert list(parameters) == list(inspect_notebook(str(notebook)))
    assert {"data", "run_dir", "demo_scale", "seed"} <= parameters.keys()


def test_a_parameter_of_one_name_means_one_thing():
    """`-p NAME VALUE` reaches every notebook that has the name."""
    meanings = {}
    for script in PAIRS:
        for parameter in runner.read_parameters(script.with_suffix(".ipynb")).values():
            meanings.setdefault(parameter.name, set()).add((parameter.type, parameter.default, parameter.meaning))
    assert [name for name, lines in meanings.items() if len(lines) > 1] == []


def test_sentences_break_between_words(capsys):
    notebook.say("epochs:    " + "reasons for it " * 20, "short")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "short" and len(lines) > 3 and max(map(len, lines)) <= 110
    assert {word for line in lines[:-1] for word in line.split()} == {"epochs:", "reasons", "for", "it"}


# The runner, on notebooks of a few lines.


def write_notebook(path: Path, parameters: str, *cells: str) -> Path:
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook.cells = [first, *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(notebook, path)
    return path


PARAMETERS = 'data: str = ""  # corpus\nrun_dir: str = ""  # results\nn: int = 3  # trials, count'
RESULT = """
import json, pathlib, sys
folder = pathlib.Path(run_dir) / NAME
folder.mkdir()
metrics = {"eer": n / 100, "eer_ci": [0.01, 0.2], "min_tdcf": 0.5, "n": n, "python": sys.executable}
corpus = {"name": "toy", "kind": "folder", "fingerprint": "0"}
(folder / "result.json").write_text(json.dumps({"metrics": metrics, "corpus": corpus}))
"""


@pytest.fixture
def toy(tmp_path) -> Path:
    """A notebook that writes the value it was given and the Python that ran it."""
    return write_notebook(tmp_path / "toy.ipynb", PARAMETERS, RESULT.replace("NAME", "'toy'"))


def test_a_value_reaches_only_the_notebooks_that_know_it(toy, tmp_path, monkeypatch):
    other = write_notebook(
        tmp_path / "other.ipynb", PARAMETERS.replace("n: int", "m: int"), "n = 7", RESULT.replace("NAME", "'other'")
    )
    decoy = tmp_path / "jupyter" / "kernels" / "python3"  # a kernel of the user's that must not be taken
    decoy.mkdir(parents=True)
    wrong = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (decoy / "kernel.json").write_text(json.dumps(wrong))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    table = runner.run([toy, other], "demo", tmp_path / "runs", [("n", "5")])
    results = {
        path.parent.name: json.loads(path.read_text())["metrics"] for path in tmp_path.glob("runs/*/*/result.json")
    }
    assert {name: metrics["n"] for name, metrics in results.items()} == {"toy": 5, "other": 7}
    assert {metrics["python"] for metrics in results.values()} == {sys.executable}
    assert "5.00 [1.00, 20.00]" in table and "0.5000" in table


@pytest.mark.parametrize(
    "asked, said",
    [
        (("epocs", "5"), r"no notebook has a parameter 'epocs'(.|\n)*n \(int, 3\) +trials, count"),
        (("n", "five"), "n: 'five' is not of type int"),
        (("n", "2.5"), "n: '2.5' is not of type int"),
        (("data", "x"), "--data FOLDER"),
    ],
)
def test_values_that_would_have_no_effect_are_refused(toy, tmp_path, asked, said):
    with pytest.raises(runner.RunError, match=said):
        runner.run([toy], "demo", tmp_path / "runs", [asked])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "line",
    ["n = 3  # untyped", "n: int = 3", "n: int = 1 + 2 * k  # computed", "n: list = []  # a type we do not pass"],
)
def test_a_parameters_cell_that_cannot_be_set_is_refused(tmp_path, line):
    notebook = write_notebook(tmp_path / "odd.ipynb", f"k: int = 1  # fine\n{line}")
    with pytest.raises(runner.RunError, match="odd.ipynb"):
        runner.read_parameters(notebook)


def test_a_file_is_found_from_where_the_user_stands(tmp_path, monkeypatch):
    (tmp_path / "AASIST.pth").touch()
    (tmp_path / "aasist").mkdir()
    monkeypatch.chdir(tmp_path)
    parameter = runner.Parameter("weights", "str", "''", "weights file")
    assert parameter.parse("AASIST.pth") == str(tmp_path / "AASIST.pth")
    assert parameter.parse("aasist") == "aasist"  # a name, though a folder is called so
    assert parameter.parse("a/b.pth") == "a/b.pth"


def test_a_missing_corpus_folder_is_refused_before_anything_runs(toy, tmp_path):
    with pytest.raises(runner.RunError, match="absent"):
        runner.run([toy], str(tmp_path / "absent"), tmp_path / "runs", [])


@pytest.mark.parametrize("name", ["absent.ipynb", "01_model_research.py"])
def test_a_missing_notebook_is_named_beside_those_there_are(tmp_path, name):
    (tmp_path / "01_model_research.py").touch()
    done = subprocess.run([sys.executable, str(RUNNER), str(tmp_path / name)], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert name in done.stderr and "02_train.ipynb" in done.stderr


def test_progress_bars_are_taken_out_and_messages_stay(tmp_path):
    cell = nbformat.v4.new_code_cell("pass")
    bars = "costs:   0%|      | 0/7 [00:00<?, ?it/s]\rnote: 50 % is a coin\nepoch 1: 100%|##| 7/7 [00:01<00:00]\x1b[A\n"
    cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text=text) for text in (bars, "      \r")]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "executed.ipynb")
    runner.drop_progress_bars(tmp_path / "executed.ipynb")
    (kept,) = nbformat.read(tmp_path / "executed.ipynb", as_version=4).cells[0].outputs
    assert kept.text == "note: 50 % is a coin\n"


def test_a_failing_cell_is_shown_with_its_error(tmp_path):
    cells = ("def share(n):\n    return 1 / n", "before = 1\nshare(0)", "never = True")
    notebook = write_notebook(tmp_path / "bad.ipynb", PARAMETERS, *cells)
    with pytest.raises(runner.RunError) as failure:
        runner.run([notebook], "demo", tmp_path / "runs", [])
    text = str(failure.value)
    assert "share(0)" in text and "ZeroDivisionError: division by zero" in text and "return 1 / n" in text
    assert "never" not in text and len(text.splitlines()) < 20
    (executed,) = tmp_path.glob("runs/*/bad.ipynb")
    assert str(executed) in text


def test_a_notebook_without_a_result_is_an_error(tmp_path):
    notebook = write_notebook(tmp_path / "idle.ipynb", PARAMETERS, "pass")
    with pytest.raises(runner.RunError, match="result.json"):
        runner.run([notebook], "demo", tmp_path / "runs", [])


def test_interrupting_ends_the_kernel_too(tmp_path):
    cell = "import os, pathlib, time\npathlib.Path(run_dir, 'pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    notebook = write_notebook(tmp_path / "slow.ipynb", PARAMETERS, cell)
    command = [sys.executable, str(RUNNER), str(notebook), "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (written := [p for p in tmp_path.glob("runs/*/pid") if p.read_text()]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error and "Traceback" not in error
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(written[0].read_text()), 0)
            time.sleep(0.1)


# What the notebooks share.


@pytest.fixture
def shown(monkeypatch) -> list:
    """What is displayed, in order; updates as ("update", object)."""
    seen = []

    class Handle:
        def update(self, thing):
            seen.append(("update", thing))

    monkeypatch.setattr(notebook, "display", lambda *things, **_: seen.extend(things) or Handle())
    return seen


def test_pictures_are_kept_and_shown_as_png_whatever_the_backend(shown, tmp_path):
    results = notebook.Results(str(tmp_path), "toy")
    results.show(Figure(), "one")
    redraw = results.live("two")
    redraw(Figure())
    redraw(Figure())
    one, first, (word, second) = shown
    assert word == "update" and all(picture.data.startswith(b"\x89PNG") for picture in (one, first, second))
    assert sorted(path.name for path in (tmp_path / "toy" / "figures").iterdir()) == ["one.png", "two.png"]


def test_a_named_folder_without_a_corpus_is_an_error_and_no_demo(tmp_path, shown):
    with pytest.raises(CorpusError, match=str(tmp_path)):
        notebook.open_corpus(str(tmp_path), notebook.Results(str(tmp_path / "run"), "toy"))
    assert shown == [] and not (tmp_path / "demo").exists()


def write_scores_of(corpus, path: Path, *splits: str) -> str:
    trials = pd.concat([corpus.protocol(split) for split in splits])
    trials[["utterance"]].assign(score=np.random.default_rng(0).normal(trials["label"])).to_csv(path, index=False)
    return str(path)


def test_scores_of_both_splits_are_taken_from_one_file(demo_runs, tmp_path, capsys):
    (corpus,) = find_corpora(demo_runs / "demo")
    results = notebook.Results(str(tmp_path), "toy")
    file = write_scores_of(corpus, tmp_path / "both.csv", "dev", "eval")
    scored = notebook.scored_splits(corpus, results, scores=file)
    assert scored.detector is None and scored.scores_from == file
    assert set(scored.dev["split"]) == {"dev"} and set(scored.evaluation["split"]) == {"eval"}
    assert len(scored.dev) == len(corpus.protocol("dev")) and scored.seen >= {"-"}
    said = capsys.readouterr().out
    assert f"dev: {len(scored.dev)} of {len(scored.dev)} trials" in said
    half = write_scores_of(corpus, tmp_path / "eval.csv", "eval")
    with pytest.raises(ScoreError, match="no trial of .* dev: give weights, or a file with dev and eval"):
        notebook.scored_splits(corpus, results, scores=half)


def test_without_scores_the_places_looked_in_are_named(demo_runs, tmp_path):
    (corpus,) = find_corpora(demo_runs / "demo")
    with pytest.raises(CheckpointError, match=f"{tmp_path / '02_train'}.*run notebook 02"):
        notebook.scored_splits(corpus, notebook.Results(str(tmp_path), "toy"))


def test_a_phase_or_half_of_eval_stands_in_for_a_missing_dev(capsys):
    trials = pd.DataFrame({"utterance": [f"u{i}" for i in range(8)], "speaker": [f"s{i % 4}" for i in range(8)]})
    dev, rest = notebook._stand_in_for_dev(trials, 0)
    assert not set(dev["speaker"]) & set(rest["speaker"]) and len(dev) + len(rest) == 8
    dev, rest = notebook._stand_in_for_dev(trials.assign(phase=["progress", "eval", "eval", "hidden"] * 2), 0)
    assert (len(dev), len(rest)) == (2, 4) and "phase eval, 4 trials" in capsys.readouterr().out


# The real notebooks.


@pytest.fixture(scope="module")
def whole_run(demo_runs) -> tuple[str, Path]:
    """What the runner printed for all four notebooks, and the folder of the run."""
    command = [sys.executable, str(RUNNER), "--runs", str(demo_runs)]
    for name, value in {"demo_scale": DEMO_SCALE, **QUICK}.items():
        command += ["-p", name, str(value)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=demo_runs, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run_dir,) = demo_runs.glob("*-demo")
    return done.stdout, run_dir


def test_a_whole_run_prints_its_numbers_and_places(whole_run):
    table, run_dir = whole_run
    for script in PAIRS:
        assert script.stem in table
    (row,) = (line for line in table.splitlines() if line.startswith("02_train"))
    assert "[" in row and "-" not in row.split("]")[1]  # EER with an interval, min t-DCF, seconds
    assert "say nothing about speech" in table
    for path in (run_dir / "*.ipynb", run_dir / "*/result.json", run_dir / "*/figures/*.png"):
        assert str(path) in table


@each_pair
def test_a_whole_run_leaves_result_figures_and_executed_notebook(whole_run, script):
    run_dir = whole_run[1]
    result = json.loads((run_dir / script.stem / "result.json").read_text())
    assert result["notebook"] == script.stem
    assert result["corpus"]["name"] == "demo" and result["corpus"]["fingerprint"]
    assert result["machine"]["python"] and result["machine"]["torch"] and result["config"]
    figures = list((run_dir / script.stem / "figures").glob("*.png"))
    assert figures and all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    executed = nbformat.read(run_dir / f"{script.stem}.ipynb", as_version=4)
    assert all(cell.execution_count for cell in code_cells(executed) if cell.source.strip())
    assert len(pictures(code_cells(executed))) >= len(figures)


def pictures(cells) -> list:
    return [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]


@each_pair
def test_an_executed_notebook_reads_as_an_article(whole_run, script):
    """No objects in words, no raw dictionaries, no strips of progress bars; tables of a width that fits a page."""
    executed = nbformat.read(whole_run[1] / f"{script.stem}.ipynb", as_version=4)
    for output in (output for cell in code_cells(executed) for output in cell.outputs):
        if output.output_type == "stream":
            assert output.text.strip() and "%|" not in output.text
        else:
            assert len(output.data) > 1, output.data  # text/plain alone: `<Figure size ...>`, a dictionary
            assert output.data.get("text/html", "").count("<th ") <= 10, output.data["text/html"]


def test_training_redraws_its_curves_in_one_place(whole_run):
    executed = nbformat.read(whole_run[1] / "02_train.ipynb", as_version=4)
    (training,) = (cell for cell in code_cells(executed) if "result = fit(" in cell.source)
    assert len(pictures([training])) == 1


def test_a_whole_run_trains_weights_that_load_and_numbers_that_hold_together(whole_run):
    run_dir = whole_run[1]
    metrics = json.loads((run_dir / "02_train" / "result.json").read_text())["metrics"]
    low, high = metrics["eer_ci"]
    assert 0 <= low <= metrics["eer"] <= high <= 1
    assert math.isfinite(metrics["min_tdcf"])
    (weights,) = (run_dir / "02_train").glob("*.safetensors")
    assert load_model(weights=weights).min_samples > 0
    analysed = json.loads((run_dir / "03_error_analysis" / "result.json").read_text())["metrics"]
    assert analysed["eer"] == pytest.approx(metrics["eer"])  # 03 read the scores 02 left
