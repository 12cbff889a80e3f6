"""Compressed models: what they are, what they answer, and what is said of them."""

import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from sklearn.datasets import load_digits

from analysis.compression import read_rows
from analysis.confidence import fit_sets, fit_temperature
from analysis.forward import load_data, load_images
from analysis.predict import predictor_of
from analysis.runs import load_run
from deploy import compress
from deploy.compress import METHODS
from deploy.load import load
from deploy.proof import answered
from deploy.quantization import compress as compress_file
from errors import UserError
from models.weights.own import arrays_of, read_own, write_own
from tests.analysis.fabricate import train_digits

INT8, FLOAT = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def workdir(cache_dir, tmp_path_factory):
    """A CNN trained on 600 digits of 8x8 pixels for three epochs."""
    folder, source = tmp_path_factory.mktemp("runs"), load_digits()
    images = np.round(source.images[:600] * (255 / 16)).astype(np.uint8)
    np.savez(folder / "few.npz", images=images, labels=source.target[:600])
    data = {"data__source": "npz", "data__path": str(folder / "few.npz")}
    return train_digits(folder, cache_dir, "cnn", "none", epochs=3, **data)


@pytest.fixture(autouse=True, scope="module")
def quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "ROUNDS", 3)
        patch.setattr(compress, "SETTLE", 0.0)
        patch.setattr("analysis.costs.SECONDS", 0.01)
        yield


@pytest.fixture
def run(workdir):
    return load_run(workdir / "cnn/seed0")


@pytest.fixture(scope="module")
def written(workdir, tmp_path_factory):
    """The folder and the row of each method."""
    folder, run = tmp_path_factory.mktemp("out"), load_run(workdir / "cnn/seed0")
    return folder, {m: compress.compress_run(run, folder / m, m, calibration=64) for m in METHODS}


@pytest.mark.parametrize(
    "method, least", [("int8", 3), ("int8_dynamic", 3), ("float16", 1.8), ("bfloat16", 1.8)]
)
def test_a_compressed_model_is_smaller_and_answers_as_it_says(run, written, method, least):
    folder, row = written[0] / method, written[1][method]
    file, predictor = folder / "model.onnx", load(folder)
    assert file.stat().st_size == row["bytes_after"] < row["bytes_before"] / least
    size, parts = 1 if method == "int8_dynamic" else 64, ("test", "validation")
    test, validation = (answered(predictor.answer, load_images(run, p), size) for p in parts)
    assert (test["logits"].argmax(axis=1) == run.test["labels"]).mean() == row["accuracy_after"]
    changed = (test["logits"].argmax(axis=1) != run.predicted).sum()
    assert row["changed"] == changed < 0.05 * len(run.predicted)
    own = answered(predictor_of(run).answer, load_images(run, "test"), 64)["features"]
    for ours, theirs in zip(own.T, test["features"].T, strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] > 0.99
    facts, labels = predictor.facts, run.validation["labels"]
    assert facts["method"] == method and facts["format"] == "onnx"
    assert facts["proof"].items() >= row.items()
    assert facts["proof"]["images"] == len(run.predicted)
    assert facts["temperature"] == fit_temperature(validation["logits"], labels)
    assert facts["sets"] == fit_sets(validation["logits"], labels)
    assert [entry["target"] for entry in facts["review_thresholds"]] == [0.9, 0.95, 0.99]


def test_int8_computes_in_integers_from_calibration_on_training_images(written):
    model = onnx.load(written[0] / "int8/model.onnx")
    kinds = {array.name: array.data_type for array in model.graph.initializer}
    of = {output: node for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    in_float = [node.output[0] for node in products if node.input[1] in kinds]
    assert in_float == ["logits"] and len(products) == 5  # two convolutions, features, two dense
    for node in products:
        if node.output[0] != "logits":
            assert kinds[of[node.input[1]].input[0]] == INT8
            assert of[node.input[0]].op_type == "DequantizeLinear"
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert written[1]["int8"]["calibration_images"] == pytest.approx(64, abs=2)


def test_calibration_images_are_a_stratified_sample_of_the_training_part(run):
    dataset = load_data(run)
    images = compress.calibration_images(dataset, 60)
    train = {image.tobytes(): label for image, label in zip(dataset.images("train"), dataset.labels("train"), strict=True)}  # fmt: skip
    labels = [train[image.tobytes()] for image in images]
    share = np.bincount(dataset.labels("train")) / len(dataset.labels("train"))
    assert np.abs(np.bincount(labels, minlength=10) - share * len(images)).max() <= 1
    np.testing.assert_array_equal(images, compress.calibration_images(dataset, 60))


def test_a_row_says_what_processors_did_and_a_busy_machine_is_named(written):
    row = written[1]["int8"]
    assert 0 < row["cores_had"] <= 1 and row["onnxruntime"] and row["date"][:2] == "20"
    assert row["ms_after_batch1_threads1_cpu"] > 0 and row["ms_before_batch32_threads_all_cpu"] > 0
    quiet, loud = (compress.describe(row | {"cores_had": share}) for share in (0.97, 0.4))
    assert "was busy" not in quiet and "calls had 40 % of the cores" in loud
    assert "; of processors: " in quiet and "McNemar" in quiet
    assert "McNemar" not in compress.describe(row | {"p": math.nan})


def test_calls_count_what_others_take_from_them():
    before, used = compress.clocks(), []
    answer = compress.counted(lambda images: {"sum": np.sort(images)}, np.arange(10**6), used)
    wall, cpu, waited = compress.clocks() - before
    assert len(answer["sum"]) == 10**6 and 0 < used[0] <= cpu + 1e-6
    assert math.isnan(waited) or waited >= 0


def test_rows_are_replaced_by_run_and_method(run, written, tmp_path):
    rows = read_rows(run.path.parents[1])
    assert sorted(rows.method) == sorted(METHODS) and set(rows.run) == {"cnn/seed0"}
    for number in (1, 2):
        compress.write_row(tmp_path, written[1]["int8"] | {"changed": number})
    compress.write_row(tmp_path, written[1]["float16"])
    rows = read_rows(tmp_path)
    assert list(rows.method) == ["int8", "float16"] and rows.changed[0] == 2


def test_a_loss_of_accuracy_is_shown(run, tmp_path):
    """Tiny weights before huge ones: the same function, of which float16 leaves nothing."""
    copy = shutil.copytree(run.path, tmp_path / "runs/cnn/seed0")
    file = copy / "weights.safetensors"
    facts, arrays = read_own(file), arrays_of(predictor_of(run).model)
    del facts["arrays"]
    for name, factor in (("stages.0.layers.0.kernel", 1e-9), ("stages.0.layers.0.bias", 1e-9), ("stages.1.layers.0.kernel", 1e9)):  # fmt: skip
        arrays[name] = arrays[name] * np.float32(factor)
    write_own(file, arrays, facts)
    row = compress.compress_run(load_run(copy), tmp_path / "out", "float16")
    assert row["accuracy_after"] < 0.3 < row["accuracy_before"] and row["established"]
    for text in (compress.describe(row), (tmp_path / "out/README.md").read_text()):
        assert "a loss is established" in text and "times smaller" in text
    assert row["accuracy_before"] == run.correct.mean()


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_named_before_compute_and_leave_nothing(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(compress, "export_run", None)  # nothing comes so far
    with pytest.raises(UserError, match="--method"):
        compress.compress_run(run, out, "int4")
    with pytest.raises(UserError, match="not the directory of a complete run"):
        compress.main(["", str(tmp_path / "none"), str(out)])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(UserError, match=r"onnxruntime is not installed .*\[onnx\]"):
            compress.compress_run(run, out, "int8")
    gone = replace(run, config=json.loads(json.dumps(run.config)))
    gone.config["data"] |= {"source": "folder", "path": str(tmp_path / "gone")}
    with pytest.raises(UserError, match="(?s)needs the run's images.*gone.* --data=PATH"):
        compress.compress_run(gone, out, "int8")

    def read_only(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(compress, "data_of", None)  # nor does it come so far
    monkeypatch.setattr(compress.tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match="cannot write to .*compression.csv: read-only"):
        compress.compress_run(run, out, "int8")
    assert not out.exists()


@pytest.mark.parametrize("file", ["notes.txt", "model.onnx", "model.safetensors"])
def test_folders_of_others_are_left_alone(run, tmp_path, file):
    (tmp_path / file).write_text("mine")
    with pytest.raises(UserError, match=f"not empty .*{file}.* name a new folder"):
        compress.compress_run(run, tmp_path, "int8")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_only_the_same_run_as_the_same_method_is_replaced(run, written, tmp_path):
    folder = shutil.copytree(written[0] / "float16", tmp_path / "out")
    (folder / "latency.csv").write_text("of deploy.profile")
    compress.check_folder(folder, "float16", run)
    other = shutil.copytree(run.path, tmp_path / "runs/mlp/seed1")
    again = shutil.copytree(run.path, tmp_path / "again/cnn/seed0")
    for path in (other, again):
        (path / "weights.safetensors").write_bytes(b"others")
    for one, method, why in (
        (run, "int8", "cnn/seed0 as float16, and"),
        (load_run(other), "float16", "cnn/seed0 as float16"),
        (load_run(again), "float16", "as float16 as it was trained before or elsewhere, and"),
    ):
        with pytest.raises(UserError, match=f"model.onnx is .*{why}.* would be replaced"):
            compress.compress_run(one, folder, method)
    (folder / "README.md").write_text("mine")
    (folder / "model.onnx").unlink()
    with pytest.raises(UserError, match="no earlier result of deploy.compress .*README.md"):
        compress.check_folder(folder, "float16", run)


def test_only_what_cannot_be_written_is_called_so(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(compress, "calibration_images", refuse)
        with pytest.raises(UserError, match="cannot read the images of .*the disk is gone"):
            compress.compress_run(run, tmp_path / "out", "int8")
    for name in ("export_run", "make_smaller"):
        monkeypatch.setattr(compress, name, lambda *_, **__: None)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "measure", refuse)
        with pytest.raises(UserError, match="cannot read the images of .*the disk is gone"):
            compress.compress_run(run, tmp_path / "out", "float16")
    monkeypatch.setattr(compress, "measure", lambda *_: ({}, run))
    monkeypatch.setattr(compress, "write_facts", refuse)
    with pytest.raises(UserError, match="cannot write to .*out: the disk is gone"):
        compress.compress_run(run, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights_cannot_be_compressed(tmp_path):
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=FLOAT),
        helper.make_node("ReduceMean", ["x"], ["logits"], keepdims=0),
    ]
    taken = helper.make_tensor_value_info("images", kinds.UINT8, ["B", 4, 4, 3])
    graph = helper.make_graph(
        nodes, "g", [taken], [helper.make_tensor_value_info("logits", FLOAT, [])]
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "a.onnx")
    images = np.zeros((8, 4, 4, 3), np.uint8)
    for method, why in (
        ("int8", "no convolution and no matrix"),
        ("float16", "no weights"),
    ):
        with pytest.raises(UserError, match=why):
            compress_file(tmp_path / "a.onnx", tmp_path / "b.onnx", method, images)
