"""How many recordings a core scores in an hour on Ray Data, from the start of the second part to the end of the last.

    python tests/benchmarks/fleet.py --audio FOLDER [--files 600] [--cores 2]

Starting the cluster and its workers is given apart: it is paid once a run, whatever its size.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from deepfake_utils.files import list_audio

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", type=Path, required=True)
    parser.add_argument("--files", type=int, default=600)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="what the machine has: one worker on each")
    options = parser.parse_args()
    files = sorted(list_audio(options.audio)[0])
    files = random.Random(0).sample(files, min(options.files, len(files)))
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "names.txt"
        names.write_text("\n".join(map(os.path.abspath, files)) + "\n")
        command = [sys.executable, "-m", "deepfake_utils", "score", str(names), "--fleet", f"{folder}/out"]
        begun = time.time()
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}
        )
        whole_s = time.time() - begun
        print(done.stdout.strip())
        parts = sorted((Path(folder) / "out" / "verdicts").glob("*.parquet"), key=lambda path: path.stat().st_mtime)
        first, *rest = parts
        steady_s = rest[-1].stat().st_mtime - first.stat().st_mtime
        table = pd.concat(map(pd.read_parquet, rest))
    core_h = options.cores * steady_s / 3600
    sound_h = table["duration_s"].sum() / 3600
    print(f"{len(table):,} recordings of {3600 * sound_h / len(table):.1f} s on average, on {options.cores} cores")
    print(f"{len(table) / core_h:,.0f} recordings, {sound_h / core_h:,.1f} hours of sound an hour and core")
    print(f"{1e6 * core_h / sound_h:,.0f} core hours a million hours of sound")
    print(f"{whole_s - steady_s:.0f} s to start and end")


if __name__ == "__main__":
    main()
