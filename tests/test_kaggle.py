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
        "01_model_research", "02_train", "03_error_analysis", "04_deploy", "dataset",
    ]  # fmt: skip
    assert not list(assembled.rglob("__pycache__"))


@pytest.mark.parametrize("name", ["01_model_research", "02_train", "03_error_analysis", "04_deploy"])
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


@pytest.mark.parametrize(
    "line", ["import av", "import no_such_package.deep as d", "import deepfake_utils.no_such_room"]
)
def test_a_package_kaggle_cannot_import_is_found(copy, line):
    module = copy / "dataset" / "deepfake_utils" / "conventions.py"
    module.write_text(f"{module.read_text()}\ntry:\n    {line}\nfinally:\n    pass\n\ndef later():\n    import av\n")
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


# What the real command prints, of which nothing but the exit code 0 is always there.
CREATED = "Your private Dataset is being created. Please check progress at https://www.kaggle.com/..."
PUSHED = "Kernel version 1 successfully pushed.  Please check progress at https://www.kaggle.com/..."
KAGGLE = f"""
echo "$*" >> calls
case "$*" in
    "datasets status"*)
        [[ -f version ]] || {{ echo "404 - Not Found"; exit; }}
        echo '{{"status": "ready", "current_version_number": '"$(cat version)"'}}' ;;
    "datasets create"*) echo "{CREATED}"; echo 1 > version ;;
    "datasets version"*) echo "Dataset version is being created."; echo 8 > version ;;
    "kernels push"*) echo "{PUSHED}" ;;
    "kernels status"*) echo 'some-body/x has status "KernelWorkerStatus.QUEUED"' ;;
esac
"""


@pytest.fixture
def push(tmp_path):
    """Runs push.sh in a copy of the repository's kaggle folder, with a `kaggle` that says what it is told to.

    Returns:
        function(*arguments, version=None, **told) -> (exit code, output, calls of `kaggle`); `told` replaces lines of
        KAGGLE, `version` is that of a package which is there already.
    """
    root = tmp_path / "repository"
    for name in ("kaggle", "notebooks", "deepfake_utils"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    shutil.copy(REPOSITORY / "LICENSE", root)
    command = tmp_path / "bin/kaggle"
    command.parent.mkdir()

    def run(
        *arguments: str, version: int | None = None, told: tuple[str, str] = ("", "")
    ) -> tuple[int, str, list[str]]:
        command.write_text(f"#!/bin/bash\ncd {tmp_path}\n{KAGGLE.replace(*told) if told[0] else KAGGLE}")
        command.chmod(0o755)
        for leftover in (tmp_path / "calls", tmp_path / "version"):
            leftover.unlink(missing_ok=True)
        if version is not None:
            (tmp_path / "version").write_text(str(version))
        environment = os.environ | {
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "KAGGLE_WAIT_S": "0",
            "PYTHON": sys.executable,
        }
        script = ["bash", str(root / "kaggle" / "push.sh"), OWNER, *arguments]
        done = subprocess.run(script, env=environment, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, done.stdout + done.stderr, [call for call in calls if "status" not in call]

    return run


def test_push_sends_nothing_unless_asked(push):
    code, said, calls = push()
    assert code == 0 and calls == [] and "would run: kaggle kernels push -p runs/kaggle/02_train" in said


def test_push_starts_03_and_04_by_name_only(push):
    code, said, calls = push("--for-real")
    assert code == 0, said
    assert calls == [
        "datasets create -p runs/kaggle/dataset --dir-mode zip",
        "kernels push -p runs/kaggle/01_model_research", "kernels push -p runs/kaggle/02_train",
    ]  # fmt: skip
    code, said, calls = push("--for-real", "03", version=7)
    assert code == 0 and "version 8, is ready" in said
    assert [call.split(" -p ")[0] for call in calls] == ["datasets version", "kernels push"]
    assert calls[-1].endswith("03_error_analysis")
    code, said, calls = push("--for-real", "04", version=7)
    assert code == 0 and calls[-1].endswith("04_deploy"), "needs nothing that another notebook leaves there"


def test_push_reads_the_state_among_warnings(push):
    warned = ("echo '{", "echo 'Warning: this kaggle command is outdated {}, please update'; echo '{")
    code, said, calls = push("--for-real", "04", told=warned, version=7)
    assert code == 0 and "version 8, is ready" in said and calls[0].startswith("datasets version")


@pytest.mark.parametrize(
    "told, version, expected",
    [
        ((f"{CREATED}\"; echo 1 > version", 'Dataset creation error: no quota"'), None, "after 0 s"),
        (("echo 8 > version", "true"), 7, "version 8 was expected to be ready"),  # the old one is ready all along
        (('"$(cat version)"', '"null"'), None, "'absent', version 0"),
        ((PUSHED, "Kernel push error: Maximum batch GPU session count of 2 reached."), None, "was not pushed"),
        ((PUSHED, f"The following are not valid dataset sources and could not be added to the kernel: [x]\n{PUSHED}"),
         None, "without something that it attaches"),
        (('some-body/x has status "KernelWorkerStatus.QUEUED"', "403 - Forbidden"), None, "knows no run"),
    ],
)  # fmt: skip
def test_push_stops_where_kaggle_did_not_do_it_though_it_returned_0(push, told, version, expected):
    code, said, calls = push("--for-real", told=told, version=version)
    assert code == 1 and expected in said
    assert len([call for call in calls if call.startswith("kernels push")]) <= 1


# An imitation of Kaggle: nothing importable but what is attached, a working folder, and one of the mounts.


def style_old(root: Path, owner: str, slug: str) -> Path:
    return root / slug


def style_new(root: Path, owner: str, slug: str) -> Path:
    return root / "datasets" / owner / slug


def style_doubled(root: Path, owner: str, slug: str) -> Path:
    return root / "datasets" / owner / slug / "deepfake_utils"


# Read by every Python at its start: an editable install of the package is not there on Kaggle.
WITHOUT_EDITABLE_INSTALLS = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""


def on_kaggle(root: Path) -> dict[str, str]:
    """The environment of a process there: nothing of the tester's, no installed package, inputs under `root`."""
    start = root.parent / "start"
    start.mkdir(parents=True, exist_ok=True)
    (start / "sitecustomize.py").write_text(WITHOUT_EDITABLE_INSTALLS)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DEEPFAKE_", "JUPYTER"))}
    return kept | {"DEEPFAKE_KAGGLE_INPUT": str(root), "PYTHONPATH": str(start)}


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


ABSENT_THERE = """
from importlib.machinery import PathFinder

def find_spec(name, path=None, target=None, find=PathFinder.find_spec):
    return None if name.partition(".")[0] in {"av", "onnx", "onnxruntime", "silero_vad"} else find(name, path, target)

PathFinder.find_spec = find_spec
"""


def run_there(working: Path, root: Path, notebook: str, *parameters: str) -> dict:
    """Execute a notebook as Kaggle does, alone in the working folder, and read its result.json."""
    environment = on_kaggle(root)
    start = root.parent / "start" / "sitecustomize.py"
    start.write_text(start.read_text() + ABSENT_THERE)
    command = [sys.executable, "-m", "papermill", notebook, "executed.ipynb", "--no-progress-bar", *parameters]
    done = subprocess.run(command, cwd=working, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = working.rglob("result.json")
    return json.loads(result.read_text())


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

    quick = ["-p", "model", "lfcc-lcnn", "-p", "preset", "paper"]  # the quickest of the models
    quick += ["-p", "epochs", "1", "-p", "batch_size", "4", "-p", "crop_s", "1"]
    assert 0 <= run_there(working, root, "02_train.ipynb", *quick)["metrics"]["eer"] <= 1
    assert list(working.rglob("*.safetensors"))
    assert str(mount / "deepfake_utils") not in (working / "02_train.ipynb").read_text()  # the input is untouched


def test_notebook_04_decides_with_what_the_image_has(assembled, working):
    """No ONNX Runtime, no FFmpeg, no detector of speech there."""
    root = working.parent / "input"
    shutil.copytree(assembled / "dataset", style_new(root, OWNER, "deepfake-utils"))
    shutil.copy(assembled / "04_deploy" / "04_deploy.ipynb", working)
    result = run_there(working, root, "04_deploy.ipynb", "-p", "demo_scale", "0.2", "-p", "n_bootstrap", "20")
    assert 0 <= result["metrics"]["eer"] <= 1
    assert [row["eval, heard through"] for row in result["metrics"]["channels"]] == [
        "as it is",
        "noise, 10 dB",
        "telephone band",
    ]
