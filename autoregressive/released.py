"""Identity of a GPT's file: its config, or for a published file the config that its keys, shapes, flags and name tell.

    checkpoint = read_checkpoint("c2i_L_384.pt")
    identity = gpt_identity(checkpoint, image_size=384)       # {"model": …, "layout": …, "conditions": …}
    model = build_model(ModelArgs.from_identity(identity))

A file without a config is LlamaGen's, NPP's or PAR's, or of a system in PUBLISHED, which systems.py reads. Nothing else in
the tree looks at the names or shapes of a GPT's weights.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.args import TRUNKS
from autoregressive.models.conditions import CONDITIONS
from autoregressive.models.layouts import LAYOUTS
from autoregressive.models.sizes import GPT_SIZES
from tokenizer.released import looks_like
from utils.checkpoint import Checkpoint, parameter_count
from utils.cli import grid_size

State = Mapping[str, torch.Tensor]
# A weight that the files of a released system have, and the system's name in systems.py; the first that fits.
PUBLISHED = {
    "adapter_mlp.fc1.weight": "controlar",
    "target_aware_pos_embed": "rar",
    "medusa_output.weight": "nar",
    "fake_latent": "lpd",
}
CLASS_TABLE, NO_CAPTION = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
SPECIAL_TABLE = "spe_tok_embeddings.special_embeddings.weight"
MR_GRID = 48  # ControlAR's `_MR` files were trained at 768 pixels
SECOND_EXIT = "models of the layout neighbours alone have a second exit (medusa_norm, medusa_output and one more block)"


def require(checkpoint: Checkpoint, names: Sequence[str], system: str) -> None:
    """Raise ValueError where a file lacks some of the weights that its identity is read off."""
    if absent := [name for name in names if name not in checkpoint.model]:
        held = looks_like(checkpoint.model)
        raise ValueError(f"{checkpoint.path} is not a GPT checkpoint: {held}; {system} has {', '.join(absent)}")


def llamagen_identity(checkpoint: Checkpoint, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of a GPT of LlamaGen, NPP or PAR off its shapes, but for the grid, which leaves no trace in them.

    n_head: heads of the attention, which shapes do not show; by default those of the size in the table, None if in none.
    Raises ValueError where this is no such GPT, saying what it looks like instead.
    """
    state, path = checkpoint.model, checkpoint.path
    needed = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight")
    require(checkpoint, needed, "a GPT")
    if CLASS_TABLE not in state and NO_CAPTION not in state:
        require(checkpoint, [f"{CLASS_TABLE} or {NO_CAPTION}"], "a GPT")
    if flat := [name for name in needed if state[name].dim() != 2]:
        raise ValueError(f"{path} is not a GPT checkpoint: its {', '.join(flat)} should be matrices")
    (vocab_size, dim), (rows, _), (ffn_dim, _) = (state[name].shape for name in needed)
    n_layer = blocks_of(state)
    n_head = n_head or heads_in_table("llama", n_layer, dim)
    special = state[SPECIAL_TABLE].shape[0] if SPECIAL_TABLE in state else 0
    if CLASS_TABLE in state:  # its last row is "no class"
        conditions = {"label": {"num_classes": state[CLASS_TABLE].shape[0] - 1}}
    else:
        tokens, caption_dim = state[NO_CAPTION].shape
        conditions = {"caption": {"caption_dim": caption_dim, "tokens": tokens}}
    n_kv_head = (rows - dim) // 2 * n_head // dim if n_head else None
    model = {"trunk": "llama", "dim": dim, "n_layer": n_layer, "n_head": n_head, "n_kv_head": n_kv_head}
    layout = {"name": "parallel", "group_size": special + 1} if special else {"name": "raster"}
    model |= {"ffn_dim": ffn_dim, "vocab_size": vocab_size}
    return {"model": model, "layout": layout, "conditions": conditions}


def blocks_of(state: State, name: str = "layers") -> int:
    """Return the number of blocks that a state dict has under a name."""
    found = (re.match(rf"{name}\.(\d+)\.", key) for key in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def heads_in_table(trunk: str, n_layer: int, dim: int) -> int | None:
    """Return the heads of the attention that a model of these shapes has by the table of sizes, None where it has none."""
    name = size_name({"trunk": trunk, "n_layer": n_layer, "dim": dim})
    return GPT_SIZES[name].n_head if name else None


def find_identity(checkpoint: Checkpoint, n_head: int | None = None) -> dict[str, Any]:
    """Return what a file says of its GPT: its config, or for a published file what its weights tell.

    n_head: heads of the attention, for a published file that does not tell them.
    Raises ValueError where the file is of no GPT.
    """
    if "model" in checkpoint.config and "layout" in checkpoint.config:
        return {part: checkpoint.config[part] for part in ("model", "layout", "conditions")}
    for weight, system in PUBLISHED.items():
        if weight in checkpoint.model:
            return getattr(import_module("autoregressive.systems"), f"{system}_identity")(checkpoint, n_head)
    return llamagen_identity(checkpoint, n_head)


def released_tokenizer(identity: Mapping[str, Any]) -> str:
    """Return the name of the released tokenizer that goes with such a GPT."""
    if identity["model"]["trunk"] == "rar":
        return "maskgit-vqgan-imagenet-f16-256.bin"
    return "vq_ds16_t2i.pt" if "caption" in identity["conditions"] else "vq_ds16_c2i.pt"


def gpt_identity(
    checkpoint: Checkpoint,
    *,
    image_size: int | None = None,
    untold_image_size: int | None = None,
    downsample_size: int | None = None,
    n_head: int | None = None,
    **flags: Any,
) -> dict[str, Any]:
    """Return the whole identity of a file's GPT.

    image_size, downsample_size: pixels a side of the image and of a token, as the caller believes; None for no belief.
    n_head: heads of the attention, for a file of a size in no table that does not tell them.
    untold_image_size: taken, with a warning, where neither the caller nor the file tells the image size.
    flags: other beliefs, as check_flags compares them.
    Raises ValueError where the file disagrees with a belief, is of no GPT, or does not say the image size or the heads.
    """
    identity, path, recorded = find_identity(checkpoint, n_head), checkpoint.path, checkpoint.args or {}
    _require_registered(identity, checkpoint)
    believed = image_size
    side = (places := rotary_grid(identity, path)) and identity["layout"].get("grid_size", places)
    if image_size:
        side = grid_size(image_size, downsample_size or 16)
    if side and (other := _at_another_size(identity, path, side)):
        identity, believed = other, None
    check_flags(identity, checkpoint, image_size=believed, downsample_size=downsample_size, **flags)
    if identity["model"]["n_head"] is None:
        own = {name: size for name, size in GPT_SIZES.items() if size.trunk == identity["model"]["trunk"]}
        sizes = ", ".join(f"{name} ({size.n_layer} layers, dim {size.dim})" for name, size in own.items())
        raise ValueError(
            f"{path} holds {describe(identity)}, a size that is in no table, and no config; give n_head, known are {sizes}"
        )
    if n_head not in (None, held := identity["model"]["n_head"]):
        raise ValueError(f"{path} has {held} heads, and n_head is {n_head}: leave it out")
    if "grid_size" in identity["layout"]:
        return identity
    image_size = image_size or recorded.get("image_size") or image_size_in_name(Path(path).name)
    if image_size is None and untold_image_size:
        image_size = untold_image_size
        warnings.warn(
            f"{path} does not say its image size: {image_size} is taken; else give --image-size", stacklevel=3
        )
    if image_size is None:
        raise ValueError(f"{path} does not say for which image size it was trained: give --image-size")
    side = grid_size(image_size, downsample_size or recorded.get("downsample_size") or 16)
    return {**identity, "layout": {**identity["layout"], "grid_size": side}}


def rotary_grid(identity: Mapping[str, Any], path: str | Path) -> int | None:
    """Return the tokens a side of the rotary table that a model of several resolutions reads by a token's number; None for others.

    The table is that of training, whatever the image: models are trained so, and know no other.
    """
    model, layout = identity["model"], identity["layout"]
    if "control" not in identity["conditions"] or not ("rope_grid" in model or "_MR" in Path(path).name):
        return None
    return model.get("rope_grid") or layout.get("grid_size", MR_GRID)


def _at_another_size(identity: dict[str, Any], path: Path, side: int) -> dict[str, Any] | None:
    """Return the identity of a model that works at several sizes, with `side` tokens a side; None for a model of one size.

    Warns where tables of places are resized.
    """
    model, layout = identity["model"], identity["layout"]
    if places := rotary_grid(identity, path):
        model = {**model, "rope_grid": places}
    elif not TRUNKS[model["trunk"]].resizes:
        return None
    elif layout["grid_size"] != side:
        layout = {name: value for name, value in layout.items() if name != "group_sizes"}
        before = f"{layout['grid_size']}x{layout['grid_size']} tokens"
        warnings.warn(
            f"{path} was trained at {before}: its table of places is resized for {side}x{side}, and its images will be poor "
            f"before it is trained there; leave out --image-size for {before}",
            stacklevel=3,
        )
    return {**identity, "model": model, "layout": {**layout, "grid_size": side}}


def _require_registered(identity: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise ValueError where the trunk, the layout or a condition is not registered, with the files that the writer imported."""
    try:
        TRUNKS[identity["model"]["trunk"]]
        LAYOUTS[identity["layout"]["name"]]
        for name in identity["conditions"]:
            CONDITIONS[name]
    except ValueError as error:
        files = " ".join(f"--import {file}" for file in checkpoint.config.get("imports", ()))
        raise ValueError(f"{checkpoint.path}: {error}" + (f"; it was written with {files}" if files else "")) from error


def size_name(model: Mapping[str, Any]) -> str | None:
    """Return the table's name for the size of an identity's model, None where it has none."""
    shape = tuple(model[name] for name in ("trunk", "n_layer", "dim"))
    return next((name for name, size in GPT_SIZES.items() if (size.trunk, size.n_layer, size.dim) == shape), None)


def flags_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as the scripts' flags say it; None for a flag that does not concern it."""
    model, layout, conditions = identity["model"], identity["layout"], identity["conditions"]
    caption = conditions.get("caption")
    group = layout.get("group_size", 1)
    return {
        "gpt_model": size_name(model),
        "gpt_type": "t2i" if caption else "c2i",
        "num_classes": conditions.get("label", {}).get("num_classes"),
        "cls_token_num": caption["tokens"] if caption else 1,
        "caption_dim": caption["caption_dim"] if caption else None,
        "vocab_size": model["vocab_size"],
        "ar_token_num": group,
        "spe_token_num": group - 1,
        "layout": layout["name"],
    }


def describe(identity: Mapping[str, Any], state: State | None = None) -> str:
    """Return an identity in words; with the weights also their number."""
    flags, model = flags_of(identity), identity["model"]
    size = f"{model['n_layer']} layers, dim {model['dim']}"
    count = f", {parameter_count(state)}" if state else ""
    parts = [f"{flags['gpt_model'] or 'a GPT of no named size'} ({size}{count})"]
    if flags["gpt_type"] == "c2i":
        parts += ["class-conditional", f"{flags['num_classes']} classes"]
    else:
        parts += ["text-conditional", f"{flags['cls_token_num']} text tokens of {flags['caption_dim']}"]
    parts += [f"conditioned on {name}" for name in identity["conditions"] if name not in ("label", "caption")]
    parts.append(f"{flags['vocab_size']} codes")
    if flags["spe_token_num"]:
        parts.append(f"{flags['spe_token_num']} special tokens")
    elif flags["layout"] != "raster":
        parts.append(f"layout {flags['layout']}")
    return ", ".join(parts)


# The scripts' defaults, which an error's advice need not name.
_DEFAULTS = {
    "gpt_model": None,
    "gpt_type": "c2i",
    "num_classes": 1000,
    "cls_token_num": 1,
    "ar_token_num": 1,
    "spe_token_num": 0,
    "image_size": None,
    "downsample_size": 16,
}


def check_flags(identity: Mapping[str, Any], checkpoint: Checkpoint, **flags: Any) -> None:
    """Compare a script's flags with a file; flags that are None are not compared.

    The file decides. The image size and the downsampling of a published file are those of the flags recorded in it; where
    only its name tells the image size, a difference warns.
    Raises ValueError that lists each disagreement and the flags that fit.
    """
    path, recorded = checkpoint.path, checkpoint.args or {}
    size_in_name = image_size_in_name(Path(path).name)
    held = flags_of(identity)
    held |= {"codebook_size": held["vocab_size"]}
    held |= {name: recorded.get(name) for name in ("image_size", "downsample_size")}
    if held["image_size"] is None and "grid_size" in identity["layout"]:
        held["image_size"] = identity["layout"]["grid_size"] * (flags.get("downsample_size") or 16)
    given = {name: value for name, value in flags.items() if value is not None}
    names = list(dict.fromkeys((*_DEFAULTS, *given)))
    wrong = [name for name in names if name in given and held[name] not in (None, given[name])]
    problems = [f"{_flag(name)} {given[name]} (file: {held[name]})" for name in wrong]
    if "layout" in wrong and "neighbours" in (given["layout"], held["layout"]):
        problems.append(SECOND_EXIT)
    if "gpt_model" in given and held["gpt_model"] is None:
        problems.insert(0, f"--gpt-model {given['gpt_model']} (file: none of {', '.join(GPT_SIZES)})")
    if problems:
        defaults = {"vocab_size": 16384, "codebook_size": 16384, "layout": held["layout"], **_DEFAULTS}
        fitting = {
            name: held[name]
            for name in names
            if held[name] is not None and (name in wrong or held[name] != defaults.get(name, held[name]))
        }
        if size_in_name is not None:
            fitting.setdefault("image_size", size_in_name)
        raise ValueError(
            f"{path} holds {describe(identity, checkpoint.model)}; it does not fit the flags: {', '.join(problems)}. "
            f"Use: {' '.join(f'{_flag(name)} {value}' for name, value in fitting.items())}"
        )
    image_size = given.get("image_size")
    if held["image_size"] is None and None not in (image_size, size_in_name) and image_size != size_in_name:
        warnings.warn(
            f"by its name {path} was trained at {size_in_name}x{size_in_name}, and --image-size is {image_size}: "
            f"its images will be poor; use --image-size {size_in_name}",
            stacklevel=2,
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def image_size_in_name(name: str) -> int | None:
    """Return the image size that a released file's name tells, in pixels."""
    if name.startswith("PAR-"):
        return 384
    match = re.match(r"(?:c2i|t2i)_.+_(256|384|512)[._]", name)
    return int(match[1]) if match else None
