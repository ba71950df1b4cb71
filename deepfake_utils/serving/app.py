"""The service over HTTP: addresses, what goes in and comes out, and who may ask."""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from deepfake_utils import __version__
from deepfake_utils.conventions import DeepfakeUtilsError
from deepfake_utils.serving import live
from deepfake_utils.serving.limits import PROBLEM_TYPE, Problem, as_problem, read_json, read_upload
from deepfake_utils.serving.records import NAME_LENGTH
from deepfake_utils.serving.service import Service

PAGE = Path(__file__).parent / "page"
BINARY = {"schema": {"type": "string", "format": "binary"}}
RECORDING = {
    "required": True,
    "description": "the recording in any format FFmpeg reads: raw, or as the one file of a form; its name is ignored",
    "content": {
        "application/octet-stream": BINARY,
        "multipart/form-data": {"schema": {"type": "object", "properties": {"file": BINARY["schema"]}}},
    },
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; media-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class WindowOut(BaseModel):
    """A stretch of a recording that was judged by itself."""

    start_s: float
    end_s: float
    speech_s: float | None
    score: float | None


class Answer(BaseModel):
    """What the detector says of a recording. A score is higher, the more real the speech sounds."""

    model_config = ConfigDict(json_schema_extra={"example": {
        "id": "5f0c1d3b9a874f6f8a3d1f0f3f0a9b1c", "verdict": "fake", "reason": "log-odds -3.1, below -0.3, the "
        "threshold for no particular use", "score": -3.1, "score_meaning": "log-odds of real speech (natural "
        "logarithm, at even odds), higher is more real", "probability_fake": 0.957, "prior_fake": 0.5,
        "use": "no particular use", "seconds": 4.2, "speech_seconds": 3.6, "looked_at": 1.0,
        "windows": [{"start_s": 0.0, "end_s": 4.0375, "speech_s": 3.5, "score": -3.1}], "warnings": [],
        "model": "open-1a2b3c4d", "calibration": "slope 1.16365, offset -0.817375", "kept": False,
        "limits": {"upload_bytes": 67108864, "recording_s": 600.0, "answer_s": 60.0},
    }})  # fmt: skip
    id: str = Field(description="names this verdict, for feedback")
    verdict: Literal["real", "fake", "uncertain", "no verdict"]
    reason: str
    score: float | None
    score_meaning: str
    probability_fake: float | None = Field(description="if a share of prior_fake of such recordings is fake")
    prior_fake: float
    use: str
    seconds: float
    speech_seconds: float | None
    looked_at: float = Field(description="share of the recording that lies in judged windows")
    windows: list[WindowOut]
    warnings: list[str]
    model: str
    calibration: str
    kept: bool = Field(description="whether the recording was kept")
    limits: dict


class Options(BaseModel):
    """What a client may wish for its recording."""

    model_config = ConfigDict(extra="forbid")  # a wish that is misspelt is not passed over
    keep: bool = Field(False, description="keep the recording, so that the detector can learn from it")


class Feedback(BaseModel):
    """What a recording really was."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {
        "verdict_id": "5f0c1d3b9a874f6f8a3d1f0f3f0a9b1c", "truth": "bonafide", "note": "I was there",
    }})  # fmt: skip
    verdict_id: str = Field(max_length=32)
    truth: Literal["bonafide", "spoof"]
    note: str = Field("", max_length=2000, pattern=r"^[^\x00]*$")  # PostgreSQL takes no zero byte


class Recorded(BaseModel):
    """Feedback that was recorded."""

    id: str


class Job(BaseModel):
    """A recording that is looked at later: waiting, running, done with an answer, or failed with a problem."""

    id: str
    state: Literal["waiting", "running", "done", "failed"]
    result: dict | None = None
    limits: dict


class Problems(BaseModel):
    """A request that gets no for an answer (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    limit: dict | None = None


def refusals(*statuses: int) -> dict:
    """What an address may answer besides, for the description of the interface."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problems"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in (401, *statuses)}


def create_app(service: Service, *, runs_jobs: bool = True) -> FastAPI:
    """The service as an ASGI application, which starts and closes it. runs_jobs: False where another process does."""
    limits, tokens = service.limits, service.settings.tokens

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        if runs_jobs:
            service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="Is this speech real?", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,  # a client that follows no redirect would take nothing for an answer
        description="Scores recordings: real speech, or made by a machine. Audio is not kept unless asked.",
    )  # fmt: skip

    def client_of(connection: Request | WebSocket, token: str | None = None) -> str:
        """Who asks: the name of their token, or where there are none their address."""
        if not tokens:
            return connection.client.host[:NAME_LENGTH] if connection.client else "unknown"
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        given = token or (given if scheme.lower() == "bearer" else "")
        for known, name in tokens.items():
            if hmac.compare_digest(known.encode(), given.encode()):
                return name
        raise Problem(401, "not allowed", "send the header Authorization: Bearer TOKEN, with a token you were given")

    async def upload_of(request: Request, limits):
        with service.uploads:
            return await read_upload(request, limits)

    @app.post("/v1/score", response_model=Answer, responses=refusals(400, 408, 413, 415, 422, 503),
              openapi_extra={"requestBody": RECORDING})  # fmt: skip
    async def score(request: Request, options: Annotated[Options, Query()]):
        """Look at a recording now."""
        client = client_of(request)
        service.scorer.waiting.refuse_if_full()
        return JSONResponse(await service.score(await upload_of(request, limits), client, options.keep))

    @app.post("/v1/jobs", status_code=202, response_model=Job, responses=refusals(400, 408, 413, 415, 422, 503),
              openapi_extra={"requestBody": RECORDING})  # fmt: skip
    async def accept_job(request: Request, response: Response, options: Annotated[Options, Query()]):
        """Take in a long recording, to be looked at later; where to ask for it is in the header Location."""
        client = client_of(request)
        file = await upload_of(request, limits.of_jobs())
        id = await asyncio.to_thread(service.accept_job, file, client, options.keep)
        response.headers["Location"] = f"/v1/jobs/{id}"
        return Job(id=id, state="waiting", limits=limits.stated())

    @app.get("/v1/jobs/{id}", response_model=Job, responses=refusals(404))
    async def job(request: Request, id: str):
        """How a job stands; its result is an answer as of /v1/score, or a problem."""
        client_of(request)
        found = await asyncio.to_thread(service.records.job, id)
        return Job(id=id, state=found["state"], result=found["result"], limits=limits.stated())

    @app.post("/v1/feedback", status_code=201, response_model=Recorded, responses=refusals(404, 413, 415, 422),
              openapi_extra={"requestBody": {"required": True, "content": {
                  "application/json": {"schema": Feedback.model_json_schema()}}}})  # fmt: skip
    async def feedback(request: Request):
        """Say what a recording really was: by the id of its verdict, bonafide (real) or spoof (fake)."""
        client = client_of(request)
        try:
            said = Feedback.model_validate_json(await read_json(request, limits))
        except ValidationError as error:
            raise Problem(422, "feedback expected", f"{live.first_error(error)}: see /openapi.json") from None
        id = await asyncio.to_thread(service.records.add_feedback, client=client, **said.model_dump())
        service.metrics.told(said.truth)
        return Recorded(id=id)

    @app.get("/v1/stream", status_code=426, response_model=Problems, description=f"Live sound: {live.HOW_TO}.")
    async def no_stream():
        raise Problem(426, "websocket expected", live.HOW_TO)

    @app.websocket("/v1/stream")
    async def stream(socket: WebSocket):
        await live.hold(socket, service, lambda token: client_of(socket, token))

    @app.get("/health")
    async def health():
        """Whether the process lives."""
        return {"status": "alive"}

    @app.get("/ready", responses={503: {"description": "not now"}})
    async def ready():
        """Whether it would answer now, with what, and within which limits."""
        current, is_alive = service.scorer.follow(), await asyncio.to_thread(service.records.is_alive)
        about = {
            "ready": is_alive, "model": current.version, "calibration": current.calibration,
            "weights_problem": service.scorer.problem, "token_needed": bool(tokens),
            "limits": limits.stated(),
        }  # fmt: skip
        return JSONResponse(about, 200 if is_alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request):
        """Figures for Prometheus."""
        client_of(request)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(PAGE / "page.html")

    @app.get("/page.js", include_in_schema=False)
    async def script():
        return FileResponse(PAGE / "page.js")

    @app.middleware("http")
    async def watched(request: Request, call_next):
        started = time.monotonic()
        response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "unknown")
        service.metrics.answered(route, response.status_code, time.monotonic() - started)
        response.headers.update(HEADERS)
        return response

    app.add_middleware(AsGet)
    say_no_politely(app, service)
    return app


class AsGet:
    """HEAD is GET for the application; the server leaves the content of the answer out."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope.get("method") == "HEAD":
            scope = scope | {"method": "GET"}
        await self._app(scope, receive, send)


def say_no_politely(app: FastAPI, service: Service) -> None:
    """Every error as a problem that says what to do."""

    async def problem(request: Request, error: Exception) -> Response:
        told = as_problem(error)
        if request.url.path in ("/v1/score", "/v1/jobs"):
            service.metrics.refused(told.title)
        headers = {401: {"WWW-Authenticate": "Bearer"}, 426: {"Upgrade": "websocket"}, 503: {"Retry-After": "2"}}
        return JSONResponse(told.body, told.status, headers.get(told.status), PROBLEM_TYPE)

    async def http(request: Request, error: HTTPException) -> Response:
        advice = "" if error.status_code == 400 else "; /openapi.json lists what there is"
        told = Problem(error.status_code, HTTPStatus(error.status_code).phrase.lower(), f"{error.detail}{advice}")
        return await problem(request, told)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}; see /openapi.json"
        return await problem(request, Problem(422, "parameter not understood", told))

    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    for kind, handler in (
        (Problem, problem), (DeepfakeUtilsError, problem), (HTTPException, http), (RequestValidationError, invalid),
        (ClientDisconnect, gone), (Exception, problem),
    ):  # fmt: skip
        app.add_exception_handler(kind, handler)
