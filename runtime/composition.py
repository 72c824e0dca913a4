"""Composes a script's configuration and refuses what is unknown or ill-typed, in one line.

Typed nodes (`conf/schema.py`) are checked by OmegaConf while Hydra merges. Groups that stand for a class are
compared with the reference: the same defaults list without its experiment, so that the chosen YAML file is
the schema. The comparison lives in `keys.py`, the command line and how an error reaches it in `command.py`.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.schema import TRAINING_ALONE, DataCommon, register
from runtime.overrides import ConfigError, check_keys, contains, reason, suggestion
from runtime.texts import read_texts

NOT_NEGATIVE = ("conditioning.", "callback.")
"""Groups in which no number is below 0."""
LARGEST = 2**63
"""What torch's and numpy's whole numbers do not hold."""
CONF = Path(__file__).resolve().parent.parent / "conf"


def compose(
    config_name: str, overrides: Sequence[str] = (), *, config_dir: str | None = None, complete: bool = True
) -> DictConfig:
    """Composes `conf/<config_name>.yaml` with overrides and checks the result.

    Args:
        config_name: train, evaluate, prepare or sample.
        overrides: As on the command line, without flags.
        config_dir: A further folder of configs, searched first.
        complete: Whether a key that still needs a value is refused, and the values are checked.

    Returns:
        The typed configuration, its interpolations unresolved.

    Raises:
        ConfigError: A key or group option is unknown, ill-typed or missing.
        ValueError: A value is out of its range.
    """
    register()
    overrides = [*implied(config_name, overrides, config_dir=config_dir), *overrides]
    with _initialised(config_dir) as loader:
        layers = _Layers.read(loader, config_name, list(overrides))
        try:
            cfg = hydra.compose(config_name, list(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(layers.explain(error)) from error
        known = [(group, name) for group, name in unchosen(cfg) if name in loader.get_group_options(group)]
        for group, name in known:
            layers.refuse_typed(group, name)
        leave_out(cfg, known)  # of another name there is no such option, which check_keys says
        check_keys(cfg, layers.reference, where=layers.source)
    if complete:
        check_values(cfg)
        read_texts(cfg)
    return cfg


def compose_sweep(config_name: str, overrides: Sequence[str], *, config_dir: str | None = None) -> None:
    """Checks the jobs of a sweep before the first one starts.

    Each swept value is composed once, the other sweeps at their first value: linear in the values, where the
    jobs are their product. Of a continuous interval the lower end stands for all.

    Args:
        config_name: As in `compose`.
        overrides: As on the command line, sweeps included.
        config_dir: As in `compose`.
    """
    with _initialised(config_dir) as loader:
        parser = OverridesParser.create(config_loader=loader)
        values = [_swept(override) for override in _parse(parser, list(overrides))]
    first = [options[0] for options in values]
    jobs = [first]
    jobs += [[*first[:i], value, *first[i + 1 :]] for i, options in enumerate(values) for value in options[1:]]
    for job in jobs:
        compose(config_name, job, config_dir=config_dir)


def implied(config_name: str, overrides: Sequence[str], *, config_dir: str | None = None) -> list[str]:
    """What overrides choose without saying so: in prepare, task=NAME the stage of that name.

    Args:
        config_name: As in `compose`.
        overrides: As on the command line, without flags.
        config_dir: As in `compose`.

    Returns:
        The further overrides.
    """
    said = dict(override.split("=", 1) for override in overrides if "=" in override)
    name = said.get("task")
    if config_name != "prepare" or name is None or "stage" in said:
        return []
    folders = [CONF, *([Path(config_dir)] if config_dir is not None else [])]
    return [f"stage={name}"] if any((folder / "stage" / f"{name}.yaml").is_file() for folder in folders) else []


def unchosen(cfg: DictConfig) -> list[tuple[str, str]]:
    """Options of list groups for which something is set though they were not chosen.

    An experiment sets keys of its own methods, callbacks and loggers; where the command line chooses others, these
    keys stay behind as a node without `_target_`, which the option's file would have given.

    Args:
        cfg: A composed configuration with a typed root.

    Returns:
        (group, option), such as ("conditioning", "regions").
    """
    root = OmegaConf.get_type(cfg)
    groups = [entry.name for entry in fields(root) if entry.default_factory is dict] if is_dataclass(root) else []
    nodes = [(group, str(name), node) for group in groups for name, node in cfg[group].items()]
    return [(group, name) for group, name, node in nodes if isinstance(node, DictConfig) and "_target_" not in node]


def leave_out(cfg: DictConfig, options: Sequence[tuple[str, str]]) -> list[str]:
    """Removes what is set for options of list groups.

    Args:
        cfg: A composed configuration, changed in place.
        options: (group, option), as `unchosen` gives them.

    Returns:
        One line for each option, to say so.
    """
    said = []
    for group, name in options:
        chosen = ", ".join(str(other) for other in cfg[group] if (group, other) not in options)
        said.append(f"{group}=[{chosen}]: what the experiment sets for {group}.{name} is left out")
        with open_dict(cfg[group]):
            del cfg[group][name]
    return said


def check_values(cfg: DictConfig) -> None:
    """Refuses a key without a value, and what the typed nodes know to be wrong about their values.

    Args:
        cfg: A composed configuration with a typed root.

    Raises:
        ConfigError: A key needs a value, or a number is not finite, too large, or negative where none can be.
    """
    for path, value in _leaves(OmegaConf.to_container(cfg, resolve=False)):
        if value == MISSING:
            raise ConfigError(f"{path}: needs a value; give it as {path}=VALUE")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}={value}: must be a finite number")
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise ConfigError(f"{path}={value}: must be less than 2**63")
        if path.startswith(NOT_NEGATIVE) and isinstance(value, int | float) and value < 0:
            raise ConfigError(f"{path}={value}: must be 0 or more")
    try:
        OmegaConf.to_object(cfg)
        if isinstance(data := cfg.get("data"), DictConfig) and "shards" in data:
            given = {entry.name: data[entry.name] for entry in fields(DataCommon) if entry.name in data}
            # a list's own interpolations would be looked for in the record
            common = {
                name: OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
                for name, value in given.items()
            }
            OmegaConf.to_object(OmegaConf.merge(DataCommon, common))
    except OmegaConfBaseException as error:
        raise ConfigError(f"data.{error.full_key}: {reason(error)}") from error
    except ValueError as error:  # what a typed node says of its own values
        raise ConfigError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """What a composition is made of, to say where a key came from and which names are right."""

    overrides: list[Override]
    experiments: list[tuple[str, Any]]  # file, content as it lies in the root
    reference: DictConfig

    @classmethod
    def read(cls, loader: ConfigLoaderImpl, config_name: str, overrides: list[str]) -> "_Layers":
        """Reads the files that the overrides choose."""
        parsed = _parse(OverridesParser.create(), overrides)
        for override in parsed:
            _refuse_training_alone(override, config_name)
            _refuse_no_option(override, loader)
        try:
            # As `loader.compute_defaults_list`, but each file is read once for the list and the reference.
            again, files = loader._parse_overrides_and_create_caching_repo(config_name, overrides)
            defaults = create_defaults_list(files, config_name, again, prepend_hydra=True, skip_missing=False).defaults
            plain = [default for default in defaults if not _is_experiment(default)]
            reference = loader._compose_config_from_defaults_list(plain, files)
            experiments = [
                (f"{default.config_path}.yaml", loader._load_single_config(default, files).config)
                for default in defaults
                if _is_experiment(default)
            ]
        except MissingConfigException as error:
            raise ConfigError(_missing_option(error, loader)) from error
        except (HydraException, OmegaConfBaseException, ValueError, YAMLError) as error:
            raise ConfigError(_wrong_defaults(error, loader)) from error
        return cls(overrides=parsed, experiments=experiments, reference=reference)

    def source(self, path: str) -> str:
        """The key with its value as typed, or behind the experiment's file that sets it."""
        for override in reversed(self.overrides):
            key = override.key_or_group
            if path == key or path.startswith(f"{key}.") or key.startswith(f"{path}."):
                return str(override.input_line)
        for file, content in reversed(self.experiments):
            if contains(content, path):
                return f"{file}: {path}"
        return path

    def refuse_typed(self, group: str, name: str) -> None:
        """Refuses an override of an option's key where the option was not chosen."""
        for override in self.overrides:
            if override.key_or_group.startswith(f"{group}.{name}."):
                raise ConfigError(
                    f"{override.input_line}: {name} is not chosen; add it to {group}=[...] or leave this out"
                )

    def explain(self, error: Exception) -> str:
        """One line for what Hydra could not compose."""
        cause = _root_cause(error)
        key = getattr(cause, "full_key", None)
        if key is None or key.startswith("hydra"):
            return _one_line(cause)
        if "not in" in str(cause):
            # An override names more of the path than the part at which OmegaConf stopped.
            typed = [override.key_or_group for override in self.overrides]
            path = next((path for path in typed if path == key or path.startswith(f"{key}.")), key)
            return f"{self.source(path)}: no such key; {suggestion(path, self.reference)}"
        return f"{self.source(key)}: {reason(cause)}"


@contextmanager
def _initialised(config_dir: str | None) -> Iterator[ConfigLoaderImpl]:
    """Hydra with the project's configs, and another folder's before them."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        main = GlobalHydra.instance().hydra
        assert main is not None
        loader = main.config_loader
        assert isinstance(loader, ConfigLoaderImpl)
        if config_dir is not None:
            if not Path(config_dir).is_dir():
                raise ConfigError(f"--config-dir {config_dir}: no such folder")
            search_path = loader.get_search_path()
            search_path.prepend(provider="command-line", path=f"file://{Path(config_dir).resolve()}")
            loader = main.config_loader = ConfigLoaderImpl(config_search_path=search_path)
        yield loader


def _parse(parser: OverridesParser, overrides: list[str]) -> list[Override]:
    """The overrides, parsed; what is no override is refused."""
    try:
        return parser.parse_overrides(overrides)
    except OverrideParseException as error:
        reasons = [line for line in error.message.splitlines() if not line.startswith(("Error parsing", "See http"))]
        advice = f"cannot be read ({reasons[0]})" if "=" in error.override and reasons else "not of the form key=value"
        raise ConfigError(f"{error.override}: {advice}") from error


def _refuse_training_alone(override: Override, config_name: str) -> None:
    """Refuses in an evaluation what only the run's training has read: it would change nothing."""
    key = override.key_or_group.partition(".")[0]
    if config_name == "evaluate" and key in TRAINING_ALONE:
        raise ConfigError(f"{override.input_line}: the run owns it and only training reads it; {TRAINING_ALONE[key]}")


def _refuse_no_option(override: Override, loader: ConfigLoaderImpl) -> None:
    """Refuses several values without -m, and a number or null where a group's option is named."""
    if override.is_sweep_override():
        raise ConfigError(f"{override.input_line}: several values; sweep over them with -m, or write a list as [a,b]")
    key, value = override.key_or_group, override.value()
    names_no_file = not override.is_delete() and isinstance(value, bool | int | float | None)
    if names_no_file and (options := loader.get_group_options(key)):
        raise ConfigError(f"{override.input_line}: no such {key} (have: {', '.join(options)})")


def _swept(override: Override) -> list[str]:
    """The override once for each of its values."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    if override.is_discrete_sweep():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    return [f"{key}={interval.start}"]


def _is_experiment(default: ResultDefault) -> bool:
    return str(default.config_path).startswith("experiment/")


def _missing_option(error: MissingConfigException, loader: ConfigLoaderImpl) -> str:
    """One line for a group option, or a config, that is not there."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = list(error.options or (loader.get_group_options(group) if group else ()))
    if not options:
        return f"{error.missing_cfg_file}: no such config"
    near = difflib.get_close_matches(option, options, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"{group}={option}: no such {group}{guess} (have: {', '.join(sorted(options))})"


def _root_cause(error: BaseException) -> BaseException:
    """The OmegaConf error behind Hydra's, which raises sometimes from it and sometimes while handling it."""
    while not isinstance(error, OmegaConfBaseException) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    return error


def _wrong_defaults(error: Exception, loader: ConfigLoaderImpl) -> str:
    """One line for a defaults list that Hydra cannot follow."""
    line = _one_line(error)
    if not (found := re.search(r"In '(.+?)': Could not override '(\w+)'", line)):
        return line
    groups = [group for group in loader.list_groups("") if group != "hydra"]
    near = difflib.get_close_matches(found[2], groups, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"{found[1]}.yaml: override /{found[2]}: no such group{guess} (have: {', '.join(sorted(groups))})"


def _leaves(node: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys that hold no mapping and no list, with what they hold."""
    if not isinstance(node, dict | list):
        yield at, node
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(value, f"{at}.{key}" if at else str(key))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
