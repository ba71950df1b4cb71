"""A real service in a process of its own, for the tests of it."""

import contextlib
import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import psutil
import soundfile

from deepfake_utils.demo import voice

ROOT = Path(__file__).parents[1]
START = """
import sys, json
from pathlib import Path
from deepfake_utils.serving.limits import Limits
from deepfake_utils.serving.server import serve
from deepfake_utils.serving.service import Settings
settings = json.loads(sys.argv[1])
limits = Limits(**settings.pop("limits"))
serve(Settings(Path(settings.pop("folder")), limits=limits, **settings), "127.0.0.1", 0)
"""


def babble(seconds: float = 6.0, seed: int = 1) -> np.ndarray:
    """What Silero takes for speech, int16 at 16 kHz, repeated to any length."""
    rng = np.random.default_rng(seed)
    spoken = voice.record(voice.speak(voice.draw_speaker(rng), 8 * 16_000, rng), rng)
    return np.resize(spoken, round(seconds * 16_000))


def encoded(samples: np.ndarray, format: str = "FLAC", rate_hz: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=format)
    return file.getvalue()


def send_raw(port: int, *parts: bytes, repeated: bytes = b"", timeout_s: float = 15) -> bytes:
    """Send bytes as they are, some of them without end, and give what comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
            while repeated:
                connection.sendall(repeated)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**16):
                answer += part
    return answer


class Running:
    """A service that runs, with a client for it."""

    def __init__(self, folder: Path, limits: dict | None = None, **settings):
        self.folder = Path(folder)
        settings |= {"folder": str(folder), "limits": limits or {}}
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(settings)], cwd=ROOT, stdout=subprocess.PIPE, env=environment
        )
        first = self.process.stdout.readline().decode()
        assert first.startswith("http://"), f"the service did not start: {first}"
        self.url = first.split()[0]
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=60)

    @property
    def memory_mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def raw(self, *parts: bytes, repeated: bytes = b"", timeout_s: float = 15) -> bytes:
        """As `send_raw`."""
        return send_raw(self.port, *parts, repeated=repeated, timeout_s=timeout_s)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.client.close()
        self.process.terminate()
        try:
            return self.process.wait(40)
        finally:
            self.process.kill()
