"""A model that answers many requests at once: images are decoded, wait, and go in as a batch."""

import io
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from analysis.confidence import softmax
from analysis.predict import Predictor, decode_image
from data.decoding import message_of
from deploy.service.limits import Limits
from deploy.service.metrics import Metrics

OVER = " (config.data.max_pixels)"  # how the message of decoding ends, of no use to a client


# What is decoded. Others hold images of other sizes than they say (ICO, ICNS), start programs
# (EPS), or are no format of photos.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
JPEG = 4  # times the limit of pixels, for those that are read at a smaller size


class Full(Exception):
    """As many images wait as may."""


class Unreadable(Exception):
    """An image that cannot be decoded, and why."""


@dataclass
class Answer:
    """What a model says of one image, and the seconds it took."""

    probabilities: np.ndarray  # float64 [K], calibrated
    members: np.ndarray | None  # bool [K], of the set of classes; None without a promise
    features: np.ndarray  # float32 [32]
    decode: float
    queue: float
    inference: float  # of the whole batch
    batch: int
    heat_map: bytes = b""  # PNG
    explain: float = 0.0


@dataclass(eq=False)
class _Item:
    content: bytes
    explain: bool
    future: Future = field(default_factory=Future)
    pixels: np.ndarray | None = None
    decode: float = 0.0
    since: float = 0.0  # in the queue
    held: bool = True  # it takes a place

    def give(self, result: Answer | Exception) -> None:
        if not self.future.set_running_or_notify_cancel():
            return  # whoever asked has gone
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


def _check_head(content: bytes, most: float) -> None:
    """Raises ValueError for what is none of FORMATS.

    So it does for a JPEG whose coefficients, all in memory at once, would fill it.
    """
    try:
        formats = [name for name in FORMATS if name in Image.OPEN]
        width, height = Image.open(io.BytesIO(content), formats=formats).size
    except Image.UnidentifiedImageError:
        raise ValueError(f"this is no image file ({', '.join(formats)})") from None
    if width * height > most:
        raise ValueError(f"{width}x{height} pixels is over the limit of {most:,} pixels")


class Worker:
    """A model, its queue of images, and the thread that takes them from it in batches."""

    def __init__(
        self, name: str, predictor: Predictor, limits: Limits, metrics: Metrics,
        pool: ThreadPoolExecutor,
    ):  # fmt: skip
        self.name, self.predictor, self.limits, self.metrics = name, predictor, limits, metrics
        data = predictor.facts["data"]
        most = min(data.get("max_pixels", np.inf), int(limits.max_megapixels * 1e6))
        # With the server's own limit on pixels.
        self.facts = predictor.facts | {"data": data | {"max_pixels": most}}
        self._pool, self._held, self._queue = pool, 0, deque()
        self._changed, self._closing = threading.Condition(), False
        self._heat_map, self.why_no_map = heat_maps(predictor)
        self.state = "warming up"  # then "ready" or "failed"
        self._thread = threading.Thread(target=self._work, name=f"model {name}", daemon=True)
        metrics.know(name, predictor.version, self.facts["class_names"])
        metrics.queue.labels(name).set_function(lambda: self._held)

    def start(self, failed: Callable[[Exception], None]) -> None:
        """Compiles the model for every size of batch, and takes images from then on."""
        self._failed = failed
        self._thread.start()

    def close(self) -> None:
        """Answers what waits, and ends; a model that hangs is left behind."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident:
            self._thread.join(self.limits.timeout_s)

    def submit(self, contents: Sequence[bytes], explain: bool = False) -> list[Future]:
        """Takes image files; returns a future `Answer` of each, which may raise Unreadable.

        All are taken, or none: then it raises Full.
        """
        with self._changed:
            if self._held + len(contents) > self.limits.queue:
                raise Full
            self._held += len(contents)
        items = [_Item(content, explain) for content in contents]
        for item in items:
            self._pool.submit(self._decode, item)
        return [item.future for item in items]

    def _decode(self, item: _Item) -> None:
        began = time.perf_counter()
        try:
            if item.future.cancelled():
                raise Unreadable("nobody waits for it")
            _check_head(item.content, JPEG * self.facts["data"]["max_pixels"])
            item.pixels = decode_image(self.facts, item.content)
        except BaseException as error:  # noqa: BLE001 - Pillow raises many types on broken files
            text = "it needs more memory than there is"
            if not isinstance(error, MemoryError):
                text = message_of(error).replace(OVER, "")
            self._finish(item, Unreadable(text))
            return
        finally:
            item.content = b""
        item.since = time.perf_counter()
        item.decode = item.since - began
        self.metrics.decode.labels(self.name).observe(item.decode)
        with self._changed:
            self._queue.append(item)
            self._changed.notify_all()

    def _finish(self, item: _Item, result: Answer | Exception | None = None) -> None:
        """Frees an item's place, once, and then gives its answer: who has one may ask again."""
        with self._changed:
            if not item.held:
                return
            item.held = False
            self._held -= 1
            self._changed.notify_all()
        if result is not None:
            item.give(result)

    def _work(self) -> None:
        try:
            self._warm_up()
        except Exception as error:  # noqa: BLE001 - whatever a model raises, it cannot be served
            self.state = "failed"
            self._failed(error)
            return
        self.metrics.ready.labels(self.name, self.predictor.version).set(1)
        self.state = "ready"
        while items := self._take():
            try:
                self._answer([item for item in items if not item.future.cancelled()])
            except Exception as error:  # noqa: BLE001 - the next batch may be well
                for item in items:
                    self._finish(item, error)
            for item in items:  # whoever asked has gone
                self._finish(item)

    def _warm_up(self) -> None:
        side, size = self.predictor.facts["image_size"], 1
        while True:
            size = min(size, self.limits.max_batch)
            self.predictor.answer(np.zeros((size, side, side, 3), np.uint8))
            if size == self.limits.max_batch:
                break
            size *= 2
        if self._heat_map:
            self._heat_map(np.zeros((side, side, 3), np.uint8), 0)

    def _take(self) -> list[_Item]:
        """Waits for images; returns at most a batch, none when there will be no more."""
        most = self.limits.max_batch
        with self._changed:
            self._changed.wait_for(lambda: self._queue or (self._closing and not self._held))
            wait = self.limits.max_wait_ms / 1000
            # While images are being decoded, more are to come.
            more = lambda: len(self._queue) >= min(most, self._held) or self._closing  # noqa: E731
            self._changed.wait_for(more, wait)
            return [self._queue.popleft() for _ in range(min(most, len(self._queue)))]

    def _answer(self, items: list[_Item]) -> None:
        if not items:
            return
        began, count = time.perf_counter(), len(items)
        images = np.stack([item.pixels for item in items])
        found = self.predictor.answer(self._padded(images))
        logits, features = (np.asarray(found[key])[:count] for key in ("logits", "features"))
        probabilities = softmax(logits, self.predictor.facts["temperature"])
        sets = self.predictor.sets(logits)
        took = time.perf_counter() - began
        self.metrics.inference.labels(self.name).observe(took)
        self.metrics.batch.labels(self.name).observe(count)
        for i, item in enumerate(items):
            if not np.isfinite(probabilities[i]).all():
                text = "the model has no answer: what it computes is no number"
                self._finish(item, Unreadable(text))
                continue
            waited = began - item.since
            self.metrics.waited.labels(self.name).observe(waited)
            members = None if sets is None else sets[i]
            answer = Answer(
                probabilities[i], members, features[i], item.decode, waited, took, count
            )
            if item.explain:
                began_map = time.perf_counter()
                answer.heat_map = self._heat_map(images[i], int(probabilities[i].argmax()))
                answer.explain = time.perf_counter() - began_map
                self.metrics.explain.labels(self.name).observe(answer.explain)
            self._finish(item, answer)

    def _padded(self, images: np.ndarray) -> np.ndarray:
        """Returns a batch of one of the sizes that the model was compiled for."""
        if self.predictor.file.suffix == ".onnx":  # is not compiled for a size
            return images
        size = min(1 << (len(images) - 1).bit_length(), self.limits.max_batch)
        return images[np.minimum(np.arange(size), len(images) - 1)]


def heat_maps(predictor: Predictor) -> tuple[Callable[[np.ndarray, int], bytes] | None, str]:
    """Returns a function of an image [S, S, 3] and a class to a PNG file, or None and why."""
    model, side = predictor.model, predictor.facts["image_size"]
    name = predictor.file.name
    if model is None:
        return None, (
            f"{name} is a compiled program, which has no gradients: serve the directory of the run "
            "or its model.safetensors for heat maps"
        )
    # These load Matplotlib, which a server of compiled programs does not need.
    from analysis.explain.heatmaps import overlay
    from analysis.explain.methods import default_stage, explainer

    if not model.trained_by_gradient or not default_stage(model, side):
        return None, f"{predictor.facts['model']} has no map of the image that Grad-CAM can weigh"
    explain = explainer(model, side, batch=1)

    def draw(image: np.ndarray, target: int) -> bytes:
        heat = explain(image[None], [target])[0]
        drawn = Image.fromarray((overlay(image, heat) * 255).round().astype(np.uint8))
        drawn.save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    return draw, ""
