"""Pieces shared by the models: their output type, and layers more than one of them uses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError


class CMOutput(NamedTuple):
    """What every countermeasure returns for a batch of B waveforms."""

    logits: Tensor  # (B, 2): spoof, bona fide
    embedding: Tensor  # (B, D): the vector the last layer sees


def check_waveform(waveform: Tensor, min_samples: int) -> None:
    """Refuse, with an AudioError, what is not a (B, T) batch of at least `min_samples` samples."""
    if waveform.ndim != 2:
        raise AudioError(f"waveform of shape {tuple(waveform.shape)}: expected (batch, samples)")
    if waveform.shape[1] < min_samples:
        raise AudioError(
            f"waveforms of {waveform.shape[1]} samples ({waveform.shape[1] / SAMPLE_RATE_HZ:.3f} s): this model "
            f"needs at least {min_samples}; repeat them end to end with audio.fit_length"
        )
