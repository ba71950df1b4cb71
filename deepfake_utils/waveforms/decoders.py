"""The two decoders behind `decode`, libsndfile by soundfile and FFmpeg by PyAV, and which of them reads what.

soundfile decodes what is stored sample by sample, and FLAC, because it is the fastest. PyAV takes MP3 and Ogg, whose
length libsndfile estimates and then believes, and all that libsndfile cannot read: m4a, videos, a good part of
ASVspoof 2021's FLAC ("flac decoder lost sync"). Both read blocks to the end of the stream.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache

import numpy as np

from deepfake_utils.conventions import AudioError
from deepfake_utils.waveforms.damage import FlacChecksum, Losses, is_empty, refuse_cut, say_what_follows
from deepfake_utils.waveforms.recording import Recording

BLOCK_S = 10.0  # decoded at a time by libsndfile ...
BLOCK_SAMPLES = 2**22  # ... and no more than this many, all channels counted

_SOUNDFILE_ERRORS = (RuntimeError, TypeError, ValueError, OSError)  # what soundfile raises on damaged files


class _NoPyAV(AudioError):
    """PyAV is not installed: Kaggle's image is without it."""


def decode(recording: Recording) -> Iterator[tuple[np.ndarray, int]]:
    """Yield all samples of a recording, in blocks (n, channels) of float32 in [-1, 1], each with its sampling rate.

    Where libsndfile gives up, FFmpeg goes on from the same sample. Rate and channels may change on the way.

    Raises:
        AudioError: no decoder reads it, or its header or its checksum says that something is missing; the latter
            after the last block.
    """
    refuse_cut(recording)
    if is_empty(recording):
        return
    n_done, reason = 0, None
    try:
        with nullcontext() if _begins_as_mpeg(recording) else _soundfile(recording) as sound:
            if sound is not None and not _is_stream(sound):
                for block in _soundfile_blocks(sound):
                    n_done += len(block)
                    yield block, sound.samplerate
                if n_done == sound.frames > 0:
                    say_what_follows(recording)
                    return
                reason = f"{n_done} of {sound.frames} samples decoded"
    except _SOUNDFILE_ERRORS as error:
        reason = str(error) or type(error).__name__
    try:
        yield from _without_first(n_done, _pyav_blocks(recording))
    except _NoPyAV as error:
        if reason is not None:
            raise AudioError(f"{error} [libsndfile: {reason}]") from None
        yield from _estimated_blocks(recording, error)
    except AudioError as error:
        raise AudioError(f"{error} [libsndfile: {reason}]" if reason else str(error)) from None


def read_header(recording: Recording) -> tuple[int, int, bool]:
    """Samples at the recording's own rate, that rate, and whether the number is binding; 0 where not stated.

    Raises:
        AudioError: no decoder recognises it.
    """
    if not _begins_as_mpeg(recording):
        with suppress(*_SOUNDFILE_ERRORS):
            return _soundfile_header(recording)
    try:
        with _pyav_container(recording) as container:
            stream = container.streams.audio[0]
            seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
            codec = stream.codec_context  # none where FFmpeg has no decoder for what the header names
            rate_hz = (codec and codec.sample_rate) or 0
            return int(seconds * rate_hz), rate_hz, False
    except _NoPyAV:
        with suppress(*_SOUNDFILE_ERRORS):
            return _soundfile_header(recording)
        raise


def _without_first(n_samples: int, blocks: Iterator[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int]]:
    for block, rate_hz in blocks:
        if len(block) > n_samples:
            yield block[n_samples:], rate_hz
        n_samples = max(0, n_samples - len(block))


def _soundfile(recording: Recording):
    import soundfile

    file = recording.file
    file.seek(0)
    # C reads faster than Python, and has no opinion about the bytes of a name. Windows' libraries share no numbers.
    target = file.fileno() if isinstance(file, io.FileIO) and os.name == "posix" else file
    return soundfile.SoundFile(target, closefd=False)


def _begins_as_mpeg(recording: Recording) -> bool:
    """MP3 or AAC by its first bytes, where libsndfile has nothing to add but warnings on standard error."""
    recording.file.seek(0)
    head = recording.file.read(3)
    return head == b"ID3" or (len(head) == 3 and head[0] == 0xFF and head[1] >= 0xE0)


def _soundfile_header(recording: Recording) -> tuple[int, int, bool]:
    with _soundfile(recording) as sound:
        return sound.frames, sound.samplerate, not _is_stream(sound)


def _is_stream(sound) -> bool:
    """MP3 and Ogg: libsndfile reads no further than the length it has estimated."""
    return sound.format in ("OGG", "MP3") or sound.subtype.startswith("MPEG")


def _estimated_blocks(recording: Recording, problem: _NoPyAV) -> Iterator[tuple[np.ndarray, int]]:
    """MP3 and Ogg as libsndfile has them, for want of PyAV."""
    try:
        with _soundfile(recording) as sound:
            recording.say("without PyAV (pip install av) MP3 and Ogg are read only to the length a header estimates")
            yield from ((block, sound.samplerate) for block in _soundfile_blocks(sound))
    except _SOUNDFILE_ERRORS as error:
        raise AudioError(f"{problem} [libsndfile: {error}]") from None


def _soundfile_blocks(sound) -> Iterator[np.ndarray]:
    n_frames = min(int(BLOCK_S * sound.samplerate), BLOCK_SAMPLES // sound.channels)
    n_frames = max(1, min(n_frames, sound.frames))  # the header's length saves memory, and decides nothing
    while len(block := sound.read(n_frames, dtype="float32", always_2d=True)):
        yield block


@contextmanager
def _pyav_container(recording: Recording):
    try:
        import av
    except ImportError:
        raise _NoPyAV(
            f"{recording.name} cannot be decoded by libsndfile, and PyAV, which may be able to, is not installed: "
            "pip install av"
        ) from None
    recording.file.seek(0)
    # A file object, not a path: a name may look like an address. And a playlist must not open what it lists.
    # Nor is a picture decoded, not even to see what it is: one of 300 kB may need a gigabyte.
    options = {"protocol_whitelist": "none", "codec_whitelist": _decoders_of_sound()}
    try:
        with av.open(recording.file, "r", options=options, **_lenient_tags()) as container:
            if not container.streams.audio:
                raise AudioError(f"{recording.name} has no audio stream")
            yield container
    except MemoryError:  # of FFmpeg's errors, too: it is not the file's fault
        raise MemoryError from None
    except (av.FFmpegError, ValueError, OSError, IndexError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise AudioError(
            f"{recording.name} cannot be decoded ({reason}): it is damaged, truncated or not audio; "
            "copy or download it again"
        ) from None


def _lenient_tags() -> dict[str, str]:
    """What keeps tags that are no UTF-8 from being errors: said to PyAV before 19, which has no word for it since."""
    import av

    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


@cache
def _decoders_of_sound() -> str:
    """The names of FFmpeg's decoders of audio, with commas between them."""
    import av

    names = []
    for name in av.codecs_available:
        with suppress(av.codec.codec.UnknownCodecError):
            names += [name] if av.Codec(name, "r").type == "audio" else []
    return ",".join(names)


def _pyav_blocks(recording: Recording) -> Iterator[tuple[np.ndarray, int]]:
    checksum = FlacChecksum(recording)
    with _pyav_container(recording) as container:
        losses = Losses(recording, container)
        for frames in _alike(_frames(container, losses)):
            yield _to_float(checksum.seen(_samples_of(frames))), frames[0].sample_rate
        losses.judge()
        checksum.judge()


def _frames(container, losses: Losses) -> Iterator:
    """What can be decoded of the first audio stream; `losses` counts the rest."""
    import av

    packets = container.demux(container.streams.audio[0])
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            losses.broke_off(error)
            return
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            losses.failed(packet)
        else:
            losses.succeeded(packet, frames)
            yield from frames


def _alike(frames: Iterator) -> Iterator[list]:
    """Frames in lists of about a second, all of one rate and layout."""
    waiting, n_waiting, kind = [], 0, None
    for frame in frames:
        its_kind = (frame.sample_rate, frame.format.name, frame.layout.nb_channels)
        if waiting and (its_kind != kind or n_waiting >= frame.sample_rate):
            yield waiting
            waiting, n_waiting = [], 0
        kind = its_kind
        waiting.append(frame)
        n_waiting += frame.samples
    if waiting:
        yield waiting


def _samples_of(frames: list) -> np.ndarray:
    """(n, channels) of PyAV frames of one kind, in the type they were decoded to."""
    from av.audio.frame import format_dtypes

    n_channels, dtype = frames[0].layout.nb_channels, format_dtypes[frames[0].format.name]
    if not frames[0].format.is_planar:
        parts = [np.frombuffer(frame.planes[0], dtype, frame.samples * n_channels) for frame in frames]
        return np.concatenate(parts).reshape(-1, n_channels)
    samples = np.empty((n_channels, sum(frame.samples for frame in frames)), dtype)
    planes = [[np.frombuffer(plane, dtype, frame.samples) for plane in frame.planes] for frame in frames]
    for channel, parts in zip(samples, zip(*planes, strict=True), strict=True):
        np.concatenate(parts, out=channel)
    return samples.T


def _to_float(samples: np.ndarray) -> np.ndarray:
    """Float32 in [-1, 1] of samples in any PCM type."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if np.issubdtype(samples.dtype, np.integer):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32, copy=False)
