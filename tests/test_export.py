"""ONNX files: the same numbers as PyTorch at every length and batch size, for every family."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch

from deepfake_utils.conventions import AudioError, CheckpointError
from deepfake_utils.models import MODELS, build_model
from deepfake_utils.models.losses import OneClassSoftmax
from deepfake_utils.scoring.onnx import OPSET, OnnxScorer, cached_scorer, check_parity, export_onnx, parity_report
from deepfake_utils.scoring.weights import embedding_dim, scoring_model

# Fewer and narrower blocks where only size would make a model slow.
NARROW = {
    "aasist": {"channels": (8,) * 6},
    "aasist-l": {"channels": (6,) * 6},
    "aasist-xl": {"channels": (8,) * 5 + (12,)},
    "aasist-transformer": {"channels": (8,) * 6},
    "rawnet2": {"gru_dim": 32, "embedding_dim": 16},
    "rawnet2-learnable": {"gru_dim": 32, "embedding_dim": 16},
}


def build(name):
    model = build_model(name, generator=torch.Generator().manual_seed(0), **NARROW.get(name, {})).eval()
    with torch.no_grad():  # fresh output layers give logits near zero, which any error of scale would pass
        for countermeasure in getattr(model, "members", [model]):
            countermeasure.output.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    model = build("lfcc-lcnn")
    return model, export_onnx(model, folder / "model.onnx")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_family_computes_the_same_at_three_lengths_and_several_batch_sizes(name, tmp_path):
    model = build(name)
    path = export_onnx(model, tmp_path / "model.onnx")
    report = parity_report(path, model, batch_sizes=(1, 3))
    assert report["n_samples"].nunique() == 4 and report["batch_size"].nunique() == 2
    assert report["logit_difference"].max() < 1e-4 and report["embedding_difference"].max() < 1e-3
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert not operators & {"If", "Loop", "Scan"}  # targets are made smaller without a look inside of these


def test_lengths_that_were_not_traced_keep_the_share_of_nodes(tmp_path):
    """int(n * 0.7) nodes are kept: 62 of 90 in double precision, 63 in single."""
    generator = torch.Generator().manual_seed(0)
    model = build_model("aasist", generator=generator, channels=(4, 4, 4, 4), graph_dim=4, branch_dim=4).eval()
    scorer = OnnxScorer(export_onnx(model, tmp_path / "model.onnx"))
    waveform = 0.1 * torch.randn(1, 90 * 3**5 + 128, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(scorer(waveform).logits, model(waveform).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [(4, 6), (4, 4, 4)])
def test_the_pieces_of_an_encoder_meet_at_every_length(channels, tmp_path):
    """Exported encoders compute their first blocks piece by piece: a length decides where pieces begin and end."""
    generator = torch.Generator().manual_seed(0)
    model = build_model("aasist", generator=generator, channels=channels, graph_dim=4, branch_dim=4).eval()
    with torch.no_grad():
        model.output.weight.mul_(20)
    scorer = OnnxScorer(export_onnx(model, tmp_path / "model.onnx"))
    for n_samples in range(model.min_samples, model.min_samples + 2 * 27, 10):
        waveform = 0.1 * torch.randn(2, n_samples, generator=generator)
        with torch.no_grad():
            expected = model(waveform).logits
        torch.testing.assert_close(scorer(waveform).logits, expected, atol=1e-4, rtol=0)


def test_the_file_says_what_it_is(exported):
    model, path = exported
    metadata = OnnxScorer(path).metadata
    assert metadata["model"] == "lfcc-lcnn"
    assert metadata["sample_rate_hz"] == "16000" and metadata["min_samples"] == str(model.min_samples)
    assert metadata["opset"] == str(OPSET) and metadata["input"].startswith("waveform: (batch, samples)")
    assert metadata["score"].startswith("logits[:, 1], logit of bona fide, higher is more bona fide")
    assert json.loads(metadata["config"]) == json.loads(json.dumps(vars(model.config)))
    graph = onnx.load(path)
    assert [node.name for node in graph.graph.input] == ["waveform"]
    assert [node.name for node in graph.graph.output] == ["logits", "embedding"]
    assert graph.opset_import[0].version == OPSET


def test_a_score_of_one_class_weights_is_called_a_cosine(tmp_path):
    model = build("lfcc-lcnn")
    model = scoring_model(model, OneClassSoftmax(embedding_dim(model)))
    metadata = OnnxScorer(export_onnx(model, tmp_path / "model.onnx")).metadata
    assert metadata["score"].startswith("logits[:, 1], cosine to the direction of bona fide")


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = build("rawnet2-learnable").train()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "model.onnx")
    assert model.training and model.sinc.learnable
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_computes_something_else_is_refused(exported):
    model, path = exported
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.output.bias[1] += 0.01
    with pytest.raises(CheckpointError, match="differs by 0.01"):
        parity_report(path, other)


def test_a_file_that_computes_nan_is_refused(exported):
    model, path = exported
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.output.bias[1] = torch.nan
    with pytest.raises(CheckpointError, match="differs by nan"):
        parity_report(path, broken)


def test_a_session_leaves_subnormal_numbers_of_this_thread_as_they_were(exported):
    model, path = exported
    for flushed in (False, True):
        try:
            torch.set_flush_denormal(flushed)
            OnnxScorer(path)(torch.zeros(1, model.min_samples))
            assert (torch.tensor([1e-310], dtype=torch.float64) * 0.5 == 0).item() == flushed
        finally:
            torch.set_flush_denormal(False)


def test_subnormal_weights_are_written_as_zero(tmp_path):
    model = build("lfcc-lcnn")
    with torch.no_grad():
        model.embed.weight.fill_(1e-41)
    graph = onnx.load(export_onnx(model, tmp_path / "model.onnx")).graph
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        assert values.dtype != np.float32 or not ((values != 0) & (np.abs(values) < 1e-38)).any()
    assert model.embed.weight.max() > 0


def test_a_model_is_exported_once_for_its_weights(tmp_path, monkeypatch):
    from deepfake_utils.scoring import onnx as room

    written = []
    monkeypatch.setattr(room, "export_onnx", lambda model, path: written.append(path) or export_onnx(model, path))
    model = build("lfcc-lcnn")
    waveform = 0.1 * torch.randn(3, 9000, generator=torch.Generator().manual_seed(0))
    first, again = cached_scorer(model, tmp_path), cached_scorer(copy.deepcopy(model), tmp_path)
    assert len(written) == 1 and check_parity(again, model, waveform) < 1e-4
    with torch.no_grad():
        model.output.bias[1] += 0.01
    with pytest.raises(CheckpointError, match="differs by 0.01"):
        check_parity(first, model, waveform)
    check_parity(cached_scorer(model, tmp_path), model, waveform)
    assert len(written) == 2
    written[1].write_bytes(b"damaged")
    check_parity(cached_scorer(model, tmp_path), model, waveform)
    assert len(written) == 3 and written[2] == written[1]


def test_a_model_is_exported_again_when_the_code_that_writes_it_has_changed(exported, tmp_path, monkeypatch):
    from deepfake_utils.scoring import onnx as room

    assert [part.name for part in room.CODE] == ["onnx.py", "models"]
    code, others = tmp_path / "onnx.py", tmp_path / "models"
    others.mkdir()
    code.write_text("before")
    (others / "lcnn.py").write_text("before")

    def copied(model, path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(exported[1].read_bytes())
        return path

    monkeypatch.setattr(room, "CODE", (code, others))
    monkeypatch.setattr(room, "export_onnx", copied)
    for changed in (None, code, others / "lcnn.py"):
        if changed:
            changed.write_text("after")
        cached_scorer(exported[0], tmp_path / "cache")
        cached_scorer(exported[0], tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_short_waveform_is_refused(exported):
    model, path = exported
    with pytest.raises(AudioError, match=str(model.min_samples)):
        OnnxScorer(path)(torch.zeros(1, model.min_samples - 1))


def test_a_file_without_embeddings_scores_and_has_none(exported):
    _, path = exported
    graph = onnx.load(path)
    graph.graph.output.remove(next(output for output in graph.graph.output if output.name == "embedding"))
    onnx.save(graph, path.with_name("bare.onnx"))
    waveform = 0.1 * torch.randn(3, 16_000, generator=torch.Generator().manual_seed(0))
    bare, whole = OnnxScorer(path.with_name("bare.onnx"))(waveform), OnnxScorer(path)(waveform)
    assert bare.embedding.shape == (3, 0) and whole.embedding.shape[1] > 0
    torch.testing.assert_close(bare.logits, whole.logits)


def test_other_files_are_refused(tmp_path, exported):
    with pytest.raises(CheckpointError, match="no such ONNX file"):
        OnnxScorer(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(CheckpointError, match="not a readable ONNX model"):
        OnnxScorer(tmp_path / "text.onnx")
    with pytest.raises(CheckpointError, match="not a readable ONNX model"):
        OnnxScorer("/proc/self/mem")  # a file whose reading fails, for root, too
    foreign = onnx.load(exported[1])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(CheckpointError, match="sample_rate_hz"):
        OnnxScorer(tmp_path / "foreign.onnx")


def test_published_weights_on_real_speech(reference_data, tmp_path):
    import pandas as pd
    import soundfile

    from deepfake_utils.scoring.weights import load_model

    model = load_model("aasist-l", weights=reference_data / "published_weights" / "AASIST-L.pth")
    golden = pd.read_csv(reference_data / "published_weights" / "golden_logits.csv").iloc[::23]
    files = {path.stem: path for path in (reference_data / "asvspoof2019_subset").rglob("*.flac")}
    clips = [np.resize(soundfile.read(files[name], dtype="float32")[0], 64600) for name in golden["utterance"]]
    scorer = OnnxScorer(export_onnx(model, tmp_path / "aasist-l.onnx"))
    assert scorer.metadata["model"] == "aasist-l"
    found = scorer(torch.from_numpy(np.stack(clips))).logits.numpy()
    expected = golden[["AASIST-L_logit_spoof", "AASIST-L_logit_bonafide"]].to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
