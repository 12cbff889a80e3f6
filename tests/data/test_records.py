import json

import numpy as np
import pytest
from jax.sharding import Mesh

from analysis.forward import load_images
from analysis.runs import load_runs
from configs import base
from data.lazy import LazyImages
from data.records import Texts, open_records
from data.sources import list_source
from data.writing import write_records
from errors import Interrupted, UserError
from experiment.grid import Run, check_run_dir
from input_pipeline import Feed, jax, load_dataset
from tests.conftest import paint
from train import train_and_evaluate

LAZY, WHOLE = 0.0, 1e6  # megabytes of decoded images that go into the cache


def records_of(config, folder, per_shard=7):
    """Writes the data of a config; returns the config that reads the records."""
    assert write_records(list_source(config), config, folder, per_shard=per_shard)
    changed = base.get_config().data
    changed.update(config)
    changed.update({"source": "array_record", "path": str(folder)})
    return changed


@pytest.fixture
def folder(make_folder, folder_config):
    """The config of 24 training and 8 test images; three are odd, one is broken."""
    root = make_folder({"train/a": 12, "train/ö": 12, "test/a": 4, "test/ö": 4})
    paint(99).convert("LA").save(root / "train/a/grey.png")
    paint(98, (30, 20)).save(root / "train/ö/large.jpg")
    paint(0).save(root / "train/a/twin.png")
    (root / "train/a/broken.png").write_bytes(b"words")
    return folder_config(root, unreadable="skip", split=(0.8, 0.2))


def arrays(tmp_path, folder_config):
    """The config of an .npz of grey images with ids, groups and parts."""
    images = np.random.default_rng(0).integers(0, 256, (30, 9, 11), np.uint8)
    names = {"ids": [f"x{i}" for i in range(30)], "groups": [f"g{i // 2}" for i in range(30)]}
    path = tmp_path / "arrays.npz"
    parts = np.repeat(["train", "test"], [24, 6])
    np.savez(path, images=images, labels=np.arange(30) % 3, parts=parts, **names)
    return folder_config(path, source="npz", split=(0.75, 0.25))


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_records_are_the_data_they_were_made_of(
    kind, folder, folder_config, tmp_path, cache_dir, capsys
):
    config = folder if kind == "folder" else arrays(tmp_path, folder_config)
    config.update({"resize": "crop", "interpolation": "bicubic"})
    theirs = load_dataset(config, cache_dir)
    changed = records_of(config, tmp_path / "records")
    for limit in (LAZY, WHOLE):
        ours = load_dataset(changed, cache_dir, limit)
        assert isinstance(ours.decoded.images, LazyImages) == (limit == LAZY)
        assert ours.identity == theirs.identity and ours.excluded == theirs.excluded
        assert ours.decoded.fingerprint == theirs.decoded.fingerprint
        assert ours.decoded.entry == theirs.decoded.entry
        assert np.array_equal(ours.decoded.images[:], theirs.decoded.images)
        for name in theirs.decoded.facts.dtype.names:
            assert np.array_equal(ours.decoded.facts[name], theirs.decoded.facts[name])
        assert ours.decoded.modes == theirs.decoded.modes
        assert ours.decoded.errors == theirs.decoded.errors
        for part, rows in theirs.rows.items():
            assert np.array_equal(ours.rows[part], rows) and ours.ids(part) == theirs.ids(part)
        for left, right in zip(map(ours.listing.read, range(30)), map(theirs.listing.read, range(30)), strict=True):  # fmt: skip
            assert isinstance(left, bytes) == isinstance(right, bytes) and np.array_equal(
                left, right
            )
    assert "decoding" not in capsys.readouterr().out.split("\n", 1)[1]  # the cache is shared


def test_lazy_images_are_indexed_as_an_array():
    array = np.random.default_rng(0).integers(0, 256, (9, 2, 2, 3), np.uint8)
    lazy = LazyImages(lambda i: array[i], array.shape)
    some = np.array([8, 0, 3, 3])
    for index in (4, -1, np.int64(2), some, some[:, None], slice(1, 7, 2), array[:, 0, 0, 0] > 99, []):  # fmt: skip
        wanted = array[index] if len(np.shape(index)) or not isinstance(index, list) else array[:0]
        assert np.array_equal(lazy[index], wanted) and lazy[index].shape == wanted.shape
    for index in ((slice(None), slice(None), slice(None, None, -1)), (some, 1), Ellipsis):
        assert np.array_equal(lazy[index], array[index])
    assert np.array_equal(np.asarray(lazy), array) and np.array_equal(list(lazy), array)
    assert (lazy.shape, lazy.dtype, lazy.ndim, lazy.nbytes) == (array.shape, array.dtype, 4, 108)
    chosen = lazy.select(some).select(np.array([1, 2]))
    assert np.array_equal(chosen[:], array[[0, 3]]) and len(chosen) == 2
    with pytest.raises(IndexError):
        lazy[9]


def test_texts_are_those_that_were_joined():
    words = ["", "ö", "a/b", "\udc80", "", "x" * 9]
    encoded = [word.encode("utf-8", "surrogatepass") for word in words]
    ends = np.cumsum([len(word) for word in encoded])
    texts = Texts(np.frombuffer(b"".join(encoded), np.uint8), ends)
    assert list(texts) == words == [texts[i] for i in range(6)] == texts[:]
    assert np.array(texts, object).tolist() == words and texts[-1] == words[-1]


def test_a_run_is_the_same_on_records_and_goes_on_there(folder, digits_run, tmp_path):
    changes = {"data__" + name: folder[name] for name in ("source", "path", "split", "unreadable")}
    changes |= {"batch_size": 8, "runtime__checkpoint_every_seconds": 0.0}
    config = digits_run("linear", epochs=3, **changes)
    records = digits_run("linear", epochs=3, **changes)
    records.data.update(records_of(config.data, tmp_path / "records"))
    records.runtime.resident_limit_mb = 0
    train_and_evaluate(config, tmp_path / "whole/linear/seed0")
    asked = iter([False] * 4 + [True] * 99)
    run_dir = tmp_path / "divided/linear/seed0"
    with pytest.raises(Interrupted):
        train_and_evaluate(config, run_dir, lambda: next(asked))
    check_run_dir(Run("linear/seed0", records), tmp_path / "divided")
    train_and_evaluate(records, run_dir)
    check_run_dir(Run("linear/seed0", config), tmp_path / "divided")  # and back
    (whole,), (divided,) = load_runs(tmp_path / "whole"), load_runs(tmp_path / "divided")
    assert divided.config["data"]["source"] == "array_record"
    for part in ("validation", "test"):
        assert np.array_equal(getattr(whole, part)["logits"], getattr(divided, part)["logits"])
        images, lazy = load_images(whole, part), load_images(divided, part)
        assert isinstance(lazy, LazyImages) and np.array_equal(lazy[1:3], images[1:3])


def streaming_feed(dataset, how="auto"):
    runtime = base.get_config().runtime
    runtime.resident_limit_mb, runtime.feed = 0, how
    return Feed(dataset, "train", Mesh(np.array(jax.devices()), ("data",)), runtime)


def test_feeds_stream_what_is_decoded_at_every_use(folder, tmp_path, cache_dir):
    changed = records_of(folder, tmp_path / "records")
    whole, lazy = load_dataset(folder, cache_dir), load_dataset(changed, cache_dir, LAZY)
    for how in ("auto", "resident"):
        ours, theirs = streaming_feed(lazy, how), streaming_feed(whole, how)
        assert ours.resident == (how == "resident")
        pairs = zip(ours.training(3, 8, 2, 9), theirs.training(3, 8, 2, 9), strict=True)
        for left, right in pairs:
            jax.tree.map(np.testing.assert_array_equal, left, right)


def damage(path, content):
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_damaged_is_named(folder, tmp_path, cache_dir):
    changed = records_of(folder, tmp_path / "records")
    dataset = load_dataset(changed, cache_dir, LAZY)
    row = int(dataset.rows["train"][3])
    shard = tmp_path / f"records/images-0000{row // 7}-of-00006.array_record"
    sound = shard.read_bytes()
    damage(shard, dataset.listing.read(row))
    feed = streaming_feed(dataset)
    name = dataset.listing.ids[row]
    message = rf"(?s){name} \(record {row % 7} of .*{shard.name}\) cannot be read"
    with pytest.raises(UserError, match=message):
        for _ in feed.training(0, 8, 0, 20):
            pass
    with pytest.raises(UserError, match=f"{shard.name}"):
        load_dataset(changed, str(tmp_path / "cache"), WHOLE)
    shard.write_bytes(sound[:-1])
    with pytest.raises(UserError, match=f"{shard.name} has .* bytes, not"):
        open_records(tmp_path / "records")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        open_records(tmp_path / "records")
    shard.write_bytes(sound)
    damage(tmp_path / "records/index/labels.npy", dataset.listing.labels.tobytes())
    with pytest.raises(UserError, match="labels.npy changed since"):
        open_records(tmp_path / "records")
    (tmp_path / "records/index/labels.npy").unlink()
    with pytest.raises(UserError, match="labels.npy cannot be read"):
        open_records(tmp_path / "records")
    with pytest.raises(UserError, match="absent has no index.json"):
        open_records(tmp_path / "absent")


def test_facts_of_another_background_are_refused_or_made(folder, tmp_path, cache_dir):
    changed = records_of(folder, tmp_path / "records")
    changed.background = folder.background = (0, 0, 0)
    with pytest.raises(UserError, match="written with data.background=.255, 255, 255"):
        load_dataset(changed, cache_dir, LAZY)
    ours, theirs = load_dataset(changed, cache_dir, WHOLE), load_dataset(folder, cache_dir)
    assert ours.identity == theirs.identity


class Killed(Exception):
    pass


def test_a_writer_that_was_stopped_goes_on(folder, tmp_path, cache_dir, monkeypatch):
    listing, out = list_source(folder), tmp_path / "records"

    def stop(images):
        if list(out.glob("*.array_record")):
            raise Killed

    with pytest.raises(Killed):
        write_records(listing, folder, out, per_shard=7, progress=stop)
    (first,) = out.glob("*.array_record")
    written = first.stat().st_mtime_ns
    with pytest.raises(UserError, match="is unfinished"):
        open_records(out)
    with pytest.raises(UserError, match="begun with other images, labels, parts or options"):
        write_records(listing, folder, out, per_shard=8)
    seen = []
    assert write_records(listing, folder, out, per_shard=7, progress=seen.append)
    assert sum(seen) == len(listing.ids) and first.stat().st_mtime_ns == written
    assert {path.name for path in out.iterdir()} == {
        "index", "index.json", *(f"images-{k:05d}-of-00006.array_record" for k in range(6))
    }  # fmt: skip
    assert not write_records(listing, folder, out, per_shard=7, progress=seen.append)
    assert sum(seen) == 2 * len(listing.ids)


def test_records_of_other_data_are_told_apart(folder, tmp_path):
    listing, out = list_source(folder), tmp_path / "records"
    write_records(listing, folder, out, per_shard=7)
    listing.labels[0] ^= 1
    with pytest.raises(UserError, match="records of other labels"):
        write_records(listing, folder, out)
    listing.labels[0] ^= 1
    row = listing.ids.index("test/a/1.png")
    plain = listing.read
    listing.read = lambda i: plain(0 if i == row else i)
    with pytest.raises(UserError, match="test/a/1.png: the source changed since"):
        write_records(listing, folder, out)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="used is not empty"):
        write_records(listing, folder, tmp_path / "used")
    notes = json.loads((out / "index.json").read_text())
    assert notes["errors"] == {
        str(listing.ids.index("train/a/broken.png")): "this is no image file"
    }
