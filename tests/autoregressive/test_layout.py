"""The token layout against a second version of it, written out row by row from the description of PAR."""

from math import isqrt

import pytest
import torch

from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.layouts import DecodeStep, Layout, build_layout
from autoregressive.models.layouts.patches import PatchLayout, with_patches

LAYOUTS = [(4, 1), (5, 1), (2, 4), (4, 4), (6, 4), (3, 9), (6, 9), (8, 16)]
PREFIXES = [1, 120]


def layout_of(grid: int, n: int = 1, prefix: int = 1) -> Layout:
    return build_layout({"name": "raster"} if n == 1 else {"name": "parallel", "group_size": n}, grid, prefix)


def order_written_out(grid: int, n: int) -> list[int]:
    """All n tokens at offset (0, 0) of each region, then at (0, 1), ..."""
    regions = isqrt(n)
    side = grid // regions
    return [
        (region_y * side + y) * grid + region_x * side + x
        for y in range(side)
        for x in range(side)
        for region_y in range(regions)
        for region_x in range(regions)
    ]


def rows_written_out(grid: int, n: int, prefix: int) -> list[int | None]:
    """For each row the sequence position of its image token, None for condition rows and special tokens."""
    sequence = list(range(grid**2))
    return [None] * prefix + sequence[:n] + [None] * (n - 1) + sequence[n:]


@pytest.mark.parametrize("grid, n", LAYOUTS)
def test_order(grid, n):
    layout = layout_of(grid, n)
    assert layout.order.tolist() == order_written_out(grid, n)
    codes = torch.arange(100, 100 + grid**2)
    assert torch.equal(codes[layout.order][layout.raster], codes)
    assert torch.equal(codes[layout.raster][layout.order], codes)


@pytest.mark.parametrize("grid", [1, 2, 7, 24])
def test_raster_is_the_identity(grid):
    layout = layout_of(grid)
    assert layout.order.tolist() == layout.raster.tolist() == list(range(grid**2))
    assert (layout.special, layout.rows, layout.mask(layout.rows)) == (0, 1 + grid**2, None)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grid, n", LAYOUTS)
def test_rope_rows(grid, n, prefix):
    layout = layout_of(grid, n, prefix)
    table = torch.arange(1, 1 + grid**2 * 6).view(grid**2, 3, 2)
    order = order_written_out(grid, n)
    zeros = torch.zeros(3, 2, dtype=torch.long)
    expected = [zeros if at is None else table[order[at]] for at in rows_written_out(grid, n, prefix)]
    assert layout.rows == len(expected) == prefix + grid**2 + n - 1
    assert torch.equal(layout.rope_rows(table), torch.stack(expected))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grid, n", LAYOUTS)
def test_mask(grid, n, prefix):
    """Counted from the last condition row: rows n + i·n to n + (i+1)·n - 1 see every column below n + (i+1)·n."""
    layout = layout_of(grid, n, prefix)
    expected = torch.zeros(layout.rows, layout.rows, dtype=torch.bool)
    for row in range(layout.rows):
        expected[row, : row + 1] = True
        i = (row - (prefix - 1) - n) // n
        if i >= 0:
            expected[row, : prefix - 1 + n + (i + 1) * n] = True
    for rows in {1, prefix, prefix + n - 1, prefix + n, prefix + 2 * n - 1, layout.rows - n, layout.rows}:
        mask = layout.mask(rows)
        assert (mask is None) == torch.equal(expected[:rows, :rows], torch.ones(rows, rows, dtype=torch.bool).tril())
        mask = torch.ones(rows, rows, dtype=torch.bool).tril() if mask is None else mask
        assert torch.equal(mask, expected[:rows, :rows]), rows


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grid, n", LAYOUTS)
def test_steps(grid, n, prefix):
    """Each step computes the next rows, from tokens that are known by then, and predicts the next tokens."""
    steps = layout_of(grid, n, prefix).steps
    content = rows_written_out(grid, n, prefix)
    row, known = prefix, 1  # what the prefill leaves
    for i, step in enumerate(steps):
        single = i < n - 1
        assert step.number == (i if single else (i - (n - 1)) * n)
        assert step.rows.start == row and len(step.rows) == (1 if single else n)
        fed = [*range(step.inputs.start, step.inputs.stop)] + [None] * step.special
        assert fed == content[step.rows.start : step.rows.stop]
        assert max(at for at in fed if at is not None) < known
        assert (step.outputs.start, step.outputs.stop) == (known, known + (1 if single else n))
        row, known = step.rows.stop, step.outputs.stop
    assert known == grid**2
    assert len(steps) == n - 1 + (grid**2 - n) // n


def test_steps_by_hand():
    assert layout_of(2).steps == tuple(
        DecodeStep(range(1 + t, 2 + t), slice(t, t + 1), 0, 0, slice(t + 1, t + 2), t) for t in range(3)
    )
    assert layout_of(4, 4).steps == (
        DecodeStep(range(1, 2), slice(0, 1), 0, 0, slice(1, 2), 0),
        DecodeStep(range(2, 3), slice(1, 2), 0, 0, slice(2, 3), 1),
        DecodeStep(range(3, 4), slice(2, 3), 0, 0, slice(3, 4), 2),
        DecodeStep(range(4, 8), slice(3, 4), 3, 0, slice(4, 8), 0),
        DecodeStep(range(8, 12), slice(4, 8), 0, 0, slice(8, 12), 4),
        DecodeStep(range(12, 16), slice(8, 12), 0, 0, slice(12, 16), 8),
    )


PATCHES = [(4, 2), (6, 2), (6, 3), (8, 4), (4, 4), (1, 1)]


@pytest.mark.parametrize("grid, side", PATCHES)
def test_patches(grid, side):
    """The tokens of a block stand together, blocks and the tokens in them in raster order."""
    layout = PatchLayout(grid, 3, side)
    blocks = range(0, grid, side)
    expected = [(y + dy) * grid + x + dx for y in blocks for x in blocks for dy in range(side) for dx in range(side)]
    assert layout.order.tolist() == expected
    codes = torch.arange(100, 100 + grid**2)
    assert torch.equal(codes[layout.order][layout.raster], codes)
    cells = (grid // side) ** 2
    assert (layout.rope_grid**2, layout.patch_tokens, layout.step_tokens) == (cells, side**2, side**2)
    assert layout.rows == 3 + cells and layout.mask(layout.rows) is None
    table = torch.arange(1, 1 + cells * 6).view(cells, 3, 2)
    assert torch.equal(layout.rope_rows(table), torch.cat([torch.zeros(3, 3, 2, dtype=torch.long), table]))


@pytest.mark.parametrize("grid, side", [(6, 4), (5, 2), (4, 8), (4, 0), (4, -2)])
def test_grids_that_patches_do_not_fit(grid, side):
    with pytest.raises(ValueError, match=f"{grid}x{grid} tokens cannot be cut into patches of {side}x{side}"):
        PatchLayout(grid, side=side)


def test_patches_and_groups_do_not_go_together():
    with pytest.raises(ValueError, match="'parallel' and patches of 2x2 tokens both redefine"):
        with_patches(layout_of(8, 4), 2)


def test_patches_are_not_decoded():
    with pytest.raises(AssertionError, match="decodes single tokens"):
        _ = PatchLayout(8, side=2).steps


@pytest.mark.parametrize("n", [-4, -1, 0, 2, 3, 5, 8, 15])
def test_groups_that_are_no_square(n):
    with pytest.raises(ValueError, match=rf"--ar-token-num must be a square number.*got {n}$"):
        layout_of(16, n)


@pytest.mark.parametrize("grid, n, side", [(6, 16, 4), (5, 4, 2), (1, 4, 2), (0, 4, 2), (-4, 4, 2)])
def test_grids_that_groups_do_not_fit(grid, n, side):
    with pytest.raises(ValueError, match=f"{grid}x{grid} tokens cannot be cut into {side}x{side} regions"):
        layout_of(grid, n)


# Neighbours


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grid", [1, 2, 5, 16])
def test_neighbours_by_hand(grid, prefix):
    layout = build_layout({"name": "neighbours"}, grid, prefix)
    cells = [
        (k - column, column) for k in range(2 * grid - 1) for column in range(k, -1, -1) if column < grid > k - column
    ]
    assert [divmod(cell, grid) for cell in layout.order.tolist()] == cells
    row_of = {cell: prefix + i for i, cell in enumerate(cells)}
    for (row, column), readers in zip(cells, layout.readers, strict=True):
        right, below = row_of.get((row, column - 1)), row_of.get((row - 1, column))
        expected = [(right, 0)] * (right is not None) + [(below, 1)] * (below is not None)
        assert [*readers] == (expected or [(prefix - 1, 0), (prefix - 1, 1)])
    reached = torch.tensor([*range(prefix), *(prefix + sum(cell) for cell in cells)])
    mask = layout.mask(layout.rows)
    causal = torch.ones(layout.rows, layout.rows, dtype=torch.bool).tril()
    assert torch.equal(reached <= reached[:, None], causal if mask is None else mask)
    assert len(layout.passes) == 2 * grid - 1 and layout.passes[0].rows == range(prefix)
    assert [step.number for step in layout.passes] == [step.outputs.start for step in layout.passes]
    assert all(step.sees is None for step in layout.steps)
    assert sum(len(step.rows) for step in layout.steps) == grid**2 - 1, "the last token is never fed"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "queried", "steps": 5},
            "'queried' got an unexpected keyword argument 'steps'; it takes .*group_sizes",
        ),
        ({"name": "raster", "grid_size": 3}, "'raster' multiple values for argument 'grid_size'"),
        ({"name": "queried", "group_sizes": "abc"}, "16 in all, got abc"),
        ({"name": "queried", "repulsion": 1.5}, "0 or more, got 1.5"),
        ({"name": "parallel", "group_size": "x"}, "a square number .*got x"),
        ({"name": "patches", "side": 2.0}, "cannot be cut"),
    ],
)
def test_layout_of_settings_that_it_does_not_have_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build_layout(config, 4)


def test_model_of_the_layout_of_patches_is_refused():
    with pytest.raises(ValueError, match="'patches' is of steps of training alone: give --patch-level"):
        Transformer(ModelArgs(dim=32, n_layer=1, n_head=2, block_size=16, layout={"name": "patches", "side": 2}))
