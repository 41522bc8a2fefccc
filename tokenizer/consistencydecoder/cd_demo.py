"""Encodes one image and decodes it by OpenAI's consistency decoder.

python3 tokenizer/consistencydecoder/cd_demo.py --image-path photo.jpg --image-size 512 --seed 0
"""

from tokenizer.reconstruction_flags import image_script
from utils.cli import run_script

main, flags = image_script("consistency-decoder", __doc__)

if __name__ == "__main__":
    run_script(main, flags())
