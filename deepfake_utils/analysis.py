"""Where a countermeasure fails, in numbers: shortcuts, the generalisation gap, agreement of two systems.

Scores are (n,), higher = more bona fide; labels 1 = bona fide, 0 = spoof; rates are fractions. A trial is accepted
as bona fide from the threshold on; thresholds, directions and fits come from dev, and eval only judges them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import binomtest, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from deepfake_utils import intervals, metrics
from deepfake_utils.audio import from_int16
from deepfake_utils.calibration import Calibration, fit_calibration
from deepfake_utils.conventions import BONAFIDE, SAMPLE_RATE_HZ, SPOOF, ConfigError, ScoreError

FRAME_SAMPLES = SAMPLE_RATE_HZ // 100  # 10 ms, the resolution of silence
SILENCE_DB = 40.0  # below the clip's loudest frame: quieter frames at its ends are silence
BANDWIDTH_DB = 60.0  # below the strongest frequency: the band ends where nothing is stronger than that
NUMBER_NAMES = {
    "duration_s": "duration",
    "leading_silence_s": "leading silence",
    "trailing_silence_s": "trailing silence",
    "level_db": "level",
    "bandwidth_hz": "bandwidth",
}
_SPECTRUM_SAMPLES = 1024
_SMALLEST_POWER = 1e-20


# Shortcuts: numbers that a detector could use instead of listening to speech.


def speech_span(waveform: np.ndarray, silence_db: float = SILENCE_DB) -> tuple[int, int]:
    """Return (start, stop) in samples of what lies between the silences at both ends, in whole 10 ms frames.

    Silence is a run of frames at either end that are `silence_db` or more below the loudest frame; a clip without
    any sound is all speech. (N. Müller et al., "Speech is silver, silence is golden", ASVspoof 2021 workshop,
    showed what these silences give away.)

    >>> clip = np.concatenate([np.zeros(1600), np.ones(3200), np.zeros(800)])
    >>> speech_span(clip)
    (1600, 4800)
    """
    waveform = np.asarray(waveform, dtype=np.float64)
    n_frames = -(-len(waveform) // FRAME_SAMPLES)
    padded = np.zeros(n_frames * FRAME_SAMPLES)
    padded[: len(waveform)] = waveform
    power = np.square(padded).reshape(n_frames, FRAME_SAMPLES).mean(axis=1)
    loud = np.flatnonzero(power > power.max(initial=0.0) * 10 ** (-silence_db / 10))
    if not loud.size:
        return 0, len(waveform)
    return int(loud[0]) * FRAME_SAMPLES, min(len(waveform), (int(loud[-1]) + 1) * FRAME_SAMPLES)


class TrimmedSource:
    """A source of waveforms with the silence at both ends of every clip cut off.

    Args:
        source: anything with len, `utterances` and `clip(i)` -> int16 (n,), as `waveforms.open_source` gives it.
    """

    def __init__(self, source):
        self.source, self.utterances = source, source.utterances

    def __len__(self) -> int:
        return len(self.source)

    def clip(self, index: int) -> np.ndarray:
        """int16 samples (n,) of one clip, without its outer silences."""
        clip = self.source.clip(index)
        start, stop = speech_span(clip)
        return clip[start:stop]

    def n_samples(self, index: int) -> int:
        """Its length after trimming."""
        return len(self.clip(index))

    def describe(self) -> str:
        """One line for the notebook."""
        return f"{self.source.describe()}; silence trimmed at both ends"


def recording_numbers(clip: np.ndarray) -> dict[str, float]:
    """Return what can be said about an int16 clip (n,) without listening to what is spoken.

    duration_s, leading_silence_s and trailing_silence_s (see speech_span), level_db (mean power in dB below full
    scale), bandwidth_hz (the highest frequency within 60 dB of the strongest, in the mean spectrum).

    >>> tone = (8000 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)).astype(np.int16)
    >>> numbers = recording_numbers(np.concatenate([np.zeros(8000, np.int16), tone]))
    >>> numbers["duration_s"], numbers["leading_silence_s"], round(numbers["level_db"])
    (1.5, 0.5, -17)
    """
    waveform = from_int16(clip).astype(np.float64)
    start, stop = speech_span(waveform)
    return {
        "duration_s": len(waveform) / SAMPLE_RATE_HZ,
        "leading_silence_s": start / SAMPLE_RATE_HZ,
        "trailing_silence_s": (len(waveform) - stop) / SAMPLE_RATE_HZ,
        "level_db": float(10 * np.log10(np.square(waveform).mean() + _SMALLEST_POWER)),
        "bandwidth_hz": _bandwidth_hz(waveform),
    }


def _bandwidth_hz(waveform: np.ndarray) -> float:
    padded = np.pad(waveform, (0, max(0, _SPECTRUM_SAMPLES - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _SPECTRUM_SAMPLES)[:: _SPECTRUM_SAMPLES // 2]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(_SPECTRUM_SAMPLES)))).mean(axis=0)
    within = np.flatnonzero(power > power.max() * 10 ** (-BANDWIDTH_DB / 10))
    return float(within[-1] * SAMPLE_RATE_HZ / _SPECTRUM_SAMPLES) if within.size else 0.0


def measure(source) -> pd.DataFrame:
    """Return recording_numbers of every clip of a source, one row each, with the column utterance."""
    clips = tqdm(range(len(source)), desc="measuring", unit="utt", delay=1.0, leave=False)
    rows = [recording_numbers(source.clip(i)) for i in clips]
    table = pd.DataFrame(rows)
    table.insert(0, "utterance", np.asarray(source.utterances, dtype=str))
    return table


def shortcut_errors(
    dev: pd.DataFrame,
    dev_labels: ArrayLike,
    numbers: pd.DataFrame,
    labels: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the EER of each number alone, and of all together by logistic regression.

    What a high value stands for, and the regression, are learned on dev; an EER above 50 % says that the shortcut
    points the other way in eval.

    Args:
        dev, numbers: columns as of `measure` (dev and eval trials); dev_labels, labels: (n,) of their rows.
        clusters: (n,) speakers of the eval trials for the bootstrap.

    Returns:
        rule, bona_fide_if ("high" or "low" on dev; "" for the regression), eer, low, high.
    """
    dev_labels, labels = np.asarray(dev_labels), np.asarray(labels)
    names = list(NUMBER_NAMES)
    scores = {}
    for name in names:
        sign = 1.0 if metrics.auc(dev[name], dev_labels) >= 0.5 else -1.0
        scores[NUMBER_NAMES[name]] = ("high" if sign > 0 else "low", sign * numbers[name].to_numpy())
    regression = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    regression.fit(dev[names].to_numpy(), dev_labels)
    scores["all five together"] = ("", regression.decision_function(numbers[names].to_numpy()))
    rows = []
    for name, (side, values) in scores.items():
        interval = interval_or_none(intervals.eer_metric, values, labels, clusters, n_bootstrap, seed)
        eer = metrics.compute_eer(values, labels).eer
        low, high = (interval.low, interval.high) if interval else (np.nan, np.nan)
        rows.append({"rule": name, "bona_fide_if": side, "eer": eer, "low": low, "high": high})
    return pd.DataFrame(rows)


def interval_or_none(metric, scores, labels, clusters, n_bootstrap: int, seed: int) -> intervals.Interval | None:
    """Return the bootstrap interval, by trial where the speakers cannot carry it; None where nothing can."""
    for groups in (clusters, None) if clusters is not None else (None,):
        try:
            return (
                intervals.bootstrap(metric, scores, labels, groups, n=n_bootstrap, seed=seed) if n_bootstrap else None
            )
        except ScoreError:  # a class with a single speaker, or a single trial
            continue
    return None


# Which trials fail.


def rejections(by_speaker: dict, confidence: float = 0.95) -> pd.DataFrame:
    """Return how many of each speaker's bona fide trials are rejected, the most often rejected speaker first.

    by_speaker: what `evaluate(..., by="speaker")` gives in ["by"]["speaker"].
    Columns speaker, n_bonafide, n_rejected, p_miss, and Wilson's interval low, high: with few trials it is wide.
    """
    rows = []
    for speaker, row in by_speaker.items():
        if n := row["n_bonafide"]:
            rejected = round(row["p_miss"] * n)
            interval = binomtest(rejected, n).proportion_ci(confidence, method="wilson")
            rows.append((speaker, n, rejected, row["p_miss"], interval.low, interval.high))
    table = pd.DataFrame(rows, columns=["speaker", "n_bonafide", "n_rejected", "p_miss", "low", "high"])
    return table.sort_values(["n_rejected", "p_miss"], ascending=False, ignore_index=True)


def hardest(trials: pd.DataFrame, threshold: float, n: int) -> pd.DataFrame:
    """Return the n spoofs that score highest and the n bona fide trials that score lowest.

    trials: protocol with a column score. Added columns: kind ("false alarm", "miss", or "nearest spoof" and
    "nearest bona fide" where the threshold still decides rightly), margin (how far on the wrong side, negative: not).
    """
    spoof = trials[trials["label"] == SPOOF].nlargest(n, "score")
    bonafide = trials[trials["label"] == BONAFIDE].nsmallest(n, "score")
    spoof = spoof.assign(margin=spoof["score"] - threshold)
    bonafide = bonafide.assign(margin=threshold - bonafide["score"])
    spoof["kind"] = np.where(spoof["score"] >= threshold, "false alarm", "nearest spoof")
    bonafide["kind"] = np.where(bonafide["score"] < threshold, "miss", "nearest bona fide")
    return pd.concat([spoof, bonafide], ignore_index=True)


def balanced_subset(protocol: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Return up to n trials, half of them bona fide, the spoofs spread evenly over the attacks; in protocol order.

    All trials if there are no more than n.
    """
    if n < 4:
        raise ConfigError(f"a subset needs at least 4 trials, got {n}")
    if len(protocol) <= n:
        return protocol.reset_index(drop=True)
    shuffled = protocol.sample(frac=1, random_state=seed)
    bonafide = shuffled[shuffled["label"] == BONAFIDE].head(n // 2)
    spoof = shuffled[shuffled["label"] == SPOOF]
    turn = spoof.groupby("attack").cumcount()  # the first of every attack, then the second of every attack ...
    spoof = spoof.loc[turn.sort_values(kind="stable").index].head(n - len(bonafide))
    return pd.concat([bonafide, spoof]).sort_index().reset_index(drop=True)


# The generalisation gap.


def gap_parts(dev: pd.DataFrame, evaluation: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return what each kind of eval trial adds to the error between dev and eval, at one threshold.

    The error is the mean of miss and false alarm rate, (p_miss + p_fa) / 2: at the dev EER threshold it is the dev
    EER on dev, and on eval what somebody meets who brings that threshold along. It differs by

        (p_miss_eval - p_miss_dev) / 2  +  sum over attacks of share_a (p_fa_a - p_fa_dev) / 2,

    share_a being the attack's share of the eval spoofs: the parts add up to the whole difference.

    Args:
        dev, evaluation: protocols with columns label, attack and score.
        threshold: from dev.

    Returns:
        what ("bona fide" or the attack), n, error (its own miss or false alarm rate), part; bona fide first, then
        attacks from the largest part down. `.attrs` holds dev_error and eval_error.
    """
    miss_dev, fa_dev = metrics.error_rates(dev["score"], dev["label"], threshold)
    miss_eval, fa_eval = metrics.error_rates(evaluation["score"], evaluation["label"], threshold)
    spoof = evaluation[evaluation["label"] == SPOOF]
    rows = []
    for attack, of_attack in spoof.groupby("attack"):
        p_fa, n = float((of_attack["score"] >= threshold).mean()), len(of_attack)
        rows.append({"what": attack, "n": n, "error": p_fa, "part": n / len(spoof) * (p_fa - fa_dev) / 2})
    rows.sort(key=lambda row: -row["part"])
    n_bonafide = len(evaluation) - len(spoof)
    first = {"what": "bona fide", "n": n_bonafide, "error": miss_eval, "part": (miss_eval - miss_dev) / 2}
    table = pd.DataFrame([first, *rows])
    table.attrs = {"dev_error": (miss_dev + fa_dev) / 2, "eval_error": (miss_eval + fa_eval) / 2}
    return table


# Two systems.


def agreement(first: ArrayLike, second: ArrayLike, labels: ArrayLike, threshold: float) -> pd.DataFrame:
    """Return how two systems agree: per class, trials that both, one or none decide rightly, and rank correlation.

    first, second: (n,) calibrated log-likelihood ratios, decided at one threshold; labels (n,).
    Index bona fide, spoof; columns n, both_right, only_first_right, only_second_right, both_wrong, and
    rank_correlation (Spearman's within the class: near 0, errors are independent and a fusion can gain most).
    """
    first, second, labels = map(np.asarray, (first, second, labels))
    rows = {}
    for label, name in ((BONAFIDE, "bona fide"), (SPOOF, "spoof")):
        a, b = first[labels == label], second[labels == label]
        right_a, right_b = (a >= threshold) == (label == BONAFIDE), (b >= threshold) == (label == BONAFIDE)
        varied = len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
        rows[name] = {
            "n": len(a),
            "both_right": int((right_a & right_b).sum()),
            "only_first_right": int((right_a & ~right_b).sum()),
            "only_second_right": int((~right_a & right_b).sum()),
            "both_wrong": int((~right_a & ~right_b).sum()),
            "rank_correlation": float(spearmanr(a, b).statistic) if varied else np.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def fuse(
    dev_scores: ArrayLike, dev_labels: ArrayLike, scores: ArrayLike, *, fitted_on: str = ""
) -> tuple[dict[str, np.ndarray], Calibration]:
    """Return {"mean": llrs, "logistic": llrs} of eval trials for several systems, and the logistic fusion.

    mean: of the systems' calibrated log-likelihood ratios, so that none counts more for its scale. logistic: one
    weighted sum. Both are fitted on dev.

    Args:
        dev_scores, scores: (n, n_systems) of dev and eval trials; dev_labels (n,).
    """
    dev_scores, scores = np.asarray(dev_scores, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    with warnings.catch_warnings():  # a system that is worse than a coin is found out by whoever looks at it alone
        warnings.simplefilter("ignore", UserWarning)
        each = [fit_calibration(column, dev_labels, fitted_on=fitted_on) for column in dev_scores.T]
        logistic = fit_calibration(dev_scores, dev_labels, fitted_on=fitted_on)
    llrs = np.stack([one.llr(column) for one, column in zip(each, scores.T, strict=True)], axis=1)
    return {"mean": llrs.mean(axis=1), "logistic": logistic.llr(scores)}, logistic


def compare(
    systems: dict[str, np.ndarray],
    labels: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return each system's EER and its paired difference from the first one.

    systems: name -> scores (n,), all of the same trials in the same order. Index the name; columns eer, difference
    (eer - that of the first; negative is better), low, high (paired interval), and unit ("speaker" or "trial").
    """
    (reference, first), *others = systems.items()
    rows = {reference: {"eer": metrics.compute_eer(first, labels).eer}}
    for name, scores in others:
        row = {"eer": metrics.compute_eer(scores, labels).eer}
        for unit, groups in (("speaker", clusters), ("trial", None)):
            if not n_bootstrap or (unit == "speaker" and clusters is None):
                continue
            try:
                interval = intervals.paired_difference(
                    intervals.eer_metric, scores, first, labels, groups, n=n_bootstrap, seed=seed
                )
            except ScoreError:  # a class with a single speaker
                continue
            row |= {"difference": float(interval.value), "low": interval.low, "high": interval.high, "unit": unit}
            break
        rows[name] = row
    columns = ["eer", "difference", "low", "high", "unit"]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)


def speakers_of(
    trials: pd.DataFrame, unknown: Sequence[str] = ("", "-", "unknown", "nan", "None")
) -> np.ndarray | None:
    """Return each trial's speaker as text for a clustered bootstrap, or None where any is unknown."""
    speakers = trials["speaker"].astype(str)
    return None if speakers.isin(list(unknown)).any() else speakers.to_numpy(dtype=str)


# Which trials are looked at.


def scored_part(protocol: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of a protocol that have a score, with the column score; scores of other trials are left.

    A file may hold several splits, and a run may have scored a part of one. `len` says how many there are; none is an
    empty frame.
    """
    known = scores.drop_duplicates("utterance").set_index("utterance")["score"]
    part = protocol[protocol["utterance"].isin(known.index)].reset_index(drop=True)
    return part.assign(score=known.reindex(part["utterance"]).to_numpy(np.float64))


def proportional_subset(protocol: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Return about n trials with bona fide and each attack in proportion, in protocol order; all if there are fewer."""
    share = min(1.0, n / len(protocol))
    return protocol.groupby("attack").sample(frac=share, random_state=seed).sort_index().reset_index(drop=True)


def split_by_speaker(trials: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return two halves of a scored split for a corpus that has no dev split.

    No speaker is in both; where speakers are not known, trials are divided.
    """
    groups = speakers_of(trials)
    groups = trials["utterance"].to_numpy(dtype=str) if groups is None else groups
    chosen = np.random.default_rng(seed).permutation(np.unique(groups))
    first = pd.Series(groups).isin(chosen[: len(chosen) // 2]).to_numpy()
    return trials[first].reset_index(drop=True), trials[~first].reset_index(drop=True)
