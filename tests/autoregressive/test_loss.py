"""The loss of training: against full logits, its gradients, its precision, and the memory it does without."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.layouts.patches import with_patches
from autoregressive.train.loss import TokenLoss, token_log_probs
from autoregressive.train.objectives import chunked
from autoregressive.train.objectives.chunked import chunked_loss, chunked_values
from autoregressive.train.objectives.cross_entropy import cross_entropy
from tests.helpers import randomize

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(rows: int, width: int, vocab: int, targets: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (R, D), weight (V, D), targets (R, P); some rows have equal targets."""
    generator = torch.Generator().manual_seed(rows + vocab + targets)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    chosen = torch.randint(vocab, (rows, targets), generator=generator)
    chosen[::3] = chosen[::3, :1]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), chosen


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """The same loss from all logits at once."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = torch.stack([F.cross_entropy(logits, column, reduction="none") for column in targets.t()]).mean(0)
    if row_weights is None:
        return rows.mean()
    return (rows * row_weights).sum() / row_weights.sum().clamp(min=1)


def by_autograd(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy that is not known by name: no gradient was derived by hand for it."""
    return cross_entropy(logits, targets)


BOTH = pytest.mark.parametrize("objective", [cross_entropy, by_autograd])


def gradients(loss: Tensor, *wanted: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, wanted))


# Against full logits

SHAPES = [(1, 4, 3, 1), (7, 8, 5, 1), (12, 8, 33, 4), (13, 16, 50, 16), (9, 4, 20, 64), (64, 32, 100, 1)]


@BOTH
@pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
@pytest.mark.parametrize("rows, width, vocab, targets", SHAPES)
def test_chunked_loss_equals_the_cross_entropy_of_all_logits(rows, width, vocab, targets, chunk, objective):
    hidden, weight, chosen = problem(rows, width, vocab, targets)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for row_weights in (None, torch.arange(rows) % 3 * 1.0, torch.zeros(rows)):
        loss = chunked_loss(hidden, weight, chosen, row_weights, objective=objective, chunk_rows=chunk)
        expected = plain(*exact, chosen, row_weights)
        assert loss.dtype == torch.float32 and loss.shape == ()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        for mine, other in zip(gradients(loss, hidden, weight), gradients(expected, *exact), strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert torch.equal(
                chunked_loss(hidden, weight, chosen, row_weights, objective=objective, chunk_rows=chunk), loss
            )
        with torch.inference_mode():
            assert torch.equal(
                chunked_loss(hidden, weight, chosen, row_weights, objective=objective, chunk_rows=chunk), loss
            )


@BOTH
@pytest.mark.parametrize("targets", [1, 4])
def test_chunked_loss_has_the_gradients_of_finite_differences(targets, objective):
    hidden, weight, chosen = problem(5, 3, 7, targets, torch.float64)
    row_weights = torch.tensor([1.0, 0, 1, 0.5, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_loss(h, w, chosen, row_weights, objective=objective, chunk_rows=2), (hidden, weight)
    )


def test_a_gradient_by_one_of_the_two():
    hidden, weight, chosen = problem(12, 8, 33, 4)
    both = gradients(chunked_loss(hidden, weight, chosen, chunk_rows=5), hidden, weight)
    (by_hidden,) = gradients(chunked_loss(hidden, weight.detach(), chosen, chunk_rows=5), hidden)
    (by_weight,) = gradients(chunked_loss(hidden.detach(), weight, chosen, chunk_rows=5), weight)
    assert torch.equal(by_hidden, both[0]) and torch.equal(by_weight, both[1])
    assert not chunked_loss(hidden.detach(), weight.detach(), chosen).requires_grad


def test_backward_scales_and_may_be_called_twice_but_not_twice_derived():
    hidden, weight, chosen = problem(12, 8, 33, 4)
    loss = chunked_loss(hidden, weight, chosen, chunk_rows=5)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0**16), retain_graph=True)
    for one, other in zip(once, scaled, strict=True):
        assert torch.equal(one * 2**16, other)
    with pytest.raises(RuntimeError, match="only once: leave out create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_extreme_logits():
    """No overflow for large ones, and the exact loss where one probability is all but 1."""
    hidden, weight, chosen = torch.eye(3) * 1e4, torch.eye(3, requires_grad=True), torch.tensor([[0], [1], [0]])
    loss = chunked_loss(hidden, weight, chosen)
    assert float(loss.detach()) == pytest.approx(1e4 / 3)
    assert gradients(loss, weight)[0].isfinite().all()


# Precision


@BOTH
def test_autocast(objective):
    """Products in bfloat16, everything else as wide as without it."""
    hidden, weight, chosen = problem(64, 32, 100, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_loss(hidden, weight, chosen, objective=objective, chunk_rows=24)
        rounded = plain(hidden, weight, chosen)
    expected = plain(hidden, weight, chosen)
    assert loss.dtype == torch.float32 and loss != expected
    torch.testing.assert_close(loss, rounded, rtol=1e-6, atol=0)
    for mine, other, true in zip(
        *(gradients(value, hidden, weight) for value in (loss, rounded, expected)), strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() < 1.2 * (other - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    hidden, weight, chosen = problem(64, 32, 100, 4, dtype)
    loss = chunked_loss(hidden, weight, chosen, chunk_rows=24)
    expected = plain(hidden.double(), weight.double(), chosen)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    for mine, true in zip(*(gradients(value, hidden, weight) for value in (loss, expected)), strict=True):
        assert mine.dtype == dtype
        assert (mine - true).norm() < 0.02 * true.norm()


def test_many_chunks_of_a_bf16_weight_gradient_do_not_drift():
    """Sums of chunks in bfloat16 would stop growing after a few hundred."""
    hidden = torch.ones(2048, 2, dtype=torch.bfloat16)
    weight = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.zeros(2048, 1, dtype=torch.long)
    (gradient,) = gradients(chunked_loss(hidden, weight, chosen, chunk_rows=1), weight)
    assert torch.equal(gradient, torch.tensor([[-0.5, -0.5], [0.5, 0.5]]).bfloat16())


@BOTH
def test_a_probability_near_one_cancels_its_target_in_bf16(objective):
    """p - 1, not p rounded to bfloat16 - 1."""
    hidden, chosen = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)
    weight = torch.tensor([[6.0], [0.0]], requires_grad=True)  # exact in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = gradients(chunked_loss(hidden, weight, chosen, objective=objective), weight)
    miss = 1 - float(torch.tensor(6.0).sigmoid())
    assert gradient[:, 0].tolist() == pytest.approx([-miss, miss], rel=4e-3)


@BOTH
def test_float16_gradients_of_many_tokens_do_not_vanish(objective):
    """A mean over so many rows is below what float16 holds; a GradScaler's factor comes too late for what is lost."""
    rows, vocab, scale = 4096, 512, 2.0**16
    hidden = torch.ones(rows, 1, requires_grad=True)
    weight = torch.zeros(vocab, 1, requires_grad=True)
    chosen = torch.arange(rows)[:, None] % (vocab // 2)
    with torch.autocast("cpu", torch.float16):
        loss = chunked_loss(hidden, weight, chosen, objective=objective)
    (gradient,) = torch.autograd.grad(loss, weight, torch.tensor(scale))
    expected = torch.full((vocab,), 1 / vocab)
    expected[: vocab // 2] -= 2 / vocab
    torch.testing.assert_close(gradient[:, 0] / scale, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_the_sum_over_a_chunk_does_not_overflow(autocast):
    """A token of every row: 4096 rows of 64 are beyond float16, their mean is not."""
    hidden, chosen = torch.full((4096, 1), 64.0), torch.zeros(4096, 1, dtype=torch.long)
    weight = torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", autocast):
        (gradient,) = gradients(chunked_loss(hidden, weight, chosen), weight)
    assert gradient[:, 0].tolist() == [-32, 32]


# Memory and work


class Recorder(TorchDispatchMode):
    """Keeps the size of the largest floating tensor that any operation returns, and counts matrix products."""

    largest = products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        self.products += name in ("mm", "addmm", "addmm_")
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.largest = max(self.largest, value.numel())
        return result


@BOTH
@pytest.mark.parametrize("targets", [1, 4])
@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_loss_makes_no_tensor_as_large_as_all_logits(autocast, targets, objective):
    rows, width, vocab, chunk = 96, 8, 200, 24
    hidden, weight, chosen = problem(rows, width, vocab, targets)
    with Recorder() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        chunked_loss(hidden, weight, chosen, objective=objective, chunk_rows=chunk).backward()
    assert seen.largest == chunk * vocab
    assert seen.products == 3 * rows // chunk
    with Recorder() as seen:
        plain(hidden, weight, chosen).backward()
    assert seen.largest == rows * vocab


def test_the_default_chunk_goes_by_bytes(monkeypatch):
    hidden, weight, chosen = problem(96, 8, 200, 1)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 24 * 200 * 4)
    with Recorder() as seen:
        chunked_loss(hidden, weight, chosen).backward()
    assert seen.largest == 24 * 200
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)  # a codebook larger than that still goes, row by row
    torch.testing.assert_close(chunked_loss(hidden, weight, chosen), plain(hidden, weight, chosen))


def test_without_gradients_none_are_computed():
    hidden, weight, chosen = problem(96, 8, 200, 1)
    for context in (torch.no_grad, torch.inference_mode):
        with Recorder() as seen, context():
            chunked_loss(hidden, weight, chosen, chunk_rows=24)
        assert seen.products == 4
    with Recorder() as seen:
        chunked_loss(hidden, weight.detach(), chosen, chunk_rows=24).backward()
    assert seen.products == 8


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_loss_compiled_gives_the_same(dtype, objective, monkeypatch):
    """What runs on CUDA, traced and made functional without generating code."""
    torch._dynamo.reset()
    chunked._chunk_loss.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    hidden, weight, chosen = problem(12, 8, 33, 4, dtype)
    logits, weights = (hidden @ weight.t()).detach(), torch.arange(12.0)[:, None]
    plain_chunk, compiled = (chunked._chunk_loss(objective, compiled) for compiled in (False, True))
    for wanted in (True, False):
        loss, gradient = plain_chunk(logits.clone(), chosen, weights, torch.float32, wanted)
        same_loss, same_gradient = compiled(logits.clone(), chosen, weights, torch.float32, wanted)
        torch.testing.assert_close(same_loss, loss)
        assert (gradient is None) == (not wanted)
        if wanted:
            assert gradient.dtype == dtype
            torch.testing.assert_close(same_gradient, gradient)
    chunked._chunk_loss.cache_clear()


# Objectives


def test_chunked_loss_any_objective_has_the_gradients_of_all_logits():
    def focal(logits, targets):
        picked = logits.log_softmax(-1).gather(-1, targets)
        return -((1 - picked.exp()) ** 2) * picked + 0.1 * logits.logsumexp(-1, keepdim=True) ** 2

    hidden, weight, chosen = problem(12, 8, 33, 4, torch.float64)
    row_weights = torch.arange(12.0)
    mine = chunked_loss(hidden, weight, chosen, row_weights, objective=focal, chunk_rows=5)
    whole = (focal(hidden @ weight.t(), chosen).mean(1) * row_weights).sum() / row_weights.sum()
    torch.testing.assert_close(mine, whole)
    for one, other in zip(gradients(mine, hidden, weight), gradients(whole, hidden, weight), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_values_equal_those_of_all_logits_and_hold_no_more_than_a_chunk(autocast):
    hidden, weight, chosen = problem(96, 8, 200, 4)
    counts = torch.randn(96, 4)
    with Recorder() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = chunked_values(hidden, weight, chosen, chunk_rows=24)
        mine = gradients((values * counts).sum(), hidden, weight)
    expected = cross_entropy(hidden @ weight.t(), chosen)
    close = {"rtol": 0.05, "atol": 0.2} if autocast else {}
    torch.testing.assert_close(values, expected, **close)
    for one, other in zip(mine, gradients((expected * counts).sum(), hidden, weight), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < (0.02 if autocast else 1e-5) * other.norm()
    assert seen.largest == 24 * 200


@BOTH
def test_bias_of_the_output_layer_is_added_and_has_its_gradient(objective):
    hidden, weight, chosen = problem(12, 8, 33, 2)
    bias = torch.randn(33, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits = hidden @ weight.t() + bias
    expected = cross_entropy(logits, chosen)
    loss = chunked_loss(hidden, weight, chosen, bias=bias, objective=objective, chunk_rows=5)
    values = chunked_values(hidden, weight, chosen, bias=bias, objective=objective, chunk_rows=5)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(values, expected)
    wanted = hidden, weight, bias
    for mine in (loss, values.mean()):
        for one, other in zip(
            gradients(mine, *wanted), torch.autograd.grad(expected.mean(), wanted, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(one, other)


# The module

GRID = 4
SIZES = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 32, "vocab_size": 11, "block_size": 16, "num_classes": 5}
QUIET = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0}
KINDS = {
    "raster": ({}, 1),
    "PAR": ({"ar_token_num": 4}, 1),
    "NAR": ({"layout": {"name": "neighbours"}}, 1),
    "text": ({"model_type": "t2i", "cls_token_num": 3, "caption_dim": 6}, 1),
    "patches of 2x2": ({}, 2),
    "patches of 4x4": ({}, 4),
    "text, patches of 2x2": ({"model_type": "t2i", "cls_token_num": 3, "caption_dim": 6}, 2),
}


def batch(model: Transformer) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(11, (3, 16), generator=generator)
    if model.args.model_type == "c2i":
        return codes, torch.randint(5, (3,), generator=generator), {}
    return (
        codes,
        torch.randn(3, 3, 6, generator=generator),
        {"prefix_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]])},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_is_the_cross_entropy_of_the_models_logits(kind):
    more, side = KINDS[kind]
    model = randomize(Transformer(ModelArgs(**SIZES, **QUIET, **more)), seed=3).train()
    codes, cond, masks = batch(model)
    drop, valid = torch.tensor([False, True, False]), torch.tensor([1, 1, 0])
    layout = with_patches(model.layout, side)
    tokens = codes[:, layout.order]
    logits = model(tokens[:, : -layout.step_tokens], cond, layout=layout, drop=drop, **masks)
    assert logits.shape == (3, 16 // side**2, 11)
    each = logits.log_softmax(-1).repeat_interleave(side**2, dim=1).gather(2, tokens[..., None])[..., 0]
    expected = {None: -each.mean(), valid: -each[:2].mean()}
    token_loss = TokenLoss(model, chunk_rows=5)
    for flags, value in expected.items():
        loss = token_loss(codes, cond, drop=drop, valid=flags, layout=layout, **masks)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, value)
        parameters = [p for p in model.parameters() if p is not None]
        mine, others = (torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in (loss, value))
        for name, one, other in zip(dict(model.named_parameters()), mine, others, strict=True):
            torch.testing.assert_close(one, other, msg=lambda m, name=name: f"{name}: {m}")
    assert token_loss(codes, cond, drop=drop, valid=torch.zeros(3), layout=layout, **masks) == 0


@pytest.mark.parametrize("kind", ["raster", "PAR", "NAR", "text"])
def test_token_log_probs_are_those_of_the_models_logits_in_raster_order(kind):
    model = randomize(Transformer(ModelArgs(**SIZES, **QUIET, **KINDS[kind][0])), seed=3)
    codes, cond, masks = batch(model)
    tokens = codes[:, model.layout.order]
    logits = model(tokens[:, : -model.layout.step_tokens], cond, **masks)
    expected = torch.empty(codes.shape)
    expected[:, model.layout.order] = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    values = token_log_probs(model, codes, cond, chunk_rows=5, **masks)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(-values.mean(), TokenLoss(model)(codes, cond, **masks))
    (one,), (other,) = (torch.autograd.grad(v[:, 3].sum(), model.output.weight) for v in (values, expected))
    torch.testing.assert_close(one, other)


def test_a_loss_after_one_in_inference_mode():
    """What is kept from the one must serve the other's backward pass."""
    model = randomize(Transformer(ModelArgs(**SIZES, **QUIET)), seed=3)
    token_loss = TokenLoss(model)
    codes, cond, _ = batch(model)
    for side in (1, 2):
        with torch.inference_mode():
            before = token_loss(codes, cond, layout=with_patches(model.layout, side))
        loss = token_loss(codes, cond, layout=with_patches(model.layout, side))
        loss.backward()
        assert torch.equal(loss, before)


@pytest.mark.parametrize(
    "more, side, message",
    [({}, 3, "patches of 3x3"), ({}, 0, "patches of 0x0"), ({"ar_token_num": 4}, 2, "'parallel' and patches of 2x2")],
)
def test_patches_that_do_not_fit(more, side, message):
    model = Transformer(ModelArgs(**SIZES, **more))
    with pytest.raises(ValueError, match=message):
        with_patches(model.layout, side)
