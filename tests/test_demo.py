"""The demo corpus: an ordinary 2019 LA folder, made from a seed, in which nothing but the attacks tells."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from scipy import signal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepfake_utils.conventions import BONAFIDE, NO_ATTACK, SAMPLE_RATE_HZ, ConfigError, CorpusError
from deepfake_utils.corpora import find_corpora
from deepfake_utils.demo import corpus as demo
from deepfake_utils.demo import voice

ATTACKS = voice.SEEN_ATTACKS | voice.UNSEEN_ATTACKS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return demo.build_demo(tmp_path_factory.mktemp("parent") / "demo", scale=0.4)


@pytest.fixture(scope="module")
def protocol(corpus):
    return corpus.protocol()


@pytest.fixture(scope="module")
def samples(protocol):
    return [soundfile.read(path, dtype="int16")[0] for path in protocol["path"]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of the smallest corpus, twelve recordings; not to be changed."""
    folder = tmp_path_factory.mktemp("small")
    demo.build_demo(folder, seed=3, scale=0.02)
    return folder


def contents(folder):
    """Samples of every recording, by name."""
    return {path.name: soundfile.read(path, dtype="int16")[0].tobytes() for path in folder.rglob("*.flac")}


# --- what is in it


def test_full_size_has_the_promised_trials():
    plans = {split: list(demo.plan(split, seed=0, scale=1.0)) for split in demo.SHAPES}
    assert {split: len(trials) for split, trials in plans.items()} == {"train": 180, "dev": 95, "eval": 160}
    bonafide = {split: sum(trial.attack == NO_ATTACK for trial in trials) for split, trials in plans.items()}
    assert bonafide == {"train": 90, "dev": 45, "eval": 60}


def test_attacks_and_speakers_are_kept_apart(protocol):
    attacks = protocol[protocol["attack"] != NO_ATTACK].groupby("split")["attack"].unique().map(set)
    assert attacks["train"] == attacks["dev"] == {"D01", "D02"}
    assert attacks["eval"] == {"D03", "D04"}
    speakers = protocol.groupby("split")["speaker"].unique().map(set)
    assert all(len(group) == 10 for group in speakers) and len(set.union(*speakers)) == 30
    assert protocol.groupby("speaker")["label"].nunique().eq(2).all()  # a bootstrap over speakers has both classes


def test_labels_cannot_be_read_off_names_or_order(protocol):
    train = protocol[protocol["split"] == "train"].sort_values("utterance")
    assert 0.25 < train["label"][: len(train) // 2].mean() < 0.75


def test_it_is_found_as_any_corpus_of_this_layout_under_its_folders_name(corpus):
    (found,) = find_corpora(corpus.root.parent)
    assert found == corpus
    assert (found.name, found.kind, found.splits) == ("demo", "asvspoof2019_la", ("train", "dev", "eval"))
    assert found.asv_scores("eval") is not None and found.asv_scores("train") is None


def test_recordings_are_16_bit_flac_without_clipping(protocol, samples):
    info = soundfile.info(protocol["path"][0])
    assert (info.samplerate, info.channels, info.subtype, info.format) == (SAMPLE_RATE_HZ, 1, "PCM_16", "FLAC")
    assert all(1.3 < len(x) / SAMPLE_RATE_HZ < 4.0 for x in samples)
    assert all(np.abs(x.astype(int)).max() < 32767 for x in samples)
    longest_zero_run = max(int(np.diff(np.flatnonzero(np.r_[1, x, 1])).max()) for x in samples)
    assert longest_zero_run < 50  # a noise floor everywhere: no digital silence that an attack could leave or fill


def test_asv_scores_look_like_the_organisers(corpus):
    for split, attacks in (("dev", voice.SEEN_ATTACKS), ("eval", voice.UNSEEN_ATTACKS)):
        rows = [line.split() for line in corpus.asv_scores(split).read_text().splitlines()]
        of_people = {(attack, key) for attack, key, _ in rows if key != "spoof"}
        assert of_people == {("bonafide", "target"), ("bonafide", "nontarget")}
        assert {attack for attack, key, _ in rows if key == "spoof"} == set(attacks)
        mean = {k: np.mean([float(s) for _, key, s in rows if key == k]) for k in ("target", "nontarget", "spoof")}
        assert mean["target"] > mean["spoof"] > mean["nontarget"]


# --- a function of its seed, kept, and safe


def test_same_seed_same_samples(small, tmp_path):
    demo.build_demo(tmp_path / "again", seed=3, scale=0.02)
    demo.build_demo(tmp_path / "other", seed=4, scale=0.02)
    assert contents(tmp_path / "again") == contents(small)
    assert contents(tmp_path / "other").keys() == contents(small).keys()
    assert not set(contents(tmp_path / "other").values()) & set(contents(small).values())


def test_second_call_builds_nothing(corpus, monkeypatch):
    monkeypatch.setattr(demo, "_build", lambda *_: pytest.fail("built again"))
    assert demo.build_demo(corpus.root.parent, scale=0.4) == corpus


def test_a_stopped_build_leaves_nothing(tmp_path, monkeypatch):
    def stopped(trial):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "make_trial", stopped)
        with pytest.raises(KeyboardInterrupt):
            demo.build_demo(tmp_path, scale=0.02)
    assert not list(tmp_path.iterdir())
    demo.build_demo(tmp_path, scale=0.02).protocol()


def test_other_settings_replace_the_corpus(small, tmp_path):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    leftover = tmp_path / "LA" / "ASVspoof2019_LA_train" / "flac" / "LA_T_0000099.flac"
    shutil.copy(next(small.rglob("*.flac")), leftover)
    other = demo.build_demo(tmp_path, seed=5, scale=0.02)
    assert {path.stem for path in tmp_path.rglob("*.flac")} == set(other.protocol()["utterance"])
    assert not set(contents(tmp_path).values()) & set(contents(small).values())


def test_two_builders_at_once_agree(small, tmp_path):
    code = f"from deepfake_utils.demo import build_demo; build_demo({str(tmp_path)!r}, seed=3, scale=0.02).protocol()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    builders = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [builder.wait(timeout=300) for builder in builders] == [0, 0]
    assert contents(tmp_path) == contents(small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LA", "demo.json"]


def test_a_real_corpus_is_never_replaced(tmp_path):
    recording = tmp_path / "LA" / "ASVspoof2019_LA_train" / "flac" / "LA_T_1000137.flac"
    recording.parent.mkdir(parents=True)
    recording.write_bytes(b"precious")
    with pytest.raises(CorpusError, match="not part of a demo corpus.*new or empty folder"):
        demo.build_demo(tmp_path, scale=0.02)
    assert recording.read_bytes() == b"precious"


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"scale": 11}, {"scale": float("nan")}, {"seed": -1}])
def test_settings_out_of_range(tmp_path, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        demo.build_demo(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


# --- nothing but the attacks tells


def shortcuts(x):
    """Duration, level, peak, silences at both ends at two thresholds, roll-offs, high bands: (12,)."""
    x = x / 32768
    loudness = np.sqrt(signal.fftconvolve(x**2, np.ones(160) / 160, mode="same").clip(1e-12))
    ends = []
    for threshold in (0.05, 0.01):
        active = np.flatnonzero(loudness > threshold * loudness.max())
        ends += [active[0] / SAMPLE_RATE_HZ, (len(x) - active[-1]) / SAMPLE_RATE_HZ]
    power = np.abs(np.fft.rfft(x)) ** 2
    hz = np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE_HZ)
    below = np.cumsum(power) / power.sum()
    rolloffs = [hz[np.searchsorted(below, part)] for part in (0.95, 0.99)]
    bands_db = [10 * np.log10(power[hz >= low].sum() / power.sum()) for low in (4000, 6000, 7000)]
    levels_db = [20 * np.log10(x.std()), 20 * np.log10(np.abs(x).max())]
    return [len(x) / SAMPLE_RATE_HZ, *levels_db, *ends, *rolloffs, *bands_db]


def shortcut_auc(features, protocol):
    """Eval AUC of a logistic regression trained on train."""
    train, held_out = (protocol["split"] == split for split in ("train", "eval"))
    label = protocol["label"].to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(features[train], label[train])
    return roc_auc_score(label[held_out], model.decision_function(features[held_out]))


def test_level_length_silence_and_bandwidth_do_not_tell(protocol, samples):
    features = np.array([shortcuts(x) for x in samples])
    labels = protocol.loc[protocol["split"] == "eval", "label"]
    n_bonafide, n_spoof = (labels == BONAFIDE).sum(), (labels != BONAFIDE).sum()
    # Spread of the AUC of scores that know nothing (Mann-Whitney); a one-sided test at 1 in 1000.
    spread = np.sqrt((n_bonafide + n_spoof + 1) / (12 * n_bonafide * n_spoof))
    chance = 0.5 + 3.09 * spread
    assert shortcut_auc(features, protocol) < chance
    # The test sees what it should: a leak of half a standard deviation into any of these would be found.
    leaky = features.copy()
    leaky[:, 1] += 3.5 * (protocol["label"] == BONAFIDE)  # dB; levels are spread over 10 dB
    leaky[:, 3] += 0.2 * (protocol["label"] == BONAFIDE)  # s of silence; it is spread over 350 ms
    assert shortcut_auc(leaky, protocol) > chance


# --- the parts do what they say


@pytest.fixture(scope="module")
def speech():
    speaker = voice.draw_speaker(np.random.default_rng(1))
    return speaker, voice.speak(speaker, 32_000, np.random.default_rng(2))


def test_harmonics_are_the_sum_they_stand_for():
    f0_hz = np.linspace(100, 180, 4000)
    phase = 2 * np.pi * np.cumsum(f0_hz) / SAMPLE_RATE_HZ
    n = int(7000 / f0_hz.max())
    expected = sum(2 * np.cos(k * phase) for k in range(1, n + 1)) / np.sqrt(2 * n)
    assert voice._harmonics(f0_hz) == pytest.approx(expected, abs=1e-3 * np.abs(expected).max())


def test_voice_has_the_speakers_pitch(speech):
    speaker, dry = speech
    frames = np.lib.stride_tricks.sliding_window_view(dry, 1024)[::512]
    frames = frames[frames.std(axis=1) > np.median(frames.std(axis=1))]
    correlation = np.fft.irfft((np.abs(np.fft.rfft(frames * np.hanning(1024), 2048)) ** 2).mean(axis=0))
    lags = np.arange(SAMPLE_RATE_HZ // 300, SAMPLE_RATE_HZ // 70)
    f0_hz = SAMPLE_RATE_HZ / lags[np.argmax(correlation[lags])]
    assert abs(12 * np.log2(f0_hz / speaker.f0_hz)) < 4  # semitones: accents and declination move it


def test_still_tract_resonates_where_it_should():
    response = np.abs(voice._tract(np.array([[500.0, 1500.0, 2500.0]]), 1.0))[:, 0]
    hz = np.arange(len(response)) * SAMPLE_RATE_HZ / voice.FRAME
    assert hz[signal.find_peaks(response)[0][:3]] == pytest.approx([500, 1500, 2500], abs=32)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_changes_the_sound_and_not_length_level_or_balance(name, speech):
    _, dry = speech
    fake = voice.spoof(name, dry, np.random.default_rng(5))
    assert fake.shape == dry.shape and np.isfinite(fake).all()
    assert fake.std() == pytest.approx(dry.std())
    assert np.abs(np.corrcoef(fake, dry)[0, 1]) < 0.99
    hz, (power, wanted) = signal.welch(np.stack([fake, dry]), SAMPLE_RATE_HZ, nperseg=512)
    for low, high in ((0, 1000), (1000, 2500), (2500, 4500), (4500, 8000)):
        band = (hz >= low) & (hz < high)
        assert abs(10 * np.log10(power[band].sum() / wanted[band].sum())) < 3


def test_recording_ignores_how_loud_it_is(speech):
    _, dry = speech
    quiet, loud = (voice.record(factor * dry, np.random.default_rng(1)) for factor in (0.01, 1.0))
    assert np.abs(quiet.astype(int) - loud).max() <= 1
