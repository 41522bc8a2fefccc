"""Encodes one image by a VQGAN of taming-transformers or latent diffusion and decodes it again.

python3 tokenizer/vqgan/taming_vqgan_demo.py --image-path photo.jpg --vqgan vqgan_openimage_f8_16384 --image-size 512
"""

from tokenizer.reconstruction_flags import image_script
from utils.cli import run_script

main, flags = image_script("vqgan", __doc__)

if __name__ == "__main__":
    run_script(main, flags())
