"""What the notebooks share: the corpus of a run, a folder for its results, scored splits, and pictures that show."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, Audio, Image, Markdown, display
from matplotlib.figure import Figure
from torch import nn

from deepfake_utils.conventions import (
    BONAFIDE,
    CROP_SAMPLES,
    SAMPLE_RATE_HZ,
    SPOOF,
    CheckpointError,
    CorpusError,
    ScoreError,
)
from deepfake_utils.corpora import Corpus, division, find_corpora
from deepfake_utils.corpora.find import kaggle_input
from deepfake_utils.demo import DEMO_NOTICE, build_demo
from deepfake_utils.evaluation.scorefile import join_scores, read_scores, write_scores
from deepfake_utils.files import atomic_write
from deepfake_utils.machine import describe_machine
from deepfake_utils.scoring.score import score_protocol
from deepfake_utils.scoring.weights import load_model, score_kind
from deepfake_utils.waveforms import decode


class Results:
    """One notebook's folder within a run: pictures in `figures/`, `result.json` last.

    Args:
        run_dir: folder of the run; "" is runs/latest in the working folder.
        notebook: name of the notebook, and of its folder.
    """

    def __init__(self, run_dir: str, notebook: str):
        self.notebook = notebook
        self.run = Path(run_dir or "runs/latest").resolve()
        self.folder = self.run / notebook

    @property
    def scratch(self) -> Path:
        """Where decoded waveforms are packed: beside the runs; on Kaggle outside of what is saved."""
        return Path("/tmp/waveforms") if Path("/kaggle/working").is_dir() else self.run.parent / "waveforms"

    def show(self, figure: Figure, name: str) -> None:
        """Keep a picture as figures/NAME.png and show it."""
        display(self._keep(figure, name))

    def live(self, name: str) -> Callable[[Figure], None]:
        """A place in the notebook for one picture; what is returned shows a figure there, instead of the last one."""
        shown = []

        def redraw(figure: Figure) -> None:
            picture = self._keep(figure, name)
            if shown:
                shown[0].update(picture)
            elif handle := display(picture, display_id=True):
                shown.append(handle)

        return redraw

    def _keep(self, figure: Figure, name: str) -> Image:
        # As PNG, not as a figure: outside of pyplot, IPython would show `<Figure size ...>` in words.
        path = self.folder / "figures" / f"{name}.png"
        with atomic_write(path) as part:
            figure.savefig(part, format="png")
        return Image(path.read_bytes(), alt=name.replace("_", " "))

    def write(self, corpus: Corpus, *, metrics: Mapping, config: Mapping, device: torch.device, **more) -> None:
        """Write result.json: what was found, with which settings, on which corpus and machine."""
        facts = {
            "notebook": self.notebook,
            "corpus": {
                "name": corpus.name,
                "kind": corpus.kind,
                "root": str(corpus.root),
                "fingerprint": corpus.fingerprint(),
            },
            "metrics": dict(metrics),
            "config": dict(config),
            **more,
            "machine": describe_machine(device),
        }
        with atomic_write(self.folder / "result.json") as part:
            part.write_text(json.dumps(facts, indent=2), encoding="utf-8")


def open_corpus(data: str, results: Results, demo_scale: float = 1.0) -> Corpus:
    """Find the corpus to work on, and say which it is.

    Args:
        data: folder with a corpus, or "demo"; "" searches the usual places and falls back on the demo.
        results: the demo corpus is kept beside its run.
        demo_scale: size of the demo corpus, fraction of the full one.

    Raises:
        CorpusError: there is no corpus in the folder that was named.
    """
    corpus = None
    if data != "demo":
        try:
            corpus = find_corpora(*([data] if data else []))[0]
        except CorpusError as nothing_found:
            if data:
                raise
            print(nothing_found, "\n\nGoing on with the built-in demo corpus.")
    corpus = corpus or build_demo(results.run.parent / "demo", scale=demo_scale)
    notice = f"  \n> {demo_notice(corpus)}" if demo_notice(corpus) else ""
    display(Markdown(f"**{corpus.name}** in `{corpus.root}`{notice}"))
    return corpus


def demo_notice(corpus: Corpus) -> str:
    """What has to be said beside every number of the demo corpus; "" for any other."""
    return DEMO_NOTICE if corpus.name == "demo" else ""


def one_of_each(protocol: pd.DataFrame) -> dict[str, np.ndarray]:
    """The first bona fide and the first spoofed recording of a protocol: title -> samples (n,) at 16 kHz."""
    firsts = [row for label in (BONAFIDE, SPOOF) for row in protocol[protocol["label"] == label].head(1).itertuples()]
    return {
        f"bona fide: {row.utterance}" if row.label == BONAFIDE else f"spoof, attack {row.attack}: {row.utterance}":
        decode.read_audio(row.path)
        for row in firsts
    }  # fmt: skip


def play(waveforms: Mapping[str, np.ndarray]) -> None:
    """A player for each waveform, under its title."""
    for title, waveform in waveforms.items():
        display(Markdown(title), Audio(waveform, rate=SAMPLE_RATE_HZ))


def say(*texts: str) -> None:
    """Print sentences a line each, broken between words: what shows a notebook breaks long lines anywhere."""
    for text in texts:
        print(textwrap.fill(text, 110, subsequent_indent="    "))


def tabulate(table: pd.DataFrame) -> None:
    """Show a table without row numbers: two digits, sentences to the left, a dash where there is nothing."""
    sentences = [c for n, c in enumerate(table) if n == 0 or table[c].astype(str).str.len().max() > 30]
    left = {"text-align": "left"}
    style = table.style.hide(axis="index").format(precision=2, na_rep="-").set_properties(sentences, **left)
    headings = [{"selector": f"th.col{table.columns.get_loc(c)}", "props": [("text-align", "left")]} for c in sentences]
    display(HTML(style.set_table_styles(headings).to_html()))


@dataclass(frozen=True)
class Scored:
    """The two splits that an error analysis needs, and what scored them.

    Attributes:
        dev, evaluation: protocols with the column score.
        detector: what made the scores; None where only scores were given.
        weights: its file; "" where there is none.
        scores_from: the folder or file that the scores are of.
        seen: attacks of the corpus's train split; empty where it has none.
    """

    dev: pd.DataFrame
    evaluation: pd.DataFrame
    detector: nn.Module | None
    weights: str
    scores_from: str
    seen: frozenset[str]


def scored_splits(
    corpus: Corpus,
    results: Results,
    *,
    train_dir: str = "",
    weights: str = "",
    weights_model: str = "",
    scores: str = "",
    n_scored: int = 0,
    seed: int = 0,
) -> Scored:
    """Find the scores of dev and eval that are already there, make the missing ones, and say what stands for what.

    Args:
        train_dir: folder that notebook 02 wrote; "" is 02_train of this run, then one attached on Kaggle.
        weights: score with these instead; weights_model: their architecture, where the file does not say it.
        scores: a score file with trials of both splits, instead.
        n_scored: trials of each split to score where there is no score file; 0 is all.
        seed: of that draw, and of the division of a corpus without dev.

    Raises:
        CheckpointError: nothing was named and no finished run is found.
        ScoreError: the score file has no trial of a split, and there are no weights.
    """
    run = None if weights or scores else _finished_run(train_dir, results.run)
    weights = str(_of_first_seed(run, "best.safetensors")) if run else weights
    detector = load_model(weights_model or None, weights=weights) if weights else None

    def trials_of(split: str) -> pd.DataFrame:
        protocol = corpus.protocol(split if split in corpus.splits else "eval")
        file = _score_file(run, split) if run else scores
        part = division.scored_part(protocol, read_scores(file).frame) if file else protocol.head(0)
        if part.empty and detector is None:
            raise ScoreError(f"{file} has no trial of {corpus.name} {split}: give weights, or a file with dev and eval")
        if part.empty:
            file, part = weights, division.proportional_subset(protocol, n_scored or len(protocol), seed)
            part = join_scores(part, score_protocol(detector, part, progress=split)[["utterance", "score"]])
            meta = {"score": score_kind(detector), "split": split, "corpus": corpus.name}
            write_scores(results.folder / f"{split}_scores.csv", part[["utterance", "score"]], meta)
        print(f"{split}: {len(part):,} of {len(protocol):,} trials, scored by {file}")
        return part

    evaluation = trials_of("eval")
    of_this_corpus = bool(run) and _result_of(run)["corpus"]["fingerprint"] == corpus.fingerprint()
    if "dev" in corpus.splits or of_this_corpus:  # notebook 02 may have drawn a dev
        dev = trials_of("dev")
    else:
        dev, evaluation = _stand_in_for_dev(evaluation, seed)
    seen = frozenset(corpus.protocol("train")["attack"]) if "train" in corpus.splits else frozenset()
    return Scored(dev, evaluation, detector, weights, str(run or scores or weights), seen)


def _finished_run(train_dir: str, run: Path) -> Path:
    mounted = (place for depth in range(1, 7) for place in sorted(kaggle_input().glob("*/" * depth + "02_train")))
    places = [Path(train_dir)] if train_dir else [run / "02_train", *mounted]
    for place in places:
        if (place / "result.json").is_file():
            return place
    raise CheckpointError(
        f"No scores to analyse in {', '.join(map(str, places))}: run notebook 02 into the same run_dir, name its "
        "02_train folder as train_dir, or give weights (and weights_model), or a file as scores."
    )


def _result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def _of_first_seed(run: Path, name: str) -> Path:
    """A file of a run of notebook 02; with several seeds, of the first."""
    seeds = sorted(run.glob(f"seed_*/{name}"), key=lambda path: int(path.parent.name[5:]))
    return run / name if (run / name).is_file() or not seeds else seeds[0]


def _score_file(run: Path, split: str) -> Path | None:
    """The scores notebook 02 left; None where training scored dev on shorter clips than eval."""
    file = _of_first_seed(run, f"{split}_scores.csv")
    shortened = _result_of(run)["config"].get("eval_samples") != CROP_SAMPLES and "epoch" in read_scores(file).meta
    return None if shortened else file


def _stand_in_for_dev(evaluation: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Take a part of eval for dev, and say so."""
    if {"progress", "eval"} <= set(evaluation.get("phase", ())):
        dev, rest = (evaluation[evaluation["phase"] == p].reset_index(drop=True) for p in ("progress", "eval"))
        print(f"All figures are of phase eval, {len(rest):,} trials, as published ones of ASVspoof 2021 are; "
              f"phase progress, {len(dev):,} trials, stands in for dev.")  # fmt: skip
    else:
        dev, rest = division.split_by_speaker(evaluation, seed)
        print(f"This corpus has no dev split: half of eval, {len(dev):,} trials of other speakers, stands in for it.")
    return dev, rest
