"""A plain folder of recordings: `bonafide/` and `spoof/`, with or without train/dev/eval above them, or a manifest.csv.

The subfolder directly below `spoof/` names the attack, the one below `bonafide/` nothing. A `manifest.csv` with the
columns `path` (relative to it) and `label`, and optionally `speaker`, `attack` (or `family`) and `split`, says it all
instead. Where nothing names a split, every trial is `eval`; `assign_splits` makes others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from deepfake_utils.conventions import BONAFIDE, PROTOCOL_COLUMNS, SPOOF, ConfigError, CorpusError
from deepfake_utils.corpora.trials import (
    SPLITS,
    UNKNOWN_SPEAKER,
    attack_or_none,
    audio_names,
    csv_rows,
    label_of,
    make_table,
    split_audio_name,
)

MARKER_COLUMNS = {"path", "label"}
_KNOWN_COLUMNS = {*PROTOCOL_COLUMNS, "family", "line"}  # others are carried along as text
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("dev", "development", "val", "valid", "validation"), "dev"),
    **dict.fromkeys(("eval", "evaluation", "test", "testing"), "eval"),
}


def split_of(word: str) -> str | None:
    """train, dev or eval, however it is written; None for any other word.

    >>> split_of("Validation"), split_of("notes")
    ('dev', None)
    """
    return _SPLIT_WORDS.get(word.lower().strip())


def read_folders(root: Path) -> pd.DataFrame:
    """List the recordings below the label folders of `root`; folder names are the labels, splits and attacks.

    Args:
        root: holds bonafide/ and spoof/ (or real/ and fake/, ...), or split folders that hold them.

    Returns:
        Table from `make_table`; `utterance` is the path relative to `root`, speakers are unknown.
    """
    rows = {name: [] for name in ("utterance", "path", "label", "attack", "split")}
    for split, label, folder in _label_folders(root):
        for path in _recordings(folder):
            subfolder, _, name = path[len(os.fspath(folder)) + 1 :].replace(os.sep, "/").partition("/")
            rows["utterance"].append(path[len(os.fspath(root)) + 1 :].replace(os.sep, "/"))
            rows["path"].append(path)
            rows["label"].append(label)
            rows["attack"].append(attack_or_none(label, subfolder if name else ""))
            rows["split"].append(split)
    if not rows["path"]:
        raise CorpusError(f"{root} has label folders but no recordings in them; put audio files into both")
    blank = [0] * len(rows["path"])
    return make_table({**rows, "speaker": [UNKNOWN_SPEAKER] * len(blank), "line": blank}, root.name)


def read_manifest(manifest: Path) -> pd.DataFrame:
    """Read a manifest.csv, or a protocol table that was written as CSV.

    `utterance` is the column of that name, else `path`. Labels are words; 0 and 1 are understood only beside an
    `utterance` column, that is in a table of ours, because elsewhere 1 often means spoof.

    Args:
        manifest: the file; relative paths in it start at its folder.

    Returns:
        Table from `make_table`; `path` is "" where the recording is missing.

    Raises:
        CorpusError: naming file and line: not text, a row too short or too long, unknown label or split, duplicate.
    """
    rows: dict[str, list] = {name: [] for name in ("utterance", "path", "label", "attack", "speaker", "split", "line")}
    first_line: dict[str, int] = {}
    listings: dict[Path, set[str]] = {}
    for number, row in csv_rows(manifest, ("label",)):
        where, utterance = f"{manifest} line {number}", row.get("utterance") or row.get("path")
        if not utterance:
            raise CorpusError(f"{where}: neither path nor utterance is given; one of these columns must be filled")
        ours = {"0": SPOOF, "1": BONAFIDE} if row.get("utterance") else {}
        if (label := ours.get(row["label"], label_of(row["label"]))) is None:
            raise CorpusError(f"{where}: unknown label {row['label']!r}, expected bonafide or spoof")
        if (split := split_of(row.get("split") or "eval")) is None:
            raise CorpusError(f"{where}: unknown split {row['split']!r}, expected train, dev or eval")
        if (earlier := first_line.setdefault(utterance, number)) != number:
            raise CorpusError(f"{where}: {utterance} already stands on line {earlier}")
        rows["utterance"].append(utterance)
        rows["path"].append(_present(manifest.parent, row.get("path"), listings))
        rows["label"].append(label)
        rows["attack"].append(attack_or_none(label, (row.get("attack") or row.get("family") or "").strip()))
        rows["speaker"].append((row.get("speaker") or "").strip() or UNKNOWN_SPEAKER)
        rows["split"].append(split)
        rows["line"].append(number)
        for name in row:
            if name not in _KNOWN_COLUMNS:
                rows.setdefault(name, []).append(row[name])
    return make_table(rows, manifest.parent.name)


def _present(start: Path, name: str | None, listings: dict[Path, set[str]]) -> str:
    """Absolute path of a recording, "" if it is not there; each folder is listed once."""
    if not name:
        return ""
    path = (start / name).absolute()
    if path.parent not in listings:
        listings[path.parent] = set(audio_names(path.parent))
    return os.fspath(path) if path.name in listings[path.parent] else ""


def assign_splits(
    protocol: pd.DataFrame,
    fractions: tuple[float, float, float],
    seed: int,
    by: str = "speaker",
) -> pd.DataFrame:
    """Divide trials into train, dev and eval so that no speaker is in two of them.

    Whole groups are dealt out in random order, each to the split that lacks most of its share of that group's label.

    Args:
        protocol: any protocol table.
        fractions: shares of train, dev and eval, each >= 0, adding up to 1; a share of 0 gives no trial.
        seed: of the deal; the same seed and trials give the same splits, whatever the order of the rows.
        by: column whose equal values stay together; trials that have `-` there (an unknown speaker, or with "attack"
            bona fide) are dealt one by one.

    Returns:
        A copy of `protocol` with new values in `split`.

    Raises:
        ConfigError: the fractions are no fractions, or `by` is not a column.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ConfigError(f"fractions {fractions}: expected three shares of train, dev and eval that add up to 1")
    if by not in protocol.columns:
        raise ConfigError(f"by={by!r} is not a column of the protocol; it has {', '.join(protocol.columns)}")
    group = protocol[by].where(protocol[by] != UNKNOWN_SPEAKER, "- " + protocol["utterance"])
    counts = pd.crosstab(group, protocol["label"])  # groups in sorted order, so the deal ignores the order of rows
    wanted = np.outer(fractions, counts.sum().to_numpy(float))
    dealt = np.zeros_like(wanted)
    sizes = counts.to_numpy(float)
    share = sizes / sizes.sum(axis=0)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order].sum(axis=1), kind="stable")]  # large ones first: small ones even out
    splits = {}
    for i in order:
        lack = ((wanted - dealt) / np.maximum(wanted, 1e-12) * (wanted > 0)) @ share[i]
        lack[np.asarray(fractions) == 0] = -np.inf
        chosen = int(np.argmax(lack))
        dealt[chosen] += sizes[i]
        splits[counts.index[i]] = SPLITS[chosen]
    return protocol.assign(split=group.map(splits))


def _label_folders(root: Path) -> Iterator[tuple[str, int, Path]]:
    """(split, label, folder) of every label folder of `root` or of its split folders, in name order."""
    for folder in _subfolders(root):
        label, split = label_of(folder.name), split_of(folder.name)
        if label is not None:
            yield split_of(root.name) or "eval", label, folder
        elif split is not None:
            yield from ((split, label_of(f.name), f) for f in _subfolders(folder) if label_of(f.name) is not None)


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            inside = (entry for entry in entries if not split_audio_name(entry.name)[1])
            return sorted(Path(entry.path) for entry in inside if entry.is_dir())
    except OSError as error:
        raise CorpusError(f"{folder} cannot be listed: {error.strerror}") from None


def _recordings(folder: Path) -> Iterator[str]:
    """Audio files below a folder in name order; links are followed, each real folder once."""
    seen = set()
    for here, inside, _ in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            inside.clear()
            continue
        seen.add(real)
        inside.sort()
        yield from (os.path.join(here, name) for name in sorted(audio_names(Path(here))))
