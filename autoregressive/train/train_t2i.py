"""Trains a GPT on image-text pairs, conditioned on features of T5: stage 1 at 256 pixels, stage 2 at 512 from its weights.

    torchrun --nproc_per_node=8 autoregressive/train/train_t2i.py --data-path laion_coco --t5-feat-path t5_features \\
        --vq-ckpt vq_ds16_t2i.pt --gpt-model GPT-XL --image-size 256
    python3 autoregressive/train/train_t2i.py --dataset t2i_code --code-path codes --data-path laion_coco \\
        --t5-feat-path t5_features --resume                          # codes of extract_codes_t2i.py

With `--dataset t2i` the frozen tokenizer encodes each batch on the device. Pairs are jsonl lists or WebDataset shards.
A pair without features, or whose image cannot be read or is too small, does not count in the loss; the log's `valid` is
the share that does. Recipe: LlamaGen (arXiv 2406.06525, section 3.2); parallel layout: PAR (2412.15119).
"""

import argparse
from typing import TYPE_CHECKING

from autoregressive.models.sizes import GPT_SIZES
from autoregressive.train.start import add_finetune_flags, starting_point
from autoregressive.train.train_c2i import agreed_tokenizer, lay_out, model_sizes, new_model, sample_grid
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    CFG_SCALE,
    PROBABILITY,
    add_gpt_flags,
    add_image_size_flags,
    add_parallel_flags,
    add_reading_flags,
    add_switch,
    add_tokenizer_flags,
    add_training_flags,
    flag_parser,
    grid_size,
    layout_numbers,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dataset.t2i import TextImages
    from tokenizer.base import Tokenizer
    from utils.distributed import Distributed

SHOWN_CAPTIONS = 8
# Of so many pairs at the beginning of a run one has to count. Pairs come in random order: of a list of which nine in ten
# are unusable, all of them are so once in a thousand runs. Of small lists it is half, but at least so few.
FIRST_PAIRS, FEW_PAIRS = 64, 16


def main(args: argparse.Namespace) -> None:
    from functools import partial

    import torch

    from autoregressive.train.flops import training_flops_per_image
    from autoregressive.train.loss import TokenLoss, dropped_conditions, mean_over, require_readable, share_of_valid
    from dataset.build import TEXT, TEXT_CODES, build_dataset
    from dataset.t2i import collate_t2i, require_same_encoder
    from language.features import left_padded, prefix_mask
    from utils.distributed import start
    from utils.logger import console_logger
    from utils.origin import origin, require_same
    from utils.rng import item_seed
    from utils.training.optim import adamw
    from utils.training.parallel import Parallel
    from utils.training.trainer import Micro, Phase, Trainer

    grid = grid_size(args.image_size, args.downsample_size)
    layout_numbers(args)  # refuses two that do not go together
    if args.gpt_type != "t2i":
        raise ValueError("train_t2i.py trains text-conditional models; for classes there is train_c2i.py")
    if args.dataset not in (TEXT, TEXT_CODES):
        raise ValueError(f"train_t2i.py reads --dataset {TEXT} or {TEXT_CODES}, got {args.dataset!r}")
    on_the_fly = args.dataset == TEXT
    if on_the_fly and args.code_path:
        raise ValueError(
            f"--code-path is read with --dataset {TEXT_CODES}; with {TEXT} images are encoded while training"
        )
    if on_the_fly and not args.vq_ckpt:
        raise ValueError(
            f"--dataset {TEXT} encodes images while training: give --vq-ckpt, or --dataset {TEXT_CODES} with --code-path"
        )
    if args.val_data_path and not (args.val_t5_feat_path and (on_the_fly or args.val_code_path)):
        missing = "--val-t5-feat-path" if not args.val_t5_feat_path else "--val-code-path"
        raise ValueError(f"--val-data-path {args.val_data_path} needs {missing} too")
    dist = start(args.device, args.data_parallel != "ddp", args.timeout_minutes, args.deterministic)
    plan = Parallel.from_args(args, dist, compile=not args.no_compile)
    console_logger("dataset", dist.is_main)
    with dist.main_first():  # which indexes shards where they have no index yet
        dataset = build_dataset(args, random_crop=args.random_crop)
        held_out = build_dataset(held_out_flags(args)) if args.val_data_path else None

    codes = dataset.codes
    fingerprint = codes.tokenizer if codes else None
    tokenizer = None
    if args.vq_ckpt:
        tokenizer = agreed_tokenizer(args, dist, on_the_fly or plan.sharded, fingerprint)
    if on_the_fly:
        fingerprint = tokenizer.fingerprint()
    size = tokenizer.codebook_size if on_the_fly else codes.vocab_size
    args.num_classes, args.vocab_size = model_sizes(args, {"codebook_size": size})
    if held_out is not None:
        require_same_encoder(dataset.features, held_out.features)
    if held_out is not None and held_out.codes:
        names = (f"--code-path {args.code_path}", f"--val-code-path {args.val_code_path}")
        require_same(
            {"tokenizer": fingerprint}, vars(held_out.codes), ("tokenizer",), names, "extract one of them again"
        )
    model = new_model(args, grid, args.drop_path or args.drop_path_rate, caption_dim=args.t5_feature_dim)
    wrapped = lay_out(model, plan, args.global_seed)
    config = origin(tokenizer=fingerprint, text_encoder=dataset.features.encoder, codes=dataset.identity())
    config |= model.args.identity
    initial, note = starting_point(args, dist, model, config)
    tokens, drop_probability = args.cls_token_num, model.args.class_dropout_prob
    collate = partial(collate_t2i, tokens=tokens, pad=left_padded)

    def as_codes(targets: torch.Tensor) -> torch.Tensor:
        return (
            encode(tokenizer, targets, args.mixed_precision if args.half_tokenizer else "none")
            if on_the_fly
            else targets
        )

    first = FirstPairs(dataset, args, dist)

    def prepare(micros: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Images become codes, and each part of the batch gets its weight in the mean over all valid samples."""
        counts = torch.stack([valid.sum() for *_, valid in micros])
        first.require_one(counts)
        shares = share_of_valid(counts, dist)
        return [[as_codes(targets), *rest, share] for (targets, *rest), share in zip(micros, shares, strict=True)]

    def loss(batch: list[torch.Tensor], place: Micro) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        codes, features, lengths, valid, share = batch
        seed = item_seed(args.global_seed, place.step)
        drop = dropped_conditions(seed, place.global_batch, place.positions, drop_probability, codes.device)
        value = wrapped(codes, features, drop=drop, prefix_mask=prefix_mask(lengths, tokens), valid=valid) * share
        return value, {"loss": value, "valid": valid.float().mean()}

    validate = None
    if held_out is not None:
        require_readable(held_out, dist)
        at_once = args.global_batch_size // (dist.world_size * args.gradient_accumulation_steps)

        def validate(evaluated: torch.nn.Module) -> dict[str, float]:
            token_loss = TokenLoss(evaluated)

            def loss_of(items: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
                targets, features, lengths, valid = (part.to(dist.device) for part in collate(items))
                mask = prefix_mask(lengths, tokens)
                return token_loss(as_codes(targets), features, prefix_mask=mask, valid=valid), valid.sum()

            return {"val_loss": mean_over(loss_of, held_out, max(at_once, 1), dist)}

    sample = None
    if args.vq_ckpt:
        shown = dist.broadcast(first_captions(held_out or dataset) if dist.is_main else None)
        if shown:
            features, lengths = left_padded(shown, tokens)
            sample = sample_grid(tokenizer, args, dist, grid, features, prefix_mask(lengths, tokens))

    trainer = Trainer(
        args,
        dist,
        run_name=args.gpt_model,
        models={"model": model},
        phases=[Phase("optimizer", wrapped, adamw(model, args), loss)],
        dataset=dataset,
        plan=plan,
        initial=initial,
        validate=validate,
        sample=sample,
        tokens=grid**2,
        flops=lambda epoch: training_flops_per_image(model.args, model.layout),
        collate=collate,
        prepare=prepare,
        config=config,
    )
    if note:
        trainer.log.info(note)
    trainer.fit()
    dist.close()


class FirstPairs:
    """Refuses a run none of whose first pairs counts: FIRST_PAIRS of them over all processes, or half a pass of a small set."""

    def __init__(self, dataset: "TextImages", args: argparse.Namespace, dist: "Distributed"):
        self.dataset, self.dist, self.batch = dataset, dist, args.global_batch_size
        whole = len(dataset) // self.batch * self.batch  # of the first pass
        self.enough = min(FIRST_PAIRS, max(whole // 2, min(whole, FEW_PAIRS)), (args.max_steps or whole) * self.batch)
        self.looked_at: int | None = 0

    def require_one(self, counts: "Tensor") -> None:
        """counts: int64 (M,), this process's pairs of a step that count. All raise the same AgreedError, or none does."""
        from dataset.t2i import none_usable
        from utils.errors import AgreedError

        if self.looked_at is None:
            return
        if int(self.dist.sum(counts.sum())):
            self.looked_at = None
            return
        self.looked_at += self.batch
        if self.looked_at >= self.enough:
            examples = self.dist.broadcast(self.dataset.examples() if self.dist.is_main else None)
            raise AgreedError(none_usable(f"none of the first {self.looked_at} pairs could be used", examples))


def encode(tokenizer: "Tokenizer", pixels: "Tensor", mixed_precision: str = "none") -> "Tensor":
    """The codes of a batch of images: (B, 3, H, W) in [-1, 1] -> int64 (B, N), raster order, without gradients."""
    from autoregressive.train.extract_codes_c2i import encode_views

    # A copy, since what inference mode made cannot be kept for a backward pass.
    return encode_views(tokenizer, pixels[:, None], mixed_precision)[:, 0].clone()


def first_captions(data: "TextImages", count: int = SHOWN_CAPTIONS, tries: int = 64) -> "list[Tensor]":
    """The features (length, dim) of the first few pairs that have some, to draw pictures of."""
    shown = []
    for index in range(min(tries, len(data))):
        features = data.features.get(*data.pairs.identity(index))
        if features is not None and len(shown) < count:
            shown.append(features)
    return shown


def held_out_flags(args: argparse.Namespace) -> argparse.Namespace:
    """The flags as they are for held-out pairs, which are read as they are: no random crops, no short captions."""
    index_path = f"{args.index_path}/held_out" if args.index_path else None
    paths = {"data_path": args.val_data_path, "t5_feat_path": args.val_t5_feat_path, "code_path": args.val_code_path}
    return argparse.Namespace(**{**vars(args), **paths, "short_t5_feat_path": None, "index_path": index_path})


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    added = "--data-parallel --drop-path-rate --ema --grad-precision --no-wandb --t5-feature-dim --wandb-project"
    parser = flag_parser(__doc__, added.split())
    parser.add_argument("--data-path", required=True, help="folder of *.jsonl lists, or of WebDataset *.tar shards")
    parser.add_argument(
        "--t5-feat-path", required=True, help="folder of caption features, packed or in the published layout"
    )
    parser.add_argument(
        "--short-t5-feat-path", default=None, help="features of shorter captions, taken with probability 0.3"
    )
    parser.add_argument("--dataset", default="t2i", help="t2i: images, encoded while training; t2i_code: their codes")
    parser.add_argument("--code-path", default=None, help="folder of codes, for --dataset t2i_code")
    parser.add_argument(
        "--index-path", default=None, help="where the index of WebDataset shards goes (default: beside them)"
    )
    parser.add_argument("--val-data-path", default=None, help="held-out pairs: their loss is reported too")
    parser.add_argument("--val-t5-feat-path", default=None, help="features of the held-out pairs' captions")
    parser.add_argument("--val-code-path", default=None, help="their codes, for --dataset t2i_code")
    add_switch(parser, "--random-crop", False, "a random crop of each image in the place of the centred one")
    parser.add_argument(
        "--gpt-ckpt",
        default=None,
        help="start from this file or run: weights, and where it has them and the image size is the same optimizer and step",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="do not torch.compile each block (it is only on CUDA)"
    )
    parser.add_argument(
        "--sample-cfg-scale", type=CFG_SCALE, default=7.5, help="guidance scale of pictures while it trains"
    )
    add_tokenizer_flags(parser, VQ_SIZES)
    add_switch(
        parser,
        "--half-tokenizer",
        False,
        "encode images in --mixed-precision: faster, but some codes differ from those of float32",
    )
    add_finetune_flags(parser, classes=False)
    add_gpt_flags(parser, GPT_SIZES, training=True, gpt_type="t2i")
    parser.add_argument("--drop-path", type=PROBABILITY, default=0.0, help="the same as --drop-path-rate")
    parser.add_argument(
        "--t5-feature-dim", type=positive_int, default=2048, help="numbers a caption token's feature has"
    )
    add_image_size_flags(parser, 384)
    add_reading_flags(parser)
    add_training_flags(parser, epochs=300, batch=256, results_dir="results", num_workers=24)
    add_parallel_flags(parser, "ddp")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
