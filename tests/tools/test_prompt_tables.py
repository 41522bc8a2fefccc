"""tools/prompt_tables.py: what it downloads and what it makes of COCO's annotations, without the network."""

import json
import zipfile

import pytest

from language.prompts import read_prompt_table
from tools import prompt_tables
from tools.prompt_tables import COCO_MEMBER, COCO_URL, PARTI_URL, TABLES, flags, main


def run(*words):
    main(flags().parse_args(list(map(str, words))))


@pytest.fixture
def annotations(tmp_path):
    """Two captions for each of 30 images, and a third image's blank one."""
    captions = [{"image_id": 30 - i, "id": i, "caption": f"first  of\t{30 - i} \n"} for i in range(30)]
    captions += [{"image_id": 30 - i, "id": 100 + i, "caption": "second"} for i in range(30)]
    captions += [{"image_id": 77, "id": 7, "caption": " "}]
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps({"images": [], "annotations": captions}))
    return file


def test_coco_table_has_the_first_caption_of_images_drawn_by_the_seed(annotations, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("coco", "--annotations", annotations)
    assert read_prompt_table(TABLES["coco"]) == [f"first of {i}" for i in range(1, 31)]
    assert "evaluations/t2i/coco_captions.csv: 30 prompts" in capsys.readouterr().out
    drawn = []
    for seed in (0, 0, 1):
        run("coco", "--annotations", annotations, "--count", 5, "--seed", seed, "--output", "few.csv")
        drawn.append(read_prompt_table("few.csv"))
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 5
    assert drawn[0] == sorted(drawn[0], key=lambda prompt: int(prompt.split()[-1]))


def test_tables_are_downloaded_from_their_addresses(annotations, tmp_path, monkeypatch):
    asked = []

    def download(url, target, what):
        asked.append(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        if url == PARTI_URL:
            target.write_text("Prompt\tCategory\na bee\tAnimals\n")
        else:
            with zipfile.ZipFile(target, "w") as archive:
                archive.write(annotations, COCO_MEMBER)
        return target

    monkeypatch.setattr("utils.download.download", download)
    monkeypatch.chdir(tmp_path)
    run("parti")
    run("coco")
    assert asked == [PARTI_URL, COCO_URL]
    assert read_prompt_table(TABLES["parti"]) == ["a bee"] and len(read_prompt_table(TABLES["coco"])) == 30


@pytest.mark.parametrize("content", [b"", b"[]", b'{"annotations": [{"id": 3}]}', b"PK\x03\x04"])
def test_file_without_captions_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json has no captions of COCO"):
        prompt_tables.read_annotations(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        prompt_tables.read_annotations(tmp_path / "b.json")


def test_sampling_without_a_table_names_the_command_that_makes_it():
    for table, path in TABLES.items():
        with pytest.raises(FileNotFoundError, match=rf"no file of prompts at .*prompt_tables\.py {table}"):
            read_prompt_table(f"nowhere/{path}")
