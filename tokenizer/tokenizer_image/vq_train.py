"""Trains an image tokenizer: a VQGAN with a discriminator and a perceptual loss.

    torchrun --nproc_per_node=8 tokenizer/tokenizer_image/vq_train.py --data-path imagenet/train --image-size 256
    python3 tokenizer/tokenizer_image/vq_train.py --data-path my_photos --dataset coco --finetune --vq-ckpt vq_ds16_c2i.pt

Recipe: LlamaGen (arXiv 2406.06525, section 3.1); VQGAN (2012.09841).
"""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    PROBABILITY,
    add_image_size_flags,
    add_reading_flags,
    add_switch,
    add_tokenizer_flags,
    add_training_flags,
    flag_parser,
    nonnegative_float,
    nonnegative_int,
    positive_int,
    run_script,
)

# Flags that say what is trained.
DESCRIPTION = (
    "vq_model", "vq_width", "codebook_size", "codebook_embed_dim", "codebook_l2_norm", "quantizer", "quantizer_options",
)  # fmt: skip
# What three halvings and two 4x4 convolutions without padding to spare leave a pixel of.
PATCHGAN_MINIMUM = 24

if TYPE_CHECKING:
    from torch.nn import Module

    from tokenizer.base import Tokenizer
    from utils.checkpoint import Checkpoint


def main(args: argparse.Namespace) -> None:
    import copy
    from dataclasses import replace
    from functools import partial

    import torch

    from dataset.augmentation import center_view, random_view
    from dataset.build import build_dataset
    from tokenizer.load import build_tokenizer
    from tokenizer.tokenizer_image.vq_loss import VQLoss
    from utils.checkpoint import read_checkpoint
    from utils.distributed import start
    from utils.images import make_grid, to_uint8
    from utils.logger import console_logger
    from utils.origin import origin
    from utils.runs import find_checkpoint
    from utils.training.parallel import Parallel
    from utils.training.trainer import Micro, Phase, Trainer

    if args.finetune and not args.vq_ckpt:
        raise ValueError("--finetune needs --vq-ckpt, the weights to begin with")
    dist = start(args.device, deterministic=args.deterministic)
    console_logger("dataset", dist.is_main)
    torch.manual_seed(args.global_seed)
    initial = read_checkpoint(find_checkpoint(args.vq_ckpt), mmap=False) if args.vq_ckpt else None
    tokenizer = build_tokenizer(
        choose_config(args, initial),
        commit_loss_beta=args.commit_loss_beta,
        entropy_loss_ratio=args.entropy_loss_ratio,
        dropout_p=args.dropout_p,
    ).to(dist.device)
    options = tokenizer.quantize.config
    args.codebook_size, args.codebook_embed_dim = options.get("codebook_size"), options.get("codebook_embed_dim")
    args.codebook_l2_norm = options.get("l2_norm")
    if args.image_size % tokenizer.downsample:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of {tokenizer.downsample}, the pixels a side of a {args.vq_model} token"
        )
    if args.disc_weight and args.disc_type == "patchgan" and args.image_size < PATCHGAN_MINIMUM:
        raise ValueError(
            f"--disc-type patchgan needs images of {PATCHGAN_MINIMUM} pixels a side, got --image-size {args.image_size}; "
            "use a larger one, --disc-type stylegan, or --disc-weight 0"
        )
    losses = VQLoss(
        disc_start=args.disc_start,
        disc_loss=args.disc_loss,
        disc_type=args.disc_type,
        image_size=args.image_size,
        disc_weight=args.disc_weight,
        gen_adv_loss=args.gen_loss,
        reconstruction_loss=args.reconstruction_loss,
        reconstruction_weight=args.reconstruction_weight,
        codebook_weight=args.codebook_weight,
        perceptual_weight=args.perceptual_weight,
    ).to(dist.device)
    dataset = build_dataset(args, transform=partial(random_view, image_size=args.image_size, flip=args.flip))
    discriminator = losses.discriminator
    if args.finetune:
        begin_anew(initial, discriminator, args)
    plan = Parallel(dist, precision=args.mixed_precision, compile=args.compile)
    generator = plan.apply(tokenizer)
    losses.discriminator = replace(plan, compile=False).apply(discriminator)

    reconstructions: dict[int, torch.Tensor] = {}

    def generator_loss(batch: list[torch.Tensor], place: Micro) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, _ = batch
        recons, codebook = generator(images)
        reconstructions[place.number] = recons.detach()
        return losses.generator_loss(codebook, images, recons, place.step + 1)

    def discriminator_loss(batch: list[torch.Tensor], place: Micro) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses.discriminator_loss(batch[0], reconstructions[place.number], place.step + 1)

    def adam(module: torch.nn.Module) -> torch.optim.Adam:
        betas = (args.beta1, args.beta2)
        if getattr(args, "weight_decay_given", False):
            return torch.optim.AdamW(module.parameters(), lr=args.lr, betas=betas, weight_decay=args.weight_decay)
        return torch.optim.Adam(module.parameters(), lr=args.lr, betas=betas)

    plain = copy.copy(dataset)
    plain.transform = partial(center_view, image_size=args.image_size)
    shown = torch.stack([plain[i][0] for i in range(min(8, len(dataset)))])

    def sample(model: "Tokenizer") -> dict:
        images = shown.to(dist.device)
        recons = model.to_pixels(model.to_codes(images).clamp(min=0))  # -1 where training has diverged
        return {"reconstructions": make_grid(to_uint8(torch.cat([images, recons])), columns=len(images))}

    trainer = Trainer(
        args,
        dist,
        run_name=args.vq_model,
        models={"model": tokenizer, "discriminator": discriminator},
        phases=[
            Phase("optimizer", generator, adam(tokenizer), generator_loss),
            Phase(
                "optimizer_disc",
                losses.discriminator,
                adam(discriminator),
                discriminator_loss,
                lambda step: losses.discriminator_active(step + 1),
                model="discriminator",
            ),
        ],
        dataset=dataset,
        plan=plan,
        initial=initial,
        sample=sample,
        config=origin(**tokenizer.identity),
    )
    if args.codebook_l2_norm is False:
        trainer.log.info("codes are looked up among vectors that are not normalised (--no-codebook-l2-norm)")
    if args.disc_weight and trainer.total_steps < args.disc_start:
        trainer.log.warning(
            f"the run ends at step {trainer.total_steps}, before --disc-start {args.disc_start}: nothing is trained against the "
            "discriminator"
        )
    trainer.fit()
    dist.close()


def choose_config(args: argparse.Namespace, initial: "Checkpoint | None") -> dict[str, Any]:
    """Return the config of the tokenizer to train, that of --vq-ckpt or of the flags, and give the checkpoint our names.

    Flags that are left out are set as the file has them, or the run that is resumed.
    Raises ValueError where a flag contradicts the file or the run.
    """
    from tokenizer.load import described
    from tokenizer.released import recorded_l2_norm
    from utils.runs import runs_in

    config = None
    if initial:
        config, initial.model = described(initial)
        kind = config["quantizer"]
        held = {"vq_model": config["family"], "vq_width": config["network"].get("ch"), "quantizer": kind["name"]}
        held |= {name: kind.get(name) for name in ("codebook_size", "codebook_embed_dim")}
        if args.quantizer_options:
            held["quantizer_options"] = {name: kind.get(name) for name in args.quantizer_options}
        complete(args, {**held, "codebook_l2_norm": recorded_l2_norm(initial)}, args.vq_ckpt)
    args.vq_model = args.vq_model or "VQ-16"
    for run in runs_in(args.results_dir, args.vq_model)[:1] if args.resume else []:
        began = run.flags()
        complete(args, {name: began.get(name) for name in DESCRIPTION}, run.folder)
    args.quantizer = args.quantizer or "vq"
    given = {"codebook_size": args.codebook_size, "codebook_embed_dim": args.codebook_embed_dim}
    given |= {"l2_norm": args.codebook_l2_norm, **(args.quantizer_options or {})}
    quantizer = {"name": args.quantizer, **{name: value for name, value in given.items() if value is not None}}
    if config:
        return {**config, "quantizer": {**config["quantizer"], **quantizer}}
    width = {} if args.vq_width is None else {"ch": args.vq_width}
    return {"network": {"name": "vqgan", **VQ_SIZES[args.vq_model], **width}, "quantizer": quantizer}


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


def begin_anew(initial: "Checkpoint", discriminator: "Module", args: argparse.Namespace) -> None:
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


def json_object(text: str) -> dict[str, Any]:
    """Read a flag's JSON object."""
    import json

    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f'must be a JSON object as {{"levels": [8, 5, 5]}}, got {text}') from error


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__, added=["--no-wandb", "--wandb-project"])
    parser.add_argument("--data-path", required=True, help="folder of images, or of the lists that name them")
    parser.add_argument(
        "--data-face-path", default=None, help="a second folder of images, trained on together with the first"
    )
    parser.add_argument(
        "--dataset", default="imagenet", help="kind of data: imagenet, pexels, coco, openimage, t2i_image"
    )
    add_image_size_flags(parser, 256, downsample=False)
    add_reading_flags(parser)
    add_switch(parser, "--flip", True, "mirror half of the images")
    parser.add_argument("--vq-width", type=positive_int, default=None, help="base channels (default: the model's own)")
    add_tokenizer_flags(parser, VQ_SIZES)
    parser.add_argument("--quantizer", default=None, help="kind of quantiser, one of --import too (default: vq)")
    parser.add_argument(
        "--quantizer-options", type=json_object, default=None, help='options of the quantiser, as JSON: {"name": value}'
    )
    parser.add_argument(
        "--finetune",
        action="store_true",
        help="begin at step 0 with the tokenizer of --vq-ckpt, and its discriminator and optimizers where it has them",
    )
    add_switch(parser, "--keep-discriminator", True, "--finetune takes the file's discriminator and both optimizers")
    group = parser.add_argument_group("loss")
    add_switch(
        group,
        "--codebook-l2-norm",
        None,
        "look codes up among normalised vectors (default: as --vq-ckpt or the resumed run does, else on)",
    )
    group.add_argument("--codebook-weight", type=nonnegative_float, default=1.0, help="of the codebook's losses")
    group.add_argument("--entropy-loss-ratio", type=nonnegative_float, default=0.0, help="of the entropy loss")
    group.add_argument("--commit-loss-beta", type=nonnegative_float, default=0.25, help="of the commitment loss")
    group.add_argument("--reconstruction-weight", type=nonnegative_float, default=1.0, help="of the pixels' loss")
    group.add_argument("--reconstruction-loss", choices=["l1", "l2"], default="l2", help="of the pixels")
    group.add_argument(
        "--perceptual-weight", type=nonnegative_float, default=1.0, help="of LPIPS; 0 needs no VGG16 weights"
    )
    group.add_argument(
        "--disc-weight", type=nonnegative_float, default=0.5, help="of the adversarial losses; 0 for no discriminator"
    )
    group.add_argument(
        "--disc-start",
        type=nonnegative_int,
        default=20000,
        help="first step with the discriminator, as the log counts them",
    )
    group.add_argument("--disc-type", choices=["patchgan", "stylegan"], default="patchgan", help="discriminator")
    group.add_argument(
        "--disc-loss", choices=["hinge", "vanilla", "non-saturating"], default="hinge", help="discriminator's loss"
    )
    group.add_argument(
        "--gen-loss", choices=["hinge", "non-saturating"], default="hinge", help="generator's adversarial loss"
    )
    parser.add_argument("--dropout-p", type=PROBABILITY, default=0.0, help="dropout in the tokenizer's residual blocks")
    add_switch(parser, "--compile", False, "torch.compile the tokenizer (on CUDA)")
    add_training_flags(
        parser, epochs=40, batch=128, results_dir="results_tokenizer_image", num_workers=16, decays=False
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
