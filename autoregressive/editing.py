"""Pictures edited: a hole filled, surroundings drawn; what is kept of a picture decides what is drawn.

    filled, = pipeline.edit(Image.open("dog.png"), mask, 207, cfg_scale=2.0)      # mask: what to fill
    filled.info["effective"]                                                      # of 16 particles; below 2 it is luck
    wide, = pipeline.extend(Image.open("dog.png"), 207, left=64)

Tokens with a pixel in the hole are drawn (models/particles.py), the others are those of the picture. A tokenizer's codes
depend on the whole picture: around a grey hole they are none that a model has seen. So the hole is first filled with a
guess, that part of the ordinary image of the same seed; the picture is encoded, its hole drawn, and so once more with what
was drawn. In the end the picture's own pixels come back outside the hole, behind a feather.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from operator import index
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from autoregressive.models.on_cpu import missing_rows
from autoregressive.models.particles import PARTICLES, Filled, fill
from autoregressive.models.sampling import NotFiniteLogits
from autoregressive.pipeline import Features, ImagePipeline, OnStep
from autoregressive.request import Request
from utils.errors import require_whole
from utils.images import require_eight_bits
from utils.rng import item_seed

Box = Sequence[int]
"""Left, top, right and bottom in a picture's pixels, as PIL counts them."""

ROUNDS = 2


@dataclass(frozen=True)
class Hole:
    """A picture with a hole, as a model sees it."""

    pixels: np.ndarray  # uint8 (S, S, 3), continued smoothly in the hole
    hole: np.ndarray  # bool (S, S), the pixels to fill
    tokens: Tensor  # bool (N,) in raster order, the tokens to draw
    feather: int  # pixels within which drawn ones fade into the picture's own

    def filled(self, drawn: np.ndarray) -> np.ndarray:
        """Return the picture with its hole from a drawn one, uint8 (S, S, 3)."""
        share = feathered(self.hole, self.feather)[..., None]
        mixed = self.pixels * (1 - share) + drawn * share
        return np.where(share == 0, self.pixels, np.where(share == 1, drawn, mixed.round())).astype(np.uint8)


@dataclass(frozen=True)
class Edited:
    """A filled picture, and how well it fits."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    tokens: Tensor  # its codes, int64 (N,) in raster order
    log_evidence: float  # the estimated log-probability of what is kept
    effective: float  # the effective sample size, of `particles`
    particles: int

    @property
    def warning(self) -> str | None:
        """The warning of a fill that is one particle's luck."""
        if self.particles <= 2 or self.effective >= 2:
            return None
        size = f"{self.effective:.1f} of {self.particles} particles"
        return f"the effective sample size is {size}: what is drawn is one particle's luck; more particles fit better"


def edit(
    pipeline: ImagePipeline,
    image: Image.Image,
    mask: Image.Image | np.ndarray | None = None,
    asked: int | str | None = None,
    *,
    box: Box | None = None,
    features: Features | None = None,
    n: int = 1,
    particles: int = PARTICLES,
    rounds: int = ROUNDS,
    ring: int = 0,
    keep_pixels: bool = True,
    **settings: Any,
) -> list[Image.Image]:
    """Fill a hole in a picture, which is resized and cropped to the model's size.

    Args:
        mask: the hole, of the picture's size: transparent pixels, or white ones of a picture without transparency, or True
            in an array. Where neither mask nor box is given, the picture's own transparent pixels.
        asked: the class or the prompt of the whole picture.
        box: the hole, in place of a mask.
        features: in place of a prompt, as ImagePipeline.requests takes them.
        n: pictures, image i of the seed each.
        particles: of each picture; more make what is drawn fit what is kept, and take longer.
        rounds: times that the picture is encoded and its hole drawn, each with what the one before drew.
        ring: tokens around the hole that are drawn too: those beside it still know something of what was in it.
        keep_pixels: put the picture's own pixels back outside the hole.
        settings: as ImagePipeline.requests takes them (seed, cfg_scale, negative_classes, …).

    Returns:
        Pictures, each with its `info`: `log_evidence`, the estimated log-probability of what is kept, and `effective`, the
        effective sample size of its `particles` (1 where nothing that is kept comes after the hole).

    Raises:
        ValueError: for a hole that does not fit the picture, settings out of range, a class or prompt the model cannot take.
    """
    image = upright(image, "the picture")
    found = hole_in(image, mask, box)
    if not found.any():
        warnings.warn("the mask is empty: nothing is drawn, and the picture stays as it is", stacklevel=3)
    sizes = pipeline.image_size, pipeline.tokenizer.downsample
    hole = holed(*sizes, np.asarray(image.convert("RGB")), found, ring)
    requests = requests_for(pipeline, asked, features, n, particles, **settings)
    drawn = fill_holes(pipeline, [hole] * n, requests, rounds=rounds, keep_pixels=keep_pixels)
    for warning in dict.fromkeys(each.warning for each in drawn if each.warning):
        warnings.warn(warning, stacklevel=3)
    return [told(each.pixels, each) for each in drawn]


def extend(
    pipeline: ImagePipeline,
    image: Image.Image,
    asked: int | str | None = None,
    *,
    left: int = 0,
    right: int = 0,
    up: int = 0,
    down: int = 0,
    features: Features | None = None,
    n: int = 1,
    particles: int = PARTICLES,
    rounds: int = ROUNDS,
    seed: int = 0,
    **settings: Any,
) -> list[Image.Image]:
    """Draw a picture's surroundings. The picture, resized and cropped to the model's size, keeps its pixels.

    The model knows one size: windows of that size, of which a part is drawn already, are filled one after another.

    left, right, up, down: pixels to add, whole tokens.
    asked, features, n, particles, rounds, settings: as `edit` takes them. seed: of the first window.
    Raises ValueError for margins that are no whole tokens or none, and as `edit` does.
    """
    side, unit = pipeline.image_size, pipeline.tokenizer.downsample
    margins = {"left": left, "right": right, "up": up, "down": down}
    for name, margin in margins.items():
        require_whole(name, margin, 0)
        if margin % unit:
            raise ValueError(f"{name} is {margin!r}: give whole tokens of {unit} pixels, such as {unit}")
    if not any(margins.values()):
        raise ValueError("nothing is to be added: give left, right, up or down")
    square = ImageOps.fit(upright(image, "the picture").convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    requests = requests_for(pipeline, asked, features, n, particles, seed=seed, **settings)
    known, middle = np.zeros((up + side + down, left + side + right), bool), np.s_[up : up + side, left : left + side]
    canvases = np.zeros((n, *known.shape, 3), np.uint8)
    canvases[:, *middle], known[middle] = np.asarray(square), True
    last: list[Edited] = []
    for window in count():
        place = next_window(known, side, unit)
        holes = [replace(holed(side, unit, canvas[place], ~known[place]), feather=0) for canvas in canvases]
        if window:
            requests = [replace(request, seed=item_seed(seed, window, 6)) for request in requests]
        drawn = fill_holes(pipeline, holes, requests, rounds=rounds)
        for canvas, each in zip(canvases, drawn, strict=True):
            canvas[place] = each.pixels
        last = [worse(*pair) for pair in zip(last, drawn, strict=True)] if last else drawn
        known[place] = True
        if known.all():
            break
    for warning in dict.fromkeys(each.warning for each in last if each.warning):
        warnings.warn(warning, stacklevel=3)
    return [told(*each) for each in zip(canvases, last, strict=True)]


def requests_for(
    pipeline: ImagePipeline, asked: int | str | None, features: Features | None, n: int, particles: int, **settings: Any
) -> list[Request]:
    """Return a request, read, for each of n pictures of one class or prompt. Raises ValueError as ImagePipeline does."""
    require_whole("n", n)
    if asked is None and features is None:
        raise ValueError(f"give what the picture shows: a {'prompt' if pipeline.text else 'class'}")
    what = {"features": [features] * n} if features is not None else {"asked": [asked] * n}
    return pipeline.read(pipeline.requests(particles=particles, **what, **settings))


def fill_holes(
    pipeline: ImagePipeline,
    holes: Sequence[Hole],
    requests: Sequence[Request],
    *,
    rounds: int = ROUNDS,
    keep_pixels: bool = True,
    on_step: OnStep | None = None,
) -> list[Edited]:
    """Fill holes of one shape, one for each request, which `read` returned.

    keep_pixels, rounds: as `edit` takes them. on_step: called after each decode pass, as ImagePipeline.draw does.
    """
    require_whole("rounds", rounds)
    hole, found = holes[0].tokens, []
    for part in pipeline.micro_batches(requests):
        own = holes[len(found) : len(found) + len(part)]
        pictures = [each.pixels for each in own]
        if hole.any() and not hole.all():
            guess = pipeline.decode(pipeline.draw([replace(request, particles=1) for request in part], on_step=on_step))
            pictures = [each.filled(drawn) for each, drawn in zip(own, guess, strict=True)]
        codes = filled = drawn = None
        for _ in range(rounds):
            encoded = [pipeline.encode_image(Image.fromarray(picture))[0].cpu() for picture in pictures]
            known = torch.stack([each.masked_fill(hole, -1) for each in encoded])
            if codes is not None and known.equal(codes):
                break
            codes = known
            given = [replace(request, known=each) for request, each in zip(part, known, strict=True)]
            filled = pipeline.fill(given, on_step=on_step)
            drawn = pipeline.decode(filled.tokens)
            pictures = [each.filled(one) for each, one in zip(own, drawn, strict=True)]
        shown = pictures if keep_pixels else drawn
        each = zip(shown, filled.tokens.cpu(), filled.log_evidence, filled.effective, strict=True)
        found += [Edited(*one, filled.particles) for one in each]
    return found


def fill_codes(pipeline: ImagePipeline, requests: Sequence[Request], on_step: OnStep | None = None) -> Filled:
    """Fill the holes of one micro-batch with each request's particles (models/particles.py), as `draw` draws codes."""
    count, at_once = len(requests), pipeline.at_once(requests[0])
    padding = max(at_once - count, 0) if pipeline.device.type != "cpu" else missing_rows(pipeline.gpt, count)
    rows, first = [*requests, *requests[-1:] * padding], requests[0]
    inputs = pipeline.inputs(rows)
    whole = torch.full((len(rows), pipeline.gpt.layout.tokens), -1)
    try:
        filled = fill(
            pipeline.gpt,
            **inputs | {"known": whole if inputs["known"] is None else inputs["known"]},
            images=[(request.seed, request.index) for request in rows],
            particles=first.particles,
            window=pipeline.window,
            on_step=on_step,
            **vars(first.sampling),
        )
    except NotFiniteLogits as error:
        raise error.of(slice(count)) or error from None
    kept = {name: getattr(filled, name)[:count] for name in ("tokens", "scores", "log_evidence", "effective")}
    return replace(filled, **kept)


def worse(one: Edited, other: Edited) -> Edited:
    """Return what there is to tell of two windows of a picture: evidence of both, particles of the one with fewer effective ones."""
    least = min(one, other, key=lambda each: each.effective / each.particles)
    return replace(least, log_evidence=one.log_evidence + other.log_evidence)


def told(pixels: np.ndarray, edited: Edited) -> Image.Image:
    """Return a picture that tells of its filling in its `info`."""
    image = Image.fromarray(pixels)
    image.info |= {name: getattr(edited, name) for name in ("log_evidence", "effective", "particles")}
    return image


def upright(image: Image.Image, name: str) -> Image.Image:
    """Return a picture turned as its EXIF says. Raises ValueError for one of other than 8 bits. name: for messages."""
    require_eight_bits(image, name)
    return ImageOps.exif_transpose(image)


def hole_in(image: Image.Image, mask: Image.Image | np.ndarray | None = None, box: Box | None = None) -> np.ndarray:
    """Return the pixels of a picture to fill, bool (height, width). Raises ValueError where the hole does not fit it."""
    width, height = image.size
    if box is not None:
        if mask is not None:
            raise ValueError("the hole is given twice, as a mask and as a box: give one")
        try:
            left, top, right, bottom = map(index, box)
        except (TypeError, ValueError):
            raise ValueError(f"the box is {box!r}: give left, top, right and bottom in whole pixels") from None
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"the box {left} {top} {right} {bottom} is no part of a picture of {width}x{height} pixels"
            )
        hole = np.zeros((height, width), bool)
        hole[top:bottom, left:right] = True
        return hole
    if mask is None:
        if not has_alpha(image):
            raise ValueError("nothing says what to fill: give a mask, a box, or a picture with transparent pixels")
        mask = image
    elif isinstance(mask, Image.Image):
        mask = upright(mask, "the mask")
    if not isinstance(mask, Image.Image):
        hole = np.asarray(mask)
        if hole.ndim != 2:
            raise ValueError(f"the mask has the shape {hole.shape}: give a picture, or an array (height, width)")
        hole = hole.astype(bool)
    elif has_alpha(mask):
        hole = np.asarray(mask.convert("RGBA").getchannel("A")) < 128
    else:
        hole = np.asarray(mask.convert("L")) > 127
    if hole.shape != (height, width):
        size = "x".join(map(str, hole.shape[::-1]))
        raise ValueError(
            f"the mask has {size} pixels and the picture {width}x{height}: give a mask of the picture's size"
        )
    return hole


def has_alpha(image: Image.Image) -> bool:
    """Tell whether a picture may have transparent pixels."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def holed(side: int, unit: int, pixels: np.ndarray, hole: np.ndarray, ring: int = 0) -> Hole:
    """Return a picture (height, width, 3) with a hole, bool (height, width), as a model sees it.

    side, unit: pixels a side of the model's images and of a token. ring: as `edit` takes it.
    Raises ValueError for a hole of which nothing is left where the picture is cropped to a square.
    """
    require_whole("ring", ring, 0)
    smooth = Image.fromarray(continued(pixels, hole))
    square = np.asarray(ImageOps.fit(smooth, (side, side), Image.Resampling.BICUBIC))
    whole = ImageOps.fit(Image.fromarray(hole.astype(np.uint8) * 255), (side, side), Image.Resampling.BOX)
    fitted = np.asarray(whole) > 0
    if hole.any() and not fitted.any():
        raise ValueError(
            "the hole is outside the middle square to which the picture is cropped: crop it yourself first"
        )
    grid = torch.from_numpy(fitted).view(side // unit, unit, side // unit, unit).any(3).any(1)
    if ring:
        grid = F.max_pool2d(grid[None].float(), 2 * ring + 1, 1, ring)[0] > 0
    return Hole(square, fitted, grid.flatten(), unit // 2)


def continued(pixels: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Return a picture uint8 (H, W, 3) whose hole, bool (H, W), has the colours of its border, the smoother the farther in.

    Halves the picture until no hole is left, and fills each size from the next smaller one.
    """
    if not hole.any():
        return pixels
    values, weight = torch.tensor(pixels).permute(2, 0, 1)[None].float(), torch.from_numpy(~hole)[None, None].float()
    if hole.all():
        values, weight = torch.full_like(values, 128.0), torch.ones_like(weight)

    def filled(values: Tensor, weight: Tensor) -> Tensor:
        if weight.min() == 1:
            return values
        sums, share = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (values * weight, weight))
        smaller = filled(sums / share.clamp(min=1e-6), (share > 0).float())
        larger = F.interpolate(smaller, size=values.shape[2:], mode="bilinear")
        return torch.where(weight > 0, values, larger)

    return filled(values, weight)[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()


def feathered(hole: np.ndarray, feather: int) -> np.ndarray:
    """Return the share of drawn pixels, float32 (H, W): 1 in the hole, falling to 0 within `feather` pixels of it."""
    own = torch.from_numpy(hole)[None, None].float()
    grown = [F.max_pool2d(own, 2 * r + 1, 1, r) for r in range(max(feather, 1))]
    return torch.stack(grown).mean(0)[0, 0].numpy()


def next_window(known: np.ndarray, side: int, unit: int) -> tuple[slice, slice]:
    """Return the window of `side` pixels, a part of which is to be drawn, of which most is known already."""
    step = max(side // unit // 2, 1) * unit

    def starts(length: int) -> list[int]:
        return sorted({*range(0, length - side, step), length - side})

    windows = [(slice(y, y + side), slice(x, x + side)) for y in starts(known.shape[0]) for x in starts(known.shape[1])]
    return max((place for place in windows if not known[place].all()), key=lambda place: known[place].mean())
