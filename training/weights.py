"""The file of weights that a finished run leaves, made now for older runs, and its model."""

from pathlib import Path

import numpy as np

from errors import UserError
from experiment.files import read_json
from models import Classifier, create_model
from models.weights.own import WEIGHTS, write_own

DATA = ("resize", "interpolation", "background", "max_pixels")  # how a photo becomes pixels


def save_weights(
    run_dir: Path,
    arrays: dict[str, np.ndarray],
    config: dict,
    class_names: list[str],
    summary: dict,
) -> None:
    """Writes `weights.safetensors`: a run's best weights, and all that using them takes.

    `config` and `summary` are contents of the JSON files of these names.
    """
    fields = dict(summary["model"])
    facts = {
        "model": fields.pop("name"),
        "fields": fields,
        "preprocessing": summary["preprocessing"],
        "num_classes": len(class_names),
        "class_names": class_names,
        "image_size": summary["image_size"],
        "data": {key: config["data"][key] for key in DATA if key in config["data"]},
        "compute_dtype": config["compute_dtype"],
        "began": config["weights"],
        "source": "run:" + "/".join(run_dir.resolve().parts[-2:]),
    }
    write_own(run_dir / WEIGHTS, arrays, facts)


def find_weights(run_dir: Path) -> Path:
    """Returns the weights file of a complete run; one of an older version gets it now."""
    path = run_dir / WEIGHTS
    if path.exists():
        return path
    try:
        config, dataset, summary = (
            read_json(run_dir / f"{name}.json") for name in ("config", "dataset", "summary")
        )
        complete = summary["status"] == "complete"
    except (OSError, ValueError, KeyError):
        complete = False
    best = sorted((run_dir / "checkpoints").glob("best-*[0-9]")) if complete else []
    if complete and not best:
        raise UserError(
            f"{path} is missing: copy it from where the run was trained, or train that run again"
        )
    if not best:
        raise UserError(f"run:{run_dir} is not the directory of a complete run")
    from training.checkpoint import restore  # Orbax takes a second to import

    stored, _ = restore(best[-1])
    arrays = {key.partition("/")[2]: array for key, array in stored.items()}
    save_weights(run_dir, arrays, config, dataset["class_names"], summary)
    return path


def classifier_from(file: Path, facts: dict) -> Classifier:
    """Returns the model, in evaluation mode, of a file of weights and the facts that it states."""
    return create_model(
        facts["model"],
        facts["num_classes"],
        weights=f"archcompare:{file}",
        image_size=facts["image_size"],
        dtype=facts["compute_dtype"],
        **{key: tuple(v) if isinstance(v, list) else v for key, v in facts["fields"].items()},
    )
