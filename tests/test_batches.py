"""Batches: the same numbers from every source and from any step on, nothing lost, no thread left behind."""

import _thread
import itertools
import sys
import threading
import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepfake_utils.conventions import AudioError, ConfigError
from deepfake_utils.waveforms import ClipCache, balanced_weights, eval_batches, open_source, train_batches
from deepfake_utils.waveforms.batches import _entropy, crop_starts, epoch_order
from deepfake_utils.waveforms.cache import CachedSource

N_SAMPLES = 500
LENGTHS = [1, 37, 250, 499, 500, 501, 750, 1000, 1777, 4000, 620, 333, 500]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


class Clips:
    """A source of given arrays; counts requests, and can be told to wait or fail."""

    def __init__(self, clips, before=lambda row: None):
        self.clips, self.before, self.asked = clips, before, []
        self.utterances = np.array([f"utt{row}" for row in range(len(clips))], dtype=object)

    def __len__(self):
        return len(self.clips)

    def clip(self, row):
        self.asked.append(row)
        self.before(row)
        return np.asarray(self.clips[row], dtype=np.int16)

    def n_samples(self, row):
        return len(self.clips[row])


def numbered(n_clips: int, n_samples: int = 8) -> list:
    return [np.full(n_samples, row) for row in range(n_clips)]


class Threads:
    """How many threads live that did not before; `threading` does not list all of them."""

    def __init__(self):
        self.before = _thread._count()

    def none_left(self) -> bool:
        return settles(lambda: _thread._count() <= self.before)


def settles(condition, limit_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()


@pytest.fixture(scope="module")
def protocol(tmp_path_factory) -> pd.DataFrame:
    folder, rng, rows = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), []
    for number, n_samples in enumerate(LENGTHS):
        path = folder / f"utt{number}.flac"
        soundfile.write(path, rng.integers(-32768, 32767, n_samples, dtype=np.int16), 16_000, "PCM_16")
        rows.append({"utterance": f"utt{number}", "path": str(path), "label": number % 2})
    return pd.DataFrame(rows)


def open_every_kind(protocol, folder, device="cpu") -> list:
    sources = [
        open_source(protocol, kind, folder=folder, device=device, progress=False)
        for kind in ("files", "cache", "store", "device")
    ]
    return [*sources, CachedSource(protocol, ClipCache(3_000))]  # the last one purges all the time


def noisy(waveform, target, generator):
    """An augmentation that uses all it is given: noise, and a mixture with another row of the batch."""
    noise = torch.randn(waveform.shape, generator=generator, device=waveform.device)
    share = torch.rand(len(target), 1, generator=generator, device=waveform.device)
    mixed = share * waveform + (1 - share) * waveform.roll(1, 0) + 0.01 * noise
    return mixed, share[:, 0] * target + (1 - share[:, 0]) * target.roll(1, 0)


def assert_same_batches(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.waveform, other.waveform) and torch.equal(mine.target, other.target)
        np.testing.assert_array_equal(mine.index, other.index)


# --- the same numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", [None, noisy])
def test_every_source_gives_the_same_training_batches(protocol, tmp_path, device, augment):
    files, *others = open_every_kind(protocol, tmp_path, device)
    settings = {"batch_size": 4, "n_samples": N_SAMPLES, "seed": 3, "device": device, "augment": augment}
    for source in others:
        for epoch in (0, 1):
            assert_same_batches(
                train_batches(source, protocol["label"], epoch=epoch, **settings),
                train_batches(files, protocol["label"], epoch=epoch, prefetch=1, **settings),
            )


@pytest.mark.parametrize("device", DEVICES)
def test_every_source_gives_the_same_evaluation_batches(protocol, tmp_path, device):
    files, *others = open_every_kind(protocol, tmp_path, device)
    for source in others:
        assert_same_batches(
            eval_batches(source, batch_size=5, n_samples=N_SAMPLES, device=device),
            eval_batches(files, batch_size=5, n_samples=N_SAMPLES, device=device),
        )


def test_every_source_gives_the_same_batches_of_real_recordings(reference_data, tmp_path):
    paths = sorted((reference_data / "asvspoof2019_subset").rglob("*.flac"))[::8]
    protocol = pd.DataFrame({"utterance": [path.stem for path in paths], "path": [str(path) for path in paths]})
    files, *others = open_every_kind(protocol, tmp_path)
    settings = {"batch_size": 8, "seed": 0, "epoch": 0, "device": "cpu"}
    for source in others:
        assert_same_batches(
            train_batches(source, np.zeros(len(paths)), **settings),
            train_batches(files, np.zeros(len(paths)), **settings),
        )


def test_any_step_can_be_the_first(protocol):
    source = open_source(protocol, "files")
    settings = {"batch_size": 3, "n_samples": N_SAMPLES, "seed": 5, "epoch": 2, "device": "cpu", "augment": noisy}
    whole = list(train_batches(source, protocol["label"], **settings))
    for first_step in range(len(whole)):
        rest = train_batches(source, protocol["label"], first_step=first_step, **settings)
        assert len(rest) == len(whole) - first_step
        assert_same_batches(rest, whole[first_step:])
    assert list(train_batches(source, protocol["label"], first_step=len(whole), **settings)) == []


@pytest.mark.parametrize("augment", [None, noisy])
@pytest.mark.parametrize("size", [2, 3])
def test_the_shards_of_a_batch_are_together_the_batch(protocol, size, augment):
    source = open_source(protocol, "files")
    settings = {"batch_size": 5, "n_samples": N_SAMPLES, "seed": 5, "epoch": 2, "device": "cpu", "augment": augment}
    whole = train_batches(source, protocol["label"], **settings)
    shards = [train_batches(source, protocol["label"], shard=(rank, size), **settings) for rank in range(size)]
    for batch, *parts in zip(whole, *shards, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part.waveform, batch.waveform[rank::size])
            assert torch.equal(part.target, batch.target[rank::size])
            assert part.index.tolist() == batch.index[rank::size].tolist()


def test_seed_epoch_and_step_each_change_order_crops_and_augmentation():
    """Also where one of them is 0: seeding by a list of words would make [1] and [1, 0] the same."""
    source = Clips([np.arange(30_000)] * 8)
    starts, noises, orders = set(), set(), set()
    combinations = [(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for seed, epoch in combinations:
        drawn = []

        def keep(waveform, target, generator, drawn=drawn):
            drawn.append(float(torch.rand(1, generator=generator)))
            return waveform, target

        settings = {"batch_size": 2, "n_samples": 4, "seed": seed, "epoch": epoch, "device": "cpu"}
        for batch in train_batches(source, np.zeros(8), augment=keep, **settings):
            starts.add(tuple(batch.waveform[:, 0].tolist()))
        noises.update(drawn)
        orders.add(tuple(epoch_order(1000, seed, epoch)))
    assert len(starts) == len(noises) == 4 * len(combinations)
    assert len(orders) == len(combinations)


def test_no_two_streams_of_random_numbers_are_the_same():
    combinations = list(itertools.product(range(3), repeat=4))  # seed, epoch, step, purpose
    assert len({tuple(_entropy(*numbers).generate_state(4)) for numbers in combinations}) == len(combinations)


# --- what a batch holds ------------------------------------------------------------------------------------


def test_an_epoch_visits_every_clip_once():
    source, labels = Clips(numbered(11)), np.arange(11) % 2
    settings = {"n_samples": 4, "seed": 1, "epoch": 0, "device": "cpu"}
    batches = list(train_batches(source, labels, batch_size=4, drop_last=False, **settings))
    assert [len(batch.index) for batch in batches] == [4, 4, 3]
    assert sorted(np.concatenate([batch.index for batch in batches])) == list(range(11))
    for batch in batches:  # clip r is full of the number r: waveform, target and index speak of the same rows
        assert (batch.waveform[:, 0] * 32768).tolist() == batch.index.tolist()
        assert batch.target.tolist() == labels[batch.index].tolist()
        assert batch.waveform.dtype == batch.target.dtype == torch.float32
    dropped = train_batches(source, labels, batch_size=4, **settings)
    assert len(dropped) == 2 and [len(batch.index) for batch in dropped] == [4, 4]


def test_evaluation_takes_the_start_and_repeats_short_clips_in_protocol_order():
    source = Clips([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
    batches = list(eval_batches(source, batch_size=3, n_samples=5, device="cpu"))
    rows = (torch.cat([batch.waveform for batch in batches]) * 32768).tolist()
    assert rows == [[1, 2, 3, 1, 2], [4, 4, 4, 4, 4], [5, 6, 7, 8, 9], [12, 13, 14, 15, 16]]
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2], [3]]
    assert [batch.target.tolist() for batch in batches] == [[0, 0, 0], [0]]


def test_training_crops_are_whole_stretches_and_short_clips_repeat_from_their_start():
    source = Clips([np.arange(1000), np.arange(2000, 2003)])
    settings = {"batch_size": 2, "n_samples": 7, "seed": 0, "device": "cpu"}
    for epoch in range(20):
        (batch,) = train_batches(source, [0, 1], epoch=epoch, **settings)
        for row, index in zip((batch.waveform * 32768).numpy(), batch.index, strict=True):
            if index == 0:
                np.testing.assert_array_equal(np.diff(row), 1)
            else:
                np.testing.assert_array_equal(row, [2000, 2001, 2002, 2000, 2001, 2002, 2000])


def test_samples_are_divided_by_32768_exactly():
    source = Clips([[-32768, -1, 0, 1, 32767]])
    (batch,) = eval_batches(source, batch_size=1, n_samples=5, device="cpu")
    assert batch.waveform[0].tolist() == [-1.0, -1 / 32768, 0.0, 1 / 32768, 32767 / 32768]


def test_every_start_that_fits_is_equally_likely_and_no_other():
    positions = (np.arange(7000) + 0.5) / 7000
    starts = crop_starts(np.full(7000, 10), 4, positions)
    assert Counter(starts.tolist()) == {start: 1000 for start in range(7)}
    assert crop_starts(np.array([4, 3, 1]), 4, np.array([0.99, 0.99, 0.99])).tolist() == [0, 0, 0]


@given(st.integers(1, 2**31), st.integers(1, 2**20), st.floats(0, 1, exclude_max=True))
def test_crops_stay_inside_the_clip(length, n_samples, position):
    start = int(crop_starts(np.array([length]), n_samples, np.array([position]))[0])
    assert start >= 0 and (start + n_samples <= length or (start == 0 and length < n_samples))


# --- sampling ----------------------------------------------------------------------------------------------


def test_weights_draw_rows_in_proportion_and_never_those_of_weight_zero():
    labels = np.array([1] * 100 + [0] * 900)
    weights = balanced_weights(labels)
    weights[5] = 0.0
    drawn = np.concatenate([epoch_order(1000, seed=0, epoch=epoch, weights=weights) for epoch in range(20)])
    assert 5 not in drawn and len(drawn) == 20_000
    expected = 99 / 199  # one of the hundred bona fide clips is never drawn
    assert abs(labels[drawn].mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000)
    source = Clips(numbered(1000, 4))
    settings = {"batch_size": 50, "n_samples": 4, "seed": 0, "epoch": 3, "device": "cpu"}
    batches = train_batches(source, labels, weights=weights, **settings)
    np.testing.assert_array_equal(np.concatenate([batch.index for batch in batches]), epoch_order(1000, 0, 3, weights))


@pytest.mark.parametrize("weights", [[1, 1], [1, -1, 1], [0, 0, 0], [1, np.nan, 1], [1, np.inf, 1]])
def test_weights_that_make_no_sense_are_refused(weights):
    with pytest.raises(ConfigError, match="3 finite numbers"):
        epoch_order(3, 0, 0, weights)


# --- reading ahead -----------------------------------------------------------------------------------------


def consume(source, n_batches=None, **settings):
    settings = {"batch_size": 2, "n_samples": 4, "device": "cpu", **settings}
    batches = iter(eval_batches(source, **settings))
    return batches, [next(batches) for _ in range(n_batches or 0)]


def test_batches_are_made_while_the_consumer_works():
    """Two batches can only both be under way if reading does not wait for the consumer."""
    meeting = threading.Barrier(2, timeout=10)
    source = Clips(numbered(2), before=lambda row: meeting.wait())
    assert len(list(eval_batches(source, batch_size=1, n_samples=4, device="cpu", prefetch=2))) == 2


def test_reading_ahead_is_bounded():
    source = Clips(numbered(100))
    batches, _ = consume(source, n_batches=1, prefetch=3)
    assert settles(lambda: len(source.asked) == 8)  # the batch taken and three ahead, two clips each
    time.sleep(0.05)
    assert len(source.asked) == 8
    batches.close()


def test_an_unreadable_clip_is_named_at_its_step_after_the_batches_before_it(protocol, tmp_path):
    broken = protocol.copy()
    bad = tmp_path / "bad.flac"
    bad.write_bytes(b"fLaC, but not really")
    broken.loc[5, "path"] = str(bad)
    seen, threads = [], Threads()
    with pytest.raises(AudioError, match="utterance utt5: .*bad.flac"):
        for batch in eval_batches(open_source(broken, "files"), batch_size=2, n_samples=4, device="cpu"):
            seen += batch.index.tolist()
    assert seen == [0, 1, 2, 3]
    assert threads.none_left()


def fail_in_the_loop(source):
    for _ in eval_batches(source, batch_size=2, n_samples=4, device="cpu"):
        raise RuntimeError("in the training step")


def assert_nothing_is_asked_any_more(source):
    """Closing waited: no thread is still at work."""
    n_asked = len(source.asked)
    time.sleep(0.05)
    assert len(source.asked) == n_asked


@pytest.mark.parametrize("ending", ["exhausted", "closed", "interrupted", "step fails", "abandoned"])
def test_no_thread_is_left(ending):
    source, kept, threads = Clips(numbered(400), before=lambda row: time.sleep(0.001)), None, Threads()
    if ending == "exhausted":
        assert len(list(eval_batches(source, batch_size=2, n_samples=4, device="cpu"))) == 200
    elif ending == "closed":
        consume(source, n_batches=2)[0].close()
        assert_nothing_is_asked_any_more(source)
    elif ending == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            consume(source, n_batches=2)[0].throw(KeyboardInterrupt)
        assert_nothing_is_asked_any_more(source)
    elif ending == "step fails":
        try:
            fail_in_the_loop(source)
        except RuntimeError:
            kept = sys.exc_info()  # a notebook keeps the traceback, and with it the loop's iterator
    else:
        kept = consume(source, n_batches=2)
    assert threads.none_left()
    if ending != "exhausted":
        assert len(source.asked) < 60
    del kept


def test_only_the_share_of_a_step_is_augmented(protocol):
    def silence(waveform, target, generator):
        return torch.zeros_like(waveform), target

    source, labels = open_source(protocol, kind="files"), protocol["label"].to_numpy()
    settings = {"batch_size": 4, "n_samples": 400, "seed": 1, "device": "cpu"}
    share = {0: 0.0, 1: 0.5, 2: 1.0}
    met = {step: [] for step in share}
    for epoch in range(40):
        plain = train_batches(source, labels, epoch=epoch, **settings)
        augmented = train_batches(source, labels, epoch=epoch, augment=silence, augmented_share=share.get, **settings)
        for step, before, after in zip(share, plain, augmented, strict=False):
            silent = (after.waveform == 0).all(1)
            assert torch.equal(after.waveform[~silent], before.waveform[~silent])
            met[step] += silent.tolist()
    assert not any(met[0]) and all(met[2]) and 0.35 < np.mean(met[1]) < 0.65


def test_waiting_and_augmenting_are_told_apart():
    source = Clips(numbered(4), before=lambda row: time.sleep(0.05))

    def slow(waveform, target, generator):
        time.sleep(0.02)
        return waveform, target

    settings = {"batch_size": 2, "n_samples": 4, "seed": 0, "epoch": 0, "device": "cpu"}
    batches = train_batches(source, np.zeros(4), augment=slow, **settings)
    assert (batches.wait_s, batches.augment_s) == (0.0, 0.0)
    for _ in batches:
        pass
    assert batches.wait_s > 0.09 and batches.augment_s >= 0.04


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [0, 1]}, r"shape \(2,\)"),
        ({"batch_size": 5}, "batch_size 5 is more than the 4 clips"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"n_samples": 0}, "n_samples is 0"),
        ({"first_step": 3}, "first_step 3 is outside"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed, message):
    settings = {"labels": [0] * 4, "batch_size": 2, "n_samples": 4, "seed": 0, "epoch": 0, "device": "cpu"}
    with pytest.raises(ConfigError, match=message):
        train_batches(Clips(numbered(4)), **(settings | changed))


def test_a_source_in_the_memory_of_another_device_is_refused(protocol):
    source = open_source(protocol, "device", device="cpu", progress=False)
    with pytest.raises(ConfigError, match="memory of cpu, batches wanted on meta"):
        eval_batches(source, batch_size=2, device="meta")
