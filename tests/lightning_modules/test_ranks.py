"""Training on two and four processes: what one does at the same global batch, to rounding; resumed, bit for bit.

All runs of two processes are made in one start of them, and so are those of four.
"""

import json
import math
import shutil
import warnings

import pytest
import torch

from datamodules.shards import write_shards
from datamodules.sources.shapes import Shapes
from lightning_modules.schedules import learning_rate_factor
from loggers.metrics_csv import read_metrics
from runtime.build import build_data, build_trainer
from runtime.run_directory import RunDirectory
from tests.ranks import on_ranks

STEPS, FEW = 20, 6
SMALL = {
    "regions": (),
    "boxes": ("conditioning=boxes",),
    "scene_graph": (
        "conditioning=scene_graph",
        "conditioning.scene_graph.prompt=caption",
        "conditioning.scene_graph.width=16",
        "conditioning.scene_graph.hidden=16",
        "conditioning.scene_graph.layers=2",
    ),
}
RUN = (
    f"trainer.max_steps={STEPS}",
    "trainer.save_every=8",
    "trainer.keep=9",
    "logger=[csv]",
    "optimizer.warmup_steps=3",
    "optimizer.final_fraction=0.1",
    "data.window=2",
)
WATCHED = (
    "callback=[checkpoint,layout_score,pictures,gates]",
    "callback.layout_score.scenes=7",
    "callback.layout_score.at_once=2",
    "callback.pictures.scenes=3",
)
TWO = ("trainer.devices=2", "trainer.strategy=ddp")
FOUR = ("trainer.devices=4", "trainer.strategy=ddp")


@pytest.fixture(scope="module")
def runs(short, fit, poisoned, tmp_path_factory):
    """runs / name: the folder of a finished run; 1, 2 and 4 are its processes."""
    folder = tmp_path_factory.mktemp("runs")
    held_out = write_shards(Shapes(count=7, start=20_000_000), folder / "held_out")

    def settings(name, method="regions", *overrides):
        watched = WATCHED if method == "regions" else ("callback=[checkpoint]",)
        return short(
            folder / name,
            *SMALL[method],
            *RUN,
            *watched,
            f"data.validation_shards={held_out}",
            "data.make_validation=null",
            "trainer.validate_every=10",
            *overrides,
            without=["data.make_validation", "callback", *(["conditioning"] if method != "regions" else [])],
        )

    def accumulated(name, *overrides, parts=4):
        """A short run whose steps have some micro-batches."""
        few = (f"trainer.max_steps={FEW}", "trainer.save_every=4", "trainer.validate_every=99")
        return settings(name, "regions", *few, f"trainer.accumulate={parts}", *overrides)

    def broken_off(name, origin):
        """A copy of a run as a kill after its step 8 leaves it."""
        shutil.copytree(folder / origin, folder / name)
        (folder / name / "finished.json").unlink()
        for checkpoint in (folder / name / "checkpoints").glob("step=*.ckpt"):
            if checkpoint.stem != "step=8":
                checkpoint.unlink()

    def nonfinite(name, *overrides):
        cfg, module, _ = poisoned(folder / name, "trainer.max_nonfinite=1", "callback=[checkpoint]", *overrides)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build_trainer(cfg).fit(module, datamodule=build_data(cfg))

    def drawn(name, *overrides):
        """Of the same weights in all: nothing is learnt."""
        start = (
            "optimizer.learning_rate=0",
            "optimizer.warmup_steps=0",
            "trainer.max_steps=1",
            f"start_from={folder / '1-regions'}",
        )
        cfg = settings(name, "regions", *start, "trainer.validate_every=1", *overrides)
        cfg.callback.layout_score.metric._target_ = "tests.ranks.Brightness"
        fit(cfg)

    for method in SMALL:
        fit(settings(f"1-{method}", method))
    drawn("1-drawn")
    fit(accumulated("1-accumulated"))
    broken_off("1-to-2", "1-regions")
    nonfinite("1-nonfinite")

    def both(rank):
        for method in SMALL:
            fit(settings(f"2-{method}", method, *TWO))
        fit(accumulated("2-accumulated", *TWO))
        torch.distributed.barrier()
        if rank == 0:
            broken_off("2-to-2", "2-regions")
        torch.distributed.barrier()
        fit(settings("2-to-2", "regions", *TWO, "data.workers=1"))
        fit(settings("1-to-2", "regions", *TWO))
        nonfinite("2-nonfinite", *TWO)
        drawn("2-drawn", *TWO)

    def all_four(rank):
        fit(accumulated("4-whole", *FOUR, parts=1))
        fit(accumulated("4-accumulated", *FOUR, "batch_size=16"))

    on_ranks(both)
    on_ranks(all_four, 4)
    broken_off("2-to-1", "2-regions")
    fit(settings("2-to-1"))
    return folder


def logged(folder, name):
    return {step: value for step, metric, value in read_metrics(folder / "metrics.csv") if metric == name}


def stored(folder, step=STEPS):
    return torch.load(RunDirectory(folder).checkpoints / f"step={step}.ckpt", weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


PAIRS = [
    *((f"1-{method}", f"2-{method}", STEPS) for method in SMALL),
    ("1-accumulated", "2-accumulated", FEW),
    ("1-accumulated", "4-whole", FEW),
]


@pytest.mark.parametrize(("one", "two", "steps"), PAIRS)
def test_losses_are_those_of_one_process_at_the_same_global_batch(runs, one, two, steps):
    one, two = (logged(runs / name, "train/loss") for name in (one, two))
    assert list(one) == list(two) == list(range(steps))
    assert two == pytest.approx(one, abs=1e-5)
    assert len(set(one.values())) == steps


def test_the_loss_of_accumulated_steps_is_the_mean_over_all_of_them(runs):
    whole, parts = (logged(runs / name, "train/loss") for name in ("1-regions", "1-accumulated"))
    assert parts[0] == pytest.approx(whole[0], abs=1e-5)  # later ones follow a schedule of fewer steps


@pytest.mark.parametrize("name", ["gradient_norm", "validation/loss"])
def test_so_are_the_gradient_and_the_mean_over_held_out_scenes(runs, name):
    one, two = (logged(runs / name_, name) for name_ in ("1-regions", "2-regions"))
    assert one.keys() == two.keys()
    assert len(one) == (2 if name == "validation/loss" else STEPS)
    assert two == pytest.approx(one, rel=1e-4)


def test_pictures_and_scores_that_ranks_share_are_exactly_those_of_one_process(runs):
    one, two = runs / "1-drawn", runs / "2-drawn"
    assert logged(one, "layout/brightness") == logged(two, "layout/brightness")
    assert logged(one, "layout/brightness").keys() == {1}
    [sheet] = (one / "pictures").iterdir()
    assert (two / "pictures" / sheet.name).read_bytes() == sheet.read_bytes()


ENDS = [
    *(("regions", processes, 8, STEPS) for processes in (1, 2)),
    *(("accumulated", processes, 4, FEW) for processes in (1, 2, 4)),
    ("whole", 4, 4, FEW),
]


@pytest.mark.parametrize(("run", "processes", "middle", "steps"), ENDS)
def test_the_learning_rate_ends_where_the_schedule_says(runs, run, processes, middle, steps):
    factor = learning_rate_factor(steps=steps, schedule="cosine", warmup_steps=3, final_fraction=0.1)
    for step in (middle, steps):
        [schedule] = stored(runs / f"{processes}-{run}", step)["lr_schedulers"]
        assert schedule["last_epoch"] == step
        assert schedule["_last_lr"] == [pytest.approx(1e-3 * factor(step))]
    assert schedule["_last_lr"] == [pytest.approx(1e-4)]


def test_two_processes_go_on_bit_for_bit(runs):
    whole, resumed = runs / "2-regions", runs / "2-to-2"
    assert read_metrics(resumed / "metrics.csv") == read_metrics(whole / "metrics.csv")
    ends = [stored(folder) for folder in (whole, resumed)]
    assert equal(*(end["state_dict"] for end in ends))
    moments = [end["optimizer_states"][0]["state"] for end in ends]
    assert moments[0].keys() == moments[1].keys()
    assert all(equal(moments[0][key], moments[1][key]) for key in moments[0])


@pytest.mark.parametrize(("resumed", "origin"), [("1-to-2", "1-regions"), ("2-to-1", "2-regions")])
def test_a_run_goes_on_with_another_number_of_processes(runs, resumed, origin):
    assert logged(runs / resumed, "train/loss") == pytest.approx(logged(runs / origin, "train/loss"), abs=1e-5)
    assert stored(runs / resumed)["SceneDataModule"] == stored(runs / origin)["SceneDataModule"]


def test_what_is_not_finite_on_one_rank_leaves_the_step_out_on_both(runs):
    files = (runs / f"{n}-nonfinite" / "nonfinite.jsonl" for n in (1, 2))
    one, two = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(one) == 1
    assert [line | {"rank": 0} for line in two] == one
    assert two[0]["rank"] == two[0]["position"] % 8 // 4
    ends = [stored(runs / f"{n}-nonfinite", 2) for n in (1, 2)]
    for key, value in ends[0]["state_dict"].items():
        assert value.isfinite().all()
        torch.testing.assert_close(ends[1]["state_dict"][key], value, atol=1e-5, rtol=1e-5)
    losses = [logged(runs / f"{n}-nonfinite", "train/loss") for n in (1, 2)]
    assert [math.isnan(losses[0][step]) for step in (0, 1)] == [math.isnan(losses[1][step]) for step in (0, 1)]


def test_the_ranks_end_with_the_same_weights_and_one_log(runs):
    steps = [step for step, name, _ in read_metrics(runs / "2-regions" / "metrics.csv") if name == "train/loss"]
    assert steps == list(range(STEPS))
