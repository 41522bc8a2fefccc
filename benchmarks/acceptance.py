"""Passes of an image by window, and what they depend on: one sampling setting changed at a time.

    python3 benchmarks/acceptance.py --gpt-ckpt quickstart/gpt --cfg-scale 1.5 --temperature 0.6 --output passes.png

Passes are averages over images drawn one at a time, and do not depend on the machine. A checkpoint of an earlier step in
place of the run shows the training's part.
"""

import argparse

from utils.cli import flag_parser, nonnegative_float, nonnegative_int, positive_int, run_script

CHANGES = {"temperature": [1.0, 0.5, 0.2], "cfg_scale": [1.0, 2.0, 3.0], "top_k": [100, 10, 1]}


def main(args: argparse.Namespace) -> None:
    import torch
    from matplotlib.figure import Figure

    from autoregressive.models.generate import generate
    from autoregressive.pipeline import load_gpt
    from utils.distributed import pick_device
    from utils.files import atomic_write
    from utils.rng import image_noise
    from utils.runs import find_checkpoint

    device = pick_device(args.device)
    model = load_gpt(find_checkpoint(args.gpt_ckpt), device=device, dtype=torch.float32)
    tokens, noise = model.layout.tokens, image_noise(args.seed, range(args.images), model.layout.tokens)

    def passes(window: int, settings: dict) -> float:
        count: list[int] = []
        for i in range(args.images):
            label = torch.tensor([i * model.args.num_classes // args.images], device=device)
            generate(
                model,
                label,
                noise=noise[i : i + 1],
                window=window,
                on_step=lambda done, _: count.append(done),
                **settings,
            )
        return len(count) / args.images

    base = {"cfg_scale": args.cfg_scale, "temperature": args.temperature, "top_k": args.top_k}
    rows = [
        base,
        *({**base, name: value} for name, values in CHANGES.items() for value in values if value != base[name]),
    ]
    figure = Figure(layout="tight")
    axis = figure.subplots()
    axis.set(xlabel="window, tokens", ylabel=f"passes for {tokens} tokens")
    print(f"{args.gpt_ckpt}: passes for {tokens} tokens, {args.images} images one at a time")
    print("| " + " | ".join(["guidance", "temperature", "top-k", *map(str, args.windows)]) + " |")
    print("|---" * (3 + len(args.windows)) + "|")
    for settings in rows:
        found = [passes(window, settings) for window in args.windows]
        print("|", " | ".join([*map(str, settings.values()), *(f"{each:.1f}" for each in found)]), "|", flush=True)
        name = "as the pictures" if settings is base else next(f"{k} {v}" for k, v in settings.items() if v != base[k])
        axis.plot(
            [1, *args.windows], [tokens, *found], label=name, marker="o", linewidth=2.5 if settings is base else 1
        )
    if args.output:
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        with atomic_write(args.output) as f:
            figure.savefig(f, format="png", dpi=100)
        print(f"wrote {args.output}")


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--gpt-ckpt", required=True, help="a class-conditional model: a file or a run")
    parser.add_argument("--windows", type=positive_int, nargs="+", default=[2, 4, 8, 16, 32], help="in tokens")
    parser.add_argument("--images", type=positive_int, default=16, help="images, of classes spread over all")
    parser.add_argument("--cfg-scale", type=nonnegative_float, default=2.0, help="guidance")
    parser.add_argument("--temperature", type=nonnegative_float, default=1.0, help="of the draw")
    parser.add_argument("--top-k", type=nonnegative_int, default=0, help="likeliest codes kept; 0 keeps all")
    parser.add_argument("--seed", type=nonnegative_int, default=0, help="of the noise")
    parser.add_argument("--output", default=None, help="a figure to write as well (PNG)")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
