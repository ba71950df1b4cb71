"""What computes: PyTorch on a GPU; on a CPU ONNX Runtime, which is faster, as long as its numbers are the same."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from deepfake_utils.conventions import CheckpointError, ConfigError
from deepfake_utils.machine import pick_device
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.scoring.published import cache_folder
from deepfake_utils.scoring.weights import load_model, score_kind

TOLERANCE = 1e-3  # of a logit, between the two engines


class CheckedOnnx:
    """An exported model, compared with PyTorch on the first batch it meets and replaced by it if they differ."""

    def __init__(self, scorer: Callable, model: nn.Module):
        self._scorer, self._model = scorer, model

    def __call__(self, waveform: torch.Tensor) -> CMOutput:
        """(B, T) waveforms -> logits and embedding."""
        output = self._scorer(waveform)
        if self._model is not None:
            expected = self._model(waveform[:1])
            difference = (output.logits[:1] - expected.logits).abs().max().item()
            if difference > TOLERANCE or difference != difference:
                warnings.warn(f"ONNX Runtime's logits differ by {difference:.2g}: PyTorch scores", stacklevel=2)
                self._scorer = self._model
                output = self._scorer(waveform)
            self._model = None
        return output


def pick_engine(path: Path, name: str | None, device: str) -> tuple[Callable, torch.device, str, dict]:
    """Weights on the fastest engine here: the callable, its device, its description, and what its scores are."""
    if path.suffix == ".onnx":
        from deepfake_utils.scoring.onnx import OnnxScorer

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
    from deepfake_utils.scoring.onnx import OnnxScorer, export_onnx

    try:
        exported = cache_folder() / f"{_digest(model)}.onnx"
        if not exported.is_file():
            export_onnx(model, exported)
        scorer = OnnxScorer(exported)
    except (CheckpointError, ConfigError, OSError) as problem:
        return model, torch_device, f"PyTorch on the CPU (no ONNX Runtime: {problem})", facts
    return CheckedOnnx(scorer, model), torch_device, "ONNX Runtime on the CPU", facts


def _digest(model: nn.Module) -> str:
    """A name for the exported model: of its tensors, its configuration and what exports it."""
    digest = hashlib.sha256(f"{type(model).__name__} {model.config} {torch.__version__}".encode())
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:32]
