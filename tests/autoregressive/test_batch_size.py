"""The number of images drawn at once: the search, and the error where memory runs out."""

import pytest
import torch

from autoregressive.models.settings import SamplingConfig
from autoregressive.pipeline import ImagePipeline
from autoregressive.sample.many import draw_briefly, fitting_batch_size, largest_batch, memory_errors_told
from utils.distributed import Distributed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipeline(small_files) -> ImagePipeline:
    return ImagePipeline.from_pretrained(small_files.folder, gpt="gpt.pt", vq="vq.pt", device="cpu")


# The search


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 31, 33, 48, 63, 64, 69])
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


def test_fitting_batch_size_is_no_more_than_there_are_to_draw_on_any_process(pipeline, monkeypatch, capsys):
    dist, config = Distributed(torch.device("cpu"), world_size=3), SamplingConfig(cfg_scale=2.0)
    for limit, found in ((5, 5), (500, 8)):
        assert fitting_batch_size(pipeline, Distributed(torch.device("cpu")), limit, config) == found
        assert pipeline.batch_size == found
        assert f"auto: {found} images at once on each process" in capsys.readouterr().out
    for others, found in (([3, 7], 3), ([0, 7], None)):
        monkeypatch.setattr(Distributed, "gather", lambda self, value, others=others: [value, *others])
        if found:
            assert fitting_batch_size(pipeline, dist, 500, config) == found
        else:
            with pytest.raises(ValueError, match="auto: there is not memory for a single image"):
                fitting_batch_size(pipeline, dist, 500, config)


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
