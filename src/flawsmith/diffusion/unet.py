"""The denoiser: diffusers' UNet2DModel behind a pixel-unshuffle, and a small refiner at full resolution.

Fully convolutional, so that it samples any size.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flawsmith.diffusion.config import DdpmTrainSettings
from flawsmith.errors import UserError
from flawsmith.files import atomic_file, read_json, write_json
from flawsmith.sections import parse_section, section_values, settings_digest

TIME_CHANNELS = 128  # of the refiner's sinusoidal embedding


class Denoiser(nn.Module):
    """Predicts epsilon or v from a noisy image in [-1, 1].

    Pixel-unshuffle by `patch` trades resolution for channels before the first convolution: on a CPU the same capacity
    costs about patch^2 times less than at full resolution. What it is slow to learn that way is the grain of single
    pixels, which decides the error at low noise; four thin convolutions at full resolution, told the time, add it
    from the noisy image and the UNet's answer. No attention, so cost grows with the area alone.
    """

    def __init__(self, settings: DdpmTrainSettings) -> None:
        super().__init__()
        self.patch = settings.patch
        levels = len(settings.channels)
        self.unet = UNet2DModel(
            in_channels=3 * settings.patch**2,
            out_channels=3 * settings.patch**2,
            block_out_channels=settings.channels,
            layers_per_block=settings.layers_per_block,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=8,
            add_attention=False,
        )
        self.refine = Refiner(settings.fine_channels)

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:  # (B, 3, H, W), (B,) -> (B, 3, H, W)
        packed = F.pixel_unshuffle(noisy, self.patch)
        coarse = F.pixel_shuffle(self.unet(packed, timestep).sample, self.patch)
        return coarse + self.refine(noisy, coarse, timestep)


class Refiner(nn.Module):
    """Four 3x3 convolutions on (noisy image, coarse answer), modulated by the time (FiLM); answers 0 at the start.

    Growing dilation sees 17 pixels across, enough to follow a brush line or a thread.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.film = nn.Sequential(
            nn.Linear(TIME_CHANNELS, TIME_CHANNELS // 2), nn.SiLU(), nn.Linear(TIME_CHANNELS // 2, 6 * width)
        )
        # reflected borders: zeros would be learnt as a rim, and a repeated noisy pixel looks like structure
        self.hidden = nn.ModuleList(
            [
                nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation, padding_mode="reflect")
                for inputs, dilation in ((6, 1), (width, 2), (width, 4))
            ]
        )
        self.answer = nn.Conv2d(width, 3, 3, padding=1, padding_mode="reflect")
        for parameter in self.answer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, noisy: Tensor, coarse: Tensor, timestep: Tensor) -> Tensor:
        modulation = self.film(self.time(timestep))[:, :, None, None].chunk(6, dim=1)
        hidden = torch.cat([noisy, coarse], dim=1)
        for layer, scale, shift in zip(self.hidden, modulation[::2], modulation[1::2], strict=True):
            hidden = F.silu(layer(hidden) * (1 + scale) + shift)
        return self.answer(hidden)


def build_scheduler(settings: DdpmTrainSettings) -> DDPMScheduler:
    """The noise schedule (Ho et al. 2020, eq. 4) with the prediction type of the settings."""
    return DDPMScheduler(
        num_train_timesteps=settings.train_timesteps,
        beta_schedule=settings.beta_schedule,
        prediction_type=settings.prediction,
    )


def save_denoiser(denoiser: Denoiser, settings: DdpmTrainSettings, precision: str, folder: Path) -> None:
    """Write `unet.safetensors` and `config.json` (the settings and the precision it was trained with, their digest)."""
    with atomic_file(folder / "unet.safetensors") as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in denoiser.state_dict().items()}, temporary)
    config = {"ddpm-train": section_values(settings), "digest": settings_digest(settings), "precision": precision}
    write_json(folder / "config.json", config)


def load_denoiser(folder: Path) -> tuple[Denoiser, DdpmTrainSettings]:
    """Read what `save_denoiser` wrote, in eval mode.

    Raises:
        UserError: a file is missing, damaged or does not fit the other.
    """
    config = read_json(folder / "config.json")
    settings = parse_section("ddpm-train", config.get("ddpm-train"), DdpmTrainSettings, str(folder / "config.json"))
    denoiser = Denoiser(settings)
    path = folder / "unet.safetensors"
    try:
        denoiser.load_state_dict(load_file(path))
    except Exception as error:
        raise UserError(
            f"{path} is missing or no checkpoint of the UNet described in config.json ({type(error).__name__}); "
            "run ddpm-train again."
        ) from error
    return denoiser.eval(), settings
