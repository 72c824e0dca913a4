"""Remote shards, read through few copies: what comes is what local shards give, whoever fetches and whatever goes wrong."""

import collections
import functools
import http.server
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from datamodules.loaders import PositionDataset, PositionLoader
from datamodules.order import GlobalBatches, SampleOrder
from datamodules.scene_datamodule import SceneDataModule
from datamodules.shard_cache import ShardCache
from datamodules.shards import ShardError, ShardSet, write_shards
from datamodules.sources.shapes import Shapes
from datamodules.storage import folder_at
from datamodules.transforms import SceneTransform

COUNT, SHARDS = 22, 6


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """22 pictures in 6 shards."""
    return write_shards(Shapes(count=COUNT), tmp_path_factory.mktemp("shards") / "local", shard_size=4)


@pytest.fixture(scope="module")
def remote(local, s3):
    """The same on an S3 server."""
    folder = folder_at(f"{s3}/streamed")
    for file in local.iterdir():
        folder.write(file.name, file.read_bytes())
    return folder.place


@pytest.fixture
def web(local):
    """(address, asked, faults) behind a web server: how often each file was asked for, and false answers to give first."""
    asked, faults = collections.Counter(), collections.defaultdict(list)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            asked[name] += 1
            if not faults[name]:
                super().do_GET()
                return
            content = faults[name].pop(0)
            self.send_response(200 if content else 503)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(local)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, faults
    server.shutdown()
    server.server_close()


def largest(local, count):
    return sum(sorted((entry.bytes for entry in ShardSet(local).entries), reverse=True)[:count])


def held(folder):
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def ids(shards, cache, positions, *, workers=0):
    """Ids and means of the samples at some positions, through a loader."""
    stored = ShardSet(shards, cache=cache)
    dataset = PositionDataset(stored, SceneTransform(resolution=32), order=SampleOrder(stored.sizes, seed=3, window=2))
    plan = [positions[start : start + 5] for start in range(0, len(positions), 5)]
    loader = PositionLoader(dataset, lambda: plan, length=len(plan), workers=workers)
    return [
        (scene.id, float(image.mean()))
        for batch in loader
        for scene, image in zip(batch.scenes, batch.images, strict=True)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_streamed_through_a_small_cache_is_what_lies_on_the_disk(local, remote, tmp_path, workers):
    cache = ShardCache(tmp_path / "cache", limit=largest(local, 3))
    positions = range(3 * COUNT)
    assert ids(remote, cache, positions, workers=workers) == ids(local, None, positions)
    assert 0 < held(cache.folder) <= cache.limit < largest(local, SHARDS)
    assert not list(cache.folder.glob(".*.partial"))


def test_the_cache_never_has_more_than_its_limit_and_the_oldest_goes_first(local, remote, tmp_path):
    stored = ShardSet(remote, cache=ShardCache(tmp_path / "cache", limit=largest(local, 2)))
    for number in (0, 4, 8, 0, 12, 21):
        assert stored[number].scene == ShardSet(local)[number].scene
        assert held(tmp_path / "cache") <= largest(local, 2)
    names = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
    assert names == {stored.entries[shard].sha256 for shard in (3, 5)}
    assert len(stored._open) <= 3  # what went from the disk is closed


def test_what_went_while_it_is_read_is_read_on(local, remote, tmp_path):
    stored = ShardSet(remote, cache=ShardCache(tmp_path / "cache", limit=largest(local, 6)))
    first = stored[0]
    for copy in (tmp_path / "cache").glob("*.tar"):
        copy.unlink()
    assert stored[1].scene == ShardSet(local)[1].scene
    np.testing.assert_array_equal(stored[0].image, first.image)


def read_all(address, folder, limit, seed, results):
    stored = ShardSet(address, cache=ShardCache(folder, limit=limit))
    numbers = np.random.default_rng(seed).permutation(COUNT).tolist()
    results.put({number: stored[number].scene.id for number in numbers})


def test_processes_of_a_machine_fetch_each_shard_once(local, web, tmp_path):
    address, asked, _ = web
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (address, tmp_path / "cache", largest(local, 6))
    readers = [context.Process(target=read_all, args=(*arguments, seed, results)) for seed in range(4)]
    for reader in readers:
        reader.start()
    found = [results.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    there = ShardSet(local)
    assert all(seen == {number: there.scene(number).id for number in range(COUNT)} for seen in found)
    assert {name: count for name, count in asked.items() if name.endswith(".tar")} == {
        entry.name: 1 for entry in there.entries
    }


def test_what_comes_broken_is_fetched_again(local, web, tmp_path):
    address, asked, faults = web
    [first, second, *_] = ShardSet(local).entries
    whole = (local / first.name).read_bytes()
    faults[first.name] = [b"", whole[:-512], b"x" * len(whole)]
    stored = ShardSet(address, cache=ShardCache(tmp_path / "cache", limit=1e9, pause=0.01))
    assert stored[0].scene == ShardSet(local)[0].scene
    assert asked[first.name] == 4
    faults[second.name] = [b"x" * second.bytes] * 9
    with pytest.raises(ShardError, match=f"{second.name} has changed: .*; run `python prepare.py task=check") as caught:
        stored[4]
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").glob("*.tar")] == [f"{first.sha256}.tar"]
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_what_is_missing_is_said_where_it_can_be_known(local, remote, web, tmp_path, s3):
    cache = ShardCache(tmp_path / "cache", limit=1e9, pause=0.01)
    folder = folder_at(f"{s3}/holes")
    for file in local.iterdir():
        if file.name != "000002.tar":
            folder.write(file.name, file.read_bytes())
    with pytest.raises(ShardError, match=r"holes: 000002\.tar is missing; copy it again"):
        ShardSet(folder.place, cache=cache)
    stored = ShardSet(web[0], cache=cache)
    (local / "000002.tar").rename(tmp_path / "away")
    try:
        with pytest.raises(ShardError, match=r"000002\.tar is missing; run"):
            stored[9]
    finally:
        (tmp_path / "away").rename(local / "000002.tar")
    with pytest.raises(ShardError, match="streamed: remote shards are read through copies; set data.cache=DIR"):
        ShardSet(remote)


def test_what_killed_fetches_left_takes_no_room(local, remote, tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / f".abc.{10**12}.1.{socket.gethostname()}-{gone.pid}.partial"
    left.write_bytes(b"half")
    stored = ShardSet(remote, cache=ShardCache(tmp_path, limit=largest(local, 1)))
    assert stored[0].scene == ShardSet(local)[0].scene
    assert not left.exists()


def data_of(shards, **options):
    return SceneDataModule(shards, resolution=32, batch_size=4, seed=0, window=3, **options)


def test_a_run_is_refused_where_its_cache_is_too_small_or_not_named(local, remote, tmp_path):
    room = largest(local, 3)
    with pytest.raises(ShardError, match=r"set data\.cache=DIR"):
        data_of(remote).setup("fit")
    with pytest.raises(
        ShardError, match=rf"data\.cache_bytes={room - 1}: the data\.window=3 shards .* {room} bytes; raise"
    ):
        data_of(remote, cache=str(tmp_path), cache_bytes=room - 1).setup("fit")
    data = data_of([remote, str(local)], weights=[1, 2], cache=str(tmp_path), cache_bytes=room)
    data.setup("fit")
    assert [part.samples for part in data.parts(30)] == [COUNT, COUNT]
    assert data.training_set[COUNT + 3].scene == data.training_set[3].scene


@pytest.mark.parametrize("mixed", [False, True])
def test_the_next_window_is_fetched_while_one_is_read(local, remote, tmp_path, mixed):
    options = {"shards": [remote, str(local)], "weights": [1, 2]} if mixed else {"shards": remote}
    data = data_of(cache=str(tmp_path), cache_bytes=2 * largest(local, 3), **options)
    data.setup("fit")
    dataset = PositionDataset(data.training_set, SceneTransform(resolution=32), order=data.order)
    order = data.order.orders[0] if mixed else data.order
    entries = ShardSet(local).entries
    following = {entries[shard].sha256 for shard in order.ahead(0)[1]}
    assert {shard for shard, _ in map(order.__getitem__, range(COUNT))} == set(range(SHARDS))
    assert len(following) == 3
    position = 0
    while mixed and data.order.locate(position)[0] != 0:
        position += 1
    dataset[position]
    until = time.monotonic() + 30
    while not following <= {path.stem for path in tmp_path.glob("*.tar")}:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert order.ahead(COUNT - 1)[0] == (0, 1)
    again = order.ahead(COUNT - 1)[1]
    assert set(again) == {order[COUNT + n][0] for n in range(sum(entries[shard].count for shard in again))}


opened = []
sys.addaudithook(
    lambda event, arguments: opened.append(arguments[0]) if event == "open" and opened[:1] == [None] else None
)


def test_ten_thousand_shards_are_not_opened_before_they_are_read(tmp_path):
    import json

    write_shards(Shapes(count=2), tmp_path / "one")
    index = json.loads((tmp_path / "one" / "index.json").read_text())
    [entry] = index["shards"]
    (tmp_path / "many").mkdir()
    for number in range(10_000):
        os.link(tmp_path / "one" / entry["name"], tmp_path / "many" / f"{number:06d}.tar")
    index["shards"] = [{**entry, "name": f"{number:06d}.tar"} for number in range(10_000)]
    (tmp_path / "many" / "index.json").write_text(json.dumps(index))
    opened[:] = [None]
    stored = ShardSet(tmp_path / "many")
    order = SampleOrder(stored.sizes, seed=0, window=8)
    seen = [stored.read(*order[position]).scene.id for position in range(16)]
    files = [str(name) for name in opened[1:] if str(name).startswith(str(tmp_path))]
    opened.clear()
    assert len(stored) == 20_000
    assert len(seen) == 16
    assert len(files) == 1 + 8  # the index and a window
    assert {order[position] for position in (19_999, 20_000, 59_999)} <= {(s, r) for s in range(10_000) for r in (0, 1)}


@pytest.mark.parametrize("shard_size", [COUNT, 8])
def test_fewer_shards_than_ranks_and_workers_serve_all(tmp_path, shard_size):
    stored = ShardSet(write_shards(Shapes(count=COUNT), tmp_path / "few", shard_size=shard_size))
    dataset = PositionDataset(stored, SceneTransform(resolution=32), order=SampleOrder(stored.sizes, seed=0, window=8))
    ranks, batches = 4, GlobalBatches(8, ranks=4)
    seen = []
    for rank in range(ranks):
        plan = [batches.positions(number, rank) for number in range(4)]
        loader = PositionLoader(dataset, functools.partial(list, plan), length=len(plan), workers=2 if rank == 0 else 0)
        seen += [position for batch in loader for position in batch.positions.tolist()]
    assert sorted(seen) == list(range(32))
