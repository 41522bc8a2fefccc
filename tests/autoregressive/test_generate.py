"""The decode loop against one without a cache, and what it promises about caches, steps, conditions and errors."""

import copy
import gc
import weakref
from math import isqrt

import pytest
import torch

from autoregressive.models import compiled, decode_step, on_cpu
from autoregressive.models import generate as generation
from autoregressive.models.generate import generate, release_cache
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.layouts import Reader
from autoregressive.models.sampling import NotFiniteLogits, SamplingConfig, choose, draw_race
from tests.autoregressive.decoding import Pairs, Recording
from tests.helpers import randomize
from utils.rng import image_noise

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"dim": 32, "n_layer": 3, "n_head": 4, "multiple_of": 32, "vocab_size": 24, "num_classes": 5, "block_size": 16}
TEXT = {"model_type": "t2i", "cls_token_num": 6, "caption_dim": 12}
LABELS = torch.tensor([3, 0, 4, 1])


def tiny(**more) -> Transformer:
    return randomize(Transformer(ModelArgs(**{**TINY, **more})), seed=4, gain=1.3)


def noise_for(count: int, tokens: int = 16) -> torch.Tensor:
    return image_noise(7, range(count), tokens)


def captions(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[0] * (6 - length) + [1] * length for length in lengths])
    features = torch.randn(len(lengths), 6, 12, generator=torch.Generator().manual_seed(3))
    return features * mask[..., None], mask


@torch.no_grad()
def without_cache(model, cond, noise, emb_masks=None, cfg_scale=1.0, cfg_interval=-1, **settings) -> torch.Tensor:
    """Runs the whole model over all known tokens at every step, conditional and unconditional rows apart."""
    n, total = model.args.ar_token_num, model.args.block_size
    side, diagonals = isqrt(total), model.layout.name == "neighbours"
    config = SamplingConfig(**settings)
    known = torch.zeros(len(cond), 0, dtype=torch.long)
    while known.shape[1] < total:
        done = known.shape[1]
        width = 1 if done < n else n
        if diagonals:
            width = side - abs(side - 1 - diagonal_at(done, side))
            guided = cfg_interval < 0 or done <= cfg_interval
        elif done == 0:
            guided = True
        elif done < n:
            guided = cfg_interval < 0 or done - 1 <= cfg_interval
        else:
            guided = cfg_interval < 0 or done - n <= cfg_interval
        logits = model(known, cond, prefix_mask=emb_masks)[:, done : done + width]
        if guided and cfg_scale > 1:
            nothing = torch.ones(len(cond), dtype=torch.bool)
            without = model(known, cond, prefix_mask=emb_masks, drop=nothing)[:, done : done + width]
            logits = without + cfg_scale * (logits - without)
        known = torch.cat([known, choose(logits, config, noise[:, done : done + width])], dim=1)
    raster = torch.empty_like(known)
    raster[:, model.layout.order] = known
    return raster


def diagonal_at(cells: int, side: int) -> int:
    """Return the number of the diagonal before which stand so many cells."""
    return sorted(row + column for row in range(side) for column in range(side))[cells]


KINDS = {
    "raster": {},
    "PAR-4": {"ar_token_num": 4},
    "PAR-16": {"ar_token_num": 16, "block_size": 64},
    "NAR": {"layout": {"name": "neighbours"}, "block_size": 36},
    "few key heads": {"n_kv_head": 2, "ar_token_num": 4},
}
SETTINGS = {
    "plain": {},
    "guided": {"cfg_scale": 3.0},
    "interval 0": {"cfg_scale": 3.0, "cfg_interval": 0},
    "interval 2": {"cfg_scale": 3.0, "cfg_interval": 2},
    "interval 5": {"cfg_scale": 3.0, "cfg_interval": 5},
    "greedy": {"cfg_scale": 2.0, "sample_logits": False},
    "filters": {"cfg_scale": 1.5, "temperature": 0.8, "top_k": 9, "top_p": 0.9},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("more", KINDS.values(), ids=KINDS)
def test_the_cache_changes_nothing(more, settings):
    model = tiny(**more)
    noise = noise_for(4, model.layout.tokens)
    codes = generate(model, LABELS, noise=noise, **settings)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, without_cache(model, LABELS, noise, **settings))
    assert len(codes.unique()) > 4 and (codes[0] != codes[1]).any()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("n", [1, 4])
def test_captions_of_different_lengths(n, settings):
    model = tiny(**TEXT, ar_token_num=n)
    features, mask = captions(6, 2, 1, 4)
    codes = generate(model, features, emb_masks=mask, noise=noise_for(4), **settings)
    assert torch.equal(codes, without_cache(model, features, noise_for(4), mask, **settings))
    if settings == {}:
        assert not torch.equal(codes, generate(model, features, noise=noise_for(4)))
    for row in range(4):
        part = slice(row, row + 1)
        alone = generate(model, features[part], emb_masks=mask[part], noise=noise_for(4)[part], **settings)
        assert torch.equal(alone[0], codes[row])


def test_settings_change_the_tokens():
    """Otherwise the comparisons above say nothing."""
    drawn = {name: generate(tiny(), LABELS, noise=noise_for(4), **settings) for name, settings in SETTINGS.items()}
    different = [name for name in drawn if not torch.equal(drawn[name], drawn["plain"])]
    assert different == [name for name in SETTINGS if name != "plain"]
    assert not torch.equal(drawn["interval 0"], drawn["interval 2"])
    assert not torch.equal(drawn["interval 2"], drawn["interval 5"])


def test_a_batch_without_masks_equals_one_of_whole_captions():
    model = tiny(**TEXT)
    features, mask = captions(6, 6)
    drawn = generate(model, features, emb_masks=mask, noise=noise_for(2), cfg_scale=2.0)
    assert torch.equal(drawn, generate(model, features, noise=noise_for(2), cfg_scale=2.0))


# Negative conditions


@pytest.mark.parametrize("n", [1, 4])
def test_negative_equal_to_none_draws_the_same_bits(n):
    model, settings = tiny(ar_token_num=n), {"noise": noise_for(4), "cfg_scale": 3.0}
    expected = generate(model, LABELS, **settings)
    assert torch.equal(generate(model, LABELS, negative=torch.full((4,), 5), **settings), expected)
    mixed = generate(model, LABELS, negative=torch.tensor([5, 2, 5, 5]), **settings)
    assert torch.equal(mixed != expected, mixed.ne(expected) & torch.tensor([[0], [1], [0], [0]], dtype=torch.bool))
    assert not torch.equal(mixed, expected)
    text = tiny(**TEXT, ar_token_num=n)
    features, mask = captions(6, 2, 1, 4)
    null = text.cls_embedding.null(features)
    assert torch.equal(
        generate(text, features, emb_masks=mask, negative=null, **settings),
        generate(text, features, emb_masks=mask, **settings),
    )


def test_negative_masks_count_without_masks_of_the_captions():
    model, settings = tiny(**TEXT), {"noise": noise_for(2), "cfg_scale": 3.0}
    features, whole = captions(6, 6)
    negative, mask = captions(2, 3)
    drawn = generate(model, features, negative=negative, negative_masks=mask, **settings)
    assert torch.equal(
        drawn, generate(model, features, emb_masks=whole, negative=negative, negative_masks=mask, **settings)
    )
    assert not torch.equal(drawn, generate(model, features, negative=negative, **settings))


@pytest.mark.parametrize(
    "negative, message",
    [
        (torch.tensor([1, 2]), "2 negative conditions for 4 images"),
        (torch.tensor([1, 2, 3, 6]), "label 6 is out of range"),
        (torch.tensor([1.0, 2, 3, 4]), "whole numbers"),
    ],
)
def test_negatives_that_do_not_fit_raise(negative, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), LABELS, negative=negative, cfg_scale=2.0)


# Caches


def test_caches_are_reused_until_a_batch_needs_more():
    model = tiny()
    first = generate(model, LABELS, noise=noise_for(4))
    cache = generation._caches[model]
    storage = [tensor.data_ptr() for tensor in cache.keys + cache.values]
    assert torch.equal(generate(model, LABELS[:2], noise=noise_for(4)[:2]), first[:2])
    assert torch.equal(generate(model, LABELS, noise=noise_for(4)), first)
    assert generation._caches[model] is cache and cache.rows == 32
    assert [tensor.data_ptr() for tensor in cache.keys + cache.values] == storage
    generate(model, LABELS, noise=noise_for(4), cfg_scale=2.0)
    assert len(generation._caches[model].keys[0]) == 8


def test_what_an_earlier_image_left_in_the_cache_is_not_seen():
    model = tiny(ar_token_num=4)
    expected = generate(model, LABELS, noise=noise_for(4), cfg_scale=2.0)
    cache = generation._caches[model]
    with torch.inference_mode():
        for tensor in cache.keys + cache.values:
            tensor.fill_(1e4)
    assert torch.equal(generate(model, LABELS, noise=noise_for(4), cfg_scale=2.0), expected)


def test_a_cache_follows_the_weights():
    model = tiny()
    generate(model, LABELS, noise=noise_for(4))
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, LABELS, noise=noise_for(4))
        assert generation._caches[model].keys[0].dtype == torch.bfloat16
    generate(model.to(torch.bfloat16), LABELS, noise=noise_for(4))
    assert generation._caches[model].keys[0].dtype == torch.bfloat16
    generate(model.float(), LABELS, noise=noise_for(4))
    assert generation._caches[model].keys[0].dtype == torch.float32


def test_a_model_takes_its_cache_with_it():
    model = tiny()
    generate(model, LABELS)
    keys = weakref.ref(generation._caches[model].keys[0])
    del model
    gc.collect()
    assert keys() is None


# Numbers of tokens, steps


@pytest.mark.parametrize("n, count", [(1, 0), (1, 17), (4, 6), (4, 15)])
def test_numbers_of_tokens_the_layout_cannot_stop_at(n, count):
    with pytest.raises(ValueError, match=rf"max_new_tokens is {count}.*16 tokens"):
        generate(tiny(ar_token_num=n), LABELS, count)


@pytest.mark.parametrize("n, count", [(1, 1), (1, 15), (4, 3), (4, 8)])
def test_fewer_tokens_are_the_first_of_the_order_in_raster_order(n, count):
    model = tiny(ar_token_num=n)
    every = generate(model, LABELS, noise=noise_for(4))
    drawn = model.layout.order[:count].sort().values
    assert torch.equal(generate(model, LABELS, count, noise=noise_for(4)), every[:, drawn])


def test_known_tokens_stay_and_steer_the_others():
    model = tiny()
    every = generate(model, LABELS, noise=noise_for(4))
    known = torch.full_like(every, -1)
    assert torch.equal(generate(model, LABELS, noise=noise_for(4), known=known), every)
    known[:, 3] = (every[:, 3] + 1) % 24
    filled = generate(model, LABELS, noise=noise_for(4), known=known)
    assert torch.equal(filled[:, :3], every[:, :3]) and torch.equal(filled[:, 3], known[:, 3])
    assert not torch.equal(filled[:, 4:], every[:, 4:])
    with pytest.raises(ValueError, match="known tokens are whole numbers"):
        generate(model, LABELS, known=known[:, :3])


@pytest.mark.parametrize("n, ends", [(1, [*range(1, 17)]), (4, [1, 2, 3, 4, 8, 12, 16]), (16, [*range(1, 17)])])
def test_the_tokens_so_far_are_reported(n, ends):
    model, seen = tiny(ar_token_num=n), []
    codes = generate(
        model, LABELS, noise=noise_for(4), on_step=lambda done, tokens: seen.append((done, tokens.clone()))
    )
    sequence = codes[:, model.layout.order]
    for done, tokens in seen:
        assert tokens.shape == (4, 16) and torch.equal(tokens[:, :done], sequence[:, :done])
    assert [done for done, _ in seen] == ends


def test_unconditional_rows_stop_with_the_last_guided_step(monkeypatch):
    model, rows = tiny(ar_token_num=4), []
    draw_tokens = decode_step.draw_tokens
    monkeypatch.setattr(
        decode_step, "draw_tokens", lambda logits, *args: rows.append(len(logits)) or draw_tokens(logits, *args)
    )
    for interval, expected in ((-1, [8] * 7), (1, [8] * 5 + [4] * 2), (0, [8] * 5 + [4] * 2), (4, [8] * 6 + [4])):
        rows.clear()
        generate(model, LABELS, cfg_scale=2.0, cfg_interval=interval)
        assert rows == expected, interval
    rows.clear()
    generate(model, LABELS)
    assert rows == [4] * 7


# Modes


@pytest.mark.parametrize("training", [False, True])
def test_the_training_flag_is_restored(training):
    model = tiny().train(training)
    drawn = generate(model, LABELS, noise=noise_for(4))
    assert torch.equal(drawn, generate(tiny(), LABELS, noise=noise_for(4))), "dropouts are off meanwhile"
    assert all(module.training == training for module in model.modules())

    def interrupt(done, tokens):
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, LABELS, on_step=interrupt)
    assert all(module.training == training for module in model.modules())


def test_generate_with_the_draw_of_earlier_editions_takes_uniform_numbers():
    model, noise = tiny(), image_noise(7, range(4), 16, "cdf")
    drawn = generate(model, LABELS, noise=noise, draw="cdf", cfg_scale=2.0)
    assert torch.equal(drawn, without_cache(model, LABELS, noise, draw="cdf", cfg_scale=2.0))
    keys = noise_for(4)
    for draw, other in (("race1", noise), ("cdf", keys), ("race1", keys[:1]), ("race1", keys[:, :15])):
        with pytest.raises(ValueError, match=rf"noise for the draw {draw} is .* of shape \(4, 16\)"):
            generate(model, LABELS, noise=other, draw=draw)
    assert SamplingConfig(draw="cdf").operations != SamplingConfig().operations, "each has its recorded steps"


def test_noise_is_drawn_from_the_global_generator():
    torch.manual_seed(1)
    first = generate(tiny(), LABELS)
    assert not torch.equal(first, generate(tiny(), LABELS))
    torch.manual_seed(1)
    assert torch.equal(first, generate(tiny(), LABELS))


FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "n, dtype, threads",
    [(1, FLOAT, 1), (4, FLOAT, 1), (1, HALF, 1), (4, HALF, 1), pytest.param(1, FLOAT, 2, marks=pytest.mark.slow)],
)
def test_a_row_gives_the_same_bits_at_any_place(n, dtype, threads, monkeypatch):
    """In batches of whole multiples of eight, as the pipeline makes them: logits to the last bit."""
    model = tiny(ar_token_num=n, n_layer=1, dim=128).to(dtype)
    labels, noise = torch.arange(24) % 5, noise_for(24)
    logits = []
    draw_tokens = decode_step.draw_tokens
    monkeypatch.setattr(
        decode_step,
        "draw_tokens",
        lambda x, state, *args: logits.append(x[: state.batch]) or draw_tokens(x, state, *args),
    )

    def run(rows):
        logits.clear()
        generate(model, labels[rows], noise=noise[rows], cfg_scale=3.0, cfg_interval=9)
        return torch.cat(logits, dim=1)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = run(torch.arange(24))
        for rows in (torch.arange(16), torch.arange(23, 15, -1)):
            assert torch.equal(run(rows), together[rows])
    finally:
        torch.set_num_threads(before)


def test_laying_the_cache_out_keeps_its_rows():
    cache = StaticCache(2, 3, 2, 17, 4, torch.device("cpu"), FLOAT)
    at, (k, v) = torch.arange(5), torch.randn(2, 3, 2, 5, 4)
    addresses = [tensor.data_ptr() for tensor in cache.keys + cache.values]
    cache.lay_out(5)
    for layer in range(2):
        cache.update(layer, at, k + layer, v + layer, 5)
    for length in (8, 17, 8, 5, 16, 16, 17):
        cache.lay_out(length)
        for layer in range(2):
            keys, values = cache.update(layer, torch.tensor([4]), k[:, :, 4:] + layer, v[:, :, 4:] + layer, length)
            assert torch.equal(keys[:, :, :5], k + layer) and torch.equal(values[:, :, :5], v + layer)
            assert keys.shape == (3, 2, length, 4) and keys.is_contiguous() and values.is_contiguous()
    assert [tensor.data_ptr() for tensor in cache.keys + cache.values] == addresses and cache.rows == 17


def test_lay_out_of_more_rows_leaves_nothing_of_other_samples_in_them():
    cache = StaticCache(1, 3, 2, 17, 4, torch.device("cpu"), FLOAT)
    cache.lay_out(5)
    k = torch.stack([torch.ones(2, 5, 4), torch.full((2, 5, 4), float("nan")), torch.ones(2, 5, 4)])
    cache.update(0, torch.arange(5), k, k, 5)
    for length in (8, 17, 5, 17):
        cache.lay_out(length)
        assert cache.keys[0][[0, 2]].isfinite().all() and cache.values[0][[0, 2]].isfinite().all()


@pytest.mark.parametrize("stride", [3, 128])
@pytest.mark.parametrize("kind", [{}, {"ar_token_num": 4}, TEXT], ids=["class", "PAR", "text"])
def test_reading_the_cache_past_its_filled_part(kind, stride, monkeypatch):
    """As steps of fixed shapes do, which a GPU replays: what lies there changes nothing."""
    model = tiny(**kind)
    condition, mask = captions(6, 2, 1, 4) if kind is TEXT else (LABELS, None)
    settings = {"emb_masks": mask, "noise": noise_for(4), "cfg_scale": 3.0, "cfg_interval": 4}
    expected = generate(model, condition, **settings)
    monkeypatch.setattr(on_cpu, "read_stride", lambda *_: stride)
    assert torch.equal(generate(model, condition, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raster", "NAR", "few key heads", "text PAR-4"])
def test_recorded_steps_change_nothing(kind, recording):
    """One recording serves the later steps of its kind, and later calls with other images, scales and temperatures."""
    kinds = KINDS | {"text": TEXT, "text PAR-4": {**TEXT, "ar_token_num": 4}}
    model = tiny(**kinds[kind])
    condition, mask = captions(6, 2, 1, 4) if "text" in kind else (LABELS, None)
    generate(model, condition, emb_masks=mask, cfg_scale=2.0)  # makes the larger cache
    made = []
    for turn in range(3):
        names = ("plain", "guided", "interval 2", "greedy", "filters")
        others = {"cfg_scale": 2.5, "temperature": 1.7, "top_k": 9, "top_p": 0.5}  # of one recording with "filters"
        for settings in [*(SETTINGS[name] for name in names), others]:
            noise = noise_for(4, model.layout.tokens).roll(turn)
            asked = {"noise": noise, "emb_masks": mask, **settings}
            given = generate(model, condition, compile=True, **asked)
            assert torch.equal(given, without_cache(model, condition, **asked)), settings
        made.append(Recording.made)
    assert 0 < made[0] <= made[1] == made[2], "what comes once a call is recorded in the second"


@pytest.mark.slow
def test_when_steps_are_recorded_anew(recording):
    model = tiny()

    def draw(labels=LABELS, **settings):
        before = Recording.made
        expected = generate(copy.deepcopy(model), labels, noise=noise_for(len(labels)), **settings)
        assert torch.equal(generate(model, labels, noise=noise_for(len(labels)), compile=True, **settings), expected)
        return Recording.made - before

    assert draw() == 2, "one for each eight rows of the cache, of which there are 17"
    assert draw() == draw(temperature=0.5) == 0
    assert draw(LABELS[:2]) == 2, "another batch"
    assert draw() == 2, "the recordings of one batch are kept"
    assert draw(top_k=4) == 2 and draw(top_k=5) == 2 and draw(top_k=4, top_p=0.5) == 2 and draw(top_k=4, top_p=0.9) == 0
    with torch.no_grad():
        model.output.weight.mul_(-1)
    assert draw() == 0, "weights written in place"
    model.output.weight.data = model.output.weight.data.clone()
    assert draw() == 2, "weights elsewhere"
    assert draw(cfg_scale=2.0) == 2 and draw(cfg_scale=3.0) == 0, "a larger cache"
    release_cache(model)
    assert model not in generation._graphs and draw(cfg_scale=3.0) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert draw(cfg_scale=3.0) == 0


@pytest.mark.slow
def test_recorded_compiled_steps_change_nothing(recording_compiled):
    """Unguided steps come late, so that the last rows of the cache are compiled first too."""
    torch._dynamo.reset()
    model = tiny(n_layer=1, block_size=9)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for settings in ({"cfg_scale": 3.0, "cfg_interval": 6}, {"cfg_scale": 2.0, "cfg_interval": 2, "top_k": 9}):
            asked = {"noise": noise_for(4, 9), **settings}
            given = generate(model, LABELS, compile=True, **asked)
            assert torch.equal(given, without_cache(model, LABELS, **asked)), settings
    assert Recording.made


def test_compiled_passes_of_many_sizes_are_of_a_few(monkeypatch):
    """Compile few sizes of passes for eleven diagonals of one to six rows."""
    monkeypatch.setattr(compiled, "compiled_decode_rows", lambda: decode_step.decode_rows)
    monkeypatch.setattr(compiled, "compiled_race", lambda: draw_race)
    model, kinds, noise = tiny(**KINDS["NAR"]), set(), noise_for(4, 36)
    take = decode_step.take_pass
    monkeypatch.setattr(
        decode_step, "take_pass", lambda m, s, kind, d: kinds.add((kind.rows, kind.outputs)) or take(m, s, kind, d)
    )
    expected = generate(model, LABELS, noise=noise, cfg_scale=2.0)
    assert len(kinds) == 10
    kinds.clear()
    assert torch.equal(generate(model, LABELS, noise=noise, cfg_scale=2.0, compile=True), expected)
    assert kinds == {(2, 3), (4, 5), (6, 6)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{"ar_token_num": 4}, {"layout": {"name": "neighbours"}, "block_size": 9}], ids=["PAR", "NAR"]
)
def test_compiled_steps_change_nothing(layout):
    """Against the loop without caches; and no step falls back on plain code for too many shapes."""
    torch._dynamo.reset()
    model = tiny(**TEXT, **layout, n_kv_head=2, n_layer=1)
    condition, mask = captions(6, 2, 1, 4)
    noise = noise_for(4, model.layout.tokens)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for name in ("greedy", "filters"):  # all guided: each number of rows is compiled once
            asked = {"noise": noise, "emb_masks": mask, **SETTINGS[name]}
            drawn = generate(model, condition, compile=True, **asked)
            assert torch.equal(drawn, without_cache(model, condition, **asked)), name


# Errors


@pytest.mark.parametrize(
    "condition, message",
    [
        (torch.tensor([0, -1, 2]), "label -1 is out of range: the model has classes 0 to 4"),
        (torch.tensor([0, 5, 2]), "label 5 is out of range"),
        (torch.tensor([0.0, 1.0]), "labels are whole numbers of shape"),
        (torch.tensor([[1], [2]]), "labels are whole numbers of shape"),
        (torch.zeros(2, 5, 12), r"shape \(B, 6, 12\), got"),
        (torch.zeros(6, 12), r"shape \(B, 6, 12\), got"),
    ],
)
def test_conditions_that_do_not_fit_raise(condition, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(**(TEXT if "shape (B" in message.replace("\\", "") else {})), condition)


def broken(label: int, value: float, **more) -> Transformer:
    """A model whose embedding of one class is not finite, and so its logits and its part of the cache."""
    model = tiny(**more)
    model.cls_embedding.embedding_table.weight.data[label, 0] = value
    return model


@pytest.mark.parametrize(
    "n, settings, value",
    [(1, "plain", "inf"), (1, "interval 2", "-inf"), (4, "guided", "nan"), (4, "greedy", "nan"), (1, "filters", "nan")],
)
def test_generate_with_logits_that_are_not_finite_raises_for_their_images_alone(n, settings, value):
    settings, value = SETTINGS[settings], float(value)
    whole, labels, noise = tiny(ar_token_num=n), torch.tensor([3, 0, 3, 1]), noise_for(4)
    expected = generate(whole, labels, noise=noise, **settings)
    with pytest.raises(NotFiniteLogits, match=r"of 2 of 4 images .* decode step 1 on, in float32: ") as caught:
        generate(broken(3, value, ar_token_num=n), labels, noise=noise, **settings)
    assert caught.value.steps == [1, None, 1, None]
    assert torch.equal(caught.value.tokens[[1, 3]], expected[[1, 3]])
    assert caught.value.of(slice(1, 2)) is None and caught.value.of(slice(2, 4)).steps == [1, None]


@pytest.mark.parametrize("n, step", [(1, 6), (4, 5)])
def test_generate_with_a_broken_code_names_the_first_step_that_reads_it(n, step):
    """Four of PAR's sixteen tokens come singly, the others in three steps, which begin with the fifth step."""
    model, noise = tiny(ar_token_num=n), noise_for(1)
    drawn = generate(model, LABELS[:1], noise=noise)[0, model.layout.order]
    first = next(
        token for token in drawn[3 if n > 1 else 4 :] if int((drawn == token).nonzero()[0]) == (3 if n > 1 else 4)
    )
    model.tok_embeddings.weight.data[first] = float("nan")
    with pytest.raises(NotFiniteLogits) as caught:
        generate(model, LABELS[:1], noise=noise)
    assert caught.value.steps == [step]


def test_generate_in_fp16_that_overflows_names_the_precision():
    model = tiny()
    model.layers[0].feed_forward.w2.weight.data *= 1e5
    generate(model, LABELS, noise=noise_for(4))
    with pytest.raises(NotFiniteLogits, match="in fp16: give --precision bf16 or none"):
        generate(copy.deepcopy(model).half(), LABELS, noise=noise_for(4))
    generate(model.bfloat16(), LABELS, noise=noise_for(4))


def test_generate_with_guidance_that_overflows_raises():
    with pytest.raises(NotFiniteLogits, match="a smaller --cfg-scale"):
        generate(tiny(), LABELS, noise=noise_for(4), cfg_scale=3e38)


def test_recorded_steps_with_logits_that_are_not_finite_raise_and_go_on(recording):
    model, noise, labels = broken(3, float("nan")), noise_for(4), torch.tensor([2, 0, 4, 1])
    expected = generate(tiny(), labels, noise=noise, cfg_scale=2.0)
    for _ in range(3):  # plain, recorded, replayed
        with pytest.raises(NotFiniteLogits) as caught:
            generate(model, LABELS, noise=noise, cfg_scale=2.0, compile=True)
        assert caught.value.steps == [1, None, None, None]
        assert torch.equal(generate(model, labels, noise=noise, cfg_scale=2.0, compile=True), expected)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("kind", ["raster", "text"])
def test_generate_after_a_broken_image_draws_as_before(kind, stopped, monkeypatch):
    """A NaN past the filled part of a cache would count through the mask."""
    monkeypatch.setattr(on_cpu, "read_stride", lambda *_: 8)
    model, noise = tiny(**(TEXT if kind == "text" else {})), noise_for(4)
    condition, mask = captions(6, 2, 1, 4) if kind == "text" else (LABELS, None)
    expected = generate(model, condition, emb_masks=mask, noise=noise)
    last = model.layers[-1].attention.wqkv.weight

    def end(done, _):
        if stopped and done == 12:
            raise KeyboardInterrupt

    kept = last.detach().clone()
    with torch.no_grad():
        last[-1] = float("nan")
    with pytest.raises(KeyboardInterrupt if stopped else NotFiniteLogits):
        generate(model, condition, emb_masks=mask, noise=noise, on_step=end)
    with torch.no_grad():
        last.copy_(kept)
    assert torch.equal(generate(model, condition, emb_masks=mask, noise=noise), expected)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"sample_logits": False}])
@pytest.mark.parametrize("compile", [False, True])
def test_generate_of_the_likeliest_tokens_does_not_depend_on_the_noise(compile, settings, recording):
    """In bf16 many logits tie."""
    model = tiny().bfloat16()
    model.output.weight.data.mul_(0.01).round_(decimals=2)
    greedy = generate(model, LABELS, sample_logits=False, cfg_scale=1.5)
    for seed in range(4):
        noise = image_noise(seed, range(4), 16)
        assert torch.equal(generate(model, LABELS, noise=noise, cfg_scale=1.5, compile=compile, **settings), greedy)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_layout_with_readers_and_a_mask_inside_its_steps_draws_what_the_forward_pass_predicts(cfg_scale):
    model = tiny()
    model.layout = Pairs(4)
    steps = model.layout.steps
    assert steps[1].reads == ((Reader(0),), (Reader(0),)) and steps[2].sees == ((True, False), (True, True))
    drawn = generate(model, LABELS, sample_logits=False, cfg_scale=cfg_scale).clone()
    inputs = drawn[:, : -model.layout.step_tokens]
    logits = model(inputs, LABELS)
    if cfg_scale > 1:
        none = model(inputs, LABELS, drop=torch.ones(len(LABELS), dtype=torch.bool))
        logits = none + (logits - none) * cfg_scale
    assert torch.equal(logits.argmax(-1), drawn)
