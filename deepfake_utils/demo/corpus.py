"""A small corpus made from a seed, laid out as ASVspoof 2019 LA, so that everything runs without a download.

Bona fide trials are a source-filter voice (`demo_voice`), spoofed ones the same voice after a vocoder-like
process (`demo_attacks`); both then go through a room, a microphone and a level drawn from the same
distributions. Attacks D01-D04 are in train and dev, D05-D08 only in eval; speakers are disjoint across splits.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm.auto import tqdm

from deepfake_utils.conventions import NO_ATTACK, SAMPLE_RATE_HZ, ConfigError, CorpusError
from deepfake_utils.corpora.corpus import Corpus
from deepfake_utils.demo.attacks import SEEN_ATTACKS, UNSEEN_ATTACKS, spoof
from deepfake_utils.demo.voice import draw_recording, draw_speaker, record, speak
from deepfake_utils.files import atomic_write

DEMO_NOTICE = "Demo corpus: synthetic babble made by this program. Its numbers say nothing about speech."
MARKER = "DEMO.json"
VERSION = 4  # raise it whenever the samples change, so that cached corpora are built anew

_OWN_AUDIO = re.compile(r"LA_[TDE]_000\d{4}\.flac")  # the organisers' numbers have seven digits from 1000137 up


@dataclass(frozen=True)
class _Split:
    letter: str  # of the utterance names
    suffix: str  # of the protocol file
    n_bonafide: int
    n_per_attack: int
    n_speakers: int
    attacks: tuple[str, ...]


SPLITS = {
    "train": _Split("T", "train.trn", 120, 30, 12, tuple(SEEN_ATTACKS)),
    "dev": _Split("D", "dev.trl", 60, 15, 10, tuple(SEEN_ATTACKS)),
    "eval": _Split("E", "eval.trl", 80, 40, 12, tuple(UNSEEN_ATTACKS)),
}

# Mean and spread of the verification scores of each kind of ASV trial: D02 hardly fools it, D04 and D08 do.
ASV_TARGET, ASV_NONTARGET = (12.0, 6.0), (-14.0, 7.0)
ASV_SPOOF = {
    "D01": (2.0, 7.0),
    "D02": (-6.0, 7.0),
    "D03": (4.0, 6.5),
    "D04": (9.0, 6.0),
    "D05": (-3.0, 7.0),
    "D06": (1.0, 7.0),
    "D07": (8.0, 6.0),
    "D08": (10.0, 6.0),
}


@dataclass(frozen=True)
class _Trial:
    utterance: str
    speaker: str
    attack: str
    path: Path
    voice_key: tuple[int, ...]  # seeds of the speaker and of the utterance
    key: tuple[int, ...]


def build_demo(folder: str | os.PathLike, *, seed: int = 0, scale: float = 1.0) -> Corpus:
    """Build the demo corpus in `folder`, or return at once what an earlier call built there.

    Args:
        folder: a new or empty folder, or one that holds a demo corpus (built anew if its settings differ).
        seed: same seed, same samples, however many processes work; another seed, other people and words.
        scale: trials relative to the full size (240 train, 120 dev, 240 eval), above 0 and up to 10.

    Returns:
        Corpus of kind `demo`; its numbers say nothing about speech (`DEMO_NOTICE`).

    Raises:
        ConfigError: a negative seed or a scale out of range.
        CorpusError: `folder` holds another corpus.
    """
    if not 0 < scale <= 10:
        raise ConfigError(f"scale is {scale}, expected above 0 and at most 10: 1.0 is the full demo corpus")
    if seed < 0:
        raise ConfigError(f"seed is {seed}, expected a non-negative integer")
    folder = Path(folder).absolute()
    settings = {"version": VERSION, "seed": int(seed), "scale": float(scale)}
    if not _is_complete(folder, settings):
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _only_builder(folder):
            if not _is_complete(folder, settings):  # another process may have built it while we waited
                _build(folder, settings)
    return Corpus(
        name="demo",
        kind="asvspoof2019_la",
        root=folder / "LA",
        protocols={split: _protocol_path(folder, split) for split in SPLITS},
        folders={split: (_audio_folder(folder, split),) for split in SPLITS},
        asv={split: _asv_path(folder, split) for split in ("dev", "eval")},
    )


def _build(folder: Path, settings: dict) -> None:
    """Write everything; the marker goes first and comes back last, so that a part is never taken for a corpus."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder / "LA", ignore_errors=True)
    trials = {split: plan(folder, split, settings["seed"], settings["scale"]) for split in SPLITS}
    for split, rows in trials.items():
        _protocol_path(folder, split).parent.mkdir(parents=True, exist_ok=True)
        rows[0].path.parent.mkdir(parents=True, exist_ok=True)
        _write_text(_protocol_path(folder, split), "".join(_protocol_line(trial) for trial in rows))
    for split in ("dev", "eval"):
        _write_text(_asv_path(folder, split), simulate_asv(split, settings["seed"]))

    rows = [trial for split in SPLITS for trial in trials[split]]
    digest = hashlib.sha256("".join(_protocol_line(trial) for trial in rows).encode())
    for samples_digest in _make_all(rows):
        digest.update(samples_digest)
    marker = settings | {"notice": DEMO_NOTICE, "n_trials": len(rows), "sha256": digest.hexdigest()}
    _write_text(folder / MARKER, json.dumps(marker, indent=2) + "\n")


def plan(folder: Path, split: str, seed: int, scale: float) -> list[_Trial]:
    """Who says what, by which attack, for one split: trials shuffled, speakers taking turns in each class."""
    shape = SPLITS[split]
    counts = {NO_ATTACK: max(2, round(shape.n_bonafide * scale))}
    counts |= {attack: max(1, round(shape.n_per_attack * scale)) for attack in shape.attacks}
    number = list(SPLITS).index(split)
    rng = np.random.default_rng((seed, number))
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    turns = np.concatenate([np.arange(counts[NO_ATTACK]), np.arange(len(kinds) - counts[NO_ATTACK])]) % shape.n_speakers
    trials = []
    for i, row in enumerate(rng.permutation(len(kinds))):
        utterance = f"LA_{shape.letter}_{i + 1:07d}"
        person = 100 * (number + 1) + int(turns[row]) + 1
        trials.append(
            _Trial(
                utterance=utterance,
                speaker=f"DEMO_{person:04d}",
                attack=kinds[row],
                path=_audio_folder(folder, split) / f"{utterance}.flac",
                voice_key=(seed, 1000, person),
                key=(seed, 2000 + number, i),
            )
        )
    return trials


def make_trial(trial: _Trial) -> np.ndarray:
    """The 16-bit samples of one trial, a function of its seeds alone."""
    rng = np.random.default_rng(trial.key)
    speaker = draw_speaker(trial.speaker, np.random.default_rng(trial.voice_key))
    recording = draw_recording(rng)
    n_samples = int(rng.uniform(1.3, 3.0) * SAMPLE_RATE_HZ)
    dry = speak(speaker, n_samples, rng)
    if trial.attack != NO_ATTACK:
        dry = spoof(trial.attack, dry, lambda: speak(speaker, 2 * SAMPLE_RATE_HZ, rng), rng)
    return record(dry, recording, rng)


def simulate_asv(split: str, seed: int) -> str:
    """Lines `attack key score` of an imagined speaker verification system, as the organisers publish them."""
    rng = np.random.default_rng((seed, 3000, list(SPLITS).index(split)))
    groups = [("bonafide", "target", ASV_TARGET, 500), ("bonafide", "nontarget", ASV_NONTARGET, 1500)]
    groups += [(attack, "spoof", ASV_SPOOF[attack], 300) for attack in SPLITS[split].attacks]
    return "".join(
        f"{attack} {key} {score:.6f}\n"
        for attack, key, (mean, spread), count in groups
        for score in rng.normal(mean, spread, count)
    )


def _make_all(trials: list[_Trial]) -> Iterator[bytes]:
    """Write every trial on all cores, giving the digests of their samples in order."""
    n_workers = min(_n_cores(), 8, len(trials))
    bar = {"total": len(trials), "desc": "demo corpus", "unit": "utt"}
    if n_workers == 1:
        yield from tqdm(map(_write_trial, trials), **bar)
        return
    # Forked workers need no importable __main__, so this runs from notebooks and plain scripts alike.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(n_workers, mp_context=context) as pool:
        yield from tqdm(pool.map(_write_trial, trials, chunksize=4), **bar)


def _write_trial(trial: _Trial) -> bytes:
    samples = make_trial(trial)
    with atomic_write(trial.path) as part:
        soundfile.write(part, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return hashlib.sha256(samples.tobytes()).digest()


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_complete(folder: Path, settings: dict) -> bool:
    """Whether the marker is there, has these settings, and every file it speaks of exists."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    if any(marker.get(name) != value for name, value in settings.items()):
        return False
    wanted = [_protocol_path(folder, split) for split in SPLITS] + [_asv_path(folder, s) for s in ("dev", "eval")]
    wanted += [trial.path for split in SPLITS for trial in plan(folder, split, marker["seed"], marker["scale"])]
    return all(path.is_file() for path in wanted)


def _refuse_foreign(folder: Path) -> None:
    """Building replaces LA/: make sure that everything in it came from here."""
    for path in (folder / "LA").rglob("*"):
        if path.is_dir() or path.name.endswith(".part"):
            continue
        ours = bool(_OWN_AUDIO.fullmatch(path.name)) or path.parent.name.endswith("_asv_scores")
        if path.parent.name.endswith("_cm_protocols"):
            with path.open(errors="replace") as lines:
                ours = next(lines, "DEMO_").startswith("DEMO_")
        if not ours:
            raise CorpusError(
                f"{path} is not part of a demo corpus, and building one would replace {folder / 'LA'}: "
                "name a new or empty folder"
            )


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Let one process at a time build in `folder`; the lock goes with its process, even when that is killed.

    Where the system has no such locks, two builders write the same bytes to the same names, each file whole.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".demo.lock").open("w") as lock:
        with suppress(OSError):  # some network file systems know no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _protocol_line(trial: _Trial) -> str:
    key = "bonafide" if trial.attack == NO_ATTACK else "spoof"
    return f"{trial.speaker} {trial.utterance} - {trial.attack} {key}\n"


def _audio_folder(folder: Path, split: str) -> Path:
    return folder / "LA" / f"ASVspoof2019_LA_{split}" / "flac"


def _protocol_path(folder: Path, split: str) -> Path:
    return folder / "LA" / "ASVspoof2019_LA_cm_protocols" / f"ASVspoof2019.LA.cm.{SPLITS[split].suffix}.txt"


def _asv_path(folder: Path, split: str) -> Path:
    return folder / "LA" / "ASVspoof2019_LA_asv_scores" / f"ASVspoof2019.LA.asv.{split}.gi.trl.scores.txt"


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
