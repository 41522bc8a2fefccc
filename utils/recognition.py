"""What a GPT checkpoint holds, read off its weights, and whether a script's flags fit it.

description = describe_gpt(checkpoint.model, GPT_SIZES, path)
check_gpt_flags(description, path, checkpoint.args, sizes=GPT_SIZES, gpt_model="GPT-L", image_size=384)
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Sizes = Mapping[str, tuple[int, int, int]]
"""Registry name → (layers, heads, dim)."""


def count_parameters(state: Mapping[str, torch.Tensor]) -> int:
    """How many numbers a state dict holds."""
    return sum(tensor.numel() for tensor in state.values())


def format_count(count: int) -> str:
    """343_000_000 → '343M', 1_400_000_000 → '1.4B'."""
    if count >= 1e9:
        return f"{count / 1e9:.1f}B"
    return f"{count / 1e6:.0f}M" if count >= 1e6 else f"{count:,}"


@dataclass(frozen=True)
class GPTDescription:
    """What a GPT's weights say about its configuration; None where they say nothing.

    `gpt_model` is the row of the table of sizes that has this many layers and this width; the number of heads is not in
    the weights, so `n_head` and `n_kv_head` are known only with a row. `parameters` counts numbers.
    """

    gpt_model: str | None
    n_layer: int
    dim: int
    ffn_hidden: int
    n_head: int | None
    n_kv_head: int | None
    vocab_size: int
    gpt_type: str
    num_classes: int | None
    caption_dim: int | None
    cls_token_num: int
    spe_token_num: int
    ar_token_num: int
    parameters: int

    def __str__(self) -> str:
        size = f"{self.n_layer} layers, dim {self.dim}"
        parts = [f"{self.gpt_model or 'a GPT of no named size'} ({size}, {format_count(self.parameters)})"]
        if self.gpt_type == "c2i":
            parts += ["class-conditional", f"{self.num_classes} classes"]
        else:
            parts += ["text-conditional", f"{self.cls_token_num} text tokens of {self.caption_dim}"]
        parts.append(f"{self.vocab_size} codes")
        if self.spe_token_num:
            parts.append(f"{self.spe_token_num} special tokens")
        return ", ".join(parts)


def describe_gpt(state: Mapping[str, torch.Tensor], sizes: Sizes, path: str | Path = "the file") -> GPTDescription:
    """Reads a GPT's configuration off the shapes of its weights (meta tensors will do).

    `sizes` is the models' table: name → (layers, heads, dim). `path` is for the message only.
    Raises ValueError where this is no GPT, saying what it looks like instead.
    """
    needed = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight")
    class_table, no_caption = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
    absent = [name for name in needed if name not in state]
    if not absent and class_table not in state and no_caption not in state:
        absent = [f"{class_table} or {no_caption}"]
    if absent:
        raise ValueError(f"{path} is not a GPT checkpoint: {looks_like(state)}; a GPT has {', '.join(absent)}")
    if flat := [name for name in needed if state[name].dim() != 2]:
        raise ValueError(f"{path} is not a GPT checkpoint: its {', '.join(flat)} should be matrices")

    vocab_size, dim = state["tok_embeddings.weight"].shape
    n_layer = 1 + max(int(match[1]) for match in (re.match(r"layers\.(\d+)\.", name) for name in state) if match)
    gpt_model = next((name for name, (layers, _, width) in sizes.items() if (layers, width) == (n_layer, dim)), None)
    n_head = sizes[gpt_model][1] if gpt_model else None
    key_rows = (state["layers.0.attention.wqkv.weight"].shape[0] - dim) // 2
    special = state.get("spe_tok_embeddings.special_embeddings.weight")
    spe_token_num = 0 if special is None else special.shape[0]
    classes = state.get(class_table)
    caption = state.get(no_caption)
    return GPTDescription(
        gpt_model=gpt_model,
        n_layer=n_layer,
        dim=dim,
        ffn_hidden=state["layers.0.feed_forward.w1.weight"].shape[0],
        n_head=n_head,
        n_kv_head=key_rows * n_head // dim if n_head else None,
        vocab_size=vocab_size,
        gpt_type="t2i" if classes is None else "c2i",
        # The embedding's last row is "no class".
        num_classes=None if classes is None else classes.shape[0] - 1,
        caption_dim=None if caption is None else caption.shape[1],
        cls_token_num=1 if caption is None else caption.shape[0],
        spe_token_num=spe_token_num,
        ar_token_num=spe_token_num + 1,
        parameters=count_parameters(state),
    )


def looks_like(state: Mapping[str, torch.Tensor]) -> str:
    """Return what a state dict seems to be of, as a clause of an error's message."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state)

    if "quantize.embedding.weight" in state and has("encoder.down."):
        return "it looks like a VQGAN of taming-transformers (tokenizer/vqgan/reconstruction_vqgan_ddp.py reads it)"
    if "quantize.embedding.weight" in state and has("encoder."):
        rows, width = state["quantize.embedding.weight"].shape
        return f"it looks like a VQ image tokenizer with {rows} codes of {width} (give it as --vq-ckpt)"
    if {"layers.0.attention.wqkv.weight", "tok_embeddings.weight"} <= state.keys() and has("cls_embedding."):
        return "it looks like a GPT (give it as --gpt-ckpt)"
    if any(".lora_" in name for name in state):
        return "it looks like a LoRA adapter (merge it into its model, and give that)"
    if any(re.match(r"layers\.\d+\.attention\.wqkv\.weight", name) for name in state):
        return "it looks like a part of a GPT"
    if "main.0.weight" in state or (has("blocks.") and has("final_linear.")):
        return "it looks like a discriminator"
    if "shared.weight" in state and has("encoder.block."):
        return "it looks like a T5 text encoder (give it as --t5-path)"
    if has("encoder.down_blocks."):
        return "it looks like an autoencoder of diffusers (tokenizer/vae/reconstruction_vae_ddp.py reads it)"
    if has("visual.") or has("vision_model."):
        return "it looks like a CLIP"
    if any("self_attn" in name for name in state):
        return "it looks like a language model of transformers"
    return f"its first weights are {', '.join(list(state)[:5]) or 'none'}"


def check_gpt_flags(
    description: GPTDescription,
    path: str | Path,
    args_in_file: Mapping[str, Any] | None = None,
    *,
    sizes: Sizes,
    gpt_model: str | None = None,
    gpt_type: str | None = None,
    image_size: int | None = None,
    downsample_size: int | None = None,
    vocab_size: int | None = None,
    codebook_size: int | None = None,
    num_classes: int | None = None,
    cls_token_num: int | None = None,
    spe_token_num: int | None = None,
    ar_token_num: int | None = None,
) -> None:
    """Compares a script's flags with the file at `path`; flags left at None are not compared.

    The weights decide, save for the image size and the downsampling, which they do not show: for those the flags that
    the training run recorded in the file count. Where only the file's name tells the image size, a difference warns.
    Raises ValueError that lists each disagreement and the flags that fit.
    """
    recorded = args_in_file or {}
    size_in_name = image_size_in_name(Path(path).name)
    size_in_file = recorded.get("image_size")
    # flag: (value given, value in the file, the scripts' default)
    compared = {
        "--gpt-model": (gpt_model, description.gpt_model, None),
        "--gpt-type": (gpt_type, description.gpt_type, "c2i"),
        "--num-classes": (num_classes, description.num_classes, 1000),
        "--cls-token-num": (cls_token_num, description.cls_token_num, 1),
        "--ar-token-num": (ar_token_num, description.ar_token_num, 1),
        "--spe-token-num": (spe_token_num, description.spe_token_num, 0),
        "--image-size": (image_size, size_in_file, None),
        "--downsample-size": (downsample_size, recorded.get("downsample_size"), 16),
    }
    # Sampling says --codebook-size, training --vocab-size; the advice uses the caller's word.
    if vocab_size is not None:
        compared["--vocab-size"] = (vocab_size, description.vocab_size, 16384)
    if codebook_size is not None:
        compared["--codebook-size"] = (codebook_size, description.vocab_size, 16384)
    wrong = [
        flag for flag, (given, held, _) in compared.items() if given is not None and held is not None and given != held
    ]
    problems = [f"{flag} {compared[flag][0]} (file: {compared[flag][1]})" for flag in wrong]
    if gpt_model is not None and description.gpt_model is None:
        problems.insert(0, f"--gpt-model {gpt_model} (file: none of {', '.join(sizes)})")
    if problems:
        fitting = {
            flag: held
            for flag, (_, held, default) in compared.items()
            if held is not None and (held != default or flag in wrong)
        }
        if size_in_name is not None:
            fitting.setdefault("--image-size", size_in_name)
        raise ValueError(
            f"{path} holds {description}; it does not fit the flags: {', '.join(problems)}. "
            f"Use: {' '.join(f'{flag} {held}' for flag, held in fitting.items())}"
        )
    if size_in_file is None and None not in (image_size, size_in_name) and image_size != size_in_name:
        warnings.warn(
            f"by its name {path} was trained at {size_in_name}x{size_in_name}, and --image-size is {image_size}: "
            f"its images will be poor; use --image-size {size_in_name}",
            stacklevel=2,
        )


def image_size_in_name(name: str) -> int | None:
    """The image size that a released file's name tells, in pixels."""
    if name.startswith("PAR-"):
        return 384
    match = re.match(r"(?:c2i|t2i)_.+_(256|384|512)\.", name)
    return int(match[1]) if match else None
