"""The choice of a token: filters against a slow loop, draws against the distribution, settings out of range."""

import math

import numpy as np
import pytest
import torch

from autoregressive.models.sampling import SamplingConfig, choose, draw_cdf, filter_logits, guide
from utils.rng import image_noise

V = 40
LARGEST = float(np.nextafter(np.float32(1), np.float32(0)))


def rows(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, V, generator=generator) * 3
    if kind == "ties":
        return (logits / 2).round()
    if kind == "flat":
        return torch.zeros(2, V)
    if kind == "peaked":
        logits[:, 7] = 60.0
    return logits


def kept_by_hand(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """One row: top-k keeps all that tie with the k-th; top-p then keeps tokens until those before have more mass than p."""
    kept = set(range(len(logits)))
    if 0 < top_k < len(logits):
        smallest = sorted(logits, reverse=True)[top_k - 1]
        kept = {i for i in kept if logits[i] >= smallest}
    if top_p < 1:
        total = sum(math.exp(logits[i]) for i in kept)
        mass, result = 0.0, set()
        for i in sorted(kept, key=lambda i: (-logits[i], i)):
            if result and mass > top_p:
                break
            result.add(i)
            mass += math.exp(logits[i]) / total
        kept = result
    return kept


@pytest.mark.parametrize("top_p", [1e-9, 0.31, 0.77, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, V - 1, 16384])
@pytest.mark.parametrize("kind", ["plain", "ties", "flat", "peaked"])
def test_filter(kind, top_k, top_p):
    logits = rows(kind)
    filtered = filter_logits(logits, top_k, top_p)
    for row, result in zip(logits, filtered, strict=True):
        kept = kept_by_hand(row.double().tolist(), top_k, top_p)
        assert set(result.isfinite().nonzero()[:, 0].tolist()) == kept
        assert torch.equal(result[list(kept)], row[list(kept)])
    assert torch.equal(logits, rows(kind)), "the logits given are left alone"


@pytest.mark.parametrize("kind", ["plain", "ties", "flat", "peaked"])
def test_draw_cdf_follows_the_distribution(kind):
    """On an even grid of noise, each token's share is its probability to within one grid point."""
    points = 20000
    noise = (torch.arange(points) + 0.5) / points
    for row in rows(kind)[:3]:
        probabilities = row.softmax(-1)
        tokens = draw_cdf(probabilities.expand(points, -1), noise)
        shares = torch.bincount(tokens, minlength=V) / points
        assert (shares - probabilities).abs().max() <= 1.5 / points
        chi_square = ((shares - probabilities) ** 2 / probabilities.clamp(min=1e-12) * points).sum()
        assert chi_square < V


@pytest.mark.parametrize("noise", [0.0, 1e-45, 0.5, LARGEST])
def test_draw_cdf_never_takes_tokens_without_mass(noise):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(5000, V, generator=generator)
    probabilities *= torch.rand(5000, V, generator=generator) < 0.3
    probabilities[:, 20] += 1e-3  # at least one
    probabilities[:, :3] = probabilities[:, -3:] = 0
    probabilities[:2500] /= probabilities[:2500].sum(-1, keepdim=True)  # sums that round to just above or below 1
    tokens = draw_cdf(probabilities, torch.full((5000,), noise))
    assert probabilities.gather(-1, tokens[:, None]).min() > 0
    possible = probabilities > 0
    if noise == 0:
        assert torch.equal(tokens, possible.int().argmax(-1))
    if noise == LARGEST:
        last = V - 1 - possible.flip(-1).int().argmax(-1)
        assert (tokens == last).float().mean() > 0.99


def test_a_cumulative_sum_that_is_not_monotone(monkeypatch):
    """As a parallel scan may round it: a step up where there is no mass, a step down where there is some."""
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    up = 2.0**-24
    cumulative = torch.tensor([[up, 0.5, 0.5 + up, 1.0 - up, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: cumulative.clone())
    drawn = {
        float(u): int(draw_cdf(probabilities, torch.tensor([u]))) for u in (0.0, up / 2, 0.25, 0.5 - up, 0.5, LARGEST)
    }
    assert set(drawn.values()) == {1, 3}
    assert [drawn[u] for u in sorted(drawn)] == sorted(drawn.values())


def test_a_row_does_not_depend_on_the_others():
    logits = rows("plain")
    noise = image_noise(1, [0], 6)[0]
    config = SamplingConfig(top_k=9, top_p=0.9, temperature=0.7)
    together = choose(logits, config, noise)
    assert together.tolist() == [int(choose(logits[i : i + 1], config, noise[i : i + 1])) for i in range(6)]
    order = [3, 3, 0, 5]
    assert torch.equal(choose(logits[order], config, noise[order]), together[order])
    assert torch.equal(choose(logits.view(2, 3, V), config, noise.view(2, 3)), together.view(2, 3))


def test_guidance():
    conditional, unconditional = rows("plain"), rows("ties")
    for scale in (1.0, 1.5, 4.0):
        expected = (1 - scale) * unconditional.double() + scale * conditional.double()
        assert torch.allclose(guide(conditional, unconditional, scale).double(), expected, atol=1e-5)
    assert torch.equal(guide(conditional, conditional, 7.0), conditional)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"sample_logits": False, "top_k": 3, "temperature": 9.0}],
)
@pytest.mark.parametrize("kind", ["plain", "ties", "flat"])
def test_choose_of_the_likeliest_token_takes_the_first_of_equal_ones(kind, settings):
    logits = rows(kind)
    first = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    for key in (0, 2**62, 2**63 - 1):
        for dtype in (torch.float32, torch.bfloat16):
            given = logits.to(dtype)
            first = torch.tensor([row.index(max(row)) for row in given.tolist()])
            assert torch.equal(choose(given, SamplingConfig(**settings), torch.full((len(logits),), key)), first)


@pytest.mark.parametrize("settings", [{}, {"top_k": 1500}, {"top_p": 0.9}, {"temperature": 1.7}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_choose_in_half_precision_draws_as_from_the_same_logits_in_float32(dtype, settings):
    logits = torch.randn(4096, generator=torch.Generator().manual_seed(2)).to(dtype).expand(60, -1)
    noise = image_noise(1, [0], 60)[0]
    config = SamplingConfig(**settings)
    assert torch.equal(choose(logits, config, noise), choose(logits.float(), config, noise))


@pytest.mark.parametrize(
    "published, plain",
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 1.5}, {"top_p": 1.0}),
        ({"cfg_scale": 0.5}, {"cfg_scale": 1.0}),
        ({"cfg_scale": -1.0}, {"cfg_scale": 1.0}),
    ],
)
def test_settings_of_published_command_lines_draw_as_their_plain_forms(published, plain):
    noise = image_noise(1, [0], 6)[0]
    given, expected = SamplingConfig(**published), SamplingConfig(**plain)
    assert torch.equal(choose(rows("plain"), given, noise), choose(rows("plain"), expected, noise))
    assert not given.guided and not expected.guided


def test_temperature_comes_before_the_filters():
    """At a high temperature more tokens are needed for the same mass."""
    logits, points = rows("plain")[0], 5000
    noise = (torch.arange(points) + 0.5) / points
    for temperature in (0.5, 1.0, 3.0):
        config = SamplingConfig(temperature=temperature, top_k=12, top_p=0.8, draw="cdf")
        tokens = choose(logits.expand(points, -1), config, noise)
        kept = kept_by_hand((logits.double() / temperature).tolist(), 12, 0.8)
        assert set(tokens.tolist()) == kept
        weights = (logits.double() / temperature).exp()
        shares = torch.bincount(tokens, minlength=V) / points
        for i in kept:
            assert float(shares[i]) == pytest.approx(float(weights[i] / weights[list(kept)].sum()), abs=2 / points)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"top_p": -0.1}, "--top-p"),
        ({"top_p": math.inf}, "--top-p .* got inf"),
        ({"top_p": math.nan}, "--top-p .* got nan"),
        ({"temperature": -0.5}, r"--temperature .* got -0\.5"),
        ({"temperature": math.nan}, "--temperature .* got nan"),
        ({"temperature": math.inf}, "--temperature .* got inf"),
        ({"top_k": 1.5}, r"--top-k .* got 1\.5"),
        ({"top_k": math.nan}, "--top-k .* got nan"),
        ({"top_k": math.inf}, "--top-k .* got inf"),
        ({"cfg_scale": math.nan}, "--cfg-scale .* got nan"),
        ({"cfg_scale": math.inf}, "--cfg-scale .* got inf"),
        ({"cfg_interval": math.nan}, "--cfg-interval .* got nan"),
        ({"draw": "philox"}, "--draw .* got 'philox'"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**wrong)


def test_settings_at_their_limits():
    SamplingConfig(top_p=1.0, temperature=0.0, top_k=0, cfg_scale=0.0, cfg_interval=-1)
    assert choose(rows("plain"), SamplingConfig(top_k=2.0), torch.zeros(6, dtype=torch.long)).shape == (
        6,
    )  # as a slider gives it


@pytest.mark.parametrize(
    "scale, interval, guided",
    [
        (1.0, -1, set()),
        (0.0, -1, set()),
        (1.01, -1, {0, 1, 2, 3, 4}),
        (3.0, 0, {0}),
        (3.0, 2, {0, 1, 2}),
        (3.0, 2.5, {0, 1, 2}),
        (3.0, 99, {0, 1, 2, 3, 4}),
        (1.0, 2, set()),
    ],
)
def test_guided_steps(scale, interval, guided):
    config = SamplingConfig(cfg_scale=scale, cfg_interval=interval)
    assert config.guided == (scale > 1)
    assert {step for step in range(5) if config.guides(step)} == guided
