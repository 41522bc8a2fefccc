"""Image files of any format and mode as RGB pixels."""

import os
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image, features

from dataset.augmentation import UnusableImage
from dataset.pixels import IMAGE_EXTENSIONS, PUBLISHED, Reading, load_rgb
from utils.cli import add_reading_flags, flag_parser

RAMP = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)  # of 16 bits, whose 8 bits are 0 to 255
RED_LEFT = np.zeros((8, 16, 3), np.uint8)
RED_LEFT[:, :8, 0] = 255


def pixels(path, reading=PUBLISHED):
    image = load_rgb(path, reading)
    assert image.mode == "RGB"
    return np.asarray(image)


# Formats


def test_extensions_are_what_pillow_decodes_by_itself():
    Image.init()
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    ours = set(IMAGE_EXTENSIONS) - ({".avif", ".avifs"} if not features.check("avif") else set())
    assert len(IMAGE_EXTENSIONS) == len(set(IMAGE_EXTENSIONS))
    assert ours - known <= {".mpo", ".qoi"}  # MPO is opened as JPEG
    assert IMAGE_EXTENSIONS[:6] == (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


@pytest.mark.parametrize(
    "ending", [".tif", ".tiff", ".gif", ".jfif", ".jpe", ".pgm", ".pnm", ".tga", ".ico", ".dds", ".jp2", ".apng"]
)
def test_load_rgb_of_each_format_gives_its_pixels(tmp_path, ending):
    file = tmp_path / f"a{ending}"
    Image.new("L" if ending == ".pgm" else "RGB", (16, 16), 200 if ending == ".pgm" else (200, 200, 200)).save(file)
    assert np.abs(pixels(file).astype(int) - 200).max() <= 2


@pytest.mark.parametrize("ending", [".gif", ".tif", ".png", ".webp"])
def test_load_rgb_of_several_pictures_reads_the_first(tmp_path, ending):
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / f"a{ending}", save_all=True, append_images=[second])
    assert pixels(tmp_path / f"a{ending}")[3, 3].tolist() == pytest.approx([255, 0, 0], abs=8)


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA"])
@pytest.mark.parametrize("reading", [Reading(), PUBLISHED])
def test_modes_become_rgb(tmp_path, mode, reading):
    grey = Image.fromarray(np.full((8, 8), 255, np.uint8))
    grey.convert(mode).save(tmp_path / ("a.tif" if mode == "PA" else "a.png"))
    assert pixels(tmp_path / ("a.tif" if mode == "PA" else "a.png"), reading).min() == 255


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK").save(tmp_path / "a.jpg")
    assert np.abs(pixels(tmp_path / "a.jpg") - np.asarray([255, 0, 0.0])).max() < 8


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
@pytest.mark.parametrize("reading", [Reading(), PUBLISHED])
def test_16_bit_grey_keeps_its_range(tmp_path, ending, reading):
    Image.fromarray(RAMP).save(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(pixels(tmp_path / f"a.{ending}", reading)[..., 0].ravel(), np.arange(256))


def test_16_bit_tiff_where_zero_is_white_is_inverted(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif")[..., 0].ravel(), np.arange(255, -1, -1))


def test_floats_from_0_to_1_keep_their_range(tmp_path):
    Image.fromarray((RAMP / 65280).astype(np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif")[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize(
    "values", [RAMP / 256.0, RAMP / 256.0 - 3, RAMP * np.nan, RAMP.astype(np.int32) * 9, RAMP // 256]
)
def test_pixels_without_a_known_white_are_refused(tmp_path, values):
    dtype = np.float32 if values.dtype.kind == "f" else np.int32
    Image.fromarray(values.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UnusableImage, match="pixels are"):
        load_rgb(tmp_path / "a.tif")


# Transparency


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGBA", {}),
        ("LA", {}),
        ("P", {"transparency": 0}),
        ("L", {"transparency": 0}),
        ("RGB", {"transparency": (0, 0, 0)}),
    ],
)
def test_transparency_shows_the_background(tmp_path, mode, options):
    image = Image.new("RGBA", (8, 8), (90, 90, 90, 255)).convert("L" if options else mode).convert(mode)
    image.paste(Image.new("RGBA", (8, 4), (0, 0, 0, 0)).convert(mode), (0, 0))
    image.save(tmp_path / "a.png", **options)
    for background, shown in [("#ffffff", 255), ("#0000ff", (0, 0, 255)), (None, 0)]:
        read = pixels(tmp_path / "a.png", Reading(background=background))
        assert (read[:4] == shown).all() and (read[4:] == 90).all(), background


def test_transparency_of_16_bit_grey_shows_the_background(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png", transparency=256)
    read = pixels(tmp_path / "a.png", Reading())[..., 0].ravel()
    assert read[:3].tolist() == [0, 255, 2]


def test_half_transparent_pixels_are_mixed_and_opaque_ones_untouched(tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (16, 16, 4), np.uint8)
    noise[..., 3] = 255
    noise[0, 0] = (0, 0, 0, 128)
    Image.fromarray(noise).save(tmp_path / "a.png")
    read = pixels(tmp_path / "a.png", Reading())
    assert read[0, 0].tolist() == pytest.approx([127, 127, 127], abs=1)
    np.testing.assert_array_equal(read[1:], noise[1:, :, :3])


# EXIF


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_turns_the_image(tmp_path, ending, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = Image.fromarray(
        np.kron(np.random.RandomState(0).randint(0, 256, (2, 3, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    )
    noise.save(tmp_path / f"a.{ending}", exif=exif)
    with Image.open(tmp_path / f"a.{ending}") as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    np.testing.assert_array_equal(pixels(tmp_path / f"a.{ending}", Reading()), np.asarray(expected))
    assert expected.size == ((16, 24) if 5 <= orientation <= 8 else (24, 16))
    if ending != "tif":  # whose orientation belongs to the format: Pillow always undoes it
        assert load_rgb(tmp_path / f"a.{ending}", PUBLISHED).size == (24, 16)


def test_damaged_exif_is_ignored(tmp_path):
    Image.fromarray(RED_LEFT).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xf0junk")
    assert load_rgb(tmp_path / "a.jpg").size == (16, 8)


# Files


def test_load_rgb_of_a_pipe_or_device_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    for name in ("a.png", "b.png"):
        with pytest.raises(ValueError, match="not a regular file"):
            load_rgb(tmp_path / name)


# Flags


@pytest.mark.parametrize(
    ("line", "recorded", "expected"),
    [
        ("", None, Reading()),
        ("--no-exif --background none", None, PUBLISHED),
        ("--background black", None, Reading(background="#000000")),
        ("--background #0f0", None, Reading(background="#00ff00")),
        ("", {}, PUBLISHED),  # a folder of the first edition
        ("", {"mixed_precision": "bf16"}, PUBLISHED),
        ("--exif", {}, Reading(exif=True, background=None)),
        ("", Reading().record(), Reading()),
        ("", PUBLISHED.record(), Reading()),  # refused by its record then
    ],
)
def test_reading_of_flags(line, recorded, expected):
    parser = flag_parser("")
    add_reading_flags(parser)
    assert Reading.of(parser.parse_args(line.split()), recorded) == expected
    assert Reading.of(Namespace(), recorded) == (
        PUBLISHED if recorded is not None and "exif" not in recorded else Reading()
    )


def test_background_that_is_no_colour_is_refused(capsys):
    parser = flag_parser("")
    add_reading_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--background", "whit"])
    assert "'whit' is no colour" in capsys.readouterr().err
