"""LPD against the published model's recorded figures: training, decoding by its groups and orders, files."""

import asyncio
import json
import random
from argparse import Namespace
from math import isclose

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models import decode_step
from autoregressive.models.build import build_gpt, build_model
from autoregressive.models.generate import generate
from autoregressive.models.layouts.group_sizes import group_sizes, training_sizes
from autoregressive.models.layouts.locality import locality_order
from autoregressive.models.sampling import SamplingConfig
from autoregressive.models.trunk import ModelArgs
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.released import flags_of, gpt_identity
from autoregressive.request import Request
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.serve.engine import NOT_DRAWN
from autoregressive.serve.native import NativeEngine
from autoregressive.train import train_c2i
from autoregressive.train.evaluation import mean_loss
from autoregressive.train.loss import TokenLoss
from autoregressive.train.orders import training_orders
from dataset.codes import open_codes
from tests.autoregressive.decoding import Recording
from tests.autoregressive.test_released import file_of
from tests.helpers import assert_close, golden_state, load_golden, randomize
from tests.training import make_codes, metrics, repetitive_codes, run_folder, run_here, run_script, same
from tokenizer.load import load_tokenizer
from utils.checkpoint import read_checkpoint
from utils.distributed import Distributed
from utils.rng import image_noise, order_seed
from utils.training.optim import learning_rate

GOLDEN, META = load_golden("lpd")
CODES, LABELS, ORDERS = (torch.from_numpy(GOLDEN[name]) for name in ("codes", "labels", "orders"))
GROUPS = META["config"]["groups"]
SIZES = {"trunk": "lpd", "dim": 48, "n_layer": 2, "n_head": 4, "ffn_width": 192, "vocab_size": 64, "num_classes": 10}
SEQUENCE = CODES.gather(1, ORDERS)


def golden_weights() -> dict[str, torch.Tensor]:
    config = META["config"]
    state = golden_state(META["state_dict"], config["seed"], config["gain"])
    return {name: value * config["gains"].get(name, 1) for name, value in state.items()}


@pytest.fixture
def model():
    model = build_model(ModelArgs(**SIZES, block_size=36, layout={"name": "queried", "group_sizes": GROUPS}))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == META["state_dict"]
    model.load_state_dict(golden_weights(), strict=True)
    return model.eval()


@pytest.mark.parametrize("name", ["z_proj_ln", "blocks.0.norm1", "norm"])
def test_norms_have_the_recorded_eps(model, name):
    norm = model.get_submodule(name)
    assert_close(norm(torch.from_numpy(GOLDEN[f"probe/{name}/input"])), GOLDEN[f"probe/{name}/output"])


@pytest.mark.parametrize("case", ["given", "dropped"])
def test_training_step_is_the_recorded_one(model, case):
    drop = torch.full((3,), case == "dropped")
    logits = model(SEQUENCE[:, : -GROUPS[-1]], LABELS, orders=ORDERS, drop=drop)
    assert_close(logits, GOLDEN[f"train/{case}/logits"], atol=1e-4)
    loss = TokenLoss(model)(CODES, LABELS, drop=drop, orders=ORDERS)
    assert_close(loss.double(), GOLDEN[f"train/{case}/loss"])
    loss.backward()
    start = f"train/{case}/grad/"
    gradients = {key.removeprefix(start): value for key, value in GOLDEN.items() if key.startswith(start)}
    assert len(gradients) == {"given": 7, "dropped": 1}[case]
    for name, gradient in gradients.items():
        assert_close(model.get_parameter(name).grad, gradient)
    assert model.get_parameter("head.weight").grad is not None


@pytest.fixture
def calls(monkeypatch):
    """The raw logits of every pass."""
    found, draw_tokens = [], decode_step.draw_tokens
    monkeypatch.setattr(
        decode_step, "draw_tokens", lambda logits, *more: found.append(logits) or draw_tokens(logits, *more)
    )
    return found


@pytest.mark.parametrize("case", ["cfg1", "cfg3", "cfg4.8_linear"])
def test_greedy_decoding_is_the_recorded_one(model, calls, case):
    asked = META[f"generate/{case}/settings"]
    settings = {"cfg_scale": asked["cfg"], "cfg_schedule": asked["cfg_schedule"]}
    drawn = generate(model, LABELS, orders=ORDERS, sample_logits=False, **settings)
    assert drawn.tolist() == GOLDEN[f"generate/{case}/tokens"].tolist()
    assert len(calls) == int(GOLDEN[f"generate/{case}/calls"]) == 7
    assert_close(torch.cat(calls, dim=1), GOLDEN[f"generate/{case}/logits"], atol=1e-4)


def sizes_of(rng: random.Random, tokens: int) -> list[int]:
    sizes = []
    while sum(sizes) < tokens:
        sizes.append(rng.randint(1, min(9, tokens - sum(sizes))))
    return sizes


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_decoding_is_the_full_forward_pass(model, calls, case, dtype):
    rng, generator = random.Random(case), torch.Generator().manual_seed(case)
    groups = [[36], [1] * 36, group_sizes(36, 7), *(sizes_of(rng, 36) for _ in range(3))][case]
    orders = torch.rand(4, 36, generator=generator).argsort(1)
    labels = torch.randint(10, (4,), generator=generator)
    model.to(dtype)
    drawn = generate(model, labels, orders=orders, groups=groups, cfg_scale=2.0 if case % 2 else 1.0, temperature=1.5)
    layout = model.layout.with_groups(groups)
    sequence = drawn.gather(1, orders)
    whole = model(sequence[:, : -groups[-1]], labels, layout=layout, orders=orders)
    cached = torch.cat(calls, dim=1)[:4]
    assert len(calls) == len(groups)
    tolerance = {"atol": 1e-4} if dtype is torch.float32 else {"atol": 0.6, "rtol": 0.1}
    assert_close(cached, whole, **tolerance)
    assert len({tuple(image.tolist()) for image in drawn}) == 4


def test_known_tokens_are_kept_and_come_first(model, calls):
    known = torch.where(torch.rand(3, 36, generator=torch.Generator().manual_seed(0)) < 0.6, CODES, -1)
    known[0, :4] = -1
    torch.manual_seed(0)
    drawn = generate(model, LABELS, known=known)
    assert torch.equal(drawn[known >= 0], known[known >= 0])
    least = int((known >= 0).sum(1).min())
    assert calls[0].shape[1] == least and len(calls) < len(GROUPS)


def test_known_tokens_behind_others_in_a_given_order_leave_the_groups_alone(model, calls):
    first = ORDERS[:, :1]
    known = CODES.scatter(1, first, -1)
    drawn = generate(model, LABELS, known=known, orders=ORDERS, sample_logits=False)
    assert len(calls) == 7 and torch.equal(drawn.scatter(1, first, 0), CODES.scatter(1, first, 0))
    assert_close(calls[0], GOLDEN["generate/cfg1/logits"][:3, :1], atol=1e-4)


def test_orders_and_known_tokens_that_are_all_given(model):
    assert torch.equal(generate(model, LABELS, known=CODES), CODES)
    with pytest.raises(ValueError, match="orders are whole numbers of shape"):
        generate(model, LABELS, orders=ORDERS.clamp(max=34))


def test_orders_are_drawn_anew_and_by_the_seed_of_torch(model):
    torch.manual_seed(3)
    one, other = generate(model, LABELS), generate(model, LABELS)
    torch.manual_seed(3)
    assert torch.equal(generate(model, LABELS), one) and not torch.equal(one, other)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_recorded_steps_draw_the_same_for_other_orders_and_groups(model, recording, scale):
    for groups in (GROUPS, GROUPS, [1] * 12 + [4] * 6, GROUPS):
        orders = torch.rand(3, 36).argsort(1)
        asked = {"orders": orders, "groups": groups, "noise": image_noise(5, range(3), 36), "cfg_scale": scale}
        assert torch.equal(generate(model, LABELS, compile=True, **asked), generate(model, LABELS, **asked))
    assert Recording.made > 5


def test_a_window_is_refused_and_auto_takes_none(model):
    with pytest.raises(ValueError, match=r"overwrites rows of its queries.*--window 0"):
        generate(model, LABELS, window=4)
    generate(model, LABELS[:1], window="auto", groups=[1] * 36)


@pytest.mark.parametrize(
    "name, pixels, millions",
    [("LPD-L", 256, 337.2), ("LPD-XL", 256, 751.9), ("LPD-XXL", 256, 1412), ("LPD-L", 512, 337.2 + 0.768 * 1.024)],
)
def test_sizes_have_the_published_parameters(name, pixels, millions):
    with torch.device("meta"):
        model = build_gpt(name, block_size=(pixels // 16) ** 2)
    assert isclose(model.num_parameters / 1e6, millions, rel_tol=5e-4)
    assert len(model.layout.groups) == {256: 20, 512: 48}[pixels]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"model_type": "t2i", "cls_token_num": 4}, "an LPD is of classes"),
        ({"layout": {"name": "raster"}}, "reads each token from a query.*--layout queried"),
        ({"trunk": "llama", "ffn_width": None, "layout": {"name": "queried"}}, "the trunk 'llama' has none"),
        ({"trunk": "rar", "layout": {"name": "queried"}}, "the trunk 'rar' has none"),
        ({"drop_path_rate": 0.1}, "no stochastic depth"),
        ({"n_kv_head": 2}, "as many kv heads as heads"),
    ],
)
def test_what_an_lpd_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelArgs(**{**SIZES, "block_size": 36, **wrong}))


def test_initial_weights_are_the_published_kind():
    model = build_model(ModelArgs(**{**SIZES, "dim": 96, "ffn_width": 384}, block_size=36))
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name == "head.weight" or (name.startswith("blocks") and value.dim() == 2):
            bound = (6 / sum(value.shape)) ** 0.5
            assert value.abs().max() <= bound and isclose(value.std(), bound / 3**0.5, rel_tol=0.05), name
        elif value.dim() > 1:
            assert isclose(value.std(), 0.02, rel_tol=0.15), name
        else:
            assert (value == float(name.endswith("weight"))).all(), name


def test_dropout_is_off_in_evaluation_and_on_in_training(model):
    sequence = SEQUENCE[:, : -GROUPS[-1]]
    plain = model(sequence, LABELS, orders=ORDERS)
    torch.manual_seed(0)
    dropped = model.train()(sequence, LABELS, orders=ORDERS, drop=torch.zeros(3, dtype=torch.bool))
    assert not torch.allclose(plain, dropped)
    assert torch.equal(model.eval()(sequence, LABELS, orders=ORDERS), plain)


# Training


@pytest.mark.parametrize("split", [[slice(0, 12)], [slice(0, 5), slice(5, 12)]])
def test_training_draws_orders_by_sample_and_groups_by_step(model, split):
    schedule = training_orders(Namespace(random_orders=None, global_seed=3), model.layout, 1000)
    known = dict.fromkeys(training_sizes(36), 0)
    seen = []
    for step in range(60):
        parts = [schedule(step, 0, positions, 12) for positions in split]
        assert len({layout for layout, _ in parts}) == 1
        known[parts[0][0].groups] += 1
        seen.append(torch.cat([orders for _, orders in parts]))
        assert (seen[-1].sort(1).values == torch.arange(36)).all()
    assert min(known.values()) > 0 and sum(known.values()) == 60
    assert torch.equal(seen[7], schedule(7, 0, slice(0, 12), 12)[1])
    assert len({tuple(order) for orders in seen for order in orders.tolist()}) == 720
    assert abs(torch.cat(seen)[:, 0].float().mean() - 17.5) < 2


def test_random_orders_beside_those_of_the_layout_are_refused(model):
    with pytest.raises(ValueError, match="leave out --random-orders"):
        training_orders(Namespace(random_orders=[1, 2], global_seed=3), model.layout, 1000)


@pytest.mark.parametrize("name, epochs, start, warmup", [("256", 450, 400, 50), ("512", 50, 1, 1)])
def test_learning_rate_is_the_recorded_one(name, epochs, start, warmup):
    per_epoch = 100
    args = Namespace(
        lr=8e-4, min_lr=1e-5, warmup_steps=warmup * per_epoch, warmup_from_zero=True, lr_schedule="cosine",
        lr_decay_start_epoch=start, epochs=epochs, max_steps=None,
    )  # fmt: skip
    for epoch, rate in zip(GOLDEN[f"schedule/{name}/epoch"], GOLDEN[f"schedule/{name}/lr"], strict=True):
        step = round(epoch * per_epoch)
        if step < epochs * per_epoch:
            assert isclose(learning_rate(args, step, epochs * per_epoch, per_epoch), rate, rel_tol=1e-3), epoch


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes") / "packed"
    array = repetitive_codes(32, 1, 16, 64)
    return make_codes(folder, array, np.arange(32) % 10, image_size=16, vocab=64, classes=10)


def train(codes, results, *more, script=train_c2i):
    words = ["--code-path", codes, "--results-dir", results, "--gpt-model", "LPD-XS", "--image-size", 16]
    words += [
        "--global-batch-size",
        16,
        "--num-workers",
        0,
        "--mixed-precision",
        "none",
        "--log-every",
        1,
        "--lr",
        2e-3,
    ]
    run_here(script, *words, *more)
    return results


@pytest.mark.slow
def test_training_resumes_to_the_bit_and_its_file_draws(codes, small_files, tmp_path):
    whole = train(codes, tmp_path / "whole", "--epochs", 3, "--val-code-path", codes)
    parts = train(codes, tmp_path / "parts", "--epochs", 3, "--max-steps", 3, "--val-code-path", codes)
    train(codes, parts, "--epochs", 3, "--max-steps", 6, "--resume", "--val-code-path", codes)
    one, other = (
        read_checkpoint(max((run_folder(results) / "checkpoints").glob("*.pt"))) for results in (whole, parts)
    )
    assert same(one.model, other.model) and one.steps == other.steps == 6
    assert metrics(whole, "val_loss")[6] == metrics(parts, "val_loss")[6]
    gpt = load_gpt(one.path)
    assert type(gpt).__name__ == "LPD" and gpt.layout.groups == group_sizes(16, 5)
    pipeline = ImagePipeline(gpt, load_tokenizer(small_files.vq), batch_size=4)
    assert len(pipeline([1, 2], progress=False)) == 2
    held_out = mean_loss(gpt, open_codes(codes, random_view=False), 8, Distributed(torch.device("cpu")))
    assert held_out == pytest.approx(metrics(whole, "val_loss")[6], rel=1e-5)


@pytest.mark.slow
def test_training_losses_do_not_depend_on_the_processes(codes, tmp_path):
    exact = ["--dropout-p", 0, "--epochs", 3]
    one = train(codes, tmp_path / "one", *exact)
    words = [
        "--code-path",
        codes,
        "--gpt-model",
        "LPD-XS",
        "--image-size",
        16,
        "--global-batch-size",
        16,
        "--num-workers",
        0,
    ]
    words += ["--mixed-precision", "fp32", "--log-every", 1, "--lr", 2e-3, "--no-wandb", *exact]
    for strategy in ("ddp", "fsdp"):
        results = tmp_path / strategy
        run_script(
            "autoregressive.train.train_c2i_fsdp",
            *words,
            "--results-dir",
            results,
            "--data-parallel",
            strategy,
            processes=2,
        )
        losses = [list(metrics(folder, "loss").values()) for folder in (one, results)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_a_model_is_fine_tuned_at_twice_the_image_size(codes, tmp_path):
    first = train(codes, tmp_path / "first", "--epochs", 1)
    array = repetitive_codes(32, 1, 64, 64)
    larger = make_codes(tmp_path / "larger", array, np.arange(32) % 10, image_size=32, vocab=64, classes=10)
    more = ["--finetune", "--gpt-ckpt", first, "--class-rows", "number", "--epochs", 1, "--lr", 0]
    second = train(larger, tmp_path / "second", "--image-size", 32, "--downsample-size", 4, *more)
    small, large = (load_gpt(max((run_folder(results) / "checkpoints").glob("*.pt"))) for results in (first, second))
    assert (small.layout.grid_size, large.layout.grid_size) == (4, 8)
    expected = large.resized(small.state_dict())
    assert all(torch.equal(large.state_dict()[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match="fit"):
        train(
            larger, tmp_path / "third", "--image-size", 32, "--downsample-size", 4, "--gpt-ckpt", first, "--epochs", 3
        )


@pytest.mark.slow
def test_processes_draw_the_images_of_one(file, small_files, tmp_path):
    words = [
        "--gpt-ckpt",
        file,
        "--vq-ckpt",
        small_files.vq,
        "--image-size",
        32,
        "--image-size-eval",
        32,
        "--vq-model",
        "VQ-4",
    ]
    words += ["--codebook-size", 64, "--precision", "none", "--device", "cpu", "--downsample-size", 4]
    words += ["--num-fid-samples", 5, "--per-proc-batch-size", 2, "--steps", 12]
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run_script("autoregressive.sample.sample_c2i_ddp", *words, "--sample-dir", folder, processes=processes)
        found.append([path.read_bytes() for path in sorted(folder.glob("*/*.png"))])
    assert len(found[0]) == 5 and found[0] == found[1]


# Files, pipeline, server


@pytest.fixture(scope="module")
def file(tmp_path_factory, small_files):
    """A file in the published format: 8x8 tokens, 64 codes."""
    folder = tmp_path_factory.mktemp("lpd")
    weights = randomize(
        build_gpt("LPD-XS", vocab_size=64, num_classes=10, block_size=64), seed=2, gain=1.5
    ).state_dict()
    args = Namespace(img_size=32, model="lpd_xs", group_sizes="[1] * 64")
    torch.save({"model": weights, "optimizer": {}, "epoch": 3, "scaler": {}, "args": args}, folder / "lpd.pth")
    return folder / "lpd.pth"


@pytest.fixture(scope="module")
def pipeline(file, small_files):
    gpt = load_gpt(file, image_size=32, downsample_size=4)
    return ImagePipeline(gpt, load_tokenizer(small_files.vq), batch_size=4)


def test_a_published_file_tells_what_it_is(file, pipeline, tmp_path):
    assert pipeline.gpt.layout.config["group_sizes"] == list(group_sizes(64, 10))
    assert flags_of(pipeline.gpt.args.identity)["gpt_model"] == "LPD-XS"
    with pytest.raises(ValueError, match="--gpt-model GPT-XS"):
        load_gpt(file, gpt_model="GPT-XS", downsample_size=4)
    weights = {f"x.{name}" if name == "head.weight" else name: tensor for name, tensor in golden_weights().items()}
    torch.save(golden_weights(), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="no table"):
        load_gpt(tmp_path / "odd.pth")
    model = load_gpt(tmp_path / "odd.pth", image_size=96, n_head=4)
    assert (model.args.n_head, model.layout.grid_size) == (4, 6)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"missing \(1\): head.weight"):
        load_gpt(tmp_path / "other.pth", n_head=4)


@pytest.mark.parametrize(
    ("name", "pixels", "repulsion"), [("LPD-L", 256, 2), ("LPD-XL", 512, 4), ("LPD-XXL", 256, 3), ("LPD-XS", 32, 2)]
)
def test_repulsion_is_that_of_the_published_figures(name, pixels, repulsion):
    with torch.device("meta"):
        state = build_gpt(name, block_size=(pixels // 16) ** 2).state_dict()
        again = build_model(ModelArgs.from_identity(gpt_identity(file_of(state))))
    assert again.layout.repulsion == repulsion


@pytest.mark.filterwarnings("ignore:.*its table of places is resized")
def test_weights_of_256_pixels_draw_in_the_groups_and_orders_of_512():
    with torch.device("meta"):
        state = build_gpt("LPD-L").state_dict()
        layout = build_model(ModelArgs.from_identity(gpt_identity(file_of(state), image_size=512))).layout
    assert (layout.grid_size, len(layout.groups), layout.repulsion) == (32, 48, 4)


def test_the_table_of_places_is_resized_for_another_image_size(tmp_path):
    torch.save(golden_weights(), tmp_path / "lpd.pth")
    with pytest.warns(UserWarning, match="trained at 6x6 tokens: its table of places is resized for 12x12"):
        model = load_gpt(tmp_path / "lpd.pth", image_size=192, n_head=4)
    assert_close(model.pos_embed, GOLDEN["resize/pos_embed"])
    assert generate(model, LABELS[:1]).shape == (1, 144)


def test_images_are_functions_of_seed_and_number(pipeline):
    labels = [3, 1, 4, 1, 5, 9]
    images = pipeline(labels, cfg_scale=2.0, cfg_schedule="linear", seed=7, progress=False, output_type="np")
    for numbers in ([4], [0, 5], [1, 2, 3]):
        own = pipeline([labels[i] for i in numbers], indices=numbers, cfg_scale=2.0, cfg_schedule="linear", seed=7,
                       progress=False, output_type="np")  # fmt: skip
        assert (own == images[numbers]).all()
    orders = torch.tensor([locality_order(8, group_sizes(64, 10), 2, order_seed(7, i) % 2**32) for i in range(2)])
    asked = {"noise": image_noise(7, range(2), 64), "cfg_scale": 2.0, "cfg_schedule": "linear"}
    drawn = generate(pipeline.gpt, torch.tensor(labels[:2]), orders=orders, **asked)
    assert torch.equal(drawn, pipeline.generate_codes(labels[:2], seed=7, cfg_scale=2.0, cfg_schedule="linear"))


def test_steps_order_and_repulsion_are_settings(pipeline):
    def codes(**settings):
        return pipeline.generate_codes([1, 2], seed=1, **settings)

    plain = codes()
    assert torch.equal(codes(steps=10, repulsion=2, order="own"), plain)
    others = [codes(steps=20), codes(order="random"), codes(repulsion=0)]
    assert len({tuple(each.flatten().tolist()) for each in (plain, *others)}) == 4
    given = torch.stack([pipeline.gpt.layout.draw_order(order_seed(1, i)) for i in range(2)])
    assert torch.equal(codes(orders=given), plain)
    with pytest.raises(ValueError, match=r"2 to 64 groups.*got 65"):
        codes(steps=65)


def test_known_tokens_take_fewer_passes_and_images_of_other_holes_are_drawn_apart(pipeline, calls):
    known = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(0))
    known[0, 20:30], known[1, 5:50] = -1, -1
    drawn = pipeline([2, 2], known=known, seed=3, progress=False, output_type="np")
    passes = len(calls)
    own = pipeline([2], known=known[1:], indices=[1], seed=3, progress=False, output_type="np")
    assert (own[0] == drawn[1]).all() and passes < 20 and calls[0].shape[1] == 54


@pytest.mark.parametrize("window, message", [(4, "overwrites rows of its queries"), (-1, "window is -1: give")])
def test_pipeline_with_a_window_that_its_model_cannot_have_is_refused(pipeline, window, message):
    with pytest.raises(ValueError, match=message):
        ImagePipeline(pipeline.gpt, pipeline.tokenizer, window=window)


def test_what_a_raster_model_cannot_draw_is_refused(small_files):
    gpt = load_gpt(small_files.gpt, image_size=32, downsample_size=4)
    pipeline = ImagePipeline(gpt, load_tokenizer(small_files.vq))
    for settings, message in (
        ({"steps": 5}, "leave out --steps"),
        ({"repulsion": 1}, "leave out --steps and --repulsion"),
        ({"order": "random"}, "order of its layout 'raster' alone"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline([1], progress=False, **settings)


def test_scripts_take_steps_and_a_file_of_orders(file, small_files, pipeline, tmp_path):
    orders = [pipeline.gpt.layout.draw_order(seed).tolist() for seed in range(3)]
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    words = [
        "--gpt-ckpt",
        file,
        "--vq-ckpt",
        small_files.vq,
        "--image-size",
        32,
        "--image-size-eval",
        32,
        "--vq-model",
        "VQ-4",
    ]
    words += ["--codebook-size", 64, "--precision", "none", "--device", "cpu", "--sample-dir", tmp_path / "samples"]
    words += [
        "--downsample-size",
        4,
        "--num-fid-samples",
        3,
        "--balanced",
        "--cfg-scale",
        3,
        "--cfg-schedule",
        "linear",
    ]
    run_here(sample_c2i_ddp, *words, "--order-file", tmp_path / "orders.json")
    (folder,) = (path for path in (tmp_path / "samples").iterdir() if path.is_dir())
    asked = {"cfg_scale": 3.0, "cfg_schedule": "linear", "progress": False}
    expected = pipeline([0, 1, 2], orders=torch.tensor(orders), **asked)
    for i, image in enumerate(expected):
        assert image.tobytes() == Image.open(folder / f"{i:06d}.png").tobytes()
    for more in (["--steps", 20], []):
        with pytest.raises(ValueError, match="images drawn with other settings"):
            run_here(sample_c2i_ddp, *words, *more)
    with pytest.raises(ValueError, match="it has 3 orders, and image 3 is to be drawn"):
        run_here(sample_c2i_ddp, *words, "--order-file", tmp_path / "orders.json", "--num-fid-samples", 4)
    run_here(sample_c2i, *words[:4], "--steps", 20, "--labels", 1, "--output", tmp_path / "grid.png", "--image-size", 32,
             "--device", "cpu")  # fmt: skip
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (138, 36)


def test_server_draws_the_pipelines_images_and_shows_tokens_where_they_stand(pipeline):
    requests = [
        Request({"label": 1}, sampling=SamplingConfig(cfg_scale=2.0), seed=5),
        Request({"label": 2}, sampling=SamplingConfig(cfg_scale=2.0, steps=20), seed=6),
        Request({"label": 3}, sampling=SamplingConfig(cfg_scale=2.0), seed=7),
    ]

    async def draw(engine, request):
        return [tokens async for tokens in engine.generate(request)]

    async def main():
        engine = NativeEngine(pipeline)
        with pytest.raises(ValueError, match="got 65"):
            engine.check(Request({"label": 1}, sampling=SamplingConfig(steps=65)))
        try:
            return await asyncio.gather(*(draw(engine, request) for request in requests))
        finally:
            await engine.close()

    for request, yielded in zip(requests, asyncio.run(main()), strict=True):
        *partial, whole = yielded
        assert [whole] == pipeline.draw(pipeline.read([request])).tolist()
        order = pipeline.order(request)
        assert len(partial) > 3
        for tokens in partial:
            drawn = [cell for cell in order.tolist() if tokens[cell] != NOT_DRAWN]
            assert drawn == order[: len(drawn)].tolist() and [tokens[c] for c in drawn] == [whole[c] for c in drawn]
