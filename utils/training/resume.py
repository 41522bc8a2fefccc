"""Beginning of a run: its folder, and the state it resumes from."""

from argparse import Namespace
from typing import cast

from utils.checkpoint import Checkpoint
from utils.distributed import Distributed
from utils.errors import AgreedError
from utils.origin import require_same
from utils.runs import Run
from utils.training.run_folder import open_run, require_writable
from utils.training.run_log import RunLogger
from utils.training.shards import ShardedCheckpoint
from utils.training.state import TrainingState

_ORIGIN = ("tokenizer", "classes", "text_encoder")


def open_run_together(args: Namespace, name: str, dist: Distributed, sharded: bool) -> tuple[Run, bool]:
    """Return `open_run`'s run of the first process. Raises the same error on all where one of them cannot write to it."""
    opened = None
    with dist.together():
        opened = open_run(args, name, sharded) if dist.is_main else None
    run, resumed = cast(tuple[Run, bool], dist.broadcast(opened))
    if sharded:  # every process writes its shards
        with dist.together():
            require_writable(run.stores[0])
    return run, resumed


def resume(state: TrainingState, run: Run, args: Namespace, dist: Distributed, log: RunLogger) -> bool:
    """Take over the run's newest readable checkpoint; return False where the run was stopped before its first.

    Raises ValueError where it has checkpoints and none can be read, or they do not fit the run as it is now.
    """
    found = dist.broadcast(run.checkpoints())
    for path in found:
        saved = failure = None
        try:
            saved = state.read(path, dist)
        except (ValueError, OSError) as error:
            failure = error
        failure = dist.first_failure(failure)
        if failure or saved is None:
            log.warning(f"{failure} Trying the checkpoint before it.")
            continue
        changed = ", ".join(run.changed_flags(args))
        flags = f"the flags it began with (other now: {changed or 'none'})"
        _require_same(saved, state, (*_ORIGIN, "codes"), args, "give the run's own data, or leave out --resume", log)
        made_by = ("layout", "conditions", "objective", "reference", "lora", "base")
        _require_same(saved, state, made_by, None, f"give {flags}, or leave out --resume", log)
        try:
            _take(saved, state, args, log)
        except ValueError as error:
            reason = str(error).splitlines()[0].rstrip(":")
            raise ValueError(f"{reason}; give {flags}, or another --results-dir for another model") from error
        log.info(f"resuming {run.folder} at step {state.step} from {path}")
        if changed:
            log.info(f"with other flags than it began with: {changed}")
        return True
    if found:
        raise ValueError(f"no checkpoint of {run.folder} can be read; to start anew, leave out --resume")
    log.info(f"{run.folder} has no checkpoint yet: starting at its beginning")
    return False


def start_from(saved: Checkpoint | ShardedCheckpoint, state: TrainingState, args: Namespace, log: RunLogger) -> bool:
    """Begin a new run with a checkpoint; return False where it has weights alone."""
    _require_same(saved, state, _ORIGIN, args, "give weights of a run on such codes, or --finetune", log)
    whole = _take(saved, state, args, log)
    log.info(f"starting from {saved.path}, {f'step {state.step}' if whole else 'its weights alone'}")
    return whole


def _take(saved: Checkpoint | ShardedCheckpoint, state: TrainingState, args: Namespace, log: RunLogger) -> bool:
    """Take over a checkpoint; return False where it has weights alone. Averages that began with a fixed decay keep it."""
    whole, flags = state.take(saved, args.global_batch_size), saved.args or {}
    began_fixed = flags.get("ema") and flags.get("ema_warmup", False) is False
    if whole and state.ema and began_fixed and args.ema_warmup is None:
        args.ema_warmup = False
        log.info(f"averages keep the fixed decay {state.ema.decay} they began with; --ema-warmup warms it up")
    return whole


def _require_same(
    saved: Checkpoint | ShardedCheckpoint,
    state: TrainingState,
    keys: tuple[str, ...],
    args: Namespace | None,
    remedy: str,
    log: RunLogger,
) -> None:
    """Raise AgreedError where a checkpoint's config differs from that of this run in one of the keys.

    What the checkpoint alone records, the run records too. args: of keys that belong to the data, else None.
    """
    config = saved.config
    if "objective" in state.config:  # files that do not say were all trained by cross-entropy
        config = {"objective": "cross_entropy", **config}
    other = "these flags" if args is None else getattr(args, "code_path", None) or "this run's data"
    try:
        unknown = require_same(config, state.config, keys, (str(saved.path), other), remedy)
    except ValueError as error:
        raise AgreedError(str(error)) from error
    if unknown:
        silent = saved.path if all(saved.config.get(key) is None for key in unknown) else f"{saved.path} or {other}"
        log.info(f"{silent} records no {' and no '.join(unknown)}: not compared")
        state.config |= {key: saved.config[key] for key in unknown if saved.config.get(key) is not None}
