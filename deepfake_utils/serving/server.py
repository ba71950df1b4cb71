"""The service as one process that listens on a port."""

from __future__ import annotations

import asyncio
import socket

import h11
import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepfake_utils.conventions import ConfigError
from deepfake_utils.serving.app import create_app
from deepfake_utils.serving.live import MESSAGE_BYTES
from deepfake_utils.serving.service import Service, Settings

PATIENCE_S = 10.0  # for the head of a request to arrive whole, and for the rest of one that was refused
CONNECTIONS = 1000  # at a time; the one after gets a 503
LAST_ANSWERS_S = 20  # when the service is ended


class HurriedProtocol(H11Protocol):
    """HTTP that closes a connection whose request does not arrive, or does not end when it has been refused."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        """Give the first head its time."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Give the next head its time, once this one is there."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc) -> None:
        """Stop watching."""
        if self._deadline:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        state, cycle = self.conn.their_state, self.cycle
        is_late = state is h11.SEND_BODY and cycle is not None and cycle.response_complete  # answered, and sends on
        is_http = self.transport.get_protocol() is self  # a WebSocket's transport is another protocol's from here on
        is_waiting = is_http and (is_late or state is h11.IDLE)
        if is_waiting and self._deadline is None:
            self._deadline = self.loop.call_later(PATIENCE_S, self.transport.close)
        elif not is_waiting and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


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
        raise ConfigError(f"{host}:{port} cannot be listened on ({error.strerror}): name another --port") from None
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
