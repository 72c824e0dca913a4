"""LAION-SG: scene graphs of LAION's pictures, as its JSON files are published, and CompSG-Bench, its choice of test entries.

How an entry becomes a Scene is in ``scenes/forms.py``. There are no boxes; pictures are stored as they are, and squashing
them to a square, as published, is training's (`data.resize=squash`).
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.sources.base import Content, LeftOut
from datamodules.sources.files import FileSource, Picture, existing, value_of
from scenes import Frame, Scene
from scenes.forms import GraphError, scene_of_laion_sg
from scenes.graph import isolated_objects, triples
from scenes.json_form import parse_json

MISSING = "pictures missing"
NO_RELATIONS = "entries without relations"
OUTSIDE = "entries outside the filter"
NAME = "name"  # of a picture's file, in entries and in the provenance of scenes of another id
_FAULT = "fault: "
LIMIT = 75  # tokens of CLIP's 77 that are not start and end
# CLIP's words, of which each is one token or more; digits are words of their own.
_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A published choice of entries.

    Attributes:
        min_relations: Fewest relations of an entry, those given twice counted twice.
        entries: Entries that the publishers count.
        whole: Entries of the split that they count them in.
    """

    min_relations: int
    entries: int
    whole: int


# "Test samples with more than four relations" (Li et al. 2024, arXiv 2412.08580).
FILTERS = {"compsg_bench": Choice(min_relations=5, entries=20838, whole=50000)}


class LaionSg(FileSource):
    """Pictures with a caption and a scene graph: objects with attributes, and relations between them.

    LAION's pictures vanish from the web, so an entry whose picture is not there is counted and no fault; one that is
    there and cannot be read is.

    Args:
        root: Folder of the JSON files.
        file: The JSON file in it.
        images: Folder of the pictures, if it is not `root/data`.
        filter: "compsg_bench"; null takes every entry.
        min_relations: Entries with fewer relations go, and are counted; a filter has its own.
        keep_without_relations: Whether entries without any relation stay; the published loader skips them.
        tokenizer: Folder of CLIP's tokenizer, to count the tokens of the graphs that a text encoder cuts; null counts words.
        short_side: As in `FileSource`.

    Raises:
        ValueError: A file is not there or is not LAION-SG's, there is no such filter, settings contradict it, or a whole
            split holds another number of its entries than published.
    """

    name = "laion_sg"
    provides = frozenset({"image", "caption", "phrases", "attributes", "relations"})

    def __init__(
        self,
        *,
        root: str,
        file: str = "train.json",
        images: str | None = None,
        filter: str | None = None,
        min_relations: int = 0,
        keep_without_relations: bool = False,
        tokenizer: str | None = None,
        short_side: int | None = None,
    ) -> None:
        super().__init__(short_side=short_side)
        if filter is not None and filter not in FILTERS:
            raise ValueError(f"source.filter={filter}: no such filter; choose {', '.join(FILTERS)} or null")
        if min_relations < 0 or (filter is not None and min_relations):
            way_out = "leave it out or set source.filter=null" if filter else "give 0 or more"
            raise ValueError(f"source.min_relations={min_relations}: {way_out}")
        self.root, self.file, self.images, self.filter = root, file, images, filter
        self.min_relations = min_relations
        self.keep_without_relations, self.tokenizer = keep_without_relations, tokenizer
        self._path = existing(existing(Path(root), "source.root") / file, "source.file")
        self._folder = existing(Path(images) if images else Path(root) / "data", "source.images")
        self._list = _entries_of(self._path)
        self._choice = FILTERS[filter] if filter is not None else None
        self._chosen = self._checked_choice() if self._choice is not None else len(self._list)
        self._length = None if tokenizer is None else _tokens_by(tokenizer)

    def __len__(self) -> int:
        """Entries of the file."""
        return len(self._list)

    def entries(self) -> Iterator[tuple[int, Any]]:
        """Yields the entries with their places."""
        yield from enumerate(self._list)

    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of an entry.

        Args:
            entry: Its place, and what the file has there.

        Returns:
            The scene with its picture, or the reason where it is not wanted or has no picture.

        Raises:
            SampleError: A field is missing, or the picture cannot be used.
            GraphError: It is no scene graph, or its id is an earlier entry's.
        """
        place, item = entry
        where = f"{self.file} entry {place}"
        published = value_of(item, "relations", list, where)
        if (unwanted := self._unwanted(len(published))) is not None:
            return unwanted
        try:
            scene = self._graph(place, item, where)
        except GraphError as error:
            self.left_out.tallies[f"{_FAULT}{error.reason}"] += 1
            raise
        path = self._folder / value_of(item, NAME, str, where)
        if not path.is_file():
            return MISSING
        picture = Picture.open(path, where)
        self.count("captions missing", not scene.caption)
        self._count_tokens(scene)
        more = {key: item[key] for key in ("score", "url") if item.get(key) not in (None, "")}
        if item[NAME] != f"{scene.id}.jpg":
            more[NAME] = item[NAME]
        frame = Frame(original=picture.size)
        scene = replace(scene, frame=frame, source=self.name, provenance=more)
        repeated = len(scene.relations) - len(set(scene.relations))
        self._tally(kept=1, bare=not published, related=len(scene.relations), repeated=repeated)
        return self.stored(scene, picture)

    def _unwanted(self, relations: int) -> str | None:
        """Why an entry with so many relations is left out, if it is."""
        if relations < (self._choice.min_relations if self._choice else self.min_relations):
            return OUTSIDE
        return NO_RELATIONS if not relations and not self.keep_without_relations else None

    def _tally(self, **numbers: int) -> None:
        """Add to what `report` tells."""
        self.left_out.tallies.update({name: int(number) for name, number in numbers.items() if number})

    def _graph(self, place: int, item: Any, where: str) -> Scene:
        """The graph of an entry, if no graph before it has its id."""
        scene = scene_of_laion_sg(item, where=where)
        if any(self._is_graph(earlier) for earlier in self._places[scene.id] if earlier < place):
            raise GraphError(f"{where}: img_id: {scene.id} is there twice; leave one out", reason="duplicate img_id")
        return scene

    @functools.cached_property
    def _places(self) -> dict[str, list[int]]:
        """Where the ids of wanted entries are, so that a span of entries knows of those before it."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, item in enumerate(self._list):
            relations = item.get("relations") if isinstance(item, dict) else None
            if isinstance(relations, list) and self._unwanted(len(relations)) is None:
                places[str(item.get("img_id", ""))].append(place)
        return places

    def _is_graph(self, place: int) -> bool:
        try:
            scene_of_laion_sg(self._list[place], where=f"entry {place}")
        except ValueError:
            return False
        return True

    def _count_tokens(self, scene: Scene) -> None:
        """Count what of the graph as one text goes beyond what CLIP reads."""
        parts = [text for triple in triples(scene) for text in triple]
        text = " ".join(parts + [scene.objects[place].phrase for place in isolated_objects(scene)])
        length = len(_WORDS.findall(text)) if self._length is None else self._length(text)
        self._tally(long=length > LIMIT, cut=max(0, length - LIMIT))

    def _checked_choice(self) -> int:
        """How many entries the filter takes; the publishers' number where the split is whole."""
        choice = self._choice
        assert choice is not None
        counts = [_relations(item) for item in self._list]
        chosen = sum(count >= choice.min_relations for count in counts)
        if len(counts) == choice.whole and chosen != choice.entries:
            raise ValueError(
                f"source.filter={self.filter}: {chosen} of the {choice.whole} entries of {self._path} have "
                f"{choice.min_relations} relations or more, published are {choice.entries}; fetch the file again, or take "
                f"source.filter=null source.min_relations={choice.min_relations} for what it holds"
            )
        return chosen

    def report(self, total: LeftOut) -> list[str]:
        """What was read and what not.

        Args:
            total: The account of all entries.

        Returns:
            A line for each kind.
        """
        left, tallies = total, total.tallies
        graphs = {key.removeprefix(_FAULT): number for key, number in tallies.items() if key.startswith(_FAULT)}
        without = f"{tallies['bare']} kept" if self.keep_without_relations else f"{left.counts[NO_RELATIONS]} left out"
        kinds = {**dict(sorted(graphs.items())), "unreadable": left.bad - sum(graphs.values())}
        faults = ", ".join(f"{reason}: {count}" for reason, count in kinds.items() if count)
        kept = f"{tallies['kept']} kept with {tallies['related']} relations"
        repeated = f", {tallies['repeated']} of them given before" if tallies["repeated"] else ""
        lines = [
            f"read: {len(self._list)} entries of {self.file}, {kept}{repeated}",
            f"missing images: {left.counts[MISSING]}",
            f"no relations: {without}",
            f"bad entries: {left.bad}{f' ({faults})' if faults else ''}",
        ]
        if self._choice is not None:
            published = f"published: {self._choice.entries} of {self._choice.whole}"
            lines.append(f"filter {self.filter}: {self._chosen} of {len(self._list)} entries ({published})")
        of = f"of {tallies['kept']} graphs have more than {LIMIT}"
        if self._length is None:
            lines.append(
                f"tokens cut: not counted, give the tokenizer's folder as source.tokenizer=DIR; {tallies['long']} {of} words, "
                f"so that {tallies['cut']} tokens or more are cut"
            )
        else:
            lines.append(f"tokens cut: {tallies['cut']}; {tallies['long']} {of} tokens")
        return lines


def _entries_of(path: Path) -> list[Any]:
    """The entries of a JSON file."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"source.file: {path} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, list):
        raise ValueError(f"source.file: {path} holds a {type(content).__name__}, not a list; fetch it again")
    return content


def _relations(item: Any) -> int:
    """How many relations an entry has; none where it has another form, which is told when it is read."""
    relations = item.get("relations") if isinstance(item, dict) else None
    return len(relations) if isinstance(relations, list) else 0


def _tokens_by(folder: str) -> Callable[[str], int]:
    """What counts the tokens of a text, start and end not among them.

    Args:
        folder: Of CLIP's tokenizer, such as `tokenizer` in a folder of SDXL.

    Returns:
        Text to number of tokens.

    Raises:
        ValueError: There is no tokenizer in it.
    """
    from transformers import CLIPTokenizer  # here, because nothing else needs it

    path = existing(Path(folder), "source.tokenizer")
    # of a folder without any of these the library would make a tokenizer that knows no words
    if not any((path / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"source.tokenizer: {path} holds no tokenizer; give the folder with its vocab.json, or null")
    tokenizer = CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
