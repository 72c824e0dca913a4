"""A command line: what runs, what is refused in one line, what is written to the working directory."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig

from runtime.command import TRACEBACK, command, explanation

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import atexit, sys
from runtime.command import command

def main(cfg):
    print("ran", cfg.name, cfg.trainer.max_steps)

if __name__ == "__main__":
    atexit.register(lambda: print("torch" in sys.modules))
    command("train", main)
"""

Call = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs a command in this process; gives its status and the lines of its output and errors."""

    def run(*arguments: str, config: str = "sample", main: Callable[[DictConfig], None] = lambda cfg: None):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", [f"{config}.py", *arguments])
        status = 0
        try:
            command(config, main)
        except SystemExit as end:
            status = int(end.code or 0)
        written = capsys.readouterr()
        return status, written.out.splitlines(), written.err.splitlines()

    return run


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_script_refuses_a_misspelt_key_before_torch_is_loaded(tmp_path: Path) -> None:
    done = script(tmp_path, "trainer.max_stepz=5")
    assert done.returncode == 2
    assert done.stderr == "train.py: trainer.max_stepz=5: no such key; did you mean trainer.max_steps?\n"
    assert done.stdout == "False\n"


def test_a_script_runs_and_hydra_writes_nothing(tmp_path: Path) -> None:
    done = script(tmp_path, "trainer.max_steps=5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran shapes_regions 5\nFalse\n", "")
    assert [path.name for path in tmp_path.rglob("*")] == ["train.py"]


def test_a_sweep_runs_every_job_and_writes_beside_the_runs(call: Call, tmp_path: Path) -> None:
    seen = []
    status, _, errors = call("-m", "run=r", "scene=a.json,b.json", main=lambda cfg: seen.append(cfg.scene))
    assert (status, seen, errors) == (0, ["a.json", "b.json"], [])
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [Path("runs/.multirun/multirun.yaml")]


def test_settings_of_a_method_that_is_not_chosen_are_left_out_with_a_line(call: Call) -> None:
    seen = []
    sweep = ("-m", "conditioning=none,regions", "run='runs/${seed}'")
    status, out, errors = call(*sweep, config="train", main=lambda cfg: seen.append(list(cfg.conditioning)))
    assert (status, seen, errors) == (0, [[], ["regions"]], [])
    assert out == ["conditioning=[]: what the experiment sets for conditioning.regions is left out"]


def test_a_sweep_with_a_wrong_value_starts_no_job(call: Call) -> None:
    seen = []
    status, _, errors = call("-m", "run=r", "scene=a.json", "seeds=[0],x", main=seen.append)
    assert (status, seen, len(errors)) == (2, [], 1)
    assert errors[0].startswith("sample.py: seeds=x: ")


def test_a_sweep_checks_each_combination_when_its_turn_comes(call: Call) -> None:
    # One by one the values go with the first of the other override; only the last of the jobs cannot be.
    seen = []
    sweep = ("-m", "shards=a,null", "task=convert,check", "source=shapes", "out=b")
    status, _, errors = call(*sweep, config="prepare", main=lambda cfg: seen.append(cfg.task))
    assert (status, seen) == (2, ["convert", "check", "convert"])
    assert errors[-1].startswith("prepare.py: shards: task=check reads shards")


def test_help_and_the_configuration_are_shown_without_running(call: Call) -> None:
    def never(cfg: DictConfig) -> None:
        raise AssertionError

    status, out, errors = call("--help", main=never)
    assert (status, errors) == (0, [])
    assert out[0].startswith("python sample.py run=DIR|weights=FILE scene=FILE")
    assert any(re.match(r"experiment: .*shapes_regions", line) for line in out)
    status, out, errors = call("--cfg", "job", "out=a.png", main=never)
    assert (status, errors) == (0, [])
    assert {"out: a.png", "run: null"} <= set(out)  # what it lacks is no mistake here
    status, _, errors = call("--cfg", "job", "sampler=dimm", main=never)
    assert (status, len(errors)) == (2, 1)


def test_an_override_below_a_null_key_of_evaluate_is_kept_for_the_run_to_check(call: Call) -> None:
    seen = []
    status, _, errors = call("run=runs/a", "sampler.steps=20", config="evaluate", main=seen.append)
    assert (status, errors) == (0, [])
    assert seen[0].sampler == {"steps": 20}
    assert seen[0].backbone is None


def fail(error: Exception) -> Callable[[DictConfig], None]:
    def main(cfg: DictConfig) -> None:
        raise error

    return main


def test_a_mistake_found_while_running_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, errors = call(
        "run=r", "scene=a", main=fail(ValueError("scene.json: box: outside\n  the picture; clip it"))
    )
    assert (status, errors) == (2, ["sample.py: scene.json: box: outside the picture; clip it"])
    monkeypatch.setenv(TRACEBACK, "1")
    status, _, errors = call("run=r", "scene=a", main=fail(ValueError("no")))
    assert (status, errors[0], errors[-1]) == (2, "Traceback (most recent call last):", "sample.py: no")


def test_a_defect_keeps_its_traceback_from_the_job_on(call: Call) -> None:
    with pytest.raises(KeyError) as caught:
        call("run=r", "scene=a", main=fail(KeyError("defect")))
    names = [entry.name for entry in caught.traceback]
    assert names[-1] == "main"
    assert not {"run_job", "_run_hydra"} & set(names)


def raised(run: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (which one it is, is what the tests below look at)
        run()
    return caught.value


def test_which_errors_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    missing = tmp_path / "nope"
    assert explanation(raised(missing.read_text)) == f"{missing}: No such file or directory"
    assert explanation(raised(lambda: fail(ValueError("a"))(DictConfig({})))) == "a"
    assert explanation(raised(lambda: re.compile("("))) is None
    assert explanation(raised(lambda: fail(TypeError("a"))(DictConfig({})))) is None


def test_a_mistake_behind_an_instantiation_counts_as_itself(tmp_path: Path) -> None:
    ours = {"_target_": "runtime.run_directory.load_run_config", "run": str(tmp_path / "none")}
    assert (explanation(raised(lambda: instantiate(ours))) or "").endswith("train one: python train.py run=DIR")
    assert explanation(raised(lambda: instantiate({"_target_": "fractions.Fraction", "numerator": "x"}))) is None
    assert explanation(raised(lambda: instantiate({"_target_": "fractions.Nope"}))) is None


def test_a_task_chooses_its_stage_in_a_sweep_too(call: Call) -> None:
    seen = []
    words = ("task=filter", "shards=a", "out=b,c", "stage.scenes.min_objects=2")
    for arguments in (("-m", *words), (*words, "-m")):
        status, _, errors = call(
            *arguments, config="prepare", main=lambda cfg: seen.append((cfg.out, cfg.stage.scenes.min_objects))
        )
        assert (status, errors) == (0, [])
    assert seen == [("b", 2), ("c", 2)] * 2
    call("task=stats", "shards=a", "out=b", config="prepare", main=lambda cfg: seen.append(cfg.stage))
    assert seen[-1] is None


def test_every_launcher_composes_with_a_task(call: Call) -> None:
    for launcher in ("submitit_local", "submitit_slurm"):
        words = (
            f"hydra/launcher={launcher}",
            "hydra.launcher.tasks_per_node=2",
            "task=filter",
            "shards=a",
            "out=b",
        )
        status, out, errors = call(*words, "--cfg", "hydra", config="prepare", main=lambda cfg: None)
        assert (status, errors) == (0, [])
        assert "    tasks_per_node: 2" in out
