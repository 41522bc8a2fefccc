"""Interface of token layouts: the order in which an image's tokens are read, and which of them a decode step draws together.

    layout = build_layout({"name": "raster"}, grid_size=24)
    sequence = codes[:, layout.order]                        # (B, N) raster codes -> sequence order
    for step in layout.steps: ...                            # the decode steps after the prefill

A sequence is made of rows, and `content` says what each row holds: a condition, a token, a special vector or a query.
Every attention mask is one rule over two numbers a row: row r sees row c if both have the same `block`, or if c is
`kept` and its block is smaller. `readers` says from which rows a token is predicted. Decode steps follow from these: the
step of a group computes the rows that the group is read from, and every kept row before them that is not cached yet.

A new layout is a subclass in one file: `places` alone gives another order of single tokens (examples/spiral_order.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import torch
from torch import Tensor

from utils.registry import Registry


class Holds(Enum):
    """Content of a row."""

    CONDITION = "condition"
    TOKEN = "token"
    SPECIAL = "special"
    QUERY = "query"


class Row(NamedTuple):
    """Content of a row and its number: of the condition row, the sequence position of a token, or of the special vector.

    With patches the number of a token is that of its patch. A query's number is the sequence position it is read for.
    """

    holds: Holds
    number: int


class Reader(NamedTuple):
    """A row, and the head that turns its hidden state into logits; the logits of a token's readers are averaged."""

    row: int
    head: int = 0


@dataclass(frozen=True)
class DecodeStep:
    """One decode step: the rows that it computes and the tokens that it draws, as sequence positions."""

    rows: range  # places of the computed rows in the cache
    inputs: slice  # tokens fed; their rows come first
    special: int  # rows of special vectors after them
    queries: int  # rows of queries after those
    outputs: slice  # tokens drawn
    number: int  # compared with `cfg_interval`
    # For each output its readers, rows counted from the first one computed; None where output i is read from row i.
    reads: tuple[tuple[Reader, ...], ...] | None = None
    # For each computed row which of the computed rows it sees; None where it sees all of them.
    sees: tuple[tuple[bool, ...], ...] | None = None


KINDS = ("raster", "parallel", "patches", "neighbours", "queried")
LAYOUTS: Registry["type[Layout]"] = Registry("layout", {name: f"{__package__}.{name}" for name in KINDS})


@dataclass(frozen=True)
class Layout:
    """Order, groups, rows and mask of an image's tokens; as it stands here, single tokens, each read from the row before."""

    grid_size: int  # tokens a side
    prefix: int = 1  # condition rows
    name: ClassVar[str]
    own_orders: ClassVar[bool] = False
    """Tell whether each image is drawn in an order of its own, of `draw_order`."""

    def __post_init__(self) -> None:
        if self.grid_size < 1:
            raise ValueError(f"a grid has 1 token a side or more, got {self.grid_size}")

    # Your own layout overrides from here …

    @property
    def patch_side(self) -> int:
        """Side of the patch of tokens that a row holds, and predicts; 1 for single tokens."""
        return 1

    def places(self) -> Tensor:
        """Return the raster index of the token at each sequence position, int64 (N,)."""
        raise NotImplementedError

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Tokens (or patches) that each decode step draws, the prefill's first."""
        return (1,) * self.units

    @cached_property
    def content(self) -> tuple[Row, ...]:
        """Content of every row."""
        conditions = [Row(Holds.CONDITION, i) for i in range(self.prefix)]
        return (*conditions, *(Row(Holds.TOKEN, t) for t in range(self.units)))

    @cached_property
    def block(self) -> tuple[int, ...]:
        """Block of every row."""
        return tuple(range(self.rows))

    @cached_property
    def kept(self) -> tuple[bool, ...]:
        """Tell of each row whether later blocks see it."""
        return (True,) * self.rows

    @cached_property
    def readers(self) -> tuple[tuple[Reader, ...], ...]:
        """Readers of every token (or patch)."""
        return tuple((Reader(self.prefix - 1 + t),) for t in range(self.units))

    def step_number(self, start: int) -> int:
        """Return the number of the decode step that draws the token at `start` first, as `cfg_interval` counts."""
        return start - 1

    def with_groups(self, groups: Sequence[int] | int) -> "Layout":
        """Return the layout with other groups, as sizes or how many. Raises ValueError where they are not free."""
        raise ValueError(f"the layout {self.name!r} fixes its groups: leave out groups")

    def adapted(self, steps: int = 0, repulsion: int = -1, known: int = 0) -> "Layout":
        """Return the layout to draw by with settings of the sampling, 0 and -1 for the layout's own.

        known: tokens that are given. Raises ValueError for settings that the layout does not have.
        """
        if steps or repulsion >= 0:
            raise ValueError(f"the layout {self.name!r} fixes its steps and order: leave out --steps and --repulsion")
        return self

    def draw_order(self, seed: int, known: Sequence[int] = ()) -> Tensor:
        """Return the order of one image, int64 (N,): drawn where images have orders of their own.

        seed: from 0 to 2**63 - 1. known: raster indices of the tokens that are given, which come first in a drawn order.
        """
        return self.order

    # … to here. The rest follows.

    @property
    def config(self) -> dict[str, Any]:
        """Name and settings, from which build_layout makes the layout again beside grid_size and prefix."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": self.name, **{k: v for k, v in own.items() if k not in ("grid_size", "prefix")}}

    @property
    def tokens(self) -> int:
        """Tokens of an image, N."""
        return self.grid_size**2

    @property
    def patch_tokens(self) -> int:
        """Tokens that one row holds, and that it predicts: patch_side²."""
        return self.patch_side**2

    @property
    def units(self) -> int:
        """Tokens of an image, or patches of them: what one row holds."""
        return self.tokens // self.patch_tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of the last group or patch: predicted, and never read."""
        return self.groups[-1] * self.patch_tokens

    @property
    def rope_grid(self) -> int:
        """Cells a side of the rotary table."""
        return self.grid_size // self.patch_side

    @property
    def rows(self) -> int:
        """Rows of the whole sequence."""
        return len(self.content)

    @property
    def cache_rows(self) -> int:
        """Rows of the cache that decoding fills at most."""
        return self.rows - 1

    @cached_property
    def special(self) -> int:
        """Special vectors in the sequence."""
        return sum(row.holds is Holds.SPECIAL for row in self.content)

    @cached_property
    def queries(self) -> int:
        """Queries in the sequence."""
        return sum(row.holds is Holds.QUERY for row in self.content)

    @cached_property
    def is_raster(self) -> bool:
        """Tell whether single tokens are read row by row, each predicted from the one before."""
        single = self.patch_side == 1 and all(len(step.rows) == 1 and step.reads is None for step in self.steps)
        return single and self.order.equal(torch.arange(self.tokens, device="cpu"))

    @cached_property
    @torch.inference_mode(False)  # kept for training too, whoever asks first
    def order(self) -> Tensor:
        """The raster index of the token at each sequence position, int64 (N,) on the CPU."""
        with torch.device("cpu"):
            order = torch.as_tensor(self.places(), dtype=torch.long)
            every = order.sort().values.equal(torch.arange(self.tokens))
            assert every, f"{self.name}: places is no order of the tokens"
        return order

    @cached_property
    @torch.inference_mode(False)
    def raster(self) -> Tensor:
        """The sequence position of the token at each raster index, int64 (N,): the inverse of `order`."""
        return torch.argsort(self.order)

    @cached_property
    @torch.inference_mode(False)
    def cells(self) -> Tensor:
        """The cell of the rope grid, in raster order, at which each row stands, int64 (rows,); -1 where at none."""
        first = self.order[:: self.patch_tokens]  # the upper left token of each patch
        y, x = first // self.grid_size // self.patch_side, first % self.grid_size // self.patch_side
        unit_cells = (y * self.rope_grid + x).tolist()
        placed = (Holds.TOKEN, Holds.QUERY)
        cells = [unit_cells[row.number] if row.holds in placed else -1 for row in self.content]
        return torch.tensor(cells, device="cpu")

    def rope_rows(self, table: Tensor) -> Tensor:
        """Put the rotary table (rope_grid², …) into row order, zeros at rows without a cell. Returns (rows, …)."""
        cells = self.cells.to(table.device)
        placed = (cells >= 0).view(-1, *[1] * (table.dim() - 1))
        return torch.where(placed, table[cells.clamp(min=0)], 0)

    def fed(self, tokens: int) -> int:
        """Return how many rows a sequence of so many tokens fills."""
        units = tokens // self.patch_tokens
        rows = (i for i, (holds, number) in enumerate(self.content) if holds is Holds.TOKEN and number >= units)
        return next(rows, self.rows)

    @cached_property
    def heads(self) -> int:
        """Heads that tokens are read by."""
        return 1 + max(reader.head for readers in self.readers for reader in readers)

    def read_rows(self, rows: int, head: int = 0) -> slice | list[int]:
        """Return the row, of the first `rows`, that a head predicts each token (or patch) from, in the order of these.

        A head that has no share in a token (`shares`) has row 0 for it.
        """
        read = [{reader.head: reader.row for reader in readers}.get(head, 0) for readers in self._read_within(rows)]
        return slice(read[0], read[-1] + 1) if read == list(range(read[0], read[-1] + 1)) else read

    def shares(self, rows: int, heads: int) -> Tensor:
        """Return the share of each head in the mean that predicts a token, float32 (tokens, heads)."""
        read = [[reader.head for reader in readers] for readers in self._read_within(rows)]
        assert all(len(set(own)) == len(own) for own in read), "a head reads one row a token"
        return torch.tensor([[own.count(head) / len(own) for head in range(heads)] for own in read], device="cpu")

    def _read_within(self, rows: int) -> list[tuple[Reader, ...]]:
        """Return the readers of the tokens (or patches) that the first `rows` rows predict."""
        return [readers for readers in self.readers if max(reader.row for reader in readers) < rows]

    def mask(self, rows: int, device: torch.device | None = None) -> Tensor | None:
        """Return which of the first `rows` rows sees which, bool (rows, rows), row by column; None where plainly causal."""
        if self.block[:rows] == tuple(range(rows)) and all(self.kept[:rows]):
            return None
        block, kept = (torch.tensor(part[:rows], device=device) for part in (self.block, self.kept))
        return (block[:, None] == block) | (kept & (block < block[:, None]))

    @cached_property
    def cache_places(self) -> tuple[int, ...]:
        """Place of every row in the cache; a row that is not kept is overwritten by the token it predicts."""
        kept_before = [0, *accumulate(map(int, self.kept))]
        return tuple(kept_before[i] if self.kept[i] else self.prefix + row.number for i, row in enumerate(self.content))

    @cached_property
    @torch.inference_mode(False)
    def tokens_at(self) -> Tensor:
        """The token at whose cell the row of each place in the cache stands, and the one read from it: int64 (places, 2), -1 for none."""
        assert self.patch_side == 1, "a patch is at no one token's cell"
        table = torch.full((max(self.cache_places) + 1, 2), -1, device="cpu")
        for place, row in zip(self.cache_places, self.content):
            if row.holds in (Holds.TOKEN, Holds.QUERY):
                table[place, 0] = row.number
        for token, readers in enumerate(self.readers):
            for reader in readers:
                table[self.cache_places[reader.row], 1] = token
        return table

    @cached_property
    def passes(self) -> tuple[DecodeStep, ...]:
        """Every decode step, the prefill first."""
        assert self.patch_side == 1, "patches are for training: a model trained with them decodes single tokens"
        kept_rows = [i for i in range(self.rows) if self.kept[i]]
        cached, start, passes = 0, 0, []
        for size in self.groups:
            outputs = slice(start, start + size)
            read = {reader.row for readers in self.readers[outputs] for reader in readers}
            last = max(self.block[row] for row in read)
            computed = []
            while cached < len(kept_rows) and self.block[kept_rows[cached]] <= last:
                computed.append(kept_rows[cached])
                cached += 1
            computed += sorted(row for row in read if not self.kept[row])
            passes.append(self._step(computed, outputs))
            start += size
        return tuple(passes)

    def _step(self, computed: list[int], outputs: slice) -> DecodeStep:
        kinds = [self.content[row].holds for row in computed]
        tokens = [self.content[row].number for row in computed if self.content[row].holds is Holds.TOKEN]
        at = {row: i for i, row in enumerate(computed)}
        most = max(map(len, self.readers[outputs]))  # a single reader beside pairs counts twice: it averages to itself
        reads = tuple(
            tuple(Reader(at[row], head) for row, head in (readers * most)[:most]) for readers in self.readers[outputs]
        )
        one_to_one = reads == tuple((Reader(i),) for i in range(len(computed)))
        sees = tuple(
            tuple(self.block[r] == self.block[c] or (self.kept[c] and self.block[c] < self.block[r]) for c in computed)
            for r in computed
        )
        places = [self.cache_places[row] for row in computed]
        return DecodeStep(
            rows=range(places[0], places[-1] + 1),
            inputs=slice(tokens[0], tokens[-1] + 1) if tokens else slice(0, 0),
            special=kinds.count(Holds.SPECIAL),
            queries=kinds.count(Holds.QUERY),
            outputs=outputs,
            number=self.step_number(outputs.start),
            reads=None if one_to_one else reads,
            sees=None if all(map(all, sees)) else sees,
        )

    @property
    def steps(self) -> tuple[DecodeStep, ...]:
        """The decode steps after the prefill."""
        return self.passes[1:]


def build_layout(config: Mapping[str, Any], grid_size: int, prefix: int = 1) -> Layout:
    """Build a layout from its config: {"name": …, and its settings}. Raises ValueError for what is not registered or no setting."""
    settings = dict(config)
    return LAYOUTS.build(settings.pop("name"), grid_size, prefix, **settings)


@dataclass_transform(frozen_default=True)
def register_layout(name: str) -> Callable[[type], Any]:
    """Register a subclass of Layout under a name and make it a frozen dataclass, as a decorator."""

    def register(layout: type[Layout]) -> type[Layout]:
        layout.name = name
        return LAYOUTS.register(name)(dataclass(frozen=True)(layout))

    return register
