"""Captions of different lengths in one batch: features at the end, zeros before, and the mask that says so."""

import numpy as np
import torch

from language.features import left_padded, prefix_mask


def test_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(length, 4, generator=generator) for length in (3, 0, 6, 9, 1)]
    padded, lengths = left_padded(features, 6)
    expected = np.zeros((5, 6, 4), np.float32)
    for i, caption in enumerate(features):
        kept = min(len(caption), 6)
        for row in range(kept):
            expected[i, 6 - kept + row] = caption[row]
    np.testing.assert_array_equal(padded, expected)
    assert lengths.tolist() == [3, 0, 6, 6, 1] and lengths.dtype == torch.int64
    mask = prefix_mask(lengths, 6)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask, (expected != 0).any(-1))


def test_dtypes():
    half = torch.ones(2, 4, dtype=torch.bfloat16)
    assert left_padded([half], 3)[0].dtype == torch.bfloat16
    assert left_padded([half, torch.ones(1, 4)], 3)[0].dtype == torch.float32
    assert left_padded([half, torch.ones(1, 4, dtype=torch.float16)], 3)[0].dtype == torch.float32
