"""DINOv2 features of images, whose Fréchet distance (FD-DINOv2) follows human judgement better than Inception's.

extract = DINOv2Features(device="cuda")      # weights from pretrained_models/ or a cache
statistics.update(extract(images))           # uint8 (B, H, W, 3) -> float32 (B, 1024)

Stein et al., 2306.04675: the class token of ViT-L/14 for images of 224 pixels, and evaluations/metrics.py:frechet_distance.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from evaluations.features import normalised
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

    names = (f"{MODEL_NAME}.safetensors", f"{MODEL_NAME}.pth", f"{MODEL_NAME}/model.safetensors", FIRST_RELEASE)
    cached = huggingface_hub.try_to_load_from_cache(f"timm/{MODEL_NAME}", "model.safetensors")
    cached = cached if isinstance(cached, str) else ""
    places = [on_disk(*names), Path(cached), Path(torch.hub.get_dir()) / "checkpoints" / FIRST_RELEASE]
    for place in [Path(path).expanduser()] if path is not None else places:
        if place is not None and place.is_file():
            return place
    raise FileNotFoundError(
        f"no DINOv2 weights at {path or 'pretrained_models/ or in the caches of hubs'}: hf download timm/{MODEL_NAME} "
        f"model.safetensors, and put it at pretrained_models/{MODEL_NAME}.safetensors, or give its path"
    )


class DINOv2Features:
    """The class token of a DINOv2 network after its last normalisation, for images of any size.

    Images are resized to 224x224 by Pillow's antialiased bicubic filter, as bytes, and normalised with ImageNet's mean and
    standard deviation. The table of positions, made for 37x37 patches, is resized to 16x16 as the network's first release
    does (see `resized_positions`), not as timm would, so that features are those of published figures.
    """

    def __init__(
        self, path: str | Path | None = None, device: torch.device | str = "cpu", model_name: str = MODEL_NAME
    ):
        """Read weights. path: a .safetensors or .pth of timm or of the first release; None looks for one (`find_weights`).

        Raises FileNotFoundError (no weights), ValueError (they are not those of `model_name`).
        """
        import timm

        self.path = find_weights(path)
        checkpoint = read_checkpoint(self.path)
        # The mask token is for training.
        state = {name: tensor for name, tensor in checkpoint.model.items() if name != "mask_token"}
        # Only 224 pixels are ever seen, so the table of positions is resized once, here, rather than at every image.
        model = timm.create_model(model_name, pretrained=False, num_classes=0, img_size=IMAGE_SIZE)
        if "pos_embed" in state:
            side = IMAGE_SIZE // model.patch_embed.patch_size[0]
            state["pos_embed"] = resized_positions(state["pos_embed"].float(), side)
        load_into(model, state, self.path)
        self.model: nn.Module = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self.dim: int = model.num_features

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return features of a batch: uint8 (B, H, W, 3) -> float32 (B, dim)."""
        pixels = normalised(images, IMAGE_SIZE, MEAN, STD).to(self.device)
        return self.model.forward_features(pixels)[:, 0].float().cpu().numpy()


def resized_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """Return a table of positions, the class token's first, for side x side patches: (1, 1 + n², C) -> (1, 1 + side², C).

    Bicubic without antialiasing, at the scale (side + 0.1) / n: DINOv2's first release (2304.07193) adds a tenth of a patch
    against rounding, and its features for 224 pixels include that. Tables that fit stay as they are.
    """
    own = math.isqrt(table.shape[1] - 1)
    if own == side:
        return table
    patches = table[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / own
    patches = nn.functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
