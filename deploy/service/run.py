"""The server's process: connections with time-outs, and an end that answers what was taken."""

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.service.gate import Gate
from errors import UserError

CONNECTIONS = 1000  # at once; more are answered with 503
BACKLOG = 512
LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: 49\r\n\r\n" + b'{"detail": "the head of the request is too slow"}'
)


def protocol_with(seconds: float, unread: float) -> type[H11Protocol]:
    """Returns uvicorn's protocol with limits on how long a client may keep it waiting.

    Uvicorn has none: it waits for ever for the first request of a connection, for a head of which a
    byte has come (here `seconds`), and for an answer to be taken, also when it closes (`unread`).
    """

    class Protocol(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _stuck: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # so any byte that waits is told
            self._watch(True)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self.loop.call_later(unread, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stuck:
                self._stuck.cancel()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch(self.conn.their_state is h11.IDLE)

        def connection_lost(self, error: Exception | None) -> None:
            self._watch(False)
            if self._stuck:
                self._stuck.cancel()
            super().connection_lost(error)

        def _watch(self, waiting: bool) -> None:
            if waiting and self._late is None:
                self._late = self.loop.call_later(seconds, self._end)
            elif not waiting and self._late is not None:
                self._late.cancel()
                self._late = None

        def _end(self) -> None:
            if not self.transport.is_closing():
                self.transport.write(LATE)
                self.transport.close()

    return Protocol


class Server(uvicorn.Server):
    """Uvicorn that exits with 0 after SIGTERM or SIGINT, and first says that it is not ready."""

    def __init__(self, gate: Gate, header_timeout: float, grace: float, drain: float = 0.0):
        super().__init__(
            uvicorn.Config(
                gate, http=protocol_with(header_timeout, gate.limits.body_timeout_s),
                loop="asyncio", ws="none", lifespan="on",
                log_config=None, access_log=False, server_header=False,
                backlog=BACKLOG, limit_concurrency=CONNECTIONS, proxy_headers=False,
                timeout_graceful_shutdown=int(grace + 1),
            )
        )  # fmt: skip
        self.gate, self.drain = gate, drain

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes both signals, in the main thread."""
        loop = asyncio.get_running_loop()
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
        except (RuntimeError, ValueError):  # another thread, as in tests
            pass
        yield

    def stop(self) -> None:
        """Ends the server when what it took is answered; called again, at once."""
        if self.gate.draining:
            self.force_exit = self.should_exit = True
            return
        self.gate.draining = True
        asyncio.get_running_loop().call_later(self.drain, self._stop)

    def _stop(self) -> None:
        self.gate.stopping = self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; raises UserError where it cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(BACKLOG)  # whoever comes early waits
    except (OSError, OverflowError) as error:
        bound.close()
        raise UserError(
            f"cannot listen on --host={host} --port={port}: {error}; --port=0 takes a free one"
        ) from error
    return bound
