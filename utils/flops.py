"""Peak dense FLOPs a second and memory of accelerators, by name.

Figures are the vendors' datasheets', without sparsity (many print twice the dense figure, "with sparsity") and with
float32 accumulation. Memory is what the driver reports, rounded down.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Accelerator:
    """An accelerator: dense peaks in TFLOPs a second (None: it has no such units) and memory in GiB."""

    name: str
    memory: float
    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float

    def peak_flops(self, precision: str) -> float | None:
        """Return FLOPs a second in a precision of --mixed-precision ("none" is float32); None without such units."""
        tera = getattr(self, "fp32" if precision == "none" else precision)
        return None if tera is None else tera * 1e12


# The first whose words are all in a device's name is meant, so "H100 PCIe" stands before "H100".
ACCELERATORS = (
    Accelerator("V100S", 32, None, 130, None, 16.4),
    Accelerator("V100 PCIe", 16, None, 112, None, 14),
    Accelerator("V100 32GB", 32, None, 125, None, 15.7),
    Accelerator("V100", 16, None, 125, None, 15.7),
    Accelerator("T4", 14.5, None, 65, None, 8.1),
    Accelerator("A10", 22, 125, 125, 62.5, 31.2),
    Accelerator("A10G", 22, 70, 70, 35, 31.5),
    Accelerator("A30", 23.5, 165, 165, 82, 10.3),
    Accelerator("A40", 44, 149.7, 149.7, 74.8, 37.4),
    Accelerator("A100 40GB", 39, 312, 312, 156, 19.5),
    Accelerator("A100", 79, 312, 312, 156, 19.5),
    Accelerator("A800", 79, 312, 312, 156, 19.5),
    Accelerator("L4", 22, 121, 121, 60, 30.3),
    Accelerator("L20", 44, 119.5, 119.5, 59.8, 59.8),
    Accelerator("L40", 44, 181, 181, 90.5, 90.5),
    Accelerator("L40S", 44, 362, 362, 183, 91.6),
    Accelerator("H20", 95, 148, 148, 74, 44),
    Accelerator("H100 PCIe", 79, 756, 756, 378, 51),
    Accelerator("H100 NVL", 93, 835, 835, 417, 60),
    Accelerator("H100", 79, 989, 989, 494, 67),
    Accelerator("H800 PCIe", 79, 756, 756, 378, 51),
    Accelerator("H800", 79, 989, 989, 494, 67),
    Accelerator("H200 NVL", 139, 835, 835, 417, 60),
    Accelerator("H200", 139, 989, 989, 494, 67),
    Accelerator("GH200", 95, 989, 989, 494, 67),
    Accelerator("B200", 178, 2250, 2250, 1125, 75),
    Accelerator("GB200", 184, 2500, 2500, 1250, 80),
    Accelerator("RTX A6000", 47.5, 154.8, 154.8, 77.4, 38.7),
    Accelerator("RTX 6000 Ada", 47.5, 364, 364, 182, 91.1),
    Accelerator("RTX 3090 Ti", 23.5, 80, 80, 40, 40),
    Accelerator("RTX 3090", 23.5, 71, 71, 35.6, 35.6),
    Accelerator("RTX 4080", 15.5, 97.5, 97.5, 48.7, 48.7),
    Accelerator("RTX 4090", 23.5, 165.2, 165.2, 82.6, 82.6),
    Accelerator("RTX 5090", 31.5, 209.5, 209.5, 104.8, 104.8),
    Accelerator("MI300X", 191, 1307, 1307, 653.7, 163.4),
    Accelerator("MI325X", 255, 1307, 1307, 653.7, 163.4),
)
# Parts and relatives of a card whose peak is not its own.
_OTHERWISE = {"MIG", "LAPTOP", "Q", "D", "SUPER"}


def find_accelerator(name: str) -> Accelerator | None:
    """Return the accelerator that a device's name speaks of ("NVIDIA H100 80GB HBM3", "h100 nvl"); None where it is not known."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if words & _OTHERWISE:
        return None
    return next((a for a in ACCELERATORS if set(a.name.upper().split()) <= words), None)


def require_accelerator(name: str) -> Accelerator:
    """Return the accelerator of a name. Raises ValueError for one that is not known."""
    found = find_accelerator(name)
    if found is None:
        raise ValueError(f"--gpu {name} is not known; known are {', '.join(a.name for a in ACCELERATORS)}")
    return found


def peak_flops(device: "torch.device", precision: str) -> float | None:
    """Return dense peak FLOPs a second of a device in a precision of --mixed-precision; None for a CPU or an unknown card."""
    if device.type != "cuda":
        return None
    import torch

    accelerator = find_accelerator(torch.cuda.get_device_name(device))
    return accelerator.peak_flops(precision) if accelerator else None
