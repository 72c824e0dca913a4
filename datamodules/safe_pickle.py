"""Reading published pickles without running what is in them: object arrays of numpy and `.pth` files of torch.

A pickle names functions that the reader is to call, so that opening one is running a program. The readers here admit only
the few names that the published formats need, and refuse a file that asks for any other by that name. They know nothing of
what the data mean: that is in `sources/`.
"""

import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

_CODES = re.compile(r"[fiub][1248]|U\d+|O8?")


class PickleRefused(ValueError):
    """A file that cannot be read safely; the message is one line with the file and the way out."""


class Embedding:
    """What stands in place of a tensor in a `.pth` file: its numbers are not read."""


def load_npy(path: str | Path) -> np.ndarray:
    """An array of a `.npy` file, of objects too.

    Args:
        path: The file.

    Returns:
        The array; objects in it are numbers, texts, lists, tuples, dicts and arrays.

    Raises:
        PickleRefused: The file asks for anything else, is cut off, or is no `.npy` file.
    """
    with _reading(path), Path(path).open("rb") as file:
        shape, is_fortran, dtype = _header(file)
        if not dtype.hasobject:
            file.seek(0)
            return npy_format.read_array(file, allow_pickle=False)
        found = _NumpyUnpickler(file, path).load()
        if not isinstance(found, np.ndarray) or found.dtype != dtype:
            raise ValueError("what is stored is not the array that its header tells of")
        return found.view(np.ndarray).reshape(shape, order="F" if is_fortran else "C")


def npy_shape(path: str | Path) -> tuple[int, ...]:
    """The shape that the header of a `.npy` file tells; nothing else of it is read."""
    with _reading(path), Path(path).open("rb") as file:
        return _header(file)[0]


def load_pth(path: str | Path) -> Any:
    """The content of a `.pth` file as `torch.save` writes it, with an `Embedding` in place of each tensor.

    Args:
        path: The file.

    Returns:
        Lists, dicts, texts, numbers and `Embedding`.

    Raises:
        PickleRefused: The file asks for anything else, is cut off, or is of torch's form before 1.6.
    """
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("holds no data.pkl as torch.save writes it")
        with archive.open(names[0]) as file:
            return _TorchUnpickler(file, path).load()


class _reading:
    """Turns what goes wrong within into one line that names the file."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PickleRefused | OSError) or not isinstance(error, Exception):
            return
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PickleRefused(f"{self._path}: cannot be read ({reason}); fetch the file again") from error


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy_format.read_magic(file)
    read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"is of .npy version {version}")
    return read(file)


class _Type:
    """A type of numpy's as a pickle tells it: only its code and byte order are taken over.

    A real dtype would take flags over as well, and a forged flag makes numpy read bytes as pointers.
    """

    def __init__(self, code: object, *_more: object) -> None:
        if not isinstance(code, str) or not _CODES.fullmatch(code):
            raise ValueError(f"a type {code!r} of numpy's")
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = {"<": "<", ">": ">", "|": "|", "=": "="}[state[1]]

    @property
    def dtype(self) -> np.dtype:
        """The type."""
        return np.dtype(self._code).newbyteorder(self._order)


class _Array(np.ndarray):
    """An array that a pickle fills."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, kind, is_fortran, data = state
        super().__setstate__((version, shape, kind.dtype, is_fortran, data))


class _Kind:
    """What stands for numpy's array class, which a pickle may name and not call."""


def _reconstruct(_kind: object, _shape: object, _code: object) -> _Array:
    """An empty array, which the pickle then fills."""
    return _Array.__new__(_Array, (0,), dtype=np.int8)


def _scalar(kind: _Type, data: bytes) -> Any:
    """A number or text of numpy's."""
    if kind.dtype.hasobject:
        raise ValueError("a single object of numpy's")
    return np.frombuffer(data, kind.dtype)[0]


def _tensor(*_parts: object) -> Embedding:
    return Embedding()


class _AdmittedUnpickler(pickle.Unpickler):
    """An unpickler that knows the names in `admitted` and no others."""

    admitted: dict[str, Any]

    def __init__(self, file: Any, path: str | Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for.

        Args:
            module: Module that the file names.
            name: Name in that module.

        Returns:
            This module's own stand-in.

        Raises:
            PickleRefused: It is not a name of the format.
        """
        try:
            return self.admitted[f"{module}.{name}"]
        except KeyError:
            raise PickleRefused(
                f"{self._path}: asks for {module}.{name}, which its format does not need, so nothing of it was run; "
                "do not use this file, fetch it again from its publisher"
            ) from None


class _NumpyUnpickler(_AdmittedUnpickler):
    """What arrays of objects are made of."""

    admitted = {
        "numpy.ndarray": _Kind,
        "numpy.dtype": _Type,
        **{  # numpy 2 moved numpy.core
            f"numpy.{core}.multiarray.{name}": stand_in
            for core in ("core", "_core")
            for name, stand_in in (("_reconstruct", _reconstruct), ("scalar", _scalar))
        },
    }


class _TorchUnpickler(_AdmittedUnpickler):
    """What lists and dicts with tensors are made of."""

    admitted = {
        **_NumpyUnpickler.admitted,
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": _tensor,
        **{
            f"torch.{kind}Storage": Embedding
            for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
        },
    }

    def persistent_load(self, pid: Any) -> Embedding:
        """Where a tensor's numbers are; they stay there."""
        return Embedding()
