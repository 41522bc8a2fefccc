"""Encodes one image by Stable Diffusion's or SDXL's VAE and decodes it again.

python3 tokenizer/vae/sd_vae_demo.py --image-path photo.jpg --vae sdxl-vae --image-size 512
"""

from tokenizer.reconstruction_flags import image_script
from utils.cli import run_script

main, flags = image_script("vae", __doc__)

if __name__ == "__main__":
    run_script(main, flags())
