"""A run directory: one fixed folder that is the identity of a run, on however many attempts and machines.

It holds the resolved `config.yaml`, metrics, pictures, `checkpoints/step=*.ckpt` and, at the end,
`finished.json`. Opening one decides between a new run, a resumed one and a finished one, and refuses a folder
that holds another run. What a checkpoint contains lives with the callbacks.
"""

import copy
import difflib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.schema import as_run_keys, takes_anything
from files.atomic import write_atomically
from runtime.overrides import required_kind, suggestion
from scenes.json_form import parse_json

# What may change between two attempts of one run: where it runs, how long, what is written down on the way.
# Every other key decides which samples are seen or what is learnt from them.
CHANGEABLE = (
    "run",  # the folder may have moved
    "plan",
    "planning",
    "paths",
    "logger",
    "callback",
    "data.workers",
    "data.cache",
    "data.cache_bytes",
    "data.max_bad_fraction",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.launcher",
    "trainer.timeout_minutes",
    "trainer.accumulate",
    "trainer.micro_batch",
    "trainer.compile",
    "trainer.gradient_checkpointing",
    "trainer.channels_last",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.log_every",
    "trainer.save_every",
    "trainer.save_minutes",
    "trainer.validate_every",
    "trainer.keep",
    "trainer.keep_best",
    "trainer.requeue",
)
ABSENT = "absent"
SHOWN = 3  # differing keys that a refusal names


class RunError(ValueError):
    """A run directory that cannot be used as asked; its message is one line."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What opening a run directory found."""

    state: Literal["new", "resumed", "finished"]
    checkpoint: Path | None = None  # where a resumed attempt goes on; None: from the start
    message: str = ""  # one line to say to the caller

    @property
    def step(self) -> int:
        """The optimizer step that a resumed attempt goes on from."""
        return 0 if self.checkpoint is None else _step(self.checkpoint)


class RunDirectory:
    """The folder of one run.

    Args:
        path: The folder; it need not be there yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """The resolved configuration of the first attempt."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of `step=*.ckpt`."""
        return self.path / "checkpoints"

    @property
    def finished_file(self) -> Path:
        """Says at which step the run ended."""
        return self.path / "finished.json"

    def open(self, cfg: DictConfig) -> Attempt:
        """Starts or goes on with the run; a new one gets its folder and `config.yaml`.

        Args:
            cfg: The composed configuration of this attempt.

        Returns:
            Whether there is anything to do, and from where.
        """
        attempt = self.inspect(cfg)
        if attempt.state == "new":
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config_file, OmegaConf.to_yaml(OmegaConf.create(_resolved(cfg))).encode())
        return attempt

    def inspect(self, cfg: DictConfig) -> Attempt:
        """Finds what `open` would do, writing nothing.

        Args:
            cfg: The composed configuration of this attempt.

        Returns:
            Whether there is anything to do, and from where.

        Raises:
            RunError: The folder holds something else, or a run with another configuration.
        """
        if not self.config_file.exists():
            if self.path.is_file() or list(self.path.glob("[!.]*")):
                raise RunError(f"run={self.path}: not empty and holds no run (no config.yaml); name a new folder")
            return Attempt(state="new", message=f"{self.path}: a new run")
        self._refuse_another(cfg)
        step = self.finished_step()
        if step is not None and step >= cfg.trainer.max_steps:
            advice = "raise trainer.max_steps to train on, or evaluate it: python evaluate.py run="
            return Attempt(state="finished", message=f"{self.path}: finished at step {step}; {advice}{self.path}")
        checkpoint = self.newest_checkpoint()
        where = checkpoint.name if checkpoint else "its start: it has no checkpoint"
        return Attempt(state="resumed", checkpoint=checkpoint, message=f"{self.path}: goes on from {where}")

    def newest_checkpoint(self) -> Path | None:
        """The whole checkpoint of the highest step; torn ones are passed over with a warning."""
        files = {path: _step(path) for path in self.checkpoints.glob("step=*.ckpt")}
        named = [path for path, step in files.items() if step >= 0]
        for path in sorted(named, key=files.__getitem__, reverse=True):
            if is_whole(path):
                return path
            warnings.warn(f"{path}: torn, perhaps by a kill while it was written; passed over", stacklevel=2)
        return None

    def finished_step(self) -> int | None:
        """The step at which the run ended; None while it has not."""
        if not self.finished_file.exists():
            return None
        try:
            return int(parse_json(self.finished_file.read_bytes())["step"])
        except (ValueError, TypeError, KeyError):
            raise RunError(f"run={self.path}: {self.finished_file.name} says no step; remove it to go on") from None

    def stored_config(self) -> DictConfig:
        """The configuration of the first attempt.

        Returns:
            What its file holds, interpolations as they are.

        Raises:
            RunError: There is none, or it cannot be read.
        """
        what = f"run={self.path}: its {self.config_file.name}"
        try:
            stored = OmegaConf.load(self.config_file)
        except (YAMLError, UnicodeDecodeError, RecursionError, OmegaConfBaseException) as error:
            raise RunError(f"{what} is no YAML ({_one_line(error)}); restore it, or name another folder") from None
        if not isinstance(stored, DictConfig) or "run" not in stored:
            raise RunError(f"{what} is no configuration of a run; restore it, or name another folder")
        return stored

    def finish(self, step: int) -> None:
        """Writes down that the run has ended.

        Args:
            step: The optimizer step it ended at.
        """
        write_atomically(self.finished_file, (json.dumps({"step": step}) + "\n").encode())

    def _refuse_another(self, cfg: DictConfig) -> None:
        """Refuses a configuration that is not this run's."""
        stored = OmegaConf.to_container(self.stored_config())
        differing = list(_differences(stored, _resolved(cfg), OmegaConf.to_container(cfg)))
        if not differing:
            return
        shown = "; ".join(f"{key} was {was}, now {now}" for key, was, now in differing[:SHOWN])
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise RunError(f"run={self.path}: holds a run with another configuration ({shown}{more}); name a new folder")


def load_run_config(run: str | Path, overrides: DictConfig | None = None) -> DictConfig:
    """Reloads the configuration that a run was trained with and lays over it what is set to other than null.

    An overriding node that is empty or names its own `_target_` (a group option was chosen) replaces the
    run's; any other is laid over it key by key, and each key must be one that the run has. The run's
    interpolations were resolved when it began: an override reaches its own key alone.

    Args:
        run: The run directory.
        overrides: The configuration of evaluate or sample, of which only the keys that a run owns are taken;
            or a plain one, taken whole.

    Returns:
        The run's configuration, resolved, with `run` as given here.

    Raises:
        RunError: The folder holds no run.
    """
    file = RunDirectory(run).config_file
    if not file.is_file():
        raise RunError(f"run={run}: holds no run (no config.yaml){_runs_beside(Path(run))}")
    cfg = RunDirectory(run).stored_config()
    if overrides is not None:
        plain = OmegaConf.to_container(overrides, resolve=False)
        assert isinstance(plain, dict)
        owned = as_run_keys(OmegaConf.get_type(overrides)) or plain
        lay_over(cfg, {str(key): plain[key] for key in owned})
    cfg.run = str(run)
    OmegaConf.resolve(cfg)
    OmegaConf.set_struct(cfg, True)
    return cfg


def lay_over(cfg: DictConfig, overrides: Mapping[str, Any]) -> None:
    """Sets what overrides set to other than null, key by key; a node that is empty or has its own `_target_` comes whole.

    Args:
        cfg: The configuration, changed in place.
        overrides: Plain values, nested as the configuration.

    Raises:
        RunError: The configuration has no such key, or a value of another type there.
    """
    _lay_over(cfg, overrides, copy.deepcopy(cfg))


def is_whole(path: Path) -> bool:
    """Whether a file that torch saved is all there, told from its directory without reading the tensors.

    torch's files are zip archives: the directory stands at the end, and names where each entry begins.

    Args:
        path: The file.

    Returns:
        False for a file cut short or with a hole where an entry should begin.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = archive.infolist()
            for entry in entries:
                file.seek(entry.header_offset)
                if file.read(4) != b"PK\x03\x04":
                    return False
            return bool(entries)
    except (zipfile.BadZipFile, OSError):
        return False


def _lay_over(node: DictConfig, overrides: Mapping[str, Any], stored: DictConfig, at: str = "") -> None:
    for key, value in overrides.items():
        path = f"{at}{key}"
        if value is None:
            continue
        if key not in node:
            raise RunError(f"{path}={value}: the run has no such key; {suggestion(path, stored)}")
        if isinstance(value, dict) and value and "_target_" not in value and isinstance(node[key], DictConfig):
            _lay_over(node[key], value, stored, f"{path}.")
            continue
        right = node[key]
        node[key] = value
        if not takes_anything(path) and (kind := required_kind(node[key], right)):
            raise RunError(f"{path}={value}: must be {kind}, as the run's {right}")


def _differences(was: Any, now: Any, raw: Any, at: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields each differing dotted key with both values, in the order of the stored configuration.

    `raw` is `now` with its interpolations: what is made of changeable keys alone may change with them.
    """
    if was == now or _is_changeable(at):
        return
    if isinstance(was, dict) and isinstance(now, dict):
        raw = raw if isinstance(raw, dict) else {}
        for key in [*was, *(key for key in now if key not in was)]:
            path = f"{at}.{key}" if at else str(key)
            yield from _differences(was.get(key, ABSENT), now.get(key, ABSENT), raw.get(key), path)
        return
    owners = re.findall(r"\$\{([\w.]+)\}", raw) if isinstance(raw, str) else []
    if not owners or not all(map(_is_changeable, owners)):
        yield at, _short(was), _short(now)


def _is_changeable(path: str) -> bool:
    return any(path == key or path.startswith(f"{key}.") for key in CHANGEABLE)


def _one_line(error: Exception) -> str:
    """What a parser has against a file, cut to a line."""
    return _short(" ".join(str(error).split())) or type(error).__name__


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _step(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 for another name."""
    found = re.fullmatch(r"step=(\d+)", checkpoint.stem)
    return int(found[1]) if found else -1


def _runs_beside(path: Path) -> str:
    """The end of a sentence that names the runs in the same folder, the nearest first."""
    names = sorted(file.parent.name for file in path.parent.glob("*/config.yaml"))
    if not names:
        return "; train one: python train.py run=DIR"
    near = difflib.get_close_matches(path.name, names, n=1)
    guess = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"{guess} (have: {', '.join(str(path.parent / name) for name in names)})"
