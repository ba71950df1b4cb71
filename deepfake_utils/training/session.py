"""The moving parts of one training run: opened, stepped, scored, saved and restored by the loop in `training`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from deepfake_utils.augment import build_augmentation, draw_band_mask
from deepfake_utils.conventions import BONAFIDE, ScoreError, TrainingError
from deepfake_utils.evaluation.metrics import compute_eer
from deepfake_utils.evaluation.scorefile import write_scores
from deepfake_utils.files import atomic_write
from deepfake_utils.machine import describe_machine, pick_device, pick_precision, seed_everything
from deepfake_utils.models import build_model
from deepfake_utils.models.losses import build_loss
from deepfake_utils.models.sinc import SincFilters
from deepfake_utils.scoring.score import SCORING_BATCH, compute_outputs, score_frame
from deepfake_utils.scoring.weights import embedding_dim, save_weights, score_kind, scoring_model
from deepfake_utils.training import plan as capacity
from deepfake_utils.training.config import TrainingConfig
from deepfake_utils.training.resume import load_training_state, save_training_state
from deepfake_utils.training.schedule import (
    SharpnessAware,
    build_average,
    build_optimizer,
    learning_rate,
    reestimate_batch_norm,
)
from deepfake_utils.waveforms import open_source
from deepfake_utils.waveforms.batches import balanced_weights, train_batches

# Settings that may change between a run and its resumption without changing what is computed.
FREE_TO_CHANGE = frozenset({"time_budget_s", "checkpoint_every_s", "data_path", "patience_epochs"})
STEPS_BETWEEN_CHECKS = 16  # on a GPU: reading the loss every step would stall it
BATCHES_FOR_AVERAGED_BATCH_NORM = 32


@dataclass
class State:
    """Where a run is; with the tensors it is what a checkpoint holds."""

    epoch: int = 0
    step: int = 0  # optimiser steps taken in this epoch
    loss_sum: float = 0.0
    history: list[dict] = field(default_factory=list)
    best_epoch: int = -1
    best_dev_eer: float = math.inf
    stopped: str = ""


class Session:
    """The moving parts of one training run, so that the loop above can be read at a glance."""

    def __init__(self, train, dev, run_dir, config, model, device, resume, world, say) -> None:
        self.train, self.dev, self.run_dir, self.config = train, dev, run_dir, config
        self.world, self.say, self.resume = world, say, resume
        chosen = pick_device(world.device_name(device))
        self.device, self.precision = chosen.device, pick_precision(chosen.device, config.precision)
        say(f"device:    {chosen.reason}")
        say(f"precision: {self.precision.reason}")
        seed_everything(config.seed)
        generator = torch.Generator().manual_seed(config.seed)
        self.model = (
            model if model is not None else build_model(config.model, generator=generator, **config.model_options)
        )
        self.criterion = build_loss(config.loss, embedding_dim(self.model), **_loss_options(config, generator))
        self.model.to(self.device).train(), self.criterion.to(self.device)
        seed_everything(config.seed + world.rank)
        self.state, self.micro_batches = State(), 1
        self.n_bands = _sinc_bands(self.model) if config.band_mask else 0
        self._pending: list[tuple[torch.Tensor, np.ndarray]] = []
        self._saved_at = time.monotonic()
        self._dev_s = 0.0
        self._tensorboard = None
        self._utilisation: list[float] = []
        self.started = 0.0

    # ---- before the first step -------------------------------------------------------------------------

    def prepare(self, waveforms_dir: Path) -> None:
        """Restore a checkpoint, open the waveforms, settle the batch size, say what is going to happen."""
        config = self.config
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.augment = build_augmentation(config.augmentation, **config.augmentation_options)
        saved = None
        if self.resume and self.checkpoint_path.is_file():
            saved = load_training_state(self.checkpoint_path)
        self._settle_batch_size(saved)
        self.steps_per_epoch = len(self.train) // self.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        self.optimizer = build_optimizer(self.model, self.criterion, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.needs_scaler)
        self.average = build_average(self.model, config)
        self.sam = SharpnessAware(self.optimizer, config.sam_rho) if config.sam_rho else None
        self.labels = self.train["label"].to_numpy()
        self.sampling = balanced_weights(self.labels) if config.sampling == "balanced" else None
        if saved is not None:
            self.restore(saved)
        if self.is_finished:
            return
        self.source = open_source(self.train, kind=config.data_path, folder=waveforms_dir, device=self.device)
        self.dev_source = open_source(self.dev, kind=config.data_path, folder=waveforms_dir, device=self.device)
        self.say(f"waveforms: {self.source.describe()}")
        self._say_projection()
        self.parallel = self.world.wrap(self.model, self.device)  # last: measuring alone must not wait for others

    @property
    def is_finished(self) -> bool:
        return bool(self.state.stopped) or self.state.epoch >= self.config.epochs

    def _settle_batch_size(self, saved: dict | None) -> None:
        """The batch size of the run and the rates that belong to it; a continued run keeps those it began with."""
        config, recipe = self.config, TrainingConfig().batch_size
        if saved is not None:
            size = saved["batch_size"]
        else:
            size = capacity.settle_batch_size(self.model, config, self.device, self.precision, self.say)
        self.batch_size = self.world.broadcast(min(size, len(self.train)))
        high = config.learning_rate
        if config.batch_size == "auto":
            scale = math.sqrt(self.batch_size / recipe)  # Adam's rule: Malladi et al. 2022, arXiv 2205.10287
            high *= scale
            self.say(f"rate:      times {scale:.2f}, the square root of {self.batch_size}/{recipe} utterances")
        self.rates = config.replace(learning_rate=high, learning_rate_min=min(config.learning_rate_min, high))

    def _say_projection(self) -> None:
        cost = capacity.measure(self.model, self.config, self.batch_size, self.device, self.precision)
        left = self.config.epochs - self.state.epoch
        projection = capacity.project(cost, len(self.train), len(self.dev), left)
        self._dev_s = projection.dev_s
        self.say(f"projected: {projection.describe(left)}")

    # ---- one step ----------------------------------------------------------------------------------------

    def epoch_batches(self):
        """The rest of this epoch's batches; a function of (seed, epoch, step) and nothing else."""
        return train_batches(
            self.source, self.labels,
            batch_size=self.batch_size, n_samples=self.config.crop_samples, seed=self.config.seed,
            epoch=self.state.epoch, first_step=self.state.step, device=self.device,
            augment=self.augment, weights=self.sampling, shard=self.world.shard,
        )  # fmt: skip

    def take_step(self, batch) -> None:
        """One optimiser step at the scheduled rate, in as many micro-batches as the memory asks for."""
        step = self.state.epoch * self.steps_per_epoch + self.state.step
        rate = learning_rate(self.rates, step, self.steps_per_epoch, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        band_mask = self._band_mask(step)
        while True:
            try:
                loss = self._gradient(batch, band_mask)
                break
            except torch.OutOfMemoryError:
                if self.world.size > 1:
                    raise  # one process alone cannot take its step again
            self._halve_micro_batch(len(batch.target))  # here, where the error no longer holds the step's tensors
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(
                [p for g in self.optimizer.param_groups for p in g["params"]], self.config.clip_norm
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and self.config.average == "ema":
            self.average.update_parameters(self.model)
        self._pending.append((loss, batch.index))
        self.state.step += 1
        if len(self._pending) >= (STEPS_BETWEEN_CHECKS if self.device.type == "cuda" else 1):
            self.check_losses()

    def _gradient(self, batch, band_mask) -> torch.Tensor:
        loss = self._forward_backward(batch, band_mask)
        if self.sam is not None:
            self.sam.climb()
            try:
                self._forward_backward(batch, band_mask)
            finally:
                self.sam.descend()
        return loss

    def _forward_backward(self, batch, band_mask) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total_weight = self.world.sum(self.criterion.mass(batch.target))
        options = {} if band_mask is None else {"band_mask": band_mask}
        loss = torch.zeros((), device=self.device)
        chunks = zip(batch.waveform.chunk(self.micro_batches), batch.target.chunk(self.micro_batches), strict=True)
        for waveform, target in chunks:
            with self.precision.autocast(self.device):
                output = self.parallel(waveform, **options)
            part = self.criterion(output.logits.float(), output.embedding.float(), target)
            share = self.criterion.mass(target) / total_weight
            self.scaler.scale(part * share * self.world.size).backward()
            loss += part.detach() * share
        if self.world.size > 1:
            self.world.average_gradients(self.criterion)
        return self.world.sum(loss)

    def _band_mask(self, step: int) -> torch.Tensor | None:
        if not self.config.band_mask:
            return None
        generator = torch.Generator().manual_seed((self.config.seed << 32) + step)
        return draw_band_mask(self.n_bands, generator, max_width=min(20, self.n_bands)).to(
            self.device, non_blocking=True
        )

    def _halve_micro_batch(self, n_utterances: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.micro_batches * 2 > n_utterances // 2:
            raise TrainingError(
                f"out of memory even with {n_utterances // self.micro_batches} utterances at a time: "
                "choose a smaller model, shorter crops (crop_samples) or another device"
            )
        self.micro_batches *= 2
        self.say(
            f"out of memory: going on with {self.micro_batches} micro-batches"
            f" of about {n_utterances // self.micro_batches} "
            f"utterances; the step still sees all {n_utterances} (batch norm sees one micro-batch at a time)"
        )

    def check_losses(self) -> None:
        """Read the losses of the last steps from the device; a non-finite one ends training."""
        if not self._pending:
            return
        losses = torch.stack([loss for loss, _ in self._pending]).cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            names = self.train["utterance"].to_numpy()[self._pending[bad[0]][1]]
            raise TrainingError(
                f"the loss became {losses[bad[0]]} in epoch {self.state.epoch + 1}"
                f", in the batch of {', '.join(map(str, names))}. "
                "The last good checkpoint is kept. Look for damaged recordings"
                "; or lower learning_rate, set clip_norm, or use precision='fp32'"
            )
        self.state.loss_sum += float(losses.sum())
        self._pending.clear()
        if self.device.type == "cuda":
            self._utilisation.append(capacity.gpu_utilisation(self.device))

    # ---- the end of an epoch -------------------------------------------------------------------------------

    def score_dev(self) -> float:
        """EER on dev of the weights that would be kept now; a new best is written out."""
        began = time.monotonic()
        scored = self._scored_model()
        eer = math.nan
        if self.world.is_main:
            logits, _ = compute_outputs(scored, self.dev_source, n_samples=self.config.eval_samples, device=self.device,
                                        progress="dev")  # fmt: skip
            if not np.isfinite(logits).all():
                bad = self.dev["utterance"].to_numpy()[~np.isfinite(logits).all(axis=1)]
                raise ScoreError(
                    f"{len(bad)} dev scores are not finite after epoch {self.state.epoch + 1}"
                    f", first {', '.join(map(str, bad[:5]))}"
                )
            eer = compute_eer(logits[:, BONAFIDE].astype(np.float64), self.dev["label"].to_numpy()).eer
            if eer < self.state.best_dev_eer:
                self._keep_best(scored, logits, eer)
        eer = self.world.broadcast(eer)
        if eer < self.state.best_dev_eer:
            self.state.best_dev_eer, self.state.best_epoch = eer, self.state.epoch
        patience = self.config.patience_epochs
        if patience and self.state.epoch - self.state.best_epoch >= patience:
            self.state.stopped = f"no better dev EER in {patience} epochs"
        self._dev_s = time.monotonic() - began
        return eer

    def _scored_model(self) -> nn.Module:
        model = self.model
        if self.average is not None:
            if self._swa_is_due():
                self.average.update_parameters(self.model)
            if self.average.n_averaged > 0:
                model = self.average.module
                reestimate_batch_norm(model, self._waveforms_for_batch_norm, self.device)
        return scoring_model(model, self.criterion)

    def _swa_is_due(self) -> bool:
        """Whether this epoch is one that SWA averages, is whole, and was not counted before an interruption."""
        if self.config.average != "swa" or self.state.step < self.steps_per_epoch:
            return False
        first = max(1, math.ceil(self.config.swa_start * self.config.epochs))
        return int(self.average.n_averaged) < self.state.epoch + 1 - first + 1

    def _waveforms_for_batch_norm(self):
        batches = train_batches(
            self.source, self.labels,
            batch_size=self.batch_size, n_samples=self.config.crop_samples, seed=self.config.seed, epoch=0,
            device=self.device,
        )  # fmt: skip
        for n, batch in enumerate(batches):
            if n == BATCHES_FOR_AVERAGED_BATCH_NORM:
                break
            yield from batch.waveform.split(SCORING_BATCH)  # in float32: what fits in training may not fit

    def _keep_best(self, scored: nn.Module, logits: np.ndarray, eer: float) -> None:
        facts = {
            "training": self.config.to_dict(),
            "epoch": self.state.epoch + 1,
            "dev_eer": eer,
            "machine": describe_machine(self.device),
        }
        save_weights(
            self.run_dir / "best.safetensors", scored, name=self.config.model, loss=self.config.loss, facts=facts
        )
        frame = score_frame(self.dev["utterance"], logits)
        write_scores(
            self.run_dir / "dev_scores.csv",
            frame,
            {"score": score_kind(scored), "split": "dev", "epoch": self.state.epoch + 1},
        )

    def epoch_row(self, dev_eer: float, train_s: float, wait_s: float, n_utterances: int) -> dict:
        """One row of the history."""
        row = {
            "epoch": self.state.epoch + 1,
            "train_loss": self.mean_loss(),
            "dev_eer": dev_eer,
            "best_dev_eer": self.state.best_dev_eer,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_s": train_s,
            "dev_s": self._dev_s,
            "utterances_per_s": n_utterances / train_s,
            "data_wait_fraction": wait_s / train_s,
            "peak_memory_bytes": capacity.peak_memory_bytes(self.device),
            "gpu_utilisation": float(np.mean(self._utilisation)) if self._utilisation else math.nan,
            "micro_batches": self.micro_batches,
        }
        self._utilisation.clear()
        busy = "" if math.isnan(row["gpu_utilisation"]) else f"  GPU busy {row['gpu_utilisation']:.0%}"
        self.say(
            f"epoch {row['epoch']:3d}: loss {row['train_loss']:.4f}  dev EER {100 * dev_eer:6.2f} % "
            f" (best {100 * self.state.best_dev_eer:.2f} % "
            f"in epoch {self.state.best_epoch + 1})  {row['utterances_per_s']:.1f} utt/s  "
            f"data wait {100 * row['data_wait_fraction']:.1f} %  "
            f"peak {row['peak_memory_bytes'] / 2**30:.2f} GiB{busy}"
        )
        return row

    def write_epoch(self) -> None:
        """History as CSV and, where TensorBoard is installed, as an event file."""
        if not self.world.is_main:
            return
        with atomic_write(self.run_dir / "history.csv") as part:
            pd.DataFrame(self.state.history).to_csv(part, index=False)
        self._log_tensorboard(self.state.history[-1])

    def _log_tensorboard(self, row: dict) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self.run_dir / "tensorboard")
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, row["epoch"])
        self._tensorboard.flush()

    # ---- stopping and going on -------------------------------------------------------------------------------

    @property
    def checkpoint_path(self) -> Path:
        return self.run_dir / "checkpoint.pt"

    def save_checkpoint(self) -> None:
        """Write all that is needed to continue exactly."""
        self.check_losses()
        if not self.world.is_main:
            return
        tensors = {
            "model": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        plain = {"config": self.config.to_dict(), "state": vars(self.state), "batch_size": self.batch_size,
                 "micro_batches": self.micro_batches, "n_train": len(self.train), "version": 1}  # fmt: skip
        save_training_state(self.checkpoint_path, tensors | plain)
        self._saved_at = time.monotonic()

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint in the middle of a long epoch."""
        if time.monotonic() - self._saved_at >= self.config.checkpoint_every_s:
            self.save_checkpoint()

    def restore(self, saved: dict) -> None:
        """Continue from a checkpoint of the same recipe and data.

        Raises:
            TrainingError: it belongs to another configuration or another training set.
        """
        now, then = self.config.to_dict(), saved["config"]
        changed = [
            f"{k} was {then.get(k)!r}, is {v!r}" for k, v in now.items() if then.get(k) != v and k not in FREE_TO_CHANGE
        ]
        if saved["n_train"] != len(self.train):
            changed.append(f"training utterances were {saved['n_train']}, are {len(self.train)}")
        if changed:
            raise TrainingError(
                f"{self.checkpoint_path} belongs to another run ({'; '.join(changed)})"
                ": use another run_dir, or resume=False to replace it"
            )
        self.model.load_state_dict(saved["model"])
        self.criterion.load_state_dict(saved["criterion"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty where the run began in another precision
            self.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        torch.set_rng_state(saved["rng_cpu"])
        if self.device.type == "cuda" and saved["rng_cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng_cuda"], self.device)
        self.state, self.micro_batches = State(**saved["state"]), saved["micro_batches"]
        if self.world.rank:  # the state above is the first process's: dropout must differ
            seed_everything(self.config.seed + self.world.rank + self.state.epoch * self.world.size)
        if self.state.stopped.startswith("time budget"):
            self.state.stopped = ""  # a new session has a new budget
        self.say(f"resuming:  epoch {self.state.epoch + 1}, step {self.state.step}, from {self.checkpoint_path}")

    def out_of_time(self) -> bool:
        """Whether the rest of the budget is needed to score dev and save."""
        budget = self.config.time_budget_s
        if not budget:
            return False
        return self.world.broadcast(time.monotonic() - self.started + 1.5 * self._dev_s > budget)

    def mean_loss(self) -> float:
        checked = self.state.step - len(self._pending)
        return self.state.loss_sum / checked if checked else math.nan

    def time_left(self, utterances_per_s: float) -> str:
        steps = self.total_steps - self.state.epoch * self.steps_per_epoch - self.state.step
        epochs = self.config.epochs - self.state.epoch
        return capacity.in_words(steps * self.batch_size / max(utterances_per_s, 1e-9) + epochs * self._dev_s)

    def finish(self) -> None:
        """Save, and say why training ended."""
        self.state.stopped = self.state.stopped or "all epochs done"
        self.save_checkpoint()
        self.say(f"waveforms: {self.source.describe()}")
        if self._tensorboard is not None:
            self._tensorboard.close()
        self.say_end()

    def say_end(self) -> None:
        """Why training ended, and what it reached."""
        state = self.state
        reached = f"best dev EER {100 * state.best_dev_eer:.2f} % in epoch {state.best_epoch + 1}"
        self.say(f"finished:  {state.stopped}; {reached}")


def _sinc_bands(model: nn.Module) -> int:
    bank = next((module for module in model.modules() if isinstance(module, SincFilters)), None)
    if bank is None:
        raise TrainingError(f"band_mask=True masks sinc filters, and {type(model).__name__} has none: switch it off")
    return bank.n_filters


def _loss_options(config: TrainingConfig, generator: torch.Generator) -> dict:
    return {"class_weights": config.class_weights} if config.loss == "cross_entropy" else {"generator": generator}
