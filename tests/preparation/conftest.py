"""What tests of preparation share: sources of given scenes, and folders of shards that are compared or changed."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from datamodules.sources.base import Source
from tests.preparation import shapes_parts


class Listed(Source):
    """Given scenes, each with what `content(number, scene)` makes: a picture, or a latent of `form`."""

    def __init__(self, scenes, content, *, provides, image_format="jpg", form=None):
        self.scenes, self.content = scenes, content
        self.provides, self.image_format, self.latent_form = frozenset(provides.split()), image_format, form

    def __len__(self):
        return len(self.scenes)

    def __iter__(self):
        return ((scene, self.content(number, scene)) for number, scene in enumerate(self.scenes))


def contents(folder):
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def members_of(shard):
    """Name and content of each member of a tar."""
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def rewrite(folder, shard, members, **said):
    """Write a shard with other members, and its checksum (and what else `said`) into the index."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (folder / shard).write_bytes(data.getvalue())
    index = json.loads((folder / "index.json").read_text())
    (entry,) = (entry for entry in index["shards"] if entry["name"] == shard)
    entry |= {"bytes": len(data.getvalue()), "sha256": hashlib.sha256(data.getvalue()).hexdigest(), **said}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def with_index(folder, out, change):
    """A folder of the same shards, whose index `change(index)` has changed."""
    index = json.loads((folder / "index.json").read_text())
    change(index)
    out.mkdir(exist_ok=True)
    (out / "index.json").write_text(json.dumps(index))
    for shard in folder.glob("*.tar"):
        (out / shard.name).symlink_to(shard)
    return out


@pytest.fixture(scope="session")
def parts():
    """Parts of labelling that know shapes."""
    return shapes_parts
