"""Training: one visible loop, every automatic choice printed with its reason, nothing lost when it is stopped.

A run lives in its folder: `history.csv` (one row an epoch), `checkpoint.pt` (all that is needed to go on),
`best.safetensors` + `best.json` (the weights with the lowest dev EER) and `dev_scores.csv` (that model's dev
scores). The eval split is not an argument: selection sees train and dev only.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from deepfake_utils.conventions import BONAFIDE, SPOOF, TrainingError
from deepfake_utils.scoring.weights import load_model
from deepfake_utils.training.config import TrainingConfig
from deepfake_utils.training.interrupts import Interrupts
from deepfake_utils.training.parallel import World
from deepfake_utils.training.session import Session


@dataclass
class FitResult:
    """What a training run leaves behind."""

    model: nn.Module  # with the best weights, in evaluation mode, on the CPU
    history: pd.DataFrame  # one row an epoch
    best_epoch: int
    best_dev_eer: float  # fraction
    weights: Path
    stopped: str  # why training ended


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
        run_dir: folder of the run; an unfinished run found there is continued exactly.
        config: the recipe; None is the published AASIST recipe.
        model: start from these weights instead of fresh ones of `config.model`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        resume: False starts anew and replaces what is in `run_dir`.
        waveforms_dir: where decoded waveforms may be packed, several GB for a large corpus; runs on the same
            corpus share them. None is the folder `waveforms` beside `run_dir`.
        on_epoch: called with the history after each epoch, for instance to redraw the curves.
        say: where lines of text go.

    Returns:
        The trained countermeasure and its history.

    Raises:
        TrainingError: unusable protocols, a non-finite loss, or a checkpoint of another configuration.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.

    >>> from deepfake_utils import TrainingConfig, find_corpora, fit  # doctest: +SKIP
    >>> corpus = find_corpora("data")[0]  # doctest: +SKIP
    >>> fit(corpus.protocol("train"), corpus.protocol("dev"), "runs/first", TrainingConfig(epochs=5))  # doctest: +SKIP
    """
    config = config or TrainingConfig()
    started = time.monotonic()
    _check_protocols(train, dev)
    with World() as world, Interrupts() as interrupts:
        run = Session(
            train, dev, Path(run_dir), config, model, device, resume, world, say if world.is_main else _silent
        )
        run.started = started
        run.prepare(Path(waveforms_dir or Path(run_dir).parent / "waveforms"))
        if run.is_finished:
            run.say_end()
            return _result(run)
        try:
            _loop(run, interrupts, on_epoch)
        except KeyboardInterrupt:
            run.save_checkpoint()
            run.say(
                f"interrupted: continue with the same call, from epoch {run.state.epoch + 1}, step {run.state.step}"
            )
            raise
        return _result(run)


def take_over(earlier: str | os.PathLike, run_dir: str | os.PathLike) -> None:
    """Copy an earlier run, or several seeds of it, to where `fit` will go on with it; a run already there is kept.

    Args:
        earlier: folder of that run, such as attached output on Kaggle, which can only be read.
        run_dir: what `fit` will be given.

    Raises:
        TrainingError: `earlier` holds no checkpoint.
    """
    if any(Path(run_dir).rglob("checkpoint.pt")):
        return
    if not any(Path(earlier).rglob("checkpoint.pt")):
        raise TrainingError(
            f"{Path(earlier).absolute()} holds no checkpoint.pt to go on with: expected the folder that an earlier "
            "run wrote, 02_train of notebook 02"
        )
    pictures = shutil.ignore_patterns("figures")
    shutil.copytree(earlier, run_dir, ignore=pictures, copy_function=shutil.copyfile, dirs_exist_ok=True)


def _loop(run: Session, interrupts: Interrupts, on_epoch) -> None:
    """The training loop: step through the epoch, score dev, keep the best, write everything down."""
    config, state = run.config, run.state
    while state.epoch < config.epochs and not state.stopped:
        epoch_started = time.monotonic()
        batches = run.epoch_batches()
        bar = tqdm(total=run.steps_per_epoch, initial=state.step, desc=f"epoch {state.epoch + 1}/{config.epochs}",
                   unit="step", leave=False, disable=not run.world.is_main)  # fmt: skip
        first_step = state.step
        for batch in batches:
            with interrupts.held():  # a step is taken whole or not at all
                run.take_step(batch)
            speed = (state.step - first_step) * run.batch_size / (time.monotonic() - epoch_started)
            bar.set_postfix_str(f"loss {run.mean_loss():.4f}, {speed:.0f} utt/s, {run.time_left(speed)} left")
            bar.update()
            if run.out_of_time():
                state.stopped = "time budget used up"
                break
            run.checkpoint_if_due()
        bar.close()
        run.check_losses()
        train_s = time.monotonic() - epoch_started
        dev_eer = run.score_dev()
        row = run.epoch_row(dev_eer, train_s, batches.wait_s, (state.step - first_step) * run.batch_size)
        with interrupts.held():
            state.history = [*(old for old in state.history if old["epoch"] != row["epoch"]), row]
            if state.step >= run.steps_per_epoch:  # else time is up, and the next session goes on from here
                state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
            run.write_epoch()
            run.save_checkpoint()
        if on_epoch is not None and run.world.is_main:
            on_epoch(pd.DataFrame(state.history))
    run.finish()


def _result(run: Session) -> FitResult:
    weights = run.run_dir / "best.safetensors"
    state = run.state
    history = pd.DataFrame(state.history)
    return FitResult(
        load_model(weights=weights), history, state.best_epoch + 1, state.best_dev_eer, weights, state.stopped
    )


def _silent(text: str) -> None:
    pass


def _check_protocols(train: pd.DataFrame, dev: pd.DataFrame) -> None:
    for name, protocol in (("train", train), ("dev", dev)):
        if not len(protocol):
            raise TrainingError(f"the {name} protocol is empty")
        if (protocol["split"] == "eval").any():
            raise TrainingError(
                f"the {name} protocol contains trials of the eval split"
                ": training and selection may only see train and dev"
            )
        for label, meaning in ((BONAFIDE, "bona fide"), (SPOOF, "spoof")):
            if not (protocol["label"] == label).any():
                raise TrainingError(f"the {name} protocol has no {meaning} utterance: both classes are needed")
    shared = set(train["path"]) & set(dev["path"])
    if shared:
        raise TrainingError(
            f"{len(shared)} recordings are in train and in dev, first {min(shared)}"
            ": selection on them would be meaningless"
        )
