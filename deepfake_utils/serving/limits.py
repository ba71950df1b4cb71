"""What the service takes, and how it says no: limits, problems, and uploads that are watched as they come."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from deepfake_utils.conventions import AudioError
from deepfake_utils.serving.records import UnknownRecordError

SPOOL_BYTES = 2**20  # of an upload kept in memory; what is longer goes to a temporary file
FORM_FIELD_BYTES = 2**16
ONE_RECORDING = (
    "send one recording in each request, as the body or as the one file of a form (curl -F file=@call.m4a, with the @)"
)
PROBLEM_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Limits:
    """What one process of the service takes; all of it is stated in every answer.

    Attributes:
        upload_bytes, recording_s: of a recording that is answered at once.
        answer_s: how long such an answer may take, waiting included.
        concurrent: recordings looked at at the same time; live streams share them.
        queue: recordings that may wait for that.
        uploads: uploads that may be under way.
        grace_s, bytes_per_s: an upload may take `grace_s` and a second for every `bytes_per_s` it has brought.
        json_bytes: of a message that is no recording.
        job_bytes, job_s, jobs: size and length of a recording for later, and how many may wait.
        streams, stream_s, idle_s: live streams at a time, their length, and how far one may fall behind the clock.
    """

    upload_bytes: int = 64 * 2**20
    recording_s: float = 600.0
    answer_s: float = 60.0
    concurrent: int = os.cpu_count() or 1
    queue: int = 64
    uploads: int = 256
    grace_s: float = 10.0
    bytes_per_s: int = 16_000
    json_bytes: int = 2**16
    job_bytes: int = 2**30
    job_s: float = 4 * 3600.0
    jobs: int = 100
    streams: int = 16
    stream_s: float = 3600.0
    idle_s: float = 30.0

    def stated(self) -> dict:
        """The limits as they stand in an answer."""
        return asdict(self)

    def of_jobs(self) -> Limits:
        """The same for recordings for later: longer, larger, and without a time to answer in."""
        return replace(self, upload_bytes=self.job_bytes, recording_s=self.job_s, answer_s=float("inf"))


class Problem(Exception):
    """A request that gets no for an answer; its text says what is wrong and what to do."""

    def __init__(self, status: int, title: str, detail: str, **extra):
        super().__init__(detail)
        self.status, self.title, self.extra = status, title, extra

    @property
    def body(self) -> dict:
        """As RFC 9457 writes it."""
        slug = self.title.replace(" ", "-")
        about = {"type": f"urn:deepfake-utils:problem:{slug}", "title": self.title, "status": self.status}
        return about | {"detail": str(self)} | self.extra


def as_problem(error: Exception) -> Problem:
    """What the client is told of an error."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, AudioError):
        return Problem(422, "unreadable recording", str(error))
    if isinstance(error, UnknownRecordError):
        return Problem(404, "unknown id", str(error))
    return Problem(500, "service failed", "the service failed; its log says why. The request may be sent again")


class Places:
    """Room for a number of things at a time, each of which takes a place for the length of a `with`.

    Args:
        n: how many there are.
        what: what takes them, as in "20 uploads are under way already".
        limits: the `Limits` that say so, by name.
    """

    def __init__(self, n: int, what: str, **limits):
        self._n, self._what, self._limits, self.n_taken = n, what, limits, 0

    def refuse_if_full(self) -> None:
        """Raise a Problem where no place is left."""
        if self.n_taken >= self._n:
            told = f"{self.n_taken} {self._what} already: send it again in a few seconds"
            raise Problem(503, "too busy", told, limit=self._limits)

    def __enter__(self) -> None:
        self.refuse_if_full()
        self.n_taken += 1

    def __exit__(self, *exception) -> None:
        self.n_taken -= 1


class Arriving:
    """The body of a request as it arrives, watched for size and pace; a `receive` in place of the server's."""

    def __init__(self, request: Request, max_bytes: int, limits: Limits):
        self._receive, self._max_bytes, self._limits = request.receive, max_bytes, limits
        self._n_bytes, self._started = 0, time.monotonic()
        if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
            told = f"its Content-Encoding is {coding[:50]}, which is not undone here: send the content as it is"
            raise Problem(415, "encoded content", told)
        stated = request.headers.get("content-length", "")
        if stated.isdigit() and int(stated) > max_bytes:
            raise self._too_large()

    async def __call__(self) -> dict:
        """The next message of the server."""
        allowed_s = self._limits.grace_s + self._n_bytes / self._limits.bytes_per_s
        try:
            async with asyncio.timeout(max(0.0, self._started + allowed_s - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise Problem(
                408, "too slow",
                f"{self._n_bytes:,} bytes came in {time.monotonic() - self._started:.0f} s and then nothing in time: "
                "send it over a faster connection, or compressed",
                limit={"grace_s": self._limits.grace_s, "bytes_per_s": self._limits.bytes_per_s},
            ) from None  # fmt: skip
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > self._max_bytes:
            raise self._too_large()
        return message

    def _too_large(self) -> Problem:
        return Problem(
            413, "too large",
            f"more than {self._max_bytes:,} bytes: send a shorter or compressed recording"
            + ("" if self._max_bytes >= self._limits.job_bytes else ", or send it to /v1/jobs"),
            limit={"bytes": self._max_bytes},
        )  # fmt: skip


async def read_json(request: Request, limits: Limits) -> bytes:
    """A small body, whole."""
    return await Request(request.scope, Arriving(request, limits.json_bytes, limits)).body()


async def read_upload(request: Request, limits: Limits) -> BinaryIO:
    """The recording in a request, raw or as the one file of a form, as a temporary file; its name is not looked at.

    Raises:
        Problem: it is too large, too slow, or not there.
    """
    arriving = Request(request.scope, Arriving(request, limits.upload_bytes, limits))
    if arriving.headers.get("content-type", "").lower().startswith("multipart/"):
        file = await _file_of_form(arriving)
    else:
        file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - whoever looks at it closes it
        async for chunk in arriving.stream():
            file.write(chunk)
    if not file.seek(0, os.SEEK_END):
        raise Problem(400, "no recording", f"there is no recording in the request, or it is empty: {ONE_RECORDING}")
    file.seek(0)
    return file


async def _file_of_form(request: Request) -> BinaryIO:
    try:
        form = await request.form(max_files=1, max_fields=8, max_part_size=FORM_FIELD_BYTES)
    except HTTPException as error:  # also where a second file begins
        raise Problem(400, "no form with one file", f"{error.detail} {ONE_RECORDING}") from None
    fields = {name: value for name, value in form.multi_items() if not isinstance(value, UploadFile)}
    if fields:
        raise Problem(
            400, "no form with one file",
            f"the form has a field {next(iter(fields))[:50]!r}, which is no file: {ONE_RECORDING}. Options belong into "
            "the address, as in /v1/score?keep=true",
        )  # fmt: skip
    if not form:
        raise Problem(400, "no recording", f"there is no recording in the form: {ONE_RECORDING}")
    return next(iter(form.values())).file
