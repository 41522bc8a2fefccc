"""Draws a few images of chosen classes into one grid.

python3 autoregressive/sample/sample_c2i.py --gpt-ckpt c2i_L_384.pt
"""

import argparse

from autoregressive.sample.flags import grid_flags, sampling_config
from utils.cli import add_batch_size_flag, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from autoregressive.sample.common import build_pipeline, class_requests, labels_to_draw, write_grid
    from utils.distributed import pick_device

    if args.gpt_type != "c2i":
        raise ValueError("sample_c2i.py draws from class-conditional models; for captions there is sample_t2i.py")
    sampling_config(args)  # refuses settings before the models are read
    pipeline, _, _ = build_pipeline(args, pick_device(args.device), args.batch_size)
    labels, names = labels_to_draw(args, pipeline.gpt)
    requests = class_requests(args, pipeline.gpt, labels, range(len(labels)), args.seed)
    images = np.concatenate([images for _, images in pipeline.batches(requests, progress=True)])
    write_grid(args, pipeline.gpt, images, names)


def flags() -> argparse.ArgumentParser:
    parser = grid_flags(__doc__, "sample_c2i.png", "class")
    add_batch_size_flag(parser)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
