"""Error analysis: closed forms, signals whose answer is known, exact sums, and gradients against finite differences."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from torch import nn

from deepfake_utils.conventions import SAMPLE_RATE_HZ, ConfigError
from deepfake_utils.corpora import division
from deepfake_utils.evaluation import compare, metrics
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.probing import model as probing
from deepfake_utils.probing import shortcuts
from deepfake_utils.waveforms import trimmed


class Clips:
    """A source made of arrays."""

    def __init__(self, clips):
        self.clips, self.utterances = clips, np.array([f"u{i}" for i in range(len(clips))], dtype=object)

    def __len__(self):
        return len(self.clips)

    def clip(self, i):
        return self.clips[i]

    def describe(self):
        return "arrays"


def noise(n, level=3000.0, seed=0):
    return (level * np.random.default_rng(seed).standard_normal(n)).clip(-32768, 32767).astype(np.int16)


def framed_noise(lead, speech, trail, floor=2.0):
    """Speech-like noise between two stretches of a quiet room, lengths in samples."""
    return np.concatenate([noise(lead, floor, 1), noise(speech, 3000.0, 2), noise(trail, floor, 3)])


# Shortcuts


@pytest.mark.parametrize("lead, trail", [(0, 0), (1600, 0), (0, 3200), (4800, 480)])
def test_silence_is_found_where_it_was_put(lead, trail):
    clip = framed_noise(lead, 8000, trail)
    assert trimmed.speech_span(clip) == (lead, lead + 8000)
    numbers = shortcuts.recording_numbers(clip)
    assert numbers["leading_silence_s"] == lead / SAMPLE_RATE_HZ
    assert numbers["trailing_silence_s"] == pytest.approx(trail / SAMPLE_RATE_HZ)
    source = trimmed.TrimmedSource(Clips([clip]))
    np.testing.assert_array_equal(source.clip(0), clip[lead : lead + 8000])
    assert source.n_samples(0) == 8000


def test_silence_does_not_depend_on_the_recording_level():
    clip = framed_noise(1600, 8000, 800, floor=20.0)
    assert trimmed.speech_span(clip // 4 * 4) == trimmed.speech_span(clip * 0.25) == (1600, 9600)


@pytest.mark.parametrize("clip", [np.zeros(5000, np.int16), np.ones(1, np.int16), noise(77)])
def test_clips_without_speech_or_shorter_than_a_frame_keep_their_samples(clip):
    assert trimmed.speech_span(clip) == (0, len(clip))
    assert all(np.isfinite(list(shortcuts.recording_numbers(clip).values())))


@pytest.mark.parametrize("cutoff_hz", [3400.0, 6000.0])
def test_bandwidth_is_the_cutoff_of_a_low_pass(cutoff_hz):
    from scipy.signal import firwin, lfilter

    taps = firwin(801, cutoff_hz, fs=SAMPLE_RATE_HZ, window=("kaiser", 9.0))
    clip = np.rint(lfilter(taps, 1, noise(48000, 4000.0))).astype(np.int16)
    assert shortcuts.recording_numbers(clip)["bandwidth_hz"] == pytest.approx(cutoff_hz, abs=150)


def test_level_is_in_db_below_full_scale():
    sine = (16384 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000)).astype(np.int16)
    assert shortcuts.recording_numbers(sine)["level_db"] == pytest.approx(-9.03, abs=0.02)  # 0.5 peak: -6 - 3


def test_an_offset_a_tilt_a_floor_and_a_missing_top_are_measured_as_they_were_made():
    from scipy.signal import firwin, lfilter

    white = noise(48000, 3000.0)
    plain = shortcuts.recording_numbers(white)
    assert plain["tilt_db_per_octave"] == pytest.approx(0, abs=0.3)
    assert plain["top_band_db"] == pytest.approx(10 * np.log10(1 / 8), abs=0.2)  # 7 to 8 of 0 to 8 kHz
    leaky = lfilter([1], [1, -0.99], white)  # an integrator above 25 Hz
    assert shortcuts.recording_numbers(leaky / 8)["tilt_db_per_octave"] == pytest.approx(-6, abs=0.5)
    offset = shortcuts.recording_numbers(white + np.int16(328))
    assert offset["dc_db"] == pytest.approx(-40, abs=0.3) and offset["level_db"] > plain["level_db"]
    narrow = np.rint(lfilter(firwin(801, 6500, fs=SAMPLE_RATE_HZ), 1, white)).astype(np.int16)
    assert shortcuts.recording_numbers(narrow)["top_band_db"] < plain["top_band_db"] - 30
    pauses = shortcuts.recording_numbers(np.concatenate([white, noise(16000, 30.0)]))
    assert pauses["noise_floor_db"] == pytest.approx(20 * np.log10(30 / 32768), abs=0.7)


def number_table(rng, labels, lead_gap):
    n = len(labels)
    table = {"duration_s": rng.uniform(1, 4, n), "trailing_silence_s": rng.uniform(0, 1, n)}
    table |= {"leading_silence_s": lead_gap * labels + rng.standard_normal(n)}
    table |= {"level_db": rng.normal(-25, 3, n), "bandwidth_hz": rng.uniform(3000, 8000, n)}
    table |= {name: rng.standard_normal(n) for name in shortcuts.NUMBER_NAMES if name not in table}
    return pd.DataFrame(table)


def test_a_planted_shortcut_shows_at_its_closed_form_and_the_others_at_chance():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 4000)
    dev, numbers = number_table(rng, labels, -2.0), number_table(rng, labels, -2.0)
    table = shortcuts.shortcut_errors(dev, labels, numbers, labels, n_bootstrap=50).set_index("rule")
    row = table.loc["leading silence"]
    assert row["eer"] == pytest.approx(norm.cdf(-1), abs=0.01) and row["bona_fide_if"] == "low"
    assert row["low"] < row["eer"] < row["high"]
    assert table.loc["all together", "eer"] == pytest.approx(norm.cdf(-1), abs=0.01)
    assert (table.drop(["leading silence", "all together"])["eer"] - 0.5).abs().max() < 0.03


def test_a_shortcut_that_turns_round_in_eval_is_above_one_half():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 2000)
    dev, numbers = number_table(rng, labels, 2.0), number_table(rng, labels, -2.0)
    table = shortcuts.shortcut_errors(dev, labels, numbers, labels, n_bootstrap=0).set_index("rule")
    assert table.loc["leading silence", "eer"] == pytest.approx(norm.cdf(1), abs=0.02)
    assert np.isnan(table.loc["leading silence", "low"])


def test_measure_keeps_the_order_of_the_source():
    table = shortcuts.measure(Clips([noise(16000), noise(8000)]))
    assert table["utterance"].tolist() == ["u0", "u1"] and table["duration_s"].tolist() == [1.0, 0.5]


# Which trials fail


@pytest.fixture
def trials():
    """24 trials of 4 speakers; attack B2 beats the detector, A1 does not."""
    rng = np.random.default_rng(1)
    table = pd.DataFrame({"utterance": [f"u{i}" for i in range(24)], "label": [1] * 8 + [0] * 16})
    table["attack"] = ["-"] * 8 + ["A1"] * 8 + ["B2"] * 8
    table["speaker"] = [f"s{i % 4}" for i in range(24)]
    return table.assign(score=rng.normal(np.repeat([2.0, -2.0, 1.5], 8)))


def test_the_parts_of_the_gap_add_up_to_it(trials):
    dev = trials[trials["attack"] != "B2"]
    threshold = metrics.compute_eer(dev["score"], dev["label"]).threshold
    parts = compare.gap_parts(dev, trials, threshold)
    dev_error, eval_error = parts.attrs["dev_error"], parts.attrs["eval_error"]
    assert eval_error == pytest.approx(np.mean(metrics.error_rates(trials["score"], trials["label"], threshold)))
    assert parts["part"].sum() == pytest.approx(eval_error - dev_error)
    assert parts["what"].tolist() == ["bona fide", "B2", "A1"]  # the same bona fide trials, then the larger part
    assert parts["part"][0] == 0 and parts["part"][1] > 0.1 and parts["n"].tolist() == [8, 8, 8]


def test_rejections_carry_wilsons_interval():
    by_speaker = {
        "a": {"n_bonafide": 10, "p_miss": 0.0},
        "b": {"n_bonafide": 10, "p_miss": 0.5},
        "c": {"n_bonafide": 0, "p_miss": None},
    }
    table = compare.rejections(by_speaker)
    assert table["speaker"].tolist() == ["b", "a"] and table["n_rejected"].tolist() == [5, 0]
    z2 = norm.ppf(0.975) ** 2
    assert table["high"][1] == pytest.approx(z2 / (10 + z2))  # Wilson's upper bound for 0 of n
    assert table["low"][0] + table["high"][0] == pytest.approx(1.0)


def test_the_hardest_are_the_most_wrong_of_each_class(trials):
    hard = compare.hardest(trials, threshold=0.0, n=3)
    spoof, bonafide = hard[hard["label"] == 0], hard[hard["label"] == 1]
    assert spoof["score"].tolist() == sorted(trials.loc[trials["label"] == 0, "score"])[::-1][:3]
    assert bonafide["score"].tolist() == sorted(trials.loc[trials["label"] == 1, "score"])[:3]
    assert set(spoof["kind"]) == {"fake accepted"} and set(bonafide["kind"]) == {"nearest real"}
    assert (hard["margin"] > 0).equals(hard["kind"].isin(["fake accepted", "real rejected"]))


@pytest.mark.parametrize("n", [2, 16, 100])
def test_a_small_proportional_subset_of_many_attacks_has_both_labels(n):
    attacks = ["-"] * 66 + [f"A{i // 2:02d}" for i in range(66)]  # two trials of each attack: half a trial of 16 in 132
    protocol = pd.DataFrame({"label": [1] * 66 + [0] * 66, "attack": attacks, "utterance": range(132)})
    subset = division.proportional_subset(protocol.sample(frac=1, random_state=1), n, seed=0)
    assert len(subset) == n and subset["label"].sum() == n // 2
    assert subset.loc[subset["label"] == 0, "attack"].nunique() == min(n // 2, 33)


def test_a_proportional_subset_keeps_the_shares_of_attacks_and_the_order_of_trials():
    sizes = {"-": 300, "A01": 600, "A02": 60, "A03": 40}
    attacks = np.repeat(list(sizes), list(sizes.values()))
    protocol = pd.DataFrame({"label": (attacks == "-").astype(int), "attack": attacks, "utterance": range(1000)})
    subset = division.proportional_subset(protocol, 100, seed=3)
    assert subset["attack"].value_counts().to_dict() == {"-": 30, "A01": 60, "A02": 6, "A03": 4}
    assert subset["utterance"].is_monotonic_increasing and len(division.proportional_subset(protocol, 1000, 3)) == 1000


def test_a_balanced_subset_is_half_bona_fide_and_even_over_attacks(trials):
    subset = division.balanced_subset(trials, 12, seed=0)
    assert subset["attack"].value_counts().to_dict() == {"-": 6, "A1": 3, "B2": 3}
    assert subset["utterance"].tolist() == sorted(subset["utterance"], key=lambda u: int(u[1:]))
    assert division.balanced_subset(trials, 12, seed=0).equals(subset)
    assert len(division.balanced_subset(trials, 100, seed=0)) == 24
    with pytest.raises(ConfigError, match="at least 4"):
        division.balanced_subset(trials, 2, seed=0)


def test_scored_part_takes_what_both_have(trials):
    scores = pd.DataFrame({"utterance": ["u3", "elsewhere", "u1"], "score": [3.0, 9.0, 1.0]})
    part = division.scored_part(trials.drop(columns="score"), scores)
    assert part["utterance"].tolist() == ["u1", "u3"] and part["score"].tolist() == [1.0, 3.0]
    assert division.scored_part(trials.drop(columns="score"), scores.iloc[1:2]).empty


def test_halves_share_no_speaker(trials):
    first, second = division.split_by_speaker(trials, seed=0)
    assert not set(first["speaker"]) & set(second["speaker"]) and len(first) + len(second) == 24


# Two systems


def test_agreement_counts_every_trial_once():
    labels = np.array([1, 1, 1, 1, 0, 0, 0])
    first = np.array([1.0, 2.0, -1.0, -2.0, -1.0, 1.0, -2.0])
    second = np.array([1.0, -2.0, 1.0, -2.0, -1.0, 1.0, 2.0])
    table = compare.agreement(first, second, labels, 0.0)
    counts = ["both_right", "only_first_right", "only_second_right", "both_wrong"]
    assert table.loc["bona fide", counts].tolist() == [1, 1, 1, 1]
    assert table.loc["spoof", counts].tolist() == [1, 1, 0, 1]
    assert (table[counts].sum(axis=1) == table["n"]).all()


def test_fusion_of_independent_systems_reaches_its_closed_form_with_a_significant_gain():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 3000)

    def draw():
        return rng.normal(np.outer(labels, [2.0, 2.0])) * [1.0, 25.0] + [5.0, -300.0]  # other scales, same strength

    dev, scores = draw(), draw()
    fused, _ = compare.fuse(dev, labels, scores)
    systems = {"first": scores[:, 0], "second": scores[:, 1], **fused}
    table = compare.compare(systems, labels, np.arange(6000) % 60, n_bootstrap=100)
    assert table.loc["first", "eer"] == pytest.approx(norm.cdf(-1), abs=0.012)
    for name in ("mean", "logistic"):
        assert table.loc[name, "eer"] == pytest.approx(norm.cdf(-np.sqrt(2)), abs=0.012)  # d' of the sum: 2 sqrt 2
        assert table.loc[name, "high"] < 0
    assert table.loc["second", "low"] < 0 < table.loc["second", "high"]
    assert pd.isna(table.loc["first", "difference"]) and set(table["unit"][1:]) == {"speaker"}


def test_where_speakers_cannot_carry_an_interval_trials_do():
    labels = np.repeat([0, 1], 20)
    scores = np.random.default_rng(0).normal(labels)
    table = compare.compare({"a": scores, "b": -scores}, labels, labels, n_bootstrap=20)  # one speaker a class
    assert table.loc["b", "unit"] == "trial" and table.loc["b", "low"] <= table.loc["b", "difference"]


# Probing


class Loudness(nn.Module):
    """A countermeasure whose score is the mean power of the first differences: its gradient is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, waveform):
        power = self.weight * (waveform[:, 1:] - waveform[:, :-1]).square().mean(1)
        return CMOutput(torch.stack([-power, power], 1), power[:, None])


def test_relevance_lies_where_the_sound_is_and_sums_to_the_derivative_by_the_gain():
    n = 16000
    time_s = np.arange(n) / SAMPLE_RATE_HZ
    clip = np.where(time_s < 0.5, np.sin(2 * np.pi * 3125 * time_s), 0).astype(np.float32)
    heat = probing.relevance(Loudness(), clip, n_bands=32, frame_s=0.1, n_samples=n)
    assert heat.shape == (32, 11)
    score = Loudness()(torch.from_numpy(clip)[None]).logits[0, 1].item()
    assert heat.sum() == pytest.approx(2 * score, rel=1e-3)  # Euler: the score is of degree 2 in the gain
    assert heat[12, :5].sum() > 0.9 * heat.sum()  # 3.125 kHz is in band 12 of 250 Hz, the first half second
    assert np.abs(heat[:, 6:]).max() < 1e-6 * heat.max()


def test_relevance_agrees_with_a_finite_difference_through_a_real_model_on_a_repeated_clip():
    """In double precision: in single, the rounding of the logits is as large as their difference."""
    from deepfake_utils.models import build_model

    model = build_model("aasist-l", generator=torch.Generator().manual_seed(0)).double().eval()
    clip = torch.from_numpy(noise(3000) / 32768)
    grid = {"n_fft": 512, "hop_length": 160, "window": torch.hann_window(512).double()}
    spectrum = torch.stft(clip, **grid, pad_mode="constant", return_complex=True)

    def score(step):
        gain = torch.ones(257, 1, dtype=torch.float64)
        gain[:64] += step  # the lowest of four bands
        rebuilt = torch.istft(spectrum * gain, **grid, length=3000)
        with torch.no_grad():
            return model(rebuilt[torch.arange(8000) % 3000][None]).logits[0, 1].item()

    heat = probing.relevance(model, clip.numpy(), n_bands=4, frame_s=0.1, n_samples=8000)
    # 2e-16 of rounding over a difference of 1e-9 or so, and no maximum of a pooling changes hands
    assert heat[0].sum() == pytest.approx((score(1e-5) - score(-1e-5)) / 2e-5, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["rawnet2", "lfcc-lcnn-lstm"])
def test_relevance_on_a_gpu_goes_through_recurrent_layers(name):
    from deepfake_utils.models import build_model

    model = build_model(name, generator=torch.Generator().manual_seed(0)).eval()
    clip = noise(16000).astype(np.float32) / 32768
    heat = [probing.relevance(model.to(device), clip, n_samples=16000) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(heat[1], heat[0], rtol=0, atol=1e-2 * np.abs(heat[0]).max())


def test_temporal_attention_is_shared_out_and_is_the_one_the_model_applies():
    from deepfake_utils.models import build_model

    model = build_model("aasist-l", generator=torch.Generator().manual_seed(0)).eval()
    clip = noise(64600).astype(np.float32) / 32768
    caught = {}
    model.temporal_attention.register_forward_hook(lambda module, inputs, output: caught.update(nodes=inputs[0][0]))
    attention, kept = probing.temporal_attention(model, clip)
    assert attention.shape == (29, 29) and kept.shape == (29,)
    np.testing.assert_allclose(attention.sum(1), 1, rtol=1e-5)
    assert kept.sum() == int(29 * model.temporal_pool.share)
    layer, nodes = model.temporal_attention, caught["nodes"]
    affinity = torch.tanh(layer.pair(nodes[3] * nodes)) @ layer.pair_weight  # of the fourth span, by itself
    expected = (affinity[:, 0] / layer.temperature).softmax(0).detach().numpy()
    np.testing.assert_allclose(attention[3], expected, rtol=1e-4)


def test_temporal_attention_of_one_class_weights_and_of_few_nodes():
    from deepfake_utils.conventions import ConfigError
    from deepfake_utils.models import build_model
    from deepfake_utils.models.losses import build_loss
    from deepfake_utils.scoring.weights import scoring_model

    generator = torch.Generator().manual_seed(0)
    model = build_model("aasist-l", generator=generator, channels=(4, 4), temporal_keep=0.3).eval()
    clip = noise(model.min_samples).astype(np.float32) / 32768  # two nodes, of which int(2 * 0.3) = 0 would be kept
    attention, kept = probing.temporal_attention(model, clip)
    assert attention.shape == (2, 2) and kept.sum() == 1
    one_class = scoring_model(model, build_loss("oc_softmax", 160))
    again, _ = probing.temporal_attention(one_class, clip)
    np.testing.assert_array_equal(again, attention)
    with pytest.raises(ConfigError, match="LCNN has no temporal graph"):
        probing.temporal_attention(build_model("lfcc-lcnn").eval(), clip)


def test_window_scores_are_those_of_the_stretches_alone():
    clip = np.concatenate([np.zeros(16000), noise(24000) / 32768]).astype(np.float32)
    table = probing.window_scores(Loudness(), clip, window_s=1.0, hop_s=1.0, n_samples=32000)
    assert table["start_s"].tolist() == [0.0, 1.0] and table["stop_s"].tolist() == [1.0, 2.0]  # up to n_samples
    assert table["score"][0] == 0 and table["score"][1] > 0
    uneven = probing.window_scores(Loudness(), clip[:36000], window_s=1.0, hop_s=1.0, n_samples=64000)
    assert uneven["stop_s"].iloc[-1] == 2.25 and len(uneven) == 3  # the last stretch ends with the clip
    short = probing.window_scores(Loudness(), clip[16000:20000], n_samples=32000)
    assert len(short) == 1 and short["stop_s"][0] == 0.25


def test_stretches_are_scored_together_as_one_by_one():
    """In few passes of the model, each stretch with the score it has alone."""
    calls, clip = [], np.concatenate([noise(40000), noise(24000, 300.0)]) / np.float32(32768)
    model = Loudness()
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    table = probing.window_scores(model, clip, window_s=0.5, hop_s=0.1, n_samples=64000)
    assert sum(calls) == len(table) == 36 and len(calls) == 3
    for row in table.iloc[[0, 17, 35]].itertuples():
        stretch = clip[round(row.start_s * SAMPLE_RATE_HZ) : round(row.stop_s * SAMPLE_RATE_HZ)]
        alone = probing.window_scores(model, stretch, window_s=0.5, n_samples=64000)
        assert row.score == pytest.approx(alone["score"][0], rel=1e-5)


def test_projection_keeps_separate_groups_apart():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(0, 1, (30, 16)), rng.normal(8, 1, (30, 16))])
    maps = probing.project(points)
    assert len(maps) == 2 and len(probing.project(points[:10])) == 1
    for coordinates in maps.values():
        first, second = coordinates[:30], coordinates[30:]
        spread = max(first.std(axis=0).max(), second.std(axis=0).max())
        assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * spread


def test_the_cepstral_baseline_learns_what_statistics_tell():
    from scipy.signal import lfilter

    plain = [noise(8000 + 100 * i, seed=i) for i in range(24)]
    clips = [c if i % 2 else lfilter([1, 0.9], 1, c / 2).astype(np.int16) for i, c in enumerate(plain)]
    labels = np.arange(24) % 2
    statistics = probing.cepstral_statistics(Clips(clips), progress=None)
    assert statistics.shape == (24, 120) and np.isfinite(statistics).all()
    baseline = probing.fit_cepstral_baseline(statistics[:12], labels[:12])
    assert metrics.compute_eer(baseline.decision_function(statistics[12:]), labels[12:]).eer == 0
    assert np.isfinite(probing.cepstral_statistics(Clips([noise(5)]), progress=None)).all()
