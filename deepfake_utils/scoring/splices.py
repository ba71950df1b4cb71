"""Test material for *where*: real recordings with synthesised speech spliced in, and what a detector finds of it.

    host      |------ real, clips of one speaker joined ------|
    spliced   |------ real -----|// fake //|---- real --------|     the truth: the fake stretch
    control   |------ real -----|// real //|---- real --------|     the same cut, with another person's real speech

The control has the same joints and a change of voice and channel, so a detector that marks joints instead of synthesis
gains nothing. Cuts are made where the host is quiet, as a forger would; the insert is brought to the host's level.
Such material is how partial fakes are studied (L. Zhang et al., "The PartialSpoof database and countermeasures for the
detection of short fake speech segments embedded in an utterance", IEEE/ACM TASLP 31, 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from deepfake_utils.conventions import BONAFIDE, SAMPLE_RATE_HZ, SPOOF, UNKNOWN_SPEAKER, CorpusError
from deepfake_utils.corpora.division import source_of
from deepfake_utils.evaluation.metrics import compute_eer
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.scoring.pooling import stretches
from deepfake_utils.scoring.verdict import Judged
from deepfake_utils.waveforms.decode import audio_info, read_audio

HOST_S = 30.0  # of a host; sources with less than MIN_HOST_S of one speaker give none
MIN_HOST_S = 12.0
INSERTS_S = (1.0, 2.0, 4.0, 8.0)
FADES_S = (0.0, 0.05)  # a hard cut, a cross-fade
QUIET_S, SEARCH_S = 0.02, 1.0  # the cut is in the quietest 20 ms within a second of a random place


@dataclass(frozen=True)
class Spliced:
    """One recording of the test material.

    Attributes:
        samples: (n,) float32 at 16 kHz, in [-1, 1].
        kind: "fake" with synthesised speech spliced in, "control" with real speech, "host" untouched.
        insert_s, fade_s: length of what was spliced in and of its cross-fades; 0 in a host.
        span_s: where it lies, (start, end); None in a host.
        source: where the host comes from; `insert` is the attack, or the source of a control's insert.
    """

    samples: np.ndarray
    kind: str
    insert_s: float
    fade_s: float
    span_s: tuple[float, float] | None
    source: str
    insert: str


def spliced_recordings(
    protocol: pd.DataFrame,
    n_hosts: int,
    *,
    host_s: float = HOST_S,
    inserts_s: Sequence[float] = INSERTS_S,
    fades_s: Sequence[float] = FADES_S,
    seed: int = 0,
) -> Iterator[Spliced]:
    """Make test material from the clips of one split: each host untouched, then spliced and its control, per length.

    Sources of hosts, attacks and sources of controls take turns; with and without cross-fade take turns from host to
    host. The same protocol and seed give the same samples.

    Args:
        protocol: one split, with recordings of both labels; a column `source`, if any, says which belong together.
        n_hosts: how many hosts; each gives 1 + 2 * len(inserts_s) recordings.
        host_s: length of a host, in seconds; shorter where a speaker has not so much, down to 12 s or half of it;
            where no speaker has that, clips of several are joined.

    Raises:
        CorpusError: the split has too little real speech of any speaker, or one label only.
    """
    rng = np.random.default_rng(seed)
    shortest = min(MIN_HOST_S, host_s / 2)
    real, fake = (protocol[protocol["label"] == label] for label in (BONAFIDE, SPOOF))
    if real.empty or fake.empty:
        raise CorpusError("splices need recordings of both labels in the split, one of them is missing")
    hosts = _Clips(real, _speaker_of(real), shortest, rng)
    fakes = _Clips(fake, fake["attack"], max(inserts_s), rng)
    for number in range(n_hosts):
        source, host = hosts.take(round(host_s * SAMPLE_RATE_HZ), round(shortest * SAMPLE_RATE_HZ))
        yield Spliced(host, "host", 0.0, 0.0, None, source, "")
        for turn, insert_s in enumerate(inserts_s):
            fade_s = fades_s[(number + turn) % len(fades_s)]
            at = _quiet_place(host, rng)
            for kind, clips in (("fake", fakes), ("control", hosts)):
                n_insert = round(insert_s * SAMPLE_RATE_HZ)
                name, insert = clips.take(n_insert, n_insert, other_than=source if kind == "control" else None)
                samples, start = splice(host, insert, at, round(fade_s * SAMPLE_RATE_HZ))
                span_s = (start / SAMPLE_RATE_HZ, (start + len(insert)) / SAMPLE_RATE_HZ)
                yield Spliced(samples, kind, insert_s, fade_s, span_s, source, name)


def splice(host: np.ndarray, insert: np.ndarray, at: int, n_fade: int) -> tuple[np.ndarray, int]:
    """Put `insert` into `host` before its sample `at`, at the host's level, with cross-fades of equal power.

    Args:
        host, insert: (n,), (m,) float32; m >= 2 * n_fade.
        at: from n_fade to n - n_fade.
        n_fade: samples of each cross-fade; 0 is a hard cut.

    Returns:
        (n + m - 2 * n_fade,) float32 within [-1, 1], and the sample where the insert begins.

    >>> splice(np.full(6, 0.5, np.float32), np.full(2, 0.1, np.float32), 4, 0)
    (array([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], dtype=float32), 4)
    """
    rms = np.sqrt(np.square(insert, dtype=np.float64).mean())
    level = np.sqrt(np.square(host, dtype=np.float64).mean()) / max(rms, 1e-9)
    insert = insert * min(level, 1 / max(float(np.abs(insert).max()), 1e-9))
    angle = np.pi / 2 * (np.arange(n_fade) + 0.5) / max(n_fade, 1)
    rise, fall = np.sin(angle), np.cos(angle)
    inner = len(insert) - n_fade
    parts = [
        host[: at - n_fade],
        host[at - n_fade : at] * fall + insert[:n_fade] * rise,
        insert[n_fade:inner],
        insert[inner:] * fall + host[at : at + n_fade] * rise,
        host[at + n_fade :],
    ]
    return np.clip(np.concatenate(parts), -1.0, 1.0).astype(np.float32), at - n_fade


def judge(detector: Detector, recordings: Iterable[Spliced]) -> list[tuple[Spliced, tuple[Judged, ...]]]:
    """Each recording, without its samples, with the windows a calibrated detector judged in it."""
    known = []

    def waveforms() -> Iterator[np.ndarray]:
        for recording in recordings:
            known.append(Spliced(recording.samples[:0], *list(vars(recording).values())[1:]))
            yield recording.samples

    verdicts = list(detector.verdicts(waveforms()))
    return [(recording, verdict.windows) for recording, verdict in zip(known, verdicts, strict=True)]


def window_table(judged: Iterable[tuple[Spliced, Sequence[Judged]]]) -> pd.DataFrame:
    """One row a judged window: kind, insert_s, fade_s, source, log_odds, and `label`, the truth.

    A window is spoof (0) where half of it, or half of the insert, is fake; bona fide (1) where nothing of it is; in
    between the truth is undecided, and `label` missing.
    """
    rows = []
    for recording, windows in judged:
        for window in windows:
            fake_s = _overlap(window, recording.span_s) if recording.kind == "fake" else 0.0
            enough = fake_s >= 0.5 * min(recording.insert_s or np.inf, window.end_s - window.start_s)
            label = BONAFIDE if fake_s == 0 else SPOOF if enough else None
            rows.append(
                (recording.kind, recording.insert_s, recording.fade_s, recording.source, window.log_odds, label)
            )
    columns = ("kind", "insert_s", "fade_s", "source", "log_odds", "label")
    return pd.DataFrame(rows, columns=columns).astype({"label": "Int64"})


def window_eers(judged: Iterable[tuple[Spliced, Sequence[Judged]]]) -> pd.DataFrame:
    """EER of windows by length of the insert, with hard cuts, with cross-fades, and together.

    Columns insert_s ("all" last), n_fake, n_real, eer, eer_cut, eer_fade: the fake windows of that length against all
    real windows of spliced recordings and controls; fractions.
    """
    table = window_table(judged).dropna(subset="label")
    real = table[(table["label"] == BONAFIDE) & (table["kind"] != "host")]
    fake = table[table["label"] == SPOOF]
    rows = []
    for insert_s in [*sorted(fake["insert_s"].unique()), "all"]:
        of_length = fake if insert_s == "all" else fake[fake["insert_s"] == insert_s]
        faded = of_length["fade_s"] > 0
        parts = {"eer": of_length, "eer_cut": of_length[~faded], "eer_fade": of_length[faded]}
        eers = {name: _eer(real["log_odds"], part["log_odds"]) for name, part in parts.items()}
        rows.append({"insert_s": insert_s, "n_fake": len(of_length), "n_real": len(real), **eers})
    return pd.DataFrame(rows)


def found(judged: Iterable[tuple[Spliced, Sequence[Judged]]], below: float, rule: str = "any") -> pd.DataFrame:
    """How much is marked below a bound of log-odds: by length of the insert ("all" last).

    Columns insert_s, fake_found (share of the fake time that is marked), real_marked (share of the real time that is),
    inserts_found (share of the inserts of which half is marked); fractions.
    """
    rows = []
    for recording, windows in judged:
        marks = stretches(windows, below, rule)
        total_s = windows[-1].end_s if windows else 0.0
        marked_s = sum(end - start for start, end in marks)
        fake_s = recording.span_s[1] - recording.span_s[0] if recording.kind == "fake" else 0.0
        hit_s = sum(max(0.0, min(b, recording.span_s[1]) - max(a, recording.span_s[0])) for a, b in marks if fake_s)
        rows.append((recording.insert_s, fake_s, hit_s, max(0.0, total_s - fake_s), marked_s - hit_s))
    table = pd.DataFrame(rows, columns=["insert_s", "fake_s", "hit_s", "real_s", "wrong_s"])
    result = []
    for insert_s in [*sorted(set(table["insert_s"]) - {0.0}), "all"]:
        part = table if insert_s == "all" else table[table["insert_s"] == insert_s]
        fakes, sums = part[part["fake_s"] > 0], part.sum(numeric_only=True)
        row = {"insert_s": insert_s, "fake_found": sums["hit_s"] / sums["fake_s"]}
        row |= {"real_marked": sums["wrong_s"] / sums["real_s"]}
        result.append(row | {"inserts_found": float((fakes["hit_s"] >= fakes["fake_s"] / 2).mean())})
    return pd.DataFrame(result)


def _overlap(window: Judged, span_s: tuple[float, float]) -> float:
    return max(0.0, min(window.end_s, span_s[1]) - max(window.start_s, span_s[0]))


def _eer(real: pd.Series, fake: pd.Series) -> float:
    if real.empty or fake.empty:
        return float("nan")
    labels = np.repeat([BONAFIDE, SPOOF], [len(real), len(fake)])
    return compute_eer(np.r_[real.to_numpy(float), fake.to_numpy(float)], labels).eer


def _speaker_of(rows: pd.DataFrame) -> pd.Series:
    """One voice, as far as is known: the source, and the speaker where it is named."""
    source, speaker = source_of(rows), rows["speaker"].where(rows["speaker"] != UNKNOWN_SPEAKER, "")
    return source + np.where((speaker == "") | (speaker == source), "", ": " + speaker)


def _quiet_place(host: np.ndarray, rng: np.random.Generator) -> int:
    """A sample in the quietest 20 ms within a second of a random one, a second or more from both ends."""
    n_quiet, n_search = int(QUIET_S * SAMPLE_RATE_HZ), int(SEARCH_S * SAMPLE_RATE_HZ)
    middle = int(rng.integers(n_search, max(n_search + 1, len(host) - n_search)))
    start = max(n_search // 2, middle - n_search)
    part = host[start : min(len(host) - n_search // 2, middle + n_search)]
    frames = part[: len(part) // n_quiet * n_quiet].reshape(-1, n_quiet)
    return start + int(np.square(frames, dtype=np.float64).sum(axis=1).argmin()) * n_quiet + n_quiet // 2


class _Clips:
    """Clips by group; groups take turns, and within each its clips in random order, over and over."""

    def __init__(self, rows: pd.DataFrame, group: pd.Series, least_s: float, rng: np.random.Generator):
        rows = rows.assign(group=group, duration_s=[audio_info(path).duration_s for path in rows["path"]])
        if rows.groupby("group")["duration_s"].sum().max() < least_s:
            rows = rows.assign(group="several")
        rows = rows.sort_values("utterance")
        self.groups = {name: list(rng.permutation(part["path"].to_numpy())) for name, part in rows.groupby("group")}
        self._order = list(rng.permutation(sorted(self.groups)))
        self._rng = rng

    def take(self, n_wanted: int, n_least: int, other_than: str | None = None) -> tuple[str, np.ndarray]:
        """The next group with enough sound: its name, and up to `n_wanted` samples of joined clips.

        Where all clips are one group, it is taken whatever it holds.
        """
        for _ in range(len(self._order)):
            name = self._order.pop(0)
            self._order.append(name)
            samples = self._joined(name, n_wanted) if name != other_than or len(self.groups) == 1 else ()
            if len(samples) >= n_least or len(self.groups) == 1:
                return name, samples
        raise CorpusError(f"no speaker or attack has {n_least / SAMPLE_RATE_HZ:g} s of sound to splice")

    def _joined(self, name: str, n_wanted: int) -> np.ndarray:
        paths, parts, n_samples = self.groups[name], [], 0
        for _ in range(len(paths)):
            paths.append(paths.pop(0))
            parts.append(read_audio(paths[-1], notes=[]))
            n_samples += len(parts[-1])
            if n_samples >= n_wanted:
                break
        samples = np.concatenate(parts)
        start = int(self._rng.integers(max(1, len(samples) - n_wanted + 1)))
        return samples[start : start + n_wanted]
