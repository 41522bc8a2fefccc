"""Draws an image for each of a few prompts into one grid, their tokens by vLLM.

python3 autoregressive/serve/sample_t2i.py --gpt-ckpt t2i_XL_stage2_512.pt --vq-ckpt vq_ds16_t2i.pt --prompt "a red lantern"

In an environment that has vLLM: `bash scripts/setup.sh serve` makes one, .venv-serve. With --t5-feat-path, features that
were made of --prompt-file, no T5 is needed.
"""

import argparse

from autoregressive.sample.flags import grid_flags
from utils.cli import add_vllm_flags, run_script


def main(args: argparse.Namespace) -> None:
    from autoregressive.sample.text import print_prompts, prompt_requests, prompts_to_draw, text_settings
    from autoregressive.serve.common import draw_grid, open_models
    from autoregressive.serve.vllm_engine import require_vllm

    require_vllm()  # before a T5 is looked for
    prompts, stored = prompts_to_draw(args)
    served, pipeline = open_models(args, text_settings(args))
    requests = prompt_requests(args, pipeline, stored or prompts, range(len(prompts)), args.seed)
    draw_grid(args, served, pipeline, requests, prompts)
    print_prompts(prompts)


def flags() -> argparse.ArgumentParser:
    parser = grid_flags(__doc__, "sample_t2i_vllm.png", "prompt", files_required=True)
    add_vllm_flags(parser)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
