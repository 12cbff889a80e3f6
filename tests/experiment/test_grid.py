import json

import pytest
from ml_collections import ConfigDict

from configs import ablation, base, cifar10, digits, folder, intel, transfer
from errors import UserError, choose
from experiment.fields import (
    PHASE_FIELDS,
    Text,
    first_trained_stage,
    flatten,
    phase_config,
    stored_config,
)
from experiment.files import read_json
from experiment.grid import Run, check_folds, check_run_dir, expand, shard
from models import MODELS


def small(**changes) -> ConfigDict:
    config = base.get_config("linear,cnn")
    config.data.source, config.seeds = "digits", (0, 1)
    config.update(changes)
    return config


def test_choose_suggests_the_nearest():
    assert choose("model", "cnn", ["cnn", "mlp"]) == "cnn"
    with pytest.raises(UserError, match="Did you mean 'cnn'"):
        choose("model", "cmn", ["cnn", "mlp"])


SMALL = {"linear", "knn", "mlp", "cnn", "cnn_deep"}
LARGE = {"efficientnet_lite0", "vgg16", "resnet50", "efficientnet_b0"}


@pytest.mark.parametrize(
    ("module", "models"),
    [(base, SMALL), (digits, SMALL), (intel, SMALL | LARGE), (cifar10, SMALL), (folder, SMALL)],
)
def test_every_config_expands_to_its_models_and_to_any(module, models):
    config = module.get_config()
    config.data.path = config.data.path or "somewhere"
    runs = expand(config)
    assert {run.config.model.name for run in runs} == models
    assert len(runs) == len(models) * len(config.seeds)
    every = expand(module_with(module, ",".join(MODELS)))
    assert {run.config.model.name for run in every} == set(MODELS)


def test_models_with_weights_are_fine_tuned_in_two_phases():
    config = module_with(intel, "cnn,resnet50")
    runs = {run.config.model.name: run.config for run in expand(config)}
    assert (runs["cnn"].weights, runs["cnn"].phases) == ("none", "all")
    assert (runs["resnet50"].weights, runs["resnet50"].phases) == (
        "timm/resnet50.tv_in1k", "head,tune"
    )  # fmt: skip
    assert set(runs["resnet50"].phase) == {"head", "tune"}
    assert phase_config(runs["resnet50"], "tune").batch_norm == "running"
    scratch = expand(config, {"weights": "none"})
    assert {run.config.phases for run in scratch} == {"all"}
    probe = expand(config, {"per_model.resnet50.phases": "head"})[-1].config
    assert set(probe.phase) == {"head"}


def test_the_command_line_wins_over_phases_unless_it_names_one():
    overrides = {"optimizer.learning_rate": 0.5, "phase.tune.epochs": 3, "epochs": 7}
    run = expand(module_with(intel, "resnet50"), overrides)[0].config
    head, tune = (phase_config(run, name) for name in ("head", "tune"))
    assert head.optimizer.learning_rate == tune.optimizer.learning_rate == 0.5
    assert (head.epochs, tune.epochs) == (7, 3)
    swept = module_with(intel, "resnet50")
    swept.sweep = "phase.tune.train=last:2,all"
    assert {phase_config(r.config, "tune").train for r in expand(swept)} == {"last:2", "all"}


def test_the_ablation_has_a_variant_for_each_mistake():
    runs = [run for run in expand(module_with(ablation, "")) if run.config.seed == 0]
    by_variant = {run.config.variant: run.config for run in runs}
    frozen = {"frozen", "frozen_pixels", "frozen_twice"}
    assert set(by_variant) == {"right", "pixels", "batch_norm", "rate", "all_three"} | frozen
    assert by_variant["pixels"].preprocessing == by_variant["frozen_pixels"].preprocessing == "unit"
    assert all(by_variant[name].phases == "head" for name in frozen)
    assert phase_config(by_variant["batch_norm"], "tune").batch_norm == "batch"
    tuned = {name: by_variant[name] for name in set(by_variant) - frozen}
    rates = {k: phase_config(v, "tune").optimizer.learning_rate for k, v in tuned.items()}
    assert rates["rate"] == rates["all_three"] == 20 * rates["right"]
    names = {f"efficientnet_lite0/seed0_{name}" for name in ("right", "all_three", "frozen")}
    assert {run.name for run in runs} >= names


def test_transfer_takes_the_first_published_weights_and_the_same_network_without():
    runs = expand(module_with(transfer, ""))
    assert {(run.config.weights, run.config.phases) for run in runs} == {
        ("package/efficientnet_lite0.in1k", "head,tune")
    }
    assert phase_config(runs[0].config, "tune").train == "last:6"
    runs = expand(module_with(transfer, "resnet18,scratch"))
    assert {(run.config.variant, run.config.weights, run.config.phases) for run in runs} == {
        ("pretrained", "timm/resnet18.tv_in1k", "head,tune"),
        ("scratch", "none", "all"),
    }
    assert phase_config(runs[0].config, "tune").train == "last:3"
    with pytest.raises(UserError, match="cnn: no weights are published for it"):
        transfer.get_config("cnn,scratch")
    alone = expand(module_with(transfer, "scratch"))
    assert {run.config.model.name for run in alone} == {"efficientnet_lite0"}


def test_first_trained_stage():
    assert [first_trained_stage(t, 6) for t in ("head", "last:2", "last:6", "all")] == [5, 4, 0, 0]
    for wrong in ("last:7", "last:0", "tail", ""):
        with pytest.raises(UserError, match="last:N with N from 1 to 6"):
            first_trained_stage(wrong, 6)


def module_with(module, models):
    config = module.get_config(models)
    config.data.path = config.data.path or "somewhere"
    return config


def test_names_and_order_of_a_grid():
    runs = expand(small())
    assert [run.name for run in runs] == ["linear/seed0", "linear/seed1", "cnn/seed0", "cnn/seed1"]
    assert [run.config.seed for run in runs] == [0, 1, 0, 1]
    assert not {"models", "seeds", "sweep", "per_model"} & set(runs[0].config)


def test_sweep_multiplies_the_grid_and_names_its_points():
    runs = expand(small(sweep="optimizer.learning_rate=0.1,0.01; optimizer.name=sgd,adam"))
    assert len(runs) == 2 * 4 * 2
    names = [run.name for run in runs]
    assert names[0] == "linear/seed0_learning_rate=0.1_name=sgd"
    by_name = dict(zip(names, runs, strict=True))
    chosen = by_name["cnn/seed1_learning_rate=0.01_name=adam"].config
    assert (chosen.optimizer.learning_rate, chosen.optimizer.name) == (0.01, "adam")
    assert chosen.variant == "learning_rate=0.01, name=adam"


def test_the_command_line_wins_over_the_files_per_model_settings():
    config = small()
    config.per_model.cnn.optimizer = {"learning_rate": 0.5}
    rate = lambda runs: {r.config.model.name: r.config.optimizer.learning_rate for r in runs}  # noqa: E731
    assert rate(expand(config)) == {"linear": 1e-3, "cnn": 0.5}
    config.optimizer.learning_rate = 0.2
    assert rate(expand(config, {"optimizer.learning_rate": 0.2})) == {"linear": 0.2, "cnn": 0.2}
    overrides = {"per_model.cnn.optimizer.learning_rate": 0.7, "optimizer.learning_rate": 0.2}
    assert rate(expand(config, overrides)) == {"linear": 0.2, "cnn": 0.7}


OPEN = {  # typed, and what becomes of it
    "per_model.cnn.optimizer.learning_rate=0.01": 0.01,
    "per_model.cnn.epochs=3": 3,
    "per_model.cnn.data.exclude_leaks=true": True,
    "per_model.cnn.data.split=(0.8, 0.2)": (0.8, 0.2),
    "per_model.cnn.augment.crop_area=[0.5, 1]": (0.5, 1),
    "per_model.cnn.loss.class_weights=1,2": "1,2",
    "per_model.cnn.weights=run:a=b": "run:a=b",
    "per_model.mlp.model.hidden=64": (64,),
    "model.dropout=0.5": 0.5,
    "per_model.resnet50.model.form=keras": "keras",
}


@pytest.mark.parametrize("typed", OPEN)
def test_a_field_of_one_model_is_read_by_its_type(typed):
    path, _, text = typed.partition("=")
    name = path.split(".")[1] if path.startswith("per_model") else "cnn"
    models = {"linear", name} if path.startswith("per_model") else {name}
    runs = expand(small(models=tuple(models)), {path: Text(text)})
    field = path.removeprefix(f"per_model.{name}.")
    found = {run.config.model.name: flatten(run.config).get(field) for run in runs}
    assert found[name] == OPEN[typed] and type(found[name]) is type(OPEN[typed])
    assert found.get("linear") != OPEN[typed]


def test_every_field_can_be_typed_for_one_model_and_in_a_phase():
    for path, value in flatten(expand(small())[0].config).items():
        if path in ("seed", "variant", "model.name", "phases") or path.startswith("phase."):
            continue
        for prefix in ("per_model.cnn.", "phase.all."):
            if prefix == "phase.all." and path.split(".")[0] not in PHASE_FIELDS:
                continue
            run = expand(small(), {prefix + path: Text(str(value))})[-1].config
            config = run if prefix == "per_model.cnn." else phase_config(run, "all")
            assert flatten(config)[path] == value and type(flatten(config)[path]) is type(value)


def test_a_phase_may_be_made_up():
    overrides = {
        "phases": "head,polish",
        "phase.polish.train": Text("last:2"),
        "per_model.cnn.phase.polish.optimizer.learning_rate": Text("1e-5"),
    }
    runs = {run.config.model.name: run.config for run in expand(small(), overrides)}
    polish = {name: phase_config(config, "polish") for name, config in runs.items()}
    assert {p.train for p in polish.values()} == {"last:2"}
    rates = {name: p.optimizer.learning_rate for name, p in polish.items()}
    assert rates == {"linear": 1e-3, "cnn": 1e-5}


def test_a_teacher_is_named_by_the_end_of_its_path():
    """A path is no name; without a teacher, a variant says so."""
    config = small(sweep="distill.teacher='',run:/a/W/cnn/seed0,'run:x/W/mlp/seed{seed},run:b/cnn'")
    runs = expand(config)
    labels = dict.fromkeys(run.config.variant for run in runs)
    assert list(labels) == [
        "teacher=none", "teacher=cnn/seed0", "teacher=mlp/seed*+b/cnn"
    ]  # fmt: skip
    assert runs[2].name == "linear/seed0_teacher=cnn_seed0"
    assert runs[0].config.distill.teacher == ""
    assert runs[5].config.distill.teacher == "run:x/W/mlp/seed1,run:b/cnn"  # one a seed
    for values in ("run:/a/W/cnn/seed0,run:/a/V/cnn/seed0", "run:m/s{seed},run:m/s{fold}"):
        with pytest.raises(UserError, match="would be called '(cnn/seed0|m/s.)': use another"):
            expand(small(sweep=f"distill.teacher={values}"))
    named = small(variants={"plain": {}, "taught": {"distill": {"teacher": "run:W/fold{fold}_s"}}})
    named.data.folds = 2
    told = {run.name: run.config.distill.teacher for run in expand(named)}
    assert told["cnn/fold1_seed0_taught"] == "run:W/fold1_s" and told["cnn/fold1_seed0_plain"] == ""


def test_a_phase_of_the_file_that_no_run_has_is_told(capsys):
    expand(small(), {"phase.tune.epochs": Text("3"), "phase.all.epochs": Text("3")})
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "note: command line: phase.tune.epochs: no run has a phase 'tune'; it changes nothing"
    ]


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("per_model.cnn.epochs", "many", "'many' is not a int"),
        ("per_model.cnn.data.split", "(0.8, x)", "is not a tuple such as"),
        ("per_model.cnn.data.split", "(0.8, 'x')", "is not a tuple such as"),
        ("per_model.cnn.epoch", "3", "no field 'epoch'. Did you mean 'epochs'"),
        ("per_model.cnn.optimizer", "3", "is a section: name one field"),
        ("per_model.cnn.data.split[0]", "0.8", "Did you mean 'data.split'"),
        ("per_model.cnn", "3", "is a section: name one field"),
        ("per_model.cnn.seeds", "3", "of the whole experiment"),
        ("per_model.cnn.model.name", "mlp", "no field 'model.name'"),
        ("per_model.mlp.epochs", "3", "'mlp' is not known; choose one of linear, cnn"),
        ("model.dropout", "0.5", "linear has no field 'model.dropout'.*per_model.<model>"),
        ("phase.tuen.epochs", "3", "no run has a phase 'tuen': .*which is all here"),
        ("phase.all.data.image_size", "3", "'data' is not known"),
        ("phase.all", "3", "is a section"),
    ],
)
def test_mistakes_in_open_fields_are_named(path, text, message):
    with pytest.raises(UserError, match=message):
        expand(small(), {path: Text(text)})


def test_a_sweep_takes_tuples_quoted_values_and_fields_of_one_model():
    sweep = """data.split=(0.7,0.15,0.15),(0.8,0.1,0.1); loss.class_weights="1,2",'2,1';
        per_model.cnn.model.dropout=0,0.3"""
    runs = expand(small(sweep=sweep, seeds=(0,)))
    by_name = {run.name: run.config for run in runs}
    assert len(by_name) == 4 + 8
    config = by_name["cnn/seed0_split=_0.8_0.1_0.1_class_weights=_2_1_dropout=0.3"]
    assert config.data.split == (0.8, 0.1, 0.1) and config.loss.class_weights == "2,1"
    assert config.model.dropout == 0.3
    runs = expand(small(models=("mlp",), sweep="model.hidden=(64,),(128,64)", seeds=(0,)))
    assert [run.config.model.hidden for run in runs] == [(64,), (128, 64)]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.learning_rate", float("nan"), "learning_rate=nan is out of range"),
        ("optimizer.learning_rate", 0.0, "learning_rate=0.0 is out of range"),
        ("epochs", 0, "epochs=0 is out of range"),
        ("optimizer.name", "adamq", "Did you mean 'adam"),
        ("data.split", (0.5, 0.2), "sums to 0.7"),
        ("data.split", (1.0,), "two or three fractions"),
        ("data.source", "folder", "config.data.path is empty"),
        ("phases", "haed", "Did you mean 'head'"),
        ("phases", "head,head", "each phase once"),
        ("phases", "", "at least one"),
        ("batch_norm", "moving", "batch_norm: 'moving' is not known"),
        ("preprocessing", "unti", "Did you mean 'unit'"),
        ("layer_decay", 0.0, "layer_decay=0.0 is out of range"),
        ("phase.all", ConfigDict({"seed": 1}), "phase.all: 'seed' is not known"),
        ("phase.all", ConfigDict({"epochs": 0}), "in phase all: config.epochs=0"),
        ("phase.all", ConfigDict({"epoch": 3}), "Did you mean 'epochs'"),
        ("phase.all", ConfigDict({"optimizer": {"rate": 3}}), "no field 'optimizer.rate'"),
        ("per_model.cnn", ConfigDict({"model": {"drop": 0.1}}), "Did you mean 'model.dropout'"),
        ("loss.name", "hinge", "needs hard labels"),
        ("augment.crop_area", (0.0, 1.0), "crop_area"),
        ("schedule.patience", 0, "patience=0"),
        ("models", ("cmn",), "Did you mean 'cnn'"),
        ("models", (), "models is empty"),
        ("seeds", (0, 0), "twice"),
        ("seeds", (-1,), "whole number"),
        ("sweep", "optimizer.learning_rat=1", "Did you mean 'optimizer.learning_rate'"),
        ("sweep", "epochs=many", "not a int"),
        ("sweep", "epochs", "field=value"),
        ("sweep", "epochs=1,2; epochs=3", "names epochs twice"),
        ("sweep", "model.dropout=0,0.5", "linear has no field 'model.dropout'"),
        ("sweep", "per_model.mlp.epochs=1,2", "'mlp' is not known; choose one of linear, cnn"),
        ("sweep", "data.split=(0.7,0.3", "is not a tuple"),
        ("sweep", "augment=1,2", "config.variants"),
        ("sweep", "seeds=1,2", "of the whole experiment"),
        ("sweep", "phase.tune.epochs=1,2", "no run has a phase 'tune'"),
    ],
)
def test_mistakes_are_named(path, value, message):
    config = small()
    if value == "hinge":
        config.loss.label_smoothing = 0.1
    section = config
    *sections, field = path.split(".")
    for name in sections:
        section = section[name]
    section[field] = value
    with pytest.raises(UserError, match=message):
        expand(config)


def test_wrong_per_model_field_and_type_are_named():
    config = small()
    config.per_model.cnn.optimizer = {"learning_rat": 0.5}
    with pytest.raises(UserError, match="Did you mean 'optimizer.learning_rate'"):
        expand(config)
    config.per_model.cnn.optimizer = {"learning_rate": "fast"}
    with pytest.raises(UserError, match="wrong type"):
        expand(config)


def test_shards_divide_the_grid():
    runs = expand(small())
    parts = [shard(runs, f"{i}/3") for i in range(3)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
    assert shard(runs, "") == runs
    for wrong in ("3/3", "1", "a/b", "-1/3"):
        with pytest.raises(UserError, match="expected i/n"):
            shard(runs, wrong)


def test_a_directory_of_another_config_is_refused_with_the_difference(tmp_path):
    run = expand(small())[0]
    check_run_dir(run, tmp_path)  # nothing there
    folder = tmp_path / run.name
    folder.mkdir(parents=True)
    stored = stored_config(run.config)
    (folder / "config.json").write_text(json.dumps(stored))
    check_run_dir(run, tmp_path)
    other = Run(run.name, ConfigDict(run.config.to_dict()))
    other.config.runtime.log_every_steps = 7
    check_run_dir(other, tmp_path)  # how to run may change
    (folder / "config.json").write_text(json.dumps(stored | {"keep_optimizer": False}))
    check_run_dir(run, tmp_path)  # of an older version, with a field that is gone
    other.config.optimizer.learning_rate = 0.25
    with pytest.raises(
        UserError, match=r"optimizer.learning_rate: stored 0.001, now 0.25"
    ) as caught:
        check_run_dir(other, tmp_path)
    assert f"--config.weights=run:{folder}" in str(caught.value)


def test_folds_are_an_axis_beside_seeds():
    config = small(sweep="epochs=2,3")
    config.data.folds = 3
    runs = expand(config)
    assert len(runs) == 2 * 2 * 2 * 3 == len({run.config.to_json() for run in runs})
    named = {run.name: run.config for run in runs}
    assert list(named)[:4] == [f"linear/{x}_epochs=2" for x in (
        "fold0_seed0", "fold1_seed0", "fold2_seed0", "fold0_seed1")]  # fmt: skip
    chosen = named["cnn/fold2_seed1_epochs=3"]
    assert (chosen.data.fold, chosen.data.folds, chosen.seed, chosen.epochs) == (2, 3, 1, 3)
    with pytest.raises(UserError, match=r"data.folds=1: cross-validation needs 2 folds"):
        expand(config, {"data.folds": 1})
    with pytest.raises(UserError, match="data.folds differs between runs"):
        expand(digits.get_config("cnn,linear"), {"per_model.cnn.data.folds": 2})
    for changes in ({"data.fold": 1}, {"data.folds": 0, "data.fold": 1}):
        with pytest.raises(UserError, match=r"data.fold=1: the grid makes a run of every fold"):
            expand(config, changes)
    config.sweep = "data.fold=0,1"
    with pytest.raises(UserError, match=r"data.fold=1: the grid makes a run of every fold"):
        expand(config)


def test_runs_with_and_without_folds_do_not_mix(tmp_path):
    config = small()
    (plain, *_), config.data.folds = expand(config), 2
    (first, second, *_) = expand(config)

    def store(run, **data):
        folder = tmp_path / run.name
        folder.mkdir(parents=True)
        stored = stored_config(run.config)
        stored["data"] = {k: v for k, v in stored["data"].items() if k not in data}
        (folder / "config.json").write_text(json.dumps(stored))

    store(plain, folds=0, fold=0)
    check_folds(tmp_path, 0)
    check_run_dir(plain, tmp_path)  # of a version without folds
    with pytest.raises(UserError, match=r"linear/seed0 is not a run of cross-validation, but"):
        check_folds(tmp_path, 2)
    (tmp_path / plain.name / "config.json").unlink()
    store(first)
    check_folds(tmp_path, 2)
    check_run_dir(first, tmp_path)
    check_run_dir(second, tmp_path)
    with pytest.raises(UserError, match=r"linear/fold0_seed0 is a run of cross-validation, but"):
        check_folds(tmp_path, 0)


def test_fields_of_an_architecture_are_its_constructors():
    """Its defaults stand in no config; which form it has, weights decide."""
    fields = {run.config.model.name: run.config.model.to_dict() for run in expand(base_with_all())}
    assert fields["cnn_deep"] == {"name": "cnn_deep", "dropout": 0.1, "head_dropout": 0.5}
    assert fields["resnet50"] == {"name": "resnet50", "dropout": 0.0}
    config = base_with_all()
    config.per_model.resnet50.model.form = "keras"
    forms = {run.config.model.name: run.config.model.get("form") for run in expand(config)}
    assert forms["resnet50"] == "keras" and forms["resnet18"] is None


def base_with_all() -> ConfigDict:
    config = base.get_config(",".join(MODELS))
    config.data.source, config.seeds = "digits", (0,)
    return config


def test_a_damaged_file_is_named_with_no_more_to_delete_than_must_be(tmp_path):
    run_dir = tmp_path / "cnn/seed0"
    run_dir.mkdir(parents=True)
    for path, cure in ((run_dir / "config.json", run_dir), (tmp_path / "experiment.json",) * 2):
        path.write_text("{half")
        with pytest.raises(UserError, match=f"not valid JSON .*: delete {cure}$"):
            read_json(path)
    assert read_json(tmp_path / "absent.json") == {}
