"""A base, notebooks of a few lines and feedback, so that a whole retraining takes seconds and not minutes."""

import hashlib
import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd

from deepfake_utils.corpora import Corpus
from deepfake_utils.serving.records import Records
from deepfake_utils.training.config import RECIPES
from deepfake_utils.training.loop import fit
from tests.conftest import REPOSITORY

SETTINGS = {"model": "lfcc-lcnn", "epochs": 1, "batch_size": 8, "crop_samples": 16_000, "eval_samples": 16_000}
# With a few dozen trials nothing is sure: what is allowed here is the path, not a policy.
EASY_RULES = {
    "largest_loss": 1, "largest_loss_of_attack": 1, "fewest_held_out": 0, "largest_loss_held_out": 1, "n_bootstrap": 50,
}  # fmt: skip
PARAMETERS = """
data: str = ""  # corpus
run_dir: str = ""  # results
preset: str = ""  # recipe
model: str = ""  # architecture
loss: str = ""  # loss
augmentation: str = ""  # recipe
epochs: int = 0  # passes
batch_size: int = 0  # utterances
crop_s: float = 0.0  # seconds
seed: int = 0  # seed
time_budget_s: float = 0.0  # seconds
"""
TRAIN = """
import json
from pathlib import Path
from deepfake_utils.corpora import divide, find_corpora
from deepfake_utils.training.config import RECIPES
from deepfake_utils.training.loop import fit

corpus = find_corpora(data)[0]
(train, dev, _), _ = divide(corpus, seed)
config = RECIPES["short"].replace(model=model, epochs=epochs, batch_size=batch_size, seed=seed,
                                  crop_samples=round(16_000 * crop_s), eval_samples=16_000)
folder = Path(run_dir) / "02_train"
fit(train, dev, folder, config, waveforms_dir=Path(run_dir) / "waveforms")
facts = {"name": corpus.name, "kind": corpus.kind, "root": str(corpus.root), "fingerprint": corpus.fingerprint()}
(folder / "result.json").write_text(json.dumps({"corpus": facts, "metrics": {}, "config": config.to_dict()}))
"""
ANALYSE = """
from pathlib import Path

folder = Path(run_dir) / "03_error_analysis"
folder.mkdir()
(folder / "result.json").write_text("{}")
"""


def write_notebooks(folder: Path) -> Path:
    """The runner with a notebook 02 that only trains and a notebook 03 that only says that it ran."""
    folder.mkdir(parents=True)
    shutil.copy(REPOSITORY / "notebooks" / "run.py", folder)
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    for name, source in {"02_train": TRAIN, "03_error_analysis": ANALYSE}.items():
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        first = nbformat.v4.new_code_cell(PARAMETERS.strip(), metadata={"tags": ["parameters"]})
        notebook.cells = [first, nbformat.v4.new_code_cell(source.strip())]
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder


def train_base(folder: Path, corpus: Corpus, **settings) -> Path:
    """A run as notebook 02 leaves it."""
    config = RECIPES["short"].replace(**(SETTINGS | {"seed": 0} | settings))
    place = folder / "02_train"
    fit(corpus.protocol("train"), corpus.protocol("dev"), place, config, waveforms_dir=folder / "waveforms",
        say=lambda _: None)  # fmt: skip
    facts = {"name": corpus.name, "kind": corpus.kind, "root": str(corpus.root), "fingerprint": corpus.fingerprint()}
    (place / "result.json").write_text(json.dumps({"corpus": facts, "metrics": {}, "config": config.to_dict()}))
    return folder


def write_rules(path: Path, rules: dict, **changes) -> Path:
    """A rules file with some of the rules changed, by name."""
    lines = []
    for part, values in rules.items():
        lines.append(f"[{part}]")
        lines += [f"{name} = {changes.get(name, value)}" for name, value in values.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def give_feedback(records: Records, folder: Path, trials: pd.DataFrame, client: str, *, flipped: bool = False) -> None:
    """What a client did who sent these recordings, had them kept, and said of each what it was, or the opposite."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in trials.itertuples():
        sha256 = hashlib.sha256(Path(row.path).read_bytes()).hexdigest()
        kept = shutil.copy(row.path, folder / sha256)
        verdict = records.add_verdict(
            client=client, sha256=sha256, score=0.0, verdict="uncertain", model="base", calibration="c", seconds=2.0,
            speech_seconds=1.0, level_db=-20.0, bandwidth_hz=7000.0, kept_path=str(kept),
        )  # fmt: skip
        truth = "bonafide" if bool(row.label) != flipped else "spoof"
        records.add_feedback(verdict, client=client, truth=truth, confirmed=True)
