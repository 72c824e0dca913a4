"""What parts over pretrained models share: opening weights by hub name or local folder, late and in one place.

Here is neither a model nor a threshold: those are in the files of the kinds of parts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from PIL import Image

from files.quiet import quiet_libraries
from labelling.parts import Part, PartMissing

DTYPES = ("float32", "float16", "bfloat16")
Item = TypeVar("Item")


class Pretrained(Part):
    """A part over one pretrained model, opened at the first need of it.

    Args:
        model: Name on the hub, or a local folder or file.
        revision: Branch, tag or commit on the hub; null for its newest.
        dtype: Numbers that the model works in.
        batch_size: How many pictures, or parts of pictures, it takes at once.

    Attributes:
        counts: What the part could not take as it was given, since whoever reads this last emptied it.

    Raises:
        ValueError: A setting is out of its range.
    """

    kind: ClassVar[str]
    package: ClassVar[str] = "transformers"
    way_out: ClassVar[str] = "give a folder with the weights, or a name on the hub that this machine can reach"

    def __init__(self, *, model: str, revision: str | None, dtype: str, batch_size: int) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"{self.kind}.dtype={dtype}: must be one of {', '.join(DTYPES)}")
        if batch_size < 1:
            raise ValueError(f"{self.kind}.batch_size={batch_size}: must be at least 1")
        self.name, self.revision, self.dtype, self.batch_size = model, revision, dtype, batch_size
        self.counts: Counter[str] = Counter()
        self._opened: torch.nn.Module | None = None

    @abstractmethod
    def _open(self) -> torch.nn.Module:
        """Open everything that the part works with, and return the model among it."""

    def settings(self) -> dict[str, Any]:
        """Class, model, revision and dtype; a part adds its own."""
        return {"part": type(self).__name__, "model": self.name, "revision": self.revision, "dtype": self.dtype}

    @property
    def model(self) -> torch.nn.Module:
        """The model, on the CPU until `to` moves it."""
        if self._opened is None:
            self._opened = self._guarded(self._open).eval().requires_grad_(False)
        return self._opened

    @property
    def commit(self) -> str | None:
        """Return the commit of the hub that was opened; None for a folder, or before it is opened."""
        return getattr(getattr(self._opened, "config", None), "_commit_hash", None)

    @property
    def device(self) -> torch.device:
        """Return the model's device."""
        return next(self.model.parameters()).device

    def to(self, device: Any) -> Self:
        """As in `Part`."""
        if self._opened is None and torch.device(device).type == "cpu":
            return self  # nothing to free; what is used on the CPU is opened there
        before = self.device.type
        self.model.to(device)
        if before == "cuda" and self.device.type == "cpu":
            torch.cuda.empty_cache()
        return self

    def opened(self, kind: Any, **more: Any) -> Any:
        """Return what `kind.from_pretrained` opens for the part's model and revision.

        Args:
            kind: An Auto class of transformers.
            **more: Further arguments of its `from_pretrained`.

        Returns:
            A model, a processor or a tokenizer.
        """
        return kind.from_pretrained(self.name, revision=self.revision or "main", **more)

    def opened_model(self, kind: Any) -> torch.nn.Module:
        """The same for a model, in the part's dtype."""
        return self.opened(kind, dtype=getattr(torch, self.dtype))

    def _guarded(self, opener: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        try:
            with quiet_libraries():
                return opener()
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise PartMissing(f"{self.kind}.model={self.name}: cannot be opened ({reason}); {self.way_out}") from error

    def inputs(self, batch: Any) -> dict[str, Any]:
        """A processor's tensors on the model's device, floats in its dtype."""
        dtype = next(self.model.parameters()).dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in dict(batch).items()
        }


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one of what is left."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def as_pillow(picture: np.ndarray) -> Image.Image:
    """A picture (H, W, 3) uint8 as processors take it without guessing at its axes."""
    return Image.fromarray(np.ascontiguousarray(picture))


def versions(*packages: str) -> dict[str, str]:
    """The versions of installed packages; one that is not there is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
