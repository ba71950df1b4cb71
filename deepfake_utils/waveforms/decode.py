"""Read recordings as 16 kHz mono float32, whole or block by block, and fit them to the length a model takes.

A recording is read in blocks to its end (`decoders`), mixed to mono and resampled as it comes; `damage` knows what is
missing from it. Every function here is thread-safe: no decoder, and no state but a table of filters, outlives a call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np

from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError
from deepfake_utils.waveforms.decoders import decode, read_header
from deepfake_utils.waveforms.mixing import Mixer
from deepfake_utils.waveforms.recording import AudioFile, AudioWarning, Recording, name_of, opened
from deepfake_utils.waveforms.resample import Resampler, resample

__all__ = [
    "AudioInfo",
    "AudioWarning",
    "audio_info",
    "fit_length",
    "from_int16",
    "iter_audio",
    "read_audio",
    "resample",
    "to_int16",
]

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 768_000  # below is no speech, above is no header to believe


class AudioInfo(NamedTuple):
    """What a recording's header says: samples after conversion to 16 kHz, seconds, its own rate, how sure that is."""

    n_samples: int
    duration_s: float
    rate_hz: int
    is_exact: bool  # else an estimate: MP3, Ogg and MP4 tell their length only when they are decoded


def read_audio(source: AudioFile, *, max_samples: int | None = None, notes: list[str] | None = None) -> np.ndarray:
    """Decode one recording to 16 kHz mono.

    Channels are averaged, unless that cancels them (opposite polarity): then the loudest is taken and this is said.
    Another rate is resampled (see `resample`); 16-bit samples at 16 kHz come out as exactly int16 / 32768. Overshoot
    beyond full scale is clipped. Digital silence is a valid recording and is returned as it is: some corpora contain
    it, and each of their trials needs a score. A FLAC, WAV or MP4 file shorter than its header says is refused, and so
    is FLAC that fails its checksum; MP3, Ogg and what was written to a pipe are streams without a binding length, so
    what they hold is what they are, and what was lost in them is said.

    Args:
        source: a file in any format that libsndfile or FFmpeg decodes: its path, `-` for standard input, its content
            as bytes, or a binary file object (read from its beginning where it can be rewound, and left open).
        max_samples: the most samples wanted, at 16 kHz; decoding stops there. None is the whole recording.
        notes: a list that takes what is to be said about the recording, a sentence each; None makes each an
            `AudioWarning`.

    Returns:
        Float32 waveform of shape (n_samples,), n_samples >= 1, every value finite and in [-1, 1].

    Raises:
        AudioError: the file is missing, empty, truncated, not audio, an address, larger than the memory, or holds NaN
            or infinite samples.
    """
    blocks, n_samples, stream = [], 0, _stream(source, notes)
    try:
        for block in stream:
            blocks.append(block)
            n_samples += len(block)
            if max_samples is not None and n_samples >= max_samples:
                break
        waveform = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    except MemoryError:
        raise AudioError(_too_large(source, f" after {n_samples / SAMPLE_RATE_HZ:.0f} s of sound")) from None
    finally:
        stream.close()
    return waveform[:max_samples]


def iter_audio(source: AudioFile, block_s: float = 10.0, *, notes: list[str] | None = None) -> Iterator[np.ndarray]:
    """Decode one recording to 16 kHz mono block by block, in memory that does not grow with its length.

    The blocks, end to end, are bit for bit what `read_audio` returns.

    Args:
        source, notes: as for `read_audio`; notes come as their place is reached.
        block_s: seconds of sound in a block; only the last one is shorter.

    Yields:
        Float32 waveforms of shape (block_s * 16000,), every value finite and in [-1, 1].

    Raises:
        AudioError: as for `read_audio`, when the place is reached: of a file that was cut, after its last block.
    """
    n_wanted = max(1, round(block_s * SAMPLE_RATE_HZ))
    yield from _regroup(_stream(source, notes), n_wanted)


def audio_info(source: AudioFile) -> AudioInfo:
    """Length and rate from the header alone, for time and memory projections.

    Args:
        source: as for `read_audio`, but standard input, which can be read only once.

    Returns:
        AudioInfo; where `is_exact`, `n_samples` is the length `read_audio` will give. A file whose header leaves the
        length out is decoded to count it.

    Raises:
        AudioError: the file is missing or no decoder recognises it.
    """
    with opened(source) as recording:
        n_native, rate_hz, is_exact = read_header(recording)
    if rate_hz <= 0 or not 0 < n_native < 2**40:  # some headers leave the length out: only decoding tells
        n_samples = sum(map(len, _stream(source, [])))
        return AudioInfo(n_samples, n_samples / SAMPLE_RATE_HZ, rate_hz, True)
    return AudioInfo(math.ceil(n_native * SAMPLE_RATE_HZ / rate_hz), n_native / rate_hz, rate_hz, is_exact)


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
    if len(waveform) == 0:
        raise AudioError("the waveform holds no samples; there is nothing to repeat to the wanted length")
    return np.resize(waveform[:n_samples], n_samples)


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


# From the file to 16 kHz mono


def _stream(source: AudioFile, notes: list[str] | None) -> Iterator[np.ndarray]:
    """The recording as float32 blocks at 16 kHz, of whatever size the steps make."""
    with opened(source, notes) as recording:
        n_samples = 0
        try:
            with closing(decode(recording)) as decoded:
                for block in _at_16_khz(recording, _mixed(recording, decoded)):
                    n_samples += len(block)
                    if len(block):
                        yield np.clip(block, -1.0, 1.0).astype(np.float32, copy=False)
        except MemoryError:
            raise AudioError(_too_large(source, f" after {n_samples / SAMPLE_RATE_HZ:.0f} s of sound")) from None
        if not n_samples:
            raise AudioError(f"{recording.name} holds no samples; remove it from the list or record it again")


def _too_large(source: AudioFile, where: str) -> str:
    return (
        f"{name_of(source)} needs more memory than there is{where}; nothing is wrong with the file: free memory, or "
        "read it in blocks (iter_audio)"
    )


def _regroup(blocks: Iterable[np.ndarray], n_wanted: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of `n_wanted` along the first axis; the last may be shorter."""
    waiting, n_waiting = [], 0
    for block in blocks:
        waiting.append(block)
        n_waiting += len(block)
        if n_waiting >= n_wanted:
            joined = np.concatenate(waiting) if len(waiting) > 1 else block
            n_whole = n_waiting // n_wanted * n_wanted
            for start in range(0, n_whole, n_wanted):
                yield joined[start : start + n_wanted]
            waiting, n_waiting = [joined[n_whole:].copy()], n_waiting - n_whole
    if n_waiting:
        yield np.concatenate(waiting)


def _mixed(recording: Recording, decoded: Iterator[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
    """Mono blocks and their rate, from blocks (n, channels) float32 and theirs; a change of either is followed."""
    mixer = Mixer(recording.name, recording.say)
    for block, rate_hz in decoded:
        if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
            raise AudioError(
                f"{recording.name} states a sampling rate of {rate_hz} Hz; expected {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz: "
                "its header is wrong, write the file again with its true rate"
            )
        yield from mixer.push(block, rate_hz)
    yield from mixer.finish()


def _at_16_khz(recording: Recording, blocks: Iterator[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
    resampler = None
    for mono, rate_hz in blocks:
        if resampler is None or rate_hz != resampler.rate_hz:
            if resampler is not None:
                yield resampler.finish()
                recording.say(f"its sampling rate changes from {resampler.rate_hz} to {rate_hz} Hz on the way")
            resampler = Resampler(rate_hz)
        yield resampler.push(mono)
    if resampler is not None:
        yield resampler.finish()
