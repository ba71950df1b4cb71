"""The words every other module shares: rates, labels, column names, errors. No third-party import."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_RATE_HZ = 16_000
CROP_SAMPLES = 64_600  # 4.04 s, the input length of the AASIST and ASVspoof 2021 baselines

SPOOF, BONAFIDE = 0, 1  # labels, and the positions of the two logits
LABEL_NAMES = {SPOOF: "spoof", BONAFIDE: "bonafide"}
NO_ATTACK = "-"  # the attack of a bona fide trial

# One row a trial. `path` is absolute; `label` is 0 or 1; `split` is train, dev or eval.
PROTOCOL_COLUMNS = ("utterance", "path", "label", "attack", "speaker", "split", "corpus")


class DeepfakeUtilsError(Exception):
    """Base of every error this package raises on bad input; its text says what to do about it."""


class ConfigError(DeepfakeUtilsError):
    """A setting is unknown, out of range, or contradicts another."""


class CorpusError(DeepfakeUtilsError):
    """A corpus, protocol or recording list is missing, malformed or incomplete."""


class AudioError(DeepfakeUtilsError):
    """A recording cannot be decoded or is not usable speech."""


class ScoreError(DeepfakeUtilsError):
    """Scores are missing, duplicated, non-finite or do not match their protocol."""


class CheckpointError(DeepfakeUtilsError):
    """A weights or checkpoint file is missing, damaged or belongs to another model."""


class TrainingError(DeepfakeUtilsError):
    """Training cannot start or cannot go on."""


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path` that replaces it only if the block succeeds.

    Readers see the old file or the new one, never a part, even when the process is killed.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_write(target) as part:
    ...     _ = part.write_text("whole")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('whole', 1)
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o644)  # mkstemp makes files private; results are meant to be read
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)

