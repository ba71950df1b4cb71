"""Training speed end to end: what a step costs, what the loop and the data path add to it, what a run will take.

    python tests/benchmarks/training.py                                   # the demo corpus, this machine
    python tests/benchmarks/training.py --data FOLDER --models aasist aasist-l rawnet2 --paths store device
    python tests/benchmarks/training.py --lengths 64600 --batch 24        # the published sizes

For every model, precision and data path some epochs are trained through `fit`. The bare step (forward, loss, backward,
optimiser on a batch already in place) is timed before and after each epoch, in the same process, so that both meet
the same machine. "loop adds" compares an epoch with the bare steps around it: the median over the epochs, and the
lowest and the highest. "LA epoch" is 25,380 utterances at this speed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils.corpora import find_corpora
from deepfake_utils.demo import build_demo
from deepfake_utils.machine import in_words, pick_device, pick_precision
from deepfake_utils.models import build_model
from deepfake_utils.models.losses import WeightedCrossEntropy
from deepfake_utils.training.config import TrainingConfig
from deepfake_utils.training.loop import fit
from deepfake_utils.training.memory import step_bytes
from deepfake_utils.training.schedule import build_optimizer

LA_TRAIN_UTTERANCES = 25_380
LA_EPOCHS = 100


def bare_step(config: TrainingConfig, device: torch.device, n_steps: int) -> float:
    """Seconds a step of the same size takes with its batch already in place: the median of n_steps."""
    precision = pick_precision(device, config.precision)
    model = build_model(config.model, generator=torch.Generator().manual_seed(0)).to(device)
    criterion = WeightedCrossEntropy().to(device)
    optimizer = build_optimizer(model, criterion, config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.needs_scaler)
    waveform = 0.1 * torch.randn(config.batch_size, config.crop_samples, device=device)
    target = (torch.arange(config.batch_size, device=device) % 2).float()
    times = []
    for step in range(n_steps + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast(device):
            output = model(waveform)
        loss = criterion(output.logits.float(), output.embedding.float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()
        if step:  # the first allocates
            times.append(time.perf_counter() - started)
    return float(np.median(times))


def measure(train, dev, config: TrainingConfig, device: torch.device, n_bare: int) -> dict:
    """One line of the table: epochs through the loop, with bare steps before, between and after them."""
    bare = [bare_step(config, device, n_bare)]
    with tempfile.TemporaryDirectory() as folder:

        def after_epoch(history: pd.DataFrame) -> None:
            bare.append(bare_step(config, device, n_bare))

        result = fit(train, dev, folder, config, device=str(device), on_epoch=after_epoch, say=lambda text: None)
    steps = len(train) // config.batch_size
    history = result.history.iloc[1:]  # the first epoch fills caches
    loop, around = history["train_s"].to_numpy() / steps, (np.array(bare[1:-1]) + np.array(bare[2:])) / 2
    added = 100 * (loop / around - 1)
    step_s = float(np.median(loop))
    rate = config.batch_size / step_s
    precision = pick_precision(device, config.precision)
    saved = step_bytes(build_model(config.model), config, 2, device, precision) / 2
    return {
        "model": config.model,
        "precision": precision.name,
        "path": config.data_path,
        "utt/s": rate,
        "step ms": 1000 * step_s,
        "bare ms": 1000 * float(np.median(bare)),
        "loop adds %": f"{np.median(added):.1f} ({added.min():.1f} to {added.max():.1f})",
        "data wait %": 100 * history["data_wait_fraction"].median(),
        "peak GiB": history["peak_memory_bytes"].max() / 2**30,
        "step MiB/utt": saved / 2**20,
        "LA epoch": in_words(LA_TRAIN_UTTERANCES / rate),
        "LA run": in_words(LA_EPOCHS * LA_TRAIN_UTTERANCES / rate),
    }


def main() -> None:
    """Measure every combination asked for and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with a corpus; default: the demo")
    parser.add_argument("--models", nargs="+", default=["aasist", "aasist-l"])
    parser.add_argument("--paths", nargs="+", default=["files", "cache", "store"])
    parser.add_argument("--precisions", nargs="+", default=["auto"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[64_600], help="crop, samples")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--utterances", type=int, default=64, help="of the training split, an epoch")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    chosen = pick_device(options.device)
    print(f"{chosen.reason}; torch {torch.__version__}")
    corpus = find_corpora(options.data)[0] if options.data else build_demo(Path("runs/demo"))
    train = corpus.protocol("train").groupby("label").head(options.utterances // 2).reset_index(drop=True)
    dev = corpus.protocol("dev").groupby("label").head(4).reset_index(drop=True)
    rows = []
    for model in options.models:
        for length in options.lengths:
            for precision in options.precisions:
                for path in options.paths:
                    config = TrainingConfig(
                        model=model, epochs=options.epochs, batch_size=options.batch, crop_samples=length,
                        precision=precision, data_path=path,
                    )  # fmt: skip
                    rows.append({"samples": length} | measure(train, dev, config, chosen.device, 3))
                    print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.2f"), flush=True)
    print("\n" + pd.DataFrame(rows).to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
