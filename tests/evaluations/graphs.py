"""Frozen TensorFlow graphs for tests, built without TensorFlow: one operation at a time, or all of Inception-v3.

graph = GraphBuilder()
graph.placeholder("x")
graph.add("Relu", "relu", "x")
path.write_bytes(graph.to_bytes())
"""

from pathlib import Path

import numpy as np
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.graph_pb2 import GraphDef

FLOAT = types_pb2.DT_FLOAT
INT32 = types_pb2.DT_INT32
_TYPE_ATTRIBUTES = {"T", "dtype", "DstT", "SrcT", "Tidx", "Tshape", "Tdim"}
# After which version TensorFlow refuses BatchNormWithGlobalNormalization; the file of 2015 says 0.
PRODUCER = 8


class GraphBuilder:
    """A GraphDef, node by node; each method returns the name of what it added."""

    def __init__(self, producer: int = PRODUCER) -> None:
        self.graph = GraphDef()
        self.graph.versions.producer = producer

    def add(self, op, name, *inputs, **attributes):
        """Any node. Attributes are written as their Python type says: bool, int, float, bytes or text, list of int."""
        node = self.graph.node.add(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            slot = node.attr[key]
            if key in _TYPE_ATTRIBUTES:
                slot.type = value
            elif isinstance(value, bool):
                slot.b = value
            elif isinstance(value, int):
                slot.i = value
            elif isinstance(value, float):
                slot.f = value
            elif isinstance(value, list):
                slot.list.i.extend(value)
            else:
                slot.s = value if isinstance(value, bytes) else value.encode()
        return name

    def placeholder(self, name, dtype=FLOAT):
        """A value of any shape, to be fed."""
        self.add("Placeholder", name, dtype=dtype)
        self.graph.node[-1].attr["shape"].shape.unknown_rank = True
        return name

    def constant(self, name, value, kind):
        """A constant of a numpy array."""
        self.add("Const", name, dtype=kind)
        proto = self.graph.node[-1].attr["value"].tensor
        proto.dtype, proto.tensor_content = kind, value.tobytes()
        for size in value.shape:
            proto.tensor_shape.dim.add(size=size)
        return name

    def floats(self, name, value):
        """A float32 constant."""
        return self.constant(name, np.asarray(value, dtype=np.float32), FLOAT)

    def integers(self, name, value):
        """An int32 constant."""
        return self.constant(name, np.asarray(value, dtype=np.int32), INT32)

    def text(self, name, value):
        """A constant of one string, as the file of 2015 has where a JPEG is fed."""
        self.add("Const", name, dtype=types_pb2.DT_STRING)
        proto = self.graph.node[-1].attr["value"].tensor
        proto.dtype = types_pb2.DT_STRING
        proto.tensor_shape.SetInParent()
        proto.string_val.append(value)
        return name

    def to_bytes(self):
        """What the file holds."""
        return self.graph.SerializeToString()

    def save(self, path):
        """Writes the file and returns its path."""
        Path(path).write_bytes(self.to_bytes())
        return Path(path)


class _Inception(GraphBuilder):
    """The parts that Inception-v3 is made of, under the names that the file of 2015 gives them."""

    def __init__(self, width, seed) -> None:
        super().__init__()
        self.width = width
        self.rng = np.random.default_rng(seed)
        self.channels = {}  # of each value that is a picture
        self.convolutions = 0

    def conv(self, name, source, size, channels, stride=1, padding="SAME"):
        """Convolution, normalization, check and Relu; the Relu is what bears the name."""
        out, inputs = max(8, round(channels * self.width)), self.channels[source]
        shape = (*size, inputs, out)
        weights = self.rng.standard_normal(shape, dtype=np.float32) * np.float32((2 / np.prod(shape[:3])) ** 0.5)
        self.floats(f"{name}/conv2d_params", weights)
        self.add(
            "Conv2D",
            f"{name}/Conv2D",
            source,
            f"{name}/conv2d_params",
            T=FLOAT,
            strides=[1, stride, stride, 1],
            padding=padding,
        )
        spread = self.rng.standard_normal((4, out))
        self.floats(f"{name}/batchnorm/beta", 0.1 * spread[0])
        self.floats(f"{name}/batchnorm/gamma", 1 + 0.1 * spread[1])
        self.floats(f"{name}/batchnorm/moving_mean", 0.1 * spread[2])
        self.floats(f"{name}/batchnorm/moving_variance", np.exp(0.1 * spread[3]))
        self.add(
            "BatchNormWithGlobalNormalization",
            f"{name}/batchnorm",
            f"{name}/Conv2D",
            *(f"{name}/batchnorm/{part}" for part in ("moving_mean", "moving_variance", "beta", "gamma")),
            T=FLOAT,
            variance_epsilon=0.001,
            scale_after_normalization=self.convolutions % 2 == 1,
        )
        self.add("CheckNumerics", f"{name}/CheckNumerics", f"{name}/batchnorm", T=FLOAT, message="batchnorm")
        self.add("Identity", f"{name}/control_dependency", f"{name}/batchnorm", f"^{name}/CheckNumerics", T=FLOAT)
        self.add("Relu", name, f"{name}/control_dependency", T=FLOAT)
        self.channels[name] = out
        self.convolutions += 1
        return name

    def chain(self, prefix, source, *parts):
        """Convolutions one after another, called conv, conv_1, … below `prefix`."""
        for number, part in enumerate(parts):
            source = self.conv(f"{prefix}/conv" + (f"_{number}" if number else ""), source, *part)
        return source

    def pool(self, name, source, op="MaxPool", size=3, stride=2, padding="VALID"):
        """Largest or mean value of windows."""
        self.add(op, name, source, T=FLOAT, ksize=[1, size, size, 1], strides=[1, stride, stride, 1], padding=padding)
        self.channels[name] = self.channels[source]
        return name

    def pooled(self, prefix, source, channels, op="AvgPool"):
        """The branch of a block that pools without making smaller."""
        return self.conv(f"{prefix}/conv", self.pool(f"{prefix}/pool", source, op, 3, 1, "SAME"), (1, 1), channels)

    def join(self, name, *sources):
        """Channels side by side."""
        self.integers(f"{name}/concat_dim", 3)
        self.add("Concat", name, f"{name}/concat_dim", *sources, T=FLOAT, N=len(sources))
        self.channels[name] = sum(self.channels[source] for source in sources)
        return name


def inception_graph(width=1.0, classes=1008, seed=0) -> bytes:
    """Inception-v3 as `classify_image_graph_def.pb` of 2015 has it, with random weights.

    (Szegedy et al., 2015, arXiv:1512.00567.) Convolutions have `width` times the channels, at least 8; at width 1
    pool_3 is 2048 wide. The batch of one that the file of 2015 was made for is in `pool_3/_reshape/shape`, as it is there.
    """
    graph = _Inception(width, seed)
    graph.text("DecodeJpeg/contents", b"")
    graph.add("DecodeJpeg", "DecodeJpeg", "DecodeJpeg/contents", channels=3)
    graph.add("Cast", "Cast", "DecodeJpeg", SrcT=types_pb2.DT_UINT8, DstT=FLOAT)
    graph.integers("ExpandDims/dim", 0)
    graph.add("ExpandDims", "ExpandDims", "Cast", "ExpandDims/dim", T=FLOAT)
    graph.integers("ResizeBilinear/size", [299, 299])
    graph.add("ResizeBilinear", "ResizeBilinear", "ExpandDims", "ResizeBilinear/size", T=FLOAT)
    graph.floats("Sub/y", 128)
    graph.add("Sub", "Sub", "ResizeBilinear", "Sub/y", T=FLOAT)
    graph.floats("Mul/y", 1 / 128)
    graph.add("Mul", "Mul", "Sub", "Mul/y", T=FLOAT)
    graph.channels["Mul"] = 3

    x = graph.conv("conv", "Mul", (3, 3), 32, 2, "VALID")
    x = graph.conv("conv_1", x, (3, 3), 32, 1, "VALID")
    x = graph.conv("conv_2", x, (3, 3), 64)
    x = graph.pool("pool", x)
    x = graph.conv("conv_3", x, (1, 1), 80, 1, "VALID")
    x = graph.conv("conv_4", x, (3, 3), 192, 1, "VALID")
    x = graph.pool("pool_1", x)
    for name, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
        x = graph.join(
            f"{name}/join",
            graph.chain(name, x, ((1, 1), 64)),
            graph.chain(f"{name}/tower", x, ((1, 1), 48), ((5, 5), 64)),
            graph.chain(f"{name}/tower_1", x, ((1, 1), 64), ((3, 3), 96), ((3, 3), 96)),
            graph.pooled(f"{name}/tower_2", x, pooled),
        )
    x = graph.join(
        "mixed_3/join",
        graph.chain("mixed_3", x, ((3, 3), 384, 2, "VALID")),
        graph.chain("mixed_3/tower", x, ((1, 1), 64), ((3, 3), 96), ((3, 3), 96, 2, "VALID")),
        graph.pool("mixed_3/pool", x),
    )
    for name, inner in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        x = graph.join(
            f"{name}/join",
            graph.chain(name, x, ((1, 1), 192)),
            graph.chain(f"{name}/tower", x, ((1, 1), inner), ((1, 7), inner), ((7, 1), 192)),
            graph.chain(
                f"{name}/tower_1", x, ((1, 1), inner), ((7, 1), inner), ((1, 7), inner), ((7, 1), inner), ((1, 7), 192)
            ),
            graph.pooled(f"{name}/tower_2", x, 192),
        )
    x = graph.join(
        "mixed_8/join",
        graph.chain("mixed_8/tower", x, ((1, 1), 192), ((3, 3), 320, 2, "VALID")),
        graph.chain("mixed_8/tower_1", x, ((1, 1), 192), ((1, 7), 192), ((7, 1), 192), ((3, 3), 192, 2, "VALID")),
        graph.pool("mixed_8/pool", x),
    )
    for name, op in (("mixed_9", "AvgPool"), ("mixed_10", "MaxPool")):
        ends = []
        for tower, parts in (("tower", [((1, 1), 384)]), ("tower_1", [((1, 1), 448), ((3, 3), 384)])):
            middle = graph.chain(f"{name}/{tower}", x, *parts)
            ends.append(
                graph.join(
                    f"{name}/{tower}/mixed",
                    graph.conv(f"{name}/{tower}/mixed/conv", middle, (1, 3), 384),
                    graph.conv(f"{name}/{tower}/mixed/conv_1", middle, (3, 1), 384),
                )
            )
        pooled = graph.pooled(f"{name}/tower_2", x, 192, op)
        x = graph.join(f"{name}/join", graph.chain(name, x, ((1, 1), 320)), *ends, pooled)
    x = graph.pool("pool_3", x, "AvgPool", 8, 1)

    features = graph.channels[x]
    graph.integers("pool_3/_reshape/shape", [1, features])
    graph.add("Reshape", "pool_3/_reshape", x, "pool_3/_reshape/shape", T=FLOAT)
    graph.floats("softmax/weights", graph.rng.standard_normal((features, classes)) * features**-0.5)
    graph.floats("softmax/biases", graph.rng.standard_normal(classes))
    graph.add("MatMul", "softmax/logits/MatMul", "pool_3/_reshape", "softmax/weights", T=FLOAT)
    graph.add("BiasAdd", "softmax/logits", "softmax/logits/MatMul", "softmax/biases", T=FLOAT)
    graph.add("Softmax", "softmax", "softmax/logits", T=FLOAT)
    return graph.to_bytes()
