"""How a countermeasure is trained, as one frozen dataclass that travels with its weights."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from numbers import Integral, Real

from deepfake_utils.augment import RECIPES as AUGMENTATIONS
from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ, ConfigError
from deepfake_utils.models import MODELS
from deepfake_utils.models.losses import LOSSES

KIND_IN_WORDS = {int: "a whole number", float: "a number"}


def _name(default: str, known: Collection[str]):
    return field(default=default, metadata={"kind": str, "known": known})


def _number(default, kind: type, low: float, high: float = math.inf, auto: bool = False):
    return field(default=default, metadata={"kind": kind, "low": low, "high": high, "auto": auto})


def _files():
    return field(default=(), metadata={"kind": os.PathLike})


def _options():
    return field(default_factory=dict, metadata={"kind": dict})


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. The defaults are AASIST's published recipe (clovaai/aasist, config/AASIST.conf), but for two
    things: the published script averages weights after each better dev EER, which `average="swa"` comes nearest to;
    and it keeps the epoch that is best on eval, where here dev decides.

    Raises:
        ConfigError: a value is of the wrong kind, out of its range or not one of its names.
    """

    model: str = _name("aasist", MODELS)
    model_options: dict = _options()  # keyword arguments of build_model
    start: str = field(default="", metadata={"kind": str})  # weights to begin with; wider ones are narrowed to fit
    epochs: int | str = _number(100, int, 1, 100_000, auto=True)  # "auto": what fits time_budget_s, timed on real steps
    batch_size: int | str = _number(24, int, 2, auto=True)  # utterances an optimiser step; "auto": what fits the memory
    crop_samples: int = _number(CROP_SAMPLES, int, 1)  # training crop; scoring has its own length
    eval_samples: int = _number(CROP_SAMPLES, int, 1)  # dev scoring during training
    learning_rate: float = _number(1e-4, float, 0, 10)  # the schedule's highest
    learning_rate_min: float = _number(5e-6, float, 0, 10)  # the schedule's lowest
    weight_decay: float = _number(1e-4, float, 0, 10)
    schedule: str = _name("cosine", ("cosine", "one_cycle", "cyclical", "constant"))  # per optimiser step
    warmup_steps: int = _number(0, int, 0)
    cycle_epochs: int = _number(10, int, 1)  # length of one cycle of the cyclical schedule
    loss: str = _name("cross_entropy", LOSSES)
    class_weights: tuple[float, float] = field(default=(0.1, 0.9), metadata={"kind": tuple})  # spoof, bona fide
    teachers: tuple[str, ...] = _files()  # weights whose mean log-odds the student learns beside the labels
    distil_weight: float = _number(0.7, float, 0, 1)  # of what the teachers say; the labels have the rest
    temperature: float = _number(2.0, float, 0.1, 100)  # that softens what the teachers say: see models.losses
    augmentation: str = _name("none", AUGMENTATIONS)
    augmentation_options: dict = _options()  # effect -> settings that replace the recipe's, or None
    augmentation_rise: float = _number(0.0, float, 0, 1)  # of the run, in which the share augmented grows from 0 to all
    band_mask: bool = field(default=False, metadata={"kind": bool})  # mask up to 20 sinc bands (AASIST's freq_aug)
    sampling: str = _name("uniform", ("uniform", "balanced", "source"))  # see training.sampling
    selection: str = _name("eer", ("eer", "macro"))  # which dev EER decides: see training.selection
    average: str = _name("none", ("none", "ema", "swa"))  # what is scored and kept: the last weights, or an average
    ema_decay: float = _number(0.999, float, 0, 1)
    swa_start: float = _number(0.75, float, 0, 1)  # fraction of the run after which SWA begins
    sam_rho: float = _number(0.0, float, 0, 10)  # sharpness-aware minimisation's radius; 0 switches it off
    clip_norm: float = _number(0.0, float, 0)  # gradient norm ceiling; 0 switches it off
    patience_epochs: int = _number(0, int, 0)  # stop after so many epochs without a better dev EER; 0: never early
    precision: str = _name("auto", ("auto", "fp32", "bf16", "fp16"))
    data_path: str = _name("auto", ("auto", "files", "cache", "store", "device"))
    seed: int = _number(1234, int, 0, 2**31 - 1)
    time_budget_s: float = _number(0.0, float, 0)  # stop in time to save and evaluate; 0 is no limit
    checkpoint_every_s: float = _number(600.0, float, 0)  # besides the end of each epoch

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = _checked(setting.name, getattr(self, setting.name), **setting.metadata)
            object.__setattr__(self, setting.name, value)
        if self.learning_rate_min > self.learning_rate:
            raise ConfigError(
                f"learning_rate_min {self.learning_rate_min:g}: expected at most learning_rate, {self.learning_rate:g}"
            )
        if self.epochs == "auto" and not self.time_budget_s:
            raise ConfigError("epochs 'auto' fills a time budget: give time_budget_s too, or a number of epochs")

        if self.teachers and self.loss != "cross_entropy":
            raise ConfigError(f"loss {self.loss!r} has no log-odds to teach: with teachers, expected 'cross_entropy'")

    def replace(self, **changes) -> TrainingConfig:
        """A copy with some settings changed.

        >>> TrainingConfig().replace(epochs=5).epochs
        5
        """
        known = [setting.name for setting in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise ConfigError(f"unknown training setting {', '.join(unknown)}: expected one of {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """Plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=os.fspath))

    @classmethod
    def from_dict(cls, values: dict) -> TrainingConfig:
        """The inverse of `to_dict`.

        >>> TrainingConfig.from_dict(TrainingConfig(epochs=7).to_dict()) == TrainingConfig(epochs=7)
        True
        """
        return cls().replace(**values)


def _checked(name: str, value, kind: type, known=None, low=-math.inf, high=math.inf, auto: bool = False):
    """The value as a plain one of its kind; the keywords are a field's metadata."""
    if known is not None:
        if not isinstance(value, str) or value not in known:
            raise ConfigError(f"{name} {value!r} is unknown: expected one of {', '.join(known)}")
        return value
    if kind is tuple:
        numbers = isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(part, Real) for part in value)
        if not numbers or min(value) <= 0:
            raise ConfigError(f"{name} {value!r}: expected two positive numbers (spoof, bona fide)")
        return tuple(map(float, value))
    if kind is os.PathLike:
        if not isinstance(value, (tuple, list)) or not all(isinstance(part, (str, os.PathLike)) for part in value):
            raise ConfigError(f'{name} {value!r}: expected a list of files, such as ["a.safetensors"]')
        return tuple(map(os.fspath, value))
    if kind in KIND_IN_WORDS:
        if auto and value == "auto":
            return value
        if not _is_number(value, Integral if kind is int else Real) or not low <= value <= high:
            bounds = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
            raise ConfigError(f"{name} {value!r}: expected {'auto or ' * auto}{KIND_IN_WORDS[kind]} {bounds}")
        return kind(value)
    if not isinstance(value, kind):
        expected = {bool: "true or false", str: "a file or a name of weights"}.get(kind, "names with their values")
        raise ConfigError(f"{name} {value!r}: expected {expected}")
    return value


def _is_number(value, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


# `paper` is the published recipe. `short` is what to run when there are minutes, not hours: a smaller model on
# 2 s crops with a small batch, because a few hundred optimiser steps teach more than a few dozen large ones, and a
# one-cycle schedule with a ten times higher peak, because there is no time for a slow descent.
RECIPES = {
    "paper": TrainingConfig(),
    "short": TrainingConfig(
        model="aasist-l",
        epochs=8,
        batch_size=8,
        crop_samples=2 * SAMPLE_RATE_HZ,
        eval_samples=2 * SAMPLE_RATE_HZ,
        learning_rate=1e-3,
        learning_rate_min=1e-5,
        schedule="one_cycle",
        class_weights=(0.5, 0.5),
        clip_norm=5.0,
    ),
    # Speech from anywhere (`collect`): the network whose weights are shipped. Both classes go through the same random
    # recording chains, the labels are balanced within each source, and every dev source counts alike.
    "open": TrainingConfig(
        model="spectrogram-resnet",
        model_options={"hop_samples": 256},
        epochs=4,
        batch_size=32,
        crop_samples=2 * SAMPLE_RATE_HZ,
        learning_rate=2e-3,
        learning_rate_min=1e-5,
        schedule="one_cycle",
        class_weights=(0.5, 0.5),
        augmentation="open",
        augmentation_rise=0.3,
        sampling="source",
        selection="macro",
        average="ema",
        clip_norm=5.0,
    ),
}
