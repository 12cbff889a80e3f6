"""From a request to image files, and from answers to JSON."""

import base64
import hashlib

import numpy as np
from fastapi import HTTPException, Request
from starlette.formparsers import MultiPartException, MultiPartParser

from analysis.predict import SET_LEVEL
from data.formats import printable
from deploy.service.batching import Answer, Worker
from deploy.service.limits import Limits

NAME = 255  # letters of a file's name that are kept
RAW = ("multipart/form-data", "image/*", "application/octet-stream")


class _InMemory(MultiPartParser):
    """Files stay in memory, however large: images are never written to a disk."""

    spool_max_size = 2**40


def about(worker: Worker) -> dict:
    """Returns what a client needs to know of a model."""
    facts, form = worker.facts, worker.predictor.file.suffix[1:]
    form = "run" if facts.get("format") == "run" else form
    return {
        "name": worker.name,
        "version": worker.predictor.version,
        "state": worker.state,
        "architecture": facts["model"],
        "form": form,
        "classes": facts["class_names"],
        "image_size": facts["image_size"],
        "image": facts["data"],
        "temperature": facts["temperature"],
        "review_thresholds": facts["review_thresholds"],
        "target_accuracy": worker.limits.target_accuracy,
        "set_level": SET_LEVEL if facts.get("sets") else None,
        "licence": facts.get("licence"),
        "why_no_explain": worker.why_no_map,
        "explain": [] if worker.why_no_map else ["gradcam"],
    }


def row(worker: Worker, content: bytes, name: str, answer: Answer, top: int, least: float) -> dict:
    """Returns the answer of one image as JSON."""
    names = worker.predictor.facts["class_names"]
    best = np.argsort(-answer.probabilities, kind="stable")
    share = [float(value) for value in answer.probabilities[best]]
    found = {
        "name": name,
        "image": hashlib.sha256(content).hexdigest(),
        "top": [
            {"class": names[i], "confidence": round(value, 6)}
            for i, value in zip(best[:top], share, strict=False)
        ],
        "review": not share[0] >= least,  # NaN too
        "decode_ms": round(answer.decode * 1000, 3),
        "queue_ms": round(answer.queue * 1000, 3),
        "inference_ms": round(answer.inference * 1000, 3),
        "batch": answer.batch,
    }
    if answer.members is not None:
        found["set"] = [names[i] for i in best if answer.members[i]]
    if answer.heat_map:
        png = base64.b64encode(answer.heat_map).decode()
        found["heat_map"] = {"class": names[best[0]], "png": png}
        found["heat_map"]["ms"] = round(answer.explain * 1000, 3)
    return found


async def images_of(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    """Returns name and content of each image in a request; raises HTTPException."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            # One file more, so that the message is ours.
            parser = _InMemory(
                request.headers, request.stream(), max_files=limits.max_images + 1, max_fields=16
            )
            form = await parser.parse()
        except MultiPartException as error:
            text = f"at most {limits.max_images} images a request"
            many = error.message.startswith("Too many files")
            raise HTTPException(413 if many else 400, text if many else error.message) from None
        found = []
        for _, part in form.multi_items():
            if not isinstance(part, str):
                found.append((printable(part.filename or "")[:NAME], await part.read()))
        await form.close()
    elif kind.startswith("image/") or kind == "application/octet-stream":
        found = [("", await request.body())]
    else:
        text = f"send {', '.join(RAW)}, not {kind[:100] or 'no Content-Type'}"
        raise HTTPException(415, text + "; curl --data-binary needs -H 'Content-Type: image/jpeg'")
    if len(found) > limits.max_images:
        raise HTTPException(413, f"at most {limits.max_images} images a request")
    if not any(content for _, content in found):
        raise HTTPException(400, "there is no image in the request")
    return found
