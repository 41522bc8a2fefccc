"""The parts of benchmarks/gpu.py that draw tokens: GPT-B, XL and 3B, what decides a mend, batches, PAR, int8."""

from functools import partial
from itertools import product

import torch

from autoregressive.models.generate import generate, release_cache
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.quantization import quantize, require_torchao
from benchmarks.gpu_part import SAMPLING, Part, memory_held
from utils.rng import image_noise


def sampling(part: Part, name: str) -> None:
    """Measures a step of 8 guided images: the plain loop, ours as it is, ours compiled and recorded."""
    from benchmarks.plain_loop import plain_generate

    model = part.gpt(name, 576)
    tokens, labels, batch = model.layout.tokens, torch.arange(8, device=part.device), 8
    read = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embedding" not in n)
    cache = 2 * 16 * model.args.n_layer * model.args.dim * 2 * (tokens + 1) / 2
    part.put("bytes of a step, mean: weights + caches, GB", f"{read / 1e9:.3f} + {cache / 1e9:.3f}")
    some = min(32, tokens)
    loop = lambda: plain_generate(model, labels, steps=some, **SAMPLING)  # noqa: E731
    loop()
    part.put("plain loop, ms a step", f"{part.seconds(loop) / some * 1e3:.3f}")
    some = min(64, tokens - 1)
    first = part.draw(model, batch, compile=False, max_new_tokens=some)
    again = part.draw(model, batch, compile=False, max_new_tokens=some)
    part.put(f"eager, first {some} tokens of a process, ms a step", f"{first / some * 1e3:.2f}")
    part.put("eager, the same again, ms a step", f"{again / some * 1e3:.3f}")
    part.put("compiled and recorded, first call, s", f"{part.draw(model, batch):.1f}")
    part.draw(model, batch)
    step = min(part.draw(model, batch) for _ in range(2)) / tokens
    part.put("compiled and recorded, ms a step", f"{step * 1e3:.3f}")
    part.put("bytes read by it, TB/s", f"{(read + cache) / step / 1e12:.2f}")
    part.put("images a second", f"{batch / step / tokens:.2f}")
    if part.cuda:
        part.put("memory at most, GiB allocated, reserved", memory_held())


def sampling_b(part: Part) -> None:
    """Measures GPT-B."""
    sampling(part, "GPT-B")
    if part.cuda:
        part.attempt("kernels of a recorded step", lambda: kernels_of_a_step(part))


def kernels_of_a_step(part: Part) -> str:
    """Counts the kernels of GPT-B's recorded steps by the profiler, and names those that take most time."""
    from torch.profiler import ProfilerActivity, profile

    model, some = part.gpt("GPT-B", 576), 33
    for _ in range(3):
        part.draw(model, 8, max_new_tokens=some)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        part.draw(model, 8, max_new_tokens=some)
    events = found.key_averages()
    print(events.table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=70))
    most = sorted(events, key=lambda event: -event.self_device_time_total)[:4]
    return f"{sum(e.count for e in events) / (some - 1):.0f}; " + ", ".join(
        f"{e.key[:40]} {e.self_device_time_total / (some - 1):.0f} us" for e in most
    )


sampling_xl, sampling_3b = (partial(sampling, name=name) for name in ("GPT-XL", "GPT-3B"))


def mends(part: Part) -> None:
    """Checks on cut models what reading found: backends of bf16, caches larger than the batch, heads of 100, the draw."""
    from autoregressive.models.compiled import compiled_race
    from autoregressive.models.sampling import SamplingConfig, choose, draw_race, guide

    few = {"n_layer": 2}
    model = part.gpt("GPT-XL", 576, **few)
    part.attempt("2 layers of XL, 32 images, unguided, ms a step", lambda: step_of(part, model, 32, cfg_scale=1.0))
    part.attempt("the same guided", lambda: step_of(part, model, 32))
    part.attempt("unguided again, in the guided call's cache", lambda: step_of(part, model, 32, cfg_scale=1.0))
    part.attempt("guided to step 100 of 576", lambda: step_of(part, model, 32, cfg_interval=100))
    release_cache(model)
    for heads, width in ((32, 100), (25, 128)):
        cut = part.gpt("GPT-3B", 576, n_head=heads, dim=3200, **few)
        part.attempt(f"2 layers of 3B, heads of {width}, ms a step", lambda cut=cut: step_of(part, cut, 8))
        del cut
    batch, vocab = 8, 16384
    logits = torch.randn(2 * batch, 1, vocab, device=part.device)
    compiled = compiled_race() if part.cuda else draw_race
    ways = {"race": ("race1", compiled), "race, not compiled": ("race1", draw_race), "cdf": ("cdf", draw_race)}
    for settings, (way, (kind, race)) in product(({"top_k": 2000}, {"top_k": 2000, "top_p": 0.9}, {}), ways.items()):
        config = SamplingConfig(cfg_scale=4.0, draw=kind, **settings)
        noise, numbers = image_noise(1, range(batch), 1, kind), torch.tensor(config.numbers)
        given = (config, noise.to(part.device), numbers.to(part.device), race)
        draw = lambda g=given: choose(guide(logits[:batch], logits[batch:], g[2][0]), *g)  # noqa: E731
        name = f"the draw, {way}, {settings or 'no filter'}, us"
        part.attempt(name, lambda draw=draw: f"{part.captured(draw, 1):.0f}")
    part.attempt("recordings after other batches, settings and moved weights", lambda: follow(part))


def step_of(part: Part, model: Transformer, batch: int, **settings: object) -> str:
    """Measures a recorded step, ms: the third call, after compilation and recording."""
    for _ in range(2):
        part.draw(model, batch, **settings)
    return f"{part.draw(model, batch, **settings) / model.layout.tokens * 1e3:.3f}"


def follow(part: Part) -> str:
    """Compares recorded draws with plain ones over batches and settings, with the model moved away and back."""
    torch.manual_seed(0)
    model = GPT_models["GPT-XS"](block_size=64, vocab_size=64).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    model, wrong = model.to(part.device), 0
    settings = ({}, {"temperature": 0.7}, {"top_k": 9, "top_p": 0.8}, {"cfg_scale": 1.0}, {"cfg_interval": 5})
    for _ in range(1 if part.small else 3):
        for batch in (4, 8, 4):
            noise = image_noise(2, range(batch), 64)
            labels = torch.arange(batch, device=part.device)
            for asked in settings:
                asked = {"cfg_scale": 4.0, "top_k": 16, **asked}
                drawn = [generate(model, labels, noise=noise, compile=way, **asked) for way in (part.cuda, False)]
                wrong += bool((drawn[0][:, :8] != drawn[1][:, :8]).float().mean() > 0.1)
        model.to("cpu"), model.to(part.device)
    return f"{wrong} disagree"


def windows(part: Part) -> None:
    """Measures GPT-B's recorded passes by window, one image: what a pass costs by rows (random weights accept few drafts)."""
    model = part.gpt("GPT-B", 256)
    for window in (0, 4) if part.small else (0, 8, 16, 32, 64, 128):
        part.attempt(f"window {window}, one guided image", lambda size=window: passes_of(part, model, size))


def passes_of(part: Part, model: Transformer, window: int) -> str:
    """Measures a call in windows, the third, and counts its passes."""
    passes: list[int] = []
    for _ in range(3):
        passes.clear()
        seconds = part.draw(model, 1, window=window, on_step=lambda done, _: passes.append(done))
    return f"{len(passes)} passes, {seconds / len(passes) * 1e3:.3f} ms each"


def batch(part: Part) -> None:
    """Measures images a second at 16x16 tokens for growing batches."""
    model = part.gpt("GPT-B", 256)
    for images in (2,) if part.small else (32, 64, 128, 256):
        part.attempt(f"{images} guided images at once, images/s", lambda n=images: rate_of(part, model, n))


def rate_of(part: Part, model: Transformer, images: int) -> str:
    """Measures images a second of recorded steps."""
    for _ in range(2):
        part.draw(model, images)
    return f"{images / part.draw(model, images):.1f}"


def int8_par(part: Part) -> None:
    """Measures PAR's four tokens a step, and int8 weights where torchao is installed."""
    model = part.gpt("GPT-B", 576, ar_token_num=4)
    part.attempt("PAR 4x, GPT-B, 24x24, 8 images: images/s", lambda: rate_of(part, model, 8))
    release_cache(model)
    try:
        require_torchao()
    except ValueError:
        part.put("int8", "torchao is not installed: not measured")
        return
    small = part.gpt("GPT-XL", 576, n_layer=4)
    part.attempt("XL of 4 layers, bf16, ms a step", lambda: step_of(part, small, 8))
    release_cache(small)
    quantize(small)
    part.attempt("the same in int8", lambda: step_of(part, small, 8))
