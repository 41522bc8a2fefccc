"""The models for the hub: what is saved comes back to the bit, strictly, with its card and the flags of training."""

import json
import pickle

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from autoregressive.hub import GPT_models_HF, TransformerHF
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.pipeline import ImagePipeline, load_gpt
from tests.helpers import randomize
from tokenizer.load import load_tokenizer
from tokenizer.tokenizer_image.hub import VQ_models_HF, VQModelHF
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils.pretrained import check_destination, publishable

ARGS = {"image_size": 32, "downsample_size": 4, "lr": 1e-4, "code_path": "/home/me/codes", "note": "a/b", "ema": None}


def make(kind: str):
    """A small model for the hub with weights that vary, and what a caller feeds it to compare."""
    if kind == "tokenizer":
        return randomize(VQ_models_HF["VQ-4"](codebook_size=64), seed=3)
    shape = {"vocab_size": 64, "block_size": 64}
    if kind == "text":
        shape |= {"model_type": "t2i", "cls_token_num": 9, "caption_dim": 24}
    if kind == "PAR":
        shape |= {"ar_token_num": 4}
    return randomize(GPT_models_HF["GPT-XS"](**shape, num_classes=10), seed=1)


def same(a, b) -> bool:
    """Whether two models have the same weights: names, dtypes, bits."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["class", "text", "PAR", "tokenizer"])
def test_a_round_trip_keeps_every_bit(tmp_path, kind, dtype):
    model = make(kind).to(dtype)
    model.training_args, model.steps = ARGS, 7
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    back = type(model).from_pretrained(tmp_path / "m")
    assert same(model, back) and back.config == model.config and not back.training
    assert not any(tensor.is_meta for tensor in back.state_dict().values()) and all(
        p.requires_grad for p in back.parameters()
    )
    assert back.steps == 7 and back.training_args == {"image_size": 32, "downsample_size": 4, "lr": 1e-4}
    back.save_pretrained(tmp_path / "again")
    assert same(type(model).from_pretrained(tmp_path / "again"), model)
    for name in ("config.json", "README.md"):  # safetensors writes its header in no fixed order
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes(), name


def test_they_are_the_models_they_are_of():
    assert list(GPT_models_HF) == [name for name, size in GPT_SIZES.items() if size.trunk == "llama"] and list(
        VQ_models_HF
    ) == list(VQ_models)
    gpt, tokenizer = make("class"), make("tokenizer")
    assert isinstance(gpt, Transformer) and isinstance(tokenizer, VQModel)
    plain = GPT_models["GPT-XS"](vocab_size=64, block_size=64, num_classes=10)
    plain.load_state_dict(gpt.state_dict())
    labels, tokens = torch.tensor([3]), torch.arange(63)[None]
    assert torch.equal(plain.eval()(tokens, labels), gpt(tokens, labels))
    assert len(ImagePipeline(gpt, tokenizer)([1, 2], progress=False)) == 2
    held = TransformerHF.holding(plain, ARGS, 5)
    assert (
        same(held, plain)
        and held.steps == 5
        and held.tok_embeddings.weight.data_ptr() == plain.tok_embeddings.weight.data_ptr()
    )


def test_a_saved_folder_is_a_checkpoint_too(tmp_path):
    """Of the scripts that sample: image size and the rest are read off the weights and their header."""
    gpt, tokenizer = make("class"), make("tokenizer")
    gpt.training_args = ARGS
    gpt.save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "vq")
    loaded = load_gpt(tmp_path / "gpt")
    assert loaded.args.block_size == 64 and same(loaded, gpt) and same(load_tokenizer(tmp_path / "vq"), tokenizer)


def test_the_card(tmp_path):
    model = make("class")
    model.training_args, model.steps = ARGS, 1234567
    model.save_pretrained(tmp_path, model_card_kwargs={"repo_id": "me/digits", "license": "cc0-1.0"})
    text, card = (tmp_path / "README.md").read_text(), ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc0-1.0" and "image-generation" in card.data.tags
    assert (
        "# digits" in text
        and 'TransformerHF.from_pretrained("me/digits")' in text
        and "1,234,567 optimizer steps" in text
    )
    assert "| `lr` | `0.0001` |" in text and "class-conditional, 10 classes, 64 codes, 8x8 image tokens" in text
    header = (tmp_path / "model.safetensors").read_bytes()[:2000]
    assert "/home/me" not in text and b"/home/me" not in header and "code_path" not in text, (
        "where things lay stays here"
    )
    source = text.split("```python\n")[1].split("```")[0]
    compile(source, "card", "exec")


def test_what_may_be_published():
    args = {
        "lr": 0.1,
        "vq_ckpt": "x",
        "gpt_ckpt": "y",
        "results_dir": "z",
        "resume": True,
        "dataset": "a",
        "x": "c:\\y",
        "path": 1,
    }
    assert publishable(args) == {"lr": 0.1, "dataset": "a"} and publishable(None) == {}


# Mistakes


@pytest.fixture
def folder(tmp_path):
    make("class").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_weights_have_to_fit(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    for name, change in (
        ("missing", lambda s: s.pop("norm.weight")),
        ("unexpected", lambda s: s.update(extra=torch.ones(1))),
    ):
        changed = dict(state)
        change(changed)
        save_file(changed, file)
        with pytest.raises(ValueError, match=rf"model\.safetensors does not fit the model:\n  {name} \(1\)"):
            TransformerHF.from_pretrained(folder)
    save_file(state, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 65}))
    with pytest.raises(ValueError, match="other shape"):
        TransformerHF.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        TransformerHF.from_pretrained(folder)


def test_nothing_in_a_file_is_run(folder, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"refused|damaged"):
        TransformerHF.from_pretrained(folder)
    assert "ran" not in capsys.readouterr().out.split()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        TransformerHF.from_pretrained(folder)


def test_the_tokenizer_is_not_a_gpt(folder):
    with pytest.raises(ValueError):
        VQModelHF.from_pretrained(folder)


def test_destinations(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.pretrained.get_token", lambda: None)
    with pytest.raises(ValueError, match="give --repo-id owner/name to push to, or --output"):
        check_destination(None, None)
    with pytest.raises(ValueError, match="set HF_TOKEN"):
        check_destination("me/model", None)
    for name in ("model", "a/b/c", "me/..", "me/a b"):
        with pytest.raises(ValueError):
            check_destination(name, None)
    check_destination(None, tmp_path)
    check_destination(None, tmp_path / "new")
    (tmp_path / "x").touch()
    for taken in (tmp_path, tmp_path / "x"):
        with pytest.raises(ValueError, match="is there already: give a folder that is new or empty"):
            check_destination(None, taken)
