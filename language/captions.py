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
from functools import partial
from urllib.parse import unquote_plus

from utils.extras import optional_imports

TIMES = 2
"""What one pass uncovers (an address inside escaped markup), the second removes."""

_SITES = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
_MARKS = "#®•©™&@·º½¾¿¡§~()[]{}|\\/*"


def _replace(pattern: str, replacement: str = "") -> Callable[[str], str]:
    """Return the step that replaces every match."""
    return partial(re.compile(pattern).sub, replacement)


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


STEPS: dict[str, Callable[[str], str]] = {
    "percent signs and pluses of an address decoded": unquote_plus,
    "lower case": lambda text: text.strip().lower(),
    "a blanked-out name is a person": _replace("<person>", "person"),
    "web addresses": _replace(_address("https?")),
    "web addresses after www:": _replace(_address("www")),
    "text between HTML tags": _without_markup,
    "@nicknames": _replace(r"@\w+\b"),
    "Chinese characters and signs of the blocks before them": _replace("[\u31c0-\u9fff]+"),
    "every dash is a hyphen": _replace(f"[{_DASHES}]+", "-"),
    "every double quotation mark is straight": _replace("[`´«»“”¨]", '"'),
    "every single one too": _replace("[‘’]", "'"),
    "quotation marks left encoded": _replace("&quot;?"),
    "ampersands left encoded": _replace("&amp"),
    "IP addresses": _replace(r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    "an article's number or time at the end": _replace(r"\d:\d\d\s+$"),
    "line ends written as backslash n": _replace(r"\\n", " "),
    "#123": _replace(r"#\d{1,3}\b"),
    "#12345 and longer": _replace(r"#\d{5,}\b"),
    "numbers of six digits or more": _replace(r"\b\d{6,}\b"),
    # From the beginning of a word only: later ones of the same word cannot match where that does not.
    "file names, with all before them up to a space": _replace(rf"(?<!\S)\S+\.(?:{_FILES})"),
    "quotation marks in a row": _replace("[\"']{2,}", '"'),
    "full stops in a row": _replace(r"\.{2,}", " "),
    "signs that are no punctuation": _replace(f"[{re.escape(_MARKS)}]+", " "),
    "a full stop on its own": _replace(r"(?<!\s)\s+\.\s+", " "),
    "words of a name in one piece": _spaces_for_many_hyphens,
    "broken encodings": _mended,
    "article numbers as jc6640": _replace(r"\b[a-zA-Z]{1,3}\d{3,15}\b"),
    "article numbers as jc6640vc": _replace(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"),
    "article numbers as 6640vc231": _replace(r"\b\d+[a-zA-Z]+\d+\b"),
    "free shipping": _replace(r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    "free download": _replace(r"(?:free\s)?download(?:\sfree)?"),
    "click for more": _replace(r"\bclick\b\s(?:for|on)\s\w+"),
    "kinds of files": _replace(rf"\b(?:{_FILES})(?:\simages?)?"),
    "page numbers": _replace(r"\bpage\s+\d+\b"),
    "article numbers as j2d1a2a": _replace(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    # The sign between may be Latin, Cyrillic or the one of multiplication.
    "sizes as 1920x1080": _replace(r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b"),
    "no space before a colon": _replace(r"\b\s+:\s+", ": "),
    "a space after a comma, full stop or slash": _replace(r"(\D[,./])\b", r"\1 "),
    "one space between words": _replace(r"\s+", " "),
    "quotation marks around all": _replace(r"^[\"']([\w\W]+)[\"']$", r"\1"),
    "a sign before the first word": _replace(r"^['_,\-:;]"),
    "a sign after the last": _replace(r"['_,\-:+]$"),
    "nothing but a full stop and a word": _replace(r"^\.\S+$"),
    "no space around": str.strip,
}
"""The steps of one pass by name, in their order."""


def clean_caption(text: str) -> str:
    """Return the caption as T5 reads it in extraction and in sampling. May be empty: nothing was left that says something.

    Raises ValueError where `text` is no string.
    """
    if not isinstance(text, str):
        raise ValueError(f"a caption is a string, got {text!r}")
    for _ in range(TIMES):
        for step in STEPS.values():
            text = step(text)
    return text
