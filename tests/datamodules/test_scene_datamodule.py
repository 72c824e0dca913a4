"""The data module under real Trainers: a resumed run sees what an unbroken one sees, whatever broke it."""

import contextlib
import functools
import logging
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy

from datamodules.batch import Batch
from datamodules.order import SampleOrder
from datamodules.resume import ResumeWholeSteps, align_to_step
from datamodules.scene_datamodule import SceneDataModule
from datamodules.shards import ShardError, ShardSet, has_shards, write_shards
from datamodules.sources.base import Source
from scenes.scene import Frame, Scene, SceneObject
from tests.ranks import free_port

# Lightning says this of every run that goes on in its own folder.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")

BATCH = 12
STEPS = 7


class Squares(Source):
    """Grey pictures of 8 px, number n of brightness n; one object a scene."""

    provides = frozenset({"image", "caption", "boxes", "phrases"})
    image_format = "png"

    def __init__(self, count=29, size=(8, 8)):
        self.count = count
        self.size = size

    def __len__(self):
        return self.count

    def __iter__(self):
        height, width = self.size
        for number in range(self.count):
            thing = SceneObject(phrase="square", box=(0.0, 0.25, 0.25, 0.5))
            frame = Frame(original=(height, width))
            yield (
                Scene(id=str(number), objects=(thing,), frame=frame),
                Image.new("RGB", (width, height), (number,) * 3),
            )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """29 samples in 6 shards: 7 steps of 12 are nearly three epochs, and no batch ends with an epoch."""
    return str(write_shards(Squares(), tmp_path_factory.mktemp("squares") / "train", shard_size=5))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return str(write_shards(Squares(11), tmp_path_factory.mktemp("squares") / "held_out", shard_size=4))


class Recorder(pl.LightningModule):
    """One weight, trained on the brightness of pictures; keeps what comes."""

    def __init__(self, *, stop_after=None, ask_for_steps=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.micro_batches = []
        self.validated = []
        self.steps = []
        self.stop_after = stop_after
        self.ask_for_steps = ask_for_steps

    def training_step(self, batch, batch_index):
        assert isinstance(batch, Batch)
        self.micro_batches.append(batch.positions.tolist())
        self.steps.append((self.trainer.global_step, batch_index))
        return (self.weight - batch.images.float().mean()) ** 2

    def validation_step(self, batch, batch_index):
        self.validated.append((self.trainer.global_step, [scene.id for scene in batch.scenes]))

    def on_train_batch_end(self, outputs, batch, batch_index):
        if self.stop_after is not None and len(self.micro_batches) == self.stop_after:
            self.trainer.save_checkpoint(os.path.join(self.trainer.default_root_dir, "stopped.ckpt"))
            raise KeyboardInterrupt

    def configure_optimizers(self):
        if self.ask_for_steps:
            assert self.trainer.estimated_stepping_batches == self.trainer.max_steps
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(root, data, *, module=None, resume=None, max_steps=STEPS, accumulate=1, callbacks=(), **options):
    """Fit a Recorder and give it back."""
    module = module or Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ResumeWholeSteps(), *callbacks],
        num_sanity_val_steps=0,
        **options,
    )
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False if resume else None)
    module.trainer_step = trainer.global_step
    return module


def data_of(shards, *, accumulate=1, workers=0, **options):
    options = {"resolution": 8, "batch_size": BATCH, "seed": 4, "window": 2, **options}
    return SceneDataModule(shards, accumulate=accumulate, workers=workers, **options)


def every_steps(root, steps):
    return ModelCheckpoint(dirpath=root, filename="{step}", every_n_train_steps=steps, save_top_k=-1)


def consecutive(first_batch=0, last_batch=STEPS):
    return list(range(first_batch * BATCH, last_batch * BATCH))


def flat(micro_batches):
    return [position for positions in micro_batches for position in positions]


@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (3, 0), (1, 2), (3, 2)])
def test_a_resumed_run_sees_what_an_unbroken_one_sees(tmp_path, shards, accumulate, workers):
    options = {"accumulate": accumulate, "workers": workers}
    whole = train(tmp_path / "whole", data_of(shards, **options), accumulate=accumulate)
    assert flat(whole.micro_batches) == consecutive()
    assert {len(positions) for positions in whole.micro_batches} == {BATCH // accumulate}

    resume = tmp_path / "step=3.ckpt"
    options = {"accumulate": accumulate, "callbacks": [every_steps(tmp_path, 3)]}
    data = functools.partial(data_of, shards, accumulate=accumulate, workers=workers)
    first = train(tmp_path, data(), max_steps=4, **options)
    second = train(tmp_path, data(), resume=resume, **options)
    assert first.micro_batches == whole.micro_batches[: 4 * accumulate]
    assert second.micro_batches == whole.micro_batches[3 * accumulate :]
    assert second.steps == whole.steps[3 * accumulate :]
    assert second.weight.item() == whole.weight.item()


@pytest.mark.parametrize(("accumulate", "stop_after"), [(1, 3), (3, 1), (3, 7), (3, 8), (3, 9), (3, 20)])
def test_a_run_stopped_anywhere_goes_on_from_the_last_whole_step(tmp_path, shards, accumulate, stop_after):
    whole = train(tmp_path / "whole", data_of(shards, accumulate=accumulate), accumulate=accumulate)
    stopped = Recorder(stop_after=stop_after)
    train(tmp_path, data_of(shards, accumulate=accumulate), accumulate=accumulate, module=stopped)
    done = stop_after // accumulate
    second = train(
        tmp_path,
        data_of(shards, accumulate=accumulate),
        accumulate=accumulate,
        resume=tmp_path / "stopped.ckpt",
    )
    assert second.micro_batches == whole.micro_batches[done * accumulate :]
    assert second.steps == whole.steps[done * accumulate :]
    assert second.weight.item() == whole.weight.item()


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 2)])
def test_a_run_goes_on_with_another_accumulation(tmp_path, shards, before, after):
    stopped = Recorder(stop_after=3 * before)
    train(tmp_path, data_of(shards, accumulate=before), accumulate=before, module=stopped)
    checkpoint = tmp_path / "stopped.ckpt"
    second = train(tmp_path, data_of(shards, accumulate=after), accumulate=after, resume=checkpoint)
    assert flat(stopped.micro_batches) == consecutive(0, 3)
    assert flat(second.micro_batches) == consecutive(3)
    assert second.steps == [(step, step * after + part) for step in range(3, STEPS) for part in range(after)]


@pytest.mark.parametrize("workers", [0, 2])
def test_asking_for_the_number_of_steps_before_the_restore_changes_nothing(tmp_path, shards, workers):
    # Lightning then makes the loader and its iterator before it knows the step; its own loader states are
    # lost so.
    asking = functools.partial(Recorder, ask_for_steps=True)
    options = {"max_epochs": 1, "callbacks": [every_steps(tmp_path, 3)]}
    train(tmp_path, data_of(shards), module=asking(), **{**options, "max_steps": 4})
    resume = tmp_path / "step=3.ckpt"
    second = train(tmp_path, data_of(shards, workers=workers), module=asking(), resume=resume, **options)
    assert flat(second.micro_batches) == consecutive(3)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("last", ["step", "train_end", "validation"])
def test_a_finished_run_can_be_made_longer(tmp_path, shards, held_out, accumulate, last):
    class AtTheEnd(Callback):
        def on_train_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    data = functools.partial(data_of, shards, accumulate=accumulate, validation_shards=held_out)
    validate = {"val_check_interval": 2 * accumulate, "check_val_every_n_epoch": None}
    every = {"validation": {"save_on_train_epoch_end": False}, "step": {"every_n_train_steps": 4}}

    def run(**options):
        keep = AtTheEnd() if last == "train_end" else ModelCheckpoint(tmp_path, "last", **every[last])
        return train(tmp_path, data(), accumulate=accumulate, callbacks=[keep], **options, **validate)

    run(max_steps=4)
    four = (tmp_path / "last.ckpt").rename(tmp_path / "four.ckpt")
    second = run(resume=four)
    assert flat(second.micro_batches) == consecutive(4)
    assert second.trainer_step == STEPS
    # a checkpoint that was taken before the validation of its step does not know that it came to its end
    assert {step for step, _ in second.validated} == ({4, 6} if last == "step" else {6})

    run(resume=four, module=Recorder(stop_after=accumulate + accumulate // 2))
    third = run(resume=tmp_path / "stopped.ckpt")
    assert flat(third.micro_batches) == consecutive(5)
    assert third.trainer_step == STEPS
    assert {step for step, _ in third.validated} == {6}


def test_a_finished_run_stays_finished(tmp_path, shards):
    options = {"callbacks": [every_steps(tmp_path, STEPS)]}
    train(tmp_path, data_of(shards), **options)
    resume = tmp_path / f"step={STEPS}.ckpt"
    assert train(tmp_path, data_of(shards), resume=resume, **options).micro_batches == []


def test_validation_comes_at_the_same_steps_after_a_resume(tmp_path, shards, held_out):
    data = functools.partial(data_of, shards, accumulate=3, validation_shards=held_out, validation_batch_size=4)
    validate = {"val_check_interval": 6, "check_val_every_n_epoch": None}
    whole = train(tmp_path / "whole", data(), accumulate=3, **validate)
    assert [step for step, _ in whole.validated] == [2] * 3 + [4] * 3 + [6] * 3
    assert [ids for _, ids in whole.validated[:3]] == [
        ["0", "1", "2"],
        ["3", "4", "5", "6"],
        ["7", "8", "9", "10"],
    ]
    for stop_after in (8, 10, 13):
        stopped = Recorder(stop_after=stop_after)
        train(tmp_path, data(), accumulate=3, module=stopped, **validate)
        second = train(tmp_path, data(), accumulate=3, resume=tmp_path / "stopped.ckpt", **validate)
        assert second.validated == whole.validated[len(stopped.validated) :]


def test_logged_steps_are_the_same_after_a_resume(tmp_path, shards):
    class Logged(Recorder):
        def training_step(self, batch, batch_index):
            self.log("loss", loss := super().training_step(batch, batch_index))
            return loss

    def logged(root, **options):
        logger = pl.loggers.CSVLogger(root)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=STEPS,
            accumulate_grad_batches=3,
            logger=logger,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ResumeWholeSteps()],
            default_root_dir=tmp_path,
        )
        module = Logged(stop_after=options.pop("stop_after", None))
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(module, datamodule=data_of(shards, accumulate=3), **options)
        logger.save()
        rows = (root / "lightning_logs/version_0/metrics.csv").read_text().split()[1:]
        return [int(row.split(",")[-1]) for row in rows]

    whole = logged(tmp_path / "whole")
    assert whole == list(range(STEPS))
    assert logged(tmp_path / "first", stop_after=11) == whole[:3]
    again = logged(tmp_path / "second", ckpt_path=tmp_path / "stopped.ckpt", weights_only=False)
    assert again == whole[3:]


def test_a_checkpoint_within_a_step_is_refused_without_the_callback(tmp_path, shards):
    train(tmp_path, data_of(shards, accumulate=3), accumulate=3, module=Recorder(stop_after=7))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ValueError, match="after 1 of accumulate=3.*ResumeWholeSteps"):
        trainer.fit(
            Recorder(),
            datamodule=data_of(shards, accumulate=3),
            ckpt_path=tmp_path / "stopped.ckpt",
            weights_only=False,
        )


def test_align_leaves_a_checkpoint_of_a_whole_step_alone():
    counts = {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
    loop = {"epoch_loop.batch_progress": progress, "epoch_loop.state_dict": {"_batches_that_stepped": 1}}
    checkpoint = {"global_step": 2, "loops": {"fit_loop": loop}}
    align_to_step(checkpoint, accumulate=3, max_steps=9)
    assert progress == {"total": counts, "current": counts, "is_last_batch": False}
    align_to_step({"global_step": 2}, accumulate=3, max_steps=9)


def test_another_batch_size_is_refused(tmp_path, shards):
    train(tmp_path, data_of(shards), module=Recorder(stop_after=2))
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=False)
    assert checkpoint["SceneDataModule"] == {"batch_size": BATCH, "position": 2 * BATCH}
    with pytest.raises(
        ValueError, match="batch_size=6: the checkpoint at position 24 was made with batch_size=12"
    ) as caught:
        train(tmp_path, data_of(shards, batch_size=6), resume=tmp_path / "stopped.ckpt")
    assert "\n" not in str(caught.value)


def test_samples_are_those_of_the_order(tmp_path, shards):
    class Looker(Recorder):
        def training_step(self, batch, batch_index):
            order = SampleOrder(ShardSet(shards).sizes, seed=4, window=2)
            numbers = [order.sample_at(position) for position in batch.positions.tolist()]
            assert [scene.id for scene in batch.scenes] == [str(number) for number in numbers]
            assert batch.images.shape == (BATCH, 3, 8, 8)
            brightness = torch.tensor(numbers) / 127.5 - 1
            torch.testing.assert_close(batch.images, brightness[:, None, None, None].expand_as(batch.images))
            assert batch.positions.dtype == torch.int64
            return super().training_step(batch, batch_index)

    assert len(train(tmp_path, data_of(shards), module=Looker()).micro_batches) == STEPS


def test_precision_leaves_pictures_and_boxes_alone(tmp_path, shards):
    class Looker(Recorder):
        def training_step(self, batch, batch_index):
            assert self.weight.dtype == torch.bfloat16
            assert batch.images.dtype == batch.scenes.boxes.dtype == torch.float32
            return super().training_step(batch, batch_index)

    assert train(tmp_path, data_of(shards), module=Looker(), precision="bf16-true").trainer_step == STEPS


def test_flips_follow_the_position(tmp_path, shards):
    class Looker(Recorder):
        def __init__(self, **options):
            super().__init__(**options)
            self.mirrored = []

        def training_step(self, batch, batch_index):
            boxes = batch.scenes.boxes[:, 0]
            self.mirrored += (boxes[:, 0] == 0.75).tolist()
            assert all(tuple(box) in {(0, 0.25, 0.25, 0.5), (0.75, 0.25, 1, 0.5)} for box in boxes.tolist())
            return super().training_step(batch, batch_index)

    whole = train(tmp_path / "whole", data_of(shards, flip=True), module=Looker())
    first = train(tmp_path, data_of(shards, flip=True, accumulate=2), module=Looker(stop_after=7), accumulate=2)
    second = train(tmp_path, data_of(shards, flip=True), module=Looker(), resume=tmp_path / "stopped.ckpt")
    assert 20 < sum(whole.mirrored) < len(whole.mirrored) - 20
    assert first.mirrored[: 3 * BATCH] + second.mirrored == whole.mirrored


def run_rank(rank, port, results, root, shards, held_out, options):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK=str(rank), LOCAL_RANK="0")
    try:
        data = data_of(shards, accumulate=2, validation_shards=held_out, validation_batch_size=5)
        module = Recorder(stop_after=options.pop("stop_after", None))
        strategy = DDPStrategy(process_group_backend="gloo")
        train(root, data, accumulate=2, module=module, strategy=strategy, num_nodes=2, **options)
        results.put((rank, module.micro_batches, [ids for _, ids in module.validated], module.weight.item()))
    except BaseException as error:
        results.put((rank, repr(error)))


def train_on_ranks(root, shards, held_out, **options):
    """What each of two processes saw: a list of (rank, micro-batches, validated ids, weight)."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (port, results, root, shards, held_out, options)
    processes = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = sorted(results.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    assert all(len(seen) == 4 for seen in found), found
    return found


def test_two_ranks_see_what_one_sees_and_hand_over_to_one_and_back(tmp_path, shards, held_out):
    whole = train(tmp_path / "whole", data_of(shards))
    two = train_on_ranks(tmp_path, shards, held_out, stop_after=5)
    # Two micro-batches a step of half a half batch a rank: in order over steps, micro-batches and ranks.
    assert flat(positions for pair in zip(two[0][1], two[1][1], strict=True) for positions in pair)[: 2 * BATCH] == (
        consecutive(0, 2)
    )
    stopped = tmp_path / "stopped.ckpt"
    one = train(tmp_path, data_of(shards), module=Recorder(stop_after=3), resume=stopped)
    assert flat(one.micro_batches) == consecutive(2, 5)
    again = train_on_ranks(tmp_path, shards, held_out, resume=stopped)
    assert flat(positions for pair in zip(again[0][1], again[1][1], strict=True) for positions in pair) == (
        consecutive(5)
    )
    for _, _, validated, weight in again:
        assert weight == pytest.approx(whole.weight.item(), abs=1e-6)
        assert len(validated) == 3
    assert sorted(map(int, flat(again[0][2] + again[1][2]))) == list(range(11))


def test_ranks_accumulation_and_workers_tile_the_batches(tmp_path, shards):
    # The plan of each rank without processes: what a Trainer would give is its rank and world size alone.
    from datamodules.loaders import PositionDataset, PositionLoader
    from datamodules.order import GlobalBatches
    from datamodules.transforms import SceneTransform

    stored = ShardSet(shards)
    for ranks, accumulate, workers in [(2, 1, 0), (2, 3, 0), (3, 2, 0), (2, 2, 2)]:
        batches = GlobalBatches(BATCH, ranks=ranks, accumulate=accumulate)
        seen = {}
        for rank in range(ranks):
            dataset = PositionDataset(
                stored, SceneTransform(resolution=8), order=SampleOrder(stored.sizes, seed=0, window=2)
            )
            plan = [batches.positions(number, rank) for number in range(4 * accumulate)]
            loader = PositionLoader(dataset, functools.partial(list, plan), length=len(plan), workers=workers)
            seen[rank] = [batch.positions.tolist() for batch in loader]
        order = [seen[rank][number] for number in range(4 * accumulate) for rank in range(ranks)]
        assert flat(order) == list(range(4 * BATCH))


def test_loading_does_not_touch_the_global_generator(shards):
    from datamodules.loaders import PositionDataset, PositionLoader
    from datamodules.transforms import SceneTransform

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = PositionLoader(
        PositionDataset(ShardSet(shards), SceneTransform(resolution=8)),
        lambda: [range(3), range(3, 6)],
        length=2,
    )
    assert [len(batch) for batch in loader] == [3, 3]
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_shards_are_made_once(tmp_path, monkeypatch):
    made = []

    def make(out, count):
        made.append(out)
        return write_shards(Squares(count), out, shard_size=5)

    options = {
        "make": functools.partial(make, count=20),
        "validation_shards": str(tmp_path / "held_out"),
        "make_validation": functools.partial(make, count=6),
    }
    for _ in range(2):
        module = train(tmp_path, data_of(str(tmp_path / "made"), **options), max_steps=2)
        assert len(module.micro_batches) == 2
    assert made == [tmp_path / "made", tmp_path / "held_out"]

    def late(out):
        write_shards(Squares(4), out)
        raise ShardError("another process was quicker")

    data_of(str(tmp_path / "late"), make=late).prepare_data()
    assert has_shards(tmp_path / "late")

    def never(out):
        raise ShardError("no space")

    with pytest.raises(ShardError, match="no space"):
        data_of(str(tmp_path / "never"), make=never).prepare_data()


def test_shards_of_another_source_are_refused(tmp_path):
    made = str(tmp_path / "made")
    for count in (20, 20):
        make = functools.partial(write_shards, source=Squares(count), shard_size=5)
        train(tmp_path, data_of(made, make=make), max_steps=1)
    make = functools.partial(write_shards, source=Squares(21))
    with pytest.raises(ShardError, match=r"changed since they were made, count=20 \(now 21\);") as caught:
        train(tmp_path, data_of(made, make=make), max_steps=1)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("or take them as they are with data.make=null")
    assert train(tmp_path, data_of(made), max_steps=1).trainer_step == 1


def test_shards_in_a_folder_that_make_does_not_name_are_taken_as_they_are(tmp_path, shards):
    make = functools.partial(write_shards, source=Squares(12), out=str(tmp_path / "own"), shard_size=5)
    held_out = {"validation_shards": str(tmp_path / "held"), "make_validation": make}
    data = data_of(shards, make=make)
    data.prepare_data()
    assert (len(data.training_set), has_shards(tmp_path / "own")) == (29, False)
    for path in (tmp_path / "own", tmp_path / "x" / ".." / "own"):  # made, then found under another spelling
        data = data_of(str(path), make=make)
        data.prepare_data()
        assert len(data.training_set) == 12
    other = functools.partial(make, source=Squares(13))
    with pytest.raises(ShardError, match="changed since they were made"):
        train(tmp_path, data_of(str(tmp_path / "own"), make=other), max_steps=1)
    # a folder of the caller's that is not there is never made in passing
    data = data_of(shards, **held_out)
    data.prepare_data()
    assert not (tmp_path / "held").exists()
    with pytest.raises(ShardError, match=r"held: no such folder; .* prepare\.py"):
        _ = data.validation_set


def test_missing_shards_are_refused_before_training(tmp_path, shards):
    with pytest.raises(ShardError, match=r"prepare\.py"):
        train(tmp_path, data_of(str(tmp_path / "nowhere")))
    with pytest.raises(ShardError, match=r"prepare\.py"):
        train(tmp_path, data_of(shards, validation_shards=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("options", "trainer", "named"),
    [
        ({}, {"max_steps": -1, "max_epochs": 1}, "max_steps"),
        ({"accumulate": 3}, {"accumulate": 1}, "accumulate=3"),
        ({}, {"overfit_batches": 2}, "overfit_batches=2"),
    ],
)
def test_trainers_that_do_not_fit_are_refused(tmp_path, shards, options, trainer, named):
    with pytest.raises(ValueError, match=named) as caught:
        train(tmp_path, data_of(shards, **options), **trainer)
    assert "\n" not in str(caught.value)


def test_a_batch_size_that_never_divides_is_refused_at_once(shards):
    with pytest.raises(ValueError, match="batch_size=12.*accumulate=5.*batch_size=10 and batch_size=15"):
        data_of(shards, accumulate=5)


def test_provides_and_a_missing_trainer(shards):
    data = data_of(shards)
    assert data.provides == Squares.provides
    with pytest.raises(ValueError, match="Trainer"):
        data.train_dataloader()
    data.setup()
    assert len(data.training_set) == 29


def test_validating_without_held_out_shards_is_refused(tmp_path, shards, held_out):
    options = {
        "logger": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
    }
    with pytest.raises(ValueError, match="validation_shards=null"):
        pl.Trainer(**options).validate(Recorder(), datamodule=data_of(shards))
    module = Recorder()
    data = data_of(shards, validation_shards=held_out, validation_batch_size=3)
    pl.Trainer(**options).validate(module, datamodule=data, verbose=False)
    assert sum((ids for _, ids in module.validated), []) == [str(number) for number in range(11)]


def test_what_the_crop_drops_is_counted_and_told(tmp_path, caplog):
    # The object lies in the left quarter of pictures three times as wide as high: no centre square holds it.
    wide = str(write_shards(Squares(10, size=(8, 24)), tmp_path / "wide"))
    data = data_of(wide)
    with caplog.at_level(logging.WARNING, logger="datamodules.scene_datamodule"):
        train(tmp_path, data, max_steps=2)
    assert data.dropped_objects == 2 * BATCH
    assert f"{2 * BATCH} objects" in caplog.text


@pytest.fixture
def broken(shards, tmp_path):
    """The shards with two pictures that are none, in the first and second row of the third shard."""
    folder = shutil.copytree(shards, tmp_path / "broken")
    content = bytearray((folder / "000002.tar").read_bytes())
    for place in [place for place in range(len(content)) if content[place : place + 4] == b"\x89PNG"][:2]:
        content[place : place + 40] = bytes(40)
    (folder / "000002.tar").write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_sample_stands_in_for_one_that_cannot_be_read(tmp_path, shards, broken, caplog, workers):
    class Looker(Recorder):
        def __init__(self):
            super().__init__()
            self.ids = {}

        def training_step(self, batch, batch_index):
            self.ids |= {p: scene.id for p, scene in zip(batch.positions.tolist(), batch.scenes, strict=True)}
            return super().training_step(batch, batch_index)

    whole = train(tmp_path / "whole", data_of(shards), module=Looker()).ids
    data = data_of(broken, max_bad_fraction=0.5, workers=workers)
    with caplog.at_level(logging.WARNING, logger="datamodules.scene_datamodule"):
        seen = train(tmp_path / "run", data, module=Looker()).ids
    assert seen == {position: {"10": "12", "11": "12"}.get(number, number) for position, number in whole.items()}
    bad = sum(number in ("10", "11") for number in whole.values())
    assert data.bad_samples == bad > 3
    assert f"rank 0: {bad} of {STEPS * BATCH} samples could not be read" in caplog.text
    assert "000002.tar row 0: cannot identify image" in caplog.text


def test_too_many_bad_samples_end_the_run(tmp_path, broken):
    for share in (0.0, 0.06):  # none, or one of an epoch's 29
        with pytest.raises(
            ShardError, match=rf"data\.max_bad_fraction={share:g}: rank 0: .*000002\.tar row [01]: .*task=check"
        ):
            train(tmp_path, data_of(broken, max_bad_fraction=share))
    module = train(tmp_path, data_of(broken, max_bad_fraction=0.1))  # two of an epoch
    assert module.trainer_step == STEPS


def test_a_shard_of_which_nothing_can_be_read_ends_the_run(tmp_path, broken):
    file = os.path.join(broken, "000002.tar")
    with open(file, "rb") as tar:
        content = tar.read().replace(b"\x89PNG", b"\x89GNP")
    with open(file, "wb") as tar:
        tar.write(content)
    with pytest.raises(ShardError, match=r"000002\.tar row"):
        train(tmp_path, data_of(broken, max_bad_fraction=1.0))


def test_fast_dev_run_works(tmp_path, shards, held_out):
    data = data_of(shards, validation_shards=held_out)
    module = train(tmp_path, data, max_steps=STEPS, fast_dev_run=True)
    assert (len(module.micro_batches), len(module.validated)) == (1, 1)


def test_relations_of_boxes_are_provided_where_there_are_boxes(tmp_path, shards, held_out):
    data = data_of(shards, validation_shards=str(held_out), relations="boxes")
    assert data.provides == {"image", "caption", "boxes", "phrases", "relations"}
    assert "relations" not in data_of(shards).provides

    class Boxless(Squares):
        provides = frozenset({"image", "caption"})

    bare = write_shards(Boxless(), tmp_path / "bare")
    with pytest.raises(ShardError, match=r"data\.relations=boxes: .*bare has no boxes; set data\.relations=stored"):
        data_of(bare, relations="boxes").setup("fit")
