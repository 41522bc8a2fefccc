"""Measures what weight-only int8 costs and saves on a model: float32, bf16 and int8 side by side.

    python3 benchmarks/quantization.py --gpt-ckpt quickstart/gpt --codes quickstart/codes_held_out

Needs torchao. NLL and `next` are over the codes, or random ones without --codes; `next` is the share of places at which the most likely
token is float32's; `sampled` the share of tokens of whole images drawn with equal noise.
"""

import argparse
from typing import TYPE_CHECKING

from autoregressive.sample.flags import add_sampling_flags, sampling_config
from utils.cli import add_flag, add_gpt_file_flags, flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from autoregressive.models.gpt import Transformer

MIB = 2**20
KINDS = ("float32", "bf16", "int8", "int8, head too")


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.models.generate import generate
    from autoregressive.quantization import require_torchao
    from benchmarks.measuring import timed
    from utils.distributed import pick_device
    from utils.rng import image_noise

    settings = vars(sampling_config(args))
    require_torchao()
    device = pick_device(args.device)
    models = {kind: make_model(args, kind).to(device) for kind in KINDS}
    shape = models["float32"].args
    if shape.model_type != "c2i":
        raise ValueError(f"{args.gpt_ckpt} is text-conditional; this benchmark draws from class-conditional models")
    labels = torch.arange(args.images, device=device) * 37 % shape.num_classes
    noise = image_noise(0, range(args.images), shape.block_size, args.draw).to(device)
    codes, classes = read_codes(args, shape)
    print(
        f"{args.gpt_ckpt}, {device.type}, {torch.get_num_threads()} threads, {args.images} images of "
        f"{shape.block_size} tokens, guidance {args.cfg_scale}; NLL of {len(codes)} images"
    )
    print("| weights | MiB | NLL (nats/token) | next | sampled | tokens/s |\n|---|---|---|---|---|---|")
    exact: tuple[Tensor, Tensor] | None = None
    for kind, model in models.items():
        drawn = []
        seconds = min(
            timed(lambda m=model, d=drawn: d.append(generate(m, labels, noise=noise, **settings)), device)
            for _ in range(args.rounds)
        )
        nll, likeliest = score(model, codes, classes, args.images)
        exact = exact or (likeliest, drawn[0])
        same = [f"{(a == b).double().mean():.2%}" for a, b in zip((likeliest, drawn[0]), exact, strict=True)]
        print(
            f"| {kind} | {weight_bytes(model) / MIB:,.1f} | {nll:.5f} | {same[0]} | {same[1]} | "
            f"{drawn[0].numel() / seconds:,.0f} |",
            flush=True,
        )


def make_model(args: argparse.Namespace, kind: str) -> "Transformer":
    """Return the file's model in the precision of `kind`."""
    import torch

    from autoregressive.pipeline import load_gpt
    from autoregressive.quantization import quantize
    from utils.runs import find_checkpoint

    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = load_gpt(find_checkpoint(args.gpt_ckpt), dtype=dtype, use_ema=args.use_ema)
    return quantize(model, head=kind.endswith("head too")) if kind.startswith("int8") else model


def read_codes(args: argparse.Namespace, shape: object) -> "tuple[Tensor, Tensor]":
    """Return the first codes (n, tokens) of --codes and their labels (n,); random ones without --codes."""
    import torch

    from dataset.codes import open_codes

    if args.codes is None:
        draw = torch.Generator().manual_seed(0)
        codes = torch.randint(shape.vocab_size, (args.images, shape.block_size), generator=draw)
        return codes, torch.arange(args.images) % shape.num_classes
    data = open_codes(args.codes, random_view=False)
    if data.settings.tokens != shape.block_size:
        raise ValueError(f"{args.codes} has {data.settings.tokens} tokens an image and the model {shape.block_size}")
    items = [data[i] for i in range(min(len(data), 1000))]
    return torch.stack([item["codes"] for item in items]), torch.tensor([item["label"] for item in items])


def score(model: "Transformer", codes: "Tensor", labels: "Tensor", batch: int) -> "tuple[float, Tensor]":
    """Return the mean NLL of codes (n, N) in nats a token, and the most likely token at each place (n, N)."""
    import torch
    import torch.nn.functional as F

    layout, device = model.layout, model.tok_embeddings.weight.device
    total, likeliest = 0.0, []
    for part, classes in zip(codes.split(batch), labels.split(batch), strict=True):
        tokens = part.to(device)[:, layout.order.to(device)]
        with torch.inference_mode():
            logits = model(tokens[:, : -layout.step_tokens], classes.to(device))  # (b, N, V)
            total += float(F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum"))
        likeliest.append(logits.argmax(-1))
    return total / codes.numel(), torch.cat(likeliest)


def weight_bytes(model: "Transformer") -> int:
    """Return the bytes of a model's parameters, quantized or not."""

    def size(tensor: "Tensor") -> int:
        if hasattr(tensor, "__tensor_flatten__"):  # several tensors in one: values, scales
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.nbytes

    return sum(map(size, model.parameters()))


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    add_gpt_file_flags(parser, required=True)
    parser.add_argument("--codes", default=None, help="packed codes whose likelihood is compared")
    add_sampling_flags(parser, cfg_scale=2.0, top_k=0)
    parser.add_argument("--images", type=positive_int, default=8, help="drawn at once")
    add_flag(parser, "--rounds", positive_int, 3, "times each model draws them; the fastest counts")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
