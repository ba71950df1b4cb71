"""Turn what a survey saw into corpora: which protocol files belong together, and which recordings are theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from deepfake_utils.conventions import SPLITS
from deepfake_utils.corpora.corpus import KINDS, Corpus
from deepfake_utils.corpora.survey import Survey, first_line

_OFFICIAL_SPEAKER = re.compile(r"[LP]A_\d{4}\s")


def corpora_of(found: Survey) -> list[Corpus]:
    """The corpora a survey saw, those without any recording left out, each with a name of its own."""
    corpora = [*_from_protocols(found)]
    for meta in found.metas:
        if audio := _recordings_of(meta.parent, found.audio):
            corpora.append(Corpus("", "in_the_wild", meta.parent, {"eval": meta}, {"eval": audio}))
    for manifest in found.manifests:
        corpora.append(_manifest_corpus(manifest))
    listed = {path.parent for path in (*found.manifests, *found.metas)}
    corpora += [Corpus("", "folder", root) for root in found.labelled if root not in listed]
    corpora.sort(key=lambda corpus: (KINDS.index(corpus.kind), len(corpus.root.parts), corpus.root))
    names: dict[str, int] = {}
    for i, corpus in enumerate(corpora):
        stem = _name_of(corpus)
        names[stem] = names.get(stem, 0) + 1
        corpora[i] = replace(corpus, name=stem if names[stem] == 1 else f"{stem}-{names[stem]}")
    return corpora


def _name_of(corpus: Corpus) -> str:
    """Its kind, or the name of its folder where it only has that layout: plain folders, and what is not by ASVspoof."""
    borrowed = corpus.kind.startswith("asvspoof2019") and not any(
        _OFFICIAL_SPEAKER.match(first_line(path)) for path in corpus.protocols.values()
    )
    if not borrowed and corpus.kind != "folder":
        return corpus.kind
    return (corpus.root.parent if corpus.root.name in ("LA", "PA") else corpus.root).name


def _manifest_corpus(manifest: Path) -> Corpus:
    root = manifest.parent
    return Corpus("", "folder", root, dict.fromkeys(SPLITS, manifest), dict.fromkeys(SPLITS, (root,)))


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
    """Kinds and {split: protocol} of each corpus: files of one folder, then the nearest ones with other splits."""
    beside: dict[tuple[str, Path], dict[str, Path]] = {}
    for marker in sorted(found.protocols, key=lambda marker: marker.path):
        beside.setdefault((marker.kind, marker.path.parent), {}).setdefault(marker.split, marker.path)
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
    track = kind.partition("_")[2].upper()
    return f"{track}_{letter}" if track else letter


def _year_fits(audio: Path, kind: str) -> int:
    """2019 and 2021 LA share the names LA_E_...: 1 if a folder says the year of this kind, -1 if the other, else 0."""
    said = {year for year in ("2019", "2021") if any(year in part for part in audio.parts)}
    if len(said) != 1 or kind == "asvspoof5":
        return 0
    return 1 if said.pop() in kind else -1


def _shared(one: Path, other: Path) -> int:
    """How many leading folders two paths share: nearness in the tree."""
    return next((i for i, (a, b) in enumerate(zip(one.parts, other.parts, strict=False)) if a != b), len(one.parts))


def _recordings_of(root: Path, audio: Mapping[Path, set[str]]) -> tuple[Path, ...]:
    """Folders of recordings inside `root`, else the nearest one whose names are not another corpus's."""
    inside = sorted(path for path in audio if path == root or root in path.parents)
    unclaimed = [path for path, families in audio.items() if not families]
    return tuple(inside or sorted(unclaimed, key=lambda path: (-_shared(path, root), path))[:1])


def _asv_of(kind: str, protocols: dict[str, Path], found: Survey) -> dict[str, Path]:
    scores = {}
    for split, protocol in protocols.items():
        fitting = [marker.path for marker in found.asv if (marker.kind, marker.split) == (kind, split)]
        if fitting:
            scores[split] = max(sorted(fitting), key=lambda path: _shared(path, protocol))
    return scores
