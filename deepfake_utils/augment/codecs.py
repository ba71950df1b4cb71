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
    """One codec: FFmpeg's encoder, the container, bit rates, its rate, and the delay it does not undo by itself."""

    encoder: str
    container: str
    kilobits_per_s: tuple[float, ...]
    rate_hz: int = SAMPLE_RATE_HZ
    delay_samples: int = 0  # at 16 kHz


CODECS = {
    "mp3": Codec("libmp3lame", "mp3", (16, 24, 32, 48, 64)),
    "opus": Codec("libopus", "ogg", (8, 12, 16, 24, 32)),
    "aac": Codec("aac", "mp4", (16, 24, 32, 48, 64), delay_samples=1024),
    # of mobile telephones
    "amr": Codec("libopencore_amrnb", "amr", (4.75, 5.9, 7.4, 12.2), rate_hz=8_000, delay_samples=79),
}


class CodecParams(NamedTuple):
    """Which codec, and the bit rate of each utterance, (B,)."""

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
    kilobits_per_s: tuple[float, ...] | None = None,
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
    bits_per_s = (params.kilobits_per_s * 1000).round().long().tolist()
    with ThreadPoolExecutor() as pool:  # FFmpeg works outside Python's lock
        decoded = list(pool.map(_round_trip, waveform.cpu().numpy(), [kind] * len(bits_per_s), bits_per_s))
    return torch.from_numpy(np.stack(decoded)).to(waveform.device)


def _round_trip(utterance: np.ndarray, kind: Codec, bits_per_s: int) -> np.ndarray:
    file = io.BytesIO()
    _encode(file, to_int16(utterance), kind, bits_per_s)
    file.seek(0)
    # Where no delay is given here, the container states it and the length, and FFmpeg cuts the output by both.
    decoded = _decode(file)[kind.delay_samples :]
    return fit_length(decoded, len(utterance)).clip(-1, 1)


def _encode(file: io.BytesIO, samples: np.ndarray, kind: Codec, bits_per_s: int) -> None:
    av = _pyav()
    with av.open(file, "w", format=kind.container) as container:
        stream = container.add_stream(kind.encoder, rate=kind.rate_hz)
        stream.codec_context.layout = "mono"
        stream.codec_context.bit_rate = bits_per_s
        stream.codec_context.format = sample_format = av.Codec(kind.encoder, "w").audio_formats[0]
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        resampler = av.AudioResampler(format=sample_format, layout="mono", rate=kind.rate_hz)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))


def _decode(file: io.BytesIO) -> np.ndarray:
    av = _pyav()
    with av.open(file) as container:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE_HZ)
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])
