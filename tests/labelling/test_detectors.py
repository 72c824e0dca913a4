"""Closed detectors: decoding against loops written out, drawn images, a tiny DETR saved and opened by the real code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DetrForObjectDetection, DetrImageProcessor

from labelling.coco_names import COCO_NAMES
from labelling.detectors import HubDetector, OnnxDetector, letterbox, read_names, read_yolov8, read_yolox
from labelling.parts import PartMissing
from scripts.samples.detector import KIND_OF
from scripts.samples.drawing import draw

COLOUR_NETWORK = Path(__file__).parents[1] / "samples" / "detector" / "colours.onnx"


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def hub(folder, **settings):
    return HubDetector(model=str(folder), **{"threshold": 0.0, **settings}).to("cpu")


def same(one, other, tolerance=1e-5):
    assert one.labels == other.labels
    assert one.boxes == pytest.approx(other.boxes, abs=tolerance)
    assert one.scores == pytest.approx(other.scores, abs=tolerance)


@pytest.mark.parametrize("kind", ["detr", "rtdetr"])
def test_a_detector_of_transformers_opens_from_a_folder(kind, tiny_model):
    detector = hub(tiny_model(kind), names=None if kind == "detr" else ["person", "cat", "dog"], batch_size=2)
    assert detector.names == ("person", "cat", "dog")
    pictures = [noise(50, 70), noise(60, 60, 1), noise(50, 70, 2), noise(50, 70, 3)]
    found = detector(pictures)
    assert max(len(one.labels) for one in found) > 0
    for one in found:
        assert one.boxes.shape == (len(one.labels), 4)
        assert one.boxes.dtype == one.scores.dtype == np.float32
        assert ((one.boxes >= 0) & (one.boxes <= 1)).all()
        assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()
        assert (np.diff(one.scores) <= 0).all()
        assert set(one.labels) <= {"person", "cat", "dog"}
    for picture, one in zip(pictures, found, strict=True):
        same(detector([picture])[0], one)


def test_detr_is_decoded_as_its_paper_says(tiny_model):
    folder, picture = tiny_model("detr"), noise(48, 96)
    found = hub(folder)([picture])[0]
    network = DetrForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        out = network(**DetrImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="pt"))
    scores = out.logits[0].softmax(-1)[:, :-1]
    best = [(s.max().item(), s.argmax().item(), box) for s, box in zip(scores, out.pred_boxes[0], strict=True)]
    best = sorted((one for one in best if one[1] != 0), key=lambda one: -one[0])  # 0 is no class
    assert len(best) == len(found.labels) > 0
    assert found.labels == tuple({1: "person", 2: "cat", 3: "dog"}[number] for _, number, _ in best)
    for (score, _, box), got, got_score in zip(best, found.boxes, found.scores, strict=True):
        cx, cy, w, h = box.tolist()
        assert got == pytest.approx(np.clip([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 0, 1), abs=1e-4)
        assert float(got_score) == pytest.approx(score, abs=1e-5)


def test_asked_for_some_classes_it_gives_those_alone(tiny_model):
    detector = hub(tiny_model("detr"))
    pictures = [noise(50, 70), noise(60, 60, 1)]
    everything = detector(pictures)
    label = everything[0].labels[0]
    some = detector(pictures, [[label], []])
    kept = [place for place, one in enumerate(everything[0].labels) if one == label]
    assert some[0].boxes == pytest.approx(everything[0].boxes[kept])
    assert some[1].labels == ()
    with pytest.raises(ValueError, match="'zebra'"):
        detector(pictures, [["zebra"], []])


def test_top_and_threshold_leave_the_most_certain(tiny_model):
    folder, pictures = tiny_model("detr"), [noise(50, 70)]
    everything = hub(folder)(pictures)[0]
    assert hub(folder, top=2)(pictures)[0].scores == pytest.approx(everything.scores[:2])
    assert len(hub(folder, threshold=float(everything.scores[2]))(pictures)[0].labels) == 3


def test_what_is_not_there_is_named(tiny_model, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(PartMissing, match="not loaded yet"):
        HubDetector(model=tiny_model("detr"))([noise(8, 8)])
    with pytest.raises(ValueError, match="detector.names: 2 .* 4 "):
        hub(tiny_model("detr"), names=["a", "b"])
    with pytest.raises(PartMissing, match="detector.file=.*broken.onnx"):
        OnnxDetector(file=str(tmp_path / "broken.onnx"), form="yolox").to("cpu")
    with pytest.raises(ValueError, match="detector.form=yolov8"):  # of a file that holds another form
        OnnxDetector(file=str(COLOUR_NETWORK), form="yolov8").to("cpu")([noise(64, 64)])


def test_names_come_from_a_file_a_list_or_coco(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog \n")
    assert read_names(str(tmp_path / "names.txt")) == read_names(["cat", "dog"]) == ("cat", "dog")
    assert read_names("coco") == COCO_NAMES
    assert len(set(COCO_NAMES)) == 80


def test_yolox_is_decoded_place_by_place():
    side, classes = 64, 3
    output = torch.randn(2, 64 + 16 + 4, 5 + classes, generator=torch.Generator().manual_seed(0)).sigmoid()
    boxes, scores = read_yolox(output, side=side, classes=classes)
    cells = [(s, row, column) for s in (8, 16, 32) for row, column in np.ndindex(side // s, side // s)]
    for place, (stride, row, column) in enumerate(cells):
        x, y, w, h, there = output[1, place, :5].tolist()
        cx, cy = (x + column) * stride, (y + row) * stride
        w, h = np.exp(w) * stride, np.exp(h) * stride
        assert boxes[1, place].tolist() == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], rel=1e-5)
        assert scores[1, place].tolist() == pytest.approx((there * output[1, place, 5:]).tolist(), rel=1e-5)
    assert len(cells) == len(boxes[1])
    with pytest.raises(ValueError, match=r"detector.form=yolox: .*\(2, 84, 8\).*21, 8\)"):
        read_yolox(output, side=32, classes=classes)


def test_yolov8_is_decoded():
    output = torch.rand(1, 4 + 2, 21, generator=torch.Generator().manual_seed(0))
    output[0, :, 5] = torch.tensor([10.0, 20.0, 4.0, 6.0, 0.1, 0.9])
    boxes, scores = read_yolov8(output, side=32, classes=2)
    assert boxes[0, 5].tolist() == [8, 17, 12, 23]
    assert scores[0, 5].tolist() == pytest.approx([0.1, 0.9])
    with pytest.raises(ValueError, match="detector.form=yolov8"):
        read_yolov8(output.mT, side=32, classes=2)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [(40, 100), (90, 30), (32, 32)])
def test_the_square_holds_the_picture_and_gives_its_boxes_back(size, centred):
    height, width = size
    picture = np.zeros((height, width, 3), np.uint8)
    picture[height // 2 :, width // 2 :] = (255, 0, 128)
    square, back = letterbox(picture, 64, centred=centred)
    assert square.shape == (3, 64, 64)
    rows, columns = torch.nonzero(square[0] == 255, as_tuple=True)
    box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
    assert back(box)[0].tolist() == pytest.approx([width / 2, height / 2, width, height], abs=1.5 * max(size) / 64)
    grey = (square == 114).all(0)
    scaled = min(64 / height, 64 / width)
    whole = round if centred else int  # as each family counts pixels
    assert grey.sum().item() == 64 * 64 - whole(height * scaled) * whole(width * scaled)
    if height != width:
        assert grey[0, 0].item() == centred  # beside the picture, or at its corner


@pytest.fixture
def colours():
    """The hand-made network that finds the colours of the drawn samples."""
    return OnnxDetector(file=str(COLOUR_NETWORK), form="yolox", threshold=0.3).to("cpu")


def drawings(count, size):
    return [draw(number, size, 3, stream=9) for number in range(count)]


def test_what_is_drawn_is_found_where_it_is(colours):
    assert colours.side == 128
    right, total = 0, 0
    for size in ((96, 128), (128, 96), (250, 170), (64, 64)):
        for one in drawings(6, size):
            found = colours([np.asarray(one.image)])[0]
            centres = np.stack([found.boxes[:, [0, 2]].mean(1), found.boxes[:, [1, 3]].mean(1)], 1) * size[::-1]
            corners = np.array([thing.box for thing in one.things])
            inside = (centres[:, None] >= corners[:, :2]) & (centres[:, None] <= corners[:, 2:])
            alike = np.array([[KIND_OF[thing.colour] == label for thing in one.things] for label in found.labels])
            hits = inside.all(-1) & alike
            assert hits.any(0).all()  # every thing is found
            right, total = right + hits.any(1).sum(), total + len(hits)
    assert right > 0.95 * total  # where red and yellow share a cell it is orange


def test_pictures_give_the_same_in_any_batch(colours):
    pictures = [np.asarray(one.image) for size in ((96, 128), (150, 100)) for one in drawings(3, size)]
    together = colours(pictures)
    assert all(len(one.scores) for one in together)
    for picture, one in zip(pictures, together, strict=True):
        same(colours([picture])[0], one)
    settings = colours.settings()
    assert (settings["file"], len(settings["sha256"]), settings["names"]) == ("colours.onnx", 64, 80)


def test_a_mirrored_picture_gives_mirrored_boxes(colours):
    for one in drawings(4, (120, 160)):
        picture = np.asarray(one.image)
        before, after = (colours([image])[0] for image in (picture, np.ascontiguousarray(picture[:, ::-1])))
        back = np.abs(after.boxes[:, [2, 1, 0, 3]] - np.float32([1, 0, 1, 0]))
        expected, mirrored = (
            sorted(zip(labels, map(tuple, boxes), strict=True))
            for labels, boxes in ((before.labels, before.boxes), (after.labels, back))
        )
        assert [label for label, _ in expected] == [label for label, _ in mirrored] != []
        for (_, box), (_, other) in zip(expected, mirrored, strict=True):
            assert box == pytest.approx(other, abs=1e-4)
