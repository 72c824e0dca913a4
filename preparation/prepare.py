"""What `prepare.py` does: one function for each task of its own, and one for every stage of `conf/stage`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from datamodules.shard_index import ShardError, read_index
from datamodules.shard_writer import Progress, TooManyBad
from preparation.runner import check_requires, run_stage
from preparation.work import Report
from runtime.launch.ranks import Ranks, ranks_of

if TYPE_CHECKING:
    import torch


def convert(cfg: DictConfig, *, environment: Mapping[str, str] = os.environ) -> None:
    """Write a source as shards, or resume that, and print what is in them and what is not.

    Args:
        cfg: what `prepare.py` was asked for: `source`, `out`, `shard_size`, `shard_bytes`, `max_bad_fraction`.
        environment: tells this process's rank.

    Raises:
        TooManyBad: too many samples could not be read; each is listed on stderr.
        ShardError: a shard could not be made; the table on the terminal says why.
    """
    from preparation.conversion import convert_source

    ranks = _ranks(environment)
    source = instantiate(cfg.source, _convert_="all")
    with _told(cfg, ranks) as progress:
        report = convert_source(
            source,
            cfg.out,
            shard_size=cfg.shard_size,
            shard_bytes=cfg.shard_bytes,
            ranks=ranks,
            max_bad_fraction=cfg.max_bad_fraction,
            progress=progress,
        )
    _end(cfg, ranks, report)


def make(cfg: DictConfig, *, environment: Mapping[str, str] = os.environ) -> None:
    """Make shards of shards by the stage that the task names, or resume that.

    Args:
        cfg: what `prepare.py` was asked for: `stage`, `shards`, `out`, `max_bad_fraction`, `accelerator`.
        environment: tells this process's rank.

    Raises:
        TooManyBad: too many samples could not be read; each is listed on stderr.
        ShardError: a shard could not be made; the table on the terminal says why.
    """
    ranks = _ranks(environment)
    stage = instantiate(cfg.stage, _convert_="all")
    check_requires(stage, frozenset(read_index(cfg.shards)["provides"]), cfg.shards)  # before a model is loaded
    stage = stage.to(_device(cfg.accelerator, ranks))
    with _told(cfg, ranks) as progress:
        report = run_stage(
            stage, cfg.shards, cfg.out, ranks=ranks, max_bad_fraction=cfg.max_bad_fraction, progress=progress
        )
    _end(cfg, ranks, report)


def check(cfg: DictConfig, *, environment: Mapping[str, str] = os.environ) -> None:
    """Read every byte of the shards again, compare, and look at every scene and picture.

    Args:
        cfg: what `prepare.py` was asked for; `shards` is the folder to read.
        environment: tells this process's rank, whose share is checked.

    Raises:
        ShardError: something differs or is wrong; the report names it.
    """
    from preparation.checking import check_folder

    ranks = _ranks(environment)
    with _told(cfg, ranks) as progress:
        report = check_folder(cfg.shards, ranks=ranks, progress=progress)
    print(report)
    if report.faults:
        raise ShardError(
            f"shards={cfg.shards}: {len(report.faults)} faults (the first: {report.faults[0]}); prepare it again"
        )


def stats(cfg: DictConfig) -> None:
    """Count what is in shards, and draw charts of it.

    Args:
        cfg: what `prepare.py` was asked for: `shards`, `out`.
    """
    from preparation.statistics import told, write_statistics

    with _told(cfg, Ranks()) as progress:
        found = write_statistics(cfg.shards, cfg.out, progress=progress)
    print(told(found))
    print(f"{cfg.out}: statistics.json and charts")


def export(cfg: DictConfig) -> None:
    """Write the labels of shards, or their latents and boxes, or their scene graphs, as published files.

    Args:
        cfg: what `prepare.py` was asked for: `shards`, `out`, `export`, `accelerator`.
    """
    node = cfg.export
    if node.form == "igligen":
        from preparation.export_igligen import export_igligen

        counts = export_igligen(cfg.shards, cfg.out, latents=node.latents, seed=node.seed, sizes=node.sizes)
    elif node.form == "laion_sg":
        from preparation.export_laion_sg import export_laion_sg

        counts = export_laion_sg(cfg.shards, cfg.out, pictures=node.pictures)
    else:
        from preparation.export_labels import clip_embedding, export_labels

        embed = None
        if node.text_encoder is not None:
            embed = clip_embedding(node.text_encoder, device=_device(cfg.accelerator, Ranks()))
        counts = export_labels(
            cfg.shards, cfg.out, form=node.form, pictures=node.pictures, whole_pixels=node.whole_pixels, embed=embed
        )
    print(f"{cfg.out}: {', '.join(f'{number} {what}' for what, number in counts.items())}")


TASKS: dict[str, Callable[[DictConfig], None]] = {"convert": convert, "stats": stats, "check": check, "export": export}


def prepare(cfg: DictConfig) -> None:
    """Run the task that the configuration names.

    Args:
        cfg: what `prepare.py` was asked for.
    """
    TASKS.get(cfg.task, make)(cfg)


def told(out: str, index: dict[str, Any]) -> str:
    """Return what is in the shards and what was left out, in a few lines, as `index.json` says."""
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


def _ranks(environment: Mapping[str, str]) -> Ranks:
    """Return this process's rank; the elements of a job array share the work unless Hydra made the array of a sweep's jobs."""
    is_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return ranks_of(environment, arrays=not is_sweep)


def _device(accelerator: str, ranks: Ranks) -> torch.device:
    """Return the device of this rank: of several GPUs each process of a machine takes another."""
    import torch

    count = torch.cuda.device_count() if accelerator != "cpu" and torch.cuda.is_available() else 0
    if accelerator == "gpu" and count == 0:
        raise ValueError("accelerator=gpu: torch finds no GPU here; set accelerator=cpu")
    return torch.device("cuda", ranks.local % count) if count else torch.device("cpu")


@contextmanager
def _told(cfg: DictConfig, ranks: Ranks) -> Iterator[Progress]:
    """Show a bar with rate and time left; where too much is bad, print a line for each sample."""
    title = f"{cfg.task} {ranks.rank + 1}/{ranks.count}" if ranks.count > 1 else cfg.task
    try:
        with tqdm(unit="scene", dynamic_ncols=True, desc=title) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield advance
    except TooManyBad as error:
        print("\n".join(error.skipped), file=sys.stderr)
        raise


def _end(cfg: DictConfig, ranks: Ranks, report: Report) -> None:
    """Print what was made; a shard that failed ends the process with an error."""
    if report.index is not None:
        print(told(cfg.out, report.index))
    print(report)
    if report.failed:
        left = len(report.failed) + len(report.not_begun)
        raise ShardError(
            f"out={cfg.out}: {left} of {report.pieces} shards are missing (the first: {report.failed[0][0]}: "
            f"{report.failed[0][1]}); fix what is listed above and run the same again, which makes these alone"
        )
    if report.elsewhere:
        print(
            f"{cfg.out}: the index follows when the other processes have ended; if one was killed, run the same again"
        )
