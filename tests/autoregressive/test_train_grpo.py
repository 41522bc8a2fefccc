"""Training by rewards through the script: figures, files, resuming, processes, and what is refused."""

import contextlib
import json
import shutil
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import ImagePipeline
from autoregressive.released import find_identity
from autoregressive.train import train_grpo
from autoregressive.train.draws import HeldOutRewards, diversity, usage
from autoregressive.train.rewards import Reward, rewards_of
from dataset.lines import CaptionLines, record_lines
from language.prompts import PromptList
from tests.evaluations.test_t2i import make_small_clip
from tests.helpers import ROOT, randomize
from tests.text_training import DIM, TOKENS, make_features
from tests.training import live, load, make_codes, metrics, run_folder, run_here, same
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.checkpoint import read_checkpoint
from utils.errors import AgreedError
from utils.registry import import_file

CODES, CLASSES, PLACES = 64, 4, 16
REWARDS = ROOT / "tests/autoregressive/small_rewards.py"
BASE = [
    "--mixed-precision",
    "none",
    "--device",
    "cpu",
    "--log-every",
    1,
    "--no-wandb",
    "--val-images",
    8,
    "--group-size",
    4,
]
BASE += ["--global-batch-size", 4, "--lr", 1e-3, "--cfg-scale", 1]
PROMPTS = ["a red house", "two blue cats", "rain"]


@pytest.fixture(autouse=True, scope="module")
def registered():
    import_file(REWARDS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with `vq.pt`, `gpt.pt` of classes, `text.pt`, `codes`, and prompts with features."""
    home = tmp_path_factory.mktemp("files")
    args = {"gpt_model": "GPT-XS", "image_size": 16, "downsample_size": 4}
    shape = {"vocab_size": CODES, "block_size": PLACES}
    torch.save({"model": randomize(VQ_models["VQ-4"](codebook_size=CODES), seed=3).state_dict()}, home / "vq.pt")
    for name, kind in {
        "gpt": {"num_classes": CLASSES},
        "other": {"num_classes": CLASSES + 1},
        "text": {"model_type": "t2i", "caption_dim": DIM, "cls_token_num": TOKENS},
    }.items():
        model = randomize(GPT_models["GPT-XS"](**shape, **kind), seed=1)
        torch.save(
            {"model": model.state_dict(), "optimizer": {}, "steps": 7, "args": Namespace(**args)}, home / f"{name}.pt"
        )
    codes = np.random.default_rng(0).integers(0, CODES, (16, 1, PLACES))
    make_codes(home / "codes", codes, np.arange(16) % CLASSES, image_size=16, vocab=CODES, classes=CLASSES)
    (home / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    make_features(home / "features", {"prompts": len(PROMPTS)})
    return home


def train(files, results, *more, gpt="gpt.pt", rewards=("bright",)):
    paths = ["--gpt-ckpt", files / gpt, "--vq-ckpt", files / "vq.pt", "--results-dir", results]
    named = [word for one in rewards for word in ("--reward", one)]
    run_here(train_grpo, *paths, *BASE, *named, *more)
    return newest(results)


def newest(results):
    return max((run_folder(results) / "checkpoints").glob("0*"), key=lambda path: int(path.stem))


@pytest.mark.slow
def test_run_raises_its_reward_keeps_the_best_and_leaves_an_ordinary_file(files, tmp_path):
    more = ["--max-steps", 6, "--ckpt-every", 2, "--keep-last", 1, "--val-code-path", files / "codes", "--beta", 0.01]
    more += ["--group-size", 12, "--lr", 3e-3, "--val-images", 48]
    path = train(files, tmp_path, *more, rewards=("bright,power=1.5,weight=2", "constant"))
    lines = metrics(tmp_path)
    held_out = {line["step"]: line["val_reward"] for line in lines if "val_reward" in line}
    assert held_out.keys() == {0, 2, 4, 6} and held_out[6] > held_out[0] + 0.1
    for name in (
        "reward_bright",
        "reward_constant",
        "reward_sd",
        "groups_without_spread",
        "kl",
        "kl_max",
        "entropy",
        "diversity",
        "usage",
        "draw_gap",
    ):
        assert len(metrics(tmp_path, name)) == 6, name
    for name in ("val_reward_bright", "val_reward_constant", "val_diversity", "val_precision", "val_recall"):
        assert len(metrics(tmp_path, name)) == 4, name
    assert (
        metrics(tmp_path, "reward_constant")[5] == 0.5 and metrics(tmp_path, "kl")[1] == 0 < metrics(tmp_path, "kl")[6]
    )
    assert lines[1]["images_per_second"] == pytest.approx(48 * lines[1]["steps_per_second"])

    best = max((step for step in held_out if step), key=held_out.__getitem__)
    (kept,) = (path.parent / "best").iterdir()
    assert int(kept.stem) == best
    record = json.loads((path.parent / "best.json").read_text())
    assert record == {"step": best, "val_reward": held_out[best], "measured": 6}
    assert len(list((run_folder(tmp_path) / "samples").glob("*.png"))) == 3

    saved = read_checkpoint(path)
    assert saved.config["objective"] == "grpo" and len(saved.config["reference"]) == 32 and saved.config["tokenizer"]
    pipeline = ImagePipeline.from_pretrained(path, vq=files / "vq.pt", device="cpu")
    assert pipeline([1], seed=0)[0].size == (16, 16)


def test_images_of_a_step_are_those_of_the_pipeline_with_its_seed_and_numbers(files, tmp_path, monkeypatch):
    from autoregressive.train import draws

    seen, original = [], draws.Studio.draw

    def watched(self, asked, items, seed, numbers):
        drawn = original(self, asked, items, seed, numbers)
        seen.append((items, seed, numbers, drawn.codes))
        return drawn

    monkeypatch.setattr(draws.Studio, "draw", watched)
    train(files, tmp_path, "--max-steps", 1, "--global-seed", 3)
    assert seen[0][0] == [0] * 4 + [2] * 4  # held-out images are of classes spread over all of them
    items, _, numbers, codes = next(each for each in seen if each[1] == 3)
    assert numbers == range(16) and sorted(Counter(items).items()) == [(label, 4) for label in range(CLASSES)]
    pipeline = ImagePipeline.from_pretrained(files / "gpt.pt", vq=files / "vq.pt", device="cpu")
    assert torch.equal(codes, pipeline.generate_codes(items, seed=3, indices=list(numbers), cfg_scale=1.0))


def test_run_resumed_ends_with_the_same_bits(files, tmp_path):
    whole = load(train(files, tmp_path / "whole", "--max-steps", 4, "--ckpt-every", 2))
    train(files, tmp_path / "parts", "--max-steps", 3, "--ckpt-every", 2)
    parts = load(train(files, tmp_path / "parts", "--max-steps", 4, "--ckpt-every", 2, "--resume"))
    assert same(parts["model"], whole["model"]) and same(parts["optimizer"], whole["optimizer"])
    for name in ("reward", "kl", "entropy"):
        assert metrics(tmp_path / "parts", name)[4] == metrics(tmp_path / "whole", name)[4]
    with pytest.raises(AgreedError, match="reference"):
        train(files, tmp_path / "parts", "--max-steps", 5, "--resume", "--reference", newest(tmp_path / "whole"))


def test_run_resumed_without_its_batch_size_keeps_it(files, tmp_path, monkeypatch):
    train(files, tmp_path, "--max-steps", 1, "--global-batch-size", CLASSES + 2)
    place = BASE.index("--global-batch-size")
    monkeypatch.setattr(f"{__name__}.BASE", BASE[:place] + BASE[place + 2 :])
    assert load(train(files, tmp_path, "--max-steps", 2, "--resume"))["args"].global_batch_size == CLASSES + 2


def test_run_killed_before_its_held_out_figures_is_measured_where_it_resumes(files, tmp_path, monkeypatch):
    more = ["--max-steps", 3, "--ckpt-every", 2, "--ema"]
    train(files, tmp_path / "whole", *more)
    for killed_at in (2, 3):
        original = HeldOutRewards.__call__

        def dies(self, model, killed_at=killed_at, original=original):
            assert self.trainer.step < killed_at, "killed"
            return original(self, model)

        monkeypatch.setattr(HeldOutRewards, "__call__", dies)
        with pytest.raises(AssertionError, match="killed"):
            train(files, tmp_path / "parts", *more, "--resume")
        monkeypatch.undo()
    train(files, tmp_path / "parts", *more, "--resume")
    whole, parts = (
        (metrics(folder, "val_reward"), (newest(folder).parent / "best.json").read_text())
        for folder in (tmp_path / "whole", tmp_path / "parts")
    )
    assert whole == parts and whole[0].keys() == {0, 2, 3}


def test_best_checkpoint_stays_where_the_checkpoints_alone_were_moved(files, tmp_path):
    train(files, tmp_path / "run", "--max-steps", 2, "--ckpt-every", 2)
    begun = run_folder(tmp_path / "run")

    def resumed(name, record, in_run=False):
        """Return the record, the best checkpoint's name and the log of the run, resumed from its checkpoints."""
        run = tmp_path / name / begun.name
        shutil.copytree(begun / "checkpoints", run / "checkpoints")
        shutil.rmtree(run / "checkpoints/best", ignore_errors=True)
        (run / "checkpoints/best").mkdir()
        shutil.copy(newest(tmp_path / "run"), run / "checkpoints/best/0000001.pt")
        (run / "checkpoints/best.json").unlink()
        if record:
            ((run if in_run else run / "checkpoints") / "best.json").write_text(json.dumps(record))
        train(files, tmp_path / name, "--max-steps", 3, "--ckpt-every", 2, "--resume")
        (kept,) = (run / "checkpoints/best").iterdir()
        return json.loads((run / "checkpoints/best.json").read_text()), kept.name, (run / "log.txt").read_text()

    best = {"step": 1, "val_reward": 9.0, "measured": 2}
    for name, in_run in (("moved", False), ("earlier edition's", True)):
        record, kept, log = resumed(name, best, in_run)
        assert record == {**best, "measured": 3} and kept == "0000001.pt" and "has no best.json" not in log
    record, kept, log = resumed("without", None)
    assert record["measured"] == 3 and kept == f"{record['step']:07d}.pt" != "0000001.pt"
    assert "best has no best.json beside it: the first checkpoint that is measured replaces it" in log


def test_equal_rewards_leave_the_weights_where_they_are(files, tmp_path):
    path = train(files, tmp_path, "--max-steps", 2, rewards=("constant",))
    assert same(load(path)["model"], load(files / "gpt.pt")["model"])
    assert metrics(tmp_path, "groups_without_spread") == {1: 1, 2: 1}


def test_reward_that_applies_to_some_images_counts_0_for_the_others(files, tmp_path):
    for parts in (1, 4):  # a part without a class that it applies to counts too
        more, results = ["--max-steps", 1, "--gradient-accumulation-steps", parts], tmp_path / str(parts)
        train(files, results, *more, rewards=("of_even_classes,weight=4", "constant"))
        assert metrics(results, "reward")[1] == pytest.approx(0.5 + 4 * 0.5)
        assert (
            metrics(results, "reward_of_even_classes")[1]
            == metrics(results, "val_reward_of_even_classes")[1] / 2
            == 0.5
        )


@pytest.mark.slow
def test_reference_and_guidance_in_the_policy_change_what_is_trained(files, tmp_path):
    start = train(files, tmp_path / "start", "--max-steps", 2)
    train(files, tmp_path / "near", "--max-steps", 1, "--reference", start)
    assert metrics(tmp_path / "near", "kl")[1] > 0
    train(files, tmp_path / "free", "--max-steps", 2, "--beta", 0)
    assert not metrics(tmp_path / "free", "kl") and "reference" not in load(newest(tmp_path / "free"))["config"]
    outside = load(train(files, tmp_path / "outside", "--max-steps", 1, "--cfg-scale", 3))
    inside = load(train(files, tmp_path / "inside", "--max-steps", 1, "--cfg-scale", 3, "--guidance-in-policy"))
    assert metrics(tmp_path / "inside", "reward") == metrics(tmp_path / "outside", "reward")
    assert metrics(tmp_path / "inside", "entropy")[1] < metrics(tmp_path / "outside", "entropy")[1]
    assert metrics(tmp_path / "inside", "draw_gap")[1] < 1e-5 < 0.01 < metrics(tmp_path / "outside", "draw_gap")[1]
    assert not same(inside["model"], outside["model"])


@pytest.mark.slow
def test_adapter_is_trained_against_the_model_without_it_and_merges_as_it_is_read(files, tmp_path):
    pytest.importorskip("peft")
    more = ["--lora-rank", 4, "--lr", 1e-2, "--val-images", 4]
    path = train(files, tmp_path / "whole", *more, "--max-steps", 2)
    assert all(".lora_" in name for name in load(path)["model"])
    kl = metrics(tmp_path / "whole", "kl")
    assert kl[1] == 0 < kl[2] and read_checkpoint(path).model.keys() == load(files / "gpt.pt")["model"].keys()
    train(files, tmp_path / "parts", *more, "--max-steps", 1)
    parts = train(files, tmp_path / "parts", *more, "--max-steps", 2, "--resume")
    assert same(load(parts)["model"], load(path)["model"])
    again = train(files, tmp_path / "again", "--max-steps", 1, "--reference", files / "gpt.pt", gpt=path)
    assert load(again)["config"]["objective"] == "grpo" and metrics(tmp_path / "again", "kl")[1] > 0


def test_text_model_is_trained_by_clip_on_prompts(files, tmp_path):
    clip = make_small_clip(tmp_path / "clip")
    prompts = ["--prompt-csv", files / "prompts.txt", "--t5-feat-path", files / "features"]
    held_out = ["--val-prompt-csv", files / "prompts.txt", "--val-t5-feat-path", files / "features"]
    more = ["--global-batch-size", 3, "--max-steps", 2, "--cfg-scale", 2, "--guidance-in-policy"]
    path = train(files, tmp_path / "run", *prompts, *held_out, *more, gpt="text.pt", rewards=(f"clip,folder={clip}",))
    assert load(path)["args"].beta == 1 and set(metrics(tmp_path / "run", "val_reward")) == {0, 2}
    assert all(-1 < value < 1 for value in metrics(tmp_path / "run", "reward").values())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("raises", r"the reward raises failed: .*no such network.* \(KeyError\)"),
        ("of_shape,shape=3", r"the reward of_shape returned the shape \(3,\) for 8 images"),
        ("constant,value=nan", "constant returned NaN for 8 of 8 images, the first asked for as 'a photo of 0'"),
        ("constant,value=inf", "the reward constant returned inf"),
        ("brigt", "no reward is called 'brigt'"),
        ("bright,poer=2", "--reward bright: got an unexpected keyword argument 'poer'"),
        ("bright,weight=much", "weight must be a finite number, got much"),
        ("clip,folder=/nowhere", "the reward clip failed: no CLIP ViT-B/32 .*/nowhere"),
    ],
)
def test_reward_that_does_not_do_its_part_ends_the_run_in_one_line(files, tmp_path, reward, message):
    with pytest.raises((ValueError, AgreedError), match=message) as error:
        train(files, tmp_path, "--max-steps", 2, "--global-batch-size", 2, rewards=(reward,))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", 5], "--top-k, --top-p and --temperature 0 leave codes out"),
        (["--top-p", 0.9], "--top-k, --top-p and --temperature 0 leave codes out"),
        (["--temperature", 0], "--top-k, --top-p and --temperature 0 leave codes out"),
        (["--guidance-in-policy"], "--guidance-in-policy needs --cfg-scale above 1, got 1"),
        (["--group-size", 1], "--group-size must be 2 or more"),
        (["--prompt-csv", "x.txt"], "--prompt-csv is for text models"),
        (["--recall-features", "dino"], "no kind of features is called 'dino'"),
        (["--reward", "bright"], "--reward is given twice with one name"),
        (["--use-ema"], "has no averaged weights"),
        (["--lora-alpha", 4], "--lora-alpha needs --lora-rank"),
        (["--lora-rank", 4, "--reference", "x.pt"], "leave out --reference"),
        (["--val-code-path", "nowhere"], "the code folder nowhere does not exist"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(files, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(files, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


def test_codes_of_other_images_or_of_another_tokenizer_are_refused(files, tmp_path):
    codes, labels = np.full((4, 1, 64), CODES - 1), np.arange(4)
    make_codes(tmp_path / "large", codes, labels, image_size=32, vocab=CODES, classes=CLASSES)
    make_codes(tmp_path / "many", codes[..., :PLACES] + 1, labels, image_size=16, vocab=2 * CODES, classes=CLASSES)
    make_codes(tmp_path / "other", codes[..., :PLACES], labels, image_size=16, vocab=CODES, classes=CLASSES)
    index = tmp_path / "other" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": "0" * 32}))
    for name, message in (("large", "image-size 32"), ("many", "has the code 64"), ("other", "do not belong together")):
        with pytest.raises(ValueError, match=message):
            train(files, tmp_path / "run", "--val-code-path", tmp_path / name)


def test_held_out_features_of_another_encoder_are_refused(files, tmp_path):
    shutil.copytree(files / "features", tmp_path / "features")
    saved = load(files / "text.pt") | {"config": {"text_encoder": "1" * 32}}
    torch.save(saved, tmp_path / "text.pt")
    lines = CaptionLines(PromptList(files / "prompts.txt", PROMPTS), CaptionLines.kind_of("blip", False), "2" * 32)
    record_lines(tmp_path / "features" / "prompts", lines, 0, range(len(PROMPTS)), made=range(len(PROMPTS)))
    prompts = ["--prompt-csv", files / "prompts.txt", "--t5-feat-path", files / "features"]
    held_out = ["--val-prompt-csv", files / "prompts.txt", "--val-t5-feat-path", tmp_path / "features"]
    with pytest.raises(ValueError, match=r"--val-t5-feat-path .* is of 2222"):
        train(files, tmp_path / "run", *prompts, *held_out, gpt=tmp_path / "text.pt")


def test_models_that_do_not_fit_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="draws from text: give --prompt-csv FILE and --t5-feat-path FOLDER"):
        train(files, tmp_path, gpt="text.pt")
    with pytest.raises(ValueError, match=r"other\.pt"):
        train(files, tmp_path, "--reference", files / "other.pt")
    identity = find_identity(read_checkpoint(files / "gpt.pt"))
    patches = identity | {"layout": {"name": "patches", "side": 2, "grid_size": 4}}  # of the same weights
    torch.save({"model": load(files / "gpt.pt")["model"], "config": patches}, tmp_path / "patches.pt")
    with pytest.raises(ValueError, match="do not belong together: layout"):
        train(files, tmp_path, "--reference", tmp_path / "patches.pt")
    with pytest.raises(ValueError, match="looks like a VQ image tokenizer"):
        train(files, tmp_path, gpt="vq.pt")


def test_usage_is_the_share_of_codes_in_a_groups_images():
    codes = torch.tensor([[0, 1], [1, 0], [2, 3], [4, 9]])
    assert usage(codes, 2, 10) == pytest.approx((0.2 + 0.4) / 2)


def test_diversity_is_the_root_mean_square_distance_of_pairs():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    groups = images.reshape(2, 3, -1) / 255
    expected = [
        np.sqrt(np.mean([((group[i] - group[j]) ** 2).mean() for i in range(3) for j in range(i)])) for group in groups
    ]
    assert diversity(images, 3) == pytest.approx(np.mean(expected), rel=1e-5)


def test_rewards_of_several_functions_stand_side_by_side():
    images, asked = np.zeros((2, 4, 4, 3), np.uint8), {"text": ["a", "b"], "label": np.array([0, 1])}
    found = rewards_of([Reward("constant"), Reward("of_even_classes")], images, asked)
    np.testing.assert_equal(found, [[0.5, 1], [0.5, np.nan]])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("tensor", 0.5),
        ("bool", 1),
        ("state", 0),
        ("complex", "Cannot cast array data from dtype"),
        ("words", "Cannot cast array data from dtype"),
        ("none", "no kind is none"),
    ],
)
def test_reward_is_given_a_copy_without_gradients_and_autocast_and_returns_numbers(kind, value):
    images = np.full((2, 4, 4, 3), 7, np.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(value, str):
            with pytest.raises(ValueError, match=f"the reward of_kind failed: {value}"):
                Reward("of_kind", settings={"kind": kind})(images, {})
        else:
            assert Reward("of_kind", settings={"kind": kind})(images, {}).tolist() == [value] * 2
    assert (images == 7).all()


def test_features_that_are_no_rows_end_the_run_in_one_line(files, tmp_path):
    with pytest.raises(ValueError, match=r"the features flat have the shape \(8,\) for 8 images"):
        train(files, tmp_path, "--recall-features", "flat", "--val-code-path", files / "codes")


def life(files, results, *more, world=1, **when):
    flags = ["--import", REWARDS, "--gpt-ckpt", files / "gpt.pt", "--vq-ckpt", files / "vq.pt", "--reward", "bright"]
    args = [*flags, *BASE, "--results-dir", results, "--max-steps", 2, *more]
    return {"module": "autoregressive.train.train_grpo", "args": list(map(str, args)), "world": world, **when}


@pytest.mark.slow
def test_processes_and_micro_batches_draw_and_learn_the_same(files, tmp_path):
    kinds = {
        "one": ([], 1),
        "parts": (["--gradient-accumulation-steps", 2], 1),
        "ddp": ([], 2),
        "fsdp": (["--data-parallel", "fsdp", "--activation-checkpointing"], 2),
        "sdp": (["--data-parallel", "sdp", "--gradient-accumulation-steps", 2], 2),
    }
    rises = ["--global-seed", 1]
    live(*(life(files, tmp_path / name, *rises, *more, world=world) for name, (more, world) in kinds.items()))
    one = read_checkpoint(newest(tmp_path / "one"))
    for name in kinds:
        for figure in ("reward", "diversity", "usage", "kl", "entropy", "draw_gap", "val_reward"):
            expected = metrics(tmp_path / "one", figure)
            assert metrics(tmp_path / name, figure) == pytest.approx(expected, rel=1e-3, abs=1e-4), (name, figure)
        for key, tensor in read_checkpoint(newest(tmp_path / name)).model.items():
            torch.testing.assert_close(tensor, one.model[key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
        assert list((newest(tmp_path / name).parent / "best").iterdir())


@pytest.mark.slow
def test_killed_shards_resume_to_the_same_bits(files, tmp_path):
    more = ["--data-parallel", "fsdp", "--ckpt-every", 1, "--resume"]
    killed = life(files, tmp_path / "killed", *more, world=2, kill_at=f"{tmp_path}/killed/*/checkpoints/0000001*")
    live(life(files, tmp_path / "whole", *more, world=2), killed, life(files, tmp_path / "killed", *more, world=2))
    whole, parts = (read_checkpoint(newest(tmp_path / name)) for name in ("whole", "killed"))
    assert whole.steps == parts.steps == 2 and same(whole.model, parts.model)


@pytest.mark.slow
def test_reward_that_fails_on_one_process_ends_all_of_them(files, tmp_path):
    output = live(life(files, tmp_path, "--reward", "of_even_classes", "--reward", "raises", world=2, fails=True))
    assert "AgreedError: the reward raises failed" in output and "lost the others" not in output


@pytest.mark.slow
def test_adapters_and_prompts_in_shards_learn_as_on_one_process(files, tmp_path):
    prompts = [
        "--gpt-ckpt",
        files / "text.pt",
        "--prompt-csv",
        files / "prompts.txt",
        "--t5-feat-path",
        files / "features",
    ]
    kinds = {"text": [*prompts, "--global-batch-size", 2, "--cfg-scale", 2, "--guidance-in-policy"]}
    with contextlib.suppress(ImportError):
        import peft  # noqa: F401

        kinds["lora"] = ["--lora-rank", 4]
    sharded = ["--data-parallel", "fsdp"]
    live(
        *(life(files, tmp_path / name, *more, "--max-steps", 2) for name, more in kinds.items()),
        *(
            life(files, tmp_path / f"{name}2", *more, *sharded, "--max-steps", 2, world=2)
            for name, more in kinds.items()
        ),
    )
    for name in kinds:
        one, two = (read_checkpoint(newest(tmp_path / folder)).model for folder in (name, f"{name}2"))
        for key, tensor in two.items():
            torch.testing.assert_close(tensor, one[key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
        assert metrics(tmp_path / f"{name}2", "kl")[2] == pytest.approx(metrics(tmp_path / name, "kl")[2], rel=0.01)
