"""The padded batch: its tensors say what its scenes say, whatever is done to it."""

import pytest
import torch

from scenes.scene import Scene, SceneBatch, SceneObject


def scene(name: str, *boxes) -> Scene:
    objects = tuple(SceneObject(phrase=f"{name}{i}", box=box) for i, box in enumerate(boxes))
    return Scene(id=name, caption=f"caption {name}", objects=objects)


A = scene("a", (0.0, 0.0, 0.5, 0.25))
B = scene("b", (0.25, 0.5, 0.5, 0.75), None, (0.5, 0.0, 1.0, 1.0))
C = scene("c")


def test_boxes_are_padded_and_unplaced_objects_are_not_valid():
    batch = SceneBatch([A, B, C])
    assert len(batch) == 3
    assert batch.boxes.shape == (3, 3, 4)
    assert batch.boxes.dtype == torch.float32
    assert batch.valid.tolist() == [[True, False, False], [True, False, True], [False] * 3]
    assert batch.boxes[1, 2].tolist() == [0.5, 0.0, 1.0, 1.0]
    assert batch.boxes[~batch.valid].eq(0).all()
    assert batch.captions == ["caption a", "caption b", "caption c"]
    assert batch.phrases == [["a0"], ["b0", "b1", "b2"], []]


def test_batches_without_objects_or_scenes_have_shapes():
    assert SceneBatch([C, C]).boxes.shape == (2, 0, 4)
    assert SceneBatch([]).boxes.shape == (0, 0, 4)


def test_drop_puts_null_scenes_in_place():
    batch = SceneBatch([A, B, C]).drop(torch.tensor([True, False, True]))
    assert batch.scenes == (A, B.without_layout(), C)
    assert batch.boxes.shape == (3, 1, 4)
    assert batch.captions[1] == "caption b"


@pytest.mark.parametrize("keep", [torch.tensor([True, False]), torch.tensor([1, 0, 1])])
def test_drop_refuses_what_is_not_one_bool_a_scene(keep):
    with pytest.raises(ValueError, match="one bool for each of the 3 scenes"):
        SceneBatch([A, B, C]).drop(keep)


def test_flip_mirrors_every_scene():
    batch = SceneBatch([A, B])
    assert batch.flip().boxes[0, 0].tolist() == [0.5, 0.0, 1.0, 0.25]
    assert torch.equal(batch.flip().flip().boxes, batch.boxes)
    assert torch.equal(batch.flip().valid, batch.valid)


def test_parts_by_slice_places_and_mask():
    batch = SceneBatch([A, B, C])
    assert batch[1:].scenes == (B, C)
    assert batch[[2, 0]].scenes == (C, A)
    assert batch[torch.tensor([False, True, False])].scenes == (B,)
    assert batch[[]].scenes == ()
    assert tuple(batch) == (A, B, C)
    with pytest.raises(TypeError, match=r"batch\.scenes\[1\]"):
        batch[1]


def test_device_follows_the_batch():
    batch = SceneBatch([A, B], device="meta")
    assert batch.boxes.device.type == "meta"
    assert batch[:1].valid.device.type == "meta"
    assert batch.flip().device.type == "meta"
    here = SceneBatch([A, B])
    assert here.to("cpu") is here
    assert here.to("meta").scenes == here.scenes
