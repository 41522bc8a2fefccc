"""The HTTP server below the applications: uvicorn, with connections that hold nothing up, and an end that waits for answers."""

import asyncio
import errno
import logging
import os
import resource
import socket
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from autoregressive.serve.service import Service

log = logging.getLogger(__name__)

SECONDS_TO_ASK = 10  # from connecting, or from the last answer, to a whole request's headers
# Without taking anything of an answer; so long the last answers have, too, once everything is drawn.
SECONDS_TO_READ = 30
SECONDS_TO_HEAR = 0.5  # what clients that are connected by then ask, once no others can connect
SECONDS_TO_CLOSE = 30  # for the engine, after that
MOST_UNREAD = 64 * 2**20  # bytes of answers that clients do not take; four times as many of those that they take slowly
SECONDS_BETWEEN_WARNINGS = 60


class DrainingServer(uvicorn.Server):
    """A server that goes on listening after `drain`, to say 503, until the service has answered what it accepted.

    It closes connections whose clients ask for nothing, or do not take what they asked for.

    service: what is drained; None for an application with nothing to wait for. told: fields of the log line of its start.
    """

    def __init__(self, app: ASGIApp, service: Service | None = None, told: dict | None = None):
        # One HTTP parser and no websockets whatever is installed beside it.
        config = uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", h11_max_incomplete_event_size=32 * 1024, log_config=None,
            access_log=False, server_header=False, lifespan="on", timeout_graceful_shutdown=5,
        )  # fmt: skip
        super().__init__(config)
        self.service, self.told = service, told or {}
        self._since: dict = {}  # connections and what they are at, and since when
        self._drawn_at: float | None = None
        self._warned_at = -float("inf")

    def capture_signals(self) -> AbstractContextManager:
        """Leave the signals to the process (server.py:Signals)."""
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and log where."""
        asyncio.get_running_loop().set_exception_handler(self.log_exception)
        await super().startup(sockets)
        name = self.servers[0].sockets[0].getsockname()
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        url = f"unix:{name}" if isinstance(name, str) else f"http://{host}:{name[1]}"
        name = self.service.info.name if self.service else "the demo"
        log.info(f"running on {url} with {name}", extra={"fields": self.told})

    def log_exception(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        """Log an exception that nothing awaits; that there are no descriptors left is told once a minute."""
        if getattr(context.get("exception"), "errno", None) not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._warned_at > SECONDS_BETWEEN_WARNINGS:
            self._warned_at = time.monotonic()
            log.warning("no file descriptors are left, connections have to wait: raise the limit (ulimit -n)")

    def drain(self, seconds: float = 600) -> None:
        """Take no more requests, and end once what was accepted is answered, or else the process after so many seconds."""
        self.service.draining = True
        last_resort = threading.Timer(seconds + SECONDS_TO_READ + SECONDS_TO_CLOSE, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()

    async def on_tick(self, counter: int) -> bool:
        """Close what is idle, and decide whether to end; uvicorn calls it ten times a second."""
        self._close_idle()
        if self.service and self.service.draining and self.service.idle and not self.should_exit:
            for listener in self.servers:
                listener.close()
            self._drawn_at = self._drawn_at or time.monotonic()
            waited = time.monotonic() - self._drawn_at
            unread = [each for each in self.server_state.connections if each.transport.get_write_buffer_size()]
            if waited > SECONDS_TO_READ or not (waited < SECONDS_TO_HEAR or unread or self.server_state.tasks):
                log.info("what was accepted is answered")
                for connection in unread:
                    connection.transport.abort()
                self.should_exit = True
        return await super().on_tick(counter)

    def _close_idle(self) -> None:
        now, since, unread = time.monotonic(), {}, 0
        connections: Any = self.server_state.connections
        for connection in connections:
            cycle, size = connection.cycle, connection.transport.get_write_buffer_size()
            unread += size
            if size or cycle is None or cycle.response_complete or connection.transport.is_closing():
                since[connection, cycle, size] = self._since.get((connection, cycle, size), now)
        self._since = since
        excess = len(connections) - resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        for (connection, _, size), began in sorted(since.items(), key=lambda item: item[1]):
            late = now - began > (SECONDS_TO_READ if size else SECONDS_TO_ASK)
            crowded = size and unread > MOST_UNREAD * (1 if now - began > 1 else 4)
            if late or crowded or excess > 0:
                connection.transport.abort()
                unread, excess = unread - size, excess - 1
