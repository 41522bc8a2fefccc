"""From a file to the tokenizer that its config names.

    tokenizer = load_tokenizer("pretrained_models/vq_ds16_c2i.pt", vq_model="VQ-16")

Flags need not be given; where they are, the file has to fit them.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenizer.base import NETWORKS, Tokenizer
from tokenizer.released import adapted, looks_like, recorded_l2_norm
from utils.checkpoint import Checkpoint, State, load_into, read_checkpoint
from utils.hub import weights_folders
from utils.origin import origin, same_tokenizer
from utils.runs import newest_checkpoint

logger = logging.getLogger(__name__)


def build_tokenizer(config: Mapping[str, Any], **training: Any) -> Tokenizer:
    """Build the tokenizer that a config names. training: dropout_p, and weights of losses that its quantiser takes.

    Raises ValueError for what is not registered, and for options that it does not have.
    """
    options = dict(config["network"])
    name = options.pop("name")
    try:
        return NETWORKS[name].build(options, config["quantizer"], **training)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"the network {name} does not have these options: {error}") from error


def described(checkpoint: Checkpoint, quantizer: str | None = None) -> tuple[dict[str, Any], State]:
    """Return the config of a tokenizer's checkpoint and its weights. quantizer: its name where the file cannot say it.

    Raises ValueError that says what else the file is, or that it has another quantiser.
    """
    found = adapted(checkpoint)
    if found is None:
        raise ValueError(f"{checkpoint.path} is not an image tokenizer's checkpoint: {looks_like(checkpoint.model)}")
    config, state = found
    kind = config["quantizer"]
    if quantizer in (None, kind["name"]):
        return found
    if "network" in checkpoint.config or kind["name"] not in ("vq", "ibq"):
        raise ValueError(f"{checkpoint.path} has the quantizer {kind['name']}, not {quantizer}: leave --quantizer out")
    size = {name: kind[name] for name in ("codebook_size", "codebook_embed_dim")}
    plain = {"l2_norm": False, "show_usage": False} if quantizer == "vq" else {}
    return {**config, "quantizer": {"name": quantizer, **size, **plain}}, state


def kept(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as a copy in another format needs it: a tokenizer's weights under our names, and its config."""
    found = adapted(checkpoint)
    if found is None:
        return checkpoint
    averages = None if checkpoint.ema is None else adapted(replace(checkpoint, model=checkpoint.ema))
    own = {name: value for name, value in found[0].items() if name != "note"}
    config = {**checkpoint.config, **origin(**own)}
    return replace(checkpoint, model=found[1], ema=averages and averages[1], config=config)


def load_tokenizer(
    path: str | Path,
    *,
    vq_model: str | None = None,
    codebook_size: int | None = None,
    codebook_embed_dim: int | None = None,
    codebook_l2_norm: bool | None = None,
    quantizer: str | None = None,
    device: torch.device | str = "cpu",
    use_ema: bool | None = None,
    decode_precision: str = "none",
    fingerprint: str | None = None,
) -> Tokenizer:
    """Build the tokenizer of a checkpoint, in eval mode and float32.

    Args:
        path: of the file
        vq_model: its family, as the caller believes; None for no belief, here and below
        codebook_size: its codes
        codebook_embed_dim: channels of its latents
        codebook_l2_norm: whether its codes are l2-normalised, also where the file does not say
        quantizer: name of its quantiser, also where the file does not say: "ibq" for two blocks a level and no averages
        device: of the tokenizer
        use_ema: take the averaged weights, False: the raw ones; None for those that the file's figures and codes are of:
            the averaged ones of IBQ's files, else the raw ones
        decode_precision: bf16 for a decoder in bfloat16 (`Tokenizer.decode_in_bfloat16`)
        fingerprint: of the tokenizer that made some codes. Of a file's raw and averaged weights those that made the codes
            are taken, whatever `use_ema` says

    Raises:
        ValueError: the file disagrees with a belief or the fingerprint, names what is not registered, or is no tokenizer's
        FileNotFoundError: it is not there
    """
    if decode_precision not in ("none", "bf16"):
        raise ValueError(f"decode_precision is {decode_precision!r}: give 'none' (float32) or 'bf16'")
    beliefs = {"vq_model": vq_model, "codebook_size": codebook_size, "codebook_embed_dim": codebook_embed_dim}
    checkpoint = read_checkpoint(path)
    if use_ema and fingerprint is None:
        checkpoint.require_averages()
    if use_ema is None:
        config, _ = described(checkpoint, quantizer)
        use_ema = config.get("averaged", False) and checkpoint.ema is not None
        if "note" in config and fingerprint is None and quantizer is None:
            logger.warning("%s: %s", path, config["note"])

    def load(averaged: bool | None) -> Tokenizer:
        weights = checkpoint.ema if averaged and checkpoint.ema is not None else checkpoint.model
        if absent := [name for name in checkpoint.model if name not in weights and not name.startswith("loss.")]:
            raise ValueError(
                f"{path}: averaged weights missing ({len(absent)}): {', '.join(absent[:5])}; use_ema=False takes the raw ones"
            )
        return _load(replace(checkpoint, model=weights), beliefs, codebook_l2_norm, quantizer)

    model = load(use_ema)
    if fingerprint is not None and not same_tokenizer(fingerprint, found := model.fingerprint()):
        model = load(not use_ema)
        if not same_tokenizer(fingerprint, model.fingerprint()):
            raise ValueError(
                f"{path} is the tokenizer {found}, and the codes are of the tokenizer {fingerprint}: give the tokenizer "
                "that made them"
            )
        logger.info("%s: the %s weights made the codes and are used", path, "raw" if use_ema else "averaged")
    model = model.to(device)
    return model.decode_in_bfloat16() if decode_precision == "bf16" else model


def find_tokenizer(gpt: Path, fingerprint: str, codes: str | None = None) -> Path:
    """Find the tokenizer of this fingerprint: in the folders above a GPT's file, in a run or saved model beside them or
    beside the folder of the codes it was trained on, or in pretrained_models/.

    Raises FileNotFoundError where none is there.
    """
    beside = [Path(codes).parent] if codes else []
    for folder in (*list(gpt.absolute().parents)[:5], *filter(Path.is_dir, [*beside, *weights_folders()])):
        files = [path for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")]
        runs = [newest_checkpoint(path) for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        for path in sorted(filter(None, {*files, *runs, *folder.glob("*/model.safetensors")} - {gpt.absolute()})):
            with suppress(ValueError, OSError):
                if adapted(read_checkpoint(path)):
                    load_tokenizer(path, fingerprint=fingerprint)
                    return path
    raise FileNotFoundError(
        f"no tokenizer {fingerprint} lies near {gpt}, and its codes are of that one: give --vq-ckpt"
    )


def _load(checkpoint: Checkpoint, beliefs: Mapping[str, Any], l2_norm: bool | None, quantizer: str | None) -> Tokenizer:
    config, state = described(checkpoint, quantizer)
    if l2_norm is not None:
        if recorded_l2_norm(checkpoint) not in (None, l2_norm):
            found, asked = ("", "not ")[l2_norm], ("not ", "")[l2_norm]
            raise ValueError(
                f"{checkpoint.path} has codes that are {found}l2-normalised, asked for are {asked}normalised ones"
            )
        config = {**config, "quantizer": {**config["quantizer"], "l2_norm": l2_norm}}
    try:
        with torch.device("meta"):
            model = build_tokenizer(config)
    except ValueError as error:
        files = " ".join(f"--import {file}" for file in checkpoint.config.get("imports", ()))
        raise ValueError(f"{checkpoint.path}: {error}" + (f"; it was written with {files}" if files else "")) from error
    wrong = {name: held for name, held in model.flags.items() if beliefs.get(name) not in (None, held)}
    if wrong:
        given, held = (", ".join(f"--{name.replace('_', '-')} {of[name]}" for name in wrong) for of in (beliefs, wrong))
        raise ValueError(f"{checkpoint.path} does not fit the flags {given}; it holds {held}")
    load_into(model, state, checkpoint.path, assign=True)
    return model.float().eval().requires_grad_(False)
