"""Train, dev and eval of a corpus, its own or drawn where nothing in it names any; and subsets of their trials."""

from __future__ import annotations

import numpy as np
import pandas as pd

from deepfake_utils.conventions import BONAFIDE, SPOOF, ConfigError, CorpusError
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


def balanced_subset(protocol: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Return up to n trials, half of them bona fide, the spoofs spread evenly over the attacks; in protocol order.

    All trials if there are no more than n.
    """
    if n < 4:
        raise ConfigError(f"a subset needs at least 4 trials, got {n}")
    if len(protocol) <= n:
        return protocol.reset_index(drop=True)
    shuffled = protocol.sample(frac=1, random_state=seed)
    bonafide = shuffled[shuffled["label"] == BONAFIDE].head(n // 2)
    spoof = shuffled[shuffled["label"] == SPOOF]
    turn = spoof.groupby("attack").cumcount()  # the first of every attack, then the second of every attack ...
    spoof = spoof.loc[turn.sort_values(kind="stable").index].head(n - len(bonafide))
    return pd.concat([bonafide, spoof]).sort_index().reset_index(drop=True)


def scored_part(protocol: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of a protocol that have a score, with the column score; scores of other trials are left.

    A file may hold several splits, and a run may have scored a part of one. `len` says how many there are; none is an
    empty frame.
    """
    known = scores.drop_duplicates("utterance").set_index("utterance")["score"]
    part = protocol[protocol["utterance"].isin(known.index)].reset_index(drop=True)
    return part.assign(score=known.reindex(part["utterance"]).to_numpy(np.float64))


def proportional_subset(protocol: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Return about n trials with bona fide and each attack in proportion, in protocol order; all if there are fewer."""
    share = min(1.0, n / len(protocol))
    return protocol.groupby("attack").sample(frac=share, random_state=seed).sort_index().reset_index(drop=True)


def split_by_speaker(trials: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return two halves of a scored split for a corpus that has no dev split.

    No speaker is in both; where speakers are not known, trials are divided.
    """
    unknown = trials["speaker"].astype(str).isin(("", "-", "unknown", "nan", "None")).any()
    groups = trials["utterance" if unknown else "speaker"].to_numpy(dtype=str)
    chosen = np.random.default_rng(seed).permutation(np.unique(groups))
    first = pd.Series(groups).isin(chosen[: len(chosen) // 2]).to_numpy()
    return trials[first].reset_index(drop=True), trials[~first].reset_index(drop=True)
