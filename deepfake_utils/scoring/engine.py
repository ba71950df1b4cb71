"""What computes: PyTorch on a GPU; on a CPU ONNX Runtime, which is faster, as long as its numbers are the same."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deepfake_utils.conventions import CROP_SAMPLES, CheckpointError, ConfigError
from deepfake_utils.machine import keep_freed_memory, pick_device
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.scoring.onnx import OnnxScorer, cached_scorer, check_parity
from deepfake_utils.scoring.published import cache_folder
from deepfake_utils.scoring.score import forward
from deepfake_utils.scoring.weights import load_model, score_kind


class CheckedOnnx:
    """An exported model, compared with PyTorch on the first batch it meets and replaced by it if they differ.

    Attributes:
        engine: what computes, in words.
    """

    def __init__(self, scorer: Callable, model: nn.Module):
        self._scorer, self._model, self._checking = scorer, model, threading.Lock()
        self.engine = "ONNX Runtime on the CPU"

    def __call__(self, waveform: torch.Tensor) -> CMOutput:
        """(B, T) waveforms -> logits and embedding."""
        with self._checking:  # several threads may bring a first batch
            if self._model is not None:
                self._check(waveform)
        return self._scorer(waveform)

    def _check(self, waveform: torch.Tensor) -> None:
        try:
            check_parity(self._scorer, self._model, waveform)
        except CheckpointError as problem:
            warnings.warn(f"{problem}: PyTorch scores", stacklevel=3)
            self._scorer, self.engine = self._model, "PyTorch on the CPU (ONNX Runtime's numbers were others)"
        self._model = None


def pick_engine(path: Path, name: str | None, device: str) -> tuple[Callable, torch.device, str, dict]:
    """Weights on the fastest engine here: the callable, its device, its description, and what its scores are."""
    keep_freed_memory()
    if path.suffix == ".onnx":
        if name:
            raise ConfigError("an ONNX file needs no model name")
        scorer = OnnxScorer(path)
        facts = {"model": scorer.metadata.get("model"), "score": scorer.metadata.get("score")}
        return scorer, torch.device("cpu"), "ONNX Runtime on the CPU", facts
    model = load_model(name, weights=path)
    facts = {"score": score_kind(model)}
    torch_device = pick_device(device).device
    if torch_device.type != "cpu":
        return model.to(torch_device), torch_device, f"PyTorch on {torch_device}", facts
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return model, torch_device, "PyTorch on the CPU (onnx and onnxruntime, if installed, are faster)", facts
    try:
        scorer = cached_scorer(model, cache_folder())
    except (CheckpointError, ConfigError, OSError) as problem:
        return model, torch_device, f"PyTorch on the CPU (no ONNX Runtime: {problem})", facts
    checked = CheckedOnnx(scorer, model)
    return checked, torch_device, checked.engine, facts


def time_window(model: Callable, device: torch.device | str = "cpu", n: int = 10) -> float:
    """Seconds that a model takes for one window of 4.04 s, brought to its device and back: the median of n."""
    waveform = 0.1 * torch.randn(1, CROP_SAMPLES, generator=torch.Generator().manual_seed(0))
    forward(model, waveform, device)
    times_s = []
    for _ in range(n):
        begun = time.perf_counter()
        forward(model, waveform, device)
        times_s.append(time.perf_counter() - begun)
    return float(np.median(times_s))
