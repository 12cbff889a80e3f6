"""Random folders of odd names and files: read right or refused in words, nothing lost or twice.

Every file is drawn with a content of its own, so an image is known again by its pixels.
"""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis import audit
from configs import base
from data.decoding import decode_all
from data.folders import PARTS
from data.sources import list_source
from errors import UserError
from input_pipeline import load_dataset
from tests.conftest import paint

NAMES = st.sampled_from(
    ["cat", "dog", "2", "10", "train", "Test", "val_images", "training_set", "eval", "__MACOSX"]
    + [".hidden", "caf\u00e9", "cafe\u0301", "x\udce9", "a b$_&<|>\n", "fold1", "seg_train"]
)
ENDINGS = st.sampled_from([".png", ".PNG", ".jpg", ".webp", ".tiff", ".txt", ".NEF", ""])
KINDS = st.sampled_from(
    ["sound"] * 6 + ["words", "cut", "empty", "dangling", "fifo"] + ["copy"] * 3
)
FOLDERS = st.lists(NAMES, min_size=0, max_size=3)
FILES = st.tuples(FOLDERS, st.lists(st.tuples(KINDS, ENDINGS), min_size=1, max_size=4))
TREES = st.lists(FILES, min_size=2, max_size=8)
PARTS_DRAWN = st.sampled_from(
    [[""], ["train"], ["train", "test"], ["TRAIN", "val_images"], ["training_set", "eval", "test1"]]
)
CLASSES = st.lists(
    st.sampled_from(["cat", "dog", "2", "10", "caf\u00e9", "cafe\u0301", "x\udce9", "a b$_&<|>\n"]),
    min_size=2,
    max_size=3,
    unique=True,
)
ODD = st.lists(st.tuples(KINDS, ENDINGS), max_size=3)


@st.composite
def orderly(draw):
    """Parts that hold the same classes, or classes alone; now and then a folder beside them."""
    parts, classes = draw(PARTS_DRAWN), draw(CLASSES)
    tree = [
        ([part, name] if part else [name], [("sound", ".png")] * 5 + draw(ODD))
        for part in parts
        for name in classes
    ]
    return tree + draw(st.lists(FILES, max_size=1))


PLAIN = orderly()
FAST = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


SEEN = (".png", ".jpg", ".webp", ".tiff", ".nef")


def build(root: Path, tree) -> dict[str, Path]:
    """Writes a tree; returns its files by their paths, hidden ones and those of systems aside."""
    files, seed = {}, 0
    (root / "empty").touch()
    for folders, content in tree:
        folder = root.joinpath(*folders)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, ending in content:
            seed += 1
            path = folder / f"f{seed}{ending}"
            write(path, kind, 1 if kind == "copy" else seed)
            if not any(name.startswith(".") or name == "__MACOSX" for name in folders):
                files[str(path)] = path
    return files


def write(path: Path, kind: str, seed: int) -> None:
    if kind == "dangling":
        path.symlink_to("/nowhere/gone")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in ("words", "empty"):
        path.write_text("words" if kind == "words" else "")
    else:
        with open(path, "wb") as file:
            paint(seed).save(file, "PNG")
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:60])


def check(root: Path, files: dict[str, Path], cache: str, unreadable: str) -> str:
    """Loads a folder and asserts what must hold of it; returns how it ended."""
    config = base.get_config().data
    config.path, config.image_size, config.unreadable = str(root), 4, unreadable
    try:
        listing = list_source(config)
    except UserError as error:
        assert len(str(error)) > 20
        return "not listed"
    everything = [*listing.ids, *listing.strays, *sum(listing.left_out.values(), [])]
    assert max(Counter(everything).values()) == 1, "counted twice"
    for text in (*everything, *listing.class_names, *listing.remarks()):
        text.encode("utf-8")  # can be printed, stored and drawn
    images = {p for p in files if p.lower().endswith(SEEN)}
    named = len(everything) - sum(not x.lower().endswith(SEEN) for x in listing.strays)
    assert named == len(images), "lost"
    assert len(listing.ids) == len(listing.labels) == len(listing.parts)
    assert len(set(listing.class_names)) == len(listing.class_names) >= 2
    assert set(listing.parts) <= {"", *PARTS}
    decoded = decode_all(listing, config, cache)
    try:
        dataset = load_dataset(config, cache)
    except UserError:
        return "refused"
    rows = np.concatenate(list(dataset.rows.values()))
    assert len(rows) == len(set(rows.tolist())), "an image in two parts"
    left_out = {listing.ids[i] for i in range(len(listing.ids))} - {
        listing.ids[row] for row in rows
    }
    assert left_out == set(dataset.excluded)
    assert left_out == {listing.ids[i] for i, e in enumerate(decoded.errors) if e}
    if "" in listing.parts:  # what we divide keeps copies together
        part = np.full(len(listing.ids), -1)
        for i, name in enumerate(PARTS):
            part[dataset.rows[name]] = i
        for pixels in {bytes(decoded.facts["pixels"][row]) for row in rows}:
            same = [row for row in rows if bytes(decoded.facts["pixels"][row]) == pixels]
            assert len(set(part[same])) == 1
    return "read"


def try_folder(tree, unreadable: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        root.mkdir()
        return check(root, build(root, tree), f"{folder}/cache", unreadable)


@pytest.mark.parametrize(("trees", "read"), [(TREES, 0), (PLAIN, 40)], ids=["any", "plain"])
def test_any_folder_is_read_right_or_refused(trees, read):
    ends = Counter()

    @settings(FAST, max_examples=100)
    @given(trees, st.sampled_from(["skip", "skip", "error"]))
    def run(tree, unreadable):
        ends[try_folder(tree, unreadable)] += 1

    run()
    assert ends["read"] >= read and ends["not listed"] >= 5, ends  # both ways were tried
    assert ends["read"] + ends["refused"] >= 5, ends


def test_any_folder_ends_a_command_with_the_right_exit_code(tmp_path, monkeypatch, cache_dir):
    """The audit's, from the command to the files it writes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    codes = []

    @settings(FAST, max_examples=10)
    @given(PLAIN)
    def run(tree):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            root, output = Path(folder) / "data", Path(folder) / "out"
            root.mkdir()
            build(root, tree)
            for name, value in (("CONFIG", None), ("JSON", None), ("OUTPUT", str(output))):
                monkeypatch.setattr(audit, name, SimpleNamespace(value=value), raising=False)
            try:
                codes.append(audit.main(["audit", str(root)]))
            except UserError:
                codes.append(2)
                assert not output.exists()
                return
            findings = json.loads((output / "audit.json").read_text(encoding="utf-8"))
            assert codes[-1] == bool(findings["leaks"] or findings["label_conflicts"])

    run()
    assert {0, 1, 2} == set(codes), codes
