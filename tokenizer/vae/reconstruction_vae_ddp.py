"""Reconstructs a folder of images by Stable Diffusion's or SDXL's VAE, a baseline.

    torchrun --nproc_per_node=8 tokenizer/vae/reconstruction_vae_ddp.py --data-path imagenet/val --vae sd-vae-ft-mse

An image is decoded from the mean of its posterior, with --posterior sample from a draw. What it writes: see
tokenizer/reconstruction.py.
"""

from tokenizer.reconstruction_flags import folder_script
from utils.cli import run_script

main, flags = folder_script("vae", __doc__)

if __name__ == "__main__":
    run_script(main, flags())
