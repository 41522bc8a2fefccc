"""One command for the scripts: `autoregressive sample --gpt-ckpt quickstart/gpt`, or `python -m autoregressive` uninstalled.

    autoregressive                            # lists the commands
    torchrun --nproc_per_node=8 -m autoregressive train --code-path my_codes

Each command is a published script path, with the script's flags.
"""

import runpy
import sys

COMMANDS = {
    "train": ("autoregressive.train.train_c2i", "a GPT on the codes of images and their classes"),
    "train text": ("autoregressive.train.train_t2i", "a GPT on images or codes and captions"),
    "train rewards": ("autoregressive.train.train_grpo", "a GPT by rewards of the images it draws"),
    "train tokenizer": ("tokenizer.tokenizer_image.vq_train", "an image tokenizer"),
    "extract": ("autoregressive.train.extract_codes_c2i", "codes of class folders"),
    "extract text": ("autoregressive.train.extract_codes_t2i", "codes of image-text pairs"),
    "extract features": ("language.extract_t5_feature", "T5 features of captions"),
    "sample": ("autoregressive.sample.sample_c2i", "a grid of images of classes"),
    "sample text": ("autoregressive.sample.sample_t2i", "a grid of images of prompts"),
    "sample many": ("autoregressive.sample.sample_c2i_ddp", "images of classes for FID, on any number of processes"),
    "sample many text": ("autoregressive.sample.sample_t2i_ddp", "images of a table of prompts, likewise"),
    "edit": ("autoregressive.sample.edit_c2i", "a picture of a class, its hole filled or its surroundings drawn"),
    "edit text": ("autoregressive.sample.edit_t2i", "a picture of a prompt, likewise"),
    "reconstruct": (
        "tokenizer.tokenizer_image.reconstruction_vq_ddp",
        "images through a tokenizer, with rFID's images",
    ),
    "evaluate": ("evaluations.c2i.evaluator", "FID, IS, precision and recall of images of classes"),
    "evaluate text": ("evaluations.t2i.evaluation", "FID and CLIP score of images of prompts"),
    "serve": ("autoregressive.serve.server", "images over HTTP, with OpenAI's interface"),
    "export": ("tools.export_checkpoint", "a checkpoint in another format"),
    "plan": ("tools.plan_training", "the memory and time of a training run"),
}


def main() -> None:
    words = sys.argv[1:]
    chosen = next((" ".join(words[:n]) for n in (3, 2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if chosen is None:
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {name:{width}}  {says}" for name, (_, says) in COMMANDS.items())
        if words and words[0] not in ("-h", "--help"):
            sys.exit(f"error: no command {words[0]!r}; there are:\n{listed}")
        print(f"usage: autoregressive COMMAND [flags]; COMMAND --help lists the flags\n\n{listed}")
        return
    sys.argv[1:] = words[len(chosen.split()) :]
    runpy.run_module(COMMANDS[chosen][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
