"""The scripts as people run them: sample, a scene, a picture again from itself, a split by two ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "line 1"),
        (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b'{"id": "a", "objects": [{"phrase": "x", "box": [0, 0, 1e400, 1]}]}', "objects[0].box"),
        (b"\xff\xfe\x00", "UTF-8"),
        (None, "directory"),
    ],
)
def test_a_broken_scene_file_is_refused_in_one_line(trained, refusal, tmp_path, content, word):
    scene = tmp_path / "sünde.json"
    scene.mkdir() if content is None else scene.write_bytes(content)
    line = refusal("sample.py", f"run={trained[0]}", f"scene={scene}", f"out={tmp_path / 'x.png'}")
    assert str(scene) in line
    assert word in line


def test_a_scene_file_becomes_a_picture(trained, tmp_path, run):
    out = tmp_path / "sheet.png"
    run("sample.py", f"run={trained[0]}", "scene=examples/four_shapes.json", f"out={out}", "seeds=[0,1]")
    with Image.open(out) as sheet:
        assert sheet.size[0] > 512


def test_a_picture_is_made_again_from_itself_byte_for_byte(trained, tmp_path, run, read):
    run_cfg, picture = f"run={trained[0]}", tmp_path / "picture.png"
    phrases = ("phrases=[red circle,blue square]", "boxes=[[.1,.1,.4,.5],[.5,.5,1,1]]")
    run("sample.py", run_cfg, *phrases, "seeds=[0,1]", "guidances=[1,2]", f"out={picture}")
    out = run("sample.py", f"again={picture}")
    second = tmp_path / "picture_again.png"
    assert out.splitlines()[-1] == f"{second}: equal to {picture} byte for byte"
    assert second.read_bytes() == picture.read_bytes()
    other = run("sample.py", f"again={picture}", "sampler.steps=1", f"out={tmp_path / 'other.png'}")
    assert other.splitlines()[-1] == str(tmp_path / "other.png")
    assert not np.array_equal(read(tmp_path / "other.png"), read(picture))


def test_two_ranks_at_once_draw_a_split_exactly_once(trained, data, tmp_path, run, start, read):
    shards = Path(data.partition("=")[2]) / "shapes" / "validation"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = (f"run={trained[0]}", f"split={shards}", "limit=7", "batch_size=2", "picture_format=png")
    assert "made 7 pictures; of 7 all are there" in run("sample.py", *common, f"out={whole}")
    processes = [
        start("sample.py", *common, f"out={parts}", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [f"rank {rank} of 2 made {count} pictures" in said[rank] for rank, count in ((0, 4), (1, 3))] == [True, True]
    assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert not list(parts.glob("journal-*"))
    for file in whole.glob("*.png"):
        assert abs(read(file) - read(parts / file.name)).max() <= 1
    assert "rank 0 of 1 made 0 pictures" in run("sample.py", *common, f"out={parts}")


def test_a_scene_that_cannot_be_drawn_is_refused_by_its_field(trained, tmp_path, refusal):
    # every other kind of bad scene: tests/scenes/test_scene_json.py
    scene = json.loads(Path("examples/four_shapes.json").read_text())
    scene["relations"] = [{"subject": 0, "predicate": "above", "object": 7}]
    file = tmp_path / "scene.json"
    file.write_text(json.dumps(scene))
    out = tmp_path / "never.png"
    assert "relations[0].object" in refusal("sample.py", f"run={trained[0]}", f"scene={file}", f"out={out}")
    assert not out.exists()
