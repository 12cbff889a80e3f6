"""The model card of an exported folder (Mitchell et al. 2019), and the licence of its weights."""

import json
import math
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import jinja2
import numpy as np

from analysis import audit
from analysis.confidence import RISK, softmax
from analysis.evaluate import (
    classes_of,
    confused_pairs,
    confusion_of,
    coverage_of_sets,
    evaluate,
)
from analysis.page.tables import NONE
from analysis.predict import Predictor
from analysis.runs import FinishedRun, read_audit
from analysis.uncertainty import wilson
from deploy.load import ONNX, STABLEHLO, WEIGHTS, facts_in
from errors import UserError
from models.weights.published import PUBLISHED

CONFIDENT = 0.9  # the confidence from which the card counts errors
OWNERS = "to be decided by the owners of the data it was trained on"


def licence_of(weights: str) -> str:
    """Returns the licence of what training began from, followed back through runs that exist."""
    if weights == "none":
        return OWNERS
    if weights in PUBLISHED:
        return PUBLISHED[weights].licence
    family, _, path = weights.partition(":")
    licence = facts_in(Path(path)).get("licence") if family == "archcompare" else ""
    if family == "run":
        with suppress(OSError, ValueError):  # that run is gone
            summary = json.loads((Path(path) / "summary.json").read_text(encoding="utf-8"))
            licence = licence_of(summary.get("weights", "none"))
    return licence or f"unknown: began from {short_name(weights)}"


def short_name(weights: str) -> str:
    """Returns the name of weights with no more than the end of its path."""
    family, colon, path = weights.partition(":")
    return f"{family}:{'/'.join(Path(path).parts[-2:])}" if colon else weights


def model_card(
    run: FinishedRun, predictor: Predictor, licence: str, files: dict[str, dict] | None = None
) -> str:
    """Returns README.md; every number in it comes from the run directory.

    `files` are the exported ones, by name, and the facts that each states.
    """
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)
    environment.filters |= {"percent": _percent, "text": _markdown}
    weights = run.summary.get("weights", "none")
    return environment.get_template("model_card.md.j2").render(
        run=run,
        model=predictor.model,
        facts=predictor.facts,
        data=f"{run.dataset['source']} {Path(run.dataset['path']).name}".strip(),
        began="from scratch" if weights == "none" else f"from the weights {short_name(weights)}",
        files=files or {WEIGHTS: {}},
        weights_file=WEIGHTS,
        programs=[name for name in (ONNX, STABLEHLO) if name in (files or {})],
        licence=licence,
        licence_id=licence.lower() if licence in ("Apache-2.0", "BSD-3-Clause") else "unknown",
        excluded=Counter(reason.partition(":")[0] for reason in run.dataset["excluded"].values()),
        audit=_audit(run),
        **_results(run, predictor),
    )


def _results(run: FinishedRun, predictor: Predictor) -> dict:
    """Returns what the test predictions say, for the model card."""
    correct, counts = run.correct, confusion_of(run)
    confidence = softmax(run.test["logits"], predictor.facts["temperature"]).max(axis=1)
    table = classes_of(run).to_dict("records")
    for row, right in zip(table, np.diag(counts), strict=True):
        row["interval"] = wilson(right, row["support"]) if row["support"] else (math.nan, math.nan)
    trusted = []
    for entry in predictor.facts["review_thresholds"]:
        answered = confidence >= predictor.threshold(entry["target"])
        accuracy = correct[answered].mean() if answered.any() else None
        trusted.append((entry["target"], entry["confidence"], answered.mean(), accuracy))
    sets, facts = [], predictor.facts["sets"]
    for entry in facts["levels"]:
        held, size = (values.mean() for values in coverage_of_sets(run, facts, entry["level"]))
        sets.append((entry["level"], entry["least"], held, size))
    return {
        "count": len(correct),
        "correct": int(correct.sum()),
        "interval": wilson(correct.sum(), len(correct)),
        "numbers": evaluate(run),
        "classes": table,
        "weakest": min((row for row in table if row["support"]), key=lambda row: row["recall"]),
        "pairs": list(confused_pairs(counts).head(3).itertuples()),
        "confident_errors": int((~correct & (confidence >= CONFIDENT)).sum()),
        "confident_answers": int((confidence >= CONFIDENT).sum()),
        "confident": CONFIDENT,
        "trusted": trusted,
        "risk": RISK,
        "sets": sets,
    }


def _audit(run: FinishedRun) -> str:
    """Returns the audit of the workdir as text, "" if there is none."""
    workdir = run.path.resolve().parents[1]
    try:
        return audit.describe(findings) if (findings := read_audit(workdir)) else ""
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{workdir}/audit/audit.json cannot be read ({error}): audit the data again"
        ) from error


def _percent(share: float) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.1f} %"


def _markdown(text: object) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    return re.sub(r"[\\`*_{}\[\]<>|#~$&]", r"\\\g<0>", " ".join(str(text).split()))
