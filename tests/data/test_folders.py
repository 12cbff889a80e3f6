import os

import pytest

from data.folders import natural, part_of, read_folder
from data.formats import SUFFIXES, printable
from data.sources import list_source
from errors import UserError
from tests.conftest import paint


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("train", "train Training TRAIN training_set trainset train_images images-train seg_train"),
        ("validation", "val valid Validation dev eval val_images val2017 validation_set EVAL"),
        (
            "test",
            "test testing TEST test_set test_images seg_test TEST_SIMPLE test1 unlabeled_test",
        ),
        (None, "trains restrain bullet_train blood_test contest validity devil class1 bus tests"),
    ],
)
def test_names_of_parts(part, names):
    assert {name: part_of(name) for name in names.split()} == dict.fromkeys(names.split(), part)


def test_natural_order():
    names = ["10", "2", "1", "b10", "b9", "a", "01", "²", "x"]
    assert sorted(names, key=natural) == ["01", "1", "2", "10", "a", "b9", "b10", "x", "²"]


@pytest.mark.parametrize(
    "content",
    [
        {"training_set/a": 2, "training_set/b": 2, "test_set/a": 1, "test_set/b": 1},
        {"TRAIN/a": 2, "TRAIN/b": 2, "Test_Images/a": 1, "Test_Images/b": 1},
        {"train/train/a": 2, "train/train/b": 2, "test/a": 1, "test/b": 1},
        {"a/train": 2, "a/test": 1, "b/train": 2, "b/test": 1},
    ],
)
def test_parts_are_found(make_folder, folder_config, content):
    listing = list_source(folder_config(make_folder(content)))
    assert listing.class_names == ["a", "b"]
    assert sorted(listing.parts) == ["test"] * 2 + ["train"] * 4
    assert listing.left_out == {}


@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        ({"test": 12}, "test has no class folders"),
        ({"extra": 3}, "extra lies beside the parts"),
        ({"extra/deep/a": 3}, "extra lies beside the parts"),
        ({"train": 2}, "train has no class folders"),
        ({"": 1}, "no class folder"),
    ],
)
def test_what_lies_beside_the_parts_is_counted_and_named(
    make_folder, folder_config, capsys, content, left_out
):
    root = make_folder({"train/a": 2, "train/b": 2} | content)
    listing = list_source(folder_config(root))
    assert listing.class_names == ["a", "b"] and listing.parts == ["train"] * 4
    ((reason, names),) = listing.left_out.items()
    assert reason.startswith(left_out) and len(names) == sum(content.values())
    assert f"warning: {len(names)} files left out, such as {names[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": 2}, "holds 2 images, such as 0.png, but no class folders"),
        ({"train": 2, "test1": 2}, "no class folders"),
        ({"train": 2, "val": 2, "bus": 2}, "no class folders"),
        ({"": 2}, "no class folders"),
        ({"fold1/a": 1, "fold1/b": 1, "fold2/a": 1, "fold2/b": 1}, "both hold a and b"),
        ({"train/x/a": 1, "train/x/b": 1, "train/y/A": 1, "train/y/b": 1}, "both hold a and b"),
        ({"a/train": 1, "a/test": 1, "b": 2}, "images directly in it"),
        ({"a/train": 1, "a/test": 1, "b/train": 1, "b/more": 1}, "holds more"),
        ({"a/train": 1, "a/test": 1, "b/test": 1, "c/train": 1}, "class 'b' is not in"),
        ({"train/a": 1, "train/b": 1, "training/a": 1}, "both hold the train images"),
        ({"test/a": 1, "test/b": 1, "bus": 1}, "no train folder"),
        ({"train/a": 1, "train/b": 1, "val": 0}, "val holds no images"),
        ({"x/train/a": 1, "x/train/b": 1, "x/test/a": 1, "y/train/a": 1, "y/train/b": 1}, "both"),
    ],
)
def test_what_might_be_parts_is_never_a_class(make_folder, folder_config, content, message):
    with pytest.raises(UserError, match=message):
        list_source(folder_config(make_folder(content)))


def test_a_layout_that_is_given_ends_the_doubt(make_folder, folder_config):
    root = make_folder({"x/2019": 1, "x/2020": 1, "y/2019": 1, "y/2020": 1})
    with pytest.raises(UserError, match="--config.data.layout=class"):
        list_source(folder_config(root))
    assert list_source(folder_config(root, layout="class")).class_names == ["x", "y"]
    root = make_folder({"train": 2, "test": 3}, "signs")
    listing = list_source(folder_config(root, layout="class"))
    assert (listing.class_names, listing.labels.tolist()) == (["test", "train"], [0] * 3 + [1] * 2)


def test_a_class_named_train_is_noted(make_folder, folder_config, capsys):
    assert list_source(folder_config(make_folder({"bus": 1, "train": 1}))).parts == ["", ""]
    assert "train is taken as a class" in capsys.readouterr().err


def test_numbers_are_sorted_by_value(make_folder, folder_config):
    listing = list_source(folder_config(make_folder({str(i): 1 for i in range(1, 13)})))
    assert listing.class_names == [str(i) for i in range(1, 13)]
    by_id = dict(zip(listing.ids, listing.labels, strict=True))
    assert by_id["10/0.png"] == 9 and by_id["2/0.png"] == 1


def test_unicode_forms_of_a_name_are_one_class(make_folder, folder_config):
    composed, apart = "caf\u00e9", "cafe\u0301"
    root = make_folder(
        {f"train/{composed}": 2, "train/tea": 2, f"test/{apart}": 1, f"train/{apart}": 2}
    )
    listing = list_source(folder_config(root))
    assert listing.class_names == [composed, "tea"]
    assert listing.labels.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert len(set(listing.ids)) == 7
    assert f"test/{composed}/0.png" in listing.ids


def test_names_that_are_not_utf8_are_escaped(make_folder, folder_config, tmp_path):
    root = make_folder({"tea": 2})
    folder = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(folder)
    paint(9).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", folder + b"/\xff.png")
    listing = list_source(folder_config(root))
    assert listing.class_names == ["caf\\xe9", "tea"]
    assert "caf\\xe9/\\xff.png" in listing.ids
    for text in (*listing.ids, *listing.class_names):
        text.encode("utf-8")
    assert listing.read(listing.ids.index("caf\\xe9/\\xff.png")).startswith(b"\x89PNG")
    (root / "caf\\xe9").mkdir()
    paint(8).save(root / "caf\\xe9" / "\\xff.png")
    with pytest.raises(UserError, match="two files have names that read"):
        list_source(folder_config(root))


def test_system_folders_are_not_looked_into(make_folder, folder_config):
    root = make_folder({"a": 1, "b": 1, "__MACOSX/a": 2, "a/@eaDir": 2, ".hidden/a": 1})
    (root / "a" / "._0.png").write_bytes(b"\0\5")
    listing = list_source(folder_config(root))
    assert listing.ids == ["a/0.png", "b/0.png"]
    assert listing.left_out == {} and listing.strays == []


def test_links_are_followed_once_around(make_folder, folder_config, tmp_path, capsys):
    other = make_folder({"cats": 2, "more": 1}, "elsewhere")
    root = make_folder({"dog": 2}, first_seed=9)
    (root / "cat").symlink_to(other / "cats")
    (root / "dog" / "more").symlink_to(other / "more")
    (root / "dog" / "again.png").symlink_to(root / "dog" / "0.png")
    (root / "dog" / "loop").symlink_to(root)
    (other / "more" / "back").symlink_to(root / "dog")
    listing = list_source(folder_config(root))
    assert listing.ids == [
        *(f"cat/{i}.png" for i in range(2)),
        *(f"dog/{name}.png" for name in ("0", "1", "again", "more/0")),
    ]
    err = capsys.readouterr().err
    assert "dog/loop is a link back" in err and "dog/more/back is a link back" in err


def test_a_link_in_place_of_a_class_that_leads_nowhere_stops(make_folder, folder_config):
    root = make_folder({"a": 1, "b": 1})
    (root / "c").symlink_to("/nowhere/c")
    with pytest.raises(UserError, match="c is a link to /nowhere/c"):
        list_source(folder_config(root))


def test_a_folder_that_cannot_be_listed_stops(make_folder, folder_config, monkeypatch):
    root, listdir = make_folder({"a": 1, "b": 1}), os.listdir

    def refuse(path):
        if path == root / "b":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match="cannot list .*b: Permission denied"):
        list_source(folder_config(root))


def test_photos_that_cannot_be_read_are_counted(make_folder, tmp_path, monkeypatch):
    from data import folders

    monkeypatch.setattr(folders, "SUFFIXES", SUFFIXES - {".heic"})
    monkeypatch.setitem(folders.UNREAD, ".heic", "install pillow-heif")
    root = make_folder({"a": 1, "b": 1})
    for name in ("a/1.HEIC", "a/2.heic", "b/3.NEF", "b/notes.txt"):
        (root / name).write_bytes(b"\0\0\0\x18ftypheic")
    found = read_folder(root, "auto")
    assert found.left_out == {
        ".heic is not read: install pillow-heif": ["a/1.HEIC", "a/2.heic"],
        ".nef is not read: convert it to JPEG or PNG": ["b/3.NEF"],
    }
    assert found.strays == ["b/notes.txt"] and len(found.files) == 2
    (root / "b" / "0.png").unlink()
    with pytest.raises(UserError, match="b holds no images.*2 files there are not read.*3.NEF"):
        read_folder(root, "auto")


def test_every_ending_that_pillow_opens_is_read(make_folder, folder_config):
    assert {".jfif", ".jpe", ".jp2", ".jpg", ".png", ".webp", ".tga", ".ico", ".qoi"} <= SUFFIXES
    assert not {".pdf", ".h5", ".mpg", ".eps", ".txt", ".csv", ".json", ".py"} & SUFFIXES
    root = make_folder({"a": 1, "b": 1})
    for ending in ("JFIF", "jp2", "tga", "ppm", "avif"):
        paint(3).save(root / "a" / f"x.{ending}")
    assert len(list_source(folder_config(root)).ids) == 7


def test_printable():
    assert printable("e\u0301\n\udcff") == "\u00e9\n\\xff"
