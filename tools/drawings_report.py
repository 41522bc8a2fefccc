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

from utils.cli import flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    from tools.drawings import report_of
    from utils.files import write_json

    if (args.prompts is None) == (args.codes is None):
        raise ValueError("give --codes for drawings by class, or --prompts for drawings by name")
    output = Path(args.output)
    write_json(output / "report.json", report := report_of(args))
    print(json.dumps(report, indent=2))
    print(in_words(report, output, args))


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
