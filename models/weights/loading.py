"""Finds pretrained weights by name (see `models/pretrained.py`) and loads them strictly."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from errors import UserError, choose
from models.classifier import Classifier, Preprocessing, merge_model, split_model
from models.weights.download import hub_file, url_file
from models.weights.formats import read_weights
from models.weights.names import head_of, normalise_names, source_names, to_our_layout
from models.weights.own import WEIGHTS, read_own
from models.weights.published import IMAGENET, PUBLISHED, Published

FORMATS = {"timm": "safetensors", "torchvision": "pytorch", "keras": "keras"}
OURS = ("archcompare", "run")
STRUCTURAL = ("form", "hidden")  # fields of an architecture that its weights decide
KERAS_PIXELS = ("normalization/mean", "normalization/variance", "normalization/count")
KERAS_STDDEV = (0.229, 0.224, 0.225)
SHOWN = 12  # mismatches of one kind in an error


@dataclass(frozen=True)
class Source:
    """Weights that a name stands for, before they are read."""

    name: str  # as the user gave it
    model: str  # key of `MODELS`
    family: str  # publisher whose names the file uses, or one of OURS for our own paths
    fields: dict  # of the architecture, that these weights need
    preprocessing: Preprocessing  # what they were trained on
    read: Callable[[], dict[str, np.ndarray]]
    facts: dict = field(default_factory=dict)  # of their origin, as `convert` stores them
    top: bool | None = None  # whether there is a classifier; None if only the file can tell


# --- names --------------------------------------------------------------------------------------


def find(name: str, model: str, fields: dict) -> Source:
    """Returns the weights of a name for an architecture, not yet read nor fetched.

    Args:
      name: see `models/pretrained.py`.
      model: key of `MODELS`; "" for the architecture that the weights are of.
      fields: of the architecture, given by the user; they may name the form of a local file.
    """
    family, colon, path = name.partition(":")
    if colon:
        choose(f"weights {name!r}: family", family, (*FORMATS, *OURS))
        make = _own if family in OURS else _local
        source = make(name, family, Path(path), model, fields)
    else:
        source = _published(name, model)
    if model and source.model != model:
        raise UserError(f"weights {name!r} are of {source.model}, not of {model}")
    for key, value in source.fields.items():
        if key in fields and _with_tuples(fields)[key] != value:
            raise UserError(
                f"weights {name!r} need {key}={value!r}, but {key}={fields[key]!r} was given: "
                "leave it out"
            )
    return source


def _published(name: str, model: str) -> Source:
    suited = [key for key, entry in PUBLISHED.items() if model in (entry.model, "")]
    if name not in PUBLISHED and not suited:
        raise UserError(f"weights {name!r}: no weights of {model} are published: use weights=none")
    what = f"weights of {model}" if model else "weights"
    entry = PUBLISHED[choose(what, name, PUBLISHED if name in PUBLISHED else suited)]
    stated = ("licence", "recipe", "top1", "revision", "url")
    return Source(
        name,
        entry.model,
        entry.family,
        {"form": entry.form} if entry.form else {},
        entry.preprocessing,
        lambda: _read(fetch(entry), entry.family),
        {"source": name} | {key: getattr(entry, key) for key in stated},
        top=entry.top,
    )


def fetch(entry: Published) -> Path:
    """Returns the local path of a published file, downloaded and verified."""
    if entry.url:
        return url_file(entry.url, sha256=entry.sha256, md5=entry.md5)
    return hub_file(entry.repository, "model.safetensors", entry.revision, entry.sha256)


def _read(path: Path, family: str) -> dict[str, np.ndarray]:
    return normalise_names(read_weights(path, FORMATS[family]), family)


def _local(name: str, family: str, path: Path, model: str, fields: dict) -> Source:
    """A publisher's file on this disk: preprocessing and form of the publisher's first entry."""
    if not model:
        raise UserError(f"weights {name!r} do not say of which architecture they are: give --model")
    entries = [e for e in PUBLISHED.values() if e.model == model and e.family == family]
    form = fields.get("form", entries[0].form if entries else "")
    forms = ["torch"] if family == "torchvision" else [e.form for e in entries]
    if form and forms:
        choose(f"weights {name!r} of {model}: form", form, dict.fromkeys(forms))
    pixels = next((e.preprocessing for e in entries if e.form == form), IMAGENET)
    needed = {"form": form} if form else {}
    facts = {"source": f"{family}:{path.name}"}  # folders say nothing elsewhere
    return Source(name, model, family, needed, pixels, lambda: _read(path, family), facts)


def _own(name: str, family: str, path: Path, model: str, fields: dict) -> Source:
    if family == "run":
        path /= WEIGHTS
        if not path.is_file():
            raise UserError(
                f"{name} is not the directory of a complete run, for it has no {WEIGHTS}; if an "
                "older version trained it, python -m analysis.export DIR FOLDER makes that file"
            )
    facts = read_own(path)
    arrays = facts.pop("arrays")
    return Source(
        name,
        facts["model"],
        family,
        _with_tuples({key: facts["fields"][key] for key in STRUCTURAL if key in facts["fields"]}),
        Preprocessing(**_with_tuples(facts["preprocessing"])),
        lambda: arrays,
        facts,
        top=facts["num_classes"] != 0,
    )


def _with_tuples(values: dict) -> dict:
    """Returns values as they were before JSON, which knows lists only."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


# --- loading ------------------------------------------------------------------------------------


def load(model: Classifier, source: Source) -> Classifier:
    """Returns the model with the weights of `source`, strictly: all of the file, all of the model.

    Only the classifier may differ: one of another width, or one that the file lacks, keeps its
    fresh initialisation, and a line says so. An error lists all that is wrong with the file.
    """
    _, params, stats = split_model(model)
    if not model.trained_by_gradient:
        return _load_memory(model, source, stats)
    ours = params | stats
    names, arrays = names_in(source, model, ours), source.read()
    given = {
        path: to_our_layout(
            arrays[name], source.family, path, ours[path].shape, model.flattened.get(path, ())
        )
        for path, name in names.items()
        if name in arrays
    }
    extra = set(arrays) - set(names.values())
    extra -= {name for name in extra if name.endswith("num_batches_tracked")}
    extra -= set(KERAS_PIXELS) if source.family == "keras" else set()
    theirs = set() if source.family in OURS else head_of(model, source.family, arrays)
    has_classifier = bool(theirs) if source.top is None else source.top
    replaced = source.family not in OURS and dict(model.fields).get("hidden") == 0
    fresh = {path for path in ours if path.startswith(f"stages.{len(model.stages) - 1}.")}
    if has_classifier and not replaced:
        fresh = {
            p for p in fresh & set(given) if _other_width(given[p], ours[p], model.num_classes)
        }
    else:
        extra -= theirs
    missing = [f"{names[p]} (for {p})" for p in ours if p not in given and p not in fresh]
    wrong = []
    for path in given.keys() - fresh:
        if given[path].shape != ours[path].shape:
            wrong.append(f"{names[path]}: {given[path].shape} instead of {ours[path].shape}")
        elif not np.isfinite(given[path]).all():
            wrong.append(f"{names[path]}: not every value is finite")
    _refuse(source, type(model).__name__, missing, extra, wrong)
    if fresh:
        _say(f"{source.name}: the classifier is new ({', '.join(sorted(fresh))})")
    filled = ours | {p: jnp.asarray(given[p], ours[p].dtype) for p in given.keys() - fresh}
    loaded = merge_model(model, {p: filled[p] for p in params}, {p: filled[p] for p in stats})
    loaded.preprocessing = pixels_of(source, arrays)
    return loaded


def names_in(source: Source, model: Classifier, paths: Collection[str]) -> dict[str, str]:
    """Returns {our path: name in the file of `source`}; refuses a publisher without names."""
    if source.family in OURS:
        return {path: path for path in paths}
    if source.family not in model.names:
        raise UserError(
            f"weights {source.name!r}: of {type(model).__name__}, files of "
            f"{' or '.join(model.names) or 'no publisher'} can be read, not of {source.family}"
        )
    return source_names(model, source.family, paths)


def _other_width(theirs: np.ndarray, ours, num_classes: int) -> bool:
    """Whether an array of a classifier differs from ours in the number of classes alone."""
    same = theirs.ndim == ours.ndim and theirs.shape[:-1] == ours.shape[:-1]
    return same and ours.shape[-1] == num_classes != theirs.shape[-1]


def _load_memory(model: Classifier, source: Source, stats: dict) -> Classifier:
    """Returns a model without gradient with what it remembers, whose shapes the data decided."""
    arrays = source.read()
    if set(arrays) != set(stats):
        raise UserError(f"weights {source.name!r} are not of {type(model).__name__}")
    loaded = merge_model(model, {}, {path: jnp.asarray(arrays[path]) for path in stats})
    loaded.preprocessing = source.preprocessing
    return loaded


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
