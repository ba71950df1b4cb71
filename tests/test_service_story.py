"""The service's whole story in its short form, killed with all its processes after a while and told again."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tell(folder: Path) -> subprocess.Popen:
    """Start the story in a process group of its own."""
    command = [sys.executable, "-u", ROOT / "tests" / "service_story.py", "--short", "--folder", folder]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_nothing_that_was_accepted_is_lost_when_everything_is_killed_and_started_again(tmp_path):
    first = tell(tmp_path)
    for line in first.stdout:  # killed while a long recording waits, if it gets that far
        if line.startswith("hostile"):
            break
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    accepted = len((tmp_path / "accepted.txt").read_text().split())
    assert accepted >= 44  # 40 recordings, and one after each hostile thing

    second = tell(tmp_path)
    told, _ = second.communicate(timeout=1500)
    assert second.returncode == 0, told[-3000:]
    total, lost = map(int, re.search(r"^accepted, in all tellings\s+(\d+), lost: (\d+)$", told, re.MULTILINE).groups())
    assert lost == 0 and total >= 2 * accepted  # the second telling began anew, and was told of feedback besides
    assert "after rollback" in told
