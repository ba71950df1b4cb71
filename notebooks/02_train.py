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
# # Train a countermeasure on the machine you were given
#
# A *countermeasure* tells recorded human speech (**bona fide**) from speech made or altered by a machine (**spoof**).
# This notebook trains one from raw waveforms and reports an error you can repeat to others.
#
# **What you'll do**: look at the corpus, choose a recipe that fits the time you have, train with every automatic choice
# printed, and score the evaluation split once, at the end.
#
# **What you'll learn**: why a development error near zero says little, and what to report instead.
#
# **What you'll need**: any GPU, or two CPU cores and patience. Without a corpus, a synthetic demo is built.

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
model: str = ""  # name of the architecture, see notebook 01; empty: what the preset says
preset: str = "auto"  # "paper" (AASIST's recipe, whatever the model), "short", or "auto": paper if there is time
loss: str = "cross_entropy"  # cross_entropy, oc_softmax or p2sgrad
epochs: int = 0  # passes over the training split; 0: what the preset says
batch_size: int = 0  # utterances in a training step; 0: what the preset says
crop_s: float = 0.0  # length of a training clip, seconds; 0: what the preset says
augmentation: str = "none"  # recipe applied to training clips: none, seed, rawboost-la, rawboost-df, wild
n_seeds: int = 1  # runs from seed, seed + 1, ...; one per GPU at a time, each with the whole time budget
time_budget_s: float = 39600.0  # after it training stops ("auto": earlier, in time to score eval), seconds; 0: no limit
resume_from: str = ""  # folder 02_train of an earlier run to go on with, where that is not in run_dir

# %% [markdown]
# ## The corpus
#
# Corpora are recognised by their protocol files, not by their path, so the same cell works on Kaggle and at home.
# A trial is one recording with its label; `train` teaches, `dev` selects, `eval` is looked at once.

# %%
import pandas as pd
from IPython.display import Audio, Markdown, display

from deepfake_utils.conventions import BONAFIDE, SAMPLE_RATE_HZ, SPOOF, ConfigError, CorpusError
from deepfake_utils.corpora import divide, find_corpora
from deepfake_utils.demo import DEMO_NOTICE, build_demo
from deepfake_utils.files import atomic_write
from deepfake_utils.report import plots
from deepfake_utils.waveforms import decode as audio

run_folder = Path(run_dir or "runs/latest").resolve()
results = run_folder / "02_train"
try:
    corpus = None if data == "demo" else find_corpora(*([data] if data else []))[0]
except CorpusError as nothing_found:
    if data:
        raise
    print(nothing_found, "\n\nGoing on with the built-in demo corpus.")
    corpus = None
corpus = corpus or build_demo(run_folder.parent / "demo", scale=demo_scale)
display(Markdown(f"**{corpus.name}** in `{corpus.root}`" + (f"  \n> {DEMO_NOTICE}" if corpus.name == "demo" else "")))


# %%
def show(figure, name):
    """Keep the picture beside the results and show it."""
    (results / "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(results / "figures" / f"{name}.png")
    display(figure)


(train, dev, evaluation), where_from = divide(corpus, seed)
print(where_from)
show(plots.corpus_overview(pd.concat([train, dev, evaluation])), "corpus")

# %% [markdown]
# Attacks that appear in `eval` only are the point: a detector that knows the vocoders it was trained on has learned
# vocoders, not speech. Here is one clip of each class. Listen first, then look at the harmonics between 2 and 8 kHz.

# %%
examples = {
    f"{'bona fide' if label == BONAFIDE else 'spoof'}: {row.utterance} ({row.attack})": audio.read_audio(row.path)
    for label in (BONAFIDE, SPOOF)
    for row in dev[dev["label"] == label].head(1).itertuples()
}
show(plots.clips(examples), "clips")
for title, waveform in examples.items():
    display(Markdown(title), Audio(waveform, rate=SAMPLE_RATE_HZ))

# %% [markdown]
# ## The recipe, and whether it fits
#
# The published recipe trains AASIST on 4.04 s crops for 100 epochs: batches of 24, Adam from 1e-4 down a cosine to
# 5e-6, cross-entropy with weights 0.1 (spoof) and 0.9 (bona fide). On an RTX 4080 that took 14 hours with the
# reference code. So the speed of *this* machine is measured first, and if the recipe does not fit the budget, the
# next cell says what is done instead. Nothing is shortened silently.

# %%
from deepfake_utils.corpora.division import proportional_subset
from deepfake_utils.machine import pick_device
from deepfake_utils.training.config import RECIPES
from deepfake_utils.training.plan import Plan, plan_run

if preset not in ("auto", *RECIPES):
    raise ConfigError(f"preset {preset!r} is unknown: expected auto, {' or '.join(RECIPES)}")
device = pick_device()
wish = RECIPES["paper" if preset == "auto" else preset]
wish = wish.replace(model=model or wish.model, loss=loss, augmentation=augmentation, seed=seed)
sizes = len(train), len(dev), len(evaluation)
if preset == "auto":
    plan = plan_run(wish, *sizes, time_budget_s, device.device, keep_model=bool(model))
else:
    plan = Plan(wish.replace(time_budget_s=time_budget_s), *sizes, [f"Preset {preset!r}, as asked."])
print(f"Device: {device.reason}", *plan.why, sep="\n")

# %%
chosen = {"epochs": epochs, "batch_size": batch_size, "crop_samples": round(crop_s * SAMPLE_RATE_HZ)}
config = plan.config.replace(**{name: value for name, value in chosen.items() if value})

draws = ((train, plan.n_train), (dev, plan.n_dev), (evaluation, plan.n_eval))  # all trials, where the plan takes all
train, dev, evaluation = (proportional_subset(protocol, n, seed) for protocol, n in draws)
print(f"{len(train)} train, {len(dev)} dev and {len(evaluation)} eval trials")
display(config.to_dict())

# %% [markdown]
# ## What the model hears: augmentation
#
# A corpus recorded in one way teaches that way of recording. Each effect below is *drawn* (how much noise, which room)
# and then *applied*, on the batch and on the device; a recipe is a list of effects with their probabilities. Here is
# what each does to the bona fide clip above. The waveform a detector must not care about should still sound like the
# same person saying the same thing.

# %%
import torch

from deepfake_utils.augment import EFFECTS, RECIPES

clip = torch.from_numpy(next(iter(examples.values())))[None]
names = ["noise", "reverb", "lowpass", "companding", "speed", "shift", "rawboost-5"]
changed = {name: EFFECTS[name](clip, torch.Generator().manual_seed(seed))[0].numpy() for name in names}
show(plots.spectrogram_grid({"as recorded": clip[0].numpy()} | changed), "augmentation")
for name in ("noise", "reverb", "rawboost-5"):
    display(Markdown(name), Audio(changed[name], rate=SAMPLE_RATE_HZ))
display({recipe: ", ".join(effects) or "nothing" for recipe, effects in RECIPES.items()})

# %% [markdown]
# Does it help? On the demo's unseen attacks, with LFCC-LCNN, 10 epochs of 1 s crops and three seeds each (mean ±
# standard deviation; 2 CPU cores, 23 November 2026, `python tests/benchmarks/augmentation.py`):
#
# | recipe | dev EER % (seen attacks) | eval EER % (unseen attacks) | eval EER % by seed |
# |---|---|---|---|
# | none | 21.7 ± 3.3 | 26.8 ± 1.8 | 25.3, 28.7, 26.2 |
# | seed | 33.3 ± 0.0 | 48.3 ± 1.9 | 50.0, 48.8, 46.2 |
# | rawboost-la | 35.0 ± 1.7 | 43.0 ± 4.6 | 45.0, 37.8, 46.2 |
# | rawboost-df | 34.4 ± 1.0 | 39.6 ± 12.8 | 53.8, 28.7, 36.2 |
# | wild | 32.8 ± 1.9 | 32.6 ± 7.1 | 40.3, 31.2, 26.2 |
#
# Here no recipe helps: `seed` and `rawboost-la` are clearly worse; `wild` and `rawboost-df` cannot be told from `none`
# with three seeds. After 300 steps on 240 clips the models have not finished learning the clean ones, and the demo's
# two classes share one recording chain, so there is no chain to unlearn. That is no verdict on RawBoost, which took
# RawNet2 from 9.50 to 5.31 % on ASVspoof 2021 LA. It is a reminder to measure on your corpus, with seeds.

# %% [markdown]
# ## Train
#
# One loop, in `deepfake_utils/training.py`, short enough to read. Each epoch ends with the error on `dev`; the weights
# with the lowest one are kept. The checkpoint holds optimiser, averages and random state, so a run that was stopped
# goes on exactly where it was: run the cell again. On Kaggle every session starts in an empty folder, and what an
# earlier one saved can only be read: attach its output and give its `02_train` folder as `resume_from`, with the
# parameters as they were and `preset` "paper" or "short" ("auto" measures anew and may plan another run).
#
# The **equal error rate** (EER) is the error at the threshold where as many bona fide clips are rejected as spoofed
# ones are accepted. A coin has 50 %.

# %%
from deepfake_utils import fit
from deepfake_utils.training.jobs import fit_seeds, run_job
from deepfake_utils.training.resume import take_over

if resume_from:
    take_over(resume_from, results)
on_kaggle = Path("/kaggle/working").is_dir()  # what lies there is saved with the notebook: not waveforms
scratch = Path("/tmp/waveforms") if on_kaggle else run_folder.parent / "waveforms"
curves = display(display_id=True)


def redraw(history):
    """Draw the curves so far in place of the last ones."""
    if curves:
        curves.update(plots.training_curves(history))


# %%
if n_seeds == 1:
    result = fit(train, dev, results, config, waveforms_dir=scratch, on_epoch=redraw, say=print)
else:
    seeds = fit_seeds(train, dev, results, config, range(seed, seed + n_seeds), waveforms_dir=scratch)
    display(seeds)
    result = run_job(results / f"seed_{seed}", say=print)

# %%
show(plots.training_curves(result.history), "training_curves")
result.history.round(4)

# %% [markdown]
# ## Look at `eval` once
#
# Nothing above has seen these trials, neither for training nor for choosing the epoch. (The reference training script
# picks its best checkpoint by the *eval* error; figures made that way are lower, and not a forecast of anything.)

# %%
from deepfake_utils import evaluate, score_protocol
from deepfake_utils.evaluation.intervals import several_seeds
from deepfake_utils.evaluation.scorefile import write_scores
from deepfake_utils.scoring.score import SCORE_KIND

scores = score_protocol(result.model, evaluation, progress="eval")
write_scores(results / "eval_scores.csv", scores, {"score": SCORE_KIND, "split": "eval", "corpus": corpus.name})
asv_scores = corpus.asv_scores("eval")
metrics = evaluate(scores, evaluation, asv_scores, attack_intervals=True)
low, high = metrics["eer_ci"]
tandem = f"{metrics['min_tdcf']:.4f}" if metrics["min_tdcf"] is not None else "no ASV scores"
display(Markdown(f"""| | dev (selected on) | eval |
|---|---|---|
| EER | {100 * result.best_dev_eer:.2f} % | **{100 * metrics["eer"]:.2f} %** [{100 * low:.2f}, {100 * high:.2f}] |
| min t-DCF (2019) | | {tandem} |
| AUC | | {metrics["auc"]:.4f} |
| trials | {len(dev)} | {metrics["n_bonafide"]} bona fide, {metrics["n_spoof"]} spoof |"""))

# %% [markdown]
# The distance between the two columns is the **generalisation gap**. Development attacks are the training attacks, so
# the dev error answers "does it recognise what it was shown"; only eval asks about anything new.

# %%
labels = evaluation["label"].to_numpy()
values = scores["score"].to_numpy()
show(plots.score_histogram(values, labels, threshold=metrics["eer_threshold"], title="eval scores"), "histogram")
dev_scores = score_protocol(result.model, dev, progress="dev")  # the whole length, as eval; training may take less
write_scores(results / "dev_scores.csv", dev_scores, {"score": SCORE_KIND, "split": "dev", "corpus": corpus.name})
systems = {"dev": (dev_scores["score"].to_numpy(), dev["label"].to_numpy()), "eval": (values, labels)}
show(plots.det_curves(systems), "det")

# %%
rows = [
    {"attack": attack, "eer": row["eer"], "n": row["n"]} | dict(zip(("low", "high"), row["eer_ci"] or (), strict=False))
    for attack, row in metrics["per_attack"].items()
]
show(plots.attack_bars(pd.DataFrame(rows), overall=metrics["eer"], seen=sorted(set(train["attack"]))), "attacks")

# %% [markdown]
# **What to report**: the eval EER with its interval, the number of speakers behind it, the recipe, and the mean and
# spread over several seeds: six seeds of one published system span 1.92 to 3.10 %. Notebook 03
# takes the scores written here and asks where and why the errors happen.

# %%
eval_eers = [metrics["eer"]]
for other in range(seed + 1, seed + n_seeds):
    other_scores = score_protocol(run_job(results / f"seed_{other}").model, evaluation, progress=f"eval, seed {other}")
    eval_eers.append(evaluate(other_scores, evaluation, n_bootstrap=0)["eer"])
if n_seeds > 1:
    summary = several_seeds(eval_eers)
    print(f"eval EER over {n_seeds} seeds: mean {100 * summary.mean:.2f} %, deviation {100 * summary.sd:.2f} %")

# %%
import json

from deepfake_utils.machine import describe_machine

result_file = {
    "notebook": "02_train",
    "corpus": {"name": corpus.name, "kind": corpus.kind, "fingerprint": corpus.fingerprint()},
    "metrics": metrics.to_dict()
    | {"dev_eer": result.best_dev_eer, "best_epoch": result.best_epoch, "stopped": result.stopped}
    | {"eval_eer_by_seed": eval_eers},
    "config": config.to_dict() | {"n_train": len(train), "n_dev": len(dev), "n_eval": len(evaluation)},
    "plan": plan.why,
    "machine": describe_machine(device.device),
}
with atomic_write(results / "result.json") as part:
    part.write_text(json.dumps(result_file, indent=2))
