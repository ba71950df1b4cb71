"""Verdicts as they come: a table in words, and files that hold every verdict given, whatever ends the run.

A file grows beside its target under a hidden name and replaces it at the end, also when the run is interrupted or the
disk fails; a device or pipe is written to directly. After every recording it is whole: a CSV without half a row, a JSON
array that is closed.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from deepfake_utils.conventions import AudioError, ConfigError
from deepfake_utils.evaluation.calibration import Use
from deepfake_utils.evaluation.scorefile import companion_path
from deepfake_utils.files import atomic_write, split_audio_name
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.scoring.verdict import ROW_COLUMNS, Judged, Verdict, describe_probability, verdict_row

SCORE_COLUMNS = ("path", "score", "logit_spoof", "logit_bonafide", "duration_s")
TIMELINE_COLUMNS = ("path", *Judged.__dataclass_fields__)
ROW_BYTES = 400  # of one recording in a file, roughly


class GrowingFile:
    """A text file that replaces its target when it is closed, with all that was written until then.

    Args:
        path: the target, or "-" for standard output.
        head, tail: what it begins and ends with; the tail is there after every piece, on a device at the end.
        n_pieces: how many are expected, to check the space for them.

    Raises:
        ConfigError: the file cannot be written, or there is no space for it; before anything is computed.
    """

    def __init__(self, path: str | os.PathLike, head: str, tail: str = "", n_pieces: int = 0):
        self.path, self.n_pieces, self._tail = Path(path), 0, tail.encode()
        self._part: Path | None = None
        try:
            self._file = self._open()
            begun = head.encode() + (self._tail if self._part else b"")  # a pipe cannot be rewound
            self._end = self._write(begun) - len(self._tail)
            free = shutil.disk_usage(self._part.parent).free if self._part else None
        except OSError as error:
            self._discard()
            raise ConfigError(f"{self.path} cannot be written: {error.strerror or error}") from error
        if free is not None and free < n_pieces * ROW_BYTES:
            self._discard()
            raise ConfigError(
                f"{self.path}: {free:,} bytes are free there, {n_pieces:,} recordings need about "
                f"{n_pieces * ROW_BYTES:,}: free space or name another folder"
            )

    def add(self, piece: str) -> None:
        """Write one piece to the disk, whole or not at all; an OSError names the file."""
        content = piece.encode("utf-8", "surrogateescape")  # names keep their bytes
        try:
            if self._part:
                self._file.seek(self._end)
            written = self._write(content + self._tail if self._part else content)
        except OSError as error:
            if self._part:
                self._file.seek(self._end)
                self._file.write(self._tail)
                self._file.truncate(self._end + len(self._tail))
            raise OSError(
                error.errno, f"{self.path}: {error.strerror or error}; the {self.n_pieces:,} written before are kept"
            ) from error
        self._end, self.n_pieces = written - len(self._tail), self.n_pieces + 1

    @property
    def is_beside(self) -> bool:
        """Whether its target is a file of its own, not a device or standard output."""
        return self._part is not None

    def close(self, keep: bool = True) -> None:
        """Put the file in its place; with nothing in it, or `keep` False, leave no file behind."""
        if self._part is None:
            if self._tail:
                self._file.write(self._tail)
            self._file.flush()
            if self._file is not sys.stdout.buffer:
                self._file.close()
        elif keep and self.n_pieces:
            self._file.close()
            self._part.chmod(0o644)  # mkstemp makes files private; results are meant to be read
            self._part.replace(self.path)
        else:
            self._discard()

    def _open(self):
        if str(self.path) == "-":
            sys.stdout.flush()
            return sys.stdout.buffer
        if self.path.exists() and not stat.S_ISREG(self.path.stat().st_mode):
            if self.path.is_dir():
                raise IsADirectoryError(0, "it is a folder; name a file in it")
            return self.path.open("wb", buffering=0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".part", dir=self.path.parent)
        self._part = Path(name)
        return os.fdopen(handle, "r+b", buffering=0)

    def _write(self, content: bytes) -> int:
        """Write all of it; where the file then stands."""
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]
        self._file.flush()
        return self._file.tell() if self._part else 0

    def _discard(self) -> None:
        if self._part:
            self._file.close()
            self._part.unlink(missing_ok=True)


class Outputs:
    """All that `score` writes; opened before anything is computed, closed whatever happens.

    Args:
        n_recordings: how many will come.
        csv_path, json_path, timeline_path: every recording as rows or objects, every window as rows.
        scores_path: a score file for `evaluate`: only recordings with a score, and a JSON that says what it is.

    Without one of them on standard output, a table in words goes there.

    Raises:
        ConfigError: one of them cannot be written.
    """

    def __init__(self, n_recordings: int, *, csv_path=None, json_path=None, timeline_path=None, scores_path=None):
        wanted = {
            "csv": (csv_path, _csv_line(ROW_COLUMNS), ""),
            "json": (json_path, "[", "\n]\n"),
            "timeline": (timeline_path, _csv_line(TIMELINE_COLUMNS), ""),
            "scores": (scores_path, _csv_line(SCORE_COLUMNS), ""),
        }
        wanted = {name: target for name, target in wanted.items() if target[0] is not None}
        names = [str(path) if str(path) == "-" else os.path.abspath(path) for path, _, _ in wanted.values()]
        if len(set(names)) < len(names):
            raise ConfigError(f"two outputs go to the same place, among {', '.join(names)}: name different files")
        for path, _, _ in wanted.values():
            if split_audio_name(Path(path).name)[1]:  # as in `--csv *.flac`
                raise ConfigError(f"{path} is a recording by its name: name another file for what is written")
        self._table = None if "-" in names else sys.stdout
        self._files: dict[str, GrowingFile] = {}
        self._about, self._known_warnings = {}, ()
        try:
            for name, (path, head, tail) in wanted.items():
                self._files[name] = GrowingFile(path, head, tail, n_recordings)
        except ConfigError:
            self.close(keep=False)
            raise

    def introduce(self, detector: Detector) -> None:
        """Say on standard error what the verdicts come from and assume, and begin the table."""
        print("\n".join(introduction(detector)), file=sys.stderr, flush=True)
        self._known_warnings = detector.warnings
        self._about = {
            "score": detector.score_meaning,
            "weights": detector.facts["weights"],
            "looked_at": "whole recordings" if detector.whole else "the first 64,600 samples",
        }
        self._print(f"{'verdict':<12}{'probability of fake':<26}{'score':>8}  {'speech found':<20}recording")

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def add(self, path: Path, verdict: Verdict | AudioError) -> None:
        """One recording, everywhere; an OSError where a file cannot take it."""
        row = verdict_row(path, verdict)
        self._print(table_line(row, verdict, self._known_warnings))
        windows = [_plain(vars(window)) for window in getattr(verdict, "windows", ())]
        lists = {"warnings": list(getattr(verdict, "warnings", ())), "windows": windows}
        lists["fake_stretches_s"] = list(getattr(verdict, "fake_stretches", ()))
        pieces = {
            "csv": _csv_line(row.get(name) for name in ROW_COLUMNS),
            "json": ("," if self._n("json") else "") + "\n" + json.dumps(_plain(row) | lists),
            "timeline": "".join(_csv_line([row["path"], *window.values()]) for window in windows),
        }
        if row.get("score") is not None:
            pieces["scores"] = _csv_line(row[name] for name in SCORE_COLUMNS)
        failures = []
        for name, piece in pieces.items():
            if name in self._files and piece:
                try:
                    self._files[name].add(piece)
                except OSError as error:  # the other files may be on other disks
                    failures.append(error)
        if failures:
            raise failures[0]

    def close(self, keep: bool = True) -> None:
        """Put every file in its place with what it holds."""
        for file in self._files.values():
            file.close(keep)
        if keep and self._n("scores"):
            self._explain_scores(self._files["scores"])

    def _n(self, name: str) -> int:
        return self._files[name].n_pieces if name in self._files else 0

    def _print(self, text: str) -> None:
        if not self._table:
            return
        try:
            with tqdm.external_write_mode(self._table):  # a progress bar makes room
                print(text, file=self._table, flush=True)
        except BrokenPipeError:  # the reader has seen enough; the files still want everything
            if not self._files:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._table.fileno())
            self._table = None

    def _explain_scores(self, file: GrowingFile) -> None:
        about = {"higher_is": "bonafide", "columns": list(SCORE_COLUMNS), "n_trials": file.n_pieces}
        if file.is_beside:
            with atomic_write(companion_path(file.path)) as part:
                part.write_text(json.dumps(self._about | about, indent=2) + "\n", encoding="utf-8")


def introduction(detector: Detector) -> list[str]:
    """What its verdicts come from and assume, in lines."""
    lines = [f"weights  {detector.facts['weights']}, by {detector.engine}", f"score    {detector.score_meaning}"]
    lines += [f"use      {describe_use(detector)}"] if detector.is_calibrated else []
    return [shown(line) for line in [*lines, *(f"warning: {text}" for text in detector.warnings)]]


def table_line(row: dict, verdict: Verdict | AudioError, known_warnings: tuple[str, ...] = ()) -> str:
    """One recording for a terminal; its name last, because names may be long, and below it what is to be said."""
    name = shown(row["path"])
    if isinstance(verdict, AudioError):
        return f"{'unreadable':<12}{'':<56}{name}\n    {shown(str(verdict))}"
    probability = "-" if verdict.probability_fake is None else describe_probability(verdict)
    score = "-" if verdict.score is None else f"{verdict.score:+.2f}"
    found = "not looked for" if verdict.speech_s is None else f"{verdict.speech_s:.1f} of {verdict.duration_s:.1f} s"
    lines = [f"{verdict.verdict:<12}{probability:<26}{score:>8}  {found:<20}{name}"]
    if verdict.score is None:
        lines.append(f"    {verdict.reason}")
    lines += [f"    warning: {shown(text)}" for text in verdict.warnings if text not in known_warnings]
    return "\n".join(lines)


def shown(text: str) -> str:
    """Text that any terminal shows in one line: line breaks and bytes that are no UTF-8 are escaped.

    >>> shown("a\\nb"), shown("caf\\udce9.wav")
    ('a\\\\nb', 'caf\\\\xe9.wav')
    """
    text = "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else repr(c)[1:-1] for c in text)
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def describe_use(detector: Detector) -> str:
    """What the verdicts assume, in words that cannot be turned round."""
    costs: Use = detector.costs
    ratio = costs.cost_fa / costs.cost_miss
    if ratio == 1:
        errors = "a fake accepted as real is as bad as a real one rejected as fake"
    elif ratio > 1:
        errors = f"a fake accepted as real costs as much as {ratio:g} real ones rejected as fake"
    else:
        errors = f"a real one rejected as fake costs as much as {1 / ratio:g} fakes accepted as real"
    return f"{detector.use}: {100 * costs.p_spoof:g} % of the recordings are fake, {errors}"


def _csv_line(values) -> str:
    values = ["" if value is None else value for value in values]
    # The csv module leaves a carriage return bare, which other readers take for the end of the line.
    quoting = csv.QUOTE_NONNUMERIC if any("\r" in str(value) for value in values) else csv.QUOTE_MINIMAL
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(values)
    return text.getvalue()


def _plain(values: dict) -> dict:
    """Without NaN and infinity, which JSON does not know."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
