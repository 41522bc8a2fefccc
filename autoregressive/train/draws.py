"""Images that a model in training draws of itself, and what rewards find in them: GRPO's data, its step, its held-out figures.

    studio = Studio(wrapped, model, tokenizer, plan, sampling)
    with studio.open(): images = studio.draw(asked, items, seed, numbers)
    step = GroupStep(studio, …)                                     # Phase.loss
    held_out = HeldOutRewards(studio, …)                            # Job.validate

Image i of step s is drawn with the noise of (seed, s · images a step + i): the same on any number of processes and after a resume.
"""

import json
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from autoregressive.models.generate import release_cache
from autoregressive.models.sampling import SamplingConfig
from autoregressive.models.trunk import Trunk
from autoregressive.pipeline import ImagePipeline, decode_codes
from autoregressive.request import Request
from autoregressive.train.policy import group_advantages
from autoregressive.train.rewards import Reward, features_of, rewards_of
from dataset.codes import open_codes
from evaluations.metrics import precision_recall
from language.prompts import PromptFeatures, read_prompts
from tokenizer.base import Tokenizer
from utils.files import write_json
from utils.images import make_grid
from utils.origin import require_same
from utils.rng import item_seed
from utils.runs import checkpoints_in
from utils.training.job import Micro
from utils.training.parallel import Parallel
from utils.training.trainer import Trainer

# What item_seed hashes besides, for held-out images.
_HELD_OUT = 6
SHOWN = 16


class Numbered:
    """Data set whose items are their numbers."""

    def __getitem__(self, item: int) -> int:
        return item


class Classes(Numbered):
    """Classes in turn, each as often as any other. names: by label. least: items that there are at least."""

    def __init__(self, names: Sequence[str], least: int = 1):
        self.names, self.size = names, len(names) * -(-least // len(names))

    def __len__(self) -> int:
        return self.size

    def conditions(self, item: int) -> dict[str, Any]:
        """Return the values of a model's conditions, as Request takes them."""
        return {"label": item % len(self.names)}

    def told(self, items: Sequence[int]) -> dict[str, Any]:
        """Return what rewards are told: `text`, and what else they may look at."""
        labels = np.array(items) % len(self.names)
        return {"text": [f"a photo of {self.names[label]}" for label in labels], "label": labels}


class Prompts(Numbered):
    """Prompts of a file with their features. Raises as read_prompts and PromptFeatures do."""

    def __init__(self, file: str | Path, features: str | Path, dim: int):
        self.prompts = read_prompts(file)
        self.features = PromptFeatures(features, file, self.prompts, dim)

    def __len__(self) -> int:
        return len(self.prompts)

    def conditions(self, item: int) -> dict[str, Any]:
        return {"caption": self.features[item]}

    def told(self, items: Sequence[int]) -> dict[str, Any]:
        return {"text": [self.prompts[item] for item in items]}


Asked = Classes | Prompts


@dataclass(frozen=True)
class Drawn:
    """Images drawn.

    codes: int64 (B, N). log_probs: float32 (B, N), as generate fills them. pixels: uint8 (B, H, W, 3).
    cond, prefix_mask, orders: as Trunk.forward takes them.
    """

    codes: Tensor
    log_probs: Tensor
    pixels: np.ndarray
    cond: dict[str, Tensor]
    prefix_mask: Tensor | None
    orders: Tensor | None


@dataclass
class Studio:
    """Drawing with a model in training, by the project's own decode loop.

    wrapped: the model's loss, laid over the processes by `plan`.
    """

    wrapped: nn.Module
    model: Trunk
    tokenizer: Tokenizer
    plan: Parallel
    sampling: SamplingConfig
    _begun: bool = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Gather the weights for drawing. Every process enters and leaves it together."""
        if self.plan.sharded and not self._begun:  # the first forward pass tells FSDP which module is the outermost
            self._begun = True
            device, conditions = self.plan.dist.device, self.model.conditions.items()
            codes = torch.zeros(1, self.model.layout.tokens, dtype=torch.long, device=device)
            cond = {name: condition.read(condition.example())[None].to(device) for name, condition in conditions}
            with torch.no_grad():
                self.wrapped(codes, cond, torch.zeros(1, device=device))
        with torch.no_grad(), self.plan.gathered(self.wrapped):
            yield

    def draw(self, asked: Asked, items: Sequence[int], seed: int, numbers: Sequence[int]) -> Drawn:
        """Draw an image for each item. seed, numbers: of the images' noise."""
        device = self.plan.dist.device
        # Blocks are compiled for training's shapes.
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.compiler.set_stance("force_eager"):
            pipeline = ImagePipeline(self.model, self.tokenizer, batch_size=len(items))
            each = zip(items, numbers, strict=True)
            requests = pipeline.read([Request(asked.conditions(i), {}, self.sampling, seed, n) for i, n in each])
            inputs = pipeline.inputs(requests)
            log_probs = torch.zeros(len(items), self.model.layout.tokens, device=device)
            try:
                codes = pipeline.draw(requests, log_probs=log_probs).clone()
            finally:
                release_cache(self.model)
            orders = None if inputs["orders"] is None else inputs["orders"].to(device)
            return Drawn(codes, log_probs, pipeline.decode(codes), inputs["cond"], inputs["emb_masks"], orders)


class GroupStep:
    """Loss of a micro-batch of items, each drawn `group_size` times: Phase.loss. Every process calls it together."""

    def __init__(self, studio: Studio, asked: Asked, rewards: Sequence[Reward], args: Namespace):
        self.studio, self.asked, self.rewards = studio, asked, rewards
        self.group_size, self.scale, self.seed = args.group_size, args.scale_rewards, args.global_seed

    def __call__(self, batch: Tensor, place: Micro) -> tuple[Tensor, dict[str, Tensor]]:
        size, dist = self.group_size, self.studio.plan.dist
        items = batch.repeat_interleave(size).tolist()
        first = (place.step * place.global_batch + place.positions.start) * size
        with self.studio.open(), dist.together():
            drawn = self.studio.draw(self.asked, items, self.seed, range(first, first + len(items)))
        with dist.together():
            found = torch.from_numpy(rewards_of(self.rewards, drawn.pixels, self.asked.told(items)))
        weights = torch.tensor([reward.weight for reward in self.rewards], dtype=torch.float64)
        total = (found * weights).nansum(1)
        advantages = group_advantages(total, size, self.scale).float().to(drawn.codes.device)
        loss, figures = self.studio.wrapped(
            drawn.codes,
            drawn.cond,
            advantages,
            prefix_mask=drawn.prefix_mask,
            orders=drawn.orders,
            drawn=drawn.log_probs,
        )
        groups = total.view(-1, size)
        figures |= {
            "reward": total.mean(),
            "reward_sd": groups.std(1).mean(),
            "groups_without_spread": (groups.amax(1) == groups.amin(1)).float().mean(),
            "diversity": torch.tensor(diversity(drawn.pixels, size)),
            "usage": usage(drawn.codes, size, self.studio.model.args.vocab_size),
        }
        if len(self.rewards) > 1:
            means = found.nan_to_num().mean(0)  # of rewards that do not apply too, so that batches of any size add up
            figures |= {f"reward_{one.name}": mean for one, mean in zip(self.rewards, means, strict=True)}
        return loss, {"loss": loss} | {name: value.to(loss.device) for name, value in figures.items()}


def usage(codes: Tensor, group_size: int, vocab_size: int) -> Tensor:
    """Return the share of all codes that occur in a group's images (B, N), a scalar; the mean over groups."""
    groups = codes.view(-1, group_size * codes.shape[1])
    return torch.zeros(len(groups), vocab_size, device=codes.device).scatter_(1, groups, 1).mean()


def diversity(pixels: np.ndarray, group_size: int) -> float:
    """Return the root mean square distance of two images of a group, a pixel's range being 1; the mean over groups."""
    groups = pixels.reshape(-1, group_size, pixels[0].size).astype(np.float32) / 255
    # Mean squared distances of all pairs are twice the variance.
    return float(np.sqrt(2 * groups.var(1, ddof=1).mean(1)).mean())


class HeldOutRewards:
    """Rewards, diversity and recall of images drawn with noise that training does not see: Job.validate.

    A checkpoint with a higher reward than all before it, the beginning included, is copied to `best/` among the checkpoints,
    its step and reward to `best.json` beside it.
    """

    def __init__(self, studio: Studio, asked: Asked, rewards: Sequence[Reward], args: Namespace):
        self.studio, self.asked, self.rewards, self.args = studio, asked, rewards, args
        self.dist, self.size = studio.plan.dist, args.group_size
        self.groups = -(-args.val_images // self.size)
        self.at_once = max(args.global_batch_size // (self.dist.world_size * args.gradient_accumulation_steps), 1)
        self.seed, self.trainer = item_seed(args.global_seed, _HELD_OUT), cast(Trainer, None)
        self.real: np.ndarray | None = None
        if args.val_code_path:
            self.real = features_of(args.recall_features, self._real_images(args.val_code_path))

    def begin(self, trainer: Trainer) -> None:
        """Measure the model that a run begins with, or is resumed with where it was killed before it was measured.

        Every process calls it together.
        """
        self.trainer = trainer
        if self.dist.is_main and not self._record() and (kept := trainer.run.stores[0] / "best").exists():
            trainer.log.warning(f"{kept} has no best.json beside it: the first checkpoint that is measured replaces it")
        due = trainer.step % self.args.ckpt_every == 0 or trainer.step == trainer.total_steps
        if not due or self.dist.broadcast(self._record().get("measured", -1)) >= trainer.step:
            return
        with trainer.ema.applied() if trainer.ema else nullcontext(), self.studio.open():
            values = self.figures()
        words = ", ".join(f"{name}: {value:.4f}" for name, value in values.items())
        trainer.log.info(f"(step={trainer.step:07d}) {words}" + ("" if trainer.step else ", before training"))
        trainer.log.scalars(trainer.step, values)
        self._keep_best(values["val_reward"])

    def __call__(self, model: nn.Module) -> dict[str, float]:
        values = self.figures()
        self._keep_best(values["val_reward"])
        return values

    def figures(self) -> dict[str, float]:
        """Return the figures of the model's present weights, the same on every process. Every process calls it together."""
        with self.dist.together():
            mine = self._measure_share()
        parts = [part for of_process in self.dist.gather(mine) for part in of_process]
        rewards = np.concatenate([part[0] for part in parts])
        weights = np.array([reward.weight for reward in self.rewards])
        values = {"val_reward": float(np.nansum(rewards * weights, axis=1).mean())}
        if len(self.rewards) > 1:
            means = np.nan_to_num(rewards).mean(0).tolist()
            values |= {f"val_reward_{reward.name}": mean for reward, mean in zip(self.rewards, means, strict=True)}
        values["val_diversity"] = float(np.average([part[1] for part in parts], weights=[len(p[0]) for p in parts]))
        if self.real is not None:
            seen = np.concatenate([part[2] for part in parts])
            values["val_precision"], values["val_recall"] = precision_recall(self.real, seen)
        return values

    def _measure_share(self) -> list[tuple[np.ndarray, float, np.ndarray | None]]:
        """Return rewards (b, K), diversity and features (b, D) of each batch of this process's groups."""
        found, stride = [], self.at_once * self.dist.world_size
        # As many passes on every process: sharded weights are exchanged by the number of passes a process has made.
        for start in range(self.dist.rank * self.at_once, -(-self.groups // stride) * stride, stride):
            groups = range(start, min(start + self.at_once, self.groups))
            images = [group * self.size + i for group in groups or [0] for i in range(self.size)]
            items = [self._item(image // self.size) for image in images]
            drawn = self.studio.draw(self.asked, items, self.seed, images)
            if groups:
                rewards = rewards_of(self.rewards, drawn.pixels, self.asked.told(items))
                features = None if self.real is None else features_of(self.args.recall_features, drawn.pixels)
                found.append((rewards, diversity(drawn.pixels, self.size), features))
        return found

    def _item(self, group: int) -> int:
        """Return what a group is asked for: in turn, or evenly spread where there are more things than groups."""
        asked = len(self.asked)
        return group % asked if self.groups >= asked else group * asked // self.groups

    def pictures(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Return a grid of the first held-out images: Job.sample."""
        items = list(range(min(SHOWN, len(self.asked))))
        drawn = self.studio.draw(self.asked, items, self.seed, [item * self.args.group_size for item in items])
        return {"samples": make_grid(drawn.pixels, columns=4)}

    def _real_images(self, path: str) -> np.ndarray:
        """Return held-out images as the tokenizer gives them back, at most as many as are drawn."""
        args, tokenizer = self.args, self.studio.tokenizer
        data = open_codes(path, args.image_size, args.downsample_size, random_view=False)
        ours, theirs = {"tokenizer": tokenizer.fingerprint()}, vars(data.settings) if data.settings else {}
        names = "--gpt-ckpt's tokenizer", f"--val-code-path {path}"
        require_same(ours, theirs, ("tokenizer",), names, "give codes of that tokenizer")
        places = np.linspace(0, len(data) - 1, min(len(data), args.val_images)).round().astype(int)
        codes = torch.stack([torch.as_tensor(data[int(place)]["codes"]) for place in places])
        if codes.max() >= tokenizer.codebook_size:
            raise ValueError(f"{path} has the code {codes.max()}, and the tokenizer {tokenizer.codebook_size} codes")
        return decode_codes(tokenizer, codes)

    # The best checkpoint

    def _record(self) -> dict[str, Any]:
        """Return the best step, its reward, and the last step that was measured; nothing where none was."""
        run = self.trainer.run
        places = [*run.stores, *run.former, run.folder]  # an earlier edition's is in the run's folder
        file = next((place / "best.json" for place in places if (place / "best.json").exists()), None)
        record = json.loads(file.read_text()) if file else {}
        return {"measured": self.trainer.step} | record if record else {}  # an earlier edition's has no such entry

    def _keep_best(self, value: float) -> None:
        """Copy the checkpoint of this step where its reward is the highest so far. Every process calls it together."""
        trainer = self.trainer
        trainer.saver.wait()  # until it is written
        if not self.dist.is_main:
            return
        record, step, store = self._record(), trainer.step, trainer.run.stores[0]
        found = [path for path in checkpoints_in(store) if int(path.stem) == step]
        try:
            if value > record.get("val_reward", -math.inf) and (found or not step):
                record |= {"step": step, "val_reward": value}
                if found:
                    keep_copy(found[0], store / "best")
                    trainer.log.info(f"best so far: {store / 'best'} (val_reward {value:.4f})")
            write_json(store / "best.json", record | {"measured": step})
        except OSError as error:
            trainer.log.warning(
                f"could not keep the checkpoint of step {step} in {store / 'best'} ({error}); training continues"
            )


def keep_copy(path: Path, folder: Path) -> None:
    """Make `folder` hold a checkpoint alone, which shares its disk space with the one at `path` where files can."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copy2(source, target)

    unfinished, old = folder.with_name(".best.tmp"), folder.with_name(".best.removed.tmp")
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    if path.is_dir():
        shutil.copytree(path, unfinished / path.name, copy_function=link)
    else:
        link(str(path), str(unfinished / path.name))
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
