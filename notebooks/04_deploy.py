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
# # From a score to a decision: long, live, and for a use
#
# A detector that scores 4 seconds is not yet one that can be deployed. Recordings are long and only partly fake, calls
# are live, devices are small, and somebody has to say from which score on what happens.
#
# **What you'll do**: take weights, find out what they cost on this machine, look for a fake sentence in a long real
# recording, feed the same recording in live, and fit thresholds for a use.
#
# **What you'll learn**: which detector fits which device, how much of a spliced fake is found, how soon a live verdict
# comes, and what a threshold costs, also behind a codec.
#
# **What you'll need**: nothing for the demo; a corpus with dev and eval splits for numbers that mean something. On two
# CPU cores it takes half a minute for the demo.

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
detectors: str = ""  # weights to deploy, files or names, commas between; the first is examined; empty: those shipped
n_hosts: int = 0  # real recordings of each split that fakes are spliced into; 0: 1 for the demo, else 12
n_judged: int = 0  # recordings of each source and label to judge; 0: 2 for the demo, else 40
share_fake: float = 0.02  # your own use: share of recordings that are fake, between 0 and 1
cost_fake_accepted: float = 20.0  # your own use: cost of a fake that passes as real, any unit
cost_real_rejected: float = 1.0  # your own use: cost of a real one that is called fake, same unit
n_bootstrap: int = 1000  # bootstrap replicates of each interval

# %% [markdown]
# ## What is deployed, and on what is it tried?
#
# **Bona fide** is recorded human speech (real), **spoof** is speech made or altered by a machine (fake). A detector
# makes two kinds of error: **real rejected** (a bona fide recording is called fake; the field's *miss*) and **fake
# accepted** (a spoof is called real; its *false alarm*). The **equal error rate** (EER) is the error at the threshold
# where both rates are the same; a coin has 50 %. Scores are **log-odds** of real speech: 0 says nothing, +2.3 says ten
# to one for real, -2.3 ten to one for fake.
#
# A corpus with `dev` and `eval` splits: everything is fitted on `dev` and judged on `eval`. On the demo, whose babble
# is no speech, the notebook shows that the path works; its numbers say nothing.

# %%
import warnings

from deepfake_utils import Detector
from deepfake_utils.notebook import Results, demo_notice, open_corpus, say, tabulate

results = Results(run_dir, "04_deploy")
show = results.show
corpus = open_corpus(data, results, demo_scale)
is_demo = bool(demo_notice(corpus))
if is_demo:  # on babble, weights that know speech may well point the other way
    warnings.filterwarnings("ignore", "higher scores are rather spoof")
n_hosts, n_judged = n_hosts or (1 if is_demo else 12), n_judged or (2 if is_demo else 40)
names = [name.strip() for name in detectors.split(",") if name.strip()]
loaded = {Path(name).stem: Detector.load(name) for name in names} or {"open (shipped)": Detector.load()}
detector = next(iter(loaded.values()))
dev, evaluation = (corpus.protocol(split) for split in ("dev", "eval"))
print(f"{len(dev):,} of dev, {len(evaluation):,} of eval; at most {n_judged} of each source and label are judged.")
print(f"Weights: {detector.facts['weights']}. They run on: {detector.engine}.")

# %% [markdown]
# ## Which detector for which device?
#
# The time is of one window of 4.04 s on the cores of this machine; a new one falls due every 2.02 s of speech, which
# *times real time* counts, without decoding and the search for speech; other programs at work show in it. The error
# rate is of whole recordings of `eval`, every source (repository, or else speaker or attack) counting alike. To compare
# detectors, name them, such as `detectors = "laptop,phone,tiny"`.

# %%
from deepfake_utils.evaluation.calibration import Use
from deepfake_utils.scoring import calibrate
from deepfake_utils.scoring.detector import USES

own = Use(share_fake, cost_miss=cost_real_rejected, cost_fa=cost_fake_accepted)
all_uses = {"your own": own, **USES}
settings = {"most": n_judged, "seed": seed}
material = {"host_s": 12.0, "inserts_s": (2.0, 4.0)} if is_demo else {}
facts, judged, spliced = calibrate.decide(
    detector, dev, evaluation, n_hosts=n_hosts, wanted=all_uses, **settings, **material
)

# %%
import pandas as pd

from deepfake_utils.evaluation.uses import balanced_eer, balanced_weights
from deepfake_utils.scoring.engine import time_window

rows = []
for name, other in loaded.items():
    seen = judged if other is detector else calibrate.decide(other, dev, evaluation, n_hosts=0, **settings)[1]
    table = calibrate.recording_log_odds(seen["eval"], facts["pooling"])
    weights = balanced_weights(table["label"], table["source"])
    ms = 1000 * time_window(other.model, other.device)
    eer = balanced_eer(table["log_odds"], table["label"], weights)
    rows.append({"detector": name, "size (MB)": other.facts["weights_bytes"] / 1e6, "ms a window": ms,
                 "times real time": 2019 / ms, "EER %": 100 * eer, "recordings": len(table)})
tabulate(pd.DataFrame(rows))

# %% [markdown]
# ## Where in a long recording is the fake?
#
# Real speech of one person with a synthesised sentence spliced in, at its level, cut where it was quiet. Over the
# waveform: in red what is marked as fake, and the orange line is the truth. Below: the log-odds of every window (a bar
# as long as the window), the threshold (dashed), and the grey band where a recording would be called uncertain.

# %%
from dataclasses import replace

import numpy as np

from deepfake_utils.report import plots
from deepfake_utils.scoring.pooling import stretches
from deepfake_utils.scoring.splices import spliced_recordings

longest = {"host_s": 16.0, "inserts_s": (4.0,)} if is_demo else {"host_s": 90.0, "inserts_s": (8.0,)}
_, example, _ = spliced_recordings(evaluation, 1, seed=seed + 1, **longest)
verdict = next(detector.verdicts([example.samples]))
windows = calibrate.calibrated(verdict.windows, facts["calibration"])
marked = stretches(windows, **facts["marks"])
show(plots.timeline(replace(verdict, windows=windows).timeline, plots.envelope([example.samples]),
                    facts["uncertain_log_odds"], fake_stretches=marked, truth=[example.span_s],
                    title=f"Real: {example.source}, with {example.insert_s:g} s of {example.insert}"), "timeline")
say(f"Fake from {example.span_s[0]:.1f} to {example.span_s[1]:.1f} s; marked: "
    + (", ".join(f"{a:.1f} to {b:.1f} s" for a, b in marked) or "nothing"))

# %% [markdown]
# One example proves nothing. The tables are of all splices of both splits (`n_hosts` recordings times the lengths of
# the insert), hard cuts and cross-fades in turn. Every one has a **control**, the same cut with another person's real
# speech, so that a detector that hears the joint instead of the synthesis gains nothing. *EER* is of windows (half of
# them or of the insert fake, against windows without any). The bound of the marks was set on `dev` so that at most 5 %
# of the real time there, over all lengths, is marked wrongly; whether that holds elsewhere, `eval` tells. A dozen
# recordings a length are few: differences of ten points between rows mean little.

# %%
found = {split: pd.DataFrame(calibrate.describe_splices(part, facts["marks"])) for split, part in spliced.items()}
for split, table in found.items():
    shown = 100 * table[["eer", "eer_cut", "eer_fade", "fake_found", "inserts_found", "real_marked"]].astype(float)
    shown.columns = ["EER %", "EER %, hard cut", "EER %, cross-fade",
                     "fake time found %", "inserts found %", "real time marked %"]
    length = table["insert_s"].map(lambda s: s if isinstance(s, str) else f"{s:g}").rename(f"{split}: insert (s)")
    tabulate(pd.concat([length, shown], axis=1))

# %% [markdown]
# And the recording as a whole? Its windows are **pooled** into one figure. The mean asks whether the whole is fake; a
# low quantile, or attention to the windows that sound most fake, asks whether any part is, and finds something in
# everybody who speaks for long. Three errors in percent: the EER of recordings as they are, that of splices against
# their controls, and how many untouched long recordings are rejected at the threshold of the first. The way with the
# least mean of the three on `dev` is taken.

# %%
from deepfake_utils.scoring.pooling import describe

for split, tried in facts["decisions"]["pooling_tried"].items():
    table = pd.DataFrame(tried).set_index("pooling") * 100
    words = {"recordings": "EER % of recordings", "splices": "EER % of splices", "long_rejected": "long rejected %",
             "together": "mean of the three"}
    tabulate(table.rename(columns=words).reset_index(names=f"{split}: pooled by"))
print(f"Chosen on dev: {describe(facts['pooling'])}.")

# %% [markdown]
# ## Live: how soon, and how much work?
#
# The same recording arrives in telephone frames: 8 kHz, 20 ms at a time. A verdict on a window is there as soon as its
# last frame is, so the first comes after 4.04 s of which at least one is speech, and 0.1 s for the change of rate. Most
# frames only feed the search for speech; about every hundredth completes a window, and with it comes one pass of the
# network.

# %%
from scipy.signal import resample_poly

from deepfake_utils.scoring.stream import time_stream

telephone = resample_poly(example.samples, 1, 2)
timed = time_stream(detector, telephone, 8_000)
silent = time_stream(detector, np.zeros_like(telephone), 8_000)
whole = detector(telephone, 8_000)
pairs = zip(timed.windows, whole.windows, strict=True)
gap = max((abs(a.logit_bonafide - b.logit_bonafide) for a, b in pairs), default=0.0)
live = {"first verdict after (s of sound)": timed.first_s, "a frame, median (ms)": 1000 * np.median(timed.push_s),
        "99 of 100 frames within (ms)": 1000 * np.quantile(timed.push_s, 0.99),
        "longest frame (ms)": 1000 * timed.push_s.max(),
        "% of real time": 100 * timed.real_time_factor, "% of real time, silence": 100 * silent.real_time_factor,
        "largest difference from the recording scored whole": gap}
tabulate(pd.DataFrame({"live": list(live), "value": [f"{value:.3g}" for value in live.values()]}))
show(plots.push_times(timed.push_s), "live")

# %% [markdown]
# ## How often is a verdict wrong?
#
# Where no use is named, the band between *fake* and *real* was set on `dev`: a tenth of the fakes there lie above it,
# and a tenth of the real recordings below, as they are or, if that is lower, after a messenger's codec (Opus at 24
# kbit/s, where PyAV can encode), which makes real speech sound fake to the shipped weights as noise, rooms, telephone
# and MP3 do not. What is between is **uncertain**. The table says what became of that on `eval`. *Wrong at most* is of
# the source of five recordings or more that is judged worst: an average hides whom it wrongs.

# %%
words = {"called_real": "called real %", "uncertain": "uncertain %", "called_fake": "called fake %",
         "worst_source": "wrong at most, of one source %"}
verdicts = pd.concat({split: pd.DataFrame(of) for split, of in facts["decisions"]["verdicts"].items()}, axis=1).T
tabulate((100 * verdicts.astype(float)).rename(columns=words).rename_axis(["split", "recordings"]).reset_index())

# %% [markdown]
# ## Which threshold, for which use?
#
# A use says how common fakes are and what the two errors cost. The threshold is where the expected cost was least on
# `dev`, every source counting alike and real speech both as it is and by messenger, which moves it below the least of
# the curve; the grey band is where it falls when other sources are drawn, and a recording in it is called
# **uncertain**. Dotted: what deciding without listening costs. **A curve that stays above it says: for this use, do not
# deploy this detector.**

# %%
from deepfake_utils.evaluation import uses

tables = {split: calibrate.recording_log_odds(part, facts["pooling"]) for split, part in judged.items()}
trials = {split: (table["log_odds"], table["label"], table["source"]) for split, table in tables.items()}
fitted = {name: uses.FittedThreshold(facts["thresholds"][name], *facts["uncertain"][name]) for name in all_uses}
costs = {name: uses.judge_threshold(*trials["eval"], use, fitted[name], n_bootstrap=n_bootstrap, seed=seed)
         for name, use in all_uses.items()}
curves = {name: {split: uses.cost_curve(*of, use) for split, of in trials.items()} for name, use in all_uses.items()}
show(plots.costs_of_uses(curves, costs), "uses")

# %% [markdown]
# Judged on `eval`: expected cost of a recording in the use's own unit, with the 95 % interval over sources where there
# are enough of them: **one that reaches what deciding without listening costs has shown no gain**. *Rejected* and
# *accepted* take the threshold alone, as if none were uncertain. *Least possible* is the cost of the best threshold for
# these very recordings, which nobody knows beforehand.

# %%
from deepfake_utils.report.tables import cost_table

tabulate(cost_table(all_uses, costs))

# %% [markdown]
# ## Does it hold under codec and noise?
#
# The same band and thresholds on recordings of `eval` after what calls and uploads do to them. The cost is relative to
# deciding without listening, which has 1: **above 1 the threshold does not hold on that channel**. A quarter as many
# recordings are judged as above, therefore *as it is* may differ from it.

# %%
import torch

from deepfake_utils.augment.recipes import EFFECTS

few = {"most": max(2, n_judged // 4), "seed": seed}


def through(effect, **how):
    """What a recording is after an effect; the draw follows from its number."""
    def change(samples, number):
        generator = torch.Generator().manual_seed(seed + number)
        return EFFECTS[effect](torch.from_numpy(samples)[None], generator, **how)[0].clamp(-1, 1).numpy()
    return change


ways = {"as it is": None, "noise, 10 dB": through("noise", snr_db=(10.0, 10.0)),
        "telephone band": through("lowpass", cutoff_hz=(3400.0, 3400.0))}
if importlib.util.find_spec("av"):  # which encodes
    ways["MP3, 32 kbit/s"] = through("mp3", kilobits_per_s=(32,))
    ways["Opus, 16 kbit/s"] = through("opus", kilobits_per_s=(16,))

# %%
rows = []
for way, change in ways.items():
    again = calibrate.judge_protocol(detector, evaluation, change=change, progress=way, **few)
    again = [(row, calibrate.calibrated(w, facts["calibration"])) for row, w in again]
    table = calibrate.recording_log_odds(again, facts["pooling"])
    these = (table["log_odds"], table["label"], table["source"])
    row = {"eval, heard through": way, "EER %": 100 * balanced_eer(*these[:2], balanced_weights(*these[1:]))}
    row |= {f"{label} called fake %": 100 * of["called_fake"]
            for label, of in calibrate.judge_verdicts(again, facts).items()}
    for name, use in all_uses.items():
        judged_again = uses.judge_threshold(*these, use, fitted[name], n_bootstrap=0)
        row[f"relative cost, {name}"] = judged_again["cost"] / judged_again["blind"]
    rows.append(row)
channels = pd.DataFrame(rows)
tabulate(channels)

# %% [markdown]
# ## What may be said?
#
# A threshold belongs to weights, to a use, and to recordings like those it was fitted on. `deepfake-utils calibrate
# WEIGHTS --data FOLDER` does what this notebook did and writes the thresholds into the JSON beside the weights, where
# `deepfake-utils score --use NAME` takes them from. Above the dotted line, or in the grey band, the honest answer is
# **uncertain**.

# %%
from deepfake_utils.machine import pick_device

found_rows = {split: table.to_dict("records") for split, table in found.items()}
table = tables["eval"]
eer = balanced_eer(table["log_odds"], table["label"], balanced_weights(table["label"], table["source"]))
metrics = {"eer": eer, "uses": costs, "splices": found_rows, "live": live, "channels": channels.to_dict("records")}
metrics |= {"pooling": facts["decisions"]["pooling_tried"], "verdicts": facts["decisions"]["verdicts"]}
config = {"seed": seed, "detectors": names or ["open"], "n_hosts": n_hosts, "n_judged": n_judged,
          "own_use": vars(own), "pooling": facts["pooling"], "marks": facts["marks"]}
results.write(corpus, metrics=metrics, config=config, device=pick_device("cpu").device)  # result.json
