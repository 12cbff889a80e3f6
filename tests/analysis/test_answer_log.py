import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from analysis import answer_log, answers
from analysis.answer_log import Answer, AnswerLog
from errors import UserError
from tests.conftest import ROOT


def answer(i: int, **changes) -> Answer:
    features = np.full(32, i, np.float32)
    content = {"time": float(i), "version": "a" * 16, "model": "cnn/seed0", "label": "cat",
               "confidence": 0.5, "features": features, "image": f"{i:064x}", "name": f"{i}.png"}  # fmt: skip
    return Answer(**content | changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.sqlite"


@pytest.fixture
def log(path):
    log = AnswerLog(path)
    yield log
    log.close()


def test_what_is_written_is_read_by_version_and_time(log, path):
    odd = "caf\udce9 'x';--.png"  # a path that is not UTF-8
    assert log.write([answer(2), answer(1), answer(3, version="b" * 16, name=odd)]) == ""
    table = AnswerLog(path).read("a" * 16)
    assert table.time.tolist() == [1, 2] and table.name.tolist() == ["1.png", "2.png"]
    assert table.correction.tolist() == ["", ""] and table.source.tolist() == ["serve"] * 2
    np.testing.assert_array_equal(np.stack(table.features), np.outer([1, 2], np.ones(32)))
    assert log.read("b" * 16).name.tolist() == ["caf\\udce9 'x';--.png"]
    assert log.read("a" * 16, since=2).time.tolist() == [2]
    assert log.read("a" * 16, until=2).time.tolist() == [1]
    assert log.read("a" * 16, last=1).time.tolist() == [2]
    assert log.versions().values.tolist() == [["a" * 16, "cnn/seed0", 2, 1, 2], ["b" * 16, "cnn/seed0", 1, 3, 3]]  # fmt: skip
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_corrections_are_of_known_images_and_the_last_one_holds(log):
    log.write([answer(1), answer(2), answer(3)])
    first, second = f"{1:064x}", f"{2:064x}"
    assert log.correct([(first, "dog"), ("0" * 64, "dog")]) == 1
    assert log.correct([(first, "cow"), (second, "cat"), (second, "cat")]) == 3
    assert log.read("a" * 16).correction.tolist() == ["cow", "cat", ""]
    assert log.forget(2) == 1 and log.read("a" * 16).correction.tolist() == ["cat", ""]
    assert log.correct([(first, "dog")]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"hello, this is no database at all" * 50, "no log of answers"), (None, "something else"),
     ("folder", "cannot be used"), ("newer", "has format 9")],
)  # fmt: skip
def test_another_file_is_refused_and_left_alone(path, content, message):
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        sql = f"PRAGMA application_id = {answer_log.APPLICATION}; PRAGMA user_version = 9"
        with sqlite3.connect(path) as other:
            other.executescript(sql if content else "CREATE TABLE mine (x)")
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(UserError, match=message):
        AnswerLog(path)
    assert before == (path.read_bytes() if path.is_file() else b"")


def test_a_full_disk_is_said_and_writing_goes_on_when_there_is_space(log):
    log.write([answer(0)])
    pages = log._connect().execute("PRAGMA page_count").fetchone()[0]
    log._connect().execute(f"PRAGMA max_page_count = {pages}")
    many = [answer(i) for i in range(1, 400)]
    assert "is full" in log.write(many)
    assert log.write(many) == ""  # on a new connection, without that limit
    assert len(log.read("a" * 16)) == 400  # none twice: the failed write left nothing


def test_a_locked_log_is_said_and_written_later(log, path, monkeypatch):
    monkeypatch.setattr(answer_log, "WAIT", 0.01)
    log.close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert "locked" in log.write([answer(1)])
    other.execute("COMMIT")
    assert log.write([answer(1)]) == "" and len(log.read("a" * 16)) == 1


def test_a_log_damaged_in_the_middle_is_said_and_a_new_one_begun(log, path):
    log.write([answer(i) for i in range(500)])
    log.close()
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    assert "malformed" in log.write([answer(1)])
    with pytest.raises(UserError, match="damaged"):
        log.read("a" * 16, last=500)
    path.rename(path.with_suffix(".bad"))
    assert log.write([answer(1)]) == "" and len(log.read("a" * 16)) == 1


@pytest.mark.parametrize("ends", ["written", "closed"])
def test_a_log_that_is_moved_away_keeps_its_last_answers(log, path, ends):
    assert log.write([answer(i) for i in range(100)]) == ""
    path.rename(path.with_name("old.sqlite"))
    if ends == "written":
        assert log.write([answer(100)]) == "" and len(log.read("a" * 16)) == 1
    log.close()
    assert len(AnswerLog(path.with_name("old.sqlite")).read("a" * 16)) == 100


def test_an_answer_with_damaged_features_is_said(log, path):
    log.write([answer(1), answer(2)])
    with sqlite3.connect(path) as other:
        other.execute("UPDATE answers SET features = x'00' WHERE time = 2")
    with pytest.raises(UserError, match="holds 1 damaged answers"):
        log.read("a" * 16)
    assert len(log.read("a" * 16, until=2)) == 1


def test_what_does_not_fit_is_said_and_nothing_of_it_written(log):
    assert "shape (3,)" in log.write([answer(1), answer(2, features=np.zeros(3))])
    assert "NOT NULL" in log.write([answer(1), answer(2, confidence=np.nan)])
    assert log.read("a" * 16).empty


def test_features_are_those_of_a_model():
    assert answer_log.WIDTH == answers.WIDTH


def test_threads_and_processes_write_at_once(path):
    """Three processes make the log together and write from four threads each; nothing is lost."""
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from analysis.answer_log import Answer, AnswerLog
log, start = AnswerLog(sys.argv[1]), int(sys.argv[2])
def write(i):
    return log.write([Answer(i, "a" * 16, "cnn", "cat", 0.5, [i] * 32, str(i))])
with ThreadPoolExecutor(4) as pool:
    print("".join(pool.map(write, range(start, start + 50))))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, path, str(100 * k)], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for k in range(2)
    ]  # fmt: skip
    log = AnswerLog(path)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda i: log.write([answer(i)]), range(1000, 1100)))
    assert [p.communicate()[0].strip() for p in processes] == ["", ""] and set(texts) == {""}
    assert len(set(log.read("a" * 16).image)) == len(log.read("a" * 16)) == 200
