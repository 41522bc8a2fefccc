"""Recipe of training by rewards (GRPO): a GPT's file, rewards and what to ask for; what train_grpo.py does."""

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from autoregressive.class_names import class_names
from autoregressive.models.build import build_model
from autoregressive.models.sampling import SamplingConfig
from autoregressive.models.trunk import ModelArgs, Trunk
from autoregressive.pipeline import tokenizer_of
from autoregressive.released import flags_of, gpt_identity
from autoregressive.train.draws import Asked, Classes, GroupStep, HeldOutRewards, Prompts, Studio
from autoregressive.train.flops import training_flops_per_image
from autoregressive.train.lora import Lora
from autoregressive.train.policy import PolicyLoss, PolicySettings, guidance_scales
from autoregressive.train.rewards import FEATURES, Reward
from tokenizer.base import Tokenizer
from tokenizer.load import load_tokenizer
from utils.checkpoint import Checkpoint, read_checkpoint, weights_fingerprint
from utils.cli import settle
from utils.distributed import Distributed, start
from utils.origin import origin, require_encoder, require_same
from utils.runs import find_checkpoint, runs_in
from utils.training.job import Job, Phase
from utils.training.optim import adamw
from utils.training.order import fit_batch
from utils.training.parallel import Parallel, materialize
from utils.training.state import fill
from utils.training.trainer import Trainer

STEPS = 400
# As published by kind of model: the scale of guidance, the weight of the reference.
SCALE = {"c2i": 2.0, "t2i": 4.0}
BETA = {"c2i": 0.1, "t2i": 1.0}
# Arithmetic of a step: the policy's forward and backward pass, the reference's forward pass.
WITH_REFERENCE = 4 / 3


def train_by_rewards(args: argparse.Namespace) -> None:
    """Train the GPT of --gpt-ckpt by rewards of the images that it draws."""
    rewards = [Reward.of(words) for words in args.reward]
    if len({reward.name for reward in rewards}) < len(rewards):
        raise ValueError("--reward is given twice with one name: give it once, with weight=… to count it more")
    FEATURES[args.recall_features]  # refuses one that is not registered
    lora = lora_of(args)
    dist = start(args.device, args.data_parallel != "ddp", args.timeout_minutes, args.deterministic)
    plan = Parallel.from_args(args, dist, compile=not args.no_compile)
    with dist.main_first():
        path = find_checkpoint(args.gpt_ckpt)
        reference_path = find_checkpoint(args.reference or path)
        vq_path = find_checkpoint(args.vq_ckpt) if args.vq_ckpt else tokenizer_of(path)
    saved = weights_of(path, args.use_ema)
    tokenizer = load_tokenizer(vq_path, device=dist.device, fingerprint=saved.config.get("tokenizer"))
    model = build_policy(saved, tokenizer, args)
    sampling = sampling_of(args)
    asked, held_out_asked = what_to_ask(args, model, saved)
    notes = set_length(args, asked, dist)
    settings = PolicySettings(
        beta=args.beta,
        temperature=sampling.temperature,
        scales=guidance_scales(model.layout, sampling) if args.guidance_in_policy else None,
    )
    reference = None
    if args.beta and not lora:
        reference = saved if reference_path == path else reference_of(reference_path, saved, model, args)
    config = {**saved.config, **origin(tokenizer=tokenizer.fingerprint()), **model.args.identity, "objective": "grpo"}
    config.pop("reference", None)
    if reference:
        config["reference"] = weights_fingerprint(reference.model)
    if lora:
        config |= lora.config(lora.add(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)  # without the adapter the model is the reference
    wrapped = lay_out(model, reference, settings, plan, adapter=bool(lora))
    if lora:
        lora.take(model, saved, args.global_seed)
    studio = Studio(wrapped, model, tokenizer, plan, sampling)
    held_out = HeldOutRewards(studio, held_out_asked, rewards, args)
    flops = training_flops_per_image(model) * (WITH_REFERENCE if args.beta else 1) * (2 if settings.scales else 1)
    job = Job(
        args.gpt_model,
        models={"model": model},
        phases=[Phase("optimizer", wrapped, adamw(model, args, model.decays), GroupStep(studio, asked, rewards, args))],
        dataset=asked,
        initial=None if lora else replace(saved, ema=None, optimizer=None, steps=None, extra={}, config=config),
        validate=held_out,
        sample=held_out.pictures,
        tokens=model.args.block_size,
        flops=lambda step, epoch: flops,
        config=config,
    )
    trainer = Trainer(args, plan, job)
    trainer.meter.samples *= args.group_size  # a sample of the data is a group of images
    for line in (*notes, describe(args, rewards, sampling, reference_path)):
        trainer.log.info(line)
    held_out.begin(trainer)
    trainer.fit()
    dist.close()


def weights_of(path: Any, use_ema: bool) -> Checkpoint:
    """Read a file whose `model` are the weights to use. Raises ValueError where it has no averages and they are asked for."""
    saved = read_checkpoint(path, prefer_ema=use_ema)
    if use_ema:
        saved.require_averages()
    return saved


def reference_of(path: Path, saved: Checkpoint, model: Trunk, args: argparse.Namespace) -> Checkpoint:
    """Return the weights of --reference. Raises ValueError for a file of another tokenizer or another layout."""
    reference = weights_of(path, use_ema=False)
    other = gpt_identity(reference, image_size=args.image_size, downsample_size=args.downsample_size)
    records = {**saved.config, **model.args.identity}, {**reference.config, **other}
    require_same(*records, ("tokenizer", "layout"), (str(saved.path), str(path)), "give one of them")
    return reference


def build_policy(saved: Checkpoint, tokenizer: Tokenizer, args: argparse.Namespace) -> Trunk:
    """Build a file's model on the meta device, without dropout; set the flags that its checkpoints record.

    Raises ValueError for a tokenizer of other codes, and for a model of further conditions than a class or a caption.
    """
    identity = gpt_identity(saved, image_size=args.image_size, downsample_size=tokenizer.downsample)
    known = flags_of(identity)
    if len(identity["conditions"]) > 1:
        raise ValueError(
            f"{saved.path} is conditioned on {', '.join(identity['conditions'])}: rewards train models of one"
        )
    require_same(
        saved.config,
        {"tokenizer": tokenizer.fingerprint()},
        ("tokenizer",),
        (f"--gpt-ckpt {saved.path}", "--vq-ckpt"),
        "give the tokenizer of its codes",
    )
    if known["vocab_size"] > tokenizer.codebook_size:
        raise ValueError(f"{saved.path} has {known['vocab_size']} codes and --vq-ckpt {tokenizer.codebook_size}")
    dropouts = [
        field.name for field in fields(ModelArgs) if field.name.endswith(("_dropout_p", "_path_rate", "_dropout_prob"))
    ]
    with torch.device("meta"):
        model = build_model(replace(ModelArgs.from_identity(identity), **dict.fromkeys(dropouts, 0.0)))
    args.gpt_model, args.gpt_type = known["gpt_model"] or "GPT", known["gpt_type"]
    for name in ("num_classes", "vocab_size", "cls_token_num"):
        setattr(args, name, known[name])
    args.downsample_size = tokenizer.downsample
    args.image_size = model.layout.grid_size * tokenizer.downsample
    args.beta = BETA[args.gpt_type] if args.beta is None else args.beta
    args.cfg_scale = SCALE[args.gpt_type] if args.cfg_scale is None else args.cfg_scale
    if args.resume and (runs := runs_in(args.results_dir, args.gpt_model)):
        settle(args, global_batch_size=runs[0].flags().get("global_batch_size"))
    return model


def sampling_of(args: argparse.Namespace) -> SamplingConfig:
    """Return how images are drawn. Raises ValueError for settings whose draws are not the policy's own distribution."""
    fields = SamplingConfig.fields()
    sampling = SamplingConfig(**{name: getattr(args, name) for name in fields if hasattr(args, name)})
    if sampling.greedy or sampling.top_k > 0 or sampling.top_p < 1:
        raise ValueError(
            "--top-k, --top-p and --temperature 0 leave codes out, of which the loss would know nothing: train without them, "
            "and sample with them"
        )
    if args.guidance_in_policy and not sampling.guided:
        raise ValueError(f"--guidance-in-policy needs --cfg-scale above 1, got {sampling.cfg_scale:g}")
    return sampling


def what_to_ask(args: argparse.Namespace, model: Trunk, saved: Checkpoint) -> tuple[Asked, Asked]:
    """Return what training and held-out images are asked for.

    Raises ValueError where there are no prompts for a text model, or some for a class model.
    """
    texts = ("prompt_csv", "t5_feat_path", "val_prompt_csv", "val_t5_feat_path")
    given = [f"--{name.replace('_', '-')}" for name in texts if getattr(args, name)]
    if args.gpt_type == "c2i":
        if given:
            raise ValueError(f"{given[0]} is for text models; {saved.path} draws by class")
        names = class_names(args.num_classes, recorded=saved.config.get("classes"))
        return Classes(names, int(args.global_batch_size)), Classes(names)
    if not (args.prompt_csv and args.t5_feat_path):
        raise ValueError(
            f"{saved.path} draws from text: give --prompt-csv FILE and --t5-feat-path FOLDER with their features"
        )
    if bool(args.val_prompt_csv) != bool(args.val_t5_feat_path):
        raise ValueError("--val-prompt-csv and --val-t5-feat-path go together: give both, or none")
    dim = flags_of(model.args.identity)["caption_dim"]
    train = Prompts(args.prompt_csv, args.t5_feat_path, dim)
    require_encoder(saved.config, train.features.store.encoder, f"--t5-feat-path {args.t5_feat_path}")
    if not args.val_prompt_csv:
        return train, train
    held_out = Prompts(args.val_prompt_csv, args.val_t5_feat_path, dim)
    require_encoder(saved.config, held_out.features.store.encoder, f"--val-t5-feat-path {args.val_t5_feat_path}")
    return train, held_out


def set_length(args: argparse.Namespace, asked: Asked, dist: Distributed) -> list[str]:
    """Set --global-batch-size, and --epochs to what --max-steps needs, where they are not given. Returns lines for the log."""
    if args.group_size < 2:
        raise ValueError(
            f"--group-size must be 2 or more, got {args.group_size}: images are compared within their group"
        )
    notes = fit_batch(args, len(asked), dist.world_size)
    if args.epochs is None:
        args.max_steps = args.max_steps or STEPS
        args.epochs = -(-args.max_steps // max(len(asked) // args.global_batch_size, 1))
    return notes


def lora_of(args: argparse.Namespace) -> Lora | None:
    """Return the adapter that --lora-rank asks for; None without it. Raises ValueError for flags that do not go with it."""
    if args.lora_rank is None:
        if args.lora_alpha:
            raise ValueError("--lora-alpha needs --lora-rank")
        return None
    if args.reference:
        raise ValueError("--lora-rank has the model without its additions as reference: leave out --reference")
    return Lora(args.gpt_ckpt, args.lora_rank, args.lora_alpha or 2.0 * args.lora_rank, 0.0, args.use_ema)


def lay_out(
    model: Trunk, reference: Checkpoint | None, settings: PolicySettings, plan: Parallel, adapter: bool
) -> PolicyLoss:
    """Return the loss of a model from the meta device, laid over the processes, the reference with its weights.

    adapter: the model trains one, and without it is the reference.
    """
    frozen = None
    if reference is not None:
        with torch.device("meta"):
            frozen = build_model(model.args)
    loss = PolicyLoss(model, model if adapter and settings.beta else frozen, settings)

    def begin() -> None:
        for one in filter(None, (model, frozen)):
            materialize(one, plan.dist.device, 0)
        if frozen is not None:
            own = frozen.state_dict()
            fill(own, own, reference.model, reference.path)

    if not plan.sharded:
        begin()
    wrapped = plan.apply(loss, blocks=[*model.layers, *(frozen.layers if frozen is not None else ())])
    if plan.sharded:  # only now, so that no process ever holds the whole model
        begin()
    return wrapped


def describe(args: argparse.Namespace, rewards: list[Reward], sampling: SamplingConfig, reference: Path) -> str:
    """Return a line for the log."""
    words = " + ".join(f"{reward.weight:g} x {reward.name}" for reward in rewards)
    held = f"beta {args.beta:g} against {reference}" if args.beta else "no reference"
    inside = "in the policy's probabilities too" if args.guidance_in_policy else "not in the policy's probabilities"
    guided = f"guidance {sampling.cfg_scale:g}, {inside}" if sampling.guided else "no guidance"
    return (
        f"rewards: {words}; groups of {args.group_size} images, {args.global_batch_size} a step; {held}; {guided}; the best "
        "checkpoint by val_reward is kept in best/"
    )
