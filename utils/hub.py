"""Released weights by name: where they lie on this disk, or else where they are downloaded from.

    path = resolve("c2i_L_384.pt")
    path = resolve("pytttttt/LlamaGen-NPP/c2i_B_256.pt")

Files live in pretrained_models/, see the README there.
"""

import difflib
import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

WEIGHTS = "pretrained_models"
BY_HAND = "Fetch it from "  # how messages begin that say where to put what could not be downloaded
_ROOT = Path(__file__).resolve().parent.parent

_LLAMAGEN = "FoundationVision/LlamaGen"
_TEXT = "peizesun/llamagen_t2i"
_PAR = "Epiphqny/PAR"
_NPP = "pytttttt/LlamaGen-NPP"
_CCA, _CCA_FOLDER = "ChenDRAG/CCA_LlamaGen", "CCA_LlamaGen_Guidance_Free"
_RAR, _TITOK = "yucornetto/RAR", "fun-research/TiTok"
NAR_OWNERS = {"B": "chenfeng1271", "M": "yefly", "L": "chenfeng1271", "XL": "yefly", "XXL": "chenfeng1271"}
_CONTROLAR = "wondervictor/ControlAR"
_MAGVIT, _IBQ = "TencentARC/Open-MAGVIT2-Tokenizer", "TencentARC/IBQ-Tokenizer"


@dataclass(frozen=True)
class Release:
    """A published file, or with an empty `filename` a whole repository, which becomes a folder."""

    repo_id: str
    filename: str
    home: str  # place inside pretrained_models/
    flags: Mapping[str, str] = field(default_factory=dict)  # the script flags that fit it
    # What is fetched of a repository: that of the T5 also has the weights in three other formats, 34 GB more.
    files: tuple[str, ...] = ("*.json", "*.model", "*.safetensors", "*.txt")
    bare: bool = True  # the file name alone means this file

    @property
    def name(self) -> str:
        """The unmistakable name: repository and file."""
        return f"{self.repo_id}/{self.filename}".rstrip("/")

    @property
    def address(self) -> str:
        """Return the address for a browser."""
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{endpoint}/{self.repo_id}/" + (f"resolve/main/{self.filename}" if self.filename else "tree/main")


def _flags(**values: str) -> dict[str, str]:
    return {"--" + flag.replace("_", "-"): value for flag, value in values.items()}


def _gpt(repo_id: str, filename: str, gpt_model: str, image_size: int, folder: str = "", **more: str) -> Release:
    flags = _flags(gpt_model=gpt_model, **more, image_size=str(image_size))
    return Release(repo_id, filename, folder + filename, flags)


def _par(size: str, group: int) -> Release:
    flags = {"ar_token_num": str(group), "spe_token_num": str(group - 1)}
    return _gpt(_PAR, f"PAR-{size}-{group}x.pt", f"GPT-{size}", 384, **flags)


def _nar(owner: str, size: str) -> Release:
    repository, filename = f"NAR-imagenet-256-{size}", "last_version.pt"  # a name that files of other runs have too
    flags = _flags(gpt_model=f"GPT-{size}", layout="neighbours", image_size="256")
    return Release(f"{owner}/{repository}", filename, f"{repository}/{filename}", flags, bare=False)


def _cca(size: str, **more: str) -> Release:
    flags, name = _flags(gpt_model=f"GPT-{size}", **more, image_size="384"), f"c2i_{size}_384_CCA_0005000.pt"
    return Release(_CCA, f"{_CCA_FOLDER}/{name}", name, flags)


def _lpd(size: str, image_size: int) -> Release:
    name = f"lpd_{size.lower()}_{image_size}"
    return _gpt(f"mit-han-lab/{name}", f"{name}.pth", f"LPD-{size}", image_size)


def _control(name: str, kind: str, image_size: int) -> Release:
    flags = {"gpt_type": "t2i", "cls_token_num": "120", "control_type": kind}
    return _gpt(_CONTROLAR, f"{name}.safetensors", "GPT-XL", image_size, folder="ControlAR/", **flags)


def _tokenizer(repo_id: str, filename: str, vq_model: str, **more: str) -> Release:
    return Release(repo_id, filename, filename, _flags(vq_model=vq_model, **more))


def _autoencoder(repo_id: str, **flags: str) -> Release:
    files = ("config.json", "diffusion_pytorch_model.safetensors")  # not the same weights in other layouts
    return Release(repo_id, "", repo_id.split("/")[1], _flags(**flags), files)


RELEASED: dict[str, Release] = {
    release.name: release
    for release in (
        _tokenizer(_LLAMAGEN, "vq_ds16_c2i.pt", "VQ-16"),
        _tokenizer(_LLAMAGEN, "vq_ds8_c2i.pt", "VQ-8", downsample_size="8"),
        *(_gpt(_LLAMAGEN, f"c2i_{size}_256.pt", f"GPT-{size}", 256) for size in ("B", "L")),
        *(_gpt(_LLAMAGEN, f"c2i_{size}_384.pt", f"GPT-{size}", 384) for size in ("B", "L", "XL")),
        *(_gpt(_LLAMAGEN, f"c2i_{size}_384.pt", f"GPT-{size}", 384, from_fsdp="") for size in ("XXL", "3B")),
        _tokenizer(_TEXT, "vq_ds16_t2i.pt", "VQ-16"),
        _gpt(_TEXT, "t2i_XL_stage1_256.pt", "GPT-XL", 256, gpt_type="t2i", cls_token_num="120"),
        _gpt(_TEXT, "t2i_XL_stage2_512.pt", "GPT-XL", 512, gpt_type="t2i", cls_token_num="120"),
        *(_par(size, 4) for size in ("XL", "XXL", "3B")),
        _par("3B", 16),
        # Two have LlamaGen's file names, so all four stay in a folder of their own.
        *(_gpt(_NPP, f"c2i_{size}_256.pt", f"GPT-{size}", 256, "LlamaGen-NPP/") for size in ("B", "L", "XL", "XXL")),
        *(_cca(size) for size in ("B", "L", "XL")),
        *(_cca(size, from_fsdp="") for size in ("XXL", "3B")),
        *(_nar(owner, size) for size, owner in NAR_OWNERS.items()),
        *(_tokenizer(f"{_IBQ}-{size}", f"imagenet256_{size}.ckpt", "IBQ-16") for size in (1024, 8192, 16384, 262144)),
        *(_tokenizer(f"{_IBQ}-{size}-Pretrain", f"IBQ_pretrain_{size}.ckpt", "IBQ-16") for size in (16384, 262144)),
        _tokenizer(f"{_MAGVIT}-256-resolution", "imagenet_256_L.ckpt", "Open-MAGVIT2"),
        _tokenizer(f"{_MAGVIT}-128-resolution", "imagenet_128_L.ckpt", "Open-MAGVIT2-8", downsample_size="8"),
        _tokenizer(f"{_MAGVIT}-16384-Pretrain", "pretrain256_16384.ckpt", "Open-MAGVIT2"),
        _tokenizer(f"{_MAGVIT}-262144-Pretrain", "pretrain256_262144.ckpt", "Open-MAGVIT2"),
        *(_lpd(size, 256) for size in ("L", "XL", "XXL")),
        *(_lpd(size, 512) for size in ("L", "XL")),
        *(_gpt(_RAR, f"rar_{size.lower()}.bin", f"RAR-{size}", 256) for size in ("B", "L", "XL", "XXL")),
        *(_control(f"{kind}_MR", kind, 768) for kind in ("canny", "depth")),
        _control("hed", "hed", 512),
        _control("seg_cocostuff", "seg", 512),
        _control("edge_base", "canny", 512),
        _control("depth_base", "depth", 512),
        _tokenizer(_TITOK, "maskgit-vqgan-imagenet-f16-256.bin", "MaskGIT-VQGAN"),
        Release("google/flan-t5-xl", "", "t5-ckpt/flan-t5-xl"),
        _autoencoder("stabilityai/sd-vae-ft-mse", vae="sd-vae-ft-mse"),
        _autoencoder("stabilityai/sdxl-vae", vae="sdxl-vae"),
        _autoencoder("openai/consistency-decoder"),
    )
}
"""Qualified name ('repository/file') → release. Where a file name occurs twice, the bare name means the first."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


def is_released(name: str | Path) -> bool:
    """Return True for a released file's name, bare or with its repository or pretrained_models/ before it."""
    return _find(_inside(Path(name))) is not None


def resolve(name_or_path: str | Path, repo_id: str | None = None) -> Path:
    """Return the file or folder on this disk for a path or for a released name, downloaded where it is not here yet.

    In this order: an existing path; the same name in pretrained_models/ of the current folder or of this project; the
    hub's own cache; the hub, where the name is a released one. `repo_id` ('owner/name') says which hub repository the
    file is of and need not be one of those that RELEASED knows. Of several processes that ask at once one downloads.

    Raises FileNotFoundError (no such file and no such release, or offline), ConnectionError (the download failed),
    OSError (the disk is full or the folder not writable), ValueError (an empty name, a malformed `repo_id`).
    """
    if not str(name_or_path):
        raise ValueError("an empty name stands for no weights: give a path or one of the names in " + WEIGHTS)
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    inside = _inside(path)
    if repo_id is None:
        release = _find(inside)
    elif repo_id.count("/") == 1 and inside is not None:
        release = _find(f"{repo_id}/{inside}") or Release(repo_id, inside, f"{repo_id.split('/')[1]}/{inside}")
    else:
        raise ValueError(f"repo_id {repo_id!r} with {name_or_path}: expected 'owner/name' and a file name in it")

    # A file name that two repositories use never falls back on the other's file.
    homes = [inside] if release is None else _homes(release)
    for folder in weights_folders():
        for home in filter(None, homes):
            if (folder / home).exists():
                return folder / home
    if release is None:
        raise FileNotFoundError(_unknown(name_or_path, path))
    return _cached(release) or _download(release)


def _inside(path: Path) -> str | None:
    """Return the part of the path after pretrained_models/, or a plain name; None for a path that leads elsewhere."""
    for folder in weights_folders():
        if path.is_absolute() and path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    if path.is_absolute() or ".." in path.parts:
        return None
    return path.relative_to(WEIGHTS).as_posix() if path.is_relative_to(WEIGHTS) else path.as_posix()


def _find(name: str | None) -> Release | None:
    if not name:
        return None
    if name in RELEASED:
        return RELEASED[name]
    return next((r for r in RELEASED.values() if name in ([r.filename] if r.bare else []) + _homes(r)), None)


def _homes(release: Release) -> list[str]:
    """Return the places in pretrained_models/: a folder named after the repository, the file's own place, the top if free."""
    homes = [f"{release.repo_id.split('/')[1]}/{release.filename}".rstrip("/"), release.home]
    first = next((r for r in RELEASED.values() if r.filename == release.filename), None)
    if release.filename and first == release and release.bare:
        homes.append(release.filename)
    return homes


def weights_folders() -> list[Path]:
    return [Path.cwd() / WEIGHTS, _ROOT / WEIGHTS]


def _unknown(name: str | Path, path: Path) -> str:
    names = list(dict.fromkeys((Path(r.filename).name if r.bare else r.name) or r.repo_id for r in RELEASED.values()))
    close = [path.name] if path.name in names else difflib.get_close_matches(path.name, names, n=3)
    hint = (
        f"did you mean the released {' or '.join(close)}" if close else f"{WEIGHTS}/README.md lists the released ones"
    )
    return f"no file {name}, neither as a path nor in {WEIGHTS}/; {hint}"


def _cached(release: Release) -> Path | None:
    """Return the file in the hub's own cache, where another program has already fetched it."""
    import huggingface_hub

    found = release.filename and huggingface_hub.try_to_load_from_cache(release.repo_id, release.filename)
    return Path(found) if isinstance(found, str) and found else None


def _download(release: Release) -> Path:
    import huggingface_hub
    from filelock import FileLock
    from huggingface_hub import constants, errors

    folder = next((folder for folder in weights_folders() if folder.is_dir()), weights_folders()[0])
    target = folder / release.home
    by_hand = f"{BY_HAND}{release.address} and put it at {target}"
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(f"{release.name} is not on this disk and HF_HUB_OFFLINE is set. {by_hand}")
    staging = folder / ".incoming" / release.name.replace("/", "--")
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{staging}.lock"):
            if target.exists():
                return target
            # Not straight to its place: a name in pretrained_models/ has to mean a complete file or folder.
            if release.filename:
                got = huggingface_hub.hf_hub_download(release.repo_id, release.filename, local_dir=staging)
            else:
                wanted = list(release.files)
                got = huggingface_hub.snapshot_download(release.repo_id, local_dir=staging, allow_patterns=wanted)
                shutil.rmtree(staging / ".cache", ignore_errors=True)
            os.replace(got, target)
            shutil.rmtree(staging, ignore_errors=True)
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"could not reach the hub for {release.name} ({error.__cause__}). {by_hand}") from error
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError) as error:
        why = f"the hub has no {release.name}, or does not show it without a login ({release.address})"
        raise FileNotFoundError(why) from error
    except Exception as error:  # which network errors there are depends on the HTTP library below the hub's
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise OSError(error.errno, f"could not write {target} ({error.strerror})") from error
        raise ConnectionError(f"the download of {release.name} failed ({error}). {by_hand}") from error
    return target
