"""Waveforms on their way to the model: files, cache, packed store or device memory, then batches."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..conventions import ConfigError
from .batches import Batch, balanced_weights, eval_batches, train_batches
from .cache import FileSource

__all__ = [
    "Batch",
    "FileSource",
    "Source",
    "balanced_weights",
    "eval_batches",
    "open_source",
    "train_batches",
]

KINDS = ("auto", "files")


class Source(Protocol):
    """The clips of a protocol, by row; every kind gives the same numbers."""

    def __len__(self) -> int: ...

    def clip(self, index: int) -> np.ndarray:
        """int16 samples (n,) of one row."""

    def n_samples(self, index: int) -> int: ...

    def describe(self) -> str: ...


def open_source(
    protocol, kind: str = "auto", *, folder=None, device=None, budget_bytes: int | None = None
) -> Source:
    """Open the recordings of a protocol in the way that suits the machine."""
    if kind not in KINDS:
        raise ConfigError(f"source kind {kind!r} is unknown: expected one of {', '.join(KINDS)}")
    return FileSource(protocol)
