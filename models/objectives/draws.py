"""Random numbers that belong to a sample and not to a batch: training draws and the start latents of a picture.

Each is a pure function of its key, so that results do not change with batch size, ranks or restarts. What is done with
the numbers lives in the objective, in the condition drops and in the sampler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of B training samples.

    Attributes:
        time: (B,) float64 uniform in [0, 1), for the noise level.
        keep: (B,) float64 uniform in [0, 1), for which conditions are kept.
        noise: (B, C, h, w) standard normal.
        offset: (B, C, 1, 1) standard normal, for offset noise.
        methods: (B, methods) float64 uniform in [0, 1), for which scenes a method by itself does not see.
    """

    time: Tensor
    keep: Tensor
    noise: Tensor
    offset: Tensor
    methods: Tensor

    def to(self, device: torch.device) -> Draws:
        """The same numbers on another device."""
        return Draws(
            time=self.time.to(device),
            keep=self.keep,
            noise=self.noise.to(device),
            offset=self.offset.to(device),
            methods=self.methods,
        )


def draw(seed: int, positions: Iterable[int], shape: Sequence[int], *, methods: int = 0) -> Draws:
    """The numbers of the samples at global positions: a function of (seed, position) each.

    Args:
        seed: the run's seed.
        positions: B positions in the run's order of samples.
        shape: (C, h, w) of a latent.
        methods: how many methods have a drop rate of their own; the other numbers do not depend on it.

    Returns:
        The numbers of the B samples, on the CPU, in the order of `positions`.
    """
    time, keep, noise, offset, own = [], [], [], [], []
    for position in positions:
        generator = _generator(seed, int(position))
        time.append(generator.random())
        keep.append(generator.random())
        noise.append(generator.standard_normal(tuple(shape), dtype=np.float32))
        offset.append(generator.standard_normal((shape[0], 1, 1), dtype=np.float32))
        own.append(generator.random(methods))
    return Draws(
        time=torch.tensor(time, dtype=torch.float64),
        keep=torch.tensor(keep, dtype=torch.float64),
        noise=torch.from_numpy(np.stack(noise)),
        offset=torch.from_numpy(np.stack(offset)),
        methods=torch.from_numpy(np.stack(own)),
    )


def start_latents(seed: int, scene_ids: Iterable[str], shape: Sequence[int]) -> Tensor:
    """(B, C, h, w) standard normal latents to sample from: a function of (seed, scene id) each."""
    rows = [scene_generator(seed, scene_id).standard_normal(tuple(shape), dtype=np.float32) for scene_id in scene_ids]
    return torch.from_numpy(np.stack(rows))


def noise_generators(seed: int, scene_ids: Iterable[str], *, stream: int = 1) -> list[torch.Generator]:
    """B generators on the CPU for the noise of a picture's steps, a function of (seed, scene id, stream) each.

    They share nothing with the start latents. PyTorch keeps 32 bits of a seed: in 10 000 pictures two may share step noise.

    Args:
        seed: of the pictures.
        scene_ids: B ids.
        stream: from 1 up, for whoever draws more than once for a picture.

    Returns:
        The generators, in the order of the ids.
    """
    generators = []
    for scene_id in scene_ids:
        numbers = np.random.Generator(_stream(seed, _key(scene_id)).jumped(stream))
        generators.append(torch.Generator().manual_seed(int(numbers.integers(2**32))))
    return generators


def scene_generator(seed: int, scene_id: str, *, stream: int = 0) -> np.random.Generator:
    """The generator of one picture: stream 0 for where its sampling starts, another for whoever else draws."""
    return np.random.Generator(_stream(seed, _key(scene_id)).jumped(stream))


def _generator(seed: int, key: int) -> np.random.Generator:
    return np.random.Generator(_stream(seed, key))


def _key(scene_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(scene_id.encode(), digest_size=8).digest(), "little")


def _stream(seed: int, key: int) -> np.random.Philox:
    """Philox keyed by both numbers whole: PyTorch's CPU generator keeps only 32 bits of its seed."""
    return np.random.Philox(key=np.array([seed % 2**64, key % 2**64], dtype=np.uint64))
