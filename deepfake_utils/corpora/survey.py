"""Walk folders once, within bounds, and note every file or folder that marks a corpus.

A folder is left after FILES_ENOUGH files, which are then its data: on a network mount a listing of 600,000 names takes
minutes and tells nothing more. What such a folder may still hide is asked for by name.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from deepfake_utils.conventions import BONAFIDE, SPOOF, label_of
from deepfake_utils.files import decode, is_hidden, split_audio_name
from deepfake_utils.protocols import column_names, recognise_line, split_of

MAX_DEPTH = 9  # /kaggle/input/datasets/<owner>/<slug>/LA/LA/ASVspoof2019_LA_train/flac is 7 below /kaggle/input
MAX_FOLDERS = 20_000
FILES_ENOUGH = 1_000
LABEL_FOLDERS_TRIED = 100

_PROTOCOL_2019 = re.compile(r"asvspoof2019[._](la|pa)[._]cm[._](train|dev|eval)[._]tr[nl]\.txt")
_ASV_2019 = re.compile(r"asvspoof2019[._](la|pa)[._]asv[._](train|dev|eval)[._].*scores\.txt")
_PROTOCOL_5 = re.compile(r"asvspoof5[._](train|dev|eval)(?:[._](?:track_?1|metadata))?\.(?:tsv|txt)")
_KEYS_2021, _ASV_2021 = "trial_metadata.txt", "score.txt"
_UTTERANCE_FAMILY = re.compile(r"((?:LA|PA|DF)_[TDE]|[TDE])_\d+")

# Asked for by name in folders whose listing was cut short.
_BY_NAME = (
    "meta.csv",
    "manifest.csv",
    _KEYS_2021,
    *(f"ASVspoof2019.{track}.cm.{end}.txt" for track in ("LA", "PA") for end in ("train.trn", "dev.trl", "eval.trl")),
    *(f"ASVspoof5.{part}.tsv" for part in ("train", "dev.track_1", "eval.track_1")),
)
_NEVER = {"__pycache__", "node_modules", "site-packages", "lost+found", "$recycle.bin"}


class Marker(NamedTuple):
    """A file that belongs to one split of one kind of corpus."""

    kind: str
    split: str
    path: Path


@dataclass
class Survey:
    """What a walk saw.

    Attributes:
        places: folders the walk started from.
        protocols, asv: protocol or key files, and ASV score files.
        audio: folders that hold recordings, with the families of their names ("LA_T", "DF_E", "T", ...).
        metas, manifests: meta.csv of In-the-Wild, manifest.csv of plain folders.
        labelled: plain folders with bonafide/ and spoof/, directly or in split folders.
        notes: one line a place, for the message when nothing is found.
    """

    places: list[Path]
    protocols: list[Marker] = field(default_factory=list)
    asv: list[Marker] = field(default_factory=list)
    audio: dict[Path, set[str]] = field(default_factory=dict)
    metas: list[Path] = field(default_factory=list)
    manifests: list[Path] = field(default_factory=list)
    labelled: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Listing(NamedTuple):
    files: list[str]  # that may be markers
    inside: list[os.DirEntry]
    families: set[str]  # of the audio files seen
    n_audio: int


def survey(places: Iterable[Path], max_depth: int = MAX_DEPTH) -> Survey:
    """Walk the places breadth first, following links, each real folder once."""
    found = Survey([Path(place) for place in places])
    seen: set[str] = set()
    for place in found.places:
        found.notes.append(_walk(place, max_depth, found, seen))
    found.labelled = _roots(found.labelled, found.places)
    return found


def _walk(place: Path, max_depth: int, found: Survey, seen: set[str]) -> str:
    """Survey one place; returns its note."""
    if not place.is_dir():
        return f"{place}: {'a file, not a folder' if place.exists() else 'does not exist'}"
    queue = deque([(os.fspath(place.absolute()), os.path.realpath(place), 0)])
    n_folders, unreadable, top = 0, [], []
    while queue and n_folders < MAX_FOLDERS:
        here, real, depth = queue.popleft()
        if real in seen:
            continue
        seen.add(real)
        n_folders += 1
        try:
            listing = _list(here)
        except OSError as error:
            unreadable.append(f"{here} ({error.strerror})")
            continue
        if depth == 0:
            top = sorted(entry.name + "/" for entry in listing.inside) + sorted(listing.files)
        _note_markers(Path(here), listing, found)
        if depth < max_depth:
            queue.extend(
                (entry.path, _real(entry, real), depth + 1)
                for entry in sorted(listing.inside, key=lambda entry: entry.name)
            )
    n_audio = sum(place.absolute() in (audio, *audio.parents) for audio in found.audio)
    note = f"{place}: {n_folders:,} folder(s), {n_audio:,} with audio; at the top: "
    note += ", ".join(top[:12]) + (f", ... ({len(top)} entries)" if len(top) > 12 else "") if top else "empty"
    if unreadable:
        note += f"; not readable: {', '.join(unreadable[:3])}"
    return note + (f"; stopped after {MAX_FOLDERS:,} folders, name a deeper one" if queue else "")


def _list(path: str) -> _Listing:
    """List one folder, stopping early where it is clearly one of data."""
    files, inside, families, n_audio = [], [], set(), 0
    with os.scandir(path) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            stem, suffix = split_audio_name(entry.name)
            if suffix:
                n_audio += 1
                if match := _UTTERANCE_FAMILY.match(stem):
                    families.add(match[1])
            elif not _is_folder(entry):
                files.append(entry.name)
            elif entry.name.lower() not in _NEVER:
                inside.append(entry)
            if n_audio + len(files) >= FILES_ENOUGH:
                files.extend(name for name in _BY_NAME if os.path.isfile(os.path.join(path, name)))
                break
    return _Listing(files, inside, families, n_audio)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _real(entry: os.DirEntry, parent: str) -> str:
    return os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(parent, entry.name)


def _note_markers(here: Path, listing: _Listing, found: Survey) -> None:
    for name in set(listing.files):
        _note_file(here / name, found)
    if listing.n_audio:
        found.audio[here] = listing.families
    labels = {entry.name: label_of(entry.name) for entry in listing.inside}
    if not {SPOOF, BONAFIDE} <= set(labels.values()):
        return
    holding = {name for name, label in labels.items() if label is not None and _note_label_folder(here / name, found)}
    if {SPOOF, BONAFIDE} <= {labels[name] for name in holding}:
        found.labelled.append(here)  # all below is one corpus, listed in full when its protocol is read
        listing.inside[:] = [entry for entry in listing.inside if entry.name not in holding]


def _note_label_folder(path: Path, found: Survey) -> bool:
    """Whether recordings lie in a label folder or not far below it; pictures may be labelled real and fake, too."""
    queue, n_folders = deque([os.fspath(path)]), 0
    while queue and n_folders < LABEL_FOLDERS_TRIED:
        here = queue.popleft()
        n_folders += 1
        try:
            listing = _list(here)
        except OSError:
            continue
        if listing.n_audio:
            found.audio[Path(here)] = listing.families
            return True
        queue.extend(entry.path for entry in listing.inside)
    return False


def _note_file(path: Path, found: Survey) -> None:
    name = path.name.lower()
    if match := _PROTOCOL_2019.fullmatch(name):
        found.protocols.append(Marker(f"asvspoof2019_{match[1]}", match[2], path))
    elif match := _ASV_2019.fullmatch(name):
        found.asv.append(Marker(f"asvspoof2019_{match[1]}", match[2], path))
    elif match := _PROTOCOL_5.fullmatch(name):
        found.protocols.append(Marker("asvspoof5", match[1], path))
    elif name == _KEYS_2021 and path.parent.name.lower() != "asv":
        kind = recognise_line(first_line(path))
        if kind in ("asvspoof2021_la", "asvspoof2021_df"):
            found.protocols.append(Marker(kind, "eval", path))
    elif name == _ASV_2021 and path.parent.parent.name.lower() == "asv":
        track = path.parent.parent.parent.name.lower()
        if track in ("la", "df"):
            found.asv.append(Marker(f"asvspoof2021_{track}", "eval", path))
    elif name == "meta.csv" and _has_columns(path, {"path", "speaker", "label"}):
        found.metas.append(path)
    elif name == "manifest.csv" and _has_columns(path, {"path", "label"}):
        found.manifests.append(path)


def first_line(path: Path) -> str:
    """The first line of a text file, "" where there is none to read."""
    try:
        with path.open("rb") as file:
            return decode(file.read(4096), names_are_bytes=True).partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return ""


def _has_columns(path: Path, wanted: set[str]) -> bool:
    return wanted <= set(column_names([word.strip(' "\r') for word in re.split("[,;\t]", first_line(path))]))


def _roots(labelled: list[Path], places: list[Path]) -> list[Path]:
    """Roots of plain folders: train/ and eval/ that hold label folders make one corpus, their parent (if surveyed)."""
    starts = {place.absolute() for place in places}
    return sorted({path.parent if split_of(path.name) and path not in starts else path for path in labelled})
