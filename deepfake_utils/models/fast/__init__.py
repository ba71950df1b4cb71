"""The same modules, computed for a processor: tiles that stay in its cache. Where, is decided here alone.

A kernel reads the parameters of a module and gives what its `forward` defines, rounding apart:

    module         device   scoring         training          gradients in evaluation
    first block    CPU      tiles           tiles             tiles
    first block    CUDA     norm folded     norm folded       norm folded
    later block    CPU      tiles           tiles             as defined
    nn.GRU         CPU      as defined      layer by layer    layer by layer

Everywhere else a module is computed as it is defined, and so it is wherever a kernel would pass something over: a
graph is traced, compiled or exported; torch.func transforms it; a part was replaced or parametrised; hooks hang on it
(pruning is one); its batch norm is frozen, or keeps no running statistics. `disabled` switches the kernels off by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_SWITCH = ContextVar("fast kernels", default=True)
_PARTS = (nn.Conv2d, nn.BatchNorm2d, nn.Identity)  # what a kernel knows how to read
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# (module, device) -> whether a kernel computes it, by whether gradients are recorded and whether it is in training
_TABLE = {
    ("first block", "cpu"): lambda gradient, training: True,
    ("first block", "cuda"): lambda gradient, training: True,
    ("later block", "cpu"): lambda gradient, training: training or not gradient,
    ("GRU", "cpu"): lambda gradient, training: gradient and not torch.is_autocast_enabled("cpu"),
}


@contextmanager
def disabled() -> Iterator[None]:
    """Compute every module as it is defined: for second derivatives, for exports, and to compare with.

    >>> with disabled():
    ...     enabled()
    False
    """
    token = _SWITCH.set(False)
    try:
        yield
    finally:
        _SWITCH.reset(token)


def exporting() -> bool:
    """Whether a graph is being recorded, which has to hold the operations as they are defined."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def enabled() -> bool:
    """Whether kernels may be used at all."""
    transformed = torch._C._are_functorch_transforms_active()  # which PyTorch asks in this way, too
    return not exporting() and not transformed and _SWITCH.get()


def applies(module: nn.Module, x: Tensor) -> bool:
    """Whether a kernel computes `module` on x: the table of this file, and nothing that a kernel would pass over.

    Args:
        module: a residual block of `models.encoder`, or an nn.GRU.
        x: its input.
    """
    if not enabled() or not _as_built(module):
        return False
    rule = _TABLE.get((_kind(module), x.device.type))
    return rule is not None and rule(torch.is_grad_enabled(), module.training)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.GRU):
        return "GRU"
    return "first block" if module.conv1.in_channels == 1 else "later block"


def _as_built(module: nn.Module) -> bool:
    """Whether parameters and mode tell all that the module's own code would do."""
    if isinstance(module, nn.GRU):
        return type(module) is nn.GRU and not hooked(module)
    norm, parts = module.norm, list(module.children())
    if any(type(part) not in _PARTS or hooked(part) for part in parts):
        return False
    return norm.training == module.training and norm.running_mean is not None and norm.affine


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to what goes in or out of this module."""
    return any(getattr(module, hooks) for hooks in _HOOKS)
