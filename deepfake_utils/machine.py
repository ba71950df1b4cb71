"""What this machine is: device, precision, memory. Every automatic choice comes with its reason in words."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from deepfake_utils.conventions import ConfigError

CGROUP_ROOT = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(frozen=True)
class Device:
    """A torch device that has run a convolution, and why it was chosen."""

    device: torch.device
    reason: str


@dataclass(frozen=True)
class Precision:
    """How training computes: `autocast_dtype` None means float32 throughout."""

    name: str
    autocast_dtype: torch.dtype | None
    needs_scaler: bool
    reason: str

    def autocast(self, device: torch.device):
        """The context in which the forward pass runs on `device`."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


FLOAT32 = Precision("fp32", None, False, "float32: always exact, and the only choice for scoring")
BFLOAT16 = Precision("bf16", torch.bfloat16, False, "bfloat16 forward, float32 weights")
FLOAT16 = Precision("fp16", torch.float16, True, "float16 forward with a loss scaler, float32 weights")


def pick_device(request: str = "auto") -> Device:
    """Choose the device to compute on and prove that it works.

    Args:
        request: "auto", "cpu", "cuda" or "cuda:N". "auto" takes a GPU that passes `preflight`, else the CPU.

    On a GPU, convolutions in float32 are made exact from here on: by default PyTorch rounds their inputs to
    10 bits (TF32), which moves logits in the third digit.

    Raises:
        ConfigError: a GPU was asked for by name and is absent or cannot run this PyTorch.
    """
    if request == "cpu":
        return Device(torch.device("cpu"), "CPU, as asked")
    if not re.fullmatch(r"auto|cuda(:\d+)?", request):
        raise ConfigError(f"device {request!r} is unknown: expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        if request != "auto":
            raise ConfigError(
                f"device {request!r} was asked for, but PyTorch {torch.__version__} sees no CUDA GPU here"
            )
        n = torch.get_num_threads()
        return Device(torch.device("cpu"), f"CPU with {n} thread{'s' * (n > 1)}: PyTorch sees no CUDA GPU")
    device = torch.device("cuda:0" if request in ("auto", "cuda") else request)
    if device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device {request!r} was asked for, but there are {torch.cuda.device_count()} GPUs, from cuda:0"
        )
    problem = preflight(device)
    if problem is None:
        torch.backends.cudnn.allow_tf32 = False
        properties = torch.cuda.get_device_properties(device)
        return Device(device, f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, preflight passed")
    if request != "auto":
        raise ConfigError(problem)
    return Device(torch.device("cpu"), f"CPU, because the GPU cannot be used: {problem}")


def preflight(device: torch.device) -> str | None:
    """Say what keeps a CUDA device from running this PyTorch build, or None if nothing does.

    `torch.cuda.is_available()` is True on a P100 whose architecture the wheel lacks, and the first kernel
    then fails; so the architecture list is read first and one tiny convolution is run.
    """
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    problem = unsupported_architecture(name, capability, torch.cuda.get_arch_list())
    if problem is not None:
        return problem
    try:
        sample = torch.ones(1, 1, 8, 8, device=device)
        result = nn.functional.conv2d(sample, torch.ones(1, 1, 3, 3, device=device))
        if result.sum().item() != 324.0:
            return f"{name}: a 3x3 convolution of ones gave {result.sum().item()} instead of 324"
    except RuntimeError as error:
        return f"{name}: a 3x3 convolution failed with {str(error).splitlines()[0]!r}"
    return None


def unsupported_architecture(name: str, capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Say why a GPU of this compute capability cannot run wheels built for `architectures`, or None.

    Machine code (sm_XY) runs on the same major version at the same or a later minor one; PTX (compute_XY)
    is compiled on any later device.

    >>> unsupported_architecture("T4", (7, 5), ["sm_75", "sm_80"]) is None
    True
    >>> "cu126" in unsupported_architecture("P100", (6, 0), ["sm_75", "sm_80", "compute_90"])
    True
    """
    major, minor = capability
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        if kind not in ("sm", "compute"):  # another maker's names, as on ROCm: the convolution will tell
            return None
        number = "".join(c for c in digits if c.isdigit())
        built_major, built_minor = int(number[:-1]), int(number[-1])
        if kind == "sm" and built_major == major and built_minor <= minor:
            return None
        if kind == "compute" and (built_major, built_minor) <= (major, minor):
            return None
    fix = (
        "install a PyTorch wheel for CUDA 12.6 (cu126; the last with sm_60 is torch 2.14)"
        if major < 7
        else "install a newer PyTorch"
    )
    return (
        f"{name} has compute capability {major}.{minor} and PyTorch {torch.__version__} carries only "
        f"{', '.join(architectures)}: {fix}, or choose another accelerator"
    )


def pick_precision(device: torch.device, request: str = "auto") -> Precision:
    """Choose the training precision that the device computes fast and safely.

    Args:
        device: a device from `pick_device`.
        request: "auto", "fp32", "bf16" or "fp16".

    Raises:
        ConfigError: unknown name, or fp16 on the CPU (which has no fast float16 convolution).
    """
    by_name = {precision.name: precision for precision in (FLOAT32, BFLOAT16, FLOAT16)}
    if request != "auto":
        if request not in by_name:
            raise ConfigError(f"precision {request!r} is unknown: expected auto, {', '.join(by_name)}")
        if request == "fp16" and device.type == "cpu":
            raise ConfigError("precision fp16 needs a GPU: use fp32 or bf16 on the CPU")
        return replace(by_name[request], reason=f"{request}, as asked")
    if device.type != "cuda":
        return replace(FLOAT32, reason="fp32: the CPU gains nothing reliable from half precision")
    return precision_for_capability(torch.cuda.get_device_capability(device))


def precision_for_capability(capability: tuple[int, int]) -> Precision:
    """The training precision for a CUDA compute capability.

    A T4 (7.5) reports bfloat16 as supported, but by emulation; so the capability decides, not the query.

    >>> [precision_for_capability(c).name for c in ((6, 0), (7, 5), (8, 0), (9, 0))]
    ['fp32', 'fp16', 'bf16', 'bf16']
    """
    major, minor = capability
    if major >= 8:
        return replace(BFLOAT16, reason=f"bf16: compute capability {major}.{minor} has it in hardware")
    if major == 7:
        reason = (
            f"fp16 with loss scaling: compute capability {major}.{minor} has fp16 tensor cores and only emulates bf16"
        )
        return replace(FLOAT16, reason=reason)
    return replace(FLOAT32, reason=f"fp32: compute capability {major}.{minor} has no tensor cores")


def seed_everything(seed: int) -> None:
    """Seed torch's global generators, which dropout uses; everything else takes a generator of its own."""
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Let this process keep large freed blocks, some hundred MB, where glibc would give each back to the system.

    Given back, every tensor of the next step is faulted in again page by page: a fifth of the processor time of a
    training step of AASIST, more where other programs press on memory. Nothing happens without glibc, or where the
    user has set MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_. `malloc_trim` still gives back what lies idle.
    """
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not chosen else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, 512 * 2**20)


def _read_bytes(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def memory_limit_bytes(cgroup_root: Path = CGROUP_ROOT) -> int:
    """Memory this process may use: the smaller of the machine's and its cgroup's (version 1 or 2)."""
    limits = [psutil.virtual_memory().total]
    for folder in _cgroup_folders(cgroup_root):
        limits += [_read_bytes(folder / "memory.max"), _read_bytes(folder / "memory.limit_in_bytes")]
    return min(limit for limit in limits if limit)


def free_device_bytes(device: torch.device | str) -> int:
    """Memory of a device that can still be taken; on a GPU also what PyTorch holds in reserve."""
    device = torch.device(device)
    if device.type != "cuda":
        return free_memory_bytes()
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def free_memory_bytes(cgroup_root: Path = CGROUP_ROOT) -> int:
    """Memory that can still be taken: the smaller of what the machine and what the cgroup has left.

    A cgroup counts file pages it could drop at once as used; those are given back here.
    """
    free = [psutil.virtual_memory().available]
    for folder in _cgroup_folders(cgroup_root):
        for limit_name, usage_name, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _read_bytes(folder / limit_name), _read_bytes(folder / usage_name)
            if limit is not None and usage is not None:
                free.append(limit - usage + _cgroup_statistic(folder, reclaimable))
    return max(0, min(free))


def _cgroup_folders(root: Path) -> list[Path]:
    """This process's cgroup and its ancestors, under both versions' mount points."""
    folders = [root, root / "memory"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root if controllers == "" else root / "memory"
        if controllers in ("", "memory"):
            own = base / path.lstrip("/")
            folders += [own, *(parent for parent in own.parents if root in parent.parents)]
    return list(dict.fromkeys(folders))


def _cgroup_statistic(folder: Path, name: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def describe_machine(device: torch.device) -> dict:
    """Hardware and versions, as every `result.json` records them."""
    machine = {
        "device": str(device),
        "cpu": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "memory_gib": round(memory_limit_bytes() / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "on_kaggle": "KAGGLE_KERNEL_RUN_TYPE" in os.environ,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        machine["gpu_count"] = torch.cuda.device_count()
    return machine


def in_words(seconds: float) -> str:
    """A duration a person reads at a glance.

    >>> in_words(4.21), in_words(75), in_words(51_000)
    ('4.2 s', '1 min 15 s', '14 h 10 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
