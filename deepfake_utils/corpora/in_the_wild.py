"""In-the-Wild (Müller et al., "Does Audio Deepfake Detection Generalize?", Interspeech 2022): meta.csv and WAV files.

`meta.csv` has the columns file, speaker, label, where bona fide is written `bona-fide`. It is a test corpus without
official splits, so every trial is `eval`; `assign_splits` makes others.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from deepfake_utils.conventions import CorpusError
from deepfake_utils.corpora.trials import attack_or_none, csv_rows, label_of, locate, make_table, split_audio_name

MARKER_COLUMNS = {"file", "speaker", "label"}


def read(meta: Path, folders: Iterable[Path]) -> pd.DataFrame:
    """All trials with their recordings' paths ("" where missing) and their `line` in meta.csv.

    Args:
        meta: path of meta.csv.
        folders: where to look for the recordings, nearest first.

    Raises:
        CorpusError: naming file and line: not text, a row too short or too long, unknown label, duplicate file.
    """
    rows = {name: [] for name in ("utterance", "label", "attack", "speaker", "line")}
    first_line: dict[str, int] = {}
    for number, row in csv_rows(meta, MARKER_COLUMNS):
        label = label_of(row["label"])
        utterance = split_audio_name(row["file"].rpartition("/")[2])[0] or row["file"]
        if label is None:
            raise CorpusError(f"{meta} line {number}: unknown label {row['label']!r}, expected bona-fide or spoof")
        if (earlier := first_line.setdefault(utterance, number)) != number:
            raise CorpusError(f"{meta} line {number}: {row['file']} already stands on line {earlier}")
        rows["utterance"].append(utterance)
        rows["label"].append(label)
        rows["attack"].append(attack_or_none(label, ""))
        rows["speaker"].append(row["speaker"].strip())
        rows["line"].append(number)
    found = locate(rows["utterance"], folders)
    rows["path"] = [found.get(utterance, "") for utterance in rows["utterance"]]
    return make_table({**rows, "split": ["eval"] * len(rows["line"])}, "in_the_wild")
