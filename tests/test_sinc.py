"""The sinc filter bank: against closed forms, NumPy's correlation, and its own plain path."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepfake_utils.conventions import ConfigError
from deepfake_utils.models.sinc import SPACINGS, SincFilters, band_edges_hz


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_adjoining_bands_add_up_to_the_unchanged_signal(spacing):
    """The low-pass terms of neighbours cancel; what is left is sinc(n), which is 1 at n = 0 and 0 elsewhere."""
    total = SincFilters(70, 129, spacing).filters().double().sum(0)
    impulse = torch.zeros(129, dtype=torch.float64)
    impulse[64] = 1
    torch.testing.assert_close(total, impulse, atol=2e-6, rtol=0)


def test_edges_cover_the_spectrum_and_inverse_mel_mirrors_mel():
    mel, inverse, linear = (band_edges_hz(20, spacing) for spacing in ("mel", "inverse-mel", "linear"))
    for edges in (mel, inverse, linear):
        assert edges[0].abs() < 1e-9 and (edges[-1] - 8000).abs() < 1e-9 and (edges.diff() > 0).all()
    torch.testing.assert_close(inverse, 8000 - mel.flip(0))
    assert mel.diff()[0] < 100 < 900 < mel.diff()[-1]
    # 1000 Hz is 1000 mel (to the rounding of the formula's constants): as many edges below as mel steps fit
    assert (mel < 1000).sum() == int(999.99 / (2595 * np.log10(1 + 8000 / 700) / 20)) + 1


def test_a_filter_passes_its_band_and_stops_the_others():
    frequencies_hz, magnitude = SincFilters(10, 1025, "linear").frequency_response(801)
    assert frequencies_hz[0] == 0 and frequencies_hz[-1] == 8000 and magnitude.shape == (10, 801)
    for band in range(10):
        inside = (frequencies_hz > 800 * band + 50) & (frequencies_hz < 800 * (band + 1) - 50)
        outside = (frequencies_hz < 800 * band - 50) | (frequencies_hz > 800 * (band + 1) + 50)
        assert (magnitude[band, inside] - 1).abs().max() < 0.01
        assert magnitude[band, outside].max() < 0.01


def test_filtering_is_correlation():
    bank = SincFilters(6, 33)
    waveform = torch.randn(2, 200, generator=seeded())
    expected = np.stack(
        [
            [np.correlate(clip, taps, "valid") for taps in bank.filters().double().numpy()]
            for clip in waveform.double().numpy()
        ]
    )
    np.testing.assert_allclose(bank(waveform).numpy(), expected, atol=1e-5)


def test_a_learnable_bank_starts_as_the_fixed_one_and_learns_its_cutoffs():
    fixed, learnable = SincFilters(70, 129), SincFilters(70, 129, learnable=True)
    torch.testing.assert_close(learnable.filters(), fixed.filters(), atol=1e-6, rtol=0)
    assert not list(fixed.parameters()) and not fixed.state_dict()
    assert set(learnable.state_dict()) == {"low_khz", "width_khz"}

    learnable(torch.randn(1, 400, generator=seeded())).square().sum().backward()
    assert learnable.width_khz.grad[:-1].abs().min() > 0  # the last band already ends at half the sample rate
    assert learnable.low_khz.grad[1:].abs().min() > 0  # at 0 Hz, |.| has no slope


def test_cutoffs_stay_ordered_and_below_half_the_sample_rate_whatever_the_parameters():
    bank = SincFilters(8, 33, learnable=True)
    with torch.no_grad():
        bank.low_khz.copy_(torch.tensor([-3.0, 0, 2, 7.9, 8, 20, -20, 5]))
        bank.width_khz.copy_(torch.tensor([-1.0, 0, 9, 1, 1, 1, 5, -0.5]))
    low_hz, high_hz = bank.cutoffs_hz()
    assert (low_hz >= 0).all() and (high_hz >= low_hz).all() and (high_hz <= 8000).all()
    assert torch.isfinite(bank.filters()).all()


def test_fixing_learned_filters_keeps_them():
    bank = SincFilters(8, 33, learnable=True)
    with torch.no_grad():
        bank.width_khz.mul_(1.5)
    before = bank.filters().detach().clone()
    bank.fix_()
    assert torch.equal(bank.filters(), before) and not bank.filters().requires_grad


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("n_samples", [131, 132, 133, 1000, 7000])
def test_pooled_equals_pooling_the_filtered(n_samples, bands, learnable):
    bank = SincFilters(20, 129, learnable=learnable)
    waveform = torch.randn(2, n_samples, generator=seeded())
    per_clip = (torch.rand(2, 20, generator=seeded(1)) > 0.5).float()
    for mask in (None, per_clip[0], per_clip):
        expected = F.max_pool2d(bank(waveform, mask).abs()[:, None], (bands, 3))[:, 0]
        torch.testing.assert_close(bank.pooled(waveform, mask, bands=bands), expected, atol=1e-5, rtol=1e-5)


def test_pooled_gives_learnable_filters_the_same_gradient():
    bank = SincFilters(21, 65, learnable=True)
    waveform = torch.randn(2, 3000, generator=seeded())
    F.max_pool2d(bank(waveform).abs()[:, None], 3).sum().backward()
    expected = bank.width_khz.grad.clone()
    bank.zero_grad()
    bank.pooled(waveform, bands=3).sum().backward()
    torch.testing.assert_close(bank.width_khz.grad, expected, atol=1e-4, rtol=1e-3)


def test_a_mask_silences_its_bands():
    bank = SincFilters(9, 33)
    mask = torch.ones(9)
    mask[3:6] = 0
    waveform = torch.randn(1, 500, generator=seeded())
    masked = bank(waveform, mask)
    assert not masked[:, 3:6].any() and torch.equal(masked[:, :3], bank(waveform)[:, :3])
    assert not bank.pooled(waveform, mask, bands=3)[:, 1].any()


def test_half_precision_leaves_the_bank_alone():
    bank = SincFilters(12, 129)
    waveform = 1e-4 * torch.randn(1, 2000, generator=seeded())
    expected, pooled = bank(waveform), bank.pooled(waveform, bands=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bank(waveform), expected) and torch.equal(bank.pooled(waveform, bands=3), pooled)


def test_impossible_banks_are_refused():
    with pytest.raises(ConfigError, match="128 taps.*odd"):
        SincFilters(70, 128)
    with pytest.raises(ConfigError, match="'bark'.*mel, inverse-mel, linear"):
        SincFilters(70, 129, "bark")
