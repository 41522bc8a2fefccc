"""Signals that ask a run to stop: which count, what a second one does, and what becomes of forked processes."""

import os
import signal
import time

import pytest

from utils.training import signals as signals_module
from utils.training.signals import StopSignals

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


@pytest.fixture(autouse=True)
def handlers():
    """Those of the test run, whatever a test does."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def ask(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_taken_note_of_and_the_handlers_are_put_back(number, handlers):
    with StopSignals() as signals:
        assert signals.asked is None
        ask(number)
        assert signals.asked is number
    assert {each: signal.getsignal(each) for each in SIGNALS} == handlers


def test_the_first_signal_counts():
    with StopSignals() as signals:
        ask(signal.SIGTERM)
        ask(signal.SIGUSR1)
        ask(signal.SIGINT)
        ask(signal.SIGTERM)
        assert signals.asked is signal.SIGTERM


@pytest.mark.parametrize("before", [[], [signal.SIGTERM]], ids=["", "after SIGTERM"])
def test_a_second_ctrl_c_ends_at_once(before, monkeypatch):
    """But for the copy of the first that torchrun passes on."""
    now = [100.0]
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: now[0])
    with StopSignals() as signals:
        for number in before:
            ask(number)
        ask(signal.SIGINT)
        now[0] += 0.5
        ask(signal.SIGINT)
        now[0] += 1.5
        with pytest.raises(KeyboardInterrupt):
            ask(signal.SIGINT)
        assert signals.asked is (before or [signal.SIGINT])[0]


def forked(body):
    """A process forked from this one, which does `body` and then sleeps; it is ready when this returns."""
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(ready)
            body(tell)
            time.sleep(300)
        finally:
            os._exit(3)
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    return child


def killed_by(child):
    return -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_forked_worker_lives_on_during_the_run_and_dies_of_a_signal_after_it(number):
    with StopSignals() as signals:
        child = forked(lambda tell: os.write(tell, b"."))
        for _ in range(2):
            os.kill(child, number)
            time.sleep(0.05)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ends its step with the data it brings"
        assert signals.asked is None, "the signal was the worker's"
    os.kill(child, number)
    assert killed_by(child) == number


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_worker_whose_run_is_gone_dies_of_a_signal():
    """The run is killed with its block still open: the worker is left to another parent."""
    told, tell = os.pipe()
    with StopSignals():
        child = os.fork()
        if not child:
            try:
                with StopSignals():  # the run is this process
                    worker = forked(lambda ready: os.write(ready, b"."))
                    os.write(tell, str(worker).encode())
                    os._exit(0)
            finally:
                os._exit(3)
    os.waitpid(child, 0)
    worker = int(os.read(told, 20))
    os.close(told)
    os.close(tell)
    os.kill(worker, signal.SIGTERM)
    assert gone(worker)


def gone(process, seconds=60.0):
    """Whether a process that is no child of this one ends in time; where nobody reaps it, it stays as a zombie."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{process}/stat") as f:
                if f.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False
