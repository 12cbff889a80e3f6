"""True classes that people give: POST /v1/feedback.

The body is read here: validation by FastAPI repeats all of a wrong body, several times over.
"""

import asyncio
import json
import re

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from deploy.service.batching import Worker
from deploy.service.events import Recorder, say
from deploy.service.schemas import FEEDBACK, HASH

ENTRIES, SIZE = 1000, 2**18  # of a request; bytes
ENTRY = {
    "type": "object",
    "required": ["image", "label"],
    "properties": {
        "image": {"type": "string", "pattern": f"^{HASH}$"},
        "label": {"type": "string"},
    },
}
LIST = {"type": "array", "items": ENTRY, "minItems": 1, "maxItems": ENTRIES}
BODY = {"required": True, "content": {"application/json": {"schema": {"anyOf": [ENTRY, LIST]}}}}


def corrections_in(kind: str, content: bytes, classes: set[str]) -> list[tuple[str, str]]:
    """Returns hash and label of each correction; raises HTTPException for the first fault."""
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    if len(content) > SIZE:
        raise HTTPException(413, f"corrections of more than {SIZE // 1024} KB: send them in parts")
    try:
        given = json.loads(content)
    except (ValueError, RecursionError):
        raise HTTPException(422, "the body is no JSON") from None
    entries = given if isinstance(given, list) else [given]
    if not entries:
        raise HTTPException(400, "there is no correction in the request")
    if len(entries) > ENTRIES:
        raise HTTPException(413, f"at most {ENTRIES} corrections a request")
    for number, entry in enumerate(entries, 1):
        if fault := _fault(entry, classes):
            raise HTTPException(422, f"correction {number}: {fault}")
    return [(entry["image"], entry["label"]) for entry in entries]


def _fault(entry: object, classes: set[str]) -> str:
    """Returns what is wrong with a correction, or ""."""
    if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
        return 'send {"image": hash, "label": class}, or a list of these'
    image, label = entry["image"], entry["label"]
    if not (isinstance(image, str) and re.fullmatch(HASH, image)):
        return "image must be the 64 hexadecimal digits that its prediction came with"
    if not isinstance(label, str):
        return "label must be the name of a class"
    if label not in classes:
        label = label[:100].encode(errors="backslashreplace").decode()
        return f"{label!r} is no class of these models"
    return ""


def add_feedback(app: FastAPI, workers: dict[str, Worker], recorder: Recorder) -> None:
    """Adds the route."""
    classes = {name for worker in workers.values() for name in worker.facts["class_names"]}

    @app.post("/v1/feedback", responses=FEEDBACK, openapi_extra={"requestBody": BODY})
    async def feedback(request: Request) -> JSONResponse:
        """The true classes of images that were predicted, known by their hash.

        A later label of an image replaces an earlier one.
        """
        if recorder.log is None:
            raise HTTPException(409, "this server keeps no log: start it with --log=FILE.sqlite")
        kind = request.headers.get("content-type", "")
        pairs = corrections_in(kind, await request.body(), classes)
        try:
            unknown = await asyncio.wrap_future(recorder.correct(pairs))
        except Exception as error:  # noqa: BLE001 - a full disk, a corrupt database
            say(event="feedback is not kept", why=str(error))
            text = "the log cannot be written now"
            raise HTTPException(503, text, {"Retry-After": "10"}) from None
        known = sum(image not in unknown for image, _ in pairs)
        if not known:
            raise HTTPException(404, "none of these images is in the log")
        body = {"received": len(pairs), "known": known}
        return JSONResponse(body | ({"unknown": sorted(unknown)} if unknown else {}))
