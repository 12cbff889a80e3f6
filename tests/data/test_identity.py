import shutil

import pytest

from data.identity import check_identity, difference, write_table
from errors import UserError
from input_pipeline import load_dataset
from tests.conftest import paint


@pytest.fixture
def content(make_folder, folder_config, cache_dir):
    """Returns a function: the identity of a folder's data, its table and its dataset.json."""

    def read(root, **changes):
        config = folder_config(root, **changes)
        dataset = load_dataset(config, str(root.parent / "cache"))
        return dataset.identity, dataset.identity_table, dataset.to_dict(config)

    return read


@pytest.fixture
def root(make_folder):
    return make_folder({"train/cat": 8, "train/dog": 8, "test/cat": 3, "test/dog": 3})


def test_a_data_set_is_the_same_wherever_it_lies_and_at_any_size(content, root):
    identity, table, _ = content(root)
    moved = shutil.copytree(root, root.parent / "elsewhere" / "moved")
    assert content(moved)[0] == identity
    assert content(root, image_size=16, resize="crop")[0] == identity
    assert len(table) == 22 and set(table.part) == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("add", "2 images added, such as train/cat/new0.png"),
        ("remove", "1 images removed, such as train/dog/0.png"),
        ("repaint", "1 images changed, such as train/cat/0.png"),
        ("relabel", "1 images removed, such as train/cat/1.png"),
    ],
)
def test_another_data_set_is_named_by_what_changed(content, root, change, message):
    identity, table, stored = content(root)
    write_table(table, root.parent / "audit", identity)
    if change == "add":
        for i in range(2):
            paint(900 + i).save(root / f"train/cat/new{i}.png")
    elif change == "remove":
        (root / "train/dog/0.png").unlink()
    elif change == "repaint":
        paint(900).save(root / "train/cat/0.png")
    else:
        (root / "train/cat/1.png").rename(root / "train/dog/moved.png")
    other = shutil.copytree(root, root.parent / "changed")  # a process looks at a folder once
    now, new_table, current = content(other)
    assert now != identity and message in difference(table, new_table)
    with pytest.raises(UserError, match="W/cnn/seed0 belongs to other images") as caught:
        check_identity(stored, current, "W/cnn/seed0", lambda: new_table, root.parent / "audit")
    assert message in str(caught.value)
    with pytest.raises(UserError, match="images then"):  # the old table was never kept
        check_identity(stored, current, "W/cnn/seed0", lambda: new_table, root.parent / "nowhere")


def test_labels_parts_and_groups_belong_to_it(content, root):
    _, table, _ = content(root)
    changed = table.copy()
    changed.loc["train/cat/3.png", "class"] = "dog"
    changed.loc["train/cat/4.png", ["part", "group"]] = ["test", "herd"]
    text = difference(table, changed)
    assert "1 labels changed, such as train/cat/3.png" in text
    assert "1 images moved to another part, such as train/cat/4.png" in text
    assert "1 images in another group, such as train/cat/4.png" in text
    assert content(root, split=(0.5, 0.5))[0] != content(root)[0]


def test_runs_of_older_versions_are_known_by_their_files(content, root):
    _, table, stored = content(root)
    old = {key: value for key, value in stored.items() if key != "identity"}
    check_identity(old, stored, "R", lambda: table, root)
    check_identity({}, stored, "R", lambda: table, root)
    with pytest.raises(UserError, match="R belongs to other images"):
        check_identity(old | {"fingerprint": "0"}, stored, "R", lambda: table, root)
