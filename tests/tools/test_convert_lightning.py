"""tools/convert_pytorch_lightning_to_torch.py: from the published checkpoint to files that every script reads."""

import pytest
import torch

from tests.tokenizer.taming import F8, save_lightning, taming_state
from tests.training import run_here
from tokenizer.codecs import vqgan
from tokenizer.load import load_tokenizer
from tools import convert_pytorch_lightning_to_torch as convert
from utils.checkpoint import read_checkpoint

SHAPE = (256, 4, F8, 4)


@pytest.fixture(scope="module")
def state():
    return taming_state(*SHAPE)


def codes(model) -> torch.Tensor:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        return model.to_codes(images)


def test_names_become_ours(tmp_path, state, capsys):
    source = save_lightning(tmp_path / "last.ckpt", state)
    run_here(convert, "--input", source, "--output", tmp_path / "new" / "vqgan.pt")
    said = capsys.readouterr().out
    assert "4 of its loss left out" in said
    read = read_checkpoint(tmp_path / "new" / "vqgan.pt")
    assert not any(name.startswith("loss") for name in read.model) and read.extra == {} and read.optimizer is None
    expected = codes(vqgan(source, "vqgan_openimage_f8_256"))
    assert torch.equal(codes(vqgan(tmp_path / "new" / "vqgan.pt", "vqgan_openimage_f8_256")), expected)
    plain = load_tokenizer(tmp_path / "new" / "vqgan.pt", vq_model="VQ-8", codebook_size=256, codebook_embed_dim=4)
    assert not plain.quantize.l2_norm
    assert torch.equal(codes(plain), expected) and len(expected.unique()) > 2


def test_names_kept(tmp_path, state):
    source = save_lightning(tmp_path / "last.ckpt", state, zipped=False)
    run_here(convert, "--input", source, "--keep-names")
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert set(content) == {"model"} and set(content["model"]) == set(state)
    assert all(torch.equal(content["model"][name], state[name]) for name in state)
    assert torch.equal(codes(vqgan(tmp_path / "last.pt")), codes(vqgan(source)))


def test_only_what_is_kept_is_written(tmp_path):
    """A tensor that is a view of a large one does not bring all of it along."""
    large = torch.zeros(1_000_000)
    source = save_lightning(tmp_path / "a.ckpt", {"weight": large[:10]})
    run_here(convert, "--input", source, "--output", tmp_path / "b.pt", "--keep-names")
    assert source.stat().st_size > 4_000_000 and (tmp_path / "b.pt").stat().st_size < 10_000


def test_mistakes(tmp_path, state):
    other = save_lightning(tmp_path / "other.ckpt", {"layer.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"other\.ckpt holds no VQGAN .*--keep-names"):
        run_here(convert, "--input", other)
    half = {name: tensor for name, tensor in state.items() if not name.startswith("quantize")}
    with pytest.raises(ValueError, match=r"half\.ckpt is not a whole .*'quantize\.embedding\.weight'"):
        run_here(convert, "--input", save_lightning(tmp_path / "half.ckpt", half))
    with pytest.raises(ValueError, match=r"other\.ckpt is the checkpoint itself"):
        run_here(convert, "--input", other, "--output", other, "--keep-names")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.ckpt"):
        run_here(convert, "--input", tmp_path / "gone.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.ckpt", "other.ckpt"]
