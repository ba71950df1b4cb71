"""Fixtures shared by all tests."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example may take depends on who else computes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_SCALE = 0.05  # a dozen trials a split: enough to walk every path of the notebooks


def find_reference_data() -> Path | None:
    """The folder of real recordings, published weights and scores, or None where it is absent."""
    named = os.environ.get("DEEPFAKE_REFERENCE_DATA")
    candidates = [Path(named)] if named else []
    candidates.append(REPOSITORY.parent / "shared" / "data")
    return next((folder for folder in candidates if (folder / "MANIFEST.md").is_file()), None)


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory) -> Path:
    """A cache folder of the tests' own, so that they neither read nor fill the user's; a model is exported once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPFAKE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Skip the test, saying why, where the reference recordings and weights are absent."""
    folder = find_reference_data()
    if folder is None:
        pytest.skip("reference data absent: set DEEPFAKE_REFERENCE_DATA to the folder that holds MANIFEST.md")
    return folder


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory) -> Path:
    """A folder for runs of the notebooks, with a small demo corpus in it that all of them share."""
    from deepfake_utils.demo import build_demo

    folder = tmp_path_factory.mktemp("runs")
    build_demo(folder / "demo", scale=DEMO_SCALE)
    return folder


def postgres_programs() -> Path | None:
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return places[-1] if places and (places[-1] / "pg_ctl").exists() else None


@pytest.fixture(scope="session")
def postgres_url():
    """A PostgreSQL server of our own, reached through a socket in a temporary folder."""
    programs = postgres_programs()
    pytest.importorskip("psycopg")
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with tempfile.TemporaryDirectory() as folder:  # not pytest's own, which it closes to other users now and then
        user = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            if shutil.which("runuser") is None:
                pytest.skip("running as root, and runuser is missing")
            user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(folder, "postgres")

        def run(*command: str) -> None:
            done = subprocess.run([*user, *command], cwd=folder, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr

        data, options = f"{folder}/data", f"-c listen_addresses= -k {folder} -c fsync=off"
        run(str(programs / "initdb"), "-D", data, "-A", "trust", "-U", "tests", "-N")
        run(str(programs / "pg_ctl"), "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        yield f"postgresql+psycopg://tests@/postgres?host={folder}"
        run(str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
