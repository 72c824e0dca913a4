"""Folders behind addresses: what fsspec's own memory and an S3 server hold is what a local folder holds."""

import functools
import http.server
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from datamodules.shards import ShardError, write_shards
from datamodules.sources.shapes import Shapes
from datamodules.storage import LocalFolder, folder_at
from preparation.checking import check_folder
from preparation.conversion import convert_source
from preparation.filters import Filter, SceneLimits
from preparation.runner import run_stage
from preparation.statistics import write_statistics
from runtime.launch.ranks import Ranks


@pytest.fixture
def address(request, tmp_path):
    """address: of a folder that is not there yet."""
    if request.param == "file":
        return f"file://{tmp_path}/out"
    name = request.node.name.partition("[")[0]
    return f"memory://{name}" if request.param == "memory" else f"{request.getfixturevalue('s3')}/{name}"


everywhere = pytest.mark.parametrize("address", ["file", "memory", "s3"], indirect=True)


def contents(place):
    folder = folder_at(place)
    return {name: folder.read(name) for name in folder.names()}


def break_off(folder):
    with folder.writing("c") as path:
        path.write_bytes(b"half")
        raise ZeroDivisionError


@everywhere
def test_a_folder_holds_whole_files(address):
    folder = folder_at(address)
    assert (folder.names(), folder.has("a")) == (set(), False)
    folder.write("a", b"one")
    folder.write("a", b"three")
    with folder.writing("b") as path:
        path.write_bytes(b"x" * 3000)
        assert not folder.has("b")
    with pytest.raises(ZeroDivisionError):
        break_off(folder)
    assert folder.names() == {"a", "b"}
    assert (folder.read("a"), folder.size("b")) == (b"three", 3000)
    with folder.reading("b") as path:
        assert path.read_bytes() == b"x" * 3000
    assert folder.sha256("a") == "8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f"
    folder.remove("a")
    folder.remove("a")
    assert folder.names() == {"b"}


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path):
    folder = folder_at(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = socket.gethostname()
    writers = f"{host}-{gone.pid}", f"{host}-{os.getppid()}", "other-1"
    dead, alive, elsewhere = (tmp_path / f".a.{writer}.partial" for writer in writers)
    for path in (dead, alive, elsewhere):
        path.write_bytes(b"half")
    folder.write("a", b"one")
    assert (dead.exists(), alive.exists(), elsewhere.exists()) == (False, True, True)
    os.utime(elsewhere, (0, 0))
    folder.write("a", b"two")
    assert (alive.exists(), elsewhere.exists()) == (True, False)
    with folder.writing("a") as path:
        path.write_bytes(b"three")
        folder_at(tmp_path).sweep()  # another process has ended the same work
    assert ([path.name for path in tmp_path.iterdir()], folder.read("a")) == (["a"], b"two")


def chain(base):
    """Convert, filter as two ranks, check, count."""
    convert_source(Shapes(count=10), f"{base}/shapes", shard_size=4)
    stage = Filter(scenes=SceneLimits(min_objects=2))
    for rank in range(2):
        report = run_stage(stage, f"{base}/shapes", f"{base}/filtered", ranks=Ranks(rank=rank, count=2))
    assert report.index is not None
    assert len(run_stage(stage, f"{base}/shapes", f"{base}/filtered").whole) == 3
    assert check_folder(f"{base}/filtered").faults == []
    write_statistics(f"{base}/filtered", f"{base}/statistics")
    return {folder: contents(f"{base}/{folder}") for folder in ("shapes", "filtered", "statistics")}


@pytest.fixture(scope="module")
def on_a_disk(tmp_path_factory):
    return chain(tmp_path_factory.mktemp("local"))


@everywhere
def test_a_chain_of_tasks_makes_what_it_makes_on_a_disk(address, on_a_disk):
    for folder, there in chain(address).items():
        here = on_a_disk[folder]
        assert there.keys() == here.keys()
        assert {name for name in there if there[name] != here[name]} == set()


@everywhere
def test_what_is_broken_there_is_found_and_made_again(address):
    convert_source(Shapes(count=10), address, shard_size=4)
    whole, folder = contents(address), folder_at(address)
    folder.write("000001.tar", whole["000001.tar"][:-512])
    folder.remove("000002.tar")
    faults = check_folder(address).faults
    assert [fault.split(": ")[1].split()[0] for fault in faults] == ["000001.tar", "000002.tar"]
    assert convert_source(Shapes(count=10), address, shard_size=4).done == ["000001", "000002"]
    assert contents(address) == whole


def test_shards_behind_http_are_read(tmp_path):
    write_shards(Shapes(count=6), tmp_path / "in", shard_size=4)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = f"http://127.0.0.1:{server.server_port}/in"
        assert len(run_stage(Filter(scenes=SceneLimits(min_objects=1)), place, tmp_path / "out").done) == 2
        assert contents(tmp_path / "out")["000001.tar"] == contents(tmp_path / "in")["000001.tar"]
    finally:
        server.shutdown()
        server.server_close()


def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path):
    assert isinstance(folder_at(Path("x")), LocalFolder)
    with pytest.raises(ValueError, match="nowhere://x"):
        folder_at("nowhere://x")
    with pytest.raises(ShardError, match="shards=memory://empty"):
        run_stage(Filter(scenes=SceneLimits(min_objects=1)), "memory://empty", tmp_path / "out")
