"""Small checkpoints in the published formats, made once and shared by the tests that read files."""

import os
import signal
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from autoregressive.models.gpt import GPT_models
from tests.helpers import randomize
from tests.training import quiet_loggers
from tokenizer.tokenizer_image.vq_model import VQ_models

# Without AVX-512 only this has MKL round a row alike whatever rows are beside it, which windows need (docs/sampling.md).
if torch.backends.cpu.get_cpu_capability() != "AVX512":
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


@dataclass(frozen=True)
class SmallFiles:
    """Files of GPT-XS and VQ-4 with random weights: 32x32 pixels, 8x8 tokens, 64 codes, 10 classes."""

    folder: Path
    vq: Path  # {"model"}
    gpt: Path  # DDP, with args
    par: Path  # DDP, four tokens at a time
    nar: Path  # {"model"}, as NAR's last_version.pt
    bare: Path  # a bare state dict, consolidated.pth in a folder of its own


@pytest.fixture(scope="session")
def small_files(tmp_path_factory) -> SmallFiles:
    """Read-only: a test that changes a file copies it first."""
    folder = tmp_path_factory.mktemp("small")
    files = SmallFiles(
        folder,
        folder / "vq.pt",
        folder / "gpt.pt",
        folder / "par4.pt",
        folder / "nar.pt",
        folder / "0005000" / "consolidated.pth",
    )
    args = {"gpt_model": "GPT-XS", "gpt_type": "c2i", "image_size": 32, "downsample_size": 4, "num_classes": 10}
    shape = {"vocab_size": 64, "block_size": 64, "num_classes": 10}
    gpt = randomize(GPT_models["GPT-XS"](**shape), seed=1).state_dict()
    par = randomize(GPT_models["GPT-XS"](**shape, ar_token_num=4), seed=2).state_dict()
    for path, model in ((files.gpt, gpt), (files.par, par)):
        torch.save({"model": model, "optimizer": {}, "steps": 7, "args": Namespace(**args)}, path)
    nar = randomize(GPT_models["GPT-XS"](**shape, layout={"name": "neighbours"}), seed=4).state_dict()
    torch.save({"model": nar}, files.nar)
    files.bare.parent.mkdir()
    torch.save(gpt, files.bare)
    torch.save({"model": randomize(VQ_models["VQ-4"](codebook_size=64), seed=3).state_dict()}, files.vq)
    return files


@pytest.fixture
def one_thread():
    """Computes on one thread: for small tensors more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quiet():
    """Leaves loggers as they were after scripts that ran in this process, and computes on one thread."""
    with quiet_loggers():
        yield


@pytest.fixture
def two_threads():
    """Computes on two threads as the recorded runs did: how sums of convolutions and norms round depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def pytest_configure() -> None:
    """Signals as a terminal has them: a shell starts what runs in the background with some ignored, and children inherit it."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is an accelerator. Files with slow tests come first, so that no process waits at the end."""
    slow = {item.path: 0 for item in items}
    for item in items:
        slow[item.path] += item.get_closest_marker("slow") is not None
    alone = [path for path, count in slow.items() if "quickstart" in path.name and count]
    items.sort(key=lambda item: (item.path not in alone, -slow[item.path]))
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))
