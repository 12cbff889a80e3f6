"""What every request passes before a model sees it: key, rate, size and time; and its log line."""

import asyncio
import re
import sys
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Collection

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.routing import Match

from deploy.service.events import say
from deploy.service.keys import given_key, name_of
from deploy.service.limits import Buckets, Limits, is_loopback
from deploy.service.metrics import Metrics

PUBLIC = ("/", "/healthz", "/readyz")  # they say nothing of models or images
LINGER = 2.0  # seconds to read on for, that a client still sending sees why it was refused
GONE = 499  # what the log calls a client that left before it had an answer
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Refused(Exception):
    """A request that is not handled: status, why, and the seconds after which to try again."""

    def __init__(self, status: int, detail: str, retry: float = 0):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, {}
        if retry:
            self.headers["Retry-After"] = str(max(1, int(retry + 0.999)))
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"


def refuse_others(headers: dict[bytes, bytes]) -> None:
    """Raises Refused for what a page of another site makes a browser ask of this machine.

    Such a page can send forms, and read the answers where its own name comes to point here.
    """
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name = re.sub(r":\d*$", "", host).strip("[]")
    if host and not is_loopback(name):
        text = "without keys or --open only http://localhost and http://127.0.0.1 are answered"
        raise Refused(421, text)
    origin = headers.get(b"origin", b"").decode("latin-1").lower()
    if origin and origin != f"http://{host}":
        raise Refused(403, "a page of another site may not ask a server without keys")


class Gate:
    """An ASGI application around another one."""

    def __init__(
        self, app: FastAPI, limits: Limits, keys: dict[str, str], metrics: Metrics,
        models: Collection[str] = (), local: bool = False,
    ):  # fmt: skip
        self.app, self.limits, self.keys, self.metrics = app, limits, keys, metrics
        self.models, self.local = (
            models,
            local,
        )  # no page of another site may ask through a browser of this machine
        self.buckets = Buckets(limits.rate, limits.burst)
        self.draining = False  # /readyz says no
        self.stopping = False  # no request is taken any more
        self.pending = 0  # bytes of bodies in memory
        metrics.pending.set_function(lambda: self.pending)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._note)
        try:
            self._admit(exchange)
            await self._read(exchange)
            async with asyncio.timeout(self.limits.timeout_s) as limit:
                await self.app(scope, exchange.replay, exchange.send)
        except Refused as refused:
            await exchange.refuse(refused, self.limits.max_body_mb * 2**20)
        except TimeoutError:
            if not limit.expired():
                raise
            await exchange.refuse(Refused(504, "it took too long: send fewer images at once"), 0)
        except ConnectionError:
            exchange.status = GONE
        except Exception as error:  # noqa: BLE001 - the next request may be well
            traceback.print_exception(error, file=sys.stderr)
            await exchange.refuse(Refused(500, "the server made a mistake; its log says which"), 0)
        finally:
            exchange.finish()

    def _admit(self, exchange: "_Exchange") -> None:
        """Raises Refused without a key that is known, above its rate, and while stopping."""
        scope = exchange.scope
        if self.stopping:
            raise Refused(503, "the server is stopping", retry=5)
        if exchange.ambiguous:
            raise Refused(400, "Content-Length and Transfer-Encoding exclude each other")
        if self.local:
            refuse_others(dict(scope["headers"]))
        if scope["path"] in PUBLIC:
            return
        client = (scope.get("client") or ("",))[0]
        if self.keys:
            key = given_key(scope["headers"])
            exchange.key = client = name_of(key, self.keys) or ""
            if not client:
                raise Refused(401, "a wrong API key" if key else "an API key is needed")
        if wait := self.buckets.wait(client):
            raise Refused(429, f"more than {self.limits.rate:g} requests a second", retry=wait)

    async def _read(self, exchange: "_Exchange") -> None:
        """Reads the body; raises Refused for one that is too large or too slow."""
        most = int(self.limits.max_body_mb * 2**20)
        if exchange.scope["path"] in PUBLIC:  # whoever has no key takes no memory
            most = 1024
        size = f"{most / 2**20:g} MB" if most >= 2**20 else f"{most / 2**10:.3g} KB"
        too_large = Refused(413, f"the body is larger than {size}")
        if exchange.length > most:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while not exchange.ended:
                    chunk = await exchange.receive()
                    exchange.taken += len(chunk)
                    self.pending += len(chunk)
                    if exchange.taken > most:
                        raise too_large
                    if self.pending > self.limits.max_pending_mb * 2**20:
                        raise Refused(503, "too many images are on their way", retry=1)
                    exchange.chunks.append(chunk)
        except TimeoutError:
            exchange.slow = True
            limit = f"{self.limits.body_timeout_s:g} s"
            raise Refused(408, f"the body did not arrive within {limit}") from None

    def _note(self, exchange: "_Exchange") -> None:
        self.pending -= exchange.taken
        seconds, known = time.perf_counter() - exchange.began, exchange.scope["state"]
        route, model = self._place(exchange.scope)
        self.metrics.requests.labels(route, model, exchange.status).inc()
        self.metrics.seconds.labels(route, model).observe(seconds)
        say(
            id=exchange.id, key=exchange.key, method=exchange.scope["method"], route=route,
            status=exchange.status, ms=round(seconds * 1000, 1), bytes=exchange.taken,
            **{name: known[name] for name in ("model", "images") if name in known},
        )  # fmt: skip

    def _place(self, scope: dict) -> tuple[str, str]:
        """Returns the pattern of a path and its model, also if it was refused before it got there.

        A name that is no model's is "", or whoever asks could make any number of series.
        """
        for route in self.app.router.routes:
            match, found = route.matches(scope)
            if match is not Match.NONE:
                model = found.get("path_params", {}).get("name", "")
                return route.path, model if model in self.models else ""
        return "none", ""


class _Exchange:
    """A request and its answer."""

    def __init__(self, scope: dict, receive: Callable, send: Callable, note: Callable):
        self.scope, self._receive, self._send, self._note = scope, receive, send, note
        self.id, self.key, self.began = uuid.uuid4().hex[:16], "", time.perf_counter()
        self.status, self.started, self.slow, self.replayed = 0, False, False, False
        self.chunks: deque[bytes] = deque()
        self.taken = 0  # bytes
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        self.length = int(length) if length.isdigit() else 0
        self.ended = not self.length and b"transfer-encoding" not in headers
        self.ambiguous = {b"content-length", b"transfer-encoding"} <= headers.keys()
        self.waits = b"expect" in headers  # with its body, for a sign to send it
        scope.setdefault("state", {})

    async def receive(self) -> bytes:
        """Returns the next part of the body; raises ConnectionError if the client left."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client left")
        self.ended = not message.get("more_body", False)
        return message.get("body", b"")

    async def replay(self) -> dict:
        """Gives the application the body that was read, then what the server says."""
        if self.replayed:
            return await self._receive()
        await asyncio.sleep(0)  # parsing a large body lets other requests live
        chunk = self.chunks.popleft() if self.chunks else b""
        more = bool(self.chunks)
        self.replayed = not more
        return {"type": "http.request", "body": chunk, "more_body": more}

    async def send(self, message: dict) -> None:
        """Sends a part of the answer, with the headers that all answers have."""
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            headers = [*message.get("headers", ()), *HEADERS, (b"x-request-id", self.id.encode())]
            # Else whoever sends slowly would keep the connection, and what follows a body whose
            # end is not sure would be read as a request.
            if not self.ended or self.ambiguous:
                headers.append((b"connection", b"close"))
            message = message | {"headers": headers}
        elif not message.get("more_body"):
            self.finish()  # so that whoever has an answer finds it counted
        await self._send(message)

    def finish(self) -> None:
        """Counts and logs the request, once."""
        note, self._note = self._note, lambda exchange: None
        note(self)

    async def refuse(self, refused: Refused, most: float) -> None:
        """Answers with an error, after reading at most so many bytes more of the body."""
        if self.started:  # half an answer was sent
            return
        self.status = refused.status
        read = 0
        try:
            async with asyncio.timeout(LINGER):
                while not (self.ended or self.slow or self.waits) and read < most:
                    read += len(await self.receive())
        except (TimeoutError, ConnectionError):
            pass
        answer = JSONResponse({"detail": refused.detail}, refused.status, refused.headers)
        await answer(self.scope, self._receive, self.send)
