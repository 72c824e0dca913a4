"""Run directories: new, resumed, finished or refused; torn checkpoints; a configuration reloaded."""

import copy
import os
import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from runtime.composition import compose
from runtime.run_directory import RunDirectory, RunError, is_whole, load_run_config


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose("train", ["trainer.max_steps=200"])


@pytest.fixture
def cfg(composed: DictConfig, tmp_path: Path) -> DictConfig:
    own = copy.deepcopy(composed)
    own.run = str(tmp_path / "run")
    return own


@pytest.fixture
def run(cfg: DictConfig) -> RunDirectory:
    """The folder of a run that has begun."""
    directory = RunDirectory(cfg.run)
    directory.open(cfg)
    return directory


def save(directory: RunDirectory, step: int) -> Path:
    path = directory.checkpoints / f"step={step}.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"weights": torch.randn(100, 70), "step": step}, path)
    return path


def test_a_new_run_writes_its_resolved_configuration_once(cfg: DictConfig) -> None:
    directory = RunDirectory(cfg.run)
    assert directory.inspect(cfg).state == "new"
    assert not directory.path.exists()
    assert directory.open(cfg).state == "new"
    assert os.listdir(directory.path) == ["config.yaml"]
    text = directory.config_file.read_text(encoding="utf-8")
    assert "${" not in text
    assert OmegaConf.load(directory.config_file) == OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))

    cfg.trainer.max_steps = 300
    assert directory.open(cfg).state == "resumed"
    assert directory.config_file.read_text(encoding="utf-8") == text


def test_the_same_configuration_goes_on_from_the_newest_checkpoint(run: RunDirectory, cfg: DictConfig) -> None:
    attempt = run.open(cfg)
    assert (attempt.state, attempt.checkpoint) == ("resumed", None)
    assert "goes on from its start" in attempt.message
    for step in (90, 1000, 200):
        save(run, step)
    attempt = run.open(cfg)
    assert attempt.checkpoint == run.checkpoints / "step=1000.ckpt"
    assert attempt.message.endswith("goes on from step=1000.ckpt")


def test_what_may_change_between_two_attempts(run: RunDirectory, cfg: DictConfig, tmp_path: Path) -> None:
    moved = run.path.rename(tmp_path / "moved")
    cfg.run = str(moved)
    cfg.trainer.devices = 4
    cfg.trainer.accumulate = 2  # and with it what is interpolated from it
    cfg.trainer.save_every = 7
    cfg.paths.data = "elsewhere"
    cfg.data.workers = 3
    cfg.logger = {}
    cfg.plan = True
    assert RunDirectory(moved).open(cfg).state == "resumed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "(seed was 0, now 1"),
        ({"trainer.precision": "bf16-mixed"}, "(trainer.precision was 32-true, now bf16-mixed)"),
        ({"optimizer.betas": [0.5, 0.6]}, ", now [0.5, 0.6])"),
        ({"conditioning": {}}, "now absent); name a new folder"),
        ({"ema.decay": 0.5, "optimizer.eps": 0.1, "drops.keep": 0.7, "drops.none": 0.15}, " and 1 more)"),
        ({"data.shards": "x" * 99}, f"now {'x' * 59}…)"),
    ],
)
def test_another_configuration_is_refused_with_both_values(
    run: RunDirectory, cfg: DictConfig, changes: dict, message: str
) -> None:
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        run.open(cfg)
    assert str(caught.value).startswith(f"run={run.path}: holds a run with another configuration (")
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_something_else_is_refused(cfg: DictConfig) -> None:
    directory = RunDirectory(cfg.run)
    directory.path.mkdir()
    (directory.path / ".draft").touch()  # what a kill while writing leaves behind
    assert directory.inspect(cfg).state == "new"
    (directory.path / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"not empty and holds no run \(no config.yaml\)"):
        directory.open(cfg)
    with pytest.raises(RunError, match="holds no run"):
        RunDirectory(directory.path / "thesis.tex").open(cfg)


def test_a_finished_run_says_so_until_more_steps_are_asked_for(run: RunDirectory, cfg: DictConfig) -> None:
    run.finish(200)
    attempt = run.open(cfg)
    assert attempt.state == "finished"
    assert attempt.message == (
        f"{run.path}: finished at step 200; raise trainer.max_steps to train on, "
        f"or evaluate it: python evaluate.py run={run.path}"
    )
    save(run, 200)
    cfg.trainer.max_steps = 201
    attempt = run.open(cfg)
    assert (attempt.state, attempt.checkpoint) == ("resumed", run.checkpoints / "step=200.ckpt")


def test_torn_checkpoints_are_passed_over_with_a_warning(run: RunDirectory) -> None:
    whole = save(run, 100)
    torn, holed = save(run, 300), save(run, 200)
    size = torn.stat().st_size
    with torn.open("r+b") as file:
        file.truncate(size // 2)
    with holed.open("r+b") as file:
        file.write(bytes(64))
    (run.checkpoints / "step=400.ckpt").touch()
    (run.checkpoints / "step=last.ckpt").write_bytes(whole.read_bytes())  # no step in its name
    with pytest.warns(UserWarning, match="passed over") as warned:
        assert run.newest_checkpoint() == whole
    assert [re.search(r"step=\d+", str(entry.message))[0] for entry in warned] == [
        "step=400",
        "step=300",
        "step=200",
    ]


def test_a_file_is_torn_wherever_it_is_cut(run: RunDirectory, tmp_path: Path) -> None:
    content = save(run, 1).read_bytes()
    cut = tmp_path / "cut.ckpt"
    for length in (0, 1, 30, len(content) // 3, len(content) - 30, len(content) - 1):
        cut.write_bytes(content[:length])
        assert not is_whole(cut), length
    cut.write_bytes(content)
    assert is_whole(cut)
    assert not is_whole(tmp_path / "nowhere.ckpt")


def test_a_run_is_reloaded_as_it_was_trained(run: RunDirectory, cfg: DictConfig) -> None:
    same = load_run_config(run.path)
    assert same == OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert load_run_config(run.path, compose("evaluate", [f"run={run.path}"])) == same


def test_a_moved_run_knows_where_it_is(run: RunDirectory, tmp_path: Path) -> None:
    assert load_run_config(run.path.rename(tmp_path / "moved")).run == str(tmp_path / "moved")


def test_what_evaluation_sets_is_laid_over_the_run(run: RunDirectory) -> None:
    was = load_run_config(run.path)
    overrides = [f"run={run.path}", "sampler=euler", "++trainer.devices=2", "++backbone.resolution=64"]
    evaluate = compose("evaluate", overrides)
    now = load_run_config(run.path, evaluate)
    assert now.sampler == evaluate.sampler  # the whole node: another class
    assert now.sampler.scheduler != was.sampler.scheduler
    assert (now.trainer.devices, now.backbone.resolution) == (2, 64)
    assert (now.trainer.max_steps, now.data, now.backbone.patch) == (200, was.data, was.backbone.patch)
    assert "protocol" not in now
    assert load_run_config(run.path) == was


def test_keys_of_several_types_take_any_of_them(run: RunDirectory) -> None:
    override = {"sampler": {"size_ids": [512, 512, 0, 0, 512, 512]}, "trainer": {"devices": "auto"}}
    now = load_run_config(run.path, OmegaConf.create(override))
    assert (list(now.sampler.size_ids), now.trainer.devices) == ([512, 512, 0, 0, 512, 512], "auto")


def test_an_empty_node_replaces_and_null_is_as_the_run(run: RunDirectory) -> None:
    now = load_run_config(run.path, OmegaConf.create({"conditioning": {}, "seed": None, "sampler": {"steps": None}}))
    was = load_run_config(run.path)
    assert now.conditioning == {}
    assert (now.seed, now.sampler) == (was.seed, was.sampler)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"sampler": {"step": 20}}, "sampler.step=20: the run has no such key; did you mean sampler.steps?"),
        ({"sampler": {"steps": "many"}}, "sampler.steps=many: must be an integer, as the run's "),
        ({"trainer": 3}, "trainer=3: must be a node with keys of its own"),
    ],
)
def test_evaluation_cannot_set_what_the_run_does_not_have(run: RunDirectory, override: dict, message: str) -> None:
    with pytest.raises(RunError, match=re.escape(message)):
        load_run_config(run.path, OmegaConf.create(override))


def test_a_folder_without_a_run_is_refused_with_those_beside_it(run: RunDirectory) -> None:
    with pytest.raises(RunError, match=r"holds no run \(no config.yaml\); did you mean .*/run\? \(have: .*/run\)"):
        load_run_config(run.path.with_name("rum"))
    with pytest.raises(RunError, match="holds no run .*; train one"):
        load_run_config("nowhere/at/all")


@pytest.mark.parametrize("content", [b"", b"- 1\n- 2\n", b"a: [b\n", b"\x9b\xe6", b"[" * 2000 + b"]" * 2000, b"${"])
def test_a_broken_configuration_is_refused_in_one_line(run: RunDirectory, cfg: DictConfig, content: bytes) -> None:
    run.config_file.write_bytes(content)
    for opened in (lambda: load_run_config(run.path), lambda: run.inspect(cfg)):
        with pytest.raises(RunError, match=f"^run={re.escape(str(run.path))}: its config.yaml") as caught:
            opened()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"step": null}', "[" * 5000 + "]" * 5000])
def test_a_broken_note_of_the_end_is_refused_by_name(run: RunDirectory, cfg: DictConfig, content: str) -> None:
    run.finished_file.write_text(content)
    with pytest.raises(RunError, match="finished.json"):
        run.inspect(cfg)
