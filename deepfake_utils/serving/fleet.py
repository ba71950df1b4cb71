"""Any number of recordings through a Ray cluster, into a folder that holds the verdict on each of them once.

    FOLDER/run.json                 what was asked for, of which weights; there once the list below it is whole
    FOLDER/inputs.parquet           the recordings as they were listed at the start, and the part of each
    FOLDER/verdicts/part-*.parquet  their verdicts, in the columns of `score --csv`
    FOLDER/unreadable.csv           what could not be read, and why; written at the end

A part is written whole or not at all, always under the same name, and never again once it is there. So whatever dies,
driver, worker or machine, the same command goes on with the parts that are missing. Every node of the cluster must see
recordings and folder under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pandas as pd
import ray
import ray.data
import torch
from tqdm.auto import tqdm

from deepfake_utils.conventions import AudioError, CheckpointError, ConfigError, DeepfakeUtilsError
from deepfake_utils.files import alone_in, atomic_write, read_text
from deepfake_utils.scoring.detector import SHIPPED, Detector
from deepfake_utils.scoring.published import sha256_of
from deepfake_utils.scoring.score import list_recordings
from deepfake_utils.scoring.verdict import ROW_COLUMNS, verdict_row
from deepfake_utils.scoring.weights import weights_file

LISTS = ".txt"  # a file that names recordings, one a line
MOST_IN_A_PART = 500  # recordings that are looked at again where a worker dies
FEWEST_PARTS = 64  # where there are recordings enough, so that all workers have something to do
MAX_DEATHS = 3  # of workers on one recording, until it counts as unreadable
WORDS = ("path", "verdict", "reason", "use", "warnings")  # among the columns; the others are numbers


class FleetError(DeepfakeUtilsError):
    """The cluster could not do what it was asked for."""


def score_fleet(audio: Sequence[str | os.PathLike], folder: str | os.PathLike, **options) -> Counter[str]:
    """Look at recordings on a Ray cluster, or go on where an earlier run in the folder was ended.

    The cluster is that of RAY_ADDRESS, else the one that runs on this machine, else one made for the occasion.

    Args:
        audio: recordings, folders, and .txt files that name one recording a line.
        folder: where everything goes.
        options: for `Detector.load`.

    Returns:
        How many recordings there are of each verdict, "unreadable" among them.

    Raises:
        AudioError: there is no recording.
        ConfigError: the folder holds a run of something else, or one at work.
        CheckpointError: the weights cannot be had, or are others on another node.
        FleetError: a worker cannot do its work, for want of space for example.
    """
    folder = Path(folder).absolute()
    (folder / "verdicts").mkdir(parents=True, exist_ok=True)
    with alone_in(folder, f"{folder}: another run is at work there: wait for it, or name another folder"):
        wish = describe(audio, options)
        inputs = _take_in(folder, wish, audio)
        missing = [
            {"part": int(part), "names": rows.tolist()}
            for part, rows in inputs.groupby("part")["path"]
            if not part_file(folder, part).exists()
        ]
        if missing:
            _look_at(missing, folder, wish, options)
        return _sum_up(folder, len(inputs))


def describe(audio: Sequence[str | os.PathLike], options: dict) -> dict:
    """What makes a run what it is: a run of anything else needs another folder."""
    weights = weights_file(SHIPPED if options.get("weights") is None else options["weights"])
    digest = sha256_of(weights.read_bytes())
    asked = {name: value for name, value in options.items() if name not in ("weights", "device")}
    return {"audio": [os.path.abspath(name) for name in audio], "weights_sha256": digest, **asked}


def listed(audio: Sequence[str | os.PathLike]) -> list[str]:
    """The recordings meant, each once; those of a list, relative to it, are not looked for here.

    Raises:
        AudioError: there is none, or something given does not exist.
    """
    found: list[str] = []
    for name in map(os.fspath, audio):
        if name == "-":
            raise AudioError("standard input cannot be read by other machines: name files, folders or lists")
        if name.endswith(LISTS) and os.path.isfile(name):
            lines = read_text(name, AudioError, names_are_bytes=True).replace("\r\n", "\n").split("\n")
            found += [os.path.join(os.path.dirname(name), line) for line in lines if line]
        else:
            found += map(str, list_recordings(name)[0])
    return list(dict.fromkeys(map(os.path.abspath, found)))


def part_file(folder: Path, part: int) -> Path:
    """Where the verdicts of a part are, once they are known."""
    return folder / "verdicts" / f"part-{part:06d}.parquet"


def _take_in(folder: Path, wish: dict, audio: Sequence) -> pd.DataFrame:
    """The recordings of the run with their parts, as they are or were listed at its start; names are bytes."""
    about, list_file = folder / "run.json", folder / "inputs.parquet"
    if about.exists():
        known = json.loads(about.read_text(encoding="utf-8"))
        if other := [name for name in wish if known.get(name) != wish[name]]:
            raise ConfigError(
                f"{folder} holds a run with other {' and '.join(other)} ({about.name} there says which): name another "
                "folder, or give that run's command again"
            )
        return pd.read_parquet(list_file)
    names = [os.fsencode(name) for name in listed(audio)]
    size = max(1, min(MOST_IN_A_PART, len(names) // FEWEST_PARTS))
    inputs = pd.DataFrame({"path": names, "part": [i // size for i in range(len(names))]})
    with atomic_write(list_file) as part:
        inputs.to_parquet(part, index=False)
    with atomic_write(about) as part:
        part.write_text(json.dumps(wish | {"n_inputs": len(names)}, indent=2) + "\n", encoding="utf-8")
    return inputs


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, else the one that runs on this machine, else make one of its cores.

    Raises:
        FleetError: there is no such cluster, or none can be started.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it has advice on how Ray itself calls it
        address = os.environ.get("RAY_ADDRESS", "")
        if re.fullmatch(r"[\w.\-]+:\d+", address):  # Ray itself asks a dead address again and again for minutes
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=10).close()
            except OSError as error:
                advice = "name the head's address, or unset RAY_ADDRESS for one on this machine"
                raise FleetError(f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): {advice}") from error
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # Ray has no narrower class for a node that does not come up
            said = str(error).splitlines()[0][:200]
            raise FleetError(
                f"Ray did not start on this machine ({said}): is it busy? The same command tries again"
            ) from error


def _look_at(missing: list[dict], folder: Path, wish: dict, options: dict) -> None:
    """All the missing parts, on as many workers as the cluster has cores."""
    connect()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    most = min(len(missing), max(1, int(ray.cluster_resources().get("CPU", 1))))
    told = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
        Worker,
        fn_constructor_kwargs={"folder": str(folder), "sha256": wish["weights_sha256"], "options": options},
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=most, max_size=most),
        num_cpus=1,
        num_gpus=int(options.get("device", "").startswith("cuda")),
    )
    try:
        for _ in tqdm(told.iter_rows(), "scoring", len(missing), unit="part"):
            pass
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise FleetError(f"the cluster stopped ({cause}): what is done is kept, the same command goes on") from error


class Worker:
    """What looks at parts, one after the other, in a process of its own on some node."""

    def __init__(self, folder: str, sha256: str, options: dict):
        torch.set_num_threads(1)  # each core has a worker
        self._folder, self._detector = Path(folder), Detector.load(**options)
        if describe((), options)["weights_sha256"] != sha256:
            raise CheckpointError(f"the weights on {os.uname().nodename} are not those of the run: bring them there")

    def __call__(self, row: dict) -> dict:
        """{"part": number, "names": paths as bytes} -> the number, once the part is on the disk."""
        judge_part(self._detector, part_file(self._folder, row["part"]), [os.fsdecode(name) for name in row["names"]])
        return {"part": row["part"]}


def judge_part(detector: Detector, target: Path, paths: Sequence[str]) -> None:
    """Write the verdicts on some recordings, unless they are there; one that ends every worker is left out.

    Beside the target, while it is being made, lies a trail of what was begun: the recording at the end of it when a
    worker died is suspected of having done it.
    """
    if target.exists():  # written by a worker that died before it could say so
        return
    trail = target.with_name(f".{target.stem}.trail")  # hidden: readers of Parquet pass it over
    deadly = _suspects(trail)
    rows = {path: verdict_row(path, AudioError(DEADLY)) for path in paths if deadly[path] >= MAX_DEATHS}
    left = [path for path in paths if path not in rows]
    with trail.open("ab", buffering=0) as begun:
        begun.write(b"\0")

        def noted() -> Iterator[Path]:
            for path in left:
                begun.write(os.fsencode(path) + b"\0")
                yield Path(path)

        with closing(detector.verdicts(noted())) as verdicts:
            rows |= {path: verdict_row(path, verdict) for path, verdict in zip(left, verdicts, strict=True)}
    with atomic_write(target) as part:
        as_table([rows[path] for path in paths]).to_parquet(part, index=False)
    trail.unlink(missing_ok=True)  # a worker whose driver was killed may have been at it, too


DEADLY = f"{MAX_DEATHS} workers died while they read it: it may be made to do that, or need more memory than they have"


def _suspects(trail: Path) -> Counter[str]:
    """How many earlier tries ended with each recording; every try begins with a zero byte, every name ends with one."""
    tries = trail.read_bytes().split(b"\0\0") if trail.exists() else []
    return Counter(os.fsdecode(one.rstrip(b"\0").rpartition(b"\0")[2]) for one in tries)


def as_table(rows: list[dict]) -> pd.DataFrame:
    """Rows of verdicts in columns of one type each, whatever is missing; bytes of names that are no UTF-8 escaped."""
    columns = {name: [row.get(name) for row in rows] for name in ROW_COLUMNS}
    for name in WORDS:
        columns[name] = [text and os.fsencode(text).decode("utf-8", "backslashreplace") for text in columns[name]]
    kinds = {name: "string" if name in WORDS else "float64" for name in ROW_COLUMNS} | {"n_windows": "Int64"}
    return pd.DataFrame(columns).astype(kinds)


def _sum_up(folder: Path, n_inputs: int) -> Counter[str]:
    """Count the verdicts and list what could not be read."""
    words = pd.read_parquet(folder / "verdicts", columns=["verdict"])["verdict"]
    if len(words) != n_inputs:
        raise FleetError(f"{folder} holds {len(words):,} verdicts on {n_inputs:,} recordings: files in it were changed")
    unreadable = pd.read_parquet(folder / "verdicts", filters=[("verdict", "==", "unreadable")])
    for left in (folder / "verdicts").glob(".*"):  # by what died
        left.unlink(missing_ok=True)
    with atomic_write(folder / "unreadable.csv") as part:
        unreadable[["path", "reason"]].to_csv(part, index=False)
    return Counter(words.value_counts().to_dict())
