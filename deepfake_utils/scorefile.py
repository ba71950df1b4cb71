"""Read, write and join score files: the one place that knows how people write countermeasure scores down.

Dialects read (recognised by content, never by file name)
    whitespace, no header   utterance score | utterance key score | utterance attack key score
    comma separated         the same columns with or without a header
    tab separated           with or without a header, e.g. ASVspoof 5's `filename<TAB>cm-score`
A header names its columns; a `path` column gives the utterance by its file stem. Lines starting with # and
empty lines carry nothing. What this package writes is CSV with a header and, beside it, `<file>.json`
saying what the score is. Vectors without utterance names (.mat in protocol order) are not read: nothing
would notice a wrong order.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from deepfake_utils.conventions import BONAFIDE, NO_ATTACK, SPOOF, ScoreError, atomic_write
from deepfake_utils.corpora.asvspoof import read_protocol_file

KEYS = {
    **dict.fromkeys(("bonafide", "bona-fide", "bona_fide", "genuine", "human", "real"), BONAFIDE),
    **dict.fromkeys(("spoof", "spoofed", "fake"), SPOOF),
}
_ALIASES = {
    "utterance": (
        "utterance",
        "utt",
        "utt_id",
        "utterance_id",
        "filename",
        "file",
        "file_name",
        "trial",
        "id",
    ),
    "path": ("path", "filepath", "file_path"),
    "score": ("score", "cm-score", "cm_score", "scores", "cmscore"),
    "key": ("key", "cm-label", "cm_label"),
    "attack": ("attack", "attack_id", "system"),
}
_COLUMN_OF = {alias: column for column, aliases in _ALIASES.items() for alias in aliases}
_HEADERLESS = {
    2: ("utterance", "score"),
    3: ("utterance", "key", "score"),
    4: ("utterance", "attack", "key", "score"),
}
_SHOWN = 3  # trials named in an error


@dataclass(frozen=True)
class Scores:
    """A score file: `frame` with utterance, score (higher = more bona fide) and whatever else it held."""

    frame: pd.DataFrame
    dialect: str
    higher_is: str = "bonafide"
    path: Path | None = None
    meta: dict = field(default_factory=dict)  # what the JSON companion says


def companion_path(path: str | os.PathLike) -> Path:
    """Return where the JSON that explains a score file lies: beside it, `.json` appended to its whole
    name."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def read_scores(path: str | os.PathLike, higher_is: str | None = None) -> Scores:
    """Read a score file of any dialect in the module docstring; the result says which it was.

    higher_is: "bonafide" or "spoof", what a high score in the file stands for; "spoof" negates the scores.
    None takes what the JSON companion says, else "bonafide". Raises ScoreError naming file and line for
    unreadable lines, scores that are not finite numbers, and utterances given twice.
    """
    path = Path(path)
    meta = _read_companion(path)
    higher_is = higher_is or meta.get("higher_is") or "bonafide"
    if higher_is not in ("bonafide", "spoof"):
        raise ScoreError(f"higher_is must be 'bonafide' or 'spoof', got {higher_is!r}")
    rows, line_numbers, separator = _split_lines(path)
    rows, line_numbers, columns, has_header = _name_columns(path, rows, line_numbers)
    frame = pd.DataFrame(rows, columns=columns)
    score = _parse_scores(path, frame["score"], line_numbers)
    frame["score"] = -score if higher_is == "spoof" else score
    if "utterance" not in frame:
        frame.insert(0, "utterance", [Path(name).stem for name in frame["path"]])
    if "key" in frame:
        _labels(path, frame["key"], line_numbers)
    repeated = np.flatnonzero(frame["utterance"].duplicated())
    if repeated.size:
        first = repeated[0]
        raise ScoreError(
            f"{path}, line {line_numbers[first]}: utterance {frame['utterance'].iloc[first]!r} has a score "
            "already "
            f"({repeated.size} repeated in all); every trial needs exactly one score"
        )
    for column in frame.columns.difference(["utterance", "path", "score", "key", "attack"]):
        frame[column] = _numbers_if_all_are(frame[column])
    dialect = f"{separator}, {'header' if has_header else 'no header'}: {' '.join(map(str, columns))}"
    return Scores(frame, dialect, higher_is, path, meta)


def write_scores(path: str | os.PathLike, frame: pd.DataFrame, meta: dict | None = None) -> Path:
    """Write a score file whole or not at all: CSV with a header, and its JSON companion.

    frame: columns `utterance` or `path`, `score` (higher = more bona fide), and any others, which are kept
    in order. meta: what the score is (`score`: "logit of bona fide", model, weights, corpus, ...);
    `higher_is` is always written. Floats keep the shortest digits that read back to the same number.
    Raises ScoreError on NaN, infinity or repetition.
    """
    if "score" not in frame or not {"utterance", "path"} & set(frame.columns):
        raise ScoreError(f"a score file needs `score` and `utterance` or `path`, got columns {list(frame.columns)}")
    name = "utterance" if "utterance" in frame else "path"
    bad = frame.loc[~np.isfinite(frame["score"].to_numpy(np.float64)), name]
    if len(bad):
        raise ScoreError(f"{path}: {len(bad)} scores are not finite, first that of {bad.iloc[0]!r}; nothing written")
    repeated = frame.loc[frame[name].duplicated(), name]
    if len(repeated):
        raise ScoreError(f"{path}: {repeated.iloc[0]!r} has more than one score; nothing written")
    about = {"score": "countermeasure score", **(meta or {})}
    about |= {"higher_is": "bonafide", "columns": list(frame.columns), "n_trials": len(frame)}
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"  # before the CSV: bad meta leaves no half
    path = Path(path)
    with atomic_write(path) as part:
        frame.to_csv(part, index=False)
    with atomic_write(companion_path(path)) as part:
        part.write_text(text, encoding="utf-8")
    return path


def join_scores(protocol: pd.DataFrame, scores: Scores | pd.DataFrame) -> pd.DataFrame:
    """Return the protocol, in its order, with one more column `score`; strictly one to one.

    Columns of the score file that the protocol lacks come along, except key. Raises ScoreError that names
    trials: without a score, scored but not in the protocol, in either twice, or whose key or attack
    differs between the two.
    """
    frame = scores.frame if isinstance(scores, Scores) else scores
    where = f"{scores.path}: " if isinstance(scores, Scores) and scores.path else ""
    for name, table in (("protocol", protocol), ("scores", frame)):
        if "utterance" not in table:
            raise ScoreError(f"{where}the {name} have no `utterance` column, only {list(table.columns)}")
        repeated = table.loc[table["utterance"].duplicated(), "utterance"]
        if len(repeated):
            raise ScoreError(f"{where}{_named(repeated)} occur more than once in the {name}")
    missing = protocol.loc[~protocol["utterance"].isin(frame["utterance"]), "utterance"]
    extra = frame.loc[~frame["utterance"].isin(protocol["utterance"]), "utterance"]
    if len(missing) or len(extra):
        raise ScoreError(_mismatch_text(where, missing, extra, len(protocol), len(frame)))
    aligned = frame.set_index("utterance").loc[protocol["utterance"]]
    _check_agreement(where, protocol, aligned)
    added = [column for column in aligned.columns if column not in protocol.columns and column != "key"]
    return protocol.assign(**{column: aligned[column].to_numpy() for column in added})


def read_asv_scores(path: str | os.PathLike) -> pd.DataFrame:
    """Read speaker verification scores as columns attack ("-" for bona fide), key
    (target/nontarget/spoof), score.

    2019: `bonafide target 7.98` or `A07 spoof 1.2` per line. 2021: `speaker utterance score`, the keys
    being in `trial_metadata.txt` in the same folder or the one above, as the organisers unpack them; its
    codec, phase and trim columns come along. Raises ScoreError naming file and line.
    """
    path = Path(path)
    rows, line_numbers, _ = _split_lines(path)
    for row, number in zip(rows, line_numbers, strict=True):
        if len(row) != 3:
            raise ScoreError(
                f"{path}, line {number}: {len(row)} columns; an ASV score file has three, `attack key score` "
                "(ASVspoof 2019) or `speaker utterance score` (2021)"
            )
    frame = pd.DataFrame(rows, columns=["attack", "key", "score"])
    frame["score"] = _parse_scores(path, frame["score"], line_numbers)
    if frame["key"].isin(["target", "nontarget", "spoof"]).all():
        frame["attack"] = frame["attack"].mask(frame["key"] != "spoof", NO_ATTACK)
        return frame
    metadata = next(
        (p for p in (path.parent / "trial_metadata.txt", path.parent.parent / "trial_metadata.txt") if p.is_file()),
        None,
    )
    if metadata is None:
        bad = np.flatnonzero(~frame["key"].isin(["target", "nontarget", "spoof"]))[0]
        raise ScoreError(
            f"{path}, line {line_numbers[bad]}: second column {frame['key'].iloc[bad]!r} is not target, "
            "nontarget or "
            "spoof; if this is an ASVspoof 2021 file, put its ASV/trial_metadata.txt beside it or one "
            "folder above"
        )
    return _join_asv_2021(path, frame, metadata)


def read_keys(path: str | os.PathLike) -> pd.DataFrame:
    """Read a protocol for its labels alone; no audio need exist.

    Official ASVspoof protocols and key files (2019, 2021's trial_metadata.txt, 5) go through the corpus
    readers. Any other file needs a header, comma or tab separated, naming `utterance` (or `filename`,
    `path`) and `label` (or `key`, `cm-label`; 1/0 or bonafide/spoof); its other columns come along. attack
    and speaker are "-" where it has none. Raises ScoreError or CorpusError naming file and line.
    """
    path = Path(path)
    rows, line_numbers, separator = _split_lines(path)
    head = [_COLUMN_OF.get(name.strip().lower(), name.strip()) for name in rows[0]]
    if "label" in head:
        head[head.index("label")] = "key"
    if separator == "whitespace" or "key" not in head:
        return read_protocol_file(path)
    rows, line_numbers = _check_width(path, head, rows[1:], line_numbers[1:])
    frame = pd.DataFrame(rows, columns=head)
    if "utterance" not in frame:
        if "path" not in frame:
            raise ScoreError(f"{path}: its header names neither utterance nor path: {', '.join(rows[0])}")
        frame.insert(0, "utterance", [Path(name).stem for name in frame["path"]])
    frame["label"] = _labels(path, frame.pop("key"), line_numbers)
    for column in ("attack", "speaker"):
        if column not in frame:
            frame[column] = NO_ATTACK
    frame["attack"] = frame["attack"].mask(frame["label"] == BONAFIDE, NO_ATTACK)
    return frame.apply(lambda c: c if c.name in ("utterance", "attack", "speaker") else _numbers_if_all_are(c))


def _split_lines(path: Path) -> tuple[list[list[str]], list[int], str]:
    """Fields and line number of every line that says something, and the name of the separator."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ScoreError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ScoreError(f"{path} is not a text file ({error.reason} at byte {error.start})") from None
    lines = [(line, number) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(line, number) for line, number in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise ScoreError(f"{path} is empty")
    first = lines[0][0]
    if "\t" in first or "," in first:
        separator, sign = ("tab separated", "\t") if "\t" in first else ("comma separated", ",")
        rows = [[value.strip() for value in row] for row in csv.reader((line for line, _ in lines), delimiter=sign)]
    else:
        separator, rows = "whitespace", [line.split() for line, _ in lines]
    return rows, [number for _, number in lines], separator


def _check_width(path: Path, columns, rows: list, line_numbers: list[int]) -> tuple[list, list[int]]:
    """Refuse a table without rows, or with a row of another length than its columns."""
    if not rows:
        raise ScoreError(f"{path} has a header and no trials")
    for row, number in zip(rows, line_numbers, strict=True):
        if len(row) != len(columns):
            raise ScoreError(
                f"{path}, line {number}: {len(row)} columns where {len(columns)} ({', '.join(columns)}) are "
                "expected: "
                f"{' '.join(row)[:80]!r}; names that contain spaces need a comma separated file"
            )
    return rows, line_numbers


def _name_columns(path: Path, rows: list, line_numbers: list[int]) -> tuple[list, list[int], list[str], bool]:
    """Rows without their header, and the columns' names."""
    head = [_COLUMN_OF.get(name.lower(), name) for name in rows[0]]
    if "score" in head:
        if not {"utterance", "path"} & set(head):
            raise ScoreError(f"{path}: its header names neither utterance nor path: {', '.join(rows[0])}")
        if len(set(head)) != len(head):
            raise ScoreError(f"{path}: two columns of its header mean the same: {', '.join(rows[0])}")
        return *_check_width(path, head, rows[1:], line_numbers[1:]), head, True
    if len(rows[0]) not in _HEADERLESS:
        raise ScoreError(
            f"{path}, line {line_numbers[0]}: {len(rows[0])} columns; without a header a score file has "
            "`utterance score`, "
            "`utterance key score` or `utterance attack key score`; otherwise its header must name `score`"
        )
    columns = list(_HEADERLESS[len(rows[0])])
    return *_check_width(path, columns, rows, line_numbers), columns, False


def _parse_scores(path: Path, texts: pd.Series, line_numbers: list[int]) -> np.ndarray:
    """Scores as finite float64."""
    scores = pd.to_numeric(texts, errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        first = bad[0]
        raise ScoreError(
            f"{path}, line {line_numbers[first]}: score {texts.iloc[first]!r} is not a finite number "
            f"({bad.size} such in "
            "all); the score is the last column, or the one a header names `score`"
        )
    # Parsed again by numpy: every digit counts, and pandas' fast parser may differ in the last one.
    return texts.to_numpy(dtype=object).astype(np.float64)


def _labels(path: Path, keys: pd.Series, line_numbers: list[int]) -> np.ndarray:
    """Keys (bonafide/spoof or 1/0) as labels."""
    labels = keys.str.lower().map(KEYS | {"1": BONAFIDE, "0": SPOOF})
    bad = np.flatnonzero(labels.isna())
    if bad.size:
        raise ScoreError(
            f"{path}, line {line_numbers[bad[0]]}: key {keys.iloc[bad[0]]!r} is neither bonafide nor spoof"
        )
    return labels.to_numpy(np.int64)


def _numbers_if_all_are(column: pd.Series) -> pd.Series:
    """A text column as numbers where every value is one, else unchanged."""
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column


def _read_companion(path: Path) -> dict:
    companion = companion_path(path)
    if not companion.is_file():
        return {}
    try:
        meta = json.loads(companion.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ScoreError(f"{companion} is not the JSON that explains {path.name}: {error}; mend or remove it") from None
    if not isinstance(meta, dict):
        raise ScoreError(f"{companion} must hold one JSON object, found {type(meta).__name__}")
    return meta


def _named(utterances: pd.Series) -> str:
    """A few names and how many there are."""
    more = f", ... ({len(utterances)} in all)" if len(utterances) > _SHOWN else ""
    return ", ".join(map(str, utterances.head(_SHOWN))) + more


def _mismatch_text(where: str, missing: pd.Series, extra: pd.Series, n_protocol: int, n_scores: int) -> str:
    if len(missing) == n_protocol:
        return (
            f"{where}no trial in common: the protocol has {n_protocol} such as {missing.iloc[0]!r}, the "
            "scores "
            f"{n_scores} such as {extra.iloc[0]!r}; they belong to different corpora or splits"
        )
    parts = []
    if len(missing):
        parts.append(f"{len(missing)} of the protocol's {n_protocol} trials have no score: {_named(missing)}")
    if len(extra):
        parts.append(f"{len(extra)} of {n_scores} scores belong to no trial of the protocol: {_named(extra)}")
    return f"{where}{'; '.join(parts)}; every trial needs exactly one score"


def _check_agreement(where: str, protocol: pd.DataFrame, aligned: pd.DataFrame) -> None:
    """Key and attack of a score file, where it has them, must be those of the protocol."""
    if "key" in aligned:
        labels = aligned["key"].str.lower().map(KEYS).to_numpy()
        wrong = labels != protocol["label"].to_numpy()
        _refuse(where, "key", protocol, aligned["key"], wrong)
    if "attack" in aligned and "attack" in protocol:
        is_spoof = (protocol["label"] == SPOOF).to_numpy()
        wrong = is_spoof & (aligned["attack"].to_numpy() != protocol["attack"].to_numpy())
        _refuse(where, "attack", protocol, aligned["attack"], wrong)


def _refuse(where: str, what: str, protocol: pd.DataFrame, given: pd.Series, wrong: np.ndarray) -> None:
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ScoreError(
            f"{where}the {what} of {int(wrong.sum())} trials differs from the protocol's, first "
            f"{protocol['utterance'].iloc[first]}: {given.iloc[first]!r} in the score file, "
            f"{protocol['label' if what == 'key' else what].iloc[first]!r} in the protocol; is it the "
            "protocol of these scores?"
        )


def _join_asv_2021(path: Path, frame: pd.DataFrame, metadata: Path) -> pd.DataFrame:
    """ASVspoof 2021: `speaker utterance score` with the keys of ASV/trial_metadata.txt, joined on both
    names."""
    rows, line_numbers, _ = _split_lines(metadata)
    columns = ["speaker", "utterance", "codec", "transmission", "attack", "key", "trim", "phase"]
    keys = pd.DataFrame(_check_width(metadata, columns, rows, line_numbers)[0], columns=columns)
    scored = frame.set_axis(["speaker", "utterance", "score"], axis=1)
    joined = keys.merge(scored, on=["speaker", "utterance"], how="outer", indicator=True)
    odd = joined[joined["_merge"] != "both"]
    if len(odd) or len(joined) != len(keys):
        first = (odd if len(odd) else joined).iloc[0]
        raise ScoreError(
            f"{path}: {len(odd)} of its trials and those of {metadata} do not pair off, first speaker "
            f"{first['speaker']}, utterance {first['utterance']}"
        )
    unknown = sorted(set(joined["key"]) - {"target", "nontarget", "spoof"})
    if unknown:
        raise ScoreError(f"{metadata}: key {unknown[0]!r} is not target, nontarget or spoof; this is no ASV key file")
    joined["attack"] = joined["attack"].mask(joined["key"] != "spoof", NO_ATTACK)
    return joined[["attack", "key", "score", "speaker", "utterance", "codec", "transmission", "trim", "phase"]]
