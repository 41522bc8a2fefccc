"""Reinforcement learning towards a classifier: images that scikit-learn reads as the digit asked for become likelier.

    python3 examples/reward.py --gpt-ckpt quickstart/gpt --vq-ckpt quickstart/tokenizer --steps 100 --output rewarded.pt

REINFORCE (Williams, 1992) with the mean reward of a class's images as baseline. The file written is an ordinary one.
"""

import argparse

from utils.cli import SEED, flag_parser, positive_float, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    from autoregressive.pipeline import ImagePipeline
    from autoregressive.train.loss import token_log_probs
    from utils.checkpoint import read_checkpoint, save_checkpoint
    from utils.runs import find_checkpoint

    scans = load_digits()
    judge = LogisticRegression(max_iter=1000).fit(scans.data, scans.target)
    pipeline = ImagePipeline.from_pretrained(
        args.gpt_ckpt, vq=args.vq_ckpt, device=args.device, batch_size=args.batch_size
    )
    model = pipeline.gpt.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)
    groups = torch.arange(args.batch_size) // 2 % model.args.num_classes  # two images of each class

    def read(images: np.ndarray) -> np.ndarray:
        small = [np.asarray(Image.fromarray(image).convert("L").resize((8, 8))) for image in images]
        return judge.predict_proba(np.stack(small).reshape(len(images), -1) / 15.9)

    for step in range(args.steps):
        numbers = range(step * args.batch_size, (step + 1) * args.batch_size)
        codes = pipeline.generate_codes(groups, seed=args.seed, indices=numbers).clone()
        rewards = torch.from_numpy(read(pipeline.decode(codes))[range(len(codes)), groups]).float()
        baseline = torch.stack([rewards[groups == group].mean() for group in groups])
        log_probs = token_log_probs(model, codes, groups.to(codes.device)).sum(1)
        loss = -((rewards - baseline).to(codes.device) * log_probs).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"step {step}: reward {rewards.mean():.3f}")
    saved = read_checkpoint(find_checkpoint(args.gpt_ckpt))
    record = {"args": argparse.Namespace(**(saved.args or {})), "config": saved.config | model.args.identity}
    save_checkpoint(args.output, {"model": model.state_dict(), "optimizer": {}, "steps": args.steps, **record})


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--gpt-ckpt", required=True, help="the model to begin with, of ten digits")
    parser.add_argument("--vq-ckpt", required=True, help="the tokenizer's weights")
    parser.add_argument("--steps", type=positive_int, default=100, help="updates of the weights")
    parser.add_argument(
        "--batch-size", type=positive_int, default=40, help="images a step, two of a class after another"
    )
    parser.add_argument("--lr", type=positive_float, default=1e-4, help="learning rate")
    parser.add_argument("--seed", type=SEED, default=0, help="fixes every image")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--output", default="rewarded.pt", help="the file to write")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
