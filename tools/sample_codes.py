"""Draws codes with a class-conditional GPT into a folder that train_c2i.py trains on: its own samples, each class in turn.

    python3 tools/sample_codes.py --gpt-ckpt results --code-path own_codes --num-samples 5000 --temperature 0.9

Sample i depends on the seed and i alone, as in sample_c2i_ddp.py. Rerun the command to draw what is missing, on any number
of processes (torchrun).
"""

import argparse

from autoregressive.sample.flags import drawing_flags, sampling_config
from utils.cli import SEED, add_flag, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from autoregressive.sample.common import build_pipeline, class_requests
    from dataset.augmentation import FLIP_VIEWS
    from dataset.code_files import CodeSettings, CodeWriter
    from utils.distributed import start
    from utils.sample_folder import file_identity

    config, dist = sampling_config(args), start(args.device)
    with dist.main_first():
        pipeline, path, _ = build_pipeline(args, dist.device, args.batch_size, args.num_samples)
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    if gpt.args.model_type != "c2i":
        raise ValueError(f"{path} is text-conditional: sample_codes.py draws codes of classes")
    settings = CodeSettings(
        dataset="imagenet",
        image_size=pipeline.image_size,
        tokens=gpt.args.block_size,
        views=FLIP_VIEWS[:1],
        codebook_size=tokenizer.codebook_size,
        num_images=args.num_samples,
        num_classes=gpt.args.num_classes,
        classes=gpt.file_config.get("classes"),
        vq_model=tokenizer.family,
        tokenizer=tokenizer.fingerprint(),
        shard_size=args.shard_size,
        made_by="tools/sample_codes.py",
        extra={"gpt": file_identity(path)["content"], "seed": args.seed, "sampling": vars(config)},
    )
    with dist.main_first():
        writer = CodeWriter(args.code_path, settings)
    # The first process looks for all: a quicker one may have written some before another one has looked.
    missing = dist.broadcast(writer.missing_shards() if dist.is_main else None)
    for shard in missing[dist.rank :: dist.world_size]:
        numbers = list(settings.images_of(shard))
        labels = [number % gpt.args.num_classes for number in numbers]
        requests = pipeline.read(class_requests(args, gpt, labels, numbers, args.seed))
        parts = [requests[at : at + pipeline.batch_size] for at in range(0, len(requests), pipeline.batch_size)]
        codes = np.concatenate([pipeline.draw(part).cpu().numpy() for part in parts])
        writer.write_shard(shard, codes[:, None], np.asarray(labels), np.asarray(numbers))
    dist.barrier()
    if dist.is_main:
        print(f"{args.code_path}: codes of {args.num_samples:,} samples of {path}")
    dist.close()


def flags() -> argparse.ArgumentParser:
    parser = drawing_flags(__doc__, "class", cfg_scale=1.0)
    add_flag(parser, "--code-path", None, None, "folder to write the codes to", required=True)
    add_flag(parser, "--num-samples", positive_int, 5000, "samples to draw")
    add_flag(parser, "--shard-size", positive_int, 4096, "samples in a shard")
    add_flag(
        parser, "--batch-size", positive_int, None, "samples drawn at once (default: 32 on an accelerator, 8 on a CPU)"
    )
    add_flag(parser, "--seed", SEED, 0, "sample i is a function of the seed and i")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
