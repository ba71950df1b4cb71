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
# A *countermeasure* tells recorded human speech (**bona fide**, real) from speech made or altered by a machine
# (**spoof**, fake). This notebook trains one from raw waveforms and reports an error you can repeat to others.
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
augmentation: str = "none"  # recipe applied to training clips: none, seed, rawboost-la, rawboost-df, wild, open
n_seeds: int = 1  # runs from seed, seed + 1, ...; one per GPU at a time, each with the whole time budget
time_budget_s: float = 39600.0  # after it training stops ("auto": earlier, in time to score eval), seconds; 0: no limit
resume_from: str = ""  # folder 02_train of an earlier run to go on with, where that is not in run_dir

# %% [markdown]
# ## What is there to learn from?
#
# Corpora are recognised by their protocol files, not by their path, so the same cell works on Kaggle and at home.
# A trial is one recording with its label; `train` teaches, `dev` selects, `eval` is looked at once.
#
# A detector makes two kinds of error. **Real rejected**: a bona fide recording is called spoofed (the field's *miss*).
# **Fake accepted**: a spoof is called bona fide (its *false alarm*). The threshold trades one for the other, and the
# **equal error rate** (EER) is the error at the threshold where both rates are the same. A coin has 50 %.

# %%
import pandas as pd

from deepfake_utils.corpora import divide
from deepfake_utils.notebook import Results, one_of_each, open_corpus, play, say, tabulate
from deepfake_utils.report import plots

results = Results(run_dir, "02_train")
show = results.show  # keeps the picture beside the results, too
corpus = open_corpus(data, results, demo_scale)
(train, dev, evaluation), where_from = divide(corpus, seed)
print(where_from)
show(plots.corpus_overview(pd.concat([train, dev, evaluation])), "corpus")

# %% [markdown]
# Attacks that appear in `eval` only are the point: a detector that knows the vocoders it was trained on has learned
# vocoders, not speech. Here is one clip of each class. Listen first, then look at the harmonics above 2 kHz.

# %%
examples = one_of_each(dev)
show(plots.clips(examples), "clips")
play(examples)

# %% [markdown]
# ## Which recipe fits the time there is?
#
# The published recipe trains AASIST on 4.04 s crops for 100 epochs: batches of 24, Adam from 1e-4 down a cosine to
# 5e-6, cross-entropy with weights 0.1 (spoof) and 0.9 (bona fide). On an RTX 4080 that took 14 hours with the
# reference code. So the speed of *this* machine is measured first, and if the recipe does not fit the budget, the
# next cell says what is done instead. Nothing is shortened silently.

# %%
from deepfake_utils.conventions import SAMPLE_RATE_HZ, ConfigError
from deepfake_utils.corpora.division import proportional_subset
from deepfake_utils.machine import pick_device
from deepfake_utils.report.tables import settings_table
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
say(f"Device: {device.reason}", *plan.why)

# %%
chosen = {"epochs": epochs, "batch_size": batch_size, "crop_samples": round(crop_s * SAMPLE_RATE_HZ)}
config = plan.config.replace(**{name: value for name, value in chosen.items() if value})
draws = ((train, plan.n_train), (dev, plan.n_dev), (evaluation, plan.n_eval))  # all trials, where the plan takes all
train, dev, evaluation = (proportional_subset(protocol, n, seed) for protocol, n in draws)
print(f"{len(train)} train, {len(dev)} dev and {len(evaluation)} eval trials")
tabulate(settings_table(config.to_dict(), RECIPES["paper"].to_dict()))

# %% [markdown]
# ## What does augmentation do to a clip?
#
# A corpus recorded in one way teaches that way of recording. Each effect below is *drawn* (how much noise, which room)
# and then *applied*, on the batch and on the device; a recipe is a list of effects with their probabilities. Here is
# what each does to the bona fide clip above, with its strength fixed; colours run from 0 to 80 dB below each picture's
# maximum. Whatever is done, it should still sound like the same person saying the same thing. The length stays: a clip
# slowed to 0.8 loses its end, and what a shift moves out at the end comes in at the start.

# %%
import torch

from deepfake_utils import augment

clip = torch.from_numpy(next(iter(examples.values())))[None]
drawn = {
    "noise, 10 dB": ("noise", {"snr_db": (10.0, 10.0)}),
    "reverb, 0.8 s": ("reverb", {"rt60_s": (0.8, 0.8), "direct_to_reverberant_db": (0.0, 0.0)}),
    "lowpass, 3 kHz": ("lowpass", {"cutoff_hz": (3000.0, 3000.0)}),
    "companding, 4 bits": ("companding", {"bits": (4, 4)}),
    "speed, 0.8": ("speed", {"speed": (0.8, 0.8)}),
    "shift, 0.4 s": ("shift", {"shift_s": (0.4, 0.4)}),
    "rawboost-5": ("rawboost-5", {}),
}
changed = {"as recorded": clip[0].numpy()}
for title, (effect, strength) in drawn.items():
    changed[title] = augment.EFFECTS[effect](clip, torch.Generator().manual_seed(seed), **strength)[0].numpy()
show(plots.spectrogram_grid(changed), "augmentation")

# %%
play({title: changed[title] for title in ("noise, 10 dB", "reverb, 0.8 s", "speed, 0.8", "rawboost-5")})
tabulate(pd.DataFrame([
    {"recipe": recipe, "its effects, in this order": ", ".join(effects) or "none"}
    for recipe, effects in augment.RECIPES.items()
]))

# %% [markdown]
# **Does it help?** Where the two classes were recorded in different ways, numbers that need no listening (level,
# silence, bandwidth, ...) tell the label. In training recordings of speech in the open they do so with an EER of
# 21.2 %, together; with labels balanced within sources 39.0 %; with the recipe `open` besides 44.4 %
# (`notebooks/MEASURED.md`). RawBoost took RawNet2 from 9.50 to 5.31 % on ASVspoof 2021 LA (arXiv 2111.04433). A recipe
# for one kind of recording can also cost error on another, and a short training may not have learned the clean clips
# yet, so measure on your corpus, with seeds: `python tests/benchmarks/augmentation.py --data FOLDER` trains with every
# recipe three times, and prints mean and spread on attacks seen and unseen.

# %% [markdown]
# ## Does it learn?
#
# One loop, in `deepfake_utils/training/loop.py`, short enough to read. Each epoch ends with the error on `dev`; the
# weights with the lowest one are kept. The checkpoint holds optimiser, averages and random state, so a run that was
# stopped goes on exactly where it was: run the cell again. On Kaggle every session starts in an empty folder, and what
# an earlier one saved can only be read: attach its output and give its `02_train` folder as `resume_from`, with the
# parameters as they were and `preset` "paper" or "short" ("auto" measures anew and may plan another run).

# %%
from deepfake_utils import fit
from deepfake_utils.training.jobs import fit_seeds, run_job
from deepfake_utils.training.resume import take_over

if resume_from:
    take_over(resume_from, results.folder)
redraw = results.live("training_curves")

# %%
if n_seeds == 1:
    result = fit(train, dev, results.folder, config, waveforms_dir=results.scratch, say=say,
                 on_epoch=lambda history: redraw(plots.training_curves(history)))
else:
    several = range(seed, seed + n_seeds)
    tabulate(fit_seeds(train, dev, results.folder, config, several, waveforms_dir=results.scratch))
    result = run_job(results.folder / f"seed_{seed}", say=say)
redraw(plots.training_curves(result.history))

# %%
history = result.history
tabulate(pd.DataFrame({
    "epoch": history["epoch"],
    "training loss": history["train_loss"].map("{:.4f}".format),
    "dev EER %": 100 * history["dev_eer"],
    "learning rate": history["learning_rate"].map("{:.2g}".format),
    "utterances a second": history["utterances_per_s"].map("{:.1f}".format),
    "waiting for data %": 100 * history["data_wait_fraction"],
}))

# %% [markdown]
# ## How good is it on what it has never heard?
#
# Nothing above has seen the trials of `eval`, neither for training nor for choosing the epoch. (The reference training
# script picks its best checkpoint by the *eval* error; figures made that way are lower, and not a forecast of
# anything.) Training may score `dev` on shorter clips to save time, so here both are scored anew, on the first 4.04 s
# of each clip; the last row is what training saw.
#
# *min t-DCF* is what the detector costs in front of a speaker verification system (1 is useless), *AUC* the chance that
# a bona fide clip scores higher than a spoof.

# %%
from deepfake_utils import evaluate, score_protocol
from deepfake_utils.evaluation.scorefile import write_scores
from deepfake_utils.scoring.weights import score_kind

scored, facts = {}, {"score": score_kind(result.model), "corpus": corpus.name}
for split, protocol in {"dev": dev, "eval": evaluation}.items():
    scores = score_protocol(result.model, protocol, progress=split)
    write_scores(results.folder / f"{split}_scores.csv", scores, facts | {"split": split})
    scored[split] = scores["score"].to_numpy(), protocol["label"].to_numpy()
metrics = evaluate(scores, evaluation, corpus.asv_scores("eval"), attack_intervals=True)

# %%
from IPython.display import Markdown, display

from deepfake_utils.conventions import BONAFIDE, SPOOF
from deepfake_utils.evaluation.metrics import auc, compute_eer

dev_eer, bounds = compute_eer(*scored["dev"]).eer, metrics["eer_ci"]
interval = f" [{100 * bounds[0]:.2f}, {100 * bounds[1]:.2f}]" if bounds else ""
tandem = f"{metrics['min_tdcf']:.4f}" if metrics["min_tdcf"] is not None else "no ASV scores"
n_real, n_fake = (int((dev["label"] == label).sum()) for label in (BONAFIDE, SPOOF))
seconds = result.config.eval_samples / SAMPLE_RATE_HZ
display(
    Markdown(f"""| | dev (selected on) | eval |
|---|---|---|
| EER [eval: 95 % interval] | {100 * dev_eer:.2f} % | **{100 * metrics["eer"]:.2f} %**{interval} |
| min t-DCF (2019) | - | {tandem} |
| AUC | {auc(*scored["dev"]):.4f} | {metrics["auc"]:.4f} |
| trials, bona fide + spoof | {n_real} + {n_fake} | {metrics["n_bonafide"]} + {metrics["n_spoof"]} |
| speakers | - | {metrics["n_speakers"] or "unknown"} |
| EER in training, on {seconds:.2f} s of each clip | {100 * result.best_dev_eer:.2f} % | - |""")
)

# %% [markdown]
# The distance between the two columns is the **generalisation gap**. Where the attacks of `dev` are those of training,
# its error answers "does it recognise what it was shown"; only `eval` asks about anything new. The curve below has both
# errors at every threshold, the dots are the EER.

# %%
say(f"From dev to eval the EER changes by {100 * (metrics['eer'] - dev_eer):+.2f} points.")
show(plots.score_histogram(*scored["eval"], threshold=metrics["eer_threshold"], title="eval, threshold of its EER"),
     "histogram")
show(plots.det_curves(scored), "det")

# %%
from deepfake_utils.report.tables import attack_rows

show(plots.attack_bars(attack_rows(metrics), overall=metrics["eer"], seen=sorted(set(train["attack"]))), "attacks")

# %% [markdown]
# ## What to report?
#
# The eval EER with its interval, the number of speakers behind it, the recipe, and the mean and
# spread over several seeds: six seeds of one published system span 1.92 to 3.10 %. Notebook 03
# takes the scores written here and asks where and why the errors happen.

# %%
from deepfake_utils.evaluation.intervals import several_seeds

eval_eers = [metrics["eer"]]
for other in range(seed + 1, seed + n_seeds):
    other_model = run_job(results.folder / f"seed_{other}").model
    other_scores = score_protocol(other_model, evaluation, progress=f"eval, seed {other}")
    eval_eers.append(evaluate(other_scores, evaluation, n_bootstrap=0)["eer"])
if n_seeds > 1:
    summary = several_seeds(eval_eers)
    print(f"eval EER over {n_seeds} seeds: mean {100 * summary.mean:.2f} %, deviation {100 * summary.sd:.2f} %")

# %%
found = {"dev_eer": dev_eer, "best_epoch": result.best_epoch, "stopped": result.stopped, "eval_eer_by_seed": eval_eers}
used = result.config.to_dict() | {"n_train": len(train), "n_dev": len(dev), "n_eval": len(evaluation)}
results.write(
    corpus, metrics=metrics.to_dict() | found, config=used, device=device.device, plan=plan.why
)  # result.json
