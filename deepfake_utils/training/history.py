"""What an epoch leaves in writing: a row of the history, a line for the reader, an event for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from deepfake_utils.files import atomic_write
from deepfake_utils.machine import in_words
from deepfake_utils.training.memory import peak_memory_bytes
from deepfake_utils.training.resume import clear_on_full_disk
from deepfake_utils.training.run import Run


def open_tensorboard(folder: Path, say: Callable[[str], None]):
    """A writer of TensorBoard events, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("curves:    in history.csv; TensorBoard is not installed, so no events are written for it")
        return None
    with clear_on_full_disk(folder / "tensorboard", 0):
        return SummaryWriter(folder / "tensorboard")


def epoch_row(run: Run, dev: dict[str, float], train_s: float, wait_s: float, n_utterances: int) -> dict:
    """One row of the history.

    Args:
        dev: figures of the dev split, from `selection.score_dev`.
        train_s: seconds of this epoch's steps, and wait_s those of them that waited for waveforms.
        n_utterances: trained on in these seconds.
    """
    return {
        "epoch": run.state.epoch + 1,
        "train_loss": run.mean_loss,
        **dev,
        "best_dev_eer": run.state.best_dev_eer,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "train_s": train_s,
        "dev_s": run.pace.dev_s,
        "utterances_per_s": n_utterances / train_s,
        "data_wait_fraction": wait_s / train_s,
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "gpu_utilisation": float(np.mean(run.gpu_busy)) if run.gpu_busy else math.nan,
        "micro_batches": run.state.micro_batches,
    }


def say_epoch(run: Run, row: dict) -> None:
    """One line for the reader."""
    figures = f"dev EER {100 * row['dev_eer']:5.2f} %"
    if "dev_macro_eer" in row:
        figures += f"  macro {100 * row['dev_macro_eer']:.2f} %"
    busy = "" if math.isnan(row["gpu_utilisation"]) else f"  GPU busy {row['gpu_utilisation']:.0%}"
    left = f"  {in_words(run.left_s)} left" if run.left_s > 0 else ""
    run.say(
        f"epoch {row['epoch']:2d}: loss {row['train_loss']:.4f}  {figures} "
        f"(best {100 * run.state.best_dev_eer:.2f} %, epoch {run.state.best_epoch + 1})  "
        f"{row['utterances_per_s']:.1f} utt/s  wait {100 * row['data_wait_fraction']:.1f} %  "
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB{busy}{left}"
    )


def write_history(run: Run, tensorboard) -> None:
    """The whole history as CSV, and its last row for TensorBoard where there is a writer."""
    if not run.world.is_main:
        return
    path, text = run.folder / "history.csv", pd.DataFrame(run.state.history).to_csv(index=False)
    with clear_on_full_disk(path, len(text)), atomic_write(path) as part:
        part.write_text(text)
    if tensorboard is not None:
        row = run.state.history[-1]
        with clear_on_full_disk(run.folder / "tensorboard", 0):
            for name, value in row.items():
                tensorboard.add_scalar(name, value, row["epoch"])
            tensorboard.flush()


def gpu_utilisation(device: torch.device) -> float:
    """Share of the last second in which the GPU ran kernels, by its driver; NaN where that cannot be asked."""
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # no nvidia-ml-py, or a driver that does not tell: its errors are of its own class
        return math.nan
