"""Which weights are in service: a folder with a log of decisions, and the pointer that the service follows.

    MODELS/decisions.jsonl   every decision, one a line, the truth
    MODELS/current.json      {"weights": path, "version": name}: where the log stands, replaced as a whole
    MODELS/VERSION/          the weights of each version, never changed

A decision is on disk before the pointer moves. A process that dies between the two leaves a pointer that is one
decision behind; whoever opens the folder next lets it catch up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from deepfake_utils.conventions import CheckpointError
from deepfake_utils.files import alone_in, atomic_write
from deepfake_utils.scoring.detector import SHIPPED

LOG, POINTER = "decisions.jsonl", "current.json"
TAKES_OVER, TAKES_BACK = ("installed", "promoted"), "rolled back"  # the events that move the pointer


class Versions:
    """The versions of a service's weights.

    Args:
        folder: made where it is not there.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[Versions]:
        """The folder for this process alone, with the pointer where the log says.

        Raises:
            ConfigError: another process is at work in it.
        """
        with alone_in(self.folder, f"{self.folder} is in use by another retraining or rollback: wait for it"):
            self._settle()
            yield self

    def history(self) -> list[dict]:
        """Every decision, the oldest first; a line that a dying process left unfinished is no decision."""
        try:
            lines = (self.folder / LOG).read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def note(self, event: str, **facts) -> None:
        """Add a line to the log, on disk when this returns."""
        line = json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **facts})
        with (self.folder / LOG).open("ab+") as log:
            log.seek(0)
            log.truncate(log.read().rfind(b"\n") + 1)  # what a dying process left of a line
            log.write(line.encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())

    @property
    def in_service(self) -> list[dict]:
        """The versions that a rollback can go back to, with the one in service last: {"weights": ..., "version": ...}.

        >>> import tempfile
        >>> versions = Versions(tempfile.mkdtemp())
        >>> versions.take_over("installed", "a.safetensors", "first")
        >>> versions.take_over("promoted", "b.safetensors", "second")
        >>> [one["version"] for one in versions.in_service], versions.roll_back()["version"]
        (['first', 'second'], 'first')
        """
        standing: list[dict] = []
        for line in self.history():
            if line["event"] in TAKES_OVER:
                standing.append({"weights": line["weights"], "version": line["version"]})
            elif line["event"] == TAKES_BACK:
                standing.pop()
        return standing

    @property
    def current(self) -> dict | None:
        """The version in service; None before the first one."""
        return next(reversed(self.in_service), None)

    def take_over(self, event: str, weights: str | os.PathLike, version: str, **facts) -> None:
        """Put a version into service. event: "installed" or "promoted"; facts: what else the log shall hold."""
        self.note(event, weights=str(weights), version=version, **facts)
        self._settle()

    def roll_back(self) -> dict:
        """Put the version before this one back into service, and return it.

        Raises:
            CheckpointError: there was none before.
        """
        *before, leaving = self.in_service or [None]
        if not before:
            raise CheckpointError(
                f"{self.folder}: no version to go back to; decisions are listed in {LOG} there, once there are any"
            )
        self.note(TAKES_BACK, left=leaving["version"], version=before[-1]["version"])
        self._settle()
        return before[-1]

    def _settle(self) -> None:
        """Let the pointer catch up with the log."""
        pointer = self.folder / POINTER
        if self.current and (not pointer.is_file() or json.loads(pointer.read_text()) != self.current):
            with atomic_write(pointer) as part:
                part.write_text(json.dumps(self.current, indent=2) + "\n", encoding="utf-8")


def weights_in_service(versions: Versions) -> tuple[str, Path]:
    """The name and file of the weights in service; those that come with the package before the first decision."""
    current = versions.current
    return (current["version"], Path(current["weights"])) if current else (SHIPPED.stem, SHIPPED)
