"""Folders of shards mixed by weight: exact shares, a stream that follows from (seed, position), a run that goes on with it."""

import functools
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from datamodules.loaders import PositionDataset, PositionLoader
from datamodules.mixture import MixedShards, folders_of
from datamodules.order import GlobalBatches, MixedOrder, SampleOrder
from datamodules.resume import ResumeWholeSteps
from datamodules.scene_datamodule import Part, SceneDataModule
from datamodules.shards import ShardError, ShardSet, write_shards
from datamodules.sources.base import LatentForm, Source
from datamodules.sources.shapes import Shapes
from datamodules.transforms import SceneTransform
from runtime.build import build_data
from runtime.composition import compose
from runtime.run_directory import RunDirectory
from scenes import Scene, SceneObject

SIZES = ((5, 3, 2), (7, 1, 4, 6, 2, 3))  # 10 and 23 samples


def orders(seed=3):
    return [SampleOrder(sizes, seed=seed, window=2) for sizes in SIZES]


def mixed(weights=(1, 2), seed=3):
    return MixedOrder(orders(seed), weights, seed=seed)


@pytest.mark.parametrize("weights", [(1, 2), (1, 1), (3, 1), (5, 3), (2000, 3001)])
def test_of_every_period_each_set_has_exactly_its_weight(weights):
    order = mixed(weights)
    assert order.period == sum(weights)
    for start in (0, 7 * order.period, 1400 * order.period):
        turns = [order.locate(p)[0] for p in range(start, start + order.period)]
        assert np.bincount(turns).tolist() == list(weights)


def test_the_share_of_any_stretch_is_within_a_period_of_its_weight():
    order = mixed((1, 2))
    turns = np.array([order.locate(p)[0] for p in range(5000)])
    ahead = np.cumsum(turns == 0) - np.arange(1, 5001) / 3
    assert np.abs(ahead).max() <= 1


def test_the_turns_within_a_period_are_shuffled():
    # 1 of 3: the single place of the first set falls on each of the three places about equally often.
    order = mixed((1, 2))
    places = [p % 3 for p in range(9000) if order.locate(p)[0] == 0]
    assert len(places) == 3000
    assert ((np.bincount(places) - 1000) ** 2 / 1000).sum() < 13.8  # chi-squared, 2 degrees of freedom, p = 0.001


def test_each_set_comes_in_its_own_order_without_gaps_and_again_in_a_new_one():
    order, alone = mixed((1, 2)), orders()
    own = {0: [], 1: []}
    samples = {0: [], 1: []}
    for position in range(300):
        chosen, place = order.locate(position)
        own[chosen].append(place)
        shard, row = order[position]
        expected = alone[chosen][place]
        assert (shard - (len(SIZES[0]) if chosen else 0), row) == expected
        samples[chosen].append(order.sample_at(position))
    assert own == {0: list(range(100)), 1: list(range(200))}
    epochs = [samples[0][start : start + 10] for start in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert sorted(samples[1][:23]) == list(range(10, 33))


def test_counts_say_how_many_come_from_each_set():
    order = mixed((2, 3))
    turns = [order.locate(p)[0] for p in range(9000)]
    for positions in (0, 1, 4, 5, 4095, 4096, 8999):
        assert order.counts(positions) == (turns[:positions].count(0), turns[:positions].count(1))


def test_the_stream_is_a_function_of_seed_and_position():
    forward = [mixed().sample_at(p) for p in range(200)]
    order = mixed()
    assert all(order.sample_at(p) == forward[p] for p in (199, 0, 57, 143, 2))
    assert [pickle.loads(pickle.dumps(order)).sample_at(p) for p in range(200)] == forward
    assert [mixed(seed=4).sample_at(p) for p in range(200)] != forward
    assert [mixed((2, 4)).sample_at(p) for p in range(200)] == forward  # a common divisor changes nothing


def test_the_stream_never_changes():
    # A change here means that no run made before can be resumed.
    order = MixedOrder([SampleOrder([2, 1], seed=0, window=2), SampleOrder([4], seed=0, window=2)], [1, 2], seed=0)
    assert [order.sample_at(p) for p in range(18)] == [3, 6, 2, 0, 4, 5, 1, 5, 3, 1, 6, 4, 2, 5, 4, 3, 6, 0]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((1,), ("data.weights=[1]", "1 weights for 2 folders")),
        ((1, 2, 3), ("3 weights for 2 folders",)),
        ((1, 0), ("data.weights[1]=0", "leave out a folder")),
        ((-1, 2), ("data.weights[0]=-1",)),
        ((0.5, 1), ("data.weights[0]=0.5", "whole numbers")),
        ((True, 1), ("data.weights[0]=True",)),
    ],
)
def test_weights_that_mix_nothing_are_refused(weights, words):
    with pytest.raises(ValueError, match=r"data\.weights") as caught:
        mixed(weights)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_there_is_no_position_before_the_first():
    with pytest.raises(IndexError):
        mixed()[-1]


# What is stored


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 12 and 20 pictures, each with ids of its own."""
    root = tmp_path_factory.mktemp("mixed")
    few = write_shards(Shapes(count=12), root / "few", shard_size=5)
    many = write_shards(Shapes(count=20, start=1000), root / "many", shard_size=8)
    return [str(few), str(many)]


def test_samples_of_several_folders_are_numbered_through(folders):
    parts = [ShardSet(folder) for folder in folders]
    stored = MixedShards(parts)
    assert (len(stored), stored.sizes, stored.latents) == (32, (5, 5, 2, 8, 8, 4), None)
    assert [stored[n].scene.id for n in (0, 11, 12, 31)] == [
        parts[0][0].scene.id,
        parts[0][11].scene.id,
        parts[1][0].scene.id,
        parts[1][19].scene.id,
    ]
    assert stored.read(3, 7).scene == parts[1].read(0, 7).scene
    for number in (-1, 32):
        with pytest.raises(IndexError):
            stored[number]


class Noise(Source):
    """Latents of random numbers."""

    provides = frozenset({"latents", "caption"})

    def __init__(self, factor=0.5):
        self.latent_form = LatentForm(channels=4, height=8, width=8, scale=8, scaling_factor=factor)

    def __len__(self):
        return 2

    def __iter__(self):
        for number in range(2):
            yield Scene(id=str(number), objects=(SceneObject(phrase="x"),)), np.zeros((4, 8, 8), np.float16)


@pytest.mark.parametrize("own", [None, [{"crop": "random"}, {}]])
def test_latents_cannot_be_cut_anew(tmp_path, own):
    latents = [str(write_shards(Noise(), tmp_path / name)) for name in ("a", "b")]
    settings = {"crop": "random"} if own is None else {"transforms": own}
    with pytest.raises(ShardError, match=r"data\.crop=random: .*/a: .*set data\.crop=center") as caught:
        data_of(latents, resolution=64, **settings).setup("fit")
    assert "\n" not in str(caught.value)
    assert data_of(latents, resolution=64).training_set.latents is not None
    with pytest.raises(ValueError, match=r"data\.crop=random"):
        SceneTransform(resolution=64, crop="random")(ShardSet(latents[0])[0], 0)


def test_only_folders_of_one_form_are_mixed_and_provide_what_all_have(folders, tmp_path):
    latents = [ShardSet(write_shards(Noise(factor), tmp_path / f"{factor}")) for factor in (0.5, 0.6)]
    for parts in ([ShardSet(folders[0]), latents[0]], latents):
        with pytest.raises(ShardError, match=r"data\.shards: .* mix folders of one form") as caught:
            MixedShards(parts)
        assert "\n" not in str(caught.value)
    again = ShardSet(write_shards(Noise(), tmp_path / "again"))
    again.provides |= {"boxes"}
    assert MixedShards([latents[0], again]).provides == {"latents", "caption"}
    assert MixedShards([latents[0], again]).latents == latents[0].latents


@pytest.mark.parametrize(("shards", "words"), [([], "names no folder"), (["a", "b", "./a"], "named twice")])
def test_folders_that_cannot_be_mixed_are_refused(shards, words):
    with pytest.raises(ValueError, match=words):
        folders_of(shards)


# What a run reads


def data_of(folders, **settings):
    return SceneDataModule(folders, **{"resolution": 32, "batch_size": 6, "seed": 1, "weights": [1, 2], **settings})


def ids_of_batch(data, batch, *, ranks=1, accumulate=1, workers=0):
    """Ids of a global batch, over accumulation steps and ranks."""
    batches = GlobalBatches(12, ranks=ranks, accumulate=accumulate)
    dataset = PositionDataset(data.training_set, SceneTransform(resolution=32), order=data.order)
    shares = [batches.positions(batch * accumulate + step, rank) for step in range(accumulate) for rank in range(ranks)]
    loader = PositionLoader(dataset, lambda: shares, length=len(shares), workers=workers)
    return [scene.id for share in loader for scene in share.scenes]


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (4, 1), (3, 2), (1, 4)])
def test_global_batches_are_the_same_for_any_ranks(folders, ranks, accumulate):
    for batch in (0, 5):
        expected = ids_of_batch(data_of(folders), batch)
        assert ids_of_batch(data_of(folders), batch, ranks=ranks, accumulate=accumulate) == expected
    assert ids_of_batch(data_of(folders), 5, workers=2) == expected
    first = {record.scene.id for record in map(ShardSet(folders[0]).__getitem__, range(12))}
    assert sum(name in first for name in expected) == 4


def test_parts_tell_what_each_folder_gives(folders):
    few, many = data_of(folders).parts(300)
    assert (few.samples, few.drawn, many.samples, many.drawn) == (12, 100, 20, 200)
    assert data_of(folders[0], weights=None).parts(7) == [Part(folder=few.folder, samples=12, drawn=7)]


def test_one_folder_has_the_order_it_always_had(folders):
    alone = data_of(folders[0], weights=None)
    plain = SampleOrder(ShardSet(folders[0]).sizes, seed=1, window=8)
    assert [alone.order.sample_at(p) for p in range(50)] == [plain.sample_at(p) for p in range(50)]
    listed = data_of(folders[:1], weights=[3])
    assert [listed.order.sample_at(p) for p in range(50)] == [plain.sample_at(p) for p in range(50)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": None}, "2 folders of shards and no weights"),
        ({"weights": [1]}, "1 weights for 2 folders"),
        ({"make": functools.partial(write_shards)}, "data.make: makes one folder"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_anything_is_read(settings, words):
    with pytest.raises(ValueError, match=words):
        data_of(["nowhere", "elsewhere"], **settings)


def test_a_folder_without_shards_is_named(folders, tmp_path):
    with pytest.raises(ShardError, match="nowhere"):
        data_of([folders[0], str(tmp_path / "nowhere")]).setup("fit")


def test_each_folder_may_have_transforms_of_its_own(folders):
    own = [{"crop": "random_resized", "crop_scale": [0.3, 0.6], "flip": False}, {}]
    data = data_of(folders, resolution=24, flip=True, crop="random", min_area=0.0, transforms=own)
    data.setup("fit")
    common = SceneTransform(resolution=24, flip=True, crop="random", min_area=0.0, seed=1, posterior="sample")
    expected = (replace(common, **own[0]), common)
    dataset = PositionDataset(data.training_set, data._transforms, order=data.order)
    whole = [dataset[position] for position in range(60)]
    for position, sample in enumerate(whole):
        shard, row = data.order[position]
        place = data.training_set.part_of(shard)
        again = expected[place](data.training_set.read(shard, row), position)
        assert torch.equal(sample.image, again.image)
        assert sample.scene == again.scene
        height, width = sample.scene.frame.crop[2:]
        assert (height * width < 0.65 * 32**2) is (place == 0)
    resumed = data_of(folders, resolution=24, flip=True, crop="random", min_area=0.0, transforms=own, workers=2)
    later = PositionDataset(resumed.training_set, resumed._transforms, order=resumed.order)
    for batch in PositionLoader(later, lambda: [range(40, 50), range(50, 60)], length=2, workers=2):
        for image, scene, position in zip(batch.images, batch.scenes, batch.positions.tolist(), strict=True):
            assert torch.equal(image, whole[position].image)
            assert scene == whole[position].scene


def test_validation_and_folders_by_themselves_have_the_common_transform(folders):
    settings = {"crop": "random", "flip": True, "min_visible": 0.3, "interpolation": "lanczos"}
    data = data_of(folders[0], weights=None, transforms=[{}, {}, {}], validation_shards=folders[1], **settings)
    assert data._transforms == (data._transform,)
    centred = SceneTransform(resolution=32, min_visible=0.3, interpolation="lanczos")
    assert data._validation_transform == centred
    first = data.held_out(1)
    assert torch.equal(first.images[0], centred(ShardSet(folders[1])[0], 0).image)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ([{}], "data.transforms: 1 for 2 folders"),
        ([{}, {"seed": 3}], "data.transforms: seed: no such setting of a folder (have: caption, crop,"),
        ([{"crop": "left"}, {}], "data.crop=left: no such choice"),
    ],
)
def test_transforms_that_fit_no_folder_are_refused(own, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        data_of(["nowhere", "elsewhere"], transforms=own)


def test_the_rich_context_recipes_cut_each_folder_as_published(folders, tmp_path):
    for name in ("rich_context_sdxl_512", "rich_context_sd15"):
        cfg = compose("train", [f"experiment={name}", f"run={tmp_path}", f"data.shards=[{','.join(folders)}]"])
        cfg.trainer.accumulate = 1
        coco, cc3m = build_data(cfg)._transforms
        assert (coco.crop, coco.crop_scale, coco.crop_ratio) == ("random_resized", [0.8, 1.1], [0.95, 1.05])
        assert (coco.flip, coco.min_visible, coco.interpolation) == (True, 0.1, "bilinear")
        assert (cc3m.crop, cc3m.flip, cc3m.min_visible, cc3m.interpolation) == ("random", True, 0.3, "bilinear")
        alone = build_data(compose("train", [f"experiment={name}", f"run={tmp_path}", f"data.shards={folders[1]}"]))
        assert alone._transforms == (cc3m,)


@pytest.fixture
def mixture(short, folders):
    """mixture(run, *overrides): four steps on both folders."""

    def composed(run, *overrides):
        return short(
            run,
            "data=mixture",
            f"data.shards=[{','.join(folders)}]",
            "data.weights=[1,2]",
            "data.resolution=32",
            "data.workers=0",
            "logger=[csv]",
            "callback=[gates,checkpoint]",
            *overrides,
            without=("data", "callback"),
        )

    return composed


class Recorder(pl.LightningModule):
    """One weight; keeps the ids that come."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.ids = []

    def training_step(self, batch, batch_index):
        self.ids.append([scene.id for scene in batch.scenes])
        return (self.weight - batch.images.mean()) ** 2

    def validation_step(self, batch, batch_index):
        """Nothing: Lightning asks for it where a data module could validate."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(data, root, *, steps, accumulate, resume=None):
    """The recorder of a run up to a step, whose checkpoint is `root/last.ckpt`."""
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ResumeWholeSteps()],
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False if resume else None)
    trainer.save_checkpoint(root / "last.ckpt")
    return module


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_at_any_step_goes_on_as_an_unbroken_one(folders, tmp_path, workers):
    # 8 steps of 6 are 16 samples of the first folder, which holds 12, and 32 of the second, which holds 20
    data = functools.partial(data_of, folders, workers=workers)
    whole = trained(data(), tmp_path, steps=8, accumulate=1)
    flat = [name for ids in whole.ids for name in ids]
    assert len(set(flat)) == 32
    for stop in (1, 5) if not workers else (3,):
        trained(data(), tmp_path, steps=stop, accumulate=1)
        resumed = trained(data(accumulate=2), tmp_path, steps=8, accumulate=2, resume=tmp_path / "last.ckpt")
        assert [name for ids in resumed.ids for name in ids] == flat[stop * 6 :]


def test_the_plan_says_what_comes_from_where(mixture, fit, folders, tmp_path, capsys):
    fit(mixture(tmp_path / "run", "plan=true", "trainer.max_steps=30", "data.validation_samples=0"))
    lines = capsys.readouterr().out.splitlines()
    assert f"data       32 scenes in {folders[0]}, {folders[1]}" in lines
    assert f"           33.3% from {folders[0]}: 80 samples of 12 scenes, 6.7 passes" in lines
    assert f"           66.7% from {folders[1]}: 160 samples of 20 scenes, 8.0 passes" in lines
    assert not (tmp_path / "run").exists()


def test_other_weights_are_another_run(mixture, tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open(mixture(directory.path))
    with pytest.raises(ValueError, match=r"data\.weights was \[1, 2\], now \[2, 1\]"):
        directory.inspect(mixture(directory.path, "data.weights=[2,1]"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((), "data.shards: needs a value; give it as data.shards=VALUE"),
        (("data.shards=[a,b]",), "data.weights: needs a value"),
        (("data.shards=[a,2]", "data.weights=[1,2]"), "data.shards=['a', 2]: must be a folder, or a list of folders"),
    ],
)
def test_the_command_line_is_told_what_a_mixture_needs(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        compose("train", ["data=mixture", "run=x", *settings])
