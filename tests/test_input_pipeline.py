import hashlib
import time
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from sklearn.model_selection import StratifiedShuffleSplit

from configs import base
from data import sources
from data.sources import Listing
from data.splits import divided_groups
from errors import UserError
from input_pipeline import (
    Feed,
    batch_rows,
    evaluation_rows,
    load_dataset,
    split_parts,
    steps_per_epoch,
)
from tests.conftest import paint


def listing_of(labels, parts=None, groups=None, ids=None) -> Listing:
    labels = np.asarray(labels, np.int32)
    return Listing(
        ids=ids or [f"{i:05d}" for i in range(len(labels))],
        labels=labels,
        parts=parts or [""] * len(labels),
        class_names=[str(i) for i in range(labels.max() + 1)],
        read=lambda i: np.zeros((1, 1), np.uint8),
        groups=groups,
    )


def split(listing, fractions=(0.7, 0.15, 0.15), duplicates=(), seed=0):
    usable = np.ones(len(listing.ids), bool)
    groups = [np.asarray(group) for group in duplicates]
    return split_parts(listing, usable, groups, fractions, seed)


def test_split_is_stratified_like_scikit_learns():
    labels = np.repeat([0, 1, 2], [200, 100, 40])
    parts = split(listing_of(labels), (0.8, 0.1, 0.1))
    for part, share in enumerate((0.8, 0.1, 0.1)):
        assert np.bincount(labels[parts == part]).tolist() == [200 * share, 100 * share, 40 * share]
    theirs = next(StratifiedShuffleSplit(1, test_size=68, random_state=0).split(labels, labels))[1]
    ours = np.flatnonzero(split(listing_of(labels), (0.79, 0.01, 0.2)) == 2)
    assert np.bincount(labels[theirs]).tolist() == np.bincount(labels[ours]).tolist()


def test_split_depends_on_seed_and_ids_but_not_on_order():
    labels = np.random.default_rng(0).integers(0, 3, 300)
    listing = listing_of(labels)
    parts = split(listing)
    assert np.array_equal(parts, split(listing))
    assert not np.array_equal(parts, split(listing, seed=1))
    order = np.random.default_rng(1).permutation(300)
    shuffled = listing_of(labels[order], ids=[listing.ids[i] for i in order])
    assert np.array_equal(split(shuffled), parts[order])


def test_duplicates_and_groups_stay_together():
    labels = np.tile([0, 1], 150)
    groups = [f"patient{i // 5}" for i in range(300)]
    duplicates = [[0, 5, 290], [7, 8]]  # ties patients 0, 1 and 58 together
    parts = split(listing_of(labels, groups=groups), duplicates=duplicates)
    for group in set(groups):
        assert len({parts[i] for i in range(300) if groups[i] == group}) == 1
    assert len(set(parts[[0, 1, 5, 6, 290, 294]])) == 1
    counts = np.bincount(parts, minlength=3) / 300
    assert np.abs(counts - [0.7, 0.15, 0.15]).max() < 0.05


def test_parts_of_the_source_are_kept():
    parts = ["train"] * 100 + ["test"] * 20
    labels = np.tile([0, 1], 60)
    assigned = split(listing_of(labels, parts), (0.8, 0.2))
    assert (assigned[100:] == 2).all()
    assert np.bincount(assigned[:100]).tolist() == [80, 20]
    proportional = split(listing_of(labels, parts), (0.6, 0.15, 0.25))
    assert np.bincount(proportional[:100]).tolist() == [80, 20]
    whole = ["train"] * 100 + ["validation"] * 10 + ["test"] * 10
    assert np.bincount(split(listing_of(labels, whole))).tolist() == [100, 10, 10]
    with pytest.raises(UserError, match="no test fraction"):
        split(listing_of(labels), (0.8, 0.2))


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ([10], [[7, 2, 1]]),
        ([4], [[3, 1, 0]]),
        ([3, 3], [[2, 1, 0], [2, 0, 1]]),
        ([4, 4, 4], [[3, 1, 0], [3, 0, 1], [2, 1, 1]]),  # 8.4, 1.8, 1.8
        ([1, 2, 50], [[1, 0, 0], [1, 1, 0], [35, 7, 8]]),
    ],
)
def test_small_classes_are_divided_to_the_image(sizes, counts):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    parts = split(listing_of(labels))
    found = [np.bincount(parts[labels == k], minlength=3).tolist() for k in range(len(sizes))]
    assert found == counts


def test_many_small_classes_add_up_to_the_fractions():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(200), np.arange(200) % 9 + 2))
    parts = split(listing_of(labels))
    target = len(labels) * np.array([0.7, 0.15, 0.15])
    assert np.abs(np.bincount(parts) - target).max() <= 2
    for label in range(200):
        counts = np.bincount(parts[labels == label], minlength=3)
        assert np.abs(counts - counts.sum() * np.array([0.7, 0.15, 0.15])).max() < 1
        assert counts[0]


def test_small_groups_stay_together_and_near_the_fractions():
    labels = np.repeat(np.arange(5), 10)
    groups = [f"pair{i // 2}" for i in range(50)]
    parts = split(listing_of(labels, groups=groups))
    assert all(parts[i] == parts[i + 1] for i in range(0, 50, 2))
    assert np.bincount(parts).tolist() == [30, 10, 10]


def test_the_split_of_the_digits_stays(cache_dir, digits_run):
    dataset = load_dataset(digits_run().data, cache_dir)
    rows = [dataset.rows[part].tolist() for part in ("train", "validation", "test")]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "662e73c4b79b67f7"


def test_a_large_split_takes_seconds():
    labels = np.random.default_rng(0).integers(0, 1000, 100_000)
    listing, began = listing_of(labels), time.process_time()
    parts = split(listing)
    assert time.process_time() - began < 15
    assert np.abs(np.bincount(parts) / 100_000 - [0.7, 0.15, 0.15]).max() < 0.01


def test_groups_in_two_given_parts_are_leaks(make_folder, folder_config, cache_dir, capsys):
    root = make_folder({"train/a": 10, "train/b": 10, "test/a": 2, "test/b": 2})
    config = folder_config(root, groups=r"/(\d+)\.png", split=(0.75, 0.25))
    before = load_dataset(config, cache_dir)
    parts = np.full(24, -1)
    for i, part in enumerate(("train", "validation", "test")):
        parts[before.rows[part]] = i
    divided = divided_groups(before.listing, parts)
    assert sorted(divided) == ["0", "1"]
    assert [before.listing.ids[row] for row in divided["0"]] == [
        f"{part}/{name}/0.png" for part in ("test", "train") for name in "ab"
    ]
    assert "2 groups lie in several parts, such as 0" in capsys.readouterr().err
    config.exclude_leaks = True
    after = load_dataset(config, cache_dir)
    assert sorted(after.excluded) == [f"train/{name}/{i}.png" for name in "ab" for i in (0, 1)]
    assert "group 0 is also in the test part" in after.excluded["train/a/0.png"]
    assert after.ids("test") == before.ids("test")


def test_a_grid_of_sizes_reads_each_file_once(make_folder, folder_config, cache_dir, monkeypatch):
    root, read = make_folder({"a": 10, "b": 10}), Counter()
    plain = sources.read_file

    def count(path):
        read[path.name] += 1
        return plain(path)

    monkeypatch.setattr(sources, "read_file", count)
    for _ in range(2):  # main checks every size, then trains in every size
        for size in (4, 5, 6, 7, 8):
            load_dataset(folder_config(root, image_size=size), cache_dir)
    assert set(read.values()) == {2 * (1 + 5)}  # two files a name: hashed once, decoded five times
    load_dataset(folder_config(root, image_size=4, split_seed=1), cache_dir)
    assert set(read.values()) == {12}


def test_leaks_and_contradictions_are_left_out_on_demand(make_folder, folder_config, cache_dir):
    root = make_folder({"train/a": 12, "train/b": 12, "test/a": 2, "test/b": 2})
    paint(24).save(root / "train" / "a" / "leak.png")  # the pixels of test/a/0.png
    paint(26).save(root / "train" / "a" / "liar.png")  # the pixels of test/b/0.png
    paint(0).save(root / "train" / "b" / "twin.png")  # the pixels of train/a/0.png
    config = folder_config(root, split=(0.75, 0.25))
    before = load_dataset(config, cache_dir)
    assert "train/a/leak.png" in before.ids("train") + before.ids("validation")
    config.exclude_leaks = True
    after = load_dataset(config, cache_dir)
    kept = after.ids("train") + after.ids("validation")
    assert {"train/a/leak.png", "train/a/liar.png", "train/a/0.png", "train/b/twin.png"} == set(
        before.ids("train") + before.ids("validation")
    ) - set(kept)
    assert after.ids("test") == before.ids("test")
    assert "test part" in after.excluded["train/a/leak.png"]
    assert "another label" in after.excluded["train/b/twin.png"]


def test_unreadable_images_stop_the_start_or_are_skipped(
    make_folder, folder_config, cache_dir, capsys
):
    root = make_folder({"a": 10, "b": 10})
    (root / "a" / "o'brien <b>.jpg").write_text("words")
    with pytest.raises(UserError, match=r"a/o'brien <b>.jpg: this is no image file"):
        load_dataset(folder_config(root), cache_dir)
    dataset = load_dataset(folder_config(root, unreadable="skip"), cache_dir)
    assert sum(len(rows) for rows in dataset.rows.values()) == 20
    assert "this is no image file" in capsys.readouterr().err


def test_a_part_without_images_is_an_error(make_folder, folder_config, cache_dir):
    with pytest.raises(UserError, match="the validation part has no images"):
        load_dataset(folder_config(make_folder({"a": 2, "b": 1})), cache_dir)


def test_batches_are_pure_and_show_every_image_equally_often():
    seen = np.concatenate([batch_rows(3, step, 10, 4) for step in range(10)])
    assert np.bincount(seen).tolist() == [4] * 10
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:20]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:20])
    assert np.array_equal(batch_rows(3, 7, 10, 4), seen[28:32])
    assert not np.array_equal(batch_rows(4, 7, 10, 4), seen[28:32])
    assert np.bincount(batch_rows(0, 0, 3, 12)).tolist() == [4, 4, 4]  # more than there are
    assert [steps_per_epoch(n, 4) for n in (1, 4, 5)] == [1, 1, 2]


def test_no_two_phases_epochs_and_seeds_share_an_order():
    orders = {
        tuple(batch_rows(seed + (phase << 32), epoch, 12, 12).tolist())
        for seed in range(3)
        for phase in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 3 * 4 * 4


def test_evaluation_covers_every_image_once():
    for count in (1, 7, 8, 9):
        plans = list(evaluation_rows(count, 4))
        assert all(len(rows) == 4 for rows, _ in plans)
        assert np.concatenate([rows[mask] for rows, mask in plans]).tolist() == list(range(count))


def feeds(dataset, part="train"):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    for how in ("resident", "streaming"):
        runtime = base.get_config().runtime
        runtime.feed = how
        yield Feed(dataset, part, mesh, runtime)


def test_resident_and_streaming_feed_the_same(cache_dir):
    config = base.get_config().data
    config.source, config.image_size = "digits", 8
    dataset = load_dataset(config, cache_dir)
    resident, streaming = feeds(dataset)
    assert resident.resident and not streaming.resident
    pairs = list(zip(resident.training(1, 16, 5, 9), streaming.training(1, 16, 5, 9), strict=True))
    assert len(pairs) == 4
    pairs += zip(resident.evaluation(512), streaming.evaluation(512), strict=True)
    for left, right in pairs:
        jax.tree.map(np.testing.assert_array_equal, left, right)
    rows = batch_rows(1, 5, len(resident), 16)
    np.testing.assert_array_equal(pairs[0][0]["image"], dataset.images("train")[rows])
    np.testing.assert_array_equal(pairs[0][0]["label"], dataset.labels("train")[rows])
    masks = np.concatenate([pair[0]["mask"] for pair in pairs[4:]])
    assert masks.sum() == len(dataset.rows["train"])


def test_auto_streams_what_does_not_fit(cache_dir):
    config = base.get_config().data
    config.source, config.image_size = "digits", 8
    dataset = load_dataset(config, cache_dir)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    runtime = base.get_config().runtime
    assert Feed(dataset, "train", mesh, runtime).resident
    runtime.resident_limit_mb = 0
    assert not Feed(dataset, "train", mesh, runtime).resident
