"""How many images are drawn at once: the search, the estimate, and what is told where memory runs out."""

import io
from pathlib import Path

import pytest
import torch

from autoregressive.models.generate import cache_for, release_cache
from autoregressive.models.settings import SamplingConfig
from autoregressive.pipeline import ImagePipeline
from autoregressive.sample import batch_size
from autoregressive.sample.batch_size import (
    available_memory,
    draw_briefly,
    fitting_batch_size,
    image_bytes,
    largest_batch,
    memory_errors_told,
)
from utils.distributed import Distributed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipeline(small_files) -> ImagePipeline:
    return ImagePipeline.from_pretrained(small_files.folder, gpt="gpt.pt", vq="vq.pt", device="cpu")


# The search


@pytest.mark.parametrize("most", range(0, 70))
def test_the_largest_batch(most):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= most

    found = largest_batch(fits, 64)
    assert most - most // 8 <= found <= most or found == 64 <= most
    assert found <= 64 and (found > 0) == (most > 0)
    assert max(tried) <= min(64, max(1, 2 * most)) and len(tried) == len(set(tried)) <= 11


@pytest.mark.parametrize("limit", [1, 2, 3, 48, 64])
def test_no_larger_batch_than_asked_for(limit):
    assert largest_batch(lambda batch: True, limit) == limit


# The estimate on a CPU


def test_the_caches_are_in_the_estimate(pipeline):
    """With guidance twice."""
    gpt = pipeline.gpt
    cache = cache_for(gpt, 1, torch.device("cpu"), torch.float32)
    held = sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))
    release_cache(gpt)
    assert held < image_bytes(pipeline, guided=False)
    assert held < image_bytes(pipeline, guided=True) - image_bytes(pipeline, guided=False)


@pytest.mark.parametrize("images, found", [(0.5, None), (1, 1), (6.5, 6), (1000, 64)])
def test_a_share_of_the_memory(pipeline, monkeypatch, capsys, images, found):
    """Half of what is free, shared by the processes of a machine; never more than sensible."""
    needed = image_bytes(pipeline, guided=True)
    monkeypatch.setattr(batch_size, "available_memory", lambda: 1 + int(2 * 3 * images * needed))
    dist = Distributed(torch.device("cpu"), local_world_size=3)
    if found is None:
        with pytest.raises(ValueError, match=r"--per-proc-batch-size auto: there is not memory for a single image"):
            fitting_batch_size(pipeline, dist, 500, SamplingConfig(cfg_scale=2.0))
        assert pipeline.batch_size == 8
    else:
        assert fitting_batch_size(pipeline, dist, 500, SamplingConfig(cfg_scale=2.0)) == pipeline.batch_size == found
        assert f"auto: {found} images at once on each process" in capsys.readouterr().out


def test_no_more_at_once_than_there_are_to_draw(pipeline, monkeypatch):
    monkeypatch.setattr(batch_size, "available_memory", lambda: 10**12)
    assert fitting_batch_size(pipeline, Distributed(torch.device("cpu")), 5) == 5


def test_where_the_system_does_not_tell(pipeline, monkeypatch):
    monkeypatch.setattr(batch_size, "available_memory", lambda: None)
    assert fitting_batch_size(pipeline, Distributed(torch.device("cpu")), 500) == 8


def test_the_processes_agree_on_the_smallest(pipeline, monkeypatch):
    monkeypatch.setattr(batch_size, "available_memory", lambda: 10**12)
    monkeypatch.setattr(Distributed, "gather", lambda self, value: [value, 3, 7])
    assert fitting_batch_size(pipeline, Distributed(torch.device("cpu"), world_size=3), 500) == 3


def test_available_memory(monkeypatch):
    def told(lines: str | None, group: dict[str, str]) -> int | None:
        def read(path: Path) -> str:
            if path.name not in group:
                raise FileNotFoundError(path)
            return group[path.name]

        def opened(path: str) -> io.StringIO:
            if lines is None:
                raise FileNotFoundError(path)
            return io.StringIO(lines)

        monkeypatch.setattr(Path, "read_text", read)
        monkeypatch.setattr(batch_size, "open", opened, raising=False)
        return available_memory()

    proc = "MemTotal: 24000 kB\nMemFree: 10 kB\nMemAvailable:   17000 kB\n"
    assert told(proc, {}) == 17000 * 1024
    assert told(proc, {"memory.max": "max\n", "memory.current": "7\n"}) == 17000 * 1024
    assert told(proc, {"memory.max": "5000\n", "memory.current": "2000\n"}) == 3000
    assert told(proc, {"memory.max": "5000\n", "memory.current": "6000\n"}) == 0
    monkeypatch.setattr("os.sysconf", {"SC_AVPHYS_PAGES": 5, "SC_PAGE_SIZE": 100}.__getitem__)
    assert told(None, {}) == 500

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown)
    assert told(None, {}) is None
    monkeypatch.undo()
    assert available_memory() is None or available_memory() > 0


@pytest.mark.parametrize("gpt", ["gpt.pt", "par4.pt"])
def test_a_trial_has_the_shape_of_a_batch(small_files, gpt):
    pipeline = ImagePipeline.from_pretrained(small_files.folder, gpt=gpt, vq="vq.pt", device="cpu")
    codes = draw_briefly(pipeline, 3, SamplingConfig(cfg_scale=2.0))
    assert codes.shape == (3, 64) and codes.dtype == torch.int64
    assert pipeline.decode(codes).shape == (3, 32, 32, 3)


# Too many images


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory(error):
    with (
        pytest.raises(ValueError, match=r"out of memory with 96 images at once: .* --per-proc-batch-size auto") as told,
        memory_errors_told(96),
    ):
        raise error
    assert told.value.__cause__ is error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory_errors_told(96):
        raise RuntimeError("shapes do not fit")
