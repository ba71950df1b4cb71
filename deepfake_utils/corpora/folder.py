"""A plain folder of recordings: `bonafide/` and `spoof/`, with or without train/dev/eval above them, or a manifest.csv.

The subfolder directly below `spoof/` names the attack, the one below `bonafide/` nothing. A `manifest.csv` with the
columns `path` (relative to it) and `label`, and optionally `speaker`, `attack` (or `family`) and `split`, says it all
instead.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from deepfake_utils.conventions import UNKNOWN_SPEAKER, CorpusError, label_of
from deepfake_utils.corpora.trials import names_in
from deepfake_utils.files import describe_passed_over, is_hidden, list_audio, split_audio_name
from deepfake_utils.protocols import attack_or_none, make_table, read_list, split_of


def read_folders(root: Path) -> pd.DataFrame:
    """List the recordings below the label folders of `root`; folder names are the labels, splits and attacks.

    Args:
        root: holds bonafide/ and spoof/ (or real/ and fake/, ...), or split folders that hold them.

    Returns:
        Table from `make_table`; `utterance` is the path relative to `root`, speakers are unknown, `split` is "" where
        no folder names one.

    Raises:
        CorpusError: no recordings, or one that links bring under two labels or into two splits.

    Warns:
        UserWarning: of files in these folders that are no recordings by their names.
    """
    rows = {name: [] for name in ("utterance", "path", "label", "attack", "split")}
    passed_over = Counter()
    for split, label, folder in _label_folders(root):
        recordings, others = list_audio(folder)
        passed_over += others
        for path in recordings:
            subfolder, _, name = path[len(os.fspath(folder)) + 1 :].replace(os.sep, "/").partition("/")
            rows["utterance"].append(path[len(os.fspath(root)) + 1 :].replace(os.sep, "/"))
            rows["path"].append(path)
            rows["label"].append(label)
            rows["attack"].append(attack_or_none(label, subfolder if name else ""))
            rows["split"].append(split)
    if not rows["path"]:
        raise CorpusError(f"{root} has label folders but no recordings in them; put audio files into both")
    _refuse_two_places(rows)
    if passed_over:
        warnings.warn(f"{root}: {describe_passed_over(passed_over)}", stacklevel=2)
    blank = [0] * len(rows["path"])
    return make_table({**rows, "speaker": [UNKNOWN_SPEAKER] * len(blank), "line": blank}, root.name)


def _refuse_two_places(rows: dict[str, list]) -> None:
    """A file that is real and fake, or in train and eval, is no mistake that figures would show."""
    first: dict[tuple[int, int], int] = {}
    for n, path in enumerate(rows["path"]):
        status = os.stat(path)
        one = first.setdefault((status.st_dev, status.st_ino), n)
        if (rows["label"][n], rows["split"][n]) != (rows["label"][one], rows["split"][one]):
            raise CorpusError(
                f"{path} and {rows['path'][one]} are one file by links, and one recording cannot have two labels or be "
                "in two splits: remove the link"
            )


def read_manifest(manifest: Path) -> pd.DataFrame:
    """Read a manifest.csv, see `protocols.read_list`; relative paths start at its folder, missing recordings are ""."""
    table, listings = read_list(manifest), {}
    return table.assign(path=[_present(manifest.parent, name, listings) for name in table["path"]])


def _present(start: Path, name: str, listings: dict[Path, set[str]]) -> str:
    """Absolute path of a recording, "" if it is not there; each folder is listed once."""
    for written in dict.fromkeys((name, name.replace("\\", "/"))) if name else ():
        path = (start / written).absolute()
        if path.parent not in listings:
            listings[path.parent] = set(names_in(path.parent))
        if path.name in listings[path.parent]:
            return os.fspath(path)
    return ""


def _label_folders(root: Path) -> Iterator[tuple[str, int, Path]]:
    """(split, label, folder) of every label folder of `root` or of its split folders, in name order."""
    for folder in _subfolders(root):
        label, split = label_of(folder.name), split_of(folder.name)
        if label is not None:
            yield split_of(root.name) or "", label, folder
        elif split is not None:
            yield from ((split, label_of(f.name), f) for f in _subfolders(folder) if label_of(f.name) is not None)


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            inside = (e for e in entries if not split_audio_name(e.name)[1] and not is_hidden(e.name))
            return sorted(Path(entry.path) for entry in inside if entry.is_dir())
    except OSError as error:
        raise CorpusError(f"{folder} cannot be listed: {error.strerror}") from None
