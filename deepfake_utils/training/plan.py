"""What fits the time there is: a model, a crop length and a number of trials, by a few timed steps on noise."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ, TrainingError
from deepfake_utils.machine import Precision, in_words, pick_precision
from deepfake_utils.models import build_model
from deepfake_utils.scoring.score import SCORING_BATCH
from deepfake_utils.training.config import RECIPES, TrainingConfig
from deepfake_utils.training.memory import fork_rng, nothing_fits

CPU_PROBE = 2  # utterances: on a CPU the time is proportional to the batch, so a small one is enough
LONG_S = 1.0  # of steps: no further one is timed
PLANNED_SHARE = 0.85  # of the time budget: decoding, saving and drawing need the rest
SHORT_MODELS = ("aasist-l", "lfcc-lcnn")  # 85 k parameters; 170 k, but a step costs about a tenth on a CPU
SHORT_CROPS_S = (2.0, 1.0)
ENOUGH_EPOCHS = 10  # crops are shortened until there are so many: in a short run steps teach more than longer crops
FEWEST_EPOCHS = 3  # below this a run says nothing about its recipe
LONGEST_SHORT_RUN = 30  # epochs: more of the short recipe only memorises
FEWEST_TRIALS = 48


@dataclass(frozen=True)
class Cost:
    """Measured cost of a model on this device."""

    train_s: float  # per utterance
    score_s: float  # per utterance

    def epoch_s(self, n_train: int, n_dev: int) -> float:
        """Seconds of an epoch and its dev scoring."""
        return self.train_s * n_train + self.score_s * n_dev


def measure(
    model: nn.Module, config: TrainingConfig, batch_size: int, device: torch.device, precision: Precision
) -> Cost:
    """Time a few training and scoring steps on noise; the model and the random state are left untouched.

    Raises:
        TrainingError: the device's memory does not hold a step of two utterances.
    """
    probe = batch_size if device.type == "cuda" else min(CPU_PROBE, batch_size)
    while True:
        try:
            return _measure(model, config, probe, device, precision)
        except torch.OutOfMemoryError:
            if probe <= 2:
                raise TrainingError(nothing_fits(config, "out of memory")) from None
        probe = max(2, probe // 2)  # here, where the error no longer holds the step's tensors
        torch.cuda.empty_cache()


def _measure(model, config: TrainingConfig, probe: int, device: torch.device, precision: Precision) -> Cost:
    with fork_rng(device):
        twin = copy.deepcopy(model).to(device)
        generator = torch.Generator().manual_seed(0)
        crop = (0.1 * torch.randn(probe, config.crop_samples, generator=generator)).to(device)
        full = (0.1 * torch.randn(min(probe, SCORING_BATCH), config.eval_samples, generator=generator)).to(device)
        step_s = _time_training(twin, crop, device, precision)
        twin.eval()
        with torch.no_grad():
            score_s = _usual_time(lambda: twin(full), device)
    if config.sam_rho:
        step_s *= 2  # every step is taken twice
    return Cost(step_s / probe, score_s / len(full))


def _time_training(model: nn.Module, waveform: torch.Tensor, device: torch.device, precision: Precision) -> float:
    model.train()

    def step() -> None:
        with precision.autocast(device):
            output = model(waveform)
        output.logits.float().logsumexp(dim=1).sum().backward()
        model.zero_grad(set_to_none=True)

    return _usual_time(step, device)


def _usual_time(action: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The median: what a step takes on this machine as it is now, other programs included."""
    times = []
    while len(times) < 1 + repeats and sum(times) < LONG_S:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:] or times)  # the first allocates and tunes


@dataclass(frozen=True)
class Plan:
    """What will be run in the time there is, and why."""

    config: TrainingConfig
    n_train: int  # trials of each split to use
    n_dev: int
    n_eval: int
    why: list[str]


def plan_run(
    config: TrainingConfig,
    n_train: int,
    n_dev: int,
    n_eval: int,
    budget_s: float,
    device: torch.device,
    keep_model: bool = False,
) -> Plan:
    """Keep the recipe if it finishes in time on this machine, else say so and choose what does.

    What is given up, in this order: the large model and most epochs, the crop length, and, where even one
    pass would take too long, trials. The training that is planned stops in time to score eval.

    Args:
        config: the recipe wished for.
        n_train, n_dev, n_eval: utterances of the splits; eval is scored once, after training.
        budget_s: seconds for all of it, this planning included; 0 keeps the recipe whatever it takes.
        keep_model: a shorter run must be of this model, too.
    """
    if not budget_s:
        why = [f"No time budget: the recipe runs as it is, {config.epochs} epochs of {config.model}."]
        return Plan(config, n_train, n_dev, n_eval, why)
    started = time.monotonic()
    cost = _cost_of(config, device)
    epochs = LONGEST_SHORT_RUN if config.epochs == "auto" else config.epochs
    total_s = epochs * cost.epoch_s(n_train, n_dev) + n_eval * cost.score_s
    wish = f"{config.model}, {epochs} epochs, {config.crop_samples / SAMPLE_RATE_HZ:.1f} s crops"
    if total_s <= PLANNED_SHARE * budget_s:
        why = [f"The recipe ({wish}) takes about {in_words(total_s)} here and fits the {in_words(budget_s)} there are."]
        return Plan(_within(config, started, budget_s - n_eval * cost.score_s), n_train, n_dev, n_eval, why)
    why = [f"The recipe ({wish}) would take {in_words(total_s)} here; there are {in_words(budget_s)}."]
    return _short_plan(config, n_train, n_dev, n_eval, started, budget_s, device, keep_model, why)


def _within(config: TrainingConfig, started: float, budget_s: float) -> TrainingConfig:
    """With the time budget that is left of `budget_s`, which began to run at `started`."""
    return config.replace(time_budget_s=max(1.0, budget_s - (time.monotonic() - started)))


def _short_plan(config, n_train, n_dev, n_eval, started, budget_s, device, keep_model, why) -> Plan:
    for candidate in _short_candidates(config, keep_model):
        cost = _cost_of(candidate, device)
        score_full_s = cost.score_s * CROP_SAMPLES / candidate.eval_samples
        available_s = PLANNED_SHARE * budget_s - (time.monotonic() - started)
        epochs = math.floor((available_s - n_eval * score_full_s) / cost.epoch_s(n_train, n_dev))
        if epochs >= ENOUGH_EPOCHS:
            break
    if epochs < FEWEST_EPOCHS:
        epochs = FEWEST_EPOCHS
        n_train = min(n_train, _at_least(0.6 * available_s / (epochs * cost.train_s)))
        n_dev = min(n_dev, _at_least(0.15 * available_s / (epochs * cost.score_s)))
        n_eval = min(n_eval, _at_least(0.25 * available_s / score_full_s))
        why.append(
            f"Even {epochs} short epochs of all trials do not fit, so about {n_train} train, {n_dev} dev and {n_eval} "
            "eval trials are drawn, each attack in proportion. The error below is that of the drawn trials: do not "
            "compare it with published figures."
        )
    chosen = _within(candidate, started, budget_s - n_eval * score_full_s).replace(epochs="auto")
    why.append(
        f"Instead: {chosen.model}, {chosen.crop_samples / SAMPLE_RATE_HZ:g} s crops, batches of {chosen.batch_size}, "
        f"about {min(epochs, LONGEST_SHORT_RUN)} epochs of a one-cycle schedule up to {chosen.learning_rate:g}; how "
        "many is settled on the first real steps. Its error says what a short run reaches, not what the recipe would."
    )
    why.append(
        "All of this follows the speed of this machine today, so the same seed may give another error elsewhere. The "
        "same run anywhere needs the same trials and, by number, the model, the crop, the batch and the epochs that "
        "training prints."
    )
    return Plan(chosen, n_train, n_dev, n_eval, why)


def _short_candidates(config: TrainingConfig, keep_model: bool) -> list[TrainingConfig]:
    """Shorter runs, the dearest first: of the model wished for, or of smaller ones."""
    models = (config.model,) if keep_model else SHORT_MODELS
    kept = ("seed", "loss", "augmentation", "augmentation_options", "data_path", "precision")
    short = RECIPES["short"].replace(**{name: getattr(config, name) for name in kept})
    candidates = []
    for model in models:
        for crop_s in SHORT_CROPS_S:
            samples = int(crop_s * SAMPLE_RATE_HZ)
            candidates.append(short.replace(model=model, crop_samples=samples, eval_samples=samples))
    return candidates


def _cost_of(config: TrainingConfig, device: torch.device) -> Cost:
    generator = torch.Generator().manual_seed(0)
    model = build_model(config.model, generator=generator, **config.model_options)
    batch_size = TrainingConfig().batch_size if config.batch_size == "auto" else config.batch_size
    return measure(model, config, batch_size, device, pick_precision(device, config.precision))


def _at_least(n: float) -> int:
    return max(FEWEST_TRIALS, math.floor(n))
