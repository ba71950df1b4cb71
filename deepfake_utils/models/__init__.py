"""The countermeasures by name: a dictionary and a lookup."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models import aasist, rawnet2
from deepfake_utils.models.aasist import AASIST, AASISTConfig
from deepfake_utils.models.aasist_transformer import AASISTTransformer, AASISTTransformerConfig
from deepfake_utils.models.fusion import FusionConfig, ScoreFusion
from deepfake_utils.models.lcnn import LCNN, LCNNConfig
from deepfake_utils.models.rawnet2 import RawNet2, RawNet2Config
from deepfake_utils.models.resnet import ResNet18, ResNetConfig
from deepfake_utils.models.spectrogram import SpectrogramConfig, SpectrogramResNet


def _fused(config: FusionConfig) -> ScoreFusion:
    return ScoreFusion(config, [build_model(name, **settings) for name, settings in config.members])


# name -> (what builds it, its configuration). A variant is another configuration, not another class.
MODELS: dict[str, tuple[Callable[[object], nn.Module], object]] = {
    "aasist": (AASIST, AASISTConfig()),
    "aasist-l": (
        AASIST,
        AASISTConfig(
            channels=(32, 32, 24, 24, 24, 24),
            graph_dim=24,
            spectral_keep=0.4,
            temporal_keep=0.5,
            branch_keep=0.7,
        ),
    ),
    "aasist-xl": (AASIST, AASISTConfig(channels=(64, 64, 128, 128, 128, 128), graph_dim=128, branch_dim=64)),
    "aasist-transformer": (AASISTTransformer, AASISTTransformerConfig()),
    "rawnet2": (RawNet2, RawNet2Config()),
    "rawnet2-learnable": (RawNet2, RawNet2Config(sinc_learnable=True)),
    "lfcc-lcnn": (LCNN, LCNNConfig()),
    "lfcc-lcnn-lstm": (LCNN, LCNNConfig(pooling="lstm-sum")),
    "lfcc-resnet18": (ResNet18, ResNetConfig()),
    "spectrogram-resnet": (SpectrogramResNet, SpectrogramConfig()),
    "score-fusion": (_fused, FusionConfig()),
}


# name -> how the tensors of the published weights file are called here
PUBLISHED_NAMES = {
    "aasist": aasist.published_state_dict,
    "aasist-l": aasist.published_state_dict,
    "rawnet2": rawnet2.published_state_dict,
}


def build_model(name: str, *, generator: torch.Generator | None = None, **overrides) -> nn.Module:
    """Build a countermeasure with fresh weights.

    Args:
        name: one of `MODELS`.
        generator: source of the initial weights, on the CPU; the same state gives the same weights and the
            global random state is left alone. None draws from torch's global generator.
        **overrides: fields of the model's configuration to change, such as `sinc_learnable=True`.

    Returns:
        The model in training mode, on the CPU, with its configuration as `.config`.

    Raises:
        ConfigError: unknown name or field, or a configuration the model refuses.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    build, config = MODELS[name]
    known = [field.name for field in dataclasses.fields(config)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ConfigError(f"{name} has no setting {', '.join(unknown)}: its settings are {', '.join(known)}")
    config = dataclasses.replace(config, **_with_tuples(overrides))
    if generator is None:
        return build(config)
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also reseed every GPU
        return build(config)


def _with_tuples(settings):
    """JSON knows lists only; configurations hold tuples."""
    if isinstance(settings, dict):
        return {key: _with_tuples(value) for key, value in settings.items()}
    return tuple(map(_with_tuples, settings)) if isinstance(settings, list | tuple) else settings
