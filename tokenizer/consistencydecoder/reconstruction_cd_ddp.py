"""Reconstructs a folder of images by OpenAI's consistency decoder, a baseline.

    torchrun --nproc_per_node=8 tokenizer/consistencydecoder/reconstruction_cd_ddp.py --data-path imagenet/val

The noise of an image is a function of --global-seed and its number. What it writes: see tokenizer/reconstruction.py.
"""

from tokenizer.reconstruction_flags import folder_script
from utils.cli import run_script

main, flags = folder_script("consistency-decoder", __doc__)

if __name__ == "__main__":
    run_script(main, flags())
