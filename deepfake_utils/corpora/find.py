"""Discover corpora by the files that mark them, wherever and under whatever folder names they are mounted."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from deepfake_utils.conventions import CorpusError
from deepfake_utils.corpora.assemble import corpora_of
from deepfake_utils.corpora.corpus import Corpus
from deepfake_utils.corpora.survey import Survey, survey

# Public Kaggle datasets known to hold these corpora; their misspelt names are their real ones.
KAGGLE_DATASETS = {
    "ASVspoof 2019 LA and PA": "awsaf49/asvpoof-2019-dataset",
    "ASVspoof 2021 LA and DF (DF without part03)": "mohammedabdeldayem/avsspoof-2021",
    "In-the-Wild": "abdallamohamed312/in-the-wild-audio-deepfake",
}
_PARENT_DEPTH = 4  # how far beside a given folder its protocols or recordings may lie


def kaggle_input() -> Path:
    """Where Kaggle mounts data sets; the environment variable DEEPFAKE_KAGGLE_INPUT names another place."""
    return Path(os.environ.get("DEEPFAKE_KAGGLE_INPUT", "/kaggle/input"))


def find_corpora(*folders: str | os.PathLike, name: str | None = None) -> list[Corpus]:
    """Find every corpus in the given folders, or in the usual places.

    Without folders, these places are tried in turn and the first that holds a corpus is used: the folders of the
    environment variable DEEPFAKE_DATA (separated as in PATH), /kaggle/input, ./data. Given folders are searched
    together, so protocols and audio may lie in different ones, and nothing else is; only where they hold one half of a
    corpus (protocols or recordings), the other half is looked for beside them.

    Args:
        folders: where to look, at any depth up to survey.MAX_DEPTH.
        name: keep only this corpus: a `Corpus.name` or `Corpus.kind` ("asvspoof2019_la"), or a public Kaggle dataset
            "owner/slug", which is taken from its mount under /kaggle/input or else downloaded with `kagglehub` and
            searched together with `folders`. That is the only way this function uses the network.

    Returns:
        Corpora with at least one folder of recordings, ordered by kind as in corpus.KINDS, then by root.

    Raises:
        CorpusError: nothing found (it lists every place looked in, what was there, and what to attach), or the Kaggle
            dataset cannot be had.
    """
    wanted = None if name is None or "/" in name else name.lower()
    surveys: list[Survey] = []
    for origin, places in _places(folders, name):
        surveys.append(survey(places))
        corpora = _named(wanted, corpora_of(surveys[-1]))
        if not corpora and folders:
            corpora = _named(wanted, _with_other_half(surveys[-1]))
        if corpora:
            return corpora
        if origin == "DEEPFAKE_DATA":
            warnings.warn(f"DEEPFAKE_DATA={os.environ[origin]} holds no such corpus; looking elsewhere", stacklevel=2)
    raise CorpusError(_nothing_found(surveys, wanted))


def _places(folders: tuple[str | os.PathLike, ...], name: str | None) -> Iterator[tuple[str, list[Path]]]:
    """(origin, folders searched together) in the order of search."""
    given = [Path(place).expanduser() for place in folders]
    if name is not None and "/" in name:
        yield name, [*given, _kaggle_dataset(name)]
    elif given:
        yield "given", given
    else:
        if named := [Path(place) for place in os.environ.get("DEEPFAKE_DATA", "").split(os.pathsep) if place]:
            yield "DEEPFAKE_DATA", named
        yield "Kaggle", [kaggle_input()]
        yield "here", [Path("data").absolute()]


def _named(wanted: str | None, corpora: list[Corpus]) -> list[Corpus]:
    return [corpus for corpus in corpora if wanted is None or wanted in (corpus.name.lower(), corpus.kind)]


def _with_other_half(found: Survey) -> list[Corpus]:
    """Corpora with one half, protocols or recordings, in the surveyed places and the other half beside them."""
    if not (found.audio or found.protocols or found.metas):
        return []
    places = [place.absolute() for place in found.places if place.is_dir()]
    wider = survey([place.parent for place in places], max_depth=_PARENT_DEPTH)

    def touches(corpus: Corpus) -> bool:
        parts = [*corpus.protocols.values(), *(path for audio in corpus.folders.values() for path in audio)]
        return any(place in (part, *part.parents) for part in parts for place in places)

    return [corpus for corpus in corpora_of(wider) if touches(corpus)]


def _kaggle_dataset(handle: str) -> Path:
    """The folder of a public Kaggle dataset: its mount in either style, or a download."""
    owner, _, slug = handle.strip("/").partition("/")
    for mount in (kaggle_input() / "datasets" / owner / slug, kaggle_input() / slug):
        if slug and mount.is_dir():
            return mount
    by_hand = f"or download https://www.kaggle.com/datasets/{handle} by hand and pass its folder"
    try:
        import kagglehub
    except ImportError:
        raise CorpusError(
            f"fetching {handle} from Kaggle needs the package kagglehub: pip install kagglehub, {by_hand}"
        ) from None
    try:
        return Path(kagglehub.dataset_download(handle))
    except Exception as error:  # its own, requests' and the system's errors have no base in common
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(
            f"{handle} could not be fetched from Kaggle ({reason}); check the network, the name and the Kaggle "
            f"credentials, {by_hand}"
        ) from error


def _nothing_found(surveys: list[Survey], wanted: str | None) -> str:
    """Every place looked in, what was seen there, and what to attach."""
    lines = [f"no corpus {wanted!r} found; looked in" if wanted else "no corpus found; looked in"]
    for found in surveys:
        lines += [f"  {note}" for note in found.notes]
        lines += [f"    seen: {corpus.name} in {corpus.root}" for corpus in corpora_of(found)]
        if not found.audio:
            lines += [f"    seen: {marker.path}, but no recordings" for marker in found.protocols[:3]]
        elif not found.protocols:
            lines += [f"    seen: recordings in {folder}, but no protocol for them" for folder in list(found.audio)[:3]]
            lines += ["    pass the folder above, the one that also holds the protocols (for ASVspoof 2019: LA/)"]
    lines += ["to do: pass a folder, set DEEPFAKE_DATA, or on Kaggle attach (Add input) one of"]
    lines += [f"  {slug}  ({what})" for what, slug in KAGGLE_DATASETS.items()]
    lines += [
        "any folder with bonafide/ and spoof/ in it will do; ASVspoof 2021 needs its keys (trial_metadata.txt) too"
    ]
    return "\n".join(lines)
