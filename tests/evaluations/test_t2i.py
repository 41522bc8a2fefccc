"""CLIP score and FID of text-to-image samples: against figures by hand, kinds of input, several processes, mistakes."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.folders import natural_key
from evaluations.c2i.inception import TorchInception
from evaluations.image_sets import open_images, save_statistics, square
from evaluations.metrics import Statistics, frechet_distance
from evaluations.t2i import evaluation, figures
from evaluations.t2i.clip import CLIP, CLIP_MODELS, find_clip, load_clip
from tests.helpers import GOLDEN, ROOT
from tests.training import live, run_here

GRAPH = GOLDEN / "evaluator/standin_graph.pb"
CAPTIONS = ["a red cat", "two blue dogs", "a cat on a red mat", "rain", "a dog in the rain", "blue mat", "cat and dog"]
COUNT = len(CAPTIONS)


def make_small_clip(folder: Path) -> Path:
    """A CLIP with random weights and a tokenizer of single letters, in the released models' folder format."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 40, "bos_token_id": len(words) - 2,
        "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return make_small_clip(tmp_path_factory.mktemp("clip") / "small")


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A folder as sample_t2i_ddp.py leaves it, and one of photographs in several shapes."""
    rng = np.random.default_rng(0)
    fake, ref = tmp_path / "fake", tmp_path / "coco"
    for place in (fake / "images", ref / "val2014"):
        place.mkdir(parents=True)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(fake / "images" / f"{i}.png")
    for i in range(5):
        shape = (20 + 3 * i, 27, 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(ref / "val2014" / f"COCO_val2014_{i:012d}.png")
    (fake / "captions.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS))
    return fake, ref


def make_small_open_clip(folder: Path) -> Path:
    """Random weights in open_clip's folder format; its tokenizer comes with it."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def evaluate(fake: Path, ref: Path, clip: Path | None, *words: str) -> dict:
    flags = ["--fake_dir", str(fake), "--ref_dir", str(ref), "--graph", str(GRAPH), "--device", "cpu"]
    flags += ["--clip_path", str(clip)] if clip else []
    run_here(evaluation, *flags, "--eval_res", 16, *words)
    return json.loads((fake / "score.json").read_text())


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"), key=lambda path: int(path.stem.split("_")[-1]))


def square_by_hand(path: Path, side: int) -> Image.Image:
    """The centre by cutting rows and columns of the array."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    height, width = pixels.shape[:2]
    top, left = (round(abs(height - width) / 2) if length > min(height, width) else 0 for length in (height, width))
    short = min(height, width)
    return Image.fromarray(pixels[top : top + short, left : left + short]).resize((side, side), Image.LANCZOS)


def clip_score_by_hand(fake: Path, folder: Path, side: int) -> float:
    """One pair at a time, through the whole model with its own normalisation."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    cosines = []
    for path, caption in zip(files_of(fake / "images"), CAPTIONS, strict=True):
        image = np.asarray(square_by_hand(path, side).resize((16, 16), Image.BICUBIC)) / 255
        pixels = torch.tensor((image - mean) / std).float().permute(2, 0, 1)[None]
        tokens = torch.tensor([tokenizer(f"A photo depicts {caption}").input_ids])
        with torch.no_grad():
            seen = model(input_ids=tokens, pixel_values=pixels)
        a, b = seen.image_embeds[0], seen.text_embeds[0]
        cosines.append(float(a @ b / a.norm() / b.norm()))
    return float(np.mean(cosines))


def fid_by_hand(fake: Path, ref: Path, side: int, resize: str) -> float:
    """Features of one image at a time, np.cov."""
    inception = TorchInception(GRAPH)
    sets = []
    for folder in (fake / "images", ref / "val2014"):
        rows = []
        for path in files_of(folder):
            pixels = np.array(square_by_hand(path, side))
            if resize == "graph":
                rows.append(inception(pixels[None])[0][0])
                continue
            channels = [
                Image.fromarray(pixels[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC) for c in range(3)
            ]
            floats = np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 255)
            pool = inception.features(floats[None])[0]
            rows.append(pool.ravel())
        rows = np.stack(rows).astype(np.float64)
        sets.append(Statistics(rows.mean(0), np.cov(rows, rowvar=False)))
    return frechet_distance(*sets)


@pytest.mark.slow
def test_the_figures_by_hand(folders, clip_folder, capsys):
    fake, ref = folders
    report = evaluate(fake, ref, clip_folder, "--batch_size", "3")
    assert report["clip_score"] == pytest.approx(clip_score_by_hand(fake, clip_folder, 16), abs=1e-5)
    assert report["fid"] == pytest.approx(fid_by_hand(fake, ref, 16, "clean"), rel=1e-4)
    lines = (fake / "score.txt").read_text().splitlines()
    assert lines == [f"CLIP score: {report['clip_score']}", f"FID_16px: {report['fid']}"]
    printed = capsys.readouterr().out
    assert all(line in printed for line in lines)
    made = report["protocol"]
    assert (made["generated"]["count"], made["reference"]["count"], made["eval_res"]) == (COUNT, 5, 16)
    assert made["generated"]["stored_sizes"] == {"24x24": COUNT} and made["reference"]["different_sizes"] == 5
    assert made["clip"]["model"] == "ViT-B/32" and made["graph"]["resize"] == "clean"
    assert len(made["graph"]["sha256"]) == 64 and {"torch", "transformers", "pillow"} <= set(made["versions"])


@pytest.mark.slow
def test_either_part_alone(folders, clip_folder, tmp_path):
    fake, ref = folders
    alone = evaluate(fake, tmp_path / "nowhere", clip_folder, "--no-fid")
    assert alone["clip_score"] == pytest.approx(clip_score_by_hand(fake, clip_folder, 16), abs=1e-5)
    assert "fid" not in alone and "reference" not in alone["protocol"]
    (fake / "captions.txt").unlink()
    alone = evaluate(fake, ref, None, "--no-clip", "--inception_resize", "graph")
    assert alone["fid"] == pytest.approx(fid_by_hand(fake, ref, 16, "graph"), rel=1e-4)
    assert "clip_score" not in alone
    with pytest.raises(ValueError, match="--no-clip and --no-fid leave nothing to compute"):
        evaluate(fake, ref, None, "--no-clip", "--no-fid")


def bicubic_by_hand(row: np.ndarray, size: int) -> np.ndarray:
    """Keys' cubic with a = -0.5, widened where it shrinks so that it is antialiased: (length, …) → (size, …)."""
    scale = len(row) / size
    wide = max(scale, 1)
    centres = (np.arange(size)[:, None] + 0.5) * scale - np.arange(len(row))[None] - 0.5
    x = np.abs(centres / wide)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    return np.tensordot(weights, row, 1)


@pytest.mark.parametrize("side", [16, 512])
def test_clean_resizing_by_hand(side):
    """What reaches the network: floats that no step rounds to bytes, cut to [0, 255]."""

    class Network:
        def features(self, images):
            self.seen = images
            return (np.zeros((len(images), 4, 1), np.float32),)

    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    images[0, :, : side // 2] = 255  # an edge, beyond which the filter overshoots
    network = Network()
    assert figures.inception_features(network, "clean")(images).shape == (2, 4)
    rows = np.stack([bicubic_by_hand(image.astype(np.float64), 299) for image in images])
    expected = np.stack([bicubic_by_hand(image.swapaxes(0, 1), 299).swapaxes(0, 1) for image in rows])
    assert expected.max() > 255.5 and np.abs(expected - expected.round()).max() > 0.4
    assert network.seen.dtype == np.float32
    assert np.allclose(network.seen, expected.clip(0, 255), atol=2e-3)


def test_captions_of_any_kind(folders, clip_folder):
    """The end of a long caption is not read; other scripts are; an empty one is the prefix alone."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    captions = ["", "собака", "一只红色的猫", "é 🐈", "a" * 10_000, "the word " * 1500]
    clip = CLIP(clip_folder)
    vectors = clip.texts(captions)
    assert clip.cut == 2
    for caption, vector in zip(captions, vectors, strict=True):
        ids = tokenizer(f"A photo depicts {caption}").input_ids
        ids = ids if len(ids) <= 40 else [*ids[:39], ids[-1]]
        with torch.no_grad():
            by_hand = model.get_text_features(torch.tensor([ids]))
        by_hand = getattr(by_hand, "pooler_output", by_hand)[0]
        assert np.allclose(vector, by_hand / by_hand.norm(), atol=1e-5), caption[:20]


def test_weights_for_open_clip(folders, tmp_path):
    """Against open_clip's own way from a picture and a text to their cosine."""
    open_clip = pytest.importorskip("open_clip")
    fake, ref = folders
    folder = make_small_open_clip(tmp_path / "open")
    (fake / "captions.txt").write_text("\n".join([*CAPTIONS[:-1], "long " * 50]))
    report = evaluate(fake, ref, folder, "--no-fid")
    model, look = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    cosines = []
    for path, caption in zip(files_of(fake / "images"), [*CAPTIONS[:-1], "long " * 50], strict=True):
        with torch.no_grad():
            a = model.eval().encode_image(look(square_by_hand(path, 16))[None])[0]
            b = model.encode_text(tokenizer(f"A photo depicts {caption}"))[0]
        cosines.append(float(a @ b / a.norm() / b.norm()))
    assert report["clip_score"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert report["protocol"]["clip"]["library"] == "open_clip"
    assert any("1 captions are longer than CLIP's 40 tokens" in warning for warning in report["warnings"])
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole CLIP in the format of open_clip"):
        load_clip(folder)


def test_the_list_of_weights_has_their_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluations.t2i.clip._ROOT", tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    listed = (ROOT / "pretrained_models/README.md").read_text()
    for name in CLIP_MODELS:
        with pytest.raises(FileNotFoundError) as told:
            find_clip(name)
        command = re.search(r"hf download \S+ --local-dir [^\s,]+", str(told.value))[0]
        assert f"| `{name}` | `{command}` |" in listed


def test_open_clip_is_not_installed(clip_folder, tmp_path, monkeypatch):
    """Only its format asks for it: a folder that has both is read by transformers."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="open_clip, which is not installed: pip install open_clip_torch"):
        load_clip(find_clip("ViT-G/14", tmp_path))
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_clip(find_clip("ViT-G/14", tmp_path)).library == "transformers"


@pytest.mark.slow
def test_statistics_stand_for_the_reference(folders, clip_folder, tmp_path):
    fake, ref = folders
    file = tmp_path / "statistics.npz"
    made = evaluate(fake, ref, None, "--no-clip", "--save_statistics", str(file))
    report = evaluate(fake, file, None, "--no-clip")
    assert report["fid"] == made["fid"] and report["warnings"] == made["warnings"]
    assert report["protocol"]["reference"]["made"] == {
        "path": str(ref / "val2014"),
        "data": "coco2014",
        "eval_res": 16,
        "inception_resize": "clean",
        "reading": {"exif": True, "background": "#ffffff"},
        "graph": made["protocol"]["graph"]["sha256"],
    }
    for words, message in (
        (["--eval_res", "24"], r"statistics.npz was made with eval_res 16, this evaluation has 24"),
        (["--inception_resize", "graph"], r"was made with inception_resize clean, this evaluation has graph"),
        (["--no-exif"], r"was made with reading .*'exif': True.*this evaluation has .*'exif': False"),
        (["--save_statistics", str(file)], "has them already"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(fake, file, None, "--no-clip", *words)
    statistics = open_images(file).statistics
    save_statistics(file, statistics, made={"graph": "another"})
    with pytest.raises(ValueError, match=r"was made with graph another, this evaluation has"):
        evaluate(fake, file, None, "--no-clip")
    save_statistics(file, statistics)
    report = evaluate(fake, file, None, "--no-clip")
    assert report["fid"] == made["fid"]
    assert any("does not say what its statistics were made with" in warning for warning in report["warnings"])
    with pytest.raises(ValueError, match=r"makes a FILE\.npz"):
        evaluate(fake, ref, None, "--no-clip", "--save_statistics", str(tmp_path / "statistics"))
    with pytest.raises(ValueError, match="leave --no-fid out"):
        evaluate(fake, ref, clip_folder, "--no-fid", "--save_statistics", str(file))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "has no statistics mu and sigma"),
        ({"mu": np.zeros(8), "sigma": np.eye(8)}, "has statistics of 8 features and the graph .* makes 2048"),
        (None, "no images at"),
    ],
)
def test_other_files_than_statistics(folders, tmp_path, arrays, message):
    fake, _ = folders
    if arrays:
        np.savez(tmp_path / "statistics.npz", **arrays)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(fake, tmp_path / "statistics.npz", None, "--no-clip")


@pytest.mark.parametrize(
    "listed", [lambda i: {"image": f"images/{i}.png"}, lambda i: {"image_path": f"samples/x/images/{i}.png"}]
)
def test_captions_that_slipped(folders, clip_folder, listed):
    """An image less and another one more: the counts agree, and result.jsonl knows better."""
    fake, ref = folders
    lines = [{"text": caption, **listed(i)} for i, caption in enumerate(CAPTIONS)]
    (fake / "result.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not any("result.jsonl" in warning for warning in evaluate(fake, ref, clip_folder, "--no-fid")["warnings"])
    (fake / "images" / "3.png").rename(fake / "images" / "30.png")
    told = [
        warning for warning in evaluate(fake, ref, clip_folder, "--no-fid")["warnings"] if "result.jsonl" in warning
    ]
    assert len(told) == 1 and told[0].startswith("4 of the 7 images are not those that")
    assert "line 4 has 3.png, images/ has 4.png" in told[0]
    (fake / "result.jsonl").write_text('{"prompt": "another program\'s"}\n[]\n')
    assert not any("result.jsonl" in warning for warning in evaluate(fake, ref, clip_folder, "--no-fid")["warnings"])


def test_other_captions_give_another_score(folders, clip_folder):
    """Pairs are matched by natural order, 2.png before 10.png; a byte order mark and Windows' line ends are no caption."""
    fake, ref = folders
    right = evaluate(fake, ref, clip_folder, "--no-fid")["clip_score"]
    (fake / "captions.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(CAPTIONS).encode())
    assert evaluate(fake, ref, clip_folder, "--no-fid")["clip_score"] == right
    (fake / "images" / "2.png").rename(fake / "images" / "10.png")  # now the last: captions slip by one
    assert evaluate(fake, ref, clip_folder, "--no-fid")["clip_score"] != pytest.approx(right, abs=1e-4)
    names = ["000010.png", "2.png", "a10b2.png", "a10b10.png", "1.png", "a9b3.png"]
    assert sorted(names, key=natural_key) == ["1.png", "2.png", "000010.png", "a9b3.png", "a10b2.png", "a10b10.png"]


def test_how_many(folders, clip_folder):
    fake, ref = folders
    report = evaluate(fake, ref, clip_folder, "--no-fid", "--how_many", "4")
    assert report["protocol"]["generated"]["count"] == report["protocol"]["clip"]["captions"] == 4
    for path in files_of(fake / "images")[4:]:
        path.unlink()
    (fake / "captions.txt").write_text("\n".join(CAPTIONS[:4]))
    assert evaluate(fake, ref, clip_folder, "--no-fid")["clip_score"] == report["clip_score"]


@pytest.mark.parametrize(("width", "height", "left", "top"), [(5, 4, 0, 0), (7, 4, 2, 0), (4, 9, 0, 2), (6, 6, 0, 0)])
def test_the_centre_of_odd_lengths(width, height, left, top):
    """Half a pixel goes to the even one: (5 - 4) / 2 to 0, (7 - 4) / 2 to 2, (9 - 4) / 2 to 2."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    side = min(width, height)
    cut = np.asarray(square(Image.fromarray(pixels), side))
    assert np.array_equal(cut, pixels[top : top + side, left : left + side])


def test_resizing_is_lanczos():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    expected = image.resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(square(image, 16)), np.asarray(expected))


@pytest.mark.parametrize("place", ["val2014", "images/val2014", "."])
def test_where_the_reference_may_lie(folders, tmp_path, place):
    _, ref = folders
    target = tmp_path / "other" / place
    target.parent.mkdir(parents=True, exist_ok=True)
    (ref / "val2014").rename(target)
    for root in {tmp_path / "other", target}:
        args = evaluation.flags().parse_args(["--ref_dir", str(root)])
        assert figures.reference_folder(args).resolve() == target.resolve()


def test_other_references(folders, tmp_path):
    _, ref = folders
    (ref / "val2014").rename(ref / "valid")
    parse = evaluation.flags().parse_args
    args = parse(["--ref_dir", str(ref), "--ref_data", "imagenet2012", "--ref_type", "valid"])
    assert figures.reference_folder(args) == ref / "valid"
    with pytest.raises(FileNotFoundError, match=r"has no folder train \(--ref_type\)"):
        figures.reference_folder(parse(["--ref_dir", str(ref), "--ref_data", "laion4k", "--ref_type", "train"]))


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(folders, clip_folder):
    fake, ref = folders
    alone = evaluate(fake, ref, clip_folder)
    words = ["--fake_dir", str(fake), "--ref_dir", str(ref), "--graph", str(GRAPH), "--clip_path", str(clip_folder)]
    words += ["--device", "cpu", "--eval_res", "16", "--batch_size", "2"]
    live({"module": "evaluations.t2i.evaluation", "args": words, "world": 2})
    together = json.loads((fake / "score.json").read_text())
    assert together["protocol"]["processes"] == 2
    for name in ("clip_score", "fid"):
        assert together[name] == pytest.approx(alone[name], rel=1e-5), name
    assert together["warnings"] == alone["warnings"]


@pytest.mark.slow
def test_warnings(folders, clip_folder):
    fake, ref = folders
    Image.new("RGB", (12, 30)).save(fake / "images" / "6.png")
    Image.open(fake / "images" / "5.png").save(fake / "images" / "4.png")
    (fake / "captions.txt").write_text("\n".join(["a cat", "", "a cat", *CAPTIONS[3:6], "word " * 60]))
    warnings = evaluate(fake, ref, clip_folder, "--ref_type", "train")["warnings"]
    for told in (
        "7 images; published figures are of 30,000",
        "of 2 sizes (6 of 24x24, 1 of 12x30)",
        "1 of the 7 generated images are smaller than --eval_res 16",
        "--eval_res is 16; published figures are at 256",
        "1 of the 7 captions are empty",
        "1 of the 7 captions repeat",
        "the reference has 5 images; published FID is against all 40,504",
        "--ref_type train is not used",
        "1 of the 7 generated images are exact copies",
        "1 captions are longer than CLIP's 40 tokens",
        "makes vectors of 12 numbers, ViT-B/32 has 512",
    ):
        assert sum(told in warning for warning in warnings) == 1, told
    with pytest.raises(ValueError, match=r"--strict: \(1\) 7 images"):
        evaluate(fake, ref, clip_folder, "--strict")
    warnings = evaluate(fake, fake, None, "--no-clip")["warnings"]
    assert sum("lie one in the other" in warning for warning in warnings) == 1


def test_what_is_missing(folders, clip_folder, tmp_path):
    fake, ref = folders
    with pytest.raises(FileNotFoundError, match=r"no folder of reference images at .*nowhere"):
        evaluate(fake, tmp_path / "nowhere", clip_folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no folder images/: give the folder that sample_t2i"):
        evaluate(tmp_path / "nowhere", ref, clip_folder)
    with pytest.raises(FileNotFoundError, match=r"has no folder images/: it has .*fake, which does"):
        evaluate(tmp_path, ref, clip_folder)
    with pytest.raises(FileNotFoundError, match=r"has no folder images/: give .*fake, the folder that holds it"):
        evaluate(fake / "images", ref, clip_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*empty has no images: check the path"):
        evaluate(fake, tmp_path / "empty", clip_folder)
    (fake / "captions.txt").write_text("\n".join(CAPTIONS[:-1]))
    with pytest.raises(ValueError, match=r"captions.txt has 6 lines and .*images 7 images"):
        evaluate(fake, ref, clip_folder)
    (fake / "captions.txt").write_bytes("\n".join(["caf\xe9"] * 7).encode("latin-1"))
    with pytest.raises(ValueError, match=r"captions.txt is not UTF-8"):
        evaluate(fake, ref, clip_folder)
    (fake / "captions.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"captions.txt is missing.*--no-clip"):
        evaluate(fake, ref, clip_folder)
    with pytest.raises(ValueError, match=r"1 image: at least 2 are needed"):
        evaluate(fake, ref, None, "--no-clip", "--how_many", "1")
    file = files_of(fake / "images")[3]
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"3.png is not a readable image"):
        evaluate(fake, ref, None, "--no-clip")


def test_absent_and_damaged_clip_weights(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("evaluations.t2i.clip._ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "pretrained_models" / "clip-vit-base-patch32"
    place.mkdir(parents=True)
    (place / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no CLIP ViT-B/32 .* at .*pretrained_models.*--no-clip"):
        find_clip("ViT-B/32")
    with pytest.raises(FileNotFoundError, match=r"no CLIP ViT-B/32 .* at .*nowhere"):
        find_clip("ViT-B/32", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"ViT-L/14 is not one of ViT-B/32, ViT-G/14"):
        find_clip("ViT-L/14")
    (place / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes()[:5000])
    assert find_clip("ViT-B/32") == place
    with pytest.raises(ValueError, match="not a whole CLIP"):
        CLIP(place)


def test_another_kind_of_model(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(clip_folder / "model.safetensors")
    state = {name: value for name, value in state.items() if "text_model" not in name}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a CLIP \(text_model"):
        CLIP(tmp_path)


def test_vectors_do_not_depend_on_the_batch(clip_folder):
    clip = CLIP(clip_folder)
    together = clip.texts(CAPTIONS)
    alone = np.concatenate([clip.texts([caption]) for caption in CAPTIONS])
    assert np.allclose(together, alone, atol=1e-6)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


@pytest.mark.slow
def test_generated_images_that_are_the_reference_are_said(folders):
    fake, ref = folders
    for file in (ref / "val2014").iterdir():
        file.unlink()
    for file in files_of(fake / "images"):
        (ref / "val2014" / f"copy_{file.name}").write_bytes(file.read_bytes())
    made = evaluate(fake, ref, None, "--no-clip")
    assert any(f"{COUNT} of the {COUNT} samples are exact copies" in warning for warning in made["warnings"])
