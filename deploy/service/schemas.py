"""What the routes take and answer, for /openapi.json; tests hold every answer against it."""

from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from deploy.service.gate import PUBLIC

HASH = "[0-9a-f]{64}"
Hash = Annotated[str, Field(pattern=f"^{HASH}$", description="SHA-256 of the file as sent")]
Share = Annotated[float, Field(ge=0, le=1)]


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Exact):
    """Why there is no answer, in a sentence."""

    detail: str


class Guess(_Exact):
    """A class, and the probability that it is the true one."""

    name: str = Field(alias="class")
    confidence: Share


class HeatMap(_Exact):
    """Grad-CAM for the likeliest class."""

    name: str = Field(alias="class")
    png: str = Field(description="base64")
    ms: float


class Answered(_Exact):
    """What the model says of an image."""

    name: str = Field(description="of the file")
    image: Hash
    top: list[Guess] = Field(min_length=1, description="likeliest first")
    review: bool = Field(description="the confidence is below the threshold")
    decode_ms: float
    queue_ms: float
    inference_ms: float = Field(description="of the whole batch")
    batch: int
    # Not there, rather than null, where a model promises no sets or nobody asked for a map.
    members: list[str] = Field(
        alias="set", description="that hold the true class, as promised", default_factory=list
    )
    heat_map: HeatMap = Field(default_factory=lambda: None)


class Unread(_Exact):
    """An image that could not be read."""

    name: str
    image: Hash
    error: str


class Prediction(_Exact):
    """One entry for each image, in their order."""

    model: str
    version: str = Field(description="of the weights and what belongs to them")
    target_accuracy: float
    threshold: float | None = Field(description="null: no confidence promises the target")
    images: list[Answered | Unread]


class NoPrediction(Prediction):
    """None of the images could be read."""

    detail: str


class Served(_Exact):
    """A model."""

    name: str
    version: str
    state: str = Field(description="warming up, ready or failed")
    architecture: str
    form: str = Field(description="run, safetensors, onnx or stablehlo")
    classes: list[str]
    image_size: int
    image: dict[str, Any] = Field(description="how an image is resized, and the limit of pixels")
    temperature: float
    review_thresholds: list[dict[str, float | None]]
    target_accuracy: float
    set_level: float | None
    licence: str | None
    why_no_explain: str
    explain: list[str]


class RequestLimits(_Exact):
    """How much a request may hold."""

    max_body_mb: float
    max_images: int


class Models(_Exact):
    """What is served."""

    models: list[Served]
    limits: RequestLimits
    feedback: bool = Field(description="whether corrections are taken")


class Noted(_Exact):
    """How many corrections came, and how many are of images that were answered here."""

    received: int
    known: int
    unknown: list[Hash] = Field(default_factory=list)


class Alive(_Exact):
    """The process lives."""

    alive: bool


class Ready(_Exact):
    """Whether requests are welcome, and why not."""

    ready: bool
    draining: bool
    models: dict[str, int] = Field(description="how many are in each state")
    log: str = Field(description="off, ok or failing")


def errors(*statuses: int) -> dict[int, dict]:
    """Returns statuses as the `responses` of a route."""
    return {status: {"model": Error} for status in statuses}


ANY = errors(400, 403, 408, 413, 421, 500, 503, 504)  # of the gate
KEYED = ANY | errors(401, 429)
PREDICT = KEYED | errors(404, 406, 415) | {
    200: {"model": Prediction, "content": {"image/png": {}}},
    422: {"model": Error | NoPrediction},
}  # fmt: skip
FEEDBACK = KEYED | errors(404, 409, 415, 422) | {200: {"model": Noted}}
MODELS = KEYED | {200: {"model": Models}}
HEALTH = ANY | {200: {"model": Alive}}
READY = ANY | {200: {"model": Ready}, 503: {"model": Error | Ready}}

_FILE = {"type": "string", "format": "binary"}
IMAGES = {
    "required": True,
    "content": {
        "image/*": {"schema": _FILE},
        "application/octet-stream": {"schema": _FILE},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "array", "items": _FILE, "minItems": 1}},
                "required": ["file"],
            }
        },
    },
}


def describe(app: FastAPI, keyed: bool) -> None:
    """Adds to /openapi.json how a key is sent; call it when all routes are there."""
    found = app.openapi()
    found["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for path, methods in found["paths"].items():
        for method in methods.values() if keyed and path not in PUBLIC else ():
            method["security"] = [{"bearer": []}, {"header": []}]
    app.openapi = lambda: found
