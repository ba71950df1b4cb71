"""Files out of git repositories at a given commit: from bare copies already here, or only what is needed from afar."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepfake_utils.conventions import CorpusError

ORIGIN = "https://github.com"
# Mirrors belong to whoever made them, and git would refuse to read another user's; it never asks for a password.
_GIT = ("git", "-c", "safe.directory=*", "-c", "gc.auto=0", "-c", "maintenance.auto=false")
_ENVIRONMENT = {"GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}


def find_mirror(mirrors: Path, source: str) -> Path | None:
    """Where a bare or ordinary copy of a repository lies in a folder of copies; None if it is not there.

    `owner/name`, `owner+name` and `name` are recognised, with or without ".git", also one folder further down.
    """
    owner, _, name = source.partition("/")
    for stem in (f"{owner}/{name}", f"{owner}+{name}", name):
        for suffix in ("", ".git"):
            folder = mirrors / f"{stem}{suffix}"
            for candidate in (folder, folder / ".git", folder / "repo", folder / "repo" / ".git"):
                if (candidate / "HEAD").is_file() and (candidate / "objects").is_dir():
                    return candidate
    return None


def bring(source: str, commits: Sequence[str], paths: Sequence[str], folder: Path, origin: str = ORIGIN) -> Path:
    """Fetch one commit's files of a repository, and no others, into a bare repository.

    Args:
        source: owner/name.
        commits, paths: of each file wanted.
        folder: of the bare repository; one that is there is completed.
        origin: what stands before owner/name in the address.

    Raises:
        CorpusError: the repository, or a commit of it, cannot be had.
    """
    if not (folder / "HEAD").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        _git(source, ["init", "--quiet", "--bare", os.fspath(folder)])
    address = f"{origin}/{source}.git"
    for key, value in (("remote.origin.url", address), ("remote.origin.promisor", "true"),
                       ("remote.origin.partialclonefilter", "blob:none")):  # fmt: skip
        _git(source, ["-C", os.fspath(folder), "config", key, value])
    fetch = [
        "-C",
        os.fspath(folder),
        "-c",
        "fetch.negotiationAlgorithm=noop",
        "fetch",
        "--quiet",
        "--no-tags",
        "--no-write-fetch-head",
        "--depth=1",
    ]
    _git(source, [*fetch, "--filter=blob:none", "origin", *sorted(set(commits))])
    wanted = set()
    for commit in sorted(set(commits)):
        listed = _git(source, ["-C", os.fspath(folder), "ls-tree", "-r", "-z", "--full-tree", commit])
        blobs = dict(line.split(b"\t", 1)[::-1] for line in listed.split(b"\0") if line)
        here = {path.encode() for path, at in zip(paths, commits, strict=True) if at == commit}
        wanted |= {blobs[path].split()[2].decode() for path in here & set(blobs)}
    if wanted:
        _git(source, [*fetch, "origin", "--stdin"], "".join(f"{blob}\n" for blob in sorted(wanted)))
    return folder


def bring_and_read(
    source: str, commits: Sequence[str], paths: Sequence[str], folder: Path, *,
    mirrors: str | os.PathLike | None = None, origin: str = ORIGIN,
) -> Iterator[bytes | None]:  # fmt: skip
    """Contents of files as of `read_files`, from a copy among `mirrors` or else fetched into `folder`.

    What was fetched is removed once everything was read; until then a further call completes it.

    Raises:
        CorpusError: as `bring`.
    """
    copy = find_mirror(Path(mirrors), source) if mirrors is not None else None
    yield from read_files(copy or bring(source, commits, paths, folder, origin), commits, paths)
    if copy is None:
        shutil.rmtree(folder, ignore_errors=True)


def read_files(repository: Path, commits: Sequence[str], paths: Sequence[str]) -> Iterator[bytes | None]:
    """Contents of files at their commits, in order; None for one that the repository does not hold."""
    command = [*_GIT, "-C", os.fspath(repository), "cat-file", "--batch"]
    reader = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | _ENVIRONMENT
    )
    with reader:
        try:
            for commit, path in zip(commits, paths, strict=True):
                reader.stdin.write(f"{commit}:{path}\n".encode())
                reader.stdin.flush()
                header = reader.stdout.readline().split()
                if len(header) != 3 or header[1] != b"blob":  # "... missing", or nothing where git has given up
                    yield None
                    continue
                yield reader.stdout.read(int(header[2]))
                reader.stdout.read(1)
        finally:
            reader.kill()


def _git(source: str, arguments: Sequence[str], text: str = "") -> bytes:
    try:
        done = subprocess.run(
            [*_GIT, *arguments], input=text.encode(), capture_output=True, env=os.environ | _ENVIRONMENT, check=False
        )
    except FileNotFoundError:
        raise CorpusError("git is not installed, and the recordings come out of git repositories: install it") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise CorpusError(f"{source} cannot be had: {lines[-1]}")
    return done.stdout
