"""The service under load, beside a naive one: FastAPI around the code that the authors of AASIST published.

    git clone https://github.com/clovaai/aasist
    python tests/benchmarks/serving.py --reference aasist

Each service runs in a process of its own on this machine; clients in this one ask one request after the other, 1, 8
and 64 of them, for some seconds. All share the machine's cores. Where more clients wait than are answered in time, the
latencies are of those that were, which flatters the slower service. Scores of the two services are compared first, and
afterwards every verdict answered must be in the records. `--fleet` adds the same service as replicas on Ray Serve.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils.conventions import CROP_SAMPLES
from deepfake_utils.demo import voice
from deepfake_utils.scoring.speech import FRAME_SAMPLES, SpeechFinder
from deepfake_utils.serving.records import Records

ROOT = Path(__file__).resolve().parents[2]
REST_S = 10  # for answers that come too late to count, before the next clients come
COLUMNS = {"service": "<26", "clients": ">8", "requests/s": ">12", "p50 s": ">8", "p95 s": ">8", "p99 s": ">8",
           "errors": ">8", "lost": ">6"}  # fmt: skip

NAIVE = """
import json, socket, sys
import numpy, soundfile, torch, uvicorn
from fastapi import FastAPI, UploadFile

sys.path.insert(0, sys.argv[1])
from models.AASIST import Model

config = json.load(open(sys.argv[1] + "/config/AASIST.conf"))["model_config"]
model = Model(config)
model.load_state_dict(torch.load(sys.argv[1] + "/models/weights/AASIST.pth", "cpu", weights_only=True))
model.eval()
app = FastAPI()


@app.post("/v1/score")
async def score(file: UploadFile):
    samples, _ = soundfile.read(file.file, dtype="float32")
    with torch.no_grad():
        _, logits = model(torch.from_numpy(numpy.resize(samples, 64600))[None])
    return {"score": float(logits[0, 1])}


listener = socket.create_server(("127.0.0.1", 0))
print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])
"""
OURS = "import sys; from deepfake_utils.__main__ import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of github.com/clovaai/aasist")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each number of clients")
    parser.add_argument("--fleet", action="store_true", help="the shipped weights on Ray Serve, too")
    options = parser.parse_args()
    requests = [request_of(samples) for samples in recordings(4)]
    services = {"ours, shipped weights": None}
    if options.reference:
        naive = ["-c", NAIVE, str(options.reference.resolve())]
        services = {"naive, reference AASIST": naive, "ours, AASIST": "aasist", **services}
    if options.fleet:
        services["ours, on Ray Serve"] = "fleet"
    known, speed = {}, {}
    print(*(f"{name:{how}}" for name, how in COLUMNS.items()), sep="")
    for name, what in services.items():
        with tempfile.TemporaryDirectory() as folder:
            weights = options.reference.resolve() / "models/weights/AASIST.pth" if what == "aasist" else None
            ours = ["-c", OURS, "serve", folder, "--port", "0", *(["--weights", str(weights)] if weights else [])]
            ours += ["--fleet"] if what == "fleet" else []
            process = subprocess.Popen(
                [sys.executable, *(what if isinstance(what, list) else ours)], cwd=ROOT, stdout=subprocess.PIPE
            )
            try:
                port = int(process.stdout.readline().split()[0].rpartition(b":")[2])
                known[name] = [body["score"] for _, _, body in asyncio.run(load(port, requests, 1, 0.0, len(requests)))]
                ids = set()
                for n_clients in options.clients:
                    answers = asyncio.run(load(port, requests, n_clients, options.seconds))
                    ids |= {body.get("id") for _, status, body in answers if status == 200}
                    is_ours = not isinstance(what, list)
                    speed[name, n_clients] = describe(name, n_clients, answers, options.seconds, ids,
                                                      folder if is_ours else None)  # fmt: skip
            finally:
                process.terminate()  # a fleet takes its replicas with it
                process.wait()
    if options.reference:
        difference = np.abs(np.subtract(known["naive, reference AASIST"], known["ours, AASIST"])).max()
        print(f"scores of AASIST differ by at most {difference:.2g}")
        for name in [name for name, what in services.items() if not isinstance(what, list)]:
            naive_per_s = {n: speed["naive, reference AASIST", n] for n in options.clients}
            ratios = [f"{speed[name, n] / per_s:.1f}" if per_s else "-" for n, per_s in naive_per_s.items()]
            print(f"{name}: {', '.join(ratios)} times as many requests a second as the naive service")


def recordings(n: int) -> list[np.ndarray]:
    """Babble of one window that passes for speech, int16."""
    found, seed = [], 0
    while len(found) < n:
        rng, seed = np.random.default_rng(seed), seed + 1
        samples = voice.record(voice.speak(voice.draw_speaker(rng), CROP_SAMPLES, rng), rng)
        samples = samples[:CROP_SAMPLES]  # speech ends with its word; the naive service would not hear the rest
        if SpeechFinder().push(samples / np.float32(32768)).sum() * FRAME_SAMPLES > 20_000:
            found.append(samples)
    return found


def request_of(samples: np.ndarray) -> bytes:
    """A form with a recording, as HTTP."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="FLAC")
    part = b'--B\r\nContent-Disposition: form-data; name="file"; filename="call.flac"\r\n\r\n'
    body = part + file.getvalue() + b"\r\n--B--\r\n"
    head = "POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=B\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def load(port: int, requests: list[bytes], n_clients: int, seconds: float, at_least: int = 0) -> list[tuple]:
    """Ask for some seconds; (seconds, status, body) of every answer that came in them."""
    answers, end = [], time.monotonic() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        i = number
        while time.monotonic() < end or i < at_least:
            started = time.monotonic()
            writer.write(requests[i % len(requests)])
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            n_bytes = int(head.partition(b"content-length:")[2].split()[0])
            body = json.loads(await reader.readexactly(n_bytes))
            if (now := time.monotonic()) <= end or at_least:
                answers.append((now - started, int(head.split()[1]), body))
            i += 1
        writer.close()

    clients = [asyncio.create_task(client(number)) for number in range(n_clients)]
    if at_least:
        await asyncio.gather(*clients)
    else:
        _, late = await asyncio.wait(clients, timeout=seconds + REST_S)
        for one in late:
            one.cancel()
    return answers


def describe(name, n_clients, answers, seconds, ids, folder) -> float:
    """Print a line, and return requests a second."""
    latencies = [latency for latency, status, _ in answers if status == 200] or [float("nan")]
    p50, p95, p99 = np.quantile(latencies, [0.5, 0.95, 0.99])
    errors = sum(status != 200 for _, status, _ in answers)
    per_s = (len(answers) - errors) / seconds
    lost = "-"
    if folder:
        lost = len(ids - set(Records(f"sqlite:///{folder}/records.sqlite").verdicts()["id"]))
    print(f"{name:<26}{n_clients:>8}{per_s:>12.2f}{p50:>8.2f}{p95:>8.2f}{p99:>8.2f}{errors:>8}{lost:>6}", flush=True)
    return per_s


if __name__ == "__main__":
    main()
