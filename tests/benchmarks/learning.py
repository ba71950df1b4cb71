"""AASIST-L learning from scratch, here and in its authors' code: what a small corpus lets either of them reach.

    git clone https://github.com/clovaai/aasist
    python tests/benchmarks/learning.py --reference aasist --data FOLDER     # 17 min a seed on two cores

Both start from the same weights, drawn by the authors' code, and see the same batches through this project's loop, the
`short` recipe with 12 epochs of batches of 4. Dropout is drawn in another order, so the two runs of a seed are two
draws of one experiment, not two copies: compare them as such.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils import find_corpora, fit
from deepfake_utils.models import MODELS, PUBLISHED_NAMES, build_model
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.training.config import RECIPES

NAME = "aasist-l"
CONFIG = RECIPES["short"].replace(epochs=12, batch_size=4)


@dataclasses.dataclass(frozen=True)
class PublishedConfig:
    """Where the authors' code lies."""

    reference: str


class Published(nn.Module):
    """The authors' AASIST-L behind this project's interface."""

    def __init__(self, config: PublishedConfig):
        super().__init__()
        self.config, self.min_samples = config, build_model(NAME).min_samples
        settings = json.loads((Path(config.reference) / "config" / "AASIST-L.conf").read_text())["model_config"]
        self.theirs = importlib.import_module("models.AASIST").Model(settings)

    def forward(self, waveform: Tensor) -> CMOutput:
        """(B, T) to logits and embedding."""
        embedding, logits = self.theirs(waveform)
        return CMOutput(logits, embedding)


def twins(seed: int) -> dict[str, nn.Module]:
    """The two codes with the same fresh weights."""
    torch.manual_seed(seed)
    published, ours = build_model("published"), build_model(NAME)
    ours.load_state_dict(PUBLISHED_NAMES[NAME](published.theirs.state_dict()))
    return {"published": published, NAME: ours}


def main() -> None:
    """Train both for every seed and print what they reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="checkout of github.com/clovaai/aasist")
    parser.add_argument("--data", help="folder with a corpus")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    if not (options.reference and options.data):  # `make bench` has neither
        print("Nothing measured: this needs --reference and --data.")
        return
    sys.path.insert(0, options.reference)
    MODELS["published"] = (Published, PublishedConfig(options.reference))
    corpus = find_corpora(options.data)[0]
    train, dev = corpus.protocol("train"), corpus.protocol("dev")
    print(f"{len(train)} utterances to learn from, {len(dev)} to judge by")
    for seed in options.seeds:
        for name, model in twins(seed).items():
            with tempfile.TemporaryDirectory() as folder:
                config = CONFIG.replace(model=name, seed=seed)
                history = fit(train, dev, Path(folder) / "run", config, model=model, say=lambda _: None).history
            eer, loss = 100 * history["dev_eer"].to_numpy(), history["train_loss"].to_numpy()
            print(
                f"seed {seed}  {name:<10} dev EER best {eer.min():4.1f} %, last three {np.mean(eer[-3:]):4.1f} %;"
                f" loss {loss[0]:.3f} to {loss[-1]:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
