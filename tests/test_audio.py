"""Decoding, resampling and cropping against files written here: every format and every kind of damage."""

import struct
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from deepfake_utils.conventions import CROP_SAMPLES, AudioError
from deepfake_utils.waveforms import decode as audio
from deepfake_utils.waveforms.decode import (
    audio_info,
    fit_length,
    from_int16,
    random_crop,
    read_audio,
    resample,
    to_int16,
)


@pytest.fixture
def speech_like():
    """Three seconds of 16-bit noise with a slow envelope, so that no two samples' neighbourhoods are alike."""
    rng = np.random.default_rng(0)
    envelope = 0.5 + 0.5 * np.sin(np.arange(48_000) / 4_000)
    return (rng.standard_normal(48_000) * envelope * 3_000).astype(np.int16)


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
    assert audio_info(path) == (48_000, 3.0, 16_000)


def test_both_decoders_agree_bit_for_bit_on_real_flac(reference_data):
    paths = sorted((reference_data / "asvspoof2019_subset").glob("LA/*/flac/*.flac"))[::20]
    assert len(paths) > 8
    for path in paths:
        ours, rate_hz = audio._decode_with_pyav(path)
        np.testing.assert_array_equal(ours[:, 0], soundfile.read(path, dtype="float32")[0])
        assert rate_hz == 16_000 and len(ours) == audio_info(path).n_samples


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
    np.testing.assert_allclose(audio._decode_with_pyav(path)[0], audio._decode(path)[0], atol=1e-7)
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
    "text": (_bytes(b"<html>404 not found</html>" * 50), "not audio"),
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
    np.testing.assert_array_equal(audio._decode_with_pyav(path)[0], audio._decode(path)[0])
    content[30] ^= 0xFF  # of the MD5 sum itself
    path.write_bytes(content)
    with pytest.raises(AudioError, match="a.flac is damaged.*checksum"):
        audio._decode_with_pyav(path)


def test_flac_of_unstated_length(tmp_path, speech_like):
    """An encoder that writes to a pipe leaves the number of samples at 0."""
    path = tmp_path / "a.flac"
    soundfile.write(path, speech_like, 16_000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    np.testing.assert_array_equal(to_int16(read_audio(path)), speech_like)
    assert audio_info(path) == (48_000, 3.0, 16_000)


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
    audio._low_pass.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(read_audio, paths * 4))
    for i, path in enumerate(paths * 4):
        np.testing.assert_array_equal(together[i], read_audio(path))


# Lengths


@given(n=st.integers(1, 300), n_samples=st.integers(1, 300))
def test_fit_length_is_the_clip_repeated_and_cut(n, n_samples):
    clip = np.arange(n, dtype=np.float32)
    fitted = fit_length(clip, n_samples)
    np.testing.assert_array_equal(fitted, np.arange(n_samples) % n)
    assert fitted.dtype == clip.dtype and not np.shares_memory(fitted, clip)


@given(n=st.integers(1, 300), n_samples=st.integers(1, 300), seed=st.integers(0, 10))
def test_random_crop_is_a_stretch_of_the_clip(n, n_samples, seed):
    clip = np.arange(n, dtype=np.int16)
    crop = random_crop(clip, n_samples, np.random.default_rng(seed))
    assert crop.dtype == np.int16 and len(crop) == n_samples
    if n > n_samples:
        np.testing.assert_array_equal(crop, np.arange(crop[0], crop[0] + n_samples))
    else:
        np.testing.assert_array_equal(crop, fit_length(clip, n_samples))


def test_random_crop_reaches_every_start_and_takes_an_exact_clip_whole():
    rng = np.random.default_rng(0)
    assert {int(random_crop(np.arange(6), 4, rng)[0]) for _ in range(100)} == {0, 1, 2}
    exact = np.arange(CROP_SAMPLES)
    np.testing.assert_array_equal(random_crop(exact, CROP_SAMPLES, rng), exact)
    one_more = np.arange(CROP_SAMPLES + 1)
    assert {int(random_crop(one_more, CROP_SAMPLES, rng)[0]) for _ in range(40)} == {0, 1}


def test_an_empty_waveform_cannot_be_fitted():
    with pytest.raises(AudioError, match="no samples"):
        fit_length(np.zeros(0), 5)
    with pytest.raises(AudioError, match="no samples"):
        random_crop(np.zeros(0), 5, np.random.default_rng(0))


def test_int16_round_trip_is_exact_for_every_value_and_clips_the_rest():
    everything = np.arange(-32_768, 32_768).astype(np.int16)
    assert from_int16(everything).dtype == np.float32
    np.testing.assert_array_equal(to_int16(from_int16(everything)), everything)
    np.testing.assert_array_equal(to_int16(np.array([1.0, 2.0, -2.0])), [32_767, 32_767, -32_768])
