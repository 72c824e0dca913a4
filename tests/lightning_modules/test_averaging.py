"""The moving average against its closed form; it neither touches nor keeps what it averages."""

import pytest
import torch
from torch import nn

from lightning_modules.averaging import MovingAverage


def weights_over_time(count=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(count)]


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)  # another dtype, so another group
        self.register_buffer("seen", torch.zeros(()))


def averaged(values, *, module=None, average=None, **settings):
    module = module or Weights()
    average = average or MovingAverage(module, **settings)
    for value in values:
        with torch.no_grad():
            module.matrix.copy_(value)
        average.update(module)
    return module, average


def test_it_equals_the_closed_form():
    values, decay = weights_over_time(), 0.9
    _, average = averaged(values, decay=decay, warmup=False)
    last = len(values) - 1
    expected = decay**last * values[0]
    for place, value in enumerate(values[1:], start=1):
        expected = expected + (1 - decay) * decay ** (last - place) * value
    torch.testing.assert_close(average.average.module.matrix.data, expected)


def test_the_warm_up_raises_the_decay_to_its_limit():
    values = weights_over_time()
    _, average = averaged(values, decay=0.5, warmup=True)
    expected = values[0]
    for count, value in enumerate(values[1:], start=1):
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    assert (1 + len(values)) / (10 + len(values)) > 0.5  # so that both branches were taken
    torch.testing.assert_close(average.average.module.matrix.data, expected)


def test_the_module_is_left_alone():
    values = weights_over_time()
    module, average = averaged(values, decay=0.9)
    assert torch.equal(module.matrix, values[-1])
    assert module.matrix.requires_grad
    assert not any(p.requires_grad for p in average.parameters())
    own = {p.data_ptr() for p in module.parameters()}
    assert not own & {p.data_ptr() for p in average.parameters()}


def test_buffers_are_the_present_ones():
    module, average = averaged(weights_over_time(3), decay=0.9)
    module.seen.fill_(5)
    average.update(module)
    assert average.average.module.seen == 5


def test_swapped_in_and_back_again():
    module, average = averaged(weights_over_time(), decay=0.9)
    parameters, present = list(module.parameters()), module.matrix.clone()
    with average.swapped_into(module):
        assert torch.equal(module.matrix, average.average.module.matrix)
        assert not torch.equal(module.matrix, present)
    assert torch.equal(module.matrix, present)
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))


def test_swapped_back_after_an_error_too():
    module, average = averaged(weights_over_time(), decay=0.9)
    present, mean = module.matrix.clone(), average.average.module.matrix.clone()
    with pytest.raises(KeyError), average.swapped_into(module):
        raise KeyError
    assert torch.equal(module.matrix, present)
    assert torch.equal(average.average.module.matrix, mean)


@pytest.mark.parametrize("warmup", [False, True])
def test_saved_and_loaded_it_goes_on_as_if_unbroken(warmup):
    values = weights_over_time()
    _, unbroken = averaged(values, decay=0.9, warmup=warmup)
    module, first = averaged(values[:5], decay=0.9, warmup=warmup)
    fresh = MovingAverage(module, decay=0.9, warmup=warmup)
    fresh.load_state_dict(first.state_dict())
    _, second = averaged(values[5:], module=module, average=fresh)
    states = unbroken.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert int(second.average.n_averaged) == len(values)


def test_only_the_adapters_are_averaged(short_run):
    _, module = short_run
    copies = dict(module.average.average.module.named_parameters())
    assert copies.keys() == dict(module.conditioning.named_parameters()).keys()
    assert all(name.startswith("adapters.regions.") for name in copies)
    assert int(module.average.average.n_averaged) == 4
