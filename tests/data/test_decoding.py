import io
import shutil

import numpy as np
import pytest
from PIL import Image

from data import decoding
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
