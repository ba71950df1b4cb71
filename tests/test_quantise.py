"""Smaller files: half precision and eight bits, on a small model, and how near the shipped one stays to itself."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from deepfake_utils.conventions import ConfigError
from deepfake_utils.demo.voice import draw_speaker, speak
from deepfake_utils.models import build_model
from deepfake_utils.scoring.detector import SHIPPED
from deepfake_utils.scoring.onnx import OnnxScorer, export_onnx
from deepfake_utils.scoring.quantise import half_weights, layer_errors, layers, log_odds, quantise
from deepfake_utils.scoring.weights import load_model


@pytest.fixture(scope="module")
def windows():
    """Twelve seconds of babble and noises, each with another level."""
    rng = np.random.default_rng(0)
    sounds = [speak(draw_speaker(rng), 16_000, rng) for _ in range(8)] + list(rng.standard_normal((4, 16_000)))
    sounds[9:11] = np.cumsum(sounds[9:11], axis=1)
    return np.stack([10 ** rng.uniform(-2, -0.5) * x / np.abs(x).max() for x in sounds]).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, windows):
    model = build_model(
        "spectrogram-resnet", generator=torch.Generator().manual_seed(0),
        channels=(8, 8), stem_channels=8, pooled_channels=16, embedding_dim=8,
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(30):  # batch norms see what comes in
            model.train()(torch.from_numpy(windows))
        model.output.weight.mul_(5)
    return export_onnx(model.eval(), tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return export_onnx(load_model(weights=SHIPPED), tmp_path_factory.mktemp("onnx") / "shipped.onnx")


def stored(path):
    return [tensor for tensor in onnx.load(path).graph.initializer if tensor.ByteSize() > 600]


def test_layers_are_those_with_weights_but_the_one_that_reads_the_spectrogram(exported):
    found = layers(exported)
    assert "/join/Conv" in found and "/blocks/blocks.0/shortcut/shortcut.1/Conv" in found
    assert found["/embed/Gemm"] == 2 * 16 * 8 and not any("stem" in name or "power" in name for name in found)


def test_half_weights_are_the_rounded_weights(exported, tmp_path, windows):
    path = half_weights(exported, tmp_path / "half.onnx")
    assert path.stat().st_size < 0.75 * exported.stat().st_size
    halves = [tensor for tensor in stored(path) if tensor.data_type == onnx.TensorProto.FLOAT16]
    join = next(numpy_helper.to_array(tensor) for tensor in halves if list(tensor.dims) == [16, 240, 1])
    exact = next(numpy_helper.to_array(tensor) for tensor in stored(exported) if list(tensor.dims) == [16, 240, 1])
    np.testing.assert_array_equal(join, exact.astype(np.float16))
    assert np.abs(log_odds(path, windows) - log_odds(exported, windows)).max() < 0.01
    assert OnnxScorer(path).metadata == OnnxScorer(exported).metadata


def test_weights_beyond_half_precision_are_refused(exported, tmp_path):
    model = onnx.load(exported)
    tensor = max(model.graph.initializer, key=lambda tensor: tensor.ByteSize())
    tensor.CopyFrom(numpy_helper.from_array(1e6 * np.ones(tensor.dims, np.float32), tensor.name))
    onnx.save(model, tmp_path / "large.onnx")
    with pytest.raises(ConfigError, match="65504"):
        half_weights(tmp_path / "large.onnx", tmp_path / "half.onnx")


def test_eight_bits_give_nearly_the_same_log_odds_at_every_length(shipped, tmp_path, windows):
    path = quantise(shipped, tmp_path / "eight.onnx", windows)
    assert path.stat().st_size < 0.4 * shipped.stat().st_size
    weights = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    n_quantised = sum(int(np.prod(t.dims)) for t in weights if len(t.dims) > 1)
    assert n_quantised == sum(layers(shipped).values())
    assert all(np.abs(numpy_helper.to_array(tensor)).max() <= 64 for tensor in weights)  # seven bits: see the module
    for samples in (windows, windows[:, :9001], np.concatenate([windows, windows], 1)):
        expected, found = log_odds(shipped, samples), log_odds(path, samples)
        differences = np.abs(
            found - expected
        )  # babble is not what the ranges were meant for: one window may be far off
        assert np.median(differences) < 0.01 * np.ptp(expected)
        assert np.sqrt(np.mean(differences**2)) < 0.1 * np.ptp(expected)
    assert OnnxScorer(path).metadata == OnnxScorer(shipped).metadata


def test_layers_that_stay_float_are_not_touched(exported, tmp_path, windows):
    path = quantise(
        exported, tmp_path / "one.onnx", windows[:4], keep_float=[n for n in layers(exported) if "join" not in n]
    )
    weights = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert [list(tensor.dims) for tensor in weights] == [[16, 240, 1]]
    with pytest.raises(ConfigError, match="no layer stem.*/join/Conv"):
        quantise(exported, tmp_path / "x.onnx", windows, keep_float=["stem"])


def test_a_layer_whose_channels_differ_a_million_times_does_no_harm_by_channel(exported, tmp_path, windows):
    """One scale for all channels would round the small ones to nothing."""
    model = onnx.load(exported)
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.name == "/join/Conv")
    weights, bias = (numpy_helper.to_array(by_name[name]).copy() for name in node.input[1:])
    weights[0] *= 1e6
    bias[0] -= 1e9  # the rectifier shuts it
    by_name[node.input[1]].CopyFrom(numpy_helper.from_array(weights, node.input[1]))
    by_name[node.input[2]].CopyFrom(numpy_helper.from_array(bias, node.input[2]))
    onnx.save(model, tmp_path / "uneven.onnx")
    path = quantise(tmp_path / "uneven.onnx", tmp_path / "eight.onnx", windows)
    expected = log_odds(tmp_path / "uneven.onnx", windows)
    assert np.corrcoef(log_odds(path, windows), expected)[0, 1] > 0.9


def test_each_layer_is_measured_alone(exported, windows):
    table = layer_errors(exported, windows[:4], windows[:6])
    assert set(table["layer"]) == {*layers(exported), "all"} and table["layer"].iloc[-1] == "all"
    assert (table["rms"] > 0).all() and (table["rms"] <= table["largest"]).all()
    assert table["rms"][:-1].is_monotonic_decreasing
