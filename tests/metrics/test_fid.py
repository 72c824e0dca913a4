"""FID and KID of rows: what they are compared with, what is refused, and equality with clean-fid on two folders."""

import logging

import numpy as np
import pytest
import torch
from cleanfid import fid
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from metrics.base import NotAvailable
from metrics.fid import FID, Reference
from metrics.weights import quiet


def rows_of(features, *, start=0):
    return [{"scene": f"s{start + place:03d}", "features": row} for place, row in enumerate(features)]


@pytest.fixture(scope="module")
def sets():
    """Rows of generated and of true pictures, 120 of 10 numbers."""
    generator = np.random.default_rng(0)
    mine = generator.normal(size=(120, 10)) * 1.2 + 0.3
    return rows_of(mine.astype(np.float32)), rows_of(generator.normal(size=(120, 10)).astype(np.float32))


@pytest.fixture(scope="module")
def measured(torchscript, pictures, named):
    """Rows of 8 generated and 8 true pictures by the scripted network."""
    metric = FID(weights=torchscript, batch_size=3)
    return metric.measure(pictures(8), named(8)), metric.measure(pictures(8, seed=1), named(8))


def cut(rows, width=48):
    """Rows of the first features alone: the square root of 2048 x 2048 takes half a minute."""
    return [{**row, "features": row["features"][:width]} for row in rows]


def test_rows_hold_features_and_the_scene(measured):
    rows, _ = measured
    assert [row["scene"] for row in rows] == [f"s{place:03d}" for place in range(8)]
    assert all(row["features"].shape == (2048,) and row["features"].dtype == np.float32 for row in rows)


@pytest.mark.parametrize("form", ["clean", "legacy_tensorflow", "legacy_pytorch"])
def test_two_folders_are_as_far_apart_as_clean_fid_says(form, torchscript, state_dict, pictures, named, tmp_path):
    """From picture files to the figure on both sides; the last with the whole Inception at random weights."""
    is_whole = form == "legacy_pytorch"
    count = 4 if is_whole else 8
    sides = {"generated": pictures(count), "true": pictures(count, seed=1)}
    for name, images in sides.items():
        (tmp_path / name).mkdir()
        for place, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{place}.png")
    metric = FID(mode=form, weights=state_dict if is_whole else torchscript).to("cpu")
    network = metric.inception.network
    with quiet():
        wanted = fid.compute_fid(
            str(tmp_path / "generated"),
            str(tmp_path / "true"),
            mode=form,
            custom_feat_extractor=lambda x: (network(x / 255)[0].flatten(1) if is_whole else network(x))[:, :48],
            num_workers=0,
            device=torch.device("cpu"),
            verbose=False,
        )
    rows = {name: cut(metric.measure(images, named(count))) for name, images in sides.items()}
    value = metric.compute(rows["generated"], true=rows["true"])[f"fid_{form}"]
    assert wanted > 0
    assert value.mean == pytest.approx(wanted, rel=1e-3)


def test_a_figure_of_full_rank_is_clean_fid_s(sets):
    mine, true = (np.stack([row["features"] for row in side]) for side in sets)
    values = FID().compute(sets[0], true=sets[1])
    with quiet():
        wanted = fid.fid_from_feats(mine.astype(np.float64), true.astype(np.float64))
    assert values["fid_clean"].mean == pytest.approx(wanted, rel=1e-9)
    assert values["kid_clean"].mean == pytest.approx(fid.kernel_distance(true, mine, 1), rel=1e-5)
    assert values["fid_clean"].count == values["kid_clean"].count == 120
    for value in values.values():
        assert value.low < value.mean < value.high


class Flat(torch.nn.Module):
    """The pixels of a picture as its features."""

    def forward(self, images):
        return images.flatten(1).float()


def test_fid_is_torchmetrics_own():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 90, 3, 2, 2), dtype=np.uint8))
    images[0] = images[0] // 2
    theirs = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    theirs.update(images[0], real=False)
    theirs.update(images[1], real=True)
    rows, true = (rows_of(side.flatten(1).float().numpy()) for side in images)
    assert FID().compute(rows, true=true)["fid_clean"].mean == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_identical_sets_are_at_no_distance_and_without_spread(measured, sets):
    for rows in (measured[0], sets[0]):
        values = FID().compute(rows, true=rows)
        scale = np.var([row["features"] for row in rows], axis=0).sum()
        assert abs(values["fid_clean"].mean) < 1e-3 * scale
        assert values["fid_clean"].high - values["fid_clean"].low < 1e-3 * scale


def test_values_do_not_depend_on_the_order_of_rows_or_on_batches(sets, torchscript, pictures, named):
    order = np.random.default_rng(0).permutation(120)
    there = FID().compute(sets[0], true=sets[1])
    assert FID().compute([sets[0][i] for i in order], true=[sets[1][i] for i in order]) == there
    assert FID(seed=1).compute(sets[0], true=sets[1])["fid_clean"].low != there["fid_clean"].low
    metric = FID(weights=torchscript, batch_size=5)
    whole = metric.measure(pictures(6), named(6))
    parts = [*metric.measure(pictures(6)[:1], named(6)[:1]), *metric.measure(pictures(6)[1:], named(6)[1:])]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one["features"], other["features"], atol=1e-6)


def test_a_reference_gives_the_figures_of_its_pictures(sets, tmp_path):
    path = tmp_path / "kept" / "val.npz"
    FID().save_reference(path, sets[1], split="shapes validation")
    stored = Reference.load(path)
    assert (stored.mode, stored.split, stored.count, stored.features.shape) == (
        "clean",
        "shapes validation",
        120,
        (120, 10),
    )
    kept, direct = FID(reference=path).compute(sets[0]), FID().compute(sets[0], true=sets[1])
    assert kept["fid_clean"].mean == pytest.approx(direct["fid_clean"].mean, rel=1e-9)
    assert kept["kid_clean"].mean == pytest.approx(direct["kid_clean"].mean, rel=1e-9)
    assert kept["fid_clean"].high - kept["fid_clean"].low > 0
    FID().save_reference(path, sets[1], split="shapes validation", features=False)
    assert list(FID(reference=path).compute(sets[0])) == ["fid_clean"]


def test_a_reference_of_another_network_is_refused(sets, measured, torchscript, state_dict, tmp_path):
    path = tmp_path / "val.npz"
    FID(weights=torchscript).save_reference(path, measured[1], split="val")
    with pytest.raises(
        ValueError, match=r"metric\.fid_laion_sg\.reference: .* is of mode clean, asked for is laion_sg"
    ):
        FID(mode="laion_sg", weights=state_dict, reference=path).compute(measured[0])
    with pytest.raises(ValueError, match="is of mode clean"):  # before any picture is measured
        FID(mode="legacy_tensorflow", weights=torchscript, reference=path).to("cpu")
    with pytest.raises(ValueError, match="features of 2048 numbers, these have 10"):
        FID(weights=torchscript, reference=path).compute(sets[0])
    other = tmp_path / "inception-2015-12-05.pt"
    other.write_bytes(torchscript.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="is of weights"):
        FID(weights=other, reference=path).compute(measured[0])
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(
        ValueError, match="holds no count, mode, split, weights; write it by evaluate.py references=DIR"
    ):
        Reference.load(path)
    with pytest.raises(NotAvailable, match=r"none\.npz: no such file"):
        FID(reference=tmp_path / "none.npz").compute(sets[0])


def test_fewer_pictures_than_asked_for_are_an_error_and_more_are_left_out(sets):
    with pytest.raises(ValueError, match=r"metric\.fid\.pictures: 121 asked for, but there are features of 120"):
        FID(pictures=121).compute(sets[0], true=sets[1])
    some = FID(pictures=50).compute(sets[0], true=sets[1])
    assert some == FID().compute(sets[0][:50], true=sets[1][:50])
    assert some["fid_clean"].count == 50


def test_few_pictures_are_said_to_be_few(sets, caplog):
    with caplog.at_level(logging.WARNING):
        FID().compute(sets[0], true=sets[1])
        assert not caplog.records
        FID().compute(sets[0][:10], true=sets[1][:10])
        assert "metric.fid: of 10 pictures, fewer than the 11" in caplog.text
        values = FID().compute(sets[0][:3], true=sets[1][:3])
    assert values["fid_clean"].count == 0
    assert np.isnan(values["kid_clean"].mean)


def test_true_pictures_of_other_scenes_are_refused_and_failures_are_counted(sets):
    with pytest.raises(ValueError, match="rows of true pictures for 120 rows, or of other scenes"):
        FID().compute(sets[0], true=sets[1][:-1])
    broken = [{"scene": "s000", "failure": "no picture"}, *sets[0][1:]]
    value = FID().compute(broken, true=sets[1])["fid_clean"]
    assert (value.count, value.failed) == (119, 1)
    assert value.mean == FID().compute(sets[0][1:], true=sets[1][1:])["fid_clean"].mean


def test_features_are_kept_by_picture(torchscript, pictures, named, tmp_path, monkeypatch):
    metric = FID(weights=torchscript, cache=tmp_path)
    first = metric.measure(pictures(4), named(4))
    asked = []
    extract = metric.inception.features
    monkeypatch.setattr(metric.inception, "features", lambda images: asked.append(len(images)) or extract(images))
    again = metric.measure([*pictures(4)[::-1], *pictures(1, seed=5)], named(5))
    assert asked == [1]  # the new one alone
    for one, other in zip(first, again[3::-1], strict=True):
        assert np.array_equal(one["features"], other["features"])
    FID(weights=torchscript, mode="legacy_tensorflow", cache=tmp_path).measure(pictures(1), named(1))
    assert len(list(tmp_path.iterdir())) == 2  # modes are kept apart
    assert not list(tmp_path.rglob("*.tmp"))


def test_settings_are_json_values_and_numbers_that_make_no_figure_are_refused(torchscript):
    settings = FID(weights=torchscript, pictures=5000).settings()
    assert settings["mode"] == "clean"
    assert settings["pictures"] == 5000
    assert settings["reference"] is None
    with pytest.raises(ValueError, match="subsets: 1 have no spread"):
        FID(subsets=1)
    with pytest.raises(ValueError, match="pictures: 3 have no halves"):
        FID(pictures=3)
