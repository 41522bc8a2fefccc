"""Links, pipes and other files in folders of images."""

import os
import socket

import pytest
from PIL import Image

from dataset.folders import class_folders, find_images, flat_folder, nested_folder

READERS = {
    "class": class_folders,
    "nested": nested_folder,
    "evaluation": find_images,
}


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")


@pytest.fixture
def data(tmp_path):
    for name in ("ant/1.png", "ant/2.png", "bee/1.png"):
        save(tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("target", ["..", ".", "../..", "/", "../bee/../ant"])
def test_link_to_a_folder_above_is_refused(data, read, target):
    (data / "ant" / "up").symlink_to(target)
    with pytest.raises(ValueError, match=r"ant/up leads back to"):
        read(data)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_links_that_double_at_every_level_are_refused_at_once(data, read):
    for level in range(40):
        save(data / f"c{level}" / "1.png")
        for name in ("x", "y"):
            (data / f"c{level}" / name).symlink_to(f"../c{level + 1}")
    save(data / "c40" / "1.png")
    with pytest.raises(ValueError, match="are one folder, whose images would be taken twice"):
        read(data)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_two_ways_to_one_folder_are_refused(data, read):
    (data / "cat").symlink_to("ant")
    with pytest.raises(ValueError, match=r"ant and .*cat are one folder|cat and .*ant are one folder"):
        read(data)


def test_links_to_folders_elsewhere_are_followed(data, tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "1.png")
    (data / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data_link").symlink_to(data)
    images = class_folders(tmp_path / "data_link")
    assert images.classes == ["ant", "bee", "cat"] and images.labels.tolist() == [0, 0, 1, 2]
    assert images.paths[3] == str(tmp_path / "data_link" / "cat" / "deep" / "1.png")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("place", ["aaa", "ant/more", "ant.old", "me"])
def test_folder_link_that_leads_nowhere_is_refused(data, read, place):
    (data / place).symlink_to("me" if place == "me" else "/nowhere/at/all")
    with pytest.raises(ValueError, match=rf"the link .*{place} leads nowhere"):
        read(data)


def test_image_link_that_leads_nowhere_keeps_its_place(data):
    (data / "ant" / "11.png").symlink_to("gone.png")
    images = class_folders(data)
    assert [os.path.basename(path) for path in images.paths] == ["1.png", "11.png", "2.png", "1.png"]
    assert images.labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_files_left_out_are_counted_in_the_log(data, read, caplog):
    os.mkfifo(data / "ant" / "pipe.png")
    (data / "ant" / "device.png").symlink_to("/dev/zero")
    unix = socket.socket(socket.AF_UNIX)
    place = os.getcwd()
    os.chdir(data / "ant")  # a socket's path is short
    unix.bind("s.png")
    os.chdir(place)
    for name in ("ant/a.heic", "ant/b.HEIC", "ant/._1.png", "bee/readme", "bee/x.svg"):
        (data / name).touch()
    with caplog.at_level("INFO", logger="dataset"):
        assert len(read(data)) == 3
    unix.close()
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("dataset")]
    assert line.startswith(f"{data}: 3 images; left out: 3 no regular file, 2 .heic, ")
    assert {"1 hidden", "1 without an ending", "1 .svg"} <= set(line.split("left out: ")[1].split(", "))


def test_folder_of_other_files_alone_says_what_is_there(tmp_path):
    (tmp_path / "a.heic").touch()
    for read in (flat_folder, nested_folder, class_folders):
        with pytest.raises(ValueError, match=r"no images in .* \(in it: 1 \.heic\)"):
            read(tmp_path)


def test_every_extension_is_found_and_the_order_of_others_stays(data):
    before = find_images(data)
    for ending in (".tif", ".TIFF", ".gif", ".jfif", ".avif", ".pgm", ".jp2", ".ico", ".mpo", ".qoi"):
        (data / "bee" / f"z{ending}").touch()
    found = find_images(data)
    assert found[: len(before)] == before and len(found) == len(before) + 10


def test_sub_folders_are_ordered_as_paths(tmp_path):
    for name in ("a/1.png", "a-b/1.png", "a/c/1.png", "a b/1.png"):
        save(tmp_path / name)
    assert find_images(tmp_path) == ["a/1.png", "a b/1.png", "a-b/1.png", "a/c/1.png"]
