"""The service's memory: the same on SQLite and on a real PostgreSQL, and whole after a kill."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")

import sqlalchemy as sa

from deepfake_utils.conventions import ConfigError
from deepfake_utils.serving.feedback import claims_of
from deepfake_utils.serving.records import (
    DONE,
    FAILED,
    RUNNING,
    WAITING,
    Records,
    UnknownRecordError,
    existing_database,
    new_id,
)

VERDICT = dict(
    client="alice", sha256="0" * 64, score=-1.5, verdict="fake", model="open-1", calibration="1.16 -0.82",
    seconds=4.0, speech_seconds=3.2, level_db=-23.0, bandwidth_hz=7000.0,
)  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def records(request, tmp_path):
    url = f"sqlite:///{tmp_path}/deep/records.sqlite"
    records = Records(url if request.param == "sqlite" else request.getfixturevalue("postgres_url"))
    yield records
    records.close()


def test_verdicts_and_feedback_come_back_as_they_were_given(records):
    before = datetime.now(UTC)
    id = records.add_verdict(**VERDICT)
    silent = records.add_verdict(**VERDICT | dict(score=None, verdict="no verdict", speech_seconds=0.0))
    frame = records.verdicts(since=before).set_index("id")
    assert {name: frame.loc[id, name] for name in VERDICT} == VERDICT
    assert frame.loc[[silent], "score"].isna().all()
    assert before - timedelta(seconds=1) < frame.loc[id, "at"] < datetime.now(UTC) + timedelta(seconds=1)
    assert records.verdicts(since=datetime.now(UTC) + timedelta(hours=1)).empty

    said = records.add_feedback(id, client="bob", truth="bonafide", note="I know him; '); drop table verdicts")
    row = records.feedback().set_index("id").loc[said]
    assert (row.verdict_id, row.truth, bool(row.confirmed)) == (id, "bonafide", False)
    assert records.confirm_feedback(said, "nobody") == 1
    assert bool(records.feedback().set_index("id").loc[said, "confirmed"])


def test_embeddings_come_back_in_single_precision_and_with_their_ids(records):
    told, silent = np.array([0.1, -2.0, 3e-9]), records.add_verdict(**VERDICT)
    id = records.add_verdict(**VERDICT, embedding=told)
    found = records.embeddings([silent, id, "nobody"])
    assert found.index.tolist() == [id] and records.embeddings([]).empty
    np.testing.assert_array_equal(found[id], told.astype(np.float32))
    assert "embedding" not in records.verdicts()


def test_records_of_an_older_version_are_gone_on_with(records):
    """What it wrote stays; columns that it did not know are added, by several processes at once as well."""
    id, url = records.add_verdict(**VERDICT), records._engine.url.render_as_string(hide_password=False)
    with records._engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE verdicts DROP COLUMN embedding")
    with ThreadPoolExecutor(4) as pool:
        newer = list(pool.map(lambda _: Records(url), range(4)))
    later = newer[0].add_verdict(**VERDICT, embedding=[1.0, 2.0])
    assert newer[1].embeddings([id, later]).index.tolist() == [later]
    assert {id, later} <= set(newer[2].verdicts()["id"])
    for one in newer:
        one.close()


@pytest.fixture
def two_users(postgres_url):
    """Addresses of a schema for its owner, and for somebody who owns nothing there."""
    with sa.create_engine(postgres_url).begin() as owner:
        owner.exec_driver_sql("CREATE ROLE writer LOGIN; CREATE SCHEMA narrow; GRANT USAGE ON SCHEMA narrow TO writer")
    there = "&options=-csearch_path%3Dnarrow"
    yield postgres_url + there, postgres_url.replace("//tests@", "//writer:secret@") + there
    with sa.create_engine(postgres_url).begin() as owner:
        owner.exec_driver_sql("DROP SCHEMA narrow CASCADE; DROP ROLE writer")


def test_a_user_who_may_not_change_tables_is_told_what_somebody_else_should_run(two_users):
    of_owner, of_writer = two_users
    owner = sa.create_engine(of_owner)

    def run(*statements: str) -> None:
        with owner.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def advice(match: str) -> str:
        with pytest.raises(ConfigError, match=match) as problem:
            Records(of_writer)
        assert "secret" not in str(problem.value)
        return str(problem.value).partition("run, once: ")[2]

    run(advice("tables are missing .*permission denied"))
    Records(of_writer).close()
    run(*(f"ALTER TABLE {name} OWNER TO tests" for name in ("verdicts", "feedback", "jobs")))
    run("GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA narrow TO writer")
    run("ALTER TABLE verdicts DROP COLUMN embedding")
    run(advice("without the column embedding.*must be owner"))
    records = Records(of_writer)
    id = records.add_verdict(**VERDICT, embedding=[1.0])
    assert records.embeddings([id]).size == 1
    records.close()
    owner.dispose()


@contextmanager
def who_may_not_write(folder: Path):
    """The folder as it is for somebody who may only read; root may always write, so that root is somebody else then."""
    files = [*folder.iterdir(), folder]
    for path in files:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if is_root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path in files:
            path.chmod(0o755)


def test_an_sqlite_file_that_may_only_be_read():
    """While the service runs it can be; of an older version, or as a copy of which SQLite cannot lock, that is said."""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's own, which it closes to other users
        url = f"sqlite:///{folder}/records.sqlite"
        running = Records(url)
        id = running.add_verdict(**VERDICT)
        with who_may_not_write(Path(folder)):
            assert Records(url).verdicts()["id"].tolist() == [id]
        with running._engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE verdicts DROP COLUMN embedding")
        with who_may_not_write(Path(folder)), pytest.raises(ConfigError, match="run, once: ALTER TABLE verdicts ADD"):
            Records(url)
        running.close()
        with who_may_not_write(Path(folder)), pytest.raises(ConfigError, match="copy the file"):
            Records(url)


def test_feedback_needs_a_verdict_and_a_truth(records):
    with pytest.raises(UnknownRecordError, match="no verdict 'nothing'"):
        records.add_feedback("nothing", client="bob", truth="spoof")
    id = records.add_verdict(**VERDICT)
    with pytest.raises(ConfigError, match="bonafide or spoof"):
        records.add_feedback(id, client="bob", truth="true")


@pytest.mark.parametrize("id", ["\0", "a\0b", "\udcff", "x" * 10_000, "' or 1=1 --", ""])
def test_what_can_be_no_id_is_unknown(records, id):
    with pytest.raises(UnknownRecordError):
        records.job(id)
    with pytest.raises(UnknownRecordError):
        records.add_feedback(id, client="bob", truth="spoof")


def test_a_verdict_is_recorded_once(records):
    id = records.add_verdict(**VERDICT)
    assert records.add_verdict(**VERDICT | dict(id=id, score=3.0)) == id
    assert records.verdicts().set_index("id").loc[[id], "score"].tolist() == [-1.5]


def test_each_job_is_given_to_one_worker(records):
    ids = {new_id() for _ in range(20)}
    for id in ids:
        records.add_job(id, f"/somewhere/{id}", client="alice", keep=False)
    assert records.unfinished_jobs() == ids

    def work(_):
        taken = []
        while job := records.next_job():
            taken.append(job["id"])
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [id for part in pool.map(work, range(4)) for id in part]
    while job := records.next_job():  # a worker that lost a race gave up
        taken.append(job["id"])
    assert sorted(taken) == sorted(ids)
    first = taken[0]
    records.finish_job(first, DONE, {"verdict": "fake"})
    assert records.revive_jobs() == 19
    assert records.job(first)["result"] == {"verdict": "fake"} and records.job(taken[1])["state"] == WAITING
    with pytest.raises(UnknownRecordError, match="no job"):
        records.job("nothing")
    while job := records.next_job():
        assert job["state"] == RUNNING
        records.finish_job(job["id"], DONE, {})
    assert records.unfinished_jobs() == set()


def test_a_job_that_ends_the_service_each_time_is_given_up(records):
    id = new_id()
    records.add_job(id, "/somewhere", client="alice", keep=False)
    for revived in (1, 1, 0):
        assert records.next_job()["id"] == id
        assert records.revive_jobs() == revived
    assert records.job(id)["state"] == FAILED and "3 times" in records.job(id)["result"]["detail"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_many_may_open_a_new_database_at_once(kind, tmp_path, request):
    """As the replicas of a fleet do at its first start."""
    urls = [f"sqlite:///{tmp_path}/{i}.sqlite" for i in range(30)]  # one in ten met a locked file
    if kind == "postgresql":
        server = request.getfixturevalue("postgres_url")
        with sa.create_engine(server).begin() as connection:
            for i in range(5):
                connection.exec_driver_sql(f"CREATE SCHEMA new_{i}")
        urls = [f"{server}&options=-csearch_path%3Dnew_{i}" for i in range(5)]
    together = Barrier(6)

    def open_and_write(url: str) -> None:
        together.wait()
        records = Records(url)
        records.add_verdict(**VERDICT)
        records.close()

    with ThreadPoolExecutor(6) as pool:
        for url in urls:
            for done in [pool.submit(open_and_write, url) for _ in range(6)]:
                done.result()
            assert len(Records(url).verdicts()) == 6


def test_what_was_recorded_survives_a_kill(tmp_path):
    url = f"sqlite:///{tmp_path}/records.sqlite"
    code = f"""
        from deepfake_utils.serving.records import Records
        records = Records({url!r})
        while True:
            print(records.add_verdict(**{VERDICT!r}), flush=True)
    """
    root = Path(__file__).parents[1]
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    said = [writer.stdout.readline().strip() for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    said += [line.strip() for line in writer.communicate()[0].splitlines() if len(line.strip()) == 32]
    assert set(said) <= set(Records(url).verdicts()["id"])


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////proc/none/x.sqlite", "postgresql+psycopg://x:secret@/y?host=/none"]
)
def test_a_database_that_cannot_be_opened_is_one_error_without_the_password(url):
    with pytest.raises(ConfigError, match="cannot be opened") as problem:
        Records(url)
    assert "secret" not in str(problem.value)


def test_nobody_else_on_the_machine_reads_the_records(tmp_path):
    records = Records(f"sqlite:///{tmp_path}/new/records.sqlite")
    records.add_verdict(**VERDICT)
    files = list((tmp_path / "new").iterdir())
    assert len(files) >= 2, "the file itself, and that of what was written last"
    assert not any(path.stat().st_mode & 0o077 for path in files)


def test_records_that_are_looked_into_are_there_and_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path}/service/records.sqlite: there is no such file"):
        existing_database("sqlite:///service/records.sqlite")
    assert not (tmp_path / "service").exists()
    Records("sqlite:///service/records.sqlite").add_verdict(**VERDICT)
    url = existing_database("sqlite:///service/records.sqlite")
    monkeypatch.chdir("/")
    assert len(Records(url).verdicts()) == 1
    assert existing_database("postgresql+psycopg://user:secret@host/db") == "postgresql+psycopg://user:secret@host/db"


def test_without_feedback_nobody_claims_anything(tmp_path):
    records = Records(f"sqlite:///{tmp_path}/records.sqlite")
    assert claims_of(records.feedback(), records.verdicts()).empty, "nothing judged yet"
    records.add_feedback(records.add_verdict(**VERDICT), client="bob", truth="spoof", confirmed=True)
    claims = claims_of(records.feedback(), records.verdicts())
    assert claims.empty and list(claims) == ["sha256", "client", "label", "path"], "confirmed, of a recording not kept"
