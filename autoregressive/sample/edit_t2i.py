"""Fills a hole in a picture, or draws its surroundings, with a text-conditional model.

python3 autoregressive/sample/edit_t2i.py --gpt-ckpt t2i_XL_stage2_512.pt --image street.png --mask hole.png --prompt "a red lantern"

With --t5-feat-path, features that were made of --prompt-file, no T5 is needed.
"""

import argparse

from autoregressive.sample.editing import picture_to_edit, write_edits
from autoregressive.sample.flags import editing_flags
from utils.cli import add_flag, run_script


def main(args: argparse.Namespace) -> None:
    from autoregressive.sample.common import build_pipeline
    from autoregressive.sample.text import prompts_to_draw, text_settings
    from utils.distributed import pick_device

    args.prompt = None if args.prompt is None else [args.prompt]
    if not (args.prompt or args.prompt_file):
        raise ValueError("give what the picture shows: --prompt, or --prompt-file with one prompt")
    prompts, stored = prompts_to_draw(args)
    if len(prompts) > 1:
        raise ValueError(f"a picture is edited with one prompt, got {len(prompts)}")
    image, hole = picture_to_edit(args)  # what is wrong with files is told before the models are read
    pipeline, _, _ = build_pipeline(args, pick_device(args.device), args.batch_size, text=text_settings(args))
    what = {"features": stored[0]} if stored else {"asked": prompts[0]}
    write_edits(args, pipeline, image, hole, **what, negative_prompts=args.negative_prompt)


def flags() -> argparse.ArgumentParser:
    parser = editing_flags(__doc__, "edit_t2i.png", "prompt")
    add_flag(parser, "--prompt", None, None, "what the picture shows")
    add_flag(parser, "--prompt-file", None, None, "a text file with the prompt on its one line, in its place")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
