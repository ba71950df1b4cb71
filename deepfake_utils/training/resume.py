"""Everything a run needs to continue, in one file."""

from __future__ import annotations

import os

import torch

from deepfake_utils.conventions import CheckpointError
from deepfake_utils.files import atomic_write


def save_training_state(path: str | os.PathLike, state: dict) -> None:
    """Write everything a run needs to continue (tensors and plain values only), atomically."""
    with atomic_write(path) as part:
        torch.save(state, part)


def load_training_state(path: str | os.PathLike) -> dict:
    """Read what `save_training_state` wrote.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"training checkpoint {path} cannot be read ({str(error).splitlines()[0]}): delete it to start anew"
        ) from error
