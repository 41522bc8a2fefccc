"""Adapters: low-rank additions to a model's matrices (LoRA), their files in peft's format, and their sum with the base.

    folder/adapter_config.json          rank, alpha, which matrices, and where the base is
    folder/adapter_model.safetensors    base_model.model.layers.0.attention.wqkv.lora_A.weight, …

A checkpoint of training holds the same tensors under the model's own names, and its `config` has `lora` and `base`.
LoRA (arXiv 2106.09685, section 4.1).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint import Checkpoint, read_checkpoint, weights_fingerprint
from utils.files import write_json
from utils.runs import find_checkpoint

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _FIRST, _SECOND = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Settings of peft's that change what is added, with their plain values.
_PLAIN = {
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": (None,),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base too
}


def read_settings(folder: Path) -> dict[str, Any]:
    """Read a folder's settings: {"rank", "alpha"}, and the path of the base as "base".

    Raises ValueError for a damaged file, an adapter of another kind, or one with settings that this project does not add up.
    """
    file = folder / CONFIG_FILE
    try:
        found = dict(json.loads(file.read_bytes()))
        kind, rank, alpha = found["peft_type"], int(found["r"]), float(found["lora_alpha"])
        base = found["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or no adapter's ({type(error).__name__}: {error})") from error
    other = [f"{name} {found[name]}" for name, plain in _PLAIN.items() if name in found and found[name] not in plain]
    if kind != "LORA" or other:
        what = "; ".join(other) or f"an adapter of kind {kind}"
        raise ValueError(f"{file}: {what} is not known here: merge it with peft first")
    if not base:
        where = "write the base's path as base_model_name_or_path"
        raise ValueError(f"{file} does not say of what it is an adapter: {where}")
    return {"rank": rank, "alpha": alpha * rank**0.5 if found.get("use_rslora") else alpha, "base": base}


def write_settings(folder: Path, lora: Mapping[str, Any], base: str, whole: list[str]) -> None:
    """Write a folder's adapter_config.json. whole: names of the modules that the adapter replaces."""
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": 0.0,
        "target_modules": list(lora["modules"]),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / CONFIG_FILE, settings)


def in_file(name: str) -> str:
    """Return the name that a file of peft's has for a weight of a model that trains an adapter."""
    return _PREFIX + name.removeprefix(_PREFIX).replace(".default.", ".")


class Sums(Mapping[str, torch.Tensor]):
    """Weights W + scale * B @ A of a base and an adapter, and in place of the base's own those that the adapter has whole.

    base, adapter: by name; the adapter's under the names of a file or of a model in training. A sum is computed when it is
    asked for, in float32, and has the base's dtype. Raises ValueError where the adapter has no place in the base.
    """

    def __init__(self, base: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], scale: float):
        found = {in_file(name).removeprefix(_PREFIX): tensor for name, tensor in adapter.items()}
        self.whole = {**base, **{name: x for name, x in found.items() if not name.endswith((_FIRST, _SECOND))}}
        self.scale, self.pairs = scale, {}
        for name, first in found.items():
            if not name.endswith(_FIRST):
                continue
            target, second = name.removesuffix(_FIRST) + ".weight", found.get(name.removesuffix(_FIRST) + _SECOND)
            weight = base.get(target)
            if weight is None or second is None or weight.shape != (len(second), first.shape[1]):
                of = "none" if weight is None else f"one of {tuple(weight.shape)}"
                raise ValueError(
                    f"the adapter adds to {target}, and the base has {of}: give the base it was trained on"
                )
            self.pairs[target] = second, first

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.whole[name]
        if name not in self.pairs:
            return weight
        second, first = self.pairs[name]
        return weight.float().addmm(second.float(), first.float(), alpha=self.scale).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)


def take_settings(checkpoint: Checkpoint, folder: Path) -> None:
    """Add to the config of an adapter's weights, in place, what the folder's adapter_config.json says. Raises as read_settings."""
    settings = read_settings(folder)
    base = {"path": settings.pop("base"), "averaged": False}
    base["averaged"] = checkpoint.config.get("base_file", base)["averaged"]
    checkpoint.path = folder
    checkpoint.config |= {"lora": settings, "base_file": base}


def add_base(checkpoint: Checkpoint) -> None:
    """Add the base to an adapter, in place.

    Raises ValueError where it is not the base that the adapter was trained on, FileNotFoundError where it is not there.
    """
    config = checkpoint.config
    settings, file, wanted = config.pop("lora"), config.pop("base_file"), config.pop("base", None)
    try:
        base = read_checkpoint(find_checkpoint(file["path"]), prefer_ema=file["averaged"])
    except FileNotFoundError as error:
        what = f"{checkpoint.path} is an adapter, and its base is not there ({error})"
        where = f"write its new place into {CONFIG_FILE} (export_checkpoint.py --format peft makes one)"
        raise FileNotFoundError(f"{what}: {where}") from error
    found = weights_fingerprint(base.model)
    if wanted not in (None, found):
        what = f"{checkpoint.path} is an adapter of the weights {wanted}"
        raise ValueError(f"{what}, and {file['path']} are {found}: give its base")
    scale = settings["alpha"] / settings["rank"]
    try:
        checkpoint.model = Sums(base.model, checkpoint.model, scale)
        checkpoint.ema = checkpoint.ema and Sums(base.model, checkpoint.ema, scale)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    checkpoint.config = base.config | config
    checkpoint.args = checkpoint.args or base.args
