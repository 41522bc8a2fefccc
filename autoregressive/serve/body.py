"""The body of `POST /v1/images/generations`: what may stand in it, and what it asks the model for.

    body = read_body(b'{"prompt": "golden retriever", "n": 2, "seed": 3}')
    asked = ask(body, info, Limits(), ClassNames(1000))            # asked.label == 207, asked.seeds == [3, 4]

Both raise RequestError for what a client got wrong.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import ceil
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoregressive.class_names import class_names, find_class
from autoregressive.serve.engine import ImageRequest, ModelInfo
from autoregressive.serve.errors import RequestError

MAX_SEED = 2**63 - 1
MAX_SIDE = 2048

# Guidance scale and top-k as the published sampling scripts have them, by the model's kind.
PUBLISHED = {"c2i": (4.0, 2000), "t2i": (7.5, 1000)}


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    max_queue: images accepted and not yet done. max_n: images of a request. max_prompt: its characters.
    max_body: bytes. timeout: seconds from accepting a request to its answer.
    """

    max_queue: int = 64
    max_n: int = 8
    max_prompt: int = 4000
    max_body: int = 64 * 1024
    timeout: float = 600.0


Ignored = Annotated[str | None, Field(description="Accepted for OpenAI's clients, and without effect.")]


class ImageBody(BaseModel):
    """What to draw, and how. Of `prompt`, `class_label` and `class_name` a request has one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, title="ImageGenerationRequest")

    prompt: str | None = Field(
        None, description="What to draw; of a class-conditional model the name or the number of a class."
    )
    class_label: int | None = Field(None, ge=0, description="Class-conditional models: the class, from 0.")
    class_name: str | None = Field(None, description="Class-conditional models: the class, by name.")
    model: str | None = Field(None, description="The served model's name, as /v1/models has it.")
    n: int | None = Field(None, ge=1, description="Images; image i has the seed `seed + i`. Default 1.")
    size: str | None = Field(
        None,
        description=f'"auto" (the model\'s), or "WxW" with W up to {MAX_SIDE}: images are square, and resized where W is '
        "not the model's.",
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Of the noise; by default a random one.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Guidance; 1 or less is none.")
    cfg_scale: float | None = Field(None, ge=0, le=100, description="Another name of guidance_scale.")
    cfg_interval: float | None = Field(None, ge=-1, le=1e6, description="The last guided decode step, -1 for all.")
    temperature: float | None = Field(
        None, ge=0, le=100, description="Divides the logits; 0 takes the likeliest. Default 1."
    )
    top_k: int | None = Field(None, ge=-1, le=10**6, description="Keep the k most likely tokens, 0 or -1 for all.")
    top_p: float | None = Field(
        None, ge=0, le=1, description="Keep the most likely tokens of this mass, 0 for the likeliest. Default 1."
    )
    response_format: Literal["b64_json", "png"] | None = Field(
        None, description="JSON with PNGs in base64 (default), or the PNG itself, as with Accept: image/png."
    )
    stream: bool | None = Field(None, description="Server-sent events: partial images, then the whole one.")
    partial_images: int | None = Field(
        None, ge=0, le=256, description="With stream: how many partial images, evenly spaced. Default 3."
    )
    partial_rows: int | None = Field(
        None, ge=1, le=256, description="With stream: a partial image after every so many rows of tokens."
    )
    output_format: Literal["png"] | None = Field(None, description="PNG is what there is.")
    quality: Ignored = None
    style: Ignored = None
    background: Ignored = None
    moderation: Ignored = None
    user: Ignored = None


@dataclass(frozen=True)
class Asked:
    """A request as the server carries it out.

    label, or prompt: what to draw. seeds: one an image. settings: the fields of SamplingConfig. size: pixels a side.
    png: the answer is the picture itself. partial_rows: rows of tokens between partial images, 0 for none.
    """

    label: int | None
    prompt: str | None
    seeds: list[int]
    settings: dict[str, float]
    size: int
    png: bool = False
    stream: bool = False
    partial_rows: int = 0

    def requests(self, features: object = None) -> list[ImageRequest]:
        """What an engine is asked for. features: those of the prompt."""
        return [ImageRequest(label=self.label, features=features, seed=seed, **self.settings) for seed in self.seeds]


def read_body(content: bytes) -> ImageBody:
    """A body from its bytes. Raises RequestError 400 with the field that is wrong and why."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise RequestError(400, f"the body is a JSON object, not {_shown(fields)}", code="invalid_json")
    for name, value in fields.items():
        if name not in ImageBody.model_fields:
            near = get_close_matches(name[:50], ImageBody.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ImageBody.model_fields)}"
            raise RequestError(
                400, f"unknown parameter {_shown(name)}; {hint}", param=name[:100], code="unknown_parameter"
            )
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            message = f"{name} is {_shown(value)}: half of a surrogate pair stands for no letter"
            raise RequestError(400, message, param=name, code="invalid_value")
    try:
        return ImageBody.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name, why = str(first["loc"][0]), first["msg"].removeprefix("Input should be ")
        message = f"{name} is {_shown(first['input'])}: it should be {why}"
        raise RequestError(400, message, param=name, code="invalid_value") from error


class ClassNames:
    """The names of a model's classes (autoregressive/class_names.py), for requests."""

    def __init__(self, num_classes: int, recorded: Sequence[str] | None = None):
        self.num_classes = num_classes
        self.names = class_names(num_classes, recorded=recorded)

    def label(self, text: str, param: str) -> int:
        """The class that a name or a number tells. Raises RequestError 400 with names that are near."""
        try:
            return find_class(text, self.names)
        except ValueError as error:
            raise RequestError(400, f"{param}: {error}", param=param, code="unknown_class") from error

    def check(self, label: int, param: str) -> int:
        """The label. Raises RequestError 400 where the model does not have it."""
        if not 0 <= label < self.num_classes:
            raise RequestError(
                400,
                f"{param} is {label}: the model has classes 0 to {self.num_classes - 1}",
                param=param,
                code="unknown_class",
            )
        return label


def ask(body: ImageBody, info: ModelInfo, limits: Limits, classes: ClassNames, *, png: bool = False) -> Asked:
    """What a body asks of the model. png: the client takes nothing but a picture (Accept). Raises RequestError."""
    if body.model is not None and body.model != info.name:
        raise unknown_model(body.model, info)
    count = body.n or 1
    if count > limits.max_n:
        raise RequestError(
            400, f"n is {count}: a request has at most {limits.max_n} images", param="n", code="invalid_value"
        )
    label, prompt = _what_to_draw(body, info, limits, classes)
    if None not in (body.guidance_scale, body.cfg_scale) and body.guidance_scale != body.cfg_scale:
        raise RequestError(
            400,
            f"guidance_scale is {body.guidance_scale} and cfg_scale {body.cfg_scale}: they are one setting, give one",
            param="guidance_scale",
            code="invalid_value",
        )
    scale = body.guidance_scale if body.guidance_scale is not None else body.cfg_scale
    published_scale, published_k = PUBLISHED[info.kind]
    settings = {
        "cfg_scale": float(published_scale if scale is None else scale),
        "cfg_interval": -1 if body.cfg_interval is None else body.cfg_interval,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_k": published_k if body.top_k is None else body.top_k,
        "top_p": 1.0 if body.top_p is None else body.top_p,
    }
    png = png or body.response_format == "png"
    if count > 1 and (png or body.stream):
        what = "a stream" if body.stream else "a PNG answer"
        raise RequestError(400, f"n is {count}: {what} has one image", param="n", code="invalid_value")
    if png and body.stream:
        raise RequestError(
            400,
            "a stream has its images in base64: leave out stream, or ask for b64_json",
            param="stream",
            code="invalid_value",
        )
    first = secrets.randbelow(2**31) if body.seed is None else body.seed
    return Asked(
        label=label,
        prompt=prompt,
        seeds=[(first + i) % (MAX_SEED + 1) for i in range(count)],
        settings=settings,
        size=_side(body.size, info),
        png=png,
        stream=bool(body.stream),
        partial_rows=_partial_rows(body, info),
    )


def unknown_model(name: str, info: ModelInfo) -> RequestError:
    """The answer to a request for another model."""
    return RequestError(
        404, f"there is no model {_shown(name)}; this server has {info.name!r}", param="model", code="model_not_found"
    )


def _what_to_draw(
    body: ImageBody, info: ModelInfo, limits: Limits, classes: ClassNames
) -> tuple[int | None, str | None]:
    for param in ("prompt", "class_name"):
        text = getattr(body, param)
        if text is not None and len(text) > limits.max_prompt:
            raise RequestError(
                400,
                f"{param} has {len(text):,} characters: at most {limits.max_prompt:,} are read",
                param=param,
                code="string_above_max_length",
            )
    prompt = body.prompt if body.prompt and body.prompt.strip() else None
    if info.kind == "t2i":
        if body.class_label is not None or body.class_name is not None:
            param = "class_label" if body.class_label is not None else "class_name"
            raise RequestError(400, f"{info.name} draws from prompts: give prompt, not {param}", param=param)
        if prompt is None:
            raise RequestError(400, "prompt is blank: write what to draw", param="prompt", code="missing_prompt")
        return None, prompt
    given = {"prompt": prompt, "class_label": body.class_label, "class_name": body.class_name}
    given = {param: value for param, value in given.items() if value is not None}
    if len(given) != 1:
        raise RequestError(
            400,
            f"{info.name} draws one of {info.num_classes} classes: give one of class_label, class_name and prompt (a "
            f"class's name or number), got {' and '.join(given) or 'none'}",
            param=next(iter(given), "class_label"),
            code="missing_class" if not given else "invalid_value",
        )
    ((param, value),) = given.items()
    return (classes.check(value, param) if param == "class_label" else classes.label(value, param)), None


def _side(size: str | None, info: ModelInfo) -> int:
    if size in (None, "auto"):
        return info.image_size
    width, x, height = size.lower().partition("x")
    if not (x and all(side.isascii() and side.isdigit() and len(side) < 6 for side in (width, height))):
        raise RequestError(
            400,
            f'size is {_shown(size)}: write it as "{info.image_size}x{info.image_size}", or "auto"',
            param="size",
            code="invalid_value",
        )
    if int(width) != int(height) or not 1 <= int(width) <= MAX_SIDE:
        raise RequestError(
            400,
            f"size is {size}: images are square, of {info.image_size} pixels a side or resized to 1 to {MAX_SIDE}",
            param="size",
            code="invalid_value",
        )
    return int(width)


def _partial_rows(body: ImageBody, info: ModelInfo) -> int:
    """Rows of tokens between partial images; 0 for none."""
    if body.partial_images is not None and body.partial_rows is not None:
        raise RequestError(
            400,
            "partial_images and partial_rows both tell when partial images come: give one",
            param="partial_rows",
            code="invalid_value",
        )
    for param in ("partial_images", "partial_rows"):
        if getattr(body, param) is not None and not body.stream:
            raise RequestError(400, f"{param} is for streams: give stream too", param=param, code="invalid_value")
    if not body.stream:
        return 0
    if body.partial_rows is not None:
        return body.partial_rows
    count = 3 if body.partial_images is None else body.partial_images
    rows = round(info.tokens**0.5)
    return ceil(rows / (count + 1)) if count else 0


def _shown(value: object) -> str:
    """A value for a message: short, whatever it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"
