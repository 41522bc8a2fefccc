"""Guess at a state dict of unknown origin, for the message of an error."""

import re
from collections.abc import Mapping

import torch


def count_parameters(state: Mapping[str, torch.Tensor]) -> int:
    """Count the numbers in a state dict."""
    return sum(tensor.numel() for tensor in state.values())


def format_count(count: int) -> str:
    """343_000_000 → '343M', 1_400_000_000 → '1.4B'."""
    if count >= 1e9:
        return f"{count / 1e9:.1f}B"
    return f"{count / 1e6:.0f}M" if count >= 1e6 else f"{count:,}"


def looks_like(state: Mapping[str, torch.Tensor]) -> str:
    """Return what a state dict seems to be of, as a clause of an error's message."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state)

    if has("encoder.down.0.block."):
        return "it looks like a VQGAN of taming-transformers (give it as --vq-ckpt)"
    if "quantize.embedding.weight" in state and has("encoder."):
        rows, width = state["quantize.embedding.weight"].shape
        return f"it looks like a VQ image tokenizer with {rows} codes of {width} (give it as --vq-ckpt)"
    if has("encoder.conv_blocks."):
        return "it looks like an image tokenizer without a codebook (give it as --vq-ckpt)"
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
