"""A picture of each scene of a split: by one process or several, at once or in turn, killed or not, the same files."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from datamodules.shards import ShardSet, write_shards
from datamodules.sources.laion_sg import LaionSg
from runtime.composition import compose
from runtime.run_directory import load_run_config
from sampling.manifest import picture_name
from sampling.split_sampling import draw_split

IDS = ["100", "7", "a b", "c/d", "9"]


def entry(name):
    items = [{"item_id": n, "label": label, "attributes": ["red"]} for n, label in enumerate(("circle", "square"))]
    relations = [{"item1": 0, "relation": "left of", "item2": 1}]
    return {
        "img_id": name,
        "name": f"{len(name)}{name[0]}.jpg",
        "caption_ori": f"a {name}",
        "items": items,
        "relations": relations,
    }


@pytest.fixture(scope="module")
def laion(tmp_path_factory):
    """A folder of LAION-SG with five pictures of 48 x 80 px, left half white; and its shards."""
    root = tmp_path_factory.mktemp("laion_sg")
    (root / "data").mkdir()
    pixels = np.zeros((48, 80, 3), np.uint8)
    pixels[:, :40] = 255
    for name in IDS:
        Image.fromarray(pixels).save(root / "data" / entry(name)["name"], quality=95)
    (root / "train.json").write_text(json.dumps([entry(name) for name in IDS]))
    return root, write_shards(LaionSg(root=str(root)), root / "shards", shard_size=2)


@pytest.fixture
def drawn(short_run, laion):
    """drawn(out, *overrides, rank, ranks): what `sample.py split=...` says as one of several processes."""

    def draw(out, *overrides, rank=0, ranks=1, split=None):
        run = short_run[0].run
        given = ("batch_size=2", *overrides)
        cfg = compose("sample", [f"run={run}", f"split={split or laion[1]}", f"out={out}", *given])
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        return draw_split(cfg, load_run_config(run, cfg), environment=place if ranks > 1 else {})

    return draw


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".jpg", ".png")}


def test_each_scene_has_a_picture_by_its_id_beside_one_manifest(drawn, tmp_path):
    out = tmp_path / "out"
    assert drawn(out) == f"{out}: rank 0 of 1 made 5 pictures; of 5 all are there"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["100.jpg", "7.jpg", "9.jpg", "a b.jpg", "c%2Fd.jpg", "manifest.json"]
    )
    assert set(json.loads((out / "manifest.json").read_text())["pictures"]) == set(IDS)
    with Image.open(out / "7.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (32, 32))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.jpg")}
    assert drawn(out) == f"{out}: rank 0 of 1 made 0 pictures; of 5 all are there"
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.jpg")} == before


def test_ranks_make_each_picture_once_and_others_go_on_where_they_were_killed(drawn, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    drawn(whole, "picture_format=png")
    assert "rank 1 of 2 made 2 pictures; of 5 3 are still to come" in drawn(
        parts, "picture_format=png", rank=1, ranks=2
    )
    assert sorted(files(parts)) == ["7.png", "c%2Fd.png"]
    assert (parts / "journal-1.jsonl").is_file()
    (parts / "7.png").write_bytes(b"torn")
    # another number of ranks takes over: only what is missing is made, and the last one folds the journals
    said = [drawn(parts, "picture_format=png", rank=rank, ranks=3) for rank in range(3)]
    assert sum(int(re.search(r"made (\d+) pictures", one)[1]) for one in said) == 4
    assert said[-1].endswith("all are there")
    assert not list(parts.glob("journal-*"))
    assert files(parts).keys() == files(whole).keys()
    for name in files(whole):
        one, other = (np.asarray(Image.open(folder / name)).astype(int) for folder in (whole, parts))
        assert abs(one - other).max() <= 1  # other batches round otherwise


def test_a_file_of_entries_is_a_split_too_and_can_be_cut_short(drawn, laion, tmp_path):
    drawn(tmp_path / "out", "limit=2", split=laion[0] / "train.json")
    assert sorted(files(tmp_path / "out")) == ["100.jpg", "7.jpg"]
    with pytest.raises(ValueError, match="npz=true: .* has no pictures") as caught:
        drawn(tmp_path / "npz", "npz=true", split=laion[0] / "train.json")
    assert "\n" not in str(caught.value)


def test_pairs_hold_the_true_picture_made_square_and_the_drawn_one(drawn, laion, tmp_path):
    out = tmp_path / "out"
    for rank in range(2):
        drawn(out, "npz=true", "picture_format=png", rank=rank, ranks=2)
    assert sorted(str(path.relative_to(out)) for path in out.glob("npz_files_*/*")) == [
        f"npz_files_{rank}/batch_{place}.npz" for rank, count in ((0, 3), (1, 2)) for place in range(count)
    ]
    stored = ShardSet(laion[1])
    for number in range(len(stored)):
        pair = np.load(out / f"npz_files_{number % 2}" / f"batch_{number // 2}.npz")
        assert {name: (pair[name].shape, pair[name].dtype) for name in pair.files} == {
            "real_images": ((1, 32, 32, 3), np.uint8),
            "fake_images": ((1, 32, 32, 3), np.uint8),
        }
        with Image.open(out / f"{picture_name(IDS[number])}.png") as picture:
            assert np.array_equal(pair["fake_images"][0], np.asarray(picture))
        # the run's data cuts the centre square out: columns 16 to 64 of 80, of which 16 to 40 are white
        real = pair["real_images"][0, :, :, 0]
        assert real[:, :14].min() > 200
        assert real[:, 18:].max() < 50
    with pytest.raises(ValueError, match=r"5 scenes over 2 ranks, asked for are 5 over 1; remove them") as caught:
        drawn(out, "npz=true", "picture_format=png")
    assert "\n" not in str(caught.value)


def test_pictures_of_other_settings_are_not_mixed(drawn, tmp_path):
    drawn(tmp_path / "out", "limit=1")
    with pytest.raises(ValueError, match="its pictures were made with seed=0, which is 1 now"):
        drawn(tmp_path / "out", "limit=1", "seeds=[1]")
    with pytest.raises(ValueError, match="its pictures were made with picture_format="):
        drawn(tmp_path / "out", "limit=1", "picture_format=png")


def test_scenes_that_would_share_a_picture_are_refused(drawn, laion, tmp_path):
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps([entry("1"), entry("2"), entry("1")]))
    with pytest.raises(ValueError, match="scene id '1' is asked for twice"):
        drawn(tmp_path / "out", split=twice, rank=1, ranks=2)


def test_pictures_of_a_split_are_refined_where_asked_and_lie_beside_those_before(drawn, tiny_refiner, tmp_path):
    small = ("limit=2", "picture_format=png")
    drawn(tmp_path / "plain", *small)
    refined = ("refiner=sdxl", f"refiner.path={tiny_refiner}", "refiner.dtype=float32", "refiner.steps=4")
    drawn(tmp_path / "out", *small, *refined)
    plain, out = files(tmp_path / "plain"), files(tmp_path / "out")
    for name, picture in plain.items():
        assert out[name.replace(".png", "_non_refined.png")] == picture
        assert out[name] != picture
    assert len(out) == 2 * len(plain)
    with pytest.raises(ValueError, match="were made with"):
        drawn(tmp_path / "out", *small)
