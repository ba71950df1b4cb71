"""The demo corpus: what it contains, that it is a function of its seed, and that nothing but the attacks tells."""

import hashlib
import json
import multiprocessing
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
from deepfake_utils.demo import attacks as demo_attacks
from deepfake_utils.demo import corpus as demo
from deepfake_utils.demo import voice as demo_voice

SCALE = 0.4  # 96 train and 96 eval trials: chance is 0.5 +- 0.06 in AUC


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return demo.build_demo(tmp_path_factory.mktemp("demo") / "corpus", seed=0, scale=SCALE)


@pytest.fixture(scope="module")
def protocol(corpus):
    return corpus.protocol()


@pytest.fixture(scope="module")
def samples(protocol):
    return [soundfile.read(path, dtype="int16")[0] for path in protocol["path"]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of the smallest corpus, 18 recordings; not to be changed."""
    folder = tmp_path_factory.mktemp("small")
    demo.build_demo(folder, seed=3, scale=0.02)
    return folder


def folder_of(corpus):
    return corpus.root.parent


def digests(folder):
    """Digest of the samples of every recording, by name."""
    return {
        path.name: hashlib.sha256(soundfile.read(path, dtype="int16")[0].tobytes()).hexdigest()
        for path in folder.rglob("*.flac")
    }


# --- what is in it


def test_full_size_has_the_promised_trials(tmp_path):
    plans = {split: demo.plan(tmp_path, split, seed=0, scale=1.0) for split in demo.SPLITS}
    assert {split: len(trials) for split, trials in plans.items()} == {"train": 240, "dev": 120, "eval": 240}
    bonafide = {split: sum(trial.attack == NO_ATTACK for trial in trials) for split, trials in plans.items()}
    assert bonafide == {"train": 120, "dev": 60, "eval": 80}


def test_attacks_and_speakers_are_kept_apart(protocol):
    attacks = protocol[protocol["attack"] != NO_ATTACK].groupby("split")["attack"].unique().map(set)
    assert attacks["train"] == attacks["dev"] == {"D01", "D02", "D03", "D04"}
    assert attacks["eval"] == {"D05", "D06", "D07", "D08"}
    speakers = protocol.groupby("split")["speaker"].unique().map(set)
    assert all(len(group) >= 10 for group in speakers)
    assert len(set.union(*speakers)) == sum(map(len, speakers))
    both = protocol.groupby("speaker")["label"].nunique()
    assert (both == 2).all()  # so that a bootstrap over speakers always has both classes


def test_labels_cannot_be_read_off_names_or_order(protocol):
    train = protocol[protocol["split"] == "train"].sort_values("utterance")
    half = len(train) // 2
    assert 0.25 < train["label"][:half].mean() < 0.75


def test_finder_recognises_it(corpus):
    found = find_corpora(folder_of(corpus))
    assert [(c.kind, c.root) for c in found] == [("demo", corpus.root)]
    assert found[0].fingerprint() == corpus.fingerprint()
    assert found[0].asv_scores("eval") == corpus.asv_scores("eval")


def test_recordings_are_16_bit_flac_without_clipping(protocol, samples):
    info = soundfile.info(protocol["path"][0])
    assert (info.samplerate, info.channels, info.subtype, info.format) == (SAMPLE_RATE_HZ, 1, "PCM_16", "FLAC")
    assert all(1.3 < len(x) / SAMPLE_RATE_HZ < 4.0 for x in samples)
    assert all(np.abs(x.astype(int)).max() < 32767 for x in samples)
    longest_zero_run = max(int(np.diff(np.flatnonzero(np.r_[1, x, 1])).max()) for x in samples)
    assert longest_zero_run < 50  # a noise floor everywhere: no digital silence that an attack could leave or fill


def test_asv_scores_look_like_the_organisers(corpus):
    for split, attacks in (("dev", demo_attacks.SEEN_ATTACKS), ("eval", demo_attacks.UNSEEN_ATTACKS)):
        rows = [line.split() for line in corpus.asv_scores(split).read_text().splitlines()]
        assert len(rows) > 2000
        assert {(attack, key) for attack, key, _ in rows if key != "spoof"} == {
            ("bonafide", "target"),
            ("bonafide", "nontarget"),
        }
        assert {attack for attack, key, _ in rows if key == "spoof"} == set(attacks)
        scores = {key: np.array([float(s) for _, k, s in rows if k == key]) for key in ("target", "nontarget", "spoof")}
        assert scores["target"].mean() > scores["spoof"].mean() > scores["nontarget"].mean()


# --- a function of its seed, cached, and safe


def test_same_seed_same_samples_whatever_the_number_of_processes(small, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_n_cores", lambda: 1)
    demo.build_demo(tmp_path / "one", seed=3, scale=0.02)
    monkeypatch.setattr(demo, "_n_cores", lambda: 3)
    demo.build_demo(tmp_path / "other", seed=4, scale=0.02)
    folders = (small, tmp_path / "one", tmp_path / "other")
    many, one, other = map(digests, folders)
    assert many == one
    assert many.keys() == other.keys()
    assert not set(many.values()) & set(other.values())
    marks = [json.loads((folder / "DEMO.json").read_text())["sha256"] for folder in folders]
    assert marks[0] == marks[1] != marks[2]


def test_second_call_builds_nothing(corpus, monkeypatch):
    monkeypatch.setattr(demo, "_build", lambda *_: pytest.fail("built again"))
    assert demo.build_demo(folder_of(corpus), seed=0, scale=SCALE) == corpus


@pytest.mark.parametrize("damage", ["marker lost", "marker cut", "recording lost"])
def test_unfinished_build_is_done_again(small, tmp_path, damage):
    shutil.copytree(small, tmp_path / "demo")
    marker, recording = tmp_path / "demo" / "DEMO.json", next((tmp_path / "demo").rglob("*.flac"))
    if damage == "marker lost":
        marker.unlink()
    elif damage == "marker cut":
        marker.write_text(marker.read_text()[:20])
    else:
        recording.unlink()
    demo.build_demo(tmp_path / "demo", seed=3, scale=0.02)
    assert digests(tmp_path / "demo") == digests(small)
    assert marker.read_text() == (small / "DEMO.json").read_text()


def test_killed_build_leaves_no_marker(tmp_path, monkeypatch):
    def killed(trial):
        if trial.utterance.endswith("3"):
            raise KeyboardInterrupt
        return written(trial)

    written = demo._write_trial
    monkeypatch.setattr(demo, "_n_cores", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "_write_trial", killed)
        with pytest.raises(KeyboardInterrupt):
            demo.build_demo(tmp_path, seed=0, scale=0.02)
    assert list(tmp_path.rglob("*.flac")) and not (tmp_path / "DEMO.json").exists()
    demo.build_demo(tmp_path, seed=0, scale=0.02).protocol()


def test_other_settings_replace_the_corpus(small, tmp_path):
    leftover = tmp_path / "LA" / "ASVspoof2019_LA_train" / "flac" / "LA_T_0000099.flac"
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    shutil.copy(next(small.rglob("*.flac")), leftover)
    other = demo.build_demo(tmp_path, seed=5, scale=0.02)
    assert {path.name for path in tmp_path.rglob("*.flac")} == {f"{u}.flac" for u in other.protocol()["utterance"]}
    assert not set(digests(tmp_path).values()) & set(digests(small).values())


def test_two_builders_at_once_agree(small, tmp_path):
    code = (
        f"from deepfake_utils.corpora import build_demo; build_demo({str(tmp_path)!r}, seed=3, scale=0.02).protocol()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    builders = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [builder.wait(timeout=120) for builder in builders] == [0, 0]
    assert digests(tmp_path) == digests(small)
    assert not list(tmp_path.rglob("*.part"))


def test_a_real_corpus_is_never_replaced(tmp_path):
    recording = tmp_path / "LA" / "ASVspoof2019_LA_train" / "flac" / "LA_T_1000137.flac"
    recording.parent.mkdir(parents=True)
    recording.write_bytes(b"precious")
    with pytest.raises(CorpusError, match="LA_T_1000137.*new or empty folder"):
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
    leaky[:, 1] += 2.5 * (protocol["label"] == BONAFIDE)  # 2.5 dB louder; levels are spread over 10 dB
    leaky[:, 3] += 0.15 * (protocol["label"] == BONAFIDE)  # 150 ms more silence; it is spread over 350 ms
    assert shortcut_auc(leaky, protocol) > chance


# --- the parts do what they say


@pytest.fixture(scope="module")
def speech():
    speaker = demo_voice.draw_speaker("someone", np.random.default_rng(1))
    return speaker, demo_voice.speak(speaker, 32000, np.random.default_rng(2))


def test_voice_has_the_speakers_pitch(speech):
    speaker, dry = speech
    f0_hz = demo_attacks.estimate_f0(dry)
    voiced = f0_hz[f0_hz > 0]
    assert len(voiced) > 0.3 * len(f0_hz)
    assert abs(12 * np.log2(np.median(voiced) / speaker.f0_hz)) < 4  # semitones: accents and declination move it


def test_pitch_estimator_on_a_known_pulse_train():
    pulses = np.zeros(16000)
    pulses[::100] = 1.0  # 160 Hz
    f0_hz = demo_attacks.estimate_f0(signal.lfilter([1.0], [1.0, -1.2, 0.8], pulses))
    assert f0_hz[10:-20] == pytest.approx(160.0)


def test_still_tract_resonates_where_it_should():
    noise = np.random.default_rng(0).standard_normal(64000)
    formants = np.tile([500.0, 1500.0, 2500.0], (1000, 1))
    hz, power = signal.welch(demo_voice._tract(noise, formants, 1.0), SAMPLE_RATE_HZ, nperseg=1024)
    for formant in formants[0]:
        near = np.abs(hz - formant) < 400
        assert hz[near][np.argmax(power[near])] == pytest.approx(formant, abs=40)


def test_moving_tract_does_not_click():
    """A steady low tone through gliding formants keeps its band: frame-to-frame steps would splash above it."""
    tone = np.sin(2 * np.pi * 200 * np.arange(64000) / SAMPLE_RATE_HZ)
    glide = np.linspace([300, 900, 2300], [700, 1800, 2700], 1000)
    hz, power = signal.welch(demo_voice._tract(tone, glide, 1.0)[2000:-2000], SAMPLE_RATE_HZ, "blackmanharris", 2048)
    assert 10 * np.log10(power[hz > 3000].sum() / power.sum()) < -50


def test_stft_inverts(speech):
    _, dry = speech
    for n_fft, hop in ((512, 128), (800, 200), (512, 80)):
        spectra = demo_attacks.stft(dry, n_fft, hop)
        assert demo_attacks.istft(spectra, n_fft, hop, len(dry)) == pytest.approx(dry, abs=1e-9)


def test_griffin_lim_approaches_the_magnitudes(speech):
    _, dry = speech
    wanted = np.abs(demo_attacks.stft(dry, 512, 128))

    def miss(n_iterations):
        guess = demo_attacks.griffin_lim(wanted, 512, 128, len(dry), n_iterations, np.random.default_rng(0))
        return np.linalg.norm(np.abs(demo_attacks.stft(guess, 512, 128)) - wanted) / np.linalg.norm(wanted)

    assert miss(30) < miss(5) < miss(0)
    assert miss(30) < 0.25


def test_mdct_reconstructs(speech):
    _, dry = speech
    half, window = 320, np.sin(np.pi * (np.arange(640) + 0.5) / 640)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(dry, (half, 2 * half)), 2 * half)[::half] * window
    again = demo_attacks._inverse_mdct(demo_attacks._mdct(frames)) * window
    assert demo_voice.overlap_add(again, half)[half : half + len(dry)] == pytest.approx(dry, abs=1e-9)


@pytest.mark.parametrize("name", [*demo_attacks.SEEN_ATTACKS, *demo_attacks.UNSEEN_ATTACKS])
def test_attack_changes_the_sound_and_not_length_level_or_balance(name, speech):
    speaker, dry = speech
    rng = np.random.default_rng(5)
    fake = demo_attacks.spoof(name, dry, lambda: demo_voice.speak(speaker, 32000, rng), rng)
    assert fake.shape == dry.shape and np.isfinite(fake).all()
    assert np.sqrt(np.mean(fake**2)) == pytest.approx(np.sqrt(np.mean(dry**2)))
    assert np.abs(np.corrcoef(fake, dry)[0, 1]) < 0.99
    hz, (power, wanted) = signal.welch(np.stack([fake, dry]), SAMPLE_RATE_HZ, nperseg=512)
    for low, high in ((0, 1000), (1000, 2500), (2500, 4500), (4500, 8000)):
        band = (hz >= low) & (hz < high)
        assert abs(10 * np.log10(power[band].sum() / wanted[band].sum())) < 3


def test_recording_ignores_what_it_records(speech):
    _, dry = speech
    recording = demo_voice.draw_recording(np.random.default_rng(0))
    for loudness in (0.01, 1.0):
        heard = demo_voice.record(loudness * dry, recording, np.random.default_rng(1)) / 32768
        assert 20 * np.log10(heard.std()) == pytest.approx(recording.level_db, abs=0.1)


def test_spawned_processes_can_build_too():
    """Where forking is not the way (macOS, Windows), trials travel to workers by pickling."""
    trial = demo.plan(demo.Path("demo"), "train", seed=0, scale=0.02)[0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(demo.make_trial, (trial,))
    assert np.array_equal(there, demo.make_trial(trial))
