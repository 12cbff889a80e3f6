"""Training subsets of `data.train_fraction`."""

import json

import numpy as np
import pytest

from configs import digits
from data.sources import Listing
from data.splits import subset
from errors import UserError
from experiment.grid import check_run_dir, expand
from experiment.runner import divide, kin
from input_pipeline import load_dataset
from train import begin, check_runs, prepare

FRACTIONS = (0.001, 0.03, 0.05, 0.1, 0.25, 0.33, 0.5, 0.75, 0.99)


def listing_of(labels, groups=None) -> Listing:
    count = len(labels)
    ids = [f"{i * 7919 % count:05d}" for i in range(count)]  # in another order than the rows
    labels = np.asarray(labels, np.int32)
    return Listing(
        ids, labels, [""] * count, [str(i) for i in range(max(labels) + 1)], None, groups=groups
    )


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [(50, 30, 10, 1), (200, 200), (3,) * 40, (997,)])
def test_subsets_are_nested_and_stratified_to_the_image(seed, sizes):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    listing, rows = listing_of(labels), np.flatnonzero(np.arange(len(labels)) % 10 < 9)
    counts = np.bincount(labels[rows], minlength=len(sizes))
    before = np.zeros(0, int)
    for fraction in FRACTIONS:
        kept = subset(listing, rows, [], fraction, seed)
        assert np.isin(before, kept).all() and np.isin(kept, rows).all()
        assert (np.diff(kept) > 0).all()
        of_class = np.bincount(labels[kept], minlength=len(sizes))
        assert of_class[counts > 0].min() >= 1
        if fraction * len(rows) >= len(sizes):
            assert abs(len(kept) - fraction * len(rows)) <= 0.5
            assert (np.abs(of_class - fraction * counts) <= 1.5).all()
        before = kept


def test_subsets_depend_on_ids_and_the_seed_alone():
    labels = np.random.default_rng(0).integers(0, 3, 100)
    listing, rows = listing_of(labels), np.arange(100)
    kept = subset(listing, rows, [], 0.2, 5)
    order = np.random.default_rng(1).permutation(100)
    shuffled = listing_of(labels[order])
    shuffled.ids = [listing.ids[i] for i in order]
    again = subset(shuffled, np.sort(rows), [], 0.2, 5)
    assert {shuffled.ids[i] for i in again} == {listing.ids[i] for i in kept}
    others = {tuple(subset(listing, rows, [], 0.2, seed)) for seed in range(20)}
    assert len(others) == 20
    often = np.zeros(100)
    for seed in range(400):  # each image as often as any other of its class
        often[subset(listing, rows, [], 0.2, seed)] += 1
    assert often.min() > 40 and often.max() < 130


def test_groups_and_duplicates_are_in_or_out_together():
    draw = np.random.default_rng(0)
    labels, groups = draw.integers(0, 4, 300), [f"patient{i}" for i in draw.integers(0, 60, 300)]
    listing, rows = listing_of(labels, groups), np.arange(300)
    copies = [np.array([3, 77, 250]), np.array([8, 9])]
    largest = np.unique(groups, return_counts=True)[1].max() * 3
    before = np.zeros(0, int)
    for fraction in FRACTIONS:
        kept = subset(listing, rows, copies, fraction, 0)
        inside = np.isin(rows, kept)
        for group in set(groups):
            assert len(set(inside[np.array(groups) == group])) == 1
        assert all(len(set(inside[group])) == 1 for group in copies)
        assert np.isin(before, kept).all() and set(labels[kept]) == {0, 1, 2, 3}
        assert abs(len(kept) - fraction * 300) <= max(largest / 2, 40)
        before = kept


def experiment(cache_dir, sweep, models="linear,cnn_deep"):
    config = digits.get_config(models)
    config.seeds, config.sweep, config.epochs = (0, 1), sweep, 1
    config.runtime.cache_dir, config.runtime.tensorboard = cache_dir, False
    return expand(config)


def begin_run(config, run_dir):
    """Writes what a run writes before it trains."""
    dataset, model = prepare(config, [run_dir])
    begin([config], [run_dir], dataset, model)


def test_only_the_training_images_depend_on_fraction_and_seed(cache_dir):
    runs = {
        run.name: run.config for run in experiment(cache_dir, "data.train_fraction=0.1,0.5,1.0")
    }
    data = {name: load_dataset(config.data, cache_dir) for name, config in runs.items()}
    whole = data["linear/seed0_train_fraction=1.0"]
    assert whole is data["linear/seed1_train_fraction=1.0"]
    for name, dataset in data.items():
        for part in ("validation", "test"):
            assert np.array_equal(dataset.rows[part], whole.rows[part])
        assert np.isin(dataset.rows["train"], whole.rows["train"]).all()
        assert (dataset.identity == whole.identity) == name.endswith("1.0")
    half, tenth = (data[f"linear/seed0_train_fraction={x}"] for x in (0.5, 0.1))
    assert half.decoded is whole.decoded and len(half.rows["train"]) == 581
    assert np.isin(tenth.rows["train"], half.rows["train"]).all()
    other = data["linear/seed1_train_fraction=0.5"].rows["train"]
    assert len(other) == 581 and not np.array_equal(other, half.rows["train"])
    deep = data["cnn_deep/seed1_train_fraction=0.5"]  # of another size
    assert np.array_equal(deep.rows["train"], other) and deep.decoded is not half.decoded
    assert "train_seed" not in runs["linear/seed1_train_fraction=1.0"].data


def test_seeds_of_a_subset_are_never_trained_at_once(cache_dir, tmp_path):
    """Their images differ, and with them what is stored of frozen stages."""
    runs = experiment(cache_dir, "data.train_fraction=0.5,1.0", "linear")
    at_once = {kin(run.config): 9 for run in runs}
    names = [[run.name for run in group] for group in divide(runs, tmp_path, at_once)]
    assert sorted(map(len, names)) == [1, 1, 2]
    assert [f"linear/seed{seed}_train_fraction=1.0" for seed in (0, 1)] in names


def test_a_workdir_holds_several_fractions_and_refuses_other_images(cache_dir, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    labels = np.arange(80) % 2
    path = tmp_path / "few.npz"

    def runs_of(images, sweep="data.train_fraction=0.25,0.5,1.0"):
        np.savez(path, images=images, labels=labels)
        runs = experiment(cache_dir, sweep, "linear")
        for run in runs:
            run.config.data.update(source="npz", path=str(path))
        load_dataset.__globals__["_list_source"].cache_clear()
        load_dataset.__globals__["_load_dataset"].cache_clear()
        return runs

    runs = runs_of(images)
    work = tmp_path / "work"
    for run in runs[:3]:
        begin_run(run.config, work / run.name)
    old = work / "linear/seed0"  # before there were fractions
    begin_run(runs[-1].config, old)
    config = json.loads((old / "config.json").read_text())
    assert config["data"].pop("train_fraction") == 1
    (old / "config.json").write_text(json.dumps(config | {"variant": "", "seed": 1}))
    for run in runs:
        check_run_dir(run, work)
    plain = runs_of(images, "")[1]
    check_run_dir(type(plain)("linear/seed0", plain.config), work)
    datasets, at_once = check_runs([run.config for run in runs], work)
    assert sorted(len(d.rows["train"]) for d in datasets) == [13, 13, 26, 26, 52]
    assert len(at_once) == 5
    stored = json.loads((work / runs[0].name / "dataset.json").read_text())
    assert sum(stored["counts"]["train"].values()) == 13
    assert stored["identity"] in {dataset.identity for dataset in datasets}
    changed = images.copy()
    changed[datasets[0].rows["train"][0]] += 1
    with pytest.raises(UserError, match="1 images changed"):
        check_runs([run.config for run in runs_of(changed)], work)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("data.train_fraction=0,1", r"train_fraction=0.0 is out of range: it must lie in \(0, 1\]"),
        ("data.train_fraction=0.5,1.01", r"train_fraction=1.01 is out of range"),
        ("data.train_fraction=nan", r"train_fraction=nan is out of range"),
        ("data.train_fraction=half", r"train_fraction='half' is not a float"),
        ("data.train_fraction=0.3,0.3001", "0.3 and 0.3001 both keep 349 training images"),
        ("data.train_fraction=0.001,0.002", "0.001 and 0.002 both keep 10 training images"),
        ("data.train_fraction=0.9999,1", "0.9999 and 1 both keep 1163 training images"),
    ],
)
def test_bad_fractions(cache_dir, tmp_path, sweep, message):
    with pytest.raises(UserError, match=message):
        check_runs([run.config for run in experiment(cache_dir, sweep)], tmp_path)
