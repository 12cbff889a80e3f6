import math

import pytest

from configs import base, digits, transfer
from errors import UserError
from experiment.grid import pairs, run_config
from experiment.space import Choices, Range, check_space, corners, points, read_space, size


def settings_of(model="cnn", config=None, variant=0):
    config = config or digits.get_config(model)
    return run_config(config, *pairs(config)[variant], {}, {})


def read(text, model="cnn"):
    return read_space(text, settings_of(model))


def test_values_and_ranges_are_read_by_the_type_of_the_field():
    space = read(
        "optimizer.learning_rate=log:1e-4..1e-1; epochs=5..10; batch_size=log:16..64; "
        "augment.mixup=0, 0.2; augment.flip_horizontal=true,false; optimizer.name=sgd,adamw; "
        "augment.crop_area=(0.5,1),(1,1); data.image_size=8..16; augment.rotation=-0..1.5"
    )
    assert space["optimizer.learning_rate"] == Range(1e-4, 0.1, log=True)
    assert space["epochs"] == Range(5, 10, log=False) and isinstance(space["epochs"].low, int)
    assert space["batch_size"] == Range(16, 64, log=True)
    assert space["augment.mixup"] == Choices({"0": 0.0, "0.2": 0.2})
    assert space["augment.flip_horizontal"].ends == [True, False]
    assert space["optimizer.name"].ends == ["sgd", "adamw"]
    assert space["augment.crop_area"].values == {"(0.5,1)": (0.5, 1), "(1,1)": (1, 1)}
    assert [str(of) for of in space.values()][:4] == ["log:0.0001..0.1", "5..10", "log:16..64", "0,0.2"]  # fmt: skip
    assert size(space) == math.inf


def test_a_model_of_its_own_space_and_one_without_gradient():
    text = "optimizer.learning_rate=log:1e-4..1e-1; per_model.cnn.optimizer.learning_rate=0.1,0.2; per_model.cnn.model.dropout=0..0.5"
    assert {path: str(of) for path, of in read(text).items()} == {"optimizer.learning_rate": "0.1,0.2", "model.dropout": "0.0..0.5"}  # fmt: skip
    assert str(read(text, "mlp")["optimizer.learning_rate"]) == "log:0.0001..0.1"
    assert read(text, "knn") == {}
    assert list(read("epochs=1,2; data.image_size=4,8", "knn")) == ["data.image_size"]


def test_fields_of_a_phase():
    config = transfer.get_config()
    text = "phase.head.optimizer.learning_rate=log:1e-4..1e-2; phase.tune.epochs=2,4"
    settings = settings_of(config=config)
    space = read_space(text, settings)
    assert list(space) == ["phase.head.optimizer.learning_rate", "phase.tune.epochs"]
    values = {"phase.head.optimizer.learning_rate": 0.005, "phase.tune.epochs": 4}
    chosen = run_config(config, *pairs(config)[0], {}, values)
    assert chosen.phase.head.optimizer.learning_rate == 0.005 and chosen.phase.tune.epochs == 4
    with pytest.raises(UserError, match="phase.*'tail' is not known; choose one of head, tune"):
        read_space("phase.tail.epochs=1,2", settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.learning_rat=0.1,1", "no field 'optimizer.learning_rat'.* Did you mean 'optimizer.learning_rate'"),
        ("optimizer=1,2", "is a section"),
        ("optimizer.learning_rate", "not of the form field=value"),
        ("optimizer.learning_rate=", "not of the form field=value"),
        ("epochs=1,2; epochs=3", "names epochs twice"),
        ("epochs=1,2,1", "names a value twice"),
        ("augment.mixup=0.2,0.20", "names a value twice"),
        ("augment.mixup=0.2..0.2", "is empty: its low end must be below"),
        ("augment.mixup=0...2", "two dots stand between"),
        ("augment.mixup=0.5..0.2", "is empty"),
        ("optimizer.weight_decay=log:0..0.1", "begins above 0; for 0 itself give values, such as optimizer.weight_decay=0,"),
        ("optimizer.weight_decay=log:-1..0.1", "begins above 0"),
        ("epochs=1.5..3", "epochs='1.5' is not a int"),
        ("optimizer.learning_rate=x..1", "'x' is not a float"),
        ("optimizer.learning_rate=1e-3..", "'' is not a float"),
        ("optimizer.learning_rate=0.1..inf", "must be finite"),
        ("optimizer.learning_rate=nan..1", "must be finite"),
        ("optimizer.learning_rate=1e-3..1,2", "give values or one range"),
        ("optimizer.learning_rate=log:1e-3", "a range has the form LOW..HIGH or log:LOW..HIGH"),
        ("augment.flip_horizontal=0..1", "of a number; this field is a bool"),
        ("augment.crop_area=0.5..1", "of a number; this field is a tuple"),
        ("data.split_seed=0,1", "not a field to search for"),
        ("runtime.feed=auto,resident", "not a field to search for"),
        ("seeds=0,1", "is of the whole experiment"),
        ("per_model.cnn_dep.epochs=1,2", "'cnn_dep' is not known.*Did you mean 'cnn_deep'"),
        ("per_model.cnn.epoch=1,2", "Did you mean 'epochs'"),
    ],
)  # fmt: skip
def test_mistakes_name_the_field_and_the_cure(text, message):
    with pytest.raises(UserError, match=message):
        read(text)


def test_a_field_that_something_else_sets_is_refused():
    config = base.get_config("cnn")
    config.sweep = "optimizer.learning_rate=0.1,0.2"
    variant, settings = pairs(config)[0][1], settings_of(config=config)
    space = read_space("optimizer.learning_rate=log:1e-3..1; epochs=1,2", settings)
    with pytest.raises(UserError, match="learning_rate is also set by the variant"):
        check_space(space, settings, variant, {})
    config.sweep = ""
    variant = pairs(config)[0][1]
    with pytest.raises(UserError, match="epochs is also set by --config.per_model.cnn.epochs"):
        check_space(space, settings, variant, {"per_model.cnn.epochs": 3})
    check_space(space, settings, variant, {"per_model.mlp.epochs": 3, "batch_size": 4})
    settings.phase.all.try_learning_rates = (0.1, 0.2)
    with pytest.raises(UserError, match="has no effect where phase.all.try_learning_rates is set"):
        check_space(space, settings, variant, {})


def test_a_grid_has_all_points_and_no_range():
    space = read("augment.mixup=0,0.2; epochs=1,2,3")
    assert points(space)[:2] == [{"augment.mixup": "0", "epochs": "1"}, {"augment.mixup": "0", "epochs": "2"}]  # fmt: skip
    assert len(points(space)) == size(space) == 6
    cure = r"a range, of which a grid has no points: give values, such as optimizer.learning_rate=0.0001,0.00316,0.1"
    with pytest.raises(UserError, match=cure):
        points(read("optimizer.learning_rate=log:1e-4..1e-1"))
    with pytest.raises(UserError, match="such as epochs=2,6,9"):
        points(read("epochs=2..9"))


def test_corners_hold_every_end():
    space = read("augment.mixup=0,0.2,0.4; epochs=2..9")
    found = corners(space)
    assert len(found) == 6 and found[0] == {"augment.mixup": 0.0, "epochs": 2}
    some = corners(space, most=5)
    assert some[0] == found[0] and some[-1] == {"augment.mixup": 0.4, "epochs": 9}
    for path, of in space.items():
        assert {point[path] for point in some} == set(of.ends)
