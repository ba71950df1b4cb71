"""Whether what a service hears is still what its weights were made for: two-sample tests against a reference.

Kolmogorov and Smirnov's test asks of each number whether two samples can be of one distribution, Fisher's whether
recordings without a verdict are as frequent. What the network's last layer sees of a recording is a few numbers more,
where the reference has them (see `embeddings`). All p-values are multiplied by their number (Bonferroni), so the false
alarm rate is that of the whole report, whatever the numbers have to do with each other. A drift says that something is
different, not that verdicts are wrong; no alarm says that nothing was seen in a sample of this size.

The rate holds for recordings that have nothing to do with each other. Those of one client do, so where there are many
clients one recording of each is taken.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from threading import Event

import numpy as np
import pandas as pd
from scipy.stats import fisher_exact, ks_2samp

from deepfake_utils.conventions import ConfigError, ScoreError
from deepfake_utils.corpora.division import proportional_subset
from deepfake_utils.files import atomic_write
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.serving.embeddings import PREFIX, as_numbers, fit_projection
from deepfake_utils.serving.scorer import InService, listen_to

NUMBERS = {"score": "score", "level_db": "level", "bandwidth_hz": "bandwidth", "seconds": "duration"}
NO_VERDICT = "no verdict"
FALSE_ALARMS = 0.01  # of whole reports without drift
MANY_CLIENTS = 50  # from so many on, a client is the unit and not a recording
MOST = 2000  # recordings of a stream that are looked at: of a million, any trifle would be significant
DIGITS, FEW_DIGITS = 8, 3  # of the numbers of a reference; its bandwidths have seven, embeddings are many
FEWEST = 20  # below this a test could hardly see anything


def reference_file(weights: str | os.PathLike) -> Path:
    """Where the reference of a weights file lies: beside it."""
    return Path(weights).with_suffix(".reference.json")


def make_reference(detector: Detector, protocol: pd.DataFrame, *, n: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Measure recordings as the service does, for later comparison.

    Args:
        detector: what will be in service.
        protocol: trials like those the service is meant for, whose weights have not seen them: dev, better than train.
        n: trials drawn at most, bona fide and each attack in proportion.
        seed: of the draw.

    Returns:
        label, the columns of NUMBERS and embedding_1, ..., one row a trial; no score where the detector gives no
        verdict. `.attrs["embedding"]` says how the latter were got, as `embeddings.fit_projection`; None where the
        detector's network does not tell embeddings.

    Raises:
        AudioError: a recording cannot be read.
    """
    rows, by, drawn = [], InService(detector, ""), proportional_subset(protocol, n, seed)
    for trial in drawn.itertuples():
        with open(trial.path, "rb") as file:
            rows.append({"label": trial.label, **listen_to(file, by, math.inf, Event()).columns})
    measured = pd.DataFrame(rows)
    table = measured[["label", *NUMBERS]].astype({"score": float})
    projection = fit_projection(measured["embedding"].tolist(), drawn)
    if projection:
        table = table.join(as_numbers(measured["embedding"], projection))
    table.attrs["embedding"] = projection
    return table


def write_reference(weights: str | os.PathLike, reference: pd.DataFrame, made_from: str) -> Path:
    """Keep a reference beside its weights. made_from: the corpus, in words."""
    columns = {name: [_shortened(value, name) for value in values.tolist()] for name, values in reference.items()}
    columns["embedding"] = reference.attrs.get("embedding")
    path = reference_file(weights)
    with atomic_write(path) as part:
        part.write_text(json.dumps({"made_from": made_from, **columns}, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _shortened(value: float, name: str) -> float | None:
    return None if pd.isna(value) else float(f"{value:.{FEW_DIGITS if name.startswith(PREFIX) else DIGITS}g}")


def read_reference(weights: str | os.PathLike) -> pd.DataFrame:
    """The reference beside a weights file, as `make_reference` gave it; `.attrs["made_from"]` says what it is of.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = reference_file(weights)
    advice = f"make one: deepfake-utils reference {weights} --data FOLDER, a corpus of what they are meant for"
    try:
        columns = json.loads(path.read_text(encoding="utf-8"))
        made_from, projection = columns.pop("made_from"), columns.pop("embedding", None)
        expected = [*NUMBERS, *(as_numbers([], projection) if projection else ())]
        table = pd.DataFrame(columns).astype({name: float for name in expected})
    except FileNotFoundError:
        raise ConfigError(f"{path}: these weights have no reference to compare with; {advice}") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or no reference ({error!r}); {advice}") from None
    table.attrs |= {"made_from": made_from, "embedding": projection}
    return table


def with_embeddings(stream: pd.DataFrame, embeddings: pd.Series, reference: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Verdicts with the numbers of their embeddings, as the reference has them.

    Args:
        stream: verdicts, as `Records.verdicts` gives them.
        embeddings: theirs, as `Records.embeddings` gives them.
        reference: from `read_reference`.

    Returns:
        The stream with the columns embedding_1, ..., and ""; or as it was, and why it has none, in words.
    """
    projection = reference.attrs.get("embedding")
    if not projection:
        return stream, "the reference has none: make it anew with deepfake-utils reference"
    if embeddings.empty:
        return stream, "these verdicts were recorded without, by an older version or a network that does not tell them"
    numbers = as_numbers([embeddings.get(id) for id in stream["id"]], projection).set_axis(stream.index)
    if numbers.isna().all(axis=None):
        return stream, f"they are not the {len(projection['centre'])} numbers of the reference: it is of other weights"
    return stream.join(numbers), ""


def sample(verdicts: pd.DataFrame, seed: int = 0) -> tuple[pd.DataFrame, str]:
    """The recordings to be tested, and what they are in words: one a client where there are many, and not too many.

    verdicts: with a column client, as `Records.verdicts` gives them.
    """
    shuffled, unit = verdicts.sample(frac=1, random_state=seed), "recording"
    if verdicts["client"].nunique() >= MANY_CLIENTS:
        shuffled, unit = shuffled.drop_duplicates("client"), "client"
    chosen = shuffled.head(MOST)
    return chosen, f"{len(chosen):,} of {len(verdicts):,} recordings, one a {unit}"


def find_drift(reference: pd.DataFrame, stream: pd.DataFrame, false_alarms: float = FALSE_ALARMS) -> pd.DataFrame:
    """Test whether a stream of recordings is like the reference.

    Args:
        reference, stream: with the columns of NUMBERS, and embedding_1, ... where both have them; a recording without a
            verdict has no score.
        false_alarms: probability, in (0, 1), that a report without any drift shows one.

    Returns:
        what, n_reference, n, before and now (medians; shares for "no verdict"), distance (the largest one between the
        two cumulative distributions; the difference of the shares), p (for the whole report), drifted.

    Raises:
        ConfigError: false_alarms is no probability.
        ScoreError: there are fewer than 20 recordings on a side.
    """
    if not 0 < false_alarms < 1:
        raise ConfigError(f"false_alarms is {false_alarms}: expected a probability, above 0 and below 1, such as 0.01")
    if min(len(reference), len(stream)) < FEWEST:
        raise ScoreError(
            f"{len(reference):,} recordings in the reference and {len(stream):,} in the stream: expected at least "
            f"{FEWEST} in each to see a drift; wait for more, or look further back"
        )
    embedded = {name: name.replace("_", " ") for name in reference if name.startswith(PREFIX) and name in stream}
    numbers = (NUMBERS | embedded).items()
    rows = [_compare_numbers(words, reference[name], stream[name]) for name, words in numbers]
    rows.append(_compare_shares(reference["score"].isna(), stream["score"].isna()))
    table = pd.DataFrame(rows)
    table["p"] = (table["p"] * table["p"].notna().sum()).clip(upper=1)
    return table.assign(drifted=table["p"] < false_alarms)


def _compare_numbers(what: str, before: pd.Series, now: pd.Series) -> dict:
    before, now = before.dropna(), now.dropna()
    enough = min(len(before), len(now)) >= FEWEST  # of the scores there may be few
    found = ks_2samp(before, now, method="asymp") if enough else None  # the exact one takes seconds at some sizes
    distance, p = (float(found.statistic), float(found.pvalue)) if found else (np.nan, np.nan)
    medians = {"before": before.median(), "now": now.median()}
    return {"what": what, "n_reference": len(before), "n": len(now), **medians, "distance": distance, "p": p}


def _compare_shares(before: pd.Series, now: pd.Series) -> dict:
    table = [[int(side.sum()), int((~side).sum())] for side in (before, now)]
    shares = {"before": before.mean(), "now": now.mean(), "distance": abs(now.mean() - before.mean())}
    return {
        "what": NO_VERDICT, "n_reference": len(before), "n": len(now), **shares, "p": float(fisher_exact(table).pvalue),
    }  # fmt: skip
