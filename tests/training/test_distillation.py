import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import log_softmax, softmax

from analysis.runs import load_run
from configs import digits
from data.identity import write_table
from errors import Interrupted, UserError
from experiment.checks import TAUGHT, check_teachers
from experiment.files import read_json, read_lines, write_json
from experiment.grid import Run, check_run_dir, expand
from input_pipeline import load_dataset
from models import create_model
from models.weights.own import WEIGHTS, arrays_of, read_own, write_own
from train import check_run, device_mesh, train_and_evaluate
from training.distillation import TeacherLogits, find_teachers
from training.optimizer import make_optimizer, make_schedule
from training.record import RunRecord
from training.steps import criterion, initial_state, softened, train_step_of
from training.stored_features import StoredOutputs


@pytest.fixture(scope="module")
def taught(tmp_path_factory, cache_dir):
    """Two teachers, on 130 training digits, and a function: the config of a run on these."""
    root = tmp_path_factory.mktemp("teachers")
    all_digits = load_dataset(digits.get_config().data, cache_dir)
    rows, file = np.arange(200), root / "few.npz"
    labels = all_digits.listing.labels[rows]
    np.savez(file, images=all_digits.decoded.images[rows], labels=labels)

    def make(model="linear", seed=0, teacher="", **changes):
        config = digits.get_config(model)
        config.seeds = (seed,)
        given = {
            "epochs": 2,
            "runtime.tensorboard": False,
            "runtime.cache_dir": str(root / "cache"),
        }
        given |= {"data.source": "npz", "data.path": str(file), "distill.teacher": teacher}
        given |= {path.replace("__", "."): value for path, value in changes.items()}
        return expand(config, given)[0].config

    for seed in (0, 1):
        train_and_evaluate(make(seed=seed), root / f"W/linear/seed{seed}")
    return root / "W/linear", make


@pytest.fixture
def alone(taught, tmp_path):
    """A copy of a teacher, to be changed, and a function: the config of a student of it."""
    run_dir = tmp_path / "W/linear/seed0"
    shutil.copytree(taught[0] / "seed0", run_dir)
    return run_dir, lambda model="mlp", **k: taught[1](model, teacher=f"run:{run_dir}", **k)


def logits(run_dir):
    return np.load(run_dir / "predictions_test.npz")["logits"]


def dataset_of(config):
    return load_dataset(config.data, config.runtime.cache_dir)


def answers_of(config, run_dir):
    """The stored logits of the teachers of a run, and how they are made."""
    dataset = dataset_of(config)
    model = create_model("linear", 10, image_size=8)
    record = RunRecord(config, run_dir, dataset, model, device_mesh(), lambda: False)
    return TeacherLogits(record, config, find_teachers(config, dataset)), record.feed("train")


def test_the_loss_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    teachers, student = rng.normal(0, 3, (4, 2, 5)), rng.normal(size=(4, 5))
    targets = rng.dirichlet(np.ones(5), 4)  # as mixup makes them
    soft = softmax(teachers / 3, axis=-1).mean(axis=1)
    distance = (soft * (np.log(soft) - log_softmax(student / 3, axis=-1))).sum(axis=-1)
    given = {"distill.temperature": 3.0, "distill.weight": 0.7, "loss.label_smoothing": 0.1}
    config = expand(digits.get_config("cnn"), given)[0].config
    own = -((0.9 * targets + 0.02) * log_softmax(student, axis=-1)).sum(axis=-1)
    student = jnp.array(student)
    found = criterion(config, student, targets, softened(teachers, 3.0))
    np.testing.assert_allclose(found, 0.3 * own + 0.7 * 9 * distance, rtol=1e-4)
    same = criterion(config, student, targets, softened(student[:, None], 3.0))
    np.testing.assert_allclose(same, 0.3 * own, rtol=1e-4)


def test_a_teacher_sees_the_pixels_that_the_student_sees(taught):
    """Mixed, and each with its own preprocessing, which comes later."""
    config = taught[1](augment__mixup=20.0)
    config.distill.temperature, config.distill.weight = 2.0, 1.0
    model = create_model("linear", 10, image_size=8)  # its logits are 0
    optimizer = make_optimizer(config, make_schedule(config, 4, 8), 1)
    state = initial_state(config, {"params": arrays_of(model), "stats": {}}, optimizer, 0)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(6, dtype=np.int32)
    batch = {"image": images, "label": labels, "mask": np.ones(6, bool)}

    seen = []

    def teach(taught, inputs, batch):
        jax.debug.callback(lambda shown: seen.append(np.asarray(shown)), inputs)
        return inputs.reshape(6, 1, -1)[..., :10] * taught

    step = train_step_of(config, model, optimizer, jnp.ones(10), teach=teach)
    changed = jax.jit(step)(state, batch, jax.random.key(3), 0.1)
    loss = float(changed["metrics"].compute()["loss"])
    (shown,) = seen
    assert np.abs(shown - images).mean() > 5  # mixed with the others, from the last to the first
    np.testing.assert_allclose(shown + shown[::-1], images.astype(float) + images[::-1], atol=1e-3)
    soft = softmax(shown.reshape(6, -1)[:, :10] * 0.1 / 2, axis=-1)
    assert loss == pytest.approx(4 * (soft * np.log(soft * 10)).sum(axis=-1).mean(), rel=1e-4)


def test_stored_logits_are_those_of_every_step(taught, tmp_path):
    folder, make = taught
    teacher = f"run:{folder}/seed0,run:{folder}/seed1"
    found = []
    for limit in (2048.0, 0.0):
        config = make(teacher=teacher, augment_views=2, augment__flip_horizontal=True)
        config.runtime.feature_cache_mb = limit
        summary = train_and_evaluate(config, tmp_path / f"{limit}")
        assert summary["phases"][0]["stored_logits"] == (limit > 0)
        found.append(logits(tmp_path / f"{limit}"))
    np.testing.assert_allclose(*found, atol=1e-3)
    told, plain = summary["distill"], read_json(folder / "seed0/summary.json")
    assert [t["run"] for t in told["teachers"]] == ["linear/seed0", "linear/seed1"]
    assert told == read_json(tmp_path / "0.0" / TAUGHT) and told["weight"] == 0.9
    assert "distill" not in plain and not (folder / "seed0" / TAUGHT).exists()
    for key in ("parameters", "multiply_adds_per_image"):  # the teacher's do not count
        assert plain["cost"][key] == summary["cost"][key]


def test_a_stored_answer_is_the_teachers_own(taught, alone, tmp_path, monkeypatch):
    """Of each view, with the teacher's preprocessing, in the student's order of classes."""
    folder, make = taught
    changes = {"augment_views": 2, "augment__brightness": 0.9}
    answers, feed = answers_of(make(teacher=f"run:{folder}/seed0", **changes), tmp_path)
    stored = np.asarray(answers.features(feed, 2).images)
    assert stored.shape == (2 * len(feed), 1, 10)
    content = read_own(folder / "seed0" / WEIGHTS)
    arrays = content.pop("arrays")
    images = np.asarray(feed.images).astype(np.float32)
    (still, feed), raw = answers_of(make(teacher=f"run:{folder}/seed0"), tmp_path), images / 255
    of_images = np.asarray(still.features(feed, 1).images)[:, 0]
    kernel, bias = (arrays[path] for path in sorted(arrays, reverse=True))
    expected = ((raw - 0.5) / 0.25).reshape(len(raw), -1) @ kernel + bias
    np.testing.assert_allclose(of_images, expected, atol=1e-4)
    assert np.abs(stored[: len(feed), 0] - of_images).max() > 0.1  # brighter or darker

    order = np.roll(np.arange(10), 3)
    content["class_names"] = [content["class_names"][i] for i in order]
    write_own(alone[0] / WEIGHTS, {k: a[..., order] for k, a in arrays.items()}, content)
    counted = []
    plain = StoredOutputs._compute
    monkeypatch.setattr(StoredOutputs, "_compute", lambda *args: counted.append(0) or plain(*args))
    for _ in range(2):  # the second time, no network is run
        others, feed = answers_of(alone[1]("linear"), tmp_path)
        again = np.asarray(others.features(feed, 1).images)[:, 0]
        np.testing.assert_allclose(again, of_images, atol=1e-5)
    assert len(counted) == 1 and "models" not in vars(others)


@pytest.mark.parametrize("changes", [{"augment__flip_vertical": True}, {}])
def test_an_interrupted_student_ends_with_the_same_bits(taught, tmp_path, changes):
    config = taught[1](teacher=f"run:{taught[0]}/seed1", ema_decay=0.9, **changes)
    whole = train_and_evaluate(config, tmp_path / "whole")
    calls = {"left": 0}

    def should_stop():
        calls["left"] -= 1
        return calls["left"] == 0

    for steps in (2, 4):
        calls["left"] = steps
        with pytest.raises(Interrupted):
            train_and_evaluate(config, tmp_path / "parts", should_stop)
    parts = train_and_evaluate(config, tmp_path / "parts")
    assert np.array_equal(logits(tmp_path / "whole"), logits(tmp_path / "parts"))
    assert whole["metrics"] == parts["metrics"]
    lines = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]


def test_a_run_whose_teacher_changed_does_not_go_on(alone, taught, tmp_path):
    run_dir, student = alone
    calls = iter([False, True])
    with pytest.raises(Interrupted):
        train_and_evaluate(student("linear"), tmp_path / "S/linear/seed0", lambda: next(calls))
    shutil.copy(taught[0] / "seed1" / WEIGHTS, run_dir / WEIGHTS)
    with pytest.raises(UserError, match="trained anew since: use another --workdir, or delete"):
        train_and_evaluate(student("linear"), tmp_path / "S/linear/seed0")
    with pytest.raises(UserError, match="trained anew since"):  # nor is another seed begun
        check_run_dir(Run("linear/seed0", student("linear")), tmp_path / "S")
    with pytest.raises(UserError, match="would be its own teacher"):
        train_and_evaluate(student("linear"), run_dir)


def edited(path, **changes):
    write_json(path, read_json(path) | changes)


def refused(config, message):
    with pytest.raises(UserError, match=message):
        check_run(config)


def test_a_teacher_must_be_complete(alone):
    run_dir, student = alone
    check_run(student())
    edited(run_dir / "summary.json", status="pruned")
    refused(student(), r"not the directory of a complete run \(pruned: train it first")
    (run_dir / "summary.json").unlink()
    refused(student(), "not finished: train it first")
    shutil.rmtree(run_dir)
    refused(student(), "seed0 is not the directory of a complete run .no such folder")
    with pytest.raises(UserError, match="no such folder"):
        check_teachers(student())  # as a dry run does, without data


@pytest.mark.parametrize("check", [load_run, lambda path: check_teachers(taught_by(path))])
def test_a_folder_of_runs_or_an_export_is_no_run(taught, tmp_path, check):
    for folder in (taught[0], taught[0].parent):
        with pytest.raises(UserError, match=rf"it holds runs: did you mean {taught[0]}/seed\d\?"):
            check(folder)
    (tmp_path / "model.onnx").touch()
    for export in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(UserError, match="complete run .an export: give its run"):
            check(export)


def taught_by(path):
    return ConfigDict({"distill": {"teacher": f"run:{path}"}})


def test_a_teacher_must_answer_the_same_question(alone):
    run_dir, student = alone
    refused(student(data__image_size=16), "trained on images of 8 pixels, .*student's, of 16")
    refused(student("knn"), r"knn is not trained .*per_model\.knn\.distill\.teacher=''")
    content = read_own(run_dir / WEIGHTS)
    arrays = content.pop("arrays")
    names = [*content["class_names"][:9], "ten"]
    write_own(run_dir / WEIGHTS, arrays, content | {"class_names": names})
    refused(student(), r"are not the 10 of this data \(unknown to it: 9; not here: ten\)")
    write_own(run_dir / WEIGHTS, arrays, content | {"model": "knn"})
    refused(student(), "knn remembers its training images")
    stored = read_json(run_dir / "config.json")
    edited(run_dir / "config.json", loss=stored["loss"] | {"name": "hinge"})
    refused(student(), "trained with loss.name=hinge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "runs/W"}, "'runs/W': expected run:DIR"),
        ({"teacher": "run:a,run:a"}, "several different ones"),
        ({"teacher": "run:a", "loss__name": "hinge"}, "hinge has none"),
        ({"distill__weight": 1.5}, r"distill.weight=1.5 is out of range"),
        ({"distill__temperature": 0.0}, r"distill.temperature=0.0 is out of range"),
    ],
)
def test_impossible_fields_are_named(taught, changes, message):
    with pytest.raises(UserError, match=message):
        taught[1](**changes)


def test_a_teacher_may_not_know_what_judges_the_student(alone, taught, tmp_path):
    run_dir, student = alone
    other = student(data__split_seed=1)
    refused(other, "its workdir no longer knows on which")
    own = dataset_of(student())
    table = own.identity_table
    write_table(table, tmp_path / "W/audit", own.identity)
    known = set(own.ids("train"))
    shared = sum(name in known for name in dataset_of(other).ids("validation"))
    refused(other, rf"{shared} of the student's 30 validation images, such .* are train images")
    moved = table.rename(index=lambda name: f"elsewhere/{name}")  # known by their pixels
    write_table(moved, tmp_path / "W/audit", "f" * 64)
    edited(run_dir / "dataset.json", identity="f" * 64)
    refused(other, rf"{shared} of the student's 30 validation images")
    check_run(student())
    check_run(student(data__train_fraction=0.5))
    edited(run_dir / "dataset.json", identity=own.identity)
    check_run(student(data__train_fraction=0.5))


def test_a_teacher_of_one_fold_does_not_teach_another(taught, alone, tmp_path):
    run_dir, student = alone
    folds = [student(data__folds=2), student(data__folds=2)]
    folds[1].data.fold = 1
    datasets = [dataset_of(config) for config in folds]
    write_table(datasets[0].identity_table, tmp_path / "W/audit", datasets[0].identity)
    edited(run_dir / "dataset.json", identity=datasets[0].identity)
    check_run(folds[0])
    refused(folds[1], "test images, such as .* are (train|validation) images of the teacher")
