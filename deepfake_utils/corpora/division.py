"""Train, dev and eval of a corpus, its own or drawn where nothing in it names any; and subsets of their trials."""

from __future__ import annotations

import numpy as np
import pandas as pd

from deepfake_utils.conventions import (
    BONAFIDE,
    SPLITS,
    SPOOF,
    UNKNOWN_SPEAKER,
    UNKNOWN_WORDS,
    ConfigError,
    CorpusError,
)
from deepfake_utils.corpora.corpus import Corpus
from deepfake_utils.files import match_names

SHARES = (0.6, 0.2, 0.2)  # of train, dev and eval, where they are drawn


def divide(corpus: Corpus, seed: int) -> tuple[list[pd.DataFrame], str]:
    """Protocols of train, dev and eval, and a sentence for the reader on where they come from.

    Args:
        seed: of the draw, where a folder of recordings or In-the-Wild names no train split.

    Raises:
        CorpusError: it is an official test set, or has some of the splits only.
    """
    if "train" in corpus.splits:
        where_from = f"The splits train, dev and eval are those that come with the corpus {corpus.name}."
        return [corpus.protocol(split) for split in SPLITS], where_from
    if corpus.names_splits:
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


def assign_splits(
    protocol: pd.DataFrame,
    fractions: tuple[float, float, float],
    seed: int,
    by: str = "speaker",
) -> pd.DataFrame:
    """Divide trials into train, dev and eval so that no speaker is in two of them.

    Whole groups are dealt out in random order, each to the split that lacks most of its share of that group's label.

    Args:
        protocol: any protocol table.
        fractions: shares of train, dev and eval, each >= 0, adding up to 1; a share of 0 gives no trial.
        seed: of the deal; the same seed and trials give the same splits, whatever the order of the rows.
        by: column whose equal values stay together; trials that have `-` there (an unknown speaker, or with "attack"
            bona fide) are dealt one by one.

    Returns:
        A copy of `protocol` with new values in `split`.

    Raises:
        ConfigError: the fractions are no fractions, or `by` is not a column.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ConfigError(f"fractions {fractions}: expected three shares of train, dev and eval that add up to 1")
    if by not in protocol.columns:
        raise ConfigError(f"by={by!r} is not a column of the protocol; it has {', '.join(protocol.columns)}")
    group = protocol[by].where(protocol[by] != UNKNOWN_SPEAKER, "- " + protocol["utterance"])
    counts = pd.crosstab(group, protocol["label"])  # groups in sorted order, so the deal ignores the order of rows
    wanted = np.outer(fractions, counts.sum().to_numpy(float))
    dealt = np.zeros_like(wanted)
    sizes = counts.to_numpy(float)
    share = sizes / sizes.sum(axis=0)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order].sum(axis=1), kind="stable")]  # large ones first: small ones even out
    splits = {}
    for i in order:
        lack = ((wanted - dealt) / np.maximum(wanted, 1e-12) * (wanted > 0)) @ share[i]
        lack[np.asarray(fractions) == 0] = -np.inf
        chosen = int(np.argmax(lack))
        dealt[chosen] += sizes[i]
        splits[counts.index[i]] = SPLITS[chosen]
    return protocol.assign(split=group.map(splits))


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
    known = scores.assign(utterance=match_names(protocol["utterance"], scores["utterance"]))
    known = known.drop_duplicates("utterance").set_index("utterance")["score"]
    part = protocol[protocol["utterance"].isin(known.index)].reset_index(drop=True)
    return part.assign(score=known.reindex(part["utterance"]).to_numpy(np.float64))


def proportional_subset(protocol: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Return n trials with bona fide and each attack in proportion, in protocol order; all if there are no more.

    Neither label is lost, however few are drawn (n >= 2); an attack that is rarer than one in n may be.
    """
    if len(protocol) <= n:
        return protocol.reset_index(drop=True)
    shuffled = protocol.sample(frac=1, random_state=seed).sort_values("attack", kind="stable")
    labels = [part for _, part in shuffled.groupby("label")]
    n_first = min(max(round(n * len(labels[0]) / len(protocol)), 1), n - 1) if len(labels) == 2 else n
    drawn = []
    for part, k in zip(labels, (n_first, n - n_first), strict=False):
        drawn.append(part.iloc[((np.arange(k) + 0.5) * len(part) / k).astype(int)])  # evenly through its attacks
    return pd.concat(drawn).sort_index().reset_index(drop=True)


def split_by_speaker(trials: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return two halves of a scored split for a corpus that has no dev split.

    No speaker is in both; where speakers are not known, trials are divided.
    """
    unknown = trials["speaker"].astype(str).isin(UNKNOWN_WORDS).any()
    groups = trials["utterance" if unknown else "speaker"].to_numpy(dtype=str)
    chosen = np.random.default_rng(seed).permutation(np.unique(groups))
    first = pd.Series(groups).isin(chosen[: len(chosen) // 2]).to_numpy()
    return trials[first].reset_index(drop=True), trials[~first].reset_index(drop=True)


def source_of(trials: pd.DataFrame) -> pd.Series:
    """What trials rise and fall together with: their source where the corpus names it, else speaker or attack."""
    if "source" in trials:
        return trials["source"].astype(str)
    return trials["attack"].where(trials["label"] == SPOOF, trials["speaker"]).astype(str)
