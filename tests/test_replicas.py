"""The service on Ray Serve under load: replicas killed, weights replaced, nothing accepted lost."""

import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

pytest.importorskip("ray.serve", reason="the extra fleet is not installed")

from deepfake_utils import Detector  # noqa: E402
from deepfake_utils.scoring.weights import SHIPPED  # noqa: E402
from deepfake_utils.serving.records import Records  # noqa: E402
from deepfake_utils.serving.versions import Versions  # noqa: E402
from tests.ray_cluster import two_nodes  # noqa: E402
from tests.service import babble, encoded  # noqa: E402

N_CLIENTS = 4


@pytest.fixture(scope="module")
def cluster():
    with two_nodes() as environment:
        yield environment


class Clients:
    """Some that ask one request after the other, and ask again where no answer came."""

    def __init__(self, url: str, recording: bytes):
        self.answers, self.failed, self._url, self._recording = [], [], url, recording
        self._stop, self._threads = threading.Event(), []

    def __enter__(self):
        self._threads = [threading.Thread(target=self._ask) for _ in range(N_CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                answer = httpx.post(f"{self._url}/v1/score", content=self._recording, timeout=60)
            except httpx.TransportError as error:
                self.failed.append(repr(error))
                continue
            (self.answers.append(answer.json()) if answer.status_code == 200 else self.failed.append(answer.text))

    def wait_for(self, n: int) -> None:
        """Wait for so many answers more."""
        wanted = len(self.answers) + n
        wait_until(lambda: len(self.answers) >= wanted)


def wait_until(holds, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def replicas(name: str) -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if f"ServeReplica:detector:{name}" in " ".join(p.info["cmdline"] or ())]


@pytest.fixture(scope="module")
def served(cluster, tmp_path_factory):
    """Folder and address of a service on the cluster."""
    folder = tmp_path_factory.mktemp("service")
    command = [sys.executable, "-m", "deepfake_utils", "serve", str(folder), "--fleet", "--port", "0"]
    process = subprocess.Popen(command, env=cluster, stdout=subprocess.PIPE)
    try:
        url = process.stdout.readline().decode().split()[0]
        yield folder, url
    finally:
        process.terminate()
        process.wait(60)


def test_killed_replicas_and_new_weights_under_load_lose_nothing(served):
    folder, url = served
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

        long = httpx.post(f"{url}/v1/jobs", content=encoded(babble(40.0)), timeout=60).raise_for_status().json()
        replicas("jobs")[0].kill()
        replicas("front")[0].kill()
        clients.wait_for(12)
    wait_until(lambda: httpx.get(f"{url}/v1/jobs/{long['id']}", timeout=60).json()["state"] == "done")
    assert len(clients.failed) <= N_CLIENTS, "of the front that died only what was under way"
    known = set(Records(f"sqlite:///{folder}/records.sqlite").verdicts()["id"])
    ids = {answer["id"] for answer in clients.answers} | {long["id"]}
    assert ids <= known and len(ids) == len(clients.answers) + 1
