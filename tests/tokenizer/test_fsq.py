"""Finite scalar quantisation against the recorded rule, to the last bit."""

import pytest
import torch

from tests.helpers import load_golden
from tokenizer.tokenizer_image.quantizers.fsq import ScalarQuantizer


@pytest.mark.parametrize("name", ["released", "small"])
def test_fsq_codes_and_gradient_are_the_recorded_ones(name):
    arrays, meta = load_golden("fsq")
    found = {
        key.removeprefix(f"{name}/"): torch.as_tensor(value) for key, value in arrays.items() if key.startswith(name)
    }
    quantizer = ScalarQuantizer(meta["config"][name]["levels"])
    assert quantizer.codebook_size == meta["config"][name]["codebook_size"]
    latents = found["latent"].clone().requires_grad_()
    quantised, losses, codes = quantizer(latents)
    assert torch.equal(quantised, found["codes"]) and torch.equal(codes, found["indices"])
    assert torch.equal(quantizer.nearest(latents), found["indices"]) and losses.parts == {} and losses.total == 0
    (quantised * found["probe"]).sum().backward()
    assert torch.equal(latents.grad, found["grad_latent"])
    assert torch.equal(quantizer.lookup(found["some_indices"]), found["some_codes"])
    assert torch.equal(quantizer.lookup(found["indices"]), found["codes"])


def test_fsq_levels_of_less_than_two_are_refused():
    for levels in ([], [8, 1]):
        with pytest.raises(ValueError, match="levels are whole numbers of 2 or more"):
            ScalarQuantizer(levels)
