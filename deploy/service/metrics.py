"""What a server counts, in a registry of its own, as text that Prometheus reads."""

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        disable_created_metrics()
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes and so on
        make = lambda kind, name, text, *labels, **options: kind(  # noqa: E731
            f"archcompare_{name}", text, labels, registry=self.registry, **options
        )
        of = ("route", "model")
        count = lambda *words: make(Counter, *words)  # noqa: E731
        gauge = lambda *words: make(Gauge, *words)  # noqa: E731
        time = lambda *words: make(Histogram, *words, buckets=SECONDS)  # noqa: E731
        self.requests = count("requests", "Requests answered or refused.", *of, "status")
        self.seconds = time("request_seconds", "Seconds from a request's head to its answer.", *of)
        self.decode = time("decode_seconds", "Seconds to decode an image.", "model")
        self.waited = time("queue_seconds", "Seconds a decoded image waited for a batch.", "model")
        self.inference = time("inference_seconds", "Seconds of the model for a batch.", "model")
        self.explain = time("explain_seconds", "Seconds to draw a heat map.", "model")
        text = "Number of images in a batch."
        self.batch = make(Histogram, "batch_images", text, "model", buckets=SIZES)
        self.queue = gauge("queue_images", "Images taken and not yet answered.", "model")
        self.ready = gauge("model_ready", "Whether a model is warm (1 or 0).", "model", "version")
        self.images = count("images", "Images by likeliest class.", "model", "class")
        self.unread = count("images_unreadable", "Images that could not be answered.", "model")
        self.review = count("images_to_review", "Images that a person should look at.", "model")
        self.pending = gauge("pending_bytes", "Bytes of all requests in memory.")
        self.log_failing = gauge("log_failing", "Whether logging answers fails now (1 or 0).")
        self.log_failures = count("log_failures", "Answers that were not logged.")
        self.corrections = count("corrections", "Labels that were kept as feedback.")

    def know(self, model: str, version: str, classes: Iterable[str]) -> None:
        """Begins the series of a model at 0, so that their first increase is seen."""
        self.ready.labels(model, version).set(0)
        for name in classes:
            self.images.labels(model, name)
        for series in (self.decode, self.waited, self.inference, self.batch, self.unread):
            series.labels(model)
        self.review.labels(model)
