"""Smaller ONNX files: weights in half precision, and weights and activations in eight bits.

What is quantised is decided by the graph: every convolution and dense layer but those that read a single channel (a
sinc bank, a spectrogram: as integers slower than as floats, and the quietest parts of speech are lost there), and the
additions and rectifiers between them. Spectra, logarithms and statistics stay float. Which layers had better stay
float is measured with `layer_errors`.

Weights have seven bits: on processors without VNNI the products of 8-bit weights saturate, and the same file would
give other numbers on another machine (github microsoft/onnxruntime, docs on quantisation, `reduce_range`).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from deepfake_utils.conventions import BONAFIDE, SPOOF, ConfigError
from deepfake_utils.files import atomic_write
from deepfake_utils.scoring.onnx import INPUT_NAME, OnnxScorer

LAYERS = ("Conv", "Gemm")
BETWEEN = ("Relu", "Add", "MaxPool", "AveragePool")  # quantised where all they read is
MIN_VALUES = 256  # of a tensor, to be worth storing in half precision


def half_weights(path: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write an exported model with its weights in float16, which the runtime widens when it loads them.

    Args:
        path: a file written by `export_onnx`; it computes in float32 before and after.
        out: the file to write, atomically.

    Raises:
        ConfigError: a weight is beyond the range of float16.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < MIN_VALUES:
            continue
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ConfigError(f"{path}: {tensor.name} reaches {np.abs(values).max():.3g}, float16 ends at 65504")
        name, narrow = tensor.name, f"{tensor.name}.half"
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), narrow))
        casts.append(onnx.helper.make_node("Cast", [narrow], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return _write(model, out)


def compact(path: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write an exported model without the names and shapes that only people need; it computes the same."""
    import onnx

    return _write(onnx.load(path), out)


def quantise(
    path: str | os.PathLike, out: str | os.PathLike, windows: Iterable[np.ndarray], *, keep_float: Sequence[str] = ()
) -> Path:
    """Write an exported model with INT8 weights, each output channel scaled by itself, and 8-bit activations.

    Args:
        path: a file written by `export_onnx`.
        out: the file to write, atomically; `OnnxScorer` reads it as any other.
        windows: waveforms (T,) float32 at 16 kHz, of training: the range of every activation is that over them.
        keep_float: names of layers, as `layers` gives them, that stay float32.

    Raises:
        ConfigError: ONNX Runtime is not installed, or a name is no layer's.
    """
    unknown = sorted(set(keep_float) - set(layers(path)))
    if unknown:
        raise ConfigError(f"{path} has no layer {', '.join(unknown)}: its layers are {', '.join(layers(path))}")
    return _quantise(Path(path), out, list(windows), [name for name in layers(path) if name not in keep_float])


def layers(path: str | os.PathLike) -> dict[str, int]:
    """The layers that can be quantised: the name of each in the file, and its number of weights."""
    import onnx

    graph = onnx.load(path).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = {node.name: shapes.get(node.input[1], ()) for node in graph.node if node.op_type in LAYERS}
    return {name: int(np.prod(shape)) for name, shape in found.items() if len(shape) > 1 and shape[1] > 1}


def layer_errors(
    path: str | os.PathLike, windows: Iterable[np.ndarray], checked: np.ndarray, progress=lambda layer: None
) -> pd.DataFrame:
    """What quantising each layer alone does to the log-odds, the worst first.

    Args:
        path: a file written by `export_onnx`.
        windows: waveforms (T,) for the ranges of activations, as in `quantise`.
        checked: (N, T) waveforms to compare on, of the development split.
        progress: called with each layer's name.

    Returns:
        layer, weights, rms and largest: the root of the mean square and the largest difference of a log-odds; the
        last row is all layers together.
    """
    windows, expected = list(windows), log_odds(path, checked)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        names = layers(path)
        for name in (*names, "all"):
            progress(name)
            chosen = list(names) if name == "all" else [name]
            difference = log_odds(_quantise(Path(path), Path(folder) / "one.onnx", windows, chosen), checked) - expected
            weights = sum(names.values()) if name == "all" else names[name]
            rows.append((name, weights, float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max())))
    table = pd.DataFrame(rows, columns=["layer", "weights", "rms", "largest"])
    return pd.concat([table[:-1].sort_values("rms", ascending=False), table[-1:]], ignore_index=True)


def log_odds(path: str | os.PathLike, windows: np.ndarray) -> np.ndarray:
    """Uncalibrated log-odds (N,) of bona fide that an exported model gives waveforms (N, T), one at a time."""
    scorer = OnnxScorer(path)
    logits = np.concatenate([scorer(torch.from_numpy(window)[None]).logits.double().numpy() for window in windows])
    return logits[:, BONAFIDE] - logits[:, SPOOF]


def _quantise(path: Path, out: str | os.PathLike, windows: list[np.ndarray], chosen: Sequence[str]) -> Path:
    import onnx

    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    except ImportError as error:
        raise ConfigError(f"ONNX Runtime cannot quantise here ({error}): pip install onnx onnxruntime") from error

    class Windows(CalibrationDataReader):
        def __init__(self):
            self.left = iter(windows)

        def get_next(self):
            window = next(self.left, None)
            return None if window is None else {INPUT_NAME: window[None]}

    model, root = onnx.load(path), logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder:
        root.setLevel(logging.ERROR)  # it advises to optimise the graph first, which would write matrices into it
        try:
            quantize_static(
                model, Path(folder) / "quantised.onnx", Windows(), per_channel=True, reduce_range=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                nodes_to_quantize=[node.name for node in _with_what_lies_between(model.graph, chosen)],
                op_types_to_quantize=[*LAYERS, *BETWEEN],
            )  # fmt: skip
        finally:
            root.setLevel(level)
        quantised = onnx.load(Path(folder) / "quantised.onnx")
    del quantised.metadata_props[:]  # one more has come in
    quantised.metadata_props.extend(model.metadata_props)
    return _write(quantised, out)


def _with_what_lies_between(graph, chosen: Sequence[str]) -> list:
    """The chosen layers, and the operations that read nothing else."""
    found, written = [], set()
    for node in graph.node:
        if node.name in chosen or (node.op_type in BETWEEN and written.issuperset(node.input)):
            found.append(node)
            written.update(node.output)
    return found


def _write(model, out: str | os.PathLike) -> Path:
    """The model without what only people need: shapes, and names that are longer than the smallest layers."""
    import onnx

    graph = model.graph
    del graph.value_info[:]
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    short: dict[str, str] = {}
    for node in graph.node:
        node.ClearField("doc_string")
        node.ClearField("name")
        for names in (node.input, node.output):
            names[:] = [
                name if name in kept else short.setdefault(name, np.base_repr(len(short), 36)) for name in names
            ]
    for tensor in graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)
    onnx.checker.check_model(model)
    with atomic_write(out) as part:
        onnx.save(model, part)
    return Path(out)
