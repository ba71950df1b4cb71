"""Runs described by a folder, so that they can be started in other processes: several seeds, one GPU each, or torchrun.

A job folder holds `train.csv` and `dev.csv` (the protocols) and `config.json` (the training settings, and where
waveforms are packed); training writes beside them.
`python -m deepfake_utils train FOLDER` runs it, and running it again goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

from deepfake_utils.conventions import ConfigError, TrainingError
from deepfake_utils.files import atomic_write
from deepfake_utils.training.config import TrainingConfig
from deepfake_utils.training.loop import FitResult, fit
from deepfake_utils.training.resume import CHECKPOINT, load_training_state

PROTOCOLS = ("train", "dev")
TEXT_COLUMNS = ("utterance", "path", "attack", "speaker", "split", "corpus", "source")


def write_job(
    folder: str | os.PathLike,
    train: pd.DataFrame,
    dev: pd.DataFrame,
    config: TrainingConfig,
    waveforms_dir: str | os.PathLike | None = None,
) -> Path:
    """Describe a run in `folder`; nothing is started. waveforms_dir: see `fit`."""
    folder = Path(folder)
    place = {} if waveforms_dir is None else {"waveforms_dir": str(Path(waveforms_dir).absolute())}
    for name, protocol in zip(PROTOCOLS, (train, dev), strict=True):
        with atomic_write(folder / f"{name}.csv") as part:
            protocol.to_csv(part, index=False, errors="surrogateescape")  # names are bytes
    with atomic_write(folder / "config.json") as part:
        part.write_text(json.dumps(config.to_dict() | place, indent=2) + "\n")
    return folder


def run_job(folder: str | os.PathLike, device: str = "auto", say: Callable[[str], None] = print) -> FitResult:
    """Train what `write_job` described, or go on with it.

    Raises:
        TrainingError: the folder holds no job.
    """
    folder = Path(folder)
    missing = [n for n in ("train.csv", "dev.csv", "config.json") if not (folder / n).is_file()]
    if missing:
        raise TrainingError(
            f"{folder} is not a training job: {', '.join(missing)} missing; give --data to describe one"
        )
    settings = json.loads((folder / "config.json").read_text())
    waveforms_dir = settings.pop("waveforms_dir", None)
    config = TrainingConfig.from_dict(settings)
    train, dev = map(_read_protocol, (folder / f"{name}.csv" for name in PROTOCOLS))
    return fit(train, dev, folder, config, device=device, waveforms_dir=waveforms_dir, say=say)


def _read_protocol(path: Path) -> pd.DataFrame:
    text = dict.fromkeys(TEXT_COLUMNS, str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, encoding_errors="surrogateescape")


def fit_seeds(
    train: pd.DataFrame,
    dev: pd.DataFrame,
    run_dir: str | os.PathLike,
    config: TrainingConfig,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    device: str = "auto",
    waveforms_dir: str | os.PathLike | None = None,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Train the same recipe from several seeds: one process per GPU, or one after another.

    Two GPUs are best used this way: no gradients to exchange, and the spread that any single figure hides. Where
    epochs or batch_size are "auto", the numbers that the first run settles on are those of all.

    Args:
        run_dir: each seed gets the folder `seed_N` in it, with a `log.txt`.
        seeds: whole numbers.
        device: "auto" uses every GPU; "cpu" runs one after another.
        waveforms_dir: where decoded waveforms may be packed, see `fit`; None is the folder `waveforms` in run_dir.

    Returns:
        seed, dev_eer (fraction), best_epoch, weights: one row a seed.

    Raises:
        TrainingError: a run failed; the end of its log is in the text.
    """
    folders = {seed: Path(run_dir) / f"seed_{seed}" for seed in seeds}
    slots = _gpus(device) or [""]
    say(f"{len(folders)} seeds, {f'{len(slots)} at a time, one per GPU' if len(slots) > 1 else 'one after another'}")
    waiting, running = list(folders.items()), {}
    try:
        while waiting or running:
            for slot in [s for s in slots if s not in running][: len(waiting)]:
                if len(waiting) < len(folders):  # all seeds run what the first one settles on
                    config = _settled(next(iter(folders.values())), config)
                    if "auto" in (config.epochs, config.batch_size):
                        break
                seed, folder = waiting.pop(0)
                write_job(folder, train, dev, config.replace(seed=seed), waveforms_dir)
                running[slot] = (seed, folder, _start(folder, slot, device))
            time.sleep(0.2)
            for slot, (seed, folder, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    say(_report(seed, folder, process.returncode))
    finally:
        for _, _, process in running.values():
            process.terminate()
        for _, _, process in running.values():
            process.wait()
    return pd.DataFrame([_summary(seed, folder) for seed, folder in folders.items()])


def _settled(folder: Path, config: TrainingConfig) -> TrainingConfig:
    """The configuration by number that the run in `folder` has settled on, once it has."""
    if "auto" in (config.epochs, config.batch_size) and (folder / CHECKPOINT).is_file():
        return TrainingConfig.from_dict(load_training_state(folder / CHECKPOINT)["settled"])
    return config


def _gpus(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that `device` allows."""
    if device == "cpu":
        return []
    n_gpus = torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = visible[:n_gpus] or [str(index) for index in range(n_gpus)]
    _, colon, index = device.partition(":")
    if not colon:
        return names
    if not index.isdecimal() or int(index) >= len(names):
        raise ConfigError(f"device {device!r} was asked for, but there are {len(names)} GPUs, from cuda:0")
    return [names[int(index)]]


def _start(folder: Path, gpu: str, device: str) -> subprocess.Popen:
    repository = Path(__file__).resolve().parents[2]  # where the package lies, installed or not
    paths = [str(repository), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
        device = "cuda" if device != "auto" else device  # it sees this one only
    command = [sys.executable, "-m", "deepfake_utils", "train", str(folder), "--device", device]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _report(seed: int, folder: Path, returncode: int) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n").strip().splitlines()
    if returncode != 0:
        tail = "\n".join(lines[-5:])
        raise TrainingError(f"seed {seed} failed with exit code {returncode}; the end of {folder / 'log.txt'}:\n{tail}")
    return f"seed {seed}: {lines[-1] if lines else 'done'}"


def _summary(seed: int, folder: Path) -> dict:
    facts = json.loads((folder / "best.json").read_text())
    return {
        "seed": seed,
        "dev_eer": facts["dev_eer"],
        "best_epoch": facts["epoch"],
        "weights": str(folder / "best.safetensors"),
    }
