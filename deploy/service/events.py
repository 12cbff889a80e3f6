"""What a server writes down: a line of JSON for each request, and answers for `deploy.monitor`."""

import json
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime

from analysis.answer_log import Answer, AnswerLog
from deploy.service.metrics import Metrics

WAITING = 10_000  # answers that may wait to be logged


def say(**facts) -> None:
    """Writes a line of JSON to standard output; a reader that has gone stops nothing."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    with suppress(OSError, ValueError):
        print(json.dumps({"time": time} | facts), flush=True, file=sys.stdout)


class Recorder:
    """Logs answers in a thread of its own; when that fails, serving goes on, and says so."""

    def __init__(self, log: AnswerLog | None, metrics: Metrics):
        self.log, self._metrics = log, metrics
        self.trouble = ""  # why the last answers were not logged
        self._pool = ThreadPoolExecutor(1, "log")
        self._waiting, self._lock = 0, threading.Lock()
        metrics.log_failing.set_function(lambda: bool(self.trouble))

    @property
    def state(self) -> str:
        """Returns "off", "ok" or "failing"; why is in the server's own log."""
        return "off" if self.log is None else "failing" if self.trouble else "ok"

    def write(self, answers: Sequence[Answer]) -> None:
        """Logs answers some time later; drops them where too many wait already."""
        with self._lock:
            full = self._waiting + len(answers) > WAITING
            self._waiting += 0 if full else len(answers)
        if full:
            self._note("answers come faster than they can be logged", len(answers))
        else:
            self._pool.submit(self._write, answers)

    def correct(self, pairs: Sequence[tuple[str, str]]) -> Future:
        """Returns the future hashes, of those of (hash, class), that are not in the log."""
        return self._pool.submit(self._correct, pairs)

    def close(self) -> None:
        """Logs what waits, and closes the log."""
        self._pool.shutdown()
        if self.log is not None:
            self.log.close()

    def _write(self, answers: Sequence[Answer]) -> None:
        try:
            trouble = self.log.write(answers)
        except Exception as error:  # noqa: BLE001 - the next answers may be well
            trouble = str(error) or type(error).__name__
        self._note(trouble, len(answers))
        with self._lock:
            self._waiting -= len(answers)

    def _correct(self, pairs: Sequence[tuple[str, str]]) -> set[str]:
        known, images = self.log.correct(pairs), {image for image, _ in pairs}
        self._metrics.corrections.inc(known)
        if known == len(pairs):
            return set()
        return images - set(self.log.known(sorted(images))["image"]) if known else images

    def _note(self, trouble: str, count: int) -> None:
        if trouble:
            self._metrics.log_failures.inc(count)
        if bool(trouble) != bool(self.trouble):
            event = "answers are not logged" if trouble else "answers are logged again"
            say(event=event, **({"why": trouble} if trouble else {}))
        self.trouble = trouble
