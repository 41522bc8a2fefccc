"""The server over vLLM with a text-conditional model: prompts as clients send them, and the pictures of ImagePipeline.

test_server_load.py has the same for classes, in bursts.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here (bash scripts/serve.sh)")

import httpx
import psutil

from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import ImagePipeline
from benchmarks.serving import IMAGES, started_server
from tests.helpers import ROOT, randomize
from tests.language.small_t5 import SENTENCES, make_small_t5
from tests.serve.servers import pixels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WIDTH = 32
SCALES = [1.0, 1.5, 4.0, 7.5]
PROMPTS = [*SENTENCES[:6], *(" ".join(SENTENCES[i].split()[: i + 2]) for i in range(5)), *SENTENCES[1:6]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A GPT of 16-token captions, and the folder its T5 lies in."""
    folder = tmp_path_factory.mktemp("text_server")
    make_small_t5(folder / "t5" / "flan-t5-xl", dim=WIDTH)
    shape = {"vocab_size": 64, "block_size": 64, "cls_token_num": 120, "caption_dim": WIDTH, "model_type": "t2i"}
    gpt = randomize(GPT_models["GPT-XS"](**shape), seed=4).state_dict()
    args = Namespace(gpt_model="GPT-XS", gpt_type="t2i", image_size=32, downsample_size=4)
    torch.save({"model": gpt, "optimizer": {}, "steps": 7, "args": args}, folder / "t2i.pt")
    return folder


def body(i: int) -> dict:
    """Every other request takes the likeliest tokens, the others are drawn."""
    return {"prompt": PROMPTS[i], "guidance_scale": SCALES[i % 4], "seed": i, "temperature": i % 2, "top_k": 0}


def test_prompts(files, small_files, monkeypatch):
    """The log of all processes, which vLLM fills, is JSON."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    words = [
        "--engine", "vllm", "--gpt-ckpt", files / "t2i.pt", "--vq-ckpt", small_files.vq, "--t5-path", files / "t5",
        "--t5-model-type", "flan-t5-xl", "--batch-size", 5, "--device", "cpu",
    ]  # fmt: skip
    with started_server(words) as server:

        async def ask(client: httpx.AsyncClient, i: int) -> np.ndarray:
            await asyncio.sleep(0.05 * i)
            answer = await client.post(server.url + IMAGES, json=body(i))
            assert answer.status_code == 200, answer.text
            return pixels(answer.json()["data"][0])

        async def everything() -> list[np.ndarray]:
            async with httpx.AsyncClient(timeout=120) as client:
                return await asyncio.gather(*(ask(client, i) for i in range(16)))

        images = asyncio.run(everything())
        refused = httpx.post(server.url + IMAGES, json={"class_label": 3}, timeout=120)
        assert refused.status_code == 400 and "prompt" in refused.json()["error"]["message"]
        assert server.end() == 0
        told, others = server.events(), [line for line in server.lines if not line.startswith("{")]
        # On standard error: C++, and Python's tracker of what vLLM shares.
        assert not [line for line in others if not line.startswith("[W") and "resource_tracker" not in line], others
        assert [event for event in told if "vLLM" in event["event"] or "V1 LLM engine" in event["event"]]
        assert not [event for event in told if event["level"] == "error"]
    pipeline = ImagePipeline.from_pretrained(
        files / "t2i.pt", vq=small_files.vq, t5_path=files / "t5", t5_model_type="flan-t5-xl", device="cpu"
    )
    for i, image in enumerate(images):
        asked = body(i)
        drawn = pipeline(
            [asked["prompt"]], seed=asked["seed"], cfg_scale=asked["guidance_scale"], top_k=0, top_p=1.0,
            **({} if asked["temperature"] else {"sample_logits": False}), progress=False,
        )  # fmt: skip
        assert np.array_equal(image, np.asarray(drawn[0])), asked
    assert len({image.tobytes() for image in images}) == 16


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def words_of(process: psutil.Process) -> str:
    """The command line of a process, nothing of one that has ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def wait_for_engine(server: subprocess.Popen, seconds: float = 400) -> None:
    """Returns once the engine's process exists."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert server.poll() is None
        if any("multiprocessing.spawn" in words_of(child) for child in descendants(server.pid)):
            return
        time.sleep(0.05)
    raise TimeoutError("no engine")


@pytest.mark.parametrize("seconds, number", [(0.1, signal.SIGTERM), (5, signal.SIGKILL)])
def test_server_that_ends_while_its_engine_starts_leaves_no_process(small_files, seconds, number):
    """Ends it so long after the engine's process was begun: before, and after vLLM is imported there."""
    words = ["--engine", "vllm", "--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--device", "cpu"]
    line = [sys.executable, "-m", "autoregressive.serve.server", *map(str, words), "--port", "0"]
    with subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for_engine(server)
            time.sleep(seconds)
            left = descendants(server.pid)
            server.send_signal(number)
            server.wait(120)
        finally:
            server.kill()
    _, alive = psutil.wait_procs(left, timeout=120)
    assert not alive


def test_killed_server_leaves_no_engine_even_a_stopped_one(small_files):
    words = ["--engine", "vllm", "--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--device", "cpu"]
    with started_server(words) as server:
        left = descendants(server.process.pid)
        assert left
        left[-1].suspend()
        server.process.kill()
        _, alive = psutil.wait_procs(left, timeout=120)
        assert not alive
