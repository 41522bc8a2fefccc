"""CLIP score and FID of images drawn from captions.

    python3 evaluations/t2i/evaluation.py --fake_dir samples_coco/GPT-XL-… --ref_dir /path/to/coco --how_many 30000

--fake_dir holds images/ and captions.txt, the caption of each image in natural order, a line each, as sample_t2i_ddp.py
writes them; --ref_dir the photographs they are compared with, COCO's val2014, or the .npz that --save_statistics made of
them. Every image is cut to its centre square and resized to --eval_res. The figures go to score.txt, and with the whole
protocol to score.json, in --fake_dir. Under torchrun each process reads a share.
"""

import argparse

from evaluations.report import ANY_TYPE, COCO, add_evaluation_flags
from utils.cli import add_switch, flag_parser, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    from evaluations.t2i.figures import evaluate

    if not (args.clip or args.fid):
        raise ValueError("--no-clip and --no-fid leave nothing to compute: give one of them")
    if args.save_statistics:
        if not args.fid:
            raise ValueError("--save_statistics keeps what FID knows of the reference: leave --no-fid out")
        if not args.save_statistics.endswith(".npz") or args.ref_dir.endswith(".npz"):
            raise ValueError(
                "--save_statistics makes a FILE.npz of the folder --ref_dir; a .npz there has them already"
            )
    evaluate(args)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--fake_dir", default="/home/GigaGAN_images/", help="folder with images/ and captions.txt")
    help = f"folder of the reference, for COCO with {COCO}/ in it; or an .npz made by --save_statistics"
    parser.add_argument("--ref_dir", default="/home/COCO/", help=help)
    help = "keep the reference's statistics in FILE.npz; give it as --ref_dir next time"
    parser.add_argument("--save_statistics", default=None, metavar="FILE", help=help)
    kinds = ["coco2014", "imagenet2012", "laion4k"]
    parser.add_argument("--ref_data", choices=kinds, default="coco2014", help="what the reference is")
    help = f"folder of --ref_dir, except for coco2014, where it is {COCO}; as it stands, --ref_dir itself"
    parser.add_argument("--ref_type", default=ANY_TYPE, help=help)
    parser.add_argument("--how_many", type=positive_int, default=30000, help="generated images to look at, at most")
    parser.add_argument("--clip_model4eval", default="ViT-B/32", help="ViT-B/32, ViT-G/14 or ViT-bigG/14")
    parser.add_argument("--eval_res", type=positive_int, default=256, help="pixels a side at which images are compared")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="images at once on each process")
    parser.add_argument("--clip_path", default=None, help="folder of CLIP's weights (default: looked for by name)")
    add_switch(parser, "--clip", True, "the CLIP score")
    add_switch(parser, "--fid", True, "FID")
    help = "how images get the Inception network's size: clean, as published text-to-image figures are made, or graph"
    parser.add_argument("--inception_resize", choices=["clean", "graph"], default="clean", help=help)
    add_evaluation_flags(parser, "score in --fake_dir")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
