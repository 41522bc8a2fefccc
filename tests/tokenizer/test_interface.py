"""The interface of tokenizers for every quantiser and network that is registered and every family of published files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoregressive.pipeline import decode_codes
from tests.helpers import ROOT, randomize
from tests.tokenizer.taming import F8, save_lightning, taming_state, with_averages
from tests.training import load, run_here
from tokenizer.base import NETWORKS, QUANTIZERS, CodebookLosses, Quantizer
from tokenizer.load import build_tokenizer, load_tokenizer
from tokenizer.other_families import FAMILIES
from tokenizer.tokenizer_image.hub import for_hub
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from tools import export_checkpoint
from utils.checkpoint import save_checkpoint
from utils.origin import origin
from utils.registry import import_file

import_file(ROOT / "examples/lookup_free.py")
NETWORK = {"name": "vqgan", **VQ_SIZES["VQ-4"], "z_channels": 32}
VQ = {"name": "vq", "codebook_size": 64, "codebook_embed_dim": 8}
LFQ = {"name": "lfq", "codebook_size": 64}
# Each halves an image twice.
CONFIGS = {
    "vq": {"network": NETWORK, "quantizer": VQ},
    "vq without l2-norm": {"network": NETWORK, "quantizer": {**VQ, "codebook_embed_dim": 3, "l2_norm": False}},
    "vq with restarts": {"network": NETWORK, "quantizer": {**VQ, "name": "vq_restart"}},
    "ibq": {"network": NETWORK, "quantizer": {**VQ, "name": "ibq"}},
    "vq in taming's order": {"network": NETWORK, "quantizer": {**VQ, "name": "vq_legacy"}},
    "lookup-free": {"network": NETWORK, "quantizer": {**LFQ, "name": "lookup-free"}},
    "lfq": {"network": NETWORK, "quantizer": LFQ},
    "fsq": {"network": NETWORK, "quantizer": {"name": "fsq", "levels": [4, 5, 3]}},
    "patches": {"network": {"name": "patches", "patch": 2, "ch": 16, "depth": 1}, "quantizer": VQ},
    "maskgit": {
        "network": {"name": "maskgit", "ch_mult": [1, 2, 1], "ch": 32, "blocks": 1},
        "quantizer": {**VQ, "name": "vq_legacy"},
    },
    "open-magvit2": {
        "network": {"name": "open-magvit2", "ch": 32, "ch_mult": [1, 1, 2], "blocks": 1},
        "quantizer": LFQ,
    },
}


def build(name: str, **training):
    torch.manual_seed(0)
    return build_tokenizer(CONFIGS[name], **training)


def pixels(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size + 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_every_registered_quantiser_and_network_is_tested():
    for part, registry in (("quantizer", QUANTIZERS), ("network", NETWORKS)):
        assert {config[part]["name"] for config in CONFIGS.values()} == {*registry}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizer_codes_and_pixels_have_the_grid_of_the_image(name):
    tokenizer = randomize(build(name))
    codes = tokenizer.to_codes(pixels())
    assert (codes.shape, codes.dtype) == ((2, 4, 5), torch.int64) and len(codes.unique()) > 2
    assert 0 <= codes.min() <= codes.max() < tokenizer.codebook_size == (60 if name == "fsq" else 64)
    images = tokenizer.to_pixels(codes)
    assert images.shape == (2, 3, 16, 20) and images.isfinite().all()
    if name != "patches":
        assert (tokenizer.to_pixels_in_strips(codes) - images).abs().max() < 1e-3 * images.abs().max()
    if name not in (
        "fsq",
        "ibq",
    ):  # FSQ bounds latents first, and of IBQ's rows a longer one may have the larger product
        assert torch.equal(tokenizer.quantize.nearest(tokenizer.quantize.lookup(codes)), codes)
    assert (tokenizer.downsample, tokenizer.device.type) == (4, "cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizer_on_a_cpu_gives_the_same_codes_and_pixels_in_any_batch_and_by_any_threads(name):
    # Of maps of more than 1024 places a CPU's group norm of channels-last ones rounds by the number of threads.
    tokenizer, images = randomize(build(name)), torch.cat([pixels(40), pixels(40)[:1].flip(2)])
    codes = tokenizer.to_codes(images)
    exact, drawn, before = (
        tokenizer.to_pixels(codes),
        decode_codes(tokenizer, codes.flatten(1), width=11),
        torch.get_num_threads(),
    )
    try:
        for threads, part in ((1, slice(0, 3)), (2, slice(0, 1)), (3, slice(1, 3))):
            torch.set_num_threads(threads)
            assert torch.equal(tokenizer.to_codes(images[part]), codes[part])
            assert torch.equal(tokenizer.to_pixels(codes[part]), exact[part])
            assert np.array_equal(decode_codes(tokenizer, codes[part].flatten(1), width=11), drawn[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizer_training_step_reaches_every_weight(name):
    tokenizer = build(name, entropy_loss_ratio=0.1).train()
    recons, losses = tokenizer(pixels())
    assert isinstance(losses, CodebookLosses) and 0 < losses.usage <= 1
    assert tuple(losses) == (*losses.parts.values(), losses.usage), "unpacks as published code unpacks it"
    (recons.square().mean() + losses.total).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizer_is_built_again_of_its_file(name, tmp_path):
    """Nothing but the config says what the weights do not show."""
    tokenizer = randomize(build(name))
    save_checkpoint(tmp_path / "vq.pt", {"model": tokenizer.state_dict(), "config": origin(**tokenizer.identity)})
    loaded = load_tokenizer(tmp_path / "vq.pt")
    assert loaded.identity == tokenizer.identity and loaded.fingerprint() == tokenizer.fingerprint()
    codes = tokenizer.to_codes(pixels())
    assert torch.equal(loaded.to_codes(pixels()), codes)
    assert torch.equal(loaded.to_pixels(codes), tokenizer.to_pixels(codes))


def test_fingerprint_of_other_quantisers_of_equal_weights_differs():
    """As sign bits with and without an option that decides codes, which have no tensors."""
    tokenizer = randomize(build("lookup-free"))
    before = tokenizer.fingerprint()
    tokenizer.quantize.config = {**tokenizer.quantize.config, "order": "reversed"}
    assert tokenizer.fingerprint() != before


@pytest.mark.parametrize(
    "quantizer, message",
    [
        ({"name": "vq", "levels": 3}, r"quantizer vq takes codebook_size, .*got levels"),
        ({"name": "binary"}, r"no quantizer is called 'binary'; known are .*vq, .*--import FILE\.py"),
    ],
)
def test_build_tokenizer_of_what_is_not_there_is_refused(quantizer, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer({"network": NETWORK, "quantizer": quantizer})
    with pytest.raises(ValueError, match="no network of a tokenizer is called 'vit'; known are vqgan"):
        build_tokenizer({"network": {"name": "vit"}, "quantizer": VQ})


def test_tokenizer_without_strips_says_so(monkeypatch):
    tokenizer = build("vq")
    monkeypatch.delattr(type(tokenizer), "to_pixels_in_strips")
    with pytest.raises(NotImplementedError, match="the tokenizer VQ-4 cannot decode in strips"):
        tokenizer.to_pixels_in_strips(torch.zeros(1, 2, 2, dtype=torch.long))


def released(family: str, folder) -> tuple:
    """A published file of the family, and whether its codes are l2-normalised (None where there is no such thing)."""
    if family == "ibq":
        raw, averaged = (taming_state(64, 4, (1, 2), 32, seed=seed, blocks=4) for seed in (1, 2))
        return save_lightning(folder / "last.ckpt", with_averages(raw, averaged)), None
    if family == "janus":
        state = {f"gen_vision_model.{name}": tensor for name, tensor in randomize(build("vq")).state_dict().items()}
        torch.save({**state, "language_model.lm_head.weight": torch.zeros(2, 2)}, folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin", True
    if family == "open-magvit2":
        state = randomize(build("open-magvit2")).state_dict()
        return save_lightning(folder / "imagenet_256_L.ckpt", with_averages(state, state)), None
    if family == "maskgit":
        torch.save(randomize(build("maskgit")).state_dict(), folder / "maskgit.bin")
        return folder / "maskgit.bin", None
    if family == "taming":
        return save_lightning(folder / "last.ckpt", taming_state(64, 4, F8, 32)), False
    save_checkpoint(folder / "vq.pt", {"model": randomize(build("vq")).state_dict()})
    return folder / "vq.pt", True


@pytest.mark.parametrize("family", ["llamagen", *FAMILIES])
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_published_file_and_its_copies_are_one_tokenizer(family, form, tmp_path):
    path, normalised = released(family, tmp_path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.quantize.config.get("l2_norm") == normalised
    run_here(export_checkpoint, "--checkpoint", path, "--format", form, "--output", tmp_path / "copy")
    if form == "pt":
        assert load(tmp_path / "copy")["config"]["quantizer"].get("l2_norm") == normalised
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint() == tokenizer.fingerprint() and copy.identity == tokenizer.identity
    codes = tokenizer.to_codes(pixels(64)[:1, :, :32, :64])
    assert codes.shape == (1, 32 // tokenizer.downsample, 64 // tokenizer.downsample)
    assert torch.equal(copy.to_pixels(codes), tokenizer.to_pixels(codes))
    recons, losses = copy.train().requires_grad_()(pixels(64)[:1, :, :32, :64])
    (recons.square().mean() + losses.total).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in copy.parameters())


class Halves(Quantizer):
    """Two codes: the sign of the only channel."""

    codebook_size, width = 2, 1

    def nearest(self, latents):
        return (latents[:, 0] > 0).long()


def test_codes_of_latents_that_are_not_finite_are_minus_one(monkeypatch):
    tokenizer = build("vq").eval()
    monkeypatch.setattr(tokenizer, "quantize", Halves())
    latents = torch.tensor([[[[1.0, -1.0], [torch.nan, torch.inf]]]])
    monkeypatch.setattr(tokenizer, "latents", lambda pixels: latents)
    assert tokenizer.to_codes(latents).tolist() == [[[1, 0], [-1, -1]]]


def test_config_of_another_quantiser_stands_in_the_published_fields_where_it_can():
    tokenizer = build("vq without l2-norm")
    assert tokenizer.config.quantizer is None and tokenizer.config.codebook_l2_norm is False
    other = build("lookup-free")
    assert (other.config.codebook_size, other.config.codebook_embed_dim) == (64, 6)
    assert type(other)(replace(other.config)).identity == other.identity


def test_tokenizer_of_patches_is_built_again():
    config = {"network": VQ_SIZES["VQ-8-P"], "quantizer": VQ}
    tokenizer = randomize(build_tokenizer(config))
    codes = tokenizer.to_codes(pixels(16)[..., :16])
    assert (codes.shape, tokenizer.to_pixels(codes).shape) == ((2, 2, 2), (2, 3, 16, 16))
    assert (tokenizer.downsample, tokenizer.family) == (8, "VQ-8-P")
    assert build_tokenizer(tokenizer.identity).network == tokenizer.network
    with pytest.raises(ValueError, match=r"images are 16 high and 12 wide; both must be multiples of 8"):
        tokenizer.to_codes(pixels(16)[..., :12])
    with pytest.raises(ValueError, match=r"VQ-8-P has no dropout"):
        build_tokenizer(config, dropout_p=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokenizer_goes_to_the_hub_and_back(name, tmp_path):
    tokenizer = randomize(build(name))
    model = for_hub(tokenizer)
    model.save_pretrained(tmp_path / "m")
    made = "VQModelHF" if tokenizer.name == "vqgan" else f'hub_class("{tokenizer.name}")'
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"tokenizer = {made}.from_pretrained" in card and "license" not in card
    for back in (type(model).from_pretrained(tmp_path / "m"), load_tokenizer(tmp_path / "m")):
        assert back.identity == tokenizer.identity and back.fingerprint() == tokenizer.fingerprint()


def test_restarted_codes_are_latents_of_the_batch_and_used_ones_stay():
    tokenizer = build("vq with restarts")
    quantiser = tokenizer.quantize.train()
    torch.manual_seed(1)
    latents = torch.nn.functional.normalize(torch.randn(2, 8, 4, 4), dim=1)
    _, _, codes = quantiser(latents)
    begun = quantiser.embedding.weight.detach().clone()
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 8)
    assert (begun[:, None] - rows).abs().amax(-1).amin(-1).max() < 1e-6, "every code begins at a latent"
    quantiser(latents)
    assert torch.equal(quantiser.embedding.weight, begun), "a code that has just begun has time to come into use"
    used = torch.zeros(quantiser.codebook_size, dtype=torch.bool)
    used[codes.flatten()] = True
    assert torch.equal(quantiser.steps_unused, torch.where(used, 0, 2))
    before = tokenizer.fingerprint()
    quantiser.steps_unused.masked_fill_(~used, 100)
    assert tokenizer.fingerprint() == before, "ages decide no code"
    quantiser(torch.randn(2, 8, 4, 4))
    changed = (quantiser.embedding.weight != begun).any(-1)
    assert torch.equal(changed, ~used) and changed.any()
