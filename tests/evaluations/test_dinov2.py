"""DINOv2 features: a small network of that shape with random weights, whose file the tests write."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from evaluations import dinov2, published
from evaluations.dinov2 import MEAN, STD, DINOv2Features, find_weights, resized_positions
from evaluations.features import normalised

NAME = "tiny_patch14_dinov2"


@register_model
def tiny_patch14_dinov2(pretrained: bool = False, **kwargs) -> VisionTransformer:
    # 70 pixels are 5x5 patches: another table of positions than the 16x16 of 224 pixels.
    given = {"img_size": 70, **{k: v for k, v in kwargs.items() if k in ("img_size", "num_classes")}}
    return VisionTransformer(patch_size=14, embed_dim=32, depth=2, num_heads=2, init_values=0.5, **given)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=0)
    return {name: torch.randn_like(value) * 0.2 for name, value in model.state_dict().items()}


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path, monkeypatch):
    """No weights in pretrained_models/ or in a cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "ROOT", tmp_path / "project")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch_hub"))


def images(count: int = 3, size: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def by_hand(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The class token of a vision transformer, written out."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + resized_positions(state["pos_embed"], 16)
    for block in ("blocks.0", "blocks.1"):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").view(len(x), -1, 3, 2, 16).unbind(2)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 4
        mixed = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
        x = x + state[f"{block}.ls1.gamma"] * linear(mixed, f"{block}.attn.proj")
        hidden = torch.nn.functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + state[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_the_class_token_of_the_files_network(weights, tmp_path, kind):
    path = tmp_path / f"weights.{kind}"
    if kind == "pth":  # as the first release, which has the token that training masks with
        torch.save({**weights, "mask_token": torch.zeros(1, 32)}, path)
    else:
        save_file(weights, path)
    features = DINOv2Features(path, model_name=NAME)
    got = features(images())
    assert got.dtype == np.float32 and got.shape == (3, features.dim) == (3, 32)
    np.testing.assert_allclose(got, by_hand(weights, normalised(images(), 224, MEAN, STD)), rtol=1e-4, atol=1e-4)
    assert np.abs(got[0] - got[1]).max() > 1e-2  # the images do matter
    np.testing.assert_allclose(features(images()[1:2])[0], got[1], rtol=1e-4, atol=1e-5)


def test_preprocessing_is_pillows_filter_and_imagenets_normalisation():
    for size in (40, 224, 300):
        image = images(1, size)
        resized = np.asarray(Image.fromarray(image[0]).resize((224, 224), Image.Resampling.BICUBIC))
        expected = (resized / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        np.testing.assert_allclose(normalised(image, 224, MEAN, STD)[0].permute(1, 2, 0), expected, atol=1e-5)


def test_positions_are_sampled_with_a_tenth_of_a_patch_more():
    """The bicubic filter (a = -0.75) by hand, along one axis: the table varies along its columns only."""
    column = torch.randn(37, generator=torch.Generator().manual_seed(0)).double()
    table = torch.cat([torch.full((1, 1, 1), 9.0).double(), column.repeat(37).view(1, -1, 1)], dim=1)

    def weight(x, a=-0.75):
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    got = resized_positions(table, 16)
    assert got.shape == (1, 257, 1) and got[0, 0, 0] == 9
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        near = range(math.floor(place) - 1, math.floor(place) + 3)
        expected = sum(float(column[min(max(j, 0), 36)]) * weight(place - j) for j in near)
        assert float(got[0, 1 + i, 0]) == pytest.approx(expected, abs=1e-9)
    assert torch.equal(resized_positions(table, 37), table)


def test_weights_are_found_where_they_usually_lie(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors"):
        find_weights()
    hub = tmp_path / "torch_hub" / "checkpoints" / "dinov2_vitl14_pretrain.pth"
    cached = tmp_path / "cache" / "model.safetensors"
    project = tmp_path / "project" / "pretrained_models" / f"{dinov2.MODEL_NAME}.pth"
    here = Path.cwd() / "pretrained_models" / dinov2.MODEL_NAME / "model.safetensors"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: str(cached))
    for place in (hub, cached, project, here):  # each comes before the ones already there
        place.parent.mkdir(parents=True)
        place.touch()
        assert find_weights() == place
    assert find_weights(hub) == hub
    with pytest.raises(FileNotFoundError, match=r"no DINOv2 weights at nowhere.pth"):
        find_weights("nowhere.pth")


def test_what_does_not_fit_is_refused(weights, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({name: value for name, value in weights.items() if "norm1" not in name}, path)
    with pytest.raises(ValueError, match=r"does not fit the model:\n  missing \(4\): blocks.0.norm1.weight"):
        DINOv2Features(path, model_name=NAME)
    for wrong in (images().astype(np.float32), images()[0], images()[..., :1]):
        with pytest.raises(ValueError, match=r"expected uint8 \(images, height, width, 3\)"):
            normalised(wrong, 224, MEAN, STD)
