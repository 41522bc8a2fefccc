"""LPIPS, the perceptual distance of the tokenizer's reconstruction loss (arXiv 1801.03924), on VGG16.

    distance = LPIPS()(images, reconstructions)  # (B, 3, H, W) in [-1, 1], twice -> (B, 1, 1, 1)

Needs two files: the VGG16 features (`vgg16-397923af.pth` of torchvision, downloaded where it is missing) and the weights of
their channels (`vgg.pth`, version 0.1, part of the `lpips` package).
"""

import pickle
from collections import OrderedDict
from contextlib import suppress
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import vgg

from utils.download import download, sha256_of

VGG_FILE = "vgg16-397923af.pth"  # with the beginning of its SHA-256
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
LIN_FILE = "vgg.pth"
PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained_models"

CHANNELS = (64, 128, 256, 512, 512)
SLICES = (0, 4, 9, 16, 23, 30)  # where each begins among torchvision's layers, and where the last one ends


def vgg_places() -> list[Path]:
    """Return where torchvision's VGG16 is looked for."""
    return [PRETRAINED / VGG_FILE, Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE]


def require_weights() -> tuple[Path, Path]:
    """Return both files, torchvision's VGG16 downloaded (528 MB) where it is missing.

    Raises as `find_weights`, or ConnectionError or ValueError where the download fails.
    """
    if not any(place.is_file() for place in vgg_places()):
        with suppress(FileNotFoundError):  # offline: find_weights says what is missing
            file = download(VGG_URL, PRETRAINED / VGG_FILE, "torchvision's VGG16")
            if not sha256_of(file).startswith(VGG_FILE[6:14]):
                file.unlink()
                raise ValueError(f"{VGG_URL} gave another file than {VGG_FILE}: put the file at {file} by hand")
    return find_weights()


def find_weights() -> tuple[Path, Path]:
    """Return the files with torchvision's VGG16 and with LPIPS' channel weights: of pretrained_models/, the torch hub, the lpips package.

    Raises FileNotFoundError that lists the places looked at.
    """
    lin_places = [PRETRAINED / LIN_FILE]
    with suppress(metadata.PackageNotFoundError):
        # The package is located, not imported: this file has its name wherever the folder is on the import path.
        lin_places.append(Path(str(metadata.distribution("lpips").locate_file("lpips/weights/v0.1/vgg.pth"))))
    found = []
    for what, places in (
        (f"torchvision's VGG16 ({VGG_URL})", vgg_places()),
        ("LPIPS' channel weights, `pip install lpips`", lin_places),
    ):
        found += [place for place in places if place.is_file()][:1] or [None]
        if found[-1] is None:
            looked = ", ".join(map(str, places))
            raise FileNotFoundError(
                f"{what} not found at {looked}: put the file there, or train without it: --perceptual-weight 0"
            )
    return found[0], found[1]


class ScalingLayer(nn.Module):
    """The step from images in [-1, 1] to the mean and deviation of VGG's training images."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class VGG16Features(nn.Module):
    """VGG16 (arXiv 1409.1556) in five slices that end at relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.

    The layers keep torchvision's numbers, so slice3.10 is its features.10.
    """

    def __init__(self):
        super().__init__()
        layers = vgg.make_layers(vgg.cfgs["D"])
        for i, (start, stop) in enumerate(pairwise(SLICES)):
            self.add_module(
                f"slice{i + 1}", nn.Sequential(OrderedDict((str(n), layers[n]) for n in range(start, stop)))
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for layers in self.children():
            x = layers(x)
            features.append(x)
        return features


class LinLayer(nn.Module):
    """One weight per channel, and the dropout it was trained with (off here; it sets the name of the weight)."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """The perceptual distance, frozen, and always in eval mode; gradients flow to the images.

    With `pretrained=False` the weights are random and no file is read.
    Raises as `require_weights`, and ValueError if a file holds something else.
    """

    def __init__(self, pretrained: bool = True):
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for i, channels in enumerate(CHANNELS):
            self.add_module(f"lin{i}", LinLayer(channels))
        if pretrained:
            self.load_pretrained(*require_weights())
        self.requires_grad_(False)
        self.eval()

    def load_pretrained(self, vgg_path: Path, lpips_path: Path) -> None:
        """Read both files. Raises ValueError that names the file if it is not what it should be."""
        own = list(self.state_dict())
        # net.slice3.10.weight is features.10.weight in torchvision's file; the channel weights have our names.
        vgg_names = {name: "features." + name.split(".", 2)[2] for name in own if name.startswith("net.")}
        lin_names = {name: name for name in own if name.startswith("lin")}
        for path, names in ((vgg_path, vgg_names), (lpips_path, lin_names)):
            try:
                weights = torch.load(path, map_location="cpu", weights_only=True)
                self.load_state_dict({name: weights[theirs] for name, theirs in names.items()}, strict=False)
            except (
                pickle.UnpicklingError,
                EOFError,
                ValueError,
                KeyError,
                IndexError,
                RuntimeError,
                TypeError,
            ) as error:
                raise ValueError(
                    f"{path} is damaged or does not hold the weights that LPIPS expects: {error}"
                ) from error

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in eval mode: the dropout before the channel weights must not run inside a training loss."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of two batches of images (B, 3, H, W) in [-1, 1], H and W at least 16 -> (B, 1, 1, 1) float32."""
        distance = x.new_zeros((x.shape[0], 1, 1, 1), dtype=torch.float32)
        features = zip(self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y)))
        for i, (fx, fy) in enumerate(features):
            difference = (_unit(fx) - _unit(fy)).square()  # (B, C, h, w)
            weighted = self.get_submodule(f"lin{i}")(difference)
            distance = distance + weighted.float().mean(dim=(2, 3), keepdim=True)
        return distance


def _unit(features: Tensor) -> Tensor:
    """Return each position's channels scaled to length one, in float32: half precision has no 1e-10."""
    features = features.float()
    # vector_norm has a zero gradient where all channels are zero; the square root of a sum of squares has none.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
