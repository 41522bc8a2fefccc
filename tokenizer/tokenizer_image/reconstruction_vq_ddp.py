"""Reconstructs a folder of images by the tokenizer: PNG files, an .npz for rFID, PSNR, SSIM, LPIPS and codebook usage.

    torchrun --nproc_per_node=8 tokenizer/tokenizer_image/reconstruction_vq_ddp.py --data-path imagenet/val \\
        --vq-ckpt vq_ds16_c2i.pt --image-size 384 --image-size-eval 256

The same command again does what is missing (see tokenizer/reconstruction.py).
"""

import argparse

from tokenizer.reconstruction import reconstruction_flags
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import add_switch, add_tokenizer_flags, run_script, tokenizer_beliefs


def main(args: argparse.Namespace) -> None:
    from tokenizer.load import choose_weights, load_tokenizer
    from tokenizer.reconstruction import VQCodec, evaluate, folder_name
    from utils.distributed import start
    from utils.runs import find_checkpoint

    if args.vq_ckpt is None:
        raise ValueError(
            "--vq-ckpt is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
        )
    dist = start(args.device)
    with dist.main_first():
        path = find_checkpoint(args.vq_ckpt)
    args.use_ema = choose_weights(path, args.use_ema, told=dist.is_main)
    tokenizer = load_tokenizer(
        path,
        **tokenizer_beliefs(args),
        device=dist.device,
        use_ema=args.use_ema,
    )
    vars(args).update(tokenizer.flags)
    details = f"-size-{args.image_size_eval}-codebook-size-{args.codebook_size}-dim-{args.codebook_embed_dim}"
    evaluate(args, dist, VQCodec(tokenizer), name=folder_name(args, args.vq_model, details), weights=path)
    dist.close()


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = reconstruction_flags(__doc__, evaluation=256)
    add_tokenizer_flags(parser, VQ_SIZES)
    add_switch(parser, "--use-ema", True, "reconstruct by the averaged weights where the file has them")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
