"""A model in any form, and mistakes on the way to it."""

import json
import zipfile

import numpy as np
import pytest

from analysis.answers import WIDTH, answering
from deploy.load import load, package
from errors import UserError
from models import create_model
from tests.deploy.parity import FACTS


def test_answers_hold_the_logits_and_numbers_of_every_image():
    model = create_model("cnn", 3, image_size=16)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    found = answering(model)(images)
    np.testing.assert_allclose(found["logits"], model(model.preprocess(images)), atol=1e-5)
    assert found["features"].shape == (5, WIDTH) and found["features"].dtype == np.float32
    assert np.ptp(found["features"], axis=0).min() > 0  # images differ in every number


@pytest.mark.parametrize("name", ["model.onnx", "model.stablehlo", "model.safetensors"])
def test_a_file_that_is_lost_or_no_model_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=name.split(".")[-1] if "safe" not in name else "complete"):
        load(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=name):
        load(tmp_path / name)


@pytest.mark.parametrize(
    "program, facts, message",
    [
        (b"", FACTS, "is damaged"),
        (b"xx" * 100, FACTS, "is damaged"),
        (b"", {"temperature": 1.0}, "KeyError.'review_thresholds'.*not written by deploy.export"),
        (b"", [], "not written by deploy.export"),
    ],
)
def test_programs_that_are_damaged_or_of_others_are_refused(tmp_path, program, facts, message):
    with zipfile.ZipFile(tmp_path / "model.stablehlo", "w") as members:
        members.writestr("program.bin", program)
        members.writestr("facts.json", json.dumps(facts))
    with pytest.raises(UserError, match=rf"model.stablehlo .*{message}"):
        load(tmp_path)


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[onnx\]'"):
        package("no_such_package_at_all", "onnx")
