"""The body of `POST /v1/images/generations`: what may stand in it, and what it asks the model for.

    body = ImageBody.model_validate({"prompt": "golden retriever", "n": 2, "seed": 3})
    asked = ask(body, info, Limits())           # asked.what == 207, asked.seeds == [3, 4]

Raises RequestError for what a client got wrong.
"""

import base64
import io
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import ConfigDict, Field, ValidationError, create_model

from autoregressive.class_names import find_class
from autoregressive.editing import ROUNDS, Hole, has_alpha, hole_in, holed
from autoregressive.models.conditions import ControlImage
from autoregressive.models.particles import PARTICLES
from autoregressive.models.settings import SamplingConfig
from autoregressive.serve.engine import ModelInfo
from autoregressive.serve.errors import REFUSED, RequestError, refuse
from utils.cli import CONTROL_TYPES
from utils.images import open_picture

MAX_SEED = 2**63 - 1
MAX_SIDE, MAX_ENLARGED = 2048, 4  # pixels a side, and how many times the model's

# Guidance scale and top-k as the published sampling scripts have them, by the model's kind.
PUBLISHED = {"c2i": {"cfg_scale": 4.0, "top_k": 2000}, "t2i": {"cfg_scale": 7.5, "top_k": 1000}}


@dataclass(frozen=True)
class Limits:
    """Limits of what a server accepts."""

    max_queue: int = 64  # images accepted and not yet drawn
    max_n: int = 8  # images of a request
    max_prompt: int = 4000  # characters
    max_body: int = 64 * 1024  # bytes
    max_upload: int = 16 * 2**20  # bytes of a body with pictures
    max_pixels: int = 4096 * 4096  # of a picture
    timeout: float = 600.0  # seconds from accepting a request to its pictures
    stall: float = 120.0  # seconds without a token after which an engine that draws counts as hanging


Ignored = Annotated[str | None, Field(description="Accepted for OpenAI's clients, and without effect.")]
Kind = Literal["png", "jpeg", "webp"]


def _declared(setting: Any) -> tuple[Any, Any]:
    """Return the type and the field by which pydantic checks a setting."""
    help, choices = setting.metadata["help"], setting.metadata.get("choices")
    if choices:
        return Literal[choices] | None, Field(None, description=help)
    least, most = setting.metadata["served"]
    return setting.type | None, Field(None, ge=least, le=most, description=help)


# The settings of SamplingConfig that a request may have, as pydantic declares them.
SERVED = {n: field for n, field in SamplingConfig.fields().items() if {"served", "choices"} & field.metadata.keys()}
_Settings: Any = create_model("Settings", **{name: _declared(field) for name, field in SERVED.items()})


class ImageBody(_Settings):
    """Body of a request. Of `prompt`, `class_label` and `class_name` it has one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, title="ImageGenerationRequest")

    prompt: str | None = Field(
        None, description="What to draw; of a class-conditional model the name or the number of a class."
    )
    class_label: int | None = Field(None, ge=0, description="Class-conditional models: the class, from 0.")
    class_name: str | None = Field(None, description="Class-conditional models: the class, by name.")
    negative_prompt: str | None = Field(
        None, description="Text-conditional models: what guidance leads away from, in place of no prompt."
    )
    negative_class: int | str | None = Field(
        None, description="Class-conditional models: the class that guidance leads away from, in place of none."
    )
    control_image: str | None = Field(
        None,
        description="Models with control images: the picture to draw by, a PNG, JPEG or WebP file in base64, in a form also as a file.",
    )
    control_type: Literal[CONTROL_TYPES] | None = Field(
        None, description="What is taken of control_image, where that is not what the model was trained by."
    )
    model: str | None = Field(None, description="The served model's name, as /v1/models has it.")
    n: int | None = Field(None, ge=1, description="Images; image i has the seed `seed + i`. Default 1.")
    size: str | None = Field(
        None,
        description=f'"auto" (the model\'s), or "WxW" with W up to {MAX_ENLARGED} times the model\'s and {MAX_SIDE}: images '
        "are square, and resized where W is not the model's.",
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Of the noise; by default a random one.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Another name of cfg_scale.")
    response_format: Literal["b64_json", "png", "jpeg", "webp"] | None = Field(
        None, description="JSON with files in base64 (default), or the file itself, as with Accept: image/png."
    )
    output_format: Kind | None = Field(None, description="Of the pictures' files. Default png.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp, 100 for the best. Default 100."
    )
    stream: bool | None = Field(None, description="Server-sent events: partial images, then each whole one.")
    partial_images: int | None = Field(
        None, ge=0, le=256, description="With stream: how many partial images, evenly spaced. Default 3."
    )
    partial_rows: int | None = Field(
        None, ge=1, le=256, description="With stream: a partial image after every so many rows of tokens."
    )
    background: Literal["opaque", "auto"] | None = Field(None, description="Pictures are opaque.")
    quality: Ignored = None
    style: Ignored = None
    moderation: Ignored = None
    user: Ignored = None
    safety_identifier: Ignored = None


class EditBody(ImageBody):
    """Fields of an edit, beside the pictures `image` and `mask`."""

    model_config = ConfigDict(title="ImageEditRequest", strict=False)

    particles: int | None = Field(
        None,
        ge=1,
        le=256,
        description=f"Fills of which one is taken by how well it fits what is kept. Default {PARTICLES}.",
    )
    rounds: int | None = Field(
        None, ge=1, le=8, description=f"Times that the picture is encoded and its hole drawn. Default {ROUNDS}."
    )
    ring: int | None = Field(None, ge=0, le=8, description="Tokens around the hole that are drawn too. Default 0.")
    keep_pixels: bool | None = Field(
        None, description="Put the picture's own pixels back outside the hole. Default true."
    )
    input_fidelity: Ignored = None


@dataclass(frozen=True)
class Edit:
    """A picture to edit. particles, rounds, keep_pixels: as editing.py:edit takes them."""

    hole: Hole
    particles: int
    rounds: int
    keep_pixels: bool


@dataclass(frozen=True)
class Asked:
    """A request as the server carries it out."""

    what: int | str  # a label, or a prompt
    negative: int | str | None  # what guidance leads away from
    seeds: list[int]  # one an image
    sampling: SamplingConfig
    size: int  # pixels a side
    format: Kind = "png"
    quality: int | None = None  # of the file
    raw: bool = False  # the answer is the file itself
    stream: bool = False
    partial: tuple[int, ...] = ()  # rows of tokens after which partial images come
    edit: Edit | None = None  # the picture to edit
    control: ControlImage | None = None  # the picture to draw by, where the model takes one


def ask(body: ImageBody, info: ModelInfo, limits: Limits, *, models: Sequence[str] = (), accept: str = "") -> Asked:
    """Return what a body asks of the model. models: its names (default: info.name). accept: the header of that name.

    Raises RequestError for what the model cannot draw or the server does not.
    """
    if body.model is not None and body.model not in (models or [info.name]):
        raise unknown_model(body.model, models or [info.name])
    count = body.n or 1
    if count > limits.max_n:
        raise refuse("n", f"n is {count}: a request has at most {limits.max_n} images")
    first = secrets.randbelow(2**31) if body.seed is None else body.seed
    sampling = _sampling(body, info)
    return Asked(
        what=_what_to_draw(body, info, limits),
        negative=_negative(body, info, limits, sampling.guided),
        seeds=[(first + i) % (MAX_SEED + 1) for i in range(count)],
        sampling=sampling,
        size=_side(body.size, info),
        stream=bool(body.stream),
        partial=_partial_rows(body, info),
        control=_control(body, info, limits),
        **_file(body, accept, count),
    )


def ask_edit(
    fields: Mapping[str, str], files: Mapping[str, bytes], info: ModelInfo, limits: Limits, token: int, **more: Any
) -> Asked:
    """Return what the fields and files of a form, by name, ask of the model.

    token: pixels a side of a token. more: models and accept, as `ask` takes them.
    Raises RequestError as `ask` does, and for what are no pictures of one size with a hole.
    """
    try:
        body = EditBody.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        raise invalid_body({**first, "loc": ("body", *first["loc"])}, EditBody) from error
    if body.stream or body.partial_images or body.partial_rows:
        raise refuse("stream", "an edit comes whole: leave out stream, partial_images and partial_rows")
    asked = ask(body, info, limits, **more)
    try:
        asked.sampling.check_particles(particles := body.particles or PARTICLES)
    except ValueError as error:
        raise refuse("particles", str(error)) from error
    hole = _hole(files, info.image_size, token, body.ring or 0, limits.max_pixels)
    return replace(asked, edit=Edit(hole, particles, body.rounds or ROUNDS, body.keep_pixels is not False))


def _control(body: ImageBody, info: ModelInfo, limits: Limits) -> ControlImage | None:
    """Return the picture that the model draws by, None for a model without control images."""
    if info.control is None:
        for param in ("control_image", "control_type", "control_strength"):
            if getattr(body, param) is not None:
                raise refuse(param, f"{info.name} takes no control image: leave out {param}")
        return None
    if body.control_image is None:
        raise refuse("control_image", f"{info.name} draws by a control image: send one in base64", "missing_image")
    encoded = body.control_image.rpartition(",")[2]  # "data:image/png;base64," may stand first
    try:
        file = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise refuse("control_image", f"control_image is not base64 ({error})", "invalid_image") from error
    return ControlImage(_picture("control_image", file, limits.max_pixels), body.control_type)


def _picture(param: str, file: bytes, most_pixels: int) -> Image.Image:
    try:
        return open_picture(io.BytesIO(file), param, most_pixels, ("PNG", "JPEG", "WEBP"))
    except ValueError as error:
        raise refuse(param, str(error), "invalid_image") from error


def _hole(files: Mapping[str, bytes], side: int, token: int, ring: int, most_pixels: int) -> Hole:
    pictures = {param: _picture(param, file, most_pixels) for param, file in files.items()}
    image, mask = pictures["image"], pictures.get("mask")
    width, height = image.size
    if width != height:
        raise refuse("image", f"image has {width}x{height} pixels: send a square one", "invalid_image")
    if mask is not None and not has_alpha(mask):
        message = f"mask is of mode {mask.mode}: its transparent pixels are filled, so send a PNG with an alpha channel"
        raise refuse("mask", message, "invalid_image")
    if mask is None and not has_alpha(image):
        raise refuse("mask", "mask is missing: send one, or an image with transparent pixels to fill", "missing_mask")
    try:
        hole = hole_in(image, mask)
    except ValueError as error:
        raise refuse("mask", str(error), "invalid_image") from error
    if not hole.any():
        param = "image" if mask is None else "mask"
        raise refuse(param, f"{param} has no transparent pixels: there is nothing to fill", "invalid_image")
    return holed(side, token, np.asarray(image.convert("RGB")), hole, ring)


def unknown_model(name: str, models: Sequence[str]) -> RequestError:
    """Return the answer to a request for another model."""
    message = f"there is no model {shown(name)}; this server has {' and '.join(map(repr, models))}"
    return RequestError(404, message, param="model", code="model_not_found")


def invalid_body(first: dict, body: type[ImageBody] = ImageBody) -> RequestError:
    """Return the refusal of a body, from the first of pydantic's errors."""
    kind, value, where = first["type"], first.get("input"), first["loc"][1:]
    if kind == "json_invalid":
        return RequestError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if kind == "string_unicode" and not where:  # a name that is no text
        kind, where = "extra_forbidden", [value]
    if not where:
        what = "nothing" if kind == "missing" else shown(value)
        return RequestError(400, f"the body is a JSON object, not {what}", code="invalid_json")
    name = str(where[0])
    hint = REFUSED.get(name) or REFUSED.get(f"{name}: {value}")
    if kind == "extra_forbidden":
        near = get_close_matches(name[:50], body.model_fields, n=1)
        hint = hint or (f"did you mean {near[0]}?" if near else f"there are {', '.join(body.model_fields)}")
        return refuse(name[:100], f"unknown parameter {shown(name)}; {hint}", "unknown_parameter")
    why = hint or f"it should be {first['msg'].removeprefix('Input should be ')}"
    return refuse(name, f"{name} is {shown(value)}: {why}")


def shown(value: object) -> str:
    """Return a value for a message: short, whatever it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = json.dumps(value, default=lambda value: "bytes")
    return text if len(text) <= 80 else text[:79] + "…"


def _sampling(body: ImageBody, info: ModelInfo) -> SamplingConfig:
    scale = body.cfg_scale if body.guidance_scale is None else body.guidance_scale
    if body.cfg_scale not in (None, scale):
        message = f"guidance_scale is {scale} and cfg_scale {body.cfg_scale}: they are one setting, give one"
        raise refuse("guidance_scale", message)
    given = {name: getattr(body, name) for name in SERVED} | {"cfg_scale": scale}
    return SamplingConfig(**PUBLISHED[info.kind] | {name: value for name, value in given.items() if value is not None})


def _what_to_draw(body: ImageBody, info: ModelInfo, limits: Limits) -> int | str:
    """Return the label, or the prompt."""
    given = {param: getattr(body, param) for param in ("prompt", "class_label", "class_name")}
    for param, value in given.items():
        _check_text(param, value, limits)
    given = {p: v for p, v in given.items() if v is not None and (p != "prompt" or v.strip())}
    if info.kind == "t2i":
        if other := given.keys() - {"prompt"}:
            param = min(other)
            raise refuse(param, f"{info.name} draws from prompts: give prompt, not {param}")
        if not given:
            raise refuse("prompt", "prompt is blank: write what to draw", "missing_prompt")
        return given["prompt"]
    if len(given) != 1:
        raise refuse(
            next(iter(given), "class_label"),
            f"{info.name} draws one of {info.num_classes} classes: give one of class_label, class_name and prompt (a "
            f"class's name or number), got {' and '.join(given) or 'none'}",
            "invalid_value" if given else "missing_class",
        )
    return _label(*given.popitem(), info.classes)


def _negative(body: ImageBody, info: ModelInfo, limits: Limits, guided: bool) -> int | str | None:
    """Return what guidance leads away from."""
    fits, other = ("negative_class", "negative_prompt")[:: -1 if info.kind == "t2i" else 1]
    if getattr(body, other) is not None:
        what = "prompts" if info.kind == "t2i" else "classes"
        raise refuse(other, f"{info.name} draws from {what}: give {fits}, not {other}")
    value = getattr(body, fits)
    if value is not None and not guided:
        raise refuse(fits, f"{fits} has no effect without guidance: give a guidance_scale above 1, or leave it out")
    _check_text(fits, value, limits)
    return value if value is None or info.kind == "t2i" else _label(fits, value, info.classes)


def _check_text(param: str, text: str | int | None, limits: Limits) -> None:
    if not isinstance(text, str):
        return
    if re.search("[\ud800-\udfff]", text):
        raise refuse(param, f"{param} is {shown(text)}: half of a surrogate pair stands for no letter")
    if len(text) > limits.max_prompt:
        message = f"{param} has {len(text):,} characters: at most {limits.max_prompt:,} are read"
        raise refuse(param, message, "string_above_max_length")


def _label(param: str, asked: str | int, classes: Sequence[str]) -> int:
    try:
        return find_class(asked, classes)
    except ValueError as error:
        raise refuse(param, f"{param}: {error}", "unknown_class") from error


def _file(body: ImageBody, accept: str, count: int) -> dict:
    """Return the fields of Asked that tell of the files, from the body and the header Accept."""
    accepted = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    wanted = None if body.response_format == "b64_json" else body.response_format
    if body.response_format is None and "application/json" not in accepted:
        pictures = [kind.removeprefix("image/") for kind in accepted if kind.startswith("image/")]
        wanted = next((kind for kind in pictures if kind in ("png", "jpeg", "webp")), None)
    kind = body.output_format or wanted or "png"
    if wanted and wanted != kind:
        raise refuse("output_format", f"output_format is {kind} and the answer is to be {wanted}: give one of the two")
    if wanted and count > 1:
        raise refuse("n", f"n is {count}: an answer that is the file itself has one image")
    if wanted and body.stream:
        raise refuse("stream", "a stream has its images in base64: leave out stream, or ask for b64_json")
    quality = body.output_compression
    if kind == "png" and quality not in (None, 100):
        raise refuse("output_compression", "output_compression is of jpeg and webp: give one as output_format")
    return {
        "format": kind,
        "raw": bool(wanted),
        "quality": None if kind == "png" else 100 if quality is None else quality,
    }


def _side(size: str | None, info: ModelInfo) -> int:
    if size in (None, "auto"):
        return info.image_size
    side, most = info.image_size, min(MAX_SIDE, MAX_ENLARGED * info.image_size)
    sides = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size.lower())
    if not sides:
        raise refuse("size", f'size is {shown(size)}: write it as "{side}x{side}", or "auto"')
    width, height = map(int, sides.groups())
    if width != height or not 1 <= width <= max(most, side):
        most = max(most, side)
        raise refuse("size", f"size is {size}: images are square, of {side} pixels a side or resized to 1 to {most}")
    return width


def _partial_rows(body: ImageBody, info: ModelInfo) -> tuple[int, ...]:
    """Return the rows of tokens after which partial images come."""
    count, every = body.partial_images, body.partial_rows
    if count is not None and every is not None:
        raise refuse("partial_rows", "partial_images and partial_rows both tell when partial images come: give one")
    for param in ("partial_images", "partial_rows"):
        if getattr(body, param) is not None and not body.stream:
            raise refuse(param, f"{param} is for streams: give stream too")
    rows = round(info.tokens**0.5)
    if not body.stream:
        return ()
    if every is not None:
        return tuple(range(every, rows, every))
    if count is not None and count >= rows:
        message = f"partial_images is {count}: an image has {rows} rows, and so at most {rows - 1}"
        raise refuse("partial_images", message)
    count = min(3, rows - 1) if count is None else count
    return tuple(round(rows * (i + 1) / (count + 1)) for i in range(count))
