"""Frozen TensorFlow graphs (a GraphDef in a .pb file), run in torch without TensorFlow.

    graph = FrozenGraph("classify_image_graph_def.pb")
    pool, spatial = graph.run(["pool_3:0", "mixed_6/conv:0"], {"ExpandDims:0": images})

Tensors go in and come out as TensorFlow has them: images as (B, H, W, C), which to torch's convolutions is NCHW in
channels_last, so that nothing is ever copied from one layout to the other.
"""

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from torch import Tensor

from evaluations.c2i.graph_operations import (
    DTYPES,
    LEAST_INPUTS,
    OPERATIONS,
    Bound,
    Compute,
    convolution,
    output_dtype,
    output_type,
    peak,
    scale_and_shift,
)
from utils.precision import full_float32

# Values up to the first are nothing unusual; a result that is proven to stay below the second has not overflowed float32,
# nor has any sum on the way to it.
_USUAL, _SAFE = 1e6, 1e30


@dataclass
class _Step:
    """One operation of a plan. `release` are the values that nothing reads after it."""

    node: NodeDef
    inputs: list[str]
    output: str
    compute: Compute
    release: list[str]
    measure: list[str]


@dataclass
class _Plan:
    """What fetches some values from others: constants that are fetched or read as they are, then steps in order.

    `alias` has the value that stands for a node which changes nothing. Where a step measures values, no value was NaN or
    infinite as long as all that were measured are usual; CheckNumerics is left out then.
    """

    constants: dict[str, Tensor]
    steps: list[_Step]
    alias: dict[str, str]


class FrozenGraph:
    """The graph in the file `path`. Reading it needs no device; constants move to that of the values fed.

    Operations that the published Inception graph and its like have are known; an unknown one matters only where something
    fetched depends on it.
    Raises FileNotFoundError, or ValueError where the file is not a complete GraphDef.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._graph = _parse(self.path)
        self.nodes: dict[str, NodeDef] = {}
        for node in self._graph.node:
            if node.name in self.nodes:
                raise ValueError(f"{self.path} has two nodes called {node.name!r}: it is damaged")
            self.nodes[node.name] = node
        for node in self._graph.node:
            for text in node.input:
                if _name(text) not in self.nodes:
                    raise ValueError(
                        f"{self.path}: node {node.name!r} reads {text!r}, which is not in the file; it may be cut short"
                    )
        self._plans: dict[tuple, _Plan] = {}

    def run(self, fetches: Sequence[str], feeds: dict[str, Tensor]) -> list[Tensor]:
        """The values called `fetches` ("pool_3:0" or "pool_3"), computed from `feeds`, on the device these are on.

        Only what the fetches need is computed, always in float32 where the graph says so (no TF32). How to do so is worked
        out at the first call for these names and this device. Results may share memory with what was fed.
        Raises ValueError: an unknown name, an operation that is not supported, values that do not fit, and, as
        TensorFlow does, NaN or infinite values where the graph has a CheckNumerics.
        """
        values = {self._known(name, "fed"): value for name, value in feeds.items()}
        devices = {value.device for value in values.values()} or {torch.device("cpu")}
        if len(devices) > 1:
            raise ValueError(f"values fed to {self.path.name} are on several devices: {sorted(map(str, devices))}")
        device = devices.pop()
        for name, value in values.items():
            expected = output_dtype(self.nodes[name])
            if expected is not None and value.dtype != expected:
                raise ValueError(f"{name!r} of {self.path.name} is of {expected}, but {value.dtype} was fed")
        names = [self._known(name, "fetched") for name in fetches]
        with torch.no_grad(), full_float32():
            plan = self._plan(names, values, device, fused=True)
            results = self._execute(plan, names, values)
            if results is None:  # something may be NaN or infinite: the plain way finds where, or that it is not so
                plan = self._plan(names, values, device, fused=False)
                results = self._execute(plan, names, values)
        return results

    def check(self, fetches: Sequence[str], feeds: Iterable[str]) -> None:
        """Raises the ValueErrors that `run` would raise whatever the values fed: names, operations, cycles."""
        names = [self._known(name, "fetched") for name in fetches]
        self._plan(names, [self._known(name, "fed") for name in feeds], torch.device("cpu"), fused=False, keep=False)

    def inputs(self, name: str) -> list[str]:
        """The names of the values that a node reads, in order, without those that it only waits for."""
        return [_name(text) for text in self.nodes[self._known(name, "asked for")].input if text[:1] != "^"]

    def subgraph(self, fetches: Sequence[str], feeds: Iterable[str]) -> bytes:
        """A GraphDef of only what the fetches need, each fed node a Placeholder that takes a batch of any size.

        Without the static shapes that old files carry (`_output_shapes`), which may say that the batch is one image.
        """
        fed = {self._known(name, "fed") for name in feeds}
        order = self._order([self._known(name, "fetched") for name in fetches], fed)
        part = GraphDef()
        part.versions.CopyFrom(self._graph.versions)
        for name in order:
            node = part.node.add()
            if name in fed:
                node.name, node.op = name, "Placeholder"
                node.attr["dtype"].type = output_type(self.nodes[name]) or types_pb2.DT_FLOAT
                node.attr["shape"].shape.unknown_rank = True
                continue
            node.CopyFrom(self.nodes[name])
            if "_output_shapes" in node.attr:
                del node.attr["_output_shapes"]
        return part.SerializeToString()

    def _known(self, text: str, what: str) -> str:
        """The node that a value's name is of."""
        name, _, port = text.partition(":")
        if name not in self.nodes:
            close = difflib.get_close_matches(name, self.nodes, n=3)
            hint = f"; close to it are {', '.join(close)}" if close else ""
            raise ValueError(f"{self.path} has no node {name!r}, which is {what} ({len(self.nodes)} nodes){hint}")
        if port not in ("", "0"):
            raise ValueError(f"{text!r}: only first outputs (':0') can be {what}")
        return name

    def _order(self, names: Iterable[str], fed: Iterable[str], *, waits: bool = True) -> list[str]:
        """The nodes that `names` need, each after what it reads.

        With `waits` also the CheckNumerics nodes that they wait for; nothing else that is waited for changes a value.
        """
        fed = set(fed)
        done: dict[str, bool] = {}  # False while what it reads is being looked at
        for start in names:
            stack = [start]
            while stack:
                name = stack[-1]
                if name not in done:
                    done[name] = False
                    reads = [] if name in fed else self._reads(name, waits)
                    for other in reads:
                        if done.get(other) is False:
                            raise ValueError(f"{self.path}: node {other!r} depends on itself, by way of {name!r}")
                    stack += [other for other in reads if other not in done]
                    continue
                stack.pop()
                if not done[name]:
                    del done[name]  # dicts keep the order of insertion: that of completion is wanted
                    done[name] = True
        return [name for name, complete in done.items() if complete]

    def _reads(self, name: str, waits: bool) -> list[str]:
        found = []
        for text in self.nodes[name].input:
            other = _name(text)
            if text[:1] != "^" or (waits and self.nodes[other].op == "CheckNumerics"):
                found.append(other)
        return found

    def _plan(
        self, names: list[str], fed: Iterable[str], device: torch.device, *, fused: bool, keep: bool = True
    ) -> _Plan:
        key = (tuple(names), tuple(sorted(fed)), str(device), fused)
        if key not in self._plans:
            plan = _Planner(self, names, set(fed), device, fused).plan()
            if not keep:
                return plan
            self._plans[key] = plan
        return self._plans[key]

    def _execute(self, plan: _Plan, names: list[str], fed: dict[str, Tensor]) -> list[Tensor] | None:
        """The fetched values; None where a plan that proves its values finite could not."""
        values = {**plan.constants, **fed}
        peaks = []
        for step in plan.steps:
            peaks += [peak(values[name]) for name in step.measure]
            try:
                values[step.output] = step.compute(*(values[name] for name in step.inputs))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError, TypeError) as error:
                shapes = ", ".join(str(tuple(values[name].shape)) for name in step.inputs)
                raise ValueError(
                    f"{self.path.name}: {step.node.op} {step.node.name!r} cannot take values of shape {shapes} ({error})"
                ) from error
            for name in step.release:
                del values[name]
        # A comparison with NaN is false as well.
        if peaks and not bool(torch.stack(peaks).amax() <= _USUAL):
            return None
        return [values[plan.alias.get(name, name)] for name in names]


class _Planner:
    """Works out a plan. Fused, a convolution takes in the normalization, bias and Relu that follow it."""

    def __init__(self, graph: FrozenGraph, names: list[str], fed: set[str], device: torch.device, fused: bool) -> None:
        self.graph, self.names, self.fed, self.device = graph, names, fed, device
        self.alias: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        order = graph._order(names, fed)
        self.checked = any(graph.nodes[name].op == "CheckNumerics" for name in order if name not in fed)
        half = any(output_dtype(graph.nodes[name]) == torch.float16 for name in order)
        # float16 overflows far below what is looked for here.
        self.fused = fused and not (self.checked and half)
        if self.fused:
            order = graph._order(names, fed, waits=False)
        self.order = order
        self.reads: dict[str, list[str]] = {}
        for name in order:
            self._resolve(name)
        self.readers = Counter(other for reads in self.reads.values() for other in reads)
        self.fetched = {self.alias.get(name, name) for name in names}

    def _resolve(self, name: str) -> None:
        """Notes what a node reads, past those that change nothing, and computes it where all that it reads is constant."""
        if name in self.fed:
            return
        node = self.graph.nodes[name]
        if node.op not in OPERATIONS:
            known = "a placeholder that nothing was fed to" if node.op == "Placeholder" else "not supported"
            wanted = ", ".join(repr(fetch) for fetch in self.names)
            raise ValueError(f"{self.graph.path}: {wanted} needs node {name!r}, whose operation {node.op} is {known}")
        if node.op == "Const":
            self.constants[name] = _constant(self.graph.path, node)
            return
        for text in node.input:
            if text[:1] != "^" and ":" in text and not text.endswith(":0"):
                raise ValueError(f"{self.graph.path}: node {name!r} reads {text!r}; only first outputs are supported")
        reads = [self.alias.get(other, other) for other in self.graph._reads(name, waits=False)]
        _check_node(self.graph.path, node, len(reads))
        constant = all(other in self.constants for other in reads)
        if node.op == "Identity" or (node.op == "CheckNumerics" and self.fused and not constant):
            self.alias[name] = reads[0]
        elif constant:
            compute, _ = self._make(node, reads, torch.device("cpu"))
            self.constants[name] = compute()
        else:
            self.reads[name] = reads

    def _make(self, node: NodeDef, reads: list[str], device: torch.device) -> tuple[Compute, Bound | None]:
        constants = [self.constants.get(name) for name in reads]
        try:
            return OPERATIONS[node.op](node, constants, device)
        except ValueError as error:
            raise ValueError(f"{self.graph.path}: {node.op} {node.name!r} {error}") from error

    def plan(self) -> _Plan:
        """The steps, with what each lets go of and, where something is to be proven, what it has to look at."""
        follow = self._followers() if self.fused else {}
        skip = {name for chain in follow.values() for name in chain}
        # The whole chain is computed in its first node's place, under its last node's name.
        ends = {name: chain[-1] for name, chain in follow.items()}
        steps: list[_Step] = []
        bounds: list[Bound | None] = []
        for name, reads in self.reads.items():
            if name in skip:
                continue
            node = self.graph.nodes[name]
            if name in follow:
                compute, bound = self._fuse(node, follow[name])
            else:
                compute, bound = self._make(node, reads, self.device)
            inputs = [other for other in reads if other not in self.constants]
            steps.append(_Step(node, inputs, ends.get(name, name), compute, [], []))
            bounds.append(bound)
        proven = not (self.fused and self.checked) or self._prove(steps, bounds)
        if not proven:  # no proof to be had, for instance as a weight is NaN: the plain way looks at every value
            return _Planner(self.graph, self.names, self.fed, self.device, fused=False).plan()
        self._release(steps)
        kept = {name: self.constants[name].to(self.device) for name in self.fetched if name in self.constants}
        return _Plan(kept, steps, self.alias)

    def _followers(self) -> dict[str, list[str]]:
        """Convolution → the nodes after it, each the only reader of the one before, that it can take in."""
        reader = {other: name for name, reads in self.reads.items() for other in reads}
        found = {}
        for name, reads in self.reads.items():
            if self.graph.nodes[name].op != "Conv2D" or reads[1] not in self.constants:
                continue
            chain, last = [], name
            while last not in self.fetched and self.readers[last] == 1:
                following = reader[last]
                if not self._can_take_in(following, last, self.constants[reads[1]].shape[-1]):
                    break
                chain.append(following)
                last = following
                if self.graph.nodes[following].op == "Relu":
                    break
            if chain:
                found[name] = chain
        return found

    def _can_take_in(self, name: str, source: str, channels: int) -> bool:
        op, reads = self.graph.nodes[name].op, self.reads[name]
        others = [self.constants.get(other) for other in reads if other != source]
        if op == "Relu":
            return True
        if op == "BatchNormWithGlobalNormalization":
            return reads[0] == source and all(other is not None for other in others)
        return (
            op in ("Add", "AddV2", "BiasAdd")
            and others[0] is not None
            and others[0].dim() <= 4
            and others[0].numel() in (1, channels)
            and others[0].shape[-1:].numel() == others[0].numel()
        )

    def _fuse(self, node: NodeDef, chain: list[str]) -> tuple[Compute, Bound]:
        weight = self.constants[self.reads[node.name][1]]
        dtype = weight.dtype
        # In float64, so that only one rounding is added to what TensorFlow's separate steps have.
        weight = weight.double()
        bias = torch.zeros(weight.shape[-1], dtype=torch.float64)
        relu = False
        for name in chain:
            follower = self.graph.nodes[name]
            if follower.op == "Relu":
                relu = True
            elif follower.op == "BatchNormWithGlobalNormalization":
                scale, shift = scale_and_shift(follower, [self.constants[n] for n in self.reads[name][1:]])
                weight, bias = weight * scale, bias * scale + shift
            else:
                (other,) = (self.constants[n] for n in self.reads[name] if n in self.constants)
                bias = bias + other.double().flatten()
        try:
            return convolution(node, weight.to(dtype), bias.to(dtype), relu, self.device)
        except ValueError as error:
            raise ValueError(f"{self.graph.path}: {node.op} {node.name!r} {error}") from error

    def _prove(self, steps: list[_Step], bounds: list[Bound | None]) -> bool:
        """Marks the values to look at so that all others are known to be finite; False where that is not possible.

        Looking at every value that a CheckNumerics reads would cost as much as a twentieth of all computation. How much
        larger a step can make its values is known from the constants, so that it is enough to look at a few.
        """
        peaks = dict.fromkeys(self.fed, _USUAL)
        measured = set()

        def look_at(step: _Step, names: Iterable[str]) -> None:
            for name in names:
                if name not in measured:
                    measured.add(name)
                    step.measure.append(name)
                peaks[name] = _USUAL

        for step, bound in zip(steps, bounds, strict=True):
            look_at(step, [name for name in step.inputs if name in self.fed])
            if bound is None:
                return False
            peak = bound(*(peaks[name] for name in step.inputs))
            if not peak <= _SAFE:
                look_at(step, step.inputs)
                peak = bound(*(peaks[name] for name in step.inputs))
            if not peak <= _SAFE:
                return False
            peaks[step.output] = peak
        return True

    def _release(self, steps: list[_Step]) -> None:
        last: dict[str, int] = {}
        for number, step in enumerate(steps):
            last.update(dict.fromkeys([*step.inputs, step.output], number))
        for name, number in last.items():
            if name not in self.fetched:
                steps[number].release.append(name)


def _parse(path: Path) -> GraphDef:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}: a frozen TensorFlow graph (.pb) was expected there")
    content = path.read_bytes()
    start = content[:512].lstrip().lower()
    if not content:
        raise ValueError(f"{path} is empty: fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull`, or fetch it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(
            f"{path} is a web page and not a TensorFlow graph: the download got an error page; fetch it again"
        )
    graph = GraphDef()
    try:
        graph.ParseFromString(content)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} ({len(content):,} bytes) is not a frozen TensorFlow graph, or is cut short: {error}"
        ) from error
    if not graph.node:
        raise ValueError(f"{path} ({len(content):,} bytes) is not a frozen TensorFlow graph: no nodes are in it")
    return graph


def _name(text: str) -> str:
    """The node in "name", "name:0" or "^name", which is only waited for."""
    return text.removeprefix("^").partition(":")[0]


def _check_node(path: Path, node: NodeDef, count: int) -> None:
    least = LEAST_INPUTS.get(node.op, 1)
    if count < least:
        raise ValueError(f"{path}: {node.op} {node.name!r} reads {count} values, expected {least}")
    layout = node.attr["data_format"].s if "data_format" in node.attr else b"NHWC"
    if layout != b"NHWC":
        raise ValueError(f"{path}: {node.op} {node.name!r} has the layout {layout.decode()}; only NHWC is supported")


def _constant(path: Path, node: NodeDef) -> Tensor:
    """The value of a Const node, in any of the ways a TensorProto can hold it."""
    if "value" not in node.attr:
        raise ValueError(f"{path}: constant {node.name!r} has no value; the file is damaged")
    proto: TensorProto = node.attr["value"].tensor
    if proto.dtype not in DTYPES:
        kind = types_pb2.DataType.Name(proto.dtype).removeprefix("DT_").lower()
        raise ValueError(f"{path}: constant {node.name!r} is of type {kind}, which cannot be computed with here")
    _, dtype, field = DTYPES[proto.dtype]
    shape = [dim.size for dim in proto.tensor_shape.dim]
    count = math.prod(shape)
    if proto.tensor_content:
        values = np.frombuffer(proto.tensor_content, dtype=np.dtype(dtype).newbyteorder("<"))
    elif field == "half_val":
        values = np.array(proto.half_val, dtype=np.uint16).view(np.float16)
    else:
        values = np.array(getattr(proto, field), dtype=dtype)
    # Repeated values are left out at the end; none at all stands for zeros.
    if values.size < count and not proto.tensor_content:
        values = np.concatenate([values, np.full(count - values.size, values[-1] if values.size else 0, dtype)])
    if values.size != count:
        raise ValueError(
            f"{path}: constant {node.name!r} has {values.size} values for shape {shape}; the file is damaged"
        )
    return torch.from_numpy(values.astype(dtype).reshape(shape))
