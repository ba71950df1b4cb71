"""Training losses: weighted cross-entropy, one-class softmax, P2SGrad.

Each takes the model's logits and embedding and a target in 0 .. 1, the share of bona fide in each example:
1 and 0 for plain trials, fractions for mixtures. One-class softmax and P2SGrad read the embedding, hold class
directions of their own (train them with the model, keep them with its weights) and define
`.logits(embedding)`, which scoring uses in place of the model's logits; as everywhere, a higher logit 1 means
more bona fide. `.score_kind` says in words what that score is: files that hold scores carry it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfake_utils.conventions import BONAFIDE, SPOOF, ConfigError


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy of the two logits with class weights: sum(t w nll) / sum(t w) over examples and classes.

    For hard labels it equals `torch.nn.CrossEntropyLoss(weight=...)`; for fractional ones the weights still
    normalise it, where torch would divide by the batch size.

    Args:
        class_weights: of (spoof, bona fide), positive. The default is the AASIST recipe's (arXiv 2110.01200),
            which answers the 1 : 9 imbalance of ASVspoof 2019 LA.

    Raises:
        ConfigError: a weight that is not positive.

    >>> loss = WeightedCrossEntropy((0.1, 0.9))
    >>> even = loss(torch.zeros(4, 2), torch.zeros(4, 8), torch.tensor([0.0, 0.0, 1.0, 0.5]))
    >>> round(even.item(), 4)  # log 2
    0.6931
    """

    score_kind = "logit of bona fide, higher is more bona fide"

    def __init__(self, class_weights: tuple[float, float] = (0.1, 0.9)):
        super().__init__()
        if len(class_weights) != 2 or min(class_weights) <= 0:
            raise ConfigError(
                f"class weights {tuple(class_weights)}: expected two positive numbers, spoof and bona fide"
            )
        self.register_buffer("class_weights", torch.tensor(class_weights), persistent=False)

    def forward(self, logits: Tensor, embedding: Tensor, target: Tensor) -> Tensor:
        """Logits (B, 2), embedding (ignored), target (B,) in 0 .. 1; a scalar in float32."""
        weight = torch.stack([1 - target, target], dim=1).float() * self.class_weights
        return -(weight * F.log_softmax(logits.float(), dim=1)).sum() / weight.sum()

    def mass(self, target: Tensor) -> Tensor:
        """What the loss of this batch is divided by: parts of a batch are joined in proportion to it."""
        return ((1 - target) * self.class_weights[0] + target * self.class_weights[1]).sum()


class OneClassSoftmax(nn.Module):
    """Pull bona fide embeddings towards one direction, keep all others away from it.

    With c = cos(embedding, direction), a bona fide example costs softplus(scale (margin_bonafide - c)) and a
    spoofed one softplus(scale (c - margin_spoof)), averaged over the batch.

    Args:
        embedding_dim: D.
        margin_bonafide: cosine bona fide examples should exceed, -1 .. 1.
        margin_spoof: cosine spoofed examples should stay below, below `margin_bonafide`.
        scale: steepness alpha, positive.
        generator: source of the initial direction; None is torch's global one.

    Raises:
        ConfigError: margins or scale out of range.

    Source: Zhang, Jiang and Duan, "One-class learning towards synthetic voice spoofing detection",
    arXiv 2010.13995, with its margins 0.9 and 0.2 and scale 20.
    """

    score_kind = "cosine to the direction of bona fide, -1 to 1, higher is more bona fide"

    def __init__(
        self,
        embedding_dim: int,
        margin_bonafide: float = 0.9,
        margin_spoof: float = 0.2,
        scale: float = 20.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not -1 <= margin_spoof < margin_bonafide <= 1 or scale <= 0:
            raise ConfigError(
                "one-class softmax: expected -1 <= margin_spoof < margin_bonafide <= 1 and a positive scale, "
                f"got {margin_spoof}, {margin_bonafide}, {scale}"
            )
        self.margin_bonafide, self.margin_spoof, self.scale = margin_bonafide, margin_spoof, scale
        self.direction = nn.Parameter(torch.randn(1, embedding_dim, generator=generator))

    def forward(self, logits: Tensor, embedding: Tensor, target: Tensor) -> Tensor:
        """Logits (ignored), embedding (B, D), target (B,) in 0 .. 1; a scalar in float32."""
        cosine = _cosine(embedding, self.direction).squeeze(1)
        target = target.float()
        bonafide = F.softplus(self.scale * (self.margin_bonafide - cosine))
        spoof = F.softplus(self.scale * (cosine - self.margin_spoof))
        return (target * bonafide + (1 - target) * spoof).mean()

    def mass(self, target: Tensor) -> Tensor:
        """The number of examples: parts of a batch are joined in proportion to it."""
        return torch.ones_like(target).sum()

    def logits(self, embedding: Tensor) -> Tensor:
        """(B, D) to (B, 2): minus the cosine and the cosine, so logit 1 is the paper's score."""
        cosine = _cosine(embedding, self.direction)
        return torch.cat([-cosine, cosine], dim=1)


class P2SGrad(nn.Module):
    """Squared error between the cosines to two class directions and the target shares.

    The published method defines a gradient, (cos - target) d cos, rather than a loss; the mean squared error
    of cosines is the loss with that gradient, and has neither margin nor scale to choose.

    Args:
        embedding_dim: D.
        generator: source of the initial directions; None is torch's global one.

    Sources: Zhang et al., "P2SGrad: refined gradients for optimizing deep face models", CVPR 2019, equation
    11; for countermeasures Wang and Yamagishi, arXiv 2103.11326.
    """

    score_kind = OneClassSoftmax.score_kind

    def __init__(self, embedding_dim: int, generator: torch.Generator | None = None):
        super().__init__()
        self.directions = nn.Parameter(torch.randn(2, embedding_dim, generator=generator))

    def forward(self, logits: Tensor, embedding: Tensor, target: Tensor) -> Tensor:
        """Logits (ignored), embedding (B, D), target (B,) in 0 .. 1; a scalar in float32."""
        shares = torch.stack([1 - target, target], dim=1).float()
        return F.mse_loss(_cosine(embedding, self.directions), shares)

    def mass(self, target: Tensor) -> Tensor:
        """The number of examples: parts of a batch are joined in proportion to it."""
        return torch.ones_like(target).sum()

    def logits(self, embedding: Tensor) -> Tensor:
        """(B, D) to (B, 2): the cosines to the spoof and the bona fide direction."""
        return _cosine(embedding, self.directions)


def distillation_loss(logits: Tensor, teacher_log_odds: Tensor, temperature: float) -> Tensor:
    """Cross-entropy with a teacher's softened answer: T^2 times the mean of -q log p - (1 - q) log(1 - p).

    q and p are the teacher's and the student's probability of bona fide, each the sigmoid of its log-odds divided by
    the temperature T: the softmax of Hinton et al., equation 1, of two classes. Their gradients shrink with T^2, which
    the factor takes back (their section 2), so that T does not change what the labels weigh beside it.

    Args:
        logits: the student's, (B, 2), spoof and bona fide.
        teacher_log_odds: (B,), natural logarithm of the odds of bona fide.
        temperature: T, positive; 1 leaves the answers as they are.

    Returns:
        A scalar in float32.

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531.

    >>> distillation_loss(torch.zeros(1, 2), torch.zeros(1), 2.0).item() / 4  # log 2
    0.6931471824645996
    """
    student = (logits[:, BONAFIDE] - logits[:, SPOOF]).float() / temperature
    softened = torch.sigmoid(teacher_log_odds.float() / temperature)
    return temperature**2 * F.binary_cross_entropy_with_logits(student, softened)


def _cosine(embedding: Tensor, directions: Tensor) -> Tensor:
    """Cosines of (B, D) embeddings with (C, D) directions, (B, C), in float32 under any autocast."""
    shortest = 1e-4  # the gradient is about 1 / length: one of a vanishing embedding must fit half precision
    with torch.autocast(embedding.device.type, enabled=False):
        embedding = F.normalize(embedding.float(), dim=1, eps=shortest)
        return embedding @ F.normalize(directions.float(), dim=1, eps=shortest).t()


# name, as in the training configuration -> constructor
LOSSES = {
    "cross_entropy": lambda embedding_dim, **settings: WeightedCrossEntropy(**settings),
    "oc_softmax": OneClassSoftmax,
    "p2sgrad": P2SGrad,
}


def build_loss(name: str, embedding_dim: int, **settings) -> nn.Module:
    """The loss called `name`, one of `LOSSES`, for embeddings of `embedding_dim`.

    Raises:
        ConfigError: unknown name or setting, or a setting out of range.

    >>> build_loss("oc_softmax", 160).direction.shape
    torch.Size([1, 160])
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown loss {name!r}: expected one of {', '.join(LOSSES)}")
    try:
        return LOSSES[name](embedding_dim, **settings)
    except TypeError as error:
        raise ConfigError(f"loss {name}: {error}") from error
