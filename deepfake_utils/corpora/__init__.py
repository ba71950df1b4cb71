"""Corpora of bona fide and spoofed speech: find them on disk and read them as one kind of table."""

from deepfake_utils.conventions import UNKNOWN_ATTACK, UNKNOWN_SPEAKER
from deepfake_utils.corpora.corpus import KINDS, Corpus
from deepfake_utils.corpora.division import assign_splits, divide
from deepfake_utils.corpora.find import KAGGLE_DATASETS, find_corpora
from deepfake_utils.corpora.trials import fingerprint
from deepfake_utils.protocols import read_keys

__all__ = [
    "KAGGLE_DATASETS",
    "KINDS",
    "UNKNOWN_ATTACK",
    "UNKNOWN_SPEAKER",
    "Corpus",
    "assign_splits",
    "divide",
    "find_corpora",
    "fingerprint",
    "read_keys",
]
