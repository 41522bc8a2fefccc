"""Released systems beside LlamaGen, NPP and PAR: NAR, RAR, LPD and ControlAR, each known by a weight of its files.

released.py asks for one by name, `rar_identity(checkpoint)`, where a file has no config. Shapes that tell no heads take
`n_head`, by default those of the size in the table.
"""

from collections.abc import Iterable
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.sizes import SPARE_PLACES
from autoregressive.released import CLASS_TABLE, State, blocks_of, heads_in_table, llamagen_identity, require, size_name
from utils.checkpoint import Checkpoint

RAR_TABLE, LPD_TABLE = "embeddings.weight", "class_emb.weight"


def nar_identity(checkpoint: Checkpoint, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of a GPT of NAR: LlamaGen's, with blocks behind it that lead to the below head.

    How many these are is told by the flags that the file records, else it is the one of all released files.
    """
    state, exit_blocks = checkpoint.model, (checkpoint.args or {}).get("medusa_attention_num") or 1
    first = blocks_of(state) - exit_blocks
    second_exit = ("medusa_", *(f"layers.{first + number}." for number in range(exit_blocks)))
    raster = {name: tensor for name, tensor in state.items() if not name.startswith(second_exit)}
    identity = llamagen_identity(replace(checkpoint, model=raster), n_head)
    model = identity["model"] | ({"exit_blocks": exit_blocks} if exit_blocks > 1 else {})
    return {**identity, "model": model, "layout": {"name": "neighbours"}}


def vit_shapes(trunk: str, state: State, n_head: int | None, vocab_size: int) -> dict[str, Any]:
    """Return the entry `model` of an identity of LayerNorm blocks."""
    ffn_dim, dim = state["blocks.0.mlp.fc1.weight"].shape
    n_layer = blocks_of(state, "blocks")
    n_head = n_head or heads_in_table(trunk, n_layer, dim)
    shapes = {"dim": dim, "n_layer": n_layer, "n_head": n_head, "ffn_dim": ffn_dim, "vocab_size": vocab_size}
    return {"trunk": trunk, **shapes}


def rar_identity(checkpoint: Checkpoint, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of a RAR off its shapes, which tell all of it. Raises ValueError where one of them is missing."""
    state, norm = checkpoint.model, "blocks.0.attn.q_norm.weight"
    require(checkpoint, ("lm_head.weight", RAR_TABLE, "pos_embed", norm, "blocks.0.mlp.fc1.weight"), "a RAR")
    vocab_size, dim = state["lm_head.weight"].shape
    return {
        "model": vit_shapes("rar", state, dim // len(state[norm]), vocab_size),
        "layout": {"name": "raster", "grid_size": isqrt(max(state["pos_embed"].shape[1] - SPARE_PLACES, 0))},
        "conditions": {"label": {"num_classes": len(state[RAR_TABLE]) - vocab_size - 2}},
    }


def lpd_identity(checkpoint: Checkpoint, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of an LPD off its shapes; its groups and their repulsion are those of the published runs."""
    state = checkpoint.model
    needed = ("mask_token", LPD_TABLE, "token_emb.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    require(checkpoint, needed, "an LPD")
    model = vit_shapes("lpd", state, n_head, len(state["token_emb.weight"]))
    layout: dict[str, Any] = {"name": "queried", "grid_size": isqrt(state["pos_embed"].shape[1] - 1)}
    if size_name(model) == "LPD-XXL":  # of its published figures, the layout has others
        layout["repulsion"] = 3
    return {"model": model, "layout": layout, "conditions": {"label": {"num_classes": len(state[LPD_TABLE])}}}


def class_table(state: State) -> torch.Tensor:
    """Return the rows of a model's classes and, the last one, of "no class", (classes + 1, dim)."""
    if CLASS_TABLE in state:
        return state[CLASS_TABLE]
    if RAR_TABLE in state:  # behind those of the codes and of a mask that is never read
        return state[RAR_TABLE][len(state["lm_head.weight"]) + 1 :]
    return torch.cat([state[LPD_TABLE], state["fake_latent"]])


def with_class_table(state: State, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a state dict with another table of classes, as class_table returns it."""
    if CLASS_TABLE in state:
        return {**state, CLASS_TABLE: table}
    if RAR_TABLE in state:
        others = state[RAR_TABLE][: len(state["lm_head.weight"]) + 1]
        return {**state, RAR_TABLE: torch.cat([others.to(table), table])}
    return {**state, LPD_TABLE: table[:-1], "fake_latent": table[-1:]}


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


def controlar_identity(checkpoint: Checkpoint, n_head: int | None = None) -> dict[str, Any]:
    """Read the identity of a GPT of ControlAR: LlamaGen's and its control, whose kind the file's name tells.

    Without the encoder's weights it is a model of features.
    """
    state = checkpoint.model
    own = {name: tensor for name, tensor in state.items() if not name.startswith(CONTROL_PARTS)}
    identity = llamagen_identity(replace(checkpoint, model=own), n_head)
    kinds = ("depth", "hed", "seg", "lineart")
    kind = next((kind for kind in kinds if kind in Path(checkpoint.path).name), "canny")
    control: dict[str, Any] = {"encoder": None, "width": state[CONTROL_MLP].shape[1], "kind": kind}
    start = "adapter.model."
    encoder = {common_name(name.removeprefix(start)): state[name] for name in state if name.startswith(start)}
    if "embeddings.patch_embeddings.projection.weight" in encoder:
        width, _, _, patch = encoder["embeddings.patch_embeddings.projection.weight"].shape
        control |= {
            "encoder": "dinov2" if "layers.0.layer_scale1.lambda1" in encoder else "vit",
            "layers": blocks_of(encoder),
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
