"""evaluations/c2i/inception.py: the evaluator's features from both backends, where the graph is found, what is refused."""

import os

import numpy as np
import pytest

from evaluations import published
from evaluations.c2i import inception
from evaluations.c2i.inception import TensorFlowInception, TorchInception
from evaluations.published import GRAPH, URLS, find_file
from tests.evaluations.graphs import FLOAT, GraphBuilder, inception_graph
from tests.helpers import GOLDEN

STANDIN = GOLDEN / "evaluator" / "standin_graph.pb"
BACKENDS = [
    pytest.param(TorchInception, id="torch"),
    pytest.param(TensorFlowInception, id="tensorflow", marks=pytest.mark.slow),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The graph of 2015 at an eighth of its width; its batch of one is in a Reshape before the softmax."""
    path = tmp_path_factory.mktemp("graph") / "small.pb"
    path.write_bytes(inception_graph(width=0.125, classes=30))
    return path


def images(count, height=20, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def assert_near(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float32
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_activations(backend):
    with np.load(GOLDEN / "evaluator" / "reference_batch.npz") as data:
        batch = data["arr_0"][:8]
    features = backend(STANDIN)
    pool, spatial = features(batch)
    with np.load(GOLDEN / "evaluator" / "activations.npz") as data:
        assert_near(pool, data["pool_reference"])
        assert_near(spatial, data["spatial_reference"])
    assert features.weights.shape == (2048, 16) and features.weights.dtype == np.float32
    assert features.pool_dim == 2048 and features.device == "cpu"
    assert set(features.versions) == {features.name, "numpy"}


@pytest.mark.slow
def test_both_backends_on_the_graph_of_2015(small):
    """Batches of several images, though the file was made for one."""
    ours, reference = TorchInception(small), TensorFlowInception(small)
    np.testing.assert_array_equal(ours.weights, reference.weights)
    for batch in (images(3), images(1, 31, 17), images(11, 8, 8)):
        for actual, expected in zip(ours(batch), reference(batch), strict=True):
            assert_near(actual, expected)
            assert len(actual) == len(batch) and actual.flags.c_contiguous
    assert ours(images(2))[1].shape == (2, 17 * 17 * 7)


def test_images_one_by_one_as_in_a_batch(small):
    """Eleven are more than are computed at once."""
    features = TorchInception(small)
    batch = images(11)
    together = features(batch)
    alone = [features(batch[i : i + 1]) for i in range(11)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert_near(whole, np.concatenate(parts))
    turned = features(np.ascontiguousarray(batch[:, :, ::-1])[:, :, ::-1])  # a view with a negative stride
    np.testing.assert_array_equal(turned[0], together[0])


@pytest.mark.parametrize(
    "batch",
    [images(2).astype(np.float32), images(2)[0], images(2)[..., :1], images(0), images(2).transpose(0, 3, 1, 2)],
    ids=["float", "one", "grey", "none", "channels first"],
)
def test_images_that_are_refused(batch):
    with pytest.raises(ValueError, match=r"expected uint8 images \(B, H, W, 3\), got (uint8|float32) of shape"):
        TorchInception(STANDIN)(batch)


def other_graph(tmp_path, *, pool=True, features=4):
    """Like the evaluator's graph in names only."""
    graph = GraphBuilder()
    graph.placeholder("ExpandDims")
    graph.integers("axes", [1, 2])
    graph.floats("w", np.arange(12).reshape(1, 1, 3, 4))
    graph.add("Conv2D", "mixed_6/conv", "ExpandDims", "w", T=FLOAT, strides=[1, 1, 1, 1], padding="SAME")
    if pool:
        graph.add("Mean", "pool_3", "mixed_6/conv", "axes", T=FLOAT)
    graph.floats("weights", np.ones((features, 5)))
    graph.add("Identity", "weights/read", "weights", T=FLOAT)
    graph.add("MatMul", "softmax/logits/MatMul", "ExpandDims", "weights/read", T=FLOAT)
    return graph.save(tmp_path / "other.pb")


def test_graphs_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"other\.pb is not the evaluator's Inception graph: .*no node 'pool_3'"):
        TorchInception(other_graph(tmp_path, pool=False))
    with pytest.raises(ValueError, match=r"pool_3:0 gives 4 features an image, softmax/logits/MatMul takes 6"):
        TorchInception(other_graph(tmp_path, features=6))(images(1))


def test_without_tensorflow(monkeypatch):
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tensorflow .*\[eval\].*--backend torch"):
        TensorFlowInception(STANDIN)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A working directory and a project that are empty; downloads are noted instead of made."""
    work, project = tmp_path / "work", tmp_path / "project"
    work.mkdir()
    (project / "pretrained_models").mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr(published, "ROOT", project)
    asked = []

    def download(url, target, what):
        asked.append((url, target))
        return target

    monkeypatch.setattr(published, "download", download)
    return work, project, asked


def test_where_the_graph_is_found(places):
    work, project, asked = places
    # From the last place that is looked at to the first.
    for folder in (project / "pretrained_models", work / "pretrained_models", work):
        folder.mkdir(exist_ok=True)
        (folder / GRAPH).write_bytes(b"graph")
        assert os.path.samefile(find_file(GRAPH), folder / GRAPH)
    assert not asked


def test_where_the_graph_is_downloaded_to(places):
    work, project, asked = places
    assert find_file(GRAPH) == project / "pretrained_models" / GRAPH
    (work / "pretrained_models").mkdir()
    assert find_file(GRAPH) == work / "pretrained_models" / GRAPH
    assert [url for url, _ in asked] == [URLS[GRAPH]] * 2


def test_a_graph_by_its_name(places):
    work, _, asked = places
    (work / "mine.pb").write_bytes(b"graph")
    assert find_file(GRAPH, "mine.pb").samefile(work / "mine.pb")
    with pytest.raises(FileNotFoundError, match=r"other\.pb does not exist"):
        find_file(GRAPH, "other.pb")
    assert not asked


def test_offline(places, monkeypatch):
    """What the real download says where it may not go."""
    from utils.download import download

    monkeypatch.setattr(published, "download", download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE") as error:
        find_file(GRAPH)
    assert URLS[GRAPH] in str(error.value)
