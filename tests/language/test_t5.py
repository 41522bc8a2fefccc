"""T5: what the encoder computes, whatever the batch, and what is said of folders that hold none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from language import t5
from language.captions import clean_caption
from language.t5 import T5Embedder, find_t5, fingerprint
from tests.language.small_t5 import make_small_t5

TEXTS = ["A red lantern, “lit” at night", "photo.jpg", "two cats sleep on a green chair next to a window"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_t5(tmp_path_factory.mktemp("t5") / "flan-t5-xl")


@pytest.fixture(scope="module")
def embedder(folder):
    return T5Embedder("cpu", folder, torch_dtype=torch.float32, model_max_length=40)


@pytest.fixture
def copied(folder, tmp_path):
    """A folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "flan-t5-xl"))


# What comes out


def test_features_and_mask(embedder):
    features, mask = embedder.get_text_embeddings(TEXTS)
    assert features.shape == (3, 40, 32) and features.dtype == torch.float32 and embedder.dim == 32
    assert mask.shape == (3, 40) and mask.dtype == torch.int64
    assert mask[1].tolist() == [1] + [0] * 39  # nothing is left of a file name: the end of the text alone
    assert 0 < mask[0].sum() < mask[2].sum() <= 40
    assert all(sorted(row.tolist(), reverse=True) == row.tolist() for row in mask)
    assert features[1, 5].abs().sum() > 0  # what stands in the padding is no zero


def test_against_the_whole_model(embedder, folder):
    """One text at a time without padding, through the encoder of the model with its decoder."""
    features, mask = embedder.get_text_embeddings(TEXTS)
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, row, present in zip(TEXTS, features, mask):
        ids = torch.tensor([tokenizer(clean_caption(text))["input_ids"]])
        with torch.no_grad():
            expected = model.encoder(ids).last_hidden_state[0]
        assert len(expected) == present.sum()
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_a_text_does_not_depend_on_the_others(embedder, monkeypatch):
    together, mask = embedder.get_text_embeddings(TEXTS)
    for i, text in enumerate(TEXTS):
        alone, alone_mask = embedder.get_text_embeddings([text])
        assert torch.equal(alone_mask[0], mask[i])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(t5, "TEXTS_AT_ONCE", 2)
    torch.testing.assert_close(embedder.get_text_embeddings(TEXTS)[0], together, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut(embedder):
    features, mask = embedder.get_text_embeddings(["a fox and " * 1000])
    assert features.shape == (1, 40, 32) and mask.sum() == 40


@pytest.mark.parametrize("texts, message", [([], "empty"), ("a fox", "a list of strings"), (["a", None], "None")])
def test_wrong_texts(embedder, texts, message):
    with pytest.raises(ValueError, match=message):
        embedder.get_text_embeddings(texts)


def test_fingerprints_tell_encoders_apart(embedder, folder, tmp_path):
    half = T5Embedder("cpu", folder, torch_dtype=torch.float32)
    assert fingerprint(half) == fingerprint(embedder) and len(fingerprint(half)) == 16
    half.model.encoder.final_layer_norm.weight.mul_(1.01)
    assert fingerprint(half) != fingerprint(embedder)
    other = T5Embedder("cpu", folder, torch_dtype=torch.float32)
    other.tokenizer.add_tokens(["lantern"])
    assert fingerprint(other) != fingerprint(embedder)


# Where it lies


def test_where_a_folder_is_looked_for(folder, tmp_path, monkeypatch):
    assert find_t5(folder.parent, "flan-t5-xl") == folder
    assert find_t5(folder, "flan-t5-xl") == folder
    assert find_t5(None, str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "pretrained_models/t5-ckpt/flan-t5-xl")
    assert find_t5().samefile("pretrained_models/t5-ckpt/flan-t5-xl")
    assert find_t5("./pretrained_models/t5-ckpt", "flan-t5-xl").samefile("pretrained_models/t5-ckpt/flan-t5-xl")
    assert find_t5("nowhere", "flan-t5-xl").samefile("pretrained_models/t5-ckpt/flan-t5-xl")


def test_names_of_published_calls(folder):
    embedder = T5Embedder("cpu", "flan-t5-xl", local_cache=True, cache_dir=str(folder.parent), model_max_length=20)
    assert embedder.get_text_embeddings(["a fox"])[0].shape == (1, 20, 32)
    with pytest.raises(FileNotFoundError, match=r"no T5 at .*flan-t5-xxl"):
        T5Embedder("cpu", "flan-t5-xxl", local_cache=True, cache_dir=folder.parent)
    with pytest.raises(ValueError, match="model_max_length is 0"):
        T5Embedder("cpu", folder, model_max_length=0)


@pytest.mark.parametrize("failure", [FileNotFoundError("HF_HUB_OFFLINE is set"), ConnectionError("no connection")])
def test_what_gets_a_missing_one(tmp_path, monkeypatch, failure):
    asked = []

    def resolve(name):
        asked.append(name)
        raise failure

    monkeypatch.setattr(t5, "resolve", resolve)
    with pytest.raises(
        type(failure), match=rf"{failure}(.|\n)*hf download google/flan-t5-xl --local-dir {tmp_path}/t5/flan-t5-xl"
    ):
        find_t5(tmp_path / "t5", "flan-t5-xl")
    assert asked == ["google/flan-t5-xl"]
    with pytest.raises(FileNotFoundError, match=r"no T5 at .*my-t5"):
        find_t5(tmp_path, "my-t5")
    assert len(asked) == 1


def test_an_unfinished_download_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "flan-t5-xl").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json(.|\n)*hf download"):
        find_t5(tmp_path, "flan-t5-xl")


@pytest.mark.parametrize(
    "names, message",
    [
        (["model.safetensors"], r"has no weights(.|\n)*hf download google/flan-t5-xl --local-dir"),
        (["spiece.model", "tokenizer.json"], r"has no tokenizer(.|\n)*hf download"),
    ],
)
def test_missing_files(copied, names, message):
    for name in names:
        (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        T5Embedder("cpu", copied)


def test_damaged_files(copied):
    whole = {name: (copied / name).read_bytes() for name in ("model.safetensors", "config.json", "tokenizer.json")}
    for name, content in [
        ("model.safetensors", whole["model.safetensors"][:-100]),
        ("config.json", b"{"),
        ("tokenizer.json", b"{"),
    ]:
        (copied / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{copied}(.|\n)*hf download"):
            T5Embedder("cpu", copied)
        (copied / name).write_bytes(whole[name])
    T5Embedder("cpu", copied)


def test_a_missing_part_of_the_weights(copied):
    """Of a download in two parts only the first came."""
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for part, part_names in parts.items():
        save_file({name: weights[name] for name in part_names}, copied / part, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: part for part, part_names in parts.items() for name in part_names}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    T5Embedder("cpu", copied)
    (copied / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read(.|\n)*hf download"):
        T5Embedder("cpu", copied)


def test_weights_that_are_not_there_are_not_made_up(copied):
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks weights of T5's encoder: encoder\.block\.1\.layer\.0\.SelfAttention\.q"
    ):
        T5Embedder("cpu", copied)


def test_another_model(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="of the kind 'bert', not a T5"):
        T5Embedder("cpu", copied)
