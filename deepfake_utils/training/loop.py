"""Training: one visible loop, every automatic choice printed with its reason, nothing lost when it is stopped.

A run lives in its folder: `history.csv` (one row an epoch), `checkpoint.pt` (all that is needed to go on),
`best.safetensors` + `best.json` (the weights with the lowest dev EER, and what they were trained on) and
`dev_scores.csv` (that model's dev scores). The eval split is not an argument: selection sees train and dev only.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from deepfake_utils.augment import draw_band_mask
from deepfake_utils.conventions import TrainingError
from deepfake_utils.machine import in_words, keep_freed_memory
from deepfake_utils.scoring.weights import load_model
from deepfake_utils.training import resume as going_on
from deepfake_utils.training.config import TrainingConfig
from deepfake_utils.training.history import epoch_row, gpu_utilisation, open_tensorboard, say_epoch, write_history
from deepfake_utils.training.interrupts import Interrupts
from deepfake_utils.training.memory import in_micro_batches
from deepfake_utils.training.parallel import World
from deepfake_utils.training.plan import LONGEST_SHORT_RUN, PLANNED_SHARE
from deepfake_utils.training.prepare import check_protocols, open_run, sinc_bands
from deepfake_utils.training.run import Run, State
from deepfake_utils.training.sampling import sampling_weights
from deepfake_utils.training.schedule import learning_rate
from deepfake_utils.training.selection import score_dev
from deepfake_utils.training.teachers import fingerprint_of_weights
from deepfake_utils.waveforms import train_batches
from deepfake_utils.waveforms.batches import Batch, Batches

STEPS_BETWEEN_READS = {"cuda": 16}  # of the losses: reading each would stall a GPU; elsewhere they are read at once
READS_BEFORE_PROJECTION = 3
STEPS_TO_SETTLE = 3  # timed for epochs="auto"; the first warms up
OUT_OF_TIME = "time budget used up"


@dataclass
class FitResult:
    """What a training run leaves behind."""

    model: nn.Module  # with the best weights, in evaluation mode, on the CPU
    history: pd.DataFrame  # one row an epoch
    best_epoch: int
    best_dev_eer: float  # fraction; the macro EER where that selects
    weights: Path
    stopped: str  # why training ended
    config: TrainingConfig  # as it was carried out: nothing in it is "auto" that changes the result


def fit(
    train: pd.DataFrame,
    dev: pd.DataFrame,
    run_dir: str | os.PathLike,
    config: TrainingConfig | None = None,
    *,
    model: nn.Module | None = None,
    device: str = "auto",
    resume: bool = True,
    waveforms_dir: str | os.PathLike | None = None,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> FitResult:
    """Train a countermeasure on `train`, keep the weights with the lowest EER on `dev`.

    Args:
        train, dev: protocols; rows of the eval split are refused.
        run_dir: folder of the run; an unfinished run found there is continued exactly. Where a time budget ends it
            within an epoch, the weights of that moment are scored on dev, too, and may be those that are kept, until
            it is continued.
        config: the recipe; None is the published AASIST recipe.
        model: start from a copy of these weights instead of fresh ones; its architecture must be `config`'s.
        device: "auto", "cpu", "cuda" or "cuda:N".
        resume: False starts anew and replaces what is in `run_dir`.
        waveforms_dir: where decoded waveforms may be packed, several GB for a large corpus; runs on the same
            corpus share them. None is the folder `waveforms` beside `run_dir`.
        on_epoch: called with the history after each epoch, for instance to redraw the curves.
        say: where lines of text go.

    Returns:
        The trained countermeasure and its history.

    Raises:
        TrainingError: unusable protocols, a non-finite loss, a full disk, or a checkpoint of another run.
        ConfigError: a model of another architecture, or a setting it does not have.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.

    >>> from deepfake_utils import TrainingConfig, find_corpora, fit  # doctest: +SKIP
    >>> corpus = find_corpora("data")[0]  # doctest: +SKIP
    >>> fit(corpus.protocol("train"), corpus.protocol("dev"), "runs/first", TrainingConfig(epochs=5))  # doctest: +SKIP
    """
    started, config, folder = time.monotonic(), config or TrainingConfig(), Path(run_dir)
    check_protocols(train, dev, config)
    fingerprints = {"train": going_on.fingerprint(train), "dev": going_on.fingerprint(dev)}
    fingerprints["teachers"] = fingerprint_of_weights(config.teachers)
    fingerprints["start"] = fingerprint_of_weights(config.start and [config.start])
    with World() as world, Interrupts() as interrupts:
        say = say if world.is_main else _silent
        saved = going_on.load_checkpoint(folder, config, fingerprints) if resume else None
        if saved is not None:
            settled, state = going_on.settled_config(saved, config), State(**saved["state"])
            if reason := going_on.end_reason(settled, state):
                return _result(folder, settled, state, reason, say)
        run = open_run(
            train, dev, folder, config,
            model=model, device=device, saved=saved, fingerprints=fingerprints, world=world, started=started, say=say,
            waveforms_dir=Path(waveforms_dir or folder.parent / "waveforms"),
        )  # fmt: skip
        if saved is None:
            if not resume and world.is_main:
                going_on.remove_results(folder)
            if config.epochs == "auto":
                _settle_epochs(run)
            _say_settled(run)
            going_on.save_checkpoint(run)  # a folder that cannot be written, or a full disk, is told now
        try:
            reason = _train(run, interrupts, on_epoch)
        except KeyboardInterrupt:
            if interrupts.torn:  # half a step is in the weights: what is on the disk is whole
                say("interrupted within a step: continue with the same call, from the last checkpoint")
                raise
            _save(run)
            say(f"interrupted: continue with the same call, from epoch {run.state.epoch + 1}, step {run.state.step}")
            raise
        say(f"waveforms: {run.source.describe()}")
        return _result(folder, run.config, run.state, reason, say)


def _train(run: Run, interrupts: Interrupts, on_epoch) -> str:
    """All epochs that are left; returns why training ended."""
    keep_freed_memory()
    tensorboard = open_tensorboard(run.folder, run.say) if run.world.is_main else None
    try:
        return _train_epochs(run, interrupts, on_epoch, tensorboard)
    finally:
        if tensorboard is not None:
            tensorboard.close()


def _train_epochs(run: Run, interrupts: Interrupts, on_epoch, tensorboard) -> str:
    """Epoch after epoch: take its steps, score dev, keep the best, write everything down. Returns why it ended."""
    config, state, pace = run.config, run.state, run.pace
    steps_between_reads, out_of_time = STEPS_BETWEEN_READS.get(run.device.type, 1), False
    projected_at = min(1 + READS_BEFORE_PROJECTION * steps_between_reads, run.steps_per_epoch)
    while not (reason := going_on.end_reason(config, state)) and not out_of_time:
        epoch_started, first_step, batches = time.monotonic(), state.step, epoch_batches(run)
        pace.begin_epoch()
        with tqdm(total=run.steps_per_epoch, initial=state.step, desc=f"epoch {state.epoch + 1}/{config.epochs}",
                  unit="step", leave=False, disable=not run.world.is_main) as bar:  # fmt: skip
            for batch in batches:
                with interrupts.held():  # a step is taken whole or not at all
                    run.unread.append((take_step(run, batch), batch.index))
                    state.step += 1
                    if len(run.unread) >= steps_between_reads:
                        read_losses(run)
                pace.note_step()
                bar.set_postfix_str(f"loss {run.mean_loss:.4f}, {in_words(run.left_s)} left")
                bar.update()
                if pace.n_steps == projected_at:
                    _say_projection(run)
                if out_of_time := is_out_of_time(run):
                    break
                if time.monotonic() - run.saved_at >= config.checkpoint_every_s:
                    _save(run)
        read_losses(run)
        if state.step < run.steps_per_epoch:  # time is up, and the next session goes on from here
            going_on.close_within_epoch(run)
        train_s = time.monotonic() - epoch_started
        row = epoch_row(run, score_dev(run), train_s, batches.wait_s, (state.step - first_step) * config.batch_size)
        with interrupts.held():
            state.history = [*(old for old in state.history if old["epoch"] != row["epoch"]), row]
            if not run.is_closed:
                state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
            run.gpu_busy.clear()
            say_epoch(run, row)
            write_history(run, tensorboard)
            _save(run)
        if on_epoch is not None and run.world.is_main:
            on_epoch(pd.DataFrame(state.history))
    return reason or OUT_OF_TIME


def take_step(run: Run, batch: Batch) -> torch.Tensor:
    """One optimiser step, from the rate to the average of weights; returns the loss, still on the device."""
    config, optimizer, scaler = run.config, run.optimizer, run.scaler
    rate = learning_rate(config, run.steps_done, run.steps_per_epoch, run.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    mask = {"band_mask": _band_mask(run)} if config.band_mask else {}
    whole = run.world.sum(run.criterion.mass(batch.target))

    def gradient() -> torch.Tensor:
        """That of the whole batch, in as many parts as the memory asks for; returns the loss."""
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=run.device)
        n_parts = run.state.micro_batches
        for waveform, target in zip(batch.waveform.chunk(n_parts), batch.target.chunk(n_parts), strict=True):
            with run.precision.autocast(run.device):
                output = run.parallel(waveform, **mask)
            share = run.criterion.mass(target) / whole
            part = share * run.criterion(output.logits.float(), output.embedding.float(), target)
            if run.teachers:
                taught = len(target) / config.batch_size * run.teachers.loss(output.logits, waveform)
                part = torch.lerp(part, taught, config.distil_weight)
            scaler.scale(part * run.world.size).backward()
            loss += part.detach()
        run.world.average_gradients(run.criterion)
        return loss

    def gradient_uphill() -> torch.Tensor:
        """Sharpness-aware: the gradient at the worst place nearby; returns the loss here."""
        loss = gradient()
        run.sam.climb()
        try:
            gradient()
        finally:
            run.sam.descend()
        return loss

    loss = in_micro_batches(gradient_uphill if run.sam else gradient, run, len(batch.target))
    if config.clip_norm:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], config.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    if config.average == "ema":
        run.average.update_parameters(run.model)
    return run.world.sum(loss)


def epoch_batches(run: Run) -> Batches:
    """The rest of this epoch's batches; a function of (seed, epoch, step) and nothing else."""
    config = run.config
    rise_steps = config.augmentation_rise * run.total_steps
    before = run.state.epoch * run.steps_per_epoch
    return train_batches(
        run.source, run.train["label"].to_numpy(),
        batch_size=config.batch_size, n_samples=config.crop_samples, seed=config.seed, epoch=run.state.epoch,
        first_step=run.state.step, device=run.device, augment=run.augment, shard=run.world.shard,
        augmented_share=lambda step: (before + step) / rise_steps if rise_steps else 1.0,
        weights=sampling_weights(run.train, config.sampling),
    )  # fmt: skip


def _band_mask(run: Run) -> torch.Tensor:
    generator = torch.Generator().manual_seed((run.config.seed << 32) + run.steps_done)
    n_bands = sinc_bands(run.model)
    return draw_band_mask(n_bands, generator, max_width=min(20, n_bands)).to(run.device, non_blocking=True)


def read_losses(run: Run) -> None:
    """Bring the losses of the last steps from the device; a non-finite one ends training.

    Raises:
        TrainingError: naming the epoch and the batch.
    """
    if not run.unread:
        return
    losses = torch.stack([loss for loss, _ in run.unread]).cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        names = run.train["utterance"].to_numpy()[run.unread[bad[0]][1]]
        raise TrainingError(
            f"the loss became {losses[bad[0]]} in epoch {run.state.epoch + 1}, in the batch of "
            f"{', '.join(map(str, names))}. The last good checkpoint is kept. Look for damaged recordings; or lower "
            "learning_rate, set clip_norm, or use precision='fp32'"
        )
    for loss in losses.tolist():  # one by one: the sum is the same however many are read at once
        run.state.loss_sum += loss
    run.unread.clear()
    if run.device.type == "cuda":
        run.gpu_busy.append(gpu_utilisation(run.device))


def _save(run: Run) -> None:
    read_losses(run)  # first: weights behind a non-finite loss are not worth keeping
    going_on.save_checkpoint(run)


def is_out_of_time(run: Run) -> bool:
    """Whether the rest of the budget is needed to score dev and save."""
    budget_s = run.config.time_budget_s
    reserve_s = 1.5 * run.dev_s if run.pace.n_steps > 1 else 0.0  # the first step says little about what follows
    return bool(budget_s) and bool(run.world.broadcast(run.elapsed_s + reserve_s > budget_s))


def _say_projection(run: Run) -> None:
    pace, config, left_s = run.pace, run.config, run.left_s
    run.say(
        f"projected: {in_words(left_s)} for the {config.epochs - run.state.epoch} epochs left: "
        f"{1000 * pace.step_s:.0f} ms a step, measured on the first {pace.n_steps} real ones, and "
        f"{in_words(run.dev_s)} a dev scoring"
    )
    if config.time_budget_s and run.elapsed_s + left_s > config.time_budget_s:
        run.say(
            f"           more than the time budget of {in_words(config.time_budget_s)}: training will stop in time to "
            "save, before its schedule is finished, and the same call will go on"
        )


def _settle_epochs(run: Run) -> None:
    """Put a number in place of epochs="auto": what fits the time budget by a few real steps, which are taken back."""
    before, times = copy.deepcopy(going_on.snapshot(run)), []
    for batch in islice(epoch_batches(run), STEPS_TO_SETTLE):
        began = time.monotonic()
        take_step(run, batch).item()
        times.append(time.monotonic() - began)
    going_on.restore(run, before)
    run.pace.step_s = float(np.mean(times[1:] or times))
    epoch_s = run.steps_per_epoch * run.pace.step_s + run.dev_s
    fitting = math.floor((PLANNED_SHARE * run.wish.time_budget_s - run.elapsed_s) / epoch_s)
    epochs = int(run.world.broadcast(min(max(1, fitting), LONGEST_SHORT_RUN)))
    run.config = run.config.replace(epochs=epochs)
    run.say(
        f"epochs:    {epochs}, at {in_words(epoch_s)} each by {len(times)} real steps, which were taken back; the time "
        f"budget is {in_words(run.wish.time_budget_s)}, and more than {LONGEST_SHORT_RUN} would only memorise"
    )


def _say_settled(run: Run) -> None:
    """What the run does in place of what was asked for; given by number, it is the same run on another day."""
    wish = run.wish.to_dict()
    settled = [f"{name}={value!r}" for name, value in run.config.to_dict().items() if value != wish[name]]
    if settled:
        run.say(f"settled:   {', '.join(settled)}; the same run again needs these numbers, not 'auto'")


def _result(folder: Path, config: TrainingConfig, state: State, stopped: str, say) -> FitResult:
    over = ", mean over sources," if config.selection == "macro" else ""
    reached = f"best dev EER{over} {100 * state.best_dev_eer:.2f} % in epoch {state.best_epoch + 1} of {config.epochs}"
    say(f"finished:  {stopped}; {reached}")
    weights = folder / "best.safetensors"
    return FitResult(
        load_model(weights=weights), pd.DataFrame(state.history), state.best_epoch + 1, state.best_dev_eer, weights,
        stopped, config,
    )  # fmt: skip


def _silent(text: str) -> None:
    pass
