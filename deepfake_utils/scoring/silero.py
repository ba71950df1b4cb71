"""Silero VAD as it runs quickest: all frames at once up to its recurrent layer, which goes from frame to frame.

The package's graph convolves each frame by itself, a few columns a time, which leaves a processor mostly idle. Here an
FFT gives the spectra, and each convolution, over four columns at most, is one matrix product of all frames. That takes
two fifths of the time, and gives the same probabilities to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy.fft import rfft

ENCODED = "/Transpose_output_0"  # (frames, 1, 128), what the LSTM reads
COLUMNS, BINS = 4, 129  # of a frame's spectrum: every 128 samples one of 256
STEPS = (1, 2, 2, 1)  # columns of the encoder's layers
TOLERANCE = 1e-5  # of a probability

Network = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def silero_file() -> Path | None:
    """The network that the package silero-vad brings, or None: 6.2.3 and later have it."""
    package = find_spec("silero_vad")
    network = package and Path(package.submodule_search_locations[0]) / "data" / "silero_vad_16k_sequence.onnx"
    return network if network and network.is_file() else None


def open_silero(network: Path) -> Network:
    """Silero VAD on one thread: as above, if onnx is there and the numbers are the same, or else as the package's.

    Returns:
        What maps frames (n, 576), 512 samples and the 64 before them, and the memory (2, 1, 1, 128) of the frames
        before, zeros at first, to probabilities of speech (n,) and the memory after them.
    """
    given = as_given(network)
    if find_spec("onnx") is None:
        return given
    try:
        quick = by_products(network)
        found, expected = (in_noise(one) for one in (quick, given))
    except Exception:  # another version's graph; onnx and onnxruntime have no common class of exceptions
        return given
    return quick if np.abs(found - expected).max() < TOLERANCE else given


def as_given(network: Path) -> Network:
    """The package's graph."""
    return _network(network.read_bytes(), "input", lambda frames: frames)


def by_products(network: Path) -> Network:
    """The same from spectra and matrix products.

    Raises:
        ValueError, KeyError: it is not the graph of silero-vad 6.2.
    """
    import onnx

    model = onnx.load(network)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    window = weights["stft.forward_basis_buffer"][0, 0]  # the cosine of frequency 0 is 1

    def magnitudes(frames: np.ndarray) -> np.ndarray:
        padded = np.concatenate([frames, frames[:, -2:-66:-1]], axis=1)  # mirrored at the end
        columns = np.lib.stride_tricks.sliding_window_view(padded, len(window), axis=1)[:, ::128]
        spectra = rfft(columns * window)
        return np.sqrt(spectra.real**2 + spectra.imag**2).reshape(len(frames), -1)

    return _network(_from_magnitudes(model, weights), "magnitudes", magnitudes)


def in_noise(network: Network, n_frames: int = 8) -> np.ndarray:
    """Probabilities of speech in noise."""
    frames = np.random.default_rng(0).normal(0, 0.1, (n_frames, 576)).astype(np.float32)
    return network(frames, np.zeros((2, 1, 1, 128), np.float32))[0]


def _network(graph: bytes, name: str, prepare: Callable[[np.ndarray], np.ndarray]) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # it warns of the network's unused constants
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(frames: np.ndarray, memory: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs = {name: prepare(frames), "h": memory[0], "c": memory[1]}
        probability, *after = session.run(["speech_probs", "hn", "cn"], inputs)
        return probability.reshape(-1), np.stack(after)

    return run


def _from_magnitudes(model, weights: dict[str, np.ndarray]) -> bytes:
    """The graph from magnitudes (frames, 4 x 129) on, everything up to the LSTM in matrix products."""
    from onnx import TensorProto, helper, numpy_helper

    graph, nodes = model.graph, []

    def constant(value) -> str:
        name = f"constant_{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(operation: str, *inputs: str, **attributes) -> str:
        nodes.append(helper.make_node(operation, inputs, [f"product_{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def product(x: str, matrix: np.ndarray, bias: np.ndarray) -> str:
        """Columns and channels in one row times (columns in, channels in, columns out, channels out)."""
        rows = matrix.reshape(matrix.shape[0] * matrix.shape[1], -1)
        return add("Relu", add("Gemm", x, constant(rows), constant(np.tile(bias, matrix.shape[2]))))

    def half(x: str, first: int) -> str:
        """Three of the first layer's columns, all that two columns of its output depend on."""
        return add("Slice", x, *(constant(np.array([at])) for at in (first * BINS, (first + 3) * BINS, 1)))

    x, n_columns = "magnitudes", COLUMNS
    for number, step in enumerate(STEPS):
        matrix, bias = _banded(weights[f"encoder.{number}.weight"], n_columns, step), weights[f"encoder.{number}.bias"]
        if number == 0:
            halves = [product(half(x, i), matrix[i : i + 3, :, 2 * i : 2 * i + 2], bias) for i in (0, 1)]
            x = add("Concat", *halves, axis=1)
        else:
            x = product(x, matrix, bias)
        n_columns = matrix.shape[2]
    nodes.append(helper.make_node("Reshape", [x, constant(np.array([-1, 1, 128]))], [ENCODED]))

    kept = list(graph.node)
    kept = kept[[node.output[0] for node in kept].index(ENCODED) + 1 :]
    del graph.node[:]
    graph.node.extend([*nodes, *kept])
    inputs = [value for value in graph.input if value.name != "input"]
    del graph.input[:]
    magnitudes = helper.make_tensor_value_info("magnitudes", TensorProto.FLOAT, ["frames", COLUMNS * BINS])
    graph.input.extend([magnitudes, *inputs])
    return model.SerializeToString()


def _banded(kernel: np.ndarray, n_columns: int, step: int) -> np.ndarray:
    """A convolution of width 3 (out, in, 3) over so few columns as a matrix (columns, in, columns out, out)."""
    n_out = -(-n_columns // step)
    matrix = np.zeros((n_columns, kernel.shape[1], n_out, kernel.shape[0]), np.float32)
    for column in range(n_out):
        for tap in range(3):
            read = column * step + tap - 1  # the others are padding
            if 0 <= read < n_columns:
                matrix[read, :, column] = kernel[:, :, tap].T
    return matrix
