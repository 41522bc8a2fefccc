"""Statistics of reference photographs in a file: a later evaluation need not look at COCO's 40,504 images again.

save_reference("coco_256.npz", statistics, {"eval_res": 256, "inception_resize": "clean", "graph": sha256})
reference = RecordedReference("coco_256.npz")       # stands where SquareImages would
reference.require(eval_res=256)
"""

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from evaluations.metrics import Statistics
from utils.files import atomic_write


class RecordedReference:
    """`mu` (D,) and `sigma` (D, D) of an .npz, perhaps with `count` and `protocol`, what they were made with.

    statistics: with the count where the file says it. made: the protocol, None where the file does not say.
    Raises FileNotFoundError, ValueError for another kind of file or a damaged one.
    """

    kind, enlarged = "statistics", 0

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"no file of reference statistics at {self.path}: check --ref_dir")
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                held = {name: arrays[name] for name in ("mu", "sigma", "count", "protocol") if name in arrays.files}
            made = json.loads(str(held["protocol"])) if "protocol" in held else None
        # An .npy is no archive, and has no `files`.
        except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path} is not a whole .npz of statistics ({error}): {_AGAIN}") from error
        if not {"mu", "sigma"} <= set(held):
            raise ValueError(f"{self.path} has no statistics mu and sigma: give a folder of images, or {_AGAIN}")
        if made is not None and not isinstance(made, dict):
            raise ValueError(f"{self.path}: protocol is {made!r}, expected names and values: {_AGAIN}")
        mu, sigma = held["mu"], held["sigma"]
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (mu.dtype.kind == sigma.dtype.kind == "f"):
            raise ValueError(
                f"{self.path}: mu and sigma are {mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}, expected floats (D,) "
                "and (D, D)"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"{self.path}: mu or sigma has values that are not finite: {_AGAIN}")
        self.count = int(held["count"]) if "count" in held else None
        self.made = made
        self.statistics = Statistics(mu.astype(np.float64), sigma.astype(np.float64), self.count)

    def require(self, **wanted: object) -> None:
        """Raises ValueError where the statistics were made with another value of one of these settings."""
        for name, value in wanted.items():
            made = (self.made or {}).get(name, value)
            if made != value:
                raise ValueError(
                    f"{self.path} was made with {name} {made}, this evaluation has {value}: {_AGAIN}, or change the flag"
                )

    def describe(self) -> dict:
        """Describe the reference for a report, in JSON values."""
        return {"path": str(self.path), "kind": self.kind, "count": self.count, "made": self.made}


_AGAIN = "make it again from the images with --save_statistics"


def save_reference(path: str | Path, statistics: Statistics, protocol: dict) -> None:
    """Writes what RecordedReference reads, to a temporary name first. Raises OSError."""
    with atomic_write(path) as f:
        np.savez(
            f,
            mu=statistics.mean,
            sigma=statistics.covariance,
            count=statistics.count,
            protocol=json.dumps(protocol),
        )
