"""The service as its clients meet it: a real process, answers, errors, jobs, live streams, weights that change."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("silero_vad", reason="speech is not told from noise without it")

from fastapi.testclient import TestClient
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from deepfake_utils import Detector
from deepfake_utils.__main__ import main
from deepfake_utils.files import atomic_write
from deepfake_utils.scoring.detector import SHIPPED
from deepfake_utils.serving.app import create_app
from deepfake_utils.serving.records import Records
from deepfake_utils.serving.service import Service, Settings
from tests.service import Running, babble, encoded

pytestmark = pytest.mark.skipif(not SHIPPED.is_file(), reason="no weights are shipped with this version")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("service"), {"recording_s": 60, "idle_s": 1.0})
    yield running
    assert running.stop() == -signal.SIGTERM  # after an end in order, uvicorn dies of the signal it got


@pytest.fixture(scope="module")
def recording() -> bytes:
    return encoded(babble())


def records(running) -> Records:
    return Records(f"sqlite:///{running.folder}/records.sqlite")


def test_a_recording_gets_the_verdict_the_detector_gives(running, recording):
    raw = running.client.post("/v1/score", content=recording)
    form = running.client.post("/v1/score", files={"file": ("call.flac", recording)})
    assert raw.status_code == form.status_code == 200, raw.text
    answer, expected = raw.json(), Detector.load()(babble(), 16_000)
    assert answer["score"] == pytest.approx(expected.log_odds, abs=1e-3) == form.json()["score"]
    assert answer["verdict"] == expected.verdict and len(answer["windows"]) == len(expected.windows)
    assert answer["limits"]["recording_s"] == 60 and answer["kept"] is False
    row = records(running).verdicts().set_index("id").loc[answer["id"]]
    assert row.score == answer["score"] and row.model == answer["model"] and row.kept_path is None
    assert row.seconds == 6.0 and row.client == "127.0.0.1"
    power = np.square(babble() / 32768).mean()
    assert row.level_db == pytest.approx(10 * np.log10(power), abs=0.01) and 3000 < row.bandwidth_hz <= 8000


def test_silence_gets_no_verdict(running):
    answer = running.client.post("/v1/score", content=encoded(np.zeros(48_000, np.int16))).json()
    assert (answer["verdict"], answer["score"], answer["probability_fake"]) == ("no verdict", None, None)


def test_a_recording_is_kept_only_where_that_is_asked_for(running, recording):
    running.client.post("/v1/score", content=recording)
    assert not any((running.folder / "kept").iterdir())
    answer = running.client.post("/v1/score?keep=true", files={"file": ("../../../etc/passwd", recording)}).json()
    kept = records(running).verdicts().set_index("id").loc[answer["id"], "kept_path"]
    assert answer["kept"] and Path(kept).read_bytes() == recording
    assert kept.startswith(str(running.folder / "kept"))


def test_feedback_is_written_down(running, recording):
    id = running.client.post("/v1/score", content=recording).json()["id"]
    said = {"verdict_id": id, "truth": "spoof", "note": "synthetic"}
    done = running.client.post("/v1/feedback", json=said)
    assert done.status_code == 201
    row = records(running).feedback().set_index("id").loc[done.json()["id"]]
    assert (row.verdict_id, row.truth, row.note, bool(row.confirmed)) == (id, "spoof", "synthetic", False)


@pytest.mark.parametrize(
    "said, status, title",
    [
        ({"verdict_id": "0" * 32, "truth": "spoof"}, 404, "unknown id"),
        ({"verdict_id": "x", "truth": "yes"}, 422, "feedback expected"),
        ({"verdict_id": "x", "truth": "spoof", "confirmed": True}, 422, "feedback expected"),
        ([], 422, "feedback expected"),
    ],
)
def test_feedback_that_is_none_is_refused(running, said, status, title):
    answer = running.client.post("/v1/feedback", json=said)
    assert answer.status_code == status and answer.json()["title"] == title
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_job_is_done_later(running, recording):
    accepted = running.client.post("/v1/jobs", content=encoded(babble(90)))  # longer than is answered at once
    assert accepted.status_code == 202
    result = wait_for(running, accepted.headers["Location"])
    assert result["state"] == "done" and result["result"]["id"] == accepted.json()["id"]
    assert result["result"]["seconds"] == 90 and len(result["result"]["windows"]) > 30
    assert not any((running.folder / "jobs").iterdir())
    failed = running.client.post("/v1/jobs", content=b"no recording at all")
    result = wait_for(running, failed.headers["Location"])
    assert result["state"] == "failed" and result["result"]["status"] == 422
    assert running.client.get("/v1/jobs/nothing").status_code == 404


def wait_for(running, location: str, seconds: float = 60) -> dict:
    end = time.monotonic() + seconds
    while (job := running.client.get(location).json())["state"] in ("waiting", "running"):
        assert time.monotonic() < end, job
        time.sleep(0.1)
    return job


def stream(running, hello, *messages):
    """All answers of a live stream."""
    answers = []
    with connect(f"ws://127.0.0.1:{running.port}/v1/stream") as socket:
        try:
            for message in (hello, *messages):
                socket.send(message)
            while True:
                answers.append(json.loads(socket.recv(30)))
        except ConnectionClosed:
            return answers


def test_live_audio_gets_the_same_windows(running, recording):
    sound = babble().tobytes()
    chunks = [sound[i : i + 6400] for i in range(0, len(sound), 6400)]
    ready, *windows, verdict = stream(running, '{"sample_rate_hz": 16000}', *chunks, '{"end": true}')
    from_file = running.client.post("/v1/score", content=recording).json()
    assert ready["type"] == "ready" and verdict["type"] == "verdict"
    assert verdict["score"] == pytest.approx(from_file["score"], abs=1e-4)
    assert [w["start_s"] for w in verdict["windows"]] == [w["start_s"] for w in from_file["windows"]]
    assert [w["score"] for w in windows] == [w["score"] for w in verdict["windows"]][: len(windows)] and windows
    assert verdict["id"] in set(records(running).verdicts()["id"])


@pytest.mark.parametrize(
    "messages, said",
    [
        ([b"\0\0"], "the first message was sound"),
        (["hello"], "expected a message such as"),
        (['{"sample_rate_hz": 1}'], "sample_rate_hz"),
        (["[" * 100_000], "expected a message such as"),
        (['{"sample_rate_hz": 16000}', b"\0\0\0"], "3 bytes are no whole number"),
        (['{"sample_rate_hz": 16000}', encoded(babble(1))], "a file began to come"),
        (['{"sample_rate_hz": 16000}', "what?"], "expected sound"),
        (['{"sample_rate_hz": 16000, "format": "float32"}', np.full(4, np.nan, "<f4").tobytes()], "NaN"),
        (['{"sample_rate_hz": 16000, "format": "float32"}', babble(1).astype("<f4").tobytes()], "integers as floats"),
        (['{"sample_rate_hz": 16000}'], "no sound came for 1 s"),
    ],
)  # fmt: skip
def test_a_stream_that_is_none_is_told_so(running, messages, said):
    last = stream(running, *messages)[-1]
    assert last["type"] == "problem" and said in last["detail"]
    assert running.client.get("/health").status_code == 200


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "http://127.0.0.1:1", "null"])
def test_pages_of_others_may_not_listen_unless_they_have_a_token(running, tmp_path, origin):
    with connect(f"ws://127.0.0.1:{running.port}/v1/stream", origin=origin) as socket:
        refused = json.loads(socket.recv(10))
    assert refused["status"] == 403 and origin in refused["detail"] and "DEEPFAKE_TOKENS" in refused["detail"]
    with connect(f"ws://127.0.0.1:{running.port}/v1/stream", origin=running.url) as socket:
        socket.send('{"sample_rate_hz": 16000}')
        assert json.loads(socket.recv(10))["type"] == "ready"
    service = Service(Settings(tmp_path, tokens={"SECRET": "anna"}))
    with (
        TestClient(create_app(service)) as client,
        client.websocket_connect("/v1/stream", headers={"Origin": origin}) as socket,
    ):
        socket.send_json({"sample_rate_hz": 16000, "token": "SECRET"})
        assert socket.receive_json()["type"] == "ready"


def test_a_stream_that_trickles_does_not_hold_its_place(running):
    with connect(f"ws://127.0.0.1:{running.port}/v1/stream") as socket:
        socket.send('{"sample_rate_hz": 16000}')
        with pytest.raises(ConnectionClosed, match="too slow"):
            for _ in range(60):  # never silent for long, and never a second of sound
                socket.send(bytes(320))
                time.sleep(0.1)


def test_the_interface_is_described_and_watched(running):
    paths = running.client.get("/openapi.json").json()["paths"]
    assert {"/v1/score", "/v1/jobs", "/v1/jobs/{id}", "/v1/feedback", "/health", "/ready", "/metrics"} <= set(paths)
    ready = running.client.get("/ready").json()
    assert ready["ready"] and ready["model"].startswith("open-") and ready["weights_problem"] == ""
    metrics = running.client.get("/metrics").text
    for name in (
        "verdicts_total",
        "speech_seconds_total",
        "log_odds_bucket",
        "waiting",
        'refused_total{reason="unreadable',
    ):
        assert f"deepfake_{name}" in metrics, name
    assert f'version="{ready["model"]}"' in metrics


def test_addresses_answer_who_only_asks_for_the_head(running):
    for address in ("/", "/health", "/ready", "/metrics", "/openapi.json"):
        head, whole = running.client.head(address), running.client.get(address)
        assert head.status_code == whole.status_code == 200 and head.content == b"", address
        assert head.headers["content-type"] == whole.headers["content-type"]
    assert running.raw(b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").endswith(b"\r\n\r\n")


def test_an_address_that_is_not_quite_one_is_told_so(running, recording):
    stream = running.client.get("/v1/stream")
    assert stream.status_code == 426 and stream.headers["upgrade"] == "websocket"
    assert '{"sample_rate_hz": 16000}' in stream.json()["detail"]
    assert "Live sound" in running.client.get("/openapi.json").json()["paths"]["/v1/stream"]["get"]["description"]
    slash = running.client.post("/v1/score/", content=recording)  # not a redirection, which curl takes for an answer
    assert slash.status_code == 404 and slash.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--port", "65536"], "--port 65536: expected 1 to 65535"),
        (
            ["--host", "192.0.2.1", "--port", "0"],
            "192.0.2.1:0 cannot be listened on (Cannot assign requested address): ",
        ),
    ],
)
def test_a_port_or_host_that_is_none_is_told_so(wrong, said, tmp_path, capsys):
    assert main(["serve", str(tmp_path), *wrong]) == 2
    assert said in capsys.readouterr().err


def test_false_alarms_that_are_no_probability_are_refused_before_any_work(tmp_path, capsys):
    where = ["--database", "sqlite:///none", "--models", str(tmp_path), "--out", str(tmp_path / "report")]
    assert main(["monitor", *where, "--false-alarms", "2"]) == 2
    assert "--false-alarms 2: expected a probability" in capsys.readouterr().err


def test_nothing_on_the_page_comes_from_elsewhere(running):
    page = running.client.get("/")
    text = page.text + running.client.get("/page.js").text
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("  // ", "")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")


def test_only_who_has_a_token_is_let_in(tmp_path, recording):
    service = Service(Settings(tmp_path, tokens={"SECRET": "anna"}))
    with TestClient(create_app(service)) as client:
        refused = client.post("/v1/score", content=recording)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        allowed = client.post("/v1/score", content=recording, headers={"Authorization": "Bearer SECRET"})
        assert allowed.status_code == 200
        assert service.records.verdicts()["client"].tolist() == ["anna"]
        with client.websocket_connect("/v1/stream") as socket:
            socket.send_json({"sample_rate_hz": 16000, "token": "WRONG"})
            assert socket.receive_json()["status"] == 401
        assert client.get("/metrics").status_code == 401 and client.get("/ready").status_code == 200


@pytest.mark.parametrize("tokens", ["anna", "anna=", "=SECRET", "anna=SECRET,ben=geh\u00e4im", "a=SECRET,b=SECRET"])
def test_tokens_that_nobody_can_send_are_refused(tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEEPFAKE_TOKENS", tokens)
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "anna=SECRET" in capsys.readouterr().err


def test_weights_are_replaced_without_a_lost_request(tmp_path, recording):
    """The pointer moves under load, once to weights, once to nonsense; every request gets a verdict."""
    models = tmp_path / "models"
    running = Running(tmp_path)
    stop = False

    def ask() -> list:
        statuses = []
        while not stop:
            answer = running.client.post("/v1/score", content=recording)
            statuses.append((answer.status_code, answer.json().get("model")))
        return statuses

    def point_to(weights, version):
        with atomic_write(models / "current.json") as part:
            part.write_text(json.dumps({"weights": str(weights), "version": version}))

    def wait_until(is_so):
        end = time.monotonic() + 60
        while not is_so(ready := running.client.get("/ready").json()):
            assert time.monotonic() < end, ready
            time.sleep(0.1)

    try:
        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask) for _ in range(2)]
            try:
                point_to(SHIPPED, "second")
                wait_until(lambda ready: ready["model"] == "second")
                assert running.client.post("/v1/score", content=recording).json()["model"] == "second"
                point_to(tmp_path / "nothing.safetensors", "third")
                wait_until(lambda ready: "nothing.safetensors do not exist" in ready["weights_problem"])
            finally:
                stop = True
            answers = [answer for one in asking for answer in one.result()]
        assert {status for status, _ in answers} == {200} and answers[0][1] != "second"
        assert len(records(running).verdicts()) == len(answers) + 1
    finally:
        running.stop()


def test_what_was_accepted_survives_a_kill(tmp_path, recording):
    running = Running(tmp_path)
    id = running.client.post("/v1/score", content=recording).json()["id"]
    jobs = [running.client.post("/v1/jobs?keep=true", content=encoded(babble(60 + i))) for i in range(3)]
    running.kill()
    running = Running(tmp_path)
    try:
        for job in jobs:
            assert wait_for(running, job.headers["Location"])["state"] == "done"
        found = records(running).verdicts()["id"].tolist()
        assert sorted(found) == sorted([id, *(job.json()["id"] for job in jobs)])
    finally:
        running.stop()
