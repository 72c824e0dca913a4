"""Where a metric's models lie: a file beside other tools' caches, a hub name or a local folder; or else nowhere.

What is not there is said in one line, `NotAvailable`, that names the file, where it comes from and the setting. No metric
downloads a file by itself; models of the hub come through transformers, which keeps them.
"""

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from files.quiet import quiet_libraries
from metrics.base import NotAvailable

T = TypeVar("T")

_CHUNK = 1 << 20


def weights_file(given: str | Path | None, default: str | Path, *, setting: str, source: str) -> Path:
    """The file of a model's weights.

    Args:
        given: A file, or the folder that holds one of the default's name; None for the default.
        default: Where the tool that published the metric keeps the file.
        setting: What `given` is called in the configuration.
        source: Where the file can be downloaded.

    Returns:
        The file; it is there.

    Raises:
        NotAvailable: There is no such file.
    """
    default = Path(default)
    path = default if given is None else Path(given)
    if path.is_dir():
        path /= default.name
    if not path.is_file():
        raise NotAvailable(f"{path}: no such file; download it from {source} and name it by {setting}=FILE")
    return path


def pretrained(load: Callable[..., T], model: str, *, setting: str, revision: str | None = None) -> T:
    """Opens a model, tokenizer or processor of transformers.

    Args:
        load: A class's `from_pretrained`.
        model: A hub name or a local folder.
        setting: What `model` is called in the configuration.
        revision: Of the hub's repository.

    Returns:
        What was loaded.

    Raises:
        NotAvailable: It is neither on the hub, nor in its cache, nor a folder that holds it.
    """
    try:
        with quiet_libraries():
            return load(model, revision=revision)
    except (OSError, ValueError) as error:
        where = (
            "folder without such files" if Path(model).is_dir() else "neither a local folder nor to be had from the hub"
        )
        raise NotAvailable(
            f"{setting}={model}: {where} ({str(error).strip().splitlines()[0]}); "
            f"download it with `hf download` where there is a network and name its folder by {setting}=DIR"
        ) from error


def model_identity(model: str, revision: str | None) -> dict[str, Any]:
    """What a model is, as settings say it: its name and revision, of a local folder the hash of its files instead.

    Args:
        model: A hub name or a local folder.
        revision: Of the hub's repository.

    Returns:
        JSON values; "sha256" where the folder is there.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {"model": model, "revision": revision}
    files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".bin", ".txt"})
    whole = hashlib.sha256("".join(f"{path.name} {file_hash(path)}\n" for path in files).encode())
    return {"model": folder.name, "sha256": whole.hexdigest()}


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, read once as long as it does not change."""
    stat = Path(path).stat()
    return _hash_of(str(path), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hash_of(path: str, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what other tools warn of their own calls from the log, and their filters of warnings from everyone else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
