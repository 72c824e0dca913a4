"""Folders of files, on this machine or wherever fsspec reaches: s3, gs, http, memory.

Here is how a whole file is read, and how one is written so that a reader finds all of it or nothing. Large files pass through
a local one: whoever reads seeks in it, whoever writes is not cut off by the network in the middle. What the files are is not
known here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
_SILENT = 3600  # s without a change after which another machine's half file is given up


class Folder(ABC):
    """A folder of files, without folders in it.

    Attributes:
        place: Path or address, as messages name it.
    """

    place: str

    def __str__(self) -> str:
        return self.place

    @abstractmethod
    def names(self) -> set[str]:
        """Names of the files; none where the folder is not there."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def sizes(self) -> dict[str, int] | None:
        """Bytes of each file by name, told by one listing; None where the place cannot be listed so."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a small file."""

    @abstractmethod
    def sha256(self, name: str) -> str:
        """Checksum of a file, all of which is read."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""

    @abstractmethod
    def remove_if_empty(self) -> None:
        """Removes the folder, where there is nothing in it."""

    @abstractmethod
    def reading(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Gives a file of this machine with the content of a file, to be read within the block."""

    @abstractmethod
    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Gives a file of this machine to write to; when the block ends well it takes the name, whole, in place of any other.

        Several processes may write the same file at the same time, if all write the same.
        """

    def sweep(self) -> None:
        """Removes what killed writers left, where the folder is finished; nothing where that is never seen."""
        return

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, all of it or nothing."""
        with self.writing(name) as path:
            path.write_bytes(content)


def folder_at(place: str | Path) -> Folder:
    """The folder at a path or address.

    Args:
        place: A path, or an address that fsspec knows, such as `s3://bucket/folder`.

    Returns:
        The folder, which need not be there yet.

    Raises:
        ValueError: fsspec does not know such addresses here.
    """
    where = named(place)
    return LocalFolder(where) if isinstance(where, Path) else RemoteFolder(where)


def is_remote(place: str | Path) -> bool:
    """Whether a folder is behind an address of fsspec's, and not a path."""
    return "://" in str(place) and not str(place).startswith("file://")


def named(place: str | Path) -> str | Path:
    """A folder as a path, or as an address where it is behind one."""
    return str(place).rstrip("/") if is_remote(place) else Path(str(place).removeprefix("file://"))


class LocalFolder(Folder):
    """A folder of a file system.

    Args:
        path: Where it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.place = str(path)

    def names(self) -> set[str]:
        """As `Folder`; what is half written is left out."""
        try:
            return {entry.name for entry in os.scandir(self.path) if entry.is_file() and not _is_partial(entry.name)}
        except FileNotFoundError:
            return set()

    def has(self, name: str) -> bool:
        """As `Folder`."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """As `Folder`."""
        return (self.path / name).stat().st_size

    def sizes(self) -> dict[str, int]:
        """As `Folder`."""
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file()}

    def read(self, name: str) -> bytes:
        """As `Folder`."""
        return (self.path / name).read_bytes()

    def sha256(self, name: str) -> str:
        """As `Folder`."""
        with (self.path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def remove(self, name: str) -> None:
        """As `Folder`."""
        (self.path / name).unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """As `Folder`."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """As `Folder`: the file itself.

        Args:
            name: The file.

        Yields:
            Its path.
        """
        yield self.path / name

    def sweep(self) -> None:
        """As `Folder`."""
        for left in self.path.glob(f".*{PARTIAL}"):
            left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """As `Folder`: beside its place, handed to the disk and renamed; what killed writers of the same file left goes.

        Args:
            name: The file.

        Yields:
            The path to write to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(f".{name}.*{PARTIAL}"):
            if is_stale(left):
                left.unlink(missing_ok=True)
        path = self.path / f".{name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}"
        try:
            yield path
            try:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(path, self.path / name)
            except FileNotFoundError:
                # Another process has finished the same file, and swept.
                if not self.has(name):
                    raise
        finally:
            path.unlink(missing_ok=True)


class RemoteFolder(Folder):
    """A folder behind an address of fsspec's. Keys and servers are told by the environment, as each of its packages wants it.

    Args:
        address: Such as `s3://bucket/folder`.

    Raises:
        ValueError: The protocol is unknown, or its package is not installed.
    """

    def __init__(self, address: str) -> None:
        import fsspec  # here, because local folders need none of it

        self.place = address.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{address}: cannot be opened ({' '.join(str(error).split())})") from error

    @property
    def _is_web(self) -> bool:
        return self._root.startswith(("http://", "https://"))

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def names(self) -> set[str]:
        """As `Folder`."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            return set()
        return {entry["name"].rpartition("/")[2] for entry in found if entry["type"] == "file"}

    def has(self, name: str) -> bool:
        """As `Folder`."""
        self._files.invalidate_cache()
        return bool(self._files.isfile(self._at(name)))

    def size(self, name: str) -> int:
        """As `Folder`."""
        return int(self._files.info(self._at(name))["size"])

    def sizes(self) -> dict[str, int] | None:
        """As `Folder`; web servers tell no sizes."""
        if self._is_web:
            return None
        return {
            entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in self._files.ls(self._root, detail=True)
        }

    def read(self, name: str) -> bytes:
        """As `Folder`."""
        return self._files.cat_file(self._at(name))

    def sha256(self, name: str) -> str:
        """As `Folder`."""
        with self.reading(name) as path, path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def remove(self, name: str) -> None:
        """As `Folder`."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._at(name))
        self._files.invalidate_cache()

    def remove_if_empty(self) -> None:
        """As `Folder`: where files have addresses alone there is nothing to remove."""

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """As `Folder`: a copy.

        Args:
            name: The file.

        Yields:
            The copy's path.
        """
        with _temporary(name) as path:
            self.fetch(name, path)
            yield path

    def part(self, name: str, offset: int, size: int) -> bytes:
        """Some bytes of a file; a server that cannot send a part sends all of it."""
        found = self._files.cat_file(self._at(name), start=offset, end=offset + size)
        return found if len(found) <= size else found[offset : offset + size]

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to a path of this machine."""
        self._files.get_file(self._at(name), str(path))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """As `Folder`: it is sent when it is whole, and object stores show what is sent when all of it is there.

        Args:
            name: The file.

        Yields:
            The path to write to.
        """
        with _temporary(name) as path:
            yield path
            if not self._is_web:
                with contextlib.suppress(OSError):
                    self._files.makedirs(self._root, exist_ok=True)
            self._files.put_file(str(path), self._at(name))
            self._files.invalidate_cache()


@contextlib.contextmanager
def _temporary(name: str) -> Iterator[Path]:
    """A file in a folder of its own that goes with the block; a full disk of this machine names that folder."""
    with tempfile.TemporaryDirectory(prefix="scenograph-") as folder:
        yield Path(folder) / name


def is_stale(left: Path) -> bool:
    """Whether nobody is writing a file any more: its process is gone, or, on another machine, has long been silent."""
    host, _, process = left.name.removesuffix(PARTIAL).rpartition("-")
    try:
        if not host.endswith(f".{socket.gethostname()}") or not process.isdecimal():
            return time.time() - left.stat().st_mtime > _SILENT
        os.kill(int(process), 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:
        return False
    return False


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL)
