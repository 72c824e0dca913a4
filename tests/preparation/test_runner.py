"""Stages over shards: killed and run again, over ranks, with input that is broken and disks that are full."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.shard_index import ShardEntry
from datamodules.shard_writer import TooManyBad
from datamodules.shards import ShardError, ShardSet, check_shards, write_shards
from datamodules.sources.shapes import Shapes
from datamodules.storage import folder_at
from preparation.runner import read_samples, read_scenes, run_stage
from preparation.stage import Stage
from runtime.launch.ranks import Ranks, ranks_of
from tests.preparation.conftest import contents, members_of, rewrite

FORK = multiprocessing.get_context("fork")


class Shout(Stage):
    """Captions in capitals; without pictures that cannot be read, and without scenes of `drop` objects."""

    name = "shout"
    requires = frozenset({"image", "caption"})

    def __init__(self, *, word="", drop=None, pause=0.0):
        super().__init__()
        self.word, self.drop, self.pause = word, drop, pause

    def settings(self):
        return {"word": self.word, "drop": self.drop}

    def __call__(self, samples):
        for sample, _picture in self.pictured(samples):
            time.sleep(self.pause)
            if self.drop is not None and len(sample.scene.objects) >= self.drop:
                self.left_out.counts["scenes too full"] += 1
                continue
            yield sample.with_scene(replace(sample.scene, caption=sample.scene.caption.upper() + self.word))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """30 samples in shards of 4; the last has 2."""
    return write_shards(Shapes(count=30), tmp_path_factory.mktemp("shapes") / "in", shard_size=4)


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert len(run_stage(Shout(), shards, out).done) == 8
    return contents(out)


def start(shards, out, *, pause=0.0, told=None, **environment):
    """A process of its own that runs the stage, as the rank that the environment says."""

    def work():
        ranks = ranks_of({name: str(value) for name, value in environment.items()}, arrays=True)
        report = run_stage(Shout(pause=pause), shards, out, ranks=ranks)
        if told is not None:
            told.put(len(report.done))

    process = FORK.Process(target=work)
    process.start()
    return process


def killed_at(process, out, *, whole):
    """Kills a process in the middle of a shard, once so many are whole."""
    while True:
        assert process.exitcode is None
        if len(list(out.glob("0*.json"))) >= whole and list(out.glob(".0*.partial")):
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert list(out.glob(".0*.partial"))
            return len(list(out.glob("0*.json")))
        time.sleep(0.01)


def test_every_shard_becomes_a_shard_of_the_same_name_and_the_index_tells_what_was_done(shards, tmp_path):
    out, told = tmp_path / "out", []
    report = run_stage(Shout(drop=4), shards, out, progress=lambda done, total: told.append((done, total)))
    assert (report.pieces, len(report.done), report.whole, report.failed) == (8, 8, [], [])
    assert told[-1] == (30, 30)
    before, after = ShardSet(shards), ShardSet(out)
    assert [entry.name for entry in after.entries] == [entry.name for entry in before.entries]
    wanted = [scene for scene in map(before.scene, range(30)) if len(scene.objects) < 4]
    assert [scene.caption for scene in map(after.scene, range(len(after)))] == [s.caption.upper() for s in wanted]
    assert 0 < len(after) < 30
    assert after.index["left_out"] == {"scenes too full": 30 - len(after)}
    assert after.index["source"] == before.index["source"]
    assert [stage["name"] for stage in after.index["stages"]] == ["convert", "shout"]
    assert after.index["stages"][1]["settings"] == {"word": "", "drop": 4}
    assert check_shards(out).ok
    # and once more, of what was made: the account of the step before is kept with that step
    run_stage(Shout(word="!"), out, tmp_path / "again")
    index = ShardSet(tmp_path / "again").index
    assert [stage["name"] for stage in index["stages"]] == ["convert", "shout", "shout"]
    assert index["stages"][1]["left_out"] == {"scenes too full": 30 - len(after)}
    assert "left_out" not in index


def test_killed_twice_and_run_again_it_is_what_an_unbroken_run_makes(shards, unbroken, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    made = killed_at(start(shards, out, pause=0.05), out, whole=1)
    later = killed_at(start(shards, out, pause=0.05), out, whole=made + 1)
    dates = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.json")}
    report = run_stage(Shout(), shards, out)
    assert (len(report.whole), len(report.done)) == (later, 8 - later)
    assert {name: (out / name).stat().st_mtime_ns for name in dates} == dates  # no shard twice
    assert contents(out) == unbroken


ARRAY = {"SLURM_ARRAY_TASK_COUNT": 2, "SLURM_ARRAY_TASK_MIN": 1, "SLURM_ARRAY_TASK_STEP": 1}


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(lambda rank: {"RANK": rank, "WORLD_SIZE": 2}, id="torchrun"),
        pytest.param(lambda rank: {**ARRAY, "SLURM_ARRAY_TASK_ID": rank + 1}, id="array"),
    ],
)
def test_two_processes_make_what_one_makes(shards, unbroken, tmp_path, said):
    out = tmp_path / "out"
    told = FORK.Queue()
    for process in [start(shards, out, told=told, **said(rank)) for rank in range(2)]:
        assert told.get(timeout=60) == 4
        process.join()
        assert process.exitcode == 0
    assert contents(out) == unbroken


def test_ranks_need_not_be_as_many_as_before(shards, unbroken, tmp_path):
    out = tmp_path / "out"
    first = run_stage(Shout(), shards, out, ranks=Ranks(rank=0, count=2))
    assert (first.done, first.index) == (["000000", "000002", "000004", "000006"], None)
    assert first.elsewhere == ["000001", "000003", "000005", "000007"]
    idle = run_stage(Shout(), shards, out, ranks=Ranks(rank=8, count=9))
    assert (idle.done, idle.whole) == ([], [])
    second = run_stage(Shout(), shards, out, ranks=Ranks(rank=1, count=3))
    assert (second.done, second.whole) == (["000001", "000007"], ["000004"])
    assert len(run_stage(Shout(), shards, out).whole) == 6
    assert contents(out) == unbroken


def test_what_is_not_whole_any_more_is_made_again_and_nothing_else(shards, unbroken, tmp_path):
    out = tmp_path / "out"
    run_stage(Shout(), shards, out)
    assert len(run_stage(Shout(), shards, out).whole) == 8
    content = bytearray((out / "000003.tar").read_bytes())
    content[700] ^= 1
    (out / "000003.tar").write_bytes(content)
    (out / "000005.json").write_text('{"work": ')
    (out / "000006.tar").unlink()
    assert run_stage(Shout(), shards, out).done == ["000003", "000005", "000006"]
    assert contents(out) == unbroken


def test_a_folder_of_other_work_is_refused(shards, tmp_path):
    out = tmp_path / "out"
    run_stage(Shout(), shards, out, ranks=Ranks(rank=0, count=2))
    other = write_shards(Shapes(count=3), tmp_path / "other")
    for stage, given, words in [(Shout(word="!"), shards, ["settings.word= (now !)"]), (Shout(), other, ["input="])]:
        with pytest.raises(ShardError) as caught:
            run_stage(stage, given, out)
        assert all(word in str(caught.value) for word in [f"out={out}", *words])
        assert "\n" not in str(caught.value)
    for taken in (other, shards):  # something else is there; what is read
        with pytest.raises(ShardError, match=f"out={taken}"):
            run_stage(Shout(), shards, taken)
    assert "manifest.json" not in contents(shards)


def test_shards_that_lack_what_a_stage_requires_are_refused(shards, tmp_path):
    class Needy(Shout):
        requires = frozenset({"descriptions", "image"})

    with pytest.raises(ShardError, match="task=shout .*descriptions, .*shards=.* attributes, boxes"):
        run_stage(Needy(), shards, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_whose_samples_all_fall_out_is_no_trouble(shards, tmp_path):
    full = write_shards(Shapes(count=1, min_objects=4), tmp_path / "full")
    few = write_shards(Shapes(count=8, max_objects=1), tmp_path / "few", shard_size=1)
    rewrite(few, "000003.tar", members_of(full / "000000.tar"))
    out = tmp_path / "out"
    report = run_stage(Shout(drop=4), few, out)
    assert len(report.done) == 8
    stored = ShardSet(out)
    assert [entry.name for entry in stored.entries] == [f"00000{n}.tar" for n in (0, 1, 2, 4, 5, 6, 7)]
    assert len(stored) == 7
    assert check_shards(out).ok
    assert len(run_stage(Shout(drop=4), few, out).whole) == 8
    assert len(run_stage(Shout(), out, tmp_path / "next").done) == 7
    with pytest.raises(ShardError, match="out=.*none.*scenes too full: 8"):
        run_stage(Shout(drop=1), few, tmp_path / "none")


def test_a_picture_and_a_label_that_cannot_be_read_are_skipped_and_counted(shards, tmp_path):
    members, out = members_of(shards / "000001.tar"), tmp_path / "out"
    first, _, _, fourth, *_ = members
    members |= {first: members[first][:60], fourth: b""}
    given = rewrite(Path(shutil.copytree(shards, tmp_path / "in")), "000001.tar", members)
    with pytest.raises(TooManyBad, match=f"out={out}: 2 of 7 .*max_bad_fraction=0.01") as caught:
        run_stage(Shout(), given, out)
    assert len(caught.value.skipped) == 2
    assert (out / "000000.tar").exists()
    assert not (out / "index.json").exists()
    report = run_stage(Shout(), given, out, max_bad_fraction=0.1)
    assert (report.failed, report.whole, len(report.done)) == ([], ["000000"], 7)
    skipped = ShardSet(out).index["skipped"]
    assert skipped["samples"] == 2
    lines = sorted(skipped["reasons"])
    assert lines[0].startswith("000001.tar sample 000000005: scene.json: ")
    assert lines[1].startswith("sample 000000004: scene shapes-0-00000004: picture: ")
    assert ShardSet(out).sizes == (4, 2, 4, 4, 4, 4, 4, 2)
    with pytest.raises(TooManyBad):  # whole as it is, it is still too much
        run_stage(Shout(), given, out)


def test_a_truncated_shard_fails_in_one_line_and_the_others_are_made(shards, unbroken, tmp_path):
    given, out = Path(shutil.copytree(shards, tmp_path / "in")), tmp_path / "out"
    whole = (given / "000002.tar").read_bytes()
    (given / "000002.tar").write_bytes(whole[:-700])
    (given / "000005.tar").unlink()
    report = run_stage(Shout(), given, out)
    assert len(report.done) == 6
    assert [name for name, _ in report.failed] == ["000002", "000005"]
    assert "000002.tar" in report.failed[0][1]
    assert "000005.tar" in report.failed[1][1]
    assert report.index is None
    assert not (out / "index.json").exists()
    for line in ("done                        6", "failed                      2", "  000002: shards="):
        assert line in str(report)
    shutil.copy(shards / "000005.tar", given)
    (given / "000002.tar").write_bytes(whole)
    assert run_stage(Shout(), given, out).done == ["000002", "000005"]
    assert contents(out) == unbroken


def test_a_defect_of_a_stage_fails_a_shard_and_shows_where(shards, tmp_path, capsys):
    class Odd(Shout):
        def __call__(self, samples):
            for sample in super().__call__(samples):
                if sample.key == "000000009":
                    raise RuntimeError("out of memory")
                yield sample

    report = run_stage(Odd(), shards, tmp_path / "out")
    assert report.failed == [("000002", "RuntimeError: out of memory")]
    assert len(report.done) == 7
    assert "Traceback" in capsys.readouterr().err


def test_a_file_that_becomes_too_large_fails_and_leaves_nothing_of_itself(shards, unbroken, tmp_path):
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))  # a shard of few objects fits
    try:
        report = run_stage(Shout(), shards, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    small = [name[:6] for name in sorted(unbroken) if name.endswith(".tar") and len(unbroken[name]) <= 15_000]
    assert report.done == small
    assert 0 < len(small) < 8
    assert [name for name, _ in report.failed] == [f"00000{n}" for n in range(8) if f"00000{n}" not in small]
    assert "\n" not in report.failed[0][1]
    assert f"out={out}: File too large" in report.failed[0][1]
    assert set(contents(out)) == {"manifest.json", *(f"{name}.{kind}" for name in small for kind in ("tar", "json"))}
    assert len(run_stage(Shout(), shards, out).done) == 8 - len(small)
    assert contents(out) == unbroken


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_ends_the_work_and_keeps_what_is_whole(shards, unbroken, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        report = run_stage(Shout(), shards, disk / "out")
        assert 0 < len(report.done) < 7
        assert len(report.failed) == 1
        assert "No space left on device" in report.failed[0][1]
        assert len(report.done) + 1 + len(report.not_begun) == 8
        assert not list((disk / "out").glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = run_stage(Shout(), shards, disk / "out")
        assert again.whole == report.done
        assert contents(disk / "out") == unbroken
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_samples_of_different_form_are_refused(shards, tmp_path):
    class Half(Shout):
        def __call__(self, samples):
            for number, sample in enumerate(super().__call__(samples)):
                yield replace(sample, members={**sample.members, **({"txt": b"a"} if number else {})})

    report = run_stage(Half(), shards, tmp_path / "out")
    assert len(report.failed) == 8
    assert re.search("png, scene.json, txt .* png, scene.json", report.failed[0][1])


def test_a_shard_is_read_sample_by_sample(shards):
    entry = ShardEntry(**json.loads((shards / "index.json").read_text())["shards"][0])
    samples = list(read_samples(folder_at(shards), entry))
    assert [sample.key for sample in samples] == [f"{n:09d}" for n in range(4)]
    assert [sample.scene for sample in samples] == list(read_scenes(folder_at(shards), entry))
    assert samples[0].picture().size == (32, 32)
