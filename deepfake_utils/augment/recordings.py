"""Recorded noises and measured impulse responses, read from a folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from deepfake_utils.conventions import AUDIO_SUFFIXES, SAMPLE_RATE_HZ, ConfigError
from deepfake_utils.files import list_audio
from deepfake_utils.waveforms.decode import read_audio


def read_recordings(folder: str | os.PathLike, generator: torch.Generator, *, limit_s: float = 1800.0) -> list[Tensor]:
    """Read the recordings under a folder, in random order, until `limit_s` of sound is in memory.

    Half an hour, the default, takes 115 MB: a corpus of noise does not fit in memory, a varied part of it does.

    Args:
        folder: searched with its subfolders for any kind of audio file.
        generator: on the CPU; decides which recordings are read.
        limit_s: seconds of sound after which no further recording is read.

    Returns:
        Mono waveforms at 16 kHz, float32 (n,), for `draw_noise` or `draw_reverb`.

    Raises:
        ConfigError: the folder is missing or holds no audio.
        AudioError: a recording cannot be decoded.
    """
    folder = Path(folder)
    paths, _ = list_audio(folder)
    if not paths:
        state = "holds no audio file" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"recordings folder {folder} {state}: expected one with {', '.join(AUDIO_SUFFIXES)}")
    recordings, n_samples = [], 0
    for index in torch.randperm(len(paths), generator=generator).tolist():
        if n_samples >= limit_s * SAMPLE_RATE_HZ:
            break
        recordings.append(torch.from_numpy(read_audio(paths[index])))
        n_samples += len(recordings[-1])
    return recordings
