"""Draws a few images of chosen classes into one grid, their tokens by vLLM.

python3 autoregressive/serve/sample_c2i.py --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt

In an environment that has vLLM: `bash scripts/setup.sh serve` makes one, .venv-serve.
"""

import argparse

from autoregressive.sample.flags import grid_flags
from utils.cli import add_vllm_flags, run_script


def main(args: argparse.Namespace) -> None:
    from autoregressive.sample.common import class_requests, labels_to_draw
    from autoregressive.serve.common import draw_grid, open_models

    if args.gpt_type != "c2i":
        raise ValueError("sample_c2i.py draws from class-conditional models; for captions there is sample_t2i.py")
    served, pipeline = open_models(args)
    labels, names = labels_to_draw(args, pipeline.gpt)
    draw_grid(args, served, pipeline, class_requests(args, pipeline.gpt, labels, range(len(labels)), args.seed), names)


def flags() -> argparse.ArgumentParser:
    parser = grid_flags(__doc__, "sample_c2i_vllm.png", "class", files_required=True)
    add_vllm_flags(parser)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
