"""The command line: `python -m deepfake_utils COMMAND`, of find, collect, train, calibrate, score and so on.

Exit codes: 0 done; 1 done except for recordings that could not be read, each named on standard error;
2 bad input, said in one line; 130 interrupted. What the commands do is in `commands`.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from deepfake_utils import commands
from deepfake_utils.conventions import DeepfakeUtilsError

BAD_INPUT, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        """Print what is wrong and leave with exit code 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message} (--help tells more)\n")


def build_parser() -> Parser:
    """The commands and their arguments."""
    prog = "python -m deepfake_utils"
    parser = Parser(
        prog=prog,
        usage="%(prog)s COMMAND ...",
        description="Detect AI-generated speech: corpora, scores, figures.",
        epilog="COMMAND --help tells what a command takes; README.md shows them in use.",
    )
    parsers = parser.add_subparsers(
        required=True,
        prog=prog,
        title="commands",
        metavar="find | collect | train | calibrate | reference | score | evaluate | export | browser | serve | "
        "monitor | retrain | rollback",
        parser_class=Parser,
    )

    command = parsers.add_parser("find", help="list the corpora in folders", description=commands.find.__doc__)
    command.add_argument("folders", nargs="*", metavar="FOLDER", type=Path,
                         help="where to look; default: DEEPFAKE_DATA, /kaggle/input, ./data")  # fmt: skip
    command.add_argument("--name", help="only this corpus, for example asvspoof2019_la, or a Kaggle dataset owner/slug")
    command.set_defaults(run=commands.find)

    command = parsers.add_parser(
        "collect", help="build the corpus of open speech", description=commands.collect.__doc__
    )
    command.add_argument("folder", metavar="FOLDER", type=Path, help="where the corpus is or will be; it is completed")
    command.add_argument("--licence", choices=("any", "stated"), default="any",
                         help="stated: leave out what comes without a licence; default: any")  # fmt: skip
    command.add_argument("--mirrors", metavar="DIR", type=Path, help="folder with git copies of the repositories")
    command.add_argument(
        "--limit-mb", metavar="MB", type=float, help="only so much: a small part of every split and family"
    )
    command.add_argument("--synthesise", metavar="N", type=int, default=0,
                         help="add N clips from the speech engines installed here")  # fmt: skip
    command.add_argument("--engines", metavar="NAME", nargs="+", default=(), help="only these of them")
    command.set_defaults(run=commands.collect)

    command = parsers.add_parser("train", help="train, or go on with a run", description=commands.train.__doc__)
    command.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run")
    command.add_argument("--data", metavar="FOLDER", type=Path, help="start a run on the corpus in this folder; "
                         "without it the run in RUN_DIR goes on")  # fmt: skip
    command.add_argument("--recipe", choices=("paper", "short", "open"), default="paper",
                         help="settings to start from; default: paper, which is AASIST's")  # fmt: skip
    command.add_argument("--set", metavar="NAME=VALUE", action="append", default=[],
                         help="change a setting of the recipe, such as epochs=5; may be repeated")  # fmt: skip
    command.add_argument("--device", default="auto", help="auto (the default), cpu, cuda or cuda:N")
    command.set_defaults(run=commands.train)

    command = parsers.add_parser("calibrate", help="fit thresholds on dev, judge them on eval",
                                  description=commands.calibrate.__doc__)  # fmt: skip
    command.add_argument("weights", metavar="WEIGHTS", type=Path, help="a .safetensors or .onnx file with its JSON")
    command.add_argument("--data", metavar="FOLDER", type=Path, required=True, help="corpus with dev and eval splits")
    command.add_argument("--hosts", metavar="N", type=int, default=40, help="real recordings that fakes are spliced "
                         "into, a split (default: 40); 0 leaves pooling and marks as they are")  # fmt: skip
    command.add_argument("--most", metavar="N", type=int, default=60,
                         help="recordings of each source and label (default: 60)")  # fmt: skip
    command.set_defaults(run=commands.calibrate)

    command = parsers.add_parser(
        "reference", help="measure what drift is told by", description=commands.reference.__doc__
    )
    command.add_argument("weights", metavar="WEIGHTS", type=Path, help="a .safetensors or .onnx file with its JSON")
    command.add_argument("--data", metavar="FOLDER", type=Path, required=True, help="corpus with a dev split, of "
                         "recordings like those the service is meant for")  # fmt: skip
    command.add_argument("--most", metavar="N", type=int, default=1000,
                         help="recordings, drawn in proportion (default: 1000)")  # fmt: skip
    command.set_defaults(run=commands.reference)

    command = parsers.add_parser("score", help="say which recordings are real and which are fake",
                                  description=commands.score.__doc__)  # fmt: skip
    command.add_argument("audio", nargs="+", metavar="RECORDING", help="a recording of any format, video "
                         "included; a folder, which is searched through; or - for standard input")  # fmt: skip
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="WEIGHTS", help="phone, tiny or laptop (shipped, made smaller), "
                         "aasist or aasist-l (published, downloaded once), or a file: .safetensors, .pth or .onnx; "
                         "default: those shipped with the package")  # fmt: skip
    weights.add_argument("--onnx", metavar="FILE", type=Path, help="an exported model; the same as --weights FILE.onnx")
    command.add_argument("--model", metavar="NAME", help="architecture, where no JSON beside the weights says it")
    command.add_argument("--use", choices=("call-centre", "moderation", "forensic"),
                         help="what the verdicts are for: sets how common fakes are taken to be and what errors cost; "
                         "default: half are fake, both errors equally bad")  # fmt: skip
    command.add_argument("--device", default="auto", metavar="DEVICE", help="auto (the default), cpu, cuda or cuda:N")
    command.add_argument("--first-window", action="store_true", help="take only the first 4.04 s of every recording, "
                         "silence included, as the scores of the ASVspoof corpora are computed")  # fmt: skip
    command.add_argument("--csv", metavar="FILE", type=Path, help="write every verdict as a row; - is standard output")
    command.add_argument("--json", metavar="FILE", type=Path, help="the same as JSON, with every window; - as above")
    command.add_argument("--timeline", metavar="FILE", type=Path, help="write every window as a row of CSV; - as above")
    command.add_argument("--pictures", metavar="FOLDER", type=Path, help="draw every recording over time, with what "
                         "sounds fake in it")  # fmt: skip
    command.add_argument("--out", metavar="FILE", type=Path, help="write a score file, CSV, for the command evaluate")
    command.add_argument("--fleet", metavar="FOLDER", type=Path, help="score on the Ray cluster of RAY_ADDRESS, or on "
                         "all cores of this machine, into FOLDER as Parquet; the same command goes on where a run was "
                         "ended. A RECORDING that ends in .txt is then a list, one name a line")  # fmt: skip
    command.set_defaults(run=commands.score)

    command = parsers.add_parser("evaluate", help="figures of a score file", description=commands.evaluate.__doc__)
    command.add_argument("scores", metavar="SCORES", type=Path, help="score file, any dialect")
    command.add_argument("--protocol", metavar="FILE", type=Path, required=True,
                         help="official protocol or key file, or a table with columns utterance and label")  # fmt: skip
    command.add_argument("--asv-scores", metavar="FILE", type=Path, help="ASV scores of the same split, for the t-DCF")
    command.add_argument("--higher-is", choices=("bonafide", "spoof"), help="what a high score in the file means; "
                         "default: what its dialect says, else bonafide")  # fmt: skip
    command.add_argument(
        "--one-is", choices=("bonafide", "spoof"), help="what a label 1 means, where labels are numbers"
    )
    command.add_argument("--by", metavar="COLUMN", action="append", help="break down by this column; may be repeated")
    command.add_argument("--phase", help="ASVspoof 2021: only progress, eval or hidden")
    command.add_argument("--n-bootstrap", metavar="N", type=int, default=1000,
                         help="bootstrap replicates of each interval (default: 1000); 0: no intervals")  # fmt: skip
    command.add_argument("--json", metavar="FILE", type=Path, help="write all figures, rates as fractions")
    command.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained report page")
    command.set_defaults(run=commands.evaluate)

    command = parsers.add_parser("serve", help="answer over HTTP", description=commands.serve.__doc__)
    command.add_argument("folder", nargs="?", metavar="FOLDER", type=Path, default=Path("runs/service"),
                         help="records, waiting jobs and kept recordings; default: runs/service")  # fmt: skip
    command.add_argument("--weights", metavar="WEIGHTS", help="as for score, while no pointer in models says otherwise")
    command.add_argument("--models", metavar="FOLDER", type=Path, help="with current.json, which names the weights in "
                         "service; default: models in the folder")  # fmt: skip
    command.add_argument("--use", choices=("call-centre", "moderation", "forensic"), help="as for score")
    command.add_argument("--device", default="auto", metavar="DEVICE", help="auto (the default), cpu, cuda or cuda:N")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    command.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    command.add_argument("--fleet", action="store_true", help="as replicas on the Ray cluster of RAY_ADDRESS, or on "
                         "all cores of this machine")  # fmt: skip
    command.set_defaults(run=commands.serve)

    command = parsers.add_parser("export", help="write a model as ONNX", description=commands.export.__doc__)
    command.add_argument("out", metavar="FILE.onnx", type=Path, help="file to write")
    command.add_argument("--weights", metavar="FILE", type=Path, required=True, help="weights, as for score")
    command.add_argument("--model", metavar="NAME", help="architecture, where no JSON beside the weights says it")
    command.add_argument("--target", choices=("server", "laptop", "phone", "tiny"),
                         help="make it smaller for this kind of machine; its card is the .json beside it")  # fmt: skip
    command.add_argument("--data", metavar="FOLDER", type=Path, help="with --target: the corpus whose train "
                         "split gives the ranges of INT8, whose dev split the calibration, whose eval split the error "
                         "rate")  # fmt: skip
    command.set_defaults(run=commands.export)

    command = parsers.add_parser(
        "browser", help="a page that judges in the browser", description=commands.browser.__doc__
    )
    command.add_argument("folder", metavar="FOLDER", type=Path, help="where the page goes")
    command.add_argument("--weights", metavar="WEIGHTS", default="phone",
                         help="phone (the default), laptop, tiny, or an .onnx file with its card")  # fmt: skip
    command.add_argument("--runtime", metavar="DIR", type=Path,
                         help="an unpacked onnxruntime-web package; default: npm fetches it")  # fmt: skip
    command.set_defaults(run=commands.browser)

    command = parsers.add_parser("monitor", help="report on a service", description=commands.monitor.__doc__)
    command.add_argument("--database", metavar="URL", required=True, help="of the service, such as "
                         "sqlite:///service/records.sqlite")  # fmt: skip
    command.add_argument("--models", metavar="MODELS", type=Path, required=True, help="folder that the service follows")
    command.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="where the report goes")
    command.add_argument("--days", metavar="N", type=float, default=7.0, help="how far to look back (default: 7)")
    command.add_argument("--false-alarms", metavar="P", type=float, default=0.01,
                         help="probability of an alarm in a report without drift (default: 0.01)")  # fmt: skip
    command.add_argument(
        "--notebooks", metavar="FOLDER", type=Path, help="with run.py in it; default: that of the repository"
    )
    command.set_defaults(run=commands.monitor)

    command = parsers.add_parser("retrain", help="learn from feedback", description=commands.retrain.__doc__)
    command.add_argument("--feedback", metavar="URL", required=True, help="database of the service, such as "
                         "sqlite:///service/records.sqlite")  # fmt: skip
    command.add_argument("--base", metavar="RUN", type=Path, required=True,
                         help="run of the notebooks whose corpus and settings are taken")  # fmt: skip
    command.add_argument("--models", metavar="MODELS", type=Path, required=True, help="folder that the service follows")
    command.add_argument("--data", metavar="FOLDER", type=Path, help="where the base's corpus is now, if it was moved")
    command.add_argument("--test", metavar="FOLDER", type=Path, action="append", default=[],
                         help="another corpus whose eval is a test set; may be repeated")  # fmt: skip
    command.add_argument("--rules", metavar="FILE", type=Path, help="instead of serving/rules.toml of the package")
    command.add_argument("-p", nargs=2, metavar=("NAME", "VALUE"), action="append", default=[], dest="parameters",
                         help="set a parameter of notebooks 02 and 03, instead of as the base had it")  # fmt: skip
    command.add_argument(
        "--notebooks", metavar="FOLDER", type=Path, help="with run.py in it; default: that of the repository"
    )
    command.set_defaults(run=commands.retrain)

    command = parsers.add_parser(
        "rollback", help="go back to the weights before", description=commands.rollback.__doc__
    )
    command.add_argument("--models", metavar="MODELS", type=Path, required=True, help="folder that the service follows")
    command.set_defaults(run=commands.rollback)
    return parser


def as_path_if_one(argument: str) -> str:
    """A file whose name begins with a dash, as `*.wav` may give it, spelt so that it is no option."""
    return f"./{argument}" if argument.startswith("-") and argument != "-" and os.path.lexists(argument) else argument


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args([as_path_if_one(argument) for argument in arguments])
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
            return options.run(options)
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return commands.DONE
    except (DeepfakeUtilsError, OSError) as problem:
        if isinstance(problem, FileExistsError | NotADirectoryError) and problem.filename:
            problem = f"{problem.filename} is a file, expected a folder: name another"
        print(f"deepfake_utils: {problem}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("deepfake_utils: interrupted", file=sys.stderr)
        return INTERRUPTED


def run() -> None:
    """The program: `main`, and after Ctrl-C an end that waits for no thread which reads a pipe."""
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
