"""Decoding in strips against the decoder itself."""

import pytest
import torch

from tests.helpers import randomize
from tokenizer.tokenizer_image.strips import decode_in_strips
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel


def tokenizer(name: str = "VQ-8") -> VQModel:
    model = VQ_models[name](codebook_size=32, ch=32, z_channels=32)
    return randomize(model, seed=2).eval()


def latents(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(height))


def in_strips(model: VQModel, quant: torch.Tensor, numbers: int) -> torch.Tensor:
    return decode_in_strips(model.post_quant_conv, model.decoder, quant, numbers)


@pytest.mark.parametrize("numbers", [1, 5000, 10**9])
@pytest.mark.parametrize("height, width, batch", [(4, 4, 1), (1, 3, 1), (5, 2, 3)])
def test_pixels_are_those_of_the_whole_image(height, width, batch, numbers):
    """A row at a time, some at a time, all at once; levels that are cut and such that are not."""
    model, quant = tokenizer(), latents(height, width, batch)
    with torch.inference_mode():
        expected = model.decode(quant)
    images = in_strips(model, quant, numbers)
    assert images.shape == expected.shape == (batch, 3, 8 * height, 8 * width)
    torch.testing.assert_close(images, expected, atol=2e-4 * float(expected.abs().max()), rtol=0)
    assert expected.std() > 0.1, "otherwise the comparison says little"


def test_in_bfloat16():
    model, quant = tokenizer(), latents(4, 4)
    with torch.inference_mode():
        exact = model.decode(quant)
        expected = model.decode_in_bfloat16().decode(quant)
    images = in_strips(model, quant, 5000)
    assert images.dtype == torch.bfloat16
    error = (images.float() - exact).square().mean()
    assert error < 2 * (expected.float() - exact).square().mean(), "no further off than the decoder in bfloat16"


def test_no_strip_is_larger_than_asked(monkeypatch):
    """Of what a convolution reads beside its own rows there is a row on either side."""
    sizes, to = [], torch.Tensor.to

    def moved(self, *args, **kwargs):
        if self.dim() == 4 and args and isinstance(args[0], torch.device):
            sizes.append(tuple(self.shape))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    in_strips(tokenizer(), latents(8, 8), 10_000)
    assert len(sizes) > 50
    for _, channels, height, width in sizes:
        own = channels * width * max(1, 10_000 // (channels * width))
        assert channels * height * width <= max(own + 2 * channels * width, 8 * 8 * channels), (
            "or the deepest level whole"
        )
