"""Augmentation: closed forms on literal arrays, independent oracles, and properties every recipe must have."""

import math

import av
import numpy as np
import pytest
import scipy.signal
import scipy.stats
import soundfile
import torch
from torch.testing import assert_close

from deepfake_utils.augment import EFFECTS, RECIPES, build_augmentation, channel, draw_band_mask, read_recordings
from deepfake_utils.augment import effects as fx
from deepfake_utils.augment import rawboost as rb
from deepfake_utils.augment.codecs import CODECS, CodecParams, apply_codec, draw_codec
from deepfake_utils.augment.common import fir_filter, limit_peak
from deepfake_utils.conventions import ConfigError
from deepfake_utils.waveforms.trimmed import speech_span

RATE = 16_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sine(frequency_hz, n_samples=RATE, amplitude=0.5):
    seconds = torch.arange(n_samples, dtype=torch.float64) / RATE
    return (amplitude * torch.sin(2 * torch.pi * frequency_hz * seconds)).float()


def speech_like(n_utterances=4, n_samples=8_000, seed=0):
    """Chirping harmonics with silence at both ends, the same in every row."""
    seconds = torch.arange(n_samples) / RATE
    voice = sum(torch.sin(2 * torch.pi * k * (120 + 60 * seconds) * seconds) / k for k in range(1, 12))
    voice = voice + 0.05 * torch.randn(n_samples, generator=seeded(seed))
    edge = n_samples // 5
    voice[:edge] *= 1e-4
    voice[-edge:] *= 1e-4
    return (0.3 * voice).clamp(-1, 1).repeat(n_utterances, 1)


def power_db(waveform):
    return 10 * waveform.double().square().mean(dim=-1).log10()


def dominant_hz(waveform):
    window = torch.hann_window(len(waveform), dtype=torch.float64)
    spectrum = torch.fft.rfft(waveform.double() * window, 16 * len(waveform)).abs()
    return spectrum.argmax().item() * RATE / (16 * len(waveform))


# --- filtering and level ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_samples", "n_taps", "delay"), [(1, 1, 0), (5, 9, 4), (50, 3, 1), (1000, 101, 50), (4000, 31, 0), (7, 20, 0)]
)
def test_fir_filter_is_the_sum_of_convolutions(n_samples, n_taps, delay):
    channels = torch.randn(2, 3, n_samples, generator=seeded(1))
    taps = torch.randn(2, 3, n_taps, generator=seeded(2))
    expected = [sum(np.convolve(channels[b, c].double(), taps[b, c].double()) for c in range(3)) for b in range(2)]
    expected = torch.tensor(np.stack(expected)[:, delay : delay + n_samples])
    assert_close(fir_filter(channels, taps, delay).double(), expected, atol=1e-4, rtol=1e-4)


def test_centred_is_the_default_of_an_odd_filter():
    assert_close(
        fir_filter(torch.tensor([[[0.0, 1, 0, 0]]]), torch.tensor([[[1.0, 2, 3]]])), torch.tensor([[1.0, 2, 3, 0]])
    )


def test_limit_peak_scales_only_what_exceeds_one():
    waveform = torch.tensor([[0.25, -4.0], [1.0, -0.5], [0.0, 0.0]])
    assert_close(limit_peak(waveform), torch.tensor([[0.0625, -1.0], [1.0, -0.5], [0.0, 0.0]]), rtol=0, atol=0)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_scaled_to_the_ratio_of_powers():
    waveform = torch.tensor([[2.0, 2, 2, 2], [2.0, 2, 2, 2]])
    noise = torch.tensor([[1.0, -1, 1, -1], [1.0, -1, 1, -1]])
    noisy = fx.apply_noise(waveform, fx.NoiseParams(noise, torch.zeros(2), torch.tensor([0.0, 20.0])))
    assert_close(noisy, torch.tensor([[4.0, 0, 4, 0], [2.2, 1.8, 2.2, 1.8]]))


@pytest.mark.parametrize("snr_db", [(-5.0, 0.0), (5.0, 30.0), (40.0, 40.0)])
def test_noise_reaches_the_drawn_ratio(snr_db):
    waveform = speech_like(6)
    params = fx.draw_noise(waveform.shape, seeded(), snr_db=snr_db)
    reached = power_db(waveform) - power_db(fx.apply_noise(waveform, params).double() - waveform)
    assert_close(reached, params.snr_db.double(), atol=0.01, rtol=0)
    assert ((params.snr_db >= snr_db[0]) & (params.snr_db <= snr_db[1])).all()


@pytest.mark.parametrize("slope", [-6.0, -3.0, 0.0, 3.0])
def test_the_noise_has_the_drawn_spectral_slope(slope):
    params = fx.draw_noise((1, 1 << 16), seeded(), slope_db_per_octave=(slope, slope), snr_db=(0.0, 0.0))
    carrier = torch.zeros(1, 1 << 16)
    carrier[0, 0] = 1.0  # its flat spectrum lies far below the noise's
    noise = fx.apply_noise(carrier, params) - carrier
    density = torch.fft.rfft(noise.double())[0].abs().square()
    octave_db = [10 * density[2**k : 2 ** (k + 1)].mean().log10() for k in range(8, 15)]
    measured = np.polyfit(np.arange(7), octave_db, 1)[0]
    assert measured == pytest.approx(slope, abs=0.15)


def test_recorded_noise_is_a_piece_of_a_recording_in_order():
    recordings = [torch.arange(100.0), 1000 + torch.arange(3.0)]
    excerpts = fx.draw_excerpts(recordings, (40, 7), seeded())
    long, short = excerpts[excerpts[:, 0] < 1000], excerpts[excerpts[:, 0] >= 1000]
    assert len(long) > 5 and len(short) > 5
    assert_close(long - long[:, :1], torch.arange(7.0).expand(len(long), 7))
    assert long.amax() <= 99 and len(long[:, 0].unique()) > 5
    assert_close((short[:, 1:] - 1000), (short[:, :-1] - 1000 + 1) % 3)  # repeated end to end


def test_recorded_noise_keeps_its_colour():
    waveform, hum = speech_like(2), sine(50, 20_000)
    params = fx.draw_noise(waveform.shape, seeded(), recordings=[hum], snr_db=(10.0, 10.0))
    assert dominant_hz((fx.apply_noise(waveform, params) - waveform)[0]) == pytest.approx(50, abs=2)


def test_noise_on_silence_is_silence():
    params = fx.draw_noise((1, 100), seeded())
    assert fx.apply_noise(torch.zeros(1, 100), params).abs().max() < 1e-8


# --- shift, speed, gain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(0, [0, 1, 2, 3]), (1, [3, 0, 1, 2]), (-1, [1, 2, 3, 0]), (3, [1, 2, 3, 0]), (9, [3, 0, 1, 2])],
)
def test_shift_rotates(shift, expected):
    shifted = fx.apply_shift(torch.arange(4.0)[None], torch.tensor([shift]))
    assert shifted.tolist() == [expected]


def test_shift_draws_whole_samples_within_its_range():
    drawn = fx.draw_shift((2000, 1), seeded(), shift_s=(-0.001, 0.002))
    assert drawn.dtype == torch.int64
    assert sorted(drawn.unique().tolist()) == list(range(-16, 33))


def test_speed_moves_the_frequency_by_its_factor():
    speeds = torch.tensor([90, 95, 100, 103, 110])
    played = fx.apply_speed(sine(1000).repeat(5, 1), speeds)
    for row, speed in zip(played, speeds.tolist(), strict=True):
        assert dominant_hz(row[2000:12_000]) == pytest.approx(10 * speed, abs=0.2)


@pytest.mark.parametrize("speed", [90, 97, 110])
@pytest.mark.parametrize("frequency_hz", [50, 1000, 5000, 6700])
def test_speed_interpolates_where_the_signal_would_be(speed, frequency_hz):
    played = fx.apply_speed(sine(frequency_hz)[None], torch.tensor([speed]))[0]
    inside = slice(100, 14_000)  # away from where the utterance repeats
    assert_close(played[inside], sine(frequency_hz * speed / 100)[inside], atol=1e-3, rtol=0)


def test_speed_100_is_identity_and_faster_ones_do_not_fold():
    noise = torch.randn(1, 2000, generator=seeded())
    assert_close(fx.apply_speed(noise, torch.tensor([100])), noise, atol=1e-5, rtol=0)
    folded = fx.apply_speed(sine(7900)[None], torch.tensor([110]))[0, 100:14_000]  # would appear at 7310 Hz
    assert power_db(folded) < power_db(sine(7900)) - 40


def test_a_faster_utterance_repeats_from_its_beginning():
    ramp = torch.linspace(0, 1, 1600)[None]
    faster = fx.apply_speed(ramp, torch.tensor([200]))[0]
    assert_close(faster[900:1500], faster[100:700], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("gain_db", "factor"), [(20.0, 10.0), (0.0, 1.0), (-40.0, 0.01), (20 * math.log10(2), 2.0)])
def test_gain(gain_db, factor):
    assert_close(
        fx.apply_gain(torch.tensor([[0.5, -0.25]]), torch.tensor([gain_db])), factor * torch.tensor([[0.5, -0.25]])
    )


# --- rooms and channels ----------------------------------------------------------------------------------------------


def test_reverb_by_a_unit_impulse_is_identity():
    waveform = torch.randn(2, 500, generator=seeded())
    unit = torch.zeros(2, 80)
    unit[:, 0] = 1
    assert_close(fx.apply_reverb(waveform, fx.ReverbParams(unit)), waveform, atol=1e-5, rtol=0)


def test_reverb_adds_an_echo_and_keeps_the_level():
    waveform = torch.tensor([[4.0, 0, 0, 0, 2, 0]])
    wet = fx.apply_reverb(waveform, fx.ReverbParams(torch.tensor([[1.0, 0, 0.5]])))
    echo = torch.tensor([[4.0, 0, 2, 0, 2, 0]])  # the echo of the second click falls behind the end
    assert_close(wet, echo * math.sqrt(20 / 24))


def test_simulated_rooms_decay_and_reverberate_as_drawn():
    rooms = fx.draw_reverb((3, 10), seeded(), rt60_s=(0.5, 0.5), direct_to_reverberant_db=(6.0, 6.0))
    response = rooms.impulse_response.double()
    assert (response[:, 0] == 1).all()
    found_db = -power_db(response[:, 1:]) - 10 * math.log10(response.shape[1] - 1)
    assert_close(found_db, torch.full((3,), 6.0).double(), atol=1e-5, rtol=0)  # some ten roundings of float32
    remaining_db = 10 * response[:, 1:].square().flip(1).cumsum(1).flip(1).log10()  # Schroeder's backward integral
    for curve in remaining_db - remaining_db[:, :1]:
        early, late = (int((curve > level).sum()) for level in (-5.0, -25.0))
        assert 3 * (late - early) / RATE == pytest.approx(0.5, rel=0.1)


def test_measured_rooms_start_at_their_direct_path():
    measured = [torch.tensor([0.0, 0.1, -2.0, 1.0]), torch.tensor([3.0])]
    drawn = fx.draw_reverb((30, 10), seeded(), impulse_responses=measured).impulse_response
    assert {tuple(row) for row in drawn.tolist()} == {(-2.0, 1.0), (3.0, 0.0)}


@pytest.mark.parametrize("cutoff_hz", [3000.0, 4000.0, 6000.0])
def test_lowpass_keeps_what_is_below_and_removes_what_is_above(cutoff_hz):
    cutoff, inside = torch.tensor([cutoff_hz]), slice(200, -200)
    below = sine(cutoff_hz - 400)
    assert_close(fx.apply_lowpass(below[None], cutoff)[0, inside], below[inside], atol=1e-3, rtol=0)
    at = fx.apply_lowpass(sine(cutoff_hz)[None], cutoff)[0, inside]
    assert (power_db(at) - power_db(sine(cutoff_hz))).item() == pytest.approx(-6.02, abs=0.1)
    above = fx.apply_lowpass(sine(cutoff_hz + 400)[None], cutoff)[0, inside]
    assert power_db(above) < power_db(sine(cutoff_hz + 400)) - 70


def test_cutoffs_are_uniform_in_octaves():
    drawn = fx.draw_lowpass((4000, 1), seeded(), cutoff_hz=(2000.0, 8000.0))
    assert scipy.stats.kstest(drawn.log2(), scipy.stats.uniform(math.log2(2000), 2).cdf).pvalue > 0.01


def test_companding_at_8_bits_is_the_textbook_mu_law():
    from torchaudio.functional import mu_law_decoding, mu_law_encoding

    waveform = torch.rand(2, 4000, generator=seeded()) * 2 - 1
    expected = mu_law_decoding(mu_law_encoding(waveform, 256), 256)
    assert_close(fx.apply_companding(waveform, torch.tensor([8, 8])), expected, atol=1e-5, rtol=1e-5)


def test_companding_to_two_levels_and_a_closed_form_between():
    assert fx.apply_companding(torch.tensor([[0.3, -1e-3, 1.0]]), torch.tensor([1])).tolist() == [[1.0, -1.0, 1.0]]
    # Four levels: the compressed values are -1, -1/3, 1/3, 1, and (256^(1/3) - 1) / 255 is the one between.
    middle = (256 ** (1 / 3) - 1) / 255
    drawn = fx.apply_companding(torch.tensor([[0.01, -0.02, 0.9]]), torch.tensor([2]))
    assert_close(drawn, torch.tensor([[middle, -middle, 1.0]]))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_quantisation_has_its_number_of_levels_and_half_a_step_of_error(bits):
    waveform = torch.linspace(-1, 1, 10_001)[None]
    rounded = fx.apply_quantisation(waveform, torch.tensor([bits]))
    step = 2.0 ** (1 - bits)
    assert len(rounded.unique()) == 2**bits
    assert rounded.min() == -1 and rounded.max() == 1 - step
    inside = waveform < 1 - step
    assert (rounded - waveform)[inside].abs().max() <= step / 2 + 1e-6


def test_bits_are_drawn_with_both_ends():
    assert fx.draw_bits((500, 1), seeded(), bits=(6, 8)).unique().tolist() == [6, 7, 8]


@pytest.mark.parametrize("name", ["mp3", "opus", "aac"])
def test_a_codec_keeps_time_length_and_most_of_the_signal(name):
    waveform = speech_like(2, 16_001)
    decoded = apply_codec(waveform, CodecParams(name, torch.tensor([64, 12])))
    assert decoded.shape == waveform.shape and decoded.abs().max() <= 1
    for original, result in zip(waveform.double().numpy(), decoded.double().numpy(), strict=True):
        correlation = scipy.signal.correlate(result, original, method="fft")
        assert scipy.signal.correlation_lags(16_001, 16_001)[correlation.argmax()] == 0
        assert np.corrcoef(original, result)[0, 1] > 0.9
    error = (decoded - waveform).square().mean(dim=1)
    assert error[0] < error[1]  # 64 kbit/s against 12
    assert_close(apply_codec(waveform, CodecParams(name, torch.tensor([64, 12]))), decoded, atol=0, rtol=0)


def test_the_telephone_codec_keeps_time_and_what_a_telephone_passes():
    waveform = speech_like(2, 16_001)
    decoded = apply_codec(waveform, CodecParams("amr", torch.tensor([12.2, 4.75])))
    assert decoded.shape == waveform.shape and decoded.abs().max() <= 1
    for original, result in zip(waveform.double().numpy(), decoded.double().numpy(), strict=True):
        envelopes = [np.convolve(np.abs(x), np.ones(400) / 400, "same") for x in (original, result)]
        correlation = scipy.signal.correlate(*(e - e.mean() for e in envelopes[::-1]), method="fft")
        assert abs(scipy.signal.correlation_lags(16_001, 16_001)[correlation.argmax()]) <= 160  # 10 ms, its sub-frames
        power = np.abs(np.fft.rfft(result)) ** 2
        assert power[len(power) * 9 // 16 :].sum() < 0.01 * power.sum()  # above 4.5 kHz


def test_a_codec_that_the_build_lacks_or_nobody_knows_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="'aac9' is unknown: expected one of mp3, opus"):
        draw_codec((1, 1), seeded(), codec="aac9")
    monkeypatch.setattr(av, "codecs_available", {"libopus"})
    with pytest.raises(ConfigError, match="'mp3' needs the encoder libmp3lame.*pip install av"):
        draw_codec((1, 1), seeded(), codec="mp3")


# --- channel ---------------------------------------------------------------------------------------------------------


def test_an_equaliser_weighs_tones_by_its_curve_and_keeps_the_power():
    time_s = torch.arange(16_000) / 16_000
    tones = [torch.sin(2 * torch.pi * f * time_s) for f in (500.0, 1500.0)]  # on a knot, and between two of them
    gain_db = torch.zeros(1, len(channel.KNOTS_HZ))
    gain_db[0, channel.KNOTS_HZ.index(500.0)], gain_db[0, channel.KNOTS_HZ.index(2000.0)] = -6.0, 12.0
    result = channel.apply_equaliser(sum(tones)[None], gain_db)[0]
    assert_close(result.square().mean(), sum(tones).square().mean(), rtol=1e-4, atol=0)
    low, high = (torch.fft.rfft(result).abs()[f] for f in (500, 1500))
    assert 20 * (high / low).log10().item() == pytest.approx(6.0 + 6.0, abs=0.01)


def test_a_drawn_tilt_is_a_straight_line_over_octaves():
    gain_db = channel.draw_equaliser((3, 1), seeded(), tilt_db_per_octave=(2.0, 2.0), bumps_db=(0.0, 0.0))
    expected = [2 * np.log2(max(f, 62.5) / 1000) for f in channel.KNOTS_HZ]
    assert_close(gain_db, torch.tensor(expected, dtype=torch.float32).expand(3, -1))


def test_a_bandstop_takes_its_band_and_nothing_else():
    waveform = torch.randn(2, 8000, generator=seeded())
    params = channel.draw_bandstop(waveform.shape, seeded(), width_hz=(500.0, 500.0))
    assert ((params.low_hz >= 0) & (params.high_hz <= 8000)).all()
    before, after = (torch.fft.rfft(x) for x in (waveform, channel.apply_bandstop(waveform, params)))
    frequency = torch.arange(4001) * 2.0
    for b, a, low, high in zip(before, after, *params, strict=True):
        inside = (frequency >= low) & (frequency <= high)
        assert 249 <= inside.sum() <= 251
        assert_close(a[~inside], b[~inside], atol=1e-3, rtol=0)
        assert a[inside].abs().max() < 1e-3


def test_a_gap_has_the_drawn_share_and_lies_within():
    params = channel.draw_gap((200, 1000), seeded(), share=(0.2, 0.2))
    silent = channel.apply_gap(torch.ones(200, 1000), params) == 0
    assert ((silent.sum(1) - 200).abs() <= 1).all()
    assert (silent.int().diff(dim=1).abs().sum(1) <= 2).all()  # in one piece


# --- silence ---------------------------------------------------------------------------------------------------------


def silence_speech_silence():
    """Two silent frames of 10 ms, three of a ramp, one silent."""
    waveform = torch.zeros(1, 960)
    waveform[0, 320:800] = torch.linspace(0.5, 1, 480)
    return waveform


def silence_params(leading, trailing, threshold_db=-40.0):
    return fx.SilenceParams(*(torch.tensor([v]) for v in (leading, trailing, threshold_db)))


def test_trimming_leaves_speech_repeated_end_to_end():
    waveform = silence_speech_silence()
    speech = waveform[:, 320:800]
    assert_close(fx.apply_silence(waveform, silence_params(0.0, 0.0)), torch.cat([speech, speech], dim=1))


def test_the_drawn_share_of_silence_stays_on_either_side():
    waveform = silence_speech_silence()
    kept = waveform[:, 160:840]  # 160 of 320 leading samples, 40 of 160 trailing ones
    expected = torch.cat([kept, kept[:, :280]], dim=1)
    assert_close(fx.apply_silence(waveform, silence_params(0.5, 0.25)), expected)


def test_all_silence_kept_is_identity_and_digital_silence_is_left_alone():
    waveform = silence_speech_silence()
    assert_close(fx.apply_silence(waveform, silence_params(1.0, 1.0)), waveform, atol=0, rtol=0)
    assert not fx.apply_silence(torch.zeros(1, 960), silence_params(0.0, 0.0)).any()


def test_the_silence_threshold_is_relative_to_the_loudest_frame():
    waveform = torch.full((1, 480), 1e-3)
    waveform[0, 160:320] = 0.1  # 40 dB above the rest
    for threshold_db, expected in ((-39.0, (160, 320)), (-41.0, (0, 480))):
        start, stop = fx.find_speech(waveform, torch.tensor([threshold_db]))
        assert (start.item(), stop.item()) == expected


def test_silence_is_the_same_to_augmentation_and_to_trimming():
    """Also where a frame lies at the threshold to the bit."""
    rng = np.random.default_rng(0)
    for levels in ([0.5**7, 1, 0.5**7], [0, 0.5**7, 1], [0, 0], *rng.choice([0, 0.5**7, 0.5**6, 1], (20, 6))):
        clip = np.repeat(np.asarray(levels, np.float32), 160)
        threshold_db = 20 * np.log10(0.5) * 7
        start, stop = fx.find_speech(torch.from_numpy(clip)[None], torch.tensor([threshold_db], dtype=torch.float64))
        assert (start.item(), stop.item()) == speech_span(clip, -threshold_db)


def test_a_last_part_of_a_frame_can_be_speech():
    waveform = torch.zeros(1, 330)
    waveform[0, 325:] = 1.0
    start, stop = fx.find_speech(waveform, torch.tensor([-40.0]))
    assert (start.item(), stop.item()) == (320, 330)


# --- band mask and mixup ---------------------------------------------------------------------------------------------


def test_band_masks_are_one_block_of_uniform_width_that_reaches_every_band():
    generator = seeded()
    masks = torch.stack([draw_band_mask(70, generator) for _ in range(4000)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    widths = (masks == 0).sum(dim=1)
    edges = (masks.diff(dim=1, prepend=torch.ones(4000, 1), append=torch.ones(4000, 1)) != 0).sum(dim=1)
    assert (edges == 2 * (widths > 0)).all()  # contiguous
    counts = torch.bincount(widths, minlength=20)
    assert len(counts) == 20  # 0 to 19
    assert scipy.stats.chisquare(counts).pvalue > 0.01
    assert (masks == 0).any(dim=0).all()


def test_a_band_mask_may_reach_the_number_of_bands_but_no_more():
    assert draw_band_mask(5, seeded(), max_width=5).shape == (5,)
    for width in (0, 6):
        with pytest.raises(ConfigError, match=f"max_width {width}: expected 1 to n_bands = 5"):
            draw_band_mask(5, seeded(), max_width=width)


def test_mixup_mixes_waveforms_and_targets_by_the_same_weights():
    waveform, target = torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([1.0, 0, 1])
    params = fx.MixupParams(torch.tensor([0.25, 0.5, 1.0]), torch.tensor([1, 2, 0]))
    mixed, targets = fx.apply_mixup(waveform, target, params)
    assert_close(mixed, torch.tensor([[2.5, 3.5], [4, 5], [5, 6]]))
    assert_close(targets, torch.tensor([0.25, 0.5, 1.0]))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    params = fx.draw_mixup((4000, 1), seeded(), alpha=alpha)
    # Weights that float32 rounds to 0 or 1 keep their place in the distribution.
    assert scipy.stats.kstest(params.weight.double(), scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert params.partner.sort().values.tolist() == list(range(4000))


def test_mixup_meets_its_share_of_utterances():
    weight = fx.draw_mixup((4000, 1), seeded(), alpha=2.0, probability=0.3).weight
    assert (weight < 1).double().mean().item() == pytest.approx(0.3, abs=0.03)


# --- RawBoost --------------------------------------------------------------------------------------------------------


def test_notch_cascades_are_the_window_methods():
    params = rb.draw_notches((40,), seeded())
    assert params.n_taps.min() >= 11 and params.n_taps.max() <= 99 and (params.n_taps % 2 == 1).all()
    for ours, *settings in zip(rb.notch_taps(params).double().numpy(), *(p.tolist() for p in params), strict=True):
        cascade = np.ones(1)
        for centre, width, n_taps in zip(*settings, strict=True):
            edges = [max(centre - width / 2, 1e-3), min(centre + width / 2, 7999.999)]
            cascade = np.convolve(cascade, scipy.signal.firwin(n_taps, edges, window="hamming", fs=RATE))
        cascade /= np.abs(scipy.signal.freqz(cascade, worN=2048)[1]).max()
        padding = (len(ours) - len(cascade)) // 2
        np.testing.assert_allclose(ours, np.pad(cascade, padding), atol=2e-3)


def test_a_notch_removes_its_band_and_passes_the_rest():
    one = [torch.full((1, 5), float(v)) for v in (3000, 1000)]
    taps = rb.notch_taps(rb.NotchParams(*one, torch.full((1, 5), 99)))[0]
    frequency, response = scipy.signal.freqz(taps, worN=512, fs=RATE)
    gain_db = 20 * np.log10(np.abs(response) + 1e-9)
    assert gain_db[np.abs(frequency - 3000).argmin()] < -100
    assert np.abs(gain_db[(frequency < 2200) | (frequency > 3800)]).max() < 0.5


def test_convolutive_noise_sums_filtered_powers_without_mean():
    waveform = torch.rand(2, 400, generator=seeded(3)) * 0.4 - 0.2
    params = rb.draw_convolutive(waveform.shape, seeded(4))
    taps = rb.notch_taps(params.notches).double() * 10 ** (params.gain_db[..., None].double() / 20)
    expected = np.stack(
        [
            sum(np.convolve(x**power, h, mode="full")[245:645] for power, h in enumerate(hs, start=1))
            for x, hs in zip(waveform.double().numpy(), taps.numpy(), strict=True)
        ]
    )
    expected -= expected.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(rb.apply_convolutive(waveform, params), expected, atol=1e-5)


def test_convolutive_gains_are_the_published_ranges():
    gain_db = rb.draw_convolutive((200, 10), seeded()).gain_db
    assert gain_db.shape == (200, 5)
    assert (gain_db[:, 0] == 0).all()
    assert -20 <= gain_db[:, 1:].min() < -19.5 and -5.5 < gain_db[:, 1:].max() <= -5


def test_impulsive_noise_changes_samples_in_proportion_to_themselves():
    disturbed = rb.apply_impulsive(
        torch.tensor([[0.1, 0.2, -0.4, 0.0], [0.5, 0, 0, 0]]),
        rb.ImpulsiveParams(torch.tensor([[0.0, 0.5, -2.0, 1.0], [3.0, 0, 0, 0]])),
    )
    assert_close(disturbed, torch.tensor([[0.1, 0.3, 0.4, 0.0], [1.0, 0, 0, 0]]))  # the second was 2 before scaling


def test_impulses_have_the_drawn_share_and_the_product_distribution():
    relative = rb.draw_impulsive((20, 20_000), seeded(), share=(0.05, 0.05)).relative
    counts = (relative != 0).sum(dim=1)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(950)  # binomial: n p = 1000, n p (1 - p) = 950
    hits = relative[relative != 0].double() / 2
    # P(u1 u2 <= z) for two uniforms on [-1, 1] is (1 + z - z log|z|) / 2.
    assert scipy.stats.kstest(hits, lambda z: (1 + z - z * np.log(np.abs(z))) / 2).pvalue > 0.01
    shares = (rb.draw_impulsive((300, 1000), seeded()).relative != 0).double().mean(dim=1)
    assert shares.max() < 0.14 and shares.mean().item() == pytest.approx(0.05, abs=0.01)


def test_stationary_noise_reaches_its_ratio():
    waveform = speech_like(50)
    params = rb.draw_stationary(waveform.shape, seeded())
    reached = power_db(waveform) - power_db(rb.apply_stationary(waveform, params).double() - waveform)
    assert_close(reached, params.snr_db.double(), atol=0.05, rtol=0)
    assert 10 <= params.snr_db.min() < 12 and 38 < params.snr_db.max() <= 40


@pytest.mark.parametrize(("algorithm", "parts"), [(1, "100"), (2, "010"), (3, "001"), (4, "111"), (5, "110")])
def test_rawboost_algorithms_are_their_noises_in_series(algorithm, parts):
    waveform = (10 * speech_like(2)).clamp(-1, 1)  # loud enough for noise to leave [-1, 1]
    params = rb.draw_rawboost(waveform.shape, seeded(), algorithm=algorithm)
    expected = waveform
    applies = (rb.apply_convolutive, rb.apply_impulsive, rb.apply_stationary)
    for apply, part, wanted in zip(applies, params, parts, strict=True):
        assert (part is not None) == (wanted == "1")
        expected = expected if part is None else apply(expected, part)
    assert_close(rb.apply_rawboost(waveform, params), limit_peak(expected))


# --- recipes ---------------------------------------------------------------------------------------------------------

EVERYTHING = [*RECIPES, *(f"effect {name}" for name in EFFECTS)]


def augmentation(name):
    return build_augmentation("none", **{name[7:]: {}}) if name.startswith("effect ") else build_augmentation(name)


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_recipe_and_effect(name):
    waveform = speech_like(6)
    waveform[4] = 0  # digital silence
    waveform[5] = torch.sign(waveform[5])  # full scale
    target = torch.tensor([1.0, 0, 1, 0, 1, 0])
    before, augment = waveform.clone(), augmentation(name)
    result, targets = augment(waveform, target, seeded(7))
    assert torch.equal(waveform, before) and target.tolist() == [1, 0, 1, 0, 1, 0]
    assert result.shape == waveform.shape and result.dtype == torch.float32
    assert result.isfinite().all() and result.abs().max() <= 1 + 1e-6
    assert targets.shape == (6,) and ((targets >= 0) & (targets <= 1)).all()
    again, targets_again = augment(waveform, target, seeded(7))
    assert torch.equal(result, again) and torch.equal(targets, targets_again)
    if name == "none":
        assert torch.equal(result, waveform)
    else:
        assert not torch.equal(result[:4], waveform[:4])
    if name not in ("seed", "none"):
        assert torch.equal(targets, target)


@pytest.mark.parametrize(
    "name", [n for n in EVERYTHING if n not in ("none", "effect trim", *(f"effect {c}" for c in CODECS))]
)
def test_utterances_of_a_batch_and_seeds_differ(name):
    waveform, target = speech_like(16, 1600), torch.ones(16)
    first, _ = augmentation(name)(waveform, target, seeded(1))
    second, _ = augmentation(name)(waveform, target, seeded(2))
    different = len({row.numpy().tobytes() for row in first})
    few = ("companding", "quantisation", "speed")  # draws from a short list
    assert different >= (4 if name.endswith(few) else 12)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("n_samples", [1, 2, 399])
def test_short_crops(name, n_samples):
    result, _ = augmentation(name)(torch.full((3, n_samples), 0.5), torch.ones(3), seeded())
    assert result.shape == (3, n_samples) and result.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_cpu_generator_serves_a_cuda_batch_with_the_same_numbers(name):
    waveform, target = speech_like(4), torch.tensor([1.0, 0, 1, 0])
    on_cpu = augmentation(name)(waveform, target, seeded())
    on_cuda = augmentation(name)(waveform.cuda(), target.cuda(), seeded())
    for expected, actual in zip(on_cpu, on_cuda, strict=True):
        assert actual.is_cuda
        # A rounding to levels may fall the other way for a sample here and there.
        assert ((actual.cpu() - expected).abs() > 2e-3).double().mean() < 1e-3
    own = torch.Generator("cuda").manual_seed(0)
    assert augmentation(name)(waveform.cuda(), target.cuda(), own)[0].isfinite().all()


def test_an_effect_meets_its_share_and_leaves_the_others_bit_for_bit():
    waveform = torch.rand(400, 8, generator=seeded()) - 0.5
    augment = build_augmentation("none", gain={"probability": 0.25, "gain_db": (-6.0, -6.0)})
    result, _ = augment(waveform, torch.ones(400), seeded())
    met = (result != waveform).any(dim=1)
    assert met.double().mean().item() == pytest.approx(0.25, abs=0.07)
    assert_close(result[met], waveform[met] * 10 ** (-0.3), atol=1e-6, rtol=0)
    untouched = build_augmentation("none", gain={"probability": 0.0})(waveform, torch.ones(400), seeded())[0]
    assert torch.equal(untouched, waveform)


def test_overrides_replace_settings_and_drop_effects():
    waveform, target = speech_like(4), torch.tensor([1.0, 0, 1, 0])
    off = dict.fromkeys(RECIPES["seed"])
    assert torch.equal(build_augmentation("seed", **off)(waveform, target, seeded())[0], waveform)
    as_it_is = RECIPES["seed"]["noise"]
    merged = build_augmentation("seed", noise={"snr_db": (0.0, 0.0)})(waveform, target, seeded())
    spelt_out = build_augmentation("seed", noise=as_it_is | {"snr_db": (0.0, 0.0)})(waveform, target, seeded())
    assert torch.equal(merged[0], spelt_out[0])
    mixed = build_augmentation("seed", **off | {"mixup": {"alpha": 50.0, "probability": 1.0}})
    _, targets = mixed(waveform, target, seeded(3))
    assert ((targets == 0) | (targets == 1) | ((targets - 0.5).abs() < 0.25)).all()
    assert len(RECIPES["seed"]) == 4 and RECIPES["seed"]["mixup"] == {"probability": 0.5, "alpha": 0.2}


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("wilder", {}, "recipe 'wilder' is unknown: expected one of none, seed, rawboost-la, rawboost-df, wild"),
        ("wild", {"echo": {}}, "effect 'echo' is unknown: expected one of noise, .*mixup"),
        ("wild", {"noise": {"snr": (0, 1)}}, "'noise' has no setting snr: expected one of .*snr_db"),
        ("wild", {"noise": {"snr_db": (30.0, 10.0)}}, r"snr_db \(30.0, 10.0\): expected a pair \(low, high\)"),
        ("wild", {"noise": {"snr_db": 10.0}}, "snr_db 10.0: expected a pair"),
        ("wild", {"noise": {"snr_db": (0.0, math.nan)}}, "snr_db .*expected a pair"),
        ("wild", {"noise": {"snr_db": (0.0, math.inf)}}, "snr_db .*expected a pair"),
        ("wild", {"noise": {"probability": 1.5}}, "probability of noise .*within"),
        ("seed", {"speed": {"speed": (0.1, 1.0)}}, r"speed \(0.1, 1.0\).*within \[0.5, 2.0\]"),
        ("seed", {"mixup": {"alpha": 0.0}}, "alpha 0.0: expected a positive number"),
        ("seed", {"silence": {"keep": (0.0, 1.1)}}, "keep .*within"),
        ("seed", {"lowpass": {"cutoff_hz": (4000.0, 9000.0)}}, "cutoff_hz .*within"),
        ("seed", {"rawboost-4": {"algorithm": 9}}, "algorithm 9 is unknown"),
    ],
)
def test_wrong_settings_are_refused_when_the_recipe_is_built(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_augmentation(recipe, **overrides)


# --- recordings ------------------------------------------------------------------------------------------------------


def test_recordings_are_read_up_to_the_limit(tmp_path):
    for index in range(6):
        folder = tmp_path / f"part{index % 2}"
        folder.mkdir(exist_ok=True)
        soundfile.write(folder / f"{index}.wav", np.full(RATE, index / 10), RATE)
    (tmp_path / "README.txt").write_text("not audio")
    everything = read_recordings(tmp_path, seeded())
    assert sorted(round(r[0].item() * 10) for r in everything) == [0, 1, 2, 3, 4, 5]
    assert all(r.shape == (RATE,) and r.dtype == torch.float32 for r in everything)
    some = read_recordings(tmp_path, seeded(), limit_s=2.0)
    assert len(some) == 2 and torch.equal(some[0], everything[0])
    augment = build_augmentation("none", noise={"recordings": some})
    assert augment(speech_like(2), torch.ones(2), seeded())[0].isfinite().all()
    by_name = build_augmentation("none", noise={"recordings": str(tmp_path)})  # as a configuration file has it
    given = build_augmentation("none", noise={"recordings": read_recordings(tmp_path, seeded(0))})
    results = [augment(speech_like(2), torch.ones(2), seeded())[0] for augment in (by_name, given)]
    assert torch.equal(*results)


def test_a_recordings_folder_without_audio_is_named(tmp_path):
    for folder, message in ((tmp_path, "holds no audio file"), (tmp_path / "absent", "is not a folder")):
        with pytest.raises(ConfigError, match=f"{folder} {message}"):
            read_recordings(folder, seeded())
