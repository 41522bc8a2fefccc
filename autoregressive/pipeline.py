"""Tokenizer, GPT and sampling in one object: labels in, pictures out. Scripts, the demo and the server call this.

    pipeline = ImagePipeline.from_pretrained("FoundationVision/LlamaGen", gpt="c2i_L_384.pt")
    images = pipeline([207, 360], cfg_scale=4.0, top_k=2000, seed=0)          # PIL images

Image i of a run is a function of (seed, i): its noise is its own, and micro-batches are padded so that every row is
computed by the same kernels whatever the batch or, on a CPU, the number of threads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoregressive.models.generate import check_labels, generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.sampling import SamplingConfig
from autoregressive.models.sizes import GPT_SIZES
from tokenizer.tokenizer_image.load import load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel, independent_of_threads
from utils.checkpoint import load_into, read_checkpoint
from utils.distributed import pick_device
from utils.images import to_uint8
from utils.recognition import check_gpt_flags, describe_gpt, image_size_in_name
from utils.rng import image_noise
from utils.runs import find_checkpoint

PRECISIONS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# How a CPU rounds depends on the number of rows of a matrix product (few take other kernels) and on the number of
# images of a convolution. These numbers are the same for every image, whatever the batch.
ROW_MULTIPLE = 8
IMAGES_AT_ONCE = 2


def load_gpt(
    path: str | Path,
    *,
    image_size: int | None = None,
    downsample_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    use_ema: bool = False,
    **flags,
) -> Transformer:
    """Builds the model that a checkpoint's weights describe, in eval mode.

    image_size, downsample_size: pixels a side of the image and of a token; where not given, what the file records or
    its name tells. flags: what the caller believes the file holds (gpt_model, num_classes, …; None for no belief).
    Raises ValueError where the weights disagree with these, or are not a GPT's; FileNotFoundError.
    """
    checkpoint = read_checkpoint(path, prefer_ema=use_ema)
    recorded = checkpoint.args or {}
    found = describe_gpt(checkpoint.model, GPT_SIZES, path)
    check_gpt_flags(
        found, path, recorded, sizes=GPT_SIZES, image_size=image_size, downsample_size=downsample_size, **flags
    )
    if found.gpt_model is None:
        sizes = ", ".join(f"{name} ({layers} layers, dim {dim})" for name, (layers, _, dim) in GPT_SIZES.items())
        raise ValueError(f"{path} holds {found}, a size that is in no table; known are {sizes}")
    image_size = image_size or recorded.get("image_size") or image_size_in_name(Path(path).name)
    if image_size is None:
        raise ValueError(f"{path} does not say for which image size it was trained: give --image-size")
    downsample_size = downsample_size or recorded.get("downsample_size") or 16
    if image_size % downsample_size:
        raise ValueError(f"--image-size {image_size} is not a multiple of --downsample-size {downsample_size}")
    args = ModelArgs(
        dim=found.dim,
        n_layer=found.n_layer,
        n_head=found.n_head,
        n_kv_head=found.n_kv_head,
        multiple_of=found.ffn_hidden,  # the hidden width itself, whatever rule it came from
        ffn_dim_multiplier=found.ffn_hidden / int(8 * found.dim / 3),
        vocab_size=found.vocab_size,
        block_size=(image_size // downsample_size) ** 2,
        num_classes=found.num_classes or 0,
        caption_dim=found.caption_dim or 2048,
        cls_token_num=found.cls_token_num,
        model_type=found.gpt_type,
        spe_token_num=found.spe_token_num,
        ar_token_num=found.ar_token_num,
    )
    with torch.device("meta"):
        model = Transformer(args)
    load_into(model, checkpoint.model, path, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


class ImagePipeline:
    """A GPT and the tokenizer whose codes it speaks.

    batch_size: images computed at once (32 on an accelerator, 8 on a CPU).
    Raises ValueError where the two do not fit together, or for a batch size below 1.
    """

    def __init__(self, gpt: Transformer, tokenizer: VQModel, *, batch_size: int | None = None, compile: bool = False):
        if gpt.args.vocab_size > tokenizer.config.codebook_size:
            raise ValueError(
                f"the GPT has {gpt.args.vocab_size} codes and the tokenizer {tokenizer.config.codebook_size}: "
                "they were not trained together"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it is at least 1")
        self.gpt, self.tokenizer = gpt, tokenizer
        self.device = gpt.tok_embeddings.weight.device
        self.batch_size = batch_size or (8 if self.device.type == "cpu" else 32)
        self.compile = compile and self.device.type == "cuda"

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        gpt: str | Path | None = None,
        vq: str | Path | None = None,
        *,
        image_size: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        use_ema: bool = False,
        batch_size: int | None = None,
        compile: bool = False,
    ) -> "ImagePipeline":
        """Loads both models.

        name: a hub repository ("FoundationVision/LlamaGen") or a local folder in which `gpt` and `vq` stand; or, with
        `gpt` left out, the GPT's file itself. gpt, vq: file names, paths, or run folders (their newest checkpoint).
        `vq` defaults to the released tokenizer of the GPT's kind.
        dtype: of the GPT's weights (bfloat16 on an accelerator, float32 on a CPU).
        Raises FileNotFoundError, ConnectionError, and ValueError where the two models do not fit together.
        """
        folder, repo_id = Path(name).expanduser(), str(name)
        if gpt is None:
            gpt, repo_id = folder.absolute() if folder.exists() else folder, None
            folder = folder.absolute().parent
        elif not folder.is_dir() and str(name).count("/") != 1:
            raise FileNotFoundError(f"{name} is neither a folder nor a hub repository (owner/name)")

        def find(file: str | Path) -> Path:
            if (folder / file).exists():
                return find_checkpoint(folder / file)
            if Path(file).exists() or folder.is_dir():
                return find_checkpoint(file)
            return find_checkpoint(file, repo_id=repo_id)

        device = pick_device(str(device) if device else None)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        gpt_path = find(gpt)
        if vq is None:
            found = describe_gpt(read_checkpoint(gpt_path).model, GPT_SIZES, gpt_path)
            vq = "vq_ds16_c2i.pt" if found.gpt_type == "c2i" else "vq_ds16_t2i.pt"
            vq_path = find(vq) if (folder / vq).exists() else find_checkpoint(vq)
        else:
            vq_path = find(vq)
        tokenizer = load_tokenizer(vq_path, device=device, use_ema=use_ema)
        model = load_gpt(
            gpt_path,
            image_size=image_size,
            downsample_size=tokenizer.downsample,
            device=device,
            dtype=dtype,
            use_ema=use_ema,
        )
        return cls(model, tokenizer, batch_size=batch_size, compile=compile)

    @property
    def image_size(self) -> int:
        """Pixels a side of the images."""
        return self.gpt.layout.grid_size * self.tokenizer.downsample

    def __call__(
        self,
        labels: Sequence[int] | Tensor,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        progress: bool = True,
        size: int | None = None,
        **sampling,
    ) -> list[Image.Image]:
        """Draws an image for each label.

        labels: classes, 0 … num_classes - 1. seed: of the run. indices: each image's number in the run (0, 1, … by
        default); an image is a function of (seed, number, label). size: pixels a side, where other than the model's.
        sampling: the fields of SamplingConfig (cfg_scale, cfg_interval, temperature, top_k, top_p, sample_logits).
        Raises ValueError for a label or a setting out of range.
        """
        arrays = [
            batch
            for _, batch in self.batches(labels, seed=seed, indices=indices, progress=progress, size=size, **sampling)
        ]
        return [Image.fromarray(image) for batch in arrays for image in batch]

    def batches(
        self,
        labels: Sequence[int] | Tensor,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        progress: bool = False,
        size: int | None = None,
        **sampling,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """As calling the pipeline, but one micro-batch at a time: the images' numbers, and uint8 (n, size, size, 3)."""
        labels = torch.as_tensor(labels)
        if not (labels.numel() and labels.is_floating_point()):  # torch takes an empty list for floats
            labels = labels.long()
        check_labels(self.gpt, labels)
        indices = list(range(len(labels))) if indices is None else list(indices)
        if len(indices) != len(labels):
            raise ValueError(f"{len(labels)} labels for {len(indices)} image numbers")
        SamplingConfig(**sampling)
        total = len(labels) * self.gpt.layout.tokens
        with tqdm(total=total, unit="tok", disable=not progress, desc=f"{len(labels)} images") as bar:
            for start in range(0, len(labels), self.batch_size):
                part = slice(start, start + self.batch_size)
                done = 0
                count = len(labels[part])

                def advance(tokens: int, count: int = count) -> None:
                    nonlocal done
                    bar.update((tokens - done) * count)
                    done = tokens

                codes = self.generate_codes(labels[part], seed=seed, indices=indices[part], on_step=advance, **sampling)
                yield indices[part], self.decode(codes, size)

    def generate_codes(
        self,
        cond: Tensor,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        on_step: Callable[[int], None] | None = None,
        **sampling,
    ) -> Tensor:
        """One micro-batch of codes, int64 (B, N) in raster order. cond: labels (B,). indices: the images' numbers."""
        indices = range(len(cond)) if indices is None else indices
        tokens = self.gpt.layout.tokens
        noise = image_noise(seed, indices, tokens)
        padding = self._padding(len(cond))
        if padding:
            cond = torch.cat([cond, cond[-1:].expand(padding, *cond.shape[1:])])
            noise = torch.cat([noise, noise.new_zeros(padding, tokens)])
        codes = generate(self.gpt, cond, tokens, noise=noise, compile=self.compile, on_step=on_step, **sampling)
        return codes[: len(indices)]

    @torch.inference_mode()
    def decode(self, codes: Tensor, size: int | None = None) -> np.ndarray:
        """Codes (B, N) in raster order to uint8 (B, size, size, 3), by bicubic resizing where size is another one."""
        side = isqrt(codes.shape[1])
        at_once = IMAGES_AT_ONCE if self.device.type == "cpu" else self.batch_size
        shape = (at_once, self.tokenizer.config.codebook_embed_dim, side, side)
        arrays = []
        for part in codes.to(self.device).split(at_once):
            filled = torch.cat([part, part[-1:].expand(at_once - len(part), -1)])
            with independent_of_threads(self.tokenizer) if self.device.type == "cpu" else nullcontext():
                images = self.tokenizer.decode_code(filled, shape)
            if size is not None and size != images.shape[-1]:
                images = torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic")
            arrays.append(to_uint8(images)[: len(part)])
        return np.concatenate(arrays)

    def _padding(self, count: int) -> int:
        """Rows to add: to a whole micro-batch on an accelerator, whose kernels depend on every size; else to a multiple."""
        if self.device.type != "cpu":
            return max(self.batch_size - count, 0)
        return -count % ROW_MULTIPLE
