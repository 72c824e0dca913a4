"""Checking shards: whole ones have no fault, and each thing that can be wrong is told in a line that names the sample."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from datamodules.shard_index import ShardError
from datamodules.shard_writer import HashingFile, scene_bytes, tar_writer
from datamodules.shards import write_shards
from datamodules.sources.base import LatentForm, Source
from datamodules.sources.shapes import Shapes
from preparation.checking import check_folder
from runtime.launch.ranks import Ranks
from scenes.scene import Frame, Scene


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(Shapes(count=10), tmp_path_factory.mktemp("shapes") / "in", shard_size=4)


class Noise(Source):
    """Latents."""

    provides = frozenset({"latents"})
    latent_form = LatentForm(channels=2, height=3, width=4, scale=8, scaling_factor=0.5)

    def __len__(self):
        return 2

    def __iter__(self):
        for number in range(2):
            yield Scene(id=str(number), frame=Frame(original=(24, 32))), np.full((2, 3, 4), number, np.float16)


def rewritten(folder, samples, **changes):
    """A folder with one shard of given samples, and an index that has its checksum."""
    index = json.loads((folder / "index.json").read_text())
    with (folder / index["shards"][0]["name"]).open("wb") as file:
        hashing = HashingFile(file)
        tar = tar_writer(hashing)
        for key, members in samples.items():
            tar.write({"__key__": key, **members})
        tar.close()
    index["shards"][0] |= {"bytes": hashing.bytes, "sha256": hashing.sha256, "count": len(samples)}
    (folder / "index.json").write_text(json.dumps({**index, **changes}))
    return folder


def png(height, width):
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return data.getvalue()


def test_whole_shards_have_no_fault(shards):
    told = []
    check = check_folder(shards, progress=lambda done, total: told.append((done, total)))
    assert (check.shards, check.samples, check.faults) == (3, 10, [])
    assert str(check).endswith("all as index.json says, every scene and picture sound")
    assert told[-1] == (10, 10)
    parts = [check_folder(shards, ranks=Ranks(rank=rank, count=2)) for rank in range(2)]
    assert [part.samples for part in parts] == [6, 4]


def test_latents_are_checked_too(tmp_path):
    folder = write_shards(Noise(), tmp_path / "in")
    assert check_folder(folder).faults == []
    scene = scene_bytes(Scene(id="a", frame=Frame(original=(24, 32))))
    bad = {}
    for name, latent in (("shape", np.zeros((2, 4, 3), np.float16)), ("nan", np.full((2, 3, 4), np.nan, np.float32))):
        data = io.BytesIO()
        np.save(data, latent)
        bad[name] = {"latent.npy": data.getvalue(), "scene.json": scene}
    bad["cut"] = {"latent.npy": b"\x93NUMPY", "scene.json": scene}
    faults = check_folder(rewritten(folder, bad)).faults
    assert len(faults) == 3
    assert "sample shape: scene a: latent: (2, 4, 3) float16 where index.json says (2, 3, 4)" in faults[0]
    assert "sample nan: scene a: latent: holds numbers that are not finite" in faults[1]
    assert "sample cut: scene a: latent: " in faults[2]


def test_each_thing_that_is_wrong_is_told(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "in")
    good = Scene(id="good", frame=Frame(original=(5, 7)))
    odd = good.to_json() | {"objects": [{"phrase": "x", "box": [0, 0, 1.5, 1]}]}
    samples = {
        "a": {"png": png(5, 7), "scene.json": scene_bytes(good)},
        "size": {"png": png(7, 5), "scene.json": scene_bytes(good)},
        "range": {"png": png(5, 7), "scene.json": json.dumps(odd).encode()},
        "key": {"png": png(5, 7), "scene.json": b'{"id": "a", "bocks": []}'},
        "empty": {"png": png(5, 7), "scene.json": b""},
        "cut": {"png": png(5, 7)[:40], "scene.json": scene_bytes(good)},
        "more": {"png": png(5, 7), "txt": b"a", "scene.json": scene_bytes(good)},
    }
    faults = check_folder(rewritten(folder, samples)).faults
    assert all("\n" not in fault for fault in faults)
    assert [fault.split("sample ")[1].split(":")[0] for fault in faults] == list(samples)[1:]
    for fault, words in zip(
        faults,
        ["frame: target (5, 7) is not the picture's (height, width) (7, 5)", "leaves [0, 1]", "bocks", "is empty",
         "picture: ", "has png, scene.json, txt where index.json says png, scene.json"],
        strict=True,
    ):  # fmt: skip
        assert words in fault


def test_the_folder_as_a_whole_is_compared(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "in")
    index = json.loads((folder / "index.json").read_text())
    counts = index["counts"] | {"objects": 3}
    (folder / "index.json").write_text(json.dumps(index | {"counts": counts, "provides": ["image", "sound"]}))
    shutil.copy(folder / "000000.tar", folder / "000009.tar")
    faults = check_folder(folder).faults
    assert faults[:2] == ["000009.tar is not in index.json", "index.json: provides sound, which no shards can"]
    assert faults[2].startswith("index.json: counts: 3 objects where the shards hold ")
    content = bytearray((folder / "000001.tar").read_bytes())
    content[600] ^= 1
    (folder / "000001.tar").write_bytes(content)
    (folder / "000002.tar").write_bytes((folder / "000002.tar").read_bytes()[:1000])
    faults = check_folder(folder).faults
    assert "000001.tar has changed" in faults[0]
    assert "000002.tar is truncated" in faults[1]
    with pytest.raises(ShardError, match="no such folder"):
        check_folder(tmp_path / "none")
