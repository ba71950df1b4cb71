"""A corpus on disk, and how each kind is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from deepfake_utils.conventions import SPLITS, CorpusError
from deepfake_utils.corpora import folder
from deepfake_utils.corpora.trials import count, drop_missing, fingerprint, locate
from deepfake_utils.files import short_names
from deepfake_utils.protocols import LAYOUTS, read_list

KINDS = (*LAYOUTS, "in_the_wild", "folder")


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk: where its protocols, recordings and ASV scores are. `find_corpora` makes them.

    Attributes:
        name: its kind, or where that is only a layout the folder's name; with a number if several have it.
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

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Its splits, in the order train, dev, eval; looked up once."""
        return tuple(split for split in SPLITS if split in (self._named or {"eval"}))

    @property
    def names_splits(self) -> bool:
        """Whether anything says which trials are which split; otherwise all are eval."""
        return bool(self._named)

    @cached_property
    def _named(self) -> set[str]:
        return set(self.protocols) if self.kind in LAYOUTS else set(self._rows(None)["split"]) - {""}

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
        table = self._rows(split)
        if table is not None:
            table["split"] = table["split"].replace("", "eval")
            table = table if split is None else table[table["split"] == split].reset_index(drop=True)
        if table is None or table.empty:
            raise CorpusError(f"{self.name} in {self.root} has no split {split!r}; it has {', '.join(self.splits)}")
        return table

    def _rows(self, split: str | None) -> pd.DataFrame | None:
        """The trials of at least the split, as what lists them says: "" is the split where none is named."""
        if self.kind in LAYOUTS:
            wanted = [name for name in SPLITS if name in self.protocols and split in (None, name)]
            tables = [read_list(self.protocols[name], self.kind).assign(split=name) for name in wanted]
            for name, table in zip(wanted, tables, strict=True):
                table["path"] = _located(table["utterance"], self.folders.get(name, ()))
            return pd.concat(tables, ignore_index=True) if tables else None
        if self.kind == "in_the_wild":
            table = read_list(self.protocols["eval"])
            names = short_names(table["utterance"])
            return table.assign(utterance=names, path=_located(names, self.folders["eval"]), split="")
        if self.protocols:
            return folder.read_manifest(next(iter(self.protocols.values())))
        return folder.read_folders(self.root)


def _located(utterances, folders) -> list[str]:
    found = locate(utterances, folders)
    return [found.get(utterance, "") for utterance in utterances]
