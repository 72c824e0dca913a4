"""A scene while it is being drawn: boxes on a canvas, some without a name yet, and relations between them.

The canvas gives back all its boxes after every change, in an order of its own and without saying which is which. So a draft
follows them: a box that was moved, resized or renamed is still the object that it was, and keeps its relations. A finished
draft becomes a `Scene`, whose own checks say what it lacks. Nothing here knows the web.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scenes import Relation, Scene, SceneError, SceneObject
from scenes.draw import colour_of

SIDE = 512  # px, width and height of the canvas
_SLACK = 1  # px by which a canvas that is shown smaller rounds a box that nobody moved
NAME = "drawn"  # id of a scene that was begun in the page: a seed's noise is the same for all of them

Pixels = tuple[int, int, int, int]  # left, top, right, bottom on the canvas


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object of a draft.

    Attributes:
        phrase: Its name; empty until it has one.
        pixels: Where it is on the canvas; None where the scene does not place it.
        known: The object as a scene file has it, while its phrase is still the same.
    """

    phrase: str = ""
    pixels: Pixels | None = None
    known: SceneObject | None = None

    def made(self, where: str) -> SceneObject:
        """The object; what a scene file said of it stays as far as it is still true.

        Args:
            where: What to call it in the message of an error.

        Returns:
            The object, its box exactly as in the file where nobody moved it.

        Raises:
            SceneError: It has no name.
        """
        if not self.phrase:
            raise SceneError(f"{where}: has no name; select it on the canvas and press E, or remove it")
        box = None if self.pixels is None else tuple(side / SIDE for side in self.pixels)
        if self.known is None:
            return SceneObject(phrase=self.phrase, box=box)
        if self.pixels == _pixels(self.known.box):
            return self.known
        return replace(self.known, box=box, mask=None)  # a mask is of the old place


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A scene that is being drawn.

    Attributes:
        items: Its objects, in the order in which they were made.
        shown: For each box of the canvas the place of its object in `items`.
        relations: Between places in `items`.
        scene: The scene that it began with, of which all but objects, relations and caption stays.
    """

    items: tuple[Item, ...] = ()
    shown: tuple[int, ...] = ()
    relations: tuple[Relation, ...] = ()
    scene: Scene = Scene(id=NAME)

    @staticmethod
    def of(scene: Scene) -> Draft:
        """The draft of a whole scene."""
        items = tuple(Item(phrase=item.phrase, pixels=_pixels(item.box), known=item) for item in scene.objects)
        shown = tuple(place for place, item in enumerate(items) if item.pixels is not None)
        return Draft(items=items, shown=shown, relations=scene.relations, scene=scene)

    def boxes(self) -> list[dict[str, Any]]:
        """The boxes as the canvas takes them: corners in pixels, label, colour of the object in every drawing."""
        return [
            {
                **dict(zip(("xmin", "ymin", "xmax", "ymax"), self.items[place].pixels or (), strict=True)),
                "label": self.items[place].phrase,
                "color": colour_of(place),
            }
            for place in self.shown
        ]

    def followed(self, boxes: Sequence[Mapping[str, Any]]) -> Draft:
        """The draft after the canvas has changed.

        Args:
            boxes: All boxes of the canvas, as it gives them back.

        Returns:
            The draft with what was moved, renamed, added and removed; relations of what was removed are gone.
        """
        now = [(str(box.get("label") or "").strip(), _on_canvas(box)) for box in boxes]
        same = self._same(now)
        kept = sorted({place for place in same if place is not None} | set(self._unplaced()))
        items = [self.items[place] for place in kept]
        shown = []
        for (phrase, pixels), place in reversed(list(zip(now, same, strict=True))):  # the canvas has the newest first
            if place is None:
                shown.append(len(items))
                items.append(Item(phrase=phrase, pixels=pixels))
                continue
            shown.append(kept.index(place))
            before = self.items[place]
            items[shown[-1]] = Item(
                phrase=phrase,
                pixels=before.pixels if _near(before.pixels, pixels) else pixels,
                known=before.known if phrase == before.phrase else None,
            )
        new_place = {old: new for new, old in enumerate(kept)}
        relations = tuple(
            replace(r, subject=new_place[r.subject], object=new_place[r.object])
            for r in self.relations
            if r.subject in new_place and r.object in new_place
        )
        return replace(self, items=tuple(items), shown=tuple(reversed(shown)), relations=relations)

    def related(self, subject: int, predicate: str, target: int) -> Draft:
        """The draft with one relation more.

        Args:
            subject: Place in `items`.
            predicate: Such as "left of".
            target: Another place.

        Returns:
            The draft.

        Raises:
            SceneError: The two are one, the predicate is empty, or it has been said.
        """
        relation = Relation(subject=subject, predicate=" ".join(predicate.split()), object=target)
        return replace(self, relations=(*self.relations, relation)).checked()

    def without_relations(self, places: Sequence[int]) -> Draft:
        """The draft without the relations at these places."""
        return replace(self, relations=tuple(r for n, r in enumerate(self.relations) if n not in places))

    def checked(self) -> Draft:
        """The same draft, where its relations can be."""
        stand_ins = tuple(SceneObject(phrase=item.phrase or "unnamed") for item in self.items)
        Scene(id=self.scene.id, objects=stand_ins, relations=self.relations)
        return self

    def names(self) -> list[str]:
        """What people call each object, different for each: "1 red circle"."""
        return [f"{n} {item.phrase or '(no name yet)'}" for n, item in enumerate(self.items, start=1)]

    def sentences(self) -> list[str]:
        """The relations as sentences, different for each."""
        names = self.names()
        return [f"{names[r.subject]} – {r.predicate} – {names[r.object]}" for r in self.relations]

    def made(self, caption: str) -> Scene:
        """The scene.

        Args:
            caption: Of the whole picture.

        Returns:
            The scene.

        Raises:
            SceneError: An object has no name or no size.
        """
        objects = tuple(item.made(f"box {n}") for n, item in enumerate(self.items, start=1))
        return replace(self.scene, caption=caption.strip(), objects=objects, relations=self.relations)

    def _unplaced(self) -> list[int]:
        return [place for place, item in enumerate(self.items) if item.pixels is None]

    def _same(self, now: Sequence[tuple[str, Pixels]]) -> list[int | None]:
        """For each box of the canvas which object it is: first those that did not change, then moved, then renamed ones."""
        left = list(self.shown)
        same: list[int | None] = [None] * len(now)
        for fits in (
            lambda item, phrase, pixels: item.phrase == phrase and _near(item.pixels, pixels),
            lambda item, phrase, pixels: item.phrase == phrase,
            lambda item, phrase, pixels: _near(item.pixels, pixels),
        ):
            for number, (phrase, pixels) in enumerate(now):
                if same[number] is not None:
                    continue
                found = next((place for place in left if fits(self.items[place], phrase, pixels)), None)
                if found is not None:
                    same[number] = found
                    left.remove(found)
        return same


def _pixels(box: tuple[float, float, float, float] | None) -> Pixels | None:
    """A box in [0, 1] on the canvas, at least a pixel wide and high."""
    if box is None:
        return None
    left, top, right, bottom = (round(side * SIDE) for side in box)
    left, top = min(left, SIDE - 1), min(top, SIDE - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _near(before: Pixels | None, now: Pixels) -> bool:
    return before is not None and all(abs(a - b) <= _SLACK for a, b in zip(before, now, strict=True))


def _on_canvas(box: Mapping[str, Any]) -> Pixels:
    """The corners of a box of the canvas, within it."""
    left, top, right, bottom = (min(max(int(box[key]), 0), SIDE) for key in ("xmin", "ymin", "xmax", "ymax"))
    return left, top, right, bottom
