"""HTTP that does not wait for ever: of the single process, and of Ray's proxies where they are told to use it.

    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deepfake_utils.serving.hurry.in_proxies

before `ray start` does that; a cluster that `serve --fleet` makes itself has it.
"""

from __future__ import annotations

import asyncio

import h11
import uvicorn.config
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE_S = 10.0  # for the head of a request to arrive whole, and for the rest of one that was refused
IN_PROXIES = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "deepfake_utils.serving.hurry.in_proxies")


def in_proxies() -> list:
    """Let uvicorn in this process speak HTTP as the single process does; adds no middleware."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{HurriedProtocol.__name__}"
    return []


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
