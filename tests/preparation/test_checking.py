"""Checking shards: whole ones have no fault, and each thing that can be wrong is told in a line that names the sample."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from datamodules.shard_index import ShardError
from datamodules.shard_writer import scene_bytes
from datamodules.shards import write_shards
from datamodules.sources.base import LatentForm
from datamodules.sources.shapes import Shapes
from preparation.checking import check_folder
from runtime.launch.ranks import Ranks
from scenes.scene import Frame, Scene
from tests.preparation.conftest import Listed, rewrite


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(Shapes(count=10), tmp_path_factory.mktemp("shapes") / "in", shard_size=4)


def with_samples(folder, samples):
    """A folder whose first shard holds given samples."""
    members = {f"{key}.{name}": content for key, sample in samples.items() for name, content in sample.items()}
    return rewrite(folder, "000000.tar", members, count=len(samples))


def npy(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def png(height, width):
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return data.getvalue()


def test_whole_shards_have_no_fault(shards):
    told = []
    check = check_folder(shards, progress=lambda done, total: told.append((done, total)))
    assert (check.shards, check.samples, check.faults) == (3, 10, [])
    assert "index.json" in str(check)
    assert told[-1] == (10, 10)
    parts = [check_folder(shards, ranks=Ranks(rank=rank, count=2)) for rank in range(2)]
    assert [part.samples for part in parts] == [6, 4]


def test_latents_are_checked_too(tmp_path):
    form = LatentForm(channels=2, height=3, width=4, scale=8, scaling_factor=0.5)
    scene = Scene(id="a", frame=Frame(original=(24, 32)))
    noise = Listed([scene], lambda number, _: np.full((2, 3, 4), number, np.float16), provides="latents", form=form)
    folder = write_shards(noise, tmp_path / "in")
    assert check_folder(folder).faults == []
    latents = {"shape": np.zeros((2, 4, 3), np.float16), "nan": np.full((2, 3, 4), np.nan, np.float32)}
    samples = {name: {"latent.npy": npy(latent)} for name, latent in latents.items()} | {
        "cut": {"latent.npy": b"\x93NUMPY"}
    }
    faults = check_folder(
        with_samples(folder, {key: {**sample, "scene.json": scene_bytes(scene)} for key, sample in samples.items()})
    ).faults
    assert len(faults) == 3
    for fault, words in zip(
        faults,
        ["shape: scene a: latent: .*2, 4, 3.*2, 3, 4", "nan: scene a: latent", "cut: scene a: latent"],
        strict=True,
    ):
        assert re.search(f"sample {words}", fault)


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
    faults = check_folder(with_samples(folder, samples)).faults
    assert all("\n" not in fault for fault in faults)
    assert [fault.split("sample ")[1].split(":")[0] for fault in faults] == list(samples)[1:]
    words = [
        r"frame: .*5, 7.*7, 5",
        r"\[0, 1\]",
        "bocks",
        "empty",
        "picture: ",
        "png, scene.json, txt .* png, scene.json",
    ]
    for fault, told in zip(faults, words, strict=True):
        assert re.search(told, fault)


def test_the_folder_as_a_whole_is_compared(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "in")
    index = json.loads((folder / "index.json").read_text())
    counts = index["counts"] | {"objects": 3}
    (folder / "index.json").write_text(json.dumps(index | {"counts": counts, "provides": ["image", "sound"]}))
    shutil.copy(folder / "000000.tar", folder / "000009.tar")
    faults = check_folder(folder).faults
    for fault, told in zip(
        faults, ["000009.tar", "index.json: .*sound", "index.json: counts: 3 objects"], strict=False
    ):
        assert re.search(told, fault)
    assert len(faults) >= 3
    content = bytearray((folder / "000001.tar").read_bytes())
    content[600] ^= 1
    (folder / "000001.tar").write_bytes(content)
    (folder / "000002.tar").write_bytes((folder / "000002.tar").read_bytes()[:1000])
    faults = check_folder(folder).faults
    assert "000001.tar" in faults[0]
    assert "000002.tar" in faults[1]
    with pytest.raises(ShardError, match="none"):
        check_folder(tmp_path / "none")
