"""What `prepare.py` does: one function for each task."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from datamodules.shards import ShardError, check_shards, write_shards


def convert(cfg: DictConfig) -> None:
    """Writes a source as shards, whole or not at all."""
    source = instantiate(cfg.source, _convert_="all")
    with tqdm(total=len(source), unit="scene", dynamic_ncols=True) as bar:
        write_shards(source, cfg.out, shard_size=cfg.shard_size, progress=lambda done, _total: bar.update(done - bar.n))
    print(f"{cfg.out}: {len(source)} scenes")


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
