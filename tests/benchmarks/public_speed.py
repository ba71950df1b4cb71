"""AASIST as a user calls it beside the code its authors published, each in a process of its own, turn by turn.

    git clone https://github.com/clovaai/aasist
    python tests/benchmarks/public_speed.py --reference aasist --audio FOLDER

Scoring takes recordings on disk to scores: here by `Detector.load(WEIGHTS, whole=False).score(files)`, which chooses
its engine and keeps its memory by itself; there by the published model on the same first 64,600 samples, as its
`data_utils.py` pads them. A training step is forward, loss, backward and Adam on a batch in place. Every process has
its own memory allocator, and computes only when it is its turn, so that what else the machine does weighs on all of
them. A ratio is the median over turns, with the smallest and the largest; processor time says what a busy machine
hides.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SCORING = {"published code": None, "here": None, "here, PyTorch": None, "here, one core": 1}  # -> threads, if fixed
TRAINING = {"published step": None, "step here": None}


def main() -> None:
    options = parse()
    if options.worker:
        return serve(options)
    print(f"{options.threads} threads, {options.files} recordings and training batches of {options.batch}", flush=True)
    for what, contenders, n in (("scoring", SCORING, options.files), ("training", TRAINING, options.batch)):
        if options.only in ("", what):
            workers = {name: Worker(name, threads or options.threads) for name, threads in contenders.items()}
            compare(workers, n, options.turns)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="checkout of github.com/clovaai/aasist")
    parser.add_argument("--audio", type=Path, required=True, help="folder of recordings")
    parser.add_argument("--files", type=int, default=8, help="recordings scored in a turn")
    parser.add_argument("--batch", type=int, default=4, help="utterances of a training step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", choices=["", "scoring", "training"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


class Worker:
    """A contender in its own process: `turn` lets it compute once."""

    def __init__(self, name: str, threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", name],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.engine = self._answer()["engine"]  # it is ready, after two runs that nobody counts

    def turn(self) -> dict:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._process.args[-1]}: ended, see above")
        return json.loads(line)

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(workers: dict[str, Worker], n: int, n_turns: int) -> None:
    turns = [{name: worker.turn() for name, worker in workers.items()} for _ in range(n_turns)]
    first = next(iter(workers))
    for name, worker in workers.items():
        ratios = sorted(turn[first]["wall_s"] / turn[name]["wall_s"] for turn in turns)
        wall, cpu, system = (
            1e3 / n * sorted(turn[name][key] for turn in turns)[len(turns) // 2] for key in ("wall_s", "cpu_s", "sys_s")
        )
        print(
            f"{name:15} {wall:7.0f} ms an utterance ({cpu:.0f} of a processor, {system:.0f} of them the system's)   "
            f"{ratios[len(ratios) // 2]:.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})   {worker.engine}",
            flush=True,
        )
        worker.end()


# --- in a worker's process


def serve(options: argparse.Namespace) -> None:
    """Compute once for every line that comes in."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what is printed on the way is no answer
    run, engine = WORK[options.worker](options)
    run()
    run()
    print(json.dumps({"engine": engine}), file=answers, flush=True)
    for _ in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        run()
        wall_s, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        system_s = after.ru_stime - before.ru_stime
        cpu_s = after.ru_utime - before.ru_utime + system_s
        print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "sys_s": system_s}), file=answers, flush=True)


def recordings(options: argparse.Namespace) -> list[Path]:
    return sorted(options.audio.rglob("*.flac"))[: options.files]


def weights(options: argparse.Namespace) -> Path:
    return options.reference / "models" / "weights" / "AASIST.pth"


def published_model(options: argparse.Namespace):
    import torch

    sys.path.insert(0, str(options.reference))
    config = json.loads((options.reference / "config" / "AASIST.conf").read_text())["model_config"]
    model = importlib.import_module("models.AASIST").Model(config)
    model.load_state_dict(torch.load(weights(options), map_location="cpu", weights_only=True))
    return model


def published_crop(path: Path):
    import numpy as np
    import soundfile

    waveform, _ = soundfile.read(path, dtype="float32")
    return np.tile(waveform, 64600 // len(waveform) + 1)[:64600]


def published_scoring(options: argparse.Namespace) -> tuple[Callable[[], None], str]:
    import numpy as np
    import torch

    model = published_model(options).eval()

    def run() -> None:
        with torch.no_grad():
            model(torch.from_numpy(np.stack([published_crop(path) for path in recordings(options)])))

    return run, ""


def scoring_here(options: argparse.Namespace) -> tuple[Callable[[], None], str]:
    from deepfake_utils import Detector

    detector = Detector.load(weights(options), whole=False)
    return lambda: detector.score(recordings(options), progress=None), detector.engine


def scoring_by_pytorch(options: argparse.Namespace) -> tuple[Callable[[], None], str]:
    from deepfake_utils import load_model, score_files

    model = load_model(weights=weights(options))
    return lambda: score_files(recordings(options), model, progress=None), "PyTorch"


def training_step(model, logits_of: Callable, options: argparse.Namespace) -> tuple[Callable[[], None], str]:
    import numpy as np
    import torch

    waveform = torch.from_numpy(np.stack([published_crop(path) for path in recordings(options)[: options.batch]]))
    optimiser = torch.optim.Adam(model.train().parameters(), 1e-4, weight_decay=1e-4)

    def run() -> None:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits_of(waveform), torch.arange(len(waveform)) % 2).backward()
        optimiser.step()

    return run, ""


def published_step(options: argparse.Namespace) -> tuple[Callable[[], None], str]:
    model = published_model(options)
    return training_step(model, lambda waveform: model(waveform)[1], options)


def step_here(options: argparse.Namespace) -> tuple[Callable[[], None], str]:
    from deepfake_utils import load_model
    from deepfake_utils.machine import keep_freed_memory

    keep_freed_memory()  # as the training loop does
    model = load_model(weights=weights(options))
    return training_step(model, lambda waveform: model(waveform).logits, options)


WORK = {
    "published code": published_scoring, "here": scoring_here, "here, PyTorch": scoring_by_pytorch,
    "here, one core": scoring_here, "published step": published_step, "step here": step_here,
}  # fmt: skip

if __name__ == "__main__":
    main()
