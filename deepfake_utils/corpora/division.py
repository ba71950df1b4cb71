"""Train, dev and eval of a corpus: its own, or drawn where nothing in it names any."""

from __future__ import annotations

import pandas as pd

from deepfake_utils.conventions import CorpusError
from deepfake_utils.corpora.corpus import Corpus
from deepfake_utils.corpora.folder import assign_splits
from deepfake_utils.corpora.trials import SPLITS, UNKNOWN_SPEAKER

SHARES = (0.6, 0.2, 0.2)  # of train, dev and eval, where they are drawn


def divide(corpus: Corpus, seed: int) -> tuple[list[pd.DataFrame], str]:
    """Protocols of train, dev and eval, and a sentence for the reader on where they come from.

    Args:
        seed: of the draw, where a folder of recordings or In-the-Wild names no train split.

    Raises:
        CorpusError: it is an official test set, or has some of the splits only.
    """
    if "train" in corpus.splits:
        return [corpus.protocol(split) for split in SPLITS], f"The splits are {corpus.name}'s own."
    if corpus.kind not in ("folder", "in_the_wild"):
        raise CorpusError(
            f"{corpus.name} in {corpus.root} is a test set: it has {', '.join(corpus.splits)} and no train; train on "
            "another corpus (ASVspoof 2019 LA for 2021), and test on this one with notebook 03, data= this folder, "
            "weights= the trained weights"
        )
    trials = assign_splits(corpus.protocol(), SHARES, seed)
    unknown = int((trials["speaker"] == UNKNOWN_SPEAKER).sum())
    speakers = "no speaker is in two of them"
    if unknown:
        speakers = (
            f"the speaker of {unknown:,} of {len(trials):,} trials is not known, so one person may be in several of "
            "them, and among strangers more errors are to be expected than on eval"
        )
    tables = [trials[trials["split"] == split].reset_index(drop=True) for split in SPLITS]
    shares = ", ".join(f"{100 * share:g} % {split}" for share, split in zip(SHARES, SPLITS, strict=True))
    return tables, (
        f"Nothing here names a train split, so splits were drawn (seed {seed}): {shares}; {speakers}. "
        "Attacks are not kept apart."
    )
