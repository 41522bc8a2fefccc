"""The baselines, small, in the formats they are published in: VQGAN's Lightning files, diffusers' folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.helpers import assert_close
from tests.tokenizer.taming import F8, F16, TamingByHand, save_lightning, taming_state
from tests.training import check_published_flags, make_images, run_here
from tokenizer.codecs import Codec, find_vqgan, load_autoencoder, load_consistency_decoder, load_vae, vqgan
from tokenizer.consistencydecoder import cd_demo, reconstruction_cd_ddp
from tokenizer.other_families import from_taming
from tokenizer.tokenizer_image.sizes import VQGAN_FROM_TAMING
from tokenizer.vae import reconstruction_vae_ddp, sd_vae_demo
from tokenizer.vqgan import reconstruction_vqgan_ddp, taming_vqgan_demo
from utils import hub
from utils.distributed import Distributed

pytestmark = pytest.mark.slow  # through whole scripts and servers

SHAPES = {
    "vqgan_imagenet_f16_1024": (1024, 256, F16, 256),
    "vqgan_imagenet_f16_16384": (16384, 256, F16, 256),
    "vqgan_openimage_f8_256": (256, 4, F8, 4),
    "vqgan_openimage_f8_16384": (16384, 4, F8, 4),
}
SMALL = "vqgan_openimage_f8_256"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "val", per_class=2)


@pytest.fixture(scope="module")
def vqgan_file(tmp_path_factory) -> Path:
    """A narrow VQGAN of 256 codes as Lightning saves it. Read-only."""
    return save_lightning(tmp_path_factory.mktemp("vqgan") / "last.ckpt", taming_state(*SHAPES[SMALL]))


def pixels(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def line(images: Path, folder: Path, *more) -> list:
    words = ["--data-path", images, "--sample-dir", folder, "--image-size", 32, "--per-proc-batch-size", 3]
    return [*words, "--num-workers", 0, "--device", "cpu", "--no-lpips", *more]


def demo_line(folder: Path, *more) -> list:
    return ["--image-path", "assets/example.jpg", "--output-dir", folder, "--image-size", 32, "--device", "cpu", *more]


# VQGAN


@pytest.mark.parametrize("name", ["vqgan_imagenet_f16_1024", SMALL])
@torch.no_grad()
def test_a_vqgan_computes_what_its_names_say(tmp_path, name):
    """Against taming's network written again from its names, through the file Lightning writes."""
    state = taming_state(*SHAPES[name])
    model = vqgan(save_lightning(tmp_path / "last.ckpt", state, zipped=name.endswith("256")), name)
    by_hand, images = TamingByHand(state, SHAPES[name][2]), pixels()
    latents = by_hand.latents(images)
    assert_close(model.quant_conv(model.encoder(images)), latents, atol=1e-4)
    codes = by_hand.codes(latents)
    assert torch.equal(model.to_codes(images), codes) and len(codes.unique()) > 2
    expected = by_hand.images(codes)
    assert_close(model.to_pixels(codes), expected, atol=1e-4)
    assert model.downsample == 2 ** (len(SHAPES[name][2]) - 1) and not model.quantize.l2_norm


def test_the_table_has_the_published_shapes():
    assert {name: v.shape for name, v in VQGAN_FROM_TAMING.items()} == {
        name: shape[:3] for name, shape in SHAPES.items()
    }


def test_every_weight_has_a_place(vqgan_file):
    state = taming_state(*SHAPES[SMALL])
    ours = from_taming(state)
    assert len(ours) == len(state) - 4 and not any(name.startswith("loss") for name in ours)
    assert ours["decoder.conv_blocks.0.attn.2.q.weight"] is state["decoder.up.3.attn.2.q.weight"]
    assert ours["decoder.conv_blocks.3.res.0.conv1.weight"] is state["decoder.up.0.block.0.conv1.weight"]
    assert ours["encoder.mid.1.v.bias"] is state["encoder.mid.attn_1.v.bias"]


def test_another_vqgan_than_asked_for(vqgan_file):
    with pytest.raises(
        ValueError,
        match=r"last\.ckpt is not vqgan_openimage_f8_16384: .*256 codes of 4.*use --vqgan vqgan_openimage_f8_256",
    ):
        vqgan(vqgan_file, "vqgan_openimage_f8_16384")


def test_weights_that_are_no_vqgan(tmp_path, small_files):
    state = taming_state(*SHAPES[SMALL])
    gumbel = {name.replace("quantize.embedding", "quantize.embed"): tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"gumbel\.ckpt is not a whole .*'quantize\.embedding\.weight'"):
        vqgan(save_lightning(tmp_path / "gumbel.ckpt", gumbel))
    del state["decoder.up.1.block.2.conv2.bias"]
    with pytest.raises(ValueError, match=r"missing \(1\): decoder\.conv_blocks\.2\.res\.2\.conv2\.bias"):
        vqgan(save_lightning(tmp_path / "less.ckpt", state))
    with pytest.raises(ValueError, match=r"gpt\.pt is not an image tokenizer's checkpoint: it looks like a GPT"):
        vqgan(small_files.gpt, SMALL)


def test_where_a_vqgan_is_looked_for(tmp_path, monkeypatch, vqgan_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_ROOT", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"fetch them from https://\S+vq-f8-n256\.zip and put .* --vqgan-ckpt"):
        find_vqgan(SMALL)
    for place in (f"{SMALL}.ckpt", f"{SMALL}/ckpts/last.ckpt", f"{SMALL}/ckpts/last.pth"):
        (tmp_path / "pretrained_models" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pretrained_models" / place).write_bytes(b"")
        assert find_vqgan(SMALL).samefile(tmp_path / "pretrained_models" / place)
    assert find_vqgan(SMALL, vqgan_file) == vqgan_file
    with pytest.raises(FileNotFoundError, match=r"no file gone\.ckpt"):
        find_vqgan(SMALL, "gone.ckpt")


def test_vqgan_scripts(images, vqgan_file, tmp_path, capsys):
    words = ["--vqgan", SMALL, "--vqgan-ckpt", vqgan_file]
    run_here(reconstruction_vqgan_ddp, *line(images, tmp_path, *words))
    name = f"{SMALL}-imagenet-size-32-seed-0"
    found = json.loads((tmp_path / f"{name}_results.json").read_text())
    assert found["codebook_size"] == 256 and 0 < found["codebook_usage"] <= 16 * 4 / 256
    assert np.load(tmp_path / f"{name}.npz")["arr_0"].shape == (4, 32, 32, 3)
    run_here(taming_vqgan_demo, *demo_line(tmp_path, *words))
    assert Image.open(tmp_path / f"example_{SMALL}.png").size == (32, 32)
    assert "from 16 codes" in capsys.readouterr().out


# Stable Diffusion's VAE and the consistency decoder

CPU = Distributed(torch.device("cpu"))


def vae(folder: Path | None = None, sample: bool = False, seed: int = 0) -> tuple[Codec, Path]:
    """The codec of the script's flags, and the file of its weights."""
    words = [f"--vae-path={folder}"] if folder else []
    args = reconstruction_vae_ddp.flags().parse_args(
        ["--data-path=x", *words, *(["--posterior=sample"] if sample else [])]
    )
    loaded = load_vae(args, CPU, seed)
    return loaded.codec, loaded.weights


def consistency_decoder(folder: Path | None = None, seed: int = 0) -> tuple[Codec, Path]:
    words = [f"--cd-path={folder}"] if folder else []
    loaded = load_consistency_decoder(reconstruction_cd_ddp.flags().parse_args(["--data-path=x", *words]), CPU, seed)
    return loaded.codec, loaded.weights


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """A small AutoencoderKL as diffusers saves it. Read-only."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4, **blocks)
    folder = tmp_path_factory.mktemp("vae") / "sd-vae-ft-mse"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cd_folder(tmp_path_factory) -> Path:
    """A small ConsistencyDecoderVAE as diffusers saves it. Read-only."""
    from diffusers import ConsistencyDecoderVAE

    torch.manual_seed(0)
    model = ConsistencyDecoderVAE(
        encoder_block_out_channels=(16, 32),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_norm_num_groups=8,
        decoder_block_out_channels=(16, 32),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_layers_per_block=1,
        decoder_norm_num_groups=8,
    )
    folder = tmp_path_factory.mktemp("cd") / "consistency-decoder"
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_vae(vae_folder):
    """The posterior's mean, decoded; the weights are the file's."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).eval()
    codec, weights = vae(vae_folder)
    assert weights == vae_folder / "diffusion_pytorch_model.safetensors" and codec.downsample == 2
    moments = model.quant_conv(model.encoder(pixels()))
    expected = model.decoder(model.post_quant_conv(moments[:, :4]))
    recons, codes = codec(pixels(), [0, 1])
    assert_close(recons, expected)
    assert codes is None and not codec.draws


@torch.no_grad()
def test_a_draw_from_the_posterior_is_a_function_of_seed_and_image(vae_folder):
    codec, _ = vae(vae_folder, sample=True, seed=3)
    images = pixels(3)
    both, _ = codec(images, [5, 6, 7])
    alone, _ = codec(images[1:2], [6])
    assert_close(both[1:2], alone)
    other, _ = vae(vae_folder, sample=True, seed=4)[0](images[1:2], [6])
    assert (alone - other).abs().max() > 1e-3 and codec.draws
    mean, _ = vae(vae_folder)[0](images[1:2], [6])
    assert (alone - mean).abs().max() > 1e-3


def test_the_vae_of_older_diffusers(vae_folder, tmp_path):
    """sd-vae-ft-mse has its attention under the names of 2022."""
    state = safetensors.torch.load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in state.items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    assert set(renamed) != set(state)
    (tmp_path / "config.json").write_bytes((vae_folder / "config.json").read_bytes())
    safetensors.torch.save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    expected, _ = vae(vae_folder)[0](pixels(), [0, 1])
    assert torch.equal(vae(tmp_path)[0](pixels(), [0, 1])[0], expected)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert torch.equal(vae(tmp_path)[0](pixels(), [0, 1])[0], expected)


def test_a_pickle_that_runs_code_is_refused(vae_folder, tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "config.json").write_bytes((vae_folder / "config.json").read_bytes())
    torch.save({"a": Harmful()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is damaged or does not fit"):
        vae(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_folders_that_are_no_vae(vae_folder, cd_folder, tmp_path):
    def folder(name: str, **changes: bytes | None) -> Path:
        (tmp_path / name).mkdir()
        for path in vae_folder.iterdir():
            content = changes.get(path.suffix[1:], path.read_bytes())
            if content is not None:
                (tmp_path / name / path.name).write_bytes(content)
        return tmp_path / name

    whole = (vae_folder / "diffusion_pytorch_model.safetensors").read_bytes()
    state = safetensors.torch.load(whole)
    less = safetensors.torch.save({name: tensor for name, tensor in state.items() if name != "decoder.conv_in.bias"})
    more = safetensors.torch.save({**state, "another.weight": torch.zeros(1)})
    for path, error, message in (
        (folder("a", json=None), FileNotFoundError, r"it needs config\.json"),
        (folder("b", safetensors=None), FileNotFoundError, "is no diffusers folder"),
        (folder("c", json=b"{"), ValueError, r"does not fit .*config\.json"),
        (folder("d", safetensors=whole[:1000]), ValueError, r"safetensors is damaged or does not fit"),
        (folder("e", safetensors=less), ValueError, r"decoder\.conv_in\.bias"),
        (folder("f", safetensors=more), ValueError, r"another\.weight"),
        (cd_folder, ValueError, "holds a model of class ConsistencyDecoderVAE, not AutoencoderKL"),
    ):
        with pytest.raises(error, match=message):
            load_autoencoder("AutoencoderKL", path)


def test_a_vae_is_looked_for_in_pretrained_models(vae_folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_ROOT", tmp_path / "nowhere")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"stabilityai/sd-vae-ft-mse is not on this disk .*pretrained_models/sd-vae"
    ):
        vae()
    with pytest.raises(FileNotFoundError, match="openai/consistency-decoder is not on this disk"):
        consistency_decoder()
    (tmp_path / "pretrained_models").mkdir()
    (tmp_path / "pretrained_models" / "sd-vae-ft-mse").symlink_to(vae_folder)
    assert vae()[1].samefile(vae_folder / "diffusion_pytorch_model.safetensors")


def test_what_is_fetched_of_a_repository():
    """The layout that is read, and not the same weights in others."""
    for name in ("stabilityai/sd-vae-ft-mse", "stabilityai/sdxl-vae", "openai/consistency-decoder"):
        assert hub.RELEASED[name].files == ("config.json", "diffusion_pytorch_model.safetensors")
    assert "*.model" in hub.RELEASED["google/flan-t5-xl"].files


def test_vae_scripts(images, vae_folder, tmp_path):
    run_here(reconstruction_vae_ddp, *line(images, tmp_path, "--vae-path", vae_folder))
    name = "stabilityai-sd-vae-ft-mse-imagenet-size-32-seed-0"
    found = json.loads((tmp_path / f"{name}_results.json").read_text())
    assert found["images"] == 4 and "diffusers" in found["versions"] and "codebook_usage" not in found
    words = ["--vae-path", vae_folder, "--posterior", "sample", "--image-size-eval", 24]
    with pytest.raises(
        ValueError, match=r"other settings \(image_size_eval: 32, now 24; .*choose another --sample-dir"
    ):
        run_here(reconstruction_vae_ddp, *line(images, tmp_path, *words))
    run_here(reconstruction_vae_ddp, *line(images, tmp_path / "sample", *words))
    assert np.load(tmp_path / "sample" / f"{name}.npz")["arr_0"].shape == (4, 24, 24, 3)
    run_here(sd_vae_demo, *demo_line(tmp_path, "--vae-path", vae_folder, "--suffix", "x"))
    assert Image.open(tmp_path / "example_x.png").size == (32, 32)


def test_consistency_decoder_scripts(images, cd_folder, tmp_path):
    """Images do not depend on the batches they are computed in, but for rounding, and on the seed."""
    arrays = []
    for seed, batch in ((0, 4), (0, 2), (1, 4)):
        words = ["--cd-path", cd_folder, "--global-seed", seed, "--per-proc-batch-size", batch]
        run_here(reconstruction_cd_ddp, *line(images, tmp_path / str(len(arrays)), *words))
        name = f"openai-consistencydecoder-imagenet-size-32-seed-{seed}"
        arrays.append(np.load(tmp_path / str(len(arrays)) / f"{name}.npz")["arr_0"].astype(int))
    assert np.abs(arrays[0] - arrays[1]).max() <= 1
    assert np.abs(arrays[0] - arrays[2]).max() > 1
    run_here(cd_demo, *demo_line(tmp_path, "--cd-path", cd_folder))
    assert Image.open(tmp_path / "example_consistency-decoder.png").size == (32, 32)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--image-path", "gone.jpg"], FileNotFoundError, r"gone\.jpg: there is no such file"),
        (["--image-path", "README.md"], ValueError, "not a readable image"),
        (["--image-size", 33], ValueError, "--image-size 33 is not a multiple of 2"),
    ],
)
def test_a_demos_mistakes(vae_folder, tmp_path, words, error, message):
    with pytest.raises(error, match=message):
        run_here(sd_vae_demo, *demo_line(tmp_path, "--vae-path", vae_folder, *words))


SHARED = """
`--data-path` str = required; `--dataset` str ∈ [imagenet, coco] = imagenet; `--image-size` int ∈ [256, 512] = 256;
`--sample-dir` str = reconstructions; `--per-proc-batch-size` int = 32; `--global-seed` int = 0; `--num-workers` int = 4
"""
DEMO = "`--image-path` str = assets/example.jpg; `--image-size` int ∈ [256, 512, 1024] = 512; `--seed` int = 0"
NAMES = ", ".join(SHAPES)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (reconstruction_vqgan_ddp, f"{SHARED}; `--vqgan` str ∈ [{NAMES}] = vqgan_imagenet_f16_16384"),
        (reconstruction_vae_ddp, f"{SHARED}; `--vae` str ∈ [sdxl-vae, sd-vae-ft-mse] = sd-vae-ft-mse"),
        (reconstruction_cd_ddp, SHARED),
        (taming_vqgan_demo, f"{DEMO}; `--vqgan` str ∈ [{NAMES}] = vqgan_openimage_f8_16384"),
        (sd_vae_demo, f"{DEMO}; `--vae` str ∈ [sdxl-vae, sd-vae-ft-mse] = sd-vae-ft-mse"),
        (cd_demo, DEMO),
    ],
)
def test_published_flags(script, text):
    check_published_flags(script, text)
