"""The service as one process that listens on a port."""

from __future__ import annotations

import socket

import torch
import uvicorn

from deepfake_utils.conventions import ConfigError
from deepfake_utils.serving.app import create_app
from deepfake_utils.serving.hurry import HurriedProtocol
from deepfake_utils.serving.live import MESSAGE_BYTES
from deepfake_utils.serving.service import Service, Settings

CONNECTIONS = 1000  # at a time; the one after gets a 503
LAST_ANSWERS_S = 20  # when the service is ended


def serve(settings: Settings, host: str, port: int) -> None:
    """Run the service until it is told to end.

    Raises:
        ConfigError: the port is taken, or the database cannot be opened.
        CheckpointError: the weights cannot be had.
    """
    torch.set_num_threads(1)  # recordings are looked at side by side instead
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise ConfigError(f"{host}:{port} cannot be listened on ({reason}): name another --host or --port") from None
    with listener:
        service = Service(settings)
        port = listener.getsockname()[1]
        print(f"http://{host}:{port}  {service.scorer.current.version}; ends with Ctrl-C", flush=True)
        config = uvicorn.Config(
            create_app(service), http=HurriedProtocol, ws="websockets-sansio", ws_max_size=MESSAGE_BYTES,
            ws_per_message_deflate=False, limit_concurrency=CONNECTIONS, backlog=CONNECTIONS,
            timeout_graceful_shutdown=LAST_ANSWERS_S, server_header=False, access_log=False, log_level="warning",
        )  # fmt: skip
        uvicorn.Server(config).run([listener])
