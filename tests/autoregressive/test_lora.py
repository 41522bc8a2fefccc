"""LoRA through the scripts: trained, resumed, merged, in peft's format, sampled from; bases and adapters that do not fit."""

import json
import shutil

import numpy as np
import pytest
import torch

from autoregressive.pipeline import load_gpt
from autoregressive.sample import sample_c2i
from autoregressive.train import train_c2i
from autoregressive.train.loss import TokenLoss
from dataset.codes import open_codes
from tests.training import live, load, make_codes, metrics, run_folder, run_here, same
from tools import export_checkpoint
from utils.checkpoint import read_checkpoint, save_safetensors, weights_fingerprint
from utils.errors import AgreedError

peft = pytest.importorskip("peft")

VOCAB, TOKENS, COUNT = 64, 16, 48
MODEL = [
    "--gpt-model",
    "GPT-XS",
    "--image-size",
    16,
    "--downsample-size",
    4,
    "--mixed-precision",
    "none",
    "--device",
    "cpu",
]
PLAIN = ["--global-batch-size", 12, "--num-workers", 0, "--log-every", 1, "--lr", 3e-3, "--epochs", 4]
EXACT = ["--dropout-p", 0, "--token-dropout-p", 0]


def codes_of(folder, classes, seed):
    labels = np.arange(COUNT) % classes
    drawn = np.random.default_rng(seed).integers(0, 8, (COUNT, 1, TOKENS))
    array = (labels[:, None, None] * 12 + seed * 5 + drawn) % VOCAB
    return make_codes(folder, array, labels, image_size=16, vocab=VOCAB, classes=classes)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with codes, a trained `base` of 4 classes, and `adapted`, a run of an adapter on 3 new classes."""
    folder = tmp_path_factory.mktemp("lora")
    codes_of(folder / "old", 4, 0)
    codes_of(folder / "new", 3, 1)
    run_here(train_c2i, "--code-path", folder / "old", "--results-dir", folder / "base", *MODEL, *PLAIN)
    adapt(folder, folder / "adapted", "--ema", "--val-code-path", folder / "new")
    return folder


def words(home, results, *more):
    files = ["--code-path", home / "new", "--results-dir", results, "--gpt-ckpt", home / "base"]
    return [*files, "--finetune", "--class-rows", "new", "--lora-rank", 4, *MODEL, *PLAIN, *more]


def adapt(home, results, *more):
    run_here(train_c2i, *words(home, results, *more))
    return newest(results)


def newest(results):
    return max((run_folder(results) / "checkpoints").glob("0*[0-9t]"), key=lambda path: int(path.stem))


def test_adapter_learns_new_classes_and_its_checkpoint_has_nothing_else(home):
    saved = load(newest(home / "adapted"))
    losses = metrics(home / "adapted", "loss")
    assert losses[16] < 0.8 * losses[1]
    names = {name.partition(".default")[0].rpartition(".")[2] for name in saved["model"]}
    assert names == {"lora_A", "lora_B", "weight"} and len(saved["model"]) == 2 * 5 * 4 + 1
    assert saved["model"].keys() == saved["ema"].keys()
    base = load(newest(home / "base"))["model"]
    assert saved["config"]["base"] == weights_fingerprint(base)
    assert sum(t.numel() for t in saved["model"].values()) < 0.1 * sum(t.numel() for t in base.values())


def test_merged_weights_are_base_and_product_and_give_the_runs_own_held_out_loss(home):
    merged, raw = read_checkpoint(newest(home / "adapted")), load(newest(home / "adapted"))["model"]
    base, name = load(newest(home / "base"))["model"], "layers.1.feed_forward.w3"
    product = raw[f"{name}.lora_B.default.weight"] @ raw[f"{name}.lora_A.default.weight"]
    torch.testing.assert_close(merged.model[f"{name}.weight"], base[f"{name}.weight"] + 2 * product)
    assert torch.equal(merged.model["output.weight"], base["output.weight"])
    assert "lora" not in merged.config and merged.config["conditions"] == {"label": {"num_classes": 3}}
    assert held_out_loss(home, newest(home / "adapted"), use_ema=True) == pytest.approx(
        metrics(home / "adapted", "val_loss")[16], abs=1e-5
    )


def held_out_loss(home, file, **options) -> float:
    """Return the held-out loss of a file's model on the new classes."""
    model, data = load_gpt(file, **options), open_codes(home / "new", random_view=False)
    codes, labels = (torch.stack([torch.as_tensor(item[key]) for item in data]) for key in ("codes", "label"))
    codes, layout = codes.view(COUNT, TOKENS), model.layout
    orders = layout.draw_order(0).expand_as(codes) if layout.own_orders else None
    with torch.no_grad():
        return float(TokenLoss(model)(codes, labels, orders=orders))


@pytest.mark.parametrize(
    "kind, tables",
    [
        (["--ar-token-num", 4, "--spe-token-num", 3], {"cls_embedding.embedding_table.weight"}),
        (["--layout", "neighbours"], {"cls_embedding.embedding_table.weight"}),
        (["--gpt-model", "RAR-XS"], {"embeddings.weight"}),
        (["--gpt-model", "LPD-XS"], {"class_emb.weight"}),
        (["--lora-whole", "output", "norm"], {"cls_embedding.embedding_table.weight", "output.weight", "norm.weight"}),
        (["--random-orders", 1, 2], {"cls_embedding.embedding_table.weight", "target_embeddings.weight"}),
    ],
    ids=["parallel", "neighbours", "rar", "lpd", "whole", "places"],
)
def test_adapter_of_any_model_trains_its_classes_and_is_read_back(home, tmp_path, kind, tables):
    short, base = [*MODEL, *PLAIN, "--epochs", 1], home / "base"
    if len(tables) == 1:
        short, base = [*short, *kind], tmp_path / "base"
        run_here(train_c2i, "--code-path", home / "old", "--results-dir", base, *short)
    flags = ["--code-path", home / "new", "--results-dir", tmp_path / "run", "--gpt-ckpt", base, "--finetune"]
    flags += ["--val-code-path", home / "new", "--class-rows", "new", "--lora-rank", 4, *short, *kind]
    run_here(train_c2i, *flags)
    file = newest(tmp_path / "run")
    assert {name for name in load(file)["model"] if ".lora_" not in name} == tables
    assert held_out_loss(home, file) == pytest.approx(metrics(tmp_path / "run", "val_loss")[4], abs=1e-5)
    run_here(export_checkpoint, "--checkpoint", file, "--format", "peft", "--output", tmp_path / "adapter")
    assert same(load_gpt(tmp_path / "adapter").state_dict(), load_gpt(file).state_dict())


def test_exported_folder_is_peffts_and_adds_up_to_the_same_model(home, tmp_path):
    file = newest(home / "adapted")
    run_here(export_checkpoint, "--checkpoint", file, "--format", "peft", "--output", tmp_path / "adapter")
    run_here(export_checkpoint, "--checkpoint", file, "--format", "pt", "--output", tmp_path / "merged.pt")
    by_us, merged = (load_gpt(path) for path in (tmp_path / "adapter", tmp_path / "merged.pt"))
    assert same(by_us.state_dict(), merged.state_dict())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 0.2 * (
        tmp_path / "merged.pt"
    ).stat().st_size

    base = load_gpt(newest(home / "base"))
    base.cls_embedding.embedding_table = torch.nn.Embedding(4, 128)  # of three classes and none, as the adapter has it
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    tokens, labels = torch.arange(15)[None] % VOCAB, torch.tensor([2])
    with torch.no_grad():
        expected = adapted(tokens, labels)
        torch.testing.assert_close(by_us(tokens, labels), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, load_gpt(newest(home / "base"))(tokens, labels), atol=0.1)


def test_adapter_that_peft_wrote_is_added_to_its_base(home, tmp_path):
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["wqkv", "w2"],
        "init_lora_weights": False,
    }
    made = peft.get_peft_model(load_gpt(newest(home / "base")), peft.LoraConfig(**settings))
    made.peft_config["default"].base_model_name_or_path = str(newest(home / "base"))
    made.save_pretrained(str(tmp_path))
    tokens, labels = torch.arange(15)[None] % VOCAB, torch.tensor([2])
    with torch.no_grad():
        torch.testing.assert_close(load_gpt(tmp_path)(tokens, labels), made(tokens, labels), atol=1e-4, rtol=1e-4)


def test_adapter_is_sampled_from_by_its_run_and_by_its_folder(home, small_files, tmp_path):
    run_here(export_checkpoint, "--checkpoint", home / "adapted", "--format", "peft", "--output", tmp_path / "adapter")
    drawn = []
    for name in (home / "adapted", tmp_path / "adapter"):
        picture = tmp_path / f"{name.name}.png"
        files = ["--gpt-ckpt", name, "--vq-ckpt", small_files.vq, "--output", picture, "--labels", 0, 2]
        run_here(sample_c2i, *files, "--precision", "none", "--device", "cpu")
        drawn.append(picture.read_bytes())
    assert drawn[0] == drawn[1]


def test_stopped_adapter_resumes_to_the_bit(home, tmp_path):
    whole = load(adapt(home, tmp_path / "whole"))
    adapt(home, tmp_path / "parts", "--max-steps", 7)
    parts = load(adapt(home, tmp_path / "parts", "--resume"))
    assert same(parts["model"], whole["model"]) and same(parts["optimizer"], whole["optimizer"])
    with pytest.raises(AgreedError, match=r"lora .*rank.*: give the flags it began with"):
        adapt(home, tmp_path / "parts", "--resume", "--lora-rank", 8, "--epochs", 5)
    other = tmp_path / "other"
    run_here(train_c2i, "--code-path", home / "old", "--results-dir", other, *MODEL, *PLAIN, "--max-steps", 1)
    with pytest.raises(AgreedError, match=r"base .* and .*: give the flags it began with"):
        adapt(home, tmp_path / "parts", "--resume", "--gpt-ckpt", other, "--epochs", 5)


def test_adapter_of_another_or_an_absent_base_is_refused(home, tmp_path):
    adapter = tmp_path / "adapter"
    run_here(export_checkpoint, "--checkpoint", home / "adapted", "--format", "peft", "--output", adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def change(**entries):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, **entries}))

    other = tmp_path / "other.pt"
    saved = load(newest(home / "base"))
    saved["model"]["output.weight"] += 0.01
    torch.save({"model": saved["model"]}, other)
    for entries, message in (
        (
            {"base_model_name_or_path": str(other)},
            r"is an adapter of the weights \w+, and .*other\.pt are \w+: give its base",
        ),
        ({"base_model_name_or_path": "gone.pt"}, r"its base is not there \(no file gone\.pt"),
        ({"base_model_name_or_path": ""}, "does not say of what it is an adapter"),
        ({"peft_type": "IA3"}, "an adapter of kind IA3 is not known here: merge it with peft first"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa is not known here"),
        ({"use_dora": True}, "use_dora True is not known here"),
        ({"r": "many"}, "is damaged or no adapter's"),
    ):
        change(**entries)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
            load_gpt(adapter)
        assert "\n" not in str(refused.value)
    change()
    tensors = read_checkpoint(adapter, merge=False).model
    first = next(name for name in tensors if "lora_B" in name)
    save_safetensors(adapter / "adapter_model.safetensors", {**tensors, first: torch.zeros(3, 4)}, {})
    with pytest.raises(ValueError, match=r"adds to layers\.\d.*, and the base has one of \(\d+, \d+\)"):
        load_gpt(adapter)
    shutil.rmtree(adapter)


def test_flags_that_lora_needs_are_refused(home, tmp_path):
    for flags, message in (
        (["--lora-alpha", 3], "--lora-alpha needs --lora-rank"),
        (["--lora-rank", 4], "give --finetune --gpt-ckpt FILE"),
        (["--lora-rank", 4, "--gpt-ckpt", home / "base"], "give --finetune --gpt-ckpt FILE"),
        (["--gpt-ckpt", home / "adapted"], "is an adapter .*--finetune begins with the merged weights"),
    ):
        with pytest.raises(ValueError, match=message):
            run_here(train_c2i, "--code-path", home / "new", "--results-dir", tmp_path, *MODEL, *PLAIN, *flags)
    begin = [
        "--code-path",
        home / "new",
        "--results-dir",
        tmp_path,
        "--finetune",
        "--class-rows",
        "new",
        "--lora-rank",
        4,
    ]
    for flags, message in (
        (["--layout", "neighbours"], "lacks layers.4.* which an adapter does not hold"),
        (["--lora-whole", "head"], "--lora-whole head: the model has .*tok_embeddings.*output"),
    ):
        with pytest.raises(ValueError, match=message):
            run_here(train_c2i, *begin, "--gpt-ckpt", home / "base", *MODEL, *PLAIN, *flags)
    with pytest.raises(ValueError, match="--format peft is of runs with --lora-rank"):
        run_here(export_checkpoint, "--checkpoint", home / "base", "--format", "peft")


def test_finetuning_of_an_adapter_begins_with_the_merged_weights(home, tmp_path):
    flags = ["--code-path", home / "new", "--results-dir", tmp_path, "--finetune", "--gpt-ckpt", home / "adapted"]
    run_here(train_c2i, *flags, "--class-rows", "number", *MODEL, *PLAIN, "--lr", 1e-12, "--max-steps", 1)
    begun, merged = load(newest(tmp_path))["model"], read_checkpoint(newest(home / "adapted")).model
    assert begun.keys() == merged.keys()
    for name, tensor in begun.items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-9, rtol=1e-6)


@pytest.mark.slow
def test_processes_and_shards_give_the_losses_of_one(home, tmp_path):
    kinds = {
        "one": ([], 1),
        "ddp": ([], 2),
        "fsdp": (["--data-parallel", "fsdp", "--activation-checkpointing", "--ema"], 2),
    }
    lives = [
        {
            "module": "autoregressive.train.train_c2i",
            "args": list(map(str, words(home, tmp_path / name, *EXACT, "--no-wandb", *more))),
            "world": world,
        }
        for name, (more, world) in kinds.items()
    ]
    stopped = {**lives[2], "args": [*lives[2]["args"][:3], str(tmp_path / "stopped"), *lives[2]["args"][4:]]}
    again = {**stopped, "args": [*stopped["args"], "--resume"]}
    stopped = {**stopped, "args": [*stopped["args"], "--max-steps", "5"]}
    live(*lives, stopped, again)
    one = read_checkpoint(newest(tmp_path / "one"))
    for name in kinds:
        assert metrics(tmp_path / name, "loss") == pytest.approx(metrics(tmp_path / "one", "loss"), rel=1e-3, abs=1e-4)
        for key, tensor in read_checkpoint(newest(tmp_path / name)).model.items():
            torch.testing.assert_close(tensor, one.model[key], rtol=1e-3, atol=2e-4, msg=f"{name} {key}")
    whole, parts = (read_checkpoint(newest(tmp_path / name)) for name in ("fsdp", "stopped"))
    assert same(whole.model, parts.model) and same(whole.ema, parts.ema)
