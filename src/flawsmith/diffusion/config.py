"""`ddpm-train`: the diffusion model."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Rate, Seed

SAMPLE_STEPS = 40  # reverse steps of a plain sample: strided DDPM needs more than a few from pure noise
NORM_GROUPS = 8  # of the UNet; they divide its channels


Channels = Annotated[int, Field(ge=NORM_GROUPS, le=2048, multiple_of=NORM_GROUPS)]
Schedule = Literal["linear", "squaredcos_cap_v2", "scaled_linear"]


@dataclass(frozen=True, config=STRICT)
class DdpmTrainSettings:
    """`ddpm-train`: the denoising diffusion model of the normal surface."""

    seed: Seed = Field(0, description="seed of initialisation, crops, noise and samples")
    crop: int = Field(64, ge=16, le=1024, description="side of the random training crops in pixels")
    patch: int = Field(4, ge=1, le=8, description="pixel-unshuffle factor in front of the UNet (1 = none)")
    channels: tuple[Channels, ...] = Field((32, 64, 96), min_length=1, description="UNet channels a level")
    layers_per_block: int = Field(1, ge=1, le=4, description="residual blocks a level")
    fine_channels: int = Field(16, ge=4, le=512, description="channels of the full-resolution refiner behind the UNet")
    train_timesteps: int = Field(1000, ge=SAMPLE_STEPS, le=4000, description="T of the diffusion")
    prediction: Literal["epsilon", "v_prediction"] = Field("v_prediction", description="what the UNet predicts")
    beta_schedule: Schedule = Field("squaredcos_cap_v2", description="noise schedule")
    steps: int = Field(1200, ge=1, le=10_000_000, description="optimiser steps")
    batch: int = Field(12, ge=1, le=4096, description="crops a step")
    learning_rate: Rate = Field(2e-3, description="peak of the cosine schedule")
    warmup: int = Field(50, ge=0, le=1_000_000, description="steps of linear warm-up")
    ema: float = Field(0.995, ge=0, le=0.99999, description="decay of the exponential moving average of the weights")
    checkpoint_every: int = Field(250, ge=1, le=1_000_000, description="steps between resumable checkpoints")
    flip: bool = Field(True, description="mirror crops at random (off where left and right differ)")
    readiness_samples: int = Field(32, ge=4, le=4096, description="plain samples drawn to judge readiness")

    @property
    def multiple(self) -> int:
        """The divisor of the UNet's input sides: the patch, halved at every level but the first."""
        return int(self.patch * 2 ** (len(self.channels) - 1))
