"""The demo corpus's voices: harmonics of a moving pitch through moving resonances, four fakes of them, a microphone.

The syllables are random: it sounds like somebody babbling, and is not speech. Signals are (n_samples,) float at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import signal
from scipy.ndimage import gaussian_filter1d

from deepfake_utils.conventions import SAMPLE_RATE_HZ

FRAME, HOP = 512, 256  # samples, of the short-time spectra in which voices are shaped and faked
WINDOW = signal.get_window("hann", FRAME)

# First three resonances of a grown man's vowels in Hz (Peterson & Barney 1952, table II), and those above them.
VOWELS_HZ = ((270, 2290, 3010), (530, 1840, 2480), (730, 1090, 2440), (570, 840, 2410), (300, 870, 2240))
UPPER_HZ = (3500, 4450, 5400, 6350)
BANDWIDTHS_HZ = (70, 90, 130, 190, 260, 340, 420)


class Speaker(NamedTuple):
    """What stays the same in everything one person says."""

    f0_hz: float  # median pitch
    tract: float  # resonance frequencies relative to a grown man's
    breath: float  # noise relative to the pulses
    tilt_hz: float  # the voice falls by 6 dB an octave from here on


def draw_speaker(rng: np.random.Generator) -> Speaker:
    """Draw a person: pitch and vocal tract go together as they do in women and men."""
    high = rng.random() < 0.5
    f0_hz = rng.uniform(165, 235) if high else rng.uniform(85, 145)
    tract = rng.uniform(1.08, 1.2) if high else rng.uniform(0.93, 1.07)
    return Speaker(f0_hz, tract, rng.uniform(0.02, 0.08), rng.uniform(300, 900))


def speak(speaker: Speaker, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Babble for `n_samples`: a vowel or a hiss every 0.1 to 0.25 s, gliding into each other, now and then a pause."""
    n_frames = n_samples // HOP + 2
    sound = np.repeat(np.arange(n_frames), rng.integers(6, 16, n_frames))[:n_frames]  # which one each frame is in
    vowel = np.array(VOWELS_HZ)[rng.integers(len(VOWELS_HZ), size=n_frames)] * rng.uniform(0.94, 1.06, (n_frames, 3))
    kind = rng.choice(["vowel", "hiss", "pause"], n_frames, p=(0.65, 0.25, 0.1))
    voiced = gaussian_filter1d((kind == "vowel")[sound] * rng.uniform(0.5, 1, n_frames)[sound], 1.5)
    hissing = gaussian_filter1d((kind == "hiss")[sound] * rng.uniform(0.02, 0.1, n_frames)[sound], 1)
    resonances_hz = gaussian_filter1d(vowel[sound], 2, axis=0) * speaker.tract

    waver = gaussian_filter1d(rng.standard_normal(n_frames), 6) * 6 - np.linspace(-2, 3, n_frames)  # semitones
    time, frame_time = np.arange(n_samples), np.arange(n_frames) * HOP
    f0_hz = np.interp(time, frame_time, speaker.f0_hz * 2 ** (waver / 12)) * (1 + 0.01 * rng.standard_normal(n_samples))
    source = np.interp(time, frame_time, voiced) * _harmonics(f0_hz)
    source = signal.lfilter([1], [1, -np.exp(-2 * np.pi * speaker.tilt_hz / SAMPLE_RATE_HZ)], source)
    source += np.interp(time, frame_time, speaker.breath * voiced + 4 * hissing) * rng.standard_normal(n_samples)

    spectra = _stft(source)
    dry = _istft(spectra * _tract(resonances_hz, speaker.tract)[:, : spectra.shape[1]], n_samples)
    return 0.1 * dry / dry.std()


def _harmonics(f0_hz: np.ndarray) -> np.ndarray:
    """Equal cosines at all multiples of the pitch below 7 kHz, by the closed form of their sum (Dirichlet's kernel)."""
    half = np.pi * np.cumsum(f0_hz) / SAMPLE_RATE_HZ + 1e-6
    n = int(7000 / f0_hz.max())
    return (np.sin((2 * n + 1) * half) / np.sin(half) - 1) / np.sqrt(2 * n)


def _tract(resonances_hz: np.ndarray, tract: float) -> np.ndarray:
    """Responses (frequencies, frames) of cascaded resonators: three that move, and those above."""
    z = np.exp(-2j * np.pi * np.arange(FRAME // 2 + 1) / FRAME)[:, None]
    upper = np.tile(np.array(UPPER_HZ) * tract, (len(resonances_hz), 1))
    response = np.ones((len(z), len(resonances_hz)), complex)
    for centre_hz, width_hz in zip(np.hstack([resonances_hz, upper]).T, BANDWIDTHS_HZ, strict=True):
        radius, angle = np.exp(-np.pi * width_hz / SAMPLE_RATE_HZ), 2 * np.pi * centre_hz / SAMPLE_RATE_HZ
        at_zero = 1 - 2 * radius * np.cos(angle) + radius**2
        response *= at_zero / (1 - 2 * radius * np.cos(angle) * z + (radius * z) ** 2)
    return response


def _stft(x: np.ndarray) -> np.ndarray:
    """(n_samples,) -> (frequencies, frames): as `scipy.signal.stft`, in half the time for want of its generality."""
    padded = np.pad(x, (HOP, HOP + -len(x) % HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]
    return np.fft.rfft(frames * (WINDOW / WINDOW.sum())).T


def _istft(spectra: np.ndarray, n_samples: int) -> np.ndarray:
    frames = np.fft.irfft(spectra.T) * WINDOW * WINDOW.sum()
    power = WINDOW[:HOP] ** 2 + WINDOW[HOP:] ** 2
    x = ((frames[:-1, HOP:] + frames[1:, :HOP]) / power).ravel()
    return np.pad(x, (0, max(0, n_samples - len(x))))[:n_samples]


def _blurred_phase(spectra: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return spectra * np.exp(1.8j * rng.standard_normal(spectra.shape))


def _slow_frames(spectra: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    held = np.abs(spectra)[:, np.arange(spectra.shape[1]) // 4 * 4]
    return held * np.exp(1j * np.angle(spectra))


def _coarse_bands(spectra: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    power = gaussian_filter1d(np.abs(spectra) ** 2, 6, axis=0)
    return np.sqrt(power) * np.exp(2j * np.pi * rng.random(spectra.shape))


def _rounded_spectra(spectra: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    magnitude = 10 ** (np.round(np.log10(np.abs(spectra) + 1e-9) * 2) / 2)  # steps of 10 dB
    return magnitude * np.exp(0.5j * np.pi * np.round(np.angle(spectra) / (0.5 * np.pi)))


Attack = Callable[[np.ndarray, np.random.Generator], np.ndarray]
SEEN_ATTACKS: dict[str, Attack] = {"D01": _blurred_phase, "D02": _slow_frames}
UNSEEN_ATTACKS: dict[str, Attack] = {"D03": _coarse_bands, "D04": _rounded_spectra}


def spoof(name: str, dry: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Take a voice apart and put it together again, imperfectly, with the length and loudness it had.

    The balance of twelve broad bands is restored too: a detector must hear the attack itself.
    """
    spectra = _stft(dry)
    fake = (SEEN_ATTACKS | UNSEEN_ATTACKS)[name](spectra, rng)
    for _ in range(3):  # synthesis changes the spectra again, so the balance is approached in steps
        had, has = ((np.abs(s) ** 2).mean(axis=1) for s in (spectra, fake))
        gain = np.sqrt(gaussian_filter1d(had, 8) / (gaussian_filter1d(has, 8) + 1e-20))
        fake = _stft(_istft(fake * gain[:, None], len(dry)))
    fake = _istft(fake, len(dry))
    return fake * dry.std() / fake.std()


def record(dry: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Silence before and after, noise over the whole, a microphone, a level: drawn without knowing the label.

    Returns:
        (n_samples,) int16, up to 0.8 s longer than `dry`.
    """
    fade = np.minimum(1, np.minimum(np.arange(len(dry)), np.arange(len(dry))[::-1]) / 320)
    heard = np.pad(dry * fade, tuple(rng.integers(800, 6400, 2)))
    heard = heard / heard.std() + 10 ** (rng.uniform(-42, -28) / 20) * rng.standard_normal(len(heard))
    edges_hz = rng.uniform(50, 120), rng.uniform(6300, 7500)
    heard = signal.sosfilt(signal.butter(4, edges_hz, "bandpass", fs=SAMPLE_RATE_HZ, output="sos"), heard)
    heard = np.tanh(heard / (heard.std() * rng.uniform(3, 4)))  # a soft limit on the peaks, which would tell
    heard *= 10 ** (rng.uniform(-30, -20) / 20) * 32768 / heard.std()
    dither = rng.random(len(heard)) - rng.random(len(heard))
    return np.clip(np.round(heard + dither), -32768, 32767).astype(np.int16)
