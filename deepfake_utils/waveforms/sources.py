"""The clips of a protocol, opened in the way that suits the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from deepfake_utils.conventions import ConfigError
from deepfake_utils.machine import free_device_bytes
from deepfake_utils.waveforms.cache import CachedSource, ClipCache, FileSource
from deepfake_utils.waveforms.store import DeviceSource, StoreError, estimate_bytes, open_store

KINDS = ("auto", "files", "cache", "store", "device")
DEVICE_SHARE = 0.5  # of the GPU's free memory, the most that one split may take: what is left is the model's
STORE_MIN_CLIPS = 1_000  # fewer are decoded in a second or two: not worth a file


class Source(Protocol):
    """The clips of a protocol, by row; every kind gives the same numbers."""

    utterances: np.ndarray  # (N,) names, in protocol order

    def __len__(self) -> int: ...

    def clip(self, index: int) -> np.ndarray:
        """int16 samples (n,) of one row; may be read-only."""

    def n_samples(self, index: int) -> int:
        """The length of one row."""

    def describe(self) -> str:
        """One line for the notebook: the kind, the size, and why it was chosen."""


def open_source(
    protocol: pd.DataFrame,
    kind: str = "auto",
    *,
    folder: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    budget_bytes: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Source:
    """Open the recordings of a protocol in the way that suits the machine.

    Args:
        protocol: one row a trial, with `utterance` and `path`.
        kind: "files" decodes at every use, "cache" keeps clips while memory allows, "store" packs them into a
            file in `folder` once, "device" holds them all in the memory of `device`. "auto" takes the device if
            it is a GPU and the samples fit in half its free memory, else the store if there is a folder to write
            to and a corpus worth it, else the cache; what could not be had is said with the reason.
        folder: where packed stores lie; None for no store.
        device: where the batches will be wanted.
        budget_bytes: a cache of its own with this ceiling; None takes the one all sources of the process share.
        progress: show progress bars.
        say: receives a line where something else than expected is done, or has to be waited for.

    Raises:
        ConfigError: unknown kind, or a kind without the folder or device it needs.
        StoreError: kind "store" or "device" was asked for and cannot be had.

    >>> import pandas as pd
    >>> open_source(pd.DataFrame({"utterance": ["a"], "path": ["a.flac"]}), kind="files")
    <FileSource files: 1 clips, decoded at every use>
    """
    if kind not in KINDS:
        raise ConfigError(f"source kind {kind!r} is unknown: expected one of {', '.join(KINDS)}")
    if kind == "auto":
        return _open_best(protocol, folder, device, budget_bytes, progress, say)
    if kind == "files":
        return FileSource(protocol)
    if kind == "cache":
        return CachedSource(protocol, None if budget_bytes is None else ClipCache(budget_bytes))
    if kind == "store":
        if folder is None:
            raise ConfigError('source kind "store" needs a folder to write to')
        return open_store(protocol, folder, progress=progress, say=say)
    if device is None:
        raise ConfigError('source kind "device" needs a device')
    return _open_on_device(protocol, folder, device, progress, say)


def _open_best(protocol, folder, device, budget_bytes, progress: bool, say: Callable[[str], None]) -> Source:
    files, reasons = FileSource(protocol), []
    if device is not None and torch.device(device).type == "cuda":
        size, free = estimate_bytes(files), free_device_bytes(device)
        sizes = f"{size / 1e9:.2f} GB of samples, {free / 1e9:.2f} GB free on {device}"
        if size <= DEVICE_SHARE * free:
            source = _open_on_device(protocol, folder, device, progress, say)
            source.reason = f"chosen because they fit in {DEVICE_SHARE:.0%} of its free memory: {sizes}"
            return source
        reasons.append(f"not on the device: {sizes}")
    if folder is None:
        reasons.append("no store: no folder named")
    elif len(files) < STORE_MIN_CLIPS:
        reasons.append(f"no store: under {STORE_MIN_CLIPS:,} clips are soon decoded")
    else:
        try:
            source = open_store(protocol, folder, progress=progress, say=say)
            source.reason = "; ".join([*reasons, "decoded once, for this and later sessions"])
            return source
        except StoreError as error:
            say(f"Going on with the cache: {error}")
            reasons.append("no store: it could not be written")
    source = open_source(protocol, "cache", budget_bytes=budget_bytes)
    source.reason = "; ".join(reasons)
    return source


def _open_on_device(protocol, folder, device, progress: bool, say: Callable[[str], None]) -> DeviceSource:
    source = FileSource(protocol)
    if folder is not None and len(source) >= STORE_MIN_CLIPS:
        try:
            source = open_store(protocol, folder, progress=progress, say=say)
        except StoreError as error:
            say(f"Decoding straight to {device}: {error}")
    return DeviceSource(source, device, progress=progress)
