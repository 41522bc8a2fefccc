"""Control images in training: what --control-path, --control-type and --control-encoder ask for (ControlAR, arXiv 2410.02705).

ask_control(args)                                  # the condition "control" among --condition, its data in --condition-path
weights, notes = with_control(args, weights, model)          # its weights, where a file to begin with has none
"""

import argparse
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.canny import canny
from autoregressive.models.conditions.control import PATCHES
from autoregressive.models.trunk import Trunk
from autoregressive.released import find_identity, rotary_grid
from autoregressive.systems import OWN_CONTROL, common_name, named_as
from autoregressive.train.flags import held_out_flag
from dataset.store import INDEX_FILE, read_record
from utils.checkpoint import Checkpoint, read_checkpoint
from utils.cli import given, layout_numbers
from utils.rng import item_seed
from utils.runs import find_checkpoint

ENCODER = OWN_CONTROL + "adapter.model."
UNREAD = ("pooler", "mask_token")  # of an encoder
_SIDES = 6  # told apart from the other draws of a step


def ask_control(args: argparse.Namespace) -> None:
    """Add the condition that --control-path, --control-type and --control-encoder describe to --condition, once.

    Without --control-path the edges of the images themselves are the control, in training that encodes these on the device.
    Raises ValueError for flags that do not go together, FileNotFoundError for a folder without control images.
    """
    flags = (args.control_path, args.control_type, args.control_encoder)
    if all(flag is None for flag in (*flags, args.val_control_path)):
        return
    if any(one["name"] == "control" for one in args.condition):
        raise ValueError("--condition control and --control-… describe the same condition: give one of them")
    if args.lora_rank:
        raise ValueError("--lora-rank trains a model without its control images: leave out one of the two")
    args.control_of_images = args.control_path is None
    kind = args.control_type or "canny"
    shape = None
    held_out, there = held_out_flag(args)
    if args.val_control_path and not (args.control_path and there):
        missing = held_out if args.control_path else "--control-path"
        raise ValueError(f"--val-control-path {args.val_control_path} needs {missing} too")
    if there and args.control_path and not args.val_control_path:
        raise ValueError(f"{held_out} {there} needs --val-control-path too")
    if args.control_path:
        shape = stored_shape(args.control_path, args)
        args.condition_path = [*(args.condition_path or ()), f"control={args.control_path}"]
        if args.val_control_path:
            stored_shape(args.val_control_path, args)
            args.val_condition_path = [*(args.val_condition_path or ()), f"control={args.val_control_path}"]
    elif kind != "canny" or getattr(args, "dataset", None) != "t2i":
        raise ValueError(
            "--control-path is needed: a folder of control images (tools/make_controls.py); edges alone are drawn while training, "
            "of --dataset t2i"
        )
    settings: dict[str, Any] = {"name": "control", "kind": kind}
    if shape and len(shape) == 2:
        if args.control_encoder:
            raise ValueError(f"--control-path {args.control_path} holds features already: leave out --control-encoder")
        settings |= {"encoder": None, "width": shape[1]}
    elif args.control_encoder is None:
        raise ValueError(
            "--control-encoder is needed: a DINOv2 or ViT of transformers by folder or name, or one drawn anew, as "
            "vit,width=64,layers=2,heads=2"
        )
    elif isinstance(args.control_encoder, dict):
        if unknown := set(args.control_encoder) - {"name", "width", "layers", "heads", "positions", "patch"}:
            raise ValueError(
                f"--control-encoder has {', '.join(sorted(unknown))}: give width, layers, heads, positions and patch alone"
            )
        settings |= {**args.control_encoder, "name": "control", "encoder": args.control_encoder["name"]}
    else:
        settings |= encoder_settings(args.control_encoder)
    args.condition = [*args.condition, settings]


def condition_settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the settings of --condition by name; those of control have the pixels of a token."""
    found = {one["name"]: {key: one[key] for key in one if key != "name"} for one in args.condition}
    if "control" in found:
        found["control"].setdefault("pixels", int(args.downsample_size))
        if found["control"].get("encoder") == "vit" and isinstance(args.control_encoder, dict):
            found["control"].setdefault("patch", found["control"]["pixels"])
    return found


def stored_shape(folder: str | Path, args: argparse.Namespace) -> list[int]:
    """Return the shape of each array that a folder holds, of pairs that of the first file's.

    Raises FileNotFoundError for a folder without control images, ValueError where they do not fit the codes.
    """
    places = [Path(folder), *sorted(place for place in Path(folder).glob("*") if place.is_dir())]
    there = [place for place in places if (place / INDEX_FILE).exists()]
    if not there:
        raise FileNotFoundError(f"{folder} has no control images: tools/make_controls.py writes such a folder")
    record = read_record(there[0] / INDEX_FILE)
    if "shape" not in record:
        return []  # codes or features, which their reader refuses
    shape, dtype = record["shape"][len(record["views"]) > 1 :], np.dtype(record["dtype"])
    side, cell = (
        int(args.image_size),
        given(args.downsample_size),
    )  # of images that are encoded the tokenizer tells the cells
    tokens = (side // cell) ** 2 if cell else shape[0]
    is_image = dtype == np.uint8 and shape in ([1, side, side], [3, side, side])
    if not is_image and not (dtype.kind == "f" and len(shape) == 2 and shape[0] == tokens):
        raise ValueError(
            f"{folder} holds arrays of {dtype} and shape {tuple(shape)}; control images for --image-size {side} are uint8 of "
            f"shape (1 or 3, {side}, {side}), features floats of shape (tokens, width)"
        )
    return shape


def edges_of(pixels: Tensor) -> Tensor:
    """Return the edges of images (B, 3, H, W) in [-1, 1], uint8 (B, 1, H, W)."""
    return canny(((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


@dataclass(frozen=True)
class RandomSides:
    """Sides of each step's pictures, each pair as likely as another.

    least, most: pixels, whole tokens of `cell` pixels. A picture has at most the tokens of a square of `square` pixels a side.
    """

    least: int
    most: int
    cell: int
    square: int
    seed: int

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "RandomSides":
        """Return what --random-sides asks for. Raises ValueError where the run has no pictures and controls to resize."""
        least, most, cell, square = *args.random_sides, int(args.downsample_size), int(args.image_size)
        asked, settings = f"--random-sides {least} {most}", condition_settings(args)
        if args.dataset != "t2i":
            raise ValueError(
                f"{asked} resizes images before they are encoded, and --dataset {args.dataset} has their codes: give --dataset t2i"
            )
        if [*settings] != ["control"] or not settings["control"].get("encoder"):
            raise ValueError(
                f"{asked} takes control images, which tell where a token is, no features and no other condition: give --control-encoder"
            )
        if (args.layout or {}).get("name", "raster") != "raster" or layout_numbers(args)[0] not in (None, 1):
            raise ValueError(f"{asked} takes raster order: leave out --layout and --ar-token-num")
        if any(args.random_orders or ()):
            raise ValueError(f"{asked} takes raster order: leave out --random-orders")
        if least % cell or most % cell or not least <= min(most, square):
            raise ValueError(
                f"{asked}: give multiples of {cell}, the pixels of a token, the first at most the second and --image-size {square}"
            )
        return cls(least, most, cell, square, args.global_seed)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Return every height and width."""
        sides = range(self.least, self.most + 1, self.cell)
        return [(height, width) for height in sides for width in sides if height * width <= self.square**2]

    def __call__(self, step: int) -> tuple[int, int]:
        """Return the height and width of an optimizer step, the same on every process."""
        return self.pairs[item_seed(self.seed, step, _SIDES) % len(self.pairs)]


def rotary_grid_to_train(args: argparse.Namespace, grid: int, resumed: dict[str, Any]) -> tuple[int | None, list[str]]:
    """Return the tokens a side of the rotary table that a run reads by a token's number, None for one size; lines for the log.

    A run that begins with a file of several resolutions keeps the file's table, unless it is too small for a square of `grid` tokens a side.
    resumed: flags of the run to resume.
    """
    of_square = grid if args.random_sides else None
    path = getattr(args, "gpt_resume", None) or args.gpt_ckpt
    if resumed or not path or "control" not in condition_settings(args):
        return resumed.get("rope_grid", of_square), []
    saved = read_checkpoint(find_checkpoint(path))
    places = rotary_grid(find_identity(saved), saved.path)
    if places is None or places == grid:
        return places or of_square, []
    before = f"{saved.path} reads places from a rotary table of {places}x{places} tokens by a token's number"
    if places < grid:
        return of_square, [f"{before}, and this run from one of {grid}x{grid}"]
    return places, [f"{before}, and so does this run"]


def resized(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Resize images (B, C, H, W) to a height and width, bilinearly with antialiasing; uint8 stays uint8."""
    x = F.interpolate(images.float(), sides, mode="bilinear", antialias=True)
    return x if images.is_floating_point() else x.round().clamp(0, 255).to(images.dtype)


def encoder_settings(name: str) -> dict[str, Any]:
    """Return the settings of a pretrained encoder of transformers. Raises ValueError for what is no DINOv2 or ViT."""
    try:
        config = import_module("transformers").AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--control-encoder {name} is no model of transformers: {_first_line(error)}") from error
    if config.model_type not in PATCHES:
        raise ValueError(f"--control-encoder {name} is a {config.model_type}: give a {' or a '.join(PATCHES)}")
    return {
        "encoder": config.model_type,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "positions": config.image_size // config.patch_size,
        "patch": config.patch_size,
    }


def encoder_weights(name: str) -> dict[str, Tensor]:
    """Return the weights of a pretrained encoder. Raises ValueError where some are missing."""
    try:
        loaded, told = import_module("transformers").AutoModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--control-encoder {name} has no weights: {_first_line(error)}") from error
    missing = sorted(key for key in told["missing_keys"] if not any(word in key for word in UNREAD))
    if missing:
        raise ValueError(f"--control-encoder {name} lacks {len(missing)} of its weights, as {missing[0]}")
    return loaded.state_dict()


def with_control(
    args: argparse.Namespace, weights: Checkpoint | None, model: Trunk
) -> tuple[Checkpoint | None, list[str]]:
    """Give weights to begin with the parts of the control that they lack. Every process calls it together.

    weights: of a file, None for a run that begins anew.
    Returns them, None where the model's own are to stay, and lines about it.
    """
    name = args.control_encoder if isinstance(args.control_encoder, str) else None
    if "control" not in model.conditions or (weights is None and name is None):
        return weights, []
    own = model.state_dict()
    before = {} if weights is None else named_as(own, weights.model)
    wanted = [key for key in own if key not in before and (weights is None or key.startswith(OWN_CONTROL))]
    found = before | {key: whole(own[key]) for key in wanted}
    notes = []
    if any(key.startswith(OWN_CONTROL) for key in wanted):
        notes = ["the control begins anew"]
    if name and any(key.startswith(ENCODER) for key in wanted):
        trained = {common_name(ENCODER + key): weight for key, weight in encoder_weights(name).items()}
        found |= {key: trained[common_name(key)].float() for key in own if key.startswith(ENCODER)}
        notes = [f"the control begins anew, its encoder as {name}"]
    if weights is not None:
        return replace(weights, model=found), notes
    return Checkpoint(Path(name or ""), found, None, None, None, None, "ddp"), notes


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor or of all its shards, float32 on the CPU."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().float().cpu().clone()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
