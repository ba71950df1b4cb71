"""Data-parallel training under torchrun: one process per GPU (or per core, over gloo), rank 0 speaks and writes."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

LONGEST_WAIT = timedelta(hours=6)  # the other processes wait while the first one scores dev


class World:
    """The processes of this run; a single process where torchrun did not start it.

    Used as a context manager: the process group lives as long as the block.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._owns_group = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shard(self) -> tuple[int, int]:
        return self.rank, self.size

    def __enter__(self) -> World:
        if self.size > 1 and not dist.is_initialized():
            if self.local_rank < torch.cuda.device_count():
                torch.cuda.set_device(self.local_rank)  # NCCL takes the current device
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=LONGEST_WAIT)
            self._owns_group = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._owns_group:
            dist.destroy_process_group()

    def device_name(self, request: str) -> str:
        """Each process its own GPU."""
        if self.size > 1 and request in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return request

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model to train with: gradients averaged, and batch norm over all processes where CUDA allows it."""
        if self.size == 1:
            return model
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Some published parameters never receive a gradient (AASIST's and RawNet2's unused norms).
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=True
        )

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a scalar over all processes."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def average_gradients(self, module: nn.Module) -> None:
        """The mean of every gradient over all processes, for a module outside of `wrap`."""
        for parameter in module.parameters() if self.size > 1 else ():
            parameter.grad = self.sum(parameter.grad) / self.size

    def broadcast(self, value: float) -> float:
        """Rank 0's value, everywhere."""
        if self.size == 1:
            return value
        box = torch.tensor(float(value), dtype=torch.float64)  # on the CPU: no GPU waits for it
        dist.broadcast(box, src=0)
        return box.item()

    def smallest(self, value: int) -> int:
        """The smallest of all processes' values."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MIN)
        return int(box)
