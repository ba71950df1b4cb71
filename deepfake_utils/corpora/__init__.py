"""Corpora of bona fide and spoofed speech: find them on disk and read them as one kind of table."""

from deepfake_utils.corpora.asvspoof import read_protocol_file
from deepfake_utils.corpora.find import Corpus, find_corpora
from deepfake_utils.corpora.folder import assign_splits
from deepfake_utils.corpora.trials import UNKNOWN_SPEAKER, fingerprint

__all__ = ["Corpus", "find_corpora", "read_protocol_file", "assign_splits", "fingerprint", "UNKNOWN_SPEAKER"]
