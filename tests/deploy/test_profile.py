"""How long answers take: what is counted, what is refused, what a table keeps."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.latency import FILE, KEY, read_latencies, version_of
from analysis.predict import decode_image, predictor_of
from analysis.runs import load_run
from analysis.speed import turns
from analysis.speed.turns import Timing
from deploy import profile, profile_worker
from deploy.load import load
from deploy.profile import Plan, percentile, profile_models
from deploy.profile_photos import photos_in, write_photos
from errors import UserError
from experiment.machine import held
from models import create_model
from models.weights.own import arrays_of, read_own, write_own
from tests.analysis.fabricate import CLASSES, write_run
from tests.conftest import paint
from training.weights import save_weights

SIDE = 8
PLAN = Plan([1], [0], ["jax"], seconds=0.1)


@pytest.fixture
def run_dir(tmp_path):
    """A complete run, with the weights of a linear model; its data are gone."""
    folder = write_run(tmp_path / "w", "linear", 0)
    model = create_model("linear", len(CLASSES), image_size=SIDE)
    summary = {"model": {"name": "linear"}, "image_size": SIDE}
    summary["preprocessing"] = model.preprocessing.to_dict()
    config = json.loads((folder / "config.json").read_text())
    config |= {"compute_dtype": "float32", "weights": "none"}
    save_weights(folder, arrays_of(model), config, CLASSES, summary)
    return folder


@pytest.fixture
def measured(monkeypatch):
    """Measures without processes: five calls of a millisecond, or what the list is given."""
    said = []

    def measure(subjects, threads, batch, seconds, say):
        said.append(([(s.run, s.runtime) for s in subjects], threads, batch))
        return [timing() for _ in subjects]

    monkeypatch.setattr(profile, "measure", measure)
    return said


def timing(calls=(0.001,) * 5, cpu=0.001, error=""):
    ready = dict.fromkeys(("import_seconds", "load_seconds", "compile_seconds"), 0.5)
    ready |= {"compiled_seconds": 0.25, "memory": 3e8, "memory_before": 2e8, "device": "cpu"}
    part = {"network": list(calls), "cpu": [cpu], "decode": [0.002] * 5}
    return Timing(ready=ready | {"device_memory": None}, parts=[part, part], error=error)


def test_percentiles_are_numpys_and_too_few_calls_give_none():
    for share, least in ((0.5, 5), (0.9, 29), (0.99, 299)):
        calls = np.random.default_rng(least).exponential(size=least).tolist()
        assert percentile(calls, share) == pytest.approx(1000 * np.percentile(calls, 100 * share))
        assert math.isnan(percentile(calls[1:], share))
    assert math.isnan(percentile([], 0.5))


def test_with_so_many_calls_one_lies_beyond_the_percentile_in_95_of_100_profiles():
    draws = np.random.default_rng(0).random((20000, 299))
    beyond = (draws.max(axis=1) > 0.99).mean()
    assert 0.945 < beyond < 0.956


def test_a_row_tells_everything_of_a_model_in_its_surroundings(run_dir, measured):
    rows, lost, tables = profile_models(
        [str(run_dir)], replace(PLAN, batches=[1, 4], threads=[1, 0])
    )
    assert lost == [] and tables == [run_dir.parents[1] / FILE]
    assert [(row["threads"], row["batch"]) for row in rows] == [(1, 1), (1, 4), (0, 1), (0, 4)]
    row = rows[1]
    assert row["run"] == "linear/seed0" and row["calls"] == 10 and row["p50_ms"] == 1
    assert math.isnan(row["p90_ms"]) and row["images_per_second"] == 4000
    assert row["first_call_ms"] == 500 and row["of_which_compiling_ms"] == 250
    assert row["decode_p50_ms"] == 2
    why = row["decoded"].removeprefix("random JPEG, 8x8, for no test image can be read (")
    assert "\n" not in why and why.endswith("); --photos=FOLDER gives others")
    assert row["memory_mb"] == 300 and math.isnan(row["preprocess_p50_ms"])
    assert row["cores_used"] == pytest.approx(0.2) and row["cpu_ms"] == pytest.approx(0.2)
    assert "jax" in row["versions"]
    assert (
        row["version"] == version_of(load_run(run_dir)) == predictor_of(load_run(run_dir)).version
    )
    stored = read_latencies(tables[0])
    assert stored.p50_ms.tolist() == [1.0] * 4 and set(KEY) < set(stored)
    text = profile.printed(rows)
    assert row["path"] == str(run_dir)
    assert "linear/seed0" in text and "p99" in text and "nan" not in text
    text = profile.printed([row, row | {"run": "out/model.onnx", "decoded": "photos"}])
    assert "Decoded for linear/seed0: random JPEG" in text
    assert "Decoded for out/model.onnx: photos." in text


def test_rows_of_the_same_kind_are_replaced_and_others_kept(run_dir, measured):
    profile_models([str(run_dir)], replace(PLAN, batches=[1, 8]))
    path = run_dir.parents[1] / FILE
    foreign = read_latencies(path).assign(machine="elsewhere", version="0123456789012345")
    pd.concat([read_latencies(path).assign(p50_ms=7.0), foreign]).to_csv(path, index=False)
    profile_models([str(run_dir)], PLAN)
    table = read_latencies(path)
    kinds = table[["batch", "machine", "p50_ms"]].values.tolist()
    here = profile.surroundings()["machine"]
    expected = [[8, here, 7.0], [1, "elsewhere", 1.0], [8, "elsewhere", 1.0], [1, here, 1.0]]
    assert kinds == expected and table.version[1] == "0123456789012345"


def test_a_side_that_fails_is_named_and_the_others_are_kept(run_dir, monkeypatch, tmp_path):
    write_other = write_run(tmp_path / "w", "linear", 1)
    (write_other / "weights.safetensors").write_bytes(
        (run_dir / "weights.safetensors").read_bytes()
    )
    timings = [timing(error="out of memory"), timing(cpu=0.02)]
    monkeypatch.setattr(profile, "measure", lambda *_: timings)
    paths = [str(run_dir), str(write_other), str(run_dir)]
    rows, lost, _ = profile_models(paths, replace(PLAN, threads=[1]))
    assert [row["run"] for row in rows] == ["linear/seed1"]
    assert lost[0] == "not measured: linear/seed0 in jax, batch 1, 1 thread: out of memory"
    assert lost[1].startswith("not limited: linear/seed1 in jax") and "4.00 cores" in lost[1]


def test_mistakes_are_found_before_anything_is_measured(run_dir, measured, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.jpg").write_bytes(b"no JPEG")
    lost = write_run(tmp_path / "w", "mlp", 0, status="diverged")
    cases = [
        ([lost], PLAN, "not the directory of a complete run"),
        ([tmp_path / "w"], PLAN, "not the directory of a complete run"),
        ([run_dir / "weights.safetensors"], PLAN, "give the directory of the run"),
        ([tmp_path / "no.onnx"], PLAN, "does not exist|onnxruntime"),
        ([run_dir], replace(PLAN, photos=str(tmp_path / "none")), "--photos=.*none is no folder"),
        ([run_dir], replace(PLAN, photos=str(tmp_path / "empty")), "holds no image"),
        ([run_dir], replace(PLAN, photos=str(tmp_path / "broken")), "none of the images"),
        ([run_dir], replace(PLAN, output=str(tmp_path / "file/x.csv")), "cannot write"),
        ([run_dir], replace(PLAN, output=str(tmp_path / "empty")), "cannot be read"),
        ([run_dir], replace(PLAN, output=str(tmp_path / "file")), "no table of deploy.profile"),
    ]
    for paths, plan, message in cases:
        with pytest.raises(UserError, match=message):
            profile_models([str(path) for path in paths], plan)
    assert measured == [] and (tmp_path / "file").read_text() == "x"


def test_two_models_of_one_name_are_refused_and_one_that_is_given_twice_is_one(run_dir, measured):
    twin = run_dir.parents[2] / "v/linear/seed0"
    shutil.copytree(run_dir, twin)
    (link := run_dir.parents[2] / "link").symlink_to(run_dir)
    assert len(profile_models([str(run_dir), str(link)], PLAN)[0]) == 1
    both = [str(run_dir), str(twin)]
    assert len(profile_models(both, PLAN)[2]) == 2  # a table in each workdir
    with pytest.raises(UserError, match="two models called linear/seed0"):
        profile_models(both, replace(PLAN, output=str(run_dir.parents[2] / "all.csv")))


def test_rows_of_another_model_of_the_same_name_are_not_replaced(run_dir, measured, tmp_path):
    twin = shutil.copytree(run_dir, tmp_path / "v/linear/seed0")
    output = tmp_path / "all.csv"
    plan = replace(PLAN, output=str(output))
    profile_models([str(run_dir)], plan)
    profile_models([str(twin)], plan)  # the same weights: it may have been moved
    retrain(twin)
    profile_models([str(twin)], plan)  # the same place: it was trained again
    before = output.read_bytes()
    with pytest.raises(UserError, match=r"all.csv holds another model called linear/seed0 \(.*/v/"):
        profile_models([str(run_dir)], plan)
    assert output.read_bytes() == before and len(read_latencies(output)) == 1
    retrain(run_dir)
    for _ in range(2):  # in its own table a moved workdir may hold paths of before
        own = profile_models([str(run_dir)], PLAN)[2][0]
        read_latencies(own).assign(path="elsewhere", version="0").to_csv(own, index=False)
    assert len(read_latencies(own)) == 1


def retrain(run_dir):
    """Changes the weights, and so the version."""
    file = run_dir / "weights.safetensors"
    file.write_bytes(file.read_bytes() + b" ")


def test_a_table_is_written_by_one_process_at_a_time(run_dir, measured, monkeypatch):
    """A row that comes while another process holds the table is not lost."""
    own, inside = profile_models([str(run_dir)], PLAN)[2][0], []
    monkeypatch.setattr(
        profile, "read_latencies", lambda path: inside.append(held(lock)) or read_latencies(path)
    )
    lock = own.with_name(f".{own.name}.lock")
    profile.store(own, [read_latencies(own).iloc[0].to_dict()])
    assert inside == [True] and not held(lock)


def test_options_are_checked():
    assert profile.numbers("batches", ["8", "1", "8"], 1) == [8, 1]
    for texts in (["0"], ["x"], [], ["-1"], ["1.5"]):
        with pytest.raises(UserError, match="--batches=.*: give whole numbers, 1 or more"):
            profile.numbers("batches", texts, 1)
    with pytest.raises(UserError, match="from 0 to 2"):
        profile.numbers("threads", ["3"], 0, 2)
    assert profile.chosen_runtimes(["jax", "jax"]) == ["jax"]
    assert "jax" in profile.chosen_runtimes([])
    with pytest.raises(UserError, match="--runtime: 'torch' is not known"):
        profile.chosen_runtimes(["torch"])


def test_a_missing_runtime_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(profile.RUNTIMES, "onnx", "no_such_package_at_all")
    assert profile.chosen_runtimes([]) == ["jax"]
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[onnx\]'"):
        profile.chosen_runtimes(["onnx"])


def test_photos_are_those_of_the_test_part_or_of_a_folder(run_dir, tmp_path):
    run = load_run(run_dir)
    facts = {"data": run.config["data"], "image_size": SIDE}
    root = tmp_path / "photos"
    for part in ("train", "test"):
        for name in ("a", "b"):
            (folder := root / part / name).mkdir(parents=True)
            for i in range(2):
                paint(i, (20 + i, 30)).save(folder / f"{part}{i}.png")
    (root / "test/b/test1.png").write_bytes(b"broken")
    known = dict(np.load(run_dir / "predictions_test.npz"))
    known["ids"] = np.array([f"test/{x}/test{i}.png" for x in "ab" for i in (0, 1)])
    np.savez(run_dir / "predictions_test.npz", **known)
    config = json.loads((run_dir / "config.json").read_text())
    config["data"]["path"] = str(root)
    (run_dir / "config.json").write_text(json.dumps(config))
    folder, what = write_photos(tmp_path / "of run", facts, load_run(run_dir), [])
    files = [root / f"test/{x}.png" for x in ("a/test0", "a/test1", "b/test0")]
    assert what == "the run's test images"  # as they lie there
    assert [f.read_bytes() for f in sorted(folder.iterdir())] == [f.read_bytes() for f in files]
    given = photos_in(str(root / "train"))
    folder, what = write_photos(tmp_path / "given", facts, load_run(run_dir), given)
    assert what == "photos of --photos" and len(list(folder.iterdir())) == 4
    folder, what = write_photos(tmp_path / "random", facts, None, [])
    image = decode_image(facts, next(folder.iterdir()).read_bytes())
    assert (
        what.startswith("random JPEG, 8x8, for a file has no photos; --photos")
        and np.ptp(image) > 100
    )


def test_a_worker_times_each_call_of_each_part(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_worker, "limit_to", lambda cores: None)  # of this very process
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    (folder := tmp_path / "only").mkdir()
    (tmp_path / "0.png").rename(folder / "0.png")
    spec = {"path": str(run_dir), "threads": 0, "batch": 3, "photos": str(folder), "seconds": 0.01}
    said = []
    profile_worker.serve(spec, said.append, ['{"steps": 4}', '{"steps": 2}'])
    ready, *answers = said
    assert ready["ready"]["steps"] >= 1 and ready["ready"]["device"] == "cpu"
    assert 0 < ready["ready"]["compiled_seconds"] <= ready["ready"]["compile_seconds"]
    assert [len(answer["parts"]["network"]) for answer in answers] == [4, 2]
    for answer in answers:
        assert {"network", "cpu", "decode", "preprocess"} == answer["parts"].keys()
        assert min(min(times) for times in answer["parts"].values()) >= 0
        assert answer["seconds"] == sum(answer["parts"]["network"])


def test_a_run_becomes_onnx_with_its_preprocessing_apart(run_dir, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    (folder := tmp_path / "0").mkdir()
    (again := tmp_path / "1").mkdir()
    run, onnx = profile.subjects_of(run_dir, ["jax", "onnx"], [], folder)
    assert profile.converted(run) == run
    onnx = profile.converted(onnx)
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    expected, found = predictor_of(load_run(run_dir)), load(onnx.path)
    for key, value in expected.answer(images).items():
        np.testing.assert_allclose(found.answer(images)[key], value, atol=1e-5)
    pixels = load(onnx.preprocess).answer(images)["pixels"]
    np.testing.assert_allclose(pixels, expected.model.preprocess(images), atol=1e-5)
    assert onnx.version == run.version == expected.version  # by which the report knows it
    assert onnx.source == run.path == run_dir
    (own,) = profile.subjects_of(onnx.path, ["jax", "onnx"], [], tmp_path)
    assert own.runtime == "onnx" and own.table == folder / "latency.csv"
    assert own.run == "0/model.onnx"  # files of two folders have two names
    known, model = load(onnx.path), profile.load
    known = replace(known, facts=known.facts | {"method": "int8"})
    monkeypatch.setattr(profile, "load", lambda _: known)
    (own,) = profile.subjects_of(onnx.path, ["onnx"], [], again)
    assert own.run == "0/model.onnx (int8)" and own.model == "linear (int8)"
    monkeypatch.setattr(profile, "load", model)
    with pytest.raises(UserError, match="runs in onnx, which --runtime leaves out"):
        profile.subjects_of(onnx.path, ["jax"], [], tmp_path)


def test_onnx_is_proven_in_float32_before_it_is_measured(run_dir, measured, monkeypatch):
    pytest.importorskip("onnxruntime")
    from deploy import onnx_convert

    facts = read_own(file := run_dir / "weights.safetensors")
    arrays = arrays_of(predictor_of(load_run(run_dir)).model)
    del facts["arrays"]
    write_own(file, arrays, facts | {"compute_dtype": "bfloat16"})
    plan = replace(PLAN, runtimes=["onnx"])
    rows, lost, _ = profile_models([str(run_dir)], plan)
    assert lost == [] and len(rows) == 1
    to_onnx = onnx_convert.to_onnx

    def wrong(function, side):
        return to_onnx(lambda x: {key: 1.01 * value for key, value in function(x).items()}, side)

    monkeypatch.setattr(onnx_convert, "to_onnx", wrong)
    rows, lost, tables = profile_models([str(run_dir)], plan)
    assert rows == [] and tables == []
    assert lost[0].startswith("not measured: linear/seed0 in onnx: the exported file answers diff")


def test_what_onnx_has_no_form_for_is_named_and_the_rest_measured(run_dir, measured, monkeypatch):
    def refuse(subject):
        if subject.runtime == "onnx":
            raise UserError("ONNX: the operation fft cannot be written")
        return subject

    monkeypatch.setattr(profile, "converted", refuse)
    rows, lost, _ = profile_models([str(run_dir)], replace(PLAN, runtimes=["onnx", "jax"]))
    assert [row["runtime"] for row in rows] == ["jax"]
    assert lost == ["not measured: linear/seed0 in onnx: ONNX: the operation fft cannot be written"]


def test_calls_end_after_a_number_or_a_time():
    assert len(profile_worker.calls(lambda: None, 7)) == 7
    assert len(profile_worker.calls(lambda: None, 7, seconds=0)) == 1


def test_one_thread_is_one_core(run_dir, monkeypatch, capsys):
    """The whole way, in a process of its own."""
    monkeypatch.setattr(turns, "SETTLE", 0.0)
    rows, lost, tables = profile_models([str(run_dir)], replace(PLAN, threads=[1]))
    assert lost == []  # it kept no more than one core busy
    assert "1 jax linear seed0: starts" in capsys.readouterr().err  # compiling may take minutes
    (row,) = rows
    assert row["calls"] >= 5 and row["p50_ms"] > 0 and row["preprocess_p50_ms"] > 0
    assert 0 < row["of_which_compiling_ms"] <= row["first_call_ms"]
    assert row["memory_before_mb"] < row["memory_mb"]
    assert len(read_latencies(Path(tables[0]))) == 1
