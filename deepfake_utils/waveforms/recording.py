"""A recording to be decoded, a path, standard input, bytes or a file, as a binary file that can be rewound."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from deepfake_utils.conventions import AudioError
from deepfake_utils.files import stands_in

SPOOL_BYTES = 64 * 2**20  # of a pipe kept in memory; what is longer goes to a temporary file

AudioFile = str | os.PathLike | bytes | BinaryIO


class AudioWarning(UserWarning):
    """Something to know about a recording that was read all the same: sound lost on the way, channels that cancel."""


class Recording(NamedTuple):
    """An opened recording."""

    name: str  # for messages
    file: BinaryIO
    n_bytes: int
    say: Callable[[str], None]  # takes what is to be said about it


@contextmanager
def opened(source: AudioFile, notes: list[str] | None = None) -> Iterator[Recording]:
    """Open a recording for a while; what is the caller's stays open.

    Raises:
        AudioError: it is missing, empty, a folder or an address, or cannot be opened.
    """
    name = name_of(source)

    def say(text: str) -> None:
        if notes is None:
            warnings.warn(f"{name}: {text}", AudioWarning, stacklevel=2)
        else:
            notes.append(text)

    with ExitStack() as owned:
        if isinstance(source, bytes):
            file = io.BytesIO(source)
        elif hasattr(source, "read"):
            file = source
        elif os.fspath(source) == "-":
            if sys.stdin is None:
                raise AudioError("standard input is closed: pipe a recording into it, or name a file")
            file = sys.stdin.buffer
        else:
            file = owned.enter_context(_open(source, name))
        if not file.seekable():
            file = owned.enter_context(_spooled(file))
        n_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        if n_bytes == 0:
            raise AudioError(f"{name} is empty (0 bytes); copy or download it again")
        if what := stands_in(file.read(64)):
            raise AudioError(f"{name} {what}")
        file.seek(0)
        yield Recording(name, file, n_bytes, say)


def name_of(source: AudioFile) -> str:
    """What to call it in a message; bytes of a name that are no UTF-8 are escaped."""
    if isinstance(source, bytes):
        return f"a recording of {len(source)} bytes"
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        return name if isinstance(name, str) else "the recording"
    name = os.fspath(source)
    return "standard input" if name == "-" else name.encode("utf-8", "backslashreplace").decode()


def _open(path: str | os.PathLike, name: str) -> BinaryIO:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name) and not Path(path).exists():
        raise AudioError(f"{name} is an address: recordings are read from files; download it and name the file")
    if Path(path).is_dir():
        raise AudioError(f"{name} is a folder, not a recording")
    try:
        return open(path, "rb", buffering=0)  # the decoders have buffers of their own
    except FileNotFoundError:
        raise AudioError(f"{name} does not exist (or is a broken link)") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{name} cannot be opened: {getattr(error, 'strerror', None) or error}") from None


def _spooled(pipe: BinaryIO) -> BinaryIO:
    """What a pipe delivers: both decoders look at a file's beginning more than once."""
    spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - the caller closes it
    while chunk := pipe.read(2**20):
        spool.write(chunk)
    return spool
