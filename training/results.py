"""What a run leaves: predictions, weights, and what it took."""

import numpy as np
from ml_collections import ConfigDict

from experiment.fields import stored_config
from training import hosts
from training.cost import model_cost, step_memory
from training.programs import Outline, shared
from training.record import RunRecord
from training.steps import Metrics, make_eval_step
from training.weights import save_weights


def complete(record: RunRecord, weights: dict, metrics: dict, spent: dict, summary: dict) -> dict:
    """Writes the weights of a run that is complete; returns how its `summary` ends."""
    progress, dataset = record.progress, record.dataset
    end = {"status": "complete", "metrics": metrics, "cost": spent}
    end |= {"best_step": progress.best_step, "steps": progress.step, "phases": progress.phases}
    arrays = {path: np.asarray(a) for part in weights.values() for path, a in part.items()}
    config = stored_config(record.config)
    if hosts.is_first():
        save_weights(record.run_dir, arrays, config, dataset.class_names, summary | end)
    return end


def predicted_parts(config: ConfigDict) -> tuple[str, ...]:
    """Returns the parts that a run predicts once it is trained; a search's trials no test."""
    return ("validation", "test") if config.predict_test else ("validation",)


def prediction_memory(record: RunRecord, weights: dict) -> int | None:
    """Returns the bytes on each device that a batch of predictions from images takes."""
    batch = next(record.feed("validation").evaluation(record.config.eval_batch_size))

    def measure() -> int | None:
        empty = record.put(Metrics.empty())
        return step_memory(make_eval_step(record.model), weights, empty, batch, countable=True)

    # Of the seeds of a model it is the same.
    return shared(("memory", Outline.of(record.model), batch["image"].shape), measure)


def write_predictions(record: RunRecord, part: str, scores: dict, logits: np.ndarray) -> dict:
    """Writes `predictions_<part>.npz`; returns the metrics of the part."""
    labels, groups = record.dataset.labels(part), record.dataset.listing.groups
    arrays = {"ids": np.array(record.dataset.ids(part)), "labels": labels, "logits": logits}
    if groups:
        arrays["groups"] = np.array([groups[row] for row in record.dataset.rows[part]])
    np.savez(record.run_dir / f"predictions_{part}.npz", **arrays)
    correct = int((logits.argmax(axis=1) == labels).sum())
    return scores | {"correct": correct, "count": len(labels)}


def cost(record: RunRecord, prediction_memory: int | None, fixed: dict | None = None) -> dict:
    """Returns what the run took, as `summary.json` holds it; bytes are on each device.

    `fixed` is what does not depend on the run, if it is known. Of seeds that trained together
    (`shared_by`), seconds are their share, and images are those that a seed saw in it.
    """
    progress, timed = record.progress, record.progress.timed_seconds
    fixed = fixed or model_cost(record.model, record.config.data.image_size)
    return fixed | {
        "train_images_per_second": progress.timed_images / timed if timed else None,
        "seconds": progress.seconds,
        "seconds_to_best": progress.seconds_to_best,
        "compile_seconds": progress.compile_seconds,
        "train_step_memory_bytes": progress.train_step_memory_bytes,
        "predict_step_memory_bytes": prediction_memory,
    }
