"""LFCC and log spectrogram against their definition, written out here in double-precision NumPy."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from deepfake_utils.conventions import AudioError, ConfigError
from deepfake_utils.models.lfcc import (
    FRONT_ENDS,
    LFCC_HIGH_RESOLUTION,
    LFCC_LEVELLED,
    Lfcc,
    LfccConfig,
    LogSpectrogram,
    build_front_end,
)
from deepfake_utils.scoring.onnx import PowerInTwoSteps

CONFIGS = {"standard": LfccConfig(), "high-resolution": LFCC_HIGH_RESOLUTION}
HAMMING, HANN = (0.54, 0.46), (0.5, 0.5)


def power_by_definition(waveform, config, shape=HAMMING):
    """(frames, bins): every sum of the discrete Fourier transform written as a matrix product."""
    x = np.asarray(waveform, dtype=np.float64)
    x = np.concatenate([x[:1], x[1:] - config.pre_emphasis * x[:-1]])
    n = np.arange(config.window_samples)
    window = shape[0] - shape[1] * np.cos(2 * np.pi * n / config.window_samples)
    k = np.arange(config.n_fft // 2 + 1)
    transform = np.exp(-2j * np.pi * np.outer(n, k) / config.n_fft)
    starts = range(0, len(x) - config.window_samples + 1, config.hop_samples)
    frames = np.stack([x[start : start + config.window_samples] for start in starts])
    return np.abs((frames * window) @ transform) ** 2


def triangle(frequency, left, peak, right):
    rising, falling = (frequency - left) / (peak - left), (right - frequency) / (right - peak)
    return np.clip(np.minimum(rising, falling), 0.0, None)


def lfcc_by_definition(waveform, config, shape=HAMMING, band_hz=(0.0, 8000.0), levelled=False):
    power = power_by_definition(waveform, config, shape)
    frequency = np.linspace(0.0, 8000.0, config.n_fft // 2 + 1)
    edge = np.linspace(*band_hz, config.n_filters + 2)
    energy = power @ np.stack([triangle(frequency, *edge[i : i + 3]) for i in range(config.n_filters)]).T
    log_energy = np.log10(energy / energy.mean() + 1e-7 if levelled else energy + np.finfo(np.float32).eps)
    static = dct(log_energy, type=2, norm="ortho", axis=1)[:, : config.n_coefficients]
    if levelled:
        static -= static.mean(0)

    def slope(c):  # the frame after minus the frame before, the ends repeated
        last = len(c) - 1
        return np.stack([c[min(t + 1, last)] - c[max(t - 1, 0)] for t in range(len(c))])

    return np.concatenate([static, slope(static), slope(slope(static))], axis=1).T


def speech_like(n_samples, seed=0, level=0.1):
    """Harmonics with a moving pitch over noise 40 dB lower: the dynamic range that rounding must survive."""
    rng = np.random.default_rng(seed)
    phase = np.cumsum(2 * np.pi * (120 + 30 * np.sin(np.arange(n_samples) / 3000)) / 16_000)
    harmonics = sum(np.sin(h * phase) / h**2 for h in range(1, 25))
    return (level * (harmonics + 0.01 * rng.standard_normal(n_samples))).astype(np.float32)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("n_samples", [480, 481, 5000, 64_600])
def test_lfcc_equals_the_definition(config, n_samples):
    waveform = speech_like(n_samples)
    ours = Lfcc(config)(torch.from_numpy(waveform)[None])[0].numpy()
    np.testing.assert_allclose(ours, lfcc_by_definition(waveform, config), atol=2e-4)


@pytest.mark.parametrize("n_samples", [512 + 15 * 256, 64_600])
def test_levelled_lfcc_equals_the_definition(n_samples):
    waveform = speech_like(n_samples)
    ours = build_front_end("lfcc-levelled")(torch.from_numpy(waveform)[None])[0].numpy()
    expected = lfcc_by_definition(waveform, LFCC_LEVELLED, HANN, band_hz=(62.5, 7562.5), levelled=True)
    np.testing.assert_allclose(ours, expected, atol=5e-4)


def test_levelled_lfcc_hears_neither_level_nor_tilt_nor_what_lies_above_its_band():
    front_end = build_front_end("lfcc-levelled")
    noise = np.random.default_rng(2).standard_normal(32_000)
    waveform = torch.from_numpy(0.05 * noise * (1.1 + np.sin(np.arange(32_000) / 900)))[None].float()
    heard = front_end(waveform)
    torch.testing.assert_close(front_end(0.01 * waveform), heard, atol=1e-3, rtol=1e-3)
    tilted = waveform - 0.9 * torch.nn.functional.pad(waveform[:, :-1], (1, 0))  # 25 dB between the band's ends
    above = waveform + 0.5 * torch.cos(2 * torch.pi * 7900 / 16_000 * torch.arange(32_000))
    for changed, most in ((tilted, 0.1), (above, 0.01)):
        assert (front_end(changed) - heard).square().mean() < most * heard.square().mean()
        ordinary = Lfcc()
        assert (ordinary(changed) - ordinary(waveform)).square().mean() > 0.1 * ordinary(waveform).square().mean()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_log_spectrogram_equals_the_definition(config):
    waveform = speech_like(4000, seed=1)
    ours = LogSpectrogram(config)(torch.from_numpy(waveform)[None])[0].numpy()
    expected = np.log10(power_by_definition(waveform, config) + np.finfo(np.float32).eps).T
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_lfcc_of_real_speech_equals_the_definition(reference_data):
    import soundfile

    paths = sorted((reference_data / "asvspoof2019_subset").rglob("*.flac"))[::40]
    assert paths
    for path in paths:
        waveform = soundfile.read(path, dtype="float32")[0]
        ours = Lfcc()(torch.from_numpy(waveform)[None])[0].numpy()
        np.testing.assert_allclose(ours, lfcc_by_definition(waveform, LfccConfig()), atol=5e-4, err_msg=path.name)


@given(st.integers(320, 3000), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_any_length_gives_the_announced_frames_and_each_frame_depends_on_its_window_alone(n_samples, seed):
    front_end = LogSpectrogram()
    waveform = torch.randn(1, n_samples, generator=torch.Generator().manual_seed(seed))
    features = front_end(waveform)
    n_frames = front_end.power.n_frames(n_samples)
    assert features.shape == (1, 257, n_frames)
    assert front_end.power.n_samples(n_frames) <= n_samples < front_end.power.n_samples(n_frames + 1)
    last = (n_frames - 1) * 160
    torch.testing.assert_close(front_end(waveform[:, last : last + 320])[..., 0], features[..., -1])


def test_a_tone_peaks_in_the_filter_around_its_frequency():
    tone = torch.sin(2 * torch.pi * 3000 * torch.arange(16_000) / 16_000)[None]
    front_end = Lfcc(LfccConfig(n_coefficients=20))
    static = front_end(tone)[0, :20].numpy()  # all 20 coefficients: the transform can be undone
    log_energy = dct(static, type=3, norm="ortho", axis=0)
    centres_hz = np.linspace(0, 8000, 22)[1:-1]
    assert (np.abs(centres_hz[log_energy.argmax(0)] - 3000) < 8000 / 21).all()


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_batch_gradient_silence_and_autocast(name):
    front_end = build_front_end(name)
    assert not list(front_end.parameters()) and not front_end.state_dict()  # constants do not travel with weights
    waveforms = torch.from_numpy(np.stack([speech_like(6000, seed=s) for s in (1, 2)] + [np.zeros(6000, "f4")]))
    waveforms.requires_grad_()
    features = front_end(waveforms)
    assert features.shape[:2] == (3, front_end.n_features)
    for waveform, row in zip(waveforms, features, strict=True):
        torch.testing.assert_close(front_end(waveform[None])[0], row, atol=1e-4, rtol=1e-4)
    features.square().mean().backward()
    assert torch.isfinite(features).all() and torch.isfinite(waveforms.grad).all()  # digital silence included
    assert waveforms.grad[0].abs().max() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(front_end(waveforms), features)
    half = front_end(waveforms.detach().half())
    assert half.dtype == torch.float32 and torch.isfinite(half).all()


def test_gradient_of_lfcc_is_that_of_the_definition():
    waveform = speech_like(640, seed=3).astype(np.float64)
    direction = np.random.default_rng(4).standard_normal(640)
    weights = np.random.default_rng(5).standard_normal((60, 3))
    step = 1e-6
    rise = [(weights * lfcc_by_definition(waveform + s * step * direction, LfccConfig())).sum() for s in (1, -1)]
    tensor = torch.from_numpy(waveform).float()[None].requires_grad_()
    (Lfcc()(tensor)[0] * torch.from_numpy(weights).float()).sum().backward()
    assert float(tensor.grad[0].double() @ torch.from_numpy(direction)) == pytest.approx(
        (rise[0] - rise[1]) / (2 * step), rel=1e-3
    )


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_the_path_that_onnx_exporters_see_gives_the_same_powers(name):
    power = build_front_end(name).power
    waveform = torch.from_numpy(speech_like(5000))[None]
    by_products = copy.deepcopy(power)
    by_products.__class__ = PowerInTwoSteps
    ordinary, exported = power(waveform), by_products(waveform)
    assert exported.shape == ordinary.shape
    peak = ordinary.amax(-1, keepdim=True)
    assert ((exported - ordinary).abs() <= 4e-6 * peak).all()  # a few roundings of the largest bin


def test_the_high_resolution_variant_is_30_ms_of_1024_points():
    config = LFCC_HIGH_RESOLUTION
    assert (config.window_samples, config.n_fft, config.pre_emphasis) == (30 * 16, 1024, 0.0)
    assert build_front_end("lfcc-high-resolution").n_features == 60


def test_a_clip_shorter_than_a_window_and_bad_settings_are_refused_in_words():
    with pytest.raises(AudioError, match="319 samples.*320"):
        Lfcc()(torch.zeros(1, 319))
    with pytest.raises(ConfigError, match="lfcc-high-resolution"):
        build_front_end("mfcc")
    for change in ({"n_fft": 256}, {"hop_samples": 0}, {"pre_emphasis": 1.5}, {"n_coefficients": 21}):
        with pytest.raises(ConfigError):
            Lfcc(dataclasses.replace(LfccConfig(), **change))
