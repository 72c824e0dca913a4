"""Drawings: sizes, colours where they belong, nothing lost at odd sizes."""

import numpy as np
import pytest
from PIL import Image

from scenes import draw
from scenes.draw import SMALLEST, colour_of, draw_boxes, draw_graph, grid
from scenes.graph import relations_from_boxes
from scenes.scene import Relation, Scene, SceneObject


def scene(*boxes, relations=()) -> Scene:
    objects = tuple(SceneObject(phrase=f"a thing of number {i}", box=box) for i, box in enumerate(boxes))
    return Scene(id="s", objects=objects, relations=relations)


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def pixels(picture: Image.Image, colour) -> np.ndarray:
    """(P, 2) places (x, y) of a colour."""
    return np.argwhere((np.asarray(picture) == colour).all(-1))[:, ::-1]


def test_colours_are_distinct():
    colours = np.array([colour_of(i) for i in range(40)])
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(40)
    assert distance[:10, :10].min() > 60
    assert distance.min() > 0


def test_small_pictures_are_enlarged_by_a_whole_factor():
    assert draw_boxes(grey(64, 48), scene()).size == (64 * 6, 48 * 6)
    assert draw_boxes(grey(300, SMALLEST), scene()).size == (300, SMALLEST)
    assert draw_boxes(grey(64, 48), scene(), scale=2).size == (128, 96)
    with pytest.raises(ValueError, match="scale=0"):
        draw_boxes(grey(64, 48), scene(), scale=0)


def test_a_scene_without_boxes_leaves_the_picture():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    drawn = draw_boxes(picture, Scene(id="s", objects=(SceneObject(phrase="sky"),)), scale=1)
    assert np.array_equal(np.asarray(drawn), np.asarray(picture))


def test_boxes_are_drawn_where_they_are_on_a_picture_wider_than_high():
    box = (0.25, 0.5, 0.75, 0.9)
    found = pixels(draw_boxes(grey(800, 400), scene(box)), colour_of(0))
    assert np.abs(found.min(0) - (200, 200)).max() <= 2
    assert np.abs(found.max(0) - (600, 360)).max() <= 2


def test_every_box_keeps_some_of_its_colour_and_the_picture_is_not_changed():
    rng = np.random.default_rng(1)
    corners = np.sort(rng.uniform(size=(12, 2, 2)), 1).reshape(-1, 4)
    picture = grey(320, 256)
    drawn = draw_boxes(picture, scene(*[tuple(c) for c in corners.tolist()]))
    assert all(len(pixels(drawn, colour_of(i))) > 20 for i in range(12))
    assert picture.getcolors() == [(320 * 256, (128, 128, 128))]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes_are_taken(mode):
    assert draw_boxes(grey(30, 20).convert(mode), scene((0.1, 0.1, 0.9, 0.9))).mode == "RGB"


def test_long_phrases_and_one_pixel_pictures_are_survived():
    item = SceneObject(phrase="word " * 60 + "w" * 200, box=(0.0, 0.0, 1.0, 1.0))
    many = Scene(id="s", objects=(item,) * 30)
    assert draw_boxes(grey(1, 1), many).size == (256, 256)
    assert draw_graph(many, size=(80, 64)).size == (80, 64)


@pytest.mark.parametrize("size", [(512, 512), (300, 200), (200, 400)])
def test_graphs_show_every_node(size):
    boxes = [(0.1, 0.1, 0.2, 0.2), (0.1, 0.1, 0.2, 0.2), (0.7, 0.6, 0.9, 0.9)]  # two at the same place
    for placed in (boxes, [*boxes[:2], None]):
        drawn = draw_graph(scene(*placed, relations=relations_from_boxes(placed)), size=size)
        assert drawn.size == size
        for index in range(3):
            near = np.abs(np.asarray(drawn).astype(int) - colour_of(index)).sum(-1) < 12
            assert near.sum() > 100, f"node {index} is hidden"


def test_arrows_join_nodes_in_both_directions():
    apart = ((0.0, 0.0, 0.2, 0.2), (0.8, 0.8, 1.0, 1.0))
    both = (
        Relation(subject=0, predicate="near", object=1),
        Relation(subject=1, predicate="far from", object=0),
    )
    bare, one, two = (draw_graph(scene(*apart, relations=both[:n])) for n in range(3))
    inked = [(np.asarray(picture) < 250).any(-1).sum() for picture in (bare, one, two)]
    assert inked[0] + 300 < inked[1] < inked[2] - 300


def test_an_empty_graph_says_so_and_a_tiny_one_is_refused():
    assert draw_graph(Scene(id="s")).getextrema() != ((255, 255),) * 3
    with pytest.raises(ValueError, match=r"size=\(10, 90\)"):
        draw_graph(Scene(id="s"), size=(10, 90))


def test_grid_sets_pictures_out_in_rows():
    red, blue = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (30, 16), (0, 0, 255))
    sheet = grid([[red, blue], [blue]], padding=4)
    assert sheet.size == (4 + 30 + 4 + 30 + 4, 4 + 16 + 4 + 16 + 4)
    assert len(pixels(sheet, (255, 0, 0))) == 200
    assert len(pixels(sheet, (0, 0, 255))) == 960
    assert pixels(sheet, (255, 0, 0)).min(0).tolist() == [4 + 5, 4 + 3]  # centred in its cell


def test_grid_titles_take_room_above():
    bare = grid([[grey(60, 40), grey(90, 50)]])
    titled = grid([[grey(60, 40), grey(90, 50)]], titles=["layout", "a much longer title of several words"])
    assert titled.height > bare.height
    assert len(pixels(titled, (128, 128, 128))) == 60 * 40 + 90 * 50
    head = np.asarray(titled)[: titled.height - bare.height]
    assert (head[:, : titled.width // 3] < 128).any()
    assert (head[:, titled.width // 2 :] < 128).any()


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="nothing to show"):
        grid([])
    with pytest.raises(ValueError, match="1 for 2 columns"):
        grid([[grey(4, 4), grey(4, 4)]], titles=["one"])


def test_of_more_objects_than_are_legible_the_boxes_are_drawn_and_the_others_counted(monkeypatch):
    boxes = [(0.01 * i, 0.01 * j, 0.01 * i + 0.009, 0.01 * j + 0.009) for i in range(90) for j in range(60)]
    many = Scene(id="many", objects=tuple(SceneObject(phrase=f"thing {n}", box=box) for n, box in enumerate(boxes)))
    written = []
    monkeypatch.setattr(draw, "_centred", lambda _, text, *__: written.append(text))
    drawn = np.asarray(draw_boxes(Image.new("RGB", (512, 512), "white"), many))
    assert len(written) == draw.LEGIBLE
    assert (drawn.reshape(-1, 3).min(1) < 200).mean() > 0.2  # boxes without a phrase too
    draw_graph(many)
    assert len(written) == 2 * draw.LEGIBLE
