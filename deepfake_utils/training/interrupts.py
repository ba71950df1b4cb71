"""Ctrl-C that never tears a step in half."""

from __future__ import annotations

import signal
import threading


class Interrupts:
    """Ctrl-C (and a polite kill) raises KeyboardInterrupt, and inside a `held` block only if it comes twice."""

    def __init__(self) -> None:
        self._holding = self._wanted = False
        self.torn = False  # whether a second Ctrl-C ended a `held` block before its end
        self._previous: dict = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._holding and not self._wanted:
            self._wanted = True  # a second Ctrl-C does not wait
            return
        raise KeyboardInterrupt

    def held(self) -> _Held:
        return _Held(self)


class _Held:
    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts

    def __enter__(self) -> None:
        self.interrupts._holding = True

    def __exit__(self, kind, *_: object) -> None:
        self.interrupts._holding = False
        self.interrupts.torn |= kind is not None and issubclass(kind, KeyboardInterrupt)
        if self.interrupts._wanted and kind is None:
            self.interrupts._wanted = False
            raise KeyboardInterrupt
