"""Targets: files that fit their machine, with cards that say what that cost, loaded by name."""

import json

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from deepfake_utils.__main__ import main
from deepfake_utils.conventions import CROP_SAMPLES, SAMPLE_RATE_HZ, CheckpointError, ConfigError
from deepfake_utils.demo.voice import draw_speaker, speak
from deepfake_utils.models import build_model
from deepfake_utils.scoring import weights as room
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.scoring.targets import (
    DECIDED,
    MAX_LOSS,
    TARGETS,
    build,
    error_rate,
    few_a_family,
    misses,
    read_card,
)
from deepfake_utils.scoring.weights import save_weights

N_SAMPLES = 20_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Protocols of babble, two sources and two families of fakes a split."""
    folder = tmp_path_factory.mktemp("babble")
    rng = np.random.default_rng(0)
    protocols = {}
    for split in ("train", "dev", "eval"):
        rows = []
        for number in range(12):
            sound = speak(draw_speaker(rng), N_SAMPLES, rng)
            label, attack = (1, "-") if number % 2 else (0, ("blurred", "bands")[number % 4 // 2])
            path = folder / f"{split}{number}.wav"
            fake = sound if label else np.sign(sound) * np.abs(sound) ** 0.5
            soundfile.write(path, 0.3 * fake / np.abs(fake).max(), SAMPLE_RATE_HZ)
            rows.append((path.stem, str(path), label, attack, f"source {number // 6}"))
        protocols[split] = pd.DataFrame(rows, columns=["utterance", "path", "label", "attack", "source"])
    return protocols


@pytest.fixture(scope="module")
def weights(tmp_path_factory, corpus):
    """A narrow network after a few steps, so that its scores depend on the sound."""
    options = {"channels": (8, 8), "stem_channels": 8, "pooled_channels": 16, "embedding_dim": 8}
    model = build_model("spectrogram-resnet", generator=torch.Generator().manual_seed(0), **options)
    sounds = np.stack([soundfile.read(path, dtype="float32")[0] for path in corpus["train"]["path"]])
    labels = torch.tensor(corpus["train"]["label"].to_numpy())
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(20):
        torch.nn.functional.cross_entropy(model(torch.from_numpy(sounds)).logits, labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    path = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
    return save_weights(path, model.eval(), name="spectrogram-resnet", facts={"trained_on": "babble"})


@pytest.fixture(scope="module")
def laptop(tmp_path_factory, weights, corpus):
    out = tmp_path_factory.mktemp("targets") / "laptop.onnx"
    return out, build("laptop", weights, corpus, out)


def test_a_card_says_what_was_measured(laptop, weights, corpus):
    out, card = laptop
    assert card == json.loads(out.with_suffix(".json").read_text())
    assert card["target"] == "laptop" and card["numbers"] == "int8" and card["bytes"] == out.stat().st_size
    assert card["trained_on"] == "babble" and card["model"] == "spectrogram-resnet"
    assert card["log_odds_rms"] <= max(card["rms_of_each_layer_alone"].values()) + 0.1
    assert set(card["kept_float"]) < set(card["rms_of_each_layer_alone"])
    eer = card["eer"]["eval"]
    assert (
        eer["low"] <= eer["value"] <= eer["high"] and eer["trials"] == len(corpus["eval"]) and eer["unit"] == "source"
    )
    assert abs(card["eer_lost"]["eval"]["value"] - (eer["value"] - card["eer_float32"]["eval"]["value"])) < 1e-12
    assert card["ms_a_window"] > 0 and len(card["made_from"]) == 64


def test_a_detector_by_name_gives_the_calibrated_log_odds_of_the_weights(laptop, weights, corpus, monkeypatch):
    out, card = laptop
    monkeypatch.setitem(room.SHIPPED, "laptop", out)
    detector, original = Detector.load("laptop", whole=False), Detector.load(weights, whole=False)
    assert detector.is_calibrated and not original.is_calibrated
    slope, offset = card["calibration"]["slope"], card["calibration"]["offset"]
    for path in corpus["eval"]["path"][:4]:
        [ours], [theirs] = detector(path).windows, original(path).windows
        assert ours.log_odds == pytest.approx(slope * (ours.logit_bonafide - ours.logit_spoof) + offset)
        difference = ours.logit_bonafide - ours.logit_spoof - (theirs.logit_bonafide - theirs.logit_spoof)
        assert abs(difference) < 0.5


def test_half_precision_loses_nothing(weights, corpus, tmp_path):
    card = build("phone", weights, corpus, tmp_path / "phone.onnx")
    assert card["eer"] == card["eer_float32"] and card["misses"] == []
    assert "kept_float" not in card and card["numbers"] == "float16"


def test_misses_are_said(laptop):
    card = dict(laptop[1]) | {"target": "tiny", "bytes": 100_001, "ms_a_window": 10.5}
    card |= {"eer_lost": {"eval": {"value": MAX_LOSS + 0.001}}}
    found = "; ".join(misses(card))
    assert "100,001 bytes" in found and "10.5 ms" in found and "0.60 points" in found
    assert misses(card | {"target": "server", "eer_lost": {"eval": {"value": 0.0}}}) == []


def test_few_of_each_family_of_each_source():
    rows = [(label, attack, source) for label, attack in ((1, "-"), (0, "a")) for source in "xy" for _ in range(9)]
    protocol = pd.DataFrame(rows, columns=["label", "attack", "source"])
    few = few_a_family(protocol, 4)
    assert (few.groupby(["source", "attack"]).size() == 4).all() and few.index.is_monotonic_increasing
    pd.testing.assert_frame_equal(few, few_a_family(protocol, 4))


def test_error_rates_come_with_an_interval_also_where_no_source_is_named(corpus):
    scores = np.random.default_rng(0).standard_normal(12) + corpus["eval"]["label"]
    assert error_rate(scores, corpus["eval"])["unit"] == "source"
    assert error_rate(scores, corpus["eval"].drop(columns="source"))["unit"] == "recording"


def test_the_command_asks_for_what_it_needs(weights, tmp_path, capsys, corpus):
    assert main(["export", str(tmp_path / "x.onnx"), "--weights", str(weights), "--target", "phone"]) == 2
    assert "--data" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="ending in .onnx"):
        build("phone", weights, corpus, tmp_path / "phone.bin")
    with pytest.raises(ConfigError, match="server, laptop, phone, tiny"):
        build("watch", weights, corpus, tmp_path / "watch.onnx")


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_shipped_fits_its_target(name):
    if not (room.ASSETS / f"{name}.json").is_file():
        pytest.skip(f"no {name} is shipped with these weights yet")
    path, card, target = room.weights_file(name), read_card(name), TARGETS[name]
    assert card["target"] == name and card["misses"] == []
    if name != "server":
        assert path.stat().st_size == card["bytes"] <= (target.max_bytes or np.inf)
    assert Detector.load(name).is_calibrated


def test_the_same_network_in_half_precision_decides_as_the_shipped_weights_do():
    phone, whole = Detector.load("phone"), Detector.load()
    assert {name: phone.facts[name] for name in DECIDED} == {name: whole.facts[name] for name in DECIDED}
    clip = 0.1 * np.random.default_rng(0).standard_normal(CROP_SAMPLES).astype(np.float32)
    verdicts = [Detector.load(name, whole=False, use="call-centre")(clip, 16_000) for name in ("phone", None)]
    assert verdicts[0].log_odds == pytest.approx(verdicts[1].log_odds, abs=0.01)
    assert verdicts[0].threshold == verdicts[1].threshold


def test_a_name_that_is_none_is_refused_with_the_names():
    with pytest.raises(CheckpointError, match="phone, tiny, aasist"):
        room.weights_file("watch")
