"""Writes the centre crops of a folder of images, PNG files and an .npz: the reference that reconstructions are compared with.

    torchrun --nproc_per_node=8 tokenizer/validation/val_ddp.py --data-path imagenet/val --image-size 256

The crops are cut from the files at --image-size directly. Rerun the command to do what is missing.
"""

from tokenizer.reconstruction_flags import folder_script
from utils.cli import run_script

main, flags = folder_script("reference", __doc__)

if __name__ == "__main__":
    run_script(main, flags())
