"""`sample.py again=PICTURE`: what a picture says of itself, as the configuration that makes it again.

A picture may come from anyone. So nothing in it is looked up, and only classes are built that `conf/` or the run that draws has
in the same group. How a record lies in a picture is in `picture_record.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from runtime.composition import CONF, check_values
from runtime.overrides import reason
from runtime.run_directory import RunDirectory, lay_over
from sampling.image_record import PictureRecord, file_hash, read_record

GROUPS = ("backbone", "conditioning", "sampler", "trainer", "refiner")
SETTINGS = ("run", "weights", "checkpoint", "form", "seeds", "guidances", "inpaint", "paste_back", *GROUPS)
TRAINER = ("accelerator", "devices", "precision", "matmul")  # what drawing reads of it
_IMPORTED = ("_target_", "module")  # keys whose value names a class


def recorded_settings(run_cfg: DictConfig, **asked: Any) -> dict[str, Any]:
    """The settings of a picture's record.

    Args:
        run_cfg: What drew.
        **asked: Those of `SETTINGS` that the run does not own, as far as they are not null; a node of Hydra's or plain values.

    Returns:
        Plain values for every key of `SETTINGS`.
    """
    nodes = {key: run_cfg[key] for key in GROUPS if key in run_cfg}
    nodes["trainer"] = {key: nodes["trainer"][key] for key in TRAINER}
    return {key: _plain(asked.get(key, nodes.get(key))) for key in SETTINGS}


@dataclass(frozen=True, kw_only=True)
class Again:
    """A picture that is to be made again.

    Attributes:
        cfg: The whole configuration: the picture's, with what the command line sets laid over.
        record: What the picture says of itself.
        weights_sha256: Of the weights that must draw; None where the command line names others.
        is_same: Whether the command line sets nothing that changes what is drawn.
    """

    cfg: DictConfig
    record: PictureRecord
    weights_sha256: str | None
    is_same: bool


def again(cfg: DictConfig) -> Again:
    """What makes a picture again.

    Args:
        cfg: What `sample.py again=PICTURE` was asked for.

    Returns:
        Its configuration and record.

    Raises:
        ValueError: The picture has no record, or one that names what is not here.
    """
    record = read_record(cfg.again)
    stored = record.settings
    wrong = sorted(set(stored) ^ set(SETTINGS)) or [
        key for key in GROUPS if not isinstance(stored[key], dict | type(None))
    ]
    if wrong:
        raise ValueError(f"again={cfg.again}: its settings are broken ({wrong[0]}); draw it with scene=FILE run=DIR")
    names_weights = cfg.run is not None or cfg.weights is not None
    left = {"run", "weights", "checkpoint"} if names_weights else set()
    left |= {"backbone", "conditioning"} if cfg.run is not None else set()
    left |= {"form"} if cfg.guidances is not None else set()
    left |= {"guidances"} if cfg.form in ("sheet", "picture") else set()
    asked = copy.deepcopy(cfg)
    with open_dict(asked):
        for key in (key for key in SETTINGS if key not in left and stored[key] is not None):
            if key in GROUPS:
                _refuse_foreign(cfg, key, stored)
                asked[key] = _laid(key, stored[key], cfg[key])
            elif cfg[key] is None:
                _take(asked, key, stored[key])
        asked.out = cfg.out or str(Path(cfg.again).with_stem(f"{Path(cfg.again).stem}_again"))
        if not names_weights:
            asked.checkpoint = cfg.checkpoint or _checkpoint(cfg, stored)
    check_values(asked)
    _check_inpaint(cfg, asked, record)
    changes = {*SETTINGS, "scene", "phrases", "caption"} - {"run", "weights", "checkpoint"}
    return Again(
        cfg=asked,
        record=record,
        weights_sha256=None if names_weights or cfg.checkpoint is not None else record.weights_sha256,
        is_same=all(cfg[key] is None for key in changes),
    )


def _take(asked: DictConfig, key: str, value: Any) -> None:
    try:
        asked[key] = value
    except OmegaConfBaseException as error:
        raise ValueError(
            f"again={asked.again}: its settings are broken ({key}: {reason(error)}); give {key}=…"
        ) from None


def _check_inpaint(cfg: DictConfig, asked: DictConfig, record: PictureRecord) -> None:
    """Refuses another picture under the name of the one that was kept outside the boxes."""
    if asked.inpaint is None or cfg.inpaint is not None:
        return
    if not Path(asked.inpaint).is_file() or file_hash(asked.inpaint) != record.inpaint_sha256:
        raise ValueError(
            f"again={cfg.again}: inpaint={asked.inpaint} is not there, or another picture now; name it with inpaint=FILE"
        )


def _checkpoint(cfg: DictConfig, stored: dict[str, Any]) -> str | None:
    """The checkpoint that drew, or None for the newest, whose hash will tell; weights that are not there are refused."""
    run, weights = stored["run"], stored["weights"]
    place = Path(str(run if run is not None else weights))
    if not (RunDirectory(place).config_file if run is not None else place).is_file():
        name = f"run={run}" if run is not None else f"weights={weights}"
        raise ValueError(
            f"again={cfg.again}: the weights that drew it are not there ({name}); name them with run=DIR or weights=FILE"
        )
    if run is None:
        return None
    file = RunDirectory(place).checkpoints / Path(str(stored["checkpoint"])).name
    return str(file) if file.is_file() else None


def _laid(key: str, stored: dict[str, Any], given: DictConfig | None) -> DictConfig:
    """What the picture was made with, under what the command line sets of it; a whole group from there comes alone."""
    node = OmegaConf.create({key: stored})
    if given is not None and (not given or "_target_" in given):
        return given
    lay_over(node, {key: None if given is None else OmegaConf.to_container(given)})
    return node[key]


def _refuse_foreign(cfg: DictConfig, group: str, stored: dict[str, Any]) -> None:
    """Refuses a class that neither `conf/` nor the run has in this group, and a text that would be looked up elsewhere."""
    files = sorted((CONF / group).glob("*.yaml"))
    known = {name for file in files for name in _imported(OmegaConf.to_container(OmegaConf.load(file)))}
    run = cfg.run or stored["run"]
    if run is not None and (config := RunDirectory(run).config_file).is_file():
        known |= set(_imported(OmegaConf.to_container(OmegaConf.load(config)).get(group)))  # type: ignore[union-attr]
    wrong = [name for name in _imported(stored[group]) if name not in known] or [
        text for text in _texts(stored[group]) if "${" in text
    ]
    if wrong:
        raise ValueError(
            f"again={cfg.again}: its {group} names {wrong[0]}, which this project and the run do not have there, so nothing "
            f"of it was run; draw its scene with scene=FILE run=DIR"
        )


def _imported(node: Any) -> Iterator[str]:
    """What a node would import, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in _IMPORTED and value is not None:
                yield str(value)
            yield from _imported(value)
    elif isinstance(node, list):
        for value in node:
            yield from _imported(value)


def _texts(node: Any) -> Iterator[str]:
    """All texts of a node, keys too."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)


def _plain(value: Any) -> Any:
    """A node of Hydra's, at whatever depth, as plain values."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else value
