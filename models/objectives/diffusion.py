"""The diffusion objective: noise levels, corruption, target and weight, on the backbone's own noise schedule.

Epsilon, v and sample prediction, min-SNR weights and offset noise are settings of one class. Sampling lives elsewhere.

Legend: B pictures, (C, h, w) a latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from models.objectives.draws import Draws

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


class DiffusionObjective(nn.Module):
    """Mean squared error to the target, per sample, weighted by noise level.

    Args:
        scheduler_config: the backbone's diffusers scheduler config.
        prediction: "epsilon", "v" or "sample", as the backbone predicts; "backbone" takes the backbone's.
        min_snr_gamma: cut of the signal-to-noise ratio in the weight; None weights all levels alike.
        offset_noise: strength of noise that is constant over a channel.
        time_power: 1 draws all noise levels alike; above 1 the density of a level t grows as t**(time_power - 1), for
            what is decided at high noise: where things are.
        time_bias: levels to draw more or less often than the others, as {"low": 0, "high": 250, "factor": 2.0}: those in
            [low, high) are drawn `factor` times as often; None draws all alike. IGLIGEN-XL's "earlier", "later" and
            "range" are such intervals.

    Raises:
        ValueError: an unknown prediction, another one than the backbone's, or a value out of range.

    Source:
        Ho et al. 2020 (epsilon), eq. 14; Salimans & Ho 2022 (v), section 4; Hang et al. 2023 (min-SNR), eq. 6 for each
        prediction.
    """

    def __init__(
        self,
        scheduler_config: Mapping[str, Any],
        *,
        prediction: str = "backbone",
        min_snr_gamma: float | None = None,
        offset_noise: float = 0.0,
        time_power: float = 1.0,
        time_bias: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        schedule: Any = DDPMScheduler.from_config(dict(scheduler_config))
        published = schedule.config.prediction_type
        own = next((name for name, value in PREDICTIONS.items() if value == published), None)
        if own is None:
            raise ValueError(
                f"backbone.scheduler.prediction_type: {published!r} is unknown; take {', '.join(PREDICTIONS.values())}"
            )
        if prediction not in (*PREDICTIONS, "backbone"):
            raise ValueError(f"objective.prediction: {prediction!r} is unknown; take epsilon, v, sample or backbone")
        if prediction not in (own, "backbone"):
            raise ValueError(
                f"objective.prediction: {prediction} but the backbone predicts {own}; set objective.prediction={own}"
            )
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ValueError(f"objective.min_snr_gamma: {min_snr_gamma} is not above 0; take 5, or null for no weight")
        if time_power <= 0:
            raise ValueError(f"objective.time_power: {time_power} is not above 0; take 1 for uniform levels")
        self.time_bias = _checked_bias(time_bias, levels=schedule.config.num_train_timesteps, power=time_power)
        self.prediction = own
        self.time_power = time_power
        self.min_snr_gamma = min_snr_gamma
        self.offset_noise = offset_noise
        self.steps: int = schedule.config.num_train_timesteps
        # no buffer: brought to half precision with the module, the highest signal level would round to 1
        self.alphas_cumprod: Tensor = schedule.alphas_cumprod

    def times(self, draws: Draws) -> Tensor:
        """(B,) int64 noise levels in [0, steps)."""
        share = draws.time ** (1 / self.time_power)
        if self.time_bias is not None:
            share = _biased(share, *self.time_bias)
        return (share * self.steps).long().clamp(max=self.steps - 1)

    def noise(self, draws: Draws) -> Tensor:
        """(B, C, h, w) noise, offset included."""
        return draws.noise + self.offset_noise * draws.offset if self.offset_noise else draws.noise

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(B, C, h, w) latents at noise level `times`."""
        signal, sigma = self._levels(times)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(B, C, h, w) what the denoiser should predict."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        signal, sigma = self._levels(times)
        return signal * noise - sigma * latents

    def weight(self, times: Tensor) -> Tensor:
        """(B,) weights of the noise levels."""
        if self.min_snr_gamma is None:
            return torch.ones(times.shape, device=times.device)
        alpha = self._alpha(times)
        ratio = alpha / (1 - alpha)
        cut = ratio.clamp(max=self.min_snr_gamma)
        divisor = {"epsilon": ratio, "v": ratio + 1, "sample": torch.ones_like(ratio)}[self.prediction]
        return cut / divisor

    def losses(self, prediction: Tensor, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(B,) weighted mean squared errors in fp32."""
        error = prediction.float() - self.target(latents, noise, times).float()
        return error.square().flatten(1).mean(dim=1) * self.weight(times)

    def _levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alpha(times).view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def _alpha(self, times: Tensor) -> Tensor:
        self.alphas_cumprod = self.alphas_cumprod.to(times.device)
        return self.alphas_cumprod[times]


def _checked_bias(bias: Mapping[str, float] | None, *, levels: int, power: float) -> tuple[float, float, float] | None:
    """(low, high, factor) with the interval as shares of the levels; None for no bias."""
    if bias is None:
        return None
    if set(bias) != {"low", "high", "factor"}:
        raise ValueError(
            f"objective.time_bias: {dict(bias)} needs low, high and factor, such as {{low: 0, high: 250, factor: 2}}"
        )
    low, high, factor = bias["low"], bias["high"], bias["factor"]
    if not 0 <= low < high <= levels or factor < 0 or (factor == 0 and (low, high) == (0, levels)):
        raise ValueError(
            f"objective.time_bias: low={low}, high={high}, factor={factor}; take 0 <= low < high <= {levels} and a factor above 0"
        )
    if power != 1:
        raise ValueError(f"objective.time_bias: given beside time_power={power}; take one of them")
    return low / levels, high / levels, factor


def _biased(share: Tensor, low: float, high: float, factor: float) -> Tensor:
    """Uniform numbers (B,) in [0, 1) made `factor` times as dense in [low, high): the inverse of the distribution."""
    total = 1 + (factor - 1) * (high - low)
    mass = share * total
    inside = factor * (high - low)
    within = low + (mass - low) / max(factor, 1e-12)
    return torch.where(mass < low, mass, torch.where(mass < low + inside, within, mass - inside + (high - low)))
