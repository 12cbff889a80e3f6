"""Finds pretrained weights by name (see `models/pretrained.py`) and loads them strictly."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from errors import UserError, choose
from models.classifier import Classifier, Preprocessing, merge_model, split_model
from models.weights import names as conversion
from models.weights.download import hub_file, url_file
from models.weights.formats import read_weights
from models.weights.own import read_own
from models.weights.published import IMAGENET, PUBLISHED, Published

FORMATS = {"timm": "safetensors", "torchvision": "pytorch", "keras": "keras"}
OURS = ("archcompare", "run")
STRUCTURAL = ("form", "hidden")  # fields of an architecture that its weights decide
KERAS_PIXELS = ("normalization/mean", "normalization/variance", "normalization/count")
KERAS_STDDEV = (0.229, 0.224, 0.225)
SHOWN = 12  # mismatches of one kind in an error


@dataclass(frozen=True)
class Source:
    """Weights that were found, before they are read.

    Attributes:
      name: as the user gave it.
      family: publisher whose names the file uses, or one of OURS for our own paths.
      fields: of the architecture, that these weights need.
      preprocessing: what they were trained on.
      read: returns {name: array}.
      top: whether there is a classifier in the file; None if only the file can tell.
      reference: mean and variance of each stage's output on the images they were trained on,
        {} where unknown; see `preflight.py`.
    """

    name: str
    family: str
    fields: dict
    preprocessing: Preprocessing
    read: Callable[[], dict[str, np.ndarray]]
    top: bool | None = None
    reference: dict = field(default_factory=dict)


# --- names --------------------------------------------------------------------------------------


def find(name: str, model: str, fields: dict) -> Source:
    """Returns the weights of a name for an architecture; fetches a published file if need be.

    Args:
      name: see `models/pretrained.py`.
      model: key of `MODELS`.
      fields: of the architecture, given by the user; they may name the form of a local file.

    Raises:
      UserError: an unknown name (the nearest is suggested), weights of another architecture, a
        file that is missing or damaged, or no network.
    """
    family, colon, path = name.partition(":")
    if not colon:
        published = PUBLISHED[_choose_published(name, model)]
        return _published(published, model, fields)
    choose(f"weights {name!r}: family", family, (*FORMATS, *OURS))
    if family in OURS:
        return _own(name, family, model, read_own(Path(path)), fields)
    return _local(name, family, Path(path), model, fields)


def _choose_published(name: str, model: str) -> str:
    suited = [key for key, entry in PUBLISHED.items() if entry.model == model]
    if name not in PUBLISHED and not suited:
        raise UserError(f"weights {name!r}: no weights of {model} are published: use weights=none")
    return choose(f"weights of {model}", name, PUBLISHED if name in PUBLISHED else suited)


def _published(published: Published, model: str, fields: dict) -> Source:
    if published.model != model:
        raise UserError(f"weights {published.name!r} are of {published.model}, not of {model}")
    needed = {"form": published.form} if published.form else {}
    _check_fields(published.name, needed, fields)

    def read() -> dict[str, np.ndarray]:
        return read_weights(fetch(published), FORMATS[published.family])

    return Source(
        published.name, published.family, needed, published.preprocessing, read, published.top
    )


def fetch(published: Published) -> Path:
    """Returns the local path of a published file, downloaded and verified."""
    if published.url:
        return url_file(published.url, sha256=published.sha256, md5=published.md5)
    return hub_file(published.repository, "model.safetensors", published.revision, published.sha256)


def _local(name: str, family: str, path: Path, model: str, fields: dict) -> Source:
    """A publisher's file on this disk: preprocessing and form of the publisher's first entry."""
    entries = [e for e in PUBLISHED.values() if e.model == model and e.family == family]
    form = fields.get("form", entries[0].form if entries else "")
    forms = ["torch"] if family == "torchvision" else [e.form for e in entries]
    if form and forms:
        choose(f"weights {name!r} of {model}: form", form, dict.fromkeys(forms))
    entry = next((e for e in entries if e.form == form), None)
    preprocessing = entry.preprocessing if entry else IMAGENET
    needed = {"form": form} if form else {}
    return Source(name, family, needed, preprocessing, lambda: read_weights(path, FORMATS[family]))


def _own(name: str, family: str, model: str, stored: dict, fields: dict) -> Source:
    if stored["model"] != model:
        raise UserError(f"weights {name!r} are of {stored['model']}, not of {model}")
    needed = {key: stored["fields"][key] for key in STRUCTURAL if key in stored["fields"]}
    needed = _with_tuples(needed)
    _check_fields(name, needed, fields)
    return Source(
        name,
        family,
        needed,
        Preprocessing(**_with_tuples(stored["preprocessing"])),
        lambda: stored["arrays"],
        top=stored.get("num_classes") != 0,
        reference=stored.get("reference") or {},
    )


def _with_tuples(values: dict) -> dict:
    """Returns values as they were before JSON, which knows lists only."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def _check_fields(name: str, needed: dict, given: dict) -> None:
    for key, value in needed.items():
        if key in given and _with_tuples(given)[key] != value:
            raise UserError(
                f"weights {name!r} need {key}={value!r}, but {key}={given[key]!r} was given: "
                "leave it out"
            )


# --- loading ------------------------------------------------------------------------------------


def load(model: Classifier, source: Source) -> Classifier:
    """Returns the model with the weights of `source`, strictly: all of the file, all of the model.

    Only the classifier may differ: one of another width, or one that the file lacks, keeps its
    fresh initialisation, and a line says so.

    Raises:
      UserError: lists every array that is missing, left over, of another shape or not finite.
    """
    known = conversion.published_by(model)
    if source.family not in (*known, *OURS):
        raise UserError(
            f"weights {source.name!r}: of {type(model).__name__}, files of "
            f"{' or '.join(known) or 'no publisher'} can be read, not of {source.family}"
        )
    _, params, stats = split_model(model)
    if not model.trained_by_gradient:
        return _load_memory(model, source, stats)
    ours, arrays = params | stats, conversion.normalise_names(source.read(), source.family)
    head = f"stages.{len(model.stages) - 1}."
    names = (
        {path: path for path in ours}
        if source.family in OURS
        else conversion.source_names(model, source.family, list(ours))
    )
    ignored = {name for name in arrays if name.endswith("num_batches_tracked")}
    if source.family == "keras":
        ignored |= set(KERAS_PIXELS)
    found, extra = {}, set(arrays) - set(names.values()) - ignored
    fresh = _fresh_head(model, source, arrays, extra, ours, head)
    missing, wrong = [], []
    for path, name in names.items():
        if path in fresh:
            continue
        if name not in arrays:
            missing.append(f"{name} (for {path})")
            continue
        array = arrays[name]
        if source.family not in OURS:
            array = conversion.to_our_layout(array, source.family, path, ours[path].shape)
        elif path.endswith(".positions"):
            array = conversion.resize_positions(array, ours[path].shape[1])
        if array.shape != ours[path].shape:
            wrong.append(f"{name}: {array.shape} instead of {ours[path].shape}")
        elif not np.isfinite(array).all():
            wrong.append(f"{name}: not every value is finite")
        found[path] = jnp.asarray(array, ours[path].dtype)
    _refuse(source, type(model).__name__, missing, extra, wrong)
    if fresh:
        _say(f"{source.name}: the classifier is new ({', '.join(sorted(fresh))})")
    filled = {path: found.get(path, value) for path, value in ours.items()}
    loaded = merge_model(model, {p: filled[p] for p in params}, {p: filled[p] for p in stats})
    loaded.preprocessing = pixels_of(source, arrays)
    return loaded


def _load_memory(model: Classifier, source: Source, stats: dict) -> Classifier:
    """Returns a model without gradient with what it remembers, whose shapes the data decided."""
    arrays = source.read()
    if set(arrays) != set(stats):
        raise UserError(f"weights {source.name!r} are not of {type(model).__name__}")
    loaded = merge_model(model, {}, {path: jnp.asarray(arrays[path]) for path in stats})
    loaded.preprocessing = source.preprocessing
    return loaded


def _fresh_head(model, source, arrays, extra: set[str], ours: dict, head: str) -> set[str]:
    """Returns the paths of the head that are not loaded; takes the file's own head from `extra`."""
    paths = {path for path in ours if path.startswith(head)}
    if source.family in OURS:
        if not source.top:
            return paths
        names = {path: path for path in paths}
    else:
        pattern = conversion.HEAD[source.family]
        theirs = {name for name in arrays if re.fullmatch(pattern, name)}
        top = bool(theirs) if source.top is None else source.top
        if not top or dict(model.fields).get("hidden") == 0:
            extra -= theirs
            return paths
        names = conversion.source_names(model, source.family, list(paths))
    fresh = set()
    for path, name in names.items():
        if name not in arrays:
            continue
        width, array = ours[path].shape[-1], arrays[name]
        if source.family not in OURS:
            array = conversion.to_our_layout(array, source.family, path, ours[path].shape)
        same = array.ndim == ours[path].ndim and array.shape[:-1] == ours[path].shape[:-1]
        if width == model.num_classes and same and array.shape[-1] != width:
            fresh.add(path)
    return fresh


def _refuse(source: Source, architecture: str, missing, extra, wrong) -> None:
    """Raises if anything is in one of the lists, with all of them."""
    report = []
    for what, lines in (
        ("missing from the file", missing),
        ("in the file but not in the model", extra),
        ("of another shape or damaged", wrong),
    ):
        if lines:
            more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
            report.append(f"{len(lines)} {what}:\n  " + "\n  ".join(sorted(lines)[:SHOWN]) + more)
    if report:
        raise UserError(
            f"weights {source.name!r} do not fit {architecture}: "
            + "\n".join(report)
            + "\nIs the file whole, and made for this architecture and form?"
        )


@functools.cache  # once a process, not once a run
def _say(text: str) -> None:
    print(text, flush=True)


def pixels_of(source: Source, arrays: dict[str, np.ndarray]) -> Preprocessing:
    """Returns the preprocessing of weights; Keras' EfficientNet keeps a part of it in its file.

    There, a normalisation layer divides by the square root of its stored variance. In the files
    trained on ImageNet that "variance" is the standard deviation, and the network built for them
    divides by its square root once more; the whole is a division by the standard deviation.
    """
    mean, variance = (arrays.get(name) for name in KERAS_PIXELS[:2])
    if source.family != "keras" or mean is None or variance is None:
        return source.preprocessing
    variance = np.asarray(variance, np.float64)
    published = np.allclose(variance, KERAS_STDDEV, rtol=1e-3)
    std = variance if published else np.sqrt(variance)
    values = {"mean": tuple(np.asarray(mean, float).tolist()), "std": tuple(std.tolist())}
    return replace(source.preprocessing, scale=1 / 255, **values)
