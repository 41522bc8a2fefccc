"""Reconstructs a folder of images by a VQGAN of taming-transformers or latent diffusion, a baseline.

    torchrun --nproc_per_node=8 tokenizer/vqgan/reconstruction_vqgan_ddp.py --data-path imagenet/val \\
        --vqgan vqgan_imagenet_f16_16384

Takes Lightning checkpoints as published. What it writes: see tokenizer/reconstruction.py.
"""

from tokenizer.reconstruction_flags import folder_script
from utils.cli import run_script

main, flags = folder_script("vqgan", __doc__)

if __name__ == "__main__":
    run_script(main, flags())
