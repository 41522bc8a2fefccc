"""Layouts with a query for each token: group sizes, locality-aware orders, masks and passes against LPD's recorded ones."""

import random

import pytest
import torch

from autoregressive.models.layouts import LAYOUTS, build_layout
from autoregressive.models.layouts.group_sizes import PUBLISHED, group_sizes, training_sizes
from autoregressive.models.layouts.locality import locality_order
from tests.helpers import load_golden

GOLDEN, META = load_golden("lpd")
ORDERS = sorted({key.split("/")[1] for key in GOLDEN if key.startswith("order/")})


def queried(grid: int = 6, sizes=(), prefix: int = 1, **more):
    return build_layout({"name": "queried", "group_sizes": list(sizes) or 0, **more}, grid, prefix)


def test_group_sizes_are_the_published_lists():
    lists = {tuple(map(int, key.split("/")[1:])): value.tolist() for key, value in GOLDEN.items() if "lists/" in key}
    assert len(lists) == sum(map(len, PUBLISHED.values())) == 23
    for (side, groups), sizes in lists.items():
        assert list(group_sizes((side // 16) ** 2, groups)) == sizes
    assert [len(sizes) for sizes in training_sizes(256)] == [8, 12, 16, 20, 24, 32, 64, 128, 256]


@pytest.mark.parametrize("tokens", [2, 3, 7, 36, 64, 256, 576])
def test_group_sizes_of_any_number_of_groups_rise_from_one_to_the_whole_image(tokens):
    for groups in range(2, tokens + 1):
        sizes = group_sizes(tokens, groups)
        assert (len(sizes), sum(sizes), sizes[0]) == (groups, tokens, 1) and list(sizes) == sorted(sizes)
    assert {sum(sizes) for sizes in training_sizes(tokens)} == {tokens}


@pytest.mark.parametrize("tokens, groups", [(16, 0), (16, 1), (16, 17), (1, 2)])
def test_group_sizes_of_a_number_that_there_cannot_be_is_refused(tokens, groups):
    with pytest.raises(ValueError, match=f"got {groups}$"):
        group_sizes(tokens, groups)


@pytest.mark.parametrize("name", ORDERS)
def test_locality_orders_are_the_published_ones(name):
    orders, groups = GOLDEN[f"order/{name}/orders"], GOLDEN[f"order/{name}/groups"].tolist()
    grid, repulsion = int(name[3:6]) // 16, int(name[-1])
    layout = queried(grid, groups, repulsion=repulsion)
    for row, order in enumerate(orders):
        assert layout.draw_order(META["config"]["seed"] + row).tolist() == order.tolist()


@pytest.mark.parametrize("groups", [[4, 1, 3, 28], [1, 1, 4, 30], [36]])
def test_locality_order_begins_with_known_cells(groups):
    known = [7, 8, 9, 13]
    order = locality_order(6, groups, 2, 0, known)
    assert order[:4] == known and sorted(order) == list(range(36))
    assert order[4] in {6 * row + column for row in range(4) for column in range(5)} or groups == [36]


@pytest.mark.parametrize(
    "known, groups", [(0, (1, 3, 5, 7)), (1, (1, 3, 5, 7)), (2, (2, 2, 5, 7)), (15, (15, 1)), (16, (16,))]
)
def test_known_tokens_stand_in_one_group_before_the_passes_that_are_left(known, groups):
    layout = queried(4, [1, 3, 5, 7])
    assert layout.adapted(known=known).groups == groups
    assert layout.adapted(steps=16, repulsion=1) == queried(4, [1] * 16, repulsion=1)


@pytest.mark.parametrize("groups", [[36], [18, 18], [1] * 36, [1, 35], [2, 3, 31]])
@pytest.mark.parametrize("repulsion", [0, 1, 9])
def test_orders_of_any_groups_have_each_cell_once(groups, repulsion):
    layout = queried(6, groups, repulsion=repulsion)
    one, again, other = (layout.draw_order(seed) for seed in (2**62, 2**62, 5))
    assert one.equal(again) and not one.equal(other) and one.sort().values.equal(torch.arange(36))


def test_mask_is_the_recorded_one():
    layout = queried(sizes=META["config"]["groups"])
    assert layout.rows == 1 + 28 + 36 and layout.mask(layout.rows).equal(torch.from_numpy(GOLDEN["mask"]))
    assert layout.read_rows(layout.rows) == slice(29, 65)


@pytest.mark.parametrize("prefix", [1, 3])
def test_passes_have_the_recorded_rows_and_overwrite_queries(prefix):
    layout = queried(sizes=META["config"]["groups"], prefix=prefix)
    expected = GOLDEN["rows_per_step"] + [prefix - 1, *[0] * 6]
    assert [len(step.rows) for step in layout.passes] == expected.tolist()
    start, last = 0, 0
    for step, size in zip(layout.passes, layout.groups, strict=True):
        assert step.rows == range((prefix + last) if start else 0, prefix + start + size)
        assert (step.inputs, step.queries) == (slice(last, start) if start else slice(0, 0), size)
        assert (step.outputs, layout.cache_rows) == (slice(start, start + size), prefix + 36)
        last, start = start, start + size


def test_mask_written_out_for_random_groups():
    rng = random.Random(0)
    for _ in range(20):
        sizes = []
        while sum(sizes) < 16:
            sizes.append(rng.randint(1, 16 - sum(sizes)))
        layout = queried(4, sizes)
        group = [i for i, size in enumerate(sizes) for _ in range(size)]
        context = [-1, *group[: 16 - sizes[-1]]]
        rows = [(g, True) for g in context] + [(g, False) for g in group]
        expected = [
            [(c <= r if own else c < r) if is_context else (not own and c == r) for c, is_context in rows]
            for r, own in rows
        ]
        assert layout.mask(layout.rows).tolist() == expected, sizes


def test_with_groups_gives_other_groups_of_the_same_orders():
    layout = queried(16, repulsion=3)
    assert layout.groups == PUBLISHED[256][20] and queried(32).groups == PUBLISHED[1024][48]
    assert layout.with_groups(32) == queried(16, PUBLISHED[256][32], repulsion=3)
    assert layout.with_groups([1, 255]).passes[1].outputs == slice(1, 256)
    assert build_layout(layout.config, 16) == layout and layout.config["group_sizes"] == list(layout.groups)


@pytest.mark.parametrize("sizes", [[1, 2], [0, 36], [-1, 37], [1, 36]])
def test_groups_that_are_not_the_whole_image_are_refused(sizes):
    with pytest.raises(ValueError, match=r"36 in all, got [\[(]"):
        queried().with_groups(sizes)


@pytest.mark.parametrize("name", sorted({*LAYOUTS} - {"queried"}))
def test_layouts_with_groups_of_their_own_refuse_others(name):
    with pytest.raises(ValueError, match=f"'{name}' fixes its groups"):
        build_layout({"name": name}, 4).with_groups([1, 15])
    for setting in ({"steps": 3}, {"repulsion": 0}):
        with pytest.raises(ValueError, match="leave out --steps and --repulsion"):
            build_layout({"name": name}, 4).adapted(**setting)
    assert build_layout({"name": name}, 4).adapted(known=3) == build_layout({"name": name}, 4)
    assert not build_layout({"name": name}, 4).own_orders
