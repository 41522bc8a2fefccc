"""Starting point of a GPT's training: a state to resume, or with --finetune weights for other data."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from autoregressive.models.trunk import Trunk
from autoregressive.released import SECOND_EXIT, check_flags, find_identity, flags_of
from autoregressive.systems import class_table, with_class_table
from autoregressive.train.control import whole, with_control
from utils.checkpoint import Checkpoint, read_checkpoint
from utils.cli import layout_numbers
from utils.distributed import Distributed
from utils.origin import same_tokenizer
from utils.runs import find_checkpoint, runs_in
from utils.training.shards import ShardedCheckpoint
from utils.training.state import TrainingState

TARGET_PLACES = "target_embeddings.weight"  # of a llama that is trained in random orders


def starting_point(
    args: argparse.Namespace, dist: Distributed, model: Trunk, config: dict[str, Any]
) -> tuple[Checkpoint | ShardedCheckpoint | None, str | None]:
    """Return what --gpt-ckpt holds for a new run, and a line for the log where it is fine-tuned.

    Without --finetune that is all of a training state; of the reference of CCA and of a text-conditional run of another
    --image-size the weights alone, since these begin at their own first step. A run that --resume continues needs nothing: None.
    config: what the weights of this run belong to. Every process calls it together.
    Raises ValueError where the file is of no GPT or of another than the flags describe.
    """
    name = getattr(args, "gpt_resume", None) or args.gpt_ckpt
    if args.gpt_ckpt not in (None, name):
        raise ValueError(f"--gpt-resume {name} and --gpt-ckpt {args.gpt_ckpt} mean the same: give one of them")
    reference = getattr(args, "cca_reference", None)
    for flag in ("finetune", "use_ema", "class_rows"):
        if getattr(args, flag, None) and not (name and args.finetune) and not (flag == "use_ema" and reference):
            raise ValueError(f"--{flag.replace('_', '-')} needs --{'finetune' if name else 'gpt-ckpt'} too")
    resumed = runs_in(args.results_dir, args.gpt_model)[:1] if args.resume else []
    if resumed and resumed[0].checkpoints():
        return None, None
    if not name:
        begun, notes = with_control(args, None, model)
        return begun and replace(begun, config=config), "; ".join(notes) or None
    path = find_checkpoint(name)
    if not args.finetune:
        saved = TrainingState.read(path, dist, whole=False)
        if "lora" in saved.config:
            raise ValueError(
                f"{path} is an adapter (--lora-rank): --resume continues its run, --finetune begins with the merged weights"
            )
        if "control" in model.conditions and "control" not in _identity(saved).get("conditions", {}):
            raise ValueError(f"{path} has no control images: give --finetune too, to begin with its weights")
        if before := _other_layout(saved, model):
            other = (
                f"; {SECOND_EXIT}"
                if before == "neighbours"
                else ", or --finetune to train its weights by another order"
            )
            raise ValueError(
                f"{path} is of the layout {before}, and this run of {model.layout.name}: give --layout {before}{other}"
            )
        if name == reference:
            return _weights_alone(read_checkpoint(path, prefer_ema=args.use_ema)), None
        if args.gpt_type == "c2i" or (saved.args or {}).get("image_size", args.image_size) == args.image_size:
            return saved, None
    weights = read_checkpoint(path)
    find_identity(weights)  # refuses what is no GPT
    if not args.finetune:
        weights, notes = _with_target_places(weights, model)
        return _weights_alone(weights), "; ".join(notes) or None
    if args.use_ema and weights.ema is None:
        raise ValueError(f"{path} has no averaged weights: leave out --use-ema")
    weights = replace(weights, model=weights.ema if args.use_ema else weights.model, ema=None)
    _require_shape(args, weights, path)
    note = [f"fine-tuning {path}{' (averaged weights)' if args.use_ema else ''} from step 0"]
    if before := _other_layout(weights, model):
        if before == "neighbours":
            raise ValueError(f"{path} is of the layout {before}, and this run of {model.layout.name}: {SECOND_EXIT}")
        note.append(f"its layout was {before}, now {model.layout.name}")
        if model.layout.heads > 1:
            begun = {name: model.of_second_exit(name) for name in model.state_dict()}
            weights.model = {**weights.model, **{name: weights.model[first] for name, first in begun.items() if first}}
            note.append("the second exit begins as a copy of the first")
    weights.model, before = model.resized(weights.model), weights.model
    if weights.model is not before:
        note.append("its table of places is resized for this image size")
    for complete in (_with_target_places, partial(with_control, args)):
        weights, notes = complete(weights, model)
        note += notes
    if args.gpt_type == "c2i":
        names = weights.config.get("classes"), config.get("classes")
        table, rows = _class_rows(args.class_rows or "name", class_table(weights.model), model, *names, path)
        weights.model = with_class_table(weights.model, table)
        note.append(rows)
    for key in ("tokenizer", "text_encoder"):
        before, now = weights.config.get(key), config.get(key)
        if before and now and not same_tokenizer(before, now):
            word = key.replace("_", " ")
            note.append(f"its {word} was another one ({before}, now {now}), whose codes it has to unlearn")
    return replace(_weights_alone(weights), config=config), "; ".join(note)


def _identity(saved: Checkpoint | ShardedCheckpoint) -> dict[str, Any]:
    return find_identity(saved) if isinstance(saved, Checkpoint) else saved.config


def _other_layout(saved: Checkpoint | ShardedCheckpoint, model: Trunk) -> str | None:
    """Return the name of a file's layout, where it is another one than the model's."""
    name = _identity(saved).get("layout", {}).get("name", model.layout.name)
    return None if name == model.layout.name else name


def _with_target_places(weights: Checkpoint, model: Trunk) -> tuple[Checkpoint, list[str]]:
    """Give weights the places of targets that the model has, and no others. Returns them and lines about it.

    Every process calls it together.
    """
    saved, own = weights.model.get(TARGET_PLACES), dict(model.named_parameters()).get(TARGET_PLACES)
    if (own is None and saved is None) or (own is not None and saved is not None and own.shape == saved.shape):
        return weights, []
    others = {name: tensor for name, tensor in weights.model.items() if name != TARGET_PLACES}
    if own is None:
        note = "its places of targets are left out, since all samples are read in the layout's order"
        return replace(weights, model=others), [note]
    return replace(weights, model={**others, TARGET_PLACES: whole(own)}), ["the places of targets begin anew"]


def _weights_alone(saved: Checkpoint) -> Checkpoint:
    return replace(saved, optimizer=None, steps=None, extra={})


def _require_shape(args: argparse.Namespace, weights: Checkpoint, path: Any) -> None:
    """Raise ValueError where the weights differ from the flags in more than classes and image size."""
    identity = find_identity(weights)
    ar_token_num, spe_token_num = layout_numbers(args)
    flags = {name: getattr(args, name) for name in ("gpt_model", "gpt_type", "vocab_size", "cls_token_num")}
    recorded = replace(weights, args=None)  # the image size may be another one
    check_flags(identity, recorded, **flags, spe_token_num=spe_token_num or 0, ar_token_num=ar_token_num or 1)
    caption_dim = flags_of(identity)["caption_dim"]
    if caption_dim not in (None, width := getattr(args, "t5_feature_dim", None)):
        raise ValueError(
            f"{path} reads text features of width {caption_dim}, not --t5-feature-dim {width}: "
            "extract the features with the T5 it was trained with"
        )


def _class_rows(
    rows: str, saved: Tensor, model: Trunk, before: Sequence[str] | None, now: Sequence[str] | None, path: Any
) -> tuple[Tensor, str]:
    """Return the class table that a run begins with, float32 (classes + 1, dim), and a line about it.

    rows: --class-rows. saved: the file's table. before, now: names of the file's classes and of this run's. The last row,
    of "no class", stays the last.
    """
    table = class_table({name: whole(tensor) for name, tensor in model.named_parameters()})
    classes = len(table) - 1
    if rows == "name":
        if not (before and now):
            where = f"{path} records no names of its classes" if not before else "the codes record no names of classes"
            raise ValueError(
                f"{where}, so rows cannot be found by name: give --class-rows number (class i begins with row i) or "
                "--class-rows new"
            )
        numbers = {name: number for number, name in enumerate(before)}
        sources = {label: numbers[name] for label, name in enumerate(now) if name in numbers}
    else:
        sources = {label: label for label in range(min(classes, len(saved) - 1))} if rows == "number" else {}
    for label, row in sources.items():
        table[label] = saved[row]
    table[classes] = saved[-1]
    return table, f"{len(sources)} of {classes} classes begin with a row of its {len(saved) - 1}, the others anew"
