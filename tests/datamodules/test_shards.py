"""Shards: what is written is read, the bytes are deterministic, and whatever is not whole is refused."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset.tariterators
from PIL import Image

from datamodules import shards as shards_module
from datamodules.shards import ShardError, ShardSet, check_shards, has_shards, write_shards
from datamodules.sources.base import Source
from scenes.scene import Frame, Relation, Scene, SceneObject


class Numbered(Source):
    """Pictures whose number is in their pixels, of different sizes; scenes that use every field."""

    provides = frozenset({"image", "caption", "boxes", "phrases", "relations"})
    image_format = "png"

    def __init__(self, count: int, *, fail_at: int | None = None) -> None:
        self.count = count
        self.fail_at = fail_at

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            if number == self.fail_at:
                raise KeyboardInterrupt
            yield numbered_scene(number), Image.fromarray(numbered_picture(number))


def numbered_picture(number):
    height, width = 5 + number % 3, 4 + number % 2
    pixels = np.arange(height * width * 3).reshape(height, width, 3)
    return ((pixels * 7 + number * 31) % 256).astype(np.uint8)


def numbered_scene(number):
    objects = tuple(
        SceneObject(phrase=f"thing {n} – größer", box=(0.1 * n, 0.25, 0.1 * n + 0.3, 0.5)) for n in range(number % 4)
    )
    relations = (Relation(subject=0, predicate="left of", object=1),) if len(objects) > 1 else ()
    height, width = numbered_picture(number).shape[:2]
    frame = Frame(original=(height, width))
    return Scene(id=f"number-{number}", caption="a caption", objects=objects, relations=relations, frame=frame)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """10 samples in shards of 4, 4 and 2."""
    return write_shards(Numbered(10), tmp_path_factory.mktemp("shards") / "numbered", shard_size=4)


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def change_index(path, **changes):
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps({**index, **changes}))


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message


def check_record(record, number):
    assert record.scene == numbered_scene(number)
    assert record.image.dtype == np.uint8
    assert record.image.flags.writeable
    np.testing.assert_array_equal(record.image, numbered_picture(number))


def test_what_is_written_is_read(written):
    stored = ShardSet(written)
    assert len(stored) == 10
    assert stored.sizes == (4, 4, 2)
    assert stored.provides == Numbered.provides
    for number in (9, 0, 5, 4, 3, 8, 7, 1, 2, 6):
        check_record(stored[number], number)
    check_record(stored.read(2, 1), 9)
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            stored[outside]


def test_index_counts_and_names_the_source(written):
    index = ShardSet(written).index
    boxes = sum(n % 4 for n in range(10))
    relations = sum(n % 4 > 1 for n in range(10))
    counted = {"samples": 10, "captions": 10, "objects": boxes, "boxes": boxes, "relations": relations}
    assert index["counts"] == counted
    assert not {"left_out", "skipped", "latents"} & index.keys()
    assert index["source"] == {"name": "Numbered", "arguments": {"count": 10}}
    assert [shard["name"] for shard in index["shards"]] == ["000000.tar", "000001.tar", "000002.tar"]
    assert all((written / shard["name"]).stat().st_size == shard["bytes"] for shard in index["shards"])


def test_shards_are_webdatasets(written):
    with (written / "000001.tar").open("rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"stream": stream, "url": "000001.tar"}])
        samples = list(webdataset.tariterators.group_by_keys(files))
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(4, 8)]
    assert Scene.from_json(json.loads(samples[3]["scene.json"])) == numbered_scene(7)
    with tarfile.open(written / "000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "", 0o644)}


def test_the_same_source_gives_the_same_bytes(written, tmp_path):
    again = write_shards(Numbered(10), tmp_path / "again", shard_size=4)
    assert sorted(file.name for file in again.iterdir()) == sorted(file.name for file in written.iterdir())
    for file in again.iterdir():
        assert file.read_bytes() == (written / file.name).read_bytes()


def test_jpg_is_the_default_and_close(tmp_path):
    class Photographs(Numbered):
        image_format = "jpg"

        def __iter__(self):
            for number in range(self.count):
                yield Scene(id=str(number)), Image.new("L", (24, 16), 60 * number)

    stored = ShardSet(write_shards(Photographs(3), tmp_path / "jpg"))
    assert stored.index["members"] == ["jpg", "scene.json"]
    assert stored[2].image.shape == (16, 24, 3)
    assert np.abs(stored[2].image.astype(int) - 120).max() <= 2


def test_progress_is_told(tmp_path):
    told = []
    write_shards(Numbered(3), tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_stop_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_shards(Numbered(9, fail_at=6), tmp_path / "out", shard_size=4)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_one_line(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ShardError) as caught:
            write_shards(Numbered(100), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(caught, f"out={tmp_path / 'out'}", "nothing was left behind")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared(tmp_path, written):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "000007.tar").write_bytes(b"half")
    out = write_shards(Numbered(10), tmp_path / "out", shard_size=4)
    assert {file.name for file in tmp_path.iterdir()} == {"out"}
    assert {file.name for file in out.iterdir()} == {file.name for file in written.iterdir()}


def test_two_writers_of_one_folder_take_turns(tmp_path):
    class Slow(Numbered):
        def __iter__(self):
            for sample in super().__iter__():
                time.sleep(0.03)
                yield sample

    results = []

    def write():
        try:
            results.append(write_shards(Slow(4), tmp_path / "out"))
        except ShardError as error:
            results.append(error)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sum(result == tmp_path / "out" for result in results) == 1
    assert sum("is there already" in str(result) for result in results) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    check_record(ShardSet(tmp_path / "out")[3], 3)


def test_writing_refuses(tmp_path, written):
    class Empty(Numbered):
        def __iter__(self):
            return iter(())

    class Wrong(Numbered):
        def __iter__(self):
            yield Scene(id="wrong", frame=Frame(original=(5, 5))), Image.new("RGB", (7, 5))

    class Odd(Numbered):
        image_format = "webp"

    for source, options, words in [
        (Empty(2), {}, ["no samples", "Empty"]),
        (Wrong(1), {}, ["'wrong'", "frame", "(5, 5)", "(5, 7)"]),
        (Odd(1), {}, ["image_format='webp'"]),
        (Numbered(2), {"shard_size": 0}, ["shard_size=0"]),
    ]:
        with pytest.raises(ShardError) as caught:
            write_shards(source, tmp_path / "out", **options)
        one_line(caught, *words)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ShardError) as caught:
        write_shards(Numbered(2), written)
    one_line(caught, written, "is there already")


def test_an_error_of_the_source_is_its_own(tmp_path):
    class Lost(Numbered):
        def __iter__(self):
            yield from super().__iter__()
            raise FileNotFoundError("picture")

    with pytest.raises(FileNotFoundError, match="picture"):
        write_shards(Lost(3), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_folder_and_no_index_say_how_to_make_one(tmp_path):
    with pytest.raises(ShardError) as caught:
        ShardSet(tmp_path / "nowhere")
    one_line(
        caught,
        f"shards={tmp_path / 'nowhere'}",
        "no such folder",
        "prepare.py",
        f"out={tmp_path / 'nowhere'}",
    )
    with pytest.raises(ShardError) as caught:
        ShardSet(tmp_path)
    one_line(caught, "no index.json", "prepare.py")
    assert not has_shards(tmp_path)


def test_an_index_of_another_kind_is_refused(copy):
    change_index(copy, version=99)
    with pytest.raises(ShardError) as caught:
        ShardSet(copy)
    one_line(caught, "99", "prepare.py")
    (copy / "index.json").write_text("[]")
    with pytest.raises(ShardError) as caught:
        ShardSet(copy)
    one_line(caught, "not an index of shards")


def test_a_missing_shard_is_refused(copy):
    (copy / "000001.tar").unlink()
    with pytest.raises(ShardError) as caught:
        ShardSet(copy)
    one_line(caught, copy, "000001.tar is missing")
    assert check_shards(copy).faults == ("000001.tar is missing",)


def test_a_truncated_shard_is_refused(copy):
    whole = (copy / "000001.tar").stat().st_size
    os.truncate(copy / "000001.tar", whole - 512)
    with pytest.raises(ShardError) as caught:
        ShardSet(copy)
    one_line(caught, copy, "000001.tar is truncated", whole - 512, whole)


def test_a_changed_byte_is_found_by_the_checksum(copy):
    data = bytearray((copy / "000002.tar").read_bytes())
    data[600] ^= 1
    (copy / "000002.tar").write_bytes(data)
    ShardSet(copy)
    with pytest.raises(ShardError) as caught:
        ShardSet(copy, verify="sha256")
    one_line(caught, "000002.tar has changed")
    report = check_shards(copy)
    assert not report.ok
    assert "000002.tar has changed" in str(report)


def test_a_check_of_whole_shards_finds_nothing_and_strays_are_told(copy):
    told = []
    report = check_shards(copy, progress=lambda done, total: told.append((done, total)))
    assert report.ok
    assert (report.shards, report.samples) == (3, 10)
    assert report.bytes == sum(file.stat().st_size for file in copy.glob("*.tar"))
    assert told == [(1, 3), (2, 3), (3, 3)]
    shutil.copy(copy / "000000.tar", copy / "000009.tar")
    assert check_shards(copy).faults == ("000009.tar is not in index.json",)


def test_shards_that_do_not_hold_what_the_index_says_are_refused(copy):
    index = json.loads((copy / "index.json").read_text())
    shards = index["shards"]
    shards[0]["count"] += 1
    change_index(copy, shards=shards)
    stored = ShardSet(copy)
    check_record(stored.read(1, 0), 4)
    with pytest.raises(ShardError) as caught:
        stored.read(0, 0)
    one_line(caught, "000000.tar", "5 samples")
    assert "5 samples" in check_shards(copy).faults[0]


def test_what_is_no_tar_or_no_picture_is_refused(copy):
    size = (copy / "000000.tar").stat().st_size
    (copy / "000000.tar").write_bytes(b"x" * size)
    data = bytearray((copy / "000001.tar").read_bytes())
    data[512:520] = b"notapng!"
    (copy / "000001.tar").write_bytes(data)
    stored = ShardSet(copy)
    with pytest.raises(ShardError) as caught:
        stored.read(0, 0)
    one_line(caught, "000000.tar", "header", "byte 0")
    with pytest.raises(ShardError) as caught:
        stored.read(1, 0)
    one_line(caught, "000001.tar row 0", "task=check")


def read_in_process(stored, numbers, results):
    results.put([stored[n].scene.id for n in numbers])


def test_processes_may_share_a_shard_set(written):
    stored = ShardSet(written)
    stored[0]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=read_in_process, args=(stored, [9, 0, 4], results))
    process.start()
    assert results.get(timeout=60) == ["number-9", "number-0", "number-4"]
    process.join()
    check_record(stored[9], 9)
    check_record(pickle.loads(pickle.dumps(stored))[9], 9)


def test_threads_may_share_a_shard_set_with_few_files_open(written, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN_SHARDS", 1)
    stored = ShardSet(written)
    numbers = [n * 7 % 10 for n in range(300)]
    with ThreadPoolExecutor(4) as pool:
        for number, record in zip(numbers, pool.map(stored.__getitem__, numbers), strict=True):
            check_record(record, number)
    assert len(stored._open) == 1


def test_files_are_closed(written):
    stored = ShardSet(written)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        stored[number]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    assert len(pickle.dumps(stored)) < 3000
    del stored
    assert len(os.listdir("/proc/self/fd")) == before
