"""Union attention against a loop over positions, and the geometry under it against its formulas."""

import itertools
import math

import pytest
import torch

from models.conditioning.base import Text
from models.conditioning.geometry import fourier, overlap, place_in_box
from models.conditioning.regions import RegionsAdapter
from models.conditioning.regions.union import PlaceMap, UnionAttention
from models.conditioning.slots import block_sites
from scenes import Scene, SceneBatch, SceneObject

SIZE = (10, 14)  # latent cells; the shapes backbone attends at half of it
CELLS = (5, 7)


def scene(name, *objects):
    return Scene(id=name, objects=tuple(SceneObject(phrase=phrase, box=box) for phrase, box in objects))


SCENES = SceneBatch(
    [
        scene(
            "three",
            ("red striped circle", (0.05, 0.1, 0.6, 0.7)),
            ("square", (0.4, 0.3, 0.95, 0.9)),
            ("blue diamond", (0.71, 0.02, 0.73, 0.05)),  # no cell's centre lies in it
        ),
        scene("one", ("a green circle and a plain square", (0.0, 0.5, 1.0, 1.0)), ("cat", None)),
        scene("none"),
    ]
)


def adapter_of(backbone, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = RegionsAdapter(backbone, variant="union", width=24, hidden=32, frequencies=4, **settings)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.3)
    return adapter


@pytest.fixture(scope="module")
def shapes(backbone_named):
    return backbone_named("shapes")


@pytest.fixture(scope="module")
def text(shapes):
    return Text(prompt=shapes.encode_captions([""]), phrases=shapes.encode_phrases)


def holds(box, row, column):
    """Whether a cell's centre lies in a box; a box without any centre takes the cell under its own."""
    inside = [
        (r, c)
        for r, c in itertools.product(range(CELLS[0]), range(CELLS[1]))
        if box[0] <= (c + 0.5) / CELLS[1] < box[2] and box[1] <= (r + 0.5) / CELLS[0] < box[3]
    ]
    own = (int((box[1] + box[3]) / 2 * CELLS[0]), int((box[0] + box[2]) / 2 * CELLS[1]))
    return (row, column) in (inside or [own])


def looped(attention, adapter, text, hidden, places):
    """The attention position by position, head by head, over the words of the boxes that hold the position."""
    out = hidden.clone()
    for b, one in enumerate(SCENES):
        for row, column in itertools.product(range(CELLS[0]), range(CELLS[1])):
            position = row * CELLS[1] + column
            words = []
            for item in one.objects:
                if item.box is not None and holds(item.box, row, column):
                    features = text.phrases([item.phrase])
                    words.append(
                        adapter.position_net(
                            features.last_hidden[0], torch.tensor([item.box]).expand(features.last_hidden.shape[1], 4)
                        )
                    )
            if words:
                tokens = torch.cat(words)
                query = attention.to_q(attention.norm(hidden[b, position])).unflatten(0, (attention.heads, -1))
                key, value = (
                    project(tokens).unflatten(1, (attention.heads, -1)) for project in (attention.to_k, attention.to_v)
                )
                heads = []
                for head in range(attention.heads):
                    scores = key[:, head] @ query[head] / math.sqrt(query.shape[1])
                    heads.append(scores.softmax(0) @ value[:, head])
                found = torch.cat(heads)
            else:
                found = attention.null
            if places is not None:
                known = torch.cat([attention.norm(hidden[b, position]), found, places[b, position]])
                found = torch.nn.functional.silu(attention.mix(known))
            out[b, position] = hidden[b, position] + attention.to_out(found)
    return out


@torch.no_grad()
@pytest.mark.parametrize("place_width", [0, 6])
def test_masked_attention_equals_a_loop_over_positions(place_width, shapes, text):
    adapter = adapter_of(shapes, place_width=place_width)
    attention = adapter.attentions[1]
    payload = adapter(SCENES, text, SIZE).payload
    level = payload.levels[35]
    assert 0 < level.covered[0].sum() < 35
    assert not level.covered[2].any()
    hidden = torch.randn(3, 35, attention.norm.normalized_shape[0], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        attention(hidden, payload), looped(attention, adapter, text, hidden, level.places), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_a_new_attention_adds_nothing(shapes):
    attention = UnionAttention(block_sites(shapes.unet)[0], token_width=24, place_width=0)
    assert not attention.to_out.weight.any()
    assert not attention.to_out.bias.any()


def test_gates_are_zero_at_first_and_tell_when_it_acts(shapes):
    adapter = RegionsAdapter(shapes, variant="union")
    assert adapter.gates() == dict.fromkeys(adapter.slot_modules(), 0.0)
    with torch.no_grad():
        adapter.attentions[0].to_out.weight.fill_(-0.5)
    assert sorted(adapter.gates().values()) == [0.0, 0.0, 0.0, 0.5]


@torch.no_grad()
def test_an_object_without_a_box_does_not_act(shapes, text):
    adapter = adapter_of(shapes, place_width=6)
    with_it, without = (
        adapter(SceneBatch([one]), text, SIZE).payload
        for one in (
            scene("a", ("red circle", (0.1, 0.1, 0.5, 0.8)), ("blue square", None)),
            scene("a", ("red circle", (0.1, 0.1, 0.5, 0.8))),
        )
    )
    hidden = torch.randn(1, 35, 24, generator=torch.Generator().manual_seed(1))
    attention = adapter.attentions[0]
    torch.testing.assert_close(attention(hidden, with_it), attention(hidden, without), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("blocks", "part"), [("mid", "mid_block"), (["up"], "up_blocks")])
def test_it_acts_in_the_chosen_blocks_alone(blocks, part, shapes):
    paths = RegionsAdapter(shapes, variant="union", blocks=blocks).slot_modules()
    assert paths
    assert all(path.startswith(part) for path in paths)


def test_the_place_width_adds_the_place_map(shapes):
    keys = {width: set(RegionsAdapter(shapes, variant="union", place_width=width).state_dict()) for width in (0, 6)}
    added = keys[6] - keys[0]
    assert keys[0] < keys[6]
    assert all(key.startswith("places.") or ".mix." in key for key in added)


@pytest.fixture(scope="module")
def places():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PlaceMap(token_width=5, width=3, hidden=7).requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    return torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))


class TestPlaceMap:
    BOXES = torch.tensor([[[0.1, 0.2, 0.65, 0.9], [0.5, 0.0, 1.0, 0.33], [0.0, 0.0, 2 / 7, 1.0]]])

    def at(self, places, tokens, *which):
        """(5, 7, 3) of the boxes at `which`, in that order."""
        valid = torch.ones(1, len(which), dtype=torch.bool)
        return places(tokens[:, which], self.BOXES[:, which], valid, CELLS)[0].unflatten(0, CELLS)

    def test_the_order_of_boxes_does_not_matter(self, places, tokens):
        torch.testing.assert_close(self.at(places, tokens, 0, 1, 2), self.at(places, tokens, 2, 0, 1))

    def test_what_is_not_valid_does_not_act(self, places, tokens):
        result = places(tokens, self.BOXES, torch.tensor([[True, False, True]]), CELLS)
        torch.testing.assert_close(result[0].unflatten(0, CELLS), self.at(places, tokens, 0, 2))

    def test_a_box_acts_where_it_touches_and_nowhere_else(self, places, tokens):
        nothing = places(tokens, self.BOXES, torch.zeros(1, 3, dtype=torch.bool), CELLS)[0].unflatten(0, CELLS)
        assert nothing.flatten(0, 1).unique(dim=0).shape[0] == 1
        changed = (self.at(places, tokens, 2) - nothing).abs().amax(-1) > 1e-6
        assert changed[:, :2].all()
        assert not changed[:, 2:].any()
        beside = self.at(places, tokens, 0, 1)[:, :1]
        torch.testing.assert_close(beside, self.at(places, tokens, 0)[:, :1])

    def test_it_tells_places_and_objects_apart(self, places, tokens):
        inside = self.at(places, tokens, 2)[:, :2].flatten(0, 1)
        assert inside.unique(dim=0).shape[0] == inside.shape[0]
        assert not torch.allclose(self.at(places, tokens.flip(1), 2), self.at(places, tokens, 2), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("phrase", "other"), [("red circle", "blue circle"), ("red circle", "red square")])
def test_the_place_map_knows_the_whole_phrase(phrase, other, shapes, text):
    adapter = adapter_of(shapes, place_width=6)
    box = (0.1, 0.1, 0.5, 0.8)
    first, second = (
        adapter(SceneBatch([scene("a", (words, box))]), text, SIZE).payload.levels[35].places
        for words in (phrase, other)
    )
    assert (first - second).abs().max() > 1e-3


def test_fourier_features_follow_the_formula():
    values = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = fourier(values, 8)
    assert features.shape == (2, 3, 64)
    for b, n, d, f in itertools.product(range(2), range(3), range(4), range(8)):
        angle = 100 ** (f / 8) * float(values[b, n, d])
        assert features[b, n, 8 * f + d].item() == pytest.approx(math.sin(angle), abs=1e-12)
        assert features[b, n, 8 * f + 4 + d].item() == pytest.approx(math.cos(angle), abs=1e-12)


class TestOverlap:
    BOXES = torch.tensor(
        [
            [[0.0, 0.0, 1.0, 1.0], [0.13, 0.21, 0.58, 0.87], [0.4, 0.4, 0.41, 0.42]],
            [[0.9, 0.0, 1.0, 0.05], [0.0, 0.5, 1.0, 0.75], [0.2, 0.1, 0.9, 0.3]],
        ],
        dtype=torch.float64,
    )

    def test_it_sums_to_the_area_of_the_box_in_cells(self):
        share = overlap(self.BOXES, torch.ones(2, 3, dtype=torch.bool), (6, 11))
        assert share.shape == (2, 3, 6, 11)
        assert share.min() >= 0
        assert share.max() <= 1
        sides = self.BOXES[..., 2:] - self.BOXES[..., :2]
        torch.testing.assert_close(share.sum((-1, -2)), sides.prod(-1) * 66)

    def test_each_cell_has_its_own_share(self):
        share = overlap(self.BOXES[:1, 1:2], torch.ones(1, 1, dtype=torch.bool), (2, 4))[0, 0]
        across = torch.tensor([0.12 * 4, 1, 0.08 * 4, 0], dtype=torch.float64)  # 0.13 to 0.58 over quarters
        down = torch.tensor([0.29 * 2, 0.37 * 2], dtype=torch.float64)  # 0.21 to 0.87 over halves
        torch.testing.assert_close(share, down[:, None] * across)

    def test_what_is_not_valid_covers_nothing(self):
        valid = torch.tensor([[True, False, True], [False, True, False]])
        share = overlap(self.BOXES, valid, (6, 11))
        assert (share.sum((-1, -2)) > 0).equal(valid)


class TestPlaceInBox:
    BOX = (0.2, 0.25, 0.7, 0.5)

    def at(self, row, column, size=(8, 5), frequencies=2):
        return place_in_box(torch.tensor([[self.BOX]], dtype=torch.float64), size, frequencies)[0, 0, row, column]

    def test_shape(self):
        boxes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).sort(-1).values
        assert place_in_box(boxes, (5, 7), 3).shape == (2, 3, 5, 7, 4 + 8 * 3)

    @pytest.mark.parametrize(("row", "column"), list(itertools.product((0, 2, 3, 7), (0, 1, 2, 4))))
    def test_distances_over_the_sides_of_the_box_and_waves_of_them_in_cells(self, row, column):
        (x0, y0, x1, y1), (h, w) = self.BOX, (8, 5)
        x, y = (column + 0.5) / w, (row + 0.5) / h
        far = [(x - x0) / (x1 - x0), (x1 - x) / (x1 - x0), (y - y0) / (y1 - y0), (y1 - y) / (y1 - y0)]
        near = [(x - x0) * w, (x1 - x) * w, (y - y0) * h, (y1 - y) * h]
        waves = [math.pi / 2 * max(-2, min(2, distance)) / 2 * 2**f for f in range(2) for distance in near]
        expected = [
            *(max(-1, min(2, value)) for value in far),
            *(math.sin(wave) for wave in waves),
            *(math.cos(wave) for wave in waves),
        ]
        torch.testing.assert_close(self.at(row, column), torch.tensor(expected, dtype=torch.float64))

    def test_opposite_distances_make_the_whole_box(self):
        inside = self.at(2, 2)
        assert inside[0] + inside[1] == pytest.approx(1)
        assert inside[2] + inside[3] == pytest.approx(1)

    def test_a_box_without_size_gives_finite_places(self):
        boxes = torch.full((1, 1, 4), 0.5)
        assert place_in_box(boxes, (3, 4), 2).isfinite().all()
