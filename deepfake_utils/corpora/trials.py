"""What all corpus readers share: numbered text lines, audio listings, and the finished protocol table."""

from __future__ import annotations

import csv
import hashlib
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from deepfake_utils.conventions import (
    AUDIO_SUFFIXES,
    BONAFIDE,
    LABEL_NAMES,
    NO_ATTACK,
    PROTOCOL_COLUMNS,
    SPOOF,
    CorpusError,
)

SPLITS = ("train", "dev", "eval")
UNKNOWN_SPEAKER = "-"
UNKNOWN_ATTACK = "unknown"
CHANCE_AGREEMENT = 0.1  # of the names in a folder or of those wanted, whichever are fewer

LABEL_WORDS = {  # as people write them, letters only
    **dict.fromkeys(("bonafide", "real", "genuine", "human", "authentic"), BONAFIDE),
    **dict.fromkeys(("spoof", "spoofed", "fake", "deepfake", "synthetic", "generated"), SPOOF),
}


class Utterances(tuple):
    """A tuple that pandas may keep in `DataFrame.attrs` without copying 100,000 names at every operation."""

    __slots__ = ()

    def __deepcopy__(self, memo) -> Utterances:
        return self


def label_of(word: str) -> int | None:
    """1 for bona fide, 0 for spoof, however it is written; None for any other word.

    >>> label_of("bona-fide"), label_of("Fake"), label_of("test")
    (1, 0, None)
    """
    return LABEL_WORDS.get("".join(filter(str.isalpha, word.lower())))


def split_audio_name(name: str) -> tuple[str, str]:
    """Stem and suffix of an audio file's name; ("", "") if its suffix is not one of audio."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix) if dot and dot + suffix.lower() in AUDIO_SUFFIXES else ("", "")


def text_lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        CorpusError: the file is missing, unreadable, empty, or not text; the line is named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from None
    try:
        if b"\0" in content:
            raise UnicodeDecodeError("utf-8", content, content.index(b"\0"), 0, "binary zero")
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"{path} line {line}: not text ({error.reason}); it is damaged or is no protocol, download it again"
        ) from None
    if not any(line.strip() for line in lines):
        raise CorpusError(f"{path} is empty; download it again")
    return lines


def csv_rows(path: Path, columns: Collection[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a comma-separated file with a header, each with its line number.

    Raises:
        CorpusError: not text, a column of `columns` is absent, or a row has too few or too many fields.
    """
    reader = csv.DictReader(text_lines(path), strict=True, skipinitialspace=True)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    if absent := set(columns) - set(reader.fieldnames):
        raise CorpusError(f"{path} line 1: no column {', '.join(sorted(absent))}; its columns are {reader.fieldnames}")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise CorpusError(
                    f"{path} line {reader.line_num}: not {len(reader.fieldnames)} fields; "
                    "the file is truncated or damaged"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise CorpusError(f"{path} line {reader.line_num + 1}: {error}; the file is truncated or damaged") from None


def audio_names(folder: Path) -> Iterator[str]:
    """Names of the audio files directly inside a folder, from one listing; broken links are left out.

    A folder that cannot be listed counts as empty.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if split_audio_name(entry.name)[1] and (not entry.is_symlink() or os.path.exists(entry.path)):
                    yield entry.name
    except OSError:
        return


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


def make_table(rows: dict[str, list], corpus: str) -> pd.DataFrame:
    """Columns in the project's order, extras after them, `label` int64; `path` is "" where the audio is missing."""
    table = pd.DataFrame({**rows, "corpus": corpus})
    table["label"] = table["label"].astype("int64")
    extras = [column for column in table.columns if column not in PROTOCOL_COLUMNS]
    return table[[*PROTOCOL_COLUMNS, *extras]]


def drop_missing(
    table: pd.DataFrame,
    allow_missing: bool,
    lists: Mapping[str, Path],
    folders: Mapping[str, Iterable[Path]],
) -> pd.DataFrame:
    """Enforce that every trial has its recording, or drop those without and say which.

    Args:
        table: from `make_table`, with a `line` column that is removed here.
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
        advice = "attach the audio" if kept.empty else "attach the rest, or pass allow_missing=True to go on without"
        raise CorpusError(f"{where}: no recording of {first['utterance']}. In all: {text}. To do: {advice}")
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
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:12]


def count(table: pd.DataFrame) -> pd.DataFrame:
    """Trials by split, label and attack, with the recordings that are missing.

    Args:
        table: from `make_table` (a missing recording has an empty path).

    Returns:
        Columns split, label ("bonafide" or "spoof"), attack, trials, missing; official order of splits.
    """
    rows = table.assign(missing=table["path"] == "", order=table["split"].map(SPLITS.index))
    counts = rows.groupby(["order", "split", "label", "attack"])["missing"].agg(["size", "sum"]).reset_index()
    counts = counts.sort_values(["order", "label", "attack"], ascending=[True, False, True], ignore_index=True)
    counts["label"] = counts["label"].map(LABEL_NAMES)
    counts = counts.rename(columns={"size": "trials", "sum": "missing"}).drop(columns="order")
    return counts.astype({"trials": "int64", "missing": "int64"})


def attack_or_none(label: int, attack: str) -> str:
    """`-` for bona fide whatever the corpus writes there; a spoof without a name gets UNKNOWN_ATTACK."""
    if label == BONAFIDE:
        return NO_ATTACK
    return attack if attack and attack != NO_ATTACK else UNKNOWN_ATTACK
