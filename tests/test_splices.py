"""Test material for where a recording is fake, and what is measured on it: closed forms and properties."""

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfake_utils.conventions import ConfigError, CorpusError
from deepfake_utils.scoring.pooling import pool, stretches
from deepfake_utils.scoring.splices import Spliced, found, judge, splice, spliced_recordings, window_eers, window_table
from deepfake_utils.scoring.verdict import Judged
from tests.test_detector import detector, loud_is_speech  # noqa: F401  a fixture

RATE_HZ = 16_000


def window(start_s, end_s, log_odds) -> Judged:
    return Judged(start_s, end_s, end_s - start_s, 0.0, 0.0, log_odds)


@pytest.fixture(scope="module")
def protocol(tmp_path_factory) -> pd.DataFrame:
    """Real speech is a positive offset with a little noise, fakes a negative one: the level model tells them apart."""
    folder, rng, rows = tmp_path_factory.mktemp("clips"), np.random.default_rng(0), []
    for label, names in ((1, ("anna", "ben")), (0, ("A01", "A02"))):
        for name in names:
            for number in range(3):
                utterance = f"{name}_{number}"
                samples = (0.1 if label else -0.1) + 0.001 * rng.normal(size=4 * RATE_HZ)
                soundfile.write(folder / f"{utterance}.flac", samples, RATE_HZ)
                attack, speaker = ("-", name) if label else (name, "-")
                rows.append((utterance, str(folder / f"{utterance}.flac"), label, attack, speaker, "dev", "toy"))
    return pd.DataFrame(rows, columns=["utterance", "path", "label", "attack", "speaker", "split", "corpus"])


@settings(max_examples=50, deadline=None)
@given(
    n_host=st.integers(50, 300), n_insert=st.integers(20, 90), n_fade=st.integers(0, 10), share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_splice_leaves_the_host_as_it_is_and_brings_the_insert_to_its_level(n_host, n_insert, n_fade, share, seed):
    rng = np.random.default_rng(seed)
    host = rng.uniform(-0.3, 0.3, n_host).astype(np.float32)
    insert = rng.uniform(-0.05, 0.05, n_insert).astype(np.float32)
    at = n_fade + int(share * (n_host - 2 * n_fade))
    spliced, start = splice(host, insert, at, n_fade)
    assert len(spliced) == n_host + n_insert - 2 * n_fade and start == at - n_fade
    assert np.array_equal(spliced[:start], host[:start])
    assert np.array_equal(spliced[start + n_insert :], host[at + n_fade :])
    inner = spliced[start + n_fade : start + n_insert - n_fade]
    gain = np.sqrt(np.square(host).mean() / np.square(insert).mean())
    assert inner == pytest.approx(insert[n_fade : n_insert - n_fade] * gain, abs=1e-5)
    assert np.abs(spliced).max() <= 1


def test_the_material_is_what_it_says_and_the_same_every_time(protocol):
    settings = {"host_s": 10.0, "inserts_s": (1.0, 3.0)}
    first, again = (list(spliced_recordings(protocol, 2, **settings)) for _ in range(2))
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(first, again, strict=True))
    assert [r.kind for r in first] == ["host", "fake", "control", "fake", "control"] * 2
    assert {(r.insert_s, r.fade_s) for r in first if r.kind != "host"} == {
        (insert, fade) for insert in (1.0, 3.0) for fade in (0.0, 0.05)
    }
    for recording in first:
        is_fake = recording.samples < 0
        if recording.kind != "fake":
            assert not is_fake.any()
            continue
        start, end = (round(second * RATE_HZ) for second in recording.span_s)
        fade = round(recording.fade_s * RATE_HZ)
        assert is_fake[start + fade : end - fade].all() and not is_fake[:start].any() and not is_fake[end:].any()
        assert recording.insert in ("A01", "A02")
    assert all(r.insert != r.source for r in first if r.kind == "control")


def test_a_source_that_is_a_speaker_is_named_once(protocol):
    named = [next(spliced_recordings(frame, 1, host_s=10.0)).source
             for frame in (protocol, protocol.assign(source=protocol["speaker"]))]  # fmt: skip
    assert named[1] in set(protocol["speaker"]) and ":" not in named[1], named


def test_material_needs_both_labels_and_enough_sound(protocol):
    with pytest.raises(CorpusError, match="both labels"):
        next(spliced_recordings(protocol[protocol["label"] == 1], 1))
    with pytest.raises(CorpusError, match="15 s of sound"):
        next(spliced_recordings(protocol, 1, host_s=30.0).__iter__()) and list(
            spliced_recordings(protocol, 1, host_s=10.0, inserts_s=(15.0,))
        )


def test_a_detector_that_knows_finds_all_of_it(loud_is_speech, protocol):  # noqa: F811
    judged = judge(detector(), spliced_recordings(protocol, 2, host_s=10.0, inserts_s=(4.0,)))
    assert all(len(recording.samples) == 0 for recording, _ in judged)
    eers = window_eers(judged).set_index("insert_s")
    assert eers.loc["all", "eer"] == 0 and eers.loc["all", "n_fake"] > 0
    share = found(judged, 0.0).set_index("insert_s").loc["all"]
    assert share["fake_found"] > 0.5 and share["inserts_found"] == 1.0
    assert found(judged, 1e9).set_index("insert_s").loc["all", "real_marked"] == pytest.approx(1.0)


def test_windows_are_fake_where_half_of_them_or_of_the_insert_is():
    recording = Spliced(np.zeros(0), "fake", 2.0, 0.0, (3.0, 5.0), "s", "A01")
    windows = [window(*times, 0.0) for times in ((0, 3), (0, 3.5), (0, 4), (2, 6), (5, 9))]
    assert window_table([(recording, windows)])["label"].tolist() == [1, pd.NA, 0, 0, 1]


def test_found_and_marked_time_by_hand():
    fake = Spliced(np.zeros(0), "fake", 4.0, 0.0, (8.0, 12.0), "s", "A01")
    control = Spliced(np.zeros(0), "control", 4.0, 0.0, (8.0, 12.0), "s", "t")
    times = [(0, 4), (4, 8), (8, 12), (12, 16)]
    judged = [
        (fake, [window(*t, x) for t, x in zip(times, (1, -1, -1, 1), strict=True)]),
        (control, [window(*t, x) for t, x in zip(times, (1, 1, -1, 1), strict=True)]),
    ]
    row = found(judged, 0.0).iloc[0]
    assert (row["fake_found"], row["real_marked"], row["inserts_found"]) == (1.0, 8 / 28, 1.0)


def test_overlapping_windows_decide_by_rule():
    windows = [window(0, 4, -2.0), window(2, 6, 1.0), window(4, 8, -2.0)]
    assert stretches(windows, 0.0, "any") == [(0, 8)]
    assert stretches(windows, 0.0, "all") == [(0, 2), (6, 8)]
    assert stretches(windows, 0.0, "mean") == [(0, 8)] and stretches(windows, -1.0, "mean") == [(0, 2), (6, 8)]
    assert stretches([window(0, 4, None), window(10, 14, -1.0)], 0.0) == [(10, 14)]


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(-20, 20), min_size=1, max_size=50))
def test_every_pooling_lies_between_the_extremes_and_attention_between_minimum_and_mean(values):
    attention = [pool(values, {"name": "attention", "temperature": t}) for t in (1e-3, 1.0, 1e6)]
    assert attention[0] == pytest.approx(min(values), abs=0.02)
    assert attention[2] == pytest.approx(np.mean(values), abs=1e-3)
    assert min(values) - 1e-9 <= attention[1] <= np.mean(values) + 1e-9
    assert min(values) <= pool(values, {"name": "quantile", "share": 0.25}) <= max(values)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ConfigError, match="unknown pooling 'median'"):
        pool([0.0], {"name": "median"})
