"""What a server counts, in a registry of its own, as text that Prometheus reads."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector("archcompare", registry=self.registry)
        make = lambda kind, name, text, *labels, **options: kind(  # noqa: E731
            f"archcompare_{name}", text, labels, registry=self.registry, **options
        )
        timed = {"buckets": SECONDS}
        self.requests = make(Counter, "requests", "Requests answered", "route", "status")
        self.seconds = make(Histogram, "request_seconds", "From head to answer", "route", **timed)
        self.decode = make(Histogram, "decode_seconds", "To decode an image", "model", **timed)
        self.waited = make(Histogram, "queue_seconds", "An image in the queue", "model", **timed)
        self.inference = make(Histogram, "inference_seconds", "Of a batch", "model", **timed)
        self.explain = make(Histogram, "explain_seconds", "Of a heat map", "model", **timed)
        self.batch = make(Histogram, "batch_images", "Images in a batch", "model", buckets=SIZES)
        self.queue = make(Gauge, "queue_images", "Images taken and not answered", "model")
        self.ready = make(Gauge, "model_ready", "Whether a model is warm", "model", "version")
        self.images = make(Counter, "images", "Images by predicted class", "model", "class")
        self.unread = make(Counter, "images_unreadable", "Images that are broken", "model")
        self.review = make(Counter, "images_to_review", "Images for a person", "model")
        self.log_failures = make(Counter, "log_failures", "Answers that were not logged")
        self.corrections = make(Counter, "corrections", "Labels given as feedback")
