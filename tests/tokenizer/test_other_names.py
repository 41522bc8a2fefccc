"""VQGANs inside other groups' files: Janus by DeepSeek's and by transformers' names, Chameleon."""

import re
from pathlib import Path

import pytest
import torch

from tests.helpers import randomize
from tests.tokenizer.taming import F16, TamingByHand, save_lightning, taming_state
from tokenizer.load import build_tokenizer, load_tokenizer
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils.checkpoint import save_safetensors

# Other parts of a Janus model, which are passed over.
OTHERS = {
    "gen_embed.weight": torch.zeros(32, 8),
    "aligner.layers.0.weight": torch.zeros(2, 2),
    "language_model.model.embed_tokens.weight": torch.zeros(4, 2),
    "vision_model.vision_tower.patch_embed.proj.weight": torch.zeros(2, 2),
}
TRANSFORMERS = {".conv_blocks.": ".{}.", ".res.": ".block.", ".mid.0.": ".mid.block_1.", ".mid.1.": ".mid.attn_1.", ".mid.2.": ".mid.block_2."}  # fmt: skip


def model(**more) -> VQModel:
    return randomize(VQ_models["VQ-8"](codebook_size=32, ch=32, z_channels=32, **more)).requires_grad_(False)


def transformers_names(state: dict) -> dict:
    """As transformers' converter renames LlamaGen's: the decoder's levels keep their numbers."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in TRANSFORMERS.items():
            name = name.replace(ours, theirs.format("down" if name.startswith("encoder") else "up"))
        renamed[name] = tensor
    return {name: tensor for name, tensor in renamed.items() if name != "quantize.codebook_used"}


def prefixed(prefix: str, state: dict) -> dict:
    return {**{f"{prefix}{name}": tensor for name, tensor in state.items()}, **OTHERS}


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def require_same(path: Path, expected: VQModel) -> None:
    found = load_tokenizer(path)
    assert found.quantize.l2_norm and found.family == "VQ-8"
    codes = expected.to_codes(pixels())
    assert torch.equal(found.to_codes(pixels()), codes) and len(codes.unique()) > 3
    assert torch.equal(found.to_pixels(codes), expected.to_pixels(codes))
    assert found.fingerprint() == expected.fingerprint()


def test_janus_file_of_deepseek_holds_a_tokenizer(tmp_path):
    torch.save(prefixed("gen_vision_model.", model().state_dict()), tmp_path / "pytorch_model.bin")
    require_same(tmp_path, model())


@pytest.mark.parametrize("prefix", ["model.vqmodel.", "vqmodel."])
def test_janus_file_of_transformers_holds_a_tokenizer(tmp_path, prefix):
    state = transformers_names(model().state_dict())
    assert "decoder.up.0.block.2.conv1.weight" in state and "encoder.mid.attn_1.q.weight" in state
    save_safetensors(tmp_path / "model.safetensors", prefixed(prefix, state))
    (tmp_path / "config.json").write_text('{"model_type": "janus"}')
    require_same(tmp_path, model())


def test_janus_tokenizer_taken_out_of_transformers_is_known_by_its_levels(tmp_path):
    """Without a prefix the order of the decoder's levels tells it from taming's."""
    save_safetensors(tmp_path / "vq.safetensors", transformers_names(model().state_dict()))
    require_same(tmp_path / "vq.safetensors", model())


@pytest.mark.parametrize("family", ["MaskGIT-VQGAN", "Open-MAGVIT2"])
def test_quantiser_that_the_weights_show_is_not_another(tmp_path, family):
    size = {"ch": 32, **VQ_SIZES[family], "ch_mult": [1, 2]}
    quantizer = {**size.pop("quantizer"), "codebook_size": 16}
    torch.save(build_tokenizer({"network": size, "quantizer": quantizer}).state_dict(), tmp_path / "vq.bin")
    assert load_tokenizer(tmp_path / "vq.bin", quantizer=quantizer["name"]).codebook_size == 16
    with pytest.raises(ValueError, match=rf"has the quantizer {quantizer['name']}, not ibq: leave --quantizer out"):
        load_tokenizer(tmp_path / "vq.bin", quantizer="ibq")


@pytest.mark.parametrize("part", ["decoder.", "quantize."])
def test_file_with_a_part_of_a_tokenizer_is_refused(tmp_path, part):
    """As transformers' Chameleon, which has the encoder alone."""
    state = {name: tensor for name, tensor in transformers_names(model().state_dict()).items() if part not in name}
    save_safetensors(tmp_path / "model.safetensors", prefixed("model.vqmodel.", state))
    with pytest.raises(ValueError, match=rf"is not a whole image tokenizer: it has no entry '{re.escape(part)}"):
        load_tokenizer(tmp_path)


def test_chameleon_has_no_attention_in_its_levels(tmp_path):
    state = taming_state(48, 16, F16, 32, attend=())
    by_hand = TamingByHand(state, F16)
    found = load_tokenizer(save_lightning(tmp_path / "vqgan.ckpt", state))
    assert (found.family, found.network["attention"], found.quantize.l2_norm) == ("Chameleon", [], False)
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = found.to_codes(images)
    assert torch.equal(codes, by_hand.codes(by_hand.latents(images)))
    torch.testing.assert_close(found.to_pixels(codes), by_hand.images(codes), rtol=1e-3, atol=1e-3)
