"""Every artefact by size, time and error: the targets, and published AASIST and AASIST-L in the same forms.

    python tests/benchmarks/artefacts.py --data CORPUS --per-family 20 --picture artefacts.png
    python tests/benchmarks/artefacts.py --data CORPUS --weights phone tiny aasist=AASIST.pth

CORPUS is the open corpus. Errors are of its eval split, at most `--per-family` recordings of each family of each
source, their first 64,600 samples; intervals are by source. Times are processor time of a window on one core, median
of 40, so that other programs count little. What is no target (weights in PyTorch) is shown in PyTorch, and as ONNX in
float32, float16 and INT8; INT8 keeps no layer float but those that `quantise` does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils import find_corpora
from deepfake_utils.commands import in_columns
from deepfake_utils.report.tables import artefact_table
from deepfake_utils.scoring.onnx import OnnxScorer, export_onnx
from deepfake_utils.scoring.quantise import compact, half_weights, log_odds, quantise
from deepfake_utils.scoring.targets import error_rate, few_a_family, milliseconds, processor, read_card, windows_of
from deepfake_utils.scoring.weights import load_model, weights_file


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    corpus = find_corpora(options.data)[0]
    trials = few_a_family(corpus.protocol("eval"), options.per_family)
    waveforms = windows_of(trials)
    train = few_a_family(corpus.protocol("train"), 1).sample(frac=1, random_state=0)
    ranges = windows_of(train[: options.ranges])
    table = pd.read_csv(options.table) if options.table and options.table.is_file() else pd.DataFrame()
    with tempfile.TemporaryDirectory() as folder:
        for given in options.weights:
            name, _, file = given.partition("=")
            if len(table) and name in set(table["family"]):
                continue
            for row in forms(name, file or name, ranges, waveforms, trials, Path(folder)):
                print(f"{row['name']}: {row['ms']:.1f} ms, EER {100 * row['eer']:.2f} %", flush=True)
                table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
            if options.table:
                table.to_csv(options.table, index=False)
    table = table.set_index("name")
    print(f"\n{processor()}, {len(trials)} trials\n\n{in_columns(artefact_table(table))}")
    if options.picture:
        from deepfake_utils.report import plots

        plots.artefact_costs(table).savefig(options.picture)


def forms(name: str, file: str, ranges: np.ndarray, waveforms: np.ndarray, trials: pd.DataFrame, folder: Path):
    """A row for each form in which weights can run: name, family, numbers, bytes, ms, eer, low, high, lost."""
    path = weights_file(file)
    if path.suffix == ".onnx":
        card = read_card(name)
        row = measured(f"{name} (ONNX)", name, card["numbers"], path, waveforms, trials)
        yield row | {"lost": card["eer_lost"]["eval"]["value"]}
        return
    model = load_model(weights=path)
    exported = export_onnx(model, folder / "exported.onnx")
    made = {
        "float32": compact(exported, folder / "float32.onnx"),
        "float16": half_weights(exported, folder / "float16.onnx"),
        "int8": quantise(exported, folder / "int8.onnx", ranges),
    }
    rows = {numbers: measured("", name, numbers, file, waveforms, trials) for numbers, file in made.items()}
    yield rows["float32"] | {"name": f"{name} (PyTorch)", "bytes": path.stat().st_size, "ms": milliseconds(model)}
    for numbers, row in rows.items():
        yield row | {"name": f"{name} ({numbers})", "lost": row["eer"] - rows["float32"]["eer"]}


def measured(name: str, family: str, numbers: str, path: Path, waveforms: np.ndarray, trials: pd.DataFrame) -> dict:
    found = error_rate(log_odds(path, waveforms), trials)
    row = {"name": name, "family": family, "numbers": numbers, "bytes": path.stat().st_size}
    row |= {"ms": milliseconds(OnnxScorer(path)), "eer": found["value"], "lost": np.nan}
    return row | {"low": found["low"], "high": found["high"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the open corpus")
    parser.add_argument("--weights", nargs="+", default=["server", "laptop", "phone", "tiny", "aasist", "aasist-l"],
                        help="targets, published names, or NAME=FILE")  # fmt: skip
    parser.add_argument("--per-family", type=int, default=20)
    parser.add_argument("--ranges", type=int, default=32, help="windows of train that give INT8 its ranges")
    parser.add_argument("--table", type=Path, help="CSV of the rows; weights that are in it are not measured again")
    parser.add_argument("--picture", type=Path, help="PNG of error against time and size")
    return parser.parse_args()


if __name__ == "__main__":
    main()
