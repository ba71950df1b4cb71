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
# # Is the service still hearing what its weights were made for?
#
# A detector is as good as its figures only while recordings are like those the figures are of. This report looks at
# what a service recorded of its verdicts, holds it against the reference that lies beside the weights, and lists what
# clients said and what was decided. `python -m deepfake_utils monitor` renders it.
#
# **A drift is a difference, not an error**: another microphone, another language, a campaign of fakes and a broken
# resampler all look like one. And no alarm only means that nothing was seen in so many recordings.

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
database: str = ""  # database of the service, such as sqlite:///service/records.sqlite
models: str = ""  # folder of the service's weights, with decisions.jsonl
run_dir: str = ""  # folder for results; empty: runs/latest here
days: float = 7.0  # how far back verdicts are looked at, days
false_alarms: float = 0.01  # probability that a report without any drift raises an alarm

# %%
from datetime import UTC, datetime, timedelta

import pandas as pd

from deepfake_utils.notebook import Results, tabulate
from deepfake_utils.report import plots
from deepfake_utils.serving import drift
from deepfake_utils.serving.records import Records
from deepfake_utils.serving.versions import Versions, weights_in_service

results = Results(run_dir, "monitor")
show = results.show  # keeps the picture beside the results, too
records, versions = Records(database), Versions(models)
verdicts = records.verdicts(since=datetime.now(UTC) - timedelta(days=days))
version, weights = weights_in_service(versions)
of_version = verdicts[verdicts["model"] == version] if versions.current else verdicts
print(f"{len(verdicts):,} verdicts in {days:g} days, {len(of_version):,} of them by {version}, now in service.")

# %% [markdown]
# ## What was judged in the last days?
#
# **Real** and **fake** are the verdicts on a recording, and **uncertain** where the weights cannot tell; without enough
# speech there is none. Log-odds above 0 speak for real. The picture has every verdict of the time, whichever weights
# gave it. A jump on the day of a promotion is the new weights; one without is the world.

# %%
if len(verdicts):
    span_days = (verdicts["at"].max() - verdicts["at"].min()).total_seconds() / 86_400
    show(plots.verdicts_over_time(verdicts, "1D" if span_days > 2 else "1h"), "verdicts")
    shares = verdicts.groupby("model")["verdict"].value_counts(normalize=True).unstack(fill_value=0)
    tabulate((100 * shares).add_suffix(" %").reset_index(names="weights"))
else:
    print("No verdicts in this time.")

# %% [markdown]
# ## Do the recordings still resemble those of the reference?
#
# Each curve is a cumulative distribution: at any height, how far apart the two lie is how differently so many of the
# recordings sound. **Distance** is the largest gap, from 0 (alike) to 1. **p** is for the whole report: all tests
# together raise a false alarm with the probability chosen in the parameters, if recordings have nothing to do with each
# other. Those of one client do; where there are many clients, one recording of each is taken.
#
# **Embedding 1**, 2 and so on are what the network's last layer sees of a recording, along the directions in which the
# reference varies most, without those in which the languages it names differ. They move with another microphone, codec
# or synthesiser, but **also with a language that the reference does not name**.

# %%
from deepfake_utils.conventions import DeepfakeUtilsError
from deepfake_utils.report.tables import drift_table

axes = {"score": "log-odds of real speech", "level_db": "level (dB re full scale)",
        "bandwidth_hz": "bandwidth (Hz)", "seconds": "duration (s)"}
report, problem, unheard = None, "", ""
try:
    reference = drift.read_reference(weights)
    chosen, sampled = drift.sample(of_version)
    chosen, unheard = drift.with_embeddings(chosen, records.embeddings(chosen["id"]), reference)
    report = drift.find_drift(reference, chosen, false_alarms)
except DeepfakeUtilsError as error:
    problem = str(error)
if report is None:
    print(f"Drift cannot be judged: {problem}")
else:
    print(f"Tested: {sampled}. Reference: {len(reference):,} recordings, {reference.attrs['made_from']}.")
    tabulate(drift_table(report))
    show(plots.drift_panels(reference, chosen, axes), "drift")
    embedded = {name: name.replace("_", " ") for name in chosen if name.startswith(drift.PREFIX)}
    if embedded:
        languages = ", ".join(reference.attrs["embedding"]["languages"]) or "none: another language may raise an alarm"
        print(f"Languages projected out of the embeddings: {languages}.")
        show(plots.drift_panels(reference, chosen, embedded), "drift_embeddings")
    else:
        print(f"Embeddings were not tested: {unheard}.")

# %%
from IPython.display import Markdown, display

drifted = [] if report is None else report.loc[report["drifted"], "what"].tolist()
words = "not judged" if report is None else f"**drift in {', '.join(drifted)}**" if drifted else "no drift seen"
display(Markdown(f"Result: {words}."))

# %% [markdown]
# ## Who is heard?
#
# A client with most of the recordings decides what the figures above say. The ten with the most:

# %%
by_client = verdicts.groupby("client").agg(
    recordings=("id", "size"), odds=("score", "median"), level=("level_db", "median"),
    silent=("score", lambda scores: 100 * scores.isna().mean()),
)
words = {"odds": "median log-odds", "level": "median level (dB re full scale)", "silent": "without verdict %"}
tabulate(by_client.nlargest(10, "recordings").rename(columns=words).reset_index())

# %% [markdown]
# ## What did clients say?
#
# People report what surprises them, so the share of wrong verdicts among feedback is no error rate. Only confirmed
# feedback is learned from.

# %%
feedback = records.feedback().merge(records.verdicts(), left_on="verdict_id", right_on="id", suffixes=("", "_given"))
feedback["said"] = feedback["truth"].map({"bonafide": "is real", "spoof": "is fake"})
if len(feedback):
    counts = feedback.groupby(["verdict", "said", "confirmed"]).size().rename("recordings").reset_index()
    counts["confirmed"] = counts["confirmed"].map({True: "yes", False: "no"})
    tabulate(counts.rename(columns={"said": "the client says it"}))
else:
    print("No feedback yet.")

# %% [markdown]
# ## What was decided about the weights?

# %%
decisions = [{"when (UTC)": line["at"][:16].replace("T", " "), "event": line["event"],
              "weights": line.get("version", ""), "reasons": "; ".join(line.get("reasons", [])) or "-"}
             for line in versions.history()]
if decisions:
    tabulate(pd.DataFrame(decisions).tail(20))
else:
    print("No decisions yet: the weights that the service was started with are in service.")

# %%
import json

from deepfake_utils.files import atomic_write

found = {"notebook": "monitor", "version": version, "n_verdicts": len(verdicts), "problem": problem, "drifted": drifted,
         "embeddings_not_tested": unheard,
         "tests": [] if report is None else json.loads(report.to_json(orient="records"))}
with atomic_write(results.folder / "result.json") as part:
    part.write_text(json.dumps(found, indent=2), encoding="utf-8")
