"""The published choices of COCO's pictures by what a layout holds: one definition for sources, protocols and metrics.

Each says who published it and how many pictures are left there, so that whoever applies it can compare. Choices by other things
(relations of LAION-SG) are with their sources; filters that people set themselves are a stage of `preparation`.
"""

from dataclasses import dataclass, field

from scenes.scene import Scene

PERSON = "person"


@dataclass(frozen=True, kw_only=True)
class SceneFilter:
    """A published choice of pictures and objects. Crowds never count.

    Attributes:
        name: What it is called in `source.filter`.
        definition: The choice in words.
        source: Who published it, and how well it is known.
        stuff: Whether stuff counts; scenes must have been read with it, or without it.
        min_area: Objects whose box covers less than this share of the picture do not count and go.
        min_objects: Fewest objects that are left.
        max_objects: Most objects that are left.
        max_persons: Most persons, counted before `min_area`; None for any number.
        scenes: Pictures that the publishers count, by COCO's split.
    """

    name: str
    definition: str
    source: str
    stuff: bool
    min_area: float
    min_objects: int
    max_objects: int
    max_persons: int | None = None
    scenes: dict[str, int] = field(default_factory=dict)

    def wants(self, *, objects: int, persons: int) -> bool:
        """Whether a picture is chosen.

        Args:
            objects: How many objects it has that are no crowds and not too small.
            persons: How many persons it has that are no crowds, of any size.

        Returns:
            Whether it is.
        """
        few_persons = self.max_persons is None or persons <= self.max_persons
        return few_persons and self.min_objects <= objects <= self.max_objects

    def __call__(self, scene: Scene) -> Scene | None:
        """The scene with the objects that count, None where it is not chosen.

        Args:
            scene: Objects with boxes and the names of COCO's categories as labels (or phrases), none left out yet.

        Returns:
            The scene without crowds, objects without a box and those that are too small.
        """
        single = [place for place, item in enumerate(scene.objects) if not item.is_crowd]
        persons = sum((scene.objects[place].label or scene.objects[place].phrase) == PERSON for place in single)
        placed = scene.only([place for place in single if scene.objects[place].box is not None])
        left, _ = placed.without_small(self.min_area)
        return left if self.wants(objects=len(left.objects), persons=persons) else None


FILTERS = {
    one.name: one
    for one in (
        SceneFilter(
            name="lama",
            definition="3 to 8 things and stuff of 2 % of the picture or more",
            source="LAMA (Li et al. 2021), LayoutDiffusion (Zheng et al. 2023), GeoDiffusion (Chen et al. 2024); not confirmed",
            stuff=True,
            min_area=0.02,
            min_objects=3,
            max_objects=8,
            scenes={"val2017": 3097},
        ),
        SceneFilter(
            name="creatilayout",
            definition="2 to 10 things of 2 % of the picture or more, at most 3 persons counted before the small ones go",
            source="CreatiLayout (Zhang et al. 2025) and its authors' answer on how persons are counted",
            stuff=False,
            min_area=0.02,
            min_objects=2,
            max_objects=10,
            max_persons=3,
            scenes={"train2017": 61002, "val2017": 2565},
        ),
        SceneFilter(
            name="rich_context",
            definition="1 to 30 things and stuff of 1 % of the picture or more",
            source="what the rich-context system (Cheng et al. 2024) trains on",
            stuff=True,
            min_area=0.01,
            min_objects=1,
            max_objects=30,
        ),
    )
}
