"""Parts that vq_train.py puts together: what is trained, from which weights, by which losses."""

import argparse
import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset.augmentation import center_view
from dataset.images import ImageDataset, Unusable
from tokenizer.base import LOSS_WEIGHTS, CodebookLosses, Tokenizer
from tokenizer.load import build_tokenizer, described
from tokenizer.released import recorded_l2_norm
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from tokenizer.tokenizer_image.vq_loss import VQLoss
from utils.checkpoint import Checkpoint
from utils.images import make_grid, to_uint8
from utils.runs import runs_in
from utils.training.job import Micro, Phase
from utils.training.parallel import Parallel

# Flags that say what is trained.
DESCRIPTION = (
    "vq_model", "vq_width", "codebook_size", "codebook_embed_dim", "codebook_l2_norm", "quantizer", "quantizer_options", "network",
    "network_options",
)  # fmt: skip
# What three halvings and two 4x4 convolutions without padding to spare leave a pixel of.
PATCHGAN_MINIMUM = 24


def new_tokenizer(args: argparse.Namespace, initial: Checkpoint | None) -> Tokenizer:
    """Build the tokenizer to train, and set the flags that describe it.

    Raises ValueError as `choose_config` does, and where it does not divide --image-size.
    """
    weights = {name: getattr(args, name) for name in LOSS_WEIGHTS if getattr(args, f"{name}_given", False)}
    tokenizer = build_tokenizer(choose_config(args, initial), dropout_p=args.dropout_p, **weights)
    vars(args).update(tokenizer.quantize.loss_weights)
    options = tokenizer.quantize.config
    args.codebook_size, args.codebook_embed_dim = options.get("codebook_size"), options.get("codebook_embed_dim")
    args.codebook_l2_norm = options.get("l2_norm")
    if args.image_size % tokenizer.downsample:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of {tokenizer.downsample}, the pixels a side of a {args.vq_model} token"
        )
    return tokenizer


def choose_config(args: argparse.Namespace, initial: Checkpoint | None) -> dict[str, Any]:
    """Return the config of the tokenizer to train, that of --vq-ckpt or of the flags, and give the checkpoint our names.

    Flags that are left out are set as the file has them, or the run that is resumed.
    Raises ValueError where a flag contradicts the file or the run.
    """
    config = None
    if initial:
        said = None if "network" in initial.config else args.quantizer
        config, state = described(initial, said)
        if initial.ema is not None:
            averages = described(replace(initial, model=initial.ema), said)[1]
            initial.ema, state = averages, averages if args.finetune and config.get("averaged") else state
        initial.model = state
        kind = config["quantizer"]
        held = {"vq_model": config["family"], "vq_width": config["network"].get("ch"), "quantizer": kind["name"]}
        held |= {name: kind.get(name) for name in ("codebook_size", "codebook_embed_dim")}
        held["network"] = config["network"]["name"]
        for part in ("quantizer", "network"):
            if asked := getattr(args, f"{part}_options"):
                held[f"{part}_options"] = {name: config[part].get(name) for name in asked}
        complete(args, {**held, "codebook_l2_norm": recorded_l2_norm(initial)}, args.vq_ckpt)
    named = (name for name, size in VQ_SIZES.items() if args.network == size.get("name", "vqgan"))
    args.vq_model = args.vq_model or next(named, args.network or "VQ-16")
    for run in runs_in(args.results_dir, args.vq_model)[:1] if args.resume else []:
        began = run.flags()
        complete(args, {name: began.get(name) for name in DESCRIPTION}, run.folder)
    size = dict(VQ_SIZES.get(args.vq_model, {}))
    own, kind = size.pop("quantizer", {"name": "vq"}), size.pop("name", "vqgan" if size else args.network)
    if args.network not in (None, kind):
        raise ValueError(
            f"--vq-model {args.vq_model} is of the network {kind}, not {args.network}: leave one of the two out"
        )
    args.network = kind
    args.quantizer = args.quantizer or own["name"]
    given = {"codebook_size": args.codebook_size, "codebook_embed_dim": args.codebook_embed_dim}
    given |= {"l2_norm": args.codebook_l2_norm, **(args.quantizer_options or {})}
    quantizer = {"name": args.quantizer, **{name: value for name, value in given.items() if value is not None}}
    if config:
        return {**config, "quantizer": {**config["quantizer"], **quantizer}}
    width = {} if args.vq_width is None else {"ch": args.vq_width}
    quantizer = {**own, **quantizer} if own["name"] == quantizer["name"] else quantizer
    return {"network": {"name": kind, **size, **width, **(args.network_options or {})}, "quantizer": quantizer}


def complete(args: argparse.Namespace, held: Mapping[str, Any], source: object) -> None:
    """Set the flags that are left out to what the source holds. Raises ValueError for one that contradicts it."""

    def said(name: str, value: Any) -> str:
        flag = name.replace("_", "-")
        return f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"

    for name, value in held.items():
        asked = getattr(args, name)
        if None not in (asked, value) and asked != value:
            raise ValueError(f"{said(name, asked)}: {source} was trained with {said(name, value)}; leave the flag out")
        setattr(args, name, value if asked is None else asked)


def new_losses(args: argparse.Namespace) -> VQLoss:
    """Build the losses of the flags. Raises ValueError for images that are too small for the discriminator."""
    if args.disc_weight and args.disc_type == "patchgan" and args.image_size < PATCHGAN_MINIMUM:
        raise ValueError(
            f"--disc-type patchgan needs images of {PATCHGAN_MINIMUM} pixels a side, got --image-size {args.image_size}; "
            "use a larger one, --disc-type stylegan, or --disc-weight 0"
        )
    names = (
        "disc_start", "disc_loss", "disc_type", "image_size", "disc_weight", "reconstruction_loss", "reconstruction_weight",
        "codebook_weight", "perceptual_weight", "gen_weight", "lecam_weight",
    )  # fmt: skip
    return VQLoss(gen_adv_loss=args.gen_loss, **{name: getattr(args, name) for name in names})


def dropping_rate(args: argparse.Namespace, batches: int, per_epoch: int) -> float:
    """Return the learning rate after so many batches: --warmup-steps, and a tenth after each of --lr-drop-epochs."""
    drops = sum(batches >= epoch * per_epoch for epoch in args.lr_drop_epochs)
    return args.lr * 0.1**drops * min(1, (batches + 1) / max(args.warmup_steps, 1))


def begin_anew(initial: Checkpoint, discriminator: nn.Module, args: argparse.Namespace) -> None:
    """Set a checkpoint back to step 0, for --finetune; without --keep-discriminator nothing but its tokenizer stays.

    Raises ValueError where the file's discriminator is another than the run's.
    """
    if not args.keep_discriminator:
        initial.optimizer, initial.extra = None, {}
    own, found = (
        {name: tensor.shape for name, tensor in state.items()}
        for state in (discriminator.state_dict(), initial.extra.get("discriminator") or {})
    )
    if found and found != own:
        raise ValueError(
            f"{initial.path} has another discriminator than --disc-type {args.disc_type} at --image-size {args.image_size}; "
            "--no-keep-discriminator begins with a new one"
        )
    initial.steps = 0
    initial.extra.pop("trainer", None)


class Adversaries:
    """The two phases of a step: the tokenizer's, and the discriminator's on the same reconstructions.

    With --disc-first the discriminator's comes first, and hands its forward pass of the tokenizer on.
    """

    def __init__(self, args: argparse.Namespace, plan: Parallel, tokenizer: Tokenizer, losses: VQLoss):
        self.args, self.losses, self.tokenizer = args, losses, tokenizer
        self.generator, discriminator = plan.apply(tokenizer), losses.discriminator
        losses.discriminator = replace(plan, compile=False).apply(discriminator)
        self.reconstructions: dict[int, Tensor] = {}  # by the number of the microbatch
        self.forward_pass: tuple[Tensor, CodebookLosses] | None = None
        self.phases = [
            Phase("optimizer", self.generator, self.adam(tokenizer), self.generator_loss),
            Phase(
                "optimizer_disc",
                losses.discriminator,
                self.adam(discriminator),
                self.discriminator_loss,
                lambda step: losses.discriminator_active(step + 1),
                model="discriminator",
            ),
        ]
        if args.disc_first:
            self.phases.reverse()

    def generator_loss(self, batch: list[Tensor], place: Micro) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the tokenizer's loss of a microbatch, and figures for the log."""
        (recons, codebook), self.forward_pass = self.forward_pass or self.generator(batch[0]), None
        self.reconstructions[place.number] = recons.detach()
        return self.losses.generator_loss(codebook, batch[0], recons, place.step + 1)

    def discriminator_loss(self, batch: list[Tensor], place: Micro) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's loss of a microbatch, and figures for the log."""
        if self.args.disc_first:
            self.reconstructions[place.number] = self.reconstruct(batch[0])
        return self.losses.discriminator_loss(batch[0], self.reconstructions[place.number], place.step + 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Return the reconstructions of a microbatch, and keep their graph where there is one microbatch a step."""
        if self.args.gradient_accumulation_steps > 1:
            return self.tokenizer.to_pixels(
                self.tokenizer.to_codes(images).clamp(min=0)
            )  # -1 where training has diverged
        self.forward_pass = self.generator(images)
        return self.forward_pass[0].detach()

    def adam(self, module: nn.Module) -> torch.optim.Adam:
        """Return the optimizer; weights decay where --weight-decay is given."""
        args = self.args
        settings = {"lr": args.lr, "betas": (args.beta1, args.beta2)}
        if getattr(args, "weight_decay_given", False):
            return torch.optim.AdamW(module.parameters(), weight_decay=args.weight_decay, **settings)
        return torch.optim.Adam(module.parameters(), **settings)


def readable(dataset: ImageDataset, first: int) -> Tensor | None:
    """Return the first of an image and those after it that can be read; what cannot is left to training to tell."""
    for index in range(first, len(dataset)):
        with suppress(Unusable):
            return dataset.read(index)[0]
    return None


class Comparison:
    """Images from all over a data set, drawn above their reconstructions while a tokenizer trains."""

    def __init__(self, dataset: ImageDataset, image_size: int, device: torch.device, count: int = 8):
        plain = copy.copy(dataset)
        plain.transform = partial(center_view, image_size=image_size)
        shown = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist()
        found = (readable(plain, i) for i in shown)
        images = [image for image in found if image is not None] or [plain[0][0]]
        self.images = torch.stack(images).to(device)

    def __call__(self, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        codes = tokenizer.to_codes(self.images).clamp(min=0)  # -1 where training has diverged
        pictures = to_uint8(torch.cat([self.images, tokenizer.to_pixels(codes)]))
        return {"reconstructions": make_grid(pictures, columns=len(self.images))}
