"""What `prepare.py` does: one function for each task."""

from __future__ import annotations

import sys
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from datamodules.shard_index import read_index
from datamodules.shard_writer import TooManyBad
from datamodules.shards import ShardError, check_shards, write_shards


def convert(cfg: DictConfig) -> None:
    """Writes a source as shards, whole or not at all, and says what is in them and what is not.

    Args:
        cfg: what `prepare.py` was asked for: `source`, `out`, `shard_size`, `max_bad_fraction`.

    Raises:
        TooManyBad: too many samples could not be read; each is listed on stderr.
    """
    source = instantiate(cfg.source, _convert_="all")
    try:
        with tqdm(total=len(source), unit="scene", dynamic_ncols=True) as bar:
            write_shards(
                source,
                cfg.out,
                shard_size=cfg.shard_size,
                max_bad_fraction=cfg.max_bad_fraction,
                progress=lambda done, _total: bar.update(done - bar.n),
            )
    except TooManyBad as error:
        print("\n".join(error.skipped), file=sys.stderr)
        raise
    print(told(cfg.out, read_index(cfg.out)))


def told(out: str, index: dict[str, Any]) -> str:
    """What is in the shards and what was left out, in a few lines, as `index.json` says."""
    counts, left_out = index["counts"], index.get("left_out", {})
    skipped = index.get("skipped", {"samples": 0, "reasons": []})
    dropped = sum(number for reason, number in left_out.items() if reason.startswith("boxes"))
    return "\n".join(
        [
            f"{out}: {counts['samples']} scenes, {counts['objects']} objects, {counts['captions']} captions, "
            f"{dropped} boxes dropped, {skipped['samples']} samples skipped",
            *(f"  left out: {reason}: {number}" for reason, number in left_out.items()),
            *(f"  skipped: {reason}" for reason in skipped["reasons"]),
            *(f"  {note}" for note in index.get("notes", [])),
        ]
    )


def check(cfg: DictConfig) -> None:
    """Reads every byte of the shards again and compares.

    Args:
        cfg: what `prepare.py` was asked for; `shards` is the folder to read.

    Raises:
        ShardError: something differs; the report names it.
    """
    report = check_shards(cfg.shards)
    print(report)
    if not report.ok:
        raise ShardError(f"shards={cfg.shards}: does not match its index; prepare it again")


TASKS = {"convert": convert, "check": check}
