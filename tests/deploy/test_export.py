import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss, precision_score, recall_score

from analysis import audit
from analysis.confidence import sets_of_classes, softmax
from analysis.forward import load_test_images
from analysis.predict import load_predictor, predict, predictor_of
from analysis.runs import load_run
from configs import digits
from deploy import card as card_of
from deploy import export, onnx_ops
from deploy.load import load
from deploy.onnx_graph import with_metadata
from errors import UserError
from experiment.files import write_json
from experiment.grid import expand
from input_pipeline import load_dataset
from models import create_model
from models.weights.formats import write_safetensors
from models.weights.own import arrays_of, read_own, write_own
from models.weights.published import PUBLISHED
from tests.conftest import ROOT
from train import train_and_evaluate

MODELS = ("cnn", "linear", "knn")
NAMES = ["zero | 0", "*one*", "été", "<b>", "4", "5", "6", "7", "8", "9"]
BATCH = 16  # no larger than the test part, so that all programs here have the run's own shapes


@pytest.fixture(scope="module")
def workdir(cache_dir, tmp_path_factory):
    """Three models trained on 200 digits of 8x8 pixels, and the audit of those."""
    folder, source = tmp_path_factory.mktemp("runs"), load_digits()
    images = np.round(source.images[:200] * (255 / 16)).astype(np.uint8)
    np.savez(
        folder / "few digits.npz", images=images, labels=source.target[:200], class_names=NAMES
    )
    overrides = {
        "epochs": 2,
        "eval_batch_size": BATCH,
        "runtime.cache_dir": cache_dir,
        "runtime.tensorboard": False,
        "data.source": "npz",
        "data.path": str(folder / "few digits.npz"),
        **{f"augment.{name}": 0.0 for name in ("rotation", "zoom", "shift")},
    }
    for model in MODELS:
        config = digits.get_config(model)
        config.seeds = (0,)
        run_config = expand(config, overrides)[0].config
        train_and_evaluate(run_config, folder / model / "seed0")
    dataset = load_dataset(run_config.data, cache_dir)
    findings = audit.audit_images(dataset.listing, dataset.decoded, ["all"] * 200)
    (folder / "audit").mkdir()
    write_json(folder / "audit/audit.json", findings)
    return folder


@pytest.fixture(scope="module")
def exports(workdir, tmp_path_factory):
    """Each model's exported folder."""
    folder = tmp_path_factory.mktemp("exports")
    for model in MODELS:
        export.export_run(load_run(workdir / model / "seed0"), folder / model)
    return folder


@pytest.fixture
def copied(exports, tmp_path):
    """A copy of the linear model's export, to be damaged."""
    return Path(shutil.copytree(exports / "linear", tmp_path / "copied"))


# --- weights and settings -------------------------------------------------------------------------


def logits_of(model, images):
    """Returns the logits of images, in batches of the run's own shape."""
    batches = np.split(images, range(BATCH, len(images), BATCH))
    program = jax.jit(lambda m, x: m(m.preprocess(x)))
    padded = [np.resize(batch, (BATCH, *batch.shape[1:])) for batch in batches]
    return np.concatenate([program(model, batch) for batch in padded])[: len(images)]


@pytest.mark.parametrize("name", MODELS)
def test_an_export_gives_the_very_logits_that_the_run_saved(workdir, exports, name):
    run, predictor = load_run(workdir / name / "seed0"), load_predictor(exports / name)
    assert len(run.test["labels"]) > BATCH
    logits = logits_of(predictor.model, load_test_images(run))
    np.testing.assert_array_equal(logits, run.test["logits"])


@pytest.mark.parametrize("name", MODELS)
def test_weights_begin_other_models_as_any_weights_do(workdir, exports, name):
    run = load_run(workdir / name / "seed0")
    weights = f"archcompare:{exports / name / 'model.safetensors'}"
    model = create_model(name, 10, weights=weights, image_size=8)
    logits = logits_of(model, load_test_images(run))
    np.testing.assert_array_equal(logits, run.test["logits"])


@pytest.mark.parametrize("name", MODELS)
def test_an_export_knows_what_its_run_knew(workdir, exports, name):
    run, file = load_run(workdir / name / "seed0"), exports / name / "model.safetensors"
    ours, theirs = predictor_of(run), load_predictor(file)
    assert theirs.facts.items() >= ours.facts.items()
    assert theirs.facts["proof"]["batch_sizes"] == [32]  # weights are one program
    assert [t["target"] for t in theirs.facts["review_thresholds"]] == [0.9, 0.95, 0.99]
    assert ours.model.preprocessing == theirs.model.preprocessing
    facts = read_own(file)
    assert facts["model"] == name and facts["class_names"] == NAMES and facts["image_size"] == 8
    assert facts["data"]["resize"] == "squash" and facts["source"] == f"run:{name}/seed0"
    assert facts["versions"]["jax"] == run.environment["packages"]["jax"]
    assert facts["preprocessing"]["mean"] == run.summary["preprocessing"]["mean"]
    assert facts["licence"] == card_of.OWNERS


def test_a_target_out_of_reach_stays_so(workdir, tmp_path):
    run_dir = shutil.copytree(workdir / "linear/seed0", tmp_path / "linear/seed0")
    known = dict(np.load(run_dir / "predictions_validation.npz"))
    known["labels"] = (known["logits"].argmax(axis=1) + 1) % 10  # always wrong
    np.savez(run_dir / "predictions_validation.npz", **known)
    export.export_run(load_run(run_dir), tmp_path / "out")
    assert load_predictor(tmp_path / "out").threshold(0.9) == math.inf
    assert "none promises it: review everything" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_weights_without_thresholds_are_no_export(workdir, tmp_path, name):
    model = load_predictor(workdir / name / "seed0").model
    facts = {"model": name, "fields": {}, "preprocessing": model.preprocessing.to_dict()}
    for path in (workdir / name / "seed0/weights.safetensors", tmp_path / "model.safetensors"):
        if path.parent == tmp_path:  # as older versions exported
            write_own(path, arrays_of(model), facts | {"num_classes": 10})
        with pytest.raises(UserError, match="no review thresholds: .* export the run again"):
            load_predictor(path)


# --- the folder -----------------------------------------------------------------------------------


def test_exporting_again_replaces_and_gives_the_same_bytes(workdir, exports, tmp_path):
    run, out = load_run(workdir / "linear/seed0"), tmp_path / "new/out"
    export.export_run(load_run(workdir / "knn/seed0"), out)
    (out / ".git").mkdir()  # a repository to publish from
    export.export_run(run, out)
    assert {path.name for path in out.iterdir()} == {
        ".git",
        "model.safetensors",
        "README.md",
    }
    for path in (exports / "linear").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


@pytest.mark.parametrize("file, text", [("README.md", "mine"), ("model.safetensors", "[")])
def test_folders_of_others_are_left_alone(workdir, tmp_path, file, text):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=rf"is not empty .* '{file}'"):
        export.export_run(load_run(workdir / "linear/seed0"), tmp_path)
    assert (tmp_path / file).read_text() == text and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="is not a folder"):
        export.export_run(load_run(workdir / "linear/seed0"), tmp_path / file)
    with pytest.raises(UserError, match="cannot write"):
        export.export_run(load_run(workdir / "linear/seed0"), tmp_path / file / "below")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def change(old: bytes, new: bytes):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        change(b"squash", b"aquash"),
        change(b'target\\": 0.95', b'target\\": 0.90'),
        change(b"stages.", b"stagez."),
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
def test_damage_is_found_and_the_file_named(copied, damage):
    file = copied / "model.safetensors"
    before = file.read_bytes()
    load_predictor(copied)
    damage(file)
    assert not file.exists() or file.read_bytes() != before
    with pytest.raises(UserError, match=re.escape(str(file))):
        load_predictor(copied)


# --- the model card -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(exports):
    return (exports / "cnn/README.md").read_text(encoding="utf-8")


def test_the_numbers_in_the_card_are_those_of_the_predictions(workdir, card):
    run = load_run(workdir / "cnn/seed0")
    labels, logits = run.test["labels"], run.test["logits"]
    predicted, count = logits.argmax(axis=1), len(labels)
    right = int((labels == predicted).sum())
    assert 0 < right < count
    z, share = 1.959964, right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    interval = f"{100 * (middle - half):.1f} % to {100 * (middle + half):.1f} %"
    assert f"{100 * share:.1f} % ({right} of {count}; 95 % Wilson interval {interval})" in card
    powers = np.exp(logits.astype(float))
    loss = log_loss(labels, powers / powers.sum(axis=1, keepdims=True), labels=range(10))
    assert f"temperature scaling | {loss:.4f}, " in card
    options = {"labels": range(10), "average": None, "zero_division": 0}
    precision = precision_score(labels, predicted, **options)
    recall = recall_score(labels, predicted, **options)
    for label, name in ((2, "été"), (3, r"\<b\>"), (8, "8")):
        start = f"| {name} | {100 * precision[label]:.1f} % | {100 * recall[label]:.1f} % |"
        line = card[card.index(start) :].partition("\n")[0]
        assert line.endswith(f" {(labels == label).sum()} |")
    macro = f"| **all** | {100 * precision.mean():.1f} % | {100 * recall.mean():.1f} % | |"
    assert macro in card
    assert f"which {100 * recall[np.bincount(labels) > 0].min():.1f} %" in card
    wrong = np.argwhere(labels != predicted)
    pairs = [tuple(sorted((labels[i], predicted[i]))) for (i,) in wrong]
    most = max(pairs.count(pair) for pair in pairs)
    first = re.search(r"in (\d+) test images, the other way round in (\d+)", card)
    assert int(first[1]) + int(first[2]) == most


def test_the_card_tells_of_thresholds_and_sets(workdir, card):
    run = load_run(workdir / "cnn/seed0")
    facts = predictor_of(run).facts
    assert facts["sets"]["images"] == len(run.validation["labels"]) // 2
    for line in ("least that promises the target accuracy", "at most 10.0 %", "Split conformal"):
        assert line in card
    for entry in facts["sets"]["levels"]:
        start = f"| {100 * entry['level']:.1f} % | "
        sets = sets_of_classes(run.test["logits"], facts["sets"], entry["level"])
        if sets is None:
            assert f"{start}too few validation images for a promise | – |" in card
            continue
        held = sets[np.arange(len(sets)), run.test["labels"]].mean()
        assert f"{start}{100 * held:.1f} % | {sets.sum(axis=1).mean():.2f} |" in card
    assert "nan" not in card


def test_a_class_without_test_images_has_no_recall(workdir, tmp_path):
    run_dir = shutil.copytree(workdir / "linear/seed0", tmp_path / "linear/seed0")
    known = dict(np.load(run_dir / "predictions_test.npz"))
    kept = known["labels"] != 2
    np.savez(run_dir / "predictions_test.npz", **{k: v[kept] for k, v in known.items()})
    run = load_run(run_dir)
    text = card_of.model_card(run, predictor_of(run), "x")
    assert re.search(r"\| été \| [\d.–]+( %)? \| – \| – \| – \|", text) and "nan" not in text


def test_confident_errors_are_counted(workdir, card):
    run = load_run(workdir / "cnn/seed0")
    scaled = run.test["logits"].astype(float) / predictor_of(run).facts["temperature"]
    confidence = np.exp(scaled.max(axis=1)) / np.exp(scaled).sum(axis=1)
    wrong = scaled.argmax(axis=1) != run.test["labels"]
    both, sure = (wrong & (confidence >= 0.9)).sum(), (confidence >= 0.9).sum()
    assert f"Confident errors: {both} of the {sure} answers" in card
    assert f"are {100 * both / wrong.sum():.1f} % of all errors" in card


def test_the_card_tells_of_data_training_and_audit(workdir, card):
    run = load_run(workdir / "cnn/seed0")
    assert run.dataset["fingerprint"] in card and "npz few digits.npz" in card
    assert str(workdir) not in card  # paths of this machine tell others nothing
    counts = [sum(run.dataset["counts"][part].values()) for part in ("train", "validation", "test")]
    (totals,) = re.findall(r"\| \*\*all\*\* .*", card)
    assert totals.endswith(" {} | {} | {} |".format(*counts))
    phase = run.summary["phases"][0]
    assert f"| all | all | 2 | {phase['steps']} | {phase['best_validation_loss']:.4f} |" in card
    assert f"{run.summary['cost']['parameters']:,} |" in card
    assert "data audit: 200 images, 10 classes" in card


def test_the_card_is_sound_markdown(exports):
    for name in MODELS:
        text = (exports / name / "README.md").read_text(encoding="utf-8")
        front = re.match(r"---\n(.*?)\n---\n\n# ", text, re.DOTALL)[1]
        assert "license: unknown\n" in front and f"- {name}\n" in front
        assert all(re.fullmatch(r"[\w-]+:( [\w.-]+)?|- [\w-]+", line) for line in front.split("\n"))
        tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        assert len(tables) >= 4
        for table in tables:
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(widths) == 1, table
        assert not re.search(r"\n\n\n|[{}]{2}|{%", text)
        assert ("has those images" in text) == (name == "knn")


def test_without_an_audit_the_card_says_so(workdir, tmp_path):
    run_dir = shutil.copytree(workdir / "linear/seed0", tmp_path / "linear/seed0")
    run = load_run(run_dir)
    assert "was not audited" in card_of.model_card(run, predictor_of(run), "x")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/audit.json").write_text("{")
    with pytest.raises(UserError, match="audit.json"):
        card_of.model_card(run, predictor_of(run), "x")


def test_the_licence_is_that_of_the_first_weights(tmp_path):
    published = next(entry for entry in PUBLISHED.values() if entry.licence == "Apache-2.0")
    assert card_of.licence_of("none") == card_of.OWNERS
    assert card_of.licence_of(published.name) == "Apache-2.0"
    for name, weights in (("a", published.name), ("b", f"run:{tmp_path / 'a'}"), ("c", "none")):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "summary.json", {"weights": weights})
    assert card_of.licence_of(f"run:{tmp_path / 'b'}") == "Apache-2.0"
    assert card_of.licence_of(f"run:{tmp_path / 'c'}") == card_of.OWNERS
    shutil.rmtree(tmp_path / "a")
    folder = tmp_path.name
    assert card_of.licence_of(f"run:{tmp_path / 'b'}") == f"unknown: began from run:{folder}/a"
    file = tmp_path / "w.safetensors"
    for stated, expected in (
        ("MIT", "MIT"),
        ("", f"unknown: began from archcompare:{folder}/w.safetensors"),
    ):
        write_safetensors(file, {}, {"archcompare": json.dumps({"licence": stated})})
        assert card_of.licence_of(f"archcompare:{file}") == expected
    assert card_of.licence_of(f"timm:{file}").startswith("unknown: began from timm:")


def test_a_known_licence_stands_in_the_front_matter(workdir):
    run = load_run(workdir / "linear/seed0")
    made = predictor_of(run)
    made = replace(made, facts=made.facts | {"compute_dtype": "int8"})  # as if compressed
    text = card_of.model_card(run, made, "BSD-3-Clause")
    assert "| trained in | float32 |" in text
    assert "license: bsd-3-clause\n" in text and "Licence of the weights: BSD-3-Clause.\n" in text


# --- using it -------------------------------------------------------------------------------------


def test_the_lines_in_the_card_work_where_neither_run_nor_data_are(
    workdir, exports, card, tmp_path, monkeypatch, capsys
):
    run = load_run(workdir / "cnn/seed0")
    photos, folder = tmp_path / "photos", shutil.copytree(exports / "cnn", tmp_path / "my model")
    photos.mkdir()
    for i, image in enumerate(load_test_images(run)[:5]):
        Image.fromarray(image).save(photos / f"{i}.png")
    files = sorted(map(str, photos.iterdir()))
    expected = list(predict(load_predictor(run.path), files))
    assert list(predict(load_predictor(folder), files)) == expected
    bash, python = re.findall(r"```(?:bash|python)\n(.*?)```", card, re.DOTALL)
    names = {"FOLDER": str(folder), "PHOTOS": str(photos)}
    code = re.sub("FOLDER|PHOTOS", lambda match: names[match[0]], python)
    exec(compile(code, "card", "exec"), {})
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()] == files
    output = tmp_path / "predictions.csv"
    names = {
        "FOLDER": f"'{folder}'",
        "PHOTOS": str(photos),
        "python": sys.executable,
        "predictions.csv": str(output),
    }
    line = re.sub("|".join(names), lambda match: names[match[0]], bash)
    result = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = output.read_text(encoding="utf-8").splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == files


def given(monkeypatch, form="safetensors", probabilities=False, data=""):
    """Sets the flags of the command."""
    flags = {"FORMAT": form, "PROBABILITIES": probabilities, "DATA": data}
    for name, value in flags.items():
        monkeypatch.setattr(export, name, SimpleNamespace(value=value), raising=False)


def test_command_exports_and_refuses(workdir, tmp_path, monkeypatch, capsys):
    given(monkeypatch)
    assert export.main(["", str(workdir / "linear/seed0"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "out") in said and "0 predictions changed" in said
    assert "Of those that the run stored when it was trained, 0 differ" in said
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "model.safetensors"]
    with pytest.raises(UserError, match="usage"):
        export.main(["", "x"])
    with pytest.raises(UserError, match="not the directory of a complete run"):
        export.main(["", str(workdir), str(tmp_path / "other")])
    trial = shutil.copytree(workdir / "linear/seed0", tmp_path / "linear/seed1")
    (trial / "weights.safetensors").unlink()
    shutil.rmtree(trial / "checkpoints", ignore_errors=True)
    with pytest.raises(UserError, match="weights.safetensors is missing: copy it"):
        export.main(["", str(trial), str(tmp_path / "other")])
    summary = json.loads((trial / "summary.json").read_text())
    write_json(trial / "summary.json", summary | {"status": "pruned"})
    with pytest.raises(UserError, match=r"not the directory of a complete run \(pruned"):
        export.main(["", str(trial), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


# --- programs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(workdir, tmp_path_factory):
    """The network in all three forms, in one folder."""
    folder = tmp_path_factory.mktemp("programs") / "cnn"
    for form in export.FORMATS:
        export.export_run(load_run(workdir / "cnn/seed0"), folder, form)
    return folder


@pytest.mark.parametrize("form", ["onnx", "stablehlo"])
def test_a_program_answers_as_the_run_and_says_so(workdir, programs, form):
    run, file = load_run(workdir / "cnn/seed0"), programs / f"model.{form}"
    program, images = load(file), load_test_images(run)
    for count in (1, 3):
        found = program.answer(images[:count])
        np.testing.assert_allclose(found["logits"], run.test["logits"][:count], atol=1e-4)
        assert found["features"].shape == (count, 32) and "probabilities" not in found
    facts, ours = program.facts, predictor_of(run).facts
    assert all(facts[key] == ours[key] for key in ours if key != "compute_dtype")
    assert (facts["format"], facts["run"]) == (form, "cnn/seed0")
    assert facts["dataset"]["fingerprint"] == run.dataset["fingerprint"]
    proof = facts["proof"]
    assert proof["images"] == len(images) and proof["changed_predictions"] == 0
    assert 0 < proof["relative_difference"] < 1e-4 < proof["tolerance"]
    assert proof["stored_changed_predictions"] == 0 and proof["stored_largest_difference"] < 1e-4
    assert program.threshold(0.95) == predictor_of(run).threshold(0.95)
    content = file.read_bytes()
    assert str(ROOT).encode() not in content and str(workdir).encode() not in content
    assert not list(programs.glob(".part*"))


def test_the_lines_in_the_card_work_without_this_project(workdir, programs, tmp_path, capsys):
    run, card = load_run(workdir / "cnn/seed0"), (programs / "README.md").read_text("utf-8")
    Image.fromarray(load_test_images(run)[0]).resize((31, 20)).save(tmp_path / "photo.png")
    (row,) = predict(load_predictor(run.path), [str(tmp_path / "photo.png")])
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3
    for code in blocks[:2]:
        imported = re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
        assert set(imported) <= {"json", "zipfile", "numpy", "onnxruntime", "jax", "PIL"}
        code = code.replace("FOLDER", str(programs)).replace("PHOTO", str(tmp_path / "photo.png"))
        exec(compile(code, "card", "exec"), {})
        name, confidence = capsys.readouterr().out.rsplit(" ", 1)
        assert name == row["class"] and abs(float(confidence) - row["confidence"]) < 1e-4
    for name in ("model.onnx", "model.stablehlo", "model.safetensors"):
        assert re.search(rf"\| {name} \| .* \| {len(run.test['labels'])} test images \|", card)


def test_probabilities_are_those_of_the_fitted_temperature(workdir, tmp_path):
    run = load_run(workdir / "linear/seed0")
    export.export_run(run, tmp_path / "out", "onnx", probabilities=True)
    program, images = load(tmp_path / "out/model.onnx"), load_test_images(run)[:4]
    found = program.answer(images)
    wanted = softmax(found["logits"], program.facts["temperature"])
    assert program.facts["temperature"] != 1
    np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.onnx also\n`probabilities` [B, 10]" in card
    with pytest.raises(UserError, match="--probabilities is of onnx and stablehlo"):
        export.export_run(run, tmp_path / "out", probabilities=True)


def test_a_run_of_bfloat16_is_exported_in_float32_and_says_so(
    workdir, tmp_path, monkeypatch, capsys
):
    run_dir = shutil.copytree(workdir / "linear/seed0", tmp_path / "linear/seed0")
    config = json.loads((run_dir / "config.json").read_text())
    write_json(run_dir / "config.json", config | {"compute_dtype": "bfloat16"})
    stored = read_own(run_dir / "weights.safetensors")
    arrays = stored.pop("arrays")
    write_own(run_dir / "weights.safetensors", arrays, stored | {"compute_dtype": "bfloat16"})
    given(monkeypatch, "onnx")
    assert export.main(["", str(run_dir), str(tmp_path / "out")]) == 0
    assert "bfloat16 in training; the file computes in float32" in capsys.readouterr().out
    assert load(tmp_path / "out").facts["compute_dtype"] == "float32"


@pytest.mark.parametrize("model, dtype", [("linear", "float32"), ("knn", "bfloat16")])
def test_weights_of_another_run_are_noticed(workdir, tmp_path, model, dtype):
    run_dir = shutil.copytree(workdir / model / "seed0", tmp_path / model / "seed0")
    stored = read_own(run_dir / "weights.safetensors")
    arrays = stored.pop("arrays")
    arrays |= {name: array[::-1] for name, array in arrays.items() if array.ndim > 1}
    write_own(run_dir / "weights.safetensors", arrays, stored | {"compute_dtype": dtype})
    with pytest.raises(UserError, match="weights do not give the answers that it stored"):
        export.export_run(load_run(run_dir), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_models_do_not_share_a_folder(workdir, programs, tmp_path):
    folder = shutil.copytree(programs, tmp_path / "cnn")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="is an export of cnn/seed0, and one card cannot tell"):
        export.export_run(load_run(workdir / "linear/seed0"), folder, "onnx")
    compressed, run = tmp_path / "int8", load_run(workdir / "cnn/seed0")
    compressed.mkdir()
    facts = json.dumps(load(folder / "model.onnx").facts | {"method": "int8"})
    content = with_metadata(before["model.onnx"], {"archcompare": facts})
    (compressed / "model.onnx").write_bytes(content)
    for form in ("onnx", "safetensors"):
        with pytest.raises(UserError, match="compress made with --method=int8: name another"):
            export.export_run(run, compressed, form)
    assert (compressed / "model.onnx").read_bytes() == content
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("why", ["wrong", "full"])
@pytest.mark.parametrize("exists", [True, False])
def test_what_fails_leaves_nothing_and_what_was_there(
    workdir, exports, tmp_path, monkeypatch, exists, why
):
    folder, before = tmp_path / "new/out", {}
    if exists:
        shutil.copytree(exports / "linear", folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if why == "wrong":  # a converter that makes a mistake
        adding = onnx_ops.arithmetic("Sub")
        monkeypatch.setitem(onnx_ops.TABLE, "add", adding)
        message = "the exported file answers differently: the largest difference is"
    else:

        def full(path, content):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        message = "cannot export to .* No space left on device"
    with pytest.raises(UserError, match=message):
        export.export_run(load_run(workdir / "linear/seed0"), folder, "onnx")
    assert folder.exists() == folder.parent.exists() == exists
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before


def test_a_missing_extra_is_named_before_anything_is_read(workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed .*'.\[onnx\]'"):
        export.export_run(load_run(workdir / "linear/seed0"), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_images_that_are_gone_are_asked_for(workdir, tmp_path):
    run_dir = shutil.copytree(workdir / "linear/seed0", tmp_path / "linear/seed0")
    config = json.loads((run_dir / "config.json").read_text())
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copy(config["data"]["path"], tmp_path / "moved"))
    config["data"]["path"] = str(tmp_path / "gone.npz")
    write_json(run_dir / "config.json", config)
    with pytest.raises(UserError, match=r"gone.npz[\s\S]*--data=PATH"):
        export.export_run(load_run(run_dir), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export.export_run(load_run(run_dir), tmp_path / "out", data_path=str(moved))
    assert (tmp_path / "out/model.safetensors").exists()
