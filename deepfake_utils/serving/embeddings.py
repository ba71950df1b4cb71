"""What the network's last layer sees of a recording, as a few numbers that languages of the reference do not move.

Recordings of one kind (a source, a label, an attack) whose means differ by language say in which directions of the
embedding languages differ. These are projected out, as nuisance attribute projection does with channels (Solomonoff,
Campbell, Boardman, ICASSP 2005), and of what is left the principal directions of the reference are taken. A language
that the reference does not name is not projected out: it looks like any other change.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from deepfake_utils.conventions import UNKNOWN_WORDS

N_DIRECTIONS = 4
PREFIX = "embedding_"  # of the columns of a table
FEWEST_OF_A_LANGUAGE = 20  # recordings of a kind: the mean of fewer says more about them than about the language
KIND = ["label", "source", "attack"]  # what has these in common, as far as they are known, is of one kind
DIGITS = 6


def fit_projection(embeddings: Iterable[np.ndarray | None], protocol: pd.DataFrame) -> dict | None:
    """Find the directions in which a reference varies and its languages do not.

    Args:
        embeddings: (D,) each, or None, of the trials of a protocol.
        protocol: with the columns of KIND that are known, and `language` where that is.

    Returns:
        centre (D numbers), directions (up to N_DIRECTIONS times D) and languages (the names of those projected out), as
        JSON knows them; None without embeddings.
    """
    seen = [value is not None and np.size(value) > 0 for value in embeddings]
    known = [value for value, is_there in zip(embeddings, seen, strict=True) if is_there]
    if len(known) < 2:
        return None
    values = np.stack(known).astype(float)
    between, languages = _language_differences(values, protocol[seen].reset_index(drop=True))
    centred = values - values.mean(axis=0)
    for direction in between:
        centred -= np.outer(centred @ direction, direction)
    directions = _principal(centred, N_DIRECTIONS)
    return {
        "centre": _rounded(values.mean(axis=0)),
        "directions": [_rounded(row) for row in directions],
        "languages": languages,
    }


def as_numbers(embeddings: Iterable[np.ndarray | None], projection: dict) -> pd.DataFrame:
    """Embeddings along the directions of a reference.

    Returns:
        columns embedding_1, ..., one row each; without numbers where there is no embedding, or one of another width.
    """
    centre, directions = np.array(projection["centre"]), np.array(projection["directions"])
    nothing = np.full(len(directions), np.nan)
    rows = [
        nothing if value is None or np.shape(value) != centre.shape else directions @ (value - centre)
        for value in embeddings
    ]
    columns = [f"{PREFIX}{i + 1}" for i in range(len(directions))]
    return pd.DataFrame(np.reshape(rows, (-1, len(columns))), columns=columns)


def _language_differences(values: np.ndarray, protocol: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """Orthonormal directions (n, D) in which the languages of a kind differ, at most half of all; their names."""
    if "language" not in protocol:
        return np.zeros((0, values.shape[1])), []
    known = protocol[~protocol["language"].astype(str).isin(UNKNOWN_WORDS)]
    differences, languages = [], set()
    for _, kind in known.groupby([name for name in KIND if name in known], dropna=False):
        rows = {name: own.index for name, own in kind.groupby("language") if len(own) >= FEWEST_OF_A_LANGUAGE}
        if len(rows) > 1:
            means = np.stack([values[own].mean(axis=0) for own in rows.values()])
            differences.append(means - means.mean(axis=0))
            languages |= set(rows)
    if not differences:
        return np.zeros((0, values.shape[1])), []
    return _principal(np.concatenate(differences), values.shape[1] // 2), sorted(languages)


def _principal(centred: np.ndarray, most: int) -> np.ndarray:
    """The directions (n, D) in which rows (N, D) vary, the largest first and their largest number positive."""
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[sizes > 1e-6 * max(sizes[0], 1e-30)][:most]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    return directions * np.sign(largest)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
