"""Text features as the Transformer takes them: each caption at the end of its 120 rows, zeros before it.

    features, lengths = left_padded([torch.randn(7, 2048), torch.randn(31, 2048)], tokens=120)   # (2, 120, 2048), (2,)
    mask = prefix_mask(lengths, tokens=120)                                                      # bool (2, 120)

The mask is a function of the lengths and made where they are: on the device, not in the loader.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def left_padded(features: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Batch captions of different lengths, in the order the Transformer reads them.

    features: (length_i, D) each, a length of 0 for no caption. Longer ones are cut to their first `tokens` rows.
    Returns (B, tokens, D), features last and padding rows zero, and the lengths, int64 (B,), both on the features' device.
    """
    dtype = reduce(torch.promote_types, [caption.dtype for caption in features])
    padded = features[0].new_zeros(len(features), tokens, features[0].shape[1], dtype=dtype)
    lengths = [min(len(caption), tokens) for caption in features]
    for row, caption, length in zip(padded, features, lengths, strict=True):
        row[tokens - length :] = caption[:length]
    return padded, torch.tensor(lengths, dtype=torch.int64, device=padded.device)


def prefix_mask(lengths: Tensor, tokens: int) -> Tensor:
    """Tell which of the `tokens` rows hold a caption: lengths (B,) -> bool (B, tokens), on the lengths' device."""
    return torch.arange(tokens, device=lengths.device) >= tokens - lengths[:, None]
