"""Servers for tests: a tiny model, real sockets, a thread."""

import contextlib
import threading
import time
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError
from starlette.routing import Match

from analysis.predict import Predictor
from deploy.service.app import Service, create_app, load_workers
from deploy.service.events import Recorder
from deploy.service.limits import Limits
from deploy.service.metrics import Metrics
from deploy.service.run import Server, listen
from models import create_model
from models.weights.own import arrays_of, write_own

CLASSES = ["cat", "dog", "été <b>"]
FACTS = {
    "model": "cnn", "fields": {}, "num_classes": 3, "class_names": CLASSES, "image_size": 16,
    "data": {"resize": "squash", "interpolation": "bilinear", "background": [255, 255, 255], "max_pixels": 10**8},
    "compute_dtype": "float32", "temperature": 2.0, "licence": "Apache-2.0",
    "review_thresholds": [{"target": 0.95, "confidence": 0.5}, {"target": 0.99, "confidence": None}],
    "sets": {"temperature": 1.0, "images": 400, "levels": [{"level": 0.95, "least": 0.2}]},
}  # fmt: skip


def write_model(folder: Path) -> Path:
    """Writes an exported folder of a model that was never trained."""
    folder.mkdir()
    model = create_model("cnn", 3, image_size=16)
    facts = FACTS | {"preprocessing": vars(model.preprocessing)}
    write_own(folder / "model.safetensors", arrays_of(model), facts)
    return folder


def fake(answer=None, folder: Path = Path()) -> Predictor:
    """A model whose logits are the mean colours of an image."""
    file = folder / "model.onnx"
    file.write_bytes(b"fake")

    def mean(images: np.ndarray) -> dict[str, np.ndarray]:
        logits = images.mean(axis=(1, 2), dtype=np.float64).astype(np.float32) / 64
        return {"logits": logits, "features": np.tile(logits[:, :1], 32)}

    return Predictor(dict(FACTS), file, answer or mean)


class Described:
    """An ASGI application that notes which answers of another are not as /openapi.json says."""

    def __init__(self, gate):
        self.gate, self.wrong = gate, []

    async def __call__(self, scope, receive, send):
        async def told(message):
            if message["type"] == "http.response.start":
                answer.update(status=message["status"], headers=dict(message["headers"]))
            else:
                answer["body"] += message.get("body", b"")
            await send(message)

        answer = {"status": 0, "body": b""}
        await self.gate(scope, receive, told)
        if answer["status"] and (fault := self.fault(scope, answer)):
            self.wrong.append(f"{scope['method']} {scope['path']}: {answer['status']} {fault}")

    def fault(self, scope, answer) -> str:
        routes = self.gate.app.router.routes
        route = next((one for one in routes if one.matches(scope)[0] is Match.FULL), None)
        kind = answer["headers"].get(b"content-type", b"").partition(b";")[0].decode()
        if not getattr(route, "include_in_schema", False) or scope["path"] == "/openapi.json":
            return "" if answer["status"] < 400 or kind == "application/json" else f"is {kind}"
        stated = route.responses.get(answer["status"], {} if answer["status"] == 200 else None)
        if stated is None:
            return "is no status that it states"
        if kind != "application/json":
            kinds = (*stated.get("content", ()), route.response_class.media_type)
            return "" if kind in kinds else f"may not be {kind}"
        try:
            TypeAdapter(stated["model"]).validate_json(answer["body"], strict=True)
        except ValidationError as error:
            return str(error)
        return ""


@contextlib.contextmanager
def running(predictor, keys=(), log=None, local=False, **limits):
    """Serves a model as "m" on a free port; gives the server, with its `url`, `port`, `metrics`."""
    limits = Limits(
        **{"rate": 0, "max_body_mb": 1, "max_images": 3, "queue": 8, "max_batch": 4} | limits
    )
    metrics, bound = Metrics(), listen("127.0.0.1", 0)
    recorder = Recorder(log, metrics)
    service = Service(load_workers({"m": predictor}, limits, metrics), limits, metrics, recorder)
    server = Server(create_app(service, dict(keys), local), limits.header_timeout_s, 20)
    server.config.app = described = Described(server.gate)
    server.port, server.metrics = bound.getsockname()[1], metrics
    server.url, server.service = f"http://127.0.0.1:{server.port}", service
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    while not server.started or service.workers["m"].state == "warming up":
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.servers[0].get_loop().call_soon_threadsafe(server.stop)
        thread.join(30)
        assert not thread.is_alive()
        assert not described.wrong
