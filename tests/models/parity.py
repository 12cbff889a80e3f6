"""Holds our networks against those of other libraries with the same random weights.

    python -m tests.models.parity                  # the table of all pairs (minutes)
    python -m tests.models.parity --golden         # also writes the golden files of the tests anew
    python -m tests.models.parity --verify timm/resnet50.tv_in1k

The last compares published weights, or a file with --model=NAME, in both networks. Otherwise each
reference is filled with seeded random weights, BatchNorm statistics included, which are
saved in its family's own file format; the reference reads them with its library's loader and our
network with ours.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError, choose
from models import MODELS, create_model
from models.pretrained import shape_of
from models.weights.loading import OURS, fetch, find
from models.weights.published import PUBLISHED
from tests.models.reference import (
    NETWORKS,
    build,
    images_for,
    our_stages,
    relative_error,
    require,
)
from tests.models.synthetic import FILE_NAMES, random_weights, write_weights

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = 64  # values of a stage's output that a golden file keeps
TOLERANCE = 1e-4  # of the largest value; float32 sums in another order stay below 1e-5
# Odd sizes where padding is `SAME`; Keras' VGG takes its own size only.
SIZES = {
    ("timm", "tf"): (97, 64),
    ("lukemelas", "tf"): (97, 64),
    ("keras", "keras"): (97, 64),
    ("keras", "tf"): (96, 65),
    ("keras", ""): (224, 224),
}


@dataclass(frozen=True)
class Pair:
    """A network and the family that publishes the same."""

    family: str
    model: str
    form: str = ""

    @property
    def sizes(self) -> tuple[int, int]:
        return SIZES.get((self.family, self.form), (96, 64))

    @property
    def golden(self) -> Path:
        """Where the outputs of the reference are kept, of some networks."""
        return GOLDEN / f"{self.name}.npz"

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.family, self.model, self.form)))

    @property
    def fields(self) -> dict:
        return {"form": self.form} if self.form else {}


def _forms(name: str, family: str) -> list[str]:
    """Returns the forms that a publisher has of the architectures of a file."""
    file = MODELS[name].__module__
    entries = [e for e in PUBLISHED.values() if MODELS[e.model].__module__ == file]
    if family == "torchvision":
        return ["torch" if any(entry.form for entry in entries) else ""]
    return list(dict.fromkeys(entry.form for entry in entries if entry.family == family))


PAIRS = [
    Pair(family, name, form)
    for name, families in NETWORKS.items()
    for family in families
    for form in _forms(name, family)
]


def compare(pair: Pair, folder: Path) -> tuple[float, float, dict]:
    """Returns the largest relative error of logits and of any stage, and golden content."""
    errors, stage_errors, golden = [], [], {}
    for size in pair.sizes:
        reference = build(pair.family, pair.model, pair.fields, 1000, size)
        path = folder / FILE_NAMES[pair.family]
        shapes = reference.shapes
        if "positions" in shapes or "pos_embed" in shapes or "encoder.pos_embedding" in shapes:
            path = folder / f"{size}-{path.name}"
        write_weights(path, random_weights(shapes, pair.family), pair.family)
        reference.load(path)
        model = create_model(
            pair.model, 1000, weights=f"{pair.family}:{path}", image_size=size, **pair.fields
        )
        images = images_for(size)
        stages, logits = our_stages(model, images)
        their_stages, their_logits = reference.run(images)
        assert len(stages) == len(their_stages)
        errors.append(relative_error(logits, their_logits))
        stage_errors += [relative_error(*both) for both in zip(stages, their_stages, strict=True)]
        golden[f"logits{size}"] = their_logits
        for i, stage in enumerate(their_stages):
            flat = stage.reshape(-1)
            golden[f"stage{size}.{i}"] = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
            golden[f"largest{size}.{i}"] = np.abs(flat).max()
    golden["shapes"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
    return max(errors), max(stage_errors), golden


def verify(name: str, model: str, form: str) -> float:
    """Prints and returns the largest relative error of our network with these weights.

    Of the stages alone where the file has no classifier.
    """
    fields = {"form": form} if form else {}
    source = find(name, model, fields)
    if source.family in OURS:
        raise UserError(f"weights {name!r} are our own: verify those that they were made from")
    require(source.family)
    num_classes, size = shape_of(source, source.model, fields)
    ours = create_model(source.model, num_classes or 2, weights=name, image_size=size, **fields)
    theirs = build(source.family, source.model, dict(ours.fields), num_classes, size)
    theirs.load(fetch(PUBLISHED[name]) if name in PUBLISHED else Path(name.partition(":")[2]))
    (stages, logits), (their_stages, their_logits) = (
        our_stages(ours, images_for(size)),
        theirs.run(images_for(size)),
    )
    errors = [relative_error(*both) for both in zip(stages, their_stages, strict=True)]
    told = f"any of {len(errors)} stages {max(errors):.1e}"
    if their_logits is not None:
        errors.append(relative_error(logits, their_logits))
        told = f"logits {errors[-1]:.1e}, {told}"
    agree = "agrees" if max(errors) <= TOLERANCE else f"DIFFERS by more than {TOLERANCE:.0e}"
    print(f"{name}: {agree} with {source.family} at {size} pixels; largest relative error: {told}")
    return max(errors)


def main() -> int:
    """Prints the table, and writes golden files if asked; or verifies weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--golden", action="store_true", help="of new networks: those of --only")
    parser.add_argument("--only", default="", help="part of a pair's name")
    parser.add_argument("--verify", default="", help="name of weights, see models/pretrained.py")
    parser.add_argument("--model", default="", help="architecture, of a local file")
    parser.add_argument("--form", default="", help="of the architecture, where it has several")
    options = parser.parse_args()
    if options.verify:
        try:
            model = options.model and choose("--model", options.model, MODELS)
            return int(verify(options.verify, model, options.form) > TOLERANCE)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(
        "| family | architecture | form | logits | any stage |\n| --- | --- | --- | ---: | ---: |"
    )
    for pair in PAIRS:
        if options.only not in pair.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            error, stage_error, golden = compare(pair, Path(folder))
        form = pair.form or "-"
        print(
            f"| {pair.family} | {pair.model} | {form} | {error:.1e} | {stage_error:.1e} |",
            flush=True,
        )
        if options.golden and (options.only or pair.golden.exists()):
            np.savez_compressed(pair.golden, **golden)
    return 0


if __name__ == "__main__":
    sys.exit(main())
