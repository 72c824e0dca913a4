"""Sources become shards piece by piece: spans tile a source, and a folder is the same however it came about."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.shards import ShardError, ShardSet, check_shards, write_shards
from datamodules.sources.base import LeftOut, Source
from datamodules.sources.files import FileSource, SampleError
from datamodules.sources.shapes import Shapes
from preparation.conversion import convert_source
from runtime.composition import compose
from runtime.ranks import Ranks
from scenes.scene import Scene


class Plain(Source):
    """Shapes that know nothing of spans."""

    provides = Shapes.provides
    image_format = "png"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(Shapes(count=self.count))


class Parts(FileSource):
    """Numbers in files: a text cannot be read, a negative one is not wanted; a file may be told wrong about its size."""

    provides = frozenset({"image"})
    image_format = "png"

    def __init__(self, files, *, sizes=None):
        super().__init__()
        self.files, self.sizes = files, sizes or [len(file) for file in files]
        self.opened = []

    def __len__(self):
        return sum(self.sizes)

    def parts(self):
        return self.sizes

    def entries(self):
        for part in range(len(self.files)):
            yield from self.entries_of(part)

    def entries_of(self, part):
        self.opened.append(part)
        if not self.files[part]:
            self.left_out.skip(f"file {part}: empty")
        yield from self.files[part]
        if "cut" in self.files[part]:
            self.left_out.skip(f"file {part}: cut off")

    def read(self, entry):
        if isinstance(entry, str):
            raise SampleError(f"{entry}: no number")
        if entry < 0:
            return "negative"
        self.count("odd", entry % 2)
        return Scene(id=str(entry)), Image.new("RGB", (4, 4), (entry, 0, 0))

    def report(self, total):
        return [f"{total.counts['negative']} negative"]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def of_spans(source, edges):
    """Scenes and account of spans between edges."""
    scenes, total = [], LeftOut()
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        scenes += [scene for scene, _ in source.span(start, stop)]
        if source.left_out is not None:
            total.add(source.left_out)
    return scenes, total


FILES = [[1, 2, "x", -3], [], [4, "cut"], [5, 6, 7, 8, -9, 10, 11]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("sizes", [None, [3, 0, 2, 7], [4, 0, 5, 6]], ids=["true", "too few", "too many"])
def test_spans_tile_a_source_of_files_whatever_their_size(size, sizes):
    source = Parts(FILES, sizes=sizes)
    whole = [scene for scene, _ in source]
    account = source.left_out
    assert [scene.id for scene in whole] == ["1", "2", "4", "5", "6", "7", "8", "10", "11"]
    assert (account.bad, account.notes) == (4, ["2 negative"])
    ends = source.positions()
    scenes, total = of_spans(source, [*range(0, ends, size), ends])
    assert scenes == whole
    assert (total.counts, total.bad, sorted(total.skipped)) == (account.counts, account.bad, sorted(account.skipped))
    assert source.report(total) == account.notes


def test_a_file_is_opened_once_where_spans_come_one_after_the_other_and_only_where_it_is_needed():
    source = Parts(FILES)
    of_spans(source, [0, 1, 2, 3, 4])
    assert source.opened == [0]
    source.opened.clear()
    assert [scene.id for scene, _ in source.span(9, 11)] == ["7", "8"]
    assert source.opened == [3]


def test_a_source_without_spans_of_its_own_has_them():
    source = Plain(7)
    scenes, _ = of_spans(source, [0, 3, 5, 7])
    assert scenes == [scene for scene, _ in source]
    assert [scene for scene, _ in source.span(5, 7)] == [scene for scene, _ in Shapes(count=7).span(5, 7)]


@pytest.mark.parametrize("source", [Shapes(count=10), Plain(10)], ids=["spans", "plain"])
def test_it_is_what_the_writer_of_whole_folders_makes(source, tmp_path):
    convert_source(source, tmp_path / "pieces", shard_size=4)
    whole = contents(write_shards(source, tmp_path / "whole", shard_size=4))
    pieces = contents(tmp_path / "pieces")
    assert {name: data for name, data in pieces.items() if name.endswith(".tar")} == {
        name: data for name, data in whole.items() if name.endswith(".tar")
    }
    index = json.loads(pieces["index.json"])
    stage = index.pop("stages")
    assert [step["name"] for step in stage] == ["convert"]
    assert index == json.loads(whole["index.json"])


def test_broken_off_and_over_ranks_the_folder_is_the_same(tmp_path):
    source = Parts(FILES)
    report = convert_source(source, tmp_path / "one", shard_size=3, max_bad_fraction=0.5)
    assert len(report.done) == 5
    stored = ShardSet(tmp_path / "one")
    assert [stored.scene(n).id for n in range(9)] == ["1", "2", "4", "5", "6", "7", "8", "10", "11"]
    assert stored.sizes == (2, 1, 2, 2, 2)
    assert stored.index["notes"] == ["2 negative"]
    assert stored.index["skipped"]["samples"] == 4
    assert check_shards(tmp_path / "one").ok

    class Broken(Parts):
        def read(self, entry):
            if entry == 8:
                raise KeyboardInterrupt
            return super().read(entry)

    Broken.name = Parts.name = "parts"
    for rank in range(2):
        convert_source(
            Parts(FILES), tmp_path / "two", shard_size=3, max_bad_fraction=0.5, ranks=Ranks(rank=rank, count=2)
        )
    with pytest.raises(KeyboardInterrupt):
        convert_source(Broken(FILES), tmp_path / "three", shard_size=3, max_bad_fraction=0.5)
    again = convert_source(Parts(FILES), tmp_path / "three", shard_size=3, max_bad_fraction=0.5)
    assert (len(again.whole), len(again.done)) == (3, 2)
    named = contents(tmp_path / "three")
    assert contents(tmp_path / "two") == named
    assert {n: d for n, d in contents(tmp_path / "one").items() if n.endswith(".tar")} == {
        n: d for n, d in named.items() if n.endswith(".tar")
    }


def test_another_source_or_another_size_is_refused(tmp_path):
    convert_source(Shapes(count=10), tmp_path / "out", shard_size=4, ranks=Ranks(rank=0, count=2))
    for source, size, words in [
        (Shapes(count=11), 4, "places=10 (now 11), source.arguments.count=10 (now 11)"),
        (Shapes(count=10), 5, "settings.shard_size=4 (now 5)"),
    ]:
        with pytest.raises(ShardError) as caught:
            convert_source(source, tmp_path / "out", shard_size=size)
        assert words in str(caught.value)


def test_a_shard_has_no_more_bytes_than_asked_for(tmp_path):
    source = Shapes(count=20)
    convert_source(source, tmp_path / "out", shard_size=8, shard_bytes=10_240)
    stored = ShardSet(tmp_path / "out")
    assert max(entry.bytes for entry in stored.entries) <= 10_240
    assert [entry.name for entry in stored.entries][:2] == ["000000.tar", "000000-1.tar"]
    assert [stored.scene(n) for n in range(20)] == [scene for scene, _ in source]
    convert_source(source, tmp_path / "small", shard_bytes=1)
    assert set(ShardSet(tmp_path / "small").sizes) == {1}
    assert check_shards(tmp_path / "small").ok


@pytest.mark.parametrize(
    "arguments",
    [
        ["source=coco", "source.root={samples}/coco", "source.filter=lama"],
        [
            "source=sa1b",
            "source.root={samples}/sa1b",
            "source.boxes={samples}/igligen/boxes_without_size",
        ],
        ["source=igligen", "source.root={samples}/igligen/sdxl-512"],
        ["source=rich_context", "source.root={samples}/cc3m"],
        ["source=laion_sg", "source.root={samples}/laion_sg"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_published_samples_have_the_same_scenes_in_spans(arguments, samples):
    from hydra.utils import instantiate

    settings = [argument.format(samples=samples) for argument in arguments]
    source = instantiate(compose("prepare", [*settings, "out=out"]).source, _convert_="all")
    whole = [(scene, np.asarray(getattr(content, "data", content)).tobytes()) for scene, content in source]
    account = source.left_out
    ends = source.positions()
    found, total = [], LeftOut()
    for start in range(0, ends, 3):
        found += [
            (scene, np.asarray(getattr(content, "data", content)).tobytes())
            for scene, content in source.span(start, min(start + 3, ends))
        ]
        total.add(source.left_out)
    assert found == whole
    assert total.counts == account.counts
    assert [*total.notes, *source.report(total)] == account.notes


def test_a_tar_that_ends_too_early_is_told_once(tmp_path, samples):
    from datamodules.sources.sa1b import Sa1b

    given = sorted((samples / "sa1b").glob("*.tar"))[0]
    (tmp_path / given.name).write_bytes(given.read_bytes()[: given.stat().st_size // 2])
    with tarfile.open(given) as tar:
        keys = sorted({Path(name).stem for name in tar.getnames()})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"key": k, "caption": k}) + "\n" for k in keys))
    source = Sa1b(root=str(tmp_path), captions=str(tmp_path / "captions.jsonl"))
    list(source)
    lines = source.left_out.skipped
    assert any("fetch it again" in line for line in lines)
    _, total = of_spans(source, [*range(source.positions()), source.positions()])
    assert sorted(total.skipped) == sorted(lines)
