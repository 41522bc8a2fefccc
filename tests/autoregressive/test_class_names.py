"""Names of classes: one rule for the page, the server and the scripts."""

from types import SimpleNamespace

import pytest

from autoregressive.class_names import class_choice, class_names, find_class, imagenet_names
from autoregressive.sample.common import labels_to_draw
from autoregressive.serve.body import ImageBody, Limits, ask
from autoregressive.serve.engine import ModelInfo
from autoregressive.serve.errors import RequestError

NAMES = class_names(1000)
MODEL = ModelInfo("small", "c2i", 32, 64, 1000, raster=True, classes=tuple(NAMES))


@pytest.mark.parametrize(
    "asked, label",
    [("golden retriever", 207), ("Golden Retriever", 207), (" golden  retriever", 207), ("golden_retriever", 207), ("golden-retriever", 207), ("black and tan coonhound", 165),
     ("207", 207), (207, 207), ("207: golden retriever", 207), ("207: Golden retriever", 207), ("Cardigan", 264),
     ("cardigan", 474), ("264: Cardigan", 264), ("264: cardigan", 264), ("474: cardigan", 474)],
)  # fmt: skip
def test_find_class_name_number_or_choice_is_found(asked, label):
    assert find_class(asked, NAMES) == label
    if isinstance(asked, str):
        assert ask(ImageBody(prompt=asked), MODEL, Limits()).what == label


def test_find_class_every_choice_of_the_list_is_its_own_class():
    assert [find_class(class_choice(i, name), NAMES) for i, name in enumerate(NAMES)] == list(range(1000))
    assert [find_class(name, NAMES) for name in NAMES] == list(range(1000))


@pytest.mark.parametrize(
    "asked, message",
    [("CARDIGAN", "'CARDIGAN' names the classes 264: Cardigan and 474: cardigan: give the exact spelling or the number"),
     ("500: tench", "no class is called '500: tench'"),
     ("retriever", "'retriever'; close to it: 205: flat-coated retriever, 206: curly-coated"),
     ("golden retreiver", "'golden retreiver'; close to it: 207: golden retriever"),
     ("a photo of a lesser panda in snow", "close to it: 387: lesser panda"),
     ("1000", "class 1000 is out of range: the model has classes 0 to 999"), ("-1", "class -1 is out of range"),
     (1000, "class 1000 is out of range"), ("1.5", "'1.5'"), ("", "no class is chosen"), (None, "no class is chosen"),
     ("x" * 10_000, "no class is called 'x+…'")],
)  # fmt: skip
def test_find_class_unknown_or_ambiguous_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        find_class(asked, NAMES)


def test_ask_ambiguous_class_is_refused_with_candidates():
    for param in ("prompt", "class_name", "negative_class"):
        body = ImageBody(**({"class_label": 1} if param == "negative_class" else {}), **{param: "CARDIGAN"})
        with pytest.raises(RequestError, match="264: Cardigan and 474: cardigan") as refused:
            ask(body, MODEL, Limits())
        assert refused.value.status == 400 and refused.value.param == param


def test_find_class_own_names_come_before_numbers():
    """Folders called by other numbers than their labels: "3" is the folder, and 3 the label."""
    names = class_names(10, recorded=[str(i) for i in range(1, 11)])
    assert find_class("3", names) == 2 and find_class("10", names) == 9 and find_class(3, names) == 3
    assert find_class("2: 3", names) == 2
    with pytest.raises(ValueError, match="no class is called '0'; close to it: 0: 1"):
        find_class("0", names)
    with pytest.raises(ValueError, match="'x'; the model's classes are 0: 1, 1: 2, 2: 3, 3: 4, 4: 5, …"):
        find_class("x", names)


def test_labels_of_the_script_are_found_as_everywhere():
    gpt = SimpleNamespace(args=SimpleNamespace(num_classes=3), file_config={"classes": ["1", "2", "ç"]})
    asked = ["1", "1: 2", "\u0043\u0327"]
    assert labels_to_draw(SimpleNamespace(labels=asked), gpt) == ([0, 1, 2], ["1", "2", "ç"])


def test_find_class_near_to_none_lists_the_models_own_names():
    with pytest.raises(ValueError, match=r"called 'mango'; the model's classes are 0: cat, 1: dog$"):
        find_class("mango", ["cat", "dog"])


def test_find_class_names_of_two_classes_are_refused():
    assert find_class("crane", ["crane", "heron", "Crane"]) == 0
    with pytest.raises(ValueError, match="0: crane and 2: crane"):
        find_class("crane", ["crane", "heron", "crane"])


def test_class_names_recorded_are_the_models():
    assert class_names(3, recorded=["cat", "dog", "emu"]) == ["cat", "dog", "emu"]
    assert class_names(3) == ["0", "1", "2"]
    assert class_names(4, recorded=["cat", "dog"]) == ["cat", "dog", "2", "3"]
    wordnet = [f"n{i:08d}" for i in range(1000)]
    assert class_names(1000, recorded=wordnet) == list(imagenet_names()) == NAMES
    own = [f"thing {i}" for i in range(1000)]
    assert class_names(1000, recorded=own) == own and find_class("thing 7", own) == 7


def test_class_names_of_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("ant\n\n bee \n")
    assert class_names(2, file) == class_names(2, file, recorded=["x", "y"]) == ["ant", "bee"]
    with pytest.raises(ValueError, match=r"names\.txt has 2 names, one a line, and the model 3 classes"):
        class_names(3, file)
    with pytest.raises(FileNotFoundError):
        class_names(3, tmp_path / "no.txt")
