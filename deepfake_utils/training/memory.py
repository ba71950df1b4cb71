"""What a training step takes of the device's memory, the batch that fits, and what to do when it overflows."""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable, Iterable

import torch
from torch import nn

from deepfake_utils.conventions import TrainingError
from deepfake_utils.machine import Precision, free_device_bytes
from deepfake_utils.training.config import TrainingConfig
from deepfake_utils.training.run import Run

MEMORY_SHARE = 0.8  # of what is free, for the automatic batch size
LARGEST_BATCH_RATIO = 8  # times the published 24: beyond it the learning-rate rule has not been shown to hold


def automatic_batch_size(
    model: nn.Module,
    config: TrainingConfig,
    device: torch.device,
    precision: Precision,
    say: Callable[[str], None],
    sharing: int = 1,
) -> int:
    """Utterances whose training step fits `MEMORY_SHARE` of the memory that is free now, at the most.

    A step is measured with two small batches, and the bytes extrapolated.

    Args:
        sharing: processes that will take as much of the same memory.

    Raises:
        TrainingError: not even two utterances fit.
    """
    small, large = 2, 6
    step_bytes(model, config, small, device, precision)  # the first step also takes libraries' workspaces
    bytes_small, bytes_large = (step_bytes(model, config, n, device, precision) for n in (small, large))
    per_utterance = max(1, (bytes_large - bytes_small) // (large - small))
    fixed = max(0, bytes_small - small * per_utterance)
    free = free_device_bytes(device) // sharing
    fitting = int((MEMORY_SHARE * free - fixed) // per_utterance)
    if fitting < 2:
        why = f"a step needs {per_utterance / 2**20:.0f} MiB each and {free / 2**20:.0f} MiB are free"
        raise TrainingError(nothing_fits(config, why))
    largest = LARGEST_BATCH_RATIO * TrainingConfig().batch_size
    size = min(fitting, largest)
    size = size // 8 * 8 if size >= 8 else size
    capped = f", capped at {LARGEST_BATCH_RATIO} times the recipe" if fitting > largest else ""
    say(
        f"batch:     {size} utterances: {per_utterance / 2**20:.0f} MiB each, {free / 2**30:.1f} GiB free, "
        f"{MEMORY_SHARE:.0%} of it used at most{capped}"
    )
    return size


def nothing_fits(config: TrainingConfig, why: str) -> str:
    """The text of the error when two utterances are too many."""
    return f"not even 2 utterances of {config.crop_samples} samples fit: {why}; choose shorter crops or a smaller model"


def step_bytes(
    model: nn.Module, config: TrainingConfig, batch_size: int, device: torch.device, precision: Precision
) -> int:
    """Memory of one training step: read from the allocator on CUDA, the saved activations' size on the CPU."""
    with fork_rng(device):
        twin = copy.deepcopy(model).to(device).train()
        waveform = torch.zeros(batch_size, config.crop_samples, device=device)
        if device.type != "cuda":
            return activation_bytes(lambda: twin(waveform).logits.sum())
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with precision.autocast(device):
            output = twin(waveform)
        output.logits.float().sum().backward()
        return torch.cuda.max_memory_allocated(device) - before


def activation_bytes(forward: Callable[[], torch.Tensor], besides: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, each storage counted once.

    Args:
        besides: what is there anyway and is not counted, such as the model's parameters.
    """
    storages: dict[int, int] = {}
    there = {tensor.untyped_storage().data_ptr() for tensor in besides}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
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


def fork_rng(device: torch.device):
    """A context that leaves the random state of the CPU and of this device, and of no other, as it was."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def in_micro_batches(compute: Callable[[], torch.Tensor], run: Run, n_utterances: int) -> torch.Tensor:
    """compute(); where the memory overflows, again with half as many utterances at a time.

    Raises:
        TrainingError: two micro-batches of two utterances would still be too much.
        torch.OutOfMemoryError: under torchrun, where one process alone cannot take its step again.
    """
    while True:
        try:
            return compute()
        except torch.OutOfMemoryError:
            if run.world.size > 1:
                raise
        _halve(run, n_utterances)  # here, where the error no longer holds the step's tensors


def _halve(run: Run, n_utterances: int) -> None:
    state = run.state
    run.optimizer.zero_grad(set_to_none=True)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    if state.micro_batches * 2 > n_utterances // 2:
        raise TrainingError(
            f"out of memory even with {n_utterances // state.micro_batches} utterances at a time: "
            "choose a smaller model, shorter crops (crop_samples) or another device"
        )
    state.micro_batches *= 2
    run.say(
        f"out of memory: going on with {state.micro_batches} micro-batches of about "
        f"{n_utterances // state.micro_batches} utterances; the step still sees all {n_utterances} "
        "(batch norm sees one micro-batch at a time)"
    )
