"""The frozen TensorFlow graph of the evaluator's Inception network, run in torch without TensorFlow.

    graph = FrozenGraph("classify_image_graph_def.pb")
    features = graph.function(["pool_3:0", "mixed_6/conv:0"], "ExpandDims:0", device)
    pool, spatial = features(images)

Tensors go in and come out as TensorFlow has them: images as (B, H, W, C), which to torch's convolutions is NCHW in
channels_last. Operations are those of the network's features. CheckNumerics is left out: whoever takes the features has to see that they are finite.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

from utils.precision import full_float32

# Computes a node's value from those of its inputs that are not constants.
Compute = Callable[..., Tensor]
# Inputs of a node: an array for a constant, None for a value.
Held = list[np.ndarray | None]


class FrozenGraph:
    """The graph in a file.

    Raises FileNotFoundError, or ValueError where the file is not a complete GraphDef.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.content, graph = Path(path), Path(path).read_bytes(), GraphDef()
        try:
            graph.ParseFromString(self.content)
        except (DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no frozen TensorFlow graph, or cut short ({error}): fetch it again") from error
        self.nodes: dict[str, NodeDef] = {node.name: node for node in graph.node}
        read = {_name(text) for node in graph.node for text in node.input}
        if not self.nodes or read - self.nodes.keys():
            raise ValueError(f"{path} is no frozen TensorFlow graph, or cut short (nodes are missing): fetch it again")

    def resolve(self, text: str) -> str:
        """Return the node whose value "name", "name:0" or "^name" has. Raises ValueError where there is none."""
        name = _name(text)
        if name not in self.nodes:
            raise ValueError(f"{self.path} has no node {name!r}")
        passed_on = self.nodes[name].op in ("Identity", "CheckNumerics")
        return self.resolve(self.nodes[name].input[0]) if passed_on else name

    def inputs(self, name: str) -> list[str]:
        """Return the nodes that a node reads, without those that it only waits for."""
        return [self.resolve(text) for text in self.nodes[name].input if text[:1] != "^"]

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value of a constant node, None for another kind of node."""
        node = self.nodes[name]
        return make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None

    def function(
        self, fetches: Sequence[str], feed: str, device: torch.device | str = "cpu"
    ) -> Callable[[Tensor], list[Tensor]]:
        """Return a function from the value of `feed` to those of `fetches`, on a device and without TF32.

        Raises ValueError for an unknown name or an operation that is not supported.
        """
        feed, names = self.resolve(feed), [self.resolve(text) for text in fetches]
        steps: dict[str, tuple[Compute, list[str]]] = {}

        def add(name: str) -> None:
            if name != feed and name not in steps:
                compute, inputs = self._step(name, torch.device(device))
                for other in inputs:
                    add(other)
                steps[name] = compute, inputs

        for name in names:
            add(name)
        last = {other: name for name, (_, inputs) in steps.items() for other in inputs}

        @full_float32()
        @torch.no_grad()
        def run(x: Tensor) -> list[Tensor]:
            values = {feed: x}
            for name, (compute, inputs) in steps.items():
                values[name] = compute(*(values[other] for other in inputs))
                for other in set(inputs) - set(names):
                    if last[other] == name:  # memory is for what is still read
                        del values[other]
            return [values[name] for name in names]

        return run

    def _step(self, name: str, device: torch.device) -> tuple[Compute, list[str]]:
        """Return how a node's value is computed, and from which. A normalization is computed with the convolution before it."""
        node, inputs = self.nodes[name], self.inputs(name)
        held = [self.constant(other) for other in inputs]
        if node.op == "BatchNormWithGlobalNormalization" and self.nodes[inputs[0]].op == "Conv2D":
            scale, shift = _scale_and_shift(node, held[1:])
            source = self.nodes[inputs[0]]
            inputs = self.inputs(source.name)
            weight = self.constant(inputs[1]).astype(np.float64) * scale
            return _convolution(source, weight, shift, device), inputs[:1]
        if node.op not in OPERATIONS:
            raise ValueError(f"{self.path}: {name!r} has the operation {node.op}, which is not supported")
        compute = OPERATIONS[node.op](node, held, device)
        return compute, [other for other, value in zip(inputs, held, strict=True) if value is None]


def _name(text: str) -> str:
    return text.removeprefix("^").partition(":")[0]


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return what TensorFlow's SAME adds before and after: as many outputs as strides begin, the odd one after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _windowed(node: NodeDef, kernel: Sequence[int], work: Callable, filler: float = 0.0) -> Compute:
    """Return a function of (B, H, W, C) that pads as the node says and calls work(x in NCHW, strides, padding around)."""
    stride, same = tuple(node.attr["strides"].list.i)[1:3], node.attr["padding"].s == b"SAME"

    def compute(x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        (top, bottom), (left, right) = (
            _same_padding(*sizes) if same else (0, 0) for sizes in zip(x.shape[2:], kernel, stride)
        )
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom), value=filler), 0, 0
        return work(x, stride, (top, left)).permute(0, 2, 3, 1)

    return compute


def _convolution(node: NodeDef, weight: np.ndarray, bias: np.ndarray | None, device: torch.device) -> Compute:
    """Return a convolution with weights (height, width, in, out) and a bias (out,)."""
    w = torch.from_numpy(weight.astype(np.float32)).to(device).permute(3, 2, 0, 1)
    w = w.contiguous(memory_format=torch.channels_last)
    b = None if bias is None else torch.from_numpy(bias.astype(np.float32)).to(device)
    return _windowed(node, w.shape[2:], lambda x, stride, around: F.conv2d(x, w, b, stride, around))


def _scale_and_shift(node: NodeDef, held: Held) -> tuple[np.ndarray, np.ndarray]:
    """Return a normalization as x * scale + shift, float64, from its mean, variance, beta and gamma (C,)."""
    mean, variance, beta, gamma = (values.astype(np.float64) for values in held)
    scale = (variance + node.attr["variance_epsilon"].f) ** -0.5
    if node.attr["scale_after_normalization"].b:
        scale = scale * gamma
    return scale, beta - mean * scale


def _pool(node: NodeDef, held: Held, device: torch.device) -> Compute:
    kernel = tuple(node.attr["ksize"].list.i)[1:3]
    if node.op == "MaxPool":
        return _windowed(node, kernel, lambda x, stride, around: F.max_pool2d(x, kernel, stride, around), -math.inf)
    if node.attr["padding"].s == b"SAME" and set(node.attr["strides"].list.i) != {1}:
        raise ValueError(f"AvgPool {node.name!r} has strides and SAME padding, which is not supported")
    return _windowed(
        node, kernel, lambda x, stride, around: F.avg_pool2d(x, kernel, stride, around, count_include_pad=False)
    )


def _resize(node: NodeDef, held: Held, device: torch.device) -> Compute:
    """Return TensorFlow 1's bilinear resize: new pixel i lies at i * size / length, and the last ones repeat the edge."""
    if node.attr["align_corners"].b or node.attr["half_pixel_centers"].b:
        raise ValueError(f"ResizeBilinear {node.name!r} has aligned corners or pixel centers, which is not supported")

    def resize(x: Tensor) -> Tensor:
        for axis, length in ((2, int(held[1][1])), (1, int(held[1][0]))):  # within rows first, as TensorFlow does
            size = x.shape[axis]
            if size == length:
                continue
            place = np.arange(length, dtype=np.float32) * (np.float32(size) / np.float32(length))
            low = np.floor(place).astype(np.int64)
            indices = [torch.from_numpy(np.minimum(i, size - 1)).to(x.device) for i in (low, low + 1)]
            weight = torch.from_numpy(place - low).to(x).view(-1, *[1] * (3 - axis))
            below, above = (x.index_select(axis, index) for index in indices)
            x = below + (above - below) * weight
        return x

    return resize


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Compute]:
    """Return the maker of an operation of values and constants."""

    def make(node: NodeDef, held: Held, device: torch.device) -> Compute:
        fixed = [None if value is None else torch.from_numpy(value).to(device) for value in held]

        def compute(*values: Tensor) -> Tensor:
            rest = iter(values)
            return function(*(next(rest) if value is None else value for value in fixed))

        return compute

    return make


OPERATIONS: dict[str, Callable[[NodeDef, Held, torch.device], Compute]] = {
    "AvgPool": _pool,
    "Concat": lambda node, held, device: lambda *values: torch.cat(values, int(held[0])),
    "Conv2D": lambda node, held, device: _convolution(node, held[1], None, device),
    "MaxPool": _pool,
    "Mean": lambda node, held, device: lambda x: x.mean(held[1].flatten().tolist(), node.attr["keep_dims"].b),
    "Mul": _elementwise(torch.mul),
    "Relu": _elementwise(torch.relu),
    "ResizeBilinear": _resize,
    "Sub": _elementwise(torch.sub),
}
"""Makers of each operation from its node, its constants, and the device."""
