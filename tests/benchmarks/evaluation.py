"""How long an evaluation of 71,237 trials (the size of ASVspoof 2019 LA eval) takes, on made-up scores.

    python tests/benchmarks/evaluation.py

Prints wall and processor seconds of each part: reading the three files, every metric without the bootstrap, and 1,000
replicates clustered by 67 speakers; and of the part that sorting once saves.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from deepfake_utils.evaluation import intervals, metrics
from deepfake_utils.evaluation.evaluate import evaluate
from deepfake_utils.evaluation.scorefile import read_asv_scores, read_scores
from deepfake_utils.protocols import read_keys

N_SPEAKERS, N_BONAFIDE, ATTACKS, N_PER_ATTACK = 67, 7_355, [f"A{i:02d}" for i in range(7, 20)], 4_914
ASV_TRIALS = {"target": (5_370, 20.0), "nontarget": (33_327, -20.0), "spoof": (N_PER_ATTACK * len(ATTACKS), 8.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=1000)
    n = parser.parse_args().replicates
    with tempfile.TemporaryDirectory() as folder:
        scores_path, keys_path, asv_path = make_files(Path(folder))
        scores = timed("read the score file", lambda: read_scores(scores_path))
        keys = timed("read the protocol", lambda: read_keys(keys_path))
        asv = timed("read the ASV scores (102,579 trials)", lambda: read_asv_scores(asv_path))
    timed("every metric, no bootstrap", lambda: evaluate(scores, keys, asv, n_bootstrap=0))
    by = ["speaker", "attack"]
    timed("the same, by speaker and attack", lambda: evaluate(scores, keys, asv, by=by, n_bootstrap=0))
    score, label = scores.frame["score"].to_numpy(), keys["label"].to_numpy()
    speaker = keys["speaker"].to_numpy(dtype=str)
    timed(f"{n} EER replicates by speaker", lambda: bootstrap(score, label, speaker, n))
    timed(f"{n} replicates of EER, DCF, t-DCF in evaluate", lambda: evaluate(scores, keys, asv, n_bootstrap=n))
    timed("one EER, trials in any order", lambda: metrics.compute_eer(score, label), repeats=20)
    order = np.argsort(score)
    timed("one EER, trials sorted", lambda: metrics.compute_eer(score[order], label[order]), repeats=20)


def bootstrap(score: np.ndarray, label: np.ndarray, speaker: np.ndarray, n: int) -> intervals.Interval:
    return intervals.bootstrap(intervals.eer_metric, score, label, speaker, n=n, progress=False)


def timed(title: str, work: Callable, repeats: int = 1):
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        result = work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{title:<46}{wall / repeats:9.4f} s   ({processor / repeats:.4f} s of processor)")
    return result


def make_files(folder: Path) -> tuple[Path, Path, Path]:
    """Score file, protocol and ASV scores of made-up trials in the official layouts."""
    rng = np.random.default_rng(0)
    attack = np.concatenate([np.full(N_BONAFIDE, "-"), np.repeat(ATTACKS, N_PER_ATTACK)])
    order = rng.permutation(attack.size)
    attack = attack[order]
    is_bonafide = attack == "-"
    key = np.where(is_bonafide, "bonafide", "spoof")
    number = rng.integers(N_SPEAKERS, size=attack.size)
    speaker = np.array([f"LA_{i:04d}" for i in range(N_SPEAKERS)])[number]
    score = rng.normal(4.0 * is_bonafide + rng.normal(0, 0.5, N_SPEAKERS)[number])
    utterance = [f"LA_E_{i:07d}" for i in range(attack.size)]
    frame = pd.DataFrame({"s": speaker, "u": utterance, "e": "-", "a": attack, "k": key, "score": score})
    asv = [
        pd.DataFrame(
            {
                "attack": np.repeat(ATTACKS, N_PER_ATTACK) if kind == "spoof" else "bonafide",
                "key": kind,
                "score": rng.normal(mean, 12.0, n),
            },
            index=range(n),
        )
        for kind, (n, mean) in ASV_TRIALS.items()
    ]
    paths = folder / "scores.txt", folder / "protocol.txt", folder / "asv.txt"
    frame[["u", "a", "k", "score"]].to_csv(paths[0], sep=" ", header=False, index=False)
    frame[["s", "u", "e", "a", "k"]].to_csv(paths[1], sep=" ", header=False, index=False)
    pd.concat(asv).to_csv(paths[2], sep=" ", header=False, index=False)
    return paths


if __name__ == "__main__":
    main()
