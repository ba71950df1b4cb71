"""Published weights by name: a pinned address and its SHA-256, fetched once into the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path

from deepfake_utils.conventions import CheckpointError
from deepfake_utils.corpora.find import kaggle_input
from deepfake_utils.files import atomic_write

_AASIST = "https://raw.githubusercontent.com/clovaai/aasist/a04c9863f63d44471dde8a6abcb3b082b07cd1d1/models/weights"
_TRAINED_ON = "ASVspoof 2019 LA (studio English, attacks of 2019)"
_ELSEWHERE = (
    f"published weights, trained on {_TRAINED_ON}: elsewhere they err often (equal error rate {{}} % on In-the-Wild)"
)
_TIMEOUT_S = 30
_SEARCH_DEPTH = 5  # folders below /kaggle/input: owner, dataset, and what its author nested


class PublishedWeights(NamedTuple):
    """Weights that their authors published: where, which, and what is known of them."""

    model: str  # its name in `models.MODELS`
    address: str
    sha256: str
    trained_on: str
    caution: str  # what a user must know of them


PUBLISHED = {
    "aasist": PublishedWeights(
        "aasist",
        f"{_AASIST}/AASIST.pth",
        "51d2d9cf0738172f61e2a384ec50a54a55363240f67c971ed55a92435bc1a1c0",
        _TRAINED_ON,
        _ELSEWHERE.format("43.0"),
    ),
    "aasist-l": PublishedWeights(
        "aasist-l",
        f"{_AASIST}/AASIST-L.pth",
        "814331d088032bb4c3fa61cc014789eadeed464209dd094ab3a2dd6ffbdce27a",
        _TRAINED_ON,
        _ELSEWHERE.format("44.5"),
    ),
}


def cache_folder() -> Path:
    """Where downloaded and exported weights lie: $DEEPFAKE_CACHE, or the platform's cache folder of this user."""
    named = os.environ.get("DEEPFAKE_CACHE")
    return Path(named) if named else user_cache_path("deepfake_utils")


def published_file(name: str) -> Path:
    """Return the file of published weights: from the cache, from /kaggle/input, or downloaded and checked.

    Args:
        name: one of `PUBLISHED`.

    Raises:
        CheckpointError: unknown name; or the file is nowhere here and cannot be downloaded, with its address and
            SHA-256 so that it can be fetched by other means; or what came is another file.
    """
    if name not in PUBLISHED:
        raise CheckpointError(f"no published weights are called {name!r}: expected one of {', '.join(PUBLISHED)}")
    weights = PUBLISHED[name]
    file_name = weights.address.rpartition("/")[2]
    target = cache_folder() / file_name
    for candidate in (target, *_attached(file_name)):
        if candidate.is_file() and sha256_of(candidate.read_bytes()) == weights.sha256:
            return candidate
    content = _download(weights, target)
    try:
        with atomic_write(target) as part:
            part.write_bytes(content)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror}): free space, or name another folder in DEEPFAKE_CACHE"
        ) from error
    return target


def recognise(path: Path) -> PublishedWeights | None:
    """The published weights that a file is, whatever its name."""
    digest = sha256_of(path.read_bytes())
    return next((weights for weights in PUBLISHED.values() if weights.sha256 == digest), None)


def sha256_of(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _attached(file_name: str) -> list[Path]:
    """Files of this name in datasets attached to a Kaggle notebook, at any usual depth."""
    folders = ("*/" * depth for depth in range(_SEARCH_DEPTH + 1))
    return [path for above in folders for path in sorted(kaggle_input().glob(above + file_name))]


def _download(weights: PublishedWeights, target: Path) -> bytes:
    try:
        with urllib.request.urlopen(weights.address, timeout=_TIMEOUT_S) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise CheckpointError(
            f"the published weights of {weights.model} are not here and cannot be downloaded "
            f"({getattr(error, 'reason', error)}): fetch {weights.address} (SHA-256 {weights.sha256}) by other means "
            f"and put it at {target}, or name the file itself as weights"
        ) from error
    if sha256_of(content) != weights.sha256:
        raise CheckpointError(
            f"{weights.address} gave another file: its SHA-256 is {sha256_of(content)}, expected {weights.sha256}; "
            "a proxy or login page may stand between: fetch the file by other means and name it as weights"
        )
    return content
