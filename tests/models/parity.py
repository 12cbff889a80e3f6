"""Holds our networks against timm, torchvision and Keras with the same random weights.

    python -m tests.models.parity                  # the table of all pairs (minutes)
    python -m tests.models.parity --golden         # also writes the golden files of the tests

Each reference is filled with seeded random weights, BatchNorm statistics included, which are saved
in its family's own file format; the reference reads them with its library's loader and our network
with ours.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models import MODELS, create_model
from models.classifier import in_mode
from tests.models.reference import KERAS, build, images_for, our_stages, relative_error
from tests.models.synthetic import FILE_NAMES, random_weights, write_weights

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = 64  # values of a stage's output that a golden file keeps


@dataclass(frozen=True)
class Pair:
    """A network and the family that publishes the same."""

    family: str
    model: str
    form: str = ""
    sizes: tuple[int, int] = (96, 64)
    golden: bool = False

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.family, self.model, self.form)))

    @property
    def fields(self) -> dict:
        return {"form": self.form} if self.form else {}


def _pairs() -> list[Pair]:
    large = [name for name in MODELS if MODELS[name].__module__.split(".")[-1] in FILES]
    golden = {"resnet18", "resnet50", "efficientnet_b0", "mobilenet_v2", "vit_s16"}
    pairs = []
    for name in large:
        kind = MODELS[name].__module__.split(".")[-1]
        form = "torch" if kind in ("resnet", "efficientnet", "mobilenet") else ""
        pairs.append(Pair("timm", name, form, golden=name in golden))
        if kind == "efficientnet":
            pairs.append(Pair("timm", name, "tf", (97, 64), golden=name == "efficientnet_b0"))
        if name != "vit_s16":
            pairs.append(
                Pair("torchvision", name, form, golden=name in golden - {"resnet50", "vit_s16"})
            )
        if name in KERAS:
            form = {"resnet": "keras", "vgg": ""}.get(kind, "tf")
            sizes = (224, 224) if kind == "vgg" else (97, 64) if kind == "resnet" else (96, 65)
            pairs.append(Pair("keras", name, form, sizes, golden=name in golden))
    return pairs


FILES = ("vgg", "resnet", "efficientnet", "mobilenet", "vit")
PAIRS = _pairs()


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
        model = in_mode(model, training=False)
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


def main() -> None:
    """Prints the table; writes golden files if asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--only", default="", help="part of a pair's name")
    options = parser.parse_args()
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
        if options.golden and pair.golden:
            np.savez_compressed(GOLDEN / f"{pair.name}.npz", **golden)


if __name__ == "__main__":
    main()
