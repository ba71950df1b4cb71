"""The demo corpus's speakers: a source-filter voice, and the room and microphone of every recording.

Source: the KLGLOTT88 pulse (Klatt & Klatt 1990: a Rosenberg polynomial and a spectral tilt) with jitter and
shimmer. Filter: up to eight cascaded resonators whose first three follow vowels (Peterson & Barney 1952) and
consonants, smoothed in time so that neighbouring sounds colour each other. Noise makes frication and breath.

The syllables are random: it sounds like somebody babbling, and is not speech.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import fft, signal

from deepfake_utils.conventions import SAMPLE_RATE_HZ

FRAME_SAMPLES = 64  # the tract moves every 4 ms
RING_SAMPLES = 768  # 48 ms, in which the narrowest resonance decays by 90 dB
OVERSAMPLING = 4  # the glottal pulse's sharp closing would alias at 16 kHz

# First three resonances of a grown man's vowels in Hz (Peterson & Barney 1952, table II).
VOWELS_HZ = {
    "i": (270, 2290, 3010),
    "ih": (390, 1990, 2550),
    "eh": (530, 1840, 2480),
    "ae": (660, 1720, 2410),
    "ah": (730, 1090, 2440),
    "aw": (570, 840, 2410),
    "uh": (440, 1020, 2240),
    "u": (300, 870, 2240),
    "er": (490, 1350, 1690),
}
# Resonances in Hz, voicing 0..1, seconds: the sounds that only move and dim the voice.
SONORANTS = {
    "m": ((260, 1000, 2200), 0.35, 0.070),
    "n": ((260, 1650, 2600), 0.35, 0.065),
    "l": ((360, 1150, 2700), 0.60, 0.060),
    "r": ((330, 1150, 1650), 0.60, 0.065),
    "w": ((300, 700, 2200), 0.60, 0.065),
    "y": ((280, 2250, 3000), 0.60, 0.060),
}
# Resonances in Hz, voicing, seconds, then the noise: strength, centre Hz, width Hz.
FRICATIVES = {
    "s": ((320, 1700, 2600), 0.0, 0.110, 0.50, 5600, 1800),
    "sh": ((320, 1900, 2500), 0.0, 0.110, 0.55, 3300, 1300),
    "f": ((320, 1100, 2300), 0.0, 0.095, 0.20, 4200, 5000),
    "z": ((300, 1700, 2600), 0.30, 0.085, 0.30, 5400, 2000),
    "v": ((300, 1100, 2300), 0.40, 0.065, 0.12, 4000, 5000),
}
# Resonances in Hz, voicing and seconds of the closure, seconds of breath, the burst's strength, centre, width.
STOPS = {
    "p": ((300, 800, 2200), 0.0, 0.070, 0.030, 0.40, 900, 1500),
    "t": ((300, 1750, 2700), 0.0, 0.065, 0.030, 0.70, 4400, 2200),
    "k": ((300, 1900, 2300), 0.0, 0.065, 0.040, 0.60, 2100, 1100),
    "b": ((280, 850, 2200), 0.15, 0.055, 0.0, 0.30, 800, 1200),
    "d": ((280, 1750, 2700), 0.15, 0.050, 0.0, 0.45, 4000, 2200),
    "g": ((280, 1900, 2300), 0.15, 0.050, 0.0, 0.40, 2000, 1000),
}
NEUTRAL_HZ = (500, 1500, 2500)
UPPER_HZ = (3500, 4450, 5400, 6350, 7300)
BANDWIDTHS_HZ = (70, 90, 130, 190, 260, 340, 420, 500)


@dataclass(frozen=True)
class Speaker:
    """What stays the same in everything one person says."""

    name: str
    f0_hz: float  # median pitch
    f0_range_st: float  # size of a pitch accent, semitones
    tract: float  # resonance frequencies relative to a grown man's
    open_quotient: float  # part of each cycle in which the glottis is open
    tilt_hz: float  # cut-off of the soft closing: low is a mild voice
    jitter: float  # cycle-to-cycle change of the period, a fraction
    shimmer: float  # cycle-to-cycle change of the amplitude, a fraction
    breath: float  # aspiration noise relative to the pulses
    pace: float  # durations relative to the average


@dataclass(frozen=True)
class Segment:
    """One stretch of sound with its targets; the tracks glide between them."""

    duration_s: float
    resonances_hz: tuple[float, float, float] = NEUTRAL_HZ
    voice: float = 0.0
    breath: float = 0.0
    noise: float = 0.0
    noise_hz: float = 4000.0
    noise_width_hz: float = 2000.0
    accent_st: float = 0.0


def draw_speaker(name: str, rng: np.random.Generator) -> Speaker:
    """Draw a person: vocal tract and pitch go together as they do in women and men."""
    high = rng.random() < 0.5
    return Speaker(
        name=name,
        f0_hz=float(rng.uniform(165, 235) if high else rng.uniform(85, 145)),
        f0_range_st=float(rng.uniform(2.0, 5.0)),
        tract=float(rng.uniform(1.08, 1.2) if high else rng.uniform(0.93, 1.07)),
        open_quotient=float(rng.uniform(0.5, 0.75)),
        tilt_hz=float(rng.uniform(600, 2200)),
        jitter=float(rng.uniform(0.004, 0.012)),
        shimmer=float(rng.uniform(0.03, 0.09)),
        breath=float(rng.uniform(0.01, 0.05)),
        pace=float(rng.uniform(0.85, 1.2)),
    )


def speak(speaker: Speaker, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Babble for exactly `n_samples`, dry (no room, no microphone), about 0.1 RMS.

    Args:
        speaker: whose voice.
        n_samples: length at 16 kHz, at least a quarter of a second.
        rng: decides every syllable.

    Returns:
        (n_samples,) float64.
    """
    segments = _draw_segments(speaker, n_samples / SAMPLE_RATE_HZ, rng)
    n_frames = -(-n_samples // FRAME_SAMPLES)
    lengths = np.array([segment.duration_s for segment in segments])
    # The last drawn segment ends past n_samples; squeezing a little makes the sentence end with the file.
    bounds = np.round(np.concatenate([[0.0], np.cumsum(lengths) / lengths.sum()]) * n_frames).astype(int)
    spans = np.diff(bounds)

    resonances_hz = np.repeat([segment.resonances_hz for segment in segments], spans, axis=0) * speaker.tract
    resonances_hz = np.stack([_smooth(track, 17) for track in resonances_hz.T], axis=1)
    voice = _smooth(np.repeat([segment.voice for segment in segments], spans), 7)
    breath = _smooth(np.repeat([segment.breath for segment in segments], spans), 5)
    f0_hz = _pitch(speaker, segments, spans, rng)

    source = _glottis(speaker, f0_hz, voice, breath, rng)
    dry = _tract(source, resonances_hz, speaker.tract)
    # People keep their loudness steadier than bare resonators do: halve the swings (in dB) of the envelope.
    envelope = np.sqrt(signal.filtfilt([0.002], [1, -0.998], dry**2).clip(1e-12))
    dry = dry / np.sqrt(envelope + 0.1 * envelope.max())
    dry = dry / np.sqrt(np.mean(dry**2))
    for segment, start, stop in zip(segments, bounds[:-1], bounds[1:], strict=True):
        if segment.noise > 0 and stop > start:
            _add_noise(dry, segment, start * FRAME_SAMPLES, stop * FRAME_SAMPLES, speaker.tract, rng)
    dry = dry[:n_samples]
    return 0.1 * dry / np.sqrt(np.mean(dry**2))


def _draw_segments(speaker: Speaker, duration_s: float, rng: np.random.Generator) -> list[Segment]:
    """Syllables of one or two consonants and a vowel, now and then a pause, until the time is filled."""
    segments: list[Segment] = []
    total_s, since_pause = 0.0, 0
    while total_s < duration_s:
        stressed = rng.random() < 0.4
        syllable = _consonant(speaker, rng)
        vowel = VOWELS_HZ[str(rng.choice(list(VOWELS_HZ)))]
        length_s = speaker.pace * (rng.uniform(0.11, 0.19) if stressed else rng.uniform(0.06, 0.11))
        accent_st = speaker.f0_range_st * rng.uniform(0.5, 1.2) if stressed else 0.0
        shifted = tuple(float(f * rng.uniform(0.94, 1.06)) for f in vowel)
        loud = rng.uniform(0.85, 1.0) if stressed else rng.uniform(0.6, 0.85)
        syllable.append(Segment(length_s, shifted, voice=loud, accent_st=accent_st))
        if rng.random() < 0.3:
            syllable += _consonant(speaker, rng)
        since_pause += 1
        if since_pause > 4 and rng.random() < 0.25:
            syllable.append(Segment(float(rng.uniform(0.1, 0.25))))
            since_pause = 0
        segments += syllable
        total_s += sum(segment.duration_s for segment in syllable)
    return segments


def _consonant(speaker: Speaker, rng: np.random.Generator) -> list[Segment]:
    kind = rng.random()
    stretch = speaker.pace * rng.uniform(0.85, 1.2)
    if kind < 0.35:
        resonances, voice, length_s = SONORANTS[str(rng.choice(list(SONORANTS)))]
        return [Segment(length_s * stretch, resonances, voice=voice)]
    if kind < 0.65:
        resonances, voice, length_s, *noise = FRICATIVES[str(rng.choice(list(FRICATIVES)))]
        return [Segment(length_s * stretch, resonances, voice, 0.0, *noise)]
    resonances, voice, closure_s, breath_s, *burst = STOPS[str(rng.choice(list(STOPS)))]
    stop = [Segment(closure_s * stretch, resonances, voice), Segment(0.012, resonances, voice, 0.0, *burst)]
    if breath_s:
        stop.append(Segment(breath_s * stretch, resonances, breath=0.7))
    return stop


def _smooth(track: np.ndarray, n_frames: int) -> np.ndarray:
    """Glide between targets: a Hann-weighted mean over `n_frames`, the ends held."""
    window = np.hanning(n_frames + 2)[1:-1]
    padded = np.pad(track.astype(float), n_frames // 2, mode="edge")
    return signal.lfilter(window / window.sum(), 1.0, padded)[n_frames - 1 :]


def _pitch(speaker: Speaker, segments: list[Segment], spans: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pitch in Hz a frame: declination, accents on stressed syllables, a slow waver, a final fall."""
    n_frames = int(spans.sum())
    place = np.linspace(0.0, 1.0, n_frames)
    accents = _smooth(np.repeat([segment.accent_st for segment in segments], spans), 41)
    waver = _smooth(rng.standard_normal(n_frames), 31) * 1.2
    semitones = 2.0 - 4.5 * place + accents + waver - 3.0 * np.clip((place - 0.9) / 0.1, 0.0, 1.0)
    return speaker.f0_hz * 2.0 ** (semitones / 12.0)


def _glottis(
    speaker: Speaker, f0_hz: np.ndarray, voice: np.ndarray, breath: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Derivative of the glottal flow (lip radiation included) plus breath, (frames * FRAME_SAMPLES,)."""
    n_fast = len(f0_hz) * FRAME_SAMPLES * OVERSAMPLING
    centres = (np.arange(len(f0_hz)) + 0.5) * FRAME_SAMPLES * OVERSAMPLING
    time = np.arange(n_fast)
    step = np.interp(time, centres, f0_hz) / (SAMPLE_RATE_HZ * OVERSAMPLING)
    cycles = int(step.sum() * 1.2) + 8
    wobble = 1.0 + speaker.jitter * np.clip(rng.standard_normal(cycles), -3, 3)
    shimmer = 1.0 + speaker.shimmer * np.clip(rng.standard_normal(cycles), -3, 3)
    opening = np.clip(speaker.open_quotient + 0.02 * rng.standard_normal(cycles), 0.35, 0.9)

    phase = np.cumsum(step * wobble[np.cumsum(step).astype(int)])
    cycle = phase.astype(int)
    within = (phase - cycle) / opening[cycle]
    pulse = np.where(within < 1.0, within * (2.0 - 3.0 * within), 0.0) * shimmer[cycle]
    pulse *= np.interp(time, centres, voice)
    pulse = signal.resample_poly(pulse, 1, OVERSAMPLING)
    pole = np.exp(-2 * np.pi * speaker.tilt_hz / SAMPLE_RATE_HZ)
    pulse = signal.lfilter([1 - pole], [1, -pole], pulse)

    slow_centres = centres / OVERSAMPLING
    slow_time = np.arange(len(pulse))
    airflow = 0.35 + 0.65 * (within[::OVERSAMPLING] < 1.0)  # breath rushes while the glottis is open
    gain = speaker.breath * np.interp(slow_time, slow_centres, voice) * airflow
    gain += 0.12 * np.interp(slow_time, slow_centres, breath)
    return pulse + gain * rng.standard_normal(len(pulse))


def _tract(source: np.ndarray, resonances_hz: np.ndarray, tract: float) -> np.ndarray:
    """Filter by the moving resonators: each windowed stretch of source rings out in the tract of its moment.

    Changing a recursive filter's coefficients while it rings would click at every frame.
    """
    upper = [f * tract for f in UPPER_HZ if f * tract < 7700]
    centre = np.concatenate([resonances_hz, np.tile(upper, (len(resonances_hz), 1))], axis=1)
    width = np.array(BANDWIDTHS_HZ[: centre.shape[1]]) * np.sqrt(tract)
    radius = np.exp(-np.pi * width / SAMPLE_RATE_HZ)
    feedback = -2.0 * radius * np.cos(2 * np.pi * centre / SAMPLE_RATE_HZ)
    polynomial = np.zeros((len(centre), 2 * centre.shape[1] + 1))
    polynomial[:, 0] = 1.0
    for c, r in zip(feedback.T, radius, strict=True):
        longer = polynomial.copy()
        longer[:, 1:] += c[:, None] * polynomial[:, :-1]
        longer[:, 2:] += r**2 * polynomial[:, :-2]
        polynomial = longer
    gain = polynomial.sum(axis=1, keepdims=True)  # 1 at 0 Hz
    window = signal.get_window("hann", 2 * FRAME_SAMPLES)
    padded = np.pad(source, FRAME_SAMPLES)
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * FRAME_SAMPLES)[::FRAME_SAMPLES]
    moments = np.minimum(np.arange(len(frames)), len(centre) - 1)
    response = gain / fft.rfft(polynomial, RING_SAMPLES, axis=1)
    rung = fft.irfft(fft.rfft(frames * window, RING_SAMPLES, axis=1) * response[moments], RING_SAMPLES, axis=1)
    return overlap_add(rung, FRAME_SAMPLES)[FRAME_SAMPLES : FRAME_SAMPLES + len(source)]


def _add_noise(
    dry: np.ndarray, segment: Segment, start: int, stop: int, tract: float, rng: np.random.Generator
) -> None:
    """Add a fricative's or a burst's noise to dry[start:stop] and a little beyond, in place."""
    low = max(segment.noise_hz * tract - segment.noise_width_hz / 2, 200.0)
    high = min(segment.noise_hz * tract + segment.noise_width_hz / 2, 7600.0)
    low = min(low, high - 400.0)
    edge = 40 if stop - start < 400 else 240
    start, stop = max(start - edge, 0), min(stop + edge, len(dry))
    n = stop - start
    sos = signal.butter(1, [low, high], btype="bandpass", fs=SAMPLE_RATE_HZ, output="sos")
    noise = signal.sosfilt(sos, rng.standard_normal(n + 100))[100:]
    rise = min(2 * edge, n // 2)
    envelope = np.ones(n)
    envelope[:rise] = np.hanning(2 * rise)[:rise]
    envelope[n - rise :] = np.hanning(2 * rise)[rise:]
    dry[start:stop] += 1.6 * segment.noise * envelope * noise


def overlap_add(frames: np.ndarray, hop: int) -> np.ndarray:
    """Sum frames (count, length) placed every `hop` samples."""
    count, length = frames.shape
    pieces = -(-length // hop)
    padded = np.pad(frames, ((0, 0), (0, pieces * hop - length))).reshape(count, pieces, hop)
    total = np.zeros((count + pieces, hop))
    for piece in range(pieces):
        total[piece : piece + count] += padded[:, piece]
    return total.reshape(-1)


@dataclass(frozen=True)
class Recording:
    """One draw of everything between the mouth and the file; the same distribution for both classes."""

    lead_s: float
    tail_s: float
    reverberation_s: float  # T60
    direct_to_room_db: float
    highpass_hz: float
    lowpass_hz: float
    colour: tuple[tuple[float, float], ...]  # (centre Hz, gain dB) of the microphone's bumps
    noise_db: float  # noise RMS relative to the voice's
    noise_slope: float  # 0 white, 1 pink
    level_db: float  # RMS of the file, dBFS
    crest_db: float  # the limiter's peak over RMS


def draw_recording(rng: np.random.Generator) -> Recording:
    """Draw a room, a microphone, silences and a level, without knowing the label."""
    return Recording(
        lead_s=float(rng.uniform(0.05, 0.4)),
        tail_s=float(rng.uniform(0.05, 0.4)),
        reverberation_s=float(rng.uniform(0.12, 0.4)),
        direct_to_room_db=float(rng.uniform(6, 16)),
        highpass_hz=float(rng.uniform(50, 120)),
        lowpass_hz=float(rng.uniform(6300, 7500)),
        colour=tuple((float(np.exp(rng.uniform(np.log(300), np.log(6000)))), float(g)) for g in rng.normal(0, 3, 3)),
        noise_db=float(rng.uniform(-42, -28)),
        noise_slope=float(rng.uniform(0, 1)),
        level_db=float(rng.uniform(-30, -20)),
        crest_db=float(rng.uniform(10.5, 12.5)),
    )


def record(dry: np.ndarray, recording: Recording, rng: np.random.Generator) -> np.ndarray:
    """Silences, room, noise over the whole file, microphone with its limiter, level, dither, 16 bits.

    Returns:
        (n_samples,) int16, longer than `dry` by the two silences.
    """
    dry = _trim(dry)
    lead, tail = (round(s * SAMPLE_RATE_HZ) for s in (recording.lead_s, recording.tail_s))
    padded = np.pad(dry, (lead, tail))
    heard = signal.fftconvolve(padded, _room(recording, rng))[: len(padded)]
    heard = heard / np.sqrt(np.mean(heard**2))
    noise = _sloped_noise(len(heard), recording.noise_slope, rng)
    heard = _microphone(heard + 10 ** (recording.noise_db / 20) * noise, recording)
    heard = heard * 10 ** (recording.level_db / 20) * 32768 / np.sqrt(np.mean(heard**2))
    dither = rng.random(len(heard)) + rng.random(len(heard)) - 1.0
    return np.clip(np.round(heard + dither), -32768, 32767).astype(np.int16)


def _trim(dry: np.ndarray) -> np.ndarray:
    """Cut to where the voice is within 26 dB of its loudest 10 ms, with faded ends: both classes start alike."""
    loudness = np.sqrt(np.maximum(signal.oaconvolve(dry**2, np.ones(160) / 160, mode="same"), 0.0))
    active = np.flatnonzero(loudness > 0.05 * loudness.max())
    dry = dry[active[0] : active[-1] + 1].copy()
    fade = np.hanning(2 * 160)[:160]
    dry[:160] *= fade
    dry[-160:] *= fade[::-1]
    return dry


def _room(recording: Recording, rng: np.random.Generator) -> np.ndarray:
    """Impulse response: the direct sound, a few early reflections, a decaying noise tail."""
    n = int(recording.reverberation_s * SAMPLE_RATE_HZ)
    decay = 10 ** (-3 * np.arange(n) / n)  # -60 dB at the end
    tail = rng.standard_normal(n) * decay
    tail[:32] = 0.0
    early = rng.integers(32, 600, size=6)
    tail[early] += rng.choice([-1.0, 1.0], size=6) * 4.0 * decay[early]
    tail *= 10 ** (-recording.direct_to_room_db / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return tail


def _sloped_noise(n: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    n_fft = fft.next_fast_len(n, real=True)
    spectrum = fft.rfft(rng.standard_normal(n_fft))
    hz = fft.rfftfreq(n_fft, 1 / SAMPLE_RATE_HZ)
    noise = fft.irfft(spectrum * (hz + 50) ** (-slope / 2), n_fft)[:n]
    return noise / np.sqrt(np.mean(noise**2))


def _microphone(x: np.ndarray, recording: Recording) -> np.ndarray:
    for f0, gain_db in recording.colour:
        x = signal.lfilter(*_bump(f0, gain_db), x)
    low = signal.butter(2, recording.highpass_hz, "highpass", fs=SAMPLE_RATE_HZ, output="sos")
    x = _limit(signal.sosfilt(low, x), recording.crest_db)
    high = signal.butter(8, recording.lowpass_hz, "lowpass", fs=SAMPLE_RATE_HZ, output="sos")
    return signal.sosfilt(high, x)


def _bump(f0_hz: float, gain_db: float) -> tuple[np.ndarray, np.ndarray]:
    """Peaking equaliser an octave or so wide (R. Bristow-Johnson's cookbook, Q = 0.9)."""
    w = 2 * np.pi * f0_hz / SAMPLE_RATE_HZ
    a, alpha = 10 ** (gain_db / 40), np.sin(w) / 1.8
    b = np.array([1 + alpha * a, -2 * np.cos(w), 1 - alpha * a])
    return b, np.array([1 + alpha / a, -2 * np.cos(w), 1 - alpha / a])


def _limit(x: np.ndarray, crest_db: float) -> np.ndarray:
    """Round the peaks off until peak over RMS is `crest_db`, and return RMS 1; lower peaks stay as they are."""
    low, high = 1e-3, 10.0
    ceiling = 10 ** (crest_db / 20)
    y = x
    for _ in range(14):
        drive = np.sqrt(low * high)
        y = np.tanh(drive * x)
        if np.max(np.abs(y)) > ceiling * np.sqrt(np.mean(y**2)):
            low = drive
        else:
            high = drive
    return y / np.sqrt(np.mean(y**2))
