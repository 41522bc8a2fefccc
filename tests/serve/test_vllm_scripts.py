"""The scripts that draw by vLLM: their flags, their mistakes, and the pictures of the scripts that draw without."""

import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPT_models
from autoregressive.sample import sample_c2i as plain_c2i
from autoregressive.sample import sample_t2i as plain_t2i
from autoregressive.serve import sample_c2i, sample_t2i
from tests.helpers import ROOT, randomize

needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed here (bash scripts/serve.sh)")
SMALL = [
    "--gpt-model", "GPT-XS", "--vq-model", "VQ-4", "--codebook-size", 64, "--image-size", 32, "--downsample-size", 4,
    "--precision", "none", "--device", "cpu", "--top-k", 30, "--seed", 3,
]  # fmt: skip
WIDTH = 32


def run_here(script, *words) -> None:
    script.main(script.flags().parse_args([str(word) for word in words]))


def run_apart(script, *words) -> str:
    """Runs a script in a process of its own: an engine in this one would stay."""
    path = ROOT / (script.__name__.replace(".", "/") + ".py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, path, *map(str, words)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


PUBLISHED = """
`--gpt-model` str ∈ [GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-XXXL, GPT-1B, GPT-3B, GPT-7B] = GPT-B; `--gpt-ckpt` str = required;
`--gpt-type` str ∈ [c2i, t2i] = c2i; `--from-fsdp` switch = –; `--cls-token-num` int = 1;
`--precision` str ∈ [none, fp16, bf16] = bf16; `--compile` switch = off; `--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16;
`--vq-ckpt` str = required; `--codebook-size` int = 16384; `--codebook-embed-dim` int = 8;
`--image-size` int ∈ [256, 384, 512] = 384; `--downsample-size` int ∈ [8, 16] = 16; `--num-classes` int = 1000;
`--cfg-scale` float = 4.0; `--seed` int = 0; `--top-k` int = 2000; `--temperature` float = 1.0; `--top-p` float = 1.0
"""


def test_the_published_flags():
    pytest.importorskip("torchvision", reason="the serving environment has no torchvision")
    from tests.training import check_published_flags

    check_published_flags(sample_c2i, PUBLISHED)


@pytest.mark.skipif(bool(find_spec("vllm")), reason="vLLM is installed here")
@pytest.mark.parametrize("script", [sample_c2i, sample_t2i])
def test_without_vllm(script):
    with pytest.raises(ValueError, match=r"vLLM is not installed here: `bash scripts/serve.sh` makes an environment"):
        run_here(script, "--gpt-ckpt", "gpt.pt", "--vq-ckpt", "vq.pt")


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_classes(small_files, tmp_path):
    words = [
        *SMALL, "--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--num-classes", 10, "--labels", 1, 2, 2, 7, 9,
        "--negative-class", 4,
    ]  # fmt: skip
    said = run_apart(sample_c2i, *words, "--max-num-seqs", 3, "--output", tmp_path / "vllm.png")
    assert "5 images of 32x32" in said
    run_here(plain_c2i, *words, "--output", tmp_path / "plain.png")
    assert np.array_equal(pixels(tmp_path / "vllm.png"), pixels(tmp_path / "plain.png"))


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_features_of_prompts(small_files, tmp_path):
    shape = {"vocab_size": 64, "block_size": 64, "cls_token_num": 16, "caption_dim": WIDTH, "model_type": "t2i"}
    gpt = randomize(GPT_models["GPT-XS"](**shape), seed=4).state_dict()
    args = Namespace(gpt_model="GPT-XS", gpt_type="t2i", image_size=32, downsample_size=4)
    torch.save({"model": gpt, "optimizer": {}, "steps": 7, "args": args}, tmp_path / "t2i.pt")
    (tmp_path / "own.txt").write_text("fog\na red lantern\ntwo cats sleep\n")
    (tmp_path / "features" / "own").mkdir(parents=True)
    for i in range(3):
        rows = np.random.default_rng(i).standard_normal((1, 3 + 6 * i, WIDTH)).astype(np.float32)
        np.save(tmp_path / "features" / "own" / f"{i}.npy", rows)
    words = [
        *SMALL, "--gpt-ckpt", tmp_path / "t2i.pt", "--vq-ckpt", small_files.vq, "--cls-token-num", 16,
        "--t5-feature-max-len", 16, "--t5-feature-dim", WIDTH, "--prompt-file", tmp_path / "own.txt",
        "--t5-feat-path", tmp_path / "features",
    ]  # fmt: skip
    said = run_apart(sample_t2i, *words, "--output", tmp_path / "vllm.png")
    assert "3 images of 32x32" in said and "1: a red lantern" in said
    run_here(plain_t2i, *words, "--output", tmp_path / "plain.png")
    assert np.array_equal(pixels(tmp_path / "vllm.png"), pixels(tmp_path / "plain.png"))


@needs_vllm
@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpt-type", "t2i"], "for captions there is sample_t2i.py"),
        (["--ar-token-num", "4"], "the layout .parallel. .*; vLLM decodes a llama one token a step in raster order"),
        (["--labels", "10"], "class 10 is out of range: the model has classes 0 to 9"),
        (["--labels", "1", "--kv-cache-gib", "1e-9"], "kv_cache_gib is 1e-09; keys and values of one image take"),
    ],
)
def test_mistakes(words, message, small_files, tmp_path):
    gpt = small_files.par if "--ar-token-num" in words else small_files.gpt
    with pytest.raises(ValueError, match=message):
        run_here(
            sample_c2i, *SMALL, "--gpt-ckpt", gpt, "--vq-ckpt", small_files.vq, "--num-classes", 10, *words,
            "--output", tmp_path / "grid.png",
        )  # fmt: skip
