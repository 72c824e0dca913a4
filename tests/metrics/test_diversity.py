"""LPIPS between two pictures of a scene: torchmetrics' own distance, with AlexNet's file at random weights."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
from torchvision.models import alexnet

from metrics.base import NotAvailable
from metrics.diversity import ALEXNET, Diversity


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in torchvision's form, in the folder structure of torch's hub; the classifier is not read and not there."""
    home = tmp_path_factory.mktemp("torch")
    path = home / "hub" / "checkpoints" / ALEXNET
    path.parent.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stored = {key: value for key, value in alexnet(weights=None).state_dict().items() if key.startswith("features")}
    torch.save(stored, path)
    return path


@pytest.fixture(scope="module")
def metric(weights):
    return Diversity(weights=weights, batch_size=2).to("cpu")


def test_distances_are_those_of_torchmetrics(metric, weights, pictures, named, monkeypatch):
    one, other = pictures(3, size=(70, 66)), pictures(3, seed=1, size=(70, 66))
    rows = metric.measure(one, named(3), again=other)

    def opened(**_):
        network = alexnet(weights=None)
        network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
        return network

    monkeypatch.setattr("torchvision.models.alexnet", opened)  # which would want the classifier's 230 MB too
    sides = [torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) / 255 for side in (one, other)]
    wanted = learned_perceptual_image_patch_similarity(*sides, net_type="alex", normalize=True, reduction="none")
    assert [row["diversity"] for row in rows] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert min(row["diversity"] for row in rows) > 0


def test_equal_pictures_are_at_no_distance_and_the_order_of_a_pair_does_not_matter(metric, pictures, named):
    one, other = pictures(2, size=(64, 64)), pictures(2, seed=1, size=(64, 64))
    assert [row["diversity"] for row in metric.measure(one, named(2), again=one)] == [0, 0]
    there, back = metric.measure(one, named(2), again=other), metric.measure(other, named(2), again=one)
    assert [row["diversity"] for row in there] == pytest.approx([row["diversity"] for row in back])


def test_rows_do_not_depend_on_their_company_and_pairs_that_cannot_be_compared_fail(metric, pictures, named):
    one = [*pictures(3, size=(64, 64)), *pictures(1, size=(70, 80)), *pictures(2, size=(40, 90))]
    other = [*pictures(3, seed=1, size=(64, 64)), *pictures(1, seed=1, size=(70, 80)), *pictures(1, size=(90, 40))]
    other.append(pictures(1, seed=1, size=(40, 90))[0])
    rows = metric.measure(one, named(6), again=other)
    alone = [metric.measure([a], [scene], again=[b])[0] for a, b, scene in zip(one, other, named(6), strict=True)]
    for row, single in zip(rows[:4], alone[:4], strict=True):
        assert row["diversity"] == pytest.approx(single["diversity"], rel=1e-5)
    assert rows[4]["failure"] == "pictures of (40, 90) and (90, 40) px cannot be compared"
    assert rows[5]["failure"] == "a picture of (40, 90) px is too small for AlexNet; 63 px are enough"
    value = metric.compute(rows)["diversity"]
    assert (value.count, value.failed) == (4, 2)
    assert value.mean == pytest.approx(np.mean([row["diversity"] for row in rows[:4]]))


def test_the_smallest_pictures_go_through(metric, pictures, named):
    rows = metric.measure(pictures(1, size=(63, 63)), named(1), again=pictures(1, seed=1, size=(63, 63)))
    assert np.isfinite(rows[0]["diversity"])


def test_a_second_picture_of_each_scene_is_needed(metric, pictures, named):
    with pytest.raises(ValueError, match="0 pictures for 2 scenes"):
        metric.measure(pictures(2), named(2))


def test_weights_that_are_not_there_are_named(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(NotAvailable) as error:
        Diversity().to("cpu")
    assert f"{tmp_path}/hub/checkpoints/{ALEXNET}: no such file; download it from https://" in str(error.value)
    assert "metric.diversity.weights=FILE" in str(error.value)
    assert Diversity().settings()["sha256"] is None
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(NotAvailable, match="not torchvision's AlexNet"):
        Diversity(weights=tmp_path / "other.pth").to("cpu")
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))
    assert len(Diversity().settings()["sha256"]) == 64
