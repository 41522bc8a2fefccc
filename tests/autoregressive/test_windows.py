"""Windows: whatever the window, the drafts, the batch and the cache's old contents, the tokens are those of one step a pass."""

import copy
import logging
import random
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from autoregressive.models import compiled, decode_step, on_cpu, plans
from autoregressive.models import generate as generation
from autoregressive.models.build import build_model
from autoregressive.models.conditions import Condition, register_condition
from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.layouts import Holds, Layout, Row, build_layout
from autoregressive.models.plans import window_of
from autoregressive.models.sampling import NotFiniteLogits, draw_race
from autoregressive.models.trunk import Conditions
from tests.autoregressive.decoding import Pairs, Recording
from tests.helpers import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"dim": 32, "n_layer": 2, "n_head": 4, "multiple_of": 32, "vocab_size": 24, "num_classes": 5, "block_size": 16}
TEXT = {"model_type": "t2i", "cls_token_num": 6, "caption_dim": 32}
LABELS = torch.tensor([3, 0, 4, 1])


class Scattered(Layout):
    """Single tokens in an order without a pattern."""

    name = "scattered of a test"

    def places(self):
        return torch.randperm(self.tokens, generator=torch.Generator().manual_seed(1))


@register_condition("map of a test")
class Map(Condition):
    """A vector (B, N, dim) for each token, added where the token is predicted."""

    def __init__(self, dim, grid_size):
        super().__init__()

    def null(self, value):
        return torch.zeros_like(value)

    def embed(self, value):
        return value


class Queried(Layout):
    """A query for each token."""

    name = "queries of a test"

    def places(self):
        return torch.arange(self.tokens)

    @property
    def content(self):
        queries = [Row(Holds.QUERY, t) for t in range(1, self.tokens)]
        tokens = [Row(Holds.TOKEN, t) for t in range(self.tokens - 1)]
        return (Row(Holds.CONDITION, 0), *(row for pair in zip(tokens, queries) for row in pair))

    @property
    def kept(self):
        return tuple(row.holds is not Holds.QUERY for row in self.content)

    @property
    def readers(self):
        return tuple((decode_step.Reader(2 * t),) for t in range(self.tokens))


LAYOUTS = {
    "raster": {},
    "few key heads, odd codebook": {"n_kv_head": 2, "vocab_size": 257},
    "PAR-4": {"ar_token_num": 4, "block_size": 36},
    "PAR-16": {"ar_token_num": 16, "block_size": 64},
    "NAR": {"layout": {"name": "neighbours"}, "block_size": 36},
    "scattered": {"layout": Scattered},
    "pairs": {"layout": Pairs},
    "text": TEXT,
    "text PAR-4": {**TEXT, "ar_token_num": 4},
    "text NAR": {**TEXT, "layout": {"name": "neighbours"}},
    "map": {"extra_conditions": {"map of a test": {}}},
    "map PAR-4": {"extra_conditions": {"map of a test": {}}, "ar_token_num": 4},
    "large": {"block_size": 441, "dim": 96, "n_layer": 1, "vocab_size": 40},
}


def tiny(layout=None, seed=4, **more) -> Transformer:
    of_args = {"layout": layout} if isinstance(layout, dict) else {}
    model = randomize(Transformer(ModelArgs(**{**TINY, **more, **of_args})), seed=seed, gain=1.3)
    if layout and not of_args:
        model.layout = layout(model.layout.grid_size, model.layout.prefix)
    return model


def keys_for(count: int, tokens: int = 16, seed: int = 7) -> torch.Tensor:
    return torch.randint(2**62, (count, tokens), generator=torch.Generator().manual_seed(seed))


def poison(model: Transformer) -> None:
    """Fill the model's cache with what no model computes."""
    cache = generation._caches[model]
    with torch.inference_mode():
        for tensor in (*cache.keys, *cache.values):
            tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0).normal_(0, 30)


@pytest.fixture
def spreads(monkeypatch):
    """The largest logit less the smallest one by token, of every call of generate."""
    states, begin = [], decode_step.DecodeState.begin
    monkeypatch.setattr(
        decode_step.DecodeState, "begin", lambda state, *args: states.append(state) or begin(state, *args)
    )
    return lambda: [state.spread[:, :-1] for state in states]


def asked(rng: random.Random, model: Transformer, batch: int) -> tuple[Conditions, dict]:
    """Return conditions and settings of a random call."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    settings: dict = {
        "noise": torch.randint(2**62, (batch, model.layout.tokens), generator=generator),
        "cfg_scale": rng.choice([1.0, 1.5, 3.0]),
        "cfg_interval": rng.choice([-1, -1, 0, 5, 11]),
        **rng.choice([{}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.9}, {"temperature": 0.0}, {"draw": "cdf"}]),
    }
    if settings.get("draw"):
        settings["noise"] = torch.rand(batch, model.layout.tokens, generator=generator)
    if rng.random() < 0.3:
        known = torch.randint(24, (batch, model.layout.tokens), generator=generator)
        settings["known"] = known.masked_fill(torch.rand(known.shape, generator=generator) < 0.7, -1)
    if model.args.model_type == "t2i":
        lengths = torch.randint(1, 7, (batch, 1), generator=generator)
        settings["emb_masks"] = (torch.arange(6) >= 6 - lengths).long()
        features = torch.randn(batch, 6, 32, generator=generator)
        if rng.random() < 0.5:
            settings["negative"], settings["negative_masks"] = features.flip(0), settings["emb_masks"].flip(0)
        return features, settings
    labels = torch.randint(5, (batch,), generator=generator)
    if rng.random() < 0.3:
        settings["negative"] = labels.flip(0)
    if model.args.extra_conditions:
        shape = batch, model.layout.tokens, model.args.dim
        return {
            "label": labels,
            "map of a test": torch.randn(shape, generator=generator).to(model.output.weight.dtype),
        }, settings
    return labels, settings


DRAFTERS = {
    "last": None,
    "zeros": lambda state, logits, places: torch.zeros_like(places),
    "random": lambda state, logits, places: torch.randint(24, places.shape),
    "wrong": lambda state, logits, places: (decode_step.draft_from_last(state, logits, places) + 1) % 24,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_windows_of_any_kind_draw_the_sequential_bits(name, dtype, spreads, caplog):
    rng = random.Random(f"{name} {dtype}")
    model = tiny(**LAYOUTS[name], seed=rng.randrange(99)).to(dtype)
    for _ in range(1 if name == "large" else 4):
        batch = rng.choice([1, 1, 2, 3, 5])
        condition, settings = asked(rng, model, batch)
        expected = generate(model, condition, **settings)
        for window in rng.sample([1, 2, 3, 8, 16, model.layout.tokens - 1], 1 if name == "large" else 3):
            poison(model)
            drafter = rng.choice(list(DRAFTERS))
            drawn = generate(model, condition, window=window, drafter=DRAFTERS[drafter], **settings)
            assert torch.equal(drawn, expected), (window, drafter, batch, settings)
        first, *others = spreads()[-4:]
        assert all(torch.equal(other, first) for other in others), "logits to the last bit"
    packed = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert ("windows are off" in caplog.text) is not packed


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "large"])
def test_drafts_of_another_model_draw_the_sequential_tokens(name):
    """The model's own drafts are right but for rounding, so that all windows are whole; another's change nothing."""
    rng = random.Random(name)
    model, other = tiny(**LAYOUTS[name]), tiny(**{**LAYOUTS[name], "dim": 64, "n_layer": 1}, seed=1)
    for batch in (1, 3):
        condition, settings = asked(rng, model, batch)
        expected, passes = generate(model, condition, **settings), []
        count = lambda done, tokens, passes=passes: passes.append(done)  # noqa: E731
        assert torch.equal(
            generate(model, condition, window=8, draft_model=copy.deepcopy(model), on_step=count, **settings), expected
        )
        window = window_of(model.layout, 8, len(model.layout.passes))
        step, least = 1, 1
        while step < len(model.layout.passes):
            step, least = window.limits[step], least + 1
        assert len(passes) == least
        if not model.args.extra_conditions:
            assert torch.equal(generate(model, condition, window=8, draft_model=other, **settings), expected)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"extra_conditions": {"map of a test": {}}}, "predicts two tokens from a row, and map of a test is added for one"),
        ({"target_positions": True}, "and the place of --random-orders is added for one"),
        ({"trunk": "rar"}, "tokens read by 2 heads, and the trunk 'rar' has 1"),
    ],
)  # fmt: skip
def test_two_heads_with_what_is_added_for_one_token_or_another_trunk_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelArgs(**{**TINY, **more, "layout": {"name": "neighbours"}}))


def test_draft_model_of_other_codes_or_layout_is_refused():
    for other in (tiny(vocab_size=25), tiny(ar_token_num=4), tiny(num_classes=6)):
        with pytest.raises(ValueError, match="the draft model has"):
            generate(tiny(), LABELS, window=8, draft_model=other)


def test_image_drawn_alone_equals_that_of_a_batch():
    model, keys = tiny(block_size=64), keys_for(4, 64)
    together = generate(model, LABELS, noise=keys, window=8, cfg_scale=2.0)
    for i in range(4):
        part = slice(i, i + 1)
        assert torch.equal(generate(model, LABELS[part], noise=keys[part], window=16, cfg_scale=2.0)[0], together[i])


def passes_of(model: Transformer, **settings) -> int:
    done = []
    generate(model, LABELS[:2], noise=keys_for(2, model.layout.tokens), on_step=lambda n, _: done.append(n), **settings)
    assert done == sorted(done) and done[-1] == model.layout.tokens
    return len(done)


@pytest.mark.parametrize("n, steps", [(1, 36), (4, 12)])
def test_number_of_passes_is_between_one_step_and_one_window_a_pass(n, steps):
    model = tiny(ar_token_num=n, block_size=36)
    sequence = generate(model, LABELS[:2], noise=keys_for(2, 36))[:, model.layout.order]
    padded = torch.cat([sequence, sequence[:, :1]], dim=1)
    assert passes_of(model) == steps
    assert passes_of(model, window=8, drafter=DRAFTERS["wrong"]) <= steps
    least = passes_of(model, window=8, drafter=lambda state, logits, places: padded.gather(1, places))
    assert least == (1 + -(-35 // 8) if n == 1 else 6), "PAR's first window ends with the group that is whole in it"
    assert least <= passes_of(model, window=8) <= steps


def test_number_of_passes_is_smaller_where_tokens_hardly_depend_on_those_before():
    model = tiny(block_size=64)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wo.weight.mul_(0.1)
        model.tok_embeddings.weight.mul_(0.1)
    assert passes_of(model, window=16) < 36


def test_tokens_that_are_reported_are_no_drafts():
    model, keys, seen = tiny(block_size=64), keys_for(4, 64), []
    codes = generate(
        model, LABELS, noise=keys, window=16, on_step=lambda done, tokens: seen.append((done, tokens.clone()))
    )
    assert len(seen) < 64
    for done, tokens in seen:
        assert tokens.shape == codes.shape and torch.equal(tokens[:, :done], codes[:, :done])


@pytest.mark.parametrize("n, count", [(1, 1), (1, 9), (4, 8)])
def test_fewer_tokens_in_windows_are_the_first_of_the_order(n, count):
    model, keys = tiny(ar_token_num=n), keys_for(4)
    expected = generate(model, LABELS, count, noise=keys)
    assert torch.equal(generate(model, LABELS, count, noise=keys, window=8), expected)


def test_layout_with_rows_that_are_overwritten_is_refused():
    with pytest.raises(ValueError, match=r"'queries of a test' overwrites rows of its queries.*--window 0"):
        window_of(Queried(4), 8, 16)
    assert Queried(4).steps[3].rows == range(4, 6), "a token, and the query in the place of the next one"


@pytest.mark.parametrize("window", [-1, 2.5, "many"])
def test_window_that_is_no_number_of_tokens_is_refused(window):
    with pytest.raises(ValueError, match=r"window is .*: give a number of tokens, 0"):
        generate(tiny(), LABELS, window=window)


def test_drafts_that_break_a_model_change_nothing():
    """A NaN that a draft leaves in the cache reaches the rows before it through their masks."""
    model, keys = tiny(), keys_for(4)
    drawn = generate(model, LABELS, noise=keys)
    unused = next(code for code in range(24) if code not in drawn)
    model.tok_embeddings.weight.data[unused] = float("nan")
    settings = {"window": 8, "drafter": lambda state, logits, places: torch.full_like(places, unused)}
    assert torch.equal(generate(model, LABELS, noise=keys, **settings), drawn)
    assert torch.equal(generate(model, LABELS, noise=keys, window=8), drawn)
    model.tok_embeddings.weight.data[drawn[0, 3]] = float("nan")
    with pytest.raises(NotFiniteLogits) as sequential:
        generate(model, LABELS, noise=keys)
    with pytest.raises(NotFiniteLogits) as caught:
        generate(model, LABELS, noise=keys, **settings)
    assert caught.value.steps == sequential.value.steps


def test_call_after_an_interrupted_one_draws_the_same():
    model, keys = tiny(), keys_for(4)
    expected = generate(model, LABELS, noise=keys)

    def interrupt(done: int, tokens: torch.Tensor) -> None:
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, LABELS, noise=keys, window=8, cfg_scale=2.0, on_step=interrupt)
    assert torch.equal(generate(model, LABELS, noise=keys, window=5), expected)
    assert torch.equal(generate(model, LABELS, noise=keys), expected)


@pytest.mark.parametrize("at_fault", ["rows_at_once", "attention_agrees", "activation_agrees"])
def test_windows_are_off_where_rows_round_by_their_number(at_fault, monkeypatch, caplog):
    monkeypatch.setattr(on_cpu, at_fault, lambda *_: 0)
    model, keys = tiny(), keys_for(4)
    with caplog.at_level(logging.WARNING):
        drawn = generate(model, LABELS, noise=keys, window=8)
        assert passes_of(model, window=8) == 16
    assert torch.equal(drawn, generate(model, LABELS, noise=keys)) and caplog.text.count("windows are off") == 1


def test_attention_that_rounds_by_rows_or_length_is_noticed(monkeypatch):
    shape = 24, 900, 1, torch.float32, 0
    agrees = on_cpu.attention_agrees.__wrapped__
    assert agrees(*shape)
    monkeypatch.setattr(on_cpu, "SUMMED_AT_ONCE", 900)
    monkeypatch.setattr(on_cpu, "row_sums", lambda w, v: (w @ v).sub(1e-7 * (v.shape[2] % 2)))
    assert not agrees(*shape)
    monkeypatch.setattr(on_cpu, "row_sums", lambda w, v: (w @ v).sub(1e-3 * (w.shape[2] == 1)))
    assert not agrees(*shape)


@pytest.mark.parametrize(
    "images, guided, layout, expected",
    [(1, True, {}, 8), (1, False, {}, 16), (2, True, {}, 0), (2, False, {}, 8), (3, False, {}, 0), (1, True, {"ar_token_num": 16}, 0),
     (1, True, {"layout": {"name": "neighbours"}}, 0)],
)  # fmt: skip
def test_auto_window_on_a_cpu_suits_batch_and_layout(images, guided, layout, expected, monkeypatch):
    model = tiny(**{"block_size": 64, **layout})
    sizes = []
    take = decode_step.take_pass
    monkeypatch.setattr(
        decode_step,
        "take_pass",
        lambda m, s, kind, d: sizes.append(kind.rows if kind.window else 0) or take(m, s, kind, d),
    )
    generate(model, LABELS[:1].expand(images), cfg_scale=2.0 if guided else 1.0, window="auto")
    assert set(sizes) == {expected}


# Recorded passes


@pytest.mark.parametrize("kind", ["raster", "PAR-4", "NAR", "text"])
def test_recorded_windows_draw_the_same_and_read_cursors_late(kind, recording, monkeypatch):
    """One recording serves all passes of a call, and later calls; passes after the end change nothing."""
    monkeypatch.setattr(on_cpu, "PASSES_LATE", 2)
    model, rng = tiny(**LAYOUTS[kind]), random.Random(kind)
    condition, settings = asked(rng, model, 4)
    settings |= {"cfg_scale": 2.0, "cfg_interval": 5, "draw": "race1", "temperature": 0.8, "top_k": 9, "top_p": 0.9}
    generate(model, condition, **{**settings, "noise": keys_for(4, model.layout.tokens)})  # the larger cache
    made = []
    for turn in range(3):
        for cfg_scale in (2.0, 3.0):
            now = settings | {"noise": keys_for(4, model.layout.tokens, turn), "cfg_scale": cfg_scale}
            expected = generate(model, condition, **now)
            assert torch.equal(generate(model, condition, window=8, compile=True, **now), expected)
            made.append(Recording.made)
    assert made[0] == made[-1] == 1


def test_windows_of_compiled_passes_are_off_on_a_cpu(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "compiled_decode_rows", lambda: decode_step.decode_rows)
    monkeypatch.setattr(compiled, "compiled_race", lambda: draw_race)
    assert passes_of(tiny(), window=8, compile=True) == 16 and "windows are off" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["raster", "PAR-4", "NAR", "text"])
def test_windows_on_a_gpu_equal_windows_that_take_one_step_a_pass(kind, compile, monkeypatch):
    """Of one size: rounding goes by the number of rows there."""
    monkeypatch.setattr(plans, "window_of", lambda *asked: next(windows)(window_of(*asked)))
    windows = cycle(
        [
            lambda window: window,
            lambda window: replace(window, limits=(*range(1, len(window.limits)), window.limits[-1])),
        ]
    )
    model, rng = tiny(**LAYOUTS[kind]).to("cuda"), random.Random(kind)
    condition, settings = asked(rng, model, 4)
    settings |= {"cfg_scale": 2.0, "draw": "race1", "noise": keys_for(4, model.layout.tokens)}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for _ in range(3):  # plain, recorded, replayed
            drawn = [generate(model, condition, window=8, compile=compile, **settings) for _ in range(2)]
            assert torch.equal(*drawn)


def test_layout_of_the_registry_has_windows_of_whole_groups():
    window = window_of(build_layout({"name": "parallel", "group_size": 4}, 4), 6, 7)
    assert (window.rows, window.outputs) == (8, 8) and window.limits[1:] == (5, 5, 5, 6, 7, 7, 7)
