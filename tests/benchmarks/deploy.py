"""What deploying takes: hours of sound an hour, memory against length, live latency, beside what else one would do.

    python tests/benchmarks/deploy.py speed --audio FOLDER --reference aasist --published AASIST.pth
    python tests/benchmarks/deploy.py memory --audio FOLDER --minutes 1 10 30 120
    python tests/benchmarks/deploy.py live --audio FOLDER

FOLDER holds real speech; its recordings are joined to one of the length wanted. `--reference` is a checkout of
github.com/clovaai/aasist: its model in a loop over the same windows, as its evaluation runs it. `--published` is its
weights behind the same search for speech, exported to ONNX: what one would put together from published parts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ
from deepfake_utils.files import list_audio
from deepfake_utils.scoring.windows import HOP_SAMPLES
from deepfake_utils.waveforms.decode import read_audio

REPOSITORY = Path(__file__).resolve().parents[2]
SCORE = """
import resource, sys, time
from deepfake_utils import Detector
weights, short, long = sys.argv[1:4]
detector = Detector.load(None if weights == "open" else weights, device="cpu")
detector(short)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
verdict = detector(long)
print(time.perf_counter() - start, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(verdict.windows))
"""


def main() -> None:
    options = parse()
    print(f"{describe_machine()}; weights {', '.join(options.weights)}")
    with tempfile.TemporaryDirectory() as folder:
        {"speed": speed, "memory": memory, "live": live}[options.what](options, Path(folder))


def speed(options: argparse.Namespace, folder: Path) -> None:
    """Times real time on one and on two cores; decoding, the search for speech and everything else included."""
    samples = speech(options.audio, 60 * options.minutes[0])
    short, long = folder / "short.flac", folder / "long.flac"
    soundfile.write(short, samples[: 5 * SAMPLE_RATE_HZ], SAMPLE_RATE_HZ)
    soundfile.write(long, samples, SAMPLE_RATE_HZ)
    duration_s, rates = len(samples) / SAMPLE_RATE_HZ, {}
    published = [options.published] if options.published else []
    for n_cores in options.cores:
        for weights in [*options.weights, *published]:
            took_s, _, _, n_windows = score(weights, short, long, n_cores)
            rates[weights, n_cores] = duration_s / took_s
            name = f"{Path(weights).name}, published by ONNX" if weights in published else Path(weights).name
            print(f"{name:<32} {n_cores} cores: {duration_s / took_s:7.1f} x real time, {n_windows} windows")
        if options.reference:
            rate = reference_rate(options.reference, samples, n_cores)
            ours = ", ".join(f"{Path(w).name} {rates[w, n_cores] / rate:.1f} x that" for w in options.weights)
            print(f"{'reference code in a loop':<32} {n_cores} cores: {rate:7.1f} x real time; {ours}")


def score(weights: str, short: Path, long: Path, n_cores: int) -> tuple[float, int, int, int]:
    """Seconds, highest memory before and after (KiB) and windows of one recording, in a process on so many cores."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:n_cores]))
    command = ["taskset", "-c", cores, sys.executable, "-c", SCORE, weights, str(short), str(long)]
    environment = os.environ | {"OMP_NUM_THREADS": str(n_cores), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    took_s, before, after, n_windows = done.stdout.split()
    return float(took_s), int(before), int(after), int(n_windows)


def reference_rate(checkout: Path, samples: np.ndarray, n_cores: int, n_windows: int = 6) -> float:
    """Times real time of the authors' model on one window after the other, every 2.02 s, without any search."""
    import torch

    sys.path.insert(0, str(checkout))
    settings = json.loads((checkout / "config" / "AASIST.conf").read_text())["model_config"]
    model = importlib.import_module("models.AASIST").Model(settings).eval()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n_cores])
    torch.set_num_threads(n_cores)
    times_s = []
    with torch.no_grad():
        for number in range(n_windows):
            start = number * HOP_SAMPLES
            window = torch.from_numpy(samples[start : start + CROP_SAMPLES].copy())[None]
            begun = time.perf_counter()
            model(window)
            times_s.append(time.perf_counter() - begun)
    return HOP_SAMPLES / SAMPLE_RATE_HZ / float(np.median(times_s))


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Highest memory above that of a process that has scored 5 s, by length; 48 kHz stereo, as podcasts are."""
    minute = speech(options.audio, 60)
    minute = resample_poly(minute, 3, 1)[: 60 * 48_000]
    stereo = np.stack([minute, 0.9 * minute], axis=1).astype(np.float32)
    short = folder / "short.wav"
    soundfile.write(short, stereo[: 5 * 48_000], 48_000)
    soundfile.write(folder / "minute.mp3", stereo, 48_000)
    encoded = (folder / "minute.mp3").read_bytes()  # a stream of frames: it may be joined to itself
    for minutes in options.minutes:
        long = folder / "long.mp3"
        with long.open("wb") as file:
            file.writelines([encoded] * minutes)
        for weights in options.weights:
            took_s, before, after, n_windows = score(weights, short, long, 1)
            print(f"{minutes:>4} min, {long.stat().st_size / 1e6:6.1f} MB: {(after - before) / 1024:6.1f} MiB above "
                  f"{before / 1024:.0f} MiB, {60 * minutes / took_s:.1f} x real time, {n_windows} windows")  # fmt: skip


def live(options: argparse.Namespace, folder: Path) -> None:
    """Time to push a chunk of 20 ms, first verdict, real-time factor on one core; telephone and 48 kHz; silence."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    from deepfake_utils import Detector
    from deepfake_utils.scoring.stream import time_stream

    samples = speech(options.audio, 60 * options.minutes[0])
    sounds = {
        "speech, 8 kHz mu-law": (mu_law(resample_poly(samples, 1, 2)), 8_000),
        "speech, 48 kHz float": (resample_poly(samples, 3, 1).astype(np.float32), 48_000),
        "digital silence, 8 kHz": (np.zeros(len(samples) // 2, np.int16), 8_000),
    }
    for weights in options.weights:
        detector = Detector.load(None if weights == "open" else weights, device="cpu")
        detector(samples[: 5 * SAMPLE_RATE_HZ], SAMPLE_RATE_HZ)
        for name, (sound, rate_hz) in sounds.items():
            timed = time_stream(detector, sound, rate_hz)
            p50, p99, largest = 1000 * np.quantile(timed.push_s, [0.5, 0.99, 1.0])
            said = f"first verdict after {timed.first_s:.2f} s" if timed.first_s else "no verdict"
            print(f"{Path(weights).name}, {name}: {said}; a chunk {p50:.2f} ms (p50), {p99:.2f} (p99), {largest:.1f} "
                  f"(largest); real-time factor {timed.real_time_factor:.4f}")  # fmt: skip


def mu_law(samples: np.ndarray) -> np.ndarray:
    """What a telephone passes: int16 of ITU-T G.711 mu-law, its curve in 255 steps."""
    companded = np.sign(samples) * np.log1p(255 * np.abs(np.clip(samples, -1, 1))) / np.log(256)
    steps = np.round(companded * 127) / 127
    return np.round(np.sign(steps) * (256 ** np.abs(steps) - 1) / 255 * 32767).astype(np.int16)


def speech(folder: Path, seconds: float) -> np.ndarray:
    """The recordings of a folder, one after the other and over again, to so many seconds."""
    parts, n_wanted, n_samples = [], round(seconds * SAMPLE_RATE_HZ), 0
    for path in cycle(list_audio(folder)[0][:200]):
        parts.append(read_audio(path, notes=[]))
        n_samples += len(parts[-1])
        if n_samples >= n_wanted:
            return np.concatenate(parts)[:n_wanted]
    raise SystemExit(f"no recordings in {folder}")


def describe_machine() -> str:
    """The processor, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return f"{model}, {os.cpu_count()} cores; this process {used} MiB"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "live"))
    parser.add_argument("--audio", type=Path, required=True, help="folder of real speech")
    parser.add_argument("--weights", nargs="+", default=["open"], help="open: those shipped; or files")
    parser.add_argument("--minutes", type=int, nargs="+", default=[4], help="length of what is scored")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--reference", type=Path, help="checkout of github.com/clovaai/aasist")
    parser.add_argument("--published", help="its weights, AASIST.pth")
    return parser.parse_args()


if __name__ == "__main__":
    main()
