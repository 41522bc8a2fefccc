"""FID, sFID, Inception Score, precision and recall of class-conditional samples.

    python3 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples/GPT-B-c2i_B_256-….npz

REF and SAMPLES are each an .npz of images (arr_0, uint8 (N, H, W, 3)), an .npz with statistics (mu, sigma, mu_s,
sigma_s), or a folder of images. Features come from the 2015 Inception graph that published figures are made with. The
figures go to SAMPLES.txt, and with the whole protocol to SAMPLES.json. Under torchrun each process reads a share.
"""

import argparse

from evaluations.report import add_evaluation_flags
from utils.cli import add_switch, flag_parser, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    from evaluations.c2i.figures import evaluate

    if args.ref_batch is None or args.sample_batch is None:
        raise ValueError(
            "two arguments are needed: REF and SAMPLES, each an .npz or a folder of images "
            "(evaluator.py VIRTUAL_imagenet256_labeled.npz samples/….npz)"
        )
    evaluate(args)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument(
        "ref_batch", nargs="?", metavar="REF", help="reference: .npz or folder of images, or statistics"
    )
    parser.add_argument("sample_batch", nargs="?", metavar="SAMPLES", help="samples: .npz or folder of images")
    help = "which published protocol the input is compared with"
    parser.add_argument("--task", choices=["generation", "reconstruction"], default="generation", help=help)
    add_evaluation_flags(parser, "that of SAMPLES")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at once on each process")
    help = "keep the reference's features; give FILE as REF next time"
    parser.add_argument("--save-statistics", default=None, metavar="FILE", help=help)
    add_switch(parser, "--precision-recall", True, "precision and recall (they compare every image with every other)")
    help = "precision and recall without the float16 rounding that published figures have"
    parser.add_argument("--exact-distances", action="store_true", help=help)
    parser.add_argument("--kid", action="store_true", help="also KID, 100 subsets of 1000 images")
    parser.add_argument("--fd-dinov2", action="store_true", help="also the Fréchet distance of DINOv2 features")
    parser.add_argument("--dinov2-ckpt", default=None, help="weights for --fd-dinov2 (default: looked for)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
