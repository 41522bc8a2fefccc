"""Pictures for the demo's page (app.py), drawn by a server of autoregressive/serve, here or elsewhere, through its HTTP interface."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from html import escape
from math import isqrt
from types import MappingProxyType
from typing import Any

import httpx

from autoregressive.class_names import class_choice, find_class
from autoregressive.serve.engine import ModelInfo
from utils.errors import beginning

MOST_IMAGES = 16
PREVIEWS = 6  # at most, of an image
SECONDS_BETWEEN_VIEWS = 0.2
# A stream has a line every few seconds, however long the picture takes.
HTTP = {"timeout": httpx.Timeout(10, read=90), "limits": httpx.Limits(max_connections=None)}


@dataclass
class Picture:
    """One image as it is drawn. rows: of tokens that `png` shows, of `of_rows`."""

    seed: int
    png: bytes = b""
    rows: int = 0
    of_rows: int = 1
    seconds: float | None = None  # once it is finished
    waits: bool = False  # the server has no room for it yet
    warnings: tuple[str, ...] = ()  # of the server, on what was asked


@dataclass(frozen=True)
class View:
    """State of a drawing to show: pictures as (name, PNG, caption), and how far it is, in HTML."""

    pictures: list[tuple[str, bytes, str]]
    status: str
    done: bool


class Painter:
    """Draws with one server's model. client: its base URL is the server's, where `v1/models` is found."""

    def __init__(self, client: httpx.AsyncClient, info: ModelInfo):
        self.client, self.info = client, info

    @classmethod
    async def connect(cls, url: str, api_key: str | None = None) -> "Painter":
        """Ask the server at `url` which model it has. Raises ConnectionError where no such server answers."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base = url.rstrip("/").removesuffix("/v1") + "/"
        try:
            client = httpx.AsyncClient(base_url=base, headers=headers, **HTTP)
            answer = await client.get("v1/models", timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ConnectionError(f"no server answers at {url}: {error or type(error).__name__}") from error
        if answer.status_code != 200:
            raise ConnectionError(f"the server at {url} answers {answer.status_code}: {refusal(answer.content)}")
        try:
            model = answer.json()["data"][0]
            fields = {name: model[name] for name in ("kind", "image_size", "tokens", "num_classes")}
            classes, control = tuple(model["classes"]), model.get("control")  # which earlier editions do not tell
        except (ValueError, LookupError, TypeError) as error:
            raise ConnectionError(f"{url} is no server of this project: its v1/models lists no such model") from error
        return cls(client, ModelInfo(model["id"], **fields, raster=True, classes=classes, control=control))

    async def draw(
        self,
        asked: object,
        *,
        count: int = 1,
        seed: int = 0,
        pictures: Mapping[str, bytes] = MappingProxyType({}),
        **settings: Any,
    ) -> AsyncIterator[View]:
        """Draw `count` images of a class or a prompt, with the seeds `seed`, `seed + 1`, …; the last view is complete.

        pictures: files by name, `control_image` of a model that draws by one; `image`, whose transparent pixels are to be
            filled in place of a whole image.
        settings: fields of the server's requests (SamplingConfig).
        Raises ValueError for what the model cannot take, ConnectionError where the server does not answer.
        """
        if not 1 <= count <= MOST_IMAGES:
            raise ValueError(f"the number of images is 1 to {MOST_IMAGES}, got {count}")
        if missing := [name for name, value in settings.items() if value is None]:
            raise ValueError(f"no value is given for {missing[0].replace('_', ' ')}")
        if self.info.kind == "t2i":
            what, body = beginning(str(asked or "")), {"prompt": str(asked or "")}
        else:
            label = find_class(asked, self.info.classes)
            what, body = class_choice(label, self.info.classes[label]), {"class_label": label}
        rows = max(1, round(isqrt(self.info.tokens) / PREVIEWS))
        if "image" not in pictures:
            body |= {"stream": True, "partial_rows": rows}
            body |= {name: base64.b64encode(file).decode() for name, file in pictures.items()}
        body |= settings
        began, drawn = time.monotonic(), [Picture(seed + i) for i in range(count)]
        each = [(picture, {**body, "seed": picture.seed}, pictures) for picture in drawn]
        tasks = [asyncio.create_task(self._image(*one)) for one in each]
        try:
            while True:
                done, left = await asyncio.wait(
                    tasks, timeout=SECONDS_BETWEEN_VIEWS, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
                yield view(drawn, what, settings, time.monotonic() - began)
                if not left:
                    return
        except httpx.HTTPError as error:
            raise ConnectionError(f"the server is gone: {error or type(error).__name__}") from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _image(self, picture: Picture, body: dict[str, Any], files: Mapping[str, bytes]) -> None:
        began = time.monotonic()
        while wait := await self._try(picture, body, files):
            picture.waits = True
            await asyncio.sleep(wait)
        picture.seconds = time.monotonic() - began

    async def _try(self, picture: Picture, body: dict[str, Any], files: Mapping[str, bytes]) -> float:
        """Have the server draw the picture, or fill its hole where `files` has an image.

        Returns 0, or the seconds after which to ask again where the server has no room.
        """
        filling, asked = "image" in files, ("v1/images/generations", {"json": body})
        if filling:
            fields = {name: str(value) for name, value in body.items()}
            timeout = httpx.Timeout(10, read=None)  # it answers when it is done
            asked = "v1/images/edits", {"data": fields, "files": files, "timeout": timeout}
        async with self.client.stream("POST", asked[0], **asked[1]) as answer:
            if answer.status_code == 429:
                return max(1.0, float(answer.headers.get("retry-after", 5)))
            if answer.status_code != 200:
                raise ValueError(refusal(await answer.aread()))
            picture.waits = False
            if filling:
                told = json.loads(await answer.aread())
                picture.png, picture.rows = base64.b64decode(told["data"][0]["b64_json"]), picture.of_rows
                picture.warnings = tuple(told["warnings"])
                return 0
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                event = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                picture.png = base64.b64decode(event["b64_json"])
                if event["type"] == "image_generation.completed":
                    picture.rows, picture.warnings = picture.of_rows, tuple(event.get("warnings", ()))
                    return 0
                picture.rows, picture.of_rows = event["rows"], event["of_rows"]
        raise ConnectionError("the server ended the stream before the image was whole")


def view(pictures: list[Picture], what: str, settings: dict[str, float], seconds: float) -> View:
    """Return what there is to show of some pictures."""
    shown = []
    for i, picture in enumerate(pictures):
        end = f"{picture.rows} of {picture.of_rows} rows" if picture.seconds is None else f"{picture.seconds:.1f} s"
        if picture.png:
            caption = f"{what} · seed {picture.seed} · {words(settings)} · {end}"
            shown.append((f"{i}-{picture.rows if picture.seconds is None else 'done'}.png", picture.png, caption))
    told = dict.fromkeys(note for picture in pictures for note in picture.warnings)
    notes = "".join(f"<div class='note'>{escape(note)}</div>" for note in told)
    images = f"{len(pictures)} image{'s' if len(pictures) > 1 else ''}"
    if all(picture.seconds is not None for picture in pictures):
        return View(shown, f"<div class='status' data-done='1'>{images} in {seconds:.1f} s</div>{notes}", True)
    part = sum(picture.rows / picture.of_rows for picture in pictures) / len(pictures)
    state = "waiting for the images of others" if all(p.waits for p in pictures) else f"{part:.0%}"
    bar = f"<progress value='{part:.3f}'></progress>"
    return View(shown, f"<div class='status'>{bar} {images}: {state}, {seconds:.0f} s</div>", False)


def words(settings: dict[str, Any]) -> str:
    """Return the given settings as they stand under an image."""
    told = []
    if "cfg_scale" in settings:
        scale, last = settings["cfg_scale"], settings.get("cfg_interval", -1)
        schedule, power = settings.get("cfg_schedule", "constant"), settings.get("cfg_power", 1)
        how = {"constant": "", "linear": ", linear"}.get(schedule, f", {schedule} {power:g}")
        to = f" to step {last:g}" if last >= 0 else ""
        told.append(f"guidance {scale:g}{how}{to}" if scale > 1 else "no guidance")
    if settings.get("temperature") == 0:
        return " · ".join([*told, "greedy"])
    for name, value in settings.items():
        if not name.startswith("cfg_") and (name, value) != ("steps", 0):
            told.append(f"{name.replace('_', '-')} {value if isinstance(value, str) else f'{value:g}'}")
    return " · ".join(told).replace("top-k 0", "top-k all")


def refusal(body: bytes) -> str:
    """Return the message of a server's error, or the beginning of what came in its place."""
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return beginning(body.decode(errors="replace").strip(), 200) or "nothing"


def error_html(error: BaseException | str) -> str:
    """Return a mistake's message, for the page."""
    text = str(error).strip() or type(error).__name__
    return f"<div class='error' role='alert'>{escape(text[:1].upper() + text[1:])}</div>"
