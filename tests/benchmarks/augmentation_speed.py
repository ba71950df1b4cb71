"""Time of each augmentation recipe and effect for one batch, as a ratio to a matrix product timed in the same run.

    python tests/benchmarks/augmentation_speed.py [--device cuda] [--rounds 7] [--batch-size 24]

Rounds are interleaved, so that a busy machine slows everything alike; the median round is reported.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils.augment import EFFECTS, RECIPES, build_augmentation  # noqa: E402
from deepfake_utils.conventions import CROP_SAMPLES  # noqa: E402

MATRIX_SIZE = 1024  # its square is 2.1 GFLOP


def milliseconds(work, device: torch.device) -> float:
    """Wall time of one call, to the end of what it started on the device."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=24)
    options = parser.parse_args()
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    waveform = torch.rand(options.batch_size, CROP_SAMPLES, generator=generator, device=device) - 0.5
    target = torch.ones(options.batch_size, device=device)
    matrix = torch.rand(MATRIX_SIZE, MATRIX_SIZE, generator=generator, device=device)

    def run(augment):
        return lambda: augment(waveform, target, generator)

    works = {"matrix product": lambda: matrix @ matrix}
    works |= {name: run(build_augmentation(name)) for name in RECIPES}
    works |= {f"  {name}": run(build_augmentation("none", **{name: {}})) for name in EFFECTS}
    times = {name: [] for name in works}
    for round_number in range(options.rounds + 1):
        for name, work in works.items():
            elapsed = milliseconds(work, device)
            if round_number:  # the first one warms up
                times[name].append(elapsed)

    baseline = statistics.median(times["matrix product"])
    print(f"{options.batch_size} x {CROP_SAMPLES} samples on {device}, {torch.get_num_threads()} threads, ", end="")
    print(f"median of {options.rounds} interleaved rounds")
    print(f"{'':16} {'ms':>8} {'products':>9} {'us/utterance':>13}")
    for name, rounds in times.items():
        median = statistics.median(rounds)
        print(f"{name:16} {median:8.2f} {median / baseline:9.2f} {1e3 * median / options.batch_size:13.1f}")


if __name__ == "__main__":
    main()
