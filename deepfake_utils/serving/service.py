"""What the service does with recordings, whichever way they come: look, record, keep, answer; now or as a job."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy.exc import SQLAlchemyError

from deepfake_utils.files import atomic_write
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.serving.limits import Limits, Places, Problem, as_problem
from deepfake_utils.serving.metrics import Metrics
from deepfake_utils.serving.records import DONE, FAILED, Records, new_id
from deepfake_utils.serving.scorer import Heard, Scorer, listen_to

log = logging.getLogger("uvicorn.error")
ACCEPTING_S = 120.0  # from an upload on the disk to its record, at most; another process may be at it
JOB_WAIT_S = 1.0  # between looks for a job that another process has accepted


@dataclass(frozen=True)
class Settings:
    """How a service is set up.

    Attributes:
        folder: where it keeps records, waiting jobs, and recordings kept by consent.
        weights: for `Detector.load`, while no pointer in `models` says otherwise.
        models: folder with the pointer `current.json`; None is `folder`/models.
        database: SQLAlchemy address; None is a file in `folder`.
        tokens: bearer token -> client's name; where there is none, anybody may ask, by the address they come from.
        use, device: for `Detector.load`.
    """

    folder: Path
    weights: str | None = None
    models: Path | None = None
    database: str | None = None
    tokens: dict[str, str] | None = None
    limits: Limits = Limits()
    use: str | None = None
    device: str = "auto"


class Service:
    """A detector with a memory.

    Args:
        settings: how it is set up.
        load: gives the detector, as `Detector.load` does.

    Raises:
        DeepfakeUtilsError: the weights or the database cannot be had.
    """

    def __init__(self, settings: Settings, load: Callable[..., Detector] = Detector.load):
        self.settings, self.limits = settings, settings.limits
        folder = Path(settings.folder).absolute()
        self._kept, self._jobs = folder / "kept", folder / "jobs"
        for private in (self._kept, self._jobs):
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.records = Records(settings.database or f"sqlite:///{folder}/records.sqlite")
        models = Path(settings.models or folder / "models").absolute()
        options = {"use": settings.use, "device": settings.device}
        self.scorer = Scorer(settings.weights, models, self.limits, load, **options)
        self.uploads = Places(self.limits.uploads, "uploads are under way", uploads=self.limits.uploads)
        self.streams = Places(self.limits.streams, "live streams are under way", streams=self.limits.streams)
        self.metrics = Metrics(self.scorer, self.uploads, self.streams)
        self._ending, self._new_job = threading.Event(), threading.Event()
        self._runner = threading.Thread(target=self._run_jobs, name="jobs")

    def start(self) -> None:
        """Go on with the jobs that were accepted before."""
        self.records.revive_jobs()
        unfinished = self.records.unfinished_jobs()
        for path in self._jobs.iterdir():  # uploads that were never accepted, because the service ended
            if path.name not in unfinished and time.time() - path.stat().st_mtime > ACCEPTING_S:
                path.unlink(missing_ok=True)
        self._runner.start()

    def close(self) -> None:
        """End: what is being looked at is given up, jobs wait for the next start."""
        self._ending.set()
        self._new_job.set()
        if self._runner.is_alive():
            self._runner.join()
        self.scorer.close()
        self.records.close()

    # --- at once

    async def score(self, file: BinaryIO, client: str, keep: bool) -> dict:
        """The answer on a recording.

        Raises:
            Problem, AudioError: there is none.
        """
        given_up = threading.Event()
        by, limits = self.scorer.follow(), self.limits

        def work() -> dict:
            with file:
                heard = listen_to(file, by, limits.recording_s, given_up)
                return self._recorded(heard, file, client, keep, new_id())

        try:
            async with asyncio.timeout(limits.answer_s):
                return await self.scorer.run(work)
        except TimeoutError:
            raise Problem(
                503, "too slow here",
                f"no answer within {limits.answer_s:g} s: send it again later, or send it to /v1/jobs",
                limit={"answer_s": limits.answer_s},
            ) from None  # fmt: skip
        finally:
            given_up.set()

    def _recorded(self, heard: Heard, file: BinaryIO, client: str, keep: bool, id: str) -> dict:
        """The answer on a recording, once it is recorded, and the recording kept where that was asked for."""
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        kept_path = self._keep(file, sha256) if keep else None
        return self.record(heard, sha256, client, id, kept_path)

    def record(self, heard: Heard, sha256: str, client: str, id: str, kept_path: Path | None = None) -> dict:
        """Record a verdict, count it, and return the answer that states it."""
        kept = None if kept_path is None else str(kept_path)
        self.records.add_verdict(id=id, client=client, sha256=sha256, kept_path=kept, **heard.columns)
        self.metrics.heard(heard)
        return answer(heard, id, kept_path is not None, self.limits)

    def _keep(self, file: BinaryIO, sha256: str) -> Path:
        target = self._kept / sha256[:2] / sha256  # no name of the client's is part of a path
        if not target.exists():
            file.seek(0)
            with atomic_write(target) as part, part.open("wb") as copy:
                shutil.copyfileobj(file, copy)
        return target

    # --- later

    def accept_job(self, file: BinaryIO, client: str, keep: bool) -> str:
        """Take a recording in, to be looked at later; returns the job's id once nothing can lose it.

        Raises:
            Problem: too many wait.
        """
        if (n_waiting := len(self.records.unfinished_jobs())) >= self.limits.jobs:
            told = f"{n_waiting} jobs wait already: send it again later"
            raise Problem(503, "too busy", told, limit={"jobs": self.limits.jobs})
        id = new_id()
        with file, atomic_write(self._jobs / id) as part, part.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        self.records.add_job(id, self._jobs / id, client=client, keep=keep)
        self._new_job.set()
        return id

    def _run_jobs(self) -> None:
        while not self._ending.is_set():
            try:
                job = self.records.next_job()
                if job:
                    self._run_job(job)
                    continue
            except SQLAlchemyError:
                log.exception("jobs wait for the database")
            self._new_job.wait(JOB_WAIT_S)
            self._new_job.clear()

    def _run_job(self, job: dict) -> None:
        path, limits = Path(job["path"]), self.limits.of_jobs()
        try:
            with path.open("rb", buffering=0) as file:
                heard = listen_to(file, self.scorer.follow(), limits.recording_s, self._ending)
                result = self._recorded(heard, file, job["client"], job["keep"], job["id"])
            state = DONE
        except SQLAlchemyError:
            raise
        except Exception as error:  # whatever a recording brings about, the jobs after it are run
            if self._ending.is_set():
                return  # it runs on paper, and waits again at the next start
            problem = as_problem(error)
            if problem.status == 500:
                log.exception("job %s failed", job["id"])
            self.metrics.refused(problem.title)
            state, result = FAILED, problem.body
        self.records.finish_job(job["id"], state, result)
        path.unlink(missing_ok=True)


def answer(heard: Heard, id: str, kept: bool, limits: Limits) -> dict:
    """What the client is told of a recording."""
    verdict = heard.verdict
    return {
        "id": id,
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "score": finite(verdict.score),
        "score_meaning": verdict.score_meaning,
        "probability_fake": finite(verdict.probability_fake),
        "prior_fake": verdict.prior_fake,
        "use": verdict.use,
        "seconds": verdict.duration_s,
        "speech_seconds": verdict.speech_s,
        "looked_at": verdict.looked_at,
        "windows": [window(judged) for judged in verdict.windows],
        "warnings": list(verdict.warnings),
        "model": heard.model,
        "calibration": heard.calibration,
        "kept": kept,
        "limits": limits.stated(),
    }


def window(judged) -> dict:
    """One judged window as JSON."""
    score = judged.logit_bonafide if judged.log_odds is None else judged.log_odds
    return {"start_s": judged.start_s, "end_s": judged.end_s, "speech_s": judged.speech_s, "score": finite(score)}


def finite(number: float | None) -> float | None:
    """A number JSON knows, or None."""
    return number if number is not None and math.isfinite(number) else None
