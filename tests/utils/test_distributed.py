"""Processes that go through a block one after the other, and leave it together where one fails."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from utils.distributed import Distributed
from utils.errors import AgreedError


@dataclass(frozen=True)
class Beside(Distributed):
    """A process beside others that tell of these failures, one an exchange."""

    others: tuple[Any, ...] = ()

    def gather(self, value):
        self.heard.append(value)
        return [self.others[len(self.heard) - 1], value]


def beside(local_rank, *others):
    dist = Beside(torch.device("cpu"), local_rank, 2, local_rank, 2, others)
    object.__setattr__(dist, "heard", [])
    return dist


def test_main_first_failure_of_the_first_process_ends_the_others_before_the_block():
    entered = []
    with pytest.raises(AgreedError, match="no file vq"), beside(1, "no file vq").main_first():
        entered.append(1)
    assert not entered


@pytest.mark.parametrize("local_rank", [0, 1])
def test_main_first_failure_here_is_told_to_the_others(local_rank):
    dist = beside(local_rank, None, None)
    with pytest.raises(AgreedError, match="no disk"), dist.main_first():
        raise OSError("no disk")
    assert dist.heard[-1] == "no disk"


def test_main_first_failure_of_a_process_alone_is_raised_as_it_is():
    with pytest.raises(FileNotFoundError), Distributed(torch.device("cpu")).main_first():
        raise FileNotFoundError("nowhere")
