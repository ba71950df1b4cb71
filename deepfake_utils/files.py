"""Files on disk: written whole or not at all, listed, read as numbered rows of text; and names of recordings."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deepfake_utils.conventions import AUDIO_SUFFIXES, ConfigError, DeepfakeUtilsError

_SIGNS = {"tab": "\t", "semicolon": ";", "comma": ","}


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path` that replaces it only if the block succeeds.

    Readers see the old file or the new one, never a part, even when the process is killed. A link stays a link: what
    it points to is replaced.

    Raises:
        ConfigError: `path` is a folder, a device or a pipe.
        OSError: it cannot be written; the text names it.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_write(target) as part:
    ...     _ = part.write_text("whole")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('whole', 1)
    """
    refuse_no_file(path)
    target = Path(os.path.realpath(path))
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
    except OSError as error:
        if error.filename is None and error.strerror:  # as a full disk is told
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def refuse_no_file(path: str | os.PathLike) -> None:
    """Raise ConfigError where something else than a file of its own stands in the place of one to be written."""
    target = Path(path)
    if target.exists() and not target.is_file():
        what = "is a folder: name a file in it" if target.is_dir() else "is a device or a pipe: name a file"
        raise ConfigError(f"{target} {what}")


def refuse_overwriting(inputs: Iterable[str | os.PathLike], outputs: Iterable[str | os.PathLike | None]) -> None:
    """Raise ConfigError where an output is one of the inputs; "-" and None are no files."""
    written = {os.path.realpath(path): path for path in outputs if path is not None and str(path) != "-"}
    for path in inputs:
        if str(path) != "-" and (output := written.get(os.path.realpath(path))) is not None:
            raise ConfigError(f"{output} is read and would be written over: name another file for what is written")


# --- recordings: which are there, and what they are called


def is_hidden(name: str) -> bool:
    """Whether a file or folder is never looked at: hidden ones, and the copies that macOS leaves in archives."""
    return name.startswith(".") or name == "__MACOSX"


def split_audio_name(name: str) -> tuple[str, str]:
    """Stem and suffix of an audio file's name; ("", "") if its suffix is not one of audio, or it is hidden.

    >>> split_audio_name("LA_E_1.FLAC"), split_audio_name("notes.txt"), split_audio_name("._a.wav")
    (('LA_E_1', '.FLAC'), ('', ''), ('', ''))
    """
    stem, dot, suffix = name.rpartition(".")
    known = stem and dot + suffix.lower() in AUDIO_SUFFIXES and not is_hidden(name)
    return (stem, dot + suffix) if known else ("", "")


def list_audio(folder: str | os.PathLike) -> tuple[list[str], Counter[str]]:
    """Recordings at any depth below a folder in name order, and what was passed over.

    Links are followed, each real folder once; what `is_hidden` is left out without being counted.

    Returns:
        Paths, and how many files have which other suffix ("broken link" among them): see `describe_passed_over`.
    """
    found, passed_over, seen = [], Counter(), set()
    for here, inside, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not is_hidden(name))
        for name in sorted(name for name in names if not is_hidden(name)):
            path = os.path.join(here, name)
            if not split_audio_name(name)[1]:
                passed_over[os.path.splitext(name)[1].lower() or "no suffix"] += 1
            elif os.path.isfile(path):
                found.append(path)
            else:
                passed_over["pipe or device" if os.path.exists(path) else "broken link"] += 1
    return found, passed_over


def describe_passed_over(counts: Counter[str]) -> str:
    """What `list_audio` passed over, in words; "" where there was nothing.

    >>> describe_passed_over(Counter({".txt": 2, "broken link": 1}))
    'passed over 3 files that are no recordings by their names: 2 .txt, 1 broken link'
    """
    if not counts:
        return ""
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in counts.most_common(5)) + (", ..." if len(counts) > 5 else "")
    files = (
        "1 file that is no recording by its name"
        if counts.total() == 1
        else (f"{counts.total():,} files that are no recordings by their names")
    )
    return f"passed over {files}: {kinds}"


def _parts(name: str) -> list[str]:
    return [part for part in name.strip().replace("\\", "/").split("/") if part not in ("", ".")] or [name]


def _tails(names: Sequence[str], depth: int, keep_suffix: bool) -> list[str]:
    """The last `depth` parts of each path, joined by "/", with or without the suffix of a recording."""
    tails = []
    for name in names:
        *folders, last = _parts(name)[-depth:]
        tails.append("/".join([*folders, last if keep_suffix else split_audio_name(last)[0] or last]))
    return tails


def short_names(paths: Sequence[str]) -> list[str]:
    """Names for recordings: as little of each path as makes all of them unique, without a suffix where that will do.

    >>> short_names(["/data/x.flac", "C:\\\\clips\\\\y.wav"]), short_names(["a/x.wav", "b/x.wav"])
    (['x', 'y'], ['a/x', 'b/x'])
    """
    n_different = len(set(paths))
    for depth in range(1, max((len(_parts(path)) for path in paths), default=0) + 1):
        for keep_suffix in (False, True):
            tails = _tails(paths, depth, keep_suffix)
            if len(set(tails)) == n_different:
                return tails
    return list(paths)


def match_names(wanted: Sequence[str], given: Sequence[str]) -> list[str]:
    """The given names as those of `wanted` that mean the same recording, whatever of the path each of them has.

    Names are held against each other from their ends: as little of the paths as keeps them apart on both sides, first
    without a recording's suffix. Where no such comparison pairs anything, or all are equal already, they stay.

    >>> match_names(["a/x.wav", "b/x.wav"], ["/data/b/x.flac", "/data/a/x.flac"])
    ['b/x.wav', 'a/x.wav']
    """
    wanted, given = list(wanted), list(given)
    best, best_names = len(set(wanted) & set(given)), given
    if best == max(len(wanted), len(given)):
        return given
    longest = min(max((len(_parts(name)) for name in names), default=0) for names in (wanted, given))
    for depth in range(1, longest + 1):
        for keep_suffix in (False, True):
            keys, known = _tails(given, depth, keep_suffix), _tails(wanted, depth, keep_suffix)
            if len(set(keys)) < len(set(given)) or len(set(known)) < len(set(wanted)):
                continue
            name_of = dict(zip(known, wanted, strict=True))
            if (paired := len(name_of.keys() & set(keys))) > best:
                best, best_names = paired, [name_of.get(key, name) for key, name in zip(keys, given, strict=True)]
    return best_names


# --- text


def decode(content: bytes, *, names_are_bytes: bool = False) -> str:
    """Bytes of a text file as text: UTF-8, or UTF-16 with its mark, either of them packed with gzip.

    Args:
        names_are_bytes: keep bytes that are no UTF-8, as Python does in file names (`os.fsdecode`).

    Raises:
        UnicodeDecodeError: this is no text.
    """
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise UnicodeDecodeError("gzip", content, 0, 1, "a gzip file that is damaged or cut off") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    if b"\0" in content:
        raise UnicodeDecodeError("utf-8", content, content.index(b"\0"), 0, "binary zero")
    return content.decode("utf-8-sig", "surrogateescape" if names_are_bytes else "strict")


@contextmanager
def alone_in(folder: Path, busy: str) -> Iterator[None]:
    """The folder for one process at a time, by a lock that the system lets go of when the process dies.

    Raises:
        ConfigError: another process is at work in it; `busy` says so.
    """
    import fcntl  # which Windows lacks

    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(busy) from None
        yield


def stands_in(start: bytes) -> str:
    """What a file is that lies where another was meant, by its first 64 bytes or more, in words; "" of all others."""
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it stands for: run `git lfs pull`, or download the file itself"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, not the file itself: a login or error page was saved; download the raw file"
    return ""


def read_text(path: str | os.PathLike, error: type[DeepfakeUtilsError], *, names_are_bytes: bool = False) -> str:
    """The text of a file; see `decode` for what is understood.

    Raises:
        error: the file is missing, unreadable, empty, or not text; the line is named.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    if what := stands_in(content[:512]):
        raise error(f"{path} {what}")
    try:
        text = decode(content, names_are_bytes=names_are_bytes)
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise error(
            f"{path} line {line}: not text in UTF-8 ({problem.reason}); it is damaged or of another kind: download it "
            "again, or save it as UTF-8"
        ) from None
    if not text.strip():
        raise error(f"{path} is empty; download it again")
    return text


@dataclass(frozen=True)
class Rows:
    """The lines of a text file that say something, split into fields."""

    path: Path
    fields: list[list[str]]
    numbers: list[int]  # of each one's first line
    separator: str  # "tab", "semicolon", "comma" or "whitespace"
    error: type[DeepfakeUtilsError]

    def at(self, row: int) -> str:
        """Where a row stands, for a message."""
        return f"{self.path} line {self.numbers[row]}"

    def columns(self, names: Sequence[str], skip: int = 0) -> dict[str, list[str]]:
        """All rows but the first `skip` as columns of text; refuses ragged ones."""
        if len(set(names)) != len(names):
            raise self.error(f"{self.path}: two columns of the header mean the same: {self.fields[0]}")
        rows = self.fields[skip:]
        if not rows:
            raise self.error(f"{self.path} has a header and no trials")
        bad = next((i for i, row in enumerate(rows, skip) if len(row) != len(names)), None)
        if bad is not None:
            text = {"comma": ",", "semicolon": ";"}.get(self.separator, " ").join(self.fields[bad])
            advice = "; it is truncated or damaged, or names hold spaces, or numbers decimal commas: quote those"
            raise self.error(
                f"{self.at(bad)}: {len(self.fields[bad])} columns, expected {len(names)} ({', '.join(names)}): "
                f"{text[:80]!r}{advice}"
            )
        return {name: [row[k] for row in rows] for k, name in enumerate(names)}


def read_rows(path: str | os.PathLike, error: type[DeepfakeUtilsError]) -> Rows:
    """Read a text file as rows of fields, separated as its first line is; empty lines and comments (#) are left out.

    Fields may be quoted and hold line breaks, unless white space separates them.

    Raises:
        error: as `read_text`, or quotes do not pair.
    """
    text = read_text(path, error, names_are_bytes=True)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first = next((line for line in lines if line.strip() and not line.startswith("#")), None)
    if first is None:
        raise error(f"{path} is empty")
    separator = _separator_of(first)
    if separator == "whitespace":
        rows = [(number, line.split()) for number, line in enumerate(lines, start=1)]
    else:
        rows, number = [], 1
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_SIGNS[separator], strict=True)
        try:
            for row in reader:
                rows.append((number, [field.strip() for field in row]))
                number = reader.line_num + 1
        except csv.Error as problem:
            raise error(f"{path} line {number}: {problem}; the file is truncated or damaged") from None
    width = len(next(row for _, row in rows if "".join(row) and row[0][:1] != "#"))
    rows = [(n, row) for n, row in rows if "".join(row) and not _is_comment(row, width)]
    return Rows(Path(path), [row for _, row in rows], [n for n, _ in rows], separator, error)


def _is_comment(row: list[str], width: int) -> bool:
    """A row whose first field begins with #, unless that is a name: `#1.wav,0.5`."""
    return row[0][:1] == "#" and (len(row) != width or row[0] == "#" or row[0][1:2].isspace())


def _separator_of(line: str) -> str:
    """What separates the fields of a line; a comma in its last number is a decimal one."""
    if "\t" in line:
        return "tab"
    if ";" in line and ("," not in line or is_decimal_comma(line.rpartition(";")[2].strip())):
        return "semicolon"
    fields = line.split()
    return "comma" if "," in line and not (len(fields) > 1 and is_decimal_comma(fields[-1])) else "whitespace"


def is_decimal_comma(text: str) -> bool:
    """Whether a text is a number with a decimal comma; points may group its thousands.

    >>> is_decimal_comma("-1,25"), is_decimal_comma("1.250,5"), is_decimal_comma("LA_E_1,5")
    (True, True, False)
    """
    return re.fullmatch(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+(e-?\d+)?", text, re.IGNORECASE | re.ASCII) is not None
