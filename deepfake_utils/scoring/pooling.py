"""From windows to a recording: one figure for the whole, and the stretches that sound fake."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import softmax

from deepfake_utils.conventions import ConfigError

MEAN = {"name": "mean"}
TRIED = (
    MEAN,
    {"name": "quantile", "share": 0.25},
    {"name": "quantile", "share": 0.1},
    {"name": "attention", "temperature": 3.0},
    {"name": "attention", "temperature": 1.0},
)


def pool(log_odds: ArrayLike, pooling: Mapping = MEAN) -> float:
    """One figure for a recording from those of its windows.

    Args:
        log_odds: (n,), n >= 1, higher is more real.
        pooling: {"name": "mean"}; {"name": "quantile", "share": s}, the value that a share s of the windows lies
            below; or {"name": "attention", "temperature": t}, a mean that looks the more at a window the more fake it
            sounds: weights in proportion to exp(-log_odds / t).

    >>> pool([1.0, 3.0]), pool([1.0, 3.0], {"name": "quantile", "share": 0.5})
    (2.0, 2.0)
    >>> round(pool([0.0, 9.0], {"name": "attention", "temperature": 1.0}), 2)
    0.0
    """
    values = np.asarray(log_odds, dtype=np.float64)
    match pooling["name"]:
        case "mean":
            return float(values.mean())
        case "quantile":
            return float(np.quantile(values, pooling["share"]))
        case "attention":
            return float(values @ softmax(-values / pooling["temperature"]))
    raise ConfigError(f"unknown pooling {pooling['name']!r}: expected mean, quantile or attention")


def describe(pooling: Mapping) -> str:
    """A pooling in words.

    >>> describe({"name": "attention", "temperature": 1.0})
    'attention (temperature 1)'
    """
    settings = ", ".join(f"{name} {value:g}" for name, value in pooling.items() if name in ("share", "temperature"))
    return pooling["name"] + (f" ({settings})" if settings else "")


def stretches(windows: Iterable, below: float, rule: str = "any") -> list[tuple[float, float]]:
    """(start_s, end_s) of the parts of a recording that sound fake, joined where they touch.

    Args:
        windows: with start_s, end_s and log_odds, in order; None as log_odds marks nothing.
        below: log-odds under which a moment counts as fake.
        rule: which of the windows that cover a moment decide: "any" below, "all" below, or their "mean".
    """
    windows = [window for window in windows if window.log_odds is not None]
    edges = sorted({edge for window in windows for edge in (window.start_s, window.end_s)})
    starts, ends = [w.start_s for w in windows], [w.end_s for w in windows]
    decide = {"any": min, "all": max, "mean": lambda values: sum(values) / len(values)}[rule]
    found: list[tuple[float, float]] = []
    for start, end in zip(edges, edges[1:], strict=False):
        covering = [w.log_odds for w in windows[bisect_right(ends, start) : bisect_right(starts, start)]]
        if not covering or decide(covering) >= below:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found
