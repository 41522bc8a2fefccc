"""Describes scikit-learn's handwritten digits in words: image-text pairs for a first text-to-image model, without a download.

    python3 tools/make_digit_captions.py --output quickstart/tiny/text/digits

leaves train.jsonl and held_out.jsonl, with lines {"image_path": ..., "text": [short, long, its first sentence]} as the
published text-conditional training reads them, to be extracted from together, and each again in a folder of its own, to
be trained and validated on; images/; and prompts.tsv, what to ask for, worded as no caption is. A caption says what is
true of the scan: its digit, which way it leans and how heavy it is among the digits of its kind. The split is that of
make_digits.py; of each training scan there are several views, each with a caption of its own.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {word} or {figure} is the digit. A caption is an opening, an article, adjectives, a name, and what follows the name.
OPENINGS = ("", "", "a scan of ", "a picture of ", "this is ")
ARTICLES = ("a ", "the ", "")
NAMES = ("{word}", "{figure}", "digit {word}", "digit {figure}", "number {word}", "number {figure}", "figure {word}")
# What to ask for, in the words of captions but in orders that none of them has.
UNSEEN = (
    "{stroke} strokes, {slant}: {word}",
    "{figure}, a {stroke} digit",
    "{slant}: the number {word}",
    "{word}, handwritten",
    "a {word} in a picture",
    "by hand: the figure {figure}",
    "the scan of {figure} in {stroke}",
    "a digit written {slant}, the {word}",
)


def main(args: argparse.Namespace) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    from tools.digits import attribute_limits, attributes
    from tools.stages import write_pairs
    from utils.files import atomic_write
    from utils.images import is_whole_png, save_png

    digits = load_digits()
    output, every = Path(args.output), args.held_out_every
    numbers = np.arange(len(digits.target))
    held_out = numbers % every == every - 1
    pixels = np.clip(digits.images * 255 / 16, 0, 255).round().astype(np.uint8)
    whole = np.stack([np.asarray(view(Image.fromarray(scan), args.image_size, None)) for scan in pixels])
    limits = attribute_limits(whole[~held_out], digits.target[~held_out])
    wanted = numbers < (args.scans or len(numbers))
    for split, chosen in (("train", wanted & ~held_out), ("held_out", wanted & held_out)):
        lines = []
        for i in np.flatnonzero(chosen):
            digit = int(digits.target[i])
            slant, stroke = attributes(whole[i], digit, limits)
            for k in range(args.views if split == "train" else 1):
                for_view, for_words = (np.random.default_rng((int(i), k, use)) for use in (0, 1))
                path = output / "images" / f"{i:04d}-{k}.png"
                if not is_whole_png(path):
                    image = view(Image.fromarray(pixels[i]), args.image_size, for_view if k else None)
                    save_png(image.convert("RGB"), path)
                short, long = (fill(wording(for_words, all_told), digit, slant, stroke) for all_told in (False, True))
                pair = {"image_path": f"images/{path.name}", "text": [short, f"{long}.", long]}
                lines.append({**pair, "digit": digit, "slant": slant, "stroke": stroke})
        write_pairs(output, split, lines)
        print(f"{output / split}.jsonl: {len(lines)} captions of {chosen.sum()} digits")
    with atomic_write(output / "prompts.tsv") as f:
        f.write(prompt_table(args.prompts).encode())
    print(f"{output / 'prompts.tsv'}: {args.prompts} prompts")


def wording(rng: "np.random.Generator", whole: bool) -> str:
    """Return a caption's wording: one of some thousand. whole: it tells both slant and stroke, else one of them or none."""
    told = {"slant", "stroke"} if whole else {("slant", "stroke", "")[rng.integers(3)]}
    stroke = ("{stroke} ", " in {stroke} strokes")[rng.integers(2)] if "stroke" in told else ""
    before, after = (stroke, "") if stroke.endswith(" ") else ("", stroke)
    by_hand = ("handwritten ", " written by hand", "", "")[rng.integers(4)]
    before, after = (before + by_hand, after) if by_hand.endswith(" ") else (before, by_hand + after)
    if "slant" in told:
        after += (", {slant}", " {slant}")[rng.integers(2)]
    opening, article, name = (choices[rng.integers(len(choices))] for choices in (OPENINGS, ARTICLES, NAMES))
    return opening + article + before + name + after


def prompt_table(count: int) -> str:
    """Tab-separated text with the columns Prompt, Digit, Slant, Stroke: each digit in turn, then the next wording.

    An attribute that the wording leaves open is empty.
    """
    from tools.digits import SLANTS, STROKES

    rows = ["Prompt\tDigit\tSlant\tStroke"]
    for number in range(count):
        digit, turn = number % 10, number // 10
        template = UNSEEN[turn % len(UNSEEN)]
        # Three attributes and eight wordings: in 24 turns every wording meets each attribute.
        slant, stroke = SLANTS[(turn + digit) % 3], STROKES[(turn // 3 + digit) % 3]
        asked = (slant if "{slant}" in template else "", stroke if "{stroke}" in template else "")
        rows.append("\t".join([fill(template, digit, slant, stroke), str(digit), *asked]))
    return "\n".join(rows) + "\n"


def fill(template: str, digit: int, slant: str, stroke: str) -> str:
    """Return a template's sentence."""
    return template.format(word=WORDS[digit], figure=digit, slant=slant, stroke=stroke)


def view(scan: "Image.Image", size: int, rng: "np.random.Generator | None") -> "Image.Image":
    """Return the scan at `size` pixels a side; with a generator a crop of it enlarged by up to a tenth, as ten crops give."""
    from PIL import Image

    if rng is None:
        return scan.resize((size, size), Image.Resampling.BICUBIC)
    large = int(rng.integers(size + 1, round(size * 1.1) + 1))
    left, top = (int(value) for value in rng.integers(0, large - size + 1, 2))
    return scan.resize((large, large), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--image-size", type=positive_int, default=32, help="pixels a side")
    parser.add_argument("--held-out-every", type=positive_int, default=5, help="one scan in this many is held out")
    parser.add_argument("--scans", type=positive_int, default=None, help="only the first so many (default: all 1,797)")
    parser.add_argument("--views", type=positive_int, default=3, help="views and captions of each training scan")
    parser.add_argument("--prompts", type=positive_int, default=240, help="lines of prompts.tsv")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
