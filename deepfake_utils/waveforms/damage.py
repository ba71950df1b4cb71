"""What is missing from a recording: refused where its header is binding, else said.

Decoders read a file that was cut, and skip what they cannot read, without a word.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from deepfake_utils.conventions import AudioError
from deepfake_utils.waveforms.recording import Recording

GAP_S = 0.02  # between the time stamps of neighbouring frames: more is a hole, less is rounding
WORTH_SAYING_S = 0.1  # of sound missing, where no hole was seen: less is an encoder's delay
PRIMING_SAMPLES = 4_096  # AAC encoders' delay, which headers may or may not count
CANNOT_BE_MEANT = 2**28  # bytes of samples that are promised and not there: their writer did not know the length
UNREAD_SHARE = 0.05  # of a file after its last packet

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"  # FFmpeg's name for it


class _Layout(NamedTuple):
    """How a format made of chunks writes itself."""

    first_chunk: int  # byte position
    header: struct.Struct  # of a chunk: name, length
    samples: bytes  # name of the chunk that holds them
    is_padded: bool  # to even lengths


_LAYOUTS = {
    b"RIFF": _Layout(12, struct.Struct("<4sI"), b"data", True),
    b"RF64": _Layout(12, struct.Struct("<4sI"), b"data", True),
    b"FORM": _Layout(12, struct.Struct(">4sI"), b"SSND", True),
    b"caff": _Layout(8, struct.Struct(">4sq"), b"data", False),
}
# What other recordings have in their first bytes, each long enough that no compressed sound holds it by chance.
_BEGINNINGS = (
    b"WAVEfmt ", b"WAVEJUNK", b"WAVEbext", b"AIFFCOMM", b"AIFCFVER", b"caff\0\1\0\0desc", b"ftypisom", b"ftypM4A ",
    b"ftypmp42",
)  # fmt: skip
_FLAC, _OGG = b"fLaC\0\0\0\x22", b"OggS\0\2\0\0\0\0\0\0\0\0"


def refuse_cut(recording: Recording) -> None:
    """Refuse a WAV, AIFF or CAF file that ends before its samples do.

    A length that cannot be meant is no promise: writers to a pipe state 0, or about 2 or 4 GiB, or a round number.
    """
    promise = _promise(recording)
    if promise is None:
        return
    promised, present = promise[0], recording.n_bytes - promise[1]
    if promised <= present:
        return
    if promised < CANNOT_BE_MEANT:
        raise AudioError(
            f"{recording.name} is truncated: its header promises {promised} bytes of samples, {present} are there; "
            "copy or download it again"
        )
    is_usual = min(abs(promised - 2**31), abs(promised - 2**32)) <= 2**20 + 1 or promised % 10**8 == 0
    if not is_usual and promised < 2**62:
        recording.say(
            f"its header promises {promised} bytes of samples and {present} are there: it was cut, or written by a "
            "program that did not know the length; what is there was read"
        )


def is_empty(recording: Recording) -> bool:
    """Whether a WAV header states 0 bytes of samples and means it: what follows, if anything, are other chunks."""
    promise = _promise(recording)
    if promise is None or promise[0] != 0:
        return False
    position = promise[1]
    while position < recording.n_bytes:
        recording.file.seek(position)
        header = recording.file.read(8)
        if not re.fullmatch(rb"[\w ]{4}.{4}", header, re.DOTALL):
            return False
        length = int.from_bytes(header[4:], "little")
        position += 8 + length + length % 2
    return position <= recording.n_bytes + 1  # one may leave its last padding out


def what_follows(recording: Recording, *, of_any_kind: bool) -> int | None:
    """Where another recording begins in the file, after the one that decoders read.

    Args:
        recording: an opened one.
        of_any_kind: False looks for the first one's kind alone in what is compressed, which is quicker.

    Returns:
        A byte in its beginning; None where there is none. Joined MP3 and Ogg, which are read to the end, are one.
    """
    start = _after_tag(recording)
    recording.file.seek(start)
    head = recording.file.read(16)
    own, others = (), (*_BEGINNINGS, _FLAC, _OGG)
    if head[:4] in _LAYOUTS:
        n_bytes, position = _promise(recording) or (0, 0)
        start = position + n_bytes if n_bytes > 0 else recording.n_bytes  # all is read where no length is stated
        own = others
    elif head[:4] == b"fLaC":
        start, own = _after_flac_header(recording, start + 4), (_FLAC,)
    elif head[4:8] == b"ftyp":
        own = (head[4:12],)
    elif head[:4] == b"OggS":
        others = _BEGINNINGS  # FLAC in Ogg has its own beginning in its first page
    elif head[:1] != b"\xff" or head[1:2] < b"\xe0":  # nor MPEG
        return None
    return _find(recording, max(start, 16), {*own, *others} if of_any_kind else own)


def _find(recording: Recording, start: int, signatures: Collection[bytes]) -> int | None:
    """The first place of one of these from a byte of the file on."""
    recording.file.seek(start)
    tail = b""
    while signatures and (block := recording.file.read(2**20)):
        block = tail + block
        if found := [at for signature in signatures if (at := block.find(signature)) >= 0]:
            return start + min(found)
        tail = block[-16:]
        start += len(block) - len(tail)
    return None


def _after_tag(recording: Recording) -> int:
    """Where the recording begins: behind an ID3 tag, if there is one."""
    recording.file.seek(0)
    head = recording.file.read(10)
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    return 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(head[6:]))


def _after_flac_header(recording: Recording, position: int) -> int:
    """Where the frames of a FLAC file begin; its metadata may hold pictures and headers of other formats."""
    while position < recording.n_bytes:
        recording.file.seek(position)
        kind, *length = recording.file.read(4).ljust(4, b"\x80")
        position += 4 + int.from_bytes(bytes(length))
        if kind & 0x80:
            break
    return position


def say_what_follows(recording: Recording) -> bool:
    """Whether another recording begins in the file after the first; if so, say it: decoders do not."""
    position = what_follows(recording, of_any_kind=False)
    if position is not None:
        share = position / recording.n_bytes
        recording.say(f"another recording begins at {share:.0%} of the file; only what is before it was read")
    return position is not None


class Losses:
    """Counts what FFmpeg could not decode or did not find, to refuse the recording or to say so at its end.

    An error in the last packets is no loss: streams end where they are cut.
    """

    def __init__(self, recording: Recording, container):
        self._recording, self._container = recording, container
        self._stream = container.streams.audio[0]
        self._n_good = self._n_failed = self._n_holes = 0
        self._good_bytes = self._failed_bytes = self._pending_bytes = 0  # pending: no good packet followed yet
        self._decoded_s = self._gaps_s = 0.0
        self._next_s: float | None = None  # where the next frame should begin
        self._first_byte: int | None = None
        self._last_byte = 0
        self._error = "invalid data"
        if len(container.streams.audio) > 1:
            recording.say(f"it holds {len(container.streams.audio)} audio streams; the first is read")

    def broke_off(self, error: Exception) -> None:
        """The container could not be read any further."""
        self._error = getattr(error, "strerror", None) or str(error)
        self._pending_bytes += 1

    def failed(self, packet) -> None:
        """A packet could not be decoded."""
        if any(tag in bytes(packet) for tag in (b"Xing", b"Info", b"VBRI")):
            self._next_s = None  # not sound: the header of an MP3 that was joined to the one before
            return
        self._n_failed += 1
        self._pending_bytes += max(packet.size, 1)

    def succeeded(self, packet, frames: list) -> None:
        """A packet gave these frames."""
        if packet.pos is not None and packet.size:
            self._first_byte = packet.pos if self._first_byte is None else self._first_byte
            self._last_byte = max(self._last_byte, packet.pos + packet.size)
        if not frames:
            return
        is_hole = self._pending_bytes > 0
        self._n_good += 1
        self._good_bytes += packet.size
        self._failed_bytes += self._pending_bytes
        self._pending_bytes = 0
        for frame in frames:
            duration_s = frame.samples / frame.sample_rate
            self._decoded_s += duration_s
            start_s = frame.time
            if start_s is None:
                continue
            if self._next_s is not None and start_s - self._next_s > GAP_S:
                self._gaps_s += start_s - self._next_s
                is_hole = True
            self._next_s = start_s + duration_s
        self._n_holes += is_hole

    def judge(self) -> None:
        """At the end of the stream: refuse what is no recording or was cut, say what was lost on the way.

        Raises:
            AudioError: most packets cannot be decoded, or a FLAC or MP4 header promises more than there is.
        """
        name = self._recording.name
        if self._n_failed > self._n_good or (not self._n_good and self._pending_bytes):
            raise AudioError(
                f"{name} cannot be decoded ({self._error}): it is damaged, truncated or not audio; "
                "copy or download it again"
            )
        bound_s = self._binding_s()
        if bound_s is not None and self._decoded_s + self._gaps_s < bound_s:
            raise AudioError(
                f"{name} is truncated: its header promises {bound_s:.2f} s, {self._decoded_s:.2f} s can be decoded; "
                "copy or download it again"
            )
        by_size_s = self._decoded_s * self._failed_bytes / max(self._good_bytes, 1)
        lost_s = max(self._gaps_s, by_size_s, self._counted_s() - self._decoded_s)
        if lost_s > (GAP_S if self._n_holes else WORTH_SAYING_S):
            where = f" in {self._n_holes} place{'s' * (self._n_holes > 1)}" if self._n_holes else ""
            self._recording.say(
                f"about {lost_s:.2f} s of sound are missing{where}: the file is damaged or was cut, or its sender left "
                "them out; what is there was read"
            )
        elif not say_what_follows(self._recording) and self._ended_early():
            unread = 1 - self._last_byte / self._recording.n_bytes
            self._recording.say(f"the last {unread:.0%} of the file were not read: it is damaged, or another follows")

    def _binding_s(self) -> float | None:
        """Seconds that a header promises and a whole file holds."""
        kind, stream = self._container.format.name, self._stream
        if kind not in ("flac", MP4) or not stream.duration:
            return None
        slack_samples = 0.5 if kind == "flac" else PRIMING_SAMPLES
        return float(stream.duration * stream.time_base) - slack_samples / stream.rate

    def _counted_s(self) -> float:
        """Seconds by what an Ogg file's pages or the first header of an MP3 count; 0 where nothing does."""
        if self._container.format.name == "ogg":
            return _ogg_samples(self._recording) / (48_000 if "opus" in self._stream.codec.name else self._stream.rate)
        if self._container.format.name == "mp3" and self._first_byte:
            n_before = min(1_500, self._first_byte)  # the Xing header is a frame before the first with sound
            self._recording.file.seek(self._first_byte - n_before)
            header = re.search(
                rb"(?:Xing|Info)...[\1\3\5\7\x09\x0b\x0d\x0f](.{4})", self._recording.file.read(n_before), re.S
            )
            frame_samples = 1_152 if self._stream.rate >= 32_000 else 576
            n_frames = int.from_bytes(header[1], "big") - 4 if header else 0  # up to four are delay and padding
            return n_frames * frame_samples / self._stream.rate
        return 0.0

    def _ended_early(self) -> bool:
        n_unread = self._recording.n_bytes - self._last_byte
        is_judge = len(self._container.streams) == 1 and self._container.format.name not in ("ogg", MP4)
        return is_judge and n_unread > max(4_096, UNREAD_SHARE * self._recording.n_bytes)


class FlacChecksum:
    """Compares samples with the MD5 sum in a FLAC header: FFmpeg decodes damaged frames all the same.

    The sum is that of the interleaved little-endian samples (RFC 9639, section 8.2); a header may leave it out.
    """

    def __init__(self, recording: Recording):
        recording.file.seek(0)
        header = recording.file.read(42)
        self._name, self._stated, self._sum = recording.name, header[26:42], None
        if header[:4] == b"fLaC" and any(self._stated):
            self._sum = hashlib.md5(usedforsecurity=False)
            self._n_bits = ((header[20] & 1) << 4 | header[21] >> 4) + 1

    def seen(self, samples: np.ndarray) -> np.ndarray:
        """Count integer samples (n, channels) in, and hand them back."""
        if self._sum is not None:
            words = (samples >> (8 * samples.itemsize - self._n_bits)).astype("<i4").reshape(-1, 1).view(np.uint8)
            self._sum.update(words[:, : (self._n_bits + 7) // 8].tobytes())
        return samples

    def judge(self) -> None:
        """Refuse the recording if the sums differ.

        Raises:
            AudioError: they do.
        """
        if self._sum is not None and self._sum.digest() != self._stated:
            raise AudioError(
                f"{self._name} is damaged: its samples do not match its own checksum; copy or download it again"
            )


def _promise(recording: Recording) -> tuple[int, int] | None:
    """Bytes of samples that a WAV, AIFF or CAF header promises, and the position they begin at."""
    file, long_length = recording.file, None
    file.seek(0)
    layout = _LAYOUTS.get(file.read(4))
    if layout is None:
        return None
    position, n_header = layout.first_chunk, layout.header.size
    while position + n_header <= recording.n_bytes:
        file.seek(position)
        name, length = layout.header.unpack(file.read(n_header))
        position += n_header
        if name == b"ds64":  # of RF64: lengths that do not fit into 32 bits
            long_length = int.from_bytes(file.read(16)[8:], "little")
        if name == layout.samples:
            return (long_length if long_length is not None and length == 2**32 - 1 else length), position
        if length < 0:
            return None
        position += length + (length % 2 if layout.is_padded else 0)
    return None


def _ogg_samples(recording: Recording) -> int:
    """Samples that the pages of an Ogg file count (their granules, RFC 3533), over all streams joined in it."""
    file, position = recording.file, 0
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    while position < recording.n_bytes:
        file.seek(position)
        page = file.read(27 + 255)
        if page[:4] != b"OggS" or len(page) < 27:
            found = (page + file.read(2**16)).find(b"OggS", 1)
            position += found if found > 0 else 2**16
            continue
        granule, serial = struct.unpack("<qI", page[6:18])
        position += 27 + page[26] + sum(page[27 : 27 + page[26]])
        if granule > 0 and position <= recording.n_bytes:  # a last page that was cut is no loss
            first.setdefault(serial, granule)
            last[serial] = max(granule, last.get(serial, 0))
    # A stream recorded from its middle counts from elsewhere; what its first page holds is not known then.
    return sum(last[serial] - (first[serial] if first[serial] > 480_000 else 0) for serial in last)
