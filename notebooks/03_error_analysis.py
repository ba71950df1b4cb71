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
n_hardest: int = 2  # clips of each kind of error to look at
n_bootstrap: int = 1000  # bootstrap replicates of each interval

# %% [markdown]
# ## What is analysed

# %%
import numpy as np
import pandas as pd
from IPython.display import HTML, Audio, Markdown, display

from deepfake_utils.conventions import SAMPLE_RATE_HZ, CheckpointError, CorpusError, ScoreError
from deepfake_utils.corpora import division, find_corpora
from deepfake_utils.demo import DEMO_NOTICE, build_demo
from deepfake_utils.evaluation import compare
from deepfake_utils.files import atomic_write
from deepfake_utils.probing import model as probing
from deepfake_utils.probing import shortcuts
from deepfake_utils.report import page as report
from deepfake_utils.report import plots
from deepfake_utils.waveforms import decode as audio
from deepfake_utils.waveforms import trimmed

run_folder = Path(run_dir or "runs/latest").resolve()
results = run_folder / "03_error_analysis"
try:
    corpus = None if data == "demo" else find_corpora(*([data] if data else []))[0]
except CorpusError as nothing_found:
    if data:
        raise
    print(nothing_found, "\n\nGoing on with the built-in demo corpus.")
    corpus = None
corpus = corpus or build_demo(run_folder.parent / "demo", scale=demo_scale)
notice = DEMO_NOTICE if corpus.name == "demo" else ""
display(Markdown(f"**{corpus.name}** in `{corpus.root}`" + (f"  \n> {notice}" if notice else "")))


# %%
def show(figure, name):
    """Keep the picture beside the results and show it."""
    (results / "figures").mkdir(parents=True, exist_ok=True)
    figure.savefig(results / "figures" / f"{name}.png")
    display(figure)


def tabulate(table):
    """Show a table without its row numbers."""
    display(HTML(table.to_html(index=False, na_rep="-", float_format="{:.2f}".format)))


# %%
import json

from deepfake_utils import load_model, score_protocol
from deepfake_utils.conventions import CROP_SAMPLES
from deepfake_utils.evaluation.scorefile import join_scores, read_scores, write_scores
from deepfake_utils.scoring.score import SCORE_KIND


def find_in(folder, name):
    """A file of a run of notebook 02; with several seeds, of the first."""
    seeds = sorted(folder.glob(f"seed_*/{name}"), key=lambda path: int(path.parent.name[5:]))
    return folder / name if (folder / name).is_file() or not seeds else seeds[0]


# %%
mounted = (place for depth in range(1, 7) for place in sorted(attached.glob("*/" * depth + "02_train")))
places = [Path(train_dir)] if train_dir else [run_folder / "02_train", *mounted]
finished = [place for place in places if (place / "result.json").is_file()]
trained = finished[0] if finished and not (weights or scores) else None
if not (weights or scores or trained):
    looked = ", ".join(map(str, places))
    raise CheckpointError(f"No scores to analyse in {looked}: run notebook 02 into the same run_dir, name its 02_train "
                          "folder as train_dir, or give weights (and weights_model), or a file as scores.")  # fmt: skip
weights_file = weights or (find_in(trained, "best.safetensors") if trained else "")
detector = load_model(weights_model or None, weights=weights_file) if weights_file else None


# %%
def score_file_of(split):
    """Where this split's scores already are, if anywhere."""
    if trained is None:
        return scores
    config = json.loads((trained / "result.json").read_text())["config"]
    file = find_in(trained, f"{split}_scores.csv")
    shortened = "epoch" in read_scores(file).meta and config.get("eval_samples") != CROP_SAMPLES
    return "" if shortened else file  # dev scored on shorter clips, during training, is not comparable with eval


# %%
def scored_trials(split):
    """The trials of a split that have a score; without a score file they are scored here."""
    protocol, file = corpus.protocol(split if split in corpus.splits else "eval"), score_file_of(split)
    part = division.scored_part(protocol, read_scores(file).frame) if file else protocol.head(0)
    if part.empty and detector is None:
        raise ScoreError(f"{file} has no trial of {corpus.name} {split}: give weights, or a file with dev and eval")
    if part.empty:
        file = ""
        part = division.proportional_subset(protocol, n_scored or len(protocol), seed)
        part = join_scores(part, score_protocol(detector, part, progress=split)[["utterance", "score"]])
        write_scores(results / f"{split}_scores.csv", part[["utterance", "score"]], {"score": SCORE_KIND})
    print(f"{split}: {len(part):,} of {len(protocol):,} trials, scores from {file or weights_file}")
    return part


# %%
from tqdm.auto import tqdm

evaluation = scored_trials("eval")
phases = set(evaluation.get("phase", ()))
origin = json.loads((trained / "result.json").read_text())["corpus"] if trained else {}
if "dev" in corpus.splits or origin.get("fingerprint") == corpus.fingerprint():  # or notebook 02 has drawn a dev
    dev = scored_trials("dev")
elif {"progress", "eval"} <= phases:
    dev, evaluation = (
        evaluation[evaluation["phase"] == phase].reset_index(drop=True) for phase in ("progress", "eval")
    )
    print(f"All figures are of phase eval, {len(evaluation):,} trials, as published ones of ASVspoof 2021 are; "
          f"phase progress, {len(dev):,} trials, stands in for dev.")  # fmt: skip
else:
    dev, evaluation = division.split_by_speaker(evaluation, seed)
    print(f"This corpus has no dev split: half of eval, {len(dev):,} trials of other speakers, stands in for it.")

# %%
seen = set(corpus.protocol("train")["attack"]) if "train" in corpus.splits else set()
speakers = compare.speakers_of(evaluation)
paths = tqdm(evaluation["path"], desc="lengths", unit="utt", delay=1, leave=False)
evaluation["duration_s"] = [audio.audio_info(path).duration_s for path in paths]
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
# The threshold is the one at which errors are equal on `dev`. Accuracy and the tables further down are at that
# threshold: it could have been chosen before eval was seen.

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
)  # fmt: skip
tabulate(report.headline_table(result))
unit, n_speakers = result["bootstrap_unit"], result["n_speakers"] or "unknown"
print(f"{result['n_bonafide']:,} bona fide and {result['n_spoof']:,} spoofed trials, {n_speakers} speakers; "
      f"intervals: 95 %, resampled by {unit}. Not one error among so many bona fide trials would still allow a "
      f"true rate of {min(100, 300 / result['n_bonafide']):.1f} %.")  # fmt: skip
if result["eer"] > 0.4:
    print("This detector is hardly better than a coin: read what follows as a tour of the questions, not of answers.")

# %% [markdown]
# ## Scores, and what they are worth as probabilities
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
}), "scores")  # fmt: skip

# %% [markdown]
# If both thresholds on the left lie together, dev told where eval would be. If they lie apart, whoever fixed the
# threshold on dev gets another error rate than the EER: the DET curve below shows where they end up.

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
]))  # fmt: skip

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
tabulate(report.threshold_table(points))
display(Markdown("\n".join(f"- *{use}*: {preset.reasoning}" for use, preset in PRESETS.items())))

# %% [markdown]
# ## In tandem with speaker verification
#
# A countermeasure guards a speaker verification system, and some spoofs that it lets through fail there. The t-DCF
# counts the two together. The curve says how much room there is around the best threshold, and the vertical line
# what the threshold from dev pays.

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
tabulate(report.attack_table(result))
show(plots.attack_bars(report.attack_rows(result), overall=result["eer"], seen=sorted(seen)), "attacks")

# %% [markdown]
# **Speakers.** A rejected bona fide trial is a real person called a machine. If the rejections sit with a few
# speakers, more data of the same kind will not help, and those people will be rejected every time. The whiskers are
# Wilson's 95 % intervals for that many trials; with a handful, a speaker's EER moves in steps of tens of percent.

# %%
rejected = compare.rejections(result["by"]["speaker"])
if rejected["n_rejected"].any():
    show(plots.rejections_by_speaker(rejected), "rejections")
else:
    print(f"None of {rejected['n_bonafide'].sum()} bona fide trials of {len(rejected)} speakers is rejected.")
print(f"The hardest of {len(result['by']['speaker'])} speakers:")
tabulate(report.breakdown_table(result, "speaker", worst=15))

# %% [markdown]
# **Length, and the channel where it is known.** Clips are evaluated on their first 4.04 s, shorter ones repeated.
# If short clips fail more often, it is evidence that is missing; if long ones do, look at what fills the first
# seconds.

# %%
for column in columns[1:]:
    tabulate(report.breakdown_table(result, column))

# %% [markdown]
# ## The generalisation gap, laid out
#
# One threshold, brought from dev to eval: the mean of both error rates goes from the grey bar to the dark one. The
# steps between are exact and add up: what bona fide trials of new speakers add, and what each attack adds, weighted
# by its share of trials. Falling steps (hatched) are attacks that are easier than dev's.

# %%
gap = compare.gap_parts(dev, evaluation, threshold)
show(plots.gap_parts(gap), "gap")
total = gap.attrs["eval_error"] - gap.attrs["dev_error"]
novel = gap.loc[~gap["what"].isin(seen | {"bona fide"}), "part"].sum()
known = gap.loc[gap["what"].isin(seen), "part"].sum()
parts = {"attacks not in training": novel, "attacks in training": known} if seen else {}
parts = parts or {"attacks (training set not known)": novel}
parts = {"dev to eval": total, **parts, "bona fide speech of other speakers": gap["part"][0]}
lines = [f"| {what} | {100 * part:+.1f} |" for what, part in parts.items()]
display(Markdown("\n".join(["| | points of error |", "|---|---|", *lines])))

# %% [markdown]
# ## Did it listen to speech?
#
# In several corpora the label can be guessed without listening: from the silence before the first word, the level,
# the length or the bandwidth. (In ASVspoof 2019 the leading silence alone reaches 15 %.) Each bar is the EER of one
# such number, its direction learned on dev. Near 50 % is good news. A low bar is a warning about *every* result on
# this corpus, this one included.

# %%
from deepfake_utils.waveforms import open_source

splits = {"dev": dev, "eval": evaluation}
measured = {name: division.balanced_subset(part, n_measured, seed) for name, part in splits.items()}
numbers = {name: shortcuts.measure(open_source(part)) for name, part in measured.items()}
shortcuts = shortcuts.shortcut_errors(
    numbers["dev"], measured["dev"]["label"], numbers["eval"], measured["eval"]["label"],
    compare.speakers_of(measured["eval"]), n_bootstrap=n_bootstrap, seed=seed,
)  # fmt: skip
show(plots.eer_bars(shortcuts, title=f"n = {len(measured['eval']):,} eval trials"), "shortcuts")
tabulate(shortcuts.assign(eer=100 * shortcuts["eer"], low=100 * shortcuts["low"], high=100 * shortcuts["high"])
         .rename(columns={"eer": "EER %", "low": "from", "high": "to"}))  # fmt: skip

# %% [markdown]
# The detector itself is asked the same question: score clips again with the silence at both ends cut off. A
# detector that listens to speech should hardly notice. (A published one went from 3.6 to 15.5 %.)

# %%
from deepfake_utils.machine import pick_device

device = pick_device()
n_again = n_rescored or (2000 if device.device.type == "cuda" else 48)
again = division.balanced_subset(evaluation, n_again, seed)
again_numbers = shortcuts.measure(open_source(again))
cut_s = again_numbers["leading_silence_s"] + again_numbers["trailing_silence_s"]
if detector is None:
    print("Left out: this needs weights, and only scores were given.")
else:
    source = trimmed.TrimmedSource(open_source(again))
    trimmed = score_protocol(detector, again, source=source, progress="trimmed")["score"].to_numpy()
    show(plots.trimming(again["score"].to_numpy(), trimmed, again["label"].to_numpy(), cut_s.to_numpy()), "trimming")

# %%
trimming = None
if detector is not None:
    pair = {"whole clips": again["score"].to_numpy(), "silence trimmed": trimmed}
    trimming = compare.compare(pair, again["label"], compare.speakers_of(again), n_bootstrap=n_bootstrap, seed=seed)
    tabulate(report.comparison_table(trimming))
    print(f"{len(again)} eval clips, half of them bona fide, attacks alike; {cut_s.mean():.2f} s cut off on average.")

# %% [markdown]
# ## How the detector sees the clips
#
# The last layer before the decision holds a vector for each clip. In two dimensions: do bona fide clips form one
# group, which attacks lie in it, and do attacks from training lie apart from the new ones? PCA keeps distances and
# loses detail; t-SNE keeps neighbours, and its distances between groups mean nothing.

# %%
from deepfake_utils.scoring.score import compute_outputs

if detector is not None:
    detector.to(device.device)
    _, embeddings = compute_outputs(detector, open_source(again), with_embeddings=True, progress="embeddings")
    show(plots.embedding_map(probing.project(embeddings, seed=seed), again["attack"], seen=sorted(seen)), "embeddings")

# %% [markdown]
# ## The hardest clips
#
# The spoofs that scored highest and the bona fide clips that scored lowest: here a detector is at its most wrong,
# or, if it makes no such error, nearest to one. For each, from top to bottom: the waveform; its spectrogram; the
# score of one-second stretches, each as if it were a recording of its own; and which parts of the time-frequency
# plane push the score down (orange, towards spoof) or up (purple, towards bona fide). Where the colours gather in
# silence, or in one narrow band, the decision rests on something other than speech.
#
# Two cautions. A stretch is repeated up to the evaluated length, and a detector may hear the repetition itself, so
# compare stretches with each other, not with the whole. And the last picture is a gradient: it tells what a *small*
# change of a cell would do, nothing more.

# %%
hard = compare.hardest(evaluation, threshold, n_hardest)
tabulate(hard[["kind", "utterance", "attack", "speaker", "duration_s", "score", "margin"]])
for row in hard.itertuples() if detector is not None else ():
    waveform = audio.read_audio(row.path)
    windows = probing.window_scores(detector, waveform)
    heat = probing.relevance(detector, waveform)
    title = f"{row.kind}: {row.utterance}, {'bona fide' if row.label else row.attack}, speaker {row.speaker}"
    name = row.utterance.replace("/", "_")  # in a plain folder it is a path
    show(plots.clip_under_the_lens(waveform[:CROP_SAMPLES], windows, heat, whole=row.score, threshold=threshold,
                                   title=title), f"hard_{name}")  # fmt: skip
    display(Audio(waveform, rate=SAMPLE_RATE_HZ))

# %% [markdown]
# ## A second opinion
#
# Two systems that fail on the same trials add nothing to each other; two that fail on different ones do. Without
# weights of a second system, a quick one stands in: a logistic regression on the mean and spread of cepstral
# coefficients, taught on `train`, which knows nothing of the order of sounds.

# %%
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
    tabulate(compare.agreement(*shared, 0.0).reset_index(names="class"))

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
    tabulate(report.comparison_table(comparison))
    print(f"{len(measured['eval'])} eval trials; logistic weights on the raw scores: "
          + " and ".join(f"{slope:.3g}" for slope in fusion.slopes))  # fmt: skip

# %% [markdown]
# ## What may be said
#
# Report the EER **with its interval**, the number of speakers, the trimmed-silence row, the worst attack, and the
# error at dev's threshold, which is what a user meets. What the corpus does not hold (other languages, codecs,
# generators made since) none of these numbers covers: a detector with 0.8 % on ASVspoof 2019 has 43 % on
# In-the-Wild.

# %%
from deepfake_utils.machine import describe_machine

error_at_dev = (result["p_miss"] + result["p_fa"]) / 2
worst = max(result["per_attack"], key=lambda attack: result["per_attack"][attack]["eer"])
bounds = report.percent_interval(result["eer_ci"])
lines = [
    f"EER {report.percent(result['eer'])} % ({bounds} %), {n_speakers} speakers; dev "
    f"{report.percent(measures.compute_eer(dev['score'], dev['label']).eer)} %",
    f"error at dev's threshold {report.percent(error_at_dev)} %",
    f"worst attack {worst}: EER {report.percent(result['per_attack'][worst]['eer'])} %",
    f"best shortcut {shortcuts.loc[shortcuts['eer'].idxmin(), 'rule']}: EER {report.percent(shortcuts['eer'].min())} %",
]
if trimming is not None:
    lines.append("EER on {} clips: whole {} %, trimmed {} %".format(len(again), *map(report.percent, trimming["eer"])))
display(Markdown((f"> {notice}\n\n" if notice else "") + "\n".join(f"- {line}" for line in lines)))

# %%
page = report.write_html(
    results / "report.html", result, evaluation[["utterance", "score"]], evaluation.drop(columns="score"),
    asv, title=f"Countermeasure on {corpus.name}", notice=notice,
)  # fmt: skip
extra = {
    "dev_threshold": threshold,
    "uses": points,
    "gap": json.loads(gap.to_json(orient="records")),
    "shortcuts": json.loads(shortcuts.to_json(orient="records")),  # with null where there is no interval
    "trimmed": None if trimming is None else json.loads(trimming.to_json(orient="index")),
    "second": None if comparison is None else json.loads(comparison.to_json(orient="index")),
}
print(f"All tables on one page: {page}")

# %%
result_file = {
    "notebook": "03_error_analysis",
    "corpus": {"name": corpus.name, "kind": corpus.kind, "fingerprint": corpus.fingerprint()},
    "metrics": result.to_dict() | extra,
    "config": {
        "seed": seed, "scores": str(trained or scores or weights), "weights": str(weights_file), "second": second_name,
        "n_dev": len(dev), "n_eval": len(evaluation), "n_rescored": len(again),
        "n_bootstrap": n_bootstrap, "calibration": calibration.to_dict(),
    },
    "machine": describe_machine(device.device),
}  # fmt: skip
with atomic_write(results / "result.json") as part:
    part.write_text(json.dumps(result_file, indent=2))
