"""Random numbers belong to (seed, position) or (seed, scene id), whatever the batch."""

from dataclasses import fields
from functools import partial

import pytest
import torch

from models.objectives import Draws
from models.objectives import draw as draw_samples
from models.objectives.draws import scene_generator, start_latents

SHAPE = (2, 3, 5)
draw = partial(draw_samples, methods=2)
NAMES = [field.name for field in fields(Draws)]


def rows(draws):
    """Each sample's numbers as one row."""
    return torch.cat([getattr(draws, name).double().reshape(len(draws.time), -1) for name in NAMES], dim=1)


def test_draws_depend_on_seed_and_position_alone():
    together = rows(draw(3, [11, 4, 2**40, 0], SHAPE))
    assert torch.equal(rows(draw(3, [4, 0], SHAPE)), together[[1, 3]])
    assert torch.equal(rows(draw(3, torch.tensor([2**40]), SHAPE)), together[2:3])


def test_how_many_methods_draw_for_themselves_changes_no_other_number():
    one, other = draw_samples(3, [7, 8], SHAPE), draw(3, [7, 8], SHAPE)
    assert one.methods.shape == (2, 0)
    assert other.methods.shape == (2, 2)
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES if name != "methods")


def test_the_global_generators_neither_matter_nor_change():
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), rows(draw(0, [5], SHAPE))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(rows(draw(0, [5], SHAPE)), first)


@pytest.mark.parametrize("name", NAMES)
def test_other_seeds_and_positions_give_other_numbers(name):
    # 2**32 apart: a generator that keeps 32 bits of its seed would repeat itself
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (0, 2**32), (0, 2**63), (0, 2**63 + 1)]
    values = [tuple(getattr(draw(seed, [position], SHAPE), name).flatten().tolist()) for seed, position in keys]
    assert len(set(values)) == len(keys)


def test_shapes_ranges_and_moments():
    draws = draw(0, range(20_000), (1, 1, 2))
    assert draws.noise.shape == (20_000, 1, 1, 2)
    assert draws.offset.shape == (20_000, 1, 1, 1)
    for uniform in (draws.time, draws.keep):
        assert uniform.shape == (20_000,)
        assert uniform.dtype == torch.float64
        assert 0 <= uniform.min() < uniform.max() < 1
        assert uniform.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 20_000) ** 0.5)
        assert uniform.var().item() == pytest.approx(1 / 12, rel=0.04)
    for normal in (draws.noise, draws.offset):
        assert normal.dtype == torch.float32
        assert normal.mean().item() == pytest.approx(0, abs=4 / 20_000**0.5)
        assert normal.var().item() == pytest.approx(1, rel=0.04)
    independent = torch.stack(
        [draws.time, draws.keep, draws.noise[:, 0, 0, 0].double(), draws.offset.flatten().double()]
    )
    off_diagonal = torch.corrcoef(independent) - torch.eye(4)
    assert off_diagonal.abs().max() < 4 / 20_000**0.5


def test_moved_draws_are_the_same_numbers():
    draws = draw(0, [1, 2], SHAPE)
    assert torch.equal(rows(draws.to(torch.device("cpu"))), rows(draws))


def test_start_latents_depend_on_seed_and_scene_id_alone():
    together = start_latents(0, ["b", "a", "ä"], SHAPE)
    assert together.shape == (3, *SHAPE)
    assert torch.equal(start_latents(0, ["a"], SHAPE)[0], together[1])
    assert torch.equal(start_latents(0, ["ä", "b"], SHAPE), together[[2, 0]])
    assert together.flatten(1).unique(dim=0).shape[0] == 3
    assert not torch.equal(start_latents(1, ["a"], SHAPE)[0], together[1])
    assert scene_generator(0, "a").random() == scene_generator(0, "a").random() != scene_generator(0, "b").random()
