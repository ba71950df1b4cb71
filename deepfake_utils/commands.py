"""What each command of the command line does; its arguments are in `__main__`, and are what `options` holds.

Each returns an exit code: 0 done; 1 done except for recordings that could not be read, each named on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tqdm.auto import tqdm

from deepfake_utils.conventions import LABEL_NAMES, AudioError, ConfigError
from deepfake_utils.files import atomic_write, refuse_no_file, refuse_overwriting

DONE, SOME_UNREADABLE = 0, 1
MOST_DAYS = 36_500  # that a report looks back


def find(options: argparse.Namespace) -> int:
    """Print the corpora found, with their trials by split, label and attack."""
    from deepfake_utils import corpora

    for corpus in corpora.find_corpora(*options.folders, name=options.name):
        print(f"{corpus.name}  {corpus.root}")
        counts = corpus.counts()
        for split, rows in counts.groupby("split", sort=False):
            missing = int(rows["missing"].sum())
            print(f"  {split:<6}{describe_counts(rows)}" + (f"; audio missing: {missing:,}" if missing else ""))
            if asv := corpus.asv_scores(split):
                print(f"        ASV scores: {asv}")
    return DONE


def describe_counts(rows) -> str:
    """One split's trials: those of each label, and of each attack.

    Args:
        rows: frame with columns label, attack and trials.
    """
    parts = []
    for label in reversed(LABEL_NAMES.values()):
        of_label = rows[rows["label"] == label]
        attacks = ", ".join(f"{attack} {n:,}" for attack, n in zip(of_label["attack"], of_label["trials"], strict=True))
        several = f" ({attacks})" if len(of_label) > 1 else ""
        parts.append(f"{of_label['trials'].sum():,} {label}{several}")
    return ", ".join(parts)


def collect(options: argparse.Namespace) -> int:
    """Build the corpus of open speech from the public recordings that the package lists."""
    from deepfake_utils import collecting

    limit = None if options.limit_mb is None else int(options.limit_mb * 1e6)
    settings = {"licence": options.licence, "mirrors": options.mirrors, "limit_bytes": limit, "say": print}
    collecting.collect(options.folder, **settings)
    if options.synthesise:
        collecting.synthesise(
            options.folder, options.synthesise, engines=options.engines, mirrors=options.mirrors, say=print
        )
        collecting.collect(options.folder, **settings)
    return DONE


def train(options: argparse.Namespace) -> int:
    """Train a countermeasure, or go on with a run that stopped; under torchrun, in several processes."""
    from deepfake_utils import corpora
    from deepfake_utils.training import jobs
    from deepfake_utils.training.config import RECIPES, TrainingConfig
    from deepfake_utils.training.loop import fit

    if options.data is None:
        if options.set:
            raise ConfigError(
                "--set describes a new run and goes with --data; config.json in the run folder holds the old one"
            )
        jobs.run_job(options.run_dir, device=options.device)
        return DONE
    corpus = corpora.find_corpora(options.data)[0]
    values = RECIPES[options.recipe].to_dict() | dict(map(parse_setting, options.set))
    config = TrainingConfig.from_dict(values)
    if "train" in corpus.splits:
        protocols = corpus.protocol("train"), corpus.protocol("dev")
    else:
        (*protocols, _), where_from = corpora.divide(corpus, config.seed)
        print(where_from)
    if os.environ.get("RANK", "0") == "0":
        jobs.write_job(options.run_dir, *protocols, config)
    fit(*protocols, options.run_dir, config, device=options.device, say=print)  # other ranks need not see the job
    return DONE


def calibrate(options: argparse.Namespace) -> int:
    """Fit on the dev split all that turns scores of weights into decisions, and write it into the JSON beside them.

    Calibration, pooling of windows, the uncertain band, thresholds of the uses, marks of fake stretches; judged on the
    eval split. Real speech is heard as it is and, where PyAV can encode, as it sounds by messenger (Opus).
    """
    from deepfake_utils import corpora
    from deepfake_utils.scoring.calibrate import calibrate as fit

    corpus = corpora.find_corpora(options.data)[0]
    fit(options.weights, corpus.protocol("dev"), corpus.protocol("eval"), n_hosts=options.hosts, most=options.most)
    return DONE


def reference(options: argparse.Namespace) -> int:
    """Measure recordings of the dev split and keep the figures beside weights: what `monitor` tells drift by."""
    from deepfake_utils import corpora
    from deepfake_utils.scoring.detector import Detector
    from deepfake_utils.scoring.weights import refuse_shipped_name, weights_file

    try:
        from deepfake_utils.serving import drift
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'deepfake-utils[serve]'") from None
    refuse_shipped_name(options.weights)
    corpus = corpora.find_corpora(options.data)[0]
    measured = drift.make_reference(Detector.load(options.weights), corpus.protocol("dev"), n=options.most)
    path = drift.write_reference(
        weights_file(options.weights), measured, f"{len(measured):,} recordings of dev of {corpus.name}"
    )
    print(path)
    return DONE


def parse_setting(text: str) -> tuple[str, object]:
    """NAME=VALUE of a training setting; the value is read as JSON where it is JSON.

    >>> parse_setting("epochs=5"), parse_setting("schedule=one_cycle")
    (('epochs', 5), ('schedule', 'one_cycle'))
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected NAME=VALUE, such as epochs=5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def export(options: argparse.Namespace) -> int:
    """Write a countermeasure as ONNX and compare it with PyTorch; or fitted to a kind of machine, with a card."""
    from deepfake_utils.scoring.onnx import export_onnx, parity_report
    from deepfake_utils.scoring.targets import refuse_companion_of_others, write_companion
    from deepfake_utils.scoring.weights import load_model

    if options.target:
        return export_target(options)
    if options.data:
        raise ConfigError("--data goes with --target: a plain export needs no corpus")
    if options.weights:
        refuse_companion_of_others(options.out, options.weights)
    model = load_model(options.model, weights=options.weights)
    export_onnx(model, options.out)
    if options.weights:
        write_companion(options.out, options.weights)
    print(parity_report(options.out, model))
    return DONE


def export_target(options: argparse.Namespace) -> int:
    """Write a countermeasure made smaller for a target, and beside it the card with what that cost."""
    from deepfake_utils import corpora
    from deepfake_utils.scoring.targets import build

    if options.data is None or options.model:
        raise ConfigError("--target needs --data, a corpus with train, dev and eval splits, and no --model")
    corpus = corpora.find_corpora(options.data)[0]
    protocols = {split: corpus.protocol(split) for split in ("train", "dev", "eval")}
    card = build(options.target, options.weights, protocols, options.out, lambda line: print(line, file=sys.stderr))
    print(json.dumps(card, indent=2))
    for miss in card["misses"]:
        print(f"note: not what {options.target} asks for: {miss}", file=sys.stderr)
    if "thresholds" not in card:
        print(
            "note: the band of its verdicts was set on first windows as they are; to set it on whole recordings, by "
            f"messenger too, with thresholds for uses: deepfake-utils calibrate {options.out} --data {options.data}",
            file=sys.stderr,
        )
    return DONE


def browser(options: argparse.Namespace) -> int:
    """Assemble a page that judges recordings in the browser; any web server can serve the folder."""
    from deepfake_utils.browser import assemble

    folder = assemble(options.folder, options.weights, options.runtime)
    print(f"to try it: {Path(sys.executable).name} -m http.server --directory {folder} --bind 127.0.0.1 8000")
    print("and open http://127.0.0.1:8000; elsewhere the microphone needs https")
    return DONE


def score(options: argparse.Namespace) -> int:
    """Say of each recording whether its speech is real or machine-made (fake), as far as the weights can tell.

    The whole of every recording is looked at, in windows of 4 seconds wherever there is speech; without speech there is
    no verdict. What is written to files is there whatever ends the run; where it is killed without a warning (kill -9,
    a power cut), in a hidden file that ends in .part.
    """
    from deepfake_utils.scoring.detector import Detector
    from deepfake_utils.scoring.outputs import Outputs
    from deepfake_utils.scoring.score import list_recordings

    if options.fleet:
        return score_on_cluster(options)
    files, passed_over = list_recordings(options.audio)
    if passed_over:
        print(passed_over, file=sys.stderr)
    if options.onnx and options.model:
        raise ConfigError("--model goes with --weights; an ONNX file needs no model name")
    targets = {"csv_path": options.csv, "json_path": options.json}
    targets |= {"timeline_path": options.timeline, "scores_path": options.out}
    refuse_overwriting([*files, options.onnx or options.weights or "-"], targets.values())
    draw = None
    if options.pictures:
        try:
            from deepfake_utils.report.plots.decisions import timeline_pictures
        except ImportError:
            raise ConfigError("--pictures needs Matplotlib: pip install 'deepfake-utils[plots]'") from None
        draw = timeline_pictures(options.pictures, len(files))
    counts = Counter()
    with ended_as_by_ctrl_c(), Outputs(len(files), **targets) as outputs:
        detector = Detector.load(
            options.onnx or options.weights, model=options.model, use=options.use, device=options.device,
            whole=not options.first_window,
        )  # fmt: skip
        outputs.introduce(detector)
        try:
            seconds = bar_of_seconds(files)
            with closing(
                detector.verdicts(files, lambda until_s: seconds.update(int(until_s) - seconds.n))
            ) as verdicts:
                bar = tqdm(verdicts, "scoring", len(files), unit="file", leave=False, disable=len(files) == 1)
                for path, verdict in zip(files, bar, strict=True):
                    seconds.close()
                    outputs.add(path, verdict)
                    counts[getattr(verdict, "verdict", "unreadable")] += 1
                    if draw:
                        draw(path, verdict, detector.uncertain)
        finally:
            if len(files) > 1:
                found = ", ".join(f"{n:,} {word}" for word, n in counts.most_common()) or "none"
                print(f"{counts.total():,} of {len(files):,} recordings looked at: {found}", file=sys.stderr)
            if options.out and (n_left := counts["no verdict"] + counts["unreadable"]):
                hint = "" if options.first_window else " (--first-window gives one to all that can be read)"
                print(f"note: {n_left:,} recordings without a score are not in {options.out}{hint}", file=sys.stderr)
    return SOME_UNREADABLE if counts["unreadable"] else DONE


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """A polite kill and a closed terminal end the block as Ctrl-C does, so that files are put in their place."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # under nohup a closed terminal is ignored
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bar_of_seconds(files: Sequence[Path]) -> tqdm:
    """A progress bar over the sound of a single recording, on a terminal, when it has taken a second."""
    from deepfake_utils.waveforms.decode import audio_info

    total_s = None
    if is_shown := len(files) == 1 and sys.stderr.isatty():
        with suppress(AudioError):  # scoring says what is wrong
            total_s = None if str(files[0]) == "-" else int(audio_info(files[0]).duration_s)
    return tqdm(desc="scoring", total=total_s, unit=" s of sound", delay=1, leave=False, disable=not is_shown)


def score_on_cluster(options: argparse.Namespace) -> int:
    """Score recordings without end on a Ray cluster, into a folder of Parquet files; go on where a run was ended."""
    from deepfake_utils.scoring.detector import Detector
    from deepfake_utils.scoring.outputs import introduction

    try:
        from deepfake_utils.serving.fleet import score_fleet
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'deepfake-utils[fleet]'") from None
    if given := [f"--{name}" for name in ("csv", "json", "timeline", "pictures", "out") if getattr(options, name)]:
        raise ConfigError(f"{', '.join(given)} and --fleet: a fleet writes Parquet into its folder and nothing else")
    weights = options.onnx or options.weights
    settings = {
        "weights": os.path.abspath(weights) if weights and os.path.exists(weights) else weights,
        "model": options.model, "use": options.use, "device": options.device, "whole": not options.first_window,
    }  # fmt: skip
    print("\n".join(introduction(Detector.load(**settings))), file=sys.stderr)  # what is wrong with them is said here
    counts = score_fleet(options.audio, options.fleet, **settings)
    found = ", ".join(f"{n:,} {word}" for word, n in counts.most_common())
    print(f"{counts.total():,} recordings in {options.fleet}: {found}")
    return SOME_UNREADABLE if counts["unreadable"] else DONE


def serve(options: argparse.Namespace) -> int:
    """Answer over HTTP whether recordings are real or fake, with a page for people and an interface for programs.

    DATABASE_URL names a database other than a file in the folder, such as postgresql+psycopg://user@host/name;
    DEEPFAKE_TOKENS="anna=SECRET,ben=OTHER" lets in only who sends such a token. The weights of FOLDER/models are
    followed without a restart.
    """
    if not 0 <= options.port < 2**16:
        raise ConfigError(f"--port {options.port}: expected 1 to {2**16 - 1}, or 0 for a free one")
    try:
        if options.fleet:
            from deepfake_utils.serving.replicas import serve_fleet as run
        else:
            from deepfake_utils.serving.server import serve as run
        from deepfake_utils.serving.service import Settings
    except ModuleNotFoundError as error:
        extra = "fleet" if options.fleet else "serve"
        raise ConfigError(f"{error.name} is missing: pip install 'deepfake-utils[{extra}]'") from None
    pairs = [pair.partition("=") for pair in os.environ.get("DEEPFAKE_TOKENS", "").split(",") if pair.strip()]
    if not all(name.strip() and token.strip() and token.isascii() for name, _, token in pairs):
        raise ConfigError('DEEPFAKE_TOKENS: expected NAME=TOKEN,..., such as "anna=SECRET", tokens in ASCII')
    tokens = {token.strip(): name.strip() for name, _, token in pairs}
    if len(tokens) < len(pairs):
        raise ConfigError(
            'DEEPFAKE_TOKENS: the same token stands there twice: expected one a client, such as "anna=SECRET,ben=OTHER"'
        )
    settings = Settings(
        options.folder, options.weights, options.models, os.environ.get("DATABASE_URL"), tokens, use=options.use,
        device=options.device,
    )  # fmt: skip
    run(settings, options.host, options.port)
    return DONE


def evaluate(options: argparse.Namespace) -> int:
    """Print the figures of a score file, and write them as JSON and HTML where asked."""
    from deepfake_utils import evaluation
    from deepfake_utils.evaluation import scorefile
    from deepfake_utils.protocols import read_keys

    if options.n_bootstrap < 0 or options.n_bootstrap == 1:
        raise ConfigError(f"--n-bootstrap {options.n_bootstrap}: expected at least 2, or 0 for no intervals")
    refuse_overwriting([options.scores, options.protocol], [options.json, options.html])
    for output in filter(None, (options.json, options.html)):
        refuse_no_file(output)
    scores = scorefile.read_scores(options.scores, options.higher_is, one_is=options.one_is)
    protocol = read_keys(options.protocol, one_is=options.one_is)
    with warnings.catch_warnings(record=True):  # printed below, from the result
        warnings.simplefilter("always")
        result = evaluation.evaluate(
            scores, protocol, options.asv_scores, by=options.by, phase=options.phase,
            n_bootstrap=options.n_bootstrap, attack_intervals=options.html is not None,
        )  # fmt: skip
    for note in result.warnings:  # first: a turned direction makes nonsense of all that follows
        print(f"note: {note}", file=sys.stderr, flush=True)
    in_json = json.dumps(result.to_dict(), indent=2, allow_nan=False) if options.json else ""
    to_terminal = str(options.json) == "-"
    if options.json and not to_terminal:
        with atomic_write(options.json) as part:
            part.write_text(in_json + "\n")
    if options.html:
        from deepfake_utils.report import page as report

        report.write_html(options.html, result, options.asv_scores)
    print(in_json if to_terminal else table(result))  # last: a reader that has seen enough, as `head`, ends the command
    return DONE


def table(result: Mapping) -> str:
    """The figures of `evaluation.evaluate` for a terminal, rates in percent."""
    from deepfake_utils.report import tables

    speakers = f", {result['n_speakers']:,} speaker{'s' * (result['n_speakers'] > 1)}" if result["n_speakers"] else ""
    lines = [
        f"scores     {result['score_dialect']}; higher is more {result['higher_is']} in the file",
        f"trials     {result['n_bonafide']:,} bona fide, {result['n_spoof']:,} spoof{speakers}",
        f"threshold  {result['threshold']:.4g}, {result['threshold_source']}",
    ]
    if result["n_bootstrap"] and result["bootstrap_unit"]:
        unit = f"{result['n_bootstrap']:,} bootstraps by {result['bootstrap_unit']}"
        lines.append(f"intervals  {100 * result['confidence']:g} %, {unit}")
    figures = tables.headline_table(result)
    if result["eer"] > 0.5:
        return "\n".join([*lines, "", in_columns(figures.head(1)), "", "the other figures say nothing until the note "
                          "above is settled"])  # fmt: skip
    if result["min_tdcf"] is None:
        lines.append("t-DCF      not without --asv-scores")
    blocks = [figures, *([tables.attack_table(result)] if result["per_attack"] else [])]
    blocks += [tables.breakdown_table(result, column) for column in result["by"]]
    return "\n\n".join(["\n".join(lines), *map(in_columns, blocks)])


def in_columns(table) -> str:
    """A table for a terminal: words to the left, figures to the right."""
    words = ("meaning", table.columns[0])
    widths = {c: max(len(c), *table[c].astype(str).str.len()) for c in table}
    rows = [dict(zip(table, table, strict=True)), *table.astype(str).to_dict("records")]
    lines = ("  ".join(f"{row[c]:{'<' if c in words else '>'}{widths[c]}}" for c in table) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def monitor(options: argparse.Namespace) -> int:
    """Render a report on a service as a notebook with pictures: drift, verdicts, feedback, decisions."""
    from deepfake_utils.serving import headless
    from deepfake_utils.serving.records import Records, existing_database

    if not 0 < options.days <= MOST_DAYS:
        raise ConfigError(f"--days {options.days:g}: expected how many days to look back, up to {MOST_DAYS:,}")
    if not 0 < options.false_alarms < 1:
        raise ConfigError(f"--false-alarms {options.false_alarms:g}: expected a probability between 0 and 1")
    refuse_no_models(options.models)
    database = existing_database(options.database)  # the notebook runs in another folder
    Records(database).close()  # what is wrong with it is said here
    settings = {"days": options.days, "false_alarms": options.false_alarms}
    notebooks = options.notebooks or headless.NOTEBOOKS
    print(headless.monitor(database, options.models, options.out, notebooks, **settings))
    found = json.loads((options.out / "monitor" / "result.json").read_text(encoding="utf-8"))
    print(found["problem"] or f"drift: {', '.join(found['drifted']) or 'none seen'}")
    if found["embeddings_not_tested"] and not found["problem"]:
        print(f"embeddings were not tested: {found['embeddings_not_tested']}")
    return DONE


def retrain(options: argparse.Namespace) -> int:
    """Retrain from confirmed feedback, compare with the weights in service, and let the better ones take over.

    What was decided, and why, is added to decisions.jsonl in the models' folder. A retraining that was stopped, in
    whatever way, goes on where it was when the same command is given again.
    """
    from deepfake_utils.serving import retraining
    from deepfake_utils.serving.headless import NOTEBOOKS
    from deepfake_utils.serving.records import Records, existing_database

    wish = retraining.Wish(
        str(options.base.resolve()), str(options.data.resolve()) if options.data else "",
        tuple(str(folder.resolve()) for folder in options.test), dict(options.parameters),
        retraining.read_rules(options.rules),
    )  # fmt: skip
    records = Records(existing_database(options.feedback))
    retraining.retrain(records, options.models, wish, options.notebooks or NOTEBOOKS)
    return DONE


def refuse_no_models(folder: Path | None) -> None:
    """Raise ConfigError where the folder that a service follows is named and not there."""
    if folder and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected that of the versions of a service's weights")


def rollback(options: argparse.Namespace) -> int:
    """Put the weights before the present ones back into service; a running service follows."""
    from deepfake_utils.serving.versions import Versions

    refuse_no_models(options.models)
    with Versions(options.models).locked() as versions:
        print(f"{versions.roll_back()['version']} is in service again")
    return DONE
