"""Calibrate weights: what stands between a trained network and a detector that decides, fitted on dev in one go.

    windows      logit difference -> log-odds, a logistic regression on the windows of whole recordings
    pooling      of `pooling.TRIED`, the one that errs least on dev's recordings and on splices made from them
    recordings   pooled log-odds -> log-odds of the recording, a second logistic regression
    band         for no use: a tenth of the real lies below it and a tenth of the fakes above
    thresholds   for each of `USES`, with the band where they are uncertain (`evaluation.uses`)
    marks        how stretches are marked: the rule that finds most of the fake time when 5 % of the real time is marked

Real speech is heard a second time for the band and the thresholds, as it sounds by messenger, where it is taken for
fake most easily: who is accused wrongly has no use for thresholds that hold for studio sound. Sources and labels count
alike throughout. Nothing is fitted on eval; it is judged there, and the figures go along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from deepfake_utils.augment.codecs import apply_codec, draw_codec
from deepfake_utils.conventions import BONAFIDE, SAMPLE_RATE_HZ, SPOOF, AudioError, CheckpointError, ConfigError
from deepfake_utils.corpora.division import source_of
from deepfake_utils.evaluation import uses
from deepfake_utils.evaluation.calibration import fit_calibration
from deepfake_utils.files import atomic_write
from deepfake_utils.scoring import splices
from deepfake_utils.scoring.detector import USES, Detector
from deepfake_utils.scoring.pooling import TRIED, describe, pool
from deepfake_utils.scoring.verdict import Judged
from deepfake_utils.scoring.weights import read_companion, refuse_shipped_name, weights_file
from deepfake_utils.waveforms.decode import read_audio

REAL_MARKED = 0.05  # share of the real time of dev's splices that may be marked as fake
RULES = ("any", "mean", "all")
UNDECIDED = 0.1  # without a use, of real below the band and of fakes above it, on dev
AS_IT_IS, BY_MESSENGER = "as it is", "Opus 24 kb/s"  # what recordings went through
HEARD_S = 120.0  # of a recording that is sent, at most: an hour would take a gigabyte
MANY = 5  # recordings of a source of which a share is told

Windows = Sequence[Judged]


def calibrate(
    weights: str | os.PathLike,
    dev: pd.DataFrame,
    evaluation: pd.DataFrame | None = None,
    *,
    n_hosts: int = 40,
    most: int = 60,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict:
    """Fit on dev all that turns the logits of weights into decisions, and write it into the JSON beside them.

    Args:
        weights: a .safetensors or .onnx file with its JSON.
        dev, evaluation: protocols; what is fitted on dev is judged on evaluation, if that is given.
        n_hosts: hosts of splices a split (see `splices`); 0 leaves pooling and marks as they are.
        most: recordings of each source and label that are looked at.
        say: where lines of text go.

    Returns:
        What was written: calibration, pooling, marks, uncertain_log_odds, thresholds, uncertain, decisions (figures).

    Raises:
        CheckpointError: the weights have no JSON to write into.
        ConfigError: they are named, such as "phone", and their JSON is the package's; or a number is too small.
        AudioError, CorpusError, ScoreError: recordings cannot be read, or are of one label only.
    """
    if most < 1 or n_hosts < 0:
        raise ConfigError(f"most {most} and n_hosts {n_hosts}: expected at least 1 recording a source and 0 hosts")
    refuse_shipped_name(weights)
    path = weights_file(weights)
    known = read_companion(path)
    if not known:
        raise CheckpointError(f"{path} has no {path.stem}.json beside it, which what is fitted would be written into")
    settings = {"n_hosts": n_hosts, "most": most, "seed": seed}
    facts, _, _ = decide(Detector.load(path), dev, evaluation, pooling=known.get("pooling", TRIED[0]), **settings)
    with atomic_write(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(known | facts, indent=2) + "\n", encoding="utf-8")
    say(summary(facts))
    say(f"written to {path.with_suffix('.json')}")
    return facts


def decide(
    detector: Detector,
    dev: pd.DataFrame,
    evaluation: pd.DataFrame | None = None,
    *,
    n_hosts: int = 40,
    most: int = 60,
    seed: int = 0,
    pooling: dict = TRIED[0],
    wanted: Mapping[str, uses.Use] = USES,
    **material,
) -> tuple[dict, dict[str, list], dict[str, list]]:
    """What `calibrate` writes, and what it is fitted on: judged recordings and judged splices of "dev" and "eval".

    Args:
        detector: of any weights; what it is calibrated with makes no difference.
        pooling: taken where no splices are made to choose one; other arguments as for `calibrate`.
        wanted: uses that get a threshold, by name.
        **material: further arguments of `spliced_recordings`.
    """
    trials = {name: part for name, part in (("dev", dev), ("eval", evaluation)) if part is not None}
    judged = {name: judge_protocol(detector, t, most=most, seed=seed, progress=name) for name, t in trials.items()}
    facts = {"calibration": fit_windows(judged["dev"])}
    judged = {name: [(row, calibrated(w, facts["calibration"])) for row, w in part] for name, part in judged.items()}
    spliced = {}
    for name, part in trials.items() if n_hosts else ():
        judged_splices = splices.judge(detector, splices.spliced_recordings(part, n_hosts, seed=seed, **material))
        spliced[name] = [(recording, calibrated(w, facts["calibration"])) for recording, w in judged_splices]
    tried = {name: pooling_table(judged[name], spliced.get(name, ())) for name in judged}
    pooling = TRIED[tried["dev"]["together"].to_numpy().argmin()] if n_hosts else pooling
    real = dev[dev["label"] == BONAFIDE]
    received = judge_received(detector, real, facts["calibration"], most=most, seed=seed)
    facts |= fit_recordings(judged["dev"], pooling, received.values(), wanted, seed=seed)
    facts["decisions"] = {"pooling_tried": {name: table.to_dict("records") for name, table in tried.items()}}
    facts["decisions"]["real_heard"] = [AS_IT_IS, *received]
    heard = dict(judged)
    if evaluation is not None:
        again = judge_received(detector, evaluation, facts["calibration"], most=most, seed=seed)
        heard |= {f"eval, {way}": part for way, part in again.items() if len({row["label"] for row, _ in part}) == 2}
    facts["decisions"]["verdicts"] = {name: judge_verdicts(part, facts) for name, part in heard.items()}
    facts["decisions"]["uses"] = {name: judge_uses(part, facts, wanted) for name, part in heard.items()}
    if n_hosts:
        facts["marks"] = fit_marks(spliced["dev"], facts["uncertain_log_odds"][0])
        facts["decisions"]["splices"] = {name: describe_splices(part, facts["marks"]) for name, part in spliced.items()}
    return facts, judged, spliced


def judge_protocol(
    detector: Detector,
    protocol: pd.DataFrame,
    *,
    most: int = 60,
    change: Callable[[np.ndarray, int], np.ndarray] | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> list[tuple[dict, Windows]]:
    """The windows of a protocol's recordings, `most` of each source and label; those without speech are left out.

    Args:
        change: what is done to each recording before, (samples, its number) -> samples; None leaves it.

    Returns:
        ({utterance, label, source}, windows) of each recording.

    Raises:
        AudioError: a recording cannot be read.
    """
    trials = protocol.assign(source=source_of(protocol)).sample(frac=1, random_state=seed)
    trials = trials.groupby(["source", "label"]).head(most).sort_index()
    rows = trials[["utterance", "label", "source"]].to_dict("records")

    def recordings() -> Iterator:
        for number, path in enumerate(trials["path"]):
            yield Path(path) if change is None else change(read_audio(path, notes=[]), number)

    judged = []
    bar = tqdm(detector.verdicts(recordings()), progress, len(rows), unit="file", disable=not progress, leave=False)
    for row, verdict in zip(rows, bar, strict=True):
        if isinstance(verdict, AudioError):
            raise verdict
        if verdict.windows:
            judged.append((row, verdict.windows))
    return judged


def judge_received(detector: Detector, protocol: pd.DataFrame, scale: dict, **which) -> dict[str, list]:
    """A protocol's recordings as they are received: the channel's name -> as from `judge_protocol`, calibrated.

    Empty where PyAV is not installed or cannot encode, or no speech is left.
    """
    try:
        opus = draw_codec((1, 1), torch.Generator(), codec="opus", kilobits_per_s=(24,))
    except ConfigError:
        return {}

    def sent(samples: np.ndarray, number: int) -> np.ndarray:
        return apply_codec(torch.from_numpy(samples[: round(HEARD_S * SAMPLE_RATE_HZ)])[None], opus)[0].numpy()

    judged = judge_protocol(detector, protocol, change=sent, progress=BY_MESSENGER, **which)
    judged = [(row, calibrated(windows, scale)) for row, windows in judged]
    return {BY_MESSENGER: judged} if judged else {}


def fit_windows(judged: Iterable[tuple[dict, Windows]]) -> dict:
    """Slope and offset from logit differences of windows to log-odds; sources and labels count alike."""
    table = _recordings(judged)
    weights = uses.balanced_weights(table["label"], table["source"])
    n_windows = table["windows"].map(len).to_numpy()
    differences = [w.logit_bonafide - w.logit_spoof for windows in table["windows"] for w in windows]
    labels, weights = np.repeat(table["label"], n_windows), np.repeat(weights / n_windows, n_windows)
    fitted = fit_calibration(differences, labels, weights=weights)
    return {"slope": fitted.slopes[0], "offset": fitted.intercept}


def calibrated(windows: Windows, scale: dict) -> tuple[Judged, ...]:
    """The same windows with log-odds of this slope and offset."""
    return tuple(
        replace(w, log_odds=scale["slope"] * (w.logit_bonafide - w.logit_spoof) + scale["offset"]) for w in windows
    )


def pooling_table(judged: Iterable[tuple[dict, Windows]], spliced: Iterable[tuple[splices.Spliced, Windows]]):
    """What every pooling tried comes to, as fractions; the least `together`, their mean, is best.

    Columns: pooling, in words; recordings: EER of recordings, sources balanced; splices: EER of splices against their
    controls; long_rejected: untouched hosts that lie below the threshold of the first, which is of shorter recordings:
    what asks for the most fake of many windows finds something in everybody who speaks for long.
    """
    table, rows = _recordings(judged), []
    weights = uses.balanced_weights(table["label"], table["source"])
    parts = pd.DataFrame([(r.kind, w) for r, w in spliced if w], columns=["kind", "windows"])
    for pooling in TRIED:
        pooled = np.array([_pooled(windows, pooling) for windows in table["windows"]])
        eer, threshold = uses.balanced_eer_threshold(pooled, table["label"], weights)
        row = {"pooling": describe(pooling), "recordings": eer}
        if len(parts):
            of = {
                kind: np.array([_pooled(w, pooling) for w in part]) for kind, part in parts.groupby("kind")["windows"]
            }
            labels = np.repeat([BONAFIDE, SPOOF], [len(of["control"]), len(of["fake"])])
            row["splices"] = uses.balanced_eer_threshold(np.r_[of["control"], of["fake"]], labels)[0]
            row["long_rejected"] = float((of["host"] < threshold).mean())
            row["together"] = float(np.mean([row["recordings"], row["splices"], row["long_rejected"]]))
        rows.append(row)
    return pd.DataFrame(rows)


def fit_recordings(
    judged: Sequence[tuple[dict, Windows]],
    pooling: dict,
    received: Iterable = (),
    wanted: Mapping[str, uses.Use] = USES,
    *,
    seed: int = 0,
) -> dict:
    """Pooling with its scale, the uncertain band without a use, thresholds and bands of all uses.

    Args:
        received: lists like `judged` of real recordings after a channel; on none of them do more than `UNDECIDED` lie
            below the band, and a threshold's cost counts them as well, as a part of the recording they were.
        wanted: uses that get a threshold, by name.
        seed: of the draws of sources that bands are made from.
    """
    table = _recordings(judged)
    pooled = np.array([_pooled(windows, pooling) for windows in table["windows"]])
    weights = uses.balanced_weights(table["label"], table["source"])
    fitted = fit_calibration(pooled, table["label"], weights=weights)
    log_odds = fitted.llr(pooled)
    names = {name: pooling[name] for name in ("name", "share", "temperature") if name in pooling}
    scaled = names | {"slope": fitted.slopes[0], "offset": fitted.intercept}
    heard = [recording_log_odds(part, scaled) for part in (judged, *received)]
    fakes = (table["label"] == SPOOF).to_numpy()
    low = min(_lowest_real(part) for part in heard)
    high = _quantile(log_odds[fakes], weights[fakes], 1 - UNDECIDED)
    band = [low, high] if low < high else [(low + high) / 2] * 2
    dev = pd.concat(heard)
    shares = 1 / dev.groupby(["utterance", "label", "source"])["label"].transform("size")
    trials = dev["log_odds"], dev["label"], dev["source"]
    thresholds = {name: uses.fit_threshold(*trials, use, shares=shares, seed=seed) for name, use in wanted.items()}
    return {
        "pooling": scaled,
        "uncertain_log_odds": band,
        "thresholds": {name: fit.threshold for name, fit in thresholds.items()},
        "uncertain": {name: [fit.low, fit.high] for name, fit in thresholds.items()},
    }


def recording_log_odds(judged: Iterable[tuple[dict, Windows]], pooling: dict) -> pd.DataFrame:
    """utterance, label, source and log_odds of each recording."""
    table = _recordings(judged)
    pooled = np.array([_pooled(windows, pooling) for windows in table["windows"]])
    return table.assign(log_odds=pooling.get("slope", 1.0) * pooled + pooling.get("offset", 0.0))


def judge_verdicts(judged: Iterable[tuple[dict, Windows]], facts: dict) -> dict:
    """How often real recordings and fakes are called what, by the verdicts that are given where no use is named.

    Returns:
        "real" and "fake" -> called_real, uncertain, called_fake (fractions, sources weighed as in
        `uses.balanced_weights`), and worst_source, the largest share of the wrong word in a source of `MANY` recordings
        or more, None where there is none.
    """
    table, (low, high) = recording_log_odds(judged, facts["pooling"]), facts["uncertain_log_odds"]
    word = np.select([table["log_odds"] < low, table["log_odds"] < high], ["called_fake", "uncertain"], "called_real")
    weights = uses.balanced_weights(table["label"], table["source"])
    found = {}
    for name, label, wrong in (("real", BONAFIDE, "called_fake"), ("fake", SPOOF, "called_real")):
        own = (table["label"] == label).to_numpy()
        shares = {w: float(weights[own & (word == w)].sum()) for w in ("called_real", "uncertain", "called_fake")}
        by_source = pd.Series(word[own] == wrong).groupby(table["source"][own].to_numpy()).agg(["mean", "size"])
        worst = by_source.loc[by_source["size"] >= MANY, "mean"].max()
        found[name] = shares | {"worst_source": None if np.isnan(worst) else float(worst)}
    return found


def judge_uses(judged: Iterable[tuple[dict, Windows]], facts: dict, wanted: Mapping[str, uses.Use] = USES) -> dict:
    """What the thresholds of uses cost on these recordings, see `uses.judge_threshold`."""
    table = recording_log_odds(judged, facts["pooling"])
    trials = (table["log_odds"], table["label"], table["source"])
    return {
        name: uses.judge_threshold(
            *trials, use, uses.FittedThreshold(facts["thresholds"][name], *facts["uncertain"][name])
        )
        for name, use in wanted.items()
    }


def fit_marks(spliced: Sequence[tuple[splices.Spliced, Windows]], at_most: float = np.inf) -> dict:
    """The rule and bound of log-odds that find most of the fake time where 5 % of the real time is marked.

    Args:
        at_most: the bound is no higher: below it a whole recording is called fake, and above it no part of one should.
    """
    values = np.unique([w.log_odds for _, windows in spliced for w in windows])
    values = np.r_[values[values < at_most], min(at_most, values[-1])]
    best = {}
    for rule in RULES:
        low, high = 0, len(values) - 1
        while low < high:  # what is marked grows with the bound
            middle = (low + high + 1) // 2
            marked = splices.found(spliced, float(values[middle]), rule).iloc[-1]["real_marked"]
            low, high = (middle, high) if marked <= REAL_MARKED else (low, middle - 1)
        share = splices.found(spliced, float(values[low]), rule).iloc[-1]["fake_found"]
        best[rule] = (share, float(values[low]))
    rule = max(best, key=best.get)
    return {"below": best[rule][1], "rule": rule}


def describe_splices(spliced: Sequence[tuple[splices.Spliced, Windows]], marks: dict) -> list[dict]:
    """One row a length of insert: EER of windows, share of the fake time found and of the real time marked."""
    marked = splices.found(spliced, marks["below"], marks["rule"])
    table = splices.window_eers(spliced).merge(marked, on="insert_s", how="right")
    return table.astype(object).where(table.notna(), None).to_dict("records")


def summary(facts: dict) -> str:
    """The fitted decisions and their figures, for a terminal."""
    lines = [f"pooling  {describe(facts['pooling'])}; calibration slope {facts['calibration']['slope']:.3f}, "
             f"offset {facts['calibration']['offset']:+.3f}"]  # fmt: skip
    for split, table in facts["decisions"]["pooling_tried"].items():
        lines += [f"EER {split}: " + "; ".join(
            f"{row['pooling']} " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in row.items() if k != "pooling")
            for row in table
        )]  # fmt: skip
    low, high = facts["uncertain_log_odds"]
    channels = " and by ".join(facts["decisions"]["real_heard"])
    lines.append(f"no use: fake below {low:+.2f}, real from {high:+.2f}; real speech of dev was heard {channels}")
    for split, table in facts["decisions"]["verdicts"].items():
        for name, row in table.items():
            shares = ", ".join(f"{w.replace('_', ' ')} {100 * row[w]:.1f} %" for w in list(row)[:3])
            worst = "-" if row["worst_source"] is None else f"{100 * row['worst_source']:.0f} %"
            lines.append(f"{split} no use: {name} recordings {shares}; wrong at most, of one source: {worst}")
    for split, table in facts["decisions"]["uses"].items():
        for name, row in table.items():
            lines.append(
                f"{split} {name}: threshold {row['threshold']:+.2f} ({row['uncertain'][0]:+.2f} to "
                f"{row['uncertain'][1]:+.2f}), real rejected {100 * row['real_rejected']:.1f} %, fake accepted "
                f"{100 * row['fake_accepted']:.1f} %, cost {row['cost']:.4g} of {row['blind']:.4g}"
            )
    for split, rows in facts["decisions"].get("splices", {}).items():
        for row in rows:
            eer = "-" if row["eer"] is None else f"{100 * row['eer']:.1f} %"
            marked = f"{100 * row['fake_found']:.1f} %, real time marked {100 * row['real_marked']:.1f} %"
            lines.append(f"{split} inserts of {row['insert_s']} s: EER {eer}, fake time found {marked}")
    return "\n".join(lines)


def _recordings(judged: Iterable[tuple[dict, Windows]]) -> pd.DataFrame:
    return pd.DataFrame([row | {"windows": windows} for row, windows in judged])


def _pooled(windows: Windows, pooling: dict) -> float:
    return pool([w.log_odds for w in windows], pooling)


def _lowest_real(table: pd.DataFrame) -> float:
    """The log-odds below which `UNDECIDED` of the real recordings lie, sources counting alike."""
    weights, real = uses.balanced_weights(table["label"], table["source"]), (table["label"] == BONAFIDE).to_numpy()
    return _quantile(table["log_odds"].to_numpy()[real], weights[real], UNDECIDED)


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    order = np.argsort(values)
    return float(np.interp(share, np.cumsum(weights[order]) - weights[order] / 2, values[order]))
