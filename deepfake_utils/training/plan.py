"""What this machine can do with this model: seconds a step, bytes a step, and what fits the time and the memory."""

from __future__ import annotations

import copy
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ, TrainingError
from deepfake_utils.machine import Precision, free_device_bytes, in_words, pick_precision
from deepfake_utils.models import build_model
from deepfake_utils.scoring.score import SCORING_BATCH
from deepfake_utils.training.config import RECIPES, TrainingConfig

CPU_PROBE = 2  # utterances: on a CPU the time is proportional to the batch, so a small one is enough
LONG_STEP_S = 1.0  # a first step this long is the measurement: its warm-up no longer matters
MEMORY_SHARE = 0.8  # of what is free, for the automatic batch size
LARGEST_BATCH_RATIO = 8  # times the published 24: beyond it the learning-rate rule has not been shown to hold
PLANNED_SHARE = 0.85  # of the time budget: decoding, saving and drawing need the rest
SHORT_MODELS = ("aasist-l", "lfcc-lcnn")  # 85 k parameters; 170 k, but a step costs about a tenth on a CPU
SHORT_CROPS_S = (2.0, 1.0)
ENOUGH_EPOCHS = (
    10  # crops are shortened until there are so many: in a short run more steps teach more than longer crops
)
FEWEST_EPOCHS = 3  # below this a run says nothing about its recipe
LONGEST_SHORT_RUN = 30  # epochs: more of the short recipe only memorises
FEWEST_TRIALS = 48


@dataclass(frozen=True)
class Cost:
    """Measured cost of a model on this device."""

    train_s: float  # per utterance
    score_s: float  # per utterance
    step_bytes: int  # memory of one training step of the measured batch


@dataclass(frozen=True)
class Projection:
    """How long training will take at the measured speed."""

    epoch_s: float
    dev_s: float
    total_s: float

    def describe(self, epochs: int) -> str:
        """One line for the reader."""
        return (
            f"{in_words(self.total_s)} for {epochs} epochs: {in_words(self.epoch_s)} of training and "
            f"{in_words(self.dev_s)} of dev scoring each (measured on a few steps, waveforms not counted)"
        )


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
                raise TrainingError(_nothing_fits(config, "out of memory")) from None
        probe = max(2, probe // 2)  # here, where the error no longer holds the step's tensors
        torch.cuda.empty_cache()


def _measure(model, config: TrainingConfig, probe: int, device: torch.device, precision: Precision) -> Cost:
    with _fork_rng(device):
        twin = copy.deepcopy(model).to(device)
        generator = torch.Generator().manual_seed(0)
        crop = (0.1 * torch.randn(probe, config.crop_samples, generator=generator)).to(device)
        full = (0.1 * torch.randn(min(probe, SCORING_BATCH), config.eval_samples, generator=generator)).to(device)
        step_s, step_bytes = _time_training(twin, crop, device, precision)
        twin.eval()
        with torch.no_grad():
            score_s = _best_time(lambda: twin(full), device)
    if config.sam_rho:
        step_s *= 2  # every step is taken twice
    return Cost(step_s / probe, score_s / len(full), step_bytes)


def _fork_rng(device: torch.device):
    """Leave the random state of the CPU and of this device, and of no other, as it was."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _nothing_fits(config: TrainingConfig, why: str) -> str:
    return f"not even 2 utterances of {config.crop_samples} samples fit: {why}; choose shorter crops or a smaller model"


def _time_training(
    model: nn.Module, waveform: torch.Tensor, device: torch.device, precision: Precision
) -> tuple[float, int]:
    model.train()
    before = _reset_peak(device)

    def step() -> None:
        with precision.autocast(device):
            output = model(waveform)
        output.logits.float().logsumexp(dim=1).sum().backward()
        model.zero_grad(set_to_none=True)

    seconds = _best_time(step, device)
    return seconds, peak_memory_bytes(device) - before


def _best_time(action: Callable[[], object], device: torch.device, repeats: int = 2) -> float:
    started = time.perf_counter()
    action()  # allocations, autotuning
    _synchronize(device)
    first_s = time.perf_counter() - started
    if first_s > LONG_STEP_S:
        return first_s
    times = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        action()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def project(cost: Cost, n_train: int, n_dev: int, epochs: int) -> Projection:
    """Seconds of an epoch, of one dev scoring and of the whole run."""
    epoch_s, dev_s = cost.train_s * n_train, cost.score_s * n_dev
    return Projection(epoch_s, dev_s, epochs * (epoch_s + dev_s))


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
        budget_s: seconds for all of it; 0 keeps the recipe whatever it takes.
        keep_model: a shorter run must be of this model, too.
    """
    if not budget_s:
        why = [f"No time budget: the recipe runs as it is, {config.epochs} epochs of {config.model}."]
        return Plan(config, n_train, n_dev, n_eval, why)
    cost = _cost_of(config, device)
    total_s = project(cost, n_train, n_dev, config.epochs).total_s + n_eval * cost.score_s
    wish = f"{config.model}, {config.epochs} epochs, {config.crop_samples / SAMPLE_RATE_HZ:.1f} s crops"
    if total_s <= PLANNED_SHARE * budget_s:
        why = [f"The recipe ({wish}) takes about {in_words(total_s)} here and fits the {in_words(budget_s)} there are."]
        training_s = max(1.0, budget_s - n_eval * cost.score_s)
        return Plan(config.replace(time_budget_s=training_s), n_train, n_dev, n_eval, why)
    why = [f"The recipe ({wish}) would take {in_words(total_s)} here; there are {in_words(budget_s)}."]
    return _short_plan(config, n_train, n_dev, n_eval, budget_s, device, keep_model, why)


def _short_plan(config, n_train, n_dev, n_eval, budget_s, device, keep_model, why) -> Plan:
    available_s = PLANNED_SHARE * budget_s
    for candidate in _short_candidates(config, keep_model):
        cost = _cost_of(candidate, device)
        score_full_s = cost.score_s * CROP_SAMPLES / candidate.eval_samples
        epochs = math.floor((available_s - n_eval * score_full_s) / project(cost, n_train, n_dev, 1).total_s)
        if epochs >= ENOUGH_EPOCHS:
            break
    if epochs < FEWEST_EPOCHS:
        epochs = FEWEST_EPOCHS
        n_train = min(n_train, _at_least(0.6 * available_s / (epochs * cost.train_s)))
        n_dev = min(n_dev, _at_least(0.15 * available_s / (epochs * cost.score_s)))
        n_eval = min(n_eval, _at_least(0.25 * available_s / score_full_s))
        why.append(
            f"Even {epochs} short epochs of all trials do not fit, so {n_train} train, {n_dev} dev and {n_eval} eval "
            "trials are drawn, each attack in proportion. The error below is that of the drawn trials: do not compare "
            "it with published figures."
        )
    training_s = max(1.0, budget_s - n_eval * score_full_s)
    chosen = candidate.replace(epochs=min(epochs, LONGEST_SHORT_RUN), time_budget_s=training_s)
    why.append(
        f"Instead: {chosen.model}, {chosen.crop_samples / SAMPLE_RATE_HZ:g} s crops, batches of {chosen.batch_size}, "
        f"{chosen.epochs} epochs of a one-cycle schedule up to {chosen.learning_rate:g}. "
        "Its error says what a short run reaches, not what the recipe would."
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
    return measure(model, config, _recipe_batch(config), device, pick_precision(device, config.precision))


def _at_least(n: float) -> int:
    return max(FEWEST_TRIALS, math.floor(n))


def _recipe_batch(config: TrainingConfig) -> int:
    return config.batch_size if isinstance(config.batch_size, int) else TrainingConfig().batch_size


def settle_batch_size(
    model: nn.Module, config: TrainingConfig, device: torch.device, precision: Precision, say: Callable[[str], None]
) -> int:
    """The batch size to train with: the configured number, or for "auto" what fits, measured.

    "auto" runs a step with two small batches, reads the bytes each takes, and extrapolates to `MEMORY_SHARE` of
    the free memory.
    """
    recipe = TrainingConfig().batch_size
    if config.batch_size != "auto":
        return config.batch_size
    small, large = 2, 6
    step_bytes(model, config, small, device, precision)  # the first step also takes libraries' workspaces
    bytes_small, bytes_large = (step_bytes(model, config, n, device, precision) for n in (small, large))
    per_utterance = max(1, (bytes_large - bytes_small) // (large - small))
    fixed = max(0, bytes_small - small * per_utterance)
    free = free_device_bytes(device)
    fitting = int((MEMORY_SHARE * free - fixed) // per_utterance)
    if fitting < 2:
        raise TrainingError(
            _nothing_fits(
                config, f"a step needs {per_utterance / 2**20:.0f} MiB each and {free / 2**20:.0f} MiB are free"
            )
        )
    size = min(fitting, LARGEST_BATCH_RATIO * recipe)
    size = size // 8 * 8 if size >= 8 else size
    say(
        f"batch:     {size} utterances: {per_utterance / 2**20:.0f} MiB each, {free / 2**30:.1f} GiB free"
        f", {MEMORY_SHARE:.0%} of it used at most"
        f"{', capped at ' + str(LARGEST_BATCH_RATIO) + ' times the recipe' if size < fitting // 8 * 8 else ''}"
    )
    return size


def step_bytes(
    model: nn.Module, config: TrainingConfig, batch_size: int, device: torch.device, precision: Precision
) -> int:
    """Memory of one training step: read from the allocator on CUDA, the saved activations' size on the CPU."""
    with _fork_rng(device):
        twin = copy.deepcopy(model).to(device).train()
        waveform = torch.zeros(batch_size, config.crop_samples, device=device)
        if device.type == "cuda":
            before = _reset_peak(device)
            with precision.autocast(device):
                output = twin(waveform)
            output.logits.float().sum().backward()
            return torch.cuda.max_memory_allocated(device) - before
        return activation_bytes(lambda: twin(waveform).logits.sum())


def activation_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, each storage counted once."""
    storages: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # alive to the end, so that no address is used twice
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: the allocator's on CUDA, the process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_utilisation(device: torch.device) -> float:
    """Share of the last second in which the GPU ran kernels, by its driver; NaN where that cannot be asked."""
    if device.type != "cuda":
        return math.nan
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # no nvidia-ml-py, or a driver that does not tell: its errors are of its own class
        return math.nan


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return peak_memory_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
