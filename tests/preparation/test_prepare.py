"""What `prepare.py` does with its configuration: tasks choose stages, the terminal tells what became of the shards."""

import shutil

import pytest

from conf.schema import TASKS as OWN_TASKS
from conf.schema import stages
from datamodules.shards import ShardError, ShardSet, write_shards
from datamodules.sources.shapes import Shapes
from preparation.prepare import TASKS, convert, make, prepare
from runtime.composition import compose, implied
from runtime.overrides import ConfigError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(Shapes(count=20), tmp_path_factory.mktemp("shapes") / "in", shard_size=4)


def composed(*arguments):
    return compose("prepare", arguments)


@pytest.mark.parametrize("task", stages())
def test_a_task_chooses_the_stage_of_its_name(task):
    cfg = composed(f"task={task}", "shards=a", "out=b")
    assert cfg.stage._target_.startswith(("preparation.", "preparation.stages."))  # the latter bring a backbone
    assert implied("prepare", [f"task={task}"]) == [f"stage={task}"]


def test_other_tasks_and_scripts_choose_none():
    assert set(TASKS) == set(OWN_TASKS)
    assert composed("task=stats", "shards=a", "out=b").stage is None
    assert implied("prepare", ["task=filter", "stage=filter"]) == []
    assert implied("train", ["task=filter"]) == []


def test_a_stage_of_ones_own_needs_a_file_alone(tmp_path):
    (tmp_path / "stage").mkdir()
    limits = "scenes: {_target_: preparation.filters.SceneLimits, min_objects: 3}"
    text = f"# @package stage\n_target_: preparation.filters.Filter\n{limits}\n"
    (tmp_path / "stage" / "crowded.yaml").write_text(text)
    cfg = compose(
        "prepare", ["task=crowded", "shards=a", "out=b", "stage.scenes.min_objects=4"], config_dir=str(tmp_path)
    )
    assert cfg.stage.scenes.min_objects == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=filtre", "shards=a", "out=b"], "task=filtre: .* filter.* convert, stats, check"),
        (["task=filter", "shards=a"], "out: task=filter"),
        (["task=filter", "out=a"], "shards: task=filter"),
        (["task=filter", "shards=a", "out=b", "stage.scenes.min_object=1"], "stage.scenes.min_object=1: .*min_objects"),
        (["task=stats", "shards=a"], "out: task=stats"),
        (["task=check", "shards=a", "accelerator=tpu"], "accelerator=tpu"),
        (["source=shapes", "out=a", "shard_bytes=0"], "shard_bytes=0"),
    ],
)
def test_what_no_task_can_do_is_refused_in_one_line(arguments, words):
    with pytest.raises((ConfigError, ValueError), match=words) as caught:
        composed(*arguments)
    assert "\n" not in str(caught.value)


def test_the_terminal_tells_what_was_filtered_and_what_was_whole(shards, tmp_path, capsys):
    cfg = composed("task=filter", f"shards={shards}", f"out={tmp_path / 'out'}", "stage.scenes.min_objects=2")
    prepare(cfg)
    out, errors = capsys.readouterr()
    few = 20 - len(ShardSet(tmp_path / "out"))
    assert f"  left out: scenes under min_objects: {few}" in out
    assert "done                        5" in out
    assert "filter: 100%" in errors
    assert "scene/s" in errors
    prepare(cfg)
    assert "skipped, were whole         5" in capsys.readouterr().out
    other = composed("task=filter", f"shards={shards}", f"out={tmp_path / 'out'}", "stage.scenes.min_objects=1")
    with pytest.raises(ShardError, match=r"settings\.min_objects=2 .*1"):
        prepare(other)


def test_a_shard_that_failed_is_told_and_is_an_error(shards, tmp_path, capsys):
    given = shutil.copytree(shards, tmp_path / "in")
    (given / "000001.tar").write_bytes(b"")
    cfg = composed("task=filter", f"shards={given}", f"out={tmp_path / 'out'}", "stage.scenes.min_objects=1")
    with pytest.raises(ShardError, match="out=.* 1 of 5 .*000001: "):
        prepare(cfg)
    assert "failed                      1" in capsys.readouterr().out


def test_ranks_share_the_work_and_the_last_one_has_the_index(shards, tmp_path, capsys):
    cfg = composed("task=filter", f"shards={shards}", f"out={tmp_path / 'out'}", "stage.scenes.min_objects=1")
    make(cfg, environment={"RANK": "0", "WORLD_SIZE": "2"})
    out, errors = capsys.readouterr()
    assert "of other processes          2" in out
    assert "the index follows when the other processes have ended" in out
    assert "filter 1/2" in errors
    make(cfg, environment={"RANK": "1", "WORLD_SIZE": "2"})
    assert ShardSet(tmp_path / "out").sizes == (4, 4, 4, 4, 4)
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "1"}
    source = composed("source=shapes", "source.count=9", f"out={tmp_path / 'shapes'}", "shard_size=3")
    for number in range(3):
        convert(source, environment={**array, "SLURM_ARRAY_TASK_ID": str(number)})
        assert "done                        1" in capsys.readouterr().out


def test_statistics_and_a_check_are_told(shards, tmp_path, capsys):
    prepare(composed("task=stats", f"shards={shards}", f"out={tmp_path / 'stats'}"))
    assert "shapes: 20 scenes\n  objects per scene: " in capsys.readouterr().out
    prepare(composed("task=check", f"shards={shards}"))
    assert "5 shards, 20 samples" in capsys.readouterr().out
    given = shutil.copytree(shards, tmp_path / "in")
    shutil.copy(given / "000000.tar", given / "000001.tar")
    with pytest.raises(ShardError, match=r"shards=.* 1 .*000001\.tar"):
        prepare(composed("task=check", f"shards={given}"))
