"""Distances between two sets of features, and how far a figure of a whole set would move with other pictures.

The figures are clean-fid's own functions. Intervals are the delete-d jackknife: a distance cannot be averaged over scenes,
and a bootstrap, which repeats pictures, would be biased. Where features come from lives in `metrics.inception`.

Legend: N pictures with features of D numbers; M of the other set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from metrics.weights import quiet

KERNEL_SUBSETS, KERNEL_SIZE = 100, 1000  # KID's customary subsets


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean and covariance of a set of features.

    Attributes:
        mu: (D,) float64.
        sigma: (D, D) float64, unbiased.
    """

    mu: np.ndarray
    sigma: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Self:
        """Of features (N, D), in float64."""
        features = features.astype(np.float64)
        return cls(mu=features.mean(axis=0), sigma=np.atleast_2d(np.cov(features, rowvar=False)))


def frechet(features: np.ndarray, other: Gaussian, others: int | None = None) -> float:
    """The Frechet distance between the Gaussian of features and another.

    Covariances of full rank go through clean-fid's own function. With D pictures or fewer on either side its square root of a
    singular matrix may fail, and the same figure comes from eigenvalues (`quick_frechet`).

    Args:
        features: (N, D), N at least 2.
        other: Of D.
        others: Number of pictures that it is of; None: more than D.

    Returns:
        The squared distance.

    Source:
        Heusel et al. 2017, equation 6; `cleanfid.fid.frechet_distance`.
    """
    width = features.shape[1]
    if len(features) <= width or (others is not None and others <= width):
        return quick_frechet(features, other)
    from cleanfid.fid import frechet_distance

    mine = Gaussian.of(features)
    with quiet():
        return float(frechet_distance(mine.mu, mine.sigma, other.mu, other.sigma))


def quick_frechet(features: np.ndarray, other: Gaussian, root: np.ndarray | None = None) -> float:
    """The same distance by symmetric eigenvalues: exact where covariances are singular, and many times faster.

    The trace of (S T)^1/2 is the sum of the square roots of the eigenvalues of S T. With S = X'X/(N-1), these are those of
    X T X'/(N-1), N of them, and also those of T^1/2 S T^1/2, D of them: the smaller matrix is taken.

    Args:
        features: (N, D), N at least 2.
        other: Of D.
        root: (D, D), the square root of the other's covariance where it is at hand.

    Returns:
        The squared distance.
    """
    mine = features.astype(np.float64)
    mu = mine.mean(axis=0)
    centred = mine - mu
    if len(mine) <= mine.shape[1]:
        product = centred @ other.sigma @ centred.T / (len(mine) - 1)
    else:
        root = square_root(other.sigma) if root is None else root
        product = root @ (centred.T @ centred / (len(mine) - 1)) @ root
    roots = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    own = (centred**2).sum() / (len(mine) - 1)
    return float(((mu - other.mu) ** 2).sum() + own + np.trace(other.sigma) - 2 * roots)


def square_root(sigma: np.ndarray) -> np.ndarray:
    """The square root (D, D) of a covariance (D, D)."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def kernel(features: np.ndarray, others: np.ndarray, *, seed: int, subsets: int = KERNEL_SUBSETS) -> float:
    """The squared maximum mean discrepancy with the cubic kernel, unbiased: 0 on average for equal distributions.

    Args:
        features: (N, D), N at least 2.
        others: (M, D), M at least 2.
        seed: Of the subsets.
        subsets: How many subsets of up to 1000 pictures it is the mean of.

    Returns:
        The distance; below 0 by chance where the distributions are near each other.

    Source:
        Binkowski et al. 2018, Demystifying MMD GANs; `cleanfid.fid.kernel_distance`.
    """
    from cleanfid.fid import kernel_distance

    if len(features) == len(others) <= KERNEL_SIZE:
        subsets = 1  # each would be all pictures
    state = np.random.get_state()
    np.random.seed(seed)  # which clean-fid draws from
    try:
        return kernel_distance(others.astype(np.float64), features.astype(np.float64), subsets, KERNEL_SIZE)
    finally:
        np.random.set_state(state)


def half_width(
    figure: Callable[[np.ndarray], float], count: int, *, subsets: int = 20, most: int | None = None, seed: int = 0
) -> float:
    """Half the width of the 95 % interval of a figure of a set: 1.96 standard errors by the delete-d jackknife.

    The figure is computed over random subsets of half the pictures, drawn without repetition. Their spread about their own
    mean, times (m / (count - m))^1/2 for subsets of m, estimates that of the whole; for halves the factor is 1. What a small
    set adds to the figure on average, as to FID, is thus left out of the interval and stays in the figure.

    Args:
        figure: Of the pictures at given places.
        count: How many pictures there are, at least 4.
        subsets: How many subsets are drawn, at least 2.
        most: The largest subset; None for half of the pictures whatever that is.
        seed: Of the draw.

    Returns:
        Half of the interval's width.

    Source:
        Shao and Wu 1989, A General Theory for Jackknife Variance Estimation.
    """
    size = min(count // 2, most or count)
    generator = np.random.default_rng(seed)
    figures = [figure(np.sort(generator.choice(count, size, replace=False))) for _ in range(subsets)]
    return 1.96 * float(np.std(figures, ddof=1)) * (size / (count - size)) ** 0.5
