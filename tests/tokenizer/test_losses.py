"""The tokenizer's losses against the recorded runs and by hand; LPIPS' weight files."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import assert_close, golden_state, load_golden
from tokenizer.base import CodebookLosses
from tokenizer.tokenizer_image import lpips as lpips_module
from tokenizer.tokenizer_image.discriminators import Blur, PatchGANDiscriminator, StyleGANDiscriminator
from tokenizer.tokenizer_image.lpips import LPIPS, VGG_FILE
from tokenizer.tokenizer_image.vq_loss import VQLoss

pytestmark = pytest.mark.usefixtures("two_threads")

# What the recorded runs left at its own initial value.
KEPT = ("scaling_layer", "running_", "num_batches_tracked", "downsample.0.f")
GAIN = 1.4


@pytest.fixture(scope="module")
def recorded() -> tuple[dict, dict]:
    arrays, meta = load_golden("tokenizer_losses")
    return {name: torch.as_tensor(array) for name, array in arrays.items()}, meta


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS(pretrained=False)


def codebook(vq: float = 0.0, commit: float = 0.0, entropy: float = 0.0) -> CodebookLosses:
    parts = {"vq": vq, "commit": commit, "entropy": entropy}
    return CodebookLosses({name: torch.tensor(value) for name, value in parts.items()}, torch.tensor(0.7))


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.slow
@torch.no_grad()
def test_lpips(recorded, lpips):
    arrays, meta = recorded
    assert shapes(lpips) == meta["lpips/state_dict"]
    lpips.load_state_dict(golden_state(shapes(lpips), meta["seed"], GAIN, KEPT), strict=False)
    distance = lpips(arrays["image"], arrays["recon"])
    assert distance.shape == (2, 1, 1, 1)
    assert_close(distance, arrays["lpips"])


@pytest.fixture(scope="module", params=["patchgan", "stylegan"])
def recorded_weights(request, recorded, lpips) -> tuple[str, dict[str, torch.Tensor]]:
    """A discriminator's name, and the weights of the whole loss: the recordings name them from its root."""
    loss = VQLoss(0, disc_type=request.param, image_size=64, lpips=lpips)
    assert shapes(loss.discriminator) == recorded[1][f"{request.param}/state_dict"]
    return request.param, golden_state(shapes(loss), recorded[1]["seed"], GAIN, KEPT)


@pytest.mark.slow
def test_recorded_losses(recorded, recorded_weights, lpips):
    arrays, (disc_type, weights) = recorded[0], recorded_weights
    for disc_loss in ("hinge", "vanilla"):
        loss = VQLoss(0, disc_loss, disc_type=disc_type, image_size=64, disc_weight=0.5, lpips=lpips)
        loss.load_state_dict(weights, strict=False)
        with torch.no_grad():
            discriminator, logs = loss.discriminator_loss(arrays["image"], arrays["recon"], step=0)
        assert_close(discriminator, arrays[f"{disc_type}/{disc_loss}/discriminator_loss"])
        assert_close(logs["logits_real"], arrays[f"{disc_type}/logits_real"].mean())
    # The generator's side of the recordings is the hinge loss in both.
    recon = arrays["recon"].clone().requires_grad_()
    generator, _ = loss.generator_loss(codebook(0.1, 0.02, 0.003), arrays["image"], recon, step=0)
    generator.backward()
    assert_close(generator, arrays[f"{disc_type}/hinge/generator_loss"])
    assert_close(recon.grad, arrays[f"{disc_type}/hinge/grad_recon"])


class Brightness(nn.Module):
    """A discriminator whose logits are known: each image's mean times a parameter."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.factor * x.mean(dim=(1, 2, 3))[:, None]


def by_hand(**kwargs) -> VQLoss:
    loss = VQLoss(**{"disc_start": 10, "perceptual_weight": 0.0, "disc_dim": 8, **kwargs})
    loss.discriminator = Brightness()
    return loss


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits 0.5 and -0.25 for the real ones, 0.75 and -2 for the reconstructions."""
    real = torch.tensor([0.5, -0.25]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    fake = torch.tensor([0.75, -2.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4).clone().requires_grad_()
    return real, fake


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize("disc_loss", ["hinge", "vanilla", "non-saturating"])
@pytest.mark.parametrize("gen_adv_loss", ["hinge", "non-saturating"])
def test_adversarial_losses_by_hand(disc_loss, gen_adv_loss):
    loss = by_hand(disc_loss=disc_loss, gen_adv_loss=gen_adv_loss, disc_weight=0.3, reconstruction_weight=0.0)
    real, fake = pictures()
    discriminator, logs = loss.discriminator_loss(real, fake, step=10)
    if disc_loss == "hinge":
        expected = ((1 - 0.5) + (1 + 0.25)) / 2 + ((1 + 0.75) + 0) / 2
    else:
        expected = (softplus(-0.5) + softplus(0.25)) / 2 + (softplus(0.75) + softplus(-2)) / 2
    assert_close(discriminator, 0.3 * 0.5 * expected)
    assert_close(logs["logits_real"], 0.125)
    assert_close(logs["logits_fake"], -0.625)

    generator, logs = loss.generator_loss(codebook(), real, fake, step=10)
    expected = 0.625 if gen_adv_loss == "hinge" else (softplus(-0.75) + softplus(2)) / 2
    assert_close(generator, 0.3 * expected)
    assert_close(logs["adversarial_loss"], expected)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_weights_of_the_parts(kind):
    class Twice(nn.Module):
        def forward(self, x, y):
            return (2 * (y - x).mean(dim=(1, 2, 3))).view(-1, 1, 1, 1)

    loss = by_hand(
        reconstruction_loss=kind, reconstruction_weight=3.0, codebook_weight=0.5, perceptual_weight=0.1, lpips=Twice()
    )
    real, fake = pictures()
    total, logs = loss.generator_loss(codebook(0.1, 0.02, 0.003), real, fake, step=0)
    reconstruction = (0.25 + 1.75) / 2 if kind == "l1" else (0.25**2 + 1.75**2) / 2
    perceptual = 2 * (0.25 - 1.75) / 2
    assert_close(total, 3 * reconstruction + 0.1 * perceptual + 0.5 * 0.123)
    assert_close(logs["codebook_usage"], 0.7)
    assert_close(logs["perceptual_loss"], perceptual)
    for value in logs.values():
        assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad


def test_before_disc_start():
    loss = by_hand()
    real, fake = pictures()
    generator, logs = loss.generator_loss(codebook(), real, fake, step=9)
    discriminator, _ = loss.discriminator_loss(real, fake, step=9)
    assert not loss.discriminator_active(9) and loss.discriminator_active(10)
    assert loss.discriminator.calls == 0
    assert_close(generator, F.mse_loss(fake, real))
    assert float(logs["adversarial_weight"]) == 0.0 and discriminator.item() == 0.0
    discriminator.backward()
    assert loss.discriminator.factor.grad is None


def test_gradients_stay_on_their_side():
    loss = by_hand()
    real, fake = pictures()
    loss.generator_loss(codebook(), real, fake, step=10)[0].backward()
    assert fake.grad is not None and loss.discriminator.factor.grad is None
    assert loss.discriminator.factor.requires_grad
    fake.grad = None
    loss.discriminator_loss(real, fake, step=10)[0].backward()
    assert fake.grad is None and loss.discriminator.factor.grad is not None


def test_patchgan_sizes_and_start():
    torch.manual_seed(0)
    discriminator = PatchGANDiscriminator()
    assert discriminator(torch.randn(2, 3, 32, 32)).shape == (2, 1, 2, 2)
    assert discriminator(torch.randn(2, 3, 32, 48)).shape == (2, 1, 2, 4)
    assert_close(discriminator.main[5].weight.std(), 0.02, rtol=0.02)
    assert_close(discriminator.main[3].weight.mean(), 1.0, atol=0.01)
    assert not discriminator.main[3].bias.any()


@pytest.mark.parametrize("size", [8, 64, 1024])
def test_stylegan_sizes(size):
    with torch.device("meta"):
        discriminator = StyleGANDiscriminator(size)
        assert discriminator(torch.empty(2, 3, size, size)).shape == (2, 1)
    assert discriminator.blocks[0].out_channels == {8: 512, 64: 256, 1024: 16}[size]


def test_stylegan_errors():
    for size in (4, 100, 2048):
        with pytest.raises(ValueError, match=rf"\[8, 16, .*1024\], not {size}"):
            StyleGANDiscriminator(size)
    with torch.device("meta"), pytest.raises(ValueError, match="64x64, not 32x64"):
        StyleGANDiscriminator(64)(torch.empty(1, 3, 32, 64))


def test_blur_by_hand():
    picture = torch.zeros(1, 2, 4, 4)
    picture[0, 0, 1, 1] = 16.0
    picture[0, 1] = 5.0
    blurred = Blur()(picture)
    # Row and column 0 are reflected about themselves, so the neighbour inside counts twice.
    assert blurred[0, 0].tolist() == [[4, 4, 2, 0], [4, 4, 2, 0], [2, 2, 1, 0], [0, 0, 0, 0]]
    assert_close(blurred[0, 1], torch.full((4, 4), 5.0))


def test_lpips_is_frozen_and_finite(lpips):
    assert not any(p.requires_grad for p in lpips.parameters())
    assert not any(module.training for module in lpips.train().modules())
    images = torch.randn(1, 3, 16, 24)
    recon = images.clone().requires_grad_()
    distance = lpips(images, recon)
    assert distance.item() == 0.0
    distance.sum().backward()
    assert recon.grad.isfinite().all()


def test_lpips_gradient_where_all_features_are_zero():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    lpips_module._unit(features).sum().backward()
    assert features.grad.isfinite().all()


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """Weight files are looked for in empty folders; the folder that stands for pretrained_models/."""
    monkeypatch.setattr(lpips_module, "PRETRAINED", tmp_path / "pretrained_models")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "pretrained_models").mkdir()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "pretrained_models"


def vgg_file(lpips: LPIPS, path: Path) -> Path:
    """A file in torchvision's names with the weights of `lpips`, and its classifier."""
    weights = {"features." + name.split(".", 1)[1]: value for name, value in lpips.net.state_dict().items()}
    torch.save({**weights, "classifier.0.bias": torch.zeros(4)}, path)
    return path


def test_lpips_reads_both_files(lpips, nowhere):
    vgg_file(lpips, nowhere / VGG_FILE)
    loaded = LPIPS()
    for name, value in lpips.net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], value)
    installed = torch.load(lpips_module.find_weights()[1], map_location="cpu", weights_only=True)
    assert torch.equal(loaded.lin3.model[1].weight, installed["lin3.model.1.weight"])
    assert float(loaded.lin3.model[1].weight.min()) >= 0

    ours = {name: torch.full_like(value, 0.5) for name, value in installed.items()}
    torch.save(ours, nowhere / "vgg.pth")
    assert float(LPIPS().lin0.model[1].weight.mean()) == 0.5


def test_lpips_files_missing(nowhere, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        LPIPS()
    for part in (VGG_FILE, str(nowhere), str(tmp_path / "hub"), "torchvision", "--perceptual-weight 0"):
        assert part in str(error.value)


def test_vgg16_is_downloaded_once_and_compared_with_the_checksum_in_its_name(lpips, nowhere, monkeypatch):
    asked = []

    def download(url, target, what):
        asked.append(url)
        return vgg_file(lpips, target)

    monkeypatch.setattr(lpips_module, "download", download)
    with pytest.raises(ValueError, match="gave another file than"):
        LPIPS()
    assert not (nowhere / VGG_FILE).exists()
    monkeypatch.setattr(lpips_module, "sha256_of", lambda path: "397923af" + 56 * "0")
    LPIPS(), LPIPS()
    assert asked == 2 * ["https://download.pytorch.org/models/vgg16-397923af.pth"]


def test_lpips_files_of_something_else(lpips, nowhere):
    file = nowhere / VGG_FILE
    for content in (b"", b"<html>not found</html>"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{VGG_FILE} is damaged"):
            LPIPS()
    torch.save({"layer.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=rf"{VGG_FILE} is damaged or does not hold"):
        LPIPS()
    vgg_file(lpips, file)
    torch.save({"layer.weight": torch.zeros(2)}, nowhere / "vgg.pth")
    with pytest.raises(ValueError, match=r"vgg\.pth is damaged or does not hold"):
        LPIPS()
