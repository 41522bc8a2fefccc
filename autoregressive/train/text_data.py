"""Data of text-conditional training: pairs of an image, or its codes, and features of its caption."""

import argparse
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.trunk import Conditions
from autoregressive.train.control import RandomSides, edges_of, resized
from autoregressive.train.extraction import encode_views
from autoregressive.train.loss import share_of_valid
from autoregressive.train.recipe import Inputs, agreed_tokenizer, further_conditions, model_sizes
from dataset.arrays import collate, left_padded, prefix_mask
from dataset.build import TEXT, TEXT_CODES, build_dataset
from dataset.t2i import TextImages, require_same_encoder
from utils.cli import given
from utils.distributed import Distributed
from utils.errors import AgreedError
from utils.logger import console_logger
from utils.origin import origin, require_same
from utils.training.order import fit_batch

SHOWN_CAPTIONS, CAPTION_TRIES = 8, 64
# Of so many pairs at the beginning of a run one has to count. Pairs come in random order: of a list of which nine in ten
# are unusable, all of them are so once in a thousand runs. Of small lists it is half, but at least so few.
FIRST_PAIRS, FEW_PAIRS = 64, 16


class TextData:
    """Pairs to train on and those held out; fills in --vocab-size, --t5-feature-dim and the batch where they are not given.

    With --dataset t2i the frozen tokenizer encodes each batch's images on the device.
    """

    def __init__(self, args: argparse.Namespace, dist: Distributed, resumed: dict[str, Any] | None = None):
        self.args, self.dist, self.tokens = args, dist, args.cls_token_num
        console_logger("dataset", dist.is_main)
        self.further = further_conditions(args)
        args.t5_feature_dim = given(args.t5_feature_dim)
        with dist.main_first():  # which indexes shards where they have no index yet
            self.train = build_dataset(args, random_crop=args.random_crop)
            args.t5_feature_dim = self.train.features.dim
            self.held_out = build_dataset(held_out_flags(args)) if args.val_data_path else None
        self.collate = partial(collate, rows=self.train.rows(self.tokens))
        self.notes = fit_batch(args, len(self.train), dist.world_size, resumed)
        self.first = FirstPairs(self.train, args, dist)
        codes, self.on_the_fly = self.train.codes, args.dataset == TEXT
        fingerprint = codes.tokenizer if codes else None
        self.tokenizer = None
        if args.vq_ckpt:
            everywhere = self.on_the_fly or args.data_parallel != "ddp"
            self.tokenizer = agreed_tokenizer(args, dist, everywhere, fingerprint)
        if self.on_the_fly:
            fingerprint = self.tokenizer.fingerprint()
        self.sides = RandomSides.from_args(args) if args.random_sides else None
        size = self.tokenizer.codebook_size if self.on_the_fly else codes.vocab_size
        args.num_classes, args.vocab_size = model_sizes(args, {"codebook_size": size})
        if self.held_out is not None:
            self._require_same_kind(fingerprint)
        self.config = origin(
            tokenizer=fingerprint, text_encoder=self.train.features.encoder, codes=self.train.identity()
        )

    def prepare(self, micros: list[dict[str, Tensor]], step: int) -> list[dict[str, Tensor]]:
        """Encode images, of the step's sides, and give each part of the batch its weight in the mean over all valid samples."""
        counts = torch.stack([micro["valid"].sum() for micro in micros])
        self.first.require_one(counts)
        shares, sides = share_of_valid(counts, self.dist), self.sides and self.sides(step)
        return [{**self._with_codes(micro, sides), "share": share} for micro, share in zip(micros, shares, strict=True)]

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """Return a batch on the device as the model takes it."""
        cond = {name: batch[name] for name in ("caption", *self.further)}
        mask = prefix_mask(batch["caption_length"], self.tokens)
        return Inputs(batch["codes"], cond, mask, batch["valid"], batch.get("share"))

    def held_out_inputs(self, items: list[dict]) -> Inputs:
        """Return items of `held_out` as the model takes them, on the device."""
        batch = {name: value.to(self.dist.device) for name, value in self.collate(items).items()}
        return self.inputs(self._with_codes(batch))

    def shown(self) -> tuple[Conditions, Tensor] | None:
        """Return the conditions of the first few pairs and the mask of captions; None without a tokenizer or features."""
        if not self.args.vq_ckpt:
            return None
        if self.further:
            data = self.held_out or self.train
            items = [item for i in range(min(CAPTION_TRIES, len(data))) if (item := data[i])["valid"]]
            inputs = self.held_out_inputs(items[:SHOWN_CAPTIONS]) if items else None
            return (inputs.cond, inputs.prefix_mask) if inputs else None
        shown = first_captions(self.held_out or self.train) if self.dist.is_main else None
        shown = self.dist.broadcast(shown)
        if not shown:
            return None
        features, lengths = left_padded(shown, self.tokens)
        return features, prefix_mask(lengths, self.tokens)

    def _with_codes(self, batch: dict[str, Tensor], sides: tuple[int, int] | None = None) -> dict[str, Tensor]:
        if not self.on_the_fly:
            return batch
        precision = self.args.mixed_precision if self.args.half_tokenizer else "none"
        if self.args.control_of_images:
            batch = {**batch, "control": edges_of(batch["image"])}
        if sides:
            batch = {**batch, **{name: resized(batch[name], sides) for name in ("image", "control")}}
        # A copy, since what inference mode made cannot be kept for a backward pass.
        return {**batch, "codes": encode_views(self.tokenizer, batch["image"][:, None], precision)[:, 0].clone()}

    def _require_same_kind(self, fingerprint: str | None) -> None:
        """Raise ValueError where held-out pairs are of another text encoder, or their codes of another tokenizer."""
        require_same_encoder(self.train.features, self.held_out.features)
        if self.held_out.codes:
            names = f"--code-path {self.args.code_path}", f"--val-code-path {self.args.val_code_path}"
            one, other = {"tokenizer": fingerprint}, vars(self.held_out.codes)
            require_same(one, other, ("tokenizer",), names, "extract one of them again")


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags of the data that do not go together."""
    if args.dataset not in (TEXT, TEXT_CODES):
        raise ValueError(f"train_t2i.py reads --dataset {TEXT} or {TEXT_CODES}, got {args.dataset!r}")
    if args.dataset == TEXT and args.code_path:
        raise ValueError(
            f"--code-path is read with --dataset {TEXT_CODES}; with {TEXT} images are encoded while training"
        )
    if args.dataset == TEXT and not args.vq_ckpt:
        raise ValueError(
            f"--dataset {TEXT} encodes images while training: give --vq-ckpt, or --dataset {TEXT_CODES} with --code-path"
        )
    if not args.val_data_path and (unread := args.val_t5_feat_path or args.val_code_path):
        flag = "--val-t5-feat-path" if args.val_t5_feat_path else "--val-code-path"
        raise ValueError(f"{flag} {unread} needs --val-data-path too")
    if args.val_data_path and not (args.val_t5_feat_path and (args.dataset == TEXT or args.val_code_path)):
        missing = "--val-t5-feat-path" if not args.val_t5_feat_path else "--val-code-path"
        raise ValueError(f"--val-data-path {args.val_data_path} needs {missing} too")


class FirstPairs:
    """Refuses a run none of whose first pairs counts: FIRST_PAIRS of them over all processes, or half a pass of a small set."""

    def __init__(self, dataset: TextImages, args: argparse.Namespace, dist: Distributed):
        self.dataset, self.dist, self.batch = dataset, dist, args.global_batch_size
        whole = len(dataset) // self.batch * self.batch  # of the first pass
        self.enough = min(FIRST_PAIRS, max(whole // 2, min(whole, FEW_PAIRS)), (args.max_steps or whole) * self.batch)
        self.looked_at: int | None = 0

    def require_one(self, counts: Tensor) -> None:
        """Raise the same AgreedError on every process, or none. counts: int64 (M,), this process's pairs that count."""
        if self.looked_at is None:
            return
        if int(self.dist.sum(counts.sum())):
            self.looked_at = None
            return
        self.looked_at += self.batch
        if self.looked_at >= self.enough:
            what = f"none of the first {self.looked_at} pairs could be used"
            raise AgreedError(self.dist.broadcast(self.dataset.none_usable(what) if self.dist.is_main else None))


def first_captions(data: TextImages) -> list[Tensor]:
    """Return the features (length, dim) of the first few pairs that have some, to draw pictures of."""
    each = (data.features.get(*data.pairs.identity(index)) for index in range(min(CAPTION_TRIES, len(data))))
    return list(islice((features for features in each if features is not None), SHOWN_CAPTIONS))


def held_out_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags as they are for held-out pairs, which are read as they are: no random crops, no short captions."""
    index_path = f"{args.index_path}/held_out" if args.index_path else None
    paths = {"data_path": args.val_data_path, "t5_feat_path": args.val_t5_feat_path, "code_path": args.val_code_path}
    paths["condition_path"] = args.val_condition_path
    return argparse.Namespace(**{**vars(args), **paths, "short_t5_feat_path": None, "index_path": index_path})
