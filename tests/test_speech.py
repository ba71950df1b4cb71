"""Finding speech: real speech is found, what is none is not, and chunk sizes do not matter."""

import numpy as np
import pytest
import soundfile

from deepfake_utils.scoring import silero
from deepfake_utils.scoring import speech as speech_module
from deepfake_utils.scoring.speech import FRAME_SAMPLES, SpeechFinder

SECONDS = 6


def flags(samples, *cuts) -> np.ndarray:
    finder = SpeechFinder()
    parts = [finder.push(part.astype(np.float32)) for part in np.split(samples, cuts)]
    return np.concatenate([*parts, finder.finish()])


def coloured(exponent: float) -> np.ndarray:
    """Noise whose power falls with frequency to the power of `exponent`, RMS 0.1."""
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=SECONDS * 16_000))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** (exponent / 2)
    noise = np.fft.irfft(spectrum)
    return 0.1 * noise / noise.std()


def plucked() -> np.ndarray:
    """A tune on plucked strings (K. Karplus and A. Strong, Computer Music Journal 7, 1983)."""
    rng, notes = np.random.default_rng(0), []
    for frequency_hz in (220, 262, 330, 392, 440, 330) * 2:
        string = rng.uniform(-0.5, 0.5, 16_000 // frequency_hz)
        periods = []
        for _ in range(8_000 // len(string) + 1):
            periods.append(string)
            string = 0.498 * (string + np.roll(string, -1))
        notes.append(np.concatenate(periods)[:8_000])
    return np.concatenate(notes)


T_S = np.arange(SECONDS * 16_000) / 16_000


@pytest.mark.parametrize(
    "sound",
    [0 * T_S, coloured(0), coloured(1), coloured(2), 0.1 * np.sin(2 * np.pi * 220 * T_S), plucked()],
    ids=["silence", "white", "pink", "brown", "tone", "plucked strings"],
)
def test_what_is_no_speech_is_not_taken_for_it(sound):
    assert flags(sound).sum() * FRAME_SAMPLES / 16_000 < 0.5


def test_speech_is_found_where_it_is_whatever_the_chunks(reference_data):
    path = next((reference_data / "open_speech" / "bonafide" / "librispeech_test_other").glob("*.flac"))
    speech, _ = soundfile.read(path, dtype="float32", frames=5 * 16_000)
    noise = 0.02 * coloured(1)[: 3 * 16_000]
    sound = np.concatenate([noise, speech, noise])
    found = flags(sound)
    inside = slice(3 * 16_000 // FRAME_SAMPLES, 8 * 16_000 // FRAME_SAMPLES)
    assert found[inside].mean() > 0.6 and found[: inside.start - 1].mean() < 0.05
    assert len(found) == -(-len(sound) // FRAME_SAMPLES)
    in_chunks = flags(sound, 100, 700, 40_000, 40_001, 90_000)
    assert (in_chunks == found).mean() > 0.995  # a frame at the threshold may fall either way


def test_what_is_silent_costs_the_network_nothing(monkeypatch):
    asked = []

    def network(frames, memory):
        asked.append(len(frames))
        return np.ones(len(frames)), memory

    monkeypatch.setattr(speech_module, "_load_silero", lambda: network)
    silence, loud = np.zeros(10 * FRAME_SAMPLES), np.full(5 * FRAME_SAMPLES, 0.1)
    assert flags(np.concatenate([silence, loud, silence])).tolist() == [False] * 10 + [True] * 5 + [False] * 10
    assert flags(silence, 700, 900).tolist() == [False] * 10
    assert sum(asked) == 5


def test_matrix_products_give_the_probabilities_of_the_packages_own_graph():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    network = silero.silero_file()
    own, quick = silero.as_given(network), silero.by_products(network)
    rng = np.random.default_rng(3)
    memories = [np.zeros((2, 1, 1, 128), np.float32)] * 2
    for n_frames, level in ((1, 0.1), (63, 0.5), (300, 0.01), (2, 1e-4)):
        frames = (level * rng.standard_normal((n_frames, 576)) * np.hanning(576)).astype(np.float32)
        (expected, memories[0]), (found, memories[1]) = own(frames, memories[0]), quick(frames, memories[1])
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(memories[1], memories[0], rtol=1e-4, atol=1e-5)


def test_real_speech_has_the_probabilities_of_the_packages_own_graph(reference_data):
    network = silero.silero_file()
    path = next((reference_data / "open_speech" / "bonafide" / "librispeech_test_other").glob("*.flac"))
    speech, _ = soundfile.read(path, dtype="float32", frames=10 * 16_000)
    frames = np.lib.stride_tricks.sliding_window_view(speech, 576)[::512].copy()
    networks = silero.as_given(network), silero.open_silero(network)
    expected, found = (one(frames, np.zeros((2, 1, 1, 128), np.float32))[0] for one in networks)
    assert expected.max() > 0.9 and expected.min() < 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_graph_of_another_version_is_run_as_it_is(monkeypatch):
    def unknown(network):
        raise KeyError("stft.forward_basis_buffer")

    monkeypatch.setattr(silero, "by_products", unknown)
    assert silero.in_noise(silero.open_silero(silero.silero_file())).shape == (8,)


def test_numbers_that_differ_are_not_taken(monkeypatch):
    network = silero.silero_file()
    own = silero.as_given(network)
    monkeypatch.setattr(silero, "by_products", lambda network: lambda frames, memory: (np.zeros(len(frames)), memory))
    np.testing.assert_array_equal(silero.in_noise(silero.open_silero(network)), silero.in_noise(own))
