"""A corpus on disk, and how each kind is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from deepfake_utils.conventions import CorpusError
from deepfake_utils.corpora import asvspoof, folder, in_the_wild
from deepfake_utils.corpora.trials import SPLITS, count, drop_missing, fingerprint, text_lines

KINDS = (*(kind for kind in asvspoof.LAYOUTS if kind != "demo"), "in_the_wild", "folder", "demo")


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk: where its protocols, recordings and ASV scores are. `find_corpora` makes them.

    Attributes:
        name: its kind, or for further corpora of one kind the kind and a number.
        kind: one of KINDS.
        root: the folder that holds its protocols, or the labelled folder itself; audio may lie elsewhere.
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
        lists = {name: self.protocols.get(name, self.root) for name in SPLITS}
        return drop_missing(table, allow_missing, lists, self.folders).assign(corpus=self.name)

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


def read_protocol_file(path: str | os.PathLike, split: str = "eval") -> pd.DataFrame:
    """Read a protocol by itself, for evaluating scores where the audio is not at hand.

    Args:
        path: an official ASVspoof protocol or key file, In-the-Wild's meta.csv, a manifest.csv, or a protocol table
            that was written as CSV (columns utterance and label at least).
        split: what to write in the `split` column where the file does not say.

    Returns:
        Protocol table; `path` is "" except where the file itself names recordings that exist.

    Raises:
        CorpusError: naming file and line: not text, wrong number of columns, unknown label, duplicate utterance.
    """
    path = Path(path)
    header = {word.strip().strip('"').lower() for word in text_lines(path)[0].split(",")}
    if header >= in_the_wild.MARKER_COLUMNS:
        table = in_the_wild.read(path, ())
    elif header >= folder.MARKER_COLUMNS or header >= {"utterance", "label"}:
        table = folder.read_manifest(path)
    else:
        table = asvspoof.read_list(path, split)
    return table.drop(columns="line")
