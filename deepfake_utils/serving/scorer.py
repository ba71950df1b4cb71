"""Recordings through the detector that is in service, a few at a time, outside of the event loop."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from deepfake_utils.conventions import SAMPLE_RATE_HZ, CheckpointError, DeepfakeUtilsError
from deepfake_utils.probing.shortcuts import bandwidth_hz, decibels, mean_spectrum
from deepfake_utils.scoring.detector import SHIPPED, Detector, Judged, Verdict
from deepfake_utils.scoring.published import sha256_of
from deepfake_utils.scoring.weights import weights_file
from deepfake_utils.serving.limits import Limits, Places, Problem
from deepfake_utils.serving.versions import POINTER
from deepfake_utils.waveforms.damage import what_follows
from deepfake_utils.waveforms.decode import iter_audio
from deepfake_utils.waveforms.decoders import read_header
from deepfake_utils.waveforms.recording import opened

log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class InService:
    """A detector, and what it is called in records."""

    detector: Detector
    version: str

    @property
    def calibration(self) -> str:
        """Its calibration in a few characters, or "none"."""
        scale = self.detector.facts.get("calibration")
        return f"slope {scale['slope']:.6g}, offset {scale['offset']:.6g}" if scale else "none"


class Heard(NamedTuple):
    """A verdict, and what else is known of its recording."""

    verdict: Verdict
    model: str
    calibration: str
    level_db: float | None
    bandwidth_hz: float | None
    embedding: np.ndarray | None  # (D,), mean over the windows

    @property
    def columns(self) -> dict:
        """As those of the table of verdicts."""
        return {
            "score": self.verdict.log_odds,
            "verdict": self.verdict.verdict,
            "model": self.model,
            "calibration": self.calibration,
            "seconds": self.verdict.duration_s,
            "speech_seconds": self.verdict.speech_s,
            "level_db": self.level_db,
            "bandwidth_hz": self.bandwidth_hz,
            "embedding": self.embedding,
        }


class Listening:
    """One recording or stream on its way through a detector, with its length watched.

    Args:
        max_s: the most seconds it may have.
    """

    def __init__(self, by: InService, max_s: float):
        self._by, self._max_s = by, max_s
        self._stream = by.detector.stream(SAMPLE_RATE_HZ)
        self._n_samples, self._power, self._spectrum = 0, 0.0, 0.0

    def push(self, samples: np.ndarray) -> list[Judged]:
        """16 kHz samples (n,) -> the windows they complete.

        Raises:
            Problem: it is too long.
        """
        self._n_samples += len(samples)
        refuse_long(self._n_samples / SAMPLE_RATE_HZ, self._max_s)
        if len(samples):
            self._power += float(np.square(samples, dtype=np.float64).sum())
            self._spectrum += len(samples) * mean_spectrum(samples)[1]
        return self._stream.push(samples)

    def finish(self, notes: list[str] | tuple = ()) -> Heard:
        """The end, and the verdict; notes are what the decoder had to say."""
        self._stream.finish()
        verdict, n = self._stream.verdict, self._n_samples
        verdict = replace(verdict, warnings=(*notes, *verdict.warnings))
        level = decibels(self._power / n) if n else None
        band = bandwidth_hz(mean_spectrum(np.zeros(1))[0], self._spectrum) if n else None
        return Heard(verdict, self._by.version, self._by.calibration, level, band, self._stream.embedding)


def listen_to(file: BinaryIO, by: InService, max_s: float, given_up: threading.Event) -> Heard:
    """Look at the whole of a recording, block by block.

    Raises:
        Problem: it is longer than `max_s`, by its header or in truth, it is several, or it was given up meanwhile.
        AudioError: it cannot be read.
    """
    with opened(file, []) as recording:
        n_samples, rate_hz, is_exact = read_header(recording)
        if is_exact and rate_hz > 0:
            refuse_long(n_samples / rate_hz, max_s)
        if (follows := what_follows(recording, of_any_kind=True)) is not None:
            raise Problem(
                422, "several recordings",
                f"another recording begins near byte {follows:,} of {recording.n_bytes:,}, and no more than what is "
                "before it would be looked at: send each in a request of its own",
            )  # fmt: skip
    listening, notes = Listening(by, max_s), []
    for block in iter_audio(file, notes=notes):
        if given_up.is_set():
            raise Problem(503, "too slow here", "the service gave this up, for want of time or at its own end")
        listening.push(block)
    return listening.finish(notes)


def refuse_long(seconds: float, max_s: float) -> None:
    """Refuse what is longer than `max_s`."""
    if seconds > max_s:
        raise Problem(
            413, "too long",
            f"it lasts more than {max_s:g} s: send a part of it, or, up to the limit job_s, send it to /v1/jobs",
            limit={"seconds": max_s},
        )  # fmt: skip


class Scorer:
    """The detector in service, and the threads that ask it.

    Args:
        weights: what to use while no pointer says otherwise; as for `Detector.load`.
        models: folder with the pointer `current.json`, which is followed while the service runs.
        load, options: what gives the detector, as `Detector.load` does; its use and device.

    Attributes:
        current: the detector in service.
        waiting: the places of recordings that wait or are looked at.
        problem: why the pointer is not followed; "" where all is well.

    Raises:
        DeepfakeUtilsError: the weights cannot be loaded.
    """

    def __init__(self, weights: str | None, models: Path, limits: Limits, load: Callable = Detector.load, **options):
        self._weights, self._pointer, self._options = weights, models / POINTER, options
        self._load_detector = load
        self.waiting = Places(
            limits.concurrent + limits.queue, "recordings wait", concurrent=limits.concurrent, queue=limits.queue
        )
        self._loading, self.problem = threading.Lock(), ""
        self._pool = ThreadPoolExecutor(limits.concurrent, "scorer")
        self._seen = self._stamp()
        self.current = self._load()

    async def run(self, work: Callable, *arguments):
        """What some work gives that a thread does, where there is room; it is done even if nobody waits for it.

        Raises:
            Problem: too many wait.
        """
        with self.waiting:
            return await asyncio.wrap_future(self._pool.submit(work, *arguments))

    def follow(self) -> InService:
        """The detector in service; where the pointer has changed, the next one is loaded beside it meanwhile."""
        if self._stamp() != self._seen and self._loading.acquire(blocking=False):
            threading.Thread(target=self._replace, name="loader").start()
        return self.current

    def close(self) -> None:
        """Let the threads end what they have begun."""
        self._pool.shutdown(cancel_futures=True)

    def _stamp(self) -> tuple | None:
        try:
            status = self._pointer.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def _replace(self) -> None:
        try:
            self._seen = self._stamp()  # before it is read: a change meanwhile is seen again
            self.current, self.problem = self._load(), ""
            log.info("now in service: %s", self.current.version)
        except (DeepfakeUtilsError, OSError) as error:
            self.problem = f"{error}; {self.current.version} stays in service"
            log.error("%s", self.problem)
        finally:
            self._loading.release()

    def _load(self) -> InService:
        if self._seen is None:
            detector = self._load_detector(self._weights, **self._options)
            file = weights_file(SHIPPED if self._weights is None else self._weights)
            return InService(detector, f"{file.stem}-{sha256_of(file.read_bytes())[:8]}")
        try:
            pointer = json.loads(self._pointer.read_text(encoding="utf-8"))
            weights, version = pointer["weights"], str(pointer["version"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f'{self._pointer} cannot be followed ({error!r}): expected {{"weights": path, "version": name}}'
            ) from None
        beside = self._pointer.parent / weights
        return InService(self._load_detector(beside if beside.exists() else weights, **self._options), version)
