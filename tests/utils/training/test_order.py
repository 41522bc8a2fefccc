"""Every sample once an epoch, the same batches however they are split, and any batch to start from."""

from argparse import Namespace
from itertools import chain

import pytest

from utils.cli import untold
from utils.training.order import BatchOrder, fit_batch


def take(size, batch, micro=1, world=1, seed=0, epoch=0, start=0):
    """The global batches of an epoch: for each the samples in the order of their places, put together from all ranks."""
    orders = [BatchOrder(size, batch, micro, rank, world, seed) for rank in range(world)]
    for order in orders:
        order.start_at(epoch, start)
    parts = [list(order) for order in orders]
    assert [len(part) for part in parts] == [len(order) for order in orders]
    assert {len(samples) for part in parts for samples in part} <= {batch // world // micro}
    batches = []
    for number in range(len(parts[0]) // micro):
        samples = [None] * batch
        for order, part in zip(orders, parts, strict=True):
            for m in range(micro):
                samples[order.positions(m)] = part[number * micro + m]
        assert len(samples) == batch and None not in samples
        batches.append(samples)
    return batches


def test_an_epoch_is_a_permutation():
    batches = take(24, 8)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert sorted(chain(*batches)) == list(range(24))
    assert list(chain(*batches)) != list(range(24))


def test_what_fills_no_batch_waits_for_another_epoch():
    left = [set(range(27)) - set(chain(*take(27, 8, epoch=epoch))) for epoch in range(6)]
    assert all(len(samples) == 3 for samples in left)
    assert len(set(map(frozenset, left))) > 1


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_splitting_changes_no_batch(world, micro):
    assert take(50, 16, micro, world, seed=3, epoch=2) == take(50, 16, seed=3, epoch=2)


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 4), (2, 2), (4, 2), (8, 1)])
def test_ranks_and_parts_take_equal_shares_that_make_up_every_batch(world, micro):
    orders = [BatchOrder(40, 16, micro, rank, world, 0) for rank in range(world)]
    whole = list(BatchOrder(40, 16, 1, 0, 1, 0))
    for batch, samples in enumerate(whole):
        shares = [list(order)[batch * micro : (batch + 1) * micro] for order in orders]
        assert {len(part) for share in shares for part in share} == {16 // world // micro}
        assert sorted(chain(*chain(*shares))) == sorted(samples)
    places = [range(1000)[order.positions(m)] for order in orders for m in range(micro)]
    assert [place for part in places for place in part] == list(range(16))


def test_epochs_and_seeds_differ():
    orders = [take(40, 8, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_starting_in_the_middle_goes_on_exactly(start):
    whole = take(40, 8, micro=2, epoch=1)
    assert take(40, 8, micro=2, epoch=1, start=start) == whole[start:]


def test_iterating_again_gives_the_same():
    order = BatchOrder(40, 8, 2, 0, 1, 0)
    assert list(order) == list(order)


@pytest.mark.parametrize("batch, micro, world", [(10, 1, 4), (8, 3, 1), (8, 4, 4)])
def test_a_batch_that_cannot_be_split(batch, micro, world):
    with pytest.raises(ValueError, match=rf"--global-batch-size {batch} .*--gradient-accumulation-steps {micro}"):
        BatchOrder(100, batch, micro, 0, world, 0)


def test_a_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="7 samples, fewer than --global-batch-size 8"):
        BatchOrder(7, 8, 1, 0, 1, 0)
    assert len(BatchOrder(8, 8, 1, 0, 1, 0)) == 1


@pytest.mark.parametrize("world, micro", [(1, 1), (2, 2), (4, 1)])
def test_samples_that_are_told_are_those_of_the_order(world, micro):
    orders = [BatchOrder(50, 16, micro, rank, world, seed=3) for rank in range(world)]
    for epoch in (0, 2):
        for order in orders:
            order.start_at(epoch)
        consumed = [list(order) for order in orders]
        for batch in range(3):
            assert orders[0].samples(epoch, batch) == take(50, 16, seed=3, epoch=epoch)[batch]
            for rank, parts in enumerate(consumed):
                share = parts[batch * micro : (batch + 1) * micro]
                for teller in orders:  # whichever process tells
                    assert teller.samples(epoch, batch, rank) == list(chain(*share))
                    assert [teller.samples(epoch, batch, rank, part) for part in range(micro)] == share
        assert [(order.epoch, order.batch) for order in orders] == [(epoch, 0)] * world, "asking changes nothing"


@pytest.mark.parametrize(
    ("batch", "size", "processes", "resumed", "expected", "lines"),
    [
        (untold(256), 1000, 2, None, 256, 0),
        (untold(256), 41, 2, None, 40, 1),
        (untold(256), 41, 2, {"global_batch_size": 8}, 8, 0),
        (untold(256), 1, 2, None, 256, 0),  # none fits: an error of its own
        (64, 41, 2, None, 64, 0),
    ],
)
def test_a_batch_that_is_not_given_fits_the_data(batch, size, processes, resumed, expected, lines):
    args = Namespace(global_batch_size=batch, gradient_accumulation_steps=1)
    assert len(fit_batch(args, size, processes, resumed)) == lines
    assert args.global_batch_size == expected and type(args.global_batch_size) is int
