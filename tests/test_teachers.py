"""Distillation: what the teachers say, what the student makes of it, and runs that go on exactly."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from deepfake_utils.conventions import CheckpointError, ConfigError, TrainingError
from deepfake_utils.models.losses import distillation_loss
from deepfake_utils.scoring.weights import load_model, save_weights
from deepfake_utils.training.loop import fit
from deepfake_utils.training.resume import load_training_state
from deepfake_utils.training.teachers import Teachers
from tests.test_training import run, tiny_config, write_corpus

NARROW = {"channels": (4, 4), "stem_channels": 4, "pooled_channels": 8, "embedding_dim": 8, "dropout": 0.0}
SMALL = dict(model="spectrogram-resnet", model_options=NARROW)
LEARNS = dict(**SMALL, epochs=8, learning_rate=2e-2, schedule="one_cycle")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The tones of the other tests, switched 10 times a second: this network does not see what never changes."""
    both = write_corpus(tmp_path_factory.mktemp("tones"), n_train=64)
    for path in (path for frame in both for path in frame["path"]):
        samples, rate_hz = soundfile.read(path)
        soundfile.write(path, samples * (np.arange(len(samples)) % 1600 < 800), rate_hz)
    return both


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """Weights that tell the tones apart, with dropout in training mode."""
    result, _ = run(corpus, tmp_path_factory.mktemp("teacher"), **LEARNS)
    return result.weights


def waveforms(corpus, split=1):
    return torch.stack([torch.from_numpy(soundfile.read(p, frames=4000)[0]).float() for p in corpus[split]["path"]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_cross_entropy_of_softened_softmaxes_and_its_gradient_the_papers(temperature):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(9, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = 3 * torch.randn(9, 2, dtype=torch.float64, generator=generator)
    p, q = (logits.div(temperature).softmax(dim=1) for logits in (student, teacher))
    loss = distillation_loss(student, teacher[:, 1] - teacher[:, 0], temperature)
    expected = temperature**2 * -(q * p.log()).sum(dim=1).mean()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    loss.backward()  # Hinton et al., equation 2: (p - q) / T, here times T^2 and averaged over 9 examples
    torch.testing.assert_close(student.grad, (temperature * (p - q) / 9).detach(), rtol=1e-4, atol=1e-6)


def test_teachers_speak_together_and_leave_the_random_numbers_alone(corpus, teacher):
    models = [load_model(weights=teacher).train(), load_model("spectrogram-resnet").train()]
    batch, state = waveforms(corpus), torch.get_rng_state()
    together = Teachers(models, 1.0).log_odds(batch)
    assert torch.equal(torch.get_rng_state(), state) and not together.requires_grad
    with torch.no_grad():
        each = [model.eval()(batch).logits for model in models]
    torch.testing.assert_close(together, sum(logits[:, 1] - logits[:, 0] for logits in each) / 2)


def test_a_student_without_labels_moves_to_its_teacher(corpus, teacher, tmp_path):
    """The labels are turned round; only the teacher knows better."""
    wrong = [frame.assign(label=1 - frame["label"], attack="-") for frame in corpus]
    changes = dict(**LEARNS, teachers=(teacher,), distil_weight=1.0, temperature=1.0)
    result = fit(*wrong, tmp_path, tiny_config(**changes), device="cpu", say=str)
    assert result.history["dev_eer"].iloc[-1] > 0.7, (
        "against labels turned round, a good student is nearly always wrong"
    )
    assert result.history["train_loss"].iloc[-1] < result.history["train_loss"].iloc[0]


def test_a_weight_of_nothing_is_training_without_teachers(corpus, teacher, tmp_path):
    alone, _ = run(corpus, tmp_path / "alone", **SMALL, epochs=1, augmentation="seed")
    beside, _ = run(
        corpus, tmp_path / "beside", **SMALL, epochs=1, augmentation="seed", teachers=[teacher], distil_weight=0
    )
    assert alone.history["train_loss"].tolist() == beside.history["train_loss"].tolist()
    assert all(torch.equal(v, beside.model.state_dict()[k]) for k, v in alone.model.state_dict().items())


def test_a_taught_run_says_its_teachers_and_goes_on_exactly_where_they_are_the_same(corpus, teacher, tmp_path):
    changes = dict(**SMALL, teachers=[str(teacher), str(teacher)], augmentation="seed", average="ema")
    whole, said = run(corpus, tmp_path / "whole", **changes)
    assert said.count(f"teacher:   {teacher}, SpectrogramResNet of ") == 2
    about = json.loads((tmp_path / "whole" / "best.json").read_text())["trained_on"]["teachers"]
    assert [entry["file"] for entry in about] == ["best.safetensors"] * 2 and about[0]["fingerprint"] in said

    def stop_after_first(history):
        if len(history) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*corpus, tmp_path / "parts", tiny_config(**changes), device="cpu", on_epoch=stop_after_first, say=str)
    torch.manual_seed(999)
    moved = [shutil.copy(teacher.with_suffix(s), tmp_path / f"moved{s}") for s in (".safetensors", ".json")][0]
    with pytest.raises(TrainingError, match="the teachers are others"):
        run(corpus, tmp_path / "parts", **(changes | {"teachers": [moved]}))
    with pytest.raises(TrainingError, match="the teachers are others"):
        run(corpus, tmp_path / "parts", **(changes | {"teachers": []}))
    parts, said = run(corpus, tmp_path / "parts", **(changes | {"teachers": [moved, moved]}))
    assert "resuming:  epoch 2, step 0" in said
    assert parts.history["train_loss"].tolist() == whole.history["train_loss"].tolist()
    final = [load_training_state(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


def test_a_run_from_before_there_were_teachers_goes_on(corpus, tmp_path):
    run(corpus, tmp_path, **SMALL, epochs=1)
    state = load_training_state(tmp_path / "checkpoint.pt")
    for name in ("teachers", "distil_weight", "temperature"):
        del state["wish"][name], state["settled"][name]
    del state["fingerprints"]["teachers"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert run(corpus, tmp_path, **SMALL, epochs=1)[0].stopped == "all epochs done"


def test_what_cannot_teach_is_refused_before_anything_is_trained(corpus, teacher, tmp_path):
    text = tmp_path / "notes.safetensors"
    text.write_text("not weights")
    with pytest.raises(CheckpointError, match="absent.safetensors do not exist"):
        run(corpus, tmp_path / "run", teachers=["absent.safetensors"])
    with pytest.raises(CheckpointError, match="notes.safetensors cannot be read as weights"):
        run(corpus, tmp_path / "run", teachers=[text])
    with pytest.raises(ConfigError, match=r"needs \d+ samples, and crop_samples is 400"):
        run(corpus, tmp_path / "run", teachers=[teacher], crop_samples=400)
    run(corpus, tmp_path / "cosines", **SMALL, epochs=1, loss="oc_softmax")
    with pytest.raises(ConfigError, match="scores by OneClassSoftmax, cosine .* expected log-odds"):
        run(corpus, tmp_path / "run", teachers=[tmp_path / "cosines" / "best.safetensors"])
    with pytest.raises(ConfigError, match="loss 'p2sgrad' has no log-odds to teach"):
        tiny_config(teachers=[teacher], loss="p2sgrad")
    with pytest.raises(ConfigError, match="teachers 'a.safetensors': expected a list of files"):
        tiny_config(teachers="a.safetensors")
    assert not list((tmp_path / "run").glob("*.pt"))


def test_any_model_of_the_package_may_teach_in_parts_of_a_batch(corpus, teacher, tmp_path, monkeypatch):
    """The gradient of uneven parts is that of the whole batch, where batch norm is not in the way."""
    other = save_weights(tmp_path / "lcnn.safetensors", load_model("lfcc-lcnn"), name="lfcc-lcnn")
    teachers = Teachers([load_model(weights=path) for path in (teacher, other)], 2.0)
    batch = waveforms(corpus)[:7]
    logits = torch.randn(7, 2, requires_grad=True)
    teachers.loss(logits, batch).backward()
    whole, logits.grad = logits.grad.clone(), None
    for part in torch.arange(7).chunk(3):
        (len(part) / 7 * teachers.loss(logits[part], batch[part])).backward()
    torch.testing.assert_close(logits.grad, whole, rtol=1e-4, atol=1e-6)
