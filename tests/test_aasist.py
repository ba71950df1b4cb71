"""AASIST: the published logits, its layers against naive loops, and its fast encoder against the plain one."""

import copy
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from deepfake_utils.conventions import CROP_SAMPLES, CheckpointError, ConfigError
from deepfake_utils.machine import pick_device
from deepfake_utils.models import build_model, fast
from deepfake_utils.models.aasist import (
    AASISTConfig,
    HeterogeneousAttention,
    NodePooling,
    PairAttention,
    published_state_dict,
)
from deepfake_utils.models.aasist_transformer import AASISTTransformerConfig, positions
from deepfake_utils.models.encoder import ResidualBlock
from deepfake_utils.models.fast import blocks, fused, tiling
from deepfake_utils.models.fast.fused import LaterBlockTiles
from deepfake_utils.models.layers import CMOutput

PUBLISHED = {"aasist": "AASIST", "aasist-l": "AASIST-L"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(batch, n_samples, seed=1):
    return 0.1 * torch.randn(batch, n_samples, generator=seeded(seed))


def published(name, reference_data):
    model = build_model(name)
    path = reference_data / "published_weights" / f"{PUBLISHED[name]}.pth"
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(published_state_dict(state))
    return model.eval()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 12 frames, so that short maps have many tiles and every kind of edge."""
    monkeypatch.setattr(tiling, "TILE_FRAMES", 12)


# --- the published weights


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_logits_to_four_digits(name, device, reference_data):
    golden = pd.read_csv(reference_data / "published_weights" / "golden_logits.csv")
    files = {path.stem: path for path in (reference_data / "asvspoof2019_subset").rglob("*.flac")}
    clips = [soundfile.read(files[utterance], dtype="float32")[0] for utterance in golden["utterance"]]
    clips = np.stack([np.resize(clip, CROP_SAMPLES) for clip in clips])
    device = pick_device(device).device  # which switches TF32 off
    model = published(name, reference_data).to(device)
    with torch.inference_mode():
        outputs = [model(batch.to(device)) for batch in torch.from_numpy(clips).split(10)]
    output = CMOutput(*(torch.cat(part).cpu() for part in zip(*outputs, strict=True)))
    column = PUBLISHED[name]
    logits = golden[[f"{column}_logit_spoof", f"{column}_logit_bonafide"]].to_numpy()
    np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
    norms = golden[f"{column}_embedding_norm"].to_numpy()
    np.testing.assert_allclose(output.embedding.norm(dim=1), norms, atol=1e-4, rtol=0)


def test_published_state_keeps_every_tensor_and_drops_subnormal_values(reference_data):
    path = reference_data / "published_weights" / "AASIST.pth"
    state = torch.load(path, weights_only=True, map_location="cpu")
    renamed = published_state_dict(state)
    assert len(renamed) == len(state)
    for value, kept in zip(state.values(), renamed.values(), strict=True):
        torch.testing.assert_close(kept, value, atol=1e-37, rtol=0)
        if kept.is_floating_point():
            assert not ((kept != 0) & (kept.abs() < torch.finfo(torch.float32).tiny)).any()


def test_other_state_is_refused():
    with pytest.raises(CheckpointError, match="pos_S"):
        published_state_dict({"fc.weight": torch.zeros(1)})


# --- the graph layers, against loops over nodes


def attention_by_loops(layer, nodes, weight_of):
    n = len(nodes)
    scores = torch.empty(n, n, dtype=nodes.dtype)
    for i in range(n):
        for j in range(n):
            pair = torch.tanh(layer.pair(nodes[i] * nodes[j]))
            scores[i, j] = (pair @ weight_of(i, j)).squeeze() / layer.temperature
    weights = scores.softmax(1)
    attended = torch.stack([sum(weights[i, j] * nodes[j] for j in range(n)) for i in range(n)])
    return F.selu(layer.norm(layer.attended(attended) + layer.own(nodes)))


def test_pair_attention_is_the_loop_over_pairs():
    torch.manual_seed(0)
    layer = PairAttention(6, 4, 2.0).double().eval()
    nodes = torch.randn(2, 5, 6, generator=seeded(), dtype=torch.float64)
    expected = torch.stack([attention_by_loops(layer, graph, lambda i, j: layer.pair_weight) for graph in nodes])
    torch.testing.assert_close(layer(nodes), expected)


def test_heterogeneous_attention_weighs_pairs_by_the_graphs_they_join():
    torch.manual_seed(0)
    layer = HeterogeneousAttention(6, 4, 3.0).double().eval()
    temporal = torch.randn(2, 4, 6, generator=seeded(), dtype=torch.float64)
    spectral = torch.randn(2, 3, 6, generator=seeded(1), dtype=torch.float64)
    master = torch.randn(1, 1, 6, generator=seeded(2), dtype=torch.float64)
    found_temporal, found_spectral, found_master = layer(temporal, spectral, master)

    def weight_of(i, j):
        if (i < 4) != (j < 4):
            return layer.cross_weight
        return layer.temporal_weight if i < 4 else layer.spectral_weight

    for b in range(2):
        nodes = torch.cat([layer.temporal(temporal[b]), layer.spectral(spectral[b])])
        expected = attention_by_loops(layer, nodes, weight_of)
        torch.testing.assert_close(torch.cat([found_temporal[b], found_spectral[b]]), expected)
        scores = [torch.tanh(layer.master_pair(node * master[0, 0])) @ layer.master_weight for node in nodes]
        weights = (torch.cat(scores) / 3.0).softmax(0)
        attended = (weights[:, None] * nodes).sum(0)
        expected = layer.master_attended(attended) + layer.master_own(master[0, 0])
        torch.testing.assert_close(found_master[b, 0], expected)


@pytest.mark.parametrize(("n_nodes", "share", "n_kept"), [(10, 0.5, 5), (29, 0.7, 20), (1, 0.3, 1), (4, 1.0, 4)])
def test_pooling_keeps_the_best_nodes_scaled_by_their_ratings(n_nodes, share, n_kept):
    torch.manual_seed(0)
    pool = NodePooling(3, share).eval()
    nodes = torch.randn(2, n_nodes, 3, generator=seeded())
    kept = pool(nodes)
    assert kept.shape == (2, n_kept, 3)
    for b in range(2):
        ratings = pool.gate(nodes[b]).sigmoid()
        best = sorted(range(n_nodes), key=lambda i: -ratings[i, 0])[:n_kept]
        torch.testing.assert_close(kept[b], nodes[b, best] * ratings[best])


# --- the encoder's fast paths, against the plain block in double precision


def first_block():
    torch.manual_seed(0)
    return randomised(ResidualBlock(1, 6)), torch.randn(3, 1, 5, 40, generator=seeded(), dtype=torch.float64)


def later_block(in_channels=4):
    torch.manual_seed(0)
    x = torch.randn(3, in_channels, 5, 40, generator=seeded(), dtype=torch.float64)
    return randomised(ResidualBlock(in_channels, 6)), x


def randomised(block):
    """In double precision, with a norm that does something."""
    for norm in (block.norm,):
        nn.init.normal_(norm.weight, 1, 0.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return block.double()


BLOCKS = {
    "first": first_block,
    "same width": lambda: later_block(6),
    "wider": later_block,
}


def run_with_gradients(block, function, x):
    x = x.clone().requires_grad_()
    block.zero_grad()
    out = function(x)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    return out.detach(), x.grad, gradients


@pytest.mark.parametrize("n_frames", [40, 39, 38, 37, 36, 12, 7, 3])
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_a_block_and_its_gradients_equal_the_plain_ones(kind, training, n_frames, small_tiles):
    block, x = BLOCKS[kind]()
    x = x[..., :n_frames]
    block.train(training)
    oracle = copy.deepcopy(block)
    out, x_grad, gradients = run_with_gradients(block, block, x)
    expected_out, expected_x_grad, expected = run_with_gradients(oracle, oracle.plain, x)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(x_grad, expected_x_grad)
    assert gradients.keys() == expected.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-9, rtol=1e-7, msg=name)
    for name, value in block.named_buffers():
        torch.testing.assert_close(value, dict(oracle.named_buffers())[name], msg=name)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_without_gradients_equals_the_plain_one(kind, small_tiles):
    block, x = BLOCKS[kind]()
    block.eval()
    with torch.inference_mode():
        for n_frames in (40, 39, 38, 3):
            torch.testing.assert_close(block(x[..., :n_frames]), block.plain(x[..., :n_frames]))


@pytest.mark.parametrize("training", [True, False])
def test_the_first_block_on_whole_maps_as_on_a_gpu(training):
    block, x = first_block()
    block.train(training)
    oracle = copy.deepcopy(block)

    def whole(x):
        x = x.transpose(2, 3)
        folded = blocks.fold_norm(block.conv1, block.norm, *blocks._statistics(block, x))
        return blocks.whole_first_block(block, x, *folded).transpose(2, 3)

    out, x_grad, gradients = run_with_gradients(block, whole, x)
    expected_out, expected_x_grad, expected = run_with_gradients(oracle, oracle.plain, x)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(x_grad, expected_x_grad)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-9, rtol=1e-7, msg=name)


@pytest.mark.parametrize(("n_frames", "width", "bands_padding"), [(500, 2, 0), (500, 2, 1), (500, 1, 0), (1, 2, 1)])
def test_both_ways_to_a_weights_gradient_give_the_same(n_frames, width, bands_padding):
    x = torch.randn(2, 3, n_frames + 2, 9, generator=seeded(), dtype=torch.float64)
    n_bands = 9 + 2 * bands_padding - width + 1
    grad = torch.randn(2, 4, n_frames, n_bands, generator=seeded(), dtype=torch.float64)
    x, grad = (value.contiguous(memory_format=torch.channels_last) for value in (x, grad))
    weight = torch.zeros(4, 3, 3, width, dtype=torch.float64)
    _, *expected = fused.conv_gradient(grad, x, weight, (0, bands_padding), (False, True, True))
    found = fused.weight_gradient_by_products(grad, x, weight, bands_padding)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_threads_change_nothing(small_tiles):
    block, x = first_block()
    n_threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run_with_gradients(copy.deepcopy(block), block, x)[:2])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(n_threads)
    for out, x_grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(x_grad, results[0][1])


# --- where the fast paths are not taken


def kernels_used(block, x):
    """Whether a call of the block is one of its kernels."""
    with mock.patch.object(type(block), "plain", side_effect=RuntimeError("plain")):
        try:
            block(x)
        except RuntimeError as error:
            assert str(error) == "plain"
            return False
    return True


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_switch_and_the_table(kind):
    block, x = BLOCKS[kind]()
    used = {}
    for training in (True, False):
        block.train(training)
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient):
                used[training, gradient] = kernels_used(block, x)
                with fast.disabled():
                    assert not kernels_used(block, x)
                assert kernels_used(block, x) == used[training, gradient]
    assert used == {
        (True, True): True,
        (True, False): True,
        (False, False): True,
        (False, True): kind == "first",
    }
    assert not kernels_used(block.to("meta"), x.to("meta"))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_frozen_norm_stays_frozen(kind):
    """Fine-tuning with `norm.eval()` inside of a model in training: running statistics are used, and kept."""
    block, x = BLOCKS[kind]()
    block.train().norm.eval()
    oracle = copy.deepcopy(block)
    out, x_grad, gradients = run_with_gradients(block, block, x)
    expected_out, expected_x_grad, expected = run_with_gradients(oracle, oracle.plain, x)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(x_grad, expected_x_grad)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], msg=name)
    for name, value in block.named_buffers():
        assert torch.equal(value, dict(oracle.named_buffers())[name]), name


def test_a_frozen_norm_stays_frozen_while_blocks_are_recomputed():
    torch.manual_seed(0)
    model = build_model("aasist", channels=(4, 6), graph_dim=4, branch_dim=4, recompute=True)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    before = [norm.running_mean.clone() for norm in norms]
    model(noise(2, 4000)).logits.sum().backward()
    assert all(torch.equal(norm.running_mean, kept) for norm, kept in zip(norms, before, strict=True))
    assert all(norm.track_running_stats for norm in norms)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_pruned_weights_are_pruned_at_every_step(kind, training):
    trained = []
    for by_definition in (False, True):
        block, x = BLOCKS[kind]()
        block.train(training)
        for conv in (block.conv1, block.conv2):
            mask = torch.arange(conv.weight.numel()).view_as(conv.weight) % 2
            prune.custom_from_mask(conv, "weight", mask)
        optimiser = torch.optim.SGD(block.parameters(), 1e-3)
        for _ in range(2):
            optimiser.zero_grad()
            (block.plain if by_definition else block)(x).square().mean().backward()
            optimiser.step()
        trained.append(block.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], msg=name)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("part", ["conv1", "norm", "conv2", "shortcut"])
def test_forward_hooks_fire_and_may_change_what_passes(kind, part):
    for training in (True, False):
        block, x = BLOCKS[kind]()
        block.train(training)
        with torch.no_grad():
            before = block(x)
            hook = getattr(block, part).register_forward_hook(lambda module, inputs, output: output.relu())
            assert (block(x) - before).abs().max() > 1e-3
            hook.remove()
            if not training:
                torch.testing.assert_close(block(x), before)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("part", ["conv1", "norm", "conv2"])
def test_hooks_may_keep_what_passes_and_the_gradient_of_it(kind, part):
    block, x = BLOCKS[kind]()
    kept = []
    module = getattr(block, part)
    module.register_forward_hook(lambda module, inputs, output: kept.extend([inputs[0].clone(), output]))
    module.register_full_backward_hook(lambda module, to_inputs, to_outputs: kept.append(to_outputs[0]))
    block(x).square().mean().backward()
    given, output, gradient = kept
    with torch.no_grad():
        torch.testing.assert_close(output, copy.deepcopy(module).train()(given))
    assert gradient.shape == output.shape and gradient.abs().max() > 0


def test_functional_gradients_are_those_of_backward():
    block, x = first_block()
    block.eval()
    parameters = dict(block.named_parameters())
    block(x).square().mean().backward()
    expected = {name: value.grad for name, value in parameters.items() if value.grad is not None}

    def loss(parameters):
        return torch.func.functional_call(block, parameters, (x,)).square().mean()

    found = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_replaced_and_parametrised_parts_are_what_runs():
    block, x = later_block()
    with torch.no_grad():
        block.eval().norm = nn.GroupNorm(2, 6).double()
        torch.testing.assert_close(block(x), block.plain(x))
        block, x = later_block()
        nn.utils.parametrizations.weight_norm(block.conv1)
        torch.testing.assert_close(block(x), copy.deepcopy(block).plain(x))
        block, x = first_block()
        block.norm = nn.BatchNorm2d(6, affine=False, track_running_stats=False).double()
        torch.testing.assert_close(block.eval()(x), block.plain(x))


def test_graphs_are_recorded_as_defined():
    block, x = later_block()
    block.eval()
    with torch.no_grad():
        for graph in (torch.jit.trace(block, x), torch.export.export(block, (x,)).module()):
            torch.testing.assert_close(graph(x + 1), block(x + 1))


def test_statistics_count_as_batch_norms_do_with_any_momentum():
    """swa_utils.update_bn sets the momentum to None, for the plain average over batches."""
    for make in BLOCKS.values():
        block, x = make()
        block.norm.momentum = None
        block.norm.reset_running_stats()
        oracle = copy.deepcopy(block)
        for batch in (x, 2 * x + 1):
            block(batch)
            oracle.plain(batch)
        torch.testing.assert_close(block.norm.running_mean, oracle.norm.running_mean)
        torch.testing.assert_close(block.norm.running_var, oracle.norm.running_var)


def test_batch_statistics_are_as_exact_as_single_precision_allows():
    """PyTorch's batch norm of channels-last maps is off by 1e-4 in a case like this."""
    torch.manual_seed(0)
    block = ResidualBlock(32, 32)
    nn.init.constant_(block.conv1.bias, 5)
    x = torch.randn(2, 32, 5000, 23, generator=seeded()).contiguous(memory_format=torch.channels_last)
    conv1, conv2 = blocks.kernel_of(block.conv1), blocks.kernel_of(block.conv2)
    with torch.no_grad():
        _, mean, var = LaterBlockTiles.apply(x, *conv1, block.norm.weight, block.norm.bias, 1e-5, *conv2)
        exact = F.conv2d(x.double(), *(tensor.double() for tensor in conv1), padding=(1, 1))
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), atol=2e-6, rtol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), atol=0, rtol=2e-6)


# --- the whole model


@pytest.fixture(scope="module")
def narrow():
    """An AASIST small enough to differentiate a few times a second."""
    torch.manual_seed(0)
    return without_dropout(build_model("aasist", channels=(8, 8, 8), graph_dim=8, branch_dim=8))


def loss_and_gradients(model, waveform):
    model.zero_grad()
    loss = F.cross_entropy(model(waveform).logits, torch.tensor([0, 1, 1]))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_recomputation_changes_memory_only(narrow):
    keeping, recomputing = copy.deepcopy(narrow), copy.deepcopy(narrow)
    recomputing.encoder.recompute = True
    waveform = noise(3, 8000)
    kept = {}

    def bytes_kept(model):
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.encoder(waveform)
        return sum(seen.values())

    plain = copy.deepcopy(keeping)
    for block in plain.encoder.blocks:
        block.forward = block.plain
    for name, model in (
        ("plain", plain),
        ("keeping", copy.deepcopy(keeping)),
        ("recomputing", copy.deepcopy(recomputing)),
    ):
        kept[name] = bytes_kept(model)
    assert kept["keeping"] < 0.25 * kept["plain"]
    assert kept["recomputing"] < 0.7 * kept["keeping"] and kept["recomputing"] < 0.17 * kept["plain"]

    loss, gradients = loss_and_gradients(keeping, waveform)
    again, recomputed = loss_and_gradients(recomputing, waveform)
    torch.testing.assert_close(again, loss)
    for name in gradients:
        torch.testing.assert_close(recomputed[name], gradients[name], atol=1e-5, rtol=1e-4, msg=name)
    for name, value in keeping.named_buffers():
        torch.testing.assert_close(dict(recomputing.named_buffers())[name], value, msg=name)


def test_band_masks(narrow):
    model = copy.deepcopy(narrow).eval()
    waveform = noise(3, 6000)
    masks = (torch.rand(3, 70, generator=seeded()) > 0.3).float()
    with torch.no_grad():
        unmasked, ones = model(waveform).logits, model(waveform, band_mask=torch.ones(70)).logits
        each = model(waveform, band_mask=masks).logits
        alone = [model(waveform[i : i + 1], band_mask=masks[i]).logits[0] for i in range(3)]
    torch.testing.assert_close(ones, unmasked)
    torch.testing.assert_close(each, torch.stack(alone), atol=1e-6, rtol=1e-5)
    assert (each - unmasked).abs().min() > 1e-6


def test_training_works_at_the_minimum_with_a_batch_of_one(narrow):
    model = copy.deepcopy(narrow).train()
    logits = model(noise(1, model.min_samples)).logits
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert model.encoder(noise(1, model.min_samples)).shape[3] == 2


def test_nodes_follow_the_configuration():
    model = build_model("aasist", sinc_filters=31, channels=(4, 4), graph_dim=4, branch_dim=4)
    assert model.spectral_position.shape == (1, 10, 4)
    assert model.encoder(noise(1, 3000)).shape[:3] == (1, 4, 10)


def test_bfloat16_stays_close(narrow):
    model = copy.deepcopy(narrow)
    waveform = noise(3, 8000)
    expected = model(waveform).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(waveform)
    output.logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(output.logits.float(), expected, atol=0.1, rtol=0.1)


def test_impossible_configurations_are_refused():
    for wrong in (
        {"sinc_filters": 2},
        {"channels": ()},
        {"channels": (1, 8)},
        {"temporal_keep": 0.0},
        {"branch_keep": 1.5},
        {"graph_temperature": 0.0},
    ):
        with pytest.raises(ConfigError, match="expected"):
            AASISTConfig(**wrong)
    with pytest.raises(ConfigError, match="expected a multiple"):
        AASISTTransformerConfig(dim=100, heads=8)


def test_positions_are_distinct_and_their_products_depend_on_distance_alone():
    code = positions(50, 64, torch.zeros(1)).double()
    products = code @ code.T
    for distance in (0, 1, 7):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert (products.diagonal(1) < products.diagonal()[1:] - 0.5).all()


@needs_gpu
def test_gpu_equals_cpu(narrow):
    waveform = noise(3, 8000)
    cpu, gpu = copy.deepcopy(narrow), copy.deepcopy(narrow).cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        loss, gradients = loss_and_gradients(cpu, waveform)
        gpu.zero_grad()
        gpu_loss = F.cross_entropy(gpu(waveform.cuda()).logits, torch.tensor([0, 1, 1]).cuda())
        gpu_loss.backward()
        torch.testing.assert_close(gpu_loss.detach().cpu(), loss, atol=1e-4, rtol=1e-4)
        for name, value in gpu.named_parameters():
            if name in gradients:
                torch.testing.assert_close(value.grad.cpu(), gradients[name], atol=1e-3, rtol=1e-2, msg=name)
