"""The base's training for places: what the loss measures, and that training brings it down."""

import pytest
import torch

from lightning_modules.shapes_base import SCALE, WEIGHT, ShapesBase, _away
from runtime.build import build_data, build_module
from scenes import SceneBatch

COMMON = ("conditioning=none", "callback=[]", "logger=[]", "trainer.max_steps=40", "optimizer.learning_rate=3e-3")
PLACES = "module=lightning_modules.shapes_base.ShapesBase"


@pytest.fixture(scope="module")
def settings(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return lambda *own: short(folder, *COMMON, *own, without=["conditioning", "callback"])


def batch_of(cfg, count=8):
    data = build_data(cfg)
    data.prepare_data()
    data.setup("fit")
    return data.held_out(count)


def test_hidden_states_that_say_their_places_are_not_away():
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    hidden = torch.randn(2, 16, 64)
    for channel, place in enumerate((rows, columns)):
        hidden[..., channel] = (place.flatten() * 2 + 1) / 4 - 1
    hidden[..., 2:] = torch.nn.functional.layer_norm(hidden[..., 2:], (62,))
    # the layer norm leaves the first two nearly as they are, so that SCALE times the place is SCALE - 1 times it away
    expected = ((SCALE - 1) * hidden[..., :2]).square().mean()
    assert torch.allclose(_away(hidden), expected.expand(2), atol=0.1)
    hidden[..., :2] *= SCALE
    assert (_away(hidden) < 0.15).all()
    assert (_away(hidden.flip(1)) > 3).all()


def test_the_loss_is_that_of_the_shared_step_and_the_distance(settings):
    plain = build_module(settings())
    places = build_module(settings(PLACES))
    assert type(places) is ShapesBase
    batch = batch_of(settings())
    keys = list(range(8))
    with torch.no_grad():
        more = places.losses(batch, keys) - plain.losses(batch, keys)
    assert (more > 0).all()
    assert (more < WEIGHT * 10).all()


def test_training_keeps_places_in_the_hidden_states(settings, fit):
    cfg = settings(PLACES)
    batch, keys = batch_of(cfg), list(range(8))
    away = []
    for module in (build_module(cfg), fit(cfg)):
        with torch.no_grad():
            away.append(module.parts(batch, keys)["places"].mean().item() / WEIGHT)
    assert away[1] < 0.6 * away[0]


def test_sampling_keeps_nothing(settings):
    module = build_module(settings(PLACES, "sampler.steps=1"))
    batch = batch_of(settings(), 2)
    module.sample(SceneBatch(batch.scenes.scenes), seed=0)
    assert module._found is None
