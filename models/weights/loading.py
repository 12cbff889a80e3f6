"""Finds pretrained weights by name (see `models/pretrained.py`) and loads them strictly."""

import functools
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from errors import UserError, choose
from models.classifier import Classifier, Preprocessing, merge_model, split_model
from models.weights.download import digest, hub_file, package_file, url_file
from models.weights.formats import check_file, read_weights
from models.weights.names import head_of, normalise_names, source_names, to_our_layout
from models.weights.own import WEIGHTS, read_own
from models.weights.published import PUBLISHED, Published, unlisted

FORMATS = {
    "timm": "safetensors",
    "torchvision": "pytorch",
    "lukemelas": "pytorch",
    "keras": "keras",
}
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
    if entry.package:
        return package_file(entry.package, entry.file, entry.sha256)
    if entry.url:
        return url_file(entry.url, sha256=entry.sha256, md5=entry.md5)
    return hub_file(entry.repository, "model.safetensors", entry.revision, entry.sha256)


def _read(path: Path, family: str) -> dict[str, np.ndarray]:
    return normalise_names(read_weights(path, FORMATS[family]), family)


def _local(name: str, family: str, path: Path, model: str, fields: dict) -> Source:
    """A publisher's file on this disk, with the preprocessing of its first entry, if it has one."""
    if not model:
        raise UserError(f"weights {name!r} do not say of which architecture they are: give --model")
    entries = [e for e in PUBLISHED.values() if e.model == model and e.family == family]
    forms = _forms(family, model)
    form = fields.get("form") or (forms[0] if len(forms) == 1 else "")
    if forms and not form:
        check_file(path)
        known = digest(path, "sha256")
        form = next((e.form for e in entries if e.sha256 == known), "")
    if forms and not form:
        raise UserError(
            f"weights {name!r}: {family} publishes {model} in the forms {' and '.join(forms)}, "
            "whose files do not tell which they are: say it with "
            f"--config.per_model.{model}.model.form={'|'.join(forms)} (of timm, tf is tf_{model}; "
            "models.pretrained takes --form)"
        )
    if form and forms:
        choose(f"weights {name!r} of {model}: form", form, forms)
    listed = next((e.preprocessing for e in entries if e.form == form), None)
    pixels = listed or unlisted(family, model, form, path.name)
    needed = {"form": form} if form else {}
    facts = {"source": f"{family}:{path.name}"}  # folders say nothing elsewhere
    return Source(name, model, family, needed, pixels, lambda: _read(path, family), facts)


def _forms(family: str, model: str) -> list[str]:
    """Returns the forms in which a publisher has models of a kin, [] where there is one only."""
    kin = re.match("[a-z]+", model)[0]
    entries = [e for e in PUBLISHED.values() if e.form and e.model.startswith(kin)]
    if family == "torchvision":  # of which no files are listed
        return ["torch"] if entries else []
    return list(dict.fromkeys(e.form for e in entries if e.family == family))


def _own(name: str, family: str, path: Path, model: str, fields: dict) -> Source:
    if family == "run":
        path /= WEIGHTS
        if not path.is_file():
            raise UserError(
                f"{name} is not the directory of a complete run, for it has no {WEIGHTS}; if an "
                "older version trained it, python -m deploy.export DIR FOLDER makes that file"
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


def load(model: Classifier, source: Source, class_names: Sequence[str] | None = None) -> Classifier:
    """Returns the model with the weights of `source`, strictly: all of the file, all of the model.

    Only the classifier may differ: one of another width, one of other classes than `class_names`,
    or one that the file lacks, keeps its fresh initialisation, and a line says so. An error lists
    all that is wrong with the file.
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
    why = ""
    if has_classifier and not replaced:
        head = fresh & set(given)
        fresh = {p for p in head if _other_width(given[p], ours[p], model.num_classes)}
        if class_names and all(given[p].shape == ours[p].shape for p in head):
            fresh, why = _by_name(model, source, class_names, given, head)
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
        _say(f"{source.name}: the classifier is new ({', '.join(sorted(fresh))}){why}")
    elif class_names:
        _say(f"{source.name}: the classifier is kept, for its classes are the same")
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


def _by_name(
    model: Classifier, source: Source, class_names: Sequence[str], given: dict, head: set[str]
) -> tuple[set[str], str]:
    """Returns which arrays of a classifier are of other classes, and why; or brings them in order.

    `head` are the paths of the last stage; `given` changes.
    """
    kernels = [
        p
        for p in given
        if p in head and p.endswith(".kernel") and given[p].shape[-1] == model.num_classes
    ]
    layer = kernels[-1].rpartition(".")[0] if kernels else ""  # the last, in forward order
    last = {p for p in head if p.startswith(f"{layer}.")} or head
    ours = [unicodedata.normalize("NFC", name) for name in class_names]
    theirs = [unicodedata.normalize("NFC", name) for name in source.facts.get("class_names", ())]
    if not theirs and len(ours) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in ours):
        theirs = sorted(ours)  # the folders of ImageNet, in whose order its weights are published
    if not theirs:
        return last, ", for the file does not name its classes"
    if set(theirs) != set(ours):
        names = ", ".join(theirs[:4]) + (", ..." if len(theirs) > 4 else "")
        return last, f", for the old one tells apart {names}"
    order = [theirs.index(name) for name in ours]
    given |= {p: np.asarray(given[p])[..., order] for p in last}
    return set(), ""


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


def compare_size(source: Source, image_size: int) -> None:
    """Says so if images are far from the size that weights were trained on."""
    known = source.facts.get("image_size") or source.preprocessing.size
    if known and not 2 / 3 <= image_size / known <= 3 / 2:
        _say(
            f"{source.name}: trained on images of {known} pixels, which here have {image_size}: "
            f"what the weights look for has another size; data.image_size={known} may do better"
        )


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
