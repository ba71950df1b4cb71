"""Runs in other processes: several seeds, torchrun over gloo, the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from deepfake_utils import corpora
from deepfake_utils.__main__ import main
from deepfake_utils.conventions import ConfigError, TrainingError
from deepfake_utils.training import jobs
from deepfake_utils.training import loop as training
from deepfake_utils.training.jobs import fit_seeds, run_job, write_job
from tests.test_training import tiny_config, write_corpus

REPOSITORY = Path(__file__).resolve().parents[1]
# RawNet2 has no dropout; its batch norms are frozen in the comparison, because over gloo each process has its own.
TINY_RAWNET2 = {"sinc_filters": 4, "channels": (4, 4, 8, 8, 8, 8), "gru_dim": 8, "gru_layers": 1, "embedding_dim": 8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("tones"))


def test_a_job_folder_is_the_whole_run_and_goes_on_where_it_stopped(corpus, tmp_path):
    write_job(tmp_path, *corpus, tiny_config(epochs=2))
    first = run_job(tmp_path, device="cpu", say=str)
    said = []
    again = run_job(tmp_path, device="cpu", say=said.append)
    assert again.history["train_loss"].tolist() == pytest.approx(first.history["train_loss"].tolist())
    assert any("finished:  all epochs done" in line for line in said) and not any("device:" in line for line in said)
    with pytest.raises(TrainingError, match="train.csv, dev.csv, config.json missing"):
        run_job(tmp_path / "empty")


def test_seeds_run_one_after_another_and_are_summarised(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # other processes find the package wherever they start
    scratch = tmp_path / "scratch"
    config = tiny_config(epochs=1, data_path="store", batch_size="auto")
    table = fit_seeds(*corpus, tmp_path, config, seeds=(1, 2), device="cpu", waveforms_dir=scratch, say=str)
    assert any(scratch.iterdir()) and not (tmp_path / "waveforms").exists()
    assert table["seed"].tolist() == [1, 2] and np.isfinite(table["dev_eer"]).all()
    assert all(Path(weights).is_file() for weights in table["weights"])
    assert (tmp_path / "seed_1" / "log.txt").read_text().count("epoch ") >= 1
    sizes = [json.loads((tmp_path / f"seed_{n}" / "config.json").read_text())["batch_size"] for n in (1, 2)]
    assert sizes == ["auto", 24], "the second seed runs what the first one settled on"


def test_other_processes_start_a_run_without_reading_its_job(corpus, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(corpora, "find_corpora", lambda folder: [Tones(*corpus)])
    monkeypatch.setattr(training, "fit", lambda train, dev, *_, **__: seen.append((len(train), len(dev))))
    assert main(["train", str(tmp_path / "run"), "--data", "somewhere"]) == 0
    assert seen == [(len(corpus[0]), len(corpus[1]))] and not (tmp_path / "run").exists()


class Tones:
    """A corpus of two protocols."""

    splits = ("train", "dev")

    def __init__(self, train, dev):
        self.protocols = {"train": train, "dev": dev}

    def protocol(self, split):
        return self.protocols[split]


def test_a_seed_that_fails_says_why(corpus, tmp_path):
    train, dev = corpus
    broken = train.assign(path=train["path"].str.replace("train_003", "gone"))
    with pytest.raises(TrainingError, match=r"(?s)seed 1 failed with exit code 2.*gone"):
        fit_seeds(broken, dev, tmp_path, tiny_config(epochs=1), seeds=(1,), device="cpu", say=str)


def test_seeds_get_the_gpus_that_this_process_may_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [jobs._gpus(device) for device in ("auto", "cuda:1", "cpu")] == [["0", "1"], ["1"], []]
    for device in ("cuda:7", "cuda:x"):
        with pytest.raises(ConfigError, match=f"device '{device}' was asked for, but there are 2 GPUs"):
            jobs._gpus(device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5af1")
    assert [jobs._gpus(device) for device in ("auto", "cuda:1", "cpu")] == [["2", "GPU-5af1"], ["GPU-5af1"], []]


CHILD = """
import sys, torch
torch.set_num_threads(1)
from deepfake_utils.models import build_model
from deepfake_utils.training.jobs import run_job
from deepfake_utils.training.parallel import World
import deepfake_utils.training.prepare as prepare

def frozen(name, generator, **options):
    model = build_model(name, generator=generator, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval().train = lambda mode=True, module=module: module
    return model

prepare.build_model = frozen
with World() as world:
    assert (world.smallest(world.rank + 5), world.broadcast(world.rank + 0.5)) == (5, 0.5)
    run_job(sys.argv[1], device="cpu")
"""


def run_in_processes(n: int, folder: Path) -> pd.DataFrame:
    script = folder.parent / "child.py"
    script.write_text(CHILD)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run([*launch, str(script), str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return pd.read_csv(folder / "history.csv")


@pytest.mark.parametrize("loss", ["cross_entropy", "oc_softmax"])  # the second has a parameter of its own
def test_two_processes_follow_the_loss_curve_of_one(corpus, tmp_path, loss):
    config = tiny_config(model="rawnet2", model_options=TINY_RAWNET2, epochs=3, class_weights=(0.1, 0.9), loss=loss,
                         learning_rate=1e-2, time_budget_s=600.0)  # fmt: skip
    curves = [
        run_in_processes(n, write_job(tmp_path / f"n{n}", *corpus, config))["train_loss"].to_numpy() for n in (1, 2)
    ]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    assert len(set(curves[0])) == 3, "a curve that moves"


def test_the_command_line_trains_and_goes_on(corpus, tmp_path):
    train, dev = corpus
    root = tmp_path / "corpus" / "LA"
    for split, suffix, frame in (("train", "train.trn", train), ("dev", "dev.trl", dev)):
        flac = root / f"ASVspoof2019_LA_{split}" / "flac"
        flac.mkdir(parents=True)
        lines = []
        for n, row in enumerate(frame.itertuples()):
            utterance = f"LA_{split[0].upper()}_{n:07d}"
            os.symlink(row.path, flac / f"{utterance}.flac")
            key, attack = ("bonafide", "-") if row.label else ("spoof", "A01")
            lines.append(f"LA_{n % 4:04d} {utterance} - {attack} {key}")
        protocols = root / "ASVspoof2019_LA_cm_protocols"
        protocols.mkdir(exist_ok=True)
        (protocols / f"ASVspoof2019.LA.cm.{suffix}.txt").write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    command = [sys.executable, "-m", "deepfake_utils", "train", str(run), "--device", "cpu"]
    settings = [f"{name}={json.dumps(value)}" for name, value in tiny_config(epochs=1).to_dict().items()]
    new = [*command, "--data", str(tmp_path / "corpus"), *(word for s in settings for word in ("--set", s))]
    for arguments in (new, command):
        done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "finished:  all epochs done" in done.stdout
    plain = tmp_path / "plain"
    for row in pd.concat([train, dev]).itertuples():
        folder = plain / ("bonafide" if row.label else "spoof")
        folder.mkdir(parents=True, exist_ok=True)
        os.symlink(row.path, folder / Path(row.path).name)
    new[new.index(str(run))], new[new.index(str(tmp_path / "corpus"))] = str(tmp_path / "run2"), str(plain)
    done = subprocess.run(new, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "splits were drawn (seed 7): 60 % train, 20 % dev, 20 % eval" in done.stdout
    bad = subprocess.run([*command, "--data", str(tmp_path / "corpus"), "--set", "epoch=1"], cwd=REPOSITORY,
                         capture_output=True, text=True)  # fmt: skip
    assert bad.returncode == 2 and "unknown training setting epoch" in bad.stderr and "Traceback" not in bad.stderr


def test_a_job_keeps_names_that_are_no_text(tmp_path):
    names = [os.fsdecode(b"\xff{a}.wav"), 'b "c"\nd.wav']
    protocol = pd.DataFrame({"utterance": names, "path": names, "label": [1, 0], "attack": ["-", "x"], "speaker": "-",
                             "split": "train", "corpus": "c"})  # fmt: skip
    jobs.write_job(tmp_path, protocol, protocol, tiny_config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "fit", lambda train, dev, *_, **__: train)
        pd.testing.assert_frame_equal(jobs.run_job(tmp_path), protocol)
