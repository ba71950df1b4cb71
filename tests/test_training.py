"""Training on real FLAC files with a tiny AASIST: resuming, stopping, failing, learning."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from deepfake_utils.conventions import CheckpointError, ConfigError, TrainingError
from deepfake_utils.machine import FLOAT32
from deepfake_utils.models.losses import WeightedCrossEntropy
from deepfake_utils.scoring.weights import load_model
from deepfake_utils.training import loop as training
from deepfake_utils.training import memory, plan, prepare
from deepfake_utils.training.config import RECIPES, TrainingConfig
from deepfake_utils.training.loop import fit
from deepfake_utils.training.resume import fingerprint, load_training_state, take_over, with_own_kernels
from deepfake_utils.training.run import Pace
from deepfake_utils.training.sampling import source_weights
from deepfake_utils.training.schedule import SharpnessAware, learning_rate, reestimate_batch_norm
from deepfake_utils.training.selection import macro_eer

TINY = {"sinc_filters": 12, "channels": (4, 4), "graph_dim": 4, "branch_dim": 4}


def tiny_config(**changes) -> TrainingConfig:
    defaults = dict(
        model="aasist-l", model_options=TINY, epochs=3, batch_size=8, crop_samples=4000, eval_samples=4000,
        learning_rate=1e-3, class_weights=(0.5, 0.5), seed=7,
    )  # fmt: skip
    return TrainingConfig(**(defaults | changes))


def write_corpus(folder: Path, n_train: int = 24, n_dev: int = 16) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Bona fide: low-pitched hum in noise. Spoof: the same level, high-pitched."""
    rng = np.random.default_rng(3)
    rows = []
    for n in range(n_train + n_dev):
        split, label = ("train" if n < n_train else "dev"), n % 2
        t = np.arange(rng.integers(6000, 9000)) / 16000
        tone = np.sin(2 * np.pi * (300 if label else 2500) * rng.uniform(0.9, 1.1) * t)
        path = folder / f"{split}_{n:03d}.flac"
        soundfile.write(path, 0.2 * tone + 0.05 * rng.standard_normal(len(t)), 16000)
        rows.append((path.stem, str(path), label, "-" if label else "T01", f"s{n % 4}", split, "tones"))
    frame = pd.DataFrame(rows, columns=["utterance", "path", "label", "attack", "speaker", "split", "corpus"])
    return frame[frame.split == "train"].reset_index(drop=True), frame[frame.split == "dev"].reset_index(drop=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("tones"))


def run(corpus, folder, **changes):
    said = []
    result = fit(*corpus, folder, tiny_config(**changes), device="cpu", say=said.append)
    return result, "\n".join(said)


def test_learns_writes_everything_down_and_the_kept_weights_score_the_reported_eer(corpus, tmp_path):
    result, said = run(corpus, tmp_path, epochs=6, learning_rate=3e-3, schedule="one_cycle")
    assert result.best_dev_eer < 0.15, "tones an octave apart must be told apart"
    assert result.best_dev_eer == result.history["dev_eer"].min()
    assert len(pd.read_csv(tmp_path / "history.csv")) == 6
    for promised in ("device:", "precision:", "waveforms:", "real ones", "dev EER"):
        assert promised in said
    facts = json.loads((tmp_path / "best.json").read_text())
    origin = facts["trained_on"]
    assert (origin["corpora"], origin["synthetic_demo"], origin["fine_tuned"]) == (["tones"], False, False)
    assert origin["train"] == {
        "fingerprint": fingerprint(corpus[0]), "n_bonafide": 12, "n_spoof": 12, "attacks": ["T01"]
    }  # fmt: skip
    assert facts["date"] and facts["package_version"] and facts["training"] == result.config.to_dict()

    from deepfake_utils import score_protocol
    from deepfake_utils.evaluation.metrics import compute_eer

    scores = score_protocol(load_model(weights=result.weights), corpus[1], n_samples=4000, device="cpu", progress=None)
    assert compute_eer(scores["score"], corpus[1]["label"]).eer == pytest.approx(result.best_dev_eer)


def test_same_seed_same_run_and_another_seed_another(corpus, tmp_path):
    first, _ = run(corpus, tmp_path / "a", epochs=2)
    again, _ = run(corpus, tmp_path / "b", epochs=2)
    other, _ = run(corpus, tmp_path / "c", epochs=2, seed=8)
    assert first.history["train_loss"].tolist() == again.history["train_loss"].tolist()
    assert first.history["train_loss"].tolist() != other.history["train_loss"].tolist()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize("average", ["none", "ema", "swa"])
def test_resuming_after_an_epoch_equals_never_having_stopped(corpus, tmp_path, monkeypatch, average):
    changes = dict(average=average, swa_start=0.3, augmentation="seed", clip_norm=1.0, band_mask=True)
    whole, _ = run(corpus, tmp_path / "whole", **changes)

    def stop_after_first(history):
        if len(history) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*corpus, tmp_path / "parts", tiny_config(**changes), device="cpu", on_epoch=stop_after_first, say=str)
    torch.manual_seed(999)  # whatever happens between two sessions must not matter
    parts, said = run(corpus, tmp_path / "parts", **changes)
    assert "resuming:  epoch 2, step 0" in said
    assert parts.history["train_loss"].tolist() == whole.history["train_loss"].tolist()
    assert parts.history["dev_eer"].tolist() == whole.history["dev_eer"].tolist()
    final = [load_training_state(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


CHILD = """
    import sys, pandas as pd, torch
    sys.path.insert(0, {repository!r})
    torch.set_num_threads(1)
    from tests.test_training import tiny_config
    from deepfake_utils.training.loop import fit
    train, dev = (pd.read_csv(f) for f in sys.argv[1:3])
    fit(train, dev, sys.argv[3], tiny_config(checkpoint_every_s=0.0, epochs=40), device="cpu",
        say=lambda text: print(text, flush=True))
"""


def start_child(corpus, folder: Path) -> subprocess.Popen:
    files = [folder.parent / f"{name}.csv" for name in ("train", "dev")]
    for frame, file in zip(corpus, files, strict=True):
        frame.to_csv(file, index=False)
    code = textwrap.dedent(CHILD).format(repository=str(Path(__file__).parents[1]))
    return subprocess.Popen([sys.executable, "-c", code, *map(str, files), str(folder)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for(condition, child: subprocess.Popen) -> None:
    for _ in range(6000):  # a busy machine takes minutes to import PyTorch
        if condition():
            return
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the child did not get that far within five minutes")


def test_killed_in_the_middle_of_an_epoch_then_resumed_bit_for_bit(corpus, tmp_path):
    torch.set_num_threads(1)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    child = start_child(corpus, tmp_path / "run")

    def in_the_middle() -> bool:
        return checkpoint.is_file() and load_training_state(checkpoint)["state"]["step"] > 0

    wait_for(in_the_middle, child)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    saved = load_training_state(checkpoint)  # atomic: readable whenever the kill came
    epochs = saved["state"]["epoch"] + 2

    def until(config, folder):  # the learning rate depends on the planned epochs, so keep them and stop by hand
        def stop(history):
            if len(history) >= epochs:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(*corpus, folder, config, device="cpu", on_epoch=stop, say=str)
        return load_training_state(folder / "checkpoint.pt")

    config = tiny_config(checkpoint_every_s=0.0, epochs=40)
    resumed, whole = until(config, tmp_path / "run"), until(config, tmp_path / "whole")
    assert [row["train_loss"] for row in resumed["state"]["history"]] == [
        row["train_loss"] for row in whole["state"]["history"]
    ]
    assert all(torch.equal(resumed["model"][key], whole["model"][key]) for key in whole["model"])


def result_files(folder: Path) -> dict:
    """All that a run leaves behind, times apart."""
    facts = json.loads((folder / "best.json").read_text())
    timeless = ["epoch", "train_loss", "dev_eer", "best_dev_eer", "learning_rate", "micro_batches"]
    state = load_training_state(folder / "checkpoint.pt")
    state["state"]["history"] = pd.DataFrame(state["state"]["history"])[timeless].to_dict()
    return {
        "best.json": {name: value for name, value in facts.items() if name != "date"},
        "history.csv": pd.read_csv(folder / "history.csv")[timeless].to_dict(),
        "checkpoint.pt": plain(state),
        **{name: (folder / name).read_bytes() for name in ("best.safetensors", "dev_scores.csv")},
    }


def plain(value):
    """The same with bytes in place of tensors, to be compared by =="""
    if isinstance(value, torch.Tensor):
        return value.shape, value.numpy().tobytes()
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


class Killed(BaseException):
    """Nothing runs after it, as after SIGKILL."""


@pytest.mark.parametrize("average", ["none", "ema", "swa"])
def test_stopped_anywhere_and_however_a_run_ends_with_the_same_files(corpus, tmp_path, monkeypatch, average):
    """Weights of a half epoch may have the lowest error, and are kept only until the run goes on."""
    changes = dict(epochs=4, average=average, swa_start=0.3, ema_decay=0.5, learning_rate=1e-2, checkpoint_every_s=0.0)
    run(corpus, tmp_path / "whole", **changes)
    take_step, write_history, rng = training.take_step, training.write_history, np.random.default_rng(0)

    def step(run, batch):
        loss = take_step(run, batch)
        plan["left"] -= 1
        if plan["how"] == "Ctrl-C" and not plan["left"]:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    def history(run, tensorboard):
        if plan["how"] == "killed":  # after the files of the best weights, before the checkpoint
            raise Killed
        write_history(run, tensorboard)

    monkeypatch.setattr(training, "take_step", step)
    monkeypatch.setattr(training, "write_history", history)
    monkeypatch.setattr(training, "is_out_of_time", lambda run: plan["how"] != "Ctrl-C" and plan["left"] <= 0)
    stops = []
    while "all epochs done" not in stops:
        plan = {"how": rng.choice(["time", "Ctrl-C", "killed"]), "left": rng.integers(1, 4)}
        try:
            stops.append(run(corpus, tmp_path / "parts", **changes)[0].stopped)
        except (KeyboardInterrupt, Killed) as stop:
            stops.append(type(stop))
    assert {KeyboardInterrupt, Killed, "time budget used up"} < set(stops)
    whole, parts = (result_files(tmp_path / name) for name in ("whole", "parts"))
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_ctrl_c_twice_within_a_step_keeps_the_last_whole_checkpoint(corpus, tmp_path, monkeypatch):
    whole, _ = run(corpus, tmp_path / "whole", epochs=2)
    steps, said = [], []

    def half_a_step(active, batch):
        loss = take_step(active, batch)
        steps.append(loss)
        if len(steps) == 2:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        return loss

    take_step = training.take_step
    monkeypatch.setattr(training, "take_step", half_a_step)
    with pytest.raises(KeyboardInterrupt):
        fit(*corpus, tmp_path / "parts", tiny_config(epochs=2), device="cpu", say=said.append)
    assert "interrupted within a step" in said[-1]
    assert load_training_state(tmp_path / "parts" / "checkpoint.pt")["state"]["step"] == 0
    parts, _ = run(corpus, tmp_path / "parts", epochs=2)
    assert parts.history["train_loss"].tolist() == whole.history["train_loss"].tolist()


def test_a_slow_first_step_does_not_use_up_the_time_budget(corpus, tmp_path, monkeypatch):
    def slow_at_first(active, batch):
        if not active.steps_done:
            time.sleep(3)  # as allocating, tuning and loading kernels may
        return take_step(active, batch)

    take_step = training.take_step
    monkeypatch.setattr(training, "take_step", slow_at_first)
    monkeypatch.setattr("deepfake_utils.training.run.SCORING_SHARE", 40.0)  # as for a dev split of thousands
    result, _ = run(corpus, tmp_path, epochs=2, time_budget_s=100.0)
    assert result.stopped == "all epochs done"


def test_starting_anew_leaves_nothing_of_the_run_before(corpus, tmp_path):
    run(corpus, tmp_path, epochs=1)
    assert (tmp_path / "best.safetensors").is_file()

    def stop(active, batch):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "take_step", stop)
        fit(*corpus, tmp_path, tiny_config(epochs=1, seed=7), device="cpu", resume=False, say=str)
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert not left & {"best.safetensors", "best.json", "dev_scores.csv", "history.csv"}
    assert load_training_state(tmp_path / "checkpoint.pt")["wish"]["seed"] == 7


def test_an_optimiser_from_another_device_keeps_to_its_own_kernels():
    """A run begun on a CPU (not fused) goes on under a loss scaler, whose optimiser is fused."""
    weight = torch.nn.Parameter(torch.ones(2))
    begun, going_on = torch.optim.Adam([weight], fused=False), torch.optim.Adam([weight], fused=True)
    weight.sum().backward()
    begun.step()
    going_on.load_state_dict(with_own_kernels(begun.state_dict(), going_on))
    assert going_on.param_groups[0]["fused"] is True and going_on.state[weight]["step"].item() == 1
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.square().sum()).backward()
    scaler.step(going_on)
    assert going_on.state[weight]["step"].item() == 2


def test_ctrl_c_leaves_a_usable_checkpoint_and_says_how_to_go_on(corpus, tmp_path):
    child = start_child(corpus, tmp_path / "run")
    wait_for((tmp_path / "run" / "history.csv").is_file, child)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    assert "interrupted: continue with the same call" in out, out + err
    assert load_training_state(tmp_path / "run" / "checkpoint.pt")["state"]["epoch"] >= 1


class PoisonedBatches:
    """The run's batches, with one utterance turned into NaN from the second epoch on."""

    wait_s = 0.0

    def __init__(self, batches, row, poisoned):
        self.batches, self.row, self.poisoned = batches, row, poisoned

    def __iter__(self):
        for batch in self.batches:
            if self.poisoned:
                batch.waveform[np.flatnonzero(batch.index == self.row)] = float("nan")
            yield batch


def test_a_non_finite_loss_stops_names_the_batch_and_keeps_the_last_good_checkpoint(corpus, tmp_path, monkeypatch):
    original = training.epoch_batches
    monkeypatch.setattr(
        training, "epoch_batches", lambda run: PoisonedBatches(original(run), 5, poisoned=run.state.epoch == 1)
    )
    with pytest.raises(TrainingError, match=f"the loss became nan in epoch 2.*{corpus[0]['utterance'][5]}"):
        run(corpus, tmp_path)
    saved = load_training_state(tmp_path / "checkpoint.pt")
    assert saved["state"]["epoch"] == 1 and all(torch.isfinite(t).all() for t in saved["model"].values())


def test_the_eval_split_a_missing_class_and_shared_recordings_are_refused(corpus, tmp_path):
    train, dev = corpus
    with pytest.raises(TrainingError, match="trials of the eval split"):
        fit(train, dev.assign(split="eval"), tmp_path)
    with pytest.raises(TrainingError, match="no bona fide"):
        fit(train[train.label == 0], dev, tmp_path)
    with pytest.raises(TrainingError, match="in train and in dev"):
        fit(train, train.assign(split="dev"), tmp_path)


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(corpus, tmp_path):
    run(corpus, tmp_path, epochs=1)
    with pytest.raises(TrainingError, match="learning_rate was 0.001, is 0.01"):
        run(corpus, tmp_path, epochs=1, learning_rate=0.01)
    train, dev = corpus
    turned = train.assign(label=1 - train["label"])
    other = train.assign(path=[*train["path"][1:], train["path"][0]])
    for split, now in (("train", (turned, dev)), ("train", (other, dev)), ("dev", (train, dev[::-1]))):
        with pytest.raises(TrainingError, match=f"the {split} recordings or labels are others"):
            run(now, tmp_path, epochs=1)
    moved = tmp_path / "moved"
    shutil.copytree(Path(train["path"][0]).parent, moved)
    now = [frame.assign(path=[str(moved / Path(path).name) for path in frame["path"]]) for frame in corpus]
    assert run(now, tmp_path, epochs=1)[0].stopped == "all epochs done", "a corpus may be mounted elsewhere"
    listed = TrainingConfig.from_dict(json.loads(json.dumps(tiny_config(epochs=1).to_dict())))
    assert fit(*corpus, tmp_path, listed, device="cpu", say=str).stopped == "all epochs done", "JSON knows no tuples"
    state = load_training_state(tmp_path / "checkpoint.pt")
    torch.save(state | {"version": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="is of format 1, expected 3"):
        run(corpus, tmp_path, epochs=1)


def test_the_same_names_sizes_and_labels_with_other_sound_are_another_corpus(corpus, tmp_path):
    copies = []
    for name in ("loud", "copied", "quiet"):
        (tmp_path / name).mkdir()
        for path in corpus[0]["path"]:
            samples = soundfile.read(path)[0] * (0.1 if name == "quiet" else 1.0)
            soundfile.write(tmp_path / name / f"{Path(path).stem}.wav", samples, 16000)
        paths = [str(tmp_path / name / f"{Path(path).stem}.wav") for path in corpus[0]["path"]]
        copies.append(fingerprint(corpus[0].assign(path=paths)))
    assert copies[0] == copies[1] != copies[2]


def test_time_budget_ends_the_run_in_time_and_a_new_session_goes_on(corpus, tmp_path):
    reached = [0]
    for _ in range(2):
        result, said = run(corpus, tmp_path, epochs=500, time_budget_s=2.0)
        assert result.stopped == "time budget used up" and 1 <= len(result.history) < 500
        state = load_training_state(tmp_path / "checkpoint.pt")["state"]
        reached.append(3 * state["epoch"] + state["step"])
    assert "resuming" in said and reached[0] < reached[1] < reached[2]


@pytest.mark.parametrize("average", ["none", "ema", "swa"])  # an average is re-estimated in training mode to be scored
def test_a_budget_that_ends_within_an_epoch_is_as_if_it_had_not(corpus, tmp_path, monkeypatch, average):
    changes = dict(epochs=2, average=average, swa_start=0.3)
    uninterrupted, _ = run(corpus, tmp_path / "whole", **changes)
    seen, take_step = [], training.take_step

    def noted(run, batch):
        seen.append((run.state.epoch, batch.index.tolist()))
        return take_step(run, batch)

    monkeypatch.setattr(training, "take_step", noted)
    monkeypatch.setattr(training, "is_out_of_time", lambda run: (run.state.epoch, run.state.step) == (1, 2))
    first, _ = run(corpus, tmp_path / "parts", **changes)
    assert first.stopped == "time budget used up" and len(seen) == 3 + 2
    second, said = run(corpus, tmp_path / "parts", **changes)
    assert "resuming:  epoch 2, step 2" in said and second.stopped == "all epochs done"
    for epoch in (0, 1):
        assert sorted(sum((rows for at, rows in seen if at == epoch), [])) == list(range(24))
    columns = ["epoch", "train_loss", "dev_eer", "learning_rate"]
    pd.testing.assert_frame_equal(second.history[columns], uninterrupted.history[columns], check_exact=True)
    whole, parts = (load_training_state(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    for name in ("model", "average") if average != "none" else ("model",):
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name]), name
    assert torch.equal(whole["rng_cpu"], parts["rng_cpu"])


def test_weights_loaded_for_scoring_are_trained_in_training_mode(corpus, tmp_path):
    first, _ = run(corpus, tmp_path / "first", epochs=1)
    before = {name: value.clone() for name, value in first.model.named_buffers()}
    assert not first.model.training
    second = fit(*corpus, tmp_path / "second", tiny_config(epochs=1), model=first.model, device="cpu", say=str)
    assert json.loads((tmp_path / "second" / "best.json").read_text())["trained_on"]["fine_tuned"]
    assert all(torch.equal(value, before[name]) for name, value in first.model.named_buffers()), "a copy is trained"
    moved = [name for name, value in second.model.named_buffers() if not torch.equal(value, before[name])]
    assert any("running_mean" in name for name in moved), "batch norm must follow the new data"


def test_early_stop_counts_epochs_without_a_better_dev_eer(corpus, tmp_path):
    result, _ = run(corpus, tmp_path, epochs=30, learning_rate=1e-8, learning_rate_min=0.0, patience_epochs=2)
    assert result.stopped == "no better dev EER in 2 epochs"
    assert len(result.history) == result.best_epoch + 2
    changes = dict(epochs=30, learning_rate=1e-8, learning_rate_min=0.0)
    again, said = run(corpus, tmp_path, patience_epochs=2, **changes)
    assert again.stopped == result.stopped and "resuming" not in said
    more, said = run(corpus, tmp_path, patience_epochs=3, **changes)
    assert "resuming" in said and len(more.history) > len(result.history)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(corpus, tmp_path, monkeypatch):
    """A batch-norm-free comparison is not possible with AASIST; so the count of utterances a forward sees is read."""
    sizes, original = [], WeightedCrossEntropy.forward

    def limited(self, logits, embedding, target):
        if len(target) > 4:
            raise torch.OutOfMemoryError("pretended")
        sizes.append(len(target))
        return original(self, logits, embedding, target)

    monkeypatch.setattr(WeightedCrossEntropy, "forward", limited)
    result, said = run(corpus, tmp_path, epochs=1)
    assert "going on with 2 micro-batches" in said
    assert result.history["micro_batches"].tolist() == [2] and set(sizes) == {4} and len(sizes) == 2 * 3
    assert np.isfinite(result.history["train_loss"]).all()


def test_micro_batches_join_to_the_gradient_of_the_whole(corpus, tmp_path):
    """Without batch norm in the way (evaluation mode), 3 uneven parts give the whole batch's gradient."""
    logits = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 0, 0, 1, 0, 0.3, 1]).double()
    criterion = WeightedCrossEntropy((0.1, 0.9)).double()
    criterion(logits, None, target).backward()
    whole, logits.grad = logits.grad.clone(), None
    for part in torch.arange(7).chunk(3):
        share = criterion.mass(target[part]) / criterion.mass(target)
        (criterion(logits[part], None, target[part]) * share).backward()
    torch.testing.assert_close(logits.grad, whole, rtol=1e-5, atol=1e-8)


def test_schedules_at_their_corners():
    base = dict(learning_rate=1.0, learning_rate_min=0.1, epochs=10)
    cosine = TrainingConfig(**base)
    assert learning_rate(cosine, 0, 10, 101) == pytest.approx(1.0)
    assert learning_rate(cosine, 50, 10, 101) == pytest.approx(0.55)
    assert learning_rate(cosine, 100, 10, 101) == pytest.approx(0.1)
    one_cycle = TrainingConfig(**base, schedule="one_cycle")
    rates = [learning_rate(one_cycle, step, 10, 101) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 25) and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert int(np.argmax(rates)) == 30
    cyclical = TrainingConfig(**base, schedule="cyclical", cycle_epochs=2)
    assert learning_rate(cyclical, 10, 10, 101) == pytest.approx(1.0)
    assert learning_rate(cyclical, 20, 10, 101) == pytest.approx(0.1)
    warm = TrainingConfig(**base, schedule="constant", warmup_steps=4)
    assert [learning_rate(warm, step, 10, 101) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_sharpness_aware_step_on_a_parabola():
    """f(w) = w^2 at w = 1, rho = 0.1: the gradient is taken at 1.1, so SGD with rate 0.5 lands on 1 - 0.5 * 2.2."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    sam = SharpnessAware(optimizer, torch.nn.Identity(), rho=0.1)
    (weight**2).sum().backward()
    sam.climb()
    assert weight.item() == pytest.approx(1.1)
    (weight**2).sum().backward()
    sam.descend()
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.5 * 2.2)


def test_sharpness_aware_step_leaves_running_statistics_of_the_climb_out():
    norm = torch.nn.BatchNorm1d(1)
    sam = SharpnessAware(torch.optim.SGD(norm.parameters(), lr=0.5), norm, rho=0.1)
    batch = torch.tensor([[1.0], [3.0]])
    norm(batch).square().sum().backward()
    after_one = norm.running_mean.clone()
    sam.climb()
    norm(batch + 5).square().sum().backward()
    sam.descend()
    assert torch.equal(norm.running_mean, after_one) and after_one.item() == pytest.approx(0.2)
    norm(batch)
    assert norm.running_mean.item() == pytest.approx(0.9 * 0.2 + 0.1 * 2.0), "afterwards they move again"


def test_sharpness_aware_step_survives_an_overflow():
    """A float16 gradient that overflowed: the scaler skips the step, so the weights must come back as they were."""
    weights = [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([3.0]))]
    sam = SharpnessAware(torch.optim.SGD(weights, lr=0.5), torch.nn.Identity(), rho=0.1)
    weights[0].grad, weights[1].grad = torch.tensor([float("inf"), 1.0]), torch.tensor([float("nan")])
    sam.climb()
    sam.descend()
    assert weights[0].tolist() == [1.0, 2.0] and weights[1].tolist() == [3.0]


def test_batch_norm_reestimation_is_the_plain_mean_over_batches():
    layer = torch.nn.BatchNorm1d(1)
    layer.running_mean.fill_(100.0)
    batches = [torch.full((2, 1), 1.0), torch.tensor([[2.0], [4.0]])]
    reestimate_batch_norm(layer, lambda: batches, torch.device("cpu"))
    assert layer.running_mean.item() == pytest.approx(2.0)  # mean of 1 and 3
    assert layer.running_var.item() == pytest.approx(1.0)  # mean of 0 and 2
    assert layer.momentum == 0.1


@pytest.mark.parametrize("option", [{"sam_rho": 0.05}, {"loss": "oc_softmax"}, {"loss": "p2sgrad"},
                                    {"sampling": "balanced"}, {"precision": "bf16"}])  # fmt: skip
def test_options_train_and_their_weights_load(corpus, tmp_path, option):
    result, _ = run(corpus, tmp_path, epochs=1, **option)
    assert np.isfinite(result.history["train_loss"]).all()
    output = load_model(weights=result.weights)(torch.zeros(1, 4000))
    assert output.logits.shape == (1, 2)
    expected = "logit" if option.get("loss", "cross_entropy") == "cross_entropy" else "cosine"
    for name in ("best.json", "dev_scores.csv.json"):
        assert json.loads((tmp_path / name).read_text())["score"].startswith(expected)


def test_a_run_is_taken_over_from_files_that_can_only_be_read(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole")
    earlier, later = tmp_path / "attached" / "02_train", tmp_path / "02_train"
    run(corpus, earlier, time_budget_s=1e-3)  # stops after its first step
    (earlier / "figures").mkdir()
    for path in filter(Path.is_file, earlier.iterdir()):
        path.chmod(0o444)
    take_over(earlier, later)
    result, said = run(corpus, later)
    assert "resuming" in said and not (later / "figures").exists()
    assert len(result.history) == len(whole.history)
    take_over(earlier, later)
    assert len(load_training_state(later / "checkpoint.pt")["state"]["history"]) == 3, "what is there is kept"
    with pytest.raises(TrainingError, match=r"empty holds no checkpoint.pt .* expected the folder"):
        take_over(tmp_path / "empty", tmp_path / "new")


def test_automatic_batch_size_is_measured_and_explained(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 40 * 2**20)
    _, said = run(corpus, tmp_path, epochs=1, batch_size="auto")
    assert "MiB each" in said and "square root of" in said
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: 2**10)
    with pytest.raises(TrainingError, match="not even 2 utterances"):
        run(corpus, tmp_path / "none", epochs=1, batch_size="auto")


def test_a_continued_run_keeps_the_batch_and_the_rates_it_began_with(corpus, tmp_path, monkeypatch):
    seen = []
    for free_mib in (40, 80):
        monkeypatch.setattr(memory, "free_device_bytes", lambda device, free=free_mib * 2**20: free)
        for folder in (tmp_path, tmp_path / str(free_mib)):
            config = run(corpus, folder, epochs=1, batch_size="auto")[0].config
            seen.append((config.batch_size, config.learning_rate))
    first, alone_40, again, alone_80 = seen
    assert first == alone_40 == again != alone_80
    assert first[1] == pytest.approx(1e-3 * np.sqrt(first[0] / 24))


def test_a_measurement_that_does_not_fit_is_made_with_fewer_utterances(monkeypatch):
    tried = []

    def step(model, config, probe, device, precision):
        tried.append(probe)
        if probe > limit:
            raise torch.OutOfMemoryError("pretended")
        return probe

    monkeypatch.setattr(plan, "CPU_PROBE", 24)
    monkeypatch.setattr(plan, "_measure", step)
    limit = 6
    assert plan.measure(None, tiny_config(), 24, torch.device("cpu"), FLOAT32) == 6 and tried == [24, 12, 6]
    limit = 1
    with pytest.raises(TrainingError, match="not even 2 utterances of 4000 samples fit: out of memory"):
        plan.measure(None, tiny_config(), 24, torch.device("cpu"), FLOAT32)


def test_saved_activations_are_counted_once():
    weight = torch.nn.Parameter(torch.ones(1000))
    saved = memory.activation_bytes(lambda: (weight.exp() * weight.exp()).sum())
    assert saved in (8000, 12000)  # two exp results (each kept by exp and by the product), perhaps the weight
    assert memory.activation_bytes(lambda: (weight.square() * weight.exp()).sum(), besides=[weight]) == 8000


def test_what_takes_long_is_not_timed_often(monkeypatch):
    times = iter([0.0, 0.1, 0.1, 0.3, 0.3, 0.9, 0.9, 1.0])  # steps of 0.1, 0.2, 0.6, 0.1 s
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(times))
    assert plan._usual_time(lambda: None, torch.device("cpu")) == pytest.approx(0.2)
    times = iter([0.0, 3.0, 3.0])
    assert plan._usual_time(lambda: None, torch.device("cpu")) == 3.0


def test_plans_keep_the_recipe_when_it_fits_and_say_what_they_give_up(monkeypatch):
    seconds = {"AASIST": 0.5, "AASIST-L": 0.2, "LCNN": 0.02, "RawNet2": 1.0}  # of training, per 4.04 s utterance

    def measured(model, config, batch_size, device, precision):
        small = sum(p.numel() for p in model.parameters()) < 200_000
        name = type(model).__name__ + ("-L" if small and type(model).__name__ == "AASIST" else "")
        part = config.crop_samples / TrainingConfig().crop_samples
        return plan.Cost(seconds[name] * part, seconds[name] * part / 3)

    monkeypatch.setattr(plan, "measure", measured)
    monkeypatch.setattr(plan.time, "monotonic", lambda: 0.0)  # planning takes no time here
    cpu = torch.device("cpu")
    made = plan.plan_run(TrainingConfig(), 100, 50, 50, 0.0, cpu)
    assert made.config == TrainingConfig() and "No time budget" in made.why[0]

    made = plan.plan_run(TrainingConfig(), 100, 50, 50, 10_000.0, cpu)  # needs 100 * (50 + 8.3) + 8.3 s
    assert made.config.time_budget_s == pytest.approx(10_000.0 - 50 * 0.5 / 3)
    assert made.config.replace(time_budget_s=0.0) == TrainingConfig() and "fits the" in made.why[0]

    for budget_s, crop in ((300.0, 32_000), (100.0, 16_000)):
        made = plan.plan_run(TrainingConfig(seed=5), 100, 50, 50, budget_s, cpu)
        assert "would take" in made.why[0] and (made.config.model, made.config.crop_samples) == ("aasist-l", crop)
        assert made.config.seed == 5 and (made.n_train, made.n_dev, made.n_eval) == (100, 50, 50)
        epochs = int((0.85 * budget_s - 50 / 15) // ((100 * 0.2 + 50 * 0.2 / 3) * crop / 64_600))
        assert made.config.epochs == "auto" and f"about {epochs} epochs" in made.why[1]
        assert made.config.time_budget_s == pytest.approx(budget_s - 50 / 15), "eval is scored in the rest"

    made = plan.plan_run(TrainingConfig(epochs="auto", time_budget_s=10_000.0), 100, 50, 50, 10_000.0, cpu)
    assert made.config.epochs == "auto" and f"{plan.LONGEST_SHORT_RUN} epochs" in made.why[0]
    made = plan.plan_run(TrainingConfig(), 100, 50, 50, 40.0, cpu)
    assert made.config.model == "lfcc-lcnn" and "lfcc-lcnn" in made.why[1]
    for name in ("rawnet2", "aasist"):
        wish = TrainingConfig(model=name, loss="oc_softmax", augmentation="wild")
        made = plan.plan_run(wish, 100, 50, 50, 40.0, cpu, keep_model=True)
        assert (made.config.model, made.config.loss, made.config.augmentation) == (name, "oc_softmax", "wild")

    made = plan.plan_run(TrainingConfig(), 25_380, 24_844, 71_237, 300.0, cpu)
    assert made.config.crop_samples == 16_000 and made.n_train < 25_380 and "trials are drawn" in made.why[1]
    assert "follows the speed of this machine" in made.why[-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_on_a_gpu_the_waveforms_stay_there_and_the_model_learns(corpus, tmp_path, precision):
    said = []
    config = tiny_config(epochs=6, learning_rate=3e-3, schedule="one_cycle", precision=precision)
    result = fit(*corpus, tmp_path, config, device="cuda", say=said.append)
    assert result.best_dev_eer < 0.2 and "memory of cuda" in "\n".join(said)


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="schedule 'linear' is unknown: expected one of cosine"):
        TrainingConfig(schedule="linear")
    with pytest.raises(ConfigError, match="batch_size 1"):
        TrainingConfig(batch_size=1)
    with pytest.raises(ConfigError, match="unknown training setting epoch"):
        TrainingConfig().replace(epoch=3)
    for weights in (0.5, "0.5", [0.5], [0.5, "x"], [0.5, 0.0]):
        with pytest.raises(ConfigError, match="class_weights .* expected two positive numbers"):
            TrainingConfig.from_dict({"class_weights": weights})
    assert TrainingConfig.from_dict(RECIPES["short"].to_dict()) == RECIPES["short"]


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("epochs", 2.5, "auto or a whole number from 1 to 100000"),
        ("epochs", True, "a whole number"),
        ("seed", -1, "a whole number from 0"),
        ("learning_rate", float("nan"), "a number from 0 to 10"),
        ("clip_norm", float("inf"), "a number of at least 0"),
        ("weight_decay", "0.1", "a number"),
        ("band_mask", "no", "true or false"),
        ("model_options", 3, "names with their values"),
        ("model", "resnet", "expected one of aasist"),
        ("augmentation", "noise", "expected one of none"),
        ("loss", ["cross_entropy"], "expected one of"),
        ("epochs", "auto", "give time_budget_s"),
    ],
)
def test_config_refuses_values_of_another_kind_or_out_of_range(setting, value, expected):
    with pytest.raises(ConfigError, match=expected) as told:
        TrainingConfig(**{setting: value})
    assert setting in str(told.value) and (repr(value) in str(told.value))


def test_config_takes_numbers_of_any_library_as_plain_ones():
    config = TrainingConfig(epochs=np.int64(3), learning_rate=np.float32(0.5), clip_norm=2, class_weights=[1, 2])
    assert json.loads(json.dumps(config.to_dict()))["epochs"] == 3
    assert [type(v) for v in (config.epochs, config.learning_rate, config.clip_norm)] == [int, float, float]


def test_without_tensorboard_training_goes_on(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # the import fails
    result, said = run(corpus, tmp_path, epochs=1)
    assert result.stopped == "all epochs done" and "TensorBoard is not installed" in said


@pytest.mark.parametrize("loss", ["oc_softmax", "p2sgrad"])
def test_one_class_weights_go_on_with_what_their_loss_had_learned(corpus, tmp_path, loss):
    first, _ = run(corpus, tmp_path / "first", epochs=1, loss=loss)
    changes = dict(epochs=1, learning_rate=1e-9, learning_rate_min=0.0)
    second = fit(*corpus, tmp_path / "second", tiny_config(loss=loss, **changes), model=first.model, say=str)
    for name, value in first.model.criterion.state_dict().items():
        torch.testing.assert_close(second.model.criterion.state_dict()[name], value, rtol=0, atol=1e-6)
    said = []
    third = fit(*corpus, tmp_path / "third", tiny_config(**changes), model=first.model, device="cpu", say=said.append)
    assert "had learned does not" in "\n".join(said) and type(third.model).__name__ == "AASIST"


def test_weights_of_another_architecture_are_refused_before_anything_is_read(corpus, tmp_path):
    model = load_model("aasist-l")
    with pytest.raises(ConfigError, match=r"config.model is 'aasist'.*use config.replace\(model='aasist-l'"):
        fit(*corpus, tmp_path, TrainingConfig(epochs=1), model=model, device="cpu", say=str)
    with pytest.raises(ConfigError, match="config.model is 'lfcc-lcnn'"):
        fit(*corpus, tmp_path, TrainingConfig(model="lfcc-lcnn", epochs=1), model=model, device="cpu", say=str)
    for kind, given in (("str", "lfcc-lcnn"), ("Linear", torch.nn.Linear(2, 2))):
        with pytest.raises(
            ConfigError, match=f"model= is {kind} with no configuration, and config.model is 'aasist-l'"
        ):
            fit(*corpus, tmp_path, tiny_config(), model=given, device="cpu", say=str)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("column, value", [("corpus", "demo"), ("speaker", "DEMO_0001")])
def test_weights_of_the_synthetic_demo_say_so(corpus, tmp_path, column, value):
    run([frame.assign(**{column: value}) for frame in corpus], tmp_path, epochs=1)
    assert json.loads((tmp_path / "best.json").read_text())["trained_on"]["synthetic_demo"]


def test_a_full_disk_is_one_sentence_and_loses_nothing(corpus, tmp_path, monkeypatch):
    whole, _ = run(corpus, tmp_path / "whole", epochs=2)
    write, written = Path.write_bytes, []

    def until_full(path, content):
        written.append(path)
        if len(written) > 2:  # the one before the first step, and that of the first epoch
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", until_full)
        with pytest.raises(TrainingError, match=r"checkpoint.pt cannot be written: No space left on device; it needs "
                           r"[\d,]+ bytes and the disk mounted at .* has [\d,]+ free"):  # fmt: skip
            run(corpus, tmp_path / "parts", epochs=2)
    parts, said = run(corpus, tmp_path / "parts", epochs=2)
    assert "resuming:  epoch 2, step 0" in said
    assert parts.history["train_loss"].tolist() == whole.history["train_loss"].tolist()


def test_the_batch_is_sized_after_the_waveforms_have_taken_their_memory(corpus, tmp_path, monkeypatch):
    order, opened = [], prepare.open_source
    monkeypatch.setattr(prepare, "open_source", lambda *a, **k: order.append("waveforms") or opened(*a, **k))
    monkeypatch.setattr(memory, "free_device_bytes", lambda device: order.append("batch") or 40 * 2**20)
    run(corpus, tmp_path, epochs=1, batch_size="auto")
    assert order == ["waveforms", "waveforms", "batch"]


def test_an_automatic_batch_is_that_of_all_processes(monkeypatch):
    monkeypatch.setattr(prepare, "automatic_batch_size", lambda *a: 8 if a[-1] == 2 else 16)
    world = SimpleNamespace(size=2, local_size=2, smallest=lambda value: value)
    settled = prepare._settle(None, TrainingConfig(batch_size="auto"), 1000, torch.device("cpu"), FLOAT32, world, str)
    assert settled.batch_size == 16, "two processes share the memory of one machine: 8 each"
    assert settled.learning_rate == pytest.approx(1e-4 * np.sqrt(16 / 24))
    monkeypatch.setattr(prepare, "automatic_batch_size", lambda *a: 192)
    wish = (None, TrainingConfig(batch_size="auto"), 10_000, torch.device("cpu"), FLOAT32)
    assert prepare._settle(*wish, world, str).batch_size == 192, "eight times the recipe's, however many share it"
    world.size = 3
    with pytest.raises(TrainingError, match="2 utterances cannot be divided among 3 processes"):
        prepare._settle(None, TrainingConfig(batch_size=2), *wish[2:], world, str)


def test_epochs_by_the_time_there_is_are_a_run_that_can_be_repeated(corpus, tmp_path, monkeypatch):
    for module in (training, prepare):
        monkeypatch.setattr(module, "LONGEST_SHORT_RUN", 2)
    auto, said = run(corpus, tmp_path / "auto", epochs="auto", time_budget_s=600.0)
    assert auto.config.epochs == 2 and "settled:   epochs=2" in said
    numbers, _ = run(corpus, tmp_path / "numbers", epochs=2, time_budget_s=600.0)
    assert numbers.history["train_loss"].tolist() == auto.history["train_loss"].tolist(), "timed steps are taken back"
    for epochs in ("auto", 2):
        again, _ = run(corpus, tmp_path / "auto", epochs=epochs, time_budget_s=900.0)
        assert len(again.history) == 2 and again.config.epochs == 2


def test_pace_follows_the_real_steps_of_the_epoch_but_not_the_first_of_all(monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 14.0, 100.0, 101.0])
    monkeypatch.setattr("deepfake_utils.training.run.time.monotonic", lambda: next(clock))
    pace, seen = Pace(started=0.0), []
    for n_steps in (3, 1):
        pace.begin_epoch()
        for _ in range(n_steps):
            pace.note_step()
            seen.append(pace.step_s)
    assert seen == [10.0, 2.0, 2.0, 1.0]


def test_macro_eer_counts_every_source_alike():
    labels = np.array([1, 0, 1, 0, 1, 0, 0])
    scores = np.array([5.0, 1.0, 0.0, 2.0, 6.0, -1.0, -2.0])
    sources = np.array(["good", "good", "bad", "bad", "real only", "fake only", "fake only"])
    assert macro_eer(scores, labels, sources) == np.mean([0.0, 1.0, 0.0, 0.0])


def test_macro_selection_needs_sources_and_keeps_its_own_best(corpus, tmp_path):
    with pytest.raises(TrainingError, match="selection='macro' needs a column 'source', and the dev protocol"):
        run(corpus, tmp_path, selection="macro")
    frames = [frame.assign(source=[f"s{n % 3}" for n in range(len(frame))]) for frame in corpus]
    result, said = run(frames, tmp_path, epochs=2, selection="macro", sampling="source")
    assert f"best dev EER, mean over sources, {100 * result.best_dev_eer:.2f} %" in said
    assert result.best_dev_eer == result.history["dev_macro_eer"].min()
    assert json.loads((tmp_path / "best.json").read_text())["dev_macro_eer"] == result.best_dev_eer


def test_source_weights_balance_labels_within_sources():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"source": rng.choice(["a", "b", "c", "d", "e"], 400, p=[0.5, 0.2, 0.1, 0.1, 0.1])})
    frame["label"] = np.where(frame["source"] == "d", 1, np.where(frame["source"] == "e", 0, rng.integers(0, 2, 400)))
    frame["attack"] = np.where(frame["label"] == 1, "-", rng.choice(["x", "y", "z"], 400))
    frame["weight"] = source_weights(frame)
    share = frame.groupby(["source", "label"])["weight"].sum()
    for source in "abc":
        assert share[source, 0] == pytest.approx(share[source, 1])
    assert share["a"].sum() > share["b"].sum() > share["c"].sum()
    assert share[["a", "b", "c"]].sum() == pytest.approx(0.7)
    assert share["d", 1] == pytest.approx(0.15) and share["e", 0] == pytest.approx(0.15)
    by_attack = frame[frame["source"] == "e"].groupby("attack")["weight"].sum()
    np.testing.assert_allclose(by_attack, 0.05)
    assert source_weights(frame[frame["source"] == "a"]).sum() == pytest.approx(1.0)
    assert source_weights(frame[frame["source"].isin(["d", "e"])]).sum() == pytest.approx(1.0)
