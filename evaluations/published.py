"""The published figures by name, with the weights and settings they belong to: what reproduce.py runs and figures show.

row = find_row("c2i_L_384"); row.fid, row.cfg_scale, row.flags()

Class-conditional ImageNet: FID of 50,000 samples against the reference batch below. Tokenizers: FID of ImageNet's 50,000
validation images, reconstructed, against themselves (rFID). The figures are those that LlamaGen (arXiv 2406.06525),
Next-Patch-Prediction (2412.15321), PAR (2412.15119), NAR (2503.10696), CCA (2410.09347, its repository), IBQ (2412.02692),
Open-MAGVIT2 (2409.04410) and MaskGIT (2202.04200) give for the weights they released.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from utils.download import download
from utils.hub import NAR_OWNERS, RELEASED, WEIGHTS

REFERENCE, REFERENCE_512, REFERENCE_IMAGES = "VIRTUAL_imagenet256_labeled.npz", "VIRTUAL_imagenet512.npz", 10_000
GRAPH = "classify_image_graph_def.pb"
_BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
# Addresses and sizes in bytes; the reference has its images and their statistics.
URLS = {
    REFERENCE: f"{_BATCHES}/imagenet/256/{REFERENCE}",
    REFERENCE_512: f"{_BATCHES}/imagenet/512/{REFERENCE_512}",
    GRAPH: f"{_BATCHES}/{GRAPH}",
}
BYTES = {REFERENCE: 2.03e9, REFERENCE_512: 7.93e9, GRAPH: 0.096e9}  # the second from its images' size, not seen
FIGURES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
}
LOWER_IS_BETTER = {"fid", "sfid"}
ROOT = Path(__file__).resolve().parent.parent

_LLAMAGEN = "FoundationVision/LlamaGen"
_NPP = "pytttttt/LlamaGen-NPP"
_PAR = "Epiphqny/PAR"
_CCA = "ChenDRAG/CCA_LlamaGen/CCA_LlamaGen_Guidance_Free"
_MAGVIT = "TencentARC/Open-MAGVIT2-Tokenizer"
_PARAMETERS = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672, "3B": 3_096_659_200}
_RAR, _MASKGIT = "yucornetto/RAR", "fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin"
_VQ16, _VQ8 = f"{_LLAMAGEN}/vq_ds16_c2i.pt", f"{_LLAMAGEN}/vq_ds8_c2i.pt"


@dataclass(frozen=True)
class Row:
    """A published figure. Released names are those of utils/hub.py, parameters are numbers in the model.

    gpt: the released GPT; None for a row about the tokenizer alone, whose `fid` is then rFID.
    image_size: pixels a side that the models work at. image_size_eval: that the images are evaluated at.
    drawing: further flags of sample_c2i_ddp.py.
    """

    name: str
    system: str
    fid: float
    parameters: int
    gpt: str | None
    tokenizer: str
    image_size: int
    cfg_scale: float | None = None
    image_size_eval: int = 256
    samples: int = 50_000
    drawing: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The size, as --gpt-model or --vq-model names it."""
        return RELEASED[self.gpt].flags["--gpt-model"] if self.gpt else RELEASED[self.tokenizer].flags["--vq-model"]

    @property
    def reference(self) -> str:
        """Name of the reference batch that images are compared with."""
        return REFERENCE_512 if self.image_size_eval == 512 else REFERENCE

    @property
    def task(self) -> str:
        """The evaluator's --task."""
        return "generation" if self.gpt else "reconstruction"

    @property
    def figure(self) -> str:
        """Return the name of `fid`."""
        return "FID" if self.gpt else "rFID"

    def flags(self) -> dict[str, str]:
        """Flags of sample_c2i_ddp.py, or for a tokenizer of reconstruction_vq_ddp.py; a switch has an empty value."""
        sizes = {"--image-size": str(self.image_size), "--image-size-eval": str(self.image_size_eval)}
        tokenizer = {**RELEASED[self.tokenizer].flags, "--vq-ckpt": self.tokenizer}
        if self.gpt is None:
            tokenizer.pop("--downsample-size", None)  # of the scripts that have a GPT too
            return tokenizer | sizes
        drawing = {"--cfg-scale": str(self.cfg_scale), "--top-k": "0", "--top-p": "1.0", "--temperature": "1.0"}
        gpt = {**RELEASED[self.gpt].flags, "--gpt-ckpt": self.gpt}
        return gpt | tokenizer | sizes | drawing | {**self.drawing} | {"--num-fid-samples": str(self.samples)}


def _rows() -> Iterator[Row]:
    for system, repository, size, image_size, cfg_scale, fid in (
        ("LlamaGen", _LLAMAGEN, "B", 256, 2.0, 5.46),
        ("LlamaGen", _LLAMAGEN, "L", 256, 2.0, 3.80),
        ("LlamaGen", _LLAMAGEN, "B", 384, 2.0, 6.09),
        ("LlamaGen", _LLAMAGEN, "L", 384, 2.0, 3.07),
        ("LlamaGen", _LLAMAGEN, "XL", 384, 1.75, 2.62),
        ("LlamaGen", _LLAMAGEN, "XXL", 384, 1.75, 2.34),
        ("LlamaGen", _LLAMAGEN, "3B", 384, 1.65, 2.18),
        ("NPP", _NPP, "B", 256, 2.0, 4.47),
        ("NPP", _NPP, "L", 256, 1.75, 2.76),
        ("NPP", _NPP, "XL", 256, 1.70, 2.65),
        ("NPP", _NPP, "XXL", 256, 1.65, 2.55),
    ):
        name = f"{'npp' if system == 'NPP' else 'c2i'}_{size}_{image_size}"
        file = f"{repository}/c2i_{size}_{image_size}.pt"
        yield Row(name, system, fid, _PARAMETERS[size], file, _VQ16, image_size, cfg_scale)
    for size, width, group, cfg_scale, fid in (
        ("XL", 1280, 4, 1.5, 2.61),
        ("XXL", 1536, 4, 1.435, 2.35),
        ("3B", 3200, 4, 1.345, 2.29),
        ("3B", 3200, 16, 1.5, 2.88),
    ):
        name, parameters = f"PAR-{size}-{group}x", _PARAMETERS[size] + (group - 1) * width  # its special tokens
        yield Row(name, "PAR", fid, parameters, f"{_PAR}/{name}.pt", _VQ16, 384, cfg_scale)
    for size, fid in (("B", 7.04), ("L", 3.43), ("XL", 3.10), ("XXL", 3.12), ("3B", 2.69)):
        file = f"{_CCA}/c2i_{size}_384_CCA_0005000.pt"
        yield Row(f"CCA-{size}", "CCA", fid, _PARAMETERS[size], file, _VQ16, 384, 1.0)
    for size, parameters, fid in (
        ("B", 130_551_552, 4.65),
        ("M", 295_453_696, 3.27),
        ("L", 372_536_320, 3.06),
        ("XL", 815_991_040, 2.70),
        ("XXL", 1_464_454_656, 2.58),
    ):
        file = f"{NAR_OWNERS[size]}/NAR-imagenet-256-{size}/last_version.pt"
        yield Row(f"NAR-{size}", "NAR", fid, parameters, file, _VQ16, 256, 2.0)
    for size, parameters, cfg_scale, power, temperature, fid in (
        ("B", 260_923_648, 16.0, "2.75", "1.0", 1.95),
        ("L", 461_668_352, 15.5, "2.5", "1.02", 1.70),
        ("XL", 955_425_024, 6.9, "1.5", "1.02", 1.50),
        ("XXL", 1_498_520_704, 8.0, "1.2", "1.02", 1.48),
    ):
        drawing = {"--temperature": temperature, "--cfg-schedule": "power-cosine", "--cfg-power": power}
        drawing |= {"--balanced": "", "--precision": "none"}
        file = f"{_RAR}/rar_{size.lower()}.bin"
        yield Row(f"RAR-{size}", "RAR", fid, parameters, file, _MASKGIT, 256, cfg_scale, drawing=drawing)
    for size, image_size, parameters, steps, cfg_scale, fid in (
        ("L", 256, 337_157_120, 20, 4.8, 2.40),
        ("XL", 256, 751_947_520, 20, 4.9, 2.10),
        ("XXL", 256, 1_412_184_576, 20, 5.9, 2.00),
        ("L", 256, 337_157_120, 32, 5.4, 2.29),
        ("XL", 256, 751_947_520, 32, 5.0, 1.92),
        ("L", 512, 337_943_552, 48, 7.3, 2.54),
        ("XL", 512, 752_930_560, 48, 6.0, 2.10),
    ):
        name, file = f"LPD-{size}-{image_size}-{steps}", f"lpd_{size.lower()}_{image_size}"
        file, sizes = f"mit-han-lab/{file}/{file}.pth", (image_size, cfg_scale, image_size)
        drawing = {"--steps": str(steps), "--cfg-schedule": "linear", "--balanced": ""}
        yield Row(name, "LPD", fid, parameters, file, _VQ16, *sizes, drawing=drawing)
    for name, file, parameters, image_size, fid in (
        ("vq_ds16_c2i", _VQ16, 71_883_403, 256, 2.19),
        ("vq_ds16_c2i_384", _VQ16, 71_883_403, 384, 0.94),
        ("vq_ds16_c2i_512", _VQ16, 71_883_403, 512, 0.70),
        ("vq_ds8_c2i", _VQ8, 70_109_835, 256, 0.59),
    ):
        yield Row(name, "LlamaGen", fid, parameters, None, file, image_size)
    for name, file, parameters, fid in (
        ("ibq_1024", "IBQ-Tokenizer-1024/imagenet256_1024.ckpt", 107_049_859, 2.24),
        ("ibq_8192", "IBQ-Tokenizer-8192/imagenet256_8192.ckpt", 108_884_867, 1.87),
        ("ibq_16384", "IBQ-Tokenizer-16384/imagenet256_16384.ckpt", 110_982_019, 1.37),
        ("ibq_262144", "IBQ-Tokenizer-262144/imagenet256_262144.ckpt", 173_896_579, 1.00),
        ("ibq_16384_pretrain", "IBQ-Tokenizer-16384-Pretrain/IBQ_pretrain_16384.ckpt", 110_982_019, 2.06),
        ("ibq_262144_pretrain", "IBQ-Tokenizer-262144-Pretrain/IBQ_pretrain_262144.ckpt", 173_896_579, 1.53),
    ):
        yield Row(name, "IBQ", fid, parameters, None, f"TencentARC/{file}", 256)
    yield Row("maskgit_vqgan", "MaskGIT", 2.28, 54_515_587, None, _MASKGIT, 256)
    for name, kind, file, parameters, fid in (
        ("open_magvit2_256", "256-resolution", "imagenet_256_L.ckpt", 115_127_829, 1.17),
        ("open_magvit2_128", "128-resolution", "imagenet_128_L.ckpt", 112_021_653, 0.34),
        ("open_magvit2_16384", "16384-Pretrain", "pretrain256_16384.ckpt", 115_094_033, 2.55),
        ("open_magvit2_262144", "262144-Pretrain", "pretrain256_262144.ckpt", 115_127_829, 1.67),
    ):
        yield Row(name, "Open-MAGVIT2", fid, parameters, None, f"{_MAGVIT}-{kind}/{file}", 256)


ROWS: dict[str, Row] = {row.name: row for row in _rows()}
"""Name → row."""


def find_row(name: str) -> Row:
    """Return the row of a name. Raises ValueError that lists close names, or all, for one that is not known."""
    if name in ROWS:
        return ROWS[name]
    by_lower = {known.lower(): known for known in ROWS}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower().removesuffix(".pt"), by_lower, n=3)]
    known = f"did you mean {' or '.join(close)}" if close else f"known are {', '.join(ROWS)}"
    raise ValueError(f"there is no published row {name!r}; {known}")


def on_disk(*names: str) -> Path | None:
    """Return a file of one of these names in the working directory, its pretrained_models/ or that of the project."""
    folders = (Path.cwd(), Path.cwd() / WEIGHTS, ROOT / WEIGHTS)
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def find_file(name: str, given: str | Path | None = None) -> Path:
    """Return the evaluator's graph or the reference batch: `given`, else where `on_disk` finds it, else downloaded.

    Raises FileNotFoundError (no file `given`; offline), ConnectionError or OSError (the download failed).
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(
                f"{path} {what}; without a name, {name} is looked for in {WEIGHTS}/, else downloaded from {URLS[name]}"
            )
        return path
    home = next((folder for folder in (Path.cwd() / WEIGHTS, ROOT / WEIGHTS) if folder.is_dir()), Path.cwd() / WEIGHTS)
    return on_disk(name) or download(URLS[name], home / name, name)
