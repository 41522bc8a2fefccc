"""DINOv2 features of images, whose Fréchet distance (FD-DINOv2) follows human judgement better than Inception's.

extract = DINOv2Features(device="cuda")      # weights from pretrained_models/ or a cache
statistics.update(extract(images))           # uint8 (B, H, W, 3) -> float32 (B, 1024)

Stein et al., 2306.04675: the class token of ViT-L/14 for images of 224 pixels, and evaluations/metrics.py:frechet_distance.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from evaluations.published import on_disk
from utils.checkpoint import load_into, read_checkpoint

MODEL_NAME = "vit_large_patch14_dinov2.lvd142m"
IMAGE_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIRST_RELEASE = "dinov2_vitl14_pretrain.pth"  # as the first release names the file


def find_weights(path: str | Path | None = None) -> Path:
    """Return where the weights lie: `path` where given, else pretrained_models/, else the caches of the hub and of torch.

    Raises FileNotFoundError that says how to get them.
    """
    import huggingface_hub

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    address = f"{endpoint}/timm/{MODEL_NAME}/resolve/main/model.safetensors"
    how = f"fetch {address} and put it at pretrained_models/{MODEL_NAME}.safetensors, or give the path of a file"
    if path is not None:
        found = Path(path).expanduser()
        if not found.exists():
            raise FileNotFoundError(f"no DINOv2 weights at {path}; {how}")
        return found
    names = (f"{MODEL_NAME}.safetensors", f"{MODEL_NAME}.pth", f"{MODEL_NAME}/model.safetensors", FIRST_RELEASE)
    cached = huggingface_hub.try_to_load_from_cache(f"timm/{MODEL_NAME}", "model.safetensors")
    caches = [Path(cached)] if isinstance(cached, str) else []
    caches.append(Path(torch.hub.get_dir()) / "checkpoints" / FIRST_RELEASE)
    for place in (on_disk(*names), *caches):
        if place is not None and place.is_file():
            return place
    raise FileNotFoundError(f"no weights of {MODEL_NAME} in pretrained_models/ or in the caches of hubs; {how}")


class DINOv2Features:
    """The class token of a DINOv2 network after its last normalisation, for images of any size.

    Images are resized to 224x224 by Pillow's antialiased bicubic filter, as bytes, and normalised with ImageNet's mean and
    standard deviation. The table of positions, made for 37x37 patches, is resized to 16x16 as the network's first release
    does (see `resized_positions`), not as timm would, so that features are those of published figures.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        device: torch.device | str = "cpu",
        model_name: str = MODEL_NAME,
    ):
        """path: weights, .safetensors or .pth, of timm or of the first release; None looks for them (`find_weights`).

        Raises FileNotFoundError (no weights), ValueError (they are not those of `model_name`, timm does not know it, or
        it has registers).
        """
        import timm

        if not timm.is_model(model_name):
            raise ValueError(
                f"{model_name} is not a model that timm knows; DINOv2's are {timm.list_models('*dinov2*')}"
            )
        self.path = find_weights(path)
        checkpoint = read_checkpoint(self.path)
        # The mask token is for training.
        state = {name: tensor for name, tensor in checkpoint.model.items() if name != "mask_token"}
        # Only 224 pixels are ever seen, so the table of positions is resized once, here, rather than at every image.
        model = timm.create_model(model_name, pretrained=False, num_classes=0, img_size=IMAGE_SIZE)
        if getattr(model, "num_reg_tokens", 0):
            raise ValueError(f"{model_name} has registers, whose release resizes positions otherwise: not supported")
        if "pos_embed" in state and state["pos_embed"].ndim == 3:
            side = IMAGE_SIZE // model.patch_embed.patch_size[0]
            prefix = model.num_prefix_tokens if model.pos_embed.shape[1] > side * side else 0
            state["pos_embed"] = resized_positions(state["pos_embed"].float(), side, prefix, self.path)
        load_into(model, state, self.path)
        self.model: nn.Module = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.dim: int = model.num_features

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> float32 (B, dim). Raises ValueError for another dtype or shape."""
        return self.model.forward_features(preprocess(images).to(self.device))[:, 0].float().cpu().numpy()


def preprocess(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> normalised float32 (B, 3, 224, 224). Raises ValueError for another dtype or shape."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 (images, height, width, 3)")
    resized = np.empty((len(images), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i, image in enumerate(images):
        picture = Image.fromarray(np.ascontiguousarray(image))
        resized[i] = np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    values = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def resized_positions(table: torch.Tensor, side: int, prefix: int, path: str | Path = "the file") -> torch.Tensor:
    """Return a table of positions for side x side patches: (1, prefix + n², C) -> (1, prefix + side², C).

    Bicubic without antialiasing, at the scale (side + 0.1) / n: DINOv2's first release (2304.07193) adds a tenth of a patch
    against rounding, and its features for 224 pixels include that. Tables that fit stay as they are.
    Raises ValueError, naming `path`, where the patches are no square.
    """
    own = math.isqrt(table.shape[1] - prefix)
    if own * own != table.shape[1] - prefix or own == 0:
        raise ValueError(f"{path}: {table.shape[1]} positions are not {prefix} and those of a square of patches")
    if own == side:
        return table
    patches = table[:, prefix:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / own
    patches = nn.functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([table[:, :prefix], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
