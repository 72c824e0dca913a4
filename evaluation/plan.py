"""The first stage of an evaluation: which scenes, metrics, folders and processes there are, and what cannot be measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from evaluation.rows import batches_of
from evaluation.settings import Places, places_of, protocol_of
from metrics.base import Metric, NotAvailable
from runtime.launch.device import device_of, place_rank
from runtime.launch.ranks import Ranks, ranks_of
from sampling.scene_split import SceneSplit, made_shards, split_of_files, split_of_shards, square_transform


@dataclass(kw_only=True)
class Evaluation:
    """One evaluation, as one process sees it.

    Attributes:
        protocol: As `protocol_of` gives it.
        split: The scenes.
        ranks: Which process this is.
        places: Where things go.
        device: Where metrics work.
        nodes: The metrics' configuration by name.
        not_measured: Why a metric gives no value, by name.
        seconds: What took how long in this process.
    """

    protocol: Mapping[str, Any]
    split: SceneSplit
    ranks: Ranks
    places: Places
    device: torch.device
    nodes: Mapping[str, Any]
    not_measured: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def batches(self) -> list[range]:
        """This process's batches of places."""
        return self.ranks.share(batches_of(len(self.split.scenes), self.protocol["batch_size"]))

    def metric(self, name: str) -> Metric:
        """A metric as its configuration says; its models are not loaded yet."""
        try:
            return instantiate(self.nodes[name], _convert_="all")
        except InstantiationException as error:
            if isinstance(error.__cause__, NotAvailable):
                raise error.__cause__ from error
            raise

    def leave_out(self, name: str, reason: object) -> None:
        """Notes and says that a metric gives no value."""
        self.not_measured[name] = " ".join(str(reason).split())
        print(f"{name}: not measured: {self.not_measured[name]}", flush=True)

    def bar(self, total: int, what: str, unit: str) -> tqdm:
        """A progress bar, of the first process alone."""
        return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, disable=self.ranks.rank > 0)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds that the block takes."""
        start = time.monotonic()
        yield
        self.seconds[what] = round(self.seconds.get(what, 0.0) + time.monotonic() - start, 2)


def plan(
    cfg: DictConfig,
    run_cfg: DictConfig | None,
    *,
    job: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Evaluation:
    """Open the scenes of an evaluation and note the metrics that cannot be measured on them.

    Args:
        cfg: What `evaluate.py` was asked for.
        run_cfg: What pictures are drawn with; None where pictures are given.
        job: The name of a sweep's job.
        environment: Tells this process's rank.

    Returns:
        The evaluation, nothing drawn or measured yet.

    Raises:
        ValueError: The split cannot be read, or settings contradict each other.
    """
    ranks = ranks_of(environment)
    if run_cfg is not None:
        place_rank(run_cfg, ranks)
    protocol = protocol_of(cfg)
    if cfg.images is not None and cfg.refiner is not None:
        raise ValueError(f"refiner: images={cfg.images} are scored as they are; leave the refiner out")
    evaluation = Evaluation(
        protocol=protocol,
        split=open_split(cfg, run_cfg, ranks),
        ranks=ranks,
        places=places_of(cfg, job),
        device=_device(run_cfg, ranks),
        nodes=cfg.metric,
    )
    _leave_out_at_once(evaluation, one_seed=cfg.images == "real")
    return evaluation


def open_split(cfg: DictConfig, run_cfg: DictConfig | None, ranks: Ranks | None = None) -> SceneSplit:
    """The scenes of an evaluation: those of `scenes`, else of the protocol's shards, which are made where it says how.

    Args:
        cfg: What `evaluate.py` was asked for.
        run_cfg: What pictures are drawn with: scenes become square as its data did, at its pictures' size. None: as the
            protocol says.
        ranks: Which process this is; None is the only one.

    Returns:
        The split.

    Raises:
        ValueError: There are fewer scenes than are asked for, or more than the protocol's filter leaves.
    """
    protocol = protocol_of(cfg)
    data = {} if run_cfg is None else run_cfg.data
    size = protocol["size"] if run_cfg is None else run_cfg.backbone.get("resolution")
    transform = square_transform(data, size, protocol["transform"])
    if cfg.scenes is not None:
        return split_of_files(cfg.scenes, transform, count=protocol["scenes"])
    made_shards(instantiate(cfg.protocol, _convert_="all"), ranks or Ranks())
    split = split_of_shards(protocol["shards"], transform, count=protocol["scenes"])
    if protocol["expected"] is not None and split.whole > protocol["expected"]:
        raise ValueError(
            f"protocol.expected: {protocol['shards']} holds {split.whole} scenes, and {protocol['name']} has "
            f"{protocol['expected']}; prepare it with its filter, or set protocol.expected=null"
        )
    return split


def _device(run_cfg: DictConfig | None, ranks: Ranks) -> torch.device:
    """Where metrics work: the run's device, else a GPU where there is one."""
    if run_cfg is not None:
        return device_of(run_cfg.trainer)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", ranks.local % count) if count else torch.device("cpu")


def _leave_out_at_once(evaluation: Evaluation, *, one_seed: bool) -> None:
    """Notes the metrics of which it is known before anything is drawn that they cannot be measured."""
    one_seed = one_seed or len(evaluation.protocol["seeds"]) < 2
    for name in evaluation.nodes:
        try:
            metric = evaluation.metric(name)
            metric.settings()
        except NotAvailable as error:
            evaluation.leave_out(name, error)
            continue
        missing = sorted(metric.requires - evaluation.split.provides - ({"image"} if evaluation.split.true else set()))
        if missing:
            have = ", ".join(sorted(evaluation.split.provides))
            evaluation.leave_out(
                name, f"requires {', '.join(missing)}, and {evaluation.split.name} has only {have}; take another split"
            )
        elif metric.compares and evaluation.split.true is None:
            evaluation.leave_out(
                name, f"compares with true pictures, and {evaluation.split.name} has none; give shards with pictures"
            )
        elif metric.pairs and one_seed:
            evaluation.leave_out(name, "needs two pictures of a scene; give protocol.seeds=[0,1]")
