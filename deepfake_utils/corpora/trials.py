"""What all corpora share: recordings found for their trials, the missing ones named, counts and fingerprints."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from deepfake_utils.conventions import AUDIO_SUFFIXES, LABEL_NAMES, SPLITS, CorpusError
from deepfake_utils.files import split_audio_name

CHANCE_AGREEMENT = 0.1  # of the names in a folder or of those wanted, whichever are fewer


class Utterances(tuple):
    """A tuple that pandas may keep in `DataFrame.attrs` without copying 100,000 names at every operation."""

    __slots__ = ()

    def __deepcopy__(self, memo) -> Utterances:
        return self


def names_in(folder: Path) -> Iterator[str]:
    """Names of what lies directly inside a folder, from one listing; broken links are left out.

    A folder that cannot be listed counts as empty.
    """
    try:
        with os.scandir(folder) as entries:
            yield from (e.name for e in entries if not e.is_symlink() or os.path.exists(e.path))
    except OSError:
        return


def audio_names(folder: Path) -> Iterator[str]:
    """Names of the audio files directly inside a folder; see `names_in`."""
    return (name for name in names_in(folder) if split_audio_name(name)[1])


def locate(wanted: Collection[str], folders: Iterable[Path]) -> dict[str, str]:
    """Paths of the wanted utterances, from one listing a folder; the folder that holds most of them goes first.

    A folder in which only few names agree by chance holds another corpus: the 7-digit names of ASVspoof 2019 and 2021
    LA coincide about a thousand times. It is left out.

    Args:
        wanted: utterances, which are the stems of their files.
        folders: where to look, nearest first.

    Returns:
        {utterance: path}; where one has several suffixes, the first in AUDIO_SUFFIXES (.flac, .wav, ...) wins.
    """
    wanted = set(wanted)
    listings: list[dict[str, str]] = []
    for folder in folders:
        found, n_names = {}, 0
        for name in audio_names(folder):
            n_names += 1
            stem = split_audio_name(name)[0]
            if stem in wanted and (stem not in found or _rank(name) < _rank(found[stem])):
                found[stem] = name
        if len(found) > CHANCE_AGREEMENT * min(n_names, len(wanted)):
            listings.append({stem: os.path.join(folder, name) for stem, name in found.items()})
        if len(found) == len(wanted):
            break
    listings.sort(key=len)
    return {stem: path for listing in listings for stem, path in listing.items()}


def _rank(name: str) -> tuple[int, str]:
    return AUDIO_SUFFIXES.index(split_audio_name(name)[1].lower()), name


def near_miss(name: str, folder: Path) -> str:
    """A recording below `folder` whose path differs from `name` in upper and lower case or suffix only, else ""."""
    *inside, last = name.replace("\\", "/").split("/")
    try:
        for part in inside:
            folder = next(folder / found for found in os.listdir(folder) if found.lower() == part.lower())
    except (OSError, StopIteration):
        return ""
    wanted = (split_audio_name(last)[0] or last).lower()
    return next((str(folder / n) for n in audio_names(folder) if split_audio_name(n)[0].lower() == wanted), "")


def drop_missing(
    table: pd.DataFrame,
    allow_missing: bool,
    lists: Mapping[str, Path],
    folders: Mapping[str, Iterable[Path]],
) -> pd.DataFrame:
    """Enforce that every trial has its recording, or drop those without and say which.

    Args:
        table: from `protocols`, with a `line` column that is removed here.
        allow_missing: drop instead of raising.
        lists: the protocol file of each split, for the message.
        folders: the folders searched for each split, for the message.

    Returns:
        The table without `line`; `attrs["dropped"]` holds the dropped utterances (empty if none).

    Raises:
        CorpusError: recordings are missing and `allow_missing` is False, or none exists at all.
    """
    absent = table["path"] == ""
    kept = table.loc[~absent].drop(columns="line").reset_index(drop=True)
    kept.attrs["dropped"] = Utterances(table.loc[absent, "utterance"])
    if not absent.any():
        return kept
    present = [split for split in SPLITS if (table["split"] == split).any()]
    text = "; ".join(_missing_text(table, absent, split, folders.get(split, ())) for split in present)
    first = table.loc[absent].iloc[0]
    where = f"{lists[first['split']]} line {first['line']}"
    if kept.empty or not allow_missing:
        advice = "attach the audio" if kept.empty else "attach the rest (in Python, allow_missing=True goes on without)"
        places = folders.get(first["split"], ())
        near = next(filter(None, (near_miss(first["utterance"], Path(folder)) for folder in places)), "")
        but = f", but {near} is there: the names must be alike" if near else ""
        raise CorpusError(f"{where}: no recording of {first['utterance']}{but}. In all: {text}. To do: {advice}")
    warnings.warn(f"{text}; these trials are dropped (all names in frame.attrs['dropped'])", stacklevel=3)
    return kept


def _missing_text(table: pd.DataFrame, absent: pd.Series, split: str, folders: Iterable[Path]) -> str:
    here = table["split"] == split
    names = table.loc[here & absent, "utterance"]
    if names.empty:
        return f"{split}: all {int(here.sum()):,} recordings present"
    how_many = "none" if len(names) == here.sum() else f"{int(here.sum()) - len(names):,}"
    where = ", ".join(map(str, folders)) or "no folder with such recordings was found"
    shown = ", ".join(names.iloc[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{split}: {how_many} of {int(here.sum()):,} recordings present, "
        f"missing {len(names):,} ({shown}); looked in {where}"
    )


def fingerprint(protocol: pd.DataFrame) -> str:
    """Twelve hexadecimal digits that identify a set of trials, wherever its audio is mounted.

    They cover utterance, label, attack, speaker and split of every row, not the order of the rows, nor paths, nor
    samples.
    """
    columns = ["split", "utterance", "label", "attack", "speaker"]
    rows = sorted(map("\t".join, protocol[columns].astype(str).itertuples(index=False, name=None)))
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def count(table: pd.DataFrame) -> pd.DataFrame:
    """Trials by split, label and attack, with the recordings that are missing.

    Args:
        table: from `protocols.make_table` (a missing recording has an empty path).

    Returns:
        Columns split, label ("bonafide" or "spoof"), attack, trials, missing; official order of splits.
    """
    rows = table.assign(missing=table["path"] == "", order=table["split"].map(SPLITS.index))
    counts = rows.groupby(["order", "split", "label", "attack"])["missing"].agg(["size", "sum"]).reset_index()
    counts = counts.sort_values(["order", "label", "attack"], ascending=[True, False, True], ignore_index=True)
    counts["label"] = counts["label"].map(LABEL_NAMES)
    counts = counts.rename(columns={"size": "trials", "sum": "missing"}).drop(columns="order")
    return counts.astype({"trials": "int64", "missing": "int64"})
