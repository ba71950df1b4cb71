"""Before the first step: protocols checked, weights, waveforms and sizes settled, each choice said with its reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from deepfake_utils.augment import build_augmentation
from deepfake_utils.conventions import BONAFIDE, SPOOF, ConfigError, TrainingError
from deepfake_utils.machine import pick_device, pick_precision, seed_everything
from deepfake_utils.models import MODELS, build_model
from deepfake_utils.models.fusion import ScoreFusion
from deepfake_utils.models.losses import build_loss
from deepfake_utils.models.prune import WIDTHS, narrowed
from deepfake_utils.models.sinc import SincFilters
from deepfake_utils.models.spectrogram import SpectrogramResNet
from deepfake_utils.scoring.weights import ScoredByLoss, embedding_dim, load_model
from deepfake_utils.training.config import TrainingConfig
from deepfake_utils.training.memory import LARGEST_BATCH_RATIO, automatic_batch_size
from deepfake_utils.training.parallel import World
from deepfake_utils.training.plan import LONGEST_SHORT_RUN
from deepfake_utils.training.resume import CHECKPOINT, restore, settled_config
from deepfake_utils.training.run import Pace, Run, State
from deepfake_utils.training.schedule import SharpnessAware, build_average, build_optimizer
from deepfake_utils.training.teachers import load_teachers
from deepfake_utils.waveforms import open_source


def check_protocols(train: pd.DataFrame, dev: pd.DataFrame, config: TrainingConfig) -> None:
    """Refuse protocols that training cannot use, or must not.

    Raises:
        TrainingError: an empty protocol, a missing class or column, eval trials, or a recording in both splits.
    """
    for name, protocol in (("train", train), ("dev", dev)):
        if not len(protocol):
            raise TrainingError(f"the {name} protocol is empty")
        if (protocol["split"] == "eval").any():
            raise TrainingError(
                f"the {name} protocol contains trials of the eval split"
                ": training and selection may only see train and dev"
            )
        for label, meaning in ((BONAFIDE, "bona fide"), (SPOOF, "spoof")):
            if not (protocol["label"] == label).any():
                raise TrainingError(f"the {name} protocol has no {meaning} utterance: both classes are needed")
    shared = set(train["path"]) & set(dev["path"])
    if shared:
        raise TrainingError(
            f"{len(shared)} recordings are in train and in dev, first {min(shared)}"
            ": selection on them would be meaningless"
        )
    for name, protocol, needed in (
        ("train", train, "sampling='source'" if config.sampling == "source" else ""),
        ("dev", dev, "selection='macro'" if config.selection == "macro" else ""),
    ):
        if needed and "source" not in protocol:
            raise TrainingError(f"{needed} needs a column 'source', and the {name} protocol has none")


def open_run(
    train: pd.DataFrame, dev: pd.DataFrame, folder: Path, config: TrainingConfig, *,
    model: nn.Module | None, device: str, saved: dict | None, fingerprints: dict[str, str], waveforms_dir: Path,
    world: World, started: float, say: Callable[[str], None],
) -> Run:  # fmt: skip
    """Build a run, or put it where its checkpoint `saved` left it; `fit` says what the other arguments are."""
    chosen = pick_device(world.device_name(device))
    device, precision = chosen.device, pick_precision(chosen.device, config.precision)
    say(f"device:    {chosen.reason}")
    say(f"precision: {precision.reason}")
    augment = build_augmentation(config.augmentation, **config.augmentation_options)
    fine_tuned = model is not None or config.start != ""
    seed_everything(config.seed)
    model, criterion = _weights_to_start_from(model, config, say)
    model.to(device).train(), criterion.to(device)
    if config.band_mask:
        sinc_bands(model)  # told now where there are none
    teachers = load_teachers(config, device, say)
    # Waveforms before the batch: what they take of the device's memory is not there for it.
    source, dev_source = (
        open_source(protocol, kind=config.data_path, folder=waveforms_dir, device=device, say=say)
        for protocol in (train, dev)
    )
    say(f"waveforms: {source.describe()}")
    settled = (
        settled_config(saved, config) if saved else _settle(model, config, len(train), device, precision, world, say)
    )
    optimizer = build_optimizer(model, criterion, settled)
    seed_everything(config.seed + world.rank)
    run = Run(
        wish=config, config=settled, train=train, dev=dev, fingerprints=fingerprints, folder=folder, say=say,
        world=world, device=device, precision=precision, source=source, dev_source=dev_source, augment=augment,
        model=model, parallel=model, criterion=criterion, teachers=teachers, optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision.needs_scaler),
        average=build_average(model, settled),
        sam=SharpnessAware(optimizer, model, settled.sam_rho) if settled.sam_rho else None,
        state=State(fine_tuned=fine_tuned), pace=Pace(started),
    )  # fmt: skip
    if saved is not None:
        restore(run, saved)
        say(f"resuming:  epoch {run.state.epoch + 1}, step {run.state.step}, from {folder / CHECKPOINT}")
    run.parallel = world.wrap(model, device)  # last: what one process does alone must not wait for others
    return run


def _weights_to_start_from(
    given: nn.Module | None, config: TrainingConfig, say: Callable[[str], None]
) -> tuple[nn.Module, nn.Module]:
    """The model and the loss with its own directions: fresh, or copies of those given to go on with."""
    generator = torch.Generator().manual_seed(config.seed)
    learned = None
    if config.start:
        if given is not None:
            raise ConfigError("model= and the setting start both name weights to begin with: give one of them")
        given = _named_start(config, say)
    if given is None:
        model = build_model(config.model, generator=generator, **config.model_options)
    else:
        learned = given.criterion if isinstance(given, ScoredByLoss) else None
        model = copy.deepcopy(given if learned is None else given.model)
        _refuse_another_architecture(model, config)
    options = {"class_weights": config.class_weights} if config.loss == "cross_entropy" else {"generator": generator}
    criterion = build_loss(config.loss, embedding_dim(model), **options)
    if type(learned) is type(criterion):
        criterion.load_state_dict(learned.state_dict())
    elif learned is not None:
        say(f"weights:   those of the model go on; what {type(learned).__name__} had learned does not: {config.loss}")
    return model, criterion


def _named_start(config: TrainingConfig, say: Callable[[str], None]) -> nn.Module:
    """The weights that `config.start` names; of a score fusion the member asked for, of a spectrogram network that is
    wider than asked for its most important channels.

    Raises:
        CheckpointError: they are not there, or damaged.
        ConfigError: `model_options` ask for more channels than they have.
    """
    model = load_model(weights=config.start)
    say(f"start:     {config.start}")
    if not isinstance(model, ScoreFusion | SpectrogramResNet):
        return model
    wanted = build_model(config.model, generator=torch.Generator(), **config.model_options)
    if isinstance(model, ScoreFusion) and not isinstance(wanted, ScoreFusion):
        model = next((member for member in model.members if type(member) is type(wanted)), model)
    if isinstance(model, SpectrogramResNet) and isinstance(wanted, SpectrogramResNet):
        widths = {name: getattr(wanted.config, name) for name in (*WIDTHS, "dropout")}
        if any(getattr(model.config, name) != width for name, width in widths.items()):
            n_before, model = sum(p.numel() for p in model.parameters()), narrowed(model, **widths)
            say(f"           narrowed from {n_before:,} to {sum(p.numel() for p in model.parameters()):,} parameters")
    return model


def _refuse_another_architecture(model: nn.Module, config: TrainingConfig) -> None:
    """What is kept is rebuilt from the name and the options in `config`: they must be this model's."""
    expected = build_model(config.model, generator=torch.Generator(), **config.model_options)
    given = getattr(model, "config", "no configuration")  # a name, or somebody's own module
    if type(model) is not type(expected) or given != expected.config:
        names = [name for name, (_, own) in MODELS.items() if given == own]
        fix = f"config.replace(model={names[0]!r}, model_options={{}})" if names else "its own name and model_options"
        raise ConfigError(
            f"model= is {type(model).__name__} with {given}, and config.model is {config.model!r}, "
            f"{type(expected).__name__} with {expected.config}: use {fix}"
        )


def sinc_bands(model: nn.Module) -> int:
    """How many sinc filters can be masked."""
    bank = next((module for module in model.modules() if isinstance(module, SincFilters)), None)
    if bank is None:
        raise TrainingError(f"band_mask=True masks sinc filters, and {type(model).__name__} has none: switch it off")
    return bank.n_filters


def _settle(model, config: TrainingConfig, n_train: int, device, precision, world: World, say) -> TrainingConfig:
    """The configuration with numbers in place of "auto"; of the epochs a first guess, which `loop` replaces."""
    rates = {}
    if config.batch_size == "auto":
        sharing = world.local_size if device.type == "cpu" else 1
        own = automatic_batch_size(model, config, device, precision, say, sharing)
        size = min(world.size * world.smallest(own), LARGEST_BATCH_RATIO * TrainingConfig().batch_size, n_train)
        scale = math.sqrt(size / TrainingConfig().batch_size)  # Adam's rule: Malladi et al. 2022, arXiv 2205.10287
        highest = config.learning_rate * scale
        rates = {"learning_rate": highest, "learning_rate_min": min(config.learning_rate_min, highest)}
        say(f"rate:      times {scale:.2f}, the square root of {size}/{TrainingConfig().batch_size} utterances")
    else:
        size = min(config.batch_size, n_train)
    if size < world.size:
        raise TrainingError(
            f"a batch of {size} utterances cannot be divided among {world.size} processes: raise batch_size, or start "
            "fewer of them"
        )
    epochs = LONGEST_SHORT_RUN if config.epochs == "auto" else config.epochs
    return config.replace(batch_size=size, epochs=epochs, **rates)
