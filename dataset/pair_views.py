"""Images of image-text pairs, as extraction encodes them."""

from functools import partial

from torch import Tensor

from dataset.augmentation import center_view
from dataset.images import ImageItems, Unusable
from dataset.pixels import DEFAULT, Reading
from dataset.sources import Pairs

# A few in a row are an accident or small pictures; so many are a wrong path or a disk that went away.
UNUSABLE_IN_A_ROW = 256


class PairItems(ImageItems):
    """Base of the two data sets of pairs."""

    kind, skipping = "pairs", "does not count:"

    def __init__(self, pairs: Pairs, image_size: int | None, seed: int = 0, reading: Reading = DEFAULT):
        super().__init__(len(pairs), seed, reading, in_a_row=min(UNUSABLE_IN_A_ROW, len(pairs)))
        self.pairs, self.image_size, self.where = pairs, image_size, pairs.where


class PairViews(PairItems):
    """Data set of what extraction encodes: items ([centre crop (3, H, W)], 0, index) for `present_batches`, None for unusable pairs."""

    def read(self, index: int) -> Tensor:
        """Return the centre crop of a pair's image. Raises Unusable."""
        crop = partial(center_view, image_size=self.image_size)
        return self.pixels(lambda: self.pairs.image_file(index), index, crop, self.image_size)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, int] | None:
        try:
            return [self.read(index)], 0, index
        except Unusable as error:
            self.skip(index, error)
            return None
