"""What goes to Kaggle: metadata Kaggle accepts, a package that imports there, a notebook that runs there."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jupytext
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OWNER = "some-body"
SOURCE = "awsaf49/asvpoof-2019-dataset"

spec = importlib.util.spec_from_file_location("kaggle_build", REPOSITORY / "kaggle" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


@pytest.fixture(scope="module")
def assembled(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kaggle") / "kaggle"
    build.assemble(out, OWNER)
    return out


@pytest.fixture
def copy(assembled, tmp_path) -> Path:
    """An assembled folder to spoil."""
    return shutil.copytree(assembled, tmp_path / "kaggle")


def edit(path: Path, **changes):
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


def test_what_is_assembled_is_fit_to_be_pushed(assembled):
    assert build.check(assembled) == []
    assert sorted(path.name for path in assembled.iterdir()) == [
        "01_model_research", "02_train", "03_error_analysis", "dataset",
    ]  # fmt: skip
    assert not list(assembled.rglob("__pycache__"))


@pytest.mark.parametrize("name", ["01_model_research", "02_train", "03_error_analysis"])
def test_kernels_ask_for_two_t4_no_internet_and_both_datasets(assembled, name):
    metadata = json.loads((assembled / name / "kernel-metadata.json").read_text())
    assert metadata["enable_gpu"] is True and metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["enable_internet"] is False and metadata["is_private"] is True
    assert metadata["dataset_sources"] == [f"{OWNER}/deepfake-utils", SOURCE]
    assert (metadata["language"], metadata["kernel_type"]) == ("python", "notebook")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"title": "Another title"}, "becomes 'another-title'"),
        ({"id": "OWNER/deepfake-speech-02-train"}, "names no Kaggle account"),
        ({"code_file": "absent.ipynb"}, "does not exist"),
        ({"enable_internet": None}, "enable_internet is not stated"),
        ({"enable_internet": True}, "enable_internet is on"),
        ({"machine_shape": "NvidiaTeslaP100"}, "retired"),
        ({"dataset_sources": [SOURCE]}, "lacks the package"),
        ({"kernel_sources": ["a/b/c"]}, "owner/slug"),
    ],
)
def test_faults_in_metadata_are_found(copy, changes, said):
    path = copy / "02_train" / "kernel-metadata.json"
    edit(path, **changes)
    assert [said in problem for problem in build.check_kernel(path, f"{OWNER}/deepfake-utils")] == [True]


def test_a_notebook_with_outputs_is_found(copy):
    path = copy / "02_train" / "02_train.ipynb"
    content = json.loads(path.read_text())
    cell = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "mine"}]
    path.write_text(json.dumps(content))
    problems = build.check_kernel(path.with_name("kernel-metadata.json"), f"{OWNER}/deepfake-utils")
    assert problems == ["02_train: 02_train.ipynb holds outputs"]


@pytest.mark.parametrize("line", ["import av", "import no_such_package"])
def test_a_package_kaggle_cannot_import_is_found(copy, line):
    module = copy / "dataset" / "deepfake_utils" / "conventions.py"
    module.write_text(f"{module.read_text()}\n{line}\n")
    (problem,) = build.check_imports(copy / "dataset")
    assert line.split()[1] in problem and "deepfake_utils" in problem


def test_build_needs_an_account(tmp_path):
    command = [sys.executable, str(REPOSITORY / "kaggle" / "build.py"), "--out", str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True).returncode == 2
    done = subprocess.run([*command, "--owner", "OWNER"], capture_output=True, text=True)
    assert done.returncode == 1 and "give --owner NAME" in done.stderr


def test_push_says_how_it_is_used():
    done = subprocess.run(["bash", str(REPOSITORY / "kaggle" / "push.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "--for-real" in done.stderr


@pytest.fixture
def push(tmp_path):
    """Runs push.sh in a repository of stubs; gives the calls of `kaggle`."""

    def stub(path: Path, text: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    root, calls = tmp_path / "repository", tmp_path / "calls"
    (root / "kaggle").mkdir(parents=True)
    shutil.copy(REPOSITORY / "kaggle" / "push.sh", root / "kaggle")
    stub(root / ".venv/bin/python", "mkdir -p runs/kaggle/{01_model_research,02_train,03_error_analysis}")
    stub(tmp_path / "bin/make", "")
    stub(tmp_path / "bin/kaggle", f'echo "$*" >> {calls}; echo ready')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(*arguments: str) -> tuple[str, list[str]]:
        command = ["bash", str(root / "kaggle" / "push.sh"), OWNER, *arguments]
        done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_push_sends_nothing_unless_asked(push):
    said, calls = push()
    assert calls == [] and "would run: kaggle kernels push -p runs/kaggle/02_train" in said


def test_push_starts_03_by_name_only(push):
    kernels = [call for call in push("--for-real")[1] if call.startswith("kernels")]
    assert kernels == ["kernels push -p runs/kaggle/01_model_research", "kernels push -p runs/kaggle/02_train"]
    _, calls = push("--for-real", "03")
    assert calls[-1] == "kernels push -p runs/kaggle/03_error_analysis"
    assert sum(call.startswith("kernels") for call in calls) == 3


# An imitation of Kaggle: nothing importable but what is attached, a working folder, and one of the mounts.


def style_old(root: Path, owner: str, slug: str) -> Path:
    return root / slug


def style_new(root: Path, owner: str, slug: str) -> Path:
    return root / "datasets" / owner / slug


def style_doubled(root: Path, owner: str, slug: str) -> Path:
    return root / "datasets" / owner / slug / "deepfake_utils"


def on_kaggle(root: Path) -> dict[str, str]:
    """The environment of a process there: no PYTHONPATH, nothing of the tester's, inputs under `root`."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("DEEPFAKE_", "JUPYTER"))}
    return kept | {"DEEPFAKE_KAGGLE_INPUT": str(root)}


def bootstrap(working: Path, root: Path, then: str) -> subprocess.CompletedProcess:
    """Run the notebooks' first code cell in `working`, then a line of ours."""
    notebook = jupytext.read(REPOSITORY / "notebooks" / "02_train.py")
    (source,) = (cell.source for cell in notebook.cells if "bootstrap" in cell.metadata.get("tags", []))
    command = [sys.executable, "-c", f"{source}\n{then}"]
    return subprocess.run(command, cwd=working, env=on_kaggle(root), capture_output=True, text=True)


@pytest.fixture
def working(tmp_path) -> Path:
    folder = tmp_path / "kaggle" / "working"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("style", [style_old, style_new, style_doubled])
def test_the_first_cell_finds_the_attached_source(assembled, working, style):
    root = working.parent / "input"
    mount = style(root, OWNER, "deepfake-utils")
    shutil.copytree(assembled / "dataset", mount)
    done = bootstrap(working, root, "import deepfake_utils; print(deepfake_utils.__file__)")
    assert Path(done.stdout.strip()) == mount / "deepfake_utils" / "__init__.py", done.stderr


def test_the_first_cell_finds_an_attached_wheel(assembled, working):
    root = working.parent / "input"
    wheel = style_new(root, OWNER, "deepfake-utils") / "deepfake_utils-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (assembled / "dataset" / "deepfake_utils").rglob("*.py"):
            archive.write(path, path.relative_to(assembled / "dataset"))
    done = bootstrap(working, root, "import deepfake_utils.evaluation.metrics as m; print(m.__file__)")
    assert done.stdout.startswith(str(wheel)), done.stderr


def test_the_first_cell_prefers_the_package_beside_the_notebook(assembled, working):
    root = working.parent / "input"
    shutil.copytree(assembled / "dataset", style_old(root, OWNER, "deepfake-utils"))
    shutil.copytree(assembled / "dataset" / "deepfake_utils", working / "deepfake_utils")
    done = bootstrap(working, root, "import deepfake_utils; print(deepfake_utils.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(working), done.stderr


def test_the_first_cell_says_where_it_looked(working):
    root = working.parent / "input"
    done = bootstrap(working, root, "")
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr and str(root) in done.stderr and "Add Input" in done.stderr


@pytest.mark.parametrize("style", [style_old, style_new])
def test_notebook_02_trains_from_what_is_attached(assembled, demo_runs, working, style):
    """As Kaggle runs it: the notebook alone in the working folder, package and corpus mounted beside it."""
    root = working.parent / "input"
    mount = style(root, OWNER, "deepfake-utils")
    shutil.copytree(assembled / "dataset", mount)
    corpus = style(root, *SOURCE.split("/"))
    corpus.mkdir(parents=True)
    (corpus / "LA").symlink_to(demo_runs / "demo")  # nests as there: LA/LA/...
    shutil.copy(assembled / "02_train" / "02_train.ipynb", working)
    environment = on_kaggle(root)

    alone = [
        sys.executable,
        "-c",
        "import importlib.util, sys; sys.exit(bool(importlib.util.find_spec('deepfake_utils')))",
    ]
    assert subprocess.run(alone, cwd=working, env=environment).returncode == 0

    command = [sys.executable, "-m", "papermill", "02_train.ipynb", "executed.ipynb", "--no-progress-bar"]
    command += ["-p", "model", "lfcc-lcnn", "-p", "preset", "paper"]  # the quickest of the models
    command += ["-p", "epochs", "1", "-p", "batch_size", "4", "-p", "crop_s", "1"]
    done = subprocess.run(command, cwd=working, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = working.rglob("result.json")
    metrics = json.loads(result.read_text())["metrics"]
    assert 0 <= metrics["eer"] <= 1
    assert list(working.rglob("*.safetensors"))
    assert str(mount / "deepfake_utils") not in (working / "02_train.ipynb").read_text()  # the input is untouched
