"""Augmentation by name: the effects as one table, and recipes that combine them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deepfake_utils.augment import channel
from deepfake_utils.augment import effects as fx
from deepfake_utils.augment.codecs import CODECS, apply_codec, draw_codec
from deepfake_utils.augment.common import check_bounds, limit_peak
from deepfake_utils.augment.rawboost import ALGORITHMS, apply_rawboost, draw_rawboost
from deepfake_utils.augment.recordings import read_recordings
from deepfake_utils.conventions import ConfigError

Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Effect(NamedTuple):
    """One effect's two halves; called, it draws (by default settings), applies, and limits the peak to 1."""

    draw: Callable
    apply: Callable

    def __call__(self, waveform: Tensor, generator: torch.Generator, **settings) -> Tensor:
        return limit_peak(self.apply(waveform, self.draw(waveform.shape, generator, **settings)))


EFFECTS: dict[str, Effect] = {
    "noise": Effect(fx.draw_noise, fx.apply_noise),
    "shift": Effect(fx.draw_shift, fx.apply_shift),
    "speed": Effect(fx.draw_speed, fx.apply_speed),
    "gain": Effect(fx.draw_gain, fx.apply_gain),
    "reverb": Effect(fx.draw_reverb, fx.apply_reverb),
    "lowpass": Effect(fx.draw_lowpass, fx.apply_lowpass),
    "companding": Effect(fx.draw_bits, fx.apply_companding),
    "quantisation": Effect(fx.draw_bits, fx.apply_quantisation),
    "silence": Effect(fx.draw_silence, fx.apply_silence),
    "trim": Effect(partial(fx.draw_silence, keep=(0.0, 0.0)), fx.apply_silence),
    "equaliser": Effect(channel.draw_equaliser, channel.apply_equaliser),
    "clipping": Effect(channel.draw_clipping, channel.apply_clipping),
    "bandstop": Effect(channel.draw_bandstop, channel.apply_bandstop),
    "gap": Effect(channel.draw_gap, channel.apply_gap),
    **{codec: Effect(partial(draw_codec, codec=codec), apply_codec) for codec in CODECS},
    **{f"rawboost-{a}": Effect(partial(draw_rawboost, algorithm=a), apply_rawboost) for a in ALGORITHMS},
}

# Effects in their order, each with the settings of its draw and the share of utterances it meets.
# `wild` follows a recording's way: room, noise and level, then the channel. `open` goes the same way with more of it,
# for speech from anywhere: what tells one source's recording chain from another's must not tell the label. Codecs cost
# as much as a training step and are drawn rarely.
RECIPES: dict[str, dict[str, dict]] = {
    "none": {},
    "seed": {
        "noise": {"probability": 0.5, "snr_db": (10.0, 40.0), "slope_db_per_octave": (0.0, 0.0)},
        "shift": {},
        "speed": {"probability": 0.5},
        "mixup": {"probability": 0.5, "alpha": 0.2},
    },
    "rawboost-la": {"rawboost-5": {}},
    "rawboost-df": {"rawboost-3": {}},
    "wild": {
        "silence": {"probability": 0.5},
        "reverb": {"probability": 0.3},
        "noise": {"probability": 0.5},
        "gain": {"probability": 0.5},
        "lowpass": {"probability": 0.4},
        "companding": {"probability": 0.2, "bits": (7, 8)},
        "quantisation": {"probability": 0.2, "bits": (8, 14)},
    },
    "open": {
        "silence": {"probability": 0.3},
        "equaliser": {"probability": 0.6},
        "reverb": {"probability": 0.25},
        "noise": {"probability": 0.5, "snr_db": (5.0, 40.0)},
        "rawboost-5": {"probability": 0.1},
        "clipping": {"probability": 0.1},
        "lowpass": {"probability": 0.5, "cutoff_hz": (2800.0, 7900.0)},
        "companding": {"probability": 0.1, "bits": (7, 8)},
        "mp3": {"probability": 0.03},
        "opus": {"probability": 0.02},
        "aac": {"probability": 0.02},
        "amr": {"probability": 0.03},
        "quantisation": {"probability": 0.1, "bits": (8, 14)},
        "gain": {"probability": 0.5, "gain_db": (-20.0, 6.0)},
        "bandstop": {"probability": 0.4},
        "gap": {"probability": 0.3},
    },
}


def build_augmentation(recipe: str, **overrides: Mapping | None) -> Augmentation:
    """Make one of RECIPES into a function of a batch.

    Args:
        recipe: its name.
        **overrides: for an effect, the settings that replace the recipe's, or None to leave the effect out.
            An effect that the recipe lacks is added at the end (mixup is always last). `probability` is the
            share of utterances an effect meets; `recordings` of noise and `impulse_responses` of reverb may be
            a folder.

    Returns:
        (waveform (B, T), target (B,), generator) -> (waveform, target): new tensors, or the same ones where
        nothing is to be done. Peaks are held within [-1, 1] by scaling. Draws are on the generator's device,
        which may be the CPU for a batch on a GPU.

    Raises:
        ConfigError: unknown recipe, effect or setting, or a value out of range.

    >>> augment = build_augmentation("rawboost-la", noise={"snr_db": (0.0, 10.0), "probability": 0.5})
    >>> generator = torch.Generator().manual_seed(0)
    >>> waveform, target = augment(torch.rand(2, 800) - 0.5, torch.tensor([1.0, 0.0]), generator)
    >>> waveform.shape, target.tolist()
    (torch.Size([2, 800]), [1.0, 0.0])
    """
    if recipe not in RECIPES:
        raise ConfigError(f"augmentation recipe {recipe!r} is unknown: expected one of {', '.join(RECIPES)}")
    steps = {name: dict(settings) for name, settings in RECIPES[recipe].items()}
    for name, settings in overrides.items():
        settings = settings and {key: _read_folder(key, value) for key, value in settings.items()}
        _check_effect(name, settings or {})
        if settings is None:
            steps.pop(name, None)
        else:
            steps[name] = steps.get(name, {}) | dict(settings)
    mixup = steps.pop("mixup", None)
    return partial(_augment, steps=steps, mixup=mixup)


def _read_folder(setting: str, value):
    """Recordings given as a folder, as a training configuration has them, in place of its name."""
    is_folder = setting in ("recordings", "impulse_responses") and isinstance(value, (str, os.PathLike))
    return read_recordings(value, torch.Generator().manual_seed(0)) if is_folder else value


def _check_effect(name: str, settings: Mapping) -> None:
    """Refuse unknown names now, and values out of range (by one draw), not in mid-epoch."""
    draws = {effect: entry.draw for effect, entry in EFFECTS.items()} | {"mixup": fx.draw_mixup}
    if name not in draws:
        raise ConfigError(f"augmentation effect {name!r} is unknown: expected one of {', '.join(draws)}")
    parameters = inspect.signature(draws[name]).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = ", ".join(sorted(set(settings) - known - {"probability"}))
    if unknown:
        expected = ", ".join(sorted(known | {"probability"}))
        raise ConfigError(f"augmentation effect {name!r} has no setting {unknown}: expected one of {expected}")
    check_bounds((settings.get("probability", 1.0), 1.0), f"probability of {name}", 0.0, 1.0)
    drawn = {key: value for key, value in settings.items() if key != "probability"}
    draws[name]((1, 1), torch.Generator().manual_seed(0), **drawn)


def _augment(
    waveform: Tensor,
    target: Tensor,
    generator: torch.Generator,
    *,
    steps: dict[str, dict],
    mixup: dict | None,
) -> tuple[Tensor, Tensor]:
    for name, settings in steps.items():
        settings = dict(settings)
        probability = settings.pop("probability", 1.0)
        waveform = _apply_to_share(waveform, generator, probability, partial(EFFECTS[name], **settings))
    if mixup is not None:
        waveform, target = fx.apply_mixup(waveform, target, fx.draw_mixup(waveform.shape, generator, **mixup))
    return waveform, target


def _apply_to_share(waveform: Tensor, generator: torch.Generator, probability: float, effect: Callable) -> Tensor:
    """Apply an effect to randomly chosen utterances; the others cost nothing."""
    if probability >= 1:
        return effect(waveform, generator)
    chosen = torch.rand(len(waveform), generator=generator, device=generator.device) < probability
    rows = chosen.nonzero().squeeze(1).to(waveform.device)
    return waveform.index_copy(0, rows, effect(waveform[rows], generator)) if len(rows) else waveform
