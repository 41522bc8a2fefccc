"""Leftovers of the stages of scripts/quickstart.sh, for the reports: the samples, and the seconds of each stage."""

from pathlib import Path


def newest_file(folder: str, pattern: str) -> Path:
    """Return the newest file of a pattern. Raises FileNotFoundError where there are no finished samples."""
    found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} has no {pattern}: run the sampling script with --sample-dir {folder} first")
    return found[-1]


def stage_seconds(path: Path) -> dict[str, float]:
    """Return the seconds of each stage over all calls, and their total."""
    seconds: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        stage, value = line.split("\t")
        seconds[stage] = seconds.get(stage, 0) + float(value)
    return {**seconds, "total": sum(seconds.values())}
