"""The moving average against its closed form; it neither touches nor keeps what it averages."""

import pytest
import torch
from torch import nn

from lightning_modules.averaging import MovingAverage
from tests.run_files import equal

VALUES = list(torch.randn(12, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)  # another dtype, so another group
        self.register_buffer("seen", torch.zeros(()))


def averaged(values=VALUES, *, module=None, average=None, **settings):
    module = module or Weights()
    average = average or MovingAverage(module, **{"decay": 0.9} | settings)
    for value in values:
        with torch.no_grad():
            module.matrix.copy_(value)
        average.update(module)
    return module, average


def test_it_equals_the_closed_form():
    last, expected = len(VALUES) - 1, 0.9 ** (len(VALUES) - 1) * VALUES[0]
    for place, value in enumerate(VALUES[1:], start=1):
        expected = expected + 0.1 * 0.9 ** (last - place) * value
    torch.testing.assert_close(averaged(warmup=False)[1].average.module.matrix.data, expected)


def test_the_warm_up_raises_the_decay_to_its_limit():
    expected = VALUES[0]
    for count, value in enumerate(VALUES[1:], start=1):
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
    assert (1 + len(VALUES)) / (10 + len(VALUES)) > 0.5  # so that both branches were taken
    torch.testing.assert_close(averaged(decay=0.5, warmup=True)[1].average.module.matrix.data, expected)


def test_the_module_is_left_alone_and_its_buffers_are_the_present_ones():
    module, average = averaged()
    assert torch.equal(module.matrix, VALUES[-1])
    assert module.matrix.requires_grad
    assert not any(p.requires_grad for p in average.parameters())
    assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in average.parameters()}
    module.seen.fill_(5)
    average.update(module)
    assert average.average.module.seen == 5


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_in_and_back_again_after_an_error_too(fails):
    module, average = averaged()
    parameters, present, mean = list(module.parameters()), module.matrix.clone(), average.average.module.matrix.clone()
    try:
        with average.swapped_into(module):
            assert torch.equal(module.matrix, mean)
            assert not torch.equal(module.matrix, present)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert torch.equal(module.matrix, present)
    assert torch.equal(average.average.module.matrix, mean)
    assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))


@pytest.mark.parametrize("warmup", [False, True])
def test_saved_and_loaded_it_goes_on_as_if_unbroken(warmup):
    _, unbroken = averaged(warmup=warmup)
    module, first = averaged(VALUES[:5], warmup=warmup)
    fresh = MovingAverage(module, decay=0.9, warmup=warmup)
    fresh.load_state_dict(first.state_dict())
    _, second = averaged(VALUES[5:], module=module, average=fresh)
    assert equal(unbroken.state_dict(), second.state_dict())
    assert int(second.average.n_averaged) == len(VALUES)


def test_only_the_adapters_are_averaged(short_run):
    _, module = short_run
    copies = dict(module.average.average.module.named_parameters())
    assert copies.keys() == dict(module.conditioning.named_parameters()).keys()
    assert all(name.startswith("adapters.regions.") for name in copies)
    assert int(module.average.average.n_averaged) == 4
