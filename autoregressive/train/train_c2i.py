"""Trains a class-conditional GPT on image codes (raster or parallel layout).

    torchrun --nproc_per_node=8 autoregressive/train/train_c2i.py --code-path codes --gpt-model GPT-B --image-size 256
    python3 autoregressive/train/train_c2i.py --code-path codes --resume          # one process, going on where it stopped

Codes come from extract_codes_c2i.py. Recipe: LlamaGen (arXiv 2406.06525, section 3.1); layout: PAR (2412.15119).
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import (
    add_gpt_flags,
    add_image_size_flags,
    add_training_flags,
    flag_parser,
    grid_size,
    layout_numbers,
    run_script,
)

if TYPE_CHECKING:
    from dataset.codes import CodeDataset


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.models.gpt import GPT_models
    from autoregressive.train.loss import dropped_conditions, mean_loss, next_token_loss
    from dataset.build import build_dataset
    from dataset.codes import open_codes
    from utils.checkpoint import read_checkpoint
    from utils.distributed import start
    from utils.logger import console_logger
    from utils.parallel import parallelize
    from utils.rng import item_seed
    from utils.runs import find_checkpoint
    from utils.trainer import Micro, Phase, Trainer, adamw

    grid = grid_size(args.image_size, args.downsample_size)
    ar_token_num, spe_token_num = layout_numbers(args)
    if args.gpt_type != "c2i":
        raise ValueError("train_c2i.py trains class-conditional models; for captions there is train_t2i.py")
    dist = start(args.device)
    console_logger("dataset", dist.is_main)
    dataset = CheckedCodes(build_dataset(args), args.code_path, args.num_classes, args.vocab_size)

    torch.manual_seed(args.global_seed)
    dropout = 0.0 if args.drop_path_rate > 0 else args.dropout_p  # stochastic depth replaces them
    model = GPT_models[args.gpt_model](
        vocab_size=args.vocab_size,
        block_size=grid**2,
        num_classes=args.num_classes,
        cls_token_num=args.cls_token_num,
        model_type=args.gpt_type,
        resid_dropout_p=dropout,
        ffn_dropout_p=dropout,
        token_dropout_p=args.token_dropout_p,
        drop_path_rate=args.drop_path_rate,
        spe_token_num=spe_token_num or 0,
        ar_token_num=ar_token_num or 1,
    ).to(dist.device)
    initial = read_checkpoint(find_checkpoint(args.gpt_ckpt)) if args.gpt_ckpt else None
    wrapped = parallelize(model, dist, compile=not args.no_compile)
    drop_probability = model.args.class_dropout_prob

    def loss(batch: list[torch.Tensor], place: Micro) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        codes, labels = batch
        seed = item_seed(args.global_seed, place.step)
        drop = dropped_conditions(seed, place.global_batch, place.positions, drop_probability)
        value = next_token_loss(wrapped, model.layout, codes, labels, drop=drop.to(codes.device))
        return value, {"loss": value}

    validate = None
    if args.val_code_path:
        codes = open_codes(args.val_code_path, args.image_size, args.downsample_size, random_view=False)
        held_out = CheckedCodes(codes, args.val_code_path, args.num_classes, args.vocab_size)
        at_once = args.global_batch_size // (dist.world_size * args.gradient_accumulation_steps)

        def validate(evaluated: torch.nn.Module) -> dict[str, float]:
            return {"val_loss": mean_loss(evaluated, held_out, max(at_once, 1), dist)}

    trainer = Trainer(
        args,
        dist,
        run_name=args.gpt_model,
        models={"model": model},
        phases=[Phase("optimizer", wrapped, adamw(model, args), loss)],
        dataset=dataset,
        initial=initial,
        validate=validate,
    )
    trainer.fit()
    dist.close()


class CheckedCodes:
    """A data set of codes that the model has rows for; ValueError where it records others, or where one turns up.

    The published layout records nothing, and a label too large by one would pass for "no class".
    """

    def __init__(self, data: "CodeDataset", path: str, num_classes: int, vocab_size: int):
        self.data, self.path, self.num_classes, self.vocab_size = data, path, num_classes, vocab_size
        settings = getattr(data, "settings", None)
        if settings and (settings.num_classes or 0) > num_classes:
            raise ValueError(f"{path} has {settings.num_classes} classes; pass --num-classes {settings.num_classes}")
        if settings and settings.codebook_size > vocab_size:
            raise ValueError(
                f"{path} was made with {settings.codebook_size} codes; pass --vocab-size {settings.codebook_size}"
            )

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)

    def __getitem__(self, index: int) -> tuple:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple]:
        items = self.data.__getitems__(indices)
        for index, (codes, label) in zip(indices, items, strict=True):
            if not 0 <= label < self.num_classes:
                raise ValueError(
                    f"sample {index} of {self.path} has label {label}, not below --num-classes {self.num_classes}"
                )
            if not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
                raise ValueError(
                    f"sample {index} of {self.path} has codes from {codes.min()} to {codes.max()}, "
                    f"not below --vocab-size {self.vocab_size}"
                )
        return items


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--code-path", required=True, help="folder of codes, packed or in the published layout")
    parser.add_argument("--val-code-path", default=None, help="codes of held-out images: their loss is reported too")
    parser.add_argument("--dataset", default="imagenet_code", help="kind of data")
    parser.add_argument(
        "--gpt-ckpt", default=None, help="start from this file: weights, and where it has them optimizer and step"
    )
    parser.add_argument("--no-compile", action="store_true", help="do not torch.compile the model (it is only on CUDA)")
    add_gpt_flags(parser, GPT_SIZES, training=True)
    add_image_size_flags(parser, 256)
    add_training_flags(parser, epochs=300, batch=256, results_dir="results", num_workers=24)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
