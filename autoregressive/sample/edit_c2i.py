"""Fills a hole in a picture, or draws its surroundings, with a class-conditional model.

python3 autoregressive/sample/edit_c2i.py --gpt-ckpt c2i_L_384.pt --image dog.png --mask hole.png --label "golden retriever"
"""

import argparse

from autoregressive.sample.editing import picture_to_edit, write_edits
from autoregressive.sample.flags import editing_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from autoregressive.class_names import class_choice, class_names, find_class
    from autoregressive.sample.common import build_pipeline
    from utils.distributed import pick_device

    if args.gpt_type != "c2i":
        raise ValueError("edit_c2i.py draws from class-conditional models; for captions there is edit_t2i.py")
    image, hole = picture_to_edit(args)  # what is wrong with files is told before the models are read
    pipeline, _, _ = build_pipeline(args, pick_device(args.device), args.batch_size)
    names = class_names(pipeline.gpt.args.num_classes, recorded=pipeline.gpt.file_config.get("classes"))
    label = find_class(args.label, names)
    print("class:", class_choice(label, names[label]))
    negative = None if args.negative_class is None else find_class(args.negative_class, names)
    write_edits(args, pipeline, image, hole, asked=label, negative_classes=negative)


def flags() -> argparse.ArgumentParser:
    parser = editing_flags(__doc__, "edit_c2i.png", "class")
    parser.add_argument("--label", required=True, help="class of the picture, by name or number")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
