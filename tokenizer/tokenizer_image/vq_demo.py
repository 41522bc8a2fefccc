"""Encodes one image and decodes it again: the reconstruction goes to --output-dir.

python3 tokenizer/tokenizer_image/vq_demo.py --image-path photo.jpg --vq-ckpt vq_ds16_c2i.pt --image-size 512
"""

from tokenizer.reconstruction_flags import image_script
from utils.cli import run_script

main, flags = image_script("vq", __doc__)

if __name__ == "__main__":
    run_script(main, flags())
