"""The evaluator's features: what the Inception network of 2015 makes of images, by torch or by TensorFlow.

    inception = TorchInception(find_file(GRAPH), device="cuda")
    pool, spatial = inception(images)  # uint8 (B, H, W, 3) -> float32 (B, 2048) and (B, 2023)

Published figures are of one network, a frozen TensorFlow graph. Both backends run that file; features agree to a few
parts in a million, and the figures made of them to far more digits than are published.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from utils.extras import how_to_install

if TYPE_CHECKING:
    import torch

# Images as float32 in 0..255 (B, H, W, 3), of any size: the graph resizes them to 299x299.
INPUT = "ExpandDims:0"
POOL = "pool_3:0"
SPATIAL = "mixed_6/conv:0"
SPATIAL_CHANNELS = 7
# Its second input are the weights (2048, classes) of the class scores, which the Inception Score takes without a bias.
LOGITS = "softmax/logits/MatMul"
# Of larger batches a CPU's activations are so large that the C library takes them from the system anew each time.
CPU_BATCH = 8


class _Inception:
    """Common part of both backends: reading the file, checking it and the images, shaping the features.

    `weights` (features, classes) float32 give class scores as pool @ weights; `pool_dim` is how many features there are.
    """

    name: str
    device: str
    versions: dict[str, str]

    def __init__(self, path: str | Path) -> None:
        from evaluations.c2i.frozen_graph import FrozenGraph

        self.graph = FrozenGraph(path)
        try:
            self.graph.check([POOL, SPATIAL], [INPUT])
            weights = self.graph.constant(self.graph.inputs(LOGITS)[1])
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} is not the evaluator's Inception graph: {error}") from error
        self.weights: np.ndarray = np.ascontiguousarray(weights, dtype=np.float32)
        self.pool_dim = self.weights.shape[0]

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features of a batch: uint8 (B, H, W, 3) → float32 (B, pool_dim) and (B, h * w * 7).

        The second are the first seven channels of mixed_6/conv, 17x17 places of the published graph. What an image gives
        does not depend on the others of its batch beyond rounding.
        Raises ValueError: not uint8 RGB images, or features that are NaN or infinite.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise ValueError(f"expected uint8 images (B, H, W, 3), got {images.dtype} of shape {images.shape}")
        pool, spatial = self._features(np.ascontiguousarray(images))
        pool = pool.reshape(len(images), -1)
        if pool.shape[1] != self.pool_dim:
            raise ValueError(
                f"{self.graph.path}: {POOL} gives {pool.shape[1]} features an image, {LOGITS} takes {self.pool_dim}"
            )
        spatial = spatial[..., :SPATIAL_CHANNELS].reshape(len(images), -1)
        return np.ascontiguousarray(pool), np.ascontiguousarray(spatial)

    def _features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


class TorchInception(_Inception):
    """Features by torch, on `device` (cpu, cuda, mps)."""

    name = "torch"

    def __init__(self, path: str | Path, device: "str | torch.device" = "cpu") -> None:
        import torch

        super().__init__(path)
        self._device = torch.device(device)
        self.device = str(self._device)
        self.versions = {"torch": torch.__version__, "numpy": np.__version__}

    def _features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        # Bytes travel to the device, floats would be four times as many.
        x = torch.from_numpy(images).to(self._device)
        parts = x.split(CPU_BATCH) if self._device.type == "cpu" else (x,)
        pools, spatials = zip(*(self._run(part) for part in parts))
        return torch.cat(pools).cpu().numpy(), torch.cat(spatials).cpu().numpy()

    def _run(self, images: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        pool, spatial = self.graph.run([POOL, SPATIAL], {INPUT: images.float()})
        # A copy: the view would keep all channels in memory.
        return pool, spatial[..., :SPATIAL_CHANNELS].contiguous()


class TensorFlowInception(_Inception):
    """Features by TensorFlow, as the published figures were made; on a GPU where TensorFlow finds one.

    `threads` bounds the processor threads of an operation (default: as many as there are cores); TensorFlow keeps the first
    value that a process gives it.
    """

    name = "tensorflow"

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        tf = import_tensorflow()
        super().__init__(path)
        self._errors = tf.errors
        graph = tf.Graph()
        with graph.as_default():
            part = tf.compat.v1.GraphDef.FromString(self.graph.subgraph([POOL, SPATIAL], [INPUT]))
            tf.import_graph_def(part, name="")
        options = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads or 0)
        options.gpu_options.allow_growth = True
        self._session = tf.compat.v1.Session(graph=graph, config=options)
        # A callable is told once what is fed and fetched.
        self._call: Callable = self._session.make_callable([POOL, SPATIAL], feed_list=[INPUT])
        found = [device.name for device in self._session.list_devices() if device.device_type == "GPU"]
        self.device = "gpu" if found else "cpu"
        self.versions = {"tensorflow": tf.__version__, "numpy": np.__version__}

    def _features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            return tuple(self._call(images.astype(np.float32)))
        except (self._errors.InvalidArgumentError, self._errors.UnimplementedError) as error:
            raise ValueError(f"{self.graph.path}: {error.message}") from error


def import_tensorflow() -> ModuleType:
    """TensorFlow, imported late (it takes seconds) and told to speak of errors only."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(f"{how_to_install('tensorflow')}, or take --backend torch")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Both bring a compiler (LLVM) whose second copy ends the process where Triton, which torch loads now and then, comes last.
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    try:
        with _silent():
            import tensorflow as tf
    except ImportError as error:
        raise ValueError(f"TensorFlow is installed and cannot be imported ({error}); take --backend torch") from error
    tf.get_logger().setLevel("ERROR")
    # Off as in torch: TF32 changes the fourth digit of features.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return tf


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing is written to the process's error stream: not what libraries say before they have read a log level either."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
