"""Speed is measured in turn, and what the files say of it is consistent."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from textwrap import dedent

import numpy as np
import pytest
from PIL import Image

from analysis import benchmark
from analysis.speed import commands, ours, results, turns, worker
from analysis.speed.worker import Spec
from errors import UserError
from models import create_model
from models.weights.own import arrays_of
from tests.conftest import ROOT, paint

# A worker without a network: it says of each step that it took so many seconds, fails after so many
# turns, and notes its turns in a file.
FAKE = """
import json, sys
name, seconds, turns, notes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if not turns:
    print(json.dumps({"error": "out of memory\\nand more"}))
    sys.exit(1)
ready = {"compile_seconds": 1.5, "step_seconds": seconds, "device": "NVIDIA H100 80GB HBM3"}
print(json.dumps({"ready": ready | {"multiply_adds_per_image": 10**9}}), flush=True)
for number, line in enumerate(sys.stdin, start=1):
    if number > turns:
        sys.exit("gone for ever")
    with open(notes, "a") as file:
        file.write(name + "\\n")
    print(json.dumps({"seconds": json.loads(line)["steps"] * seconds, "memory": number}), flush=True)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Returns a function: times sides given as {name: (seconds a step, turns until it fails)}."""
    monkeypatch.setattr(turns, "SETTLE", 0.0)
    (tmp_path / "fake.py").write_text(FAKE)

    def time(sides: dict, repeats: int = 3) -> tuple[dict, list[str]]:
        notes = tmp_path / "notes"
        started = {
            name: [sys.executable, "-S", str(tmp_path / "fake.py"), name, *map(str, values), notes]
            for name, values in sides.items()
        }
        timings = turns.time_in_turn(started, tmp_path, repeats, seconds=1.0)
        return timings, notes.read_text().split()

    return time


def test_sides_take_turns_and_each_round_begins_with_another(fakes):
    timings, notes = fakes({"ours": (0.1, 9), "torch": (0.2, 9), "keras": (0.05, 9)})
    assert notes == ["ours", "torch", "keras", "torch", "keras", "ours", "keras", "ours", "torch"]
    assert {side: t.steps for side, t in timings.items()} == {"ours": 10, "torch": 5, "keras": 20}
    assert timings["torch"].seconds == [1.0, 1.0, 1.0] and timings["torch"].memory == 3


def test_a_side_that_fails_is_named_with_its_reason_and_the_others_go_on(fakes):
    timings, notes = fakes({"ours": (0.1, 9), "torch": (0.2, 1), "keras": (0.1, 0)})
    assert timings["torch"].error == "ended with code 1: gone for ever"
    assert timings["keras"].error == "out of memory"
    assert notes == ["ours", "torch", "ours", "ours"]
    rows = results.rows_of(Spec("ours", "train", "resnet50", 64, 8, "bfloat16"), timings)
    assert results.ratios_of(rows) == []  # torch took one turn and then failed: it counts for none
    content = {"rows": rows, "summary": [], "environment": benchmark.surroundings()}
    assert "train resnet50, keras: out of memory" in benchmark.describe(content)


def test_rows_and_ratios_follow_from_the_seconds(fakes):
    rows = []
    for model, ours_seconds in (("resnet50", 0.1), ("vgg16", 0.4)):
        timings, _ = fakes({"ours": (ours_seconds, 9), "torch": (0.2, 9), "keras": (0.5, 9)})
        rows += results.rows_of(Spec("ours", "train", model, 64, 8, "bfloat16"), timings)
    mine = rows[0]
    assert mine["images_per_second"] == pytest.approx(80)
    assert mine["milliseconds_per_step"] == pytest.approx(100)
    assert mine["multiply_adds_per_step"] == 3 * 8 * 10**9
    assert mine["share_of_peak"] == pytest.approx(2 * 24e9 / 0.1 / 989.4e12)
    ratios = results.ratios_of(rows)
    assert [(r["best_peer"], r["ratio"]) for r in ratios] == [
        ("torch", pytest.approx(2.0)),
        ("torch", pytest.approx(0.5)),
    ]
    (summary,) = results.summary_of(ratios)
    assert summary["geometric_mean"] == pytest.approx(1.0)
    assert (summary["least"], summary["least_model"]) == (pytest.approx(0.5), "vgg16")
    table = results.table_of(rows).splitlines()
    assert table[1].split()[:5] == ["train", "resnet50", "8", "ours", "80"]
    assert table[1].endswith("2.00") and table[4].endswith("0.50")


def test_peaks_are_known_of_some_devices_only():
    assert results.peak_of("NVIDIA H100 80GB HBM3", "float32") == 494.7e12
    assert results.peak_of("TPU v5 lite", "bfloat16") == 197e12
    assert results.peak_of("cpu", "float32") is None


def test_the_command_writes_what_it_measured(tmp_path):
    command = [sys.executable, "-m", "analysis.benchmark", "--models=linear", "--modes=infer,epoch"]
    command += ["--peers=", "--image_size=8", "--batch_size=4", "--repeats=2", "--seconds=0.01"]
    done = subprocess.run(
        [*command, f"--output={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["environment"]["packages"]["jax"] and content["environment"]["usable_cores"]
    infer, step, loop = content["rows"]
    assert [row["mode"] for row in content["rows"]] == ["infer", "epoch", "epoch"]
    assert infer["multiply_adds_per_step"] == 4 * prod((8, 8, 3, 6))
    for row in content["rows"]:
        seconds, steps = row["seconds_of_repeats"], row["steps_per_repeat"]
        assert len(seconds) == 2
        assert row["images_per_second"] == pytest.approx(4 * steps / np.median(seconds))
        assert row["peak_memory_bytes"] > 50e6
    assert loop["steps_per_repeat"] >= 2
    parts = {k.removesuffix(results.PART): v for k, v in loop.items() if k.endswith(results.PART)}
    apart = {"validation", "best weights", "checkpoint"}
    assert set(parts) == {"steps", "logging", "whole epoch"} | apart
    assert 0 < parts["steps"] < loop["milliseconds_per_step"] < parts["whole epoch"]
    (ratio,) = content["ratios"]
    expected = loop["images_per_second"] / step["images_per_second"]
    assert (ratio["mode"], ratio["ratio"]) == ("epoch", pytest.approx(expected))
    rows = list(csv.DictReader((tmp_path / "benchmark.csv").open()))
    assert [float(row["images_per_second"]) for row in rows] == [
        row["images_per_second"] for row in content["rows"]
    ]
    assert f"{ratio['ratio']:.2f} in the geometric mean of 1 networks" in done.stdout


def test_our_sides_step_is_that_of_a_run():
    for mode in ("train", "infer"):
        side = worker.build(Spec("ours", mode, "linear", 8, 4, "float32"))
        side.run(3)
        side.check()
        assert side.about["multiply_adds_per_image"] == prod((8, 8, 3, worker.NUM_CLASSES))


def test_a_missing_package_names_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "analysis.speed.torch_peer", raising=False)
    with pytest.raises(UserError, match=r"torch is missing: pip install -e '\.\[parity\]'"):
        worker.build(Spec("torch", "train", "cnn", 8, 4, "float32"))


def test_unknown_names_are_refused_with_the_nearest():
    command = [sys.executable, "-m", "analysis.benchmark", "--peers=tourch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Did you mean 'torch'?" in done.stderr
    with pytest.raises(UserError, match="--modes: 'trian' is not known.* Did you mean 'train'"):
        benchmark.chosen("modes", ["infer", "trian"], benchmark.MODES)


def test_random_weights_are_read_as_pretrained_ones(tmp_path):
    ours.write_weights("mlp", 8, str(tmp_path / "w.safetensors"))
    source = f"archcompare:{tmp_path / 'w.safetensors'}"
    arrays = arrays_of(create_model("mlp", 6, weights=source, image_size=8))
    initial = arrays_of(create_model("mlp", 1000, image_size=8))
    same = [path for path in arrays if arrays[path].shape == initial[path].shape]
    assert len(same) == len(arrays) - 2 > 0  # all but the classifier
    for path in same:
        np.testing.assert_array_equal(arrays[path], initial[path])


@pytest.fixture
def fake_main(tmp_path, monkeypatch):
    """Returns a function: puts other lines in the place of main.py, which know `option(name)`."""

    def put(lines: str) -> None:
        monkeypatch.setattr(commands, "ROOT", tmp_path)
        head = """
            import sys, time
            from pathlib import Path
            options = dict(a.lstrip("-").partition("=")[::2] for a in sys.argv[1:])
            workdir, cache = (Path(options[n]) for n in ("workdir", "config.runtime.cache_dir"))
        """
        (tmp_path / "main.py").write_text(dedent(head) + dedent(lines))

    return put


def test_a_start_ends_with_the_first_line_of_metrics(tmp_path, fake_main):
    fake_main("""
        cache.mkdir(exist_ok=True)
        with open("order", "a") as file:
            file.write(f"{len(list(cache.iterdir()))}\\n")
        (cache / "program").touch()
        (workdir / "cnn" / "seed0").mkdir(parents=True)
        (workdir / "cnn" / "seed0" / "metrics.jsonl").write_text("a line")
        time.sleep(600)
    """)
    empty, filled = commands.start_rows(tmp_path, 2, print)
    assert (tmp_path / "order").read_text().split() == ["0", "1", "0", "1"]
    assert empty["side"] == "ours, empty cache" and len(filled["seconds_of_repeats"]) == 2
    assert empty["seconds"] == pytest.approx(np.median(empty["seconds_of_repeats"]))
    assert "start  cnn   ours, filled cache" in results.durations_of([empty, filled])
    fake_main("sys.exit('no digits')")
    (tmp_path / "other").mkdir()
    (failed,) = commands.start_rows(tmp_path / "other", 1, print)
    assert failed["error"] == "ended with code 1: no digits"


def test_a_probe_keeps_compiled_programs_and_nothing_else(tmp_path, fake_main, monkeypatch):
    fake_main("""
        with open("order", "a") as file:
            file.write(f"{sorted(p.name for p in cache.glob('*'))}\\n")
        for name in ("compiled", "features"):
            (cache / name).mkdir(parents=True, exist_ok=True)
        for seed in options["config.seeds"].split(","):
            (workdir / "resnet50" / f"seed{seed}").mkdir(parents=True)
            (workdir / "resnet50" / f"seed{seed}" / "summary.json").touch()
    """)
    monkeypatch.setattr(commands.Probes, "prepare", lambda self: None)
    probes = commands.Probes(["resnet50"], 8, tmp_path, tmp_path)
    first, again = commands.probe_rows(probes, [], 2, print)
    assert (tmp_path / "order").read_text().split("\n")[:3] == [
        "[]",
        "['compiled']",
        "['compiled']",
    ]
    assert (first["side"], again["side"]) == ("ours, empty cache", "ours")
    assert len(again["seconds_of_repeats"]) == 2 and 0 < again["runs_seconds"] < again["seconds"]
    monkeypatch.setattr(commands.Probes, "keras", lambda *_, **__: {"seconds": 1e6})
    (tmp_path / "other").mkdir()
    rows = commands.probe_rows(replace(probes, folder=tmp_path / "other"), ["keras"], 2, print)
    assert [len(row["seconds_of_repeats"]) for row in rows] == [1, 2, 1]  # a long one is not again
    assert results.ratios_of(rows)[0]["ratio"] == pytest.approx(1e6 / rows[1]["seconds"])


def test_photos_of_a_probe_are_spread_over_those_given(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "PHOTOS", 6)
    for kind in ("cat", "dog"):
        (tmp_path / "given" / "train" / kind).mkdir(parents=True)
        for number in range(9):
            paint(number).save(tmp_path / "given" / "train" / kind / f"{number}.png")
    copied = commands.photos_for(str(tmp_path / "given"), tmp_path / "copied")
    assert sorted(path.parent.name for path in copied.rglob("*.png")) == ["cat"] * 3 + ["dog"] * 3
    drawn = commands.photos_for("", tmp_path / "drawn")
    assert len(list(drawn.rglob("*.jpg"))) == 6
    assert Image.open(next(drawn.rglob("*.jpg"))).size == (200, 150)
    with pytest.raises(UserError, match="a folder for each of several classes"):
        commands.photos_for(str(tmp_path / "given" / "train" / "cat"), tmp_path / "none")
