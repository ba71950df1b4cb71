"""How well weights tell fake from real speech outside of the corpus they learned from, by family and by collection.

    python tests/benchmarks/open_speech.py --data FOLDER --weights deepfake_utils/assets/open.safetensors aasist

FOLDER is what `deepfake-utils collect` filled, or any corpus with the column `source` in its manifest. Scored are the
first 64,600 samples of up to `--per-family` recordings of a family or, of real speech, of a source, chosen by a hash of
their names. "Pooled" is the EER over all of them; "macro" the mean over families, each against the split's real speech.
Intervals are over sources. `--robust` adds what codecs, noise, rooms and speed do; `--json` writes the figures.
`--verdicts N` prints instead how often up to N recordings of each family are called fake, uncertain and real by the
calibration that lies beside the weights, as they are and after those changes.

    python tests/benchmarks/open_speech.py --data FOLDER --shortcuts 2000

prints instead what single numbers tell of the label in so many training recordings: drawn evenly, drawn balanced within
each source, and so drawn and augmented.
"""

import argparse
import hashlib
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from deepfake_utils.augment import build_augmentation
from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ
from deepfake_utils.corpora import find_corpora
from deepfake_utils.evaluation.intervals import eer_metric, interval_or_none
from deepfake_utils.evaluation.metrics import compute_eer
from deepfake_utils.probing import shortcuts
from deepfake_utils.probing.robustness import CONDITIONS, condition_scores, robustness
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.scoring.score import score_protocol
from deepfake_utils.scoring.weights import load_model
from deepfake_utils.training.sampling import source_weights
from deepfake_utils.waveforms import open_source
from deepfake_utils.waveforms.batches import eval_batches, train_batches
from deepfake_utils.waveforms.decode import to_int16

SHIPPED = "deepfake_utils/assets/open.safetensors"
# What the real speech of a dev or test source is spoken in; all others are English.
LANGUAGES = {
    "anonym-demo/diffgan-tts": "Mandarin",
    "thuhcsi/SnakeGAN": "Mandarin",
    "thuhcsi/icassp2022-hybrid-bottleneck-vc": "Mandarin",
    "thuhcsi/interspeech2022-CALM-tts": "Mandarin",
    "antonisa/griko-italian-parallel-corpus": "Griko",
    "Atul-Anand-Jha/Speaker-Identification-Python": "English of India",
    "TranSpeech/TranSpeech.github.io": "several",
    "mindslab-ai/mindslab-ai.github.io": "several",
    "Stability-AI/stable-codec-demo": "several",
    "Chengyuann/AutoStyle-TTS-DEMO": "several",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", nargs="+", default=[SHIPPED])
    parser.add_argument("--splits", nargs="+", default=["dev", "eval"])
    parser.add_argument("--per-family", type=int, default=40)
    parser.add_argument("--robust", action="store_true")
    parser.add_argument("--shortcuts", type=int, metavar="N")
    parser.add_argument("--verdicts", type=int, metavar="N")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    corpus, figures = find_corpora(options.data)[0], {}
    if options.shortcuts:
        print((100 * shortcut_table(corpus.protocol("train"), options.shortcuts)).round(1).to_string())
        return
    if options.verdicts:
        for split in options.splits:
            trials = chosen(corpus.protocol(split), options.verdicts)
            for weights in options.weights:
                print(f"\n{split}, {weights}: real and fake recordings called ..., in percent")
                print((100 * verdict_table(Detector.load(weights, whole=False), trials)).round(1).to_string())
        return
    for split in options.splits:
        trials = chosen(corpus.protocol(split), options.per_family)
        clips = open_source(trials, kind="cache")
        n_real = int(trials["label"].sum())
        n_families = trials.groupby("label")["family"].nunique()
        print(f"\n{split}: {n_real} real of {n_families[1]} sources, {len(trials) - n_real} fake", end=" ")
        print(f"of {n_families[0]} families")
        for weights in options.weights:
            model = load_model(weights=weights)
            scores = score_protocol(model, trials, source=clips, progress=None)["score"].to_numpy()
            found = figures.setdefault(weights, {})[split] = describe(scores, trials)
            show(weights, found)
            if options.robust:
                table = robustness(condition_scores(model, clips), trials["label"].to_numpy())
                found["conditions"] = table.set_index("condition").round(4).to_dict("index")
                print((100 * table.set_index("condition")).round(1).to_string())
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def chosen(protocol: pd.DataFrame, per_family: int) -> pd.DataFrame:
    """Up to so many recordings of each source's families, always the same ones; with the column `family`."""
    family = protocol["source"].str.split("/").str[-1].str.removesuffix(".github.io")
    family = family + ("/" + protocol["attack"].astype(str)).where(protocol["label"] == 0, "")
    order = protocol["utterance"].map(lambda name: hashlib.sha256(str(name).encode()).hexdigest())
    ranked = protocol.assign(family=family, order=order).sort_values("order")
    return ranked.groupby("family").head(per_family).drop(columns="order").reset_index(drop=True)


def describe(scores: np.ndarray, trials: pd.DataFrame) -> dict:
    """Fractions: EERs, fakes accepted by family and real speech rejected by source, at the pooled EER threshold."""
    labels, family = trials["label"].to_numpy(), trials["family"]
    pooled = compute_eer(scores, labels)
    by_family, accepted, rejected = {}, {}, {}
    for name in sorted(family.unique()):
        own = (family == name).to_numpy()
        if labels[own][0]:
            rejected[name] = [float((scores[own] < pooled.threshold).mean()), int(own.sum())]
        else:
            among = own | (labels == 1)
            by_family[name] = compute_eer(scores[among], labels[among]).eer
            accepted[name] = [float((scores[own] >= pooled.threshold).mean()), int(own.sum())]
    wrong = np.where(labels == 1, scores < pooled.threshold, scores >= pooled.threshold)
    language = trials["source"].map(LANGUAGES).fillna("English") + np.where(labels == 1, ", real", ", fake")
    by_language = pd.Series(wrong).groupby(language.to_numpy()).agg(["mean", "size"])
    interval = interval_or_none(eer_metric, scores, labels, trials["source"].to_numpy(), n=1000, seed=0)
    return {
        "pooled": pooled.eer,
        "interval": None if interval is None else [interval.low, interval.high],
        "macro": float(np.mean(list(by_family.values()))),
        "eer": by_family, "fakes_accepted": accepted, "real_rejected": rejected,
        "wrong_by_language": {name: [float(rate), int(n)] for name, rate, n in by_language.itertuples()},
    }  # fmt: skip


def verdict_table(detector: Detector, trials: pd.DataFrame) -> pd.DataFrame:
    """Shares (fractions) of the verdicts on the first 64,600 samples, one row a condition; columns (label, verdict)."""
    rows = []
    batches = eval_batches(open_source(trials, kind="cache"), batch_size=16, n_samples=CROP_SAMPLES, device="cpu")
    for number, batch in enumerate(batches):
        for name, change in CONDITIONS.items():
            changed = change(batch.waveform, torch.Generator().manual_seed(number))
            for label, clip in zip(trials["label"][batch.index], changed.numpy(), strict=True):
                rows.append((name, "real" if label else "fake", detector(clip, SAMPLE_RATE_HZ).verdict))
    table = pd.DataFrame(rows, columns=["condition", "label", "verdict"])
    shares = pd.crosstab(table["condition"], [table["label"], table["verdict"]])
    shares /= shares.T.groupby("label").transform("sum").T
    return shares.loc[list(CONDITIONS), [("real", "fake"), ("real", "uncertain"), ("fake", "fake"), ("fake", "real")]]


def shortcut_table(train: pd.DataFrame, n: int) -> pd.DataFrame:
    """EER (fraction) of each number alone, learned on half of the draws and told on the other half."""
    source, labels = open_source(train, kind="cache"), train["label"].to_numpy()
    ways = {
        "drawn evenly": (None, None),
        "balanced within sources": (source_weights(train), None),
        "and augmented": (source_weights(train), build_augmentation("open")),
    }
    columns = {}
    for way, (weights, augment) in ways.items():
        rows, drawn = [], []
        settings = {"batch_size": 20, "n_samples": 2 * SAMPLE_RATE_HZ, "seed": 1, "epoch": 0, "device": "cpu"}
        batches = train_batches(source, labels, weights=weights, augment=augment, **settings)
        for batch in islice(batches, n // 20):
            rows += [shortcuts.recording_numbers(clip) for clip in to_int16(batch.waveform.numpy())]
            drawn += batch.target.int().tolist()
        numbers, target, half = pd.DataFrame(rows), np.array(drawn), len(rows) // 2
        numbers.insert(0, "utterance", [str(i) for i in range(len(numbers))])
        told = shortcuts.shortcut_errors(numbers[:half], target[:half], numbers[half:], target[half:], n_bootstrap=0)
        columns[way] = told.set_index("rule")["eer"]
    return pd.DataFrame(columns)


def show(weights: str, found: dict) -> None:
    """Print what `describe` found, percent."""
    low, high = found["interval"] or (np.nan, np.nan)
    print(f"\n{weights}: pooled {100 * found['pooled']:.1f} % ({100 * low:.1f} to {100 * high:.1f}), "
          f"macro {100 * found['macro']:.1f} %")  # fmt: skip
    for title, key in (("fakes accepted", "fakes_accepted"), ("real rejected", "real_rejected"),
                       ("wrong by language", "wrong_by_language")):  # fmt: skip
        rows = sorted(found[key].items(), key=lambda item: -item[1][0])
        print(f"  {title}, %: " + ", ".join(f"{name} {100 * rate:.0f} of {n}" for name, (rate, n) in rows))


if __name__ == "__main__":
    main()
