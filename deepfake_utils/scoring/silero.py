"""Silero VAD as ONNX Runtime runs it quickest: its convolutions as products of matrices over all frames at once.

The package's graph convolves each frame by itself, a few columns a time, which leaves a processor mostly idle. The same
weights over the rows of all frames together take two fifths of the time, and give the same probabilities to 1e-5.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

FRAMES = "/stft/padding/Pad_output_0"  # (frames, 832): 576 samples, mirrored by 128 on either side
ENCODED = "/Transpose_output_0"  # (frames, 1, 128), what the LSTM reads
LAYERS = ((4, 1), (4, 2), (2, 2), (1, 1))  # of the encoder: columns in, but for the last one out; its step
TOLERANCE = 1e-4  # of a probability


def silero_file() -> Path | None:
    """The network that the package silero-vad brings, or None: 6.2.3 and later have it."""
    package = find_spec("silero_vad")
    network = package and Path(package.submodule_search_locations[0]) / "data" / "silero_vad_16k_sequence.onnx"
    return network if network and network.is_file() else None


def open_silero(network: Path):
    """An ONNX Runtime session of Silero VAD on one thread: by rows, if onnx is there and the numbers are the same."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # it warns of the network's unused constants

    def session(graph):
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    given = session(str(network))
    if find_spec("onnx") is None:
        return given
    try:
        quick = session(by_rows(network))
        found, expected = (probabilities(one) for one in (quick, given))
    except Exception:  # another version's graph; onnx and onnxruntime have no common class of exceptions
        return given
    return quick if np.abs(found - expected).max() < TOLERANCE else given


def probabilities(session, n_frames: int = 8) -> np.ndarray:
    """Of speech, in noise."""
    frames = np.random.default_rng(0).normal(0, 0.1, (n_frames, 576)).astype(np.float32)
    memory = np.zeros((2, 1, 1, 128), np.float32)
    return session.run(["speech_probs"], {"input": frames, "h": memory[0], "c": memory[1]})[0].ravel()


def by_rows(network: Path) -> bytes:
    """The graph in `network` with everything between padding and LSTM computed on (frames, columns, channels).

    Raises:
        ValueError, KeyError: it is not the graph of silero-vad 6.2.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(network)
    graph, nodes = model.graph, []
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def constant(value) -> str:
        name = f"constant_{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(operation: str, *inputs: str, **attributes) -> str:
        nodes.append(helper.make_node(operation, inputs, [f"row_{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def columns(x: str, start: int, stop: int, step: int = 1, axis: int = 1) -> str:
        return add("Slice", x, *(constant(np.array([value], np.int64)) for value in (start, stop, axis, step)))

    def product(x: str, kernel: np.ndarray, n_columns: int, step: int) -> str:
        """Columns side by side, `step` apart, times a kernel (out, in, width)."""
        beside = [columns(x, i, i + n_columns, step) for i in range(kernel.shape[2])]
        rows = kernel.transpose(2, 1, 0).reshape(-1, len(kernel))
        return add("MatMul", add("Concat", *beside, axis=2), constant(rows))

    blocks = add("Reshape", columns(FRAMES, 128, 768), constant(np.array([-1, 5, 128], np.int64)))
    waves = weights["stft.forward_basis_buffer"].reshape(258, 2, 128).transpose(0, 2, 1)
    squares = product(blocks, waves, 4, 1)
    squares = add("Mul", squares, squares)
    x = add("Sqrt", add("Add", columns(squares, 0, 129, axis=2), columns(squares, 129, 258, axis=2)))
    for number, (n_columns, step) in enumerate(LAYERS):
        padded = add("Pad", x, constant(np.array([0, 1, 0, 0, 1, 0], np.int64)))
        x = product(padded, weights[f"encoder.{number}.weight"], n_columns, step)
        x = add("Relu", add("Add", x, f"encoder.{number}.bias"))
    nodes.append(helper.make_node("Identity", [x], [ENCODED]))

    old = list(graph.node)
    made = [node.output[0] for node in old]
    first, last = made.index(FRAMES) + 1, made.index(ENCODED)
    del graph.node[:]
    graph.node.extend([*old[:first], *nodes, *old[last + 1 :]])
    return model.SerializeToString()
