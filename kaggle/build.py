"""Assemble what goes to Kaggle into runs/kaggle/, and check it. Needs Python 3.11 or later, and nothing else.

`kaggle kernels push` sends one notebook and nothing else, so the package travels as a dataset that each
notebook attaches:

    runs/kaggle/dataset/             dataset-metadata.json, LICENSE, deepfake_utils/
    runs/kaggle/01_model_research/   kernel-metadata.json, 01_model_research.ipynb
    runs/kaggle/02_train/            ...
    runs/kaggle/03_error_analysis/   ...
    runs/kaggle/04_deploy/           ...
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
PLACEHOLDER = "OWNER"
DATASET = "dataset"
# What the package may import when it is imported, on an image that notebooks without internet have to do with. What
# Kaggle lacks (`av`, ONNX Runtime) or a notebook may do without, the package imports only where it is used.
ON_KAGGLE = {
    "IPython", "matplotlib", "numpy", "pandas", "platformdirs", "psutil", "safetensors", "scipy", "sklearn",
    "soundfile", "torch", "torchaudio", "tqdm",
}  # fmt: skip
# The kernels ask for "NvidiaTeslaT4". The kaggle command's page on kernel metadata and its maintainers disagree on
# whether that is one T4 or two; by the latter (kaggle-cli, pull request 1198) it is what Kaggle's menu calls "GPU T4
# x2", and a single one cannot be had. The notebooks take what they find: `n_seeds` above 1 uses one for each seed.
RETIRED_MACHINES = ("NvidiaTeslaP100", "TpuV38", "Tpu1VmV38")
STATED = ("is_private", "enable_gpu", "enable_internet", "machine_shape")  # their defaults are not ours


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
        ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "serving"),  # no notebook needs the service
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
    """Importing a module must need nothing but the standard library, ON_KAGGLE and what was assembled."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        for name in imported_on_import(ast.parse(path.read_text(encoding="utf-8"))):
            top, place = name.partition(".")[0], package.joinpath(*name.split("."))
            own = top == "deepfake_utils" and (place.is_dir() or place.with_suffix(".py").is_file())
            if not own and top not in sys.stdlib_module_names | ON_KAGGLE:
                problems.append(f"package does not import on Kaggle: {path.relative_to(package)} needs {name}")
    return problems


def imported_on_import(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported as soon as this one is: imports in functions come later, if ever."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported_on_import(node)


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
