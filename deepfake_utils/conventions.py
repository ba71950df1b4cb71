"""The words every other room shares: rates, labels, column names, audio suffixes, errors. No third-party import."""

from __future__ import annotations

SAMPLE_RATE_HZ = 16_000
CROP_SAMPLES = 64_600  # 4.04 s, the input length of the AASIST and ASVspoof 2021 baselines

SPOOF, BONAFIDE = 0, 1  # labels, and the positions of the two logits
LABEL_NAMES = {SPOOF: "spoof", BONAFIDE: "bonafide"}
NO_ATTACK = "-"  # the attack of a bona fide trial
UNKNOWN_ATTACK, UNKNOWN_SPEAKER = "unknown", "-"  # as this package writes them
UNKNOWN_WORDS = ("", "-", "unknown", "nan", "None")  # as people do

# What FFmpeg reads, video included; where one recording has several, the first goes before the others.
AUDIO_SUFFIXES = (
    ".flac", ".wav", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".aif", ".aiff", ".wma", ".webm", ".oga", ".aifc", ".w64",
    ".rf64", ".wv", ".au", ".caf", ".amr", ".awb", ".mka", ".m4b", ".mp2", ".mpga", ".spx", ".ac3", ".eac3", ".dts",
    ".ape", ".tta", ".tak", ".mpc", ".gsm", ".sph", ".voc", ".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".avi",
    ".flv", ".mpg", ".mpeg", ".mts", ".m2ts", ".wmv", ".asf", ".ogv",
)  # fmt: skip

# One row a trial. `path` is absolute; `label` is 0 or 1; `split` is train, dev or eval.
PROTOCOL_COLUMNS = ("utterance", "path", "label", "attack", "speaker", "split", "corpus")
SPLITS = ("train", "dev", "eval")

_LABEL_WORDS = {  # letters only
    **dict.fromkeys(("bonafide", "real", "genuine", "human", "authentic"), BONAFIDE),
    **dict.fromkeys(("spoof", "spoofed", "fake", "deepfake", "synthetic", "synthesized", "generated"), SPOOF),
    **dict.fromkeys(("ai", "aigenerated"), SPOOF),
}


def label_of(word: str) -> int | None:
    """1 for bona fide, 0 for spoof, however it is written; None for any other word, numbers included.

    >>> label_of("bona-fide"), label_of("Fake"), label_of("1")
    (1, 0, None)
    """
    return _LABEL_WORDS.get("".join(filter(str.isalpha, word.lower())))


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
