"""A log of a model's answers in a SQLite file: what `deploy.monitor` looks at, and no image."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from errors import UserError

APPLICATION, FORMAT = 0x41524348, 1  # "ARCH", and the version of the tables
WIDTH = 32  # numbers of an image, as in `analysis.answers`, which would load JAX
WAIT = 5.0  # seconds for another process to finish writing
TABLES = """
CREATE TABLE answers (time REAL NOT NULL, version TEXT NOT NULL, model TEXT NOT NULL,
  label TEXT NOT NULL, confidence REAL NOT NULL, features BLOB NOT NULL, image TEXT NOT NULL,
  name TEXT NOT NULL, source TEXT NOT NULL);
CREATE TABLE corrections (image TEXT NOT NULL, label TEXT NOT NULL, time REAL NOT NULL);
CREATE INDEX answers_by_time ON answers (version, time);
CREATE INDEX answers_by_image ON answers (image);
CREATE INDEX corrections_by_image ON corrections (image);
"""


@dataclass(frozen=True)
class Answer:
    """What a model said of one image."""

    time: float  # seconds since 1970
    version: str  # of the model: `Predictor.version`
    model: str
    label: str  # the likeliest class
    confidence: float  # its calibrated probability
    features: np.ndarray  # float32 [32]
    image: str  # SHA-256 of the image file's bytes, in hexadecimal
    name: str = ""  # path, or the id that a client gave
    source: str = "serve"

    def row(self) -> tuple:
        """Returns the row of the table; raises ValueError for what does not fit."""
        features = np.asarray(self.features, "<f4")
        if features.shape != (WIDTH,):
            raise ValueError(f"features have shape {features.shape}, expected ({WIDTH},)")
        # A path need not be UTF-8: odd bytes become escapes.
        texts = (self.label, self.image, self.name, self.source)
        label, image, name, source = (t.encode(errors="backslashreplace").decode() for t in texts)
        return (float(self.time), self.version, self.model, label, float(self.confidence),
                features.tobytes(), image, name, source)  # fmt: skip


class AnswerLog:
    """A log, opened or made; several threads and several processes may use it at once.

    Raises UserError for a file that is no such log, that is damaged, or that cannot be made.
    """

    def __init__(self, path: Path | str):
        self.path, self.written = Path(path).expanduser(), 0  # answers, by this object
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        with self._errors():
            self._connect()

    def write(self, answers: Sequence[Answer]) -> str:
        """Adds answers, all or none; returns "" or what went wrong, and then tries again later."""
        try:
            rows = [answer.row() for answer in answers]
            fill = f"INSERT INTO answers VALUES ({','.join('?' * 9)})"
            self._change(lambda connection: connection.executemany(fill, rows))
            self.written += len(rows)
        except (UserError, ValueError, TypeError) as error:
            return str(error)
        return ""

    def correct(self, pairs: Sequence[tuple[str, str]]) -> int:
        """Keeps the true classes of images (hash, label); returns how many of them are known.

        Those of images without an answer are left out. Raises UserError where none can be kept.
        """
        known = "SELECT ?, ?, ? WHERE EXISTS (SELECT 1 FROM answers WHERE image = ?)"
        rows = [(image, label, time.time(), image) for image, label in pairs]
        fill = f"INSERT INTO corrections {known}"
        return self._change(lambda connection: connection.executemany(fill, rows).rowcount)

    def forget(self, before: float) -> int:
        """Removes answers older than a time, and corrections of images without an answer."""

        def remove(connection: sqlite3.Connection) -> int:
            gone = connection.execute("DELETE FROM answers WHERE time < ?", (before,)).rowcount
            known = "SELECT image FROM answers"
            connection.execute(f"DELETE FROM corrections WHERE image NOT IN ({known})")
            return gone

        return self._change(remove)

    def read(
        self, version: str, since: float = 0, until: float = np.inf, last: int = -1
    ) -> pd.DataFrame:
        """Returns the answers of a version with since <= time < until, oldest first.

        Columns: time, label, confidence, image, name, source, features (float32 [32] each), and
        `correction`, the last label that was given, or "". `last` keeps the newest so many.
        """
        query = """SELECT time, label, confidence, image, name, source, features,
          coalesce((SELECT c.label FROM corrections c WHERE c.image = a.image
          ORDER BY c.rowid DESC LIMIT 1), '') AS correction
          FROM answers a WHERE version = ? AND time >= ? AND time < ?
          ORDER BY time DESC, rowid DESC LIMIT ?"""
        table = self._read(query, version, since, until, last or -1)[::-1].reset_index(drop=True)
        whole = [isinstance(blob, bytes) and len(blob) == 4 * WIDTH for blob in table.features]
        if not all(whole):
            raise UserError(
                f"the log {self.path} holds {whole.count(False)} damaged answers: choose another "
                "time, or move it away, and a new one is begun"
            )
        table["features"] = [np.frombuffer(blob, "<f4") for blob in table.features]
        return table

    def versions(self, since: float = 0, until: float = np.inf) -> pd.DataFrame:
        """Returns a row for each version in that time: version, model, answers, first, last."""
        query = """SELECT version, max(model) AS model, count(*) AS answers, min(time) AS first,
          max(time) AS last FROM answers WHERE time >= ? AND time < ? GROUP BY version
          ORDER BY last"""
        return self._read(query, since, until)

    def known(self, names: Sequence[str]) -> pd.DataFrame:
        """Returns the distinct pairs of image and name of which one is among `names`."""
        listed = "(SELECT value FROM json_each(?))"
        query = f"""SELECT image, name FROM answers WHERE image IN {listed}
          UNION SELECT image, name FROM answers WHERE name IN {listed}"""
        return self._read(query, json.dumps(list(names)), json.dumps(list(names)))

    def close(self) -> None:
        """Closes the file; a later call opens it again."""
        with self._lock:
            self._close()

    # --- the file -----------------------------------------------------------------------------

    def _read(self, query: str, *values) -> pd.DataFrame:
        with self._lock, self._errors():
            return pd.read_sql_query(query, self._connect(), params=values)

    def _change(self, change: Callable[[sqlite3.Connection], int | None]) -> int | None:
        """Makes a change in one transaction, and returns what it returns."""
        with self._lock, self._errors():
            connection = self._connect()
            connection.execute("BEGIN IMMEDIATE")
            result = change(connection)
            connection.execute("COMMIT")
            return result

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns trouble into UserError, after which the next use opens the file again."""
        try:
            yield
        except (sqlite3.Error, pd.errors.DatabaseError, OSError) as error:
            self._close()
            if "not a database" in str(error):
                raise UserError(f"{self.path} is no log of answers: give another name") from error
            raise UserError(
                f"the log {self.path} cannot be used ({error}): look at the disk's space, its "
                "rights and folder; if it is damaged, move it away, and a new one is begun"
            ) from error
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # its file may be gone
                if self._opened != self._inode():
                    # Of a file that was moved, SQLite drops at the end what is not yet inside it.
                    connection.rollback()
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            with suppress(sqlite3.Error):
                connection.close()  # a transaction that was begun is undone

    def _connect(self) -> sqlite3.Connection:
        """Returns the connection; opens the file if need be, also after it was moved away."""
        if self._connection is not None and self._opened == self._inode():
            return self._connection
        self._close()
        self._connection = connection = sqlite3.connect(
            self.path, timeout=WAIT, isolation_level=None, check_same_thread=False
        )
        self._prepare(connection)
        # In WAL mode this keeps the file whole; the last answers before a power cut may be lost.
        connection.execute("PRAGMA synchronous = NORMAL")
        self._opened = self._inode()
        return connection

    def _inode(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")  # what is read stands still until it ends
        ready = self._is_log(connection)
        connection.execute("COMMIT")
        if not ready:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")  # another process may be making it
            if not self._is_log(connection):
                for statement in TABLES.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.execute("COMMIT")

    def _is_log(self, connection: sqlite3.Connection) -> bool:
        """Returns whether the tables are there; raises UserError for another database."""
        names = ("application_id", "user_version")
        kind, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
        if (kind, version) == (APPLICATION, FORMAT):
            return True
        if kind == APPLICATION:
            raise UserError(
                f"the log {self.path} has format {version}, this version reads {FORMAT}: move it "
                "away and a new one is begun"
            )
        if (kind, version) != (0, 0) or connection.execute(
            "SELECT 1 FROM sqlite_master"
        ).fetchone():
            raise UserError(f"{self.path} is a database of something else: give another name")
        return False
