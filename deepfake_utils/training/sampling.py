"""How often each recording is drawn in training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from deepfake_utils.conventions import BONAFIDE, SPOOF
from deepfake_utils.waveforms.batches import balanced_weights

SHARE_OF_MIXED_SOURCES = 0.7  # of the draws, where there are sources of one label, too


def sampling_weights(protocol: pd.DataFrame, sampling: str) -> np.ndarray | None:
    """Weights (N,) of the rows, or None for each of them once: what the setting `sampling` names."""
    if sampling == "source":
        return source_weights(protocol)
    return balanced_weights(protocol["label"]) if sampling == "balanced" else None


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
    parts = [(mixed, source + label.astype(str), SHARE_OF_MIXED_SOURCES)]
    for value, family in ((BONAFIDE, source), (SPOOF, protocol["attack"].astype(str))):
        parts.append((~mixed & (label == value), family, (1 - SHARE_OF_MIXED_SOURCES) / 2))
    size = np.sqrt(source.groupby(source).transform("size")).where(mixed, 1.0)
    weights = np.zeros(len(protocol))
    for chosen, group, share in parts:
        chosen = chosen.to_numpy()
        if chosen.any():
            part = size[chosen] * balanced_weights(group[chosen])
            weights[chosen] = share * part / part.sum()
    return weights / weights.sum()
