"""The packed store: the same samples as the files, whatever kills the builder, fills the disk or changes the corpus."""

import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfake_utils.conventions import AudioError, ConfigError, CorpusError
from deepfake_utils.waveforms import open_source, sources, store
from deepfake_utils.waveforms.batches import _Plan, host_crops
from deepfake_utils.waveforms.cache import FileSource
from deepfake_utils.waveforms.store import DeviceSource, StoreError, open_store

LENGTHS = [700, 1, 64, 3000, 65, 63, 900, 1200, 10, 400, 800, 2000]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def write_corpus(folder: Path, lengths=LENGTHS) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, n_samples in enumerate(lengths):
        path = folder / f"utt{number}.wav"
        soundfile.write(path, rng.integers(-32768, 32767, n_samples, dtype=np.int16), 16_000, "PCM_16")
        rows.append({"utterance": f"utt{number}", "path": str(path), "corpus": "toy", "split": "train"})
    return pd.DataFrame(rows)


@pytest.fixture
def protocol(tmp_path):
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def decoded(monkeypatch):
    """The rows decoded from files, in the order they were."""
    rows, clip = [], FileSource.clip
    monkeypatch.setattr(FileSource, "clip", lambda self, row: rows.append(row) or clip(self, row))
    return rows


def pack(protocol, folder):
    return open_store(protocol, folder, workers=2, progress=False)


def assert_same_clips(source, protocol):
    files = FileSource(protocol)
    assert len(source) == len(files)
    for row in range(len(files)):
        np.testing.assert_array_equal(source.clip(row), files.clip(row))
        assert source.n_samples(row) == len(files.clip(row))


def test_a_store_holds_the_samples_of_the_files(protocol, tmp_path):
    packed = pack(protocol, tmp_path / "stores")
    assert_same_clips(packed, protocol)
    assert packed.clip(0).dtype == np.int16 and not packed.clip(0).flags.writeable
    samples = np.fromfile(packed.path, np.int16)  # nothing but the samples, end to end
    np.testing.assert_array_equal(samples, np.concatenate([packed.clip(row) for row in range(len(packed))]))
    assert packed.path.name.startswith("toy-train-")
    assert sorted(path.suffix for path in packed.path.parent.iterdir()) == [".index", ".int16", ".json"]


def test_real_recordings(reference_data, tmp_path):
    paths = sorted((reference_data / "asvspoof2019_subset").rglob("*.flac"))[:40]
    assert paths
    protocol = pd.DataFrame({"utterance": [path.stem for path in paths], "path": [str(path) for path in paths]})
    assert_same_clips(pack(protocol, tmp_path), protocol)


def test_a_finished_store_is_reused(protocol, tmp_path, decoded):
    pack(protocol, tmp_path / "stores")
    assert sorted(decoded) == list(range(len(protocol)))
    pack(protocol, tmp_path / "stores")
    assert len(decoded) == len(protocol)


def test_a_corpus_mounted_elsewhere_is_the_same_corpus(protocol, tmp_path, decoded):
    pack(protocol, tmp_path / "stores")
    shutil.move(tmp_path / "corpus", tmp_path / "mounted")
    moved = protocol.assign(path=protocol["path"].str.replace("/corpus/", "/mounted/"))
    pack(moved, tmp_path / "stores")
    assert len(decoded) == len(protocol)


@pytest.mark.parametrize("change", ["content", "time", "settings", "file"])
def test_a_changed_corpus_or_setting_rebuilds_and_replaces(protocol, tmp_path, decoded, monkeypatch, change):
    old = pack(protocol, tmp_path / "stores").path
    path = Path(protocol["path"][3])
    if change == "content":
        soundfile.write(path, np.arange(50, dtype=np.int16), 16_000, "PCM_16")
    elif change == "time":
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000_000))
    elif change == "settings":
        monkeypatch.setattr(store, "SETTINGS", store.SETTINGS | {"format": 2})
    else:
        path = path.rename(path.with_name("renamed.wav"))
        protocol.loc[3, "path"] = str(path)
    packed = pack(protocol, tmp_path / "stores")
    assert len(decoded) == 2 * len(protocol) and packed.path != old and not old.exists()
    assert len(list((tmp_path / "stores").iterdir())) == 3
    assert_same_clips(packed, protocol)


def test_stores_of_several_splits_lie_side_by_side(protocol, tmp_path, decoded):
    parts = [protocol.head(5), protocol.tail(7), protocol]
    for _ in range(2):
        for part in parts:
            assert_same_clips(pack(part, tmp_path / "stores"), part)
    assert len(list((tmp_path / "stores").glob("*.json"))) == 3


# --- killed builders ---------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_append(n_whole: int, where: str):
    """`store._append`, killed at its call number `n_whole` + 1 after doing a part of its work."""
    append, calls = store._append, []

    def replacement(samples_file, index_file, clips, records):
        calls.append(1)
        if len(calls) <= n_whole:
            return append(samples_file, index_file, clips, records)
        samples = b"".join(clip.tobytes() for clip in clips)
        samples_file.write(samples[: len(samples) // 2 if where == "half the samples" else None])
        samples_file.flush()
        if where == "half a record":
            index_file.write(np.array(records, store.RECORD).tobytes()[:-3])
            index_file.flush()
        die()

    return replacement


def start_forked(task, *args):
    """Start a child that may be killed at any moment.

    tqdm keeps one lock for a process and all its forks; a child killed inside it would leave it locked for ever.
    """

    def run():
        store.tqdm.set_lock(threading.RLock())
        task(*args)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def run_and_be_killed(task):
    child = start_forked(task)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("where", ["before the index", "half the samples", "half a record"])
@pytest.mark.parametrize("n_whole", [0, 1, 4])
def test_a_killed_build_goes_on_from_the_last_whole_clip(protocol, tmp_path, decoded, monkeypatch, where, n_whole):
    monkeypatch.setattr(store, "BLOCK_BYTES", 1)  # one clip an append

    def build():
        store._append = dying_append(n_whole, where)
        pack(protocol, tmp_path / "stores")

    run_and_be_killed(build)
    assert not list((tmp_path / "stores").glob("*.json"))
    packed = pack(protocol, tmp_path / "stores")
    assert sorted(decoded) == list(range(n_whole, len(protocol)))
    assert_same_clips(packed, protocol)


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("moment", ["_declare", "_drop_replaced"])
def test_killed_just_before_or_after_the_store_became_valid(protocol, tmp_path, decoded, monkeypatch, moment):
    os.utime(protocol["path"][0], ns=(1, 1))
    pack(protocol, tmp_path / "stores")
    os.utime(protocol["path"][0], ns=(2, 2))  # now an old store is to be replaced
    decoded.clear()

    def build():
        setattr(store, moment, lambda *_: die())
        pack(protocol, tmp_path / "stores")

    run_and_be_killed(build)
    packed = pack(protocol, tmp_path / "stores")
    assert decoded == []  # every sample was there: nothing is decoded again
    assert len(list((tmp_path / "stores").iterdir())) == 3  # and the old store is gone
    assert_same_clips(packed, protocol)


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_again_and_again_at_random_moments_it_still_ends_right(tmp_path, monkeypatch):
    protocol = write_corpus(tmp_path / "corpus", np.random.default_rng(1).integers(1, 4000, 60))
    monkeypatch.setattr(store, "BLOCK_BYTES", 8000)
    rng, log = np.random.default_rng(2), tmp_path / "starts"

    def build():
        log.open("a").write(".")
        pack(protocol, tmp_path / "stores")

    for _ in range(40):
        child = start_forked(build)
        child.join(rng.uniform(0.001, 0.03))
        child.kill()
        child.join()
        if child.exitcode == 0:
            break
    assert len(log.read_text()) > 1
    assert_same_clips(pack(protocol, tmp_path / "stores"), protocol)


def test_a_damaged_journal_is_used_up_to_the_damage(protocol, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_BYTES", 1)
    monkeypatch.setattr(store, "_declare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(protocol, tmp_path / "stores")
    monkeypatch.undo()
    samples_path = next((tmp_path / "stores").glob("*.int16"))
    flip_byte(samples_path, 2 * sum(LENGTHS[:4]) + 1)  # in the clip of row 4
    rows, clip = [], FileSource.clip
    monkeypatch.setattr(FileSource, "clip", lambda self, row: rows.append(row) or clip(self, row))
    packed = pack(protocol, tmp_path / "stores")
    assert sorted(rows) == list(range(4, len(protocol)))
    assert_same_clips(packed, protocol)


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), AudioError("cannot be decoded")])
def test_what_was_decoded_before_an_error_is_kept(protocol, tmp_path, monkeypatch, error):
    clip, rows = FileSource.clip, []

    def clip_or_error(self, row):
        if row == 8 and not rows:
            raise error
        return clip(self, row)

    monkeypatch.setattr(FileSource, "clip", clip_or_error)
    with pytest.raises(type(error)):
        pack(protocol, tmp_path / "stores")
    monkeypatch.setattr(FileSource, "clip", lambda self, row: rows.append(row) or clip(self, row))
    pack(protocol, tmp_path / "stores")
    assert sorted(rows) == [8, 9, 10, 11]


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_builders_at_once_decode_every_clip_once_between_them(protocol, tmp_path, monkeypatch):
    log, clip = tmp_path / "decoded", FileSource.clip

    def logged(self, row):
        with log.open("a") as file:
            file.write(f"{row}\n")
        time.sleep(0.05)  # so that the three are at it together
        return clip(self, row)

    monkeypatch.setattr(FileSource, "clip", logged)
    children = [start_forked(pack, protocol, tmp_path / "stores") for _ in range(3)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(len(protocol)))


# --- damage ------------------------------------------------------------------------------------------------


def test_damaged_samples_are_noticed_and_the_utterance_named(protocol, tmp_path):
    packed = pack(protocol, tmp_path / "stores")
    flip_byte(packed.path, 2 * sum(LENGTHS[:6]))
    packed = pack(protocol, tmp_path / "stores")
    packed.clip(5)
    with pytest.raises(StoreError, match="utt6.*checksum.*delete"):
        packed.clip(6)
    with pytest.raises(StoreError, match="utt6"):
        DeviceSource(packed, "cpu", progress=False)
    packed.path.unlink()
    assert_same_clips(pack(protocol, tmp_path / "stores"), protocol)


@pytest.mark.parametrize("damage", ["samples cut", "index damaged", "declaration cut"])
def test_a_store_that_is_not_whole_is_mended(protocol, tmp_path, damage):
    path = pack(protocol, tmp_path / "stores").path
    if damage == "samples cut":
        os.truncate(path, path.stat().st_size - 5)
    elif damage == "index damaged":
        flip_byte(path.with_suffix(".index"), 8 * 7 + 4)  # in the checksum of row 7
    else:
        declaration = next(path.parent.glob("*.json"))
        declaration.write_text(declaration.read_text()[:20])
    assert_same_clips(pack(protocol, tmp_path / "stores"), protocol)


# --- space and rights --------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_decoded(protocol, tmp_path, decoded, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="GB more and 0.00 GB are free"):
        pack(protocol, tmp_path / "stores")
    assert decoded == []


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_disk_that_fills_up_loses_nothing(protocol, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_BYTES", 1)

    def build():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        try:
            pack(protocol, tmp_path / "stores")
        except StoreError as error:
            assert "kept" in str(error) and str(tmp_path) in str(error)
            os._exit(7)

    child = start_forked(build)
    child.join(60)
    assert child.exitcode == 7
    n_fitting = int(np.searchsorted(2 * np.cumsum(LENGTHS), 10_000, side="right"))
    packed = pack(protocol, tmp_path / "stores")
    assert sorted(decoded) == list(range(n_fitting, len(protocol))) and n_fitting > 3
    assert_same_clips(packed, protocol)


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_read_only_folder_serves_a_finished_store_and_refuses_a_new_one_in_words():
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        protocol = write_corpus(Path(base, "corpus"))
        folder = Path(base, "stores")
        pack(protocol, folder)
        os.chmod(base, 0o755)
        folder.chmod(0o555)

        def read_only():
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)  # rights do not bind root
            assert_same_clips(pack(protocol, folder), protocol)
            try:
                pack(protocol.head(3), folder)
            except StoreError as error:
                assert "cannot be written" in str(error) and str(folder) in str(error)
            else:
                os._exit(1)
            sources.STORE_MIN_CLIPS = 0
            fallback = open_source(protocol.head(3), folder=folder, progress=False)
            assert_same_clips(fallback, protocol.head(3))
            os._exit(7 if "cache" in fallback.describe() and "could not be written" in fallback.reason else 2)

        child = start_forked(read_only)
        child.join(60)
        folder.chmod(0o755)
        assert child.exitcode == 7


def test_a_missing_recording_is_named(protocol, tmp_path):
    Path(protocol["path"][2]).unlink()
    with pytest.raises(CorpusError, match="utt2.wav"):
        pack(protocol, tmp_path / "stores")


# --- in the memory of a device -----------------------------------------------------------------------------

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_bytes", [1, 3000, 2**20])
def test_a_device_holds_the_samples_of_the_files(protocol, tmp_path, monkeypatch, device, block_bytes):
    monkeypatch.setattr(store, "BLOCK_BYTES", block_bytes)
    for source in (FileSource(protocol), pack(protocol, tmp_path / "stores")):
        assert_same_clips(DeviceSource(source, device, progress=False), protocol)


@pytest.mark.parametrize("device", DEVICES)
def test_gathering_cuts_and_repeats_as_the_host_does(protocol, device):
    on_device, files = DeviceSource(FileSource(protocol), device, progress=False), FileSource(protocol)

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, len(LENGTHS) - 1), st.floats(0, 1, exclude_max=True)), min_size=1, max_size=6
        ),
        st.integers(1, 3100),
    )
    def check(crops, n_samples):
        plan = _Plan(np.array([row for row, _ in crops]), np.array([position for _, position in crops]))
        gathered = on_device.gather(plan.index, plan.position, n_samples)
        assert gathered.dtype == torch.int16
        assert torch.equal(gathered.cpu(), host_crops(files, plan, n_samples))

    check()


def test_a_recording_shorter_than_its_header_says_is_named(protocol, monkeypatch):
    clip = FileSource.clip
    monkeypatch.setattr(FileSource, "clip", lambda self, row: clip(self, row)[: 2000 if row == 3 else None])
    with pytest.raises(AudioError, match="utt3 decodes to 2000 samples and its header promises 3000"):
        DeviceSource(FileSource(protocol), "cpu", progress=False)


def test_what_does_not_fit_on_the_device_is_refused(protocol, monkeypatch):
    monkeypatch.setattr(store, "free_device_bytes", lambda _: 100)
    with pytest.raises(StoreError, match="12 clips take"):
        DeviceSource(FileSource(protocol), "cpu", progress=False)


# --- choosing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "cache", "store", "device"])
def test_a_kind_asked_for_is_given(protocol, tmp_path, kind):
    source = open_source(protocol, kind, folder=tmp_path / "stores", device="cpu", progress=False)
    assert source.describe().startswith(f"{kind}: 12 clips")
    assert list(source.utterances) == list(protocol["utterance"])
    assert_same_clips(source, protocol)


def test_a_kind_that_cannot_be_had_is_refused(protocol):
    for kind, wanted in (("stores", "files, cache"), ("store", "folder"), ("device", "device")):
        with pytest.raises(ConfigError, match=wanted):
            open_source(protocol, kind)


def test_auto_says_what_it_chose_and_why(protocol, tmp_path, monkeypatch):
    def choose(**where):
        return open_source(protocol, progress=False, **where).describe()

    assert choose().startswith("cache") and "no folder named" in choose()
    assert "soon decoded" in choose(folder=tmp_path / "stores")
    monkeypatch.setattr(sources, "STORE_MIN_CLIPS", 10)
    assert choose(folder=tmp_path / "stores").startswith("store")
    opened = []

    def fake_device_source(source, device, progress):
        opened.append((type(source).__name__, device))
        return FileSource(protocol)

    monkeypatch.setattr(sources, "DeviceSource", fake_device_source)
    needed = 2 * sum(LENGTHS)
    monkeypatch.setattr(sources, "free_device_bytes", lambda _: 2 * needed)
    assert "chosen because they fit in 50%" in choose(device="cuda:0")
    choose(device="cuda:0", folder=tmp_path / "stores")
    assert opened == [("FileSource", "cuda:0"), ("PackedStore", "cuda:0")]
    monkeypatch.setattr(sources, "free_device_bytes", lambda _: 2 * needed - 2)
    assert choose(device="cuda:0").startswith("cache") and "not on the device" in choose(device="cuda:0")
    assert len(opened) == 2


def test_a_store_that_cannot_be_written_becomes_a_cache_with_the_reason_said(protocol, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "STORE_MIN_CLIPS", 0)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage)
    said = []
    source = open_source(protocol, folder=tmp_path / "stores", progress=False, say=said.append)
    assert source.describe().startswith("cache")
    assert "Going on with the cache" in said[0] and capsys.readouterr().out == ""
    assert_same_clips(source, protocol)
