"""Identity of a GPT's file: its config, or for a published file the config that its keys, shapes, flags and name tell.

    checkpoint = read_checkpoint("c2i_L_384.pt")
    identity = gpt_identity(checkpoint, image_size=384)       # {"model": …, "layout": …, "conditions": …}
    model = build_model(ModelArgs.from_identity(identity))

A released system is known by a function from its state dict to an identity; PUBLISHED lists them, and nothing else in the
tree looks at the names or shapes of a GPT's weights.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.build import TRUNKS
from autoregressive.models.conditions import CONDITIONS
from autoregressive.models.layouts import LAYOUTS
from autoregressive.models.sizes import GPT_SIZES, SPARE_PLACES
from tokenizer.released import looks_like
from utils.checkpoint import Checkpoint, parameter_count

State = Mapping[str, torch.Tensor]
CLASS_TABLE, NO_CAPTION = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
RAR_TABLE = "embeddings.weight"
SPECIAL_TABLE = "spe_tok_embeddings.special_embeddings.weight"
BELOW_HEAD = "medusa_output.weight"
SECOND_EXIT = "models of the layout neighbours alone have a second exit (medusa_norm, medusa_output and one more block)"


def llamagen_identity(state: State, path: str | Path, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of a GPT of LlamaGen, NPP or PAR off its shapes, but for the grid, which leaves no trace in them.

    n_head: heads of the attention, which shapes do not show; by default those of the size in the table, None if in none.
    Raises ValueError where this is no such GPT, saying what it looks like instead.
    """
    needed = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight")
    absent = [name for name in needed if name not in state]
    if not absent and CLASS_TABLE not in state and NO_CAPTION not in state:
        absent = [f"{CLASS_TABLE} or {NO_CAPTION}"]
    if absent:
        raise ValueError(f"{path} is not a GPT checkpoint: {looks_like(state)}; a GPT has {', '.join(absent)}")
    if flat := [name for name in needed if state[name].dim() != 2]:
        raise ValueError(f"{path} is not a GPT checkpoint: its {', '.join(flat)} should be matrices")
    vocab_size, dim = state["tok_embeddings.weight"].shape
    n_layer = last_block(state) + 1
    size = size_name({"trunk": "llama", "n_layer": n_layer, "dim": dim})
    n_head = n_head or (GPT_SIZES[size].n_head if size else None)
    key_rows = (state["layers.0.attention.wqkv.weight"].shape[0] - dim) // 2
    special = state[SPECIAL_TABLE].shape[0] if SPECIAL_TABLE in state else 0
    if CLASS_TABLE in state:  # its last row is "no class"
        conditions = {"label": {"num_classes": state[CLASS_TABLE].shape[0] - 1}}
    else:
        tokens, caption_dim = state[NO_CAPTION].shape
        conditions = {"caption": {"caption_dim": caption_dim, "tokens": tokens}}
    return {
        "model": {
            "trunk": "llama",
            "dim": dim,
            "n_layer": n_layer,
            "n_head": n_head,
            "n_kv_head": key_rows * n_head // dim if n_head else None,
            "ffn_dim": state["layers.0.feed_forward.w1.weight"].shape[0],
            "vocab_size": vocab_size,
        },
        "layout": {"name": "parallel", "group_size": special + 1} if special else {"name": "raster"},
        "conditions": conditions,
    }


def nar_identity(state: State, path: str | Path, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of a GPT of NAR: LlamaGen's, with a last block that leads to the below head. As llamagen_identity."""
    second_exit = (f"layers.{last_block(state)}.", "medusa_")
    raster = {name: tensor for name, tensor in state.items() if not name.startswith(second_exit)}
    return {**llamagen_identity(raster, path, n_head), "layout": {"name": "neighbours"}}


def rar_identity(state: State, path: str | Path, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of a RAR off its shapes, which tell all of it. Raises ValueError where some of its tensors are missing."""
    needed = (
        "lm_head.weight",
        "embeddings.weight",
        "pos_embed",
        "blocks.0.attn.q_norm.weight",
        "blocks.0.mlp.fc1.weight",
    )
    if absent := [name for name in needed if name not in state]:
        raise ValueError(f"{path} is no whole RAR: it has no {', '.join(absent)}")
    vocab_size, dim = state["lm_head.weight"].shape
    tokens = state["pos_embed"].shape[1] - SPARE_PLACES
    return {
        "model": {
            "trunk": "rar",
            "dim": dim,
            "n_layer": last_block(state, "blocks") + 1,
            "n_head": dim // len(state["blocks.0.attn.q_norm.weight"]),
            "ffn_dim": len(state["blocks.0.mlp.fc1.weight"]),
            "vocab_size": vocab_size,
        },
        "layout": {"name": "raster", "grid_size": isqrt(tokens)},
        "conditions": {"label": {"num_classes": len(state["embeddings.weight"]) - vocab_size - 2}},
    }


def class_table(state: State) -> torch.Tensor:
    """Return the rows of a model's classes and, the last one, of "no class", (classes + 1, dim)."""
    if CLASS_TABLE in state:
        return state[CLASS_TABLE]
    if RAR_TABLE in state:  # behind those of the codes and of a mask that is never read
        return state[RAR_TABLE][len(state["lm_head.weight"]) + 1 :]
    return torch.cat([state["class_emb.weight"], state["fake_latent"]])


def with_class_table(state: State, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a state dict with another table of classes, as class_table returns it."""
    if CLASS_TABLE in state:
        return {**state, CLASS_TABLE: table}
    if RAR_TABLE in state:
        others = state[RAR_TABLE][: len(state["lm_head.weight"]) + 1]
        return {**state, RAR_TABLE: torch.cat([others.to(table), table])}
    return {**state, "class_emb.weight": table[:-1], "fake_latent": table[-1:]}


def last_block(state: State, blocks: str = "layers") -> int:
    """Return the number of the last block, -1 where there is none."""
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in state)
    return max((int(match[1]) for match in found if match), default=-1)


def lpd_identity(state: State, path: str | Path, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of an LPD off its shapes; its groups and their repulsion are those of the published runs.

    n_head: heads of the attention, which shapes do not show; by default those of the size in the table, None if in none.
    Raises ValueError where keys are missing.
    """
    needed = (
        "class_emb.weight",
        "token_emb.weight",
        "pos_embed",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
    )
    if absent := [name for name in needed if name not in state]:
        raise ValueError(f"{path} is not a GPT checkpoint: an LPD has {', '.join(absent)} too")
    vocab_size, dim = state["token_emb.weight"].shape
    n_layer = last_block(state, "blocks") + 1
    size = size_name({"trunk": "lpd", "n_layer": n_layer, "dim": dim})
    n_head = n_head or (GPT_SIZES[size].n_head if size else None)
    grid_size = isqrt(state["pos_embed"].shape[1] - 1)
    repulsion = 3 if size == "LPD-XXL" else 4 if grid_size == 32 else 2
    return {
        "model": {
            "trunk": "lpd",
            "dim": dim,
            "n_layer": n_layer,
            "n_head": n_head,
            "ffn_dim": len(state["blocks.0.mlp.fc1.weight"]),
            "vocab_size": vocab_size,
        },
        "layout": {"name": "queried", "repulsion": repulsion, "grid_size": grid_size},
        "conditions": {"label": {"num_classes": len(state["class_emb.weight"])}},
    }


CONTROL_MLP = "adapter_mlp.fc1.weight"
CONTROL_PARTS = ("adapter.", "adapter_mlp.", "condition_mlp.", "condition_layers.")
OWN_CONTROL = "extra_conditions.control."
NEVER_USED = ("condition_embeddings.weight", "condition_norm.weight", "condition_mlp.uncond_embedding")
# What release 5 of transformers calls weights of an encoder for what release 4 did, in the order of replacing.
NEWER_NAMES = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
ENCODER_HEADS = {384: 6, 768: 12, 1024: 16}


def controlar_identity(state: State, path: str | Path, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of a GPT of ControlAR: LlamaGen's and its control, whose kind the file's name tells. As llamagen_identity.

    Without the encoder's weights it is a model of features.
    """
    own = {name: tensor for name, tensor in state.items() if not name.startswith(CONTROL_PARTS)}
    identity = llamagen_identity(own, path, n_head)
    kinds = {"depth": "depth", "hed": "hed", "seg": "seg", "lineart": "lineart"}
    kind = next((kind for word, kind in kinds.items() if word in Path(path).name), "canny")
    control: dict[str, Any] = {"encoder": None, "width": state[CONTROL_MLP].shape[1], "kind": kind}
    start = "adapter.model."
    encoder = {common_name(name.removeprefix(start)): state[name] for name in state if name.startswith(start)}
    if "embeddings.patch_embeddings.projection.weight" in encoder:
        width, _, _, patch = encoder["embeddings.patch_embeddings.projection.weight"].shape
        control |= {
            "encoder": "dinov2" if "layers.0.layer_scale1.lambda1" in encoder else "vit",
            "layers": last_block(encoder) + 1,
            "heads": ENCODER_HEADS.get(width, max(width // 64, 1)),
            "positions": isqrt(encoder["embeddings.position_embeddings"].shape[1] - 1),
            "patch": patch,
        }
    layout = identity["layout"]
    if NEVER_USED[2] in state:  # it has a row for each token
        layout = {**layout, "grid_size": isqrt(len(state[NEVER_USED[2]]))}
    return {**identity, "layout": layout, "conditions": {**identity["conditions"], "control": control}}


def common_name(name: str) -> str:
    """Return one name for what releases 4 and 5 of transformers call a weight of an encoder."""
    for before, now in NEWER_NAMES.items():
        name = name.replace(before, now)
    return name


def named_as(own: Iterable[str], state: State) -> dict[str, torch.Tensor]:
    """Return weights by the names that a model's state dict has (`own`); others keep theirs.

    So a ControlAR's file fits, and an encoder that another release of transformers named. What ControlAR never uses is left out.
    """
    names = {common_name(name): name for name in own}
    found = {}
    for name, tensor in state.items():
        if CONTROL_MLP in state:
            if name in NEVER_USED or ".mask_token" in name or ".pooler." in name:
                continue
            name = OWN_CONTROL + name if name.startswith(CONTROL_PARTS) else name
        found[names.get(common_name(name), name)] = tensor
    return found


Recogniser = Callable[[State], bool]
IdentityOf = Callable[[State, str | Path, int | None], dict[str, Any]]
# For each released system its recogniser of keys, and the function from a state dict (and heads) to an identity.
PUBLISHED: list[tuple[Recogniser, IdentityOf]] = [
    (lambda state: CONTROL_MLP in state, controlar_identity),
    (lambda state: "target_aware_pos_embed" in state, rar_identity),
    (lambda state: BELOW_HEAD in state, nar_identity),
    (lambda state: {"fake_latent", "mask_token"} <= state.keys(), lpd_identity),
    (lambda state: True, llamagen_identity),
]


def find_identity(checkpoint: Checkpoint, n_head: int | None = None) -> dict[str, Any]:
    """Return what a file says of its GPT: its config, or for a published file what its weights tell.

    n_head: heads of the attention, for a published file that does not tell them.
    Raises ValueError where the file is of no GPT.
    """
    if "model" in checkpoint.config and "layout" in checkpoint.config:
        return {part: checkpoint.config[part] for part in ("model", "layout", "conditions")}
    for recognises, identity in PUBLISHED:
        if recognises(checkpoint.model):
            return identity(checkpoint.model, checkpoint.path, n_head)
    raise AssertionError


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

    Args:
        checkpoint: the file.
        image_size, downsample_size: pixels a side of the image and of a token, as the caller believes; None for no belief.
        n_head: heads of the attention, for a file of a size in no table that does not tell them.
        untold_image_size: taken, with a warning, where neither the caller nor the file tells the image size.
        flags: other beliefs, as check_flags compares them.

    Raises ValueError where the file disagrees with a belief, is of no GPT, or does not say the image size or the heads.
    """
    identity, path, recorded = find_identity(checkpoint, n_head), checkpoint.path, checkpoint.args or {}
    _require_registered(identity, checkpoint)
    if TRUNKS[identity["model"]["trunk"]].resizes and image_size:
        identity, image_size = _resized(identity, path, image_size, downsample_size or 16), None
    if image_size and "control" in identity["conditions"] and "_MR" in Path(path).name:  # of several resolutions
        side, layout = image_size // (downsample_size or 16), identity["layout"]
        model = {**identity["model"], "rope_grid": layout.get("grid_size", side)}
        identity, image_size = {**identity, "model": model, "layout": {**layout, "grid_size": side}}, None
    check_flags(identity, checkpoint, image_size=image_size, downsample_size=downsample_size, **flags)
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
    downsample_size = downsample_size or recorded.get("downsample_size") or 16
    if image_size % downsample_size:
        raise ValueError(f"--image-size {image_size} is not a multiple of --downsample-size {downsample_size}")
    return {**identity, "layout": {**identity["layout"], "grid_size": image_size // downsample_size}}


def _resized(identity: dict[str, Any], path: Path, image_size: int, downsample_size: int) -> dict[str, Any]:
    """Return an identity for another image size, with a warning where it is another one than the file's."""
    before, now = identity["layout"]["grid_size"], image_size // downsample_size
    if image_size % downsample_size:
        raise ValueError(f"--image-size {image_size} is not a multiple of --downsample-size {downsample_size}")
    if before == now:
        return identity
    side = before * downsample_size
    warnings.warn(
        f"{path} was trained at {side}x{side}: its table of places is resized for {image_size}x{image_size}, and its images "
        f"will be poor before it is trained there; leave out --image-size for {side}",
        stacklevel=3,
    )
    layout = {name: value for name, value in identity["layout"].items() if name != "group_sizes"}
    return {**identity, "layout": {**layout, "grid_size": now}}


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
    wrong = [name for name in (*_DEFAULTS, *given) if name in given and held[name] not in (None, given[name])]
    wrong = list(dict.fromkeys(wrong))
    problems = [f"{_flag(name)} {given[name]} (file: {held[name]})" for name in wrong]
    if "layout" in wrong and "neighbours" in (given["layout"], held["layout"]):
        problems.append(SECOND_EXIT)
    if "gpt_model" in given and held["gpt_model"] is None:
        problems.insert(0, f"--gpt-model {given['gpt_model']} (file: none of {', '.join(GPT_SIZES)})")
    if problems:
        codes = [name for name in ("vocab_size", "codebook_size") if name in given]  # training's word, and sampling's
        named = [
            name
            for name in (*_DEFAULTS, *codes, *(name for name in wrong if name == "layout"))
            if held[name] is not None
        ]
        fitting = {name: held[name] for name in named if name in wrong or held[name] != _DEFAULTS.get(name, 16384)}
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
