"""Lossy codecs, by FFmpeg through PyAV: each utterance encoded and decoded again, on the CPU."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepfake_utils.conventions import SAMPLE_RATE_HZ, ConfigError
from deepfake_utils.waveforms.decode import fit_length, to_int16


class Codec(NamedTuple):
    """One codec: FFmpeg's encoder, the container, which carries the delay to undo, and usual bit rates."""

    encoder: str
    container: str
    kilobits_per_s: tuple[int, ...]


CODECS = {
    "mp3": Codec("libmp3lame", "mp3", (16, 24, 32, 48, 64)),
    "opus": Codec("libopus", "ogg", (8, 12, 16, 24, 32)),
}


class CodecParams(NamedTuple):
    """Which codec, and the bit rate of each utterance, int64 (B,)."""

    codec: str
    kilobits_per_s: Tensor


def _pyav():
    """PyAV, imported where it is used: Kaggle's image is without it."""
    try:
        import av
    except ImportError:
        raise ConfigError("codecs need PyAV: pip install av, or choose a recipe without them") from None
    return av


def draw_codec(
    shape: tuple[int, int],
    generator: torch.Generator,
    *,
    codec: str,
    kilobits_per_s: tuple[int, ...] | None = None,
) -> CodecParams:
    """Draw each utterance's bit rate from a list, the codec's own by default.

    Raises:
        ConfigError: the codec is unknown, or this build of PyAV cannot encode it.
    """
    if codec not in CODECS:
        raise ConfigError(f"codec {codec!r} is unknown: expected one of {', '.join(CODECS)}")
    av, encoder = _pyav(), CODECS[codec].encoder
    if encoder not in av.codecs_available:
        raise ConfigError(
            f"codec {codec!r} needs the encoder {encoder}, which this build of PyAV {av.__version__} lacks: "
            "install PyAV's own wheel (pip install av) or leave the codec out"
        )
    rates = torch.tensor(kilobits_per_s or CODECS[codec].kilobits_per_s, device=generator.device)
    which = torch.randint(len(rates), shape[:1], generator=generator, device=generator.device)
    return CodecParams(codec, rates[which])


def apply_codec(waveform: Tensor, params: CodecParams) -> Tensor:
    """Encode and decode each utterance; the delay is undone and the length kept.

    Returns:
        (B, T) on the waveform's device, in [-1, 1].
    """
    kind = CODECS[params.codec]
    bits_per_s = (params.kilobits_per_s * 1000).tolist()
    with ThreadPoolExecutor() as pool:  # FFmpeg works outside Python's lock
        decoded = list(pool.map(_round_trip, waveform.cpu().numpy(), [kind] * len(bits_per_s), bits_per_s))
    return torch.from_numpy(np.stack(decoded)).to(waveform.device)


def _round_trip(utterance: np.ndarray, kind: Codec, bits_per_s: int) -> np.ndarray:
    file = io.BytesIO()
    _encode(file, to_int16(utterance), kind, bits_per_s)
    file.seek(0)
    decoded = _decode(file)
    # The containers state the encoder's delay and the length, and FFmpeg cuts the output by both.
    return fit_length(decoded, len(utterance)).clip(-1, 1)


def _encode(file: io.BytesIO, samples: np.ndarray, kind: Codec, bits_per_s: int) -> None:
    av = _pyav()
    with av.open(file, "w", format=kind.container) as container:
        stream = container.add_stream(kind.encoder, rate=SAMPLE_RATE_HZ)
        stream.codec_context.layout = "mono"
        stream.codec_context.bit_rate = bits_per_s
        stream.codec_context.format = av.Codec(kind.encoder, "w").audio_formats[0]
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _decode(file: io.BytesIO) -> np.ndarray:
    av = _pyav()
    with av.open(file) as container:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE_HZ)
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])
