"""Trains a class-conditional GPT on image codes: raster, parallel layout, or next-patch prediction.

    torchrun --nproc_per_node=8 autoregressive/train/train_c2i.py --code-path codes --gpt-model GPT-B --image-size 256
    python3 autoregressive/train/train_c2i.py --code-path codes --resume          # one process, going on where it stopped

Codes come from extract_codes_c2i.py. Recipe: LlamaGen (arXiv 2406.06525, section 3.1); parallel layout: PAR
(2412.15119); patches: NPP (2412.15321). train_c2i_fsdp.py is this script with the defaults of sharded training.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoregressive.models.sizes import GPT_SIZES
from autoregressive.train.start import add_finetune_flags, starting_point
from utils.cli import (
    CFG_SCALE,
    PORTION,
    SHARE,
    add_gpt_flags,
    add_image_size_flags,
    add_parallel_flags,
    add_switch,
    add_training_flags,
    flag_parser,
    grid_size,
    layout_numbers,
    nonnegative_float,
    nonnegative_int,
    positive_int,
    run_script,
    tokenizer_beliefs,
)

if TYPE_CHECKING:
    from logging import Logger

    import numpy as np
    import torch

    from autoregressive.models.gpt import Transformer
    from autoregressive.models.layouts import Layout
    from autoregressive.train.next_patch import PatchSchedule
    from dataset.codes import CodeDataset, CodeSettings
    from tokenizer.base import Tokenizer
    from utils.distributed import Distributed
    from utils.training.parallel import Parallel


def main(args: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch

    from autoregressive.models.layouts.patches import with_patches
    from autoregressive.train.flops import training_flops_per_image
    from autoregressive.train.loss import dropped_conditions, mean_loss, require_readable
    from autoregressive.train.next_patch import PatchSchedule
    from dataset.build import build_dataset
    from dataset.codes import open_codes
    from utils.distributed import start
    from utils.logger import console_logger
    from utils.rng import item_seed
    from utils.training.optim import adamw
    from utils.training.parallel import Parallel
    from utils.training.trainer import Micro, Phase, Trainer

    grid = grid_size(args.image_size, args.downsample_size)
    layout_numbers(args)  # refuses two that do not go together
    if args.gpt_type != "c2i":
        raise ValueError("train_c2i.py trains class-conditional models; for captions there is train_t2i.py")
    patches = PatchSchedule(
        epochs=args.epochs,
        patch_level=args.patch_level,
        epoch_rate=args.epoch_rate,
        warmup_epochs=args.warmup_epochs,
        decay_ratio=args.decay_ratio,
        lr=args.lr,
        end_lr=args.end_lr,
    )
    patches.check_grid(grid)
    if args.scheduler and (args.lr_schedule != "constant" or args.warmup_steps):
        raise ValueError(
            "--scheduler is a learning-rate schedule of its own: leave out --lr-schedule and --warmup-steps"
        )
    dist = start(args.device, args.data_parallel != "ddp", args.timeout_minutes, args.deterministic)
    plan = Parallel.from_args(args, dist, compile=not args.no_compile)
    log = console_logger("dataset", dist.is_main)
    codes = build_dataset(args)
    args.num_classes, args.vocab_size = model_sizes(args, codes.sizes())
    dataset = CheckedCodes(codes, args.code_path, args.num_classes, args.vocab_size)
    log_classes(log, args, codes)
    per_epoch = max(len(dataset) // args.global_batch_size, 1)
    ends_early = args.max_steps is not None and args.max_steps < args.epochs * per_epoch
    if ends_early:
        patches = replace(patches, max_steps=args.max_steps, steps_per_epoch=per_epoch)
    if args.scheduler:
        patches.check_scheduler()

    model = new_model(args, grid, args.drop_path_rate)
    sides = {stage.patch_side for stage in patches.stages}
    layouts = {side: with_patches(model.layout, side) for side in sides}
    wrapped = lay_out(model, plan, args.global_seed)
    config = code_origin(codes) | model.args.identity
    initial, note = starting_point(args, dist, model, config)
    drop_probability = model.args.class_dropout_prob

    def patch_side(step: int, epoch: int) -> int:
        return patches.patch_side(step / per_epoch if ends_early else epoch)

    def loss(batch: list[torch.Tensor], place: Micro) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        codes, labels = batch
        seed = item_seed(args.global_seed, place.step)
        drop = dropped_conditions(seed, place.global_batch, place.positions, drop_probability, codes.device)
        value = wrapped(codes, labels, drop=drop, patch_side=patch_side(place.step, place.epoch))
        return value, {"loss": value}

    validate = None
    if args.val_code_path:
        val_codes = open_codes(args.val_code_path, args.image_size, args.downsample_size, random_view=False)
        require_same_kind(args, codes.settings, val_codes.settings, log)
        held_out = CheckedCodes(val_codes, args.val_code_path, args.num_classes, args.vocab_size)
        require_readable(held_out, dist)
        at_once = args.global_batch_size // (dist.world_size * args.gradient_accumulation_steps)

        def validate(evaluated: torch.nn.Module) -> dict[str, float]:
            return {"val_loss": mean_loss(evaluated, held_out, max(at_once, 1), dist)}

    sample = None
    if args.vq_ckpt:
        tokenizer = agreed_tokenizer(args, dist, plan.sharded, codes.settings and codes.settings.tokenizer)
        labels = torch.arange(8, device=dist.device) * args.num_classes // 8
        sample = sample_grid(tokenizer, args, dist, grid, labels)

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
        rate=patches.learning_rate if args.scheduler else None,
        tokens=grid**2,
        flops=lambda epoch: training_flops_per_image(model.args, layouts[patch_side(trainer.step - 1, epoch)]),
        config=config,
    )
    if note:
        trainer.log.info(note)
    trainer.log.info(order_in_words(patches, model.layout))
    for side in patches.skipped_sides:
        trainer.log.warning(
            f"patches of {side}x{side} tokens get no part of the training: --patch-level {args.patch_level} skips them"
        )
    trainer.fit()
    dist.close()


def order_in_words(patches: "PatchSchedule", layout: "Layout") -> str:
    """Return what is predicted together and when, beside what PAR's and NPP's own scripts do without a flag."""
    if not layout.is_raster:
        return f"layout {layout.config['name']}: {max(layout.groups)} tokens a step at most, {len(layout.groups)} steps"
    if patches.patch_level > 1:
        return f"next-patch prediction: {patches.describe()}"
    return (
        "raster order, single tokens; PAR's own default is --ar-token-num 4 --image-size 384, NPP's own is --patch-level 2 "
        "(its train_c2i_fsdp.py: --patch-level 4 --epoch-rate 0.67)"
    )


def new_model(args: argparse.Namespace, grid: int, drop_path_rate: float, **more: object) -> "Transformer":
    """The model that the flags describe, on the meta device. more: further fields of ModelArgs.

    Raises ValueError where the first group of --ar-token-num, whose tokens are read one by one, is the whole image.
    """
    import torch

    from autoregressive.models.gpt import GPT_models

    ar_token_num, spe_token_num = layout_numbers(args)
    if args.layout and (ar_token_num or 1) > 1:
        raise ValueError(
            f"--layout {args.layout['name']} and --ar-token-num {ar_token_num} both say the order; give one"
        )
    if (ar_token_num or 1) == grid**2 > 1:
        raise ValueError(
            f"--ar-token-num {ar_token_num} is all of the {grid}x{grid} tokens: the first {ar_token_num} are predicted one by "
            "one, and none would be left to predict together; choose a smaller square, or 1 for raster"
        )
    dropout = 0.0 if drop_path_rate > 0 else args.dropout_p  # stochastic depth replaces them
    with torch.device("meta"):
        return GPT_models[args.gpt_model](
            vocab_size=args.vocab_size,
            block_size=grid**2,
            num_classes=args.num_classes,
            cls_token_num=args.cls_token_num,
            model_type=args.gpt_type,
            resid_dropout_p=dropout,
            ffn_dropout_p=dropout,
            token_dropout_p=args.token_dropout_p,
            drop_path_rate=drop_path_rate,
            spe_token_num=spe_token_num or 0,
            ar_token_num=ar_token_num or 1,
            layout=args.layout,
            extra_conditions=dict(map(split_name, args.condition)),
            **more,
        )


def split_name(named: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of what `named_settings` parsed."""
    return named["name"], {key: value for key, value in named.items() if key != "name"}


def lay_out(model: "Transformer", plan: "Parallel", seed: int) -> "torch.nn.Module":
    """The loss of a model from the meta device, laid over the processes, with initial weights."""
    from autoregressive.train.loss import TokenLoss
    from utils.training.parallel import materialize

    if not plan.sharded:
        materialize(model, plan.dist.device, seed)
    wrapped = plan.apply(TokenLoss(model), blocks=model.layers)
    if plan.sharded:  # only now, so that no process ever holds the whole model
        materialize(model, plan.dist.device, seed)
    return wrapped


def agreed_tokenizer(
    args: argparse.Namespace, dist: "Distributed", everywhere: bool = False, fingerprint: str | None = None
) -> "Tokenizer | None":
    """The tokenizer of --vq-ckpt on the first process, or `everywhere`; None on processes that need none.

    fingerprint: of the tokenizer that made the codes, where they record it.
    Raises AgreedError on all of them where one cannot read it, or it is of other codes than the model's.
    """
    from tokenizer.load import load_tokenizer
    from utils.errors import AgreedError
    from utils.runs import find_checkpoint

    with dist.main_first():
        path = find_checkpoint(args.vq_ckpt)
    tokenizer = failure = None
    if dist.is_main or everywhere:
        try:
            beliefs = tokenizer_beliefs(args)
            tokenizer = load_tokenizer(path, device=dist.device, fingerprint=fingerprint, **beliefs)
            codes, pixels = tokenizer.codebook_size, tokenizer.downsample
            if (codes, pixels) != (args.vocab_size or codes, args.downsample_size):
                raise ValueError(
                    f"--vq-ckpt {path} has {codes} codes of {pixels}x{pixels} pixels, not --vocab-size {args.vocab_size} "
                    f"--downsample-size {args.downsample_size}"
                )
        except ValueError as error:
            failure = error
    failure = dist.first_failure(failure)
    if failure:  # on every process: the others would wait for the first
        raise AgreedError(failure)
    return tokenizer


def sample_grid(
    tokenizer: "Tokenizer | None",
    args: argparse.Namespace,
    dist: "Distributed",
    grid: int,
    cond: "torch.Tensor",
    emb_masks: "torch.Tensor | None" = None,
) -> "Callable[[Transformer], dict]":
    """A function that draws these conditions with a model in training; it is called where the tokenizer is.

    cond, emb_masks: as `generate` takes them.
    """
    import torch

    from autoregressive.models.generate import generate, release_cache
    from autoregressive.models.sampling import SamplingConfig
    from utils.images import make_grid, to_uint8
    from utils.rng import image_noise

    SamplingConfig(cfg_scale=args.sample_cfg_scale)  # refuses a scale that no picture can be drawn with

    def sample(model: "Transformer") -> dict[str, "np.ndarray"]:
        noise = image_noise(args.global_seed, range(len(cond)), grid**2).to(dist.device)
        try:
            drawn = generate(model, cond, grid**2, emb_masks=emb_masks, cfg_scale=args.sample_cfg_scale, noise=noise)
        finally:
            release_cache(model)
        with torch.inference_mode():
            images = tokenizer.to_pixels(drawn.view(-1, grid, grid))
        return {"samples": make_grid(to_uint8(images), columns=4)}

    return sample


def model_sizes(args: argparse.Namespace, recorded: Mapping[str, Any]) -> tuple[int, int]:
    """Return the classes and the codes that the model has rows for.

    In this order: the flags; the run or file that training goes on from; what the codes record; the published numbers.
    With --finetune the classes are those of the codes.
    """
    before = sizes_before(args)
    classes = [before.get("num_classes"), recorded.get("num_classes")]
    if args.finetune:
        classes.reverse()
    return (
        args.num_classes or classes[0] or classes[1] or 1000,
        args.vocab_size or before.get("vocab_size") or recorded.get("codebook_size") or 16384,
    )


def sizes_before(args: argparse.Namespace) -> dict[str, int]:
    """Return num_classes and vocab_size of the run or the file that training goes on from; empty for a new run."""
    from autoregressive.released import find_identity, flags_of
    from utils.checkpoint import read_checkpoint
    from utils.runs import find_checkpoint, runs_in

    runs = runs_in(args.results_dir, args.gpt_model) if args.resume else []
    if runs:
        return runs[0].flags()
    path = getattr(args, "gpt_resume", None) or args.gpt_ckpt
    if not path:
        return {}
    return flags_of(find_identity(read_checkpoint(find_checkpoint(path))))


def log_classes(log: "Logger", args: argparse.Namespace, codes: "CodeDataset") -> None:
    """Writes down which label has which name, and where the model has more rows than the codes have classes."""
    from utils.origin import listed_classes

    names, known = codes.settings and codes.settings.classes, codes.sizes().get("num_classes")
    if names:
        log.info(f"classes: {listed_classes(names)}")
    if known != args.num_classes:
        log.info(f"the model has {args.num_classes} classes, and {args.code_path} {known or 'does not say how many'}")


def require_same_kind(
    args: argparse.Namespace,
    training: "CodeSettings | None",
    held_out: "CodeSettings | None",
    log: "Logger",
) -> None:
    """Raises ValueError where held-out codes are of another tokenizer or other classes than the codes of training."""
    from utils.origin import require_same

    keys = ("tokenizer", "classes", "num_classes")
    one, other = ({} if recorded is None else vars(recorded) for recorded in (training, held_out))
    unknown = require_same(
        one,
        other,
        keys,
        (f"--code-path {args.code_path}", f"--val-code-path {args.val_code_path}"),
        f"extract the held-out images by the same tokenizer, with --classes-of {args.code_path}",
    )
    if unknown:
        words = " and ".join(key.replace("_", " ") for key in unknown)
        log.info(f"{args.val_code_path} and {args.code_path}: one of them records no {words}: not compared")


def code_origin(codes: "CodeDataset") -> dict:
    """Return what the checkpoints of a run on these codes record (utils/origin.py)."""
    from utils.origin import origin

    recorded = codes.settings
    told = {"tokenizer": recorded.tokenizer, "classes": recorded.classes} if recorded else {}
    return origin(**told, codes=codes.identity())


class CheckedCodes:
    """A data set of codes that the model has rows for; ValueError where it records others, or where one turns up.

    The published layout records nothing, and a label too large by one would pass for "no class".
    """

    def __init__(self, data: "CodeDataset", path: str, num_classes: int, vocab_size: int):
        self.data, self.path, self.num_classes, self.vocab_size = data, path, num_classes, vocab_size
        settings = data.settings
        if settings and (settings.num_classes or 0) > num_classes:
            raise ValueError(
                f"{path} has {settings.num_classes} classes, more than {num_classes}; pass --num-classes "
                f"{settings.num_classes}, and --finetune too where training begins with the weights of another model"
            )
        if settings and settings.codebook_size > vocab_size:
            raise ValueError(
                f"{path} was made with {settings.codebook_size} codes; pass --vocab-size {settings.codebook_size}"
            )

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)

    def sample_numbers(self, indices: Sequence[int]) -> list[int]:
        """The numbers that extraction gave these samples: unreadable images count too."""
        return self.data.sources[0].numbers[list(indices)].tolist()

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


def flags(sharded: bool = False) -> argparse.ArgumentParser:
    """The script's flags. sharded: with the defaults of train_c2i_fsdp.py."""
    added = "--vq-ckpt" if sharded else "--data-parallel --grad-precision --no-wandb --vq-ckpt --wandb-project"
    parser = flag_parser(__doc__, added.split())
    parser.add_argument("--code-path", required=True, help="folder of codes, packed or in the published layout")
    parser.add_argument("--val-code-path", default=None, help="codes of held-out images: their loss is reported too")
    parser.add_argument("--dataset", default="imagenet_code", help="kind of data")
    start_help = "start from this file or run: weights, and where it has them optimizer and step"
    parser.add_argument("--gpt-ckpt", default=None, help=start_help)
    parser.add_argument("--gpt-resume", default=None, help=start_help + " (the same as --gpt-ckpt)")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not torch.compile each block (it is only on CUDA)"
    )
    parser.add_argument("--vq-ckpt", default=None, help="the codes' tokenizer: draws grids of samples with it")
    parser.add_argument("--sample-cfg-scale", type=CFG_SCALE, default=2.0, help="guidance scale of those samples")
    add_finetune_flags(parser, classes=True)
    add_gpt_flags(parser, GPT_SIZES, training=True)
    add_image_size_flags(parser, 256)
    add_training_flags(
        parser,
        epochs=300,
        batch=256,
        results_dir="results",
        num_workers=24,
        wandb_project="c2i_fsdp" if sharded else None,
    )
    add_parallel_flags(parser, "fsdp" if sharded else "ddp")
    group = parser.add_argument_group("next-patch prediction")
    group.add_argument(
        "--patch-level",
        type=positive_int,
        default=1,
        help="stages of coarser to finer patches, 1 for none (NPP's own: 2)",
    )
    group.add_argument(
        "--epoch-rate", type=PORTION, default=0.5, help="share of the epochs left at which a stage of patches ends"
    )
    add_switch(group, "--scheduler", False, "NPP's learning rate: warm-up, constant and decay in each stage")
    group.add_argument("--warmup-epochs", type=nonnegative_int, default=1, help="of each stage, with --scheduler")
    group.add_argument("--decay-ratio", type=SHARE, default=0.2, help="last part of each stage, with --scheduler")
    group.add_argument(
        "--end-lr", type=nonnegative_float, default=1e-5, help="where a stage's decay ends, with --scheduler"
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
