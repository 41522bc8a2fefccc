"""What a server counts of itself, for Prometheus; and its log, a JSON object a line.

metrics = Metrics(); metrics.requests.labels("200").inc(); metrics.text()
log_as_json(); log.info("answered", extra={"fields": {"status": 200}})
"""

import json
import logging
import os
import sys
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """The counters of one server, in a registry of their own. `text` is what /metrics answers."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "image_requests",
            "Requests for images, by the status they were answered with",
            ["status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "image_request_seconds",
            "From accepting a request to the end of its answer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queued = Gauge("image_queue_length", "Images accepted and not begun", registry=self.registry)
        self.in_flight = Gauge("images_in_flight", "Images being drawn", registry=self.registry)
        self.images = Counter("images", "Images drawn whole", registry=self.registry)
        self.tokens = Counter("image_tokens", "Tokens drawn, those of cancelled images too", registry=self.registry)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
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


def json_handler(level: str | int = logging.NOTSET) -> logging.Handler:
    """A handler that writes such lines to standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    handler.setLevel(level)
    return handler


def vllm_handler() -> logging.Handler:
    """The same for vLLM's processes, of the level that VLLM_LOGGING_LEVEL names. vllm_logging.json names it."""
    return json_handler(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))


def log_as_json() -> None:
    """Has everything that is logged, the HTTP server's lines too, go to standard output in this form."""
    root = logging.getLogger()
    root.handlers, root.level = [json_handler()], logging.INFO
    logging.captureWarnings(True)
