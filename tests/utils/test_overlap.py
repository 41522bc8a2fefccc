"""Work in a thread beside what makes it: the order, what runs at the same time, and errors."""

import threading

import pytest

from utils.overlap import one_behind


def test_an_item_is_made_while_the_one_before_is_worked_on():
    made = [threading.Event() for _ in range(3)]

    def items():
        for i, event in enumerate(made):
            event.set()
            yield i

    def work(i):
        assert threading.current_thread() is not threading.main_thread()
        assert i == 2 or made[i + 1].wait(120)  # would wait in vain if the work came first
        return i

    assert list(one_behind(items(), work)) == [0, 1, 2]


def test_nothing_runs_further_ahead():
    made = []

    def items():
        for i in range(9):
            made.append(i)
            yield i

    for given_out in one_behind(items(), lambda i: i):
        assert len(made) <= given_out + 2


def test_an_error_of_the_work_ends_it():
    made = []

    def items():
        for i in range(9):
            made.append(i)
            yield i

    def work(i):
        if i == 2:
            raise OSError("disk full")
        return i

    seen = []
    with pytest.raises(OSError, match="disk full"):
        for value in one_behind(items(), work):
            seen.append(value)
    assert seen == [0, 1] and made == [0, 1, 2, 3]
