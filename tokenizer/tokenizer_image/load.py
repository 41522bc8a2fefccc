"""From a tokenizer's file to the model that its weights describe.

    tokenizer = load_tokenizer("pretrained_models/vq_ds16_c2i.pt", vq_model="VQ-16")

Flags need not be given; where they are, the file has to fit them.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from tokenizer.tokenizer_image.fingerprint import tokenizer_fingerprint
from tokenizer.tokenizer_image.vq_model import VQModel, VQModelArgs, vq_args_from_state_dict, vq_model_name
from utils.checkpoint import Checkpoint, load_into, read_checkpoint
from utils.origin import origin, same_tokenizer
from utils.recognition import looks_like

logger = logging.getLogger(__name__)


def vq_record(config: VQModelArgs) -> dict[str, Any]:
    """Return what a tokenizer's file records of the settings that its weights do not show (`Checkpoint.config`)."""
    return origin(vq={"codebook_l2_norm": config.codebook_l2_norm})


def recorded_l2_norm(checkpoint: Checkpoint) -> bool | None:
    """Return whether a tokenizer's codes are l2-normalised, which its shapes do not show; None where the file does not say.

    Files of the first edition say it in the flags of their run, or in the hub's config.json beside the weights.
    """
    beside = checkpoint.path.with_name("config.json")
    try:
        hub = dict(json.loads(beside.read_bytes())) if checkpoint.format == "safetensors" and beside.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{beside} is damaged ({error}): download or copy it again") from error
    sources = (checkpoint.config.get("vq"), checkpoint.args, hub)
    found = (source["codebook_l2_norm"] for source in sources if source and "codebook_l2_norm" in source)
    return next(found, None)


def kept_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the record that a copy of a checkpoint in another format needs: its own, with what it says elsewhere."""
    l2_norm = recorded_l2_norm(checkpoint)
    found = {} if l2_norm is None else origin(vq={"codebook_l2_norm": l2_norm})
    return {**found, **checkpoint.config}


def load_tokenizer(
    path: str | Path,
    *,
    vq_model: str | None = None,
    codebook_size: int | None = None,
    codebook_embed_dim: int | None = None,
    device: torch.device | str = "cpu",
    use_ema: bool = False,
    decode_precision: str = "none",
    fingerprint: str | None = None,
) -> VQModel:
    """Builds the tokenizer that a checkpoint's weights describe, in eval mode and float32.

    decode_precision: bf16 for a decoder in bfloat16 (VQModel.decode_in_bfloat16).
    fingerprint: of the tokenizer that made some codes (fingerprint.py), where it is known. Of a file's raw and averaged
    weights those that made the codes are taken, whatever `use_ema` says.
    Raises ValueError where the weights disagree with the flags or the fingerprint given, or are not a tokenizer's;
    FileNotFoundError.
    """
    if decode_precision not in ("none", "bf16"):
        raise ValueError(f"decode_precision is {decode_precision!r}: give 'none' (float32) or 'bf16'")
    flags = {"vq_model": vq_model, "codebook_size": codebook_size, "codebook_embed_dim": codebook_embed_dim}
    checkpoint = read_checkpoint(path, prefer_ema=use_ema)
    if use_ema and fingerprint is None:
        checkpoint.require_averages()
    model = _load(checkpoint, **flags)
    if fingerprint is not None and not same_tokenizer(fingerprint, found := tokenizer_fingerprint(model)):
        model = _load(read_checkpoint(path, prefer_ema=not use_ema), **flags)
        if not same_tokenizer(fingerprint, tokenizer_fingerprint(model)):
            raise ValueError(
                f"{path} is the tokenizer {found}, and the codes are of the tokenizer {fingerprint}: give the tokenizer "
                "that made them"
            )
        logger.info("%s: the %s weights made the codes and are used", path, "raw" if use_ema else "averaged")
    model = model.to(device)
    return model.decode_in_bfloat16() if decode_precision == "bf16" else model


def choose_weights(path: str | Path, use_ema: bool, told: bool = True) -> bool:
    """Return whether a file's averaged weights are to be used: if asked for and there. told: print which are used."""
    averaged = use_ema and read_checkpoint(path).ema is not None
    if told:
        print(f"{path}: its {'averaged' if averaged else 'raw'} weights")
    return averaged


def shape_of(checkpoint: Checkpoint) -> VQModelArgs:
    """Return what a checkpoint's shapes say of its tokenizer. Raises ValueError that says what else it is."""
    try:
        return vq_args_from_state_dict(checkpoint.model)
    except ValueError as error:
        known = "quantize.embedding.weight" in checkpoint.model and "encoder.conv_in.weight" in checkpoint.model
        what = f"it holds {error}" if known else looks_like(checkpoint.model)
        raise ValueError(f"{checkpoint.path} is not an image tokenizer's checkpoint: {what}") from error


def _load(
    checkpoint: Checkpoint, vq_model: str | None, codebook_size: int | None, codebook_embed_dim: int | None
) -> VQModel:
    path, args = checkpoint.path, shape_of(checkpoint)
    name = vq_model_name(args)
    held = {"--vq-model": name, "--codebook-size": args.codebook_size, "--codebook-embed-dim": args.codebook_embed_dim}
    given = {"--vq-model": vq_model, "--codebook-size": codebook_size, "--codebook-embed-dim": codebook_embed_dim}
    wrong = [flag for flag in held if given[flag] is not None and given[flag] != held[flag]]
    if wrong:
        raise ValueError(
            f"{path} does not fit the flags {', '.join(f'{flag} {given[flag]}' for flag in wrong)}; "
            f"it holds {', '.join(f'{flag} {held[flag]}' for flag in wrong)}"
        )
    args.codebook_l2_norm = recorded_l2_norm(checkpoint) is not False  # released files say nothing and have it
    with torch.device("meta"):
        model = VQModel(args)
    load_into(model, checkpoint.model, path, assign=True)
    return model.float().eval().requires_grad_(False)
