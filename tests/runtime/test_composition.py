"""Composing the project's own configs, and refusing what is wrong with them."""

import itertools
import re
from pathlib import Path

import pytest

from conf.schema import Drops
from runtime.composition import CONF, compose, compose_sweep
from runtime.overrides import ConfigError

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SINGLE = ("backbone", "data", "objective", "optimizer", "sampler", "trainer")
LISTS = ("callback", "logger")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_under_its_own_name(experiment: str) -> None:
    cfg = compose("train", [f"experiment={experiment}"])
    assert cfg.name == experiment
    assert cfg.run == f"runs/{experiment}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_says_how_it_is_run_and_what_to_expect(experiment: str) -> None:
    header = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").partition("defaults:")[0]
    for word in ("command", "hardware", "time", "expected"):
        assert re.search(rf"^#\s+{word}\s+\S", header, re.MULTILINE), word


def test_every_option_of_every_group_composes() -> None:
    whole = [f"{group}=[{','.join(options(group))}]" for group in LISTS]
    rows = itertools.zip_longest(*([f"{group}={option}" for option in options(group)] for group in SINGLE))
    for row in rows:
        given = (
            ["data.shards=[DIR1,DIR2]", "data.weights=[1,2]"] if "data=mixture" in row else []
        )  # which it has no default for
        compose("train", [*whole, *(choice for choice in row if choice), *given])


def test_python_train_alone_is_the_demo() -> None:
    cfg = compose("train")
    assert cfg.name == "shapes_regions"
    assert list(cfg.conditioning) == ["regions"]
    assert cfg.seed == 0
    assert isinstance(cfg.plan, bool)
    assert cfg._metadata.object_type.__name__ == "Train"
    assert cfg.drops._metadata.object_type is Drops


def test_conditioning_is_a_list_of_which_one_or_none_may_be_named() -> None:
    assert list(compose("train", ["conditioning=regions"]).conditioning) == ["regions"]
    assert compose("train", ["experiment=shapes_base", "conditioning=none"]).conditioning == {}


@pytest.mark.parametrize("choice", ["conditioning=none", "conditioning=[]"])
def test_what_an_experiment_sets_for_a_method_that_is_not_chosen_is_left_out(choice: str) -> None:
    assert compose("train", ["experiment=shapes_regions"]).conditioning.regions.place_width > 0
    cfg = compose("train", ["experiment=shapes_regions", choice])
    assert cfg.conditioning == {}
    assert cfg.name == "shapes_regions"


def test_the_same_goes_for_callbacks_and_loggers_and_for_them_alone(tmp_path: Path) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\nname: mine\ncallback: {gates: {every: 7}}\nlogger: {csv: {file: a.csv}}\n")
    whole = compose("train", ["experiment=mine"], config_dir=str(tmp_path))
    assert (whole.callback.gates.every, whole.logger.csv.file) == (7, "a.csv")
    cfg = compose("train", ["experiment=mine", "callback=[progress]", "logger=[]"], config_dir=str(tmp_path))
    assert (list(cfg.callback), list(cfg.logger)) == (["progress"], [])


def test_a_key_of_a_method_that_is_not_chosen_is_refused_when_it_is_typed() -> None:
    with pytest.raises(ConfigError, match=r"^conditioning\.regions\.place_width=5: regions is not chosen; add it to"):
        compose("train", ["experiment=shapes_regions", "conditioning=none", "conditioning.regions.place_width=5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_stepz=5", "trainer.max_stepz=5: no such key; did you mean trainer.max_steps?"),
        ("traner.max_steps=5", "traner.max_steps=5: no such key; did you mean trainer.max_steps?"),
        ("trainer.max_steps=abc", "trainer.max_steps=abc: must be an integer"),
        ("backbone=nope", f"backbone=nope: no such backbone (have: {', '.join(options('backbone'))})"),
        (
            "conditioning=[regions,regionz]",
            "conditioning=regionz: no such conditioning; did you mean regions?",
        ),
        ("experiment=shapes_regionz", "no such experiment; did you mean shapes_regions? (have: "),
        ("data.worker=3", "data.worker=3: no such key; did you mean data.workers?"),
        ("data.workers=many", "data.workers=many: must be an integer, got 'many'"),
        ("+objective.gama=3", "+objective.gama=3: no such key; "),
        ("trainer=4", "trainer=4: no such trainer (have: "),
        ("seed=1,2", "seed=1,2: several values; sweep over them with -m"),
        ("shapes_regions", "shapes_regions: not of the form key=value"),
        ("drops.keep=0.9", "drops: the rates must sum to 1"),
        ("data.window=0", "data.window=0: must be at least 1"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        compose("train", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("data=shapes", "protocol.shards=DIR"),
        ("data.shards=DIR", "protocol.shards=DIR"),
        ("++data.workers=1", "protocol.shards=DIR"),
        ("objective=v", "leave it out"),
        ("optimizer=adamw", "leave it out"),
        ("drops.keep=1", "leave it out"),
        ("ema.enabled=false", "averaged weights"),
        ("seed=3", "protocol.seeds=[N]"),
        ("batch_size=4", "protocol.batch_size=N"),
    ],
)
def test_what_only_training_reads_is_refused_in_an_evaluation(override: str, way_out: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^{re.escape(override)}: the run owns it and only training reads it; "
    ) as caught:
        compose("evaluate", ["run=r", override])
    assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainer: {max_stepz: 3}", "experiment/mine.yaml: trainer.max_stepz: no such key; did you mean"),
        ("trainer: {max_steps: abc}", "experiment/mine.yaml: trainer.max_steps: must be an integer"),
        ("data: {worker: 3}", "experiment/mine.yaml: data.worker: no such key; did you mean data.workers?"),
        ("conditioning: {boxez: {slots: 3}}", "experiment/mine.yaml: conditioning.boxez: no such key"),
        (
            "defaults: [override /backbon: shapes]",
            "mine.yaml: override /backbon: no such group; did you mean backbone?",
        ),
        ("trainer: [", "mine.yaml"),
    ],
)
def test_a_wrong_key_in_an_experiment_is_refused_with_its_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(f"# @package _global_\nname: mine\n{content}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        compose("train", ["experiment=mine"], config_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.learning_rate=nan",
        "optimizer.betas=[0.9,inf]",
        "ema.decay=nan",
        "sampler.guidance=-inf",
        "data.cache_bytes=inf",
        "conditioning.regions.attention_weight_scale=nan",
        "conditioning.regions.width=-3",
        "callback.pictures.scenes=-1",
        "batch_size=99999999999999999999",
        "seed=-9223372036854775808",
    ],
)
def test_numbers_that_are_none_or_negative_are_refused_by_name(setting: str) -> None:
    key, value = setting.split("=")
    with pytest.raises(ValueError, match=f"^{re.escape(key)}.*{re.escape(value.strip('[]').split(',')[-1])}"):
        compose("train", [setting])


def test_an_incomplete_configuration_can_be_shown() -> None:
    compose("evaluate", complete=False)
    with pytest.raises(ValueError, match="run, weights, images: none given"):
        compose("evaluate")


def test_an_added_folder_must_be_there() -> None:
    with pytest.raises(ConfigError, match="--config-dir nowhere: no such folder"):
        compose("train", config_dir="nowhere")


def test_every_value_of_a_sweep_is_checked_before_the_first_job() -> None:
    compose_sweep("train", ["seed=range(1,3)", "optimizer.learning_rate=interval(0.1,0.2)"])
    with pytest.raises(ConfigError, match="^seed=x: must be an integer$"):
        compose_sweep("train", ["seed=1,x"])
