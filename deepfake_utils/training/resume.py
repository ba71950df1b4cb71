"""Runs that go on where they stopped: the checkpoint, what it must agree with, and how it gets onto the disk."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError

from deepfake_utils.conventions import CheckpointError, CorpusError, TrainingError
from deepfake_utils.files import atomic_write
from deepfake_utils.machine import seed_everything
from deepfake_utils.training.config import TrainingConfig
from deepfake_utils.training.run import Run, State

CHECKPOINT = "checkpoint.pt"
BEST_FILES = ("best.safetensors", "best.json", "dev_scores.csv")
VERSION = 3  # of the checkpoint's contents
LOOKED_INTO = 16  # recordings of a split whose sound is part of its fingerprint
BYTES_LOOKED_AT = 4096  # in the middle of each: beyond headers
# Settings that may change between a run and its resumption without changing what is computed; teachers and the weights
# to start from may move, and are known by their fingerprints.
FREE_TO_CHANGE = ("time_budget_s", "checkpoint_every_s", "data_path", "patience_epochs", "teachers", "start")
OTHERS = {"teachers": "the teachers are others", "start": "the weights to start from are others"}


def end_reason(config: TrainingConfig, state: State) -> str:
    """Why training is over, or "" while it is not; patience may be raised on a run that it has stopped."""
    if state.epoch >= config.epochs:
        return "all epochs done"
    patience = config.patience_epochs
    if patience and state.epoch - 1 - state.best_epoch >= patience and state.step == 0:
        return f"no better dev EER in {patience} epochs"
    return ""


def fingerprint(protocol: pd.DataFrame) -> str:
    """Twelve hexadecimal digits of what a run sees: every row's name, label and recording, and their order.

    A recording counts by file name and size, as folders may move between sessions; of some, evenly spread over the
    rows, a block is read, which tells a corpus from its denoised or louder copy.

    Raises:
        CorpusError: a recording is not there.
    """
    columns = [c for c in ("utterance", "label", "attack", "source") if c in protocol]
    digest = hashlib.sha256()
    for path, *row in protocol[["path", *columns]].itertuples(index=False, name=None):
        try:
            size = os.path.getsize(path)
        except OSError as error:
            raise CorpusError(f"{path}: {error.strerror}; the protocol names a recording that is not there") from error
        digest.update("\0".join(map(str, (*row, os.path.basename(path), size, "\n"))).encode(errors="surrogateescape"))
    for path in protocol["path"].iloc[:: max(1, len(protocol) // LOOKED_INTO)]:
        with open(path, "rb") as file:
            file.seek(os.path.getsize(path) // 2)
            digest.update(file.read(BYTES_LOOKED_AT))
    return digest.hexdigest()[:12]


def load_checkpoint(folder: Path, wish: TrainingConfig, fingerprints: dict[str, str]) -> dict | None:
    """The checkpoint of the run in `folder`, or None where there is none.

    Args:
        wish: the configuration as it is given now.
        fingerprints: of the train and the dev protocol, of the teachers and of the weights to start from.

    Raises:
        CheckpointError: it is damaged, or of another version of this package.
        TrainingError: it belongs to another recipe or to other data.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    saved = load_training_state(path)
    if saved.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of format {saved.get('version')}, expected {VERSION}: finish that run with the version of this "
            "package that began it, or use another folder; resume=False of `fit` replaces it"
        )
    # A setting that is younger than the run had no effect on it, as its default has none.
    now, then, settled = wish.to_dict(), TrainingConfig().to_dict() | saved["wish"], saved["settled"]
    changed = [
        f"{name} was {then.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in FREE_TO_CHANGE and value not in (then.get(name), settled.get(name))
    ]
    changed += [
        OTHERS.get(name, f"the {name} recordings or labels are others")
        for name, digits in fingerprints.items()
        if saved["fingerprints"].get(name, "") != digits
    ]
    if changed:
        raise TrainingError(
            f"{path} belongs to another run ({'; '.join(changed)}): use another folder; "
            "resume=False of `fit` replaces it"
        )
    return saved


def settled_config(saved: dict, wish: TrainingConfig) -> TrainingConfig:
    """The configuration a run goes on with: what it settled on, and what `wish` may change."""
    return TrainingConfig.from_dict(saved["settled"] | {name: getattr(wish, name) for name in FREE_TO_CHANGE})


def snapshot(run: Run) -> dict:
    """All that is needed to continue exactly: tensors and plain values."""
    tensors = {
        "model": run.model.state_dict(),
        "criterion": run.criterion.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "average": run.average.state_dict() if run.average is not None else None,
        "rng_cpu": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
    }
    plain = {
        "version": VERSION,
        "wish": run.wish.to_dict(),
        "settled": run.config.to_dict(),
        "fingerprints": run.fingerprints,
        "state": dataclasses.asdict(run.state),
    }
    return tensors | plain


def restore(run: Run, saved: dict) -> None:
    """Put a run where `snapshot` found it."""
    run.model.load_state_dict(saved["model"])
    run.criterion.load_state_dict(saved["criterion"])
    run.optimizer.load_state_dict(with_own_kernels(saved["optimizer"], run.optimizer))
    if saved["scaler"]:  # empty where the run began in another precision
        run.scaler.load_state_dict(saved["scaler"])
    if run.average is not None:
        run.average.load_state_dict(saved["average"])
    if run.world.is_main:
        for name, content in saved.get("best_files", {}).items():
            _write(run.folder / name, memoryview(content.numpy()))
    torch.set_rng_state(saved["rng_cpu"])
    if run.device.type == "cuda" and saved["rng_cuda"] is not None:
        torch.cuda.set_rng_state(saved["rng_cuda"], run.device)
    run.state = State(**saved["state"])
    if run.world.size > 1:  # their parts of a batch differ in size, and so would the numbers of forward passes
        run.state.micro_batches = 1
    if run.world.rank:  # the state above is the first process's: dropout must differ
        seed_everything(run.config.seed + run.world.rank + run.state.epoch * run.world.size)


def with_own_kernels(saved: dict, optimizer: torch.optim.Optimizer) -> dict:
    """The state of an optimiser for one that may be on another device, which keeps its own choice of kernels.

    A group's `fused` would otherwise come along, and a loss scaler refuses the optimiser of a run begun on a CPU.
    """
    pairs = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    return saved | {"param_groups": [group | {"fused": own.get("fused")} for group, own in pairs]}


def remove_results(folder: Path) -> None:
    """Remove what an earlier run left, so that nothing of it can be taken for the new one's; but for its checkpoint,
    which the new one's replaces."""
    for name in (*BEST_FILES, "history.csv"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def save_checkpoint(run: Run) -> None:
    """Write the run's snapshot, if it is still the run that goes on; an error keeps the last one."""
    run.saved_at = time.monotonic()
    if run.world.is_main and not run.is_closed:
        save_training_state(run.folder / CHECKPOINT, snapshot(run))


def close_within_epoch(run: Run) -> None:
    """Write the last checkpoint of a session whose time is up, with the files that were best until now.

    The weights of this moment may then be kept in their place; the session that goes on puts them back, as it
    is to end where it would have ended without the stop.
    """
    if run.world.is_main:
        kept = [run.folder / name for name in BEST_FILES if run.state.best_epoch >= 0]
        best = {path.name: _bytes_of(path) for path in kept if path.is_file()}
        save_training_state(run.folder / CHECKPOINT, snapshot(run) | {"best_files": best})
    run.is_closed = True


def _bytes_of(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def save_training_state(path: str | os.PathLike, state: dict) -> None:
    """Write everything a run needs to continue (tensors and plain values only), atomically.

    Raises:
        TrainingError: the disk is full, or refuses.
    """
    content = io.BytesIO()
    torch.save(state, content)  # in memory: onto a full disk it fails in words of its own file format
    _write(path, content.getbuffer())


def _write(path: str | os.PathLike, content: memoryview) -> None:
    with clear_on_full_disk(path, content.nbytes), atomic_write(path) as part:
        part.write_bytes(content)


def load_training_state(path: str | os.PathLike) -> dict:
    """Read what `save_training_state` wrote.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"training checkpoint {path} cannot be read ({str(error).splitlines()[0]}): delete it to start anew"
        ) from error


@contextmanager
def clear_on_full_disk(path: str | os.PathLike, n_bytes: int) -> Iterator[None]:
    """Turn an error of writing `path` into one sentence that says what is needed and what is kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = Path(path).absolute().parent
        disk = next(f for f in (folder, *folder.parents) if os.path.ismount(f))
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"{Path(path).absolute()} cannot be written: {reason}; it needs {n_bytes:,} bytes and the disk mounted at "
            f"{disk} has {shutil.disk_usage(disk).free:,} free. What was saved before is kept: free space, and the "
            "same call goes on from it"
        ) from error


def take_over(earlier: str | os.PathLike, run_dir: str | os.PathLike) -> None:
    """Copy an earlier run, or several seeds of it, to where `fit` will go on with it; a run already there is kept.

    Args:
        earlier: folder of that run, such as attached output on Kaggle, which can only be read.
        run_dir: what `fit` will be given.

    Raises:
        TrainingError: `earlier` holds no checkpoint.
    """
    if any(Path(run_dir).rglob(CHECKPOINT)):
        return
    if not any(Path(earlier).rglob(CHECKPOINT)):
        raise TrainingError(
            f"{Path(earlier).absolute()} holds no {CHECKPOINT} to go on with: expected the folder that an earlier "
            "run wrote, 02_train of notebook 02"
        )
    pictures = shutil.ignore_patterns("figures")
    shutil.copytree(earlier, run_dir, ignore=pictures, copy_function=shutil.copyfile, dirs_exist_ok=True)
