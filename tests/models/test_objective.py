"""The objective by its identities: targets invert, weights agree on the error of the picture, noise has its variance."""

from types import SimpleNamespace

import pytest
import torch

from models.objectives import DiffusionObjective, draw

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
SHAPE = (3, 6, 5)


def objective(own="epsilon", **settings):
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 800,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": PREDICTIONS[own],
    }
    return DiffusionObjective(config, **settings)


@pytest.fixture(scope="module")
def sample():
    """Latents, noise and times of 7 samples, over all noise levels."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(7, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    return SimpleNamespace(latents=latents, noise=noise, times=torch.tensor([0, 1, 40, 200, 400, 650, 799]))


def levels(learnt, times):
    """Signal and noise amplitude (B, 1, 1, 1) by the definition: cumulated products of 1 - beta."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 800, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[times].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1 - alpha).sqrt()


def picture_of(prediction, noised, signal, sigma, kind):
    """The latents that a prediction stands for."""
    if kind == "epsilon":
        return (noised - sigma * prediction) / signal
    return signal * noised - sigma * prediction if kind == "v" else prediction


def prediction_of(latents, noised, signal, sigma, kind):
    """The prediction that stands for latents, the inverse of `picture_of`."""
    if kind == "epsilon":
        return (noised - signal * latents) / sigma
    return (signal * noised - latents) / sigma if kind == "v" else latents


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_target_gives_the_latents_back(kind, sample):
    learnt = objective(kind)
    noised = learnt.corrupt(sample.latents, sample.noise, sample.times)
    target = learnt.target(sample.latents, sample.noise, sample.times)
    signal, sigma = levels(learnt, sample.times)
    torch.testing.assert_close(noised, signal * sample.latents + sigma * sample.noise, atol=1e-5, rtol=1e-5)
    found = picture_of(target, noised, signal, sigma, kind)
    torch.testing.assert_close(found, sample.latents, atol=2e-4, rtol=1e-4)


def test_corruption_keeps_unit_variance_and_follows_the_schedule():
    learnt = objective()
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 64, 64, generator=generator)
    times = torch.tensor([0, 100, 300, 600, 799])
    noised = learnt.corrupt(latents, noise, times)
    torch.testing.assert_close(noised.flatten(1).var(1), torch.ones(5), atol=0.05, rtol=0)
    alone = learnt.corrupt(torch.zeros_like(latents), noise, times).flatten(1).var(1)
    assert alone.diff().gt(0).all()
    torch.testing.assert_close(alone, 1 - learnt.alphas_cumprod[times], atol=0.02, rtol=0.05)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_the_picture_alike_for_every_prediction(kind, gamma, sample):
    learnt = objective(kind, min_snr_gamma=gamma)
    noised = learnt.corrupt(sample.latents, sample.noise, sample.times)
    signal, sigma = levels(learnt, sample.times)
    error = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    predicted = prediction_of(sample.latents + error, noised, signal, sigma, kind)
    ratio = (signal / sigma).square().flatten()
    assert ratio.max() > gamma > ratio.min()
    expected = ratio.clamp(max=gamma) * error.square().flatten(1).mean(1)
    losses = learnt.losses(predicted, sample.latents, sample.noise, sample.times)
    torch.testing.assert_close(losses.double(), expected, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_without_min_snr_the_loss_is_the_plain_mean_squared_error(kind, sample):
    learnt = objective(kind)
    predicted = torch.ones(7, *SHAPE)
    target = learnt.target(sample.latents, sample.noise, sample.times)
    losses = learnt.losses(predicted, sample.latents, sample.noise, sample.times)
    torch.testing.assert_close(losses.double(), (predicted - target).square().mean((1, 2, 3)))
    assert losses.dtype == torch.float32


def test_losses_are_each_samples_own(sample):
    learnt = objective(min_snr_gamma=5.0)
    predicted = torch.zeros(7, *SHAPE)
    before = learnt.losses(predicted, sample.latents, sample.noise, sample.times)
    predicted[3] += 1
    after = learnt.losses(predicted, sample.latents, sample.noise, sample.times)
    assert before.shape == (7,)
    assert (before != after).nonzero().flatten().tolist() == [3]


def test_times_cover_all_levels_evenly_by_default():
    learnt = objective()
    uniform = torch.linspace(0, 1, 801, dtype=torch.float64)[:-1] + 1e-9
    assert learnt.times(SimpleNamespace(time=uniform)).tolist() == list(range(800))
    assert learnt.times(SimpleNamespace(time=torch.tensor([0.0, 1 - 2**-53]))).tolist() == [0, 799]


@pytest.mark.parametrize(("low", "high", "factor"), [(0, 200, 3.0), (600, 800, 0.5), (200, 400, 0.0), (100, 700, 10.0)])
def test_a_time_bias_draws_an_interval_more_or_less_often(low, high, factor):
    uniform = (torch.arange(80_000, dtype=torch.float64) + 0.5) / 80_000
    times = objective(time_bias={"low": low, "high": high, "factor": factor}).times(SimpleNamespace(time=uniform))
    counts = torch.bincount(times, minlength=800).double()
    inside = torch.zeros(800, dtype=torch.bool)
    inside[low:high] = True
    expected = torch.where(inside, factor, 1.0).double()
    torch.testing.assert_close(counts, expected / expected.sum() * 80_000, atol=1.01, rtol=0)


@pytest.mark.parametrize("power", [0.5, 2.0, 3.0])
def test_a_time_power_moves_the_density(power):
    uniform = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    times = objective(time_power=power).times(SimpleNamespace(time=uniform))
    assert 0 <= times.min() <= times.max() <= 799
    for share in (0.25, 0.5, 0.75):  # P(t < share) = share**power
        assert (times < 800 * share).double().mean().item() == pytest.approx(share**power, abs=2e-3)


def test_offset_noise_is_constant_over_a_channel():
    draws = draw(0, range(4), SHAPE)
    plain, offset = objective().noise(draws), objective(offset_noise=0.1).noise(draws)
    assert torch.equal(plain, draws.noise)
    added = (offset - plain).flatten(2)
    torch.testing.assert_close(added, 0.1 * draws.offset.flatten(2).expand_as(added), atol=1e-6, rtol=0)
    assert added.mean(2).flatten().unique().numel() == 12


def test_half_precision_leaves_the_noise_levels_alone(sample):
    learnt = objective("v", min_snr_gamma=5.0)
    expected = learnt.weight(sample.times), learnt.corrupt(sample.latents, sample.noise, sample.times)
    half = torch.nn.ModuleList([learnt]).to(torch.bfloat16)[0]
    assert torch.equal(half.weight(sample.times), expected[0])
    assert torch.equal(half.corrupt(sample.latents, sample.noise, sample.times), expected[1])


def test_the_state_has_no_noise_levels():
    assert objective().state_dict() == {}


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_backbone_takes_the_backbones_prediction(kind):
    assert objective(kind).prediction == objective(kind, prediction=kind).prediction == kind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prediction": "v"},
            "objective.prediction: v but the backbone predicts epsilon; set objective.prediction=eps",
        ),
        ({"prediction": "noise"}, "objective.prediction: 'noise' is unknown; take epsilon, v, sample or backbone"),
        ({"min_snr_gamma": 0.0}, "objective.min_snr_gamma: 0.0 is not above 0"),
        ({"min_snr_gamma": -5.0}, "objective.min_snr_gamma: -5.0 is not above 0"),
        ({"time_bias": {"low": 1}}, "objective.time_bias: .* needs low, high and factor"),
        ({"time_bias": {"low": 9, "high": 9, "factor": 2}}, "objective.time_bias: low=9, high=9"),
        ({"time_bias": {"low": 0, "high": 9, "factor": 2}, "time_power": 2.0}, "beside time_power=2.0"),
        ({"time_power": 0.0}, "objective.time_power: 0.0 is not above 0; take 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        objective(**settings)
