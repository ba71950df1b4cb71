"""Countermeasures as ONNX files: writing them, proving that they compute the same, and scoring with them.

The exporter that traces TorchScript is used: the newer one (`dynamo=True`) writes GRUs with wrong numbers and
fixes the length of what passes through an LSTM. Whatever is exported, `parity_report` compares it with PyTorch.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils import __version__, models
from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ, CheckpointError, ConfigError
from deepfake_utils.files import atomic_write
from deepfake_utils.models import MODELS, fast
from deepfake_utils.models.aasist import NodePooling
from deepfake_utils.models.encoder import Encoder, ResidualBlock
from deepfake_utils.models.fast.fused import SELU_ALPHA, SELU_SCALE
from deepfake_utils.models.fast.tiling import spread
from deepfake_utils.models.layers import CMOutput, check_waveform
from deepfake_utils.models.lfcc import PowerSpectrum
from deepfake_utils.models.sinc import SincFilters
from deepfake_utils.scoring.weights import score_kind

OPSET = 17
INPUT_NAME = "waveform"
CODE = (resources.files(__package__) / "onnx.py", resources.files(models))  # what decides how a model is written
LOGIT_TOLERANCE = 1e-4  # of an exported model: two orders of float32's rounding through its layers

# Of an encoder in a graph: 48 take 0.84 to 0.89 of the time of one, for 1 to 16 clips of 4 s; for 16 clips 24 gain
# nothing.
PIECES = 48
COLUMNS = 16  # of a power spectrum's points, at most: 32 take 3 % longer
BLOCKS_IN_PIECES = 2  # a third makes it slower again: the frames computed twice weigh more, its maps are small


# --- modules that need another graph than PyTorch runs


class PiecewiseEncoder(Encoder):
    """The first blocks piece by piece, for a runtime that knows nothing of tiles.

    A frame depends on `step` frames of x and on fewer on either side of them. So a piece is computed with one
    frame more on either side; these two, which padding spoils, are cut again.
    """

    def forward(self, waveform: Tensor, band_mask: Tensor | None = None) -> Tensor:
        x = F.selu(self.norm(self.sinc.pooled(waveform, band_mask, bands=3)[:, None]))
        blocks = self.blocks[:BLOCKS_IN_PIECES]
        step = 3 ** len(blocks)
        n_frames = x.shape[3] // step
        n_pieces = min(PIECES, 2 * 3 ** (len(self.blocks) - len(blocks)))  # the frames of the shortest waveform
        edges = [n_frames * i // n_pieces for i in range(1, n_pieces)]
        starts = [None, *[(edge - 1) * step for edge in edges]]
        stops = [*[(edge + 1) * step for edge in edges], None]
        first, *inner, last = (x[..., start:stop] for start, stop in zip(starts, stops, strict=True))
        for block in blocks:
            first, *inner, last = block(first), *(block.plain(piece, spoils_ends=True) for piece in inner), block(last)
        x = torch.cat([first[..., :-1], *(piece[..., 1:-1] for piece in inner), last[..., 1:]], 3)
        for block in self.blocks[BLOCKS_IN_PIECES:]:
            x = block(x)
        return x


class BlockByExponentials(ResidualBlock):
    """SELU by way of `Exp`, which ONNX Runtime computes in less than half the time of its `Selu`.

    SELU(x) = scale (max(x, 0) + alpha exp(min(x, 0)) - alpha). With ln alpha added to x, in the bias of the
    convolution before it, alpha needs no product; the scale is in the weights of the next convolution. A whole AASIST
    takes 0.93 of the time. What is subtracted may go into the bias of that convolution where it is wrong beside its
    padding.
    """

    def plain(self, x: Tensor, *, spoils_ends: bool = False) -> Tensor:
        """The block; spoils_ends: the first and the last frame may be wrong, of maps whose ends are cut."""
        knee = math.log(SELU_ALPHA)
        hidden = self.norm(self.conv1(x)) + torch.full((self.conv1.out_channels, 1, 1), knee)
        hidden = hidden.clamp(max=knee).exp() + hidden.clamp(min=knee)
        weight, bias = SELU_SCALE * self.conv2.weight, self.conv2.bias
        if spoils_ends:
            bias = bias - (SELU_ALPHA + knee) * weight.sum((1, 2, 3))
        else:
            hidden = hidden - (SELU_ALPHA + knee)
        hidden = F.conv2d(hidden, weight, bias, padding=self.conv2.padding)
        return F.max_pool2d(hidden + self.shortcut(x), (1, 3))


class PoolingOfAnyLength(NodePooling):
    """Computes how many nodes to keep in the graph, where a number would freeze the length that was traced."""

    def n_kept(self, n_nodes: Tensor) -> Tensor:
        # Of one value and not of none, lest the exporter multiply in single precision: int(90 * 0.7) is 62.
        product = n_nodes.reshape(1).double() * torch.tensor([self.share], dtype=torch.float64)
        return product.long().clamp(min=1)[0]


class Waves(torch.autograd.Function):
    """A matrix of cosines or sines, which a graph computes when it is loaded: the file holds its rows and columns."""

    @staticmethod
    def forward(ctx, n: Tensor, k: Tensor, period: int, function: str) -> Tensor:
        """cos or sin ("Cos", "Sin") of 2 pi n k / period, for whole numbers n (samples, 1) and k (1, bins)."""
        return getattr(torch, function.lower())(2 * math.pi / period * (n @ k % period).double()).float()

    @staticmethod
    def symbolic(g, n, k, period: int, function: str):
        """The same as operations of which the exporter folds none, so that the runtime does."""
        period, step = (g.op("Constant", value_t=torch.tensor(x)) for x in (float(period), 2 * math.pi / period))
        return g.op(function, g.op("Mul", g.op("Mod", g.op("MatMul", n, k), period, fmod_i=1), step))


class PowerInTwoSteps(PowerSpectrum):
    """With real cosine and sine matrices, ONNX having no complex numbers: Cooley and Tukey's FFT in two products.

    With N = rows * columns points, sample columns i + j and bin k = r + rows s, exp(-2 pi i n k / N) is
    exp(-2 pi i i r / rows) exp(-2 pi i j k / N). So every column j, a sequence of its own, is convolved with waves over
    i, which also cuts the frames and puts the window on; then a matrix for every r mixes the columns. That is a
    seventh of the products of one large matrix, and no copy of the frames.
    """

    def powers(self, waveform: Tensor) -> Tensor:
        columns = math.gcd(self.hop_samples, self.window_samples, self.n_fft, COLUMNS)
        rows = self.n_fft // columns
        remainders = rows // 2 + 1  # the others mirror these: the waveform is real
        whole = waveform[:, : waveform.shape[1] // columns * columns]
        x = whole.reshape(waveform.shape[0], -1, columns).transpose(1, 2)
        x = F.conv1d(x, self._kernel(columns, rows), stride=self.hop_samples // columns, groups=columns)
        x = x.reshape(x.shape[0], columns, remainders, -1).transpose(1, 2)  # real and imaginary frames side by side
        x = self._mixing(columns, rows) @ x.reshape(x.shape[0], remainders, 2 * columns, -1)
        powers = x[:, :, :columns].square() + x[:, :, columns:].square()
        bins = torch.arange(self.n_bins)
        bins = torch.where(bins % rows < remainders, bins, self.n_fft - bins)
        return powers.flatten(1, 2)[:, bins % rows * columns + bins // rows].transpose(1, 2)

    def _kernel(self, columns: int, rows: int) -> Tensor:
        """(columns x remainders x 2, 1, taps): for every column the window times cosines and, negative, sines."""
        i, r = torch.arange(float(self.window_samples // columns))[:, None], torch.arange(rows // 2 + 1.0)[None]
        waves = torch.stack([Waves.apply(i, r, rows, "Cos"), -Waves.apply(i, r, rows, "Sin")], -1)  # (taps, r, 2)
        window = self.window.reshape(-1, columns).t()  # (columns, taps)
        return (window[:, None] * waves.flatten(1).t()).reshape(-1, 1, len(i))

    def _mixing(self, columns: int, rows: int) -> Tensor:
        """(remainders, 2 columns, 2 columns): real, then imaginary parts of the bins, from both parts of columns."""
        j, s = torch.arange(float(columns))[:, None], torch.arange(float(columns))
        bins = (torch.arange(rows // 2 + 1.0)[:, None] + rows * s).reshape(1, -1)
        cos, sin = (
            Waves.apply(j, bins, self.n_fft, function).reshape(columns, -1, columns).permute(1, 2, 0)
            for function in ("Cos", "Sin")
        )
        parts = [torch.stack(both, -1).flatten(-2) for both in ((cos, sin), (-sin, cos))]
        return torch.cat(parts, 1)


class MeanOfWhatIsThere(torch.autograd.Function):
    """The mean of `size` x `size` points, at the ends of those that are left, padded where the exporter would round up.

    ONNX Runtime computes the padded form in the layout of the convolutions around it, and the other 18 times as slowly.
    """

    @staticmethod
    def forward(ctx, x: Tensor, size: int) -> Tensor:
        """(B, channels, H, W) -> (B, channels, H / size, W / size), rounded up."""
        return F.avg_pool2d(x, size, ceil_mode=True)

    @staticmethod
    def symbolic(g, x, size: int):
        """The same as one operation."""
        sides = [size, size]
        padding = [0, 0, size - 1, size - 1]
        return g.op("AveragePool", x, kernel_shape_i=sides, strides_i=sides, pads_i=padding, count_include_pad_i=0)


class PaddedPooling(nn.AvgPool2d):
    """The pooling of a shortcut in a graph."""

    def forward(self, x: Tensor) -> Tensor:
        return MeanOfWhatIsThere.apply(x, self.kernel_size)


IN_A_GRAPH = {
    Encoder: PiecewiseEncoder,
    ResidualBlock: BlockByExponentials,
    NodePooling: PoolingOfAnyLength,
    PowerSpectrum: PowerInTwoSteps,
    nn.AvgPool2d: PaddedPooling,
}


def _for_export(model: nn.Module) -> nn.Module:
    """A copy of the model with those modules in it, its filters fixed and no subnormal number in its weights.

    Weight decay leaves weights of 1e-41, on which processors are a hundred times slower than on zero.
    """
    model = copy.deepcopy(model).cpu().eval()
    for module in model.modules():
        module.__class__ = IN_A_GRAPH.get(type(module), type(module))  # they differ in methods, not in what they hold
        if isinstance(module, SincFilters):
            module.fix_()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.masked_fill_(value.abs() < torch.finfo(value.dtype).tiny, 0)
    return model


# --- writing


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
        ConfigError: the name does not end in .onnx, or this PyTorch cannot write the operations in that opset.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ConfigError(f"{path}: expected a name that ends in .onnx, for what is written is ONNX")
    model = _for_export(model)
    example = torch.zeros(2, max(SAMPLE_RATE_HZ, model.min_samples))
    dynamic = {INPUT_NAME: {0: "batch", 1: "samples"}, "logits": {0: "batch"}, "embedding": {0: "batch"}}
    with atomic_write(path) as part:
        try:
            with torch.no_grad(), fast.disabled(), warnings.catch_warnings():
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
        "score": f"logits[:, 1], {score_kind(model)}; logits[:, 0] is that of spoof",
    }
    onnx.helper.set_model_props(exported, {key: str(value) for key, value in facts.items()})
    onnx.checker.check_model(exported)
    onnx.save(exported, path)


def _name_of(model: nn.Module) -> str:
    """The name in `MODELS` of the model's configuration, or else its class."""
    for name, (_, config) in MODELS.items():
        if config == model.config:
            return name
    return type(model).__name__


# --- scoring


class OnnxScorer:
    """An exported countermeasure that is called as the PyTorch one is, on the CPU.

    Args:
        path: a file written by `export_onnx`.

    Attributes:
        metadata: what the file says about itself.
        min_samples: fewest samples of a waveform.

    Raises:
        CheckpointError: the file is absent, damaged, or not one that `export_onnx` wrote.
        ConfigError: ONNX Runtime is not installed.
    """

    def __init__(self, path: str | os.PathLike):
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such ONNX file; write one with `python -m deepfake_utils export`")
        try:
            self._open = partial(_open_session, path, Path(path).read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: not a readable ONNX model: {error}") from error
        self.metadata = dict(self._for_crops.get_modelmeta().custom_metadata_map)
        if self.metadata.get("sample_rate_hz") != str(SAMPLE_RATE_HZ) or "min_samples" not in self.metadata:
            raise CheckpointError(
                f"{path}: its metadata {self.metadata} lack min_samples or sample_rate_hz = {SAMPLE_RATE_HZ}; "
                "expected a file written by export_onnx"
            )
        self.min_samples = int(self.metadata["min_samples"])

    def __call__(self, waveform: Tensor) -> CMOutput:
        """(B, T) float waveforms at 16 kHz -> logits (B, 2) and embedding (B, D), as the model's forward.

        A file whose only output is `logits` has embeddings of no numbers, (B, 0).

        Waveforms are computed one by one, as many at once as PyTorch has threads here: a batch in one call takes a
        fifth more processor time and so many times the memory, all cores on each operation a quarter more (LFCC-LCNN).

        Raises:
            AudioError: the waveforms are not (B, T) or shorter than `min_samples`.
        """
        check_waveform(waveform, self.min_samples)
        batch = np.ascontiguousarray(waveform.detach().cpu().float().numpy())
        parts = spread(self._run, [batch[i : i + 1] for i in range(len(batch))])
        return CMOutput(*(torch.from_numpy(np.concatenate(values)) for values in zip(*parts, strict=True)))

    @cached_property
    def _for_crops(self):
        return self._open(CROP_SAMPLES)

    @cached_property
    def _for_any_length(self):
        return self._open()

    def _run(self, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        session = self._for_crops if waveform.shape[1] == CROP_SAMPLES else self._for_any_length
        logits, *more = session.run(None, {INPUT_NAME: waveform})
        return logits, more[0] if more else np.zeros((1, 0), np.float32)


def _open_session(path: str | os.PathLike, content: bytes, n_samples: int | None = None):
    """A file's content as an ONNX Runtime session that computes on the thread that calls it; many may at once.

    One that knows how long its waveforms are, and that they come one by one, joins more operations: AASIST takes 0.96
    of the time.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"ONNX Runtime is not installed ({error}): pip install onnx onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_free_dimension_override_by_name("batch", 1)
    if n_samples:
        options.add_free_dimension_override_by_name("samples", n_samples)
    try:  # in a thread of its own: a session may leave its settings of the processor (subnormal numbers) behind
        with ThreadPoolExecutor(1) as other:
            opened = other.submit(onnxruntime.InferenceSession, content, options, providers=["CPUExecutionProvider"])
            return opened.result()
    except Exception as error:  # onnxruntime has a dozen unrelated exception classes and no common one
        raise CheckpointError(f"{path}: not a readable ONNX model: {error}") from error


def cached_scorer(model: nn.Module, folder: str | os.PathLike) -> OnnxScorer:
    """An `OnnxScorer` of a model, exported once for its weights and kept in a folder.

    Args:
        model: a countermeasure, as `load_model` gives it.
        folder: where exported models are kept; the file's name is the SHA-256 of weights, configuration, the
            package's version, and the code that writes them.

    Raises:
        ConfigError: onnx or ONNX Runtime is not installed, or the model cannot be exported.

    `check_parity` with the first batch tells whether it gives the model's numbers.
    """
    path = Path(folder) / f"{_fingerprint(model)}.onnx"
    try:
        return OnnxScorer(path)
    except CheckpointError:  # absent, or damaged
        return OnnxScorer(export_onnx(model, path))


def _fingerprint(model: nn.Module) -> str:
    """Of all that decides what a model computes, and how it is written."""
    facts = {
        "version": __version__,
        "torch": torch.__version__,
        "opset": OPSET,
        "class": str(type(model)),
    }
    digest = hashlib.sha256(json.dumps(facts | {"config": dataclasses.asdict(model.config)}, sort_keys=True).encode())
    for part in CODE:
        for file in [part] if part.is_file() else sorted(part.iterdir(), key=lambda file: file.name):
            digest.update(file.read_bytes() if file.name.endswith(".py") else b"")
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.inference_mode()
def check_parity(
    scorer: OnnxScorer, model: nn.Module, waveform: Tensor, *, tolerance: float = LOGIT_TOLERANCE
) -> float:
    """Compare an exported model with the one it was made from, on the first clip of a batch.

    Args:
        model: the model in evaluation mode, on the CPU.
        waveform: (B, T) at 16 kHz.
        tolerance: of a logit, absolute.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        CheckpointError: it exceeds the tolerance, or is no number.
    """
    one = waveform[:1].detach().cpu().float()
    expected = model(one).logits
    difference = (scorer(one).logits - expected).abs().max().item()
    if not difference <= tolerance:
        raise CheckpointError(
            f"the exported {type(model).__name__} does not compute what the model does: a logit differs by "
            f"{difference:.2g}, expected {tolerance:.2g} at most"
        )
    return difference


def parity_report(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    batch_sizes: tuple[int, ...] = (1, 2, 5),
    tolerance: float = LOGIT_TOLERANCE,
) -> pd.DataFrame:
    """Compare an exported file with its model on noise, at four lengths, that of crops among them, and batch sizes.

    Returns:
        One row a length and batch size: n_samples, batch_size, and the largest absolute difference of a logit and
        of an embedding's value.

    Raises:
        CheckpointError: a logit differs by more than `tolerance`.
    """
    scorer = OnnxScorer(path)
    model = copy.deepcopy(model).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    between = (model.min_samples + CROP_SAMPLES) // 2 + 1
    lengths = model.min_samples, between, CROP_SAMPLES, CROP_SAMPLES + model.min_samples // 3
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
