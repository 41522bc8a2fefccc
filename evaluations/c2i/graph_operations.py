"""What the operations of a frozen TensorFlow graph compute, in torch; evaluations/c2i/frozen_graph.py puts them together.

    compute, bound = OPERATIONS["Relu"](node, [None], torch.device("cpu"))      # None: an input that is not constant
    y = compute(x)

Values are as TensorFlow has them: images (B, H, W, C).
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from torch import Tensor

# What an operation computes from those of its inputs that are not constants, and how large the result's absolute values
# can be, given how large theirs are (None: not known without looking).
Compute = Callable[..., Tensor]
Bound = Callable[..., float]
# What a node becomes, given its inputs: the constants among them, None for the others.
Make = Callable[[NodeDef, "list[Tensor | None]", torch.device], "tuple[Compute, Bound | None]"]

DTYPES = {
    types_pb2.DT_FLOAT: (torch.float32, np.float32, "float_val"),
    types_pb2.DT_DOUBLE: (torch.float64, np.float64, "double_val"),
    types_pb2.DT_HALF: (torch.float16, np.float16, "half_val"),
    types_pb2.DT_INT32: (torch.int32, np.int32, "int_val"),
    types_pb2.DT_INT64: (torch.int64, np.int64, "int64_val"),
    types_pb2.DT_UINT8: (torch.uint8, np.uint8, "int_val"),
    types_pb2.DT_BOOL: (torch.bool, np.bool_, "bool_val"),
}


def output_type(node: NodeDef) -> int:
    """The TensorFlow type of what a node gives, 0 where its attributes do not say."""
    return next((node.attr[name].type for name in ("dtype", "DstT", "T") if name in node.attr), 0)


def output_dtype(node: NodeDef) -> torch.dtype | None:
    # ResizeBilinear gives float32 whatever its T.
    return torch.float32 if node.op == "ResizeBilinear" else DTYPES.get(output_type(node), (None,))[0]


def peak(value: Tensor) -> Tensor:
    """The largest absolute value, float32; NaN where one is."""
    if not value.numel():
        return torch.zeros((), device=value.device)
    low, high = torch.aminmax(value.float())
    return torch.maximum(-low, high)


def _bind(function: Callable[..., Tensor], constants: list[Tensor | None], device: torch.device) -> Compute:
    """The function of all inputs as one of those that are not constants."""
    if all(constant is None for constant in constants):
        return function
    held = [constant if constant is None else constant.to(device) for constant in constants]

    def compute(*variables: Tensor) -> Tensor:
        rest = iter(variables)
        return function(*(next(rest) if value is None else value for value in held))

    return compute


def _bind_bound(function: Bound, constants: list[Tensor | None]) -> Bound:
    held = [None if constant is None else _constant_peak(constant) for constant in constants]

    def bound(*peaks: float) -> float:
        rest = iter(peaks)
        return function(*(next(rest) if value is None else value for value in held))

    return bound


def _constant_peak(constant: Tensor) -> float:
    return float(peak(constant)) if constant.numel() else 0.0


def _largest(*peaks: float) -> float:
    # Not max(): that may lose a NaN.
    return sum(peaks) if any(math.isnan(peak) for peak in peaks) else max(peaks)


def _elementwise(function: Callable[..., Tensor], bound: Bound) -> Make:
    def make(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
        return _bind(function, constants, device), _bind_bound(bound, constants)

    return make


def _fixed(node: NodeDef, constant: Tensor | None, what: str) -> list[int]:
    """An input that the graph has to hold as a constant, as a list."""
    if constant is None:
        raise ValueError(f"computes its {what} from other values; only constants are supported")
    return [int(value) for value in constant.flatten().tolist()]


def _windows(node: NodeDef, attribute: str) -> tuple[int, int]:
    """The height and width of an attribute with a value for each of N, H, W and C."""
    if attribute not in node.attr and attribute == "dilations":
        return 1, 1
    values = list(node.attr[attribute].list.i)
    if len(values) != 4 or values[0] != 1 or values[3] != 1 or min(values) < 1:
        raise ValueError(f"has {attribute} {values}; expected [1, height, width, 1]")
    return values[1], values[2]


def _is_same(node: NodeDef) -> bool:
    padding = node.attr["padding"].s
    if padding not in (b"SAME", b"VALID"):
        raise ValueError(f"has the padding {padding.decode() or 'none'!r}; SAME and VALID are supported")
    return padding == b"SAME"


def _same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """What TensorFlow's SAME adds before and after: as many outputs as strides begin, the odd one after."""
    reach = (kernel - 1) * dilation + 1
    total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


def convolution(
    node: NodeDef, weight: Tensor, bias: Tensor | None, relu: bool, device: torch.device
) -> tuple[Compute, Bound]:
    """A convolution of (B, H, W, C) with a constant `weight` (height, width, C, out), then bias (out,) and Relu."""
    if weight.dim() != 4:
        raise ValueError(f"has weights of shape {tuple(weight.shape)}; expected (height, width, in, out)")
    same, stride, dilation = _is_same(node), _windows(node, "strides"), _windows(node, "dilations")
    gain = float(weight.double().abs().sum((0, 1, 2)).amax())
    offset = 0.0 if bias is None else _constant_peak(bias)
    kernel = weight.shape[:2]
    weight = weight.to(device).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(device)
    fast = _onednn_convolution() if device.type == "cpu" and weight.dtype == torch.float32 else None

    def compute(x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        padding = [(0, 0), (0, 0)]
        if same:
            padding = [_same_padding(*sizes) for sizes in zip(x.shape[2:], kernel, stride, dilation)]
        if any(before != after for before, after in padding):
            x = F.pad(x, (*padding[1], *padding[0]))
            padding = [(0, 0), (0, 0)]
        around = (padding[0][0], padding[1][0])
        if fast is not None and x.numel():
            x = fast(x, weight, bias, around, stride, dilation, 1, "relu" if relu else "none", [None], "")
        else:
            x = F.conv2d(x, weight, bias, stride, around, dilation)
            if relu:
                x = x.relu_()
        return x.permute(0, 2, 3, 1)

    return compute, lambda peak: gain * peak + offset


@functools.cache
def _onednn_convolution() -> Callable[..., Tensor] | None:
    """oneDNN's convolution with the Relu in it, which torch.compile uses too, or None where this torch has no such thing.

    On a CPU it saves a pass over each result, and torch.conv2d leaves kernels of 1x1 to slower code at few images and one
    thread. It is no public function, so it is tried out before it is relied on.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    x, weight, bias = torch.tensor([[[[1.0, -2.0]]]]), torch.tensor([[[[3.0]]]]), torch.tensor([1.0])
    try:
        convolve = torch.ops.mkldnn._convolution_pointwise
        result = convolve(x, weight, bias, (0, 0), (1, 1), (1, 1), 1, "relu", [None], "")
    except Exception:  # what a missing or changed operator raises is torch's affair
        return None
    return convolve if result.flatten().tolist() == [4.0, 0.0] else None


def _make_convolution(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
    if constants[1] is None:
        raise ValueError("has weights that are not constant")
    compute, bound = convolution(node, constants[1], None, False, device)
    x = constants[0]
    return (compute, bound) if x is None else (lambda: compute(x.to(device)), bound)


def scale_and_shift(node: NodeDef, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A BatchNormWithGlobalNormalization as x * scale + shift, float64, from its mean, variance, beta and gamma (C,)."""
    mean, variance, beta, gamma = (parameter.double() for parameter in parameters)
    scale = torch.rsqrt(variance + node.attr["variance_epsilon"].f)
    if node.attr["scale_after_normalization"].b:
        scale = scale * gamma
    return scale, beta - mean * scale


def _make_normalization(
    node: NodeDef, constants: list[Tensor | None], device: torch.device
) -> tuple[Compute, Bound | None]:
    if any(constant is None for constant in constants[1:]):
        raise ValueError("has a mean, variance, beta or gamma that is not constant")
    scale, shift = (value.to(constants[1].dtype) for value in scale_and_shift(node, constants[1:]))
    gain, offset = _constant_peak(scale), _constant_peak(shift)
    compute = _bind(lambda x, scale, shift: x * scale + shift, [constants[0], scale, shift], device)
    return compute, lambda peak: gain * peak + offset


def _make_pool(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
    same, kernel, stride = _is_same(node), _windows(node, "ksize"), _windows(node, "strides")
    largest = node.op == "MaxPool"

    def pool(x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        padding = [(0, 0), (0, 0)]
        if same:
            padding = [_same_padding(*sizes) for sizes in zip(x.shape[2:], kernel, stride)]
        even = all(before == after for before, after in padding)
        around = (padding[0][0], padding[1][0]) if even else (0, 0)
        if largest:
            if not even:
                x = F.pad(x, (*padding[1], *padding[0]), value=-math.inf)
            x = F.max_pool2d(x, kernel, stride, around)
        elif even:
            x = F.avg_pool2d(x, kernel, stride, around, count_include_pad=False)
        else:
            inside = [_inside(*sizes) for sizes in zip(x.shape[2:], kernel, stride, padding)]
            share = [torch.tensor(counts, dtype=x.dtype, device=x.device) for counts in inside]
            x = F.avg_pool2d(F.pad(x, (*padding[1], *padding[0])), kernel, stride)
            x = x * (kernel[0] * kernel[1]) / (share[0][:, None] * share[1])
        return x.permute(0, 2, 3, 1)

    return _bind(pool, constants, device), _largest


def _inside(size: int, kernel: int, stride: int, padding: tuple[int, int]) -> list[int]:
    """How many values each window of an axis has that are not padding."""
    starts = range(-padding[0], size + padding[1] - kernel + 1, stride)
    return [min(start + kernel, size) - max(start, 0) for start in starts]


def _make_resize(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
    size = _fixed(node, constants[1], "size")
    corners, centers = node.attr["align_corners"].b, node.attr["half_pixel_centers"].b
    if len(size) != 2 or min(size) < 1 or (corners and centers):
        raise ValueError(f"has the size {size}, align_corners {corners}, half_pixel_centers {centers}")

    def resize(x: Tensor) -> Tensor:
        x = x.float()
        for axis, length in ((2, size[1]), (1, size[0])):  # within rows first, as TensorFlow does
            if x.shape[axis] == length:
                continue
            low, high, weight = _neighbours(x.shape[axis], length, corners, centers)
            left, right = (x.index_select(axis, torch.from_numpy(index).to(x.device)) for index in (low, high))
            # Not torch.lerp, which takes another formula from 0.5 on.
            x = torch.addcmul(left, right.sub_(left), torch.from_numpy(weight).to(x.device).view(-1, *[1] * (3 - axis)))
        return x

    return _bind(resize, [constants[0]], device), _largest


def _neighbours(size: int, length: int, corners: bool, centers: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Between which two pixels of an axis each of `length` new ones lies, and how far from the first (float32).

    TensorFlow 1 puts new pixel i at i * size / length: the picture lies half a pixel off, and the last ones repeat the edge.
    """
    one = np.float32(1)
    scale = (
        (np.float32(size - 1) / np.float32(length - 1))
        if corners and length > 1
        else np.float32(size) / np.float32(length)
    )
    place = np.arange(length, dtype=np.float32)
    place = (place + one / 2) * scale - one / 2 if centers else place * scale
    below = np.floor(place)
    low = np.clip(below, 0, size - 1).astype(np.int64)
    high = np.clip(np.ceil(place), 0, size - 1).astype(np.int64)
    return low, high, (place - below).astype(np.float32)


def _make_concat(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
    first = node.op == "Concat"  # later versions have the axis at the end
    (axis,) = _fixed(node, constants[0 if first else -1], "axis")
    parts = constants[1:] if first else constants[:-1]
    return _bind(lambda *values: torch.cat(values, axis), parts, device), _bind_bound(_largest, parts)


def _make_reshape(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
    shape = _fixed(node, constants[1], "shape")
    return _bind(lambda x: x.reshape(shape), constants[:1], device), _largest


def _make_expand(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
    (axis,) = _fixed(node, constants[1], "axis")
    return _bind(lambda x: x.unsqueeze(axis), constants[:1], device), _largest


def _make_squeeze(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
    axes = list(node.attr["squeeze_dims"].list.i)

    def squeeze(x: Tensor) -> Tensor:
        long = [axis for axis in axes if x.shape[axis] != 1]
        if long:
            raise IndexError(f"axes {long} are to be dropped and longer than 1")
        return x.squeeze(tuple(axes)) if axes else x.squeeze()

    return _bind(squeeze, constants, device), _largest


def _make_cast(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound | None]:
    if node.attr["DstT"].type not in DTYPES:
        raise ValueError("casts to a type that is not supported")
    dtype = DTYPES[node.attr["DstT"].type][0]
    # To float32 or wider nothing grows; to whole numbers anything may happen.
    return _bind(lambda x: x.to(dtype), constants, device), _largest if dtype.is_floating_point else None


def _make_mean(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
    axes, keep = _fixed(node, constants[1], "axes"), node.attr["keep_dims"].b
    # To torch no axes are all axes, to TensorFlow none.
    return _bind(lambda x: x.mean(axes, keepdim=keep) if axes else x, constants[:1], device), _largest


def _make_matmul(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound | None]:
    transpose = [node.attr[name].b for name in ("transpose_a", "transpose_b")]

    def multiply(*values: Tensor) -> Tensor:
        a, b = (value.T if flip else value for value, flip in zip(values, transpose))
        return a @ b

    known = next((value for value in constants if value is not None), None)
    bound = None
    if known is not None:
        # At most as many products as the constant has values are summed.
        bound = _bind_bound(lambda a, b: a * b * known.numel(), constants)
    return _bind(multiply, constants, device), bound


def _make_check(node: NodeDef, constants: list[Tensor | None], device: torch.device) -> tuple[Compute, Bound]:
    name, message = node.name, node.attr["message"].s.decode(errors="replace")

    def check(x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            kind = "NaN" if bool(torch.isnan(x).any()) else "infinite"
            raise ValueError(f"CheckNumerics {name!r} found {kind} values{f' ({message})' if message else ''}")
        return x

    return _bind(check, constants, device), _largest


OPERATIONS: dict[str, Make] = {
    "Add": _elementwise(torch.add, lambda a, b: a + b),
    "AddV2": _elementwise(torch.add, lambda a, b: a + b),
    "AvgPool": _make_pool,
    "BatchNormWithGlobalNormalization": _make_normalization,
    "BiasAdd": _elementwise(torch.add, lambda a, b: a + b),
    "Cast": _make_cast,
    "CheckNumerics": _make_check,
    "Concat": _make_concat,
    "ConcatV2": _make_concat,
    "Const": _elementwise(lambda x: x, _largest),
    "Conv2D": _make_convolution,
    "ExpandDims": _make_expand,
    "Identity": _elementwise(lambda x: x, _largest),
    "MatMul": _make_matmul,
    "MaxPool": _make_pool,
    "Mean": _make_mean,
    "Mul": _elementwise(torch.mul, lambda a, b: a * b),
    "Relu": _elementwise(torch.relu, _largest),
    "Reshape": _make_reshape,
    "ResizeBilinear": _make_resize,
    "Softmax": _elementwise(lambda x: x.softmax(-1), lambda peak: 1.0),
    "Squeeze": _make_squeeze,
    "Sub": _elementwise(torch.sub, lambda a, b: a + b),
}
"""What each operation becomes. Those that only pass a value on are also left out of fused plans."""

LEAST_INPUTS = {
    "Add": 2,
    "AddV2": 2,
    "BatchNormWithGlobalNormalization": 5,
    "BiasAdd": 2,
    "Concat": 2,
    "ConcatV2": 2,
    "Conv2D": 2,
    "ExpandDims": 2,
    "MatMul": 2,
    "Mean": 2,
    "Mul": 2,
    "Reshape": 2,
    "ResizeBilinear": 2,
    "Sub": 2,
}
"""The least number of values that an operation reads, where it is more than one."""
