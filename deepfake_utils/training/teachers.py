"""Distillation: frozen countermeasures that a student learns from, beside the labels or in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from deepfake_utils.conventions import BONAFIDE, SPOOF, ConfigError
from deepfake_utils.models.losses import distillation_loss
from deepfake_utils.scoring.published import sha256_of
from deepfake_utils.scoring.weights import ScoredByLoss, load_model, weights_file
from deepfake_utils.training.config import TrainingConfig


def fingerprint_of_weights(weights: Iterable[str]) -> str:
    """Twelve hexadecimal digits of each file's content, joined by commas; folders may move between sessions.

    Raises:
        CheckpointError: a file is not there.
    """
    return ",".join(sha256_of(weights_file(name).read_bytes())[:12] for name in weights)


class Teachers:
    """What several countermeasures say of a batch together: the mean of their log-odds of bona fide.

    They see exactly what the student sees, crops and augmentation included. They stay in evaluation mode, in float32,
    and draw nothing from training's random numbers.

    Args:
        models: countermeasures of two logits, on the device of the waveforms.
        temperature: that softens their answers and the student's, positive.
    """

    def __init__(self, models: Iterable[nn.Module], temperature: float):
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.temperature = temperature

    @torch.no_grad()
    def log_odds(self, waveform: Tensor) -> Tensor:
        """(B, T) waveforms to (B,) natural logarithms of the odds of bona fide."""
        logits = torch.stack([model(waveform).logits for model in self.models])  # (teachers, B, 2)
        return (logits[..., BONAFIDE] - logits[..., SPOOF]).mean(dim=0)

    def loss(self, logits: Tensor, waveform: Tensor) -> Tensor:
        """How far the student's logits (B, 2) are from these teachers; a scalar."""
        return distillation_loss(logits, self.log_odds(waveform), self.temperature)


def load_teachers(config: TrainingConfig, device: torch.device, say: Callable[[str], None]) -> Teachers | None:
    """The teachers that `config` names, each said with what it is; None where it names none.

    Raises:
        CheckpointError: a file is missing, or is not weights.
        ConfigError: a teacher whose scores are no log-odds, or that needs longer crops.
    """
    models = []
    for name, digits in zip(config.teachers, fingerprint_of_weights(config.teachers).split(","), strict=False):
        path, model = weights_file(name), load_model(weights=name).to(device)
        if isinstance(model, ScoredByLoss):
            raise ConfigError(
                f"teacher {path} scores by {type(model.criterion).__name__}, {model.criterion.score_kind}: expected "
                "log-odds, which weights trained with loss='cross_entropy' give"
            )
        if model.min_samples > config.crop_samples:
            raise ConfigError(
                f"teacher {path} needs {model.min_samples} samples, and crop_samples is {config.crop_samples}: raise it"
            )
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        say(f"teacher:   {path}, {type(model).__name__} of {n_parameters:,} parameters, fingerprint {digits}")
        models.append(model)
    return Teachers(models, config.temperature) if models else None


def about_weights(weights: Iterable[str], digits: str) -> list[dict[str, str]]:
    """For the file of weights: file name and fingerprint of each that they learned from or began with."""
    pairs = zip(weights, digits.split(","), strict=True)
    return [{"file": Path(name).name, "fingerprint": own} for name, own in pairs]
