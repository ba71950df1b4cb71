"""AASIST, AASIST-L and RawNet2 beside the code their authors published: time, memory, and the same numbers out.

    git clone https://github.com/clovaai/aasist
    python tests/benchmarks/against_reference.py --reference aasist --audio FOLDER

Both run in this process on the same batch, turn by turn, so that whatever else the machine does weighs on both; a
ratio is the median over turns, with the smallest and the largest. Before anything is timed the outputs are compared
(logits in evaluation; loss gradient in training, dropout off), and where they differ by more than the tolerance no
ratio is printed. Without --reference: this project alone, and how far it is from what the machine could do at best.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils.conventions import CROP_SAMPLES
from deepfake_utils.machine import pick_device
from deepfake_utils.models import PUBLISHED_NAMES, build_model, fast
from deepfake_utils.scoring.onnx import OnnxScorer, export_onnx
from deepfake_utils.waveforms.decode import fit_length, read_audio

REFERENCE = {  # name here -> module, configuration and weights there
    "aasist": ("AASIST", "AASIST.conf", "AASIST.pth"),
    "aasist-l": ("AASIST", "AASIST-L.conf", "AASIST-L.pth"),
    "rawnet2": ("RawNet2Spoof", "RawNet2_baseline.conf", None),
}
LOGIT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.1}  # largest absolute difference from the reference in fp32
GRADIENT_TOLERANCE = 1e-3  # norm of the difference over the norm, all parameters together, fp32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    options = parse()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    pick_device(options.device)  # which keeps float32 from being rounded to TF32
    print(describe_machine(options))
    refused = False
    for name in options.models:
        for batch_size in options.batch_sizes:
            for precision in options.precision:
                pair = Pair(name, options.reference, options.device)
                waveform = load_batch(options.audio, batch_size).to(options.device)
                print(f"\n{name}, batch of {batch_size}, {precision}, {waveform.shape[1]:,} samples a clip")
                if options.reference:
                    refused |= not compare(pair, waveform, precision, options)
                else:
                    measure_alone(pair.ours, waveform, precision, options)
    return 1 if refused else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of github.com/clovaai/aasist")
    parser.add_argument("--audio", type=Path, help="folder of recordings; without it, modulated noise")
    parser.add_argument("--models", nargs="+", default=list(REFERENCE), choices=list(REFERENCE))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", *DTYPES])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7)
    return parser.parse_args()


def describe_machine(options: argparse.Namespace) -> str:
    device = (
        torch.cuda.get_device_name(options.device)
        if options.device.startswith("cuda")
        else f"CPU, {options.threads} threads"
    )
    return f"{device}; torch {torch.__version__}; {options.turns} turns"


def load_batch(folder: Path | None, batch_size: int) -> Tensor:
    """The first recordings of the folder, or noise whose level rises and falls as that of speech does."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        level = 0.1 * (torch.arange(CROP_SAMPLES) / 2500).sin().abs()
        return level * torch.randn(batch_size, CROP_SAMPLES, generator=generator)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".flac", ".wav"))
    if not files:
        sys.exit(f"no .flac or .wav file in {folder}")
    clips = [fit_length(read_audio(files[i % len(files)]), CROP_SAMPLES) for i in range(batch_size)]
    return torch.from_numpy(np.stack(clips))


class Pair:
    """A model here and, where a checkout is given, the same weights in the published code."""

    def __init__(self, name: str, reference: Path | None, device: str):
        self.name = name
        self.ours = build_model(name, generator=torch.Generator().manual_seed(0)).to(device).eval()
        if reference is None:
            return
        module, config, weights = REFERENCE[name]
        sys.path.insert(0, str(reference))
        config = json.loads((reference / "config" / config).read_text())["model_config"]
        self.theirs = importlib.import_module(f"models.{module}").Model(copy.deepcopy(config))
        if weights:
            state = torch.load(reference / "models" / "weights" / weights, map_location="cpu", weights_only=True)
            self.theirs.load_state_dict(state)
        self.ours.load_state_dict(PUBLISHED_NAMES[name](self.theirs.state_dict()))
        self.theirs.to(device).eval()

    def logits_of(self, model: nn.Module, waveform: Tensor) -> Tensor:
        """RawNet2's published code ends in a log-softmax, so that is what is compared."""
        logits = model(waveform)[1] if model is getattr(self, "theirs", None) else model(waveform).logits
        return logits.log_softmax(1) if self.name == "rawnet2" else logits

    def our_name_of(self) -> dict[str, str]:
        """Our name of every tensor of the published model."""
        names = list(self.theirs.state_dict())
        tagged = {name: torch.tensor(float(i + 1)) for i, name in enumerate(names)}
        return {names[int(tag) - 1]: ours for ours, tag in PUBLISHED_NAMES[self.name](tagged).items()}


# --- the same numbers


def logit_difference(pair: Pair, waveform: Tensor, precision: str) -> float:
    with torch.inference_mode():
        expected = pair.logits_of(pair.theirs, waveform)
        with autocast(waveform, precision):
            found = pair.logits_of(pair.ours, waveform)
    return (found.float() - expected).abs().max().item()


def gradient_differences(pair: Pair, waveform: Tensor) -> list[float]:
    """At five levels, lowest first: where two values are almost alike, rounding decides which is the maximum and gets
    the gradient, and either code is then off by a few thousandths of what double precision gives."""
    return sorted(gradient_difference(pair, gain * waveform) for gain in (1, 0.99, 0.98, 0.97, 0.96))


def gradient_difference(pair: Pair, waveform: Tensor) -> float:
    gradients = []
    for model in (pair.ours, pair.theirs):
        model = without_dropout(copy.deepcopy(model)).train()
        probe = copy.copy(pair)
        if model.__class__ is pair.theirs.__class__:
            probe.theirs = model
        F.cross_entropy(probe.logits_of(model, waveform), targets(waveform)).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    ours, theirs = gradients
    names = pair.our_name_of()
    theirs = {names[name]: grad for name, grad in theirs.items() if names[name] in ours}
    if theirs.keys() != ours.keys():
        raise SystemExit(f"gradients reach different parameters: {sorted(theirs.keys() ^ ours.keys())}")
    difference = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    return (difference / sum(grad.double().square().sum() for grad in theirs.values())).sqrt().item()


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def targets(waveform: Tensor) -> Tensor:
    return torch.arange(len(waveform), device=waveform.device) % 2


def autocast(waveform: Tensor, precision: str):
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(waveform.device.type, dtype=DTYPES[precision])


# --- time and memory


def compare(pair: Pair, waveform: Tensor, precision: str, options: argparse.Namespace) -> bool:
    """Print ratios if the numbers agree; the reference always runs in fp32. Returns whether they did."""
    difference = logit_difference(pair, waveform, precision)
    agree = difference <= LOGIT_TOLERANCE[precision]
    print(f"  largest logit difference {difference:.1e} (tolerance {LOGIT_TOLERANCE[precision]:.0e})")
    if precision == "fp32" and len(waveform) > 1:
        low, _, difference, _, high = gradient_differences(pair, waveform)
        agree &= difference <= GRADIENT_TOLERANCE
        spread = f"median over 5 levels, {low:.1e} to {high:.1e}"
        print(f"  gradient difference {difference:.1e} of its norm ({spread}; tolerance {GRADIENT_TOLERANCE:.0e})")
    if not agree:
        print("  REFUSED: the outputs differ by more than the tolerance; no ratio is printed")
        return False

    score = {"reference": scoring(pair, pair.theirs, waveform, "fp32")}
    score["ours"] = scoring(pair, pair.ours, waveform, precision)
    if options.device == "cpu" and precision == "fp32":
        score["ours, ONNX Runtime"] = exported_scoring(pair.ours, waveform)
    print_ratios("scoring", take_turns(score, waveform, options.turns), len(waveform))
    if len(waveform) > 1:
        train = {"reference": training_step(pair, pair.theirs, waveform, "fp32")}
        train["ours"] = training_step(pair, pair.ours, waveform, precision)
        lean = recomputing(pair.ours)
        if lean:
            train["ours, recomputing"] = training_step(pair, lean, waveform, precision)
        print_ratios("training step", take_turns(train, waveform, options.turns), len(waveform))
        print_memory(pair, waveform, precision)
    return True


def recomputing(model: nn.Module) -> nn.Module | None:
    if not hasattr(getattr(model, "encoder", None), "recompute"):
        return None
    model = copy.deepcopy(model)
    model.encoder.recompute = True
    return model


def scoring(pair: Pair, model: nn.Module, waveform: Tensor, precision: str) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode(), autocast(waveform, precision):
            pair.logits_of(model, waveform)

    return run


def exported_scoring(model: nn.Module, waveform: Tensor) -> Callable[[], None]:
    with tempfile.TemporaryDirectory() as folder:
        scorer = OnnxScorer(export_onnx(model, Path(folder) / "model.onnx"))
    return lambda: scorer(waveform)


def training_step(pair: Pair, model: nn.Module, waveform: Tensor, precision: str) -> Callable[[], None]:
    """Forward, loss, backward and Adam, on a copy of the model."""
    probe, model = copy.copy(pair), copy.deepcopy(model).train()
    if model.__class__ is pair.theirs.__class__:
        probe.theirs = model
    optimiser = torch.optim.Adam(model.parameters(), 1e-4, weight_decay=1e-4)

    def run() -> None:
        optimiser.zero_grad()
        with autocast(waveform, precision):
            loss = F.cross_entropy(probe.logits_of(model, waveform).float(), targets(waveform))
        loss.backward()
        optimiser.step()

    return run


def take_turns(contenders: dict[str, Callable[[], None]], waveform: Tensor, turns: int) -> dict[str, list[float]]:
    """Seconds of every contender in every turn, after two unmeasured ones."""
    seconds = {name: [] for name in contenders}
    for turn in range(-2, turns):
        for name, run in contenders.items():
            synchronise(waveform)
            start = time.perf_counter()
            run()
            synchronise(waveform)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise(waveform: Tensor) -> None:
    if waveform.is_cuda:
        torch.cuda.synchronize(waveform.device)


def print_ratios(what: str, seconds: dict[str, list[float]], batch_size: int) -> None:
    reference = np.array(seconds["reference"])
    for name, values in seconds.items():
        line = f"  {what:14} {name:20} {1e3 * np.median(values) / batch_size:8.1f} ms an utterance"
        if name != "reference":
            ratios = reference / np.array(values)
            line += f"   {np.median(ratios):5.2f} x   ({ratios.min():.2f} to {ratios.max():.2f})"
        print(line)


def print_memory(pair: Pair, waveform: Tensor, precision: str) -> None:
    """What a training step keeps for its backward pass, and the most it holds at any moment."""
    rows = {"reference": (pair.theirs, "fp32"), "ours": (pair.ours, precision)}
    lean = recomputing(pair.ours)
    if lean:
        rows["ours, recomputing"] = (lean, precision)
    measured = {name: step_memory(pair, model, waveform, p) for name, (model, p) in rows.items()}
    for name, (kept, peak) in measured.items():
        line = f"  {'memory':14} {name:20} {kept / 1e6 / len(waveform):8.1f} MB kept, "
        line += f"{peak / 1e6 / len(waveform):7.1f} MB at the peak, an utterance"
        if name != "reference":
            line += f"   {kept / measured['reference'][0]:.2f} and {peak / measured['reference'][1]:.2f} of it"
        print(line)


def step_memory(pair: Pair, model: nn.Module, waveform: Tensor, precision: str) -> tuple[int, int]:
    """Bytes allocated by a training step: when the forward pass has ended, and at the peak."""
    probe, model = copy.copy(pair), copy.deepcopy(model).train()
    if model.__class__ is pair.theirs.__class__:
        probe.theirs = model

    def forward() -> Tensor:
        with autocast(waveform, precision):
            return F.cross_entropy(probe.logits_of(model, waveform).float(), targets(waveform))

    if waveform.is_cuda:
        device = waveform.device
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        loss = forward()
        kept = torch.cuda.memory_allocated(device) - before
        loss.backward()
        return kept, torch.cuda.max_memory_allocated(device) - before

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees the allocations of one thread
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = forward()
            with torch.profiler.record_function("forward has ended"):
                pass
            loss.backward()
    finally:
        torch.set_num_threads(threads)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held, kept, peak = 0, 0, 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        elif event.name() == "forward has ended":
            kept = held
    return kept, peak


# --- alone: how far from the machine's limit


class BytesMoved(TorchDispatchMode):
    """Counts the bytes that operations read and write, if each goes to memory and back."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.total += sum(value.nbytes for value in tensors if isinstance(value, Tensor))
        return result


def measure_alone(model: nn.Module, waveform: Tensor, precision: str, options: argparse.Namespace) -> None:
    pair = argparse.Namespace(name="", theirs=None)
    pair.logits_of = lambda model, waveform: model(waveform).logits
    contenders = {"scoring": scoring(pair, model, waveform, precision)}
    if len(waveform) > 1:
        step = copy.deepcopy(model).train()
        optimiser = torch.optim.Adam(step.parameters(), 1e-4)

        def train() -> None:
            optimiser.zero_grad()
            with autocast(waveform, precision):
                loss = F.cross_entropy(step(waveform).logits.float(), targets(waveform))
            loss.backward()
            optimiser.step()

        contenders["training step"] = train
    contenders["matrix product"], product_flop = matrix_product(waveform, precision)
    contenders["copy"], copy_bytes = big_copy(waveform)
    seconds = {name: np.median(v) for name, v in take_turns(contenders, waveform, options.turns).items()}
    flop_rate, byte_rate = product_flop / seconds["matrix product"], copy_bytes / seconds["copy"]
    print(f"  this machine: {flop_rate / 1e9:,.0f} GFLOP/s in matrix products, {byte_rate / 1e9:.1f} GB/s in copies")

    flop, moved = count_work(model, waveform)
    for name, passes in (("scoring", 1), ("training step", 3)):  # a backward pass is about two forward ones
        if name in seconds:
            best = passes * flop / flop_rate
            print(
                f"  {name:14} {1e3 * seconds[name] / len(waveform):8.1f} ms an utterance, "
                f"{seconds[name] / best:.2f} x the {1e3 * best / len(waveform):.1f} ms that its "
                f"{passes * flop / 1e9 / len(waveform):.1f} GFLOP take at that rate; run operation by operation "
                f"through memory it would take {1e3 * passes * moved / byte_rate / len(waveform):.1f} ms"
            )


def matrix_product(waveform: Tensor, precision: str) -> tuple[Callable[[], None], float]:
    size = 8192 if waveform.is_cuda else 2048
    a = torch.randn(size, size, device=waveform.device, dtype=DTYPES.get(precision, torch.float32))
    return lambda: torch.mm(a, a), 2.0 * size**3


def big_copy(waveform: Tensor) -> tuple[Callable[[], None], float]:
    source = torch.ones(2**26, device=waveform.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.nbytes


def count_work(model: nn.Module, waveform: Tensor) -> tuple[float, float]:
    """Floating-point operations and bytes of a forward pass as defined, on whole maps."""
    model = copy.deepcopy(model).requires_grad_(False)  # the counter hooks into gradients where there are any
    counter, moved = FlopCounterMode(display=False), BytesMoved()
    with torch.no_grad(), fast.disabled(), counter, moved:
        model(waveform)
    return counter.get_total_flops(), moved.total


if __name__ == "__main__":
    sys.exit(main())
