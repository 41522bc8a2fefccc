"""The average by hand, and that it is a model of its own."""

import pytest
import torch
import torch.nn as nn

from utils.ema import EMA


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_it_starts_as_the_model(model):
    ema = EMA(model, decay=0.9)
    assert all(torch.equal(a, b) for a, b in zip(ema.module.state_dict().values(), model.state_dict().values()))
    assert not ema.module.training and model.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_the_average_by_hand(model):
    ema = EMA(model, decay=0.9)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(1, 4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(step)
        ema.update(model)
        expected = {name: 0.9 * expected[name] + 0.1 * p.detach() for name, p in model.named_parameters()}
    for name, p in ema.module.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-6, atol=1e-6)


def test_buffers_are_the_latest(model):
    ema = EMA(model, decay=0.9)
    model(torch.randn(8, 3) + 5)
    assert not torch.equal(ema.module[1].running_mean, model[1].running_mean)
    ema.update(model)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    assert int(ema.module[1].num_batches_tracked) == 1


def test_the_model_is_left_alone(model):
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model[0].weight.add_(1)
    before = model[0].weight.detach().clone()
    ema.update(model)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(ema.module[0].weight, before)
    model(torch.randn(4, 3)).sum().backward()
    ema.update(model)
    assert all(p.grad is None for p in ema.module.parameters())
