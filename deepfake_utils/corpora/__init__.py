"""Corpora of bona fide and spoofed speech: find them on disk and read them as one kind of table."""

from deepfake_utils.corpora.corpus import KINDS, Corpus, read_protocol_file
from deepfake_utils.corpora.division import divide
from deepfake_utils.corpora.find import KAGGLE_DATASETS, find_corpora
from deepfake_utils.corpora.folder import assign_splits
from deepfake_utils.corpora.trials import UNKNOWN_ATTACK, UNKNOWN_SPEAKER, fingerprint

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
    "read_protocol_file",
]
