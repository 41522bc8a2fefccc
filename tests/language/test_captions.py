"""Caption cleaning: the recorded captions, every step on its own, and text nobody expected."""

import json
import re

import pytest

from language.captions import STEPS, clean_caption
from tests.helpers import GOLDEN

RECORDED = json.loads((GOLDEN / "captions.json").read_text())


def test_recorded_captions():
    assert len(RECORDED) == 20
    for pair in RECORDED:
        assert clean_caption(pair["caption"]) == pair["clean"], pair["caption"]


CASES = [
    ("percent signs and pluses of an address decoded", "a%20red+fox%2Ca", "a red fox,a"),
    ("percent signs and pluses of an address decoded", "50% off", "50% off"),
    ("lower case", "  A Red FOX ", "a red fox"),
    ("a blanked-out name is a person", "<person> and <person>", "person and person"),
    ("web addresses", "at https://foo.com/a-b/c.html here", "at .html here"),
    ("web addresses", "at shop.foo.co/a-b here", "at  here"),
    ("web addresses", "see foo.com/", "see "),
    ("web addresses", "write to me@foo.org", "write to me@"),
    ("web addresses", "write to foo.org@bar", "write to foo.org@bar"),
    ("web addresses", "no foo.xyz here", "no foo.xyz here"),
    ("web addresses after www:", "www://foo", "foo"),
    ("text between HTML tags", "<b>bold</b> &amp; <br/>plain", "bold & plain"),
    ("text between HTML tags", "<a href='x'>link</a>", "link"),
    ("text between HTML tags", "1 < 2", "1 < 2"),
    ("@nicknames", "thanks @fox_2, and a @ b", "thanks , and a @ b"),
    ("Chinese characters and signs of the blocks before them", "a 上海 fox ㍿ カ", "a  fox  カ"),
    ("every dash is a hyphen", "a — b ‒― c", "a - b - c"),
    ("every double quotation mark is straight", "“a” «b» `c´", '"a" "b" "c"'),
    ("every single one too", "‘a’", "'a'"),
    ("quotation marks left encoded", "&quot;a&quot", "a"),
    ("ampersands left encoded", "a &amp; b", "a ; b"),
    ("IP addresses", "at 192.168.0.1 now", "at   now"),
    ("IP addresses", "version 1.2.3", "version 1.2.3"),
    ("an article's number or time at the end", "at 10:30  ", "at 1"),
    ("an article's number or time at the end", "at 10:30", "at 10:30"),
    ("line ends written as backslash n", r"a\nb", "a b"),
    ("#123", "#1 #123 #1234 fox", "  #1234 fox"),
    ("#12345 and longer", "#1234 #12345 fox", "#1234  fox"),
    ("numbers of six digits or more", "12345 123456 1234567", "12345  "),
    ("file names, with all before them up to a space", "my a/b/dog.jpg.png fox", "my  fox"),
    ("file names, with all before them up to a space", ".jpg a.mp4x", ".jpg x"),
    ("quotation marks in a row", "''a\"' b'c", '"a" b\'c'),
    ("full stops in a row", "a...b.c", "a b.c"),
    ("signs that are no punctuation", "***a*** #b (c) [d]/e", " a   b  c   d e"),
    ("signs that are no punctuation", r"a\b {c}|d ½", "a b  c d  "),
    ("a full stop on its own", "a  . b. c", "a b. c"),
    ("words of a name in one piece", "this-is-my-cute-cat", "this is my cute cat"),
    ("words of a name in one piece", "a_b-c_d", "a_b-c_d"),
    ("broken encodings", "itâ€™s &amp;lt; ﬁne", "it's < fine"),
    ("article numbers as jc6640", "jc6640 jcxx6640 j66", " jcxx6640 j66"),
    ("article numbers as jc6640vc", "jc6640vc jc6640", " jc6640"),
    ("article numbers as 6640vc231", "6640vc231 6640vc", " 6640vc"),
    ("free shipping", "worldwide free shipping, free  shipping, shipping", ", , "),
    ("free shipping", "free fox", "free fox"),
    ("free download", "free download, download free, downloads", ", , s"),
    ("click for more", "click for more, click here, click on it", ", click here, "),
    ("kinds of files", "png images, a jpg, pdfs, xpng", ", a , s, xpng"),
    ("page numbers", "page 12 of pages 3", " of pages 3"),
    ("article numbers as j2d1a2a", "j2d1a2a 1a2 a1b2", "  1a2  "),
    ("sizes as 1920x1080", "1920x1080 3.5×2 4х4 10x", "   10x"),
    ("sizes as 1920x1080", "12x10.5_", "5_"),
    ("no space before a colon", "a : b", "a: b"),
    ("a space after a comma, full stop or slash", "a,b.c 1,000", "a, b. c 1,000"),
    ("one space between words", "a \t\n b", "a b"),
    ("quotation marks around all", "\"a 'b'\"", "a 'b'"),
    ("a sign before the first word", "--a", "-a"),
    ("a sign before the first word", ";a", "a"),
    ("a sign after the last", "a+-", "a+"),
    ("nothing but a full stop and a word", ".html", ""),
    ("nothing but a full stop and a word", ".html a", ".html a"),
    ("no space around", " a ", "a"),
]


@pytest.mark.parametrize(
    ("name", "text", "expected"), CASES, ids=[f"{i}-{case[0][:20]}" for i, case in enumerate(CASES)]
)
def test_a_step(name, text, expected):
    assert STEPS[name](text) == expected


def test_every_step_has_a_case():
    assert set(STEPS) == {name for name, _, _ in CASES}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \t\n", ""),
        ("photo.jpg", ""),
        ("ein grüner Überzug, naïve café", "ein grüner überzug, naïve café"),
        ("красный фонарь", "красный фонарь"),
        ("قطة على كرسي", "قطة على كرسي"),
        ("ひらがな カタカナ 漢字", "ひらがな カタカナ"),
        ("a fox 🦊 and a 🏳️‍🌈", "a fox 🦊 and a 🏳️\u200d🌈"),
        ("a\x00fox\x07\x1b[31m", "afox 31m"),
        ("line one\r\nline two", "line one line two"),
        ("&amp;lt;b&amp;gt;deep&amp;lt;/b&amp;gt;", "lt;b gt;deep lt; b gt;"),
        ("<script>alert(1)</script> fox", "fox"),
        ("<![x fox", None),
        ("<!-- fox", None),
        ("\ud800 half a pair", "\ufffd half a pair"),
        ("&#" + "1" * 5000 + "; fox", "fox"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_text_nobody_expected(text, expected):
    cleaned = clean_caption(text)
    cleaned.encode()  # a tokenizer takes it
    assert cleaned == cleaned.strip() == cleaned.lower()
    if expected is not None:
        assert cleaned == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit", ["a", "1", "a ", "_", "-", "a1", "<", "<b>", "&", "&#", "'", ".", "a.", "a@", "1.1", "上", "%25", "free "]
)
@pytest.mark.slow
def test_long_text_comes_to_an_end(unit):
    """Patterns that try every split of a long word would take longer than the test may."""
    for text in ((unit * 10_000)[:10_000] + "_", "1" * 3000 + "x" + (unit * 6000)[:6000] + "_"):
        cleaned = clean_caption(text)
        assert cleaned == cleaned.strip().lower()


def test_only_strings():
    for wrong in (None, 7, b"fox", ["fox"]):
        with pytest.raises(ValueError, match=re.escape(repr(wrong))):
            clean_caption(wrong)
