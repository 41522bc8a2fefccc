"""The losses that train the tokenizer: reconstruction, perceptual, adversarial and codebook.

    loss = VQLoss(disc_start=20000, disc_weight=0.5)
    recons, codebook = tokenizer(images)
    generator_loss, logs = loss.generator_loss(codebook, images, recons, step)
    discriminator_loss, logs = loss.discriminator_loss(images, recons, step)

VQGAN (arXiv 2012.09841, section 3.1) with the weights of LlamaGen (arXiv 2406.06525, section 3.1).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenizer.base import CodebookLosses
from tokenizer.tokenizer_image.discriminators import BlurDiscriminator, PatchGANDiscriminator, StyleGANDiscriminator
from tokenizer.tokenizer_image.lpips import LPIPS


def vanilla_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the binary cross-entropy of the logits, real as 1 and fake as 0, halved (GAN, arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISC_LOSSES = {
    "hinge": lambda real, fake: 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()),
    "vanilla": vanilla_d_loss,
    "non-saturating": vanilla_d_loss,
}
# Of the reconstructions' logits; "-mean", as IBQ and Open-MAGVIT2 have it, is of the mean logit of each image.
GEN_LOSSES = {
    "hinge": lambda fake: -fake.mean(),
    "non-saturating": lambda fake: F.softplus(-fake).mean(),
    "non-saturating-mean": lambda fake: F.softplus(-fake.flatten(1).mean(dim=1)).mean(),
}
RECONSTRUCTION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class LeCam(nn.Module):
    """Regularisation of a discriminator towards running means of its logits (arXiv 2104.03310, section 3.2).

    The means are over all processes, and begin at 0.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Take a batch's logits into the means, and return the loss, a scalar."""
        with torch.no_grad():
            means = torch.stack([real.mean(), fake.mean()])
            if dist.is_initialized():
                dist.all_reduce(means, dist.ReduceOp.SUM)
                means /= dist.get_world_size()
            for average, mean in zip((self.real, self.fake), means, strict=True):
                average.lerp_(mean, 1 - self.decay)
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()


class VQLoss(nn.Module):
    """Losses of both sides of the adversarial training of a tokenizer, with the discriminator and the frozen LPIPS network.

    `self.discriminator` may be replaced by a compiled one or one in DistributedDataParallel.

    disc_weight scales both adversarial losses, which are 0 before step `disc_start`; gen_weight takes its place in the
    generator's. lecam_weight scales LeCam beside the discriminator's loss.
    codebook_weight scales the quantiser's losses. With perceptual_weight 0 no LPIPS is built and no file is needed;
    `lpips` is a network to use in place of a new one.
    image_size matters to the stylegan discriminator only, disc_dim (their first channels) to the others.
    Raises FileNotFoundError if the weights of LPIPS are missing.
    """

    def __init__(
        self,
        disc_start: int,
        disc_loss: str = "hinge",
        disc_dim: int | None = None,
        disc_type: str = "patchgan",
        image_size: int = 256,
        disc_weight: float = 1.0,
        gen_weight: float | None = None,
        lecam_weight: float = 0.0,
        gen_adv_loss: str = "hinge",
        reconstruction_loss: str = "l2",
        reconstruction_weight: float = 1.0,
        codebook_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        lpips: nn.Module | None = None,
    ):
        super().__init__()
        if disc_type == "stylegan":
            self.discriminator = StyleGANDiscriminator(image_size)
        else:
            kind, channels = {"patchgan": (PatchGANDiscriminator, 64), "blur": (BlurDiscriminator, 128)}[disc_type]
            self.discriminator = kind(ndf=disc_dim or channels)
        self.disc_start, self.disc_weight, self.lecam_weight = disc_start, disc_weight, lecam_weight
        self.gen_weight = disc_weight if gen_weight is None else gen_weight
        self.lecam = LeCam() if lecam_weight else None
        self.disc_criterion = DISC_LOSSES[disc_loss]
        self.gen_criterion = GEN_LOSSES[gen_adv_loss]

        self.reconstruction_criterion = RECONSTRUCTION_LOSSES[reconstruction_loss]
        self.reconstruction_weight, self.codebook_weight = reconstruction_weight, codebook_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = (lpips or LPIPS()) if perceptual_weight else None

    @property
    def averages(self) -> dict[str, nn.Module]:
        """Return what else a checkpoint keeps so that a resumed run takes the same steps, by its name there."""
        return {} if self.lecam is None else {"lecam": self.lecam}

    def discriminator_active(self, step: int) -> bool:
        """Tell whether the discriminator takes part at this step: from `disc_start` on, and only with a disc_weight."""
        return step >= self.disc_start and self.disc_weight != 0

    def generator_loss(
        self, codebook: CodebookLosses, images: Tensor, recons: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the tokenizer's loss, a float32 scalar, and detached ones for the log. Leaves no gradient on the discriminator.

        codebook: of the tokenizer in training mode; images, recons: (B, 3, H, W) in [-1, 1].
        """
        images, recons = images.float(), recons.float()
        zero = recons.new_zeros(())
        reconstruction = self.reconstruction_criterion(recons, images)
        perceptual = zero if self.perceptual_loss is None else self.perceptual_loss(images, recons).float().mean()
        image_loss = self.reconstruction_weight * reconstruction + self.perceptual_weight * perceptual

        adversarial, weight = zero, zero
        if self.discriminator_active(step):
            # The bare module: no gradient of the discriminator is wanted here, so there is none to synchronise.
            module = self.discriminator
            module = module.module if isinstance(module, DistributedDataParallel) else module
            module.requires_grad_(False)
            adversarial = self.gen_criterion(module(recons).float())
            module.requires_grad_(True)
            weight = zero + self.gen_weight

        loss = image_loss + weight * adversarial + self.codebook_weight * codebook.total
        logs = {
            "generator_loss": loss,
            "reconstruction_loss": reconstruction,
            "perceptual_loss": perceptual,
            "adversarial_loss": adversarial,
            "adversarial_weight": weight,
            **{f"{name}_loss": value for name, value in codebook.parts.items()},
            "codebook_usage": codebook.usage,
        }
        return loss, {name: value.detach().float() for name, value in logs.items()}

    def discriminator_loss(self, images: Tensor, recons: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's loss; no gradient reaches the tokenizer.

        images, recons: (B, 3, H, W) in [-1, 1]. Returns a float32 scalar, and detached float32 scalars for the log.
        Before `disc_start` the discriminator is not run: the loss is a 0 whose backward pass reaches nothing, and the
        optimizer step can be left out (see `discriminator_active`).
        """
        if self.discriminator_active(step):
            # Real and fake pass separately: BatchNorm normalises each with its own statistics.
            real = self.discriminator(images.detach().float()).float()
            fake = self.discriminator(recons.detach().float()).float()
            loss = self.disc_weight * self.disc_criterion(real, fake)
        else:
            loss = torch.zeros((), device=images.device, requires_grad=True)
            real = fake = loss
        logs = {"logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.lecam is not None and self.discriminator_active(step):
            logs["lecam_loss"] = self.lecam(real, fake)
            loss = loss + self.lecam_weight * logs["lecam_loss"]
        logs["discriminator_loss"] = loss
        return loss, {name: value.detach().float() for name, value in logs.items()}
