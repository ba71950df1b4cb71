"""The words every other room shares: rates, labels, column names, audio suffixes, errors. No third-party import."""

from __future__ import annotations

SAMPLE_RATE_HZ = 16_000
CROP_SAMPLES = 64_600  # 4.04 s, the input length of the AASIST and ASVspoof 2021 baselines

SPOOF, BONAFIDE = 0, 1  # labels, and the positions of the two logits
LABEL_NAMES = {SPOOF: "spoof", BONAFIDE: "bonafide"}
NO_ATTACK = "-"  # the attack of a bona fide trial

AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".aif", ".aiff", ".wma", ".webm")

# One row a trial. `path` is absolute; `label` is 0 or 1; `split` is train, dev or eval.
PROTOCOL_COLUMNS = ("utterance", "path", "label", "attack", "speaker", "split", "corpus")


class DeepfakeUtilsError(Exception):
    """Base of every error this package raises on bad input; its text says what to do about it."""


class ConfigError(DeepfakeUtilsError):
    """A setting is unknown, out of range, or contradicts another."""


class CorpusError(DeepfakeUtilsError):
    """A corpus, protocol or recording list is missing, malformed or incomplete."""


class AudioError(DeepfakeUtilsError):
    """A recording cannot be decoded or is not usable speech."""


class ScoreError(DeepfakeUtilsError):
    """Scores are missing, duplicated, non-finite or do not match their protocol."""


class CheckpointError(DeepfakeUtilsError):
    """A weights or checkpoint file is missing, damaged or belongs to another model."""


class TrainingError(DeepfakeUtilsError):
    """Training cannot start or cannot go on."""
