"""IGLIGEN's files written again: what is published comes back as it was, and what the form cannot tell is counted or refused."""

import io
import pickletools
from dataclasses import replace

import numpy as np
import pytest

from datamodules.safe_pickle import load_npy
from datamodules.shard_index import LATENT
from datamodules.shards import ShardError, ShardSet, write_shards
from datamodules.sources.base import LatentForm
from datamodules.sources.igligen import Igligen, read_detections
from preparation.conversion import convert_source
from preparation.export_igligen import export_igligen
from preparation.latents import drawn
from preparation.prepare import prepare
from preparation.runner import run_stage
from preparation.stage import Stage
from runtime.composition import compose
from scenes import Frame, Relation, Scene, SceneObject
from tests.preparation.conftest import Listed

FORM = LatentForm(channels=4, height=4, width=6, scale=8, scaling_factor=0.13025)
SQUARE = replace(FORM, width=4)
TALL = Frame(original=(60, 40), crop=(10, 0, 40, 40), target=(32, 32))


def same(one, other):
    """Whether two arrays have type, shape and bits in common."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


def as_it_must_come_back(row):
    """A published row with its boxes cut to the square, as the published loader cuts them; those beside it are gone."""
    number, caption, boxes, scores, phrases, *size = row
    centres, sides = np.float64(boxes[:, :2]), np.float64(boxes[:, 2:])
    corners = np.concatenate([centres - sides / 2, centres + sides / 2], 1)
    cut = corners.clip(0, 1)
    there = (cut[:, 2:] - cut[:, :2] > 1e-6).all(1)
    moved = np.concatenate([(cut[:, :2] + cut[:, 2:]) / 2, cut[:, 2:] - cut[:, :2]], 1).astype(np.float16)
    inside = (cut == corners).all(1, keepdims=True)
    boxes = np.where(inside, boxes, moved)[there]
    return [number, caption, boxes, scores[there], [p for p, kept in zip(phrases, there, strict=True) if kept], *size]


@pytest.mark.parametrize("folder", ["sdxl-512", "sdxl-1024"])
@pytest.mark.parametrize("columns", [6, 5])
def test_what_is_published_comes_back_as_it_was(samples, tmp_path, folder, columns):
    root = samples / "igligen" / folder
    boxes = root / "boxes" if columns == 6 else samples / "igligen" / "boxes_without_size"
    given = ["source=igligen", f"source.root={root}", f"source.boxes={boxes}", "source.min_score=0", "shard_size=3"]
    prepare(compose("prepare", [*given, f"out={tmp_path / 'shards'}"]))
    asked = ["task=export", "export.form=igligen", f"export.sizes={'true' if columns == 6 else 'false'}"]
    prepare(compose("prepare", [*asked, f"shards={tmp_path / 'shards'}", f"out={tmp_path / 'out'}"]))
    names = sorted(path.name for path in (root / "latents").iterdir())
    for part in ("boxes", "latents"):
        assert sorted(path.name for path in (tmp_path / "out" / part).iterdir()) == names
    for name in names:
        published = np.load(root / "latents" / name, allow_pickle=True).item()
        rows = [row for row in np.load(boxes / name, allow_pickle=True) if row[0] in published["indices"]]
        assert rows
        found = np.load(tmp_path / "out" / "boxes" / name, allow_pickle=True)
        assert (found.shape, found.dtype) == ((len(rows), columns), object)
        for row, expected in zip(found, map(as_it_must_come_back, rows), strict=True):
            assert [type(value) for value in row] == [type(value) for value in expected]
            assert [*row[:2], *row[4:]] == [*expected[:2], *expected[4:]]
            same(row[2], expected[2])
            same(row[3], expected[3])
        array = np.load(tmp_path / "out" / "latents" / name, allow_pickle=True)
        assert (array.shape, array.dtype) == ((), object)
        again = array.item()
        assert again["indices"] == [row[0] for row in rows]
        assert {type(number) for number in again["indices"]} == {int}
        places = [published["indices"].index(number) for number in again["indices"]]
        same(again["latents"], published["latents"][places])
    # and what was written is read as the same scenes
    sizes = {} if columns == 6 else {"boxes": str(tmp_path / "out" / "boxes")}
    once = Igligen(root=str(root), boxes=str(boxes), min_score=0)
    twice = Igligen(root=str(tmp_path / "out"), min_score=0, **sizes)
    for (scene, latent), (other, same_latent) in zip(once, twice, strict=True):
        assert replace(scene, objects=()) == replace(other, objects=())
        assert [replace(item, box=None) for item in scene.objects] == [replace(i, box=None) for i in other.objects]
        np.testing.assert_allclose(
            [item.box for item in scene.objects], [item.box for item in other.objects], rtol=0, atol=2**-11
        )
        same(latent, same_latent)


def test_files_are_named_in_the_words_of_numpy_1(samples, tmp_path):
    convert_source(Igligen(root=str(samples / "igligen" / "sdxl-512")), tmp_path / "shards")
    export_igligen(tmp_path / "shards", tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.npy"):
        data = path.read_bytes()
        assert data[:8] == b"\x93NUMPY\x01\x00"
        codes = pickletools.genops(data[10 + int.from_bytes(data[8:10], "little") :])
        asked = {argument for code, argument, _ in codes if code.name == "GLOBAL"}
        assert asked == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
        load_npy(path)


def listed(scenes, form=SQUARE):
    """Scenes with numbers in place of pictures."""

    def latent(number, scene):
        return np.random.default_rng(number).standard_normal(form.stored_shape, dtype=np.float32).astype(np.float16)

    return Listed(scenes, latent, provides="latents caption boxes phrases scores", form=form)


def found(phrase, box, score=0.5, **more):
    return SceneObject(phrase=phrase, box=box, score=score, **more)


SCENES = [
    Scene(id="sa_7", caption="A Dog. A cat", objects=(found("Dog", (0.25, 0.5, 0.75, 1)),), frame=TALL),
    Scene(id="sa_3", caption="Häuser.", objects=(), frame=TALL),
    Scene(
        id="11",
        objects=(
            found("cat", (0, 0, 0.1, 1), 0.3, label="cat", description="A cat.", attributes=("red", "old")),
            SceneObject(phrase="tree"),
        ),
        relations=(Relation(subject=0, predicate="by", object=1),),
        frame=TALL,
    ),
]


def test_scenes_that_remember_no_tar_come_in_a_file_for_each_shard(tmp_path):
    counts = export_igligen(write_shards(listed(SCENES), tmp_path / "shards", shard_size=2), tmp_path / "out")
    assert counts == {
        "pictures": 3,
        "objects": 2,
        "latents": 3,
        "files": 2,
        "objects without a box": 1,
        "captions missing": 1,
        "relations that the form does not hold": 1,
        "attributes that the form does not hold": 2,
        "descriptions that the form does not hold": 1,
    }
    first, second = (np.load(tmp_path / "out" / "boxes" / f"sa_00000{n}.npy", allow_pickle=True) for n in range(2))
    assert [list(row[[0, 1, 4, 5]]) for row in first] == [  # by their numbers, asked as GroundingDINO was
        [3, "häuser.", [], (60, 40)],
        [7, "a dog. a cat.", ["Dog"], (60, 40)],
    ]
    same(first[0, 2], np.empty((0, 4), np.float16))
    same(first[1, 2], np.array([[0.5, 0.75, 0.5, 0.5]], np.float16))
    assert list(second[0][[0, 1, 4]]) == [11, "", ["cat"]]
    latents = np.load(tmp_path / "out" / "latents" / "sa_000000.npy", allow_pickle=True).item()
    (_, of_7), (_, of_3), _ = listed(SCENES)
    assert latents["indices"] == [3, 7]
    same(latents["latents"], np.stack([of_3, of_7]))


def test_a_tar_whose_scenes_lie_in_several_shards_is_one_file(tmp_path):
    scenes = [
        Scene(id=f"sa_{n}", caption="x", frame=TALL, provenance={"tar": f"sa_00000{n // 3}"}) for n in (4, 3, 5, 8, 7)
    ]
    export_igligen(write_shards(listed(scenes), tmp_path / "shards", shard_size=2), tmp_path / "out")
    rows = {path.stem: list(np.load(path, allow_pickle=True)[:, 0]) for path in (tmp_path / "out" / "boxes").iterdir()}
    assert rows == {"sa_000001": [3, 4, 5], "sa_000002": [7, 8]}
    again = write_shards(listed([*scenes, replace(scenes[0], id="sa_5000")]), tmp_path / "again", shard_size=2)
    with pytest.raises(ShardError, match="tar: sa_000001"):
        export_igligen(again, tmp_path / "out_again")


@pytest.mark.parametrize("flipped", [False, True])
def test_moments_are_drawn_for_each_scene_or_their_mean_is_taken(tmp_path, flipped):
    form = replace(SQUARE, moments=True)
    shards = write_shards(listed(SCENES, form), tmp_path / "shards", shard_size=2)
    if flipped:
        run_stage(Mirrored(), shards, tmp_path / "both")
        shards = tmp_path / "both"
    stored = {scene.id: moments.astype(np.float32) for scene, moments in listed(SCENES, form)}
    made = {}
    ways = {"sample": {}, "again": {"seed": 0}, "other": {"seed": 1}, "mode": {"latents": "mode"}}
    for name, settings in ways.items():
        counts = export_igligen(shards, tmp_path / name, **settings)
        assert counts["latents of mirrored pictures that the form does not hold"] == (3 if flipped else 0)
        content = np.load(tmp_path / name / "latents" / "sa_000000.npy", allow_pickle=True).item()
        made[name] = dict(zip(content["indices"], content["latents"], strict=True))
    for number in (3, 7):
        moments = stored[f"sa_{number}"]
        same(made["mode"][number], moments[:4].astype(np.float16))
        same(made["sample"][number], drawn(moments[None], f"sa_{number}", seed=0)[0].astype(np.float16))
        same(made["again"][number], made["sample"][number])
        noise = (np.float32(made["sample"][number]) - moments[:4]) / np.exp(moments[4:] / 2)
        assert 0.5 < noise.std() < 1.5
        assert abs(made["other"][number] - made["sample"][number]).max() > 0.1


class Mirrored(Stage):
    """A second latent beside each, as of the mirrored picture."""

    name = "mirrored"

    def settings(self):
        return {}

    def latent_form(self, given):
        return replace(given, flipped=True)

    def __call__(self, samples):
        for sample in samples:
            latent = np.load(io.BytesIO(sample.members[LATENT]))
            yield sample.with_latent(latent, flipped=latent[..., ::-1])


def test_boxes_alone_where_latents_are_not_wanted(tmp_path, capsys):
    shards = write_shards(listed(SCENES), tmp_path / "shards")
    given = ["task=export", "export.form=igligen", f"shards={shards}", "export.latents=null", "export.sizes=false"]
    prepare(compose("prepare", [*given, f"out={tmp_path / 'out'}"]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["boxes"]
    assert set(read_detections(tmp_path / "out" / "boxes" / "sa_000000.npy")) == {3, 7, 11}
    assert "3 pictures, 2 objects, 0 latents, 1 files" in capsys.readouterr().out


def test_what_cannot_be_told_is_refused_and_leaves_nothing(tmp_path):
    one = SCENES[0]
    squashed = Frame(original=(60, 40), target=(32, 32))
    wrong = {
        "sa_7: .*score": [replace(one, objects=(SceneObject(phrase="dog", box=(0, 0, 1, 1)),))],
        "dog: .*sa_123": [replace(one, id="dog")],
        "7: .*sa_7": [one, replace(one, id="7")],
        "export.sizes=false": [replace(one, frame=None)],
        "stage.transform.resize=crop": [replace(one, frame=squashed)],
        "../x": [replace(one, provenance={"tar": "../x"})],
    }
    for number, (words, scenes) in enumerate(wrong.items()):
        folder = tmp_path / str(number)
        shards = write_shards(listed(scenes), folder / "shards")
        with pytest.raises(ShardError, match=words) as caught:
            export_igligen(shards, folder / "out")
        assert "\n" not in str(caught.value)
        assert [path.name for path in folder.iterdir()] == ["shards"]
    for wrong in ("export.latents=mean", "export.seed=-1"):
        with pytest.raises(ValueError, match=wrong):
            compose("prepare", ["task=export", "shards=a", "out=b", wrong])


def test_a_latent_beyond_half_precision_is_refused(tmp_path):
    large = listed(SCENES)
    large.content = lambda *_: np.full(SQUARE.stored_shape, 1e6, np.float32)
    with pytest.raises(ShardError, match="sa_7: .*float16"):
        export_igligen(write_shards(large, tmp_path / "shards"), tmp_path / "out")
    assert ShardSet(tmp_path / "shards").index["counts"]["samples"] == 3
