"""The same service on Ray Serve: as many replicas as the load needs, on any number of machines.

    front    the app of `serve`, whole: uploads, decoding, where speech is, records; answers requests
    judge    the network alone: windows of 4 s, of whichever requests, in one batch
    jobs     one replica that looks at long recordings; whichever front accepted them

A judge that dies loses nothing: its windows are asked for again. A front that dies loses its open connections and
nothing that it answered, since verdicts and jobs are on the disk before. New weights are taken over as in the single
process, from the pointer in the folder of models; requests under way end with the weights that they began with.

All machines must see the folder under the same path; with several of them the records belong into PostgreSQL.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import torch
from ray import serve
from ray.exceptions import RayError

from deepfake_utils.models.layers import CMOutput
from deepfake_utils.scoring.detector import Detector
from deepfake_utils.scoring.score import SCORING_BATCH, forward
from deepfake_utils.serving.app import create_app
from deepfake_utils.serving.fleet import FleetError, connect
from deepfake_utils.serving.hurry import IN_PROXIES
from deepfake_utils.serving.service import Service, Settings

NAME, JUDGE, OWNER = "detector", "judge", "detector-owner"
FRONT_RECORDINGS = 8  # that one front looks at side by side, most of the time waiting for a judge
WAIT_FOR_BATCH_S = 0.005
MORE_AFTER_S, FEWER_AFTER_S = 10.0, 300.0  # of too much and of too little to do; replicas come sooner than they go
MODELS_KEPT = 2  # by a judge: what is in service, and what was before
GONE_S = 15.0  # within which a cluster notices that a process was killed
LOOK_S = 5.0  # between looks whether the cluster still lives ...
ANSWER_S = 30  # ... and how long it may take to say so
RETRIES_S = (0.0, 0.2, 1.0, 3.0, 6.0, 12.0)  # waits before a window is asked for again, until a dead judge is replaced


class Judge:
    """Networks by the name of their weights; what they say of windows."""

    def __init__(self, device: str):
        torch.set_num_threads(1)
        self._device, self._detectors = device, {}

    @serve.batch(max_batch_size=SCORING_BATCH, batch_wait_timeout_s=WAIT_FOR_BATCH_S)
    async def __call__(self, asked: list[tuple[str | None, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(weights, waveform (T,)) of several requests -> logits (2,) and embedding of each."""
        return await asyncio.to_thread(self._judge, asked)

    def _judge(self, asked: list) -> list:
        answers: list = [None] * len(asked)
        together = defaultdict(list)
        for i, (weights, waveform) in enumerate(asked):
            together[weights, len(waveform)].append(i)
        for (weights, _), places in together.items():
            detector = self._detector(weights)
            output = forward(detector.model, torch.from_numpy(np.stack([asked[i][1] for i in places])), detector.device)
            for i, logits, embedding in zip(places, output.logits.numpy(), output.embedding.numpy(), strict=True):
                answers[i] = logits, embedding
        return answers

    def _detector(self, weights: str | None) -> Detector:
        if weights not in self._detectors:
            self._detectors[weights] = Detector.load(weights, device=self._device)
            while len(self._detectors) > MODELS_KEPT:
                del self._detectors[next(iter(self._detectors))]
        return self._detectors[weights]


class Distant:
    """A model that is somewhere else: windows in, `CMOutput` out, whichever judges live or die meanwhile.

    Args:
        judge: handle of the judges.
        weights: which they shall use.
    """

    def __init__(self, judge: serve.handle.DeploymentHandle, weights: str | None):
        self._judge, self._weights = judge, weights

    def __call__(self, waveform: torch.Tensor) -> CMOutput:
        """(B, T) waveforms -> logits and embedding.

        Raises:
            FleetError: no judge could be reached for a long time.
        """
        left = dict(enumerate(waveform.numpy()))
        answers: dict[int, tuple] = {}
        for wait_s in RETRIES_S:
            time.sleep(wait_s)
            asked = {i: self._judge.remote((self._weights, window)) for i, window in left.items()}
            for i, answer in asked.items():
                try:
                    answers[i] = answer.result()
                    del left[i]
                except RayError as error:  # a judge died; another one, or the one in its place, is asked
                    problem = error
            if not left:
                logits, embeddings = (
                    np.stack(column) for column in zip(*(answers[i] for i in sorted(answers)), strict=True)
                )
                return CMOutput(torch.from_numpy(logits), torch.from_numpy(embeddings))
        raise FleetError(f"no replica of the model answers ({problem})")


def at_a_distance(judge: serve.handle.DeploymentHandle) -> Callable[..., Detector]:
    """`Detector.load`, but for a network that is asked through a handle."""

    def load(weights: str | os.PathLike | None, **options) -> Detector:
        detector = Detector.load(weights, **options | {"device": "cpu"})
        detector.model = Distant(judge, None if weights is None else str(weights))
        return detector

    return load


class Jobs:
    """What looks at the recordings that were accepted for later."""

    def __init__(self, settings: Settings, judge: serve.handle.DeploymentHandle):
        self._service = Service(settings, load=at_a_distance(judge))
        self._service.start()

    def __del__(self):
        self._service.close()


def application(settings: Settings, n_cores: int) -> serve.Application:
    """The service as an application of Ray Serve.

    Args:
        settings: as for the single process; its limits hold for every front.
        n_cores: of the cluster; half a core is set aside for each front and each judge.
    """
    settings = replace(settings, folder=Path(settings.folder).absolute(),
                       limits=replace(settings.limits, concurrent=FRONT_RECORDINGS))  # fmt: skip
    scaled = {
        "min_replicas": min(2, n_cores), "max_replicas": n_cores, "initial_replicas": min(2, n_cores),
        "upscale_delay_s": MORE_AFTER_S, "look_back_period_s": MORE_AFTER_S, "metrics_interval_s": MORE_AFTER_S / 5,
        "downscale_delay_s": FEWER_AFTER_S,
    }  # fmt: skip

    def front_app():
        judge = serve.get_deployment_handle(JUDGE, app_name=NAME)
        return create_app(Service(settings, load=at_a_distance(judge)), runs_jobs=False)

    on_gpu = int(settings.device.startswith("cuda"))
    judge = serve.deployment(
        Judge, name=JUDGE, max_ongoing_requests=4 * SCORING_BATCH,
        autoscaling_config=scaled | {"target_ongoing_requests": SCORING_BATCH},
        ray_actor_options={"num_cpus": 0.5, "num_gpus": on_gpu},
    ).bind(settings.device)  # fmt: skip
    jobs = serve.deployment(Jobs, name="jobs", num_replicas=1, ray_actor_options={"num_cpus": 0}).bind(settings, judge)
    front = serve.deployment(
        serve.ingress(front_app)(), name="front", max_ongoing_requests=settings.limits.queue,
        autoscaling_config=scaled | {"target_ongoing_requests": 2 * FRONT_RECORDINGS},
        ray_actor_options={"num_cpus": 0.5},
    )  # fmt: skip
    return front.bind(judge, jobs)


def serve_fleet(settings: Settings, host: str, port: int) -> None:
    """Run the service on the Ray cluster of RAY_ADDRESS, or on this machine, until it is told to end.

    Where an earlier one was killed and left its replicas behind, what has changed is rolled out, replica by replica.

    Raises:
        FleetError: it does not start there, it runs there already, Ray Serve listens on another port, or the cluster
            has died.
    """
    os.environ.setdefault(*IN_PROXIES)  # of the cluster that is made here, if none is there
    connect()
    if not port:  # Ray would take one and not say which
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.start(http_options={"host": host, "port": port})
        _refuse_other_port(host, port)
        owner = _claim()  # noqa: F841 - ours as long as it is held
        _run(application(settings, max(1, int(ray.cluster_resources().get("CPU", 1)))), f"http://{host}:{port}")
    except (RayError, RuntimeError) as error:
        raise FleetError(f"the service did not start on the cluster: {error}") from error


def _run(app: serve.Application, url: str) -> None:
    try:
        serve.run(app, name=NAME)
        print(f"{url}  on Ray Serve; ends with Ctrl-C", flush=True)
        while _is_there():
            time.sleep(LOOK_S)
        raise FleetError(
            "this machine's part of the Ray cluster is dead: killed, or stopped for so long that it was given up. What "
            "was answered or accepted is kept, the same command starts it again"
        )
    finally:
        ending = threading.Thread(target=serve.delete, args=(NAME,), daemon=True)
        ending.start()
        while ending.is_alive() and _is_there():  # Ray waits for ever for a controller that does not come back
            ending.join(1.0)


def _is_there() -> bool:
    """Whether this machine's node of the cluster lives; Ray itself goes on without a word where it does not."""
    found, here = [], ray.get_runtime_context().get_node_id()
    asking = threading.Thread(
        target=lambda: found.extend(node["Alive"] for node in ray.nodes() if node["NodeID"] == here), daemon=True
    )  # a head that ends may leave this without an answer
    asking.start()
    for _ in range(ANSWER_S):  # a second each, so that one who was stopped meanwhile does not take it for silence
        asking.join(1.0)
    return any(found)


class Owner:
    """Lives as long as the process that runs the service, and says which one that is."""

    def __init__(self, process: str):
        self._process = process

    def process(self) -> str:
        """Machine and number."""
        return self._process


def _claim() -> ray.actor.ActorHandle:
    """Be the one process that runs the service on this cluster; when it ends, the service ends.

    Raises:
        FleetError: another one does.
    """
    options = {"name": OWNER, "namespace": NAME, "num_cpus": 0}
    end = time.monotonic() + GONE_S
    while True:
        try:
            owner = ray.remote(Owner).options(**options).remote(f"{socket.gethostname()}, process {os.getpid()}")
            ray.get(owner.process.remote())
            return owner
        except ValueError:  # the name is taken: by a process that lives, or by one whose end is not noticed yet
            if time.monotonic() > end:
                raise FleetError(
                    f"the service runs on this cluster already, started by {_other()}: end that first, or name another "
                    "cluster by RAY_ADDRESS"
                ) from None
        time.sleep(0.5)


def _other() -> str:
    try:
        return ray.get(ray.get_actor(OWNER, NAME).process.remote(), timeout=GONE_S)
    except (RayError, ValueError):
        return "a process that does not answer"


def _refuse_other_port(host: str, port: int) -> None:
    """Raise a FleetError where Ray Serve was started before, to listen somewhere else."""
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise FleetError(
            f"Ray Serve runs on this cluster already, and does not listen on {host}:{port} ({error}): name the --host "
            "and --port that it was started with"
        ) from error
