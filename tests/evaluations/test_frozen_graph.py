"""evaluations/c2i/frozen_graph.py: operations against loops written by hand, the network against TensorFlow, errors."""

import numpy as np
import pytest
import torch

from evaluations.c2i.frozen_graph import FrozenGraph
from evaluations.c2i.inception import import_tensorflow
from tests.evaluations.graphs import FLOAT, INT32, GraphBuilder, inception_graph
from tests.helpers import GOLDEN

STANDIN = GOLDEN / "evaluator" / "standin_graph.pb"
pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def load(graph, tmp_path):
    return FrozenGraph(graph.save(tmp_path / "graph.pb"))


def run(graph, tmp_path, fetches, x):
    return [value.numpy() for value in load(graph, tmp_path).function(fetches, "x")(torch.from_numpy(x))]


def assert_same(actual, expected, name):
    """Within 1e-4 of the largest value, the shape and type exactly."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max(), name


KERNELS = [(1, 1), (3, 3), (1, 7)]


def convolutions():
    """Every kernel with every stride and padding, of 6 channels."""
    graph, names = GraphBuilder(), []
    graph.placeholder("x")
    for number, kernel in enumerate(KERNELS):
        graph.floats(f"w{number}", random(*kernel, 6, 5, seed=number))
        for stride in (1, 2):
            for padding in ("SAME", "VALID"):
                name, strides = f"conv{kernel[0]}x{kernel[1]}_{stride}_{padding}", [1, stride, stride, 1]
                names.append(graph.add("Conv2D", name, "x", f"w{number}", T=FLOAT, strides=strides, padding=padding))
    return graph, names


def pools():
    graph, names = GraphBuilder(), []
    graph.placeholder("x")
    for op in ("MaxPool", "AvgPool"):
        for size, stride in (((3, 3), 1), ((3, 3), 2), ((4, 3), 3)):
            for padding in ("SAME", "VALID") if op == "MaxPool" or stride == 1 else ("VALID",):
                windows = {"ksize": [1, *size, 1], "strides": [1, stride, stride, 1], "padding": padding}
                names.append(graph.add(op, f"{op}_{size[0]}x{size[1]}_{stride}_{padding}", "x", T=FLOAT, **windows))
    return graph, names


def resizes():
    graph, names = GraphBuilder(), []
    graph.placeholder("x")
    for height, width in ((5, 7), (13, 11), (24, 20), (1, 1)):
        graph.integers(f"size{height}x{width}", [height, width])
        names.append(graph.add("ResizeBilinear", f"{height}x{width}", "x", f"size{height}x{width}", T=FLOAT))
    return graph, names


def blocks():
    """Convolution, normalization, check and Relu as the network has them, and a convolution that others read too."""
    graph, names = GraphBuilder(), []
    graph.placeholder("x")
    graph.floats("w", random(3, 3, 6, 8))
    for number, part in enumerate(("mean", "beta", "gamma")):
        graph.floats(part, random(8, seed=number + 1))
    graph.floats("variance", random(8, seed=9) ** 2)
    parameters = ("mean", "variance", "beta", "gamma")
    for scaled in (False, True):
        at, options = f"scaled_{scaled}", {"T": FLOAT, "variance_epsilon": 0.001, "scale_after_normalization": scaled}
        graph.add("Conv2D", f"{at}/Conv2D", "x", "w", T=FLOAT, strides=[1, 1, 1, 1], padding="SAME")
        graph.add("BatchNormWithGlobalNormalization", f"{at}/norm", f"{at}/Conv2D", *parameters, **options)
        graph.add("CheckNumerics", f"{at}/check", f"{at}/norm", T=FLOAT, message="")
        graph.add("Identity", f"{at}/wait", f"{at}/norm", f"^{at}/check", T=FLOAT)
        names.append(graph.add("Relu", f"{at}/waited", f"{at}/wait", T=FLOAT))
    graph.add("Conv2D", "shared", "x", "w", T=FLOAT, strides=[1, 1, 1, 1], padding="VALID")
    names.append(graph.add("BatchNormWithGlobalNormalization", "shared/norm", "shared", *parameters, **options))
    names.append(graph.add("Mul", "shared/square", "shared", "shared", T=FLOAT))
    graph.integers("axis", 3)
    names.append(graph.add("Concat", "joined", "axis", "shared", "shared/norm", T=FLOAT, N=2))
    graph.integers("spatial", [1, 2])
    names.append(graph.add("Mean", "mean_of", "joined", "spatial", T=FLOAT, Tidx=INT32, keep_dims=True))
    graph.floats("half", 0.5)
    names.append(graph.add("Sub", "from_half", "half", "shared", T=FLOAT))
    return graph, names


def by_hand(x, kernel, stride, padding, reduce):
    """Windows of (B, H, W, C) one after another; `reduce` sees the part of a window inside the picture and where it begins."""
    starts = []
    for size, width in zip(x.shape[1:3], kernel):
        count = -(-size // stride) if padding == "SAME" else (size - width) // stride + 1
        before = max((count - 1) * stride + width - size, 0) // 2 if padding == "SAME" else 0
        starts.append([i * stride - before for i in range(count)])
    rows = []
    for top in starts[0]:
        row = []
        for left in starts[1]:
            clipped = max(top, 0), max(left, 0)
            window = x[:, clipped[0] : top + kernel[0], clipped[1] : left + kernel[1]]
            row.append(reduce(window, clipped[0] - top, clipped[1] - left))
        rows.append(np.stack(row, axis=1))
    return np.stack(rows, axis=1)


def convolved(x, weight, stride, padding):
    def reduce(window, top, left):
        part = weight[top : top + window.shape[1], left : left + window.shape[2]]
        return np.einsum("bhwc,hwco->bo", window, part)

    return by_hand(x, weight.shape[:2], stride, padding, reduce)


def test_convolutions_by_hand(tmp_path):
    x = random(2, 7, 12, 6)
    graph, names = convolutions()
    for name, value in zip(names, run(graph, tmp_path, names, x=x), strict=True):
        kernel, stride, padding = name.removeprefix("conv").split("_")
        number = KERNELS.index(tuple(map(int, kernel.split("x"))))
        assert_same(value, convolved(x, random(*KERNELS[number], 6, 5, seed=number), int(stride), padding), name)


def test_pools_by_hand(tmp_path):
    x = random(2, 7, 12, 6) - 3  # below zero, where zeros of a padding would show
    graph, names = pools()
    for name, value in zip(names, run(graph, tmp_path, names, x=x), strict=True):
        op, kernel, stride, padding = name.split("_")
        reduce = np.max if op == "MaxPool" else np.mean
        windows = tuple(map(int, kernel.split("x"))), int(stride), padding
        assert_same(value, by_hand(x, *windows, lambda window, *_, r=reduce: r(window, axis=(1, 2))), name)


def test_resizes_by_hand(tmp_path):
    size = (8, 9)
    x = random(1, *size, 2)
    graph, names = resizes()
    for name, value in zip(names, run(graph, tmp_path, names, x=x), strict=True):
        target = tuple(map(int, name.split("x")))
        weights = [
            [[max(0, 1 - abs(min(i * old / new, old - 1) - j)) for j in range(old)] for i in range(new)]
            for old, new in zip(size, target)
        ]
        assert_same(value, np.einsum("Hh,Ww,nhwc->nHWc", *weights, x).astype(np.float32), name)


def test_blocks_by_hand(tmp_path):
    x = random(2, 9, 8, 6)
    graph, names = blocks()
    w, mean, beta, gamma = random(3, 3, 6, 8), random(8, seed=1), random(8, seed=2), random(8, seed=3)
    deviation = np.sqrt(random(8, seed=9) ** 2 + 0.001)
    normal = (convolved(x, w, 1, "SAME") - mean) / deviation
    valid = convolved(x, w, 1, "VALID")
    joined = np.concatenate([valid, (valid - mean) / deviation * gamma + beta], axis=3)
    expected = {
        "scaled_False/waited": np.maximum(normal + beta, 0),
        "scaled_True/waited": np.maximum(normal * gamma + beta, 0),
        "shared/norm": joined[..., 8:],
        "shared/square": valid**2,
        "joined": joined,
        "mean_of": joined.mean((1, 2), keepdims=True),
        "from_half": 0.5 - valid,
    }
    for fetches in (names, *([name] for name in names), ["shared/norm", "scaled_True/Conv2D"]):
        found = dict(zip(fetches, run(graph, tmp_path, fetches, x=x), strict=True))
        for name in found.keys() & expected.keys():
            assert_same(found[name], expected[name], name)


@pytest.mark.slow
def test_inception_agrees_with_tensorflow_activation_by_activation(tmp_path):
    """The whole network of 2015 at a quarter of its width: all activations at once, and the features alone."""
    tf = import_tensorflow()
    content = inception_graph(width=0.25, classes=20)
    (tmp_path / "graph.pb").write_bytes(content)
    graph = FrozenGraph(tmp_path / "graph.pb")
    left_out = ("Const", "DecodeJpeg", "Cast", "ExpandDims", "Reshape")
    names = [n.name for n in graph.nodes.values() if n.op not in left_out and not n.name.startswith("softmax")]
    assert len(names) > 94 * 5
    images = np.random.default_rng(0).integers(0, 256, (1, 40, 50, 3)).astype(np.float32)
    theirs = tf.Graph()
    with theirs.as_default():
        tf.import_graph_def(tf.compat.v1.GraphDef.FromString(content), name="")
    with tf.compat.v1.Session(graph=theirs) as session:
        expected = session.run([f"{name}:0" for name in names], {"ExpandDims:0": images})
    for chosen in (names, ["pool_3", "mixed_6/conv"]):
        found = graph.function(chosen, "ExpandDims")(torch.from_numpy(images))
        for name, value in zip(chosen, found, strict=True):
            assert_same(value.numpy(), expected[names.index(name)], name)


@pytest.mark.gpu
def test_an_accelerator_gives_what_a_cpu_gives(tmp_path):
    """Also where the program allows TF32 elsewhere."""
    (tmp_path / "graph.pb").write_bytes(inception_graph(width=0.25, classes=20))
    graph = FrozenGraph(tmp_path / "graph.pb")
    images = torch.randint(0, 256, (2, 40, 50, 3)).float()
    names, before = ["pool_3", "mixed_6/conv"], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        device = "cuda" if torch.cuda.is_available() else "mps"
        found = graph.function(names, "ExpandDims", device)(images.to(device))
    finally:
        torch.set_float32_matmul_precision(before)
    for name, ours, cpu in zip(names, found, graph.function(names, "ExpandDims")(images), strict=True):
        assert_same(ours.cpu().numpy(), cpu.numpy(), name)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", STANDIN.read_bytes()[:-1000]],
    ids=["empty", "lfs", "html", "truncated"],
)
def test_frozen_graph_of_another_file_is_refused(tmp_path, content):
    (tmp_path / "graph.pb").write_bytes(content)
    with pytest.raises(ValueError, match=r"graph\.pb.*fetch it again"):
        FrozenGraph(tmp_path / "graph.pb")


def test_unknown_and_unsupported_nodes_are_named(tmp_path):
    graph, _ = blocks()
    graph.add("NoSuchOperation", "unknown", "shared")
    loaded = load(graph, tmp_path)
    with pytest.raises(ValueError, match=r"no node 'joint'"):
        loaded.function(["joint:0"], "x")
    with pytest.raises(ValueError, match="'unknown' has the operation NoSuchOperation"):
        loaded.function(["unknown"], "x")
    with pytest.raises(ValueError, match="'x' has the operation Placeholder"):
        loaded.function(["shared"], "half")
