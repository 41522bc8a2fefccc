"""Draws a few images of chosen classes into one grid.

python3 autoregressive/sample/sample_c2i.py --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt --gpt-model GPT-L
"""

import argparse
from typing import TYPE_CHECKING

from autoregressive.models.sizes import GPT_SIZES
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    SEED,
    add_batch_size_flag,
    add_decode_precision_flag,
    add_gpt_file_flags,
    add_gpt_flags,
    add_image_size_flags,
    add_quantize_flag,
    add_run_flags,
    add_sampling_flags,
    add_tokenizer_flags,
    flag_parser,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    from autoregressive.models.gpt import Transformer

# golden retriever, otter, red panda, geyser, macaw, valley, balloon, Arctic fox
IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from autoregressive.sample.common import build_pipeline, extra_conditions, negative_class, sampling_settings
    from utils.distributed import pick_device
    from utils.images import make_grid, save_png

    if args.gpt_type != "c2i":
        raise ValueError("sample_c2i.py draws from class-conditional models; for captions there is sample_t2i.py")
    settings = sampling_settings(args)
    pipeline, _, _ = build_pipeline(args, pick_device(args.device), args.batch_size)
    labels = labels_to_draw(args, pipeline.gpt)
    images = pipeline(
        labels,
        negative_classes=negative_class(args, pipeline.gpt),
        extra_conditions=extra_conditions(args, range(len(labels))),
        seed=args.seed,
        **settings,
    )
    save_png(make_grid(np.stack([np.asarray(image) for image in images]), columns=args.columns), args.output)
    print(f"wrote {args.output}: {len(images)} images of {pipeline.image_size}x{pipeline.image_size}")


def labels_to_draw(args: argparse.Namespace, gpt: "Transformer") -> list[int]:
    """--labels, or eight classes of the model's; prints what they are called. Raises ValueError for an unknown name."""
    from autoregressive.class_names import class_choice, class_names, find_class

    count = gpt.args.num_classes
    names = class_names(count, recorded=gpt.file_config.get("classes"))
    default = IMAGENET_CLASSES if count >= 1000 else [i % count for i in range(8)]
    labels = default if args.labels is None else [find_class(asked, names) for asked in args.labels]
    print("classes:", ", ".join(class_choice(label, names[label]) for label in labels))
    return labels


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = grid_flags(__doc__, "sample_c2i.png")
    add_batch_size_flag(parser)
    add_quantize_flag(parser)
    return parser


def grid_flags(description: str, output: str, *, files_required: bool = False) -> argparse.ArgumentParser:
    """The flags of a script that draws a grid of classes, whatever draws it. output: the picture's default name."""
    parser = flag_parser(description, added=["--cfg-interval"] if files_required else [])
    add_gpt_flags(parser, GPT_SIZES)
    add_gpt_file_flags(parser, required=files_required)
    add_tokenizer_flags(parser, VQ_SIZES, required=files_required)
    add_image_size_flags(parser, 384)
    add_sampling_flags(parser, cfg_scale=4.0, top_k=2000, negative="class")
    add_run_flags(parser)
    add_decode_precision_flag(parser)
    parser.add_argument("--seed", type=SEED, default=0, help="image i is a function of the seed and i")
    parser.add_argument(
        "--labels",
        nargs="+",
        default=None,
        help="the classes to draw, by name or number; a name comes first where classes are called by numbers (default: eight)",
    )
    parser.add_argument("--columns", type=positive_int, default=4, help="images in a row of the grid")
    parser.add_argument("--output", default=output, help="the picture to write")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
