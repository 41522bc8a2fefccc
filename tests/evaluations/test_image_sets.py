"""Reading images for evaluation: any place of an .npz or a folder, and what is wrong with one said clearly."""

import numpy as np
import pytest
from PIL import Image

from evaluations.image_sets import open_images, save_statistics
from evaluations.metrics import Statistics

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (11, 6, 8, 3), dtype=np.uint8)


def write(tmp_path, save=np.savez, **arrays):
    save(tmp_path / "images.npz", **arrays)
    return tmp_path / "images.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("start", "stop", "batch"), [(0, 11, 4), (0, 11, 64), (3, 9, 4), (10, 11, 4), (4, 4, 2), (0, 5, 5)]
)
def test_any_range_of_an_archive(tmp_path, save, start, stop, batch):
    images = open_images(write(tmp_path, save, arr_0=IMAGES, arr_1=np.arange(11)))
    assert (images.kind, images.count, images.size) == ("npz", 11, (6, 8))
    assert images.labels.tolist() == list(range(11))
    parts = list(images.batches(start, stop, batch))
    assert all(len(part) <= batch and part.dtype == np.uint8 for part in parts)
    assert np.array_equal(np.concatenate([IMAGES[:0], *parts]), IMAGES[start:stop])


def test_an_archive_of_the_sampling_script(tmp_path):
    from utils.images import write_image_npz

    write_image_npz(tmp_path / "a.npz", iter(IMAGES), IMAGES.shape, np.arange(11))
    images = open_images(tmp_path / "a.npz")
    assert np.array_equal(np.concatenate(list(images.batches(2, 9, 3))), IMAGES[2:9])
    assert images.labels[5] == 5


def test_statistics_with_and_without_images(tmp_path):
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2, dtype=np.float32)}
    images = open_images(write(tmp_path, **arrays))
    assert (images.kind, images.count, images.size, images.features) == ("statistics", 0, None, None)
    assert images.statistics[1].covariance.dtype == np.float64
    images = open_images(write(tmp_path, arr_0=IMAGES, pool=np.ones((4, 3), np.float32), **arrays))
    assert (images.kind, images.count) == ("statistics", 11)
    assert images.features.shape == (4, 3)
    again = open_images(save(tmp_path, images))
    assert again.made == {"size": 4} and again.statistics[0].count == 7 and again.features.shape == (4, 3)


def save(tmp_path, images):
    first, second = images.statistics
    first = Statistics(first.mean, first.covariance, 7)
    save_statistics(tmp_path / "again.npz", [first, second], images.features, {"size": 4})
    return tmp_path / "again.npz"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, r"no arr_0 .*it holds images"),
        ({"mu": np.zeros(3)}, r"no arr_0 .*it holds mu"),
        (
            {"mu": np.zeros(8), "sigma": np.eye(7)},
            r"mu, sigma are float64 \(8,\) and float64 \(7, 7\), expected finite",
        ),
        ({"mu": np.full(8, np.nan), "sigma": np.eye(8)}, r"expected finite floats"),
        ({"mu": np.array([None]), "sigma": np.eye(8)}, r"not a whole .npz"),
        ({"arr_0": IMAGES / 255}, r"arr_0 is float64 \(11, 6, 8, 3\), expected uint8.*255"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"arr_0 is uint8 \(11, 3, 6, 8\), expected"),
        ({"arr_0": IMAGES[0]}, r"arr_0 is uint8 \(6, 8, 3\), expected"),
        ({"arr_0": IMAGES[:0]}, r"arr_0 is uint8 \(0, 6, 8, 3\), expected"),
        ({"arr_0": np.asfortranarray(IMAGES)}, r"Fortran order"),
        ({"arr_0": np.array([{}, None])}, r"arr_0 is object"),
    ],
)
def test_archives_that_cannot_be_used(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message) as error:
        open_images(write(tmp_path, **arrays))
    assert "images.npz" in str(error.value)


def test_labels_that_are_none(tmp_path):
    assert open_images(write(tmp_path, arr_0=IMAGES, arr_1=np.zeros(3, np.int64))).labels is None
    assert open_images(write(tmp_path, arr_0=IMAGES, arr_1=np.zeros(11))).labels is None


@pytest.mark.parametrize("size", [0, 10, 900, -30])
def test_a_truncated_archive(tmp_path, size):
    path = write(tmp_path, arr_0=IMAGES)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"images.npz is not a whole .npz"):
        open_images(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_with_changed_bytes(tmp_path, save):
    path = write(tmp_path, save, arr_0=np.repeat(IMAGES, 20, axis=0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    images = open_images(path)
    with pytest.raises(ValueError, match=r"images.npz is damaged"):
        list(images.batches(0, 220, 4))


def test_an_array_shorter_than_its_header_says(tmp_path):
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (20, 6, 8, 3)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + IMAGES.tobytes())
    images = open_images(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a.npz is damaged \(it ends in image 11"):
        list(images.batches(0, 20, 4))


def save_all(folder, suffix=".png", images=IMAGES):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02d}{suffix}")


def test_a_folder(tmp_path):
    save_all(tmp_path)
    images = open_images(tmp_path)
    assert (images.kind, images.count, images.size, images.labels, images.lossy) == ("folder", 11, (6, 8), None, 0)
    for start, stop, batch in ((0, 11, 4), (3, 9, 4), (4, 4, 2), (0, 11, 64)):
        parts = list(images.batches(start, stop, batch))
        assert np.array_equal(np.concatenate([IMAGES[:0], *parts]), IMAGES[start:stop])


def test_class_folders_give_labels_and_jpeg_is_counted(tmp_path):
    save_all(tmp_path / "ant", ".jpg", IMAGES[:4])
    save_all(tmp_path / "bee", ".png", IMAGES[4:])
    images = open_images(tmp_path)
    assert images.labels.tolist() == [0] * 4 + [1] * 7
    assert images.lossy == 4
    assert images.describe()["classes"] == 2


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no images at .*absent"):
        open_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no images"):
        open_images(tmp_path)
    save_all(tmp_path)
    Image.new("RGB", (9, 7)).save(tmp_path / "07.png")
    with pytest.raises(ValueError, match=r"07.png has 9x7 pixels, .*00.png 8x6"):
        list(open_images(tmp_path).batches(0, 11, 4))
    (tmp_path / "07.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"07.png is not a readable image"):
        list(open_images(tmp_path).batches(0, 11, 4))
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"file.txt is not a whole .npz"):
        open_images(tmp_path / "file.txt")
