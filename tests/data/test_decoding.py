import fcntl
import io
import os
import shutil
import struct
import subprocess
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import decoding, sources
from data.cache import machine
from data.decoding import decode_all, perceptual_hash, resize, to_rgb
from data.sources import list_source
from errors import UserError
from tests.conftest import paint

WHITE = (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(data, background=WHITE) -> np.ndarray:
    return np.asarray(to_rgb(data, background)[0])


def test_every_mode_becomes_rgb():
    colour = paint(0)
    pixels = np.asarray(colour)
    assert np.array_equal(rgb(encoded(colour)), pixels)
    grey = colour.convert("L")
    assert np.array_equal(rgb(encoded(grey)), np.asarray(grey)[..., None].repeat(3, axis=2))
    palette = colour.quantize(256)
    assert np.array_equal(rgb(encoded(palette)), np.asarray(palette.convert("RGB")))
    cmyk = rgb(encoded(colour.resize((64, 64)).convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(cmyk.astype(int) - np.asarray(colour.resize((64, 64)))).mean() < 3
    one = Image.fromarray(np.eye(8, dtype=bool))
    assert np.array_equal(rgb(encoded(one))[..., 0], np.eye(8, dtype=np.uint8) * 255)


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert rgb(encoded(Image.fromarray(deep)))[0, :, 0].tolist() == [0, 1, 128, 255]
    deep32 = Image.fromarray(deep.astype(np.int32))
    assert rgb(encoded(deep32, "TIFF"))[0, :, 0].tolist() == [0, 1, 128, 255]
    with pytest.raises(ValueError, match="beyond 16 bits"):
        rgb(encoded(Image.fromarray(deep.astype(np.int32) + 70000), "TIFF"))
    with pytest.raises(ValueError, match="no stated range"):
        rgb(encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"))


def test_transparency_shows_the_background():
    image = Image.new("RGBA", (2, 1), (100, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert rgb(encoded(image), (10, 20, 30)).tolist() == [[[100, 0, 0], [10, 20, 30]]]
    half = Image.new("LA", (1, 1), (0, 128))
    assert abs(int(rgb(encoded(half))[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (1, 1))
    assert rgb(encoded(palette, transparency=0), (1, 2, 3)).tolist() == [[[1, 2, 3]]]


def test_exif_orientation_is_honoured():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees when shown
    image = paint(1, (4, 2))
    turned = rgb(encoded(image, "PNG", exif=exif))
    assert np.array_equal(turned, np.rot90(np.asarray(image), -1))


def test_broken_files_are_refused():
    jpeg = encoded(paint(2, (64, 64)), "JPEG")
    with pytest.raises(OSError, match="truncated"):
        to_rgb(jpeg[: len(jpeg) // 2], WHITE)
    with pytest.raises(ValueError, match="no image file"):
        to_rgb(b"these are words", WHITE)
    with pytest.raises(ValueError, match="no image file"):
        to_rgb(b"", WHITE)
    with pytest.raises(ValueError, match="64x64 pixels is over the limit.*config.data.max_pixels"):
        to_rgb(jpeg, WHITE, 100)


def test_an_enormous_image_is_refused_before_it_is_decoded():
    bomb = encoded(Image.new("1", (20000, 20000)))
    with pytest.raises(ValueError, match="20000x20000 pixels is over the limit"):
        to_rgb(bomb, WHITE)


def test_resizing():
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 20, 10))  # red, blue, red
    squashed = np.asarray(resize(image, 9, "squash", "nearest"))
    assert squashed.shape == (9, 9, 3)
    assert squashed[0, :, 2].tolist() == [0] * 3 + [255] * 3 + [0] * 3
    cropped = np.asarray(resize(image, 10, "crop", "bilinear"))
    assert cropped.shape == (10, 10, 3) and (cropped == [0, 0, 255]).all()


def test_perceptual_hash_ignores_scale_and_tells_images_apart():
    smooth = paint(3, (6, 6)).resize((96, 96), Image.BICUBIC)
    other = paint(4, (6, 6)).resize((96, 96), Image.BICUBIC)

    def distance(a, b):
        return bin(int(perceptual_hash(a)) ^ int(perceptual_hash(b))).count("1")

    assert distance(smooth, smooth.resize((48, 48))) <= 4
    assert distance(smooth, other) >= 16


def test_the_second_start_decodes_nothing_and_a_change_decodes_anew(
    make_folder, folder_config, tmp_path, monkeypatch
):
    root, cache = make_folder({"a": 3, "b": 2}), str(tmp_path / "cache")
    config = folder_config(root)
    first = decode_all(list_source(config), config, cache)
    expected = np.asarray(paint(1).resize((8, 8), Image.BILINEAR))
    assert np.array_equal(first.images[1], expected)
    assert first.facts["width"].tolist() == [12] * 5 and first.modes == ["RGB"] * 5

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoding, "to_rgb", refuse)
    second = decode_all(list_source(config), config, cache)
    assert np.array_equal(second.images, first.images)
    assert second.fingerprint == first.fingerprint
    monkeypatch.undo()
    config.image_size = 6
    assert decode_all(list_source(config), config, cache).images.shape == (5, 6, 6, 3)
    config.image_size = 8
    paint(99).save(root / "a" / "1.png")
    third = decode_all(list_source(config), config, cache)
    assert third.fingerprint != first.fingerprint
    assert not np.array_equal(third.images[1], first.images[1])
    assert np.array_equal(third.images[2], first.images[2])


def test_unreadable_images_are_recorded(make_folder, folder_config, cache_dir):
    root = make_folder({"a": 2, "b": 2})
    (root / "a" / "1.png").write_text("words")
    config = folder_config(root)
    decoded = decode_all(list_source(config), config, cache_dir)
    assert [bool(error) for error in decoded.errors] == [False, True, False, False]
    assert not decoded.images[1].any()


def test_a_cache_that_cannot_be_written_is_named(make_folder, folder_config, tmp_path):
    config = folder_config(make_folder({"a": 1, "b": 1}))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="runtime.cache_dir"):
        decode_all(list_source(config), config, str(tmp_path / "file"))


def test_an_interrupted_decoding_leaves_no_entry(make_folder, folder_config, tmp_path, monkeypatch):
    config, cache = folder_config(make_folder({"a": 1, "b": 1})), tmp_path / "cache"

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding.np, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        decode_all(list_source(config), config, str(cache))
    assert list((cache / "images").iterdir()) == []
    shutil.rmtree(cache)


# --- files as people have them --------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


LONG = zlib.compress(b"a" * 3_000_000)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iCCP", b"k\0\0" + LONG),
        chunk(b"iTXt", b"k\0\1\0\0\0" + LONG),
        chunk(b"zTXt", b"k\0\0" + LONG),
        chunk(b"iCCP", b"k\0\0no profile"),
        chunk(b"tEXt", b"k\0words")[:-1] + b"?",
        b"".join(chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(900_000))) for i in range(80)),
    ],
    ids=["iCCP", "iTXt", "zTXt", "broken iCCP", "broken checksum", "many texts"],
)
def test_a_png_is_read_whatever_its_metadata(extra):
    png = encoded(paint(1))
    assert np.array_equal(rgb(png[:33] + extra + png[33:]), np.asarray(paint(1)))


def test_a_jpeg_is_read_whatever_its_exif():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a description", 72.0
    jpeg = encoded(paint(1, (24, 16)), "JPEG", exif=exif)
    upright = rgb(encoded(paint(1, (24, 16)), "JPEG"))
    assert np.array_equal(rgb(jpeg), np.rot90(upright, -1))
    start = jpeg.index(b"Exif\0\0")
    length = int.from_bytes(jpeg[start - 2 : start]) - 2
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(jpeg)
        for _ in range(random.integers(1, 6)):
            broken[start + random.integers(length)] = random.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = rgb(bytes(broken))
        assert any(
            np.array_equal(pixels, np.rot90(p, k))
            for k in range(4)
            for p in (upright, upright[::-1])
        )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_is_read_whatever_its_exif(compression):
    tiff = encoded(paint(1), "TIFF", compression=compression, tiffinfo={0x8769: 99_999_999})
    assert np.array_equal(rgb(tiff), np.asarray(paint(1)))


def test_metadata_that_fail_are_left_aside(monkeypatch):
    def fail(*_):
        raise TypeError("odd type")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert np.array_equal(rgb(encoded(paint(1), "TIFF")), np.asarray(paint(1)))
    assert rgb(encoded(paint(1), "WEBP", lossless=True)).shape == (10, 12, 3)


def test_a_large_jpeg_is_decoded_small():
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = paint(3, (6, 5)).resize((1201, 900), Image.BICUBIC)
    data = encoded(photo, "JPEG", quality=95, exif=exif)
    whole, _ = to_rgb(data, WHITE)
    small, mode = to_rgb(data, WHITE, 400_000, 32)
    assert (small.size, small.info["stored"], mode) == ((450, 601), (900, 1201), "RGB")
    near = np.asarray(small.resize((32, 32)), int) - np.asarray(whole.resize((32, 32)), int)
    assert np.abs(near).mean() < 3
    for side, limit in (
        (0, 400_000),
        (400, 200_000),
        (32, 10_000),
    ):  # too small, or still too large
        with pytest.raises(ValueError, match="1201x900 pixels is over the limit"):
            to_rgb(data, WHITE, limit, side)


def test_the_audit_knows_the_full_size(make_folder, folder_config, cache_dir):
    root = make_folder({"a": 1, "b": 1})
    paint(3, (6, 5)).resize((300, 200)).save(root / "a" / "1.jpg")
    config = folder_config(root, max_pixels=20_000)
    decoded = decode_all(list_source(config), config, cache_dir)
    assert decoded.facts[1]["width"] == 300 and decoded.facts[1]["height"] == 200
    paint(3, (300, 200)).save(root / "a" / "2.png")
    decoded = decode_all(list_source(config), config, cache_dir)
    assert "300x200 pixels is over the limit of 20,000 pixels" in decoded.errors[2]
    config.max_pixels = 60_000  # raising the limit looks again
    assert decode_all(list_source(config), config, cache_dir).errors == [""] * 4


def test_files_that_cannot_be_read_are_entries(make_folder, folder_config, cache_dir, monkeypatch):
    root = make_folder({"a": 4, "b": 2})
    (root / "a" / "0.png").unlink()
    (root / "a" / "0.png").symlink_to("/nowhere/gone.png")
    (root / "a" / "1.png").unlink()
    os.mkfifo(root / "a" / "1.png")
    (root / "a" / "loop.png").symlink_to("loop.png")
    plain = sources.read_file

    def fail(path):
        if path.name == "2.png":
            raise OSError(5, "Input/output error")
        return plain(path)

    monkeypatch.setattr(sources, "read_file", fail)
    config = folder_config(root)
    decoded = decode_all(list_source(config), config, cache_dir)
    assert decoded.errors == [
        "this is a link to /nowhere/gone.png, which is missing",
        "this is no regular file",
        "Input/output error",
        "",
        "Too many levels of symbolic links",
        "",
        "",
    ]
    monkeypatch.undo()  # the disk is well again
    assert decode_all(list_source(config), config, cache_dir).errors[2] == ""


def test_a_file_that_changes_while_it_is_read_is_named(make_folder, folder_config, tmp_path):
    root = make_folder({"a": 1, "b": 1})
    listing, cache = list_source(folder_config(root)), tmp_path / "cache"
    for change in (lambda path: paint(77).save(path), Path.unlink):
        listing.digests = None
        list(decoding._digests(listing))
        change(root / "b" / "0.png")
        with pytest.raises(UserError, match="b/0.png.* start again"):
            decode_all(listing, folder_config(root), str(cache))
    assert list((cache / "images").iterdir()) == []


# --- the cache ------------------------------------------------------------------------------------


def entry_of(cache: Path) -> Path:
    (entry,) = (cache / "images").iterdir()
    return entry


@pytest.mark.parametrize("name", ["images.npy", "facts.npy", "notes.json"])
@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "zeros", "other bytes"])
def test_a_damaged_entry_is_made_anew(make_folder, folder_config, tmp_path, name, damage):
    config, cache = folder_config(make_folder({"a": 2, "b": 2})), tmp_path / "cache"
    listing = list_source(config)
    whole = decode_all(listing, config, str(cache))
    images, facts = np.array(whole.images), whole.facts.copy()
    del whole
    path = entry_of(cache) / name
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[: len(content) - 9],
                "zeros": bytes(len(content)),  # as after a power cut
                "other bytes": content[:-9] + bytes(b ^ 1 for b in content[-9:]),
            }[damage]
        )
    again = decode_all(listing, config, str(cache))
    assert np.array_equal(again.images, images) and np.array_equal(again.facts, facts)
    assert sorted(p.name for p in entry_of(cache).iterdir()) == [
        "facts.npy",
        "images.npy",
        "notes.json",
    ]


def test_a_file_in_the_place_of_an_entry_is_moved_aside(make_folder, folder_config, tmp_path):
    config, cache = folder_config(make_folder({"a": 1, "b": 1})), tmp_path / "cache"
    decode_all(list_source(config), config, str(cache))
    entry = entry_of(cache)
    shutil.rmtree(entry)
    entry.write_text("no folder")
    assert decode_all(list_source(config), config, str(cache)).images.any()
    assert entry_of(cache).is_dir()


def test_leftovers_of_killed_processes_are_swept(make_folder, folder_config, tmp_path):
    config, images = folder_config(make_folder({"a": 1, "b": 1})), tmp_path / "cache" / "images"
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = (f".part-{machine()}-{os.getppid()}-x", ".part-elsewhere-1-x")
    gone = (f".part-{machine()}-{dead.pid}-x", ".part-elsewhere-2-x", ".part-abc")
    for name in (*kept, *gone):
        (images / name).mkdir(parents=True)
        (images / name / "images.npy").write_bytes(b"half")
    for name in gone[1:]:
        for path in (images / name / "images.npy", images / name):
            os.utime(path, (1e9, 1e9))
    decode_all(list_source(config), config, str(tmp_path / "cache"))
    assert sorted(p.name for p in images.iterdir() if p.name[0] == ".") == sorted(kept)


def test_decoding_needs_neither_fallocate_nor_locks(
    make_folder, folder_config, tmp_path, monkeypatch
):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(fcntl, "flock", None)
    monkeypatch.setattr(fcntl, "lockf", None)
    config = folder_config(make_folder({"a": 1, "b": 1}))
    assert decode_all(list_source(config), config, str(tmp_path / "cache")).images.any()


def test_a_full_disk_is_an_error_that_leaves_nothing(
    make_folder, folder_config, tmp_path, monkeypatch
):
    config, cache = folder_config(make_folder({"a": 1, "b": 1})), tmp_path / "cache"
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: len(data) // 2)
    with pytest.raises(UserError, match="no space left.*\n.*runtime.cache_dir"):
        decode_all(list_source(config), config, str(cache))
    assert list((cache / "images").iterdir()) == []


def test_a_stop_while_decoding_ends_soon_and_leaves_nothing(
    make_folder, folder_config, tmp_path, monkeypatch
):
    config, cache = folder_config(make_folder({"a": 200, "b": 200})), tmp_path / "cache"
    listing, decoded = list_source(config), []
    plain = decoding._decode_one

    def slowly(data, config):
        decoded.append(1)
        time.sleep(0.01)
        return plain(data, config)

    def press(done, *_, **__):
        yield next(done)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "_decode_one", slowly)
    monkeypatch.setattr(decoding, "tqdm", press)
    with pytest.raises(KeyboardInterrupt):
        decode_all(listing, config, str(cache))
    assert len(decoded) < 100
    assert list((cache / "images").iterdir()) == []


def test_heic_is_read_where_pillow_heif_is_installed(make_folder, folder_config, cache_dir):
    pytest.importorskip("pillow_heif")
    root = make_folder({"a": 1, "b": 1})
    paint(3, (6, 5)).resize((64, 48)).save(root / "a" / "photo.HEIC", quality=90)
    config = folder_config(root)
    listing = list_source(config)
    assert listing.ids[1] == "a/photo.HEIC" and listing.left_out == {}
    decoded = decode_all(listing, config, cache_dir)
    assert decoded.errors == [""] * 3 and decoded.facts["width"][1] == 64
