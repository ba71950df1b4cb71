"""From a score file and a protocol to every figure the field reports."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pandas as pd

from deepfake_utils.conventions import BONAFIDE, SPOOF, UNKNOWN_WORDS, ConfigError, ScoreError
from deepfake_utils.evaluation import intervals, metrics
from deepfake_utils.evaluation.scorefile import Scores, in_names_of, join_scores, read_asv_scores, read_scores
from deepfake_utils.files import short_names
from deepfake_utils.protocols import read_keys

MAX_GROUPS = 10_000  # more are no groups but a number or a name of each trial; ASVspoof 5 has 737 speakers
PHASES_2021 = ("progress", "eval", "hidden")


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation(Mapping):
    """Every figure of an evaluation; what the inputs do not allow is None. Rates are fractions.

    Its fields are also its items (`result["eer"]`), and `to_dict()` gives them for JSON, all but `trials`.
    """

    eer: float
    eer_threshold: float
    min_tdcf: float | None  # 2019, legacy
    min_tdcf_revised: float | None  # 2021
    tandem_eer: float | None
    min_dcf: float
    act_dcf: float  # takes the scores for log-likelihood ratios: calibrate first
    cllr: float  # the same, bits
    min_cllr: float
    auc: float
    accuracy: float  # this and the next four at `threshold`
    threshold: float
    threshold_source: str
    p_miss: float
    p_fa: float
    n_bonafide: int
    n_spoof: int
    n_speakers: int | None
    eer_ci: list[float] | None  # [low, high], the ASV system held fixed
    min_dcf_ci: list[float] | None
    min_tdcf_ci: list[float] | None
    min_tdcf_revised_ci: list[float] | None
    # {attack: {n, eer and min_tdcf (2019; against all bona fide), eer_ci, p_fa, share_of_errors}}; all the shares and
    # bonafide_share_of_errors add up to 1.
    per_attack: dict[str, dict]
    bonafide_share_of_errors: float | None
    # {column: {value: {n_bonafide, n_spoof, against, eer, eer_ci, p_miss, p_fa}}}, where a value with one class only is
    # held against all trials of the other, which `against` says.
    by: dict[str, dict[str, dict]]
    phase: str | None
    higher_is: str  # what a high score stood for in the input
    score_dialect: str
    score_kind: str | None  # what a score is, in the words of the score file's companion
    confidence: float | None
    n_bootstrap: int
    seed: int
    bootstrap_unit: str | None  # "speaker", or "trial" where speakers are not known
    warnings: list[str]  # the gravest first
    trials: pd.DataFrame = field(repr=False)  # the protocol's rows evaluated; `score`: higher = more bona fide

    def __getitem__(self, name: str):
        if name not in self._names():
            raise KeyError(f"an evaluation has no {name!r}: it has {', '.join(self._names())}")
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    @classmethod
    def _names(cls) -> list[str]:
        return [one.name for one in fields(cls) if one.name != "trials"]

    def to_dict(self) -> dict:
        """Return all figures as plain numbers, texts, lists and dictionaries, for JSON."""
        return dict(self)


def evaluate(
    scores: str | os.PathLike | Scores | pd.DataFrame,
    protocol: str | os.PathLike | pd.DataFrame,
    asv_scores: str | os.PathLike | pd.DataFrame | None = None,
    *,
    higher_is: str | None = None,
    one_is: str | None = None,
    by: str | Sequence[str] | None = None,
    phase: str | None = None,
    threshold: float | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    attack_intervals: bool = False,
) -> Evaluation:
    """Return every metric that the inputs allow, under stable names; rates are fractions.

    Args:
        scores: score file, what read_scores returned, or a frame with utterance (or path) and score.
        protocol: frame with utterance, label and, where known, attack and speaker; or a file for read_keys. A column
            `score` in it plays no part.
        asv_scores: the same split's ASV score file or frame (attack, key, score); without it no t-DCF.
        higher_is: what a high score in the file stands for, "bonafide" or "spoof"; None: what its JSON
            companion says. Scores in a frame are higher = more bona fide unless "spoof" is given.
        one_is: what a label 1 stands for in files whose labels are numbers, "bonafide" or "spoof".
        by: columns of the protocol to break the EER down by; fractional numbers are cut into quartiles.
        phase: evaluate this phase of ASVspoof 2021 alone ("eval", "progress", "hidden").
        threshold: operating point for accuracy and the shares of errors; None takes the EER's own.
        n_bootstrap: replicates of the speaker bootstrap; 0 gives no intervals.
        seed, confidence: of the bootstrap, see intervals.bootstrap.
        attack_intervals: give each row of per_attack and by an interval too (about a second each 10 rows).

    Raises:
        ScoreError: scores and protocol do not match one to one; scores are decisions or not finite; one class
            only; ASV scores of another split.
        ConfigError: unknown column or phase.

    Warns:
        UserWarning: EER above 50 %, phases pooled, trials given twice, unknown speakers, doubtful ASV scores.

    >>> frame = pd.DataFrame({"utterance": list("abcdef"), "score": [0.1, 0.2, 0.6, 0.5, 0.8, 0.9]})
    >>> keys = pd.DataFrame({"utterance": list("abcdef"), "label": [0, 0, 0, 1, 1, 1]})
    >>> result = evaluate(frame, keys, n_bootstrap=0)
    >>> round(result["eer"], 4), result.n_bonafide, result["min_tdcf"]
    (0.3333, 3, None)
    """
    notes = _Notes()
    scores = _as_scores(scores, higher_is, one_is)
    protocol = protocol if isinstance(protocol, pd.DataFrame) else read_keys(protocol, one_is=one_is)
    scores, protocol = _only_phase(scores, protocol, phase)
    trials = join_scores(protocol, scores)
    score, label = metrics.check_trials(trials["score"], trials["label"])
    trials = trials.assign(score=score)
    _refuse_decisions(score)
    points = metrics.det_points(score, label)
    eer = metrics.eer_of(points)
    if eer.eer > 0.5:
        notes.add(_upside_down(eer.eer, scores.higher_is))
    for note in scores.notes:
        notes.add(note)
    _note_pooled_phases(trials, notes)
    asv = _asv(asv_scores, trials, phase, notes)
    at = eer.threshold if threshold is None else float(threshold)
    clusters, unit = _clusters(trials, notes) if n_bootstrap else (None, None)
    p_miss, p_fa = metrics.error_rates(score, label, at)

    interval = _interval_maker(n_bootstrap, seed, confidence) if unit else None
    row_interval = interval if attack_intervals else None
    columns = [by] if isinstance(by, str) else list(by or ())
    return Evaluation(
        eer=eer.eer,
        eer_threshold=eer.threshold,
        **_tandem(points, asv),
        min_dcf=metrics.min_dcf_of(points)[0],
        act_dcf=metrics.act_dcf(score, label),
        cllr=metrics.cllr(score, label),
        min_cllr=metrics.min_cllr(score, label),
        auc=metrics.auc_of(points),
        accuracy=metrics.accuracy(score, label, at),
        threshold=at,
        threshold_source="EER of these trials" if threshold is None else "given",
        p_miss=p_miss,
        p_fa=p_fa,
        n_bonafide=points.n_bonafide,
        n_spoof=points.n_spoof,
        n_speakers=_n_speakers(trials),
        **_headline_intervals(score, label, clusters, asv, interval),
        **_per_attack(trials, score, label, clusters, at, row_interval, asv),
        by={c: _breakdown(trials, c, score, label, clusters, at, row_interval) for c in columns},
        phase=phase,
        higher_is=scores.higher_is,
        score_dialect=scores.dialect,
        score_kind=scores.meta.get("score"),
        confidence=confidence if interval else None,
        n_bootstrap=n_bootstrap,
        seed=seed,
        bootstrap_unit=unit,
        warnings=notes.texts,
        trials=trials,
    )


class _Notes:
    """Warnings given, kept for the result."""

    def __init__(self):
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        self.texts.append(text)
        warnings.warn(text, UserWarning, stacklevel=4)


def _upside_down(eer: float, higher_is: str) -> str:
    """What an EER above 50 % may mean: three different mistakes, three different cures."""
    other = "spoof" if higher_is == "bonafide" else "bonafide"
    return (
        f"EER is {eer:.1%}, above 50 %: either the scores point the other way (if a high score means {other}, say "
        f"--higher-is {other} (higher_is={other!r} in Python)), or the labels are exchanged (if a 1 means spoof in the "
        "protocol, turning the scores would repair the EER and leave bona fide and spoof swapped: say --one-is spoof "
        "(one_is='spoof' in Python), or correct the labels), or the detector is worse than a coin here"
    )


def _note_pooled_phases(trials: pd.DataFrame, notes: _Notes) -> None:
    """Nobody reports the phases of ASVspoof 2021 together."""
    if "phase" not in trials:
        return
    counts = trials["phase"].value_counts()
    pooled = [f"{counts[phase]:,} {phase}" for phase in PHASES_2021 if phase in counts]
    if len(pooled) > 1:
        notes.add(
            f"ASVspoof 2021's phases are pooled here ({', '.join(pooled)}), and published figures are of phase eval "
            "alone: say --phase eval (phase='eval' in Python)"
        )


def _as_scores(scores: str | os.PathLike | Scores | pd.DataFrame, higher_is: str | None, one_is: str | None) -> Scores:
    if isinstance(scores, Scores):
        if higher_is not in (None, scores.higher_is):
            raise ConfigError(
                f"these scores were read with higher_is={scores.higher_is!r}, now {higher_is!r} is asked "
                "for; read them again with the right one"
            )
        return scores
    if not isinstance(scores, pd.DataFrame):
        return read_scores(scores, higher_is, one_is=one_is)
    if higher_is not in (None, "bonafide", "spoof"):
        raise ConfigError(f"higher_is must be 'bonafide' or 'spoof', got {higher_is!r}")
    if "score" not in scores:
        raise ScoreError(f"the scores have no `score` column, only {list(scores.columns)}")
    if "utterance" not in scores and "path" in scores:
        scores = scores.assign(utterance=short_names([os.fspath(path) for path in scores["path"]]))
    sign = -1 if higher_is == "spoof" else 1
    return Scores(scores.assign(score=sign * scores["score"]), "data frame", higher_is or "bonafide")


def _only_phase(scores: Scores, protocol: pd.DataFrame, phase: str | None) -> tuple[Scores, pd.DataFrame]:
    """The protocol's rows of one phase, and the scores without those of its other phases."""
    if phase is None:
        return scores, protocol
    if "phase" not in protocol:
        raise ConfigError(
            f"phase={phase!r} needs a `phase` column (ASVspoof 2021's trial_metadata.txt); this protocol has "
            f"{', '.join(protocol.columns)}"
        )
    chosen = protocol["phase"] == phase
    if not chosen.any():
        known = ", ".join(sorted(set(protocol["phase"])))
        raise ConfigError(f"no trial of phase {phase!r}; the protocol's phases are {known}")
    frame = in_names_of(protocol, scores.frame)
    elsewhere = frame["utterance"].isin(protocol.loc[~chosen, "utterance"])
    return replace(scores, frame=frame[~elsewhere]), protocol[chosen]


def _refuse_decisions(score: np.ndarray) -> None:
    """Two distinct values over many trials are decisions: no curve can be drawn from them."""
    values = np.unique(score)
    if values.size == 2 and score.size > 2:
        raise ScoreError(
            f"the {score.size} scores take two values only, {values[0]:g} and {values[1]:g}: these are "
            "decisions, and the metrics need the countermeasure's graded score (a logit or likelihood ratio)"
        )


def _asv(asv_scores, trials: pd.DataFrame, phase: str | None, notes: _Notes) -> pd.DataFrame | None:
    """The ASV trials, refused where they are another split's."""
    if asv_scores is None:
        return None
    asv = asv_scores if isinstance(asv_scores, pd.DataFrame) else read_asv_scores(asv_scores)
    if phase is not None and "phase" in asv:
        asv = asv[asv["phase"] == phase]
    spoofed = trials.loc[trials["label"] == SPOOF, "attack"] if "attack" in trials else pd.Series(dtype=str)
    counts = spoofed[~spoofed.isin((*UNKNOWN_WORDS, "spoof"))].value_counts()
    in_asv = asv.loc[asv["key"] == "spoof", "attack"].value_counts()
    if counts.empty:
        notes.add("the protocol names no attacks: whether the ASV scores are of the same split is not known")
    foreign = sorted(counts.index.difference(in_asv.index))
    if foreign:
        raise ScoreError(
            "the ASV scores are of another split or corpus: the protocol has attacks "
            f"{', '.join(foreign)}, the ASV scores have {', '.join(sorted(in_asv.index)) or 'none'}; "
            "give the ASV score file of the split that is evaluated"
        )
    larger = [attack for attack in counts.index if counts[attack] > in_asv[attack]]
    if larger:
        notes.add(
            f"attack {larger[0]} has {counts[larger[0]]} trials in the protocol but only "
            f"{in_asv[larger[0]]} in the ASV scores, which may be of another corpus (those of 2019 do not "
            "fit 2021); t-DCF and tandem EER stand on them"
        )
    return asv


def _tandem(points: metrics.DetPoints, asv: pd.DataFrame | None) -> dict:
    if asv is None:
        return {"min_tdcf": None, "min_tdcf_revised": None, "tandem_eer": None}
    rates = metrics.asv_error_rates(asv["score"], asv["key"])
    tandem_eer = metrics.tandem_eer(points, asv["score"], asv["key"])
    return {
        "min_tdcf": float(metrics.tandem_curve(points, rates).cost.min()),
        "min_tdcf_revised": float(metrics.tandem_curve(points, rates, revised=True).cost.min()),
        "tandem_eer": tandem_eer if np.isfinite(tandem_eer) else None,
    }


def known_speakers(trials: pd.DataFrame) -> pd.Series | None:
    """Return speakers as text with unknown ones as NaN, or None without the column."""
    if "speaker" not in trials:
        return None
    speakers = trials["speaker"].astype(str)
    return speakers.mask(trials["speaker"].isna() | speakers.isin(UNKNOWN_WORDS))


def _n_speakers(trials: pd.DataFrame) -> int | None:
    speakers = known_speakers(trials)
    return None if speakers is None or speakers.isna().all() else int(speakers.nunique())


def _clusters(trials: pd.DataFrame, notes: _Notes) -> tuple[np.ndarray | None, str | None]:
    """Speaker of each trial where that can carry a bootstrap, else None, and what is resampled: None is nothing."""
    speakers = known_speakers(trials)
    labels = {"bona fide": trials["label"] == BONAFIDE, "spoof": trials["label"] == SPOOF}
    if few := [name for name, of_class in labels.items() if of_class.sum() < 2]:
        notes.add(f"no intervals: there is a single {' and a single '.join(few)} trial, and one cannot be resampled")
        return None, None
    if speakers is None or speakers.isna().any():
        n = len(trials) if speakers is None else int(speakers.isna().sum())
        reason = f"the speaker of {n} of {len(trials)} trials is not known"
    elif min(speakers[of_class].nunique() for of_class in labels.values()) < 2:
        reason = "one of the classes has a single speaker"
    else:
        return speakers.to_numpy(dtype=str), "speaker"
    notes.add(f"{reason}: intervals resample trials as if they were independent, and are likely too narrow")
    return None, "trial"


def _interval_maker(n_bootstrap: int, seed: int, confidence: float):
    """bootstrap with the settings filled in."""

    def interval(metric, score, label, clusters):
        return intervals.bootstrap(metric, score, label, clusters, n=n_bootstrap, seed=seed, confidence=confidence)

    return interval


def _headline_intervals(score, label, clusters, asv: pd.DataFrame | None, interval) -> dict:
    """Intervals of EER, min DCF and min t-DCF from the same replicates; the ASV system is taken as fixed."""
    names = ["eer_ci", "min_dcf_ci", "min_tdcf_ci", "min_tdcf_revised_ci"]
    if interval is None:
        return dict.fromkeys(names)
    rates = None if asv is None else metrics.asv_error_rates(asv["score"], asv["key"])

    def headline(score: np.ndarray, label: np.ndarray) -> list[float]:
        points = metrics.det_points(score, label)
        values = [metrics.eer_of(points).eer, metrics.min_dcf_of(points)[0]]
        if rates is not None:
            values += [metrics.tandem_curve(points, rates, revised=r).cost.min() for r in (False, True)]
        return values

    _, low, high = interval(headline, score, label, clusters)
    found = [[float(a), float(b)] for a, b in zip(low, high, strict=True)]
    return dict.fromkeys(names) | dict(zip(names, found, strict=False))


def _eer_and_interval(score, label, clusters, chosen: np.ndarray, interval) -> dict:
    """EER of the chosen trials, with its interval where one was asked for and can be had."""
    score, label = score[chosen], label[chosen]
    row = {"eer": metrics.compute_eer(score, label).eer, "eer_ci": None}
    if interval is not None:
        clusters = None if clusters is None else clusters[chosen]
        try:
            _, low, high = interval(intervals.eer_metric, score, label, clusters)
        except ScoreError:  # a single speaker or trial: no interval, rather than a wrong one
            return row
        row["eer_ci"] = [low, high]
    return row


def _attack_tdcf(score, label, asv: pd.DataFrame | None, attack: str) -> float | None:
    """Min t-DCF (2019) of one attack's trials: the ASV system at its operating point, met by this attack only."""
    if asv is None:
        return None
    met = asv[(asv["key"] != "spoof") | (asv["attack"] == attack)]
    try:
        return metrics.min_tdcf_2019(score, label, metrics.asv_error_rates(met["score"], met["key"]))
    except ScoreError:  # no ASV trial of this attack, or none that the ASV system accepts
        return None


def _per_attack(
    trials: pd.DataFrame, score, label, clusters, threshold: float, interval, asv: pd.DataFrame | None
) -> dict:
    """Each attack against all bona fide trials, and who commits the errors at the threshold."""
    accepted = score >= threshold
    is_bonafide = label == BONAFIDE
    n_errors = int((accepted != is_bonafide).sum())

    def share(wrong: np.ndarray) -> float | None:
        return float(wrong.sum() / n_errors) if n_errors else None

    result = {"per_attack": {}, "bonafide_share_of_errors": share(is_bonafide & ~accepted)}
    if "attack" not in trials:
        return result
    attack = trials["attack"].to_numpy()
    for name in sorted(set(attack[~is_bonafide]), key=str):
        of_attack = ~is_bonafide & (attack == name)
        chosen = is_bonafide | of_attack
        row = {"n": int(of_attack.sum()), "min_tdcf": _attack_tdcf(score[chosen], label[chosen], asv, name)}
        row |= _eer_and_interval(score, label, clusters, chosen, interval)
        row |= {"p_fa": float(accepted[of_attack].mean()), "share_of_errors": share(of_attack & accepted)}
        result["per_attack"][str(name)] = row
    return result


def _breakdown(trials: pd.DataFrame, column: str, score, label, clusters, threshold: float, interval) -> dict:
    """EER and error rates for every value of one column; see evaluate."""
    if column not in trials:
        raise ConfigError(f"by={column!r} is no column of the protocol: {', '.join(trials.columns)}")
    values = trials[column]
    if pd.api.types.is_float_dtype(values) and not np.all(values.dropna() % 1 == 0):
        values = pd.qcut(values, 4, duplicates="drop")
    if values.nunique() > MAX_GROUPS:
        raise ConfigError(f"by={column!r} has {values.nunique()} values; a table holds up to {MAX_GROUPS}")
    accepted, is_bonafide = score >= threshold, label == BONAFIDE
    rows = {}
    groups = {str(value): (values == value).to_numpy() for value in sorted(values.dropna().unique())}
    if values.isna().any():
        groups["missing"] = values.isna().to_numpy()
    for value, group in groups.items():
        bonafide, spoof = group & is_bonafide, group & ~is_bonafide
        against, chosen = "its own trials", group
        if not bonafide.any():
            against, chosen = "all bona fide", group | is_bonafide
        elif not spoof.any():
            against, chosen = "all spoof", group | ~is_bonafide
        rows[value] = {
            "n_bonafide": int(bonafide.sum()),
            "n_spoof": int(spoof.sum()),
            "against": against,
            **_eer_and_interval(score, label, clusters, chosen, interval),
            "p_miss": float(np.mean(~accepted[bonafide])) if bonafide.any() else None,
            "p_fa": float(np.mean(accepted[spoof])) if spoof.any() else None,
        }
    return rows
