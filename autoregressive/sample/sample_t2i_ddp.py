"""Draws an image for each prompt of a table: PNG files with their captions, on any number of processes.

    torchrun --nproc_per_node=8 autoregressive/sample/sample_t2i_ddp.py --gpt-ckpt t2i_XL_stage2_512.pt \\
        --vq-ckpt vq_ds16_t2i.pt --prompt-csv PartiPrompts.tsv

Image i depends on the seed, i and prompt i alone. Rerun the command to draw what is missing, on any
number of processes. In the folder of the run: images/{i:06d}.png; and
once all are there captions.txt, a prompt on each line, and result.jsonl, {"text": …, "image_path": …} on each. With
--t5-feat-path, features that language/extract_t5_feature.py --data-path PartiPrompts.tsv made, no T5 is needed.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from autoregressive.sample.flags import many_flags, sampling_config
from utils.cli import run_script
from utils.sample_folder import folder_name

if TYPE_CHECKING:
    from autoregressive.request import Request

# Further flags that change neither an image nor which images there are, and those that stand for a file's content.
IMMATERIAL = {"num_classes", "t5_device", "prompt_csv", "t5_path", "t5_model_type", "t5_feat_path"}


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from autoregressive.sample.common import build_pipeline
    from autoregressive.sample.many import draw_missing, run_settings, unrecorded
    from autoregressive.sample.text import features_of, open_prompt_features, prompt_requests, text_settings
    from autoregressive.text import check_prompts
    from language.prompts import read_prompt_table
    from utils.distributed import start
    from utils.images import is_whole_png, write_image_npz
    from utils.sample_folder import (
        claim_folder,
        file_identity,
        read_images,
        rename_earlier,
        text_identity,
        write_captions,
    )

    if args.gpt_type != "t2i":
        raise ValueError("sample_t2i_ddp.py draws from text-conditional models; for classes there is sample_c2i_ddp.py")
    sampling_config(args)  # refuses settings before the models are read
    prompts = read_prompt_table(args.prompt_csv)
    check_prompts(prompts)
    stored = open_prompt_features(args, args.prompt_csv, prompts)
    count = min(args.num_fid_samples, len(prompts))
    dist = start(args.device)
    with dist.main_first():
        batch = None if args.per_proc_batch_size == "auto" else args.per_proc_batch_size
        pipeline, gpt_path, vq_path = build_pipeline(args, dist.device, batch, count, text_settings(args))
    folder = Path(args.sample_dir) / folder_name(args, gpt_path, vq_path, prompts=Path(args.prompt_csv).name)
    if dist.is_main:
        text = {"t5": None if stored else file_identity(pipeline.t5_path)}
        if stored:
            text["t5_features"] = file_identity(stored.folder)
        text |= {"prompts": text_identity(prompts), "t5_precision": args.t5_precision or args.precision}
        decisive = run_settings(args, gpt_path, vq_path, IMMATERIAL, **text)
        rename_earlier(folder.with_name(folder_name(args, gpt_path, vq_path)), folder, decisive, unrecorded(args))
        claim_folder(folder, decisive, unrecorded(args))
    dist.barrier()

    def png(index: int) -> Path:
        return folder / "images" / f"{index:06d}.png"

    def requests(mine: list[int]) -> "list[Request]":
        asked = features_of(stored, mine, args.t5_feature_max_len) if stored else [prompts[i] for i in mine]
        return prompt_requests(args, pipeline, asked, mine, args.global_seed, progress=dist.is_main)

    draw_missing(args, pipeline, dist, png, count, requests)
    if dist.is_main:
        listed = count  # an earlier run may have drawn more: each image in the folder has its caption
        while listed < len(prompts) and is_whole_png(png(listed)):
            listed += 1
        write_captions(folder, prompts[:listed], map(png, range(listed)))
        print(f"wrote {folder / 'captions.txt'} and result.jsonl: {listed} images")
    if dist.is_main and args.npz:
        target = folder.with_name(folder.name + ".npz")
        shape = (count, args.image_size, args.image_size, 3)
        write_image_npz(target, read_images(map(png, range(count))), shape, np.arange(count))
        print(f"wrote {target}: {count} images")
    dist.barrier()
    dist.close()


def flags() -> argparse.ArgumentParser:
    parser = many_flags(__doc__, "prompt", folder="samples_parti", images=30000, npz=False)
    help = "a table with tabs between its columns, one of which is named Prompt"
    parser.add_argument("--prompt-csv", default="evaluations/t2i/PartiPrompts.tsv", help=help)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
