"""Targets: one trained countermeasure fitted to a kind of machine, with the card that says what is left of it.

    server   the weights as they are, float32
    laptop   INT8: the fastest on a processor that has what it takes
    phone    weights in float16, computed in float32: the same numbers in every engine, a browser's too; at most 1 MB,
             and 10 ms a window of 4.04 s on one core
    tiny     INT8; at most 100 kB: for a narrower network than the others

`build` makes the file and its card, a JSON beside it, which a `Detector` reads the calibration from. Error rates are of
the first 64,600 samples of at most `PER_FAMILY` recordings of each family of each source, so that none outweighs the
others, with intervals by source: what comes from one source rises and falls together.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from deepfake_utils.conventions import BONAFIDE, CROP_SAMPLES, ConfigError
from deepfake_utils.evaluation.calibration import fit_calibration
from deepfake_utils.evaluation.intervals import bootstrap, eer_metric, paired_difference
from deepfake_utils.files import atomic_write
from deepfake_utils.scoring.onnx import OnnxScorer, export_onnx
from deepfake_utils.scoring.published import recognise, sha256_of
from deepfake_utils.scoring.quantise import compact, half_weights, layer_errors, log_odds, quantise
from deepfake_utils.scoring.weights import ASSETS, load_model, read_companion, score_kind, weights_file
from deepfake_utils.waveforms.decode import fit_length, read_audio

PER_FAMILY = 20  # recordings of each family of each source that are evaluated
N_RANGES = 64  # windows of train over which the ranges of activations are taken
N_RANGES_ALONE = 16  # where a layer is quantised alone, to rank it
N_CHECKED = 64  # windows of dev on which each layer is quantised alone
MAX_RMS = 0.06  # of the difference of a log-odds: more layers stay float until it is no more
# what `calibrate` fits, and how that is judged
DECIDED = ("calibration", "pooling", "uncertain_log_odds", "thresholds", "uncertain", "marks", "decisions")
MAX_LOSS = 0.005  # of EER, that quantisation may cost
UNSURE = 0.1  # share of either class that may lie on the wrong side of the uncertain band


@dataclass(frozen=True)
class Target:
    """What a kind of machine has room and time for; None is no limit."""

    numbers: str  # "float32", "float16" or "int8"
    max_bytes: int | None = None
    max_ms: float | None = None  # a window of 4.04 s on one core


TARGETS = {
    "server": Target("float32"),
    "laptop": Target("int8"),
    "phone": Target("float16", 1_000_000, 10.0),
    "tiny": Target("int8", 100_000, 10.0),
}


def build(
    name: str,
    weights: str | os.PathLike,
    protocols: Mapping[str, pd.DataFrame],
    out: str | os.PathLike,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Make a target's file and card from trained weights.

    Args:
        name: one of `TARGETS`.
        weights: as `load_model` takes them.
        protocols: "train", from which the ranges of activations are taken; "dev", where layers are chosen and scores
            calibrated; "eval", which is only reported. With a column source, families of each source count alike.
        out: the .onnx file to write; the card is the .json beside it.
        say: is told what is under way.

    Returns:
        The card.

    Raises:
        ConfigError: unknown target, no .onnx to write to, or the file is larger than the target allows.
    """
    if name not in TARGETS or Path(out).suffix != ".onnx":
        raise ConfigError(f"target {name!r} in {out}: expected one of {', '.join(TARGETS)}, and a file ending in .onnx")
    target, out = TARGETS[name], Path(out)
    refuse_companion_of_others(out)
    source = weights_file(weights)
    model = load_model(weights=source)
    trials = {split: few_a_family(protocols[split]) for split in ("dev", "eval")}
    waveforms = {split: windows_of(rows) for split, rows in trials.items()}
    with tempfile.TemporaryDirectory() as folder:
        exported = export_onnx(model, Path(folder) / "exported.onnx")
        if target.numbers == "int8":
            ranges = windows_of(few_a_family(protocols["train"], 1).sample(frac=1, random_state=0)[:N_RANGES])
            quantisation = _quantised(exported, out, ranges, waveforms["dev"], say)
        else:
            quantisation = {}
            (half_weights if target.numbers == "float16" else compact)(exported, out)
        before = {split: log_odds(exported, waveforms[split]) for split in trials}
    after = {split: log_odds(out, waveforms[split]) for split in trials}
    known = read_companion(source)
    card = {key: known[key] for key in ("format", "loss", "trained_on", "caution") if key in known}
    card |= {"model": known.get("model"), "score": score_kind(model), **_calibration(after["dev"], trials["dev"])}
    card |= {"target": name, "numbers": target.numbers, **quantisation, "bytes": out.stat().st_size}
    card |= {"ms_a_window": milliseconds(OnnxScorer(out)), "processor": processor()}
    card |= {"parameters": sum(p.numel() for p in model.parameters()), "made_from": sha256_of(source.read_bytes())}
    card["eer"] = {split: error_rate(after[split], rows) for split, rows in trials.items()}
    card["eer_float32"] = {split: error_rate(before[split], rows) for split, rows in trials.items()}
    card["eer_lost"] = {split: _lost(after[split], before[split], rows) for split, rows in trials.items()}
    if target.numbers != "int8":  # the same numbers as before, and so the same decisions
        card |= {name: known[name] for name in DECIDED if name in known}
    card["misses"] = misses(card)
    with atomic_write(out.with_suffix(".json")) as part:
        part.write_text(json.dumps(card, indent=2) + "\n")
    return card


def refuse_companion_of_others(out: str | os.PathLike, weights: str | os.PathLike | None = None) -> None:
    """Raise ConfigError where the JSON beside the ONNX file `out` would be, or is, that of other weights.

    Args:
        weights: what is exported as it is; its own JSON says the same and may stay.
    """
    out = Path(out)
    for suffix in (".safetensors", ".pth", ".pt"):
        other = out.with_suffix(suffix)
        if other.is_file() and not (weights and weights_file(weights).samefile(other)):
            raise ConfigError(f"{out.with_suffix('.json')} belongs to {other}: write {out.name} under another name")


def write_companion(out: str | os.PathLike, weights: str | os.PathLike) -> None:
    """Keep beside an ONNX file what is known of the weights that it holds: calibration, thresholds, caution."""
    source, companion = weights_file(weights), Path(out).with_suffix(".json")
    facts = {name: value for name, value in read_companion(source).items() if name not in ("model", "model_options")}
    if published := recognise(source):
        facts |= {"trained_on": published.trained_on, "caution": published.caution}
    # What an earlier export left beside the file is not true of this one.
    if (facts or companion.exists()) and companion != source.with_suffix(".json"):
        with atomic_write(companion) as part:
            part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def misses(card: Mapping) -> list[str]:
    """What a card says that its target does not allow, in words."""
    target, lost = TARGETS[card["target"]], card["eer_lost"]["eval"]["value"]
    found = []
    if target.max_bytes and card["bytes"] > target.max_bytes:
        found.append(f"{card['bytes']:,} bytes, allowed {target.max_bytes:,}")
    if target.max_ms and card["ms_a_window"] > target.max_ms:
        found.append(f"{card['ms_a_window']:.1f} ms a window on {card['processor']}, allowed {target.max_ms:g}")
    if lost > MAX_LOSS:
        found.append(f"{100 * lost:.2f} points of EER lost to {card['numbers']}, allowed {100 * MAX_LOSS:g}")
    return found


def read_card(name: str) -> dict:
    """The card of a target that is shipped with the package; ConfigError where there is none."""
    path = ASSETS / f"{name}.json"
    if name not in TARGETS or not path.is_file():
        raise ConfigError(f"no target {name!r} is shipped: make one with `python -m deepfake_utils export`")
    return json.loads(path.read_text(encoding="utf-8"))


def few_a_family(protocol: pd.DataFrame, n: int = PER_FAMILY) -> pd.DataFrame:
    """At most n recordings of each family (attack) of each source, the same every time, in protocol order."""
    by = [column for column in ("source", "attack") if column in protocol]
    return protocol.sample(frac=1, random_state=0).groupby(by, sort=False).head(n).sort_index()


def windows_of(protocol: pd.DataFrame) -> np.ndarray:
    """The first 64,600 samples of each recording: (N, 64600) float32."""
    return np.stack([fit_length(read_audio(path), CROP_SAMPLES) for path in protocol["path"]])


def error_rate(scores: np.ndarray, protocol: pd.DataFrame) -> dict:
    """EER with its 95 % interval: value, low, high, trials, and unit, that of which whole ones were resampled."""
    unit, clusters = _clusters(protocol)
    found = bootstrap(eer_metric, scores, protocol["label"], clusters, progress=False)
    return _as_dict(found) | {"trials": len(protocol), "unit": unit}


@torch.inference_mode()
def milliseconds(scorer: Callable, n: int = 40) -> float:
    """Median processor time of a window of 4.04 s on this thread, in milliseconds; what else runs counts little."""
    window = 0.1 * torch.randn(1, CROP_SAMPLES, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(n + 5):
        start = time.thread_time()
        scorer(window)
        times.append(time.thread_time() - start)
    return 1000 * float(np.median(times[5:]))


def _quantised(exported: Path, out: Path, ranges: np.ndarray, dev: np.ndarray, say: Callable[[str], None]) -> dict:
    """Quantise all layers but those that do the most harm; which, and what each does, goes on the card."""
    checked = dev[np.linspace(0, len(dev) - 1, min(N_CHECKED, len(dev))).astype(int)]
    table = layer_errors(exported, ranges[:N_RANGES_ALONE], checked, lambda layer: say(f"quantising {layer}"))
    expected, kept = log_odds(exported, checked), []
    for layer in (None, *table["layer"][:-1]):
        kept += [layer] if layer else []
        quantise(exported, out, ranges, keep_float=kept)
        rms = float(np.sqrt(np.mean((log_odds(out, checked) - expected) ** 2)))
        say(f"{len(kept)} layers kept float: log-odds differ by {rms:.3f}")
        if rms <= MAX_RMS:
            break
    half_weights(out, out)  # what stayed float
    return {
        "kept_float": kept, "ranges_from": f"{len(ranges)} windows of train", "log_odds_rms": rms,
        "rms_of_each_layer_alone": dict(zip(table["layer"], table["rms"].round(5).tolist(), strict=True)),
    }  # fmt: skip


def _calibration(scores: np.ndarray, protocol: pd.DataFrame) -> dict:
    """Slope and offset fitted on dev, and the band where errors are frequent."""
    labels = protocol["label"].to_numpy()
    fitted = fit_calibration(scores, labels)
    llr = fitted.llr(scores)
    band = np.quantile(llr[labels == BONAFIDE], UNSURE), np.quantile(llr[labels != BONAFIDE], 1 - UNSURE)
    calibration = {"slope": fitted.slopes[0], "offset": fitted.intercept}
    return {"calibration": calibration, "uncertain_log_odds": [float(min(band)), float(max(band))]}


def _lost(after: np.ndarray, before: np.ndarray, protocol: pd.DataFrame) -> dict:
    """How much higher the EER is than before, with the interval of the paired difference."""
    clusters = _clusters(protocol)[1]
    return _as_dict(paired_difference(eer_metric, after, before, protocol["label"], clusters, n=500, progress=False))


def _clusters(protocol: pd.DataFrame) -> tuple[str, pd.Series | None]:
    if "source" in protocol and protocol.groupby("label")["source"].nunique().min() > 1:
        return "source", protocol["source"]
    return "recording", None


def _as_dict(interval) -> dict:
    return {name: float(value) for name, value in interval._asdict().items()}


def processor() -> str:
    """The processor's name, as Linux or else Python knows it."""
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
