"""How long finding and reading corpora takes: python tests/benchmarks/find.py [number of files, default 200000]

Builds trees of empty audio files in a temporary folder, finds what is in them, and reads their protocols.
"""

import itertools
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from deepfake_utils.corpora import find_corpora
from deepfake_utils.corpora.survey import survey

N_FILES = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000


def official(root: Path, n_files: int) -> None:
    """ASVspoof 2019 LA, doubled folder and all; protocols at the end of the alphabet."""
    lists = root / "LA/LA/z_protocols"
    lists.mkdir(parents=True)
    ends = {"train": ("T", "trn"), "dev": ("D", "trl"), "eval": ("E", "trl")}
    for (split, (letter, end)), share in zip(ends.items(), (0.21, 0.2, 0.59), strict=True):
        flac = root / f"LA/LA/ASVspoof2019_LA_{split}/flac"
        flac.mkdir(parents=True)
        names = [f"LA_{letter}_{i:07d}" for i in range(round(share * n_files))]
        for name in names:
            (flac / f"{name}.flac").touch()
        lines = (f"LA_0001 {name} - {'A01 spoof' if i % 9 else '- bonafide'}\n" for i, name in enumerate(names))
        (lists / f"ASVspoof2019.LA.cm.{split}.{end}.txt").write_text("".join(lines))


def flat(root: Path, n_files: int) -> None:
    """In-the-Wild: meta.csv among all the recordings."""
    root.mkdir()
    for i in range(n_files):
        (root / f"{i}.wav").touch()
    rows = (f"{i}.wav,Someone,{'spoof' if i % 2 else 'bona-fide'}\n" for i in range(n_files))
    (root / "meta.csv").write_text("file,speaker,label\n" + "".join(rows))


def scattered(root: Path, n_files: int) -> None:
    """A plain folder: 100 recordings for each of very many speakers."""
    for i, label in itertools.product(range(n_files // 200), ("bonafide", "spoof")):
        folder = root / label / f"speaker_{i}"
        folder.mkdir(parents=True)
        for j in range(100):
            (folder / f"{j}.wav").touch()


def beside(root: Path, n_files: int) -> None:
    """A small corpus, deep down, beside another collection of very many folders."""
    for i in range(n_files // 100):
        folder = root / f"a_collection/wav/id{i:05d}"
        folder.mkdir(parents=True)
        for j in range(100):
            (folder / f"{j}.wav").touch()
    official(root / "datasets/owner/asvpoof", 1_000)


def timed(work) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(name: str, root: Path) -> None:
    walk_s, _ = timed(lambda: [None for _ in root.rglob("*")])
    find_ms = [1e3 * timed(lambda: find_corpora(root))[0] for _ in range(3)]
    corpus = find_corpora(root)[0]
    read_s, protocol = timed(corpus.protocol)
    tracemalloc.start()
    corpus.protocol()
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    print(
        f"{name:10} find_corpora {min(find_ms):6.1f} to {max(find_ms):6.1f} ms (a plain walk {walk_s:.2f} s); "
        f"{corpus.name}: {len(protocol):,} trials read in {read_s:.2f} s, {peak_mb:.0f} MB at the peak; "
        f"seen: {survey([root]).notes[0].split(': ')[1].split(';')[0]}"
    )


if __name__ == "__main__":
    for build in (official, flat, scattered, beside):
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder) / "corpus", N_FILES)
            measure(build.__name__, Path(folder) / "corpus")
