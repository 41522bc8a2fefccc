"""Encodes one image and decodes it again: the reconstruction goes to --output-dir.

python3 tokenizer/tokenizer_image/vq_demo.py --image-path photo.jpg --vq-ckpt vq_ds16_c2i.pt --image-size 512
"""

import argparse

from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    SEED,
    add_image_size_flags,
    add_reading_flags,
    add_switch,
    add_tokenizer_flags,
    flag_parser,
    run_script,
    tokenizer_beliefs,
)


def main(args: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from dataset.augmentation import center_view
    from dataset.pixels import Reading, load_rgb
    from tokenizer.load import choose_weights, load_tokenizer
    from utils.distributed import pick_device
    from utils.images import peak_signal_to_noise_ratio, save_png, to_uint8
    from utils.runs import find_checkpoint

    if args.vq_ckpt is None:
        raise ValueError(
            "--vq-ckpt is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
        )
    if not Path(args.image_path).is_file():
        raise FileNotFoundError(f"--image-path {args.image_path}: there is no such file")
    device = pick_device(args.device)
    path = find_checkpoint(args.vq_ckpt)
    tokenizer = load_tokenizer(
        path,
        **tokenizer_beliefs(args),
        device=device,
        use_ema=choose_weights(path, args.use_ema),
    )
    try:
        image = load_rgb(args.image_path, Reading.of(args))
    except Exception as error:  # decoders fail in arbitrary ways
        raise ValueError(f"--image-path {args.image_path} is not a readable image ({error})") from error
    pixels = center_view(image, args.image_size)[None].to(device)
    with torch.inference_mode():
        quant, _, (_, _, indices) = tokenizer.encode(pixels)
        recon = to_uint8(tokenizer.decode(quant))[0]
    original = to_uint8(pixels)[0]
    output = Path(args.output_dir) / f"{Path(args.image_path).stem}_{args.suffix}.png"
    save_png(recon, output)
    print(
        f"wrote {output}: {args.image_size}x{args.image_size} from {len(indices)} codes, {len(indices.unique())} of them "
        f"different, PSNR {peak_signal_to_noise_ratio(original, recon):.2f} dB"
    )


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--image-path", default="assets/example.jpg", help="the image")
    add_reading_flags(parser)
    parser.add_argument("--output-dir", default="output_vq_demo", help="where the reconstruction goes")
    parser.add_argument("--suffix", default="tokenizer_image", help="end of its name")
    add_tokenizer_flags(parser, VQ_SIZES)
    add_switch(parser, "--use-ema", True, "reconstruct by the averaged weights where the file has them")
    add_image_size_flags(parser, 512, downsample=False)
    parser.add_argument("--seed", type=SEED, default=0, help="kept for published command lines; nothing is drawn")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
