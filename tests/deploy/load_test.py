"""How much does a server bear? Many clients at once with real photos, then its memory.

    python -m tests.deploy.load_test http://127.0.0.1:8000 PHOTOS/ [--clients=32] [--seconds=60]
        [--requests=20000] [--pid=PID] [--key=KEY]

PHOTOS/ is searched for .jpg and .png. Every request is one photo, sent to the server's first model.
With --requests the clients go on to that number, and with --pid the memory of the server's process
(RssAnon) is printed at each quarter. Start the server with --rate=0: by default it refuses more than
100 requests a second of a key, or of an address, with 429.
"""

import argparse
import collections
import http.client
import itertools
import json
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np


def memory(pid: int) -> str:
    text = Path(f"/proc/{pid}/status").read_text() if pid else ""
    found = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    return f", RssAnon {int(found['RssAnon'].split()[0]) / 1024:.0f} MiB" if found else ""


class Load:
    """Clients that send photos one after the other, until one of two ends is reached."""

    def __init__(self, url: str, photos: list[bytes], key: str):
        self.place = urllib.parse.urlsplit(url).netloc
        self.headers = {"Content-Type": "image/jpeg"} | ({"X-API-Key": key} if key else {})
        self.photos, self.lock = itertools.cycle(photos), threading.Lock()
        self.seconds, self.statuses = [], collections.Counter()
        connection = http.client.HTTPConnection(self.place, timeout=60)
        connection.request("GET", "/v1/models", headers=self.headers)
        model = json.load(connection.getresponse())["models"][0]["name"]
        self.path = f"/v1/models/{model}/predict"

    def client(self, until: float, requests: int) -> None:
        connection = http.client.HTTPConnection(self.place, timeout=60)
        while time.monotonic() < until and len(self.seconds) < requests:
            with self.lock:
                photo = next(self.photos)
            began = time.perf_counter()
            try:
                connection.request("POST", self.path, photo, self.headers)
                answer = connection.getresponse()
                answer.read()
                status = str(answer.status)
            except OSError as error:
                connection.close()
                status = type(error).__name__
            self.seconds.append(time.perf_counter() - began)
            self.statuses[status] += 1

    def run(self, clients: int, seconds: float, requests: int) -> None:
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self.client, args=(until, requests)) for _ in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def report(self, took: float) -> str:
        p50, p99, worst = np.quantile(self.seconds, [0.5, 0.99, 1]) * 1000
        rate = len(self.seconds) / took
        return (
            f"{len(self.seconds)} requests, {rate:.1f}/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms, "
            f"longest {worst:.0f} ms, answers {dict(self.statuses)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--pid", type=int, default=0)
    parser.add_argument("--key", default="")
    given = parser.parse_args()
    files = sorted(path for path in given.photos.rglob("*") if path.suffix in (".jpg", ".png"))
    photos = [path.read_bytes() for path in files]
    load, began = Load(given.url, photos, given.key), time.perf_counter()
    print(f"{len(photos)} photos, {given.clients} clients{memory(given.pid)}", flush=True)
    load.run(given.clients, given.seconds, 10**9)
    print(load.report(time.perf_counter() - began) + memory(given.pid), flush=True)
    while len(load.seconds) < given.requests:
        quarter = len(load.seconds) // (given.requests // 4) + 1
        load.run(given.clients, 10**6, min(given.requests, quarter * given.requests // 4))
        print(f"after {len(load.seconds)} requests{memory(given.pid)}", flush=True)
    if given.requests:
        print(load.report(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
