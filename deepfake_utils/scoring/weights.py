"""Weights on disk: safetensors with a JSON companion, published .pth files, and resumable training state.

Loading never runs code from the file: safetensors, or torch.load(weights_only=True).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from deepfake_utils.conventions import CheckpointError, ConfigError
from deepfake_utils.files import atomic_write, stands_in
from deepfake_utils.models import MODELS, PUBLISHED_NAMES, build_model
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.models.losses import WeightedCrossEntropy, build_loss
from deepfake_utils.scoring.published import PUBLISHED, published_file

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = {  # weights that come with the package, by the kind of machine they are fitted to
    "server": ASSETS / "open.safetensors",
    "laptop": ASSETS / "laptop.onnx",
    "phone": ASSETS / "phone.onnx",
    "tiny": ASSETS / "tiny.onnx",
}

# What wraps the tensors' names in a file: data-parallel training, torch.compile, Lightning and the like.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # entries that hold the tensors


class ScoredByLoss(nn.Module):
    """A countermeasure whose logits come from the directions its loss has learned (one-class softmax, P2SGrad)."""

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    @property
    def config(self):
        return self.model.config

    @property
    def min_samples(self) -> int:
        return self.model.min_samples

    def forward(self, waveform: Tensor) -> CMOutput:
        embedding = self.model(waveform).embedding
        return CMOutput(self.criterion.logits(embedding), embedding)


@torch.no_grad()
def embedding_dim(model: nn.Module) -> int:
    """The length D of a countermeasure's embedding, read from one short forward pass."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    dim = model(torch.zeros(1, model.min_samples, device=device)).embedding.shape[1]
    model.train(was_training)
    return dim


def scoring_model(model: nn.Module, criterion: nn.Module) -> nn.Module:
    """The model that scores: itself, or with the loss's own output layer where the loss has one."""
    return ScoredByLoss(model, criterion) if hasattr(criterion, "logits") else model


def score_kind(model: nn.Module) -> str:
    """What the scores of this model are, in words, for the files that hold them."""
    return getattr(getattr(model, "criterion", None), "score_kind", WeightedCrossEntropy.score_kind)


def save_weights(
    path: str | os.PathLike, model: nn.Module, *, name: str, loss: str = "cross_entropy", facts: dict | None = None
) -> Path:
    """Write weights as safetensors, and beside them the JSON that `load_model` rebuilds the model from.

    Args:
        path: ends in .safetensors; the JSON has the same name with .json.
        model: what `scoring_model` gave.
        name: its name in `models.MODELS`.
        loss: the loss it was trained with.
        facts: anything worth keeping with the weights: training configuration, dev EER, versions.
    """
    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    companion = {
        "format": 1,
        "model": name,
        "model_options": dataclasses.asdict(model.config),
        "loss": loss,
        "score": score_kind(model),
        **(facts or {}),
    }
    with atomic_write(path) as part:
        safetensors.torch.save_file(tensors, part)
    with atomic_write(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(companion, indent=2) + "\n")
    return path


def load_model(name: str | None = None, weights: str | os.PathLike | None = None, **config) -> nn.Module:
    """Build a countermeasure and load its weights; the caller's random numbers go on as if nothing had been built.

    Args:
        name: one of `models.MODELS`; may be left out for weights that have their JSON beside them or fit one model.
        weights: a .safetensors file of this project, a .pth / .pt state dictionary (also inside of a checkpoint, and
            with the prefixes of data-parallel or compiled training), or the name of published weights ("aasist",
            "aasist-l"). None gives fresh weights, to be trained: scoring with them warns.
        **config: fields of the model's configuration to change.

    Returns:
        The model on the CPU, in evaluation mode, in float32.

    Raises:
        CheckpointError: the file is missing, damaged, something else, or holds another model's weights.
        ConfigError: unknown model or setting.

    >>> model = load_model("aasist-l")
    >>> sum(p.numel() for p in model.parameters())
    85306
    """
    if weights is None:
        if name is None:
            raise CheckpointError(f"load_model needs a name or a weights file; names: {', '.join(MODELS)}")
        model = build_model(name, **config).eval()
        model.fresh = _checksum(model)
        return model
    path = weights_file(weights)
    companion = read_companion(path)
    if name is not None and companion.get("model", name) != name:
        raise CheckpointError(
            f"{path} holds weights of {companion['model']!r}, not of {name!r}: drop the name or change the file"
        )
    state = _read_tensors(path)
    name = companion.get("model", name) or _recognise(path, state)
    unused = torch.Generator()  # what it draws is overwritten; the global generator is left alone
    model = build_model(name, generator=unused, **(companion.get("model_options", {}) | config))
    if companion.get("loss", "cross_entropy") != "cross_entropy":
        model = scoring_model(model, build_loss(companion["loss"], embedding_dim(model), generator=unused))
    own = model.state_dict()
    try:
        state = _under_our_names(name, state, own)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _check_same_tensors(path, name, own, state)
    model.load_state_dict(state)
    return model.eval()


def is_untrained(model: nn.Module) -> bool:
    """Whether a model still has the fresh weights that `load_model` gave it."""
    return getattr(model, "fresh", None) == _checksum(model)


def weights_file(weights: str | os.PathLike) -> Path:
    """The file that `weights` means: itself, or that of shipped or published weights where it is their name.

    Raises:
        CheckpointError: there is no such file.
    """
    path = Path(weights)
    if not path.exists() and str(weights) in PUBLISHED:
        return published_file(str(weights))
    if not path.exists() and str(weights) in SHIPPED:
        path = SHIPPED[str(weights)]
    if not path.is_file():
        what = "are a folder" if path.is_dir() else "do not exist"
        raise CheckpointError(
            f"weights {path} {what}: expected a .safetensors, .pth or .onnx file, or one of "
            f"{', '.join((*SHIPPED, *PUBLISHED))}"
        )
    return path


def refuse_shipped_name(weights: str | os.PathLike) -> None:
    """Raise ConfigError where weights whose JSON is to be changed are named, not given as a file: they are everybody's
    that this package or cache serves."""
    if not Path(weights).exists():
        path = weights_file(weights)
        raise ConfigError(f"{weights} is {path} and its JSON serves all: copy both to a folder of yours, and name that")


def read_companion(path: Path) -> dict:
    """What the JSON beside weights says of them; nothing where there is none."""
    companion = path.with_suffix(".json")
    if path.suffix not in (".safetensors", ".onnx") or not companion.is_file():
        return {}
    try:
        facts = json.loads(companion.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{companion} is not valid JSON ({error}): restore it, or delete it and name the model"
        ) from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{companion} holds a {type(facts).__name__}, expected one JSON object")
    return facts


def _checksum(model: nn.Module) -> float:
    return float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, floating-point ones in float32: what follows has float32's thresholds."""
    _refuse_other_files(path)
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds on a damaged file; torch's texts advise to switch its safety off
        raise CheckpointError(_unreadable(path, error)) from error
    state = _tensors_in(content)
    if state is None:
        raise CheckpointError(
            f"{path} is readable but holds no model's tensors, only {_contents(content)}: expected a state dictionary, "
            f"by itself or under {', '.join(_WRAPPERS[:3])}"
        )
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _tensors_in(content, depth: int = 3) -> dict[str, Tensor] | None:
    """The state dictionary in what a file holds: itself, or under one of the usual entries of a checkpoint."""
    if not isinstance(content, dict) or depth == 0:
        return None
    for wrapper in _WRAPPERS:
        if (inner := _tensors_in(content.get(wrapper), depth - 1)) is not None:
            return inner
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return tensors if tensors and len(tensors) == len(content) else None


def _contents(content) -> str:
    """A few words on what a file holds instead of weights."""
    if isinstance(content, dict):
        shown = ", ".join(f"{str(key)!r} ({type(value).__name__})" for key, value in list(content.items())[:4])
        return f"a dictionary of {len(content)} entries: {shown}" if content else "an empty dictionary"
    return f"a {type(content).__name__}"


def _refuse_other_files(path: Path) -> None:
    """Name what is plainly no weights file: nothing, a Git LFS pointer, a web page, an exported model."""
    with path.open("rb") as file:
        start = file.read(512)
    what = stands_in(start)
    if not start:
        what = "is empty (0 bytes): copy or download it again"
    elif path.suffix == ".onnx":
        what = (
            what or "is an exported model: score with it as it is (--onnx, or Detector.load), it cannot be trained on"
        )
    if what:
        raise CheckpointError(f"{path} {what}")


def _unreadable(path: Path, error: Exception) -> str:
    """Why a file is not weights: a whole pickled object, a file of another kind, or damage."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if path.suffix != ".safetensors" and code and zipfile.is_zipfile(path):
        return (
            f"{path} holds a pickled {code[1]} and not tensors alone; loading it could run code, so it is not loaded: "
            "save model.state_dict() where the file was made"
        )
    kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch state dictionary"
    return f"{path} cannot be read as weights: it is no {kind}, or is damaged; were audio and weights swapped?"


def _bare(name: str) -> str:
    """A tensor's name without the prefixes of wrappers, in any order and number."""
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _under_our_names(name: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the names of the model `own`, from those of wrappers and published files."""
    if set(state) == set(own):
        return state
    bare = {_bare(key): value for key, value in state.items() if key != "n_averaged"}  # SWA counts beside them
    ours = {_bare(key): key for key in own}
    if set(bare) != set(ours) and name in PUBLISHED_NAMES:
        bare = PUBLISHED_NAMES[name](bare)
    return {ours.get(key, key): value for key, value in bare.items()}


def _recognise(path: Path, state: dict[str, Tensor]) -> str:
    """The model whose default configuration has exactly these tensors, under our names or the published ones."""
    for name in MODELS:
        own = build_model(name, generator=torch.Generator()).state_dict()
        try:
            ours = _under_our_names(name, state, own)
        except CheckpointError:
            continue
        if {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in own.items()}:
            return name
    raise CheckpointError(
        f"{path} has no {path.stem}.json beside it and fits none of {', '.join(MODELS)}: name the model it belongs to"
    )


def _check_same_tensors(path: Path, name: str, own: dict, state: dict) -> None:
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or shapes:
        parts = [f"{len(missing)} tensors missing (first {missing[0]})"] if missing else []
        parts += [f"{len(extra)} unknown (first {extra[0]})"] if extra else []
        parts += [f"{len(shapes)} of another shape (first {shapes[0]})"] if shapes else []
        raise CheckpointError(
            f"{path} does not hold weights of {name!r}: {', '.join(parts)}; is it another model or configuration?"
        )
