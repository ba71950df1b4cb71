"""Read recordings as 16 kHz mono float32, and cut or repeat them to the length a model takes.

soundfile (libsndfile) decodes first because it is the fastest; PyAV (FFmpeg) takes what libsndfile cannot read,
which is m4a and a good part of ASVspoof 2021's FLAC ("flac decoder lost sync").
Every function here is thread-safe: no decoder, and no state but a table of filters, outlives a call.
"""

from __future__ import annotations

import hashlib
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 768_000  # below is no speech, above is no header to believe
MAX_PEAK = 16.0  # full scale is 1; lossy decoders overshoot it a little, integers stored as floats by far more

# The anti-alias filter of resample(): flat to 94 % of the lower Nyquist frequency, 80 dB down from that frequency on.
PASSBAND_FRACTION = 0.94
STOPBAND_DB = 80.0

# Containers whose header states the exact length, so that fewer decoded samples mean a truncated file.
_EXACT_LENGTH_CONTAINERS = {"flac", "mov,mp4,m4a,3gp,3g2,mj2"}
# A header that lies about the length ends in MemoryError; the others are what soundfile raises on damaged files.
_SOUNDFILE_ERRORS = (RuntimeError, TypeError, ValueError, OSError, MemoryError)
_PRIMING_SAMPLES = 4_096  # AAC encoders' delay, which headers may or may not count


class AudioInfo(NamedTuple):
    """What a recording's header says: samples after conversion to 16 kHz, seconds, and its own rate."""

    n_samples: int
    duration_s: float
    rate_hz: int


def read_audio(path: str | os.PathLike) -> np.ndarray:
    """Decode one recording to 16 kHz mono.

    Channels are averaged; another rate is resampled (see `resample`); 16-bit samples at 16 kHz come out as exactly
    int16 / 32768. Overshoot beyond full scale is clipped. Digital silence is a valid recording and is returned as
    it is: some corpora contain it, and each of their trials needs a score. A FLAC, WAV or MP4 file shorter than its
    header says is refused; MP3 and Ogg are streams without a binding length, so what they hold is what they are.

    Args:
        path: a file in any format that libsndfile or FFmpeg decodes.

    Returns:
        Float32 waveform of shape (n_samples,), n_samples >= 1, every value finite and in [-1, 1].

    Raises:
        AudioError: the file is missing, empty, truncated, not audio, or holds NaN or infinite samples.
    """
    path = Path(path)
    channels, rate_hz = _decode(path)
    if channels.shape[0] == 0:
        raise AudioError(f"{path} holds no samples; remove it from the list or record it again")
    if not np.isfinite(channels).all():
        raise AudioError(f"{path} holds NaN or infinite samples; it was written by a faulty process, convert it again")
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(
            f"{path} states a sampling rate of {rate_hz} Hz; expected {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz: "
            "its header is wrong, write the file again with its true rate"
        )
    peak = float(np.abs(channels).max())
    if peak > MAX_PEAK:
        raise AudioError(
            f"{path} has samples up to {peak:g}, expected [-1, 1]: it seems to store integers as floats, "
            "divide them by full scale (32768 for 16 bits) and write it again"
        )
    mono = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1, dtype=np.float64)
    return np.clip(resample(mono, rate_hz), -1.0, 1.0).astype(np.float32, copy=False)


def audio_info(path: str | os.PathLike) -> AudioInfo:
    """Length and rate from the header alone, for time and memory projections.

    Args:
        path: as for `read_audio`.

    Returns:
        AudioInfo; `n_samples` is the length `read_audio` will give, to the sample for FLAC and WAV, within about
        0.05 s for m4a, whose header leaves out the padding.

    Raises:
        AudioError: the file is missing or no decoder recognises it.
    """
    import soundfile

    path = _existing(path)
    try:
        header = soundfile.info(os.fspath(path))
        n_native, rate_hz = header.frames, header.samplerate
    except _SOUNDFILE_ERRORS:
        n_native, rate_hz = _pyav_header(path)
    if rate_hz <= 0 or not 0 < n_native < 2**40:  # some headers leave the length out: only decoding tells
        n_samples = len(read_audio(path))
        return AudioInfo(n_samples, n_samples / SAMPLE_RATE_HZ, rate_hz)
    return AudioInfo(math.ceil(n_native * SAMPLE_RATE_HZ / rate_hz), n_native / rate_hz, rate_hz)


def resample(waveform: np.ndarray, rate_hz: int) -> np.ndarray:
    """Convert a mono waveform to 16 kHz with a linear-phase filter.

    A Kaiser-window low-pass applied by polyphase filtering: flat within 0.01 dB up to 94 % of the lower of the two
    Nyquist frequencies, and at least 80 dB down from that frequency on, so nothing audible folds back. (SciPy's default
    filter is only 6 dB down there: a 8.2 kHz tone in a 48 kHz file would return as a 7.8 kHz one.)

    Args:
        waveform: shape (n,), any float type.
        rate_hz: its sampling rate, in Hz.

    Returns:
        Waveform at 16 kHz, shape (ceil(n * 16000 / rate_hz),); the argument itself if `rate_hz` is 16000.

    >>> resample(np.zeros(441), 44_100).shape
    (160,)
    """
    if rate_hz == SAMPLE_RATE_HZ:
        return waveform
    from scipy.signal import resample_poly

    divisor = math.gcd(SAMPLE_RATE_HZ, rate_hz)
    up, down = SAMPLE_RATE_HZ // divisor, rate_hz // divisor
    return resample_poly(waveform.astype(np.float64), up, down, window=_low_pass(up, down))


def fit_length(waveform: np.ndarray, n_samples: int) -> np.ndarray:
    """Take the first `n_samples`, repeating a shorter clip end to end: the published evaluation input.

    Args:
        waveform: shape (n,), n >= 1, any dtype.
        n_samples: length wanted, >= 1.

    Returns:
        A new array of shape (n_samples,) and the same dtype.

    Raises:
        AudioError: the waveform is empty.

    >>> fit_length(np.array([1, 2, 3]), 7)
    array([1, 2, 3, 1, 2, 3, 1])
    """
    _require_samples(waveform)
    return np.resize(waveform[:n_samples], n_samples)


def random_crop(waveform: np.ndarray, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Take `n_samples` from a random place, repeating a shorter clip end to end: the training input.

    Every start from 0 to n - n_samples is equally likely, so a clip of exactly `n_samples` is returned whole
    (the published code draws from an empty range there and stops).

    Args:
        waveform: shape (n,), n >= 1, any dtype.
        n_samples: length wanted, >= 1.
        rng: source of the start; drawn from only if the clip is longer than `n_samples`.

    Returns:
        A new array of shape (n_samples,) and the same dtype.

    Raises:
        AudioError: the waveform is empty.
    """
    _require_samples(waveform)
    spare = len(waveform) - n_samples
    start = int(rng.integers(spare + 1)) if spare > 0 else 0
    return fit_length(waveform[start:], n_samples)


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Round a waveform in [-1, 1] to 16 bits; undoes `from_int16` exactly, and +1.0 becomes 32767.

    >>> to_int16(np.array([-1.0, 0.5, 1.0], dtype=np.float32))
    array([-32768,  16384,  32767], dtype=int16)
    """
    return np.clip(np.rint(np.asarray(waveform) * 32768.0), -32768, 32767).astype(np.int16)


def from_int16(samples: np.ndarray) -> np.ndarray:
    """Samples / 32768 as float32, the scale libsndfile uses; exact.

    >>> from_int16(np.array([-32768, 16384], dtype=np.int16))
    array([-1. ,  0.5], dtype=float32)
    """
    return np.asarray(samples, dtype=np.int16).astype(np.float32) / np.float32(32768.0)


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a recording" if path.is_dir() else "does not exist (or is a broken link)"
        raise AudioError(f"{path} {what}")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is empty (0 bytes); copy or download it again")
    return path


def _require_samples(waveform: np.ndarray) -> None:
    if len(waveform) == 0:
        raise AudioError("the waveform holds no samples; there is nothing to repeat to the wanted length")


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """All samples of a file, (n, channels) float32, and its rate."""
    import soundfile

    _existing(path)
    _refuse_cut_wav(path)
    try:
        with soundfile.SoundFile(os.fspath(path)) as sound:
            channels = sound.read(dtype="float32", always_2d=True)
            expected, rate_hz = sound.frames, sound.samplerate
        if len(channels) == expected:
            return channels, rate_hz
        reason = f"{len(channels)} of {expected} samples decoded"
    except _SOUNDFILE_ERRORS as error:
        reason = str(error) or type(error).__name__
    try:
        return _decode_with_pyav(path)
    except AudioError as error:
        raise AudioError(f"{error} [libsndfile: {reason}]") from None


def _refuse_cut_wav(path: Path) -> None:
    """Raise if a WAV file ends before its data chunk does; both decoders read such a file without a word."""
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        riff = file.read(12)
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            return
        while len(header := file.read(8)) == 8:
            length = int.from_bytes(header[4:], "little")
            if header[:4] == b"data":
                streamed = length >= 0x7FFF_F000  # written to a pipe: the length was not known
                if not streamed and file.tell() + length > n_bytes:
                    raise AudioError(
                        f"{path} is truncated: its header promises {length} bytes of samples, "
                        f"{n_bytes - file.tell()} are there; copy or download it again"
                    )
                return
            file.seek(length + length % 2, os.SEEK_CUR)


def _pyav(path: Path):
    """PyAV, imported where it is used: Kaggle's image is without it."""
    try:
        import av
    except ImportError:
        raise AudioError(
            f"{path} cannot be decoded by libsndfile, and PyAV, which may be able to, is not installed: pip install av"
        ) from None
    return av


def _decode_with_pyav(path: Path) -> tuple[np.ndarray, int]:
    av = _pyav(path)
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.audio:
                raise AudioError(f"{path} has no audio stream")
            stream = container.streams.audio[0]
            frames, rates = [], set()
            for frame in container.decode(stream):
                frames.append(_samples_of(frame))
                rates.add(frame.sample_rate)
            exact = container.format.name in _EXACT_LENGTH_CONTAINERS and stream.duration
            expected = int(stream.duration * stream.time_base * stream.rate) if exact else 0
    except (av.FFmpegError, ValueError, OSError, IndexError, MemoryError) as error:
        raise AudioError(_undecodable(path, error)) from None
    if len(rates) != 1 or len({frame.shape[1] for frame in frames}) != 1:
        what = "no samples" if not frames else "a rate or channel count that changes on the way"
        raise AudioError(f"{path} holds {what}; convert it to FLAC or WAV")
    samples = np.concatenate(frames)
    slack = 0 if path.suffix.lower() == ".flac" else _PRIMING_SAMPLES
    if len(samples) + slack < expected:
        raise AudioError(
            f"{path} is truncated: its header promises {expected} samples, {len(samples)} can be decoded; "
            "copy or download it again"
        )
    _refuse_altered_flac(path, samples)
    return _to_float(samples), rates.pop()


def _undecodable(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{path} cannot be decoded ({reason}): it is damaged, truncated or not audio; copy or download it again"


def _samples_of(frame) -> np.ndarray:
    """(n, channels) of one PyAV frame, in the type it was decoded to."""
    samples = frame.to_ndarray()
    return samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)


def _to_float(samples: np.ndarray) -> np.ndarray:
    """Float32 in [-1, 1] of samples in any PCM type."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if np.issubdtype(samples.dtype, np.integer):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32)


def _refuse_altered_flac(path: Path, samples: np.ndarray) -> None:
    """Raise if decoded samples do not have the MD5 sum in the FLAC header: FFmpeg decodes damaged frames all the same.

    The sum is that of the interleaved little-endian samples (RFC 9639, section 8.2); a header may leave it out.
    """
    with path.open("rb") as file:
        header = file.read(42)
    stated = header[26:42]
    if header[:4] != b"fLaC" or not any(stated):
        return
    n_bits = ((header[20] & 1) << 4 | header[21] >> 4) + 1
    words = (samples >> (8 * samples.itemsize - n_bits)).astype("<i4").reshape(-1, 1).view(np.uint8)
    if hashlib.md5(words[:, : (n_bits + 7) // 8].tobytes(), usedforsecurity=False).digest() != stated:
        raise AudioError(f"{path} is damaged: its samples do not match its own checksum; copy or download it again")


def _pyav_header(path: Path) -> tuple[int, int]:
    av = _pyav(path)
    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.audio[0]
            seconds = stream.duration * stream.time_base if stream.duration else 0
            return int(seconds * stream.rate), stream.rate
    except (av.FFmpegError, ValueError, OSError, IndexError, MemoryError) as error:
        raise AudioError(_undecodable(path, error)) from None


@lru_cache(maxsize=16)
def _low_pass(up: int, down: int) -> np.ndarray:
    """Taps at `up` times the input rate: flat below PASSBAND_FRACTION of the lower Nyquist frequency, then stop."""
    from scipy.signal import firwin, kaiser_beta

    nyquist = 1.0 / max(up, down)  # of the lower rate, where 1 is the Nyquist frequency of the filter's own rate
    width = (1.0 - PASSBAND_FRACTION) * nyquist
    half = math.ceil((STOPBAND_DB - 7.95) / (2.285 * math.pi * width) / 2)  # Kaiser's length formula
    taps = firwin(2 * half + 1, nyquist - width / 2, window=("kaiser", kaiser_beta(STOPBAND_DB)), scale=True)
    taps.setflags(write=False)
    return taps
