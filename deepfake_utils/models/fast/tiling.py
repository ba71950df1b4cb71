"""Run a convolutional block over tiles of frames, several at once, on a processor.

Maps are (B, channels, frames, bands) here, channels last in memory: a run of frames is one piece of memory, which
operations read where it is, where a run of frames of a (B, channels, bands, frames) map would be copied first.

A tile's intermediate results fit in a core's cache, so that they never travel to memory, and each core takes the
next tile when it has done one: one meeting of the cores a block, not one an operation, which matters most where
other programs share the machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILE_FRAMES = 1023  # a multiple of 3; of one utterance with 24 bands and 32 channels: 3.1 MB


class Span(NamedTuple):
    """Some frames of a block's input, for some utterances of a batch."""

    utterances: slice
    start: int  # a multiple of 3: pooling by 3 begins anew
    stop: int
    n_frames: int  # of the map

    def of(self, x: Tensor) -> Tensor:
        """These frames of x, a view."""
        return x[self.utterances, :, self.start : self.stop]

    def around(self, x: Tensor, halo: int) -> Tensor:
        """These frames of x and `halo` on either side, of zeros where the map has ended."""
        part = x[self.utterances, :, max(self.start - halo, 0) : self.stop + halo]
        padding = self._outside(halo)
        return F.pad(part, (0, 0, *padding)) if any(padding) else part

    def add_around(self, x: Tensor, part: Tensor, halo: int) -> None:
        """Add to x what `around` would have given, the frames outside of the map left out."""
        before, after = self._outside(halo)
        inside = part[:, :, before : part.shape[2] - after]
        x[self.utterances, :, max(self.start - halo, 0) : self.stop + halo] += inside

    def clear_outside(self, part: Tensor) -> Tensor:
        """Set to zero, in place, the frames of `around(x, 1)` that lie outside of the map."""
        if self.start == 0:
            part[:, :, :1] = 0
        if self.stop == self.n_frames:
            part[:, :, -1:] = 0
        return part

    @property
    def pooled(self) -> slice:
        """The frames that pooling by 3 makes of these; the last one or two of a map may be left over."""
        return slice(self.start // 3, min(self.stop, self.n_frames // 3 * 3) // 3)

    def _outside(self, halo: int) -> tuple[int, int]:
        """How many of the frames of `around` lie before and after the map."""
        return max(halo - self.start, 0), max(self.stop + halo - self.n_frames, 0)


def spans_of(x: Tensor) -> list[Span]:
    """Cut x (B, channels, frames, bands) into spans of about TILE_FRAMES frames."""
    n_frames = x.shape[2]
    at_once = max(TILE_FRAMES // n_frames, 1)
    return [
        Span(slice(first, first + at_once), start, min(start + TILE_FRAMES, n_frames), n_frames)
        for first in range(0, len(x), at_once)
        for start in range(0, n_frames, TILE_FRAMES)
    ]


def empty_map(x: Tensor, channels: int, bands: int, frames: int | None = None, dtype=None) -> Tensor:
    """A map, channels last, for as many utterances as x; also as many frames where nothing else is said."""
    shape = (len(x), channels, x.shape[2] if frames is None else frames, bands)
    return torch.empty(shape, dtype=dtype or x.dtype, memory_format=torch.channels_last)


class Pooled(NamedTuple):
    """The largest of every 3 frames, and which it was, for the backward pass: a byte and not an index of eight.

    out = max(x0, x1, x2); where several are the largest, the first of them wins:

        dx0 = dout [x0 = out]        dx1 = dout [x1 = out and x0 < out]        dx2 = dout - dx0 - dx1
    """

    largest: Tensor  # (B, channels, frames // 3, bands)
    first: Tensor | None = None  # bool: the first of the three is the largest
    second: Tensor | None = None  # bool: the second is, and not the first

    @classmethod
    def empty(cls, x: Tensor, channels: int, bands: int, with_winners: bool) -> Pooled:
        """Room for the pooled frames of a map of x's utterances and frames."""
        maps = [empty_map(x, channels, bands, x.shape[2] // 3)]
        if with_winners:
            maps += [empty_map(x, channels, bands, x.shape[2] // 3, torch.bool) for _ in range(2)]
        return cls(*maps)

    def of(self, utterances: slice, frames: slice) -> Pooled:
        """Some pooled frames, views."""
        return Pooled(*(part if part is None else part[utterances, :, frames] for part in self))

    def fill(self, x: Tensor) -> None:
        """Pool the map x, whose last one or two frames may be left over."""
        stop = 3 * self.largest.shape[2]
        first, second, third = (x[:, :, start:stop:3] for start in range(3))
        torch.maximum(torch.maximum(first, second, out=self.largest), third, out=self.largest)
        if self.first is not None:
            # By NumPy: torch.eq takes four times as long.
            np.equal(first.numpy(), self.largest.numpy(), out=self.first.numpy())
            np.equal(second.numpy(), self.largest.numpy(), out=self.second.numpy())
            torch.gt(self.second, self.first, out=self.second)

    def unfill(self, grad: Tensor) -> Tensor:
        """The gradient of the 3 x frames // 3 frames that were pooled, from that of the largest."""
        batch, channels, frames, bands = grad.shape
        whole = grad.new_empty(batch, frames, 3, bands, channels)
        first, second, third = (whole[:, :, i].permute(0, 3, 1, 2) for i in range(3))
        np.multiply(grad.numpy(), self.first.numpy(), out=first.numpy())
        np.multiply(grad.numpy(), self.second.numpy(), out=second.numpy())
        torch.sub(grad, first, out=third).sub_(second)
        return whole.flatten(1, 2).permute(0, 3, 1, 2)

    def gradient_around(self, span: Span, halo: int) -> Tensor:
        """Gradient of the span's frames before pooling and of `halo` on either side, zero where none was pooled.

        `largest` holds the gradient of the pooled frames here.
        """
        frames = slice(max(span.pooled.start - halo, 0), min(span.pooled.stop + halo, self.largest.shape[2]))
        part = self.of(span.utterances, frames)
        grad = part.unfill(part.largest)
        start, stop = span.start - halo - 3 * frames.start, span.stop + halo - 3 * frames.start
        grad, missing = grad[:, :, max(start, 0) : stop], stop - grad.shape[2]
        return F.pad(grad, (0, 0, max(-start, 0), max(missing, 0))) if start < 0 or missing > 0 else grad


def pool_tiles(run: Callable[..., Tensor], x: Tensor, *parameters: Tensor, with_winners: bool = False) -> Pooled:
    """Pool what `run(span, x, *parameters)` returns for all spans of x.

    The first parameter is a weight with as many rows as the result has channels.
    """
    pooled = Pooled.empty(x, len(parameters[0]), x.shape[3], with_winners)

    def run_one(span: Span) -> None:
        pooled.of(span.utterances, span.pooled).fill(run(span, x, *parameters))

    list(map_in_threads(run_one, spans_of(x)))
    return pooled


def map_in_threads(function: Callable[[Any], Any], items: list) -> Iterable[Any]:
    """`map`, without gradient and in single precision, on as many threads as PyTorch uses for one operation.

    Results come in order and do not depend on the number of threads.
    """
    inference = torch.is_inference_mode_enabled()

    def run(item: Any) -> Any:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(item)

    return spread(run, items)


def spread(function: Callable[[Any], Any], items: list) -> Iterable[Any]:
    """The same for a function without PyTorch's operations, which needs none of its settings."""
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(items) == 1:
        return map(function, items)
    return _pool(n_threads, os.getpid()).map(function, items)


@cache
def _pool(n_threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads that each run operations alone. A forked process needs its own: threads do not survive a fork."""
    pool = ThreadPoolExecutor(n_threads, "tiles", initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: time.sleep(0.01), range(n_threads)))  # so that every thread starts now
    torch.set_num_threads(n_threads)  # what a thread sets for itself is also what later threads start from
    return pool
