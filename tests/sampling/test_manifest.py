"""Generated pictures are kept exactly once, whatever interrupts the work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sampling.manifest import Manifest

SETTINGS = {"weights": "abc", "sampler": {"name": "ddim", "steps": 50}, "guidance": 5.0, "seeds": (0, 1)}
ROOT = Path(__file__).resolve().parents[2]


def picture(value: int, height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pictures_come_back_as_they_were(tmp_path):
    manifest = Manifest(tmp_path / "with_scene", SETTINGS)
    manifest.write("a", picture(1))
    manifest.write("b", Image.fromarray(picture(2)))
    assert np.array_equal(np.asarray(manifest.read("a")), picture(1))
    assert np.array_equal(np.asarray(manifest.read("b")), picture(2))
    assert len(manifest) == 2
    assert sorted(p.name for p in (tmp_path / "with_scene/pictures").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("finished", [False, True])
def test_missing_keeps_order_over_a_restart(tmp_path, finished):
    manifest = Manifest(tmp_path, SETTINGS)
    for name in "db":
        manifest.write(name, picture(ord(name)))
    if finished:
        manifest.finish()
    again = Manifest(tmp_path, SETTINGS)
    assert again.missing(list("dcba")) == ["c", "a"]
    again.write("c", picture(3))
    assert again.missing(list("dcba")) == ["a"]


def test_finish_leaves_one_manifest(tmp_path):
    manifest = Manifest(tmp_path, SETTINGS)
    manifest.write("b", picture(1))
    manifest.write("a", picture(2))
    manifest.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "pictures"]
    kept = json.loads((tmp_path / "manifest.json").read_text())
    assert list(kept["pictures"]) == ["a", "b"]
    assert len(kept["pictures"]["a"]["sha256"]) == 64
    assert kept["settings_sha256"] == manifest.settings_hash
    assert kept["settings"]["sampler"] == {"name": "ddim", "steps": 50}
    assert Manifest(tmp_path, SETTINGS).missing(["a", "b"]) == []


@pytest.mark.parametrize("harm", ["cut", "flipped", "lost", "emptied"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_torn_picture_is_made_again(tmp_path, harm, finished):
    manifest = Manifest(tmp_path, SETTINGS)
    for name in "ab":
        manifest.write(name, picture(ord(name)))
    if finished:
        manifest.finish()
    path = manifest.path("a")
    content = path.read_bytes()
    if harm == "cut":
        path.write_bytes(content[:-7])
    elif harm == "flipped":
        path.write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    elif harm == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()
    again = Manifest(tmp_path, SETTINGS)
    assert again.missing(["a", "b"]) == ["a"]
    with pytest.raises(ValueError, match="scene 'a' has no whole picture; make what is missing first"):
        again.read("a")
    again.write("a", picture(ord("a")))
    assert Manifest(tmp_path, SETTINGS).missing(["a", "b"]) == []
    again.finish()
    assert Manifest(tmp_path, SETTINGS).missing(["a", "b"]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": 7.5}, r"guidance=5, which is 7\.5 now"),
        ({"sampler": {"name": "ddim", "steps": 25}}, r"sampler\.steps=50, which is 25 now"),
        ({"sampler": {"name": "ddim"}}, r"sampler\.steps=50, which is not set now"),
        ({"filters": None}, r"no filters, which is null now"),
        ({"guidance": 7.5, "weights": "b", "sampler": {"name": "euler", "steps": 1}}, r"guidance=5, which"),
    ],
)
def test_other_settings_are_refused_in_one_line(tmp_path, change, message):
    Manifest(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=message) as caught:
        Manifest(tmp_path, {**SETTINGS, **change})
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "give another folder, or remove this one" in str(caught.value)


def test_settings_are_compared_by_what_they_say(tmp_path):
    first = Manifest(tmp_path, SETTINGS)
    same = {"seeds": [0, 1], "guidance": 5, "sampler": {"steps": 50, "name": "ddim"}, "weights": "abc"}
    assert Manifest(tmp_path, same).settings_hash == first.settings_hash


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_settings_that_are_no_json_are_named(tmp_path, value):
    with pytest.raises(ValueError, match=r"settings\.guidance: .* give plain values"):
        Manifest(tmp_path, {"guidance": value})


def test_a_folder_of_other_pictures_is_left_alone(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/mine.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds pictures \(mine\.png\) but no manifest\.json"):
        Manifest(tmp_path, SETTINGS)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}}', '{"settings": {}, "pictures": {"a": 3}}'])
def test_a_broken_manifest_is_named(tmp_path, content):
    Manifest(tmp_path, SETTINGS)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: cannot be read .* remove this one"):
        Manifest(tmp_path, SETTINGS)


def test_writing_again_takes_the_same_picture_only(tmp_path):
    manifest = Manifest(tmp_path, SETTINGS)
    manifest.write("a", picture(1))
    manifest.write("a", picture(1))
    with pytest.raises(ValueError, match="scene 'a' has another picture already"):
        manifest.write("a", picture(2))
    assert np.array_equal(np.asarray(manifest.read("a")), picture(1))


@pytest.mark.parametrize("image", [picture(1).astype(np.float32), picture(1)[..., 0], picture(1)[..., :2]])
def test_other_arrays_are_refused(tmp_path, image):
    with pytest.raises(ValueError, match=r"scene 'a': image is .*; give uint8 \(H, W, 3\)"):
        Manifest(tmp_path, SETTINGS).write("a", image)


def test_any_id_makes_one_file_in_the_folder(tmp_path):
    ids = [
        "../up",
        "/abs",
        "a/b",
        "a%2Fb",
        "a_b",
        ".hidden",
        "..",
        "ä ö",
        "x" * 300,
        "x" * 301,
        "a\nb",
        "a:b",
    ]
    manifest = Manifest(tmp_path / "in", SETTINGS)
    for place, name in enumerate(ids):
        manifest.write(name, picture(place))
    manifest.finish()
    again = Manifest(tmp_path / "in", SETTINGS)
    assert again.missing(ids) == []
    for place, name in enumerate(ids):
        assert np.array_equal(np.asarray(again.read(name)), picture(place))
    assert len({again.path(name) for name in ids}) == len(ids)
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_ids_must_be_ids(tmp_path):
    manifest = Manifest(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="scene id 'b' is asked for twice"):
        manifest.missing(["a", "b", "b"])
    with pytest.raises(ValueError, match="a scene id is empty"):
        manifest.write("", picture(1))
    with pytest.raises(ValueError, match="writer='a/b'"):
        Manifest(tmp_path, SETTINGS, writer="a/b")


def test_writers_share_a_folder(tmp_path):
    ranks = [Manifest(tmp_path, SETTINGS, writer=str(rank)) for rank in range(3)]
    ids = [f"scene-{n}" for n in range(10)]
    for rank, manifest in enumerate(ranks):
        for place in range(rank, len(ids), 3):
            manifest.write(ids[place], picture(place))
    assert ranks[0].missing([*ids, "more"]) == ["more"]
    ranks[0].finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "pictures"]
    assert ranks[2].missing(ids) == []


def test_one_scene_from_two_writers_ends_as_one(tmp_path):
    first, second = (Manifest(tmp_path, SETTINGS, writer=name) for name in "01")
    second.write("a", picture(2))
    first.write("a", picture(1))
    assert second.missing(["a"]) == []
    second.finish()
    assert np.array_equal(np.asarray(Manifest(tmp_path, SETTINGS).read("a")), picture(1))


def test_a_line_torn_by_a_kill_costs_its_picture_only(tmp_path):
    manifest = Manifest(tmp_path, SETTINGS)
    for name in "ab":
        manifest.write(name, picture(ord(name)))
    journal = tmp_path / "journal-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])
    again = Manifest(tmp_path, SETTINGS)
    assert again.missing(list("abc")) == ["b", "c"]
    for name in "bc":
        again.write(name, picture(ord(name)))
    assert Manifest(tmp_path, SETTINGS).missing(list("abc")) == []


WRITING = """
import sys
import numpy as np
from sampling.manifest import Manifest
manifest = Manifest(sys.argv[1], {"guidance": 2})
for number in range(100000):
    manifest.write(str(number), np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8))
"""


def test_a_killed_writer_is_taken_over(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITING, str(tmp_path)], cwd=ROOT)
    try:
        until = time.monotonic() + 30
        while len(list(tmp_path.glob("pictures/*.png"))) < 20 and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    made = len(list(tmp_path.glob("pictures/*.png")))
    assert made >= 20
    ids = [str(number) for number in range(made + 5)]
    manifest = Manifest(tmp_path, {"guidance": 2})
    missing = manifest.missing(ids)
    assert 5 <= len(missing) <= 6  # at most the one whose line was not written yet
    for name in missing:
        manifest.write(name, picture(int(name), 64, 64))
    manifest.finish()
    assert Manifest(tmp_path, {"guidance": 2}).missing(ids) == []
    assert len(list((tmp_path / "pictures").iterdir())) == len(ids)


def test_jpegs_may_lie_beside_the_manifest(tmp_path):
    manifest = Manifest(tmp_path, SETTINGS, picture_format="jpg", subfolder="")
    manifest.write("a/b", picture(1, 64, 48))
    manifest.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a%2Fb.jpg", "manifest.json"]
    with Image.open(tmp_path / "a%2Fb.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (48, 64))
    again = Manifest(tmp_path, SETTINGS, picture_format="jpg", subfolder="")
    assert again.missing(["a/b", "c"]) == ["c"]
    again.write("a/b", picture(1, 64, 48))  # the same picture has the same bytes
    with pytest.raises(ValueError, match="picture_format=webp: no such format; take png or jpg"):
        Manifest(tmp_path, SETTINGS, picture_format="webp")


def test_other_peoples_pictures_are_left_alone_there_too(tmp_path):
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds pictures \(mine\.jpg\) but no manifest\.json"):
        Manifest(tmp_path, SETTINGS, picture_format="jpg", subfolder="")


FOLDING = """
import sys
from sampling.manifest import Manifest
manifest = Manifest(sys.argv[1], {"guidance": 2}, writer=sys.argv[2])
ids = [str(number) for number in range(60)]
sys.stdin.read(1)
for _ in range(40):
    assert manifest.missing(ids) == [], "a picture was lost"
    manifest.finish()
"""


def test_writers_that_fold_at_once_lose_nothing(tmp_path):
    ids = [str(number) for number in range(60)]
    for rank in range(3):
        manifest = Manifest(tmp_path, {"guidance": 2}, writer=str(rank))
        for name in ids[rank::3]:
            manifest.write(name, picture(int(name)))
    folding = [
        subprocess.Popen([sys.executable, "-c", FOLDING, str(tmp_path), str(rank)], cwd=ROOT, stdin=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in folding:
        process.stdin.write(b".")
        process.stdin.close()
    assert [process.wait(timeout=60) for process in folding] == [0, 0]
    assert Manifest(tmp_path, {"guidance": 2}).missing(ids) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "pictures"]
