"""Decoding, resampling and cropping against files written here: every format and every kind of damage."""

import io
import os
import re
import struct
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from deepfake_utils.conventions import AudioError
from deepfake_utils.waveforms import decoders
from deepfake_utils.waveforms import resample as resample_module
from deepfake_utils.waveforms.decode import (
    AudioWarning,
    audio_info,
    fit_length,
    from_int16,
    iter_audio,
    read_audio,
    resample,
    to_int16,
)
from deepfake_utils.waveforms.recording import opened


@pytest.fixture
def speech_like():
    """Three seconds of 16-bit noise with a slow envelope, so that no two samples' neighbourhoods are alike."""
    rng = np.random.default_rng(0)
    envelope = 0.5 + 0.5 * np.sin(np.arange(48_000) / 4_000)
    return (rng.standard_normal(48_000) * envelope * 3_000).astype(np.int16)


def by_ffmpeg(path):
    """Samples (n, channels) of FFmpeg, also where libsndfile would be asked first."""
    with opened(path) as recording:
        return np.concatenate([block for block, _ in decoders._pyav_blocks(recording)])


def tone(frequency_hz, rate_hz, seconds=1.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency_hz * np.arange(int(seconds * rate_hz)) / rate_hz)


def level_db(waveform, amplitude=0.5):
    """Level of the middle half against a sine of the given amplitude."""
    middle = waveform[len(waveform) // 4 : 3 * len(waveform) // 4]
    return 20 * np.log10(np.sqrt(2 * np.mean(middle.astype(float) ** 2)) / amplitude + 1e-12)


def write_lossy(path, waveform, rate_hz, codec, layout="mono"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.atleast_2d(waveform).astype(np.float32), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def encoded(waveform, rate_hz, codec, container, counted=True, **options):
    """The bytes of a file, as FFmpeg writes it; waveform (n,) or (channels, n). MP3 not `counted` is as from a pipe."""
    file, samples = io.BytesIO(), np.atleast_2d(waveform).astype(np.float32)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    with av.open(file, "w", format=container, options={} if counted else {"write_xing": "0"}) as out:
        stream = out.add_stream(codec, rate=rate_hz, layout=layout, options={"strict": "-2", **options})
        fifo = av.AudioResampler(format=stream.codec_context.format or "fltp", layout=layout, rate=rate_hz)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
        for part in [*fifo.resample(frame), *fifo.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return file.getvalue()


def without_word(source, **settings):
    """Read a recording about which there is nothing to say."""
    notes = []
    waveform = read_audio(source, notes=notes, **settings)
    assert notes == []
    return waveform


def with_note(source, pattern):
    notes = []
    waveform = read_audio(source, notes=notes)
    assert len(notes) == 1 and re.search(pattern, notes[0]), notes
    return waveform


def overwritten(content, share, n_bytes=3_000):
    start = int(len(content) * share)
    return content[:start] + np.random.default_rng(9).bytes(n_bytes) + content[start + n_bytes :]


def flac_frames(content):
    """Byte positions of a FLAC file's frames: sync code, and a header whose CRC-8 holds."""

    def crc8(header):
        value = 0
        for byte in header:
            value ^= byte
            for _ in range(8):
                value = ((value << 1) ^ 0x07) & 0xFF if value & 0x80 else value << 1
        return value

    return [
        i
        for i in range(42, len(content) - 16)
        if content[i] == 0xFF and content[i + 1] & 0xFE == 0xF8
        if any(crc8(content[i : i + n]) == content[i + n] for n in (5, 6, 7))
    ]


# Formats


@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_16_bit_16_khz_comes_out_exactly(tmp_path, speech_like, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, speech_like, 16_000, subtype="PCM_16")
    waveform = read_audio(path)
    assert waveform.dtype == np.float32 and waveform.shape == (48_000,)
    np.testing.assert_array_equal(waveform, speech_like / np.float32(32_768))
    np.testing.assert_array_equal(to_int16(waveform), speech_like)
    assert audio_info(path) == (48_000, 3.0, 16_000, True)


def test_both_decoders_agree_bit_for_bit_on_real_flac(reference_data):
    paths = sorted((reference_data / "asvspoof2019_subset").glob("LA/*/flac/*.flac"))[::20]
    assert len(paths) > 8
    for path in paths:
        ours = by_ffmpeg(path)
        np.testing.assert_array_equal(ours[:, 0], soundfile.read(path, dtype="float32")[0])
        assert len(ours) == audio_info(path).n_samples


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000])
def test_any_rate_keeps_pitch_level_and_length(tmp_path, rate_hz):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1_000, rate_hz, 2.0), rate_hz, subtype="PCM_24")
    waveform = read_audio(path)
    assert len(waveform) == audio_info(path).n_samples == 32_000
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(32_000)))
    assert spectrum.argmax() == 2_000  # bins of 0.5 Hz
    assert level_db(waveform) == pytest.approx(0, abs=0.01)


def test_96_khz_stereo_24_bit_is_averaged_and_converted(tmp_path):
    path = tmp_path / "a.flac"
    left, right = tone(440, 96_000), tone(3_000, 96_000)
    soundfile.write(path, np.stack([left, right], axis=1), 96_000, subtype="PCM_24")
    expected = (tone(440, 16_000) + tone(3_000, 16_000)) / 2
    np.testing.assert_allclose(read_audio(path)[2_000:-2_000], expected[2_000:-2_000], atol=1e-4)


@pytest.mark.parametrize(("suffix", "codec"), [("mp3", "mp3"), ("m4a", "aac"), ("opus", "libopus")])
@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
def test_lossy_formats(tmp_path, suffix, codec, rate_hz):
    path = tmp_path / f"a.{suffix}"
    write_lossy(path, tone(700, rate_hz, 2.0), rate_hz, codec)
    waveform = read_audio(path)
    assert len(waveform) == pytest.approx(32_000, abs=3_500)  # encoders pad to whole frames
    assert abs(len(waveform) - audio_info(path).n_samples) < 3_500
    assert level_db(waveform) == pytest.approx(0, abs=1.0)
    assert np.abs(np.fft.rfft(waveform)).argmax() * 16_000 / len(waveform) == pytest.approx(700, abs=1)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_format_has_the_same_scale_in_both_decoders(tmp_path, subtype):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(300, 16_000), 16_000, subtype=subtype)
    np.testing.assert_allclose(by_ffmpeg(path), soundfile.read(path, dtype="float32", always_2d=True)[0], atol=1e-7)
    assert level_db(read_audio(path)) == pytest.approx(0, abs=0.1)


# Resampling


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_filter_is_flat_in_its_passband_and_rejects_aliases(rate_hz):
    edge_hz = min(rate_hz, 16_000) / 2
    for fraction in (0.1, 0.5, 0.9, 0.94):
        assert abs(level_db(resample(tone(fraction * edge_hz, rate_hz), rate_hz))) < 0.01
    for fraction in (1.01, 1.1, 1.3):
        if fraction * edge_hz < rate_hz / 2:
            assert level_db(resample(tone(fraction * edge_hz, rate_hz), rate_hz)) < -80


def test_upsampling_leaves_no_image_above_the_old_band():
    spectrum = np.abs(np.fft.rfft(resample(tone(3_000, 8_000, 2.0), 8_000) * np.hanning(32_000)))
    image = spectrum[2 * 4_100 :].max()
    assert 20 * np.log10(image / spectrum.max()) < -80


# What is refused, and what is not


def test_silence_and_a_single_sample_are_recordings(tmp_path):
    soundfile.write(tmp_path / "silent.flac", np.zeros(1_000), 16_000)
    soundfile.write(tmp_path / "one.wav", np.array([0.25]), 16_000)
    soundfile.write(tmp_path / "one_8k.wav", np.array([0.25]), 8_000)
    np.testing.assert_array_equal(read_audio(tmp_path / "silent.flac"), np.zeros(1_000))
    np.testing.assert_array_equal(read_audio(tmp_path / "one.wav"), [0.25])
    assert read_audio(tmp_path / "one_8k.wav").shape == (2,)


def test_overshoot_is_clipped(tmp_path):
    soundfile.write(tmp_path / "loud.wav", tone(440, 16_000, amplitude=1.5), 16_000, subtype="FLOAT")
    waveform = read_audio(tmp_path / "loud.wav")
    assert waveform.max() == 1.0 and waveform.min() == -1.0


def _wav(samples, rate_hz=16_000, subtype="FLOAT"):
    return lambda path: soundfile.write(path, samples, rate_hz, subtype=subtype, format="WAV")


def _bytes(content):
    return lambda path: path.write_bytes(content)


def _shortened(suffix, keep):
    def write(path):
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 30_000), 16_000, format=suffix)
        path.write_bytes(path.read_bytes()[:keep])

    return write


DAMAGED = {
    "empty file": (_bytes(b""), "empty"),
    "no samples": (_wav(np.zeros(0)), "no samples"),
    "text": (_bytes(b"404 not found\n" * 50), "not audio"),
    "web page": (_bytes(b"<html>404 not found</html>" * 50), "is a web page"),
    "random bytes": (_bytes(np.random.default_rng(1).bytes(20_000)), "not audio"),
    "flac mark only": (_bytes(b"fLaC" + np.random.default_rng(2).bytes(5_000)), "not audio"),
    "not a number": (_wav(np.array([0.0, np.nan, 0.0])), "NaN"),
    "infinite": (_wav(np.array([0.0, np.inf, 0.0])), "NaN or infinite"),
    "integers as floats": (_wav(np.array([0.0, 20_000.0, -20_000.0])), "integers as floats"),
    "absurdly low rate": (_wav(np.zeros(100), 100), "100 Hz"),
    "cut wav": (_shortened("WAV", 20_000), "truncated"),
    "cut wav header": (_shortened("WAV", 30), "no samples|truncated|not audio"),
    "cut flac": (_shortened("FLAC", 20_000), "truncated"),
    "cut flac header": (_shortened("FLAC", 60), "truncated|no samples"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_an_audio_error_that_names_the_file(tmp_path, case):
    write, reason = DAMAGED[case]
    path = tmp_path / "bad utterance.wav"
    write(path)
    with pytest.raises(AudioError, match=reason) as caught:
        read_audio(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("place, value", [(34, b"\0\0"), (20, b"\xfe\xff")], ids=["no bits", "unknown format"])
def test_a_header_without_a_decoder_is_an_audio_error(tmp_path, place, value):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(700, 16_000, 1.0), 16_000, subtype="PCM_16")
    content = path.read_bytes()
    path.write_bytes(content[:place] + value + content[place + 2 :])
    for read in (audio_info, read_audio):
        with pytest.raises(AudioError, match="cannot be decoded"):
            read(path)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_cut_m4a_is_refused(tmp_path, keep):
    path = tmp_path / "a.m4a"
    write_lossy(path, tone(700, 16_000, 4.0), 16_000, "aac")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(AudioError, match="a.m4a"):
        read_audio(path)


def test_missing_files_folders_and_videos_without_sound(tmp_path):
    (tmp_path / "link.wav").symlink_to(tmp_path / "gone.wav")
    for path, reason in [
        (tmp_path / "no.flac", "does not exist"),
        (tmp_path / "link.wav", "broken link"),
        (tmp_path, "folder"),
    ]:
        with pytest.raises(AudioError, match=reason):
            read_audio(path)
        with pytest.raises(AudioError, match=reason):
            audio_info(path)
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    with pytest.raises(AudioError, match="no audio stream"):
        read_audio(tmp_path / "mute.mp4")


@pytest.mark.parametrize("where", ["body", "sync code"])
def test_flac_with_a_damaged_frame_is_refused_not_shortened(tmp_path, speech_like, where):
    path = tmp_path / "a.flac"
    soundfile.write(path, speech_like, 16_000)
    content = bytearray(path.read_bytes())
    frame = flac_frames(content)[4]
    content[frame + (200 if where == "body" else 0)] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(AudioError, match="a.flac .*(damaged|truncated)"):
        read_audio(path)


@pytest.mark.parametrize("i_frame", [1, 4])
def test_flac_that_libsndfile_cannot_read_is_decoded_bit_for_bit(tmp_path, speech_like, i_frame):
    """A stray byte between two frames: libsndfile loses sync, as on a third of ASVspoof 2021; FFmpeg does not."""
    path = tmp_path / "a.flac"
    soundfile.write(path, speech_like, 16_000)
    content = path.read_bytes()
    frame = flac_frames(content)[i_frame]
    path.write_bytes(content[:frame] + bytes(1) + content[frame:])
    with pytest.raises(soundfile.LibsndfileError, match="lost sync"):
        soundfile.read(path)
    np.testing.assert_array_equal(to_int16(read_audio(path)), speech_like)


@pytest.mark.parametrize(("subtype", "n_channels"), [("PCM_S8", 1), ("PCM_16", 2), ("PCM_24", 2)])
def test_the_checksum_is_verified_for_every_depth_and_channel_count(tmp_path, subtype, n_channels):
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(4).uniform(-0.5, 0.5, (20_000, n_channels))
    soundfile.write(path, noise, 16_000, subtype=subtype)
    content = bytearray(path.read_bytes())
    assert any(content[26:42])
    np.testing.assert_array_equal(by_ffmpeg(path), soundfile.read(path, dtype="float32", always_2d=True)[0])
    content[30] ^= 0xFF  # of the MD5 sum itself
    path.write_bytes(content)
    with pytest.raises(AudioError, match="a.flac is damaged.*checksum"):
        by_ffmpeg(path)


def test_flac_of_unstated_length(tmp_path, speech_like):
    """An encoder that writes to a pipe leaves the number of samples at 0."""
    path = tmp_path / "a.flac"
    soundfile.write(path, speech_like, 16_000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    np.testing.assert_array_equal(to_int16(read_audio(path)), speech_like)
    assert audio_info(path) == (48_000, 3.0, 16_000, True)


def test_wav_written_to_a_pipe(tmp_path, speech_like):
    path = tmp_path / "a.wav"
    header = b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    path.write_bytes(header + b"data\xff\xff\xff\xff" + speech_like.tobytes())
    np.testing.assert_array_equal(to_int16(read_audio(path)), speech_like)


def test_many_threads_read_the_same_numbers(tmp_path):
    rng = np.random.default_rng(3)
    rates = [8_000, 16_000, 22_050, 44_100] * 6
    for i, rate_hz in enumerate(rates):
        soundfile.write(tmp_path / f"{i}.flac", rng.uniform(-0.5, 0.5, rate_hz // 4), rate_hz)
    write_lossy(tmp_path / "24.m4a", tone(500, 16_000), 16_000, "aac")
    paths = [tmp_path / f"{i}.flac" for i in range(24)] + [tmp_path / "24.m4a"]
    resample_module._low_pass.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(read_audio, paths * 4))
    for i, path in enumerate(paths * 4):
        np.testing.assert_array_equal(together[i], read_audio(path))


# A header's length is an estimate


def speech_for(rate_hz, seconds=4.0):
    """A tone in syllables over a little noise: what codecs of speech keep."""
    n = int(rate_hz * seconds)
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * np.arange(n) / rate_hz)
    return 0.3 * envelope * np.sin(2 * np.pi * 300 * np.arange(n) / rate_hz) + 0.01 * np.random.default_rng(1).normal(
        size=n
    )


def vbr_mp3_from_a_pipe(rate_hz=44_100, seconds=8.0):
    """Variable rate, its first frames the largest, and no header that counts the frames."""
    loud_first = 0.3 * np.random.default_rng(0).normal(size=int(rate_hz * seconds))
    loud_first[rate_hz:] *= 1e-3
    return encoded(
        loud_first, rate_hz, "libmp3lame", "mp3", q="2", global_quality="236", flags="+qscale", counted=False
    )


@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_variable_rate_mp3_written_to_a_pipe_is_read_to_its_end(rate_hz):
    content = vbr_mp3_from_a_pipe(rate_hz)
    assert len(without_word(content)) == pytest.approx(8 * 16_000, abs=3_000)
    assert not audio_info(content).is_exact


JOINED = {
    "mp3": ("libmp3lame", 44_100),
    "adts": ("aac", 44_100),
    "ogg": ("libopus", 48_000),
    "mpegts": ("aac", 48_000),
    "ac3": ("ac3", 48_000),
}


@pytest.mark.parametrize("container", JOINED)
def test_recordings_joined_one_after_the_other_are_all_read(container):
    codec, rate_hz = JOINED[container]
    content = encoded(speech_for(rate_hz, 1.0), rate_hz, codec, container)
    assert len(without_word(content * 3)) == pytest.approx(3 * 16_000, abs=0.1 * 3 * 16_000)


def test_joined_mp3s_of_other_rate_and_channels():
    mono = encoded(speech_for(16_000, 2.0), 16_000, "libmp3lame", "mp3")
    stereo = encoded(np.stack([speech_for(44_100, 2.0)] * 2), 44_100, "libmp3lame", "mp3")
    waveform = with_note(mono + stereo, "rate changes from 16000 to 44100")
    assert len(waveform) == pytest.approx(4 * 16_000, abs=3_000)
    halves = np.sqrt(np.mean(waveform[:60_000].reshape(2, -1) ** 2, axis=1))
    assert halves[0] == pytest.approx(halves[1], rel=0.15)


@pytest.mark.parametrize(("container", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("aiff", "pcm_s16be")])
def test_joined_files_of_which_decoders_read_the_first_are_said(container, codec):
    content = encoded(speech_for(16_000, 2.0), 16_000, codec, container)
    assert len(with_note(content * 2, "another recording begins at 50%")) == 32_000


def wav_that_states(data_bytes, samples, riff_bytes=None, between=b"", after=b""):
    riff_bytes = min(2**32 - 1, data_bytes + 36) if riff_bytes is None else riff_bytes
    header = (
        b"RIFF" + struct.pack("<I", riff_bytes) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    )
    return header + between + b"data" + struct.pack("<I", data_bytes) + samples.tobytes() + after


@pytest.mark.parametrize(
    "stated", [0, 2_000_000_000, 1_000_000_000, 0x7FEFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFF00, 0xFFFFFFFF]
)
@pytest.mark.parametrize("between", [b"", b"LIST\x04\x00\x00\x00INFO"])
def test_wav_of_a_streaming_server_states_no_length(speech_like, stated, between):
    for riff_bytes in (None, 0):
        content = wav_that_states(stated, speech_like, riff_bytes, between)
        np.testing.assert_array_equal(to_int16(without_word(content)), speech_like)
        assert audio_info(content).n_samples == 48_000


def test_a_wav_without_samples_is_empty_whatever_follows():
    for after in (b"", b"LIST\x04\x00\x00\x00INFO", b"LIST\x04\x00\x00\x00INFOid3 \x03\x00\x00\x00abc\x00"):
        with pytest.raises(AudioError, match="holds no samples"):
            read_audio(wav_that_states(0, np.zeros(0, np.int16), 36 + len(after), b"", after))


def test_a_long_wav_that_was_cut_is_read_and_said(speech_like):
    waveform = with_note(wav_that_states(400_123_456, speech_like), "promises 400123456 bytes .* 96000 are there")
    np.testing.assert_array_equal(to_int16(waveform), speech_like)


@pytest.mark.parametrize(("kind", "at", "length"), [
    ("AU", 8, b"\xff\xff\xff\xff"), ("AU", 8, b"\x7f\xff\xff\xff"), ("AIFF", b"SSND", b"\xff\xff\xff\xff"),
    ("AIFF", b"SSND", b"\x7f\xff\xff\xff"), ("CAF", b"data", b"\xff" * 8), ("W64", 8, b"\xff" * 8),
])  # fmt: skip
def test_other_formats_that_state_no_length(speech_like, kind, at, length):
    file = io.BytesIO()
    soundfile.write(file, speech_like, 16_000, format=kind, subtype="PCM_16")
    content = bytearray(file.getvalue())
    at = content.index(at) + 4 if isinstance(at, bytes) else at
    content[at : at + len(length)] = length
    if kind != "W64":
        np.testing.assert_array_equal(to_int16(without_word(bytes(content))), speech_like)


@pytest.mark.parametrize("kind", ["AIFF", "CAF", "RF64"])
def test_other_formats_that_were_cut_are_refused(speech_like, kind):
    file = io.BytesIO()
    soundfile.write(file, speech_like, 16_000, format=kind, subtype="PCM_16")
    with pytest.raises(AudioError, match="truncated"):
        read_audio(file.getvalue()[:60_000])


LOSSY = {
    "mp3": ("libmp3lame", 16_000),
    "adts": ("aac", 16_000),
    "ogg": ("libopus", 48_000),
    "webm": ("libopus", 48_000),
    "matroska": ("aac", 48_000),
    "mp4": ("aac", 48_000),
    "mpegts": ("aac", 16_000),
    "ac3": ("ac3", 48_000),
}


@pytest.mark.parametrize("name", LOSSY)
def test_what_is_lost_in_a_stream_is_said(name):
    codec, rate_hz = LOSSY[name]
    content = encoded(speech_for(rate_hz, 5.0), rate_hz, codec, name)
    assert len(without_word(content)) == pytest.approx(5 * 16_000, abs=3_000)
    waveform = with_note(overwritten(content, 0.6), "s of sound are missing in 1|of the file were not read")
    assert len(waveform) > 2 * 16_000


def test_holes_in_vorbis_are_said():
    file = io.BytesIO()
    soundfile.write(file, speech_for(48_000, 8.0), 48_000, format="OGG", subtype="VORBIS")
    assert len(without_word(file.getvalue())) == 128_000
    waveform = with_note(overwritten(file.getvalue(), 0.5), "s of sound are missing")
    assert 3 * 16_000 < len(waveform) < 128_000


@pytest.mark.parametrize("name", ["mp3", "adts", "ogg", "webm"])
def test_an_error_in_the_last_packet_is_no_damage(name):
    codec, rate_hz = LOSSY[name]
    content = encoded(speech_for(rate_hz, 4.0), rate_hz, codec, name, counted=False)
    assert len(without_word(content[:-40])) > 2.5 * 16_000
    assert len(without_word(content + b"TAG" + bytes(40))) == pytest.approx(4 * 16_000, abs=3_000)


def test_an_mp3_shorter_than_its_own_count_is_said():
    content = encoded(speech_for(16_000, 8.0), 16_000, "libmp3lame", "mp3")
    assert len(with_note(content[: len(content) // 2], "about (3.9|4.0). s of sound are missing")) < 4.1 * 16_000


# Formats of every kind, whole and in blocks

FORMATS = [
    ("wav", "pcm_u8", 8_000, 1), ("wav", "pcm_s24le", 48_000, 2), ("wav", "pcm_s32le", 44_100, 6),
    ("wav", "pcm_f32le", 22_050, 1), ("wav", "pcm_f64le", 96_000, 2), ("wav", "pcm_mulaw", 8_000, 1),
    ("wav", "pcm_alaw", 8_000, 2), ("wav", "adpcm_ms", 22_050, 1), ("wav", "adpcm_ima_wav", 11_025, 2),
    ("wav", "libmp3lame", 44_100, 1), ("flac", "flac", 192_000, 2), ("flac", "flac", 12_000, 1),
    ("mp3", "libmp3lame", 24_000, 2), ("ogg", "libopus", 48_000, 2), ("webm", "libopus", 48_000, 1),
    ("mp4", "aac", 32_000, 2), ("ipod", "alac", 44_100, 2), ("mov", "pcm_s16le", 48_000, 1),
    ("3gp", "libopencore_amrnb", 8_000, 1), ("amr", "libopencore_amrnb", 8_000, 1), ("caf", "pcm_s16le", 44_100, 2),
    ("au", "pcm_mulaw", 8_000, 1), ("aiff", "pcm_s16be", 44_100, 1), ("w64", "pcm_s16le", 16_000, 1),
    ("matroska", "pcm_s16le", 16_000, 1), ("avi", "mp2", 48_000, 2), ("adts", "aac", 24_000, 1),
    ("ac3", "ac3", 48_000, 6),
]  # fmt: skip


@pytest.mark.parametrize(("container", "codec", "rate_hz", "n_channels"), FORMATS)
def test_every_format_is_read_alike_from_file_bytes_and_in_blocks(tmp_path, container, codec, rate_hz, n_channels):
    options = {"b": "12200"} if "amr" in codec else {}
    content = encoded(np.stack([speech_for(rate_hz, 1.5)] * n_channels), rate_hz, codec, container, **options)
    path = tmp_path / "a recording without a suffix"
    path.write_bytes(content)
    waveform = without_word(path)
    assert len(waveform) == pytest.approx(1.5 * 16_000, abs=3_500)
    assert np.abs(np.fft.rfft(waveform)).argmax() * 16_000 / len(waveform) == pytest.approx(300, abs=7)
    np.testing.assert_array_equal(without_word(content), waveform)
    info = audio_info(path)
    assert abs(info.n_samples - len(waveform)) <= (0 if info.is_exact else 3_500)
    for block_s in (0.0999, 60.0):
        blocks = list(iter_audio(path, block_s, notes=(notes := [])))
        assert {len(block) for block in blocks[:-1]} <= {round(block_s * 16_000)} and notes == []
        np.testing.assert_array_equal(np.concatenate(blocks), waveform)
    np.testing.assert_array_equal(read_audio(path, max_samples=9_000), waveform[:9_000])


@given(
    rate_hz=st.sampled_from([8_000, 11_025, 12_000, 22_050, 44_100, 48_000, 44_101, 37_800]),
    cuts=st.lists(st.integers(0, 30_000), max_size=6),
    n=st.integers(1, 30_000),
)
@settings(max_examples=30, deadline=None)
def test_the_resampler_gives_the_same_bits_whatever_the_blocks(rate_hz, cuts, n):
    waveform = np.random.default_rng(n).normal(size=n)
    resampler = resample_module.Resampler(rate_hz)
    blocks = np.split(waveform, sorted(min(cut, n) for cut in cuts))
    parts = [resampler.push(block) for block in blocks]
    together = np.concatenate([*parts, resampler.finish()])
    np.testing.assert_array_equal(together, resample(waveform, rate_hz))


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 24_000, 44_100, 48_000, 192_000, 44_101])
def test_resampling_is_scipys_polyphase_filter(rate_hz):
    waveform = np.random.default_rng(0).normal(size=rate_hz + 123)
    divisor = np.gcd(rate_hz, 16_000)
    up, down = 16_000 // divisor, rate_hz // divisor
    expected = resample_poly(waveform, up, down, window=resample_module._low_pass(up, down))
    np.testing.assert_allclose(resample(waveform, rate_hz), expected, rtol=0, atol=1e-12)


# Where recordings come from


def test_standard_input_bytes_and_files(tmp_path, speech_like, monkeypatch):
    path = tmp_path / "a.flac"
    soundfile.write(path, speech_like, 16_000)
    expected = read_audio(path)
    with path.open("rb") as file:
        np.testing.assert_array_equal(read_audio(file), expected)
        np.testing.assert_array_equal(read_audio(file), expected)  # left open, and rewound
    np.testing.assert_array_equal(read_audio(str(path)), expected)
    with path.open("rb") as file, monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", io.TextIOWrapper(file))
        np.testing.assert_array_equal(read_audio("-"), expected)


@pytest.mark.parametrize(("container", "codec"), [("wav", "pcm_s16le"), ("mp3", "libmp3lame"), ("mp4", "aac")])
def test_a_pipe_is_read(container, codec):
    content = encoded(speech_for(16_000), 16_000, codec, container)
    code = (
        "import sys; from deepfake_utils.waveforms.decode import read_audio; sys.stdout.buffer.write(read_audio('-'))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=True)
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.float32), read_audio(content))


@pytest.mark.parametrize("address", ["http://example.org/a.wav", "https://example.org/a.mp3", "s3://bucket/a.flac"])
def test_addresses_are_refused_in_words(address):
    with pytest.raises(AudioError, match=f"{address} is an address.*download"):
        read_audio(address)


@pytest.mark.parametrize(
    "name", [b"caf\xe9.mp3", b"a:b.mp3", b"{x} 'y' \"z\".mp3", b"two\nlines.mp3", b"concat:x|y.mp3", b"%03d.mp3"]
)
def test_names_are_bytes(tmp_path, name):
    content = encoded(speech_for(16_000), 16_000, "libmp3lame", "mp3")
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(content)
    np.testing.assert_array_equal(read_audio(os.fsdecode(path)), read_audio(content))
    with open(path, "wb") as file:
        file.write(b"nothing that sounds")
    with pytest.raises(AudioError) as caught:
        read_audio(os.fsdecode(path))
    str(caught.value).encode()


def test_a_playlist_opens_nothing(tmp_path):
    (tmp_path / "secret.wav").write_bytes(encoded(speech_for(16_000), 16_000, "pcm_s16le", "wav"))
    for text in (
        f"#EXTM3U\n#EXTINF:4,\n{tmp_path}/secret.wav\n",
        f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n",
    ):
        path = tmp_path / "list.m3u8"
        path.write_text(text)
        with pytest.raises(AudioError):
            read_audio(path)


def test_decoders_leave_standard_error_alone(capfd):
    """mpg123, within libsndfile, writes of an MP3 whose header counts other bytes than there are."""
    counted = encoded(speech_for(16_000, 6.0), 16_000, "libmp3lame", "mp3")
    for content in (counted[: len(counted) // 2], counted + counted):
        assert len(read_audio(content, notes=[])) > 40_000
        assert audio_info(content).rate_hz == 16_000
    assert capfd.readouterr() == ("", "")


def test_mp3_without_pyav_is_read_as_far_as_its_header_counts(monkeypatch, tmp_path):
    counted = encoded(speech_for(16_000), 16_000, "libmp3lame", "mp3")
    aac = encoded(speech_for(16_000), 16_000, "aac", "adts")
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(with_note(counted, "without PyAV .pip install av.")) == pytest.approx(64_000, abs=2_400)
    assert audio_info(counted).duration_s == pytest.approx(4.0, abs=0.2)
    for read in (read_audio, audio_info):
        with pytest.raises(AudioError, match="PyAV, which may be able to, is not installed: pip install av"):
            read(aac)


# Channels, memory


@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
@pytest.mark.parametrize(("share", "channel"), [(-1.0, 1), (-0.9, 1), (-1.2, 2)])
def test_channels_of_opposite_polarity_do_not_cancel(rate_hz, share, channel):
    left = speech_for(rate_hz, 12.0)
    content = encoded(np.stack([left, share * left]), rate_hz, "pcm_f32le", "wav")
    waveform = with_note(content, f"cancel each other.*from 0 s on channel {channel}")
    louder = left if channel == 1 else share * left
    np.testing.assert_allclose(waveform, resample(louder.astype(np.float32), rate_hz), atol=1e-6)
    np.testing.assert_array_equal(np.concatenate(list(iter_audio(content, 1.3, notes=[]))), waveform)
    np.testing.assert_array_equal(read_audio(content, max_samples=4_000, notes=[]), waveform[:4_000])


def test_unlike_channels_are_averaged_without_a_word():
    rng = np.random.default_rng(5)
    voice, music = speech_for(16_000), 0.1 * rng.normal(size=64_000)
    for channels in ([voice, 0 * voice], [voice, music], [voice + music, voice - music], [0 * voice] * 2, [voice] * 6):
        waveform = without_word(encoded(np.stack(channels), 16_000, "pcm_f32le", "wav"))
        np.testing.assert_allclose(waveform, np.mean(channels, axis=0), atol=1e-6)


def test_memory_that_runs_out_is_not_called_damage(monkeypatch, speech_like):
    def no_memory(*_, **__):
        raise MemoryError

    content = encoded(speech_for(16_000), 16_000, "libmp3lame", "mp3")
    monkeypatch.setattr(decoders, "_samples_of", no_memory)
    with pytest.raises(AudioError, match="more memory than there is.*nothing is wrong with the file"):
        read_audio(content)
    monkeypatch.setattr(soundfile.SoundFile, "read", no_memory)
    with pytest.raises(AudioError, match="more memory than there is.*nothing is wrong with the file"):
        read_audio(wav_that_states(96_000, speech_like))


def test_a_lying_header_takes_no_memory(speech_like):
    """A FLAC header that promises a year of sound."""
    file = io.BytesIO()
    soundfile.write(file, speech_like, 16_000, format="FLAC")
    content = bytearray(file.getvalue())
    content[21] |= 0x0F
    with pytest.raises(AudioError, match="truncated"):
        read_audio(bytes(content))


def test_a_wanted_length_ends_decoding(monkeypatch):
    content = encoded(speech_for(16_000, 60.0), 16_000, "libmp3lame", "mp3")
    decoded = []
    samples_of = decoders._samples_of
    monkeypatch.setattr(decoders, "_samples_of", lambda frames: decoded.append(1) or samples_of(frames))
    assert len(read_audio(content, max_samples=64_600)) == 64_600
    assert len(decoded) <= 12  # seconds: sound is mixed in blocks of ten


def test_memory_does_not_grow_with_the_length(tmp_path):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 48_000, 2, "PCM_16") as sound:
        block = np.random.default_rng(0).normal(0, 0.1, (48_000 * 15, 2)).astype(np.float32)
        for _ in range(4):
            sound.write(block)
    code = (
        "import resource, sys; from deepfake_utils.waveforms.decode import iter_audio\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "next(iter_audio(sys.argv[1])); before = peak(); n = sum(len(block) for block in iter_audio(sys.argv[1]))\n"
        "print(n, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    n_samples, grown_mib = done.stdout.split()
    assert int(n_samples) == 60 * 16_000 and float(grown_mib) < 40


def test_without_a_list_notes_are_warnings():
    with pytest.warns(AudioWarning, match="a recording of .* bytes: averaged, its 2 channels cancel"):
        read_audio(encoded(np.stack([speech_for(16_000), -speech_for(16_000)]), 16_000, "pcm_s16le", "wav"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_audio(encoded(speech_for(16_000), 16_000, "libmp3lame", "mp3"))


def test_recordings_are_decoded_without_loading_torch():
    code = "import sys, deepfake_utils.waveforms.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Lengths


@given(n=st.integers(1, 300), n_samples=st.integers(1, 300))
def test_fit_length_is_the_clip_repeated_and_cut(n, n_samples):
    clip = np.arange(n, dtype=np.float32)
    fitted = fit_length(clip, n_samples)
    np.testing.assert_array_equal(fitted, np.arange(n_samples) % n)
    assert fitted.dtype == clip.dtype and not np.shares_memory(fitted, clip)


def test_an_empty_waveform_cannot_be_fitted():
    with pytest.raises(AudioError, match="no samples"):
        fit_length(np.zeros(0), 5)


def test_int16_round_trip_is_exact_for_every_value_and_clips_the_rest():
    everything = np.arange(-32_768, 32_768).astype(np.int16)
    assert from_int16(everything).dtype == np.float32
    np.testing.assert_array_equal(to_int16(from_int16(everything)), everything)
    np.testing.assert_array_equal(to_int16(np.array([1.0, 2.0, -2.0])), [32_767, 32_767, -32_768])
