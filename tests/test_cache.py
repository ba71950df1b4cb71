"""The clip cache: hits counted, one decode a clip, the budget following real and simulated memory, processes."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from deepfake_utils.conventions import AudioError, ConfigError, CorpusError
from deepfake_utils.waveforms.cache import ENTRY_OVERHEAD_BYTES, CachedSource, ClipCache, FileSource

MEBIBYTE = 2**20
PLENTY_BYTES = 2**40


def clip_of(value: int, n_samples: int = 1000) -> np.ndarray:
    return np.full(n_samples, value, np.int16)


def entry_bytes(n_samples: int) -> int:
    return 2 * n_samples + ENTRY_OVERHEAD_BYTES


def make_cache(budget_bytes: int, **settings) -> ClipCache:
    return ClipCache(budget_bytes, **{"floor_bytes": 0, "free_bytes": lambda: PLENTY_BYTES, **settings})


def wait_until(condition, limit_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def write_corpus(folder: Path, lengths) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, n_samples in enumerate(lengths):
        path = folder / f"utt{number}.wav"
        soundfile.write(path, rng.integers(-32768, 32767, n_samples, dtype=np.int16), 16_000, "PCM_16")
        rows.append({"utterance": f"utt{number}", "path": str(path)})
    return pd.DataFrame(rows)


def test_the_least_recently_used_clip_goes_first_and_hits_are_counted():
    cache = make_cache(3 * entry_bytes(1000))
    for key in "abcadab":  # d takes the place of b, the least recently used though not the oldest; then b that of c
        assert cache.get(key, lambda key=key: clip_of(ord(key)))[0] == ord(key)
    assert (cache.hits, cache.misses, cache.decodes, cache.purged) == (2, 5, 5, 2)
    assert [key in cache for key in "abcd"] == [True, True, False, True]
    assert cache.bytes == 3 * entry_bytes(1000) and len(cache) == 3
    assert "28.6% of 7 requests hit" in repr(cache)


@pytest.mark.parametrize("seed", range(30))
def test_it_agrees_with_a_plain_least_recently_used_list(seed):
    rng = np.random.default_rng(seed)
    keys, budget_bytes = rng.integers(0, 6, 60).tolist(), int(rng.integers(0, 10_000))
    cache, kept, hits = make_cache(budget_bytes), OrderedDict(), 0
    for key in keys:
        n_samples = 300 * (key + 1)
        if key in kept:
            hits += 1
            kept.move_to_end(key)
        elif entry_bytes(n_samples) <= budget_bytes:
            kept[key] = entry_bytes(n_samples)
            while sum(kept.values()) > budget_bytes:
                kept.popitem(last=False)
        np.testing.assert_array_equal(
            cache.get(key, lambda key=key, n=n_samples: clip_of(key, n)), clip_of(key, n_samples)
        )
    assert cache.hits == hits and cache.misses == len(keys) - hits
    assert cache.bytes == sum(kept.values()) <= budget_bytes
    assert [key in cache for key in range(6)] == [key in kept for key in range(6)]


def test_a_clip_larger_than_the_budget_passes_through_and_displaces_nothing():
    cache = make_cache(entry_bytes(1000))
    cache.get("small", lambda: clip_of(1))
    assert len(cache.get("large", lambda: clip_of(2, 5000))) == 5000
    assert "small" in cache and "large" not in cache and cache.passed == 1 and cache.purged == 0


def test_many_threads_asking_for_one_clip_cause_one_decode():
    cache, started, release = make_cache(PLENTY_BYTES), threading.Event(), threading.Event()
    calls, got = [], []

    def decode():
        calls.append(1)
        started.set()
        assert release.wait(10)
        return clip_of(7)

    threads = [threading.Thread(target=lambda: got.append(cache.get("k", decode))) for _ in range(12)]
    for thread in threads:
        thread.start()
    assert started.wait(10) and wait_until(lambda: cache.misses == 12)
    release.set()
    for thread in threads:
        thread.join(10)
    assert len(calls) == cache.decodes == 1 and len(got) == 12
    assert all(clip is got[0] for clip in got)


def test_a_failed_decode_reaches_every_waiter_and_the_next_request_tries_again():
    cache, release, errors = make_cache(PLENTY_BYTES), threading.Event(), []

    def fail():
        assert release.wait(10)
        raise AudioError("broken")

    def ask():
        with pytest.raises(AudioError, match="broken") as caught:
            cache.get("k", fail)
        errors.append(caught.value)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: cache.misses == 6)
    release.set()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 6 and cache.decodes == 0 and len(cache) == 0
    assert cache.get("k", lambda: clip_of(3))[0] == 3


def test_many_threads_on_many_clips_under_a_small_budget_stay_consistent():
    cache = make_cache(20 * entry_bytes(500))

    def ask(seed):
        for key in np.random.default_rng(seed).integers(0, 50, 400).tolist():
            assert (cache.get(key, lambda key=key: clip_of(key, 500)) == key).all()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert cache.hits + cache.misses == 6 * 400 and cache.hits > 0
    assert cache.decodes - cache.purged == len(cache) == 20
    assert cache.bytes == 20 * entry_bytes(500)


def test_callers_cannot_spoil_a_cached_clip_and_a_view_does_not_pin_its_base():
    cache, base = make_cache(PLENTY_BYTES), clip_of(5, 100_000)
    clip = cache.get("k", lambda: base[:10])
    assert clip.base is None
    with pytest.raises(ValueError, match="read-only"):
        clip[0] = 1


class Machine:
    """A machine of which something else takes a part."""

    def __init__(self, total_bytes: int):
        self.total_bytes, self.taken_bytes, self.cache = total_bytes, 0, None

    def free_bytes(self) -> int:
        return self.total_bytes - self.taken_bytes - (self.cache.bytes if self.cache is not None else 0)


def test_the_budget_shrinks_under_pressure_and_grows_back():
    entry = entry_bytes(1000)
    machine = Machine(30 * entry)
    cache = machine.cache = make_cache(20 * entry, floor_bytes=5 * entry, free_bytes=machine.free_bytes)
    for key in range(20):
        cache.get(key, lambda: clip_of(0))
    assert len(cache) == 20 and cache.purged == 0
    machine.taken_bytes = 15 * entry  # 5 short of keeping the floor: 10 clips may stay
    cache.follow_memory()
    assert cache.budget_bytes == cache.bytes == 10 * entry
    assert [key in cache for key in range(20)] == [False] * 10 + [True] * 10
    machine.taken_bytes = 40 * entry
    cache.follow_memory()
    assert cache.budget_bytes == cache.bytes == 0 and cache.get("x", lambda: clip_of(1))[0] == 1
    machine.taken_bytes = 0
    cache.follow_memory()
    assert cache.budget_bytes == 20 * entry  # never above the ceiling


def test_memory_is_given_back_while_nobody_asks_for_clips():
    machine = Machine(PLENTY_BYTES)
    cache = machine.cache = make_cache(MEBIBYTE, free_bytes=machine.free_bytes)
    cache.get("k", lambda: clip_of(0))
    machine.taken_bytes = 2 * PLENTY_BYTES
    assert wait_until(lambda: len(cache) == 0)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not the GNU C library")
def test_purged_clips_leave_the_process():
    """Freeing alone does not: the allocator keeps the pages between clips that stay."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    machine = Machine(PLENTY_BYTES)
    cache = machine.cache = make_cache(PLENTY_BYTES, free_bytes=machine.free_bytes)
    for key in range(2000):
        cache.get(key, lambda: clip_of(1, 24_000))
    full_bytes, held_bytes = resident_bytes(), cache.bytes
    machine.taken_bytes = PLENTY_BYTES - held_bytes // 2
    cache.follow_memory()
    assert cache.purged in (1000, 1001)
    assert full_bytes - resident_bytes() > 0.4 * held_bytes


def test_the_watching_thread_ends_with_its_cache():
    def watchers():
        return {thread for thread in threading.enumerate() if thread.name == "clip-cache-watch"}

    before = watchers()  # of caches that other tests left to the garbage collector or to the whole process
    cache = make_cache(PLENTY_BYTES)
    assert not watchers() - before  # an unused cache has none
    cache.get("k", lambda: clip_of(0))
    assert len(watchers() - before) == 1
    del cache
    assert wait_until(lambda: not watchers() - before)


def test_a_negative_budget_is_refused():
    with pytest.raises(ConfigError, match="-1"):
        ClipCache(-1)


# --- sources -----------------------------------------------------------------------------------------------


def test_file_source_reads_every_clip_and_names_what_it_cannot_read(tmp_path):
    protocol = write_corpus(tmp_path, [100, 2000])
    source = FileSource(protocol)
    written, _ = soundfile.read(protocol["path"][1], dtype="int16")
    np.testing.assert_array_equal(source.clip(1), written)
    assert [source.n_samples(row) for row in range(2)] == [100, 2000]
    Path(protocol["path"][0]).write_bytes(b"no audio at all")
    with pytest.raises(AudioError, match="utterance utt0.*utt0.wav"):
        source.clip(0)


@pytest.mark.parametrize("columns", [["utterance"], ["path"]])
def test_a_protocol_without_its_columns_is_refused(columns):
    with pytest.raises(CorpusError, match="lacks"):
        FileSource(pd.DataFrame({column: ["x"] for column in columns}))
    with pytest.raises(CorpusError, match="no rows"):
        FileSource(pd.DataFrame({"utterance": [], "path": []}))


def test_sources_that_share_a_cache_decode_a_common_recording_once(tmp_path):
    protocol = write_corpus(tmp_path, [100, 200, 300])
    cache = make_cache(PLENTY_BYTES)
    all_clips, first_two = CachedSource(protocol, cache), CachedSource(protocol.head(2), cache)
    for source in (all_clips, first_two, all_clips):
        for row in range(len(source)):
            np.testing.assert_array_equal(source.clip(row), FileSource(protocol).clip(row))
    assert (cache.decodes, cache.hits, cache.misses) == (3, 5, 3)
    assert "62.5% of 8 requests hit" in all_clips.describe()


# --- real memory pressure ----------------------------------------------------------------------------------

# Fill a cache, then take memory for something else, in a process that cannot have both. Under a control group the
# kernel kills; under an address-space limit the allocation fails.
PRESSURE = """
import os, resource, sys, time
limit, group, bounded = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "bounded"
import numpy as np
from deepfake_utils.machine import free_memory_bytes
from deepfake_utils.waveforms.cache import ClipCache

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

if group:
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
    free_bytes = free_memory_bytes
else:
    limit += address_space()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    free_bytes = lambda: limit - address_space()
if bounded:
    cache = ClipCache(2**40, floor_bytes=60 * 2**20, free_bytes=free_bytes)
else:
    cache = ClipCache(2**40, floor_bytes=0, free_bytes=lambda: 2**40)
for key in range(limit_clips := int(sys.argv[1]) * 3 // 2 // 131072):
    assert cache.get(key, lambda: np.full(65536, key % 1000, np.int16))[0] == key % 1000
held = cache.bytes
ballast = []
for _ in range(20):
    ballast.append(np.ones(6 * 2**20, np.uint8))
    time.sleep(0.06)
for key in range(limit_clips):
    assert cache.get(key, lambda: np.full(65536, key % 1000, np.int16))[0] == key % 1000
print("alive", held, cache.bytes, cache.purged)
"""
ROOM_BYTES = 320 * MEBIBYTE


@pytest.fixture(params=["control group", "address space"])
def limited(request):
    """A function that runs PRESSURE in a process with about ROOM_BYTES to fill."""
    group = None
    if request.param == "control group":
        group = make_control_group(ROOM_BYTES)
        if group is None:
            pytest.skip("no control group can be made here (needs root and a writable memory controller)")

    def run(bounded: bool) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", PRESSURE, str(ROOM_BYTES), str(group or ""), "bounded" if bounded else "no"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if group is None:  # so that freed clips leave the address space too
            environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=100, env=environment, cwd=Path(__file__).parents[1]
        )

    yield run
    if group is not None:
        assert wait_until(lambda: remove_control_group(group))


def make_control_group(limit_bytes: int) -> Path | None:
    """A fresh group below this process's own, version 1 or 2, or None where that is not allowed."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        for hierarchy, controllers, own in (line.split(":", 2) for line in lines):
            if "memory" not in controllers.split(",") and hierarchy != "0":
                continue
            base = root / "memory" if hierarchy != "0" else root
            group = base / own.lstrip("/") / f"deepfake-utils-test-{os.getpid()}"
            group.mkdir()
            for name in ("memory.limit_in_bytes", "memory.max"):
                if (group / name).exists():
                    (group / name).write_text(str(limit_bytes))
                    if (group / "memory.swap.max").exists():
                        (group / "memory.swap.max").write_text("0")
                    return group
            group.rmdir()
    except OSError:
        pass
    return None


def remove_control_group(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory limits of this kind are Linux's")
def test_the_cache_survives_memory_pressure_that_kills_an_unbounded_one(limited):
    unbounded = limited(bounded=False)
    assert unbounded.returncode != 0 and "alive" not in unbounded.stdout
    assert unbounded.returncode == -9 or "MemoryError" in unbounded.stderr
    bounded = limited(bounded=True)
    assert bounded.returncode == 0, bounded.stderr[-2000:]
    _, held, left, purged = bounded.stdout.split()
    assert int(held) > 100 * MEBIBYTE  # it used the room while there was room,
    assert int(left) < int(held) - 60 * MEBIBYTE  # and made place for 120 MiB of something else
    assert int(purged) > 0
