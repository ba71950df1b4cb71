"""What becomes of the error when the same recordings come by another way: codecs, noise, rooms, speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from deepfake_utils.augment import EFFECTS
from deepfake_utils.augment import effects as fx
from deepfake_utils.augment.codecs import CodecParams, apply_codec
from deepfake_utils.augment.common import limit_peak
from deepfake_utils.conventions import BONAFIDE, CROP_SAMPLES
from deepfake_utils.evaluation.metrics import compute_eer
from deepfake_utils.scoring.score import SCORING_BATCH, evaluating, forward
from deepfake_utils.waveforms.batches import eval_batches

Condition = Callable[[Tensor, torch.Generator], Tensor]


def _codec(name: str, kilobits_per_s: float) -> Condition:
    return lambda waveform, _: apply_codec(waveform, CodecParams(name, torch.full((len(waveform),), kilobits_per_s)))


def _effect(name: str, **settings) -> Condition:
    return lambda waveform, generator: EFFECTS[name](waveform, generator, **settings)


def _telephone(waveform: Tensor, _: torch.Generator) -> Tensor:
    """8 kHz and G.711's mu-law."""
    narrow = fx.apply_lowpass(waveform, torch.full((len(waveform),), 3400.0))
    return fx.apply_companding(limit_peak(narrow), torch.full((len(waveform),), 8))


CONDITIONS: dict[str, Condition] = {
    "as it is": lambda waveform, _: waveform,
    "MP3 64 kb/s": _codec("mp3", 64),
    "MP3 32 kb/s": _codec("mp3", 32),
    "Opus 24 kb/s": _codec("opus", 24),
    "Opus 12 kb/s": _codec("opus", 12),
    "telephone": _telephone,
    "AMR 12.2 kb/s": _codec("amr", 12.2),
    "noise 20 dB": _effect("noise", snr_db=(20.0, 20.0)),
    "noise 10 dB": _effect("noise", snr_db=(10.0, 10.0)),
    "noise 5 dB": _effect("noise", snr_db=(5.0, 5.0)),
    "reverberation": _effect("reverb", rt60_s=(0.4, 0.8), direct_to_reverberant_db=(0.0, 6.0)),
    "speed 90 %": _effect("speed", speed=(0.9, 0.9)),
    "speed 110 %": _effect("speed", speed=(1.1, 1.1)),
}


def condition_scores(
    model: nn.Module,
    source,
    conditions: Mapping[str, Condition] = CONDITIONS,
    *,
    n_samples: int = CROP_SAMPLES,
    device: str = "auto",
    seed: int = 0,
) -> pd.DataFrame:
    """Score the same clips under every condition.

    Args:
        model: a countermeasure.
        source: waveforms from `open_source`, one a trial.
        conditions: name -> function of a batch (B, T) and a generator; those that need PyAV are among CONDITIONS.
        n_samples: of a clip that are scored, at 16 kHz; shorter ones repeat.
        seed: of the noise and the rooms, which are the same for every model.

    Returns:
        One row a clip and one column a condition: the logit of bona fide.
    """
    scores = {name: [] for name in conditions}
    with evaluating(model, device) as torch_device:
        batches = eval_batches(source, batch_size=SCORING_BATCH, n_samples=n_samples, device="cpu")
        for number, batch in enumerate(tqdm(batches, desc="conditions", unit="batch", leave=False)):
            for name, condition in conditions.items():
                generator = torch.Generator().manual_seed((seed << 32) + number)
                waveform = condition(batch.waveform, generator)
                scores[name].append(forward(model, waveform, torch_device).logits[:, BONAFIDE].double().cpu().numpy())
    return pd.DataFrame({name: np.concatenate(parts) for name, parts in scores.items()})


def robustness(scores: pd.DataFrame, labels: np.ndarray) -> pd.DataFrame:
    """EER under each condition, and what the threshold that was right for the first one lets happen.

    Args:
        scores: from `condition_scores`.
        labels: (N,) 1 bona fide, 0 spoof.

    Returns:
        condition, eer, real_rejected, fake_accepted (fractions): the last two at the EER threshold of the first column.
    """
    threshold = compute_eer(scores.iloc[:, 0].to_numpy(), labels).threshold
    rows = []
    for name in scores:
        column = scores[name].to_numpy()
        rejected, accepted = (column[labels == 1] < threshold).mean(), (column[labels == 0] >= threshold).mean()
        rows.append((name, compute_eer(column, labels).eer, rejected, accepted))
    return pd.DataFrame(rows, columns=["condition", "eer", "real_rejected", "fake_accepted"])
