"""The pipeline: image i is a function of (seed, i) whatever the batch, files by every kind of name, prompts, and what a user gets wrong."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from autoregressive.models.gpt import GPT_models
from autoregressive.models.sampling import NOISE
from autoregressive.pipeline import ImagePipeline, load_gpt, load_tokenizer, tokenizer_of
from tests.helpers import ROOT, randomize
from tests.serve.small import WIDTH, WORDS, WordEncoder
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.checkpoint import save_checkpoint, save_safetensors
from utils.images import peak_signal_to_noise_ratio, to_uint8
from utils.rng import image_noise

pytestmark = pytest.mark.usefixtures("one_thread")


class Recording(ImagePipeline):
    """A pipeline that keeps the codes it decodes."""

    def decode(self, codes, size=None):
        self.codes = codes.clone()
        return super().decode(codes, size)


def labels_of(numbers) -> list[int]:
    return [number * 7 % 10 for number in numbers]


def draw(pipeline: Recording, numbers, **settings) -> dict[int, tuple[torch.Tensor, np.ndarray]]:
    """Each image's codes and pixels by its number."""
    drawn = {}
    for part, images in pipeline.batches(pipeline.requests(labels_of(numbers), indices=numbers, **settings)):
        assert len(part) == len(images) == len(pipeline.codes)
        drawn |= {number: (codes, image) for number, codes, image in zip(part, pipeline.codes, images, strict=True)}
    return drawn


@pytest.fixture(scope="module")
def models(small_files):
    """GPTs by (is it PAR, or "NAR", dtype), and the tokenizer."""
    files = {False: small_files.gpt, True: small_files.par, "NAR": small_files.nar}
    gpts = {
        (kind, dtype): load_gpt(path, image_size=32, downsample_size=4, dtype=dtype)
        for kind, path in files.items()
        for dtype in (torch.float32, torch.bfloat16)
    }
    return gpts, load_tokenizer(small_files.vq)


@pytest.fixture(scope="module")
def pipeline(models):
    return Recording(models[0][True, torch.float32], models[1])  # PAR: a third of the steps


# Image i is a function of (seed, i)


@pytest.mark.parametrize(
    "par, settings",
    [
        pytest.param(False, {"cfg_scale": 3.0, "cfg_interval": 20}, marks=pytest.mark.slow, id="raster, guided"),
        pytest.param(True, {"cfg_scale": 3.0, "cfg_interval": 20}, id="PAR, guided"),
        pytest.param(True, {}, id="PAR"),
        pytest.param("NAR", {"cfg_scale": 3.0, "cfg_interval": 20}, id="NAR, guided"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_depend_on_its_batch(models, par, dtype, settings):
    gpts, tokenizer = models
    numbers = list(range(17))
    expected = draw(Recording(gpts[par, dtype], tokenizer, batch_size=16), numbers, seed=5, **settings)
    assert len({codes.numpy().tobytes() for codes, _ in expected.values()}) == 17
    assert all(len(codes.unique()) > 10 for codes, _ in expected.values())
    for batch, chosen in ((1, [16, 0, 7]), (3, [9, 2, 8, 1, 16]), (5, numbers[6::-1]), (16, [12, 4, 12])):
        drawn = draw(Recording(gpts[par, dtype], tokenizer, batch_size=batch), chosen, seed=5, **settings)
        assert list(drawn) == list(dict.fromkeys(chosen))
        for number, (codes, image) in drawn.items():
            assert torch.equal(codes, expected[number][0]), (batch, number)
            assert np.array_equal(image, expected[number][1]), (batch, number)


@pytest.mark.parametrize("par", [pytest.param(False, marks=pytest.mark.slow), True])
def test_negative_classes_of_any_batch_draw_the_same_images(models, par):
    """Image i is a function of (seed, i, label, negative); "no class" is the same as none, to the bit."""
    gpt, tokenizer = models[0][par, torch.float32], models[1]
    negatives = [None, 10, 3, 3, 8]
    numbers, settings = list(range(5)), {"seed": 5, "cfg_scale": 3.0}
    none = draw(Recording(gpt, tokenizer), numbers, **settings)
    expected = draw(Recording(gpt, tokenizer), numbers, negative_classes=negatives, **settings)
    same = [torch.equal(none[i][0], expected[i][0]) for i in numbers]
    assert same == [True, True, False, False, False]
    for chosen in ([3], [4, 0], [2, 1, 3, 4]):
        few = draw(
            Recording(gpt, tokenizer, batch_size=2), chosen, negative_classes=[negatives[i] for i in chosen], **settings
        )
        for i in chosen:
            assert torch.equal(few[i][0], expected[i][0]) and np.array_equal(few[i][1], expected[i][1])
    one = draw(Recording(gpt, tokenizer), [2, 3], negative_classes=3, **settings)
    assert all(torch.equal(one[i][0], expected[i][0]) for i in (2, 3))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"negative_classes": 11}, "label 11 is out of range"),
        ({"negative_classes": [1]}, "1 negatives for 2 images"),
        ({"negative_classes": ["tench", 1]}, "image 0: a label is a whole number, 0 to 9, got 'tench'"),
        ({"negative_classes": 1.5}, "a label is a whole number"),
        ({"negative_prompts": "a cat"}, "a label is a whole number, 0 to 9, got 'a cat'"),
        ({"negative_classes": 3, "cfg_scale": 1.0}, "no effect without guidance"),
    ],
)
def test_negatives_that_the_model_cannot_take_raise(pipeline, given, message):
    with pytest.raises(ValueError, match=message):
        pipeline([1, 2], **{"cfg_scale": 2.0, **given})


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pixels_do_not_depend_on_the_batch(pipeline, threads):
    count = 19 if threads == 1 else 7
    codes = torch.randint(64, (count, 64), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size, sizes in ((None, (1, 3, 16)), (20, (1, 5))):
            together = pipeline.decode(codes, size)
            for each in sizes:
                for part in torch.arange(count - 1, -1, -1).split(each)[:2]:
                    assert np.array_equal(pipeline.decode(codes[part], size), together[part.numpy()]), (size, each)
    finally:
        torch.set_num_threads(before)


def test_a_decoder_in_bfloat16(small_files, models):
    """Its images are close to float32's, and do not depend on the batch either."""
    half = ImagePipeline.from_pretrained(
        small_files.folder, gpt="par4.pt", vq="vq.pt", device="cpu", decode_precision="bf16"
    )
    codes = torch.randint(64, (5, 64), generator=torch.Generator().manual_seed(0))
    exact = ImagePipeline(half.gpt, models[1]).decode(codes)
    together = half.decode(codes)
    assert not np.array_equal(together, exact) and peak_signal_to_noise_ratio(together, exact) > 30
    for i in range(5):
        assert np.array_equal(half.decode(codes[i : i + 1])[0], together[i])
    assert half.decode(codes, 20).shape == (5, 20, 20, 3)


# While images are drawn


def test_drawing_ahead_changes_nothing(pipeline):
    settings = {"seed": 3, "indices": [4, 9, 2], "cfg_scale": 2.0}
    plain = Recording(pipeline.gpt, pipeline.tokenizer, batch_size=2)
    requests = plain.requests([1, 2, 3], **settings)
    for (numbers, images), (again, same) in zip(
        plain.batches(requests), plain.batches(requests, ahead=True), strict=True
    ):
        assert numbers == again and np.array_equal(images, same)


def test_seed_number_and_label_each_matter(pipeline):
    def codes(label, seed, number):
        list(pipeline.batches(pipeline.requests([label], seed=seed, indices=[number])))
        return pipeline.codes[0].tolist()

    first = codes(3, 0, 0)
    assert codes(3, 0, 0) == first
    assert first != codes(3, 1, 0) and first != codes(3, 0, 1) and first != codes(4, 0, 0)


def test_noise_is_a_function_of_seed_and_number():
    for draw, dtype in NOISE.items():
        together = image_noise(3, range(5), 9, draw)
        assert together.dtype == dtype and together.shape == (5, 9) and len(together.unique()) == 45
        assert torch.equal(image_noise(3, [4, 0], 9, draw), together[[4, 0]])
        assert torch.equal(image_noise(3, [2], 5, draw)[0], together[2, :5]), "more tokens leave the first ones"
        assert not torch.equal(image_noise(4, range(5), 9, draw), together)
    recorded = [0.8593353033065796, 0.5934092998504639, 0.23659616708755493]
    assert image_noise(3, [7], 3, "cdf").tolist() == [recorded], "recordings of earlier editions"


# Calls


def test_pil_images(pipeline):
    images = pipeline([1, 2, 3], seed=4, progress=False)
    assert [(image.size, image.mode) for image in images] == [((32, 32), "RGB")] * 3
    assert pipeline.image_size == 32
    expected = draw(pipeline, [0], seed=4)
    assert np.array_equal(np.asarray(pipeline([0], seed=4, progress=False)[0]), expected[0][1])
    assert pipeline([], progress=False) == []
    as_array = pipeline(np.array([1, 2, 3]), seed=4, progress=False)
    as_tensor = pipeline(torch.tensor([1, 2, 3], dtype=torch.uint8), seed=4, progress=False)
    for other in (as_array, as_tensor):
        assert [image.tobytes() for image in other] == [image.tobytes() for image in images]


@pytest.mark.parametrize("size", [20, 32])
def test_other_sizes_are_resized_bicubically(pipeline, size):
    images = pipeline([1, 2], size=size, progress=False)
    with torch.inference_mode():
        decoded = pipeline.tokenizer.to_pixels(pipeline.codes.view(2, 8, 8))
        resized = decoded if size == 32 else F.interpolate(decoded, size=(size, size), mode="bicubic")
    assert [image.size for image in images] == [(size, size)] * 2
    assert np.array_equal(np.stack(images), to_uint8(resized))


def test_progress_counts_tokens(pipeline, capsys):
    pipeline([1] * 9, progress=True)
    assert "9 images: 100%" in (shown := capsys.readouterr().err) and "576/576" in shown
    pipeline([1] * 3, progress=False)
    assert capsys.readouterr().err == ""


# Files


def test_a_folder_and_names(small_files):
    pipeline = ImagePipeline.from_pretrained(small_files.folder, gpt="gpt.pt", vq="vq.pt", batch_size=3)
    assert pipeline.image_size == 32 and pipeline.batch_size == 3 and not pipeline.gpt.training
    assert pipeline.gpt.tok_embeddings.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in [*pipeline.gpt.parameters(), *pipeline.tokenizer.parameters()])
    par = ImagePipeline.from_pretrained(str(small_files.folder), gpt="par4.pt", vq="vq.pt", dtype=torch.bfloat16)
    assert par.gpt.args.ar_token_num == 4 and par.gpt.tok_embeddings.weight.dtype == torch.bfloat16
    assert par.tokenizer.quantize.embedding.weight.dtype == torch.float32


def test_paths(small_files, tmp_path, monkeypatch):
    def check(*args, **more):
        pipeline = ImagePipeline.from_pretrained(*args, **more)
        assert torch.equal(pipeline.gpt.state_dict()["output.weight"], expected)
        assert pipeline.image_size == 32

    expected = load_gpt(small_files.gpt).state_dict()["output.weight"]
    check(small_files.gpt, vq=small_files.vq)
    check(str(small_files.gpt), vq="vq.pt")  # beside the GPT
    check(tmp_path, gpt=small_files.gpt, vq=small_files.vq)
    check(small_files.bare, vq=small_files.vq, image_size=32)
    check(small_files.bare.parent, vq=small_files.vq, image_size=32)
    check(small_files.folder, gpt=small_files.bare.parent.name, vq="vq.pt", image_size=32)
    monkeypatch.chdir(small_files.folder)
    check("gpt.pt", vq="vq.pt")
    check(".", gpt="gpt.pt", vq="vq.pt")


def test_run_folders(small_files, tmp_path):
    """The newest checkpoint of a run, of its checkpoints folder, or of the newest run."""
    checkpoints = tmp_path / "results" / "003-GPT-XS" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(small_files.gpt, checkpoints / "0000100.pt")
    shutil.copy(small_files.par, checkpoints / "0000020.pt")
    for name, gpt in (
        (tmp_path, "results"),
        (tmp_path / "results", "003-GPT-XS"),
        (tmp_path / "results" / "003-GPT-XS", "checkpoints"),
        (checkpoints, "0000100.pt"),
        (tmp_path / "results", None),
        (checkpoints.parent, None),
    ):
        assert ImagePipeline.from_pretrained(name, gpt, small_files.vq).gpt.args.ar_token_num == 1
    shutil.copy(small_files.par, checkpoints / "0000101.pt")
    assert ImagePipeline.from_pretrained(tmp_path / "results", vq=small_files.vq).gpt.args.ar_token_num == 4


def test_released_names(small_files, tmp_path, monkeypatch):
    """A released file that is on the disk already, by its qualified name and by repository and name."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "pretrained_models" / "LlamaGen-NPP"
    home.mkdir(parents=True)
    shutil.copy(small_files.gpt, home / "c2i_L_256.pt")
    for arguments in (("pytttttt/LlamaGen-NPP/c2i_L_256.pt", None), ("pytttttt/LlamaGen-NPP", "c2i_L_256.pt")):
        pipeline = ImagePipeline.from_pretrained(*arguments, vq=small_files.vq)
        assert pipeline.image_size == 32, "what the file records counts, not its name"


def test_the_released_tokenizer_is_the_default(small_files, tmp_path):
    shutil.copy(small_files.gpt, tmp_path)
    tokenizer = VQ_models["VQ-16"](codebook_size=64, ch=32, z_channels=32)
    save_checkpoint(tmp_path / "vq_ds16_c2i.pt", {"model": tokenizer.state_dict()})
    with pytest.raises(ValueError, match=r"--downsample-size 16 \(file: 4\)"):
        ImagePipeline.from_pretrained(tmp_path, gpt="gpt.pt")
    with pytest.raises(ValueError, match=r"--downsample-size 16 \(file: 4\)"):
        ImagePipeline.from_pretrained(tmp_path, gpt="gpt.pt", vq="vq_ds16_c2i.pt")
    content = torch.load(small_files.gpt, weights_only=False)
    content["args"] = Namespace(image_size=128, downsample_size=16)
    torch.save(content, tmp_path / "gpt.pt")
    pipeline = ImagePipeline.from_pretrained(tmp_path, gpt="gpt.pt")
    assert pipeline.image_size == 128 and pipeline.gpt.layout.grid_size == 8


@pytest.mark.parametrize("averaged", [(), ("vq",), ("gpt", "vq")])
def test_from_pretrained_with_use_ema_needs_the_gpts_averages_and_takes_both(small_files, tmp_path, averaged):
    states = {}
    for name in ("gpt", "vq"):
        saved = torch.load(small_files.folder / f"{name}.pt", weights_only=False)
        states[name] = saved["model"]
        if name in averaged:
            saved["ema"] = {key: value + 1 for key, value in saved["model"].items()}
        torch.save(saved, tmp_path / f"{name}.pt")
    load = partial(ImagePipeline.from_pretrained, tmp_path, gpt="gpt.pt", vq="vq.pt", device="cpu")
    assert torch.equal(load().gpt.norm.weight, states["gpt"]["norm.weight"])
    if "gpt" in averaged:
        pipeline = load(use_ema=True)
        assert torch.equal(pipeline.gpt.norm.weight, states["gpt"]["norm.weight"] + 1)
        assert torch.equal(pipeline.tokenizer.decoder.conv_out.bias, states["vq"]["decoder.conv_out.bias"] + 1)
    else:
        with pytest.raises(ValueError, match=r"gpt\.pt has no averaged weights, for which --use-ema asks"):
            load(use_ema=True)


def test_the_model_is_that_of_the_weights(small_files, tmp_path):
    """Odd widths and key heads are read off the file."""
    odd = randomize(
        GPT_models["GPT-XS"](
            vocab_size=40, block_size=16, num_classes=3, n_kv_head=2, multiple_of=8, ffn_dim_multiplier=0.7
        )
    )
    torch.save(odd.state_dict(), tmp_path / "odd.pt")
    model = load_gpt(tmp_path / "odd.pt", image_size=64)
    tokens, labels = torch.randint(40, (2, 15)), torch.tensor([1, 2])
    assert torch.equal(model(tokens, labels), odd(tokens, labels))
    assert (model.args.n_kv_head, model.args.ffn_dim, model.args.num_classes) == (2, odd.args.ffn_dim, 3)


# Prints for each (file, dtype) the most memory of its own, in bytes, that loading took at the end of any operation, each time
# in a new process: memory that was given back may stay with a process.
LOADING = """
import json, os, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from autoregressive.pipeline import load_gpt
from tests.helpers import ready_to_fork

def own_memory():  # what is mapped from files is not in it
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

class Peak(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.most = max(self.most, own_memory())
        return result

load_gpt(sys.argv[1], dtype=torch.bfloat16)  # what the first call imports is not counted
ready_to_fork()
for path, dtype in json.loads(sys.argv[2]):
    if not os.fork():
        peak = Peak()
        peak.most = before = own_memory()
        with peak:
            load_gpt(path, dtype=getattr(torch, dtype))
        print(peak.most - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="how much memory a process has is read from /proc")
def test_loading_holds_the_weights_once(small_files, tmp_path):
    """Of whatever file: those in torch's older format, which are read as a whole, are cast tensor by tensor."""
    with torch.device("meta"):
        model = GPT_models["GPT-XS"](vocab_size=64, block_size=64, num_classes=10, multiple_of=2**14)
    state = {name: torch.full(value.shape, 0.01) for name, value in model.state_dict().items()}
    whole = sum(value.nbytes for value in state.values())  # 100 MB in float32, mostly in matrices of 8 MB
    run = {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(whole // 4)}}},
        "steps": 1,
        "args": Namespace(image_size=32, downsample_size=4),
    }
    torch.save(run, tmp_path / "run.pt")
    torch.save({"model": state, "args": run["args"]}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    halves = {name: value.bfloat16() for name, value in state.items()}
    save_safetensors(tmp_path / "half.safetensors", halves, {"args": {"image_size": 32, "downsample_size": 4}})
    expected = {
        ("run.pt", "float32"): 0,  # mapped
        ("run.pt", "bfloat16"): whole / 2,
        ("half.safetensors", "bfloat16"): 0,
        ("half.safetensors", "float32"): whole,
        ("old.pt", "float32"): whole,
        ("old.pt", "bfloat16"): whole,
    }
    loads = json.dumps([(str(tmp_path / name), dtype) for name, dtype in expected])
    command = [sys.executable, "-c", LOADING, str(small_files.gpt), loads]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (case, most), took in zip(expected.items(), map(int, done.stdout.split()), strict=True):
        assert took < most + whole / 8, case


# What a user gets wrong


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/a/b"])
def test_folders_that_are_not_there(name, small_files):
    with pytest.raises(FileNotFoundError, match=f"{name} is neither a folder nor a hub repository"):
        ImagePipeline.from_pretrained(name, gpt="gpt.pt", vq=small_files.vq)


def test_unknown_names(small_files, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no file missing\.pt"):
        ImagePipeline.from_pretrained(small_files.folder, gpt="missing.pt", vq="vq.pt")
    with pytest.raises(FileNotFoundError, match=r"no file missing\.pt"):
        ImagePipeline.from_pretrained(small_files.folder, gpt="gpt.pt", vq="missing.pt")
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        ImagePipeline.from_pretrained(small_files.folder / "missing.pt", vq=small_files.vq)
    with pytest.raises(FileNotFoundError, match=r"did you mean the released c2i_L_384\.pt"):
        ImagePipeline.from_pretrained("c2i_L_383.pt", vq=small_files.vq)
    with pytest.raises(FileNotFoundError, match="somebody/something"):
        ImagePipeline.from_pretrained("somebody/something", gpt="gpt.pt", vq=small_files.vq)
    with pytest.raises(FileNotFoundError, match="somebody/something"):
        ImagePipeline.from_pretrained("somebody/something", vq=small_files.vq)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        ImagePipeline.from_pretrained(tmp_path / "empty", vq=small_files.vq)


def test_files_of_the_wrong_kind(small_files):
    with pytest.raises(ValueError, match=r"vq\.pt is not a GPT checkpoint: it looks like a VQ image tokenizer"):
        ImagePipeline.from_pretrained(small_files.folder, gpt="vq.pt", vq="vq.pt")
    with pytest.raises(
        ValueError, match=r"gpt\.pt is not an image tokenizer.* it looks like a GPT \(give it as --gpt-ckpt\)"
    ):
        ImagePipeline.from_pretrained(small_files.folder, gpt="gpt.pt", vq="gpt.pt")


def test_image_sizes(small_files):
    with pytest.raises(ValueError, match="does not say for which image size it was trained: give --image-size"):
        ImagePipeline.from_pretrained(small_files.bare, vq=small_files.vq)
    with pytest.raises(ValueError, match="--image-size 34 is not a multiple of --downsample-size 4"):
        ImagePipeline.from_pretrained(small_files.bare, vq=small_files.vq, image_size=34)
    with pytest.raises(ValueError, match=r"--image-size 64 \(file: 32\)"):
        ImagePipeline.from_pretrained(small_files.gpt, vq=small_files.vq, image_size=64)


def test_models_that_were_not_trained_together(models):
    gpt = models[0][False, torch.float32]
    with pytest.raises(ValueError, match="the GPT has 64 codes and the tokenizer 32"):
        ImagePipeline(gpt, VQ_models["VQ-4"](codebook_size=32))
    ImagePipeline(gpt, VQ_models["VQ-4"](codebook_size=65))
    with pytest.raises(ValueError, match="batch_size is 0"):
        ImagePipeline(gpt, models[1], batch_size=0)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([1, 10], "label 10 is out of range: the model has classes 0 to 9"),
        ([-1], "label -1 is out of range"),
        ([1.5], "image 0: a label is a whole number, 0 to 9, got 1.5"),
        ([[1, 2]], "a label is a whole number"),
        (3, "give a list, one item for each image, not 3"),
    ],
)
def test_labels(pipeline, labels, message):
    with pytest.raises(ValueError, match=message):
        pipeline(labels)


def test_settings(pipeline):
    with pytest.raises(ValueError, match="3 image numbers for 2 images"):
        pipeline([1, 2], indices=[1, 2, 3])
    with pytest.raises(ValueError, match="--top-p"):
        pipeline([1, 2], top_p=-2.0)
    with pytest.raises(TypeError, match="top_q"):
        pipeline([1, 2], top_q=0.5)
    assert isinstance(pipeline([1], top_k=3, progress=False)[0], Image.Image)


# Prompts


PROMPTS = [
    "a", "a red lantern", "two cats sleep on a green chair", "one two three four five six seven eight nine",
    "rain", "a paper crane", "an orange tram in heavy snow", "fog over a lake", "a map", "three blue pears on a plate", "a",
]  # fmt: skip


def text_gpt(**more) -> torch.nn.Module:
    shape = {"vocab_size": 64, "block_size": 16, "cls_token_num": WORDS, "caption_dim": WIDTH}
    return randomize(GPT_models["GPT-XS"](**{**shape, "model_type": "t2i", **more}), seed=4).requires_grad_(False)


@pytest.fixture(scope="module")
def text_models(models):
    """A text-conditional GPT in each dtype, 4x4 tokens, and the tokenizer."""
    return {dtype: text_gpt().to(dtype) for dtype in (torch.float32, torch.bfloat16)}, models[1]


@pytest.fixture
def text_pipeline(text_models):
    return Recording(text_models[0][torch.float32], text_models[1], text_encoder=WordEncoder())


def draw_prompts(pipeline, prompts, numbers, **settings) -> dict[int, tuple[torch.Tensor, np.ndarray]]:
    drawn = {}
    for part, images in pipeline.batches(pipeline.requests([prompts[n] for n in numbers], indices=numbers, **settings)):
        drawn |= {number: (codes, image) for number, codes, image in zip(part, pipeline.codes, images, strict=True)}
    return drawn


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fill all 9 text tokens")
@pytest.mark.parametrize("dtype, left", [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)])
def test_a_prompts_image_does_not_depend_on_its_batch(text_models, dtype, left):
    """Captions of 1 to 9 words: alone, beside longer and shorter ones, in any order."""

    def pipeline(batch):
        gpt = text_models[0][dtype]
        return Recording(gpt, text_models[1], batch_size=batch, text_encoder=WordEncoder(), left_padding=left)

    settings = {"seed": 5, "cfg_scale": 4.0, "top_k": 40}
    expected = draw_prompts(pipeline(16), PROMPTS, list(range(11)), **settings)
    assert len({codes.numpy().tobytes() for codes, _ in expected.values()}) == 11
    for batch, chosen in ((1, [3, 0, 10]), (3, [9, 2, 8, 1, 10]), (8, [3, 6, 5, 4, 3, 2, 1, 0, 3])):
        for number, (codes, image) in draw_prompts(pipeline(batch), PROMPTS, chosen, **settings).items():
            assert torch.equal(codes, expected[number][0]), (batch, number)
            assert np.array_equal(image, expected[number][1]), (batch, number)


@pytest.mark.parametrize("negatives", [None, [None, "fog over a lake", "a"]])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("left", [True, False])
def test_prompts_against_the_model_without_a_cache(text_models, left, scale, negatives):
    """The most likely tokens, each from a full forward pass over conditions padded by hand."""
    gpt, encoder = text_models[0][torch.float32], WordEncoder()
    pipeline = Recording(gpt, text_models[1], text_encoder=encoder, left_padding=left)
    prompts = PROMPTS[1:4]
    negatives = negatives if scale > 1 else None
    with pytest.warns(UserWarning, match="1 of 3 prompts fill all 9 text tokens.*: 'one two three"):
        pipeline(prompts, negative_prompts=negatives, cfg_scale=scale, sample_logits=False, progress=False)

    def padded(prompts):
        cond, mask = torch.zeros(3, WORDS, WIDTH), torch.zeros(3, WORDS)
        for i, prompt in enumerate(prompts):
            count = len(prompt.split())
            place = slice(WORDS - count, WORDS) if left else slice(0, count)
            cond[i, place], mask[i, place] = encoder.features(prompt), 1
        return cond, mask

    cond, mask = padded(prompts)
    drop = torch.tensor([negative is None for negative in negatives or prompts]) | torch.tensor(negatives is None)
    other, other_mask = padded([negative or prompt for negative, prompt in zip(negatives or prompts, prompts)])
    codes = torch.zeros(3, 0, dtype=torch.long)
    for _ in range(16):
        logits = gpt(codes, cond, prefix_mask=mask)[:, -1]
        if scale > 1:
            without = gpt(codes, other, prefix_mask=other_mask, drop=drop)[:, -1]
            logits = without + (logits - without) * scale
        codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(pipeline.codes, codes)


def test_seed_number_prompt_and_padding_each_matter(text_models, text_pipeline):
    def codes(prompt, seed, number, pipeline=text_pipeline):
        list(pipeline.batches(pipeline.requests([prompt], seed=seed, indices=[number], cfg_scale=2.0)))
        return pipeline.codes[0].tolist()

    first = codes("a red lantern", 0, 0)
    assert codes("a red lantern", 0, 0) == first
    assert first not in (codes("a red lantern", 1, 0), codes("a red lantern", 0, 1), codes("a map", 0, 0))
    right = Recording(text_pipeline.gpt, text_models[1], text_encoder=WordEncoder(), left_padding=False)
    assert codes("a red lantern", 0, 0, right) != first


def test_negative_prompts_draw_the_same_whatever_the_batch_and_however_given(text_models, text_pipeline):
    prompts, settings = PROMPTS[:3] + PROMPTS[4:6], {"seed": 3, "cfg_scale": 4.0, "progress": False}
    negatives = ["fog over a lake", "", None, "a map", "fog over a lake"]

    def images(pipeline, chosen, **given):
        drawn = pipeline([prompts[i] for i in chosen], indices=chosen, **settings, **given)
        return [image.tobytes() for image in drawn]

    none, expected = images(text_pipeline, range(5)), images(text_pipeline, range(5), negative_prompts=negatives)
    assert [a == b for a, b in zip(none, expected)] == [False, True, True, False, False]
    few = Recording(text_pipeline.gpt, text_models[1], text_encoder=WordEncoder(), batch_size=2)
    assert images(few, [3, 0, 1], negative_prompts=[negatives[i] for i in (3, 0, 1)]) == [
        expected[i] for i in (3, 0, 1)
    ]
    assert images(few, [0, 4], negative_prompts="fog over a lake") == [expected[0], expected[4]]
    (features,) = few.encode(["fog over a lake"])
    for given in (features, [features, features[None].numpy()]):
        assert images(few, [0, 4], negative_features=given) == [expected[0], expected[4]]
    unguided = few(prompts[:1], seed=3, progress=False)[0].tobytes()
    assert images(few, [0], negative_prompts=prompts[0]) == [unguided]  # away from itself
    with pytest.raises(ValueError, match=r"image 0: features are torch\.int64"):
        few(prompts[:1], negative_classes=3, cfg_scale=2.0)


def test_features_in_the_place_of_prompts(text_pipeline, tmp_path):
    """Of encode(), with a first axis of one, as numpy arrays, and in files as extraction writes them."""
    prompts = PROMPTS[:3]
    expected = [image.tobytes() for image in text_pipeline(prompts, seed=2, progress=False)]
    features = text_pipeline.encode(prompts)
    assert [tuple(f.shape) for f in features] == [(1, WIDTH), (3, WIDTH), (7, WIDTH)]
    np.save(tmp_path / "0.npy", features[0][None].numpy())
    np.save(tmp_path / "1.npy", features[1].numpy())
    text_pipeline.text_encoder = None  # not asked again
    for given in (
        features,
        [f[None] for f in features],
        [f.numpy() for f in features],
        [tmp_path / "0.npy", str(tmp_path / "1.npy"), features[2].double()],
    ):
        images = text_pipeline(features=given, seed=2, progress=False)
        assert [image.tobytes() for image in images] == expected
    longer = torch.cat([WordEncoder().features(PROMPTS[3]), torch.ones(4, WIDTH)])
    with pytest.warns(UserWarning, match=r"1 of 2 features have more than 9 rows, and what .*not read: 13 of image 0$"):
        cut = text_pipeline(features=[longer, longer[:WORDS]], indices=[0, 0], progress=False)
    assert cut[0].tobytes() == cut[1].tobytes()
    assert text_pipeline(features=[], progress=False) == text_pipeline([], progress=False) == []


def test_a_prompt_is_encoded_once_and_alone(text_pipeline):
    text_pipeline(["a map", "rain", "a map"], progress=False)
    assert text_pipeline.text_encoder.calls == [["a map"], ["rain"]]


def test_the_text_encoder_is_loaded_when_needed_and_released(text_models, monkeypatch):
    import language.t5

    made = []

    class Embedder(WordEncoder):
        def __init__(self, device, name, **settings):
            super().__init__()
            made.append((device, name, settings))

    monkeypatch.setattr(language.t5, "T5Embedder", Embedder)
    monkeypatch.setattr(language.t5, "find_t5", lambda path, kind: f"{path}/{kind}")
    gpt, tokenizer = text_models[0][torch.bfloat16], text_models[1]
    pipeline = ImagePipeline(gpt, tokenizer, t5_path="somewhere", t5_model_type="small")
    assert not made
    pipeline(["a map"], progress=False)
    pipeline(["rain"], progress=False)
    settings = {"torch_dtype": torch.bfloat16, "model_max_length": WORDS}
    assert made == [(torch.device("cpu"), "somewhere/small", settings)]
    pipeline.release_text_encoder()
    assert pipeline.text_encoder is None
    pipeline(["rain"], progress=False)
    assert len(made) == 2
    other = ImagePipeline(gpt, tokenizer, t5_dtype=torch.float32, t5_device="cpu", t5_tokens=4)
    other(["rain"], progress=False)
    assert made[2][1:] == ("None/flan-t5-xl", {"torch_dtype": torch.float32, "model_max_length": 4})


@pytest.mark.parametrize(
    "prompts, message",
    [
        ("a red lantern", "give a list, one item for each image, not 'a red lantern'"),
        ([3], r"image 0: features are torch\.int64"),
        (torch.tensor([1]), r"image 0: features are torch\.int64"),
        (["a", ""], r"prompt 1 \(from 0\) is blank"),
        (["\n \t"], r"prompt 0 \(from 0\) is blank"),
        (None, "give labels or prompts, or a prompt's features in its place"),
        (3, "give a list, one item for each image, not 3"),
    ],
)
def test_prompts(text_pipeline, prompts, message):
    with pytest.raises(ValueError, match=message):
        text_pipeline(prompts)
    assert not text_pipeline.text_encoder.calls


def test_prompts_that_are_blank_once_they_are_cleaned(text_models, text_pipeline, monkeypatch):
    """By the T5, before it is loaded; another encoder reads what it is given."""
    import language.t5

    monkeypatch.setattr(language.t5, "find_t5", lambda *_: pytest.fail("a T5 was looked for"))
    pipeline = ImagePipeline(text_models[0][torch.float32], text_models[1])
    for prompts, message in (
        (["a", "https://example.com/a"], r"prompt 1 \(from 0\), 'https://example\.com/a', is blank once it is cleaned"),
        (["IMG_2.jpg"], r"prompt 0 \(from 0\), 'IMG_2\.jpg', is blank once it is cleaned .*file names"),
    ):
        for call in (pipeline, pipeline.encode):
            with pytest.raises(ValueError, match=message):
                call(prompts)
    assert len(text_pipeline(["https://example.com/a"], progress=False)) == 1
    text_pipeline.text_encoder.use_text_preprocessing = True
    with pytest.raises(ValueError, match="is blank once it is cleaned"):
        text_pipeline(["https://example.com/a"])


def test_conditions_of_the_other_kind(pipeline, text_pipeline):
    for arguments in ({"asked": ["a map"]}, {"features": [torch.ones(2, WIDTH)]}):
        with pytest.raises(ValueError, match="image 0: a label is a whole number, 0 to 9"):
            pipeline(**arguments)
    with pytest.raises(ValueError, match="class-conditional: it has no text encoder"):
        pipeline.encode(["a map"])
    with pytest.raises(ValueError, match="give labels or prompts"):
        text_pipeline(["a map"], features=[torch.ones(2, WIDTH)])
    with pytest.raises(ValueError, match="1 image numbers for 2 images"):
        text_pipeline(["a map", "rain"], indices=[0])
    with pytest.raises(ValueError, match="2 image numbers for 1 images"):
        text_pipeline(features=[torch.ones(2, WIDTH)], indices=[0, 1])


@pytest.mark.parametrize(
    "features, message",
    [
        (
            torch.ones(3, 5),
            r"image 0: features are torch\.float32 of shape \(3, 5\); this model takes .*\(length, 12\)",
        ),
        (torch.ones(2, 3, WIDTH), r"of shape \(2, 3, 12\)"),
        (torch.ones(0, WIDTH), r"of shape \(0, 12\)"),
        (torch.ones(3, WIDTH, dtype=torch.long), r"torch\.int64"),
        (torch.full((3, WIDTH), torch.nan), "image 0: features are not all finite"),
        ("gone.npy", r"no features at gone\.npy"),
        ("text.npy", r"text\.npy is not a readable \.npy file of features"),
        ("empty.npy", r"empty\.npy is not a readable \.npy file of features"),
    ],
)
def test_features(text_pipeline, tmp_path, monkeypatch, features, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npy").write_text("a red lantern")
    (tmp_path / "empty.npy").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        text_pipeline(features=[features])


def test_an_encoder_of_another_model(text_models):
    narrow = WordEncoder()
    narrow.dim = 16
    with pytest.raises(ValueError, match="text encoder has features of 16 numbers and the GPT takes 12"):
        ImagePipeline(text_models[0][torch.float32], text_models[1], text_encoder=narrow)(["a map"])
    for count in (-1, WORDS + 1):
        with pytest.raises(ValueError, match=f"{count} text tokens for a GPT with 9 condition rows"):
            ImagePipeline(text_models[0][torch.float32], text_models[1], t5_tokens=count)


@pytest.mark.parametrize("name, size", [("t2i_XL_stage1_256.pt", 256), ("t2i_XL_stage2_512.pt", 512)])
def test_released_text_models(tmp_path, name, size):
    """Small ones under the released names: a bare state, the size of the image in the name, the tokenizer beside it."""
    gpt = text_gpt(block_size=(size // 16) ** 2)
    save_checkpoint(tmp_path / name, {"model": gpt.state_dict()})
    tokenizer = VQ_models["VQ-16"](codebook_size=64, ch=32, z_channels=32)
    save_checkpoint(tmp_path / "vq_ds16_t2i.pt", {"model": tokenizer.state_dict()})
    pipeline = ImagePipeline.from_pretrained(tmp_path, gpt=name, text_encoder=WordEncoder())
    assert pipeline.text and pipeline.image_size == size and pipeline.gpt.layout.prefix == WORDS
    assert pipeline.gpt.args.caption_dim == WIDTH and isinstance(pipeline.text_encoder, WordEncoder)


def test_decoding_where_memory_is_short(pipeline, monkeypatch):
    """Fewer at once; in strips where not even one fits; and the error itself where those do not."""
    codes = torch.randint(64, (5, 64), generator=torch.Generator().manual_seed(0))
    expected, decode, room, asked = pipeline.decode(codes), pipeline.tokenizer.to_pixels, 1, []

    def to_pixels(codes):
        asked.append(len(codes))
        if len(codes) > room:
            raise torch.OutOfMemoryError("no room")
        return decode(codes)

    def no_room(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(pipeline.tokenizer, "to_pixels", to_pixels)
    with pytest.warns(UserWarning, match="memory is short: images are decoded one at a time"):
        assert np.abs(pipeline.decode(codes).astype(int) - expected).max() <= 1
    assert asked == [2, 1, 1, 1, 1, 1]
    room = 0
    asked.clear()
    with pytest.warns(UserWarning, match="memory is short: images are decoded in strips"):
        assert np.abs(pipeline.decode(codes).astype(int) - expected).max() <= 1
    assert asked == [2, 1]
    monkeypatch.setattr(pipeline.tokenizer, "to_pixels_in_strips", no_room)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="memory is short"):
        pipeline.decode(codes)


def test_tokenizer_of_a_released_gpt_is_the_released_one(small_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "pretrained_models"
    weights.mkdir()
    for name, file in (("c2i_L_384.pt", small_files.gpt), ("vq_ds16_c2i.pt", small_files.vq)):
        (weights / name).symlink_to(file)
    assert tokenizer_of("c2i_L_384.pt").resolve() == small_files.vq
    with pytest.raises(ValueError, match="does not record its tokenizer"):
        tokenizer_of(small_files.gpt)
