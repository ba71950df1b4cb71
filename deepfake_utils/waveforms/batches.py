"""Batches of fixed-length crops: the same numbers from files, cache, store or device memory.

Everything random is a function of (seed, epoch, step), so a run that stops can go on from any step. The host
draws where each crop starts (a few bytes); cutting happens where the samples are. A source in host memory is
read ahead by a few short-lived threads, one a batch: an interrupted loop leaves none behind.
"""

from __future__ import annotations

import _thread
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from deepfake_utils.conventions import CROP_SAMPLES, ConfigError

Augmentation = Callable[[torch.Tensor, torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]

SCALE = 1 / 32768  # of int16 samples; exact, because it is a power of two

_ORDER, _CROPS, _AUGMENTATION = range(3)  # independent streams of random numbers within a seed


class Batch(NamedTuple):
    """What a training or scoring step works on."""

    waveform: torch.Tensor  # (B, T) float32 in [-1, 1], on the device
    target: torch.Tensor  # (B,) float32, the weight of bona fide, on the device
    index: np.ndarray  # (B,) int64, rows of the protocol


class Batches:
    """An iterable of batches that also knows how long its consumer waited for them.

    Attributes:
        wait_s: time the consumer stood still for samples, in seconds; augmentation is not waiting.
        augment_s: time spent augmenting (on a GPU: launching it), in seconds.
    """

    def __init__(self, source, plan, steps: range, finish, n_samples: int, device, prefetch: int | None):
        self._source, self._plan, self._finish = source, plan, finish
        self._steps, self._n_samples, self._device = steps, n_samples, torch.device(device)
        self._prefetch = prefetch if prefetch is not None else min(8, 1 + (os.cpu_count() or 1))
        self.wait_s, self.augment_s = 0.0, 0.0
        _check_source_device(source, self._device)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        if self._device.type != "cpu" and hasattr(self._source, "gather"):
            made = (self._gather(step) for step in self._steps)
        else:
            made = read_ahead(self._assemble, self._steps, self._prefetch)
        with closing(made):
            for step in self._steps:
                started_s = time.perf_counter()
                plan, waveform = next(made)
                if waveform.dtype == torch.int16:
                    waveform = to_waveform(waveform, self._device)
                finishing_s = time.perf_counter()
                batch = self._finish(step, plan, waveform)
                self.wait_s += finishing_s - started_s
                self.augment_s += time.perf_counter() - finishing_s
                yield batch

    def _assemble(self, step: int) -> tuple[_Plan, torch.Tensor]:
        """In a thread: a batch in host memory, float on its way to the CPU and int16 on its way elsewhere."""
        plan = self._plan(step)
        crops = host_crops(self._source, plan, self._n_samples, pin=self._device.type == "cuda")
        if self._device.type == "cpu":  # by NumPy: a torch kernel would start a team of threads in each thread
            crops = torch.from_numpy(np.multiply(crops.numpy(), np.float32(SCALE), dtype=np.float32))
        return plan, crops

    def _gather(self, step: int) -> tuple[_Plan, torch.Tensor]:
        plan = self._plan(step)
        return plan, self._source.gather(plan.index, plan.position, self._n_samples)


class _Plan(NamedTuple):
    index: np.ndarray  # (B,) int64
    position: np.ndarray  # (B,) float64 in [0, 1): where in the clip the crop starts


def train_batches(
    source,
    labels,
    *,
    batch_size: int,
    n_samples: int = CROP_SAMPLES,
    seed: int,
    epoch: int,
    device,
    first_step: int = 0,
    drop_last: bool = True,
    augment: Augmentation | None = None,
    augmented_share: Callable[[int], float] = lambda step: 1.0,
    weights=None,
    shard: tuple[int, int] = (0, 1),
    prefetch: int | None = None,
) -> Batches:
    """Shuffled batches of random crops for one epoch.

    Args:
        source: from `open_source`; its rows are the protocol's.
        labels: (N,) 0 spoof, 1 bona fide, one per row of the source.
        batch_size: utterances a batch.
        n_samples: crop length at 16 kHz; shorter clips are repeated end to end.
        seed, epoch: with the step they determine order, crops and augmentation, whatever the source.
        device: where the batches are wanted.
        first_step: the first batch to give; the batches are those of the full epoch from there on.
        drop_last: leave out an incomplete last batch.
        augment: callable (waveform (B, T), target (B,), generator on `device`) -> (waveform, target).
        augmented_share: of the utterances of a step of the epoch, 0 to 1; the others stay as they are.
        weights: (N,) how often a row is drawn, relative to the others (with replacement; see
            `balanced_weights`). None draws every row once.
        shard: (rank, size) of a data-parallel process: it gets every size-th row of each batch. An augmentation
            sees the whole batch first, so that the processes together train on what one alone would.
        prefetch: batches read ahead of the consumer; None takes one more than the processors, 8 at most.

    Raises:
        ConfigError: a length, size or step that does not fit the source.
        AudioError: while iterating, for a clip that cannot be read; the text names the utterance.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(source),):
        raise ConfigError(f"labels have shape {labels.shape}: expected ({len(source)},), one a clip")
    _check_sizes(batch_size=batch_size, n_samples=n_samples)
    order = epoch_order(len(source), seed, epoch, weights)
    n_steps = len(order) // batch_size if drop_last else -(-len(order) // batch_size)
    if n_steps == 0:
        raise ConfigError(
            f"batch_size {batch_size} is more than the {len(order)} clips, and an incomplete batch "
            "is dropped: take a smaller batch_size or drop_last=False"
        )
    if not 0 <= first_step <= n_steps:
        raise ConfigError(f"first_step {first_step} is outside the epoch of {n_steps} steps")
    targets = torch.from_numpy(labels.astype(np.float32)).to(device)
    mine = slice(shard[0], None, shard[1])

    def plan(step: int) -> _Plan:
        index = order[step * batch_size : (step + 1) * batch_size]
        position = np.random.default_rng(_entropy(seed, epoch, step, _CROPS)).random(len(index))
        return _Plan(index[mine], position[mine]) if augment is None else _Plan(index, position)

    def finish(step: int, plan: _Plan, waveform: torch.Tensor) -> Batch:
        # A blocking copy, however small, would wait for all that the GPU has been told to do.
        target = targets[torch.from_numpy(plan.index).to(targets.device, non_blocking=True)]
        if augment is None:
            return Batch(waveform, target, plan.index)
        generator = torch.Generator(waveform.device)
        state = _entropy(seed, epoch, step, _AUGMENTATION).generate_state(1, np.uint64)
        generator.manual_seed(int(state[0]))
        if (share := augmented_share(step)) >= 1:
            waveform, target = augment(waveform, target, generator)
        else:
            chosen = torch.rand(len(target), generator=generator, device=generator.device) < share
            if rows := chosen.nonzero().flatten().tolist():
                waveform[rows], target[rows] = augment(waveform[rows], target[rows], generator)
        return Batch(waveform[mine], target[mine], plan.index[mine])

    return Batches(source, plan, range(first_step, n_steps), finish, n_samples, device, prefetch)


def eval_batches(
    source, *, batch_size: int, n_samples: int = CROP_SAMPLES, device, prefetch: int | None = None
) -> Batches:
    """Batches in protocol order, the first `n_samples` of each clip, shorter clips repeated end to end.

    The last batch may be short, and the targets are zeros: scoring knows no labels.
    """
    _check_sizes(batch_size=batch_size, n_samples=n_samples)

    def plan(step: int) -> _Plan:
        index = np.arange(step * batch_size, min((step + 1) * batch_size, len(source)))
        return _Plan(index, np.zeros(len(index)))

    def finish(step: int, plan: _Plan, waveform: torch.Tensor) -> Batch:
        return Batch(waveform, torch.zeros(len(plan.index), device=waveform.device), plan.index)

    steps = range(-(-len(source) // batch_size))
    return Batches(source, plan, steps, finish, n_samples, device, prefetch)


def epoch_order(n_clips: int, seed: int, epoch: int, weights=None) -> np.ndarray:
    """The rows (n_clips,) an epoch visits, in order: a permutation, or weighted draws with replacement."""
    rng = np.random.default_rng(_entropy(seed, epoch, 0, _ORDER))
    if weights is None:
        return rng.permutation(n_clips)
    weights = np.asarray(weights, dtype=np.float64)
    usable = weights.shape == (n_clips,) and np.isfinite(weights).all() and (weights >= 0).all()
    if not usable or not weights.any():
        raise ConfigError(
            f"sampling weights must be {n_clips} finite numbers of at least 0, not all 0; "
            f"got shape {weights.shape}, minimum {weights.min(initial=np.inf)}"
        )
    return rng.choice(n_clips, size=n_clips, p=weights / weights.sum())


def balanced_weights(labels) -> np.ndarray:
    """Sampling weights (N,) that draw every class equally often.

    >>> balanced_weights([0, 0, 0, 1]).round(3).tolist()
    [0.333, 0.333, 0.333, 1.0]
    """
    _, which, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return 1.0 / counts[which]


def crop_starts(lengths: np.ndarray, n_samples: int, positions: np.ndarray) -> np.ndarray:
    """First sample (B,) of each crop: every start that fits is equally likely, and a short clip starts at 0.

    >>> crop_starts(np.array([10, 4, 3]), 4, np.array([0.999, 0.5, 0.5])).tolist()
    [6, 0, 0]
    """
    n_starts = np.maximum(lengths - n_samples + 1, 1)
    return np.minimum((positions * n_starts).astype(np.int64), n_starts - 1)


def host_crops(source, plan: _Plan, n_samples: int, *, pin: bool = False) -> torch.Tensor:
    """Cut the planned crops, (B, n_samples) int16 in host memory."""
    crops = torch.empty((len(plan.index), n_samples), dtype=torch.int16, pin_memory=pin)
    for row, index, position in zip(crops.numpy(), plan.index.tolist(), plan.position, strict=True):
        clip = source.clip(index)
        start = crop_starts(np.array(len(clip)), n_samples, position)
        row[:] = clip[start : start + n_samples] if len(clip) >= n_samples else np.resize(clip, n_samples)
    return crops


def to_waveform(samples: torch.Tensor, device: torch.device) -> torch.Tensor:
    """int16 samples to float32 in [-1, 1) on `device`."""
    return samples.to(device, non_blocking=True).to(torch.float32) * SCALE


def read_ahead(make: Callable, steps: Iterable, depth: int) -> Iterator:
    """Yield make(step) in order while threads, one a step, make up to `depth` of the following ones.

    An exception in a thread is raised at its step. Closing the generator waits for the few batches under way.
    """
    remaining = iter(steps)
    under_way = deque(_start(make, step) for step in islice(remaining, max(depth, 1)))
    try:
        while under_way:
            value = under_way.popleft().result()
            under_way.extend(_start(make, step) for step in islice(remaining, 1))
            yield value
    finally:
        wait(under_way)


def _start(make: Callable, step) -> Future:
    """Begin make(step) in a thread of its own.

    Not a `threading.Thread`: its `start` returns only once the new thread has run, and by then that thread holds the
    interpreter and is cutting crops. It cost the consumer milliseconds a batch.
    """
    future = Future()

    def run() -> None:
        try:
            future.set_result(make(step))
        except BaseException as error:
            future.set_exception(error)

    _thread.start_new_thread(run, ())
    return future


def _entropy(seed: int, epoch: int, step: int, stream: int) -> np.random.SeedSequence:
    # A spawn key and not a list of words: SeedSequence([1]) and SeedSequence([1, 0]) give the same numbers.
    return np.random.SeedSequence(seed, spawn_key=(epoch, step, stream))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}: expected 1 or more")


def _check_source_device(source, device: torch.device) -> None:
    held = getattr(source, "device", None)
    if held is not None and torch.empty(0, device=device).device != held:
        raise ConfigError(f"the source lies in the memory of {held}, batches wanted on {device}: open it there")
