"""Draws an image for each of a few prompts into one grid, their tokens by vLLM.

python3 autoregressive/serve/sample_t2i.py --gpt-ckpt t2i_XL_stage2_512.pt --vq-ckpt vq_ds16_t2i.pt --prompt "a red lantern"

In an environment that has vLLM: `bash scripts/serve.sh` makes one. With --t5-feat-path, features that were made of
--prompt-file, no T5 is needed.
"""

import argparse

from autoregressive.models.sizes import GPT_SIZES
from autoregressive.sample.sample_t2i import PROMPTS
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    add_gpt_file_flags,
    add_gpt_flags,
    add_image_size_flags,
    add_run_flags,
    add_sampling_flags,
    add_text_flags,
    add_tokenizer_flags,
    add_vllm_flags,
    flag_parser,
    positive_int,
    run_script,
)


def main(args: argparse.Namespace) -> None:
    from autoregressive.pipeline import check_prompts
    from autoregressive.sample.common import features_of, open_prompt_features
    from autoregressive.serve.common import draw_grid, open_models
    from autoregressive.serve.engine import ImageRequest
    from language.prompts import read_prompt_lines

    if args.gpt_type != "t2i":
        raise ValueError("sample_t2i.py draws from text-conditional models; for classes there is sample_c2i.py")
    if args.t5_feat_path and (args.prompt or not args.prompt_file):
        raise ValueError(
            f"--t5-feat-path {args.t5_feat_path} has features of a file's prompts: give that file as --prompt-file, and no "
            "--prompt"
        )
    prompts = list(args.prompt or [])
    if args.prompt_file:
        prompts += read_prompt_lines(args.prompt_file)
    prompts = prompts or PROMPTS
    check_prompts(prompts)
    stored = open_prompt_features(args, args.prompt_file, len(prompts))
    models = open_models(args)
    if stored:
        features = features_of(stored, range(len(prompts)), args.t5_feature_max_len)
    else:
        features = models.pipeline.encode(prompts, progress=True)
        models.pipeline.release_text_encoder()
    draw_grid(args, models, [ImageRequest(features=rows, **models.settings) for rows in features])
    for i, prompt in enumerate(prompts):
        print(f"{i}: {' '.join(prompt.split())}")


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    add_gpt_flags(parser, GPT_SIZES, gpt_type="t2i", gpt_model="GPT-XL")
    add_gpt_file_flags(parser, required=True)
    add_tokenizer_flags(parser, VQ_SIZES, required=True)
    add_text_flags(parser)
    add_image_size_flags(parser, 512)
    add_sampling_flags(parser, cfg_scale=7.5, top_k=1000)
    add_run_flags(parser)
    add_vllm_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of the seed, i and its prompt")
    parser.add_argument(
        "--prompt",
        action="append",
        default=None,
        help="what to draw; may be given several times (default: four prompts)",
    )
    parser.add_argument("--prompt-file", default=None, help="a text file with a prompt on each line, after those")
    parser.add_argument("--columns", type=positive_int, default=4, help="images in a row of the grid")
    parser.add_argument("--output", default="sample_t2i_vllm.png", help="the picture to write")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
