"""The frozen TensorFlow graph of the evaluator's Inception network, run in torch without TensorFlow.

    graph = FrozenGraph("classify_image_graph_def.pb")
    pool, spatial = graph.run(["pool_3:0", "mixed_6/conv:0"], {"ExpandDims:0": images})

Tensors go in and come out as TensorFlow has them: images as (B, H, W, C), which to torch's convolutions is NCHW in
channels_last. Operations are those of the network's features. CheckNumerics is left out: whoever takes the features has to see that they are finite.
"""

import difflib
import graphlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

from utils.precision import full_float32

# What a node computes from those of its inputs that are not constants.
Compute = Callable[..., Tensor]
PASSED_ON = {"Identity", "CheckNumerics"}


class FrozenGraph:
    """The graph in a file. Constants move to the device of the values fed.

    Raises FileNotFoundError, or ValueError where the file is not a complete GraphDef.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._graph = Path(path), GraphDef()
        try:
            self._graph.ParseFromString(self.path.read_bytes())
        except (DecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not a frozen TensorFlow graph, or is cut short ({error}): fetch it again"
            ) from error
        self.nodes: dict[str, NodeDef] = {node.name: node for node in self._graph.node}
        missing = {_name(text) for node in self._graph.node for text in node.input} - self.nodes.keys()
        if missing or not self.nodes:
            lacks = f"lacks the nodes {', '.join(sorted(missing)[:3])}" if missing else "has no nodes"
            raise ValueError(f"{path} {lacks}: it is cut short, or no TensorFlow graph; fetch it again")
        self._plans: dict[tuple, list[tuple[str, Compute, list[str], list[str]]]] = {}

    def run(self, fetches: Sequence[str], feeds: dict[str, Tensor]) -> list[Tensor]:
        """Return the values called `fetches` ("pool_3:0" or "pool_3"), computed from `feeds` on their device, without TF32.

        Raises ValueError for an unknown name or an operation that is not supported.
        """
        values = {self._known(name): value for name, value in feeds.items()}
        names, device = [self._known(name) for name in fetches], next(iter(values.values())).device
        key = (*names, None, *values, device)
        if key not in self._plans:
            self._plans[key] = self._plan(names, set(values), device)
        with torch.no_grad(), full_float32():
            for name, compute, inputs, unused in self._plans[key]:
                values[name] = compute(*(values[other] for other in inputs))
                for other in unused:
                    del values[other]
        return [values[name] for name in names]

    def check(self, fetches: Sequence[str], feeds: Iterable[str]) -> None:
        """Raises the ValueErrors that `run` would raise whatever the values fed."""
        self._plan([self._known(name) for name in fetches], {self._known(name) for name in feeds}, torch.device("cpu"))

    def inputs(self, name: str) -> list[str]:
        """Return the names of the values that a node reads, without those that it only waits for."""
        return [_name(text) for text in self.nodes[self._known(name)].input if text[:1] != "^"]

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value of a constant node, None for another kind of node."""
        node = self.nodes[name]
        if node.op in PASSED_ON:
            return self.constant(self.inputs(name)[0])
        return make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None

    def subgraph(self, fetches: Sequence[str], feeds: Iterable[str]) -> bytes:
        """Return a GraphDef of what the fetches need, each fed node a Placeholder that takes a batch of any size."""
        fed, part = {self._known(name) for name in feeds}, GraphDef()
        part.versions.CopyFrom(self._graph.versions)
        for name in self._order([self._known(name) for name in fetches], fed, waits=True):
            node = part.node.add()
            if name in fed:
                node.name, node.op = name, "Placeholder"
                node.attr["dtype"].type = types_pb2.DT_FLOAT
                node.attr["shape"].shape.unknown_rank = True
            else:
                node.CopyFrom(self.nodes[name])
                if "_output_shapes" in node.attr:  # old files may say that the batch is one image
                    del node.attr["_output_shapes"]
        return part.SerializeToString()

    def _known(self, text: str) -> str:
        name = text.removesuffix(":0")
        if name not in self.nodes:
            close = difflib.get_close_matches(name, self.nodes, n=3)
            raise ValueError(
                f"{self.path} has no node {name!r}" + f"; close to it are {', '.join(close)}" * bool(close)
            )
        return name

    def _order(self, names: Sequence[str], fed: set[str], waits: bool = False) -> list[str]:
        """Return the nodes that `names` need, each after what it reads (and, with `waits`, what it waits for)."""
        reads: dict[str, list[str]] = {}
        todo = list(names)
        while todo:
            name = todo.pop()
            if name not in reads:
                text = [] if name in fed else self.nodes[name].input
                reads[name] = [_name(other) for other in text if waits or other[:1] != "^"]
                todo += reads[name]
        return list(graphlib.TopologicalSorter(reads).static_order())

    def _plan(
        self, names: list[str], fed: set[str], device: torch.device
    ) -> list[tuple[str, Compute, list[str], list[str]]]:
        """Return steps in order: the value's name, how it is computed, from which, and which nothing reads after it.

        A normalization is folded into the convolution before it where nothing else reads that.
        """
        order = self._order(names, fed)
        readers = Counter(other for name in order if name not in fed for other in self.inputs(name))
        readers.update(names)
        constants = {name: value for name in order if name not in fed and (value := self.constant(name)) is not None}
        steps: list[tuple[str, Compute, list[str]]] = []
        for name in order:
            if name in fed or name in constants:
                continue
            node, inputs = self.nodes[name], [other for other in self.inputs(name) if other not in constants]
            if node.op not in OPERATIONS:
                what = "a placeholder that nothing was fed to" if node.op == "Placeholder" else "not supported"
                raise ValueError(f"{self.path}: {name!r} has the operation {node.op}, which is {what}")
            held = [constants.get(other) for other in self.inputs(name)]
            source = self.nodes[inputs[0]]
            if node.op == "BatchNormWithGlobalNormalization" and source.op == "Conv2D" and readers[source.name] == 1:
                scale, shift = _scale_and_shift(node, held)
                weight = constants[self.inputs(source.name)[1]].astype(np.float64) * scale
                steps.remove(next(step for step in steps if step[0] == source.name))
                inputs, compute = [self.inputs(source.name)[0]], _convolution(source, weight, shift, device)
            else:
                compute = OPERATIONS[node.op](node, held, device)
            steps.append((name, compute, inputs))
        last = {other: number for number, (_, _, inputs) in enumerate(steps) for other in inputs}
        unused: list[list[str]] = [[] for _ in steps]
        for other, number in last.items():
            if other not in names:
                unused[number].append(other)
        return [(*step, gone) for step, gone in zip(steps, unused)]


def _name(text: str) -> str:
    """Return the node in "name", "name:0" or "^name", which is only waited for."""
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


def _pool(node: NodeDef, held: list, device: torch.device) -> Compute:
    kernel = tuple(node.attr["ksize"].list.i)[1:3]
    if node.op == "MaxPool":
        return _windowed(node, kernel, lambda x, stride, around: F.max_pool2d(x, kernel, stride, around), -math.inf)

    def mean(x: Tensor, stride: tuple[int, int], around: tuple[int, int]) -> Tensor:
        return F.avg_pool2d(x, kernel, stride, around, count_include_pad=False)

    if node.attr["padding"].s == b"SAME" and set(node.attr["strides"].list.i) != {1}:
        raise ValueError(f"AvgPool {node.name!r} has strides and SAME padding, which is not supported")
    return _windowed(node, kernel, mean)


def _scale_and_shift(node: NodeDef, held: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return a normalization as x * scale + shift, float64, from its mean, variance, beta and gamma (C,)."""
    mean, variance, beta, gamma = (values.astype(np.float64) for values in held[1:])
    scale = (variance + node.attr["variance_epsilon"].f) ** -0.5
    if node.attr["scale_after_normalization"].b:
        scale = scale * gamma
    return scale, beta - mean * scale


def _normalization(node: NodeDef, held: list, device: torch.device) -> Compute:
    scale, shift = (torch.from_numpy(values).float().to(device) for values in _scale_and_shift(node, held))
    return lambda x: x * scale + shift


def _resize(node: NodeDef, held: list, device: torch.device) -> Compute:
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
    """Makes an operation of values and constants."""

    def make(node: NodeDef, held: list, device: torch.device) -> Compute:
        fixed = [None if value is None else torch.from_numpy(value).to(device) for value in held]

        def compute(*values: Tensor) -> Tensor:
            rest = iter(values)
            return function(*(next(rest) if value is None else value for value in fixed))

        return compute

    return make


def _mean(node: NodeDef, held: list, device: torch.device) -> Compute:
    axes, keep = held[1].flatten().tolist(), node.attr["keep_dims"].b
    return lambda x: x.mean(axes, keepdim=keep)


def _concat(node: NodeDef, held: list, device: torch.device) -> Compute:
    axis = int(held[0 if node.op == "Concat" else -1])  # later versions have the axis at the end
    return lambda *values: torch.cat(values, axis)


OPERATIONS: dict[str, Callable[..., Compute]] = {
    "AvgPool": _pool,
    "BatchNormWithGlobalNormalization": _normalization,
    "CheckNumerics": _elementwise(lambda x: x),
    "Concat": _concat,
    "ConcatV2": _concat,
    "Conv2D": lambda node, held, device: _convolution(node, held[1], None, device),
    "Identity": _elementwise(lambda x: x),
    "MaxPool": _pool,
    "Mean": _mean,
    "Mul": _elementwise(torch.mul),
    "Relu": _elementwise(torch.relu),
    "ResizeBilinear": _resize,
    "Sub": _elementwise(torch.sub),
}
"""Makers of each operation from its node, its inputs that are constants (None for the others), and the device."""
