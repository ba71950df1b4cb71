"""Learning-rate schedules, weight averages and sharpness-aware steps, each a small function of explicit state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deepfake_utils.training.config import TrainingConfig

ONE_CYCLE_RISE = 0.3  # fraction of the run in which the one-cycle rate climbs (Smith and Topin 2018 use 0.3 to 0.5)


def learning_rate(config: TrainingConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of one optimiser step: a pure function, so that resuming needs no scheduler state.

    Args:
        config: names the schedule, its highest and its lowest rate.
        step: optimiser steps already taken, 0 to total_steps - 1.

    Source: cosine, Loshchilov and Hutter 2017 (without restarts, as AASIST); one-cycle, Smith and Topin 2018;
    cyclical (triangular), Smith 2017.

    >>> c = TrainingConfig()
    >>> learning_rate(c, 0, 10, 1000), round(learning_rate(c, 999, 10, 1000), 7)
    (0.0001, 5e-06)
    """
    low, high = config.learning_rate_min, config.learning_rate
    fraction = step / max(1, total_steps - 1)
    if config.schedule == "constant":
        rate = high
    elif config.schedule == "cosine":
        rate = _cosine(high, low, fraction)
    elif config.schedule == "one_cycle":
        start = high / 25
        if fraction < ONE_CYCLE_RISE:
            rate = _cosine(start, high, fraction / ONE_CYCLE_RISE)
        else:
            rate = _cosine(high, low, (fraction - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))
    else:
        cycle_steps = max(2, config.cycle_epochs * steps_per_epoch)
        position = (step % cycle_steps) / cycle_steps  # 0 to 1 within the cycle
        rate = low + (high - low) * (1 - abs(2 * position - 1))
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    return rate


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def build_optimizer(model: nn.Module, criterion: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Adam with L2 weight decay, as published, over the model's and the loss's own parameters."""
    parameters = [*model.parameters(), *criterion.parameters()]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)


def build_average(model: nn.Module, config: TrainingConfig) -> AveragedModel | None:
    """The running average of the weights that `config.average` names, or None.

    Source: SWA, Izmailov et al. 2018; both through torch.optim.swa_utils. Batch-norm statistics are
    re-estimated before the average is scored.
    """
    if config.average == "ema":
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    if config.average == "swa":
        return AveragedModel(model)
    return None


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, waveforms: Callable[[], Iterable[torch.Tensor]], device: torch.device
) -> None:
    """Recompute batch-norm statistics of averaged weights from training waveforms.

    Args:
        model: averaged model; its batch-norm buffers are replaced, its mode is kept.
        waveforms: called once, gives an iterable of (B, T) batches.
    """
    layers = _batch_norms(model)
    momenta = [layer.momentum for layer in layers]
    was_training = model.training
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # None: plain mean over all batches
    model.train()
    for waveform in waveforms():
        model(waveform.to(device))
    model.train(was_training)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


class SharpnessAware:
    """The two-pass step of sharpness-aware minimisation around any optimiser.

    Climb to the worst point within `rho` of the weights, take the gradient there, come back, step.
    Source: Foret et al. 2021, equation 2 and algorithm 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, rho: float) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.rho = rho
        self._norms = [(layer, layer.momentum) for layer in _batch_norms(model)]
        self._climb: list[torch.Tensor | None] = []

    @torch.no_grad()
    def climb(self) -> None:
        """Move the weights by rho along their normalised gradient and clear the gradient.

        Where a gradient has overflowed (float16) the weights stay: NaN could not be taken back by `descend`.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        scale = self.rho / (norm + 1e-12) if norm.isfinite() else torch.zeros_like(norm)
        self._climb = [None if p.grad is None else (p.grad * scale).nan_to_num_(0, 0, 0) for p in self.parameters]
        for parameter, offset in zip(self.parameters, self._climb, strict=True):
            if offset is not None:
                parameter.add_(offset)
                parameter.grad = None
        for layer, _ in self._norms:  # running statistics are those of the weights here, not at the top
            layer.momentum = 0.0

    @torch.no_grad()
    def descend(self) -> None:
        """Return to the weights before `climb`; the gradient found at the top stays for the optimiser."""
        for parameter, offset in zip(self.parameters, self._climb, strict=True):
            if offset is not None:
                parameter.sub_(offset)
        for layer, momentum in self._norms:
            layer.momentum = momentum
        self._climb = []
