"""Clips decoded from their files, and a cache that keeps as many of them as the machine's memory allows."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .. import audio
from ..conventions import AudioError, CorpusError


class FileSource:
    """A corpus read from its files: every request decodes.

    Args:
        protocol: one row a trial, with the columns `utterance` and `path`.

    Raises:
        CorpusError: the protocol is empty or lacks one of the columns.
    """

    kind = "files"

    def __init__(self, protocol: pd.DataFrame):
        missing = {"utterance", "path"} - set(protocol.columns)
        if missing:
            raise CorpusError(f"the protocol lacks {sorted(missing)}; it has {list(protocol.columns)}")
        if not len(protocol):
            raise CorpusError("the protocol has no rows: nothing to read (was the split name right?)")
        self.utterances = protocol["utterance"].astype(str).to_numpy(dtype=object)
        self.paths = protocol["path"].astype(str).to_numpy(dtype=object)

    def __len__(self) -> int:
        return len(self.utterances)

    def clip(self, index: int) -> np.ndarray:
        """The whole recording of trial `index` as int16 samples (n,) at 16 kHz.

        Raises:
            AudioError: the file cannot be decoded; the text names the utterance and the path.
        """
        try:
            samples = audio.to_int16(audio.read_audio(self.paths[index]))
        except (AudioError, OSError) as error:
            raise AudioError(f"utterance {self.utterances[index]}: {error}") from error
        if not len(samples):
            raise AudioError(f"utterance {self.utterances[index]}: {self.paths[index]} holds no samples")
        return samples

    def n_samples(self, index: int) -> int:
        """The length of trial `index` at 16 kHz; here it takes decoding the file."""
        return len(self.clip(index))

    def describe(self) -> str:
        """One line for the notebook."""
        return f"{len(self):,} clips, decoded from their files at every use"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.describe()}>"
