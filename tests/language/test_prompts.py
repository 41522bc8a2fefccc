"""Files of prompts: tables, and a prompt on each line."""

import pytest

from language.prompts import read_prompt_lines, read_prompt_table


def table(tmp_path, content: str | bytes) -> list[str]:
    path = tmp_path / "prompts.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompt_table(path)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("Prompt\na\nb", ["a", "b"]),
        ("Prompt\tCategory\na\t1\n\n\nb\t2\n\n", ["a", "b"]),
        ("x\t Prompt \n1\ta\n2\tb c \n", ["a", "b c "]),
        ("\ufeffPrompt\r\na\r\nb\r\n", ["a", "b"]),
        ('Prompt\n"a ""b"""\nsay "c"\n"d" e\n', ['a "b"', 'say "c"', "d e"]),
        ("Prompt\tNote\n一只猫\t1\nкот, 猫\t2\nun été\u2028à Paris\t3\n", ["一只猫", "кот, 猫", "un été\u2028à Paris"]),
        ("Prompt\n" + "a" * 300_000 + "\n", ["a" * 300_000]),
    ],
)
def test_tables(tmp_path, content, expected):
    assert table(tmp_path, content) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ("\n \n", r"no column Prompt; its columns are none"),
        ("Category\tText\na\tb\n", r"no column Prompt; its columns are 'Category', 'Text'"),
        ("Prompt,Category\na,b\n", r"no column Prompt; its columns are 'Prompt,Category' \(with tabs between them"),
        ("\nNote\nPrompt\n", r"no column Prompt; its columns are 'Note'"),
        ("Prompt\tNote\n", r"prompts\.tsv has no prompts below its first line"),
        ("Note\tPrompt\na\tb\nc\n", r"line 3 of .*prompts\.tsv has an empty Prompt"),
        ("Note\tPrompt\na\t \n", r"line 2 of .*prompts\.tsv has an empty Prompt"),
        ('Note\tPrompt\n1\t"a\nb"\n2\t\n', r"line 4 of .*prompts\.tsv has an empty Prompt"),
        ('Prompt\na\n"b\nc\nd\n', r"line 3 of .*prompts\.tsv opens a quotation mark that is never closed"),
        ('Prompt\na\n"b', r"line 3 of .*prompts\.tsv opens a quotation mark that is never closed"),
        ("Prompt\n" + "a" * 2_000_000 + "\n", r"cannot be read as a table .*field larger than field limit"),
        ("Prompt\ncaf\xe9\n".encode("latin-1"), r"prompts\.tsv is not UTF-8 text"),
        ("Prompt\na\n".encode("utf-16"), r"prompts\.tsv is not UTF-8 text"),
    ],
)  # fmt: skip
def test_tables_that_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, content)


def test_rows_of_several_lines_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"join several lines into one row \(lines 3 to 5\)"):
        assert table(tmp_path, 'Prompt\na\n"b\nc\nd"\ne\n') == ["a", "b\nc\nd", "e"]


def test_lists(tmp_path):
    (tmp_path / "prompts.txt").write_bytes('\ufeffa "b"\r\n\r\n c\td \nCafé\u2028x'.encode())
    assert read_prompt_lines(tmp_path / "prompts.txt") == ['a "b"', "c\td", "Café\u2028x"]
    (tmp_path / "prompts.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"prompts\.txt has no prompts"):
        read_prompt_lines(tmp_path / "prompts.txt")
    with pytest.raises(FileNotFoundError, match=r"no file of prompts at .*gone\.txt"):
        read_prompt_lines(tmp_path / "gone.txt")
