"""Inception Score: cases computed by hand, torchmetrics' own figure, and rows of the real classifier."""

import numpy as np
import pytest
import torch
from torchmetrics.image.inception import InceptionScore as Published

from metrics.base import NotAvailable
from metrics.inception_score import InceptionScore, inception_score, split_score


def rows_of(classes):
    return [{"scene": f"s{place:03d}", "probabilities": row} for place, row in enumerate(classes)]


@pytest.fixture(scope="module")
def classes():
    """(60, 9) probabilities."""
    logits = np.random.default_rng(0).normal(size=(60, 9)) * 2
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)


def test_sure_and_varied_pictures_score_the_number_of_classes_and_equal_ones_score_one():
    assert inception_score(np.eye(7)) == pytest.approx(7)
    assert inception_score(np.full((5, 7), 1 / 7)) == pytest.approx(1)
    assert inception_score(np.eye(7)[[2, 2, 2]]) == pytest.approx(1)


def test_two_pictures_score_what_is_computed_by_hand():
    """The mean is (1/2, 1/2): each diverges by .8 log 1.6 + .2 log .4."""
    wanted = np.exp(0.8 * np.log(1.6) + 0.2 * np.log(0.4))
    assert inception_score(np.array([[0.8, 0.2], [0.2, 0.8]])) == pytest.approx(wanted)


def test_the_score_of_the_whole_is_torchmetrics_own(classes):
    class Logits(torch.nn.Module):
        def forward(self, images):
            return torch.from_numpy(classes).log()

    with pytest.warns(UserWarning, match="will save all extracted features"):
        published = Published(feature=Logits(), splits=1)
    published.update(torch.zeros(60, 3, 4, 4, dtype=torch.uint8))
    with pytest.warns(UserWarning, match="std"):  # of one split
        wanted = float(published.compute()[0])
    value = InceptionScore(splits=1).compute(rows_of(classes))["inception_score"]
    assert value.mean == pytest.approx(wanted, rel=1e-5)
    assert value.low < value.mean < value.high


def test_the_figure_is_the_mean_over_splits_in_an_order_that_rows_do_not_decide(classes):
    rows = rows_of(classes)
    value = InceptionScore().compute(rows)["inception_score"]
    shuffled = [rows[place] for place in np.random.default_rng(3).permutation(60)]
    assert InceptionScore().compute(shuffled)["inception_score"] == value
    order = np.random.default_rng(0).permutation(60)
    assert value.mean == pytest.approx(np.mean([inception_score(classes[order[i : i + 6]]) for i in range(0, 60, 6)]))
    assert split_score(classes, 1) == pytest.approx(inception_score(classes))


def test_few_pictures_have_no_score_and_failures_are_counted(classes):
    rows = [*rows_of(classes[:39]), {"scene": "s999", "failure": "no picture"}]
    value = InceptionScore().compute(rows)["inception_score"]
    assert np.isnan(value.mean)
    assert (value.count, value.failed) == (0, 1)


def test_rows_are_probabilities_of_the_classifier(torchscript, pictures, named, tmp_path):
    metric = InceptionScore(weights=torchscript, splits=1, batch_size=3, cache=tmp_path).to("cpu")
    rows = metric.measure(pictures(5), named(5))
    assert all(row["probabilities"].shape == (1008,) for row in rows)
    assert all(row["probabilities"].sum() == pytest.approx(1, abs=1e-5) for row in rows)
    alone = [metric.measure([picture], [scene])[0] for picture, scene in zip(pictures(5), named(5), strict=True)]
    for one, other in zip(rows, alone, strict=True):
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-6)
    assert 1 < metric.compute(rows)["inception_score"].mean < 1008


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(NotAvailable, match=r"none\.pt: no such file; .*metric\.inception_score\.weights=FILE"):
        InceptionScore(weights=tmp_path / "none.pt").to("cpu")
    with pytest.raises(ValueError, match="splits: 0, subsets: 20"):
        InceptionScore(splits=0)
