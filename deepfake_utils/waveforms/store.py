"""A corpus decoded once: packed into one file of int16 samples, or held whole in the memory of a device.

On disk a store is three files. `<name>-<fingerprint>.int16` holds the samples of all clips, end to end in protocol
order; `.index` beside it holds one record a clip (length and CRC-32), appended after the samples it speaks of;
`<name>.json`, written last and atomically, declares the two complete. Until then they are a journal: whatever
kills the builder, the next one checks the records against the samples and goes on from the last that is right.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError, CorpusError, DeepfakeUtilsError
from deepfake_utils.files import atomic_write
from deepfake_utils.machine import free_device_bytes
from deepfake_utils.waveforms.batches import crop_starts, read_ahead
from deepfake_utils.waveforms.cache import FileSource, with_reason

try:
    import fcntl
except ImportError:  # Windows: two builders at once are not kept apart there
    fcntl = None

SETTINGS = {"format": 1, "sample_rate_hz": SAMPLE_RATE_HZ, "dtype": "int16"}  # a change rebuilds every store
RECORD = np.dtype([("n_samples", "<u4"), ("crc32", "<u4")])
BLOCK_BYTES = 8 * 2**20  # written, or copied to a device, at a time
SPACE_MARGIN = 1.1  # the size is estimated from a sample of headers
N_HEADERS = 256


class StoreError(DeepfakeUtilsError):
    """A packed store cannot be written, or is damaged."""


class PackedStore:
    """A finished store, read through a memory map; each clip's checksum is verified when first used.

    Args:
        samples_path: the `.int16` file; the `.index` lies beside it.
        utterances: (N,) names in the store's order, for messages.
    """

    reason = ""

    def __init__(self, samples_path: str | os.PathLike, utterances: np.ndarray):
        self.path, self.utterances = Path(samples_path), utterances
        self._records = np.fromfile(self.path.with_suffix(".index"), RECORD)
        self._offsets = _offsets(self._records)
        self._verified = np.zeros(len(self._records), dtype=bool)
        self._samples = np.asarray(np.memmap(self.path, np.int16, mode="r"))

    def __len__(self) -> int:
        return len(self._records)

    def clip(self, index: int) -> np.ndarray:
        """The whole recording of trial `index`: int16 (n,), a read-only view of the mapped file.

        Raises:
            StoreError: the samples are not those that were written.
        """
        clip = self._samples[self._offsets[index] : self._offsets[index + 1]]
        if not self._verified[index]:
            if zlib.crc32(clip) != self._records["crc32"][index]:
                raise StoreError(
                    f"utterance {self.utterances[index]}: its samples in {self.path} are damaged (checksum); "
                    "delete that file, and the store is built again"
                )
            self._verified[index] = True
        return clip

    def n_samples(self, index: int) -> int:
        """The length of trial `index`, from the index."""
        return int(self._records["n_samples"][index])

    def describe(self) -> str:
        """One line for the notebook."""
        size = f"{self._samples.nbytes / 1e9:.2f} GB"
        return with_reason(f"store: {len(self):,} clips, {size} in {self.path}", self.reason)

    def __repr__(self) -> str:
        return f"<PackedStore {self.describe()}>"


class DeviceSource:
    """A corpus in the memory of a device, from which crops are gathered without a file or a copy from the host.

    Args:
        source: where the clips come from.
        device: where they go.
        workers: threads reading; None takes the number of processors.
        progress: show a progress bar.

    Raises:
        StoreError: the clips do not fit into the device's free memory.
        AudioError: a clip cannot be decoded.
    """

    reason = ""

    def __init__(self, source, device, *, workers: int | None = None, progress: bool = True):
        self.utterances = source.utterances
        rows, workers = range(len(source)), workers or os.cpu_count()
        self._lengths = np.array(list(read_ahead(source.n_samples, rows, workers)), dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)])
        needed, free = 2 * int(self._offsets[-1]), free_device_bytes(device)
        if needed > free:
            raise StoreError(
                f"{len(source):,} clips take {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB free: "
                "use a packed store or the cache"
            )
        self._samples = torch.empty(int(self._offsets[-1]), dtype=torch.int16, device=device)
        with closing(read_ahead(source.clip, rows, workers)) as clips:
            self._fill(tqdm(clips, f"to {device}", len(source), disable=not progress))
        self.device = self._samples.device

    def _fill(self, clips: Iterable[np.ndarray]) -> None:
        start = 0
        for block in _blocks(clips):
            stop = start + len(block)
            lengths = np.array([len(clip) for clip in block])
            if (lengths != self._lengths[start:stop]).any():
                wrong = start + int(np.argmax(lengths != self._lengths[start:stop]))
                raise AudioError(
                    f"utterance {self.utterances[wrong]} decodes to {lengths[wrong - start]} samples and its "
                    f"header promises {self._lengths[wrong]}: it is damaged, copy it again"
                )
            samples = torch.from_numpy(np.concatenate(block))
            self._samples[self._offsets[start] : self._offsets[stop]].copy_(samples)
            start = stop

    def __len__(self) -> int:
        return len(self._lengths)

    def clip(self, index: int) -> np.ndarray:
        """The whole recording of trial `index`: int16 (n,) in host memory."""
        return self._samples[self._offsets[index] : self._offsets[index + 1]].cpu().numpy()

    def n_samples(self, index: int) -> int:
        """The length of trial `index`."""
        return int(self._lengths[index])

    def gather(self, index: np.ndarray, position: np.ndarray, n_samples: int) -> torch.Tensor:
        """Cut crops on the device: (B, n_samples) int16.

        Args:
            index: (B,) trials.
            position: (B,) in [0, 1), where each crop starts (see `crop_starts`).
        """
        lengths = self._lengths[index]
        plan = np.stack([self._offsets[index], crop_starts(lengths, n_samples, position), lengths])
        offset, start, length = torch.from_numpy(plan).to(self.device, non_blocking=True).unsqueeze(-1)
        ramp = torch.arange(n_samples, device=self.device)
        return self._samples[offset + (start + ramp) % length]  # the modulo repeats clips shorter than the crop

    def describe(self) -> str:
        """One line for the notebook."""
        size = f"{self._samples.nbytes / 1e9:.2f} GB"
        return with_reason(f"device: {len(self):,} clips, {size} in the memory of {self.device}", self.reason)

    def __repr__(self) -> str:
        return f"<DeviceSource {self.describe()}>"


def open_store(
    protocol: pd.DataFrame,
    folder: str | os.PathLike,
    *,
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> PackedStore:
    """Open the packed store of a protocol in `folder`, building it or going on with it where needed.

    A finished store is reused, also from a folder that cannot be written, if utterances, file names, sizes,
    modification times and settings are those it was built from; else a new one is built and replaces it.

    Args:
        protocol: one row a trial, with `utterance` and `path`.
        folder: where the stores of any number of protocols lie together.
        workers: threads decoding; None takes the number of processors. (The decoders release Python's lock:
            threads are as fast as processes, and start at once.)
        progress: show a progress bar while building.
        say: receives a line if another process builds the store and has to be waited for.

    Raises:
        StoreError: the folder cannot be written or has too little space; what was decoded is kept.
        CorpusError: a recording is missing.
        AudioError: a recording cannot be decoded; the text names the utterance.
    """
    source, folder = FileSource(protocol), Path(folder)
    workers = workers or os.cpu_count()
    name, fingerprint = store_name(protocol), _fingerprint(source, workers)
    declaration = folder / f"{name}.json"
    samples_path = folder / f"{name}-{fingerprint}.int16"
    if not _is_finished(declaration, fingerprint, samples_path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _only_builder(samples_path.with_suffix(".index"), say) as index_file:
                if not _is_finished(declaration, fingerprint, samples_path):  # another builder may have been here
                    _build(source, samples_path, index_file, workers, progress)
                    _declare(declaration, fingerprint, samples_path, len(source))
        except OSError as error:
            raise StoreError(
                f"the packed store {samples_path} cannot be written: {error.strerror or error}; what is already "
                "decoded is kept there. Free space or name another folder, and run again to go on"
            ) from error
    _drop_replaced(declaration, samples_path)
    return PackedStore(samples_path, source.utterances)


def store_name(protocol: pd.DataFrame) -> str:
    """A readable name for the store of these utterances: corpus and split where there is one of each, and a hash."""
    words = [
        str(protocol[column].iloc[0])
        for column in ("corpus", "split")
        if column in protocol and protocol[column].nunique() == 1
    ]
    listed = "\n".join(protocol["utterance"].astype(str))
    return "-".join([*words, hashlib.sha256(listed.encode()).hexdigest()[:12]]).replace(os.sep, "_")


def estimate_bytes(source) -> int:
    """The size of all clips as int16, from the lengths of an evenly spread sample of them."""
    rows = np.unique(np.linspace(0, len(source) - 1, min(N_HEADERS, len(source))).astype(int))
    return int(2 * np.mean([source.n_samples(int(row)) for row in rows]) * len(source))


def _blocks(clips: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Group clips into lists of about BLOCK_BYTES."""
    block, size = [], 0
    for clip in clips:
        block.append(clip)
        size += clip.nbytes
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _offsets(records: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(records["n_samples"], dtype=np.int64)])


def _fingerprint(source: FileSource, workers: int) -> str:
    """Hash of everything a store depends on. Paths count from their common folder, which mounts may move."""
    root = os.path.commonpath([os.path.dirname(path) for path in source.paths])
    digest = hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode())
    with closing(read_ahead(_state, source.paths, workers)) as states:
        for utterance, path, (size, modified_ns) in zip(source.utterances, source.paths, states, strict=True):
            name = os.path.relpath(path, root)
            digest.update(f"{utterance}\0{name}\0{size}\0{modified_ns}\n".encode())
    return digest.hexdigest()[:12]


def _state(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror}; the protocol names a recording that is not there") from error
    return state.st_size, state.st_mtime_ns


def _is_finished(declaration: Path, fingerprint: str, samples_path: Path) -> bool:
    try:
        declared = json.loads(declaration.read_text())
        index = samples_path.with_suffix(".index").read_bytes()
        n_samples = int(_offsets(np.frombuffer(index, RECORD))[-1])
        return (
            declared["fingerprint"] == fingerprint
            and declared["index_crc32"] == zlib.crc32(index)
            and samples_path.stat().st_size == 2 * n_samples
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _only_builder(index_path: Path, say: Callable[[str], None]) -> Iterator[BinaryIO]:
    """Open the index for appending, and wait while another process does so."""
    with index_path.open("a+b") as index_file:
        if fcntl is not None:
            try:
                fcntl.flock(index_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that builds {index_path.with_suffix('.int16')}")
                fcntl.flock(index_file, fcntl.LOCK_EX)
        yield index_file


def _build(source: FileSource, path: Path, index_file: BinaryIO, workers: int, progress: bool) -> None:
    def decode(row: int) -> tuple[np.ndarray, int]:
        clip = source.clip(row)
        return clip, zlib.crc32(clip)

    with path.open("a+b") as samples_file:
        n_done = _resume(samples_file, index_file)
        _require_space(source, path, already_bytes=samples_file.tell())
        decoded = read_ahead(decode, range(n_done, len(source)), workers)
        bar = tqdm(decoded, "packing", len(source), initial=n_done, unit="clip", disable=not progress)
        clips, records, size = [], [], 0
        try:
            for clip, crc32 in bar:
                clips.append(clip)
                records.append((len(clip), crc32))
                size += clip.nbytes
                if size >= BLOCK_BYTES:
                    whole, clips, records, size = (clips, records), [], [], 0
                    _append(samples_file, index_file, *whole)
        finally:  # also for a clip that cannot be decoded, and for Ctrl-C: what is done is kept
            bar.close()
            decoded.close()
            _append(samples_file, index_file, clips, records)
        for file in (samples_file, index_file):
            os.fsync(file.fileno())


def _append(samples_file: BinaryIO, index_file: BinaryIO, clips: list[np.ndarray], records: list) -> None:
    samples_file.write(b"".join(clip.tobytes() for clip in clips))
    samples_file.flush()
    index_file.write(np.array(records, RECORD).tobytes())
    index_file.flush()


def _resume(samples_file: BinaryIO, index_file: BinaryIO) -> int:
    """Cut both files back to the clips that are whole and right, and say how many those are."""
    index_file.seek(0)
    content = index_file.read()
    records = np.frombuffer(content[: len(content) // RECORD.itemsize * RECORD.itemsize], RECORD)
    samples_file.seek(0)
    n_good = n_bytes = 0
    for n_samples, crc32 in records.tolist():
        clip = samples_file.read(2 * n_samples)
        if len(clip) != 2 * n_samples or zlib.crc32(clip) != crc32:
            break
        n_good, n_bytes = n_good + 1, n_bytes + len(clip)
    samples_file.truncate(n_bytes)
    samples_file.seek(n_bytes)
    index_file.truncate(n_good * RECORD.itemsize)
    return n_good


def _require_space(source: FileSource, path: Path, already_bytes: int) -> None:
    needed = int(estimate_bytes(source) * SPACE_MARGIN) - already_bytes
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise StoreError(
            f"the packed store {path} needs about {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free: "
            "free space, name a folder on another disk, or use the cache"
        )


def _declare(declaration: Path, fingerprint: str, samples_path: Path, n_clips: int) -> None:
    """Make the store valid."""
    index = samples_path.with_suffix(".index").read_bytes()
    facts = {"fingerprint": fingerprint, "n_clips": n_clips, "index_crc32": zlib.crc32(index), **SETTINGS}
    with atomic_write(declaration) as part:
        part.write_text(json.dumps(facts, indent=1))


def _drop_replaced(declaration: Path, samples_path: Path) -> None:
    """Delete what earlier states of the corpus left behind."""
    with suppress(OSError):
        for file in declaration.parent.iterdir():
            if file.name.startswith(f"{declaration.stem}-") and file.stem != samples_path.stem:
                file.unlink()
