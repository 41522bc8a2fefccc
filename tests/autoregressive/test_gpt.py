"""The transformer apart from recorded figures: sizes, names, initial weights, dropouts, conditioning, the forms it is kept in."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn

from autoregressive.models.conditions.caption import CaptionEmbedder
from autoregressive.models.conditions.label import LabelEmbedder
from autoregressive.models.generate import generate
from autoregressive.models.gpt import DropPath, GPT_models, ModelArgs, Transformer
from autoregressive.models.layouts.patches import PatchLayout
from autoregressive.models.rope import apply_rope, rope_table_2d
from tests.helpers import randomize
from utils.rng import image_noise

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"dim": 32, "n_layer": 3, "n_head": 4, "multiple_of": 32, "vocab_size": 24, "num_classes": 5, "block_size": 16}
TEXT = {**TINY, "model_type": "t2i", "cls_token_num": 6, "caption_dim": 12}


def tiny(**more) -> Transformer:
    return randomize(Transformer(ModelArgs(**{**TINY, **more})), seed=4)


def tokens(count: int, length: int = 16) -> torch.Tensor:
    return torch.randint(24, (count, length), generator=torch.Generator().manual_seed(count))


LABELS = torch.tensor([3, 0, 4])


# Sizes, names, initial weights

PUBLISHED = {
    "GPT-B": "111M", "GPT-M": "266M", "GPT-L": "343M", "GPT-XL": "775M", "GPT-XXL": "1.4B",
    "GPT-XXXL": "3.9B", "GPT-1B": "1.2B", "GPT-3B": "3.1B", "GPT-7B": "6.6B",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = GPT_models[name](vocab_size=16384, num_classes=1000, block_size=256)
    dim, layers, args = model.args.dim, model.args.n_layer, model.args
    hidden = -(-(8 * dim // 3) // 256) * 256
    per_layer = 3 * dim * dim + dim * dim + 3 * dim * hidden + 2 * dim
    count = (16384 + 1001 + 16384) * dim + layers * per_layer + dim
    assert model.num_parameters == count
    assert (f"{count / 1e9:.1f}B" if count > 1e9 else f"{count / 1e6:.0f}M") == PUBLISHED[name]
    assert args.ffn_dim == hidden and dim % args.n_head == 0


SECOND_EXIT = {"GPT-B": 130.6, "GPT-M": 295.5, "GPT-L": 372.5, "GPT-XL": 816.0, "GPT-XXL": 1464}  # millions, of NAR


@pytest.mark.parametrize("name", SECOND_EXIT)
def test_parameter_counts_with_a_second_exit(name):
    with torch.device("meta"):
        model = GPT_models[name](layout={"name": "neighbours"})
        text = GPT_models["GPT-XL"](layout={"name": "neighbours"}, model_type="t2i", cls_token_num=120)
    assert len(model.layers) == model.args.n_layer + 1
    assert model.num_parameters / 1e6 == pytest.approx(SECOND_EXIT[name], abs=0.5 if name == "GPT-XXL" else 0.05)
    assert text.num_parameters / 1e6 == pytest.approx(819.0, abs=0.05)


@pytest.mark.parametrize(
    "dim, multiplier, multiple, hidden",
    [
        (768, None, 256, 2048),
        (1280, None, 256, 3584),
        (100, None, 1, 266),
        (768, 1.3, 256, 2816),
        (768, 0.5, 256, 1024),
    ],
)
def test_hidden_width(dim, multiplier, multiple, hidden):
    assert ModelArgs(dim=dim, n_head=4, ffn_dim_multiplier=multiplier, multiple_of=multiple).ffn_dim == hidden


@pytest.mark.parametrize(
    "more, extra",
    [
        ({}, {"cls_embedding.embedding_table.weight": (6, 32)}),
        (
            {"ar_token_num": 4},
            {"cls_embedding.embedding_table.weight": (6, 32), "spe_tok_embeddings.special_embeddings.weight": (3, 32)},
        ),
        (
            {"layout": {"name": "neighbours"}},
            {
                "cls_embedding.embedding_table.weight": (6, 32),
                "medusa_norm.weight": (32,),
                "medusa_output.weight": (24, 32),
            },
        ),
        (
            {k: v for k, v in TEXT.items() if k not in TINY},
            {
                "cls_embedding.uncond_embedding": (6, 12),
                "cls_embedding.cap_proj.fc1.weight": (32, 12),
                "cls_embedding.cap_proj.fc2.weight": (32, 32),
            },
        ),
    ],
    ids=["class", "PAR", "NAR", "text"],
)
def test_state_dict_names_and_shapes(more, extra):
    expected = {"tok_embeddings.weight": (24, 32), "norm.weight": (32,), "output.weight": (24, 32), **extra}
    for i in range(3 + ("layout" in more)):
        expected |= {
            f"layers.{i}.attention.wqkv.weight": (96, 32),
            f"layers.{i}.attention.wo.weight": (32, 32),
            f"layers.{i}.feed_forward.w1.weight": (96, 32),
            f"layers.{i}.feed_forward.w3.weight": (96, 32),
            f"layers.{i}.feed_forward.w2.weight": (32, 96),
            f"layers.{i}.attention_norm.weight": (32,),
            f"layers.{i}.ffn_norm.weight": (32,),
        }
    model = tiny(**more)
    model(tokens(1, 12), LABELS[:1] if "model_type" not in more else torch.randn(1, 6, 12))  # a table, no cache is kept
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


FORMS = {
    "class": {},
    "PAR": {"ar_token_num": 4},
    "NAR": {"layout": {"name": "neighbours"}},
    "text": {"model_type": "t2i", "cls_token_num": 6, "caption_dim": 64},
}


@pytest.mark.parametrize("more", FORMS.values(), ids=FORMS)
def test_a_model_off_the_meta_device_is_initialised_whole(more):
    """Every parameter and buffer, by draws in a fixed order through the function given."""
    args = ModelArgs(**{**TINY, "dim": 64, "vocab_size": 300, "initializer_range": 0.07, **more})
    with torch.device("meta"):
        model = Transformer(args)
    model = model.to_empty(device="cpu")
    drawn = []

    def normal(tensor: torch.Tensor, std: float) -> None:
        drawn.append((tensor.shape, std))
        tensor.normal_(0, std, generator=generator)

    states = []
    for _ in range(2):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.fill_(float("nan"))
        drawn.clear()
        generator = torch.Generator().manual_seed(0)
        random = torch.get_rng_state()
        model.reset_parameters(normal)
        assert torch.equal(torch.get_rng_state(), random)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    built = Transformer(args).state_dict()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) and value.dtype == built[name].dtype
        assert float(value.std()) == pytest.approx(float(built[name].std()), rel=0.2), name
        if name == "output.weight":
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            std = 1 / 8 if name == "cls_embedding.uncond_embedding" else 0.07
            assert float(value.std()) == pytest.approx(std, rel=0.2), name
            assert (value.shape, std) in drawn
    one_dimensional = sum("norm" in name for name in states[0])
    assert len(drawn) == len(states[0]) - one_dimensional - 1
    assert all(p.requires_grad for p in model.parameters())


# Dropouts


NO_DROPOUT = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0, "class_dropout_prob": 0.0}


@pytest.mark.parametrize("name", [*NO_DROPOUT, "attn_dropout_p", "drop_path_rate"])
def test_each_dropout_acts_in_training_only(name):
    model = tiny(**{**NO_DROPOUT, name: 0.5})
    assert getattr(ModelArgs(), name) == (0.1 if name in NO_DROPOUT else 0.0)
    quiet = tiny(**NO_DROPOUT).train()(tokens(3, 12), LABELS)
    assert torch.equal(model(tokens(3, 12), LABELS), quiet)
    torch.manual_seed(0)
    model.train()
    first, second = model(tokens(3, 12), LABELS), model(tokens(3, 12), LABELS)
    assert not torch.equal(first, quiet) and not torch.equal(first, second)


def test_stochastic_depth_rises_linearly():
    model = Transformer(ModelArgs(**{**TINY, "n_layer": 5}, drop_path_rate=0.2))
    assert [layer.drop_path.p for layer in model.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    (layer,) = Transformer(ModelArgs(**{**TINY, "n_layer": 1}, drop_path_rate=0.2)).layers
    assert layer.drop_path.p == 0


def test_stochastic_depth_drops_whole_samples():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 3, 2))
    assert torch.allclose(out, out[:, :1, :1].expand_as(out))
    assert torch.allclose(out.unique(), torch.tensor([0, 4 / 3]))
    assert float((out[:, 0, 0] == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drop.eval()(out), out)


# Attention and RoPE


def test_few_key_heads_equal_repeated_ones():
    few = tiny(n_kv_head=2)
    state = few.state_dict()
    for name in list(state):
        if name.endswith("wqkv.weight"):
            q, k, v = state[name].split([32, 16, 16])
            k, v = (t.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for t in (k, v))
            state[name] = torch.cat([q, k, v])
    many = tiny()
    many.load_state_dict(state)
    assert torch.allclose(few(tokens(3, 12), LABELS), many(tokens(3, 12), LABELS), atol=1e-5)
    noise = image_noise(0, range(3), 16)
    drawn = generate(few, LABELS, cfg_scale=2.0, noise=noise)
    assert torch.equal(drawn, generate(many, LABELS, cfg_scale=2.0, noise=noise))
    assert len(drawn.unique()) > 5


def test_rope_table_by_hand():
    table = rope_table_2d(3, 8, base=100.0)
    assert table.shape == (9, 4, 2) and table.dtype == torch.float32
    for row in range(3):
        for column in range(3):
            angles = torch.tensor([row, row / 10, column, column / 10])  # 100^0, 100^(-2/4)
            expected = torch.stack([angles.cos(), angles.sin()], -1)
            assert torch.allclose(table[row * 3 + column], expected, atol=1e-6)
    for head_dim in (2, 6, 50):
        with pytest.raises(ValueError, match=f"got {head_dim}"):
            rope_table_2d(3, head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_turns_adjacent_pairs(dtype):
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    table = torch.stack([angles.cos(), angles.sin()], -1)
    table[1] = 0
    out = apply_rope(x, table)
    turned = torch.view_as_complex(x.float().unflatten(-1, (3, 2)).contiguous()) * torch.view_as_complex(table)[:, None]
    assert out.dtype == dtype and torch.allclose(out, torch.view_as_real(turned).flatten(-2).to(dtype), atol=1e-6)
    assert not out[:, 1].any()


# Conditioning


def test_dropped_labels_are_the_row_after_the_last_class():
    embedder = LabelEmbedder(8, num_classes=5)
    table = embedder.embedding_table.weight
    labels = torch.tensor([4, 0, 2])
    assert torch.equal(embedder(labels, torch.tensor([False, True, False]))[:, 0], table[[4, 5, 2]])
    assert torch.equal(embedder(labels)[:, 0], table[labels])
    assert torch.equal(embedder(embedder.null(labels))[:, 0], table[[5, 5, 5]])


def test_conditions_are_dropped_in_training_alone():
    model = tiny(num_classes=5, class_dropout_prob=0.1)
    labels, none = torch.zeros(5000, dtype=torch.long), model.cls_embedding.embedding_table.weight[5]
    torch.manual_seed(0)
    rows, _ = model.train().embed_conditions(labels)
    assert float((rows[:, 0] == none).all(-1).float().mean()) == pytest.approx(0.1, abs=0.015)
    assert not (model.eval().embed_conditions(labels)[0][:, 0] == none).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_a_narrow_type(dtype):
    """300 classes: neither the "no class" row nor a comparison may wrap around."""
    model = tiny(num_classes=300)
    narrow, wide = torch.tensor([255, 3]).to(dtype) % 128, torch.tensor([127, 3])
    assert torch.equal(model(tokens(2, 12), narrow), model(tokens(2, 12), wide))
    drop = torch.tensor([True, False])
    assert torch.equal(model(tokens(2, 12), narrow, drop=drop), model(tokens(2, 12), wide, drop=drop))
    noise = image_noise(0, range(2), 16)
    drawn = [generate(model, labels, cfg_scale=3.0, noise=noise) for labels in (narrow, wide)]
    assert torch.equal(*drawn)


def test_dropped_captions_are_the_stored_features():
    torch.manual_seed(0)
    embedder = CaptionEmbedder(8, caption_dim=12, tokens=6)
    features = torch.randn(2, 6, 12)
    none = embedder.cap_proj(embedder.uncond_embedding)
    mixed = embedder(features, torch.tensor([False, True]))
    assert torch.allclose(mixed[1], none) and torch.allclose(mixed[0], embedder.cap_proj(features[0]))
    assert torch.allclose(embedder(features), embedder.cap_proj(features))
    assert torch.equal(embedder.null(features), embedder.uncond_embedding.expand(2, -1, -1))


def caption_rows(*lengths: int, total: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded features and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.zeros(len(lengths), total)
    for row, length in enumerate(lengths):
        mask[row, total - length :] = 1
    return torch.randn(len(lengths), total, 12, generator=generator) * mask[..., None], mask


@pytest.mark.parametrize("more", [{}, {"ar_token_num": 4}], ids=["raster", "PAR"])
def test_padding_is_seen_by_none_but_itself(more):
    model = tiny(**{k: v for k, v in TEXT.items() if k not in TINY}, **more)
    features, mask = caption_rows(6, 1, 3)
    garbage = torch.where(mask[..., None] == 1, features, 1e3)
    expected = model(tokens(3, 12), features, prefix_mask=mask)
    assert torch.equal(model(tokens(3, 12), garbage, prefix_mask=mask), expected)

    seen = model.attention_mask(model.layout.rows, mask, torch.device("cpu"))[:, 0]
    plain = model.layout.mask(model.layout.rows)
    plain = torch.ones(seen.shape[1:], dtype=torch.bool).tril() if plain is None else plain
    for b in range(3):
        for column in range(model.layout.rows):
            padded = column < 6 and mask[b, column] == 0
            watchers = [column] if padded else plain[:, column].nonzero()[:, 0].tolist()
            assert seen[b, :, column].nonzero()[:, 0].tolist() == watchers


# Fewer tokens


@pytest.mark.parametrize("n", [1, 4])
def test_fewer_tokens_give_the_first_logits(n):
    """Whole groups, or some of the first tokens: no logits depend on what comes later."""
    model = tiny(ar_token_num=n)
    every = model(tokens(3, 16 - n), LABELS)
    assert every.shape == (3, 16, 24) and every.dtype == torch.float32
    for length in [*range(n), *range(n, 16 - n, n)]:
        fewer = model(tokens(3, 16 - n)[:, :length], LABELS)
        assert fewer.shape[1] == length + (1 if length < n else n), length
        assert torch.allclose(fewer, every[:, : fewer.shape[1]], atol=1e-5), length


def test_no_logits_depend_on_later_tokens():
    """Nor on the group they predict."""
    for n in (1, 4):
        model = tiny(ar_token_num=n)
        before = model(tokens(1, 16 - n), LABELS[:1])
        for at in range(16 - n):
            changed = tokens(1, 16 - n)
            changed[0, at] = (changed[0, at] + 1) % 24
            differs = (model(changed, LABELS[:1]) - before).abs().amax(-1)[0] > 1e-6
            first = at + 1 if at < n - 1 else (at // n + 1) * n  # the next token, or the next group
            assert not differs[:first].any() and differs[first:].all(), (n, at)


# Patches

PATCHED = [(2, {}), (4, {}), (2, {k: v for k, v in TEXT.items() if k not in TINY})]


@pytest.mark.parametrize("side, more", PATCHED)
def test_patches_are_read_as_their_mean(side, more):
    """A model on the coarser grid, given the mean embeddings, puts out the same."""
    model = tiny(**more)
    cond, masks = LABELS, {}
    if more:
        cond, mask = caption_rows(6, 1, 3)
        masks = {"prefix_mask": mask}
    coarse = Transformer(ModelArgs(**{**TINY, **more, "block_size": 16 // side**2})).eval()
    coarse.load_state_dict(model.state_dict())
    layout = PatchLayout(4, model.layout.prefix, side)
    read = tokens(3)[:, layout.order][:, : -(side**2)]
    embedded = model.tok_embeddings(read).view(3, -1, side**2, 32).mean(2)
    coarse.tok_embeddings.forward = lambda *_: embedded
    logits = model(read, cond, layout=layout, **masks)
    assert logits.shape == (3, 16 // side**2, 24) and logits.dtype == torch.float32
    assert torch.equal(logits, coarse(torch.zeros(3, 16 // side**2 - 1), cond, **masks))
    shuffled = read.view(3, -1, side**2).flip(-1).flatten(1)
    assert torch.allclose(model(shuffled, cond, layout=layout, **masks), logits, atol=1e-5)


# What the arguments imply


def test_special_tokens_and_groups_imply_each_other():
    for given in ({"ar_token_num": 4}, {"spe_token_num": 3}, {"ar_token_num": 4, "spe_token_num": 3}):
        args = ModelArgs(**given)
        assert (args.ar_token_num, args.spe_token_num) == (4, 3)
    args = ModelArgs()
    assert (args.ar_token_num, args.spe_token_num, args.n_kv_head) == (1, 0, 32)
    assert tiny().spe_tok_embeddings is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"model_type": "i2i"}, "'i2i'"),
        ({"dim": 100, "n_head": 3}, "3 heads must divide dim 100"),
        ({"n_head": 4, "n_kv_head": 3}, "divided by 3 kv heads"),
        ({"block_size": 255}, "square grid, got 255"),
        ({"cls_token_num": 120}, "--cls-token-num 120"),
        ({"ar_token_num": 4, "spe_token_num": 2}, "--ar-token-num 4 --spe-token-num 2"),
    ],
)
def test_arguments_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(**wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"ar_token_num": 3}, "square number"),
        ({"ar_token_num": 0}, "square number"),
        ({"ar_token_num": 9}, "3x3 regions"),
    ],
)
def test_groups_that_do_not_fit_the_grid(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)


def test_head_dimension_without_a_2d_rope():
    with pytest.raises(ValueError, match="got 10"):
        tiny(dim=40)


# The forms a model is kept in


def test_bf16_weights_keep_the_rope_table_in_float32():
    model = tiny()
    expected = model(tokens(3, 12), LABELS)
    table = model.rope(torch.device("cpu"))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.rope(torch.device("cpu")).dtype == torch.float32
    assert torch.equal(half.rope(torch.device("cpu")), table)
    logits = half(tokens(3, 12), LABELS)
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_apart(duplicate):
    model = tiny(ar_token_num=4)
    noise = image_noise(0, range(3), 16)
    generate(model, LABELS, noise=noise)  # leaves tables and caches beside the model
    other = duplicate(model)
    expected = model(tokens(3, 12), LABELS)
    assert torch.equal(other(tokens(3, 12), LABELS), expected)
    assert torch.equal(generate(other, LABELS, noise=noise), generate(model, LABELS, noise=noise))
    with torch.no_grad():
        other.output.weight.mul_(-1)
    assert torch.equal(model(tokens(3, 12), LABELS), expected)


@pytest.mark.parametrize("first", ["generate", "inference_mode"])
def test_training_after_sampling(first):
    """What is computed once and kept must serve the backward pass too, when it was first asked for by sampling."""
    model, plain = tiny(ar_token_num=4), tiny(ar_token_num=4)
    if first == "generate":
        generate(model, LABELS)
    else:
        with torch.inference_mode():
            model(tokens(3, 12), LABELS)
            _ = model.layout.order, model.layout.raster
    for one in (model, plain):
        logits = one(tokens(3, 12), LABELS)
        logits[:, one.layout.raster].square().mean().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_weights_on_another_device():
    """The table follows the weights: nothing is left on the device the model was built on."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(**TINY))
        assert model(tokens(1, 12).to("meta"), LABELS[:1].to("meta")).shape == (1, 13, 24)
    model = model.to_empty(device="cpu")
    assert model.rope(torch.device("cpu")).isfinite().all()
    assert isinstance(model.layers, nn.ModuleList) and model.config is model.args


@pytest.mark.parametrize("n, side", [(4, 1), (1, 2)])
@pytest.mark.slow
def test_a_compiled_training_step_is_one_graph(n, side):
    torch._dynamo.reset()
    model = tiny(ar_token_num=n)
    layout = PatchLayout(4, model.layout.prefix, side)
    expected = model(tokens(3, 12), LABELS, layout=layout)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            logits = compiled(tokens(3, 12), LABELS, layout=layout)
    assert torch.equal(logits, expected)
