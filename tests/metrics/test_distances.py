"""Distances of sets of features, by cases that can be computed by hand, and the intervals around them."""

import numpy as np
import pytest
import torch
from cleanfid.fid import fid_from_feats, kernel_distance
from torchmetrics.image.kid import poly_mmd

from metrics.distances import Gaussian, frechet, half_width, kernel, quick_frechet, square_root
from metrics.weights import quiet


def exactly(mean, variances, count, seed=0):
    """Features (count, D) whose mean and covariance are exactly diag(variances) and the mean."""
    noise = np.random.default_rng(seed).normal(size=(count, len(variances)))
    noise -= noise.mean(axis=0)
    white = noise @ np.linalg.inv(square_root(np.cov(noise, rowvar=False)))
    return white * np.sqrt(variances) + mean


def test_frechet_distance_of_gaussians_is_the_one_computed_by_hand():
    """Independent coordinates: the sum of (m - n)^2 + (s - t)^2."""
    mine = exactly([1.0, 0.0, 2.0], [4.0, 1.0, 9.0], 50)
    theirs = Gaussian.of(exactly([0.0, 0.0, 4.0], [1.0, 1.0, 16.0], 70, seed=1))
    wanted = (1 + 0 + 4) + (1 + 0 + 1)
    assert frechet(mine, theirs) == pytest.approx(wanted, rel=1e-9)
    assert quick_frechet(mine, theirs) == pytest.approx(wanted, rel=1e-9)
    assert quick_frechet(mine, theirs, square_root(theirs.sigma)) == pytest.approx(wanted, rel=1e-9)


def test_a_translation_adds_its_squared_length():
    features = np.random.default_rng(0).normal(size=(60, 5))
    assert frechet(features + [3.0, 0, 0, 4.0, 0], Gaussian.of(features)) == pytest.approx(25)


@pytest.mark.parametrize("count", [6, 40, 400])
def test_identical_sets_are_at_no_distance(count):
    features = np.random.default_rng(0).normal(size=(count, 40)).astype(np.float32)
    scale = np.trace(Gaussian.of(features).sigma)
    assert abs(frechet(features, Gaussian.of(features), others=count)) < 1e-5 * scale


@pytest.mark.parametrize("count", [7, 31, 300])
def test_the_quick_distance_is_that_of_clean_fid(count):
    generator = np.random.default_rng(count)
    mixing = generator.normal(size=(30, 30))
    mine, theirs = generator.normal(size=(count, 30)) @ mixing, 1.2 * generator.normal(size=(count, 30)) @ mixing + 0.3
    with quiet():
        wanted = fid_from_feats(mine, theirs)
    assert quick_frechet(mine, Gaussian.of(theirs)) == pytest.approx(wanted, rel=1e-4)
    assert frechet(mine, Gaussian.of(theirs), others=count) == pytest.approx(wanted, rel=1e-4)


def test_kernel_distance_of_two_pictures_each_is_the_one_computed_by_hand():
    """One number a picture, kernel (xy + 1)^3; self-pairs left out of the means within a set, none left out across."""
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [-1.0]])
    within = 1 + (1 - 2) ** 3
    across = (1 + 1 + 3**3 + 0) / 4
    assert kernel(x, y, seed=0) == pytest.approx(within - 2 * across)


def test_kernel_distance_is_torchmetrics_own_and_clean_fid_s_over_its_subsets():
    generator = np.random.default_rng(0)
    mine, theirs = generator.normal(size=(60, 9)), generator.normal(size=(60, 9)) + 0.4
    wanted = float(poly_mmd(torch.from_numpy(mine), torch.from_numpy(theirs)))
    assert kernel(mine, theirs, seed=0) == pytest.approx(wanted, rel=1e-6)
    other = generator.normal(size=(45, 9))
    state = np.random.get_state()
    drawn = kernel(mine, other, seed=3, subsets=7)
    assert np.array_equal(np.random.get_state()[1], state[1])  # the process's own numbers are left as they were
    np.random.seed(3)
    assert drawn == kernel_distance(other, mine, 7, 1000)
    np.random.set_state(state)


def test_kernel_distance_is_unbiased():
    """Equal distributions: 0 on average, and below as often as above, where FID is always above."""
    generator = np.random.default_rng(0)
    found = [kernel(*generator.normal(size=(2, 12, 4)), seed=0) for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20
    assert 0.3 < np.mean(np.array(found) < 0) < 0.8


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(size=800)
    wanted = 1.96 * values.std(ddof=1) / np.sqrt(800)
    for most in (None, 100):  # halves, and smaller subsets whose spread is scaled
        found = half_width(lambda places: float(values[places].mean()), 800, subsets=400, most=most)
        assert found == pytest.approx(wanted, rel=0.12)


def test_the_interval_of_fid_is_about_its_spread_over_fresh_sets():
    generator = np.random.default_rng(0)
    truth = Gaussian(mu=np.zeros(4), sigma=np.eye(4))
    sets = [generator.normal(size=(300, 4)) * 1.3 + 0.5 for _ in range(60)]
    spread = 1.96 * np.std([quick_frechet(features, truth) for features in sets], ddof=1)
    found = [half_width(lambda p, f=f: quick_frechet(f[p], truth), 300, seed=i) for i, f in enumerate(sets[:15])]
    assert np.mean(found) == pytest.approx(spread, rel=0.25)
