"""Protocols of ASVspoof 2019 (LA, PA), 2021 (LA, DF) and 5, and of the demo corpus, which uses 2019's layout.

One line is one trial; the columns are those of the organisers' README files and evaluation packages:

    2019 LA   LA_0039 LA_E_2834763 - A11 spoof
    2019 PA   PA_0095 PA_T_0005731 aaa AA spoof
    2021 LA   LA_0009 LA_E_9332881 alaw ita_tx A07 spoof notrim eval
    2021 DF   LA_0023 DF_E_2000011 nocodec asvspoof A14 spoof notrim progress traditional_vocoder - - - -
    5         D_4461 D_0000000169 F - - - AC1 A14 spoof -    (".tsv", but separated by spaces)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from deepfake_utils.conventions import BONAFIDE, SPOOF, CorpusError
from deepfake_utils.corpora.trials import SPLITS, attack_or_none, locate, make_table, text_lines

_KEYS = {"bonafide": BONAFIDE, "spoof": SPOOF}


class Layout(NamedTuple):
    """Where each column of a protocol line is; `utterance_id` recognises that corpus's names."""

    columns: tuple[str, ...]
    widths: tuple[int, ...]  # numbers of columns that occur in published versions
    utterance_id: re.Pattern


_LA_2019 = Layout(("speaker", "utterance", "", "attack", "label"), (5,), re.compile(r"LA_[TDE]_\w+"))
LAYOUTS = {
    "asvspoof2019_la": _LA_2019,
    "demo": _LA_2019,
    "asvspoof2019_pa": Layout(
        ("speaker", "utterance", "environment", "attack", "label"), (5,), re.compile(r"PA_[TDE]_\w+")
    ),
    "asvspoof2021_la": Layout(
        ("speaker", "utterance", "codec", "transmission", "attack", "label", "trim", "phase"),
        (8,),
        re.compile(r"LA_E_\w+"),
    ),
    "asvspoof2021_df": Layout(
        ("speaker", "utterance", "codec", "source_corpus", "attack", "label", "trim", "phase", "vocoder"),
        (8, 9, 13),
        re.compile(r"DF_E_\w+"),
    ),
    "asvspoof5": Layout(
        ("speaker", "utterance", "gender", "codec", "codec_quality", "", "attack_tag", "attack", "label"),
        (10,),
        re.compile(r"[TDE]_\d+"),
    ),
}
# The first release of ASVspoof 5 (phase 1 of the challenge) had fewer columns.
_ASVSPOOF5_PHASE1 = Layout(
    ("speaker", "utterance", "gender", "codec", "attack", "label"), (6,), LAYOUTS["asvspoof5"].utterance_id
)


def read_list(path: Path, split: str = "eval") -> pd.DataFrame:
    """Read one protocol or key file without looking for audio; its first line tells which kind it is.

    Names LA_E_... with 5 columns are ASVspoof 2019's, with 8 columns 2021's.
    """
    lines = text_lines(path)
    first = next(line for line in lines if line.strip())
    if (kind := recognise_line(first)) is None:
        raise CorpusError(f"{path} line 1: {first[:80]!r} is no line of a known protocol ({', '.join(LAYOUTS)})")
    return make_table({**_parse(path, lines, _layout(kind, lines)), "split": split}, kind)


def read(
    kind: str,
    protocols: Mapping[str, Path],
    folders: Mapping[str, Iterable[Path]],
) -> pd.DataFrame:
    """All trials of the given splits with their recordings' paths ("" where missing) and their `line`."""
    tables = []
    for split in SPLITS:
        if split not in protocols:
            continue
        path, lines = protocols[split], text_lines(protocols[split])
        rows = _parse(path, lines, _layout(kind, lines))
        found = locate(rows["utterance"], folders.get(split, ()))
        rows["path"] = [found.get(utterance, "") for utterance in rows["utterance"]]
        tables.append(make_table({**rows, "split": [split] * len(rows["label"])}, kind))
    return tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)


def recognise_line(line: str) -> str | None:
    """The kind of corpus a protocol line belongs to, or None."""
    fields = line.split()
    for kind, layout in LAYOUTS.items():
        widths = (*layout.widths, *_ASVSPOOF5_PHASE1.widths) if kind == "asvspoof5" else layout.widths
        if len(fields) in widths and layout.utterance_id.fullmatch(fields[1]):
            return kind
    return None


def _layout(kind: str, lines: list[str]) -> Layout:
    first = next(line for line in lines if line.strip())
    phase1 = kind == "asvspoof5" and len(first.split()) in _ASVSPOOF5_PHASE1.widths
    return _ASVSPOOF5_PHASE1 if phase1 else LAYOUTS[kind]


def _parse(path: Path, lines: list[str], layout: Layout) -> dict[str, list]:
    """Columns of a protocol, plus `path` and `split` ("" so far) and `line` (for messages)."""
    rows = {name: [] for name in layout.columns if name}
    places = [(i, rows[name]) for i, name in enumerate(layout.columns) if name not in ("", "label", "attack")]
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
        label = _KEYS.get(fields[i_label])
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
