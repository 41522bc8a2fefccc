"""Shared parts of the decode loop's tests: recorded steps without a GPU, and a layout whose steps are no rows of their own."""

from functools import cached_property

import torch

from autoregressive.models.layouts import Layout, Reader


class Recording:
    """Stand-in for a CUDA graph on a CPU: the step of the time of recording again, with all that was a plain number then."""

    made = 0

    def __init__(self, step, pool, stream):
        self.step, self.state = step, step.args[1]
        self.groups = self.state.groups
        Recording.made += 1

    def pool(self):
        return 0, 1

    def replay(self):
        now, self.state.groups = self.state.groups, self.groups
        self.step()
        self.state.groups = now


class Pairs(Layout):
    """Two tokens a step after the first two, each read from one row of the step before, whose rows see no later row of it."""

    name = "pairs of a test"

    def places(self):
        return torch.arange(self.tokens)

    @cached_property
    def groups(self):
        return (1, 1) + (2,) * (self.tokens // 2 - 1)

    @cached_property
    def readers(self):
        row = self.prefix - 1
        return tuple((Reader(row + (t if t < 2 else 2 if t < 4 else t - 1)),) for t in range(self.tokens))
