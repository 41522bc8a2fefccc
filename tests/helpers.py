"""What several tests share: the recorded figures and weights rebuilt by name (see tests/golden/README.md)."""

import contextlib
import gc
import json
import os
import random
import re
import socket
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def load_golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Returns the arrays and the decoded `meta` of tests/golden/{name}.npz."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        arrays = {key: data[key] for key in data.files}
    return arrays, json.loads(bytes(arrays.pop("meta")).decode())


def golden_tensor(name: str, shape: tuple[int, ...], seed: int, gain: float = 1.0) -> torch.Tensor:
    """The recorded runs' weight called `name`, float32."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) ^ (seed * 2654435761)) % 2**32)
    x = rng.standard_normal(tuple(shape))
    if len(shape) >= 2:
        x = gain * x / np.sqrt(np.prod(shape[1:]))
    elif "norm" in name and name.endswith("weight"):
        x = 1 + 0.1 * x
    else:
        x = 0.1 * x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def golden_tokenizer_state(meta: dict) -> dict:
    """The state dict of another group's recorded tokenizer, whose codebook is larger than the other weights."""
    config, name = meta["config"], "quantize.embedding.weight"
    state = golden_state(meta["state_dict"], config["seed"], config["gain"])
    if name in state:
        state[name] = golden_tensor(name, tuple(meta["state_dict"][name]), config["seed"], config["codebook_gain"])
    return state


def golden_state(
    shapes: dict[str, list[int]],
    seed: int,
    gain: float = 1.0,
    keep: tuple[str, ...] = (),
    gains: Mapping[str, float] = MappingProxyType({}),
) -> dict:
    """A state dict for the recorded `shapes`, without the names that contain one of `keep`; gains: further ones by name."""
    return {
        name: golden_tensor(name, tuple(shape), seed, gain) * gains.get(name, 1)
        for name, shape in shapes.items()
        if not any(part in name for part in keep)
    }


def assert_close(actual, expected, **tolerance) -> None:
    """Compares with the recorded runs' tolerance."""
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), check_dtype=False, **{**TOLERANCE, **tolerance}
    )


def free_port() -> int:
    """Return a port that nothing listens on, below those that the system gives to others until it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def ready_to_fork() -> None:
    """Share what was imported with forked processes, and give each a thread pool of its own at once.

    PyTorch replaces the pool at its first use after a fork, and fails where two threads use it at that moment.
    """
    gc.freeze()
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


def randomize(model: torch.nn.Module, seed: int = 0, gain: float = 1.0) -> torch.nn.Module:
    """Gives every weight, the output layer's too, its rebuilt value, so that tokens and pictures vary. In eval mode."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(golden_state(shapes, seed, gain, keep=("codebook_used",)), strict=False)
    return model.eval()


def scripts() -> list[str]:
    """The modules that are scripts with flags, by name."""
    rooms = ("autoregressive", "tokenizer", "dataset", "language", "evaluations", "tools", "utils", "benchmarks")
    paths = [ROOT / "app.py", *(path for room in rooms for path in sorted((ROOT / room).rglob("*.py")))]
    called = re.compile(r"^    (run_script\(main, flags\(\)\)|parser = flags\(\))$", re.MULTILINE)
    return [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths if called.search(p.read_text())]
