"""Recorded steps without a GPU, for tests of the decode loop."""

import pytest

from autoregressive.models import compiled, decode_step, on_cpu, on_cuda
from autoregressive.models.sampling import draw_race
from tests.autoregressive.decoding import Recording


@pytest.fixture
def recording_compiled(monkeypatch):
    """Compiled steps are recorded, as on CUDA, over a cache of its size."""
    monkeypatch.setattr(on_cpu, "records", lambda device: True)
    monkeypatch.setattr(on_cuda, "record", Recording)
    monkeypatch.setattr(on_cpu, "read_stride", lambda *_: 8)
    monkeypatch.setattr(on_cpu, "LEAST_READ", on_cuda.LEAST_READ)
    monkeypatch.setattr(on_cpu, "cache_rows", on_cuda.cache_rows)
    Recording.made = 0


@pytest.fixture
def recording(recording_compiled, monkeypatch):
    """The same with plain code for what is compiled."""
    monkeypatch.setattr(compiled, "compiled_decode_rows", lambda: decode_step.decode_rows)
    monkeypatch.setattr(compiled, "compiled_race", lambda: draw_race)
    monkeypatch.setattr(on_cpu, "rows_agree", lambda *_: True)
