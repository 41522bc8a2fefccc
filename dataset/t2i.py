"""Image-text pairs as training items: an image or its codes, the features of its caption, and whether the item counts.

    pairs = open_pairs("laion_coco")                                  # a folder of *.jsonl, or of WebDataset *.tar
    data = TextImages(pairs, open_features("t5_features"), image_size=256, seed=0)
    pixels, features, valid = data[0]                                 # (3, 256, 256) in [-1, 1], (length, 2048), bool
    loader = DataLoader(data, collate_fn=partial(collate_t2i, tokens=120, pad=left_padded))

A pair is known by (file stem, line or sample number): its features and codes lie under that name. What makes a pair
unusable (an image that cannot be read or is smaller than the target, no features) makes an item that has the shape of
any other and counts for nothing in the loss: over internet-scale lists some are, and dropping them would change the order.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dataset.augmentation import UnusableImage, center_crop_arr, random_crop_arr, to_tensor
from dataset.codes import CodeSettings, CodeWriter
from dataset.images import drawing_from
from dataset.jsonl import JsonLines
from dataset.lines import CaptionLines, ImageLines, compare_folder, digest, digest_all, recorded_digest, recorded_maker
from dataset.pixels import DEFAULT, Reading, load_rgb
from dataset.shards import INDEX_FILE, ShardFolder
from dataset.webdataset import Member, TarPairs
from utils.files import atomic_write
from utils.origin import require_same, same_tokenizer
from utils.rng import item_seed

logger = logging.getLogger(__name__)

SHORT_CAPTIONS = 0.3  # how often the feature of --short-t5-feat-path is taken
CODE_VIEW = "center"
EXTRACTION = "autoregressive/train/extract_codes_t2i.py"
_SHORT_DRAW = 1  # told apart from the draws of the crop
_TOLD = 20  # unusable pairs that a process tells of one by one
# A few in a row are an accident or small pictures; so many are a wrong path or a disk that went away.
_UNUSABLE_IN_A_ROW = 256
_MOST_READERS = 1024  # loader processes that are told apart; more share a place
_SHOWN = 5  # pairs that an error names
_OPEN_FOLDERS = 64


class Features(Protocol):
    """Where caption features come from, by (file stem, line): dataset/text_features.py."""

    folder: Path
    dim: int
    encoder: str | None

    def lines(self, stem: str) -> int | None: ...

    def get(self, stem: str, line: int) -> Tensor | None: ...


class Pairs(Protocol):
    """Image-text pairs, whatever holds them."""

    files: list[tuple[str, int]]

    def __len__(self) -> int: ...
    def identity(self, index: int) -> tuple[str, int]: ...
    def image_file(self, index: int) -> str | Member: ...
    def texts(self, index: int) -> list[str]: ...
    def where(self, index: int) -> str: ...
    def list_digest(self, k: int) -> str: ...
    def image_digest(self, index: int) -> int: ...

    image_kind: str


class JsonPairs(JsonLines):
    """The pairs of a folder's jsonl files: identity (file stem, line number from 0). Raises as JsonLines does."""

    image_kind = "image paths"

    @property
    def files(self) -> list[tuple[str, int]]:
        """(stem, lines) of every file, in order."""
        return [(file.stem, len(starts) - 1) for file, starts in zip(self._files, self._starts)]

    def identity(self, index: int) -> tuple[str, int]:
        """A pair's (file stem, line); the line itself is not read."""
        index = range(len(self))[index]
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[which].stem, index - int(self._ends[which]) + len(self._starts[which]) - 1

    def image_file(self, index: int) -> str:
        """The path of a pair's image. Raises ValueError for a damaged line."""
        return self.image_path(self[index][2])

    def image_digest(self, index: int) -> int:
        """Return what the image's path in the line comes to, from any folder above it. Raises ValueError for a damaged line."""
        path = os.path.normpath(self[index][2]["image_path"])
        while path.startswith("../"):  # the same image in a list that lies deeper
            path = path[3:]
        return digest(path)

    def list_digest(self, k: int) -> str:
        """Return what the bytes of file number `k` come to."""
        return self._digests[k]

    def texts(self, index: int) -> list[str]:
        """A pair's captions. Raises ValueError for a damaged line, or one whose `text` is neither a string nor a list of them."""
        texts = self[index][2].get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{self.where(index)} must have 'text', a string or a list of strings")
        return texts

    def where(self, index: int) -> str:
        """A pair's place, for messages."""
        stem, line = self.identity(index)
        return f"line {line} (from 0) of {self.folder / stem}.jsonl"


def open_pairs(folder: str | Path, index_path: str | Path | None = None) -> JsonPairs | TarPairs:
    """The pairs of a folder of *.jsonl lists or of *.tar shards; index_path: see TarPairs.

    Raises FileNotFoundError where the folder is missing, ValueError where it holds neither or both, and as the two do.
    """
    folder = Path(folder)
    lists, shards = (any(folder.glob(pattern)) for pattern in ("*.jsonl", "*.tar*"))
    if lists and shards:
        raise ValueError(f"{folder} holds *.jsonl and *.tar: give each a folder of its own")
    return TarPairs(folder, index_path) if shards else JsonPairs(folder)


def chosen_files(pairs: Pairs, first: int, last: int | None) -> list[int]:
    """The numbers of the files from `first` to `last`, both included; None: to the last there is.

    first, last: --data-start and --data-end. Raises ValueError where they select no file.
    """
    count = len(pairs.files)
    chosen = [k for k in range(count) if first <= k <= (count if last is None else last)]
    if not chosen:
        raise ValueError(
            f"--data-start {first} --data-end {last} selects none of the {count} files: they are numbered 0 to {count - 1}"
        )
    return chosen


def require_same_encoder(features: Features, others: Features) -> None:
    """Raises ValueError where two folders record that different text encoders made them."""
    if None not in (features.encoder, others.encoder) and features.encoder != others.encoder:
        raise ValueError(
            f"{features.folder} and {others.folder} were made by different text encoders ({features.encoder} and "
            f"{others.encoder}): extract one of them again"
        )


class TextCodes:
    """Codes of pairs by (file stem, line): a folder per stem, of packed shards or of one file a pair (1, tokens).

    stems: whose codes are looked for. Packed folders are looked through at once, so that what is incomplete is told
    before training. At most 64 folders are kept open. vocab_size: codes that the model has (default: as many as the codes
    record, or 16384). tokenizer: the fingerprint of the tokenizer that made them, None where they do not say.
    Raises FileNotFoundError where the folder is missing, ValueError where it has codes of none of the stems, where packed
    ones are incomplete, and where codes have not `tokens` tokens, may lie beyond `vocab_size`, or are of several tokenizers.
    """

    def __init__(self, folder: str | Path, stems: Sequence[str], tokens: int, vocab_size: int | None = None):
        self.folder, self.tokens = Path(folder), tokens
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"the code folder {folder} does not exist: check --code-path, or extract codes first\n  "
                f"python3 {EXTRACTION} --data-path THE_PAIRS --code-path {folder} --vq-ckpt THE_TOKENIZER"
            )
        there = [stem for stem in stems if (self.folder / stem).is_dir()]
        if not there:
            inside = sorted(p.name for p in self.folder.iterdir())[:5]
            raise ValueError(
                f"{folder} holds no codes of these pairs: a folder {stems[0]}/ is looked for (and {len(stems) - 1} more); "
                f"in it: {', '.join(inside) or 'nothing'}"
            )
        self.packed = {stem for stem in there if (self.folder / stem / INDEX_FILE).exists()}
        recorded = {stem: CodeSettings.read(self.folder / stem) for stem in sorted(self.packed)}
        self.vocab_size = vocab_size or max((told.codebook_size for told in recorded.values()), default=16384)
        first = next(iter(recorded), "")
        for stem, settings in recorded.items():
            self._check(self.folder / stem, settings)
            require_same(
                vars(recorded[first]),
                vars(settings),
                ("tokenizer", "codebook_size"),
                (str(self.folder / first), str(self.folder / stem)),
                "extract one of them again",
            )
        self.tokenizer = max((told.tokenizer or "" for told in recorded.values()), key=len, default="") or None
        maker = recorded_maker(self.folder, there)
        if not same_tokenizer(self.tokenizer, maker):
            raise ValueError(
                f"{self.folder} has packed codes of the tokenizer {self.tokenizer} and others of {maker}: extract one of them again"
            )
        self.tokenizer = maker or self.tokenizer
        self._open: OrderedDict[str, tuple[ShardFolder, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}

    def get(self, stem: str, line: int) -> Tensor | None:
        """The codes int64 (tokens,) of a pair in raster order; None where there are none.

        Raises ValueError for a file that is damaged or of another shape, and for codes that the model has no row for.
        """
        if stem in self.packed:
            folder, numbers = self._folder(stem)
            position = int(np.searchsorted(numbers, line))
            if position == len(numbers) or numbers[position] != line:
                return None
            return torch.from_numpy(folder.rows(np.asarray([position]), np.asarray([0]))[0].astype(np.int64))
        file = text_code_file(self.folder, stem, line)
        try:
            codes = np.load(file)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} is damaged ({error}): extract it again") from error
        if codes.shape != (1, self.tokens) or codes.dtype.kind not in "iu":
            raise ValueError(
                f"{file} holds {codes.dtype} {codes.shape}, --image-size needs integers (1, {self.tokens})"
            )
        if not 0 <= codes.min() <= codes.max() < self.vocab_size:
            raise ValueError(f"{file} has codes to {codes.max()}, not below --vocab-size {self.vocab_size}")
        return torch.from_numpy(codes[0].astype(np.int64))

    def lines(self, stem: str) -> int | None:
        """Return how many lines a stem's file had when its codes were made; None where that is not known."""
        return CodeSettings.read(self.folder / stem).num_images if stem in self.packed else None

    def _folder(self, stem: str) -> tuple[ShardFolder, np.ndarray]:
        if stem not in self._open:
            folder = ShardFolder(self.folder / stem)
            self._open[stem] = folder, folder.numbers
            if len(self._open) > _OPEN_FOLDERS:
                self._open.popitem(last=False)
        self._open.move_to_end(stem)
        return self._open[stem]

    def _check(self, folder: Path, settings: CodeSettings) -> None:
        if settings.tokens != self.tokens:
            raise ValueError(
                f"codes in {folder} are of --image-size {settings.image_size} and have {settings.tokens} tokens an image; "
                f"{self.tokens} are needed"
            )
        if settings.codebook_size > self.vocab_size:
            raise ValueError(
                f"{folder} was made with {settings.codebook_size} codes; pass --vocab-size {settings.codebook_size}"
            )
        missing = CodeWriter(folder, settings).missing_shards()
        if missing:
            precision = settings.extra.get("mixed_precision")
            raise ValueError(
                f"{folder} is incomplete: {len(missing)} of {settings.num_shards} shards are missing or damaged. Finish it, "
                f"which keeps what is there:\n  python3 {EXTRACTION} --data-path THE_PAIRS --code-path {self.folder} "
                f"--vq-ckpt THE_TOKENIZER --vq-model {settings.vq_model} --codebook-size {settings.codebook_size} "
                f"--image-size {settings.image_size} --shard-size {settings.shard_size}"
                + (f" --mixed-precision {precision}" if precision else "")
                + Reading.recorded(settings.extra).flags()
            )


def text_code_file(folder: str | Path, stem: str, line: int) -> Path:
    """Where the published layout keeps a pair's codes."""
    return Path(folder) / stem / f"{line}.npy"


def write_text_codes(folder: str | Path, stem: str, line: int, codes: np.ndarray) -> None:
    """Writes a pair's codes (tokens,) in the published layout: `{folder}/{stem}/{line}.npy` int64 (1, tokens)."""
    with atomic_write(text_code_file(folder, stem, line), durable=False) as f:
        np.save(f, np.asarray(codes, np.int64)[None])


class _Unusable(Exception):
    """Why a pair does not count."""


class _PairItems(Dataset):
    """What the two data sets of pairs share: reading a crop, and keeping account of pairs that are not usable."""

    def __init__(self, pairs: Pairs, image_size: int | None, seed: int, random_crop: bool, reading: Reading):
        self.pairs, self.image_size, self.seed, self.random_crop = pairs, image_size, seed, random_crop
        self.reading = reading
        # Shared memory: persistent workers see a new epoch, and the main process sees what workers skipped.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros(len(pairs), dtype=torch.uint8).share_memory_()
        self._told = 0

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def skipped(self) -> int:
        """How many pairs were found unusable so far, in this process and its workers."""
        return int(self._skipped.count_nonzero())

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass draw other crops and captions; reaches running workers too."""
        self._epoch[0] = epoch

    def examples(self) -> list[str]:
        """Places and reasons of a few pairs that were found unusable so far, which are looked at once more."""
        return self._reasons(self._skipped.nonzero().flatten()[-_SHOWN:].tolist())

    def _reasons(self, indices: Sequence[int]) -> list[str]:
        found = []
        for index in indices:
            try:
                self._read(index)
            except _Unusable as error:
                found.append(f"{self.pairs.where(index)} ({error})")
        return found

    def _read(self, index: int) -> object:
        """What there is of a pair. Raises _Unusable."""
        return self._pixels(index)

    def sample_numbers(self, indices: Sequence[int]) -> list[str]:
        """The names of these samples, "stem:line"."""
        return [":".join(map(str, self.pairs.identity(index))) for index in indices]

    def _pixels(self, index: int) -> Tensor:
        """The crop (3, H, W) of a pair's image. Raises _Unusable."""
        try:
            image = load_rgb(self.pairs.image_file(index), self.reading)
        except Exception as error:
            # For damaged files Pillow's decoders raise OSError, SyntaxError, struct.error, TypeError and more.
            raise _Unusable(f"{type(error).__name__}: {error}") from error
        if min(image.size) < self.image_size:
            raise _Unusable(f"{image.width}x{image.height} pixels, smaller than --image-size {self.image_size}")
        try:
            with drawing_from(item_seed(self.seed, int(self._epoch[0]), index)):
                return to_tensor(self._crop(image))
        except UnusableImage as error:
            raise _Unusable(str(error)) from error

    def _crop(self, image: Image.Image) -> Image.Image:
        return (random_crop_arr if self.random_crop else center_crop_arr)(image, self.image_size)

    def _tell(self, index: int, reason: str) -> None:
        """Counts a pair that is not usable, and logs the first ones."""
        if self._skipped[index]:
            return
        self._skipped[index] = 1
        if self._told < _TOLD:
            logger.warning("%s does not count (%s)", self.pairs.where(index), reason)
        elif self._told == _TOLD:
            logger.warning("further pairs that do not count are not told one by one; %d so far", self.skipped)
        self._told += 1


def none_usable(what: str, examples: Sequence[str]) -> str:
    """The words of an error where no pair could be used. examples: places and reasons."""
    return f"{what}; are the paths right, is the disk there? Some of them:\n  " + "\n  ".join(examples)


class TextImages(_PairItems):
    """Items (pixels (3, H, W) in [-1, 1] or codes int64 (tokens,), features (length, dim), valid bool) of pairs.

    features: of every pair's caption; short_features: those of shorter captions, which are taken with probability 0.3
    where there are any. codes: given, items have codes; else crops of `image_size` pixels, centred unless random_crop.
    Captions speak of left and right, so nothing is mirrored. Every draw is a function of (seed, epoch, index).
    Raises ValueError where features or codes were made of other lines, and where 256 different pairs in a row (or all),
    over all workers, cannot be used.
    """

    def __init__(
        self,
        pairs: Pairs,
        features: Features,
        *,
        image_size: int | None = None,
        codes: TextCodes | None = None,
        short_features: Features | None = None,
        seed: int = 0,
        random_crop: bool = False,
        reading: Reading = DEFAULT,
    ):
        if (image_size is None) == (codes is None):
            raise ValueError("items are crops of image_size pixels or codes: give one of the two")
        super().__init__(pairs, image_size, seed, random_crop, reading)
        self.features, self.short_features, self.codes = features, short_features, codes
        # How many in a row each reading process has found unusable, in a place of its own, so that no lock is needed. A
        # pair that counts sets all of them to zero, by which the others learn of it.
        self._rows = torch.zeros(1 + _MOST_READERS, dtype=torch.int64).share_memory_()
        self._in_a_row: dict[int, str] = {}  # of this process: by index, so that a pair met twice counts once
        if short_features is not None:
            require_same_encoder(features, short_features)
        for store in filter(None, (features, short_features)):
            compare_folder(store.folder, CaptionLines(pairs), store.lines)
        if codes is not None:
            compare_folder(codes.folder, ImageLines(pairs), codes.lines)

    def identity(self) -> list[dict[str, str]]:
        """Digests that tell whether pairs, captions and codes are still the same; those that both sides have are compared."""
        files = self.pairs.files
        stores = {"captions": self.features, "short captions": self.short_features, "images": self.codes}
        found = {
            name: recorded_digest(store.folder, dict(files)) for name, store in stores.items() if store is not None
        }
        if self.codes is None:
            found["lists"] = digest_all(self.pairs.list_digest(k) for k in range(len(files)))
        found["files"] = digest_all(f"{count} {stem}" for stem, count in files)
        return [{name: value for name, value in found.items() if value is not None}]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor, bool]]:
        """The items of a batch at once: DataLoader calls this instead of one index at a time."""
        return [self._item(index) for index in indices]

    def _item(self, index: int) -> tuple[Tensor, Tensor, bool]:
        try:
            target, features = self._read(index)
        except _Unusable as error:
            self._note(index, str(error))
            return self._nothing(), torch.zeros(0, self.features.dim), False
        self._note(index, None)
        return target, features, True

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        features = self._features(index)
        return self._pixels(index) if self.codes is None else self._codes(index), features

    def _features(self, index: int) -> Tensor:
        identity = self.pairs.identity(index)
        found = None
        if self.short_features is not None:
            draw = item_seed(self.seed, int(self._epoch[0]), index, _SHORT_DRAW) / 2**63
            if draw < SHORT_CAPTIONS:
                found = self.short_features.get(*identity)
        found = self.features.get(*identity) if found is None else found
        if found is None:
            raise _Unusable("no caption features")
        return found

    def _codes(self, index: int) -> Tensor:
        codes = self.codes.get(*self.pairs.identity(index))
        if codes is None:
            raise _Unusable("no codes")
        return codes

    def _note(self, index: int, reason: str | None) -> None:
        """Keeps account of whether a pair was usable. Raises ValueError where so many in a row, over all workers, were not."""
        if reason is None:
            if self._rows.any():
                self._rows.zero_()
            self._in_a_row.clear()
            return
        worker = get_worker_info()
        place = 0 if worker is None else 1 + worker.id % _MOST_READERS
        if not self._rows[place]:  # another process has met one that counts
            self._in_a_row.clear()
        self._in_a_row[index] = reason
        self._rows[place] = len(self._in_a_row)
        self._tell(index, reason)
        in_a_row, limit = int(self._rows.sum()), min(_UNUSABLE_IN_A_ROW, len(self))
        if in_a_row >= limit and self.skipped >= limit:  # in later epochs two processes may have met the same pair
            listed = [f"{self.pairs.where(i)} ({why})" for i, why in list(self._in_a_row.items())[-_SHOWN:]]
            raise ValueError(none_usable(f"none of {in_a_row} pairs in a row could be used", listed))

    def _nothing(self) -> Tensor:
        if self.codes is None:
            return torch.zeros(3, self.image_size, self.image_size)
        return torch.zeros(self.codes.tokens, dtype=torch.int64)


class PairViews(_PairItems):
    """Data set of what extraction encodes: items ([centre crop (3, H, W)], 0, index) for `present_batches`, None for unusable pairs."""

    def __init__(self, pairs: Pairs, image_size: int, reading: Reading = DEFAULT):
        super().__init__(pairs, image_size, seed=0, random_crop=False, reading=reading)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, int] | None:
        try:
            return [self._pixels(index)], 0, index
        except _Unusable as error:
            self._tell(index, str(error))
            return None

    def require_readable(self, missing: Sequence[int]) -> None:
        """Raises ValueError with places and reasons where the pairs `missing` in a row are 256, or all."""
        if len(missing) >= min(_UNUSABLE_IN_A_ROW, len(self)):
            examples = self._reasons(missing[-_SHOWN:])
            raise ValueError(none_usable(f"none of {len(missing)} pairs in a row could be used", examples))


def collate_t2i(
    items: Sequence[tuple[Tensor, Tensor, bool]],
    tokens: int,
    pad: Callable[[list[Tensor], int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of TextImages' items.

    tokens: condition rows, T. pad: language/features.py's left_padded.
    Returns pixels (B, 3, H, W) or codes int64 (B, N); features (B, T, dim), the last of a row's T; lengths int64 (B,); valid
    bool (B,). There is no mask: the device makes it from the lengths.
    """
    targets, features, valid = zip(*items, strict=True)
    # Items without features have some of the first dtype at hand.
    dtype = next((f.dtype for f in features if len(f)), torch.float32)
    padded, lengths = pad([f.to(dtype) for f in features], tokens)
    return torch.stack(targets), padded, lengths, torch.tensor(valid)
