"""Trains a GPT by rewards of the images that it draws: group relative policy optimisation (GRPO).

    python3 autoregressive/train/train_grpo.py --import examples/reward.py --reward read_as_asked --gpt-ckpt results --resume
    torchrun --nproc_per_node=8 autoregressive/train/train_grpo.py --gpt-ckpt t2i_XL_stage1_256.pt --vq-ckpt vq_ds16_t2i.pt \\
        --prompt-csv captions.tsv --t5-feat-path t5_features --reward clip,weight=5 --global-batch-size 8 --resume

A reward is a function of images (autoregressive/train/rewards.py). A step draws --group-size images of each of
--global-batch-size classes or prompts, and makes those likelier that have more reward than others of their group; a penalty
holds the model near its starting weights, or --reference. Held-out rewards, diversity and recall stand in the log; the best
checkpoint is kept. GRPO: DeepSeekMath (arXiv 2402.03300); of image tokens: AR-GRPO (2508.06924).
"""

import argparse

from autoregressive.models.settings import SamplingConfig
from utils.cli import (
    Number,
    add_flag,
    add_store_true,
    add_switch,
    flag_parser,
    named_settings,
    nonnegative_float,
    positive_float,
    positive_int,
    run_script,
)
from utils.training.flags import add_parallel_flags, add_training_flags


def main(args: argparse.Namespace) -> None:
    from autoregressive.train.grpo import train_by_rewards

    train_by_rewards(args)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    help = "GPT to train: a file, a run's folder, or a released file's name"
    add_flag(parser, "--gpt-ckpt", None, None, help, required=True)
    add_store_true(parser, "--use-ema", "begin with the file's averaged weights")
    add_flag(
        parser, "--vq-ckpt", None, None, "its tokenizer (default: the one that the GPT's file records, found near it)"
    )
    add_flag(
        parser, "--image-size", positive_int, None, "pixels a side, of a released file whose name does not tell them"
    )
    help = "a registered reward; weight (default 1) is its part in the sum, other keys are its own settings; repeatable"
    named = {"type": named_settings, "metavar": "NAME[,weight=W][,key=value]"}
    add_flag(parser, "--reward", default=None, help=help, action="append", required=True, **named)
    add_flag(parser, "--group-size", positive_int, 8, "images of a class or prompt that are compared with each other")
    help = "divide rewards by their group's standard deviation"
    add_switch(parser, "--scale-rewards", True, help)
    help = "weight of the distance from the reference, 0 for none and no second copy (default: as published 0.1, for text 1)"
    add_flag(parser, "--beta", nonnegative_float, None, help)
    add_flag(parser, "--reference", None, None, "GPT to stay near (default: that of --gpt-ckpt)")
    help = "train the guided distribution that images are drawn from, not the conditional one: twice the rows"
    add_switch(parser, "--guidance-in-policy", False, help)
    help = "train additions of this rank to the frozen model's matrices (LoRA); without them it is the reference, with no second copy"
    add_flag(parser, "--lora-rank", positive_int, None, help)
    add_flag(parser, "--lora-alpha", positive_float, None, "the additions count alpha / rank (default: 2 ranks)")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not torch.compile each block (it is only on CUDA)"
    )

    group = parser.add_argument_group("prompts, for a text model")
    add_flag(group, "--prompt-csv", None, None, "a table with a column Prompt, or a file with a prompt a line")
    add_flag(group, "--t5-feat-path", None, None, "their features: language/extract_t5_feature.py --data-path FILE")
    add_flag(group, "--val-prompt-csv", None, None, "held-out prompts (default: those of training, with other noise)")
    add_flag(group, "--val-t5-feat-path", None, None, "their features")

    group = parser.add_argument_group("held-out figures")
    add_flag(group, "--val-images", positive_int, 64, "images drawn for them at the beginning and at each checkpoint")
    add_flag(group, "--val-code-path", None, None, "codes of real images: recall and precision are reported too")
    add_flag(
        group, "--recall-features", None, "pixels", "what recall compares images by: pixels, clip, or a registered kind"
    )

    group = parser.add_argument_group("sampling")
    for name in ("cfg_scale", "cfg_interval", "cfg_schedule", "cfg_power", "temperature", "top_k", "top_p"):
        field = SamplingConfig.fields()[name]
        help, choices = field.metadata["help"], field.metadata.get("choices")
        default = None if name == "cfg_scale" else field.default
        help += " (default: as published 2, for text 4)" if name == "cfg_scale" else ""
        help += "; refused in training" if name in ("top_k", "top_p") else ""
        kind = None if choices else Number(field.type, least=field.metadata["least"])
        add_flag(group, f"--{name.replace('_', '-')}", kind, default, help, choices=choices)

    add_training_flags(parser, epochs=1, batch=4, results_dir="results_grpo", num_workers=0)
    add_parallel_flags(parser, "ddp")
    parser.set_defaults(epochs=None, lr=1e-5, weight_decay=0.0, beta2=0.999, log_every=10, ckpt_every=50)
    for action in parser._actions:
        if action.dest == "global_batch_size":
            action.help = "classes or prompts a step, over all processes, each a group of images; unless given, 4"
        if action.dest == "epochs":
            action.help = (
                "passes over classes or prompts (default: as many as --max-steps needs, which is 400 unless given)"
            )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
