"""The codebook against second implementations, and its usage window against hand-made cases."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import assert_close
from tokenizer.base import USAGE_WINDOW
from tokenizer.tokenizer_image.quantizers import vq as vq_module
from tokenizer.tokenizer_image.quantizers.vq import VectorQuantizer


def make(size=13, dim=5, **kwargs) -> VectorQuantizer:
    torch.manual_seed(0)
    layer = VectorQuantizer(size, dim, **kwargs)
    torch.nn.init.normal_(layer.embedding.weight)
    return layer


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt(sum(x * x for x in vector))


@pytest.mark.parametrize("l2_norm", [True, False])
def test_against_a_loop(l2_norm):
    layer = make(l2_norm=l2_norm, commit_loss_beta=0.4)
    z = torch.randn(2, 5, 3, 4)
    quant, (vq, commit, entropy, usage), codes = layer(z)

    codebook = layer.embedding.weight.detach().double().numpy()
    latents = z.double().numpy()
    if l2_norm:
        codebook = np.stack([unit(row) for row in codebook])
    expected, squares = [], []
    for b in range(2):
        for i in range(3):
            for j in range(4):
                vector = unit(latents[b, :, i, j]) if l2_norm else latents[b, :, i, j]
                distances = [float(((vector - row) ** 2).sum()) for row in codebook]
                nearest = distances.index(min(distances))
                expected.append(nearest)
                squares.append(min(distances) / 5)
                assert_close(quant[b, :, i, j].detach(), codebook[nearest])
    assert codes.flatten().tolist() == expected and torch.equal(layer.nearest(z), codes)
    assert_close(vq, np.mean(squares))
    assert_close(commit, 0.4 * np.mean(squares))
    assert float(entropy) == 0.0
    assert float(usage) == pytest.approx(len({0, *expected}) / 13)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_gradients(l2_norm):
    layer = make(l2_norm=l2_norm)
    z = torch.randn(2, 5, 3, 4, requires_grad=True)
    weights = torch.randn(2, 5, 3, 4)
    quant, (vq, commit, _, _), codes = layer(z)

    straight_through = torch.autograd.grad((quant * weights).sum(), z, retain_graph=True)[0]
    latents = F.normalize(z, dim=1) if l2_norm else z
    assert_close(straight_through, torch.autograd.grad((latents * weights).sum(), z, retain_graph=True)[0])

    rows = layer.embedding.weight[codes].permute(0, 3, 1, 2)
    rows = F.normalize(rows, dim=1) if l2_norm else rows
    expected = torch.autograd.grad((rows - latents.detach()).square().mean(), layer.embedding.weight, retain_graph=True)
    assert_close(torch.autograd.grad(vq, layer.embedding.weight, retain_graph=True)[0], expected[0])
    expected = torch.autograd.grad(0.25 * (rows.detach() - latents).square().mean(), z, retain_graph=True)
    assert_close(torch.autograd.grad(commit, z, retain_graph=True)[0], expected[0])
    for loss, frozen in ((vq, z), (commit, layer.embedding.weight)):
        assert torch.autograd.grad(loss, frozen, allow_unused=True, retain_graph=True)[0] is None


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("ratio", [0.1, -0.5])
def test_entropy_loss_against_a_loop(l2_norm, ratio):
    layer = make(size=6, entropy_loss_ratio=ratio, l2_norm=l2_norm)
    with torch.no_grad():
        layer.embedding.weight.mul_(0.3)
    z = 0.3 * torch.randn(1, 5, 2, 3)
    entropy = layer(z)[1][2]

    rows = layer.embedding.weight.detach().double().numpy()
    latents = z.double().numpy()[0].reshape(5, -1).T
    if l2_norm:
        rows, latents = [unit(x) for x in rows], [unit(x) for x in latents]
    samples, mean = [], np.zeros(6)
    for vector in latents:
        logits = [-float(((vector - row) ** 2).sum()) / 0.01 for row in rows]
        total = sum(math.exp(x - max(logits)) for x in logits)
        p = [math.exp(x - max(logits)) / total for x in logits]
        samples.append(-sum(x * math.log(x) for x in p if x > 0))
        mean += np.array(p) / len(latents)
    expected = np.mean(samples) + sum(x * math.log(x + 1e-5) for x in mean)
    assert_close(entropy, ratio * expected)


def test_search_in_blocks(monkeypatch):
    layer = make(size=50)
    latents = torch.randn(1, 5, 101, 1)
    whole = layer.nearest(latents)
    monkeypatch.setattr(vq_module, "SEARCH_ENTRIES", 50 * 7)
    assert torch.equal(layer.nearest(latents), whole)
    monkeypatch.setattr(vq_module, "SEARCH_ENTRIES", 1)
    assert torch.equal(layer.nearest(latents), whole)


def feed(layer: VectorQuantizer, codes: list[int]) -> float:
    """Quantizes the codebook's own rows, so the indices are `codes`."""
    z = layer.embedding.weight.detach()[torch.tensor(codes)].T[None, :, :, None]
    _, losses, found = layer(z)
    assert found.flatten().tolist() == codes
    return None if losses is None else float(losses.usage)


def test_usage_by_hand():
    layer = make(size=8)
    assert feed(layer, [3, 3, 5]) == 3 / 8  # the window starts full of zeros
    assert layer.codebook_used[-3:].tolist() == [3, 3, 5]
    assert feed(layer, [7]) == 4 / 8
    assert layer.codebook_used[-4:].tolist() == [3, 3, 5, 7]
    assert layer.codebook_used.shape == (USAGE_WINDOW,) and layer.codebook_used.dtype == torch.int64

    layer.eval()
    assert feed(layer, [1, 2]) is None
    assert layer.codebook_used[-4:].tolist() == [3, 3, 5, 7]


def test_usage_forgets_the_oldest():
    layer = make(size=8)
    feed(layer, [3])
    assert feed(layer, [1] * (USAGE_WINDOW - 1)) == 2 / 8
    assert layer.codebook_used[0] == 3
    assert feed(layer, [1]) == 1 / 8


def test_usage_of_a_batch_larger_than_the_window():
    layer = make(size=8)
    assert feed(layer, [3] * 500 + [1] * (USAGE_WINDOW - 1) + [2]) == 2 / 8
    assert layer.codebook_used[0] == 1 and layer.codebook_used[-1] == 2


def test_usage_of_the_batch_alone():
    layer = make(size=8, show_usage=False)
    assert feed(layer, [3, 3, 5]) == 2 / 8
    assert list(layer.state_dict()) == ["embedding.weight"]


def test_no_data_dependent_graph():
    layer = make(entropy_loss_ratio=0.1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    z = torch.randn(2, 5, 4, 4)
    quant, losses, codes = compiled(z)
    used = layer.codebook_used.clone()
    layer.codebook_used.zero_()
    expected_quant, expected_losses, expected_codes = layer(z)
    assert torch.equal(codes, expected_codes) and torch.equal(used, layer.codebook_used)
    assert_close(quant, expected_quant)
    for loss, expected in zip(losses, expected_losses, strict=True):
        assert_close(loss, expected)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_codebook_starts_small_or_of_unit_length(l2_norm):
    weight = VectorQuantizer(100, 8, l2_norm=l2_norm).embedding.weight
    if l2_norm:
        assert_close(weight.norm(dim=1), torch.ones(100))
    else:
        assert weight.abs().max() <= 1 / 100 and weight.std() > 0.005


def test_codebook_entry():
    layer = make()
    indices = torch.randint(13, (2 * 3 * 4,))
    rows = F.normalize(layer.embedding.weight, dim=1)[indices]
    assert_close(layer.get_codebook_entry(indices), rows)
    assert_close(layer.get_codebook_entry(indices.view(2, 12)), rows.view(2, 12, 5))
    last = layer.get_codebook_entry(indices, (2, 3, 4, 5), channel_first=False)
    assert_close(last, rows.view(2, 3, 4, 5))
    first = layer.get_codebook_entry(indices.view(2, 12), (2, 5, 3, 4))
    assert_close(first, last.permute(0, 3, 1, 2))
    for shape in ((2, 5, 3, 3), (2, 6, 3, 4), (24, 1, 1, 5)):
        with pytest.raises(ValueError, match="24 codes of a codebook with 5 channels"):
            layer.get_codebook_entry(indices, shape)
