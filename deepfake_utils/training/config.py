"""How a countermeasure is trained, as one frozen dataclass that travels with its weights. No third-party import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ, ConfigError

SCHEDULES = ("cosine", "one_cycle", "cyclical", "constant")
AVERAGES = ("none", "ema", "swa")
SAMPLINGS = ("uniform", "balanced")
LOSSES = ("cross_entropy", "oc_softmax", "p2sgrad")


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. The defaults are AASIST's published recipe (clovaai/aasist, config/AASIST.conf), but for two
    things: the published script averages weights after each better dev EER, which `average="swa"` comes nearest to;
    and it keeps the epoch that is best on eval, where here dev decides.

    Raises:
        ConfigError: a value is out of its range or not one of its names.
    """

    model: str = "aasist"
    model_options: dict = field(default_factory=dict)  # keyword arguments of build_model
    epochs: int = 100
    batch_size: int | str = 24  # utterances an optimiser step, or "auto": what fits the device's memory
    crop_samples: int = CROP_SAMPLES  # training crop; scoring has its own length
    eval_samples: int = CROP_SAMPLES  # dev scoring during training
    learning_rate: float = 1e-4  # the schedule's highest
    learning_rate_min: float = 5e-6  # the schedule's lowest
    weight_decay: float = 1e-4
    schedule: str = "cosine"  # per optimiser step
    warmup_steps: int = 0
    cycle_epochs: int = 10  # length of one cycle of the cyclical schedule
    loss: str = "cross_entropy"
    class_weights: tuple[float, float] = (0.1, 0.9)  # spoof, bona fide
    augmentation: str = "none"  # a recipe of deepfake_utils.augment
    augmentation_options: dict = field(default_factory=dict)  # effect -> settings that replace the recipe's, or None
    band_mask: bool = False  # mask up to 20 neighbouring sinc bands a batch (AASIST's freq_aug)
    sampling: str = "uniform"
    average: str = "none"  # weights that are scored and kept: the last, an exponential or an equal average
    ema_decay: float = 0.999
    swa_start: float = 0.75  # fraction of the run after which SWA begins
    sam_rho: float = 0.0  # sharpness-aware minimisation's radius; 0 switches it off
    clip_norm: float = 0.0  # gradient norm ceiling; 0 switches it off
    patience_epochs: int = 0  # stop after so many epochs without a better dev EER; 0 never stops early
    precision: str = "auto"
    data_path: str = "auto"  # files, cache, store, device
    seed: int = 1234
    time_budget_s: float = 0.0  # stop in time to save and evaluate; 0 is no limit
    checkpoint_every_s: float = 600.0  # besides the end of each epoch

    def __post_init__(self) -> None:
        for name, allowed in (
            ("schedule", SCHEDULES), ("loss", LOSSES), ("average", AVERAGES), ("sampling", SAMPLINGS),
            ("precision", ("auto", "fp32", "bf16", "fp16")),
            ("data_path", ("auto", "files", "cache", "store", "device")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r} is unknown: expected one of {', '.join(allowed)}")
        if self.batch_size != "auto" and not (isinstance(self.batch_size, int) and self.batch_size >= 2):
            raise ConfigError(f"batch_size {self.batch_size!r}: expected 'auto' or a whole number of at least 2 "
                              "(batch normalisation needs two utterances)")  # fmt: skip
        for name, low, high in (
            ("epochs", 1, 100_000), ("crop_samples", 1, None), ("eval_samples", 1, None), ("learning_rate", 0, 10),
            ("learning_rate_min", 0, self.learning_rate), ("weight_decay", 0, 10), ("warmup_steps", 0, None),
            ("cycle_epochs", 1, None), ("ema_decay", 0, 1), ("swa_start", 0, 1), ("sam_rho", 0, 10),
            ("clip_norm", 0, None), ("patience_epochs", 0, None), ("time_budget_s", 0, None),
            ("checkpoint_every_s", 0, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value < low or (high is not None and value > high):
                raise ConfigError(
                    f"{name} {value!r}: expected a number from {low} to {'any' if high is None else high}"
                )
        weights = self.class_weights
        numbers = isinstance(weights, tuple) and all(isinstance(weight, (int, float)) for weight in weights)
        if not numbers or len(weights) != 2 or min(weights) <= 0:
            raise ConfigError(f"class_weights {weights!r}: expected two positive numbers (spoof, bona fide)")

    def replace(self, **changes) -> TrainingConfig:
        """A copy with some settings changed.

        >>> TrainingConfig().replace(epochs=5).epochs
        5
        """
        unknown = set(changes) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            known = ", ".join(f.name for f in dataclasses.fields(self))
            raise ConfigError(f"unknown training setting {', '.join(sorted(unknown))}: expected one of {known}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self) | {"class_weights": list(self.class_weights)}

    @classmethod
    def from_dict(cls, values: dict) -> TrainingConfig:
        """The inverse of `to_dict`.

        >>> TrainingConfig.from_dict(TrainingConfig(epochs=7).to_dict()) == TrainingConfig(epochs=7)
        True
        """
        values = dict(values)
        if isinstance(values.get("class_weights"), list):  # JSON knows no tuples
            values["class_weights"] = tuple(values["class_weights"])
        return cls().replace(**values)


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
}
