"""IGLIGEN's files written tiny: the join, the frame of the boxes, and latents from there to the loss."""

import itertools

import numpy as np
import pytest
import torch

from datamodules.loaders import PositionDataset
from datamodules.scene_datamodule import SceneDataModule, collate
from datamodules.shards import ShardError, ShardSet, check_shards, write_shards
from datamodules.sources.base import LatentForm
from datamodules.sources.igligen import Igligen
from datamodules.transforms import SceneTransform
from runtime.build import build_module
from sampling.scene_split import split_of_shards
from scenes import Frame

CELLS = 8
SDXL, SD = 0.13025, 0.18215


def objects(rows):
    array = np.empty((len(rows), len(rows[0])), object)
    for place, row in enumerate(rows):
        for column, value in enumerate(row):
            array[place, column] = value
    return array


def row(number, boxes, *, scores=None, phrases=None, size=None):
    scores = [0.9] * len(boxes) if scores is None else scores
    phrases = [f"thing {n}" for n in range(len(boxes))] if phrases is None else phrases
    places = np.array(boxes, np.float16).reshape(-1, 4)
    size = () if size is None else (size,)
    return [number, f"picture {number}.", places, np.array(scores, np.float16), phrases, *size]


def latent(number, channels=4, cells=CELLS):
    """Counts up from the number, so that it is known again."""
    values = np.arange(channels * cells * cells, dtype=np.float32) / 64 + number
    return values.reshape(channels, cells, cells).astype(np.float16)


def write(root, rows, numbers, *, name="sa_000000", cells=CELLS, boxes="boxes"):
    for folder in ("latents", boxes):
        (root / folder).mkdir(parents=True, exist_ok=True)
    np.save(root / boxes / f"{name}.npy", objects(rows), allow_pickle=True)
    latents = np.stack([latent(number, cells=cells) for number in numbers])
    content = {"indices": list(numbers), "latents": latents}
    np.save(root / "latents" / f"{name}.npy", np.array(content, dtype=object), allow_pickle=True)
    return root


WIDE, TALL = (60, 90), (80, 64)


@pytest.fixture
def root(tmp_path):
    """Picture 3 has no boxes, and the latents lie in another order than the boxes."""
    rows = [
        row(1, [[0.5, 0.25, 0.5, 0.25], [0.5, 0.5, 1.0, 1.0]], scores=[0.5, 0.2], size=WIDE),
        row(2, [[0.875, 0.5, 0.28, 1.0]], scores=[0.25], size=TALL),
        row(9, [[0.5, 0.5, 0.5, 0.5]], size=TALL),
        row(4, [[-0.25, 0.5, 1.0, 0.5], [1.125, 0.5, 0.25, 0.5]], size=WIDE),
    ]
    return write(tmp_path / "published", rows, [4, 3, 2, 1])


def test_boxes_and_latents_are_joined_by_number_in_the_square(root):
    source = Igligen(root=str(root))
    (wide, first), (tall, second), (beside, _) = source
    assert (wide.id, wide.caption) == ("sa_1", "picture 1.")
    np.testing.assert_array_equal(first, latent(1))
    np.testing.assert_array_equal(second, latent(2))
    # centre .5, .25 with sides .5, .25; the other box is under the confidence of .25, at which one stays
    assert [item.box for item in wide.objects] == [(0.25, 0.125, 0.75, 0.375)]
    assert [item.phrase for item in wide.objects] == ["thing 0"]
    assert [item.score for item in wide.objects] == [0.5]
    # .875 + .14 is 1.015 and cut; fp16 keeps .28 to 1e-4
    assert tall.objects[0].box == pytest.approx((0.735, 0.0, 1.0, 1.0), abs=1e-4)
    assert tall.objects[0].box[2] == 1.0
    # wide: 60 rows, so columns 15 to 75; tall: 64 columns, so rows 8 to 72
    assert wide.frame == Frame(original=WIDE, crop=(0, 15, 60, 60), target=(64, 64))
    assert tall.frame == Frame(original=TALL, crop=(8, 0, 64, 64), target=(64, 64))
    # -.75 to .25 is cut at 0; 1 to 1.25 lies beside the square
    assert [item.box for item in beside.objects] == [(0.0, 0.25, 0.25, 0.75)]
    assert source.latent_form == LatentForm(channels=4, height=8, width=8, scale=8, scaling_factor=SDXL)
    assert source.left_out.counts == {
        "boxes with no area in the picture": 1,
        "boxes without a latent": 1,
        "boxes under min_score": 1,
        "pictures without boxes": 1,
    }


def test_size_ids_are_those_of_the_picture_in_float32(tmp_path, backbone_named):
    source = Igligen(root=str(write(tmp_path / "r", [row(1, [], size=(1500, 2773))], [1])))
    dataset = PositionDataset(ShardSet(write_shards(source, tmp_path / "out")), SceneTransform(resolution=64))
    ids = backbone_named("tiny_sdxl").size_ids(collate([dataset[0]]).scenes)
    # of 2773 columns 636 are cut at the left: 636 * 64 / 1500 = 27.1
    torch.testing.assert_close(ids, torch.tensor([[1500.0, 2773.0, 0.0, 27.0, 64.0, 64.0]]), rtol=0, atol=0)
    assert ids.dtype == torch.float32


def test_boxes_without_sizes_need_them_from_elsewhere_or_leave_the_frame_open(tmp_path):
    write(tmp_path, [row(1, [[0.5, 0.5, 0.5, 0.5]]), row(2, [])], [1, 2], boxes="other")
    source = Igligen(root=str(tmp_path), boxes=str(tmp_path / "other"))
    assert [scene.frame for scene, _ in source] == [None, None]
    assert source.left_out.counts == {"sizes of pictures unknown": 2}
    (tmp_path / "sizes").mkdir()
    np.save(tmp_path / "sizes" / "sa_000000.npy", objects([[2, TALL], [1, WIDE]]), allow_pickle=True)
    source = Igligen(root=str(tmp_path), boxes=str(tmp_path / "other"), sizes=str(tmp_path / "sizes"))
    assert [scene.frame.original for scene, _ in source] == [WIDE, TALL]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(1, [[0.5, 0.5, 0.2, 0.2]], phrases=["a", "b"], size=WIDE), "1, 1 and 2 of them"),
        (row(1, [[0.5, 0.5, 0.2, 0.2]], scores=[], size=WIDE), "1, 0 and 1 of them"),
        (row(1, [[0.5, 0.5, 0.2, 0.2]], phrases=[""], size=WIDE), "phrases[0]: '' is not a phrase"),
        (row(1, [[0.5, np.nan, 0.2, 0.2]], size=WIDE), "boxes[0]"),
        (row(1, [[0.5, 0.5, -0.2, 0.2]], size=WIDE), "inverted"),
        (row(1, [[250, 250, 100, 100]], size=WIDE), "leaves the picture at the"),
        (row(1, [[0.5, 0.5, 0.2, 0.2]], scores=[np.nan], size=WIDE), "scores: not finite"),
        (row(1, [], size=(0, 5)), "size: (0, 5)"),
        (row(1, [], size="large"), "size: 'large'"),
    ],
)
def test_a_row_that_cannot_be_makes_its_sample_bad(tmp_path, bad, words):
    source = Igligen(root=str(write(tmp_path, [bad, row(2, [], size=WIDE)], [1, 2])))
    assert [scene.id for scene, _ in source] == ["sa_2"]
    (line,) = source.left_out.skipped
    assert line.startswith("sa_1: ")
    assert words in line
    assert "\n" not in line


def test_a_broken_file_is_counted_with_all_its_rows(tmp_path, root):
    write(root, [row(n, [], size=WIDE) for n in range(20, 25)], range(20, 25), name="sa_000001")
    write(root, [row(30, [], size=WIDE)], [30], name="sa_000002", cells=16)
    (root / "boxes" / "sa_000003.npy").write_bytes(b"")
    path = root / "latents" / "sa_000001.npy"
    path.write_bytes(path.read_bytes()[:-100])
    source = Igligen(root=str(root))
    assert len(source) == 4 + 5 + 1
    assert len(list(source)) == 3
    assert source.left_out.bad == 6
    cut, other_size = source.left_out.skipped
    assert "sa_000001.npy: cannot be read" in cut
    assert "(4, 16, 16) where the files before have (4, 8, 8)" in other_size
    assert source.left_out.notes == ["1 files of latents or boxes alone: sa_000003.npy"]


def test_a_root_without_latents_is_refused_with_the_ways_out(tmp_path):
    np.save(tmp_path / "sa_000000.npy", objects([row(1, [])]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"source\.root=.* has no folder latents") as caught:
        Igligen(root=str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "source.boxes=DIR" in str(caught.value)
    (tmp_path / "latents").mkdir()
    (tmp_path / "boxes").mkdir()
    with pytest.raises(ValueError, match=r"no \.npy file is both in latents"):
        Igligen(root=str(tmp_path))


# from there to the loss


@pytest.fixture
def shards(tmp_path):
    """Six samples of 64 px, as the tiny backbones take them."""
    rows = [row(n, [[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.0625, 0.125]], size=WIDE) for n in range(6)]
    return write_shards(Igligen(root=str(write(tmp_path / "r", rows, range(6)))), tmp_path / "shards", shard_size=4)


def test_latents_are_stored_as_published(shards):
    stored = ShardSet(shards)
    assert stored.index["members"] == ["latent.npy", "scene.json"]
    assert stored.latents == LatentForm(channels=4, height=8, width=8, scale=8, scaling_factor=SDXL)
    assert stored.provides == {"latents", "caption", "boxes", "phrases", "scores"}
    assert stored[5].image is None
    assert stored[5].latent.dtype == np.float16
    np.testing.assert_array_equal(stored[5].latent, latent(5))
    assert check_shards(shards).ok


def test_a_latent_of_another_form_than_the_source_says_is_refused(tmp_path, shards):
    class Odd(Igligen):
        def read(self, entry):
            scene, content = super().read(entry)
            return scene, content[:3]

    with pytest.raises(ShardError, match=r"latent of shape \(3, 8, 8\)"):
        write_shards(Odd(root=str(tmp_path / "r")), tmp_path / "odd")


def test_a_batch_of_latents(shards):
    transform = SceneTransform(resolution=64, min_area=0.01)
    dataset = PositionDataset(ShardSet(shards), transform)
    batch = collate([dataset[place] for place in (4, 1)])
    assert batch.images is None
    assert len(batch) == 2
    assert batch.latents.dtype == torch.float32
    np.testing.assert_array_equal(batch.latents.numpy(), np.stack([latent(4), latent(1)]).astype(np.float32))
    assert [scene.id for scene in batch.scenes] == ["sa_4", "sa_1"]
    assert batch.dropped == 2  # 1/16 x 1/8 of the square is .8 %
    assert batch.to("cpu").latents is not None
    with pytest.raises(ValueError, match=r"data\.flip=true"):
        SceneTransform(resolution=64, flip=True)(ShardSet(shards)[0], 0)


def data(shards, **settings):
    return SceneDataModule(str(shards), **{"resolution": 64, "batch_size": 2, "seed": 0, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"flip": True}, ("data.flip=true", "cannot be mirrored", "set data.flip=false")),
        ({"resolution": 128}, ("data.resolution=128", "(64, 64)")),
    ],
)
def test_latents_that_cannot_be_changed_are_refused_at_the_start(shards, settings, words):
    with pytest.raises(ShardError) as caught:
        data(shards, **settings).setup("fit")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("name", "shape", "factor", "words"),
    [
        ("tiny_sdxl", (4, 8, 8), SDXL, None),
        ("tiny_sdxl", (4, 8, 8), None, None),
        ("tiny_sd15", (4, 8, 8), SD, None),
        ("tiny_sdxl", (4, 8, 8), SD, ("multiplied by 0.18215", "0.13025", "another one made them")),
        ("tiny_sdxl", (16, 8, 8), SDXL, ("16 channels", "has 4")),
        ("tiny_sdxl", (4, 16, 16), SDXL, ("16 x 16 cells", "set backbone.resolution=128")),
        ("tiny_sdxl", (4, 8, 16), SDXL, ("8 x 16 cells",)),
        ("shapes", (4, 8, 8), SDXL, ("4 channels", "has 12")),
    ],
)
def test_latents_of_another_autoencoder_or_size_are_refused(backbone_named, name, shape, factor, words):
    backbone = backbone_named(name)
    if words is None:
        backbone.check_latents(shape, factor=factor)
        return
    with pytest.raises(ValueError, match="latents: ") as caught:
        backbone.check_latents(shape, factor=factor)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


TINY = (
    "backbone=tiny_sdxl",
    "data=igligen",
    "data.resolution=64",
    "data.workers=0",
    "batch_size=2",
    "callback=[progress,checkpoint]",
    "trainer.max_steps=2",
    "trainer.log_every=1",
    "optimizer.warmup_steps=0",
)


def test_the_step_takes_the_latents_and_not_the_autoencoder(shards, composed):
    cfg = composed(*TINY, f"data.shards={shards}", "data.posterior=mode")
    module = build_module(cfg)
    encoded = []
    module.backbone.vae.encoder.register_forward_hook(lambda *_: encoded.append(1))
    dataset = PositionDataset(ShardSet(shards), SceneTransform(resolution=64))
    batch = collate([dataset[place] for place in range(2)])
    losses = module.losses(batch, [0, 1])
    assert losses.shape == (2,)
    assert torch.isfinite(losses).all()
    assert torch.equal(module.latents(batch), batch.latents)
    assert not encoded
    # a picture that encodes to the same latents has the same loss: the factor is not applied twice
    encodes_to = batch.latents
    module.backbone._encode = lambda images, generator: encodes_to
    batch.images, batch.latents = torch.zeros(2, 3, 64, 64), None
    torch.testing.assert_close(module.losses(batch, [0, 1]), losses)


def test_training_runs_on_latents_and_refuses_another_autoencoder_s(shards, composed, fit, tmp_path):
    pictures = (
        f"data.validation_shards={shards}",
        "callback=[progress,pictures,checkpoint]",
        "callback.pictures.every=2",
        "callback.pictures.scenes=2",
        "sampler.steps=2",
        "trainer.validate_every=2",
    )
    module = fit(composed(*TINY, *pictures, f"data.shards={shards}", f"run={tmp_path / 'run'}"))
    assert module.global_step == 2
    assert [path.name for path in (tmp_path / "run" / "pictures").iterdir()] == ["step=0000002.png"]
    with pytest.raises(ValueError, match=r"latents: multiplied by 0\.13025"):
        fit(composed(*TINY, "backbone=tiny_sd15", f"data.shards={shards}", f"run={tmp_path / 'other'}"))


def test_pictures_are_not_scored_against_latents(shards, composed):
    with pytest.raises(ValueError, match=r"protocol\.shards: .* holds latents"):
        split_of_shards(str(shards), None, count=2)


def test_one_pair_of_files_is_in_memory_at_a_time(tmp_path, monkeypatch):
    for shard in range(3):
        numbers = range(10 * shard, 10 * shard + 2)
        write(tmp_path, [row(n, [], size=WIDE) for n in numbers], numbers, name=f"sa_{shard:06d}")
    read = []
    original = Igligen._read_latents
    monkeypatch.setattr(Igligen, "_read_latents", lambda self, path: read.append(path.name) or original(self, path))
    samples = iter(Igligen(root=str(tmp_path)))
    assert [len(read) for _ in itertools.islice(samples, 5)] == [1, 1, 2, 2, 3]
