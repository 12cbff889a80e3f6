import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from analysis import audit
from data.decoding import FACTS, Decoded, decode_all
from data.sources import list_source
from input_pipeline import load_dataset
from tests.conftest import ROOT, paint


@pytest.fixture
def messy(make_folder):
    """A folder with one of everything that an audit should find."""
    root = make_folder({"train/a": 6, "train/b o'<i>": 5, "test/a": 2, "test/b o'<i>": 2})
    paint(0).save(root / "train/a/again.png")  # in its class
    paint(1).save(root / "train/b o'<i>/liar.png")  # in another class
    paint(11).save(root / "train/a/leak.bmp")  # test/a/0.png: in another part, as another format
    photo = paint(50, (5, 5)).resize((120, 90), Image.BICUBIC)
    photo.save(root / "train/a/photo.png")
    brighter = ImageEnhance.Brightness(photo).enhance(1.02)
    brighter.resize((100, 75)).save(root / "train/a/photo_small.jpg", quality=85)
    data = (root / "train/a/photo_small.jpg").read_bytes()
    (root / "train/a/truncated.jpg").write_bytes(data[: len(data) // 2])
    (root / "train/a/words.jpg").write_text("words")
    (root / "train/a/notes.txt").write_text("words")
    Image.new("L", (9, 9), 7).save(root / "test/a/flat.png")
    return root


def test_findings(messy, folder_config, cache_dir):
    listing = list_source(folder_config(messy))
    findings = audit.audit_images(
        listing, decode_all(listing, folder_config(messy), cache_dir), listing.parts
    )
    assert findings["counts"] == {
        "train": {"a": 10, "b o'<i>": 6},
        "test": {"a": 3, "b o'<i>": 2},
    }
    assert findings["imbalance"]["train"] == pytest.approx(10 / 6)
    assert findings["unreadable"] == ["train/a/truncated.jpg", "train/a/words.jpg"]
    assert "truncated" in findings["reasons"]["train/a/truncated.jpg"]
    assert findings["not_images"] == ["train/a/notes.txt"]
    assert findings["constant"] == ["test/a/flat.png"]
    within = ["train/a/0.png", "train/a/again.png"]
    conflict = ["train/a/1.png", "train/b o'<i>/liar.png"]
    leak = ["test/a/0.png", "train/a/leak.bmp"]
    assert sorted(findings["exact_duplicates"]) == sorted([within, conflict, leak])
    assert findings["label_conflicts"] == [conflict]
    assert findings["leaks"] == [leak]
    assert findings["near_duplicates"] == [["train/a/photo.png", "train/a/photo_small.jpg"]]
    assert findings["modes"] == {"RGB": 20, "L": 1}
    assert findings["sizes"]["12x10"] == 18 and findings["value_range"] == [0, 255]


def test_images_left_out_are_no_leak(messy, folder_config, cache_dir):
    config = folder_config(messy, split=(0.75, 0.25), unreadable="skip", exclude_leaks=True)
    findings = audit.write_audit(load_dataset(config, cache_dir), messy.parent / "out")
    assert findings["leaks"] == [] and findings["label_conflicts"] == []
    assert len(findings["exact_duplicates"]) == 3
    assert sum(findings["counts"]["left out"].values()) == 3  # and two unreadable ones
    assert "left out: 3" in audit.describe(findings)


def test_a_clean_folder_has_no_findings(make_folder, folder_config, cache_dir):
    config = folder_config(make_folder({"a": 20, "b": 20}))
    listing = list_source(config)
    findings = audit.audit_images(listing, decode_all(listing, config, cache_dir), ["all"] * 40)
    for key in ("unreadable", "exact_duplicates", "label_conflicts", "leaks", "near_duplicates"):
        assert findings[key] == []


def run_audit(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "analysis.audit", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_command_writes_json_and_says_by_its_exit_code(messy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # the cache of the default config
    output, file = tmp_path / "out", tmp_path / "audit.json"
    result = run_audit(messy, f"--json={file}", f"--output={output}")
    assert result.returncode == 1, result.stderr
    assert "1 of them across parts (leaks)" in result.stdout
    findings = json.loads(file.read_text())
    assert findings["leaks"] == [["test/a/0.png", "train/a/leak.bmp"]]
    assert np.asarray(Image.open(output / "contact_sheet.png")).std() > 10
    (messy / "train/a/leak.bmp").unlink()
    (messy / "train/b o'<i>/liar.png").unlink()
    assert run_audit(messy, f"--output={output}").returncode == 0
    result = run_audit(tmp_path / "absent")
    assert result.returncode == 2 and "does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    config = ("--config=configs/folder.py", f"--config.data.path={messy}", f"--output={output}")
    result = run_audit(*config)
    assert result.returncode == 0 and "validation: " in result.stdout, result.stderr


@pytest.mark.parametrize("alike", [True, False])
def test_near_duplicates_of_many_images_take_little_memory(alike):
    """Look-alikes are all pairs of each other: 18 million of 6,000 images."""
    facts, draw = np.zeros(6000, FACTS), np.random.default_rng(0)
    facts["hash"] = 7 if alike else draw.integers(0, 2**63, len(facts), dtype=np.uint64)
    facts["thumbnail"] = 9 if alike else draw.integers(0, 256, (len(facts), 16, 16))
    facts["thumbnail"][:3] = 200  # of three images that look like none of the others
    facts["hash"][:3] = 2**63
    none = [""] * len(facts)
    tracemalloc.start()
    groups = audit.near_duplicates(Decoded(np.zeros(0), facts, none, none, ""), [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(map(len, groups)) == ([3, 5997] if alike else [3])
    assert peak < 400e6


def test_a_group_in_two_given_parts_is_a_leak(make_folder, folder_config, cache_dir, tmp_path):
    root = make_folder({"train/a": 20, "train/b": 20, "test/a": 3, "test/b": 3})
    config = folder_config(root, groups=r"/(\d+)\.png$")  # as if each number were a patient
    findings = audit.write_audit(load_dataset(config, cache_dir), tmp_path / "audit")
    assert set(findings["group_leaks"]) == {"0", "1", "2"} and audit.is_unfit(findings)
    assert "3 groups of data.groups across parts (leaks), such as 0: " in audit.describe(findings)
    config.exclude_leaks = True
    findings = audit.write_audit(load_dataset(config, cache_dir), tmp_path / "mended")
    assert findings["group_leaks"] == {} and not audit.is_unfit(findings)


def test_what_is_left_out_stands_in_the_audit(make_folder, folder_config, cache_dir, tmp_path):
    root = make_folder({"train/a": 8, "train/b": 8, "test": 3, "extra": 2})
    findings = audit.write_audit(load_dataset(folder_config(root), cache_dir), tmp_path)
    names = [name for names in findings["left_out"].values() for name in names]
    assert len(names) == 5 and findings["images"] == 16
    assert "images left out" in audit.describe(findings)
