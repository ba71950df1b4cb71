"""Pieces shared by the models: their output type, and layers more than one of them uses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CMOutput(NamedTuple):
    """What every countermeasure returns for a batch of B waveforms."""

    logits: Tensor  # (B, 2): spoof, bona fide
    embedding: Tensor  # (B, D): the vector the last layer sees
