"""Laid-out weights on a CPU: the products they give, whose they are, and when they are made anew."""

import gc

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from autoregressive.models.generate import generate, release_cache
from autoregressive.models.gpt import GPT_models
from autoregressive.models.on_cpu import _copies, _packed, attend_on_cpu, can_pack, packed, product, rows_at_once
from tests.helpers import randomize
from utils.rng import image_noise

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not built in")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def small_gpt(dtype=torch.float32, **shape):
    shape = {"vocab_size": 64, "block_size": 16, "num_classes": 10, **shape}
    with torch.inference_mode(False):
        return randomize(GPT_models["GPT-XS"](**shape), seed=1).to(dtype).requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 40, 96, 2048])
def test_products(dtype, width):
    with torch.inference_mode(False):
        layer = nn.Linear(72, width, bias=False).to(dtype).requires_grad_(False)
    x = torch.randn(3, 5, 72, dtype=dtype)
    expected = F.linear(x.double(), layer.weight.double())
    with packed(nn.Sequential(layer)):
        assert ("forward" in layer.__dict__) == (rows_at_once(72, width, dtype) > 0)
        product = layer(x)
    assert product.dtype == dtype and product.shape == (3, 5, width)
    torch.testing.assert_close(product.double(), expected, **({"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 2e-2}))  # fmt: skip
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(768, 768), (2048, 768), (768, 2048), (96, 1000)], ids=str)
def test_a_row_is_the_same_among_any_others(dtype, shape):
    """From two rows on, and with any number of threads."""
    inner, outer = shape
    with torch.inference_mode(False):
        model = nn.Sequential(nn.Linear(inner, outer, bias=False)).to(dtype).requires_grad_(False)
    if not rows_at_once(inner, outer, dtype):
        assert not can_pack(model)
        pytest.skip("this release of oneDNN rounds a row by the number of rows: such layers stay plain")
    x = torch.randn(70, inner, dtype=dtype)
    threads = torch.get_num_threads()
    with packed(model):
        whole = model(x)
        try:
            for number in (1, 2):
                torch.set_num_threads(number)
                for rows in (2, 3, 4, 8, 15, 16, 17, 31, 33, 64, 70):
                    assert torch.equal(model(x[:rows]), whole[:rows]), (number, rows)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [2, 8, 9, 17, 24, 70])
def test_product_in_parts_of_rows_equals_the_whole(rows):
    x, weight = torch.randn(rows, 3, 40), torch.randn(24, 40)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    torch.testing.assert_close(product(x, laid_out, at_once=8), x @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_copies_follow_the_weights():
    model = small_gpt()
    labels = torch.tensor([1, 2])
    noise = image_noise(0, range(2), 16)

    def draw(model):
        return generate(model, labels, cfg_scale=2.0, noise=noise)

    first = draw(model)
    copies = _packed[model]
    assert torch.equal(draw(model), first) and _packed[model] is copies
    with torch.inference_mode(False):
        for change in (
            lambda weight: weight.mul_(-1),
            lambda weight: weight.data.mul_(-0.5),  # which PyTorch does not count
            lambda weight: weight.set_(weight.clone() + 1),
        ):
            change(model.layers[0].feed_forward.w2.weight)
            changed = draw(model)
            assert _packed[model] is not copies
            copies = _packed[model]
            fresh = small_gpt()
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(changed, draw(fresh))


def test_memory_is_given_back():
    gc.collect()  # models of earlier tests that wait for it
    before = len(_copies)
    model = small_gpt()
    generate(model, torch.tensor([1]))
    assert len(_copies) > before
    release_cache(model)
    assert len(_copies) == before and model not in _packed
    generate(model, torch.tensor([1]))
    del model
    assert len(_copies) == before


def test_what_cannot_be_packed():
    model = small_gpt()
    assert can_pack(model)
    with torch.inference_mode(False):
        assert not can_pack(model)  # weights would be laid out for every step of training
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_pack(model)
    assert not can_pack(small_gpt(torch.float16)) and not can_pack(nn.Sequential())
    with torch.inference_mode(False):
        meta = nn.Sequential(nn.Linear(4, 4, bias=False, device="meta"))
    assert not can_pack(meta)
    with packed(meta):
        assert "forward" not in meta[0].__dict__


def test_layers_stay_plain_where_the_processor_packs_no_bfloat16(monkeypatch):
    """As with AVX2 alone, where laying such a weight out is an error."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    assert rows_at_once.__wrapped__(64, 96, torch.bfloat16) == 0


def test_layers_stay_plain_where_rows_do_not_agree(monkeypatch):
    model = small_gpt()
    labels, noise = torch.tensor([1, 2]), image_noise(0, range(2), 16)
    drawn = generate(model, labels, noise=noise)
    release_cache(model)
    monkeypatch.setattr("autoregressive.models.on_cpu.rows_at_once", lambda inner, outer, dtype: outer != 64)
    assert not can_pack(model)
    assert torch.equal(generate(model, labels, noise=noise), drawn) and model not in _packed


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["all", "causal", "masked"])
def test_attention(rows, kv_heads, kind):
    q = torch.randn(3, 6, rows, 16)
    length = rows if kind == "causal" else 20
    k, v = torch.randn(3, kv_heads, length, 16), torch.randn(3, kv_heads, length, 16)
    mask = None
    if kind == "masked":
        mask = torch.rand(3, 1, 1, length) < 0.6
        mask[..., 0] = True
    ours = attend_on_cpu(q, k, v, mask, kind == "causal", q.shape[-1] ** -0.5)
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal", enable_gqa=True)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
