"""Image-text pairs as training items: an image or its codes, the features of its caption, and whether the item counts.

    pairs = open_pairs("laion_coco")                                  # a folder of *.jsonl, or of WebDataset *.tar
    data = TextImages(pairs, Features("t5_features"), image_size=256, seed=0)
    data[0]      # {"image": (3, 256, 256) in [-1, 1], "caption": (length, 2048), "valid": bool}
    loader = DataLoader(data, collate_fn=partial(collate, rows={"caption": 120}))

A pair is known by (file stem, line or sample number): its features and codes lie under that name. What makes a pair
unusable (an image that cannot be read or is smaller than the target, no features) makes an item that has the shape of
any other and counts for nothing in the loss: over internet-scale lists some are, and dropping them would change the order.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.arrays import PairArrays
from dataset.augmentation import center_view, random_view
from dataset.code_files import TEXT_EXTRACTION, ShardFolder
from dataset.images import Unusable
from dataset.lines import CaptionLines, ImageLines, compare_folder, digest_all, recorded_digest, recorded_maker
from dataset.pixels import DEFAULT, Reading
from dataset.sources import PairItems, Pairs
from dataset.store import INDEX_FILE, Loose, Stems
from dataset.text_features import Features
from utils.origin import require_same, same_tokenizer
from utils.rng import item_seed

SHORT_CAPTIONS = 0.3  # how often the feature of --short-t5-feat-path is taken
_SHORT_DRAW = 1  # told apart from the draws of the crop


def require_same_encoder(features: Features, others: Features) -> None:
    """Raise ValueError where two folders record that different text encoders made them."""
    if None not in (features.encoder, others.encoder) and features.encoder != others.encoder:
        both = f"{features.folder} and {others.folder} were made by different text encoders"
        raise ValueError(f"{both} ({features.encoder} and {others.encoder}): extract one of them again")


class TextCodes(Stems):
    """Codes of pairs by (file stem, line): a folder per stem, of packed shards or of one file a pair (1, tokens).

    Args:
        stems: whose codes are looked for.
        tokens: codes a pair.
        vocab_size: codes that the model has (default: as many as the codes record, or 16384).

    `tokenizer` is the fingerprint of the tokenizer that made them, None where they do not say.
    Raises FileNotFoundError where the folder is missing, ValueError where it has codes of none of the stems, where packed
    ones are incomplete, and where codes have not `tokens` tokens, may lie beyond `vocab_size`, or are of several tokenizers.
    """

    def __init__(self, folder: str | Path, stems: Sequence[str], tokens: int, vocab_size: int | None = None):
        self.tokens, folder = tokens, Path(folder)
        if not folder.is_dir():
            hint = f"check --code-path, or extract codes with {TEXT_EXTRACTION}"
            raise FileNotFoundError(f"the code folder {folder} does not exist: {hint}")
        there = {stem: folder / stem for stem in stems if (folder / stem).is_dir()}
        if not there:
            inside = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            looked = f"a folder {stems[0]}/ is looked for (and {len(stems) - 1} more); in it: {inside}"
            raise ValueError(f"{folder} holds no codes of these pairs: {looked}")
        loose = partial(Loose, kind="integers", shape=(tokens,))
        stores = {
            stem: (ShardFolder if (place / INDEX_FILE).exists() else loose)(place) for stem, place in there.items()
        }
        super().__init__(folder, stores)
        packed = [one for one in stores.values() if isinstance(one, ShardFolder)]
        self.vocab_size = vocab_size or max((one.settings.codebook_size for one in packed), default=16384)
        for one in packed:
            if one.tokens != tokens:
                there = f"--image-size {one.settings.image_size} and have {one.tokens} tokens an image"
                raise ValueError(f"codes in {one.folder} are of {there}; {tokens} are needed")
            if (size := one.settings.codebook_size) > self.vocab_size:
                raise ValueError(f"{one.folder} was made with {size} codes; pass --vocab-size {size}")
            names = str(packed[0].folder), str(one.folder)
            recorded = vars(packed[0].settings), vars(one.settings)
            require_same(*recorded, ("tokenizer", "codebook_size"), names, "extract one of them again")
        self.tokenizer = max((one.settings.tokenizer or "" for one in packed), key=len, default="") or None
        maker = recorded_maker(folder, there)
        if not same_tokenizer(self.tokenizer, maker):
            both = f"packed codes of the tokenizer {self.tokenizer} and others of {maker}"
            raise ValueError(f"{folder} has {both}: extract one of them again")
        self.tokenizer = maker or self.tokenizer

    def get(self, stem: str, line: int) -> Tensor | None:
        """Return the codes int64 (tokens,) of a pair in raster order; None where there are none.

        Raises ValueError for codes that the model has no row for.
        """
        codes = super().get(stem, line)
        if codes is None:
            return None
        if not 0 <= codes.min() <= codes.max() < self.vocab_size:
            found = f"{self.folder / stem} has codes to {codes.max()} in line {line}"
            raise ValueError(f"{found}, not below --vocab-size {self.vocab_size}")
        return torch.from_numpy(codes.reshape(-1).astype(np.int64))


class TextImages(PairItems):
    """Items {"image": (3, H, W) in [-1, 1], or "codes": int64 (tokens,); "caption": (length, dim); "valid": bool} of pairs.

    Captions speak of left and right, so nothing is mirrored. Every draw is a function of (seed, epoch, index).

    Args:
        pairs: the pairs.
        features: of every pair's caption.
        image_size: pixels a side of the crops that items have, centred unless random_crop.
        codes: given in the place of image_size, items have these.
        short_features: of shorter captions, which are taken with probability 0.3 where there are any.
        arrays: by name what else items have.

    Raises:
        ValueError: where features or codes were made of other lines, and where a process reads 256 different pairs in a row
            (or all) that cannot be used.
    """

    def __init__(
        self,
        pairs: Pairs,
        features: Features,
        *,
        image_size: int | None = None,
        codes: TextCodes | None = None,
        short_features: Features | None = None,
        arrays: Mapping[str, PairArrays] | None = None,
        seed: int = 0,
        random_crop: bool = False,
        reading: Reading = DEFAULT,
    ):
        if (image_size is None) == (codes is None):
            raise ValueError("items are crops of image_size pixels or codes: give one of the two")
        super().__init__(pairs, image_size, seed, reading)
        self.random_crop = random_crop
        self.features, self.short_features, self.codes, self.arrays = features, short_features, codes, arrays or {}
        self._in_a_row: set[int] = set()  # of this process; a pair met twice counts once
        if short_features is not None:
            require_same_encoder(features, short_features)
        for store in filter(None, (features, short_features)):
            compare_folder(store.folder, CaptionLines(pairs), store.lines)
        for store in filter(None, (codes, *self.arrays.values())):
            compare_folder(store.folder, ImageLines(pairs), store.lines)
        if self.arrays and random_crop:
            raise ValueError(f"--random-crop draws crops that {', '.join(self.arrays)} is not of: leave it out")

    def identity(self) -> list[dict[str, str]]:
        """Return digests that tell whether pairs, captions and codes are still the same; those that both sides have are compared."""
        files = self.pairs.files
        stores = {"captions": self.features, "short captions": self.short_features, "images": self.codes}
        found = {
            name: recorded_digest(store.folder, dict(files)) for name, store in stores.items() if store is not None
        }
        if self.codes is None:
            found["lists"] = digest_all(self.pairs.list_digest(k) for k in range(len(files)))
        found["files"] = digest_all(f"{count} {stem}" for stem, count in files)
        kept = {name: value for name, value in found.items() if value is not None}
        return [kept, *(one.identity() for one in self.arrays.values())]

    def rows(self, tokens: int) -> dict[str, int]:
        """Return the rows that `collate` gives a batch: of captions `tokens`, of arrays as many as the longest has."""
        return {"caption": tokens} | {name: one.rows for name, one in self.arrays.items() if one.rows is not None}

    def sample_numbers(self, indices: Sequence[int]) -> list[str]:
        """Return the names of these samples, "stem:line"."""
        return [":".join(map(str, self.pairs.identity(index))) for index in indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        try:
            item = self.read(index) | {"valid": True}
            self._in_a_row.clear()
            return item
        except Unusable as error:
            self.skip(index, error)
            self._in_a_row.add(index)
        if len(self._in_a_row) >= self.in_a_row:
            raise ValueError(self.none_usable(indices=sorted(self._in_a_row)))
        nothing = {name: one.nothing() for name, one in self.arrays.items()}
        if self.codes is None:
            nothing["image"] = torch.zeros(3, self.image_size, self.image_size)
        else:
            nothing["codes"] = torch.zeros(self.codes.tokens, dtype=torch.int64)
        return nothing | {"caption": torch.zeros(0, self.features.dim), "valid": False}

    def read(self, index: int) -> dict[str, Any]:
        """Return what there is of a pair. Raises Unusable."""
        identity = self.pairs.identity(index)
        item = {"caption": self._caption(index, *identity)}
        stores = self.arrays if self.codes is None else {"codes": self.codes, **self.arrays}
        item |= {name: store.get(*identity) for name, store in stores.items()}
        for name, value in item.items():
            if value is None:
                raise Unusable(f"no {'caption features' if name == 'caption' else name}")
        if self.codes is None:
            crop = partial(random_view, flip=False) if self.random_crop else center_view
            crop = partial(crop, image_size=self.image_size)
            item["image"] = self.pixels(lambda: self.pairs.image_file(index), index, crop, self.image_size)
        return item

    def _caption(self, index: int, stem: str, line: int) -> Tensor | None:
        found = None
        if self.short_features is not None:
            draw = item_seed(self.seed, self.epoch, index, _SHORT_DRAW) / 2**63
            found = self.short_features.get(stem, line) if draw < SHORT_CAPTIONS else None
        return self.features.get(stem, line) if found is None else found
