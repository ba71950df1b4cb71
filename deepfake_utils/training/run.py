"""What a training run consists of: plain records, filled by `prepare.open_run` and moved on by `loop`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from deepfake_utils.machine import Precision
from deepfake_utils.training.config import TrainingConfig
from deepfake_utils.training.parallel import World
from deepfake_utils.training.schedule import SharpnessAware
from deepfake_utils.training.teachers import Teachers
from deepfake_utils.waveforms import Source
from deepfake_utils.waveforms.batches import Augmentation

SCORING_SHARE = 0.4  # of the time of a training step, for as much sound scored; until dev has been scored once


@dataclass
class State:
    """Where a run is; with the tensors it is what a checkpoint holds."""

    epoch: int = 0
    step: int = 0  # optimiser steps taken in this epoch
    loss_sum: float = 0.0  # over these steps
    micro_batches: int = 1  # parts that a batch is computed in
    history: list[dict] = field(default_factory=list)
    best_epoch: int = -1
    best_dev_eer: float = math.inf  # the figure that `config.selection` names
    fine_tuned: bool = False  # whether the run began with weights that were given


@dataclass
class Pace:
    """How fast this session goes, by its real steps; seconds."""

    started: float  # on the monotonic clock, when `fit` was called
    step_s: float = math.nan  # mean of this epoch's steps
    dev_s: float = math.nan  # one scoring of dev
    n_steps: int = 0  # taken in this session
    since: float = 0.0
    n_since: int = 0

    def begin_epoch(self) -> None:
        """Start the mean anew: the machine may have become busier, or less busy."""
        self.since, self.n_since = time.monotonic(), 0

    def note_step(self) -> None:
        """A step is done."""
        now = time.monotonic()
        self.n_steps, self.n_since = self.n_steps + 1, self.n_since + 1
        self.step_s = (now - self.since) / self.n_since
        if self.n_steps == 1:  # allocates and tunes: it says little about the others
            self.since, self.n_since = now, 0


@dataclass
class Run:
    """Everything one training run works with."""

    wish: TrainingConfig  # as it was given
    config: TrainingConfig  # as it is carried out: "auto" replaced by numbers
    train: pd.DataFrame
    dev: pd.DataFrame
    fingerprints: dict[str, str]  # of train, dev, teachers and start
    folder: Path
    say: Callable[[str], None]
    world: World
    device: torch.device
    precision: Precision
    source: Source
    dev_source: Source
    augment: Augmentation
    model: nn.Module
    parallel: nn.Module  # the same model, as several processes train it
    criterion: nn.Module
    teachers: Teachers | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    sam: SharpnessAware | None
    state: State
    pace: Pace
    saved_at: float = field(default_factory=time.monotonic)
    is_closed: bool = False  # time was up within an epoch: what follows is not part of the run that goes on
    unread: list[tuple[torch.Tensor, np.ndarray]] = field(default_factory=list)  # losses still on the device, and rows
    gpu_busy: list[float] = field(default_factory=list)  # shares of the time, this epoch

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train) // self.config.batch_size

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    @property
    def steps_done(self) -> int:
        return self.state.epoch * self.steps_per_epoch + self.state.step

    @property
    def mean_loss(self) -> float:
        n_read = self.state.step - len(self.unread)
        return self.state.loss_sum / n_read if n_read else math.nan

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.pace.started

    @property
    def dev_s(self) -> float:
        """Seconds of one scoring of dev: measured, or judged by the steps."""
        if not math.isnan(self.pace.dev_s):
            return self.pace.dev_s
        config = self.config
        utterance_s = self.pace.step_s * self.world.size / config.batch_size  # dev is scored by one process
        return SCORING_SHARE * utterance_s * len(self.dev) * config.eval_samples / config.crop_samples

    @property
    def left_s(self) -> float:
        """Seconds to the end of the run at the pace of the latest steps."""
        epochs = self.config.epochs - self.state.epoch
        return (self.total_steps - self.steps_done) * self.pace.step_s + epochs * self.dev_s
