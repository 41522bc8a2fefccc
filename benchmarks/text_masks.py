"""What caption masks cost: made on the device from the captions' lengths, or shipped by the loader for every sample.

    OMP_NUM_THREADS=1 python3 benchmarks/text_masks.py --gpt-model GPT-XS --image-size 256 --batch-size 16

The published loader makes a mask of (N + T)² truth values for each sample, for N image and T caption tokens; here the
loader gives a number. Both feed the same model, which must come to the same loss. Then the attention itself: SDPA with
the mask, SDPA without one (plainly causal), and on CUDA compiled FlexAttention.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from autoregressive.models.gpt import Transformer


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.models.gpt import GPT_models
    from autoregressive.train.loss import TokenLoss
    from utils.distributed import pick_device

    device = pick_device(args.device)
    tokens, grid = args.cls_token_num, args.image_size // 16
    rows = tokens + grid**2 - 1
    torch.manual_seed(0)
    # No dropouts: the two must come to the same loss.
    quiet = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0, "class_dropout_prob": 0.0}
    shape = {"model_type": "t2i", "cls_token_num": tokens, "caption_dim": args.t5_feature_dim, "block_size": grid**2}
    model = GPT_models[args.gpt_model](**shape, **quiet).to(device)
    samples = pairs(args, grid**2)
    print(f"{args.gpt_model}, {grid}x{grid} tokens after {tokens}, batches of {args.batch_size}, {device}, medians")
    kinds = {"lengths": batch_with_lengths, "masks": batch_with_masks}
    losses, rates = {}, {}
    for name, make in kinds.items():
        batches = [samples[i : i + args.batch_size] for i in range(0, len(samples), args.batch_size)]
        loading = median_seconds(lambda make=make, batches=batches: make(batches[0], tokens, rows), args.runs)
        batch = make(batches[0], tokens, rows)
        size = sum(part.numel() * part.element_size() for part in batch[2:]) / args.batch_size
        step = training_step(TokenLoss(model), model, device, tokens)
        losses[name] = step(batch)
        whole = median_seconds(
            lambda make=make, batches=batches, step=step: step(make(batches[0], tokens, rows)), args.runs
        )
        rates[name] = args.batch_size / loading, args.batch_size / whole
        print(
            f"{name}: batches made at {rates[name][0]:,.0f} samples/s, made and trained on at {rates[name][1]:.2f} "
            f"samples/s; {size:,.0f} bytes a sample beside codes and features"
        )
    assert abs(losses["lengths"] - losses["masks"]) < 1e-4, losses
    print(
        "lengths to masks: " + ", ".join(f"{a / b:.2f}x" for a, b in zip(rates["lengths"], rates["masks"], strict=True))
    )
    attention(args, device, model, tokens, rows)


def pairs(args: argparse.Namespace, image_tokens: int) -> "list[tuple[Tensor, Tensor]]":
    """A batch's (codes (N,), features (length, dim)) with captions of 8 to T tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, args.cls_token_num + 1, (args.batch_size,), generator=generator).tolist()
    codes = torch.randint(16384, (args.batch_size, image_tokens), generator=generator)
    return [
        (row, torch.randn(length, args.t5_feature_dim, generator=generator).bfloat16())
        for row, length in zip(codes, lengths, strict=True)
    ]


def batch_with_lengths(items: "Sequence[tuple[Tensor, Tensor]]", tokens: int, rows: int) -> "list[Tensor]":
    """Codes, features, and the captions' lengths (B,)."""
    import torch

    from language.features import left_padded

    codes, features = zip(*items, strict=True)
    return [torch.stack(codes), *left_padded(features, tokens)]


def batch_with_masks(items: "Sequence[tuple[Tensor, Tensor]]", tokens: int, rows: int) -> "list[Tensor]":
    """Codes, features, and a mask for each sample, bool (B, 1, rows, rows)."""
    import torch

    codes, features, lengths = batch_with_lengths(items, tokens, rows)
    masks = []
    for length in lengths.tolist():
        mask = torch.ones(rows, rows, dtype=torch.bool).tril()
        mask[:, : tokens - length] = False
        masks.append((mask | torch.eye(rows, dtype=torch.bool))[None])
    return [codes, features, torch.stack(masks)]


def training_step(
    token_loss: "Callable", model: "Transformer", device: object, tokens: int
) -> "Callable[[list[Tensor]], float]":
    """A forward and backward pass over a batch of either kind; returns its loss."""
    from language.features import prefix_mask

    plain = type(model).attention_mask

    def step(batch: "list[Tensor]") -> float:
        codes, features, third = (part.to(device) for part in batch)
        model.zero_grad(set_to_none=True)
        if third.dim() == 1:
            model.attention_mask = plain.__get__(model)
            loss = token_loss(codes, features, prefix_mask=prefix_mask(third, tokens))
        else:
            model.attention_mask = lambda *_: third
            loss = token_loss(codes, features)
        loss.backward()
        return float(loss.detach())

    return step


def attention(args: argparse.Namespace, device: object, model: "Transformer", tokens: int, rows: int) -> None:
    """One layer's attention, forward and backward, by each way of masking."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor([len(features) for _, features in pairs(args, 1)], device=device)
    heads, width = model.args.n_head, model.args.dim // model.args.n_head
    q, k, v = (torch.randn(args.batch_size, heads, rows, width, device=device, requires_grad=True) for _ in range(3))
    mask = batch_with_masks(pairs(args, 1), tokens, rows)[2].to(device)

    def visible(b: "Tensor", h: "Tensor", i: "Tensor", j: "Tensor") -> "Tensor":
        return ((j <= i) & (j >= tokens - lengths[b])) | (i == j)

    ways = {
        "SDPA with the mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "SDPA without one": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    if torch.device(device).type == "cuda":
        blocks = create_block_mask(visible, args.batch_size, None, rows, rows, device=str(device))
        compiled = torch.compile(flex_attention)
        ways["FlexAttention, compiled"] = lambda: compiled(q, k, v, block_mask=blocks)
        reference = ways["SDPA with the mask"]()
        torch.testing.assert_close(ways["FlexAttention, compiled"](), reference, rtol=1e-2, atol=1e-2)
    else:
        print("FlexAttention has a backward pass on CUDA only")
    for name, way in ways.items():
        seconds = median_seconds(lambda way=way: way().sum().backward(), args.runs)
        print(f"{name}: {seconds * 1000:.1f} ms")


def median_seconds(work: "Callable[[], object]", runs: int) -> float:
    """The median time of a call, after one for nothing."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    work()
    seconds = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--gpt-model", choices=list(GPT_SIZES), default="GPT-XS", help="size of the transformer")
    parser.add_argument("--image-size", type=positive_int, default=256, help="pixels a side, 16 a token")
    parser.add_argument("--cls-token-num", type=positive_int, default=120, help="caption tokens")
    parser.add_argument(
        "--t5-feature-dim", type=positive_int, default=2048, help="numbers a caption token's feature has"
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, help="samples a step")
    parser.add_argument("--runs", type=positive_int, default=5, help="runs of which the median is taken")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
