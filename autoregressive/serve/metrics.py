"""Metrics of a server for Prometheus, and its log, a JSON object a line."""

import json
import logging
import os
import sys
import time
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

disable_created_metrics()  # images_created would be the time at which the counter `images` was made


class Metrics:
    """The counters of one server, each with the label `model`, in a registry of their own. `text` is what /metrics answers."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry()

        def made(kind: type, name: str, help: str, *labels: str, **more: Any) -> Any:
            metric = kind(name, help, ["model", *labels], registry=self.registry, **more)
            return partial(metric.labels, model) if labels else metric.labels(model)

        seconds = partial(made, Histogram, buckets=SECONDS)
        self.requests = made(
            Counter, "image_requests", "Requests for images, by the status they were answered with", "status"
        )
        self.seconds = seconds("image_request_seconds", "From accepting a request to the last of its images")
        self.waiting = seconds("image_waiting_seconds", "From accepting an image to its first tokens")
        self.first_row = seconds("image_first_row_seconds", "From accepting an image to its first row of tokens")
        self.drawing = seconds("image_drawing_seconds", "From an image's first tokens to its file")
        self.queued = made(Gauge, "image_queue_length", "Images accepted and not begun")
        self.in_flight = made(Gauge, "images_in_flight", "Images being drawn")
        self.images = made(Counter, "images", "Images drawn whole")
        self.tokens = made(Counter, "image_tokens", "Tokens drawn, those of cancelled images too")
        self.engine_up = made(Gauge, "engine_up", "1, or 0 where the engine has died or hangs")
        self.token_age = made(Gauge, "engine_token_age_seconds", "Since the last token while images are drawn, else 0")

    def text(self) -> bytes:
        """Return all of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, what happened, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json() -> None:
    """Have everything that is logged, vLLM's and the HTTP server's lines too, go to standard output in this form."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # vLLM warns of settings that are meant, such as no chunked prefill; INFO has it tell what it does.
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))
    logging.captureWarnings(True)
