"""The evaluator's features: what the Inception network of 2015 makes of images, by torch or by TensorFlow.

    inception = TorchInception(find_file(GRAPH), device="cuda")
    pool, spatial = inception(images)  # uint8 (B, H, W, 3) -> float32 (B, 2048) and (B, 2023)

Published figures are of one network, a frozen TensorFlow graph. Both backends run that file; features agree to a few
parts in a million, and the figures made of them to far more digits than are published.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from evaluations.c2i.frozen_graph import FrozenGraph
from utils.download import sha256_of
from utils.extras import how_to_install

# Images as float32 in 0..255 (B, H, W, 3), of any size: the graph resizes them to 299x299.
INPUT = "ExpandDims:0"
POOL = "pool_3:0"
SPATIAL = "mixed_6/conv:0"
SPATIAL_CHANNELS = 7
# Its second input are the weights (2048, classes) of the class scores, which the Inception Score takes without a bias.
LOGITS = "softmax/logits/MatMul"
# Of larger batches a CPU's activations are so large that the C library takes them from the system anew each time.
CPU_BATCH = 8


class Inception:
    """Common part of both backends.

    `weights` (features, classes) float32 give class scores as pool @ weights; `pool_dim` is how many features there are.
    """

    name: str
    device: str
    versions: dict[str, str]

    def __init__(self, path: str | Path) -> None:
        self.graph, self.path = FrozenGraph(path), path
        try:
            self._load()
            weights = self.graph.constant(self.graph.inputs(self.graph.resolve(LOGITS))[1])
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} is not the evaluator's Inception graph: {error}") from error
        self.weights: np.ndarray = np.ascontiguousarray(weights, dtype=np.float32)
        self.pool_dim = self.weights.shape[0]
        self.sha256 = sha256_of(path)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features of a batch: uint8 (B, H, W, 3) → float32 (B, pool_dim) and (B, h * w * 7).

        The second are the first seven channels of mixed_6/conv, 17x17 places of the published graph. What an image gives
        does not depend on the others of its batch beyond rounding.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise ValueError(f"expected uint8 images (B, H, W, 3), got {images.dtype} of shape {images.shape}")
        pool, spatial = self.features(np.ascontiguousarray(images))
        pool = pool.reshape(len(images), -1)
        if pool.shape[1] != self.pool_dim:
            raise ValueError(
                f"{self.path}: {POOL} gives {pool.shape[1]} features an image, {LOGITS} takes {self.pool_dim}"
            )
        spatial = spatial[..., :SPATIAL_CHANNELS].reshape(len(images), -1)
        return np.ascontiguousarray(pool), np.ascontiguousarray(spatial)

    def features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the two activations of a batch (B, H, W, 3), bytes or floats in 0..255, unshaped."""
        raise NotImplementedError

    def _load(self) -> None:
        raise NotImplementedError


class TorchInception(Inception):
    """Features by torch, on `device` (cpu, cuda, mps)."""

    name = "torch"

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self.device = str(device)
        self.versions = {"torch": torch.__version__, "numpy": np.__version__}
        super().__init__(path)

    def _load(self) -> None:
        self._run = self.graph.function([POOL, SPATIAL], INPUT, self._device)

    def features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = torch.from_numpy(images).to(self._device)  # bytes, where floats would be four times as many
        found = []
        for part in x.split(CPU_BATCH) if self._device.type == "cpu" else (x,):
            pool, spatial = self._run(part.float())
            # A copy: the view would keep all channels in memory.
            found.append((pool, spatial[..., :SPATIAL_CHANNELS].contiguous()))
        pools, spatials = zip(*found)
        return torch.cat(pools).cpu().numpy(), torch.cat(spatials).cpu().numpy()


class TensorFlowInception(Inception):
    """Features by TensorFlow, as the published figures were made; on a GPU where TensorFlow finds one."""

    name = "tensorflow"

    def __init__(self, path: str | Path) -> None:
        self._tf = import_tensorflow()
        super().__init__(path)

    def _load(self) -> None:
        tf = self._tf
        self._errors = tf.errors.InvalidArgumentError, tf.errors.UnimplementedError
        graph = tf.Graph()
        with graph.as_default():
            images = tf.compat.v1.placeholder(tf.float32, (None, None, None, 3))
            definition = tf.compat.v1.GraphDef.FromString(self.graph.content)
            fetches = tf.import_graph_def(definition, {INPUT: images}, [POOL, SPATIAL], name="")
        options = tf.compat.v1.ConfigProto()
        options.gpu_options.allow_growth = True
        session = tf.compat.v1.Session(graph=graph, config=options)
        # A callable is told once what is fed and fetched.
        self._call = session.make_callable(fetches, feed_list=[images])
        self.device = "gpu" if any(device.device_type == "GPU" for device in session.list_devices()) else "cpu"
        self.versions = {"tensorflow": tf.__version__, "numpy": np.__version__}

    def features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            return tuple(self._call(images.astype(np.float32)))
        except self._errors as error:
            raise ValueError(f"{self.path}: {error.message}") from error


def import_tensorflow() -> ModuleType:
    """Import TensorFlow late, as it takes seconds, and have it speak of errors only."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(f"{how_to_install('tensorflow')}, or take --backend torch")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Both bring a compiler (LLVM) whose second copy ends the process where Triton, which torch loads now and then, comes last.
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    # Off as in torch: TF32 changes the fourth digit of features.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return tf
