"""Discover corpora by the files that mark them, wherever and under whatever folder names they are mounted."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from deepfake_utils.conventions import CorpusError
from deepfake_utils.corpora import asvspoof, folder, in_the_wild
from deepfake_utils.corpora.survey import Survey, survey
from deepfake_utils.corpora.trials import SPLITS, count, drop_missing, fingerprint

KAGGLE_INPUT = Path("/kaggle/input")
KINDS = (*(kind for kind in asvspoof.LAYOUTS if kind != "demo"), "in_the_wild", "folder", "demo")

# Public Kaggle datasets known to hold these corpora; their misspelt names are their real ones.
KAGGLE_DATASETS = {
    "asvspoof2019_la": "awsaf49/asvpoof-2019-dataset",
    "asvspoof2019_pa": "awsaf49/asvpoof-2019-dataset",
    "asvspoof2021_la": "mohammedabdeldayem/avsspoof-2021",
    "asvspoof2021_df": "mohammedabdeldayem/avsspoof-2021",
    "in_the_wild": "abdallamohamed312/in-the-wild-audio-deepfake",
}


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk: where its protocols, recordings and ASV scores are. `find_corpora` makes them.

    Attributes:
        name: its kind, or for further corpora of one kind the kind and a number.
        kind: one of KINDS.
        root: the folder that holds its protocols (for information; audio may lie elsewhere).
        protocols: protocol, key, meta.csv or manifest.csv file by split; empty for a folder without a manifest.
        folders: folders of recordings by split, nearest first.
        asv: official ASV score files by split.
    """

    name: str
    kind: str
    root: Path
    protocols: Mapping[str, Path] = field(default_factory=dict, repr=False)
    folders: Mapping[str, tuple[Path, ...]] = field(default_factory=dict, repr=False)
    asv: Mapping[str, Path] = field(default_factory=dict, repr=False)

    def protocol(self, split: str | None = None, allow_missing: bool = False) -> pd.DataFrame:
        """The trials of one split or of all, one row each.

        Args:
            split: "train", "dev" or "eval"; None for all.
            allow_missing: keep the trials whose recording exists, warn about the others and list them in
                `frame.attrs["dropped"]`, instead of raising.

        Returns:
            Columns of conventions.PROTOCOL_COLUMNS, then the corpus's own (`codec`, `phase`, `trim`, ...).

        Raises:
            CorpusError: naming file and line: missing recording, duplicate utterance, unknown label, wrong
                number of columns, text that is none; or the corpus has no such split.
        """
        table = self._read(split)
        return drop_missing(table, allow_missing, self._lists(split), self.folders).assign(corpus=self.name)

    @property
    def splits(self) -> tuple[str, ...]:
        """Its splits, in the order train, dev, eval."""
        if self.protocols and self.kind != "folder":
            return tuple(split for split in SPLITS if split in self.protocols)
        present = set(self._read(None)["split"])
        return tuple(split for split in SPLITS if split in present)

    def asv_scores(self, split: str) -> Path | None:
        """The official ASV score file of a split, for the t-DCF; None where the corpus has none."""
        return self.asv.get(split)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the trials that are there, equal on every machine and mount."""
        table = self._read(None)
        return fingerprint(table[table["path"] != ""])

    def counts(self) -> pd.DataFrame:
        """Trials and missing recordings by split, label and attack; see trials.count for the columns."""
        return count(self._read(None))

    def _lists(self, split: str | None) -> dict[str, Path]:
        lists = {name: self.protocols.get(name, self.root) for name in self.splits}
        return lists if split is None else {split: lists[split]}

    def _read(self, split: str | None) -> pd.DataFrame:
        """All trials, "" where a recording is missing."""
        if self.kind in asvspoof.LAYOUTS:
            wanted = self.protocols if split is None else {s: p for s, p in self.protocols.items() if s == split}
            table = asvspoof.read(self.kind, wanted, self.folders) if wanted else None
        elif self.kind == "in_the_wild":
            table = in_the_wild.read(self.protocols["eval"], self.folders["eval"])
        elif self.protocols:
            table = folder.read_manifest(next(iter(self.protocols.values())))
        else:
            table = folder.read_folders(self.root)
        if split is not None and table is not None:
            table = table[table["split"] == split].reset_index(drop=True)
        if table is None or table.empty:
            raise CorpusError(f"{self.name} in {self.root} has no split {split!r}; it has {', '.join(self.splits)}")
        return table


def find_corpora(*folders: str | os.PathLike, name: str | None = None) -> list[Corpus]:
    """Find every corpus in the given folders, or in the usual places.

    Without folders, these places are tried in turn and the first that holds a corpus is used: each folder of the
    environment variable DEEPFAKE_DATA (separated as in PATH), /kaggle/input, ./data. Given folders are searched
    together, so protocols and audio may lie in different ones, and nothing else is.

    Args:
        folders: where to look, at any depth up to 9.
        name: keep only this corpus: a `Corpus.name` or `Corpus.kind` ("asvspoof2019_la"), or a public Kaggle dataset
            "owner/slug", which is taken from its mount or else downloaded with `kagglehub` (that is the only way
            this function uses the network).

    Returns:
        Corpora with at least one folder of recordings, ordered by kind as in KINDS, then by root.

    Raises:
        CorpusError: nothing found; it lists every place looked in, what was there, and what to attach.
    """
    if name is not None and "/" in name:
        places = [[_kaggle_dataset(name)]]
        name = None
    elif folders:
        places = [[Path(place) for place in folders]]
    else:
        places = [[place] for place in _usual_places()]
    surveys: list[Survey] = []
    for group in places:
        found = survey(group)
        surveys.append(found)
        corpora = _corpora(found)
        if name is not None:
            corpora = [corpus for corpus in corpora if name.lower() in (corpus.name, corpus.kind)]
        if corpora:
            return corpora
        if not folders and os.fspath(group[0]) in os.environ.get("DEEPFAKE_DATA", "").split(os.pathsep):
            warnings.warn(f"DEEPFAKE_DATA names {group[0]}, which holds no corpus; looking elsewhere", stacklevel=2)
    raise CorpusError(_nothing_found(surveys, name))


def _corpora(found: Survey) -> list[Corpus]:
    """The corpora a survey saw, those without any recording left out, each with a name of its own."""
    corpora = [*_from_protocols(found)]
    for meta in found.metas:
        nearest = _nearest(meta.parent, found.audio)
        if nearest:
            corpora.append(Corpus("", "in_the_wild", meta.parent, {"eval": meta}, {"eval": nearest}))
    for manifest in found.manifests:
        corpora.append(Corpus("", "folder", manifest.parent, dict.fromkeys(SPLITS, manifest)))
    listed = {manifest.parent for manifest in found.manifests}
    corpora += [Corpus("", "folder", root) for root in found.labelled if root not in listed]
    corpora.sort(key=lambda corpus: (KINDS.index(corpus.kind), len(corpus.root.parts), corpus.root))
    names: dict[str, int] = {}
    for i, corpus in enumerate(corpora):
        stem = corpus.root.name if corpus.kind == "folder" else corpus.kind
        names[stem] = names.get(stem, 0) + 1
        corpora[i] = replace(corpus, name=stem if names[stem] == 1 else f"{stem}-{names[stem]}")
    return corpora


def _from_protocols(found: Survey) -> Iterator[Corpus]:
    """ASVspoof-like corpora: protocol files of one kind grouped, recordings given to the nearest group."""
    kinds, groups = _grouped(found)
    folders = [{split: [] for split in group} for group in groups]
    for audio, families in found.audio.items():
        for i, split in _owners(audio, families, kinds, groups):
            folders[i][split].append(audio)
    for kind, group, audio in zip(kinds, groups, folders, strict=True):
        if any(audio.values()):
            nearest = {s: tuple(sorted(a, key=lambda f: (-_shared(f, group[s]), f))) for s, a in audio.items()}
            root = min(group.values(), key=lambda path: len(path.parts)).parent
            root = root.parent if "protocol" in root.name.lower() else root
            yield Corpus("", kind, root, group, nearest, _asv_of(kind, group, found))


def _grouped(found: Survey) -> tuple[list[str], list[dict[str, Path]]]:
    """Kinds and {split: protocol} of each corpus: the files of one folder, then folders with other splits, nearest first."""
    beside: dict[tuple[str, Path], dict[str, Path]] = {}
    for marker in sorted(found.protocols, key=lambda marker: marker.path):
        kind = marker.kind
        if kind == "asvspoof2019_la" and any(demo in marker.path.parents for demo in found.demos):
            kind = "demo"
        beside.setdefault((kind, marker.path.parent), {}).setdefault(marker.split, marker.path)
    kinds: list[str] = []
    groups: list[dict[str, Path]] = []
    for (kind, parent), protocols in sorted(beside.items(), key=lambda item: (-len(item[1]), item[0])):
        fits = [i for i, group in enumerate(groups) if kinds[i] == kind and not group.keys() & protocols.keys()]
        if fits:
            nearest = max(fits, key=lambda i: max(_shared(parent, path) for path in groups[i].values()))
            groups[nearest].update(protocols)
        else:
            groups.append(dict(protocols))
            kinds.append(kind)
    return kinds, groups


def _owners(audio: Path, families: set[str], kinds: list[str], groups: list[dict[str, Path]]) -> list[tuple[int, str]]:
    """(group, split) that a folder of recordings belongs to: its names fit, then year and nearness decide."""
    owners = []
    for family in families:
        fitting = [
            ((_year_fits(audio, kinds[i]), _shared(audio, path)), i, split)
            for i, group in enumerate(groups)
            for split, path in group.items()
            if family == _family(kinds[i], split)
        ]
        if fitting:
            best = max(rank for rank, _, _ in fitting)
            owners += [(i, split) for rank, i, split in fitting if rank == best]
    return owners


def _family(kind: str, split: str) -> str:
    """How the utterance names of one split begin."""
    letter = {"train": "T", "dev": "D", "eval": "E"}[split]
    track = "LA" if kind == "demo" else kind.partition("_")[2].upper()
    return f"{track}_{letter}" if track else letter


def _year_fits(audio: Path, kind: str) -> int:
    """2019 and 2021 LA share the names LA_E_...: 1 if a folder says the year of this kind, -1 if the other, else 0."""
    said = {year for year in ("2019", "2021") if any(year in part for part in audio.parts)}
    if len(said) != 1 or kind in ("demo", "asvspoof5"):
        return 0
    return 1 if said.pop() in kind else -1


def _shared(one: Path, other: Path) -> int:
    """How many leading folders two paths share: nearness in the tree."""
    return next((i for i, (a, b) in enumerate(zip(one.parts, other.parts, strict=False)) if a != b), len(one.parts))


def _nearest(root: Path, audio: Iterable[Path]) -> tuple[Path, ...]:
    """Folders of recordings inside `root`, else those that share most of its path."""
    inside = sorted(path for path in audio if path == root or root in path.parents)
    return tuple(inside or sorted(audio, key=lambda path: (-_shared(path, root), path))[:1])


def _asv_of(kind: str, protocols: dict[str, Path], found: Survey) -> dict[str, Path]:
    kind = "asvspoof2019_la" if kind == "demo" else kind
    scores = {}
    for split, protocol in protocols.items():
        fitting = [marker.path for marker in found.asv if (marker.kind, marker.split) == (kind, split)]
        if fitting:
            scores[split] = max(sorted(fitting), key=lambda path: _shared(path, protocol))
    return scores


def _usual_places() -> list[Path]:
    named = [Path(place) for place in os.environ.get("DEEPFAKE_DATA", "").split(os.pathsep) if place]
    return [*named, KAGGLE_INPUT, Path("data").absolute()]


def _nothing_found(surveys: list[Survey], name: str | None) -> str:
    text = f"no corpus named {name!r}" if name else "no corpus found"
    return text + "; looked in\n  " + "\n  ".join(note for found in surveys for note in found.notes)


def _kaggle_dataset(handle: str) -> Path:
    raise CorpusError(handle)
