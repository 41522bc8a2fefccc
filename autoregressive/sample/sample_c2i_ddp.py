"""Draws many images for FID: PNG files and one `.npz`, on any number of processes.

    torchrun --nproc_per_node=8 autoregressive/sample/sample_c2i_ddp.py --gpt-ckpt c2i_B_256.pt --vq-ckpt vq_ds16_c2i.pt \\
        --image-size 256 --cfg-scale 2.0

Image i depends on the seed and i alone. Rerun the command to draw what is missing, on any
number of processes.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from autoregressive.sample.flags import many_flags, sampling_config
from utils.cli import run_script
from utils.sample_folder import folder_name

if TYPE_CHECKING:
    from autoregressive.request import Request


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from autoregressive.sample.common import build_pipeline, class_requests
    from autoregressive.sample.many import draw_missing, run_settings, unrecorded
    from utils.distributed import start
    from utils.images import write_image_npz
    from utils.rng import image_label
    from utils.sample_folder import claim_folder, read_images

    if args.gpt_type != "c2i":
        raise ValueError(
            "sample_c2i_ddp.py draws from class-conditional models; for captions there is sample_t2i_ddp.py"
        )
    sampling_config(args)  # refuses settings before the models are read
    dist = start(args.device)
    with dist.main_first():
        batch = None if args.per_proc_batch_size == "auto" else args.per_proc_batch_size
        pipeline, gpt_path, vq_path = build_pipeline(args, dist.device, batch, args.num_fid_samples)
    folder = Path(args.sample_dir) / folder_name(args, gpt_path, vq_path)
    if dist.is_main:
        claim_folder(folder, run_settings(args, gpt_path, vq_path), unrecorded(args))
    dist.barrier()

    def png(index: int) -> Path:
        return folder / f"{index:06d}.png"

    def requests(mine: list[int]) -> "list[Request]":
        return class_requests(args, pipeline.gpt, [labels[i] for i in mine], mine, args.global_seed)

    count = args.num_fid_samples
    classes = args.num_classes
    labels = [i % classes if args.balanced else image_label(args.global_seed, i, classes) for i in range(count)]
    draw_missing(args, pipeline, dist, png, count, requests, args.image_size_eval)
    if dist.is_main and args.npz:
        target = folder.with_name(folder.name + ".npz")
        shape = (count, args.image_size_eval, args.image_size_eval, 3)
        if is_gathered(target, folder, labels):
            target.touch()  # the file of this command is the newest, which whoever waits for it takes
            print(f"{target} has these {count} images already")
        else:
            write_image_npz(target, read_images(map(png, range(count))), shape, np.asarray(labels))
            print(f"wrote {target}: {count} images")
    dist.barrier()
    dist.close()


def is_gathered(target: Path, folder: Path, labels: list[int]) -> bool:
    """Return whether an .npz has these labels, and no image came into the folder since it was written."""
    import numpy as np

    if not target.exists() or target.stat().st_mtime_ns < folder.stat().st_mtime_ns:
        return False
    with np.load(target) as archive:
        return archive["arr_1"].tolist() == labels


def flags() -> argparse.ArgumentParser:
    parser = many_flags(__doc__, "class", folder="samples", images=50000, npz=True)
    parser.add_argument("--balanced", action="store_true", help="classes in turn instead of at random")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
