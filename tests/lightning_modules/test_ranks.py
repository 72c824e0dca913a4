"""Training on two and four processes: what one does at the same global batch, to rounding; resumed, bit for bit.

All runs of two processes are made in one start of them, and so are those of four.
"""

import json
import math
import warnings

import pytest
import torch

from datamodules.shards import write_shards
from datamodules.sources.shapes import Shapes
from lightning_modules.schedules import learning_rate_factor
from loggers.metrics_csv import read_metrics
from runtime.build import build_data, build_trainer
from tests.ranks import on_ranks
from tests.run_files import broken_off, equal, equal_moments, logged, steps_of, stored

STEPS, FEW = 20, 6
GRAPH = ("prompt=caption", "width=16", "hidden=16", "layers=2")
SMALL = {
    "regions": (),
    "boxes": ("conditioning=boxes",),
    "scene_graph": ("conditioning=scene_graph", *(f"conditioning.scene_graph.{setting}" for setting in GRAPH)),
}
RUN = ("trainer.save_every=8", "trainer.keep=9", "trainer.validate_every=10", "logger=[csv]", "data.window=2")
SCHEDULE = ("optimizer.warmup_steps=3", "optimizer.final_fraction=0.1", f"trainer.max_steps={STEPS}")
SCORED = ("callback.layout_score.scenes=7", "callback.layout_score.at_once=2", "callback.pictures.scenes=3")
WATCHED = ("callback=[checkpoint,layout_score,pictures,gates]", *SCORED)
TWO = ("trainer.devices=2", "trainer.strategy=ddp")
FOUR = ("trainer.devices=4", "trainer.strategy=ddp")


@pytest.fixture(scope="module")
def runs(short, fit, poisoned, tmp_path_factory):
    """runs / name: the folder of a finished run; 1, 2 and 4 are its processes."""
    folder = tmp_path_factory.mktemp("runs")
    held_out = write_shards(Shapes(count=7, start=20_000_000), folder / "held_out")
    data = (f"data.validation_shards={held_out}", "data.make_validation=null")

    def settings(name, method="regions", *overrides):
        watched, own = (WATCHED, ()) if method == "regions" else (("callback=[checkpoint]",), ("conditioning",))
        given = (*SMALL[method], *RUN, *SCHEDULE, *watched, *data, *overrides)
        return short(folder / name, *given, without=["data.make_validation", "callback", *own])

    def accumulated(name, *overrides, parts=4):
        """A short run whose steps have some micro-batches."""
        few = (f"trainer.max_steps={FEW}", "trainer.save_every=4", "trainer.validate_every=99")
        return settings(name, "regions", *few, f"trainer.accumulate={parts}", *overrides)

    def nonfinite(name, *overrides):
        cfg, module, _ = poisoned(folder / name, "trainer.max_nonfinite=1", "callback=[checkpoint]", *overrides)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build_trainer(cfg).fit(module, datamodule=build_data(cfg))

    def drawn(name, *overrides):
        """Of the same weights in all: nothing is learnt."""
        once = ("trainer.max_steps=1", "trainer.validate_every=1", f"start_from={folder / '1-regions'}")
        cfg = settings(name, "regions", "optimizer.learning_rate=0", "optimizer.warmup_steps=0", *once, *overrides)
        cfg.callback.layout_score.metric._target_ = "tests.ranks.Brightness"
        fit(cfg)

    for method in SMALL:
        fit(settings(f"1-{method}", method))
    drawn("1-drawn")
    fit(accumulated("1-accumulated"))
    broken_off(folder / "1-regions", folder / "1-to-2", 8)
    nonfinite("1-nonfinite")

    def both(rank):
        for method in SMALL:
            fit(settings(f"2-{method}", method, *TWO))
        fit(accumulated("2-accumulated", *TWO))
        torch.distributed.barrier()
        if rank == 0:
            broken_off(folder / "2-regions", folder / "2-to-2", 8)
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
    broken_off(folder / "2-regions", folder / "2-to-1", 8)
    fit(settings("2-to-1"))
    return folder


PAIRS = [
    *((f"1-{method}", f"2-{method}", STEPS) for method in SMALL),
    ("1-accumulated", "2-accumulated", FEW),
    ("1-accumulated", "4-whole", FEW),
]


@pytest.mark.parametrize(("one", "two", "steps"), PAIRS)
def test_losses_are_those_of_one_process_at_the_same_global_batch(runs, one, two, steps):
    one, two = (dict(logged(runs / name, "train/loss")) for name in (one, two))
    assert list(one) == list(two) == list(range(steps))
    assert two == pytest.approx(one, abs=1e-5)
    assert len(set(one.values())) == steps


def test_the_loss_of_accumulated_steps_is_the_mean_over_all_of_them(runs):
    (_, whole), (_, parts) = (logged(runs / name, "train/loss")[0] for name in ("1-regions", "1-accumulated"))
    assert parts == pytest.approx(whole, abs=1e-5)  # later ones follow a schedule of fewer steps


@pytest.mark.parametrize(("name", "count"), [("gradient_norm", STEPS), ("validation/loss", 2)])
def test_so_are_the_gradient_and_the_mean_over_held_out_scenes(runs, name, count):
    one, two = (dict(logged(runs / run, name)) for run in ("1-regions", "2-regions"))
    assert one.keys() == two.keys()
    assert len(one) == count
    assert two == pytest.approx(one, rel=1e-4)


def test_pictures_and_scores_that_ranks_share_are_exactly_those_of_one_process(runs):
    one, two = runs / "1-drawn", runs / "2-drawn"
    assert logged(one, "layout/brightness") == logged(two, "layout/brightness")
    assert steps_of(one, "layout/brightness") == [1]
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
    assert steps_of(whole, "train/loss") == list(range(STEPS))  # one log, though two ranks log
    ends = [stored(folder, STEPS) for folder in (whole, resumed)]
    assert equal(*(end["state_dict"] for end in ends))
    assert equal_moments(*ends)


@pytest.mark.parametrize(("resumed", "origin"), [("1-to-2", "1-regions"), ("2-to-1", "2-regions")])
def test_a_run_goes_on_with_another_number_of_processes(runs, resumed, origin):
    own, whole = (dict(logged(runs / name, "train/loss")) for name in (resumed, origin))
    assert own == pytest.approx(whole, abs=1e-5)
    own, whole = (stored(runs / name, STEPS)["SceneDataModule"] for name in (resumed, origin))
    assert own == whole


def test_what_is_not_finite_on_one_rank_leaves_the_step_out_on_both(runs):
    folders = [runs / f"{count}-nonfinite" for count in (1, 2)]
    one, two = ([json.loads(line) for line in (f / "nonfinite.jsonl").read_text().splitlines()] for f in folders)
    assert len(one) == 1
    assert [line | {"rank": 0} for line in two] == one
    assert two[0]["rank"] == two[0]["position"] % 8 // 4
    ends = [stored(folder, 2)["state_dict"] for folder in folders]
    for key, value in ends[0].items():
        assert value.isfinite().all()
        torch.testing.assert_close(ends[1][key], value, atol=1e-5, rtol=1e-5)
    steps = [[math.isnan(loss) for step, loss in logged(folder, "train/loss") if step < 2] for folder in folders]
    assert len(steps[0]) == 2
    assert steps[0] == steps[1]
