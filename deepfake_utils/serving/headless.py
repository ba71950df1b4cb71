"""The notebooks of the repository, run without a browser by its own runner."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from deepfake_utils.conventions import ConfigError

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"  # where the package is used from its repository


def notebook_runner(notebooks: Path) -> ModuleType:
    """The module notebooks/run.py: in this process, so that nothing of it goes on where this process is killed.

    Raises:
        ConfigError: it is not there.
    """
    if not (notebooks / "run.py").is_file():
        raise ConfigError(
            f"{notebooks} does not hold run.py and the notebooks, which come with the repository and not with the "
            "package: name the folder they are in (--notebooks)"
        )
    spec = importlib.util.spec_from_file_location("notebook_runner", notebooks / "run.py")
    runner = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(runner)
    return runner


def monitor(database: str, models: Path, out: Path, notebooks: Path, **parameters) -> Path:
    """Render the report on a service as a notebook, and return where it lies.

    Args:
        database: address of the service's records.
        models: folder that the service follows.
        out: folder for the notebook, its pictures and monitor/result.json.
        notebooks: folder with run.py and monitor.ipynb.
        parameters: of the notebook: days, false_alarms.

    Raises:
        ConfigError: the notebooks are not there, or one of their cells failed.
    """
    runner = notebook_runner(notebooks)
    given = {"database": database, "models": str(models.resolve()), "run_dir": str(out.resolve()), **parameters}
    out.mkdir(parents=True, exist_ok=True)
    try:
        with runner.this_python_as_kernel():
            runner.run_notebook(notebooks / "monitor.ipynb", given, out.resolve())
    except runner.RunError as error:
        raise ConfigError(str(error)) from None
    return out / "monitor.ipynb"
