"""Lists of trials with their labels: official protocols and keys, and tables with a header. No audio is looked for.

Of the official ones a line is a trial; the columns are those of the organisers' README files and evaluation packages:

    2019 LA   LA_0039 LA_E_2834763 - A11 spoof
    2019 PA   PA_0095 PA_T_0005731 aaa AA spoof
    2021 LA   LA_0009 LA_E_9332881 alaw ita_tx A07 spoof notrim eval
    2021 DF   LA_0023 DF_E_2000011 nocodec asvspoof A14 spoof notrim progress traditional_vocoder - - - -
    5         D_4461 D_0000000169 F - - - AC1 A14 spoof -    (".tsv", but separated by spaces)

A table names `utterance` or the recording (`path`, `file`), `label`, and where known `attack` (or `family`), `speaker`
and `split`, in any order: In-the-Wild's meta.csv, a manifest.csv, ASVspoof 5's keys, a protocol of ours.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from deepfake_utils.conventions import (
    BONAFIDE,
    NO_ATTACK,
    PROTOCOL_COLUMNS,
    SPOOF,
    UNKNOWN_ATTACK,
    UNKNOWN_SPEAKER,
    UNKNOWN_WORDS,
    ConfigError,
    CorpusError,
    label_of,
)
from deepfake_utils.files import Rows, read_rows, read_text, short_names

_OFFICIAL_LABELS = {"bonafide": BONAFIDE, "spoof": SPOOF}
COLUMN_OF = {  # how people name columns -> how this package does
    alias: column
    for column, aliases in {
        "utterance": "utterance utt utt_id utterance_id trial id",
        "path": "path filepath file_path file filename file_name",
        "label": "label key cm-label cm_label",
        "attack": "attack attack_id system",
        "score": "score scores cm-score cm_score cmscore",
    }.items()
    for alias in aliases.split()
}
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("dev", "development", "val", "valid", "validation"), "dev"),
    **dict.fromkeys(("eval", "evaluation", "test", "testing"), "eval"),
}


class Layout(NamedTuple):
    """Where each column of a protocol line is; `utterance_id` recognises that corpus's names."""

    columns: tuple[str, ...]
    widths: tuple[int, ...]  # numbers of columns that occur in published versions
    utterance_id: re.Pattern


def _layout(columns: str, widths: tuple[int, ...], utterance_id: str) -> Layout:
    return Layout(tuple(columns.split()), widths, re.compile(utterance_id))


LAYOUTS = {  # columns named . are not kept
    "asvspoof2019_la": _layout("speaker utterance . attack label", (5,), r"LA_[TDE]_\w+"),
    "asvspoof2019_pa": _layout("speaker utterance environment attack label", (5,), r"PA_[TDE]_\w+"),
    "asvspoof2021_la": _layout("speaker utterance codec transmission attack label trim phase", (8,), r"LA_E_\w+"),
    "asvspoof2021_df": _layout(
        "speaker utterance codec source_corpus attack label trim phase vocoder", (8, 9, 13), r"DF_E_\w+"
    ),
    "asvspoof5": _layout("speaker utterance gender codec codec_quality . attack_tag attack label", (10,), r"[TDE]_\d+"),
}
# The first release of ASVspoof 5 (phase 1 of the challenge) had fewer columns.
_ASVSPOOF5_PHASE1 = _layout("speaker utterance gender codec attack label", (6,), r"[TDE]_\d+")


def split_of(word: str) -> str | None:
    """train, dev or eval, however it is written; None for any other word.

    >>> split_of("Validation"), split_of("notes")
    ('dev', None)
    """
    return _SPLIT_WORDS.get(word.lower().strip())


def attack_or_none(label: int, attack: str) -> str:
    """`-` for bona fide whatever the corpus writes there; a spoof without a name gets UNKNOWN_ATTACK."""
    if label == BONAFIDE:
        return NO_ATTACK
    return UNKNOWN_ATTACK if attack in UNKNOWN_WORDS else attack


def read_keys(path: str | os.PathLike, split: str = "eval", *, one_is: str | None = None) -> pd.DataFrame:
    """Read a list of trials for its labels, for evaluating scores where the audio is not at hand.

    Args:
        path: an official ASVspoof protocol or key file, In-the-Wild's meta.csv, a manifest.csv, or any table with a
            header that names `utterance` (or `path`, `file`) and `label`: see the module docstring.
        split: what to write in the `split` column where the file does not say.
        one_is: "bonafide" or "spoof", what a label 1 stands for where labels are numbers; 0 is the other.

    Returns:
        Protocol table; `path` is what the file says, "" where it says nothing.

    Raises:
        CorpusError: naming file and line: not text, wrong number of columns, unknown label, duplicate utterance.
        ConfigError: `one_is` is another word.
    """
    if one_is not in (None, "bonafide", "spoof"):
        raise ConfigError(f"one_is must be 'bonafide' or 'spoof', got {one_is!r}")
    table = read_list(path, one_is=one_is, advice=", or say --one-is bonafide or spoof (one_is= in Python)")
    if (table["path"] == table["utterance"]).all():
        table["utterance"] = short_names(table["utterance"])
    return table.assign(split=table["split"].replace("", split)).drop(columns="line")


def read_list(
    path: str | os.PathLike, kind: str | None = None, *, one_is: str | None = None, advice: str = ""
) -> pd.DataFrame:
    """Read a list of trials as it stands, with the number of each one's `line`, and "" as split where none is named.

    In a table that names recordings by their paths alone, the path is the utterance.

    Args:
        kind: one of LAYOUTS, where that is known; otherwise the first line tells. Names LA_E_... with 5 columns are
            ASVspoof 2019's, with 8 columns 2021's.
        one_is, advice: what a label 1 stands for, and what to say beside `write bonafide and spoof` where it is asked.
    """
    path = Path(path)
    lines = read_text(path, CorpusError, names_are_bytes=True).split("\n")
    kind = kind or recognise_line(next(line for line in lines if line.strip()))
    if kind is None:
        return _read_table(read_rows(path, CorpusError), one_is, advice)
    return make_table(_parse(path, read_text(path, CorpusError).split("\n"), kind), kind)


def recognise_line(line: str) -> str | None:
    """The kind of corpus a protocol line belongs to, or None."""
    fields = line.split()
    for kind, layout in LAYOUTS.items():
        widths = (*layout.widths, *_ASVSPOOF5_PHASE1.widths) if kind == "asvspoof5" else layout.widths
        if len(fields) in widths and layout.utterance_id.fullmatch(fields[1]):
            return kind
    return None


def column_names(header: Sequence[str]) -> list[str]:
    """The names of a header's columns as this package calls them; what it does not know keeps its name.

    >>> column_names(["Filename", "CM-score", "Speaker", "codec"])
    ['path', 'score', 'speaker', 'codec']
    """
    lower = [name.lower() for name in header]
    names = []
    for name, low in zip(header, lower, strict=True):
        column = COLUMN_OF.get(low)
        if column is None or (column != low and column in lower):  # beside `path`, `file` is another matter
            column = low if low in (*PROTOCOL_COLUMNS, "family") else name
        names.append(column)
    return names


def labels_of(
    words: Sequence[str], attacks: Sequence[str] | None, one_is: str | None, rows: Rows, skip: int, advice: str
) -> list[int]:
    """Labels of a table's rows. Numbers are understood where it is said what a 1 stands for.

    Half the world writes 1 for bona fide and half for spoof. Beside `one_is`, attacks that are named for the one number
    and `-` for the other say which it is.

    Raises:
        rows.error: a word that is no label, or a number of which nothing says what it stands for; the line is named.
    """
    named = [attack not in UNKNOWN_WORDS[:2] for attack in attacks or ()]
    if one_is is None and len(set(named)) == 2:
        ones = [word == "1" for word in words]
        one_is = "spoof" if ones == named else "bonafide" if ones == [not one for one in named] else None
    numbers = {"bonafide": {"1": BONAFIDE, "0": SPOOF}, "spoof": {"1": SPOOF, "0": BONAFIDE}}.get(one_is, {})
    known = {word: numbers.get(word, label_of(word)) for word in set(words)}
    labels = [known[word] for word in words]
    if None in labels:
        bad = labels.index(None)
        said = f"{rows.at(bad + skip)}: unknown label {words[bad]!r}, expected bonafide or spoof"
        if words[bad] in ("0", "1"):
            said = (
                f"{rows.at(bad + skip)}: the label {words[bad]!r} is ambiguous, some write 1 for bona fide and some "
                f"for spoof: write bonafide and spoof{advice}"
            )
        raise rows.error(said)
    return labels


def _read_table(rows: Rows, one_is: str | None, advice: str) -> pd.DataFrame:
    """A table with a header as protocol rows; unknown columns come along, as numbers where all their values are."""
    names = column_names(rows.fields[0])
    if "attack" not in names and "family" in names:
        names[names.index("family")] = "attack"
    if "label" not in names or not {"utterance", "path"} & set(names):
        first = " ".join(rows.fields[0])[:80]
        raise CorpusError(
            f"{rows.at(0)}: {first!r} is no line of a known protocol ({', '.join(LAYOUTS)}), and no header that names "
            "`label` and `utterance` or `path`"
        )
    columns = rows.columns(names, skip=1)
    blank = [""] * (len(rows.fields) - 1)
    ours = "bonafide" if set(PROTOCOL_COLUMNS) <= set(names) else None
    labels = labels_of(columns["label"], columns.get("attack"), one_is or ours, rows, 1, advice)
    utterances = [a or b for a, b in zip(columns.get("utterance", blank), columns.get("path", blank), strict=True)]
    splits = [split_of(word) if word else "" for word in columns.get("split", blank)]
    first_row: dict[str, int] = {}
    for i, (utterance, split) in enumerate(zip(utterances, splits, strict=True)):
        if not utterance:
            raise CorpusError(f"{rows.at(i + 1)}: neither path nor utterance is given; one of them must be filled")
        if (earlier := first_row.setdefault(utterance, i)) != i:
            raise CorpusError(f"{rows.at(i + 1)}: {utterance} already stands on line {rows.numbers[earlier + 1]}")
        if split is None:
            raise CorpusError(f"{rows.at(i + 1)}: unknown split {columns['split'][i]!r}, expected train, dev or eval")
        if not split and any(splits):
            raise CorpusError(f"{rows.at(i + 1)}: no split is given, but other lines name theirs; fill it in")
    extras = {name: numbers_if_all_are(values) for name, values in columns.items() if name not in PROTOCOL_COLUMNS}
    return make_table(
        {
            **extras,
            "utterance": utterances,
            "path": columns.get("path", blank),
            "label": labels,
            "attack": list(map(attack_or_none, labels, columns.get("attack", blank))),
            "speaker": [word or UNKNOWN_SPEAKER for word in columns.get("speaker", blank)],
            "split": splits,
            "line": rows.numbers[1:],
        },
        rows.path.parent.name,
    )


def numbers_if_all_are(texts: Sequence[str]) -> Sequence[str] | list[int] | list[float]:
    """Texts as numbers, to the last digit, where every one is a number or empty; else unchanged, as are 007 and 1_2.

    >>> numbers_if_all_are(["3", "4"]), numbers_if_all_are(["2.5", ""]), numbers_if_all_are(["07", "7"])
    ([3, 4], [2.5, nan], ['07', '7'])
    """
    if any("_" in text or (text[:1] == "0" and text[1:2].isdigit()) for text in texts):
        return texts
    for convert in (int, lambda text: float(text or "nan")):
        try:
            return [convert(text) for text in texts]
        except ValueError:
            continue
    return texts


def make_table(rows: dict[str, list], corpus: str) -> pd.DataFrame:
    """Columns in the project's order, extras after them, `label` int64; `path` is "" where the audio is missing."""
    table = pd.DataFrame({**rows, "corpus": corpus})
    table["label"] = table["label"].astype("int64")
    extras = [column for column in table.columns if column not in PROTOCOL_COLUMNS]
    return table[[*PROTOCOL_COLUMNS, *extras]]


def _parse(path: Path, lines: list[str], kind: str) -> dict[str, list]:
    """Columns of an official protocol, plus `path` and `split` ("" so far) and `line` (for messages)."""
    first = next(line for line in lines if line.strip())
    phase1 = kind == "asvspoof5" and len(first.split()) in _ASVSPOOF5_PHASE1.widths
    layout = _ASVSPOOF5_PHASE1 if phase1 else LAYOUTS[kind]
    rows = {name: [] for name in layout.columns if name != "."}
    places = [(i, rows[name]) for i, name in enumerate(layout.columns) if name not in (".", "label", "attack")]
    i_label, i_attack = layout.columns.index("label"), layout.columns.index("attack")
    first_line: dict[str, int] = {}
    width, line_numbers = None, []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        if width is None and len(fields) in layout.widths:
            width = len(fields)
        if len(fields) != width:
            raise CorpusError(
                f"{path} line {number}: {len(fields)} columns, expected {width or layout.widths}: "
                f"{line[:80]!r}; the file is truncated or is another kind of protocol"
            )
        label = _OFFICIAL_LABELS.get(fields[i_label])
        if label is None:
            raise CorpusError(f"{path} line {number}: unknown label {fields[i_label]!r}, expected bonafide or spoof")
        if (earlier := first_line.setdefault(fields[1], number)) != number:
            raise CorpusError(f"{path} line {number}: utterance {fields[1]} already stands on line {earlier}")
        for i, column in places:
            column.append(sys.intern(fields[i]) if i < width else "-")
        rows["label"].append(label)
        rows["attack"].append(attack_or_none(label, sys.intern(fields[i_attack])))
        line_numbers.append(number)
    blank = [""] * len(line_numbers)
    return {**rows, "path": blank, "split": blank, "line": line_numbers}
