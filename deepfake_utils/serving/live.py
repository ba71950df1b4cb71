"""Live audio over a WebSocket: a hello in JSON, then sound; windows come back as they complete, at the end the verdict.

-> {"sample_rate_hz": 16000}
<- {"type": "ready", ...}
-> binary: mono samples, 16-bit little-endian, or float32 where the hello says so
<- {"type": "window", "start_s": 0.0, "end_s": 4.04, ...}
-> {"end": true}
<- {"type": "verdict", "id": ...}
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
from fastapi import WebSocket
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from deepfake_utils.conventions import AudioError
from deepfake_utils.serving.limits import Problem, as_problem
from deepfake_utils.serving.records import new_id
from deepfake_utils.serving.scorer import Listening
from deepfake_utils.serving.service import Service, window
from deepfake_utils.waveforms.decode import MAX_RATE_HZ, MIN_RATE_HZ, from_int16
from deepfake_utils.waveforms.mixing import refuse_impossible
from deepfake_utils.waveforms.resample import Resampler

MESSAGE_BYTES = 2**18  # of sound: 8 s of 16-bit samples at 16 kHz
EXAMPLE = '{"sample_rate_hz": 16000}'
HOW_TO = (
    f"open a WebSocket here and send a hello such as {EXAMPLE}, then mono samples as binary messages (16-bit "
    'little-endian, or float32 where the hello has "format": "float32"), at last {"end": true}; windows and then the '
    "verdict come back"
)
FILES = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM", b"caff", b"\x1aE\xdf\xa3")  # last: WebM, as browsers record
POLICY, NORMAL = 1008, 1000  # why a connection was closed


class Hello(BaseModel):
    """The first message of a live stream."""

    model_config = ConfigDict(extra="forbid")
    sample_rate_hz: int = Field(ge=MIN_RATE_HZ, le=MAX_RATE_HZ)
    format: Literal["int16", "float32"] = "int16"
    token: str | None = None  # for browsers, which cannot set a header


async def hold(socket: WebSocket, service: Service, who) -> None:
    """One live stream from its hello to its verdict; `who` tells the client's name from a token."""
    await socket.accept()
    try:
        if not service.settings.tokens:
            _refuse_foreign_pages(socket)
        hello = _hello(await _message(socket, service.limits.idle_s, service.limits.idle_s))
        client = who(hello.token)
        with service.streams:  # no place for who has not said who it is
            await socket.send_json({"type": "ready", "limits": service.limits.stated()})
            await socket.send_json(await _listen(socket, service, hello, client))
        await socket.close(NORMAL)
    except WebSocketDisconnect:
        return
    except (Problem, AudioError) as error:
        problem = as_problem(error)
        service.metrics.refused(problem.title)
        await socket.send_json({**problem.body, "type": "problem", "problem": problem.body["type"]})
        await socket.close(POLICY, problem.title)


def _refuse_foreign_pages(socket: WebSocket) -> None:
    """Browsers let any page open a WebSocket to anywhere, and read what comes back, which they do not with requests."""
    origin, host = socket.headers.get("origin"), socket.headers.get("host")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Problem(
            403, "foreign page",
            f"a page of {origin[:200]} may not listen at {host}: give its users tokens (DEEPFAKE_TOKENS), or let a "
            "proxy in between pass the header Host on as it came",
        )  # fmt: skip


async def _listen(socket: WebSocket, service: Service, hello: Hello, client: str) -> dict:
    listening = Listening(service.scorer.follow(), service.limits.stream_s)
    resampler, sha256, n_bytes = Resampler(hello.sample_rate_hz), hashlib.sha256(), 0

    def push(samples: np.ndarray) -> list:
        return listening.push(np.clip(samples, -1.0, 1.0).astype(np.float32))

    def end() -> dict:
        push(resampler.finish())
        return service.record(listening.finish(), sha256.hexdigest(), client, new_id())

    idle_s = left_s = service.limits.idle_s  # pauses take of it, sound gives it back: no place is held by a trickle
    while True:
        began = time.monotonic()
        if _is_end(message := await _message(socket, idle_s, left_s)):
            break
        if not n_bytes and (message.startswith(FILES) or message[4:8] == b"ftyp"):
            raise Problem(400, "sound expected", "a file began to come: decode it, or send it to /v1/score or /v1/jobs")
        n_bytes += len(message)
        sha256.update(message)
        samples = _samples(message, hello.format)
        left_s = min(idle_s, left_s - (time.monotonic() - began) + len(samples) / hello.sample_rate_hz)
        for judged in await service.scorer.run(lambda s=samples: push(resampler.push(s))):
            await socket.send_json({"type": "window", **window(judged)})
    return {"type": "verdict", **await service.scorer.run(end)}


async def _message(socket: WebSocket, idle_s: float, left_s: float) -> str | bytes:
    try:
        async with asyncio.timeout(max(0.0, left_s)):
            message = await socket.receive()
    except TimeoutError:
        told = f"no sound came for {idle_s:g} s, all pauses together: send silence, too, or end the stream"
        raise Problem(408, "too slow", told, limit={"idle_s": idle_s}) from None
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", NORMAL))
    text = message.get("text")
    return message["bytes"] if text is None else text


def _hello(message: str | bytes) -> Hello:
    if isinstance(message, bytes):
        raise Problem(400, "hello expected", f"the first message was sound: say what it is before, as in {EXAMPLE}")
    try:
        return Hello.model_validate_json(message)
    except ValidationError as error:
        raise Problem(400, "hello expected", f"{first_error(error)}: expected a message such as {EXAMPLE}") from None


def _is_end(message: str | bytes) -> bool:
    if isinstance(message, bytes):
        return False
    try:
        wanted = len(message) < 100 and json.loads(message) == {"end": True}
    except (ValueError, RecursionError):
        wanted = False
    if not wanted:
        raise Problem(400, "sound expected", 'expected sound as binary messages, or {"end": true}')
    return True


def _samples(message: bytes, format: str) -> np.ndarray:
    if len(message) > MESSAGE_BYTES:  # Ray's proxies let more through than the single process
        raise Problem(413, "too large", f"{len(message):,} bytes in a message: send {MESSAGE_BYTES:,} at most")
    dtype = np.dtype("<i2" if format == "int16" else "<f4")
    if len(message) % dtype.itemsize:
        raise Problem(400, "sound expected", f"{len(message)} bytes are no whole number of {format} samples")
    samples = np.frombuffer(message, dtype)
    if format == "int16":
        return from_int16(samples)
    refuse_impossible("the sound", samples)
    return samples


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong with a message, in a few words."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the message'}: {first['msg']}"
