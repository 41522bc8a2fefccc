"""Judges a model trained on OpenMoji's people: pictures and report.json.

    python3 tools/drawings_report.py --drawings quickstart/drawings --codes quickstart/codes_held_out \\
        --gpt-ckpt quickstart/gpt --vq-ckpt quickstart/tokenizer --samples quickstart/samples --output quickstart

or, of drawings by name, with --prompts quickstart/drawings/prompts.tsv in place of --codes: the names of the held-out
drawings, whose compositions of role, person and tone were never trained on.

The judge is the nearest of all real drawings, by the mean square of the pixels' differences in [0, 1]. What it makes of
the tokenizer's reconstructions of held-out drawings is the bound: no GPT on these codes can do better. The distance to the
nearest training drawing, beside that of real drawings the model has not seen, tells how far a model copies.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import flag_parser, run_script

if TYPE_CHECKING:
    import numpy as np

    from autoregressive.models.trunk import Trunk
    from tools.drawings import Judge

COLUMNS = 12  # of samples.png


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from autoregressive.pipeline import load_gpt
    from tokenizer.load import load_tokenizer
    from tools.drawings import Judge
    from tools.stages import reconstruct, stage_seconds
    from utils.files import write_json
    from utils.images import make_grid, peak_signal_to_noise_ratio, save_png
    from utils.runs import find_checkpoint

    if (args.prompts is None) == (args.codes is None):
        raise ValueError("give --codes for drawings by class, or --prompts for drawings by name")
    output, judge = Path(args.output), Judge(Path(args.drawings))
    gpt = load_gpt(find_checkpoint(args.gpt_ckpt))
    tokenizer = load_tokenizer(find_checkpoint(args.vq_ckpt), fingerprint=gpt.file_config.get("tokenizer"))
    recons, _ = reconstruct(tokenizer, judge.held_out)
    ratios = [peak_signal_to_noise_ratio(a, b) for a, b in zip(judge.held_out, recons, strict=True)]
    shown = np.linspace(0, len(recons) - 1, 16).astype(int)
    save_png(
        make_grid(np.concatenate([judge.held_out[shown], recons[shown]]), columns=16), output / "reconstructions.png"
    )
    samples, own = of_prompts(args, judge) if args.prompts else of_classes(args, gpt, judge)
    report = {
        "seconds": stage_seconds(output / "seconds.tsv"),
        "psnr_held_out_db": float(np.mean(ratios)),
        "samples": len(samples),
        **own,
        "reconstructions_right": judge.kinds_right(recons),
        "mean_square_to_nearest_training_drawing": {
            "samples": float(np.median(judge.distances(samples, judge.train).min(1))),
            "reconstructions_of_training": judge.floor(tokenizer),
            "held_out": float(np.median(judge.distances(judge.held_out, judge.train).min(1))),
        },
    }
    write_json(output / "report.json", report)
    print(json.dumps(report, indent=2))
    print(in_words(report, output, args))


def of_classes(args: argparse.Namespace, gpt: "Trunk", judge: "Judge") -> tuple["np.ndarray", dict]:
    """Return samples by class, uint8 (n, H, W, 3), and their figures; draws samples.png, one of each class."""
    import numpy as np

    from autoregressive.train.evaluation import mean_loss
    from dataset.codes import open_codes
    from tools.stages import newest_file
    from utils.distributed import start
    from utils.images import labelled_grid, save_png

    names = [name.replace("-", " ") for name in gpt.file_config["classes"]]
    with np.load(newest_file(args.samples, "*.npz")) as archive:
        samples, asked = archive["arr_0"], archive["arr_1"]
    first = np.unique(asked, return_index=True)[1][: COLUMNS * 6]
    grid = labelled_grid(samples[first], [names[label] for label in asked[first]], COLUMNS, side=64)
    save_png(grid, Path(args.output) / "samples.png")
    return samples, {
        "nll_held_out_nats_per_token": mean_loss(gpt, open_codes(args.codes, random_view=False), 64, start("cpu")),
        "samples_role_as_asked": judge.roles_right(samples, [names[label] for label in asked]),
        "chance_of_a_role": 1 / len(names),
    }


def of_prompts(args: argparse.Namespace, judge: "Judge") -> tuple["np.ndarray", dict]:
    """Return samples by name, uint8 (n, H, W, 3), and their figures; draws samples.png, each beside the drawing that was held out."""
    import numpy as np

    from tools.stages import last_held_out_loss, samples_of_prompts
    from utils.images import labelled_grid, save_png

    texts = [kind["text"][1] for kind in judge.kinds["held_out"]]
    samples = samples_of_prompts(args.samples, texts)
    shown = np.linspace(0, len(samples) - 1, min(len(samples), COLUMNS * 3)).astype(int)
    pairs = np.concatenate([judge.held_out[shown], samples[shown]], axis=2)
    save_png(labelled_grid(pairs, [texts[i] for i in shown], COLUMNS // 2, side=128), Path(args.output) / "samples.png")
    return samples, {
        "nll_held_out_nats_per_token": last_held_out_loss(args.gpt_ckpt),
        "samples_as_asked": judge.kinds_right(samples),
        "chance": {name: 1 / len({kind[name] for kind in judge.kind}) for name in ("role", "person", "tone")},
    }


def in_words(report: dict, output: Path, args: argparse.Namespace) -> str:
    """Return the figures in a few sentences, where the pictures are, and what to try next."""
    near = report["mean_square_to_nearest_training_drawing"]
    if args.prompts:
        told = ", ".join(
            f"{name} {right:.1%} (chance {report['chance'][name]:.1%}, the tokenizer's bound "
            f"{report['reconstructions_right'][name]:.1%})"
            for name, right in report["samples_as_asked"].items()
        )
        asked = (
            f"{report['samples']} drawings of names never trained on, whose nearest real drawing is as asked: {told}."
        )
        more = (
            f"python3 autoregressive/sample/sample_t2i.py --gpt-ckpt {args.gpt_ckpt} --cfg-scale 1 --temperature 0.4 "
            '--top-k 0 --prompt "woman judge, dark skin tone"'
        )
    else:
        asked = f"""{report["samples_role_as_asked"]:.1%} of {report["samples"]} drawings are nearest to a real one of the role that was asked for (chance {report["chance_of_a_role"]:.1%})."""
        more = f"""python3 autoregressive/sample/sample_c2i.py --gpt-ckpt {args.gpt_ckpt} --labels cook judge astronaut "raising hand"
           python3 tools/draw_rows.py --gpt-ckpt {args.gpt_ckpt} --labels cook judge astronaut elf --output rows.gif
           bash scripts/quickstart.sh text"""
    return f"""
{asked}
They are {near["samples"]:.4f} (mean square, median) from the nearest training drawing; a training drawing's own reconstruction is
{near["reconstructions_of_training"]:.4f} from it, a held-out drawing {near["held_out"]:.4f}. The nearer to the first, the more a model repeats what it saw.

pictures   {output}/samples.png  {output}/reconstructions.png  {output}/training.png
figures    {output}/report.json

next       {more}"""


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--drawings", required=True, help="folder of make_drawings.py")
    parser.add_argument("--codes", default=None, help="packed codes of the held-out drawings, for drawings by class")
    parser.add_argument("--prompts", default=None, help="prompts.tsv of the drawings, for drawings by name")
    parser.add_argument("--gpt-ckpt", required=True, help="GPT")
    parser.add_argument("--vq-ckpt", required=True, help="tokenizer")
    parser.add_argument("--samples", required=True, help="--sample-dir of sample_c2i_ddp.py or sample_t2i_ddp.py")
    parser.add_argument("--output", required=True, help="folder for report.json and the pictures")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
