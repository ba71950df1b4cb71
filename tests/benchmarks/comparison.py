"""Models and settings side by side on the open corpus's dev split: the same number of draws for each, several seeds.

    python tests/benchmarks/comparison.py --data FOLDER --out runs/comparison --seeds 1 2 3
    python tests/benchmarks/comparison.py --out runs/comparison --table

FOLDER is what `deepfake-utils collect` filled. Every run is one epoch over `--share` of the training recordings, chosen
by a hash of their names, by `deepfake-utils train --recipe open` with what the row changes; its command is printed.
What the last epoch leaves is judged, so that no run chooses by dev. Runs that are in OUT/comparison.csv are not run
again, one that was stopped goes on, and `--rows` takes some of ROWS only. A row of `--table` is the mean over its
seeds, with the lowest and the highest; the interval is that of the pooled EER of the seed in the middle, over sources.
Milliseconds are processor time of a window of 4.04 s on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from open_speech import chosen, describe

from deepfake_utils.commands import in_columns
from deepfake_utils.corpora import find_corpora
from deepfake_utils.files import atomic_write
from deepfake_utils.scoring.score import score_protocol
from deepfake_utils.scoring.targets import milliseconds
from deepfake_utils.scoring.weights import load_model
from deepfake_utils.waveforms import open_source

SLOWER = {"learning_rate": 5e-4}  # for networks that begin with a waveform: theirs diverge at the recipe's rate
NO_CODECS = dict.fromkeys(("mp3", "opus", "aac", "amr", "companding"))
# name -> (settings beside the recipe's, augmentation beside the recipe's, whether synthesised recordings are in)
ROWS: dict[str, tuple[dict, dict, bool]] = {
    "spectrogram-resnet": ({}, {}, True),
    "lfcc-lcnn": ({"model": "lfcc-lcnn", "model_options": {}}, {}, True),
    "lfcc-lcnn, levelled": ({"model": "lfcc-lcnn", "model_options": {"front_end": "lfcc-levelled"}}, {}, True),
    "without the synthesised part": ({}, {}, False),
    "noise of random colour, none recorded": ({}, {"noise": {"probability": 0.5, "snr_db": [5.0, 40.0]}}, True),
    "without RawBoost": ({}, {"rawboost-5": None}, True),
    "RawBoost on half of the clips": ({}, {"rawboost-5": {"probability": 0.5}}, True),
    "without codecs and companding": ({}, NO_CODECS, True),
    "without any augmentation": ({"augmentation": "none", "augmentation_rise": 0.0}, {}, True),
    "labels balanced over all sources": ({"sampling": "balanced"}, {}, True),
    "one-class softmax": ({"loss": "oc_softmax"}, {}, True),
    "sharpness-aware (SAM, radius 0.05)": ({"sam_rho": 0.05}, {}, True),
    "rawnet2": ({"model": "rawnet2", "model_options": {}} | SLOWER, {}, True),
    "lfcc-resnet18": ({"model": "lfcc-resnet18", "model_options": {}}, {}, True),
    "aasist-l": ({"model": "aasist-l", "model_options": {}} | SLOWER, {}, True),
}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    results = options.out / "comparison.csv"
    table = pd.read_csv(results) if results.is_file() else pd.DataFrame(columns=["row", "seed"])
    if options.table:
        print(in_columns(summary(table)))
        return
    for seed in options.seeds:
        for name in options.rows or ROWS:
            if ((table["row"] == name) & (table["seed"] == seed)).any():
                continue
            table = pd.concat([table, pd.DataFrame([run(options, name, seed)])], ignore_index=True)
            with atomic_write(results) as part:
                table.to_csv(part, index=False)
            print(in_columns(summary(table)), flush=True)


def run(options: argparse.Namespace, name: str, seed: int) -> dict:
    """Train and judge one row of ROWS."""
    settings, augmentation, synthesised = ROWS[name]
    data = part_of(options.data, options.out, options.share, synthesised)
    noise = {"probability": 0.5, "snr_db": [5.0, 40.0], "recordings": str(options.data / "noise" / "train")}
    settings = {"epochs": 1, "seed": seed, "selection": "eer", "ema_decay": 0.98} | settings
    if settings.get("augmentation") != "none":
        settings["augmentation_options"] = {"noise": noise} | augmentation
    folder = options.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    arguments = [
        f"--set={key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
    ]
    command = ["-m", "deepfake_utils", "train", str(folder), "--data", str(data), "--recipe", "open", *arguments]
    print(f"\n{name}, seed {seed}: python {shlex.join(command)}", flush=True)
    if (folder / "config.json").is_file():  # it was stopped
        command = command[:4]
    start = time.perf_counter()
    subprocess.run([sys.executable, *command, "--device", "cpu"], check=True)
    model = load_model(weights=folder / "best.safetensors").eval()
    trials = chosen(find_corpora(options.data)[0].protocol("dev"), options.per_family)
    scores = score_protocol(model, trials, source=open_source(trials, kind="cache"), progress=None)["score"].to_numpy()
    found = describe(scores, trials)
    return {
        "row": name, "seed": seed, "macro": found["macro"], "pooled": found["pooled"], "low": found["interval"][0],
        "high": found["interval"][1], "parameters": sum(p.numel() for p in model.parameters()),
        "ms": milliseconds(torch.inference_mode()(model)), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def part_of(data: Path, out: Path, share: float, synthesised: bool) -> Path:
    """A folder with a manifest of `share` of the training recordings and all others, and a link to the sound."""
    folder = out / ("data" if synthesised else "data-without-synthesised")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "audio").exists():
        (folder / "audio").symlink_to((data / "audio").resolve(), target_is_directory=True)
    manifest = pd.read_csv(data / "manifest.csv", dtype=str, keep_default_na=False)
    place = manifest["path"].map(lambda path: int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) / 2**32)
    kept = (manifest["split"] != "train") | (place < share)
    if not synthesised:
        kept &= ~manifest["source"].str.startswith("synthesised/")
    with atomic_write(folder / "manifest.csv") as part:
        manifest[kept].to_csv(part, index=False)
    return folder


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One line a row of ROWS, in percent."""
    lines = []
    for name, runs in table.groupby("row", sort=False):
        middle = runs.sort_values("pooled").iloc[(len(runs) - 1) // 2]
        line = {"row": name, "parameters": f"{int(runs['parameters'].iloc[0]):,}", "ms": f"{runs['ms'].median():.1f}"}
        for what in ("macro", "pooled"):
            percent = 100 * runs[what]
            line[f"{what} %"] = f"{percent.mean():.1f} ({percent.min():.1f} to {percent.max():.1f})"
        interval = f"{100 * middle['low']:.1f} to {100 * middle['high']:.1f}"
        lines.append(line | {"95 % of the middle": interval, "seeds": len(runs)})
    return pd.DataFrame(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--per-family", type=int, default=40)
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    if not options.table and options.data is None:
        parser.error("--data is missing: the folder of the open corpus")
    return options


if __name__ == "__main__":
    main()
