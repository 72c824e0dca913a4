"""The seam between published data and the project: a source yields Scenes with their pictures.

Here live the interface and the comparison of what a source provides with what a consumer requires. Readers of
particular data sets live beside this file; shards, order and transforms live one folder up.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar

from PIL import Image

from scenes.scene import Scene

PROVIDABLE = frozenset(
    {"image", "caption", "boxes", "phrases", "descriptions", "attributes", "relations", "masks", "scores"}
)


class Source(ABC):
    """Where Scenes come from: a sized iterable of (scene, picture) pairs in a fixed order.

    Attributes:
        provides: What every Scene of this source carries, in the words of `PROVIDABLE`. It is compared with
            what adapters and metrics require before any work starts.
    """

    provides: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __len__(self) -> int:
        """Number of pairs that one iteration yields."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Scene, Image.Image]]:
        """Yields each Scene with its RGB picture; boxes are in the frame of that picture."""

    def missing(self, requires: Iterable[str]) -> frozenset[str]:
        """What `requires` names and this source lacks."""
        return frozenset(requires) - self.provides

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        provides = cls.provides
        if isinstance(provides, frozenset) and (unknown := provides - PROVIDABLE):
            raise ValueError(f"{cls.__name__}.provides: unknown {sorted(unknown)}; choose from {sorted(PROVIDABLE)}")
