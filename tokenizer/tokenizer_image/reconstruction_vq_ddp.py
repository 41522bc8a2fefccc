"""Reconstructs a folder of images by the tokenizer: PNG files, an .npz for rFID, PSNR, SSIM, LPIPS and codebook usage.

    torchrun --nproc_per_node=8 tokenizer/tokenizer_image/reconstruction_vq_ddp.py --data-path imagenet/val \\
        --vq-ckpt vq_ds16_c2i.pt --image-size 384 --image-size-eval 256

Rerun the command to do what is missing (see tokenizer/reconstruction.py).
"""

from tokenizer.reconstruction_flags import folder_script
from utils.cli import run_script

main, flags = folder_script("vq", __doc__)

if __name__ == "__main__":
    run_script(main, flags())
