"""Compares a configuration with one whose keys and types are right, and names the nearest right key.

The right one is the files that a composition chose, or the configuration that a run was trained with. Nothing
here composes or reads files.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

KINDS = (
    ((bool,), "true or false"),  # before int, of which bool is a subclass
    ((int,), "an integer"),
    ((float,), "a number"),
    ((str,), "text (quote it)"),
    ((ListConfig,), "a list"),
    ((DictConfig,), "a node with keys of its own"),
)
OMEGACONF_KINDS = {"Integer": "an integer", "Float": "a number", "bool": "true or false", "String": "text"}


class ConfigError(ValueError):
    """A configuration that cannot be used; its message is one line."""


def check_keys(cfg: DictConfig, reference: DictConfig, *, where: Callable[[str], str] = str) -> None:
    """Refuses keys that the reference lacks and values of another type than its own.

    In the reference null accepts anything, as does an empty group or list below the root, and an integer is
    accepted for a float.

    Args:
        cfg: The configuration to check.
        reference: The configuration whose keys and types are right.
        where: How a message names a wrong key, such as the override or file that set it.

    Raises:
        ConfigError: A key is unknown, a value ill-typed or an interpolation leads nowhere.
    """
    for path, fault in _faults(cfg, reference):
        raise ConfigError(f"{where(path)}: {fault or f'no such key; {suggestion(path, reference)}'}")


def suggestion(path: str, reference: DictConfig) -> str:
    """Names what an unknown dotted key may have meant, or else what there is beside it.

    Args:
        path: The unknown dotted key.
        reference: The configuration whose keys are right.

    Returns:
        The end of a sentence.
    """
    node: Any = reference
    good: list[str] = []
    for part in path.split("."):
        keys = _keys(node)
        if not good and "run" in keys:
            keys.append("experiment")  # a group of the root without a key of its own
        near = [part] if part in keys else difflib.get_close_matches(part, keys, n=1)
        if not near:
            leaf = path.rpartition(".")[2]
            same = [key for key in _paths(reference) if key.rpartition(".")[2] == leaf]
            if same:
                return f"did you mean {same[0]}?"
            return f"{'.'.join(good) or 'the root'} has {', '.join(sorted(set(keys))) or 'no keys'}"
        good.append(near[0])
        node = _get(node, near[0]) if near[0] in _keys(node) else None
    return f"did you mean {'.'.join(good)}?"


def reason(error: BaseException) -> str:
    """What OmegaConf has against a value, in the words of this module."""
    line = str(error).strip().splitlines()[0]
    if found := re.search(r"could not be converted to (\w+)|is not a valid (bool)", line):
        name = found[1] or found[2]
        return f"must be {OMEGACONF_KINDS.get(name, name)}"
    return "must not be null" if "is not Optional" in line else line


def contains(content: Any, path: str) -> bool:
    """Whether a file sets a dotted key."""
    for part in path.split("."):
        if part not in _keys(content):
            return False
        content = _get(content, part)
    return True


def required_kind(value: Any, right: Any) -> str | None:
    """What a value must be to stand where `right` stands in the reference.

    Args:
        value: The value, a plain one or a node of OmegaConf's.
        right: What the reference has in its place.

    Returns:
        The kind, in words; None where the value may stand there.
    """
    if value is None or right is None:
        return None
    for types, kind in KINDS:
        if isinstance(right, types):
            accepted = (*types, int) if float in types else types
            fits = isinstance(value, accepted) and isinstance(value, bool) == isinstance(right, bool)
            return None if fits else kind
    return None


def _faults(node: DictConfig, reference: DictConfig, at: str = "") -> Iterator[tuple[str, str | None]]:
    """Yields each wrong dotted key, with what is wrong about its value or None where there is no such key."""
    is_typed = is_dataclass(OmegaConf.get_type(reference))  # then OmegaConf has checked the plain values
    for key in _keys(node):
        path = f"{at}{key}"
        if key not in _keys(reference):
            yield path, None
            continue
        right = _get(reference, key)
        try:
            value = node[key]
        except (MissingMandatoryValue, InterpolationToMissingValueError):
            continue  # it, or what it refers to, still needs a value
        except OmegaConfBaseException as error:
            yield path, reason(error)
            continue
        if isinstance(value, DictConfig) and isinstance(right, DictConfig):
            # An empty node at the root is a list of choices of which none was made: it is closed.
            if _keys(right) or not at:
                yield from _faults(value, right, f"{path}.")
        elif (isinstance(right, DictConfig) or not is_typed) and (kind := required_kind(value, right)):
            yield path, f"must be {kind}, got {value!r}"


def _get(node: Any, key: str) -> Any:
    """A value of the reference; None, which accepts anything, where it cannot be known."""
    try:
        return node[key]
    except OmegaConfBaseException:
        return None


def _keys(node: Any) -> list[str]:
    """The keys of a node, those without a value included; Hydra's own are left out."""
    return [str(key) for key in node if key != "hydra"] if isinstance(node, DictConfig) else []


def _paths(node: DictConfig, at: str = "") -> Iterator[str]:
    """Every dotted key under a node."""
    for key in _keys(node):
        yield f"{at}{key}"
        if isinstance(child := _get(node, key), DictConfig):
            yield from _paths(child, f"{at}{key}.")
