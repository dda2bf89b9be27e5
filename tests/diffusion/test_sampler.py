"""The disturbed reverse process: strength 0 is the plain DDPM, disturbance has the variance it says."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from flawsmith.diffusion.sampler import STRENGTH_UNIT, SamplingPlan, _time_grid, octave_noise, sample_disturbed


class Halver(nn.Module):
    """A stand-in for a denoiser whose answer depends on image and time."""

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        return 0.5 * noisy + 0.1 * (timestep / 1000).view(-1, 1, 1, 1)


class Nothing(nn.Module):
    """Predicts v = 0 or epsilon = 0."""

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        return torch.zeros_like(noisy)


def scheduler(prediction: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type=prediction)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("start", [0.3, 0.8])
def test_strength_zero_is_the_strided_ddpm_of_diffusers(prediction: str, start: float) -> None:
    clean = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(9)) * 2 - 1
    steps, model, reference = 10, Halver(), scheduler(prediction)
    ours = sample_disturbed(model, reference, clean, [start], [0.0], SamplingPlan(steps), generators(1))

    draws = generators(1)[0]
    times = [time - 1 for time in _time_grid([start], steps, 1000)[:-1, 0].tolist()]
    reference.set_timesteps(timesteps=times)
    noise = torch.randn(clean.shape, generator=draws)
    x = reference.add_noise(clean, noise, torch.tensor([times[0]]))
    for time in times:
        x = reference.step(model(x, torch.tensor([time])), time, x, generator=draws).prev_sample
    torch.testing.assert_close(ours, x.clamp(-1, 1), atol=2e-4, rtol=0)


def test_constant_rule_adds_the_same_variance_whatever_the_number_of_steps() -> None:
    """With a model that changes nothing but the scale, the extra variance can be followed step by step."""
    for steps in (5, 10):
        clean, plan = torch.zeros(1, 3, 64, 64), SamplingPlan(steps)
        disturbed = [
            sample_disturbed(Nothing(), scheduler("v_prediction"), clean, [0.2], [s], plan, generators(1))
            for s in (0.0, 0.05)
        ]
        extra = disturbed[1].var() - disturbed[0].var()
        # each disturbance is shrunk afterwards by the deterministic part; the sum over steps is bounded by the whole
        whole = 0.05**2 * STRENGTH_UNIT * 0.2
        assert 0 < extra < 1.1 * whole


def test_a_sample_does_not_depend_on_its_batch() -> None:
    clean = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    plan = SamplingPlan(6, "constant", 0.5, 3)
    starts, strengths = [0.5, 0.7, 0.9], [0.0, 0.1, 0.2]
    together = sample_disturbed(Halver(), scheduler(), clean, starts, strengths, plan, generators(3))
    for i in range(3):
        alone = sample_disturbed(
            Halver(), scheduler(), clean[i : i + 1], starts[i : i + 1], strengths[i : i + 1], plan,
            generators(3)[i : i + 1],
        )  # fmt: skip
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", ["constant", "realnet"])
def test_strength_zero_and_no_time_to_disturb_are_the_same(rule: str) -> None:
    clean = torch.zeros(1, 3, 16, 16)
    plain = sample_disturbed(Halver(), scheduler(), clean, [0.6], [0.0], SamplingPlan(6, rule), generators(1))
    never = sample_disturbed(
        Halver(), scheduler(), clean, [0.6], [0.3], SamplingPlan(6, rule, until=1.0), generators(1)
    )
    often = sample_disturbed(Halver(), scheduler(), clean, [0.6], [0.3], SamplingPlan(6, rule), generators(1))
    assert torch.equal(plain, never)
    assert not torch.equal(plain, often)


@pytest.mark.parametrize("octaves", [1, 2, 4, 6])
def test_octave_noise_has_unit_variance_at_every_pixel(octaves: int) -> None:
    draws = torch.stack([octave_noise((1, 40, 24), octaves, g) for g in generators(3000)])
    assert draws.mean().abs() < 0.05  # six octaves leave about 4 independent cells a draw
    variance = draws.var(dim=0)
    assert (variance - 1).abs().max() < 0.16  # 5 standard errors of a variance of 3000 draws
    assert (variance.mean() - 1).abs() < 0.02


def test_more_octaves_are_smoother() -> None:
    def neighbour_correlation(octaves: int) -> float:
        noise = octave_noise((1, 256, 256), octaves, torch.Generator().manual_seed(0))[0]
        return float((noise[:, 1:] * noise[:, :-1]).mean())

    correlations = [neighbour_correlation(octaves) for octaves in (1, 2, 3, 4)]
    assert abs(correlations[0]) < 0.02
    assert correlations == sorted(correlations)
