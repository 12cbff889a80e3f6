"""How much a server takes: of bodies, images, time and requests; and from where."""

import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass

CLIENTS = 10_000  # whose rates are remembered at once


@dataclass(frozen=True)
class Limits:
    """What `deploy.serve` has flags of the same names for."""

    target_accuracy: float = 0.95
    rate: float = 100.0  # requests a second of a key, 0 for any number
    burst: float = 200.0  # requests at once
    max_body_mb: float = 20.0
    max_pending_mb: float = 256.0  # of all bodies that are in memory at once
    max_images: int = 32  # of a request
    max_megapixels: float = 36.0
    queue: int = 256  # images of a model that wait, are decoded or classified
    max_batch: int = 16
    max_wait_ms: float = 2.0  # for a batch to fill
    header_timeout_s: float = 10.0
    body_timeout_s: float = 20.0
    timeout_s: float = 30.0  # from the whole body to the answer


class Buckets:
    """A token bucket for each client (Turner 1986): `rate` tokens a second, `burst` at most."""

    def __init__(self, rate: float, burst: float):
        self.rate, self.burst = rate, max(1.0, burst)
        self._known: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when

    def wait(self, client: str, now: float | None = None) -> float:
        """Takes a token; returns 0, or the seconds until there is one, and takes none."""
        if not self.rate:
            return 0.0
        now = time.monotonic() if now is None else now
        tokens, then = self._known.pop(client, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.rate)
        allowed = tokens >= 1
        self._known[client] = (tokens - allowed, now)
        if len(self._known) > CLIENTS:
            self._known.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) / self.rate


def is_loopback(name: str) -> bool:
    """Returns whether a host's name or address is of this machine alone."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
