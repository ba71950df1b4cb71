"""Run the notebooks one after another without a browser; `make run` calls this.

Conventions that let one file run unchanged in Jupyter, on Kaggle and here:

- `NN_name.py` (percent format) and `NN_name.ipynb` are one notebook. Edit either, then `make sync`; the
  pair holds no outputs.
- The cell tagged `bootstrap` finds the package. It is the same in every notebook.
- The cell tagged `parameters` holds only lines `name: type = value  # meaning, unit` of type str, int,
  float or bool. Values from the command line are set in a cell *after* it, so it computes nothing.
- `data`, `run_dir`, `demo_scale` and `seed` exist in all. This runner sets `data` and `run_dir`.
- A notebook writes below `run_dir/<its name>/` only: pictures as `figures/*.png`, weights as
  `*.safetensors`, `result.json` last. Its executed copy becomes `run_dir/<its name>.ipynb`. The demo corpus
  is kept in `run_dir/../demo`.
- `result.json` holds `notebook`, `corpus` (name, kind, fingerprint), `metrics` (names as
  `deepfake_utils.evaluate` gives them: `eer`, `eer_ci`, `min_tdcf`, ...; fractions), `config`, `machine`.
- Notebook 03 reads what notebook 02 left in `run_dir/02_train/`.
- A cell has up to about 15 lines, no class and no epoch loop.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

FOLDER = Path(__file__).resolve().parent
OURS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
RUNS = FOLDER.parent / "runs"
FIRST_LOOK = {"time_budget_s": "40", "n_eval": "32"}  # minutes; `-p time_budget_s 36000` for a real run
OPEN_BYTES = 80_000_000  # of files that DATA=open fetches
SET_BY_RUNNER = {"data": "--data FOLDER", "run_dir": "--runs FOLDER"}
RESULT = "result.json"
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
OUTPUTS = {
    "notebooks": "*.ipynb",
    "figures": "*/figures/*.png",
    "weights": "*/**/*.safetensors",
    "results": "*/result.json",
}
PLAIN_VALUE = re.compile(r"""True|False|-?[\d.]+(e-?\d+)?|"[^"]*"|'[^']*'""")
BAR = re.compile(r"\d%\|.*\[\d|^\s*$")  # a progress bar, or the blanks that wiped it
TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class RunError(Exception):
    """The notebooks cannot be run as asked, or one of them failed; the text says why."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell."""

    name: str
    type: str
    default: str
    meaning: str

    def parse(self, text: str) -> str | int | float | bool:
        """Turn a value from the command line into this parameter's type.

        Raises:
            RunError: the text is not of that type.
        """
        if self.type == "bool":
            if text.lower() not in ("true", "false"):
                raise RunError(
                    f"parameter {self.name}: {text!r} is not a bool, expected true or false ({self.meaning})"
                )
            return text.lower() == "true"
        if self.type == "str" and (os.sep in text or "." in text) and Path(text).exists():
            return str(Path(text).resolve())  # the notebook runs in its own folder, not where the user stands
        try:
            return TYPES[self.type](text)
        except ValueError:
            raise RunError(f"parameter {self.name}: {text!r} is not of type {self.type} ({self.meaning})") from None


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """The typed, commented parameters of a notebook, in the order of the cell tagged `parameters`.

    Raises:
        RunError: there is no such notebook, or a line of that cell is not `name: type = value  # meaning`.
    """
    if notebook.suffix != ".ipynb" or not notebook.is_file():
        known = ", ".join(path.name for path in OURS)
        raise RunError(f"there is no notebook {notebook}: expected an .ipynb file, such as {known} in {FOLDER}")
    with warnings_as_errors(notebook):
        found = papermill.inspect_notebook(str(notebook))
    parameters = {}
    for name, line in found.items():
        kind, value, meaning = line["inferred_type_name"], line["default"], line["help"]
        if kind not in TYPES or not PLAIN_VALUE.fullmatch(value) or not meaning:
            raise RunError(
                f"{notebook.name}: parameter {name} is {value} ({meaning}): expected 'name: type = value  # meaning' "
                f"with a plain value of type {', '.join(TYPES)}"
            )
        parameters[name] = Parameter(name, kind, value, meaning)
    if not parameters:
        raise RunError(f"{notebook.name}: no cell tagged 'parameters', or nothing in it")
    return parameters


def choose_values(known: dict[Path, dict[str, Parameter]], asked: list[tuple[str, str]]) -> dict[Path, dict]:
    """Give each notebook those of the asked values that it has a parameter for.

    Raises:
        RunError: no notebook has such a parameter, the runner sets it, or the value is of another type.
    """
    values = {notebook: {} for notebook in known}
    for name, text in asked:
        if name in SET_BY_RUNNER:
            raise RunError(f"parameter {name} is set with {SET_BY_RUNNER[name]}, not with -p")
        takers = [notebook for notebook in known if name in known[notebook]]
        if not takers:
            raise RunError(f"no notebook has a parameter {name!r}. Known parameters:\n{describe(known)}")
        for notebook in takers:
            values[notebook][name] = known[notebook][name].parse(text)
    return values


def describe(known: dict[Path, dict[str, Parameter]]) -> str:
    """The parameters of all notebooks, one a line with the notebooks that take it."""
    lines = {}
    for notebook, parameters in known.items():
        for p in parameters.values():
            if p.name not in SET_BY_RUNNER:
                text = f"  {f'{p.name} ({p.type}, {p.default})':<32} {p.meaning}"
                lines.setdefault(text, []).append(notebook.stem[:2])
    return "\n".join(f"{text}  [{', '.join(takers)}]" for text, takers in lines.items())


@contextmanager
def this_python_as_kernel():
    """Make the kernel name `python3` mean this interpreter, whatever kernels the user has installed."""
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "kernels" / "python3"
        kernel.mkdir(parents=True)
        # tqdm imported before the kernel is there chooses text bars, which a terminal can show.
        start = "import tqdm.auto, ipykernel.kernelapp as kernel; kernel.launch_new_instance()"
        argv = [sys.executable, "-c", start, "--log-level=CRITICAL", "-f", "{connection_file}"]
        spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(spec))
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))  # searched first
        try:
            yield
        finally:
            os.environ.pop("JUPYTER_PATH") if before is None else os.environ.update(JUPYTER_PATH=before)


class RaiseWarnings(logging.Handler):
    """Papermill only warns where a value would silently have no effect."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise the warning as a RunError."""
        if record.levelno >= logging.WARNING:
            raise RunError(f"papermill: {record.getMessage()}")


@contextmanager
def warnings_as_errors(notebook: Path):
    """What papermill would only warn of is a RunError that names the notebook."""
    strict, log = RaiseWarnings(), logging.getLogger("papermill")
    log.addHandler(strict)
    try:
        yield
    except RunError as problem:
        raise RunError(f"{notebook.name}: {problem}") from None
    finally:
        log.removeHandler(strict)


def run_notebook(notebook: Path, values: dict, run_dir: Path) -> float:
    """Execute one notebook into `run_dir` and return the seconds it took.

    Raises:
        RunError: a value has no effect, or a cell failed; names the cell, its error and the executed copy.
    """
    executed = run_dir / notebook.name
    with warnings_as_errors(notebook):
        papermill.execute_notebook(notebook, executed, values, prepare_only=True, progress_bar=False)
    live = {"stderr_file": sys.stderr} if sys.stderr.isatty() else {}  # the notebook's own progress bars
    bar = {"desc": notebook.stem, "unit": "cell", "mininterval": 0.1 if live else 15}
    start_s = time.monotonic()
    try:
        papermill.execute_notebook(
            executed, executed, cwd=notebook.parent, progress_bar=bar, coalesce_streams=True, **live
        )
    except PapermillExecutionError as failure:
        raise RunError(explain(failure, executed)) from None
    finally:
        drop_progress_bars(executed)
    return time.monotonic() - start_s


def drop_progress_bars(executed: Path) -> None:
    """Take the progress bars, which moved on the terminal, out of the copy to be read."""
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                lines = re.split(r"\x1b\[A|[\r\n]", output.text)
                output.text = "".join(f"{line}\n" for line in lines if not BAR.search(line))
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
    nbformat.write(notebook, executed)


def explain(failure: PapermillExecutionError, executed: Path) -> str:
    """A failed cell in a screenful: its source, the error, the line of ours that raised it."""
    trace = TERMINAL_COLOURS.sub("", "\n".join(failure.traceback)).splitlines()
    arrows = [line.rstrip() for line in trace if line.startswith(("-", "File ", "Cell In", "Input In"))]
    source = "\n".join(f"    {line}" for line in failure.source.splitlines()[:20])
    places = "\n".join(f"    {line}" for line in arrows if "---------" not in line)
    return (
        f"{executed.stem} failed in code cell [{failure.exec_count}]:\n{source}\n"
        f"  through\n{places}\n"
        f"  {failure.ename}: {failure.evalue}\n"
        f"The whole traceback is in {executed}"
    )


def summarise(run_dir: Path, seconds: dict[str, float]) -> str:
    """The table printed at the end: one row a notebook, then where things lie."""
    rows = [f"{'notebook':<20}{'EER % [95 % interval]':>26}{'min t-DCF':>12}{'seconds':>10}"]
    corpus = {}
    for name, took_s in seconds.items():
        result = read_result(run_dir, name)
        metrics, corpus = result.get("metrics", {}), result.get("corpus", corpus)
        tdcf = show(metrics.get("min_tdcf"), ".4f")
        rows.append(f"{name:<20}{show_eer(metrics):>26}{tdcf:>12}{took_s:>10.0f}")
    rows.append(f"{'together':<58}{sum(seconds.values()):>10.0f}\n")
    rows.append(f"corpus     {corpus.get('name')} ({corpus.get('kind')}), fingerprint {corpus.get('fingerprint')}")
    if corpus.get("name") == "demo":
        rows.append("           synthetic: the numbers show that the path works and say nothing about speech")
    rows += [f"{what:<11}{locate(run_dir, pattern)}" for what, pattern in OUTPUTS.items()]
    return "\n".join(rows)


def locate(run_dir: Path, pattern: str) -> str:
    """Where the files matching a pattern lie, and how many they are."""
    found = sorted(run_dir.glob(pattern))
    if len(found) < 2:
        return str(found[0]) if found else "none written"
    return f"{run_dir / pattern} ({len(found)} files)"


def read_result(run_dir: Path, name: str) -> dict:
    """A notebook's result.json.

    Raises:
        RunError: the notebook finished without writing it.
    """
    path = run_dir / name / RESULT
    if not path.is_file():
        raise RunError(f"{name} finished without writing {path}; its last cell must")
    return json.loads(path.read_text())


def show(value: float | None, form: str) -> str:
    """A number, or a dash where the notebook has none."""
    return "-" if value is None else format(value, form)


def show_eer(metrics: dict) -> str:
    """EER in percent with its interval.

    >>> show_eer({"eer": 0.0316, "eer_ci": [0.021, 0.04]}), show_eer({})
    ('3.16 [2.10, 4.00]', '-')
    """
    if metrics.get("eer") is None:
        return "-"
    interval = metrics.get("eer_ci")
    shown = f" [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]" if interval else ""
    return f"{100 * metrics['eer']:.2f}{shown}"


def run(notebooks: list[Path], data: str, runs: Path, asked: list[tuple[str, str]], into: Path | None = None) -> str:
    """Run notebooks in order into a new folder of `runs`, or into a folder that is named.

    Args:
        notebooks: .ipynb files.
        data: a folder with a corpus, "demo", or "open" for real speech, which is collected first.
        runs: where the folder `<time>-<corpus>` is made.
        asked: (name, text) parameter values, each for those notebooks that know it.
        into: the run's folder itself; what is finished there is not run again, and training goes on where it stopped.

    Returns:
        The closing table.

    Raises:
        RunError: something asked for does not exist, or a notebook failed.
    """
    known = {notebook: read_parameters(notebook) for notebook in notebooks}
    wished = [item for item in FIRST_LOOK.items() if any(item[0] in parameters for parameters in known.values())]
    values = choose_values(known, [*wished, *asked])
    if data == "open" and not Path(data).is_dir():
        data = collect_open_speech(runs)
    if data != "demo":
        if not Path(data).is_dir():
            raise RunError(f"DATA: no folder {Path(data).absolute()}")
        data = str(Path(data).resolve())
    run_dir = into.resolve() if into else runs.resolve() / f"{datetime.now():%Y%m%d-%H%M%S}-{Path(data).name}"
    run_dir.mkdir(parents=True, exist_ok=into is not None)
    notebooks = [notebook for notebook in notebooks if not (into and (run_dir / notebook.stem / RESULT).is_file())]
    seconds = {}
    with this_python_as_kernel():
        for notebook in notebooks:
            given = values[notebook] | {"data": data, "run_dir": str(run_dir)}
            seconds[notebook.stem] = run_notebook(notebook, given, run_dir)
            read_result(run_dir, notebook.stem)
    return summarise(run_dir, seconds)


def collect_open_speech(runs: Path) -> str:
    """A small part of the open speech, from sources that state a licence; what is there is not fetched again.

    Raises:
        RunError: nothing could be had.
    """
    from deepfake_utils.collecting import collect
    from deepfake_utils.conventions import CorpusError

    mirrors = os.environ.get("DEEPFAKE_MIRRORS")  # a folder with copies of the repositories, where there is no network
    try:
        collect(runs / "open", licence="stated", limit_bytes=OPEN_BYTES, mirrors=mirrors, say=print)
    except CorpusError as error:
        raise RunError(f"DATA=open: {error}") from None
    return str(runs / "open")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the notebooks without a browser.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run (default: all four)")
    parser.add_argument("--data", default="", help="folder with a corpus, or open: a small part of public "
                        "recordings, which is fetched (default: the built-in demo corpus)")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=RUNS, help="where results go (default: runs/)")
    parser.add_argument(
        "--into", type=Path, metavar="FOLDER", help="run into this folder; what is finished in it stays"
    )
    parser.add_argument("-p", nargs=2, metavar=("NAME", "VALUE"), action="append", default=[], dest="parameters",
                        help="set a parameter in the notebooks that have it")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the parameters and stop")
    options = parser.parse_args(arguments)
    notebooks = options.notebooks or OURS
    try:
        if options.list:
            print(describe({notebook: read_parameters(notebook) for notebook in notebooks}))
        else:
            print("\n" + run(notebooks, options.data or "demo", options.runs, options.parameters, options.into))
    except RunError as problem:
        print(f"\nrun.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrun.py: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
