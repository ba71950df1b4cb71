"""Which weights are kept: those of the epoch with the lowest error on dev, and what is written down with them."""

from __future__ import annotations

import datetime
import math
import time

import numpy as np
import pandas as pd
from torch import nn

from deepfake_utils import __version__
from deepfake_utils.conventions import BONAFIDE, SPOOF, ScoreError
from deepfake_utils.evaluation.metrics import compute_eer
from deepfake_utils.evaluation.scorefile import write_scores
from deepfake_utils.machine import describe_machine
from deepfake_utils.scoring.score import SCORING_BATCH, compute_outputs, score_frame
from deepfake_utils.scoring.weights import save_weights, score_kind, scoring_model
from deepfake_utils.training.memory import fork_rng
from deepfake_utils.training.resume import clear_on_full_disk
from deepfake_utils.training.run import Run
from deepfake_utils.training.schedule import reestimate_batch_norm
from deepfake_utils.training.teachers import about_weights
from deepfake_utils.waveforms.batches import train_batches

BATCHES_FOR_AVERAGED_BATCH_NORM = 32


def macro_eer(scores: np.ndarray, labels: np.ndarray, sources: np.ndarray) -> float:
    """The mean over sources of each one's EER: a small source counts as much as a large one.

    A source that holds both labels has the EER of its own trials; one that holds a single label is held against all
    trials of the other label, whatever their source.

    Args:
        scores: (N,), higher is more bona fide.
        labels: (N,) 1 bona fide, 0 spoof.
        sources: (N,) the source of each trial.

    >>> macro_eer(np.array([2.0, 1.0, 0.0, 3.0]), np.array([1, 0, 1, 0]), np.array(["a", "a", "b", "c"]))
    0.6666666666666666
    """
    eers = []
    for source in np.unique(sources.astype(str)):
        chosen = sources.astype(str) == source
        present = np.unique(labels[chosen])
        if len(present) == 1:
            chosen |= labels != present[0]
        eers.append(compute_eer(scores[chosen], labels[chosen]).eer)
    return float(np.mean(eers))


def score_dev(run: Run) -> dict[str, float]:
    """EERs on dev of the weights that would be kept now; the best so far are written out.

    Nothing of it moves the random numbers of training, so that a run scored once more on the way is the same run.

    Returns:
        dev_eer over all trials and, where the protocol has a column `source`, dev_macro_eer (fractions).
    """
    began = time.monotonic()
    with fork_rng(run.device):
        scored = _scored_model(run)
        figures = _score(run, scored) if run.world.is_main else {}
    names = ["dev_eer", *(["dev_macro_eer"] if "source" in run.dev else [])]
    figures = {name: run.world.broadcast(figures.get(name, math.nan)) for name in names}
    selected = _selected(run, figures)
    if selected < run.state.best_dev_eer:
        run.state.best_dev_eer, run.state.best_epoch = selected, run.state.epoch
    run.pace.dev_s = time.monotonic() - began
    return figures


def _selected(run: Run, figures: dict[str, float]) -> float:
    """The figure that decides which weights are kept."""
    return figures["dev_macro_eer" if run.config.selection == "macro" else "dev_eer"]


def _score(run: Run, scored: nn.Module) -> dict[str, float]:
    config, state = run.config, run.state
    logits, _ = compute_outputs(
        scored, run.dev_source, n_samples=config.eval_samples, device=run.device, progress="dev"
    )
    if not np.isfinite(logits).all():
        bad = run.dev["utterance"].to_numpy()[~np.isfinite(logits).all(axis=1)]
        raise ScoreError(
            f"{len(bad)} dev scores are not finite after epoch {state.epoch + 1}, first {', '.join(map(str, bad[:5]))}"
        )
    scores, labels = logits[:, BONAFIDE].astype(np.float64), run.dev["label"].to_numpy()
    figures = {"dev_eer": compute_eer(scores, labels).eer}
    if "source" in run.dev:
        figures["dev_macro_eer"] = macro_eer(scores, labels, run.dev["source"].to_numpy())
    if _selected(run, figures) < state.best_dev_eer:
        _keep_best(run, scored, logits, figures)
    return figures


def _scored_model(run: Run) -> nn.Module:
    model = run.model
    if run.average is not None:
        if _swa_is_due(run):
            run.average.update_parameters(model)
        if run.average.n_averaged > 0:
            model = run.average.module
            if run.world.is_main:
                reestimate_batch_norm(model, lambda: _waveforms_for_batch_norm(run), run.device)
    return scoring_model(model, run.criterion)


def _swa_is_due(run: Run) -> bool:
    """Whether this epoch is one that SWA averages, is whole, and was not counted before an interruption."""
    if run.config.average != "swa" or run.state.step < run.steps_per_epoch:
        return False
    first = max(1, math.ceil(run.config.swa_start * run.config.epochs))
    return int(run.average.n_averaged) < run.state.epoch + 1 - first + 1


def _waveforms_for_batch_norm(run: Run):
    batches = train_batches(
        run.source, run.train["label"].to_numpy(), batch_size=run.config.batch_size,
        n_samples=run.config.crop_samples, seed=run.config.seed, epoch=0, device=run.device,
    )  # fmt: skip
    for n, batch in enumerate(batches):
        if n == BATCHES_FOR_AVERAGED_BATCH_NORM:
            break
        yield from batch.waveform.split(SCORING_BATCH)  # in float32: what fits in training may not fit


def _keep_best(run: Run, scored: nn.Module, logits: np.ndarray, figures: dict[str, float]) -> None:
    epoch = run.state.epoch + 1
    facts = {
        "training": run.config.to_dict(),
        "epoch": epoch,
        **figures,
        "trained_on": trained_on(run),
        "date": datetime.date.today().isoformat(),
        "package_version": __version__,
        "machine": describe_machine(run.device),
    }
    n_bytes = sum(tensor.nbytes for tensor in scored.state_dict().values())
    with clear_on_full_disk(run.folder / "best.safetensors", n_bytes):
        save_weights(run.folder / "best.safetensors", scored, name=run.config.model, loss=run.config.loss, facts=facts)
        frame = score_frame(run.dev["utterance"], logits)
        about = {"score": score_kind(scored), "split": "dev", "epoch": epoch}
        write_scores(run.folder / "dev_scores.csv", frame, about)


def trained_on(run: Run) -> dict:
    """What the weights have learned from: who reads their scores must know."""
    both = pd.concat([run.train, run.dev])
    names, speakers = ({str(v) for v in both[column]} if column in both else set() for column in ("corpus", "speaker"))
    about = {
        "corpora": sorted(names),
        "synthetic_demo": "demo" in names or any(speaker.startswith("DEMO_") for speaker in speakers),
        "fine_tuned": run.state.fine_tuned,
    }
    if run.config.teachers:
        about["teachers"] = about_weights(run.config.teachers, run.fingerprints["teachers"])
    if run.config.start:
        about["started_from"] = about_weights([run.config.start], run.fingerprints["start"])[0]
    for name, split in (("train", run.train), ("dev", run.dev)):
        is_spoof = split["label"] == SPOOF
        about[name] = {
            "fingerprint": run.fingerprints[name],
            "n_bonafide": int((~is_spoof).sum()),
            "n_spoof": int(is_spoof.sum()),
            "attacks": sorted(set(split.loc[is_spoof, "attack"].astype(str))) if "attack" in split else [],
        }
    return about
