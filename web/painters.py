"""The weights that a page can draw with: every run of a folder that has a checkpoint, and those that the command line names.

A run is loaded when it is first drawn with; a few stay in memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from runtime.run_config import restored_config
from runtime.run_directory import RunDirectory, load_run_config
from sampling.painter import Painter


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Weights to draw with.

    Attributes:
        title: What people choose it by.
        method: Its conditioning methods, joined by +; "none" for a backbone by itself.
        run_cfg: Its configuration.
        path: The run's folder, or the file.
    """

    title: str
    method: str
    run_cfg: DictConfig
    path: Path

    @property
    def file(self) -> Path | None:
        """The file whose weights draw now; a run that trains on has a newer one later."""
        return self.path if self.path.is_file() else RunDirectory(self.path).newest_checkpoint()


def choices(cfg: DictConfig) -> list[Choice]:
    """Everything that a page can draw with.

    Args:
        cfg: What `app.py` was asked for: `paths.runs`, whose runs are looked at; `run` or `weights`, which comes first;
            `sampler` and `trainer`, which lie over those of each.

    Returns:
        At least one; what is named first, then the runs by name.

    Raises:
        ValueError: There is none.
    """
    over = {key: cfg[key] for key in ("sampler", "trainer")}
    runs = [] if cfg.run is None else [Path(cfg.run)]
    runs += [file.parent for file in sorted(Path(cfg.paths.runs).glob("*/config.yaml")) if file.parent not in runs]
    found = []
    if cfg.weights is not None:
        run_cfg, path = restored_config(cfg), Path(cfg.weights)
        found.append(Choice(title=f"{path} ({_method(run_cfg)})", method=_method(run_cfg), run_cfg=run_cfg, path=path))
    for run in runs:
        if str(run) != cfg.run and not any(RunDirectory(run).checkpoints.glob("step=*.ckpt")):
            continue
        run_cfg = load_run_config(run, DictConfig(over))
        found.append(Choice(title=f"{run} ({_method(run_cfg)})", method=_method(run_cfg), run_cfg=run_cfg, path=run))
    if not found:
        raise ValueError(
            f"paths.runs={cfg.paths.runs}: holds no run with a checkpoint; train one with python train.py run=runs/demo, or name "
            "weights with run=DIR or weights=FILE backbone=NAME"
        )
    return found


class Painters:
    """What draws with the choices, one picture at a time.

    Args:
        kept: How many stay in memory; the one that was not used for longest goes first.
    """

    def __init__(self, *, kept: int) -> None:
        self._kept = kept
        self._loaded: OrderedDict[tuple[Path, Path | None], Painter] = OrderedDict()
        self.lock = threading.Lock()  # models are swapped to their averaged weights while they draw

    def of(self, choice: Choice) -> Painter:
        """What draws with the newest weights of a choice.

        Args:
            choice: One of `choices`.

        Returns:
            The painter, from memory where it is there.
        """
        key = choice.path, choice.file
        if key not in self._loaded:
            self._loaded[key] = Painter(choice.run_cfg)
        self._loaded.move_to_end(key)
        while len(self._loaded) > self._kept:
            self._loaded.popitem(last=False)
        return self._loaded[key]


def _method(run_cfg: DictConfig) -> str:
    return "+".join(map(str, run_cfg.conditioning)) or "none"
