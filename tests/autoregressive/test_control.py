"""Control images: against the recorded figures of ControlAR, and what holds of any model with them."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from autoregressive.models import decode_step
from autoregressive.models.build import build_gpt
from autoregressive.models.canny import canny
from autoregressive.models.conditions.control import Control, ControlImage, control_pixels
from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.sampling import SamplingConfig
from autoregressive.pipeline import ImagePipeline, decode_codes, load_gpt
from autoregressive.released import find_identity
from autoregressive.request import Request
from autoregressive.serve.convert import open_gpt
from autoregressive.systems import NEVER_USED, NEWER_NAMES, OWN_CONTROL, named_as
from autoregressive.train.control import RandomSides, edges_of, encoder_settings, resized, with_control
from autoregressive.train.loss import TokenLoss
from tests.helpers import assert_close, golden_state, load_golden, randomize
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.checkpoint import read_checkpoint
from utils.hub import RELEASED
from utils.runs import find_checkpoint

GOLDENS = ["controlar_c2i", "controlar_t2i"]
RUNS = {
    "cfg1": {},
    "cfg4": {"cfg_scale": 4.0},
    "cfg4_strength0.6": {"cfg_scale": 4.0, "control_strength": 0.6},
    "cfg4_strength0": {"cfg_scale": 4.0, "control_strength": 0.0},
}
ENCODERS = {
    "vit": {"encoder": "vit", "width": 32, "layers": 1, "heads": 2, "positions": 4, "patch": 4, "pixels": 4},
    "dinov2": {
        "encoder": "dinov2",
        "width": 64,
        "layers": 1,
        "heads": 1,
        "positions": 3,
        "pixels": 16,
        "kind": "depth",
    },
}


def build(name: str) -> tuple[Transformer, dict, dict]:
    """The recorded model, which is given features, and its conditions."""
    arrays, meta = load_golden(name)
    args = {k: v for k, v in meta["model_args"].items() if k in ModelArgs.__dataclass_fields__}
    control = {"encoder": None, "width": arrays["features"].shape[2]}
    model = Transformer(ModelArgs(**args, extra_conditions={"control": control}))
    state = golden_state(meta["state_dict"], meta["config"]["seed"], meta["config"]["gain"])
    model.load_state_dict(named_as(model.state_dict(), state), strict=True)
    first = "label" if "labels" in arrays else "caption"
    cond = {first: torch.from_numpy(arrays["labels" if first == "label" else first])}
    return model.eval(), arrays, {**cond, "control": torch.from_numpy(arrays["features"])}


def small(encoder: str | None = "vit", **more) -> Transformer:
    """A model with weights that let every part count."""
    extra = {"control": ENCODERS[encoder]} if encoder else {}
    args = {"block_size": 16, "vocab_size": 64, "num_classes": 10, "extra_conditions": extra, **more}
    return randomize(build_gpt("GPT-XS", **args), gain=1.5)


def inputs(count: int = 3, width: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"label": torch.arange(count), "control": torch.randn(count, 16, width, generator=generator)}


def pictures(count: int = 3, size: int = 16, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", GOLDENS)
def test_training_step_of_the_published_system_is_reproduced(name):
    model, arrays, cond = build(name)
    mask = torch.from_numpy(arrays["caption_mask"]) if "caption_mask" in arrays else None
    valid = torch.from_numpy(arrays["valid"]) if "valid" in arrays else None
    drop, codes = torch.from_numpy(arrays["drop"]).bool(), torch.from_numpy(arrays["codes"])
    assert_close(model(codes[:, :-1], cond, drop=drop, prefix_mask=mask), arrays["train/logits"], atol=1e-4)
    loss = TokenLoss(model)(codes, cond, drop=drop, prefix_mask=mask, valid=valid)
    assert_close(loss.double(), arrays["train/loss"])
    loss.backward()
    gradients = {key.removeprefix("train/grad/"): torch.from_numpy(arrays[key]) for key in arrays if "/grad/" in key}
    assert len(gradients) == 4
    parameters = dict(model.named_parameters())
    fake = {"adapter_mlp.fc1.weight": gradients["adapter_mlp.fc1.weight"], **gradients}
    for key, value in named_as(parameters, fake).items():
        assert_close(parameters[key].grad, value)


@pytest.mark.parametrize(("name", "run"), [(n, r) for n in GOLDENS for r in RUNS if n != GOLDENS[0] or "str" not in r])
@pytest.mark.parametrize("window", [0, 4])
def test_greedy_tokens_of_the_published_system_are_reproduced(name, run, window, monkeypatch):
    model, arrays, cond = build(name)
    mask = torch.from_numpy(arrays["caption_mask"]) if "caption_mask" in arrays else None
    calls, draw_tokens = [], decode_step.draw_tokens
    monkeypatch.setattr(decode_step, "draw_tokens", lambda logits, *a: calls.append(logits) or draw_tokens(logits, *a))
    codes = generate(model, cond, emb_masks=mask, sample_logits=False, window=window, **RUNS[run])
    assert codes.tolist() == arrays[f"generate/{run}/tokens"].tolist()
    if not window:
        assert_close(torch.cat(calls, dim=1), arrays[f"generate/{run}/logits"], atol=1e-4)


@pytest.mark.parametrize("run", ["canny/80x80", "canny/64x96", "depth/80x80", "depth/64x96"])
def test_encoder_of_the_published_system_is_reproduced(run):
    arrays, meta = load_golden("control_encoder")
    config = meta["config"]
    sizes = {"width": config["width"], "layers": config["layers"], "heads": config["heads"]}
    control = Control(
        8, 5, encoder="dinov2", **sizes, positions=config["pretrained_grid"], kind=run.split("/")[0]
    ).eval()
    state = golden_state(meta["state_dict"], config["seed"], config["gain"])  # by the names of transformers 4
    own = control.state_dict()
    assert sum(name.startswith("adapter.") for name in own) == len(state) - 1, "all but the mask token"
    control.load_state_dict({name: named_as(own, state).get(name, own[name]) for name in own}, strict=True)
    images = (torch.from_numpy(arrays[f"{run}/control"]).float() + 1) * 127.5
    with torch.no_grad():
        assert_close(control.resized(images)[:, :1], arrays[f"{run}/resized"], atol=1e-4)
        assert_close(control.features(images), arrays[f"{run}/features"], atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"ar_token_num": 4}])
@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_decode_steps_give_the_logits_of_the_whole_sequence(more, strength, monkeypatch):
    model, cond = small(**more), inputs()
    calls, draw_tokens = [], decode_step.draw_tokens
    monkeypatch.setattr(decode_step, "draw_tokens", lambda logits, *a: calls.append(logits) or draw_tokens(logits, *a))
    codes = generate(model, cond, sample_logits=False, control_strength=strength)
    tokens = codes[:, model.layout.order][:, : -model.layout.step_tokens]
    with torch.no_grad():
        whole = model(tokens, {**cond, "control": cond["control"] * strength})
    assert_close(torch.cat(calls, dim=1), whole, atol=1e-4)


def test_without_control_a_model_is_the_base_to_the_bit():
    model, base, cond = small(), small(None), inputs()
    base.load_state_dict({name: value for name, value in model.state_dict().items() if name in base.state_dict()})
    noise = torch.arange(48).view(3, 16)
    expected = generate(base, cond["label"], noise=noise, cfg_scale=3.0)
    null = model.conditions["control"].null
    drawn = {
        "strength": generate(model, cond, noise=noise, cfg_scale=3.0, control_strength=0.0),
        "features": generate(model, {**cond, "control": null(cond["control"])}, noise=noise, cfg_scale=3.0),
        "images": generate(model, {**cond, "control": null(pictures())}, noise=noise, cfg_scale=3.0),
    }
    assert all(torch.equal(codes, expected) for codes in drawn.values())
    codes = torch.arange(48).view(3, 16)
    with torch.no_grad():
        assert torch.equal(
            model(codes[:, :-1], {**cond, "control": null(cond["control"])}), base(codes[:, :-1], cond["label"])
        )


def test_drop_takes_label_and_control_together():
    model, cond, drop = small(), inputs(), torch.tensor([True, False, True])
    codes = torch.arange(48).view(3, 16)
    control = torch.where(drop[:, None, None], 0, cond["control"])
    nothing = {"label": torch.where(drop, 10, cond["label"]), "control": control}
    with torch.no_grad():
        assert torch.equal(model(codes[:, :-1], cond, drop=drop), model(codes[:, :-1], nothing))
        images = model(codes[:, :-1], {**cond, "control": pictures()}, drop=drop)
        assert torch.equal(images[drop], model(codes[:, :-1], nothing)[drop])


def test_a_narrow_model_with_initial_weights_learns_of_its_control():
    torch.manual_seed(0)
    model = build_gpt(
        "GPT-XS", block_size=16, vocab_size=64, num_classes=10, extra_conditions={"control": ENCODERS["vit"]}
    )
    images = pictures(8).where(torch.rand(8, 1, 16, 16) > 0.5, 0)
    cond, codes = {"label": torch.zeros(8, dtype=torch.long), "control": images}, torch.arange(8 * 16).view(8, 16) % 64
    assert 1e-3 < model.conditions["control"](images).std() < 0.1
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=2e-3), TokenLoss(model)
    for _ in range(25):
        loss(codes, cond).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        right, other = (float(loss(codes, {**cond, "control": each})) for each in (images, images.roll(1, 0)))
    assert right < other - 0.5
    wide = Control(1280, 4, encoder=None, width=384)
    before = wide.adapter_mlp.fc1.weight.clone()
    wide.rescale()
    assert torch.equal(wide.adapter_mlp.fc1.weight, before)


def test_strength_counts_without_guidance_and_is_a_number_from_zero_on():
    model, cond = small(), inputs()
    codes = [generate(model, cond, sample_logits=False, control_strength=s) for s in (1.0, 0.5)]
    assert not torch.equal(*codes)
    with pytest.raises(ValueError, match="control-strength must be 0 or more"):
        SamplingConfig(control_strength=-1)
    with pytest.raises(ValueError, match="is for models with control images; this one takes label"):
        Request({"label": 1}, sampling=SamplingConfig(control_strength=0.5)).read(small(None).conditions)


def test_images_are_what_their_features_are():
    model, images = small(), pictures()
    control = model.conditions["control"]
    cond = inputs()
    features = torch.stack([control.read(image) for image in images])
    assert features.shape == (3, 16, 32)
    drawn = [
        generate(model, {**cond, "control": each}, sample_logits=False, cfg_scale=2.0) for each in (images, features)
    ]
    assert torch.equal(*drawn)
    colours = images.expand(-1, 3, -1, -1)
    assert torch.equal(control.read(ControlImage(colours[1])), features[1])


def test_pictures_become_edges_unless_they_are_edges():
    step = np.zeros((40, 60, 3), np.uint8)
    step[:, 30:] = 200
    edges = control_pixels(Image.fromarray(step), "canny", 16)
    assert edges.shape == (3, 16, 16) and set(edges.unique().tolist()) == {0, 255} and (edges == 255).sum() < 100
    drawn = np.zeros((16, 16, 3), np.uint8)
    drawn[4] = 255
    assert torch.equal(control_pixels(Image.fromarray(drawn), "canny", 16).permute(1, 2, 0), torch.from_numpy(drawn))
    assert torch.equal(
        control_pixels(Image.fromarray(step), "seg", 40)[0, 0].unique(), torch.tensor([0, 200], dtype=torch.uint8)
    )


def test_transparency_of_control_pictures_is_laid_on_white():
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[..., 0], picture[4:12, 4:12] = 200, (0, 0, 0, 255)
    for mode in ("RGBA", "PA"):
        pixels = control_pixels(Image.fromarray(picture).convert(mode), "seg", 16)
        assert pixels[:, 0, 0].tolist() == [255, 255, 255] and pixels[:, 8, 8].tolist() == [0, 0, 0]


def test_canny_draws_one_line_along_a_step_and_follows_weak_pixels():
    image = torch.zeros(1, 3, 12, 16, dtype=torch.uint8)
    assert not canny(image).any()
    image[..., 8:] = 255
    expected = torch.zeros(1, 1, 12, 16, dtype=torch.uint8)
    expected[..., 7] = 255
    assert torch.equal(canny(image), expected)
    image[..., 8:] = 60
    image[..., :8, 8:] = 40  # gradients of 160 there, between the thresholds, and of 240 below
    assert (canny(image) == 255).any(-1).all()
    image[..., 8:] = 40
    assert not canny(image).any(), "nothing above the higher threshold"
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[..., 4:] = 1.0
    assert (edges_of(pixels) == 255).any()


def published(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights as ControlAR's files have them, the encoder's by the names of transformers 4."""
    state = {name.removeprefix(OWN_CONTROL): value.contiguous() for name, value in model.state_dict().items()}
    dim = model.args.dim
    older = {}
    for name, value in state.items():
        if name.startswith("adapter.model."):
            for before, now in list(NEWER_NAMES.items())[1:5]:
                name = name.replace(now, before)
        older[name] = value
    never = dict(zip(NEVER_USED, (torch.zeros(64, dim), torch.ones(dim), torch.zeros(16, dim))))
    return older | never | {"adapter.model.embeddings.mask_token": torch.zeros(1, 64)}


def test_a_published_file_is_recognised_and_draws_as_its_model(tmp_path):
    model = small("dinov2")
    save_file(published(model), tmp_path / "depth_base.safetensors")
    loaded = load_gpt(tmp_path / "depth_base.safetensors")
    assert loaded.conditions["control"].config == model.conditions["control"].config
    cond = {"label": torch.arange(3), "control": pictures(3, 64)}
    drawn = [generate(each, cond, sample_logits=False, cfg_scale=2.0) for each in (model, loaded)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["canny_MR", "depth_MR", "hed", "seg_cocostuff", "edge_base", "depth_base"])
def test_published_files_are_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "pretrained_models/ControlAR"
    place.mkdir(parents=True)
    save_file(published(small("dinov2")), place / f"{name}.safetensors")
    for given in (f"{name}.safetensors", f"wondervictor/ControlAR/{name}.safetensors"):
        kind = load_gpt(find_checkpoint(given)).conditions["control"].config["kind"]
        assert RELEASED[f"wondervictor/ControlAR/{name}.safetensors"].flags["--control-type"] == kind


def test_a_published_file_of_several_resolutions_reads_the_rotary_table_by_number(tmp_path):
    model = small("dinov2")
    save_file(published(model), tmp_path / "depth_MR.safetensors")
    loaded = load_gpt(tmp_path / "depth_MR.safetensors", image_size=48)
    assert loaded.layout.grid_size == 3 and loaded.args.identity["model"]["rope_grid"] == 4
    device = torch.device("cpu")
    assert torch.equal(loaded.rope(device)[:10], model.rope(device)[:10])
    assert ModelArgs.from_identity(loaded.args.identity).rope_grid == 4
    assert load_gpt(tmp_path / "depth_MR.safetensors").args.rope_grid == 4
    lacking = {name: value for name, value in published(model).items() if name != NEVER_USED[2]}
    save_file(lacking, tmp_path / "canny_MR.safetensors")
    for side, grid in ((48, 3), (None, 48)):
        loaded = load_gpt(tmp_path / "canny_MR.safetensors", image_size=side)
        assert (loaded.layout.grid_size, loaded.args.rope_grid) == (grid, 48)
    with pytest.raises(ValueError, match="has no places for 5x5"):
        load_gpt(tmp_path / "depth_MR.safetensors", image_size=80)
    save_file(published(model), tmp_path / "hed.safetensors")
    with pytest.raises(ValueError, match="--image-size 48"):
        load_gpt(tmp_path / "hed.safetensors", image_size=48)


def test_a_published_file_without_its_encoder_takes_features_alone(tmp_path):
    state = published(small("dinov2"))
    save_file({n: t for n, t in state.items() if not n.startswith("adapter.")}, tmp_path / "canny_base.safetensors")
    loaded = load_gpt(tmp_path / "canny_base.safetensors")
    with pytest.raises(ValueError, match="has no encoder of control images"):
        loaded.conditions["control"].read(Image.new("RGB", (64, 64)))
    part = {n: t for n, t in state.items() if n != "adapter.model.layernorm.weight"}
    save_file(part, tmp_path / "canny_part.safetensors")
    with pytest.raises(ValueError, match=r"missing \(1\): extra_conditions.control.adapter.model.layernorm.weight"):
        load_gpt(tmp_path / "canny_part.safetensors")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1, 20, 20, dtype=torch.uint8), r"control takes images of 16x16 pixels.*got torch.uint8 of shape"),
        (torch.zeros(2, 16, 16), "control takes images of 16x16"),
        (torch.zeros(9, 32), "control takes images of 16x16"),
        (torch.full((16, 32), torch.nan), "features of control are not all finite"),
        (torch.zeros(3, 16, 16), "control takes images of 16x16 pixels, uint8"),
        (None, "an image without its control image"),
        (Image.new("I;16", (16, 16)), "pixels of mode I;16: give a picture of 8 bits"),
        (Image.new("F", (16, 16)), "pixels of mode F"),
        (ControlImage(Image.new("RGB", (8, 8)), "sketch"), "--control-type is 'sketch': give canny, seg"),
    ],
)
def test_a_control_that_does_not_fit_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        small().conditions["control"].read(value)


def test_a_model_that_control_cannot_be_added_to_is_refused():
    with pytest.raises(ValueError, match="added before 3 blocks, and the model has 2"):
        small(n_layer=2)
    with pytest.raises(ValueError, match="the trunk 'rar' has no conditions that are added before its blocks"):
        build_gpt("RAR-XS", block_size=16, num_classes=10, extra_conditions={"control": ENCODERS["vit"]})
    with pytest.raises(ValueError, match="conditions label, control; given were label"):
        generate(small(), torch.arange(2))


def test_a_pretrained_encoder_begins_with_its_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    shapes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 14, "image_size": 42}
    encoder = transformers.Dinov2Model(transformers.Dinov2Config(**shapes))
    encoder.save_pretrained(tmp_path / "dinov2")
    settings = encoder_settings(str(tmp_path / "dinov2"))
    assert settings == {"encoder": "dinov2", "width": 64, "layers": 1, "heads": 1, "positions": 3, "patch": 14}
    model, base = small("dinov2"), small(None)
    args = Namespace(control_encoder=str(tmp_path / "dinov2"))
    own = {OWN_CONTROL + "adapter.model." + name: value for name, value in encoder.state_dict().items()}
    fresh, notes = with_control(args, None, model)
    torch.save({"model": base.state_dict()}, tmp_path / "base.pt")
    tuned, _ = with_control(args, read_checkpoint(tmp_path / "base.pt"), model)
    assert "its encoder as" in notes[0]
    for begun in (fresh, tuned):
        assert begun.model.keys() == model.state_dict().keys()
        held = [name for name in own if name in begun.model]
        assert len(held) == len(own) - 1 and all(torch.equal(begun.model[name], own[name]) for name in held)
    assert torch.equal(tuned.model["output.weight"], base.output.weight)
    assert find_identity(read_checkpoint(tmp_path / "base.pt"))["conditions"] == {"label": {"num_classes": 10}}
    for file in (tmp_path / "dinov2").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"--control-encoder .* has no weights"):
        with_control(args, None, model)
    with pytest.raises(ValueError, match="is no model of transformers"):
        encoder_settings(str(tmp_path / "absent"))


# A second implementation, written from the paper's rules


def by_hand(model: Transformer, tokens, cond, drop, strength: float = 1.0, prefix_mask=None) -> torch.Tensor:
    """Logits of each next token by a plain loop; `drop` marks samples without condition and control."""
    state = model.state_dict()
    first, features = (value for value in cond.values())
    name = next(iter(cond))
    null = model.conditions[name].null(first)
    first = torch.where(drop.view(-1, *[1] * (first.dim() - 1)), null, first)
    rows = model.conditions[name].embed(first)

    def mlp(x, name):
        x = torch.nn.functional.gelu(x @ state[OWN_CONTROL + name + ".fc1.weight"].T, approximate="tanh")
        return x @ state[OWN_CONTROL + name + ".fc2.weight"].T

    adapted = mlp(features, "adapter_mlp") * ~drop[:, None, None]
    shared = mlp(adapted, "condition_mlp.cap_proj")
    h = torch.cat([rows, model.tok_embeddings(tokens)], dim=1)
    prefix, count, third = rows.shape[1], h.shape[1], model.args.n_layer // 3
    seen = torch.ones(count, count, dtype=torch.bool).tril()[None].repeat(len(h), 1, 1)
    if prefix_mask is not None:
        seen[:, :, :prefix] &= prefix_mask[:, None].bool()
        seen |= torch.eye(count, dtype=torch.bool)
    for number, block in enumerate(model.layers):
        if number in (0, third, 2 * third):
            added = mlp(shared, f"condition_layers.{number // third}")[:, : count - prefix + 1]
            h = torch.cat([h[:, : prefix - 1], h[:, prefix - 1 :] + strength * added], dim=1)
        h = block(h, model.rope(torch.device("cpu"))[:count], seen[:, None], causal=False)
    return model.output(model.norm(h))[:, prefix - 1 :]


def test_loss_of_a_rectangle_is_the_mean_over_its_tokens():
    """A square's rotary table is read by the number of a token."""
    model, codes = small(rope_grid=4), torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(1))
    cond = inputs()
    cond["control"], drop = cond["control"][:, :10], torch.tensor([False, True, False])
    logits = by_hand(model, codes[:, :-1], cond, drop)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert_close(TokenLoss(model.eval())(codes, cond, drop=drop), expected)


@pytest.mark.parametrize(("tokens", "grid"), [(10, None), (17, None), (17, 5)])
def test_loss_of_codes_of_another_image_size_is_refused(tokens, grid):
    codes = torch.zeros(3, tokens, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{tokens} codes an image, the model has 16"):
        TokenLoss(small(None, rope_grid=grid))(codes, {"label": torch.arange(3)})


def test_random_sides_are_drawn_by_the_step():
    sides = RandomSides(384, 1024, 16, 768, seed=0)
    assert sides.pairs[0] == (384, 384) and (384, 1024) in sides.pairs and (768, 784) not in sides.pairs
    drawn = [sides(step) for step in range(2000)]
    assert drawn == [RandomSides(384, 1024, 16, 768, seed=0)(step) for step in range(2000)]
    assert len({*drawn}) > len(sides.pairs) / 2 and max(h * w for h, w in drawn) <= 768**2
    assert drawn != [RandomSides(384, 1024, 16, 768, seed=1)(step) for step in range(2000)]


def test_images_and_controls_are_resized_as_by_pillow():
    images = pictures(2, 48, 3)
    for height, width in ((20, 96), (48, 32)):
        pixels = resized(images, (height, width))
        for own, image in zip(pixels, images, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BILINEAR)
            assert np.abs(own.permute(1, 2, 0).numpy().astype(int) - np.asarray(picture)).max() <= 1
        assert_close(resized(images / 255, (height, width)) * 255, pixels.float(), atol=0.51)


def drawn_by_hand(model, cond, scale: float, strength: float, prefix_mask=None, tokens: int | None = None):
    """Greedy codes, each from the whole sequence anew, under guidance where the scale is not 1."""
    batch = len(next(iter(cond.values())))
    codes, nobody = torch.zeros(batch, 0, dtype=torch.long), torch.zeros(batch, dtype=torch.bool)
    for _ in range(tokens or model.args.block_size):
        logits = by_hand(model, codes, cond, nobody, strength, prefix_mask)[:, -1]
        if scale != 1:
            without = by_hand(model, codes, cond, ~nobody, strength, prefix_mask)[:, -1]
            logits = without + (logits - without) * scale
        codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)
    return codes


SHAPES = {
    "label, grid 6, features of 768": ({"block_size": 36, "n_layer": 6}, 768),
    "caption, seven blocks": (
        {"block_size": 16, "n_layer": 7, "model_type": "t2i", "caption_dim": 24, "cls_token_num": 5},
        384,
    ),
    "label, narrow, shared keys": (
        {"block_size": 16, "n_layer": 3, "dim": 96, "n_head": 6, "n_kv_head": 3, "ffn_width": 80},
        20,
    ),
}


def shaped(case: str) -> tuple[Transformer, dict, torch.Tensor | None]:
    shapes, width = SHAPES[case]
    model = small(None, extra_conditions={"control": {"encoder": None, "width": width}}, **shapes).eval()
    generator = torch.Generator().manual_seed(11)
    features = torch.randn(3, shapes["block_size"], width, generator=generator)
    if "caption" not in case:
        return model, {"label": torch.tensor([1, 4, 9]), "control": features}, None
    captions, mask = torch.randn(3, 5, 24, generator=generator), torch.arange(5) >= torch.tensor([[0], [2], [4]])
    return model, {"caption": captions, "control": features}, mask


@pytest.mark.parametrize("case", SHAPES)
@torch.no_grad()
def test_training_logits_and_greedy_codes_are_those_of_a_second_implementation(case):
    model, cond, mask = shaped(case)
    tokens = torch.randint(0, 64, (3, model.args.block_size), generator=torch.Generator().manual_seed(2))
    drop = torch.tensor([False, True, False])
    expected = by_hand(model, tokens[:, :-1], cond, drop, prefix_mask=mask)
    assert_close(model(tokens[:, :-1], cond, drop=drop, prefix_mask=mask), expected, atol=1e-4)
    for scale, strength in ((1.0, 1.0), (1.0, 0.6), (3.0, 1.0), (3.0, 0.6), (3.0, 0.0)):
        settings = {"cfg_scale": scale, "control_strength": strength, "emb_masks": mask, "sample_logits": False}
        codes = [generate(model, cond, window=window, **settings) for window in (0, 3)]
        assert torch.equal(codes[0], drawn_by_hand(model, cond, scale, strength, mask))
        assert torch.equal(*codes)


@torch.no_grad()
def test_images_of_other_sides_read_the_rotary_table_by_number_and_models_are_saved(tmp_path):
    model = small("dinov2")
    save_file(published(model), tmp_path / "depth_MR.safetensors")
    tokenizer = VQ_models["VQ-16"](codebook_size=64)
    loaded = load_gpt(tmp_path / "depth_MR.safetensors", image_size=64)
    pipeline = ImagePipeline(loaded, tokenizer)
    generator = np.random.default_rng(1)
    pictures = [Image.fromarray(generator.integers(0, 256, (32, 80, 3)).astype(np.uint8)) for _ in range(3)]
    asked = {"control_images": pictures, "cfg_scale": 3.0, "control_strength": 0.6, "sample_logits": False}
    drawn = pipeline.rectangles([1, 4, 9], height=32, width=80, **asked)
    control = model.conditions["control"]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    features = control.features(pixels)
    assert features.shape == (3, 2 * 5, 64)
    cond = {"label": torch.tensor([1, 4, 9]), "control": features}
    codes = drawn_by_hand(model, cond, 3.0, 0.6, tokens=10)
    assert [picture.size for picture in drawn] == [(80, 32)] * 3
    for picture, own in zip(drawn, codes, strict=True):
        assert np.array_equal(np.asarray(picture), decode_codes(tokenizer, own[None], width=5)[0])
    pipeline.save_pretrained(tmp_path / "saved")
    saved = ImagePipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert saved.gpt.args.identity == loaded.args.identity
    again = [each.generate_codes([1], control_images=pictures[0]) for each in (pipeline, saved)]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match="the conditions label, control; vLLM decodes"):
        open_gpt(tmp_path / "depth_MR.safetensors", image_size=64)
    for sides in ((40, 64), (80, 64), (0, 16)):
        with pytest.raises(ValueError, match="give sides that are multiples of 16, at most 16 tokens"):
            pipeline.rectangles([1], height=sides[0], width=sides[1], control_images=pictures[:1])
    with pytest.raises(ValueError, match="3 control for 1 images"):
        pipeline.rectangles([1], height=32, width=80, control_images=pictures)
    with pytest.raises(ValueError, match="height and width are for ControlAR's models of several resolutions"):
        ImagePipeline(model, tokenizer).rectangles([1], height=32, width=80, control_images=pictures[:1])
