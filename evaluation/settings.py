"""Which settings an evaluation has: the run's own, the protocol's over them, the command line's over both; and where it goes.

Nothing is loaded here but configurations, so that a wrong key is refused at once.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from runtime.run_config import restored_config

# What a protocol means that leaves a key out: a file of one's own needs a name and shards.
PROTOCOL: dict[str, Any] = {
    "scenes": None,
    "seeds": [0],
    "batch_size": 8,
    "picture_format": "png",
    "size": None,
    "sampler": {},
    "transform": {},
    "arms": ["with_scene", "without_scene", "ceiling", "floor"],
    "filters": [],
    "expected": None,
    "published": {},
    "implementations": {},
    "make": None,
}
ARMS = tuple(PROTOCOL["arms"])
_LONGEST = 120  # characters of a job's folder name
_ELSEWHERE = ("run", "weights", "out", "protocol", "true_rows")  # overrides that a job's folder shows in another way
_NO_NUMBER = ("paths.", "report.", "trainer.accelerator", "trainer.devices", "protocol.batch_size", "hydra")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where an evaluation keeps what it makes.

    Attributes:
        out: Pictures, rows, `metrics.json`, `report.html`.
        true_rows: What metrics keep of true pictures.
    """

    out: Path
    true_rows: Path


def protocol_of(cfg: DictConfig) -> dict[str, Any]:
    """The protocol in plain values, `make` as it stands in the file.

    Args:
        cfg: What `evaluate.py` was asked for.

    Returns:
        Every key of `PROTOCOL`, and those of the file.

    Raises:
        ValueError: No seed, an arm that there is not, or an unknown picture format.
    """
    protocol = PROTOCOL | OmegaConf.to_container(cfg.protocol, resolve=True)  # type: ignore[operator]
    seeds = protocol["seeds"]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"protocol.seeds={seeds}: must be one or more different numbers from 0 up, such as [0,1]")
    if unknown := [arm for arm in protocol["arms"] if arm not in ARMS]:
        raise ValueError(f"protocol.arms={protocol['arms']}: {unknown[0]} is no arm (have: {', '.join(ARMS)})")
    if protocol["picture_format"] not in ("png", "jpg"):
        raise ValueError(f"protocol.picture_format={protocol['picture_format']}: no such format; take png or jpg")
    for name, entry in protocol["implementations"].items():
        if not isinstance(entry, dict) or set(entry) != {"implementation", "beside"}:
            raise ValueError(
                f"protocol.implementations.{name}={entry}: give {{implementation: WHAT, beside: METRIC}}, what made the "
                "published values and which of ours stands beside them"
            )
    for name, least in (("batch_size", 1), ("scenes", 1), ("size", 8)):
        if protocol[name] is not None and protocol[name] < least:
            raise ValueError(f"protocol.{name}={protocol[name]}: must be at least {least}")
    return protocol


def evaluated_config(cfg: DictConfig) -> DictConfig | None:
    """The configuration that pictures are drawn with.

    Args:
        cfg: What `evaluate.py` was asked for.

    Returns:
        The run's, or that of an adapter file, with the protocol's size and sampler and the command line's settings laid over;
        None where neither is named, because pictures are given.
    """
    if cfg.run is None and cfg.weights is None:
        return None
    given = copy.deepcopy(cfg)
    protocol = protocol_of(cfg)
    with open_dict(given):
        given.sampler = _over(protocol["sampler"], cfg.sampler)
        if protocol["size"] is not None:
            given.backbone = _over({"resolution": protocol["size"]}, cfg.backbone)
            if "_target_" in given.backbone:  # another backbone, whose own size is not the protocol's
                given.backbone.resolution = protocol["size"]
    return restored_config(given)


def places_of(cfg: DictConfig, job: str | None = None) -> Places:
    """Where an evaluation goes.

    Args:
        cfg: What `evaluate.py` was asked for.
        job: The name of a sweep's job, which gets a folder of its own; None is no sweep.

    Returns:
        Folders, which need not be there.
    """
    name = str(cfg.protocol.name)
    if cfg.out is not None:
        base = Path(cfg.out)
    elif cfg.run is not None:
        base = Path(cfg.run) / "evaluation" / name
    else:
        what = Path(cfg.weights or cfg.images)
        base = Path(cfg.paths.runs) / "evaluation" / (what.stem or what.name) / name
    true_rows = base / "rows" if cfg.true_rows is None else Path(cfg.true_rows)
    return Places(out=base if job is None else base / job, true_rows=true_rows)


def sweep_job(cfg: DictConfig) -> str | None:
    """The name of the job that a sweep runs now, from what was set for it; None outside a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return job_name(list(HydraConfig.get().overrides.task), has_out=cfg.out is not None)


def job_name(overrides: Sequence[str], *, has_out: bool = False) -> str:
    """A folder name for a job: its overrides, as far as they alter a number.

    Args:
        overrides: As on a command line.
        has_out: The folder is not inside the run, so that the run is part of the name.

    Returns:
        The name; jobs with different overrides have different ones.
    """
    said = []
    for override in sorted(override.lstrip("+~") for override in overrides):
        key, _, value = override.partition("=")
        shown_elsewhere = key in (_ELSEWHERE[2:] if has_out else _ELSEWHERE)
        if not (shown_elsewhere or key.startswith(_NO_NUMBER)) or key == "scenes":
            said.append(f"{key}={value}")
    if has_out:
        said += [override for override in overrides if override.startswith("protocol=")]
    name = quote(",".join(said), safe="=,.[]+-_ ") or "as_the_run"
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name


def _over(protocol: Mapping[str, Any], given: DictConfig | None) -> DictConfig | None:
    """What a protocol sets under what the command line sets; a whole group from there comes alone."""
    if given is not None and "_target_" in given:
        return given
    merged = OmegaConf.merge(OmegaConf.create(dict(protocol)), {} if given is None else given)
    assert isinstance(merged, DictConfig)
    return merged if len(merged) else None
