"""The average by hand, under the model's names, and put into the model for a while."""

import pytest
import torch
import torch.nn as nn

from tests.training import same
from utils.training.ema import EMA, warmed_up


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def move(model, by=1.0):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


def copies(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def test_it_starts_as_the_model_and_shares_no_memory_with_it(model):
    ema = EMA(model)
    assert same(ema.state_dict(), dict(model.state_dict()))
    weights = copies(model.state_dict())
    for average in ema.averages.values():
        assert not average.requires_grad
        average.zero_()
    assert same(dict(model.state_dict()), weights)


def test_the_average_by_hand(model):
    ema = EMA(model, decay=0.9)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(1, 4):
        move(model, step)
        ema.update()
        expected = {name: 0.9 * expected[name] + 0.1 * p.detach() for name, p in model.named_parameters()}
    assert ema.averages.keys() == expected.keys()
    for name, p in ema.averages.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-6, atol=1e-6)


def test_the_state_has_the_model_s_order_and_its_latest_buffers(model):
    ema = EMA(model, decay=0.9)
    move(model)
    model(torch.randn(8, 3) + 5)
    state = ema.state_dict()
    assert list(state) == list(model.state_dict())
    assert torch.equal(state["1.running_mean"], model[1].running_mean) and model[1].running_mean.any()
    assert int(state["1.num_batches_tracked"]) == 1
    assert all(state[name] is average for name, average in ema.averages.items())
    assert not torch.equal(state["1.weight"], model[1].weight)


@pytest.mark.parametrize("fails", [False, True], ids=["", "where the block raises"])
def test_applied_puts_the_averages_in_and_the_weights_back(model, fails):
    ema = EMA(model, decay=0.5)
    move(model)
    ema.update()
    move(model)
    weights, averages = copies(model.state_dict()), copies(ema.state_dict())
    parameters = list(model.parameters())

    def look():
        with ema.applied():
            assert same(dict(model.state_dict()), averages)
            if fails:
                raise KeyError("in the block")

    if fails:
        with pytest.raises(KeyError, match="in the block"):
            look()
    else:
        look()
    assert same(dict(model.state_dict()), weights) and same(ema.state_dict(), averages)
    assert all(a is b for a, b in zip(parameters, model.parameters())), "an optimizer knows them"
    assert not same(weights, averages)


def test_warmed_up_decay_follows_the_steps_up_to_the_one_asked_for():
    assert [warmed_up(0.9999, step) for step in (0, 8, 90)] == [1 / 10, 9 / 18, 91 / 100]
    assert warmed_up(0.9999, 10**6) == EMA(nn.Linear(1, 1)).decay == 0.9999
    assert warmed_up(0.5, 90) == 0.5
