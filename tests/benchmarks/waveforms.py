"""Batches per second of every waveform source against a plain DataLoader that decodes FLAC.

    python tests/benchmarks/waveforms.py [--device cuda] [--corpus FOLDER] [--clips 480] [--rounds 5]

The DataLoader is what training scripts of the field use: soundfile, a random crop, collate, copy to the device;
once on the main process, once with a worker per processor. Each round times one epoch of every source in turn, so
that a busy machine slows all alike; medians and ratios come from one run. The last column is the share of time a
training loop waits for data when its step takes STEP_S (a sleep in the model's place, which leaves the processors
free as a GPU does). Both leave the first batch of an epoch out, as an epoch here is short. Files are in the page
cache: a cold or remote disk is worse for whatever decodes.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ  # noqa: E402
from deepfake_utils.waveforms import ClipCache, open_source, train_batches  # noqa: E402
from deepfake_utils.waveforms.cache import CachedSource  # noqa: E402

STEP_S = 0.038  # 24 utterances a step make an ASVspoof 2019 LA epoch (25,380) of 40 s
BATCH_SIZE = 24


class DecodingDataset(torch.utils.data.Dataset):
    """One decode an item, as the field's training scripts do it."""

    def __init__(self, protocol: pd.DataFrame):
        self.paths, self.labels = protocol["path"].tolist(), protocol["label"].tolist()
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int):
        waveform, _ = soundfile.read(self.paths[row], dtype="float32")
        start = self.rng.integers(max(len(waveform) - CROP_SAMPLES, 0) + 1)
        return torch.from_numpy(np.resize(waveform[start : start + CROP_SAMPLES], CROP_SAMPLES)), self.labels[row]


def write_corpus(folder: Path, n_clips: int) -> pd.DataFrame:
    """Clips of 1 to 6 s of coloured noise in syllable-like bursts, which FLAC halves as it does speech."""
    rng = np.random.default_rng(0)
    for number in range(n_clips):
        n_samples = int(rng.uniform(1, 6) * SAMPLE_RATE_HZ)
        noise = np.convolve(rng.standard_normal(n_samples), np.hanning(8), mode="same")
        bursts = np.abs(np.sin(np.arange(n_samples) * 2 * np.pi * 3 / SAMPLE_RATE_HZ)) ** 2
        soundfile.write(folder / f"clip{number:05d}.flac", 0.05 * noise * bursts, SAMPLE_RATE_HZ, "PCM_16")
    return read_corpus(folder, n_clips)


def read_corpus(folder: Path, n_clips: int) -> pd.DataFrame:
    paths = sorted(folder.rglob("*.flac"))[:n_clips]
    columns = {"utterance": [path.stem for path in paths], "path": [str(path) for path in paths]}
    return pd.DataFrame(columns).assign(label=np.arange(len(paths)) % 2)


def epoch_of_loader(protocol: pd.DataFrame, n_workers: int, device: torch.device):
    loader = torch.utils.data.DataLoader(
        DecodingDataset(protocol),
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=n_workers,
        pin_memory=device.type == "cuda",
    )
    for waveform, label in loader:
        yield waveform.to(device, non_blocking=True), label.to(device, non_blocking=True)


def time_epoch(batches, device: torch.device, step_s: float = 0.0) -> tuple[float, float]:
    """Batches per second, and the share of time spent waiting for the next one; both after the first."""
    count, waited_s, iterator = 0, 0.0, iter(batches)
    next(iterator)
    time.sleep(step_s)
    started_s = time.perf_counter()
    while True:
        asked_s = time.perf_counter()
        if next(iterator, None) is None:
            break
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        waited_s += time.perf_counter() - asked_s
        count += 1
        time.sleep(step_s)
    total_s = time.perf_counter() - started_s
    return count / total_s, waited_s / total_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--corpus", type=Path, help="folder of 16 kHz FLAC files; default: a synthetic corpus")
    parser.add_argument("--clips", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        if options.corpus is not None:
            protocol = read_corpus(options.corpus, options.clips)
        else:
            protocol = write_corpus(Path(folder), options.clips)
        started_s = time.perf_counter()
        packed = open_source(protocol, "store", folder=Path(folder, "stores"), progress=False)
        packing_s = time.perf_counter() - started_s
        sources = {
            "files": open_source(protocol, "files"),
            "cache, all clips fit": CachedSource(protocol, ClipCache(2**33)),
            "cache, half of them fit": CachedSource(protocol, ClipCache(packed.path.stat().st_size // 2)),
            "packed store": packed,
            f"memory of {device}": open_source(protocol, "device", device=device, progress=False),
        }
        epochs = {
            "DataLoader, no workers": lambda _: epoch_of_loader(protocol, 0, device),
            f"DataLoader, {os.cpu_count()} workers": lambda _: epoch_of_loader(protocol, os.cpu_count(), device),
        }
        for name, source in sources.items():
            epochs[name] = lambda epoch, source=source: train_batches(
                source, protocol["label"], batch_size=BATCH_SIZE, seed=0, epoch=epoch, device=device
            )
        speeds = {name: [] for name in epochs}
        waits = {name: [] for name in epochs}
        for epoch in range(options.rounds + 1):
            for name, start in epochs.items():
                speed, _ = time_epoch(start(epoch), device)
                _, wait = time_epoch(start(epoch), device, STEP_S)
                if epoch:  # the first round warms caches up
                    speeds[name].append(speed)
                    waits[name].append(wait)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} processors"
    print(f"{name}, torch {torch.__version__}, batches of {BATCH_SIZE} x {CROP_SAMPLES} samples")
    print(f"{len(protocol)} clips packed in {packing_s:.1f} s ({len(protocol) / packing_s:.0f} clips/s)")
    base = statistics.median(speeds["DataLoader, no workers"])
    print(f"{'source':28} {'batches/s':>10} {'ratio':>7} {'waiting at ' + format(STEP_S * 1e3, '.0f') + ' ms':>17}")
    for name, rounds in speeds.items():
        speed = statistics.median(rounds)
        print(f"{name:28} {speed:10.1f} {speed / base:7.1f} {statistics.median(waits[name]):17.1%}")


if __name__ == "__main__":
    main()
