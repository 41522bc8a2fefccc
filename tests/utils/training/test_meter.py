"""A window's figures by hand, with a clock that stands still unless it is told to go."""

from dataclasses import dataclass

import pytest
import torch

from utils.distributed import Distributed
from utils.training import meter as module
from utils.training.meter import Means, Meter, format_means, format_seconds, format_window

CPU = Distributed(torch.device("cpu"))


@dataclass(frozen=True)
class Others(Distributed):
    """A process among others, whose (waited, own work, memory) are given."""

    theirs: tuple = ()

    def gather(self, value):
        return [value, *self.theirs]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def go(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    monkeypatch.setattr(module, "_peak_memory", lambda device: 1.5)
    return clock


def step(meter, clock, waiting=0.0, working=0.0, other=0.0, flops=None):
    with meter.timing("waiting"):
        clock.go(waiting)
    with meter.timing("working"):
        clock.go(working)
    clock.go(other)
    meter.count_step(flops)


def test_rates_by_hand(clock):
    meter = Meter(CPU, samples=64, tokens=256, peak=2e12)
    for _ in range(5):
        step(meter, clock, waiting=0.5, working=1.0, other=0.5, flops=1e9)
    assert meter.close_window() == pytest.approx(
        {
            "steps_per_second": 0.5,
            "images_per_second": 32.0,
            "tokens_per_second": 32 * 256,
            "mfu": 5 * 64 * 1e9 / (10 * 2e12),
            "data_wait": 0.25,
            "peak_memory_gib": 1.5,
        }
    )
    assert meter.slowest is None


def test_flops_may_change_within_a_window(clock):
    meter = Meter(CPU, samples=10, tokens=None, peak=100.0)
    step(meter, clock, working=1.0, flops=1.0)
    step(meter, clock, working=1.0, flops=3.0)
    assert meter.close_window()["mfu"] == pytest.approx((10 + 30) / 2 / 100)


def test_pauses_do_not_count(clock):
    meter = Meter(CPU, samples=8, tokens=None, peak=None)
    for _ in range(2):
        step(meter, clock, waiting=0.25, working=0.75)
        with meter.timing("paused"):
            clock.go(1000)
    values = meter.close_window()
    assert values["steps_per_second"] == pytest.approx(1.0) and values["data_wait"] == pytest.approx(0.25)


def test_the_worst_of_all_processes(clock):
    """The longest wait and the largest memory; the devices' peaks together."""
    dist = Others(CPU.device, world_size=4, theirs=((3.0, 8.0, 2.0), (0.0, 8.0, 9.0), (0.0, 8.0, 2.0)))
    meter = Meter(dist, samples=10, tokens=None, peak=50.0)
    step(meter, clock, waiting=2.0, working=6.0, other=2.0, flops=100.0)
    values = meter.close_window()
    assert values["data_wait"] == pytest.approx(0.3) and values["peak_memory_gib"] == 9.0
    assert values["mfu"] == pytest.approx(10 * 100 / 10 / (50 * 4))
    assert meter.slowest is None


def test_the_slow_process_is_named_with_its_cause(clock):
    cases = [
        ((0.2, 9.0), "process 2 is slow: 0.900 s a step for itself (its forward passes), the median is 0.300 s"),
        ((6.0, 9.0), "process 2 is slow: 0.900 s a step for itself (waiting for its data), the median is 0.300 s"),
        ((0.0, 4.4), None),  # not half as much again
    ]
    for (waited, own), message in cases:
        dist = Others(CPU.device, world_size=3, theirs=((0.0, 3.0, 1.0), (waited, own, 1.0)))
        meter = Meter(dist, samples=8, tokens=None, peak=None)
        for _ in range(10):
            step(meter, clock, working=0.3, other=0.7)
        meter.close_window()
        assert meter.slowest == message


def test_a_window_as_a_line():
    values = {"steps_per_second": 2.345, "images_per_second": 12345.6, "data_wait": 0.036, "peak_memory_gib": 1.234}
    assert format_window(values) == "images/sec: 12,346, data wait: 4%, memory: 1.23 GiB"
    values |= {"tokens_per_second": 3.2e6, "mfu": 0.5234}
    assert format_window(values) == (
        "images/sec: 12,346, tokens/sec: 3,200,000, mfu: 52.3%, data wait: 4%, memory: 1.23 GiB"
    )


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (4_000_000, "1,111 h 06 min")]
)
def test_durations_in_two_units(seconds, words):
    assert format_seconds(seconds) == words


def test_means_of_a_window_are_over_the_steps_that_logged_them():
    means = Means()
    for logs in ({"grad_norm": 2.0, "loss": 1.0}, {"loss": 3.0, "adversarial_weight": 0.0}):
        means.add({name: torch.tensor(value) for name, value in logs.items()})
    values = means.close(CPU)
    assert values == {"adversarial_weight": 0.0, "loss": 2.0, "grad_norm": 2.0} and [*values][-1] == "grad_norm"
    assert format_means(values) == ("2.0000", "grad_norm: 2.0000, ")
    assert means.close(CPU) == {}
