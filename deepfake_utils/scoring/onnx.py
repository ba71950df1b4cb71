"""Countermeasures as ONNX files: writing them, proving that they compute the same, and scoring with them.

The exporter that traces TorchScript is used: the newer one (`dynamo=True`) writes GRUs with wrong numbers and
fixes the length of what passes through an LSTM. Whatever is exported, `parity_report` compares it with PyTorch.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ, CheckpointError, ConfigError
from deepfake_utils.files import atomic_write
from deepfake_utils.models import MODELS
from deepfake_utils.models.layers import CMOutput, check_waveform
from deepfake_utils.models.sinc import SincFilters

OPSET = 17
INPUT_NAME = "waveform"
SCORE_MEANING = "logits[:, 1], the logit of bona fide: higher is more bona fide; logits[:, 0] is that of spoof"


def export_onnx(model: nn.Module, path: str | os.PathLike, *, opset: int = OPSET) -> Path:
    """Write a countermeasure as ONNX, for batches and waveforms of any size from its minimum up.

    The file has one input, `waveform` (batch, samples) float32, and two outputs, `logits` (batch, 2) and
    `embedding` (batch, D). Its metadata say what it is: model, config, sample_rate_hz, min_samples, opset, input,
    score.

    Args:
        model: any model of `models.MODELS`, with the weights to export; it is left as it is.
        path: the file to write, atomically.
        opset: version of the ONNX operators.

    Returns:
        The path written.

    Raises:
        ConfigError: this PyTorch cannot write the model's operations in that opset.
    """
    path = Path(path)
    model = copy.deepcopy(model).cpu().eval()
    for module in model.modules():
        if isinstance(module, SincFilters):
            module.fix_()
    example = torch.zeros(2, max(CROP_SAMPLES, model.min_samples))
    dynamic = {INPUT_NAME: {0: "batch", 1: "samples"}, "logits": {0: "batch"}, "embedding": {0: "batch"}}
    with atomic_write(path) as part:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the exporter's age, and length checks that need not be traced
                torch.onnx.export(
                    model,
                    (example,),
                    str(part),
                    dynamo=False,
                    opset_version=opset,
                    input_names=[INPUT_NAME],
                    output_names=["logits", "embedding"],
                    dynamic_axes=dynamic,
                )
        except (torch.onnx.errors.OnnxExporterError, ValueError) as error:
            raise ConfigError(f"{type(model).__name__} cannot be written with ONNX opset {opset}: {error}") from error
        _describe(part, model, opset)
    return path


def _describe(path: Path, model: nn.Module, opset: int) -> None:
    """Add the metadata that make a file understandable without this package."""
    import onnx

    exported = onnx.load(path)
    facts = {
        "model": _name_of(model),
        "config": json.dumps(dataclasses.asdict(model.config)),
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "min_samples": model.min_samples,
        "opset": opset,
        "input": f"{INPUT_NAME}: (batch, samples) float32 in [-1, 1], {SAMPLE_RATE_HZ} Hz, mono",
        "score": SCORE_MEANING,
    }
    onnx.helper.set_model_props(exported, {key: str(value) for key, value in facts.items()})
    onnx.checker.check_model(exported)
    onnx.save(exported, path)


def _name_of(model: nn.Module) -> str:
    """The name in `MODELS` of the model's configuration, or else its class."""
    for name, (_, config) in MODELS.items():
        if json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(model.config)):
            return name
    return type(model).__name__


class OnnxScorer:
    """An exported countermeasure that is called as the PyTorch one is, on the CPU.

    Args:
        path: a file written by `export_onnx`.
        n_threads: processor cores to use; None means all that PyTorch would.

    Attributes:
        metadata: what the file says about itself.
        min_samples: fewest samples of a waveform.

    Raises:
        CheckpointError: the file is absent, damaged, or not one that `export_onnx` wrote.
    """

    def __init__(self, path: str | os.PathLike, n_threads: int | None = None):
        import onnxruntime

        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such ONNX file; write one with `python -m deepfake_utils export`")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads or torch.get_num_threads()
        # Weight decay leaves weights of 1e-41, on which processors are a hundred times slower than on zero.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen unrelated exception classes and no common one
            raise CheckpointError(f"{path}: not a readable ONNX model: {error}") from error
        finally:
            torch.set_flush_denormal(False)  # the session switched it on for the calling thread as well
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        if self.metadata.get("sample_rate_hz") != str(SAMPLE_RATE_HZ) or "min_samples" not in self.metadata:
            raise CheckpointError(
                f"{path}: its metadata {self.metadata} lack min_samples or sample_rate_hz = {SAMPLE_RATE_HZ}; "
                "expected a file written by export_onnx"
            )
        self.min_samples = int(self.metadata["min_samples"])

    def __call__(self, waveform: Tensor) -> CMOutput:
        """(B, T) float waveforms at 16 kHz -> logits (B, 2) and embedding (B, D), as the model's forward.

        Raises:
            AudioError: the waveforms are not (B, T) or shorter than `min_samples`.
        """
        check_waveform(waveform, self.min_samples)
        samples = waveform.detach().cpu().float().numpy()
        logits, embedding = self._session.run(None, {INPUT_NAME: np.ascontiguousarray(samples)})
        return CMOutput(torch.from_numpy(logits), torch.from_numpy(embedding))


def parity_report(
    path: str | os.PathLike, model: nn.Module, *, batch_sizes: tuple[int, ...] = (1, 2, 5), tolerance: float = 1e-4
) -> pd.DataFrame:
    """Compare an exported file with its model on noise, at three lengths and several batch sizes.

    Returns:
        One row a length and batch size: n_samples, batch_size, and the largest absolute difference of a logit and
        of an embedding's value.

    Raises:
        CheckpointError: a logit differs by more than `tolerance`.
    """
    scorer = OnnxScorer(path)
    model = copy.deepcopy(model).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    lengths = model.min_samples, (model.min_samples + CROP_SAMPLES) // 2 + 1, CROP_SAMPLES + model.min_samples // 3
    rows = []
    for n_samples in lengths:
        for batch_size in batch_sizes:
            waveform = 0.1 * torch.randn(batch_size, n_samples, generator=generator)
            with torch.inference_mode():
                expected = model(waveform)
            found = scorer(waveform)
            differences = ((ours - theirs).abs().max().item() for ours, theirs in zip(found, expected, strict=True))
            rows.append((n_samples, batch_size, *differences))
    report = pd.DataFrame(rows, columns=["n_samples", "batch_size", "logit_difference", "embedding_difference"])
    worst = report["logit_difference"].max()
    if not worst <= tolerance:
        raise CheckpointError(
            f"{path} does not compute what the model does: a logit differs by {worst:.2g}, "
            f"expected {tolerance:.2g} at most\n{report.to_string(index=False)}"
        )
    return report
