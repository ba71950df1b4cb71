"""Weights on disk: safetensors with a JSON companion, published .pth files, and resumable training state.

Loading never runs code from the file: safetensors, or torch.load(weights_only=True).
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from deepfake_utils.conventions import CheckpointError
from deepfake_utils.files import atomic_write
from deepfake_utils.models import MODELS, PUBLISHED_NAMES, build_model
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.models.losses import WeightedCrossEntropy, build_loss


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
    """Build a countermeasure and load its weights.

    Args:
        name: one of `models.MODELS`; may be left out for weights that have their JSON beside them.
        weights: a .safetensors file of this project, or a published .pth / .pt state dictionary.
            None gives fresh, untrained weights.
        **config: fields of the model's configuration to change.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, or holds another model's weights.
        ConfigError: unknown model or setting.

    >>> model = load_model("aasist-l")
    >>> sum(p.numel() for p in model.parameters())
    85306
    """
    if weights is None:
        if name is None:
            raise CheckpointError(f"load_model needs a name or a weights file; names: {', '.join(MODELS)}")
        return build_model(name, **config).eval()
    path = Path(weights)
    if not path.is_file():
        raise CheckpointError(f"weights {path} do not exist: expected a .safetensors or .pth file")
    companion = _read_companion(path)
    if name is not None and companion.get("model", name) != name:
        raise CheckpointError(
            f"{path} holds weights of {companion['model']!r}, not of {name!r}: drop the name or change the file"
        )
    state = _read_tensors(path)
    name = companion.get("model", name) or _recognise(path, state)
    model = build_model(name, **(_with_tuples(companion.get("model_options", {})) | config))
    if companion.get("loss", "cross_entropy") != "cross_entropy":
        model = scoring_model(model, build_loss(companion["loss"], embedding_dim(model)))
    own = model.state_dict()
    if name in PUBLISHED_NAMES and set(state) != set(own):
        try:
            state = PUBLISHED_NAMES[name](state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    _check_same_tensors(path, name, own, state)
    model.load_state_dict(state)
    return model.eval()


def _with_tuples(options: dict) -> dict:
    """JSON knows lists only; configurations hold tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _read_companion(path: Path) -> dict:
    companion = path.with_suffix(".json")
    if path.suffix != ".safetensors" or not companion.is_file():
        return {}
    try:
        return json.loads(companion.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{companion} is not valid JSON ({error}): restore it, or delete it and name the model"
        ) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch state dictionary"
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds on a damaged file; torch's texts advise to switch its safety off
        raise CheckpointError(
            f"{path} cannot be read as weights: it is no {kind}, or is damaged; were audio and weights swapped?"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds {type(state).__name__}, not a dictionary of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _recognise(path: Path, state: dict[str, Tensor]) -> str:
    """The model whose default configuration has exactly these tensors, under our names or the published ones."""
    for name in MODELS:
        own = build_model(name).state_dict()
        try:
            ours = state if set(state) == set(own) else PUBLISHED_NAMES.get(name, dict)(state)
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
