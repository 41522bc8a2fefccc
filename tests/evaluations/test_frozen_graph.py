"""evaluations/c2i/frozen_graph.py: every operation against TensorFlow and against loops written by hand, and its errors."""

import numpy as np
import pytest
import torch

from evaluations.c2i import graph_operations
from evaluations.c2i.frozen_graph import FrozenGraph
from tests.evaluations.graphs import FLOAT, INT32, GraphBuilder, inception_graph
from tests.helpers import GOLDEN

STANDIN = GOLDEN / "evaluator" / "standin_graph.pb"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tensorflow():
    """Runs a graph's bytes in TensorFlow: (content, fetches, feeds) -> arrays."""
    from evaluations.c2i.inception import import_tensorflow

    tf = import_tensorflow()

    def run(content, fetches, feeds):
        graph = tf.Graph()
        with graph.as_default():
            tf.import_graph_def(tf.compat.v1.GraphDef.FromString(content), name="")
        options = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
        with tf.compat.v1.Session(graph=graph, config=options) as session:
            return session.run([f"{name}:0" for name in fetches], {f"{k}:0": v for k, v in feeds.items()})

    return run


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def load(graph, tmp_path):
    return FrozenGraph(graph.save(tmp_path / "graph.pb"))


def run(graph, tmp_path, fetches, **feeds):
    """The fetched arrays of a builder's graph."""
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    return [value.numpy() for value in load(graph, tmp_path).run(fetches, tensors)]


def assert_same(actual, expected, name):
    """Within 1e-4 of the largest value, the shape and type exactly."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    scale = np.abs(expected).max()
    assert np.isfinite(scale), name
    assert np.abs(actual - expected).max() <= 1e-4 * scale, name


def against_tensorflow(tensorflow, graph, tmp_path, fetches, **feeds):
    expected = tensorflow(graph.to_bytes(), fetches, feeds)
    for name, ours, theirs in zip(fetches, run(graph, tmp_path, fetches, **feeds), expected, strict=True):
        assert_same(ours, theirs, name)
    for name, theirs in zip(fetches, expected, strict=True):  # one by one, where more is fused
        assert_same(run(graph, tmp_path, [name], **feeds)[0], theirs, name)


KERNELS = [(1, 1), (3, 3), (5, 5), (1, 7), (7, 1)]


def convolutions(channels=6):
    """Every kernel with every stride and padding, and dilations."""
    graph = GraphBuilder()
    graph.placeholder("x")
    names = []
    for number, kernel in enumerate(KERNELS):
        graph.floats(f"w{number}", random(*kernel, channels, 5, seed=number))
        for stride in (1, 2):
            for padding in ("SAME", "VALID"):
                name = f"conv{kernel[0]}x{kernel[1]}_{stride}_{padding}"
                names.append(
                    graph.add(
                        "Conv2D", name, "x", f"w{number}", T=FLOAT, strides=[1, stride, stride, 1], padding=padding
                    )
                )
    dilated = {"T": FLOAT, "strides": [1, 1, 1, 1], "dilations": [1, 2, 3, 1], "data_format": "NHWC"}
    for padding in ("SAME", "VALID"):
        names.append(graph.add("Conv2D", f"dilated_{padding}", "x", "w1", padding=padding, **dilated))
    return graph, names


def pools():
    graph = GraphBuilder()
    graph.placeholder("x")
    names = []
    for op in ("MaxPool", "AvgPool"):
        for size, stride in (((3, 3), 1), ((3, 3), 2), ((2, 2), 1), ((2, 2), 2), ((4, 3), 3)):
            for padding in ("SAME", "VALID"):
                name = f"{op}_{size[0]}x{size[1]}_{stride}_{padding}"
                windows = {"ksize": [1, *size, 1], "strides": [1, stride, stride, 1], "padding": padding}
                names.append(graph.add(op, name, "x", T=FLOAT, **windows))
    return graph, names


def resizes(sizes=((5, 7), (13, 11), (24, 20), (1, 1))):
    graph = GraphBuilder()
    graph.placeholder("x")
    names = []
    for height, width in sizes:
        graph.integers(f"size{height}x{width}", [height, width])
        for kind in ("plain", "align_corners", "half_pixel_centers"):
            flags = {} if kind == "plain" else {kind: True}
            name = f"{kind}_{height}x{width}"
            names.append(graph.add("ResizeBilinear", name, "x", f"size{height}x{width}", T=FLOAT, **flags))
    return graph, names


def blocks(channels=6):
    """Convolution, normalization, check, Relu in the forms that graphs have, and forms that must not be fused."""
    graph = GraphBuilder()
    graph.placeholder("x")
    graph.floats("w", random(3, 3, channels, 8))
    for number, part in enumerate(("mean", "beta", "gamma")):
        graph.floats(part, random(8, seed=number + 1))
    graph.floats("variance", random(8, seed=9) ** 2)
    names = []
    for scaled in (False, True):
        at = f"scaled_{scaled}"
        graph.add("Conv2D", f"{at}/Conv2D", "x", "w", T=FLOAT, strides=[1, 1, 1, 1], padding="SAME")
        parameters = ("mean", "variance", "beta", "gamma")
        options = {"T": FLOAT, "variance_epsilon": 0.001, "scale_after_normalization": scaled}
        graph.add("BatchNormWithGlobalNormalization", f"{at}/norm", f"{at}/Conv2D", *parameters, **options)
        graph.add("CheckNumerics", f"{at}/check", f"{at}/norm", T=FLOAT, message="")
        graph.add("Identity", f"{at}/wait", f"{at}/norm", f"^{at}/check", T=FLOAT)
        names.append(graph.add("Relu", f"{at}/waited", f"{at}/wait", T=FLOAT))
        names.append(f"{at}/norm")
    graph.add("Conv2D", "biased/Conv2D", "x", "w", T=FLOAT, strides=[1, 2, 2, 1], padding="SAME")
    graph.add("BiasAdd", "biased/bias", "biased/Conv2D", "beta", T=FLOAT)
    graph.add("Add", "biased/add", "gamma", "biased/bias", T=FLOAT)
    names.append(graph.add("Relu", "biased", "biased/add", T=FLOAT))
    # A value with two readers stays as it is.
    graph.add("Conv2D", "shared", "x", "w", T=FLOAT, strides=[1, 1, 1, 1], padding="VALID")
    names.append(graph.add("Relu", "shared/relu", "shared", T=FLOAT))
    names.append(graph.add("Mul", "shared/square", "shared", "shared", T=FLOAT))
    names.append(graph.add("Add", "shared/double", "shared/square", "shared/square", T=FLOAT))
    # Two roundings of the same normalization, of a value that is no convolution's.
    graph.add("Relu", "plain", "x", T=FLOAT)
    for number, part in enumerate(("m", "b", "g")):
        graph.floats(part, random(channels, seed=number + 20))
    graph.floats("v", random(channels, seed=30) ** 2)
    options = {"T": FLOAT, "variance_epsilon": 0.01, "scale_after_normalization": True}
    names.append(graph.add("BatchNormWithGlobalNormalization", "norm", "plain", "m", "v", "b", "g", **options))
    return graph, names


def shapes():
    """What moves values about, and the end of the network."""
    graph = GraphBuilder()
    graph.placeholder("x")  # (2, H, W, 6)
    names = []
    graph.floats("half", 0.5)
    graph.floats("row", random(6))
    names.append(graph.add("Sub", "sub", "x", "half", T=FLOAT))
    names.append(graph.add("Sub", "from", "row", "x", T=FLOAT))
    names.append(graph.add("Mul", "mul", "sub", "row", T=FLOAT))
    names.append(graph.add("AddV2", "addv2", "sub", "mul", T=FLOAT))
    graph.integers("three", 3)
    graph.integers("minus", -3)
    names.append(graph.add("Concat", "concat", "three", "sub", "mul", T=FLOAT, N=2))
    names.append(graph.add("ConcatV2", "concatv2", "sub", "mul", "from", "minus", T=FLOAT, N=3, Tidx=INT32))
    graph.integers("spatial", [1, 2])
    names.append(graph.add("Mean", "kept", "x", "spatial", T=FLOAT, Tidx=INT32, keep_dims=True))
    names.append(graph.add("Mean", "mean", "x", "spatial", T=FLOAT, Tidx=INT32))
    names.append(graph.add("Squeeze", "squeezed", "kept", T=FLOAT, squeeze_dims=[1, 2]))
    names.append(graph.add("Squeeze", "all_squeezed", "kept", T=FLOAT))
    names.append(graph.add("ExpandDims", "expanded", "mean", "minus", T=FLOAT, Tdim=INT32))
    graph.integers("flat", [-1, 6])
    names.append(graph.add("Reshape", "reshaped", "kept", "flat", T=FLOAT, Tshape=INT32))
    graph.floats("w", random(6, 4))
    graph.floats("wt", random(4, 6))
    names.append(graph.add("MatMul", "matmul", "reshaped", "w", T=FLOAT))
    names.append(graph.add("MatMul", "matmul_bt", "reshaped", "wt", T=FLOAT, transpose_b=True))
    names.append(graph.add("MatMul", "matmul_at", "reshaped", "matmul", T=FLOAT, transpose_a=True))
    names.append(graph.add("Softmax", "softmax", "matmul", T=FLOAT))
    names.append(graph.add("Cast", "whole", "x", SrcT=FLOAT, DstT=INT32))
    names.append(graph.add("Cast", "back", "whole", SrcT=INT32, DstT=FLOAT))
    return graph, names


GRAPHS = {f.__name__: f for f in (convolutions, pools, resizes, blocks, shapes)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (7, 12), (13, 10)], ids=str)
@pytest.mark.parametrize("kind", GRAPHS)
def test_operations_as_in_tensorflow(tensorflow, tmp_path, kind, size):
    graph, names = GRAPHS[kind]()
    against_tensorflow(tensorflow, graph, tmp_path, names, x=random(2, *size, 6, seed=3))


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


@pytest.mark.parametrize("size", [(8, 9), (7, 12)], ids=str)
def test_convolutions_by_hand(tmp_path, size):
    x = random(2, *size, 6)
    graph, names = convolutions()
    found = dict(zip(names, run(graph, tmp_path, names, x=x), strict=True))
    for number, kernel in enumerate(KERNELS):
        weight = random(*kernel, 6, 5, seed=number)

        def reduce(window, top, left, weight=weight):
            part = weight[top : top + window.shape[1], left : left + window.shape[2]]
            return np.einsum("bhwc,hwco->bo", window, part)

        for stride in (1, 2):
            for padding in ("SAME", "VALID"):
                name = f"conv{kernel[0]}x{kernel[1]}_{stride}_{padding}"
                assert_same(found[name], by_hand(x, kernel, stride, padding, reduce), name)


@pytest.mark.parametrize("size", [(8, 9), (7, 12)], ids=str)
def test_pools_by_hand(tmp_path, size):
    x = random(2, *size, 6) - 3  # below zero, where zeros of a padding would show
    graph, names = pools()
    for name, value in zip(names, run(graph, tmp_path, names, x=x), strict=True):
        op, kernel, stride, padding = name.split("_")
        kernel = tuple(map(int, kernel.split("x")))
        reduce = np.max if op == "MaxPool" else np.mean
        expected = by_hand(
            x, kernel, int(stride), padding, lambda window, *_, reduce=reduce: reduce(window, axis=(1, 2))
        )
        assert_same(value, expected, name)


@pytest.mark.parametrize("size", [(8, 9), (30, 12)], ids=str)
def test_resizes_by_hand(tmp_path, size):
    x = random(1, *size, 2)
    graph, names = resizes()
    for name, value in zip(names, run(graph, tmp_path, names, x=x), strict=True):
        kind, target = name.rsplit("_", 1)
        target = tuple(map(int, target.split("x")))
        expected = np.zeros((1, *target, 2))
        for place in np.ndindex(*target):
            weights = []
            for i, old, new in zip(place, size, target):
                at = i * old / new
                if kind == "align_corners" and new > 1:
                    at = i * (old - 1) / (new - 1)
                if kind == "half_pixel_centers":
                    at = max((i + 0.5) * old / new - 0.5, 0)
                weights.append([max(0, 1 - abs(min(at, old - 1) - j)) for j in range(old)])
            expected[0, place[0], place[1]] = np.einsum("h,w,hwc->c", *weights, x[0])
        assert_same(value, expected.astype(np.float32), name)


def test_blocks_by_hand(tmp_path, monkeypatch):
    """Fused and step by step, with oneDNN's convolution and without."""
    x = random(2, 9, 8, 6)
    graph, names = blocks()
    w, mean, beta, gamma = random(3, 3, 6, 8), random(8, seed=1), random(8, seed=2), random(8, seed=3)
    variance = random(8, seed=9) ** 2

    def reduce(window, top, left):
        return np.einsum("bhwc,hwco->bo", window, w[top : top + window.shape[1], left : left + window.shape[2]])

    same = by_hand(x, (3, 3), 1, "SAME", reduce)
    valid = by_hand(x, (3, 3), 1, "VALID", reduce)
    normal = (same - mean) / np.sqrt(variance + 0.001)
    expected = {
        "scaled_False/waited": np.maximum(normal + beta, 0),
        "scaled_True/waited": np.maximum(normal * gamma + beta, 0),
        "biased": np.maximum(by_hand(x, (3, 3), 2, "SAME", reduce) + beta + gamma, 0),
        "shared/relu": np.maximum(valid, 0),
        "shared/double": 2 * valid**2,
    }
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(graph_operations, "_onednn_convolution", lambda: None)
        for fetches in ([name] for name in expected):
            assert_same(run(graph, tmp_path, fetches, x=x)[0], expected[fetches[0]], fetches[0])
        for name, value in zip(names, run(graph, tmp_path, names, x=x), strict=True):
            if name in expected:
                assert_same(value, expected[name], name)


def test_a_value_with_two_readers_is_not_fused(tmp_path):
    """In either order of the readers."""
    x = random(1, 5, 5, 6)
    graph, _ = blocks()
    (value,) = run(graph, tmp_path, ["shared"], x=x)
    for fetches in (["shared/square", "shared/relu"], ["shared/relu", "shared/square"]):
        found = dict(zip(fetches, run(graph, tmp_path, fetches, x=x), strict=True))
        assert_same(found["shared/square"], value**2, "square")
        assert_same(found["shared/relu"], np.maximum(value, 0), "relu")


def test_fused_plans_are_short(tmp_path):
    """One step for convolution, normalization, check and Relu."""
    graph = load(blocks()[0], tmp_path)
    graph.run(["scaled_True/waited", "biased"], {"x": torch.zeros(1, 4, 4, 6)})
    (plan,) = graph._plans.values()
    assert [step.output for step in plan.steps] == ["scaled_True/waited", "biased"]
    graph.run(["scaled_True/waited", "biased"], {"x": torch.ones(1, 5, 5, 6)})
    assert len(graph._plans) == 1


def test_same_fetch_twice_in_any_order_and_a_fed_value(tmp_path):
    graph = load(shapes()[0], tmp_path)
    x = torch.from_numpy(random(2, 4, 4, 6))
    a, b, c, d = graph.run(["mul:0", "sub", "mul", "x:0"], {"x:0": x})
    assert torch.equal(a, c) and torch.equal(b, x - 0.5) and torch.equal(d, x)
    # Fed in the middle: what lies before is not computed.
    (e,) = graph.run(["mul"], {"sub": torch.ones(1, 1, 1, 6)})
    np.testing.assert_array_equal(e.flatten().numpy(), random(6))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int32, np.int64, np.bool_])
@pytest.mark.parametrize("listed", [True, False])
def test_constants(tmp_path, dtype, listed):
    values = np.array([[0, 1, 3], [2, 0.5, 7]]).astype(dtype)
    graph = GraphBuilder()
    graph.constant("c", values, listed=listed)
    graph.constant("scalar", values[0, 1], listed=listed)
    found, scalar = run(graph, tmp_path, ["c", "scalar"])
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(scalar, values[0, 1])
    assert found.dtype == values.dtype


def test_constants_written_short(tmp_path):
    graph = GraphBuilder()
    for name, count in (("none", 0), ("one", 1), ("two", 2)):
        graph.floats(name, np.zeros((2, 3)))
        proto = graph.graph.node[-1].attr["value"].tensor
        proto.ClearField("tensor_content")
        proto.float_val.extend([5.0, 7.0][:count])
    none, one, two = run(graph, tmp_path, ["none", "one", "two"])
    np.testing.assert_array_equal(none, np.zeros((2, 3)))
    np.testing.assert_array_equal(one, np.full((2, 3), 5))
    np.testing.assert_array_equal(two, [[5, 7, 7], [7, 7, 7]])


@pytest.mark.slow
def test_constants_written_short_as_in_tensorflow(tensorflow, tmp_path):
    graph = GraphBuilder()
    names = []
    for count in range(3):
        names.append(graph.constant(f"c{count}", np.zeros((2, 3), dtype=np.float16)))
        proto = graph.graph.node[-1].attr["value"].tensor
        proto.ClearField("tensor_content")
        proto.half_val.extend(np.array([1.5, -2.0], dtype=np.float16).view(np.uint16).tolist()[:count])
    for ours, theirs in zip(run(graph, tmp_path, names), tensorflow(graph.to_bytes(), names, {}), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("fetches", [["checked/relu"], ["checked/relu", "checked/Conv2D"]], ids=["fused", "plain"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_check_numerics(tmp_path, fetches, value):
    """3e38 is finite and overflows in the convolution; a Relu would hide that it became minus infinity."""
    graph = GraphBuilder()
    graph.placeholder("x")
    graph.floats("w", -np.ones((1, 1, 2, 2)))
    graph.add("Conv2D", "checked/Conv2D", "x", "w", T=FLOAT, strides=[1, 1, 1, 1], padding="SAME")
    graph.add("CheckNumerics", "checked", "checked/Conv2D", T=FLOAT, message="here")
    graph.add("Relu", "checked/relu", "checked", T=FLOAT)
    x = random(1, 4, 4, 2)
    assert run(graph, tmp_path, fetches, x=x)[0].shape == (1, 4, 4, 2)
    x[0, 1, 2] = value
    with pytest.raises(ValueError, match=r"CheckNumerics 'checked' found (NaN|infinite) values \(here\)"):
        run(graph, tmp_path, fetches, x=x)


def test_check_numerics_of_large_values_that_are_finite(tmp_path):
    """Nothing is wrong with them, however they were looked at."""
    graph = GraphBuilder()
    graph.placeholder("x")
    graph.floats("w", np.ones((1, 1, 2, 2)))
    graph.add("Conv2D", "conv", "x", "w", T=FLOAT, strides=[1, 1, 1, 1], padding="SAME")
    graph.add("CheckNumerics", "checked", "conv", T=FLOAT, message="")
    x = np.full((1, 2, 2, 2), 1e30, dtype=np.float32)
    np.testing.assert_allclose(run(graph, tmp_path, ["checked"], x=x)[0], 2e30, rtol=1e-6)


def test_check_numerics_of_deep_graphs(tmp_path):
    """Forty layers, each of which could make values 50 times as large: looked at now and then, and never fooled."""
    graph = GraphBuilder()
    x = graph.placeholder("x")
    weights = np.ones((1, 1, 50, 50))
    weights[:, :, 25:] = -1
    graph.floats("w", weights)
    for layer in range(40):
        graph.add("Conv2D", f"conv{layer}", x, "w", T=FLOAT, strides=[1, 1, 1, 1], padding="SAME")
        graph.add("CheckNumerics", f"checked{layer}", f"conv{layer}", T=FLOAT, message="")
        x = graph.add("Relu", f"relu{layer}", f"checked{layer}", T=FLOAT)
    loaded = load(graph, tmp_path)
    feed = torch.ones(1, 2, 2, 50)
    assert not loaded.run([x], {"x": feed})[0].any()
    (plan,) = loaded._plans.values()
    assert 2 <= sum(len(step.measure) for step in plan.steps) <= 5
    graph.graph.node[1].attr["value"].tensor.tensor_content = np.ones((50, 50), dtype=np.float32).tobytes()
    with pytest.raises(ValueError, match="CheckNumerics 'checked22' found infinite"):  # 50 ** 23 is above 3.4e38
        load(graph, tmp_path).run([x], {"x": feed})


def test_nan_among_the_weights(tmp_path):
    graph, _ = blocks()
    for node in graph.graph.node:
        if node.name == "gamma":
            node.attr["value"].tensor.tensor_content = np.full(8, np.nan, dtype=np.float32).tobytes()
    with pytest.raises(ValueError, match="CheckNumerics 'scaled_True/check' found NaN"):
        run(graph, tmp_path, ["scaled_True/waited"], x=random(1, 4, 4, 6))


@pytest.mark.slow
def test_check_numerics_as_in_tensorflow(tensorflow, tmp_path):
    from tensorflow.errors import InvalidArgumentError

    graph, _ = blocks()
    x = random(1, 4, 4, 6)
    x[0, 0, 0, 0] = np.nan
    with pytest.raises(InvalidArgumentError, match="scaled_True/check"):
        tensorflow(graph.to_bytes(), ["scaled_True/waited"], {"x": x})
    with pytest.raises(ValueError, match="scaled_True/check"):
        run(graph, tmp_path, ["scaled_True/waited"], x=x)


@pytest.mark.slow
def test_inception_activation_by_activation(tensorflow, tmp_path):
    """The whole network of 2015 at a quarter of its width: all activations at once, and the features by fused steps."""
    content = inception_graph(width=0.25, classes=20)
    (tmp_path / "graph.pb").write_bytes(content)
    graph = FrozenGraph(tmp_path / "graph.pb")
    names = [
        node.name
        for node in graph.nodes.values()
        if node.op not in ("Const", "DecodeJpeg", "Cast", "ExpandDims") and not node.name.startswith("softmax")
    ]
    assert len(names) > 94 * 5
    images = np.random.default_rng(0).integers(0, 256, (1, 40, 50, 3)).astype(np.float32)
    expected = tensorflow(content, names, {"ExpandDims": images})
    for chosen in (names, ["pool_3", "mixed_6/conv"], [name for name in names if graph.nodes[name].op == "Relu"]):
        found = graph.run(chosen, {"ExpandDims": torch.from_numpy(images)})
        for name, value in zip(chosen, found, strict=True):
            assert_same(value.numpy(), expected[names.index(name)], name)
    (softmax,) = tensorflow(content, ["softmax"], {"ExpandDims": images})
    assert_same(graph.run(["softmax"], {"ExpandDims": torch.from_numpy(images)})[0].numpy(), softmax, "softmax")


def test_standin_against_recorded_activations():
    with np.load(GOLDEN / "evaluator" / "reference_batch.npz") as data:
        images = torch.from_numpy(data["arr_0"][:8]).float()
    pool, spatial = FrozenGraph(STANDIN).run(["pool_3:0", "mixed_6/conv:0"], {"ExpandDims:0": images})
    with np.load(GOLDEN / "evaluator" / "activations.npz") as data:
        assert_same(pool.reshape(8, -1).numpy(), data["pool_reference"], "pool")
        assert_same(spatial[..., :7].reshape(8, -1).numpy(), data["spatial_reference"], "spatial")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_accelerator_as_cpu(tmp_path, precision):
    """Also where the program allows TF32 elsewhere."""
    (tmp_path / "graph.pb").write_bytes(inception_graph(width=0.25, classes=20))
    graph = FrozenGraph(tmp_path / "graph.pb")
    images = torch.randint(0, 256, (2, 40, 50, 3)).float()
    names = ["pool_3", "mixed_6/conv"]
    device = "cuda" if torch.cuda.is_available() else "mps"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = graph.run(names, {"ExpandDims": images.to(device)})
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for name, ours, cpu in zip(names, found, graph.run(names, {"ExpandDims": images}), strict=True):
        assert ours.device.type == device
        assert_same(ours.cpu().numpy(), cpu.numpy(), name)


@pytest.mark.slow
def test_subgraph_runs_in_tensorflow(tensorflow, tmp_path):
    """Only what is needed, for any number of images, whatever static shapes the file claims."""
    graph = GraphBuilder()
    graph.placeholder("x")
    graph.add("Relu", "relu", "x", T=FLOAT)
    graph.add("NoSuchOperation", "elsewhere", "relu")
    claimed = graph.graph.node[1].attr["_output_shapes"].list.shape.add()
    for size in (1, 3):
        claimed.dim.add(size=size)
    loaded = load(graph, tmp_path)
    part = loaded.subgraph(["relu"], ["x"])
    (value,) = tensorflow(part, ["relu"], {"x": random(4, 3)})
    np.testing.assert_array_equal(value, np.maximum(random(4, 3), 0))
    assert b"NoSuchOperation" not in part and b"_output_shapes" not in part


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>not found</html>", "web page"),
        (b'<?xml version="1.0"?><Error/>', "web page"),
        (b"PK\x03\x04 an archive of something", "not a frozen TensorFlow graph"),
        (bytes(range(256)) * 4, "not a frozen TensorFlow graph"),
        (STANDIN.read_bytes()[:-1000], "cut short"),
    ],
    ids=["empty", "lfs", "html", "xml", "zip", "bytes", "truncated"],
)
def test_files_that_are_no_graph(tmp_path, content, message):
    (tmp_path / "graph.pb").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        FrozenGraph(tmp_path / "graph.pb")
    assert "graph.pb" in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pb"):
        FrozenGraph(tmp_path / "nothing.pb")
    with pytest.raises(OSError, match=str(tmp_path)):
        FrozenGraph(tmp_path)


def test_file_cut_between_two_nodes(tmp_path):
    """It can be read; what is missing shows in what the others read."""
    graph, _ = shapes()
    del graph.graph.node[1]
    with pytest.raises(ValueError, match="'sub' reads 'half', which is not in the file"):
        load(graph, tmp_path)


def test_unknown_names(tmp_path):
    graph = load(shapes()[0], tmp_path)
    x = torch.zeros(1, 2, 2, 6)
    with pytest.raises(ValueError, match=r"no node 'concatv3', which is fetched .* close to it are concatv2"):
        graph.run(["concatv3:0"], {"x": x})
    with pytest.raises(ValueError, match="no node 'y', which is fed"):
        graph.run(["sub"], {"y": x})
    with pytest.raises(ValueError, match="only first outputs"):
        graph.run(["sub:1"], {"x": x})
    with pytest.raises(ValueError, match="Placeholder is a placeholder that nothing was fed to"):
        graph.run(["sub"], {})


def test_unsupported_operations_matter_only_where_needed(tmp_path):
    graph = GraphBuilder()
    graph.placeholder("x")
    graph.add("LRN", "lrn", "x", T=FLOAT)
    graph.add("Relu", "after", "lrn", T=FLOAT)
    graph.add("Relu", "beside", "x", T=FLOAT)
    graph.text("name", b"\xff\xd8 no number")
    loaded = load(graph, tmp_path)
    x = torch.ones(1, 2)
    assert torch.equal(loaded.run(["beside"], {"x": x})[0], x)
    assert torch.equal(loaded.run(["after"], {"lrn": x})[0], x)
    with pytest.raises(ValueError, match="'after' needs node 'lrn', whose operation LRN is not supported"):
        loaded.run(["after"], {"x": x})
    with pytest.raises(ValueError, match="LRN"):
        loaded.check(["after"], ["x"])
    with pytest.raises(ValueError, match="constant 'name' is of type string"):
        loaded.run(["name"], {})


def test_cycles(tmp_path):
    graph = GraphBuilder()
    graph.placeholder("x")
    graph.add("Relu", "a", "c", T=FLOAT)
    graph.add("Add", "b", "x", "a", T=FLOAT)
    graph.add("Relu", "c", "b", T=FLOAT)
    graph.add("Relu", "apart", "x", T=FLOAT)
    loaded = load(graph, tmp_path)
    with pytest.raises(ValueError, match="depends on itself"):
        loaded.run(["c"], {"x": torch.zeros(1)})
    assert loaded.run(["apart"], {"x": torch.ones(1)})[0].item() == 1
    assert loaded.run(["c"], {"x": torch.ones(1), "a": torch.ones(1)})[0].item() == 2


def test_deep_graphs(tmp_path):
    """Deeper than Python's recursion goes."""
    graph = GraphBuilder()
    name = graph.placeholder("x")
    for number in range(3000):
        name = graph.add("Relu", f"relu{number}", name, T=FLOAT)
    assert run(graph, tmp_path, [name], x=random(2, 2))[0].min() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_format": "NCHW"}, "has the layout NCHW"),
        ({"padding": "EXPLICIT"}, "has the padding 'EXPLICIT'"),
        ({"strides": [2, 1, 1, 1]}, "has strides"),
        ({"dilations": [1, 1, 1]}, "has dilations"),
    ],
)
def test_attributes_that_are_not_supported(tmp_path, change, message):
    graph = GraphBuilder()
    graph.placeholder("x")
    graph.floats("w", random(3, 3, 6, 2))
    graph.add("Conv2D", "conv", "x", "w", **{"T": FLOAT, "strides": [1, 1, 1, 1], "padding": "SAME", **change})
    with pytest.raises(ValueError, match=f"Conv2D 'conv' {message}"):
        load(graph, tmp_path).check(["conv"], ["x"])


@pytest.mark.parametrize("fetch", ["bias", "relu"])
def test_biases_in_another_layout(tmp_path, fetch):
    graph = GraphBuilder()
    graph.placeholder("x")
    graph.floats("w", random(1, 1, 4, 4))
    graph.floats("b", random(4))
    graph.add("Conv2D", "conv", "x", "w", T=FLOAT, strides=[1, 1, 1, 1], padding="SAME")
    graph.add("BiasAdd", "bias", "conv", "b", T=FLOAT, data_format="NCHW")
    graph.add("Relu", "relu", "bias", T=FLOAT)
    with pytest.raises(ValueError, match="BiasAdd 'bias' has the layout NCHW"):
        run(graph, tmp_path, [fetch], x=random(1, 4, 4, 4))


def test_values_that_do_not_fit(tmp_path):
    graph = load(blocks()[0], tmp_path)
    with pytest.raises(ValueError, match=r"Conv2D 'biased/Conv2D' cannot take values of shape \(1, 4, 4, 5\)"):
        graph.run(["biased"], {"x": torch.zeros(1, 4, 4, 5)})
    with pytest.raises(ValueError, match=r"'x' of graph\.pb is of torch\.float32, but torch\.uint8 was fed"):
        graph.run(["biased"], {"x": torch.zeros(1, 4, 4, 6, dtype=torch.uint8)})
