"""What the demo's page (app.py) calls: pictures as they are drawn, with what was asked and the time beneath, in plain Python.

painter = Painter(lambda: ImagePipeline.from_pretrained("FoundationVision/LlamaGen", gpt="c2i_L_384.pt"))
for view in painter.draw("golden retriever", count=4, seed=0, cfg_scale=4.0):
    view.pictures, view.done, view.total                    # uint8 (side, side, 3) with captions, tokens
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path

import numpy as np
from torch import Tensor

from autoregressive.class_names import class_choice, class_names, find_class
from autoregressive.models.sampling import SamplingConfig
from autoregressive.pipeline import ImagePipeline, shorten

MOST_IMAGES = 64

# One at a time, in one thread for good: models share a machine, and compiled steps belong to the thread that made them.
_WORKER = ThreadPoolExecutor(1, thread_name_prefix="drawing")


@dataclass(frozen=True)
class View:
    """What there is to show: pictures (uint8 (side, side, 3), caption), tokens done of all, seconds since the start."""

    pictures: list[tuple[np.ndarray, str]]
    done: int
    total: int
    seconds: float
    images: int  # asked for
    note: str = ""


class _Stopped(Exception):
    """Ends a drawing that nobody looks at any more."""


class Painter:
    """Draws with a pipeline that is loaded when first needed, and shows how far it is.

    load: makes the pipeline. names: of the classes, by number (class_names). preview_share: of the drawing's time, what may
    go to decoding unfinished images. interval: seconds between two views at least.
    """

    def __init__(
        self,
        load: Callable[[], ImagePipeline],
        names: str | Path | None = None,
        preview_share: float = 0.2,
        interval: float = 0.1,
    ):
        self._load, self._file = load, names
        self._pipeline: ImagePipeline | None = None
        self._lock = threading.Lock()
        self.names: list[str] = []
        self.preview_share, self.interval = preview_share, interval
        self.closed = False

    def pipeline(self) -> ImagePipeline:
        """The pipeline. Raises what loading raises, and tries again when it is asked for again."""
        with self._lock:
            if self._pipeline is None:
                made = self._load()
                if not made.is_text:
                    self.names = class_names(made.gpt.args.num_classes, self._file, made.gpt.file_config.get("classes"))
                self._pipeline = made
            return self._pipeline

    def close(self) -> None:
        """Ends what is being drawn after the step that it is at, and what waits: a program that ends waits for its threads."""
        self.closed = True

    @property
    def loaded(self) -> ImagePipeline | None:
        """The pipeline, where it was loaded."""
        return self._pipeline

    def draw(self, asked: str | int | None, *, count: int = 1, seed: int = 0, **sampling) -> Iterator[View]:
        """Draws `count` images of a class (find_class) or a prompt; yields views, of which the last is complete.

        Image i is that of `pipeline([asked], seed=seed, indices=[i])`. sampling: the fields of SamplingConfig. The
        drawing ends after the step that it is at when the iterator is closed.
        Raises ValueError for what the model cannot take, and what loading raises.
        """
        count, seed = whole_number("the number of images", count), whole_number("the seed", seed)
        if not 1 <= count <= MOST_IMAGES:
            raise ValueError(f"the number of images is 1 to {MOST_IMAGES}, got {count}")
        for name, value in sampling.items():
            if value is None:
                raise ValueError(f"no value is given for {name.replace('_', ' ')}")
        config = SamplingConfig(**sampling)
        views: queue.SimpleQueue[View | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                _Drawing(self, views.put, stop, count, seed, config).run(asked)
                views.put(None)
            except _Stopped:
                views.put(None)
            except BaseException as error:  # handed to the thread that waits for it
                views.put(error)

        _WORKER.submit(work)
        try:
            while (view := views.get()) is not None:
                if isinstance(view, BaseException):
                    raise view
                yield view
        finally:
            stop.set()


class _Drawing:
    """One call of Painter.draw, in the thread that draws."""

    def __init__(
        self,
        painter: Painter,
        show: Callable[[View], None],
        stop: threading.Event,
        count: int,
        seed: int,
        config: SamplingConfig,
    ):
        self.painter, self.show, self.stop = painter, show, stop
        self.count, self.seed, self.config = count, seed, config
        self.finished: list[tuple[np.ndarray, str]] = []
        self.previews: list[tuple[np.ndarray, str]] = []
        self.note = ""

    def run(self, asked: str | int | None) -> None:
        if self.stop.is_set() or self.painter.closed:
            return
        self.pipeline = pipeline = self.painter.pipeline()
        self.tokens = pipeline.gpt.layout.tokens
        self.start = self.shown = time.monotonic()
        self.spent, self.previewed = 0.0, 0  # on previews: seconds, and tokens in the last one
        settings = vars(self.config)
        if pipeline.is_text:
            prompt = "" if asked is None else str(asked)
            if not prompt.strip():
                raise ValueError("the prompt is blank: write what to draw")
            features = pipeline.encode([prompt])
            if len(features[0]) >= pipeline.t5_tokens:
                self.note = (
                    f"the prompt fills all {pipeline.t5_tokens} text tokens: what stands behind them is not read"
                )
            self.what, given = shorten(prompt), {"features": features * self.count}
        else:
            label = find_class(asked, self.painter.names)
            self.what, given = class_choice(label, self.painter.names[label]), {"asked": [label] * self.count}
        self.batch_start = time.monotonic()  # encoding, and loading what encodes, is no image's
        self.view(0)
        for numbers, images in pipeline.batches(**given, seed=self.seed, on_step=self.step, **settings):
            now = time.monotonic()
            together = f" for {len(numbers)}" if len(numbers) > 1 else ""
            took = f"{now - self.batch_start:.1f} s{together}"
            for number, image in zip(numbers, images, strict=True):
                self.finished.append((image, f"{self.what} · image {number} · {self.describe()} · {took}"))
            self.batch_start, self.previews, self.previewed = now, [], 0
            self.view(len(self.finished) * self.tokens)

    def step(self, numbers: list[int], done: int, tokens: Tensor) -> None:
        """Called after each decode step."""
        if self.stop.is_set() or self.painter.closed:
            raise _Stopped
        now = time.monotonic()
        if now - self.shown < self.painter.interval or done == self.tokens:
            return
        row, elapsed = self.pipeline.gpt.layout.grid_size, now - self.start
        if done - self.previewed >= row and self.spent <= self.painter.preview_share * elapsed:
            images = self.pipeline.preview(tokens, done)
            self.previews = [
                (image, f"{self.what} · image {number} · {done} of {self.tokens} tokens")
                for number, image in zip(numbers, images, strict=True)
            ]
            self.spent, self.previewed = self.spent + time.monotonic() - now, done
        self.view(len(self.finished) * self.tokens + done * len(numbers))

    def view(self, done: int) -> None:
        self.shown = time.monotonic()
        pictures = [*self.finished, *self.previews]
        self.show(View(pictures, done, self.count * self.tokens, self.shown - self.start, self.count, self.note))

    def describe(self) -> str:
        """The settings, as they stand under an image."""
        config = self.config
        words = [f"seed {self.seed}", f"guidance {config.cfg_scale:g}" if config.guided else "no guidance"]
        if config.guided and config.cfg_interval >= 0:
            words[-1] += f" to step {config.cfg_interval:g}"
        if config.greedy:
            return " · ".join([*words, "greedy"])
        top_k = f"top-k {config.top_k:g}" if config.top_k > 0 else "top-k all"
        return " · ".join([*words, top_k, f"top-p {config.top_p:g}", f"temperature {config.temperature:g}"])


def whole_number(what: str, value: object) -> int:
    """The value as an int. Raises ValueError for none, a fraction, or what is no number."""
    try:
        number = float(value)
        if isfinite(number) and number == int(number):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{what} must be a whole number, got {value!r}" if value is not None else f"{what} is missing")


def status_html(view: View) -> str:
    """How far a drawing is, for the page."""
    note = f"<div class='note'>{escape(view.note)}</div>" if view.note else ""
    images = f"{view.images} image{'s' if view.images > 1 else ''}"
    if view.done == view.total:
        return f"<div class='status' data-done='1'>{images} in {view.seconds:.1f} s</div>{note}"
    bar = f"<progress value='{view.done}' max='{view.total}'></progress>"
    return f"<div class='status'>{bar} {images}: {view.done} of {view.total} tokens, {view.seconds:.0f} s</div>{note}"


def error_html(error: BaseException | str) -> str:
    """A mistake's message, for the page."""
    text = str(error).strip() or type(error).__name__
    return f"<div class='error' role='alert'>{escape(text[:1].upper() + text[1:])}</div>"
