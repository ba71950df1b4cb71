"""Any number of channels to one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from deepfake_utils.conventions import AudioError

MAX_PEAK = 16.0  # full scale is 1; lossy decoders overshoot it a little, integers stored as floats by far more
CANCELLED = 0.1  # of the power that unrelated channels would leave in their average: below, they cancel each other
DECIDED_S = 1.0  # of sound, on which it is decided whether channels cancel ...
DECIDED_SAMPLES = 2**22  # ... and no more than this many, all channels counted


class Mixer:
    """Makes mono of a recording that comes in blocks.

    Channels are averaged, unless that cancels them (opposite polarity): from that second on the loudest stands for all,
    and this is said. Seconds count from the beginning, so the result does not depend on the sizes of the blocks. A
    single channel comes out at once, several when their second is whole.

    Args:
        name: of the recording, for messages.
        say: takes what is to be said about it.
    """

    def __init__(self, name: str, say: Callable[[str], None]):
        self._name, self._say = name, say
        self._loudest: int | None = None  # channel, once they cancelled
        self._kind = (1, 0)  # channels and sampling rate of what is waiting
        self._waiting: list[np.ndarray] = []
        self._n_waiting, self._n_before_s = 0, 0.0

    def push(self, block: np.ndarray, rate_hz: int) -> Iterator[tuple[np.ndarray, int]]:
        """Take samples (n, channels), full scale 1, and yield mono blocks (m,), each with its sampling rate.

        Raises:
            AudioError: a sample is NaN or infinite, or far beyond full scale.
        """
        refuse_impossible(self._name, block)
        if (block.shape[1], rate_hz) != self._kind:  # files may be joined
            yield from self.finish()
            self._kind = (block.shape[1], rate_hz)
        if block.shape[1] == 1:
            yield self._mixed(block), rate_hz
            return
        n_wanted = max(1, min(int(DECIDED_S * rate_hz), DECIDED_SAMPLES // block.shape[1]))
        self._waiting.append(block)
        self._n_waiting += len(block)
        if self._n_waiting < n_wanted:
            return
        joined = np.concatenate(self._waiting)
        n_whole = len(joined) // n_wanted * n_wanted
        for start in range(0, n_whole, n_wanted):
            yield self._mixed(joined[start : start + n_wanted]), rate_hz
        self._waiting, self._n_waiting = [joined[n_whole:].copy()], len(joined) - n_whole

    def finish(self) -> Iterator[tuple[np.ndarray, int]]:
        """What is left at the end, or before another rate or number of channels."""
        if self._n_waiting:
            yield self._mixed(np.concatenate(self._waiting)), self._kind[1]
        self._waiting, self._n_waiting = [], 0

    def _mixed(self, block: np.ndarray) -> np.ndarray:
        n_channels, rate_hz = self._kind
        channels = block.T if n_channels == 1 else block.T.astype(np.float64, order="C")  # eight times as fast to add
        mono = channels[0] if n_channels == 1 else channels.mean(axis=0)
        if n_channels > 1 and self._loudest is None:
            power = np.einsum("ij,ij->i", channels, channels)
            if np.einsum("i,i", mono, mono) < CANCELLED * power.sum() / n_channels**2:
                self._loudest = int(power.argmax())
                self._say(
                    f"averaged, its {n_channels} channels cancel each other (opposite polarity): from "
                    f"{self._n_before_s:.0f} s on channel {self._loudest + 1}, the loudest, stands for all"
                )
        self._n_before_s += len(block) / rate_hz
        return mono if self._loudest is None or self._loudest >= n_channels else block[:, self._loudest]


def refuse_impossible(name: str, block: np.ndarray) -> None:
    """Refuse samples, of whatever shape, that no recording has.

    Raises:
        AudioError: some are not finite, or far beyond full scale, which is 1.
    """
    peak = float(max(block.max(initial=0.0), -block.min(initial=0.0)))  # NaN and infinities come through
    if not math.isfinite(peak):
        raise AudioError(f"{name} holds NaN or infinite samples; it was written by a faulty process, convert it again")
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name} has samples up to {peak:g}, expected [-1, 1]: it seems to store integers as floats, "
            "divide them by full scale (32768 for 16 bits) and write it again"
        )
