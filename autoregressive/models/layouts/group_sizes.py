"""Group sizes of layouts in which each token has its own query: the published lists of LPD, and the rule behind them.

group_sizes(256, 20)                    # (1, 2, 4, 5, 7, … 20, 20, 20), 20 groups of 256 tokens
"""

from itertools import groupby, pairwise
from math import cos, isqrt, pi

# By the tokens of an image: LPD's lists at 256 and 512 pixels, each "size" or "sizextimes" (arXiv 2507.01957).
_PUBLISHED = {
    256: (
        "1 15 24 32 40 45 49 50",
        "1 7 11 15 19 22 25 28 30 32 33x2",
        "1 4 6 8 11 13 15 17 19 20 22 23 24x3 25",
        "1 2 4 5 7 8 10 11 12 14 15 16 17 18x2 19x2 20x3",
        "1 2 3 4 5 6 7 8 9 10 11x2 12 13 14x3 15x2 16x3 17x2",
        "1x2 2x2 3x2 4 5x2 6x2 7x2 8x2 9x2 10x3 11x4 12x8",
        "1x10 2x7 3x7 4x9 5x11 6x20",
        "1x41 2x46 3x41",
        "1x256",
    ),
    1024: (
        "1 4 6 9 11 13 16 18 20 23 25 27 29 31 33 35 36 38 40 41 42 44 45 46 47 48x2 49x2 50x3",
        "1 2 4 6 7 9 10 12 13 15 16 18 19 20 22 23 24 26 27 28 29 30 31 32 33 34 35x2 36 37x2 38x2 39x3 40x4",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23x2 24 25 26x2 27 28x2 29x2 30x2 31x2 32x3 33x7 34",
        "1x2 2 3 4x2 5 6 7 8x2 9 10 11x2 12 13 14x2 15 16x2 17 18x2 19x2 20 21x2 22x2 23x2 24x2 25x3 26x3 27x5 28x6 29x3",
        "1x2 2x2 3x2 4 5x2 6x2 7 8x2 9x2 10x2 11 12x2 13x2 14x2 15x2 16x2 17x2 18x3 19x2 20x3 21x3 22x3 23x5 24x6 25x8",
        "1x4 2x2 3x3 4x2 5x3 6x3 7x2 8x3 9x3 10x3 11x3 12x3 13x3 14x4 15x4 16x4 17x6 18x6 19x7 20x12",
        "1x5 2x4 3x4 4x4 5x3 6x4 7x4 8x5 9x4 10x4 11x6 12x5 13x6 14x7 15x8 16x13 17x10",
        "1x10 2x6 3x7 4x7 5x7 6x7 7x8 8x9 9x9 10x11 11x14 12x26 13x7",
        "1x15 2x11 3x10 4x12 5x12 6x13 7x14 8x17 9x23 10x33",
        "1x22 2x15 3x16 4x16 5x19 6x21 7x27 8x55 10",
        "1x32 2x21 3x21 4x24 5x27 6x37 7x62",
        "1x39 2x28 3x31 4x34 5x44 6x80",
        "1x162 2x188 3x162",
        "1x1024",
    ),
}  # fmt: skip


def _read(text: str) -> tuple[int, ...]:
    runs = [part.partition("x")[::2] for part in text.split()]
    return tuple(int(size) for size, times in runs for _ in range(int(times or 1)))


PUBLISHED = {
    tokens: {len(sizes): sizes for sizes in map(_read, texts)} for tokens, texts in _PUBLISHED.items()
}  # by tokens, then by groups


def group_sizes(tokens: int, groups: int) -> tuple[int, ...]:
    """Return the sizes of so many groups, rising from 1: the published list where there is one, else the rule.

    The rule is max(1, round(N (cos(pi/2 (i-1)/k) - cos(pi/2 i/k)))). Where its sum is too large, the first of each run of
    equal sizes gives one, the largest sizes first; where it is too small, the last size takes the rest.
    Raises ValueError for a number of groups that there cannot be.
    """
    if not 1 <= groups <= tokens or (groups == 1) != (tokens == 1):
        raise ValueError(f"{tokens} tokens are drawn in 2 to {tokens} groups, the first of 1 token; got {groups}")
    if groups in PUBLISHED.get(tokens, {}):
        return PUBLISHED[tokens][groups]
    shares = [cos(pi / 2 * i / groups) for i in range(groups + 1)]
    sizes = [max(1, round(tokens * (before - after))) for before, after in pairwise(shares)]
    sizes[0] = 1
    while (extra := sum(sizes) - tokens) > 0:
        runs = [len(list(run)) for _, run in groupby(sizes)]
        starts = [sum(runs[:i]) for i in range(len(runs)) if sizes[sum(runs[:i])] > 1]
        for start in starts[: -extra - 1 : -1]:
            sizes[start] -= 1
    sizes[-1] -= extra
    return tuple(sizes)


def training_sizes(tokens: int) -> list[tuple[int, ...]]:
    """Return the lists that a model is trained with, of few large groups to single tokens: the published ones, or as many as at 256."""
    side = isqrt(tokens)
    counts = PUBLISHED.get(tokens) or sorted(
        {min(max(2, side * share // 4), tokens) for share in (2, 3, 4, 5, 6, 8, 16, 32, 4 * side)}
    )
    return [group_sizes(tokens, count) for count in counts]
