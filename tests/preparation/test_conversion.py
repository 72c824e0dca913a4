"""Sources become shards piece by piece: spans tile a source, and a folder is the same however it came about."""

import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image

from datamodules import held_out
from datamodules.shard_writer import TooManyBad
from datamodules.shards import ShardError, ShardSet, check_shards, write_shards
from datamodules.sources.base import LeftOut
from datamodules.sources.files import FileSource, SampleError
from datamodules.sources.sa1b import Sa1b
from datamodules.sources.shapes import Shapes
from preparation.conversion import convert_source
from runtime.composition import compose
from runtime.launch.ranks import Ranks
from scenes.scene import Scene
from tests.preparation.conftest import Listed, contents


def plain(count):
    """Shapes that know nothing of spans."""
    pairs = list(Shapes(count=count))
    provides = " ".join(Shapes.provides)
    return Listed([scene for scene, _ in pairs], lambda n, _: pairs[n][1], provides=provides, image_format="png")


class Files(FileSource):
    """Numbers in files: a text cannot be read, a negative one is not wanted."""

    provides = frozenset({"image"})
    image_format = "png"
    name = "files"
    arguments = {}

    def __init__(self, content):
        super().__init__()
        self.content = content
        self.opened, self.expected = [], []

    def __len__(self):
        return sum(map(len, self.content))

    def files(self):
        return len(self.content)

    def expect(self, files):
        self.expected += files

    def entries_of(self, file, start=0):
        self.opened.append((file, start))
        if not self.content[file]:
            self.left_out.skip(f"file {file}: empty")
        yield from self.content[file][start:]
        if "cut" in self.content[file]:
            self.left_out.skip(f"file {file}: cut off")

    def read(self, entry):
        if isinstance(entry, str):
            raise SampleError(f"{entry}: no number")
        if entry < 0:
            return "negative"
        self.count("odd", entry % 2)
        return Scene(id=str(entry)), Image.new("RGB", (4, 4), (entry, 0, 0))

    def report(self, total):
        return [f"{total.counts['negative']} negative"]


class OneList(Files):
    """The same numbers as one list, of which no more is known than how many it announces."""

    def __init__(self, content, *, announced):
        super().__init__(content)
        self.announced = announced

    def __len__(self):
        return self.announced

    def files(self):
        return None

    def entries(self):
        for file in range(len(self.content)):
            yield from self.entries_of(file)


FILES = [[1, 2, "x", -3], [], [4, "cut"], [5, 6, 7, 8, -9, 10, 11]]


def spans_of(source, size):
    """Yields spans of a size, of every file where a source has files."""
    if source.files() is None:
        ends = source.positions()
        yield from (source.span(start, min(start + size, ends)) for start in range(0, ends, size))
        return
    source.expect(range(source.files()))
    for file in range(source.files()):
        for start in itertools.count(0, size):
            yield source.span_of(file, start, start + size)
            if source.is_at_end:
                break


def in_spans(source, size):
    """Scenes and account of spans of a size."""
    scenes, total = [], LeftOut()
    for span in spans_of(source, size):
        scenes += [scene for scene, _ in span]
        total.add(source.left_out or LeftOut())
    return scenes, total


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("announced", [None, 11, 13, 15], ids=["files", "too few", "true", "too many"])
def test_spans_tile_a_source_whatever_their_size(size, announced):
    source = Files(FILES) if announced is None else OneList(FILES, announced=announced)
    whole = [scene for scene, _ in source]
    account = source.left_out
    assert [scene.id for scene in whole] == ["1", "2", "4", "5", "6", "7", "8", "10", "11"]
    assert (account.bad, account.notes) == (4, ["2 negative"])
    scenes, total = in_spans(source, size)
    assert scenes == whole
    assert (total.counts, total.bad, sorted(total.skipped)) == (account.counts, account.bad, sorted(account.skipped))
    assert source.report(total) == account.notes


def test_a_file_is_opened_once_where_spans_come_one_after_the_other():
    source = Files(FILES)
    in_spans(source, 2)
    assert source.opened == [(0, 0), (1, 0), (2, 0), (3, 0)]
    source.opened.clear()
    assert [scene.id for scene, _ in source.span_of(3, 2, 4)] == ["7", "8"]
    assert [scene.id for scene, _ in source.span_of(3, 5, 100)] == ["10", "11"]
    assert source.opened == [(3, 2), (3, 5)]


def test_a_source_without_spans_of_its_own_has_them():
    source = plain(7)
    scenes, _ = in_spans(source, 3)
    assert scenes == [scene for scene, _ in source]
    assert [scene for scene, _ in source.span(5, 7)] == [scene for scene, _ in Shapes(count=7).span(5, 7)]


@pytest.mark.parametrize("source", [Shapes(count=10), plain(10)], ids=["spans", "plain"])
def test_it_is_what_the_writer_of_whole_folders_makes(source, tmp_path):
    convert_source(source, tmp_path / "pieces", shard_size=4)
    whole = contents(write_shards(source, tmp_path / "whole", shard_size=4))
    pieces = contents(tmp_path / "pieces")
    tars = [{name: data for name, data in files.items() if name.endswith(".tar")} for files in (pieces, whole)]
    assert tars[0] == tars[1]
    index = json.loads(pieces["index.json"])
    stage = index.pop("stages")
    assert [step["name"] for step in stage] == ["convert"]
    assert index == json.loads(whole["index.json"])


def made(out, content=FILES, kind=Files, **settings):
    """What a conversion says, and its source."""
    source = kind(content)
    return convert_source(source, out, shard_size=3, max_bad_fraction=0.5, **settings), source


def test_shards_end_where_input_files_do_and_each_file_has_one_reader(tmp_path):
    report, source = made(tmp_path / "one")
    assert (report.kind, len(report.done)) == ("files", 4)
    assert source.opened == [(file, 0) for file in range(4)]
    stored = ShardSet(tmp_path / "one")
    assert [stored.scene(n).id for n in range(9)] == ["1", "2", "4", "5", "6", "7", "8", "10", "11"]
    counts = {"000000": 2, "000002": 1, "000003": 3, "000003-1": 2, "000003-2": 1}
    assert [(entry.name.removesuffix(".tar"), entry.count) for entry in stored.entries] == list(counts.items())
    assert stored.index["notes"] == ["2 negative"]
    assert stored.index["skipped"]["samples"] == 4
    assert check_shards(tmp_path / "one").ok
    with tarfile.open(tmp_path / "one" / "000003-1.tar") as tar:
        assert [name.partition(".")[0] for name in tar.getnames()[::2]] == ["000003-000000003", "000003-000000004"]
    for count in (2, 3, 9):  # neighbours together, and more processes than files
        read = []
        for rank in reversed(range(count)):
            report, source = made(tmp_path / str(count), ranks=Ranks(rank=rank, count=count))
            assert source.expected == [file for file, _ in source.opened]
            read.append(source.expected)
        assert [file for files in reversed(read) for file in files] == [0, 1, 2, 3]
        assert contents(tmp_path / str(count)) == contents(tmp_path / "one")


def test_broken_off_within_a_file_it_goes_on_behind_the_last_whole_shard(tmp_path):
    made(tmp_path / "one")

    class Broken(Files):
        def read(self, entry):
            if entry == 11:
                raise KeyboardInterrupt
            return super().read(entry)

    def break_off(name):
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / name, kind=Broken)
        assert json.loads((tmp_path / name / "000003.json").read_text())["next"] == 6
        return tmp_path / name

    told = []
    report, source = made(break_off("two"), progress=lambda *numbers: told.append(numbers))
    assert (report.whole, report.done) == (["000000", "000001", "000002"], ["000003"])
    assert source.opened == [(3, 6)]
    assert told == [(1, 0)]  # of files nobody has counted there is no total
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    (break_off("three") / "000003-1.tar").write_bytes(b"")
    _, source = made(tmp_path / "three")
    assert source.opened == [(3, 0)]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.parametrize("noted", [1, 4, 1000])
def test_the_index_of_files_notes_the_lowest_hashes_of_all(tmp_path, monkeypatch, noted):
    monkeypatch.setattr(held_out, "NOTED", noted)
    files = [[*range(start, start + size)] for start, size in ((0, 1), (10, 30), (50, 9))]
    for rank in range(2):
        made(tmp_path / "out", content=files, ranks=Ranks(rank=rank, count=2))
    stored = ShardSet(tmp_path / "out")
    lowest, every = stored.lowest(), stored.all_places().places
    assert lowest.places == tuple(place for place in every if place.hash < lowest.below)
    assert len(every) == 40
    hashes = [sorted(held_out.hash_of(str(number)) for number in file) for file in files]
    first_left_out = [each[noted] for each in hashes if len(each) > noted]
    assert lowest.below == min([held_out.EVERY * min(noted, 40) // 40, *first_left_out])
    made(tmp_path / "alone", content=files)
    assert contents(tmp_path / "alone") == contents(tmp_path / "out")


def test_a_source_without_files_is_split_by_places(tmp_path):
    class Listed(OneList):
        def __init__(self, content):
            super().__init__(content, announced=13)

    class Broken(Listed):
        def read(self, entry):
            if entry == 8:
                raise KeyboardInterrupt
            return super().read(entry)

    report, _ = made(tmp_path / "one", kind=Listed)
    assert (report.kind, len(report.done)) == ("shards", 5)
    assert ShardSet(tmp_path / "one").sizes == (2, 1, 3, 2, 1)
    for rank in range(2):
        made(tmp_path / "two", kind=Listed, ranks=Ranks(rank=rank, count=2))
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "three", kind=Broken)
    again, _ = made(tmp_path / "three", kind=Listed)
    assert (len(again.whole), len(again.done)) == (3, 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_files_of_which_too_many_are_bad_end_the_work_before_the_last(tmp_path):
    source = Files([[1], ["x"], [2], [3]])
    with pytest.raises(TooManyBad, match="max_bad_fraction=0.1"):
        convert_source(source, tmp_path / "out", shard_size=1, max_bad_fraction=0.1)
    assert source.opened == [(0, 0), (1, 0)]
    report = convert_source(source, tmp_path / "out", shard_size=1, max_bad_fraction=0.25)
    assert (report.whole, report.done) == (["000000"], ["000001", "000002", "000003"])


def test_another_source_or_another_size_is_refused(tmp_path):
    convert_source(Shapes(count=10), tmp_path / "out", shard_size=4, ranks=Ranks(rank=0, count=2))
    for count, size, words in [(11, 4, "source.arguments.count=10 .*11"), (10, 5, "settings.shard_size=4 .*5")]:
        with pytest.raises(ShardError, match=words):
            convert_source(Shapes(count=count), tmp_path / "out", shard_size=size)


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
        ["source=sa1b", "source.root={samples}/sa1b", "source.boxes={samples}/igligen/boxes_without_size"],
        ["source=igligen", "source.root={samples}/igligen/sdxl-512"],
        ["source=rich_context", "source.root={samples}/cc3m"],
        ["source=laion_sg", "source.root={samples}/laion_sg"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_published_samples_have_the_same_scenes_in_spans(arguments, samples):
    settings = [argument.format(samples=samples) for argument in arguments]

    def pairs(samples):
        return [(scene, np.asarray(getattr(content, "data", content)).tobytes()) for scene, content in samples]

    source, again = (instantiate(compose("prepare", [*settings, "out=out"]).source, _convert_="all") for _ in range(2))
    whole, account = pairs(source), source.left_out
    found, total = [], LeftOut()
    for span in spans_of(source, 3):
        found += pairs(span)
        total.add(source.left_out)
    assert found == whole
    if source.files() is not None:  # gone on with in the middle of a file
        first = [scene for scene, _ in source.span_of(0, 0, 5)]
        assert [scene for scene, _ in again.span_of(0, 2, 5)] == first[-len(first) + 2 :]
        assert len(first) > 2
    assert total.counts == account.counts
    assert [*total.notes, *source.report(total)] == account.notes


def test_a_tar_that_ends_too_early_is_told_once(tmp_path, samples):
    given = sorted((samples / "sa1b").glob("*.tar"))[0]
    (tmp_path / given.name).write_bytes(given.read_bytes()[: given.stat().st_size // 2])
    with tarfile.open(given) as tar:
        keys = sorted({Path(name).stem for name in tar.getnames()})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"key": k, "caption": k}) + "\n" for k in keys))
    source = Sa1b(root=str(tmp_path), captions=str(tmp_path / "captions.jsonl"))
    list(source)
    lines = source.left_out.skipped
    assert any("fetch it again" in line for line in lines)
    _, total = in_spans(source, 1)
    assert sorted(total.skipped) == sorted(lines)
