# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which model should I use?

# %% tags=["bootstrap"]
# The package is beside this notebook, in the repository, or in an attached Kaggle dataset (folder or wheel).
import importlib.util
import os
import sys
from itertools import chain
from pathlib import Path

attached = Path(os.environ.get("DEEPFAKE_KAGGLE_INPUT", "/kaggle/input"))
names = ("deepfake_utils/__init__.py", "deepfake_utils-*.whl")
searches = [here.glob(names[0]) for here in (Path.cwd(), Path.cwd().parent)]
searches += [attached.glob("*/" * depth + name) for depth in range(5) for name in names]
if found := next(chain.from_iterable(searches), None):
    sys.path.insert(0, str(found if found.suffix == ".whl" else found.parents[1]))
elif not importlib.util.find_spec("deepfake_utils"):
    looked = f"{Path.cwd()}, {Path.cwd().parent} and {attached} (4 folders deep)"
    raise ModuleNotFoundError(f"deepfake_utils is not in {looked}. On Kaggle: Add Input > deepfake-utils.")

# %% tags=["parameters"]
data: str = ""  # folder with a corpus, or "demo"; empty: search the usual places, then the demo
run_dir: str = ""  # folder for results; empty: runs/latest here
demo_scale: float = 1.0  # size of the demo corpus, fraction of the full one
seed: int = 0  # seed of every random draw

# %%
from deepfake_utils.conventions import CorpusError, atomic_write
from deepfake_utils.corpora import build_demo, find_corpora

run_folder = Path(run_dir or "runs/latest").resolve()
results = run_folder / "01_model_research"
try:
    corpus = None if data == "demo" else find_corpora(*([data] if data else []))[0]
except CorpusError as nothing_found:
    if data:
        raise
    print(nothing_found, "\n\nGoing on with the built-in demo corpus.")
    corpus = None
corpus = corpus or build_demo(run_folder.parent / "demo", scale=demo_scale)
print(corpus)

# %%
metrics = {}

# %%
import json

from deepfake_utils.runtime import describe_machine, pick_device

result = {
    "notebook": "01_model_research",
    "corpus": {"name": corpus.name, "kind": corpus.kind, "fingerprint": corpus.fingerprint()},
    "metrics": metrics,
    "config": {"seed": seed},
    "machine": describe_machine(pick_device().device),
}
with atomic_write(results / "result.json") as part:
    part.write_text(json.dumps(result, indent=2))
