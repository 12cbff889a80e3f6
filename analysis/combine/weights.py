"""One network of a model's seeds by averaging their weights, and images beside mirror images."""

import json
import math
from collections.abc import Sequence

import numpy as np

from analysis.combine.gains import Row, by_validation, measure, validation_score
from analysis.evaluate import softmax
from analysis.forward import load_classifier, load_images, predict_logits
from analysis.page.tables import percent
from analysis.runs import FinishedRun, Groups
from analysis.verdict import listed
from errors import UserError
from models import MODELS, Classifier
from models.classifier import merge_model, split_model
from models.weights.own import read_own
from training.weights import find_weights

SAME = (
    "model", "fields", "num_classes", "class_names", "preprocessing", "image_size", "compute_dtype",
)  # fmt: skip


def average_weights(runs: Sequence[FinishedRun]) -> dict[str, np.ndarray]:
    """Returns the mean of every array of runs of one architecture; raises UserError otherwise."""
    total, first = {}, None
    for run in runs:
        facts = read_own(find_weights(run.path))
        arrays = facts["arrays"]
        own = {key: facts.get(key) for key in SAME}
        own |= {path: array.shape for path, array in arrays.items()}
        first = first or own
        if differ := [key for key in first | own if first.get(key) != own.get(key)]:
            raise UserError(
                f"the weights of {runs[0].path} and {run.path} cannot be averaged: they differ in "
                f"{listed(differ)}"
            )
        # From the first array on, not from 0, so that -0.0 stays what it is.
        total = {k: total[k] + x if total else x.astype(np.float64) for k, x in arrays.items()}
    return {k: (x / len(runs)).astype(arrays[k].dtype) for k, x in total.items()}


def soup(runs: Sequence[FinishedRun]) -> Classifier:
    """Returns the model whose weights are the mean of those of runs (Wortsman et al. 2022).

    BatchNorm's statistics are averaged too, and not computed anew.
    """
    arrays, model = average_weights(runs), load_classifier(runs[0])
    parts = split_model(model)[1:]
    return merge_model(model, *({path: arrays[path] for path in part} for part in parts))


def probabilities_of(model: Classifier, images: np.ndarray) -> np.ndarray:
    """Returns the softmax float64 [N, K] of images uint8 [N, S, S, 3]."""
    return softmax(predict_logits(model, images))


def choose_soup(runs: Sequence[FinishedRun], validation: np.ndarray) -> tuple[list, str]:
    """Returns the runs whose average is the best on validation images, [] for none, and its score.

    Uniform: all of them. Greedy: from the best run on, each that does not lower the metric.
    """
    ranked = by_validation(runs)
    alone = validation_score(softmax(ranked[0].validation["logits"]), ranked[0])
    uniform = validation_score(probabilities_of(soup(runs), validation), runs[0])
    kept, score = ranked[:1], alone
    for run in ranked[1:]:
        trial = [*kept, run]
        new = uniform if len(trial) == len(runs) else None
        new = new or validation_score(probabilities_of(soup(trial), validation), runs[0])
        if new[0] >= score[0]:
            kept, score = trial, new
    chosen, new = (kept, score) if len(kept) > 1 else ([], uniform)
    if uniform[0] >= alone[0] and (not chosen or uniform >= score):
        chosen, new = list(runs), uniform
    return chosen, _against(new, alone, bool(chosen))


def _against(new: Sequence[float], old: Sequence[float], used: bool) -> str:
    sign = "<" if new[0] < old[0] else ">" if new[0] > old[0] else "="
    return f"{percent(new[0])} {sign} {percent(old[0])}: {'yes' if used else 'no'}"


def soup_row(label: str, runs: Sequence[FinishedRun], images: dict[str, np.ndarray]) -> Row:
    """Returns the average of the weights of a model's seeds; without test figures if refused."""
    chosen, text = choose_soup(runs, images["validation"])
    if not chosen:
        return _refused("weight average", label, str(len(runs)), 1.0, text)
    after = probabilities_of(soup(chosen), images["test"])
    members = f"{len(chosen)} of {len(runs)}" if len(chosen) < len(runs) else str(len(runs))
    return measure("weight average", label, chosen, [after], 1.0, members, text)


def flip_row(label: str, runs: Sequence[FinishedRun], images: dict[str, np.ndarray]) -> Row:
    """Returns each seed's mean over image and mirror image, if validation prefers it."""
    kind, members = "flip averaging", "1"

    def averaged(part: str) -> list[np.ndarray]:
        mirrored = images[part][:, :, ::-1]
        stored = [softmax(getattr(run, part)["logits"]) for run in runs]
        models = map(load_classifier, runs)  # one at a time
        return [
            (x + probabilities_of(model, mirrored)) / 2
            for x, model in zip(stored, models, strict=True)
        ]

    plain = [softmax(run.validation["logits"]) for run in runs]
    scores = [
        np.mean([validation_score(x, run) for x, run in zip(outputs, runs, strict=True)], axis=0)
        for outputs in (averaged("validation"), plain)
    ]
    used = scores[0].tolist() > scores[1].tolist()
    text = _against(*scores, used)
    if not used:
        return _refused(kind, label, members, 2.0, text)
    return measure(kind, label, runs, averaged("test"), 2.0, members, text)


def _refused(kind: str, label: str, members: str, cost: float, text: str) -> Row:
    none, nll = np.zeros(0), (math.nan, math.nan)
    return Row(kind, label, members, cost, np.zeros((1, 0), bool), none, none, nll, None, text)


def model_rows(groups: Groups, data_path: str = "") -> tuple[list[Row], list[str]]:
    """Returns weight averages and mirrored images of every model, and what was left out."""
    rows, by_data = {}, {}
    for label, runs in groups.items():
        if MODELS[runs[0].model].trained_by_gradient:
            data = json.dumps(runs[0].config["data"], sort_keys=True)
            by_data.setdefault((data, runs[0].dataset["fingerprint"]), []).append(label)
    for labels in by_data.values():
        first = groups[labels[0]][0]
        images = {part: load_images(first, part, data_path) for part in ("validation", "test")}
        for label in labels:
            runs = groups[label]
            made = [soup_row(label, runs, images)] if len(runs) > 1 else []
            rows[label] = [*made, flip_row(label, runs, images)]
    notes = []
    if left := [label for label in groups if label not in rows]:
        notes.append(f"Left out (not trained by gradient): {listed(left)}.")
    trained = [k for k in rows if groups[k][0].config.get("augment", {}).get("flip_horizontal")]
    notes.append(f"Trained with horizontal flips: {listed(trained) or 'none'}.")
    return [row for label in groups for row in rows.get(label, [])], notes
