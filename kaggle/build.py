"""Assemble what goes to Kaggle into runs/kaggle/, and check it. Needs nothing but the installed requirements.

`kaggle kernels push` sends one notebook and nothing else, so the package travels as a dataset that each
notebook attaches:

    runs/kaggle/dataset/             dataset-metadata.json, LICENSE, deepfake_utils/
    runs/kaggle/01_model_research/   kernel-metadata.json, 01_model_research.ipynb
    runs/kaggle/02_train/            ...
    runs/kaggle/03_error_analysis/   ...
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
PLACEHOLDER = "OWNER"
DATASET = "dataset"
# Not on Kaggle's image, which notebooks without internet have to do with. The package loads them only
# where they are used: `av` for recordings libsndfile cannot decode, ONNX Runtime for exported models.
ABSENT_ON_KAGGLE = ("av", "onnxruntime", "hypothesis", "pytest")
RETIRED_MACHINES = ("NvidiaTeslaP100", "TpuV38", "Tpu1VmV38")
STATED = ("is_private", "enable_gpu", "enable_internet", "machine_shape")  # their defaults are not ours
IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # importing any of these now raises ImportError
import deepfake_utils
assert pathlib.Path(deepfake_utils.__file__).is_relative_to(sys.argv[1]), deepfake_utils.__file__
for module in pkgutil.walk_packages(deepfake_utils.__path__, "deepfake_utils."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            sys.exit(f"{module.name}: {error}")
"""


def slugify(title: str) -> str:
    """The slug Kaggle makes of a title.

    >>> slugify("Deepfake speech 02 train")
    'deepfake-speech-02-train'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def assemble(out: Path, owner: str) -> None:
    """Write the dataset and the kernel folders for an account into `out`, replacing what is there."""
    shutil.rmtree(out, ignore_errors=True)
    for metadata in sorted(HERE.glob("*/*-metadata.json")):
        folder = out / metadata.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        text = metadata.read_text().replace(f'"{PLACEHOLDER}/', f'"{owner}/')
        (folder / metadata.name).write_text(text)
        if metadata.name == "kernel-metadata.json":
            shutil.copy(REPOSITORY / "notebooks" / json.loads(text)["code_file"], folder)
    shutil.copytree(
        REPOSITORY / "deepfake_utils",
        out / DATASET / "deepfake_utils",
        ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"),
    )
    shutil.copy(REPOSITORY / "LICENSE", out / DATASET)


def check(out: Path) -> list[str]:
    """What is wrong with an assembled folder, one line each; empty when it is fit to be pushed."""
    dataset = json.loads((out / DATASET / "dataset-metadata.json").read_text())
    problems = check_ids("dataset", dataset)
    for path in sorted(out.glob("*/kernel-metadata.json")):
        problems += check_kernel(path, dataset["id"])
    return problems + check_imports(out / DATASET)


def check_ids(name: str, metadata: dict) -> list[str]:
    """The id must name an account, and its slug must be the one Kaggle makes of the title."""
    owner, _, slug = metadata["id"].partition("/")
    problems = []
    if owner in ("", PLACEHOLDER) or slugify(owner) != owner.lower():
        problems.append(f"{name}: id {metadata['id']!r} names no Kaggle account; give --owner NAME")
    if slugify(metadata["title"]) != slug:
        problems.append(f"{name}: title {metadata['title']!r} becomes {slugify(metadata['title'])!r}, id says {slug!r}")
    if not 6 <= len(slug) <= 50:
        problems.append(f"{name}: slug {slug!r} has {len(slug)} characters, Kaggle wants 6 to 50")
    return problems


def check_kernel(path: Path, package: str) -> list[str]:
    """One kernel folder: its metadata, its notebook, the datasets it attaches."""
    metadata = json.loads(path.read_text())
    name = path.parent.name
    problems = check_ids(name, metadata)
    problems += [f"{name}: {field} is not stated" for field in STATED if field not in metadata]
    if metadata.get("enable_internet"):
        problems.append(f"{name}: enable_internet is on; the notebooks run without")
    if metadata.get("machine_shape") in RETIRED_MACHINES:
        problems.append(f"{name}: Kaggle retired {metadata['machine_shape']} and would run on something else")
    sources = metadata.get("dataset_sources", [])
    if package not in sources:
        problems.append(f"{name}: dataset_sources lacks the package {package}")
    for source in [*sources, *metadata.get("kernel_sources", [])]:
        if not re.fullmatch(r"[\w-]+/[\w-]+", source):
            problems.append(f"{name}: source {source!r} is not of the form owner/slug")
    notebook = path.parent / metadata["code_file"]
    if not notebook.is_file():
        return [*problems, f"{name}: code_file {notebook} does not exist"]
    content = json.loads(notebook.read_text())
    if "kernelspec" not in content["metadata"]:
        problems.append(f"{name}: {notebook.name} has no kernelspec")
    if any(cell.get("outputs") for cell in content["cells"]):
        problems.append(f"{name}: {notebook.name} holds outputs")
    return problems


def check_imports(package: Path) -> list[str]:
    """Every module must import from the assembled folder alone, with what Kaggle's image has."""
    command = [sys.executable, "-c", IMPORT_ALL, str(package.resolve()), *ABSENT_ON_KAGGLE]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    return [f"package does not import: {done.stderr.strip().splitlines()[-1]}"] if done.returncode else []


def main() -> int:
    """Assemble and check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Assemble the Kaggle dataset and kernels, and check them.")
    parser.add_argument("--owner", required=True, metavar="NAME", help="your Kaggle account, as in kaggle.com/NAME")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "kaggle", help="default: runs/kaggle")
    options = parser.parse_args()
    assemble(options.out, options.owner)
    problems = check(options.out)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"assembled and checked: {options.out}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
