"""Captions of different lengths in one batch: each row as if it were alone, in training and in decoding, at every size."""

import re
from math import isqrt

import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from autoregressive.train.loss import TokenLoss, share_of_valid
from dataset.arrays import left_padded, prefix_mask
from tests.helpers import load_golden, randomize
from utils.distributed import Distributed
from utils.rng import image_noise

T, DIM, GRID, VOCAB = 5, 6, 4, 11
LENGTHS = [1, 4, 5, 2, 0]
SIZES = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 32, "vocab_size": VOCAB, "block_size": GRID**2}
TEXT = {"model_type": "t2i", "cls_token_num": T, "caption_dim": DIM}
LAYOUTS = {"raster": {}, "PAR": {"ar_token_num": 4}}
CPU = Distributed(torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(layout="raster"):
    return randomize(Transformer(ModelArgs(**SIZES, **TEXT, **LAYOUTS[layout])), seed=4)


def captions(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(length, DIM, generator=generator) for length in lengths]


def batch(lengths=LENGTHS):
    """codes, features, mask."""
    features, found = left_padded(captions(lengths), T)
    codes = torch.randint(VOCAB, (len(lengths), GRID**2), generator=torch.Generator().manual_seed(3))
    return codes, features, prefix_mask(found, T)


# The mask


def mask_by_hand(model, lengths):
    """Which row sees which, by the words of the papers."""
    group = model.layout.groups[-1]
    rows = model.layout.rows - group
    first_group = T - 1 + group  # the last of the single tokens
    seen = torch.zeros(len(lengths), rows, rows, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for i in range(rows):
            for j in range(rows):
                causal = j <= i
                if group > 1 and i >= first_group:  # a group sees itself whole
                    causal = j < first_group + ((i - first_group) // group + 1) * group
                padding = j < T - length
                seen[b, i, j] = (causal and not padding) or i == j
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_against_a_loop(layout):
    model = model_of(layout)
    rows = model.layout.rows - model.layout.groups[-1]
    mask = model.attention_mask(rows, batch()[2], torch.device("cpu"))
    assert mask.shape == (len(LENGTHS), 1, rows, rows)
    assert torch.equal(mask[:, 0], mask_by_hand(model, LENGTHS))


def test_the_mask_is_that_of_the_lengths():
    features, lengths = left_padded(captions(), T)
    mask = prefix_mask(lengths, T)
    for row, length in enumerate(LENGTHS):
        assert mask[row].tolist() == [False] * (T - length) + [True] * length
        assert torch.equal(features[row, T - length :], captions()[row])
        assert not features[row, : T - length].any()


# A row alone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_rows_are_what_they_are_alone(layout):
    model = model_of(layout)
    codes, features, mask = batch()
    tokens = codes[:, model.layout.order]
    inputs = tokens[:, : -model.layout.step_tokens]
    with torch.no_grad():
        together = model(inputs, features, prefix_mask=mask)
        for row in range(len(LENGTHS)):
            one = slice(row, row + 1)
            alone = model(inputs[one], features[one], prefix_mask=mask[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)
            loss = TokenLoss(model)(codes[one], features[one], prefix_mask=mask[one])
            by_hand = F.cross_entropy(together[row], tokens[row])
            torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_decoded_rows_are_what_they_are_alone(layout, scale):
    model = model_of(layout)
    _, features, mask = batch()
    noise = image_noise(5, range(len(LENGTHS)), GRID**2)
    together = generate(model, features, GRID**2, emb_masks=mask, cfg_scale=scale, noise=noise)
    assert len({tuple(row) for row in together.tolist()}) == len(LENGTHS)
    for row in range(len(LENGTHS)):
        one = slice(row, row + 1)
        alone = generate(model, features[one], GRID**2, emb_masks=mask[one], cfg_scale=scale, noise=noise[one])
        assert torch.equal(together[one], alone)


def test_what_stands_in_the_padding_does_not_matter():
    """To the image: the padding rows themselves see only themselves, and nobody sees them."""
    model = model_of()
    codes, features, mask = batch()
    filled = torch.where(mask[..., None], features, torch.full_like(features, 9.0))
    with torch.no_grad():
        rows = [model(codes[:, :-1], f, prefix_mask=mask) for f in (features, filled)]
    some = [row for row, length in enumerate(LENGTHS) if length]  # the last row of none is padding itself
    torch.testing.assert_close(rows[0][some], rows[1][some])
    with torch.no_grad():
        unmasked = model(codes[:, :-1], filled)
    assert not torch.allclose(rows[0][some], unmasked[some], atol=1e-3)


def test_a_dropped_caption_is_the_stored_one_under_the_same_mask():
    model = model_of()
    codes, features, mask = batch()
    drop = torch.tensor([True, False, True, False, False])
    stored = torch.where(drop[:, None, None], model.cls_embedding.uncond_embedding, features)
    with torch.no_grad():
        dropped = model(codes[:, :-1], features, drop=drop, prefix_mask=mask)
        torch.testing.assert_close(dropped, model(codes[:, :-1], stored, drop=torch.zeros(5), prefix_mask=mask))
    assert not torch.equal(stored, features)


# Samples that do not count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", [[5], [2, 3], [1, 1, 1, 1, 1], [4, 1]])
@pytest.mark.parametrize("valid", [[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], ids=str)
def test_the_mean_over_valid_samples_of_parts(layout, parts, valid):
    """Loss and gradients of a batch in parts of equal weight, as the trainer adds them up, against the whole batch."""
    model = model_of(layout)
    codes, features, mask = batch()
    valid = torch.tensor(valid, dtype=torch.bool)
    weight = model.tok_embeddings.weight
    whole = TokenLoss(model)(codes, features, prefix_mask=mask, valid=valid)
    (expected,) = torch.autograd.grad(whole, weight)
    split = [part.split(parts) for part in (codes, features, mask, valid)]
    shares = share_of_valid(torch.stack([v.sum() for v in split[3]]), CPU)
    total, gradient = 0.0, torch.zeros_like(weight)
    for share, c, f, m, v in zip(shares, *split, strict=True):
        loss = TokenLoss(model)(c, f, prefix_mask=m, valid=v) * share / len(parts)
        gradient += torch.autograd.grad(loss, weight)[0]
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    tokens = codes[:, model.layout.order]
    logits = model(tokens[:, : -model.layout.step_tokens], features, prefix_mask=mask)
    each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(1)
    by_hand = (each * valid).sum() / max(int(valid.sum()), 1)
    torch.testing.assert_close(whole, by_hand, rtol=1e-5, atol=1e-6)


def test_shares_over_processes():
    """Three processes with two parts each: what each multiplies by, so that the mean over all six is right."""
    counts = torch.tensor([[3, 0], [1, 2], [4, 4]])

    class Others(Distributed):
        def sum(self, value):
            return counts.sum()

    shares = torch.stack([share_of_valid(row, Others(torch.device("cpu"), rank, 3)) for rank, row in enumerate(counts)])
    torch.testing.assert_close(shares, counts * 6 / 14)
    means = torch.tensor([[1.0, 0.0], [5.0, 2.0], [3.0, 4.0]])  # of each part's valid samples
    assert float((means * shares).mean()) == pytest.approx(float((means * counts).sum() / 14))


# The released sizes


def published_names():
    """Names of the recorded model's state dict, with a # for the layer, and the names in every layer."""
    _, meta = load_golden("t2i")
    return {re.sub(r"layers\.\d+\.", "layers.#.", name) for name in meta["state_dict"]}


@pytest.mark.parametrize("image_size", [256, 512])
def test_the_released_size_on_the_meta_device(image_size):
    """GPT-XL with 120 caption tokens: names and shapes of the released files, the same for both image sizes."""
    grid = image_size // 16
    with torch.device("meta"):
        model = GPT_models["GPT-XL"](model_type="t2i", cls_token_num=120, block_size=grid**2)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {re.sub(r"layers\.\d+\.", "layers.#.", name) for name in state} == published_names()
    assert sum("layers.35." in name for name in state) == 7 and not any("layers.36." in name for name in state)
    expected = {
        "cls_embedding.uncond_embedding": (120, 2048),
        "cls_embedding.cap_proj.fc1.weight": (1280, 2048),
        "cls_embedding.cap_proj.fc2.weight": (1280, 1280),
        "tok_embeddings.weight": (16384, 1280),
        "layers.0.attention.wqkv.weight": (3840, 1280),
        "layers.35.feed_forward.w1.weight": (3584, 1280),
        "output.weight": (16384, 1280),
    }
    assert {name: state[name] for name in expected} == expected
    assert model.layout.rows == 120 + grid**2 and model.layout.prefix == 120
    rope = model.rope(torch.device("cpu"))
    assert rope.shape == (120 + grid**2, 32, 2) and not rope[:120].any() and rope[120:].any()
    assert isqrt(model.args.block_size) == grid


def test_weights_of_one_image_size_fit_another():
    """Nothing in the state dict depends on it; the rotary table follows the grid."""
    small = model_of()
    large = Transformer(ModelArgs(**{**SIZES, "block_size": 64}, **TEXT)).eval()
    large.load_state_dict(small.state_dict(), strict=True)
    codes = torch.randint(VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    _, features, mask = batch([3])
    with torch.no_grad():
        assert large(codes[:, :-1], features, prefix_mask=mask).shape == (1, 64, VOCAB)
        # Rows of the first line of a grid stand at the same places whatever the grid.
        line = [m(codes[:, :3], features, prefix_mask=mask) for m in (small, large)]
    torch.testing.assert_close(*line)
