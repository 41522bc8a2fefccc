"""Training on image-text pairs: images and codes, lists and shards, one process and two, killed and moved, two stages."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPT_models
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.pipeline import ImagePipeline
from autoregressive.train import extract_codes_t2i, text_data, train_t2i
from autoregressive.train.control import RandomSides
from autoregressive.train.loss import TokenLoss, dropped_conditions
from dataset.arrays import PairArrays, left_padded, prefix_mask, write_arrays
from dataset.augmentation import center_view
from tests.helpers import ROOT
from tests.text_training import COLOURS, DIM, TOKENS, caption_features, make_features, make_pairs, make_shards, picture
from tests.training import check_published_flags, live, load, metrics, quiet_loggers, run_folder, run_here, same
from tokenizer.load import load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models
from tools import edges_report, make_controls
from utils.checkpoint import read_checkpoint
from utils.rng import item_seed
from utils.training.order import BatchOrder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]  # through whole scripts and servers

MODULE = "autoregressive.train.train_t2i"
VOCAB, N, COUNTS = 64, 16, {"part-a": 20, "part-b": 12, "part-c": 16}
COUNT = sum(COUNTS.values())
MODEL = ["--gpt-model", "GPT-XS", "--vocab-size", VOCAB, "--image-size", 16, "--downsample-size", 4]
MODEL += ["--cls-token-num", TOKENS, "--t5-feature-dim", DIM, "--vq-model", "VQ-4", "--codebook-size", VOCAB]
PLAIN = ["--global-batch-size", 16, "--num-workers", 0, "--log-every", 1, "--lr", 2e-3, "--no-wandb"]
PLAIN += ["--mixed-precision", "fp32"]
EXACT = ["--dropout-p", 0, "--token-dropout-p", 0]
NAR = ["--layout", "neighbours", "--lr-schedule", "cosine", "--min-lr", 1e-6]
# A smaller rate: Adam makes large steps of tiny gradients, whose rounding would then show.
COMPARED = [*EXACT, "--epochs", 2, "--lr", 5e-4]
# Unevenly over batches and their parts.
MISSING = (0, 1, 2, 5, 9, 17, 23, 24, 25, 26, 33, 40, 41, 46)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs as lists, shards and codes, whole and patchy features, and a tokenizer; read-only."""
    folder = tmp_path_factory.mktemp("pairs")
    make_pairs(folder / "pairs", COUNTS)
    make_shards(folder / "shards", COUNTS)
    make_features(folder / "features", COUNTS)
    make_features(folder / "patchy", COUNTS, missing=MISSING)
    make_features(folder / "short", COUNTS, shift=4)
    torch.manual_seed(0)
    torch.save({"model": VQ_models["VQ-4"](codebook_size=VOCAB).state_dict()}, folder / "vq.pt")
    words = ["--data-path", folder / "pairs", "--code-path", folder / "codes", "--vq-ckpt", folder / "vq.pt"]
    run_here(extract_codes_t2i, *words, "--vq-model", "VQ-4", "--codebook-size", VOCAB, "--image-size", 16)
    return folder


def words(data, results, *more, features="patchy", kind="codes"):
    """A run's flags. kind: codes, images, or shards."""
    source = {
        "codes": ["--dataset", "t2i_code", "--code-path", data / "codes", "--data-path", data / "pairs"],
        "images": ["--data-path", data / "pairs", "--vq-ckpt", data / "vq.pt"],
        "shards": ["--data-path", data / "shards", "--vq-ckpt", data / "vq.pt"],
    }[kind]
    features = ["--t5-feat-path", data / features]
    return list(map(str, [*source, *features, "--results-dir", results, *MODEL, *PLAIN, *more]))


def train(data, results, *more, **kinds):
    run_here(train_t2i, *words(data, results, *more, **kinds))
    return results


def life(data, results, *more, world=1, features="patchy", kind="codes", **when):
    return {"module": MODULE, "args": words(data, results, *more, features=features, kind=kind), "world": world, **when}


def held_out(data):
    """The pairs once more, as held-out ones."""
    return ["--val-data-path", data / "pairs", "--val-t5-feat-path", data / "patchy", "--val-code-path", data / "codes"]


def last(results):
    return max((run_folder(results) / "checkpoints").glob("0*"), key=lambda path: int(path.stem))


def weights(results):
    return read_checkpoint(last(results)).model


# What a step computes


def test_the_first_steps_by_hand(data, tmp_path):
    """Codes, left padding, dropped captions, pairs that do not count and the mean: everything once more in plain steps."""
    train(data, tmp_path, *EXACT, "--max-steps", 2, "--lr", 1e-30, kind="images")
    model = GPT_models["GPT-XS"](
        model_type="t2i", cls_token_num=TOKENS, caption_dim=DIM, vocab_size=VOCAB, block_size=N
    ).eval()
    model.load_state_dict(weights(tmp_path))
    tokenizer = load_tokenizer(data / "vq.pt")
    for step in range(2):
        order = BatchOrder(COUNT, 16, 1, 0, 1, seed=0)
        numbers = order.samples(0, step)
        drop = dropped_conditions(item_seed(0, step), 16, slice(0, 16), 0.1)
        total, counted = 0.0, 0
        for place, number in enumerate(numbers):
            if number in MISSING:
                continue
            with torch.inference_mode():
                codes = tokenizer.to_codes(center_view(picture(number), 16)[None]).view(1, -1)
            caption = caption_features(number)[:TOKENS]
            features = torch.zeros(1, TOKENS, DIM)
            features[0, TOKENS - len(caption) :] = caption
            mask = torch.arange(TOKENS)[None] >= TOKENS - len(caption)
            with torch.no_grad():
                total += float(TokenLoss(model)(codes, features, drop=drop[place : place + 1], prefix_mask=mask))
            counted += 1
        assert 0 < counted < 16
        assert metrics(tmp_path, "loss")[step + 1] == pytest.approx(total / counted, rel=1e-5)
        assert metrics(tmp_path, "valid")[step + 1] == pytest.approx(counted / 16)


def test_images_shards_and_codes_give_the_same_losses(data, tmp_path):
    flags = ["--epochs", 2, "--val-data-path", data / "pairs", "--val-t5-feat-path", data / "features"]
    for kind in ("images", "shards", "codes"):
        train(data, tmp_path / kind, *flags, "--val-code-path", data / "codes", kind=kind)
    for name in ("loss", "valid", "val_loss"):
        one, two, three = (metrics(tmp_path / kind, name) for kind in ("images", "shards", "codes"))
        assert one == two == three and len(one) == (1 if name == "val_loss" else 6)
    assert same(weights(tmp_path / "images"), weights(tmp_path / "codes"))


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """A run of one process, to compare with."""
    with quiet_loggers():
        return train(data, tmp_path_factory.mktemp("one"), *COMPARED, *held_out(data))


def test_sizes_and_widths_are_those_of_codes_and_features(data, tmp_path, monkeypatch):
    """No size is given: that of the images and tokens from the codes, the width from the features, a batch that they fill."""
    monkeypatch.setitem(GPT_SIZES, "GPT-B", GPT_SIZES["GPT-XS"])  # the default's size
    paths = ["--code-path", data / "codes", "--data-path", data / "pairs", "--t5-feat-path", data / "features"]
    few = ["--max-steps", 1, "--num-workers", 0, "--mixed-precision", "none", "--results-dir", tmp_path]
    run_here(train_t2i, "--dataset", "t2i_code", *paths, *few)
    saved = vars(load(last(tmp_path))["args"])
    assert (saved["image_size"], saved["downsample_size"], saved["t5_feature_dim"]) == (16, 4, DIM)
    assert saved["vocab_size"] == VOCAB and saved["global_batch_size"] == COUNT
    assert {type(value) for value in saved.values()} <= {str, int, float, bool, list, type(None)}
    assert "batches of 48 samples: there are 48" in (run_folder(tmp_path) / "log.txt").read_text()
    images = [
        "--data-path",
        data / "pairs",
        "--t5-feat-path",
        data / "features",
        "--vq-ckpt",
        data / "vq.pt",
        "--image-size",
        16,
    ]
    run_here(train_t2i, *images, *few[:-1], tmp_path / "images")
    assert vars(load(last(tmp_path / "images"))["args"])["downsample_size"] == 4  # of the tokenizer


def test_accumulation_gives_the_same_losses(data, tmp_path, one):
    """Though the parts of a batch have different numbers of pairs that count."""
    train(data, tmp_path, *COMPARED, "--gradient-accumulation-steps", 8)
    assert metrics(tmp_path, "loss") == pytest.approx(metrics(one, "loss"), abs=1e-5)
    assert metrics(tmp_path, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-4)
    assert metrics(tmp_path, "valid") == pytest.approx(metrics(one, "valid"))
    assert len(set(metrics(one, "valid").values())) > 1


def test_two_processes_give_the_losses_of_one(data, tmp_path, one):
    """By DDP and in shards, with accumulation: the mean is over the valid samples of the whole batch."""
    flags = [*COMPARED, "--gradient-accumulation-steps", 2, *held_out(data)]
    kinds = ("ddp", "fsdp")
    live(*(life(data, tmp_path / kind, *flags, "--data-parallel", kind, world=2) for kind in kinds))
    for kind in kinds:
        for name, tolerance in (("loss", {"abs": 1e-5}), ("grad_norm", {"rel": 1e-4}), ("val_loss", {"abs": 1e-4})):
            assert metrics(tmp_path / kind, name) == pytest.approx(metrics(one, name), **tolerance), (kind, name)
        for name, tensor in weights(tmp_path / kind).items():
            torch.testing.assert_close(tensor, weights(one)[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_held_out_loss_is_the_mean_over_pairs_that_count(data, tmp_path, one):
    args = read_checkpoint(last(one))
    model = GPT_models["GPT-XS"](
        model_type="t2i", cls_token_num=TOKENS, caption_dim=DIM, vocab_size=VOCAB, block_size=N
    ).eval()
    model.load_state_dict(args.model)
    tokenizer, losses = load_tokenizer(data / "vq.pt"), []
    for number in set(range(COUNT)) - set(MISSING):
        with torch.inference_mode():
            codes = tokenizer.to_codes(center_view(picture(number), 16)[None]).view(1, -1).clone()
        features, lengths = left_padded([caption_features(number)], TOKENS)
        with torch.no_grad():
            losses.append(float(TokenLoss(model)(codes, features, prefix_mask=prefix_mask(lengths, TOKENS))))
    assert metrics(one, "val_loss")[6] == pytest.approx(np.mean(losses), rel=1e-5)


def test_it_learns_what_captions_say(data, tmp_path):
    """Pictures of a colour are likelier under their own caption than under another's."""
    train(data, tmp_path, "--epochs", 40, "--lr", 4e-3, features="features")
    losses = metrics(tmp_path, "loss")
    assert losses[1] == pytest.approx(math.log(VOCAB), rel=1e-3) and losses[120] < 0.55 * losses[1]
    args = read_checkpoint(last(tmp_path))
    model = GPT_models["GPT-XS"](
        model_type="t2i", cls_token_num=TOKENS, caption_dim=DIM, vocab_size=VOCAB, block_size=N
    ).eval()
    model.load_state_dict(args.model)
    codes = all_codes(data)
    by_shift = []
    for shift in range(len(COLOURS)):
        features, lengths = left_padded([caption_features(i + shift, 3) for i in range(COUNT)], TOKENS)
        with torch.no_grad():
            by_shift.append(float(TokenLoss(model)(codes, features, prefix_mask=prefix_mask(lengths, TOKENS))))
    assert by_shift[0] < min(by_shift[1:]) - 0.2, by_shift


def all_codes(data):
    from dataset.t2i import TextCodes

    codes = TextCodes(data / "codes", list(COUNTS), N, VOCAB)
    return torch.stack([codes.get(stem, line) for stem, count in COUNTS.items() for line in range(count)])


# Killed, moved, in stages


def test_stopped_and_resumed_gives_the_same_bits(data, tmp_path):
    """With dropout, random crops and short captions; test_training_processes.py kills runs of several processes."""
    flags = ["--epochs", 2, "--ema", "--ema-decay", 0.9, "--resume", "--random-crop"]
    flags += ["--short-t5-feat-path", data / "short"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(data, whole, *flags, kind="shards")
    for steps in (2, 4, 6):
        train(data, parts, *flags, "--max-steps", steps, kind="shards")
    one, other = load(last(whole)), load(last(parts))
    assert one["steps"] == 6 and one.pop("args") and other.pop("args") and same(one, other)
    assert metrics(whole, "loss") == metrics(parts, "loss") and metrics(whole, "valid") == metrics(parts, "valid")


@pytest.mark.parametrize("kind", ["images", "codes"])
def test_resume_with_other_pairs_is_refused(data, tmp_path, kind):
    """Lists, features and codes that fit each other, but not the run; the same data under other paths is the same."""
    for name in ("pairs", "codes", "patchy"):
        shutil.copytree(data / name, tmp_path / name)
    source = ["--data-path", tmp_path / "pairs", "--t5-feat-path", tmp_path / "patchy"]
    source += ["--code-path", tmp_path / "codes"] if kind == "codes" else []
    flags = ["--ckpt-every", 1, "--resume"]
    train(data, tmp_path / "results", *flags, "--max-steps", 1, kind=kind)
    train(data, tmp_path / "results", *flags, "--max-steps", 2, *source, kind=kind)
    assert list(metrics(tmp_path / "results", "loss")) == [1, 2]
    file = tmp_path / "pairs" / "part-a.jsonl"
    file.write_text("\n".join(reversed(file.read_text().splitlines())) + "\n")
    shutil.rmtree(tmp_path / "codes")
    extraction = ["--data-path", tmp_path / "pairs", "--code-path", tmp_path / "codes", "--vq-ckpt", data / "vq.pt"]
    run_here(extract_codes_t2i, *extraction, "--vq-model", "VQ-4", "--codebook-size", VOCAB, "--image-size", 16)
    with pytest.raises(
        ValueError, match=rf"do not belong together: codes' {'images' if kind == 'codes' else 'lists'} "
    ):
        train(data, tmp_path / "results", *flags, "--max-steps", 3, *source, kind=kind)


def test_finetune_begins_at_step_0_with_the_weights_of_the_same_image_size(data, tmp_path):
    first = train(data, tmp_path / "first", "--max-steps", 2)
    with pytest.raises(ValueError, match=r"has done 2 steps, all that --max-steps 2 asks for.*--finetune"):
        train(data, tmp_path / "again", "--max-steps", 2, "--gpt-ckpt", first)
    still = ["--max-steps", 1, "--lr", 1e-30, *EXACT]
    tuned = train(data, tmp_path / "tuned", *still, "--finetune", "--gpt-ckpt", first)
    assert same(weights(tuned), weights(first)) and list(metrics(tuned, "loss")) == [1]
    wide = tmp_path / "wide.pt"
    state = dict(weights(first))
    state["cls_embedding.uncond_embedding"] = torch.zeros(len(state["cls_embedding.uncond_embedding"]), 48)
    torch.save({"model": state}, wide)
    with pytest.raises(ValueError, match=r"features of width 48, not --t5-feature-dim"):
        train(data, tmp_path / "other", *still, "--finetune", "--gpt-ckpt", wide)


def test_stage_2_begins_with_the_weights_of_stage_1(data, tmp_path):
    """From a file and, of neighbours, from a sharded folder: another image size, the same weights, step and optimizer of its own."""
    layouts = {"ddp": [], "fsdp": ["--layout", "neighbours"]}
    live(
        life(data, tmp_path / "ddp", "--max-steps", 4, "--ema"),
        life(data, tmp_path / "fsdp", "--max-steps", 4, "--ema", *NAR, "--data-parallel", "fsdp", world=2),
    )
    for name, layout in layouts.items():
        large = ["--image-size", 20, "--max-steps", 1, "--lr", 1e-30, *EXACT, "--ema", *layout]
        stage2 = train(data, tmp_path / f"{name}2", *large, "--stage1-ckpt", tmp_path / name, kind="images")
        assert same(weights(stage2), weights(tmp_path / name))
        assert list(metrics(stage2, "loss")) == [1]
        text = (run_folder(stage2) / "log.txt").read_text()
        assert "its weights alone" in text
        assert load(last(stage2))["args"].image_size == 20 and load(last(stage2))["steps"] == 1
        again = train(data, tmp_path / f"{name}1", "--max-steps", 5, *layout, "--gpt-ckpt", tmp_path / name)
        assert list(metrics(again, "loss")) == [5], "of the same size it goes on"


def test_two_processes_encode_images_and_draw_pictures(data, tmp_path):
    more = ["--sample-every", 3, "--max-steps", 3, "--sample-cfg-scale", 3, *EXACT]
    live(life(data, tmp_path / "two", *more, "--data-parallel", "fsdp", world=2, kind="images"))
    train(data, tmp_path / "one", *more, kind="codes")
    assert os.listdir(run_folder(tmp_path / "two") / "samples") == ["0000003.png"]
    assert metrics(tmp_path / "two", "loss") == pytest.approx(metrics(tmp_path / "one", "loss"), abs=1e-5)
    assert not (run_folder(tmp_path / "one") / "samples").exists()


def test_edges_are_drawn_of_the_images_that_are_encoded(data, tmp_path):
    control = ["--control-type", "canny", "--control-encoder", "vit,width=16,layers=1,heads=2,positions=4"]
    train(data, tmp_path / "run", *control, "--max-steps", 2, kind="images")
    conditions = load(last(tmp_path / "run"))["config"]["conditions"]
    assert [*conditions] == ["caption", "control"] and conditions["control"]["pixels"] == 4
    with pytest.raises(ValueError, match="--control-path is needed"):
        train(data, tmp_path, "--control-type", "depth", *control[2:], kind="images")
    with pytest.raises(ValueError, match="--control-path is needed"):
        train(data, tmp_path, *control)
    with pytest.raises(ValueError, match="--val-control-path x needs --control-path too"):
        train(data, tmp_path, *control, *held_out(data), "--val-control-path", "x", kind="images")


def test_edges_stored_of_pairs_are_those_drawn_while_training(data, tmp_path):
    files = ["--code-path", data / "codes", "--output", tmp_path / "edges"]
    for source in ("pairs", "shards"):
        run_here(make_controls, *files[:-1], tmp_path / source, "--data-path", data / source)
    control = ["--control-encoder", "vit,width=16,layers=1,heads=2,positions=4", "--lr", 1e-2, "--max-steps", 3]
    train(data, tmp_path / "drawn", *control, kind="images")
    for source in ("pairs", "shards"):
        train(data, tmp_path / f"of_{source}", *control, "--control-path", tmp_path / source)
        assert metrics(tmp_path / f"of_{source}", "loss") == metrics(tmp_path / "drawn", "loss")
    run_here(make_controls, *files, "--data-path", data / "pairs", "--map-path", data / "pairs")
    assert PairArrays(tmp_path / "edges", "control", COUNTS).get("part-b", 3).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="has tar shards"):
        run_here(make_controls, *files, "--data-path", data / "shards", "--map-path", data / "pairs")
    make_pairs(tmp_path / "other", {"part-z": 2})
    with pytest.raises(ValueError, match="has no folder of codes of part-z"):
        run_here(make_controls, *files, "--data-path", tmp_path / "other")
    shutil.copy(data / "pairs/part-a.jsonl", tmp_path / "other/part-b.jsonl")
    with pytest.raises(ValueError, match="part-b was made of other lines"):
        run_here(make_controls, *files, "--data-path", tmp_path / "other")


def test_edges_report_of_a_text_model_draws_by_captions_of_the_key(data, tmp_path, monkeypatch):
    control = ["--control-type", "canny", "--control-encoder", "vit,width=16,layers=1,heads=2,positions=4"]
    train(data, tmp_path / "run", *control, "--max-steps", 1, kind="images")
    read = []

    class Encoder:
        def get_text_embeddings(self, texts):
            read.extend(texts)
            return torch.ones(len(texts), TOKENS, DIM), torch.ones(len(texts), TOKENS, dtype=torch.long)

    monkeypatch.setattr("autoregressive.text.find_encoder", lambda pipeline: Encoder())
    files = ["--gpt-ckpt", tmp_path / "run", "--vq-ckpt", data / "vq.pt", "--output", tmp_path, "--images", 5]
    for key, captions in (("blip", {"a red thing", "a grey thing"}), ("llava", {"b"})):
        read.clear()
        run_here(edges_report, *files, "--data-path", data / "pairs", "--caption-key", key)
        assert captions <= set(read) and len(set(read)) <= 4
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["images"] == 5 and len(report["edge_f1"]) == 6
    with pytest.raises(ValueError, match=r"no \*.jsonl files in"):
        run_here(edges_report, *files, "--data-path", data / "codes")


def store_controls(data, folder):
    """Return a folder of control images of black and white for each pair, and those of its last file."""
    generator = np.random.default_rng(0)
    for stem, count in COUNTS.items():
        images = generator.integers(0, 2, (count, 1, 16, 16)).astype(np.uint8) * 255
        write_arrays(folder / stem, "control", images, of=data / "codes" / stem)
    return folder, images


def test_several_resolutions_are_trained_resumed_to_the_bit_and_drawn(data, tmp_path, monkeypatch):
    control = ["--control-type", "canny", "--control-encoder", "vit,width=16,layers=1,heads=2,positions=4"]
    flags = [*control, "--random-sides", 8, 24, *held_out(data)[:4]]
    seen, encode = [], text_data.encode_views
    monkeypatch.setattr(
        text_data, "encode_views", lambda vq, x, *a: seen.append((x[:, 0].shape, encode(vq, x, *a))) or seen[-1][1]
    )
    whole = train(data, tmp_path / "whole", *flags, "--max-steps", 6, kind="images")
    squares, trained = seen[:1], [(tuple(shape[2:]), codes) for shape, codes in seen[1:7]]
    sides = RandomSides(8, 24, 4, 16, seed=0)
    assert [shape for shape, _ in trained] == [sides(step) for step in range(6)] and len({*map(sides, range(6))}) > 2
    assert all(codes.shape == (16, 1, h * w // 16) for (h, w), codes in trained)
    assert {tuple(shape[2:]) for shape, _ in squares + seen[7:]} == {(16, 16)}, "those shown and held out"
    parts = train(data, tmp_path / "parts", *flags, "--max-steps", 3, kind="images")
    train(data, parts, *control, *held_out(data)[:4], "--max-steps", 6, "--resume", kind="images")
    assert same(weights(parts), weights(whole)) and metrics(parts, "val_loss")[6] == metrics(whole, "val_loss")[6]

    place, picture = last(whole), Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    pipeline = ImagePipeline.from_pretrained(place, vq=data / "vq.pt", device="cpu")
    asked = {"features": [caption_features(0)], "cfg_scale": 2.0, "control_images": picture}
    assert pipeline.rectangles(height=8, width=24, **asked)[0].size == (24, 8)
    smaller = ImagePipeline.from_pretrained(place, vq=data / "vq.pt", image_size=12, device="cpu")
    assert smaller.gpt.args.rope_grid == 4 and smaller(**asked, progress=False)[0].size == (12, 12)


@pytest.mark.slow
def test_run_that_begins_with_a_file_of_several_resolutions_keeps_its_rotary_table(data, tmp_path):
    control = ["--control-type", "canny", "--control-encoder", "vit,width=16,layers=1,heads=2,positions=4"]
    train(data, tmp_path / "before", *control, "--random-sides", 8, 24, "--max-steps", 1, kind="images")
    start = ["--finetune", "--gpt-ckpt", last(tmp_path / "before"), *control, "--lr", 1e-2]

    def begun(name, *more):
        """Return the rotary table's and the image's tokens a side of what a run saved, and the run's log."""
        train(data, tmp_path / name, *more, kind="images")
        config = read_checkpoint(last(tmp_path / name)).config
        log = (run_folder(tmp_path / name) / "log.txt").read_text()
        return config["model"].get("rope_grid"), config["layout"]["grid_size"], log

    smaller = ["--image-size", 12]
    for name, more in (("squares", []), ("sides", ["--random-sides", 8, 12])):
        places, grid, log = begun(name, *start, *smaller, *more, "--max-steps", 2)
        assert (places, grid) == (4, 3)
        assert "from a rotary table of 4x4 tokens by a token's number, and so does this run" in log
        assert bool(metrics(tmp_path / name, "tokens_per_second")) == (name == "squares")
    train(data, tmp_path / "parts", *start, *smaller, "--max-steps", 1, kind="images")
    assert begun("parts", *control, *smaller, "--lr", 1e-2, "--max-steps", 2, "--resume")[:2] == (4, 3)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "squares"))
    small = ["--image-size", 8, "--random-sides", 8, 8, "--max-steps", 1]
    assert begun("small", *control, *small)[:2] == (2, 2)
    larger = ["--finetune", "--gpt-ckpt", last(tmp_path / "small"), *control, "--max-steps", 1]
    places, grid, log = begun("larger", *larger)
    assert (places, grid) == (None, 4) and "of 2x2 tokens by a token's number, and this run from one of 4x4" in log


def test_processes_of_several_resolutions_take_the_steps_of_one(data, tmp_path):
    controls = store_controls(data, tmp_path / "controls")[0]
    flags = ["--control-encoder", "vit,width=16,layers=1,heads=2,positions=4", "--random-sides", 8, 24, *COMPARED]
    flags += ["--control-path", controls, "--control-type", "hed"]
    live(life(data, tmp_path / "two", *flags, "--gradient-accumulation-steps", 2, world=2, kind="images"))
    train(data, tmp_path / "one", *flags, kind="images")
    assert metrics(tmp_path / "two", "loss") == pytest.approx(metrics(tmp_path / "one", "loss"), abs=1e-4)


@pytest.mark.slow
def test_shards_of_several_resolutions_killed_and_resumed_end_with_the_same_bits(data, tmp_path):
    flags = ["--control-type", "canny", "--control-encoder", "vit,width=16,layers=1,heads=2,positions=4"]
    flags += ["--random-sides", 8, 24, *EXACT, "--max-steps", 5, "--ckpt-every", 2]
    flags += [*held_out(data)[:4], "--sample-every", 2]
    shards = [*flags, "--data-parallel", "fsdp", "--resume"]
    kinds = {"world": 2, "kind": "images"}
    live(
        life(data, tmp_path / "whole", *shards, **kinds),
        life(data, tmp_path / "killed", *shards, kill_at=f"{tmp_path}/killed/*/checkpoints/0000002*", **kinds),
        life(data, tmp_path / "killed", *shards, **kinds),
    )
    train(data, tmp_path / "one", *flags, kind="images")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    for figure in ("loss", "val_loss"):
        found = metrics(tmp_path / "whole", figure)
        assert found == pytest.approx(metrics(tmp_path / "one", figure), rel=1e-3), figure
    assert len(list((run_folder(tmp_path / "whole") / "samples").glob("*.png"))) == 3


def test_random_sides_that_do_not_fit_are_refused(data, tmp_path):
    control = ["--control-encoder", "vit,width=16,layers=1,heads=2,positions=4"]
    codes = ["--dataset", "t2i_code", "--code-path", data / "codes"]
    for more, message in (
        ([8, 24], "takes control images"),
        ([8, 22, *control], "give multiples of 4"),
        ([20, 24, *control], "the first at most the second and --image-size 16"),
        ([16, 8, *control], "the first at most the second"),
        ([8, 16, *control, "--ar-token-num", 4], "takes raster order"),
        ([8, 16, *control, "--random-orders", 1, 2], "takes raster order"),
        ([8, 16, *codes], "has their codes: give --dataset t2i"),
    ):
        with pytest.raises(ValueError, match=message):
            train(data, tmp_path / "run", "--random-sides", *more, kind="images")
    assert not (tmp_path / "run").exists()


def test_stored_control_images_of_pairs_are_trained_on_resumed_and_drawn_by(data, tmp_path):
    controls, images = store_controls(data, tmp_path / "controls")
    flags = ["--control-path", controls, "--control-encoder", "vit,width=16,layers=1,heads=2,positions=4"]
    flags += ["--lr", 1e-2, "--control-type", "hed"]
    with pytest.raises(ValueError, match=f"--val-control-path {controls} needs --val-data-path too"):
        train(data, tmp_path, *flags, "--val-control-path", controls)
    with pytest.raises(ValueError, match=f"--val-data-path {data / 'pairs'} needs --val-control-path too"):
        train(data, tmp_path, *flags, *held_out(data))
    flags += [*held_out(data), "--val-control-path", controls]
    whole = train(data, tmp_path / "whole", *flags, "--max-steps", 6)
    parts = train(data, tmp_path / "parts", *flags, "--max-steps", 3)
    train(data, parts, *flags, "--max-steps", 6, "--resume")
    assert same(weights(parts), weights(whole)) and len(metrics(whole, "val_loss")) >= 1
    pipeline = ImagePipeline.from_pretrained(last(whole), vq=data / "vq.pt", device="cpu")
    features, picture = [caption_features(0)], Image.fromarray(images[0, 0])
    settings = {"features": features, "progress": False, "cfg_scale": 2.0}
    drawn = [
        np.asarray(pipeline(**settings, control_images=each, control_strength=strength)[0])
        for each, strength in ((picture, 1), (picture, 0), (Image.fromarray(images[1, 0]), 0))
    ]
    assert np.array_equal(drawn[1], drawn[2]) and not np.array_equal(drawn[0], drawn[1])


def test_half_precision_and_stochastic_depth(data, tmp_path):
    flags = ["--mixed-precision", "bf16", "--half-tokenizer", "--drop-path", 0.2, "--max-steps", 3]
    train(data, tmp_path, *flags, kind="images")
    losses = metrics(tmp_path, "loss")
    assert losses[1] == pytest.approx(math.log(VOCAB), rel=1e-3) and len(losses) == 3


# What a user gets wrong


@pytest.mark.parametrize(
    "more, message",
    [
        (["--gpt-type", "c2i", "--cls-token-num", 1], r"train_c2i\.py"),
        (["--dataset", "imagenet"], r"reads --dataset t2i or t2i_code, got 'imagenet'"),
        (["--dataset", "t2i"], r"--code-path is read with --dataset t2i_code"),
        (["--t5-feature-dim", 2048], r"6.*2048"),
        (["--vocab-size", 63], r"was made with 64 codes; pass --vocab-size 64"),
        (["--image-size", 20], r"are of --image-size 16 and have 16 tokens an image; 25 are needed"),
        (["--val-data-path", "x"], r"--val-data-path x needs --val-t5-feat-path too"),
        (["--val-data-path", "x", "--val-t5-feat-path", "y"], r"--val-data-path x needs --val-code-path too"),
        (["--val-t5-feat-path", "x"], r"--val-t5-feat-path x needs --val-data-path too"),
        (["--val-code-path", "x"], r"--val-code-path x needs --val-data-path too"),
        (["--val-condition-path", "depth=x"], r"--val-condition-path depth=x needs --val-data-path too"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_do_not_fit(data, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path / "results", *more)
    assert not (tmp_path / "results").exists()


def test_images_need_a_tokenizer_that_fits(data, tmp_path):
    flags = words(data, tmp_path / "results", kind="images")
    without = [word for i, word in enumerate(flags) if "--vq-ckpt" not in flags[max(i - 1, 0) : i + 1]]
    with pytest.raises(ValueError, match=r"--dataset t2i encodes images while training: give --vq-ckpt"):
        run_here(train_t2i, *without)
    with pytest.raises(ValueError, match=r"vq\.pt does not fit the flags --vq-model VQ-16"):
        run_here(train_t2i, *flags, "--vq-model", "VQ-16")
    with pytest.raises(ValueError, match=r"vq\.pt has 64 codes of 4x4 pixels, not --vocab-size 128"):
        run_here(train_t2i, *flags, "--vocab-size", 128)


def test_pairs_whose_list_lost_a_line_are_refused(data, tmp_path):
    """The reported slip: every caption would train with the next image, all of them valid."""
    pairs = shutil.copytree(data / "pairs", tmp_path / "pairs")
    lines = (pairs / "part-b.jsonl").read_text().splitlines()
    (pairs / "part-b.jsonl").write_text("\n".join(lines[1:]))
    for kind, message in (
        ("codes", r"part-b was made of 12 lines, now there are 11"),
        ("images", r"patchy/part-b was made"),
    ):
        with pytest.raises(ValueError, match=message):
            train(data, tmp_path / "results", "--data-path", pairs, kind=kind)
    (pairs / "part-b.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(ValueError, match=r"codes/part-b was made of other lines: the image of line 0 "):
        train(data, tmp_path / "results", "--data-path", pairs)
    held_out = ["--val-data-path", pairs, "--val-t5-feat-path", data / "patchy", "--val-code-path", data / "codes"]
    with pytest.raises(ValueError, match=r"codes/part-b was made of other lines: the image of line 0 "):
        train(data, tmp_path / "results", *held_out)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("workers, more", [(2, []), (0, ["--max-steps", 2])], ids=["a pass", "two steps"])
def test_images_that_are_all_too_small_end_the_first_pass(data, tmp_path, workers, more, monkeypatch):
    """In its middle, whatever the number of loader processes; nothing is saved."""
    monkeypatch.setattr("utils.loading.os.sched_getaffinity", lambda pid: range(4), raising=False)
    flags = ["--image-size", 32, "--num-workers", workers, "--global-batch-size", 4, "--epochs", 1, *more]
    with pytest.raises(ValueError, match=r"none of the first \d+ pairs could be used") as told:
        train(data, tmp_path / "results", *flags, kind="images")
    assert f"none of the first {8 if more else 24} pairs" in str(told.value)
    assert re.search(r"\n  line \d+ \(from 0\) of .*part-.*pixels, smaller than --image-size 32", str(told.value))
    assert len(metrics(tmp_path / "results", "loss")) < 6
    assert not list(run_folder(tmp_path / "results").glob("checkpoints/*"))


def test_images_that_are_too_small_are_told_by_both_processes(data, tmp_path):
    flags = ["--image-size", 32, "--epochs", 1, "--global-batch-size", 16]
    printed = live(life(data, tmp_path / "results", *flags, world=2, kind="images", fails=True))
    told = re.findall(r"AgreedError: (.*)", printed)
    assert len(told) == 2 and len(set(told)) == 1 and told[0].startswith("none of the first 32 pairs could be used")


def test_many_pairs_that_do_not_count_are_no_error(data, tmp_path):
    """Nine in ten, and in the first batch none."""
    order = BatchOrder(COUNT, 4, 1, 0, 1, seed=0)
    usable = order.samples(0, 4)
    make_features(tmp_path / "few", COUNTS, missing=tuple(set(range(COUNT)) - set(usable)))
    train(data, tmp_path / "results", "--t5-feat-path", tmp_path / "few", "--global-batch-size", 4, "--epochs", 2)
    valid = metrics(tmp_path / "results", "valid")
    assert len(valid) == 24 and [valid[step] for step in (1, 4, 5, 6)] == [0, 0, 1, 0]


def test_a_loss_that_is_no_number_names_its_samples(data, tmp_path):
    broken = make_features(tmp_path / "broken", COUNTS)
    assert broken.is_dir()
    with pytest.raises(ValueError, match=r"no longer finite.*Samples there: part-[abc]:\d+, part-"):
        train(data, tmp_path / "results", "--lr", 1e30, "--max-grad-norm", 0, "--epochs", 3)


# Flags

FLAGS = """
`--data-path` str = required; `--t5-feat-path` str = required; `--short-t5-feat-path` str = None;
`--cloud-save-path` str = required; `--no-local-save` switch = –; `--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16;
`--vq-ckpt` str = None; `--codebook-size` int = 16384; `--codebook-embed-dim` int = 8;
`--gpt-model` str ∈ [GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-XXXL, GPT-1B, GPT-3B, GPT-7B] = GPT-B; `--gpt-ckpt` str = None;
`--gpt-type` str ∈ [c2i, t2i] = t2i; `--vocab-size` int = 16384; `--cls-token-num` int = 120; `--dropout-p` float = 0.1;
`--token-dropout-p` float = 0.1; `--drop-path` float = 0.0; `--no-compile` switch = –; `--results-dir` str = results;
`--dataset` str = t2i; `--image-size` int ∈ [256, 384, 512] = 384; `--downsample-size` int ∈ [8, 16] = 16;
`--num-classes` int = 1000; `--epochs` int = 300; `--lr` float = 0.0001; `--weight-decay` float = 0.05;
`--beta1` float = 0.9; `--beta2` float = 0.95; `--max-grad-norm` float = 1.0; `--global-batch-size` int = 256;
`--global-seed` int = 0; `--num-workers` int = 24; `--log-every` int = 100; `--ckpt-every` int = 5000;
`--gradient-accumulation-steps` int = 1; `--mixed-precision` str ∈ [none, fp16, bf16] = bf16
"""


def test_published_flags():
    check_published_flags(train_t2i, FLAGS, ("--cloud-save-path",))


@pytest.mark.parametrize("kind", ["codes", "images"])
def test_a_map_stored_for_each_pair_reaches_the_model(data, tmp_path, kind):
    """With a held-out loss and pictures, for which it is read too."""
    maps, first = tmp_path / "maps", 0
    for stem, count in COUNTS.items():
        values = [np.full((N, 1), first + line, np.float32) for line in range(count)]
        write_arrays(maps / stem, "depth", values, of=data / "codes" / stem)
        first += count
    flags = ["--import", ROOT / "examples/depth_map.py", "--condition", "depth", "--condition-path", f"depth={maps}"]
    more = [*held_out(data), "--val-condition-path", f"depth={maps}", "--vq-ckpt", data / "vq.pt", "--sample-every", 2]
    train(data, tmp_path / "results", *flags, *more, "--max-steps", 2, "--ckpt-every", 1, kind=kind)
    assert any(value.any() for name, value in weights(tmp_path / "results").items() if "depth" in name)
    assert len(metrics(tmp_path / "results", "val_loss")) == 2
    assert list(run_folder(tmp_path / "results").rglob("*.png"))
    with pytest.raises(
        ValueError, match="--val-condition-path gives nothing; this model takes --val-condition-path depth="
    ):
        train(data, tmp_path / "results", *flags, *held_out(data), kind=kind)


def test_random_orders_learn_resume_and_go_on_at_another_image_size(data, tmp_path):
    orders = ["--random-orders", 1, 2, "--epochs", 3, *EXACT]
    whole = train(data, tmp_path / "whole", *orders)
    losses = list(metrics(whole, "loss").values())
    assert losses[-1] < losses[0]
    parts = train(data, tmp_path / "parts", *orders, "--max-steps", 4)
    train(data, parts, "--epochs", 3, *EXACT, "--resume")
    assert same(weights(parts), weights(whole))
    more = ["--gpt-ckpt", last(whole), "--image-size", 8, "--max-steps", 1]
    other = train(data, tmp_path / "other", *orders, *more, kind="images")
    assert len(weights(other)["target_embeddings.weight"]) == 4
    plain = train(data, tmp_path / "plain", *EXACT, *more, kind="images")
    assert "target_embeddings.weight" not in weights(plain)
