"""The routes of the server: predictions, feedback, what is served, health, metrics, the page."""

import asyncio
import base64
import hashlib
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as RouteError

from analysis.answer_log import Answer as Logged
from deploy.service.batching import Answer, Full, Unreadable, Worker
from deploy.service.events import Recorder
from deploy.service.feedback import add_feedback
from deploy.service.gate import Gate
from deploy.service.limits import Limits
from deploy.service.metrics import Metrics
from deploy.service.replies import about, images_of, row
from deploy.service.schemas import HEALTH, IMAGES, KEYED, MODELS, PREDICT, READY, describe
from errors import UserError
from experiment.files import plain

PAGE = Path(__file__).with_name("page.html")


class Service:
    """Models by name, and what they share."""

    def __init__(
        self, workers: dict[str, Worker], limits: Limits, metrics: Metrics, recorder: Recorder,
        failed: Callable[[Exception], None] = lambda error: None,
    ):  # fmt: skip
        self.workers, self.limits, self.metrics = workers, limits, metrics
        self.recorder, self._failed = recorder, failed

    @asynccontextmanager
    async def lifespan(self, app: FastAPI):
        """Warms the models up while the server lives already; at its end, all is answered."""
        loop = asyncio.get_running_loop()
        for worker in self.workers.values():
            worker.start(lambda error: loop.call_soon_threadsafe(self._failed, error))
        yield
        for worker in self.workers.values():
            await asyncio.to_thread(worker.close)
        await asyncio.to_thread(self.recorder.close)

    def worker(self, name: str) -> Worker:
        """Returns a model that can be asked; raises HTTPException."""
        if name not in self.workers:
            names = ", ".join(self.workers)
            raise HTTPException(404, f"there is no model of that name, only {names}")
        worker = self.workers[name]
        if worker.state != "ready":
            raise HTTPException(503, f"{name} is {worker.state}", {"Retry-After": "2"})
        return worker

    async def answers(
        self, worker: Worker, contents: list[bytes], explain: bool
    ) -> list[Answer | Unreadable]:
        """Returns what a model says of each image file; raises HTTPException if it is busy."""
        try:
            futures = worker.submit(contents, explain)
        except Full:
            text = f"{self.limits.queue} images wait already, or would"
            raise HTTPException(503, text, {"Retry-After": "1"}) from None
        waiting = [asyncio.wrap_future(future) for future in futures]
        try:
            found = await asyncio.gather(*waiting, return_exceptions=True)
        finally:
            for future in waiting:
                future.cancel()
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, Unreadable):
                raise one
        return found


def create_app(service: Service, keys: dict[str, str], local: bool = False) -> Gate:
    """Returns the application, behind its gate; a `local` one is for this machine alone."""
    app = FastAPI(
        title="archcompare", lifespan=service.lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    gate = Gate(app, service.limits, keys, service.metrics, service.workers, local)
    _add_predict(app, service)
    add_feedback(app, service.workers, service.recorder)
    _add_errors(app)

    @app.get("/v1/models", responses=MODELS)
    async def models() -> JSONResponse:
        """What is served, and how much a request may hold."""
        limits = {name: getattr(service.limits, name) for name in ("max_body_mb", "max_images")}
        found = [about(worker) for worker in service.workers.values()]
        feedback = service.recorder.log is not None
        return JSONResponse(plain({"models": found, "limits": limits, "feedback": feedback}))

    _add_health(app, service, gate)
    text = PAGE.read_text(encoding="utf-8")
    policy = policy_of(text)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    describe(app, bool(keys))
    return gate


def policy_of(page: str) -> str:
    """Returns the Content-Security-Policy that lets a page run what it holds, and nothing else."""

    def digests(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(body.encode()).digest()) for body in bodies]
        return " ".join(f"'sha256-{digest.decode()}'" for digest in hashes)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _add_health(app: FastAPI, service: Service, gate: Gate) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", responses=HEALTH)
    async def healthz() -> dict:
        """Whether the process lives."""
        return {"alive": True}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses=READY)
    async def readyz() -> JSONResponse:
        """Whether requests are welcome."""
        states = [worker.state for worker in service.workers.values()]
        ready = not gate.draining and all(state == "ready" for state in states)
        counts = {state: states.count(state) for state in states}
        body = {"ready": ready, "draining": gate.draining, "models": counts}
        return JSONResponse(body | {"log": service.recorder.state}, 200 if ready else 503)

    @app.get("/metrics", responses=KEYED, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What Prometheus reads."""
        text = generate_latest(service.metrics.registry)
        return Response(text, media_type=None, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_errors(app: FastAPI) -> None:
    """Makes `detail` of every error one sentence."""

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        said = re.sub(r"^(Input|String|Value) should", "must", first["msg"])
        return JSONResponse({"detail": f"{first['loc'][-1]}: {said}"}, 422)

    @app.exception_handler(RouteError)
    async def refused(request: Request, error: RouteError) -> JSONResponse:
        detail = error.detail
        if detail == "Not Found":
            detail = "there is nothing at this path: /openapi.json lists what there is"
        elif detail == "Method Not Allowed":
            detail = f"{request.method} is not for this path, only {error.headers['Allow']}"
        return JSONResponse({"detail": detail}, error.status_code, error.headers)


def _add_predict(app: FastAPI, service: Service) -> None:
    @app.post("/v1/models/{name}/predict", responses=PREDICT, openapi_extra={"requestBody": IMAGES})
    async def predict(
        request: Request,
        name: str,
        top: Annotated[int, Query(ge=1)] = 5,
        target: Annotated[float, Query()] = None,
        explain: Annotated[Literal["gradcam"], Query()] = None,
    ) -> Response:
        """Classes and confidence of one image (the body) or many (multipart/form-data).

        `top` is how many classes to name, `target` the accuracy that answers without `review` are
        to have. With `explain=gradcam` each image comes with a heat map, which `Accept: image/png`
        asks for alone.
        """
        worker = service.worker(name)
        target = service.limits.target_accuracy if target is None else target
        least = _threshold(worker, request, target)
        if explain and worker.why_no_map:
            raise HTTPException(400, worker.why_no_map)
        picture = request.headers.get("accept", "").startswith("image/png")
        if picture and not explain:
            raise HTTPException(406, "Accept: image/png is for ?explain=gradcam")
        images = await images_of(request, service.limits)
        request.state.model, request.state.images = name, len(images)
        if picture and len(images) > 1:
            raise HTTPException(400, "Accept: image/png is for one image at a time")
        found = await service.answers(worker, [content for _, content in images], bool(explain))
        rows, known = [], []
        for (file, content), answer in zip(images, found, strict=True):
            if isinstance(answer, Unreadable):
                digest = hashlib.sha256(content).hexdigest()
                rows.append({"name": file, "image": digest, "error": str(answer) or "unreadable"})
                service.metrics.unread.labels(name).inc()
                continue
            rows.append(row(worker, content, file, answer, top, least))
            known.append((rows[-1], answer))
            label = rows[-1]["top"][0]["class"]
            service.metrics.images.labels(name, label).inc()
            service.metrics.review.labels(name).inc(rows[-1]["review"])
        _log(service, worker, known)
        if picture and known:
            headers = {"X-Model-Version": worker.predictor.version}
            return Response(known[0][1].heat_map, media_type="image/png", headers=headers)
        body = {
            "model": name,
            "version": worker.predictor.version,
            "target_accuracy": target,
            "threshold": least,
            "images": rows,
        }
        if not known:
            body["detail"] = f"no image could be read: {rows[0]['error']}"
        return JSONResponse(plain(body), 200 if known else 422)


def _threshold(worker: Worker, request: Request, target: float) -> float:
    """Returns the confidence below which to review; raises HTTPException for a wrong option."""
    if unknown := set(request.query_params) - {"top", "target", "explain"}:
        text = f"no such option: {min(unknown)[:100]!r}, only top, target and explain"
        raise HTTPException(422, text)
    try:
        return worker.predictor.threshold(target)
    except UserError:
        known = [str(one["target"]) for one in worker.facts["review_thresholds"]]
        raise HTTPException(400, f"target must be one of {', '.join(known)}") from None


def _log(service: Service, worker: Worker, known: list[tuple[dict, Answer]]) -> None:
    if service.recorder.log is None or not known:
        return
    service.recorder.write(
        [
            Logged(
                time=time.time(), version=worker.predictor.version, model=worker.name,
                label=found["top"][0]["class"], confidence=float(answer.probabilities.max()),
                features=answer.features, image=found["image"], name=found["name"],
            )
            for found, answer in known
        ]
    )  # fmt: skip


def load_workers(models: dict, limits: Limits, metrics: Metrics) -> dict[str, Worker]:
    """Returns a worker for each predictor by name; they share the threads that decode."""
    pool = ThreadPoolExecutor(thread_name_prefix="decode", max_workers=os.cpu_count())
    return {name: Worker(name, model, limits, metrics, pool) for name, model in models.items()}
