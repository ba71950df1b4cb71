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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import pandas as pd

from deepfake_utils.conventions import BONAFIDE, LABEL_NAMES, NO_ATTACK, SPOOF, ScoreError
from deepfake_utils.files import atomic_write

KEYS = {
    **dict.fromkeys(("bonafide", "bona-fide", "bona_fide", "genuine", "human", "real", "1"), BONAFIDE),
    **dict.fromkeys(("spoof", "spoofed", "fake", "0"), SPOOF),
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
    "key": ("key", "label", "cm-label", "cm_label"),
    "attack": ("attack", "attack_id", "system"),
}
_COLUMN_OF = {alias: column for column, aliases in _ALIASES.items() for alias in aliases}
_HEADERLESS = {
    2: ("utterance", "score"),
    3: ("utterance", "key", "score"),
    4: ("utterance", "attack", "key", "score"),
}
_ASV_KEYS = {"target", "nontarget", "spoof"}
_UNNAMED = (NO_ATTACK, "unknown", "spoof")  # attacks that say nothing
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
    lines = _read_lines(path)
    head = lines.header()
    if "score" in head:
        frame, header = lines.table(head, skip=1), "header"
    elif len(head) in _HEADERLESS:
        frame, header = lines.table(_HEADERLESS[len(head)]), "no header"
    else:
        raise ScoreError(
            f"{lines.at(0)}: {len(head)} columns; without a header a score file has `utterance score`, "
            "`utterance key score` or `utterance attack key score`; otherwise its header must name `score`"
        )
    dialect = f"{lines.separator}, {header}: {' '.join(frame.columns)}"
    score = _parse_scores(lines, frame["score"])
    frame["score"] = -score if higher_is == "spoof" else score
    if "key" in frame:
        frame["key"] = [LABEL_NAMES[label] for label in _labels(lines, frame["key"])]
    frame = _named_by_utterance(lines, frame)
    repeated = np.flatnonzero(frame["utterance"].duplicated())
    if repeated.size:
        raise ScoreError(
            f"{lines.at(frame.index[repeated[0]])}: {frame['utterance'].iloc[repeated[0]]!r} has a score "
            f"already ({repeated.size} repeated in all); every trial needs exactly one score"
        )
    text = {"utterance", "path", "score", "key", "attack"}
    frame = frame.apply(lambda column: column if column.name in text else _numbers_if_all_are(column))
    return Scores(frame.reset_index(drop=True), dialect, higher_is, path, meta)


def write_scores(path: str | os.PathLike, frame: pd.DataFrame, meta: dict | None = None) -> Path:
    """Write a score file whole or not at all: CSV with a header, and its JSON companion.

    frame: columns `utterance` or `path`, `score` (higher = more bona fide), and any others, which are kept
    in order. meta: what the score is (`score`: "logit of bona fide", model, weights, corpus, ...);
    `higher_is` is always written. Floats keep the shortest digits that read back to the same number.
    Raises ScoreError on NaN, infinity or repetition.
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
    lines = _read_lines(path)
    frame = lines.table(("attack", "key", "score"))
    frame["score"] = _parse_scores(lines, frame["score"])
    strange = ~frame["key"].isin(_ASV_KEYS)
    if not strange.any():
        frame["attack"] = frame["attack"].mask(frame["key"] != "spoof", NO_ATTACK)
        return frame
    beside = [folder / "trial_metadata.txt" for folder in (path.parent, path.parent.parent)]
    metadata = next((candidate for candidate in beside if candidate.is_file()), None)
    if metadata is None:
        raise ScoreError(
            f"{lines.at(strange.argmax())}: {frame['key'][strange.argmax()]!r} is not target, nontarget or "
            "spoof; an ASV score file has `attack key score` (2019) or `speaker utterance score` (2021, with "
            "its ASV/trial_metadata.txt beside it or one folder above)"
        )
    return _join_asv_2021(path, frame, metadata)


def read_keys(path: str | os.PathLike) -> pd.DataFrame:
    """Read a protocol for its labels alone; no audio need exist.

    Official ASVspoof protocols and key files (2019, 2021's trial_metadata.txt, 5) go through the corpus
    readers. Any other file needs a header, comma or tab separated, naming `utterance` (or `filename`,
    `path`) and `label` (or `key`, `cm-label`; 1/0 or bonafide/spoof); its other columns come along. attack
    and speaker are "-" where it has none. Raises ScoreError or CorpusError naming file and line.
    """
    lines = _read_lines(Path(path))
    head = lines.header()
    if lines.separator == "whitespace" or "key" not in head:
        from deepfake_utils.corpora import read_protocol_file  # brings audio reading, which scores need not

        return read_protocol_file(path)
    frame = _named_by_utterance(lines, lines.table(head, skip=1))
    frame.insert(1, "label", _labels(lines, frame.pop("key")))
    for column in ("attack", "speaker"):
        if column not in frame:
            frame[column] = NO_ATTACK
    frame["attack"] = frame["attack"].mask(frame["label"] == BONAFIDE, NO_ATTACK)
    text = {"utterance", "path", "attack", "speaker"}
    frame = frame.apply(lambda column: column if column.name in text else _numbers_if_all_are(column))
    return frame.reset_index(drop=True)


class _Lines(NamedTuple):
    """The lines of a text file that say something, split into fields."""

    path: Path
    rows: list[list[str]]
    numbers: list[int]
    separator: str

    def at(self, row: int) -> str:
        return f"{self.path}, line {self.numbers[row]}"

    def header(self) -> list[str]:
        """The first line's fields under this module's names, whether or not it is a header."""
        return [_COLUMN_OF.get(name.lower(), name) for name in self.rows[0]]

    def table(self, columns: Sequence[str], skip: int = 0) -> pd.DataFrame:
        """All rows but the first `skip` as text, indexed by their position here; refuses ragged ones."""
        if len(set(columns)) != len(columns):
            raise ScoreError(f"{self.path}: two columns of the header mean the same: {self.rows[0]}")
        rows = self.rows[skip:]
        if not rows:
            raise ScoreError(f"{self.path} has a header and no trials")
        if set(map(len, rows)) != {len(columns)}:
            bad = next(i for i, row in enumerate(self.rows) if len(row) != len(columns))
            raise ScoreError(
                f"{self.at(bad)}: {len(self.rows[bad])} columns, expected {len(columns)} ({', '.join(columns)}): "
                f"{' '.join(self.rows[bad])[:80]!r}; names that hold spaces need a comma separated file"
            )
        values = {name: [row[k] for row in rows] for k, name in enumerate(columns)}
        return pd.DataFrame(values, index=range(skip, len(self.rows)))


def _read_lines(path: Path) -> _Lines:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ScoreError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ScoreError(f"{path} is not a text file ({error.reason} at byte {error.start})") from None
    lines = text.splitlines()
    first = next((line for line in lines if line.strip() and not line.startswith("#")), None)
    if first is None:
        raise ScoreError(f"{path} is empty")
    separator = "tab" if "\t" in first else "comma" if "," in first else "whitespace"
    if separator == "whitespace":
        rows = [line.split() for line in lines]
    else:
        sign = {"tab": "\t", "comma": ","}[separator]
        rows = [[value.strip() for value in next(csv.reader([line], delimiter=sign), ())] for line in lines]
    said = [i for i, row in enumerate(rows) if row and row != [""] and row[0][:1] != "#"]
    return _Lines(path, [rows[i] for i in said], [i + 1 for i in said], separator)


def _named_by_utterance(lines: _Lines, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with an utterance column, taken from path stems where it has none."""
    if "utterance" in frame:
        return frame
    if "path" not in frame:
        raise ScoreError(f"{lines.path}: its header names neither utterance nor path: {lines.rows[0]}")
    stems = [PurePath(name.replace("\\", "/")).stem for name in frame["path"]]
    return frame.assign(utterance=stems)[["utterance", *frame.columns]]


def _parse_scores(lines: _Lines, texts: pd.Series) -> np.ndarray:
    """Scores as finite float64."""
    try:
        scores = texts.to_numpy(dtype=object).astype(np.float64)
    except ValueError:
        scores = pd.to_numeric(texts, errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ScoreError(
            f"{lines.at(texts.index[bad[0]])}: score {texts.iloc[bad[0]]!r} is not a finite number "
            f"({bad.size} such in all); the score is the last column, or the one that a header names `score`"
        )
    return scores


def _labels(lines: _Lines, keys: pd.Series) -> np.ndarray:
    """Keys (bonafide/spoof or 1/0) as labels."""
    labels = keys.str.lower().map(KEYS)
    if labels.isna().any():
        bad = labels.isna().idxmax()
        raise ScoreError(f"{lines.at(bad)}: key {keys[bad]!r} is neither bonafide nor spoof")
    return labels.to_numpy(np.int64)


def _numbers_if_all_are(column: pd.Series) -> pd.Series:
    """A text column as numbers, to the last digit, where every value is one or empty; else unchanged."""
    texts = column.to_numpy(dtype=object)
    for values, kind in ((texts, np.int64), (np.where(texts == "", "nan", texts), np.float64)):
        try:
            return pd.Series(values.astype(kind), index=column.index)
        except (ValueError, OverflowError):
            continue
    return column


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
        return (
            f"{where}no trial in common: the protocol has {n_protocol} such as {missing.iloc[0]!r}, "
            f"the scores {n_scores} such as {extra.iloc[0]!r}; they belong to different corpora or splits"
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
        given, known = aligned["attack"].to_numpy(), protocol["attack"].to_numpy()
        wrong = is_spoof & (given != known) & ~np.isin(given, _UNNAMED) & ~np.isin(known, _UNNAMED)
        _refuse(where, "attack", protocol, aligned["attack"], wrong)


def _refuse(where: str, what: str, protocol: pd.DataFrame, given: pd.Series, wrong: np.ndarray) -> None:
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ScoreError(
            f"{where}the {what} of {int(wrong.sum())} trials differs from the protocol's, first "
            f"{protocol['utterance'].iloc[first]}: {given.iloc[first]!r} in the score file, "
            f"{protocol['label' if what == 'key' else what].iloc[first]!r} in the protocol; "
            "is it the protocol of these scores?"
        )


def _join_asv_2021(path: Path, frame: pd.DataFrame, metadata: Path) -> pd.DataFrame:
    """ASVspoof 2021: `speaker utterance score`, and the keys of trial_metadata.txt, joined on both names."""
    columns = ("speaker", "utterance", "codec", "transmission", "attack", "key", "trim", "phase")
    keys = _read_lines(metadata).table(columns)
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
