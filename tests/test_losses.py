"""Losses against closed forms written here, against torch for hard labels, and their scoring polarity."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models.losses import LOSSES, OneClassSoftmax, P2SGrad, WeightedCrossEntropy, build_loss

NO_LOGITS = torch.zeros(1, 2)  # what a loss of embeddings gets where it must not look


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 2**31), st.integers(1, 32), st.floats(0.01, 10.0))
def test_cross_entropy_equals_torch_for_hard_labels(seed, batch, bonafide_weight):
    generator = seeded(seed)
    logits = 5 * torch.randn(batch, 2, generator=generator)
    labels = torch.randint(2, (batch,), generator=generator)
    ours = WeightedCrossEntropy((0.3, bonafide_weight))(logits, NO_LOGITS, labels.float())
    theirs = F.cross_entropy(logits, labels, weight=torch.tensor([0.3, bonafide_weight]))
    torch.testing.assert_close(ours, theirs)


def test_cross_entropy_of_a_mixture_is_the_weighted_mean_written_out():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # P(bona fide) = 3/4
    loss = WeightedCrossEntropy((0.1, 0.9))(logits, NO_LOGITS, torch.tensor([0.25]))
    spoof, bonafide = 0.75 * 0.1, 0.25 * 0.9
    assert loss.item() == pytest.approx(
        (spoof * math.log(4) + bonafide * math.log(4 / 3)) / (spoof + bonafide), rel=1e-6
    )


def test_default_weights_are_the_published_ones_in_the_order_of_the_logits():
    assert WeightedCrossEntropy().class_weights.tolist() == pytest.approx([0.1, 0.9])
    # One confident mistake of each kind: missing the bona fide trial must dominate.
    logits = torch.tensor([[10.0, 0.0], [0.0, 0.0]])
    assert WeightedCrossEntropy()(logits, NO_LOGITS, torch.tensor([1.0, 0.0])) > 8.9


def placed(loss, cosine):
    """An embedding whose cosine with the loss's first direction is `cosine`, of arbitrary length."""
    direction = F.normalize(loss.direction.detach()[0], dim=0)
    other = torch.zeros_like(direction)
    other[0], other[1] = -direction[1], direction[0]  # orthogonal
    other = F.normalize(other, dim=0)
    return 7.3 * (cosine * direction + math.sqrt(1 - cosine**2) * other).unsqueeze(0)


@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.2, 0.55, 0.9, 0.99])
@pytest.mark.parametrize("label", [0.0, 1.0, 0.3])
def test_one_class_softmax_is_its_closed_form(cosine, label):
    loss = OneClassSoftmax(8, generator=seeded())
    value = loss(NO_LOGITS, placed(loss, cosine), torch.tensor([label])).item()
    bonafide = math.log1p(math.exp(20 * (0.9 - cosine)))
    spoof = math.log1p(math.exp(20 * (cosine - 0.2)))
    assert value == pytest.approx(label * bonafide + (1 - label) * spoof, rel=1e-4, abs=1e-6)


def test_one_class_score_is_the_cosine_and_higher_is_bona_fide():
    loss = OneClassSoftmax(8, generator=seeded())
    embeddings = torch.cat([placed(loss, cosine) for cosine in (-0.5, 0.1, 0.95)])
    logits = loss.logits(embeddings)
    torch.testing.assert_close(logits[:, 1], torch.tensor([-0.5, 0.1, 0.95]))
    assert (logits[:, 1] - logits[:, 0]).diff().min() > 0  # the log-odds order the same way


def test_p2sgrad_is_zero_at_perfect_directions_and_its_gradient_is_the_published_one():
    loss = P2SGrad(4, generator=seeded())
    with torch.no_grad():
        loss.directions.copy_(torch.eye(4)[:2] * torch.tensor([[3.0], [0.5]]))  # lengths must not matter
    perfect = torch.tensor([[2.0, 0, 0, 0], [0, 9.0, 0, 0]])
    assert loss(NO_LOGITS, perfect, torch.tensor([0.0, 1.0])).item() == pytest.approx(0.0, abs=1e-12)

    embedding = torch.tensor([[0.3, 0.5, -0.2, 0.8]], requires_grad=True)
    cosines = [F.cosine_similarity(embedding, direction, dim=1)[0] for direction in torch.eye(4)[:2]]
    slopes = [torch.autograd.grad(cosine, embedding, retain_graph=True)[0] for cosine in cosines]
    expected = sum(  # equation 11, summed over classes: (cos - target) d cos; the mean of squares halves 2
        (cosine - target) * slope for cosine, slope, target in zip(cosines, slopes, (0.0, 1.0), strict=True)
    )
    (gradient,) = torch.autograd.grad(loss(NO_LOGITS, embedding, torch.tensor([1.0])), embedding)
    torch.testing.assert_close(gradient, expected)


def test_p2sgrad_logits_are_cosines_spoof_first():
    loss = P2SGrad(3, generator=seeded())
    embeddings = torch.randn(5, 3, generator=seeded(1))
    expected = torch.stack([F.cosine_similarity(embeddings, row, dim=1) for row in loss.directions], dim=1)
    torch.testing.assert_close(loss.logits(embeddings), expected)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_fractional_target_lies_between_the_hard_ones_for_one_example(name):
    loss = build_loss(name, 6)
    generator = seeded(2)
    logits, embedding = torch.randn(1, 2, generator=generator), torch.randn(1, 6, generator=generator)
    low, middle, high = sorted(loss(logits, embedding, torch.tensor([share])).item() for share in (0.0, 0.5, 1.0))
    assert low < high and low <= middle <= high


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 3e4])  # 3e4 is close to the largest half-precision number
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_and_gradients_are_finite_at_extreme_sizes_and_in_half_precision(name, size, dtype):
    loss = build_loss(name, 16)
    generator = seeded(3)
    logits = (size * torch.randn(6, 2, generator=generator).clamp(-1, 1)).to(dtype).requires_grad_()
    embedding = (size * torch.randn(6, 16, generator=generator).clamp(-1, 1)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        value = loss(logits, embedding, torch.tensor([0.0, 1, 1, 0, 0.3, 1]))
    assert value.dtype == torch.float32
    value.backward()
    read = logits if name == "cross_entropy" else embedding
    tensors = [value, read.grad, *(parameter.grad for parameter in loss.parameters())]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.mark.parametrize("name", ["oc_softmax", "p2sgrad"])
def test_descending_the_loss_separates_the_classes_in_its_own_score(name):
    loss = build_loss(name, 4, generator=seeded(4))
    labels = torch.arange(40) % 2
    embeddings = torch.randn(40, 4, generator=seeded(5))
    embeddings[:, 0] += 4.0 * labels - 2.0
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        loss(NO_LOGITS, embeddings, labels.float()).backward()
        optimiser.step()
    logits = loss.logits(embeddings).detach()
    for score in (logits[:, 1], logits[:, 1] - logits[:, 0]):
        above = score[labels == 1][:, None] > score[labels == 0]
        assert above.float().mean() > 0.95  # area under the ROC curve


def test_initial_directions_come_from_the_generator_alone():
    for name in ("oc_softmax", "p2sgrad"):
        torch.manual_seed(1)
        first = build_loss(name, 5, generator=seeded(6))
        torch.manual_seed(2)
        second = build_loss(name, 5, generator=seeded(6))
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("focal", {}, "expected one of"),
        ("cross_entropy", {"class_weights": (0.0, 1.0)}, "positive"),
        ("cross_entropy", {"class_weights": (1.0,)}, "two"),
        ("oc_softmax", {"margin_spoof": 0.95}, "margin"),
        ("oc_softmax", {"scale": 0.0}, "scale"),
        ("p2sgrad", {"margin": 0.2}, "margin"),
    ],
)
def test_bad_settings_are_refused_in_words(name, settings, told):
    with pytest.raises(ConfigError, match=told):
        build_loss(name, 4, **settings)
