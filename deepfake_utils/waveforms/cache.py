"""Clips decoded from their files, and a cache that keeps as many of them as the machine's memory allows.

The threads of a process share one cache; processes share none.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import lru_cache, partial

import numpy as np
import pandas as pd

from deepfake_utils.conventions import AudioError, ConfigError, CorpusError
from deepfake_utils.machine import free_memory_bytes, memory_limit_bytes
from deepfake_utils.waveforms.decode import audio_info, read_audio, to_int16

SHARE_OF_LIMIT = 0.5  # of the memory this process may use, the most the cache takes unless told otherwise
SHARE_LEFT_FREE = 0.05  # of the same: the floor under which nothing more may be taken ...
LEAST_LEFT_FREE_BYTES = 512 * 2**20  # ... and never less than this
CHECK_EVERY_S = 0.25
ENTRY_OVERHEAD_BYTES = 512  # the array's header, the key and the table's slot


class FileSource:
    """A corpus read from its files: every request decodes.

    Args:
        protocol: one row a trial, with the columns `utterance` and `path`.

    Raises:
        CorpusError: the protocol is empty or lacks one of the columns.
    """

    reason = ""  # why `open_source` chose this kind

    def __init__(self, protocol: pd.DataFrame):
        missing = {"utterance", "path"} - set(protocol.columns)
        if missing:
            raise CorpusError(f"the protocol lacks {sorted(missing)}; it has {list(protocol.columns)}")
        if not len(protocol):
            raise CorpusError("the protocol has no rows: nothing to read (was the split name right?)")
        self.utterances = protocol["utterance"].astype(str).to_numpy(dtype=object)
        self.paths = np.array([os.path.abspath(path) for path in protocol["path"]], dtype=object)

    def __len__(self) -> int:
        return len(self.utterances)

    def clip(self, index: int) -> np.ndarray:
        """The whole recording of trial `index` as int16 samples (n,) at 16 kHz.

        Raises:
            AudioError: the file cannot be decoded; the text names the utterance and the path.
        """
        try:
            return to_int16(read_audio(self.paths[index]))
        except (AudioError, OSError) as error:
            raise AudioError(f"utterance {self.utterances[index]}: {error}") from error

    def n_samples(self, index: int) -> int:
        """The length of trial `index` at 16 kHz, from the header where that is exact."""
        info = audio_info(self.paths[index])
        return info.n_samples if info.is_exact else len(self.clip(index))

    def describe(self) -> str:
        """One line for the notebook."""
        return with_reason(f"files: {len(self):,} clips, decoded at every use", self.reason)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.describe()}>"


class CachedSource(FileSource):
    """A corpus whose clips are decoded once and kept while memory allows.

    Args:
        protocol: as for `FileSource`.
        cache: None takes the cache that all sources of this process share.
    """

    def __init__(self, protocol: pd.DataFrame, cache: ClipCache | None = None):
        super().__init__(protocol)
        self.cache = shared_cache() if cache is None else cache

    def clip(self, index: int) -> np.ndarray:
        """As for `FileSource`; the array is the cache's and cannot be written to."""
        return self.cache.get(self.paths[index], partial(super().clip, index))

    def describe(self) -> str:
        return with_reason(f"cache: {len(self):,} clips; {self.cache.describe()}", self.reason)


class ClipCache:
    """Least-recently-used clips in memory, under a byte budget that follows the machine.

    The budget is what the cache holds plus what is free above a floor, at most a ceiling. It is worked out anew
    a few times a second, also while nobody asks for clips: memory taken by anything else shrinks it and purges
    the clips used longest ago at once, memory given back lets it grow again.

    A shuffled epoch asks for every clip once, and for that no rule of recency is good: with room for half the
    corpus 15 % of the requests hit, with room for 90 % of it 67 %. Where a corpus does not fit, a packed store is
    the better source.

    Args:
        budget_bytes: the ceiling; None takes half the memory this process may use.
        floor_bytes: memory left free for everything else; None takes 5 % of that memory, 512 MiB at least.
        free_bytes: tells the memory that can still be taken (machine and control group).

    Attributes:
        hits, misses: requests answered from memory, and all others.
        decodes: clips decoded; fewer than misses where several threads asked for one clip at once.
        purged: clips dropped to stay within the budget.
        passed: clips handed through because they alone exceed the budget.

    >>> cache = ClipCache(budget_bytes=10_000)
    >>> first = cache.get("a", lambda: np.zeros(1000, np.int16))
    >>> cache.get("a", lambda: np.zeros(1000, np.int16)) is first, cache.hits, cache.misses
    (True, 1, 1)
    """

    def __init__(
        self,
        budget_bytes: int | None = None,
        *,
        floor_bytes: int | None = None,
        free_bytes: Callable[[], int] = free_memory_bytes,
    ):
        limit = memory_limit_bytes()
        self._ceiling_bytes = int(limit * SHARE_OF_LIMIT) if budget_bytes is None else budget_bytes
        if self._ceiling_bytes < 0:
            raise ConfigError(f"budget_bytes is {budget_bytes}: expected 0 or more")
        self._floor_bytes = max(LEAST_LEFT_FREE_BYTES, int(limit * SHARE_LEFT_FREE))
        if floor_bytes is not None:
            self._floor_bytes = floor_bytes
        self._free_bytes = free_bytes
        self._lock = threading.RLock()
        self._clips: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._pending: dict[Hashable, Future] = {}
        self._bytes = self._bytes_since_check = 0
        self.hits = self.misses = self.decodes = self.purged = self.passed = 0
        self._watched = False
        self.follow_memory()

    def get(self, key: Hashable, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The clip under `key`; `decode` makes it where it is absent, once however many threads ask.

        Returns:
            A read-only array, shared with every other caller.

        Raises:
            whatever `decode` raises, in every thread that waits for this clip; the next request tries again.
        """
        with self._lock:
            if key in self._clips:
                self._clips.move_to_end(key)
                self.hits += 1
                return self._clips[key]
            self.misses += 1
            pending = self._pending.get(key)
            if pending is None:
                decoding = self._pending[key] = Future()
        if pending is not None:
            return pending.result()
        try:
            clip = _frozen(decode())
            self._keep(key, clip)
        except BaseException as error:
            with self._lock:
                self._pending.pop(key, None)
            decoding.set_exception(error)
            raise
        decoding.set_result(clip)
        return clip

    @property
    def budget_bytes(self) -> int:
        """What the cache may hold at present."""
        return self._budget_bytes

    @property
    def bytes(self) -> int:
        """What the cache holds."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._clips)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._clips

    def follow_memory(self) -> None:
        """Work the budget out anew from the memory free now, and purge down to it."""
        with self._lock:
            spare_bytes = self._free_bytes() - self._floor_bytes
            self._budget_bytes = max(0, min(self._ceiling_bytes, self._bytes + spare_bytes))
            self._checked_at_s, self._bytes_since_check = time.monotonic(), 0
            if self._purge() and spare_bytes < 0:
                _return_freed_memory()

    def describe(self) -> str:
        """One line for the notebook."""
        asked = self.hits + self.misses
        if not asked:
            return f"room for {self._budget_bytes / 1e9:.2f} GB of decoded clips"
        share = f"{self.hits / asked:.1%} of {asked:,} requests hit"
        text = f"{len(self):,} kept in {self._bytes / 1e9:.2f} of {self._budget_bytes / 1e9:.2f} GB, {share}"
        counts = f"{self.decodes:,} decoded, {self.purged:,} purged, {self.passed:,} passed through"
        return f"{text}; {counts}"

    def __repr__(self) -> str:
        return f"<ClipCache {self.describe()}>"

    def _keep(self, key: Hashable, clip: np.ndarray) -> None:
        with self._lock:
            del self._pending[key]
            self.decodes += 1
            size = clip.nbytes + ENTRY_OVERHEAD_BYTES
            if size > self._budget_bytes:
                self.passed += 1
            else:
                self._clips[key] = clip
                self._bytes += size
                self._bytes_since_check += size
            overdue = time.monotonic() - self._checked_at_s > CHECK_EVERY_S
            if overdue or self._bytes_since_check > self._floor_bytes // 8:
                self.follow_memory()
            else:
                self._purge()
            if not self._watched:
                self._watched = True
                watch = partial(_watch, weakref.ref(self))
                threading.Thread(target=watch, name="clip-cache-watch", daemon=True).start()

    def _purge(self) -> bool:
        """Drop what was used longest ago until the budget is kept; say whether anything went."""
        before = self.purged
        while self._bytes > self._budget_bytes:
            _, clip = self._clips.popitem(last=False)
            self._bytes -= clip.nbytes + ENTRY_OVERHEAD_BYTES
            self.purged += 1
        return self.purged > before


@lru_cache(maxsize=1)
def shared_cache() -> ClipCache:
    """The cache of this process: training and development clips share one budget."""
    return ClipCache()


def with_reason(text: str, reason: str) -> str:
    """A description and, where there is one, the reason for the choice."""
    return f"{text} ({reason})" if reason else text


def _frozen(clip: np.ndarray) -> np.ndarray:
    clip = clip if clip.base is None else clip.copy()  # a view would keep its whole base in memory, uncounted
    clip.setflags(write=False)
    return clip


def _watch(reference: weakref.ref) -> None:
    while (cache := reference()) is not None:
        cache.follow_memory()
        del cache
        time.sleep(CHECK_EVERY_S)


def _return_freed_memory() -> None:
    """Make glibc give freed pages back: left alone it keeps those between live blocks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
