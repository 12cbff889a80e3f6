"""One folder to hand on: the weights of a run, all that using them takes, and a model card.

    python -m analysis.export RUN_DIR OUTPUT_DIR
    python -m analysis.predict OUTPUT_DIR PHOTOS... --output=predictions.csv

model.safetensors holds the weights (also read by --config.weights=archcompare:FILE), model.json how
photos become its input and logits become answers, README.md the model card (Mitchell et al. 2019).
The folder depends on nothing outside it. Exporting again replaces its files.
"""

import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
import numpy as np

from analysis import audit
from analysis.evaluate import (
    Threshold,
    choose_threshold,
    confused_pairs,
    confusion,
    evaluate,
    fit_temperature,
    per_class,
    softmax,
)
from analysis.forward import load_classifier
from analysis.runs import FinishedRun, load_run
from analysis.uncertainty import wilson
from errors import UserError
from experiment.command import run_command
from experiment.files import plain, write_json
from models import Classifier, create_model
from models.classifier import split_model
from models.weights.download import digest
from models.weights.formats import read_metadata, write_safetensors
from models.weights.published import PUBLISHED

WEIGHTS, CARD, MODEL = "model.safetensors", "README.md", "model.json"
FORMAT = "archcompare model 1"  # of model.json; another number where its fields change
PLAIN = (
    "class_names", "image_size", "resize", "interpolation", "compute_dtype", "temperature",
)  # fmt: skip
TARGETS = (0.9, 0.95, 0.99)  # accuracies that review thresholds are chosen for
CONFIDENT = 0.9  # confidence from which on an error counts as a confident one
OWNERS = "to be decided by the owners of the data it was trained on"


@dataclass(frozen=True)
class Exported:
    """A trained classifier, and all that it takes to classify a photo with it.

    Attributes:
      model: in evaluation mode.
      class_names: in the order of the logits.
      image_size, resize, interpolation, background: as in `config.data`; see `decoding.py`.
      compute_dtype: float32 or bfloat16.
      temperature: what logits are divided by before softmax, fitted on validation images.
      thresholds: {target accuracy: the confidence that reached it on validation images}.
    """

    model: Classifier
    class_names: list[str]
    image_size: int
    resize: str
    interpolation: str
    background: tuple[int, int, int]
    compute_dtype: str
    temperature: float
    thresholds: dict[float, Threshold]

    def threshold(self, target: float) -> Threshold:
        """Returns the review threshold of a target accuracy; raises UserError if there is none."""
        if target not in self.thresholds:
            known = ", ".join(map(str, self.thresholds))
            raise UserError(
                f"target accuracy {target}: this export knows thresholds for {known}; choose one "
                "of them, or give the run directory"
            )
        return self.thresholds[target]


def from_run(run: FinishedRun, targets: Sequence[float] = TARGETS) -> Exported:
    """Returns the classifier of a complete run, with review thresholds for these accuracies.

    Raises:
      UserError: its weights or predictions cannot be read.
    """
    logits, labels = run.validation["logits"], run.validation["labels"]
    temperature = fit_temperature(logits, labels)
    probabilities = softmax(logits, temperature)
    data = run.config["data"]
    return Exported(
        model=load_classifier(run),
        class_names=run.class_names,
        background=tuple(data["background"]),
        **{key: data[key] for key in ("image_size", "resize", "interpolation")},
        compute_dtype=run.config["compute_dtype"],
        temperature=temperature,
        thresholds={goal: choose_threshold(probabilities, labels, goal) for goal in targets},
    )


# --- reading --------------------------------------------------------------------------------------


def load(folder: Path) -> Exported:
    """Returns what `export_run` wrote into a folder, after a check of its digests.

    Raises:
      UserError: a file is missing, damaged or changed, or of another version of this format.
    """
    content, weights = _read_model(folder / MODEL), folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} is missing: copy the folder again, or export the run again")
    if digest(weights, "sha256") != content["weights_sha256"]:
        raise UserError(f"{weights} is damaged: copy the folder again, or export the run again")
    fields = dict(content["model"])
    model = create_model(
        fields.pop("name"),
        len(content["class_names"]),
        weights=f"archcompare:{weights}",
        image_size=content["image_size"],
        dtype=content["compute_dtype"],
        **{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()},
    )
    thresholds = [Threshold(**entry) for entry in content["review_thresholds"]]
    return Exported(
        model=model,
        background=tuple(content["background"]),
        thresholds={threshold.target: threshold for threshold in thresholds},
        **{key: content[key] for key in PLAIN},
    )


def _read_model(path: Path) -> dict:
    """Returns the content of a model.json."""
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the folder again, or export the run again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated, known = content.pop("sha256"), content["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): export the run again") from error
    if known != FORMAT:
        raise UserError(f"{path} has the format {known!r}, this version reads {FORMAT!r}")
    if stated != _digest(content):
        raise UserError(f"{path} is damaged or was changed by hand: export the run again")
    for entry in content["review_thresholds"]:  # JSON knows no infinity and no NaN
        if entry["confidence"] is None:
            entry |= {"confidence": math.inf, "accuracy": math.nan}
    return content


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()


# --- writing --------------------------------------------------------------------------------------


def export_run(run: FinishedRun, folder: Path) -> None:
    """Writes model.safetensors, README.md and model.json of a complete run into a folder.

    Raises:
      UserError: the folder holds other things, cannot be written, or the run cannot be read.
    """
    _check_folder(folder)
    exported, licence = from_run(run), licence_of(run.summary.get("weights", "none"))
    card = model_card(run, exported, licence)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
            weights = Path(part) / WEIGHTS
            write_safetensors(weights, *_weights(run, exported.model, licence))
            (Path(part) / CARD).write_text(card, encoding="utf-8")
            content = _model_content(run, exported, digest(weights, "sha256"))
            write_json(Path(part) / MODEL, content | {"sha256": _digest(content)})
            for name in (WEIGHTS, CARD, MODEL):
                os.replace(Path(part) / name, folder / name)
    except OSError as error:
        raise UserError(f"cannot export to {folder}: {error}") from error


def _check_folder(folder: Path) -> None:
    """Refuses a folder in which other things than an earlier export would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name a new one")
    # Hidden files, such as those of a repository to publish from, are in nobody's way.
    found = [path.name for path in folder.glob("[!.]*")]
    if not found:
        return
    try:
        ours = json.loads((folder / MODEL).read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError):
        ours = None
    if not str(ours).startswith(FORMAT.rpartition(" ")[0]):
        raise UserError(
            f"{folder} is not empty and no earlier export (it holds {sorted(found)[0]!r}): name a "
            "new folder, or empty it"
        )


def _weights(run: FinishedRun, model: Classifier, licence: str) -> tuple[dict, dict]:
    """Returns arrays and metadata of model.safetensors, as `weights/loading.py` reads them."""
    _, params, stats = split_model(model)
    facts = {
        "model": run.model,
        "fields": dict(model.fields),
        "preprocessing": model.preprocessing.to_dict(),
        "num_classes": model.num_classes,
        "image_size": run.summary["image_size"],
        "reference": run.summary.get("reference", {}),
        "source": f"run:{_source(run)}",
        "licence": licence,
    }
    arrays = {path: np.asarray(array) for path, array in (params | stats).items()}
    return arrays, {"archcompare": json.dumps(facts)}


def _model_content(run: FinishedRun, exported: Exported, weights_sha256: str) -> dict:
    """Returns the content of model.json."""
    return plain(
        {
            "format": FORMAT,
            "model": {"name": run.model, **dict(exported.model.fields)},
            **{key: getattr(exported, key) for key in PLAIN},
            "background": exported.background,
            "preprocessing": exported.model.preprocessing.to_dict(),
            "review_thresholds": [asdict(entry) for entry in exported.thresholds.values()],
            "weights_sha256": weights_sha256,
            "source_run": _source(run),
            "versions": _versions(run),
        }
    )


def _source(run: FinishedRun) -> str:
    """Returns the name of a run as its experiment knows it, such as cnn/seed0."""
    return "/".join(run.path.resolve().parts[-2:])


def _versions(run: FinishedRun) -> dict:
    known = run.environment
    return {"python": known["python"], **known["packages"], "git_commit": known["git_commit"]}


# --- the model card -------------------------------------------------------------------------------


def licence_of(weights: str) -> str:
    """Returns the licence that comes with weights (a name as in `models/pretrained.py`).

    Training began from these; "none" stands for training from scratch. A run is followed back to
    what it began from, as long as its directory exists.
    """
    if weights == "none":
        return OWNERS
    if weights in PUBLISHED:
        return PUBLISHED[weights].licence
    family, _, path = weights.partition(":")
    try:
        if family == "run":
            summary = json.loads((Path(path) / "summary.json").read_text(encoding="utf-8"))
            return licence_of(summary.get("weights", "none"))
        if family == "archcompare":
            stated = json.loads(read_metadata(Path(path))["archcompare"])["licence"]
            return stated or f"unknown: began from {_short(weights)}"
    except (OSError, ValueError, KeyError, TypeError, UserError):
        pass  # gone, or of somebody else
    return f"unknown: began from {_short(weights)}"


def _short(weights: str) -> str:
    """Returns the name of weights with the end of its path, all that says anything elsewhere."""
    family, colon, path = weights.partition(":")
    return f"{family}:{'/'.join(Path(path).parts[-2:])}" if colon else weights


def model_card(run: FinishedRun, exported: Exported, licence: str) -> str:
    """Returns README.md: every number in it is computed from the run directory."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": _percent, "text": _markdown}
    weights = run.summary.get("weights", "none")
    excluded = Counter(reason.partition(":")[0] for reason in run.dataset["excluded"].values())
    return environment.get_template("model_card.md.j2").render(
        run=run,
        exported=exported,
        source=_source(run),
        data=f"{run.dataset['source']} {Path(run.dataset['path']).name}".strip(),
        began="from scratch" if weights == "none" else f"from the weights {_short(weights)}",
        licence=licence,
        licence_id=licence.lower() if licence in ("Apache-2.0", "BSD-3-Clause") else "unknown",
        fields=dict(exported.model.fields),
        excluded=excluded,
        audit=_audit(run),
        versions=_versions(run),
        **_results(run, exported),
    )


def _results(run: FinishedRun, exported: Exported) -> dict:
    """Returns what the test predictions say, for the model card."""
    labels, logits = run.test["labels"], run.test["logits"]
    predicted, names = run.predicted, run.class_names
    confidence = softmax(logits, exported.temperature).max(axis=1)
    correct = predicted == labels
    counts = confusion(labels, predicted, len(names))
    table = per_class(labels, predicted, names).to_dict("records")
    for row, right in zip(table, np.diag(counts), strict=True):
        row["interval"] = wilson(right, row["support"])
    trusted = []
    for target, threshold in exported.thresholds.items():
        kept = confidence >= threshold.confidence
        share = correct[kept].mean() if kept.any() else None
        trusted.append((target, threshold.confidence, kept.mean(), share))
    return {
        "count": len(labels),
        "correct": int(correct.sum()),
        "interval": wilson(correct.sum(), len(labels)),
        "numbers": evaluate(run),
        "classes": table,
        "weakest": min((row for row in table if row["support"]), key=lambda row: row["recall"]),
        "pairs": [
            (names[pair.first], names[pair.second], pair.forth, pair.back)
            for pair in confused_pairs(counts).head(3).itertuples()
        ],
        "confident": CONFIDENT,
        "infinity": math.inf,
        "confident_errors": int((~correct & (confidence >= CONFIDENT)).sum()),
        "confident_answers": int((confidence >= CONFIDENT).sum()),
        "trusted": trusted,
    }


def _audit(run: FinishedRun) -> str:
    """Returns what the audit of the experiment's data found, "" if there was none."""
    path = run.path.resolve().parents[1] / "audit/audit.json"
    if not path.exists():
        return ""
    try:
        return audit.describe(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): audit the data again") from error


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _markdown(text: object) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    line = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>|#~$&" else sign for sign in line)


def main(argv: list[str]) -> int:
    """Exports a run into a folder."""
    if len(argv) != 3:
        raise UserError("usage: python -m analysis.export RUN_DIR OUTPUT_DIR")
    run, folder = load_run(Path(argv[1]).expanduser()), Path(argv[2]).expanduser()
    export_run(run, folder)
    print(f"{folder}: {WEIGHTS}, {MODEL}, {CARD}")
    return 0


if __name__ == "__main__":
    run_command(main)
