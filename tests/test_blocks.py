"""Decoding by blocks: the same samples as decoding at once, and the same refusals."""

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfake_utils.conventions import AudioError
from deepfake_utils.waveforms.blocks import BlockResampler, iter_audio
from deepfake_utils.waveforms.decode import read_audio, resample


@given(
    rate_hz=st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000]),
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=12),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_resampling_in_pieces_equals_resampling_the_whole(rate_hz, sizes, seed):
    whole = np.random.default_rng(seed).normal(0, 0.1, sum(sizes))
    pieces = BlockResampler(rate_hz)
    out = [pieces.push(part) for part in np.split(whole, np.cumsum(sizes)[:-1])]
    joined = np.concatenate([*out, pieces.finish()])
    expected = resample(whole, rate_hz) if len(whole) else whole
    assert joined.shape == expected.shape
    np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-13)


def test_what_is_held_does_not_grow():
    pieces = BlockResampler(44_100)
    held = []
    for _ in range(50):
        pieces.push(np.zeros(4410))
        held.append(len(pieces._held))
    assert max(held[5:]) <= 3 * 4410


@pytest.mark.parametrize("suffix, rate_hz, n_channels", [("wav", 44100, 2), ("flac", 16000, 1), ("mp3", 48000, 2),
                                                         ("ogg", 8000, 1)])  # fmt: skip
def test_blocks_of_a_file_equal_the_file(tmp_path, suffix, rate_hz, n_channels):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (int(3.3 * rate_hz), n_channels)), rate_hz)
    blocks = list(iter_audio(path, block_s=0.7))
    assert len(blocks) > 3
    np.testing.assert_allclose(np.concatenate(blocks), read_audio(path), rtol=0, atol=1e-7)


def test_ffmpeg_takes_over_where_libsndfile_cannot(tmp_path):
    import av

    path, rate_hz = tmp_path / "clip.m4a", 44_100
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate_hz, layout="mono")
        tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * rate_hz) / rate_hz)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    blocks = list(iter_audio(path, block_s=0.5))
    assert len(blocks) > 2
    np.testing.assert_allclose(np.concatenate(blocks), read_audio(path), rtol=0, atol=1e-6)


def test_damage_is_found_where_it_is(tmp_path):
    path = tmp_path / "cut.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 160_000), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match=r"truncated|damaged"):
        list(iter_audio(path, block_s=1.0))
    path.write_bytes(whole[:5000] + bytes(400) + whole[5400:])
    with pytest.raises(AudioError, match=r"damaged"):
        list(iter_audio(path, block_s=1.0))


@pytest.mark.parametrize("content, said", [(b"", "empty"), (b"not audio at all" * 99, "cannot be decoded")])
def test_what_is_no_recording_is_refused(tmp_path, content, said):
    path = tmp_path / "x.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=said):
        list(iter_audio(path))


def test_nonsense_inside_is_refused(tmp_path):
    for value, said in ((np.nan, "NaN"), (3000.0, "integers as floats")):
        samples = np.zeros(48_000)
        samples[40_000] = value
        soundfile.write(tmp_path / "x.wav", samples, 16_000, subtype="FLOAT")
        with pytest.raises(AudioError, match=said):
            list(iter_audio(tmp_path / "x.wav", block_s=1.0))
