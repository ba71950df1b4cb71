"""What the service must not forget: verdicts, feedback and jobs, in SQLite or PostgreSQL.

A record is on the disk before the answer that rests on it is given.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import sqlalchemy as sa

from deepfake_utils.conventions import BONAFIDE, LABEL_NAMES, SPOOF, ConfigError, DeepfakeUtilsError

TRUTHS = (LABEL_NAMES[BONAFIDE], LABEL_NAMES[SPOOF])
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"  # states of a job
MAX_ATTEMPTS = 3  # at a job during which the service ended
NAME_LENGTH = 200  # of a client; an address is what a proxy says it is
BUSY_S = 30.0  # how long one writer waits for another in SQLite
# Until the end of a transaction: the replicas of a fleet make the tables of a new database all at once.
ALONE = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(14)"}


class Vector(sa.TypeDecorator):
    """Numbers (D,) in single precision, as bytes."""

    impl, cache_ok = sa.LargeBinary, True

    def process_bind_param(self, value, dialect):
        """Array -> bytes."""
        return None if value is None else np.asarray(value, "<f4").tobytes()

    def process_result_value(self, value, dialect):
        """Bytes -> array."""
        return None if value is None else np.frombuffer(value, "<f4")


_metadata = sa.MetaData()
verdicts = sa.Table(
    "verdicts", _metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("at", sa.Double, nullable=False, index=True),  # seconds since 1970
    sa.Column("client", sa.String(NAME_LENGTH), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),  # of the recording as it came
    sa.Column("score", sa.Double),  # log-odds of real speech, null without a verdict
    sa.Column("verdict", sa.String(20), nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("calibration", sa.String(200), nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("speech_seconds", sa.Double),
    sa.Column("level_db", sa.Double),  # mean power below full scale
    sa.Column("bandwidth_hz", sa.Double),
    sa.Column("kept_path", sa.Text),  # the recording itself, only with consent
    sa.Column("embedding", Vector),  # what the model's last layer saw, on average; null in records of before 2026-12
)  # fmt: skip
feedback = sa.Table(
    "feedback", _metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("verdict_id", sa.ForeignKey("verdicts.id"), nullable=False, index=True),
    sa.Column("at", sa.Double, nullable=False, index=True),
    sa.Column("client", sa.String(NAME_LENGTH), nullable=False),
    sa.Column("truth", sa.String(10), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("confirmed", sa.Boolean, nullable=False),
)  # fmt: skip
jobs = sa.Table(
    "jobs", _metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("at", sa.Double, nullable=False, index=True),
    sa.Column("client", sa.String(NAME_LENGTH), nullable=False),
    sa.Column("state", sa.String(10), nullable=False, index=True),
    sa.Column("path", sa.Text, nullable=False),  # the recording until the job is done
    sa.Column("keep", sa.Boolean, nullable=False),  # it after that, too
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("result", sa.JSON),
)  # fmt: skip


class UnknownRecordError(DeepfakeUtilsError):
    """No verdict or job has this id."""


class Records:
    """Verdicts, feedback and jobs in one database; any thread may use it.

    Args:
        url: an SQLAlchemy address, such as sqlite:///runs/service/records.sqlite or
            postgresql+psycopg://user@host/database; missing tables are made.

    Raises:
        ConfigError: there is no such database, it cannot be opened, or tables or columns are missing in it that this
            user may not add; it says who may, and how.
    """

    def __init__(self, url: str):
        try:
            address = sa.make_url(url)
            if address.get_backend_name() == "sqlite" and address.database:
                _make_private(address.database)
                self._engine = sa.create_engine(address, connect_args={"timeout": BUSY_S})
                sa.event.listen(self._engine, "connect", _prepare_sqlite)
            else:
                self._engine = sa.create_engine(address, pool_pre_ping=True)
            with self._engine.begin() as connection:
                if lock := ALONE.get(self._engine.dialect.name):
                    connection.exec_driver_sql(lock)
                _add_tables(connection)
                _add_columns(connection)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is needed for this database: pip install {error.name}") from None
        except (sa.exc.SQLAlchemyError, OSError) as error:
            shown = sa.make_url(url).render_as_string() if "://" in url else url  # without the password
            advice = "expected an address such as sqlite:///records.sqlite or postgresql+psycopg://user@host/database"
            if getattr(getattr(error, "orig", None), "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY:
                advice = "SQLite writes even to read: copy the file, and what lies beside it, to where you may write"
            raise ConfigError(f"the database {shown} cannot be opened ({_reason(error)}): {advice}") from None

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    def is_alive(self) -> bool:
        """Whether the database answers."""
        try:
            with self._engine.connect() as connection:
                connection.execute(sa.select(1))
        except sa.exc.SQLAlchemyError:
            return False
        return True

    # --- verdicts and feedback

    def add_verdict(self, **columns) -> str:
        """Record a verdict once.

        Args:
            columns: as those of the table `verdicts`; `id` and `at` are filled in where they are missing.

        Returns:
            Its id; a second verdict with the id of one recorded changes nothing.
        """
        row = {"id": new_id(), "at": time.time(), **columns}
        known = sa.exists().where(verdicts.c.id == row["id"])
        with self._engine.begin() as connection:
            if not connection.scalar(sa.select(known)):
                connection.execute(verdicts.insert(), row)
        return row["id"]

    def add_feedback(self, verdict_id: str, *, client: str, truth: str, note: str = "", confirmed: bool = False) -> str:
        """Record what a recording really was; `confirmed` where somebody besides the client has looked into it.

        Raises:
            ConfigError: `truth` is neither "bonafide" nor "spoof".
            UnknownRecordError: there is no such verdict.
        """
        if truth not in TRUTHS:
            raise ConfigError(f"truth is {truth!r}: expected {' or '.join(TRUTHS)}")
        row = {"id": new_id(), "at": time.time(), "verdict_id": verdict_id, "client": client, "truth": truth}
        with self._engine.begin() as connection:
            known = sa.select(sa.exists().where(verdicts.c.id == verdict_id))
            if not _is_id(verdict_id) or not connection.scalar(known):
                raise UnknownRecordError(f"there is no verdict {verdict_id!r}: send the id that came with the verdict")
            connection.execute(feedback.insert(), row | {"note": note, "confirmed": confirmed})
        return row["id"]

    def confirm_feedback(self, *ids: str, confirmed: bool = True) -> int:
        """Mark feedback as looked into, or take that back; returns how many there were."""
        with self._engine.begin() as connection:
            change = feedback.update().where(feedback.c.id.in_(ids)).values(confirmed=confirmed)
            return connection.execute(change).rowcount

    def verdicts(self, since: datetime | None = None) -> pd.DataFrame:
        """All verdicts, or those from a time on, in order; columns of the table `verdicts`, `at` in UTC.

        Embeddings, which are large, are asked for with `embeddings`.
        """
        return self._frame(verdicts, since, without=("embedding",))

    def embeddings(self, ids: Iterable[str]) -> pd.Series:
        """The embeddings (D,) of verdicts, by their ids; those that have none are left out."""
        query = sa.select(verdicts.c.id, verdicts.c.embedding)
        query = query.where(verdicts.c.id.in_(list(ids)), verdicts.c.embedding.is_not(None))
        with self._engine.connect() as connection:
            return pd.Series(dict(connection.execute(query).all()), dtype=object)

    def feedback(self, since: datetime | None = None) -> pd.DataFrame:
        """All feedback, or that from a time on, in order; columns of the table `feedback`, `at` in UTC."""
        return self._frame(feedback, since)

    def _frame(self, table: sa.Table, since: datetime | None, without: tuple = ()) -> pd.DataFrame:
        columns = [column for column in table.c if column.name not in without]
        query = sa.select(*columns).order_by(table.c.at, table.c.id)
        if since is not None:
            query = query.where(table.c.at >= since.timestamp())
        with self._engine.connect() as connection:
            frame = pd.DataFrame(connection.execute(query).all(), columns=[column.name for column in columns])
        frame["at"] = pd.to_datetime(frame["at"].astype(float), unit="s", utc=True)
        return frame

    # --- jobs

    def add_job(self, id: str, path: str | Path, *, client: str, keep: bool) -> None:
        """Take in a job whose recording is on the disk."""
        row = {"id": id, "at": time.time(), "client": client, "state": WAITING, "path": str(path)}
        with self._engine.begin() as connection:
            connection.execute(jobs.insert(), row | {"keep": keep, "attempts": 0})

    def job(self, id: str) -> dict:
        """One job as a dictionary of the table's columns.

        Raises:
            UnknownRecordError: there is no such job.
        """
        row = None
        if _is_id(id):
            with self._engine.connect() as connection:
                row = connection.execute(sa.select(jobs).where(jobs.c.id == id)).mappings().one_or_none()
        if row is None:
            raise UnknownRecordError(f"there is no job {id!r}: send the id that came when it was accepted")
        return dict(row)

    def next_job(self) -> dict | None:
        """The job that has waited longest, from now on running; None where none waits."""
        first = sa.select(jobs.c.id).where(jobs.c.state == WAITING).order_by(jobs.c.at).limit(1)
        with self._engine.begin() as connection:
            id = connection.scalar(first.with_for_update(skip_locked=True))
            if id is None:
                return None
            claim = jobs.update().where(jobs.c.id == id, jobs.c.state == WAITING)
            if not connection.execute(claim.values(state=RUNNING, attempts=jobs.c.attempts + 1)).rowcount:
                return None
        return self.job(id)

    def finish_job(self, id: str, state: str, result: dict) -> None:
        """Write what became of a job: "done" with the verdict, or "failed" with the problem."""
        with self._engine.begin() as connection:
            connection.execute(jobs.update().where(jobs.c.id == id).values(state=state, result=result))

    def revive_jobs(self) -> int:
        """Let jobs wait again that were running when the service ended; returns how many.

        One that was running at several ends may have caused them: it has failed.
        """
        cut_off = jobs.update().where(jobs.c.state == RUNNING)
        reason = {"title": "given up", "detail": f"the service ended {MAX_ATTEMPTS} times while this job was running"}
        with self._engine.begin() as connection:
            suspects = cut_off.where(jobs.c.attempts >= MAX_ATTEMPTS)
            connection.execute(suspects.values(state=FAILED, result=reason | {"status": 500}))
            return connection.execute(cut_off.values(state=WAITING)).rowcount

    def unfinished_jobs(self) -> set[str]:
        """Ids of the jobs that wait or run."""
        with self._engine.connect() as connection:
            return set(connection.scalars(sa.select(jobs.c.id).where(jobs.c.state.in_((WAITING, RUNNING)))))


def new_id() -> str:
    """A name for a record that nobody can guess: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def _is_id(text: str) -> bool:
    return text.isascii() and text.isalnum()  # PostgreSQL takes no zero byte, and no half of a character


def existing_database(url: str) -> str:
    """The address of records that are there, the same from every folder: of an SQLite file with its whole path.

    Raises:
        ConfigError: it names an SQLite file that is not there, where opening it would make an empty one.
    """
    try:
        address = sa.make_url(url)
    except sa.exc.ArgumentError:
        return url  # Records says what is wrong with it
    if address.get_backend_name() != "sqlite" or not address.database or address.database == ":memory:":
        return url
    path = Path(address.database).absolute()
    if not path.is_file():
        raise ConfigError(
            f"{path}: there is no such file with the records of a service: expected records.sqlite in the folder of "
            "`serve`, such as sqlite:///runs/service/records.sqlite"
        )
    return address.set(database=str(path)).render_as_string(hide_password=False)


def _add_tables(connection: sa.Connection) -> None:
    try:
        _metadata.create_all(connection)
    except (sa.exc.OperationalError, sa.exc.ProgrammingError) as error:
        if connection.dialect.name != "postgresql":
            raise
        quote, schema = connection.dialect.identifier_preparer.quote, connection.dialect.default_schema_name
        raise ConfigError(
            f"tables are missing in the database, and this user may not make them ({_reason(error)}): let an "
            f"administrator run, once: GRANT CREATE, USAGE ON SCHEMA {quote(schema or 'public')} TO "
            f"{quote(connection.engine.url.username or 'USER')}"
        ) from None


def _add_columns(connection: sa.Connection) -> None:
    """Give the tables of an older version the columns that they lack; all that were ever added may be null."""
    known = sa.inspect(connection)
    for table in _metadata.sorted_tables:
        present = {column["name"] for column in known.get_columns(table.name)}
        for column in (column for column in table.columns if column.name not in present):
            written = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
            statement = f"ALTER TABLE {table.name} ADD COLUMN {written}"
            try:
                connection.exec_driver_sql(statement)
            except (sa.exc.OperationalError, sa.exc.ProgrammingError) as error:
                raise ConfigError(
                    f"the table {table.name} is that of an older version, without the column {column.name}, and this "
                    f"user may not add it ({_reason(error)}): let the owner of the database run, once: {statement}"
                ) from None


def _reason(error: Exception) -> str:
    """The first line of what the database itself said."""
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def _make_private(database: str) -> None:
    """An empty file that nobody else on this machine can read; the files that SQLite puts beside it are as it is."""
    path = Path(database)
    if database != ":memory:" and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)


def _prepare_sqlite(connection, _) -> None:
    cursor = connection.cursor()
    _log_ahead(cursor)
    cursor.execute("PRAGMA synchronous=FULL")  # what was answered survives a power cut, too
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _log_ahead(cursor) -> None:
    """Switch to a write-ahead log, so that readers do not wait for the writer.

    SQLite lets nobody wait for this switch: where two open a new file at once, one is told that it is locked.
    """
    until = time.monotonic() + BUSY_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
