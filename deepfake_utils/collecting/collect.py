"""From the list of sources to a folder of recordings with a manifest that `find_corpora` reads.

FOLDER/manifest.csv                    path, label, family, speaker, source, split, licence
FOLDER/audio/OWNER+NAME/HASH.flac      speech, 16 kHz mono
FOLDER/noise/SPLIT/..., FOLDER/rooms/SPLIT/...   noises and room responses, for augmentation
FOLDER/collected.csv                   journal: a line is added when a recording is done, so that a run that was
                                       killed goes on where it stopped
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from deepfake_utils.collecting import repositories
from deepfake_utils.collecting.sources import NO_LICENCE, read_sources, small_part
from deepfake_utils.collecting.speech import MIN_SPEECH_S, speech_seconds
from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError, CorpusError
from deepfake_utils.files import atomic_write
from deepfake_utils.waveforms.decode import read_audio, to_int16

MAX_SPEECH_S, MAX_NOISE_S = 60, 600  # of a recording that are kept
BYTES_PER_SECOND = 20_000  # of 16 kHz mono FLAC, generously
MANIFEST = ("path", "label", "family", "speaker", "source", "split", "licence")
_JOURNAL = ("hash", "source", "state", "seconds", "samples_md5")  # state: kept, or why not
KEPT = "kept"


def collect(
    folder: str | os.PathLike,
    *,
    licence: str = "any",
    mirrors: str | os.PathLike | None = None,
    limit_bytes: int | None = None,
    sources: pd.DataFrame | None = None,
    origin: str = repositories.ORIGIN,
    say: Callable[[str], None] = tqdm.write,
) -> pd.DataFrame:
    """Collect the recordings of the list into a folder; a second call goes on, or brings the manifest up to date.

    Args:
        folder: made if it is not there.
        licence: "any", or "stated" for recordings whose repository states a licence.
        mirrors: folder with copies of the repositories (see `repositories.find_mirror`); others are fetched.
        limit_bytes: collect a small part only, of every split and family, of at most so many bytes.
        sources: another list with the columns of `read_sources`.
        origin: what stands before owner/name in the address of a repository.
        say: where lines of text go.

    Returns:
        The manifest. Sources that are gone, and recordings left out, are said and do not stop the rest.

    Raises:
        CorpusError: nothing could be had, the disk is too small, or git is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sources = read_sources(licence) if sources is None else sources
    if limit_bytes is not None:
        sources = small_part(sources, limit_bytes)
    journal = _read_journal(folder / "collected.csv")
    todo = sources[~sources["hash"].isin(journal.index)]
    _say_needs(folder, sources, todo, say)
    with _Journal(folder / "collected.csv") as note, tqdm(total=len(todo), unit="file", disable=todo.empty) as bar:
        for source, rows in todo.groupby("source", sort=True):
            try:
                for row, state, seconds, digest in _collect_source(folder, source, rows, mirrors, origin):
                    note(row.hash, source, state, seconds, digest)
                    bar.update()
            except CorpusError as error:
                say(f"left out: {error}")
    return write_manifest(folder, sources, say)


def write_manifest(folder: Path, sources: pd.DataFrame, say: Callable[[str], None] = tqdm.write) -> pd.DataFrame:
    """Write manifest.csv from what was collected, each set of samples once, and say what was left out and why.

    Rows of `synthesised.csv` beside it, which `synthesise` writes, are appended.
    """
    journal = _read_journal(folder / "collected.csv")
    table = sources[sources["hash"].isin(journal.index)].drop_duplicates("hash")
    table = table.join(journal[["state", "samples_md5"]], on="hash")
    for state, n in table["state"].value_counts().items():
        if state != KEPT:
            say(f"left out: {n:,} recordings, {state}")
    table = table[(table["state"] == KEPT) & table["label"].isin(("bonafide", "spoof"))]
    if again := int(table.duplicated("samples_md5").sum()):
        say(f"left out: {again:,} recordings, same samples as another one")
    table = table.drop_duplicates("samples_md5")
    table = table.assign(path="audio/" + table["source"].str.replace("/", "+") + "/" + table["hash"] + ".flac")
    table["speaker"] = table["speaker"].where(table["speaker"] != "", "-")
    manifest = table[list(MANIFEST)]
    if (made := folder / "synthesised.csv").is_file():
        manifest = pd.concat([manifest, pd.read_csv(made, dtype=str, keep_default_na=False)[list(MANIFEST)]])
    if manifest.empty:
        raise CorpusError(f"{folder}: no recording could be had; check the network, or name a folder of copies")
    with atomic_write(folder / "manifest.csv") as part:
        manifest.to_csv(part, index=False)
    counts = manifest.groupby(["split", "label"])["family"].agg(["size", "nunique"])
    for (split, label), row in counts.iterrows():
        say(f"{split:<6}{label:<9}{row['size']:>7,} recordings of {row['nunique']} families")
    return manifest.reset_index(drop=True)


def _say_needs(folder: Path, sources: pd.DataFrame, todo: pd.DataFrame, say: Callable[[str], None]) -> None:
    """Say what will be fetched and written, and refuse if the disk cannot hold it."""
    largest = todo.groupby("source")["bytes"].sum().max() if len(todo) else 0
    need = int(todo["seconds"].sum() * BYTES_PER_SECOND + largest)  # one source at a time lies here as git has it
    free = shutil.disk_usage(folder).free
    unlicensed = int((sources["licence"] == NO_LICENCE).sum())
    say(
        f"{len(sources):,} recordings of {sources['source'].nunique()} sources"
        + (f", {unlicensed:,} of them without a stated licence" if unlicensed else "")
        + f"; {len(todo):,} to do: {todo['bytes'].sum() / 1e6:,.0f} MB to fetch, {need / 1e6:,.0f} MB of disk "
        f"({free / 1e6:,.0f} MB free in {folder})"
    )
    if need > free:
        raise CorpusError(f"{folder}: {need / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB free; use another disk")


def _collect_source(folder: Path, source: str, rows: pd.DataFrame, mirrors, origin: str) -> Iterator[tuple]:
    """(row, state, seconds, samples_md5) of every recording of one source, written where it is kept."""
    fetched = folder / ".repositories" / f"{source.replace('/', '+')}.git"
    contents = repositories.bring_and_read(
        source, list(rows["commit"]), list(rows["path"]), fetched, mirrors=mirrors, origin=origin
    )
    for row, content in zip(rows.itertuples(), contents, strict=True):
        if content is None:
            yield row, "not in the repository any more", 0.0, ""
        elif _git_hash(content)[: len(row.hash)] != row.hash:
            yield row, "changed since the list was made", 0.0, ""
        else:
            yield row, *_keep(folder, row, content)


def _keep(folder: Path, row, content: bytes) -> tuple[str, float, str]:
    """Decode a recording and write it as FLAC, unless it is no speech; (state, seconds, samples_md5)."""
    try:
        file = io.BytesIO(content)
        file.name = row.path  # FFmpeg looks at its suffix, too
        samples = to_int16(read_audio(file))
    except AudioError:
        return "damaged or cut off", 0.0, ""
    is_speech = row.label in ("bonafide", "spoof")
    samples = samples[: (MAX_SPEECH_S if is_speech else MAX_NOISE_S) * SAMPLE_RATE_HZ]
    if is_speech and speech_seconds(samples) < MIN_SPEECH_S:
        return f"less than {MIN_SPEECH_S} s of speech", 0.0, ""
    kind = {"noise": f"noise/{row.split}", "rir": f"rooms/{row.split}"}.get(row.label, "audio")
    write_flac(folder / kind / row.source.replace("/", "+") / f"{row.hash}.flac", samples)
    digest = hashlib.md5(samples.tobytes(), usedforsecurity=False).hexdigest()
    return KEPT, len(samples) / SAMPLE_RATE_HZ, digest


def write_flac(path: Path, samples: np.ndarray) -> None:
    """Write int16 samples (n,) at 16 kHz, whole or not at all."""
    import soundfile

    with atomic_write(path) as part:
        soundfile.write(part, samples, SAMPLE_RATE_HZ, subtype="PCM_16", format="FLAC")


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Journal:
    """Lines appended to a CSV, each on disk before the next recording is begun."""

    def __init__(self, path: Path) -> None:
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")  # killed within a line
        self.file = path.open("a", newline="")
        if torn:
            self.file.write("\n")
        self.writer = csv.writer(self.file, lineterminator="\n")
        if self.file.tell() == 0:
            self.writer.writerow(_JOURNAL)

    def __call__(self, *values) -> None:
        self.writer.writerow(values)
        self.file.flush()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def _read_journal(path: Path) -> pd.DataFrame:
    """What was done, by hash; torn lines count as not done."""
    rows = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.reader(file):
                if len(row) == len(_JOURNAL) and row[0] != _JOURNAL[0] and (row[2] != KEPT or len(row[4]) == 32):
                    rows[row[0]] = row
    return pd.DataFrame(rows.values(), columns=list(_JOURNAL)).set_index("hash")
