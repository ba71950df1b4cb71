"""The service on Ray Serve under load: replicas killed and added, weights replaced, nothing accepted lost."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import psutil
import pytest
from websockets.sync.client import connect

pytest.importorskip("ray.serve", reason="the extra fleet is not installed")

from deepfake_utils import Detector  # noqa: E402
from deepfake_utils.scoring.weights import SHIPPED  # noqa: E402
from deepfake_utils.serving.records import Records  # noqa: E402
from deepfake_utils.serving.versions import Versions  # noqa: E402
from tests.ray_cluster import two_nodes  # noqa: E402
from tests.service import babble, encoded, send_raw  # noqa: E402
from tests.test_service_hostile import GROWTH_MB, head, lying_headers, silent_flac, status_of  # noqa: E402

N_CLIENTS = 4
N_CORES = 3  # that Ray is told of, so that there is room for one replica more than at the start


@pytest.fixture(scope="module")
def cluster():
    with two_nodes(n_cores=N_CORES) as environment:
        yield environment


class Clients:
    """Some that ask one request after the other, and ask again where no answer came."""

    def __init__(self, url: str, recording: bytes, n: int = N_CLIENTS):
        self.answers, self.failed, self._url, self._recording = [], [], url, recording
        # One client, since each made anew reads certificates: 64 at that took seconds to send what they had to say.
        self._http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=100)
        self._stop, self._threads = threading.Event(), [threading.Thread(target=self._ask) for _ in range(n)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._http.close()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._http.post(f"{self._url}/v1/score", content=self._recording)
            except httpx.TransportError as error:
                self.failed.append(repr(error))
                continue
            (self.answers.append(answer.json()) if answer.status_code == 200 else self.failed.append(answer.text))

    def wait_for(self, n: int) -> None:
        """Wait for so many answers more."""
        wanted = len(self.answers) + n
        wait_until(lambda: len(self.answers) >= wanted)


def wait_until(holds, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)  # to look at all processes takes time, too


def replicas(name: str) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if f"ServeReplica:detector:{name}" in " ".join(p.info["cmdline"] or ())]


SERVE_HASTILY = """
import sys
from deepfake_utils.__main__ import main
from deepfake_utils.serving import replicas
replicas.MORE_AFTER_S, replicas.FEWER_AFTER_S = 1.0, 2.0
sys.exit(main(["serve", sys.argv[1], "--fleet", "--port", "0"]))
"""


@pytest.fixture(scope="module")
def database(request, tmp_path_factory) -> str:
    """A PostgreSQL where one is installed, as belongs behind several fronts; else an SQLite file."""
    try:
        return request.getfixturevalue("postgres_url")
    except pytest.skip.Exception:
        return f"sqlite:///{tmp_path_factory.mktemp('records')}/records.sqlite"


@pytest.fixture(scope="module")
def served(cluster, database, tmp_path_factory):
    """Folder, address and records of a service on the cluster whose replicas come and go within seconds."""
    folder = tmp_path_factory.mktemp("service")
    command = [sys.executable, "-c", SERVE_HASTILY, folder]
    process = subprocess.Popen(command, env=cluster | {"DATABASE_URL": database}, stdout=subprocess.PIPE)
    try:
        first = next(line for line in process.stdout if line.startswith(b"http"))  # Ray warns there, too
        yield folder, first.decode().split()[0], Records(database)
    finally:
        process.terminate()
        process.wait(100)


def test_killed_replicas_and_new_weights_under_load_lose_nothing(served):
    folder, url, records = served
    samples = babble(4.0)
    expected = Detector.load()(samples, 16_000)
    versions = Versions(folder / "models")
    with Clients(url, encoded(samples)) as clients:
        clients.wait_for(8)
        assert clients.answers[0]["verdict"] == expected.verdict
        assert clients.answers[0]["score"] == pytest.approx(expected.score, abs=1e-3)

        replicas("judge")[0].kill()
        clients.wait_for(12)
        with versions.locked():
            versions.take_over("installed", SHIPPED["laptop"], "second")
        wait_until(lambda: {answer["model"] for answer in clients.answers[-8:]} == {"second"})
        assert not clients.failed, "a judge that dies and weights that change are nothing a client sees"

        long = httpx.post(f"{url}/v1/jobs", content=encoded(babble(40.0)), timeout=100).raise_for_status().json()
        replicas("jobs")[0].kill()
        replicas("front")[0].kill()
        clients.wait_for(12)
    wait_until(lambda: httpx.get(f"{url}/v1/jobs/{long['id']}", timeout=100).json().get("state") == "done")
    assert len(clients.failed) <= N_CLIENTS, "of the front that died only what was under way"
    known = set(records.verdicts()["id"])
    ids = {answer["id"] for answer in clients.answers} | {long["id"]}
    assert ids <= known and len(ids) == len(clients.answers) + 1


def test_another_port_than_that_of_ray_serve_is_refused(cluster, served):
    command = [sys.executable, "-m", "deepfake_utils", "serve", str(served[0]), "--fleet", "--port", "1"]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "does not listen on 127.0.0.1:1" in done.stderr
    assert httpx.get(f"{served[1]}/ready", timeout=100).status_code == 200


def test_live_sound_gets_the_same_windows_through_the_fleet(served):
    _, url, records = served
    samples = babble(9.0)
    from_file = httpx.post(f"{url}/v1/score", content=encoded(samples), timeout=100).raise_for_status().json()
    with connect(f"{url.replace('http', 'ws')}/v1/stream") as socket:
        socket.send(json.dumps({"sample_rate_hz": 16_000}))
        said = [json.loads(socket.recv(100))]
        for number, chunk in enumerate(np.array_split(samples, 30)):
            if number == 15:
                replicas("judge")[0].kill()  # who looks at the windows is nothing the client sees
            socket.send(chunk.tobytes())
        socket.send(json.dumps({"end": True}))
        while said[-1]["type"] != "verdict":
            said.append(json.loads(socket.recv(100)))
    ready, *windows, verdict = said
    assert ready["type"] == "ready" and {window["type"] for window in windows} == {"window"}
    assert verdict["score"] == pytest.approx(from_file["score"], abs=1e-3)
    assert [w["start_s"] for w in verdict["windows"]] == [w["start_s"] for w in from_file["windows"]]
    assert {verdict["id"], from_file["id"]} <= set(records.verdicts()["id"])


def test_a_service_whose_node_dies_ends_and_says_so(tmp_path):
    """As one that was stopped for so long that Ray gave it up: its proxy took requests that nobody answered."""
    command = [sys.executable, "-m", "deepfake_utils", "serve", tmp_path, "--fleet", "--port", "0"]
    environment = os.environ | {"RAY_ADDRESS": "local"}  # a cluster of its own, where another runs already
    environment.pop("DATABASE_URL", None)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = next(line for line in process.stdout if line.startswith("http")).split()[0]
        family = psutil.Process(process.pid).children(recursive=True)
        next(one for one in family if one.name() == "raylet").kill()
        _, said = process.communicate(timeout=200)
        assert process.returncode == 2 and "the same command starts it again" in said
        wait_until(lambda: not any(one.is_running() for one in family), 60)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()


def test_what_one_front_accepted_others_know_when_it_is_dead(served):
    _, url, records = served
    recording = encoded(babble(4.0))
    with Clients(url, recording) as clients:  # all fronts write at the same time
        clients.wait_for(8)
        job = httpx.post(f"{url}/v1/jobs", content=encoded(babble(120.0)), timeout=100).raise_for_status().json()["id"]
        before = replicas("front")
        for front in before:  # whichever it was
            front.kill()
        clients.wait_for(8)
    assert not {front.pid for front in before} & {front.pid for front in replicas("front")}
    told = {}
    for answer in clients.answers:
        truth = {"verdict_id": answer["id"], "truth": "spoof"}
        told[answer["id"]] = httpx.post(f"{url}/v1/feedback", json=truth, timeout=100).raise_for_status().json()["id"]
    wait_until(lambda: httpx.get(f"{url}/v1/jobs/{job}", timeout=100).json().get("state") == "done")
    assert {*told, job} <= set(records.verdicts()["id"]) and len(told) == len(clients.answers)
    found = records.feedback().set_index("id")["verdict_id"]
    assert found[list(told.values())].tolist() == list(told)


def test_replicas_come_with_the_load_and_go_after_it(served):
    _, url, records = served
    wait_until(lambda: len(replicas("front")) == 2)
    with Clients(url, encoded(babble(4.0)), n=64) as clients:
        wait_until(lambda: len(replicas("front")) == N_CORES)
        clients.wait_for(64)
    with Clients(url, encoded(babble(4.0)), n=1) as client:
        wait_until(lambda: len(replicas("front")) == 2)
        client.wait_for(4)
    assert not clients.failed and not client.failed, "a front that is sent away answers what it has"
    assert {answer["id"] for answer in clients.answers + client.answers} <= set(records.verdicts()["id"])


def test_a_second_one_does_not_take_over_what_runs(cluster, served, tmp_path):
    """Of the same folder or another: it is refused, and its end ends nothing."""
    folder, url, _ = served
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "deepfake_utils", "serve", str(tmp_path), "--fleet", "--port", port]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "runs on this cluster already, started by" in done.stderr
    assert httpx.get(f"{url}/ready", timeout=100).status_code == 200


def memory_mb() -> dict[int, float]:
    """Of each proxy and front."""
    words, found = ("ProxyActor", "ServeReplica:detector:front"), psutil.process_iter(["cmdline", "memory_info"])
    ours = [p for p in found if any(word in " ".join(p.info["cmdline"] or ()) for word in words)]
    return {p.pid: p.info["memory_info"].rss / 2**20 for p in ours}


def test_clients_that_mean_harm_are_refused_by_the_fleet_and_the_next_one_is_served(served):
    folder, url, _ = served
    port, good = int(url.rpartition(":")[2]), encoded(babble())
    block = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    form = b'--B\r\nContent-Disposition: form-data; name="f"; filename="../../etc/passwd"\r\n\r\n%s\r\n--B--\r\n' % good
    many = b'--B\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nRIFF\r\n' * 10_000 + b"--B--\r\n"
    as_form = {"Content-Type": "multipart/form-data; boundary=B"}

    def post(content: bytes, address: str = "/v1/score", **headers) -> int:
        answer = httpx.post(url + address, content=content, headers=headers, timeout=100)
        assert answer.status_code == 200 or answer.headers["content-type"] == "application/problem+json"
        return answer.status_code

    def raw(*parts: bytes, repeated: bytes = b"") -> int:
        return status_of(send_raw(port, *parts, repeated=repeated, timeout_s=100))

    for _ in range(8):  # so that what a process loads once, at its first recording, counts as before
        assert post(good) == 200
    before_mb = memory_mb()
    for name, attack, statuses in (
        ("ten hours of silence", lambda: post(silent_flac(10, is_stated=True)), {413}),
        ("ten hours that are not stated", lambda: post(silent_flac(10, is_stated=False)), {413}),
        *((kind, lambda lie=lie: post(lie), {413, 422}) for kind, lie in lying_headers().items() if "giga" not in kind),
        ("too much stated", lambda: raw(head("/v1/score", f"Content-Length: {10**12}")), {413}),
        ("no end", lambda: raw(head("/v1/score", "Transfer-Encoding: chunked"), repeated=block), {0, 413}),
        ("no end, to nowhere", lambda: raw(head("/nowhere", "Transfer-Encoding: chunked"), repeated=block), {0, 404}),
        ("less than stated", lambda: raw(head("/v1/score", "Content-Length: 100000"), b"x" * 1000), {408}),
        ("half a head", lambda: raw(b"POST /v1/score HTTP/1.1\r\nX: "), {0, 400}),
        ("a head without end", lambda: raw(b"POST /v1/score HTTP/1.1\r\nX: ", repeated=b"a" * 2**16), {0, 400}),
        ("a path as name", lambda: post(form, "/v1/score?keep=true", **as_form), {200}),
        ("many files", lambda: post(many, **as_form), {400}),
        ("a bomb", lambda: post(b"[" * 60_000, "/v1/feedback"), {422}),
        ("a large bomb", lambda: post(b"[" * 10_000_000, "/v1/feedback"), {413}),
    ):
        assert attack() in statuses, name
        assert post(good) == 200, name
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for connection in slow:
        connection.sendall(head("/v1/score", "Content-Length: 1000000") + b"x")
    assert httpx.get(f"{url}/health", timeout=100).status_code == 200
    for connection in slow:
        with connection:
            connection.settimeout(100)
            assert status_of(connection.recv(2**16)) == 408
    assert post(good) == 200
    assert {path.parent.parent.name for path in folder.rglob("*") if len(path.name) == 64} == {"kept"}
    after_mb = memory_mb()
    assert before_mb.keys() & after_mb.keys()
    assert all(after_mb[process] < before_mb[process] + 3 * GROWTH_MB for process in before_mb.keys() & after_mb.keys())
