"""Training of the denoiser on random crops of normal images: a short loop that reads top to bottom.

Crops make it work from about 30 images: the model learns the surface's texture, not 30 pictures by heart.
"""

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.devices import Compute
from flawsmith.diffusion.config import DdpmTrainSettings
from flawsmith.diffusion.unet import Denoiser, build_scheduler
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.progress import bar
from flawsmith.randomness import numpy_generator, torch_generator
from flawsmith.training import ResumePoint, Rows, check_finite, learning_rate

LOSS_COLUMNS = ("step", "loss", "learning_rate")


def train_denoiser(
    images: NDArray[np.uint8],
    settings: DdpmTrainSettings,
    resume: ResumePoint,
    compute: Compute,
    on_step: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
) -> tuple[Denoiser, Rows]:
    """Train on `images` (N, 3, H, W) uint8 and return the EMA model on the CPU with one row of LOSS_COLUMNS a step.

    Simple loss of Ho et al. 2020, eq. 14 (or its v form, Salimans & Ho 2022). Under `accelerate launch` every process
    takes its share of each step's crops, which are the same crops whatever the number of processes; all return the
    same, the main one alone writes checkpoints.

    Raises:
        UserError: an image is smaller than a crop, or the processes cannot share a batch evenly.
        FlawsmithError: the loss became NaN, or the processes do not see the same checkpoint.
    """
    if min(images.shape[2:]) < settings.crop:
        raise UserError(f"ddpm-train.crop is {settings.crop} px but images have {images.shape[2:]}; lower it.")
    # `no`: the precision is `compute`'s, and Accelerator cannot change its mind within a process
    accelerator = Accelerator(mixed_precision="no", cpu=compute.device.type == "cpu")
    if settings.batch % accelerator.num_processes:
        raise UserError(
            f"ddpm-train.batch is {settings.batch}, which {accelerator.num_processes} processes cannot share evenly; "
            f"make it a multiple of {accelerator.num_processes}."
        )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # layers draw their initial weights from the global generator
        denoiser = Denoiser(settings).to(memory_format=torch.channels_last)
    average = copy.deepcopy(denoiser).to(accelerator.device).requires_grad_(False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    scheduler = build_scheduler(settings)
    parts = {"model": accelerator.unwrap_model(model), "average": average, "optimizer": optimizer}
    first, rows = resume.load(parts)
    if len(set(accelerator.gather(torch.tensor([first], device=accelerator.device)).tolist())) > 1:
        raise FlawsmithError(
            f"The processes of this training do not see the same checkpoint in {resume.folder}; put the project on a "
            "file system that all hosts share."
        )

    progress = bar(
        range(first, settings.steps),
        "ddpm-train",
        settings.steps,
        "step",
        done=first,
        is_shown=accelerator.is_main_process,
    )
    for step in progress:
        clean, noise, timestep = _batch(images, settings, step)
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        clean, noise, timestep = (part[mine].to(accelerator.device) for part in (clean, noise, timestep))
        noisy = scheduler.add_noise(clean, noise, timestep).contiguous(memory_format=torch.channels_last)
        target = noise if settings.prediction == "epsilon" else scheduler.get_velocity(clean, noise, timestep)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.warmup, settings.learning_rate)
        with compute.autocast():
            predicted = model(noisy, timestep)
        loss = F.mse_loss(predicted.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _update_average(average, accelerator.unwrap_model(model), settings.ema, step)

        value = float(accelerator.reduce(loss.detach(), "mean"))
        check_finite(value, step, "ddpm-train")
        rows.append([step, value, optimizer.param_groups[0]["lr"]])
        on_step(step, {"loss": value})
        progress.set_postfix(loss=f"{value:.4f}", refresh=False)
        if (step + 1) % settings.checkpoint_every == 0 and accelerator.is_main_process:
            resume.save(parts, step + 1, rows)
    if accelerator.num_processes > 1:
        accelerator.end_training()
    return average.cpu().eval(), rows


def _batch(images: NDArray[np.uint8], settings: DdpmTrainSettings, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops in [-1, 1] (B, 3, c, c), their noise and their timesteps (B,), all drawn from this step's streams."""
    generator = numpy_generator(settings.seed, "ddpm-crops", step)
    crops = random_crops(images, settings.crop, settings.batch, generator, settings.flip)
    draws = torch_generator(settings.seed, "ddpm-noise", step)
    noise = torch.randn(crops.shape, generator=draws)
    # stratified: a small batch still sees the whole range of noise levels, which lowers the gradient's variance
    strata = (torch.arange(settings.batch) + torch.rand(settings.batch, generator=draws)) / settings.batch
    return crops, noise, (strata * settings.train_timesteps).long().clamp_max(settings.train_timesteps - 1)


def random_crops(
    images: NDArray[np.uint8], side: int, count: int, generator: np.random.Generator, flip: bool = False
) -> Tensor:
    """`count` random square crops of (N, 3, H, W) uint8 images as floats in [-1, 1], (count, 3, side, side)."""
    which = generator.integers(0, len(images), count)
    tops = generator.integers(0, images.shape[2] - side + 1, count)
    lefts = generator.integers(0, images.shape[3] - side + 1, count)
    mirrored = generator.random((count, 2)) < 0.5
    crops = []
    for index, top, left, (vertical, horizontal) in zip(which, tops, lefts, mirrored, strict=True):
        crop = images[index, :, top : top + side, left : left + side]
        if flip:
            crop = crop[:, :: -1 if vertical else 1, :: -1 if horizontal else 1]
        crops.append(crop)
    return torch.from_numpy(np.stack(crops).astype(np.float32) / np.float32(127.5) - np.float32(1))


def to_unit_range(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the diffusion sees, in [-1, 1], as float images in [0, 1]."""
    return (images + np.float32(1)) / np.float32(2)


@torch.no_grad()
def _update_average(average: Denoiser, model: Denoiser, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # a young average forgets its random start quickly
    torch._foreach_lerp_(list(average.parameters()), [value.detach() for value in model.parameters()], 1 - decay)
