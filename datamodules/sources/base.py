"""The seam between published data and the project: a source yields Scenes with their pictures or latents.

Here live the interface, the forms in which a picture may come, the account of what was left out, and the comparison of
what a source provides with what a consumer requires. What readers of published files share is in ``files.py``; readers of
particular data sets live beside it; shards, order and transforms live one folder up.
"""

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from scenes.scene import Scene

PROVIDABLE = frozenset(
    {"image", "latents", "caption", "boxes", "phrases", "descriptions", "attributes", "relations", "masks", "scores"}
)


@dataclass(frozen=True, kw_only=True)
class EncodedPicture:
    """A picture as its JPEG file has it, stored byte for byte: what is encoded again is worse than it was.

    Attributes:
        data: The whole file; whoever made this record has decoded it once.
        height: Rows, px.
        width: Columns, px.
    """

    data: bytes
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class LatentForm:
    """What all latents of a source or of shards have in common.

    A latent is what the denoiser works at: the autoencoder's output already multiplied by `scaling_factor`.

    Attributes:
        channels: Channels of a latent.
        height: Rows, cells.
        width: Columns, cells.
        scale: Pixels of the picture per cell.
        scaling_factor: The autoencoder's factor, which tells autoencoders of one shape apart.
        moments: Whether the autoencoder's distribution is stored and not a latent: the mean of latents, then as many channels of
            the logarithm of their variance.
        flipped: Whether the mirrored picture's latent is stored too.
    """

    channels: int
    height: int
    width: int
    scale: int
    scaling_factor: float
    moments: bool = False
    flipped: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent, in cells."""
        return self.channels, self.height, self.width

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what is stored; moments have twice the channels of a latent."""
        return self.channels * (2 if self.moments else 1), self.height, self.width

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) px of the pictures that were encoded."""
        return self.height * self.scale, self.width * self.scale


# A picture to encode, one that is encoded already, or a latent (C, h, w) float16 or float32.
Content = Image.Image | EncodedPicture | np.ndarray


class LeftOut:
    """The account of what an iteration over a source did not pass on.

    Attributes:
        counts: How often each reason was given, whatever the thing was: an object, a picture.
        skipped: A line for each sample that could not be read, or for a file of them.
        bad: Samples that could not be read.
        notes: Lines that whoever prepares the data should see.
        tallies: Numbers that are not left out, and that a report at the end is made of (`Source.report`).
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.skipped: list[str] = []
        self.bad = 0
        self.notes: list[str] = []
        self.tallies: Counter[str] = Counter()

    def add(self, other: "LeftOut") -> None:
        """Add another account to this one; a note is said once."""
        self.counts.update(other.counts)
        self.tallies.update(other.tallies)
        self.skipped += other.skipped
        self.bad += other.bad
        self.notes += [note for note in other.notes if note not in self.notes]

    def skip(self, reason: object, *, samples: int = 1) -> None:
        """Count samples that could not be read, and say why in one line."""
        self.skipped.append(" ".join(str(reason).split()))
        self.bad += samples


class Source(ABC):
    """Where Scenes come from: a sized iterable of (scene, picture or latent) pairs in a fixed order.

    Attributes:
        provides: What every Scene of this source carries, in the words of `PROVIDABLE`. It is compared with
            what adapters and metrics require before any work starts. A source may set it when it is made.
        latent_form: The form of its latents, known from the first pair on; None for pictures.
        left_out: The account of the latest iteration; None for a source that leaves nothing out.
        is_at_end: Whether the latest `span_of` came to the end of its file.
    """

    provides: frozenset[str] = frozenset()
    latent_form: LatentForm | None = None
    left_out: LeftOut | None = None
    is_at_end: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of pairs that one iteration yields, or more where some are left out."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Scene, Content]]:
        """Yields each Scene with its RGB picture or its latent; boxes are in the frame of that picture."""

    def positions(self) -> int:
        """Where `span` ends: the samples have places from 0 on, and some places may be empty."""
        return len(self)

    def span(self, start: int, stop: int) -> Iterator[tuple[Scene, Content]]:
        """The pairs at some places: those of spans that tile the places are those of an iteration.

        Here the pairs before `start` are made and dropped; a source that can pass over them cheaply does. `left_out` is the
        account of these places alone, and without what `report` says.

        Args:
            start: First place.
            stop: Place behind the last.

        Yields:
            Scene and content, as an iteration does.
        """
        pairs = iter(self)
        next(itertools.islice(pairs, start, start), None)
        if self.left_out is not None:
            self.left_out = LeftOut()
        yield from itertools.islice(pairs, stop - start)

    def files(self) -> int | None:
        """Number of input files, each of which one process reads as a whole; None for a source that is not split by file."""
        return None

    def size_of(self, file: int) -> int | None:
        """Samples of a file, as far as that is known without reading it; for the progress."""
        return None

    def expect(self, files: Sequence[int]) -> None:  # noqa: B027
        """Prepare for the files that this process is going to read; nothing of the others is to be opened."""

    def span_of(self, file: int, start: int, stop: int) -> Iterator[tuple[Scene, Content]]:
        """The pairs at some places of a file, for a source that has `files`; `is_at_end` tells whether there are more.

        Spans of a file that follow one another read it once. `left_out` is the account of these places.

        Args:
            file: Number of the file.
            start: First place in it.
            stop: Place behind the last; the file may end before.

        Returns:
            Scene and content of each.
        """
        raise NotImplementedError

    def report(self, total: LeftOut) -> list[str]:
        """Lines about all that was read, for whoever prepares the data.

        Args:
            total: The account of all places.

        Returns:
            Notes for the index.
        """
        return []

    def missing(self, requires: Iterable[str]) -> frozenset[str]:
        """What `requires` names and this source lacks."""
        return frozenset(requires) - self.provides

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        provides = cls.provides
        if isinstance(provides, frozenset) and (unknown := provides - PROVIDABLE):
            raise ValueError(f"{cls.__name__}.provides: unknown {sorted(unknown)}; choose from {sorted(PROVIDABLE)}")
