"""What is held out of training shards: by the scenes' ids alone, never trained on, seen as it is stored."""

import json
import shutil

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from datamodules import held_out
from datamodules.held_out import choose, hash_of
from datamodules.order import GlobalBatches, MixedOrder, SampleOrder
from datamodules.resume import ResumeWholeSteps
from datamodules.scene_datamodule import Part, SceneDataModule
from datamodules.shard_cache import ShardCache
from datamodules.shards import ShardError, ShardSet, write_shards
from datamodules.sources.base import LatentForm, Source
from preparation.conversion import convert_source
from scenes.scene import Frame, Scene, SceneObject
from tests.ranks import on_ranks


class Numbered(Source):
    """Images of 8 x 10 px whose left half tells the number; their ids are names."""

    provides = frozenset({"image", "caption"})
    image_format = "png"

    def __init__(self, count=60, *, name="scene", copies=1):
        self.count, self.kind, self.copies = count, name, copies

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            frame = Frame(original=(8, 10))
            pixels = np.zeros((8, 10, 3), np.uint8)
            pixels[:, :4] = number
            thing = SceneObject(phrase="thing", box=(0.1, 0.2, 0.3, 0.5))
            name = f"{self.kind} {number // self.copies}"
            yield Scene(id=name, objects=(thing,), frame=frame), Image.fromarray(pixels)


def by_hash(names, count):
    return sorted(names, key=hash_of)[:count]


NAMES = [f"scene {number}" for number in range(60)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return str(write_shards(Numbered(), tmp_path_factory.mktemp("held") / "train", shard_size=7))


def data_of(folder, **settings):
    return SceneDataModule(
        folder, **{"resolution": 8, "batch_size": 6, "seed": 3, "window": 2, "validation_samples": 5, **settings}
    )


def validation_ids(data):
    return [data.validation_set[number].scene.id for number in range(len(data.validation_set))]


def trained_ids(data, positions):
    return [data.training_set.read(*data.order[position]).scene.id for position in range(positions)]


# Which


def test_the_lowest_hashes_are_held_out_and_never_trained_on(shards):
    data = data_of(shards)
    expected = by_hash(NAMES, 5)
    assert validation_ids(data) == expected
    for epoch in range(3):
        ids = trained_ids(data, 55 * (epoch + 1))[55 * epoch :]
        assert sorted(ids) == sorted(set(NAMES) - set(expected))


def test_the_hash_is_fixed_for_ever():
    assert hash_of("scene 0") == 0xFA06303018BE9885


def test_other_shards_of_the_same_scenes_hold_out_the_same(shards, tmp_path):
    again = write_shards(Numbered(), tmp_path / "again", shard_size=25)
    assert validation_ids(data_of(str(again))) == validation_ids(data_of(shards))


def test_without_a_note_in_the_index_the_ids_are_read(shards, tmp_path, monkeypatch):
    old = tmp_path / "old"
    shutil.copytree(shards, old)
    index = json.loads((old / "index.json").read_text())
    del index["lowest_hashes"]
    (old / "index.json").write_text(json.dumps(index))
    assert validation_ids(data_of(str(old))) == validation_ids(data_of(shards))
    assert choose([ShardSet(old)], 5) == choose([ShardSet(shards)], 5)


def test_an_index_notes_some_and_more_of_them_are_read(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "NOTED", 6)
    few = write_shards(Numbered(), tmp_path / "few", shard_size=7)
    noted = ShardSet(few).lowest()
    assert 0 < len(noted.places) < 20
    assert all(place.hash < noted.below for place in noted.places)
    for count in (2, 6):
        assert choose([ShardSet(few)], count) == choose([ShardSet(shards)], count)


def test_prepared_shards_note_the_same(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "NOTED", 20)
    convert_source(Numbered(), tmp_path / "prepared", shard_size=11)
    prepared = ShardSet(tmp_path / "prepared")
    assert 5 < len(prepared.lowest().places) < 60
    assert validation_ids(data_of(str(prepared.path))) == validation_ids(data_of(shards))


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (5, 5), (6, 6), (512, 6)])
def test_at_most_a_tenth_is_held_out(shards, count, expected):
    assert len(data_of(shards, validation_samples=count).validation_set) == expected


def test_a_tiny_folder_still_trains(tmp_path):
    data = data_of(str(write_shards(Numbered(3), tmp_path / "three")), validation_samples=512)
    assert len(data.validation_set) == 1
    assert data.order.samples == 2


def test_nothing_left_to_train_on_is_refused(tmp_path, shards):
    one = str(write_shards(Numbered(1), tmp_path / "one"))
    with pytest.raises(ValueError, match=r"data\.validation_samples=512.*1 samples") as caught:
        _ = data_of(one, validation_samples=512).order
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"data\.validation_samples=-1"):
        data_of(shards, validation_samples=-1)


def test_a_scene_that_is_stored_twice_goes_with_both(tmp_path):
    twice = str(write_shards(Numbered(60, copies=2), tmp_path / "twice", shard_size=7))
    data = data_of(twice, validation_samples=3)
    ids = validation_ids(data)
    assert ids == by_hash(NAMES[:30], 3)
    assert data.order.samples == 54
    assert not set(ids) & set(trained_ids(data, 54))


def test_a_shard_of_which_all_is_held_out_is_passed_over():
    order = SampleOrder([2, 3, 2], seed=1, window=1, left_out={1: [0, 1, 2], 2: [0]})
    assert order.samples == 3
    for epoch in range(4):
        assert sorted(order[3 * epoch + place] for place in range(3)) == [(0, 0), (0, 1), (2, 1)]
    with pytest.raises(ValueError, match="left_out"):
        SampleOrder([2], seed=1, window=1, left_out={0: [0, 1]})


def test_leaving_nothing_out_changes_no_order():
    plain, same = (SampleOrder([5, 3, 4], seed=2, window=2, left_out=rows) for rows in (None, {}))
    assert [plain[p] for p in range(40)] == [same[p] for p in range(40)]


# What becomes of them


def test_they_are_seen_as_they_are_stored(shards):
    data = data_of(shards, flip=True)
    batch = data.held_out(5)
    for place, scene in enumerate(batch.scenes):
        number = int(scene.id.partition(" ")[2])
        image = (batch.images[place] + 1) * 127.5
        assert image[0, 4, 0] == pytest.approx(number, abs=0.6)  # the centre cut: columns 1 to 8
        assert image[0, 4, -1] == pytest.approx(0, abs=0.6)
    assert [scene.id for scene in batch.scenes] == validation_ids(data)


def test_what_stands_in_for_an_unreadable_sample_is_none_of_them(tmp_path):
    folder = write_shards(Numbered(12), tmp_path / "bad", shard_size=12)
    data = data_of(str(folder), validation_samples=1, max_bad_fraction=1)
    [(_, place)] = data._held_out.samples
    stored = ShardSet(folder)
    before = (place.row - 1) % 12
    begin, end = stored._opened(0).span(before)
    content = bytearray((folder / "000000.tar").read_bytes())
    content[begin + 512 : begin + 530] = bytes(18)  # the picture's head
    (folder / "000000.tar").write_bytes(content)
    data = data_of(str(folder), validation_samples=1, max_bad_fraction=1)
    loader = pl_loader(data)
    assert any(batch.faults for batch in loader)
    assert not any(scene.id == f"scene {place.row}" for batch in loader for scene in batch.scenes)


def pl_loader(data):
    from datamodules.loaders import PositionDataset, PositionLoader

    dataset = PositionDataset(data.training_set, data._transform, order=data.order)
    return PositionLoader(dataset, lambda: [range(11)], length=1)


def test_another_scene_than_was_noted_is_refused(shards, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(shards, wrong)
    index = json.loads((wrong / "index.json").read_text())
    lines = index["lowest_hashes"]["samples"]
    lines[0], lines[1] = (f"{a[:16]}{b[16:]}" for a, b in ((lines[0], lines[1]), (lines[1], lines[0])))
    (wrong / "index.json").write_text(json.dumps(index))
    stored = ShardSet(wrong)
    with pytest.raises(ShardError, match=r"is not the one that index\.json notes"):
        stored.at(stored.lowest().places[0])


class Latents(Source):
    provides = frozenset({"latents", "caption"})
    latent_form = LatentForm(channels=2, height=1, width=1, scale=8, scaling_factor=0.5)

    def __len__(self):
        return 20

    def __iter__(self):
        for number in range(20):
            yield (
                Scene(id=f"scene {number}", objects=(), frame=Frame(original=(8, 8))),
                np.full((2, 1, 1), number, np.float16),
            )


def test_latents_are_held_out_too(tmp_path):
    data = data_of(str(write_shards(Latents(), tmp_path / "latents", shard_size=6)), validation_samples=2)
    expected = by_hash(NAMES[:20], 2)
    batch = data.held_out(2)
    assert [scene.id for scene in batch.scenes] == expected
    assert batch.latents[:, 0, 0, 0].tolist() == [float(name.partition(" ")[2]) for name in expected]


# Several folders


def test_a_mixture_holds_out_over_all_folders(tmp_path, shards):
    other = str(write_shards(Numbered(40, name="other"), tmp_path / "other", shard_size=9))
    data = data_of([shards, other], weights=[1, 2], validation_samples=8)
    names = [*NAMES, *(f"other {number}" for number in range(40))]
    expected = by_hash(names, 8)
    assert validation_ids(data) == expected
    assert isinstance(data.order, MixedOrder)
    assert not set(expected) & set(trained_ids(data, 600))
    first = sum(name.startswith("scene") for name in expected)
    assert data.validation_parts() == [
        Part(folder=data.folders[0], samples=60, drawn=first),
        Part(folder=data.folders[1], samples=40, drawn=8 - first),
    ]
    assert [part.samples for part in data.parts(9)] == [60 - first, 40 - 8 + first]
    read = data.training_set.read
    one_epoch_of_both = {data.order.sample_at(p) for p in range(600)}
    assert len(one_epoch_of_both) == 92
    assert all(
        data.training_set[data.order.sample_at(p)].scene.id == read(*data.order[p]).scene.id for p in range(0, 600, 7)
    )


def test_a_scene_in_two_folders_is_trained_on_in_neither(tmp_path, shards):
    same = str(write_shards(Numbered(60), tmp_path / "same", shard_size=50))
    data = data_of([shards, same], weights=[1, 1], validation_samples=4)
    assert validation_ids(data) == by_hash(NAMES, 4)
    assert data.order.samples == 112
    assert not set(validation_ids(data)) & set(trained_ids(data, 300))


# Under a trainer


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_index):
        self.trained += [(self.trainer.global_step, scene.id) for scene in batch.scenes]
        return self.weight**2

    def validation_step(self, batch, batch_index):
        self.validated += [(self.trainer.global_step, scene.id) for scene in batch.scenes]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(root, shards, *, resume=None, steps=12, ranks=1, **settings):
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        default_root_dir=root,
        max_steps=steps,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ResumeWholeSteps()],
    )
    trainer.fit(
        module, datamodule=data_of(shards, **settings), ckpt_path=resume, weights_only=False if resume else None
    )
    trainer.save_checkpoint(root / f"step={trainer.global_step}.ckpt")
    return module


def test_the_same_is_held_out_after_a_resume_and_on_two_ranks(tmp_path, shards):
    whole = train(tmp_path, shards, steps=18)
    expected = by_hash(NAMES, 5)
    assert not set(expected) & {name for _, name in whole.trained}
    assert {step for step, _ in whole.validated} == {6, 12, 18}
    assert [name for step, name in whole.validated if step == 6] == expected
    train(tmp_path, shards, steps=5)
    resumed = train(tmp_path, shards, steps=18, resume=tmp_path / "step=5.ckpt")
    assert resumed.trained == [one for one in whole.trained if one[0] >= 5]
    assert resumed.validated == whole.validated

    def on_one_of_two(rank):
        module = train(tmp_path / f"{rank}", shards, steps=18, ranks=2)
        return module.trained, module.validated

    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    (trained, validated), (others, also) = on_ranks(on_one_of_two)
    assert sorted(trained + others) == sorted(whole.trained)
    assert sorted(validated + also) == sorted(whole.validated)


def test_nothing_is_validated_where_nothing_is_held_out(tmp_path, shards):
    module = train(tmp_path, shards, validation_samples=0)
    assert module.validated == []
    assert {name for _, name in module.trained} == set(NAMES)
    data = data_of(shards, validation_samples=0)
    assert data.validation_parts() == []
    with pytest.raises(ValueError, match=r"data\.validation_samples=0"):
        _ = data.validation_set


def test_global_batches_do_not_depend_on_ranks(shards):
    data = data_of(shards)
    whole = [data.order[p] for p in GlobalBatches(6).positions(11, 0)]
    shares = [data.order[p] for rank in range(3) for p in GlobalBatches(6, ranks=3).positions(11, rank)]
    assert shares == whole


# Elsewhere


@pytest.fixture
def remote(s3, shards):
    import fsspec

    files, root = fsspec.core.url_to_fs(f"{s3}/held")
    files.put(f"{shards}/", f"{root}/", recursive=True)
    files.invalidate_cache()
    yield f"{s3}/held"
    files.rm(root, recursive=True)
    files.invalidate_cache()


def test_of_remote_shards_only_the_samples_are_fetched(remote, shards, tmp_path):
    data = data_of(remote, cache=str(tmp_path / "cache"))
    assert validation_ids(data) == by_hash(NAMES, 5)
    assert not list((tmp_path / "cache").glob("*.tar"))
    shard, row = data.order[0]
    record = data.training_set.read(shard, row)
    assert list((tmp_path / "cache").glob("*.tar"))
    assert record.scene.id not in validation_ids(data)


def test_remote_shards_without_a_note_are_refused(remote, tmp_path):
    cache = ShardCache(tmp_path / "cache", limit=1e9)
    stored = ShardSet(remote, cache=cache)
    del stored.index["lowest_hashes"]
    with pytest.raises(ShardError, match=r"data\.validation_samples.*validation_shards") as caught:
        choose([stored], 5)
    assert "\n" not in str(caught.value)
