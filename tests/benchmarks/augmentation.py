"""What each augmentation recipe does to the error on attacks that training never saw: several seeds, mean and spread.

    python tests/benchmarks/augmentation.py                       # the demo corpus, LFCC-LCNN, three seeds
    python tests/benchmarks/augmentation.py --data FOLDER --model aasist-l --epochs 20

Everything but the recipe is the same: the `short` settings, the same initial weights and order for a seed. The
numbers of the demo corpus say nothing about speech; the same command on a real corpus does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils import evaluate, find_corpora, fit, score_protocol
from deepfake_utils.augment import RECIPES as AUGMENTATIONS
from deepfake_utils.demo import build_demo
from deepfake_utils.evaluation.intervals import several_seeds
from deepfake_utils.training.config import RECIPES


def eers(corpus, config) -> tuple[float, float]:
    """Dev and eval EER of one run."""
    train, dev, trials = (corpus.protocol(split) for split in ("train", "dev", "eval"))
    with tempfile.TemporaryDirectory() as folder:
        result = fit(train, dev, folder, config, say=lambda text: None)
    scores = score_protocol(result.model, trials, progress=None)
    return result.best_dev_eer, evaluate(scores, trials, n_bootstrap=0)["eer"]


def main() -> None:
    """Train every recipe with every seed and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with a corpus; default: the demo")
    parser.add_argument("--model", default="lfcc-lcnn")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--crop", type=int, default=16_000, help="samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    corpus = find_corpora(options.data)[0] if options.data else build_demo(Path("runs/demo"))
    rows = []
    for name in AUGMENTATIONS:
        measured = []
        for seed in options.seeds:
            config = RECIPES["short"].replace(
                model=options.model, epochs=options.epochs, crop_samples=options.crop, augmentation=name, seed=seed
            )
            measured.append(eers(corpus, config))
            print(
                f"{name}, seed {seed}: dev {100 * measured[-1][0]:.1f} %, eval {100 * measured[-1][1]:.1f} %",
                flush=True,
            )
        dev, unseen = (several_seeds(values) for values in zip(*measured, strict=True))
        rows.append({
            "recipe": name,
            "dev EER % (seen attacks)": f"{100 * dev.mean:.1f} ± {100 * dev.sd:.1f}",
            "eval EER % (unseen attacks)": f"{100 * unseen.mean:.1f} ± {100 * unseen.sd:.1f}",
            "eval EER % by seed": ", ".join(f"{100 * value:.1f}" for value in unseen.values),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    print("\n| " + " | ".join(table.columns) + " |\n|" + "---|" * table.shape[1])
    for row in table.itertuples(index=False):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
