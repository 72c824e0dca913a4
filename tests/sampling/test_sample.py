"""What `sample.py` saves, and which pictures it cannot keep."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.composition import compose
from runtime.run_directory import load_run_config
from sampling.sample import draw

SCENE = Path(__file__).parents[2] / "examples" / "four_shapes.json"
ORANGE = (255, 127, 0)


@pytest.fixture
def sheet(short_run, tmp_path):
    """sheet(*overrides): the pixels of the sheet that `sample.py` draws with the short run."""
    run, _ = short_run

    def drawn(*overrides):
        out = tmp_path / "sheet.png"
        cfg = compose("sample", [f"run={run.run}", f"scene={SCENE}", f"out={out}", *overrides])
        draw(cfg, load_run_config(cfg.run, cfg))
        with Image.open(out) as picture:
            return np.asarray(picture.convert("RGB"))

    return drawn


def share_of(colour, pixels):
    return float((pixels == colour).all(axis=-1).mean())


def test_a_given_picture_is_kept_outside_the_boxes_and_shown_beside(sheet, tmp_path):
    Image.new("RGB", (50, 40), ORANGE).save(tmp_path / "given.png")
    without, given = sheet(), sheet(f"inpaint={tmp_path / 'given.png'}", "paste_back=true")
    assert given.shape == without.shape
    assert share_of(ORANGE, without) < 0.01
    columns = np.array_split(given, 4, axis=1)
    assert share_of(ORANGE, columns[3]) > 0.8
    assert 0.1 < share_of(ORANGE, columns[2]) < 0.8
    assert share_of(ORANGE, columns[0]) < 0.01


def test_the_demo_s_layout_file_is_drawn_and_a_caption_given_beside_it(sheet, tmp_path):
    layout = {"bboxes": [[0, 0, 200, 200], [256, 256, 512, 512]], "labels": ["a red circle", "a blue square; plain"]}
    (tmp_path / "demo.json").write_text(json.dumps(layout))
    plain = sheet(f"scene={tmp_path / 'demo.json'}")
    said = sheet(f"scene={tmp_path / 'demo.json'}", "caption=a red circle")
    assert plain.shape == said.shape
    assert not np.array_equal(plain, said)
    (tmp_path / "demo.json").write_text(json.dumps({**layout, "caption": "a red circle"}))
    np.testing.assert_array_equal(sheet(f"scene={tmp_path / 'demo.json'}"), said)


def test_scenes_in_other_forms_are_drawn(sheet, tmp_path):
    (tmp_path / "room.txt").write_text("red plain circle | left of | blue plain square\ngreen striped diamond\n")
    items = [{"item_id": n, "label": label, "attributes": ["red"]} for n, label in enumerate(("circle", "square"))]
    entry = {"img_id": "1", "items": items, "relations": [{"item1": 0, "relation": "above", "item2": 1}]}
    (tmp_path / "entry.json").write_text(json.dumps([entry]))
    sheets = [sheet(f"scene={tmp_path / name}") for name in ("room.txt", "entry.json")]
    graphs = [np.array_split(pixels, 4, axis=1)[0] for pixels in sheets]
    assert not np.array_equal(*graphs)
    (tmp_path / "room.txt").write_text("red circle | left of")
    with pytest.raises(ValueError, match=r"room\.txt: line 1: .* is no triple"):
        sheet(f"scene={tmp_path / 'room.txt'}")


def test_what_is_no_picture_is_refused_in_one_line(sheet, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    for name in ("notes.txt", "nowhere.png"):
        with pytest.raises(ValueError, match=f"^inpaint: .*{name} is no picture that can be read") as caught:
            sheet(f"inpaint={tmp_path / name}")
        assert "\n" not in str(caught.value)


def test_the_sheet_before_the_refiner_stays_beside(sheet, tiny_refiner, tmp_path):
    plain = sheet()
    small = ("refiner=sdxl", f"refiner.path={tiny_refiner}", "refiner.dtype=float32", "refiner.steps=4")
    refined = sheet(*small)
    with Image.open(tmp_path / "sheet_non_refined.png") as before:
        assert np.array_equal(np.asarray(before.convert("RGB")), plain)
    assert refined.shape == plain.shape
    columns = [np.array_split(picture, 4, axis=1) for picture in (refined, plain)]
    assert [bool((one != other).any()) for one, other in zip(*columns, strict=True)] == [False, True, True, True]


def test_a_refiner_would_repaint_what_is_kept(sheet):
    with pytest.raises(ValueError, match="^refiner: it paints the whole of a picture, and inpaint=p.png keeps a part"):
        sheet("refiner=sdxl", "inpaint=p.png")
