"""Identity of GPT files: configs, published files known by their shapes, and flags that do not fit."""

import warnings
from pathlib import Path

import pytest
import torch

from autoregressive.models.build import build_model
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.pipeline import load_gpt
from autoregressive.released import check_flags, describe, find_identity, flags_of, gpt_identity
from tests.helpers import golden_state, load_golden, randomize
from utils.checkpoint import Checkpoint, parameter_count

SIZES = {
    name: size for name, size in GPT_SIZES.items() if size.trunk == "llama" and not name.endswith("-XS")
}  # the published ones
COUNTS = ["111M", "266M", "343M", "775M", "1.4B", "3.9B", "1.2B", "3.1B", "6.6B"]


def golden(name: str) -> dict[str, torch.Tensor]:
    meta = load_golden(name)[1]
    return golden_state(meta["state_dict"], meta["config"]["seed"])


def meta_gpt(
    n_layer: int, n_head: int, dim: int, special: int = 0, text: bool = False, n_kv_head: int | None = None
) -> dict[str, torch.Tensor]:
    """A full-size GPT's names and shapes without memory, from the golden's names."""
    hidden = -(-int(8 * dim / 3) // 256) * 256
    rows = dim + 2 * (n_kv_head or n_head) * (dim // n_head)
    shapes = {"tok_embeddings.weight": (16384, dim), "norm.weight": (dim,), "output.weight": (16384, dim)}
    if text:
        shapes |= {
            "cls_embedding.uncond_embedding": (120, 2048),
            "cls_embedding.cap_proj.fc1.weight": (dim, 2048),
            "cls_embedding.cap_proj.fc2.weight": (dim, dim),
        }
    else:
        shapes["cls_embedding.embedding_table.weight"] = (1001, dim)
    if special:
        shapes["spe_tok_embeddings.special_embeddings.weight"] = (special, dim)
    for i in range(n_layer):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (rows, dim),
            f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w3.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def file_of(state, name="runs/a.pt", args=None, config=None) -> Checkpoint:
    return Checkpoint(Path(name), state, None, None, args, None, "ddp", config=config or {})


def identity_of(state, name="runs/a.pt") -> dict:
    return find_identity(file_of(state, name))


# What a GPT file holds


@pytest.mark.parametrize(("name", "count"), list(zip(SIZES, COUNTS)))
def test_published_sizes_are_recognised(name, count):
    n_layer, n_head, dim, *_ = GPT_SIZES[name]
    state = meta_gpt(n_layer, n_head, dim)
    found = identity_of(state)
    model = found["model"]
    assert (model["n_layer"], model["n_head"], model["n_kv_head"], model["dim"]) == (n_layer, n_head, n_head, dim)
    assert found["conditions"] == {"label": {"num_classes": 1000}} and found["layout"] == {"name": "raster"}
    assert flags_of(found)["gpt_model"] == name and parameter_count(state) == count
    words = f"{name} ({n_layer} layers, dim {dim}, {count}), class-conditional, 1000 classes, 16384 codes"
    assert describe(found, state) == words


def test_published_text_parallel_and_grouped_head_models_are_recognised():
    text = identity_of(meta_gpt(*GPT_SIZES["GPT-XL"][:3], text=True))
    assert text["conditions"] == {"caption": {"caption_dim": 2048, "tokens": 120}}
    assert "text-conditional, 120 text tokens of 2048" in describe(text)
    assert identity_of(meta_gpt(*GPT_SIZES["GPT-3B"][:3], special=15))["layout"] == {
        "name": "parallel",
        "group_size": 16,
    }
    grouped = identity_of(meta_gpt(*GPT_SIZES["GPT-B"][:3], n_kv_head=4))["model"]
    assert (grouped["n_kv_head"], grouped["ffn_dim"]) == (4, 2048)


def test_neighbours_are_recognised_by_their_second_exit():
    layers, heads, dim, *_ = GPT_SIZES["GPT-M"]
    second_exit = {"medusa_norm.weight": (dim,), "medusa_output.weight": (16384, dim)}
    state = meta_gpt(layers + 1, heads, dim) | {k: torch.empty(v, device="meta") for k, v in second_exit.items()}
    found = identity_of(state, "last_version.pt")
    assert found["layout"] == {"name": "neighbours"} and found["model"]["n_layer"] == layers
    assert describe(found, state).startswith("GPT-M (18 layers, dim 1024, 295M), class-conditional")
    args = ModelArgs.from_identity(gpt_identity(file_of(state), image_size=256))
    with torch.device("meta"):
        assert {k: v.shape for k, v in Transformer(args).state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_neighbours_with_a_deeper_exit_are_read_off_the_recorded_flags(tmp_path):
    shape = {"dim": 32, "n_layer": 2, "n_head": 4, "vocab_size": 20, "num_classes": 5, "block_size": 16}
    made = randomize(Transformer(ModelArgs(**shape, layout={"name": "neighbours"}, exit_blocks=2)), gain=2.0).eval()
    args = {"image_size": 64, "downsample_size": 16, "medusa_attention_num": 2}
    torch.save({"model": made.state_dict(), "args": args}, tmp_path / "nar.pt")
    model = load_gpt(tmp_path / "nar.pt", n_head=4)
    assert (model.args.n_layer, len(model.layers)) == (2, 4)
    assert ModelArgs.from_identity(model.args.identity).exit_blocks == 2
    tokens, labels = torch.arange(15).repeat(2, 1), torch.tensor([1, 3])
    torch.testing.assert_close(model(tokens, labels), made(tokens, labels))
    assert made.of_second_exit("layers.3.ffn_norm.weight") == "layers.1.ffn_norm.weight"
    assert made.of_second_exit("layers.1.ffn_norm.weight") is None


@pytest.mark.parametrize(("name", "prefix"), [("nar", 1), ("nar_t2i", 8)])
def test_neighbours_of_no_table_load_with_their_heads(name, prefix, tmp_path):
    torch.save({"model": golden(name)}, tmp_path / "last_version.pt")
    model = load_gpt(tmp_path / "last_version.pt", image_size=96, n_head=4)
    assert (model.layout.name, model.layout.grid_size, model.layout.prefix) == ("neighbours", 6, prefix)
    assert len(model.layers) == model.args.n_layer + 1 == 4 and model.args.kv_heads == 4
    torch.testing.assert_close(model.medusa_output.weight.data, golden(name)["medusa_output.weight"])
    with pytest.raises(ValueError, match="in no table"):
        load_gpt(tmp_path / "last_version.pt", image_size=96)
    with pytest.raises(ValueError, match="3 heads must divide dim 64"):
        load_gpt(tmp_path / "last_version.pt", image_size=96, n_head=3)


@pytest.mark.parametrize(("kind", "layout"), [("gpt", "neighbours"), ("par", "neighbours"), ("nar", "raster")])
def test_a_file_of_another_layout_is_refused_with_the_reason(small_files, kind, layout):
    reason = rf"--layout {layout} \(file: .*\), models of the layout neighbours alone have a second exit"
    with pytest.raises(ValueError, match=reason):
        load_gpt(getattr(small_files, kind), image_size=32, downsample_size=4, layout=layout)


@pytest.mark.parametrize("absent", ["medusa_norm.weight", "layers.3.ffn_norm.weight"])
def test_neighbours_without_a_part_of_their_second_exit_are_refused(tmp_path, absent):
    torch.save({key: value for key, value in golden("nar").items() if key != absent}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=absent):
        load_gpt(tmp_path / "part.pt", image_size=96, n_head=4)


def test_a_size_of_no_table_is_refused_without_a_config():
    found = identity_of(golden("c2i"))
    assert (found["model"]["n_head"], flags_of(found)["gpt_model"]) == (None, None)
    assert describe(found).startswith("a GPT of no named size (3 layers, dim 64")
    with pytest.raises(ValueError, match="in no table, and no config"):
        gpt_identity(file_of(golden("c2i")), image_size=128)


@pytest.mark.parametrize("golden_name", ["c2i", "t2i", "par4"])
def test_a_config_builds_the_model_it_was_written_of(golden_name):
    args = ModelArgs(**load_golden(golden_name)[1]["model_args"])
    state = golden(golden_name)
    identity = gpt_identity(file_of(state, config=args.identity))
    again = Transformer(ModelArgs.from_identity(identity))
    again.load_state_dict(state)
    assert again.args.identity == args.identity and again.layout == Transformer(args).layout


def test_a_config_of_what_is_not_registered_is_refused():
    identity = ModelArgs(dim=32, n_layer=1, n_head=2).identity
    with pytest.raises(ValueError, match=r"no layout is called 'zigzag'.*--import FILE.py"):
        Transformer(ModelArgs.from_identity({**identity, "layout": {"name": "zigzag", "grid_size": 4}}))
    with pytest.raises(ValueError, match=r"no condition is called 'smell'.*--import FILE.py"):
        ModelArgs.from_identity({**identity, "conditions": {"smell": {}}})
    with pytest.raises(ValueError, match="no trunk is called 'mamba'"):
        build_model(ModelArgs.from_identity({**identity, "model": {**identity["model"], "trunk": "mamba"}}))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda: golden("vq16"), r"looks like a VQ image tokenizer \(give it as --vq-ckpt\)"),
        (lambda: {"main.0.weight": torch.zeros(1)}, "looks like a discriminator"),
        (lambda: {"blocks.0.weight": torch.zeros(1), "final_linear.0.weight": torch.zeros(1)}, "a discriminator"),
        (lambda: {"shared.weight": torch.zeros(1), "encoder.block.0.a": torch.zeros(1)}, "a T5 text encoder"),
        (lambda: {"encoder.down_blocks.0.a": torch.zeros(1)}, "an autoencoder of diffusers"),
        (lambda: {"layers.0.attention.wqkv.lora_A.weight": torch.zeros(1)}, "a LoRA adapter"),
        (lambda: golden("c2i") | {"tok_embeddings.weight": torch.zeros(3)}, "should be matrices"),
        (lambda: {"visual.proj": torch.zeros(1)}, "a CLIP"),
        (lambda: {"foo": torch.zeros(1), "bar": torch.zeros(1)}, r"its first weights are foo, bar; a GPT has tok_emb"),
        (
            lambda: {k: v for k, v in golden("c2i").items() if "cls_embedding" not in k},
            r"looks like a part of a GPT; a GPT has cls_embedding\.embedding_table\.weight or",
        ),
    ],
)
def test_other_models_are_no_gpt(other, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        identity_of(other())
    assert str(caught.value).startswith("runs/a.pt is not a GPT checkpoint")


# Flags

FITTING = {
    "gpt_model": "GPT-L",
    "gpt_type": "c2i",
    "image_size": 384,
    "downsample_size": 16,
    "codebook_size": 16384,
    "num_classes": 1000,
    "cls_token_num": 1,
    "spe_token_num": 0,
    "ar_token_num": 1,
}
LARGE = meta_gpt(*GPT_SIZES["GPT-L"][:3])
PARALLEL = meta_gpt(*GPT_SIZES["GPT-XL"][:3], special=3)
TEXT = meta_gpt(*GPT_SIZES["GPT-XL"][:3], text=True)


def compare(state, path, args_in_file=None, **flags) -> None:
    checkpoint = file_of(state, path, args_in_file)
    check_flags(find_identity(checkpoint), checkpoint, **flags)


def disagreement(state, path, args_in_file=None, **flags) -> str:
    with pytest.raises(ValueError) as caught:
        compare(state, path, args_in_file, **flags)
    return str(caught.value)


def test_flags_that_fit_pass_in_silence():
    parallel = FITTING | {"gpt_model": "GPT-XL", "spe_token_num": 3, "ar_token_num": 4}
    text = FITTING | {"gpt_model": "GPT-XL", "gpt_type": "t2i", "cls_token_num": 120, "image_size": 512}
    text |= {"num_classes": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(LARGE, "c2i_L_384.pt")
        compare(LARGE, "c2i_L_384.pt", {"image_size": 384, "downsample_size": 16}, **FITTING)
        compare(LARGE, "runs/0050000.pt", **FITTING | {"image_size": 256})
        compare(PARALLEL, "PAR-XL-4x.pt", None, **parallel)
        compare(TEXT, "t2i_XL_stage2_512.pt", None, **text)


def test_an_image_size_other_than_the_config_is_refused():
    args = ModelArgs(dim=1024, n_layer=24, n_head=16, block_size=24**2)
    checkpoint = file_of(LARGE, config=args.identity)
    check_flags(find_identity(checkpoint), checkpoint, image_size=384, downsample_size=16)
    with pytest.raises(ValueError, match=r"--image-size 256 \(file: 384\)"):
        check_flags(find_identity(checkpoint), checkpoint, image_size=256, downsample_size=16)


def test_every_disagreement_is_listed_with_the_flags_that_fit():
    given = FITTING | {"gpt_model": "GPT-B", "image_size": 256}
    assert disagreement(PARALLEL, "weights/PAR-XL-4x.pt", **given) == (
        "weights/PAR-XL-4x.pt holds GPT-XL (36 layers, dim 1280, 775M), class-conditional, 1000 classes, 16384 codes, "
        "3 special tokens; it does not fit the flags: --gpt-model GPT-B (file: GPT-XL), --ar-token-num 1 (file: 4), "
        "--spe-token-num 0 (file: 3). Use: --gpt-model GPT-XL --ar-token-num 4 --spe-token-num 3 --image-size 384"
    )


@pytest.mark.parametrize(
    ("description", "flags", "problem", "advice"),
    [
        (LARGE, {"gpt_model": "GPT-B"}, "--gpt-model GPT-B (file: GPT-L)", "--gpt-model GPT-L --image-size 384"),
        (
            LARGE,
            {"gpt_type": "t2i", "cls_token_num": 120},
            "--gpt-type t2i (file: c2i), --cls-token-num 120 (file: 1)",
            "--gpt-model GPT-L --gpt-type c2i --cls-token-num 1 --image-size 384",
        ),
        (LARGE, {"num_classes": 10}, "--num-classes 10 (file: 1000)", "--gpt-model GPT-L --num-classes 1000"),
        (LARGE, {"codebook_size": 8192}, "--codebook-size 8192 (file: 16384)", "--codebook-size 16384"),
        (LARGE, {"codebook_size": None, "vocab_size": 8}, "--vocab-size 8 (file: 16384)", "--vocab-size 16384"),
        (LARGE, {"spe_token_num": 3, "ar_token_num": 4}, "--ar-token-num 4 (file: 1)", "--spe-token-num 0"),
        (
            TEXT,
            {"gpt_model": "GPT-XL"},
            "--gpt-type c2i (file: t2i), --cls-token-num 1 (file: 120)",
            "--gpt-model GPT-XL --gpt-type t2i --cls-token-num 120 --image-size 384",
        ),
    ],
)
def test_each_flag(description, flags, problem, advice):
    message = disagreement(description, "c2i_L_384.pt", **FITTING | flags)
    assert problem in message
    assert advice in message.split("Use: ")[1]


def test_the_image_size_recorded_in_the_file_counts():
    recorded = {"image_size": 256, "downsample_size": 8}
    message = disagreement(LARGE, "c2i_L_384.pt", recorded, **FITTING)
    assert "--image-size 384 (file: 256), --downsample-size 16 (file: 8)" in message
    assert message.endswith("Use: --gpt-model GPT-L --image-size 256 --downsample-size 8")


@pytest.mark.parametrize(
    ("name", "size"), [("c2i_L_256.pt", 256), ("t2i_XL_stage2_512.pt", 512), ("PAR-3B-16x.pt", 384)]
)
def test_the_image_size_in_a_name_warns(name, size):
    given = 384 if size != 384 else 256
    with pytest.warns(UserWarning, match=rf"by its name {name} was trained at {size}x{size}.* --image-size {size}"):
        compare(LARGE, name, image_size=given)


def test_a_size_of_no_name():
    message = disagreement(golden("c2i"), "a.pt", gpt_model="GPT-B")
    assert "a GPT of no named size (3 layers, dim 64" in message
    assert "--gpt-model GPT-B (file: none of GPT-XS, " in message
