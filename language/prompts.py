"""Prompts of a file and their features: made once by language/extract_t5_feature.py, then drawn from without the T5.

    prompts = read_prompts("PartiPrompts.tsv")                    # a table with a column Prompt, or a prompt a line
    pairs = PromptList("parti.tsv", prompts)                      # what extraction reads where --data-path is a file
    features = PromptFeatures("t5_features", "parti.tsv", prompts, dim=2048)
    rows = features[17]                                           # (length, 2048), of prompt 17

Features lie under the file's name without its ending and the prompt's number from 0.
"""

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dataset.lines import CaptionLines, compare_folder, digest_all
from dataset.text_features import EXTRACTION, Features

# A longer cell is a quotation mark that is closed far below, not a prompt.
csv.field_size_limit(1 << 20)


def read_prompts(path: str | Path) -> list[str]:
    """Read the prompts of a file: of a .tsv or .csv file its column `Prompt`, of another its lines. Raises as these two do."""
    return (read_prompt_table if Path(path).suffix.lower() in (".tsv", ".csv") else read_prompt_lines)(path)


def read_prompt_lines(path: str | Path) -> list[str]:
    """Read the prompts of a text file, one a line; blank lines are passed over.

    Raises FileNotFoundError, and ValueError where the file is not UTF-8 or has no prompt.
    """
    prompts = [line.strip() for line in _lines(Path(path), "it has a prompt on each line") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts: it has a prompt on each line")
    return prompts


def read_prompt_table(path: str | Path) -> list[str]:
    """Read the column `Prompt` of a table with tabs between its columns and their names in the first line.

    A cell may stand in quotation marks, and then have tabs, line ends and doubled marks in it. Blank lines are passed
    over. Raises FileNotFoundError, and ValueError that names the line: no such column, no rows, an empty prompt, a
    quotation mark that is never closed, or bytes that are not UTF-8.
    """
    hint = (
        "`python3 tools/prompt_tables.py parti` gets the one of https://github.com/google-research/parti, "
        "`python3 tools/prompt_tables.py coco` makes one of COCO's captions; any table with tabs between its columns and a "
        "column named Prompt in its first line will do"
    )
    lines = _lines(Path(path), hint)
    rows = csv.reader(lines, delimiter="\t")
    prompts, spread = [], []
    try:
        names = [name.strip() for name in next((row for row in rows if any(map(str.strip, row))), [])]
        if "Prompt" not in names:
            listed = ", ".join(map(repr, names)) or "none"
            raise ValueError(f"{path} has no column Prompt; its columns are {listed} (with tabs between them)")
        column, first = names.index("Prompt"), rows.line_num + 1
        for row in rows:
            if len(row) > column and row[column].strip():
                prompts.append(row[column])
            elif row:
                raise ValueError(f"line {first} of {path} has an empty Prompt: fill it in, or remove the line")
            if rows.line_num > first:
                spread.append(f"{first} to {rows.line_num}")
            last_row, first = first, rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table with tabs between its columns: {error}") from error
    if not prompts:
        raise ValueError(f"{path} has no prompts below its first line")
    try:
        list(csv.reader(lines[last_row - 1 :], delimiter="\t", strict=True))
    except csv.Error as error:  # a mark that is never closed took all last lines for one prompt
        if "unexpected end of data" in str(error):
            raise ValueError(
                f"line {last_row} of {path} opens a quotation mark that is never closed: double it"
            ) from error
    if spread:
        warnings.warn(
            f"{path}: quotation marks join several lines into one row (lines {', '.join(spread[:5])}); if that is not meant, "
            "double them",
            stacklevel=2,
        )
    return prompts


def _lines(path: Path, hint: str) -> list[str]:
    """Return the lines of a text file with their ends as they are, since within quotation marks they belong to a prompt."""
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}: {hint}")
    try:
        return list(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


class PromptList:
    """A file's prompts as extraction takes captions: one file of pairs that have a text and no image."""

    def __init__(self, path: str | Path, prompts: Sequence[str]):
        self.path, self.prompts = Path(path), prompts
        self.files = [(self.path.stem, len(prompts))]

    def __len__(self) -> int:
        return len(self.prompts)

    def texts(self, index: int) -> list[str]:
        """Return the prompt as the only text."""
        return [self.prompts[index]]

    def list_digest(self, k: int) -> str:
        """Return what the prompts come to."""
        return digest_all(self.prompts)

    def where(self, index: int) -> str:
        """Return a prompt's place, for messages."""
        return f"prompt {index} (from 0) of {self.path}"


class PromptFeatures:
    """The features of every prompt of a file, packed or in the published layout, by the prompt's number.

    folder: as extraction wrote it of the file at `path`, or of a list of the same name. prompts: those of the file now.
    Raises FileNotFoundError where the folder is missing, ValueError where it has no features of such a file, of other
    prompts, of another number, not of each of them, or of another width than `dim`.
    """

    def __init__(self, folder: str | Path, path: str | Path, prompts: Sequence[str], dim: int | None = None):
        self.stem, self.store = Path(path).stem, Features(folder, dim=dim)
        self.folder = self.store.folder / self.stem
        there = self.store.present(self.stem)
        again = f"extract them anew by {EXTRACTION} --data-path {path}"
        if not len(there):
            raise ValueError(
                f"{folder} has no features of {path}: a folder {self.stem}/ is looked for. To get them, {again}"
            )
        count, missing = len(prompts), (~there).nonzero()[0].tolist()
        if len(there) != count:
            raise ValueError(f"{self.folder} has features of {len(there)} prompts and {path} has {count}: {again}")
        if missing:
            raise ValueError(
                f"{self.folder} has no features of {len(missing)} of {count} prompts ({missing[0]}, from 0): {again}"
            )
        compare_folder(self.store.folder, CaptionLines(PromptList(path, prompts)), self.store.lines)

    def __getitem__(self, index: int) -> Tensor:
        return self.store.get(self.stem, index)
