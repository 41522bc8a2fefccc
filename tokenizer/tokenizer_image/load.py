"""From a tokenizer's file to the model that its weights describe.

    tokenizer = load_tokenizer("pretrained_models/vq_ds16_c2i.pt", vq_model="VQ-16")

Flags need not be given; where they are, the file has to fit them.
"""

from pathlib import Path

import torch

from tokenizer.tokenizer_image.vq_model import VQModel, vq_args_from_state_dict, vq_model_name
from utils.checkpoint import load_into, read_checkpoint


def load_tokenizer(
    path: str | Path,
    *,
    vq_model: str | None = None,
    codebook_size: int | None = None,
    codebook_embed_dim: int | None = None,
    device: torch.device | str = "cpu",
    use_ema: bool = False,
    decode_precision: str = "none",
) -> VQModel:
    """Builds the tokenizer that a checkpoint's weights describe, in eval mode and float32.

    decode_precision: bf16 for a decoder in bfloat16 (VQModel.decode_in_bfloat16).
    Raises ValueError where the weights disagree with the flags given, or are not a tokenizer's; FileNotFoundError.
    """
    if decode_precision not in ("none", "bf16"):
        raise ValueError(f"decode_precision is {decode_precision!r}: give 'none' (float32) or 'bf16'")
    checkpoint = read_checkpoint(path, prefer_ema=use_ema)
    try:
        args = vq_args_from_state_dict(checkpoint.model)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}") from error
    name = vq_model_name(args)
    held = {"--vq-model": name, "--codebook-size": args.codebook_size, "--codebook-embed-dim": args.codebook_embed_dim}
    given = {"--vq-model": vq_model, "--codebook-size": codebook_size, "--codebook-embed-dim": codebook_embed_dim}
    wrong = [flag for flag in held if given[flag] is not None and given[flag] != held[flag]]
    if wrong:
        raise ValueError(
            f"{path} does not fit the flags {', '.join(f'{flag} {given[flag]}' for flag in wrong)}; "
            f"it holds {', '.join(f'{flag} {held[flag]}' for flag in wrong)}"
        )
    args.codebook_l2_norm = (checkpoint.args or {}).get("codebook_l2_norm", True)
    with torch.device("meta"):
        model = VQModel(args)
    load_into(model, checkpoint.model, path, assign=True)
    model = model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
    return model.decode_in_bfloat16() if decode_precision == "bf16" else model
