"""Tokenizer, GPT and sampling in one object: labels or prompts in, pictures out. Scripts, the demo and the server call this.

    pipeline = ImagePipeline.from_pretrained("FoundationVision/LlamaGen", gpt="c2i_L_384.pt")
    images = pipeline([207, 360], cfg_scale=4.0, top_k=2000, seed=0)          # PIL images

    pipeline = ImagePipeline.from_pretrained("peizesun/llamagen_t2i", gpt="t2i_XL_stage2_512.pt")
    images = pipeline(["a red lantern"], cfg_scale=7.5, top_k=1000, seed=0)

Image i of a run is a function of (seed, i) and what it is asked for: its noise is its own, prompts are encoded one at a
time, and micro-batches are padded so that every row is computed by the same kernels: on a CPU whatever the batch and the
number of threads, on an accelerator for one batch size.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import groupby
from math import isqrt
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from autoregressive.models.build import build_model
from autoregressive.models.compiled import can_compile
from autoregressive.models.conditions import Condition, ControlImage
from autoregressive.models.drafts import check_draft_model
from autoregressive.models.generate import generate, image_order, known_first
from autoregressive.models.layouts import Layout
from autoregressive.models.on_cpu import missing_rows
from autoregressive.models.plans import check_window
from autoregressive.models.sampling import NotFiniteLogits, SamplingConfig
from autoregressive.models.trunk import ModelArgs, Trunk
from autoregressive.released import find_identity, gpt_identity, released_tokenizer
from autoregressive.request import Request
from tokenizer.base import IMAGES_AT_ONCE, Tokenizer
from tokenizer.load import find_tokenizer, load_tokenizer
from utils.checkpoint import load_into, read_checkpoint
from utils.distributed import pick_device
from utils.errors import beginning, is_out_of_memory, require_whole
from utils.hub import is_released
from utils.images import open_picture, require_eight_bits, to_uint8
from utils.origin import same_tokenizer
from utils.overlap import one_behind
from utils.rng import image_noise, order_seed
from utils.runs import find_checkpoint

PRECISIONS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# An accelerator is full with so many, and feature maps of more take memory that drawing needs.
MOST_DECODED_AT_ONCE = 32


def load_gpt(
    path: str | Path,
    *,
    image_size: int | None = None,
    downsample_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    use_ema: bool = False,
    **flags,
) -> Trunk:
    """Build the model that a file's config describes, or its weights where it is a published one, in eval mode.

    image_size, downsample_size: pixels a side of the image and of a token; where not given, what the file records or
    its name tells. flags: what the caller believes the file holds (gpt_model, num_classes, …; None for no belief).
    Raises ValueError where the weights disagree with these, are not a GPT's, or not averaged although `use_ema` asks for
    that; FileNotFoundError.
    """
    checkpoint = read_checkpoint(path, prefer_ema=use_ema)
    if use_ema:
        checkpoint.require_averages()
    identity = gpt_identity(checkpoint, image_size=image_size, downsample_size=downsample_size, **flags)
    with torch.device("meta"):
        model = build_model(ModelArgs.from_identity(identity))
    weights = checkpoint.model
    if "control" in model.conditions:
        weights = import_module("autoregressive.systems").named_as(model.state_dict(), weights)
    load_into(model, model.resized(weights), path, assign=True)
    model.file_config = checkpoint.config
    # The model alone holds the weights now: each tensor that is cast or moved gives the memory of the old one back, and what
    # else the file has (an optimizer, averaged weights) goes at once.
    del checkpoint, weights
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def tokenizer_of(gpt: str | Path) -> Path:
    """Find the tokenizer whose codes a GPT speaks: the recorded one near the GPT's file, the released one of a released GPT.

    Raises FileNotFoundError where the recorded one is not near, ValueError for another file that does not record it.
    """
    path = find_checkpoint(gpt)
    checkpoint = read_checkpoint(path)
    if fingerprint := checkpoint.config.get("tokenizer"):
        return find_tokenizer(path, fingerprint, (checkpoint.args or {}).get("code_path"))
    if is_released(gpt):
        return find_checkpoint(released_tokenizer(find_identity(checkpoint)))
    name = released_tokenizer(find_identity(checkpoint))
    raise ValueError(f"--vq-ckpt is needed: {path} does not record its tokenizer; that of released models is {name}")


def load_tokenizer_of(gpt: Path, vq: Path, use_ema: bool, **more: Any) -> Tokenizer:
    """Load the tokenizer of a GPT's file, with `use_ema` its averaged weights where it has some. more: for load_tokenizer."""
    averaged = use_ema and read_checkpoint(vq).ema is not None
    fingerprint = read_checkpoint(gpt).config.get("tokenizer")
    return load_tokenizer(vq, use_ema=averaged or None, fingerprint=fingerprint, **more)


Features = Tensor | np.ndarray | str | Path
"""A caption's features (length, caption_dim) or (1, length, caption_dim), or the .npy file that has them."""

Picture = Image.Image | str | Path | Tensor
"""A picture, its file, or uint8 pixels (3, H, W) of the model's size."""

OnStep = Callable[[int, Tensor], None]
"""Called after each pass with the number of tokens done and the tokens (B, N) in the layout's order; later ones are drafts."""


class ImagePipeline:
    """A GPT and the tokenizer whose codes it speaks; with a text-conditional GPT also the encoder of its prompts.

    batch_size: images computed at once (32 on an accelerator, 8 on a CPU).
    window: tokens of a decode pass as `generate` takes them; "auto" on a CPU, where images are the same for any window, else 0.
    draft_gpt: a smaller GPT of the same codes that draws the drafts of windows.
    text_encoder: encodes prompts (text.py:TextEncoder). Where not given, the first prompt loads the T5 that `t5_path` and `t5_model_type` name
    (language/t5.py:find_t5) on `t5_device` in `t5_dtype`, by default the GPT's.
    t5_tokens: the text tokens of a prompt that are read (as many as the model has condition rows, or fewer).
    left_padding: features stand at the end of the condition rows, as in training; otherwise at their start.
    Raises ValueError where GPT, tokenizer and encoder do not fit together, for a batch size below 1, or a window that the layout
    cannot have.
    """

    def __init__(
        self,
        gpt: Trunk,
        tokenizer: Tokenizer,
        *,
        batch_size: int | None = None,
        compile: bool = False,
        window: int | str | None = None,
        draft_gpt: Trunk | None = None,
        text_encoder: Any = None,
        t5_path: str | Path | None = None,
        t5_model_type: str = "flan-t5-xl",
        t5_device: str | torch.device | None = None,
        t5_dtype: torch.dtype | None = None,
        t5_tokens: int | None = None,
        left_padding: bool = True,
    ):
        if gpt.args.vocab_size > tokenizer.codebook_size:
            raise ValueError(
                f"the GPT has {gpt.args.vocab_size} codes and the tokenizer {tokenizer.codebook_size}: "
                "they were not trained together"
            )
        recorded = gpt.file_config.get("tokenizer")
        if recorded and not same_tokenizer(recorded, found := tokenizer.fingerprint()):
            raise ValueError(
                f"the GPT speaks the codes of the tokenizer {recorded}, and the tokenizer given is {found}: give the one "
                "that made the codes it was trained on"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it is at least 1")
        if draft_gpt is not None:
            check_draft_model(draft_gpt, gpt)
        self.gpt, self.tokenizer, self.draft_gpt = gpt, tokenizer, draft_gpt
        self.device = gpt.tok_embeddings.weight.device
        self.batch_size = batch_size or (8 if self.device.type == "cpu" else 32)
        self.compile = compile and can_compile(self.device)
        self.window = ("auto" if self.device.type == "cpu" else 0) if window is None else window
        check_window(self.window, gpt.layout)
        self.text_encoder = text_encoder
        self.t5_path, self.t5_model_type = t5_path, t5_model_type
        self.t5_device = pick_device(str(t5_device)) if t5_device else self.device
        if str(t5_device) == self.device.type:
            self.t5_device = self.device  # of several GPUs the one that this process works on
        self.t5_dtype = t5_dtype or gpt.tok_embeddings.weight.dtype
        self.t5_tokens = t5_tokens or gpt.args.cls_token_num
        self.left_padding = left_padding
        self.text = next((condition for condition in gpt.conditions.values() if condition.text_dim), None)
        if self.text and not 0 < self.t5_tokens <= gpt.args.cls_token_num:
            raise ValueError(f"{self.t5_tokens} text tokens for a GPT with {gpt.args.cls_token_num} condition rows")

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
        decode_precision: str = "none",
        beliefs: Mapping[str, Any] = MappingProxyType({}),
        **text,
    ) -> "ImagePipeline":
        """Loads both models.

        name: a hub repository ("FoundationVision/LlamaGen") or a local folder in which `gpt` and `vq` stand; with both left
            out, one that push_to_hub or save_pretrained wrote; with `gpt` left out, the GPT's file itself.
        gpt, vq: file names, paths, or run folders (their newest checkpoint).
            `vq` defaults to the tokenizer that the GPT's file records, found near it, else to the released one of its kind.
        dtype: of the GPT's weights (bfloat16 on an accelerator, float32 on a CPU).
        use_ema: take the GPT's averaged weights, and the tokenizer's where its file has some.
        decode_precision: none, or bf16 for pixels sooner that are not quite the same (Tokenizer.decode_in_bfloat16).
        beliefs: what the caller believes the files hold, as load_gpt and load_tokenizer compare it.
        text: how prompts are encoded, as the constructor takes it (text_encoder, t5_path, t5_device, t5_dtype, …). Where no
            encoder is named, the T5 that the GPT's file records is looked for near it.
        Raises FileNotFoundError, ConnectionError, and ValueError where the two models do not fit together.
        """
        if gpt is vq is None and (saved := import_module("autoregressive.folder").find_folder(name)):
            name, gpt, vq = saved, "gpt", "tokenizer"
            given = {name: value for name, value in text.items() if value is not None}
            text = {**import_module("autoregressive.folder").text_settings(saved), **given}
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
        checkpoint = read_checkpoint(gpt_path)
        if vq is not None:
            vq_path = find(vq)
        elif checkpoint.config.get("tokenizer"):
            vq_path = tokenizer_of(gpt_path)
        else:
            vq = released_tokenizer(find_identity(checkpoint))
            vq_path = find(vq) if (folder / vq).exists() else find_checkpoint(vq)
        of_tokenizer = ("vq_model", "codebook_embed_dim", "quantizer")
        known = {name: beliefs.get(name) for name in ("codebook_size", *of_tokenizer)}
        tokenizer = load_tokenizer_of(
            gpt_path, vq_path, use_ema, device=device, decode_precision=decode_precision, **known
        )
        of_gpt = {name: value for name, value in beliefs.items() if name not in of_tokenizer}
        model = load_gpt(
            gpt_path,
            image_size=image_size,
            device=device,
            dtype=dtype,
            use_ema=use_ema,
            **{"downsample_size": tokenizer.downsample, **of_gpt},
        )
        if model.file_config.get("text_encoder"):
            text = import_module("autoregressive.text").with_encoder(gpt_path, text)
        text = {name: value for name, value in text.items() if value is not None}
        return cls(model, tokenizer, batch_size=batch_size, compile=compile, **text)

    @property
    def image_size(self) -> int:
        """Pixels a side of the images."""
        return self.gpt.layout.grid_size * self.tokenizer.downsample

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> None:
        """Write both models, and for text the T5 or its name, to a folder that from_pretrained takes (folder.py:save)."""
        import_module("autoregressive.saving").save(self, folder, license=license)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, license: str | None = None) -> str:
        """Write what save_pretrained does to a repository of the hub. Returns the commit's address."""
        return import_module("autoregressive.saving").push(self, repo_id, private=private, license=license)

    def __call__(
        self,
        asked: Sequence[int] | Tensor | Sequence[str] | None = None,
        *,
        progress: bool = True,
        size: int | None = None,
        output_type: str = "pil",
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        guidance_scale: float | None = None,
        **settings,
    ) -> list[Image.Image] | np.ndarray | Tensor:
        """Draw an image for each label, or for each prompt. Other arguments as `requests` and `batches` take them.

        output_type: pil, or for values in [0, 1] as float32 np (B, H, W, 3) or pt (B, 3, H, W).
        num_images_per_prompt: images in a row of each label or prompt.
        generator: gives the seed, its next number, in place of `seed`.
        guidance_scale: another name of cfg_scale.
        Raises ValueError for two names of one setting, and as `requests` and `batches` do.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}: give 'pil', 'np' or 'pt'")
        if guidance_scale is not None:
            if settings.get("cfg_scale") is not None:
                raise ValueError("guidance_scale and cfg_scale are two names of one setting: give one of them")
            settings["cfg_scale"] = guidance_scale
        if generator is not None:
            if settings.get("seed") is not None:
                raise ValueError("seed and generator are both given: give one of them")
            if not isinstance(generator, torch.Generator):
                raise ValueError(f"generator is a {type(generator).__name__}: give one torch.Generator, or seed")
            settings["seed"] = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        if num_images_per_prompt != 1:
            asked, settings = repeated(asked, settings, num_images_per_prompt)
        drawn = self.batches(self.requests(asked, **settings), progress=progress, size=size)
        images = [image for _, batch in drawn for image in batch]
        if output_type == "pil":
            return [Image.fromarray(image) for image in images]
        array = np.stack(images).astype(np.float32) / 255
        return array if output_type == "np" else torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()

    def rectangles(
        self,
        asked: Sequence[int] | Tensor | Sequence[str] | None = None,
        *,
        height: int,
        width: int,
        control_images: Picture | Sequence[Picture],
        control_type: str | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Draw images of sides of their own, in pixels, by a model of several resolutions (ControlAR's `_MR` files).

        It was trained to read its tokens by their number, whatever the sides: its control tells where they are.
        Other arguments as `requests` takes them. Raises ValueError for other models and for sides that do not fit.
        """
        pictures = {"control_images": control_images, "control_type": control_type}
        requests = [self.rectangle(each, height, width) for each in self.requests(asked, **pictures, **settings)]
        drawn = self.batches(requests, sides=(height, width))
        return [Image.fromarray(image) for _, batch in drawn for image in batch]

    def rectangle(self, request: Request, height: int, width: int) -> Request:
        """Return a request with its control image read for an image of these sides; `batches` draws it. Raises as `rectangles`."""
        if not (self.gpt.args.rope_grid and "control" in self.gpt.conditions):
            raise ValueError("height and width are for ControlAR's models of several resolutions: leave them out")
        control = self.gpt.conditions["control"].read_rectangle(request.conditions["control"], height, width)
        return replace(request, conditions={**request.conditions, "control": control})

    def requests(
        self,
        asked: Sequence[int] | Tensor | Sequence[str] | None = None,
        *,
        features: Sequence[Features] | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        known: Tensor | None = None,
        orders: Tensor | None = None,
        particles: int = 1,
        negative_classes: int | Sequence[int | None] | None = None,
        negative_prompts: str | Sequence[str | None] | None = None,
        negative_features: Features | Sequence[Features | None] | None = None,
        extra_conditions: Mapping[str, Sequence] | None = None,
        control_images: Picture | Sequence[Picture] | None = None,
        control_type: str | None = None,
        **sampling,
    ) -> list[Request]:
        """Return a request for each label or prompt.

        Args:
            asked: classes, 0 … num_classes - 1; of a text-conditional model prompts.
            features: in place of prompts what encode() gives, or the .npy files that feature extraction wrote.
            seed: of the run.
            indices: each image's number in the run (0, 1, … by default).
            known: int64 (images, N) in raster order, tokens that are given, -1 for those to draw.
            orders: int64 (images, N), the raster index at each sequence position, of models that draw in several orders.
            particles: drawn for each image where tokens are known, see `fill`.
            negative_classes, negative_prompts, negative_features: what guidance leads away from, in place of "no class" or
                "no caption": one for all images, or one for each, None (or a blank prompt) for none.
            extra_conditions: values (images, …) of the model's further conditions, by name.
            control_images: pictures or their files, one for all images or one for each, of models with control images.
            control_type: kind of control that is made of them, where that is not the model's (conditions/control.py).
            sampling: the fields of SamplingConfig.

        Raises:
            ValueError: for lists that do not fit together, or settings out of range; `batches` refuses values.
        """
        if (asked is None) == (features is None):
            raise ValueError("give labels or prompts, or a prompt's features in its place")
        values = as_list(asked) if features is None else list(map(_feature_file, as_list(features)))
        count = len(values)
        numbers = range(count) if indices is None else [int(number) for number in indices]
        given = [value for value in (negative_classes, negative_prompts, negative_features) if value is not None]
        if len(given) > 1:
            raise ValueError("give one of negative_classes, negative_prompts and negative_features")
        negatives = _each(given[0], count) if given else [None] * count
        if negative_features is not None:
            negatives = list(map(_feature_file, negatives))
        first, config = next(iter(self.gpt.conditions)), SamplingConfig(**sampling)
        columns = {first: values, **(extra_conditions or {}), **control_column(control_images, control_type, count)}
        others = {
            "image numbers": numbers,
            "negatives": negatives,
            **columns,
            **({} if known is None else {"known": known}),
            **({} if orders is None else {"orders": orders}),
        }
        for name, column in others.items():
            if len(column) != count:
                raise ValueError(f"{len(column)} {name} for {count} images: give one for each")
        return [
            Request(
                {name: column[i] for name, column in columns.items()},
                {} if negatives[i] is None else {first: negatives[i]},
                config,
                int(seed),
                numbers[i],
                None if known is None else known[i],
                None if orders is None else orders[i],
                particles,
            )
            for i in range(count)
        ]

    def batches(
        self,
        requests: Sequence[Request],
        *,
        progress: bool = False,
        size: int | None = None,
        sides: tuple[int, int] | None = None,
        ahead: bool = False,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Draw one micro-batch at a time: yield the images' numbers, and uint8 (n, size, size, 3).

        requests: images to draw; a micro-batch has equal sampling settings.
        size: pixels a side, where other than the model's.
        sides: height and width of requests that `rectangle` returned.
        ahead: on CUDA draw a micro-batch's tokens while a thread decodes the one before, which is given out after that. For
        the most images in a given time; the images are the same. Elsewhere it changes nothing.
        Raises ValueError for a value that the model cannot take, and for logits or pixels that are not finite,
        FileNotFoundError for features or a T5 that are not there.
        """
        rows, columns = (side // self.tokenizer.downsample for side in sides or (self.image_size, self.image_size))
        drawn = self._drawn(self.read(requests, progress=progress), progress, rows * columns)
        if ahead and self.device.type == "cuda" and not sides:
            yield from self._decoded_beside(drawn, size)
            return
        for numbers, codes in drawn:
            own = {"width": columns, "batch_size": self.batch_size}
            yield numbers, decode_codes(self.tokenizer, codes, **own) if sides else self.decode(codes, size)

    def read(self, requests: Sequence[Request], *, progress: bool = False) -> list[Request]:
        """Encode the requests' prompts and check every value. Raises as `batches` does."""
        texts = {name: each for name, each in self.gpt.conditions.items() if each.text_dim}
        encoded: dict[str, Tensor] = {}
        for part in ("conditions", "negative"):
            given = [each for request in requests for each in getattr(request, part).items()]
            values = [value for name, value in given if isinstance(value, str) and name in texts]
            encoded |= zip(values, self.encode(values, progress=progress)) if values else ()
        found = []
        for request in requests:
            try:
                found.append(request.read(self.gpt.conditions, encoded))
            except ValueError as error:
                raise ValueError(f"image {request.index}: {error}") from error
        for name, condition in texts.items():
            lengths = [(request.index, len(request.conditions[name])) for request in found]
            import_module("autoregressive.text").warn_of_long_features(lengths, condition.rows)
        return found

    def _drawn(self, requests: Sequence[Request], progress: bool, tokens: int) -> Iterator[tuple[list[int], Tensor]]:
        """One micro-batch at a time: the images' numbers, and their codes (n, tokens) in raster order."""
        total = len(requests) * tokens
        parts = self.micro_batches(requests)
        with tqdm(total=total, unit="tok", disable=not progress, desc=f"{len(requests)} images") as bar:
            for part in parts:

                def advance(done: int, _: Tensor, count: int = len(part), begun_at: int = bar.n) -> None:
                    bar.update(begun_at + done * count - bar.n)

                yield [request.index for request in part], self.draw(part, on_step=advance, tokens=tokens)

    def _decoded_beside(
        self, drawn: Iterator[tuple[list[int], Tensor]], size: int | None
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Numbers and pixels of what _drawn yields on CUDA; a batch is decoded in a thread and on a stream of its own."""
        stream = torch.cuda.Stream(self.device)

        def marked() -> Iterator[tuple[list[int], Tensor, torch.cuda.Event]]:
            for numbers, codes in drawn:
                yield numbers, codes, torch.cuda.current_stream(self.device).record_event()

        def decode(item: tuple[list[int], Tensor, torch.cuda.Event]) -> tuple[list[int], np.ndarray]:
            numbers, codes, written = item
            with torch.cuda.device(self.device), torch.cuda.stream(stream):  # which these are is each thread's own
                stream.wait_event(written)
                return numbers, self.decode(codes, size)  # pixels on the CPU: the stream is done with the codes

        yield from one_behind(marked(), decode)

    def encode(self, prompts: Sequence[str], *, progress: bool = False) -> list[Tensor]:
        """Return the features of each prompt, (length, caption_dim) on the CPU; see autoregressive/text.py."""
        return import_module("autoregressive.text").encode(self, prompts, progress=progress)

    def release_text_encoder(self) -> None:
        """Give the text encoder's memory back, as between encoding and drawing; the next prompt loads the T5 again."""
        self.text_encoder = None
        gc.collect()
        if self.t5_device.type == "cuda":
            torch.cuda.empty_cache()

    def generate_codes(
        self, asked: Sequence[int] | Tensor | Sequence[str] | None = None, *, on_step: OnStep | None = None, **settings
    ) -> Tensor:
        """Draw one micro-batch of codes, int64 (B, N) in raster order. settings: as `requests` takes them."""
        return self.draw(self.read(self.requests(asked, **settings)), on_step=on_step)

    def draw(
        self,
        requests: Sequence[Request],
        *,
        on_step: OnStep | None = None,
        tokens: int | None = None,
        log_probs: Tensor | None = None,
    ) -> Tensor:
        """Draw one micro-batch of codes, int64 (B, tokens) in raster order, for requests of one kind that `read` returned.

        tokens, log_probs: as generate's max_new_tokens and log_probs.
        Raises NotFiniteLogits where some of the images were drawn from logits that are not finite.
        """
        if requests[0].particles > 1:
            return self.fill(requests, on_step=on_step).tokens
        count = len(requests)
        rows = [*requests, *requests[-1:] * self._padding(count)]  # the last image fills the batch
        sampling, layout, *_ = self.kind(requests[0])
        groups = None if layout == self.gpt.layout else layout.groups
        filled = None if log_probs is None else log_probs.new_zeros(len(rows), self.gpt.layout.tokens)
        try:
            codes = generate(
                self.gpt,
                max_new_tokens=tokens,
                **self.inputs(rows),
                noise=torch.stack([self.noise(request) for request in rows]),
                window=self.window,
                draft_model=self.draft_gpt,
                groups=groups,
                compile=self.compile,
                on_step=on_step,
                log_probs=filled,
                **vars(sampling),
            )
        except NotFiniteLogits as error:
            if found := error.of(slice(count)):
                raise found from None
            return error.tokens[:count]  # only the padding is broken
        if log_probs is not None:
            log_probs.copy_(filled[:count])
        return codes[:count]

    def fill(self, requests: Sequence[Request], *, on_step: OnStep | None = None) -> Any:
        """Fill the holes of one micro-batch with each request's particles. Returns models/particles.py's Filled. See editing.py:fill_codes."""
        return import_module("autoregressive.editing").fill_codes(self, requests, on_step)

    def micro_batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Cut requests into micro-batches, in their order."""
        alike = [list(group) for _, group in groupby(requests, self.kind)]
        return [
            group[i : i + self.at_once(group[0])]
            for group in alike
            for i in range(0, len(group), self.at_once(group[0]))
        ]

    def at_once(self, request: Request) -> int:
        """Return how many requests of a kind a micro-batch has."""
        return max(1, self.batch_size // request.particles)

    def layout(self, request: Request) -> Layout:
        """Return the layout that a request's image is drawn by. Raises ValueError for settings that the model does not have."""
        if not self.gpt.any_order and (request.order is not None or request.sampling.order == "random"):
            raise ValueError(
                f"the model knows the order of its layout {self.gpt.layout.name!r} alone: leave out --order random"
            )
        known, order = (None if x is None else torch.as_tensor(x)[None] for x in (request.known, request.order))
        first = known_first(known, order)
        return self.gpt.layout.adapted(request.sampling.steps, request.sampling.repulsion, first)

    def kind(self, request: Request) -> tuple[SamplingConfig, Layout, int, bytes]:
        """Return what the requests of a micro-batch have in common; with particles the hole is a part of it."""
        hole = b""
        if request.particles > 1 and request.known is not None:
            hole = (torch.as_tensor(request.known) < 0).numpy().tobytes()
        return request.sampling, self.layout(request), request.particles, hole

    def order(self, request: Request) -> Tensor | None:
        """Return the order of a request's image, int64 (N,), a function of seed and index; None for the layout's own."""
        if request.order is not None:
            return torch.as_tensor(request.order)
        if not (self.gpt.layout.own_orders or request.sampling.order == "random"):
            return None
        seed = order_seed(request.seed, request.index)
        return image_order(self.layout(request), request.sampling, seed, request.known)

    def noise(self, request: Request) -> Tensor:
        """Return the noise of a request's image, (N,)."""
        return image_noise(request.seed, [request.index], self.gpt.layout.tokens, request.sampling.draw)[0]

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Return what `generate` and slots take of requests that `read` returned, besides settings and noise."""
        values, masks, negatives, negative_masks = {}, {}, {}, {}
        for name, condition in self.gpt.conditions.items():
            values[name], masks[name] = condition.stack([each.conditions[name] for each in requests], self.left_padding)
            negative_masks[name] = masks[name]
            given = [row for row, each in enumerate(requests) if name in each.negative]
            if given:
                chosen = [requests[row].negative[name] for row in given]
                negatives[name] = condition.null(values[name]).clone()
                negatives[name][given], chosen_masks = condition.stack(chosen, self.left_padding)
                if chosen_masks is not None:
                    negative_masks[name] = masks[name].clone()
                    negative_masks[name][given] = chosen_masks
        known = [None if each.known is None else torch.as_tensor(each.known) for each in requests]
        return {
            "cond": values,
            "emb_masks": _prefix_mask(values, masks, self.gpt.conditions),
            "known": _stacked(known, torch.full((self.gpt.layout.tokens,), -1)),
            "orders": _stacked([self.order(each) for each in requests], self.gpt.layout.order),
            "negative": negatives or None,
            "negative_masks": _prefix_mask(values, negative_masks, self.gpt.conditions) if negatives else None,
        }

    @torch.inference_mode()
    def encode_image(self, image: Image.Image) -> Tensor:
        """Encode a picture, resized and cropped to the model's size, to codes int64 (1, N) in raster order.

        Raises ValueError for a picture of other than 8 bits.
        """
        require_eight_bits(image, "the picture")
        square = ImageOps.fit(image.convert("RGB"), (self.image_size, self.image_size), Image.Resampling.BICUBIC)
        scaled = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1
        return self.tokenizer.to_codes(scaled.to(self.tokenizer.device)).flatten(1)

    def edit(self, image: Image.Image, mask: Any = None, asked: Any = None, **settings: Any) -> list[Image.Image]:
        """Fill a hole in a picture with a class or a prompt; what is kept decides too. See editing.py:edit."""
        return import_module("autoregressive.editing").edit(self, image, mask, asked, **settings)

    def extend(self, image: Image.Image, asked: Any = None, **settings: Any) -> list[Image.Image]:
        """Draw a picture's surroundings: left=, right=, up=, down= in pixels. See editing.py:extend."""
        return import_module("autoregressive.editing").extend(self, image, asked, **settings)

    @torch.inference_mode()
    def decode(self, codes: Tensor, size: int | None = None) -> np.ndarray:
        """Return pixels of codes (B, N) in raster order, uint8 (B, size, size, 3), resized bicubically to another size."""
        return decode_codes(self.tokenizer, codes, size=size, batch_size=self.batch_size)

    def _padding(self, count: int) -> int:
        """Rows to add: to a whole micro-batch on an accelerator, whose kernels depend on every size, and where each size would
        be compiled; else to a multiple.
        """
        if self.device.type != "cpu" or self.compile:
            return max(self.batch_size - count, 0)
        return missing_rows(self.gpt, count)


@torch.inference_mode()
def decode_codes(
    tokenizer: Tokenizer, codes: Tensor, *, width: int | None = None, size: int | None = None, batch_size: int = 32
) -> np.ndarray:
    """Codes (B, h·width) in raster order to pixels, uint8 (B, H, W, 3); an image's do not depend on the others.

    width: tokens of a row (of a square where not given). size: pixels a side to resize to, bicubically.
    batch_size: images at once on an accelerator, at most MOST_DECODED_AT_ONCE; where memory is short for them, half as
    many, and so on, and where it is short for one, in strips (`Tokenizer.to_pixels_in_strips`).
    """
    device = tokenizer.device
    width = width or isqrt(codes.shape[1])
    at_once = IMAGES_AT_ONCE if device.type == "cpu" else min(batch_size, MOST_DECODED_AT_ONCE)
    while True:
        try:
            return _decode_so_many(tokenizer, codes.to(device), width, size, max(at_once, 1), in_strips=at_once == 0)
        except RuntimeError as error:
            if at_once == 0 or not is_out_of_memory(error):
                raise
        at_once //= 2
        torch.cuda.empty_cache()
        how = {0: "in strips, which takes longer", 1: "one at a time"}.get(at_once, f"{at_once} at once")
        warnings.warn(f"memory is short: images are decoded {how}; pixels may be rounded otherwise", stacklevel=2)


def _decode_so_many(
    tokenizer: Tokenizer, codes: Tensor, width: int, size: int | None, at_once: int, in_strips: bool
) -> np.ndarray:
    """Decode as decode_codes does, `at_once` images in each pass, the last one filled up to that number."""
    decode = tokenizer.to_pixels_in_strips if in_strips else tokenizer.to_pixels
    arrays = []
    for part in codes.split(at_once):
        filled = torch.cat([part, part[-1:].expand(at_once - len(part), -1)])
        images = decode(filled.view(len(filled), -1, width)).float()
        if size is not None and size != images.shape[-1]:
            images = torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic")
        arrays.append(to_uint8(images[: len(part)]))
    return np.concatenate(arrays)


def control_column(
    pictures: Picture | Sequence[Picture] | None, kind: str | None, count: int
) -> dict[str, list[ControlImage]]:
    """Return the control images of `count` images by the name of their condition; nothing where none are given.

    Raises FileNotFoundError, ValueError for what is no picture.
    """
    if pictures is None:
        if kind is not None:
            raise ValueError(f"--control-type {kind} is of a control image: give --control-image too")
        return {}
    is_one = isinstance(pictures, str | Path | Image.Image)
    opened = [
        open_picture(each) if isinstance(each, str | Path) else each for each in ([pictures] if is_one else pictures)
    ]
    return {"control": [ControlImage(each, kind) for each in opened] * (count if is_one else 1)}


def as_list(asked: Any) -> list:
    """Return the items of a list, an array or a tensor."""
    if isinstance(asked, str | Path) or not (hasattr(asked, "__len__") and hasattr(asked, "__getitem__")):
        raise ValueError(f"give a list, one item for each image, not {beginning(repr(asked))}")
    return list(asked)


def repeated(asked: Any, settings: Mapping[str, Any], times: int) -> tuple[list | None, dict[str, Any]]:
    """Return labels or prompts, and what `requests` takes beside them, with each item `times` times in a row.

    Raises ValueError for a number below 1, and beside settings that are of single images.
    """
    require_whole("num_images_per_prompt", times)
    if single := [
        name for name in ("indices", "known", "orders", "extra_conditions") if settings.get(name) is not None
    ]:
        raise ValueError(
            f"{single[0]} has an item for each image: leave num_images_per_prompt out, and repeat the prompts"
        )

    def repeat(values: Any) -> list:
        return [value for value in as_list(values) for _ in range(times)]

    lists = {"features"} | {
        name
        for name in ("negative_classes", "negative_prompts", "negative_features", "control_images")
        if isinstance(settings.get(name), list | tuple)
    }
    found = {name: repeat(value) if name in lists and value is not None else value for name, value in settings.items()}
    return None if asked is None else repeat(asked), found


def _each(given: Any, count: int) -> list:
    """Return a value for each image of one for all or one for each; None for a blank text."""
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist() if given.ndim < 2 else given
    is_one = isinstance(given, int | float | str | Path | Tensor | np.ndarray)
    values = [given] * count if is_one else list(given)
    return [None if isinstance(value, str) and not value.strip() else value for value in values]


def _stacked(rows: Sequence[Tensor | None], default: Tensor) -> Tensor | None:
    """Stack rows, the default in place of those that are not given; None where none is."""
    given = any(row is not None for row in rows)
    return torch.stack([default if row is None else row for row in rows]) if given else None


def _feature_file(features: Features | None) -> Tensor | np.ndarray | Path | None:
    return Path(features) if isinstance(features, str) else features


def _prefix_mask(
    values: Mapping[str, Tensor], masks: Mapping[str, Tensor | None], conditions: Mapping[str, Condition]
) -> Tensor | None:
    """Join the masks of the conditions' rows, bool (B, all rows); None where all rows are real."""
    if all(mask is None for mask in masks.values()):
        return None
    whole = {n: torch.ones(len(v), conditions[n].rows, dtype=torch.bool, device=v.device) for n, v in values.items()}
    return torch.cat([whole[name] if mask is None else mask for name, mask in masks.items()], dim=1)
