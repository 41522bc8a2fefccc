"""The first value that is no number, in the order of steps and of parts of a batch."""

import pytest
import torch

from utils.training.failures import FiniteWatch, NotFinite

NAN, INF = float("nan"), float("inf")


def values(*numbers, name="loss"):
    return [(name, part, torch.tensor(number)) for part, number in enumerate(numbers)]


@pytest.mark.parametrize("value", [INF, -INF])
def test_the_first_by_step_and_part(value):
    watch = FiniteWatch()
    watch.add(6, values(1.0, 2.0))
    watch.add(7, [*values(1.0, value, NAN), ("gradient norm", None, torch.tensor(NAN))])
    watch.add(8, values(NAN))
    expected = NotFinite(step=7, part=1, name="loss", value=value)
    assert watch.first(wait=True) == expected
    watch.add(9, values(NAN))
    assert watch.first(wait=False) == expected, "it stays the first"


def test_half_precision_and_gradients():
    """A loss has a graph behind it, which is not kept, and any precision."""
    watch = FiniteWatch()
    loss = torch.ones((), requires_grad=True) * 2
    watch.add(0, [("loss", 0, loss), ("loss", 1, torch.tensor(60000.0, dtype=torch.float16) * 2)])
    assert not watch._pending[0][2].requires_grad
    assert watch.first(wait=True) == NotFinite(0, 1, "loss", INF)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_it_does_not_wait_for_a_step_that_is_still_computed():
    watch = FiniteWatch()
    watch.add(0, [("loss", 0, torch.ones((), device="cuda"))])
    assert watch.first(wait=True) is None
    torch.cuda._sleep(2_000_000_000)
    watch.add(1, [("loss", 0, torch.full((), NAN, device="cuda"))])
    assert watch.first(wait=False) is None
    assert watch.first(wait=True).step == 1
