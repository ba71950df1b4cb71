"""Recordings of any length, decoded and resampled block by block: memory does not grow with the recording."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError
from deepfake_utils.waveforms import decode

BLOCK_S = 10.0


def iter_audio(path: str | os.PathLike, block_s: float = BLOCK_S) -> Iterator[np.ndarray]:
    """Decode one recording to 16 kHz mono in blocks; put together they equal `decode.read_audio`.

    What is wrong with a recording is found where it is, so earlier blocks of a damaged one may have been given.

    Args:
        path: a file in any format that libsndfile or FFmpeg decodes.
        block_s: roughly the length of a block, in seconds.

    Yields:
        Float32 waveforms of shape (n,), n >= 1, every value finite and in [-1, 1].

    Raises:
        AudioError: as `decode.read_audio`.
    """
    path, resampler, n_out = Path(path), None, 0
    for channels, rate_hz in _native_blocks(path, block_s):
        if resampler is None:
            resampler = _resampler(path, rate_hz)
        _refuse_nonsense(path, channels)
        mono = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1, dtype=np.float64)
        if len(out := resampler.push(mono)):
            n_out += len(out)
            yield _clipped(out)
    if resampler is not None and len(out := resampler.finish()):
        n_out += len(out)
        yield _clipped(out)
    if not n_out:
        raise AudioError(f"{path} holds no samples; remove it from the list or record it again")


class BlockResampler:
    """`decode.resample` of a waveform that comes in pieces: what it returns, put together, is the same.

    Args:
        rate_hz: sampling rate of what comes in, in Hz.

    >>> pieces = BlockResampler(48_000)
    >>> len(pieces.push(np.zeros(48_000))) + len(pieces.finish())
    16000
    """

    def __init__(self, rate_hz: int):
        divisor = math.gcd(SAMPLE_RATE_HZ, rate_hz)
        self._up, self._down = SAMPLE_RATE_HZ // divisor, rate_hz // divisor
        reach = 0 if rate_hz == SAMPLE_RATE_HZ else len(decode._low_pass(self._up, self._down)) // 2 // self._up + 1
        self._context = self._whole(reach + self._down - 1)  # input samples that an output depends on, each way
        self._rate_hz, self._held = rate_hz, np.zeros(0)
        self._done = 0  # input samples of `_held` whose output has been given; a multiple of `down`

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take samples (n,) and return what can be computed for good, of shape (m,), m >= 0."""
        if self._rate_hz == SAMPLE_RATE_HZ:
            return samples
        self._held = np.concatenate([self._held, samples])
        stop = self._whole(len(self._held) - self._context)
        return self._between(stop) if stop > self._done else self._held[:0]

    def finish(self) -> np.ndarray:
        """Return the rest, as if silence followed."""
        if self._rate_hz == SAMPLE_RATE_HZ:
            return self._held
        return self._between(None) if len(self._held) > self._done else self._held[:0]

    def _whole(self, n: int) -> int:
        return n // self._down * self._down

    def _between(self, stop: int | None) -> np.ndarray:
        """Outputs from `_done` up to the input sample `stop`; forgets input that no later output depends on."""
        chunk = self._held if stop is None else self._held[: stop + self._context]
        first = self._done // self._down * self._up
        last = None if stop is None else stop // self._down * self._up
        out = decode.resample(chunk, self._rate_hz)[first:last]
        if stop is None:
            self._held, self._done = self._held[:0], 0
        else:
            drop = max(0, stop - self._context)
            self._held, self._done = self._held[drop:], stop - drop
        return out


def _resampler(path: Path, rate_hz: int) -> BlockResampler:
    lowest, highest = decode.MIN_RATE_HZ, decode.MAX_RATE_HZ
    if not lowest <= rate_hz <= highest:
        raise AudioError(
            f"{path} states a sampling rate of {rate_hz} Hz; expected {lowest} to {highest} Hz: "
            "its header is wrong, write the file again with its true rate"
        )
    return BlockResampler(rate_hz)


def _refuse_nonsense(path: Path, channels: np.ndarray) -> None:
    if not np.isfinite(channels).all():
        raise AudioError(f"{path} holds NaN or infinite samples; it was written by a faulty process, convert it again")
    if (peak := float(np.abs(channels).max(initial=0.0))) > decode.MAX_PEAK:
        raise AudioError(
            f"{path} has samples up to {peak:g}, expected [-1, 1]: it seems to store integers as floats, "
            "divide them by full scale (32768 for 16 bits) and write it again"
        )


def _clipped(samples: np.ndarray) -> np.ndarray:
    return np.clip(samples, -1.0, 1.0).astype(np.float32, copy=False)


def _native_blocks(path: Path, block_s: float) -> Iterator[tuple[np.ndarray, int]]:
    """(channels (n, c) float32, rate in Hz) from libsndfile, and from where that fails on, from FFmpeg."""
    import soundfile

    decode._existing(path)
    decode._refuse_cut_wav(path)
    n_given = 0
    try:
        with soundfile.SoundFile(os.fspath(path)) as sound:
            n_block = max(1, round(block_s * max(sound.samplerate, 1)))
            while len(block := sound.read(n_block, dtype="float32", always_2d=True)):
                n_given += len(block)
                yield block, sound.samplerate
            if n_given == sound.frames and n_given:
                return
            reason = f"{n_given} of {sound.frames} samples decoded"
    except decode._SOUNDFILE_ERRORS as error:
        reason = str(error) or type(error).__name__
    try:
        yield from _blocks_with_pyav(path, n_given, block_s)
    except AudioError as error:
        raise AudioError(f"{error} [libsndfile: {reason}]") from None


def _blocks_with_pyav(path: Path, n_skipped: int, block_s: float) -> Iterator[tuple[np.ndarray, int]]:
    """(channels, rate) from FFmpeg, without the first `n_skipped` samples, which another decoder has given."""
    av = decode._pyav(path)
    held, n_held, n_decoded, rate_hz, n_channels = [], 0, 0, None, None
    checksum = _FlacChecksum(path)
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.audio:
                raise AudioError(f"{path} has no audio stream")
            stream = container.streams.audio[0]
            exact = container.format.name in decode._EXACT_LENGTH_CONTAINERS and stream.duration
            expected = int(stream.duration * stream.time_base * stream.rate) if exact else 0
            for frame in container.decode(stream):
                samples = decode._samples_of(frame)
                if (rate_hz, n_channels) not in ((None, None), (frame.sample_rate, samples.shape[1])):
                    raise AudioError(
                        f"{path} holds a rate or channel count that changes on the way; convert it to FLAC or WAV"
                    )
                rate_hz, n_channels = frame.sample_rate, samples.shape[1]
                checksum.update(samples)
                fresh = decode._to_float(samples[max(0, n_skipped - n_decoded) :])
                n_decoded += len(samples)
                held.append(fresh)
                n_held += len(fresh)
                if n_held >= block_s * rate_hz:
                    yield np.concatenate(held), rate_hz
                    held, n_held = [], 0
    except (av.FFmpegError, ValueError, OSError, IndexError, MemoryError) as error:
        raise AudioError(decode._undecodable(path, error)) from None
    slack = 0 if path.suffix.lower() == ".flac" else decode._PRIMING_SAMPLES
    if n_decoded + slack < expected:
        raise AudioError(
            f"{path} is truncated: its header promises {expected} samples, {n_decoded} can be decoded; "
            "copy or download it again"
        )
    checksum.refuse_altered()
    if n_held:
        yield np.concatenate(held), rate_hz


class _FlacChecksum:
    """The MD5 sum of a FLAC header against the decoded samples; `decode._refuse_altered_flac`, by blocks."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            header = file.read(42)
        self._path, self._stated, self._md5 = path, header[26:42], hashlib.md5(usedforsecurity=False)
        self._applies = header[:4] == b"fLaC" and any(self._stated)
        self._n_bits = ((header[20] & 1) << 4 | header[21] >> 4) + 1 if self._applies else 0

    def update(self, samples: np.ndarray) -> None:
        if self._applies:
            words = (samples >> (8 * samples.itemsize - self._n_bits)).astype("<i4").reshape(-1, 1).view(np.uint8)
            self._md5.update(words[:, : (self._n_bits + 7) // 8].tobytes())

    def refuse_altered(self) -> None:
        if self._applies and self._md5.digest() != self._stated:
            raise AudioError(
                f"{self._path} is damaged: its samples do not match its own checksum; copy or download it again"
            )
