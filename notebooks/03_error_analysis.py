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
# # Where does it fail, and can I trust the number?
#
# An equal error rate is one number. Before anybody acts on it, four questions need an answer: how sure is it, who
# and what makes the errors, did the detector listen to speech at all, and what happens when somebody has to decide.
#
# **What you'll do**: take the scores that notebook 02 left (or published weights, or a score file), and question
# them from the whole down to single clips.
#
# **What you'll learn**: to tell an error rate from a promise. Every threshold, direction and fit below is made on
# `dev` and judged on `eval`; nothing is tuned on the trials that it is judged on.
#
# **What you'll need**: a finished run of notebook 02, or weights. On two CPU cores it takes a minute for the demo.

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
train_dir: str = ""  # folder notebook 02 wrote; empty: run_dir/02_train, then an attached Kaggle output
weights: str = ""  # weights file to analyse instead of notebook 02's result, for example AASIST.pth
weights_model: str = ""  # its architecture, where the file does not say it
scores: str = ""  # score file with dev and eval trials; without weights, what needs a model is left out
second_weights: str = ""  # weights of a second system to compare and fuse; empty: a quick LFCC baseline
second_model: str = ""  # its architecture, where the file does not say it
n_scored: int = 0  # trials of each split to score where there is no score file; 0: all
n_measured: int = 1000  # recordings of each split for shortcuts and the second system
n_rescored: int = 0  # eval clips scored again for trimming and embeddings; 0: 48 on a CPU, 2000 on a GPU
n_conditions: int = 0  # eval clips scored again under codecs, noise, rooms and speed; 0: none, it takes 13 scorings
n_hardest: int = 2  # clips of each kind of error to look at
n_bootstrap: int = 1000  # bootstrap replicates of each interval

# %% [markdown]
# ## What is questioned?
#
# Each trial is one recording. **Bona fide** is recorded human speech (real), **spoof** is speech made or altered by a
# machine (fake); a high score says bona fide. Two errors are possible, and this notebook calls them by these names
# only: **real rejected** (a bona fide recording is called spoofed; the field says *miss*) and **fake accepted** (a
# spoof is called bona fide; the field says *false alarm*).

# %%
from deepfake_utils.notebook import Results, demo_notice, open_corpus, say, scored_splits, tabulate

results = Results(run_dir, "03_error_analysis")
show = results.show  # keeps the picture beside the results, too
corpus = open_corpus(data, results, demo_scale)
named = {"train_dir": train_dir, "weights": weights, "weights_model": weights_model, "scores": scores}
scored = scored_splits(corpus, results, **named, n_scored=n_scored, seed=seed)
dev, evaluation, detector, seen = scored.dev, scored.evaluation, scored.detector, scored.seen

# %%
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from deepfake_utils.conventions import BONAFIDE, CROP_SAMPLES, SAMPLE_RATE_HZ, SPOOF
from deepfake_utils.evaluation import compare
from deepfake_utils.report import page, plots, tables
from deepfake_utils.waveforms.decode import audio_info

speakers = compare.speakers_of(evaluation)
paths = tqdm(evaluation["path"], desc="lengths", unit="utt", delay=1, leave=False)
evaluation = evaluation.assign(duration_s=[audio_info(path).duration_s for path in paths])
names = ["0 to 1 s", "1 to 2 s", "2 to 3 s", "3 to 4.04 s", "over 4.04 s, cut"]
length = pd.cut(evaluation["duration_s"], [0, 1, 2, 3, CROP_SAMPLES / SAMPLE_RATE_HZ, np.inf], labels=names)
evaluation["length"] = length.astype(str)

# %% [markdown]
# ## How sure is the number?
#
# The trials of one speaker rise and fall together, so the interval resamples **speakers**, not trials: it answers
# "what if the corpus had been recorded with other people". Read the interval before the number. A few dozen trials
# give an interval tens of percent wide, and no error at all among *n* trials still allows a true rate up to about
# 3/*n*.
#
# The EER is the error at the threshold where as many real recordings are rejected as fake ones accepted. That threshold
# is known only once eval has been seen, so accuracy and the tables further down are at the one where the errors are
# equal on `dev`: it could have been chosen beforehand.

# %%
from deepfake_utils import evaluate
from deepfake_utils.evaluation import metrics as measures
from deepfake_utils.evaluation.scorefile import read_asv_scores

threshold = measures.compute_eer(dev["score"], dev["label"]).threshold
columns = ["speaker", "length", *sorted({"codec", "transmission"} & set(evaluation.columns))]
asv_file = corpus.asv_scores("eval")
asv = read_asv_scores(asv_file) if asv_file else None
if asv is not None and "phase" in asv:
    asv = asv[asv["phase"].isin(evaluation["phase"])]
result = evaluate(
    evaluation[["utterance", "score"]], evaluation.drop(columns="score"), asv,
    by=columns, threshold=threshold, n_bootstrap=n_bootstrap, seed=seed, attack_intervals=True,
)
tabulate(tables.headline_table(result))
unit, n_speakers = result["bootstrap_unit"], result["n_speakers"] or "unknown"
say(f"{result['n_bonafide']:,} bona fide and {result['n_spoof']:,} spoofed trials, {n_speakers} speakers; intervals "
    f"resampled by {unit}. Not one error among so many bona fide trials would still allow a true rate of "
    f"{min(100, 300 / result['n_bonafide']):.1f} %. The threshold of dev, for accuracy: {threshold:.4g}.")
if result["eer"] > 0.4:
    print("This detector is hardly better than a coin: read what follows as a tour of the questions, not of answers.")

# %% [markdown]
# ## What are the scores worth as probabilities?
#
# A raw score orders recordings; it does not say how probable anything is. **Calibration** learns on dev a straight
# line from the score to the log-likelihood ratio (LLR): 0 says nothing, +2.3 says ten times likelier if the speech
# is bona fide. On the calibrated scale a threshold follows from prior and costs alone.

# %%
from deepfake_utils.evaluation.calibration import PRESETS, fit_calibration, operating_point, reliability

calibration = fit_calibration(dev["score"], dev["label"], fitted_on=corpus.name)
labels, values = evaluation["label"].to_numpy(), evaluation["score"].to_numpy()
llrs = calibration.llr(values, corpus.name)
show(plots.score_panels({
    "raw score (higher: more bona fide)": (values, labels, {"EER threshold of dev": threshold,
                                                            "EER threshold of eval": result["eer_threshold"]}),
    "log-likelihood ratio, calibrated on dev": (llrs, labels, {"equal odds and costs": 0.0}),
}), "scores")

# %% [markdown]
# If both thresholds on the left lie together, dev told where eval would be. If they lie apart, whoever fixed the
# threshold on dev gets another error rate than the EER: the detection error trade-off (DET) curve below has all
# thresholds on it, the EER as a dot, and the cross is where they end up.

# %%
systems = {"dev": (dev["score"].to_numpy(), dev["label"].to_numpy()), "eval": (values, labels)}
at_dev_threshold = {"eval at dev's threshold": (result["p_fa"], result["p_miss"])}
show(plots.det_with_points(systems, at_dev_threshold), "det")

# %% [markdown]
# A likelihood ratio makes a promise: of all recordings called 80 % bona fide, 80 % should be. The picture holds the
# promise against what was found; the table prices it. **Cllr** is what the scores cost in bits when they are taken
# at their word (1: no information, more than 1: worse than silence), **min Cllr** what they would cost if
# calibrated perfectly. The difference between the two is bad calibration, and is avoidable.

# %%
n_bins = int(min(15, max(4, len(labels) / 20)))  # few trials, few bins
show(plots.reliability_diagram(*(reliability(s, labels, n_bins=n_bins) for s in (values, llrs))), "reliability")
calibrated = evaluate(evaluation[["utterance"]].assign(score=llrs), evaluation.drop(columns="score"), n_bootstrap=0)
rows = {"raw": result, "calibrated on dev": calibrated}
tabulate(pd.DataFrame([
    {"scores": name, "Cllr (bits)": row["cllr"], "min Cllr": row["min_cllr"], "actual DCF": row["act_dcf"],
     "min DCF": row["min_dcf"]} for name, row in rows.items()
]))

# %% [markdown]
# ## Which threshold?
#
# The EER threshold suits nobody in particular. A use states how common spoofs are and what each error costs; the
# threshold follows, and these are the errors that such a user meets on eval. `cost` is relative to the better of
# the two blind decisions (accept all, reject all): **above 1 the detector is worse than not listening**. Where
# `cost` is far above `least possible`, the calibration does not carry over from dev to eval.

# %%
points = {
    use: operating_point(llrs, labels, use, speakers if unit == "speaker" else None, n_bootstrap=n_bootstrap, seed=seed)
    for use in PRESETS
}
tabulate(tables.threshold_table(points))
tabulate(tables.use_table())

# %% [markdown]
# ## What does it cost in front of speaker verification?
#
# A countermeasure guards a speaker verification system, and some spoofs that it lets through fail there. The t-DCF
# counts the two together. The curve says how much room there is around the best threshold (the dots), and the vertical
# line where the threshold of dev lies; what it costs is in the legend.

# %%
if asv is not None:
    rates = measures.asv_error_rates(asv["score"], asv["key"])
    curve = measures.det_points(values, labels)
    costs = {form: measures.tandem_curve(curve, rates, revised=form == "2021") for form in ("2019", "2021")}
    title = f"eval, n = {curve.n_bonafide:,} bona fide + {curve.n_spoof:,} spoof"
    show(plots.tandem_cost(costs, operating_point=threshold, title=title), "tandem")
else:
    print("This corpus comes without speaker verification scores: no t-DCF.")

# %% [markdown]
# ## Who makes the errors?
#
# **Attacks.** The pooled EER hides its parts: each attack against *all* bona fide trials, and its share of the
# errors at dev's threshold. An attack with few trials has a wide interval, and a bar without an interval has too
# few speakers for one.

# %%
tabulate(tables.attack_table(result))
show(plots.attack_bars(tables.attack_rows(result), overall=result["eer"], seen=sorted(seen)), "attacks")

# %% [markdown]
# **Speakers.** A rejected bona fide trial is a real person called a machine. If the rejections sit with a few
# speakers, more data of the same kind will not help, and those people will be rejected again and again. The whiskers
# are Wilson's 95 % intervals for that many trials; with a handful, a speaker's EER moves in steps of tens of percent.

# %%
rejected = compare.rejections(result["by"]["speaker"])
if rejected["n_rejected"].any():
    show(plots.rejections_by_speaker(rejected), "rejections")
else:
    print(f"None of {rejected['n_bonafide'].sum()} bona fide trials of {len(rejected)} speakers is rejected.")
n_shown = min(15, len(result["by"]["speaker"]))
print(f"{n_shown} of {len(result['by']['speaker'])} speakers, those with the highest EER first:")
tabulate(tables.breakdown_table(result, "speaker", worst=n_shown))

# %% [markdown]
# **Length, and the channel where it is known.** Clips are evaluated on their first 4.04 s, shorter ones repeated.
# If short clips fail more often, it is evidence that is missing; if long ones do, look at what fills the first
# seconds.

# %%
for column in columns[1:]:
    tabulate(tables.breakdown_table(result, column))

# %% [markdown]
# ## What makes eval harder than dev?
#
# One threshold, brought from dev to eval: the mean of both error rates goes from the grey bar to the dark one. The
# steps between are exact and add up: what bona fide trials of new speakers add, and what each attack adds, weighted
# by its share of trials. Falling steps (hatched) are attacks that are easier than dev's.

# %%
gap = compare.gap_parts(dev, evaluation, threshold)
show(plots.gap_parts(gap), "gap")
novel = gap.loc[~gap["what"].isin(seen | {"bona fide"}), "part"].sum()
known = gap.loc[gap["what"].isin(seen), "part"].sum()
parts = {"attacks not in training": novel, "attacks in training": known} if seen else {"attacks": novel}
parts |= {"bona fide speech of other speakers": gap["part"][0], "together, from dev to eval": gap["part"].sum()}
tabulate(pd.DataFrame([{"what": what, "points of error": f"{100 * part:+.1f}"} for what, part in parts.items()]))

# %% [markdown]
# ## Did it listen to speech?
#
# In several corpora the label can be guessed without listening: from the silence before the first word, the level,
# the length or the bandwidth. (In ASVspoof 2019 the leading silence alone reaches 15.1 %.) Each bar is the EER of one
# such number, its direction learned on dev. Near 50 % is good news. A low bar is a warning about *every* result on
# this corpus, this one included.

# %%
from deepfake_utils.corpora import division
from deepfake_utils.probing import shortcuts
from deepfake_utils.waveforms import open_source

splits = {"dev": dev, "eval": evaluation}
measured = {name: division.balanced_subset(part, n_measured, seed) for name, part in splits.items()}
numbers = {name: shortcuts.measure(open_source(part)) for name, part in measured.items()}
alone = shortcuts.shortcut_errors(
    numbers["dev"], measured["dev"]["label"], numbers["eval"], measured["eval"]["label"],
    compare.speakers_of(measured["eval"]), n_bootstrap=n_bootstrap, seed=seed,
)
show(plots.eer_bars(alone, title=f"n = {len(measured['eval']):,} eval trials"), "shortcuts")
tabulate(tables.shortcut_table(alone))

# %% [markdown]
# The detector itself is asked the same question: score clips again with the silence at both ends cut off. A
# detector that listens to speech should hardly notice. (A published one went from 3.6 to 15.5 %, arXiv 2106.12914.)

# %%
from deepfake_utils import score_protocol
from deepfake_utils.machine import pick_device
from deepfake_utils.waveforms.trimmed import TrimmedSource

device = pick_device()
n_again = n_rescored or (2000 if device.device.type == "cuda" else 48)
again = division.balanced_subset(evaluation, n_again, seed)
again_numbers = shortcuts.measure(open_source(again))
cut_s = again_numbers["leading_silence_s"] + again_numbers["trailing_silence_s"]
if detector is None:
    print("Left out: this needs weights, and only scores were given.")
else:
    source = TrimmedSource(open_source(again))
    whole = again["score"].to_numpy()
    trimmed = score_protocol(detector, again, source=source, progress="trimmed")["score"].to_numpy()
    show(plots.trimming(whole, trimmed, again["label"].to_numpy(), cut_s.to_numpy()), "trimming")

# %%
trimming = None
if detector is not None:
    pair = {"whole clips": whole, "silence trimmed": trimmed}
    trimming = compare.compare(pair, again["label"], compare.speakers_of(again), n_bootstrap=n_bootstrap, seed=seed)
    tabulate(tables.comparison_table(trimming))
    n_real, n_fake = (int((again["label"] == label).sum()) for label in (BONAFIDE, SPOOF))
    print(f"{n_real} bona fide and {n_fake} spoofed eval clips; {cut_s.mean():.2f} s cut off on average.")

# %% [markdown]
# ## What if the same clips come by another way?
#
# A recording reaches a detector through a telephone, a messenger's codec, a noisy room. How often does it err then, and
# how often at the threshold that was right for the clips as they are? (`n_conditions` clips; by default none, because
# it takes thirteen scorings.)

# %%
from deepfake_utils.probing.robustness import condition_scores, robustness

conditions = None
if detector is not None and n_conditions:
    another_way = division.balanced_subset(evaluation, n_conditions, seed)
    under = condition_scores(detector, open_source(another_way), seed=seed)
    conditions = robustness(under, another_way["label"].to_numpy())
    tabulate(tables.condition_table(conditions))
else:
    print("Left out: set n_conditions for it, and give weights where there are scores only.")

# %% [markdown]
# ## How does the detector see the clips?
#
# The last layer before the decision holds a vector for each clip. In two dimensions: do bona fide clips form one
# group, which attacks lie in it, and do attacks from training lie apart from the new ones? PCA keeps distances and
# loses detail; t-SNE keeps neighbours, and its distances between groups mean nothing.

# %%
from deepfake_utils.probing import model as probing
from deepfake_utils.scoring.score import compute_outputs

if detector is not None:
    detector.to(device.device)
    _, embeddings = compute_outputs(detector, open_source(again), with_embeddings=True, progress="embeddings")
    show(plots.embedding_map(probing.project(embeddings, seed=seed), again["attack"], seen=sorted(seen)), "embeddings")

# %% [markdown]
# ## Which clips are the hardest, and why?
#
# The spoofs that scored highest and the bona fide clips that scored lowest: here a detector is at its most wrong,
# or, if it makes no such error, nearest to one. *Margin* is how far the score lies on the wrong side of dev's threshold
# (negative: on the right side). For each, from top to bottom: the waveform; its spectrogram; the
# score of one-second stretches, each as if it were a recording of its own; and which parts of the time-frequency
# plane push the score down (orange, towards spoof) or up (purple, towards bona fide). Where the colours gather in
# silence, or in one narrow band, the decision rests on something other than speech.
#
# Two cautions. A stretch is repeated up to the evaluated length, and a detector may hear the repetition itself, so
# compare stretches with each other, not with the whole. And the last picture is a gradient: it tells what a *small*
# change of a cell would do, nothing more.

# %%
from IPython.display import Audio, display

from deepfake_utils.waveforms.decode import read_audio

hard = compare.hardest(evaluation, threshold, n_hardest)
shown = hard[["kind", "utterance", "attack", "speaker", "duration_s", "score", "margin"]]
digits = {"score": shown["score"].map("{:.4g}".format), "margin": shown["margin"].map("{:.3g}".format)}
tabulate(shown.assign(**digits).rename(columns={"duration_s": "length (s)"}))
for row in hard.itertuples() if detector is not None else ():
    waveform = read_audio(row.path)
    windows = probing.window_scores(detector, waveform)
    heat = probing.relevance(detector, waveform)
    title = f"{row.kind}: {row.utterance}, {'bona fide' if row.label else row.attack}, speaker {row.speaker}"
    name = row.utterance.replace("/", "_")  # in a plain folder it is a path
    show(plots.clip_under_the_lens(waveform[:CROP_SAMPLES], windows, heat, whole=row.score, threshold=threshold,
                                   title=title), f"hard_{name}")
    display(Audio(waveform, rate=SAMPLE_RATE_HZ))

# %% [markdown]
# ## Would a second opinion help?
#
# Two systems that fail on the same trials add nothing to each other; two that fail on different ones do. Without
# weights of a second system, a quick one stands in: a logistic regression on the mean and spread of cepstral
# coefficients, taught on `train`, which knows nothing of the order of sounds.

# %%
from deepfake_utils import load_model

second_name, second = "", None
if second_weights:
    second_name, other = Path(second_weights).stem, load_model(second_model or None, weights=second_weights)
    second = {name: score_protocol(other, part)["score"].to_numpy() for name, part in measured.items()}
elif "train" in corpus.splits:
    second_name, lesson = "LFCC statistics", division.balanced_subset(corpus.protocol("train"), n_measured, seed)
    baseline = probing.fit_cepstral_baseline(probing.cepstral_statistics(open_source(lesson)), lesson["label"])
    second = {
        name: baseline.decision_function(probing.cepstral_statistics(open_source(part)))
        for name, part in measured.items()
    }
else:
    print("Left out: no train split to teach a second system on, and no second_weights.")

# %%
comparison = None
if second is not None:
    both = {name: np.column_stack([part["score"], second[name]]) for name, part in measured.items()}
    pair_labels = {name: part["label"].to_numpy() for name, part in measured.items()}
    fused, fusion = compare.fuse(both["dev"], pair_labels["dev"], both["eval"], fitted_on=corpus.name)
    second_llrs = fit_calibration(second["dev"], pair_labels["dev"]).llr(second["eval"])
    first_llrs = calibration.llr(both["eval"][:, 0])
    shared = (first_llrs, second_llrs, pair_labels["eval"])
    show(plots.agreement(*shared, names=("this one", second_name), threshold=0.0), "agreement")
    tabulate(tables.agreement_table(compare.agreement(*shared, 0.0), "this one", second_name))

# %% [markdown]
# The difference is paired: both systems see the same draws of speakers, so what makes a draw hard cancels. **Only
# where the interval leaves out 0 is the difference more than chance.** `mean` averages the two calibrated LLRs;
# `logistic` weighs them as dev suggests, which goes wrong when dev's attacks flatter one of the systems.

# %%
if second is not None:
    systems = {"this one": both["eval"][:, 0], second_name: second["eval"]}
    systems |= {f"fusion, {name}": llr for name, llr in fused.items()}
    comparison = compare.compare(
        systems, pair_labels["eval"], compare.speakers_of(measured["eval"]), n_bootstrap=n_bootstrap, seed=seed
    )
    tabulate(tables.comparison_table(comparison))
    print(f"{len(measured['eval'])} eval trials; logistic weights on the raw scores: "
          + " and ".join(f"{slope:.3g}" for slope in fusion.slopes))

# %% [markdown]
# ## What may be said?
#
# Report the EER **with its interval**, the number of speakers, the trimmed-silence row, the worst attack, and the
# error at dev's threshold, which is what a user meets. What the corpus does not hold (other languages, codecs,
# generators made since) none of these numbers covers: a detector with 0.8 % on ASVspoof 2019 has 43 % on
# In-the-Wild.

# %%
from IPython.display import Markdown

notice = demo_notice(corpus)
error_at_dev = (result["p_miss"] + result["p_fa"]) / 2
worst = max(result["per_attack"], key=lambda attack: result["per_attack"][attack]["eer"])
bounds = tables.percent_interval(result["eer_ci"])
lines = [
    f"EER {tables.percent(result['eer'])} % ({bounds} %), {n_speakers} speakers; dev "
    f"{tables.percent(measures.compute_eer(dev['score'], dev['label']).eer)} %",
    f"error at dev's threshold {tables.percent(error_at_dev)} %",
    f"worst attack {worst}: EER {tables.percent(result['per_attack'][worst]['eer'])} %",
    f"best shortcut ({alone.loc[alone['eer'].idxmin(), 'rule']}): EER {tables.percent(alone['eer'].min())} %",
]
if trimming is not None:
    lines.append("EER on {} clips: whole {} %, trimmed {} %".format(len(again), *map(tables.percent, trimming["eer"])))
display(Markdown((f"> {notice}\n\n" if notice else "") + "\n".join(f"- {line}" for line in lines)))

# %%
written = page.write_html(
    results.folder / "report.html", result, asv, title=f"Countermeasure on {corpus.name}", notice=notice
)
print(f"All tables on one page: {written}")

# %%
import json


def plain(table, orient):
    """A table as JSON has it, with null where there is no number."""
    return None if table is None else json.loads(table.to_json(orient=orient))


found = {
    "dev_threshold": threshold, "uses": points, "gap": plain(gap, "records"), "shortcuts": plain(alone, "records"),
    "trimmed": plain(trimming, "index"), "conditions": plain(conditions, "records"),
    "second": plain(comparison, "index"),
}
used = {
    "seed": seed, "scores": scored.scores_from, "weights": scored.weights, "second": second_name,
    "n_dev": len(dev), "n_eval": len(evaluation), "n_rescored": len(again), "n_bootstrap": n_bootstrap,
    "calibration": calibration.to_dict(),
}
results.write(corpus, metrics=result.to_dict() | found, config=used, device=device.device)  # result.json
