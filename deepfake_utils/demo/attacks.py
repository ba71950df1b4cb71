"""The demo corpus's spoofs: eight ways to take a voice apart and put it together again, imperfectly.

Every attack has the form `attack(source, another, rng) -> (len(source),)`: `source` is fresh dry speech at
16 kHz, `another()` gives more speech of the same person. What an attack does to loudness and to the broad
spectral balance is undone by `equalise`, so that a detector must hear the attack itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import fft, linalg, signal

from deepfake_utils.conventions import SAMPLE_RATE_HZ
from deepfake_utils.demo.voice import overlap_add

F0_HOP = 80  # 5 ms


def stft(x: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    """Hann-windowed spectra (frames, n_fft // 2 + 1), the first frame centred on sample 0."""
    padded = np.pad(x, (n_fft // 2, n_fft // 2 + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    return fft.rfft(frames * signal.get_window("hann", n_fft), axis=1)


def istft(spectra: np.ndarray, n_fft: int, hop: int, n_samples: int) -> np.ndarray:
    """Least-squares inverse of `stft` (Griffin & Lim 1984, equation 6), cut to `n_samples`."""
    window = signal.get_window("hann", n_fft)
    summed = overlap_add(fft.irfft(spectra, n_fft, axis=1) * window, hop)
    weight = overlap_add(np.tile(window**2, (len(spectra), 1)), hop)
    return (summed / np.maximum(weight, 1e-3))[n_fft // 2 : n_fft // 2 + n_samples]


def mel_bands(n_bands: int, n_fft: int) -> np.ndarray:
    """Triangles evenly spaced in mel, 2595 log10(1 + f / 700), each summing to 1, (n_bands, n_fft // 2 + 1)."""
    top = 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700)
    edges_hz = 700 * (10 ** (np.linspace(0, top, n_bands + 2) / 2595) - 1)
    bins_hz = fft.rfftfreq(n_fft, 1 / SAMPLE_RATE_HZ)
    rising = (bins_hz - edges_hz[:-2, None]) / np.diff(edges_hz)[:-1, None]
    falling = (edges_hz[2:, None] - bins_hz) / np.diff(edges_hz)[1:, None]
    bands = np.maximum(0.0, np.minimum(rising, falling)) + 1e-9
    return bands / bands.sum(axis=1, keepdims=True)


def griffin_lim(
    magnitude: np.ndarray, n_fft: int, hop: int, n_samples: int, n_iterations: int, rng: np.random.Generator
) -> np.ndarray:
    """A signal whose STFT magnitude approaches `magnitude`, from random phases (Griffin & Lim 1984)."""
    phase = np.exp(2j * np.pi * rng.random(magnitude.shape))
    for _ in range(n_iterations):
        spectra = stft(istft(magnitude * phase, n_fft, hop, n_samples), n_fft, hop)[: len(magnitude)]
        phase = spectra / np.maximum(np.abs(spectra), 1e-9)
    return istft(magnitude * phase, n_fft, hop, n_samples)


def estimate_f0(x: np.ndarray) -> np.ndarray:
    """Pitch in Hz every 5 ms by normalised autocorrelation over 40 ms; 0 where unvoiced."""
    length, shortest, longest = 640, SAMPLE_RATE_HZ // 400, SAMPLE_RATE_HZ // 65
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, (length // 2, length)), length)[::F0_HOP]
    window = signal.get_window("hann", length)
    power = np.abs(fft.rfft(frames * window, 2048, axis=1)) ** 2
    correlation = fft.irfft(power, axis=1)[:, :longest]
    energy = correlation[:, 0]
    window_power = fft.irfft(np.abs(fft.rfft(window, 2048)) ** 2)[:longest]
    correlation = correlation / (window_power / window_power[0]) / np.maximum(energy, 1e-12)[:, None]
    favour_short = 1.0 - 0.15 * np.arange(longest) / longest  # against octave errors
    lag = np.argmax((correlation * favour_short)[:, shortest:], axis=1) + shortest
    strength = correlation[np.arange(len(lag)), lag]
    voiced = (strength > 0.5) & (energy > 1e-3 * energy.max())
    return signal.medfilt(np.where(voiced, SAMPLE_RATE_HZ / lag, 0.0), 5)


def equalise(fake: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Give `fake` the length-averaged spectral balance (nine broad bands) and the RMS of `source`."""
    edges_hz = np.array([0, 250, 600, 1200, 2000, 3000, 4000, 5200, 6400, 8001])
    n_fft = fft.next_fast_len(len(fake), real=True)
    bins_hz = fft.rfftfreq(n_fft, 1 / SAMPLE_RATE_HZ)
    band = np.searchsorted(edges_hz, bins_hz, side="right") - 1
    wanted = np.bincount(band, np.abs(fft.rfft(source, n_fft)) ** 2) + 1e-9
    centres_hz = (edges_hz[1:] + edges_hz[:-1]) / 2
    spectrum = fft.rfft(fake, n_fft)
    for _ in range(4):  # the gains are interpolated between the bands, so the balance is approached in steps
        gain_db = 10 * np.log10(wanted / (np.bincount(band, np.abs(spectrum) ** 2) + 1e-9))
        spectrum = spectrum * 10 ** (np.interp(bins_hz, centres_hz, np.clip(gain_db, -30, 30)) / 20)
    fake = fft.irfft(spectrum, n_fft)[: len(fake)]
    return fake * np.sqrt(np.mean(source**2) / (np.mean(fake**2) + 1e-20))


def _mel_inversion(
    x: np.ndarray, rng: np.random.Generator, n_bands: int, n_fft: int, hop: int, n_iterations: int
) -> np.ndarray:
    magnitude = np.abs(stft(x, n_fft, hop))
    bands = mel_bands(n_bands, n_fft)
    # einsum keeps to plain loops: a threaded matrix product may round differently on another number of cores.
    mel = np.einsum("tf,bf->tb", magnitude, bands)
    spread = bands / bands.sum(axis=0)  # transposed bands as an inverse: smooth and non-negative
    return griffin_lim(np.einsum("tb,bf->tf", mel, spread), n_fft, hop, len(x), n_iterations, rng)


def mel_griffin_lim(x, another, rng):
    """D01: 36 mel bands, 8 rounds of Griffin-Lim."""
    return _mel_inversion(x, rng, n_bands=36, n_fft=512, hop=128, n_iterations=8)


def lpc_vocoder(x, another, rng):
    """D02: order-16 linear prediction every 10 ms, excited by one pulse a period or by noise."""
    hop, length, order = 160, 400, 16
    f0_hz = estimate_f0(x)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, (length // 2, length)), length)[::hop]
    n_frames = len(x) // hop + 1
    excitation = _pulses_or_noise(f0_hz, n_frames * hop, rng)
    window = signal.get_window("hann", length)
    y, memory = np.empty(n_frames * hop), np.zeros(order)
    for i in range(n_frames):
        r = fft.irfft(np.abs(fft.rfft(frames[i] * window, 1024)) ** 2)[: order + 1]
        r[0] = r[0] * 1.0001 + 1e-9
        a = linalg.solve_toeplitz(r[:-1], r[1:])
        gain = np.sqrt(max(r[0] - np.sum(a * r[1:]), 1e-12) / length)
        span = slice(i * hop, (i + 1) * hop)
        y[span], memory = signal.lfilter([gain], np.concatenate([[1.0], -a]), excitation[span], zi=memory)
    return y[: len(x)]


def _pulses_or_noise(f0_hz: np.ndarray, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Unit-power excitation: a dispersed impulse a period where voiced, white noise elsewhere."""
    f0 = np.repeat(f0_hz, F0_HOP)
    f0 = np.pad(f0, (0, max(0, n_samples - len(f0))))[:n_samples]
    phase = np.cumsum(f0 / SAMPLE_RATE_HZ)
    pulse = np.diff(np.floor(phase), prepend=0.0) > 0
    dispersed = fft.irfft(np.exp(-0.06j * np.arange(33) ** 2), 64)  # a chirp of 2.5 ms: still white, less peaky
    pulse = signal.lfilter(dispersed, 1.0, pulse * np.sqrt(SAMPLE_RATE_HZ / np.maximum(f0, 1.0)))
    return np.where(f0 > 0, pulse, rng.standard_normal(n_samples))


def phase_scramble(x, another, rng):
    """D03: true magnitudes, phases blurred by a normal error of 1.8 rad."""
    spectra = stft(x, 512, 128)
    blur = np.exp(1.8j * rng.standard_normal(spectra.shape))
    return istft(spectra * blur, 512, 128, len(x))


def concatenate_units(x, another, rng):
    """D04: every 60 to 140 ms replaced by the most similar stretch of the person's other sentences."""
    store = np.concatenate([another(), another()])
    hop, join = 160, 24
    bands = mel_bands(24, 512)
    described = [np.log(np.einsum("tf,bf->tb", np.abs(stft(s, 512, hop)) ** 2, bands) + 1e-7) for s in (x, store)]
    y = np.zeros(len(x) + join)
    start = 0
    while start < len(x):
        n_frames = int(rng.integers(6, 15))
        n = min(n_frames * hop, len(x) - start)
        wanted = described[0][start // hop : start // hop + n_frames]
        places = np.arange(0, len(described[1]) - n_frames - 2)
        distance = np.zeros(len(places))
        for i, frame in enumerate(wanted):
            distance += np.sum((described[1][places + i] - frame) ** 2, axis=1)
        best = int(places[np.argmin(distance)]) * hop
        unit = store[best : best + n + join].copy()
        ramp = np.linspace(0, 1, join)
        unit[:join] *= ramp
        unit[-join:] *= ramp[::-1]
        y[start : start + len(unit)] += unit
        start += n
    return y[: len(x)]


def coarse_mel(x, another, rng):
    """D05: as D01 with 28 bands, longer frames and 4 rounds: hollow, smeared."""
    return _mel_inversion(x, rng, n_bands=28, n_fft=800, hop=200, n_iterations=4)


def harmonic_model(x, another, rng):
    """D06: harmonics with invented phases below 4 kHz, noise above and where unvoiced."""
    f0_hz = estimate_f0(x)
    spectra = np.abs(stft(x, 512, F0_HOP))
    n_frames = min(len(f0_hz), len(spectra))
    centres = np.arange(n_frames) * F0_HOP
    envelope = signal.oaconvolve(spectra[:n_frames] ** 2, np.ones((1, 9)) / 9, mode="same", axes=1)
    envelope = np.sqrt(np.maximum(envelope, 1e-12))
    voiced = (f0_hz[:n_frames] > 0).astype(float)
    track = np.full(n_frames, 120.0)
    if voiced.any():
        track = np.interp(centres, centres[voiced > 0], f0_hz[:n_frames][voiced > 0])
    time = np.arange(len(x))
    phase = 2 * np.pi * np.cumsum(np.interp(time, centres, track)) / SAMPLE_RATE_HZ
    y = np.zeros(len(x))
    for k in range(1, int(4000 / max(track.min(), 60.0)) + 1):
        place = np.clip(np.round(k * track * 512 / SAMPLE_RATE_HZ).astype(int), 0, 256)
        amplitude = envelope[np.arange(n_frames), place] * voiced * (k * track < 4000)
        y += np.interp(time, centres, amplitude) * np.cos(k * phase + rng.uniform(0, 2 * np.pi))
    noise = np.abs(envelope) * np.exp(2j * np.pi * rng.random(envelope.shape))
    high = fft.rfftfreq(512, 1 / SAMPLE_RATE_HZ) >= 4000
    noise *= np.where(high, 1.0, 1.0 - voiced[:, None])
    return y / 64 + istft(noise, 512, F0_HOP, len(x)) * 2


def subband_codec(x, another, rng):
    """D07: MDCT of 40 ms blocks quantised as coarsely as the loudness of each of 20 bands allows, then 6-bit mu-law."""
    half = 320
    window = np.sin(np.pi * (np.arange(2 * half) + 0.5) / (2 * half))
    padded = np.pad(x, (half, 2 * half))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)[::half] * window
    coefficients = _mdct(frames)
    width = 16
    grouped = coefficients.reshape(len(coefficients), -1, width)
    loudness = np.sqrt(np.mean(grouped**2, axis=2, keepdims=True))
    overall = np.sqrt(np.mean(grouped**2, axis=(1, 2), keepdims=True))
    step = 1.2 * loudness**0.6 * overall**0.4 + 1e-6
    grouped = np.round(grouped / step) * step
    frames = _inverse_mdct(grouped.reshape(coefficients.shape)) * window
    y = overlap_add(frames, half)[half : half + len(x)]
    y = y / (np.max(np.abs(y)) + 1e-9)
    squeezed = np.sign(y) * np.log1p(255 * np.abs(y)) / np.log(256)
    squeezed = np.round(squeezed * 31) / 31
    return np.sign(squeezed) * np.expm1(np.abs(squeezed) * np.log(256)) / 255


def _mdct(frames: np.ndarray) -> np.ndarray:
    """Modified discrete cosine transform of windowed frames (count, 2N) -> (count, N): fold, then DCT-IV."""
    n = frames.shape[1] // 2
    a, b, c, d = (frames[:, i * n // 2 : (i + 1) * n // 2] for i in range(4))
    return fft.dct(np.concatenate([-c[:, ::-1] - d, a - b[:, ::-1]], axis=1), type=4, norm="ortho", axis=1)


def _inverse_mdct(coefficients: np.ndarray) -> np.ndarray:
    n = coefficients.shape[1]
    folded = fft.dct(coefficients, type=4, norm="ortho", axis=1)
    first, second = folded[:, : n // 2], folded[:, n // 2 :]
    return np.concatenate([second, -second[:, ::-1], -first[:, ::-1], -first], axis=1)


def flat_psola(x, another, rng):
    """D08: pitch-synchronous overlap-add onto a nearly flat pitch (Moulines & Charpentier 1990)."""
    f0_hz = np.repeat(estimate_f0(x), F0_HOP)[: len(x)]
    f0_hz = np.pad(f0_hz, (0, len(x) - len(f0_hz)))
    voiced = f0_hz > 0
    median = np.median(f0_hz[voiced]) if voiced.any() else 120.0
    period = np.where(voiced, SAMPLE_RATE_HZ / np.where(voiced, f0_hz, 1.0), F0_HOP)
    flat = SAMPLE_RATE_HZ / (median * (np.where(voiced, f0_hz, median) / median) ** 0.15)
    target = np.where(voiced, flat, F0_HOP)
    marks = _marks(period)
    marks = np.array([_peak_near(x, mark, period[mark], voiced[mark]) for mark in marks])
    y, weight = np.zeros(len(x)), np.zeros(len(x))
    for mark in _marks(target):
        centre = marks[np.argmin(np.abs(marks - mark))]
        half = int(period[min(centre, len(x) - 1)])
        low = max(-half, -mark, -centre)
        high = min(half, len(x) - mark, len(x) - centre)
        window = 0.5 + 0.5 * np.cos(np.pi * np.arange(low, high) / half)
        y[mark + low : mark + high] += window * x[centre + low : centre + high]
        weight[mark + low : mark + high] += window
    return y / np.maximum(weight, 0.4)


def _marks(period_samples: np.ndarray) -> np.ndarray:
    """Sample positions one period apart."""
    phase = np.cumsum(1.0 / period_samples)
    return np.flatnonzero(np.diff(np.floor(phase), prepend=0.0) > 0)


def _peak_near(x: np.ndarray, mark: int, period: float, voiced: bool) -> int:
    """Move a mark to the strongest negative peak within half a period (the glottal closing)."""
    if not voiced:
        return int(mark)
    low = max(int(mark - period / 2), 0)
    return low + int(np.argmin(x[low : int(mark + period / 2) + 1]))


Attack = Callable[[np.ndarray, Callable[[], np.ndarray], np.random.Generator], np.ndarray]

SEEN_ATTACKS: dict[str, Attack] = {
    "D01": mel_griffin_lim,
    "D02": lpc_vocoder,
    "D03": phase_scramble,
    "D04": concatenate_units,
}
UNSEEN_ATTACKS: dict[str, Attack] = {
    "D05": coarse_mel,
    "D06": harmonic_model,
    "D07": subband_codec,
    "D08": flat_psola,
}


def spoof(name: str, source: np.ndarray, another: Callable[[], np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Run attack `name` on dry speech (n,) and undo what it did to length, loudness and balance."""
    attack = (SEEN_ATTACKS | UNSEEN_ATTACKS)[name]
    return equalise(attack(source, another, rng), source)
