"""Retraining from feedback: from what clients said to weights in service, in steps that each leave a file behind.

    MODELS/retrainings/N/settings.json     what this retraining was started with
                         feedback.csv      every recording with feedback: accepted, quarantined or left out, and why
                         corpus/           the training list with what was accepted, as a manifest.csv
                         run/              notebooks 02 and 03 as they ran, with the weights
    MODELS/VERSION/                        the candidate: weights, calibration, reference for drift
    MODELS/retrainings/N/comparison.csv    candidate and current on every frozen test set and on held-out feedback
    MODELS/decisions.jsonl                 what was decided, and why

A step whose file is there is not done again, so a retraining that died goes on where it was when it is started again.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from deepfake_utils.conventions import LABEL_NAMES, SAMPLE_RATE_HZ, UNKNOWN_ATTACK, ConfigError, TrainingError
from deepfake_utils.corpora import Corpus, divide, find_corpora
from deepfake_utils.corpora.trials import fingerprint
from deepfake_utils.evaluation.calibration import fit_calibration
from deepfake_utils.files import atomic_write
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.scoring.published import sha256_of
from deepfake_utils.scoring.score import score_protocol
from deepfake_utils.scoring.weights import load_model, read_companion
from deepfake_utils.serving import drift
from deepfake_utils.serving.feedback import (
    ACCEPTED,
    check_rules,
    claims_of,
    judge,
    leave_out_known,
    same_recordings,
)
from deepfake_utils.serving.headless import notebook_runner
from deepfake_utils.serving.promotion import compare, refusals
from deepfake_utils.serving.records import Records
from deepfake_utils.serving.versions import Versions

RULES = Path(__file__).parent / "rules.toml"
RETRAININGS = "retrainings"
HELD_OUT = "held-out feedback"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Wish:
    """What a retraining is asked to do; kept with it, so that it is the same one when it goes on.

    Attributes:
        base: folder of a run of notebook 02, whose corpus and settings are taken.
        data: where its corpus is now; "" is where it was.
        tests: folders of further corpora, whose eval is a frozen test set like that of the base.
        parameters: of the notebooks, instead of those of the base: name -> value.
        rules: as in rules.toml.
    """

    base: str
    data: str
    tests: tuple[str, ...]
    parameters: dict[str, str]
    rules: dict


def read_rules(path: Path | None = None) -> dict:
    """The rules of a file, those that come with the package by default.

    Raises:
        ConfigError: it is no TOML, or a rule is missing, unknown or no number.
    """
    known = tomllib.loads(RULES.read_text(encoding="utf-8"))
    try:
        rules = tomllib.loads((path or RULES).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: no TOML ({error}): start from a copy of {RULES}") from None
    check_rules(rules, known)
    return rules


def retrain(records: Records, folder: Path, wish: Wish, notebooks: Path, say: Callable[[str], None] = print) -> bool:
    """Retrain, compare, and let the candidate take over where the rules allow it; go on with a retraining that died.

    Args:
        records: the service's verdicts and feedback.
        folder: MODELS, which the service follows; made where it is not there.
        wish: what to do; it must be as it was where a retraining goes on.
        notebooks: folder with run.py and the notebooks.
        say: is told every step and reason.

    Returns:
        Whether the candidate took over.

    Raises:
        DeepfakeUtilsError: something asked for is not there or does not fit.
    """
    with Versions(folder).locked() as versions:
        step = Retraining(versions, records, wish, notebooks, say)
        step.install_base()
        if not step.believe():
            return False
        step.write_corpus()
        step.train()
        step.make_candidate()
        step.compare()
        return step.decide()


class Retraining:
    """The steps of one retraining, in order; each leaves at once what is done already."""

    def __init__(self, versions: Versions, records: Records, wish: Wish, notebooks: Path, say: Callable[[str], None]):
        self._versions, self._records, self._notebooks, self._say = versions, records, notebooks, say
        n_done = sum(line["event"] in ("promoted", "refused") for line in versions.history())
        self.number = n_done + 1
        self.folder = versions.folder / RETRAININGS / str(self.number)
        self.name = f"retraining {self.number}"
        result = _result_of(wish.base)
        self._config = result["config"]
        self._corpus = _corpus_of(result, wish.data)
        protocols, _ = divide(self._corpus, self._config["seed"])
        self._train, self._dev, self._eval = protocols
        self._tests = {f"eval of {self._corpus.name}": self._eval} | _tests_of(wish.tests)
        self.wish = self._as_begun(wish)  # last: a slip in the command is nothing to go on with

    def _as_begun(self, wish: Wish) -> Wish:
        asked = json.loads(json.dumps(asdict(wish)))
        if not (self.folder / SETTINGS).is_file():
            _write_json(self.folder / SETTINGS, asked)
            self._say(f"retraining {self.number} begins in {self.folder}")
            return wish
        begun = _settings(self.folder)
        if other := [name for name in asked if asked[name] != begun[name]]:
            raise ConfigError(
                f"{self.folder} began with other settings ({', '.join(other)}): go on with those in its {SETTINGS}, or "
                "delete the folder to begin anew"
            )
        self._say(f"retraining {self.number} goes on in {self.folder}")
        return wish

    # --- the steps

    def install_base(self) -> None:
        """Put the base's weights into service where none are, and note the test sets, which must stay as they are."""
        frozen = {name: fingerprint(trials) for name, trials in self._tests.items()}
        known = {}
        for line in self._versions.history():
            known |= line.get("frozen", {})
        if changed := [name for name in frozen if known.get(name, frozen[name]) != frozen[name]]:
            raise ConfigError(
                f"test set {', '.join(changed)} is not what it was when it was first used: comparisons with earlier "
                "decisions would mean nothing; put the old one back, or give the new one another name"
            )
        if self._versions.current is None:
            weights = self._with_calibration(Path(self.wish.base) / "02_train" / "best.safetensors", "base")
            self._versions.take_over("installed", weights, weights.parent.name, frozen=frozen)
            self._say(f"{weights.parent.name} is in service, the weights of {self.wish.base}")
        elif set(frozen) - set(known):
            self._versions.note("froze", frozen=frozen)

    def believe(self) -> bool:
        """Decide which recordings are learned from and which are held out: feedback.csv.

        Returns:
            Whether there is anything to learn that the last retraining did not learn from; if not, none is begun.
        """
        if (self.folder / "feedback.csv").is_file():
            return True
        claims = claims_of(self._records.feedback(), self._records.verdicts())
        recordings = claims.drop_duplicates("sha256")
        trials = recordings[["sha256", "path"]].rename(columns={"sha256": "utterance"})
        log_odds = dict(zip(trials["utterance"], self._log_odds(self._in_service, trials), strict=True))
        table = judge(claims, log_odds, self.wish.rules["feedback"], len(self._train))
        splits = {"the training list": self._train, "dev": self._dev, **self._tests}
        table = leave_out_known(table, same_recordings(splits))
        if _learned(table).empty:
            why = f"{len(table):,} recordings have confirmed feedback and were kept, none is accepted for training"
        elif self._is_as_before(table):
            why = f"no confirmed feedback since retraining {self.number - 1}"
        else:
            _write_csv(self.folder / "feedback.csv", table)
            return True
        reasons = [why, *table.loc[table["reason"] != "", "reason"].unique()]
        self._versions.note("no retraining", reasons=reasons)
        self._say("no retraining: " + "\n  ".join(reasons))
        shutil.rmtree(self.folder)
        return False

    def write_corpus(self) -> None:
        """The training list with what was accepted and not held out: a corpus with a manifest.csv."""
        table = _read_feedback(self.folder)
        for (outcome, reason), of_one in table.groupby(["outcome", "reason"], sort=False):
            self._say(f"feedback: {len(of_one):,} recordings {outcome}" + (f": {reason}" if reason else ""))
        learned = _as_trials(_learned(table))
        trials = pd.concat([self._train, self._dev, self._eval, learned], ignore_index=True)
        trials["label"] = trials["label"].map(LABEL_NAMES)
        columns = ["utterance", "path", "label", "attack", "speaker", "split"]
        _write_csv(self.folder / "corpus" / "manifest.csv", trials[columns])
        self._say(f"training list: {len(self._train):,} trials of {self._corpus.name}, {len(learned):,} of feedback")

    def train(self) -> None:
        """Run notebooks 02 and 03, or what of them is not done yet."""
        names = ("02_train", "03_error_analysis")
        run = self.folder / "run"
        if all((run / name / "result.json").is_file() for name in names):
            return
        wanted = _parameters(self._config) | self.wish.parameters
        self._say(f"notebooks {' and '.join(names)} run, into {run}")
        runner = notebook_runner(self._notebooks)
        try:
            runner.run(
                [self._notebooks / f"{name}.ipynb" for name in names], str(self.folder / "corpus"), run.parent,
                [(name, str(value)) for name, value in wanted.items()], into=run,
            )  # fmt: skip
        except runner.RunError as error:
            raise TrainingError(f"{self.name}: {error}") from None

    def make_candidate(self) -> None:
        """Calibrate the trained weights on dev, and put them with a reference for drift where versions lie."""
        place = self.folder / "candidate.json"
        if not place.is_file():
            best = self.folder / "run" / "02_train" / "best.safetensors"
            weights = self._with_calibration(best, f"{self.number:04d}")
            _write_json(place, {"weights": str(weights), "version": weights.parent.name})

    def compare(self) -> None:
        """Hold candidate and current against each other on every test set: comparison.csv."""
        done = self.folder / "comparison.csv"
        if done.is_file() and pd.read_csv(done)["against"].iloc[0] == self._versions.current["version"]:
            return  # else it died after this step, and somebody rolled back meanwhile
        table = _read_feedback(self.folder)
        held_out = table[(table["outcome"] == ACCEPTED) & table["held_out"]]
        sets = self._tests | {HELD_OUT: _as_trials(held_out).assign(split="eval")}
        results = []
        for name, trials in sets.items():
            systems = [self._log_odds(weights, trials) for weights in (self._candidate["weights"], self._in_service)]
            results.append(compare(name, trials, *systems, self.wish.rules["promotion"], frozen=name != HELD_OUT))
        table = pd.concat(results, ignore_index=True)
        _write_csv(done, table.assign(against=self._versions.current["version"]))

    def decide(self) -> bool:
        """Let the candidate take over, or say why not; write either down."""
        table = pd.read_csv(self.folder / "comparison.csv")
        reasons = refusals(table, self.wish.rules["promotion"])
        candidate = self._candidate
        facts = {"retraining": self.number, "comparison": str(self.folder / "comparison.csv")}
        self._say(in_words(table))
        if reasons:
            self._versions.note("refused", version=candidate["version"], reasons=reasons, **facts)
            self._say(f"{candidate['version']} does not take over:\n" + "\n".join(f"  {r}" for r in reasons))
            return False
        self._versions.take_over("promoted", candidate["weights"], candidate["version"],
                                 reasons=["every rule holds"], rules=self.wish.rules, **facts)  # fmt: skip
        self._say(f"{candidate['version']} takes over from {table['against'].iloc[0]}: every rule holds")
        return True

    # --- what they share

    def _is_as_before(self, table: pd.DataFrame) -> bool:
        last = self.folder.parent / str(self.number - 1)
        if not (last / "feedback.csv").is_file() or _settings(last) != _settings(self.folder):
            return False
        before, now = (_learned(one)[["sha256", "label"]].values.tolist() for one in (_read_feedback(last), table))
        return before == now

    @property
    def _in_service(self) -> str:
        return self._versions.current["weights"]

    @property
    def _candidate(self) -> dict:
        return json.loads((self.folder / "candidate.json").read_text(encoding="utf-8"))

    def _with_calibration(self, trained: Path, prefix: str) -> Path:
        """A copy of trained weights as a version, with a calibration from dev and a reference for drift."""
        name = f"{prefix}-{sha256_of(trained.read_bytes())[:8]}"
        target = self._versions.folder / name / "weights.safetensors"
        facts = read_companion(trained)
        if "calibration" not in facts:
            scores = _logit_differences(trained, self._dev)
            fitted = fit_calibration(scores, self._dev["label"], fitted_on=f"dev of {self._corpus.name}")
            facts["calibration"] = {"slope": float(fitted.slopes[0]), "offset": float(fitted.intercept)}
        with atomic_write(target) as part:
            shutil.copyfile(trained, part)
        _write_json(target.with_suffix(".json"), facts)
        reference = drift.make_reference(Detector.load(target), self._dev)
        drift.write_reference(target, reference, f"dev of {self._corpus.name}")
        return target

    def _log_odds(self, weights: str, trials: pd.DataFrame) -> np.ndarray:
        if trials.empty:
            return np.zeros(0)
        scale = read_companion(Path(weights))["calibration"]
        return scale["slope"] * _logit_differences(Path(weights), trials) + scale["offset"]


def in_words(table: pd.DataFrame) -> str:
    """A comparison as lines of text, rates in percent."""
    lines = [f"{'':<40}{'trials':>8}{'current':>10}{'candidate':>11}  difference [interval], %"]
    for row in table.itertuples():
        what = f"{row.set}, {row.attack}" if isinstance(row.attack, str) and row.attack else row.set
        interval = "" if np.isnan(row.low) else f" [{100 * row.low:+.1f}, {100 * row.high:+.1f}] by {row.unit}"
        lines.append(
            f"{f'{what}: {row.measure}':<40}{row.n:>8}{100 * row.current:>10.1f}{100 * row.candidate:>11.1f}  "
            f"{100 * row.difference:+.1f}{interval}"
        )
    return "\n".join(lines)


def _corpus_of(result: Mapping, data: str) -> Corpus:
    """The corpus a run was trained on, where it is now."""
    facts = result["corpus"]
    place = data or facts.get("root", "")
    if not place:
        raise ConfigError(f"the run does not say where its corpus {facts['name']} lies: name the folder (--data)")
    corpus = find_corpora(place)[0]
    if corpus.fingerprint() != facts["fingerprint"]:
        raise ConfigError(
            f"the corpus in {place} has the fingerprint {corpus.fingerprint()}, the base was trained on "
            f"{facts['fingerprint']} ({facts['name']}): name the folder it is in (--data)"
        )
    return corpus


def _tests_of(folders: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    corpora = {folder: find_corpora(folder)[0] for folder in folders}
    return {f"eval of {corpus.name} in {folder}": corpus.protocol("eval") for folder, corpus in corpora.items()}


def _as_trials(accepted: pd.DataFrame) -> pd.DataFrame:
    """Recordings with feedback as trials; their client stands for the speaker, who is not known."""
    return pd.DataFrame({
        "utterance": "feedback " + accepted["sha256"],
        "path": accepted["path"],
        "label": accepted["label"],
        "attack": np.where(accepted["label"] == 1, "-", UNKNOWN_ATTACK),
        "speaker": "client " + accepted["client"],
        "split": "train",
        "corpus": "feedback",
    })  # fmt: skip


def _parameters(config: Mapping) -> dict[str, str]:
    """The parameters with which notebook 02 trains as the base was trained."""
    preset = "short" if config["schedule"] == "one_cycle" else "paper"
    same = {name: config[name] for name in ("model", "loss", "augmentation", "epochs", "batch_size", "seed")}
    return {"preset": preset, "crop_s": config["crop_samples"] / SAMPLE_RATE_HZ, "time_budget_s": 0, **same}


def _logit_differences(weights: Path, trials: pd.DataFrame) -> np.ndarray:
    scores = score_protocol(load_model(weights=weights), trials, progress=None)
    return (scores["logit_bonafide"] - scores["logit_spoof"]).to_numpy()


def _learned(table: pd.DataFrame) -> pd.DataFrame:
    """What of judged feedback goes into the training list."""
    return table[(table["outcome"] == ACCEPTED) & ~table["held_out"].astype(bool)]


def _settings(folder: Path) -> dict:
    return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))


def _read_feedback(folder: Path) -> pd.DataFrame:
    text = dict.fromkeys(("sha256", "path", "client", "outcome", "reason"), str)
    return pd.read_csv(folder / "feedback.csv", dtype=text, keep_default_na=False)


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as part:
        table.to_csv(part, index=False)


def _result_of(base: str) -> dict:
    path = Path(base) / "02_train" / "result.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): expected --base to name the folder of a run of the notebooks, such as "
            "notebooks/run.py prints it"
        ) from None


def _write_json(path: Path, facts: dict) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
