"""Functions that a CPU computes with the same bits for any number of threads."""

import pytest
import torch

from tests.helpers import assert_close
from tokenizer.patches import silu
from tokenizer.tokenizer_image.blocks import swish


@pytest.mark.parametrize("function", [swish, silu])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_activation_has_the_same_bits_for_any_number_of_threads(function, layout):
    before = torch.get_num_threads()
    for shape in ((2, 64, 64, 64), (1, 33, 81, 47), (1, 2, 3, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
        torch.set_num_threads(1)
        try:
            expected = function(x)
            assert_close(expected, torch.nn.functional.silu(x))
            assert expected.stride() == x.stride()
            for threads in (2, 3, 5, 7, 16):
                torch.set_num_threads(threads)
                assert torch.equal(function(x), expected), (shape, threads)
        finally:
            torch.set_num_threads(before)
