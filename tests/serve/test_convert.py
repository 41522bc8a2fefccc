"""A checkpoint as vLLM takes it: config and weights from the file itself, nothing written."""

from argparse import Namespace

import pytest
import torch

from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import load_gpt
from autoregressive.serve.convert import engine_config, engine_weights, hidden_value, open_gpt
from autoregressive.serve.vllm_engine import ServedModel, engine_settings
from tests.helpers import randomize
from tests.serve.small import image


@pytest.fixture(scope="module")
def t2i_file(tmp_path_factory):
    shape = {"vocab_size": 64, "block_size": 64, "cls_token_num": 120, "caption_dim": 32, "model_type": "t2i"}
    path = tmp_path_factory.mktemp("text") / "t2i.pt"
    args = Namespace(gpt_model="GPT-XS", gpt_type="t2i", image_size=32, downsample_size=4)
    gpt = randomize(GPT_models["GPT-XS"](**shape), seed=4).state_dict()
    torch.save({"model": gpt, "optimizer": {}, "steps": 7, "args": args}, path)
    return path


def test_config_and_weights_of_a_class_conditional_file_name_its_classes(small_files):
    gpt = open_gpt(small_files.gpt)
    config, weights = engine_config(gpt), engine_weights(gpt)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (8, 8, 32)
    assert (config["vocab_size"], config["max_position_embeddings"], config["hidden_size"]) == (64 + 11, 65, 256)
    classes = gpt.cls_embedding.embedding_table.weight
    assert torch.equal(weights["embed.weight"], torch.cat([gpt.tok_embeddings.weight, classes]))
    assert torch.equal(weights["layers.2.attention.wqkv.weight"], gpt.layers[2].attention.wqkv.weight)


def test_weights_of_a_model_of_random_orders_are_those_that_raster_order_reads():
    shape = {"vocab_size": 64, "block_size": 16, "num_classes": 10, "target_positions": True, "rope_grid": 8}
    gpt = randomize(GPT_models["GPT-XS"](**shape))
    assert engine_config(gpt)["rope_grid"] == 8 and "target_embeddings.weight" not in engine_weights(gpt)


def test_config_of_a_text_conditional_file_has_room_beside_the_heads(t2i_file):
    gpt = open_gpt(t2i_file)
    config = engine_config(gpt)
    assert (config["vocab_size"], config["max_position_embeddings"], config["prefix"]) == (64 + 1, 120 + 64, 120)
    assert (config["own_head_dim"], config["head_dim"]) == (32, 64)
    assert config["rope_parameters"]["mrope_section"] == [32, 0, 0]
    assert not any(name.startswith("cls_embedding") for name in engine_weights(gpt))


def test_served_model_embeds_a_class_and_its_negative_side_by_side(small_files):
    model, classes = ServedModel(small_files.gpt, dtype=torch.float32), open_gpt(small_files.gpt).cls_embedding
    assert (model.info.name, model.info.image_size, model.info.num_classes) == ("gpt", 32, 10)
    for negative, row in ((None, 10), (10, 10), (3, 3)):
        rows = model.prompt(image(label=7, negative=negative, cfg_scale=2))["prompt_embeds"]
        assert torch.equal(rows[0], classes.embedding_table.weight[[7, row]].flatten())


@pytest.mark.parametrize("lengths", [(5, None), (5, 2), (5, 9), (150, 130)])
def test_served_model_pads_the_shorter_of_a_prompt_and_its_negative(t2i_file, lengths):
    model, gpt = ServedModel(t2i_file, dtype=torch.float32), load_gpt(t2i_file)
    one, other = (None if n is None else torch.randn(n, 32) for n in lengths)
    rows = model.prompt(image(features=one, negative=other, cfg_scale=2))["prompt_embeds"]
    expected = gpt.cls_embedding.cap_proj(one[:120])
    null = gpt.cls_embedding.cap_proj(gpt.cls_embedding.uncond_embedding)[-len(expected) :]
    negative = null if other is None else gpt.cls_embedding.cap_proj(other[:120])
    assert len(rows) == max(len(expected), len(negative))
    for stream, found in zip((expected, negative), rows.chunk(2, dim=1)):
        padding = len(rows) - len(stream)
        assert torch.equal(found[padding:], stream) and (found[:padding] == hidden_value(torch.float32)).all()


def test_served_model_leaves_the_folders_of_earlier_editions_alone(small_files, tmp_path, monkeypatch):
    old = tmp_path / "autoregressive-image-generation" / "vllm" / "gpt-float32-0123456789abcdef"
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = ServedModel(small_files.gpt, dtype=torch.float32)
    assert engine_settings(model)["hf_overrides"]["checkpoint"]["path"] == str(small_files.gpt)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [old / "config.json"]


def test_open_gpt_of_what_vllm_cannot_draw_raises(small_files, tmp_path):
    with pytest.raises(ValueError, match=r"the layout .* vLLM decodes a llama one token a step.*--engine native"):
        open_gpt(small_files.par)
    with pytest.raises(ValueError, match=r"the layout 'neighbours'.*--engine native"):
        open_gpt(small_files.nar, image_size=32, downsample_size=4)
    with pytest.raises(ValueError, match="--gpt-model"):
        ServedModel(small_files.gpt, gpt_model="GPT-L")
    with pytest.raises(FileNotFoundError):
        ServedModel(tmp_path / "nothing.pt")
