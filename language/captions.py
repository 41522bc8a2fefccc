"""Cleans captions of the web before a text encoder reads them: no addresses, markup, file names, article numbers, spam.

    clean_caption("IMG_2019.JPG A “smart” quote — see https://example.com/a")     # 'a "smart" quote - see'

It is the cleaning of DeepFloyd IF, twice over, which the released text-conditional models were trained with. What they
learned decides what is right here: a step that looks wrong (a bare 'click for more' goes, 'click here' stays) is kept.
Every pattern takes time in proportion to the text, but for the two of web addresses, which see words without spaces.
"""

import html
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_plus

from utils.extras import optional_imports

TIMES = 2
"""What one pass uncovers (an address inside escaped markup), the second removes."""

_SITES = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
_MARKS = "#®•©™&@·º½¾¿¡§~()[]{}|\\/*"


@dataclass(frozen=True)
class Step:
    """A named step of the cleaning."""

    name: str
    apply: Callable[[str], str]


def _replace(name: str, pattern: str, replacement: str = "") -> Step:
    """Return the step that replaces every match."""
    compiled = re.compile(pattern)
    return Step(name, lambda text: compiled.sub(replacement, text))


def _address(scheme: str) -> str:
    """Return a pattern of `scheme:` with its slashes or next sign, or a host and path that do not end before an @, as e-mail does."""
    host = rf"[a-zA-Z0-9.-]+\.(?:{_SITES})[\w/-]*\b/?(?!@)"
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{host})"


def _without_markup(text: str) -> str:
    """Return the text between HTML tags, entities decoded."""
    if "<" not in text and "&" not in text:
        return text
    with optional_imports():
        from bs4 import BeautifulSoup
        from bs4.builder import ParserRejectedMarkup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes a caption that is an address or a file name for a mistake
        try:
            return BeautifulSoup(text, features="html.parser").text
        except (ParserRejectedMarkup, RecursionError, ValueError):  # no markup after all, such as '<![x'
            return text


def _spaces_for_many_hyphens(text: str) -> str:
    """Write this-is-my-cute-cat and this_is_my_cute_cat as words, where the caption has more than three such signs."""
    return re.sub("[-_]", " ", text) if text.count("-") + text.count("_") > 3 else text


def _mended(text: str) -> str:
    """Mend mangled encodings, and decode entities that were encoded twice."""
    with optional_imports():
        import ftfy

    try:
        return html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    except ValueError:  # '&#' and thousands of digits
        return text.strip()


STEPS: tuple[Step, ...] = (
    Step("percent signs and pluses of an address decoded", unquote_plus),
    Step("lower case", lambda text: text.strip().lower()),
    _replace("a blanked-out name is a person", "<person>", "person"),
    _replace("web addresses", _address("https?")),
    _replace("web addresses after www:", _address("www")),
    Step("text between HTML tags", _without_markup),
    _replace("@nicknames", r"@\w+\b"),
    _replace("Chinese characters and signs of the blocks before them", "[\u31c0-\u9fff]+"),
    _replace("every dash is a hyphen", f"[{_DASHES}]+", "-"),
    _replace("every double quotation mark is straight", "[`´«»“”¨]", '"'),
    _replace("every single one too", "[‘’]", "'"),
    _replace("quotation marks left encoded", "&quot;?"),
    _replace("ampersands left encoded", "&amp"),
    _replace("IP addresses", r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    _replace("an article's number or time at the end", r"\d:\d\d\s+$"),
    _replace("line ends written as backslash n", r"\\n", " "),
    _replace("#123", r"#\d{1,3}\b"),
    _replace("#12345 and longer", r"#\d{5,}\b"),
    _replace("numbers of six digits or more", r"\b\d{6,}\b"),
    # From the beginning of a word only: later ones of the same word cannot match where that does not.
    _replace("file names, with all before them up to a space", rf"(?<!\S)\S+\.(?:{_FILES})"),
    _replace("quotation marks in a row", "[\"']{2,}", '"'),
    _replace("full stops in a row", r"\.{2,}", " "),
    _replace("signs that are no punctuation", f"[{re.escape(_MARKS)}]+", " "),
    _replace("a full stop on its own", r"(?<!\s)\s+\.\s+", " "),
    Step("words of a name in one piece", _spaces_for_many_hyphens),
    Step("broken encodings", _mended),
    _replace("article numbers as jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b"),
    _replace("article numbers as jc6640vc", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"),
    _replace("article numbers as 6640vc231", r"\b\d+[a-zA-Z]+\d+\b"),
    _replace("free shipping", r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    _replace("free download", r"(?:free\s)?download(?:\sfree)?"),
    _replace("click for more", r"\bclick\b\s(?:for|on)\s\w+"),
    _replace("kinds of files", rf"\b(?:{_FILES})(?:\simages?)?"),
    _replace("page numbers", r"\bpage\s+\d+\b"),
    _replace("article numbers as j2d1a2a", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    # The sign between may be Latin, Cyrillic or the one of multiplication.
    _replace("sizes as 1920x1080", r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b"),
    _replace("no space before a colon", r"\b\s+:\s+", ": "),
    _replace("a space after a comma, full stop or slash", r"(\D[,./])\b", r"\1 "),
    _replace("one space between words", r"\s+", " "),
    _replace("quotation marks around all", r"^[\"']([\w\W]+)[\"']$", r"\1"),
    _replace("a sign before the first word", r"^['_,\-:;]"),
    _replace("a sign after the last", r"['_,\-:+]$"),
    _replace("nothing but a full stop and a word", r"^\.\S+$"),
    Step("no space around", str.strip),
)
"""The steps of one pass, in their order."""


def clean_caption(text: str) -> str:
    """Return the caption as T5 reads it in extraction and in sampling. May be empty: nothing was left that says something.

    Raises ValueError where `text` is no string.
    """
    if not isinstance(text, str):
        raise ValueError(f"a caption is a string, got {text!r}")
    for _ in range(TIMES):
        for step in STEPS:
            text = step.apply(text)
    return text
