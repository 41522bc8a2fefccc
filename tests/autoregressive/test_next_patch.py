"""The schedule of next-patch prediction against recorded runs, by hand at its edges, and what a user gets wrong."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from autoregressive.train.next_patch import PatchSchedule, Stage
from tests.helpers import GOLDEN

RUNS = json.loads((GOLDEN / "npp_schedules.json").read_text())
FIELDS = ("epochs", "patch_level", "epoch_rate", "warmup_epochs", "decay_ratio", "lr", "end_lr")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['epochs']} epochs, level {run['patch_level']}")
def test_recorded_runs(run):
    schedule = PatchSchedule(**{name: run[name] for name in FIELDS})
    assert [stage.end for stage in schedule.stages] == run["epoch_range"]
    assert [schedule.patch_side(epoch) ** 2 for epoch in range(run["epochs"])] == run["patch_size_by_epoch"]
    per_epoch = run["steps_per_epoch"]
    rates = [schedule.learning_rate(step, per_epoch) for step in range(run["epochs"] * per_epoch)]
    assert rates == pytest.approx(run["lr_by_step"], rel=1e-12, abs=0)


def test_stages_by_hand():
    schedule = PatchSchedule(epochs=20, patch_level=4, epoch_rate=0.5)
    assert schedule.stages == (Stage(0, 2, 8), Stage(2, 5, 4), Stage(5, 10, 2), Stage(10, 20, 1))
    assert [schedule.stage(epoch).patch_side for epoch in (0, 1, 2, 4, 5, 9, 10, 19)] == [8, 8, 4, 4, 2, 2, 1, 1]
    assert schedule.stage(25) == Stage(10, 20, 1)  # a run that is told to go on
    assert PatchSchedule(epochs=7).stages == (Stage(0, 7, 1),)
    ends = [stage.end for stage in PatchSchedule(epochs=10, patch_level=3, epoch_rate=0.77).stages]
    assert ends == [int(10 * 0.77 * 0.77), 7, 10]


@pytest.mark.parametrize("epochs, level, rate", [(300, 4, 0.3), (17, 3, 0.6), (4, 2, 0.25), (8, 4, 0.5)])
def test_stages_cover_every_epoch_once(epochs, level, rate):
    schedule = PatchSchedule(epochs=epochs, patch_level=level, epoch_rate=rate)
    assert schedule.stages[0].start == 0 and schedule.stages[-1].end == epochs
    assert all(one.end == other.start for one, other in pairwise(schedule.stages))
    assert [stage.patch_side for stage in schedule.stages] == [2**i for i in reversed(range(level))]


def test_the_learning_rate_by_hand():
    """Two stages of 10 epochs of 4 steps: 8 steps up, 24 constant, 8 down, twice."""
    schedule = PatchSchedule(20, 2, 0.5, warmup_epochs=2, decay_ratio=0.2, lr=8.0, end_lr=4.0)
    stage = [*range(8)] + [8.0] * 25 + [7.5, 7, 6.5, 6, 5.5, 5, 4.5]
    assert [schedule.learning_rate(step, 4) for step in range(80)] == pytest.approx(stage * 2)
    assert schedule.learning_rate(80, 4) == schedule.learning_rate(99, 4) == 4.0


def test_the_learning_rate_without_warm_up_or_decay():
    constant = PatchSchedule(3, warmup_epochs=0, decay_ratio=0, lr=0.5, end_lr=0.1)
    assert {constant.learning_rate(step, 5) for step in range(20)} == {0.5}
    all_decay = PatchSchedule(2, warmup_epochs=0, decay_ratio=1, lr=1.0, end_lr=0.0)
    assert [all_decay.learning_rate(step, 5) for step in range(10)] == pytest.approx([1 - i / 10 for i in range(10)])
    overlapping = PatchSchedule(2, warmup_epochs=1, decay_ratio=1, lr=1.0, end_lr=0.0)  # the warm-up comes first
    expected = [i / 5 for i in range(5)] + [1 - i / 10 for i in range(5, 10)]
    assert [overlapping.learning_rate(step, 5) for step in range(10)] == pytest.approx(expected)


def test_a_decay_that_begins_inside_a_step():
    """0.3 of 7 steps are 2.1: the line from `lr` at 4.9 to `end_lr` at 7."""
    schedule = PatchSchedule(1, warmup_epochs=0, decay_ratio=0.3, lr=1.0, end_lr=0.0)
    expected = [1] * 5 + [2 / 2.1, 1 / 2.1]
    assert [schedule.learning_rate(step, 7) for step in range(7)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"patch_level": 0}, "--patch-level goes from 1.*got 0"),
        ({"patch_level": 5}, "--patch-level goes from 1.*got 5"),
        ({"epochs": 0}, r"single tokens would get no epoch: with --epochs 0 --patch-level 1"),
        ({"patch_level": 2, "epoch_rate": 1.0}, r"single tokens would get no epoch.*\[300, 300\]"),
    ],
)
def test_flags_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        PatchSchedule(**{"epochs": 300, **wrong})


def test_stages_that_get_no_epoch_are_left_out():
    """int(epochs * rate^k) may be 0, or as much as the stage's before."""
    short = PatchSchedule(epochs=7, patch_level=4)  # ends at 0, 1, 3, 7
    assert [short.patch_side(epoch) for epoch in range(7)] == [4, 2, 2, 1, 1, 1, 1] and short.skipped_sides == [8]
    equal = PatchSchedule(epochs=4, patch_level=4, epoch_rate=0.8)  # ends at 2, 2, 3, 4
    assert [equal.patch_side(epoch) for epoch in range(4)] == [8, 8, 2, 1] and equal.skipped_sides == [4]
    once = PatchSchedule(epochs=1, patch_level=2)
    assert once.patch_side(0) == 1 and once.skipped_sides == [2]
    rates = [once.learning_rate(step, 10) for step in range(10)]
    assert rates == pytest.approx([1e-5 * step for step in range(10)])


def test_grids_that_do_not_fit():
    for level, grid in ((1, 7), (2, 6), (3, 24), (4, 16), (4, 24)):
        PatchSchedule(300, level).check_grid(grid)
    with pytest.raises(ValueError, match=r"--patch-level 4 begins with patches of 8x8 tokens.*28x28"):
        PatchSchedule(300, 4).check_grid(28)
    with pytest.raises(ValueError, match=r"--patch-level 2 begins with patches of 2x2 tokens.*7x7"):
        PatchSchedule(300, 2).check_grid(7)


def test_learning_rates_that_do_not_fit():
    """Only where they are used: the flags have defaults for long runs."""
    PatchSchedule(300, 2).check_scheduler()
    with pytest.raises(ValueError, match=r"--end-lr 0.01 is above --lr 0.001"):
        PatchSchedule(300, lr=1e-3, end_lr=1e-2).check_scheduler()
    with pytest.raises(ValueError, match=r"--warmup-epochs 3 is longer than the 2 epoch\(s\) with patches of 8x8"):
        PatchSchedule(20, 4, warmup_epochs=3).check_scheduler()


def test_schedule_of_a_run_that_ends_early_takes_shares_of_its_steps():
    whole = PatchSchedule(300, 2, 0.5, warmup_epochs=1, decay_ratio=0.2, lr=8.0, end_lr=4.0)
    early = replace(whole, max_steps=250, steps_per_epoch=45)
    sides = [early.patch_side(step / 45) for step in range(250)]
    assert sides == [2] * 125 + [1] * 125
    rates = [early.learning_rate(step, 45) for step in range(250)]
    assert (
        rates[0] == rates[125] == 0 and rates[44] < 8 == rates[45] == rates[100] and rates[249] == pytest.approx(4.16)
    )
    assert early.describe() == "patches of 2x2 tokens to epoch 2.77778, single tokens to epoch 5.55556"
    tiny = replace(whole, max_steps=1, steps_per_epoch=45)
    assert tiny.patch_side(0) == 1 and tiny.skipped_sides == [2]
    with pytest.raises(ValueError, match=r"--warmup-epochs 1 is longer than the 0\.02222 epoch"):
        tiny.check_scheduler()


@pytest.mark.parametrize("level, rate, steps", [(2, 0.5, 3), (3, 0.67, 101), (4, 0.5, 77), (2, 0.9, 44)])
def test_schedule_that_ends_early_ends_with_single_tokens(level, rate, steps):
    early = PatchSchedule(300, level, rate, max_steps=steps, steps_per_epoch=45)
    sides = [early.patch_side(step / 45) for step in range(steps)]
    assert sides == sorted(sides, reverse=True) and sides[-1] == 1
    assert sides.count(1) == steps - int(steps * rate)
