"""Filling a hole: the posterior by enumeration, determinism over batches and windows, and what stays."""

import random
from itertools import product

import numpy as np
import pytest
import torch

from autoregressive.models import generate as generation
from autoregressive.models.build import build_model
from autoregressive.models.generate import generate, image_order
from autoregressive.models.particles import effective_sizes, fill, resampled
from autoregressive.models.sampling import NotFiniteLogits, SamplingConfig, filter_logits
from autoregressive.models.trunk import ModelArgs
from tests.autoregressive.test_windows import LAYOUTS, asked, poison, tiny
from tests.helpers import randomize
from utils.rng import image_noise, order_seed, particle_noise

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"dim": 16, "n_layer": 1, "n_head": 1, "multiple_of": 16, "num_classes": 3}


def small(seed: int, **more):
    return randomize(build_model(ModelArgs(**{**SMALL, **more})), seed=seed)


def every_fill(known: torch.Tensor, codes: int) -> torch.Tensor:
    """Return all images with these known tokens (N,): (fills, N)."""
    holes = (known < 0).nonzero()[:, 0]
    images = known.repeat(codes ** len(holes), 1)
    images[:, holes] = torch.tensor(list(product(range(codes), repeat=len(holes))))
    return images


@torch.no_grad()
def log_probabilities(model, images, label=1, scale=1.0, temperature=1.0, **filters) -> tuple[torch.Tensor, ...]:
    """Return the logarithms of the sampling and of the unfiltered distribution at images' tokens, (B, N) in raster order."""
    order = model.layout.order
    tokens, labels = images[:, order], torch.full((len(images),), label)
    logits = model(tokens[:, : len(order) - model.layout.step_tokens], labels)
    if scale != 1:
        without = model(tokens[:, : len(order) - model.layout.step_tokens], labels, drop=labels > 0)
        logits = without + scale * (logits - without)
    logits = logits / temperature
    own = (filter_logits(logits, **filters), logits)
    return tuple(x.double().log_softmax(-1).gather(2, tokens[..., None])[..., 0][:, order.argsort()] for x in own)


def fills(model, known: torch.Tensor, runs: int, particles: int, label=1, **settings):
    """Fill the same hole `runs` times. Returns the tokens, and exp(log evidence) of each."""
    images = [(7, i) for i in range(runs)]
    filled = fill(model, torch.full((runs,), label), known.repeat(runs, 1), images, particles=particles, **settings)
    return filled.tokens, np.exp(filled.log_evidence)


def variation(found: torch.Tensor, images: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the total variation between found images and a distribution over all of them."""
    counts = (found[:, None] == images[None]).all(-1).float().mean(0)
    return float((counts - expected).abs().sum() / 2)


def noise_of(expected: torch.Tensor, runs: int) -> float:
    """Return the total variation that as many perfect draws have on average."""
    draws = np.random.RandomState(0).multinomial(runs, (expected / expected.sum()).numpy(), size=200) / runs
    return float(np.abs(draws - expected.numpy()).sum(1).mean() / 2)


@pytest.mark.parametrize("particles, runs", [(1, 2000), (16, 1000), pytest.param(256, 500, marks=pytest.mark.slow)])
def test_particles_on_an_enumerable_grid_approach_the_posterior(particles, runs):
    model, known = small(3, vocab_size=4, block_size=4), torch.tensor([-1, 3, -1, 1])
    images = every_fill(known, 4)
    chosen, unfiltered = log_probabilities(model, images)
    joint = unfiltered.sum(1)
    posterior, copied = joint.softmax(0), chosen[:, [0, 2]].sum(1).exp()
    found, evidence = fills(model, known, runs, particles)
    assert torch.equal(found[:, [1, 3]], known[[1, 3]].expand(runs, -1))
    assert 0.5 * float((posterior - copied).abs().sum()) > 0.4
    expected, more = (copied, 0.02) if particles == 1 else (posterior, 0.06 if particles == 16 else 0.02)
    assert variation(found, images, expected) < noise_of(expected, runs) + more
    ratio = evidence / float(joint.logsumexp(0).exp())
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / runs**0.5


def test_groups_of_parallel_tokens_approach_the_posterior():
    model = small(3, vocab_size=2, block_size=16, ar_token_num=4)
    known = torch.full((16,), -1)
    known[[2, 3, 6, 7, 10, 11, 13, 14]] = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1])  # every group has some of each
    images = every_fill(known, 2)
    joint = log_probabilities(model, images)[1].sum(1)
    posterior, runs = joint.softmax(0), 600
    found, evidence = fills(model, known, runs, 32)
    share = (images[:, [0, 5, 12, 15]].float() * posterior[:, None]).sum(0)
    assert torch.allclose(found[:, [0, 5, 12, 15]].double().mean(0), share.double(), atol=0.06)
    assert variation(found, images, posterior) < noise_of(posterior, runs) + 0.03
    ratio = evidence / float(joint.logsumexp(0).exp())
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / runs**0.5


def test_guidance_and_filters_have_the_target_that_is_told():
    model, known, runs = small(3, vocab_size=4, block_size=4), torch.tensor([-1, 3, -1, 1]), 1000
    images = every_fill(known, 4)
    chosen, unfiltered = log_probabilities(model, images, scale=1.5, temperature=0.8, top_k=2)
    joint = chosen[:, [0, 2]].sum(1) + unfiltered[:, [1, 3]].sum(1)
    found, evidence = fills(model, known, runs, 32, cfg_scale=1.5, temperature=0.8, top_k=2)
    posterior = joint.softmax(0)
    assert variation(found, images, posterior) < noise_of(posterior, runs) + 0.04
    ratio = evidence / float(joint.logsumexp(0).exp())
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / runs**0.5


def call(name: str, rng: random.Random, batch: int, dtype: torch.dtype = torch.float32):
    """Return a model, conditions and settings of a random call, known tokens with one hole among them."""
    model = tiny(**LAYOUTS[name], seed=rng.randrange(99)).to(dtype)
    condition, settings = asked(rng, model, batch)
    settings = {key: value for key, value in settings.items() if key not in ("noise", "known", "draw")}
    known = torch.randint(24, (batch, model.layout.tokens), generator=torch.Generator().manual_seed(rng.randrange(99)))
    hole = torch.rand(model.layout.tokens, generator=torch.Generator().manual_seed(rng.randrange(99))) < 0.5
    return model, condition, known.masked_fill(hole, -1), settings


def part(values, images):
    """Return conditions, masks or settings of some images."""
    if isinstance(values, dict):
        return {key: part(value, images) for key, value in values.items()}
    return values[images] if isinstance(values, torch.Tensor) else values


def equal(one, other, images=slice(None)) -> bool:
    return torch.equal(one.tokens, other.tokens[images]) and (
        (one.log_evidence, one.effective) == (other.log_evidence[images], other.effective[images])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "large"])
def test_image_is_the_same_in_every_batch_and_window(name, dtype):
    rng = random.Random(f"{name} {dtype}")
    for particles in (1, 5):
        model, condition, known, settings = call(name, rng, 3, dtype)
        images = [(1, 4), (2**40, 0), (1, -3)]
        whole = fill(model, condition, known, images, particles=particles, **settings)
        assert torch.equal(whole.tokens[known >= 0], known[known >= 0])
        for some in (slice(0, 1), slice(1, 3)):
            poison(model)
            alone = fill(
                model, part(condition, some), known[some], images[some], particles=particles, **part(settings, some)
            )
            assert equal(alone, whole, some)
        poison(model)
        assert equal(fill(model, condition, known, images, particles=particles, window=4, **settings), whole)
        noise = torch.stack([image_noise(seed, [index], model.layout.tokens)[0] for seed, index in images])
        if particles == 1:
            assert torch.equal(whole.tokens, generate(model, condition, known=known, noise=noise, **settings))


@pytest.mark.parametrize("name", ["raster", "PAR-4", "NAR", "text", "map"])
def test_rows_of_the_cache_follow_their_particles(name):
    """The scores that a pick has from its pass after pass are those of the whole model over its tokens."""
    rng = random.Random(name)
    resampling = []
    for _ in range(3):
        model, condition, known, settings = call(name, rng, 2)
        settings = {key: value for key, value in settings.items() if "mask" in key}
        filled = fill(model, condition, known, [(0, 1), (0, 2)], particles=6, **settings)
        order, masks = model.layout.order, settings.get("emb_masks")
        tokens = filled.tokens[:, order]
        with torch.no_grad():
            logits = model(tokens[:, : len(order) - model.layout.step_tokens], condition, prefix_mask=masks)
        expected = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        torch.testing.assert_close(filled.scores[:, order], expected, rtol=1e-4, atol=1e-4)
        resampling += filled.effective
    assert min(resampling) < 3


def test_rar_is_filled_in_raster_order():
    model = randomize(
        build_model(ModelArgs(**{**SMALL, "trunk": "rar", "ffn_width": 32, "vocab_size": 8, "block_size": 16}))
    )
    known = torch.arange(16).remainder(8).masked_fill(torch.arange(16) % 4 == 1, -1)[None]
    one, other = (
        fill(model, torch.tensor([1]), known, [(0, 0)], particles=8, cfg_scale=2.0, window=window) for window in (0, 3)
    )
    assert torch.equal(one.tokens[known >= 0], known[known >= 0])
    assert equal(one, other)


@pytest.mark.parametrize("order", ["own", "random"])
def test_models_of_any_order_read_known_tokens_first_and_need_one_particle(order):
    trunk = {"own": {"trunk": "lpd", "ffn_width": 32}, "random": {"target_positions": True}}[order]
    model = randomize(build_model(ModelArgs(**{**SMALL, **trunk, "vocab_size": 8, "block_size": 16})), gain=2.0)
    known = torch.arange(16).remainder(8).masked_fill(torch.arange(16) % 4 == 1, -1).repeat(2, 1)
    images = [(3, 0), (3, 9)]
    filled = fill(model, torch.tensor([1, 2]), known, images, cfg_scale=2.0, order=order)
    config = SamplingConfig(order=order)
    layout = model.layout.adapted(known=12)
    orders = torch.stack([image_order(layout, config, order_seed(*image), known[0]) for image in images])
    noise = torch.cat([image_noise(seed, [index], 16) for seed, index in images])
    drawn = generate(model, torch.tensor([1, 2]), known=known, orders=orders, noise=noise, cfg_scale=2.0, order=order)
    assert torch.equal(filled.tokens, drawn)
    assert torch.equal(drawn[known >= 0], known[known >= 0])
    assert (filled.particles, filled.effective) == (1, [1.0, 1.0])


def test_hole_over_the_whole_image_is_the_ordinary_image():
    model, known = tiny(), torch.full((2, 16), -1)
    ordinary = generate(model, torch.tensor([3, 1]), noise=image_noise(5, [0, 7], 16), cfg_scale=2.0, top_k=9)
    for particles in (1, 16):
        filled = fill(model, torch.tensor([3, 1]), known, [(5, 0), (5, 7)], particles=particles, cfg_scale=2.0, top_k=9)
        assert torch.equal(filled.tokens, ordinary)
        assert (filled.log_evidence, filled.particles) == ([0.0, 0.0], 1)


def test_image_without_a_hole_is_the_known_one():
    model, known = tiny(), torch.arange(16)[None]
    filled = fill(model, torch.tensor([3]), known, [(0, 0)])
    assert torch.equal(filled.tokens, known)
    assert filled.log_evidence == [pytest.approx(float(log_probabilities(model, known, 3)[1].sum()), abs=1e-4)]


def test_known_tokens_before_the_hole_alone_take_one_particle():
    known = torch.arange(16).masked_fill(torch.arange(16) > 8, -1)[None]
    filled = fill(tiny(), torch.tensor([3]), known, [(0, 0)])
    assert (filled.particles, filled.effective) == (1, [1.0])


def test_greedy_particles_are_one():
    known = torch.arange(16).masked_fill(torch.arange(16) % 3 == 0, -1)[None]
    greedy = fill(tiny(), torch.tensor([3]), known, [(0, 0)], temperature=0.0)
    assert torch.equal(greedy.tokens, generate(tiny(), torch.tensor([3]), known=known, temperature=0.0))
    assert greedy.effective == [pytest.approx(16)]
    assert np.isfinite(greedy.log_evidence).all()


def test_steps_of_a_fill_are_those_of_the_hole_and_one_a_stretch(monkeypatch):
    known = torch.arange(16).masked_fill(
        (torch.arange(16) == 5) | (torch.arange(16) == 6) | (torch.arange(16) == 11), -1
    )
    passes = []
    take = generation.decode_step.take_pass
    monkeypatch.setattr(
        generation.decode_step,
        "take_pass",
        lambda model, state, kind, decode: passes.append(kind.rows) or take(model, state, kind, decode),
    )
    seen = []
    fill(tiny(), torch.tensor([3]), known[None], [(0, 0)], particles=4, on_step=lambda done, tokens: seen.append(done))
    assert passes == [4, 1, 1, 4, 1, 4]
    assert seen == [1, 5, 6, 7, 11, 12, 16]


def test_noise_of_particles_begins_with_the_image_s_own():
    noise = particle_noise(9, 2, 6, 4)
    assert torch.equal(noise[0], image_noise(9, [2], 6)[0])
    assert len(noise.unique()) == noise.numel()
    assert torch.equal(noise, particle_noise(9, 2, 6, 8)[:4])


def test_resampling_gives_each_particle_its_share():
    weights = np.log([0.5, 0.25, 0.125, 0.125])
    assert effective_sizes(weights[None])[0] == pytest.approx(1 / 0.34375)
    counts = np.bincount(resampled(weights, 2**62), minlength=4)
    assert counts.sum() == 4 and counts[0] == 2 and counts[1] == 1
    assert resampled(np.zeros(4), 5).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"particles": 0}, "particles is 0"),
        ({"particles": True}, "particles is True"),
        ({"particles": 2, "draw": "cdf"}, "--draw cdf"),
        ({"known": torch.zeros(1, 15, dtype=torch.long)}, "known tokens"),
        ({"known": torch.full((1, 16), 24)}, "below 24"),
    ],
)
def test_what_cannot_be_filled_raises(settings, message):
    with pytest.raises(ValueError, match=message):
        fill(tiny(), torch.tensor([3]), **{"known": torch.full((1, 16), -1), "images": [(0, 0)], **settings})


def test_holes_at_different_places_raise():
    known = torch.zeros(2, 16, dtype=torch.long)
    known[0, 3] = known[1, 4] = -1
    with pytest.raises(ValueError, match="same places"):
        fill(tiny(), torch.tensor([3, 1]), known, [(0, 0), (0, 1)])


@pytest.mark.parametrize("window", [0, 4])
def test_logits_that_are_not_finite_raise_for_their_images(window):
    model = tiny()
    with torch.no_grad():
        model.cls_embedding.embedding_table.weight[2] = float("nan")
    known = torch.arange(16).masked_fill(torch.arange(16) % 3 == 0, -1).repeat(2, 1)
    with pytest.raises(NotFiniteLogits) as caught:
        fill(model, torch.tensor([3, 2]), known, [(0, 0), (0, 1)], particles=4, window=window)
    assert caught.value.steps[0] is None and caught.value.steps[1] is not None
    whole = fill(model, torch.tensor([3]), known[:1], [(0, 0)], particles=4)
    assert torch.isfinite(whole.scores).all()
