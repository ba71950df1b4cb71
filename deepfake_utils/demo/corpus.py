"""A small corpus made from a seed, laid out as ASVspoof 2019 LA, so that everything runs without a download.

Attacks D01 and D02 are in train and dev, D03 and D04 only in eval; speakers are disjoint across splits. The same seed
gives the same trials everywhere; their samples may differ in the last bit between machines.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm.auto import tqdm

from deepfake_utils.conventions import NO_ATTACK, SAMPLE_RATE_HZ, SPLITS, ConfigError, CorpusError
from deepfake_utils.corpora import Corpus, find_corpora
from deepfake_utils.demo.voice import SEEN_ATTACKS, UNSEEN_ATTACKS, draw_speaker, record, speak, spoof
from deepfake_utils.files import atomic_write

DEMO_NOTICE = "Demo corpus: synthetic babble made by this program. Its numbers say nothing about speech."
MARKER = "demo.json"
VERSION = 5  # raise it whenever the trials change, so that corpora built earlier are built anew
N_SPEAKERS = 10  # in each split


class _Split(NamedTuple):
    protocol: str  # the protocol file's last part
    n_bonafide: int
    n_per_attack: int
    attacks: tuple[str, ...]


SHAPES = {
    "train": _Split("train.trn", 90, 45, tuple(SEEN_ATTACKS)),
    "dev": _Split("dev.trl", 45, 25, tuple(SEEN_ATTACKS)),
    "eval": _Split("eval.trl", 60, 50, tuple(UNSEEN_ATTACKS)),
}
# Mean and spread of the scores of an imagined speaker verification system, which D03 hardly fools and D04 does.
ASV_SCORES = {
    "target": (12, 6), "nontarget": (-14, 7), "D01": (2, 7), "D02": (9, 6), "D03": (-3, 7), "D04": (10, 6),
}  # fmt: skip


class Trial(NamedTuple):
    """One recording to be made: its place in the corpus, and the seeds of its speaker and its words."""

    utterance: str
    speaker: int
    attack: str
    seeds: tuple[tuple[int, ...], tuple[int, ...]]


def build_demo(folder: str | os.PathLike, *, seed: int = 0, scale: float = 1.0) -> Corpus:
    """Build the demo corpus in `folder`, or return at once what an earlier call built there.

    Args:
        folder: a new or empty folder, or one that holds a demo corpus (built anew if its settings differ).
        seed: of everything drawn; another seed, other people and words.
        scale: trials relative to the full size (180 train, 95 dev, 160 eval), above 0 and up to 10.

    Returns:
        An ordinary corpus called `demo`; its numbers say nothing about speech (`DEMO_NOTICE`).

    Raises:
        ConfigError: a negative seed or a scale out of range.
        CorpusError: `folder` holds another corpus.
    """
    if not 0 < scale <= 10:
        raise ConfigError(f"scale is {scale}, expected above 0 and at most 10: 1.0 is the full demo corpus")
    if seed < 0:
        raise ConfigError(f"seed is {seed}, expected a non-negative integer")
    folder = Path(folder).absolute()
    settings = {"version": VERSION, "seed": int(seed), "scale": float(scale), "notice": DEMO_NOTICE}
    if not _is_built(folder, settings):
        if (folder / "LA").exists() and not (folder / MARKER).exists() and not (folder / "DEMO.json").exists():
            raise CorpusError(
                f"{folder / 'LA'} is not part of a demo corpus, and building one would replace it: name a new or empty "
                "folder"
            )
        _build(folder, settings)
    return replace(find_corpora(folder / "LA")[0], name="demo")


def _is_built(folder: Path, settings: dict) -> bool:
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8")) == settings and (folder / "LA").is_dir()
    except (OSError, ValueError):
        return False


def _build(folder: Path, settings: dict) -> None:
    """Make everything in a folder of its own, which then takes its place: no part is ever taken for the corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder) as part:
        made = Path(part) / "LA"
        trials = {split: list(plan(split, settings["seed"], settings["scale"])) for split in SPLITS}
        bar = tqdm(total=sum(map(len, trials.values())), desc="demo corpus", unit="utt", leave=False)
        for split, rows in trials.items():
            audio = made / f"ASVspoof2019_LA_{split}" / "flac"
            audio.mkdir(parents=True)
            with ThreadPoolExecutor() as threads:  # arrays this long let go of the interpreter's lock
                for trial, samples in zip(rows, threads.map(make_trial, rows), strict=True):
                    soundfile.write(audio / f"{trial.utterance}.flac", samples, SAMPLE_RATE_HZ)
                    bar.update()
            lines = [f"DEMO_{t.speaker:04d} {t.utterance} - {t.attack} {_label(t)}" for t in rows]
            protocols = made / "ASVspoof2019_LA_cm_protocols"
            _write(protocols / f"ASVspoof2019.LA.cm.{SHAPES[split].protocol}.txt", lines)
            if split != "train":
                scores = made / "ASVspoof2019_LA_asv_scores" / f"ASVspoof2019.LA.asv.{split}.gi.trl.scores.txt"
                _write(scores, simulate_asv(split, settings["seed"]))
        bar.close()
        if _is_built(folder, settings):  # another process was faster
            return
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder / "LA", ignore_errors=True)
        try:
            os.replace(made, folder / "LA")
        except OSError:
            if not (folder / "LA").is_dir():  # else: the same moment's other builder made the same
                raise
        with atomic_write(folder / MARKER) as marker:
            marker.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def plan(split: str, seed: int, scale: float) -> Iterator[Trial]:
    """Who says what, by which attack, for one split: trials shuffled, speakers taking turns in each class."""
    shape, number = SHAPES[split], SPLITS.index(split)
    n_bonafide = max(2, round(shape.n_bonafide * scale))
    n_per_attack = max(1, round(shape.n_per_attack * scale))
    kinds = [NO_ATTACK] * n_bonafide + [attack for attack in shape.attacks for _ in range(n_per_attack)]
    turns = np.r_[np.arange(n_bonafide), np.arange(len(kinds) - n_bonafide)] % N_SPEAKERS
    for i, row in enumerate(np.random.default_rng((seed, number)).permutation(len(kinds))):
        person = 100 * (number + 1) + int(turns[row]) + 1
        yield Trial(f"LA_{split[0].upper()}_{i + 1:07d}", person, kinds[row], ((seed, 9, person), (seed, number, i)))


def make_trial(trial: Trial) -> np.ndarray:
    """The 16-bit samples of one trial, a function of its seeds alone."""
    of_speaker, rng = map(np.random.default_rng, trial.seeds)
    dry = speak(draw_speaker(of_speaker), int(rng.uniform(1.3, 2.6) * SAMPLE_RATE_HZ), rng)
    if trial.attack != NO_ATTACK:
        dry = spoof(trial.attack, dry, rng)
    return record(dry, rng)


def simulate_asv(split: str, seed: int) -> list[str]:
    """Lines `attack key score` of an imagined speaker verification system, as the organisers publish them."""
    rng = np.random.default_rng((seed, 8, SPLITS.index(split)))
    groups = [("bonafide", "target", 300), ("bonafide", "nontarget", 900)]
    groups += [(attack, "spoof", 300) for attack in SHAPES[split].attacks]
    return [
        f"{attack} {key} {score:.6f}"
        for attack, key, n in groups
        for score in rng.normal(*ASV_SCORES[attack if key == "spoof" else key], n)
    ]


def _label(trial: Trial) -> str:
    return "bonafide" if trial.attack == NO_ATTACK else "spoof"


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
