"""The race that draws tokens: against its golden and against plain integers, its distribution, its independence."""

from collections.abc import Iterator
from math import log

import numpy as np
import pytest
import torch

from autoregressive.models.sampling import SamplingConfig, choose, draw_race, filter_logits, guide, race, race_noise
from tests.helpers import assert_close, load_golden
from utils.rng import image_noise, item_seed

V = 40
EXTREME_KEYS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1]
EXTREME_CODES = [0, 1, 16383, 2**18 - 1, 2**31 - 1]


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, torch.Tensor], dict]:
    arrays, meta = load_golden("draw")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, meta


def bits_by_hand(key: int, code: int) -> int:
    mask = 2**32 - 1
    x = (code * 0x3C6EF373 + key) & mask
    x = ((x ^ x >> 16) * 0x7FEB352D) & mask
    x = ((x ^ x >> 15 ^ key >> 32) * 0x68BC21EB) & mask
    x = ((x ^ x >> 15) * 0x7FEB352D) & mask
    return x ^ x >> 16


def noise_by_hand(key: int, code: int) -> float:
    u = min(((bits_by_hand(key, code) >> 1) + 0.5) / 2**31, 1 - 2**-24)
    return u * (1 + u * (1 / 2 + u * (1 / 3 + u / 4))) if u < 2**-7 else -log(1 - u)


def test_image_noise_is_the_golden_keys(golden):
    arrays, meta = golden
    config = meta["config"]
    assert torch.equal(image_noise(config["seed"], config["images"], config["positions"]), arrays["keys"])
    for seed, image, position, key in arrays["vectors/key"].tolist():
        assert item_seed(seed, image, position, 2) == key


@pytest.mark.parametrize("seed", [0, -5, 2**63 - 1, -(2**63)])
def test_image_noise_is_item_seed_of_each_position(seed):
    images = [0, 7, 2**63 - 1, -(2**63), -1]
    keys = image_noise(seed, images, 3).tolist()
    assert keys == [[item_seed(seed, image, position, 2) for position in range(3)] for image in images]


def test_race_noise_is_the_golden_noise(golden):
    arrays, meta = golden
    bits, noise = race_noise(arrays["keys"], meta["config"]["vocab"])
    assert torch.equal(bits, arrays["bits"])
    assert_close(noise, arrays["exponential"])
    key, code, expected = arrays["vectors/bits"].unbind(1)
    assert torch.equal(race_noise(key, code[:, None])[0][:, 0], expected)


def test_race_noise_at_the_ends_of_keys_and_codes_is_that_of_plain_integers():
    bits, noise = race_noise(torch.tensor(EXTREME_KEYS), torch.tensor(EXTREME_CODES))
    assert bits.tolist() == [[bits_by_hand(key, code) for code in EXTREME_CODES] for key in EXTREME_KEYS]
    assert_close(noise, np.array([[noise_by_hand(key, code) for code in EXTREME_CODES] for key in EXTREME_KEYS]))


def test_choose_picks_the_golden_tokens(golden):
    arrays, meta = golden
    for name, (temperature, top_k, top_p) in meta["config"]["settings"].items():
        config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        assert torch.equal(choose(arrays["logits"], config, arrays["keys"]), arrays[f"pick/{name}"]), name


def test_choose_of_equal_logits_takes_the_code_with_the_least_noise():
    keys = image_noise(3, range(50), 1)[:, 0]
    least = [min(range(V), key=lambda code, key=key: noise_by_hand(key, code)) for key in keys.tolist()]
    assert choose(torch.zeros(50, V), SamplingConfig(), keys).tolist() == least


@pytest.mark.parametrize("width", [1, 5, 9216])
def test_choose_of_the_only_token_kept_takes_it_at_every_key(width):
    """Top-p 1e-9 keeps one token, which wins whatever its noise."""
    keys = torch.cat([torch.tensor(EXTREME_KEYS), image_noise(0, [0], width)[0]])
    logits = torch.zeros(len(keys), V)
    logits[:, 7] = 1e-3
    assert (choose(logits, SamplingConfig(top_p=1e-9), keys) == 7).all()


def test_draw_race_of_many_rows_is_that_of_each():
    logits, keys = torch.randn(3, 90, 1000), image_noise(0, range(3), 90)
    alone = [
        [int(draw_race(row, key)) for row, key in zip(*image, strict=True)] for image in zip(logits, keys, strict=True)
    ]
    assert draw_race(logits, keys).tolist() == race(logits, keys).tolist() == alone


def logits_of(kind: str) -> torch.Tensor:
    """Logits of one row, (V,)."""
    drawn = torch.randn(2, V, generator=torch.Generator().manual_seed(5)) * 2
    return guide(drawn[0], drawn[1], 2.5) / 6 if kind == "guided" else drawn[0]


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; codes of which fewer than ten are expected are counted as one."""
    expected, counts = probabilities * len(tokens), torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    rare = expected < 10
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    terms = ((counts - expected) ** 2 / expected)[expected > 0]
    return float(terms.sum()), len(terms) - 1


@pytest.mark.parametrize("draw", ["race1", "cdf"])
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("plain", {}),
        ("plain", {"temperature": 0.6}),
        ("plain", {"temperature": 1.8, "top_k": 12}),
        ("guided", {"top_p": 0.9}),
        ("guided", {"temperature": 1.4, "top_k": 20, "top_p": 0.8}),
    ],
)
def test_choose_draws_from_the_exact_distribution(kind, settings, draw):
    logits, config = logits_of(kind), SamplingConfig(draw=draw, **settings)
    noise = image_noise(11, range(400), 500, draw).flatten()
    tokens = choose(logits.expand(len(noise), -1), config, noise)
    kept = filter_logits(logits / config.temperature, int(config.top_k), config.top_p)
    statistic, freedom = chi_square(tokens, kept.double().softmax(-1))
    assert freedom >= 4
    assert abs(statistic - freedom) < 4.5 * (2 * freedom) ** 0.5


def pairs() -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield pairs of (keys, codes) that are neighbours: by name, keys and codes of one side, keys of the other."""
    codes = torch.arange(256)
    keys = image_noise(0, range(30), 30)
    yield "position", keys[:, :-1].flatten(), codes, keys[:, 1:].flatten()
    yield "image", keys[:-1].flatten(), codes, keys[1:].flatten()
    yield "seed", keys.flatten(), codes, image_noise(1, range(30), 30).flatten()


def test_race_noise_of_neighbours_is_independent():
    """Correlations of each bit and of the exponential numbers, in standard deviations, over some 220,000 pairs."""
    found = {}
    sides = [(name, race_noise(keys, codes), race_noise(others, codes)) for name, keys, codes, others in pairs()]
    bits, noise = race_noise(image_noise(0, range(30), 30).flatten(), torch.arange(256))
    sides.append(("code", (bits[:, :-1], noise[:, :-1]), (bits[:, 1:], noise[:, 1:])))
    for name, (bits, noise), (other_bits, other_noise) in sides:
        differing = (bits ^ other_bits).flatten()
        count = len(differing)
        for place in range(32):
            found[name, place] = ((differing >> place & 1).sum() - count / 2) / (count / 4) ** 0.5
        found[name, "exponential"] = ((noise - 1) * (other_noise - 1)).double().sum() / count**0.5
    assert max(map(abs, found.values())) < 4.5, max(found, key=lambda name: abs(found[name]))


def test_race_noise_has_even_bits_and_exponential_moments():
    bits, noise = race_noise(image_noise(0, range(30), 30).flatten(), torch.arange(256))
    count = bits.numel()
    for place in range(32):
        assert abs((bits >> place & 1).sum() - count / 2) < 4.5 * (count / 4) ** 0.5
    assert abs(noise.double().mean() - 1) < 4.5 / count**0.5
    assert abs(noise.double().square().mean() - 2) < 4.5 * (20 / count) ** 0.5
    assert noise.min() > 0 and noise.isfinite().all()


def test_choose_changes_fewer_tokens_than_cdf_where_logits_change_a_little():
    """What windows of drafts rely on."""
    logits = torch.randn(2000, V, generator=torch.Generator().manual_seed(0))
    moved = logits + 0.1 * torch.randn(2000, V, generator=torch.Generator().manual_seed(1))
    share = {}
    for draw in ("race1", "cdf"):
        config, noise = SamplingConfig(draw=draw), image_noise(0, [0], 2000, draw)[0]
        share[draw] = float((choose(logits, config, noise) == choose(moved, config, noise)).double().mean())
    assert share["race1"] > share["cdf"] > 0.3
