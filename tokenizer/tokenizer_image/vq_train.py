"""Trains an image tokenizer: a VQGAN with a discriminator and a perceptual loss.

    torchrun --nproc_per_node=8 tokenizer/tokenizer_image/vq_train.py --data-path imagenet/train --image-size 256
    python3 tokenizer/tokenizer_image/vq_train.py --data-path my_photos --dataset coco --finetune --vq-ckpt vq_ds16_c2i.pt

Recipe: LlamaGen (arXiv 2406.06525, section 3.1); VQGAN (2012.09841).
"""

import argparse
import json
from typing import Any

from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    PROBABILITY,
    add_flag,
    add_image_size_flags,
    add_reading_flags,
    add_store_true,
    add_switch,
    add_tokenizer_flags,
    flag_parser,
    nonnegative_float,
    nonnegative_int,
    positive_int,
    run_script,
)
from utils.training.flags import StoreGiven, add_training_flags


def main(args: argparse.Namespace) -> None:
    from functools import partial

    import torch

    from dataset.augmentation import random_view
    from dataset.image_build import image_dataset
    from tokenizer.tokenizer_image import recipe
    from utils.checkpoint import read_checkpoint
    from utils.distributed import start
    from utils.logger import console_logger
    from utils.origin import origin
    from utils.runs import find_checkpoint
    from utils.training.job import Job
    from utils.training.parallel import Parallel
    from utils.training.trainer import Trainer

    if args.finetune and not args.vq_ckpt:
        raise ValueError("--finetune needs --vq-ckpt, the weights to begin with")
    dist = start(args.device, deterministic=args.deterministic)
    console_logger("dataset", dist.is_main)
    torch.manual_seed(args.global_seed)
    initial = read_checkpoint(find_checkpoint(args.vq_ckpt), mmap=False) if args.vq_ckpt else None
    tokenizer = recipe.new_tokenizer(args, initial).to(dist.device)
    with dist.main_first():  # which downloads VGG16
        losses = recipe.new_losses(args).to(dist.device)
    discriminator = losses.discriminator
    dataset = image_dataset(
        args, transform=partial(random_view, image_size=args.image_size, flip=args.flip, crop=args.random_crop)
    )
    if args.finetune:
        recipe.begin_anew(initial, discriminator, args)
    plan = Parallel(dist, precision=args.mixed_precision, compile=args.compile)
    job = Job(
        args.vq_model,
        models={"model": tokenizer, "discriminator": discriminator, **losses.averages},
        phases=recipe.Adversaries(args, plan, tokenizer, losses).phases,
        dataset=dataset,
        initial=initial,
        sample=recipe.Comparison(dataset, args.image_size, dist.device),
        config=origin(**tokenizer.identity),
        rate=partial(recipe.dropping_rate, args) if args.lr_drop_epochs else None,
    )
    trainer = Trainer(args, plan, job)
    if args.codebook_l2_norm is False:
        trainer.log.info("codes are looked up among vectors that are not normalised (--no-codebook-l2-norm)")
    if args.disc_weight and trainer.total_steps < args.disc_start:
        trainer.log.warning(
            f"the run ends at step {trainer.total_steps}, before --disc-start {args.disc_start}: nothing is trained against the "
            "discriminator"
        )
    trainer.fit()
    dist.close()


def json_object(text: str) -> dict[str, Any]:
    """Read a flag's JSON object."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f'must be a JSON object as {{"levels": [8, 5, 5]}}, got {text}') from error


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__, added=["--no-wandb", "--wandb-project"])
    parser.add_argument("--data-path", required=True, help="folder of images, or of the lists that name them")
    add_flag(parser, "--data-face-path", None, None, "a second folder of images, trained on together with the first")
    add_flag(parser, "--dataset", None, "imagenet", "kind of data: imagenet, pexels, coco, openimage, t2i_image")
    add_image_size_flags(parser, 256, downsample=False)
    add_reading_flags(parser)
    add_switch(parser, "--flip", True, "mirror half of the images")
    add_switch(parser, "--random-crop", True, "cut squares of 0.8 to 1 of the shorter side; otherwise the centre")
    parser.add_argument("--vq-width", type=positive_int, default=None, help="base channels (default: the model's own)")
    add_tokenizer_flags(parser, VQ_SIZES)
    add_flag(parser, "--quantizer-options", json_object, None, 'options of the quantiser, as JSON: {"name": value}')
    add_flag(parser, "--network", None, None, "kind of network, one of --import too (default: that of --vq-model)")
    add_flag(parser, "--network-options", json_object, None, 'options of the network, as JSON: {"name": value}')
    help = "begin at step 0 with the tokenizer of --vq-ckpt, and its discriminator and optimizers where it has them"
    add_store_true(parser, "--finetune", help)
    add_switch(parser, "--keep-discriminator", True, "--finetune takes the file's discriminator and both optimizers")
    group = parser.add_argument_group("loss")
    add_switch(
        group,
        "--codebook-l2-norm",
        None,
        "look codes up among normalised vectors (default: as --vq-ckpt or the resumed run does, else on)",
    )
    for flag, default, help in (
        ("--codebook-weight", 1.0, "of the codebook's losses"),
        ("--reconstruction-weight", 1.0, "of the pixels' loss"),
        ("--perceptual-weight", 1.0, "of LPIPS; 0 needs no VGG16 weights"),
        ("--disc-weight", 0.5, "of the adversarial losses; 0 for no discriminator"),
    ):
        group.add_argument(flag, type=nonnegative_float, default=default, help=help)
    for flag, default, help in (
        ("--entropy-loss-ratio", 0.0, "of the entropy loss (default: the quantiser's own, 0 for vq)"),
        ("--commit-loss-beta", 0.25, "of the commitment loss (default: the quantiser's own, 0.25 for vq)"),
    ):
        group.add_argument(flag, type=nonnegative_float, default=default, help=help, action=StoreGiven)
    group.add_argument("--reconstruction-loss", choices=["l1", "l2"], default="l2", help="of the pixels")
    add_flag(group, "--disc-start", nonnegative_int, 20000, "first step with the discriminator, as the log counts them")
    help = "of the generator's adversarial loss (default: --disc-weight)"
    group.add_argument("--gen-weight", type=nonnegative_float, default=None, help=help)
    help = "of LeCam, the discriminator's regularisation towards running means of its logits"
    group.add_argument("--lecam-weight", type=nonnegative_float, default=0.0, help=help)
    add_switch(group, "--disc-first", False, "in each step move the discriminator before the tokenizer")
    kinds = ["patchgan", "stylegan", "blur"]
    add_flag(group, "--disc-type", None, "patchgan", "discriminator; blur: Open-MAGVIT2's second", choices=kinds)
    help = "discriminator's loss"
    add_flag(group, "--disc-loss", None, "hinge", help, choices=["hinge", "vanilla", "non-saturating"])
    help = "generator's adversarial loss; -mean: of the mean of an image's logits"
    add_flag(group, "--gen-loss", None, "hinge", help, choices=["hinge", "non-saturating", "non-saturating-mean"])
    parser.add_argument("--dropout-p", type=PROBABILITY, default=0.0, help="dropout in the tokenizer's residual blocks")
    help = "epochs after which the learning rate is a tenth, in place of --lr-schedule"
    parser.add_argument("--lr-drop-epochs", type=positive_int, nargs="*", default=[], help=help)
    add_switch(parser, "--compile", False, "torch.compile the tokenizer (on CUDA)")
    add_training_flags(
        parser, epochs=40, batch=128, results_dir="results_tokenizer_image", num_workers=16, decays=False
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
