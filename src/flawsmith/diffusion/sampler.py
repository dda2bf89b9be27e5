"""The disturbed reverse process (arXiv 2604.19240): a DDPM's sampling with extra noise of constant variance a step.

    x_s = mu(x_t, t, s) + sqrt(sigma^2(t, s) + d^2) z

`mu` and `sigma` are the posterior of q(x_s | x_t, x_0) between any two times s < t (Ho et al. 2020, eq. 7, for
s = t - 1; strided as in Nichol & Dhariwal 2021), so a few steps suffice. With strength 0 this is the plain DDPM.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.devices import CPU, Compute
from flawsmith.diffusion.unet import Denoiser

SPACING = 1.5  # exponent of the time grid
STRENGTH_UNIT = 20  # strength is the standard deviation added per T / 20 of diffusion time


@dataclass(frozen=True)
class SamplingPlan:
    """How one batch is sampled and disturbed.

    Attributes:
        steps: of the reverse process.
        rule: `constant` adds variance s^2 per T/20 of diffusion time at every step, so that the texture does not depend
            on the number of steps; `realnet` multiplies the posterior variance by 1 + s (RealNet, CVPR 2024, eq. 4).
        until: disturb only while t / t0 is above this share: what is disturbed last is never denoised, it stays grain.
        octaves: 1 is white noise; more add coarser octaves at unchanged variance, which leaves structure, not grain.
        compute: where the denoiser lies, and its precision.
    """

    steps: int
    rule: str = "constant"
    until: float = 0.0
    octaves: int = 1
    compute: Compute = CPU


@torch.inference_mode()
def sample_disturbed(
    denoiser: Denoiser,
    scheduler: DDPMScheduler,
    clean: Tensor,
    start: Sequence[float],
    strength: Sequence[float],
    plan: SamplingPlan,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Noise `clean` windows to their starting times and bring them back, disturbed.

    Args:
        clean: (B, 3, H, W) in [-1, 1] on the CPU; H and W multiples of what the UNet divides by.
        start: B starting times as shares of T; 1 forgets `clean` altogether.
        strength: B strengths s >= 0.
        generators: B CPU generators, one a sample, so that a sample's noise does not depend on its batch.

    Returns:
        (B, 3, H, W) in [-1, 1], on the CPU.
    """
    device, steps = plan.compute.device, plan.steps
    total = scheduler.config.num_train_timesteps
    cumulative = scheduler.alphas_cumprod.to(torch.float64)
    times = _time_grid(start, steps, total)  # (steps + 1, B), last row 0 = clean
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), cumulative])[times]  # index 0 is "no noise"
    s = torch.tensor(strength, dtype=torch.float64)

    first = _column(alpha_bar[0])
    x = first.sqrt().float() * clean + (1 - first).sqrt().float() * _noise(clean.shape[1:], generators, 1)
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    for k in range(steps):
        now, then = alpha_bar[k], alpha_bar[k + 1]
        with plan.compute.autocast():
            prediction = denoiser(x, (times[k] - 1).clamp_min(0).to(device)).float()
        x0 = _predict_clean(x, prediction, now.to(device), scheduler.config.prediction_type).clamp(-1, 1)
        ratio = now / then  # alpha_{t|s}
        weight_x0 = then.sqrt() * (1 - ratio) / (1 - now)
        weight_xt = ratio.sqrt() * (1 - then) / (1 - now)
        variance = (1 - ratio) * (1 - then) / (1 - now)
        x = _column(weight_x0, x) * x0 + _column(weight_xt, x) * x
        x += _column(variance.sqrt(), x) * _noise(clean.shape[1:], generators, 1).to(device)
        constant = s**2 * STRENGTH_UNIT * (times[k] - times[k + 1]) / total
        extra = s * variance if plan.rule == "realnet" else constant
        extra = extra * (times[k + 1] > plan.until * times[0])
        if extra.any():  # drawn by those samples alone that use it, so that no sample depends on its batch
            used = [generator if e > 0 else None for generator, e in zip(generators, extra, strict=True)]
            x += _column(extra.sqrt(), x) * _noise(clean.shape[1:], used, plan.octaves).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
    return x.clamp(-1, 1).cpu().contiguous()


def _time_grid(start: Sequence[float], steps: int, total: int) -> Tensor:
    """(steps + 1, B) integer times from t0 <= T down to 0; time t is index t - 1 of the schedule.

    Spaced as (1 - k / steps)^1.5, denser near 0: the last step answers the model's estimate of the clean image, which
    is smooth below the noise of that step, so it must begin at little noise or the surface loses its grain.
    Every step goes down by at least 1, so t0 is at least `steps`.
    """
    t0 = np.clip(np.rint(np.asarray(start) * total), min(steps, total), total)
    grid = np.rint(t0[None] * (1 - np.arange(steps + 1) / steps)[:, None] ** SPACING)
    floor = np.arange(steps, -1, -1)[:, None]
    return torch.from_numpy(np.maximum(grid, floor).astype(np.int64))


def _predict_clean(x: Tensor, prediction: Tensor, alpha_bar: Tensor, kind: str) -> Tensor:
    a, b = _column(alpha_bar.sqrt(), x), _column((1 - alpha_bar).sqrt(), x)
    if kind == "v_prediction":
        return a * x - b * prediction
    return (x - b * prediction) / a.clamp_min(1e-4)


def _column(values: Tensor, like: Tensor | None = None) -> Tensor:
    column = values.view(-1, 1, 1, 1)
    return column if like is None else column.to(like.device, like.dtype)


def _noise(shape: torch.Size, generators: Sequence[torch.Generator | None], octaves: int) -> Tensor:
    draws = [torch.zeros(shape) if g is None else octave_noise(shape, octaves, g) for g in generators]
    return torch.stack(draws)


def octave_noise(shape: Sequence[int], octaves: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise (C, H, W), zero mean, unit variance at every pixel, summed from `octaves` scales 1, 2, 4, ... px.

    A coarse octave is white noise on a coarser grid, interpolated bilinearly and divided by the standard deviation that
    the interpolation leaves at each pixel, so that the variance is 1 everywhere exactly.
    """
    channels, height, width = shape
    total = torch.randn((channels, height, width), generator=generator)
    for octave in range(1, octaves):
        rows, columns = (_interpolation(side, 2**octave) for side in (height, width))
        coarse = torch.randn((channels, rows.shape[1], columns.shape[1]), generator=generator)
        total += torch.from_numpy(rows) @ coarse @ torch.from_numpy(columns).T
    return total / octaves**0.5


def _interpolation(side: int, factor: int) -> NDArray[np.float32]:
    """(side, coarse) bilinear weights whose rows have unit 2-norm: they map white noise to unit-variance noise."""
    position = (np.arange(side) + 0.5) / factor
    left = np.floor(position).astype(int)
    share = (position - left).astype(np.float32)
    weights = np.zeros((side, left[-1] + 2), np.float32)
    weights[np.arange(side), left] = 1 - share
    weights[np.arange(side), left + 1] = share
    return weights / np.linalg.norm(weights, axis=1, keepdims=True)
