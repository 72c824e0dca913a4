"""Pictures that say how they were made: made again from that, with other settings, with weights that are gone, and forged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.composition import compose
from runtime.run_config import restored_config
from sampling.image_record import compared, read_record, save_picture
from sampling.reproduce import again
from sampling.sample import draw

SCENE = Path(__file__).parents[2] / "examples" / "four_shapes.json"
PHRASES = ("caption=a red circle", "phrases=[red circle,blue square]", "boxes=[[0.1,0.1,0.4,0.5],[0.5,0.5,1,1]]")


@pytest.fixture(scope="module")
def run(short_run, tmp_path_factory):
    """A copy of the short run, to be moved about."""
    folder = tmp_path_factory.mktemp("again") / "run"
    shutil.copytree(short_run[0].run, folder)
    return folder


def drawn(*overrides, backbone=None):
    """What `sample.py` does, with a backbone of another size than that of `conf/`; the file."""
    cfg = compose("sample", overrides)
    cfg.backbone = cfg.backbone if backbone is None else backbone
    made = None if cfg.again is None else again(cfg)
    cfg = cfg if made is None else made.cfg
    return draw(cfg, restored_config(cfg), made)


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def picture(run, tmp_path_factory):
    """A picture by itself of two phrases on the command line, seed 3."""
    out = tmp_path_factory.mktemp("pictures") / "picture.png"
    return drawn(f"run={run}", *PHRASES, "form=picture", "seeds=[3]", "++sampler.guidance=2", f"out={out}")


def test_a_picture_has_its_whole_scene_and_settings_in_it(picture, run):
    record = read_record(picture)
    assert record.scene["caption"] == "a red circle"
    assert [item["phrase"] for item in record.scene["objects"]] == ["red circle", "blue square"]
    assert record.scene["objects"][0]["box"] == [0.1, 0.1, 0.4, 0.5]
    assert record.settings["run"] == str(run)
    assert record.settings["checkpoint"] == "step=4.ckpt"
    assert (record.settings["seeds"], record.settings["sampler"]["guidance"]) == ([3], 2)
    assert len(record.weights_sha256) == 64
    assert {"torch", "diffusers", "device", "threads"} <= set(record.made_with)
    assert pixels(picture).shape == (32, 32, 3)


@pytest.mark.parametrize(
    "asked",
    [
        PHRASES + ("form=picture", "seeds=[3]"),
        (f"scene={SCENE}", "seeds=[0,2]"),
        (f"scene={SCENE}", "seeds=[0,1]", "guidances=[1,4]"),
        (f"scene={SCENE}", "form=grid", "++sampler.steps=3"),
    ],
    ids=["picture", "sheet", "grid", "column"],
)
def test_every_form_is_made_again_byte_for_byte(asked, run, tmp_path):
    first = drawn(f"run={run}", *asked, f"out={tmp_path / 'a.png'}")
    second = drawn(f"again={first}")
    assert second == tmp_path / "a_again.png"
    assert compared(first, second) == f"equal to {first} byte for byte"
    assert first.read_bytes() == second.read_bytes()


def test_what_the_command_line_sets_lies_over_what_the_picture_says(picture, run, tmp_path):
    out = f"out={tmp_path / 'other.png'}"
    other = drawn(f"again={picture}", "seeds=[4]", out)
    assert not np.array_equal(pixels(other), pixels(picture))
    assert compared(picture, other).startswith(f"differs from {picture} in ")
    assert read_record(other).settings == read_record(picture).settings | {"seeds": [4]}
    steps = read_record(drawn(f"again={picture}", "++sampler.steps=1", out)).settings["sampler"]
    assert (steps["steps"], steps["guidance"]) == (1, 2)
    scene = read_record(drawn(f"again={picture}", f"scene={SCENE}", "caption=other", out)).scene
    assert (len(scene["objects"]), scene["caption"]) == (4, "other")
    sheet = read_record(drawn(f"again={picture}", "guidances=[1,2]", out))
    assert (sheet.settings["form"], sheet.settings["guidances"]) == ("grid", [1, 2])


def test_the_picture_of_an_adapter_file_is_made_again(run, short_run, tmp_path):
    from runtime.conversion import convert

    file = tmp_path / "regions.safetensors"
    convert(compose("convert", [f"run={run}", f"out={file}"]))
    asked = (f"weights={file}", *PHRASES, "++sampler.steps=2", f"out={tmp_path / 'a.png'}")
    first = drawn(*asked, backbone=short_run[0].backbone)
    assert read_record(first).settings["weights"] == str(file)
    second = drawn(f"again={first}")
    assert first.read_bytes() == second.read_bytes()
    file.unlink()
    with pytest.raises(
        ValueError, match=r"^again=.*a\.png: the weights that drew it are not there \(weights=.*\); name them"
    ):
        drawn(f"again={first}")


def test_weights_that_have_moved_are_named_anew(picture, run, tmp_path):
    moved = run.with_name("moved")
    run.rename(moved)
    try:
        with pytest.raises(ValueError, match="the weights that drew it are not there .* name them with run=DIR"):
            drawn(f"again={picture}")
        second = drawn(f"again={picture}", f"run={moved}", f"out={tmp_path / 'b.png'}")
        assert compared(picture, second) == f"the same pixels as {picture}"
    finally:
        moved.rename(run)


def test_weights_that_have_changed_are_refused_and_may_be_taken(picture, run, tmp_path):
    import torch

    newer, older = run / "checkpoints" / "step=5.ckpt", run / "checkpoints" / "step=4.ckpt"
    stored = torch.load(older, weights_only=True)
    for value in stored["state_dict"].values():
        value += 1
    torch.save(stored, newer)
    try:
        same = drawn(f"again={picture}", f"out={tmp_path / 'a.png'}")  # the checkpoint that drew is there
        assert picture.read_bytes() == same.read_bytes()
        older.rename(run / "away")
        with pytest.raises(ValueError, match="has other weights now than those that drew it") as caught:
            drawn(f"again={picture}")
        assert "\n" not in str(caught.value)
        record = read_record(drawn(f"again={picture}", f"run={run}", f"out={tmp_path / 'b.png'}"))
        assert record.weights_sha256 != read_record(picture).weights_sha256
    finally:
        (run / "away").rename(older)
        newer.unlink()


def test_the_picture_that_was_kept_outside_has_to_be_the_same(run, tmp_path):
    given = tmp_path / "given.png"
    Image.new("RGB", (32, 32), (255, 127, 0)).save(given)
    first = drawn(f"run={run}", f"scene={SCENE}", f"inpaint={given}", "paste_back=true", f"out={tmp_path / 'a.png'}")
    assert drawn(f"again={first}").read_bytes() == first.read_bytes()
    Image.new("RGB", (32, 32), (0, 127, 0)).save(given)
    with pytest.raises(ValueError, match="inpaint=.* is not there, or another picture now; name it with inpaint=FILE"):
        drawn(f"again={first}")


def test_a_refined_sheet_and_the_one_before_are_made_again_each_from_itself(run, tiny_refiner, tmp_path):
    small = ("refiner=sdxl", f"refiner.path={tiny_refiner}", "refiner.dtype=float32", "refiner.steps=4")
    first = drawn(f"run={run}", f"scene={SCENE}", *small, f"out={tmp_path / 'a.png'}")
    before = tmp_path / "a_non_refined.png"
    assert drawn(f"again={first}").read_bytes() == first.read_bytes()
    assert drawn(f"again={before}", f"out={tmp_path / 'b.png'}").read_bytes() == before.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sampler": {"_target_": "os.system", "command": "true"}},
            "its sampler names os.system, which this project and",
        ),
        ({"refiner": {"_target_": "models.sampling.Sampler"}}, "its refiner names models.sampling.Sampler, which"),
        ({"conditioning": {"regions": {"module": "antigravity.x"}}}, "its conditioning names antigravity.x, which"),
        ({"trainer": {"accelerator": "${oc.env:HOME}"}}, r"its trainer names \$\{oc.env:HOME\}, which"),
        ({"seeds": ["a"]}, r"its settings are broken \(seeds: must be an integer\)"),
        ({"sampler": "ddim"}, r"its settings are broken \(sampler\)"),
        ({"seeds": []}, r"seeds=\[\]: must be one or more numbers"),
        ({"out": "elsewhere"}, r"its settings are broken \(out\)"),
    ],
)
def test_a_forged_picture_runs_nothing(picture, tmp_path, change, message):
    record = read_record(picture)
    forged = tmp_path / "forged.png"
    save_picture(Image.new("RGB", (8, 8)), forged, replace(record, settings={**record.settings, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        drawn(f"again={forged}")
    assert "\n" not in str(caught.value)


def test_a_forged_scene_is_refused_by_its_field(picture, tmp_path):
    record = read_record(picture)
    forged = tmp_path / "forged.png"
    save_picture(Image.new("RGB", (8, 8)), forged, replace(record, scene={**record.scene, "objects": [{"phrase": ""}]}))
    with pytest.raises(ValueError, match=r"^again=.*forged\.png: .*objects\[0\]\.phrase"):
        drawn(f"again={forged}")


def test_what_is_no_picture_of_ours_is_refused_in_one_line(picture, tmp_path):
    plain, text, newer = (tmp_path / name for name in ("plain.png", "text.png", "newer.png"))
    Image.new("RGB", (8, 8)).save(plain)
    text.write_text("no picture")
    content = picture.read_bytes()
    newer.write_bytes(content.replace(b'"schema": 1', b'"schema": 2'))
    for file, message in (
        (plain, "has no scene and settings in it"),
        (text, "is no PNG that can be read"),
        (tmp_path / "none.png", "is no PNG that can be read"),
        (newer, "is no PNG that can be read|of schema 2, this version reads 1"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            drawn(f"again={file}")
        assert "\n" not in str(caught.value)


def test_a_grid_has_its_axes(run, tmp_path):
    wide = pixels(
        drawn(f"run={run}", f"scene={SCENE}", "seeds=[0,1,2]", "guidances=[1,4]", f"out={tmp_path / 'a.png'}")
    )
    low = pixels(drawn(f"run={run}", f"scene={SCENE}", "seeds=[0]", "guidances=[1,4,7]", f"out={tmp_path / 'b.png'}"))
    assert wide.shape[0] > 3 * 256
    assert low.shape[0] < 2 * 256
    assert low.shape[1] - wide.shape[1] == 256 + 8
    assert (wide[40:, :8] == 255).all()  # the margin
    assert (wide[100:200, 8:60] < 200).any()  # the seed's name


def test_the_settings_are_json_that_other_programs_read(picture):
    with Image.open(picture) as opened:
        content = json.loads(opened.text["scenograph"])
    assert content["schema"] == 1
    assert set(content) == {"schema", "scene", "settings", "weights_sha256", "inpaint_sha256", "made_with"}
