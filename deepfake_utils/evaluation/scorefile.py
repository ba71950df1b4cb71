"""Read, write and join score files: the one place that knows how people write countermeasure scores down.

Dialects read (recognised by content, never by file name)
    no header   utterance score | utterance score key | utterance key score | utterance attack key score
    header      names its columns in any order, e.g. ASVspoof 5's `filename<TAB>cm-score`
separated by white space, tabs, commas or semicolons (then perhaps with decimal commas), in UTF-8 or UTF-16, packed with
gzip or not. Recordings may be named by paths: `files.short_names` of them are the utterances, and `join_scores` uses
as much of a path as the protocol has. Lines starting with # and empty lines carry nothing. What this package writes is
CSV with a header and, beside it, `<file>.json` saying what the score is. Vectors without utterance names (.mat in
protocol order) are not read: nothing would notice a wrong order.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from deepfake_utils.conventions import (
    LABEL_NAMES,
    NO_ATTACK,
    SPOOF,
    UNKNOWN_WORDS,
    ScoreError,
    label_of,
)
from deepfake_utils.files import Rows, atomic_write, is_decimal_comma, match_names, read_rows, short_names
from deepfake_utils.protocols import column_names, labels_of, numbers_if_all_are

_HEADERLESS = {
    2: ("utterance", "score"),
    3: ("utterance", "label", "score"),
    4: ("utterance", "attack", "label", "score"),
}
_KEY_LAST = ("utterance", "score", "label")  # of three columns, where the last one is a word for a label
_ASV_KEYS = {"target", "nontarget", "spoof"}
_UNNAMED = (*UNKNOWN_WORDS, "spoof", "bonafide")  # attacks that say nothing
_TEXT = ("utterance", "path", "attack", "speaker", "split", "corpus")
_SHOWN = 3  # trials named in an error


@dataclass(frozen=True)
class Scores:
    """A score file: `frame` with utterance, score (higher = more bona fide) and whatever else it held."""

    frame: pd.DataFrame
    dialect: str
    higher_is: str = "bonafide"
    path: Path | None = None
    meta: dict = field(default_factory=dict)  # what the JSON companion says
    notes: tuple[str, ...] = ()  # what a reader should know, such as repeated lines


def companion_path(path: str | os.PathLike) -> Path:
    """Return where the JSON that explains a score file lies: beside it, `.json` appended to its whole
    name."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def read_scores(path: str | os.PathLike, higher_is: str | None = None, *, one_is: str | None = None) -> Scores:
    """Read a score file of any dialect in the module docstring; the result says which it was.

    higher_is: "bonafide" or "spoof", what a high score in the file stands for; "spoof" negates the scores.
    None takes what the JSON companion says, else "bonafide". one_is: the same for a key 1, where keys are numbers.
    Raises ScoreError naming file and line for unreadable lines, scores that are not finite numbers, keys that are
    numbers without `one_is`, and utterances given twice with different scores.
    """
    path = Path(path)
    meta = _read_companion(path)
    higher_is = higher_is or meta.get("higher_is") or "bonafide"
    for name, value in (("higher_is", higher_is), ("one_is", one_is or "bonafide")):
        if value not in ("bonafide", "spoof"):
            raise ScoreError(f"{name} must be 'bonafide' or 'spoof', got {value!r}")
    rows = read_rows(path, ScoreError)
    names, skip = _columns_of(rows)
    columns = rows.columns(names, skip)
    frame = pd.DataFrame(columns, index=range(skip, len(rows.fields)))
    score = _parse_scores(rows, frame["score"])
    frame["score"] = -score if higher_is == "spoof" else score
    if "label" in frame:
        advice = ", or say --one-is bonafide or spoof (one_is= in Python)"
        labels = labels_of(columns["label"], columns.get("attack"), one_is, rows, skip, advice)
        frame["label"] = [LABEL_NAMES[label] for label in labels]
        frame = frame.rename(columns={"label": "key"})
    if "utterance" not in frame:
        frame = frame.assign(utterance=short_names(columns["path"]))[["utterance", *frame.columns]]
    frame, notes = _without_repetitions(frame, rows)
    for name in frame.columns.difference([*_TEXT, "score", "key"]):
        frame[name] = numbers_if_all_are(frame[name].tolist())
    known = column_names(rows.fields[0]) if skip else names
    dialect = f"{rows.separator}, {'header' if skip else 'no header'}: {' '.join(known)}".replace("label", "key")
    return Scores(frame.reset_index(drop=True), dialect, higher_is, path, meta, notes)


def _columns_of(rows: Rows) -> tuple[list[str], int]:
    """Names of a score file's columns, and how many rows its header takes."""
    first = rows.fields[0]
    names = column_names(first)
    if "score" in names:
        if not {"utterance", "path"} & set(names):
            raise ScoreError(f"{rows.at(0)}: the header names neither utterance nor path: {first}")
        return names, 1
    if len(first) not in _HEADERLESS:
        raise ScoreError(
            f"{rows.at(0)}: {len(first)} columns; without a header a score file has `utterance score`, `utterance "
            "score key`, `utterance key score` or `utterance attack key score`; otherwise its header must name `score`"
        )
    if len(first) == 3 and (label_of(first[2]) is not None or (first[2] in "01" and "." in first[1])):
        return list(_KEY_LAST), 0
    if len(first) == 3 and rows.separator == "whitespace" and label_of(first[1]) is None and not first[1].isdigit():
        raise ScoreError(
            f"{rows.at(0)}: unknown label {first[1]!r}, expected bonafide or spoof; if names hold spaces, separate the "
            "columns by tabs or commas"
        )
    return list(_HEADERLESS[len(first)]), 0


def _without_repetitions(frame: pd.DataFrame, rows: Rows) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Every utterance once, and a note where some stood there more than once with the same score."""
    repeated = frame["utterance"].duplicated()
    if not repeated.any():
        return frame, ()
    differs = repeated & ~frame.duplicated([name for name in ("utterance", "score", "key") if name in frame])
    if differs.any():
        row = differs.idxmax()
        raise ScoreError(
            f"{rows.at(row)}: {frame['utterance'][row]!r} has another score already ({int(differs.sum())} such in "
            "all); every trial needs exactly one score"
        )
    several = f"{int(repeated.sum()):,} lines repeat" if repeated.sum() > 1 else "a line repeats"
    note = (
        f"{rows.path}: {several} a trial with the same score, the first on line {rows.numbers[repeated.idxmax()]}; "
        "each trial is counted once"
    )
    return frame[~repeated], (note,)


def write_scores(path: str | os.PathLike, frame: pd.DataFrame, meta: dict | None = None) -> Path:
    """Write a score file whole or not at all: CSV with a header, and its JSON companion.

    frame: columns `utterance` or `path`, `score` (higher = more bona fide), and any others, which are kept
    in order. meta: what the score is (`score`: a logit, a cosine, log-odds, ...), model, weights, corpus, ...;
    `higher_is` is always written. Floats keep the shortest digits that read back to the same number, names their
    bytes. Raises ScoreError on NaN, infinity or repetition.
    """
    if "score" not in frame or not {"utterance", "path"} & set(frame.columns):
        raise ScoreError(f"a score file needs `score` and `utterance` or `path`, got {list(frame.columns)}")
    name = "utterance" if "utterance" in frame else "path"
    bad = frame.loc[~np.isfinite(frame["score"].to_numpy(np.float64)), name]
    if len(bad):
        raise ScoreError(f"{path} not written: {len(bad)} scores are not finite, first {bad.iloc[0]!r}'s")
    repeated = frame.loc[frame[name].duplicated(), name]
    if len(repeated):
        raise ScoreError(f"{path} not written: {repeated.iloc[0]!r} has more than one score")
    about = {"score": "countermeasure score", **(meta or {})}
    about |= {"higher_is": "bonafide", "columns": list(frame.columns), "n_trials": len(frame)}
    text = json.dumps(about, indent=2) + "\n"  # before the CSV: bad meta leaves no half
    path = Path(path)
    # A carriage return in a name is quoted only where all texts are.
    quoting = csv.QUOTE_NONNUMERIC if frame[name].astype(str).str.contains("\r").any() else csv.QUOTE_MINIMAL
    with atomic_write(path) as part:
        frame.to_csv(part, index=False, quoting=quoting, encoding="utf-8", errors="surrogateescape")
    with atomic_write(companion_path(path)) as part:
        part.write_text(text, encoding="utf-8")
    return path


def join_scores(protocol: pd.DataFrame, scores: Scores | pd.DataFrame) -> pd.DataFrame:
    """Return the protocol, in its order, with one more column `score`; strictly one to one.

    Utterances are the same where `files.match_names` says so. A column `score` that the protocol has already is
    replaced; columns of the score file that the protocol lacks come along, except key. Raises ScoreError that names
    trials: without a score, scored but not in the protocol, in either twice, or whose key or attack differs between the
    two.
    """
    frame = scores.frame if isinstance(scores, Scores) else scores
    where = f"{scores.path}: " if isinstance(scores, Scores) and scores.path else ""
    protocol = protocol.drop(columns="score", errors="ignore")
    for name, table in (("protocol", protocol), ("scores", frame)):
        if "utterance" not in table:
            raise ScoreError(f"{where}the {name} have no `utterance` column, only {list(table.columns)}")
        repeated = table.loc[table["utterance"].duplicated(), "utterance"]
        if len(repeated):
            raise ScoreError(f"{where}{_named(repeated)} occur more than once in the {name}")
    frame = in_names_of(protocol, frame)
    missing = protocol.loc[~protocol["utterance"].isin(frame["utterance"]), "utterance"]
    extra = frame.loc[~frame["utterance"].isin(protocol["utterance"]), "utterance"]
    if len(missing) or len(extra):
        raise ScoreError(_mismatch_text(where, missing, extra, len(protocol), len(frame)))
    aligned = frame.set_index("utterance").loc[protocol["utterance"]]
    _check_agreement(where, protocol, aligned)
    added = [column for column in aligned.columns if column not in protocol.columns and column != "key"]
    return protocol.assign(**{column: aligned[column].to_numpy() for column in added})


def in_names_of(protocol: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return scores with the protocol's names for the same recordings; see `files.match_names`."""
    best, known = scores, set(protocol["utterance"])
    for column in ("utterance", "path"):
        if column in scores and not best["utterance"].isin(known).all():
            matched = scores.assign(utterance=match_names(protocol["utterance"], scores[column]))
            best = max(best, matched, key=lambda frame: frame["utterance"].isin(known).sum())
    return best


def read_asv_scores(path: str | os.PathLike) -> pd.DataFrame:
    """Read speaker verification scores as columns attack ("-" for bona fide), key
    (target/nontarget/spoof), score.

    2019: `bonafide target 7.98` or `A07 spoof 1.2` per line. 2021: `speaker utterance score`, the keys
    being in `trial_metadata.txt` in the same folder or the one above, as the organisers unpack them; its
    codec, phase and trim columns come along. Raises ScoreError naming file and line.
    """
    path = Path(path)
    rows = read_rows(path, ScoreError)
    frame = pd.DataFrame(rows.columns(("attack", "key", "score")))
    frame["score"] = _parse_scores(rows, frame["score"])
    strange = ~frame["key"].isin(_ASV_KEYS)
    if not strange.any():
        frame["attack"] = frame["attack"].mask(frame["key"] != "spoof", NO_ATTACK)
        return frame
    beside = [folder / "trial_metadata.txt" for folder in (path.parent, path.parent.parent)]
    metadata = next((candidate for candidate in beside if candidate.is_file()), None)
    if metadata is None:
        raise ScoreError(
            f"{rows.at(strange.argmax())}: {frame['key'][strange.argmax()]!r} is not target, nontarget or "
            "spoof; an ASV score file has `attack key score` (2019) or `speaker utterance score` (2021, with "
            "its ASV/trial_metadata.txt beside it or one folder above)"
        )
    return _join_asv_2021(path, frame, metadata)


def _parse_scores(rows: Rows, texts: pd.Series) -> np.ndarray:
    """Scores as finite float64; decimal commas where the separator leaves room for them and all have one."""
    plain = texts
    if rows.separator != "comma" and texts.map(is_decimal_comma).any():
        plain = texts.where(~texts.str.contains(".", regex=False), "")  # a point would separate thousands, or not
        plain = plain.str.replace(",", ".", regex=False)
    try:
        scores = plain.to_numpy(dtype=object).astype(np.float64)
    except ValueError:
        scores = pd.to_numeric(plain, errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(scores) | texts.str.contains("_", regex=False))
    if bad.size:
        raise ScoreError(
            f"{rows.at(texts.index[bad[0]])}: score {texts.iloc[bad[0]]!r} is not a finite number ({bad.size} such in "
            "all); the score is the last column, or the one that a header names `score`; decimals have a point or a "
            "comma, not both"
        )
    return scores


def _read_companion(path: Path) -> dict:
    companion = companion_path(path)
    if not companion.is_file():
        return {}
    try:
        meta = json.loads(companion.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ScoreError(f"{companion} is not the JSON that explains {path.name}: {error}") from None
    if not isinstance(meta, dict):
        raise ScoreError(f"{companion} must hold one JSON object, found {type(meta).__name__}")
    return meta


def _named(utterances: pd.Series) -> str:
    """A few names and how many there are."""
    more = f", ... ({len(utterances)} in all)" if len(utterances) > _SHOWN else ""
    return ", ".join(map(str, utterances.head(_SHOWN))) + more


def _mismatch_text(where: str, missing: pd.Series, extra: pd.Series, n_protocol: int, n_scores: int) -> str:
    if len(missing) == n_protocol:
        reason = "they belong to different corpora or splits"
        if {name.lower() for name in missing} & {name.lower() for name in extra}:
            reason = "they differ in upper and lower case: write them alike"
        return (
            f"{where}no trial in common: the protocol has {n_protocol} such as {missing.iloc[0]!r}, "
            f"the scores {n_scores} such as {extra.iloc[0]!r}; {reason}"
        )
    parts = []
    if len(missing):
        parts.append(f"{len(missing)} of the protocol's {n_protocol} trials have no score: {_named(missing)}")
        parts.append("where `score --out` found no speech in them, `--first-window` scores them all the same")
    if len(extra):
        parts.append(f"{len(extra)} of {n_scores} scores belong to no trial of the protocol: {_named(extra)}")
    return f"{where}{'; '.join(parts)}; every trial needs exactly one score"


def _check_agreement(where: str, protocol: pd.DataFrame, aligned: pd.DataFrame) -> None:
    """Key and attack of a score file, where it has them, must be those of the protocol."""
    if "key" in aligned:
        given = aligned["key"].map(lambda key: label_of(key) if isinstance(key, str) else key)
        wrong = given.to_numpy() != protocol["label"].to_numpy()
        _refuse(where, "key", protocol, aligned["key"], protocol["label"].map(LABEL_NAMES), wrong)
    if "attack" in aligned and "attack" in protocol:
        is_spoof = (protocol["label"] == SPOOF).to_numpy()
        given, known = aligned["attack"].to_numpy(), protocol["attack"].to_numpy()
        wrong = is_spoof & (given != known) & ~np.isin(given, _UNNAMED) & ~np.isin(known, _UNNAMED)
        _refuse(where, "attack", protocol, aligned["attack"], protocol["attack"], wrong)


def _refuse(where: str, what: str, protocol: pd.DataFrame, given: pd.Series, known: pd.Series, wrong: np.ndarray):
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        everywhere = ", and all keys are exchanged: is a 1 a spoof there?" if what == "key" and wrong.all() else ""
        raise ScoreError(
            f"{where}the {what} of {int(wrong.sum())} trials differs from the protocol's, first "
            f"{protocol['utterance'].iloc[first]}: {given.iloc[first]} in the scores, {known.iloc[first]} in the "
            f"protocol{everywhere}; is it the protocol of these scores?"
        )


def _join_asv_2021(path: Path, frame: pd.DataFrame, metadata: Path) -> pd.DataFrame:
    """ASVspoof 2021: `speaker utterance score`, and the keys of trial_metadata.txt, joined on both names."""
    columns = ("speaker", "utterance", "codec", "transmission", "attack", "key", "trim", "phase")
    keys = pd.DataFrame(read_rows(metadata, ScoreError).columns(columns))
    scored = frame.set_axis(["speaker", "utterance", "score"], axis=1)
    joined = keys.merge(scored, on=["speaker", "utterance"], how="outer", indicator=True)
    odd = joined[joined["_merge"] != "both"]
    if len(odd) or len(joined) != len(keys):
        first = (odd if len(odd) else joined[joined.duplicated(["speaker", "utterance"])]).iloc[0]
        raise ScoreError(
            f"{path} and {metadata} do not pair off one to one, first speaker {first['speaker']}, utterance "
            f"{first['utterance']} ({len(odd)} trials in one of them only)"
        )
    unknown = sorted(set(joined["key"]) - _ASV_KEYS)
    if unknown:
        raise ScoreError(f"{metadata}: key {unknown[0]!r} is not target, nontarget or spoof: no ASV key file")
    joined["attack"] = joined["attack"].mask(joined["key"] != "spoof", NO_ATTACK)
    return joined[["attack", "key", "score", "speaker", "utterance", "codec", "transmission", "trim", "phase"]]
