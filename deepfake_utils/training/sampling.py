"""How often each recording is drawn in training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from deepfake_utils.conventions import BONAFIDE, SPOOF

SHARE_OF_MIXED_SOURCES = 0.7  # of the draws, where there are sources of one label, too


def balanced_weights(protocol: pd.DataFrame) -> np.ndarray:
    """Sampling weights (N,) that draw both labels equally often."""
    return _evenly(protocol["label"])


def source_weights(protocol: pd.DataFrame) -> np.ndarray:
    """Sampling weights (N,) that keep the recording chain of a source from telling the label.

    Where a source holds both labels, each of them gets half of its draws: nothing but the speech tells them apart.
    These sources get `SHARE_OF_MIXED_SOURCES` of all draws, in proportion to the square root of their size, so that
    large ones do not drown the others and small ones are not learned by heart. The rest goes to the sources of one
    label: half to bona fide, evenly by source, and half to spoof, evenly by attack.

    Args:
        protocol: with the columns label, attack and source.

    Returns:
        float64 (N,), adding up to 1.

    >>> frame = pd.DataFrame({"label": [1, 0, 0, 1, 0], "attack": list("-ab-c"), "source": list("xxxyz")})
    >>> source_weights(frame).round(3).tolist()
    [0.35, 0.175, 0.175, 0.15, 0.15]
    """
    source, label = protocol["source"].astype(str), protocol["label"]
    mixed = label.groupby(source).transform("nunique") == 2
    size = source.groupby(source).transform("size")
    group = source + "\0" + label.astype(str)
    in_mixed = np.sqrt(size) * _evenly(group)
    family = protocol["attack"].astype(str).where(label == SPOOF, source)
    alone = np.zeros(len(protocol))
    for value in (SPOOF, BONAFIDE):
        chosen = (~mixed & (label == value)).to_numpy()
        if chosen.any():
            alone[chosen] = _evenly(family[chosen])
    share = SHARE_OF_MIXED_SOURCES if mixed.any() and not mixed.all() else float(mixed.any())
    weights = np.zeros(len(protocol))
    for chosen, values, part in ((mixed, in_mixed, share), (~mixed, alone, 1 - share)):
        chosen, values = chosen.to_numpy(), np.asarray(values)
        if chosen.any():
            weights[chosen] = part * values[chosen] / values[chosen].sum()
    return weights


def _evenly(groups: pd.Series) -> np.ndarray:
    """Weights that give every group the same sum, adding up to 1."""
    return (1.0 / groups.groupby(groups).transform("size") / groups.nunique()).to_numpy()
